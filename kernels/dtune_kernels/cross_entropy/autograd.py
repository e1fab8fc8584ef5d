"""Cross entropy of a linear head, chunk by chunk, with its gradients.

With logits z = softcap * tanh(scale * (h W^T + b) / softcap), without the tanh where softcap is 0,
a row's loss is lse(z) - (1 - eps) z[label] - eps mean(z) + z_loss lse(z)^2. The logits and their
gradient are rounded to the dtype of the GEMM, all between is fp32.

The gradients of a sum are made in the forward, where the logits are, and multiplied by the upstream
in the backward. For losses of each row the backward computes the logits again.

Label smoothing: Szegedy et al. 2016, arXiv:1512.00567, sec. 7, as in torch's cross_entropy. z-loss:
PaLM, Chowdhery et al. 2022, arXiv:2204.02311, sec. 5. Softcap: Gemma 2, arXiv:2408.00118, sec. 2.

Shape legend: N rows, of which n are computed, C rows of a chunk, D features, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dtune_kernels.checks import FLOATS, check, check_device, check_dtype, check_shape
from dtune_kernels.cross_entropy import ops
from dtune_kernels.library import apply

OP = "linear_cross_entropy"
DX_ELEMENTS = 1 << 22
"""Elements of a chunk's dX that make 128 tiles of 128 x 256: about one for each multiprocessor."""


class _Loss(NamedTuple):
    """What the loss is made of, in the order of the ops' arguments."""

    ignore_index: int
    smoothing: float
    z_loss: float
    softcap: float
    scale: float


class _Head(NamedTuple):
    """The operands of the logits in the dtype they are multiplied in."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def logits(self, x: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        """Write x W^T + b [C, V] into the first rows of the buffer and return these."""
        logits = buffer[: x.shape[0]]
        if self.bias is None:
            return logits.addmm_(x, self.weight.t(), beta=0)
        return logits.copy_(self.bias).addmm_(x, self.weight.t())

    def buffer(self, rows: int) -> torch.Tensor:
        """Allocate logits [rows, V], whose rows are 128 bytes or a multiple apart.

        GEMMs and the Triton kernels read and write them 16 bytes at a time, also where V is odd.
        """
        vocab = self.weight.shape[0]
        aligned = 128 // self.weight.element_size()
        padded = (vocab + aligned - 1) // aligned * aligned
        return self.weight.new_empty(rows, padded)[:, :vocab]


@dataclass
class _Gradients:
    """Gradients that chunks are added to; None where none is wanted."""

    hidden: torch.Tensor | None
    """[n, D], dtype of the GEMMs; each chunk writes its rows."""
    weight: torch.Tensor | None
    """[V, D], fp32 (fp64 for fp64)."""
    bias: torch.Tensor | None
    """[V], fp32 (fp64 for fp64)."""

    @classmethod
    def zeros(cls, head: _Head, rows: int, wanted: tuple[bool, bool, bool]) -> _Gradients:
        weight = head.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        vocab, features = weight.shape
        return cls(
            weight.new_empty(rows, features) if wanted[0] else None,
            weight.new_zeros(vocab, features, dtype=wide) if wanted[1] else None,
            weight.new_zeros(vocab, dtype=wide) if wanted[2] else None,
        )

    def add(self, dlogits: torch.Tensor, x: torch.Tensor, head: _Head, at: slice) -> None:
        """Add what a chunk's dlogits [C, V] give, from its rows x [C, D]."""
        if self.hidden is not None:
            self.hidden[at].addmm_(dlogits, head.weight, beta=0)
        if self.weight is not None:
            _add_product(self.weight, dlogits.t(), x)
        if self.bias is not None:
            self.bias.add_(dlogits.sum(0, dtype=self.bias.dtype))


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a b to ``total``, which is fp32 or wider: no chunk's share is rounded to half a float."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.device.type == "cuda":
        # One GEMM with operands of 16 bits that reads and writes its sum in fp32.
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _rows(
    hidden: torch.Tensor, order: torch.Tensor | None, at: slice, dtype: torch.dtype
) -> torch.Tensor:
    """Rows of a chunk [C, D]: hidden[order[at]] in the dtype."""
    x = hidden[at] if order is None else hidden.index_select(0, order[at])
    return x.to(dtype)


