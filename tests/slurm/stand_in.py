"""In place of the interpreter that has dtune: ranks that start at once and only count steps.

For the job script alone. What the script would start as torchrun's agent, or as a rank, does as
``DTUNE_TEST_STAND_IN`` says: ``until_told`` counts until it is asked to stop, or until the file
``finish`` lies beside the run; ``stuck`` is always stopped before its first step; ``one_step`` does
one step in each attempt and is stopped; ``falls_back`` ends each attempt a step lower than the one
before; ``until_hurried`` goes on until it is asked a second time; ``fails`` fails as a worker does.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from dtune.runtime.status import State, Status, write_status

heard: list[str] = []
HIGH = 9


def note(number: int, frame: FrameType | None) -> None:
    heard.append(signal.Signals(number).name)


def main() -> int:
    run_dir = Path(sys.argv[-1])
    if os.environ["SLURM_PROCID"] != "0":
        return 0
    shutdown = os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
    (run_dir / "shutdown_timeout").write_text(shutdown)
    (run_dir / "command").write_text(" ".join(sys.argv[1:]))
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, note)
    count = run_dir / "count"
    step = int(count.read_text()) if count.is_file() else 0
    state, step = work(os.environ["DTUNE_TEST_STAND_IN"], run_dir, step)
    count.write_text(str(step))
    with (run_dir / "heard").open("a") as file:
        file.write(f"{os.environ.get('SLURM_RESTART_COUNT', '0')} {step} {heard[:1]}\n")
    write_status(run_dir, Status(state, step=step))
    return 1 if state is State.failed else 0


def work(kind: str, run_dir: Path, step: int) -> tuple[State, int]:
    """How the attempt ends, and at which step."""
    if kind == "stuck":
        return State.preempted, step
    if kind == "one_step":
        return State.preempted, step + 1
    if kind == "falls_back":
        return State.preempted, (step or HIGH) - 1
    if kind == "until_hurried":
        write_status(run_dir, Status(State.running, step=step))
        with (run_dir / "told").open("a") as told:
            for number in range(2):
                while len(heard) <= number:
                    time.sleep(0.02)
                told.write(f"{heard[number]}\n")
                told.flush()
        return State.preempted, step
    if kind == "fails":
        return State.failed, step
    assert kind == "until_told", kind
    while not heard:
        step += 1
        (run_dir / "running").write_text(str(step))
        time.sleep(0.02)
        if (run_dir.parent / "finish").exists():
            return State.done, step
    return State.preempted, step


if __name__ == "__main__":
    sys.exit(main())
