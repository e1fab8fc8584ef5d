"""Claims of steps as ``dtune bench`` builds them, on the device of a world."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from dtune_kernels.check import errors

from dtune.bench.schema import BenchConfig
from dtune.bench.subject import Subject, build_subject, prepared_run
from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.quant.linear import QuantizedLinear
from dtune.runtime.seed import seed_everything
from dtune.runtime.world import World
from tests.unit.families import family_config

LENGTH = 64
STEPS = 4


def save_qwen3(folder: Path) -> Path:
    """The architecture, whose queries and keys have norms of their own."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 256}
    family_config("qwen3", **sizes, initializer_range=0.1).save_pretrained(folder)
    return folder


def subject(world: World, *settings: str, documents: int = 2) -> Subject:
    """A run of random weights on synthetic rows, on the world's device."""
    bench = BenchConfig(documents=documents)
    size = [f"data.max_length={LENGTH}", "train.micro_batch_size=2", "train.global_batch_size=4"]
    text = compose_overrides("train", ["run_dir=/none", *size, *settings])
    run = prepared_run(load_frozen(text), bench)
    seed_everything(run.seed, world.rank)
    return build_subject(run, bench, world)


def gradients(one: Subject) -> torch.Tensor:
    """Of all trained parameters in one step, as the optimizer will see them: fp64 [N]."""
    engine = one.engine
    found: list[torch.Tensor] = []
    measure = engine.clip

    def clip(max_norm: float) -> torch.Tensor:
        grads = (parameter.grad for parameter in engine.module.parameters())
        found.extend(grad.detach().double().flatten() for grad in grads if grad is not None)
        return measure(max_norm)

    engine.clip = clip  # type: ignore[method-assign]
    one.step()
    del engine.clip
    return torch.cat(found)


def assert_full_training_in_bf16(
    world: World, folder: Path, *, documents: int, settings: Sequence[str]
) -> None:
    """Masters are fp32, and so are queries and keys after their norms: attention computes in bf16.

    Gradients are as near to those of fp32 as with the plainest attention, and the loss falls.
    """
    full = ("model=custom", f"model.path={folder}", "peft=full", "optim.lr=1e-3")
    eager = (*full, "model.attention=eager", "kernels=torch")
    exact = gradients(subject(world, *eager, "precision=fp32", documents=documents))
    plain = gradients(subject(world, *eager, "precision=bf16", documents=documents))
    one = subject(world, *full, "precision=bf16", *settings, documents=documents)
    found = gradients(one)
    assert {p.dtype for p in one.engine.module.parameters()} == {torch.float32}
    limit = 2 * errors(plain, exact)[0]
    assert errors(found, exact)[0] <= limit
    # What it would be where documents see each other, or are cut, is far away.
    other = gradients(subject(world, *eager, "precision=fp32", documents=3 - documents))
    assert errors(other, exact)[0] > 2 * limit
    for _ in range(STEPS - 1):
        one.step()
    curve = one.loss_curve()
    assert len(curve) == STEPS
    assert curve[-1] < curve[0]


def kept_weights(one: Subject) -> list[torch.Tensor]:
    """Weights of a quantised base that stay dequantised."""
    linears = [m for m in one.engine.module.modules() if isinstance(m, QuantizedLinear)]
    return [linear.floats for linear in linears if linear.floats is not None]


def assert_kept_weights_change_no_bit(world: World, *settings: str) -> int:
    """Steps over weights that stay dequantised are those over their bytes; bytes that stay."""
    curves, kept = [], []
    for room in ("0", "1e-4", "1"):
        one = subject(
            world,
            *("model=tiny", "peft=qlora", "precision=bf16", "optim.lr=1e-3"),
            *(f"quant.cache_gib={room}", *settings),
        )
        floats = kept_weights(one)
        assert {weight.device.type for weight in floats} <= {world.device.type}
        assert {weight.dtype for weight in floats} <= {torch.bfloat16}
        kept.append(sum(weight.nbytes for weight in floats))
        for _ in range(STEPS):
            one.step()
        curves.append(one.loss_curve())
    assert kept[0] == 0 < kept[1] < 1e-4 * 2**30 < kept[2]
    assert curves[0] == curves[1] == curves[2]
    assert len(set(curves[0])) == STEPS
    return kept[2]
