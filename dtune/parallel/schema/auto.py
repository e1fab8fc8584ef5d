"""Whichever engine fits."""

from __future__ import annotations

from dataclasses import dataclass

from dtune.parallel.schema import AUTO, PARALLEL, ParallelConfig


@PARALLEL.register
@dataclass
class AutoConfig(ParallelConfig):
    """One process: single; several: ddp where everything fits on every rank, else fsdp."""

    name: str = AUTO
