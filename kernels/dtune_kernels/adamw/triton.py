"""AdamW in Triton: each state is read once and written once."""

import torch
import triton
import triton.language as tl

from dtune_kernels.adamw.reference import log
from dtune_kernels.launch import launch

BLOCK = 2048


@triton.jit
def _moved(old, new, share):
    """The old value, moved by a share of the distance; from the nearer end, which rounds less."""
    distance = new - old
    return tl.where(share < 0.5, old + share * distance, new - (1.0 - share) * distance)


@triton.jit
def _adamw(
    master_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    shadow_ptr,
    clip_scale_ptr,
    lr_ptr,
    step_ptr,
    blocked_ptr,
    size,
    log_beta1,
    log_beta2,
    share1,
    share2,
    eps,
    weight_decay,
    SHADOW: tl.constexpr,
    CLIP: tl.constexpr,
    BLOCKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if BLOCKED:
        size = tl.where(tl.load(blocked_ptr) == 0.0, size, 0)
    mask = at < size
    grad = tl.load(grad_ptr + at, mask, 0.0).to(tl.float32)
    if CLIP:
        grad *= tl.load(clip_scale_ptr)
    exp_avg = tl.load(exp_avg_ptr + at, mask, 0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + at, mask, 0.0)
    master = tl.load(master_ptr + at, mask, 0.0)
    lr = tl.load(lr_ptr)
    # fp64: 1 - beta^step cancels in the first steps. Errors of log(beta) do not grow.
    step = tl.load(step_ptr).to(tl.float64)
    correction1 = (1.0 - tl.exp(step * log_beta1)).to(tl.float32)
    correction2 = (1.0 - tl.exp(step * log_beta2)).to(tl.float32)
    exp_avg = _moved(exp_avg, grad, share1)
    exp_avg_sq = _moved(exp_avg_sq, grad * grad, share2)
    denominator = tl.sqrt_rn(exp_avg_sq) * tl.div_rn(1.0, tl.sqrt_rn(correction2)) + eps
    change = tl.div_rn(lr, correction1) * tl.div_rn(exp_avg, denominator)
    master -= lr * weight_decay * master + change
    tl.store(master_ptr + at, master, mask)
    tl.store(exp_avg_ptr + at, exp_avg, mask)
    tl.store(exp_avg_sq_ptr + at, exp_avg_sq, mask)
    if SHADOW:
        tl.store(shadow_ptr + at, master.to(shadow_ptr.dtype.element_ty), mask)


def adamw_flat_(
    master: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    shadow: torch.Tensor | None,
    clip_scale: torch.Tensor | None,
    lr: torch.Tensor,
    step: torch.Tensor,
    blocked: torch.Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """See the reference. All buffers are contiguous; all but grad and shadow are fp32."""
    size = master.numel()
    launch(
        _adamw,
        (triton.cdiv(size, BLOCK),),
        master,
        grad,
        exp_avg,
        exp_avg_sq,
        master if shadow is None else shadow,
        lr if clip_scale is None else clip_scale,
        lr,
        step,
        lr if blocked is None else blocked,
        size,
        log(beta1),
        log(beta2),
        1 - beta1,
        1 - beta2,
        eps,
        weight_decay,
        SHADOW=shadow is not None,
        CLIP=clip_scale is not None,
        BLOCKED=blocked is not None,
        BLOCK=BLOCK,
        num_warps=4,
    )
