"""Peak memory of this process and its device."""

from __future__ import annotations

import resource
import sys

import torch

GIB = 1024**3


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held at once so far: of the device where it is CUDA, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
