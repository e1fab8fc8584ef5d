"""Which folder a run may have, and what resume means to an attempt that is not the first."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.config.run import RunConfig
from dtune.errors import ConfigError
from dtune.run_folder import resume_of_attempt, start_run_folder


def start(folder: Path, resume: str) -> None:
    text = compose_overrides("train", [f"run_dir={folder}", f"resume={resume}"])
    start_run_folder(load_frozen(text), text, command=["dtune"])


def config(folder: Path, resume: str) -> RunConfig:
    return load_frozen(compose_overrides("train", [f"run_dir={folder}", f"resume={resume}"]))


@pytest.mark.parametrize("resume", ["false", "auto"])
@pytest.mark.parametrize(
    "files", [["thesis.tex"], ["config.yaml", "main.py"], ["checkpoints/other.pt"]]
)
def test_a_folder_of_something_else_is_never_taken(
    tmp_path: Path, resume: str, files: list[str]
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("lr: 1\n")
    with pytest.raises(ConfigError, match="not empty, and what it holds is no run of dtune"):
        start(tmp_path, resume)
    assert {path.name for path in tmp_path.iterdir()} == {Path(name).parts[0] for name in files}


def test_a_run_is_gone_on_with_only_where_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()  # A batch script has made it.
    start(tmp_path, "auto")
    with pytest.raises(ConfigError, match="set resume=auto"):
        start(tmp_path, "false")
    (tmp_path / "status.json").unlink()  # So has the script of a requeued job.
    start(tmp_path, "auto")


def test_checkpoints_alone_are_a_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    start(tmp_path, "auto")
    assert (tmp_path / "config.yaml").is_file()


@pytest.mark.parametrize(
    ("variables", "given", "resume"),
    [
        ({}, "false", "false"),
        ({}, "own", "own"),
        ({"TORCHELASTIC_RESTART_COUNT": "0"}, "false", "false"),
        ({"TORCHELASTIC_RESTART_COUNT": "1"}, "false", "auto"),
        ({"TORCHELASTIC_RESTART_COUNT": "1"}, "own", "auto"),
        ({"TORCHELASTIC_RESTART_COUNT": "1"}, "elsewhere", "elsewhere"),
        ({"SLURM_RESTART_COUNT": "2"}, "false", "auto"),
        ({"SLURM_RESTART_COUNT": "2"}, "own", "auto"),
        ({"SLURM_RESTART_COUNT": "2"}, "elsewhere", "elsewhere"),
    ],
)
def test_what_was_gone_back_to_once_is_not_gone_back_to_by_the_next_attempt(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    given: str,
    resume: str,
) -> None:
    paths = {
        "own": str(tmp_path / "run" / "checkpoints" / "step-00000001"),
        "elsewhere": str(tmp_path / "run2"),
    }
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", "DTUNE_GOES_ON"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    run = config(tmp_path / "run", paths.get(given, given))
    assert resume_of_attempt(run) == paths.get(resume, resume)


def test_ranks_that_are_started_again_may_take_the_folder_of_their_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(tmp_path, "false")
    with pytest.raises(ConfigError, match="set resume=auto"):
        start(tmp_path, "false")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    start(tmp_path, "false")
    assert (tmp_path / "config.yaml").is_file()
