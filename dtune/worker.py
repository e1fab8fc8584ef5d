"""What every rank runs: load the frozen config, assemble, fit."""

from __future__ import annotations

import importlib
import sys

from dtune.runtime.imports import uncollected
from dtune.runtime.signals import OF_THIS_PROCESS, Preempted, StopRequest, exit_code

if __name__ == "__main__":
    # Before torch is imported, which takes seconds in which a signal would end the process.
    OF_THIS_PROCESS.install(at_once=True, run_dir="".join(sys.argv[1:2]))
    with uncollected():
        importlib.import_module("dtune.assemble")

import os
import signal
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch

from dtune.assemble import assemble
from dtune.checkpoint.visible import await_file, may_pass
from dtune.config.freeze import read_frozen
from dtune.config.run import RunConfig
from dtune.config.support import check_run
from dtune.errors import CheckpointError, ConfigError, DivergedError, HungError
from dtune.out_of_memory import advise, describe_shortage, is_out_of_memory
from dtune.plan.auto import decide_here
from dtune.run_folder import is_restart, resume_of_attempt
from dtune.runtime.clocks import warn_of_clocks
from dtune.runtime.lock import STALE_SECONDS, holding, is_held_here
from dtune.runtime.logs import log, log_to_file, start_logging
from dtune.runtime.seed import seed_everything
from dtune.runtime.status import FAILURES, State, Status, status_of, write_status
from dtune.runtime.watch.client import Watch
from dtune.runtime.watch.heartbeat import Place
from dtune.runtime.watch.join import collective_timeout, join_watchers
from dtune.runtime.watch.schema import OnHang
from dtune.runtime.world import World
from dtune.train.finish import finish_run
from dtune.train.trainer import Trainer

ECHO_SECONDS = 3.0
"""How long a rank that lost another one waits to hear what became of it."""
ADVICE_SECONDS = 5.0
"""How long a rank that is out of memory may count what would help."""


def main(argv: Sequence[str] | None = None, stop: StopRequest | None = None) -> int:
    """``python -m dtune.worker RUN_DIR``: one rank of a run whose config is frozen there."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m dtune.worker RUN_DIR\n")
        return 2
    if is_of_several_hosts():
        # What the first host has just written may be seen here later.
        await_file(Path(arguments[0]) / "config.yaml")
    try:
        run = read_frozen(arguments[0])
    except ConfigError as error:
        sys.stderr.write(f"dtune: {error}\n")
        return 2
    stop = stop or OF_THIS_PROCESS
    stop.install(at_once=True, run_dir=run.run_dir)
    # Before ranks meet, which may hang as well.
    watch = Watch(run.watch, run.run_dir, int(os.environ.get("RANK", "0")))
    watch.heartbeat.at(Place.others)
    world = World.start(collective_timeout(run.watch))
    watch.heartbeat.at(Place.nowhere)
    return run_worker(run, world, watch, stop)


def is_of_several_hosts() -> bool:
    """Whether the ranks of the run are on more than one host."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return world_size > int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))


def run_worker(
    run: RunConfig, world: World, watch: Watch | None = None, stop: StopRequest | None = None
) -> int:
    """Train this rank's part of the run; the exit code of ``dtune``."""
    watch = watch or Watch(run.watch, run.run_dir, world.rank)
    with ExitStack() as stack:
        # Left open where a rank of several fails: its watcher sees to it that it ends, and soon.
        stack.callback(watch.close_if_done)
        # Here for ranks that met before they knew the config.
        world.allow(collective_timeout(run.watch))
        join_watchers(watch, world)
        if refusal := world.broadcast(enter_lock(run, world, stack)):
            # Nothing is written: the folder is another run's.
            sys.stderr.write(f"dtune: {refusal}\n" if world.is_first else "")
            world.stop()
            return 2
        return _train(run, world, watch, stop or StopRequest())


def enter_lock(run: RunConfig, world: World, stack: ExitStack) -> str:
    """Hold the run folder on the first rank until the stack ends; why not, where it is taken."""
    folder = Path(run.run_dir)
    # The launcher that holds it may be on another machine than the first rank.
    ours = world.any_says(is_held_here(folder))
    if world.is_first:
        # A launcher that has only submitted the job, or an attempt before this one, is about to go.
        patience = 2 * STALE_SECONDS if is_restart() else 30.0
        try:
            stack.enter_context(holding(folder, patience=patience, joins=ours))
        except ConfigError as error:
            return str(error)
    return ""


def _train(run: RunConfig, world: World, watch: Watch, stop: StopRequest) -> int:
    start_logging(world.rank, Path(run.run_dir) / "logs")
    outcome = Outcome(run, world.rank, watch, stop)
    if world.broadcast(is_over_for_good(run)):
        world.stop()
        # torchrun would start the ranks again for any other code; status.json says how it ended.
        return 0
    stop.install(at_once=True, run_dir=run.run_dir)
    with outcome:
        warn_of_clocks(world)
        outcome.run = run = decide_here(begin_attempt(run, world), world)
        check_run(run, world.size)
        seed_everything(run.seed, world.rank)
        trainer, exporter = assemble(run, world)
        trainer.stop, outcome.trainer = stop, trainer
        state = trainer.fit(evaluate_before=run.evaluate.before)
        finish_run(trainer, state, exporter, title=describe_run(run))
        outcome.state = state
    unsaved = outcome.state is State.preempted and outcome.trainer is None
    if (outcome.state in FAILURES or unsaved) and world.size > 1:
        # Others may be gone, and leaving the process group would wait for them.
        return exit_code(outcome.state)
    watch.stop_counting()
    world.stop()
    return exit_code(outcome.state)


