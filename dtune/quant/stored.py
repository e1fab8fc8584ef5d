"""Whether a run keeps linears as a checkpoint does that is quantised already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from enum import Enum

from torch import nn

from dtune.errors import ConfigError
from dtune.quant.schema import ByteConfig, QuantConfig
from dtune.types import ModelSpec, Renamer

_ORIGINAL = "or give the model as it was before it was quantised"


def check_stored_settings(config: QuantConfig, spec: ModelSpec) -> None:
    """ConfigError with the settings to use where ``quant`` would keep linears in another way."""
    if spec.quantized is None:
        return
    wanted = spec.quantized.settings
    ours = {k: v.value if isinstance(v, Enum) else v for k, v in asdict(config).items()}
    if all(ours.get(key) == value for key, value in wanted.items()):
        return
    raise ConfigError(
        f"model.path={spec.path} is quantised already, by bitsandbytes, and the run has "
        f"quant={config.name}, which does not keep its bytes: set {_as_settings(wanted)}, "
        f"{_ORIGINAL}"
    )


def with_stored_floats(config: QuantConfig, spec: ModelSpec) -> QuantConfig:
    """``quant`` that leaves those linears floats which a quantised checkpoint holds as floats."""
    if spec.quantized is None or not isinstance(config, ByteConfig):
        return config
    floats = [path for path in spec.linears if path not in spec.quantized.linears]
    return replace(config, skip=[*config.skip, *floats])


def check_stored_linears(model: nn.Module, spec: ModelSpec, stored_name: Renamer) -> None:
    """ConfigError where other linears became bytes than those that the checkpoint has as bytes."""
    if spec.quantized is None:
        return
    names = (stored_name(name) for name, _ in model.named_parameters())
    kept = {name.removesuffix(".codes") for name in names if name.endswith(".codes")}
    more, fewer = sorted(kept - spec.quantized.linears), sorted(spec.quantized.linears - kept)
    if more:
        raise ConfigError(
            f"model.path={spec.path} is quantised already and holds linears as floats that the run "
            f"would quantise; put {', '.join(more)} into quant.skip"
        )
    if fewer:
        raise ConfigError(
            f"model.path={spec.path} holds {fewer[0]} quantised (and {len(fewer) - 1} more), but "
            "the run trains it or quant.skip names it: leave it out of quant.skip, set a peft that "
            f"freezes it, {_ORIGINAL}"
        )


def check_stored_base(spec: ModelSpec, *, changed: bool) -> None:
    """ConfigError where a method computes other base weights from those that are stored."""
    if changed and spec.quantized is not None:
        raise ConfigError(
            f"model.path={spec.path} is quantised already, but this peft takes a part out of the "
            f"weights, which would have to be quantised anew: set peft.init=default, {_ORIGINAL}"
        )


def _as_settings(settings: Mapping[str, str | int | bool]) -> str:
    parts = []
    for key, value in settings.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        parts.append(f"quant={text}" if key == "name" else f"quant.{key}={text}")
    return " ".join(parts)
