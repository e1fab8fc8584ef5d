"""What ``dtune bench`` and ``dtune plan`` say of steps on a GPU."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import pytest
import torch

from dtune.bench.launches import count_launches
from dtune.bench.timing import time_steps
from dtune.runtime.world import World
from tests.gpu.subjects import (
    assert_full_training_in_bf16,
    assert_kept_weights_change_no_bit,
    kept_weights,
    save_qwen3,
    subject,
)
from tests.integration.bench_runs import (
    QUICK,
    assert_as_planned,
    assert_measured,
    bench,
    results_of,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = torch.device("cuda")


def test_cases_are_measured_with_peaks_as_planned_and_kernels_take_less(tmp_path: Path) -> None:
    out = tmp_path / "out"
    # Rows enough to outweigh the workspaces of libraries, which differ by card.
    done = bench(
        *(*QUICK, "model=tiny", "peft=lora", "precision=bf16", "kernels=torch,triton", "-m"),
        *("train.micro_batch_size=64", "train.global_batch_size=64", "data.max_length=512"),
        *("optim.lr=1e-3", "bench.ceiling_seconds=0.05", "bench.plots=false", f"bench.out={out}"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = results_of(out)
    for result in results.values():
        numbers = assert_measured(result, on_gpu=True)
        assert_as_planned(numbers)
        assert result.origin.hardware["device"] == torch.cuda.get_device_name()
        assert numbers.ceiling_flops
        assert numbers.tokens_per_step == 64 * 512
    plain, own = (results[f"peft=lora kernels={name}"].measured for name in ("torch", "triton"))
    assert plain is not None
    assert own is not None
    assert (own.launches_per_step or 0) < (plain.launches_per_step or 0)
    assert (own.peak_bytes or 0) < (plain.peak_bytes or 0)


def test_steps_are_timed_by_the_device_and_the_host_does_not_wait() -> None:
    """A step that keeps the device busy long after the host has gone on."""
    spent: list[float] = []

    def step() -> None:
        began = time.perf_counter()
        torch.cuda._sleep(100_000_000)  # cycles: some 50 ms
        spent.append(time.perf_counter() - began)

    step()
    torch.cuda.synchronize()
    spent.clear()
    times = time_steps(step, steps=4, device=DEVICE)
    assert len(times.seconds) == len(spent) == 4
    assert min(times.seconds) > 4 * max(spent)


def test_launches_are_kernels_and_not_copies() -> None:
    x = torch.zeros(1024, device=DEVICE)
    host = torch.zeros(1024)

    def step() -> None:
        x.copy_(host)
        for _ in range(3):
            x.add_(1.0)

    step()
    assert count_launches(step, DEVICE).count == 3


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("documents", [1, 2])
def test_norms_of_queries_and_keys_leave_attention_in_bf16(
    world: World, tmp_path: Path, documents: int, kernels: str
) -> None:
    """One document a row takes the card's own causal attention, and two the bounds of documents."""
    settings = ("model.attention=varlen", f"kernels={kernels}")
    assert_full_training_in_bf16(
        world, save_qwen3(tmp_path), documents=documents, settings=settings
    )


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_weights_that_stay_dequantised_change_no_bit_and_lie_on_the_device(
    world: World, kernels: str
) -> None:
    nbytes = assert_kept_weights_change_no_bit(world, f"kernels={kernels}")
    # Each allocation is rounded up to 512 bytes.
    settings = ("model=tiny", "peft=qlora", "precision=bf16", f"kernels={kernels}")
    held = []
    for room in ("0", "1"):
        gc.collect()
        before = torch.cuda.memory_allocated()
        one = subject(world, *settings, f"quant.cache_gib={room}")
        gc.collect()
        held.append(torch.cuda.memory_allocated() - before)
        linears = len(kept_weights(one))
        del one
    assert nbytes <= held[1] - held[0] <= nbytes + 512 * linears
