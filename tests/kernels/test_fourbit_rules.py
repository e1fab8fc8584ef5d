"""Which code a number gets next to a midpoint: bitsandbytes' CPU rule and its CUDA rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from dtune_kernels.fourbit import ops, reference, triton

from tests.kernels.compare import triton_on_cpu

TABLE = bnb.create_dynamic_map()
MIDPOINTS = (TABLE[:-1] + TABLE[1:]) / 2
on_both = pytest.mark.parametrize("backend", ["reference", "triton"])


@pytest.fixture
def no_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean counts as zero, so that a test chooses what is rounded to a code."""
    for module in (reference, triton):
        monkeypatch.setattr(module, "mean", lambda absmax: absmax.new_zeros(1))


def in_groups(scaled: torch.Tensor) -> torch.Tensor:
    """Numbers from -1 to 1, 255 behind each 1: the scale of every group is 1."""
    groups = torch.nn.functional.pad(scaled, (0, -scaled.numel() % 255)).view(-1, 255)
    return torch.cat((torch.ones(len(groups), 1), groups), 1).view(-1)


def out_of_groups(codes: torch.Tensor, count: int) -> torch.Tensor:
    return codes.view(-1, 256)[:, 1:].reshape(-1)[:count].int()


def codes_of(scaled: torch.Tensor, cuda: bool, backend: str) -> torch.Tensor:
    codes, absmax2, offset = quantize_absmax(in_groups(scaled), cuda, backend)
    assert offset == 0
    assert (absmax2 == 1).all()
    return out_of_groups(codes, scaled.numel())


def quantize_absmax(x: torch.Tensor, cuda: bool, backend: str) -> Any:
    if backend == "reference":
        return ops.quantize_absmax(x, cuda)
    with triton_on_cpu():
        return ops.quantize_absmax(x, cuda)


def bisected(x: float) -> int:
    """The code by the search of bitsandbytes' CUDA code: over odd codes, then the even between."""
    pivot, low, high = 127, 0, 255
    for step in (64, 32, 16, 8, 4, 2, 1):
        if x > TABLE[pivot]:
            low, pivot = pivot, pivot + step
        else:
            high, pivot = pivot, pivot - step
    if x > TABLE[pivot]:
        return high if x > (TABLE[high] + TABLE[pivot]) * 0.5 else pivot
    return low if x < (TABLE[low] + TABLE[pivot]) * 0.5 else pivot


def around(points: torch.Tensor, count: int, step: Callable[[torch.Tensor, int], Any]) -> Any:
    return torch.cat([step(points, i) for i in range(-count, count + 1)]).clamp(-1, 1)


@on_both
@pytest.mark.usefixtures("no_offset")
def test_codes_are_the_nearest_with_ties_as_in_bitsandbytes_for_cuda(backend: str) -> None:
    torch.manual_seed(0)
    below = torch.nextafter(MIDPOINTS, torch.tensor(-2.0))
    above = torch.nextafter(MIDPOINTS, torch.tensor(2.0))
    scaled = torch.cat((below, MIDPOINTS, above, TABLE[1:], torch.rand(200) * 2 - 1))
    codes = codes_of(scaled, True, backend)
    assert codes.tolist() == [bisected(x) for x in scaled]
    # Ties to the lower code, or off by one, would be seen.
    assert codes.tolist() != torch.bucketize(scaled, MIDPOINTS).tolist()


@on_both
@pytest.mark.usefixtures("no_offset")
def test_codes_on_the_grid_are_those_of_bitsandbytes_for_the_cpu(backend: str) -> None:
    torch.manual_seed(0)
    # Where the grid's code changes: half a step below the first point above a midpoint.
    step = 2 / 65535
    edges = ((MIDPOINTS.double() + 1) / step).ceil() * step - 1 - step / 2
    near = around(edges.float(), 40, lambda x, i: x + i * 2.0**-25)
    wide = around(edges.float(), 8, lambda x, i: x + i * step / 8)
    scaled = torch.cat((near, wide, torch.rand(2000) * 2 - 1))
    codes = codes_of(scaled, False, backend)
    theirs, _ = bnb.quantize_blockwise(in_groups(scaled), blocksize=256)
    wanted = out_of_groups(theirs, scaled.numel())
    assert torch.equal(codes, wanted)
    assert not torch.equal(codes_of(scaled, True, backend), wanted), "the other rule would pass"


@on_both
@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 1000])
def test_scales_near_each_other_and_groups_of_any_size(
    count: int, cuda: bool, backend: str
) -> None:
    torch.manual_seed(0)
    absmax = 0.02 + 0.001 * torch.randn(count)
    codes, absmax2, offset = quantize_absmax(absmax, cuda, backend)
    assert torch.equal(offset, absmax.mean().view(1))
    theirs, state = bnb.quantize_blockwise(absmax - offset, blocksize=256)
    assert torch.equal(absmax2, state.absmax)
    if not cuda:
        assert torch.equal(codes, theirs)
    else:
        largest = absmax2.repeat_interleave(256)[:count]
        step = 2 * largest / 65535
        exact = (absmax - offset).double()
        error = (TABLE[codes.int()] * largest - exact).abs()
        bound = (TABLE[theirs.int()] * largest - exact).abs()
        # Nearer than on the grid, up to rounding, and never as far as another code.
        assert (error <= bound + 1e-6 * largest).all()
        assert (bound <= error + step).all()


