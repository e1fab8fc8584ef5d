"""What every rank runs: load the frozen config, assemble, fit."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from dtune.assemble import assemble
from dtune.config.freeze import read_frozen
from dtune.config.run import RunConfig
from dtune.config.support import check_run
from dtune.errors import CheckpointError, ConfigError, DivergedError
from dtune.run_folder import is_restart, resume_of_attempt
from dtune.runtime.logs import log, start_logging
from dtune.runtime.seed import seed_everything
from dtune.runtime.signals import StopRequest
from dtune.runtime.status import EXIT_CODES, State, Status, write_status
from dtune.runtime.world import World
from dtune.train.finish import finish_run
from dtune.train.trainer import Trainer


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m dtune.worker RUN_DIR``: one rank of a run whose config is frozen there."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m dtune.worker RUN_DIR\n")
        return 2
    try:
        run = read_frozen(arguments[0])
    except ConfigError as error:
        sys.stderr.write(f"dtune: {error}\n")
        return 2
    return run_worker(run, World.start())


def run_worker(run: RunConfig, world: World) -> int:
    """Train this rank's part of the run; the exit code of ``dtune``."""
    start_logging(world.rank, Path(run.run_dir) / "logs")
    outcome = Outcome(run.run_dir, world.rank)
    stop = StopRequest()
    stop.install()
    with outcome:
        run = begin_attempt(run, world)
        check_run(run, world.size)
        seed_everything(run.seed, world.rank)
        trainer, exporter = assemble(run, world)
        trainer.stop, outcome.trainer = stop, trainer
        state = trainer.fit(evaluate_before=run.evaluate.before)
        finish_run(trainer, state, exporter, title=describe_run(run))
        outcome.state = state
    world.stop()
    if outcome.state is State.preempted and "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun takes any other code for a failure and would start the ranks again; what it
        # was is in status.json, by which `dtune train` answers.
        return 0
    return EXIT_CODES[outcome.state]


def begin_attempt(run: RunConfig, world: World) -> RunConfig:
    """The run as this attempt at it goes on; the failure of the attempt before is no longer so."""
    if is_restart():
        if world.is_first:
            write_status(run.run_dir, Status(State.running))
        world.barrier()
    return replace(run, resume=resume_of_attempt(run))


def describe_run(run: RunConfig) -> str:
    """One line: what is trained, how, on what."""
    parts = [run.parallel.name, run.precision.name.value]
    return f"{run.peft.name} of {run.model.name} on {run.data.name} ({', '.join(parts)})"


class Outcome:
    """Writes how the run ended to status.json, whatever ends it.

    The user's mistakes, a disk that takes no checkpoint and a diverged loss are told without a
    traceback; everything else is raised on after it has been recorded.
    """

    def __init__(self, run_dir: str, rank: int) -> None:
        self.state = State.failed
        self.trainer: Trainer | None = None
        self._run_dir = run_dir
        self._rank = rank

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
        if isinstance(error, ConfigError | CheckpointError):
            self.state = State.config_error
        elif isinstance(error, DivergedError):
            self.state = State.diverged
        message = str(error) or type(error).__name__
        write_status(
            self._run_dir, Status(self.state, step=self._step, rank=self._rank, message=message)
        )
        log.error("dtune: %s", message)
        if self.state is State.failed:
            log.error("%s", "".join(traceback.format_exception(kind, error, trace)))
        return self.state is not State.failed


if __name__ == "__main__":
    sys.exit(main())
