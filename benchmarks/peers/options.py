"""Settings of the comparison, written ``key=value``."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.contestants import MODULES
from benchmarks.peers.inputs import SHAPES
from benchmarks.peers.work import BEST, PLAIN, RECOMPUTED, Setting, Work
from dtune.errors import ConfigError

DEFAULT_LENGTH = {"cpu": 512, "cuda": 4096}
"""Positions of a packed row, by the device."""
SETTINGS = {setting.name: setting for setting in (PLAIN, RECOMPUTED, BEST)}


@dataclass(frozen=True)
class Options:
    """What is compared, on what, how often."""

    # Shapes, separated by commas: tiny, random50m, llama1b, llama8b.
    model: str = "tiny"
    # Contestants, separated by commas; dtune always takes part.
    peers: str = ",".join(MODULES)
    # plain: nothing computed again; recompute: blocks computed again; best: as each advises.
    settings: str = ",".join(SETTINGS)
    # Times that each contestant runs, in turn: A B C, A B C.
    rounds: int = 3
    # File of the results, JSON lines; the table goes beside it, with the ending .md.
    out: str = "peers.jsonl"
    # cpu or cuda; auto: cuda where there is one.
    device: str = "auto"
    # fp32 or bf16; auto: bf16 on cuda, fp32 on a CPU.
    precision: str = "auto"
    # Threads of torch on the CPU; 0: as many as there are cores.
    threads: int = 0
    # Rank of the adapter of all linears; its scale is alpha / rank.
    rank: int = 16
    alpha: int = 32
    # Positions of a packed row; 0: 512 on a CPU, 4096 on cuda.
    length: int = 0
    # Documents of equal length in a packed row.
    documents: int = 1
    # Packed rows of a forward pass, and forward passes of an optimizer step.
    micro_batch: int = 2
    accumulation: int = 1
    # Optimizer steps before the timed ones, and timed ones.
    warmup: int = 5
    steps: int = 20
    # Minutes after which a run is given up.
    minutes: float = 30.0

    def __post_init__(self) -> None:
        _check_names("model", self.model, list(SHAPES))
        _check_names("peers", self.peers, list(MODULES))
        _check_names("settings", self.settings, list(SETTINGS))
        _check_names("device", self.device, ["auto", "cpu", "cuda"])
        _check_names("precision", self.precision, ["auto", "fp32", "bf16"])
        if not self.out.endswith(".jsonl"):
            raise ConfigError(
                f"out={self.out} is no name of a file of JSON lines; end it in .jsonl"
            )
        zero = {"threads", "length"}
        for field in dataclasses.fields(self):
            value, least = vars(self)[field.name], 0 if field.name in zero else 1
            if not isinstance(value, str) and value < least:
                raise ConfigError(f"{field.name}={value} must be at least {least}")
        # Both defaults are multiples of the shorter one.
        length = self.length or DEFAULT_LENGTH["cpu"]
        if length % self.documents:
            raise ConfigError(
                f"length={length} cannot be split into documents={self.documents} of one "
                "length; choose a divisor"
            )

    def work(self, model: str, folder: Path, *, has_gpu: bool) -> Work:
        """The work on one shape, whose files lie in ``folder``."""
        device = ("cuda" if has_gpu else "cpu") if self.device == "auto" else self.device
        on_cpu = device == "cpu"
        precision = self.precision
        if precision == "auto":
            precision = "fp32" if on_cpu else "bf16"
        return Work(
            model=model,
            folder=str(folder),
            rank=self.rank,
            alpha=self.alpha,
            length=self.length or DEFAULT_LENGTH[device],
            documents=self.documents,
            micro_batch=self.micro_batch,
            accumulation=self.accumulation,
            warmup_steps=self.warmup,
            timed_steps=self.steps,
            device=device,
            precision=precision,
            threads=self.threads or len(os.sched_getaffinity(0)),
        )

    @property
    def contestants(self) -> list[str]:
        """dtune first, then the others in the order of the table."""
        asked = {"dtune", *split(self.peers)}
        return [name for name in MODULES if name in asked]

    @property
    def chosen_settings(self) -> list[Setting]:
        """In the order of the table."""
        return [setting for name, setting in SETTINGS.items() if name in split(self.settings)]


def split(text: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def parse(arguments: Sequence[str]) -> Options:
    """Options from ``key=value``; ConfigError names the key that is wrong."""
    kinds = {field.name: type(field.default) for field in dataclasses.fields(Options)}
    given: dict[str, str | int | float] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument}: settings are written key=value")
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(kinds)}"
            raise ConfigError(f"unknown key {key}{hint}")
        try:
            given[key] = kinds[key](value)
        except ValueError as error:
            raise ConfigError(f"{argument}: {value!r} is no {kinds[key].__name__}") from error
    return Options(**given)  # type: ignore[arg-type]


def _check_names(key: str, text: str, known: list[str]) -> None:
    names = split(text)
    if not names:
        raise ConfigError(f"{key} is empty; it takes {', '.join(known)}")
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{key}={name} is not one of {', '.join(known)}{hint}")
