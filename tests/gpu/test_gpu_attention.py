"""A packed document on a GPU is the document alone, under every implementation of attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity, profile

from dtune.models.attention_backends import MaskKind, backends
from dtune.models.schema import Attention
from dtune.types import NUM_DOCUMENTS
from tests.gpu.attention import (
    FLASH,
    load_model,
    logits_alone,
    packed_logits,
    positions,
    save_model,
    tokens,
)

KERNELS = {
    SDPBackend.CUDNN_ATTENTION: "aten::_scaled_dot_product_cudnn_attention",
    SDPBackend.FLASH_ATTENTION: "aten::_scaled_dot_product_flash_attention",
    SDPBackend.EFFICIENT_ATTENTION: "aten::_scaled_dot_product_efficient_attention",
}

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


def test_rows_of_one_document_take_the_cards_fastest_kernel(folder: Path) -> None:
    """Under varlen, without bounds: the same as the plainest attention, to the rounding of bf16."""
    device = torch.device("cuda", 0)
    ids = tokens(device)
    rows = torch.arange(64, device=device).expand(2, 64).contiguous()
    exact = packed_logits(load_model(folder, Attention.eager, torch.float32, device), ids, rows)
    plain = packed_logits(load_model(folder, Attention.eager, torch.bfloat16, device), ids, rows)
    model = load_model(folder, Attention.varlen, torch.bfloat16, device)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        out = model(
            input_ids=ids,
            position_ids=rows,
            attention_mask=None,
            use_cache=False,
            **{NUM_DOCUMENTS: len(ids)},
        )
    found = out.logits.float().flatten(0, 1)
    assert float((found - exact).abs().max()) <= 2 * float((plain - exact).abs().max())
    ran = {event.key for event in profiler.key_averages()}
    capability = torch.cuda.get_device_capability(device)
    first = backends(capability, 64, torch.bfloat16, MaskKind.causal)[0]
    assert KERNELS[first] in ran, sorted(name for name in ran if "attention" in name)
