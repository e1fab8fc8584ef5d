"""Sweeps with trials that fail, die, stop and hang; what ``dtune sweep`` makes of them."""

from __future__ import annotations

import contextlib
import io
import re
import signal
import time
from pathlib import Path

import pytest
import yaml

from dtune.cli import main
from dtune.config.compose import compose_overrides
from tests.integration.sweeps import DIES, FAILS, HANGS, STOPS, attempts, call, start, states, trial

pytestmark = pytest.mark.slow

SEEDS = f"seed=1,{FAILS},{DIES},{STOPS},{HANGS},2"
# Of trials that take a second, so that a busy machine ends only the one that hangs.
MINUTES = 0.4
AFTER = {0: "done", 1: "failed", 2: "failed", 3: "preempted", 4: "failed", 5: "done"}


def answer(*arguments: str, code: int = 0) -> tuple[str, str]:
    """A command that only reads, in this process; what it wrote on both streams."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(arguments) == code, err.getvalue()
    return out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A sweep whose trials go wrong in every way, and what it printed."""
    sweep = tmp_path_factory.mktemp("ended") / "sweep"
    out, _ = call(
        *("train", "-m", SEEDS, "peft=dora", "optim.lr=0.0003", f"hydra.sweep.dir={sweep}"),
        *("hydra.launcher.parallel=3", f"hydra.launcher.max_minutes={MINUTES}"),
        "hydra.launcher.grace_seconds=1",
        fake=True,
        code=1,
    )
    return sweep, out


def test_trials_that_fail_die_stop_and_hang_hide_no_other(ended: tuple[Path, str]) -> None:
    sweep, out = ended
    assert states(out) == AFTER
    assert "a failure of the test" in out
    assert "exit code 137" in out
    assert out.count(f"hydra.launcher.max_minutes={MINUTES}") == 1
    told, _ = answer("sweep", "status", str(sweep), code=1)
    assert states(told) == AFTER
    assert "6 trials: 2 done, 3 failed, 1 preempted" in told
    # What does not differ between trials is not repeated.
    assert "peft=dora" not in told
    record = yaml.safe_load((sweep / "sweep.yaml").read_text())
    assert record["swept"] == {"seed": SEEDS.partition("=")[2]}
    assert record["objective"] == {"metric": "loss", "direction": "minimize"}
    assert trial(sweep, 3)["overrides"][:2] == [f"seed={STOPS}", "peft=dora"]


def test_resume_runs_exactly_the_unfinished_with_other_settings_of_the_launcher(
    ended: tuple[Path, str], tmp_path: Path
) -> None:
    sweep = ended[0]
    out, _ = call("sweep", "resume", str(sweep), "hydra.launcher.parallel=2", fake=True)
    assert "4 of 6 trials" in out
    assert states(out) == dict.fromkeys(range(6), "done")
    assert attempts(sweep) == [1, 2, 2, 2, 2, 1]
    again, _ = call("sweep", "resume", str(sweep), fake=True)
    assert "0 of 6 trials" in again
    assert attempts(sweep) == [1, 2, 2, 2, 2, 1]
    _, err = answer("sweep", "resume", str(sweep), "optim.lr=1", code=2)
    assert "not optim.lr" in err


def test_best_writes_an_experiment_that_composes_to_the_trial(ended: tuple[Path, str]) -> None:
    sweep = ended[0]
    out, _ = answer("sweep", "best", str(sweep))
    assert "dtune train experiment=best" in out
    winner = yaml.safe_load((sweep / "0" / "config.yaml").read_text())
    text = compose_overrides("train", ["experiment=best", f"hydra.searchpath=[file://{sweep}]"])
    made = yaml.safe_load(text)
    apart = {key for key in winner if winner[key] != made[key]}
    assert apart == {"run_dir", "resume"}
    written = (sweep / "experiment" / "best.yaml").read_text()
    assert written.startswith("# @package _global_\n")
    assert yaml.safe_load(written) == {
        "defaults": [{"override /peft": "dora"}],
        "optim": {"lr": 0.0003},
    }


def test_the_objective_is_drawn_against_each_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    # Words of a plot are shapes otherwise.
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    sweep = tmp_path / "sweep"
    keys = ("seed=1,2", "optim.lr=0.001,0.01", f"hydra.sweep.dir={sweep}")
    call("train", "-m", *keys, "hydra.launcher.parallel=4", fake=True)
    out, _ = answer("sweep", "plot", str(sweep))
    files = [Path(line.removeprefix("written: ")) for line in out.splitlines()]
    assert [file.name for file in files] == ["objective.png", "objective.svg"]
    assert files[0].read_bytes().startswith(b"\x89PNG")
    svg = files[1].read_text()
    assert svg.startswith("<?xml")
    words = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert [words.count(key) for key in ("seed", "optim.lr")] == [1, 1]
    # A panel for each, and in it a mark for each trial.
    panels = svg.split('<g id="axes_')[1:]
    assert len(panels) == 2
    marks = [re.split('<g id="(?:PathCollection|matplotlib.axis)_', panel)[1] for panel in panels]
    assert [mark.count("<use ") for mark in marks] == [4, 4]


def test_a_killed_launcher_leaves_a_sweep_that_can_be_gone_on_with(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    seeds = ("train", "-m", "seed=1,2,3", f"hydra.sweep.dir={sweep}")
    process = start(*seeds, fake=True, step_seconds=1)
    wait_for(lambda: (sweep / "0" / "metrics.jsonl").is_file())
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    # What it had started lives on and holds its folder; the others have not begun.
    told, _ = answer("sweep", "status", str(sweep), code=75)
    assert states(told)[0] in ("running", "done")
    assert [states(told)[n] for n in (1, 2)] == ["not started"] * 2
    out, _ = call("sweep", "resume", str(sweep), fake=True)
    assert states(out) == {0: "done", 1: "done", 2: "done"}
    assert attempts(sweep) == [1, 1, 1]


def test_a_sweep_in_the_background_is_followed_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, goes_on = tmp_path / "sweep", tmp_path / "goes_on"
    # No trial ends before this command has.
    monkeypatch.setenv("DTUNE_TEST_UNTIL", str(goes_on))
    out, _ = call(
        *("train", "-m", "seed=1,2", f"hydra.sweep.dir={sweep}", "hydra.launcher.wait=false"),
        fake=True,
    )
    assert "goes on with them" in out
    told, _ = answer("sweep", "status", str(sweep), code=75)
    assert "done" not in states(told).values()
    goes_on.touch()
    told, _ = answer("sweep", "status", str(sweep), "-f", "--seconds=0.2")
    assert states(told) == {0: "done", 1: "done"}


def test_a_second_sweep_in_its_folder_is_refused(ended: tuple[Path, str]) -> None:
    _, err = call("train", "-m", "seed=1,2", f"hydra.sweep.dir={ended[0]}", code=2)
    assert "dtune sweep resume" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("sweep", "statu", "x"), "dtune sweep status"),
        (("sweep", "status", "x"), "no sweep.yaml"),
        (("sweep", "best"), "DIR"),
        (("sweep", "plot", "x", "into=y"), "out=y"),
    ],
)
def test_wrong_arguments_are_answered_with_the_right_ones(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_missing_package_is_named(
    ended: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dtune.runtime import capabilities

    monkeypatch.setattr(capabilities, "is_installed", lambda module: False)
    assert main(["sweep", "plot", str(ended[0])]) == 2
    assert "pip install 'dtune[plot]'" in capsys.readouterr().err


def wait_for(holds, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
