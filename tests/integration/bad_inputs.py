"""Runs ``dtune`` on many command lines in one process, since starting torch takes seconds.

python bad_inputs.py FILE      FILE: JSON list of argument lists; prints JSON results
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

from dtune.cli import main


def answer(argv: list[str]) -> dict[str, object]:
    """Exit code and what was said on standard error."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main(argv)
    return {"code": code, "said": said.getvalue()}


if __name__ == "__main__":
    commands = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    sys.stdout.write(json.dumps([answer(argv) for argv in commands]))
