"""On as many processes as before, a run that was stopped is the run that was not, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from dtune.train.sinks.base import Row
from tests.distributed.move_check import LOSS_LIMIT
from tests.distributed.moving import small_model
from tests.distributed.pool import Pool
from tests.faults.injection import state_digest
from tests.integration.runs import exported
from tests.integration.train_runs import metrics

pytestmark = pytest.mark.slow

TRAIN = "tests.integration.runs:train"
# 20 rows in steps of 4: an epoch ends after step 5. The stops: after the first step, once more in
# the same epoch, and at its end.
ROWS, TOTAL = 20, 7
STOPS = (1, 3, 5)


@dataclass(frozen=True)
class Case:
    engine: str
    method: str
    extra: str


CASES = [
    Case("ddp", "lora", "peft.dropout=0.1"),
    Case("fsdp", "full", "data.packing=false"),
    Case("zero3", "lora", "peft.dropout=0.1"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("small") / "model")


def overrides(model: Path, run_dir: Path, case: Case, *more: str) -> list[str]:
    """A run with two micro batches a step on each rank."""
    return [
        f"run_dir={run_dir}",
        f"model.path={model}",
        "model.init=random",
        f"parallel={case.engine}",
        f"peft={case.method}",
        case.extra,
        "precision=fp32",
        "optim.lr=1e-3",
        f"train.max_steps={TOTAL}",
        "train.micro_batch_size=1",
        "train.global_batch_size=4",
        "data.eval_path=none",
        f"data.max_rows={ROWS}",
        # As long as the longest row: packs have one row each, and an epoch is as long.
        "data.max_length=40",
        "evaluate.generate=false",
        "evaluate.before=false",
        "checkpoint.every=0",
        "log.every=1",
        "log.progress=lines",
        *more,
    ]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.engine}-{case.method}")
def test_stopped_again_and_again_equals_never_stopped(
    case: Case, two_ranks: Pool, model: Path, tmp_path: Path
) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert set(two_ranks.run(TRAIN, overrides=overrides(model, whole, case))) == {"done"}
    again = overrides(model, parted, case, "resume=auto")
    for stop in STOPS:
        assert set(two_ranks.run(TRAIN, overrides=again, stop_at=stop)) == {"preempted"}
        assert [row["step"] for row in rows(parted)] == list(range(1, stop + 1))
    assert set(two_ranks.run(TRAIN, overrides=again)) == {"done"}
    assert len(rows(whole)) == TOTAL
    assert rows(parted) == rows(whole)
    assert exported(whole)
    assert exported(parted) == exported(whole)
    # Weights, optimizer, schedule, generators and the position in the data.
    assert state_digest(parted) == state_digest(whole)


def test_a_run_may_go_to_another_engine_and_back(
    two_ranks: Pool, model: Path, tmp_path: Path
) -> None:
    case, other = Case("zero3", "full", "data.packing=false"), "parallel=fsdp"
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert set(two_ranks.run(TRAIN, overrides=overrides(model, whole, case))) == {"done"}
    again = overrides(model, parted, case, "resume=auto")
    assert set(two_ranks.run(TRAIN, overrides=again, stop_at=2)) == {"preempted"}
    assert set(two_ranks.run(TRAIN, overrides=[*again, other], stop_at=4)) == {"preempted"}
    assert set(two_ranks.run(TRAIN, overrides=again)) == {"done"}
    losses = [row["loss"] for row in rows(whole)]
    assert [row["step"] for row in rows(parted)] == list(range(1, TOTAL + 1))
    assert [row["loss"] for row in rows(parted)] == pytest.approx(losses, rel=0, abs=LOSS_LIMIT)
    # It does learn, so that a state that was not taken over would show.
    assert losses[0] - losses[-1] > 100 * LOSS_LIMIT


def rows(run_dir: Path) -> list[Row]:
    return metrics(run_dir, "train")


def test_with_dropout_another_number_of_processes_is_another_run(
    one_rank: Pool, two_ranks: Pool, model: Path, tmp_path: Path
) -> None:
    """Random streams belong to ranks; without dropout the same move is within rounding."""
    differences = {}
    for rate in ("0.5", "0.0"):
        case = Case("fsdp", "lora", f"peft.dropout={rate}")
        run = tmp_path / rate
        more = ["checkpoint.every=3", "checkpoint.keep=9", "optim.lr=1e-2"]
        two_ranks.run(TRAIN, overrides=overrides(model, run, case, *more))
        moved = tmp_path / f"{rate}-moved"
        resume = f"resume={run / 'checkpoints' / 'step-00000003'}"
        one_rank.run(TRAIN, overrides=overrides(model, moved, case, *more, resume))
        pairs = zip(rows(moved), rows(run)[3:], strict=True)
        differences[rate] = max(abs(float(a["loss"]) - float(b["loss"])) for a, b in pairs)
    assert differences["0.0"] <= 1e-5
    assert differences["0.5"] > 1e-3
