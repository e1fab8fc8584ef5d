"""What two processes do with checkpoints; started once by ``test_checkpoint_ranks``."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dtune.checkpoint import visible
from dtune.checkpoint.reader import find_checkpoint, load_checkpoint
from dtune.checkpoint.schema import CheckpointConfig, OnError
from dtune.checkpoint.writer import Checkpointer
from dtune.errors import CheckpointError, ConfigError
from dtune.runtime.world import World
from dtune.types import EngineState, FlatShard
from tests.contracts.small_models import limited_file_size
from tests.unit.checkpoint_runs import (
    IDENTITY,
    SHAPES,
    HoldingEngine,
    Split,
    evenly,
    lopsided,
    names_in,
    save_step,
    write_run,
)


def load_newest(run_dir: Path, world: World, split: Split = evenly) -> tuple[int, HoldingEngine]:
    info = find_checkpoint(run_dir, "auto", world)
    assert info is not None
    engine = HoldingEngine(world, split=split)
    load_checkpoint(info, engine=engine, identity=IDENTITY, world=world)
    return info.step, engine


def saved_under_one_split_and_loaded_under_another(run_dir: Path, world: World) -> None:
    for step, split in enumerate((evenly, lopsided), start=1):
        with Checkpointer(run_dir / "checkpoints", CheckpointConfig(), world) as checkpointer:
            save_step(checkpointer, HoldingEngine(world, split=split), step)
        for other in (evenly, lopsided):
            found, engine = load_newest(run_dir, world, other)
            assert found == step
            assert engine.holds(step)


def one_process_is_read_by_two(run_dir: Path, world: World) -> None:
    torch.manual_seed(world.rank)
    before = torch.get_rng_state()
    step, engine = load_newest(run_dir, world)
    assert engine.holds(step)
    # Written by one process: random streams are not restored.
    assert torch.equal(torch.get_rng_state(), before)


def each_rank_has_its_own_random_numbers_back(run_dir: Path, world: World) -> None:
    torch.manual_seed(100 + world.rank)
    write_run(run_dir, world, 1)
    drawn = torch.rand(4)
    both = world.gather(drawn)
    assert not torch.equal(both[0], both[1])
    load_newest(run_dir, world)
    assert torch.equal(torch.rand(4), drawn)


def full_disk_of_one_rank_fails_the_save_on_both(run_dir: Path, world: World) -> None:
    folder = run_dir / "checkpoints"
    engine = HoldingEngine(world, shapes={"param/large": (40_000,)})
    with Checkpointer(folder, CheckpointConfig(), world) as checkpointer:
        save_step(checkpointer, engine, 1)
        checkpointer.wait()
        # The limit holds for the process, and so for its writing thread.
        limit = limited_file_size(50_000) if world.rank == 1 else contextlib.nullcontext()
        with limit:
            save_step(checkpointer, engine, 2)
            said = failure_of(checkpointer.wait)
        assert "rank 1" in said
        assert "rank-00001.safetensors: File too large (EFBIG)" in said
        assert "rank 0" not in said
        world.barrier()
        assert names_in(folder) == {"step-00000001", "LATEST"}
        world.barrier()
        save_step(checkpointer, engine, 3)
    info = find_checkpoint(run_dir, "auto", world)
    assert info is not None
    assert info.step == 3


def damage_seen_by_one_rank_is_agreed_by_both(run_dir: Path, world: World) -> None:
    folder = write_run(run_dir, world, 1, 2)
    names = ["rank-00000.safetensors", "rank-00001.safetensors", "index.json", "manifest.json"]
    for name in names:
        file = folder / "step-00000002" / name
        whole = file.read_bytes()
        world.barrier()
        if world.is_first:
            file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        world.barrier()
        assert load_newest(run_dir, world)[0] == 1
        if world.is_first:
            file.write_bytes(whole)
        world.barrier()
    assert load_newest(run_dir, world)[0] == 2


def swapped_files_of_ranks_are_refused(run_dir: Path, world: World) -> None:
    folder = write_run(run_dir, world, 1, 2) / "step-00000002"
    for name in ("rank-0000{}.safetensors", "rng/rank-0000{}.safetensors"):
        world.barrier()
        if world.is_first:
            exchange(folder / name.format(0), folder / name.format(1))
        world.barrier()
        assert load_newest(run_dir, world)[0] == 1
        world.barrier()
        if world.is_first:
            exchange(folder / name.format(0), folder / name.format(1))
        world.barrier()
    assert load_newest(run_dir, world)[0] == 2


def exchange(one: Path, other: Path) -> None:
    contents = one.read_bytes(), other.read_bytes()
    assert contents[0] != contents[1]
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])


class Lagging:
    """A file system that shows a folder late to this process."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.shown = time.monotonic() + seconds
        self.folder = str(folder)

    def hides(self, path: Path) -> bool:
        return str(path).startswith(self.folder) and time.monotonic() < self.shown

    @contextlib.contextmanager
    def mounted(self) -> Iterator[None]:
        real = Path.is_file

        def is_file(path: Path) -> bool:
            return not self.hides(path) and real(path)

        Path.is_file = is_file  # type: ignore[method-assign]
        try:
            yield
        finally:
            Path.is_file = real  # type: ignore[method-assign]


