"""What auto chooses is what a run trains with, and its log says why."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from dtune.cli import main
from dtune.commands.trained import choose_trained
from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen, read_frozen
from dtune.errors import ConfigError
from dtune.measure.memory import GIB
from dtune.plan import auto
from dtune.plan.auto import decide_here, memory_of
from dtune.plan.run import plan_run
from dtune.runtime.schema import Recompute
from dtune.runtime.world import World
from dtune.worker import describe_run
from tests.distributed.pool import Pool
from tests.integration.train_runs import settings

SHORT = ("train.max_steps=1", "schedule.warmup_steps=0", "launch.nproc=1")
BOTH = ("parallel=auto", "train.recompute=auto")


def said(run_dir: Path) -> str:
    return (run_dir / "logs" / "rank-0.log").read_text("utf-8")


def test_a_run_trains_with_what_was_chosen_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = settings(tmp_path / "run", "experiment=quickstart", *SHORT)
    least = load_frozen(compose_overrides("train", [*overrides, "train.recompute=full"]))
    memory = plan_run(least, 1, None).memory.high
    monkeypatch.setattr(auto, "memory_of", lambda device, ranks: memory)
    assert main(["train", *overrides, *BOTH]) == 0
    told = said(tmp_path / "run")
    tried = [f"parallel=single train.recompute={level}" for level in ("none", "selective", "full")]
    places = [told.index(one) for one in tried]
    assert places == sorted(places)
    lines = [line for line in told.splitlines() if "parallel=single train.recompute=" in line]
    assert [line.rsplit(", ", 1)[1] for line in lines] == ["does not fit", "does not fit", "fits"]
    assert f"of {memory / GIB:.2f} GiB a rank" in told
    assert "(single, fp32)" in (tmp_path / "run" / "report.md").read_text("utf-8")
    # Its config keeps what was asked for; what only computes forward has nothing to choose.
    assert read_frozen(tmp_path / "run").train.recompute is Recompute.auto
    trained = choose_trained(str(tmp_path / "run"), "", [])
    assert trained is not None
    assert trained.config.train.recompute is Recompute.none


def test_a_run_that_cannot_fit_is_refused_before_it_reads_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(auto, "memory_of", lambda device, ranks: 1000)
    overrides = settings(tmp_path / "run", "experiment=quickstart", *SHORT)
    assert main(["train", *overrides, *BOTH]) == 2
    error = capsys.readouterr().err
    assert "nothing that parallel=auto and train.recompute=auto can choose fits" in error
    assert "train.micro_batch_size" in error


def choose(world: World, *, overrides: list[str], memory: list[int]) -> str:
    """What this rank was told, where ranks have devices of so many bytes."""
    run = load_frozen(compose_overrides("train", overrides))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auto, "memory_of", lambda device, ranks: memory[world.rank])
        try:
            chosen = decide_here(run, world)
        except ConfigError as error:
            return str(error)
    return f"{describe_run(chosen)} {chosen.train.recompute.value}"


@pytest.mark.parametrize("short", [0, 1])
def test_ranks_choose_alike_by_the_smallest_of_their_devices(two_ranks: Pool, short: int) -> None:
    case = "tests.unit.test_plan_auto:choose"
    overrides = ["peft=full", "train.micro_batch_size=1", "parallel=auto"]
    replicas = load_frozen(compose_overrides("train", [*overrides[:2], "parallel=ddp"]))
    enough = plan_run(replicas, 2, None).memory.high
    for memory, engine in ((enough, "ddp"), (enough - 1, "fsdp")):
        devices = [10 * enough, 10 * enough]
        devices[short] = memory
        told = two_ranks.run(case, overrides=overrides, memory=devices)
        assert told[0] == told[1]
        assert told[0].endswith(f"({engine}, fp32) none")
    refused = two_ranks.run(case, overrides=overrides, memory=[10, 10])
    assert refused[0] == refused[1]
    assert refused[0].startswith("nothing that parallel=auto can choose fits")


@pytest.mark.parametrize(("limit", "ranks", "most"), [("max\n", 1, None), ("1000\n", 4, 250)])
def test_a_rank_on_a_cpu_may_take_its_part_of_what_the_job_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, ranks: int, most: int | None
) -> None:
    file = tmp_path / "memory.max"
    file.write_text(limit)
    monkeypatch.setattr(auto, "CGROUP_LIMIT", file)
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory_of(torch.device("cpu"), ranks) == (whole if most is None else most)
