"""Which optional packages are here: asked in this one place, without importing them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from functools import cache

from dtune.errors import ConfigError


@dataclass(frozen=True)
class OptionalPackage:
    """A package that dtune runs without, unless a setting asks for it."""

    module: str
    distribution: str
    extra: str
    """Extra of dtune that installs it; empty where torch brings it."""


OPTIONAL = {
    package.module: package
    for package in (
        OptionalPackage("deepspeed", "deepspeed", "deepspeed"),
        OptionalPackage("bitsandbytes", "bitsandbytes", "bitsandbytes"),
        OptionalPackage("flash_attn", "flash-attn", "flash-attn"),
        OptionalPackage("tensorboard", "tensorboard", "tensorboard"),
        OptionalPackage("wandb", "wandb", "wandb"),
        OptionalPackage("optuna", "optuna", "search"),
        OptionalPackage("matplotlib", "matplotlib", "plot"),
        OptionalPackage("triton", "triton", ""),
    )
}


@cache
def is_installed(module: str) -> bool:
    """Whether a module of OPTIONAL can be imported."""
    # A mere folder of that name, as wandb writes one, is found too, but has no file to load.
    spec = importlib.util.find_spec(OPTIONAL[module].module)
    return spec is not None and spec.origin is not None


def version(distribution: str) -> str:
    """Version of an installed distribution; empty where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def how_to_install(module: str) -> str:
    """Command that installs a module of OPTIONAL."""
    extra = OPTIONAL[module].extra
    return f"pip install 'dtune[{extra}]'" if extra else "install the CUDA build of torch"


def require(module: str, key: str) -> None:
    """Raise ConfigError if a module that the setting ``key`` needs is not installed.

    Args:
        module: A name of OPTIONAL.
        key: The setting as the user wrote it, ``parallel=zero3``.
    """
    if not is_installed(module):
        name = OPTIONAL[module].distribution
        raise ConfigError(f"{key} needs {name}, which is not installed: {how_to_install(module)}")