def files_that_show_late_are_waited_for(run_dir: Path, world: World) -> None:
    folder = write_run(run_dir, world, 1, 2)
    world.barrier()
    late = Lagging(folder / "step-00000002", 2.0 if world.rank == 1 else 0.0)
    with late.mounted():
        assert load_newest(run_dir, world)[0] == 2
    # As the first rank sees what the other has written in a save.
    late = Lagging(folder / ".tmp-step-00000003", 1.0 if world.is_first else 0.0)
    with late.mounted(), Checkpointer(folder, CheckpointConfig(), world) as checkpointer:
        save_step(checkpointer, HoldingEngine(world), 3)
    assert load_newest(run_dir, world)[0] == 3


def files_that_never_show_are_an_error_on_both(run_dir: Path, world: World) -> None:
    folder = write_run(run_dir, world, 1, 2)
    world.barrier()
    before, visible.VISIBLE_SECONDS = visible.VISIBLE_SECONDS, 0.3
    try:
        lag = Lagging(folder / "step-00000002" / "state.json", 60.0 if world.rank == 1 else 0.0)
        with lag.mounted():
            assert load_newest(run_dir, world)[0] == 1
            path = str(folder / "step-00000002")
            said = failure_of(lambda: find_checkpoint(run_dir, path, world))
        assert "state.json is seen by another rank and for" in said
        lag = Lagging(folder / ".tmp-step-00000003", 60.0 if world.is_first else 0.0)
        with lag.mounted(), Checkpointer(folder, CheckpointConfig(), world) as checkpointer:
            save_step(checkpointer, HoldingEngine(world), 3)
            assert "must lie on a file system that all hosts share" in failure_of(checkpointer.wait)
    finally:
        visible.VISIBLE_SECONDS = before
    world.barrier()
    assert names_in(folder) == {"step-00000001", "step-00000002", "LATEST"}


def an_error_of_one_rank_is_known_to_both_at_the_next_step(run_dir: Path, world: World) -> None:
    folder = run_dir / "checkpoints"
    engine = HoldingEngine(world, shapes={"param/large": (40_000,)})
    config = CheckpointConfig(on_error=OnError.go_on)
    with Checkpointer(folder, config, world) as checkpointer:
        save_step(checkpointer, engine, 1)
        checkpointer.wait()
        assert checkpointer.failure is None
        limit = limited_file_size(50_000) if world.rank == 1 else contextlib.nullcontext()
        with limit:
            save_step(checkpointer, engine, 2)
            while not checkpointer.is_settled():
                time.sleep(0.01)
        assert checkpointer.failure is not None
        assert checkpointer.failure.step == 2
        assert "rank 1: " in checkpointer.failure.message
        world.barrier()
        assert names_in(folder) == {"step-00000001", "LATEST"}
        world.barrier()
        save_step(checkpointer, engine, 3)
    assert load_step(run_dir, world) == 3


