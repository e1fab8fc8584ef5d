"""What ranks send, counted on 2, 4 and 8 of them: ``python -m tests.distributed.traffic_run``.

Trains two steps of a small model in every case of ``traffic_cases.py``, on as many processes of
this machine, and writes ``benchmarks/results/communication-cpu.json``. With words, only the cases
whose names contain one of them are counted anew; the others keep their last result. Exit code 1 if
a count is not what is planned.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.distributed.pool import Pool
from tests.distributed.traffic import wide_config
from tests.distributed.traffic_cases import CASES, RESULT, count, differences, planned
from tests.matrix.page import versions

WORLDS = (2, 4, 8)


def main(words: list[str]) -> int:
    """Count and write; the exit code."""
    wanted = [(case, size) for size in WORLDS for case in CASES if size >= case.least]
    before = json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if words else []
    rows = {(row["case"], row["ranks"]): row for row in before}
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        folder = wide_config(Path(name))
        for size in WORLDS:
            pool = Pool(size)
            for case in (case for case, ranks in wanted if ranks == size):
                if words and not any(word in str(case) for word in words):
                    continue
                row = count(pool, case, folder)
                rows[str(case), size] = row
                found = differences(planned(case, folder, size), row)
                wrong += bool(found)
                sys.stdout.write(f"{size} ranks, {case}: {'; '.join(found) or 'as planned'}\n")
                sys.stdout.flush()
            pool.close()
    known = [(str(case), size) for case, size in wanted]
    write([rows[key] for key in known if key in rows])
    sys.stdout.write(f"{wrong} not as planned; see {RESULT}\n")
    return int(wrong > 0)


def write(rows: list[dict[str, Any]]) -> None:
    """A line for each row."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    head = json.dumps({"versions": versions(), "rows": []}, indent=1).removesuffix("[]\n}")
    RESULT.write_text(f"{head}[\n{lines}\n]}}\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
