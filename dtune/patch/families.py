"""Facts about the model families that patches know, by the name of a module's class.

A class is looked up in transformers' modules that are loaded, and compared by identity: a class of
another origin that has the same name is not taken.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from dtune.types import AddsTokens

_MODULES = {
    "Llama": "llama",
    "Mistral": "mistral",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3",
    "Gemma2": "gemma2",
    "Gemma3": "gemma3",
    "Phi3": "phi3",
    "Granite": "granite",
}
_GEMMA = ("Gemma2", "Gemma3")


def family_of(module: nn.Module, suffix: str) -> str:
    """``Llama`` for transformers' own ``LlamaRMSNorm`` with the suffix ``RMSNorm``; else empty."""
    cls = next(
        c
        for c in type(module).__mro__
        if "original_class" not in vars(c) and not issubclass(c, AddsTokens)
    )
    prefix = cls.__name__.removesuffix(suffix)
    folder = _MODULES.get(prefix, "")
    if not folder or not cls.__name__.endswith(suffix):
        return ""
    source = sys.modules.get(f"transformers.models.{folder}.modeling_{folder}")
    return prefix if source is not None and vars(source).get(cls.__name__) is cls else ""


@dataclass(frozen=True)
class NormFacts:
    """How a family's RMSNorm computes."""

    eps: float
    gemma: bool


def norm_facts(module: nn.Module) -> NormFacts | None:
    """Facts about an RMSNorm of a known family; None for any other module."""
    family = family_of(module, "RMSNorm")
    if not family:
        return None
    own: Any = module
    is_gemma = family in _GEMMA
    return NormFacts(float(own.eps if is_gemma else own.variance_epsilon), is_gemma)


@dataclass(frozen=True)
class BlockFacts:
    """Which norms of a decoder block have one reader, and which module that is."""

    norms: Mapping[str, str]
    """Name of the module that reads the norm's result -> name of the norm."""


def block_facts(block: nn.Module) -> BlockFacts | None:
    """Facts about a decoder block of a known family; None for any other module."""
    family = family_of(block, "DecoderLayer")
    if not family:
        return None
    before_mlp = "pre_feedforward_layernorm" if family in _GEMMA else "post_attention_layernorm"
    return BlockFacts({"self_attn": "input_layernorm", "mlp": before_mlp})


@dataclass(frozen=True)
class HeadFacts:
    """What a causal model does to the logits of its head."""

    scale: float
    softcap: float
    """Bound c of c * tanh(logits / c); 0 for none."""


def head_facts(model: nn.Module) -> HeadFacts | None:
    """Facts about a causal model of a known family; None for any other."""
    family = family_of(model, "ForCausalLM")
    if not family:
        return None
    config: Any = model.config
    scale = 1.0 / config.logits_scaling if family == "Granite" else 1.0
    softcap = (config.final_logit_softcapping or 0.0) if family in _GEMMA else 0.0
    return HeadFacts(float(scale), float(softcap))
