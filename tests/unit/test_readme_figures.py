"""The README's figures are those of the committed results, and keep to what they are to be."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def result(name: str) -> Any:
    """A committed result."""
    return json.loads((ROOT / name).read_text(encoding="utf-8"))


def test_the_soak_lost_nothing() -> None:
    soak = result("benchmarks/results/soak.json")
    assert soak["ok"]
    assert soak["minutes"] >= 20
    assert soak["kills_of_those_asked_for"] == [25, 25]
    assert soak["runs_equal_to_the_one_left_alone"] == soak["runs"]
    lost = sum(leg["checkpoints_lost"] for leg in soak["legs"])
    assert lost == soak["checkpoints_lost"] == 0
    faults = sum(len(leg["faults"]) for leg in soak["legs"])
    said = f"{faults} faults in a soak of {soak['minutes']:.0f} minutes: {lost} checkpoints lost"
    assert said in README


def test_every_move_holds() -> None:
    moves = result("tests/distributed/move.json")["moves"]
    holding = [move for move in moves if not move["problems"]]
    worst = f"{max(move['loss'] for move in moves):.0e}".replace("e-0", "e-")
    said = (
        f"{len(holding)} of {len(moves)} moves between engines and numbers of processes keep all "
        f"state bit for bit, and losses to {worst}"
    )
    assert said in README


def test_a_preempted_run_is_back_soon() -> None:
    seconds = result("tests/slurm/preemption.json")["seconds"]
    assert max(seconds) <= 30
    assert f"{statistics.median(seconds):.0f} s from preemption to resumed training" in README


def test_a_rank_that_hangs_or_is_out_of_memory_holds_nobody_up() -> None:
    seconds = result("tests/faults/figures.json")
    assert max(seconds["hung_named_beyond_time_out"]) <= 10
    named = statistics.median(seconds["hung_named_beyond_time_out"])
    assert f"is named, with its stack, {named:.1f} s after its time-out" in README
    assert max(seconds["out_of_memory_all_gone"]) <= 10
    gone = statistics.median(seconds["out_of_memory_all_gone"])
    assert f"out of memory ends all ranks in {gone:.1f} s" in README
    assert max(seconds["refused"]) <= 2
