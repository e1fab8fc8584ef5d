"""Experiment trackers: TensorBoard files and wandb runs."""

from __future__ import annotations

import secrets
from pathlib import Path

from dtune.runtime.schema import WandbMode
from dtune.train.sinks.base import Row

FINISH_SECONDS = 60.0
"""What a tracker's server has to take the rest of a run in."""


def numbers(row: Row) -> dict[str, float]:
    """Numeric entries of a row, named ``kind/entry``."""
    return {
        f"{row['kind']}/{name}": float(value)
        for name, value in row.items()
        if name not in ("kind", "step") and not isinstance(value, str)
    }


class TensorBoardSink:
    """TensorBoard event files in ``folder``."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A resumed run writes some steps anew: what stood there before is not shown any more.
        purge = start_step + 1 if start_step else None
        self._writer = SummaryWriter(str(folder), purge_step=purge)

    def write(self, row: Row) -> None:
        """Add each number as a scalar at the row's step."""
        for name, value in numbers(row).items():
            self._writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbSink:
    """A wandb run in ``folder``; a resumed run goes on under the same id."""

    def __init__(
        self, folder: Path, *, project: str, mode: WandbMode, config: dict[str, object]
    ) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        identity = folder / "run-id"
        if not identity.is_file():
            identity.write_text(secrets.token_hex(4), encoding="utf-8")
        self._run = wandb.init(
            project=project,
            dir=str(folder),
            id=identity.read_text(encoding="utf-8"),
            resume="allow",
            mode=mode.value,
            config=config,
            name=folder.parent.name,
            # What it does at the end of the process waits as well, without a limit otherwise.
            settings=wandb.Settings(finish_timeout=FINISH_SECONDS),
        )

        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, row: Row) -> None:
        """Log the numbers; ``step`` goes along as a value, since rows of one step may repeat."""
        self._run.log({**numbers(row), "step": int(row["step"])})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
