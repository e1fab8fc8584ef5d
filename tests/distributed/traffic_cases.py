"""Steps whose traffic is counted, what the plan says of each, and whether the two agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from dtune.optim.schema import OPTIM
from dtune.parallel import traffic as formulas
from dtune.parallel.footprint import Planned
from dtune.parallel.schema import PARALLEL, engines
from dtune.parallel.traffic import Collective
from dtune.plan.memory import MemoryRequest, planned_of
from dtune.runtime.schema import Precision, Recompute
from tests.distributed.census import build_meta
from tests.distributed.pool import Pool
from tests.distributed.traffic import Traffic
from tests.distributed.training import Setup

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "communication-cpu.json"
COUNT = "tests.distributed.traffic:count_step"

BY_KIND = 0.001
"""A ring's shares of single collectives are rounded."""
ON_SOCKETS = 0.02
"""Losses, norms and flags are collectives of a few bytes."""
HEAD = 512
"""Bytes that gloo adds to a collective for each rank, at most."""
BY_GLOO = {"reduce-scatter": 2, "all-gather": 1, "all-reduce": 1}
"""gloo has no reduce-scatter: it reduces everything everywhere, which is sent twice."""

SEVERAL = tuple(engine for engine in engines() if engine != "single")
METHODS = (
    ("full", "none", "fp32"),
    ("full", "none", "bf16"),
    ("lora", "none", "bf16"),
    ("lora", "nf4", "bf16"),
    ("ia3", "none", "bf16"),
)
WHOLE = (("param_persistence_threshold", 0),)
"""Nothing stays gathered: parameters of so small a model would."""


@dataclass(frozen=True)
class Case:
    """One way to train."""

    engine: str
    peft: str
    quant: str = "none"
    precision: str = "bf16"
    micros: int = 1
    """Micro batches of a rank in a step."""
    options: tuple[tuple[str, Any], ...] = ()
    """Of the engine."""
    recompute: str = "none"
    reach: int = 0
    """As ``count_step`` takes it."""
    least: int = 2
    """Ranks below which there is no such case."""

    def __str__(self) -> str:
        words = [self.engine, self.peft, self.quant, self.precision, f"micros{self.micros}"]
        words += [f"{key}={value}" for key, value in self.options if (key, value) not in WHOLE]
        words += [f"recompute={self.recompute}"] if self.recompute != "none" else []
        return "-".join([*words, *([f"reach={self.reach}"] if self.reach else [])])

    def setup(self, folder: Path, ranks: int) -> Setup:
        """For ``count_step``."""
        return Setup(
            str(folder),
            engine=self.engine,
            engine_options=self.options,
            peft=self.peft,
            quant=self.quant,
            precision=self.precision,
            micros=self.micros * ranks,
            recompute=self.recompute,
            random_weights=True,
        )


def _every() -> Iterable[Case]:
    for engine in SEVERAL:
        options = WHOLE if engine == "zero3" else ()
        for peft, quant, precision in METHODS:
            yield Case(engine, peft, quant, precision, 2, options)
        for peft in ("full", "lora"):
            yield Case(engine, peft, options=options)


CASES = (
    *_every(),
    Case("ddp", "lora", options=(("one_bucket_mib", 0), ("bucket_mib", 1))),
    Case("fsdp", "lora", options=(("reshard_after_forward", False),)),
    Case("fsdp", "full", recompute="full"),
    Case("fsdp", "full", options=(("shard_size", 2),), least=4),
    Case("fsdp", "lora", micros=2, options=(("shard_size", 2),), least=4),
    # What is small stays gathered.
    Case("zero3", "lora", micros=2, options=(("param_persistence_threshold", 40_000),)),
    # Of a model that is too large for everything to stay from forward to backward.
    Case("zero3", "full", options=WHOLE, reach=1_000_000),
    Case("zero3", "full", micros=2, options=WHOLE, reach=700_000),
)


def planned(case: Case, folder: Path, ranks: int) -> list[Collective]:
    """By the formulas."""
    facts = _facts(str(folder), case.peft, case.quant, case.precision)
    engine = PARALLEL.config(case.engine)(**dict(case.options))
    reach = case.reach or formulas.ZERO3_LIVE
    with patch.object(formulas, "ZERO3_LIVE", reach):
        of_ranks = replace(facts, ranks=ranks, accumulates=case.micros > 1)
        return engine.traffic(of_ranks, micros=case.micros)


@cache
def _facts(folder: str, peft: str, quant: str, precision: str) -> Planned:
    """Of one rank, since all but their number is the same for more."""
    setup = Setup(folder, peft=peft, quant=quant, precision=precision)
    model, spec, method = build_meta(setup, Precision(precision))
    request = MemoryRequest(
        parallel=PARALLEL.config("single")(),
        optim=OPTIM.config(setup.optim)(),
        precision=Precision(precision),
        recompute=Recompute.none,
        offload=False,
        ranks=1,
        accumulates=False,
        device=torch.device("cpu"),
        rate_factor=method.rate_factor,
    )
    return planned_of(model, spec, request)


def by_kind(collectives: Iterable[Collective]) -> dict[str, int]:
    """Bytes of each kind over so many ranks."""
    found: Counter[str] = Counter()
    for one in collectives:
        found[f"{one.name}/{one.ranks}"] += one.sent
    return dict(found)


def count(pool: Pool, case: Case, folder: Path) -> dict[str, Any]:
    """Train a step on the ranks of a pool; what each of them sent, as a row of the results."""
    ranks: list[Traffic] = pool.run(
        COUNT, setup=case.setup(folder, pool.size), reach=case.reach, timeout=900.0
    )
    first = ranks[0]
    assert all(one.collectives == first.collectives for one in ranks), "ranks differ"
    return {
        "case": str(case),
        "ranks": pool.size,
        "trained": first.trained,
        "frozen": first.frozen,
        "counted": first.by_kind(),
        "times": first.times(),
        "sockets": sum(one.sent for one in ranks) // pool.size,
    }


def differences(collectives: list[Collective], row: dict[str, Any]) -> list[str]:
    """Where a row is not what is planned."""
    counted, right = row["counted"], by_kind(collectives)
    found = [
        f"{kind}: {counted.get(kind, 0):,} counted, {right.get(kind, 0):,} planned"
        for kind in sorted(counted | right)
        if abs(counted.get(kind, 0) - right.get(kind, 0)) > BY_KIND * counted.get(kind, 0)
    ]
    sent = sum(BY_GLOO[one.name] * one.sent for one in collectives)
    heads = HEAD * row["ranks"] * sum(row["times"].values())
    if abs(row["sockets"] - sent) > ON_SOCKETS * sent + heads:
        found.append(f"sockets: {row['sockets']:,} counted, {sent:,} planned")
    return found
