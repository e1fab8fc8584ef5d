"""What may change between attempts at a run, and what is refused with the old and new value."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtune.checkpoint.manifest import Identity, check_identity
from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.config.identity import identity_of
from dtune.errors import ConfigError
from dtune.resources import resolve_path
from tests.integration.train_runs import assembled, settings

# Settings that are given together; each of them is looked at on its own.
ALLOWED = [
    [
        "optim.lr=1e-5",
        "optim.weight_decay=0.3",
        "schedule=linear",
        "schedule.warmup_steps=3",
        "train.epochs=9",
        "train.max_steps=77",
        "train.micro_batch_size=1",
        "train.eval_every=5",
        "train.early_stopping=2",
        "train.max_norm=0.5",
        "train.recompute=full",
        "log.every=7",
        "checkpoint.every=3",
        "checkpoint.keep=5",
        "checkpoint.on_error=go_on",
        "parallel=fsdp",
        "launch.nproc=4",
        "launch.max_restarts=2",
        "evaluate.generate=false",
    ],
    ["parallel=zero3"],
]

REFUSED = [
    {
        "seed=2": "seed was 1 and is 2",
        "optim=sgd": "optim.name was 'adamw' and is 'sgd'",
        "precision=bf16": "precision.name was 'fp32' and is 'bf16'",
        "peft.rank=4": "peft.rank was 16 and is 4",
        "peft.dropout=0.2": "peft.dropout was 0.0 and is 0.2",
        "quant=int8": "quant.name was 'none' and is 'int8'",
        "train.global_batch_size=8": "train.global_batch_size was 16 and is 8",
        "data.shuffle=false": "data.shuffle was True and is False",
        "data.max_length=128": "data.max_length was 256 and is 128",
        "model.init=random": "model was ",
    },
    {
        "peft=full": "peft.name was 'lora' and is 'full'",
        "data.packing=false": "data.packing was True and is False",
    },
]


def identity(*overrides: str) -> Identity:
    run = load_frozen(compose_overrides("train", ["run_dir=run", *overrides]))
    return identity_of(run, "data@1", last_sequence=0)


@pytest.fixture(scope="module")
def before() -> Identity:
    return identity("precision=fp32")


@pytest.mark.parametrize("overrides", ALLOWED)
def test_what_does_not_change_the_sequence_of_steps_may_change(
    before: Identity, overrides: list[str]
) -> None:
    check_identity(Path("step"), before, identity("precision=fp32", *overrides))


@pytest.mark.parametrize("refusals", REFUSED, ids=["settings", "method and packing"])
def test_what_would_make_another_run_is_refused_with_the_old_and_the_new(
    before: Identity, refusals: dict[str, str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        check_identity(Path("step"), before, identity("precision=fp32", *refusals))
    assert [said for said in refusals.values() if said not in str(refused.value)] == []
    assert "Set these back, or start anew with another run_dir" in str(refused.value)


@pytest.mark.parametrize("override", ["seed=2", "model.init=random"])
def test_one_change_is_enough_to_be_refused(before: Identity, override: str) -> None:
    with pytest.raises(ConfigError, match="Set these back"):
        check_identity(Path("step"), before, identity("precision=fp32", override))


def test_one_byte_more_in_a_row_of_the_data_is_another_run(tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    lines = Path(resolve_path("dtune://instructions/heldout.jsonl")).read_text("utf-8")
    data.write_text("".join(lines.splitlines(keepends=True)[:24]), encoding="utf-8")
    argv = settings(tmp_path / "run", f"data.path={data}", "train.max_steps=1")
    with assembled(argv) as it:
        it.finish()
    whole = data.read_bytes()
    # What trains is what counts: not an empty line.
    data.write_bytes(whole + b"\n")
    with assembled([*argv, "resume=auto"]) as it:
        assert it.trainer.progress.step == 1
    data.write_bytes(b'x", "task"'.join(whole.rsplit(b'", "task"', 1)))
    assert len(data.read_bytes()) == len(whole) + 1
    with (
        pytest.raises(ConfigError, match=r"data was '.*' and is '") as refused,
        assembled([*argv, "resume=auto"]),
    ):
        pass
    assert "Set these back" in str(refused.value)
    data.write_bytes(whole)
    with assembled([*argv, "resume=auto"]) as it:
        assert it.trainer.progress.step == 1