def _head(weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> _Head:
    return _Head(weight.to(dtype), None if bias is None else bias.to(dtype))


def _slices(rows: int, chunk_rows: int) -> list[slice]:
    return [slice(start, min(start + chunk_rows, rows)) for start in range(0, rows, chunk_rows)]


def _scaled(
    x: torch.Tensor | None, upstream: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor | None:
    """Return x times a scalar on the device: one pass, multiplied in fp32, rounded once."""
    if x is None:
        return None
    # As one element, not as a scalar, which would be rounded to the dtype of x first.
    return torch.mul(x, upstream.reshape(1), out=torch.empty_like(x, dtype=dtype))


def _scattered(
    x: torch.Tensor | None, order: torch.Tensor | None, rows: int
) -> torch.Tensor | None:
    """Return [N, ...] with the rows x at ``order`` and zeros elsewhere; x if it has all rows."""
    if x is None or order is None:
        return x
    return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, order, x)


class _Sum(Function):
    """Loss [] summed over rows; its gradients are made in the forward, where the logits are."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        order: torch.Tensor | None,
        dtype: torch.dtype,
        chunk_rows: int,
        wanted: tuple[bool, bool, bool],
        loss: _Loss,
    ) -> torch.Tensor:
        rows = labels.shape[0]
        head = _head(weight, bias, dtype)
        buffer = head.buffer(min(rows, chunk_rows))
        gradients = _Gradients.zeros(head, rows, wanted)
        losses = [hidden.new_zeros(0, dtype=torch.promote_types(dtype, torch.float32))]
        for at in _slices(rows, chunk_rows):
            x = _rows(hidden, order, at, dtype)
            logits = head.logits(x, buffer)
            losses.append(ops.chunk_(logits, labels[at], *loss, any(wanted))[0])
            if any(wanted):
                gradients.add(logits, x, head, at)
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias, order)
        ctx.rows = hidden.shape[0]
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return torch.cat(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dx, dw, db, order = ctx.saved_tensors
        scaled = [
            _scaled(x, upstream, dtype) for x, dtype in zip((dx, dw, db), ctx.dtypes, strict=True)
        ]
        return _scattered(scaled[0], order, ctx.rows), *scaled[1:], *[None] * 6


class _EachRow(Function):
    """Losses [n]; the backward computes the logits again, since it needs the upstream first."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        order: torch.Tensor | None,
        dtype: torch.dtype,
        chunk_rows: int,
        loss: _Loss,
    ) -> torch.Tensor:
        rows = labels.shape[0]
        head = _head(weight, bias, dtype)
        buffer = head.buffer(min(rows, chunk_rows))
        empty = hidden.new_zeros(0, dtype=torch.promote_types(dtype, torch.float32))
        losses, lses = [empty], [empty]
        for at in _slices(rows, chunk_rows):
            logits = head.logits(_rows(hidden, order, at, dtype), buffer)
            chunk_losses, lse = ops.chunk_(logits, labels[at], *loss, False)
            losses.append(chunk_losses)
            lses.append(lse)
        ctx.save_for_backward(hidden, weight, bias, labels, order, torch.cat(lses))
        ctx.dtype, ctx.chunk_rows, ctx.loss = dtype, chunk_rows, loss
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, labels, order, lse = ctx.saved_tensors
        rows = labels.shape[0]
        head = _head(weight, bias, ctx.dtype)
        buffer = head.buffer(min(rows, ctx.chunk_rows))
        gradients = _Gradients.zeros(head, rows, ctx.needs_input_grad[:3])
        upstream = upstream.contiguous()
        for at in _slices(rows, ctx.chunk_rows):
            x = _rows(hidden, order, at, ctx.dtype)
            logits = head.logits(x, buffer)
            ops.grad_(logits, labels[at], lse[at], upstream[at], *ctx.loss)
            gradients.add(logits, x, head, at)
        dx = _scattered(gradients.hidden, order, hidden.shape[0])
        return (
            None if dx is None else dx.to(hidden.dtype),
            None if gradients.weight is None else gradients.weight.to(weight.dtype),
            None if gradients.bias is None else gradients.bias.to(bias.dtype),
            *[None] * 5,
        )


