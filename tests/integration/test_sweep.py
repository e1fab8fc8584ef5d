"""``dtune train -m``: a Hydra multirun whose trials are process trees of their own."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from dtune.train.sinks.jsonl import read_metrics
from tests.integration.sweeps import start

SHORT = (
    "train.micro_batch_size=4",
    "data.max_rows=32",
    "evaluate.generate=false",
    "evaluate.before=false",
)
ROWS = "dtune://instructions/train.jsonl"


def sweep(*settings: str) -> subprocess.Popen[str]:
    return start("train", "-m", *settings)


def status(folder: Path) -> dict[str, object]:
    file = folder / "status.json"
    return json.loads(file.read_text()) if file.is_file() else {"state": "absent"}


def test_each_trial_has_its_processes_folder_and_row_and_a_failure_hides_no_other(
    tmp_path: Path,
) -> None:
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"no": "such columns"}\n')
    process = sweep(
        f"data.path={ROWS},{wrong}",
        "parallel=ddp",
        "launch.nproc=2",
        "train.max_steps=3",
        *SHORT,
        "hydra.launcher.parallel=2",
        f"hydra.sweep.dir={tmp_path}/sweep",
    )
    out, err = process.communicate(timeout=300)
    folders = [tmp_path / "sweep" / str(number) for number in range(2)]
    states = [status(folder)["state"] for folder in folders]
    assert states == ["done", "config_error"], out + err
    assert process.returncode == 1
    assert "Traceback" not in err

    table = out.split("\n\n")[-1]
    rows = [line.split() for line in table.splitlines() if line[:1].isdigit()]
    assert [row[:3] for row in rows] == [
        ["0", f"data.path={ROWS}", "done"],
        ["1", f"data.path={wrong}", "config_error"],
    ]
    # What does not differ between trials is not repeated.
    assert "parallel=ddp" not in table
    result = json.loads((folders[0] / "result.json").read_text())
    assert rows[0][3:5] == ["3", f"{result['after']['loss']:.4f}"]
    trained = [row for row in read_metrics(folders[0] / "metrics.jsonl") if row["kind"] == "train"]
    assert rows[0][5:7] == ["-", f"{trained[-1]['loss']:.4f}"]
    assert rows[1][3:8] == ["-"] * 5
    # Why a trial failed, beside the line that says that it did.
    assert "wrong.jsonl" in out.split("trial 1 ")[1].splitlines()[1]

    frozen = yaml.safe_load((folders[0] / "config.yaml").read_text())
    assert frozen["run_dir"] == str(folders[0])
    assert (folders[0] / "logs" / "rank-1.log").is_file()


def test_an_interrupt_saves_the_running_trial_and_starts_no_other(tmp_path: Path) -> None:
    process = sweep(
        "seed=1,2", "train.max_steps=100000", *SHORT, f"hydra.sweep.dir={tmp_path}/sweep"
    )
    metrics = tmp_path / "sweep" / "0" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert status(tmp_path / "sweep" / "0")["state"] == "preempted", out + err
    assert "not started" in out, out + err
    assert process.returncode == 75


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("peft.rank=4,0",), "trial 1 (peft.rank=0): peft.rank=0"),
        (("peft.rank=4,8", "run_dir=x"), "hydra.sweep.dir"),
        (("peft.rnk=4,8",), "peft.rank"),
        (("peft=lora,lorra",), "peft=lora"),
        (("seed=1,2", "hydra.launcher.parallel=0"), "hydra.launcher.parallel=0"),
    ],
)
def test_a_wrong_trial_is_told_before_any_starts(
    tmp_path: Path, settings: tuple[str, ...], said: str
) -> None:
    process = sweep(*settings, f"hydra.sweep.dir={tmp_path}/sweep")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert said in err
    assert not [path for path in (tmp_path / "sweep").glob("*") if path.is_dir()]


def test_a_dry_sweep_prints_the_command_of_every_trial(tmp_path: Path) -> None:
    process = sweep("seed=1,2", "launch.dry_run=true", f"hydra.sweep.dir={tmp_path}/sweep")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert [line for line in out.splitlines() if line.startswith("#")] == [
        "# trial 0  seed=1",
        "# trial 1  seed=2",
    ]
    assert f"config seed=2 run_dir={tmp_path}/sweep/1 > {tmp_path}/sweep/1/config.yaml" in out
    assert f"-m dtune.worker {tmp_path}/sweep/1" in out
    assert not [path for path in (tmp_path / "sweep").glob("*") if path.is_dir()]
