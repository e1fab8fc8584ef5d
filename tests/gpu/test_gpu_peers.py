"""Contestants of benchmarks/peers on a GPU, each in a world of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integration.peer_runs import prepared, side_by_side

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_contestants_do_the_same_work_in_bf16_on_the_device(tmp_path: Path) -> None:
    work = prepared(tmp_path, "device=cuda")
    assert (work.device, work.precision) == ("cuda", "bf16")
    for setting in ("plain", "recompute"):
        own, peer = side_by_side(work, setting, "dtune", "hf-peft")
        for one in (own, peer):
            assert min(one.step_seconds) > 0
            assert one.peak_allocated_bytes
            assert one.peak_reserved_bytes
            assert one.peak_reserved_bytes >= one.peak_allocated_bytes
            assert one.loss_last < one.loss_first
