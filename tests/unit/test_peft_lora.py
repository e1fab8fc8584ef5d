"""LoRA: targets, initial values, and equality with HF ``peft`` both ways."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from dtune.errors import ConfigError
from dtune.peft.lora import Lora, LoraLinear
from dtune.peft.schema.lora import LoraConfig
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


def injected(base: Path, config: LoraConfig) -> tuple[PreTrainedModel, Lora]:
    model, spec = build_on_meta(base)
    method = Lora(config)
    method.inject(model, spec)
    return model, method


def trained_twin(base: Path, config: LoraConfig) -> tuple[PreTrainedModel, Lora]:
    """A model whose adapters are far from their start."""
    method = Lora(config)
    return injected_twin(base, method, noise=0.3), method


def trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def targeted(base: Path, *targets: str) -> set[str]:
    model, _ = injected(base, LoraConfig(targets=list(targets)))
    return {name for name, m in model.named_modules() if isinstance(m, LoraLinear)}


ATTENTION = {f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qkvo"}
MLP = {f"model.layers.{i}.mlp.{n}_proj" for i in (0, 1) for n in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["all-linear"], ATTENTION | MLP),
        (["attention"], ATTENTION),
        (["mlp"], MLP),
        (["head"], {"lm_head"}),
        (["head", "mlp"], {"lm_head"} | MLP),
        (["q_proj"], {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}),
        (["model.layers.1.*"], {p for p in ATTENTION | MLP if ".1." in p}),
        (["*.0.mlp.up_proj"], {"model.layers.0.mlp.up_proj"}),
    ],
)
def test_targets_mean_roles_names_or_globs(
    llama: Path, targets: list[str], expected: set[str]
) -> None:
    assert targeted(llama, *targets) == expected


@pytest.mark.parametrize(
    ("target", "hints"),
    [
        ("q_porj", ["q_porj", "q_proj", "all-linear", "attention", "mlp", "head"]),
        ("all_linear", ["all-linear"]),
        ("model.layer.*.q_proj", ["model.layer.*.q_proj", "q_proj"]),
        ("zzz", ["zzz", "Roles: all-linear, attention, mlp, head", "gate_proj"]),
    ],
)
def test_target_that_matches_nothing_is_refused_with_near_names(
    llama: Path, target: str, hints: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        injected(llama, LoraConfig(targets=["mlp", target]))
    assert all(hint in str(refused.value) for hint in hints), refused.value


def test_only_adapters_are_trained_and_names_map_back(base: Path) -> None:
    model, spec = build_on_meta(base)
    stored = {name for name, _ in model.named_parameters()}
    method = Lora(LoraConfig(rank=4))
    report = method.inject(model, spec)
    names = {name for name, _ in model.named_parameters()}
    adapters = {name for name, _ in trained_parameters(model)}
    assert adapters == {f"{p}.lora_{x}" for p in ATTENTION | MLP for x in "AB"}
    assert {method.stored_name(name) for name in names - adapters} == stored
    assert all(p.is_meta for p in model.parameters())
    assert all(p.dtype == torch.float32 for _, p in trained_parameters(model))
    assert report.trainable == sum(p.numel() for _, p in trained_parameters(model))
    assert report.replaced == {"LoraLinear": 14}


def test_initial_values_depend_on_seed_and_name_alone(llama: Path) -> None:
    _, method = injected(llama, LoraConfig(rank=4))
    name, other = (f"model.layers.{i}.self_attn.q_proj.lora_A" for i in (0, 1))
    whole = read_whole(sources(method, llama, seed=7)[1], name).reshape(-1)
    pieces = sources(method, llama, seed=7)[1]
    parts = [pieces.read(name, a, b) for a, b in ((50, 128), (0, 50))]
    assert torch.equal(torch.cat(parts[::-1]), whole)
    _, few_method = injected(llama, LoraConfig(rank=4, targets=["q_proj"]))
    assert torch.equal(sources(few_method, llama, seed=7)[1].read(name, 0, 128), whole)
    assert not torch.equal(sources(method, llama, seed=8)[1].read(name, 0, 128), whole)
    assert not torch.equal(sources(method, llama, seed=7)[1].read(other, 0, 128), whole)
    assert "model.embed_tokens.weight" not in pieces


def test_initial_values_are_distributed_as_in_peft(llama: Path) -> None:
    model, method = injected(llama, LoraConfig(rank=256, targets=["mlp"]))
    source = sources(method, llama, seed=0)[1]
    for name, parameter in trained_parameters(model):
        values = read_whole(source, name)
        bound = 0.0 if name.endswith("lora_B") else 1 / math.sqrt(parameter.shape[1])
        assert values.abs().max() <= bound
        # A uniform sample of n has its extreme within 10/n of the bound but once in e^-10.
        assert values.abs().max() >= bound * (1 - 10 / values.numel())


def peft_twin(ours: PreTrainedModel, base: Path, config: LoraConfig) -> peft.PeftModel:
    """HF peft's model with the same weights, built without any file of ours."""
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=sorted(p.rpartition(".")[2] for p in targeted(base, *config.targets)),
    )
    twin = peft.get_peft_model(load_base(base), settings)
    weights = {f"base_model.model.{n}.weight": p for n, p in trained_parameters(ours)}
    result = peft.set_peft_model_state_dict(twin, weights)
    assert not result.unexpected_keys
    return twin


