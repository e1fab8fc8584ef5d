"""Triton kernels of dtune: ops with a plain PyTorch reference. Imports torch and triton only.

Every op ``dtune::name`` runs its reference on the CPU and its Triton kernel on a GPU. What a model
calls are the differentiable functions of the op packages (``rms_norm.rms_norm``, ...); ``catalog``
lists all ops with their shapes, FLOPs and bytes.
"""
