"""Every method and every quantised base on a GPU: the same steps as on a CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dtune.resources import resolve_path
from dtune.runtime.world import World
from tests.distributed.training import Setup, build, train
from tests.matrix.cells import Cell, legal_cells
from tests.matrix.check import LR, LR_OF, OPTIONS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CELLS = [cell for cell in legal_cells() if cell.engine == "single"]
STEPS = 5
# fp32 without TF32 on both sides: sums in another order, carried on by five steps.
LIMIT = 1e-3


def losses(world: World, setup: Setup, device: str) -> list[float]:
    there = replace(world, device=torch.device(device))
    built = build(there, setup)
    return [loss for loss, _ in train(there, built.engine, setup, range(STEPS), built.participant)]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_steps_equal_those_on_a_cpu(world: World, cell: Cell) -> None:
    setup = Setup(
        resolve_path("dtune://tiny"),
        peft=cell.peft,
        peft_options=OPTIONS.get(cell.peft, ()),
        quant=cell.quant,
        lr=LR_OF.get(cell.peft, LR),
        steps=STEPS,
    )
    here, there = losses(world, setup, "cpu"), losses(world, setup, "cuda")
    assert len(set(here)) == STEPS
    assert there == pytest.approx(here, rel=LIMIT)
