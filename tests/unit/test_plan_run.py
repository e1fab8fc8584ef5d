"""A plan of a run for a card: its work, its attention, and where its bytes lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.config.run import RunConfig
from dtune.measure.operations import Operation
from dtune.models.attention import VARLEN
from dtune.peft.schema import PEFT
from dtune.plan.auto import decide
from dtune.plan.cards import find_card
from dtune.plan.memory import full_batch, mean_length_of
from dtune.plan.run import Planner, RunPlan, UncountableError, plan_run

CARD = find_card("h200")
TINY = ("precision=bf16", "data.max_length=96", "train.global_batch_size=16")


def settings(*more: str) -> RunConfig:
    return load_frozen(compose_overrides("train", [*TINY, *more]))


def attention_of(plan: RunPlan) -> float:
    """FLOPs of attention in one micro batch."""
    operations = plan.operations.items()
    return sum(one.flops * count for one, count in operations if one.kind == "attention")


@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_work_is_that_of_the_formula(kernels: str) -> None:
    """4 FLOPs a frozen parameter, 6 a trained one, 7 S d a layer of causal attention over S."""
    length = 512
    sizes = (f"data.max_length={length}", "train.micro_batch_size=1", "train.recompute=none")
    run = settings("model=llama3_8b", f"kernels={kernels}", *sizes)
    planner = Planner(run, 1, CARD)
    plan = planner.plan(run)
    matrices, text = planner.built.matrices, planner.built.spec.config.get_text_config()
    width = text.num_attention_heads * text.head_dim
    attention = 7 * length // 2 * width * text.num_hidden_layers
    assert attention_of(plan) / length == pytest.approx(attention)
    head = 4 * matrices.head_frozen
    a_token = 4 * matrices.frozen + 6 * matrices.trained + head + attention
    assert plan.flops / plan.micros / length == pytest.approx(a_token, rel=0.01)
    assert plan.times is not None
    assert plan.times.floor == pytest.approx(plan.flops / CARD.half_flops, rel=1e-3)


def test_attention_is_that_of_the_card_and_as_long_as_documents_are() -> None:
    run = settings("train.micro_batch_size=2")
    planner = Planner(run, 1, CARD)
    assert planner.attention == VARLEN
    whole, halves = (full_batch(2, 96, documents=n) for n in (1, 2))
    of_whole, of_halves = (attention_of(planner.plan(run, one)) for one in (whole, halves))
    assert of_halves == of_whole / 2 > 0
    assert (mean_length_of(whole), mean_length_of(halves)) == (96, 48)
    # It takes no masks, which are in proportion to the square of the length.
    lengths = (960, 1920)
    sizes = [planner.memory(run, full_batch(2, n)).saved.activations for n in lengths]
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=1e-3)
    assert Planner(settings("precision=fp32"), 1, CARD).attention == "sdpa"
    assert Planner(settings("model.attention=sdpa"), 1, CARD).attention == "sdpa"
    assert Planner(run, 1, None).attention == "sdpa"


def test_a_window_is_all_that_attention_computes() -> None:
    from dtune.measure.operations import cost_of

    def flops(window: int) -> int:
        query = torch.empty(300, 4, 8, dtype=torch.bfloat16, device="meta")
        bounds = torch.tensor([0, 100, 300], dtype=torch.int32)
        args = (query, query, query, bounds, bounds, 300, 300, window < 0, None, [window, 0])
        op = torch.ops.torch_attn._varlen_attn.default
        found = cost_of(op, args, {}, query, known=lambda one: one.tolist())
        assert isinstance(found, Operation)
        return found.flops

    pairs = sum(min(place + 1, 10) for length in (100, 200) for place in range(length))
    assert flops(9) == pytest.approx(2 * 2 * pairs * 4 * 8, rel=0.05)
    assert flops(-1) == pytest.approx(2 * 2 * (100**2 + 200**2) / 2 * 4 * 8)


@torch.library.custom_op("dtune_tests::of_unknown_shape", mutates_args=())
def of_unknown_shape(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


def of_a_shape_by_values(x: torch.Tensor) -> torch.Tensor:
    return x[x > 0]


@pytest.mark.parametrize(
    ("operation", "said"),
    [
        (of_unknown_shape, r"cannot do on tensors without values.*of_unknown_shape"),
        (of_a_shape_by_values, "decides by values"),
    ],
)
def test_what_cannot_be_counted_without_values_is_said(
    operation: Callable[[torch.Tensor], torch.Tensor], said: str
) -> None:
    run = settings("data.max_length=64")
    planner = Planner(run, 1, None)
    norm = planner.built.model.get_submodule("model.norm")
    norm.register_forward_hook(lambda module, args, output: operation(output))
    with pytest.raises(UncountableError, match=said):
        planner.memory(run)


OF_THEIR_OWN = ("full", "lora", "prefix", "prompt", "p_tuning")
"""Methods that change what attention is given, and two that do not."""


@pytest.mark.parametrize(
    "peft",
    [
        name if name in OF_THEIR_OWN else pytest.param(name, marks=pytest.mark.slow)
        for name in PEFT.names()
    ],
)
def test_every_method_is_planned_for_a_card(peft: str) -> None:
    run = settings(f"peft={peft}", "parallel=auto", "train.recompute=auto")
    planner = Planner(run, 2, CARD)
    chosen = decide(planner, CARD.memory).run
    assert (chosen.parallel.name, chosen.train.recompute.value) == ("ddp", "none")
    plan = planner.plan(chosen)
    assert plan.fits
    assert plan.times is not None
    assert 0 < plan.times.floor < plan.times.step
    assert plan.memory.low <= plan.memory.likely < plan.memory.high


def host_of(engine: str, *more: str) -> tuple[set[str], int, int]:
    """What an offloading engine has in host memory, its bytes, and those of the device."""
    run = settings(f"parallel={engine}", "parallel.cpu_offload=true", *more)
    memory = plan_run(run, 2, CARD).memory
    return set(memory.held.host), memory.host_bytes, memory.device_bytes


def test_what_an_engine_offloads_is_in_host_memory_and_nothing_else() -> None:
    once = ("train.micro_batch_size=8",)
    every = {"frozen", "masters", "copies", "gradients", "optimizer"}
    assert host_of("zero3", *once)[0] == host_of("fsdp", *once)[0] == every
    assert host_of("zero2", *once)[0] == every - {"frozen", "copies"}
    assert host_of("zero1", *once)[0] == every - {"frozen", "copies", "gradients"}
    # Gradients that wait for the last micro batch are whole, and on the device.
    assert host_of("fsdp", "train.micro_batch_size=1")[0] == every - {"gradients"}
    _, host, device = host_of("zero2", *once)
    held = plan_run(settings("parallel=zero2", *once), 2, CARD).memory
    assert host == held.held.masters + held.held.optimizer + held.held.gradients
    assert device == held.device_bytes - host


def test_a_cpu_has_no_other_memory_to_offload_to() -> None:
    run = settings("parallel=fsdp", "parallel.cpu_offload=true")
    plain = settings("parallel=fsdp")
    offloaded, kept = (plan_run(one, 2, None).memory for one in (run, plain))
    assert offloaded.host_bytes == 0
    assert offloaded.likely == kept.likely


def test_weights_that_stay_dequantised_are_counted() -> None:
    run = settings("quant=nf4")
    cached = replace(run, quant=replace(run.quant, cache_gib=1.0))  # type: ignore[call-arg]
    without, memory = (plan_run(one, 1, CARD) for one in (run, cached))
    parts = {part.name: part.likely for part in memory.memory.parts()}
    # A gibibyte has room for all of them: 2 bytes a weight of bf16, where 4 bits were half a byte.
    codes = sum(part.likely for part in without.memory.parts() if part.name == "frozen weights")
    assert 0 < parts["weights kept dequantised"] < 4 * codes
    assert memory.memory.held == without.memory.held
    assert memory.memory.saved.activations == without.memory.saved.activations
    assert memory.moved < without.moved


def test_logits_are_told_apart_from_the_rest() -> None:
    """Those that are saved without kernels, those of a chunk with them."""
    run = settings("data.max_length=512")
    plain = plan_run(run, 1, CARD).memory
    fused = plan_run(settings("data.max_length=512", "kernels=auto"), 1, CARD).memory
    assert plain.saved.wide >= plain.saved.logits > 0
    assert fused.saved.logits == 0
    assert 0 < fused.saved.wide < plain.saved.wide
    assert any("logits, or those of a chunk" in row for row in plain.rows())
