"""States of the random number generators, as tensors."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import numpy as np
import torch


def capture_rng(device: torch.device) -> dict[str, torch.Tensor]:
    """States of Python's, NumPy's, and torch's generators on CPU and on the device."""
    version, words, gauss = random.getstate()
    assert version == 3, version
    kind, key, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert kind == "MT19937", kind
    states = {
        "python": torch.tensor(words, dtype=torch.int64),
        # NaN: no second value of a pair is waiting.
        "python_gauss": torch.tensor([math.nan if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor([*map(int, key), int(position), int(has_gauss)], dtype=torch.int64),
        "numpy_gauss": torch.tensor([float(cached)], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_rng(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Set every generator that both the states and this machine have."""
    gauss = states["python_gauss"].item()
    words = tuple(states["python"].tolist())
    random.setstate((3, words, None if math.isnan(gauss) else gauss))
    *key, position, has_gauss = states["numpy"].tolist()
    cached = states["numpy_gauss"].item()
    np.random.set_state(("MT19937", np.array(key, np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
