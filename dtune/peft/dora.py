"""DoRA, Liu et al. 2024, arXiv:2402.09353. Equal to HF ``peft`` in forward, gradient and file.

Shape legend: R rank, D input features, O output features; leading dims are any.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from dtune.peft.lora import LoraLinear, LowRank
from dtune.types import QuantizedLinearLike, TensorSource

MAGNITUDE = "lora_magnitude_vector"


class DoraLinear(LoraLinear):
    """Rows of V = W + scale * B A at the length m: y = m / ||V|| * V x + bias, eq. 5.

    ``lora_magnitude_vector`` is m [O]. The norm takes part in no gradient (sec. 4.3). As in peft,
    with dropout y is W x + (m / ||V|| - 1) * W dropout(x) + m / ||V|| * scale * B A dropout(x).

    The norm needs the weight of the child ``base``, which is read here, within a forward that is
    called with a positional tensor: ZeRO-3 gathers it for that long.
    """

    lora_magnitude_vector: nn.Parameter

    def __init__(self, base: nn.Module, *, rank: int, scale: float, dropout: float) -> None:
        super().__init__(base, rank=rank, scale=scale, dropout=dropout)
        shape = (self.out_features,)
        empty = torch.empty(shape, dtype=torch.float32, device=self.lora_A.device)
        self.lora_magnitude_vector = nn.Parameter(empty)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., O], in the dtype of the base's output."""
        gain = self.lora_magnitude_vector / self.row_norm()  # [O]
        y: torch.Tensor = self.base(x)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.dtype)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
            product = self._product(x)
        else:
            product = self._unbiased(y)
        update = F.linear(F.linear(x, self.lora_A), self.lora_B)  # [..., R], [..., O]
        return (y + ((gain - 1) * product + gain * update * self.scale)).to(y.dtype)

    @torch.no_grad()
    def row_norm(self) -> torch.Tensor:
        """||W + scale * B A|| of each row [O], in fp32 or more; W is dequantised anew."""
        a: torch.Tensor = self.lora_A
        b: torch.Tensor = self.lora_B
        dtype = torch.promote_types(a.dtype, torch.float32)
        if isinstance(self.base, nn.Linear):
            weight: torch.Tensor = self.base.weight.to(dtype)
        else:
            weight = self._quantized().frozen_weight().dequantize(dtype)
        if not torch.is_autocast_enabled(a.device.type):
            # In 16 bits, the sum with W would round a small update away.
            a, b = a.to(dtype), b.to(dtype)
        return norm_rows(weight + self.scale * (b @ a).to(dtype))

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        """W x."""
        if isinstance(self.base, nn.Linear):
            return F.linear(x, self.base.weight.to(x.dtype))
        return self._unbiased(self.base(x))

    def _unbiased(self, y: torch.Tensor) -> torch.Tensor:
        """The base's output without its bias."""
        bias = self.base.bias if isinstance(self.base, nn.Linear) else self._quantized().bias
        return y if bias is None else y - bias

    def _quantized(self) -> QuantizedLinearLike:
        # Not by isinstance: asking a protocol takes as long as a small kernel.
        return cast(QuantizedLinearLike, self.base)


class Dora(LowRank):
    """Low-rank updates of direction, and a trained length of each row."""

    use_dora = True

    def wrap(self, base: nn.Module) -> LoraLinear:
        """The module that takes the place of a target."""
        config = self.config
        return DoraLinear(base, rank=config.rank, scale=self.scale, dropout=config.dropout)

    def source(self, stored: TensorSource, held: TensorSource, seed: int) -> TensorSource:
        """As LoRA; the lengths are those that the rows of the base have as it computes."""
        factors = super().source(stored, held, seed)
        dtypes = {}
        for path, wrapped in self._wrapped.items():
            plain = wrapped.base.weight.dtype if isinstance(wrapped.base, nn.Linear) else None
            dtypes[path] = plain or torch.float32
        return LengthSource(factors, held, dtypes)


class LengthSource:
    """``factors``, and the magnitude of each target: read by rows, whichever are asked for."""

    def __init__(
        self, factors: TensorSource, held: TensorSource, dtypes: Mapping[str, torch.dtype]
    ) -> None:
        """``dtypes``: path of each target -> dtype that its float weight is rounded to."""
        self._factors, self._held, self._dtypes = factors, held, dict(dtypes)

    def _weight(self, name: str) -> str:
        return f"{name.removesuffix(f'.{MAGNITUDE}')}.base.weight"

    def __contains__(self, name: str) -> bool:
        path, _, leaf = name.rpartition(".")
        return name in self._factors or (leaf == MAGNITUDE and path in self._dtypes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        if name in self._factors:
            return self._factors.shape(name)
        return self._held.shape(self._weight(name))[:1]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor: fp32, CPU."""
        if name in self._factors:
            return self._factors.read(name, start, stop)
        weight = self._weight(name)
        width = self._held.shape(weight)[1]
        rows = self._held.read(weight, start * width, stop * width).view(-1, width)
        dtype = self._dtypes[name.removesuffix(f".{MAGNITUDE}")]
        return norm_rows(rows.to(dtype).float())


def norm_rows(weight: torch.Tensor) -> torch.Tensor:
    """Length of each row of [O, D], the same to the last bit whichever rows are beside it."""
    if len(weight) == 1:
        # A reduction to a single number is cut among threads, which adds in another order.
        return norm_rows(weight.repeat(2, 1))[:1]
    norm: torch.Tensor = torch.linalg.vector_norm(weight, dim=1)
    return norm
