"""BitFit: biases and norms by what they are, not by what they are called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from dtune.errors import ConfigError
from dtune.models.spec import describe
from dtune.peft.bitfit import Bitfit
from dtune.peft.schema.bitfit import BitfitConfig
from dtune.types import ModelSpec
from tests.contracts.small_models import build_on_meta, save_base
from tests.unit.families import FAMILIES, family_config


def small(family: str) -> tuple[PreTrainedModel, ModelSpec]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(family_config(family))
    model.tie_weights()
    return model, describe(model, family)


def trained_in(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_trained_and_matrices_are_not(family: str) -> None:
    """In these families every parameter of one dimension is a bias or a norm's."""
    model, spec = small(family)
    report = Bitfit(BitfitConfig()).inject(model, spec)
    assert trained_in(model) == {n for n, p in model.named_parameters() if p.ndim == 1}
    assert 0 < report.trainable < 0.05 * report.total


def test_biases_and_norms_can_be_trained_alone() -> None:
    model, spec = small("qwen2")
    Bitfit(BitfitConfig(norms=False)).inject(model, spec)
    biases = {f"model.layers.{i}.self_attn.{n}_proj.bias" for i in (0, 1) for n in "qkv"}
    assert trained_in(model) == biases
    model, spec = small("qwen2")
    Bitfit(BitfitConfig(biases=False)).inject(model, spec)
    assert trained_in(model) == {n for n, _ in model.named_parameters() if "norm" in n}


class FamilyOwnRMSNorm(nn.Module):
    """As model code has them."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(32))


@pytest.fixture
def llama(tmp_path: Path) -> tuple[PreTrainedModel, ModelSpec]:
    return build_on_meta(save_base(tmp_path, "llama"))


def test_norms_are_found_by_their_class(llama: tuple[PreTrainedModel, ModelSpec]) -> None:
    model, spec = llama
    model.model.norm = nn.Linear(32, 32, bias=False, device="meta")
    block = model.model.layers[0]
    block.input_layernorm = FamilyOwnRMSNorm()
    block.post_attention_layernorm = nn.LayerNorm(32, device="meta")
    Bitfit(BitfitConfig()).inject(model, spec)
    assert trained_in(model) == {
        "model.layers.0.input_layernorm.gain",
        "model.layers.0.post_attention_layernorm.weight",
        "model.layers.0.post_attention_layernorm.bias",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
    }


def test_model_with_nothing_to_train_is_refused(
    llama: tuple[PreTrainedModel, ModelSpec],
) -> None:
    model, spec = llama
    with pytest.raises(ConfigError, match=r"has no biases to train; set peft\.norms=true"):
        Bitfit(BitfitConfig(norms=False)).inject(model, spec)
    for path, module in list(model.named_modules()):
        if "norm" in path:
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.Identity())
            assert module is not model.get_submodule(path)
    with pytest.raises(ConfigError, match="no biases and no norms to train; use peft=lora"):
        Bitfit(BitfitConfig()).inject(model, spec)
    with pytest.raises(ConfigError, match="trains nothing"):
        BitfitConfig(biases=False, norms=False)
