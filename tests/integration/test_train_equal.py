"""What must not change a run: how a batch is split, packed, computed again, or looked at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dtune.checkpoint.reader import CHECKPOINTS, open_checkpoint
from dtune.train.sinks.base import Row
from tests.integration.train_runs import assembled, column, held_out, settings, train

# Sums of fp32 in another order: the error of a sum of n terms grows as sqrt(n) * 2**-24, for the
# longest products here, of 448, 1.3e-6. SGD hands it on as it is, where Adam divides what is near
# to nothing by its own size.
ROUNDING = 2e-6
PLAIN = ("peft=full", "optim=sgd", "optim.lr=1e-2")


def assert_equal_curves(ours: list[Row], theirs: list[Row]) -> None:
    for name in ("loss", "grad_norm"):
        assert column(ours, name) == pytest.approx(column(theirs, name), rel=ROUNDING)
    assert column(ours, "targets") == column(theirs, "targets")


@pytest.mark.parametrize("packing", ["true", "false"])
def test_four_micro_batches_of_one_equal_one_of_four(tmp_path: Path, packing: str) -> None:
    curves = [
        train(
            settings(
                tmp_path / micro,
                f"train.micro_batch_size={micro}",
                f"data.packing={packing}",
                *PLAIN,
            )
        )
        for micro in ("1", "4", "2")
    ]
    assert_equal_curves(curves[0], curves[1])
    assert_equal_curves(curves[2], curves[1])
    # Micro batches differ in their targets, so that a mean of means would not be this mean.
    with pytest.raises(AssertionError):
        assert_equal_curves(curves[0], [{**row, "loss": 1.001 * row["loss"]} for row in curves[1]])


def test_packed_rows_have_the_loss_and_gradient_they_have_padded(tmp_path: Path) -> None:
    """All rows in every step, so that the steps hold the same rows in both cases."""
    curves = [
        train(
            settings(
                tmp_path / packing,
                f"data.packing={packing}",
                "data.max_rows=12",
                "train.max_steps=0",
                "train.epochs=1",
                "train.micro_batch_size=4",
                "train.global_batch_size=12",
                *PLAIN,
            )
        )
        for packing in ("true", "false")
    ]
    assert len(curves[0]) == len(curves[1]) == 1
    assert column(curves[0], "slots") != column(curves[1], "slots")
    assert_equal_curves(*curves)


def test_evaluation_changes_nothing(tmp_path: Path) -> None:
    """Not even the random stream of dropout, or how many steps there are."""
    some = held_out(tmp_path, rows=4)
    common = ("peft.dropout=0.2", "checkpoint.every=0", "evaluate.max_new_tokens=4")
    plain = train(settings(tmp_path / "plain", *common))
    watched = train(
        settings(
            tmp_path / "watched",
            *common,
            some,
            "train.eval_every=1",
            "evaluate.before=true",
            "evaluate.generate=true",
        )
    )
    assert watched == plain
    other = train(settings(tmp_path / "other", *common, "seed=2"))
    assert other != plain


def test_recomputation_changes_nothing_but_the_number_of_forwards(tmp_path: Path) -> None:
    curves: dict[str, list[Row]] = {}
    forwards: dict[str, int] = {}
    for recompute in ("none", "selective", "full"):
        overrides = settings(
            tmp_path / recompute, f"train.recompute={recompute}", "peft.dropout=0.1"
        )
        with assembled(overrides) as it:
            calls: list[int] = []
            block = next(
                module
                for name, module in it.trainer.engine.module.named_modules()
                if name.endswith("layers.0.mlp")
            )
            block.register_forward_pre_hook(lambda module, args, calls=calls: calls.append(1))
            it.finish()
            curves[recompute] = [row for row in it.memory.rows if row["kind"] == "train"]
            forwards[recompute] = len(calls)
    for name in ("loss", "grad_norm"):
        # The same operations on the same values, with the same draws of dropout.
        assert column(curves["selective"], name) == column(curves["none"], name)
        assert column(curves["full"], name) == column(curves["none"], name)
    assert forwards["full"] == forwards["selective"] == 2 * forwards["none"]


def test_bf16_learns_with_masters_in_fp32(tmp_path: Path) -> None:
    overrides = settings(
        tmp_path / "run", "precision=bf16", "train.max_steps=30", "data.max_rows=16"
    )
    with assembled(overrides) as it:
        parameters = list(it.trainer.engine.module.parameters())
        trained = {p.dtype for p in parameters if p.requires_grad}
        frozen = {p.dtype for p in parameters if not p.requires_grad}
        assert (trained, frozen) == ({torch.float32}, {torch.bfloat16})
        it.finish()
        losses = column([row for row in it.memory.rows if row["kind"] == "train"], "loss")
    # Few rows, seen often: they are learned by heart, whatever the model knows.
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    saved = open_checkpoint(tmp_path / "run" / CHECKPOINTS / "step-00000030")
    assert {tensor.dtype for tensor in saved.tensors.values()} == {"F32"}
