"""RMSNorm in Triton: rows in registers, one read and one write of each element."""

import torch
import triton
import triton.language as tl

from dtune_kernels.checks import check, check_dtype
from dtune_kernels.launch import launch, next_power_of_two, num_multiprocessors

MAX_FEATURES = 32768
"""A row must fit into the registers of one program."""
UP_TO_FP32 = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _forward(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    h_ptr,
    rstd_ptr,
    num_rows,
    features,
    stride_x,
    stride_residual,
    eps,
    ADD: tl.constexpr,
    GEMMA: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = (rows < num_rows)[:, None] & (columns < features)[None, :]
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + rows[:, None] * stride_x + columns[None, :], mask, 0.0).to(tl.float32)
    at = rows[:, None] * features + columns[None, :]
    if ADD:
        there = residual_ptr + rows[:, None] * stride_residual + columns[None, :]
        # Rounded before the norm, as the sum that later layers see is.
        x = (x + tl.load(there, mask, 0.0).to(tl.float32)).to(dtype)
        tl.store(h_ptr + at, x, mask)
        x = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / features + eps)
    weight = tl.load(weight_ptr + columns, columns < features, 0.0).to(tl.float32)[None, :]
    normed = x * rstd[:, None]
    if GEMMA:
        y = normed * (1.0 + weight)
    else:
        y = normed.to(dtype).to(tl.float32) * weight
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask)
    tl.store(rstd_ptr + rows, rstd, rows < num_rows)


@triton.jit
def _backward(
    dy_ptr,
    x_ptr,
    rstd_ptr,
    weight_ptr,
    dh_ptr,
    dx_ptr,
    dw_ptr,
    num_rows,
    features,
    stride_dy,
    stride_x,
    stride_dh,
    ADD: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    GEMMA: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    inside = columns < features
    weight = tl.load(weight_ptr + columns, inside, 0.0).to(tl.float32)[None, :]
    if GEMMA:
        weight += 1.0
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (rows < num_rows)[:, None] & inside[None, :]
        rstd = tl.load(rstd_ptr + rows, rows < num_rows, 0.0)[:, None]
        x = tl.load(x_ptr + rows[:, None] * stride_x + columns[None, :], mask, 0.0)
        dy = tl.load(dy_ptr + rows[:, None] * stride_dy + columns[None, :], mask, 0.0)
        dy = dy.to(tl.float32)
        normed = x.to(tl.float32) * rstd
        scaled = dy * weight
        mean = tl.sum(scaled * normed, axis=1) / features
        dx = (scaled - normed * mean[:, None]) * rstd
        if ADD:
            dh = tl.load(dh_ptr + rows[:, None] * stride_dh + columns[None, :], mask, 0.0)
            dx += dh.to(tl.float32)
        there = dx_ptr + rows[:, None] * features + columns[None, :]
        tl.store(there, dx.to(dx_ptr.dtype.element_ty), mask)
        if WEIGHT_GRAD:
            dw += dy * normed
    if WEIGHT_GRAD:
        there = dw_ptr + tl.program_id(0).to(tl.int64) * features + columns
        tl.store(there, tl.sum(dw, axis=0), inside)


def _tile(features: int) -> dict[str, int]:
    """Rows and columns of a program, and its warps: 16 elements a thread, 8 of a long row.

    With 16 of a long row the backward spills on sm_100.
    """
    block = next_power_of_two(features)
    rows = max(1, 2048 // block)
    each = 8 if block >= 8192 else 16
    warps = min(max(rows * block // (32 * each), 1), 32)
    return {"ROWS": rows, "BLOCK": block, "num_warps": warps}


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, gemma: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference. The last dimension of ``x`` is contiguous.

    Refuses fp64, since the arithmetic is fp32, and rows of more than MAX_FEATURES.
    """
    _check("rms_norm", x)
    y, _, rstd = _launch_forward(x, None, weight, eps, gemma)
    return y, rstd


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, gemma: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the reference. The last dimensions of ``x`` and ``residual`` are contiguous.

    Refuses fp64, since the arithmetic is fp32, and rows of more than MAX_FEATURES.
    """
    _check("add_rms_norm", x)
    return _launch_forward(x, residual, weight, eps, gemma)


def _check(op: str, x: torch.Tensor) -> None:
    check_dtype(op, "x", x, UP_TO_FP32)
    features = x.shape[1]
    wanted = f"at most {MAX_FEATURES}"
    check(features <= MAX_FEATURES, op, "number of features", got=features, wanted=wanted)


def _launch_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    gemma: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_rows, features = x.shape
    out_dtype = x.dtype if gemma else torch.promote_types(x.dtype, weight.dtype)
    y = torch.empty((num_rows, features), dtype=out_dtype, device=x.device)
    h = torch.empty_like(y, dtype=x.dtype) if residual is not None else x
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    tile = _tile(features)
    launch(
        _forward,
        (triton.cdiv(num_rows, tile["ROWS"]),),
        x,
        x if residual is None else residual,
        weight,
        y,
        h,
        rstd,
        num_rows,
        features,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        ADD=residual is not None,
        GEMMA=gemma,
        **tile,
    )
    return y, h, rstd


def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    dh: torch.Tensor | None,
    gemma: bool,
    weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference. The last dimensions of ``dy``, ``x`` and ``dh`` are contiguous."""
    num_rows, features = x.shape
    dx = torch.empty((num_rows, features), dtype=x.dtype, device=x.device)
    tile = _tile(features)
    # Each program sums its rows' share of dw; adding the shares up afterwards, in one order, gives
    # the same bits every time.
    programs = min(triton.cdiv(num_rows, tile["ROWS"]), 4 * num_multiprocessors(x.device))
    shares = torch.empty(
        (programs if weight_grad else 0, features), dtype=torch.float32, device=x.device
    )
    launch(
        _backward,
        (programs,),
        dy,
        x,
        rstd,
        weight,
        dy if dh is None else dh,
        dx,
        shares,
        num_rows,
        features,
        dy.stride(0),
        x.stride(0),
        0 if dh is None else dh.stride(0),
        ADD=dh is not None,
        WEIGHT_GRAD=weight_grad,
        GEMMA=gemma,
        **tile,
    )
    if not weight_grad:
        return dx, torch.empty(0, dtype=weight.dtype, device=x.device)
    return dx, shares.sum(0).to(weight.dtype)
