"""Cross entropy of a linear head, computed without ever holding all logits."""

from dtune_kernels.cross_entropy.autograd import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
