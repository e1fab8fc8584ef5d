"""Processes of one world, started once for many cases.

A case is a function of a module that takes ``World`` first; every rank calls it with the same
keyword arguments, and ``Pool.run`` returns what each rank returned.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing as mp
import os
import socket
import tempfile
import threading
import time
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from dtune.runtime.world import World


class RankError(AssertionError):
    """A rank failed: its traceback."""


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _context() -> mp.context.BaseContext:
    """Processes begin as copies of one that has imported what ranks need, which takes seconds."""
    import torch

    if torch.cuda.is_available():
        # What is imported may ask for the GPUs, and a copy of a process that has cannot use them.
        return mp.get_context("spawn")
    mp.set_forkserver_preload(["tests.distributed.preloaded"])
    return mp.get_context("forkserver")


def _end_with(parent: Connection) -> None:
    """Wait until the other end is closed, which only the end of the test process does; exit."""
    with contextlib.suppress(EOFError):
        parent.recv()
    os._exit(1)


def _serve(
    rank: int,
    size: int,
    port: int,
    compiled: str,
    variables: dict[str, str],
    parent: Connection,
    pipe: Connection,
) -> None:
    # A rank may wait for others for half an hour, and the tests may be killed.
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    # The process that it is a copy of has those of its own start.
    os.environ.clear()
    os.environ.update(
        variables,
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        # Of these ranks together, as under torchrun, and of no others: what a process compiled that
        # was killed may be half written.
        TORCHINDUCTOR_CACHE_DIR=compiled,
    )
    import torch

    torch.set_num_threads(1)
    world = World.start()
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        module, name, kwargs = request
        try:
            function = getattr(importlib.import_module(module), name)  # a case is named by a string
            pipe.send((True, function(world, **kwargs)))
        except BaseException:  # noqa: BLE001 - the test process shows whatever a rank raised
            with contextlib.suppress(BrokenPipeError):  # another rank's failure closed it
                pipe.send((False, traceback.format_exc()))
            return


RESIDENT_LIMIT = 1536 * 2**20
"""Bytes of memory that a rank may keep between two cases."""


def _resident(pid: int | None) -> int:
    """Bytes of memory of a process; 0 where the system does not say."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except FileNotFoundError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


class Pool:
    """``size`` ranks that run cases one after the other.

    It starts anew after a failure, and before ranks that have grown take the machine's memory.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[mp.process.BaseProcess] = []
        self._pipes: list[Connection] = []
        self._compiled: tempfile.TemporaryDirectory[str] | None = None

    def _start(self) -> None:
        context = _context()
        port = _free_port()
        self._compiled = tempfile.TemporaryDirectory(
            prefix="dtune-compiled-", ignore_cleanup_errors=True
        )
        read_end, self._alive = context.Pipe(duplex=False)
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            ends = (read_end, theirs)
            args = (rank, self.size, port, self._compiled.name, dict(os.environ), *ends)
            process = context.Process(target=_serve, args=args, daemon=True)  # type: ignore[attr-defined]
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        read_end.close()

    def run(self, case: str, *, timeout: float = 300.0, **kwargs: Any) -> list[Any]:
        """Run ``module:function`` on every rank; RankError with the traceback of what failed."""
        if max((_resident(it.pid) for it in self._processes), default=0) > RESIDENT_LIMIT:
            self.close()
        if not self._processes:
            self._start()
        module, name = case.split(":")
        for pipe in self._pipes:
            pipe.send((module, name, kwargs))
        results = self._collect(case, timeout)
        failed = {rank: value for rank, (ok, value) in results.items() if not ok}
        if failed:
            self.close()
            shown = "\n".join(f"rank {rank} of {case}:\n{text}" for rank, text in failed.items())
            raise RankError(shown)
        return [results[rank][1] for rank in range(self.size)]

    def _collect(self, case: str, timeout: float) -> dict[int, tuple[bool, Any]]:
        """Answers by rank. Stops at the first failure: the others may wait for it in vain."""
        results: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout
        while len(results) < self.size and all(ok for ok, _ in results.values()):
            waiting = {pipe: r for r, pipe in enumerate(self._pipes) if r not in results}
            ready = wait(list(waiting), timeout=deadline - time.monotonic())
            if not ready:
                self.close()
                raise RankError(f"{case}: ranks {sorted(waiting.values())} gave no answer")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                try:
                    results[waiting[pipe]] = pipe.recv()
                except EOFError:
                    results[waiting[pipe]] = (False, "the process died")
        return results

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []
        if self._compiled is not None:
            self._compiled.cleanup()
