"""Random numbers: one seed, streams of their own for ranks."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_everything(seed: int, rank: int) -> None:
    """Seed Python, NumPy and torch. Ranks differ, so that dropout is independent between them.

    Initial values and the order of data do not come from these streams: they are keyed by name,
    epoch and seed, and equal for every number of ranks.
    """
    mixed = (seed * 1_000_003 + rank) % 2**32
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)
