"""Which kernel of torch's attention is tried first, and that rows of one document come to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from dtune.models import attention
from dtune.models.attention import VARLEN, attention_in_words
from dtune.models.attention_backends import MaskKind, backends, in_words
from dtune.models.schema import Attention
from dtune.types import NUM_DOCUMENTS
from tests.unit.families import save_family
from tests.unit.test_models import loaded
from tests.unit.test_models_attention import LIMIT, varlen_reference

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CAUSAL, TENSOR = MaskKind.causal, MaskKind.tensor
AMPERE, ADA, HOPPER, BLACKWELL, TURING = (8, 0), (8, 9), (9, 0), (10, 0), (7, 5)


@pytest.mark.parametrize(
    ("capability", "head_dim", "dtype", "mask", "words"),
    [
        (HOPPER, 128, BF16, CAUSAL, "cudnn, flash, efficient, math"),
        (HOPPER, 64, FP16, CAUSAL, "cudnn, flash, efficient, math"),
        (HOPPER, 256, BF16, CAUSAL, "flash, efficient, math"),
        (HOPPER, 100, BF16, CAUSAL, "flash, efficient, math"),
        (HOPPER, 288, BF16, CAUSAL, "efficient, math"),
        (HOPPER, 128, FP32, CAUSAL, "efficient, math"),
        (HOPPER, 128, BF16, TENSOR, "efficient, math"),
        (AMPERE, 128, BF16, CAUSAL, "flash, efficient, math"),
        (ADA, 128, FP16, CAUSAL, "flash, efficient, math"),
        (BLACKWELL, 128, BF16, CAUSAL, "flash, efficient, math"),
        (TURING, 128, FP16, CAUSAL, "efficient, math"),
    ],
)
def test_kernels_by_card_and_shape(
    capability: tuple[int, int], head_dim: int, dtype: torch.dtype, mask: MaskKind, words: str
) -> None:
    chosen = backends(capability, head_dim, dtype, mask)
    assert in_words(chosen) == words
    assert chosen[-1] is SDPBackend.MATH, "the last one can compute anything"
    assert len(set(chosen)) == len(chosen)


class Seen:
    """Stands for the kernels, which need a GPU, and remembers which was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        dense = attention.sdpa_attention_forward

        def varlen(*args: object, **kwargs: object) -> torch.Tensor:
            self.calls.append("varlen")
            return varlen_reference(*args, **kwargs)  # type: ignore[arg-type]

        def causal(*args: object, **kwargs: object) -> object:
            self.calls.append("causal" if kwargs.get("is_causal") else "other")
            return dense(*args, **kwargs)

        monkeypatch.setattr(attention, "_varlen_kernel", varlen)
        monkeypatch.setattr(attention, "sdpa_attention_forward", causal)


ROWS = {
    "whole": ((16,), (16,)),
    "packed": ((9, 7), (16,)),
}


def inputs(lengths: tuple[tuple[int, ...], ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    rows = [torch.cat([torch.arange(length) for length in row]) for row in lengths]
    positions = torch.stack(rows)
    ids = torch.randint(3, 97, positions.shape, generator=generator)
    return {"input_ids": ids, "position_ids": positions}


@pytest.mark.parametrize(
    ("family", "rows", "calls"),
    [
        ("llama", "whole", {"causal"}),
        ("llama", "packed", {"varlen"}),
        # A window that is shorter than the rows.
        ("mistral", "whole", {"varlen"}),
        ("gemma3", "whole", {"causal", "varlen"}),
    ],
)
def test_rows_of_one_document_are_computed_without_bounds(
    tmp_path: Path, family: str, rows: str, calls: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_family(family, tmp_path)
    model = loaded(tmp_path, FP32, Attention.eager)
    given = inputs(ROWS[rows])
    count = sum(map(len, ROWS[rows]))
    options = {"attention_mask": None, "use_cache": False, NUM_DOCUMENTS: count}
    with torch.no_grad():
        eager = model(**given, **options).logits
        seen = Seen(monkeypatch)
        model.set_attn_implementation(VARLEN)
        found = model(**given, **options).logits
    assert set(seen.calls) == calls
    assert len(seen.calls) == model.config.get_text_config().num_hidden_layers
    assert (found - eager).abs().max() <= LIMIT * eager.abs().max()
    assert (found.roll(1, dims=1) - eager).abs().max() > 100 * LIMIT * eager.abs().max()


def test_kernels_are_tried_in_that_order_and_only_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eagerly and compiled; on a CPU that is taken for a GPU."""
    save_family("llama", tmp_path)
    model = loaded(tmp_path, BF16, Attention.sdpa)
    given = inputs(ROWS["whole"])
    options = {"attention_mask": None, "use_cache": False, NUM_DOCUMENTS: 2}
    orders = []
    dense = attention.sdpa_attention_forward

    def causal(*args: object, **kwargs: object) -> object:
        orders.append(_cur_sdpa_kernel_backends(with_priority=True)[:4])
        return dense(*args, **kwargs)

    model.set_attn_implementation(VARLEN)
    before = _cur_sdpa_kernel_backends(with_priority=True)
    with torch.no_grad():
        plain = model(**given, **options).logits
        monkeypatch.setitem(attention._CAPABILITIES, None, HOPPER)
        with monkeypatch.context() as watched:
            watched.setattr(attention, "sdpa_attention_forward", causal)
            assert torch.equal(model(**given, **options).logits, plain)
        for layer in model.model.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
        assert torch.equal(model(**given, **options).logits, plain)
    wanted = list(backends(HOPPER, 8, BF16, CAUSAL))
    assert wanted[0] is SDPBackend.CUDNN_ATTENTION
    assert orders == [wanted] * 2
    assert _cur_sdpa_kernel_backends(with_priority=True) == before


def test_padded_rows_keep_their_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their width changes, and cuDNN would plan for each anew."""
    save_family("llama", tmp_path)
    model = loaded(tmp_path, FP32, Attention.eager)
    given = inputs(ROWS["whole"])
    mask = torch.ones_like(given["input_ids"])
    seen = Seen(monkeypatch)
    model.set_attn_implementation(VARLEN)
    with torch.no_grad():
        model(**given, attention_mask=mask, use_cache=False, **{NUM_DOCUMENTS: 2})
    assert set(seen.calls) == {"varlen"}


def test_the_log_says_what_computes_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_family("llama", tmp_path)
    model = loaded(tmp_path, FP32, Attention.sdpa)
    assert attention_in_words(model, torch.device("cpu"), FP32) == "sdpa"
    model.set_attn_implementation(VARLEN)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    words = attention_in_words(model, torch.device("cuda"), BF16)
    assert words.startswith(VARLEN)
    assert words.endswith("cudnn, flash, efficient, math")
