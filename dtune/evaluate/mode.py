"""A model for a moment in evaluation, which may be broken off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

AsksToStop = Callable[[], bool]
"""Whether evaluation is to be broken off; the same on all ranks, which all ask."""


class EvaluationStopped(Exception):
    """Evaluation was broken off between two batches; raised on all ranks."""


def never() -> bool:
    """Do not break off."""
    return False


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradients and without dropout; the mode of every module is put back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # Not inference_mode: what sharded engines gather here is used in training afterwards.
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
