"""From files to batches: read, render, tokenise, pack, batch."""
