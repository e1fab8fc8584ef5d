"""DoRA: LoRA whose rows are scaled to a trained magnitude."""

from dtune_kernels.dora.autograd import dora_linear

__all__ = ["dora_linear"]
