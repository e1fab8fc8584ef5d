"""Virtual tokens: equality with HF ``peft`` in forward, gradient, generation and file."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from dtune.assets import ASSETS
from dtune.errors import ConfigError
from dtune.peft.schema import PEFT
from dtune.peft.schema.p_tuning import Encoder, PTuningConfig
from dtune.peft.schema.prefix import PrefixConfig
from dtune.peft.schema.prompt import PromptConfig, PromptInit
from dtune.peft.virtual import ENCODER, VirtualTokens
from tests.contracts.small_models import (
    build_on_meta,
    load_base,
    materialize,
    read_whole,
    save_base,
    sources,
    token_ids,
    trained_tensors,
)

N = 5
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("prompt", {}),
    "mlp": ("p_tuning", {"hidden": 24}),
    "lstm": ("p_tuning", {"encoder": Encoder.lstm, "hidden": 8, "layers": 1}),
    "prefix": ("prefix", {}),
    "projected": ("prefix", {"projection": True, "hidden": 12}),
}
PEFT_CONFIGS: dict[str, Any] = {
    "prompt": lambda: peft.PromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB"),
    "mlp": lambda: peft.PromptEncoderConfig(encoder_hidden_size=24),
    "lstm": lambda: peft.PromptEncoderConfig(
        encoder_hidden_size=8, encoder_num_layers=1, encoder_reparameterization_type="LSTM"
    ),
    "prefix": lambda: peft.PrefixTuningConfig(),
    "projected": lambda: peft.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=12),
}


def ours(base: Path, kind: str, **options: Any) -> tuple[PreTrainedModel, VirtualTokens]:
    name, own = METHODS[kind]
    method = PEFT.config(name)(**{"num_virtual_tokens": N, **own, **options}).build()
    assert isinstance(method, VirtualTokens)
    model, spec = build_on_meta(base)
    method.inject(model, spec)
    materialize(model, method, base)
    return model, method


def theirs(base: Path, kind: str, encoder: nn.Module) -> peft.PeftModel:
    """HF peft's model with the same values, built without any file of ours."""
    config = PEFT_CONFIGS[kind]()
    config.task_type, config.num_virtual_tokens = "CAUSAL_LM", N
    model = peft.get_peft_model(load_base(base), config)
    model.prompt_encoder["default"].load_state_dict(encoder.state_dict())
    return model.eval()


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, the second row shorter."""
    ids = token_ids()
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return ids, mask


@pytest.mark.parametrize("kind", METHODS)
def test_forward_and_gradients_are_bit_equal_to_peft(base: Path, kind: str) -> None:
    model, _ = ours(base, kind)
    encoder = model.get_submodule(ENCODER)
    twin = theirs(base, kind, encoder)
    ids, mask = padded()
    logits = model(input_ids=ids, attention_mask=mask).logits
    expected = twin(input_ids=ids, attention_mask=mask).logits[:, -ids.shape[1] :]
    assert torch.equal(logits[mask.bool()], expected[mask.bool()])
    for found in (logits, expected):
        found[mask.bool()].square().mean().backward()
    gradients = dict(twin.prompt_encoder["default"].named_parameters())
    for name, parameter in encoder.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        # peft encodes the tokens once a row for prefixes, which sums in another order.
        scale = float(parameter.grad.abs().max())
        assert (parameter.grad - gradients[name].grad).abs().max() <= 2**-20 * scale, name


@pytest.mark.parametrize("kind", METHODS)
def test_positions_given_or_not_and_caches_kept_or_not_are_one(llama: Path, kind: str) -> None:
    model, _ = ours(llama, kind)
    ids = token_ids()
    plain = model(ids).logits
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    assert torch.equal(model(ids, position_ids=positions).logits, plain)
    assert torch.equal(model(ids, use_cache=False).logits, plain)
    assert torch.equal(model(ids, use_cache=False, position_ids=positions).logits, plain)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, plain)
    # A product of another shape may sum in another order.
    last = model(ids, logits_to_keep=3).logits
    assert (last - plain[:, -3:]).abs().max() <= 2**-20 * plain.abs().max()
    states = model(ids, output_hidden_states=True).hidden_states
    assert {state.shape[1] for state in states} == {ids.shape[1]}


@pytest.mark.parametrize("kind", METHODS)
def test_generation_equals_peft_and_does_not_depend_on_padding(base: Path, kind: str) -> None:
    model, _ = ours(base, kind)
    twin = theirs(base, kind, model.get_submodule(ENCODER))
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": 99}

    def alone(row: torch.Tensor, generator: Any = model, **more: Any) -> torch.Tensor:
        mask = torch.ones_like(row)
        return generator.generate(input_ids=row, attention_mask=mask, **settings, **more)[0]

    row = token_ids()[:1]
    long = alone(row)
    assert torch.equal(long, alone(row, twin))
    assert torch.equal(long, alone(row, use_cache=False))
    left = torch.cat([torch.zeros(1, 4, dtype=torch.long), row[:, :12]], dim=1)
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, :4] = 0
    together = model.generate(torch.cat([row, left]), attention_mask=mask, **settings)
    assert torch.equal(together[0], long)
    assert torch.equal(together[1, 4:], alone(row[:, :12]))


@pytest.mark.parametrize("kind", METHODS)
def test_files_are_those_that_peft_writes(base: Path, kind: str, tmp_path: Path) -> None:
    model, method = ours(base, kind)
    twin = theirs(base, kind, model.get_submodule(ENCODER))
    method.save(trained_tensors(model), str(tmp_path / "ours"))
    # An LSTM whose gradient is kept computes by another kernel, in the last bits.
    with torch.no_grad():
        twin.save_pretrained(tmp_path / "theirs")
    configs = [
        json.loads((tmp_path / who / "adapter_config.json").read_text())
        for who in ("ours", "theirs")
    ]
    assert configs[0] == {**configs[1], "base_model_name_or_path": str(base)}
    files = [
        peft.load_peft_weights(str(tmp_path / who), device="cpu") for who in ("ours", "theirs")
    ]
    assert list(files[0]) == list(files[1]) == ["prompt_embeddings"]
    assert torch.equal(files[0]["prompt_embeddings"], files[1]["prompt_embeddings"])


@pytest.mark.parametrize("kind", METHODS)
def test_what_was_saved_goes_on_where_its_settings_are_the_same(
    llama: Path, kind: str, tmp_path: Path
) -> None:
    model, method = ours(llama, kind)
    method.save(trained_tensors(model), str(tmp_path / "saved"))
    with pytest.raises(ConfigError, match="num_virtual_tokens is 5"):
        ours(llama, kind, num_virtual_tokens=4)[1].saved(str(tmp_path / "saved"))
    other = "prompt" if kind != "prompt" else "mlp"
    with pytest.raises(ConfigError, match="peft_type is"):
        ours(llama, other)[1].saved(str(tmp_path / "saved"))
    encoder = tmp_path / "saved" / "prompt_encoder.safetensors"
    assert encoder.is_file() is (kind in ("mlp", "lstm", "projected"))
    if encoder.is_file():
        encoder.unlink()
        with pytest.raises(ConfigError, match=r"set peft\.init_from=none"):
            method.saved(str(tmp_path / "saved"))


def test_initial_values_are_distributed_as_in_peft_and_keyed_by_seed(llama: Path) -> None:
    for kind in METHODS:
        _, method = ours(llama, kind, num_virtual_tokens=64)
        initial = sources(method, llama, seed=7)[1]
        torch.manual_seed(0)
        for name, parameter in method.make_encoder().named_parameters():
            values = read_whole(initial, f"{ENCODER}.{name}")
            parts = [initial.read(f"{ENCODER}.{name}", a, a + 1) for a in range(3)]
            assert torch.equal(torch.cat(parts), values.flatten()[:3])
            if kind == "prompt":
                continue
            again = sources(method, llama, seed=8)[1]
            assert not torch.equal(read_whole(again, f"{ENCODER}.{name}"), values)
            # Two samples of n have standard deviations within 4 / sqrt(n) of each other.
            ratio = float(values.std() / parameter.detach().std())
            assert abs(math.log(ratio)) <= 4 / math.sqrt(values.numel()), name


def test_a_prompt_can_begin_as_words(llama: Path) -> None:
    name = f"{ENCODER}.embedding.weight"
    words = load_base(llama).get_input_embeddings().weight
    _, method = ours(llama, "prompt")
    rows = read_whole(sources(method, llama, seed=3)[1], name)
    assert torch.equal(rows, read_whole(sources(method, llama, seed=3)[1], name))
    assert not torch.equal(rows, read_whole(sources(method, llama, seed=4)[1], name))
    assert all((words == row).all(1).any() for row in rows)
    _, method = ours(llama, "prompt", init=PromptInit.random)
    assert not (words == read_whole(sources(method, llama)[1], name)[0]).all(1).any()


def test_a_prompt_can_begin_as_a_text(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    with pytest.raises(ConfigError, match=r"tokenizer.*set peft\.init=vocab"):
        ours(base, "prompt", init=PromptInit.text, init_text="Reverse.")
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny")
    tokenizer.save_pretrained(base)
    with pytest.raises(ConfigError, match=r"set another peft\.init_text"):
        ours(base, "prompt", init=PromptInit.text, init_text="Where does Mira live?")
    text = next(t for t in map(tokenizer.decode, range(4, 60)) if max(tokenizer(t).input_ids) < 64)
    ids = tokenizer(text)["input_ids"]
    _, method = ours(base, "prompt", init=PromptInit.text, init_text=text, num_virtual_tokens=7)
    rows = read_whole(sources(method, base)[1], f"{ENCODER}.embedding.weight")
    words = load_base(base).get_input_embeddings().weight
    assert torch.equal(rows, words[[*ids, *ids, *ids, *ids, *ids, *ids, *ids][:7]])
    twin = peft.get_peft_model(
        load_base(base),
        peft.PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=7,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text=text,
            tokenizer_name_or_path=str(base),
        ),
    )
    assert torch.equal(rows, twin.prompt_encoder["default"].embedding.weight)


@pytest.mark.parametrize(
    ("config", "options", "key"),
    [
        (PromptConfig, {"num_virtual_tokens": 0}, r"peft\.num_virtual_tokens=0"),
        (PrefixConfig, {"num_virtual_tokens": 0}, r"peft\.num_virtual_tokens=0"),
        (PTuningConfig, {"num_virtual_tokens": 0}, r"peft\.num_virtual_tokens=0"),
        (PromptConfig, {"init": PromptInit.text}, r"peft\.init_text"),
        (PromptConfig, {"init_text": "Reverse."}, r"set peft\.init=text"),
        (PTuningConfig, {"layers": 3}, r"set peft\.encoder=lstm"),
        (PTuningConfig, {"layers": 0, "encoder": Encoder.lstm}, r"peft\.layers=0"),
        (PTuningConfig, {"hidden": -1}, r"peft\.hidden=-1"),
        (PrefixConfig, {"hidden": 8}, r"set peft\.projection=true"),
        (PrefixConfig, {"hidden": -1, "projection": True}, r"peft\.hidden=-1"),
    ],
)
def test_settings_that_would_not_be_read_are_refused(
    config: Any, options: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError, match=key):
        config(**options)


@pytest.mark.parametrize("kind", METHODS)
def test_the_model_keeps_its_names_and_others_of_its_class_are_left_alone(
    llama: Path, kind: str
) -> None:
    model, _ = ours(llama, kind)
    plain = load_base(llama)
    names = {name for name, _ in model.named_parameters() if not name.startswith(ENCODER)}
    assert names == {name for name, _ in plain.named_parameters()}
    assert isinstance(model, type(plain))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith(f"{ENCODER}.") for name in trained)
    ids = token_ids()
    assert not torch.equal(plain(ids).logits, model(ids).logits)
    assert torch.equal(plain(ids).logits, copy.deepcopy(plain)(ids).logits)
