"""The cross entropy ops: schemas, fakes, costs."""

from __future__ import annotations

import torch

from dtune_kernels.cross_entropy import reference
from dtune_kernels.library import Cost, Shape, define, nbytes

IGNORE = -100
CHUNK = 1024
SOURCE = (
    "torch.nn.functional.cross_entropy; z-loss: PaLM, Chowdhery et al. 2022, arXiv:2204.02311, sec."
    " 5; softcap: Gemma 2, arXiv:2408.00118, sec. 2"
)


def _chunk_fake(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
    scale: float,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=dtype), logits.new_empty(rows, dtype=dtype)


def _grad_fake(
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    upstream: torch.Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
    scale: float,
) -> None:
    return None


def _chunk_cost(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
    scale: float,
    gradient: bool,
) -> Cost:
    return Cost(
        flops=(8 if gradient else 4) * logits.numel(),
        read=nbytes(logits, labels),
        written=(nbytes(logits) if gradient else 0) + 8 * logits.shape[0],
    )


def _grad_cost(
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    upstream: torch.Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
    scale: float,
) -> Cost:
    return Cost(
        flops=4 * logits.numel(),
        read=nbytes(logits, labels, lse, upstream),
        written=nbytes(logits),
    )


def linear_cross_entropy_cost(
    hidden: torch.Tensor, weight: torch.Tensor, num_targets: int, *, weight_grad: bool
) -> Cost:
    """Cost of ``linear_cross_entropy`` with reduction "sum", gradients included.

    The logits are counted as if they stayed on the chip: what is read is the head once and the
    rows that have a target once, what is written their gradient and, if trained, the head's.
    """
    vocab, features = weight.shape
    rows = num_targets * features * hidden.element_size()
    gemms = 3 if weight_grad else 2
    return Cost(
        flops=2 * gemms * num_targets * vocab * features + 8 * num_targets * vocab,
        read=nbytes(weight) + rows + 8 * num_targets,
        written=rows + (nbytes(weight) if weight_grad else 0),
        saved=rows,
    )


def _logits(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = min(shape.tokens, CHUNK)
    logits = torch.randn(rows, shape.vocab, dtype=dtype, device=device)
    labels = torch.randint(shape.vocab, (rows,), device=device)
    return logits, labels


def _chunk_arguments(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, int, float, float, float, float, bool]:
    logits, labels = _logits(shape, dtype, device)
    return logits, labels, IGNORE, 0.0, 0.0, 0.0, 1.0, True


def _grad_arguments(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, float, float, float, float]:
    logits, labels = _logits(shape, dtype, device)
    wide = torch.promote_types(dtype, torch.float32)
    lse = torch.logsumexp(logits.to(wide), -1)
    return logits, labels, lse, torch.randn_like(lse), IGNORE, 0.0, 0.0, 0.0, 1.0


chunk_ = define(
    "cross_entropy_chunk_(Tensor(a!) logits, Tensor labels, int ignore_index, float smoothing,"
    " float z_loss, float softcap, float scale, bool gradient) -> (Tensor, Tensor)",
    reference=reference.cross_entropy_chunk_,
    plain=reference.plain_cross_entropy_chunk_,
    triton="dtune_kernels.cross_entropy.triton:cross_entropy_chunk_",
    fake=_chunk_fake,
    cost=_chunk_cost,
    arguments=_chunk_arguments,
    source=SOURCE,
)
grad_ = define(
    "cross_entropy_grad_(Tensor(a!) logits, Tensor labels, Tensor lse, Tensor upstream,"
    " int ignore_index, float smoothing, float z_loss, float softcap, float scale) -> ()",
    reference=reference.cross_entropy_grad_,
    plain=reference.plain_cross_entropy_grad_,
    triton="dtune_kernels.cross_entropy.triton:cross_entropy_grad_",
    fake=_grad_fake,
    cost=_grad_cost,
    arguments=_grad_arguments,
    source=SOURCE,
)
