"""RMSNorm: y = w * x / rms(x), with or without a residual added first."""

from dtune_kernels.rms_norm.autograd import add_rms_norm, rms_norm

__all__ = ["add_rms_norm", "rms_norm"]
