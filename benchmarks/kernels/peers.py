"""Other implementations, as far as they are installed."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

PEERS = {
    "bitsandbytes": "bitsandbytes",
    "liger": "liger_kernel.transformers.functional",
    "peft": "peft",
}
"""The name of an alternative begins with a key; the value is the module to import."""


@functools.cache
def has(peer: str) -> bool:
    """Whether a peer can be imported; what stands in its way is said on standard error."""
    try:
        importlib.import_module(PEERS[peer])
    except (ImportError, RuntimeError) as error:
        sys.stderr.write(f"{peer}: {error}\n")
        return False
    return True


def runs_liger(device: torch.device) -> bool:
    """Whether Liger's kernels, which are Triton, can run."""
    return has("liger") and device.type == "cuda"


def liger() -> Any:
    """Liger's functions."""
    return importlib.import_module(PEERS["liger"])


def liger_losses() -> dict[str, Callable[..., torch.Tensor]]:
    """Its fused linear cross entropy, as it is and with chunks of 8 times the rows."""
    fused = liger().liger_fused_linear_cross_entropy

    def run(options: dict[str, Any]) -> Callable[..., torch.Tensor]:
        return lambda hidden, weight, labels: fused(
            hidden, weight, labels, reduction="sum", **options
        )

    found = {"liger": run({})}
    if "chunk_mem_const" in inspect.signature(fused).parameters:
        found["liger, 8x chunks"] = run({"chunk_mem_const": 8})
    return found


@dataclass(frozen=True)
class QuantizedByBitsandbytes:
    """A weight in its NF4."""

    tensors: tuple[torch.Tensor, ...]
    """Codes and absmax; if nested, then also the scales of the scales, and the offset."""
    dequantize: Callable[..., torch.Tensor]
    """Takes the tensors."""


def quantized_by_bitsandbytes(weight: torch.Tensor, *, nested: bool) -> QuantizedByBitsandbytes:
    """Quantise to NF4 with blocks of 64."""
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=nested, quant_type="nf4"
    )

    def dequantize(codes: torch.Tensor, absmax: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        state2 = offset = None
        if rest:
            absmax2, offset = rest
            own = state.state2
            state2 = functional.QuantState(
                absmax=absmax2, code=own.code, blocksize=own.blocksize, dtype=own.dtype
            )
        whole = functional.QuantState(
            absmax=absmax,
            shape=state.shape,
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
            offset=offset,
            state2=state2,
        )
        result: torch.Tensor = functional.dequantize_4bit(codes, whole)
        return result

    tensors = (codes, state.absmax)
    if nested:
        tensors = (*tensors, state.state2.absmax, state.offset)
    return QuantizedByBitsandbytes(tensors, dequantize)


class _Linears(nn.Module):
    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            self.add_module(name, linear)


def peft_linears(
    weights: Mapping[str, torch.Tensor],
    adapters: Mapping[str, Sequence[torch.Tensor]],
    *,
    scale: float,
    dtype: torch.dtype,
) -> tuple[list[nn.Module], tuple[torch.Tensor, ...]]:
    """Linears with PEFT's adapters, and their trained tensors: A, B, and the magnitude of DoRA.

    Args:
        weights: Of each linear [O, K], frozen.
        adapters: Of each A [R, K] and B [O, R]; with a third, the magnitude [O], it is DoRA.
        scale: Of all adapters.
        dtype: Of the adapters.
    """
    from peft import LoraConfig, inject_adapter_in_model

    first = next(iter(adapters.values()))
    rank = first[0].shape[0]
    config = LoraConfig(
        r=rank,
        lora_alpha=scale * rank,
        lora_dropout=0.0,
        target_modules=list(weights),
        use_dora=len(first) > 2,
    )
    model = inject_adapter_in_model(config, _Linears(weights))
    modules, trained = [], []
    for name, values in adapters.items():
        module: Any = model.get_submodule(name)
        own = [module.lora_A["default"].weight, module.lora_B["default"].weight]
        if len(values) > 2:
            own.append(module.lora_magnitude_vector["default"].weight)
        for parameter, value in zip(own, values, strict=True):
            parameter.data = value.detach().to(dtype).clone()
            parameter.requires_grad_(True)
        modules.append(module)
        trained.extend(own)
    return modules, tuple(trained)
