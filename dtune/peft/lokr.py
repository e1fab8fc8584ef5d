"""LoKr, Yeh et al. 2023, arXiv:2309.14859, by HF ``peft``.

Shape legend: D input features, O output features.
"""

from __future__ import annotations

import peft
import torch
from peft.tuners.lokr.layer import Linear, make_kron
from torch import nn

from dtune.peft.schema.lokr import LokrConfig
from dtune.peft.tuners import Tuner, drop_outputs, whole_number


class LokrLinear(Linear):  # type: ignore[misc]
    """The layer of ``peft``, which asks its base for nothing but its output."""

    def get_delta_weight(
        self, adapter_name: str, *, apply_rank_dropout: bool = False
    ) -> torch.Tensor:
        """The update of W: [O, D]."""
        small = self.lokr_w1, self.lokr_w1_a, self.lokr_w1_b
        large = self.lokr_w2, self.lokr_w2_a, self.lokr_w2_b
        whole = [_factor(*kept, adapter_name) for kept in (small, large)]
        update: torch.Tensor = make_kron(*whole, self.scaling[adapter_name])
        if apply_rank_dropout:
            update = drop_outputs(update, self.rank_dropout[adapter_name], keep_mean=False)
        return update


def _factor(
    kept: nn.ParameterDict, left: nn.ParameterDict, right: nn.ParameterDict, adapter: str
) -> torch.Tensor:
    """A factor of the product: as it is, or of low rank."""
    factor: torch.Tensor = kept[adapter] if adapter in kept else left[adapter] @ right[adapter]
    return factor


class Lokr(Tuner):
    """Updates that are Kronecker products; all else is frozen."""

    key = "peft=lokr"

    def __init__(self, config: LokrConfig) -> None:
        super().__init__(config.targets)
        self.config = config

    def peft_config(self, targets: list[str]) -> peft.PeftConfig:
        """Settings as ``peft`` takes them."""
        return peft.LoKrConfig(
            r=self.config.rank,
            alpha=whole_number(self.config.alpha),
            decompose_factor=self.config.factor,
            decompose_both=self.config.decompose_both,
            rank_dropout=self.config.rank_dropout,
            target_modules=targets,
        )

    def adapt(self, model: nn.Module) -> None:
        """Have the layers ask nothing of the base's weight, which may be bytes, or elsewhere."""
        for module in model.modules():
            if type(module) is Linear:
                module.__class__ = LokrLinear