@on_both
@pytest.mark.parametrize("cuda", [False, True])
def test_a_group_without_spread_has_codes_0(cuda: bool, backend: str) -> None:
    codes, absmax2, offset = quantize_absmax(torch.full((300,), 0.5), cuda, backend)
    assert not codes.any()
    assert not absmax2.any()
    assert offset == 0.5


FP4_PIVOTS = torch.tensor(
    [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333]
)
FP4_BY_MAGNITUDE = torch.tensor([0, 1, 6, 7, 4, 5, 2, 3])
each_kind = pytest.mark.parametrize("kind", ["nf4", "fp4"])


def midpoints(kind: str) -> torch.Tensor:
    values = bnb.get_4bit_type(kind, device="cpu").sort().values
    return (values[:-1] + values[1:]) / 2


def next_to(points: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Rows [largest, 63 numbers that are points when divided by it, or up to an ulp beside]."""
    x = largest[:, None] * points
    beside = [torch.nextafter(x, torch.tensor(sign * 9.0)) for sign in (-1.0, 1.0)]
    row = torch.cat((largest[:, None], x, *beside, torch.zeros(len(x), 2)), 1)
    row[:, -1] = -0.0
    return torch.nn.functional.pad(row, (0, 64 - row.shape[1]))


def quantize_4bit(weight: torch.Tensor, kind: str, cuda: bool, backend: str) -> torch.Tensor:
    if backend == "reference":
        codes, _ = ops.quantize(weight, kind, 64, cuda)
    else:
        with triton_on_cpu():
            codes, _ = ops.quantize(weight, kind, 64, cuda)
    return torch.stack((codes >> 4, codes & 15), 1).view(-1)[: weight.numel()]


@on_both
@each_kind
def test_elements_next_to_midpoints_have_the_codes_of_bitsandbytes_for_the_cpu(
    kind: str, backend: str
) -> None:
    torch.manual_seed(0)
    weight = next_to(midpoints(kind), 0.5 + torch.rand(100))
    theirs, _ = bnb.quantize_4bit(weight.view(-1), blocksize=64, quant_type=kind)
    wanted = torch.cat((theirs >> 4, theirs & 15), 1).view(-1)
    assert torch.equal(quantize_4bit(weight, kind, False, backend), wanted)
    divided = weight / weight.amax(1, keepdim=True)
    order = bnb.get_4bit_type(kind, device="cpu").argsort(stable=True)
    other = order[torch.bucketize(divided, midpoints(kind))].view(-1)
    assert not torch.equal(other, wanted.long()), "a division would pass"


@on_both
@each_kind
def test_a_last_block_that_is_cut_has_the_codes_of_bitsandbytes_for_the_cpu(
    kind: str, backend: str
) -> None:
    torch.manual_seed(0)
    seen = False
    for weight in next_to(midpoints(kind), 0.5 + torch.rand(20))[:, None, :50]:
        theirs, _ = bnb.quantize_4bit(weight.view(-1), blocksize=64, quant_type=kind)
        wanted = torch.cat((theirs >> 4, theirs & 15), 1).view(-1)
        assert torch.equal(quantize_4bit(weight, kind, False, backend), wanted)
        seen |= not torch.equal(quantize_4bit(weight, kind, True, backend), wanted)
    assert seen, "a product with the reciprocal would pass"


@on_both
@each_kind
@pytest.mark.parametrize("columns", [64, 50])
def test_elements_next_to_pivots_have_the_codes_of_bitsandbytes_for_cuda(
    columns: int, kind: str, backend: str
) -> None:
    """By the decisions of its code, with a reciprocal that is rounded correctly."""
    torch.manual_seed(0)
    points = torch.cat((-FP4_PIVOTS, FP4_PIVOTS)) if kind == "fp4" else midpoints(kind)
    largest = torch.cat((torch.ones(1), 0.5 + torch.rand(20)))
    for weight in next_to(points, largest)[:, None, :columns]:
        scaled = weight * weight[:, :1].reciprocal()
        if kind == "fp4":
            sign = 8 * (scaled < 0)
            wanted = FP4_BY_MAGNITUDE[(scaled.abs()[..., None] > FP4_PIVOTS).sum(-1)] + sign
        else:
            wanted = (scaled[..., None] > points).sum(-1)
        codes = quantize_4bit(weight, kind, True, backend)
        assert torch.equal(codes.long(), wanted.view(-1))


@on_both
@each_kind
@pytest.mark.parametrize("cuda", [False, True])
def test_a_block_of_zeros_has_the_code_of_zero(cuda: bool, kind: str, backend: str) -> None:
    codes = quantize_4bit(torch.zeros(3, 50), kind, cuda, backend)
    assert (bnb.get_4bit_type(kind, device="cpu")[codes.int()] == 0).all()
