"""What the job script decides by itself: when a job is requeued, when not, and which one."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from dtune_launch.schema.slurm import SlurmConfig
from dtune_launch.slurm import render_script
from dtune_launch.torchrun import shutdown_seconds

from tests.faults.injection import leftovers
from tests.slurm.cluster import Cluster
from tests.slurm.stand_in import HIGH

ROOT = Path(__file__).parents[2]
STAND_IN = Path(__file__).with_name("stand_in.py")
MAX_REQUEUES = 2
SAVE_SECONDS = 2500.0
KINDS = ("stuck", "one_step", "falls_back", "fails")
NOT_REQUEUED = "not_requeued"
ELEMENTS = 3
LAST = ELEMENTS - 1


def interpreter(folder: Path) -> str:
    """A program that answers in place of Python, whatever module it is told to run."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STAND_IN}" "$@"\n')
    path.chmod(0o755)
    return str(path)


def write_script(
    folder: Path, runs: dict[int, Path], *, is_array: bool = False, setup: Sequence[str] = ()
) -> Path:
    """The script that dtune renders for these runs, with stand-ins for ranks."""
    config = SlurmConfig(
        nodes=1,
        gpus_per_node=1,
        max_requeues=MAX_REQUEUES,
        python=interpreter(folder),
        setup=list(setup),
    )
    logs = folder / "logs"
    logs.mkdir()
    for run_dir in runs.values():
        run_dir.mkdir(exist_ok=True)
        (run_dir / "config.yaml").write_text(f"save: 1\nwatch:\n  save: {SAVE_SECONDS}\nseed: 1\n")
    script = folder / "job.sbatch"
    script.write_text(
        render_script(config, runs, nproc=1, name="test", logs=logs, is_array=is_array)
    )
    return script


def environment(kind: str) -> dict[str, str]:
    """What the stand-ins are to do; they import dtune from this tree."""
    return {"DTUNE_TEST_STAND_IN": kind, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}


