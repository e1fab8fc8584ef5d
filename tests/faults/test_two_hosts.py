"""A run over two hosts, one of which is cut off: the other ends and says so, nothing is lost."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dtune.runtime.status import State, Status, read_status
from tests.distributed.pool import Pool
from tests.faults.hosts import Host, require_hosts, two_hosts
from tests.faults.injection import (
    exported,
    newest_step,
    numbers,
    state_digest,
)
from tests.integration.train_runs import settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

STEPS, EVERY, PORT = 60, 2, 29871
SILENT = 10
# Seconds; the machine may be busy with other tests.
LIMIT = 400


def overrides(run_dir: Path, *more: str) -> list[str]:
    return settings(
        run_dir,
        f"train.max_steps={STEPS}",
        f"checkpoint.every={EVERY}",
        "peft.dropout=0.1",
        "parallel=ddp",
        *more,
    )


def start(hosts: tuple[Host, Host], run_dir: Path, logs: Path) -> list[subprocess.Popen[bytes]]:
    """The same command on both hosts, but for the number of the node."""
    return [
        host.start(
            [
                "dtune",
                "train",
                *overrides(
                    run_dir,
                    "launch=torchrun",
                    "launch.nnodes=2",
                    "launch.nproc=1",
                    f"launch.node_rank={number}",
                    f"launch.head={hosts[0].address}:{PORT}",
                    "launch.shared_disk=true",
                    f"watch.silent={SILENT}",
                    # By these the host that is cut off ends by itself.
                    "watch.step=30",
                    "watch.save=30",
                    "resume=auto",
                ),
            ],
            logs / f"host-{number}.log",
        )
        for number, host in enumerate(hosts)
    ]


@dataclass(frozen=True)
class CutOff:
    """What was seen."""

    run_dir: Path
    whole: Path
    saved: int
    """Newest checkpoint when the cable was cut."""
    seconds: float
    """From then to the end of the head."""
    codes: tuple[int, int]
    """Of the launchers of both hosts after the cut."""
    status: Status
    said: str
    resumed_codes: list[int]


@pytest.fixture(scope="session", autouse=True)
def _hosts() -> None:
    require_hosts()


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory: pytest.TempPathFactory, two_ranks: Pool) -> Iterator[CutOff]:
    folder = tmp_path_factory.mktemp("hosts")
    run_dir, whole = folder / "run", folder / "whole"
    with two_hosts() as hosts:
        running = start(hosts, run_dir, folder)
        log = folder / "host-0.log"
        deadline = time.monotonic() + LIMIT
        while newest_step(run_dir) < 2 * EVERY:
            assert all(process.poll() is None for process in running), log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.005)
        hosts[1].link("down")
        started, saved = time.monotonic(), newest_step(run_dir)
        code = running[0].wait(LIMIT)
        seconds = time.monotonic() - started
        other_code = running[1].wait(LIMIT)
        for host in hosts:
            while left := host.processes():
                assert time.monotonic() < started + LIMIT, left
                time.sleep(0.1)
        status, said = read_status(run_dir), log.read_text()
        hosts[1].link("up")
        again = start(hosts, run_dir, folder)
        pooled = overrides(whole)
        assert set(two_ranks.run("tests.integration.runs:train", overrides=pooled)) == {"done"}
        resumed = [process.wait(LIMIT) for process in again]
        assert resumed[0] == 0, log.read_text()
        yield CutOff(run_dir, whole, saved, seconds, (code, other_code), status, said, resumed)


def test_the_head_ends_soon_and_names_the_host_that_was_cut_off(cut_off: CutOff) -> None:
    assert cut_off.saved < STEPS
    assert cut_off.codes == (1, 1)
    assert cut_off.status.state not in (State.running, State.done)
    assert "rank 1" in cut_off.status.message
    assert "nothing was heard from the machine of rank 1" in cut_off.said
    assert cut_off.seconds < 120, "the other host was silent for that long"


def test_nothing_is_lost(cut_off: CutOff) -> None:
    assert cut_off.resumed_codes == [0, 0]
    assert read_status(cut_off.run_dir).state is State.done
    assert state_digest(cut_off.run_dir) == state_digest(cut_off.whole)
    assert exported(cut_off.run_dir) == exported(cut_off.whole)
    assert numbers(cut_off.run_dir) == numbers(cut_off.whole)
