"""Where trials run, and with which share of a machine; what their folders say in the end."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dtune_launch import gpus
from dtune_launch.schema.local import LocalConfig
from dtune_launch.schema.slurm import SlurmConfig
from dtune_launch.schema.slurm_srun import SlurmSrunConfig
from dtune_launch.schema.torchrun import TorchrunConfig
from dtune_launch.spec import JobSpec, LaunchConfig
from hydra_plugins.dtune_launcher.local import DtuneLocalLauncher

from dtune.errors import ConfigError
from dtune.runtime.status import State, Status, read_status, status_of, write_status
from dtune.sweep import local
from dtune.sweep.folder import Attempt, TrialRecord, write_trial
from dtune.sweep.local import Limits, Task, _Running, _tell_ended, gpus_of_slot
from dtune.sweep.metrics import Scores
from dtune.sweep.standing import Standing, _state_of


@pytest.fixture
def five_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nfor i in 0 1 2 3 4; do echo GPU $i: H200; done\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus.count_present.cache_clear()
    yield
    gpus.count_present.cache_clear()


@pytest.mark.parametrize(
    ("visible", "parallel", "slots"),
    [
        (None, 2, [["0", "1"], ["2", "3"]]),
        (None, 1, [["0", "1", "2", "3", "4"]]),
        ("4,2,1", 3, [["4"], ["2"], ["1"]]),
        ("4,2", 3, [[], [], []]),
    ],
)
def test_trials_at_once_have_different_gpus(
    five_gpus: None,
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    parallel: int,
    slots: list[list[str]],
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpus_of_slot(slot, parallel) for slot in range(parallel)] == slots


@pytest.mark.parametrize(("parallel", "told"), [(2, "2,3"), (1, None)])
def test_a_trial_is_told_the_gpus_of_its_slot(
    five_gpus: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    parallel: int,
    told: str | None,
) -> None:
    jobs: list[JobSpec] = []
    monkeypatch.setattr(local, "start_job", lambda job, output: jobs.append(job))
    folder = tmp_path / "1"
    folder.mkdir()
    write_trial(folder, TrialRecord(1, ("seed=1",), {}))
    local._start(Task(1, folder, 2, 0), parallel - 1, parallel)
    (job,) = jobs
    # The only trial has what this process has.
    assert job.env.get("CUDA_VISIBLE_DEVICES") == told


def test_more_processes_than_the_gpus_of_a_slot_are_refused(five_gpus: None) -> None:
    launcher = DtuneLocalLauncher(parallel=2)
    assert launcher.processes(LocalConfig(), "fsdp") == 2
    with pytest.raises(ConfigError, match=r"launch\.nproc=3 is above the 2 GPUs of a trial"):
        launcher.processes(LocalConfig(nproc="3"), "fsdp")


@pytest.mark.parametrize(
    "launch",
    [SlurmConfig(), SlurmSrunConfig(nodes=1), TorchrunConfig(nnodes=2, head="h:29400")],
    ids=lambda launch: launch.name,
)
def test_a_launcher_of_this_machine_refuses_trials_for_others(launch: LaunchConfig) -> None:
    with pytest.raises(ConfigError, match=f"launch={launch.name} is for others; set hydra/launch"):
        DtuneLocalLauncher().processes(launch, "single")


@pytest.mark.parametrize("damaged", ["", '{"state": "run', '{"state": "x"}', "[]", "{}"])
def test_a_trial_at_work_whose_status_cannot_be_read_has_not_failed(
    tmp_path: Path, damaged: str
) -> None:
    (tmp_path / "status.json").write_text(damaged)

    trial = TrialRecord(0, (), {}, attempts=(Attempt("then", job="7_1"),))
    assert _state_of(tmp_path, trial, {"7_1": "running"}, False) == ("running", "job 7_1")
    said = f"job 7_1 is over, and {tmp_path / 'status.json'} cannot be read: "
    failed, why = _state_of(tmp_path, trial, {}, False)
    assert failed == "failed"
    assert why.startswith(said)


def test_a_status_that_can_be_read_is_taken_as_it_is(tmp_path: Path) -> None:
    assert status_of(tmp_path) == (Status(State.running), "")
    write_status(tmp_path, Status(State.preempted, step=3))
    status, damage = status_of(tmp_path)
    assert (status.state, status.step, damage) == (State.preempted, 3, "")


def test_a_trial_that_leaves_half_a_status_has_failed_by_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_trial(tmp_path, TrialRecord(0, (), {}, attempts=(Attempt("then"),)))
    (tmp_path / "status.json").write_text('{"state": "run')
    with subprocess.Popen(["false"]) as process:
        process.wait()
    view: Any = SimpleNamespace(record=SimpleNamespace(objective=None))
    view.look_at = lambda folder, trial: Standing(
        *(0, "", {}), *_state_of(folder, trial, {}, False), Scores(), None, folder
    )
    _tell_ended(view, _Running(Task(0, tmp_path, 1, 0), process), Limits())
    assert read_status(tmp_path).state is State.failed
    assert "exit code 1; " in capsys.readouterr().out
