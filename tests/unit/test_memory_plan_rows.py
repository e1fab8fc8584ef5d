"""The memory rows of ``dtune plan``, as a user reads them."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch

from dtune.cli import main
from dtune.optim.schema import OPTIM

ADAPTER = 155_648
"""Parameters of LoRA of rank 16 on every linear of the embedded model."""


TOTAL = "total on the device"
HOST = "in host memory"
WORKSPACE = "workspace of a block or the head"


def told(capsys: pytest.CaptureFixture[str], *overrides: str) -> dict[str, int]:
    argv = ["plan", "experiment=quickstart", "kernels=torch", *overrides]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("GiB "))
    rows = {}
    for line in lines[start + 1 :]:
        name, size = line[: lines[start].index("low") - 7].strip(), line.split()[-1]
        rows[name] = int(size.replace(",", ""))
        if name == TOTAL:
            break
    host = [line for line in lines if line.startswith("in host memory: ")]
    return {**rows, HOST: int(host[0].split()[-2].replace(",", "")) if host else 0}


def test_rows_follow_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    plain = told(capsys)
    assert plain["trained parameters"] == plain["gradients"] == 4 * ADAPTER
    assert plain["optimizer state"] == 8 * ADAPTER
    assert plain[TOTAL] == sum(plain.values()) - plain[TOTAL]
    full = told(capsys, "train.recompute=full")
    assert full["saved activations"] < 0.3 * plain["saved activations"]
    passes = ("saved activations", WORKSPACE, TOTAL)
    assert all(full.get(key) == plain[key] for key in plain if key not in passes)
    moved = told(capsys, "train.offload_activations=true")
    assert plain[HOST] == 0 < moved[HOST]
    assert moved["saved activations"] + moved[HOST] == plain["saved activations"]


def test_eight_bit_state_counts_its_scales_and_leaves_small_tensors_alone() -> None:
    sizes = (64 * 64, 64 * 65, 300, 10_000)
    config = OPTIM.config("adamw8bit")()
    parameters = [torch.nn.Parameter(torch.ones(size)) for size in sizes]
    optimizer = bnb.optim.AdamW8bit(parameters)
    for index, parameter in enumerate(parameters):
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)
        state = optimizer.state[parameter]
        held = sum(
            value.numel() * value.itemsize
            for key, value in state.items()
            if isinstance(value, torch.Tensor) and not key.startswith("qmap")
        )
        assert config.state_of(parameter.numel()) == held
