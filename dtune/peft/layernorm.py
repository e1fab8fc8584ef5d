"""LayerNorm tuning, Zhao et al. 2023, arXiv:2312.11420, by HF ``peft`` (its LN_TUNING)."""

from __future__ import annotations

import difflib
import fnmatch

import peft
import torch
from torch import nn

from dtune.errors import ConfigError
from dtune.peft.base import is_norm
from dtune.peft.schema.layernorm import LayernormConfig
from dtune.peft.tuners import ADAPTER, Tuner
from dtune.types import ModelSpec, TensorSource

ALL_NORMS = "all-norms"


class Layernorm(Tuner):
    """Copies of the norms are trained, which start as the base has them; all else is frozen."""

    key = "peft=layernorm"
    harmless = ("Unsupported layer type",)

    def __init__(self, config: LayernormConfig) -> None:
        super().__init__(config.targets)
        self.config = config

    def plan(self, model: nn.Module, spec: ModelSpec) -> list[str]:
        """Paths of the norms that are trained. ConfigError for a target that matches nothing."""
        modules = model.named_modules()
        norms = [name for name, m in modules if is_norm(m) and list(m.parameters())]
        chosen: set[str] = set()
        for target in self.config.targets:
            found = [path for path in norms if _names(target, path)]
            if not found:
                leaves = sorted({path.rpartition(".")[2] for path in norms})
                near = difflib.get_close_matches(target, [ALL_NORMS, *leaves], n=3, cutoff=0.5)
                hint = f"did you mean {' or '.join(near)}? " if near else ""
                raise ConfigError(
                    f"peft.targets: {target!r} matches no norm of {spec.family} ({spec.path}); "
                    f"{hint}Names: {ALL_NORMS}, {', '.join(leaves)}"
                )
            chosen.update(found)
        return [path for path in norms if path in chosen]

    def peft_config(self, targets: list[str]) -> peft.PeftConfig:
        """Settings as ``peft`` takes them."""
        return peft.LNTuningConfig(target_modules=list(self._paths))

    def source(self, stored: TensorSource, held: TensorSource, seed: int) -> TensorSource:
        """The norms of the base."""
        return _Copies(stored, {name: self._original(name) for name in self._added})

    def _original(self, name: str) -> str:
        path, _, leaf = name.rpartition(f".ln_tuning_layers.{ADAPTER}.")
        return f"{path}.base_layer.{leaf}"


class _Copies:
    """A TensorSource whose tensors have other names in another."""

    def __init__(self, source: TensorSource, originals: dict[str, str]) -> None:
        self._source, self._originals = source, originals

    def __contains__(self, name: str) -> bool:
        return name in self._originals

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._originals[name])

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._source.read(self._originals[name], start, stop)


def _names(target: str, path: str) -> bool:
    leaf = path.rpartition(".")[2]
    return target in (ALL_NORMS, leaf) or fnmatch.fnmatchcase(path, target)
