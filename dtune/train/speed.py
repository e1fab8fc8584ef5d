"""FLOPs a token of the run at hand, and the peak of its devices."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel

from dtune.measure.flops import FlopsModel, MatrixCounts, peak_flops
from dtune.runtime.schema import Precision
from dtune.runtime.world import World
from dtune.train.reach import unreached_blocks
from dtune.types import ModelSpec


@dataclass(frozen=True)
class Speed:
    """What turns tokens per second into a share of the devices' peak."""

    flops: FlopsModel
    mean_length: float
    """Of documents in tokens, weighted by tokens."""
    peak_flops: float | None
    """Of all devices together in FLOP/s; None where it is not known."""

    def flops_per_token(self, targets: float) -> float:
        """Where ``targets`` is the share of tokens that are trained on."""
        return self.flops.per_token(self.mean_length, targets=targets)

    def mfu(self, tokens_per_second: float, targets_per_second: float) -> float | None:
        """Share of the peak, where that is known. Tokens are without padding."""
        if self.peak_flops is None:
            return None
        others = tokens_per_second * self.flops_per_token(0.0)
        return (others + targets_per_second * self.flops.per_target) / self.peak_flops


def count_matrices(model: PreTrainedModel, spec: ModelSpec) -> MatrixCounts:
    """Count a model with its method in place, before its linears become bytes."""
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    head = model.get_output_embeddings()
    of_head = set() if head is None else {id(p) for p in head.parameters()}
    uses = Counter(p for _, p in model.named_parameters(remove_duplicate=False))
    counts: Counter[tuple[bool, bool]] = Counter()
    for parameter in model.parameters():
        # An embedding is looked up; it multiplies only where it is the head as well.
        if id(parameter) in embeddings and uses[parameter] == 1:
            continue
        counts[id(parameter) in of_head, parameter.requires_grad] += parameter.numel()
    unreached = unreached_blocks(model, spec)
    return MatrixCounts(
        frozen=counts[False, False],
        trained=counts[False, True],
        head_frozen=counts[True, False],
        head_trained=counts[True, True],
        unreached=sum(p.numel() for block in unreached for p in block.parameters()),
        unreached_blocks=len(unreached),
    )


def flops_model(matrices: MatrixCounts, spec: ModelSpec) -> FlopsModel:
    """What FLOPs a token follow from."""
    text = spec.config.get_text_config()
    head_dim = text.to_dict().get("head_dim") or text.hidden_size // text.num_attention_heads
    return FlopsModel(matrices, text.num_hidden_layers, head_dim * text.num_attention_heads)


def speed_of(
    matrices: MatrixCounts,
    spec: ModelSpec,
    lengths: npt.NDArray[np.int64],
    precision: Precision,
    world: World,
) -> Speed:
    """FLOPs for documents of these ``lengths`` in tokens, and the devices' peak."""
    # Weighted by tokens: a token of a long document attends to more of it.
    mean_length = float(np.square(lengths.astype(np.float64)).sum() / max(1, lengths.sum()))
    peak = None
    if world.device.type == "cuda" and precision is not Precision.fp32:
        peak = peak_flops(torch.cuda.get_device_name(world.device))
    flops = flops_model(matrices, spec)
    return Speed(flops, mean_length, None if peak is None else peak * world.size)
