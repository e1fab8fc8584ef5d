"""What is planned of the passes: few blocks say it of all, and running engines say the same."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from dtune.measure.passes import Passes
from dtune.models.load import build_model
from dtune.models.schema import Attention, Init, ModelConfig
from dtune.objectives.causal import causal_loss
from dtune.parallel.replica import allocate
from dtune.peft.schema import PEFT
from dtune.plan import trace
from dtune.plan.memory import full_batch, plain_loss
from dtune.plan.trace import Regime, Tracer
from dtune.runtime.schema import Recompute
from dtune.runtime.world import World
from dtune.types import Batch
from tests.distributed.training import Setup, build_engine, config_folder, make_batch

BLOCKS = 6
PLAIN = Regime(Recompute.none, offload=False, compute=torch.float32, autocasts=True)
REGIMES = [
    PLAIN,
    replace(PLAIN, compute=torch.bfloat16, recompute=Recompute.selective),
    replace(PLAIN, compute=torch.bfloat16, autocasts=False, recompute=Recompute.full),
    replace(PLAIN, offload=True),
    replace(PLAIN, offload=True, recompute=Recompute.full),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return config_folder(tmp_path_factory.mktemp("llama"), blocks=BLOCKS)


def tracer_of(folder: Path, peft: str = "lora", attention: Attention = Attention.sdpa) -> Tracer:
    config = ModelConfig(path=str(folder), attention=attention)
    model, spec = build_model(config, dtype=torch.float32, device=torch.device("cpu"))
    PEFT.config(peft)().build().inject(model, spec)
    return Tracer(model, spec, torch.device("cpu"))


def counted(tracer: Tracer, regime: Regime, *, whole: bool, batch: Batch | None = None) -> Passes:
    return tracer.count(batch or full_batch(2, 48), plain_loss, regime, whole=whole)


@pytest.mark.parametrize("peft", PEFT.names())
def test_few_blocks_say_it_of_all(folder: Path, peft: str) -> None:
    tracer = tracer_of(folder, peft)
    assert counted(tracer, PLAIN, whole=False) == counted(tracer, PLAIN, whole=True)


@pytest.mark.parametrize("regime", REGIMES, ids=str)
@pytest.mark.parametrize("peft", ["full", "lora"])
def test_few_blocks_say_it_of_all_in_every_regime(folder: Path, peft: str, regime: Regime) -> None:
    tracer = tracer_of(folder, peft)
    assert counted(tracer, regime, whole=False) == counted(tracer, regime, whole=True)


def test_too_few_blocks_are_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison rejects what one block of a run says: the first of them is another."""
    monkeypatch.setattr(trace, "KEPT", 1)
    tracer = tracer_of(folder)
    assert counted(tracer, PLAIN, whole=False) != counted(tracer, PLAIN, whole=True)


def live(world: World, setup: Setup) -> tuple[int, int]:
    """The most that the passes of a running engine allocate at once, and gradients at their end.

    By torch's profiler, which sees every allocation; gradients are there before, and filled.
    """
    engine = build_engine(world, setup)
    batch = make_batch(0, 0, packed=True, rows=16)
    for last in (False, True):
        with engine.micro(last=last):
            engine.backward(causal_loss(engine.model, batch).total / 100)
    gc.collect()
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with profiler, engine.micro(last=True):
        engine.backward(causal_loss(engine.model, batch).total / 100)
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    parameters = engine.module.parameters()
    return most, sum(p.grad.nbytes for p in parameters if p.grad is not None)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("peft", ["full", "lora", "dora", "prompt", "ia3"])
def test_the_peak_of_a_running_engine_is_what_was_planned(
    world: World, folder: Path, peft: str, recompute: str
) -> None:
    setup = Setup(str(folder), peft=peft, recompute=recompute, packed=True, random_weights=True)
    batch = make_batch(0, 0, packed=True, rows=16)
    regime = replace(PLAIN, recompute=Recompute(recompute))
    planned = counted(tracer_of(folder, peft), regime, whole=False, batch=batch)
    peak, gradients = live(world, setup)
    assert planned.peak == pytest.approx(peak, rel=0.05)
    assert planned.peak <= planned.peak_filling <= planned.peak + gradients
    # The comparison rejects the plan of another recomputation.
    other = replace(regime, recompute=Recompute.none if recompute == "full" else Recompute.full)
    wrong = counted(tracer_of(folder, peft), other, whole=False, batch=batch)
    assert wrong.peak != pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("peft", ["full", "lora", "dora", "bitfit", "prompt", "vera", "oft"])
def test_flops_are_those_that_torch_counts(folder: Path, peft: str) -> None:
    config = ModelConfig(path=str(folder), attention=Attention.eager, init=Init.random)
    model, spec = build_model(config, dtype=torch.float32, device=torch.device("cpu"))
    PEFT.config(peft)().build().inject(model, spec)
    # Of whatever values: operations are counted.
    allocate(model, torch.device("cpu"))
    model.train()
    batch = full_batch(2, 48)
    with FlopCounterMode(display=False) as counter:
        plain_loss(model, batch).backward()
    planned = counted(tracer_of(folder, peft, Attention.eager), PLAIN, whole=False, batch=batch)
    flops = sum(one.flops * count for one, count in planned.operations.items())
    assert flops == counter.get_total_flops() > 0


def test_recomputation_computes_the_blocks_once_more(folder: Path) -> None:
    tracer = tracer_of(folder)
    flops = {
        level: sum(
            one.flops * count
            for one, count in counted(
                tracer, replace(PLAIN, recompute=level), whole=False
            ).operations.items()
        )
        for level in (Recompute.none, Recompute.selective, Recompute.full)
    }
    assert flops[Recompute.none] < flops[Recompute.selective] <= flops[Recompute.full]
    assert 1.2 < flops[Recompute.full] / flops[Recompute.none] < 1.55
