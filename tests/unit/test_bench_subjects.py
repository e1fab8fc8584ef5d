"""Steps as ``dtune bench`` builds them; tests/gpu/test_gpu_bench.py claims the same of a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtune.runtime.world import World
from tests.gpu.subjects import (
    assert_full_training_in_bf16,
    assert_kept_weights_change_no_bit,
    save_qwen3,
)


@pytest.mark.parametrize("kernels", ["torch", "reference"])
@pytest.mark.parametrize("documents", [1, 2])
def test_norms_of_queries_and_keys_leave_attention_in_bf16(
    world: World, tmp_path: Path, documents: int, kernels: str
) -> None:
    settings = ("model.attention=sdpa", f"kernels={kernels}")
    assert_full_training_in_bf16(
        world, save_qwen3(tmp_path), documents=documents, settings=settings
    )


@pytest.mark.parametrize("kernels", ["torch", "reference"])
def test_weights_that_stay_dequantised_change_no_bit(world: World, kernels: str) -> None:
    assert_kept_weights_change_no_bit(world, f"kernels={kernels}")
