"""From a command line to cases: composed, checked, labelled. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

from dtune_launch.gpus import resolve_nproc
from omegaconf import OmegaConf

from dtune.bench.record import Setting
from dtune.bench.schema import BenchConfig, BenchedRun
from dtune.config.compose import Composed, compose_each
from dtune.config.freeze import load_frozen
from dtune.config.run import RunConfig
from dtune.config.suggest import did_you_mean, near_options
from dtune.config.support import check_run
from dtune.errors import ConfigError

_NO_WORK = frozenset(
    "run_dir resume data.path data.eval_path data.split data.eval_split data.format data.columns "
    "data.on_bad_row data.max_bad_share data.on_long_row data.shuffle data.max_rows data.cache_dir "
    "data.name train.epochs train.max_steps train.eval_every train.early_stopping "
    "train.warmup_steps_untimed".split()
)
"""Keys that do not change what is computed in a step of a synthetic batch."""
_NO_WORK_GROUPS = frozenset(("log", "watch", "checkpoint", "evaluate", "launch"))
_WORK_OF_BENCH = ("weights", "warm_up", "documents", "padding", "trained")


@dataclass(frozen=True)
class Case:
    """One cell of a bench."""

    label: str
    """``peft=`` and what else differs between the cases."""
    text: str
    """Frozen config, with the learning rate of the method."""
    run: RunConfig
    bench: BenchConfig
    nproc: int
    settings: Mapping[str, Setting]

    def text_in(self, folder: Path, changes: Mapping[str, Any] | None = None) -> str:
        """The frozen config with ``folder`` as the run's, and further keys changed."""
        return _changed(self.text, {"run_dir": str(folder), **(changes or {})})


def plan_cases(argv: Sequence[str]) -> list[Case]:
    """Compose and check all cases; none where Hydra did what was asked (``--cfg``, ...).

    Raises:
        ConfigError: One of them is wrong; it names which.
    """
    _check_keys(argv)
    settings = _with_out(_multirun_last(argv))
    composed = compose_each("bench", settings, root=BenchedRun, section="bench")
    _check_rates(composed)
    if len({one.own.out for one in composed}) > 1:
        raise ConfigError("bench.out is the folder of all cases: it takes one value")
    labels = label_cases([_named(one) for one in composed])
    return [_case(one, label) for one, label in zip(composed, labels, strict=True)]


def _check_keys(argv: Sequence[str]) -> None:
    """ConfigError for an unknown key of the bench itself, with the nearest ones."""
    known = [f"bench.{field.name}" for field in fields(BenchConfig)]
    for argument in argv:
        key = argument.lstrip("+").partition("=")[0]
        own = ".".join(key.split(".")[:2])
        if key.startswith("bench.") and own not in known:
            raise ConfigError(f"unknown key {key}{did_you_mean(near_options(key, known))}")


def _check_rates(composed: Sequence[Composed]) -> None:
    """ConfigError for the rate of a method that no case has."""
    methods = list(dict.fromkeys(one.choices["peft"] for one in composed))
    for method in dict.fromkeys(method for one in composed for method in one.own.rates):
        if method not in methods:
            near = did_you_mean(near_options(method, methods))
            raise ConfigError(f"bench.rates.{method}: no case has peft={method}{near}")


def _with_out(argv: list[str]) -> list[str]:
    """With one folder for all cases: the default has the time in it, to which each would come."""
    if any(argument.lstrip("+").startswith("bench.out=") for argument in argv):
        return argv
    return [f"bench.out=runs/bench-{time.strftime('%Y%m%d-%H%M%S')}", *argv]


def _multirun_last(argv: Sequence[str]) -> list[str]:
    """Hydra takes no settings after ``-m`` where there are some before it."""
    flags = ("-m", "--multirun")
    asked = [argument for argument in argv if argument in flags][:1]
    return [*(argument for argument in argv if argument not in flags), *asked]


