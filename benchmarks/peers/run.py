"""dtune beside other frameworks, at equal work.

    python -m benchmarks.peers.run model=tiny,random50m rounds=3 out=FILE.jsonl

Every contestant trains the same seeded weights with the same adapter on the same packed tokens,
each run in a process of its own, in turn: A B C, A B C. A run whose loss on the fixed batch does
not fall, whose gradients are not finite and non-zero, or which does not begin and end at dtune's
loss, gets no number. FILE.jsonl has a line a run, FILE.md the table; benchmarks/peers/options.py
has all settings. Exit code: 0, 1 if dtune itself has no number, 2 for a wrong setting.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.peers.contestants import Contestant, find
from benchmarks.peers.inputs import make_inputs
from benchmarks.peers.measure import result_of
from benchmarks.peers.options import Options, parse, split
from benchmarks.peers.table import markdown
from benchmarks.peers.work import Entry, Work
from dtune.bench.record import CaseResult, Status, from_json, write_jsonl
from dtune.errors import ConfigError

ROOT = Path(__file__).parents[2]
LOG = "run.log"
"""In the folder of a work: what its last process has said."""
TOLERANCE = {"fp32": 1e-4, "bf16": 2**-8}
"""Share by which the first loss may differ from dtune's: sums in another order make 1e-6 of it in
fp32, and bf16 has 8 bits."""
LATER = 10
"""Times as much for the losses after it: AdamW makes whole steps of gradients that are almost 0."""


def main(argv: Sequence[str]) -> int:
    """Compare, and write results and table."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        options = parse(argv)
        check_device(options)
    except ConfigError as error:
        sys.stderr.write(f"peers: {error}\n")
        return 2
    out, command = Path(options.out), ["python", "-m", "benchmarks.peers.run", *argv]
    results: list[CaseResult] = []
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        for work in works(options, Path(folder)):
            make_inputs(work)
            for number in range(options.rounds):
                for result in one_round(work, options, number, results, command):
                    results.append(result)
                    # Now, so that what ends this process takes no number away.
                    write_jsonl(results, out)
    table = markdown(results)
    out.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)
    own = [result for result in results if result.framework == "dtune"]
    return int(any(result.status is not Status.ok for result in own))


def check_device(options: Options) -> None:
    """ConfigError where there is no GPU to run on."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: torch finds no GPU here; set device=cpu")


def works(options: Options, folder: Path) -> list[Work]:
    """The work on each shape."""
    has_gpu = torch.cuda.is_available()
    models = split(options.model)
    return [options.work(model, folder / model, has_gpu=has_gpu) for model in models]


def one_round(
    work: Work,
    options: Options,
    number: int,
    before: Sequence[CaseResult],
    command: Sequence[str],
) -> Iterator[CaseResult]:
    """One run of every contestant in every setting that it has; ``before``: results so far."""
    known = list(before)
    for setting in options.chosen_settings:
        for name in options.contestants:
            contestant, entry = find(name), Entry(name, setting, work)
            if setting not in contestant.settings(work):
                continue
            if problem := contestant.problem(work):
                result = result_of(entry, contestant, Status.refused, reason=problem)
            else:
                result = run_process(entry, contestant, minutes=options.minutes)
                if result.measured is None:
                    sys.stderr.write(f"{last_lines(entry)}\n")
            origin_here = replace(result.origin, command=tuple(command))
            result = replace(result, repeat=number, origin=origin_here)
            result = same_work(result, known)
            known.append(result)
            print(describe(result), flush=True)
            yield result


def run_process(entry: Entry, contestant: Contestant, *, minutes: float) -> CaseResult:
    """Run one entry in a fresh process; what ends that process is its result."""
    folder = Path(entry.work.folder)
    entry_file, result_file, log = (folder / name for name in ("run.json", "run.result", LOG))
    entry.write(entry_file)
    result_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.peers.worker", str(entry_file), str(result_file)]
    with log.open("w", encoding="utf-8") as file:
        try:
            code = subprocess.run(
                command,
                cwd=ROOT,
                env=environment(entry.work),
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=60 * minutes,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            reason = f"given up after {minutes:g} minutes (minutes=)"
            return result_of(entry, contestant, Status.failed, reason=reason)
    if result_file.is_file():
        return from_json(result_file.read_text(encoding="utf-8"))
    if code == -signal.SIGKILL:
        reason = "killed by SIGKILL, as Linux does where the host's memory is used up"
        return result_of(entry, contestant, Status.oom, reason=reason)
    said = last_lines(entry, 1) or "nothing"
    reason = f"its process ended with {code}, and said last: {said}"
    return result_of(entry, contestant, Status.failed, reason=reason)


def last_lines(entry: Entry, count: int = 30) -> str:
    """What the last process of a work has said last."""
    log = Path(entry.work.folder) / LOG
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return "\n".join(lines[-count:])


def environment(work: Work) -> dict[str, str]:
    """Of a contestant's process: no network, and so many threads from the first import on."""
    paths = [ROOT, ROOT / "kernels", ROOT / "launch"]
    found = os.environ.get("PYTHONPATH", "")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, paths), *filter(None, [found])]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(work.threads),
        "TOKENIZERS_PARALLELISM": "false",
    }


def same_work(result: CaseResult, before: Sequence[CaseResult]) -> CaseResult:
    """The result, refused if its losses are not those of dtune's first run of this work."""
    measured = result.measured
    reference = next((one.measured for one in before if is_reference(one, result)), None)
    if measured is None or reference is None:
        return result
    limit = TOLERANCE[str(result.settings["precision"])]
    pairs = zip(measured.loss_curve, reference.loss_curve, strict=True)
    for step, (loss, own) in enumerate(pairs, start=1):
        if abs(loss - own) > (limit if step == 1 else LATER * limit) * abs(own):
            reason = f"not the same work: at step {step} its loss is {loss:.5f}, dtune's {own:.5f}"
            return replace(result, status=Status.refused, reason=reason, measured=None)
    return result


def is_reference(one: CaseResult, result: CaseResult) -> bool:
    """Whether it is dtune's run of the same work, by whatever setting."""
    left_out = {"recompute": None, "best": None}
    return one.framework == "dtune" and {**one.settings, **left_out} == {
        **result.settings,
        **left_out,
    }


def describe(result: CaseResult) -> str:
    """One line, as the run goes on."""
    measured = result.measured
    said = f"no number: {result.reason}"
    if measured is not None:
        said = f"{1e3 * measured.median_seconds:.1f} ms a step"
    return f"round {result.repeat + 1} {result.case:<20} {result.framework:<10} {said}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
