"""Masks are those that transformers makes for the same rows, for every family and its options."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from dtune.models.masks import CAUSAL, TYPED, WINDOWED, causal_masks
from dtune.objectives.causal import causal_loss
from tests.distributed.training import make_batch
from tests.unit.families import FAMILIES, family_config
from tests.unit.patched import adapted

LENGTH = 20
PLAIN = torch.arange(LENGTH).expand(3, LENGTH)
DOCUMENTS = ((7, 9, 4), (20,), (1, 1, 18))

WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("mistral", {"sliding_window": None}),
    ("phi3", {"sliding_window": 5}),
    ("phi3", {"sliding_window": 1}),
    ("qwen2", WINDOW),
    ("qwen3", WINDOW),
    ("qwen2", {"sliding_window": 4}),
    ("gemma3", {"sliding_window": 19}),
    ("gemma3", {"sliding_window": 20}),
    ("gemma3", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    # Keys that a family's layers do not read.
    ("llama", {"sliding_window": 5}),
    ("granite", {"sliding_window": 5}),
    ("llama", {"layer_types": ["full_attention"] * 2}),
]


def rows(kind: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Position ids and mask of three rows."""
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    if kind == "packed":
        packed = [torch.cat([torch.arange(n) for n in lengths]) for lengths in DOCUMENTS]
        return torch.stack(packed), None
    if kind == "single":
        return PLAIN, None
    if kind == "right":
        mask[1, 13:] = 0
    if kind == "left":
        mask[1, :6], mask[2, :19] = 0, 0
    if kind == "empty row":
        mask[2] = 0
    return PLAIN, mask


def expected(
    config: PretrainedConfig, positions: torch.Tensor, mask: torch.Tensor | None
) -> dict[str, Any]:
    """Masks of transformers, made as each family's model makes them."""
    given: Any = {
        "config": config,
        "inputs_embeds": torch.zeros(*positions.shape, 1),
        "attention_mask": mask,
        "past_key_values": None,
        "position_ids": positions,
    }
    own: Any = config
    kinds = own.layer_types if config.model_type in TYPED else ["one"]
    made = {}
    for kind in kinds:
        windowed = kind == "sliding_attention"
        if config.model_type in WINDOWED:
            windowed = own.sliding_window is not None
        make = create_sliding_window_causal_mask if windowed else create_causal_mask
        made[kind] = make(**given)
    return made


def seen(mask: torch.Tensor | None) -> torch.Tensor:
    """Which positions each position sees: bool [3, S, S]; without a mask it is causal."""
    if mask is None:
        mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    mask = mask if mask.dtype == torch.bool else mask == 0
    return mask.expand(3, 1, LENGTH, LENGTH)[:, 0]


@pytest.mark.parametrize("kind", ["packed", "single", "full", "right", "left", "empty row"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=str)
def test_masks_are_those_of_transformers(
    family: str, changes: dict[str, Any], implementation: str, kind: str
) -> None:
    config = family_config(family, **changes)
    config._attn_implementation = implementation
    positions, mask = rows(kind)
    additive = torch.float32 if implementation == "eager" else None
    made = causal_masks(config, positions, mask, additive)
    ours = made if isinstance(made, dict) else {"one": made}
    theirs = expected(config, positions, mask)
    assert ours.keys() == theirs.keys()
    tokens = torch.ones(3, LENGTH).bool() if mask is None else mask.bool()
    for name in theirs:
        # What padding sees is of no consequence, but it must see something.
        assert torch.equal(seen(ours[name])[tokens], seen(theirs[name])[tokens])
        assert seen(ours[name]).any(-1).all()


def test_families_of_masks_do_not_overlap() -> None:
    assert len(CAUSAL | WINDOWED | TYPED) == len(FAMILIES)


def test_a_model_that_sees_ahead_is_left_to_transformers() -> None:
    config = family_config("gemma3", use_bidirectional_attention=True)
    assert causal_masks(config, *rows("single"), None) is None


@pytest.mark.parametrize("packed", [False, True])
def test_rows_of_one_document_need_no_mask_on_a_cpu(packed: bool) -> None:
    """torch then computes half of the scores, and keeps no mask in fp32 for each layer."""
    model, _ = adapted("llama", attention="sdpa")
    batch = make_batch(1, 0, packed=packed)
    if not packed:
        batch = replace(batch, attention_mask=None, num_documents=-1)
    got = []
    model.get_submodule("model.layers.0.self_attn").register_forward_pre_hook(
        lambda module, args, kwargs: got.append(kwargs["attention_mask"]), with_kwargs=True
    )
    causal_loss(model, batch)
    assert [mask is not None for mask in got] == [packed]
