"""Cross entropy of a chunk of logits in plain PyTorch.

Shape legend: C rows of the chunk, V vocabulary, N rows in all, D features.

With u the logits as the head's GEMM wrote them, a = scale * u and z = softcap * tanh(a / softcap),
or z = a where softcap is 0, a row's loss is

    lse(z) - (1 - smoothing) * z[label] - smoothing * mean(z) + z_loss * lse(z)^2.

Its gradient is dz_j = p_j * (1 + 2 * z_loss * lse) - (1 - smoothing) * [j = label] - smoothing / V
with p = softmax(z), and du = dz * (1 - (z / softcap)^2) * scale.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def cross_entropy_chunk_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
    scale: float,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return losses [C] and lse [C]; with ``gradient``, replace the logits [C, V] by du.

    Losses and lse are fp32 (fp64 for fp64). A row whose label is ``ignore_index`` gives zeros; a
    label outside the vocabulary gives NaN as its loss.
    """
    z = _logits(logits, softcap, scale)
    top = z.amax(-1, keepdim=True)
    # Relative to the largest logit: the loss of a sure row is a small difference of large numbers.
    below = z - top
    log_total = below.exp().sum(-1).log()
    lse = top[:, 0] + log_total
    index, inside = _index(labels, z)
    target = below.gather(1, index)[:, 0].masked_fill(~inside, torch.nan)
    losses = log_total - (1 - smoothing) * target
    if smoothing:
        losses = losses - smoothing * below.mean(-1)
    if z_loss:
        losses = losses + z_loss * lse.square()
    ignored = labels == ignore_index
    lse = lse.masked_fill(ignored, 0.0)
    if gradient:
        ones = torch.ones_like(lse)
        cross_entropy_grad_(
            logits, labels, lse, ones, ignore_index, smoothing, z_loss, softcap, scale
        )
    return losses.masked_fill(ignored, 0.0), lse


def cross_entropy_grad_(
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
    """Replace the logits [C, V] by upstream [C] times du, from the lse of the forward."""
    z = _logits(logits, softcap, scale)
    index, inside = _index(labels, z)
    grad = torch.exp(z - lse[:, None]) * (1 + 2 * z_loss * lse[:, None])
    if smoothing:
        grad = grad - smoothing / z.shape[1]
    hit = (smoothing - 1) * inside.to(z.dtype)
    grad = grad.scatter_add(1, index, hit[:, None]) * (upstream.to(z.dtype) * scale)[:, None]
    if softcap:
        grad = grad * (1 - (z / softcap).square())
    logits.copy_(grad.masked_fill((labels == ignore_index)[:, None], 0.0))


def plain_cross_entropy_chunk_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
    scale: float,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the same by Hugging Face's steps and autograd."""
    ones = logits.new_ones(logits.shape[0], dtype=_wide(logits))
    settings = (ignore_index, smoothing, z_loss, softcap, scale)
    losses, lse, grad = _plain(logits, labels, ones, *settings, gradient)
    if gradient:
        logits.copy_(grad)
    return losses, lse


def plain_cross_entropy_grad_(
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
    """Compute the same by Hugging Face's steps and autograd."""
    settings = (ignore_index, smoothing, z_loss, softcap, scale)
    logits.copy_(_plain(logits, labels, upstream, *settings, True)[2])


def plain_losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return losses [N] and lse [N] by differentiable steps, each rounded to its operand's dtype.

    As Hugging Face's models: scale and cap in the dtype of the logits, then one copy of them in
    fp32 for ``torch.nn.functional.cross_entropy``.
    """
    z = logits * scale if scale != 1.0 else logits
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    z = z.to(_wide(z))
    losses = functional.cross_entropy(
        z, labels, ignore_index=ignore_index, label_smoothing=smoothing, reduction="none"
    )
    ignored = labels == ignore_index
    lse = torch.logsumexp(z, -1).masked_fill(ignored, 0.0)
    return (losses + z_loss * lse.square() if z_loss else losses), lse


def _plain(
    logits: torch.Tensor,
    labels: torch.Tensor,
    upstream: torch.Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
    scale: float,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_(gradient)
        losses, lse = plain_losses(leaf, labels, ignore_index, smoothing, z_loss, softcap, scale)
        if not gradient:
            return losses, lse, logits
        (grad,) = torch.autograd.grad(losses, leaf, upstream.to(losses.dtype))
    return losses.detach(), lse.detach(), grad


def _logits(logits: torch.Tensor, softcap: float, scale: float) -> torch.Tensor:
    z = logits.to(_wide(logits)) * scale
    return softcap * torch.tanh(z / softcap) if softcap else z


def _index(labels: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each row's label [C, 1], some column where there is none, and whether there is."""
    last = z.shape[1] - 1
    return labels.clamp(0, last)[:, None], (labels >= 0) & (labels <= last)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
