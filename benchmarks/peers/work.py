"""What every contestant does: the same weights, the same tokens, the same arithmetic."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict, dataclass
from pathlib import Path

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linears with an adapter: all of a Llama block."""


@dataclass(frozen=True)
class Work:
    """LoRA of seeded random weights on packed tokens; AdamW at a constant rate, no dropout."""

    model: str
    """Name of the shape, for reports."""
    folder: str
    """Holds ``checkpoint`` (Hugging Face layout), ``adapter`` (PEFT layout) and ``tokens.npy``."""
    rank: int
    alpha: int
    length: int
    """Token positions of a packed row."""
    documents: int
    """Documents of equal length in a packed row; attention stays inside each."""
    micro_batch: int
    """Packed rows of one forward pass."""
    accumulation: int
    """Forward passes of one optimizer step."""
    warmup_steps: int
    """Optimizer steps that are not timed; a compiler has finished before the last of them."""
    timed_steps: int
    device: str
    """cpu or cuda."""
    precision: str
    """fp32 or bf16; what is trained has fp32 masters."""
    threads: int
    """Of torch's operations on the CPU."""
    lr: float = 1e-3
    max_norm: float = 1.0

    @property
    def checkpoint(self) -> str:
        """Folder of the base model."""
        return str(Path(self.folder) / "checkpoint")

    @property
    def adapter(self) -> str:
        """Folder of the adapter that training begins with; its B is not zero."""
        return str(Path(self.folder) / "adapter")

    @property
    def tokens(self) -> str:
        """int64 [rows, length]: one fixed batch, which every optimizer step takes again."""
        return str(Path(self.folder) / "tokens.npy")

    @property
    def rows(self) -> int:
        """Packed rows of one optimizer step."""
        return self.micro_batch * self.accumulation

    @property
    def tokens_per_step(self) -> int:
        """Token positions of one optimizer step; none is padding."""
        return self.rows * self.length

    @property
    def total_steps(self) -> int:
        """Warm-up, timed steps, and one after them in which gradients are looked at."""
        return self.warmup_steps + self.timed_steps + 1


@dataclass(frozen=True)
class Setting:
    """How a contestant is set up; what the work leaves to it."""

    name: str
    recompute: bool = False
    """Activations of a block are computed again in backward."""
    best: bool = False
    """As its own documentation recommends for speed, instead of the same for all."""


PLAIN = Setting("plain")
RECOMPUTED = Setting("recompute", recompute=True)
BEST = Setting("best", best=True)


@dataclass(frozen=True)
class Entry:
    """One process: who, how, what."""

    peer: str
    setting: Setting
    work: Work

    @property
    def case(self) -> str:
        """Its name among the results of one contestant."""
        return f"{self.work.model} {self.setting.name}"

    def settings(self) -> dict[str, str | int | float | bool]:
        """Everything that decides the work; where its files lie does not."""
        work = {key: value for key, value in asdict(self.work).items() if key != "folder"}
        return {**work, "recompute": self.setting.recompute, "best": self.setting.best}

    def write(self, path: Path) -> None:
        """Write what ``read_entry`` reads."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def read_entry(path: Path) -> Entry:
    """Read what ``Entry.write`` wrote."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    return Entry(raw["peer"], Setting(**raw["setting"]), Work(**raw["work"]))


def missing(*packages: str) -> str:
    """Why a contestant cannot run whose packages are not all installed; empty where they are."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""
