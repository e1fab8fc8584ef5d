"""AdamW over a flat buffer."""

from __future__ import annotations

import torch

from dtune_kernels.adamw import ops
from dtune_kernels.checks import check, check_device, check_dtype, check_shape

LOW = (torch.bfloat16, torch.float16)
OP = "adamw_flat_"


def adamw_flat_(
    master: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    shadow: torch.Tensor | None,
    clip_scale: torch.Tensor | None,
    lr: torch.Tensor,
    step: torch.Tensor,
    blocked: torch.Tensor | None = None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Make one AdamW update of n parameters, in place and without reading anything on the host.

    m += (1 - beta1) (g - m); v += (1 - beta2) (g^2 - v); with t the step and the corrected
    m' = m / (1 - beta1^t), v' = v / (1 - beta2^t), master -= lr (weight_decay master +
    m' / (sqrt(v') + eps)). Groups of parameters with other numbers are ranges of the buffers,
    updated by a call each; ranges that start at a multiple of 16 bytes are faster.

    Args:
        master: [n] fp32, contiguous as are all [n]; overwritten.
        grad: [n] fp32, bf16 or fp16; kept as it is.
        exp_avg: [n] fp32, m; overwritten.
        exp_avg_sq: [n] fp32, v, not negative; overwritten.
        shadow: [n] bf16 or fp16, overwritten with the rounded master; None if there is none.
        clip_scale: One fp32 number on the device, multiplied onto the gradient; None for 1.
        lr: One fp32 number on the device.
        step: One fp32 or int64 number on the device: of this update, from 1.
        blocked: One fp32 number on the device; nothing is updated unless it is 0. None for 0.
        beta1: At least 0 and below 1.
        beta2: At least 0 and below 1.
        eps: Added to the root.
        weight_decay: Decoupled from the gradient.

    Raises:
        KernelArgumentError: Something does not fit, or the master wants a gradient while autograd
            records.

    Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2; torch.optim.AdamW.
    """
    _check_buffers(master, grad, exp_avg, exp_avg_sq, shadow)
    _check_numbers(clip_scale, lr, step, blocked)
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        check(0 <= beta < 1, OP, name, got=beta, wanted="at least 0 and below 1")
    buffers = {"grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "shadow": shadow}
    numbers = {"clip_scale": clip_scale, "lr": lr, "step": step, "blocked": blocked}
    check_device(OP, master=master, **buffers, **numbers)
    with torch.no_grad():
        ops.update(
            master, grad, exp_avg, exp_avg_sq, shadow, clip_scale, lr, step, blocked,
            beta1, beta2, eps, weight_decay,
        )  # fmt: skip


def _check_buffers(
    master: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    shadow: torch.Tensor | None,
) -> None:
    shape = list(master.shape)
    check(master.dim() == 1, OP, "shape of master", got=shape, wanted="[n]")
    buffers = {"master": master, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "shadow": shadow}
    for name, x in {**buffers, "grad": grad}.items():
        if x is None:
            continue
        check_shape(OP, name, x, master.shape)
        check(x.is_contiguous(), OP, f"stride of {name}", got=x.stride(0), wanted=1)
    for name, x in buffers.items():
        if x is None:
            continue
        check_dtype(OP, name, x, LOW if name == "shadow" else (torch.float32,))
        wants = x.requires_grad and torch.is_grad_enabled()
        check(not wants, OP, f"requires_grad of {name}", got=True, wanted=False)
    check_dtype(OP, "grad", grad, (torch.float32, *LOW))


def _check_numbers(
    clip_scale: torch.Tensor | None,
    lr: torch.Tensor,
    step: torch.Tensor,
    blocked: torch.Tensor | None,
) -> None:
    numbers = {"clip_scale": clip_scale, "lr": lr, "step": step, "blocked": blocked}
    for name, x in numbers.items():
        if x is None:
            continue
        wanted = (torch.float32, torch.int64) if name == "step" else (torch.float32,)
        check_dtype(OP, name, x, wanted)
        check(x.numel() == 1, OP, f"number of elements of {name}", got=x.numel(), wanted=1)
