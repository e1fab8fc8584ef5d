"""``dtune plan``: what a run would do, without loading weights, and which settings would fit."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from dtune_launch.gpus import resolve_nproc

from dtune.commands.own import Command, split_settings
from dtune.config.compose import compose
from dtune.config.freeze import load_frozen
from dtune.config.planning import Find, PlanSettings
from dtune.config.run import RunConfig
from dtune.config.support import accumulation_steps, check_run
from dtune.errors import ConfigError
from dtune.plan.cards import choose_card, limit_of

if TYPE_CHECKING:
    from dtune.build import BuiltModel
    from dtune.measure.cards import Card
    from dtune.plan.run import Content, Planner
    from dtune.types import Batch

Rows = list[tuple[str, str]]

COMMAND = Command(
    name="dtune plan",
    usage="dtune plan [settings]: memory, work, traffic and time of a run, without a GPU.",
    own=PlanSettings,
    unused=frozenset(),
    why_unused="",
    examples="""  dtune plan experiment=llama3_8b data.path=my.jsonl card=h200 gpus=8
  dtune plan experiment=llama3_70b card=h200 gpus=1024 train.global_batch_size=1024
  dtune plan experiment=llama3_8b card=4090 quant=nf4 find=max_length""",
)


@dataclass(frozen=True)
class Cluster:
    """The processes of a run, which are simulated."""

    ranks: int
    per_node: int

    def __str__(self) -> str:
        nodes = -(-self.ranks // self.per_node)
        return f"{self.ranks} on {nodes} node{'s' * (nodes > 1)}"


@dataclass(frozen=True)
class DataFacts:
    """What the data say of a run."""

    rows: Rows
    batch: Batch | None = None
    """The micro batch of the first step that trains most tokens; None where there are no data."""
    steps: int = 0
    """0 where it is not known."""
    content: Content | None = None
    """Of an average step; None where there are no data."""


def run(argv: list[str]) -> int:
    """Print the resolved config and the numbers that follow from it."""
    if COMMAND.asks_help(argv):
        sys.stdout.write(COMMAND.help())
        return 0
    own, settings = _split(argv)
    text = compose("train", settings)
    if text is None:
        return 0
    config = load_frozen(text)
    cluster = _cluster(config, own)
    check_run(config, cluster.ranks)
    card = choose_card(own, cluster.ranks)
    sys.stdout.write(text + "\n")
    _plan(config, own, cluster, card)
    return 0


def _split(argv: list[str]) -> tuple[PlanSettings, list[str]]:
    """The command's own settings, and those of the run with Hydra's flags and what they take."""
    if any(argument in ("-m", "--multirun") for argument in argv):
        raise ConfigError("dtune plan plans one run, a sweep would train: leave -m out")
    if not any(argument.startswith("-") for argument in argv):
        return split_settings(argv, PlanSettings, COMMAND)
    keys = {field.name for field in fields(PlanSettings)}
    mine = [argument for argument in argv if argument.partition("=")[0] in keys]
    own, _ = split_settings(mine, PlanSettings, COMMAND)
    return own, [argument for argument in argv if argument not in mine]


def _cluster(run: RunConfig, own: PlanSettings) -> Cluster:
    if own.gpus > 1 and run.parallel.name == "single":
        raise ConfigError(
            f"gpus={own.gpus} with parallel=single, which runs in one process; set parallel=auto, "
            "or the engine"
        )
    if own.gpus:
        return Cluster(own.gpus, min(own.gpus, own.gpus_per_node))
    nproc = resolve_nproc(run.launch, engine=run.parallel.name)
    return Cluster(nproc * run.launch.num_nodes, nproc)


def _plan(run: RunConfig, own: PlanSettings, cluster: Cluster, card: Card | None) -> None:
    # Only now, because a wrong setting is answered before torch is imported.
    from dtune.plan.auto import asks, decide
    from dtune.plan.report import card_rows, memory_lines, time_lines, work_lines
    from dtune.plan.run import Planner, UncountableError

    if own.find is not Find.nothing or (own.gpus and asks(run)):
        limit_of(card)
    planner = Planner(run, cluster.ranks, card, per_node=cluster.per_node)
    decision = decide(planner, _memory(card, cluster))
    planner.run = run = decision.run
    data = _data(run, cluster.ranks)
    _write(
        [
            ("processes", f"{cluster} ({run.parallel.name})"),
            *[("auto", reason) for reason in decision.reasons],
            *_batch_rows(run, cluster.ranks),
            *_model_rows(run, planner.built),
            ("attention", planner.attention),
            *data.rows,
            *card_rows(card),
        ]
    )
    try:
        plan = planner.plan(run, data.batch, data.content)
    except UncountableError as error:
        if own.find is not Find.nothing:
            raise
        _say([f"memory and time: not counted: {error}"])
        return
    _say(memory_lines(plan, data.batch or planner.batch(run)))
    _say(work_lines(plan))
    _say(time_lines(plan, steps=data.steps))
    _say(_found(own.find, planner))


def _memory(card: Card | None, cluster: Cluster) -> float:
    """Bytes of one rank: of the card, or of this machine."""
    import torch

    from dtune.plan.auto import memory_of

    if card is not None:
        return card.memory
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return float(memory_of(here, cluster.per_node))


def _found(find: Find, planner: Planner) -> list[str]:
    from dtune.plan.report import cheapest_lines
    from dtune.plan.solve import find_cheapest, find_max_length, find_micro_batch

    if find is Find.max_length:
        return [f"find=max_length: {line}" for line in find_max_length(planner).rows()]
    if find is Find.micro_batch:
        return [f"find=micro_batch: {line}" for line in find_micro_batch(planner).rows()]
    if find is Find.cheapest:
        return cheapest_lines(find_cheapest(planner))
    return []


def _write(rows: Rows) -> None:
    width = max(len(name) for name, _ in rows)
    sys.stdout.writelines(f"{name:<{width}}  {value}\n" for name, value in rows)


def _say(lines: Iterable[str]) -> None:
    sys.stdout.writelines(f"{line}\n" for line in lines)


def _batch_rows(run: RunConfig, world_size: int) -> Rows:
    accumulation = accumulation_steps(run, world_size)
    train = run.train
    return [
        (
            "global batch",
            f"{train.global_batch_size} = {train.micro_batch_size} micro x {accumulation} "
            f"accumulated x {world_size} ranks",
        ),
    ]


def _model_rows(run: RunConfig, built: BuiltModel) -> Rows:
    report, spec = built.report, built.spec
    share = report.trainable / report.total
    return [
        ("model", f"{run.model.path} ({spec.family}), {spec.num_parameters:,} parameters"),
        ("trained", f"{report.trainable:,} of {report.total:,} ({share:.3%})"),
        *[("replaced", f"{count} x {name}") for name, count in report.replaced.items()],
        ("kernels", _kernels(run, patched=bool(built.patches))),
        *[("patch", str(row)) for row in built.patches],
    ]


def _kernels(run: RunConfig, *, patched: bool) -> str:
    """The option, and whether what is planned could run here."""
    from dtune.patch.apply import why_not_here

    name = run.kernels.name.value
    if not patched:
        return f"{name}: no patches"
    problem = why_not_here(run.kernels)
    return f"{name}, planned for another machine: {problem}" if problem else name


def _data(run: RunConfig, world_size: int) -> DataFacts:
    """Rows about the data, and what of them the plan follows from."""
    import numpy as np

    from dtune.build import build_data
    from dtune.models.load import load_tokenizer
    from dtune.plan.run import Content
    from dtune.runtime.world import World

    try:
        tokenizer = load_tokenizer(run.model)
    except ConfigError as error:
        steps = run.train.max_steps
        known = str(steps) if steps else "known once data are tokenised"
        return DataFacts([("steps", known), ("data", f"not tokenised: {error}")], steps=steps)
    world = World.start()
    data = build_data(run, tokenizer, world, world_size=world_size)
    report, per_step = data.train.report, run.train.global_batch_size
    sequences = data.loader.sequences_per_epoch
    # The last step may be part empty.
    epochs = data.loader.sequences_until(data.total_steps) / sequences
    kind = f"packed sequences of {run.data.max_length}" if run.data.packing else "padded rows"
    batch = max(data.loader.batches(0), key=lambda batch: batch.num_targets)
    world.stop()
    rows = [
        *[("data", line) for line in report.lines()],
        ("sequences", f"{sequences:,} {kind} an epoch"),
        ("steps", f"{data.total_steps:,} of {per_step} sequences = {epochs:.2f} epochs"),
        (
            "tokens",
            f"{round(report.tokens * epochs):,}, {round(report.trained_tokens * epochs):,} trained",
        ),
    ]
    lengths = data.train.lengths.astype(np.float64)
    return DataFacts(
        rows,
        batch,
        steps=data.total_steps,
        content=Content(
            mean_length=float(np.square(lengths).sum() / max(1.0, lengths.sum())),
            tokens=report.tokens * epochs / data.total_steps,
            targets=report.trained_tokens * epochs / data.total_steps,
        ),
    )
