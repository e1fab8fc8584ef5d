"""Optimizers over named parameters, without weight decay on norms and biases."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from dtune.optim.schema.adamw import Adamw8bitConfig, AdamwConfig
from dtune.optim.schema.sgd import SgdConfig
from dtune.runtime.capabilities import require

# Devices on which torch has one kernel for the whole of AdamW or SGD.
_FUSED_DEVICES = ("cuda", "cpu")


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    """Return the groups of an optimizer: matrices decay, norms and biases do not."""
    named = list(named)
    decayed = [p for _, p in named if p.ndim >= 2]
    plain = [p for _, p in named if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _fused(groups: list[dict[str, Any]]) -> bool:
    devices = {p.device.type for group in groups for p in group["params"]}
    return devices.issubset(_FUSED_DEVICES)


def build_adamw(config: AdamwConfig, named: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
    """Build torch's AdamW."""
    groups = parameter_groups(named, config.weight_decay)
    return AdamW(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=_fused(groups),
    )


def build_sgd(config: SgdConfig, named: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
    """Build torch's SGD with momentum."""
    groups = parameter_groups(named, config.weight_decay)
    # Not fused: torch has no fused SGD for the sharded tensors of FSDP2.
    return SGD(groups, lr=config.lr, momentum=config.momentum, foreach=True)


def build_adamw8bit(
    config: Adamw8bitConfig, named: Iterable[tuple[str, nn.Parameter]]
) -> Optimizer:
    """Build bitsandbytes' AdamW with 8-bit state; ConfigError where it is not installed."""
    require("bitsandbytes", "optim=adamw8bit")
    groups = parameter_groups(named, config.weight_decay)
    from bitsandbytes.optim import AdamW8bit

    optimizer = AdamW8bit(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer
