"""``dtune cancel``: a run saves and stops, wherever it runs."""

from __future__ import annotations

import os
import shutil
import signal
import sys

from dtune_launch.local import kill_tree
from dtune_launch.slurm_queries import ALIVE, run_client

from dtune.commands.running import Standing, find_run, parser, read_standing
from dtune.errors import ConfigError
from dtune.runtime.processes import this_machine

_DESCRIPTION = "Ask a run to save and stop; the same command with resume=auto goes on with it."
_SCANCEL_SECONDS = 30.0


def run(argv: list[str]) -> int:
    """Signal the job of a run, or its process on this machine."""
    made = parser("cancel", _DESCRIPTION)
    made.add_argument("--now", action="store_true", help="end it at once, without saving")
    options = made.parse_args(argv)
    it = read_standing(find_run(options.runs[0]))
    if not it.is_alive:
        raise ConfigError(f"{it.folder} does not run: it is {it.state}")
    if it.job is not None and it.job_state.startswith(ALIVE):
        cancel_job(it.job.job_id, pending=it.state == "waiting", now=options.now)
    else:
        _cancel_process(it, now=options.now)
    return 0


def cancel_job(job_id: str, *, pending: bool, now: bool) -> None:
    """End a job; one that runs saves first unless ``now``, and is not requeued."""
    if now or pending:
        command = ["scancel", job_id]
        said = f"job {job_id} is cancelled"
    else:
        # To the script alone, which passes it on to the ranks and does not requeue the job.
        command = ["scancel", "--batch", "--signal=USR2", job_id]
        said = f"job {job_id} saves and stops; --now does not wait for that"
    if shutil.which("scancel") is None:
        raise ConfigError(f"job {job_id} is Slurm's, and scancel is not on the PATH here")
    done = run_client(command, seconds=_SCANCEL_SECONDS)
    if done.returncode:
        raise ConfigError(f"Slurm did not cancel job {job_id}: {done.stderr.strip()}")
    sys.stdout.write(f"{said}\n")


def _cancel_process(it: Standing, *, now: bool) -> None:
    if not it.holders:
        raise ConfigError(f"{it.folder}: no process of the run is known")
    # The first started the others, and passes signals on to all of them.
    first = it.holders[0]
    if first.machine != this_machine():
        raise ConfigError(
            f"{it.folder} runs elsewhere: call dtune cancel there, {first.describe()}"
        )
    if now:
        kill_tree(first.pid)
        sys.stdout.write(f"killed {first.describe()}\n")
        return
    os.kill(first.pid, signal.SIGUSR1)
    sys.stdout.write(f"{first.describe()} saves and stops; dtune status {it.folder} tells when\n")
