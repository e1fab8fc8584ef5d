"""What the plan says that a rank sends, against collectives and sockets of running engines.

Steps on two ranks are counted here; those on 2, 4 and 8 are results, which
``python -m tests.distributed.traffic_run`` writes anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dtune.parallel import traffic as formulas
from dtune.parallel.traffic import Collective
from tests.distributed.pool import Pool
from tests.distributed.traffic import wide_config
from tests.distributed.traffic_cases import (
    BY_KIND,
    CASES,
    RESULT,
    SEVERAL,
    WHOLE,
    Case,
    count,
    differences,
    planned,
)

BY_NAME = {str(case): case for case in CASES}
WORLDS = (2, 4, 8)

Row = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose linears outweigh all else."""
    return wide_config(tmp_path_factory.mktemp("wide"))


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """What was counted on 2, 4 and 8 ranks."""
    found: list[Row] = json.loads(RESULT.read_text(encoding="utf-8"))["rows"]
    return found


@pytest.mark.parametrize("case", [case for case in CASES if case.least <= 2], ids=str)
def test_a_rank_sends_what_was_planned(two_ranks: Pool, folder: Path, case: Case) -> None:
    row = count(two_ranks, case, folder)
    right = planned(case, folder, two_ranks.size)
    assert differences(right, row) == []
    # The comparison rejects a plan in which any collective is a tenth off, or not there.
    for index, one in enumerate(right):
        for factor in (0.0, 0.9, 1.1):
            wrong: list[Collective] = [*right]
            wrong[index] = replace(one, sent=round(factor * one.sent))
            assert differences(wrong, row)


def test_every_case_was_counted_on_2_4_and_8_ranks(rows: list[Row]) -> None:
    wanted = {(str(case), size) for case in CASES for size in WORLDS if size >= case.least}
    assert {(row["case"], row["ranks"]) for row in rows} == wanted
    assert len(rows) == len(wanted)


def test_the_formulas_hold_on_2_4_and_8_ranks(rows: list[Row], folder: Path) -> None:
    def problems(row: Row) -> list[str]:
        return differences(planned(BY_NAME[row["case"]], folder, row["ranks"]), row)

    assert {(row["case"], row["ranks"]): found for row in rows if (found := problems(row))} == {}


def share_of_all(count: int, size: int, ranks: int) -> int:
    """As ``ring`` would be if a rank sent to itself, too."""
    return ranks * -(-count // ranks) * size


def noticed(
    rows: list[Row], folder: Path, change: Callable[[Row, Case], tuple[Case, int]]
) -> set[str]:
    """Engines all of whose rows are not as planned."""
    right: set[str] = set()
    for row in rows:
        case, size = change(row, BY_NAME[row["case"]])
        if not differences(planned(case, folder, size), row):
            right.add(case.engine)
    return set(SEVERAL) - right


def test_a_wrong_formula_is_noticed(
    rows: list[Row], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = set(SEVERAL)
    find = partial(noticed, rows, folder)
    assert find(lambda row, case: (case, row["ranks"])) == set()
    assert find(lambda row, case: (case, 2 * row["ranks"])) == every
    more = find(lambda row, case: (replace(case, micros=case.micros + 1), row["ranks"]))
    # Which reduce once a step.
    assert more == every - {"ddp", "zero1"}
    with monkeypatch.context() as patch:
        patch.setattr(formulas, "MASTER", 2)
        assert find(lambda row, case: (case, row["ranks"])) == every
    with monkeypatch.context() as patch:
        patch.setattr(formulas, "ring", share_of_all)
        assert find(lambda row, case: (case, row["ranks"])) == {"zero1", "zero2", "zero3"}


def test_what_passes_a_model_by_is_gathered_again(rows: list[Row], folder: Path) -> None:
    """The rule by which ZeRO-3 keeps weights is not that everything stays, or that nothing does."""
    far = [row for row in rows if BY_NAME[row["case"]].reach]
    assert len(far) == 2 * len(WORLDS)
    for row in far:
        case = BY_NAME[row["case"]]
        for reach in (0, 1):
            assert differences(planned(replace(case, reach=reach), folder, row["ranks"]), row)


def test_closed_forms_hold_on_2_4_and_8_ranks(rows: list[Row]) -> None:
    """Of a step by the numbers of ranks n and micro batches m alone, written down once more."""
    plain = [row for row in rows if is_plain(BY_NAME[row["case"]])]
    assert len(plain) > 90
    for row in plain:
        case, n = BY_NAME[row["case"]], row["ranks"]
        m, share = case.micros, (n - 1) / n
        compute = 4 if case.precision == "fp32" else 2
        gradients = 4 * row["trained"]
        weights = row["frozen"] + compute * row["trained"]
        right = {
            "ddp": 2 * share * gradients,
            "zero1": 2 * share * gradients + share * compute * row["trained"],
            "zero2": m * 2 * share * gradients + share * compute * row["trained"],
            "fsdp": 2 * m * share * weights + share * gradients,
            "zero3": m * share * weights + m * share * gradients,
        }[case.engine]
        assert sum(row["counted"].values()) == pytest.approx(right, rel=10 * BY_KIND), row


def is_plain(case: Case) -> bool:
    """Whether nothing but engine, method and numbers decides."""
    # A learned vector is a matrix of one row, which FSDP pads to as many rows as there are shards.
    padded = (case.engine, case.peft) == ("fsdp", "ia3")
    return case.options in ((), WHOLE) and not case.reach and not padded


def test_replicas_of_hybrid_shards_are_apart(folder: Path) -> None:
    case = Case("fsdp", "full", options=(("shard_size", 2),))
    sent = planned(case, folder, 8)
    assert [(one.name, one.ranks, one.apart) for one in sent] == [
        ("all-gather", 2, 1),
        ("all-gather", 2, 1),
        ("reduce-scatter", 2, 1),
        ("all-reduce", 4, 2),
    ]
