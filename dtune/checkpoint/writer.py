"""Saving while training goes on: copied on the training thread, written on another."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from dtune.checkpoint.layout import dump_json, naming
from dtune.checkpoint.manifest import Identity
from dtune.checkpoint.publish import together, write_step
from dtune.checkpoint.retention import sweep
from dtune.checkpoint.rng import capture_rng
from dtune.checkpoint.schema import CheckpointConfig, OnError
from dtune.checkpoint.snapshot import HostBuffers, Snapshot
from dtune.errors import CheckpointError
from dtune.runtime.files import TEMPORARY, sync_folder
from dtune.runtime.world import HOST_TIMEOUT, World
from dtune.types import EngineState

log = logging.getLogger("dtune")


@dataclass(frozen=True)
class SaveFailure:
    """A save that came to nothing."""

    step: int
    message: str


class Checkpointer:
    """Writes the checkpoints of a run. Every rank makes one and calls it at the same steps.

    A context manager; leaving it waits for what is being written. ``best_step`` is the best of
    those that are there when the run goes on; -1: none.

    A save that fails raises CheckpointError on every rank, as soon as it is known; with
    ``on_error=go_on`` only when no other came after it.
    """

    def __init__(
        self, folder: Path, config: CheckpointConfig, world: World, *, best_step: int = -1
    ) -> None:
        self._folder = folder
        self._config = config
        self._best_step = self._best_before = best_step
        self._trainer_world = world
        self.failure: SaveFailure | None = None
        """Of the newest save, where that has failed."""
        # A group of its own: the writer votes while the trainer talks over the others.
        host = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
        self._world = replace(world, host=host)
        self._attempt = together(self._world, self._open)[0]
        self._buffers = HostBuffers()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._step = -1

    def save(
        self,
        step: int,
        state: EngineState,
        extra: Mapping[str, Any],
        *,
        is_best: bool,
        identity: Identity,
    ) -> None:
        """Save a step; blocks only for the copy, and for a save that is still being written.

        ``extra`` holds JSON values and comes back as ``CheckpointInfo.extra``. Raises
        CheckpointError on every rank for the save before this one, and without
        ``asynchronous`` for this one.
        """
        self.wait()
        self._step, self._best_before = step, self._best_step
        if is_best:
            self._best_step = step
        snapshot = self._snapshot(step, state, extra, identity=identity)
        self._pending = self._executor.submit(self._write, snapshot)
        if not self._config.asynchronous:
            self.wait()

    def is_settled(self) -> bool:
        """Whether nothing is being written any more; collective, and cheap where nothing was.

        Raises CheckpointError as `wait` does.
        """
        if self._pending is None:
            return True
        if not self._trainer_world.all_agree(self._pending.done()):
            return False
        self.wait()
        return True

    def mark_best(self, step: int) -> None:
        """A step that is saved already is the best; BEST names it from the next save on."""
        self._best_step = step

    def wait(self) -> None:
        """Wait for the save that is being written. CheckpointError if it failed."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        self.failure = None
        try:
            pending.result()
        except CheckpointError as error:
            # It is nowhere: the best that there is, is the one before.
            self._best_step = self._best_before
            self.failure = SaveFailure(self._step, str(error))
            if self._config.on_error is OnError.stop:
                raise
            log.error("%s. The run goes on to the next (checkpoint.on_error=go_on)", error)

    def close(self) -> None:
        """Wait, and end the thread. CheckpointError if the newest save has failed."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()
        failure, self.failure = self.failure, None
        if failure is not None and self._config.on_error is OnError.go_on:
            raise CheckpointError(failure.message)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self) -> str:
        """Make and sweep the folder, on the first rank; a name for what is written from now on."""
        if not self._world.is_first:
            return ""
        with naming(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            sync_folder(self._folder.parent)
            sweep(self._folder)
            # Not only at the first save, which may be hours away.
            probe = self._folder / f"{TEMPORARY}probe"
            probe.touch()
            probe.unlink()
        return secrets.token_hex(4)

    def _snapshot(
        self,
        step: int,
        state: EngineState,
        extra: Mapping[str, Any],
        *,
        identity: Identity,
    ) -> Snapshot:
        world_size = self._world.size
        facts = {"step": step, "scalars": state.scalars, "extra": extra, "rng_ranks": world_size}
        return Snapshot(
            step=step,
            ranges=self._buffers.copy(state.shards),
            shapes={shard.name: shard.shape for shard in state.shards},
            dtypes={shard.name: shard.local.dtype for shard in state.shards},
            rng=capture_rng(self._world.device),
            state=dump_json(facts),
            identity=identity,
            best_step=self._best_step,
        )

    def _write(self, snapshot: Snapshot) -> None:
        write_step(
            snapshot,
            folder=self._folder,
            world=self._world,
            attempt=self._attempt,
            keep=self._config.keep,
            read_back=self._config.read_back,
        )
