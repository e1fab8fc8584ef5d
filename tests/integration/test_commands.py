"""The commands as a user types them, each in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen, read_frozen
from dtune.resources import resolve_path
from dtune.runtime.status import State, read_status
from dtune.train.sinks.jsonl import read_metrics

SHORT = [
    "train.max_steps=2",
    "train.global_batch_size=4",
    "data.max_length=64",
    "evaluate.generate=false",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def call(
    *command: str, cwd: Path, cache: Path, module: bool = True
) -> subprocess.CompletedProcess[str]:
    prefix = [sys.executable, "-m", "dtune"] if module else []
    return subprocess.run(
        [*prefix, *command],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "DTUNE_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
    )


def held_out(folder: Path) -> str:
    path = folder / "heldout.jsonl"
    with open(resolve_path("dtune://instructions/heldout.jsonl"), encoding="utf-8") as file:
        path.write_text("".join(islice(file, 8)), encoding="utf-8")
    return f"data.eval_path={path}"


def test_train_writes_the_whole_run_folder(tmp_path: Path, cache: Path) -> None:
    done = call("train", "run_dir=run", held_out(tmp_path), *SHORT, cwd=tmp_path, cache=cache)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert read_status(run).state is State.done
    assert read_status(run).step == 2
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == result["total_steps"] == 2
    assert Path(result["export"]) == run / "adapter"
    environment = json.loads((run / "env.json").read_text())
    assert environment["command"][:2] == ["dtune", "train"]
    assert environment["versions"]["torch"]
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "report.md",
        "logs/rank-0.log",
        "checkpoints/LATEST",
    ):
        assert (run / name).is_file(), name
    for line in ("held-out loss", "tokens/s", str(run / "adapter"), str(run / "report.md")):
        assert line in done.stderr
    again = call("train", "run_dir=run", *SHORT, cwd=tmp_path, cache=cache)
    assert again.returncode == 2
    assert "not empty; set resume=auto" in again.stderr


@pytest.mark.parametrize("launched", ["by dtune", "by torchrun"])
def test_two_processes_train_one_run(launched: str, tmp_path: Path, cache: Path) -> None:
    settings = ["train", "run_dir=run", "parallel=fsdp", held_out(tmp_path), *SHORT]
    if launched == "by dtune":
        done = call(*settings, "launch.nproc=2", cwd=tmp_path, cache=cache)
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        done = call(
            *torchrun,
            "--nproc-per-node=2",
            "-m",
            "dtune",
            *settings,
            cwd=tmp_path,
            cache=cache,
            module=False,
        )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [1, 2]
    assert (run / "logs" / "rank-1.log").is_file()
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert read_frozen(run).parallel.name == "fsdp"


def test_a_wrong_setting_under_torchrun_is_said_once(tmp_path: Path, cache: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = call(
        *torchrun,
        "--nproc-per-node=2",
        "-m",
        "dtune",
        "train",
        "peft.rnk=8",
        cwd=tmp_path,
        cache=cache,
        module=False,
    )
    assert done.returncode != 0
    assert done.stderr.count("unknown key peft.rnk; did you mean peft.rank") == 1


def test_plan_says_what_a_run_would_do(tmp_path: Path, cache: Path) -> None:
    done = call(
        "plan",
        "parallel=ddp",
        "launch.nproc=4",
        "train.global_batch_size=16",
        "train.micro_batch_size=2",
        "train.epochs=2",
        cwd=tmp_path,
        cache=cache,
    )
    assert done.returncode == 0, done.stderr
    config, _, numbers = done.stdout.rpartition("\n\n")
    assert load_frozen(config).train.epochs == 2.0
    assert "16 = 2 micro x 2 accumulated x 4 ranks" in numbers
    assert "28 x LoraLinear" in numbers
    assert "trained" in numbers
    assert "torch: no patches" in numbers
    assert not list(tmp_path.iterdir()), "plan leaves nothing behind"


# Parameters of the published models.
PUBLISHED = {
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "qwen3_8b": 8_190_735_360,
    "mistral_7b": 7_248_023_552,
}


@pytest.mark.parametrize("model", sorted(PUBLISHED))
def test_embedded_architectures_are_those_of_the_published_models(model: str) -> None:
    import torch

    path = load_frozen(compose_overrides("train", [f"model={model}"])).model.path
    folder = Path(resolve_path("dtune://architectures")) / path.replace("/", "--")
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert sum(p.numel() for p in built.parameters()) == PUBLISHED[model]


def test_plan_of_a_model_that_is_out_of_reach(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    done = call(
        "plan",
        "experiment=llama3_70b",
        "data.path=rows.jsonl",
        "launch.nproc=8",
        cwd=tmp_path,
        cache=cache,
    )
    assert done.returncode == 0, done.stderr
    assert "70,553,706,496 parameters" in done.stdout
    assert "known once data are tokenised" in done.stdout


def test_doctor_and_config_print_and_take_no_run_folder(tmp_path: Path, cache: Path) -> None:
    doctor = call("doctor", cwd=tmp_path, cache=cache)
    assert doctor.returncode == 0
    assert "torch" in doctor.stdout
    config = call("config", "peft=full", cwd=tmp_path, cache=cache)
    assert load_frozen(config.stdout).peft.name == "full"
    job = call("config", "--cfg", "job", "-p", "optim", cwd=tmp_path, cache=cache)
    assert "lr: 0.0001" in job.stdout
    assert not list(tmp_path.iterdir())


def test_dry_run_prints_what_a_shell_can_run_and_starts_nothing(
    tmp_path: Path, cache: Path
) -> None:
    settings = ["run_dir=my run", "parallel=ddp", "launch.nproc=2", *SHORT]
    done = call("train", *settings, "launch.dry_run=true", cwd=tmp_path, cache=cache)
    assert done.returncode == 0
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in done.stdout
    run = tmp_path / "my run"
    assert not run.exists()
    shell = call("bash", "-ec", done.stdout, cwd=tmp_path, cache=cache, module=False)
    assert shell.returncode == 0, shell.stderr
    assert read_status(run).state is State.done
    assert not read_frozen(run).launch.dry_run


def test_a_folder_of_ones_own_configs_is_found(tmp_path: Path, cache: Path) -> None:
    mine = tmp_path / "mine" / "optim"
    mine.mkdir(parents=True)
    (mine / "slow.yaml").write_text("defaults: [schema/sgd@_here_, _self_]\nlr: 0.5\n")
    given = call(
        "config", "optim=slow", "hydra.searchpath=[file://mine]", cwd=tmp_path, cache=cache
    )
    assert given.returncode == 0, given.stderr
    assert load_frozen(given.stdout).optim.lr == 0.5
