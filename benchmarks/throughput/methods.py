"""Every method of ``peft=`` on one model and data at equal tokens: ``dtune bench`` with scores.

Each learns at the rate that its YAML states. What it prints is `dtune bench`'s own, and stays in
``runs/NAME``; the results go to ``benchmarks/results/NAME.jsonl``, the plots beside them, and the
pages that show NAME are written anew by ``make docs``.

    python benchmarks/throughput/methods.py NAME [steps] [settings]
"""

from __future__ import annotations

import re
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dtune.bench.record import read_jsonl, write_jsonl
from dtune.cli import main as dtune
from dtune.resources import find_data

RESULTS = Path(__file__).parents[1] / "results"
RATE = re.compile(r"^# Learns: .* optim\.lr=(\S+)", re.MULTILINE)
STEPS = 300


def stated_rates() -> dict[str, str]:
    """Option of ``peft=`` -> the learning rate with which its YAML says that it learns."""
    found = {}
    for file in sorted((find_data("conf", "train.yaml") / "peft").glob("*.yaml")):
        match = RATE.search(file.read_text(encoding="utf-8"))
        if match is None:
            sys.exit(f"{file} does not state the rate at which it learns: # Learns: ...")
        found[file.stem] = match.group(1)
    return found


def main(name: str, steps: int, settings: Sequence[str]) -> int:
    """Bench all methods; the exit code of ``dtune bench``."""
    rates, out = stated_rates(), Path("runs") / name
    command = [
        "bench",
        "experiment=quickstart",
        f"peft={','.join(rates)}",
        f"bench.train_steps={steps}",
        *(f"bench.rates.{method}={rate}" for method, rate in rates.items()),
        f"bench.out={out}",
        *settings,
        "-m",
    ]
    code = dtune(command)
    if code == 2:
        return code
    results = read_jsonl(out / "results.jsonl")
    runs = Counter(one.case for one in results)
    if len(runs) < len(rates) or len(set(runs.values())) > 1:
        sys.stderr.write(f"stopped before its end: {RESULTS / name}.jsonl is left as it was\n")
        return code
    write_jsonl(results, RESULTS / f"{name}.jsonl")
    for picture in out.glob("*.svg"):
        shutil.copyfile(picture, RESULTS / f"{name}-{picture.name}")
    return code


if __name__ == "__main__":
    given = sys.argv[1:]
    if not given or "=" in given[0]:
        sys.exit(__doc__)
    count = int(given[1]) if given[1:] and given[1].isdecimal() else STEPS
    sys.exit(main(given[0], count, [one for one in given[1:] if "=" in one]))
