"""From a command line to cases: labels, settings, and wrong ones named before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtune.bench.cases import Case, label_cases, plan_cases
from dtune.bench.schema import BenchConfig
from dtune.cli import main
from dtune.config.freeze import load_frozen
from dtune.errors import ConfigError


@pytest.fixture
def plan(tmp_path: Path):
    def run(*settings: str) -> list[Case]:
        return plan_cases([*settings, f"bench.out={tmp_path}/out"])

    return run


def test_a_sweep_comes_to_a_case_for_each_combination(plan) -> None:
    cases = plan("peft=lora,qlora", "train.micro_batch_size=1,2", "seed=3", "-m")
    assert [case.label for case in cases] == [
        "peft=lora train.micro_batch_size=1",
        "peft=lora train.micro_batch_size=2",
        "peft=qlora train.micro_batch_size=1",
        "peft=qlora train.micro_batch_size=2",
    ]
    assert [case.run.quant.name for case in cases] == ["none", "none", "nf4", "nf4"]
    assert [case.run.train.micro_batch_size for case in cases] == [1, 2, 1, 2]
    assert cases[0].run.seed == 3


def test_one_case_is_named_by_its_method(plan) -> None:
    (case,) = plan("experiment=quickstart", "bench.steps=7")
    assert case.label == "peft=lora"
    assert case.bench.steps == 7
    assert case.run.data.max_length == 64


def test_each_method_has_its_rate_where_it_has_one(plan) -> None:
    lora, full = plan("peft=lora,full", "bench.rates.full=2e-4", "optim.lr=5e-3", "-m")
    assert (lora.run.optim.lr, full.run.optim.lr) == (5e-3, 2e-4)
    assert full.settings["optim.lr"] == 2e-4
    # And so has what its ranks read.
    assert load_frozen(full.text_in(Path("/none"))).optim.lr == 2e-4


@pytest.mark.parametrize("variables", [{"RANK": "0"}, {"SLURM_STEP_NUM_TASKS": "2"}])
def test_ranks_of_its_own_are_refused(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"SLURM_PROCID": "0", **variables}.items():
        monkeypatch.setenv(name, value)
    assert main(["bench", "model=tiny"]) == 2
    assert "without torchrun or srun" in capsys.readouterr().err


def test_a_label_tells_of_what_differs_alone() -> None:
    given = [{"seed": "1", "peft": "lora"}, {"seed": "1", "peft": "full", "optim.lr": "1e-3"}]
    assert label_cases(given) == ["peft=lora", "peft=full optim.lr=1e-3"]


def test_settings_are_those_that_decide_the_work(plan) -> None:
    (one,) = plan("experiment=quickstart")
    (same,) = plan("experiment=quickstart", "bench.repeats=1", "log.every=7", "train.epochs=9")
    (other,) = plan("experiment=quickstart", "bench.documents=4", "train.compile=true")
    assert one.settings == same.settings
    differing = {key for key in one.settings if one.settings[key] != other.settings[key]}
    assert differing == {"bench.documents", "train.compile"}


def test_the_frozen_config_of_a_case_loads_in_its_folder(plan, tmp_path: Path) -> None:
    (case,) = plan("experiment=quickstart")
    run = load_frozen(case.text_in(tmp_path / "here", {"train.max_steps": 5}))
    assert run.run_dir == str(tmp_path / "here")
    assert run.train.max_steps == 5
    assert run.schedule == case.run.schedule


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["bench.steps=1"], "bench.steps=1 must be at least 2"),
        (["bench.stepz=3"], "unknown key bench.stepz; did you mean bench.steps"),
        (["bench.weights=zeros"], "bench.weights=zeros is not one of"),
        (["peft=full,lora", "quant=nf4", "-m"], "case peft=full: .*cannot be trained"),
        (["data.packing=false"], "set bench.documents=1"),
        (["bench.documents=200"], "lower bench.documents"),
        (["bench.train_steps=5", "data.eval_path=none"], "bench.train_steps=5 scores on held-out"),
        (["parallel=ddp", "launch.nproc=3"], "case peft=lora: train.global_batch_size=16"),
        (["bench.rates.lora=0"], "bench.rates.lora=0.0 must be above 0"),
        (["bench.rates.lorra=1"], "bench.rates.lorra: no case has peft=lorra; did you mean lora"),
        (["bench.out=a,b", "-m"], "bench.out is the folder of all cases"),
        (["launch=slurm"], "dtune bench measures on this machine"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_runs(
    settings: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Hydra makes the folder of a sweep before there is anything to check.
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=says):
        plan_cases(["model=tiny", *settings])


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_of_padding_outside_of_its_range_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=r"bench\.padding"):
        BenchConfig(padding=share)


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    said = capsys.readouterr().out
    for key in vars(BenchConfig()):
        assert f"bench.{key}=" in said
