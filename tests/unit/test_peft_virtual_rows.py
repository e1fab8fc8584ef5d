"""Virtual tokens and the documents of a row: each has its own, for every family and the loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PretrainedConfig,
)

from dtune.errors import ConfigError
from dtune.models.spec import describe
from dtune.patch.apply import apply_patches, unpatch
from dtune.patch.base import patch_names
from dtune.peft import virtual_rows
from dtune.peft.schema import PEFT
from dtune.peft.virtual_rows import arrange
from dtune.types import NUM_DOCUMENTS, Batch, FusesLoss
from tests.distributed.training import make_batch
from tests.unit.families import FAMILIES
from tests.unit.patched import Step, adapted, largest_difference, train_step

N = 3
METHODS = ("prompt", "p_tuning", "prefix")
# fp32 keeps 24 bits; a logit is a sum of some hundred products, through two blocks.
LIMIT = 2e-5


def with_tokens(family: str, peft: str, **options: Any) -> nn.Module:
    return adapted(family, peft=peft, num_virtual_tokens=N, **options)[0].eval()


@torch.no_grad()
def logits_of(model: nn.Module, batch: Batch, *, count: int | None) -> torch.Tensor:
    """As an objective calls the model; ``count``: of documents, None where nobody tells."""
    told = {} if count is None else {NUM_DOCUMENTS: count}
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        **told,
    )
    return output.logits


@torch.no_grad()
def alone(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits of a packed batch, document by document; 0 on padding."""
    rows, length = batch.input_ids.shape
    logits = torch.zeros(rows, length, model.config.vocab_size)
    for row in range(rows):
        for number in range(int(batch.document_ids[row].max()) + 1):
            span = batch.document_ids[row] == number
            logits[row, span] = model(input_ids=batch.input_ids[row, span][None]).logits[0]
    return logits


COMPUTED = [
    (family, attention)
    for family in FAMILIES
    for attention in ("sdpa", "eager")
    # Gemma 2 bounds its attention scores, which sdpa cannot.
    if (family, attention) != ("gemma2", "sdpa")
]


@pytest.mark.parametrize(("family", "attention"), COMPUTED)
@pytest.mark.parametrize("peft", METHODS)
def test_a_packed_document_is_as_if_it_were_alone(peft: str, family: str, attention: str) -> None:
    model = with_tokens(family, peft, attention=attention)
    batch = make_batch(1, 0, packed=True)
    tokens = batch.document_ids >= 0
    assert int(batch.document_ids.max()) > 0, "one document is no test"
    expected = alone(model, batch)[tokens]
    scale = float(expected.abs().max())
    for count in (batch.num_documents, None):
        found = logits_of(model, batch, count=count)[tokens]
        assert (found - expected).abs().max() <= LIMIT * scale
    # As if a row were one document: the comparison tells them apart.
    whole = replace(batch, position_ids=torch.arange(batch.input_ids.shape[1])[None].expand(2, -1))
    wrong = logits_of(model, whole, count=None)[tokens]
    assert (wrong - expected).abs().max() > 100 * LIMIT * scale


@pytest.mark.parametrize("peft", METHODS)
def test_padding_on_the_right_changes_nothing(peft: str) -> None:
    model = with_tokens("mistral", peft, attention="sdpa")
    batch = make_batch(1, 0, packed=False)
    assert batch.attention_mask is not None
    tokens = batch.attention_mask.bool()
    expected = alone(model, batch)[tokens]
    scale = float(expected.abs().max())
    for count in (batch.num_documents, None):
        found = logits_of(model, batch, count=count)[tokens]
        assert (found - expected).abs().max() <= LIMIT * scale


