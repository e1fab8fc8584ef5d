"""LoHa, Hyeon-Woo et al. 2021, arXiv:2108.06098, by HF ``peft``.

Shape legend: R rank, D input features, O output features.
"""

from __future__ import annotations

import peft
import torch
from peft.tuners.loha.layer import Linear, make_weight
from torch import nn

from dtune.peft.schema.loha import LohaConfig
from dtune.peft.tuners import Tuner, drop_outputs, whole_number


class LohaLinear(Linear):  # type: ignore[misc]
    """The layer of ``peft``, which asks its base for nothing but its output."""

    def get_delta_weight(
        self, adapter_name: str, *, apply_rank_dropout: bool = False
    ) -> torch.Tensor:
        """The update of W: [O, D]."""
        factors = (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b)
        scale = torch.tensor(self.scaling[adapter_name])
        update: torch.Tensor = make_weight(*(f[adapter_name] for f in factors), scale=scale)
        if apply_rank_dropout:
            update = drop_outputs(update, self.rank_dropout[adapter_name], keep_mean=True)
        return update


class Loha(Tuner):
    """Updates that are elementwise products of two of low rank; all else is frozen."""

    key = "peft=loha"

    def __init__(self, config: LohaConfig) -> None:
        super().__init__(config.targets)
        self.config = config

    def peft_config(self, targets: list[str]) -> peft.PeftConfig:
        """Settings as ``peft`` takes them."""
        return peft.LoHaConfig(
            r=self.config.rank,
            alpha=whole_number(self.config.alpha),
            rank_dropout=self.config.rank_dropout,
            target_modules=targets,
        )

    def adapt(self, model: nn.Module) -> None:
        """Have the layers ask nothing of the base's weight, which may be bytes, or elsewhere."""
        for module in model.modules():
            if type(module) is Linear:
                module.__class__ = LohaLinear
