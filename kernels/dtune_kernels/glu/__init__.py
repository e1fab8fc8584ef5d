"""Gated linear units: act(gate) * up."""

from dtune_kernels.glu.autograd import geglu, glu, swiglu

__all__ = ["geglu", "glu", "swiglu"]
