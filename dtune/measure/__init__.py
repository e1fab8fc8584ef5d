"""FLOPs, memory and throughput."""
