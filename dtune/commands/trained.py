"""What the commands that use trained weights have in common: which weights, and their config."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dtune_launch.schema.local import LocalConfig

from dtune.config.compose import check_flags, compose
from dtune.config.freeze import load_frozen, read_frozen
from dtune.config.run import RunConfig
from dtune.config.suggest import all_keys
from dtune.errors import ConfigError
from dtune.optim.schema.adamw import AdamwConfig, Flat
from dtune.parallel.schema.single import SingleConfig
from dtune.patch.schema import Backend
from dtune.quant.schema.none import NoneConfig
from dtune.run_folder import EXPORTS
from dtune.runtime.schema import LogConfig, Recompute
from dtune.train.schema import TrainConfig

if TYPE_CHECKING:
    from dtune.runtime.world import World

# Groups of a run that say nothing about using its weights.
UNUSED = frozenset("parallel launch optim schedule train evaluate checkpoint log".split())
WHY_UNUSED = "trains nothing and runs in one process"


@dataclass(frozen=True)
class Trained:
    """A run's config without what only training needs, and the weights to load over its base."""

    config: RunConfig
    exported: Path | None
    """Exported weights of ``config.peft`` to put over the base; None: the base as it is."""
    folder: Path | None
    """Of the run; None without one."""

    @property
    def weights(self) -> str:
        """What is loaded, as users name it."""
        return str(self.exported or self.config.model.path)


def choose_trained(run_dir: str, export: str, settings: Sequence[str]) -> Trained | None:
    """The weights that ``run_dir`` and ``export`` mean, or the model of the settings alone.

    None where Hydra did what was asked (``--help``, ``--cfg``). Imports no torch. Raises
    ConfigError where the run has not exported such weights, or a setting cannot be put over it.
    """
    if not run_dir:
        if export:
            raise ConfigError("export chooses among the weights of a run: set run_dir as well")
        text = compose("eval", settings)
        if text is None:
            return None
        return Trained(without_training(load_frozen(text)), None, None)
    check_flags(settings)
    folder = Path(run_dir).expanduser()
    exported = find_export(folder, export or "last")
    config, over = _read_run(folder, settings, exported)
    return Trained(without_training(config), over, folder)


def without_training(config: RunConfig) -> RunConfig:
    """The config without what only training needs, and without the packages of that.

    Kernels are used where they can run: what was trained with them is the same without.
    """
    kernels = config.kernels
    if kernels.name is not Backend.torch:
        kernels = replace(kernels, name=Backend.auto)
    return replace(
        config,
        kernels=kernels,
        parallel=SingleConfig(),
        optim=AdamwConfig(flat=Flat.never),
        train=without_backward(config.train),
        log=LogConfig(),
        launch=LocalConfig(),
    )


def without_backward(train: TrainConfig) -> TrainConfig:
    """What decides how a model is built, where it will only compute forward."""
    return replace(train, recompute=Recompute.none, offload_activations=False)


def find_export(folder: Path, which: str) -> Path:
    """Exported weights of the last step of a run, or of its best one, which may be the last."""
    if which not in ("last", "best"):
        raise ConfigError(f"export={which} is not one of last, best")
    last = next((folder / name for name in EXPORTS if (folder / name).is_dir()), None)
    if not folder.is_dir():
        raise ConfigError(f"run_dir={folder}: there is no such folder")
    if last is None:
        raise ConfigError(
            f"run_dir={folder} has no {' or '.join(EXPORTS)} yet: let the run end "
            f"(dtune train run_dir={folder} resume=auto ...)"
        )
    if which == "last":
        return last
    best = last.with_name(f"best-{last.name}")
    if best.is_dir():
        return best
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if result["best_step"] == result["steps"]:
        return last
    raise ConfigError(
        f"run_dir={folder} has no {best.name}: "
        + (
            f"the checkpoint of its best step {result['best_step']} was not whole"
            if result["best_step"] > 0
            else "no evaluation has told the best step; set data.eval_path and train.eval_every"
        )
    )


def _read_run(
    folder: Path, settings: Sequence[str], exported: Path
) -> tuple[RunConfig, Path | None]:
    """The frozen config of a run with settings over it, and what to load over its base.

    Where a run exports a model, that is a model by itself, in float and with its tokenizer: it
    takes the place of the base, which need not be there any more, and is not quantised again.
    Code that the base brings is not exported.
    """
    keys = _as_keys(settings)
    run = read_frozen(folder, keys)
    named = any(key.startswith("model.path=") for key in keys)
    if named or not run.peft.exports_model or run.model.trust_remote_code:
        return run, exported
    for key in keys:
        if key.startswith("quant."):
            raise ConfigError(
                f"{key}: {exported} is a whole model in float, which is evaluated as it is; leave "
                "the setting out"
            )
    own = [f"model.path={exported}", "model.tokenizer=same", "model.chat_template=same"]
    own += ["model.init=pretrained", "model.added_tokens=[]", "peft.init_from=none"]
    return replace(read_frozen(folder, [*own, *keys]), quant=NoneConfig()), None


def _as_keys(settings: Sequence[str]) -> list[str]:
    """Settings to put over a frozen config, where a group can no longer be chosen as a whole.

    ``precision``, which is one key, is put as that key; ConfigError for any other group.
    """
    groups = {field.name for field in fields(RunConfig)} - {"run_dir", "resume", "seed"}
    keys = []
    for setting in settings:
        key, _, value = setting.partition("=")
        if key == "precision":
            keys.append(f"precision.name={value}")
        elif key in groups:
            own = [known for known in all_keys() if known.startswith(f"{key}.")][:3]
            raise ConfigError(
                f"{setting}: the {key} of a run is frozen and is not chosen anew; set keys of it"
                f"{', such as ' + ', '.join(own) if own else ''}"
            )
        else:
            keys.append(setting)
    return keys


@contextmanager
def one_process(*, quiet: bool = False) -> Iterator[World]:
    """A world of this process, left however the block ends.

    It logs to the terminal; ``quiet``: warnings only.
    """
    # Only here, because a wrong setting is answered before torch is imported.
    from transformers.utils.logging import disable_progress_bar

    from dtune.runtime.logs import log, start_logging
    from dtune.runtime.world import World

    world = World.start()
    start_logging(world.rank, None)
    if quiet:
        log.setLevel(logging.WARNING)
    disable_progress_bar()
    try:
        yield world
    finally:
        world.stop()
