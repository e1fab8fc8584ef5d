"""What a search chooses from, what it learns, and what it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

from dtune.errors import ConfigError
from dtune.sweep.metrics import TRAIN_LOSS, Objective, Scores
from dtune.sweep.space import Numbers, Space, Words, range_of, write_choice, write_overrides
from dtune.sweep.standing import Standing
from dtune.sweep.study import STUDY_FILE, Search, SearchSettings

SPACE: Space = {
    "optim.lr": Numbers(1e-6, 1e-2, is_log=True),
    "peft.rank": range_of(4, 33, 4, is_log=False),
    "peft": Words(("lora", "dora")),
}
LOSS = Objective("loss", "minimize")


def settings(**changed: Any) -> SearchSettings:
    usual = {"sampler": "tpe", "seed": 1, "startup_trials": 3, "pruner": "median"}
    return SearchSettings(**{**usual, "prune_after_trials": 1, "prune_after_step": 0, **changed})


def standing(number: int, state: str, value: float | None = None) -> Standing:
    return Standing(number, "", {}, state, "", Scores(loss=value), value, Path("x"))


def curve(goal: float, steps: int) -> list[dict[str, float]]:
    return [{"step": step, "loss": goal + 1 / step} for step in range(1, steps + 1)]


def finish(search: Search, number: int, goal: float) -> None:
    search.tell(standing(number, "done", goal + 0.25), curve(goal, 4))


@pytest.mark.parametrize(
    ("axis", "points"),
    [
        (range_of(1, 10, 2, is_log=False), {1, 3, 5, 7, 9}),
        (range_of(1, 9, 2, is_log=False), {1, 3, 5, 7}),
        (range_of(0, 1, 0.25, is_log=False), {0, 0.25, 0.5, 0.75}),
    ],
)
def test_a_range_ends_before_its_stop(axis: Numbers, points: set[float]) -> None:
    search = Search(None, {"x": axis}, LOSS, settings(sampler="random"))
    drawn = {search.ask(number).overrides[0].partition("=")[2] for number in range(60)}
    assert {float(one) for one in drawn} == points
    assert all(("." in one) == (not axis.is_int) for one in drawn)


def test_choices_are_written_as_settings_within_their_bounds() -> None:
    log = Numbers(1e-5, 1e-2, is_log=True)
    assert write_choice(log, 0.000123456789) == "0.000123457"
    assert write_choice(log, 0.00999999999) == "0.01"
    assert write_choice(Numbers(1, 8, is_int=True), 3.0) == "3"
    assert write_overrides({"+a": Words(("'x y'",))}, {"+a": "'x y'"}) == ["+a='x y'"]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Numbers(0.0, 1.0, is_log=True),
        lambda: Numbers(2, 1),
        lambda: range_of(1, 5, 2, is_log=True),
        lambda: range_of(5, 1, -1, is_log=False),
        lambda: range_of(1, 1, 1, is_log=False),
        lambda: settings(sampler="grid"),
        lambda: settings(pruner="mean"),
        lambda: settings(startup_trials=-1),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError):
        wrong()


def test_the_same_seed_draws_the_same_and_neighbouring_trials_differ() -> None:
    drawn = [
        [tuple(Search(None, SPACE, LOSS, settings(seed=seed)).ask(n).overrides) for n in range(8)]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 8


def test_a_search_finds_what_is_good() -> None:
    search = Search(None, SPACE, LOSS, settings(pruner="none", startup_trials=8))
    rates = []
    for number in range(40):
        values = dict(one.split("=") for one in search.ask(number).overrides)
        rates.append(float(values["optim.lr"]))
        finish(search, number, abs(rates[-1] - 3e-4) * 1e3 + (values["peft"] == "lora"))
    early, late = rates[:8], rates[-15:]
    assert sum(1e-4 < rate < 9e-4 for rate in late) > 7
    assert sum(1e-4 < rate < 9e-4 for rate in early) < 4


def test_a_trial_behind_the_others_is_hopeless_and_the_best_is_not() -> None:
    search = Search(None, SPACE, LOSS, settings())
    for number in range(3):
        search.ask(number)
    assert search.judge(0, curve(1.0, 2)) is None  # There is nothing to be behind of.
    finish(search, 0, 1.0)
    pruned = search.judge(1, curve(2.0, 1))
    assert pruned is not None
    assert (pruned.step, pruned.value) == (1, 3.0)
    assert search.judge(2, curve(0.5, 1)) is None
    # The same evaluations again tell nothing new.
    assert search.judge(1, curve(2.0, 1)) is None


def test_more_is_better_where_the_objective_says_so() -> None:
    search = Search(None, SPACE, Objective("exact_match", "maximize"), settings())
    for number in range(3):
        search.ask(number)
    search.tell(standing(0, "done", 0.5), [{"step": 1, "exact_match": 0.5}])
    assert search.judge(1, [{"step": 1, "exact_match": 0.9}]) is None
    assert search.judge(2, [{"step": 1, "exact_match": 0.1}]) is not None


@pytest.mark.parametrize(
    ("objective", "changed"),
    [
        (Objective(TRAIN_LOSS, "minimize"), {}),
        (LOSS, {"pruner": "none"}),
        (LOSS, {"prune_after_trials": 2}),
        (LOSS, {"prune_after_step": 2}),
    ],
)
def test_nothing_is_ended_before_its_time(objective: Objective, changed: dict[str, Any]) -> None:
    search = Search(None, SPACE, objective, settings(**changed))
    for number in range(2):
        search.ask(number)
    finish(search, 0, 1.0)
    assert search.judge(1, curve(5.0, 1)) is None


def test_a_search_that_was_interrupted_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    def goal(overrides: list[str]) -> float:
        return float(overrides[0].partition("=")[2]) * 100

    whole = Search(None, SPACE, LOSS, settings())
    wanted = []
    for number in range(8):
        wanted.append(whole.ask(number).overrides)
        finish(whole, number, goal(wanted[-1]))

    search = Search(tmp_path, SPACE, LOSS, settings())
    for number in range(5):
        overrides = search.ask(number).overrides
        if number < 4:
            finish(search, number, goal(overrides))
    # Killed in the middle of a trial, and of a line of the journal.
    with (tmp_path / STUDY_FILE).open("a") as file:
        file.write('{"op_code": 6, "wor')
    search = Search(tmp_path, SPACE, LOSS, settings())
    assert search.numbers() == set(range(5))
    assert search.unfinished(pruned=False) == [4]
    again = search.ask_again(4).overrides
    finish(search, 4, goal(again))
    found = [again]
    for number in range(5, 8):
        found.append(search.ask(number).overrides)
        finish(search, number, goal(found[-1]))
    assert found == wanted[4:]


@pytest.mark.parametrize("state", ["failed", "hung", "diverged"])
def test_a_failed_trial_is_told_as_such_and_run_again_with_the_same_settings(state: str) -> None:
    search = Search(None, SPACE, LOSS, settings())
    first = search.ask(0).overrides
    search.tell(standing(0, state), [])
    assert search.unfinished(pruned=False) == [0]
    assert search.ask_again(0).overrides == first
    finish(search, 0, 1.0)
    assert search.unfinished(pruned=False) == []


def test_a_pruned_trial_is_run_again_only_on_request() -> None:
    search = Search(None, SPACE, LOSS, settings())
    for number in range(2):
        search.ask(number)
    finish(search, 0, 1.0)
    search.judge(1, curve(5.0, 1))
    search.tell(standing(1, "pruned", 6.0), curve(5.0, 1))
    assert search.unfinished(pruned=False) == []
    assert search.unfinished(pruned=True) == [1]


def test_what_cannot_be_run_takes_no_number() -> None:
    search = Search(None, SPACE, LOSS, settings())
    first = search.ask(0).overrides
    search.leave_out(0)
    assert search.numbers() == set()
    seconds = [search.ask(0).overrides, search.ask(1).overrides]
    assert len({tuple(one) for one in (first, *seconds)}) == 3


def test_a_value_that_is_no_number_is_a_failure() -> None:
    search = Search(None, SPACE, LOSS, settings())
    search.ask(0)
    search.tell(standing(0, "done", float("nan")), [])
    assert search.unfinished(pruned=False) == [0]
