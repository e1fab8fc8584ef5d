"""What whole optimizer steps of runs dispatch, counted on a CPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from dtune.peft import virtual_rows
from dtune.train.step import train_step
from dtune.types import Batch
from tests.distributed.operations import Operations
from tests.integration.train_runs import Assembled, assembled, settings, train

SYNCS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select")
"""With which the host would wait for a GPU to hand it a number or a shape."""


def step(it: Assembled, number: int, batches: list[Batch]) -> torch.Tensor:
    trainer = it.trainer
    stats = train_step(
        number,
        batches,
        engine=trainer.engine,
        objective=trainer.objective,
        world=trainer.world,
        max_norm=1.0,
        guard=trainer.guard,
    )
    return stats.verdict.loss


def second_step(tmp_path: Path, *overrides: str) -> Counter[str]:
    """Operations of the second step of a run."""
    with assembled(settings(tmp_path / "run", "train.max_steps=3", *overrides)) as it:
        it.trainer.engine.model.train()
        first, second = (it.trainer.loader.batches(number) for number in range(2))
        step(it, 1, first)
        counter = Operations()
        with counter:
            loss = step(it, 2, second)
            counted = Counter(counter.counts)
            assert loss.item() > 0
        # What would wait is noticed.
        assert waits(counter.counts) == waits(counted) + 1
    return counted


def waits(counts: Counter[str]) -> int:
    return sum(counts[name] for name in SYNCS)


@pytest.mark.parametrize(
    "overrides",
    [
        ("peft=full",),
        ("peft=lora",),
        ("peft=lora", "optim.flat=always"),
        ("peft=lora", "quant=nf4", "quant.cache_gib=0.001"),
        ("peft=dora", "precision=bf16"),
        ("peft=lora", "kernels=reference", "precision=bf16"),
        ("peft=lora", "guard=skip", "train.recompute=full"),
        ("peft=prompt", "data.packing=false"),
        ("peft=lora", "data.packing=false"),
    ],
    ids=" ".join,
)
def test_no_step_would_wait_for_a_device(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    counts = second_step(tmp_path, *overrides)
    assert {name: counts[name] for name in SYNCS if counts[name]} == {}


def test_prompts_in_packed_rows_would_not_wait_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device, where all documents share one row: its length is known on the host."""
    monkeypatch.setattr(virtual_rows, "_shares_one_row", lambda device: True)
    counts = second_step(tmp_path, "peft=prompt", "data.packing=true")
    assert {name: counts[name] for name in SYNCS if counts[name]} == {}


def test_flat_steps_with_one_update_for_all(tmp_path: Path) -> None:
    flat = second_step(tmp_path / "flat", "peft=lora", "optim.flat=always")
    apart = second_step(tmp_path / "apart", "peft=lora", "optim.flat=never")
    assert (flat["dtune::adamw_flat_"], apart["aten::_fused_adamw_"]) == (1, 1)
    assert flat["aten::_fused_adamw_"] == apart["dtune::adamw_flat_"] == 0


def dequantisations(counts: Counter[str]) -> int:
    return sum(count for name, count in counts.items() if "dequantize" in name)


def test_a_cache_takes_dequantisations_out_of_a_run_and_changes_nothing(tmp_path: Path) -> None:
    base = ("peft=lora", "quant=nf4")
    counted, losses = [], []
    for gib in (0, 0.002, 1):
        own = (*base, f"quant.cache_gib={gib}")
        counted.append(dequantisations(second_step(tmp_path / f"count {gib}", *own)))
        rows = train(settings(tmp_path / f"run {gib}", *own))
        losses.append([row["loss"] for row in rows if row["kind"] == "train"])
    none, some, every = counted
    assert none > some > every == 0
    assert losses[0] == losses[1] == losses[2]
    assert len(losses[0]) == 4
