"""Patched models in bf16: as near to fp32 as the plain model is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dtune.patch.apply import apply_patches
from dtune.patch.base import patch_names
from tests.distributed.training import make_batch
from tests.unit.families import FAMILIES
from tests.unit.patched import Step, adapted, train_step


def step_of(model: nn.Module, *, autocast: bool) -> Step:
    batch = make_batch(1, 0, packed=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return train_step(model, batch)


def error(step: Step, exact: Step) -> float:
    """Norm of the error of all gradients together, relative to their norm."""
    assert step.grads.keys() == exact.grads.keys()
    wrong = sum(
        float((step.grads[n].double() - g.double()).square().sum()) for n, g in exact.grads.items()
    )
    size = sum(float(g.double().square().sum()) for g in exact.grads.values())
    return (wrong / size) ** 0.5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("masters", ["fp32", "bf16"])
def test_a_patched_step_is_as_near_as_the_plain_one(family: str, masters: str) -> None:
    """fp32 masters with autocast, as one process trains; all in bf16, as ZeRO does."""
    model, spec = adapted(family, dtype=torch.bfloat16)
    exact = step_of(copy.deepcopy(model).float(), autocast=False)
    if masters == "fp32":
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    autocast = masters == "fp32"
    plain = error(step_of(model, autocast=autocast), exact)
    apply_patches(model, patch_names(), spec)
    patched = step_of(model, autocast=autocast)
    assert 2**-12 < plain < 2**-2, "the plain step says nothing of bf16"
    assert error(patched, exact) <= 2 * plain
    scaled = Step(patched.loss, {name: 1.5 * grad for name, grad in patched.grads.items()})
    assert error(scaled, exact) > 2 * plain
