"""What one measured case came to, as a line of JSON: of dtune, or of another framework.

Reads no torch, so that files of results are compared and drawn wherever they are.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from dtune.errors import ConfigError

SCHEMA = 1
"""Version of the form below; a file of another one is not read."""

GIB = 1024**3

Setting = str | int | float | bool


class Status(StrEnum):
    """How a case ended."""

    ok = "ok"
    oom = "oom"
    refused = "refused"
    failed = "failed"


@dataclass(frozen=True)
class Origin:
    """Where, with what and by which command a case was measured."""

    command: tuple[str, ...]
    started: str
    """ISO 8601 with the offset to UTC."""
    commit: str
    """Of the code that was measured; empty outside a repository."""
    hardware: Mapping[str, str]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Measured:
    """The numbers of a case that passed its gates; times are in seconds.

    What could not be had is None, and ``CaseResult.notes`` says why.
    """

    step_seconds: tuple[float, ...]
    """Every timed optimizer step, of the slowest rank."""
    slots_per_step: int
    """Positions computed in a step by all ranks, padding included."""
    tokens_per_step: int
    """Of them those that are not padding."""
    targets_per_step: int
    """Of them those that are trained on."""
    devices: int
    median_seconds: float
    p10_seconds: float
    p90_seconds: float
    tokens_per_second: float
    """Tokens that are not padding, of all devices, by the median step."""
    flops_per_token: float | None
    flops_formula: str
    peak_flops: float | None
    """Of one device by its data sheet in FLOP/s."""
    ceiling_flops: float | None
    """Of one device in FLOP/s, measured in the same process on the products of the model."""
    warm_up_seconds: float
    """All untimed steps before the first timed one, compilation included."""
    first_step_seconds: float
    load_seconds: float
    """From the config to a model that is ready to train."""
    peak_allocated_bytes: int | None
    """Of the fullest device, from the build of the model to the last timed step."""
    peak_reserved_bytes: int | None
    peak_rss_bytes: int | None
    """Of the fullest process, from the build of the model to the last timed step."""
    base_rss_bytes: int | None
    """Of that process before the model was built: the interpreter and its libraries."""
    planned_bytes: int | None
    """What `dtune plan` says that the fullest device holds, most likely."""
    launches_per_step: int | None
    launches_of: str
    """What was counted: kernels of the device, or operations dispatched."""
    joules_per_step: float | None
    """Of all devices of this machine, by NVML."""
    loss_first: float
    """On the fixed batch, before the first step."""
    loss_last: float
    """On the same batch, at the last step."""
    loss_curve: tuple[float, ...]
    """On the same batch at every step, warm-up included."""
    parameters: int | None = None
    """Of the model with its method."""
    trained_parameters: int | None = None
    counted_bytes: int | None = None
    """Of the process that has most, on a CPU: tensors at the peak of a step, counted in one that
    is not timed."""

    @property
    def tokens_per_second_per_device(self) -> float:
        """Tokens that are not padding."""
        return self.tokens_per_second / self.devices

    @property
    def slots_per_second(self) -> float:
        """All positions computed, padding included."""
        return self.slots_per_step / self.median_seconds

    @property
    def targets_per_second(self) -> float:
        """Tokens that are trained on."""
        return self.targets_per_step / self.median_seconds

    @property
    def mfu(self) -> float | None:
        """Share of the data sheet's peak."""
        return self._share_of(self.peak_flops)

    @property
    def share_of_ceiling(self) -> float | None:
        """Share of what the same products reach alone."""
        return self._share_of(self.ceiling_flops)

    def _share_of(self, flops: float | None) -> float | None:
        if flops is None or self.flops_per_token is None:
            return None
        return self.tokens_per_second_per_device * self.flops_per_token / flops

    @property
    def peak_bytes(self) -> int | None:
        """Of the device where it has memory of its own, else of the process."""
        own = self.peak_allocated_bytes
        return self.peak_rss_bytes if own is None else own

    @property
    def tensor_bytes(self) -> int | None:
        """Tensors at the peak, without the libraries of the process."""
        own = self.peak_allocated_bytes
        return self.counted_bytes if own is None else own

    @property
    def plan_error(self) -> float | None:
        """How far the plan was off, as a share of what was measured; above 0: planned too much.

        Measured is what torch allocated on a GPU, and the tensors of a step on a CPU.
        """
        own = self.tensor_bytes
        if self.planned_bytes is None or not own:
            return None
        return self.planned_bytes / own - 1


@dataclass(frozen=True)
class Score:
    """What a method learnt on real data, in as many steps as every other."""

    steps: int
    tokens: int
    """Trained on, padding not counted."""
    held_out: Mapping[str, float]
    """Metrics of held-out rows, as `dtune eval` names them."""
    losses: tuple[tuple[int, float], ...]
    """Step and training loss."""


@dataclass(frozen=True)
class CaseResult:
    """One case, measured or not. There are no numbers of a case that is not ok."""

    framework: str
    """dtune, hf-trainer, ..."""
    case: str
    """What tells it from the others of its file, such as ``peft=lora``."""
    settings: Mapping[str, Setting]
    """Everything that decides the work: cases with equal settings may be compared."""
    status: Status
    origin: Origin
    reason: str = ""
    """Why it is not ok."""
    repeat: int = 0
    """Which of several runs of the same case."""
    measured: Measured | None = None
    score: Score | None = None
    notes: tuple[str, ...] = field(default=())
    """Why a number is missing, and what else a reader must know."""
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        assert (self.measured is not None) == (self.status is Status.ok), self.status
        assert bool(self.reason) == (self.status is not Status.ok), self.status


def write_jsonl(results: Iterable[CaseResult], path: Path, *, append: bool = False) -> None:
    """Write results as lines of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a" if append else "w", encoding="utf-8") as file:
        file.writelines(to_json(result) + "\n" for result in results)


def to_json(result: CaseResult) -> str:
    """A result as one line; NaN and infinity, which JSON has not, are refused."""
    return json.dumps(dataclasses.asdict(result), ensure_ascii=False, allow_nan=False)


def read_jsonl(path: Path) -> list[CaseResult]:
    """The results of a file, in its order.

    Raises:
        ConfigError: There is no such file, it holds none, or a line is no result of this form.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file of results")
    results = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            results.append(from_json(line))
        except (ValueError, TypeError, KeyError, AssertionError) as error:
            raise ConfigError(f"{path}:{number} is no result of dtune bench: {error!r}") from error
    if not results:
        raise ConfigError(f"{path} holds no results")
    return results


def from_json(line: str) -> CaseResult:
    """The result of one line."""
    raw: dict[str, Any] = json.loads(line)
    if raw["schema"] != SCHEMA:
        raise ValueError(f"it has form {raw['schema']}, and this is dtune with form {SCHEMA}")
    measured, score = raw["measured"], raw["score"]
    return CaseResult(
        **{
            **raw,
            "status": Status(raw["status"]),
            "origin": Origin(**_with_tuples(raw["origin"], "command")),
            "measured": measured and Measured(**_with_tuples(measured, *_LISTS)),
            "score": score and Score(**{**score, "losses": tuple(map(tuple, score["losses"]))}),
            "notes": tuple(raw["notes"]),
        }
    )


_LISTS = ("step_seconds", "loss_curve")


def _with_tuples(raw: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {**raw, **{name: tuple(raw[name]) for name in names}}


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which this share of the values lies, between two of them by a line."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