@pytest.mark.parametrize("peft", ["prompt", "p_tuning"])
def test_on_a_device_all_documents_lie_in_one_row(
    peft: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the host, which knows their number, waits for nothing; with the same results."""
    model, _ = adapted("llama", peft=peft, num_virtual_tokens=N, attention="sdpa")
    batch = make_batch(1, 0, packed=True)
    rows = train_step(model, batch)
    shapes = []
    model.get_submodule("model").register_forward_hook(
        lambda _, __, output: shapes.append(output.last_hidden_state.shape[:2])
    )
    monkeypatch.setattr(virtual_rows, "_shares_one_row", lambda _: True)
    one = train_step(model, batch)
    assert shapes == [(1, batch.input_ids.numel() + N * batch.num_documents)]
    assert largest_difference(rows, one) <= LIMIT
    meta = {
        "input_ids": batch.input_ids.to("meta"),
        "position_ids": batch.position_ids.to("meta"),
        "use_cache": False,
        NUM_DOCUMENTS: batch.num_documents,
    }
    # Where reading a value is an error.
    arrange(meta, tuple(batch.input_ids.shape), N)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("peft", METHODS)
def test_the_fused_loss_is_that_of_the_logits(peft: str, packed: bool) -> None:
    model, spec = adapted("llama", peft=peft, num_virtual_tokens=N, attention="sdpa")
    batch = make_batch(1, 0, packed=packed)
    plain = train_step(model, batch)
    apply_patches(model, patch_names(), spec)
    assert isinstance(model, FusesLoss)
    fused = train_step(model, batch)
    assert largest_difference(plain, fused) <= LIMIT
    wrong = Step(fused.loss * 1.05, {name: g * 1.05 for name, g in fused.grads.items()})
    assert largest_difference(plain, wrong) > 100 * LIMIT
    unpatch(model)
    assert not isinstance(model, FusesLoss)
    assert largest_difference(plain, train_step(model, batch)) == 0


@pytest.mark.parametrize("peft", METHODS)
def test_generation_of_a_patched_model_keeps_positions(peft: str) -> None:
    model, spec = adapted("llama", peft=peft, num_virtual_tokens=N, attention="sdpa")
    model.eval()
    ids = make_batch(1, 0, packed=True).input_ids[:, :8]
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}
    plain = model.generate(ids, attention_mask=mask, **settings)
    apply_patches(model, patch_names(), spec)
    assert torch.equal(model.generate(ids, attention_mask=mask, **settings), plain)


@pytest.mark.parametrize("peft", METHODS)
def test_autocast_follows_fp32(peft: str) -> None:
    model = with_tokens("llama", peft, attention="sdpa")
    batch = make_batch(1, 0, packed=True)
    tokens = batch.document_ids >= 0
    exact = logits_of(model, batch, count=batch.num_documents)[tokens]
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        half = logits_of(model, batch, count=batch.num_documents)[tokens]
    assert half.dtype == torch.bfloat16
    # bf16 keeps 8 bits, and a logit passes some ten roundings.
    assert (half - exact).abs().mean() <= 10 * 2**-8 * exact.abs().mean()


_SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
REFUSED: list[tuple[PretrainedConfig, str]] = [
    (MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4), "cache"),
    (
        DeepseekV2Config(
            **_SMALL,
            kv_lora_rank=8,
            q_lora_rank=None,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=4,
            first_k_dense_replace=2,
        ),
        "keys",
    ),
    (MistralConfig(**_SMALL, sliding_window=N), "fewer"),
]


@pytest.mark.parametrize(("config", "reason"), REFUSED, ids=lambda x: type(x).__name__)
def test_models_whose_layers_keep_no_such_keys_are_refused(
    config: PretrainedConfig, reason: str
) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    spec = describe(model, "path/of/it")
    with pytest.raises(ConfigError, match=reason):
        PEFT.config("prefix")(num_virtual_tokens=N).build().inject(model, spec)


def test_a_packed_batch_without_masks_of_documents_is_refused() -> None:
    """Where nothing tells the attention about documents: better no run than a wrong one."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**_SMALL, "vocab_size": 128}))
    PEFT.config("prefix")(num_virtual_tokens=N).build().inject(model, describe(model, "llama"))
    batch = make_batch(1, 0, packed=True)
    with pytest.raises(ConfigError, match=r"data\.packing=false"):
        logits_of(model, batch, count=None)
