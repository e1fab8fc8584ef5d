"""No number without training: gradients that are finite and not zero, a loss that falls."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch

from dtune.bench.gates import GradientProbe, falls, loss_problem
from dtune.bench.measure import measure_case
from dtune.bench.planned import Planned
from dtune.bench.schema import BenchConfig
from dtune.bench.subject import Subject, build_subject, prepared_run
from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.config.run import RunConfig
from dtune.models.random import RandomSource
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


@pytest.fixture
def unplanned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the plan of memory, which takes seconds and is no part of what a gate judges."""
    nothing = Planned(None, {}, 0, 0, ())
    monkeypatch.setattr("dtune.bench.measure.plan_case", lambda *arguments: nothing)


def problem_of(subject: Subject) -> str:
    probe = GradientProbe(subject.engine, subject.world)
    with probe:
        subject.step()
    return probe.problem()


def spoil(subject: Subject, change: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """Change the gradient of the first trained parameter wherever it is computed; its name."""
    named = subject.engine.module.named_parameters()
    name, first = next((name, p) for name, p in named if p.requires_grad)
    first.register_hook(change)
    return name


@pytest.mark.parametrize(
    "settings",
    [
        ["peft=lora", "optim.lr=1e-3"],
        ["peft=full"],
        ["peft=prefix"],
        ["peft=lora", "optim=sgd", "optim.lr=0.1"],
        ["peft=lora", "optim.lr=1e-3", "parallel=zero2"],
        # Without momentum DeepSpeed keeps nothing of a gradient.
        *(
            ["optim=sgd", "optim.lr=0.1", "optim.momentum=0", f"parallel=zero{n}"]
            for n in (1, 2, 3)
        ),
    ],
    ids=" ".join,
)
def test_training_passes(subject: Callable[..., Subject], settings: list[str]) -> None:
    one = subject(*settings)
    one.step()
    assert problem_of(one) == ""
    for _ in range(6):
        one.step()
    assert loss_problem(one.loss_curve()) == ""


@pytest.mark.parametrize("peft", ["lora", "qlora", "dora"])
def test_what_weights_were_drawn_from_is_gone_before_the_first_step(
    subject: Callable[..., Subject], peft: str
) -> None:
    """It keeps the tensor that it has drawn last, which is as large as the head."""

    def sources() -> int:
        return sum(isinstance(one, RandomSource) for one in gc.get_objects())

    gc.collect()
    before = sources()
    gc.disable()
    try:
        assert subject(f"peft={peft}").done == 0
        assert sources() == before
    finally:
        gc.enable()


def test_adapters_that_have_not_begun_to_move_are_told(subject: Callable[..., Subject]) -> None:
    # At the first step B of every adapter is zero, and so is the gradient of A.
    said = problem_of(subject("peft=lora"))
    assert "more is zero everywhere" in said


@pytest.mark.parametrize("engine", ["single", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize(
    ("change", "says"),
    [(torch.zeros_like, "is zero everywhere"), (lambda g: g * torch.nan, "is not finite")],
    ids=["zeros", "nan"],
)
def test_a_bad_gradient_is_found(
    subject: Callable[..., Subject], engine: str, change: Callable, says: str
) -> None:
    one = subject("peft=lora", "optim.lr=1e-3", f"parallel={engine}")
    one.step()
    assert problem_of(one) == ""
    name = spoil(one, change)
    assert problem_of(one) == f"the gradient of {name} {says}"


def test_the_probe_leaves_the_engine_as_it_was(subject: Callable[..., Subject]) -> None:
    one = subject("peft=lora")
    problem_of(one)
    assert "clip" not in vars(one.engine)
    assert not any(p._backward_hooks for p in one.engine.module.parameters())


def test_a_loss_must_fall_by_more_than_rounding_and_than_it_jumps() -> None:
    assert falls([5.0, 4.95, 4.9])
    assert falls([5.0, 4.9, 4.82, 4.77, 4.75])
    assert not falls([5.0])
    assert not falls([5.0, 4.99999])
    assert not falls([5.0, 4.0, 5.5])
    assert not falls([5.0, 5.1, 4.9])


def test_a_loss_that_only_jumps_about_does_not_fall() -> None:
    random = torch.Generator().manual_seed(1)
    curves = (5 + 0.05 * torch.randn(1000, 30, generator=random)).tolist()
    # Below its first it is half of the time.
    assert sum(curve[-1] < curve[0] for curve in curves) > 400
    assert sum(falls(curve) for curve in curves) < 5


def test_a_loss_is_looked_at_from_step_to_step() -> None:
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


@pytest.mark.usefixtures("unplanned")
def test_a_case_that_does_not_learn_is_refused(world: World) -> None:
    outcome = measure_case(run_of("peft=lora", "optim.lr=1e-12"), QUICK, world)
    assert outcome.measured is None
    assert "does not fall" in outcome.refusal
    # It has been given the steps that it may take.
    assert "step 10" in outcome.refusal


@pytest.mark.usefixtures("unplanned")
def test_a_case_that_compiles_while_it_is_timed_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = iter([3, 4])
    monkeypatch.setattr("dtune.bench.measure.compiled_graphs", lambda: next(graphs))
    outcome = measure_case(run_of("peft=lora", "optim.lr=1e-3"), QUICK, world)
    assert outcome.measured is None
    assert "torch.compile was still at work" in outcome.refusal


@pytest.mark.usefixtures("unplanned")
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
