"""DoRA: equality with HF ``peft`` both ways, its start, and bases that are kept as bytes."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from dtune.errors import ConfigError
from dtune.patch.apply import apply_patches, unpatch
from dtune.patch.base import patch_names
from dtune.peft.dora import MAGNITUDE, Dora, DoraLinear
from dtune.peft.schema.dora import DoraConfig
from dtune.peft.schema.lora import LoraConfig
from tests.contracts.small_models import (
    build_on_meta,
    load_base,
    materialize,
    read_whole,
    sources,
    token_ids,
    trained_tensors,
)
from tests.unit.frozen import in_4_bits
from tests.unit.patched import adapted, largest_difference, train_step


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def trained_twin(base: Path, config: DoraConfig) -> tuple[PreTrainedModel, Dora]:
    """A model whose adapters are far from their start."""
    model, spec = build_on_meta(base)
    method = Dora(config)
    method.inject(model, spec)
    materialize(model, method, base)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in trained_parameters(model).items():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(parameter * (1 + noise) if name.endswith(MAGNITUDE) else noise)
    return model, method


def peft_twin(ours: PreTrainedModel, base: Path, config: DoraConfig) -> peft.PeftModel:
    """HF peft's model with the same weights, built without any file of ours."""
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules="all-linear",
        use_dora=True,
    )
    twin = peft.get_peft_model(load_base(base), settings)
    weights = {
        f"base_model.model.{n}{'' if n.endswith(MAGNITUDE) else '.weight'}": p
        for n, p in trained_parameters(ours).items()
    }
    assert not peft.set_peft_model_state_dict(twin, weights).unexpected_keys
    return twin


def peft_gradients(twin: peft.PeftModel) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): p.grad
        for name, p in twin.named_parameters()
        if p.requires_grad
    }


@pytest.mark.parametrize(("dropout", "autocast"), [(0.0, False), (0.25, False), (0.0, True)])
def test_forward_and_gradients_are_bit_equal_to_peft(
    base: Path, dropout: float, autocast: bool
) -> None:
    config = DoraConfig(rank=4, alpha=6.0, dropout=dropout)
    ours, _ = trained_twin(base, config)
    theirs = peft_twin(ours, base, config)
    results = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(11)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(token_ids()).logits
        logits.float().square().mean().backward()
        results.append(logits)
    assert torch.equal(results[0], results[1])
    gradients = peft_gradients(theirs)
    for name, parameter in trained_parameters(ours).items():
        assert parameter.grad.abs().max() > 0
        assert torch.equal(parameter.grad, gradients[name]), name


def test_bias_is_not_scaled() -> None:
    linear = nn.Linear(8, 6)
    layer = DoraLinear(linear, rank=2, scale=2.0, dropout=0.0)
    for parameter in (layer.lora_A, layer.lora_B):
        nn.init.normal_(parameter)
    nn.init.uniform_(layer.lora_magnitude_vector, 1.0, 2.0)
    x = torch.randn(3, 8)
    whole = linear.weight + 2 * layer.lora_B @ layer.lora_A
    scaled = layer.lora_magnitude_vector[:, None] * F.normalize(whole, dim=1)
    exact = F.linear(x.double(), scaled.double(), linear.bias.double())
    # A handful of products of numbers around 1 to 10, each rounded to 2^-24.
    assert (layer(x) - exact).abs().max() < 2**-24 * 100 * exact.abs().max()
    assert not torch.allclose(layer(x), F.linear(x, scaled), atol=1e-2)


def test_peft_reads_our_adapter_and_we_read_that_of_peft(base: Path, tmp_path: Path) -> None:
    config = DoraConfig(rank=4, alpha=6.0)
    ours, method = trained_twin(base, config)
    method.save(trained_tensors(ours), str(tmp_path / "ours"))
    theirs = peft.PeftModel.from_pretrained(load_base(base), tmp_path / "ours").eval()
    assert torch.equal(theirs(token_ids()).logits, ours(token_ids()).logits)
    assert not torch.equal(load_base(base)(token_ids()).logits, ours(token_ids()).logits)
    peft_twin(ours, base, config).save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / f / "adapter_model.safetensors") for f in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    assert sum(key.endswith(f".{MAGNITUDE}") for key in files[0]) == 14
    source = method.saved(str(tmp_path / "theirs"))
    for name, parameter in trained_parameters(ours).items():
        assert torch.equal(read_whole(source, name), parameter), name


def test_lora_is_told_from_dora_in_a_file(llama: Path, tmp_path: Path) -> None:
    ours, dora = trained_twin(llama, DoraConfig(rank=4))
    dora.save(trained_tensors(ours), str(tmp_path / "dora"))
    model, spec = build_on_meta(llama)
    lora = LoraConfig(rank=4).build()
    lora.inject(model, spec)
    with pytest.raises(ConfigError, match=r"use_dora is True.*turn peft=dora"):
        lora.saved(str(tmp_path / "dora"))


