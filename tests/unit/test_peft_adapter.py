"""Bottleneck adapters: where they are, what they compute, and their files."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from dtune.errors import ConfigError
from dtune.models.spec import describe
from dtune.patch.apply import apply_patches
from dtune.patch.base import patch_names
from dtune.peft.adapter import Adapter, Bottleneck, ParallelAdapter, SequentialAdapter
from dtune.peft.schema.adapter import Activation, AdapterConfig, Kind
from tests.contracts.small_models import (
    build_on_meta,
    check_failed_save,
    injected_twin,
    load_base,
    read_whole,
    save_base,
    sources,
    token_ids,
    trained_tensors,
)
from tests.unit.families import FAMILIES, family_config

SMALL: dict[str, Any] = {"bottleneck": 5, "scale": 1.5}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), "llama")


def trained(base: Path, config: AdapterConfig) -> tuple[PreTrainedModel, Adapter]:
    """A model whose adapters are far from their start."""
    method = Adapter(config)
    return injected_twin(base, method, noise=0.3), method


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_where_their_kind_says(family: str) -> None:
    for kind, expected in (
        (Kind.houlsby, ["self_attn.o_proj", "mlp.down_proj"]),
        (Kind.pfeiffer, ["mlp.down_proj"]),
        (Kind.parallel, ["mlp"]),
    ):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(family_config(family))
        model.tie_weights()
        stored = {name for name, _ in model.named_parameters()}
        method = Adapter(AdapterConfig(kind=kind, bottleneck=5))
        method.inject(model, describe(model, family))
        found = [
            name
            for name, module in model.named_modules()
            if isinstance(module, (SequentialAdapter, ParallelAdapter))
        ]
        assert found == [f"model.layers.{block}.{place}" for block in (0, 1) for place in expected]
        frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
        assert {method.stored_name(name) for name in frozen} == stored
        added = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
        shapes = {"down.weight": (5, 32), "down.bias": (5,), "up.weight": (32, 5), "up.bias": (32,)}
        assert added == {
            f"{path}.adapter.{leaf}": shape for path in found for leaf, shape in shapes.items()
        }


WB = ("weight", "bias")


def with_hooks(base: Path, ours: nn.Module, config: AdapterConfig) -> PreTrainedModel:
    """transformers' own model, with adapters as hooks on its modules: nothing of ours in it."""
    model = load_base(base)
    values = dict(ours.named_parameters())
    act = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}[config.activation.value]
    places = {"houlsby": ("self_attn.o_proj", "mlp.down_proj"), "pfeiffer": ("mlp.down_proj",)}
    for block, place in itertools.product((0, 1), places.get(config.kind.value, ("mlp",))):
        path = f"model.layers.{block}.{place}"

        def hook(_: nn.Module, x: Any, y: torch.Tensor, path: str = path) -> torch.Tensor:
            given = x[0] if config.kind is Kind.parallel else y
            hidden = act(F.linear(given, *(values[f"{path}.adapter.down.{p}"] for p in WB)))
            return y + F.linear(hidden, *(values[f"{path}.adapter.up.{p}"] for p in WB)) * (
                config.scale
            )

        model.get_submodule(path).register_forward_hook(hook)
    return model


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("kind", Kind)
def test_forward_and_gradients_equal_hooks_on_the_plain_model(
    base: Path, kind: Kind, activation: Activation
) -> None:
    config = AdapterConfig(kind=kind, activation=activation, **SMALL)
    ours, _ = trained(base, config)
    logits = ours(token_ids()).logits
    parameters = [p for p in ours.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(logits.square().mean(), parameters)
    theirs = with_hooks(base, ours, config)(token_ids()).logits
    assert torch.equal(logits, theirs)
    for one, other in zip(
        gradients, torch.autograd.grad(theirs.square().mean(), parameters), strict=True
    ):
        assert one.abs().max() > 0
        assert torch.equal(one, other)
    unscaled = AdapterConfig(kind=kind, activation=activation, bottleneck=5)
    assert not torch.equal(logits, with_hooks(base, ours, unscaled)(token_ids()).logits)


@pytest.mark.parametrize("kind", Kind)
def test_generation_with_a_cache_gives_the_same_tokens(base: Path, kind: Kind) -> None:
    model, _ = trained(base, AdapterConfig(kind=kind, **SMALL))
    prompt = token_ids()[:, :5]
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached = model.generate(prompt, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **settings))
    plain = load_base(base).generate(prompt, use_cache=True, **settings)
    assert not torch.equal(cached, plain)


