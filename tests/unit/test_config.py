"""Composing, checking and freezing a config."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtune.config.compose import check_flags, compose_overrides
from dtune.config.freeze import load_frozen
from dtune.config.run import POLYMORPHIC, RunConfig
from dtune.config.suggest import SYNONYMS, all_keys
from dtune.config.support import accumulation_steps, check_run
from dtune.errors import ConfigError
from dtune.peft.schema.lora import LoraConfig
from dtune.resources import find_data

CONF = find_data("conf", "train.yaml")
OPTIONS = sorted(
    (path.parent.name, path.stem)
    for path in CONF.glob("*/*.yaml")
    if path.parent.name != "experiment"
)
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
# Keys that scripts use: they stay.
FIXED_KEYS = """run_dir resume seed model.path model.attention peft.rank peft.alpha peft.dropout
    peft.targets data.path data.format data.max_length data.eval_path train.max_steps train.epochs
    train.micro_batch_size train.global_batch_size train.max_norm train.eval_every train.recompute
    optim.lr optim.weight_decay schedule.warmup_steps checkpoint.every checkpoint.keep
    launch.nproc""".split()


def run_of(*overrides: str) -> RunConfig:
    return load_frozen(compose_overrides("train", overrides))


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        run_of(*overrides)
    return str(error.value)


def test_default_composes_to_typed_config() -> None:
    run = run_of()
    assert isinstance(run.peft, LoraConfig)
    assert run.model.path == "dtune://tiny"
    assert Path(run.run_dir).is_absolute()


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group: str, option: str) -> None:
    extra = {
        "data": ["data.path=x", "objective=pretrain", "data.format=text"],
        "model": ["model.path=x"],
    }
    run = run_of(f"{group}={option}", *extra.get(group, []))
    chosen = getattr(run, group).name  # the group is the parameter
    expected = "lora" if option == "qlora" else option
    assert getattr(chosen, "value", chosen) == expected  # an Enum or a str


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_with_either_spelling(name: str) -> None:
    typed = run_of(f"experiment={name}", "data.path=rows.jsonl", "run_dir=runs/x")
    assert typed == run_of(f"+experiment={name}", "data.path=rows.jsonl", "run_dir=runs/x")


def test_command_line_beats_experiment() -> None:
    assert run_of("experiment=quickstart", "optim.lr=0.125").optim.lr == 0.125


def test_fixed_keys_exist() -> None:
    assert set(FIXED_KEYS) <= set(all_keys())


def test_synonyms_point_to_what_exists() -> None:
    for target in SYNONYMS.values():
        key, _, option = target.partition("=")
        if option:
            assert (key, option) in OPTIONS
        else:
            assert key in all_keys() or (CONF / key).is_dir()


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("peft.rnk=8", "unknown key peft.rnk; did you mean peft.rank"),
        ("+peft.rnk=8", "unknown key peft.rnk; did you mean peft.rank"),
        # A right key of another option is not suggested once more.
        ("launch.nodes=2", "unknown key launch.nodes: it is one of launch=slurm, slurm_srun, and"),
        ("lora_alpha=8", "peft.alpha"),
        ("learning_rate=1", "optim.lr"),
        ("pfet=lora", "peft=..."),
        ("peft=lorra", "did you mean peft=lora"),
        ("parallel=zero4", "parallel=zero3"),
        ("model.attention=sdp", "model.attention=sdpa"),
        ("optim.lr=fast", "optim.lr: Value 'fast'"),
        ("optim.lr=-1", "optim.lr=-1.0 must be above 0"),
        ("peft.rank=0", "peft.rank=0 must be at least 1"),
        ("train.max_steps=1.5", "train.max_steps"),
        ("launch.nproc=0", "launch.nproc=0"),
        ("data=alpaca", "no value for data.path"),
        ("~peft", "no value for peft"),
    ],
)
def test_wrong_override_is_answered_with_the_right_name(override: str, answer: str) -> None:
    assert answer in refusal(override)


def test_frozen_text_loads_to_the_same_config() -> None:
    text = compose_overrides("train", ["experiment=quickstart", "peft=full", "run_dir=runs/x"])
    assert load_frozen(text) == run_of("experiment=quickstart", "peft=full", "run_dir=runs/x")


def test_frozen_text_with_a_stray_key_is_refused() -> None:
    text = compose_overrides("train", []).replace("  rank:", "  rnk: 3\n  rank:")
    with pytest.raises(ConfigError, match=r"unknown key peft\.rnk; did you mean peft\.rank"):
        load_frozen(text)


def test_override_of_a_frozen_config_is_as_strict() -> None:
    text = compose_overrides("train", [])
    assert load_frozen(text, ["evaluate.max_rows=5"]).evaluate.max_rows == 5
    with pytest.raises(ConfigError, match=r"evaluate\.max_rows"):
        load_frozen(text, ["evaluate.max_row=5"])


def test_existing_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    assert run_of("data.path=rows.jsonl").data.path == str(tmp_path / "rows.jsonl")


def test_polymorphic_groups_have_a_yaml_for_every_schema() -> None:
    for group, registry in POLYMORPHIC.items():
        options = {path.stem for path in (CONF / group).glob("*.yaml")}
        assert options - set(registry.names()) == ({"qlora"} if group == "peft" else set())
        assert set(registry.names()) <= options


def test_qlora_is_lora_over_four_bits_unless_told_otherwise() -> None:
    assert (run_of("peft=qlora").peft.name, run_of("peft=qlora").quant.name) == ("lora", "nf4")
    assert run_of("peft=qlora", "quant=fp4", "peft.rank=4").quant.name == "fp4"


@pytest.mark.parametrize(
    ("overrides", "ranks", "answer"),
    [
        (["parallel=single"], 2, "use parallel=ddp"),
        (
            ["parallel=ddp", "train.global_batch_size=10", "train.micro_batch_size=4"],
            2,
            "train.micro_batch_size=1",
        ),
        (["parallel=ddp", "train.global_batch_size=9"], 2, "train.global_batch_size=8"),
        (["optim=adamw8bit", "parallel=fsdp"], 2, "optim=adamw"),
        (["objective=pretrain"], 1, "data.format=text"),
        (["data.format=text"], 1, "objective=pretrain"),
        (["data.eval_path=none", "train.eval_every=5"], 1, "data.eval_path"),
        (["train.early_stopping=2"], 1, "train.eval_every"),
        (["checkpoint.best=exact_match", "evaluate.generate=false"], 1, "evaluate.generate=true"),
        (["train.max_steps=5", "schedule.warmup_steps=9"], 1, "schedule.warmup_steps=9"),
    ],
)
def test_what_cannot_work_is_refused_with_what_can(
    overrides: list[str], ranks: int, answer: str
) -> None:
    run = run_of(*overrides)
    with pytest.raises(ConfigError) as error:
        check_run(run, ranks)
    assert answer in str(error.value)


def test_the_advice_for_a_batch_that_does_not_divide_works() -> None:
    run = run_of("parallel=ddp")
    for ranks in (1, 2, 3, 4):
        for total in range(1, 20):
            for micro in range(1, 6):
                run.train.global_batch_size, run.train.micro_batch_size = total, micro
                _follow_advice(run, ranks)
                assert accumulation_steps(run, ranks) >= 1


def _follow_advice(run: RunConfig, ranks: int) -> None:
    try:
        check_run(run, ranks)
    except ConfigError as error:
        key, _, value = str(error).rpartition("set ")[2].partition("=")
        setattr(run.train, key.removeprefix("train."), int(value))
        check_run(run, ranks)


@pytest.mark.parametrize(
    "flags", [("-m", "--cfg", "job"), ("--cfg=job", "--multirun"), ("-c", "-i")]
)
def test_flags_of_hydra_that_exclude_each_other_are_refused(flags: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="exclude each other: leave one of them out"):
        check_flags(flags)
    check_flags(["-m", "peft=lora,qlora"])
    check_flags(["--cfg", "job", "--resolve", "--package", "train"])
