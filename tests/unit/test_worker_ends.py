"""How a run that has failed stands, and whether its ranks are started again."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from dtune.checkpoint.layout import naming
from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.config.run import RunConfig
from dtune.errors import CheckpointError
from dtune.runtime.signals import StopRequest
from dtune.runtime.status import State, Status, read_status, write_status
from dtune.runtime.watch.client import Watch
from dtune.worker import Outcome, is_over_for_good, state_of


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    return load_frozen(compose_overrides("train", [f"run_dir={tmp_path}"]))


class Unwatched(Watch):
    """Nobody watches."""

    def __init__(self) -> None:
        """No process is started."""

    def failed(self, message: str, *, trace: str, step: int) -> None:
        """There is nobody to tell."""


def end_by(error: Exception, run: RunConfig) -> Status:
    write_status(run.run_dir, Status(State.running))
    with suppress(MemoryError), Outcome(run, 0, Unwatched(), StopRequest()):
        raise error
    return read_status(run.run_dir)


def saving(code: int) -> CheckpointError:
    """As another rank says it: in words alone."""
    try:
        with naming(Path("step-00000002/rank-00000.safetensors")):
            raise OSError(code, "no luck")
    except CheckpointError as error:
        return CheckpointError(f"rank 1: {error}. Earlier checkpoints are as they were")


@pytest.mark.parametrize(
    ("code", "state"),
    [
        (5, State.failed),  # EIO
        (116, State.failed),  # ESTALE
        (28, State.config_error),  # ENOSPC
        (30, State.config_error),  # EROFS
        (27, State.config_error),  # EFBIG
    ],
)
def test_a_disk_that_fails_may_be_tried_again_and_a_full_one_may_not(
    run: RunConfig, code: int, state: State
) -> None:
    status = end_by(saving(code), run)
    assert (status.state, status.traceback) == (state, "")


def test_a_checkpoint_that_is_damaged_is_the_users_to_mend() -> None:
    assert state_of(CheckpointError("x is damaged: its checksum does not fit")) is (
        State.config_error
    )


def test_out_of_memory_is_not_tried_again_and_another_failure_is(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = end_by(MemoryError(), run)
    assert (status.state, status.hopeless) == (State.failed, True)
    assert not is_over_for_good(run)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert is_over_for_good(run)
    write_status(run.run_dir, replace(status, hopeless=False), instead=True)
    assert not is_over_for_good(run)
