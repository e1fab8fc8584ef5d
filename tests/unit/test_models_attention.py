"""A packed document computes what it computes alone, under every implementation that runs here."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dtune.errors import ConfigError
from dtune.models import attention
from dtune.models.attention import VARLEN, install_documents, resolve_attention
from dtune.models.load import build_model
from dtune.models.masks import document_bounds
from dtune.models.schema import Attention, ModelConfig
from tests.unit.families import FAMILIES, save_family
from tests.unit.test_models import loaded

CPU = torch.device("cpu")

# Rows of documents by length, and padding at the end of the second.
ROWS = ((7, 9, 4), (11, 6))
LENGTH = 20

# The same sums in another order: fp32 rounds to 2^-24, and a logit is some hundred additions deep
# through two blocks. A wrong mask moves logits by a tenth and more.
LIMIT = 2**-24 * 1000


def packed_batch() -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int, int]]]:
    """Ids, positions, and where documents lie: (row, start, stop)."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 97, (len(ROWS), LENGTH), generator=generator)
    positions = torch.zeros_like(ids)
    places = []
    for row, lengths in enumerate(ROWS):
        at = 0
        for length in lengths:
            positions[row, at : at + length] = torch.arange(length)
            places.append((row, at, at + length))
            at += length
        ids[row, at:] = 0
    return ids, positions, places


def leak(model: nn.Module, *, restart: bool = True) -> float:
    """Largest difference between a packed document's logits and its own alone, over their size."""
    ids, positions, places = packed_batch()
    if not restart:  # a mask that forgets where documents start
        positions = torch.arange(LENGTH).expand_as(ids)
    with torch.no_grad():
        packed = model(
            input_ids=ids, position_ids=positions, attention_mask=None, use_cache=False
        ).logits
        assert packed.isfinite().all()
        worst = 0.0
        for row, start, stop in places:
            alone = model(
                input_ids=ids[row : row + 1, start:stop],
                position_ids=torch.arange(stop - start)[None],
                attention_mask=None,
                use_cache=False,
            ).logits[0]
            difference = (packed[row, start:stop] - alone).abs().max() / alone.abs().max()
            worst = max(worst, difference.item())
    return worst


def implementations(family: str) -> tuple[Attention, ...]:
    """What runs a family on CPU; bounded scores (Gemma 2) are beyond sdpa."""
    if family == "gemma2":
        return (Attention.eager,)
    return (Attention.eager, Attention.sdpa)


CASES = [(family, kind) for family in FAMILIES for kind in implementations(family)]


@pytest.mark.parametrize(("family", "kind"), CASES, ids=lambda value: str(value))
def test_packed_document_equals_itself_alone(tmp_path: Path, family: str, kind: Attention) -> None:
    save_family(family, tmp_path)
    model = loaded(tmp_path, torch.float32, kind)
    assert leak(model) <= LIMIT
    assert leak(model, restart=False) > 100 * LIMIT, "a leaking mask must show"


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_packed_document_equals_itself_alone_under_flex(tmp_path: Path, family: str) -> None:
    """Uncompiled, which takes a minute here; on CPU flex has a forward pass only, as this is."""
    save_family(family, tmp_path)
    model = loaded(tmp_path, torch.float32, Attention.eager)
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):
        assert leak(model) <= LIMIT
        assert leak(model, restart=False) > 100 * LIMIT


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_right_padding_changes_no_token(tmp_path: Path, family: str) -> None:
    save_family(family, tmp_path)
    model = loaded(tmp_path, torch.float32, Attention.sdpa)
    ids, _, _ = packed_batch()
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    positions = torch.arange(LENGTH).expand_as(ids)
    with torch.no_grad():
        padded = model(
            input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False
        ).logits
        alone = model(input_ids=ids[1:, :13], use_cache=False).logits[0]
    assert (padded[1, :13] - alone).abs().max() <= LIMIT * alone.abs().max()


