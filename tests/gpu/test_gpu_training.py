"""Whole runs of the embedded model on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dtune.checkpoint.reader import CHECKPOINTS
from dtune.checkpoint.snapshot import HostBuffers
from dtune.train.sinks.base import Row
from dtune.train.step import train_step
from tests.gpu.attention import FLASH
from tests.integration.train_runs import (
    Assembled,
    assembled,
    column,
    held_out,
    overflow,
    settings,
    untimed,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def losses(it: Assembled) -> list[float]:
    return column(untimed(it.memory.rows, "train"), "loss")


@pytest.mark.parametrize("attention", ["sdpa", "varlen", FLASH])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_it_learns_in_bf16(tmp_path: Path, method: str, attention: str) -> None:
    overrides = settings(
        tmp_path / "run",
        held_out(tmp_path),
        f"peft={method}",
        f"model.attention={attention}",
        "precision=bf16",
        # Few rows, seen often: they are learned by heart, whatever the model knows.
        "data.max_rows=16",
        "train.max_steps=30",
        "evaluate.generate=true",
        "evaluate.max_new_tokens=8",
        "evaluate.before=true",
    )
    with assembled(overrides) as it:
        parameters = list(it.trainer.engine.module.parameters())
        assert {p.device.type for p in parameters} == {"cuda"}
        assert {p.dtype for p in parameters if p.requires_grad} == {torch.float32}
        _, result = it.finish()
        curve = losses(it)
    assert sum(curve[-3:]) < 0.5 * sum(curve[:3])
    assert set(result.after) == {"loss", "exact_match"}
    assert result.after != result.before
    assert 0 < result.peak_memory_gib < 8


@pytest.mark.parametrize("method", ["lora", "full"])
def test_no_step_waits_for_the_device(tmp_path: Path, method: str) -> None:
    """Between two lines of metrics the host runs ahead: nothing in a step asks for a value."""
    overrides = settings(
        tmp_path / "run", f"peft={method}", "model.attention=sdpa", "precision=bf16"
    )
    with assembled(overrides) as it:
        trainer = it.trainer
        trainer.engine.model.train()

        def step(number: int) -> torch.Tensor:
            return train_step(
                number,
                trainer.loader.batches(number - 1),
                engine=trainer.engine,
                objective=trainer.objective,
                world=trainer.world,
                max_norm=1.0,
                guard=trainer.guard,
            ).verdict.loss

        for number in (1, 2, 3):  # the first make caches, states and handles
            step(number)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss = step(4)
            with pytest.raises(RuntimeError, match="synchroniz"):
                loss.item()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert loss.item() > 0


def state_of(it: Assembled) -> dict[str, torch.Tensor]:
    return {s.name: s.local.detach().cpu().clone() for s in it.trainer.engine.state().shards}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_what_is_saved_while_training_goes_on_comes_back_bit_for_bit(
    tmp_path: Path, precision: str
) -> None:
    common = ("peft=full", f"precision={precision}", "train.max_steps=8", "checkpoint.keep=9")
    with assembled(settings(tmp_path / "run", "checkpoint.every=3", *common)) as it:
        then: dict[str, torch.Tensor] = {}

        class Keep:
            """The state as it is when step 3 has been logged, before it is saved."""

            def write(self, row: Row) -> None:
                if (row["kind"], row["step"]) == ("train", 3):
                    then.update(state_of(it))

            def close(self) -> None:
                """Nothing is held."""

        it.trainer.sinks = [*it.trainer.sinks, Keep()]
        it.finish()
        scalars = it.trainer.engine.state().scalars
        last = state_of(it)
    saved = tmp_path / "run" / CHECKPOINTS / "step-00000003"
    with assembled(settings(tmp_path / "again", f"resume={saved}", *common)) as it:
        assert {s.local.device.type for s in it.trainer.engine.state().shards} == {"cuda"}
        back = state_of(it)
        assert it.trainer.engine.state().scalars.keys() == scalars.keys()
    assert back.keys() == then.keys()
    assert all(torch.equal(back[name], then[name]) for name in then)
    assert not any(torch.equal(last[name], then[name]) for name in then if "param/" in name)


def test_what_is_copied_for_saving_lies_in_pinned_memory(tmp_path: Path) -> None:
    with assembled(settings(tmp_path / "run")) as it:
        buffers = HostBuffers()
        first = buffers.copy(it.trainer.engine.state().shards)
        assert first
        assert all(part.values.is_pinned() for part in first)
        again = buffers.copy(it.trainer.engine.state().shards)
        addresses = [part.values.data_ptr() for part in first]
        assert [part.values.data_ptr() for part in again] == addresses


def test_fp16_learns_and_skips_an_overflow(tmp_path: Path) -> None:
    overrides = settings(
        tmp_path / "run", "precision=fp16", "train.max_steps=30", "data.max_rows=16"
    )
    with assembled(overrides) as it:
        overflow(it, range(4, 6))
        it.finish()
        rows = [row for row in it.memory.rows if row["kind"] == "train"]
        skipped = [int(row.get("skipped_steps", 0)) for row in rows]
        assert skipped[3:5] == [1, 1]
        assert it.trainer.engine.skipped_steps == sum(skipped)
        # At most a few others, while the scale comes down to what this model takes.
        assert sum(skipped) <= 6
        curve = losses(it)
    assert sum(curve[-3:]) < 0.5 * sum(curve[:3])
