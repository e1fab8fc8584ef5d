"""Gated linear units whose inputs still lack their adapters, in Triton.

Size legend: T tokens, F features, R rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from dtune_kernels.glu.triton import act_and_slope
from dtune_kernels.launch import dot_precision, launch
from dtune_kernels.lora.tiles import Tiles, ceil_div, first_adapters, glu_tiles
from dtune_kernels.lora.triton_common import LowRank, layout, with_adapters


@triton.jit
def _gate_and_up(
    gate_ptr,
    up_ptr,
    stride_gate,
    stride_up,
    low,
    rows,
    first,
    num_rows,
    features,
    GATES: tl.constexpr,
    COUNT: tl.constexpr,
    LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> Any:
    """Tiles of gate and up with their adapters, fp32."""
    gate = with_adapters(
        gate_ptr,
        stride_gate,
        low,
        rows,
        first,
        num_rows,
        features,
        0,
        GATES,
        LAYOUT,
        PRECISION,
        ROWS,
        COLUMNS,
    )
    up = with_adapters(
        up_ptr,
        stride_up,
        low,
        rows,
        first,
        num_rows,
        features,
        GATES,
        COUNT,
        LAYOUT,
        PRECISION,
        ROWS,
        COLUMNS,
    )
    return gate, up


@triton.jit
def _glu(
    gate_ptr,
    up_ptr,
    h_ptr,
    low,
    num_rows,
    features,
    stride_gate,
    stride_up,
    ACTIVATION: tl.constexpr,
    GATES: tl.constexpr,
    COUNT: tl.constexpr,
    LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    gate, up = _gate_and_up(
        gate_ptr,
        up_ptr,
        stride_gate,
        stride_up,
        low,
        rows,
        first,
        num_rows,
        features,
        GATES,
        COUNT,
        LAYOUT,
        PRECISION,
        ROWS,
        COLUMNS,
    )
    act, _ = act_and_slope(gate, ACTIVATION)
    columns = first + tl.arange(0, COLUMNS)
    mask = (rows < num_rows)[:, None] & (columns < features)[None, :]
    there = h_ptr + rows[:, None] * features + columns[None, :]
    tl.store(there, (act * up).to(h_ptr.dtype.element_ty), mask)


@triton.jit
def _glu_backward(
    dh_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    h_ptr,
    low,
    after,
    num_rows,
    features,
    stride_dh,
    stride_gate,
    stride_up,
    ACTIVATION: tl.constexpr,
    GATES: tl.constexpr,
    COUNT: tl.constexpr,
    LAYOUT: tl.constexpr,
    AFTER_COUNT: tl.constexpr,
    AFTER_LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    gate, up = _gate_and_up(
        gate_ptr,
        up_ptr,
        stride_gate,
        stride_up,
        low,
        rows,
        first,
        num_rows,
        features,
        GATES,
        COUNT,
        LAYOUT,
        PRECISION,
        ROWS,
        COLUMNS,
    )
    dh = with_adapters(
        dh_ptr,
        stride_dh,
        after,
        rows,
        first,
        num_rows,
        features,
        0,
        AFTER_COUNT,
        AFTER_LAYOUT,
        PRECISION,
        ROWS,
        COLUMNS,
    )
    act, slope = act_and_slope(gate, ACTIVATION)
    columns = first + tl.arange(0, COLUMNS)
    mask = (rows < num_rows)[:, None] & (columns < features)[None, :]
    there = rows[:, None] * features + columns[None, :]
    dtype = h_ptr.dtype.element_ty
    tl.store(dgate_ptr + there, (dh * up * slope).to(dtype), mask)
    tl.store(dup_ptr + there, (dh * act).to(dtype), mask)
    tl.store(h_ptr + there, (act * up).to(dtype), mask)


def glu(
    gate: torch.Tensor,
    up: torch.Tensor,
    p: torch.Tensor | None,
    b: Sequence[torch.Tensor],
    member: Sequence[int],
    scale: Sequence[float],
    activation: str,
) -> torch.Tensor:
    """See the reference. The last dimensions are contiguous, but for the B's."""
    tokens, features = gate.shape
    none = [0.0] * len(b)
    h = torch.empty((tokens, features), dtype=gate.dtype, device=gate.device)
    tiles = glu_tiles(tokens, features, (), itemsize=gate.element_size())
    launch(
        _glu,
        _grid(gate, tiles),
        gate,
        up,
        h,
        LowRank.of(p, b, scale, None, none, unused=gate),
        tokens,
        features,
        gate.stride(0),
        up.stride(0),
        ACTIVATION=activation,
        GATES=first_adapters(member, 2)[1],
        COUNT=len(b),
        LAYOUT=layout(b, none),
        **_options(gate, tiles),
    )
    return h


def glu_backward(
    dh: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    p: torch.Tensor | None,
    b: Sequence[torch.Tensor],
    member: Sequence[int],
    scale: Sequence[float],
    ds: torch.Tensor | None,
    a: Sequence[torch.Tensor],
    seed: torch.Tensor | None,
    dropout: Sequence[float],
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the reference. The last dimensions are contiguous, but for the A's and B's."""
    tokens, features = gate.shape
    none = [0.0] * len(b)
    dgate, dup, h = (
        torch.empty((tokens, features), dtype=gate.dtype, device=gate.device) for _ in range(3)
    )
    transposed = [each.t() for each in a]
    ranks = [each.shape[1] for each in (*b, *transposed)]
    tiles = glu_tiles(tokens, features, ranks, itemsize=gate.element_size())
    launch(
        _glu_backward,
        _grid(gate, tiles),
        dh,
        gate,
        up,
        dgate,
        dup,
        h,
        LowRank.of(p, b, scale, None, none, unused=gate),
        LowRank.of(ds, transposed, [1.0] * len(a), seed, dropout, unused=gate),
        tokens,
        features,
        dh.stride(0),
        gate.stride(0),
        up.stride(0),
        ACTIVATION=activation,
        GATES=first_adapters(member, 2)[1],
        COUNT=len(b),
        LAYOUT=layout(b, none),
        AFTER_COUNT=len(a),
        AFTER_LAYOUT=layout(transposed, dropout),
        **_options(gate, tiles),
    )
    return dgate, dup, h


def _grid(gate: torch.Tensor, tiles: Tiles) -> tuple[int, int]:
    tokens, features = gate.shape
    return ceil_div(tokens, tiles.rows), ceil_div(features, tiles.columns)


def _options(gate: torch.Tensor, tiles: Tiles) -> dict[str, Any]:
    return {
        "PRECISION": dot_precision(gate.dtype),
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
