"""RsLoRA, LoRA+, PiSSA and OLoRA: what each changes of LoRA, and equality with HF ``peft``."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import PreTrainedModel

from dtune.errors import ConfigError
from dtune.models.sources import ChainedSource
from dtune.optim.optimizers import parameter_groups
from dtune.peft.lora import Lora, LoraLinear
from dtune.peft.schema import PEFT
from dtune.peft.schema.lora import LoraConfig, LoraInit, PissaConfig
from tests.contracts.small_models import (
    build_on_meta,
    equal_within,
    fill,
    injected_twin,
    load_base,
    read_whole,
    rounding_of,
    save_base,
    sources,
    token_ids,
    trained_tensors,
)

DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), "llama")


def made(name: str, **options: object) -> Lora:
    method = PEFT.config(name)(**{"rank": 4, "alpha": 6.0, **options}).build()
    assert isinstance(method, Lora)
    return method


def injected(base: Path, name: str, **options: object) -> tuple[PreTrainedModel, Lora]:
    model, spec = build_on_meta(base)
    method = made(name, **options)
    method.inject(model, spec)
    return model, method


def moved(base: Path, name: str, **options: object) -> tuple[PreTrainedModel, Lora]:
    """A model whose adapters are far from their start."""
    method = made(name, **options)
    return injected_twin(base, method, noise=0.3), method


def trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def peft_twin(
    ours: PreTrainedModel, base: Path, *, alpha: int = 6, **options: object
) -> peft.PeftModel:
    """HF peft's model with the same weights, built without any file of ours."""
    settings = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules="all-linear", **options)
    twin = peft.get_peft_model(load_base(base), settings)
    weights = {f"base_model.model.{n}.weight": p for n, p in trained_parameters(ours)}
    assert not peft.set_peft_model_state_dict(twin, weights).unexpected_keys
    return twin.eval()


def test_rslora_is_bit_equal_to_peft_both_ways(base: Path, tmp_path: Path) -> None:
    # alpha / sqrt(4) is a power of two, so that it is of no matter where the update is scaled.
    ours, method = moved(base, "rslora", alpha=8.0)
    theirs = peft_twin(ours, base, alpha=8, use_rslora=True)
    logits = ours(token_ids()).logits
    assert torch.equal(theirs(token_ids()).logits, logits)
    method.save(trained_tensors(ours), str(tmp_path / "ours"))
    theirs.save_pretrained(tmp_path / "theirs")
    read = peft.PeftModel.from_pretrained(load_base(base), tmp_path / "ours").eval()
    assert torch.equal(read(token_ids()).logits, logits)
    source = method.saved(str(tmp_path / "theirs"))
    for name, parameter in trained_parameters(ours):
        assert torch.equal(read_whole(source, name), parameter), name
    _, plain = injected(base, "lora")
    with pytest.raises(ConfigError, match=r"use_rslora is True.*turn peft=rslora"):
        plain.saved(str(tmp_path / "ours"))


def test_lora_plus_has_the_learning_rates_of_peft(base: Path) -> None:
    ours, method = injected(base, "lora_plus", lr_ratio=8.0)
    groups = parameter_groups(
        trained_parameters(ours), lr=1e-3, weight_decay=0.1, rate_factor=method.rate_factor
    )
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear")
    twin = peft.get_peft_model(load_base(base), settings)
    theirs = create_loraplus_optimizer(twin, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0)
    expected = {id(p): group["lr"] for group in theirs.param_groups for p in group["params"]}
    named = {
        n.removeprefix("base_model.model.").replace(".default.weight", ""): expected[id(p)]
        for n, p in trained_parameters(twin)
    }
    assert {n: rates[id(p)] for n, p in trained_parameters(ours)} == named
    assert set(named.values()) == {1e-3, 8e-3}


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_start_is_that_of_peft(base: Path, init: str) -> None:
    """Factors differ by signs, and by peft's rounding to fp32; their product and what it leaves
    do so by rounding alone."""
    _, method = injected(base, init, **({"svd_iterations": 0} if init == "pissa" else {}))
    held, added = sources(method, base)
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=init
    )
    theirs = peft.get_peft_model(load_base(base), settings)
    layer = theirs.get_submodule(f"base_model.model.{DOWN}")
    a, b = (read_whole(added, f"{DOWN}.lora_{x}") for x in "AB")
    their_a, their_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    whole = load_base(base).get_submodule(DOWN).weight
    # Backward errors of an SVD or QR in fp32: a modest multiple of 2^-24 |W|, here of dimension.
    limit = 2**-24 * max(whole.shape) * torch.linalg.matrix_norm(whole, 2)
    gap = torch.linalg.svdvals(whole.double())[3:5].diff().abs() / whole.norm()
    assert gap > 1e-3, "directions of nearly equal values are not told apart by fp32"
    assert (b @ a - their_b @ their_a).abs().max() <= limit / gap
    rest = read_whole(held, f"{DOWN}.base.weight")
    assert (rest - layer.base_layer.weight).abs().max() <= limit / gap
    assert not (whole - layer.base_layer.weight).abs().max() <= limit / gap
    # Up to the sign of each direction, the factors themselves.
    signs = torch.sign((a * their_a).sum(1))
    assert (a * signs[:, None] - their_a).abs().max() <= limit / gap
    assert (b * signs - their_b).abs().max() <= limit / gap