def default_chunk_rows(features: int, *, weight_grad: bool) -> int:
    """Rows of logits that are held at a time: a power of two from 1024 to 4096.

    A frozen head: as few as give the GEMM of dX [C, D] a tile for each multiprocessor, so 1024
    rows from D = 4096 on (0.26 GB of bf16 logits at V = 128256). A trained head: 4096, since each
    chunk reads and writes all of dW in fp32 once.
    """
    if weight_grad:
        return 4096
    enough = 1 << ((DX_ELEMENTS - 1) // max(features, 1)).bit_length()
    return min(max(enough, 1024), 4096)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_targets: int | None = None,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    reduction: Literal["sum", "none"] = "sum",
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """Return the cross entropy of a linear head whose logits exist one chunk at a time.

    Args:
        hidden: [..., D] with N rows, any strides.
        weight: [V, D] of the same dtype; under autocast both are cast as a Linear's are. Its
            gradient is computed only if it is trained, and summed over chunks in fp32.
        labels: [N], int64, already shifted; outside the vocabulary they give a loss of NaN.
        num_targets: Rows with a label, or more, known on the host: only so many are computed. NaN
            as the loss and its gradients tells that more have one. None: all are computed.
        bias: [V] or None.
        ignore_index: Label of rows that give a loss of 0 and no gradient.
        label_smoothing: eps, from 0 to 1.
        z_loss: Factor of the squared log-sum-exp, at least 0.
        softcap: Of the logits; 0 for none.
        logit_scale: Factor of the logits, before the softcap.
        reduction: "sum" gives a scalar, 0 if every row is ignored; "none" gives losses [N].
        chunk_rows: Rows of logits that exist at a time; None for ``default_chunk_rows``.

    Returns:
        fp32, fp64 for operands in fp64. Can be differentiated once.

    Raises:
        KernelArgumentError: A shape, dtype, device or value does not fit.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    dtype = _gemm_dtype(hidden)
    _check_tensors(rows, weight, labels, bias, dtype)
    loss = _Loss(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    _check_numbers(loss, num_targets, labels.shape[0], chunk_rows)
    check(reduction in ("sum", "none"), OP, "reduction", got=reduction, wanted="sum or none")
    trained = torch.is_grad_enabled() and weight.requires_grad
    size = chunk_rows or default_chunk_rows(weight.shape[1], weight_grad=trained)
    compute = _sum if reduction == "sum" else _each_row
    if num_targets is None:
        return compute(rows, weight, bias, labels.contiguous(), None, dtype, size, loss)
    order = _targets_first(labels, ignore_index)[:num_targets]
    losses = compute(rows, weight, bias, labels[order], order, dtype, size, loss)
    return losses * _nan_if_more(labels, ignore_index, num_targets, losses.dtype)


def _sum(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    order: torch.Tensor | None,
    dtype: torch.dtype,
    chunk_rows: int,
    loss: _Loss,
) -> torch.Tensor:
    """Return the loss [] of the rows at ``order``."""
    grad = torch.is_grad_enabled()
    trained = (hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad)
    wanted = tuple(grad and each for each in trained)
    total: torch.Tensor = apply(
        _Sum, hidden, weight, bias, labels, order, dtype, chunk_rows, wanted, loss
    )
    return total


def _each_row(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    order: torch.Tensor | None,
    dtype: torch.dtype,
    chunk_rows: int,
    loss: _Loss,
) -> torch.Tensor:
    """Return losses [N], 0 at rows that are not at ``order``."""
    losses: torch.Tensor = apply(
        _EachRow, hidden, weight, bias, labels, order, dtype, chunk_rows, loss
    )
    if order is None:
        return losses
    return losses.new_zeros(hidden.shape[0]).index_copy(0, order, losses)


def _targets_first(labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Return the order of rows [N] with those that have a target in front, without a host sync."""
    return torch.argsort((labels == ignore_index).to(torch.uint8), stable=True)


def _nan_if_more(
    labels: torch.Tensor, ignore_index: int, num_targets: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return 1, or NaN if more rows have a target, which the host cannot know without a sync."""
    more = (labels != ignore_index).sum() > num_targets
    return torch.ones((), dtype=dtype, device=labels.device).masked_fill(more, torch.nan)


def _gemm_dtype(hidden: torch.Tensor) -> torch.dtype:
    device = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _check_tensors(
    rows: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> None:
    check_dtype(OP, "hidden", rows, FLOATS)
    # Autocast casts operands of any dtype but fp64.
    cast = torch.is_autocast_enabled(rows.device.type) and dtype != torch.float64
    allowed = FLOATS[:3] if cast else (dtype,)
    check_dtype(OP, "weight", weight, allowed)
    check_shape(OP, "weight", weight, (None, rows.shape[1]))
    check(weight.shape[0] > 0, OP, "shape of weight", got=list(weight.shape), wanted="V > 0")
    check_dtype(OP, "labels", labels, (torch.int64,))
    check_shape(OP, "labels", labels, (rows.shape[0],))
    if bias is not None:
        check_dtype(OP, "bias", bias, allowed)
        check_shape(OP, "bias", bias, (weight.shape[0],))
    check_device(OP, hidden=rows, weight=weight, labels=labels, bias=bias)


def _check_numbers(loss: _Loss, num_targets: int | None, rows: int, chunk_rows: int | None) -> None:
    smoothing = loss.smoothing
    check(0.0 <= smoothing <= 1.0, OP, "label_smoothing", got=smoothing, wanted="0 to 1")
    check(loss.z_loss >= 0.0, OP, "z_loss", got=loss.z_loss, wanted="at least 0")
    check(loss.softcap >= 0.0, OP, "softcap", got=loss.softcap, wanted="at least 0")
    if num_targets is not None:
        fits = 0 <= num_targets <= rows
        check(fits, OP, "num_targets", got=num_targets, wanted=f"0 to {rows}, the rows")
    if chunk_rows is not None:
        check(chunk_rows >= 1, OP, "chunk_rows", got=chunk_rows, wanted="at least 1")
