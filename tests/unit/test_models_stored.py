"""What a model's folder holds beside parameters: stored buffers, the generation config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, Gemma4TextConfig

from dtune.errors import ConfigError
from dtune.models import load
from dtune.models.load import build_model, open_weights
from dtune.models.schema import Attention, Init, ModelConfig
from dtune.optim.schema.adamw import AdamwConfig
from dtune.parallel.schema.single import SingleConfig
from dtune.peft.schema.full import FullConfig
from dtune.runtime.schema import Precision, Recompute
from dtune.runtime.world import World
from tests.unit.families import CPU, family_config, loaded, opened, save_family

GEMMA4 = {
    "head_dim": 8,
    "global_head_dim": 8,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
}


def save_gemma4(folder: Path) -> list[str]:
    """A small model whose layers hold a stored buffer, a factor; the names of the buffers."""
    sizes = family_config("llama").to_dict()
    common = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    heads = ("num_attention_heads", "num_key_value_heads", "pad_token_id")
    kept = {key: sizes[key] for key in (*common, *heads)}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        Gemma4TextConfig(**kept, **GEMMA4, initializer_range=0.2)
    )
    names = [f"model.layers.{layer}.layer_scalar" for layer in range(2)]
    for factor, name in enumerate(names, start=2):
        model.get_buffer(name).fill_(factor / 4)
    model.save_pretrained(folder)
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_stored_buffers_are_loaded_with_the_parameters(tmp_path: Path, dtype: torch.dtype) -> None:
    names = save_gemma4(tmp_path)
    config = ModelConfig(path=str(tmp_path))
    _, spec = build_model(config, dtype=dtype, device=CPU)
    assert list(spec.buffers) == names
    model = loaded(tmp_path, dtype)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=dtype, attn_implementation="eager"
    ).eval()
    ids = torch.arange(24).reshape(2, 12) * 5 % 97
    with torch.no_grad():
        expected = theirs(ids).logits
        assert torch.equal(model(ids).logits, expected)
        model.get_buffer(names[0]).fill_(1.0)
        assert not torch.equal(model(ids).logits, expected)


def test_a_missing_stored_buffer_is_named(tmp_path: Path) -> None:
    names = save_gemma4(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors[names[1]]
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=f"holds no tensor {names[1]}"):
        opened(tmp_path)
    opened(tmp_path, Init.random)


def test_full_fine_tuning_exports_the_stored_buffers(tmp_path: Path, world: World) -> None:
    names = save_gemma4(tmp_path / "base")
    config = ModelConfig(path=str(tmp_path / "base"), attention=Attention.eager)
    engine = SingleConfig().build(world, Precision.fp32)
    model, spec = build_model(config, dtype=torch.float32, device=CPU)
    source = open_weights(config, model, spec, seed=0)
    method = FullConfig().build()
    method.inject(model, spec)
    engine.prepare(
        model,
        spec,
        source=source,
        optimizer=AdamwConfig().build,
        schedule=lambda optimizer: LambdaLR(optimizer, lambda step: 1.0),
        recompute=Recompute.none,
        compile_blocks=False,
    )
    method.save(engine.full_tensors(), str(tmp_path / "model"))
    saved = method.saved(str(tmp_path / "model"))
    assert [saved.read(name, 0, 1).item() for name in names] == [0.5, 0.75]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(theirs.eval()(ids).logits, model.eval()(ids).logits)


def test_the_base_keeps_its_own_generation_config(tmp_path: Path) -> None:
    save_family("llama", tmp_path / "base")
    own = {"eos_token_id": [2, 5], "temperature": 0.6, "do_sample": True}
    file = tmp_path / "base" / "generation_config.json"
    file.write_text(json.dumps(own))
    model, spec = build_model(ModelConfig(path=str(tmp_path / "base")), dtype=torch.float32)
    method = FullConfig().build()
    method.inject(model, spec)
    tensors = ((name, torch.zeros(p.shape)) for name, p in model.named_parameters())
    method.save(tensors, str(tmp_path / "model"))
    exported = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert {key: exported[key] for key in own} == own
    file.write_text("not json")
    with pytest.raises(ConfigError, match=r"generation_config\.json cannot be read"):
        build_model(ModelConfig(path=str(tmp_path / "base")), dtype=torch.float32)


def test_of_a_hub_repository_only_weights_in_its_own_layout_are_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []

    def fetch(name: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(load, "snapshot_download", fetch)
    load.locate("someone/model", key="model.path", weights=True)
    held = [
        "config.json",
        "tokenizer.model",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors",
        "consolidated.safetensors",
        "consolidated-00001-of-00002.safetensors",
        "pytorch_model.bin",
    ]
    assert list(filter_repo_objects(held, allow_patterns=asked)) == held[:5]
