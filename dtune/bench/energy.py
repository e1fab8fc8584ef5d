"""Energy of the GPUs of this machine, by NVML."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch


class EnergyMeter:
    """Joules that a device has taken since `start`; ``why_not`` says why there is no number.

    NVML counts for the whole device, whoever else uses it.
    """

    def __init__(self, device: torch.device) -> None:
        self.why_not = ""
        self._started = 0.0
        self._nvml: Any = None
        self._handle: Any = None
        if device.type != "cuda":
            self.why_not = "energy: only NVIDIA GPUs count it"
        elif importlib.util.find_spec("pynvml") is None:
            self.why_not = "energy: pip install nvidia-ml-py"
        else:
            self._open(device)

    def _open(self, device: torch.device) -> None:
        nvml: Any = importlib.import_module("pynvml")
        # The index of NVML is another one under CUDA_VISIBLE_DEVICES.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        try:
            nvml.nvmlInit()
            self._handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
            nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except nvml.NVMLError as error:
            self.why_not = f"energy: NVML says {error}"
        else:
            self._nvml = nvml

    def start(self) -> None:
        """Begin to count."""
        self._started = self._read()

    def joules(self) -> float | None:
        """Taken since `start`."""
        return None if self._nvml is None else self._read() - self._started

    def _read(self) -> float:
        if self._nvml is None:
            return 0.0
        # NVML counts millijoules since the driver was loaded.
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3


def total_joules(of_ranks: Sequence[float | None]) -> float | None:
    """Of all devices; None where one is not known."""
    known = [joules for joules in of_ranks if joules is not None]
    return sum(known) if len(known) == len(of_ranks) else None
