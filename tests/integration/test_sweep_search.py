"""``hydra/sweeper=dtune_optuna``: a search with a hopeless trial, interrupted and gone on with."""

from __future__ import annotations

import math
import signal
import time
from pathlib import Path

import pytest

from tests.integration.sweeps import attempts, call, start, states, trial

pytest.importorskip("optuna")
pytestmark = pytest.mark.slow

SPACE = ("optim.lr=tag(log,interval(1e-6,1e-1))", "peft=lora,bitfit", "peft.rank=8")
SEARCH = (
    *("hydra/sweeper=dtune_optuna", "hydra.sweeper.sampler=random", "hydra.sweeper.seed=3"),
    "hydra.sweeper.prune_after_trials=1",
)


def goal(sweep: Path, number: int) -> float:
    """What the fake trials converge to."""
    settings = dict(one.split("=") for one in trial(sweep, number)["overrides"])
    return (math.log10(float(settings["optim.lr"])) + 4) ** 2


def test_a_search_prunes_is_interrupted_and_goes_on_with_the_same_study(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    begin = ("train", "-m", *SEARCH, *SPACE, "hydra.sweeper.n_trials=6", f"hydra.sweep.dir={sweep}")
    process = start(*begin, fake=True, step_seconds=1.5)
    deadline = time.monotonic() + 500
    while not (sweep / "2" / "metrics.jsonl").is_file():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 75, out + err

    rest, _ = call("sweep", "resume", str(sweep), fake=True, step_seconds=1.5)
    out += rest
    # bitfit has no rank: such a choice is left out with its reason.
    left = next(line for line in out.splitlines() if line.startswith("left out: "))
    assert "peft=bitfit" in left
    assert "unknown key peft.rank" in left
    told = states(call("sweep", "status", str(sweep))[0])
    assert set(told) == set(range(6)), out
    assert set(told.values()) == {"done", "pruned"}
    assert sum(attempts(sweep)) <= 7
    done = [number for number, state in told.items() if state == "done"]
    best = min(done, key=lambda number: goal(sweep, number))
    for number in set(told) - set(done):
        assert goal(sweep, number) > goal(sweep, best)
        assert "behind other trials" in trial(sweep, number)["pruned"]["why"]
    assert call("sweep", "best", str(sweep))[0].startswith(f"trial {best}  done")

    longer, _ = call("sweep", "resume", str(sweep), "hydra.sweeper.n_trials=7", fake=True)
    assert "1 trials in" in longer
    assert len(attempts(sweep)) == 7


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("peft.rank=4",), "nothing to search"),
        (("optim.lr=tag(ln,interval(1e-5,1e-2))",), "the only tag is log"),
        (("optim.lr=tag(log,interval(0,1))",), "optim.lr=tag(log,interval(0,1)): 0 has no"),
        (("optim.lrr=interval(0,1)",), "optim.lr"),
        (("optim.lr=interval(0.1,1)", "hydra.sweeper.sampler=tpee"), "tpe, random"),
        (("optim.lr=interval(0.1,1)", "hydra/launcher=basic"), "hydra/launcher=dtune_local"),
    ],
)
def test_a_wrong_search_is_told_before_any_trial_starts(
    tmp_path: Path, settings: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from dtune.cli import main

    sweep = tmp_path / "sweep"
    arguments = ["train", "-m", "hydra/sweeper=dtune_optuna", *settings]
    assert main([*arguments, f"hydra.sweep.dir={sweep}"]) == 2
    assert said in capsys.readouterr().err
    assert not list(sweep.glob("*/config.yaml"))


def test_a_dry_search_prints_its_first_trials_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dtune.cli import main

    sweep = tmp_path / "sweep"
    arguments = ["train", "-m", *SEARCH, "optim.lr=interval(0.1,1)", "launch.dry_run=true"]
    assert main([*arguments, f"hydra.sweep.dir={sweep}", "hydra.sweeper.batch=2"]) == 0
    assert [line[:9] for line in capsys.readouterr().out.splitlines() if line[:1] == "#"] == [
        "# trial 0",
        "# trial 1",
    ]
    assert not sweep.exists()