def test_randomised_svd_is_near_the_exact_one_and_the_same_each_time(base: Path) -> None:
    exact = read_whole(sources(injected(base, "pissa", svd_iterations=0)[1], base)[0], weight())
    whole = load_base(base).get_submodule(DOWN).weight
    errors = []
    for iterations in (1, 16):
        torch.manual_seed(iterations)
        method = injected(base, "pissa", svd_iterations=iterations)[1]
        rest = read_whole(sources(method, base, seed=iterations)[0], weight())
        torch.manual_seed(5)
        again = injected(base, "pissa", svd_iterations=iterations)[1]
        assert torch.equal(read_whole(sources(again, base, seed=9)[0], weight()), rest)
        errors.append(float(rest.norm() / exact.norm() - 1))
    # The exact one leaves the least; each iteration lessens the error by a ratio of values.
    assert -1e-6 < errors[1] < 1e-3
    assert errors[1] < errors[0]
    assert exact.norm() < 0.95 * whole.norm()


def weight() -> str:
    return f"{DOWN}.base.weight"


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_values_do_not_depend_on_how_they_are_cut(base: Path, init: str) -> None:
    _, method = injected(base, init)
    held, added = sources(method, base)
    _, other = injected(base, init)
    pieces = ChainedSource([*sources(other, base)[::-1]])
    for source, name in ((held, weight()), (added, f"{DOWN}.lora_A"), (added, f"{DOWN}.lora_B")):
        whole = read_whole(source, name).view(-1)
        for start, stop in ((7, 50), (0, 7), (50, whole.numel()), (5, 5)):
            assert torch.equal(pieces.read(name, start, stop), whole[start:stop])
    # What is no target is as it is stored.
    embedding = load_base(base).model.embed_tokens.weight
    assert torch.equal(read_whole(held, "model.embed_tokens.weight"), embedding)


