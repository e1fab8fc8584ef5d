"""Where documents lie in a batch, and masks from it, made without the host waiting for the device.

Shape legend: B rows, S positions of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

CAUSAL = frozenset({"llama", "granite"})
"""``model_type`` of models whose layers have one mask, and never a window."""
WINDOWED = frozenset({"mistral", "phi3"})
"""Of models whose layers have one mask, with a window where the config has one."""
TYPED = frozenset({"qwen2", "qwen3", "gemma2", "gemma3_text"})
"""Of models that take a mask for each of their layer types."""

Masks = torch.Tensor | dict[str, torch.Tensor]


def document_starts(
    position_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """Return whether a document starts at each position: bool [B, S].

    A document starts with every row, wherever positions do not go on by one, and where padding
    begins or ends.
    """
    starts_BS = torch.ones_like(position_ids, dtype=torch.bool)
    starts_BS[:, 1:] = position_ids.diff(dim=1) != 1
    if attention_mask is not None:
        starts_BS[:, 1:] |= attention_mask.diff(dim=1) != 0
    return starts_BS


def document_bounds(
    position_ids: torch.Tensor, attention_mask: torch.Tensor | None, num_documents: int | None
) -> torch.Tensor:
    """Return where documents start in the flattened batch, and its length: int32 [documents + 1].

    Their number is a shape; where the host does not give it, it waits for the device once.
    """
    starts = document_starts(position_ids, attention_mask).flatten()
    if num_documents is None:
        found = starts.nonzero().flatten()
    else:
        # A stable sort puts the starts first, in order.
        found = torch.argsort((~starts).to(torch.uint8), stable=True)[:num_documents]
    return nn.functional.pad(found, (0, 1), value=position_ids.numel()).to(torch.int32)


def causal_masks(
    config: PretrainedConfig,
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    additive: torch.dtype | None,
    *,
    prefix: int = 0,
) -> Masks | None:
    """Return masks by which a position sees its own document up to itself; None if not known how.

    [B, 1, S, S], for models with layers of several types one by the name of each. Bool, or numbers
    to add in the dtype ``additive``. Padding sees padding, so that no position sees nothing.
    Every document sees ``prefix`` keys before its own, after which its positions begin:
    [B, 1, S, prefix + S].
    """
    family = config.model_type
    if family not in CAUSAL | WINDOWED | TYPED or sees_ahead(config):
        return None
    documents_BS = document_starts(position_ids, attention_mask).cumsum(1)
    causal_SS = torch.ones(
        (documents_BS.shape[1],) * 2, dtype=torch.bool, device=position_ids.device
    ).tril()
    own_BSS = (documents_BS[:, :, None] == documents_BS[:, None, :]) & causal_SS

    def finish(window: int | None) -> torch.Tensor:
        seen = own_BSS if window is None else own_BSS & causal_SS.triu(1 - window)
        if prefix:
            seen = torch.cat([_sees_prefix(position_ids, prefix, window), seen], dim=2)
        if additive is None:
            return seen[:, None]
        lowest = torch.finfo(additive).min
        return torch.zeros_like(seen, dtype=additive).masked_fill_(~seen, lowest)[:, None]

    # Only what the family reads: a Llama's config may hold a window that its layers ignore.
    own: Any = config
    if family in TYPED:
        windows = {"full_attention": None, "sliding_attention": own.sliding_window}
        return {kind: finish(windows[kind]) for kind in dict.fromkeys(own.layer_types)}
    return finish(own.sliding_window if family in WINDOWED else None)


def _sees_prefix(position_ids: torch.Tensor, prefix: int, window: int | None) -> torch.Tensor:
    """Which keys before its document a position sees: bool [B, S, prefix]."""
    distance = position_ids[:, :, None] - torch.arange(prefix, device=position_ids.device)
    return torch.ones_like(distance, dtype=torch.bool) if window is None else distance < window


def sees_ahead(config: PretrainedConfig) -> bool:
    """Whether a position of the model sees those after it, as in an encoder made of Gemma 3."""
    return bool(vars(config).get("use_bidirectional_attention"))
