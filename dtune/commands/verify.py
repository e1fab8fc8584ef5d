"""``dtune verify``: whether what a run has saved is whole, and whether it resumes exactly."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from dtune.commands.running import find_run, parser
from dtune.config.freeze import read_frozen
from dtune.errors import ConfigError

_DESCRIPTION = (
    "Looks through everything that a run has saved: size and hash of every file, shapes, values "
    "that are not finite, random generators, names, exported weights. With --resume-proof it "
    "trains some steps of the run in a folder beside it, once in one go and once resumed half "
    "way, and compares the two bit for bit. Exit code 0: whole, equal; 1: damaged, different; "
    "2: no run."
)


@dataclass(frozen=True)
class Finding:
    """A line of the table."""

    what: str
    facts: str
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def run(argv: list[str]) -> int:
    """Look through a run, or prove that it resumes; the exit code of ``dtune``."""
    options = _parser().parse_args([f"--{word}" if _is_setting(word) else word for word in argv])
    folder = find_run(options.runs[0])
    if options.resume_proof:
        from dtune.commands.verify_proof import prove

        return prove(folder, steps=options.steps, nproc=options.nproc, keep=options.keep)
    findings = look_through(folder)
    sys.stdout.write(_table(folder, findings))
    return 1 if any(finding.problems for finding in findings) else 0


def _parser() -> argparse.ArgumentParser:
    made = parser("verify", _DESCRIPTION)
    made.add_argument("--resume-proof", action="store_true", help="train and resume, and compare")
    made.add_argument("--steps", type=int, default=4, help="of the proof, an even number: steps=4")
    made.add_argument("--nproc", default="", help="processes of the proof: those of the run")
    made.add_argument("--keep", action="store_true", help="keep the folder of the proof")
    return made


def _is_setting(word: str) -> bool:
    """Whether an option is written as settings are: ``steps=8``."""
    return word.startswith(("steps=", "nproc="))


def look_through(folder: Path) -> list[Finding]:
    """Every part of a run folder and what is wrong with it."""
    # Only now, because a folder that is no run is told before torch is imported.
    from dtune.checkpoint.inspect import Inspected, inspect_checkpoint, inspect_export
    from dtune.checkpoint.layout import list_steps, step_name
    from dtune.checkpoint.reader import CHECKPOINTS
    from dtune.run_folder import ALL_EXPORTS

    def finding(what: str, it: Inspected) -> Finding:
        facts = f"{it.files} files, {it.size / 2**20:.1f} MiB, {it.tensors} tensors"
        return Finding(what, facts, it.problems, it.notes)

    checkpoints = folder / CHECKPOINTS
    findings = [_check_config(folder), _check_metrics(folder)]
    for step in list_steps(checkpoints):
        name = step_name(step)
        findings.append(finding(name, inspect_checkpoint(checkpoints / name)))
    if checkpoints.is_dir():
        findings.append(_check_names(checkpoints))
    exports = [name for name in ALL_EXPORTS if (folder / name).is_dir()]
    return findings + [finding(name, inspect_export(folder / name)) for name in exports]


def _check_config(folder: Path) -> Finding:
    try:
        read_frozen(folder)
    except ConfigError as error:
        return Finding("config.yaml", "", (str(error),))
    return Finding("config.yaml", "every key known")


def _check_metrics(folder: Path) -> Finding:
    from dtune.train.sinks.jsonl import read_metrics

    file = folder / "metrics.jsonl"
    try:
        rows = read_metrics(file) if file.is_file() else []
        steps = [int(row["step"]) for row in rows if row["kind"] == "train"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Finding(file.name, "", (f"{file} cannot be read: {error!r}",))
    return Finding(file.name, f"{len(rows)} rows, up to step {max(steps, default=0)}")


def _check_names(checkpoints: Path) -> Finding:
    """LATEST and BEST, and what is there beside the published steps.

    LATEST is for people, and a resume goes by the steps themselves: one that is behind, as a kill
    after a step is published leaves it, is no damage. BEST is read, by ``dtune convert``.
    """
    from dtune.checkpoint.layout import BEST, LATEST, list_steps, parse_step, step_name

    steps = list_steps(checkpoints)
    names = [step_name(step) for step in steps]
    named = {name: _read_name(checkpoints / name) for name in (LATEST, BEST)}
    latest, best = named[LATEST], named[BEST]
    newest = names[-1] if names else ""
    problems, notes = [], []
    if (checkpoints / BEST).is_file() and best not in names:
        problems.append(f"{checkpoints / BEST} names {best[:40]!r}, which is not there")
    if latest != newest:
        says = f"names {latest[:40]!r}" if latest else "names no step"
        notes.append(
            f"{checkpoints / LATEST} {says}, and the newest is {newest or 'none'}; "
            "a resume does not go by it, and the next save puts it right"
        )
    notes += [
        f"{path}: {_aside(path.name)}"
        for path in sorted(checkpoints.iterdir())
        if parse_step(path.name) is None and path.name not in named
    ]
    shown = ", ".join(f"{name} {step}" for name, step in named.items() if step)
    return Finding("names", shown or "no checkpoint", tuple(problems), tuple(notes))


def _read_name(file: Path) -> str:
    """The step that LATEST or BEST names; empty where it is not there."""
    return file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else ""


def _aside(name: str) -> str:
    if name.startswith(".tmp-"):
        return "left by a save that did not end; the next start of the run removes it"
    if ".superseded-" in name or ".damaged-" in name:
        return "set aside; nothing reads it"
    return "not of dtune"


def _table(folder: Path, findings: list[Finding]) -> str:
    width = max(len(finding.what) for finding in findings)
    lines = [f"run  {folder}"]
    for finding in findings:
        verdict = "damaged" if finding.problems else "good"
        lines.append(f"{finding.what:<{width}}  {verdict:<7}  {finding.facts}".rstrip())
        lines += [f"{'':<{width}}  {problem}" for problem in finding.problems]
        lines += [f"{'':<{width}}  note: {note}" for note in finding.notes]
    damaged = [finding.what for finding in findings if finding.problems]
    steps = [finding for finding in findings if finding.what.startswith("step-")]
    whole = [finding.what for finding in steps if not finding.problems]
    if damaged:
        lines.append(f"damaged: {', '.join(damaged)}")
    if steps:
        newest = f"resume=auto goes on from {whole[-1]}" if whole else "no checkpoint is whole"
        lines.append(newest)
    if not damaged:
        lines.append("all good")
    return "\n".join(lines) + "\n"
