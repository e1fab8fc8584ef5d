"""From a job to Slurm's script, and its submission.

What a script does is written once, in ``job.sh``: `render_script` fills it for runs whose config
is frozen, and `render_manual_script` for ``slurm/train.sbatch``, which is used by hand.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dtune_launch.record import JobRecord, read_record, write_record
from dtune_launch.slurm_queries import ALIVE, explain_refusal, job_state, run_client
from dtune_launch.spec import JobSpec, LaunchError

if TYPE_CHECKING:
    from dtune_launch.schema.slurm import SlurmConfig

SCRIPT = "job.sbatch"
MODULE = "dtune.worker"
_TEMPLATE = Path(__file__).with_name("job.sh")
# sbatch waits about so long for a controller that does not answer.
_SUBMIT_SECONDS = 60.0

_AGENT = """\
srun --kill-on-bad-exit=1 --open-mode=append --output="$logs/node-%n.log" "${srun_options[@]}" \\
  bash -c "$on_node" "$run_dir" "$listens" "${wrap[@]}" "$python" -m dtune_launch.agent \\
  --nnodes="$SLURM_NNODES" --nproc-per-node="$nproc" --max-restarts="$max_restarts" \\
  --rdzv-backend=c10d --rdzv-endpoint="${addresses[0]}:$port" --rdzv-id="$SLURM_JOB_ID.$restart" \\
  --log-dir="$logs" --module "${ranks[@]}\""""
_TASKS = """\
srun --kill-on-bad-exit=1 --open-mode=append --output="$logs/task-%t.log" "${srun_options[@]}" \\
  bash -c "$on_node" "$run_dir" "$listens" "${wrap[@]}" \\
  "$python" -m dtune_launch.srun "${ranks[@]}\""""


@dataclass(frozen=True)
class Submitted:
    """A job that Slurm has taken."""

    job_id: str
    script: Path
    log: Path
    """Of its batch script."""


def render_script(
    config: SlurmConfig,
    folders: Mapping[int, Path],
    *,
    nproc: int,
    name: str,
    logs: Path,
    is_array: bool = False,
    at_once: int = 0,
) -> str:
    """The script of a job that trains runs whose config is frozen: a pure function.

    Args:
        config: Resources and the like, the same for all runs.
        folders: Run folder of each element of the array; of a job that is none, one, under 0.
        nproc: Processes of each node.
        name: Name of the job.
        logs: Folder of the log of the batch script, or of those of the elements.
        is_array: Whether the job is an array, of one element too.
        at_once: Elements that may run at the same time; 0: as many as the cluster lets.
    """
    assert is_array or list(folders) == [0], folders
    array = _array(sorted(folders), at_once) if is_array else ""
    output = Path(str(logs).replace("%", "%%")) / ("%x-%A_%a.out" if is_array else "%x-%j.out")
    options = _sbatch_options(config, nproc, name, output, array)
    header = [
        "#!/bin/bash",
        "# Written by dtune. `sbatch` of this file goes on with what it trains.",
        *(f"#SBATCH {option}" for option in options),
    ]
    return _fill(
        "\n".join(header),
        "\n".join(_settings(config, folders, nproc, is_array)),
        _AGENT if config.has_agent else _TASKS,
    )


def log_path(logs: Path, name: str, job_id: str) -> Path:
    """Where the batch script of a job, or of an element ``<array>_<element>``, writes to."""
    return logs / f"{name}-{job_id}.out"


def job_name(config: SlurmConfig, run_dir: Path) -> str:
    """Name of the job of a run: ``launch.job_name``, or that of its folder."""
    return config.job_name or "".join(c if c.isalnum() or c in "._-" else "-" for c in run_dir.name)


def _sbatch_options(
    config: SlurmConfig, nproc: int, name: str, output: Path, array: str
) -> list[str]:
    tasks, cores = (1, nproc) if config.has_agent else (nproc, 1)
    gpus = f"{config.gpu_type}:{config.gpus_per_node}".lstrip(":")
    wanted = {
        "--job-name": name,
        "--array": array,
        "--partition": config.partition,
        "--account": config.account,
        "--qos": config.qos,
        "--constraint": config.constraint,
        "--nodes": str(config.nodes),
        "--ntasks-per-node": str(tasks),
        "--cpus-per-task": str(cores * config.cpus_per_process or ""),
        "--gres": f"gpu:{gpus}" if config.gres and config.gpus_per_node else "",
        "--gpus-per-node": gpus if not config.gres and config.gpus_per_node else "",
        "--mem": config.memory,
        "--time": config.time,
        "--output": str(output),
        "--open-mode": "append",
        # To the batch shell alone: torchrun's agent dies of it.
        "--signal": f"B:USR1@{config.signal_seconds}",
    }
    given = [f"{key}={_quoted(value)}" for key, value in wanted.items() if value]
    return [*given, "--requeue", *config.sbatch_options]


