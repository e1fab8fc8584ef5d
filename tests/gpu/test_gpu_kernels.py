"""Every op and every function of the kernels on a GPU, as near to fp64 as plain PyTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from dtune_kernels.catalog import CATALOG, SHAPES, SMALL
from dtune_kernels.check import DTYPES, PARITY_TOKENS, check_parity, cloned, compare, tensors_in
from dtune_kernels.fourbit import FourBitWeight, fp4_quantize, nf4_quantize
from dtune_kernels.library import Shape
from dtune_kernels.lora.dropout import kept

from tests.gpu.kernel_functions import FUNCTIONS, Draw, with_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = torch.device("cuda")
ODD = replace(SMALL, name="small", tokens=37, hidden=72, ffn=200, head_dim=24, vocab=1001, rank=5)
"""No multiple of any tile: every mask is used."""
LAYERS = ["small", "1b", "8b", "70b"]

each_op = pytest.mark.parametrize("name", list(CATALOG))
each_dtype = pytest.mark.parametrize("dtype", list(DTYPES))
each_layer = pytest.mark.parametrize("layer", LAYERS)


@pytest.fixture(autouse=True)
def _seeded_and_cleared() -> Any:
    """Memory goes back after each test: processes that run tests side by side share the device."""
    torch.manual_seed(0)
    yield
    torch.cuda.empty_cache()


def sizes_of(layer: str) -> Shape:
    shape = ODD if layer == "small" else SHAPES[layer]
    return replace(shape, tokens=min(shape.tokens, PARITY_TOKENS))


@each_op
@each_layer
@each_dtype
def test_an_op_is_as_near_to_fp64_as_plain(dtype: str, layer: str, name: str) -> None:
    op = CATALOG[name]
    parity = check_parity(op, op.arguments(sizes_of(layer), DTYPES[dtype], DEVICE))
    assert parity.problem == ""


@pytest.mark.parametrize("name", list(FUNCTIONS))
@each_layer
@each_dtype
def test_values_and_gradients_are_as_near_to_fp64_as_plain(
    dtype: str, layer: str, name: str
) -> None:
    function = FUNCTIONS[name](Draw(sizes_of(layer), DTYPES[dtype], DEVICE))
    ours = with_gradients(function, function.ours)
    plain = with_gradients(function, function.plain)
    exact = with_gradients(function, function.plain, double=True)
    for index, results in enumerate(zip(ours, exact, plain, strict=True)):
        assert compare(f"result {index}", *results).problem == ""


@each_op
def test_an_op_gives_the_same_bits_twice(name: str) -> None:
    op = CATALOG[name]
    arguments = op.arguments(SHAPES["8b"], torch.bfloat16, DEVICE)
    once, again = cloned(arguments), cloned(arguments)
    returned = [op.call(*once), op.call(*again)]
    pairs = [
        *zip(*(tensors_in(each) for each in returned), strict=True),
        *zip(tensors_in(once), tensors_in(again), strict=True),
    ]
    assert pairs
    assert all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("name", ["lora_linears", "lora_mlp", "linear_cross_entropy"])
def test_gradients_have_the_same_bits_twice(name: str) -> None:
    function = FUNCTIONS[name](Draw(SHAPES["1b"], torch.bfloat16, DEVICE))
    once, again = (with_gradients(function, function.ours) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))


@pytest.mark.parametrize("seed", [0, 123456789012345, 2**63 - 2])
@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_dropout_drops_what_the_reference_drops(rate: float, seed: int) -> None:
    rows, features, rank = 48, 80, 16
    seeds = torch.tensor([seed], device=DEVICE)
    masks = [kept(seeds.cpu(), adapter, rows, features, rate) for adapter in range(2)]
    assert 0 < masks[0].float().mean() < 1
    assert not torch.equal(masks[0], masks[1])

    def filled(*size: int) -> torch.Tensor:
        return torch.ones(size, device=DEVICE)

    # scale * drop(P B^T) of ones, added to zeros.
    ys = [torch.zeros(rows, features, device=DEVICE) for _ in range(2)]
    b = [filled(features, 1), filled(features, 1)]
    CATALOG["lora_expand_"].call(ys, filled(rows, 2), b, [0, 1], [1.0, 1.0], seeds, [rate, rate])
    for y, mask in zip(ys, masks, strict=True):
        assert torch.equal(y.cpu() != 0, mask)
    # drop(x) A^T of ones, with rows of A that pick features.
    for start in range(0, features, rank):
        pick = torch.eye(features, device=DEVICE)[start : start + rank].contiguous()
        p = CATALOG["lora_project"].call(filled(rows, features), [pick, pick], seeds, [rate, rate])
        for part, mask in zip(p.cpu().split(rank, dim=1), masks, strict=True):
            assert torch.equal(part != 0, mask[:, start : start + rank])
    # dS^T drop(x) of ones, with columns of dS that pick tokens.
    a = [filled(rank, features), filled(rank, features)]
    for start in range(0, rows, rank):
        pick = torch.eye(rows, device=DEVICE)[:, start : start + rank]
        das = CATALOG["lora_grad_a"].call(
            filled(rows, features), pick.repeat(1, 2), a, seeds, [rate, rate], None, None, False
        )
        for da, mask in zip(das, masks, strict=True):
            assert torch.equal(da.cpu() != 0, mask[start : start + rank])
    # dup = drop(dS A) * act(gate), in the backward of the gated unit.
    gate, up = filled(rows, features), filled(rows, features)
    _, dup, _ = CATALOG["lora_glu_backward"].call(
        torch.zeros_like(gate), gate, up, None, [], [], [], filled(rows, 1), [filled(1, features)],
        seeds, [rate], "silu",
    )  # fmt: skip
    assert torch.equal(dup.cpu() != 0, masks[0])


def by_bitsandbytes(weight: torch.Tensor, kind: str, nested: bool) -> tuple[Any, FourBitWeight]:
    """bitsandbytes' state, and the same bytes as dtune keeps them."""
    functional = pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes is not installed: nothing to compare its bits with"
    ).functional
    codes, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=nested, quant_type=kind
    )
    rows, columns = weight.shape
    scales = (state.state2.absmax, state.offset.view(1)) if nested else (None, None)
    own = FourBitWeight((rows, columns), kind, 64, codes.view(-1), state.absmax, *scales)
    return (functional, codes, state), own


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@each_dtype
def test_4_bits_become_the_bits_that_bitsandbytes_makes(
    dtype: str, kind: str, nested: bool
) -> None:
    weight = torch.randn(1000, 4096, dtype=DTYPES[dtype], device=DEVICE)
    (functional, codes, state), own = by_bitsandbytes(weight, kind, nested)
    theirs = functional.dequantize_4bit(codes, state)
    assert theirs.any()
    assert torch.equal(own.dequantize(DTYPES[dtype]), theirs)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_weights_become_the_4_bits_of_bitsandbytes(kind: str) -> None:
    weight = torch.randn(1000, 4096, device=DEVICE)
    _, theirs = by_bitsandbytes(weight, kind, False)
    own = (nf4_quantize if kind == "nf4" else fp4_quantize)(weight)
    assert torch.equal(own.absmax, theirs.absmax)
    # bitsandbytes multiplies by an approximate reciprocal: an element within 2 ulp of one of 15
    # midpoints may go to the other side. Its density is below 1.
    expected = 15 * 2 * 2 * 2**-24 * weight.numel()
    differ = int((own.codes != theirs.codes).sum())
    assert differ <= 10 + 4 * expected
