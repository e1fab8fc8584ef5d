"""What training on an H100 or H200 is meant to reach, held against files of results.

    python -m benchmarks.aims plan BENCH.jsonl ...    # what `dtune plan` says, against the peaks
    python -m benchmarks.aims speed FOLDER            # of gpu_bench_*.jsonl and gpu_peers_*.jsonl

A line for each aim: met, missed, or not measured and why. Exit code: 0 if all are met, 1 if one is
not, 2 for wrong arguments or a file that cannot be read. The shapes are those of Llama 8B and 1B,
with adapters of rank 16 on all linears and packed rows of 4,096 tokens, in bf16
(benchmarks/gpu_speed.sh).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dtune.bench.record import CaseResult, read_jsonl
from dtune.bench.table import Combined, combine
from dtune.errors import ConfigError

BENCH, PEERS_8B, PEERS_1B = "gpu_bench_llama8b", "gpu_peers_llama8b", "gpu_peers_llama1b"
"""Files of a folder, without their ending."""
PEER = "hf-peft"
PLAN_WITHIN = 0.10
"""Share of the measured peak."""
TOKENS_PER_SECOND = 16_200.0
"""70 % of what an H200 could do at most."""
QLORA_OF_LORA = 0.92
QUANTS = {"none": "peft=lora", "nf4": "peft=qlora"}
"""Cases of the bench by what the base is quantised to."""
FASTER = {
    (PEERS_8B, "llama8b plain"): 1.25,
    (PEERS_8B, "llama8b recompute"): 1.6,
    (PEERS_1B, "llama1b plain"): 1.5,
}
"""Times the tokens/s of the Trainer with ``peft``, by file and case."""


@dataclass(frozen=True)
class Verdict:
    """An aim and what was measured."""

    what: str
    wanted: float
    form: str
    """How numbers are written."""
    got: float | None
    """None where nothing was measured."""
    why: str = ""
    """Why not."""
    at_most: bool = False

    @property
    def met(self) -> bool:
        """Whether it was measured, and is good enough."""
        if self.got is None:
            return False
        return abs(self.got) <= self.wanted if self.at_most else self.got >= self.wanted

    def __str__(self) -> str:
        bound = "at most" if self.at_most else "at least"
        head = f"{self.what}: wanted {bound} {self.wanted:{self.form}}"
        if self.got is None:
            return f"{head}: not measured, {self.why}"
        return f"{head}: {'met' if self.met else 'missed'}, {self.got:{self.form}}"


def plan_verdicts(files: Sequence[Path]) -> list[Verdict]:
    """How far the plan of each case is off its peak; a file without results is one of them."""
    verdicts = []
    for file in files:
        cases = combine(read_if_there(file))
        verdicts += [_plan_of(file.stem, case) for case in cases]
        if not cases:
            verdicts.append(_plan_verdict(file.stem, None, "there are no results"))
    return verdicts


def _plan_of(name: str, case: Combined) -> Verdict:
    what = f"{name}, {case.case}"
    if not case.whole:
        return _plan_verdict(what, None, _reason(case))
    errors = [one.plan_error for one in case.measured]
    if None in errors:
        return _plan_verdict(what, None, "; ".join(case.results[0].notes) or "nothing was planned")
    return _plan_verdict(what, max((one or 0.0 for one in errors), key=abs))


def _plan_verdict(what: str, got: float | None, why: str = "") -> Verdict:
    title = f"error of the planned memory, {what}"
    return Verdict(title, PLAN_WITHIN, ".1%", got, why, at_most=True)


def speed_verdicts(folder: Path) -> list[Verdict]:
    """Tokens/s and memory of the files of a folder."""
    bench = {_method(one): one for one in combine(read_if_there(folder / f"{BENCH}.jsonl"))}
    lora, qlora = (_number(bench.get(quant), peft, _tokens) for quant, peft in QUANTS.items())
    verdicts = [
        Verdict("tokens/s of LoRA, 8B", TOKENS_PER_SECOND, ",.0f", *lora),
        Verdict(
            "times the tokens/s of LoRA, QLoRA, 8B", QLORA_OF_LORA, ".3f", *_ratio(qlora, lora)
        ),
    ]
    for (file, case), wanted in FASTER.items():
        results = read_if_there(folder / f"{file}.jsonl")
        found = {one.framework: one for one in combine(results) if one.case == case}
        for what, take, limit in (("tokens/s", _tokens, wanted), ("peak memory", _peak, 1.0)):
            own, peer = (_number(found.get(who), who, take) for who in ("dtune", PEER))
            title = f"times the {what} of {PEER}, {case}"
            got = _ratio(own, peer)
            verdicts.append(Verdict(title, limit, ".3f", *got, at_most=take is _peak))
    return verdicts


Found = tuple[float | None, str]
"""A number, or why there is none."""


def _number(case: Combined | None, name: str, take: Callable[[Combined], float]) -> Found:
    if case is None:
        return None, f"there is no result of {name}"
    return (take(case), "") if case.whole else (None, f"{name}: {_reason(case)}")


def _ratio(own: Found, other: Found) -> Found:
    if own[0] is None or other[0] is None:
        return None, own[1] or other[1]
    return own[0] / other[0], ""


def _tokens(case: Combined) -> float:
    return case.tokens_per_second


def _peak(case: Combined) -> float:
    return max(float(one.peak_bytes or 0) for one in case.measured)


def _method(case: Combined) -> str:
    return str(case.results[0].settings["quant.name"])


def _reason(case: Combined) -> str:
    bad = next(result for result in case.results if result.measured is None)
    return f"{bad.status.value}: {bad.reason}"


def read_if_there(file: Path) -> list[CaseResult]:
    """The results of a file; none of one that was not written."""
    return read_jsonl(file) if file.is_file() else []


def main(argv: Sequence[str]) -> int:
    """Print every verdict; the exit code."""
    kind, *names = argv or [""]
    paths = [Path(name) for name in names]
    try:
        if kind == "plan" and paths:
            verdicts = plan_verdicts(paths)
        elif kind == "speed" and len(paths) == 1:
            verdicts = speed_verdicts(paths[0])
        else:
            raise ConfigError("python -m benchmarks.aims takes plan FILE ... or speed FOLDER")
    except ConfigError as error:
        sys.stderr.write(f"aims: {error}\n")
        return 2
    for verdict in verdicts:
        print(verdict)
    return int(not all(verdict.met for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
