"""Which linears become bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from dtune.errors import ConfigError
from dtune.peft.schema import PEFT
from dtune.quant.linear import QuantizedLinear
from dtune.quant.schema import QUANT
from dtune.types import ModelSpec, PeftMethod, Quantizer
from tests.contracts.small_models import build_on_meta, save_base

CPU = torch.device("cpu")
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("llama"), "llama")


def quantised(
    base: Path, *, skip: Sequence[str] | None = None, peft: str = "lora", **options: object
) -> tuple[nn.Module, ModelSpec, PeftMethod, Quantizer]:
    model, spec = build_on_meta(base)
    method = PEFT.config(peft)(**options).build()
    method.inject(model, spec)
    config = QUANT.config("nf4")
    chosen = config() if skip is None else config(skip=list(skip))  # type: ignore[call-arg]
    quantizer = chosen.build(CPU)
    counts = quantizer.quantize(model, spec, method.stored_name)
    assert counts == {"QuantizedLinear": len(kept_as_bytes(model, method))}
    return model, spec, method, quantizer


def kept_as_bytes(model: nn.Module, method: PeftMethod) -> set[str]:
    """Paths in the checkpoint of what became bytes."""
    return {
        method.stored_name(f"{path}.weight").removesuffix(".weight")
        for path, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }


def leaves(paths: set[str]) -> set[str]:
    return {path.rpartition(".")[2] for path in paths}


def test_every_frozen_linear_but_the_head(base: Path) -> None:
    model, spec, method, _ = quantised(base, targets=["q_proj"])
    found = kept_as_bytes(model, method)
    assert found == set(spec.linears) - {"lm_head"}
    assert leaves(found) == PROJECTIONS
    assert all(p.is_meta for p in model.parameters()), "nothing is read or allocated"
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(name.endswith(("lora_A", "lora_B")) for name in trained)


def test_the_head_where_it_is_not_skipped(base: Path) -> None:
    model, spec, method, _ = quantised(base, skip=[])
    assert kept_as_bytes(model, method) == set(spec.linears)


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (["head", "attention"], {"gate_proj", "up_proj", "down_proj"}),
        (["head", "mlp"], {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (["head", "down_proj"], PROJECTIONS - {"down_proj"}),
        (["all-linear"], {"lm_head"}),
    ],
    ids=["attention", "mlp", "down_proj", "all-linear"],
)
def test_skipped_by_role_or_name(base: Path, skip: list[str], left: set[str]) -> None:
    model, _, method, _ = quantised(base, skip=skip)
    assert leaves(kept_as_bytes(model, method)) == left


def test_globs_are_over_paths_in_the_checkpoint(base: Path) -> None:
    """LoRA has moved every linear to a child ``base``, which nobody has to know."""
    model, spec, method, _ = quantised(base, skip=["head", "model.layers.1.*"])
    found = kept_as_bytes(model, method)
    assert found == {path for path in spec.linears if path.startswith("model.layers.0.")}


def test_a_trained_linear_is_left_as_it_is(base: Path) -> None:
    model, _, method, _ = quantised(base, peft="freeze", last_blocks=1)
    found = kept_as_bytes(model, method)
    assert {path.split(".")[2] for path in found} == {"0"}


def test_a_tied_head_is_no_linear_of_its_own(tmp_path: Path) -> None:
    tied = save_base(tmp_path, "llama", tied=True)
    for skip in (None, []):
        model, _, method, _ = quantised(tied, skip=skip)
        assert "lm_head" not in kept_as_bytes(model, method)
        assert model.get_parameter("lm_head.weight") is model.get_parameter(
            "model.embed_tokens.weight"
        )


def test_a_bias_stays_as_it_was() -> None:
    model = nn.ModuleDict({"block": nn.ModuleDict({"up": nn.Linear(8, 4, device="meta")})})
    linear = model.get_submodule("block.up")
    assert isinstance(linear, nn.Linear)
    linear.weight.requires_grad_(False)
    spec = _spec({"block.up"})
    QUANT.config("int8")(skip=[]).build(CPU).quantize(model, spec, str)  # type: ignore[call-arg]
    kept = model.get_submodule("block.up")
    assert isinstance(kept, QuantizedLinear)
    assert kept.bias is linear.bias
    assert kept.bias.requires_grad


def test_a_linear_at_two_places_stays_one(base: Path) -> None:
    shared = nn.Linear(8, 4, bias=False, device="meta").requires_grad_(False)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    QUANT.config("int8")(skip=[]).build(CPU).quantize(  # type: ignore[call-arg]
        model, _spec({"a.0"}), str
    )
    assert isinstance(model.get_submodule("a.0"), QuantizedLinear)
    assert model.get_submodule("a.0") is model.get_submodule("b.0")


def _spec(linears: set[str]) -> ModelSpec:
    from transformers import LlamaConfig

    from dtune.types import Role

    return ModelSpec(
        "llama", "x", LlamaConfig(), (nn.Sequential,), dict.fromkeys(linears, Role.mlp), {}
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("donw_proj", r"did you mean down_proj"),
        ("atention", r"did you mean attention"),
        ("model.layer.*.mlp", r"matches no linear layer of llama"),
        ("other", r"matches no linear layer .* Roles: attention, mlp, head, all-linear\. Names:"),
    ],
)
def test_a_name_that_matches_nothing_is_refused(base: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"quant\.skip: '{name.replace('*', '.')}'.*{message}"):
        quantised(base, skip=["head", name])


def test_nothing_left_to_quantise_is_refused(base: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"quant=nf4: no linear is left .*quant\.skip=.*quant=none"
    ):
        quantised(base, skip=["head", "all-linear"])
    with pytest.raises(ConfigError, match="no linear is left"):
        quantised(base, peft="full")


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("size", [0, 16, 48, 8192])
def test_a_block_size_that_no_kernel_knows_is_refused(name: str, size: int) -> None:
    with pytest.raises(ConfigError, match=rf"quant\.block_size={size} must be one of 32, 64"):
        QUANT.config(name)(block_size=size)  # type: ignore[call-arg]
