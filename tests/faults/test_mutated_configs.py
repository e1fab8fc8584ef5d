"""Settings and frozen files that are wrong in any way are refused, and the answer says which key.

Before torch is imported, so no weight is read and no device is held.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtune.cli import main
from dtune.config.compose import compose_overrides
from dtune.config.freeze import read_frozen
from dtune.config.support import check_run
from dtune.errors import ConfigError
from tests.faults.mutated import Mutation, mutate_settings, mutate_text

# On an idle machine they take half a minute.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

SEED = 7
RIGHT = ("data.eval_path=none", "train.max_steps=4", "launch.dry_run=true")


def answer(mutation: Mutation, run_dir: Path) -> tuple[int, str]:
    """Exit code and standard error of ``dtune train``."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(["train", f"run_dir={run_dir}", *RIGHT, *mutation.settings])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, said.getvalue()


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty working directory."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("mutated")
        patch.chdir(folder)
        yield folder


def test_the_settings_that_are_mutated_are_right(elsewhere: Path) -> None:
    code, said = answer(Mutation("nothing", (), ""), elsewhere / "run")
    assert code == 0, said


def test_every_mutated_command_line_is_refused_with_its_key(elsewhere: Path) -> None:
    mutations = mutate_settings(SEED)
    assert len(mutations) >= 50
    shown, wrong = [], []
    for mutation in mutations:
        code, said = answer(mutation, elsewhere / "run")
        line = f"{mutation.what}: {' '.join(mutation.settings)} -> {code}, {said.strip()[:160]}"
        shown.append(line)
        is_named = mutation.named in said and "Traceback" not in said
        if code != 2 or not is_named:
            wrong.append(line)
    sys.stdout.write("\n".join(shown))
    assert not wrong, "\n".join(wrong)
    assert list(elsewhere.iterdir()) == []


def test_every_mutated_frozen_config_is_refused(elsewhere: Path) -> None:
    text = compose_overrides("train", [f"run_dir={elsewhere}/run", *RIGHT])
    folder = elsewhere / "frozen"
    folder.mkdir()
    (folder / "config.yaml").write_text(text)
    check_run(read_frozen(folder), 1)
    mutations = mutate_text(text, SEED)
    assert len(mutations) >= 30
    slipped = []
    for what, content in mutations.items():
        assert content != text.encode(), what
        (folder / "config.yaml").write_bytes(content)
        try:
            read_frozen(folder)
            slipped.append(what)
        except ConfigError as error:
            sys.stdout.write(f"{what}: {str(error)[:160]!r}\n")
    assert slipped == []
    (folder / "config.yaml").unlink()
    folder.rmdir()
    assert list(elsewhere.iterdir()) == [], "a tag was run"


def test_a_process_refuses_before_torch_is_imported(elsewhere: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"\xff")
    commands = [
        ["train", "run_dir=run", "peft.rnk=8"],
        ["train", "run_dir=run", "data.path=/no/such.jsonl"],
        ["train", "run_dir=run", "optim.lr=nan"],
    ]
    script = (
        "import json, sys\n"
        "from dtune.cli import main\n"
        "code = main(json.loads(sys.argv[1]))\n"
        "print(code, 'torch' in sys.modules)"
    )
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-c", script, json.dumps(command)],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.stdout.split() == ["2", "False"], done.stdout + done.stderr
    assert list(elsewhere.iterdir()) == []
