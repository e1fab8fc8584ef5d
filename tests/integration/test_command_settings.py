"""What plan, eval and train make of their settings, in this process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from dtune.cli import main
from dtune.commands import train
from dtune.resources import resolve_path
from dtune.runtime import capabilities
from tests.integration.train_runs import held_out, read_json, settings


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full run of several ranks, as its config says, whose base is gone."""
    folder = tmp_path_factory.mktemp("full")
    base = folder / "base"
    shutil.copytree(resolve_path("dtune://tiny"), base)
    argv = settings(folder / "run", held_out(folder), f"model.path={base}", "peft=full")
    assert main(["train", *argv]) == 0
    shutil.rmtree(base)
    config = folder / "run" / "config.yaml"
    frozen = yaml.safe_load(config.read_text())
    frozen["parallel"], frozen["optim"] = {"name": "zero3"}, {"name": "adamw8bit"}
    frozen["log"]["tensorboard"] = True
    config.write_text(yaml.safe_dump(frozen))
    return folder / "run"


def test_a_full_run_is_evaluated_without_its_base_and_packages_of_training(
    full_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capabilities, "is_installed", lambda module: False)
    assert main(["eval", f"run_dir={full_run}"]) == 0
    loss = read_json(full_run / "eval.json")["loss"]
    # The export is in the dtype of its base, fp16.
    assert loss == pytest.approx(read_json(full_run / "result.json")["after"]["loss"], rel=1e-3)
    assert main(["eval", f"run_dir={full_run}", "precision=bf16"]) == 0
    assert read_json(full_run / "eval.json")["loss"] not in (loss, 0)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("data=alpaca", "data=alpaca: the data of a run is frozen"),
        ("peft=lora", "set keys of it, such as peft."),
        ("quant=none", "the quant of a run is frozen"),
        ("parallel=fsdp", "runs in one process: leave parallel=fsdp out"),
        ("launch.nproc=2", "runs in one process: leave launch.nproc=2 out"),
        ("precision=bf61", "did you mean precision.name=bf16"),
    ],
)
def test_eval_says_why_it_does_not_take_a_setting(
    full_run: Path, setting: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", f"run_dir={full_run}", setting]) == 2
    assert said in capsys.readouterr().err


def test_plan_counts_no_more_than_the_epochs_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"instruction": "Say it.", "input": "", "output": "it"}] * 10
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["data=alpaca", f"data.path={data}", "data.packing=false", "train.micro_batch_size=4",
            "train.global_batch_size=4"]  # fmt: skip
    told = {}
    for length in ("train.epochs=1", "train.max_steps=3", "train.epochs=0.5"):
        assert main(["plan", *argv, length]) == 0
        lines = capsys.readouterr().out.splitlines()
        told[length] = next(line for line in lines if line.startswith("steps "))
    assert told["train.epochs=1"].endswith("3 of 4 sequences = 1.00 epochs")
    assert told["train.max_steps=3"].endswith("3 of 4 sequences = 1.20 epochs")
    assert told["train.epochs=0.5"].endswith("2 of 4 sequences = 0.50 epochs")


def test_more_processes_than_gpus_are_refused_before_the_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "count_gpus", lambda: 1)
    argv = settings(tmp_path / "run", "parallel=ddp", "launch.nproc=2")
    assert main(["train", *argv]) == 2
    assert "launch.nproc=2 is above the 1 GPUs" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    train.check_gpus(1)
    monkeypatch.setattr(train, "count_gpus", lambda: 0)
    train.check_gpus(2)