def varlen_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    *,
    longest: int,
    scale: float | None,
    window: tuple[int, int],
) -> torch.Tensor:
    """What the variable-length kernel computes, document by document."""
    out = torch.empty_like(query)
    groups = query.shape[1] // key.shape[1]
    edges = bounds.tolist()
    for start, stop in itertools.pairwise(edges):
        assert 0 < stop - start <= longest
        q, k, v = (x[start:stop].transpose(0, 1) for x in (query, key, value))
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        i = torch.arange(stop - start)
        mask = i[:, None] >= i
        if window[0] >= 0:
            mask &= i[:, None] - i <= window[0]
        one = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        out[start:stop] = one.transpose(0, 1)
    return out


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3", "granite"])
def test_varlen_gets_the_bounds_of_every_document(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel needs a GPU; in its place stands its definition, and all around it is ours."""
    monkeypatch.setattr(attention, "_varlen_kernel", varlen_reference)
    save_family(family, tmp_path)
    model = loaded(tmp_path, torch.float32, Attention.eager)
    ids, positions, _ = packed_batch()
    with torch.no_grad():
        eager = model(
            input_ids=ids, position_ids=positions, attention_mask=None, use_cache=False
        ).logits
        model.set_attn_implementation(VARLEN)
        varlen = model(
            input_ids=ids, position_ids=positions, attention_mask=None, use_cache=False
        ).logits
    assert (varlen - eager).abs().max() <= LIMIT * eager.abs().max()
    assert leak(model) <= LIMIT
    assert leak(model, restart=False) > 100 * LIMIT


def test_varlen_generates_as_sdpa_does(tmp_path: Path) -> None:
    save_family("llama", tmp_path)
    model = loaded(tmp_path, torch.float32, Attention.sdpa)
    ids = torch.arange(3, 15).reshape(2, 6)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": mask}
    expected = model.generate(ids, **options)
    model.set_attn_implementation(VARLEN)
    assert torch.equal(model.generate(ids, **options), expected)


def test_flash_attn_gets_bounds_in_its_own_names() -> None:
    seen: dict[str, object] = {}

    class Probe(nn.Module):
        config = SimpleNamespace(_attn_implementation="flash_attention_2")

        def forward(self, **kwargs: object) -> None:
            seen.update(kwargs)

    probe = Probe()
    install_documents(probe)
    ids, positions, _ = packed_batch()
    probe(input_ids=ids, position_ids=positions, attention_mask=None, use_cache=False)
    assert seen["attention_mask"] is None
    assert seen["max_length_q"] == seen["max_length_k"] == LENGTH
    assert torch.equal(
        torch.as_tensor(seen["cu_seq_lens_q"]), document_bounds(positions, None, None)
    )
    seen.clear()
    probe(input_ids=ids, position_ids=positions, attention_mask=None, use_cache=True)
    assert "cu_seq_lens_q" not in seen


def test_bounds_of_documents_rows_and_padding() -> None:
    _, positions, _ = packed_batch()
    padding = [37, 38, 39]  # each position of padding is a document of its own
    starts = [0, 7, 16, 20, 31, *padding]
    assert document_bounds(positions, None, None).tolist() == [*starts, 40]
    assert document_bounds(positions, None, len(starts)).tolist() == [*starts, 40]
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    plain = torch.arange(6).expand(2, 6)
    assert document_bounds(plain, mask, None).tolist() == [0, 6, 10, 12]


def test_auto_falls_back_to_what_runs_here() -> None:
    assert resolve_attention(Attention.auto, CPU) == "sdpa"
    assert resolve_attention(Attention.auto, CPU, softcap=True) == "eager"


@pytest.mark.parametrize(
    ("kind", "device", "options", "reason"),
    [
        (Attention.varlen, CPU, {}, "NVIDIA GPU"),
        (Attention.flash_attention_2, CPU, {}, "flash-attn is not installed|NVIDIA GPU"),
        (Attention.flex, CPU, {}, "backward"),
        (Attention.sdpa, CPU, {"softcap": True}, "softcap"),
    ],
)
def test_what_cannot_run_here_is_refused_with_the_reason(
    kind: Attention, device: torch.device, options: dict[str, bool], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        resolve_attention(kind, device, **options)


def test_a_family_is_refused_the_attention_it_cannot_use(tmp_path: Path) -> None:
    save_family("gemma2", tmp_path)
    config = ModelConfig(path=str(tmp_path), attention=Attention.sdpa)
    with pytest.raises(ConfigError, match=r"model\.attention=sdpa"):
        build_model(config, dtype=torch.float32, device=CPU)
    config.attention = Attention.auto
    model, _ = build_model(config, dtype=torch.float32, device=CPU)
    assert model.config._attn_implementation == "eager"
