"""Speed of dtune's kernels against the best alternatives that are installed.

    python benchmarks/kernels/run.py --out DIR [--shape 8b] [--seconds 240] [--only NAME]

Times each public function forward, and forward and backward, and each op alone, for layers of a
Llama 1B, 8B and 70B in bf16 with 8192 tokens. Alternatives take turns (A B A B) on operands that
are not in the cache; times are medians by CUDA events. First the device's own ceilings are
measured: a copy, and a GEMM. A case whose results differ from dtune's gets no number. Prints a
table and the aims, met or missed; writes both to DIR/kernels.txt, and all numbers to
DIR/kernels.json. Exit code: 0, or 1 if a case that was begun has no number.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch
from aims import judge
from cases import FUNCTIONS, OPS, Case
from comparison import Layer, Result, compare, described
from dtune_kernels.catalog import SHAPES
from dtune_kernels.timing import Ceilings, measure_ceilings

PACKAGES = "torch triton transformers peft bitsandbytes liger-kernel".split()
TOKENS = 8192
SECONDS_EACH = 0.15
"""Of measuring, for each alternative."""
COMPILED = ("rms_norm", "rope", "swiglu")
"""Where plain PyTorch is compiled as well, for the first layer: others are mostly GEMMs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--shape", action="append", choices=SHAPES, help="1b, 8b and 70b")
    parser.add_argument("--only", action="append", help="part of the name of a case")
    parser.add_argument("--seconds", type=float, default=240.0, help="start nothing after these")
    parser.add_argument("--repeats", type=int, help="samples of each alternative")
    parser.add_argument("--commit", help="of the sources, where this is no git checkout")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args(argv)
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report(environment(sys.argv[1:] if argv is None else argv, device, options.commit))
    dtype = torch.bfloat16
    ceilings = measure_ceilings(device, dtype, rounds=options.repeats)
    report.start(ceilings)
    options.out.mkdir(parents=True, exist_ok=True)
    shapes = options.shape or ("8b", "70b", "1b")
    for name, case, shape in planned(shapes, options.only or [""]):
        if time.monotonic() - began > options.seconds:
            report.left_out.append(f"{name} {shape}")
            continue
        compiled = not options.no_compile and shape == shapes[0] and name in COMPILED
        sizes = SHAPES[shape]
        if shape != "small":
            sizes = replace(sizes, tokens=TOKENS)
        layer = Layer(sizes, dtype, device, compiled)
        report.add(_results(name, case, layer, ceilings, options.repeats))
        # Now, so that what ends this process takes no number away.
        report.write(options.out)
    report.end(time.monotonic() - began)
    report.write(options.out)
    return int(any(result.problem for result in report.results))


def planned(shapes: Sequence[str], only: Sequence[str]) -> Iterator[tuple[str, Case, str]]:
    """Cases and layers, the most telling first."""
    order = [(FUNCTIONS, shapes[:1]), (OPS, shapes[:1]), (FUNCTIONS, shapes[1:]), (OPS, shapes[1:])]
    for cases, layers in order:
        for shape in layers:
            for name, case in cases.items():
                if any(part in name for part in only):
                    yield name, case, shape


def _results(
    name: str, case: Case, layer: Layer, ceilings: Ceilings, repeats: int | None
) -> list[Result]:
    """A case that cannot be run is a result with the reason: the others are still to be timed."""
    torch.manual_seed(0)
    try:
        return compare(name, case(layer), layer, ceilings, seconds=SECONDS_EACH, rounds=repeats)
    except Exception as error:  # noqa: BLE001 - peers raise anything; it is reported
        return [Result(name, "both", layer.shape.name, problem=described(error))]
    finally:
        if layer.device.type == "cuda":
            torch.cuda.empty_cache()


class Report:
    """Prints what is known as soon as it is, and keeps it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.results: list[Result] = []
        self.left_out: list[str] = []
        """Cases that the time was too short for."""
        self._lines: list[str] = []
        self._environment = environment
        self._ceilings: Ceilings | None = None

    def start(self, ceilings: Ceilings) -> None:
        """Say where, with what, and what the device can do."""
        self._ceilings = ceilings
        for name, value in self._environment.items():
            self._say(f"{name:<10}{value}")
        bandwidth, flops = ceilings.bandwidth / 1e9, ceilings.flops / 1e12
        self._say(f"{'measured':<10}copy {bandwidth:.0f} GB/s, bf16 GEMM {flops:.1f} TFLOP/s\n")
        names = ("ms", "p10", "p90", "x dtune", "GB/s", "TFLOP/s", "share", "launches")
        head = f"{'layer':<7}{'case':<26}{'pass':<9}{'by':<18}"
        self._say(head + "".join(f"{name:>9}" for name in names))

    def add(self, results: Sequence[Result]) -> None:
        """Say the lines of a case."""
        for result in results:
            self.results.append(result)
            for text in lines(result):
                self._say(text)

    def end(self, seconds: float) -> None:
        """Say which aims are met."""
        self._say("")
        for verdict in judge(self.results):
            self._say(str(verdict))
        if self.left_out:
            self._say(f"\nno time was left for: {', '.join(self.left_out)}")
        self._say(f"\n{len(self.results)} computations in {seconds:.0f} s")

    def write(self, folder: Path) -> None:
        """Write text and numbers."""
        (folder / "kernels.txt").write_text("\n".join(self._lines) + "\n", encoding="utf-8")
        record = {
            "environment": self._environment,
            "ceilings": self._ceilings and asdict(self._ceilings),
            "results": [asdict(result) for result in self.results],
            "left_out": self.left_out,
            "aims": [{**asdict(verdict), "met": verdict.met} for verdict in judge(self.results)],
        }
        (folder / "kernels.json").write_text(json.dumps(record, indent=1), encoding="utf-8")

    def _say(self, text: str) -> None:
        print(text, flush=True)
        self._lines.append(text)


def lines(result: Result) -> Iterator[str]:
    """Rows of the table: one an alternative, the rates of dtune's."""
    head = f"{result.layer:<7}{result.case:<26}{result.direction:<9}"
    if result.problem:
        yield f"{head}no number: {result.problem}"
    for name, why in result.left_out.items():
        yield f"{head}{name:<18}no number: {why}"
    for name, one in result.measured.items():
        times = (one.timing.median, one.timing.low, one.timing.high)
        text = f"{head}{name:<18}" + "".join(f"{1e3 * seconds:9.4f}" for seconds in times)
        text += f"{result.speedup(name):9.2f}"
        if name == "dtune":
            seconds = one.timing.median
            text += f"{result.nbytes / seconds / 1e9:9.0f}{result.flops / seconds / 1e12:9.1f}"
            text += f"{result.share:9.0%}"
        else:
            text += " " * 27
        yield (text + ("" if one.launches is None else f"{one.launches:9d}")).rstrip()


def environment(command: Sequence[str], device: torch.device, commit: str | None) -> dict[str, str]:
    """Hardware, versions, command, commit and date."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    if commit is None:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": name,
        "versions": f"Python {platform.python_version()}, {', '.join(found)}",
        "command": shlex.join(["python", "benchmarks/kernels/run.py", *command]),
        "commit": commit or "unknown: not in a git checkout",
        "date": datetime.now(UTC).date().isoformat(),
    }


if __name__ == "__main__":
    sys.exit(main())