def test_dropout_is_between_the_projections_and_only_in_training() -> None:
    adapter = Bottleneck(8, AdapterConfig(bottleneck=64, dropout=0.5), device=torch.device("cpu"))
    nn.init.zeros_(adapter.up.weight)
    x = torch.randn(3, 8)
    nn.init.ones_(adapter.up.bias)
    # What is added last is never dropped.
    assert torch.equal(adapter.train()(x), torch.ones(3, 8))
    nn.init.ones_(adapter.up.weight)
    assert not torch.equal(adapter(x), adapter(x))
    assert torch.equal(adapter.eval()(x), adapter(x))
    torch.manual_seed(0)
    dropped = adapter.train()(x)
    torch.manual_seed(0)
    expected = F.linear(F.dropout(F.relu(adapter.down(x)), 0.5), adapter.up.weight, adapter.up.bias)
    assert torch.equal(dropped, expected)


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
def test_without_autocast_the_output_has_the_dtype_of_the_base(adapters: torch.dtype) -> None:
    config = AdapterConfig(**SMALL)
    for wrapper in (SequentialAdapter, ParallelAdapter):
        base = nn.Linear(8, 8).bfloat16()
        layer = wrapper(base, Bottleneck(8, config, device=torch.device("cpu")))
        layer.adapter.to(adapters)
        y = layer(torch.randn(3, 8, dtype=torch.bfloat16))
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16
        assert layer.adapter.down.weight.grad is not None
        assert layer.adapter.down.weight.grad.dtype == adapters
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(torch.randn(3, 8)).dtype == torch.bfloat16


def test_initial_values_depend_on_seed_and_name_alone(base: Path) -> None:
    model, spec = build_on_meta(base)
    method = Adapter(AdapterConfig(bottleneck=64))
    method.inject(model, spec)
    name, other = (f"model.layers.{i}.mlp.down_proj.adapter.down.weight" for i in (0, 1))
    source = sources(method, base, seed=7)[1]
    whole = source.read(name, 0, 64 * 32)
    parts = [source.read(name, a, b) for a, b in ((50, 2048), (0, 50))]
    assert torch.equal(torch.cat(parts[::-1]), whole)
    assert not torch.equal(source.read(other, 0, 2048), whole)
    assert not torch.equal(sources(method, base, seed=8)[1].read(name, 0, 2048), whole)
    # Kaiming-uniform with a = sqrt(5); the extreme of n draws is within 10/n but once in e^-10.
    bound = 1 / math.sqrt(32)
    assert bound * (1 - 10 / 2048) <= whole.abs().max() <= bound
    for leaf in ("down.bias", "up.weight", "up.bias"):
        rest = name.replace("down.weight", leaf)
        assert not source.read(rest, 0, math.prod(source.shape(rest))).any()


def test_files_say_all_settings_and_only_the_same_are_read(base: Path, tmp_path: Path) -> None:
    config = AdapterConfig(kind=Kind.pfeiffer, activation=Activation.gelu, dropout=0.25, **SMALL)
    model, method = trained(base, config)
    folder = tmp_path / "adapter"
    method.save(trained_tensors(model), str(folder))
    assert {p.name for p in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert json.loads((folder / "adapter_config.json").read_text()) == {
        "peft_type": "BOTTLENECK",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "inference_mode": True,
        "kind": "pfeiffer",
        "bottleneck": 5,
        "activation": "gelu",
        "dropout": 0.25,
        "scale": 1.5,
        "adapted_modules": [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)],
    }
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors.keys() == {f"base_model.model.{name}" for name, _ in trained_tensors(model)}
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