@pytest.mark.parametrize("name", ["lora", "rslora", "lora_plus"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_export_is_a_lora_of_twice_the_rank_on_the_base(
    base: Path, tmp_path: Path, name: str, init: str
) -> None:
    ours, method = moved(base, name, init=LoraInit(init))
    method.save(trained_tensors(ours), str(tmp_path / "adapter"))
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["r"] == 8
    assert saved["init_lora_weights"] is True
    theirs = peft.PeftModel.from_pretrained(load_base(base), tmp_path / "adapter").eval()
    layer = theirs.get_submodule(f"base_model.model.{DOWN}")
    assert layer.scaling["default"] == pytest.approx(ours.get_submodule(DOWN).scale, rel=1e-15)
    logits, limit = ours(token_ids()).logits, rounding_of(ours, method, base)
    assert limit > 0
    assert equal_within(theirs(token_ids()).logits, logits, limit)
    # A scale that is 5 % off is told from rounding.
    layer.scaling["default"] *= 1.05
    assert not equal_within(theirs(token_ids()).logits, logits, limit)


def test_evaluation_has_the_model_back_bit_for_bit(base: Path, tmp_path: Path) -> None:
    ours, method = moved(base, "pissa")
    method.save(trained_tensors(ours), str(tmp_path / "adapter"))
    again, fresh = injected(base, "pissa")
    held, added = sources(fresh, base)
    source = ChainedSource([fresh.saved(str(tmp_path / "adapter")), added, held])
    fill(again, {n: read_whole(source, n) for n, _ in again.named_parameters()}, base)
    assert torch.equal(again(token_ids()).logits, ours(token_ids()).logits)
    for name, parameter in trained_parameters(ours):
        saved = fresh.saved(str(tmp_path / "adapter"))
        assert saved.shape(name) == tuple(parameter.shape)
        flat = parameter.detach().view(-1)
        for start, stop in ((3, 30), (4, 4), (30, flat.numel())):
            assert torch.equal(saved.read(name, start, stop), flat[start:stop])


@pytest.mark.parametrize(
    ("saved", "read", "said"),
    [
        ({"name": "pissa"}, {"name": "lora"}, "saved with peft.init=pissa, not default"),
        ({"name": "lora"}, {"name": "pissa"}, "saved with peft.init=default, not pissa"),
        ({"name": "olora"}, {"name": "pissa"}, "saved with peft.init=olora, not pissa"),
        (
            {"name": "pissa"},
            {"name": "pissa", "svd_iterations": 2},
            "saved with peft.svd_iterations=4, not 2",
        ),
    ],
)
def test_adapter_of_another_start_is_refused(
    base: Path, tmp_path: Path, saved: dict[str, object], read: dict[str, object], said: str
) -> None:
    ours, method = moved(base, **saved)
    method.save(trained_tensors(ours), str(tmp_path / "adapter"))
    with pytest.raises(ConfigError, match=said):
        injected(base, **read)[1].saved(str(tmp_path / "adapter"))


def test_adapter_that_belongs_to_a_base_changed_by_peft_is_refused(
    base: Path, tmp_path: Path
) -> None:
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights="pissa"
    )
    theirs = peft.get_peft_model(load_base(base), settings)
    start = copy.deepcopy(theirs)
    with torch.no_grad():
        for _, parameter in trained_parameters(theirs):
            parameter.add_(0.1)
    theirs.save_pretrained(tmp_path / "relative")
    _, method = injected(base, "lora")
    with pytest.raises(ConfigError, match=r"init_lora_weights is pissa.*path_initial_model"):
        method.saved(str(tmp_path / "relative"))
    start.peft_config["default"].init_lora_weights = True
    start.save_pretrained(tmp_path / "start")
    theirs.save_pretrained(
        tmp_path / "whole", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    model, spec = build_on_meta(base)
    twice = LoraConfig(rank=8, alpha=12.0).build()
    twice.inject(model, spec)
    source = twice.saved(str(tmp_path / "whole"))
    a, b = (read_whole(source, f"{DOWN}.lora_{x}") for x in "AB")
    own = theirs.get_submodule(f"base_model.model.{DOWN}")
    moved_by = own.scaling["default"] * own.lora_B["default"].weight @ own.lora_A["default"].weight
    whole = load_base(base).get_submodule(DOWN).weight
    want = own.base_layer.weight + moved_by - whole
    assert (1.5 * b @ a - want).abs().max() <= 2**-18 * whole.abs().max() * math.sqrt(8)


def test_directions_that_a_layer_does_not_have_and_a_tied_head_are_refused(
    base: Path, tmp_path: Path
) -> None:
    model, spec = build_on_meta(base)
    with pytest.raises(ConfigError, match=r"k_proj has no more than 16.*set peft.rank=16 or less"):
        PissaConfig(rank=17).build().inject(model, spec)
    tied, spec = build_on_meta(save_base(tmp_path / "tied", "llama", tied=True))
    with pytest.raises(ConfigError, match="lm_head is also the embedding"):
        PissaConfig(rank=4, targets=["head"]).build().inject(tied, spec)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("lora_plus", {"lr_ratio": 0.5}, "peft.lr_ratio=0.5 must be at least 1"),
        ("lora", {"svd_iterations": 8}, "peft.svd_iterations=8 has no use with peft.init=default"),
        ("olora", {"svd_iterations": 8}, "peft.svd_iterations=8 has no use with peft.init=olora"),
        ("pissa", {"svd_iterations": -1}, "peft.svd_iterations=-1 must be at least 0"),
        ("pissa", {"init": LoraInit.default}, "peft=pissa is LoRA with peft.init=pissa"),
        ("dora", {"rank": 0}, "peft.rank=0 must be at least 1"),
    ],
)
def test_settings_without_sense_are_refused(
    name: str, options: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        PEFT.config(name)(**options)


def test_modules_are_those_that_the_patches_know(base: Path) -> None:
    for name in ("rslora", "lora_plus", "pissa", "olora"):
        model, _ = injected(base, name)
        kinds = {type(m) for m in model.modules() if isinstance(m, LoraLinear)}
        assert kinds == {LoraLinear}, name
