"""Cases that count what a rank really sends in a training step, by the kernel's own count.

gloo writes to sockets with ``write``, which Linux counts for each process. A ring sends (n - 1) / n
of what is gathered, and twice that of what is reduced, from each of n ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dtune.runtime.world import World
from tests.distributed.training import VOCABULARY, Setup, build_engine, train

COUNTED = Path("/proc/self/io")


def bytes_written() -> int:
    """By this process so far, to files and sockets."""
    rows = dict(line.split(": ") for line in COUNTED.read_text().splitlines())
    return int(rows["wchar"])


@dataclass(frozen=True)
class Traffic:
    """What one rank sends in one step."""

    sent: int
    """Bytes."""
    sizes: dict[str, int]
    """Bytes of every parameter, whole."""
    reduced: list[int]
    """Bytes of each tensor that was given to an all-reduce of torch.distributed."""

    def linears(self) -> int:
        """Bytes of the frozen linears."""
        return sum(size for name, size in self.sizes.items() if "_proj.base." in name)


def count_step(world: World, *, setup: Setup) -> Traffic:
    """Count the second step of a run."""
    engine = build_engine(world, setup)
    sizes = {name: _numel(p) * p.itemsize for name, p in engine.module.named_parameters()}
    train(world, engine, setup, range(1))
    reduced: list[int] = []
    real = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        reduced.append(tensor.nbytes)
        return real(tensor, *args, **kwargs)

    dist.barrier()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted)
        before = bytes_written()
        train(world, engine, setup, range(1, 2))
        sent = bytes_written() - before
    return Traffic(sent, sizes, reduced)


def _numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, which ZeRO-3 has taken the shape of."""
    place: Any = parameter
    return int(place.ds_numel) if "ds_numel" in vars(parameter) else parameter.numel()


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
