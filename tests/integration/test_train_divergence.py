"""NaN and infinity stop a run with a report, and never pass in silence."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from dtune.checkpoint.reader import CHECKPOINTS, CheckpointSource, open_checkpoint
from dtune.cli import main
from dtune.errors import DivergedError
from dtune.runtime.status import State, read_status
from dtune.train.divergence import MAX_SKIPPED_IN_A_ROW, Overflows, check_metrics
from dtune.train.sinks.jsonl import read_metrics
from tests.distributed.pool import Pool
from tests.integration.train_runs import (
    assembled,
    metrics,
    overflow,
    poison,
    read_json,
    settings,
)

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(("log_every", "value"), [(1, NAN), (5, INF)])
def test_the_report_names_the_batch_and_the_checkpoint_before_is_good(
    tmp_path: Path, log_every: int, value: float
) -> None:
    run_dir = tmp_path / "run"
    overrides = settings(
        run_dir, "train.max_steps=6", "checkpoint.every=2", f"log.every={log_every}"
    )
    with assembled(overrides) as it:
        poison(it, 3, value)
        with pytest.raises(DivergedError, match="step 3") as raised:
            it.trainer.fit(evaluate_before=False)
        batches = it.trainer.loader.batches(2)
        origin = it.trainer.loader.dataset.origin
        rows = [[origin(row) for row in rows] for batch in batches for rows in batch.rows if rows]
        texts = [it.trainer.tokenizer.decode(batch.input_ids[0][:8]) for batch in batches]
        share = sum(b.num_targets for b in batches) / sum(b.num_tokens for b in batches)
    report = read_json(run_dir / "diverged-step-3.json")
    assert str(run_dir / "diverged-step-3.json") in str(raised.value)
    (rank,) = report["ranks"]
    assert report["step"] == 3
    assert not math.isfinite(float(report["loss"]))
    assert [record["rows"] for record in rank["rows"]] == rows
    assert rank["rows"][0]["text"].startswith(texts[0])
    assert rank["trained_share"] == pytest.approx(share, rel=1e-15)
    # What came before it is written, and nothing of it.
    assert [row["step"] for row in metrics(run_dir, "train")] == [1, 2]
    saved = open_checkpoint(run_dir / CHECKPOINTS / "step-00000002")
    source = CheckpointSource(saved)
    for name in source.names():
        assert torch.isfinite(source.read(name, 0, math.prod(source.shape(name)))).all(), name
    assert not (run_dir / CHECKPOINTS / "step-00000004").exists()


def test_all_ranks_stop_and_tell_of_their_batches_when_one_diverges(
    tmp_path: Path, two_ranks: Pool
) -> None:
    run_dir = tmp_path / "run"
    overrides = settings(run_dir, "parallel=ddp", "train.max_steps=6", "checkpoint.every=2")
    raised = two_ranks.run("tests.integration.train_runs:diverge", overrides=overrides, rank=1)
    assert "step 3" in raised[0]
    assert raised[1] == raised[0]
    first, second = read_json(run_dir / "diverged-step-3.json")["ranks"]
    assert (first["rank"], second["rank"]) == (0, 1)
    # The loss of each rank tells where it came from.
    assert math.isfinite(float(first["loss_share"]))
    assert not math.isfinite(float(second["loss_share"]))
    assert first["rows"] != second["rows"]
    assert open_checkpoint(run_dir / CHECKPOINTS / "step-00000002").step == 2


def test_a_learning_rate_that_is_far_too_high_ends_with_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    argv = settings(
        run_dir,
        "peft=full",
        "optim=sgd",
        "optim.lr=1e30",
        "train.max_norm=0",
        "checkpoint.every=1",
        "schedule=constant",
    )
    assert main(["train", *argv]) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "optim.lr" in said
    status = read_status(run_dir)
    assert status.state is State.diverged
    assert f"step {status.step}" in status.message
    assert (run_dir / f"diverged-step-{status.step}.json").is_file()
    # The step before was saved, found whole, and is where it goes on.
    assert main(["train", *argv, "resume=auto"]) == 1
    resumed = [row for row in read_metrics(run_dir / "metrics.jsonl") if row["kind"] == "resume"]
    assert [row["step"] for row in resumed] == [status.step - 1]


def test_an_overflow_of_fp16_is_skipped_and_counted(tmp_path: Path) -> None:
    overrides = settings(tmp_path / "run", "precision=fp16", "peft=full", "train.max_steps=5")
    with assembled(overrides) as it:
        overflow(it, range(2, 4))
        before: list[torch.Tensor] = []
        weight = next(p for p in it.trainer.engine.module.parameters() if p.requires_grad)
        it.trainer.engine.module.register_forward_pre_hook(
            lambda module, args: before.append(weight.detach().clone())
        )
        it.finish()
        rows = [row for row in it.memory.rows if row["kind"] == "train"]
        assert it.trainer.engine.skipped_steps == 2
    assert [row.get("skipped_steps", 0) for row in rows] == [0, 1, 1, 0, 0]
    micros = len(before) // 5
    moved = [
        not torch.equal(before[step * micros], before[(step + 1) * micros]) for step in range(4)
    ]
    assert moved == [True, False, False, True]


def test_overflows_that_never_end_are_no_overflows(tmp_path: Path) -> None:
    steps = MAX_SKIPPED_IN_A_ROW + 4
    overrides = settings(
        tmp_path / "run",
        "precision=fp16",
        f"train.max_steps={steps}",
        "train.global_batch_size=2",
        "log.every=3",
    )
    with assembled(overrides) as it:
        overflow(it, range(2, steps + 1))
        with pytest.raises(DivergedError, match=f"at step {MAX_SKIPPED_IN_A_ROW + 2}:"):
            it.trainer.fit(evaluate_before=False)


@pytest.mark.parametrize(
    ("norms", "skipped", "allowed"),
    [
        ([1.0, 1.0, 1.0], 0, [True, True, True]),
        ([1.0, 1.0, INF], 0, [True, True, False]),
        ([INF, NAN, 1.0], 2, [True, True, True]),
        ([INF, NAN, 1.0], 1, [True, False, True]),
    ],
)
def test_only_skipped_steps_may_have_an_infinite_norm(
    norms: list[float], skipped: int, allowed: list[bool]
) -> None:
    overflows, found = Overflows(), []
    for norm in norms:
        found.append(overflows.allow(norm, skipped))
        skipped -= not math.isfinite(norm)
    assert found == allowed


def test_a_held_out_loss_that_is_no_number_is_no_best() -> None:
    check_metrics({"loss": 1.0, "exact_match": 0.0}, 3)
    with pytest.raises(DivergedError, match="held-out loss nan after step 3"):
        check_metrics({"loss": NAN}, 3)
