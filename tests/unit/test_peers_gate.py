"""No number of a contestant that has not learned, or that has done other work."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.peers import run
from benchmarks.peers.contestants import find
from benchmarks.peers.measure import first_line, gate, measured, run_entry
from benchmarks.peers.options import SETTINGS, parse
from benchmarks.peers.run import run_process, same_work
from benchmarks.peers.watch import Watch, problem_of
from benchmarks.peers.work import Entry, Setting, Work
from dtune.bench.record import CaseResult, Status
from tests.unit.peers import result


@pytest.fixture
def work(tmp_path: Path) -> Work:
    options = parse(["warmup=2", "steps=3", "length=8", "threads=1"])
    return options.work("tiny", tmp_path, has_gpu=False)


def watched(work: Work, losses: Sequence[float], gradient: torch.Tensor | None) -> Watch:
    """A run of one trained tensor that had these losses and this gradient."""
    watch = Watch(work)
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = gradient
    watch.start_building()
    watch.start_training()
    for loss in losses:
        # Two forward passes, each with its share.
        watch.add_loss(torch.tensor(loss / 2))
        watch.add_loss(torch.tensor(loss / 2))
        if watch.wants_gradients:
            watch.see_gradients([("lora_A", parameter)])
        watch.end_step()
    return watch


FALLING = [6.0, 5.5, 5.0, 4.5, 4.0, 3.5]


def test_a_run_that_learns_passes_and_is_timed_between_warm_up_and_the_last_step(
    work: Work,
) -> None:
    watch = watched(work, FALLING, torch.ones(2))
    assert gate(watch) == ""
    numbers = measured(watch)
    assert len(numbers.step_seconds) == 3
    assert numbers.loss_curve == tuple(FALLING)
    assert numbers.tokens_per_second == numbers.tokens_per_step / numbers.median_seconds
    assert numbers.peak_rss_bytes
    assert numbers.base_rss_bytes
    assert numbers.base_rss_bytes <= numbers.peak_rss_bytes


@pytest.mark.parametrize(
    ("losses", "gradient", "said"),
    [
        ([3.0] * 6, torch.ones(2), "does not fall"),
        ([*FALLING[:5], 6.5], torch.ones(2), "does not fall"),
        ([*FALLING[:5], float("nan")], torch.ones(2), "loss of step 6 is nan"),
        (FALLING[:5], torch.ones(2), "5 optimizer steps were done instead of 6"),
        (FALLING, torch.zeros(2), "lora_A: a gradient of zeros"),
        (FALLING, torch.tensor([1.0, torch.inf]), "lora_A: a gradient that is not finite"),
        (FALLING, None, "lora_A: no gradient"),
    ],
)
def test_a_run_that_does_not_is_refused_with_the_reason(
    work: Work, losses: Sequence[float], gradient: torch.Tensor | None, said: str
) -> None:
    assert said in gate(watched(work, losses, gradient))


def test_a_run_whose_gradients_nobody_looked_at_is_refused(work: Work) -> None:
    watch = watched(work, FALLING, torch.ones(2))
    watch.gradients_seen = 0
    assert "no gradient" in gate(watch)


def test_a_run_that_still_compiled_while_it_was_timed_is_refused(work: Work) -> None:
    watch = watched(work, FALLING, torch.ones(2))
    watch.graphs = [3, 4]
    assert "torch.compile was still at work" in gate(watch)


def test_one_zero_among_others_is_a_gradient() -> None:
    assert problem_of(torch.tensor([0.0, 1e-30])) == ""


@pytest.mark.parametrize(
    ("ends", "minutes", "status", "said"),
    [
        ("import os; os.kill(os.getpid(), 9)", 5.0, Status.oom, "SIGKILL"),
        ("print('so'); raise SystemExit(3)", 5.0, Status.failed, "ended with 3, and said last: so"),
        ("import time; time.sleep(600)", 0.01, Status.failed, "given up after 0.01 minutes"),
    ],
)
def test_a_process_that_leaves_no_result_has_a_row_that_says_why(
    work: Work,
    monkeypatch: pytest.MonkeyPatch,
    ends: str,
    minutes: float,
    status: Status,
    said: str,
) -> None:
    start = subprocess.run

    def instead(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return start([command[0], "-c", ends], **options)

    monkeypatch.setattr(subprocess, "run", instead)
    row = run_process(Entry("trl", SETTINGS["plain"], work), find("trl"), minutes=minutes)
    assert row.status is status
    assert said in row.reason


def test_who_cannot_run_is_refused_without_a_process(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "run_process", lambda entry, *rest, **options: result(entry.peer))
    options = parse(["peers=unsloth", "settings=plain"])
    own, other = run.one_round(work, options, 2, [], ["command"])
    assert own.status is Status.ok
    assert (other.framework, other.case, other.status) == ("unsloth", "tiny plain", Status.refused)
    assert (other.repeat, other.origin.command) == (2, ("command",))


def test_what_a_contestant_raises_is_its_row(work: Work) -> None:
    class Broken:
        TITLE = "broken"
        PACKAGES = ("torch",)
        FIRST = ()

        def settings(self, work: Work) -> tuple[Setting, ...]:
            return (SETTINGS["plain"],)

        def problem(self, work: Work) -> str:
            return ""

        def run(self, *args: object) -> None:
            raise KeyError("a layer\nand more")

    row = run_entry(Entry("broken", SETTINGS["plain"], work), Broken())
    assert row.status is Status.failed
    assert row.measured is None
    assert row.reason.startswith("KeyError: ")
    assert "\n" not in first_line(KeyError("a\nb"))


def test_other_losses_than_dtunes_are_other_work() -> None:
    own = result("dtune", losses=FALLING)
    same = result("trl", losses=[loss * (1 + 5e-5) for loss in FALLING])
    other = result("trl", losses=[FALLING[0] * (1 + 2e-4), *FALLING[1:]])
    apart = result("trl", losses=[*FALLING[:-1], FALLING[-1] * (1 + 2e-3)])
    assert same_work(same, [own]).status is Status.ok
    assert "at step 1" in same_work(other, [own]).reason
    assert "at step 6" in same_work(apart, [own]).reason
    assert same_work(other, [own]).measured is None


def test_only_the_same_work_is_compared() -> None:
    other = result("trl", losses=[2.0, 1.0])
    longer = _with(result("dtune", losses=FALLING), length=1024)
    assert same_work(other, [longer, result("hf-peft", losses=FALLING)]).status is Status.ok


def _with(one: CaseResult, **settings: int) -> CaseResult:
    return dataclasses.replace(one, settings={**one.settings, **settings})
