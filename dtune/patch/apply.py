"""Applies patches to a built model, says what was replaced, and takes it back."""

from __future__ import annotations

import difflib

import torch
from dtune_kernels.errors import KernelUnavailable
from dtune_kernels.launch import require_triton, triton_problem
from torch import nn

from dtune.errors import ConfigError
from dtune.patch.base import (
    PATCHES,
    PatchRow,
    is_replaced,
    patch_names,
    restore_forward,
    rows_of,
)
from dtune.patch.fused import remove_fused
from dtune.patch.schema import Backend, KernelsConfig
from dtune.runtime.logs import log
from dtune.types import ModelSpec


def why_not_here(config: KernelsConfig) -> str:
    """Why this machine's device cannot run the patches; empty if it can."""
    if config.name not in (Backend.triton, Backend.auto):
        return ""
    return triton_problem(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def choose_patches(config: KernelsConfig, device: torch.device | None) -> tuple[str, ...]:
    """Names of the patches that run on the device; None stands for one that runs them all.

    Raises:
        ConfigError: ``kernels=triton`` where it cannot run, with the reason; ``kernels=reference``
            on a GPU, where the ops run Triton.
    """
    if config.name is Backend.torch:
        return ()
    if device is None:
        return tuple(config.patches)
    if config.name is Backend.triton:
        try:
            require_triton(device, key="kernels")
        except KernelUnavailable as error:
            raise ConfigError(str(error)) from error
    if config.name is Backend.auto and (problem := triton_problem(device)):
        log.info("kernels=auto patches nothing here: %s", problem)
        return ()
    if config.name is Backend.reference and device.type != "cpu":
        raise ConfigError(
            f"kernels=reference is for checks on a CPU, this is {device.type}; set kernels=auto"
        )
    return tuple(config.patches)


def apply_patches(
    model: nn.Module, names: tuple[str, ...], spec: ModelSpec, *, required: bool = True
) -> list[PatchRow]:
    """Replace modules in place; a row for each kind of module that was replaced, or kept and why.

    Raises:
        ConfigError: A patch does not exist, or, if they are ``required``, none of them finds
            anything in this model.
    """
    assert not any(map(is_replaced, model.modules())), "the model is patched; unpatch it first"
    known = patch_names()
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"kernels.patches: no patch {name!r}; {hint}There are {list(known)}")
    rows: list[PatchRow] = []
    enabled = frozenset(names)
    for name in sorted(enabled, key=lambda name: (PATCHES[name].stage.value, name)):
        found = PATCHES[name].plan(model, spec, enabled)
        for change in found.changes:
            change.apply()
        rows.extend(rows_of(name, found))
    if required and names and not any(row.reason == "" for row in rows):
        raise ConfigError(
            f"kernels.patches={list(names)} match no module of {spec.family} ({spec.path})"
            + "".join(f"; {row}" for row in rows)
            + "; set kernels=torch"
        )
    return rows


def unpatch(model: nn.Module) -> int:
    """Take back every patch; the number of modules that are as they were again.

    Not after an engine (FSDP) has put a class of its own over a patched module.
    """
    for module in model.modules():
        covered = is_replaced(module) and "original_class" not in vars(type(module))
        assert not covered, f"{type(module).__name__} covers a patch; unpatch before the engine"
    restored = sum(restore_forward(module) for module in list(model.modules()))
    remove_fused(model)
    return restored
