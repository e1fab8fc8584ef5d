"""Which rank is to blame: decided from what ranks last said, without any process."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dtune.errors import ConfigError
from dtune.runtime.watch.heartbeat import Heartbeat, Place, Section, Signs
from dtune.runtime.watch.judge import OTHERS_SECONDS, Limits, Report, find_slow, judge
from dtune.runtime.watch.schema import WatchConfig

LIMITS = Limits(start=100, first_step=50, step=10, save=30, evaluation=40, step_factor=0)
QUIET = Signs(
    beats=9,
    age=12.0,
    section=Section.step,
    place=Place.backward,
    micro=1,
    step=7,
    timed_steps=6,
    own_seconds=6.0,
    step_seconds=12.0,
    tick_age=0.2,
    longest_gap=1.0,
    calls={"0cpu": 20, "1cpu": 7},
)


def ranks(*signs: Signs, state: str = "S") -> list[Report]:
    return [Report(rank, "host", 100 + rank, it, state) for rank, it in enumerate(signs)]


def test_a_rank_that_works_clears_those_that_wait_for_it() -> None:
    assert judge(ranks(QUIET, replace(QUIET, age=1.0)), LIMITS) is None
    assert judge(ranks(QUIET, QUIET), LIMITS) is not None


def test_a_long_step_before_makes_the_time_out_longer_and_0_turns_it_off() -> None:
    slow = replace(QUIET, longest_gap=3.0)
    assert judge(ranks(slow, slow), replace(LIMITS, step_factor=5)) is None
    assert judge(ranks(QUIET, QUIET), replace(LIMITS, step=0)) is None
    first = replace(QUIET, section=Section.first_step)
    assert judge(ranks(first, first), LIMITS) is None


@pytest.mark.parametrize(
    ("guilty", "why"),
    [
        (replace(QUIET, step=6, place=Place.batch), "others are in step 7 already"),
        (replace(QUIET, calls={"0cpu": 19, "1cpu": 7}), "has not begun a collective call"),
        (replace(QUIET, place=Place.forward), "others are further in the step"),
        (replace(QUIET, tick_age=11.0), "Python has not run in it for 11 s: its lock is held"),
    ],
)
def test_the_rank_that_is_behind_is_to_blame(guilty: Signs, why: str) -> None:
    verdict = judge(ranks(QUIET, QUIET, guilty, QUIET), LIMITS)
    assert verdict is not None
    assert verdict.guilty == (2,)
    assert why in verdict.message
    assert "waiting: rank 0 in step 7, backward pass of micro batch 2; rank 1" in verdict.message


def test_a_process_that_is_not_well_is_to_blame_before_any_that_is_behind() -> None:
    reports = ranks(replace(QUIET, step=6), QUIET)
    reports[1] = replace(reports[1], state="T")
    verdict = judge(reports, LIMITS)
    assert verdict is not None
    assert verdict.guilty == (1,)
    assert "stopped by a signal" in verdict.message


def test_a_rank_that_left_is_to_blame_for_those_that_wait() -> None:
    reports = ranks(QUIET, QUIET)
    reports[0] = replace(reports[0], ended=True)
    verdict = judge(reports, LIMITS)
    assert verdict is not None
    assert verdict.guilty == (0,)
    assert judge([replace(report, ended=True) for report in reports], LIMITS) is None


def test_where_all_wait_alike_no_rank_is_named() -> None:
    verdict = judge(ranks(QUIET, QUIET), LIMITS)
    assert verdict is not None
    assert verdict.guilty == ()
    assert "all ranks wait at the same place" in verdict.message


def test_a_rank_that_waits_for_others_to_come_is_judged_after_them_and_not_to_blame() -> None:
    waits = replace(QUIET, section=Section.start, place=Place.others, age=LIMITS.start + 1)
    assert judge(ranks(waits), LIMITS) is None
    assert judge(ranks(replace(waits, place=Place.nowhere)), LIMITS) is not None
    verdict = judge(ranks(replace(waits, age=LIMITS.start + OTHERS_SECONDS + 1)), LIMITS)
    assert verdict is not None
    assert verdict.guilty == ()
    assert "rank 0 in the start, waiting for the other ranks to come" in verdict.message


def test_ranks_that_made_different_calls_are_told_by_the_step_and_not_by_chance() -> None:
    early = replace(QUIET, section=Section.save, step=6, calls={"0cpu": 17, "1cpu": 8})
    verdict = judge(ranks(QUIET, early), LIMITS)
    assert verdict is not None
    assert verdict.guilty == (1,)
    assert verdict.section == "save"


def test_a_slow_rank_is_told_with_its_factor_and_one_that_is_not_is_not() -> None:
    before = dict.fromkeys(range(3), replace(QUIET, timed_steps=0, own_seconds=0, step_seconds=0))
    reports = ranks(QUIET, replace(QUIET, own_seconds=30.0, step_seconds=36.0), QUIET)
    (line,) = find_slow(reports, before, 2.0)
    assert line.startswith("rank 1 (host, process 101) is slow: 5.000 s of a step of 6.000 s")
    assert "5.0 times as long as the middle rank (1.000 s)" in line
    assert find_slow(reports, before, 6.0) == []
    # Five times nothing is nothing.
    tiny = ranks(*(replace(QUIET, own_seconds=own) for own in (0.06, 0.3, 0.06)))
    assert find_slow(tiny, before, 2.0) == []


def test_a_heartbeat_says_what_was_written(tmp_path) -> None:
    path = tmp_path / "page"
    path.write_bytes(bytes(4096))
    with path.open("r+b") as file:
        rank, watcher = Heartbeat(file.fileno()), Heartbeat(file.fileno())
    rank.enter(Section.step)
    rank.step(12)
    rank.at(Place.forward, 3)
    rank.timed(2_000_000_000, 3_000_000_000)
    rank.tick({"default_group_with_a_long_namecpu": 41})
    signs = watcher.read()
    assert (signs.section, signs.step, signs.place, signs.micro) == (
        Section.step,
        12,
        Place.forward,
        3,
    )
    assert (signs.timed_steps, signs.own_seconds, signs.step_seconds) == (1, 2.0, 3.0)
    assert list(signs.calls.values()) == [41]
    assert signs.where == "step 12, forward pass of micro batch 4"
    assert Report.of_record(Report(0, "h", 1, signs, "S").record()) == Report(0, "h", 1, signs, "S")


def test_settings_that_mean_nothing_are_refused() -> None:
    for key, value in (("step", -1), ("slow_factor", 0.5), ("silent", 1), ("check_every", -1)):
        with pytest.raises(ConfigError, match=f"watch.{key}"):
            WatchConfig(**{key: value})