def _quoted(value: str) -> str:
    """A value as sbatch reads it from a script: it knows quotes, and shell variables not."""
    return f'"{value}"' if set(value) & set(" '#;\\") else value


def _array(elements: Sequence[int], at_once: int) -> str:
    """``0-3,7%2``: the elements, and how many of them run at the same time."""
    spans: list[list[int]] = []
    for element in elements:
        if spans and element == spans[-1][1] + 1:
            spans[-1][1] = element
        else:
            spans.append([element, element])
    text = ",".join(f"{a}-{b}" if a < b else str(a) for a, b in spans)
    return f"{text}%{at_once}" if at_once else text


def _settings(
    config: SlurmConfig, folders: Mapping[int, Path], nproc: int, is_array: bool
) -> list[str]:
    cores = f"${{SLURM_CPUS_PER_TASK:-{nproc if config.has_agent else 1}}}"
    lines = [f"module load {shlex.quote(module)}" for module in config.modules]
    lines += config.setup
    if is_array:
        lines += ["case $SLURM_ARRAY_TASK_ID in"]
        lines += [f"  {n}) run_dir={shlex.quote(str(folders[n]))} ;;" for n in sorted(folders)]
        lines += ["esac"]
    else:
        lines += [f"run_dir={shlex.quote(str(folders[0]))}"]
    lines += [
        f"python={shlex.quote(config.python or sys.executable)}",
        f"nproc={nproc}",
        f"cores=$((({cores} + {nproc} - 1) / {nproc}))" if config.has_agent else f"cores={cores}",
        *([f"max_restarts={config.max_restarts}"] if config.has_agent else []),
        f"max_requeues={config.max_requeues}",
        f"srun_options=({shlex.join(config.srun_options)})",
        f"wrap=({shlex.join(config.wrap)})",
        f'ranks=({MODULE} "$run_dir")',
        "# An attempt before this one, of this job or of another with this script, got somewhere.",
        "if [[ -d $run_dir/checkpoints ]]; then",
        "  export DTUNE_GOES_ON=1",
        "fi",
        "# It may come late, and where this disk is another than the submitting machine's, never.",
        "for _ in $(seq 60); do",
        "  if [[ -f $run_dir/config.yaml ]]; then break; fi",
        "  sleep 0.5",
        "done",
        "if [[ ! -f $run_dir/config.yaml ]]; then",
        '  say "$(hostname) does not see $run_dir/config.yaml: name a run_dir on a shared disk"',
        "  exit 2",
        "fi",
        'frozen=$(<"$run_dir/config.yaml")',
    ]
    return lines


def _fill(header: str, settings: str, launch: str) -> str:
    text = _TEMPLATE.read_text(encoding="utf-8")
    for mark, value in (("@HEADER@", header), ("@SETTINGS@", settings), ("@LAUNCH@", launch)):
        before, found, after = text.partition(f"{mark}\n" if mark != "@LAUNCH@" else mark)
        assert found, mark
        text = before + (value if mark == "@LAUNCH@" else f"{value}\n") + after
    return text


def try_submission(config: SlurmConfig, job: JobSpec) -> None:
    """Write the script of a run into its folder and ask sbatch whether it would take it.

    Raises LaunchError with Slurm's own words where it would not, or where a job of this run waits
    or runs already.
    """
    before = read_record(job.run_dir)
    state = job_state(before.job_id) if before else ""
    if before and state.startswith(ALIVE):
        raise LaunchError(
            f"run_dir={job.run_dir} has a job already: {before.job_id} is {state}; "
            f"end it by dtune cancel {job.run_dir}, or name another run_dir"
        )
    script = job.run_dir / SCRIPT
    try:
        # Slurm does not make the folder of its log, and says nothing where it is absent.
        (job.run_dir / "logs").mkdir(parents=True, exist_ok=True)
        script.write_text(script_of(config, job), encoding="utf-8")
    except OSError as error:
        raise LaunchError(f"run_dir={job.run_dir} cannot be written: {error.strerror}") from error
    submit_script(script, only_try=True)


