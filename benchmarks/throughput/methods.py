"""Every method of ``peft=`` on one model and data at equal tokens: ``dtune bench`` with scores.

Each is trained at the learning rate that its YAML states. What it prints and keeps is
`dtune bench`'s own; the results go to ``benchmarks/results/NAME.jsonl``.

    python benchmarks/throughput/methods.py NAME [steps] [settings]
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dtune.bench.record import read_jsonl, write_jsonl
from dtune.cli import main as dtune
from dtune.resources import find_data

RESULTS = Path(__file__).parents[1] / "results"
RATE = re.compile(r"^# Learns: .* optim\.lr=(\S+)", re.MULTILINE)


def stated_rates() -> dict[str, str]:
    """Option of ``peft=`` -> the learning rate with which its YAML says that it learns."""
    files = sorted((find_data("conf", "train.yaml") / "peft").glob("*.yaml"))
    found = {file.stem: RATE.search(file.read_text(encoding="utf-8")) for file in files}
    return {name: match.group(1) for name, match in found.items() if match}


def main(name: str, steps: int, settings: Sequence[str]) -> int:
    """Bench all methods; the exit code of ``dtune bench``."""
    rates = stated_rates()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        code = dtune(
            [
                "bench",
                "experiment=quickstart",
                f"peft={','.join(rates)}",
                f"bench.train_steps={steps}",
                *(f"bench.rates.{method}={rate}" for method, rate in rates.items()),
                f"bench.out={out}",
                *settings,
                "-m",
            ]
        )
        if (out / "results.jsonl").is_file():
            write_jsonl(read_jsonl(out / "results.jsonl"), RESULTS / f"{name}.jsonl")
        for picture in out.glob("*.svg"):
            shutil.copyfile(picture, RESULTS / f"{name}-{picture.name}")
    return code


if __name__ == "__main__":
    given = sys.argv[1:]
    if not given:
        sys.exit(__doc__)
    count = int(given[1]) if given[1:] and given[1].isdecimal() else 300
    sys.exit(main(given[0], count, [one for one in given[1:] if "=" in one]))
