"""``dtune logs``: what a rank of a run says, also while it says it."""

from __future__ import annotations

import codecs
import sys
import time
from pathlib import Path

from dtune.commands.running import find_run, parser, read_standing
from dtune.errors import ConfigError

_POLL_SECONDS = 0.3
# Asking Slurm at every look would burden its controller.
_ASK_SECONDS = 5.0


def run(argv: list[str]) -> int:
    """Print a log, from its beginning, and with ``-f`` as it grows until the run has ended."""
    made = parser("logs", "What a rank of a run has said, or the script of its job.")
    made.add_argument("-f", "--follow", action="store_true", help="go on until the run ends")
    made.add_argument("--rank", type=int, help="of which rank; by default the first")
    made.add_argument("--job", action="store_true", help="of the job's script instead")
    options = made.parse_args(argv)
    folder = find_run(options.runs[0])
    if options.rank is not None and (options.rank < 0 or options.job):
        raise ConfigError("dtune logs: --rank is the number of a rank, and not together with --job")
    try:
        return _show(folder, options.rank, of_job=options.job, follow=options.follow)
    except KeyboardInterrupt:
        return 0


def _show(folder: Path, rank: int | None, *, of_job: bool, follow: bool) -> int:
    path = _find(folder, rank, of_job)
    alive = read_standing(folder).is_alive
    if path is None and not (follow and alive):
        raise ConfigError(_absent(folder, rank, of_job))
    if path is None:
        sys.stderr.write("waiting for the run to start\n")
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    shown, asked, said = 0, time.monotonic(), _said(folder)
    while True:
        is_last = not (follow and alive)
        path = path or _find(folder, rank, of_job)
        if path is not None:
            shown = _print_from(path, shown, decoder, is_last=is_last)
        if is_last:
            return 0
        time.sleep(_POLL_SECONDS)
        if time.monotonic() - asked > _ASK_SECONDS or _said(folder) != said:
            said = _said(folder)
            # What was written before it ended is printed once more around.
            alive, asked = read_standing(folder).is_alive, time.monotonic()


def _said(folder: Path) -> bytes:
    """What status.json says now; empty where it is not there."""
    path = folder / "status.json"
    return path.read_bytes() if path.is_file() else b""


def _print_from(
    path: Path, start: int, decoder: codecs.IncrementalDecoder, *, is_last: bool
) -> int:
    """Print what a file holds from a byte on; where it ends.

    A character of which only a part is written yet waits in the decoder, unless this is the last.
    """
    with path.open("rb") as file:
        file.seek(start)
        data = file.read()
    sys.stdout.write(decoder.decode(data, final=is_last))
    sys.stdout.flush()
    return start + len(data)


def _find(folder: Path, rank: int | None, of_job: bool) -> Path | None:
    logs = folder / "logs"
    if not of_job:
        path = logs / f"rank-{rank or 0}.log"
        return path if path.is_file() else None
    # The newest: a run may have had several jobs.
    scripts = sorted(logs.glob("*.out"), key=lambda path: path.stat().st_mtime)
    return scripts[-1] if scripts else None


def _absent(folder: Path, rank: int | None, of_job: bool) -> str:
    what = "of a job's script" if of_job else f"of rank {rank or 0}"
    there = sorted(path.name for path in (folder / "logs").glob("*") if path.is_file())
    has = f"; there are {', '.join(there)}" if there else " yet"
    return f"{folder / 'logs'} has no log {what}{has}"
