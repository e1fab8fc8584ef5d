"""Dropout of adapters: one mask, whoever asks for it and for whichever part."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dtune_kernels.lora import dropout, lora_linear, lora_linears, ops
from dtune_kernels.lora.dropout import kept

from tests.kernels.compare import triton_on_cpu
from tests.kernels.lora_cases import cast, linear

SEEDS = [0, 1, 2**31, 2**32 + 5, 2**63 - 2]


def words(rounds: int, counter: tuple[int, ...], key: tuple[int, int]) -> list[str]:
    parts = tuple(torch.tensor([each]) for each in counter)
    keys = [torch.tensor([each]) for each in key]
    original = dropout.ROUNDS
    dropout.ROUNDS = rounds
    try:
        return [f"{int(word):08x}" for word in dropout._philox(parts, *keys)]
    finally:
        dropout.ROUNDS = original


@pytest.mark.parametrize(
    ("rounds", "counter", "key", "expected"),
    [
        (10, (0,) * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (10, (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (7, (0,) * 4, (0, 0), "5f6fb709 0d893f64 4f121f81 4f730a48"),
    ],
)
def test_philox_is_that_of_random123(
    rounds: int, counter: tuple[int, ...], key: tuple[int, int], expected: str
) -> None:
    """Known answers of Random123, kat_vectors, philox4x32."""
    assert words(rounds, counter, key) == expected.split()


def triton_mask(seed: torch.Tensor, rows: int, columns: int, rates: list[float]) -> torch.Tensor:
    """The masks [adapter, row, column] that ``lora_expand_`` multiplies ones by."""
    masks = []
    for chosen in range(len(rates)):
        y = torch.zeros(rows, columns)
        p = torch.zeros(rows, len(rates))
        p[:, chosen] = 1
        b = [torch.ones(columns, 1) for _ in rates]
        scale = [1 - rate for rate in rates]
        with triton_on_cpu():
            ops.expand_([y], p, b, [0] * len(rates), scale, seed, rates)
        masks.append(y.round())
    return torch.stack(masks)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(1, 1), (70, 130), (19, 37)])
def test_triton_draws_the_mask_of_the_reference(shape: tuple[int, int], seed: int) -> None:
    start, rates = torch.tensor([seed]), [0.1, 0.5, 0.9]
    expected = torch.stack([kept(start, j, *shape, rate) for j, rate in enumerate(rates)])
    assert torch.equal(triton_mask(start, *shape, rates).bool(), expected)


def test_every_kernel_draws_the_same_mask() -> None:
    torch.manual_seed(0)
    seed, rate = torch.tensor([2**40 + 3]), 0.3
    rows, columns = 70, 600
    mask = kept(seed, 0, rows, columns, rate).float() / (1 - rate)
    eye, ones = torch.eye(rows), torch.ones(rows, columns)
    with triton_on_cpu():
        # Row t of x alone has a 1: P is the sum over columns; dA of dS = I is x itself.
        p = ops.project(ones, [torch.eye(columns)[:90]], seed, [rate])
        (da,) = ops.grad_a(
            ones, eye, [eye.new_empty(rows, columns)], seed, [rate], None, None, False
        )
    torch.testing.assert_close(p, mask[:, :90])
    torch.testing.assert_close(da, mask)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5])
def test_the_rate_is_kept(rate: float) -> None:
    mask = kept(torch.tensor([11]), 0, 1000, 1000, rate)
    error = abs(float(mask.double().mean()) - (1 - rate))
    assert error < 5 * (rate * (1 - rate) / mask.numel()) ** 0.5


def test_neither_adapters_nor_neighbours_nor_seeds_go_together() -> None:
    size, rate = 1000, 0.5
    first = kept(torch.tensor([11]), 0, size, size, rate)
    others = {
        "adapter": kept(torch.tensor([11]), 1, size, size, rate),
        "seed": kept(torch.tensor([12]), 0, size, size, rate),
        "key's other half": kept(torch.tensor([11 + 2**32]), 0, size, size, rate),
        "row": first.roll(1, 0),
        "column": first.roll(1, 1),
        "four columns": first.roll(4, 1),
    }
    for name, other in others.items():
        agreement = float((first == other).double().mean())
        assert abs(agreement - 0.5) < 5 * 0.5 / size, name


def test_each_call_draws_anew_and_a_seed_repeats() -> None:
    one = linear(24, 36, (4,), dropout=0.5)
    x = torch.randn(5, 36)
    torch.manual_seed(1)
    first, second = lora_linear(x, one), lora_linear(x, one)
    torch.manual_seed(1)
    assert torch.equal(lora_linear(x, one), first)
    assert not torch.equal(first, second)


def test_linears_of_a_group_have_masks_of_their_own() -> None:
    one = linear(24, 36, (4,), dropout=0.5)
    first, second = lora_linears(torch.randn(5, 36), [one, one])
    assert not torch.equal(first, second)


def test_without_dropout_no_random_number_is_drawn() -> None:
    one, x = linear(24, 36, (4,)), torch.randn(5, 36)
    state = torch.get_rng_state()
    lora_linear(x, one)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_mean_over_masks_is_the_result_without_dropout() -> None:
    torch.manual_seed(0)
    one = cast(linear(6, 8, (4,), dropout=0.3), torch.float32)
    x = torch.randn(1, 8)
    rows = x.expand(40000, 8)
    with torch.no_grad():
        dropped = lora_linear(rows, one).double()
        whole = replace(one, adapters=(replace(one.adapters[0], dropout=0.0),))
        kept_all = lora_linear(x, whole).double()
    deviation = dropped.std(0) / len(rows) ** 0.5
    assert ((dropped.mean(0) - kept_all[0]).abs() < 5 * deviation + 1e-6).all()
