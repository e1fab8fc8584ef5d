"""Parameters, gradients, optimizer and activations of every method, planned and counted."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import LlamaConfig

from dtune.config.support import ILLEGAL, forbids
from dtune.peft.schema import PEFT
from dtune.quant.schema import QUANT
from dtune.resources import resolve_path
from dtune.runtime.world import World
from tests.distributed.census import LIVE, plan, take_census
from tests.distributed.training import Setup

WITHIN = 0.05
TINY = Setup(resolve_path("dtune://tiny"), packed=True)
SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "head_dim": 128},
}
CELLS = [
    (peft, quant)
    for peft in PEFT.names()
    for quant in QUANT.names()
    if not any(
        forbids(rule, {"peft": peft, "quant": quant})
        for rule in ILLEGAL
        if rule.options.keys() == {"peft", "quant"}
    )
]


@pytest.fixture(scope="module", autouse=True)
def _only_own_garbage() -> Iterator[None]:
    """Each count looks for garbage, which takes half a second among all that is imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The configs of two layers of Llamas of 1 and 8 billion parameters, with few tokens."""
    return {shape: save_slice(tmp_path_factory.mktemp(shape), shape) for shape in SHAPES}


def save_slice(folder: Path, shape: str) -> str:
    """Write the config of one of them; its folder."""
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=1024,
        tie_word_embeddings=shape == "1b",
        **SHAPES[shape],
    ).save_pretrained(folder)
    return str(folder)


class Uncomputed(TorchDispatchMode):
    """What reads or writes as much as a weight gives tensors of the right size, unwritten.

    What is held does not depend on values, and everything else runs: the engine, autograd, the
    optimizer, all of activations, and real memory that they ask for.
    """

    LARGE = 1 << 20

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, returns = kwargs or {}, func._schema.returns
        given = [one for one in tree_leaves((args, kwargs)) if torch.is_tensor(one)]
        is_view = any(one.alias_info and not one.alias_info.is_write for one in returns)
        is_small = all(one.numel() <= self.LARGE or one.is_meta for one in given)
        if is_view or is_small:
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return args[0] if returns else None
        metas, named = tree_map_only(torch.Tensor, lambda one: one.to("meta"), (args, kwargs))
        device = {"device": torch.device("meta")} if "device" in named else {}
        made = func(*metas, **{**named, **device})
        return tree_map_only(torch.Tensor, lambda one: torch.empty_like(one, device="cpu"), made)


def differences(planned: dict[str, int], found: dict[str, int]) -> dict[str, float]:
    """Of what is counted, the part by which the plan is off; only what is off by too much."""
    off = {key: abs(planned[key] - found[key]) / max(1, found[key]) for key in LIVE}
    return {key: share for key, share in off.items() if share > WITHIN}


def assert_planned(
    world: World, setup: Setup, within: AbstractContextManager[Any] | None = None
) -> None:
    """Count a step, and hold the plan against it."""
    planned = plan(setup, ranks=1)
    with within or nullcontext():
        found = take_census(world, setup=setup, planned=planned, zeros=True)
    assert found["masters"] > 0
    assert found["activations"] > 0
    assert differences(planned, found) == {}
    # The comparison rejects a plan in which any of it is a tenth off.
    for key in (key for key in LIVE if found[key]):
        wrong = {**planned, key: planned[key] * 11 // 10 + 1}
        assert list(differences(wrong, found)) == [key]


ALWAYS = {"none": "tiny", "nf4": "8b", "int8": "1b", "fp4": "1b"}
"""Where a cell of the matrix is always counted; on the other models it is slow."""


def cells(*models: str) -> list[Any]:
    """Every cell on each of the models."""
    return [
        pytest.param(
            *((model,) if len(models) > 1 else ()),
            *(peft, quant),
            marks=[] if ALWAYS[quant] == model or peft == "lora" else [pytest.mark.slow],
        )
        for model in models
        for peft, quant in CELLS
    ]


def test_no_method_and_no_quantisation_goes_without_a_count() -> None:
    """Each has a cell that is never left out; every pair has one unless it is forbidden."""
    found = cells("tiny", *SHAPES)
    every = [one.values for one in found]
    always = [one.values for one in found if not one.marks]
    assert {peft for _, peft, _ in always} == set(PEFT.names())
    assert {quant for _, _, quant in always} == set(QUANT.names()) == set(ALWAYS)
    pairs = {(peft, quant) for peft in PEFT.names() for quant in QUANT.names()}
    refused = {("full", quant) for quant in QUANT.names() if quant != "none"}
    assert {(peft, quant) for _, peft, quant in every} == pairs - refused


@pytest.mark.parametrize(("peft", "quant"), cells("tiny"))
def test_the_tiny_model(world: World, peft: str, quant: str) -> None:
    assert_planned(world, replace(TINY, peft=peft, quant=quant, precision="bf16"))


@pytest.mark.slow
@pytest.mark.parametrize("peft", PEFT.names())
def test_the_tiny_model_in_fp32(world: World, peft: str) -> None:
    assert_planned(world, replace(TINY, peft=peft))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(("peft", "quant"), [("full", "none"), ("lora", "nf4"), ("dora", "none")])
def test_the_tiny_model_with_kernels(world: World, peft: str, quant: str, recompute: str) -> None:
    setup = replace(TINY, peft=peft, quant=quant, recompute=recompute, precision="bf16")
    assert_planned(world, replace(setup, kernels=True))


@pytest.mark.parametrize(("shape", "peft", "quant"), cells(*SHAPES))
def test_two_layers_of_large_models(
    world: World, slices: dict[str, str], shape: str, peft: str, quant: str
) -> None:
    # By itself it trains two blocks, which here are all that could be quantised.
    options = (("last_blocks", 1),) if peft == "freeze" else ()
    setup = replace(TINY, model=slices[shape], peft=peft, quant=quant, precision="bf16")
    # VeRA for real: unwritten, less is held of its large shared matrices than by real operations.
    within = nullcontext() if peft == "vera" else Uncomputed()
    assert_planned(world, replace(setup, peft_options=options), within)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("peft", "quant"), [("full", "none"), ("lora", "none"), ("lora", "nf4")])
def test_two_layers_of_large_models_computed(
    world: World, slices: dict[str, str], shape: str, peft: str, quant: str
) -> None:
    setup = replace(TINY, model=slices[shape], peft=peft, quant=quant, precision="bf16")
    assert_planned(world, setup)


@pytest.mark.parametrize(
    ("other", "off"),
    [
        ({"peft": "full", "quant": "none"}, {"masters", "gradients", "optimizer", "activations"}),
        ({"peft": "dora"}, {"activations"}),
        ({"peft": "ia3"}, {"masters", "gradients", "optimizer"}),
        ({"quant": "none"}, {"frozen"}),
        ({"quant": "int8"}, {"frozen"}),
        ({"precision": "fp32"}, {"activations"}),
        ({"recompute": "full"}, {"activations"}),
        ({"optim": "sgd"}, {"optimizer"}),
        ({"kernels": True}, {"activations"}),
    ],
    # A set's own order is another in every process.
    ids=lambda value: str(value) if isinstance(value, dict) else "-".join(sorted(value)),
)
def test_the_plan_of_another_run_is_rejected(
    world: World, other: dict[str, Any], off: set[str]
) -> None:
    setup = replace(TINY, peft="lora", quant="nf4", precision="bf16")
    found = take_census(world, setup=setup, planned=plan(setup, ranks=1), zeros=True)
    assert off <= differences(plan(replace(setup, **other), ranks=1), found).keys()
