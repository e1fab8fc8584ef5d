"""Triton kernels of dtune: ops with a plain PyTorch reference. Imports torch and triton only."""
