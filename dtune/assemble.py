"""The page that shows the order: from a config to a trainer that is ready to run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dtune.build import (
    build_data,
    build_held_out,
    build_trained_model,
    list_left_out,
    prepare_engine,
    weights_of,
)
from dtune.checkpoint.adopt import Held
from dtune.checkpoint.reader import CHECKPOINTS, load_checkpoint
from dtune.checkpoint.writer import Checkpointer
from dtune.config.identity import identity_of
from dtune.config.run import RunConfig
from dtune.models.load import load_tokenizer
from dtune.optim.schedules import check_steps
from dtune.resume import find_own_checkpoint, go_on
from dtune.run_folder import keep_old
from dtune.runtime.watch.join import collective_timeout
from dtune.runtime.world import World
from dtune.train.export import Exporter
from dtune.train.participant import WithMethod
from dtune.train.progress import RunProgress
from dtune.train.sinks.build import build_sinks
from dtune.train.speed import speed_of
from dtune.train.trainer import Cadence, Trainer
from dtune.types import TakesPartInSteps


def assemble(run: RunConfig, world: World) -> tuple[Trainer, Exporter]:
    """Build everything of a run, in this order; the user's mistakes come before the weights."""
    run_dir = Path(run.run_dir)
    tokenizer = load_tokenizer(run.model)
    built = build_trained_model(run, load=True, device=world.device)
    data = build_data(run, tokenizer, world, world_size=world.size)
    check_steps(run.schedule, data.total_steps)
    held_out = build_held_out(run, tokenizer, data.objective, world)
    list_left_out(run_dir, world, data.train, held_out)
    last = data.loader.sequences_until(data.total_steps)
    identity = identity_of(run, data.train.fingerprint, last_sequence=last)
    checkpoint = find_own_checkpoint(run, built, identity, data.total_steps, world)
    speed = speed_of(built.matrices, built.spec, data.train.lengths, run.precision.name, world)
    # A checkpoint has all that init_from began with.
    start = run.peft.start if checkpoint is None else None
    weights = weights_of(built, seed=run.seed, start=start)
    engine = run.parallel.build(world, run.precision.name)
    prepare_engine(engine, built, run, weights, data.total_steps)
    world.allow(collective_timeout(run.watch))
    participant = built.method if isinstance(built.method, TakesPartInSteps) else None
    progress, held = RunProgress(), Held()
    if checkpoint is not None:
        whole = WithMethod(engine, participant, world)
        load_checkpoint(checkpoint, engine=whole, identity=identity, world=world)
        progress, held = go_on(checkpoint, run_dir, data.total_steps, world)
    elif world.is_first:
        # Of an attempt that ended before it saved: the same steps come again.
        keep_old(run_dir / "metrics.jsonl")
    saver = Checkpointer(run_dir / CHECKPOINTS, run.checkpoint, world, best_step=held.best_step)
    trainer = Trainer(
        engine=engine,
        objective=data.objective,
        loader=data.loader,
        evaluator=held_out,
        checkpointer=saver,
        identity=identity,
        sinks=build_sinks(
            run.log,
            run_dir,
            world,
            start_step=progress.step,
            total_steps=data.total_steps,
            settings=dataclasses.asdict(run),
        ),
        world=world,
        config=run.train,
        guard_config=run.guard,
        watch=run.watch,
        cadence=Cadence(run.log.every, run.train.eval_every, run.checkpoint.every),
        best=run.checkpoint.best,
        speed=speed,
        total_steps=data.total_steps,
        tokenizer=tokenizer,
        run_dir=run_dir,
        progress=progress,
        participant=participant,
        saved_step=held.saved_step,
    )
    exporter = Exporter(engine, built.method, weights.held, built.frozen, tokenizer, world)
    return trainer, exporter
