"""Many processes that want one run folder, and processes killed while they take it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

RACE = """
import os, sys, json, random, signal
from dataclasses import asdict
from pathlib import Path
from dtune.errors import ConfigError
from dtune.runtime import lock, processes
from dtune.runtime.lock import LOCK, holding

base, rounds, contenders = Path(sys.argv[1]), 25, 12
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
dead = os.fork()
if dead == 0:
    os._exit(0)
gone = asdict(processes.this_process()) | {"pid": dead, "born": 1}
os.waitpid(dead, 0)

def contend(folder, gate, results, done):
    os.read(gate, 1)
    try:
        with holding(folder):
            os.write(results, b"w")
            os.read(done, 1)
    except ConfigError:
        os.write(results, b"l")

for number in range(rounds):
    folder = base / str(number)
    folder.mkdir()
    if number % 2:
        (folder / LOCK).write_text(json.dumps({"token": "dead", "holders": [gone]}))
    gate, results, done = os.pipe(), os.pipe(), os.pipe()
    children = []
    for _ in range(contenders):
        child = os.fork()
        if child == 0:
            os.close(gate[1]); os.close(done[1])
            contend(folder, gate[0], results[1], done[0])
            os._exit(0)
        children.append(child)
    os.close(gate[1])
    said = b""
    while len(said) < contenders:
        said += os.read(results[0], 100)
    os.close(done[1])
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    assert said.count(b"w") == 1, (number, said)
    assert not [path for path in folder.iterdir() if not path.name.startswith(".tmp-")]
    for end in (gate[0], *results, done[0]):
        os.close(end)
print("rounds", rounds, "of", contenders)
"""

KILLED = """
import os, sys, json, signal
from dataclasses import asdict
from pathlib import Path
from dtune.runtime import processes
from dtune.runtime.lock import LOCK, holding

folder = Path(sys.argv[1])
dead = asdict(processes.this_process()) | {"pid": 2**22 - 1, "born": 1}
events = {"open", "os.rename", "os.link", "os.remove", "os.utime"}

def hold(last):
    count = 0
    def hook(event, arguments):
        nonlocal count
        if event in events and str(folder) in str(arguments[0]):
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    with holding(folder):
        pass

def forked(last):
    child = os.fork()
    if child == 0:
        hold(last)
        os._exit(0)
    return os.waitpid(child, 0)[1]

def fresh(stale):
    for path in folder.iterdir():
        path.unlink()
    if stale:
        (folder / LOCK).write_text(json.dumps({"token": "dead", "holders": [dead]}))

points = 0
for stale in (False, True):
    point = 0
    while True:
        point += 1
        fresh(stale)
        status = forked(point)
        assert forked(-1) == 0, (stale, point)
        left = [path.name for path in folder.iterdir() if not path.name.startswith(".tmp-")]
        assert LOCK not in left, left
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    points += point - 1
print("points", points)
"""


def run_driver(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_of_many_processes_at_once_exactly_one_holds(tmp_path: Path) -> None:
    assert run_driver(RACE, tmp_path) == "rounds 25 of 12\n"


def test_killed_anywhere_while_it_takes_or_leaves_the_lock_the_next_one_gets_it(
    tmp_path: Path,
) -> None:
    said = run_driver(KILLED, tmp_path)
    assert int(said.split()[1]) >= 15, said
