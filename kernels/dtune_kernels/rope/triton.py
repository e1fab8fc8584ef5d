"""Rotary position embedding in Triton: one program a token rotates all its query and key heads."""

import torch
import triton
import triton.language as tl

from dtune_kernels.launch import launch, next_power_of_two


@triton.jit
def _rotate_heads(
    x_ptr,
    y_ptr,
    cos_a,
    cos_b,
    sin_a,
    sin_b,
    stride_xh,
    stride_yh,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    dtype = y_ptr.dtype.element_ty
    columns = tl.arange(0, BLOCK)[None, :]
    rest = tl.arange(0, REST_BLOCK)[None, :]
    for start in range(0, NUM_HEADS, HEADS):
        heads = (start + tl.arange(0, HEADS)).to(tl.int64)[:, None]
        inside = heads < NUM_HEADS
        mask = inside & (columns < HALF)
        x_at = x_ptr + heads * stride_xh + columns
        a = tl.load(x_at, mask, 0.0).to(WIDE)
        b = tl.load(x_at + HALF, mask, 0.0).to(WIDE)
        y_at = y_ptr + heads * stride_yh + columns
        tl.store(y_at, (a * cos_a - b * sin_a).to(dtype), mask)
        tl.store(y_at + HALF, (b * cos_b + a * sin_b).to(dtype), mask)
        if REST > 0:
            mask = inside & (rest < REST)
            x = tl.load(x_ptr + heads * stride_xh + 2 * HALF + rest, mask, 0.0)
            tl.store(y_ptr + heads * stride_yh + 2 * HALF + rest, x, mask)


@triton.jit
def _rope(
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    cos_ptr,
    sin_ptr,
    positions,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_q_out_b,
    stride_q_out_h,
    stride_q_out_s,
    stride_k_out_b,
    stride_k_out_h,
    stride_k_out_s,
    stride_cos_b,
    stride_cos_s,
    stride_sin_b,
    stride_sin_s,
    TRANSPOSE: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    wide: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    token = tl.program_id(0).to(tl.int64)
    b = token // positions
    s = token % positions
    columns = tl.arange(0, BLOCK)
    inside = columns < HALF
    cos_at = cos_ptr + b * stride_cos_b + s * stride_cos_s + columns
    sin_at = sin_ptr + b * stride_sin_b + s * stride_sin_s + columns
    cos_a = tl.load(cos_at, inside, 0.0).to(wide)[None, :]
    cos_b = tl.load(cos_at + HALF, inside, 0.0).to(wide)[None, :]
    # The transposed rotation takes the other half's sine, with the other sign.
    if TRANSPOSE:
        sin_a = -tl.load(sin_at + HALF, inside, 0.0).to(wide)[None, :]
        sin_b = -tl.load(sin_at, inside, 0.0).to(wide)[None, :]
    else:
        sin_a = tl.load(sin_at, inside, 0.0).to(wide)[None, :]
        sin_b = tl.load(sin_at + HALF, inside, 0.0).to(wide)[None, :]
    _rotate_heads(
        q_ptr + b * stride_qb + s * stride_qs,
        q_out_ptr + b * stride_q_out_b + s * stride_q_out_s,
        cos_a,
        cos_b,
        sin_a,
        sin_b,
        stride_qh,
        stride_q_out_h,
        QUERY_HEADS,
        HALF,
        REST,
        HEADS,
        BLOCK,
        REST_BLOCK,
        wide,
    )
    _rotate_heads(
        k_ptr + b * stride_kb + s * stride_ks,
        k_out_ptr + b * stride_k_out_b + s * stride_k_out_s,
        cos_a,
        cos_b,
        sin_a,
        sin_b,
        stride_kh,
        stride_k_out_h,
        KEY_HEADS,
        HALF,
        REST,
        HEADS,
        BLOCK,
        REST_BLOCK,
        wide,
    )


def _tile(heads: int, half: int, rest: int) -> dict[str, int]:
    """Heads and features of a step, and warps: 2048 elements at most, 16 a thread."""
    block = next_power_of_two(half)
    step = min(next_power_of_two(heads), max(1024 // block, 1))
    return {
        "HEADS": step,
        "BLOCK": block,
        "REST_BLOCK": next_power_of_two(rest),
        "num_warps": min(max(2 * step * block // 512, 1), 8),
    }


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, transpose: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference. The last dimension of every argument is contiguous."""
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    rest = q.shape[-1] - cos.shape[-1]
    _launch(q, k, q_out, k_out, cos, sin, transpose=transpose, rest=rest)
    return q_out, k_out


def rope_(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, transpose: bool
) -> None:
    """See the reference. The last dimension of every argument is contiguous."""
    _launch(q, k, q, k, cos, sin, transpose=transpose, rest=0)


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    transpose: bool,
    rest: int,
) -> None:
    batch, heads, positions, _ = q.shape
    half = cos.shape[-1] // 2
    # One row of tables serves every row of the batch.
    one = cos.shape[0] == 1
    launch(
        _rope,
        (batch * positions,),
        q,
        k,
        q_out,
        k_out,
        cos,
        sin,
        positions,
        *q.stride()[:3],
        *k.stride()[:3],
        *q_out.stride()[:3],
        *k_out.stride()[:3],
        0 if one else cos.stride(0),
        cos.stride(1),
        0 if one else sin.stride(0),
        sin.stride(1),
        TRANSPOSE=transpose,
        QUERY_HEADS=heads,
        KEY_HEADS=k.shape[1],
        HALF=half,
        REST=rest,
        **_tile(max(heads, k.shape[1]), half, rest),
    )
