"""What a case is measured with: steps, batches, products, peaks, launches; on a CPU."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from dtune.bench import timing
from dtune.bench.batches import BatchShape, make_batches
from dtune.bench.ceiling import measure_ceiling
from dtune.bench.energy import EnergyMeter, total_joules
from dtune.bench.launches import count_launches
from dtune.bench.memory import PeakMeter, Peaks, count_tensors, reset_peak_rss
from dtune.bench.origin import commit_of
from dtune.bench.timing import time_steps, warm_up
from dtune.bench.weights import DrawnOnDevice
from dtune.runtime.world import World
from dtune.types import IGNORE_INDEX, Batch
from tests.distributed.pool import Pool

CPU = torch.device("cpu")
MIB = 1 << 20


class Clock:
    """A host clock that only steps move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)


def test_every_timed_step_is_one_reading_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    lengths = iter([3.0, 1.0, 2.0, 10.0])

    def step() -> None:
        clock.now += next(lengths)

    times = time_steps(step, steps=4, device=CPU)
    assert times.seconds == (3.0, 1.0, 2.0, 10.0)
    assert (times.median, times.p10) == (2.5, pytest.approx(1.3))


def test_warm_up_goes_on_until_as_many_steps_have_compiled_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    graphs = [0]
    monkeypatch.setattr(timing, "compiled_graphs", lambda: graphs[0])

    def step() -> None:
        clock.now += 5.0 if clock.now == 0 else 1.0
        graphs[0] += clock.now in (5.0, 7.0)  # the first step and the third compile

    warm = warm_up(step, steps=3, device=CPU)
    assert warm.steps == 6
    assert (warm.first_seconds, warm.seconds) == (5.0, 10.0)


def test_warm_up_that_never_settles_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = iter(range(100))
    monkeypatch.setattr(timing, "compiled_graphs", lambda: next(graphs))
    warm = warm_up(lambda: None, steps=2, device=CPU)
    assert warm.steps == 20


def test_warm_up_waits_for_another_rank_that_compiled() -> None:
    answers = iter([False, True, False, False])
    warm = warm_up(lambda: None, steps=2, device=CPU, any_rank=lambda mine: mine or next(answers))
    assert warm.steps == 4


def batches_of(**changes: object) -> list[Batch]:
    shape = {"rows": 2, "width": 16, "documents": 3, "padding": 0.25, "trained": 0.5}
    shape |= {"packed": True, **changes}
    generator = torch.Generator().manual_seed(1)
    return make_batches(BatchShape(**shape), number=2, vocabulary=50, generator=generator)


def test_batches_are_packed_as_the_loader_packs_them() -> None:
    first, second = batches_of()
    assert first.num_tokens == 2 * 12
    assert first.num_slots == 32
    assert first.attention_mask is None
    positions = [*range(4), *range(4), *range(4), *range(4)]  # padding is one more document
    assert first.position_ids.tolist() == [positions, positions]
    documents = [0] * 4 + [1] * 4 + [2] * 4 + [-1] * 4
    assert first.document_ids.tolist() == [documents, documents]
    assert first.num_documents == 8
    assert not torch.equal(first.input_ids, second.input_ids)


def test_targets_are_the_end_of_each_document_and_their_own_tokens() -> None:
    (batch, _) = batches_of()
    trained = batch.labels != IGNORE_INDEX
    # Half of the three that follow the first token of each document, rounded.
    assert batch.num_targets == int(trained.sum()) == 2 * 3 * 2
    assert torch.equal(batch.labels[trained], batch.input_ids[trained])
    assert not trained[:, [0, 4, 8]].any()
    assert not trained[:, 12:].any()
    (whole, _) = batches_of(trained=1.0, padding=0.0)
    assert whole.num_targets == 2 * (16 - 3)


def test_rows_that_are_not_packed_have_a_mask() -> None:
    (batch, _) = batches_of(packed=False, documents=1)
    assert batch.attention_mask is not None
    assert batch.attention_mask.sum().item() == batch.num_tokens == 24
    assert batch.position_ids[0].tolist() == list(range(16))


def test_the_same_batches_come_again_and_are_not_zeros() -> None:
    once, again = batches_of(), batches_of()
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(once, again, strict=True))
    assert once[0].input_ids.unique().numel() > 10


def test_the_ceiling_counts_each_shape_as_often_as_the_model_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Every product takes 1 s, whatever its shape.
    monkeypatch.setattr("dtune.bench.ceiling._time_product", lambda *arguments: 1.0)
    ceiling = measure_ceiling(
        {(10, 20): 3, (20, 10): 1}, rows=8, dtype=torch.float32, device=CPU, seconds=1.0
    )
    assert ceiling.flops == 2 * 8 * 200 * 4 / 4


