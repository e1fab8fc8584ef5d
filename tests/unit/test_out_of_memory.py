"""What is said where memory runs out: by the same rules as ``dtune plan``."""

from __future__ import annotations

import time

import pytest
import torch

from dtune.build import build_trained_model
from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.out_of_memory import Counter, is_out_of_memory
from dtune.plan.memory import MemoryPlan, full_batch, plain_loss, plan_memory, request_of

SETTINGS = ["precision=bf16", "data.max_length=64", "train.global_batch_size=8", "parallel=ddp"]


def planned(*more: str, rows: int = 2, width: int = 64) -> MemoryPlan:
    run = load_frozen(compose_overrides("train", [*SETTINGS, *more]))
    built = build_trained_model(run, load=False)
    request = request_of(run, built, 2, accumulates=True)
    return plan_memory(built.model, built.spec, request, full_batch(rows, width), plain_loss)


def test_what_a_setting_saves_is_the_difference_of_two_plans() -> None:
    run = load_frozen(compose_overrides("train", SETTINGS))
    counter = Counter(run, full_batch(2, 64), 2, time.monotonic() + 600)
    saves = {remedy.setting: remedy.saves for remedy in counter.count()}
    now = planned().device_bytes
    full = planned("train.recompute=full").device_bytes
    assert saves["train.recompute=full"] == now - full > 0
    assert saves["quant=nf4"] == now - planned("quant=nf4").device_bytes > 0
    # In proportion to tokens, but for the few bytes that do not depend on them.
    half = planned("train.micro_batch_size=1", rows=1).device_bytes
    assert saves["train.micro_batch_size=1"] == pytest.approx(now - half, rel=0.02)
    assert saves["train.micro_batch_size=1"] == saves["data.max_length=32"]


@pytest.mark.parametrize(
    ("precision", "third"), [("bf16", "parallel=fsdp"), ("fp32", "train.recompute=full")]
)
def test_three_settings_are_named_where_there_is_hardly_time(precision: str, third: str) -> None:
    """In fp32 what FSDP gathers of so small a model is more than it spares."""
    more = f"precision={precision}"
    run = load_frozen(compose_overrides("train", [*SETTINGS, more]))
    found = Counter(run, full_batch(2, 64), 2, time.monotonic() + 0.01).count()
    saves = {remedy.setting: remedy.saves for remedy in found}
    assert list(saves) == ["train.micro_batch_size=1", "data.max_length=32", third]
    assert saves[third] == planned(more).device_bytes - planned(more, third).device_bytes > 0


def test_weights_that_are_kept_dequantised_need_not_be() -> None:
    kept = ["quant=nf4", "quant.cache_gib=1"]
    run = load_frozen(compose_overrides("train", [*SETTINGS, *kept]))
    found = Counter(run, full_batch(2, 64), 2, time.monotonic() + 600).count()
    saves = {remedy.setting: remedy.saves for remedy in found}
    # All linears of the four blocks, of 128 x 128 and others, in bf16.
    block = 128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 384
    assert saves["quant.cache_gib=0"] == 2 * 4 * block


def test_nothing_is_counted_after_the_deadline() -> None:
    run = load_frozen(compose_overrides("train", SETTINGS))
    assert Counter(run, full_batch(2, 64), 2, time.monotonic() - 1).count() == []


def test_memory_of_the_device_and_of_the_host_is_told_from_other_failures() -> None:
    short = (torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("CUDA error: out of memory"))
    assert all(map(is_out_of_memory, short))
    assert not any(map(is_out_of_memory, (RuntimeError("shape"), ValueError("out of range"))))
