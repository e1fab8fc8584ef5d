"""Linears with low-rank adapters (LoRA) on frozen weights: alone, in groups, and as gated MLPs."""

from dtune_kernels.lora.autograd import lora_linear, lora_linears, lora_mlp
from dtune_kernels.lora.types import Adapter, Linear, Norm

__all__ = ["Adapter", "Linear", "Norm", "lora_linear", "lora_linears", "lora_mlp"]