@dataclass(frozen=True)
class Array:
    """An array job whose last element was asked to stop, and what came of it."""

    job: str
    folder: Path
    records: list[dict[str, str]]

    def heard(self, element: int) -> list[str]:
        """A line for each attempt of an element: its number, its last step, what it was told."""
        return (self.folder / str(element) / "heard").read_text().splitlines()


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A job of each kind; ids by kind. They wait for most of their time: all at once."""
    ids = {}
    for name in (*KINDS, NOT_REQUEUED):
        folder = tmp_path_factory.mktemp(name)
        script = write_script(folder, {0: folder / "run"})
        refused, kind = name == NOT_REQUEUED, "one_step" if name == NOT_REQUEUED else name
        options = ("--no-requeue",) if refused else ()
        ids[name] = cluster.submit(*options, str(script), cwd=folder, env=environment(kind))
    return ids


@pytest.fixture(scope="module")
def array(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, jobs: dict[str, str]
) -> Array:
    """The last element has the id of the whole array: what it does to itself may hit all."""
    folder = tmp_path_factory.mktemp("array")
    runs = {element: folder / str(element) for element in range(ELEMENTS)}
    script = write_script(folder, runs, is_array=True)
    job = cluster.submit(str(script), cwd=folder, env=environment("until_told"))
    for run_dir in runs.values():
        cluster.wait_until((run_dir / "running").is_file, f"{run_dir.name} runs", job=job)
    (last,) = [r for r in cluster.elements(job) if r["ArrayTaskId"] == str(LAST)]
    assert last["JobId"] == job
    cluster.client("scancel", "--batch", "--signal=USR1", f"{job}_{LAST}")
    cluster.wait_until(lambda: restarts(cluster, job) != [0] * ELEMENTS, "a requeue", job=job)
    (runs[LAST] / "running").unlink()
    cluster.wait_until((runs[LAST] / "running").is_file, "it runs again", job=job)
    (folder / "finish").touch()
    cluster.wait_until(lambda: states(cluster, job) == {"COMPLETED"}, "all are done", job=job)
    return Array(job, folder, cluster.elements(job))


def restarts(cluster: Cluster, job: str) -> list[int]:
    return [int(record["Restarts"]) for record in cluster.elements(job)]


def states(cluster: Cluster, job: str) -> set[str]:
    return {record["JobState"] for record in cluster.elements(job)}


def ended(cluster: Cluster, job: str) -> tuple[int, str, str]:
    """Requeues, exit code and output of a job that has ended."""
    cluster.wait_for(job, "COMPLETED", "FAILED")
    record = cluster.show(job)
    code = record["ExitCode"].partition(":")[0]
    return int(record["Restarts"]), code, Path(record["StdOut"]).read_text()


def test_only_the_element_of_an_array_that_is_preempted_is_requeued(array: Array) -> None:
    by_element = {int(record["ArrayTaskId"]): record for record in array.records}
    assert [int(by_element[element]["Restarts"]) for element in range(ELEMENTS)] == [0, 0, 1]
    first, second = array.heard(LAST)
    assert first.endswith("['SIGUSR1']")
    assert second.startswith("1 ")
    assert int(second.split()[1]) > int(first.split()[1])
    for element in range(LAST):
        (only,) = array.heard(element)
        assert only.endswith("[]")


def test_elements_of_an_array_know_their_own_job(array: Array) -> None:
    for element in range(ELEMENTS):
        record = json.loads((array.folder / str(element) / "job.json").read_text())
        assert record["job_id"] == f"{array.job}_{element}"
        assert (array.folder / "logs" / f"test-{array.job}_{element}.out").is_file()


def test_a_job_that_gets_nowhere_is_not_requeued_for_ever(
    cluster: Cluster, jobs: dict[str, str]
) -> None:
    requeues, code, said = ended(cluster, jobs["stuck"])
    assert (requeues, code) == (1, "75"), said
    assert "no step since the last requeue; not requeued" in said


def test_a_job_that_falls_back_is_not_requeued_for_ever(
    cluster: Cluster, jobs: dict[str, str]
) -> None:
    requeues, code, said = ended(cluster, jobs["falls_back"])
    assert (requeues, code) == (1, "75"), said
    assert f"preempted at step {HIGH - 2}" in said
    assert "no step since the last requeue; not requeued" in said


def test_a_job_that_goes_on_is_requeued_up_to_its_limit(
    cluster: Cluster, jobs: dict[str, str]
) -> None:
    requeues, code, said = ended(cluster, jobs["one_step"])
    assert (requeues, code) == (MAX_REQUEUES, "75"), said
    assert said.count("preempted at step") == MAX_REQUEUES + 1
    assert f"requeued {MAX_REQUEUES} times, which is the limit" in said


def test_a_job_is_not_bound_by_how_far_an_earlier_one_got(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    script = write_script(tmp_path, {0: run})
    mark = run / "logs" / "requeued-at-step"
    mark.parent.mkdir()
    mark.write_text("1 1000\n")
    job = cluster.submit(str(script), cwd=tmp_path, env=environment("one_step"))
    cluster.wait_until(lambda: cluster.restarts(job) > 0, "it is requeued", job=job)
    assert mark.read_text() == f"{job} 1\n"
    cluster.client("scancel", job)


def test_ranks_have_longer_to_end_than_the_config_allows_a_save(
    cluster: Cluster, jobs: dict[str, str]
) -> None:
    folder = Path(cluster.show(jobs["one_step"])["WorkDir"])
    ended(cluster, jobs["one_step"])
    given = int((folder / "run" / "shutdown_timeout").read_text())
    assert given == shutdown_seconds(SAVE_SECONDS) > SAVE_SECONDS


def test_a_second_signal_to_the_job_is_passed_on_as_well(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    script = write_script(tmp_path, {0: run})
    job = cluster.submit(str(script), cwd=tmp_path, env=environment("until_hurried"))
    told = run / "told"

    def hears_again() -> bool:
        # One may come before the first has been dealt with.
        cluster.client("scancel", "--batch", "--signal=USR2", job, check=False)
        return len(told.read_text().splitlines()) == 2

    cluster.wait_until(told.is_file, "it runs", job=job)
    cluster.client("scancel", "--batch", "--signal=USR2", job)
    cluster.wait_until(lambda: told.read_text() != "", "it hears", job=job)
    assert told.read_text().split() == ["SIGUSR1"]
    cluster.wait_until(hears_again, "it hears again", job=job, timeout=60)
    _, code, said = ended(cluster, job)
    assert code == "75", said


def test_a_job_that_fails_is_not_requeued(cluster: Cluster, jobs: dict[str, str]) -> None:
    requeues, code, said = ended(cluster, jobs["fails"])
    assert (requeues, code) == (0, "1"), said
    assert "failed at step 0" in said


def test_a_job_that_slurm_does_not_requeue_says_that_all_is_saved(
    cluster: Cluster, jobs: dict[str, str]
) -> None:
    requeues, code, said = ended(cluster, jobs[NOT_REQUEUED])
    assert (requeues, code) == (0, "75"), said
    assert "all is saved, but Slurm did not requeue the job" in said


def test_ranks_meet_at_another_port_where_theirs_is_taken(cluster: Cluster, tmp_path: Path) -> None:
    script = write_script(tmp_path, {0: tmp_path / "run"})
    job = cluster.submit("--hold", str(script), cwd=tmp_path, env=environment("one_step"))
    port = 20000 + int(job) % 10000
    with socket.create_server(("127.0.0.1", port)):
        cluster.client("scontrol", "release", job)
        command = tmp_path / "run" / "command"
        cluster.wait_until(command.is_file, "the ranks start", job=job)
    cluster.client("scancel", job)
    assert f"--rdzv-endpoint=127.0.0.1:{port + 1} " in command.read_text()


def test_a_second_job_in_the_folder_of_one_that_runs_writes_nothing(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    script = write_script(tmp_path, {0: run})
    env = environment("until_told")
    first = cluster.submit(str(script), cwd=tmp_path, env=env)
    cluster.wait_until((run / "running").is_file, "the first one runs", job=first)
    names = ("status.json", "job.json")

    def files() -> dict[str, tuple[int, str]]:
        return {name: ((run / name).stat().st_mtime_ns, (run / name).read_text()) for name in names}

    before = files()
    second = cluster.submit(str(script), cwd=tmp_path, env=env)
    cluster.wait_until(
        lambda: files() != before or cluster.state(second) == "FAILED", "it is refused", job=second
    )
    assert files() == before
    requeues, code, said = ended(cluster, second)
    assert (requeues, code) == (0, "2"), said
    assert f"has a job already: {first} is RUNNING; end it by dtune cancel {run}, or name" in said
    (tmp_path / "finish").touch()
    cluster.wait_for(first, "COMPLETED")

    # Once it is over the next one goes on; its files come in place of those before as a whole.
    for name in names:
        os.link(run / name, tmp_path / name)
    left = {name: (tmp_path / name).read_text() for name in names}
    third = cluster.submit(str(script), cwd=tmp_path, env=env)
    cluster.wait_for(third, "COMPLETED")
    assert json.loads((run / "job.json").read_text())["job_id"] == third
    assert {name: (tmp_path / name).read_text() for name in names} == left
    assert leftovers(run) == []


@pytest.mark.parametrize(("name", "requeues"), [("USR1", 1), ("USR2", 0), ("TERM", 0)])
def test_a_signal_that_comes_while_the_job_is_set_up_is_passed_on(
    cluster: Cluster, tmp_path: Path, name: str, requeues: int
) -> None:
    run = tmp_path / "run"
    ready = tmp_path / "ready"
    # The first attempt is not set up before the signal has come.
    until = "until [[ $restart != 0 || -n ${pending[*]} ]]; do sleep 0.1; done"
    script = write_script(tmp_path, {0: run}, setup=(f"touch {ready}", until))
    job = cluster.submit(str(script), cwd=tmp_path, env=environment("until_told"))
    cluster.wait_until(ready.is_file, "it is set up", job=job)
    cluster.client("scancel", "--batch", f"--signal={name}", job)
    heard = run / "heard"
    cluster.wait_until(
        lambda: heard.is_file() or cluster.state(job) == "FAILED", "ranks are told", job=job
    )
    assert heard.is_file()
    (tmp_path / "finish").touch()
    restarted, code, said = ended(cluster, job)
    assert (restarted, code) == (requeues, "0" if requeues else "75"), said
    assert heard.read_text().splitlines()[0].endswith("['SIGUSR1']")
