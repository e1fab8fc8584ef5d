"""Building a model without its weights, and reading them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from dtune.errors import ConfigError
from dtune.models.load import build_model, load_tokenizer, open_weights
from dtune.models.random import RandomSource
from dtune.models.schema import Init, ModelConfig
from dtune.models.sources import ChainedSource, RenamedSource
from dtune.parallel.replica import allocate
from dtune.types import Role
from tests.unit.families import CPU, FAMILIES, loaded, opened, save_family


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_from_pretrained_bit_for_bit(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    save_family(family, tmp_path)
    ids = torch.arange(24).reshape(2, 12) * 5 % 97
    model = loaded(tmp_path, dtype)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=dtype, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        expected = theirs(ids).logits
        assert torch.equal(model(ids).logits, expected)
        first = next(iter(model.parameters()))
        first.mul_(1.05)
        assert not torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_and_blocks_of_every_family(tmp_path: Path, family: str) -> None:
    save_family(family, tmp_path)
    _, spec = build_model(ModelConfig(path=str(tmp_path)), dtype=torch.float32, device=CPU)
    roles = {path.rpartition(".")[2]: role for path, role in spec.linears.items()}
    attention = (
        {"qkv_proj", "o_proj"} if family == "phi3" else {"q_proj", "k_proj", "v_proj", "o_proj"}
    )
    mlp = (
        {"gate_up_proj", "down_proj"} if family == "phi3" else {"gate_proj", "up_proj", "down_proj"}
    )
    expected = dict.fromkeys(attention, Role.attention) | dict.fromkeys(mlp, Role.mlp)
    assert roles == expected | {"lm_head": Role.head}
    (block,) = spec.block_types
    assert block.__name__.endswith("DecoderLayer")
    assert spec.family in (family, f"{family}_text")


def test_tied_weights_are_one_parameter_and_counted_once(tmp_path: Path) -> None:
    save_family("llama", tmp_path, tie_word_embeddings=True)
    model, spec = build_model(ModelConfig(path=str(tmp_path)), dtype=torch.float32, device=CPU)
    assert spec.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert spec.num_parameters == sum(
        t.numel() for t in load_file(tmp_path / "model.safetensors").values()
    )
    allocate(model, CPU)
    assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A small Llama in several files."""
    save_family("llama", tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    return tmp_path


def test_any_range_equals_that_of_the_whole_tensor(llama: Path) -> None:
    source = opened(llama)
    whole = AutoModelForCausalLM.from_pretrained(llama).state_dict()
    for name, tensor in whole.items():
        size = tensor.numel()
        assert source.shape(name) == tuple(tensor.shape)
        for start, stop in [(0, size), (1, size - 1), (size // 3, size // 2), (5, 6), (7, 7)]:
            assert torch.equal(source.read(name, start, stop), tensor.flatten()[start:stop])


def test_a_base_model_saved_alone_loads_without_its_prefix(tmp_path: Path) -> None:
    save_family("llama", tmp_path, tie_word_embeddings=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({n.removeprefix("model."): t for n, t in tensors.items()}, file)
    source = opened(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(source.read(name, 0, 8), tensors[name].flatten()[:8])


def test_a_head_stored_instead_of_the_embedding_serves_both(tmp_path: Path) -> None:
    save_family("llama", tmp_path, tie_word_embeddings=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file)
    assert torch.equal(
        opened(tmp_path).read("model.embed_tokens.weight", 0, 4),
        tensors["lm_head.weight"].flatten()[:4],
    )


def _edit_index(folder: Path, name: str, value: str) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][name] = value
    index.write_text(json.dumps(content))


def test_a_file_outside_the_folder_is_refused(llama: Path) -> None:
    for outside in ("../secret.safetensors", "/etc/passwd", "a/b.safetensors"):
        _edit_index(llama, "model.norm.weight", outside)
        with pytest.raises(ConfigError, match="outside its folder"):
            opened(llama)


def test_a_missing_file_is_named_with_what_it_holds(llama: Path) -> None:
    last = sorted(llama.glob("model-*.safetensors"))[-1]
    held = next(iter(load_file(last)))
    last.unlink()
    with pytest.raises(ConfigError, match=f"{last.name} is missing.* {held}"):
        opened(llama)


def test_a_missing_tensor_and_a_wrong_shape_are_named(tmp_path: Path) -> None:
    save_family("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=r"holds no tensor model\.norm\.weight"):
        opened(tmp_path)
    save_file({**tensors, "model.norm.weight": norm[:-1]}, file)
    with pytest.raises(ConfigError, match=r"model.norm.weight .* has shape \[31\].* wants \[32\]"):
        opened(tmp_path)
    file.write_bytes(b"not safetensors")
    with pytest.raises(ConfigError, match="not a readable safetensors file"):
        opened(tmp_path)
    file.unlink()
    with pytest.raises(ConfigError, match=r"model\.safetensors.*model.init=random"):
        opened(tmp_path)


def test_an_index_that_is_none_is_refused(llama: Path) -> None:
    for text in ("{}", "[]", "not json"):
        (llama / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ConfigError, match="not an index"):
            opened(llama)


def test_a_family_stored_in_another_layout_is_refused(tmp_path: Path) -> None:
    """transformers merges the experts of a checkpoint; read as they are they would be wrong."""
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="another layout"):
        opened(tmp_path)


def test_a_path_that_does_not_exist_is_an_error_of_its_key(tmp_path: Path) -> None:
    for path in (str(tmp_path / "nothing"), "./nothing", "no/such/folder"):
        with pytest.raises(ConfigError, match=r"model\.path=.*no such folder"):
            build_model(ModelConfig(path=path), dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"config\.json"):
        build_model(ModelConfig(path=str(tmp_path)), dtype=torch.float32)


def test_a_config_that_calls_floats_quantised_is_refused(tmp_path: Path) -> None:
    save_family("llama", tmp_path)
    file = tmp_path / "config.json"
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    file.write_text(json.dumps(json.loads(file.read_text()) | quantised))
    with pytest.raises(ConfigError, match="no linear is quantised"):
        opened(tmp_path)


def test_random_weights_depend_on_name_and_seed_alone(tmp_path: Path) -> None:
    save_family("llama", tmp_path)
    config = LlamaConfig.from_pretrained(tmp_path)
    source, again, other = (RandomSource(config, seed) for seed in (3, 3, 4))
    name = "model.layers.1.mlp.up_proj.weight"
    whole = source.read(name, 0, 32 * 48)
    again.read("model.embed_tokens.weight", 0, 10)
    state = torch.random.get_rng_state()
    assert torch.equal(again.read(name, 100, 200), whole[100:200])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(other.read(name, 0, 32 * 48), whole)
    assert not torch.equal(source.read(name.replace(".1.", ".0."), 0, 32 * 48), whole)
    # A standard deviation from n draws is within 5 sigma: sigma = 1 / sqrt(2 n) of it.
    assert abs(whole.std().item() / config.initializer_range - 1) < 5 / (2 * whole.numel()) ** 0.5
    assert torch.equal(source.read("model.norm.weight", 0, 32), torch.ones(32))


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_exist_for_every_parameter(tmp_path: Path, family: str) -> None:
    save_family(family, tmp_path)
    config = ModelConfig(path=str(tmp_path), init=Init.random)
    model, spec = build_model(config, dtype=torch.float32, device=CPU)
    source = open_weights(config, model, spec, seed=0)
    for name, parameter in model.named_parameters():
        assert source.read(name, 0, parameter.numel()).isfinite().all(), name


def test_chained_and_renamed_sources_ask_the_right_one(tmp_path: Path) -> None:
    save_family("llama", tmp_path)
    stored = opened(tmp_path)
    renamed = RenamedSource(stored, lambda name: name.replace(".base.", "."))
    random = opened(tmp_path, Init.random)
    chain = ChainedSource([renamed, random])
    wrapped, plain = "model.layers.0.mlp.up_proj.base.weight", "model.layers.0.mlp.up_proj.weight"
    assert wrapped in chain
    assert "nothing" not in chain
    assert torch.equal(chain.read(wrapped, 3, 9), stored.read(plain, 3, 9))
    assert chain.shape(wrapped) == stored.shape(plain)
    assert not torch.equal(chain.read(plain, 3, 9), random.read(plain, 3, 9))


def test_the_embedded_model_loads_with_its_tokenizer(tmp_path: Path) -> None:
    config = ModelConfig(path="dtune://tiny")
    model, spec = build_model(config, dtype=torch.float32)
    open_weights(config, model, spec, seed=0)
    tokenizer = load_tokenizer(config)
    assert tokenizer.chat_template
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages[0]['content'] }}")
    config.chat_template = str(template)
    assert load_tokenizer(config).chat_template == template.read_text()
    config.chat_template = str(tmp_path / "none.jinja")
    with pytest.raises(ConfigError, match=r"model\.chat_template="):
        load_tokenizer(config)
    config.tokenizer = str(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.tokenizer="):
        load_tokenizer(config)


def test_the_stored_dtype_is_that_of_the_files_not_of_the_build() -> None:
    config = ModelConfig(path="dtune://tiny")
    _, spec = build_model(config, dtype=torch.float32)
    assert spec.stored_dtype is torch.float16
