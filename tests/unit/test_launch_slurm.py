"""From a job to Slurm's script, word for word: pure functions, compared with files.

``DTUNE_WRITE_GOLDEN=1 python -m pytest tests/unit/test_launch_slurm.py`` writes the files anew, and
``slurm/train.sbatch``: read their difference before it is committed.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from dtune_launch.schema.slurm import SlurmConfig
from dtune_launch.schema.slurm_srun import SlurmSrunConfig
from dtune_launch.schema.torchrun import TorchrunConfig
from dtune_launch.slurm import (
    describe_submission,
    job_name,
    render_manual_script,
    render_script,
    script_of,
)
from dtune_launch.slurm_queries import ALIVE, Nodes, check_nodes, explain_refusal, parse_nodes
from dtune_launch.spec import JobSpec, LaunchError
from dtune_launch.srun import is_task, rank_variables
from dtune_launch.torchrun import node_options, torchrun_command

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("golden")
# Of the environment that runs the tests, which need not be on PATH.
SHELLCHECK = str(Path(sys.executable).with_name("shellcheck"))
WRITE = os.environ.get("DTUNE_WRITE_GOLDEN") == "1"
PYTHON = "/venv/bin/python"
RUN = Path("/shared/runs/first")

FULL = SlurmConfig(
    nodes=2,
    gpus_per_node=8,
    gpu_type="h100",
    cpus_per_process=8,
    memory="0",
    time="1-12:00:00",
    partition="gpu",
    account="lab",
    qos="high",
    constraint="ib&nvme",
    job_name="first",
    modules=["cuda/12.4", "my module"],
    setup=["HF_TOKEN=$(cat ~/.hf) && export HF_TOKEN", "ulimit -n 65536"],
    wrap=["apptainer", "exec", "--nv", "/images/d tune.sif"],
    srun_options=["--container-image=/images/dtune.sqsh", "--container-mounts=/shared"],
    sbatch_options=["--exclusive"],
    python=PYTHON,
    signal_seconds=300,
    max_requeues=7,
    max_restarts=2,
)
SPACED = Path("/shared/my runs/it's 100%")


def of_run(config: SlurmConfig, run_dir: Path = RUN, nproc: int = 8) -> str:
    return script_of(config, JobSpec("dtune.worker", (str(run_dir),), run_dir, nproc=nproc))


SCRIPTS = {
    "slurm.sbatch": of_run(SlurmConfig(python=PYTHON), nproc=1),
    "slurm-full.sbatch": of_run(FULL),
    "slurm-srun.sbatch": of_run(
        SlurmSrunConfig(nodes=2, gpus_per_node=4, cpus_per_process=2, gres=True, python=PYTHON),
        nproc=4,
    ),
    "slurm-spaces.sbatch": of_run(SlurmConfig(python="/my venv/bin/python"), SPACED, 1),
    "slurm-array.sbatch": render_script(
        SlurmConfig(python=PYTHON),
        {n: Path(f"/shared/sweep/{n}") for n in (0, 1, 2, 5)},
        nproc=1,
        name="sweep",
        logs=Path("/shared/sweep/logs"),
        is_array=True,
        at_once=2,
    ),
}
BY_HAND = {"train.sbatch": render_manual_script()}


def compare(path: Path, text: str) -> None:
    if WRITE:
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text, "see the head of this file"


@pytest.mark.parametrize("name", list(SCRIPTS))
def test_scripts_are_what_was_reviewed(name: str) -> None:
    compare(GOLDEN / name, SCRIPTS[name])


def test_the_script_for_use_by_hand_is_written_from_the_same_template() -> None:
    compare(ROOT / "slurm" / "train.sbatch", BY_HAND["train.sbatch"])


@pytest.mark.parametrize("name", [*SCRIPTS, *BY_HAND])
def test_scripts_parse_and_shellcheck_finds_nothing(name: str) -> None:
    text = {**SCRIPTS, **BY_HAND}[name]
    for command in (["bash", "-n", "/dev/stdin"], [SHELLCHECK, "--shell=bash", "-"]):
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), command


def test_the_script_knows_the_states_of_a_job_that_has_not_ended() -> None:
    found = re.search(r"case \$now in\n(.*?)\)\n", render_manual_script(), re.DOTALL)
    assert found
    assert sorted(re.findall(r"(\w+)\*", found[1])) == sorted(ALIVE)


def test_an_argument_with_spaces_and_quotes_stays_one(tmp_path: Path) -> None:
    """What bash makes of the settings is what was asked for."""
    text = of_run(dataclasses.replace(FULL, python=""), SPACED)
    start, end = text.index("run_dir="), text.index("ranks=(")
    shown = 'printf "%s\\n" "$run_dir" "${wrap[@]}" "${srun_options[@]}"'
    done = subprocess.run(
        ["bash", "-c", f"set -eu\n{text[start:end]}{shown}"], capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [str(SPACED), *FULL.wrap, *FULL.srun_options]


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"nodes": 0}, "launch.nodes=0"),
        ({"gpus_per_node": -1}, "launch.gpus_per_node=-1"),
        ({"nproc": "4", "gpus_per_node": 2}, "launch.nproc=4"),
        # 4:00:00 without quotes in a YAML file.
        ({"time": "14400"}, "launch.time=14400"),
        ({"time": "0:02:00", "signal_seconds": 180}, "launch.signal_seconds=180"),
        ({"memory": "all"}, "launch.memory=all"),
        ({"partition": "a b"}, "launch.partition=a b"),
        ({"modules": ["a\nb"]}, "launch.modules"),
        ({"sbatch_options": ["--reservation", "x"]}, "launch.sbatch_options: x"),
        ({"signal_seconds": 0}, "launch.signal_seconds=0"),
        ({"max_requeues": -1}, "launch.max_requeues=-1"),
    ],
)
def test_wrong_settings_of_slurm_name_their_key(wrong: dict[str, object], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        SlurmConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("time", ["4:00:00", "1-12:00:00", "2-4", "30:00", "UNLIMITED"])
def test_time_limits_are_written_as_slurm_reads_them(time: str) -> None:
    assert f"#SBATCH --time={time}\n" in of_run(SlurmConfig(time=time), nproc=1)


def test_ranks_of_srun_cannot_be_restarted() -> None:
    with pytest.raises(ValueError, match="use launch=slurm"):
        SlurmSrunConfig(max_restarts=1)


def test_dry_run_writes_the_script_that_is_submitted(tmp_path: Path) -> None:
    job = JobSpec("dtune.worker", ("RUN",), tmp_path / "my run")
    config = SlurmConfig(python=PYTHON)
    text = describe_submission(config, job)
    shell = f'sbatch() {{ echo "submitted $1"; }}\n{text}'
    done = subprocess.run(["bash", "-eu", "-c", shell], capture_output=True, text=True, check=True)
    script = tmp_path / "my run" / "job.sbatch"
    assert done.stdout == f"submitted {script}\n"
    assert script.read_text() == script_of(config, job)


def test_a_job_is_named_after_its_folder_in_letters_that_slurm_takes() -> None:
    assert job_name(SlurmConfig(), Path("/x/my run%1")) == "my-run-1"
    assert job_name(SlurmConfig(job_name="other"), RUN) == "other"


SINFO = """\
debug*|2|gpu:2(S:0-1)|8|1:00:00
big|3|gpu:a100:4,gpu:h100:8|64|2-00:00:00
big|5|(null)|128+|2-00:00:00
long|1|gpu:2|8|infinite
"""


def test_nodes_are_read_from_what_sinfo_says() -> None:
    assert parse_nodes(SINFO) == [
        Nodes("debug", True, 2, {"": 2}, 8, "1:00:00"),
        Nodes("big", False, 3, {"a100": 4, "h100": 8}, 64, "2-00:00:00"),
        Nodes("big", False, 5, {}, 128, "2-00:00:00"),
        Nodes("long", False, 1, {"": 2}, 8, "infinite"),
    ]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"gpus_per_node": 4}, "above the 2 GPUs that a node of partition debug has"),
        ({"nodes": 3}, "launch.nodes=3 is above the 2 nodes with 1 GPUs of partition debug"),
        ({"partition": "bigg"}, "launch.partition=bigg does not exist.*has big, debug, long"),
        ({"partition": "big", "nodes": 4}, "above the 3 nodes with 1 GPUs"),
        ({"partition": "big", "gpu_type": "a100", "gpus_per_node": 5}, "4 GPUs of type a100"),
        ({"partition": "big", "gpu_type": "b200"}, "above the 0 GPUs of type b200"),
        ({"time": "1:00:01"}, "launch.time=1:00:01 is above the 1:00:00 .*; set launch.time=1:00"),
        ({"partition": "debug,big", "time": "2-01:00:00"}, "time=2-01:00:00 is above the 2-00:00"),
        ({"time": "unlimited"}, "launch.time=unlimited is above the 1:00:00"),
    ],
)
def test_more_than_the_cluster_has_is_refused(asked: dict[str, object], said: str) -> None:
    with pytest.raises(LaunchError, match=said):
        check_nodes(SlurmConfig(**asked), parse_nodes(SINFO))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "asked",
    [
        {"gpus_per_node": 2, "nodes": 2},
        {"partition": "big", "nodes": 8, "gpus_per_node": 0},
        {"partition": "big,debug", "gpus_per_node": 8},
        {"time": "1:00:00"},
        {"partition": "big,debug", "time": "2-00:00:00"},
        {"partition": "long", "time": "9-00:00:00"},
        {"partition": "long", "time": "unlimited"},
        # Which may lift the limit of a partition.
        {"time": "2:00:00", "qos": "long"},
    ],
)
def test_what_the_cluster_has_is_not_refused(asked: dict[str, object]) -> None:
    check_nodes(SlurmConfig(**asked), parse_nodes(SINFO))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("Batch job submission failed: Invalid partition name specified", "launch.partition"),
        ("Invalid account or account/partition combination specified", "launch.account"),
        ("Job violates accounting/QOS policy", "launch.qos"),
        ("Requested time limit is invalid (missing or exceeds some limit)", "launch.time"),
        ("Invalid generic resource (gres) specification", "launch.gpus_per_node"),
        ("Memory specification can not be satisfied", "launch.memory"),
        ("Node count specification invalid", "launch.nodes"),
        ("Requested node configuration is not available", "launch.cpus_per_process"),
        ("unrecognized option '--exclusif'", "launch.sbatch_options"),
    ],
)
def test_a_refusal_has_the_words_of_slurm_the_script_and_the_likely_key(
    words: str, key: str
) -> None:
    text = explain_refusal(f"sbatch: error: {words}\n", RUN / "job.sbatch")
    assert words in text
    assert "/shared/runs/first/job.sbatch" in text
    assert key in text.partition("; see ")[2]


TASK = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "120033",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
}


def test_a_task_of_srun_becomes_a_rank() -> None:
    assert is_task(TASK)
    assert rank_variables(TASK, "10.0.0.1") == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "20033",
        "DTUNE_SRUN": "1",
    }
    given = rank_variables({**TASK, "MASTER_PORT": "29401"}, "10.0.0.1")
    assert given["MASTER_PORT"] == "29401"
    with pytest.raises(ValueError, match="ntasks-per-node"):
        rank_variables({**TASK, "SLURM_STEP_NUM_TASKS": "7"}, "10.0.0.1")


@pytest.mark.parametrize(
    "environ",
    [
        {},
        # A batch script, which is no step.
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"},
        # A shell in an allocation, srun --pty bash.
        {**TASK, "SLURM_STEP_NUM_TASKS": "1"},
        # A rank that torchrun has started in a task.
        {**TASK, "RANK": "0"},
    ],
)
def test_other_processes_in_a_job_are_no_tasks(environ: dict[str, str]) -> None:
    assert not is_task(environ)


def test_agents_of_a_job_know_their_address_and_who_is_host() -> None:
    job = {"DTUNE_NODE_ADDRESSES": "10.0.0.1 10.0.0.2"}
    assert node_options({}) == []
    assert node_options({**job, "SLURM_NODEID": "0"}) == [
        "--local-addr=10.0.0.1",
        "--rdzv-conf=is_host=1",
    ]
    assert node_options({**job, "SLURM_NODEID": "1"})[1] == "--rdzv-conf=is_host=0"


def test_torchrun_on_several_machines_meets_at_the_head() -> None:
    job = JobSpec("m", (), RUN, nproc=2, nodes=3, node_rank=1, head="h:29400", local_addr="1.2.3.4")
    command = torchrun_command(job)
    assert {"--nnodes=3", "--rdzv-endpoint=h:29400", "--local-addr=1.2.3.4"} <= set(command)
    assert "--rdzv-conf=is_host=0" in command
    head = dataclasses.replace(job, node_rank=0)
    assert "--rdzv-conf=is_host=1" in torchrun_command(head)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"nnodes": 2}, "launch.nnodes=2 needs launch.head=HOST:PORT"),
        ({"nnodes": 2, "head": "h"}, "launch.head=h must be HOST:PORT"),
        ({"nnodes": 2, "head": "h:99999"}, "launch.head=h:99999"),
        ({"nnodes": 2, "head": "h:1", "node_rank": 2}, "launch.node_rank=2 must be 0 to 1"),
        ({"nnodes": 0}, "launch.nnodes=0"),
        (
            {"head": "h:29400"},
            "launch.head=h:29400 is for several .*launch.nnodes=1; set launch.nn",
        ),
    ],
)
def test_wrong_settings_of_torchrun_name_their_key(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TorchrunConfig(**wrong)  # type: ignore[arg-type]
