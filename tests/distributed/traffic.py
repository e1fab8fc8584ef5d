"""Cases that count what a rank really sends in a training step: on its sockets, and by collective.

gloo writes to sockets with ``write``, which Linux counts for each process. What a collective is
given passes torch's dispatcher, whoever asks for it, DDP's own C++ included; a ring then sends
(n - 1) / n of what is gathered or scattered, and twice that of what is reduced everywhere, from
each of n ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dtune.runtime.world import World
from tests.distributed.training import VOCABULARY, Setup, build_engine, train

COUNTED = Path("/proc/self/io")

FEW = 64
"""Bytes of losses, norms and flags, which the plan leaves out."""

# Of each collective its kind, and which of its arguments holds the whole tensors.
_WHOLE = {
    "allreduce_": ("all-reduce", 0),
    "allreduce_coalesced_": ("all-reduce", 0),
    "_allgather_base_": ("all-gather", 0),
    "allgather_": ("all-gather", 0),
    "allgather_coalesced_": ("all-gather", 0),
    "allgather_into_tensor_coalesced_": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
}


@dataclass(frozen=True)
class Sent:
    """One collective that a rank took part in."""

    kind: str
    """all-gather, reduce-scatter or all-reduce."""
    whole: int
    """Bytes of the whole tensors."""
    ranks: int

    @property
    def by_ring(self) -> int:
        """Bytes that a rank of a ring sends."""
        times = 2 if self.kind == "all-reduce" else 1
        return times * (self.ranks - 1) * self.whole // self.ranks


class Collectives(TorchDispatchMode):
    """Notes every collective while inside; fails for one that it does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Sent] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self._note(func, args)
        return func(*args, **(kwargs or {}))

    def _note(self, func: Any, args: tuple[Any, ...]) -> None:
        name = func.overloadpacket.__name__
        assert name in _WHOLE, f"{func} is a collective that is not counted"
        kind, place = _WHOLE[name]
        tensors = [one for one in tree_leaves(args[place]) if isinstance(one, torch.Tensor)]
        group = next(one for one in args if isinstance(one, torch.ScriptObject | dist.ProcessGroup))
        if isinstance(group, torch.ScriptObject):
            group = dist.ProcessGroup.unbox(group)
        self.seen.append(Sent(kind, sum(t.nbytes for t in tensors), group.size()))


@dataclass(frozen=True)
class Traffic:
    """What one rank sends in one step."""

    sent: int
    """Bytes on sockets."""
    sizes: dict[str, int]
    """Bytes of every parameter, whole."""
    trained: int
    """Elements of trained parameters, whole."""
    frozen: int
    """Bytes of the others, whole."""
    collectives: tuple[Sent, ...]
    """In order."""

    def linears(self) -> int:
        """Bytes of the frozen linears."""
        return sum(size for name, size in self.sizes.items() if "_proj.base." in name)

    def by_kind(self) -> dict[str, int]:
        """Bytes by a ring, of each kind over so many ranks; a few bytes are left out."""
        found: Counter[str] = Counter()
        for one in self.collectives:
            if one.whole > FEW:
                found[f"{one.kind}/{one.ranks}"] += one.by_ring
        return dict(found)

    def times(self) -> dict[str, int]:
        """How often there was one of each kind over so many ranks; the same are left out."""
        shown = [f"{one.kind}/{one.ranks}" for one in self.collectives if one.whole > FEW]
        return dict(Counter(shown))


def bytes_written() -> int:
    """By this process so far, to files and sockets."""
    rows = dict(line.split(": ") for line in COUNTED.read_text().splitlines())
    return int(rows["wchar"])


def count_step(world: World, *, setup: Setup, reach: int = 0) -> Traffic:
    """Count the third step of a run: by then every engine has found its order.

    ``reach``: elements between two uses of a parameter up to which ZeRO-3 keeps it, instead of
    DeepSpeed's 1e9, which no small model has. 0: those.
    """
    with _reaching(reach):
        engine = build_engine(world, setup)
    named = list(engine.module.named_parameters())
    sizes = {name: _numel(p) * p.itemsize for name, p in named}
    trained = sum(_numel(p) for _, p in named if p.requires_grad)
    frozen = sum(sizes[name] for name, p in named if not p.requires_grad)
    train(world, engine, setup, range(2))
    dist.barrier()
    with Collectives() as collectives:
        before = bytes_written()
        train(world, engine, setup, range(2, 3))
        sent = bytes_written() - before
    return Traffic(sent, sizes, trained, frozen, tuple(collectives.seen))


@contextmanager
def _reaching(reach: int) -> Iterator[None]:
    """Scale down by how far DeepSpeed looks ahead, in the proportions of its own settings."""
    if not reach:
        yield
        return
    from dtune.parallel.deepspeed import DeepSpeedEngine

    real = DeepSpeedEngine._settings

    def settings(engine: DeepSpeedEngine, model: nn.Module) -> dict[str, Any]:
        found = real(engine, model)
        found["zero_optimization"] |= {
            "stage3_max_reuse_distance": reach,
            "stage3_max_live_parameters": reach,
            "stage3_prefetch_bucket_size": reach // 20,
        }
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeepSpeedEngine, "_settings", settings)
        yield


def _numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, which ZeRO-3 has taken the shape of."""
    place: Any = parameter
    return int(place.ds_numel) if "ds_numel" in vars(parameter) else parameter.numel()


def wide_config(folder: Path, *, blocks: int = 2) -> Path:
    """Write the config of a Llama whose linears outweigh all else."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    return folder
