"""Tables in Markdown pages, made from files of results: ``python -m dtune.bench.pages PAGE ...``.

A page holds ``<!-- bench: FILE.jsonl -->`` and, below the table, ``<!-- end of bench -->``; FILE
is a path from the root of the repository. ``<!-- bench: keys -->`` is the table of the keys, and
``<!-- bench in short: FILE.jsonl -->`` to ``<!-- end of bench in short -->`` has few columns.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dtune.bench.record import CaseResult, read_jsonl
from dtune.bench.schema import BenchConfig
from dtune.bench.table import markdown, markdown_in_short
from dtune.config.reference import Key, describe_keys
from dtune.errors import ConfigError

MARK = "bench"
KEYS = "keys"

Table = Callable[[Sequence[CaseResult]], str]
"""From results to Markdown that ends with a line."""
TABLES: Mapping[str, Table] = {MARK: markdown, f"{MARK} in short": markdown_in_short}
"""By mark."""


def with_tables(text: str, root: Path, mark: str = MARK, table: Table = markdown) -> str:
    """The text with every table of a mark made anew from its file below ``root``.

    Raises:
        ConfigError: A table has no end, or its file cannot be read.
    """
    begin, end = f"<!-- {mark}: ", f"<!-- end of {mark} -->"
    block = re.compile(rf"({begin}(\S+) -->\n).*?({end})", re.DOTALL)
    opened, closed = text.count(begin), len(block.findall(text))
    if opened != closed:
        raise ConfigError(f"{opened} tables begin, and {closed} of them end with {end}")

    def made(name: str) -> str:
        if name == KEYS:
            return markdown_of_keys(describe_keys(BenchConfig, "bench."))
        return table(read_jsonl(root / name))

    return block.sub(lambda found: f"{found[1]}{made(found[2])}{found[3]}", text)


def rewrite(page: Path, mark: str = MARK, table: Table = markdown) -> None:
    """Write the tables of a page anew; from the root of the repository."""
    text = page.read_text(encoding="utf-8")
    page.write_text(with_tables(text, Path.cwd(), mark, table), encoding="utf-8")


def markdown_of_keys(keys: Sequence[Key]) -> str:
    """Keys, defaults and meanings."""
    rows = [f"| `{key.name}` | {key.default} | {key.meaning} |" for key in keys]
    return "\n".join(["| Key | Default | Meaning |", "|---|---|---|", *rows, ""])


def main(argv: Sequence[str]) -> int:
    """Write the tables of pages anew; the exit code."""
    try:
        for name in argv:
            for mark, table in TABLES.items():
                rewrite(Path(name), mark, table)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
