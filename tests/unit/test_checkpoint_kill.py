"""A process killed at any point of a save loses nothing that was published."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Forks a process for every point, so that torch is imported once. The audit hook sees each open,
# rename, mkdir and removal before it happens; the wrappers see each write and flush.
DRIVER = """
import logging, os, signal, sys
from pathlib import Path
from dtune.checkpoint.reader import find_checkpoint, load_checkpoint
from dtune.checkpoint.schema import CheckpointConfig
from dtune.checkpoint.writer import Checkpointer
from dtune.runtime import tensors
from dtune.runtime.world import World
from tests.unit.checkpoint_runs import IDENTITY, HoldingEngine, save_step

logging.disable(logging.CRITICAL)
run_dir, events = Path(sys.argv[1]), {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}
folder = run_dir / "checkpoints"

def arm(last):
    count = 0
    def point(where):
        nonlocal count
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
    def hook(event, arguments):
        if event in events and str(run_dir) in str(arguments[0]):
            point(event)
    sys.addaudithook(hook)
    fsync, put = os.fsync, tensors.TensorWriter._put
    def counted_fsync(descriptor):
        point("fsync")
        fsync(descriptor)
    def counted_put(self, data):
        half = len(data) // 2
        put(self, data[:half])
        point("write")
        put(self, data[half:])
    os.fsync, tensors.TensorWriter._put = counted_fsync, counted_put

def save(step, last, asynchronous):
    world = World.start()
    config = CheckpointConfig(keep=1, asynchronous=asynchronous)
    with Checkpointer(folder, config, world) as checkpointer:
        arm(last)
        save_step(checkpointer, HoldingEngine(world), step, is_best=True)

def check(steps):
    world = World.start()
    Checkpointer(folder, CheckpointConfig(), world).close()
    left = [path.name for path in folder.iterdir()]
    assert not [name for name in left if name.startswith(".tmp-")], left
    info = find_checkpoint(run_dir, "auto", world)
    engine = HoldingEngine(world)
    load_checkpoint(info, engine=engine, identity=IDENTITY, world=world)
    assert info.step in steps, (info.step, steps)
    assert engine.holds(info.step)
    for name in ("LATEST", "BEST"):
        assert (folder / (folder / name).read_text().strip() / "manifest.json").is_file(), name
    print("at", info.step, flush=True)

def forked(act, *arguments):
    child = os.fork()
    if child == 0:
        try:
            act(*arguments)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]

assert forked(save, 1, -1, False) == 0
point, published = 0, 1
while True:
    point += 1
    status = forked(save, published + 1, point, point % 2 == 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or status == 0, status
    assert forked(check, {published, published + 1} if killed else {published + 1}) == 0
    if not killed:
        break
    if (folder / f"step-{published + 1:08d}").exists():
        published += 1
print("points", point - 1, "steps", published)
"""


# A pair of ranks for every point; one of them is killed there, the other sees to itself.
PAIR = """
import logging, os, signal, sys, time
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as dist
from dtune.checkpoint.reader import find_checkpoint, load_checkpoint
from dtune.checkpoint.schema import CheckpointConfig
from dtune.checkpoint.writer import Checkpointer
from dtune.runtime.world import World
from tests.unit.checkpoint_runs import IDENTITY, HoldingEngine, save_step

logging.disable(logging.CRITICAL)
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
run_dir, events = Path(sys.argv[1]), {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}
folder = run_dir / "checkpoints"

def start(rank, size, number):
    store = dist.FileStore(str(run_dir / f"store-{number}"), size)
    wait = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=wait)
    host = dist.new_group(backend="gloo", timeout=wait)
    return World(rank, size, rank, size, torch.device("cpu"), host)

def save(rank, number, step, victim, last):
    world = start(rank, 2, number)
    with Checkpointer(folder, CheckpointConfig(keep=1), world) as checkpointer:
        if rank == victim:
            count = 0
            def hook(event, arguments):
                nonlocal count
                if event in events and "step-" in str(arguments[0]):
                    count += 1
                    if count == last:
                        os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(hook)
        save_step(checkpointer, HoldingEngine(world), step)

def check(number, steps):
    world = start(0, 1, number)
    info = find_checkpoint(run_dir, "auto", world)
    engine = HoldingEngine(world)
    load_checkpoint(info, engine=engine, identity=IDENTITY, world=world)
    assert info.step in steps, (info.step, steps)
    assert engine.holds(info.step)
    Checkpointer(folder, CheckpointConfig(), world).close()
    assert not list(folder.glob(".tmp-*"))

def forked(act, *arguments):
    child = os.fork()
    if child == 0:
        try:
            act(*arguments)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return child

def ended(child):
    return os.waitpid(child, 0)[1]

number = points = 0
run_dir.mkdir(exist_ok=True)
assert [ended(child) for child in [forked(save, rank, 0, 1, -1, 0) for rank in (0, 1)]] == [0, 0]
published = 1
for victim in (0, 1):
    point = 0
    while True:
        point, number = point + 1, number + 1
        pair = [forked(save, rank, number, published + 1, victim, point) for rank in (0, 1)]
        killed = ended(pair[victim]) == signal.SIGKILL
        outcome = ended(pair[1 - victim])
        assert killed or outcome == 0, (victim, point, outcome)
        number += 1
        may = {published, published + 1} if killed else {published + 1}
        assert ended(forked(check, number, may)) == 0, (victim, point)
        if (folder / f"step-{published + 1:08d}").exists():
            published += 1
        if not killed:
            break
    points += point - 1
print("points", points, "steps", published)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_with_one_of_two_ranks_killed_at_every_file_of_a_save_nothing_is_lost(
    tmp_path: Path,
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", PAIR, str(tmp_path / "run")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    _, points, _, steps = run.stdout.split()
    assert int(points) >= 20, run.stdout
    assert int(steps) >= 3, run.stdout


@pytest.mark.timeout(600)
def test_killed_at_every_point_of_a_save_the_last_published_checkpoint_loads(
    tmp_path: Path,
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    *_, last = run.stdout.splitlines()
    _, points, _, steps = last.split()
    # Files, folders, flushes and renames of one save, and killed before and after publishing.
    assert int(points) >= 30, run.stdout
    assert int(steps) >= 3, run.stdout
