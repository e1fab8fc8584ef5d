"""Hydra launcher of dtune: each trial of a sweep is its own process tree and run folder."""
