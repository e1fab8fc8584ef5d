"""Small models of the families that dtune names, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from dtune.models.load import build_model, open_weights
from dtune.models.schema import Attention, Init, ModelConfig
from dtune.parallel.ranges import fill, fill_buffers
from dtune.parallel.replica import allocate
from dtune.types import FlatShard, TensorSource

CPU = torch.device("cpu")

_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

_CONFIGS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"rope_parameters": _LLAMA3_ROPE}),
    "mistral": (MistralConfig, {"sliding_window": 5}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "gemma2": (Gemma2Config, {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8}),
    "gemma3": (
        Gemma3TextConfig,
        {
            "head_dim": 8,
            "sliding_window": 5,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3": (Phi3Config, {}),
    "granite": (GraniteConfig, {"embedding_multiplier": 3.0, "logits_scaling": 2.0}),
}

FAMILIES = tuple(_CONFIGS)


def family_config(family: str, **changes: Any) -> PretrainedConfig:
    """A small architecture of a family."""
    config, options = _CONFIGS[family]
    return config(**(_COMMON | options | changes))


def save_family(family: str, folder: Path, *, max_shard_size: str = "5GB", **changes: Any) -> None:
    """Write a small model of a family with random weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(family, **changes))
    with torch.no_grad():
        for parameter in model.parameters():  # norms of 1 and biases of 0 would hide a mix-up
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size=max_shard_size)


def loaded(
    path: Path, dtype: torch.dtype, attention: Attention = Attention.eager
) -> torch.nn.Module:
    """A model as dtune loads it: on meta first, then range by range."""
    config = ModelConfig(path=str(path), attention=attention)
    model, spec = build_model(config, dtype=dtype, device=CPU)
    source = open_weights(config, model, spec, seed=0)
    assert all(p.is_meta for p in model.parameters())
    allocate(model, CPU)
    with torch.no_grad():
        shards = [FlatShard(n, tuple(p.shape), 0, p.view(-1)) for n, p in model.named_parameters()]
    fill(shards, source)
    fill_buffers(model, source)
    return model.eval()


def opened(path: Path, init: Init = Init.pretrained) -> TensorSource:
    """The weights of a folder, checked against its config."""
    config = ModelConfig(path=str(path), init=init)
    model, spec = build_model(config, dtype=torch.float32, device=CPU)
    return open_weights(config, model, spec, seed=3)
