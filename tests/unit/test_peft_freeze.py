"""Training of parts of the base: what is chosen, and the whole model that is exported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from dtune.build import build_trained_model, prepare_engine, weights_of
from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.errors import ConfigError
from dtune.models.load import build_model
from dtune.peft.freeze import Freeze
from dtune.peft.schema.freeze import FreezeConfig
from dtune.resources import resolve_path
from dtune.runtime.world import World
from dtune.train.export import Exporter
from tests.contracts.small_models import (
    DictSource,
    build_on_meta,
    exported_tensors,
    load_base,
    materialize,
    read_whole,
    save_base,
)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("tied"), "llama", tied=True)


def trained_by(base: Path, **settings: object) -> set[str]:
    model, spec = build_on_meta(base)
    Freeze(FreezeConfig(**settings)).inject(model, spec)
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


ATTENTION = {f"self_attn.{n}_proj.weight" for n in "qkvo"}
MLP = {f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
BLOCK = ATTENTION | MLP | {"input_layernorm.weight", "post_attention_layernorm.weight"}


def of_blocks(leaves: set[str], *blocks: int) -> set[str]:
    return {f"model.layers.{block}.{leaf}" for block in blocks or (0, 1) for leaf in leaves}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, of_blocks(BLOCK)),
        ({"last_blocks": 1}, of_blocks(BLOCK, 1)),
        ({"last_blocks": 1, "final_norm": True}, of_blocks(BLOCK, 1) | {"model.norm.weight"}),
        (
            {"last_blocks": 0, "embeddings": True, "head": True},
            {"model.embed_tokens.weight", "lm_head.weight"},
        ),
        ({"patterns": ["attention"]}, of_blocks(ATTENTION)),
        ({"patterns": ["mlp"], "last_blocks": 1}, of_blocks(MLP) | of_blocks(BLOCK, 1)),
        ({"patterns": ["all-linear"]}, of_blocks(ATTENTION | MLP)),
        ({"patterns": ["head"]}, {"lm_head.weight"}),
        (
            {"patterns": ["q_proj", "norm"]},
            {"model.norm.weight"} | of_blocks({"self_attn.q_proj.weight"}),
        ),
        ({"patterns": ["model.layers.0"]}, of_blocks(BLOCK, 0)),
        ({"patterns": ["*.1.mlp.*"]}, of_blocks(MLP, 1)),
        ({"patterns": ["model.layers.*.*_layernorm"]}, of_blocks(BLOCK - ATTENTION - MLP)),
        ({"patterns": ["model.norm.weight"]}, {"model.norm.weight"}),
    ],
)
def test_trains_what_is_named_and_nothing_else(
    untied: Path, settings: dict[str, object], expected: set[str]
) -> None:
    assert trained_by(untied, **settings) == expected


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"patterns": ["q_porj"]}, r"'q_porj' matches no parameter.*did you mean .*q_proj"),
        ({"patterns": ["mlp", "atention"]}, "did you mean attention"),
        ({"patterns": ["model.layer.0.mlp"]}, r"did you mean .*model\.layers\.0\.mlp"),
        ({"last_blocks": 3}, r"peft\.last_blocks=3: .* has 2 blocks"),
        ({"last_blocks": 0}, r"peft\.last_blocks=0 trains nothing"),
        ({"last_blocks": -2}, r"peft\.last_blocks=-2 must be at least 0"),
    ],
)
def test_choice_that_cannot_be_is_refused(
    untied: Path, settings: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        trained_by(untied, **settings)


@pytest.mark.parametrize(
    "settings",
    [{"head": True}, {"embeddings": True}, {"patterns": ["lm_head"]}, {"patterns": ["model.*"]}],
)
def test_half_of_a_shared_parameter_is_refused(tied: Path, settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"lm_head\.weight.* choose both"):
        trained_by(tied, last_blocks=0, **settings)
    both = trained_by(tied, last_blocks=0, embeddings=True, head=True)
    assert both == {"model.embed_tokens.weight"}


def test_part_that_a_model_lacks_is_refused(untied: Path) -> None:
    model, spec = build_on_meta(untied)
    model.model.norm = nn.Identity()
    with pytest.raises(ConfigError, match=r"peft\.final_norm=true: llama .* set peft\.final_norm"):
        Freeze(FreezeConfig(final_norm=True)).inject(model, spec)


def test_saved_gives_back_what_was_trained_and_only_that(untied: Path, tmp_path: Path) -> None:
    model, spec = build_on_meta(untied)
    method = Freeze(FreezeConfig(last_blocks=1))
    method.inject(model, spec)
    materialize(model, method, untied)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0 if parameter.requires_grad else 0.0)
    method.save(exported_tensors(model, method), str(tmp_path / "model"))
    source = method.saved(str(tmp_path / "model"))
    for name, parameter in model.named_parameters():
        # A run that starts from it has the rest, and so exports it, from its own base.
        assert (name in source) is parameter.requires_grad, name
        if parameter.requires_grad:
            assert torch.equal(read_whole(source, name), parameter), name


def test_model_whose_frozen_part_is_another_is_refused(untied: Path, tmp_path: Path) -> None:
    """It would be lost: what is not trained comes from the base."""
    tensors = load_base(untied).state_dict()
    # As a quantised linear computes: near what is stored, and not equal to it.
    coarse = {n: t * 1.05 if "proj" in n else t for n, t in tensors.items()}
    model, spec = build_on_meta(untied)
    method = Freeze(FreezeConfig(last_blocks=1))
    method.inject(model, spec)
    method.source(DictSource(tensors), DictSource(coarse), 0)
    name = "model.layers.0.mlp.up_proj.weight"
    folder = tmp_path / "model"
    for value in (tensors[name], coarse[name], coarse[name] * (1 + 2**-9)):
        method.save(iter({**tensors, name: value}.items()), str(folder))
        assert name not in method.saved(str(folder))
    for value in (tensors[name] * (1 + 2**-9), tensors[name] * 1.1):
        method.save(iter({**tensors, name: value}.items()), str(folder))
        with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.up_proj\.weight is not the base's"):
            method.saved(str(folder))


def test_model_of_another_architecture_is_refused(untied: Path, tmp_path: Path) -> None:
    model, spec = build_on_meta(untied)
    method = Freeze(FreezeConfig())
    method.inject(model, spec)
    with pytest.raises(ConfigError, match="holds no model"):
        method.saved(str(tmp_path))
    other = load_base(untied)
    other.model.layers[1].mlp.up_proj.weight.data = torch.zeros(3, 4)
    other.save_pretrained(tmp_path / "shape")
    with pytest.raises(ConfigError, match=r"up_proj\.weight has shape \(3, 4\), expected"):
        method.saved(str(tmp_path / "shape"))
    del other.model.layers[1]
    other.save_pretrained(tmp_path / "short")
    with pytest.raises(ConfigError, match=r"holds no model\.layers\.1"):
        method.saved(str(tmp_path / "short"))


@pytest.mark.parametrize("settings", [("peft=freeze", "peft.last_blocks=1"), ("peft=bitfit",)])
def test_export_has_what_was_trained_and_the_base_as_it_was_held(
    world: World, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    """Held is what a quantised linear computes with: here every stored value and a half."""
    run = load_frozen(compose_overrides("train", ["model=tiny", *settings]))
    built = build_trained_model(run, load=True, device=world.device)
    weights = weights_of(built, seed=0, start=None)
    engine = run.parallel.build(world, run.precision.name)
    prepare_engine(engine, built, run, weights, total_steps=1)
    with torch.no_grad():
        for parameter in engine.module.parameters():
            if parameter.requires_grad:
                parameter.mul_(2.0)
    stored = {n: read_whole(weights.held, n) for n in weights_names(built.model)}
    held = DictSource({name: value * 1.5 for name, value in stored.items()})
    tokenizer = AutoTokenizer.from_pretrained(resolve_path("dtune://tiny"))
    exporter = Exporter(engine, built.method, held, built.frozen, tokenizer, world)
    exporter.export(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == built.spec.stored_dtype == torch.float16
    found = dict(model.named_parameters())
    assert found.keys() == stored.keys()
    for name, value in stored.items():
        factor = 1.5 if name in built.frozen else 2.0
        assert torch.equal(found[name], value * factor), name
    assert 0 < len(built.frozen) < len(stored)
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    # What space is kept for, without the header of the file.
    assert 0 < size - built.method.exported_bytes() < 8192
    again, spec = build_model(run.model, dtype=torch.float32)
    wider = run.peft.build()
    wider.inject(again, replace(spec, stored_dtype=torch.float32))
    assert wider.exported_bytes() == 2 * built.method.exported_bytes()


def weights_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]
