"""Cross entropy of a chunk of logits in Triton: one program a row, which it walks twice.

The first walk finds the log-sum-exp online, the second turns the logits into their gradient. The
second goes backwards, so that it meets what the first has just brought into the cache.

A row is taken in tiles [LANES, VECTOR], VECTOR neighbours to a thread (16 bytes): each thread keeps
its own running maximum and sum, and threads meet once, at the end of the row. Whole tiles need no
mask, the next masks vectors as a whole, and what is left is less than a vector: so loads and stores
are wide whatever V is.

Shape legend: C rows, V vocabulary.
"""

import torch
import triton
import triton.language as tl

from dtune_kernels.checks import check_dtype
from dtune_kernels.launch import launch, next_power_of_two

LOWEST = tl.constexpr(-3.0e38)
"""Where the running maximum starts: finite, so that logits of minus infinity count as 0."""
HALF = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _tanh(x):
    """tanh, with the relative error of fp32 also near 0, where 1 - exp(-2x) would lose it."""
    square = x * x
    series = 1.0 + square * (
        -0.33333333 + square * (0.13333333 + square * (-0.053968254 + square * 0.021869489))
    )
    decay = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.25, x * series, tl.where(x < 0.0, -far, far))


@triton.jit
def _logits(u, scale, softcap, SOFTCAP: tl.constexpr):
    z = u.to(tl.float32) * scale
    if SOFTCAP:
        z = softcap * _tanh(z / softcap)
    return z


