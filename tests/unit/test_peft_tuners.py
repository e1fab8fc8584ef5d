"""Methods from HF ``peft``: equal to it in forward, gradient and file, over any base."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.errors import ConfigError
from dtune.peft.base import replace_module
from dtune.peft.hf import READS_WEIGHT, Hf, fits
from dtune.peft.schema import PEFT
from dtune.peft.schema.hf import OWN, REFUSED, TYPES, HfConfig
from dtune.peft.tuners import Tuner, skeleton
from dtune.types import ModelSpec
from tests.contracts.small_models import (
    build_on_meta,
    injected_twin,
    load_base,
    materialize,
    read_whole,
    save_base,
    sources,
    token_ids,
    trained_tensors,
)

# What the small model, whose layers are 16 to 48 wide, needs.
SMALL: dict[str, dict[str, Any]] = {
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 50},
    "HIRA": {"r": 4},
    "HRA": {"r": 4},
    "MISS": {"r": 4},
    "PEANUT": {"r": 4},
    "PVERA": {"r": 16},
    "RANDLORA": {"r": 8},
    "ROAD": {"group_size": 8},
    "WAVEFT": {"n_frequency": 50},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ia3": ("ia3", {}),
    "ia3-outputs": ("ia3", {"targets": ["attention"], "feedforward": []}),
    "adalora": ("adalora", {}),
    "vera": ("vera", {"rank": 16, "dropout": 0.25}),
    "oft": ("oft", {"block_size": 8}),
    "oft-exact": ("oft", {"block_size": 8, "neumann_terms": 0, "share_blocks": True}),
    "loha": ("loha", {"rank": 4, "rank_dropout": 0.25}),
    "lokr": ("lokr", {"rank": 4}),
    "lokr-small": ("lokr", {"rank": 1, "decompose_both": True, "rank_dropout": 0.25}),
    "layernorm": ("layernorm", {}),
    **{name: ("hf", {"type": name, "options": SMALL.get(name, {})}) for name in TYPES},
}


def method_of(case: str) -> Tuner:
    name, options = CASES[case]
    method = PEFT.config(name)(**options).build()
    assert isinstance(method, Tuner)
    return method


def trained_twin(base: Path, case: str) -> tuple[PreTrainedModel, Tuner]:
    """A model whose adapters are away from their start."""
    method = method_of(case)
    return injected_twin(base, method, noise=0.05), method


def trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("case", CASES)
def test_files_forward_and_gradients_are_those_of_peft(
    llama: Path, tmp_path: Path, case: str
) -> None:
    ours, method = trained_twin(llama, case)
    method.save(trained_tensors(ours), str(tmp_path / "ours"))
    theirs = peft.PeftModel.from_pretrained(load_base(llama), tmp_path / "ours", is_trainable=True)
    theirs.save_pretrained(tmp_path / "theirs")
    saved = [load_file(tmp_path / w / "adapter_model.safetensors") for w in ("ours", "theirs")]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])
    configs = [
        json.loads((tmp_path / w / "adapter_config.json").read_text()) for w in ("ours", "theirs")
    ]
    for config in configs:
        for key in ("target_modules", "feedforward_modules"):
            config[key] = sorted(config.get(key) or [])
    assert configs[0] == configs[1]
    results = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(11)
        logits = model(token_ids()).logits
        logits.square().mean().backward()
        results.append(logits)
    assert torch.equal(results[0], results[1])
    gradients = {n.removeprefix("base_model.model."): p.grad for n, p in theirs.named_parameters()}
    for name, parameter in trained_parameters(ours):
        assert torch.equal(parameter.grad, gradients[name]), name


class Opaque(nn.Module):
    """A linear whose weight is nowhere to be seen."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = None
        self.codes = nn.Parameter(linear.weight.detach().view(torch.uint8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.codes.view(torch.float32))


@pytest.mark.parametrize("case", [case for case in CASES if case != "layernorm"])
def test_layers_only_call_their_base_or_say_so_before_weights_are_read(
    llama: Path, case: str
) -> None:
    model, method = trained_twin(llama, case)
    torch.manual_seed(0)
    expected = model(token_ids()).logits
    for name, module in list(model.named_modules()):
        if name.endswith(".base_layer") and type(module) is nn.Linear:
            replace_module(model, name, Opaque(module))
    if case not in READS_WEIGHT:
        torch.manual_seed(0)
        assert torch.equal(model(token_ids()).logits, expected)
        return
    with pytest.raises(AttributeError, match="weight"):
        model(token_ids())
    with pytest.raises(ConfigError, match="quant=none"):
        sources(method, llama)


@pytest.mark.parametrize("case", CASES)
def test_computes_in_the_dtype_that_parameters_are_put_into(llama: Path, case: str) -> None:
    model, _ = trained_twin(llama, case)
    expected = model(token_ids()).logits
    for parameter in model.parameters():  # as sharding engines do, which leave buffers alone
        parameter.data = parameter.data.bfloat16()
    logits = model(token_ids()).logits
    logits.float().square().mean().backward()
    assert logits.dtype == torch.bfloat16
    # Far from rounding, near to another result: bf16 keeps 8 bits, through two blocks.
    distance = (logits.float() - expected).norm() / expected.norm()
    assert distance < 0.25 or case == "PVERA"  # which samples
    for name, parameter in trained_parameters(model):
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_types_are_all_that_the_installed_peft_has() -> None:
    there = {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert there <= {*TYPES, *OWN, *REFUSED}
    assert set(TYPES) <= there
    assert set(READS_WEIGHT) <= set(TYPES)


@pytest.mark.parametrize("name", sorted(set(TYPES)))
def test_types_that_do_not_start_at_the_base_are_known(llama: Path, name: str) -> None:
    model, spec = build_on_meta(llama)
    method = method_of(name)
    method.inject(model, spec)
    materialize(model, method, llama)
    logits, before = model(token_ids()).logits, load_base(llama)(token_ids()).logits
    # A rotation by nothing, or a product of reflections, is 1 up to rounding: some 100 sums of
    # fp32, 24 bits each, in a row.
    near = bool(((logits - before).abs() <= 1e-5 * before.abs().max()).all())
    assert near is method.starts_at_base


def test_initial_values_follow_the_seed_and_leave_other_streams_alone(llama: Path) -> None:
    model, spec = build_on_meta(llama)
    method = method_of("loha")
    method.inject(model, spec)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (sources(method, llama, seed=seed)[1] for seed in (7, 7, 8))
    assert torch.equal(torch.rand(3), expected)
    name = next(name for name, _ in trained_parameters(model) if "hada_w1_a" in name)
    assert torch.equal(read_whole(one, name), read_whole(same, name))
    assert not torch.equal(read_whole(one, name), read_whole(other, name))
    assert torch.equal(read_whole(one, name).reshape(-1)[3:9], one.read(name, 3, 9))


def test_the_compilers_of_the_process_stay_what_they_were(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BOFT sets CXX=gcc for an extension of its own; torch.compile would link with it."""
    monkeypatch.setenv("CC", "the user's")
    monkeypatch.delenv("CXX", raising=False)
    injected(llama, "hf", type="BOFT")
    assert (os.environ["CC"], os.environ.get("CXX")) == ("the user's", None)


def test_the_twin_that_draws_them_takes_no_memory_for_the_base() -> None:
    twin = skeleton({"a.b": (1 << 20, 1 << 20, True)})
    linear = twin.get_submodule("a.b")
    assert isinstance(linear, nn.Linear)
    assert linear.weight.shape == (1 << 20, 1 << 20)
    assert linear.weight.untyped_storage().nbytes() == 4


def test_values_that_follow_the_base_are_refused(llama: Path) -> None:
    config = HfConfig()
    config.type = "DEFT"  # not by its constructor, which refuses it
    model, spec = build_on_meta(llama)
    method = Hf(config)
    method.inject(model, spec)
    with pytest.raises(ConfigError, match="starts from the weights of the base"):
        sources(method, llama)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("BOFT", {"boft_block_sise": 4}, "did you mean boft_block_size"),
        ("BOFT", {"boft_block_size": "4"}, "boft_block_size='4' is no int"),
        ("BOFT", {"boft_block_size": True}, "boft_block_size=True is no int"),
        ("BOFT", {"target_modules": ["q_proj"]}, "set peft.targets"),
        ("BOFT", {"inference_mode": True}, "peft.options.inference_mode"),
        ("MISS", {"miss_dropout": [0.1]}, "miss_dropout"),
    ],
)
def test_options_are_checked_against_the_config_of_peft(
    kind: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        HfConfig(type=kind, options=options).build()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("BOTF", "did you mean BOFT"),
        ("LORA", "peft=lora"),
        ("PREFIX_TUNING", "peft=prefix"),
        ("VBLORA", "one bank of vectors"),
    ],
)
def test_other_types_are_refused_with_what_serves(kind: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        HfConfig(type=kind)


@pytest.mark.parametrize(
    "written", ["peft.options.r=8", "peft.options={r: 8}", "+peft.options.r=8"]
)
def test_options_are_set_like_any_key(written: str) -> None:
    text = compose_overrides(
        "train", ["experiment=quickstart", "peft=hf", "peft.type=miss", written]
    )
    config = load_frozen(text).peft
    assert isinstance(config, HfConfig)
    assert (config.type, config.options) == ("MISS", {"r": 8})


def test_annotations_of_peft_are_understood() -> None:
    hints: Mapping[Any, tuple[Any, Any]] = {
        int: (4, 4.0),
        float: (4, "4"),
        bool: (True, 1),
        str: ("a", 1),
        int | None: (None, "a"),
        list[str]: (["a"], [1]),
        dict[str, int]: ({"a": 1}, [1]),
        str | list[str]: (["a"], {"a": 1}),
    }
    for hint, (right, wrong) in hints.items():
        assert fits(right, hint), hint
        assert not fits(wrong, hint), hint


def injected(base: Path, name: str, **options: Any) -> tuple[PreTrainedModel, ModelSpec, Tuner]:
    model, spec = build_on_meta(base)
    method = PEFT.config(name)(**options).build()
    assert isinstance(method, Tuner)
    method.inject(model, spec)
    return model, spec, method


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("oft", {"block_size": 32}, "divide the 48 inputs of model.layers.0.mlp.down_proj"),
        ("ia3", {"targets": ["q_proj"]}, "peft.feedforward"),
        ("ia3", {"targets": ["q_porj"]}, "q_proj"),
        ("layernorm", {"targets": ["input_layer_norm"]}, "did you mean input_layernorm"),
        ("hf", {"type": "ROAD", "options": {"group_size": 64}}, "peft.type=ROAD: HF peft refuses"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(
    llama: Path, name: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        injected(llama, name, **options)


def test_norms_are_found_by_name_and_by_glob(llama: Path) -> None:
    found = {}
    for targets in (["all-norms"], ["norm"], ["model.layers.1.*"]):
        model, _, _ = injected(llama, "layernorm", targets=targets)
        found[targets[0]] = len(trained_parameters(model))
    assert found == {"all-norms": 5, "norm": 1, "model.layers.1.*": 2}


@pytest.mark.parametrize(
    ("case", "name", "options", "said"),
    [
        ("vera", "vera", {"rank": 8}, "r is 16"),
        ("vera", "vera", {"rank": 16, "projection_seed": 1}, "projection_prng_key is 0"),
        ("vera", "vera", {"rank": 16, "targets": ["mlp"]}, "other layers"),
        ("loha", "lokr", {}, "peft_type is LOHA"),
        ("loha", "loha", {"rank": 4, "alpha": 3.0}, "alpha is 16"),
        ("MISS", "hf", {"type": "GRALORA"}, "peft_type is MISS"),
    ],
)
def test_adapter_of_other_settings_is_refused(
    llama: Path, tmp_path: Path, case: str, name: str, options: dict[str, Any], said: str
) -> None:
    model, method = trained_twin(llama, case)
    method.save(trained_tensors(model), str(tmp_path / "adapter"))
    _, _, other = injected(llama, name, **options)
    with pytest.raises(ConfigError, match=said):
        other.saved(str(tmp_path / "adapter"))


def test_fixed_projections_come_back_with_the_adapter(llama: Path, tmp_path: Path) -> None:
    model, method = trained_twin(llama, "vera")
    method.save(trained_tensors(model), str(tmp_path / "adapter"))
    source = method.saved(str(tmp_path / "adapter"))
    buffers = {n: b for n, b in model.named_buffers() if ".vera_" in n}
    assert len(buffers) == 2
    for name, buffer in buffers.items():
        assert torch.equal(read_whole(source, name), buffer)


def test_layers_of_the_head_leave_the_tied_embedding_alone(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen3", tied=True)
    model, spec = build_on_meta(base)
    method = PEFT.config("loha")(targets=["head"]).build()
    method.inject(model, spec)
    materialize(model, method, base)
    assert model.lm_head.base_layer.weight is model.model.embed_tokens.weight
    assert torch.equal(model(token_ids()).logits, load_base(base)(token_ids()).logits)
