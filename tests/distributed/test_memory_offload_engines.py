"""Activations in host memory under every engine: the same losses and norms, to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dtune.parallel.schema import engines
from dtune.runtime.world import World
from tests.distributed.pool import Pool
from tests.distributed.training import Setup, config_folder, curve

BOTH = "tests.distributed.test_memory_offload_engines:with_and_without"


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = config_folder(tmp_path_factory.mktemp("llama"), blocks=3)
    return Setup(str(folder), steps=2, micros=4, packed=True, random_weights=True)


def with_and_without(world: World, *, setup: Setup) -> list[list[tuple[float, float]]]:
    return [curve(world, setup=replace(setup, offload=offload)) for offload in (True, False)]


CASES = [
    (engine, peft, recompute)
    for engine in engines()
    for peft, recompute in (("full", "none"), ("lora", "full"), ("lora", "selective"))
    # Which dtune/config/support.py forbids.
    if (engine, recompute) != ("zero3", "selective")
]


@pytest.mark.parametrize(("engine", "peft", "recompute"), CASES)
def test_no_number_changes(
    two_ranks: Pool, setup: Setup, engine: str, peft: str, recompute: str
) -> None:
    chosen = replace(setup, engine=engine, peft=peft, recompute=recompute, precision="bf16")
    offloaded, plain = two_ranks.run(BOTH, setup=chosen)[0]
    assert offloaded == plain
