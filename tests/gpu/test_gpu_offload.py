"""Activations in pinned host memory on a GPU: the same bits, less memory, copies beside compute."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from dtune.parallel.offload import Offload, Stash

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

BLOCKS, ROWS, WIDTH = 8, 4096, 2048
ONE = ROWS * WIDTH * 2


class Block(nn.Module):
    """Saves three tensors of [ROWS, WIDTH] in bf16: 48 MiB."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(WIDTH, WIDTH, device="cuda", dtype=torch.bfloat16) / WIDTH**0.5
        self.weight = nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight.t()).sin().square() + x


def run(blocks: list[Block], x: torch.Tensor, offloader: Offload | None) -> torch.Tensor:
    for index, block in enumerate(blocks):
        forward = partial(block.forward)
        if offloader is None:
            x = forward(x)
        else:
            x = offloader.run(index, lambda f, *a, hooks: f(*a), forward, x)
    return x.float().square().mean()


def grads(blocks: list[Block], x: torch.Tensor, offloader: Offload | None) -> tuple[Any, int]:
    """Gradients of the weights, and bytes that the forward pass left on the device."""
    before = torch.cuda.memory_allocated()
    loss = run(blocks, x, offloader)
    torch.cuda.synchronize()
    left = torch.cuda.memory_allocated() - before
    return torch.autograd.grad(loss, [block.weight for block in blocks]), left


def test_the_same_bits_with_less_on_the_device() -> None:
    torch.manual_seed(0)
    blocks = [Block() for _ in range(BLOCKS)]
    offloader = Offload(BLOCKS)
    for step in range(5):  # memory of earlier steps is used again
        x = torch.randn(ROWS, WIDTH, device="cuda", dtype=torch.bfloat16)
        expected, without = grads(blocks, x, None)
        found, left = grads(blocks, x, offloader)
        assert all(map(torch.equal, found, expected)), step
        # Of seven blocks three tensors have left; the first one's input is the caller's as well.
        assert without - left >= (3 * (BLOCKS - 1) - 1) * ONE


def test_host_memory_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = []
    send = Stash._send

    def noted(stash: Stash, tensor: torch.Tensor) -> Any:
        slot = send(stash, tensor)
        hosts.append(slot.host)
        return slot

    monkeypatch.setattr(Stash, "_send", noted)
    blocks = [Block() for _ in range(2)]
    x = torch.randn(ROWS, WIDTH, device="cuda", dtype=torch.bfloat16)
    run(blocks, x, Offload(2)).backward()
    first, last = hosts[:3], hosts[3:]
    assert all(host.is_pinned() for host in first)
    assert last == [None] * 3  # the last block keeps what it saves


def test_the_host_waits_for_nothing() -> None:
    blocks = [Block() for _ in range(4)]
    offloader = Offload(4)
    x = torch.randn(ROWS, WIDTH, device="cuda", dtype=torch.bfloat16)
    run(blocks, x, offloader).backward()  # pinned memory is there from now on
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for block in blocks:
        block.zero_grad()
    try:
        run(blocks, x, offloader).backward()  # raises where the host waits
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(
        p.grad is not None and p.grad.isfinite().all() for b in blocks for p in b.parameters()
    )
