"""Optimizers over named parameters, without weight decay on norms and biases."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from dtune.optim.schema.adamw import Adamw8bitConfig, AdamwConfig
from dtune.optim.schema.sgd import SgdConfig
from dtune.runtime.capabilities import require

# Devices on which torch has one kernel for the whole of AdamW or SGD.
_FUSED_DEVICES = ("cuda", "cpu")


RateFactor = Callable[[str], float]


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float,
    rate_factor: RateFactor,
) -> list[dict[str, Any]]:
    """Return the groups of an optimizer: matrices decay, norms and biases do not.

    Parameters whose learning rate has another factor are in a group of their own; those at
    ``lr`` itself come first.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        groups.setdefault((rate_factor(name), parameter.ndim >= 2), []).append(parameter)
    ordered = sorted(
        groups.items(), key=lambda item: (item[0][0] != 1.0, item[0][0], not item[0][1])
    )
    return [
        {
            "params": parameters,
            "lr": lr * factor,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (factor, decays), parameters in ordered
    ]


def _fused(groups: list[dict[str, Any]]) -> bool:
    devices = {p.device.type for group in groups for p in group["params"]}
    return devices.issubset(_FUSED_DEVICES)


def build_adamw(
    config: AdamwConfig, named: Iterable[tuple[str, nn.Parameter]], rate_factor: RateFactor
) -> Optimizer:
    """Build torch's AdamW."""
    groups = parameter_groups(
        named, lr=config.lr, weight_decay=config.weight_decay, rate_factor=rate_factor
    )
    return AdamW(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=_fused(groups),
    )


def build_sgd(
    config: SgdConfig, named: Iterable[tuple[str, nn.Parameter]], rate_factor: RateFactor
) -> Optimizer:
    """Build torch's SGD with momentum."""
    groups = parameter_groups(
        named, lr=config.lr, weight_decay=config.weight_decay, rate_factor=rate_factor
    )
    # Not fused: torch has no fused SGD for the sharded tensors of FSDP2.
    return SGD(groups, lr=config.lr, momentum=config.momentum, foreach=True)


def build_adamw8bit(
    config: Adamw8bitConfig, named: Iterable[tuple[str, nn.Parameter]], rate_factor: RateFactor
) -> Optimizer:
    """Build bitsandbytes' AdamW with 8-bit state; ConfigError where it is not installed."""
    require("bitsandbytes", "optim=adamw8bit")
    groups = parameter_groups(
        named, lr=config.lr, weight_decay=config.weight_decay, rate_factor=rate_factor
    )
    from bitsandbytes.optim import AdamW8bit

    optimizer = AdamW8bit(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer
