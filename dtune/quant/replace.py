"""Which linears become bytes, and their replacement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from dtune.errors import ConfigError
from dtune.quant.layout import FourBitLayout, Int8Layout, Layout
from dtune.quant.linear import QuantizedLinear
from dtune.quant.schema import ByteConfig, FourBitConfig
from dtune.quant.source import QuantizedSource
from dtune.quant.stored import check_stored_linears, check_stored_settings
from dtune.runtime.logs import log
from dtune.types import ModelSpec, Renamer, Role, TensorSource

ALL_LINEAR = "all-linear"
GIB = 1 << 30

LayoutOf = Callable[[tuple[int, int]], Layout]


def fourbit_quantizer(config: FourBitConfig, device: torch.device) -> ByteQuantizer:
    """Build what keeps weights in four bits."""

    def layout_of(shape: tuple[int, int]) -> Layout:
        return FourBitLayout(shape, config.name, config.block_size, config.double)

    return ByteQuantizer(config, layout_of, device)


def int8_quantizer(config: ByteConfig, device: torch.device) -> ByteQuantizer:
    """Build what keeps weights in eight bits."""
    return ByteQuantizer(config, Int8Layout, device)


class ByteQuantizer:
    """Replaces frozen linears by such that keep their weight as bytes."""

    def __init__(self, config: ByteConfig, layout_of: LayoutOf, device: torch.device) -> None:
        self._config = config
        self._layout_of = layout_of
        self._device = device
        self._layouts: dict[str, Layout] = {}

    def quantize(
        self, model: nn.Module, spec: ModelSpec, stored_name: Renamer
    ) -> Mapping[str, int]:
        """Replace the frozen linears of a meta model, in place, but for those that are skipped.

        Raises:
            ConfigError: A name in ``quant.skip`` matches nothing, no linear is left, or the
                checkpoint is quantised in another way.
        """
        check_stored_settings(self._config, spec)
        stored_paths = _stored_paths(model, spec, stored_name)
        kept = plan_skipped(self._config.skip, spec, _in_blocks(model, spec, stored_paths))
        shared = _shared(model)
        replaced: dict[nn.Module, QuantizedLinear] = {}
        for path, stored in stored_paths.items():
            module = model.get_submodule(path)
            assert isinstance(module, nn.Linear), path
            if module.weight.requires_grad or stored in kept or module.weight in shared:
                continue
            layout = self._layout_of((module.out_features, module.in_features))
            self._layouts[path] = layout
            replaced[module] = QuantizedLinear(layout, module.bias, module.weight.device)
        if not replaced:
            raise ConfigError(
                f"quant={self._config.name}: no linear is left to quantise, as each is trained, "
                f"tied to the embedding, or named by quant.skip={self._config.skip}; set "
                "quant=none, or take names out of quant.skip"
            )
        for parent in list(model.modules()):
            for name, child in parent._modules.items():
                if child in replaced:
                    parent._modules[name] = replaced[child]
        check_stored_linears(model, spec, stored_name)
        return {"QuantizedLinear": len(replaced)}

    def cache(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Keep weights of a loaded model dequantised, one after another, as ``cache_gib`` allows.

        Raises:
            ConfigError: It has no room for any.
        """
        if not self._config.cache_gib:
            return
        room = int(self._config.cache_gib * GIB)
        linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
        left, kept = room, 0
        for linear in linears:
            size = linear.layout.numel * dtype.itemsize
            if size <= left:
                linear.keep_floats(dtype)
                left, kept = left - size, kept + 1
        if not kept:
            least = min(linear.layout.numel for linear in linears) * dtype.itemsize
            raise ConfigError(
                f"quant.cache_gib={self._config.cache_gib:g} has no room for any weight: the "
                f"smallest takes {least / GIB:.3g} GiB; raise it, or set quant.cache_gib=0"
            )
        log.info(
            "quant.cache_gib=%g: %d of %d weights stay dequantised, %.3g GiB",
            self._config.cache_gib,
            kept,
            len(linears),
            (room - left) / GIB,
        )

    def source(self, weights: TensorSource) -> TensorSource:
        """``weights`` with the bytes of what was replaced."""
        return QuantizedSource(weights, self._layouts, self._device)


def _stored_paths(model: nn.Module, spec: ModelSpec, stored_name: Renamer) -> dict[str, str]:
    """Path of every plain linear of the checkpoint -> its path there."""
    paths = {}
    for path, module in model.named_modules():
        stored = stored_name(f"{path}.weight").removesuffix(".weight")
        if type(module) is nn.Linear and stored in spec.linears:
            paths[path] = stored
    return paths


def _in_blocks(model: nn.Module, spec: ModelSpec, stored_paths: Mapping[str, str]) -> list[str]:
    """Stored paths of the linears of the repeated blocks."""
    named = model.named_modules()
    blocks = tuple(f"{path}." for path, module in named if isinstance(module, spec.block_types))
    return [stored for path, stored in stored_paths.items() if path.startswith(blocks)]


def _shared(model: nn.Module) -> set[nn.Parameter]:
    """Parameters of several modules, such as the weight of a head that is tied to the embedding."""
    owners = Counter(p for module in model.modules() for p in module._parameters.values())
    return {parameter for parameter, count in owners.items() if parameter is not None and count > 1}


def plan_skipped(skip: Sequence[str], spec: ModelSpec, in_blocks: Sequence[str]) -> set[str]:
    """Dotted paths in the checkpoint of the linears that stay as they are.

    A name is a role (``all-linear`` is every linear of the blocks), the last component of a path,
    or a glob over whole paths. ConfigError for one that matches nothing; only ``head`` may.
    """
    roles = {role.value: [p for p, own in spec.linears.items() if own is role] for role in Role}
    roles[ALL_LINEAR] = list(in_blocks)
    chosen: set[str] = set()
    for name in skip:
        found = roles.get(name) or spec.linears_named(name)
        # The default names the head, which a model may lack.
        if not found and name != Role.head.value:
            there = [role for role, paths in roles.items() if paths]
            raise spec.no_linear_error("quant.skip", name, there)
        chosen.update(found)
    return chosen
