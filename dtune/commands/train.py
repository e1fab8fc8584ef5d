"""``dtune train``: compose, check, freeze, launch."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from dtune_launch.gpus import count_gpus, resolve_nproc
from dtune_launch.local import describe_job, run_job
from dtune_launch.spec import JobSpec

from dtune.config.compose import compose
from dtune.config.freeze import load_frozen
from dtune.config.support import check_run
from dtune.errors import ConfigError
from dtune.run_folder import start_run_folder
from dtune.runtime.status import EXIT_CODES, State, read_status


def run(argv: list[str]) -> int:
    """Train as the settings say; the exit code of ``dtune``."""
    if "RANK" in os.environ:
        return _run_as_rank(argv)
    text = compose("train", argv)
    if text is None:
        return 0
    config = load_frozen(text)
    world_size = resolve_nproc(config.launch, engine=config.parallel.name)
    check_run(config, world_size)
    job = JobSpec(
        module="dtune.worker",
        arguments=(config.run_dir,),
        run_dir=Path(config.run_dir),
        nproc=world_size,
        max_restarts=config.launch.max_restarts,
    )
    if config.launch.dry_run:
        sys.stdout.write(describe_launch(job, argv) + "\n")
        return 0
    check_gpus(world_size)
    start_run_folder(config, text, command=["dtune", "train", *argv])
    return launch(job)


def describe_launch(job: JobSpec, settings: Sequence[str]) -> str:
    """What a shell would run in place of dtune: freeze the config, then start the job on it."""
    own = ("run_dir=", "launch.dry_run=")
    given = [setting for setting in settings if not setting.lstrip("+").startswith(own)]
    config = [sys.executable, "-m", "dtune", "config", *given, f"run_dir={job.run_dir}"]
    folder = shlex.quote(str(job.run_dir))
    freezing = f"mkdir -p {folder} && {shlex.join(config)} > {folder}/config.yaml"
    return f"{freezing}\n{describe_job(job)}"


def check_gpus(processes: int) -> None:
    """Raise ConfigError where the processes of this machine are more than its GPUs, if any."""
    gpus = count_gpus()
    if 0 < gpus < processes:
        raise ConfigError(
            f"launch.nproc={processes} is above the {gpus} GPUs that are visible here; set "
            f"launch.nproc={gpus}, or CUDA_VISIBLE_DEVICES"
        )


def launch(job: JobSpec) -> int:
    """Run a job on this machine: in this process for one rank, through torchrun for several."""
    if job.nproc == 1 and job.max_restarts == 0:
        from dtune.worker import main

        return main(list(job.arguments))
    code = run_job(job)
    status = read_status(job.run_dir) if (job.run_dir / "status.json").is_file() else None
    if status is None:
        return code or 1
    if status.state in (State.config_error, State.diverged):
        sys.stderr.write(f"dtune: {status.message}\n")
    return EXIT_CODES[status.state]


def _run_as_rank(argv: list[str]) -> int:
    """This process was started by torchrun: the first rank composes, the others are told."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    text = ""
    if rank == 0:
        composed = compose("train", argv)
        if composed is None:
            raise ConfigError("under torchrun dtune trains one run; start sweeps as dtune train -m")
        text = composed
        config = load_frozen(text)
        check_run(config, world_size)
        check_gpus(int(os.environ["LOCAL_WORLD_SIZE"]))
        start_run_folder(config, text, command=["dtune", "train", *argv])
    # Only now, because the first rank answers a wrong config before torch is imported.
    from dtune.runtime.world import World
    from dtune.worker import run_worker

    world = World.start()
    config = load_frozen(world.broadcast(text))
    return run_worker(config, world)
