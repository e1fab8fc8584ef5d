"""Steps of large models on many GPUs by the model of ``dtune plan``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.config.run import RunConfig
from dtune.config.support import choices, find_illegal
from dtune.parallel.schema import PARALLEL, ParallelConfig, engines
from dtune.parallel.schema.fsdp import FsdpConfig
from dtune.plan.cards import find_card
from dtune.plan.run import Planner, RunPlan
from dtune.plan.solve import RECOMPUTE

CARD = "h200"
PER_NODE = 8
GPUS = (8, 64, 1024)
ROWS = 2
"""Sequences of the one micro batch that a GPU has in a step."""
LENGTH = 4096


@dataclass(frozen=True)
class Work:
    """A model and a method."""

    name: str
    settings: tuple[str, ...]


WORKS = (
    Work("8B LoRA", ("experiment=llama3_8b",)),
    Work("8B full", ("experiment=llama3_8b", "peft=full")),
    Work("70B QLoRA", ("experiment=llama3_70b", "quant=nf4")),
    Work("70B full", ("experiment=llama3_70b", "peft=full")),
)


@dataclass(frozen=True)
class Prediction:
    """A step under one engine, with the least recomputation that fits."""

    work: str
    gpus: int
    engine: str
    """Setting of the group, with its options."""
    recompute: str
    fits: bool
    memory: int
    """Bytes of the fullest GPU, high."""
    sent: int
    """Bytes that a GPU sends in a step."""
    between_nodes: int
    """Of those, what leaves the node."""
    passes: float
    """Seconds of forward and backward passes."""
    optimizer: float
    """Seconds of the optimizer's own work."""
    sending: float
    """Seconds of all collectives."""
    beside: float
    """Seconds of those that run beside passes."""
    exposed: float
    """Seconds of them that nothing runs beside."""

    @property
    def step(self) -> float:
        """Seconds."""
        return self.passes + self.optimizer + self.exposed

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU."""
        return ROWS * LENGTH / self.step

    @property
    def hiding(self) -> float:
        """Tokens of a GPU in a step whose passes take as long as what is sent beside them."""
        return ROWS * LENGTH * self.beside / self.passes


def settings_of(work: Work, gpus: int) -> list[str]:
    """As a user would give them to ``dtune plan``, but for the engine and the recomputation."""
    return [
        *work.settings,
        "precision=bf16",
        "data.path=chats.jsonl",
        f"data.max_length={LENGTH}",
        f"train.micro_batch_size={ROWS}",
        f"train.global_batch_size={ROWS * gpus}",
    ]


def ways(gpus: int) -> Iterator[tuple[str, ParallelConfig]]:
    """Engines for so many GPUs, each with what a user would write for it."""
    for name in engines():
        if name == "single":
            continue
        yield f"parallel={name}", PARALLEL.config(name)()
        if name == "fsdp" and gpus > PER_NODE:
            inside = FsdpConfig(shard_size=PER_NODE)
            yield f"parallel=fsdp parallel.shard_size={PER_NODE}", inside


def predict(work: Work, gpus: int) -> Iterator[Prediction]:
    """Every engine on so many GPUs."""
    run = load_frozen(compose_overrides("train", settings_of(work, gpus)))
    planner = Planner(run, gpus, find_card(CARD), per_node=PER_NODE)
    for shown, parallel in ways(gpus):
        chosen = _least_recompute(planner, parallel)
        yield _prediction(work, gpus, shown, chosen, planner.plan(chosen))


def _least_recompute(planner: Planner, parallel: ParallelConfig) -> RunConfig:
    """The first level that fits, or the last where none does."""
    run = planner.run
    levels = [
        replace(run, parallel=parallel, train=replace(run.train, recompute=level))
        for level in RECOMPUTE
    ]
    legal = [one for one in levels if find_illegal(choices(one)) is None]
    fitting = (one for one in legal if planner.memory(one).high <= find_card(CARD).memory)
    return next(fitting, legal[-1])


def _prediction(work: Work, gpus: int, shown: str, run: RunConfig, plan: RunPlan) -> Prediction:
    times = plan.times
    assert times is not None
    return Prediction(
        work=work.name,
        gpus=gpus,
        engine=shown,
        recompute=run.train.recompute.value,
        fits=bool(plan.fits),
        memory=plan.memory.high,
        sent=sum(one.collective.sent for one in plan.sent),
        between_nodes=sum(one.between_nodes for one in plan.sent),
        passes=times.passes,
        optimizer=times.optimizer,
        sending=sum(one.seconds for one in plan.sent),
        beside=sum(one.seconds for one in plan.sent if one.collective.overlaps),
        exposed=times.exposed,
    )


def as_json(predictions: list[Prediction]) -> list[dict[str, Any]]:
    """Rows of the result."""
    return [asdict(one) for one in predictions]
