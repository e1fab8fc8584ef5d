"""The loss that next-token objectives share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dtune.types import (
    IGNORE_INDEX,
    LOSS_LABELS,
    NUM_DOCUMENTS,
    NUM_TARGETS,
    Batch,
    FusesLoss,
    LossParts,
    innermost,
)


def causal_loss(model: nn.Module, batch: Batch) -> LossParts:
    """Sum, in fp32, of the cross entropies of all targets of a batch.

    A label is predicted by the position before it. The first token of a document has none, so
    that nothing is predicted across documents. Without targets the sum is 0 and its backward
    still reaches every parameter, with gradients of 0: ranks stay in step.
    """
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "position_ids": batch.position_ids,
        "use_cache": False,
        NUM_DOCUMENTS: batch.num_documents,
    }
    if isinstance(innermost(model), FusesLoss):
        # No label is the first of a row's, so that the shift over the end of a row brings none.
        targets_BS = batch.labels.flatten().roll(-1).view_as(batch.labels)
        asked = {LOSS_LABELS: targets_BS, NUM_TARGETS: batch.num_targets}
        return LossParts(total=model(**inputs, **asked).loss)
    logits_NV = model(**inputs).logits.flatten(0, 1)  # N = B * S
    labels_N = batch.labels.flatten()
    if _reads_all(logits_NV, batch.num_targets):
        # Nothing is copied out. No label is the first of a row's: see above.
        total = F.cross_entropy(
            logits_NV.float(), labels_N.roll(-1), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        return LossParts(total=total)
    # A stable sort puts the targets first. Their number is known on the host, so that, other than
    # a boolean mask, it makes the host wait for nothing.
    order_N = torch.argsort((labels_N == IGNORE_INDEX).to(torch.uint8), stable=True)
    targets_T = order_N[: batch.num_targets]
    predicted_TV = logits_NV.index_select(0, targets_T - 1)
    total = F.cross_entropy(predicted_TV.float(), labels_N[targets_T], reduction="sum")
    return LossParts(total=total)


def _reads_all(logits_NV: torch.Tensor, num_targets: int) -> bool:
    """Whether the losses of all positions move fewer bytes than to take out those of the targets.

    Over forward and backward, a logit: 36 bytes in bf16 and 24 in fp32, where all N positions are
    read; where T are taken out, 46 and 44 for each of those, and 2 and 4 for each of all. Equal at
    T = 0.74 N and 0.45 N.
    """
    least = 0.45 if logits_NV.dtype == torch.float32 else 0.74
    return num_targets >= least * len(logits_NV)
