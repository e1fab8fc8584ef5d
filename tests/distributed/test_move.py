"""A checkpoint of any engine and number of processes is gone on with by others: a cover."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.distributed.move_check import (
    ENGINES,
    LOSS_LIMIT,
    POINTS,
    WORLDS,
    Move,
    Mover,
    Point,
    Source,
    all_moves,
    comes_once,
    cover,
    judge,
    not_as_saved,
)
from tests.distributed.move_page import PAGE, RESULT, name_of, render
from tests.distributed.moving import ROWS, Lengths, Seen, compare, whole_tensors
from tests.distributed.pool import Pool

# Ten losses after a save earlier than in the whole table, of which `make move` writes the results.
LENGTHS = Lengths(saved=3, total=13)
MOVES = cover()


@pytest.fixture(scope="module")
def mover(
    one_rank: Pool, two_ranks: Pool, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mover]:
    more = {3: Pool(3), 4: Pool(4)}
    pools = {1: one_rank, 2: two_ranks, **more}
    yield Mover(tmp_path_factory.mktemp("moves"), LENGTHS, pools)
    for pool in more.values():
        pool.close()


@pytest.mark.slow
@pytest.mark.parametrize("target", POINTS, ids=str)
def test_what_others_have_saved_is_gone_on_with(mover: Mover, target: Point) -> None:
    """State bit for bit, losses, and the rows of every step in their order."""
    mine = [move for move in MOVES if move.target == target]
    verdicts = [mover.check(move) for move in mine]
    assert not [(str(v.move), v.problems) for v in verdicts if v.problems]


def test_the_cover_has_every_pair_of_engines_and_of_worlds() -> None:
    engines = {(move.source.engine, move.target.engine) for move in MOVES}
    assert engines == {(one, other) for one in ENGINES for other in ENGINES}
    worlds = {(move.source.world, move.target.world) for move in MOVES}
    assert worlds == {(one, other) for one in WORLDS for other in WORLDS}
    for point in POINTS:
        assert len({move.source for move in MOVES if move.target == point}) >= 3
        assert len({move.target for move in MOVES if move.source == point}) >= 3
    assert {move.peft for move in MOVES} == {"lora", "full"}


def test_every_point_was_read_by_every_other_and_all_moves_hold() -> None:
    """The committed results: each pair of points, with each method."""
    result: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8"))
    run = {name_of(row): row for row in result["moves"]}
    assert len(run) == len(result["moves"])
    for peft in ("lora", "full"):
        expected = {f"{peft}: {source} -> {target}" for source in POINTS for target in POINTS}
        assert {name for name, row in run.items() if row["peft"] == peft} == expected
    assert run.keys() == set(map(str, all_moves()))
    assert not [row for row in result["moves"] if row["problems"]]
    assert max(row["loss"] for row in result["moves"]) <= LOSS_LIMIT
    saved, total = result["steps"]
    assert total - saved >= 10
    assert PAGE.read_text(encoding="utf-8") == render(result), "run `make move`"
    failing = copy.deepcopy(result)
    failing["moves"][-1]["problems"] = ["losses differ"]
    assert "FAILS" in render(failing)
    assert "FAILS" not in render(result)


HALVES = [(0, 60), (60, 120)]


def seen(steps: range, *, rank: int = 0, ranks: int = 1) -> Seen:
    """Of a run over 64 rows, one a sequence, 12 a step, in their order."""
    each = 12 // ranks
    micros = {
        step: [tuple(((12 * (step - 1) + each * rank + row) % ROWS,) for row in range(each))]
        for step in steps
    }
    losses = {step: 7.0 - 0.1 * step for step in steps}
    start, stop = HALVES[rank] if ranks == 2 else (0, 120)
    return Seen(losses, micros, ROWS, {"param/w": (start, stop)})


def test_a_move_that_does_not_hold_is_told() -> None:
    lengths = Lengths(saved=4, total=14)
    source = Source([seen(range(1, 15))], Path("nowhere"), {"param/w": 120})
    rest = range(5, 15)
    good = [seen(rest, rank=rank, ranks=2) for rank in range(2)]
    move = Move("full", Point("single", 1), Point("fsdp", 2))
    assert not judge(move, source, good, lengths).problems
    first = good[0]
    off = {**first.losses, 9: first.losses[9] + 2 * LOSS_LIMIT}
    swapped = {**first.micros, 5: first.micros[6], 6: first.micros[5]}
    other = {**first.micros, 7: [(*first.micros[7][0][:-1], (0,))]}
    fewer = {step: loss for step, loss in first.losses.items() if step < 14}
    for wrong, said in (
        (replace(first, losses=off), "losses differ"),
        (replace(first, losses={**first.losses, 9: math.nan}), "losses differ"),
        (replace(first, losses=fewer), "losses differ"),
        (replace(first, micros=swapped), "in another order"),
        (replace(first, micros=other), "a row came twice"),
        (replace(first, unequal=("param/w",)), "1 tensors were not loaded"),
        (replace(first, ranges={"param/w": (0, 59)}), "1 tensors were not loaded"),
        (replace(first, ranges={**first.ranges, "param/v": (0, 1)}), "1 tensors were not loaded"),
    ):
        losses = {1: replace(good[1], losses=wrong.losses)}
        found = judge(move, source, [wrong, losses[1]], lengths).problems
        assert any(said in problem for problem in found), (said, found)
    # On the same engine and world nothing may differ at all.
    same = Move("full", Point("fsdp", 2), Point("fsdp", 2))
    nearly = {**first.losses, 9: first.losses[9] + 1e-7}
    ranks = [replace(one, losses=nearly) for one in good]
    assert not judge(move, source, ranks, lengths).problems
    assert "not bit for bit" in judge(same, source, ranks, lengths).problems[0]


def test_a_lost_or_doubled_row_is_told() -> None:
    order = [[(row,) for row in range(start, start + 16)] for start in range(0, 64, 16)]
    again = [[(row,) for row in range(8)]]
    assert comes_once([*order, *again], ROWS)
    assert not comes_once([*order[:3], order[2], *again], ROWS)
    assert not comes_once([*order, [(0,), (0,)]], ROWS)
    # What ends before the first epoch does shows nothing.
    assert not comes_once(order[:2], ROWS)


def test_a_flipped_bit_of_a_loaded_tensor_is_told(tmp_path: Path) -> None:
    values = torch.arange(6.0)
    save_file({"param/w@0": values[:4].clone()}, tmp_path / "rank-00000.safetensors")
    save_file({"param/w@4": values[4:].clone()}, tmp_path / "rank-00001.safetensors")
    assert torch.equal(whole_tensors(tmp_path)["param/w"], values)
    ranges, unequal = compare([("param/w", 2, values[2:].clone())], tmp_path)
    assert (ranges, unequal) == ({"param/w": (2, 6)}, ())
    flipped = values[2:].clone()
    flipped.view(torch.int32)[3] ^= 1
    assert compare([("param/w", 2, flipped)], tmp_path)[1] == ("param/w",)
    assert not_as_saved([Seen({}, {}, ROWS, {"param/w": (2, 6)})], {"param/w": 6}) == ["param/w"]