@pytest.mark.parametrize("rounded", [False, True])
def test_magnitudes_are_row_norms_however_they_are_read(llama: Path, rounded: bool) -> None:
    """Also of a base that is held in 16 bits: of what it is rounded to."""
    model, spec = build_on_meta(llama)
    if rounded:
        model.bfloat16()
    method = Dora(DoraConfig(rank=4))
    method.inject(model, spec)
    held, source = sources(method, llama)
    for path in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.k_proj"):
        name, weight = f"{path}.{MAGNITUDE}", read_whole(held, f"{path}.base.weight")
        weight = weight.bfloat16().float() if rounded else weight
        assert torch.equal(read_whole(source, name), torch.linalg.norm(weight, dim=1))
        size = source.shape(name)[0]
        parts = [source.read(name, a, b) for a, b in ((0, 1), (1, 1), (1, 6), (6, size))]
        assert torch.equal(torch.cat(parts), read_whole(source, name))


def test_starts_equal_to_its_base_in_16_bits(llama: Path) -> None:
    """With fp32 masters under autocast, as one process and ddp train."""
    model, spec = build_on_meta(llama)
    model.bfloat16()
    method = Dora(DoraConfig(rank=4))
    method.inject(model, spec)
    materialize(model, method, llama)
    plain = load_base(llama).bfloat16()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
        assert "lora_" in name or parameter.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(token_ids()).logits, plain(token_ids()).logits)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("bias", [False, True])
def test_a_base_of_bytes_is_as_its_dequantised_weight(dropout: float, bias: bool) -> None:
    torch.manual_seed(0)
    quantized = in_4_bits(nn.Linear(64, 32, bias=bias))
    plain = nn.Linear(64, 32, bias=bias)
    with torch.no_grad():
        plain.weight.copy_(quantized.frozen_weight().dequantize(torch.float32))
        if plain.bias is not None:
            plain.bias.copy_(quantized.bias)
    layers = [DoraLinear(b, rank=4, scale=2.0, dropout=dropout) for b in (quantized, plain)]
    x = torch.randn(5, 64)
    results = []
    for layer in layers:
        torch.manual_seed(1)
        nn.init.normal_(layer.lora_A)
        nn.init.normal_(layer.lora_B)
        nn.init.uniform_(layer.lora_magnitude_vector, 1.0, 2.0)
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        y.square().sum().backward()
        gradients = [layer.lora_A.grad, layer.lora_B.grad, layer.lora_magnitude_vector.grad]
        results.append([y, inputs.grad, *gradients])
    for one, other in zip(*results, strict=True):
        # With a bias, W x is had from the output by taking it off again: a rounding of the sum.
        assert (one - other).abs().max() <= 2**-21 * other.abs().max()
        assert bias or torch.equal(one, other)


def test_nothing_of_the_size_of_the_weight_is_kept_for_the_backward() -> None:
    layer = DoraLinear(in_4_bits(nn.Linear(256, 192)), rank=4, scale=2.0, dropout=0.0)
    for parameter in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
        nn.init.uniform_(parameter, 0.1, 1.0)
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(2, 256, requires_grad=True))
    # The codes of 4 bits are half as many as the weights.
    assert 0 < max(sizes) <= 256 * 192 // 2


@pytest.mark.parametrize("quantized", [False, True])
def test_patched_equals_unpatched(quantized: bool) -> None:
    model, spec = adapted("llama", peft="dora", rank=4)
    for module in list(model.modules()):
        if quantized and isinstance(module, DoraLinear):
            module.base = in_4_bits(module.base)
    plain = train_step(model)
    rows = apply_patches(model, patch_names(), spec)
    fused = [row for row in rows if row.patch == "dora_linear"]
    assert sum(row.count for row in fused) == 14
    assert all(row.after == "FusedDoraLinear" for row in fused)
    assert not [row for row in rows if row.patch == "lora_linear"]
    # fp32: some hundred roundings of 2^-24 in another order.
    assert largest_difference(train_step(model), plain) < 1e-4
    unpatch(model)
    assert largest_difference(train_step(model), plain) == 0


def test_compiles_into_one_graph_with_equal_results() -> None:
    layer = DoraLinear(nn.Linear(8, 6), rank=2, scale=2.0, dropout=0.0)
    for parameter in (layer.lora_A, layer.lora_B):
        nn.init.normal_(parameter)
    nn.init.uniform_(layer.lora_magnitude_vector, 1.0, 2.0)
    x = torch.randn(3, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
