"""Secrets of the environment reach the ranks, and nothing that is written or shown."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from dtune.runtime.status import State, read_status
from tests.faults.injection import Fault, family, plan_faults
from tests.integration.train_runs import settings

SECRETS = {
    "HF_TOKEN": "hf_" + "Zq7" * 11,
    "WANDB_API_KEY": "fedcba9876543210" * 2 + "fedcba98",
    "MY_DB_PASSWORD": "correct-horse-battery",
}


@dataclass(frozen=True)
class Ended:
    """A run of two ranks with trackers, and the command lines seen while it ran."""

    folder: Path
    said: str
    arguments: bytes
    told: int
    """Processes of the run whose environment had the secrets."""


def find_secrets(folder: Path) -> list[tuple[str, str]]:
    """Files below a folder that hold one, with its variable; names of files count as well."""
    found = []
    for path in sorted(folder.rglob("*")):
        data = bytes(path) + (path.read_bytes() if path.is_file() else b"")
        found += [
            (str(path.relative_to(folder)), name)
            for name, secret in SECRETS.items()
            if secret.encode() in data
        ]
    return found


def seen_of(pid: int) -> tuple[bytes, bytes]:
    """Command line and environment of a process; empty if it has just ended."""
    try:
        process = Path(f"/proc/{pid}")
        return (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
    except OSError:
        return b"", b""


CODES = {"well": 0, "badly": 1}
"""Of a run that nothing happens to; and of one that raises and, started again, has a NaN."""


@pytest.fixture(scope="module", params=CODES)
def ended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    folder = tmp_path_factory.mktemp("secrets")
    trackers = ("log.tensorboard=true", "log.wandb=true")
    argv = settings(folder / "run", "parallel=ddp", "launch.nproc=2", *trackers)
    environment = {**os.environ, **SECRETS, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    if request.param == "badly":
        argv += ["launch.max_restarts=1", "checkpoint.every=1"]
        environment |= plan_faults(folder / "plan", [Fault("raise", 1, 2), Fault("nan", 1, 2)])
    process = subprocess.Popen(
        [sys.executable, "-m", "dtune", "train", *argv],
        env=environment,
        stdout=(folder / "terminal").open("wb"),
        stderr=subprocess.STDOUT,
        cwd=folder,
    )
    arguments, told = set(), set()
    deadline = time.monotonic() + 500
    try:
        while process.poll() is None:
            assert time.monotonic() < deadline
            for pid in family(process.pid):
                line, environment = seen_of(pid)
                arguments.add(line)
                if SECRETS["HF_TOKEN"].encode() in environment:
                    told.add(pid)
            time.sleep(0.05)
    finally:
        process.kill()
    said = (folder / "terminal").read_text()
    assert process.returncode == CODES[request.param], said
    return Ended(folder, said, b"\n".join(arguments), len(told))


@pytest.mark.slow
def test_no_secret_is_in_what_a_run_writes_or_in_any_command_line(ended: Ended) -> None:
    status = read_status(ended.folder / "run")
    if status.state is State.diverged:
        assert "a fault injected by a test" in ended.said
        assert "Traceback" in ended.said
    else:
        assert status.state is State.done
    # dtune, the agent and two ranks at least had them, so there was something to leak.
    assert ended.told >= 4
    assert b"dtune.worker" in ended.arguments
    assert find_secrets(ended.folder) == []
    for secret in SECRETS.values():
        assert secret.encode() not in ended.arguments


@pytest.mark.slow
def test_the_search_finds_a_secret_that_is_there(ended: Ended) -> None:
    planted = ended.folder / "run" / "logs" / "planted.log"
    planted.write_bytes(b"\0\1" + SECRETS["WANDB_API_KEY"].encode() + b"\2")
    assert find_secrets(ended.folder) == [("run/logs/planted.log", "WANDB_API_KEY")]
    planted.unlink()


@pytest.mark.parametrize(
    "more",
    [
        (f"log.wandb_project={SECRETS['WANDB_API_KEY']}",),
        ("log.wandb_project=${oc.env:MY_DB_PASSWORD}",),
        ("launch=slurm", f"launch.setup=[export HF_TOKEN={SECRETS['HF_TOKEN']}]"),
        ("launch=slurm", f"launch.srun_options=[--container-env=K={SECRETS['MY_DB_PASSWORD']}]"),
    ],
)
def test_a_setting_with_a_secret_is_refused_and_nothing_is_written(
    more: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from dtune.cli import main

    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    assert main(["train", f"run_dir={tmp_path / 'run'}", *more]) == 2
    said = capsys.readouterr()
    assert "put it into the environment" in said.err
    for secret in SECRETS.values():
        assert secret not in said.err + said.out
    assert not (tmp_path / "run").exists()
