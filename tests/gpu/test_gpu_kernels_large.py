"""Tensors of more than 2^31 elements: offsets that 32 bits do not hold.

The last rows of a large call are those of a small call, bit for bit: rows do not depend on others.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from dtune_kernels.catalog import CATALOG
from dtune_kernels.fourbit import FourBitWeight
from dtune_kernels.fourbit.tables import GROUP
from dtune_kernels.int8 import Int8Weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = torch.device("cuda")
COLUMNS = 4096
ROWS = 2**31 // COLUMNS + 32
LAST = 64
"""Rows that are compared: some on each side of element 2^31, and a whole tile of any kernel."""


@pytest.fixture(autouse=True)
def _cleared() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.cuda.empty_cache()


def need(*nbytes: float) -> None:
    """Skip where the device has no room for so many bytes, with 1 GiB to spare."""
    wanted, (free, _) = sum(nbytes) + (1 << 30), torch.cuda.mem_get_info(DEVICE)
    if free < wanted:
        pytest.skip(f"needs {wanted / 2**30:.1f} GiB of free memory, there are {free / 2**30:.1f}")


def rows(count: int = 1, columns: int = COLUMNS, number: int = ROWS) -> list[torch.Tensor]:
    """Random bf16 [ROWS, COLUMNS], made in place."""
    found = []
    for _ in range(count):
        x = torch.empty(number, columns, dtype=torch.bfloat16, device=DEVICE)
        found.append(x.normal_())
    return found


def ends(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x[-LAST:].clone() for x in tensors]


def test_dequantised_4_bits() -> None:
    size = ROWS * COLUMNS
    assert size > 2**31
    need(2 * size, size / 2, size / 64)
    weight = FourBitWeight(
        (ROWS, COLUMNS),
        "nf4",
        64,
        torch.randint(256, (size // 2,), dtype=torch.uint8, device=DEVICE),
        torch.randint(256, (size // 64,), dtype=torch.uint8, device=DEVICE),
        torch.rand(-(-size // 64 // GROUP), device=DEVICE),
        2 + torch.rand(1, device=DEVICE),
    )
    whole = weight.dequantize(torch.bfloat16)
    part = weight.rows(ROWS - LAST, ROWS).dequantize(torch.bfloat16)
    assert part.any()
    assert torch.equal(whole[-LAST:], part)
    assert torch.equal(whole[:LAST], weight.rows(0, LAST).dequantize(torch.bfloat16))


def test_dequantised_8_bits() -> None:
    size = ROWS * COLUMNS
    need(2 * size, size)
    codes = torch.randint(-127, 128, (ROWS, COLUMNS), dtype=torch.int8, device=DEVICE)
    weight = Int8Weight((ROWS, COLUMNS), codes, 1 + torch.rand(ROWS, device=DEVICE))
    whole = weight.dequantize(torch.bfloat16)
    part = weight.rows(ROWS - LAST, ROWS).dequantize(torch.bfloat16)
    assert part.any()
    assert torch.equal(whole[-LAST:], part)


def test_rms_norm() -> None:
    need(4 * 2 * ROWS * COLUMNS)
    x, dy = rows(2)
    weight = 1 + torch.randn(COLUMNS, dtype=torch.bfloat16, device=DEVICE) / 4
    forward, backward = CATALOG["rms_norm"].call, CATALOG["rms_norm_backward"].call
    y, rstd = forward(x, weight, 1e-6, False)
    few_y, few_rstd = forward(*ends(x), weight, 1e-6, False)
    assert torch.equal(y[-LAST:], few_y)
    assert torch.equal(rstd[-LAST:], few_rstd)
    del y
    dx, _ = backward(dy, x, rstd, weight, None, False, False)
    few_dx, _ = backward(*ends(dy, x, rstd), weight, None, False, False)
    assert torch.equal(dx[-LAST:], few_dx)


def test_glu() -> None:
    need(6 * 2 * ROWS * COLUMNS)
    dh, gate, up = rows(3)
    h = CATALOG["glu"].call(gate, up, "silu")
    assert torch.equal(h[-LAST:], CATALOG["glu"].call(*ends(gate, up), "silu"))
    del h
    found = CATALOG["glu_backward"].call(dh, gate, up, "silu", False)
    few = CATALOG["glu_backward"].call(*ends(dh, gate, up), "silu", False)
    assert all(torch.equal(x[-LAST:], y) for x, y in zip(found[:2], few[:2], strict=True))


def test_cross_entropy_of_a_chunk() -> None:
    vocab = 128256
    count = 2**31 // vocab + 32
    need(2 * 2 * count * vocab)
    (logits,) = rows(1, vocab, count)
    labels = torch.randint(vocab, (count,), device=DEVICE)
    (few,) = ends(logits)
    settings = (-100, 0.0, 0.0, 0.0, 1.0, True)
    losses, lse = CATALOG["cross_entropy_chunk_"].call(logits, labels, *settings)
    few_losses, few_lse = CATALOG["cross_entropy_chunk_"].call(
        few, labels[-LAST:].clone(), *settings
    )
    assert torch.equal(losses[-LAST:], few_losses)
    assert torch.equal(lse[-LAST:], few_lse)
    assert torch.equal(logits[-LAST:], few)


def test_adapters_added_to_a_large_output() -> None:
    need(2 * 2 * ROWS * COLUMNS)
    (y,) = rows()
    p = torch.randn(ROWS, 16, device=DEVICE)
    b = torch.randn(COLUMNS, 16, device=DEVICE)
    few_y, few_p = ends(y, p)
    for ys, ps in ((y, p), (few_y, few_p)):
        CATALOG["lora_expand_"].call([ys], ps, [b], [0], [2.0], None, [0.0])
    assert torch.equal(y[-LAST:], few_y)