@pytest.mark.parametrize("kind", Kind)
def test_saved_values_come_back_under_their_names(base: Path, tmp_path: Path, kind: Kind) -> None:
    model, method = trained(base, AdapterConfig(kind=kind, **SMALL))
    method.save(trained_tensors(model), str(tmp_path / "adapter"))
    _, other = trained(base, AdapterConfig(kind=kind, **SMALL))
    source = other.saved(str(tmp_path / "adapter"))
    for name, parameter in model.named_parameters():
        assert (name in source) is parameter.requires_grad
        if parameter.requires_grad:
            assert torch.equal(read_whole(source, name), parameter), name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": Kind.houlsby}, "kind is pfeiffer"),
        ({"bottleneck": 4}, "bottleneck is 5"),
        ({"activation": Activation.silu}, "activation is relu"),
        ({"scale": 1.0}, r"scale is 1\.5"),
    ],
)
def test_adapter_of_other_settings_is_refused(
    base: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    settings: dict[str, Any] = {"kind": Kind.pfeiffer, **SMALL}
    model, method = trained(base, AdapterConfig(**settings))
    method.save(trained_tensors(model), str(tmp_path / "adapter"))
    _, other = trained(base, AdapterConfig(**{**settings, **change}))
    with pytest.raises(ConfigError, match=said):
        other.saved(str(tmp_path / "adapter"))
    with pytest.raises(ConfigError, match="holds no adapter"):
        method.saved(str(tmp_path / "nowhere"))


def test_failed_save_runs_through_the_tensors_and_keeps_the_older_adapter(
    base: Path, tmp_path: Path
) -> None:
    model, method = trained(base, AdapterConfig(bottleneck=64))
    check_failed_save(model, method, tmp_path / "adapter")


def test_block_of_another_structure_is_refused(base: Path) -> None:
    model, spec = build_on_meta(base)
    experts = type(spec)(**{**vars(spec), "linears": _as_if_expert(spec.linears)})
    for kind in Kind:
        with pytest.raises(ConfigError, match=r"layers\.0 of llama .* has no mlp that ends in one"):
            Adapter(AdapterConfig(kind=kind)).inject(model, experts)
    assert not any(isinstance(m, (SequentialAdapter, ParallelAdapter)) for m in model.modules())


def _as_if_expert(linears: Any) -> dict[str, Any]:
    """Roles as if o_proj belonged to the MLP: the linears of one role are then in two modules."""
    mlp = linears["model.layers.0.mlp.up_proj"]
    return {path: mlp if path.endswith("o_proj") else role for path, role in linears.items()}


@pytest.mark.parametrize("change", [{"bottleneck": 0}, {"dropout": 1.0}, {"scale": 0.0}])
def test_settings_out_of_range_are_refused(change: dict[str, Any]) -> None:
    (key,) = change
    with pytest.raises(ConfigError, match=rf"peft\.{key}="):
        AdapterConfig(**change)


@pytest.mark.parametrize("kind", Kind)
def test_kernels_take_what_is_left_and_group_no_wrapped_linear(base: Path, kind: Kind) -> None:
    model, _ = trained(base, AdapterConfig(kind=kind, **SMALL))
    plain = model(token_ids()).logits
    _, spec = build_on_meta(base)
    rows = apply_patches(model, patch_names(), spec)
    mlps = [row for row in rows if row.patch == "mlp" and not row.reason]
    assert [(row.count, row.after) for row in mlps] == [(2, "MLP with fused activation")]
    patched = model(token_ids()).logits
    exact = model.double()(token_ids()).logits
    # As far from the exact result as the plain model is, give or take the order of its sums.
    assert (patched - exact).abs().max() <= 2 * (plain - exact).abs().max()
    assert (0.99 * plain - exact).abs().max() > 2 * (plain - exact).abs().max()


@pytest.mark.parametrize("wrapper", [SequentialAdapter, ParallelAdapter])
def test_compiles_into_one_graph_with_equal_results(wrapper: type[nn.Module]) -> None:
    adapter = Bottleneck(8, AdapterConfig(**SMALL), device=torch.device("cpu"))
    nn.init.normal_(adapter.up.weight)
    layer = wrapper(nn.Linear(8, 8), adapter)
    x = torch.randn(3, 8)
    for enabled in (False, True):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert torch.equal(compiled(x), layer(x))
