"""Configs of how the frozen base is stored, one module each."""

from __future__ import annotations

from dataclasses import dataclass

from dtune.registry import Registry


@dataclass
class QuantConfig:
    """Storage of frozen linear weights."""

    name: str = "???"


QUANT: Registry[QuantConfig] = Registry("quant", QuantConfig, __name__)
