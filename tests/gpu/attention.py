"""One small model under each implementation of attention, on one device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dtune.models.load import build_model, open_weights
from dtune.models.schema import Attention, ModelConfig
from dtune.parallel.ranges import fill, fill_buffers
from dtune.parallel.replica import allocate
from dtune.runtime.capabilities import is_installed
from dtune.types import FlatShard

VOCABULARY = 256
LENGTHS = ((5, 40, 19), (33, 31))
"""Documents of two packed rows, each of 64 tokens."""
FLASH = pytest.param(
    "flash_attention_2",
    marks=pytest.mark.skipif(not is_installed("flash_attn"), reason="flash-attn is not installed"),
)
"""The one implementation that may be missing on a GPU; all others must run there."""


def save_model(folder: Path) -> Path:
    """Random weights, loud enough for a document to notice what it should not see."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load_model(
    folder: Path, attention: Attention, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """As an engine loads it; ConfigError where the attention cannot run."""
    config = ModelConfig(path=str(folder), attention=attention)
    model, spec = build_model(config, dtype=dtype, device=device)
    source = open_weights(config, model, spec, seed=0)
    allocate(model, device)
    named = model.named_parameters()
    shards = (FlatShard(n, tuple(p.shape), 0, p.detach().view(-1)) for n, p in named)
    fill(shards, source)
    fill_buffers(model, source)
    return model.eval()


def tokens(device: torch.device) -> torch.Tensor:
    """Packed rows: int64 [2, 64]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCABULARY, (2, 64), generator=generator).to(device)


def positions(device: torch.device) -> torch.Tensor:
    """They start anew with every document: int64 [2, 64]."""
    rows = [torch.cat([torch.arange(length) for length in lengths]) for lengths in LENGTHS]
    return torch.stack(rows).to(device)


def packed_logits(
    model: PreTrainedModel, ids: torch.Tensor, position_ids: torch.Tensor
) -> torch.Tensor:
    """Logits of all documents in one forward: fp32 [128, V]."""
    with torch.no_grad():
        out = model(input_ids=ids, position_ids=position_ids, attention_mask=None, use_cache=False)
    return out.logits.float().flatten(0, 1)


def logits_alone(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits of each document in a forward of its own, in the same order: fp32 [128, V]."""
    found = []
    for row, lengths in zip(ids, LENGTHS, strict=True):
        for document in row.split(list(lengths)):
            alone = torch.arange(len(document), device=ids.device)[None]
            found.append(packed_logits(model, document[None], alone))
    return torch.cat(found)
