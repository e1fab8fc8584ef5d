"""Config of ``dtune bench``: the keys of a run, and how it is measured. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from dtune.config.run import RunConfig
from dtune.errors import ConfigError


class WeightsFrom(StrEnum):
    """Where the values of the base come from."""

    random = "random"
    model = "model"


@dataclass
class BenchConfig:
    """What a case is measured on, and for how long."""

    # Folder of the results: results.jsonl, table.md, plots, and a folder for each case.
    out: str = "runs/bench-${now:%Y%m%d-%H%M%S}"
    # random: drawn on the device in the shape of model.path, which needs its config.json alone;
    # model: read from its files.
    weights: WeightsFrom = WeightsFrom.random
    # Optimizer steps before the first timed one; more follow while something is still compiled.
    warm_up: int = 5
    # Timed optimizer steps.
    steps: int = 20
    # Times that every case runs, all cases in turn: A B C, A B C. Two show the noise between them.
    repeats: int = 2
    # Documents in each packed row of data.max_length tokens.
    documents: int = 2
    # Share of each row that is padding.
    padding: float = 0.0
    # Share of the tokens that are trained on: the end of each document.
    trained: float = 1.0
    # Optimizer steps within which the loss on the fixed batch must fall.
    falls_within: int = 50
    # Seconds for which the products of the model are timed alone; 0: the ceiling is not measured.
    ceiling_seconds: float = 2.0
    # Minutes after which a case is killed and reported as failed, and its training; 0: never.
    max_minutes: float = 0.0
    # Optimizer steps of training on data.path, scored on data.eval_path; 0: no scores.
    train_steps: int = 0
    # Learning rate by method, where optim.lr is not its own: {lora: 4e-3}.
    rates: dict[str, float] = field(default_factory=dict)
    # Draw tokens/s, memory and loss per method; null: where matplotlib is installed.
    plots: bool | None = None

    def __post_init__(self) -> None:
        least = {"warm_up": 1, "steps": 2, "repeats": 1, "documents": 1, "falls_within": 1}
        least |= {"ceiling_seconds": 0, "max_minutes": 0, "train_steps": 0}
        for key, at_least in least.items():
            value = vars(self)[key]
            if value < at_least:
                raise ConfigError(f"bench.{key}={value} must be at least {at_least}")
        if not 0 <= self.padding < 1:
            raise ConfigError(f"bench.padding={self.padding} must be in [0, 1)")
        if not 0 < self.trained <= 1:
            raise ConfigError(f"bench.trained={self.trained} must be in (0, 1]")
        for method, rate in self.rates.items():
            if rate <= 0:
                raise ConfigError(f"bench.rates.{method}={rate} must be above 0")


@dataclass
class BenchedRun(RunConfig):
    """The config of a run with that of its measurement."""

    bench: BenchConfig = field(default_factory=BenchConfig)
