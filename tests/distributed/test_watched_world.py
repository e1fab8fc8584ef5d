"""Ranks that wait for each other: for how long, who is named, and whose clock is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from dtune import build
from dtune.cli import main
from dtune.errors import ConfigError
from dtune.runtime.watch.join import WATCHERS_FIRST, collective_timeout
from dtune.runtime.watch.schema import WatchConfig
from dtune.runtime.world import HOST_TIMEOUT, World
from tests.distributed.pool import Pool
from tests.distributed.watch_cases import timeout_of
from tests.integration.train_runs import assembled, settings

CASES = "tests.distributed.watch_cases:"
OFF = dict.fromkeys(("start", "first_step", "step", "save", "evaluation"), 0.0)
HOUR = timedelta(hours=1)


@pytest.fixture(scope="module")
def three_ranks() -> Iterator[Pool]:
    """Three gloo ranks on this machine."""
    pool = Pool(3)
    yield pool
    pool.close()


@pytest.mark.parametrize(
    ("watch", "timeout"),
    [
        ({}, HOST_TIMEOUT),
        (OFF, HOUR),
        ({**OFF, "start": 7200.0}, 4 * HOUR),
        ({"first_step": 36_000.0}, 20 * HOUR),
    ],
)
def test_collective_calls_outlast_every_time_out_of_the_watchers(
    two_ranks: Pool, watch: dict[str, float], timeout: timedelta
) -> None:
    for groups, votes in two_ranks.run(f"{CASES}timeouts_of_ranks", settings=watch):
        assert groups == {timeout}
        assert votes == max(timeout, HOST_TIMEOUT)


def test_ranks_wait_as_long_for_each_other_when_they_start() -> None:
    world = World.start(2 * HOUR)
    try:
        assert dist.group.WORLD is not None
        assert timeout_of(dist.group.WORLD) == 2 * HOUR
    finally:
        world.stop()


def test_groups_that_an_engine_makes_wait_as_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = build.prepare_engine

    def with_a_group(*given: object) -> None:
        prepare(*given)  # type: ignore[arg-type]
        dist.new_group(backend="gloo")

    monkeypatch.setattr("dtune.assemble.prepare_engine", with_a_group)
    with assembled(settings(tmp_path / "run", "train.max_steps=1", "watch.step=300")) as it:
        assert len(_world.pg_names) >= 4  # All, of votes, the engine's, the checkpointer's.
        limits = {timeout_of(group) for group in list(_world.pg_names)}
        assert limits == {collective_timeout(it.run.watch)} == {HOST_TIMEOUT}


def test_ranks_meet_every_so_many_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ("train.max_steps=7", "watch.check_every=2", "watch.step=300", "watch.step_factor=0")
    with assembled(settings(tmp_path / "run", *more)) as it:
        met: list[tuple[int, float]] = []
        monkeypatch.setattr(
            World, "meet", lambda _, seconds: met.append((it.trainer.progress.step, seconds))
        )
        it.finish()
    assert met == [(step, 300.0 + WATCHERS_FIRST) for step in (2, 4, 6)]


def test_clocks_are_compared_before_a_run_builds_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def compare(world: World) -> None:
        sizes.append(world.size)
        raise ConfigError("enough for this test")

    monkeypatch.setattr("dtune.worker.warn_of_clocks", compare)
    monkeypatch.setattr("dtune.worker.assemble", None)
    assert main(["train", *settings(tmp_path / "run")]) == 2
    assert sizes == [1]


@pytest.mark.parametrize("seconds", [30.0, -30.0])
def test_a_clock_that_is_off_is_told_once_with_its_host(two_ranks: Pool, seconds: float) -> None:
    first, other = two_ranks.run(f"{CASES}clocks", seconds=seconds, one_host=False)
    assert len(first) == 1
    assert f"the clock of n2 is {seconds:+.1f} s from that of n1" in first[0]
    assert other == []


def test_clocks_that_agree_or_are_one_are_not_spoken_of(two_ranks: Pool) -> None:
    assert two_ranks.run(f"{CASES}clocks", seconds=0.0, one_host=False) == [[], []]
    assert two_ranks.run(f"{CASES}clocks", seconds=30.0, one_host=True) == [[], []]


def test_a_rank_that_does_not_come_to_the_barrier_is_named(two_ranks: Pool) -> None:
    rank, said, _ = two_ranks.run(f"{CASES}nobody_comes", wording="")[0]
    assert rank == 1
    assert "rank 1 did not come to the barrier of all ranks within 1 s (watch.step)" in said


def test_a_barrier_that_fails_in_other_words_is_a_hang_all_the_same(two_ranks: Pool) -> None:
    rank, said, _ = two_ranks.run(f"{CASES}nobody_comes", wording="time is up")[0]
    assert rank == -1
    assert "a rank did not come" in said


def test_who_came_but_lost_the_first_rank_only_echoes_it(three_ranks: Pool) -> None:
    (first, _, _), _, (third, said, is_echo) = three_ranks.run(f"{CASES}nobody_comes", wording="")
    assert (first, third) == (1, -2)
    assert is_echo, said


def test_ranks_meet_within_the_time_out_of_a_step_and_watchers_decide_first(
    one_rank: Pool,
) -> None:
    def seconds(gap: float, **watch: float) -> float:
        ((found,),) = one_rank.run(f"{CASES}meeting_seconds", gap=gap, settings=watch)
        return float(found)

    assert seconds(0.0) == WatchConfig().step + WATCHERS_FIRST
    assert seconds(120.0, step_factor=10.0) == 1200.0 + WATCHERS_FIRST
    assert seconds(120.0, step=0.0) == 0.0
