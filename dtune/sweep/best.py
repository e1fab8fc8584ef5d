"""The winner of a sweep, and its settings as an experiment of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.errors import ConfigError
from dtune.runtime.files import publish_text
from dtune.sweep.folder import SweepRecord, read_trial
from dtune.sweep.standing import DONE, Standing, SweepView

# They say where a run is and how it was started, not what is trained.
_NOT_TRAINED = ("run_dir", "resume", "launch")
_GONE = object()


def find_best(view: SweepView) -> Standing:
    """The trial that is done and best by the objective; ConfigError where none is done."""
    objective = view.record.objective
    standings = view.look()
    done = [one for one in standings if one.state == DONE and one.value is not None]
    if not done:
        raise ConfigError(
            f"none of the {len(standings)} trials in {view.folder} is done; "
            f"see dtune sweep status {view.folder}"
        )
    return min(done, key=lambda one: objective.sign * (one.value or 0.0))


def write_experiment(view: SweepView, winner: Standing, file: Path) -> None:
    """Write what makes the winner differ from the defaults, for ``experiment=<name>``.

    What is written is composed before it is published, and must come out as what the trial was
    frozen with; ConfigError where it does not.
    """
    searchpath = [f"file://{folder}" for folder in view.record.searchpath]
    frozen = _trained((winner.folder / "config.yaml").read_text(encoding="utf-8"))
    choices = _choices(winner, searchpath)
    defaults = _composed(choices, searchpath)
    text = _header(view.record, winner) + yaml.safe_dump(
        {
            "defaults": [{f"override /{group}": option} for group, option in choices.items()],
            **difference(defaults, frozen),
        },
        sort_keys=False,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    publish_text(file, text)
    if file.parent.name == "experiment":
        made = _composed({"experiment": file.stem}, [*searchpath, f"file://{file.parent.parent}"])
        if made != frozen:
            wrong = ", ".join(_leaves(difference(made, frozen) or difference(frozen, made)))
            raise ConfigError(f"{file} does not compose to what the trial was: {wrong}")


def _choices(winner: Standing, searchpath: list[str]) -> dict[str, str]:
    """Options of the trial that are not those of the defaults; the experiment is written out."""
    chosen = dict(read_trial(winner.folder).choices)
    usual = yaml.safe_load(compose_overrides("train", searchpath_override(searchpath)))
    names = {group: value.get("name") for group, value in usual.items() if isinstance(value, dict)}
    return {
        group: option
        for group, option in chosen.items()
        if group not in ("experiment", "launch") and option != names.get(group)
    }


def searchpath_override(folders: list[str]) -> list[str]:
    """The override that adds folders of options; none without folders."""
    return [f"hydra.searchpath=[{','.join(folders)}]"] if folders else []


def _composed(choices: Mapping[str, str], searchpath: list[str]) -> dict[str, Any]:
    settings = [f"{group}={option}" for group, option in choices.items()]
    text = compose_overrides("train", [*searchpath_override(searchpath), *settings])
    return _trained(text)


def _trained(text: str) -> dict[str, Any]:
    """The keys of a frozen config that say what is trained, with those that came after it."""
    config = yaml.safe_load(OmegaConf.to_yaml(OmegaConf.structured(load_frozen(text))))
    return {key: value for key, value in config.items() if key not in _NOT_TRAINED}


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ``after``, nested as they are, whose values ``before`` does not have."""
    found = {}
    for key, value in after.items():
        old = before.get(key, _GONE)
        if isinstance(value, dict) and isinstance(old, dict):
            if inner := difference(old, value):
                found[key] = inner
        elif value != old:
            found[key] = value
    return found


def _leaves(nested: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            found += _leaves(value, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key}={value}")
    return found


def _header(record: SweepRecord, winner: Standing) -> str:
    value = "" if winner.value is None else f", {record.objective.title} {winner.value:.6g}"
    return (
        "# @package _global_\n"
        f"# Trial {winner.number} of {winner.folder.parent}{value}: {winner.label}\n"
    )