def load_step(run_dir: Path, world: World) -> int:
    info = find_checkpoint(run_dir, "auto", world)
    assert info is not None
    return info.step


def saves_do_not_disturb_the_collectives_of_training(run_dir: Path, world: World) -> None:
    engine = HoldingEngine(world, shapes={"param/large": (400_000,)})
    with Checkpointer(run_dir / "checkpoints", CheckpointConfig(keep=1), world) as checkpointer:
        for step in range(1, 6):
            save_step(checkpointer, engine, step)
            for number in range(50):
                total = torch.tensor([float(number + world.rank)])
                dist.all_reduce(total)
                assert total.item() == 2 * number + 1
                assert world.all_agree(True)
                assert not world.all_agree(world.is_first)
    assert names_in(run_dir / "checkpoints") == {"step-00000005", "LATEST"}


def replicas_are_saved_once_and_read_by_all(run_dir: Path, world: World) -> None:
    whole = torch.arange(10.0)

    def save(saved_here: bool) -> None:
        shard = FlatShard("param/w", (10,), 0, whole.clone(), saved_here=saved_here)
        with Checkpointer(run_dir / "checkpoints", CheckpointConfig(), world) as checkpointer:
            state = EngineState([shard], {"optimizer_step": 1, "loss_scale": 0.1})
            checkpointer.save(1, state, {}, is_best=False, identity=IDENTITY)

    assert "param/w from 0 on is saved in rank-00000" in failure_of(lambda: save(True))
    assert "has 10 elements, and none are stored from 0 on" in failure_of(lambda: save(False))
    save(world.is_first)
    info = find_checkpoint(run_dir, "auto", world)
    assert info is not None
    engine = HoldingEngine(world, shapes={"param/w": (10,)})
    load_checkpoint(info, engine=engine, identity=IDENTITY, world=world)
    assert torch.equal(engine.values["param/w"], whole[slice(*engine.range_of("param/w"))])


def another_model_on_one_rank_is_refused_by_both(run_dir: Path, world: World) -> None:
    write_run(run_dir, world, 1)
    info = find_checkpoint(run_dir, "auto", world)
    assert info is not None
    shapes = {**SHAPES, "param/more": (2,)} if world.rank == 1 else SHAPES
    engine = HoldingEngine(world, shapes=shapes)
    with pytest.raises(ConfigError, match="more is absent in the checkpoint"):
        load_checkpoint(info, engine=engine, identity=IDENTITY, world=world)


def failure_of(act: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as failed:
        act()
    return str(failed.value)


CASES = (
    saved_under_one_split_and_loaded_under_another,
    one_process_is_read_by_two,
    each_rank_has_its_own_random_numbers_back,
    full_disk_of_one_rank_fails_the_save_on_both,
    damage_seen_by_one_rank_is_agreed_by_both,
    swapped_files_of_ranks_are_refused,
    files_that_show_late_are_waited_for,
    files_that_never_show_are_an_error_on_both,
    an_error_of_one_rank_is_known_to_both_at_the_next_step,
    saves_do_not_disturb_the_collectives_of_training,
    replicas_are_saved_once_and_read_by_all,
    another_model_on_one_rank_is_refused_by_both,
)


def main(base: Path) -> None:
    logging.disable(logging.WARNING)
    world = World.start()
    for case in CASES:
        case(base / case.__name__, world)
        world.barrier()
        if world.is_first:
            (base / f"{case.__name__}.passed").touch()
    world.stop()


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert os.environ["WORLD_SIZE"] == "2"
    main(Path(sys.argv[1]))
