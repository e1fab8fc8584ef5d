"""Every op, with its reference, its plain alternative, shapes, FLOPs and bytes."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from dtune_kernels.library import CATALOG, Cost, Op, Shape

SMALL = Shape(
    "small", tokens=6, hidden=24, ffn=40, heads=3, kv_heads=1, head_dim=8, vocab=50, rank=4
)
LLAMA_1B = Shape(
    "1b", tokens=8192, hidden=2048, ffn=8192, heads=32, kv_heads=8, head_dim=64, vocab=128256
)
LLAMA_8B = Shape(
    "8b", tokens=8192, hidden=4096, ffn=14336, heads=32, kv_heads=8, head_dim=128, vocab=128256
)
LLAMA_70B = Shape(
    "70b", tokens=4096, hidden=8192, ffn=28672, heads=64, kv_heads=8, head_dim=128, vocab=128256
)
SHAPES = {shape.name: shape for shape in (SMALL, LLAMA_1B, LLAMA_8B, LLAMA_70B)}


def _define_all() -> None:
    """Import every package beside this file that has ops: there is no list of them."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.ispkg:
            importlib.import_module(f"dtune_kernels.{module.name}.ops")


_define_all()

__all__ = ["CATALOG", "LLAMA_1B", "LLAMA_8B", "LLAMA_70B", "SHAPES", "SMALL", "Cost", "Op", "Shape"]