@triton.jit
def _columns(tile, LANES: tl.constexpr, VECTOR: tl.constexpr):
    first = tile * (LANES * VECTOR)
    return first + tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def _whole_vectors(tile, vocab, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Mask of a tile [LANES, VECTOR] that is the same for all of a vector."""
    last = (tile * LANES + tl.arange(0, LANES)[:, None] + 1) * VECTOR
    return tl.broadcast_to(last <= vocab, (LANES, VECTOR))


@triton.jit
def _rest(vocab, VECTOR: tl.constexpr):
    """Columns after the last whole vector [VECTOR], some of them outside."""
    return vocab // VECTOR * VECTOR + tl.arange(0, VECTOR)


@triton.jit
def _add(top, total, z):
    """Take a tile of logits into the running maximum and sum of exponentials [LANES]."""
    higher = tl.maximum(top, tl.max(z, axis=1))
    total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher[:, None]), axis=1)
    return higher, total


@triton.jit
def _gradient(z, columns, label, shift, share, spread, hit, softcap, SOFTCAP: tl.constexpr):
    """Gradient of a tile: share * exp(z - shift) - spread - hit at the label, through the cap."""
    grad = share * tl.exp(z - shift) - spread - tl.where(columns == label, hit, 0.0)
    if SOFTCAP:
        capped = z / softcap
        grad *= 1.0 - capped * capped
    return grad


@triton.jit
def _write_gradient(
    row_ptr,
    vocab,
    label,
    shift,
    share,
    factor,
    smoothing,
    softcap,
    scale,
    SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Replace a row of logits by its gradient, from the last tile to the first.

    The term of the probabilities is share * exp(z - shift), the others are times ``factor``.
    """
    dtype = row_ptr.dtype.element_ty
    spread = factor * smoothing / vocab
    hit = factor * (1.0 - smoothing)
    whole = vocab // (LANES * VECTOR)
    columns = _rest(vocab, VECTOR)
    mask = columns < vocab
    z = _logits(tl.load(row_ptr + columns, mask, 0.0), scale, softcap, SOFTCAP)
    grad = _gradient(z, columns, label, shift, share, spread, hit, softcap, SOFTCAP)
    tl.store(row_ptr + columns, grad.to(dtype), mask)
    columns = _columns(whole, LANES, VECTOR)
    mask = _whole_vectors(whole, vocab, LANES, VECTOR)
    z = _logits(tl.load(row_ptr + columns, mask, 0.0), scale, softcap, SOFTCAP)
    grad = _gradient(z, columns, label, shift, share, spread, hit, softcap, SOFTCAP)
    tl.store(row_ptr + columns, grad.to(dtype), mask)
    for done in range(whole):
        columns = _columns(whole - 1 - done, LANES, VECTOR)
        z = _logits(tl.load(row_ptr + columns), scale, softcap, SOFTCAP)
        grad = _gradient(z, columns, label, shift, share, spread, hit, softcap, SOFTCAP)
        tl.store(row_ptr + columns, grad.to(dtype))


@triton.jit
def _write_zeros(row_ptr, vocab, LANES: tl.constexpr, VECTOR: tl.constexpr):
    dtype = row_ptr.dtype.element_ty
    for tile in range(tl.cdiv(vocab, LANES * VECTOR)):
        mask = _whole_vectors(tile, vocab, LANES, VECTOR)
        there = row_ptr + _columns(tile, LANES, VECTOR)
        tl.store(there, tl.zeros((LANES, VECTOR), dtype), mask)
    columns = _rest(vocab, VECTOR)
    tl.store(row_ptr + columns, tl.zeros((VECTOR,), dtype), columns < vocab)


@triton.jit
def _chunk(
    logits_ptr,
    labels_ptr,
    losses_ptr,
    lse_ptr,
    vocab,
    stride_row,
    ignore_index,
    smoothing,
    z_loss,
    softcap,
    scale,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    GRADIENT: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_row
    label = tl.load(labels_ptr + row)
    if label == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        if GRADIENT:
            _write_zeros(row_ptr, vocab, LANES, VECTOR)
    else:
        # A label outside the vocabulary makes the loss NaN: it cannot be reported from here.
        inside = (label >= 0) & (label < vocab)
        target = tl.load(row_ptr + label, inside, float("nan"))
        target = _logits(target, scale, softcap, SOFTCAP)
        top = tl.full((LANES,), LOWEST, tl.float32)
        total = tl.zeros((LANES,), tl.float32)
        every = tl.zeros((LANES,), tl.float32)
        whole = vocab // (LANES * VECTOR)
        for tile in range(whole):
            u = tl.load(row_ptr + _columns(tile, LANES, VECTOR))
            z = _logits(u, scale, softcap, SOFTCAP)
            top, total = _add(top, total, z)
            if SMOOTHING:
                every += tl.sum(z, axis=1)
        mask = _whole_vectors(whole, vocab, LANES, VECTOR)
        u = tl.load(row_ptr + _columns(whole, LANES, VECTOR), mask, 0.0)
        z = _logits(u, scale, softcap, SOFTCAP)
        top, total = _add(top, total, tl.where(mask, z, float("-inf")))
        columns = _rest(vocab, VECTOR)
        few = _logits(tl.load(row_ptr + columns, columns < vocab, 0.0), scale, softcap, SOFTCAP)
        rest = tl.where(columns < vocab, few, float("-inf"))
        highest = tl.maximum(tl.max(top, axis=0), tl.max(rest, axis=0))
        total = tl.sum(total * tl.exp(top - highest), axis=0)
        total += tl.sum(tl.exp(rest - highest), axis=0)
        lse = highest + tl.log(total)
        # Relative to the largest logit: the loss of a sure row is a small difference of large
        # numbers.
        loss = tl.log(total) + (1.0 - smoothing) * (highest - target) + z_loss * lse * lse
        if SMOOTHING:
            every += tl.sum(tl.where(mask, z, 0.0), axis=1)
            mean = tl.sum(every, axis=0) + tl.sum(tl.where(columns < vocab, few, 0.0), axis=0)
            loss += smoothing * (highest - mean / vocab)
        tl.store(losses_ptr + row, loss)
        tl.store(lse_ptr + row, lse)
        if GRADIENT:
            # Every thread has read the label's logit before any thread overwrites it.
            tl.debug_barrier()
            _write_gradient(
                row_ptr,
                vocab,
                label,
                highest,
                scale * (1.0 + 2.0 * z_loss * lse) / total,
                scale,
                smoothing,
                softcap,
                scale,
                SOFTCAP,
                LANES,
                VECTOR,
            )


@triton.jit
def _grad(
    logits_ptr,
    labels_ptr,
    lse_ptr,
    upstream_ptr,
    vocab,
    stride_row,
    ignore_index,
    smoothing,
    z_loss,
    softcap,
    scale,
    SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_row
    label = tl.load(labels_ptr + row)
    if label == ignore_index:
        _write_zeros(row_ptr, vocab, LANES, VECTOR)
    else:
        lse = tl.load(lse_ptr + row)
        factor = tl.load(upstream_ptr + row).to(tl.float32) * scale
        _write_gradient(
            row_ptr,
            vocab,
            label,
            lse,
            factor * (1.0 + 2.0 * z_loss * lse),
            factor,
            smoothing,
            softcap,
            scale,
            SOFTCAP,
            LANES,
            VECTOR,
        )


def _tile(logits: torch.Tensor) -> dict[str, int]:
    """16 bytes to a thread, twice; at most 16 warps, of which two programs fill a multiprocessor.

    Two rows of logits to a multiprocessor are about what the cache of an H100 or H200 holds.
    """
    vector = 16 // logits.element_size()
    lanes = min(next_power_of_two(triton.cdiv(logits.shape[1], vector)), 1024)
    return {"LANES": lanes, "VECTOR": vector, "num_warps": min(max(lanes // 64, 1), 16)}


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
    """See the reference. The last dimension of ``logits`` is contiguous, ``labels`` too.

    Allocates the losses and lse; overwrites ``logits`` if ``gradient``. fp64 is refused: the
    arithmetic is fp32.
    """
    check_dtype("cross_entropy_chunk_", "logits", logits, HALF)
    rows, vocab = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(losses)
    launch(
        _chunk,
        (rows,),
        logits,
        labels,
        losses,
        lse,
        vocab,
        logits.stride(0),
        ignore_index,
        smoothing,
        z_loss,
        softcap,
        scale,
        SOFTCAP=softcap != 0.0,
        SMOOTHING=smoothing != 0.0,
        GRADIENT=gradient,
        **_tile(logits),
    )
    return losses, lse


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
    """See the reference. All last dimensions are contiguous; overwrites ``logits``."""
    check_dtype("cross_entropy_grad_", "logits", logits, HALF)
    rows, vocab = logits.shape
    launch(
        _grad,
        (rows,),
        logits,
        labels,
        lse,
        upstream,
        vocab,
        logits.stride(0),
        ignore_index,
        smoothing,
        z_loss,
        softcap,
        scale,
        SOFTCAP=softcap != 0.0,
        **_tile(logits),
    )
