"""Full fine-tuning: what is trained, and the model it writes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import dtune
from dtune.errors import CheckpointError, ConfigError
from dtune.peft.export import model_source, plan_files, save_model, save_tokenizer
from dtune.peft.full import Full
from dtune.peft.schema.full import FullConfig
from dtune.runtime.tensors import TensorEntry
from tests.contracts.small_models import (
    injected_twin,
    limited_file_size,
    load_base,
    read_whole,
    save_base,
    token_ids,
    trained_tensors,
)

TINY = Path(dtune.__file__).parent / "assets" / "tiny"


def trained(base: Path) -> tuple[PreTrainedModel, Full]:
    """A model with every parameter moved away from its base."""
    method = Full(FullConfig())
    return injected_twin(base, method, noise=0.1), method


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_saved_model_loads_with_the_same_logits(tmp_path: Path, family: str, tied: bool) -> None:
    base = save_base(tmp_path / "base", family, tied=tied)
    model, method = trained(base)
    method.save(trained_tensors(model), str(tmp_path / "model"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert type(loaded) is type(model)
    assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)
    assert not torch.equal(load_base(base)(token_ids()).logits, model(token_ids()).logits)
    source = method.saved(str(tmp_path / "model"))
    for name, parameter in model.named_parameters():
        assert torch.equal(read_whole(source, name), parameter)
    assert ("lm_head.weight" in source) is not tied
    written = {path.name for path in (tmp_path / "model").iterdir()}
    assert written == {"config.json", "generation_config.json", "model.safetensors"}
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]


def test_saved_model_has_the_dtype_of_its_base(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", dtype="bfloat16")
    model, method = trained(base)
    method.save(trained_tensors(model), str(tmp_path / "model"))
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for name, parameter in model.named_parameters():
        assert torch.equal(stored[name], parameter.bfloat16()), name
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_large_model_is_split_into_files_with_an_index(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    model, method = trained(base)
    save_model(trained_tensors(model), tmp_path / "model", method.plan, max_file_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "model" / name).stat().st_size < 22_000 for name in files)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)
    source = model_source(tmp_path / "model")
    assert all(name in source for name, _ in model.named_parameters())


def test_tensors_may_come_in_any_order(tmp_path: Path) -> None:
    model, method = trained(save_base(tmp_path / "base", "llama"))
    method.save(iter(reversed(list(trained_tensors(model)))), str(tmp_path / "model"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)


def test_tensor_larger_than_the_limit_has_a_file_alone() -> None:
    entries = {
        name: TensorEntry(torch.float16, (size,))
        for name, size in zip("abcd", (4, 9, 3, 2), strict=True)
    }
    assert [list(group) for group in plan_files(entries, 10).values()] == [["a"], ["b"], ["c", "d"]]


def test_full_disk_leaves_the_older_model_and_takes_every_tensor(tmp_path: Path) -> None:
    model, method = trained(save_base(tmp_path / "base", "llama"))
    method.save(trained_tensors(model), str(tmp_path / "model"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    taken = itertools.count()
    counted = ((next(taken), item)[1] for item in trained_tensors(model))
    with limited_file_size(50_000), pytest.raises(CheckpointError, match="File too large"):
        method.save(counted, str(tmp_path / "model"))
    assert next(taken) == len(list(model.parameters()))
    assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"base", "model"}


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no model"):
        model_source(tmp_path)


@pytest.mark.skipif(not (TINY / "tokenizer.json").is_file(), reason="the tiny model is not built")
def test_tokenizer_and_chat_template_lie_beside_the_model(tmp_path: Path) -> None:
    model, method = trained(TINY)
    folder = tmp_path / "model"
    method.save(trained_tensors(model), str(folder))
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    save_tokenizer(tokenizer, folder)
    save_tokenizer(tokenizer, folder)
    again = AutoTokenizer.from_pretrained(folder)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert again.apply_chat_template(talk) == tokenizer.apply_chat_template(talk)
    assert again.chat_template == tokenizer.chat_template
    assert all(path.is_file() for path in folder.iterdir())
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(16)[None]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameter.to(method.plan.entries[name].dtype))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
