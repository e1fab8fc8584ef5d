"""What happened to the rows on their way to tokens: nothing is cut or dropped uncounted."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np

EXAMPLES = 10
_SHOWN = 5
_PERCENTILES = (5, 50, 95, 100)


@dataclass
class Dropped:
    """Rows left out for one reason."""

    rows: int = 0
    tokens: int = 0
    examples: list[str] = field(default_factory=list)
    """What was wrong with the first of them."""

    def add(self, message: str, tokens: int = 0) -> None:
        """Count one row."""
        self.rows += 1
        self.tokens += tokens
        if len(self.examples) < EXAMPLES:
            self.examples.append(message)


@dataclass
class DataReport:
    """Counts of one data set. Rows read = kept + bad + untrained + long."""

    rows_read: int = 0
    rows_kept: int = 0
    tokens: int = 0
    """Of kept rows."""
    trained_tokens: int = 0
    """Tokens that are predicted in training."""
    bad: Dropped = field(default_factory=Dropped)
    untrained: Dropped = field(default_factory=Dropped)
    """Rows without any token to train on."""
    long: Dropped = field(default_factory=Dropped)
    """Rows above data.max_length that were left out; tokens are those of the whole rows."""
    cut: Dropped = field(default_factory=Dropped)
    """Rows cut to data.max_length, which are kept; tokens are those cut away."""
    length_percentiles: dict[str, int] = field(default_factory=dict)
    """Tokens of a kept row; 100 is the longest."""

    @property
    def trained_share(self) -> float:
        """Share of the kept tokens that are predicted in training."""
        return self.trained_tokens / self.tokens if self.tokens else 0.0

    @property
    def rows_bad(self) -> int:
        """Rows that data.on_bad_row=skip has left out."""
        return self.bad.rows + self.untrained.rows

    def count_lengths(self, lengths: array[int]) -> None:
        """Set the percentiles."""
        found = np.percentile(np.asarray(lengths), _PERCENTILES, method="nearest")
        self.length_percentiles = {
            str(at): int(length) for at, length in zip(_PERCENTILES, found, strict=True)
        }

    def lines(self) -> list[str]:
        """Describe it for people, one fact a line."""
        lengths = "/".join(str(length) for length in self.length_percentiles.values())
        lines = [
            f"{self.rows_kept} of {self.rows_read} rows, {self.tokens} tokens, "
            f"{self.trained_tokens} trained ({self.trained_share:.1%}); "
            f"row length 5/50/95/100 %: {lengths}"
        ]
        drops = (
            (self.bad, "malformed rows left out"),
            (self.untrained, "rows without a trained token left out"),
            (self.long, f"rows above data.max_length left out ({self.long.tokens} tokens)"),
            (self.cut, f"rows cut to data.max_length ({self.cut.tokens} tokens cut away)"),
        )
        for dropped, what in drops:
            if dropped.rows:
                first = "; ".join(dropped.examples[:_SHOWN])
                lines.append(f"{dropped.rows} {what}, first: {first}")
        return lines
