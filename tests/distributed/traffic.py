"""Cases that count what a rank really sends in a training step, by the kernel's own count.

gloo writes to sockets with ``write``, which Linux counts for each process. A ring sends (n - 1) / n
of what is gathered, and twice that of what is reduced, from each of n ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dtune.runtime.world import World
from tests.distributed.training import VOCABULARY, Setup, build_engine, train

HEADERS = 8192
"""Bytes that gloo may add to one collective: a few messages to each of some ranks."""
COUNTED = Path("/proc/self/io")


def bytes_written() -> int:
    """By this process so far, to files and sockets."""
    rows = dict(line.split(": ") for line in COUNTED.read_text().splitlines())
    return int(rows["wchar"])


def count_step(world: World, *, setup: Setup) -> dict[str, Any]:
    """Bytes that this rank sends in the second step of a run, and the sizes of its parameters."""
    engine = build_engine(world, setup)
    shapes = {name: (p.numel(), p.itemsize) for name, p in engine.module.named_parameters()}
    if setup.engine == "zero3":
        shapes = {n: (p.ds_numel, p.itemsize) for n, p in engine.module.named_parameters()}
    train(world, engine, setup, range(1))
    dist.barrier()
    before = bytes_written()
    train(world, engine, setup, range(1, 2))
    sent = bytes_written() - before
    return {"sent": sent, "sizes": {name: n * size for name, (n, size) in shapes.items()}}


def count_reductions(world: World, *, setup: Setup) -> dict[str, Any]:
    """The same for one all-reduce of the gradients' size, and what the gradients' bytes are."""
    engine = build_engine(world, setup)
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    calls: list[int] = []
    real = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(tensor.nbytes)
        return real(tensor, *args, **kwargs)

    train(world, engine, setup, range(1))
    batch_free = {"gradients": sum(4 * p.numel() for p in trained)}
    dist.barrier()
    dist.all_reduce = counted
    try:
        before = bytes_written()
        train(world, engine, setup, range(1, 2))
        sent = bytes_written() - before
    finally:
        dist.all_reduce = real
    return {**batch_free, "sent": sent, "calls": calls}


def wide_config(folder: Path) -> Path:
    """Write the config of a Llama whose linears outweigh all else."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    ).save_pretrained(folder)
    return folder
