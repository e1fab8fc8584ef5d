"""No number without training: gradients that are finite and not zero, a loss that falls."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dtune.bench.gates import GradientProbe, falls, loss_problem
from dtune.bench.measure import measure_case
from dtune.bench.schema import BenchConfig
from dtune.bench.subject import Subject, build_subject, prepared_run
from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.config.run import RunConfig
from dtune.runtime.seed import seed_everything
from dtune.runtime.world import World

QUICK = BenchConfig(warm_up=1, steps=2, repeats=1, falls_within=10, ceiling_seconds=0, plots=False)


def run_of(*settings: str) -> RunConfig:
    small = ["train.micro_batch_size=1", "train.global_batch_size=2", "data.max_length=16"]
    return load_frozen(compose_overrides("train", [*small, "run_dir=/none", *settings]))


@pytest.fixture
def subject(world: World) -> Callable[..., Subject]:
    def build(*settings: str) -> Subject:
        run = prepared_run(run_of(*settings), QUICK)
        seed_everything(run.seed, 0)
        return build_subject(run, QUICK, world)

    return build


def problem_of(subject: Subject) -> str:
    probe = GradientProbe(subject.engine, subject.world)
    with probe:
        subject.step()
    return probe.problem()


def spoil(subject: Subject, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the gradient of the first trained parameter wherever it is computed."""
    first = next(p for p in subject.engine.module.parameters() if p.requires_grad)
    first.register_hook(change)


@pytest.mark.parametrize(
    "settings",
    [
        ["peft=lora", "optim.lr=1e-3"],
        ["peft=full"],
        ["peft=prefix"],
        ["peft=lora", "optim=sgd", "optim.lr=1.0"],
        ["peft=lora", "optim.lr=1e-3", "parallel=zero2"],
    ],
    ids=" ".join,
)
def test_training_passes(subject: Callable[..., Subject], settings: list[str]) -> None:
    one = subject(*settings)
    one.step()
    assert problem_of(one) == ""
    one.step()
    assert loss_problem(one.loss_curve()) == ""


def test_adapters_that_have_not_begun_to_move_are_told(subject: Callable[..., Subject]) -> None:
    # At the first step B of every adapter is zero, and so is the gradient of A.
    said = problem_of(subject("peft=lora"))
    assert "more is zero everywhere" in said


@pytest.mark.parametrize("engine", ["single", "zero2"])
@pytest.mark.parametrize(
    ("change", "says"),
    [(torch.zeros_like, "is zero everywhere"), (lambda g: g * torch.nan, "is not finite")],
    ids=["zeros", "nan"],
)
def test_a_bad_gradient_is_found(
    subject: Callable[..., Subject], engine: str, change: Callable, says: str
) -> None:
    one = subject("peft=lora", "optim.lr=1e-3", f"parallel={engine}")
    spoil(one, change)
    for _ in range(2):
        said = problem_of(one)
    assert said
    if engine == "single":
        assert said.endswith(says)


def test_the_probe_leaves_the_engine_as_it_was(subject: Callable[..., Subject]) -> None:
    one = subject("peft=lora")
    problem_of(one)
    assert "clip" not in vars(one.engine)


def test_a_loss_must_fall_by_more_than_rounding() -> None:
    assert falls([5.0, 5.1, 4.9])
    assert not falls([5.0])
    assert not falls([5.0, 4.99999])
    assert not falls([5.0, 4.0, 5.5])
    assert loss_problem([5.0, 4.0]) == ""
    assert "does not fall: 5.00000 at step 1, 6.00000 at step 2" in loss_problem([5.0, 6.0])
    assert loss_problem([5.0, float("nan"), 4.0]) == "the loss of step 2 is nan"


def test_a_case_that_trains_gives_numbers(world: World) -> None:
    outcome = measure_case(run_of("peft=lora", "optim.lr=1e-3"), QUICK, world)
    assert outcome.refusal == ""
    one = outcome.measured
    assert one is not None
    assert len(one.step_seconds) == 2
    assert (one.slots_per_step, one.tokens_per_step, one.targets_per_step) == (32, 32, 28)
    assert one.loss_last < one.loss_first
    assert one.launches_per_step is not None
    assert one.launches_per_step > 100
    assert one.plan_error is not None
    assert one.parameters is not None
    assert one.trained_parameters is not None
    assert 0 < one.trained_parameters < one.parameters


def test_a_case_that_does_not_learn_is_refused(world: World) -> None:
    outcome = measure_case(run_of("peft=lora", "optim.lr=1e-12"), QUICK, world)
    assert outcome.measured is None
    assert "does not fall" in outcome.refusal
    # It has been given the steps that it may take.
    assert "step 10" in outcome.refusal


def test_a_case_whose_adapters_get_no_gradient_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(run: RunConfig, bench: BenchConfig, world: World) -> Subject:
        subject = build_subject(run, bench, world)
        spoil(subject, torch.zeros_like)
        return subject

    monkeypatch.setattr("dtune.bench.measure.build_subject", broken)
    outcome = measure_case(run_of("peft=lora", "optim.lr=1e-3"), QUICK, world)
    assert outcome.measured is None
    assert "is zero everywhere" in outcome.refusal
