"""The embedded default learns: held-out exact match, not a falling loss."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BASE_AT_MOST = 0.10
AT_LEAST = 0.85


@pytest.mark.slow
def test_quickstart_learns_what_it_was_not_shown(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ["experiment=quickstart", f"run_dir={run}"]
    done = subprocess.run(
        [sys.executable, "-m", "dtune", "train", *settings],
        capture_output=True,
        text=True,
        check=False,
        timeout=580,
        env={**os.environ, "DTUNE_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    assert result["before"]["exact_match"] <= BASE_AT_MOST
    assert result["after"]["exact_match"] >= AT_LEAST, done.stderr
    assert result["after"]["loss"] < result["before"]["loss"]
