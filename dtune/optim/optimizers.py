"""Optimizers over named parameters, without weight decay on norms and biases."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from dtune_kernels.launch import triton_problem
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from dtune.errors import ConfigError
from dtune.optim.flat import ALIGNMENT, FlatAdamW
from dtune.optim.schema.adamw import Adamw8bitConfig, AdamwConfig, Flat
from dtune.optim.schema.sgd import SgdConfig
from dtune.runtime.capabilities import require

# Devices on which torch has one kernel for the whole of AdamW or SGD.
_FUSED_DEVICES = ("cuda", "cpu")

FLAT_BYTES = 1 << 30
"""Parameters of at most so many bytes are put into one buffer of their own accord: adapters. Of
more, the copies in which gradients are put together would be dear."""

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
    config: AdamwConfig,
    named: Iterable[tuple[str, nn.Parameter]],
    rate_factor: RateFactor,
    *,
    whole: bool | None,
) -> Optimizer:
    """Build torch's AdamW, or ours over one buffer; ConfigError where optim.flat cannot be."""
    groups = parameter_groups(
        named, lr=config.lr, weight_decay=config.weight_decay, rate_factor=rate_factor
    )
    betas = (config.beta1, config.beta2)
    if _is_flat(config.flat, [p for group in groups for p in group["params"]], whole):
        return FlatAdamW(groups, lr=config.lr, betas=betas, eps=config.eps)
    return AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=_fused(groups))


def flat_alignment(wanted: Flat, size: int, *, on_gpu: bool) -> int:
    """Of one buffer for whole parameters of so many bytes; 0: there is none."""
    is_flat = wanted is Flat.always or (wanted is Flat.auto and on_gpu and size <= FLAT_BYTES)
    return ALIGNMENT if is_flat else 0


def _is_flat(wanted: Flat, parameters: list[nn.Parameter], whole: bool | None) -> bool:
    """Whether parameters are put into one buffer."""
    if wanted is Flat.never or whole is None:
        return False
    device = parameters[0].device
    problem = triton_problem(device)
    if wanted is Flat.auto:
        size = sum(p.nbytes for p in parameters)
        return whole and bool(flat_alignment(wanted, size, on_gpu=not problem))
    if not whole:
        raise ConfigError(
            "optim.flat=always: parameters or their gradients are cut into pieces, or reduced in "
            "several buckets; set optim.flat=auto, or parallel=ddp with a "
            "parallel.one_bucket_mib that all gradients fit in, beside a frozen base"
        )
    if device.type == "cuda" and problem:
        raise ConfigError(f"optim.flat=always cannot run here: {problem}; set optim.flat=auto")
    return True


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
