"""FLOPs a token of the run at hand, and the peak of its devices."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dtune.measure.flops import FlopsModel, peak_flops
from dtune.runtime.schema import Precision
from dtune.runtime.world import World
from dtune.types import ModelSpec


@dataclass(frozen=True)
class Speed:
    """What turns tokens per second into a share of the devices' peak."""

    flops_per_token: float
    peak_flops: float | None
    """Of all devices together in FLOP/s; None where it is not known."""

    def mfu(self, tokens_per_second: float) -> float | None:
        """Share of the peak, where that is known."""
        if self.peak_flops is None:
            return None
        return tokens_per_second * self.flops_per_token / self.peak_flops


@dataclass(frozen=True)
class MatrixCounts:
    """Parameters of matrix products; embedding look-ups multiply nothing."""

    frozen: int
    trained: int


def count_matrices(model: nn.Module) -> MatrixCounts:
    """Count a model with its method in place, before its linears become bytes."""
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    uses = Counter(p for _, p in model.named_parameters(remove_duplicate=False))
    frozen = trained = 0
    for parameter in model.parameters():
        # An embedding is looked up; it multiplies only where it is the head as well.
        if id(parameter) in embeddings and uses[parameter] == 1:
            continue
        if parameter.requires_grad:
            trained += parameter.numel()
        else:
            frozen += parameter.numel()
    return MatrixCounts(frozen, trained)


def flops_model(matrices: MatrixCounts, spec: ModelSpec) -> FlopsModel:
    """What FLOPs a token follow from."""
    text = spec.config.get_text_config()
    head_dim = text.to_dict().get("head_dim") or text.hidden_size // text.num_attention_heads
    return FlopsModel(
        frozen=matrices.frozen,
        trained=matrices.trained,
        num_layers=text.num_hidden_layers,
        hidden=head_dim * text.num_attention_heads,
    )


def speed_of(
    matrices: MatrixCounts,
    spec: ModelSpec,
    lengths: npt.NDArray[np.int64],
    precision: Precision,
    world: World,
) -> Speed:
    """FLOPs for documents of these ``lengths`` in tokens, and the devices' peak."""
    counts = flops_model(matrices, spec)
    # Weighted by tokens: a token of a long document attends to more of it.
    mean_length = float(np.square(lengths.astype(np.float64)).sum() / max(1, lengths.sum()))
    peak = None
    if world.device.type == "cuda" and precision is not Precision.fp32:
        peak = peak_flops(torch.cuda.get_device_name(world.device))
    return Speed(counts.per_token(mean_length), None if peak is None else peak * world.size)
