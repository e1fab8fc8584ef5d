"""How far two models are apart on the same rows: logits and perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dtune.evaluate.mode import evaluating
from dtune.types import IGNORE_INDEX, Example

# Tokens of a row that are compared; logits of all rows are in memory at once.
LONGEST = 256

TEXT = (
    "The lighthouse keeper climbed the stairs every evening, lit the lamp, and wrote the weather "
    "into a thick book. In winter the storms came from the north-west and shook the windows; in "
    "summer the sea lay as flat as a table. When a ship passed, he noted its name, its course and "
    "the hour. Nobody had asked him to do so, yet after thirty years the book was the only record "
    "of what had happened on that coast, and people came from far away to read it."
)
"""What is compared where a run has no held-out rows."""


@dataclass(frozen=True)
class Difference:
    """One model against another."""

    largest: float
    """Largest absolute difference of two logits."""
    mean: float
    """Mean absolute difference of logits."""
    spread: float
    """Standard deviation of the reference's logits at a position."""
    perplexity: float
    reference_perplexity: float

    @property
    def relative_mean(self) -> float:
        """Mean difference in units of the spread."""
        return self.mean / self.spread

    @property
    def relative_largest(self) -> float:
        """Largest difference in units of the spread."""
        return self.largest / self.spread

    @property
    def perplexity_ratio(self) -> float:
        """The larger perplexity over the smaller; infinite where one is not finite."""
        pair = sorted((self.perplexity, self.reference_perplexity))
        return pair[1] / pair[0] if all(map(math.isfinite, pair)) else math.inf


@dataclass(frozen=True)
class Bounds:
    """What a difference may be at most, in its units."""

    mean: float
    largest: float
    perplexity_ratio: float

    @classmethod
    def of_rounding(
        cls,
        dtypes: Sequence[torch.dtype],
        *,
        num_layers: int,
        width: int,
        perplexity_ratio: float,
    ) -> Bounds:
        """Twice what rounding to the coarsest of the dtypes explains.

        The relative error of one rounding is spread evenly over eps, so that its root mean square
        is eps / sqrt(12). A block rounds the residual stream about eight times (two norms, four
        products, two sums), and the errors of L blocks add up like a random walk, to sqrt(8 L) of
        them. Sums of ``width`` products are kept in fp32 in any dtype, and add its rounding
        sqrt(width) times. The largest of millions of normal differences lies below 8 times their
        mean; twice that leaves room for tails.
        """
        coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
        single = torch.finfo(torch.float32).eps * math.sqrt(width)
        mean = 2 * (coarsest + single) / math.sqrt(12) * math.sqrt(8 * num_layers)
        return cls(mean, 16 * mean, perplexity_ratio)

    def broken_by(self, found: Difference) -> list[str]:
        """Which bounds the difference breaks, in words. NaN breaks all."""
        checks = (
            ("mean difference of logits", found.relative_mean, self.mean),
            ("largest difference of logits", found.relative_largest, self.largest),
            ("ratio of perplexities", found.perplexity_ratio, self.perplexity_ratio),
        )
        return [
            f"{what} {value:.3g} is above {bound:.3g}"
            for what, value, bound in checks
            if not value <= bound
        ]


def cut_examples(examples: Sequence[Example]) -> list[Example]:
    """Rows of at most ``LONGEST`` tokens; where nothing of them is trained on, all of it counts."""
    cut = [
        Example(one.row, one.input_ids[:LONGEST], one.labels[:LONGEST])
        for one in examples
        if len(one.input_ids) > 1
    ]
    if any(one.num_targets for one in cut):
        return cut
    return [Example(one.row, one.input_ids, list(one.input_ids)) for one in cut]


def logits_of(
    model: nn.Module,
    examples: Sequence[Example],
    device: torch.device,
    compute: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> list[torch.Tensor]:
    """Logits of each row alone: fp32 [S, V] on the CPU."""
    found = []
    owner: Any = model
    with compute(), evaluating(model):
        for example in examples:
            ids = torch.tensor([example.input_ids], device=device)
            found.append(owner(input_ids=ids, use_cache=False).logits[0].float().cpu())
    return found


def compare_logits(
    examples: Sequence[Example], reference: Sequence[torch.Tensor], found: Sequence[torch.Tensor]
) -> Difference:
    """Compare what ``logits_of`` gave for two models on the same rows."""
    gaps = [(one - other).abs() for one, other in zip(found, reference, strict=True)]
    count = sum(gap.numel() for gap in gaps)
    variances = torch.cat([logits.double().var(dim=-1) for logits in reference])
    return Difference(
        # Not max(): of a NaN it would make nothing.
        largest=float(torch.stack([gap.max() for gap in gaps]).max()),
        mean=float(sum(gap.double().sum() for gap in gaps)) / count,
        spread=float(variances.mean().sqrt()),
        perplexity=_perplexity(examples, found),
        reference_perplexity=_perplexity(examples, reference),
    )


def _perplexity(examples: Sequence[Example], logits: Sequence[torch.Tensor]) -> float:
    total, count = 0.0, 0
    for example, logits_SV in zip(examples, logits, strict=True):
        targets = torch.tensor(example.labels[1:])
        total += float(
            F.cross_entropy(
                logits_SV[:-1].double(), targets, ignore_index=IGNORE_INDEX, reduction="sum"
            )
        )
        count += int((targets != IGNORE_INDEX).sum())
    return math.exp(min(total / count, 700.0)) if math.isfinite(total) else math.nan
