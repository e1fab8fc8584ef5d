"""What the plan says that a rank sends, against bytes counted on its sockets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from dtune.optim.schema import OPTIM
from dtune.parallel.footprint import Planned
from dtune.parallel.schema import PARALLEL, engines
from dtune.parallel.traffic import Collective
from dtune.runtime.schema import Precision
from tests.distributed.census import build_meta
from tests.distributed.pool import Pool
from tests.distributed.traffic import Traffic, wide_config
from tests.distributed.training import Setup

COUNT = "tests.distributed.traffic:count_step"
WITHIN = 0.02
"""gloo adds heads to messages; losses, norms and flags are collectives of a few bytes."""
BY_GLOO = {"reduce-scatter": 2, "all-gather": 1, "all-reduce": 1}
"""gloo has no reduce-scatter: it reduces everything everywhere, which is sent twice."""

SEVERAL = [engine for engine in engines() if engine != "single"]


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """A Llama whose linears outweigh all else."""
    folder = wide_config(tmp_path_factory.mktemp("wide"))
    return Setup(str(folder), random_weights=True)


@pytest.fixture(scope="module", params=[2, 4], ids=["ranks2", "ranks4"])
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    """Ranks whose sockets carry nothing else."""
    pool = Pool(request.param)
    yield pool
    pool.close()


def planned(setup: Setup, ranks: int) -> list[Collective]:
    """By the formulas."""
    precision = Precision(setup.precision)
    model, spec, method = build_meta(setup, precision)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    config = OPTIM.config(setup.optim)()
    optimizer = config.build(trained, rate_factor=method.rate_factor)
    micros = setup.micros // ranks
    facts = Planned(
        model, spec, optimizer, config.state_of, precision, ranks, accumulates=micros > 1
    )
    engine = PARALLEL.config(setup.engine)(**dict(setup.engine_options))
    return engine.traffic(facts, micros=micros)


def expected(setup: Setup, ranks: int) -> float:
    """Bytes that a rank sends with gloo."""
    return sum(BY_GLOO[one.name] * one.sent for one in planned(setup, ranks))


CASES = [
    (engine, peft, quant, precision)
    for engine in SEVERAL
    for peft, quant, precision in (
        ("full", "none", "fp32"),
        ("full", "none", "bf16"),
        ("lora", "none", "bf16"),
        ("lora", "nf4", "bf16"),
    )
]


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize(("engine", "peft", "quant", "precision"), CASES)
def test_a_rank_sends_what_was_planned(
    pool: Pool, setup: Setup, engine: str, peft: str, quant: str, precision: str, accumulated: int
) -> None:
    chosen = replace(
        setup,
        engine=engine,
        peft=peft,
        quant=quant,
        precision=precision,
        micros=accumulated * pool.size,
        # Nothing stays gathered: parameters of so small a model would.
        engine_options=(("param_persistence_threshold", 0),) if engine == "zero3" else (),
    )
    ranks: list[Traffic] = pool.run(COUNT, setup=chosen)
    sent = sum(one.sent for one in ranks) / pool.size
    right = expected(chosen, pool.size)
    assert sent == pytest.approx(right, rel=WITHIN)
    # The comparison rejects the plan of one gather, reduction or rank more or less.
    for wrong in (0.5, 0.75, 4 / 3, 1.5, 2.0):
        assert sent != pytest.approx(wrong * right, rel=WITHIN)


def test_hybrid_shards_reduce_over_their_replicas(pool: Pool, setup: Setup) -> None:
    if pool.size < 4:
        pytest.skip("two shards of two replicas are four ranks")
    options = (("shard_size", 2),)
    chosen = replace(setup, engine="fsdp", peft="full", engine_options=options, micros=pool.size)
    ranks: list[Traffic] = pool.run(COUNT, setup=chosen)
    sent = sum(one.sent for one in ranks) / pool.size
    assert [one.apart for one in planned(chosen, pool.size)] == [1, 1, 1, 2]
    assert sent == pytest.approx(expected(chosen, pool.size), rel=WITHIN)