def _named(one: Composed) -> dict[str, str]:
    """Settings of a case by key, the method by its option."""
    given = (override.lstrip("+~").partition("=") for override in one.overrides)
    return {**{key: value for key, _, value in given}, "peft": one.choices["peft"]}


def label_cases(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """What tells each case from the others: its method, and the keys that differ."""
    keys = dict.fromkeys(key for one in settings for key in one)
    differing = [key for key in keys if len({one.get(key) for one in settings}) > 1]
    shown = ["peft", *(key for key in differing if key != "peft")]
    return [" ".join(f"{key}={one[key]}" for key in shown if key in one) for one in settings]


def _case(one: Composed, label: str) -> Case:
    bench, method = one.own, one.choices["peft"]
    assert isinstance(bench, BenchConfig)
    rate = {"optim.lr": bench.rates[method]} if method in bench.rates else {}
    text = _changed(one.text, rate)
    run = load_frozen(text)
    try:
        if run.launch.num_nodes > 1 or run.launch.gpus_of_node is not None:
            raise ConfigError(
                f"launch={run.launch.name}: dtune bench measures on this machine; use "
                "launch=local, on the machine or inside of an allocation"
            )
        nproc = resolve_nproc(run.launch, engine=run.parallel.name)
        check_run(run, nproc)
        _check_bench(run, bench)
    except ConfigError as error:
        raise ConfigError(f"case {label}: {error}") from error
    settings = {**settings_of(run, bench), "ranks": nproc}
    return Case(label, text, run, bench, nproc, settings)


def _changed(text: str, changes: Mapping[str, Any]) -> str:
    """A frozen config with some keys changed."""
    config = OmegaConf.create(text)
    for key, value in changes.items():
        OmegaConf.update(config, key, value)
    return OmegaConf.to_yaml(config)


def _check_bench(run: RunConfig, bench: BenchConfig) -> None:
    least = 2 * bench.documents
    if run.data.max_length * (1 - bench.padding) < least:
        raise ConfigError(
            f"data.max_length={run.data.max_length} with bench.padding={bench.padding} has no room "
            f"for bench.documents={bench.documents} of two tokens; lower bench.documents"
        )
    if bench.documents > 1 and not run.data.packing:
        raise ConfigError(
            f"bench.documents={bench.documents} share a row, and data.packing=false; set "
            "bench.documents=1"
        )
    if bench.train_steps and run.data.eval_path == "none":
        raise ConfigError(
            f"bench.train_steps={bench.train_steps} scores on held-out rows, and "
            "data.eval_path=none; name them, or set bench.train_steps=0"
        )
    if 0 < bench.train_steps <= run.schedule.warmup_steps:
        raise ConfigError(
            f"schedule.warmup_steps={run.schedule.warmup_steps} leaves none of "
            f"bench.train_steps={bench.train_steps}; lower it or raise bench.train_steps"
        )


def settings_of(run: RunConfig, bench: BenchConfig) -> dict[str, Setting]:
    """Everything that decides the work of a case, flat."""
    kept = {
        field.name: getattr(run, field.name)
        for field in fields(run)
        if field.name not in _NO_WORK_GROUPS
    }
    plain = {
        name: asdict(value) if hasattr(value, "__dataclass_fields__") else value
        for name, value in kept.items()
    }
    flat = {key: value for key, value in flatten(plain, "") if key not in _NO_WORK}
    own = dict(flatten(asdict(bench), "bench."))
    return {**flat, **{key: own[key] for key in own if key.split(".")[1] in _WORK_OF_BENCH}}


def flatten(settings: Mapping[str, Any], prefix: str) -> list[tuple[str, Setting]]:
    """Dotted keys and plain values."""
    found: list[tuple[str, Setting]] = []
    for key, value in settings.items():
        if isinstance(value, dict):
            found += flatten(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", _plain(value)))
    return found


def _plain(value: Any) -> Setting:
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, bool | int | float | str):
        return value
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
