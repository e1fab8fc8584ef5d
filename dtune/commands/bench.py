"""``dtune bench``: tokens per second and memory of each method, measured."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dtune_launch.srun import is_task

from dtune.bench.cases import Case, plan_cases
from dtune.bench.schema import BenchConfig
from dtune.config.reference import describe_keys
from dtune.errors import ConfigError

USAGE = """dtune bench [settings] [-m]: tokens/s and memory of methods, each in its own process.

  dtune bench model=tiny peft=lora
  dtune bench model=llama3_8b precision=bf16 data.max_length=4096 peft=lora,qlora,full -m
  dtune bench compare OLD NEW [cases=GLOB] [--force]
      exit code 1 where NEW is worse beyond the noise of both, or lacks a case that OLD measured
      (results.jsonl of two benches, or their folders)

Settings are those of a run (dtune train --help), and:
"""
END = """
Results are in bench.out: results.jsonl, table.md, plots. docs/bench.md says what they mean."""

_CASES, _FORCE = "cases=", "--force"


def run(argv: list[str]) -> int:
    """Measure what the settings say, or compare two files of results."""
    if argv[:1] == ["compare"]:
        return compare_files(argv[1:])
    if "--help" in argv or "-h" in argv:
        sys.stdout.write(help_text())
        return 0
    _check_alone(os.environ)
    cases = plan_cases(argv)
    if not cases:
        return 0
    return bench(cases, command=["dtune", "bench", *argv])


def _check_alone(environ: Mapping[str, str]) -> None:
    """ConfigError where torchrun or srun has started several of this process."""
    if "RANK" in environ or is_task(environ):
        raise ConfigError(
            "dtune bench starts the ranks of every case itself: start it once, without torchrun or "
            "srun, and set launch.nproc"
        )


def help_text() -> str:
    """Usage, and the keys of ``bench`` with their meanings."""
    rows = [
        (f"{key.name}={key.default.strip('`')}", key.meaning)
        for key in describe_keys(BenchConfig, "bench.")
    ]
    width = max(len(setting) for setting, _ in rows)
    lines = [f"  {setting:<{width}}  {meaning}" for setting, meaning in rows]
    return "\n".join([USAGE, *lines, END, ""])


def bench(cases: Sequence[Case], *, command: Sequence[str]) -> int:
    """Run the cases; write the table and the plots."""
    from dtune.bench.record import Status
    from dtune.bench.runner import RESULTS, exit_code_of, run_cases, say
    from dtune.bench.table import markdown
    from dtune.runtime.capabilities import how_to_install, is_installed

    first = cases[0].bench
    out = Path(first.out).expanduser().absolute()
    can_draw = is_installed("matplotlib")
    if first.plots and not can_draw:
        raise ConfigError(
            f"bench.plots=true needs matplotlib: {how_to_install('matplotlib')}; or set "
            "bench.plots=false"
        )
    if first.plots is None and not can_draw:
        say(f"without plots, which need matplotlib: {how_to_install('matplotlib')}")
    wanted = sum(case.bench.repeats for case in cases)
    say(f"{len(cases)} cases, {wanted} runs, in {out}")
    results = run_cases(cases, out, command)
    if results:
        table = markdown(results)
        (out / "table.md").write_text(table, encoding="utf-8")
        say(f"\n{table}\nresults: {out / RESULTS}, table: {out / 'table.md'}")
    wants = can_draw if first.plots is None else first.plots
    if wants and any(result.status is Status.ok for result in results):
        from dtune.bench.plots import draw

        for file in draw(results, out):
            say(f"written: {file}")
    return exit_code_of(results, wanted)


def compare_files(argv: Sequence[str]) -> int:
    """Print how NEW stands to OLD; 1 where it is worse, ConfigError where they are not alike."""
    from dtune.bench.compare import chosen, commits, compare, differences
    from dtune.bench.record import read_jsonl

    if "-h" in argv or "--help" in argv:
        sys.stdout.write(help_text())
        return 0
    patterns = [argument for argument in argv if argument.startswith(_CASES)]
    files = [argument for argument in argv if argument not in (_FORCE, *patterns)]
    if len(files) != 2 or len(patterns) > 1 or any(name.startswith("-") for name in files):
        raise ConfigError(f"dtune bench compare takes OLD and NEW, {_CASES}GLOB and {_FORCE}")
    old, new = (read_jsonl(_results_in(name)) for name in files)
    for pattern in patterns:
        old, new = (chosen(results, pattern.removeprefix(_CASES)) for results in (old, new))
    differing = differences(old, new)
    told = [*differing, *commits(old, new)]
    if differing and _FORCE not in argv:
        listed = "\n".join(f"  {one}" for one in told)
        raise ConfigError(
            f"{files[0]} and {files[1]} are not of the same machine, versions and work:\n{listed}\n"
            f"{_FORCE} compares them nevertheless"
        )
    for one in told:
        sys.stdout.write(f"differs: {one}\n")
    comparison = compare(old, new)
    if not comparison.changes and not comparison.lost:
        raise ConfigError(f"{files[0]} and {files[1]} have no case in common that was measured")
    sys.stdout.writelines(line + "\n" for line in comparison.lines())
    if comparison.vanished:
        sys.stdout.write(f"{_CASES}GLOB compares some of the cases alone\n")
    return int(comparison.is_regression)


def _results_in(name: str) -> Path:
    """The file itself, or that of a bench's folder."""
    path = Path(name).expanduser()
    return path / "results.jsonl" if path.is_dir() else path
