"""Tokens per second and memory of each method, measured: ``dtune bench``."""