def submit(config: SlurmConfig, job: JobSpec) -> Submitted:
    """Submit the script of a run that `try_submission` has written, and say what it became.

    Raises LaunchError with Slurm's own words where it refuses the job.
    """
    script, name, logs = job.run_dir / SCRIPT, job_name(config, job.run_dir), job.run_dir / "logs"
    job_id = submit_script(script)
    write_record(job.run_dir, JobRecord(config.name, job_id, str(script), time.time()))
    log = log_path(logs, name, job_id)
    folder = shlex.quote(str(job.run_dir))
    sys.stdout.write(
        f"job {job_id} ({name}): {config.nodes} x {job.nproc} processes\n"
        f"script    {script}\n"
        f"job's log {log}\n"
        f"rank logs {logs}/rank-*.log\n"
        f"watch it: dtune status {folder}, dtune logs {folder} -f; end it: dtune cancel {folder}\n"
    )
    return Submitted(job_id, script, log)


def submit_script(script: Path, *, only_try: bool = False) -> str:
    """Hand a script to sbatch; the id of its job. LaunchError with Slurm's words if it refuses.

    ``only_try`` asks whether it would be taken, and submits nothing.
    """
    command = ["sbatch", "--parsable", *(["--test-only"] if only_try else []), str(script)]
    done = run_client(command, seconds=_SUBMIT_SECONDS)
    if done.returncode:
        raise LaunchError(explain_refusal(done.stderr, script))
    return done.stdout.strip().partition(";")[0]


def script_of(config: SlurmConfig, job: JobSpec) -> str:
    """The script of a job of one run."""
    return render_script(
        config,
        {0: job.run_dir},
        nproc=job.nproc,
        name=job_name(config, job.run_dir),
        logs=job.run_dir / "logs",
    )


def describe_submission(config: SlurmConfig, job: JobSpec) -> str:
    """What a shell would run to submit a job: its script written, and handed to sbatch."""
    script = shlex.quote(str(job.run_dir / SCRIPT))
    logs = shlex.quote(str(job.run_dir / "logs"))
    end = "END_OF_SCRIPT"
    text = script_of(config, job)
    return f"mkdir -p {logs}\ncat >{script} <<'{end}'\n{text}{end}\nsbatch {script}"


_MANUAL_HEADER = """\
#!/bin/bash
# Trains with dtune on one or several nodes; saves and requeues itself at the time limit.
#
#   sbatch --nodes=2 --gpus-per-node=8 --cpus-per-task=64 --time=4:00:00 slurm/train.sbatch \\
#       model=llama3_8b parallel=fsdp precision=bf16 run_dir=/shared/runs/first
#
# Arguments go to `dtune train`. The environment that holds dtune must be active when sbatch is
# called, or DTUNE_PYTHON name its interpreter. run_dir must lie where every node sees it.
# Written by `python -m dtune_launch.slurm`, from launch/dtune_launch/job.sh.
#SBATCH --job-name=dtune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# To the batch shell alone: torchrun's agent dies of it. In time for a step and a save.
#SBATCH --signal=B:USR1@180"""

_MANUAL_SETTINGS = """\
python=${DTUNE_PYTHON:-python}
nproc=${DTUNE_NPROC:-${SLURM_GPUS_ON_NODE:-1}}
cores=$(((${SLURM_CPUS_PER_TASK:-$nproc} + nproc - 1) / nproc))
max_restarts=${DTUNE_MAX_RESTARTS:-0}
max_requeues=${DTUNE_MAX_REQUEUES:-50}
srun_options=()
wrap=()

run_dir=$SLURM_SUBMIT_DIR/runs/$SLURM_JOB_NAME-$self
settings=()
for setting in "$@"; do
  case $setting in
    run_dir=*) run_dir=${setting#run_dir=} ;;
    *) settings+=("$setting") ;;
  esac
done
settings+=("run_dir=$run_dir")
if [[ " ${settings[*]} " != *" resume="* ]]; then
  settings+=(resume=auto)  # A requeued job runs this script with the same arguments again.
fi
# A wrong setting ends the job here, with its message, before the nodes are set to work.
frozen=$("$python" -m dtune config "${settings[@]}")
ranks=(dtune train "${settings[@]}")
"""


def render_manual_script() -> str:
    """``slurm/train.sbatch``, which takes the settings of ``dtune train`` as its arguments."""
    return _fill(_MANUAL_HEADER, _MANUAL_SETTINGS, _AGENT)


if __name__ == "__main__":
    sys.stdout.write(render_manual_script())
