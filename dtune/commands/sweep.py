"""``dtune sweep``: how a sweep stands, going on with it, its winner, its plot."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dtune.commands.running import Parser
from dtune.errors import ConfigError

ACTIONS = ("status", "resume", "best", "plot")
EPILOG = """Begin one with dtune train -m; DIR is the folder that it names (hydra.sweep.dir).
resume takes settings of the launcher: hydra.launcher.parallel=2, hydra/launcher=dtune_slurm, and
launch=... where that changes; --pruned runs those again that were ended as hopeless.
best and plot take out=FILE. More: docs/sweeps.md."""


def run(argv: list[str]) -> int:
    """Do what the first argument names."""
    options = _parser().parse_intermixed_args(_explained(argv))
    folder = Path(options.folder).absolute()
    settings: list[str] = options.settings
    for setting in settings:
        if "=" not in setting:
            raise ConfigError(f"dtune sweep {options.action}: {setting} is no key=value")
    if options.action == "status":
        _refuse(settings, options.action)
        return status(folder, follow=options.follow, seconds=options.seconds)
    if options.action == "resume":
        return resume(folder, settings, pruned=options.pruned)
    out = _own_out(settings, options.action)
    if options.action == "plot":
        return plot(folder, out)
    return best(folder, out)


def _parser() -> Parser:
    parser = Parser(
        prog="dtune sweep",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", help=f"one of {', '.join(ACTIONS)}")
    parser.add_argument("folder", metavar="DIR", help="folder of the sweep")
    parser.add_argument("settings", nargs="*", help="key=value, as resume, best and plot take them")
    parser.add_argument("-f", "--follow", action="store_true", help="status: until the end")
    parser.add_argument("--seconds", type=float, default=5, help="status -f: between two tables; 5")
    parser.add_argument("--pruned", action="store_true", help="resume: the pruned ones too")
    return parser


def _explained(argv: list[str]) -> list[str]:
    """The arguments; ConfigError for an action that does not exist, with the nearest names."""
    from dtune.config.suggest import did_you_mean, near_options

    action = next((one for one in argv if not one.startswith("-")), None)
    if action is not None and action not in ACTIONS:
        near = did_you_mean([f"dtune sweep {name}" for name in near_options(action, ACTIONS)])
        raise ConfigError(f"dtune sweep {action} does not exist{near}; one of {', '.join(ACTIONS)}")
    return argv


def _refuse(settings: Sequence[str], action: str) -> None:
    if settings:
        raise ConfigError(f"dtune sweep {action} takes no {settings[0]}")


def _own_out(settings: Sequence[str], action: str) -> Path | None:
    out = None
    for setting in settings:
        key, _, value = setting.partition("=")
        if key != "out":
            raise ConfigError(f"dtune sweep {action} takes no {key}; did you mean out={value}?")
        out = Path(value).absolute()
    return out


def status(folder: Path, *, follow: bool, seconds: float) -> int:
    """Print the table of the trials; with ``follow`` again and again until all have ended.

    The exit code is 1 where a trial failed, 75 where one is left to go on with, else 0.
    """
    from dtune.sweep.standing import SweepView, exit_code_of, table_of

    view = SweepView(folder)
    while True:
        standings = view.look()
        counts: dict[str, int] = {}
        for one in standings:
            counts[one.state] = counts.get(one.state, 0) + 1
        told = ", ".join(f"{count} {state}" for state, count in counts.items())
        clear = "\x1b[2J\x1b[H" if follow and sys.stdout.isatty() else ""
        sys.stdout.write(f"{clear}{table_of(standings)}{len(standings)} trials: {told}\n")
        sys.stdout.flush()
        if not follow or not view.is_at_work(standings):
            return exit_code_of(standings)
        time.sleep(seconds)


def resume(folder: Path, settings: Sequence[str], *, pruned: bool) -> int:
    """Run the trials that are not done, as the sweep was launched or as the settings say."""
    from dtune.commands.sweep_resume import go_on

    return go_on(folder, settings, pruned=pruned)


def best(folder: Path, out: Path | None) -> int:
    """Print the winner, and write its settings as an experiment."""
    from dtune.sweep.best import find_best, write_experiment
    from dtune.sweep.standing import SweepView, line_of

    view = SweepView(folder)
    winner = find_best(view)
    file = out or folder / "experiment" / "best.yaml"
    write_experiment(view, winner, file)
    where = ""
    if file.parent.name == "experiment":
        where = f" 'hydra.searchpath=[file://{file.parent.parent}]'"
    sys.stdout.write(
        f"{line_of(winner, view.record.objective)}\n{winner.folder}\n"
        f"written: {file}\nuse it:  dtune train experiment={file.stem}{where}\n"
    )
    return 0


def plot(folder: Path, out: Path | None) -> int:
    """Draw the objective against each swept key."""
    from dtune.sweep.plot import draw
    from dtune.sweep.standing import SweepView

    for file in draw(SweepView(folder), out or folder / "objective.png"):
        sys.stdout.write(f"written: {file}\n")
    return 0
