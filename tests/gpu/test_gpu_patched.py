"""A patched model on a GPU: exact, deterministic, without waits, and captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from dtune_kernels.check import errors
from torch import nn

from dtune.objectives.causal import causal_loss
from dtune.patch.apply import apply_patches
from dtune.patch.base import patch_names
from dtune.types import Batch
from tests.distributed.training import make_batch
from tests.unit.patched import adapted, train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = torch.device("cuda")
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(autouse=True)
def _cleared() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def built(
    dtype: torch.dtype,
    *,
    family: str = "llama",
    patched: bool = True,
    sizes: dict[str, Any] | None = SIZES,
    **options: Any,
) -> nn.Module:
    model, spec = adapted(family, dtype=dtype, config=sizes, **options)
    model = model.to(DEVICE).train()
    if patched:
        rows = apply_patches(model, patch_names(), spec)
        assert {row.patch for row in rows if not row.reason} >= {"mlp", "lora_linear", "loss_head"}
    return model


def batch_of(step: int = 1) -> Batch:
    return make_batch(step, 0, packed=True).to(DEVICE)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
def test_a_patched_step_is_as_near_to_fp64_as_the_step(family: str) -> None:
    dtype = torch.bfloat16

    def step(dtype: torch.dtype, *, patched: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss, and all gradients as one vector, from weights that are rounded to bf16."""
        model = built(torch.bfloat16, family=family, patched=patched, sizes=None).to(dtype)
        found = train_step(model, batch_of())
        return found.loss, torch.cat([found.grads[name].flatten() for name in sorted(found.grads)])

    loss, gradients = step(dtype, patched=True)
    plain_loss, plain = step(dtype, patched=False)
    exact_loss, exact = step(torch.float64, patched=False)
    assert errors(gradients, exact)[0] <= 2 * errors(plain, exact)[0]
    rounding = torch.finfo(dtype).eps * exact_loss.abs()
    assert (loss - exact_loss).abs() <= 2 * torch.maximum((plain_loss - exact_loss).abs(), rounding)
    # What another batch would give is far away.
    other = train_step(built(dtype, family=family, sizes=None), batch_of(step=2))
    others = torch.cat([other.grads[name].flatten() for name in sorted(other.grads)])
    assert errors(others, exact)[0] > 10 * errors(plain, exact)[0]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_step_has_the_same_bits_twice(dropout: float) -> None:
    model, batch = built(torch.bfloat16, dropout=dropout), batch_of()
    found = []
    for _ in range(2):
        torch.manual_seed(7)
        found.append(train_step(model, batch))
    once, again = found
    assert torch.equal(once.loss, again.loss)
    assert all(torch.equal(once.grads[name], again.grads[name]) for name in once.grads)
    if dropout:
        assert not torch.equal(train_step(model, batch).loss, once.loss)


def training(model: nn.Module) -> Callable[[Batch], torch.Tensor]:
    """One optimizer step; the loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, capturable=True)

    def step(batch: Batch) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = causal_loss(model, batch).total
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_patched_step_waits_for_nothing(attention: str) -> None:
    model = built(torch.bfloat16, attention=attention, dropout=0.1)
    step, batch = training(model), batch_of()
    for _ in range(3):  # the first compile kernels and make the optimizer's state
        step(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = step(batch)
        with pytest.raises(RuntimeError, match="synchroniz"):
            loss.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.item() > 0


def captured(step: Callable[[Batch], torch.Tensor], batch: Batch) -> tuple[Any, torch.Tensor]:
    """A graph of the step and the loss that it writes; three steps are made before it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(batch)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(batch)
    return graph, loss


def test_a_captured_step_is_the_step() -> None:
    dtype, batch = torch.bfloat16, batch_of()
    eager, replayed = built(dtype), built(dtype)
    step = training(eager)
    for _ in range(3):
        step(batch)
    graph, loss = captured(training(replayed), batch)
    for _ in range(3):
        wanted = step(batch)
        before = [p.clone() for p in replayed.parameters() if p.requires_grad]
        graph.replay()
        assert torch.equal(loss, wanted)
        trained = [p for p in replayed.parameters() if p.requires_grad]
        assert not any(torch.equal(x, y) for x, y in zip(before, trained, strict=True))
        pairs = zip(eager.parameters(), replayed.parameters(), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)


def test_a_captured_step_drops_something_else_each_time() -> None:
    batch = batch_of()
    model = built(torch.bfloat16, dropout=0.5)

    def step(batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            return causal_loss(model, batch).total

    graph, loss = captured(step, batch)
    losses = set()
    for _ in range(4):
        graph.replay()
        losses.add(loss.item())
    assert len(losses) == 4
