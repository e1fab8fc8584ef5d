"""Parameters, gradients, optimizer and activations of every method, planned and counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dtune.peft.schema import PEFT
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


def slice_of(folder: Path, shape: str) -> Path:
    """Write the config of two layers of a Llama of that size, with few tokens."""
    from transformers import LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=1024,
        tie_word_embeddings=shape == "1b",
        **SHAPES[shape],
    ).save_pretrained(folder)
    return folder


def differences(planned: dict[str, int], found: dict[str, int]) -> dict[str, float]:
    """Of what is counted, the part by which the plan is off; only what is off by too much."""
    off = {key: abs(planned[key] - found[key]) / max(1, found[key]) for key in LIVE}
    return {key: share for key, share in off.items() if share > WITHIN}


def check(world: World, setup: Setup) -> None:
    planned = plan(setup, ranks=1)
    found = take_census(world, setup=setup, planned=planned, zeros=True)
    assert found["masters"] > 0
    assert found["activations"] > 0
    assert differences(planned, found) == {}
    # The comparison rejects a plan in which any of it is a tenth off.
    for key in (key for key in LIVE if found[key]):
        wrong = {**planned, key: planned[key] * 11 // 10 + 1}
        assert list(differences(wrong, found)) == [key]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("peft", PEFT.names())
def test_the_tiny_model(world: World, peft: str, precision: str) -> None:
    check(world, replace(TINY, peft=peft, precision=precision))


@pytest.mark.slow
@pytest.mark.parametrize("peft", PEFT.names())
def test_two_layers_of_1b(world: World, tmp_path: Path, peft: str) -> None:
    check(world, replace(TINY, model=str(slice_of(tmp_path, "1b")), peft=peft))


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize("peft", PEFT.names())
def test_two_layers_of_8b(world: World, tmp_path: Path, peft: str, quant: str) -> None:
    if quant != "none" and peft == "full":
        pytest.skip("weights of 4 bits cannot be trained")
    setup = replace(TINY, model=str(slice_of(tmp_path, "8b")), peft=peft, quant=quant)
    check(world, replace(setup, precision="bf16"))
