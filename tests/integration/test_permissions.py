"""Folders and files without the right to use them: named, before the first step."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dtune.checkpoint.reader import CHECKPOINTS
from dtune.resources import resolve_path
from tests.integration import bad_inputs
from tests.integration.train_runs import assembled, settings

# Root may do everything, unless these are taken from it.
WITHOUT = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]

Case = Callable[[Path, Path], tuple[list[str], str]]
"""From a folder of its own and a run that has ended to arguments, and what is to be said."""


def closed_parent(folder: Path, run: Path) -> tuple[list[str], str]:
    folder.chmod(0o555)
    return settings(folder / "run"), f"run_dir={folder / 'run'} cannot be written: Permission"


def closed_run(folder: Path, run: Path) -> tuple[list[str], str]:
    run.chmod(0o555)
    return settings(run, "resume=auto"), f"run_dir={run} cannot be written: Permission denied"


def closed_checkpoints(folder: Path, run: Path) -> tuple[list[str], str]:
    (run / CHECKPOINTS).chmod(0o555)
    argv = settings(run, "train.max_steps=9", "resume=auto")
    return argv, f"{run / CHECKPOINTS}: Permission denied (EACCES)"


def closed_checkpoint_file(folder: Path, run: Path) -> tuple[list[str], str]:
    file = run / CHECKPOINTS / "step-00000002" / "rank-00000.safetensors"
    file.chmod(0)
    return settings(run, "train.max_steps=9", "resume=auto"), str(file)


def closed_weights(folder: Path, run: Path) -> tuple[list[str], str]:
    model = Path(shutil.copytree(resolve_path("dtune://tiny"), folder / "model"))
    (model / "model.safetensors").chmod(0)
    return settings(folder / "run", f"model.path={model}"), str(model)


def closed_data(folder: Path, run: Path) -> tuple[list[str], str]:
    data = folder / "data.jsonl"
    data.write_text('{"text": "x"}\n')
    data.chmod(0)
    return settings(folder / "run", f"data.path={data}"), str(data)


CASES: tuple[Case, ...] = (
    closed_parent,
    closed_run,
    closed_checkpoints,
    closed_checkpoint_file,
    closed_weights,
    closed_data,
)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, object], str]]:
    """What one process without special rights says to every case."""
    if os.geteuid() == 0 and subprocess.run([*WITHOUT, "true"], check=False).returncode:
        pytest.skip("needs setpriv, or a user that is not root")
    base = tmp_path_factory.mktemp("rights")
    with assembled(settings(base / "old", "train.max_steps=2")) as it:
        it.finish()
    asked = {}
    for case in CASES:
        folder = base / case.__name__
        folder.mkdir()
        run = Path(shutil.copytree(base / "old", base / f"{case.__name__}-run"))
        asked[case.__name__] = case(folder, run)
    (base / "commands.json").write_text(
        json.dumps([["train", *argv] for argv, _ in asked.values()])
    )
    command = [sys.executable, bad_inputs.__file__, str(base / "commands.json")]
    done = subprocess.run(
        [*WITHOUT, *command] if os.geteuid() == 0 else command,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for path in base.rglob("*"):
        path.chmod(0o755)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout)
    return {name: (said[at], asked[name][1]) for at, name in enumerate(asked)}


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("name", [case.__name__ for case in CASES])
def test_what_may_not_be_used_is_named(
    answers: dict[str, tuple[dict[str, object], str]], name: str
) -> None:
    answer, expected = answers[name]
    assert answer["code"] == 2, answer["said"]
    assert expected in str(answer["said"])
    assert "Traceback" not in str(answer["said"])
