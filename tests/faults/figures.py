"""How soon a hung rank is named, ranks out of memory end and a wrong config is refused, in numbers.

``python -m tests.faults.figures > tests/faults/figures.json``, with nothing else on the machine.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.faults.hang_runs import STEP_SECONDS, run_cases


@dataclass(frozen=True)
class Figures:
    """Seconds, of each of the runs."""

    hung_named_beyond_time_out: list[float]
    """From the fault to the name of the rank in status.json, less the time-out."""
    hung_all_gone_beyond_time_out: list[float]
    """The same to the end of the last rank."""
    out_of_memory_told: list[float]
    """From the error to the message with what would help."""
    out_of_memory_all_gone: list[float]
    """From the error to the end of the last rank."""
    refused: list[float]
    """From the start of ``dtune train`` with a misspelt key to its end."""
    machine: str
    cores: int


def refusal() -> float:
    """Seconds of a command line that is refused."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "dtune", "train", "peft.rnk=8"], check=False, capture_output=True
    )
    assert done.returncode == 2, done.stderr
    return time.perf_counter() - started


def measure(folder: Path, times: int = 3) -> Figures:
    """Run both cases several times, one after another."""
    hung, oom = (
        [run_cases(folder / f"{name}-{number}", [name])[name] for number in range(times)]
        for name in ("sleep", "oom")
    )
    return Figures(
        [round(it.named_seconds - STEP_SECONDS, 1) for it in hung],
        [round(it.gone_seconds - STEP_SECONDS, 1) for it in hung],
        [round(it.named_seconds, 1) for it in oom],
        [round(it.gone_seconds, 1) for it in oom],
        [round(refusal(), 1) for _ in range(times)],
        platform.platform(),
        os.cpu_count() or 1,
    )


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with tempfile.TemporaryDirectory() as scratch:
        sys.stdout.write(json.dumps(asdict(measure(Path(scratch), count)), indent=1) + "\n")
