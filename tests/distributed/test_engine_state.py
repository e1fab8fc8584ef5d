"""What an engine gives to a checkpoint, and takes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.pool import Pool
from tests.distributed.training import Setup, config_folder

ENGINES = ("single", "ddp", "fsdp", "zero1", "zero2", "zero3")
RESUME = "tests.distributed.training:resume"
STATE = "tests.distributed.training:first_state"
WITHOUT_RANKS = "tests.distributed.training:whole_without_other_ranks"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a small architecture."""
    return str(config_folder(tmp_path_factory.mktemp("llama")))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("peft", ["full", "lora"])
@pytest.mark.parametrize("engine", ENGINES)
def test_resumed_equals_uninterrupted_bit_for_bit(
    two_ranks: Pool, model: str, engine: str, peft: str, precision: str
) -> None:
    setup = Setup(
        model,
        engine=engine,
        peft=peft,
        precision=precision,
        steps=6,
        micros=4,
        packed=True,
        random_weights=True,
    )
    for answer in two_ranks.run(RESUME, setup=setup, at=3):
        assert answer["resumed"] == answer["uninterrupted"]
        assert answer["equal_weights"]


def test_fp16_resumes_with_its_loss_scale(two_ranks: Pool, model: str) -> None:
    for engine in ("single", "ddp", "fsdp"):
        setup = Setup(model, engine=engine, precision="fp16", steps=5, random_weights=True)
        for answer in two_ranks.run(RESUME, setup=setup, at=2):
            assert answer["resumed"] == answer["uninterrupted"]


def test_three_ranks_resume_bit_for_bit(model: str) -> None:
    """Of three numbers the order of addition shows, which two hide."""
    pool = Pool(3)
    try:
        for engine in ("ddp", "fsdp", "zero2"):
            setup = Setup(model, engine=engine, steps=5, micros=3, random_weights=True)
            for answer in pool.run(RESUME, setup=setup, at=2):
                assert answer["resumed"] == answer["uninterrupted"], engine
                assert answer["equal_weights"], engine
    finally:
        pool.close()


def _covered(answers: list[dict[str, Any]]) -> dict[str, list[tuple[int, int]]]:
    """Saved ranges of each tensor that are not empty, over all ranks, in order."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    for answer in answers:
        for name, _, start, stop, saved_here in answer["ranges"]:
            ranges.setdefault(name, [])
            if saved_here and stop > start:
                ranges[name].append((start, stop))
    return {name: sorted(found) for name, found in ranges.items()}


@pytest.mark.parametrize("peft", ["full", "lora"])
def test_ranks_save_each_element_once(two_ranks: Pool, model: str, peft: str) -> None:
    names = None
    for engine in ENGINES:
        setup = Setup(model, engine=engine, peft=peft, random_weights=True)
        answers = two_ranks.run(STATE, setup=setup)
        answers = answers[:1] if engine == "single" else answers
        shapes = {n: shape for answer in answers for n, shape, *_ in answer["ranges"]}
        for name, ranges in _covered(answers).items():
            at = 0
            for start, stop in ranges:
                assert start == at, (engine, name, ranges)
                at = stop
            assert at == torch.Size(shapes[name]).numel(), (engine, name, ranges)
        names = names or set(shapes)
        assert set(shapes) == names, "engines name their state alike"
        assert all(answer["scalars"] == answers[0]["scalars"] for answer in answers)


def test_every_engine_loads_the_same_values(two_ranks: Pool, model: str) -> None:
    """Random weights depend on names and the seed alone; creating state changes no parameter."""
    for peft in ("full", "lora"):
        expected = None
        for engine in ENGINES:
            setup = Setup(model, engine=engine, peft=peft, random_weights=True)
            tensors = two_ranks.run(STATE, setup=setup)[0]["tensors"]
            expected = expected or tensors
            assert tensors.keys() == expected.keys()
            assert all(torch.equal(tensors[name], expected[name]) for name in expected)
        assert expected


def test_only_the_first_rank_gets_whole_tensors(two_ranks: Pool, model: str) -> None:
    for engine in ENGINES[1:]:
        setup = Setup(model, engine=engine, random_weights=True)
        first, second = two_ranks.run(STATE, setup=setup)
        assert first["tensors"]
        assert not second["tensors"]


def test_a_replica_has_its_tensors_whole_without_asking_other_ranks(
    two_ranks: Pool, model: str
) -> None:
    setup = Setup(model, engine="ddp", random_weights=True)
    first, second = two_ranks.run(WITHOUT_RANKS, setup=setup)
    assert first == {"parameters": first["parameters"], "whole": first["parameters"]}
    assert second == {"parameters": first["parameters"], "whole": 0}
