"""Ranks that end in every way are started again, all of them, in one attempt: 20 of 20.

The ranks are small programs without torch under the real agent; those that train are killed in
test_kills.py. As those do, the first one serves the port by which its attempt meets: where the
agent shares its own store with all attempts, the port is taken.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from dtune_launch.local import job_command
from dtune_launch.spec import JobSpec
from dtune_launch.torchrun import job_environment

from tests.faults.injection import KINDS

pytestmark = pytest.mark.timeout(600)

FAILURES, RANKS, SEED = 20, 2, 5
# Serves the port of its attempt where it is the first, says who it is and who of those before it is
# still there, waits for the others, then fails as its attempt has it.
RANK = """
import ctypes, json, os, signal, socket, sys, time
from pathlib import Path
signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGUSR1))
plan, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
assert os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "False"
if rank == 0:
    server = socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"])))
def is_there(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] != "Z"
    except OSError:
        return False
before = [json.loads(path.read_text())["pid"] for path in folder.glob(f"{attempt - 1}-*.json")]
fact = {"pid": os.getpid(), "alive": [pid for pid in before if is_there(pid)]}
(folder / f"{attempt}-{rank}.tmp").write_text(json.dumps(fact))
with (folder / "starts").open("a") as file:
    file.write(f"{attempt} {rank}\\n")
os.rename(folder / f"{attempt}-{rank}.tmp", folder / f"{attempt}-{rank}.json")
deadline = time.monotonic() + 120
while len(list(folder.glob(f"{attempt}-*.json"))) < int(os.environ["WORLD_SIZE"]):
    assert time.monotonic() < deadline
    time.sleep(0.01)
if attempt == len(plan):
    sys.exit(0)
way, guilty = plan[attempt]
if rank != guilty:
    time.sleep(120)
elif way == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
elif way == "raise":
    raise RuntimeError("a fault of attempt %d" % attempt)
elif way == "exit":
    sys.exit(1)
elif way == "abort":
    os.abort()
elif way == "segfault":
    ctypes.string_at(0)
"""
SHOWN = {
    "kill": "was killed by SIGKILL",
    "raise": "exited with 1",
    "exit": "exited with 1",
    "abort": "was killed by SIGABRT",
    "segfault": "was killed by SIGSEGV",
}


def seeded_plan() -> list[tuple[str, int]]:
    """How each attempt ends, and by which rank: each way equally often."""
    chance = random.Random(SEED)
    ways = [KINDS[number % len(KINDS)] for number in range(FAILURES)]
    return [(way, chance.randrange(RANKS)) for way in chance.sample(ways, FAILURES)]


@dataclass(frozen=True)
class Restarted:
    """A job whose ranks failed again and again."""

    code: int
    folder: Path
    said: str


@pytest.fixture(scope="module")
def restarted(tmp_path_factory: pytest.TempPathFactory) -> Restarted:
    """One job, with exactly as many restarts as there are failures."""
    folder = tmp_path_factory.mktemp("restarts")
    (folder / "failing_rank.py").write_text(RANK)
    (folder / "facts").mkdir()
    arguments = (json.dumps(seeded_plan()), str(folder / "facts"))
    spec = JobSpec("failing_rank", arguments, folder / "run", nproc=RANKS, max_restarts=FAILURES)
    done = subprocess.run(
        job_command(spec),
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        env={
            **os.environ,
            **job_environment(spec, os.environ, cores=RANKS),
            "PYTHONPATH": str(folder),
        },
    )
    return Restarted(done.returncode, folder / "facts", done.stderr)


def test_every_failure_takes_one_attempt_and_the_last_one_ends_well(restarted: Restarted) -> None:
    starts = sorted(map(tuple, (line.split() for line in lines(restarted))), key=numbers)
    attempts = [(str(n), str(rank)) for n in range(FAILURES + 1) for rank in range(RANKS)]
    assert starts == attempts, restarted.said
    assert restarted.code == 0, restarted.said


def test_no_rank_of_the_attempt_before_is_left_when_the_next_begins(restarted: Restarted) -> None:
    facts = [json.loads(path.read_text()) for path in restarted.folder.glob("*.json")]
    assert len({fact["pid"] for fact in facts}) == RANKS * (FAILURES + 1)
    assert [fact for fact in facts if fact["alive"]] == []


def test_the_rank_that_failed_is_told_of_each_attempt(restarted: Restarted) -> None:
    shown = re.findall(r"attempt ended: rank (\d) of this machine (.*)", restarted.said)
    assert shown == [(str(rank), SHOWN[way]) for way, rank in seeded_plan()]


def lines(restarted: Restarted) -> list[str]:
    """Attempt and rank of every process that was started."""
    return (restarted.folder / "starts").read_text().splitlines()


def numbers(start: tuple[str, ...]) -> list[int]:
    return [int(word) for word in start]
