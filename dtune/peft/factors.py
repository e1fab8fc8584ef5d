"""Initialisations that take A and B out of the base: PiSSA and OLoRA.

Shape legend: R rank, D input features, O output features.

All is computed in fp64 and rounded to fp32 once. Ranks that add up in another order, because they
have other threads or another library, then round to the same values: each computes them itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from dtune.peft.base import keyed_seed
from dtune.types import TensorSource

Decompose = Callable[[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Name and W [O, D], fp64 -> A [R, D] and B [O, R]."""


@dataclass(frozen=True)
class Factors:
    """What A and B are at the start: fp32 on CPU."""

    a: torch.Tensor
    """[R, D]."""
    b: torch.Tensor
    """[O, R]."""


class StartingFactors:
    """A0 and B0 of each target, and the W - scale * B0 A0 that is left.

    Kept are all factors, which are as large as the adapter, and what is left of the last target:
    an engine reads the tensors of a layer one after the other.
    """

    def __init__(
        self,
        stored: TensorSource,
        weights: Mapping[str, str],
        decompose: Decompose,
        *,
        scale: float,
    ) -> None:
        """``weights``: path of each target -> name of its weight in ``stored``."""
        self._stored, self._weights = stored, dict(weights)
        self._decompose, self._scale = decompose, scale
        self._factors: dict[str, Factors] = {}
        self._last: tuple[str, torch.Tensor] | None = None

    def factors(self, path: str) -> Factors:
        """A0 and B0 of a target."""
        if path not in self._factors:
            self._compute(path)
        return self._factors[path]

    def rest(self, path: str) -> torch.Tensor:
        """W - scale * B0 A0 of a target: [O, D], fp32."""
        if self._last is None or self._last[0] != path:
            self._compute(path)
        assert self._last is not None
        return self._last[1]

    def _compute(self, path: str) -> None:
        name = self._weights[path]
        shape = self._stored.shape(name)
        whole = self._stored.read(name, 0, torch.Size(shape).numel()).view(shape).double()
        if path not in self._factors:
            a, b = self._decompose(name, whole)
            self._factors[path] = Factors(a.float(), b.float())
        own = self._factors[path]
        # From the factors as they are rounded: so the sum is W to the last bit of what is left.
        rest = whole.addmm_(own.b.double(), own.a.double(), alpha=-self._scale)
        self._last = (path, rest.float())


class RestSource:
    """The weights of the checkpoint, those of the targets without what A0 and B0 hold of them."""

    def __init__(
        self, stored: TensorSource, paths: Mapping[str, str], start: StartingFactors
    ) -> None:
        """``paths``: name of each target's weight -> its path."""
        self._stored, self._paths, self._start = stored, dict(paths), start

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._stored.shape(name)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop): fp32 for the targets, else as stored."""
        if name not in self._paths:
            return self._stored.read(name, start, stop)
        return self._start.rest(self._paths[name]).view(-1)[start:stop]


class FactorSource:
    """A0 and B0 under the names of ``lora_A`` and ``lora_B``."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], start: StartingFactors) -> None:
        self._shapes, self._start = dict(shapes), start

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._shapes[name]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor: fp32, CPU."""
        path, _, leaf = name.rpartition(".")
        factors = self._start.factors(path)
        values = factors.a if leaf == "lora_A" else factors.b
        return values.reshape(-1)[start:stop]


class HalfSource:
    """A and B of a run in a file that holds [A; A0] and [B, -B0]."""

    def __init__(self, file: TensorSource, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """``shapes``: of the run's parameters; those that the file has at once are whole there."""
        self._file, self._shapes = file, dict(shapes)

    def __contains__(self, name: str) -> bool:
        return name in self._file

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the run's parameter."""
        return self._shapes[name]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the run's parameter, flattened."""
        shape, stored = self._shapes[name], self._file.shape(name)
        if stored[1:] == shape[1:] or stop <= start:
            # The first rows of a tensor come first.
            return self._file.read(name, start, stop)
        width, wide = shape[1], stored[1]
        first, last = start // width, -(-stop // width)
        rows = self._file.read(name, first * wide, last * wide).view(-1, wide)
        return rows[:, :width].reshape(-1)[start - first * width : stop - first * width]


def double(name: str, values: torch.Tensor, factors: Factors) -> torch.Tensor:
    """[A; A0] or [B, -B0]: B A - B0 A0, an update of the base that A0 and B0 came from."""
    if name.endswith(".lora_A"):
        return torch.cat([values, factors.a])
    return torch.cat([values, -factors.b], dim=1)


def decompose_pissa(rank: int, *, scale: float, iterations: int) -> Decompose:
    """Factors with scale * B A = the largest ``rank`` singular directions of W.

    PiSSA, Meng et al. 2024, arXiv:2404.02948, eq. 2 and 3. ``iterations``: power iterations of a
    randomised SVD (Halko et al. 2009, arXiv:0909.4061), seeded by the name; 0: an exact SVD.
    """

    def decompose(name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if iterations:
            with torch.random.fork_rng(devices=[]):
                # Not the run's seed: what is left is part of the base, and the base has no seed.
                torch.manual_seed(keyed_seed(0, name))
                size = min(2 * rank, *weight.shape)
                u, s, v = torch.svd_lowrank(weight, q=size, niter=iterations)
            vh = v.T
        else:
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        root = (s[:rank] / scale).sqrt()
        # A pair of singular vectors has a sign, which is the library's choice.
        sign = torch.where(u[:, :rank].sum(0) < 0, -1.0, 1.0)
        return (sign * root)[:, None] * vh[:rank], u[:, :rank] * (sign * root)

    return decompose


def decompose_olora(rank: int) -> Decompose:
    """The first ``rank`` columns of Q and rows of R, with W = Q R.

    OLoRA, Buyukakyuz 2024, arXiv:2406.01775; as in peft, the scale is left to what is subtracted.
    """

    def decompose(name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # The first columns of Q follow from the first columns of W alone.
        q, _ = torch.linalg.qr(weight[:, :rank])
        return q.T @ weight, q

    return decompose
