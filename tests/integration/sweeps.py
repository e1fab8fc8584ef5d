"""Sweeps of tests: real commands, with trials that train or that pretend to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

FAKE = Path(__file__).with_name("fake_trials")
FAILS, DIES, STOPS, HANGS = 666, 667, 668, 669
"""Seeds of fake trials whose first attempt goes wrong in that way."""


def fake_environment(step_seconds: float = 0) -> dict[str, str]:
    """Variables by which trials do not train; each of their steps takes so long."""
    path = os.pathsep.join(filter(None, [str(FAKE), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "DTUNE_TEST_STEP_SECONDS": str(step_seconds)}


def start(*arguments: str, fake: bool = False, step_seconds: float = 0) -> subprocess.Popen[str]:
    """``dtune ...`` in a process of its own; with ``fake`` trials do not train."""
    return subprocess.Popen(
        [sys.executable, "-m", "dtune", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(fake_environment(step_seconds) if fake else {})},
    )


def call(
    *arguments: str, fake: bool = False, step_seconds: float = 0, code: int = 0
) -> tuple[str, str]:
    """The same to its end, which must have that exit code; what it wrote on both streams."""
    process = start(*arguments, fake=fake, step_seconds=step_seconds)
    out, err = process.communicate(timeout=500)
    assert process.returncode == code, out + err
    assert "Traceback" not in err, err
    return out, err


def states(out: str) -> dict[int, str]:
    """State by trial, as the last table of an output says."""
    found: dict[int, str] = {}
    column = 0
    for line in out.splitlines():
        if line.startswith("trial  settings"):
            found, column = {}, line.index("state")
        elif column and line[:1].isdigit() and " trials" not in line:
            found[int(line.split()[0])] = line[column:].split("  ")[0].strip()
    return found


def trial(sweep: Path, number: int) -> dict:
    """The record of a trial."""
    return json.loads((sweep / str(number) / "trial.json").read_text())


def attempts(sweep: Path) -> list[int]:
    """How often each trial was started."""
    return [len(trial(sweep, n)["attempts"]) for n in range(len(list(sweep.glob("*/trial.json"))))]