def test_the_ceiling_is_measured() -> None:
    ceiling = measure_ceiling({(64, 64): 2}, rows=32, dtype=torch.float32, device=CPU, seconds=0.01)
    assert math.isfinite(ceiling.flops)
    assert ceiling.flops > 1e6


def peak_of_a_fresh_process(world: World) -> Peaks:
    """Of 128 MiB, after 256 MiB that were freed before the meter began."""
    before = torch.ones(256 * MIB // 4)
    del before
    meter = PeakMeter(world.device)
    during = torch.ones(128 * MIB // 4)
    del during
    return meter.read()


@pytest.mark.skipif(not reset_peak_rss(), reason="the system does not let a peak be reset")
def test_a_peak_counts_from_where_the_meter_began() -> None:
    # Of its own: the system takes pages of a process that has lived long back at any time.
    fresh = Pool(1)
    try:
        (peaks,) = fresh.run("tests.unit.test_bench_pieces:peak_of_a_fresh_process")
    finally:
        fresh.close()
    assert peaks.rss is not None
    assert peaks.base_rss is not None
    assert 120 * MIB < peaks.rss - peaks.base_rss < 200 * MIB
    assert peaks.allocated is None


def test_tensors_are_counted_at_the_peak_of_a_step() -> None:
    kept = torch.ones(32 * MIB // 4)

    def step() -> None:
        first = torch.ones(16 * MIB // 4)
        second = first * 2
        del first
        third = torch.ones(8 * MIB // 4)
        del second, third

    def nothing() -> None:
        """Allocates nothing."""

    def bigger() -> None:
        torch.ones(64 * MIB // 4)

    before = count_tensors(nothing)
    assert before >= 32 * MIB
    # Both halves of the product at once; when the third comes the first has gone.
    assert count_tensors(step) - before == pytest.approx(32 * MIB, abs=4096)
    assert count_tensors(bigger) - before == pytest.approx(64 * MIB, abs=4096)
    del kept
    assert before - count_tensors(nothing) == pytest.approx(32 * MIB, abs=4096)


def test_operations_are_counted_and_views_are_not() -> None:
    x = torch.ones(4, 4)
    counted = count_launches(lambda: x.view(16).t().mul(2).add(1), CPU)
    assert (counted.count, counted.of) == (2, "operations")


def test_backward_is_counted_too() -> None:
    linear = nn.Linear(4, 4, bias=False)
    x = torch.ones(2, 4)
    forward = count_launches(lambda: linear(x).sum(), CPU).count
    both = count_launches(lambda: linear(x).sum().backward(), CPU).count
    assert both >= forward + 2


def test_energy_is_not_made_up() -> None:
    meter = EnergyMeter(CPU)
    meter.start()
    assert meter.joules() is None
    assert "NVIDIA" in meter.why_not
    assert total_joules([1.0, 2.0]) == 3.0
    assert total_joules([1.0, None]) is None


def test_the_commit_is_that_of_a_repository_which_keeps_the_file(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    file = tmp_path / "file.py"
    file.write_text("1")
    assert commit_of(file) == ""
    git("init")
    assert commit_of(file) == ""  # below a repository, which does not keep it
    git("add", "file.py")
    git("commit", "-m", "one")
    git("tag", "v1", "-m", "one")
    assert commit_of(file) == git("rev-parse", "HEAD")
    file.write_text("2")
    assert commit_of(file) == f"{git('rev-parse', 'HEAD')}-dirty"


class OneTensor:
    """A source that draws where the default device is."""

    def __contains__(self, name: str) -> bool:
        return name == "weight"

    def shape(self, name: str) -> tuple[int, ...]:
        return (4,)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        self.device = torch.empty(0).device
        return torch.arange(4.0)[start:stop] + 1 / 3


def test_weights_are_drawn_on_the_device_and_given_in_the_stored_dtype() -> None:
    source = OneTensor()
    drawn = DrawnOnDevice(source, torch.device("meta"), torch.bfloat16)
    with pytest.raises(NotImplementedError, match="meta"):
        drawn.read("weight", 1, 3)  # has no values to give back
    assert source.device.type == "meta"
    drawn = DrawnOnDevice(source, CPU, torch.bfloat16)
    assert drawn.read("weight", 1, 3).tolist() == [1.3359375, 2.328125]
    assert "weight" in drawn
    assert drawn.shape("weight") == (4,)
