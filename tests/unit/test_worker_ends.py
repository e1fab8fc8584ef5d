"""How a run that has failed stands, and whether its ranks are started again."""

from __future__ import annotations

import signal
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from dtune.checkpoint.layout import naming
from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.config.run import RunConfig
from dtune.errors import CheckpointError
from dtune.runtime.signals import Preempted, StopRequest
from dtune.runtime.status import State, Status, read_status, write_status
from dtune.runtime.watch.client import Watch
from dtune.runtime.watch.schema import OnHang
from dtune.runtime.world import World
from dtune.worker import (
    Outcome,
    _train,
    begin_attempt,
    describe_end,
    is_over_for_good,
    state_of,
)

CUT_OFF = '{"state": "run'
"""What a full disk leaves of a status."""


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    return load_frozen(compose_overrides("train", [f"run_dir={tmp_path}"]))


class Unwatched(Watch):
    """Nobody watches."""

    def __init__(self) -> None:
        """No process is started."""

    def failed(self, message: str, *, trace: str, step: int) -> None:
        """There is nobody to tell."""


def end_by(error: Exception, run: RunConfig, before: str = "") -> Status:
    write_status(run.run_dir, Status(State.running))
    if before:
        (Path(run.run_dir) / "status.json").write_text(before)
    with suppress(type(error)), Outcome(run, 0, Unwatched(), StopRequest()):
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


@pytest.mark.parametrize(("state", "on_hang"), list(product((State.hung, State.failed), OnHang)))
def test_a_hang_is_tried_again_only_where_it_is_told_to(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch, state: State, on_hang: OnHang
) -> None:
    run = replace(run, watch=replace(run.watch, on_hang=on_hang))
    write_status(run.run_dir, Status(state))
    assert not is_over_for_good(run)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert is_over_for_good(run) is (state is State.hung and on_hang is OnHang.stop)


def test_ranks_that_are_started_again_after_a_hang_leave_at_once_and_it_stays_one(
    run: RunConfig, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setattr(World, "stop", lambda _: None)
    monkeypatch.setattr("dtune.worker.assemble", None)
    write_status(run.run_dir, Status(State.hung, step=3, rank=1, message="hung"))
    before = read_status(run.run_dir)
    # torchrun would start them again for any other code.
    assert _train(run, world, Unwatched(), StopRequest()) == 0
    assert read_status(run.run_dir) == before


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (ValueError("why"), State.failed),
        (CheckpointError("why"), State.config_error),
        (RuntimeError("why"), State.failed),
    ],
)
def test_a_status_that_was_cut_off_does_not_hide_why_a_run_fails(
    run: RunConfig, error: Exception, state: State
) -> None:
    status = end_by(error, run, before=CUT_OFF)
    assert (status.state, status.message) == (state, "why")


def test_a_status_that_was_cut_off_keeps_no_rank_from_starting_again(
    run: RunConfig, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    (Path(run.run_dir) / "status.json").write_text(CUT_OFF)
    assert not is_over_for_good(run)
    assert "a rank has ended without a word" in describe_end(run.run_dir)
    begin_attempt(run, world)
    assert read_status(run.run_dir).state is State.running


def test_a_status_that_was_cut_off_keeps_no_signal_from_ending_a_run(run: RunConfig) -> None:
    (Path(run.run_dir) / "status.json").write_text(CUT_OFF)
    with StopRequest().in_charge() as stop:
        stop.install(at_once=True, run_dir=run.run_dir)
        with pytest.raises(Preempted):
            signal.raise_signal(signal.SIGTERM)
    assert read_status(run.run_dir).state is State.preempted
