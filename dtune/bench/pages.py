"""Tables in Markdown pages, made from files of results: ``python -m dtune.bench.pages PAGE ...``.

A page holds ``<!-- bench: FILE.jsonl -->`` and, below the table, ``<!-- end of bench -->``; FILE
is a path from the root of the repository. ``<!-- bench: keys -->`` is the table of the keys.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from dtune.bench.record import read_jsonl
from dtune.bench.schema import BenchConfig
from dtune.bench.table import markdown
from dtune.config.reference import Key, describe_keys
from dtune.errors import ConfigError

END = "<!-- end of bench -->"
KEYS = "keys"
_BLOCK = re.compile(r"(<!-- bench: (\S+) -->\n).*?(<!-- end of bench -->)", re.DOTALL)


def with_tables(text: str, root: Path) -> str:
    """The text with every marked table made anew from its file below ``root``."""
    opened, closed = text.count("<!-- bench: "), len(_BLOCK.findall(text))
    if opened != closed:
        raise ConfigError(f"{opened} tables begin, and {closed} of them end with {END}")
    return _BLOCK.sub(lambda found: f"{found[1]}{_table(found[2], root)}{found[3]}", text)


def _table(name: str, root: Path) -> str:
    if name == KEYS:
        return markdown_of_keys(describe_keys(BenchConfig, "bench."))
    return markdown(read_jsonl(root / name))


def markdown_of_keys(keys: Sequence[Key]) -> str:
    """Keys, defaults and meanings."""
    rows = [f"| `{key.name}` | {key.default} | {key.meaning} |" for key in keys]
    return "\n".join(["| Key | Default | Meaning |", "|---|---|---|", *rows, ""])


def main(argv: Sequence[str]) -> int:
    """Write the tables of pages anew; from the root of the repository."""
    for name in argv:
        page = Path(name)
        text = page.read_text(encoding="utf-8")
        page.write_text(with_tables(text, Path.cwd()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
