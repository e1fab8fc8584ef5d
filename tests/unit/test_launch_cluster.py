"""What a real Slurm refuses, and what dtune refuses before: said clearly, and nothing lost."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from dtune_launch import slurm, slurm_queries
from dtune_launch.record import read_record

from dtune.cli import main
from tests.slurm.cluster import Cluster, missing_tools, one_host_cluster

pytestmark = pytest.mark.skipif(bool(missing_tools()), reason="needs slurm-wlm and munge")

# Nobody runs it: the jobs of these tests wait for a time that does not come.
WAITS = "launch.sbatch_options=['--begin=now+1hour']"


ASKED_SECONDS = 0.8
"""For answers of Slurm, before anything is said of a controller that is away.

A refusal takes two seconds with what dtune itself computes, 0.6 of them.
"""


def watch_clients(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """The clients of Slurm that will be called, each with the seconds that it is given."""
    asked: list[tuple[str, float]] = []
    run = slurm_queries.run_client

    def watched(command: Sequence[str], *, seconds: float) -> subprocess.CompletedProcess[str]:
        asked.append((command[0], seconds))
        return run(command, seconds=seconds)

    for module in (slurm_queries, slurm):
        monkeypatch.setattr(module, "run_client", watched)
    return asked


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with one_host_cluster() as it:
        yield it


@pytest.fixture(autouse=True)
def _client(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)


def argv(run_dir: Path, *more: str) -> list[str]:
    return ["train", f"run_dir={run_dir}", "launch=slurm", "launch.shared_disk=true", *more]


@pytest.mark.parametrize(
    ("asked", "words", "key"),
    [
        ("launch.partition=nope", "launch.partition=nope does not exist", "debug"),
        ("launch.gpus_per_node=5", "above the 2 GPUs", "launch.gpus_per_node=2"),
        ("launch.nodes=9", "launch.nodes=9 is above the", "debug"),
        ("launch.time=99-0", "is above the 1:00:00 that partition debug", "launch.time=1:00:00"),
        ("launch.memory=900G", "emory", "launch.memory"),
        ("launch.cpus_per_process=99", "job.sbatch", "launch.cpus_per_process"),
        ("launch.constraint=foo", "nvalid feature", "see launch.constraint"),
        (
            "launch.sbatch_options=['--exclusif=x']",
            "unrecognized option",
            "see launch.sbatch_options",
        ),
    ],
)
def test_a_refused_job_says_why_with_the_likely_key_and_leaves_the_folder_free(
    asked: str, words: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    many = ("parallel=ddp", "train.global_batch_size=90", "train.micro_batch_size=1")
    assert main(argv(run, asked, *many)) == 2
    said = capsys.readouterr().err
    assert words in said
    assert key in said
    assert not (run / "config.yaml").exists()
    if "the script is" in said:
        assert f"the script is {run / 'job.sbatch'}" in said
        assert (run / "job.sbatch").is_file()


def test_the_same_command_is_taken_once_it_is_right_and_cancelled_while_it_waits(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(argv(run, "launch.constraint=foo")) == 2
    assert main(argv(run, WAITS)) == 0
    out = capsys.readouterr().out
    record = read_record(run)
    assert record is not None
    assert f"job {record.job_id} (run): 1 x 1 processes" in out
    assert str(run / "job.sbatch") in out
    assert f"{run}/logs/run-{record.job_id}.out" in out
    assert cluster.state(record.job_id) == "PENDING"

    assert main(["status", str(run)]) == 0
    assert "waiting for nodes" in capsys.readouterr().out
    # A second job would write into the folder of the first.
    assert main(argv(run, WAITS, "resume=auto")) == 2
    assert f"has a job already: {record.job_id} is PENDING" in capsys.readouterr().err
    assert main(["cancel", str(run)]) == 0
    cluster.wait_for(record.job_id, "CANCELLED", timeout=60)
    assert main(["cancel", str(run)]) == 2
    assert main(argv(run, WAITS, "resume=auto")) == 0
    assert main(["cancel", str(run)]) == 0


def test_without_slurm_the_answer_is_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for tool in ("git", "uname"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or "/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    asked = watch_clients(monkeypatch)
    assert main(argv(tmp_path / "run")) == 2
    # Nobody is asked, so there is nothing to wait for.
    assert asked == []
    assert "sbatch is not on the PATH" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_controller_that_is_away_loses_nothing(
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = Path(cluster.env["SLURM_CONF"]).read_text()
    port = next(line for line in text.splitlines() if line.startswith("SlurmctldPort"))
    away = tmp_path / "slurm.conf"
    away.write_text(text.replace(port, "SlurmctldPort=1").replace("MessageTimeout=30", ""))
    monkeypatch.setenv("SLURM_CONF", str(away))
    asked = watch_clients(monkeypatch)
    assert main(argv(tmp_path / "run")) == 2
    # What is bounded is how long dtune waits for an answer. Of sbatch it would take 20 s to hear
    # so, and it is given 60: where the controller takes a question and then says nothing, too.
    assert [tool for tool, _ in asked] == ["scontrol"]
    assert sum(seconds for _, seconds in asked) <= ASKED_SECONDS
    assert "controller does not answer" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_that_nodes_cannot_see_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert os.path.realpath(tmp_path).startswith("/tmp/")
    given = [word for word in argv(tmp_path / "run") if "shared_disk" not in word]
    assert main([*given, "launch.nodes=2", "parallel=ddp"]) == 2
    said = capsys.readouterr().err
    assert "would not see it" in said
    assert "launch.shared_disk=true" in said
    assert not (tmp_path / "run").exists()