def is_over_for_good(run: RunConfig) -> bool:
    """Whether torchrun has started the ranks again of a run that is to stop.

    One that hung, where that is to stop it; one that was out of memory, as it would be again; or
    one that a signal to one of its ranks has ended before there was anything to save.
    """
    if not is_restart():
        return False
    status, _ = status_of(run.run_dir)
    hung = status.state is State.hung and run.watch.on_hang is OnHang.stop
    return hung or status.hopeless or status.state is State.preempted


def begin_attempt(run: RunConfig, world: World) -> RunConfig:
    """The run as this attempt at it goes on; the failure of the attempt before is no longer so."""
    if is_restart():
        if world.is_first:
            log.warning("%s", describe_end(run.run_dir))
            write_status(run.run_dir, Status(State.running))
        world.barrier()
    elif world.is_first and (_says_running(run.run_dir) or _says_preempted_before(run.run_dir)):
        # The script of a Slurm job has said that the ranks are starting.
        write_status(run.run_dir, Status(State.running))
    return replace(run, resume=resume_of_attempt(run))


def _says_preempted_before(run_dir: str) -> bool:
    """Whether the status is of an attempt before this process, which was preempted."""
    status, _ = status_of(run_dir)
    return status.state is State.preempted and status.time < OF_THIS_PROCESS.created


def _says_running(run_dir: str) -> bool:
    told = (Path(run_dir) / "status.json").is_file()
    return told and status_of(run_dir)[0].state is State.running


def describe_end(run_dir: str) -> str:
    """What is known of how the attempt before this one ended."""
    before, _ = status_of(run_dir)
    if before.state not in FAILURES:
        return "starting again: a rank has ended without a word, killed or crashed"
    who = f"rank {before.rank}" if before.rank >= 0 else "the run"
    failed = f"{who} failed at step {before.step}: {before.message}"
    return f"starting again: {failed}\n{before.traceback}".rstrip()


def describe_run(run: RunConfig) -> str:
    """One line: what is trained, how, on what."""
    parts = [run.parallel.name, run.precision.name.value]
    return f"{run.peft.name} of {run.model.name} on {run.data.name} ({', '.join(parts)})"


class Outcome:
    """Writes how the run ended to status.json, whatever ends it.

    The user's mistakes, a disk that takes no checkpoint and a diverged loss are told without a
    traceback; everything else is raised on after it has been recorded.
    """

    def __init__(self, run: RunConfig, rank: int, watch: Watch, stop: StopRequest) -> None:
        self.state = State.failed
        self.trainer: Trainer | None = None
        self.run = run
        self._run_dir = run.run_dir
        self._rank = rank
        self._watch = watch
        self._stop = stop

    @property
    def _step(self) -> int:
        """Optimizer steps done."""
        return 0 if self.trainer is None else self.trainer.progress.step

    def __enter__(self) -> Outcome:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if error is None:
            if self._rank == 0:
                write_status(self._run_dir, Status(self.state, step=self._step))
            return False
        if self._was_preempted(error):
            self.state = State.preempted
            return True
        self.state = state_of(error)
        trail = ""
        # A disk that fails is no fault of the code.
        expected = isinstance(error, CheckpointError)
        if self.state is State.failed and not expected:
            trail = "".join(traceback.format_exception(kind, error, trace))
        if lost_a_peer(error) and (cause := self._watch.wait_for_cause(ECHO_SECONDS)):
            log.error("rank %d ends: %s", self._rank, cause.message)
            log_to_file(trail)
            return True
        self._tell(error, trail)
        return expected or self.state is not State.failed

    def _was_preempted(self, error: BaseException) -> bool:
        """Whether a signal to this rank or another has ended the run before it began.

        The rank that left has said so in status.json, and the others lose it.
        """
        if isinstance(error, Preempted):
            return True
        if not self._stop.ends_at_once or not isinstance(error, RuntimeError):
            return False
        return self._stop.is_set or status_of(self._run_dir)[0].state is State.preempted

    def _tell(self, error: BaseException, trail: str) -> None:
        """The first failure goes to status.json, the log and the other ranks."""
        message = str(error) or type(error).__name__
        rank, step = self._rank, self._step
        if isinstance(error, HungError):
            rank = error.rank
        oom = is_out_of_memory(error)
        if oom:
            message, step = describe_shortage(error, self.trainer), step + 1
        status = Status(self.state, step, rank, message=message, traceback=trail, hopeless=oom)
        write_status(self._run_dir, status)
        self._watch.failed(f"rank {rank} at step {step}: {message}", trace=trail, step=step)
        if oom and (advice := advise(self.run, self.trainer, seconds=ADVICE_SECONDS)):
            message = f"{message}. {advice}"
            write_status(self._run_dir, replace(status, message=message), instead=True)
        log.error("dtune: %s", message)
        if trail:
            log.error("%s", trail)


def state_of(error: BaseException) -> State:
    """How a run stands that an error has ended."""
    if isinstance(error, CheckpointError):
        return State.failed if may_pass(str(error)) else State.config_error
    if isinstance(error, ConfigError):
        return State.config_error
    if isinstance(error, DivergedError):
        return State.diverged
    return State.hung if isinstance(error, HungError) else State.failed


def lost_a_peer(error: BaseException) -> bool:
    """Whether an error says no more than that another rank is gone."""
    if isinstance(error, torch.distributed.DistError):
        return True
    words = ("gloo", "connection closed", "connection reset", "broken pipe", "nccl")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


if __name__ == "__main__":
    try:
        code = main()
    finally:
        # Python takes its handlers away before it ends: one more signal would make it a failure.
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
    sys.exit(code)
