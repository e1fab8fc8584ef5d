"""Progress on the terminal: a bar, or one line a step."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from dtune.runtime.logs import log
from dtune.runtime.schema import Progress
from dtune.train.sinks.base import Row


def wants_bar(progress: Progress) -> bool:
    """Whether progress is a bar: asked for, or standard error is a terminal."""
    return progress is Progress.bar or (progress is Progress.auto and sys.stderr.isatty())


class LineSink:
    """One line every few steps: step, loss, rate, norm, tokens/s, memory, time left."""

    def __init__(self, total_steps: int, every: int) -> None:
        self._total = total_steps
        self._every = every
        self._began = time.perf_counter()
        self._first_step: int | None = None

    def write(self, row: Row) -> None:
        """Log the row, if a line is due."""
        if row["kind"] != "train":
            log.info("%s", describe_other(row))
            if row["kind"] == "resume":
                # Steps come again: the pace is measured anew.
                self._first_step = None
            return
        step = int(row["step"])
        if self._first_step is None:
            self._first_step, self._began = step, time.perf_counter()
        if step % self._every == 0 or step == self._total:
            log.info("%s | left %s", describe_train(row, self._total), self._left(step))

    def _left(self, step: int) -> str:
        """Time to the last step at the pace since the first row; ``?`` at that row."""
        assert self._first_step is not None, "set by the first row"
        done = step - self._first_step
        if done == 0:
            return "?"
        seconds = (time.perf_counter() - self._began) / done
        return str(tqdm.format_interval(seconds * (self._total - step)))

    def close(self) -> None:
        """Nothing is held."""


class BarSink:
    """A progress bar that shows the newest row of training; other rows are printed above it."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        self._bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True)

    def write(self, row: Row) -> None:
        """Move the bar, or print above it."""
        if row["kind"] != "train":
            self._bar.write(describe_other(row), file=sys.stderr)
            return
        self._bar.n = int(row["step"])
        self._bar.set_postfix_str(
            f"loss {row['loss']:.4f} norm {row['grad_norm']:.3g} "
            f"{row['tokens_per_second']:,.0f} tokens/s"
        )

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


def describe_train(row: Row, total_steps: int) -> str:
    """A row of training as a line of text."""
    text = (
        f"step {row['step']}/{total_steps} | loss {row['loss']:.4f} | lr {row['lr']:.3g} | "
        f"norm {row['grad_norm']:.3g} | {row['tokens_per_second']:,.0f} tokens/s | "
        f"{row['peak_memory_gib']:.2f} GiB"
    )
    return f"{text} | MFU {row['mfu']:.1%}" if "mfu" in row else text


def describe_other(row: Row) -> str:
    """Any other row as a line of text."""
    numbers = [
        f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
        if name not in ("kind", "step")
    ]
    return " | ".join([f"{row['kind']} at step {row['step']}", *numbers])
