"""What each rank of a case runs: ``python -m dtune.bench.worker CASE_DIR``.

The first rank writes ``result.jsonl``; a rank that fails writes ``failure-<rank>.json``, of which
the process that started the case takes the first.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from dtune.bench.files import CaseFile, Failure, read_case, write_failure, write_origin
from dtune.bench.record import CaseResult, Status, write_jsonl
from dtune.runtime.imports import uncollected


def main(argv: Sequence[str] | None = None) -> int:
    """Measure a case; 0 where there is a result of it, be it a refusal."""
    # The process that starts a case holds back what may stop it.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1, signal.SIGTERM})
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m dtune.bench.worker CASE_DIR\n")
        return 2
    folder = Path(arguments[0])
    case = read_case(folder)
    try:
        _measure(case, folder)
    except Exception as error:  # noqa: BLE001 - whatever went wrong is the row of this case
        write_failure(folder, _failure_of(error))
        sys.stderr.write(traceback.format_exc())
        return 1
    return 0


def _measure(case: CaseFile, folder: Path) -> None:
    with uncollected():
        from dtune.bench.measure import measure_case
        from dtune.bench.origin import origin_of
        from dtune.config.freeze import read_frozen
        from dtune.runtime.logs import start_logging
        from dtune.runtime.world import World

    run = read_frozen(folder)
    world = World.start()
    start_logging(world.rank, folder / "logs")
    origin = origin_of(case.command, devices=world.size)
    if world.is_first:
        write_origin(folder, origin)
    outcome = measure_case(run, case.bench, world)
    if world.is_first:
        result = CaseResult(
            framework="dtune",
            case=case.label,
            settings=case.settings,
            status=Status.refused if outcome.refusal else Status.ok,
            origin=origin,
            reason=outcome.refusal,
            repeat=case.repeat,
            measured=outcome.measured,
            notes=outcome.notes,
        )
        write_jsonl([result], folder / "result.jsonl")
    world.barrier()
    world.stop()


def _failure_of(error: Exception) -> Failure:
    from dtune.out_of_memory import is_out_of_memory

    status = Status.oom if is_out_of_memory(error) else Status.failed
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return Failure(status, f"{type(error).__name__}: {text}".rstrip(": "), time.time())


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    if code:
        # A rank that fails alone waits for no other: what they still share need not be put away.
        os._exit(code)
