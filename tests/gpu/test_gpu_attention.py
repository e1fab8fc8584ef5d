"""A packed document on a GPU is the document alone, under every implementation of attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dtune.models.schema import Attention
from tests.gpu.attention import (
    FLASH,
    load_model,
    logits_alone,
    packed_logits,
    positions,
    save_model,
    tokens,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("attention", ["sdpa", "eager", "varlen", FLASH])
def test_packed_logits_equal_those_alone(folder: Path, attention: str) -> None:
    device = torch.device("cuda", 0)
    ids = tokens(device)
    exact = logits_alone(load_model(folder, Attention.eager, torch.float32, device), ids)
    model = load_model(folder, Attention(attention), torch.bfloat16, device)
    plain = load_model(folder, Attention.eager, torch.bfloat16, device)
    # Twice the error that bf16 has without packing, by the plainest attention.
    rounding = 2 * float((logits_alone(plain, ids) - exact).abs().max())
    packed = packed_logits(model, ids, positions(device))
    assert float((packed - exact).abs().max()) <= rounding
    # One document a row, as if positions did not matter: the others are seen.
    together = torch.arange(64, device=device).expand(2, 64).contiguous()
    mixed = packed_logits(model, ids, together)
    assert float((mixed - exact).abs().max()) > 2 * rounding
