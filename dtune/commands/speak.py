"""Which weights answer: those of a run, a model as it is, or named adapters on a base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dtune.commands.schema import SpeakSettings
from dtune.commands.trained import Trained, choose_trained
from dtune.config.support import check_run
from dtune.evaluate.adapter_files import AdapterFiles, read_adapter


@dataclass(frozen=True)
class Chosen:
    """What answers."""

    trained: Trained
    adapters: Mapping[str, AdapterFiles]
    """By name, in the order given; empty where the trained weights answer by themselves."""


def choose_speaker(own: SpeakSettings, settings: Sequence[str]) -> Chosen | None:
    """Read what the settings name, without torch; None where Hydra did what was asked."""
    trained = choose_trained(own.run_dir, own.export, settings)
    if trained is None:
        return None
    check_run(trained.config, 1)
    adapters: dict[str, AdapterFiles] = {}
    if own.adapters:
        if trained.exported is not None:
            adapters["run"] = read_adapter(str(trained.exported), key="run_dir")
        for name, path in own.adapters.items():
            adapters[name] = read_adapter(path, key=f"adapters.{name}")
    return Chosen(trained, adapters)


def first_adapter(chosen: Chosen) -> str:
    """The adapter that answers where none is named: the first given; empty where there is none."""
    return next(iter(chosen.adapters), "")
