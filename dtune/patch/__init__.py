"""Puts kernels into a built model: one file a patch, in ``patches``."""