def logits_and_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by the names that dtune gives their parameters."""
    torch.manual_seed(11)
    logits = model.train()(token_ids()).logits
    logits.square().mean().backward()
    found = {"logits": logits}
    for name, parameter in trained_parameters(model):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
        short = name.removeprefix("base_model.model.").replace(".default.weight", "")
        found[short] = parameter.grad
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_forward_and_gradients_are_bit_equal_to_peft(base: Path, dropout: float) -> None:
    config = LoraConfig(rank=4, alpha=8.0, dropout=dropout, targets=["all-linear", "lm_head"])
    ours, _ = trained_twin(base, config)
    expected = logits_and_gradients(peft_twin(ours, base, config))
    found = logits_and_gradients(ours)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_any_other_scale_rounds_as_little_as_peft(base: Path) -> None:
    """Against peft in fp64: at most twice as far away as peft in fp32 is."""
    config = LoraConfig(rank=4, alpha=6.0, targets=["all-linear", "lm_head"])
    ours, _ = trained_twin(base, config)
    plain = logits_and_gradients(peft_twin(ours, base, config))
    exact = logits_and_gradients(peft_twin(ours, base, config).double())
    for name, values in logits_and_gradients(ours).items():
        scale = exact[name].norm()
        limit = 2 * (plain[name] - exact[name]).norm() + torch.finfo(torch.float32).eps * scale
        assert (values - exact[name]).norm() <= limit, name
        assert (1.05 * values - exact[name]).norm() > limit, name


def test_autocast_with_a_low_precision_base_equals_peft(llama: Path) -> None:
    config = LoraConfig(rank=4)
    ours, _ = trained_twin(llama, config)
    theirs = peft_twin(ours, llama, config)
    for model in (ours, theirs):
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        ours_logits, theirs_logits = ours(token_ids()).logits, theirs(token_ids()).logits
    assert ours_logits.dtype == torch.bfloat16
    assert torch.equal(ours_logits, theirs_logits)


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
def test_without_autocast_the_output_has_the_dtype_of_the_base(adapters: torch.dtype) -> None:
    layer = LoraLinear(nn.Linear(8, 6).bfloat16(), rank=2, scale=2.0, dropout=0.0)
    for parameter in (layer.lora_A, layer.lora_B):
        nn.init.normal_(parameter)
        parameter.data = parameter.data.to(adapters)
    x = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.lora_A.grad is not None
    assert layer.lora_A.grad.dtype == adapters
    a, b, x = layer.lora_A.detach().double(), layer.lora_B.detach().double(), x.detach().double()
    exact = layer.base.double()(x) + 2 * x @ a.T @ b.T
    # bf16 rounds to 2^-9 relative. Rounded once each: the base's output, A x, B A x, its double,
    # and the sum; each at most as large as the same sum of magnitudes.
    magnitudes = x.abs() @ layer.base.weight.abs().T + layer.base.bias.abs()
    magnitudes += 2 * x.abs() @ a.abs().T @ b.abs().T
    limit = 5 * 2**-9 * magnitudes
    assert ((y - exact).abs() <= limit).all()
    assert not ((0.9 * y - exact).abs() <= limit).all()


@pytest.mark.parametrize("targets", [["all-linear"], ["*.1.mlp.*", "*.0.self_attn.q_proj"]])
def test_peft_reads_our_adapter_with_the_same_logits(
    base: Path, tmp_path: Path, targets: list[str]
) -> None:
    config = LoraConfig(rank=4, alpha=8.0, targets=targets)
    ours, method = trained_twin(base, config)
    method.save(trained_tensors(ours), str(tmp_path / "adapter"))
    theirs = peft.PeftModel.from_pretrained(load_base(base), tmp_path / "adapter").eval()
    assert torch.equal(theirs(token_ids()).logits, ours(token_ids()).logits)
    assert not torch.equal(load_base(base)(token_ids()).logits, ours(token_ids()).logits)
    assert sum(".lora_A." in n for n, _ in theirs.named_parameters()) == len(
        {n for n, _ in trained_parameters(ours) if n.endswith("lora_A")}
    )
    alone = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(alone(token_ids()).logits, ours(token_ids()).logits)
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(base)
    assert saved["lora_alpha"] == 8


def test_we_read_the_adapter_of_peft_and_our_own(base: Path, tmp_path: Path) -> None:
    config = LoraConfig(rank=4, alpha=6.0)
    ours, method = trained_twin(base, config)
    twin = peft_twin(ours, base, config)
    twin.save_pretrained(tmp_path / "theirs")
    method.save(trained_tensors(ours), str(tmp_path / "ours"))
    for folder in ("theirs", "ours"):
        source = method.saved(str(tmp_path / folder))
        for name, parameter in trained_parameters(ours):
            assert torch.equal(read_whole(source, name), parameter), name
    weights = [load_file(tmp_path / f / "adapter_model.safetensors") for f in ("theirs", "ours")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"alpha": 7.0}, "lora_alpha is 6"),
        ({"rank": 2}, "r is 4"),
        ({"targets": ["mlp"]}, "other layers"),
    ],
)
def test_adapter_of_other_settings_is_refused(
    llama: Path, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    ours, method = trained_twin(llama, LoraConfig(rank=4, alpha=6.0))
    method.save(trained_tensors(ours), str(tmp_path / "adapter"))
    settings = {"rank": 4, "alpha": 6.0, **change}
    _, other = injected(llama, LoraConfig(**settings))
    with pytest.raises(ConfigError, match=said):
        other.saved(str(tmp_path / "adapter"))
    with pytest.raises(ConfigError, match="holds no adapter"):
        method.saved(str(tmp_path / "nowhere"))


def test_save_replaces_the_older_adapter_and_leaves_nothing_beside(
    llama: Path, tmp_path: Path
) -> None:
    ours, method = trained_twin(llama, LoraConfig(rank=4))
    folder = tmp_path / "adapter"
    method.save(trained_tensors(ours), str(folder))
    with torch.no_grad():
        for _, parameter in trained_parameters(ours):
            parameter.add_(1)
    method.save(trained_tensors(ours), str(folder))
    name, parameter = trained_parameters(ours)[0]
    assert torch.equal(read_whole(method.saved(str(folder)), name), parameter)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_failed_save_runs_through_the_tensors_and_keeps_the_older_adapter(
    llama: Path, tmp_path: Path
) -> None:
    ours, method = trained_twin(llama, LoraConfig(rank=64))
    check_failed_save(ours, method, tmp_path / "adapter")


def test_other_ranks_run_through_and_write_nothing(llama: Path, tmp_path: Path) -> None:
    ours, method = trained_twin(llama, LoraConfig(rank=4))
    taken = itertools.count()
    nothing = ((name, [next(taken), None][1]) for name, _ in trained_tensors(ours))
    method.save(nothing, str(tmp_path / "adapter"))
    assert next(taken) == len(trained_parameters(ours))
    assert list(tmp_path.iterdir()) == []


def test_wrapped_head_leaves_the_tied_embedding_alone(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen3", tied=True)
    ours, method = trained_twin(base, LoraConfig(rank=4, targets=["head"]))
    assert ours.lm_head.base.weight is ours.model.embed_tokens.weight
    method.save(trained_tensors(ours), str(tmp_path / "adapter"))
    theirs = peft.PeftModel.from_pretrained(load_base(base), tmp_path / "adapter").eval()
    assert torch.equal(theirs(token_ids()).logits, ours(token_ids()).logits)


def test_compiles_into_one_graph_with_equal_results() -> None:
    layer = LoraLinear(nn.Linear(8, 6), rank=2, scale=2.0, dropout=0.0)
    for parameter in (layer.lora_A, layer.lora_B):
        nn.init.normal_(parameter)
    x = torch.randn(3, 8)
    for enabled in (False, True):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert torch.equal(compiled(x), layer(x))
