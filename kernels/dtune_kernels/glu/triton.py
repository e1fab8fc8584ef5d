"""Gated linear units in Triton: one read and one write of each element."""

from typing import Any

import torch
import triton
import triton.language as tl

from dtune_kernels.launch import launch, next_power_of_two


@triton.jit
def _sigmoids(z):
    """sigmoid(z) and sigmoid(-z): without overflow, and with all digits where they are small."""
    small = tl.exp(-tl.abs(z))
    large = 1.0 / (1.0 + small)
    small *= large
    return tl.where(z < 0, small, large), tl.where(z < 0, large, small)


@triton.jit
def act_and_slope(x, ACTIVATION: tl.constexpr) -> Any:
    """The activation and its derivative; the latter costs nothing where it is not used."""
    if ACTIVATION == "silu":
        gate = tl.sigmoid(x)
        slope = gate * (1.0 + x * (1.0 - gate))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2 u), where 2 u = sqrt(8 / pi) (x + 0.044715 x^3).
        square = x * x
        gate, other = _sigmoids(x * (1.5957691216057308 + 0.07135481627260025 * square))
        slope = gate + x * (1.5957691216057308 + 0.21406444881780076 * square) * (gate * other)
    else:
        tl.static_assert(ACTIVATION == "gelu")
        gate = 0.5 * (1.0 + tl.erf(0.7071067811865476 * x))
        slope = gate + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return x * gate, slope


@triton.jit
def _tile_of(num_rows, features, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [ROWS, 1], columns [1, BLOCK] and mask of this program; along a row first."""
    blocks = tl.cdiv(features, BLOCK)
    program = tl.program_id(0)
    rows = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return rows, columns, (rows < num_rows) & (columns < features)


@triton.jit
def _forward(
    gate_ptr,
    up_ptr,
    h_ptr,
    num_rows,
    features,
    stride_gate,
    stride_up,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wide: tl.constexpr = tl.float64 if gate_ptr.dtype.element_ty == tl.float64 else tl.float32
    rows, columns, mask = _tile_of(num_rows, features, ROWS, BLOCK)
    gate = tl.load(gate_ptr + rows * stride_gate + columns, mask, 0.0).to(wide)
    up = tl.load(up_ptr + rows * stride_up + columns, mask, 0.0).to(wide)
    act, _ = act_and_slope(gate, ACTIVATION)
    tl.store(h_ptr + rows * features + columns, (act * up).to(h_ptr.dtype.element_ty), mask)


@triton.jit
def _backward(
    dh_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    h_ptr,
    num_rows,
    features,
    stride_dh,
    stride_gate,
    stride_up,
    ACTIVATION: tl.constexpr,
    AGAIN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype = gate_ptr.dtype.element_ty
    wide: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    rows, columns, mask = _tile_of(num_rows, features, ROWS, BLOCK)
    dh = tl.load(dh_ptr + rows * stride_dh + columns, mask, 0.0).to(wide)
    gate = tl.load(gate_ptr + rows * stride_gate + columns, mask, 0.0).to(wide)
    up = tl.load(up_ptr + rows * stride_up + columns, mask, 0.0).to(wide)
    act, slope = act_and_slope(gate, ACTIVATION)
    at = rows * features + columns
    tl.store(dgate_ptr + at, (dh * up * slope).to(dtype), mask)
    tl.store(dup_ptr + at, (dh * act).to(dtype), mask)
    if AGAIN:
        tl.store(h_ptr + at, (act * up).to(dtype), mask)


def _tile(features: int) -> dict[str, int]:
    """Rows and columns of a program: 1024 elements, 8 a thread, 16 bytes of 2-byte floats."""
    block = min(next_power_of_two(features), 1024)
    return {"ROWS": 1024 // block, "BLOCK": block, "num_warps": 4}


def _grid(num_rows: int, features: int, tile: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(num_rows, tile["ROWS"]) * triton.cdiv(features, tile["BLOCK"]),)


def glu(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """See the reference. The last dimensions of ``gate`` and ``up`` are contiguous."""
    num_rows, features = gate.shape
    h = torch.empty((num_rows, features), dtype=gate.dtype, device=gate.device)
    tile = _tile(features)
    launch(
        _forward,
        _grid(num_rows, features, tile),
        gate,
        up,
        h,
        num_rows,
        features,
        gate.stride(0),
        up.stride(0),
        ACTIVATION=activation,
        **tile,
    )
    return h


def glu_backward(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str, again: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the reference. The last dimensions of ``dh``, ``gate`` and ``up`` are contiguous."""
    num_rows, features = gate.shape
    dgate = torch.empty((num_rows, features), dtype=gate.dtype, device=gate.device)
    dup = torch.empty_like(dgate)
    h = torch.empty((num_rows, features) if again else (0,), dtype=gate.dtype, device=gate.device)
    tile = _tile(features)
    launch(
        _backward,
        _grid(num_rows, features, tile),
        dh,
        gate,
        up,
        dgate,
        dup,
        h,
        num_rows,
        features,
        dh.stride(0),
        gate.stride(0),
        up.stride(0),
        ACTIVATION=activation,
        AGAIN=again,
        **tile,
    )
    return dgate, dup, h
