"""Linears as they are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from dtune.types import ModelSpec, Renamer, TensorSource


class Keep:
    """No quantisation."""

    def quantize(
        self, model: nn.Module, spec: ModelSpec, stored_name: Renamer
    ) -> Mapping[str, int]:
        """Nothing is replaced."""
        return {}

    def source(self, weights: TensorSource) -> TensorSource:
        """The weights themselves."""
        return weights

    def cache(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Every weight is there already."""
