"""What ``dtune plan`` says of memory is what a rank holds: counted, to the byte."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dtune.optim.schema.adamw import Flat
from dtune.parallel.schema import engines
from dtune.resources import resolve_path
from tests.distributed.census import LIVE, plan
from tests.distributed.peak_cases import settings
from tests.distributed.pool import Pool
from tests.distributed.training import Setup, config_folder

CENSUS = "tests.distributed.census:take_census"
TINY = Setup(resolve_path("dtune://tiny"), packed=True, steps=2, lr=1e-4)


def fullest(ranks: list[dict[str, int]]) -> dict[str, int]:
    """The most that any rank holds of each."""
    return {key: max(rank[key] for rank in ranks) for key in LIVE}


TRAINED = [
    ("full", "none", "fp32", "none"),
    ("full", "none", "bf16", "selective"),
    ("lora", "none", "bf16", "none"),
    ("lora", "none", "fp32", "full"),
    ("lora", "nf4", "bf16", "none"),
    ("lora", "nf4", "bf16", "full"),
]


CASES = [
    replace(TINY, engine=engine, peft=peft, quant=quant, precision=precision, recompute=recompute)
    for engine in engines()
    for peft, quant, precision, recompute in TRAINED
    # Which dtune/config/support.py forbids.
    if (engine, recompute) != ("zero3", "selective")
]


def shown(setup: Setup) -> str:
    return "-".join((setup.engine, setup.peft, setup.quant, setup.precision, setup.recompute))


@pytest.mark.parametrize("setup", CASES, ids=shown)
def test_the_tiny_model_takes_what_was_planned(two_ranks: Pool, setup: Setup) -> None:
    planned = plan(setup, ranks=2)
    assert fullest(two_ranks.run(CENSUS, setup=setup, planned=planned)) == planned


@pytest.mark.parametrize("peft", ["lora", "bitfit"])
@pytest.mark.parametrize("engine", ["single", "ddp"])
def test_one_buffer_takes_what_was_planned(two_ranks: Pool, engine: str, peft: str) -> None:
    """With what is left free between parameters, which biases are too short to begin without."""
    flat = replace(TINY, engine=engine, peft=peft, optim_options=(("flat", Flat.always),))
    planned = plan(flat, ranks=2)
    assert fullest(two_ranks.run(CENSUS, setup=flat, planned=planned)) == planned


PEAKS = "tests.distributed.peak_cases:peaks"
FEW = ("launch.nproc=2", "train.micro_batch_size=1", "precision=bf16")


@pytest.mark.parametrize(
    "chosen",
    [
        ("parallel=ddp", "peft=full", "train.global_batch_size=4"),
        ("parallel=ddp", "peft=lora", "train.global_batch_size=4", "optim.flat=always"),
        ("parallel=ddp", "peft=full", "train.global_batch_size=2"),
    ],
    ids=["what was added up beside buckets", "one buffer", "in buckets"],
)
def test_the_peak_of_a_step_is_what_was_planned(two_ranks: Pool, chosen: tuple[str, ...]) -> None:
    run = settings(*FEW, *chosen)
    for planned, counted in two_ranks.run(PEAKS, run=run):
        assert planned == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_a_wrong_number_is_noticed(two_ranks: Pool, engine: str) -> None:
    """The comparison rejects the plan of another recomputation, method, precision or size."""
    setup = replace(TINY, engine=engine, peft="lora")
    live = fullest(two_ranks.run(CENSUS, setup=setup, planned=plan(setup, ranks=2)))
    assert plan(setup, ranks=2, recompute="full")["activations"] < 0.9 * live["activations"]
    assert plan(replace(setup, precision="bf16"), ranks=2)["frozen"] == live["frozen"] // 2
    other = plan(replace(setup, peft="full"), ranks=2)
    assert all(other[key] > 1.1 * live[key] for key in ("masters", "gradients", "optimizer"))
    alone = plan(setup, ranks=1)
    shared = [key for key in LIVE if alone[key] > 1.1 * live[key]]
    assert shared == ([] if engine == "ddp" else ["frozen", "masters", "copies", *LIVE[3:5]])


LARGE = [
    ("single", "full", "none"),
    ("single", "lora", "selective"),
    ("ddp", "lora", "full"),
    ("fsdp", "full", "full"),
    ("fsdp", "lora", "selective"),
    ("zero1", "lora", "none"),
    ("zero2", "full", "none"),
    ("zero3", "lora", "none"),
    ("zero3", "full", "full"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "peft", "recompute"), LARGE)
def test_a_model_of_200_mb_takes_what_was_planned(
    two_ranks: Pool,
    tmp_path_factory: pytest.TempPathFactory,
    engine: str,
    peft: str,
    recompute: str,
) -> None:
    folder = config_folder(tmp_path_factory.mktemp("large"), blocks=8, hidden=1024)
    setup = Setup(
        str(folder), engine=engine, peft=peft, recompute=recompute, packed=True, random_weights=True
    )
    planned = plan(setup, ranks=2)
    weights = planned["frozen"] + planned["masters"]
    assert weights > 100e6 if engine in ("fsdp", "zero3") or peft == "full" else weights > 200e6
    assert fullest(two_ranks.run(CENSUS, setup=setup, planned=planned)) == planned
