"""``dtune train``: compose, check, freeze, launch."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from dtune_launch.gpus import count_gpus, resolve_nproc
from dtune_launch.spec import JobSpec, LaunchConfig, LaunchError
from dtune_launch.srun import become_rank, is_task

from dtune.config.compose import compose
from dtune.config.freeze import load_frozen
from dtune.config.support import check_run
from dtune.errors import ConfigError
from dtune.run_folder import check_run_folder, occupied_run_folder, withdraw_start
from dtune.runtime.imports import uncollected
from dtune.runtime.signals import SIGNALS, StopRequest
from dtune.runtime.status import EXIT_CODES, State, Status, status_of, write_status
from dtune.sweep.ended import exit_code as exit_code_of_sweep

STOPPED = frozenset(128 + number for number in SIGNALS)
"""Exit codes of a job that a signal has ended."""


def run(argv: list[str]) -> int:
    """Train as the settings say; the exit code of ``dtune``."""
    with StopRequest().in_charge() as stop:
        return _run(argv, stop)


def _run(argv: list[str], stop: StopRequest) -> int:
    if is_task(os.environ):
        become_rank()
    if "RANK" in os.environ:
        return _run_as_rank(argv, stop)
    text = compose("train", argv)
    if text is None:
        return exit_code_of_sweep()
    config = load_frozen(text)
    nproc = resolve_nproc(config.launch, engine=config.parallel.name)
    check_run(config, nproc * config.launch.num_nodes)
    job = JobSpec(
        module="dtune.worker",
        arguments=(config.run_dir,),
        run_dir=Path(config.run_dir),
        nproc=nproc,
        max_restarts=config.launch.max_restarts,
        save_seconds=config.watch.save,
    )
    if config.launch.dry_run:
        sys.stdout.write(describe_launch(job, argv, config.launch) + "\n")
        return 0
    if config.launch.gpus_of_node is None:
        check_gpus(nproc)
    with said_by_launcher():
        for warning in config.launch.check(job.run_dir):
            sys.stderr.write(f"dtune: {warning}\n")
    if not config.launch.writes_folder:
        return launch(job, config.launch, stop)
    check_run_folder(config)
    with said_by_launcher():
        config.launch.try_submission(job)
    with occupied_run_folder(config, text, command=["dtune", "train", *argv]):
        return launch(job, config.launch, stop)


@contextmanager
def said_by_launcher() -> Iterator[None]:
    """Launchers know nothing of dtune's errors: what they refuse is a ConfigError here."""
    try:
        yield
    except LaunchError as error:
        raise ConfigError(str(error)) from error


def describe_launch(job: JobSpec, settings: Sequence[str], launcher: LaunchConfig) -> str:
    """What a shell would run in place of dtune: freeze the config, then start the job on it."""
    own = ("run_dir=", "launch.dry_run=")
    given = [setting for setting in settings if not setting.lstrip("+").startswith(own)]
    config = [sys.executable, "-m", "dtune", "config", *given, f"run_dir={job.run_dir}"]
    folder = shlex.quote(str(job.run_dir))
    freezing = f"mkdir -p {folder} && {shlex.join(config)} > {folder}/config.yaml"
    with said_by_launcher():
        return f"{freezing}\n{launcher.describe(job)}"


def check_gpus(processes: int) -> None:
    """Raise ConfigError where the processes of this machine are more than its GPUs, if any."""
    gpus = count_gpus()
    if 0 < gpus < processes:
        raise ConfigError(
            f"launch.nproc={processes} is above the {gpus} GPUs that are visible here; set "
            f"launch.nproc={gpus}, or CUDA_VISIBLE_DEVICES"
        )


def check_agent(environ: Mapping[str, str]) -> None:
    """Raise ConfigError where the user's own torchrun would start ranks again, and they would hang.

    They would read addresses of the ranks before them in the store that they share with it.
    """
    is_shared = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    restarts = int(environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if is_shared and restarts:
        raise ConfigError(
            f"torchrun --max-restarts={restarts} needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its "
            "environment: without it ranks that are started again hang or fail; set it, or let "
            f"dtune start torchrun: launch.max_restarts={restarts}"
        )


def launch(job: JobSpec, launcher: LaunchConfig, stop: StopRequest) -> int:
    """Start a job, wait for its end unless it is only submitted; the exit code of ``dtune``."""
    ended: list[int] = []

    def in_process(arguments: list[str]) -> int:
        with uncollected():
            from dtune.worker import main

        ended.append(main(arguments, stop))
        return ended[0]

    # From here on it is for the ranks to stop, which are told.
    stop.install()
    try:
        code = launcher.start(job, in_process, lambda: stop.is_set)
    except LaunchError as error:
        withdraw_start(job.run_dir)
        raise ConfigError(str(error)) from error
    if code is None and stop.is_set:
        folder = shlex.quote(str(job.run_dir))
        sys.stderr.write(
            f"dtune: {stop.signal_name} came while the job was submitted, and the job is in the "
            f"queue: dtune cancel {folder} ends it\n"
        )
    if code is None or ended:
        return code or 0
    return _answer(job.run_dir, code, is_stopped=stop.is_set or code in STOPPED)


def _answer(run_dir: Path, code: int, *, is_stopped: bool) -> int:
    """Exit code of a run that has ended, which says on the terminal what its ranks could not."""
    if not (run_dir / "status.json").is_file():
        return code or 1
    status, damage = status_of(run_dir)
    if damage:
        sys.stderr.write(f"dtune: {damage}\n")
        return code or 1
    if status.state is State.running and is_stopped:
        # The ranks ended before they could say it: there was nothing to save.
        status = Status(State.preempted, step=status.step)
        write_status(run_dir, status)
    if status.state in (State.config_error, State.diverged):
        sys.stderr.write(f"dtune: {status.message}\n")
    elif status.state is State.failed and status.rank:
        # The first rank has said its own.
        failed = f"rank {status.rank} failed at step {status.step}: {status.message}"
        sys.stderr.write(f"dtune: {failed}\n{status.traceback}")
    return EXIT_CODES[status.state]


def _run_as_rank(argv: list[str], stop: StopRequest) -> int:
    """This process was started by torchrun: the first rank composes, the others are told."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    text = ""
    if rank == 0:
        check_agent(os.environ)
        composed = compose("train", argv)
        if composed is None:
            raise ConfigError("under torchrun dtune trains one run; start sweeps as dtune train -m")
        text = composed
        config = load_frozen(text)
        check_run(config, world_size)
        # Slurm may show each task its own GPU alone.
        if "DTUNE_SRUN" not in os.environ or count_gpus() != 1:
            check_gpus(int(os.environ["LOCAL_WORLD_SIZE"]))
        with occupied_run_folder(config, text, command=["dtune", "train", *argv]):
            return _join_ranks(text, stop)
    return _join_ranks(text, stop)


def _join_ranks(text: str, stop: StopRequest) -> int:
    """Train as one rank of several; the first gives the config to the others."""
    # Only now, because the first rank answers a wrong config before torch is imported.
    with uncollected():
        from dtune.runtime.world import World
        from dtune.worker import run_worker

    world = World.start()
    config = load_frozen(world.broadcast(text))
    return run_worker(config, world, stop=stop)
