"""What the loss and LoRA pass over memory, counted from the operations that run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dtune.objectives import causal
from dtune.peft.lora import LoraLinear
from dtune.types import IGNORE_INDEX, Batch

POSITIONS, VOCABULARY = 64, 512

# Of these not all of the arguments is read: the elements that are, for each of the last tensor's.
PARTLY_READ = {"index_select": 2, "index_add_": 3}
NOT_READ = ("nll_loss_forward", "nll_loss_backward")


class Bytes(TorchDispatchMode):
    """Bytes of float matrices that operations read and write, views aside; and their names."""

    def __init__(self, smallest: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.smallest = smallest
        self.moved = 0
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        written = self._matrices(result)
        read = self._matrices(args)
        if not func.is_view and (written or read):
            self.names.append(name)
            self.moved += self._count(name, read, written)
        return result

    def _matrices(self, values: Any) -> list[torch.Tensor]:
        flat = values if isinstance(values, tuple | list) else (values,)
        tensors = [x for x in flat if isinstance(x, torch.Tensor) and x.is_floating_point()]
        return [x for x in tensors if x.numel() >= self.smallest]

    def _count(self, name: str, read: list[torch.Tensor], written: list[torch.Tensor]) -> int:
        if name in PARTLY_READ:
            least = min((*read, *written), key=torch.Tensor.numel)
            return PARTLY_READ[name] * least.nbytes
        makes_only = name in NOT_READ or name.startswith(("new_", "empty", "zero"))
        return sum(x.nbytes for x in (*written, *(() if makes_only else read)))


class Given(nn.Module):
    """A model that has its logits already."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits * 1.0)


def batch_of(share: float) -> Batch:
    """One row, a share of whose positions are targets: never the first."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCABULARY, (1, POSITIONS), generator=generator)
    count = min(round(share * POSITIONS), POSITIONS - 1)
    chosen = 1 + torch.randperm(POSITIONS - 1, generator=generator)[:count]
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[0, chosen] = ids[0, chosen]
    places = torch.arange(POSITIONS)[None]
    return Batch(ids, labels, places, torch.zeros_like(ids), None, ((0,),), POSITIONS, count)


def gradient_and_bytes(batch: Batch, dtype: torch.dtype) -> tuple[float, torch.Tensor, Bytes]:
    torch.manual_seed(0)
    model = Given(torch.randn(1, POSITIONS, VOCABULARY).to(dtype))
    counter = Bytes(smallest=VOCABULARY)
    with counter:
        total = causal.causal_loss(model, batch).total
        total.backward()
    gradient = model.logits.grad
    assert gradient is not None
    return total.item(), gradient, counter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.9, 1.0])
def test_the_loss_takes_the_way_that_moves_fewer_bytes(
    share: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the other way gives the same loss and gradient, in another order of the same sum."""
    batch = batch_of(share)
    loss, gradient, chosen = gradient_and_bytes(batch, dtype)
    reads_all = "index_select" not in chosen.names
    monkeypatch.setattr(causal, "_reads_all", lambda *_: not reads_all)
    other_loss, other_gradient, other = gradient_and_bytes(batch, dtype)
    assert ("index_select" in other.names) is reads_all
    assert chosen.moved < other.moved
    assert loss == pytest.approx(other_loss, rel=POSITIONS * 2**-24)
    assert torch.equal(gradient, other_gradient)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("scale", [2.0, 0.3])
def test_lora_is_scaled_where_there_are_fewest_features(scale: float) -> None:
    """Equal to the textbook's order; over the output it passes with sums and products alone."""
    torch.manual_seed(0)
    tokens, features, outputs, rank = 24, 16, 512, 4
    base = nn.Linear(features, outputs, bias=False).requires_grad_(False)
    lora = LoraLinear(base, rank=rank, scale=scale, dropout=0.0)
    nn.init.normal_(lora.lora_A)
    nn.init.normal_(lora.lora_B)
    x = torch.randn(tokens, features, requires_grad=True)
    counter = Bytes(smallest=tokens * outputs)
    with counter:
        y = lora(x)
        y.backward(torch.ones_like(y))
    expected = base(x) + scale * F.linear(F.linear(x, lora.lora_A), lora.lora_B)
    # A product of 3 and sums of 16, 4 and 2 terms, in another order.
    torch.testing.assert_close(y, expected, rtol=32 * 2**-24, atol=32 * 2**-24 * scale)
    assert not torch.allclose(y, expected * 1.05, rtol=1e-3)
    assert "mul" not in counter.names
    assert counter.names.count("add") == 1
