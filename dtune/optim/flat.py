"""AdamW over parameters that lie in one buffer: an operation for all of them, not for each."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import torch
from dtune_kernels.adamw import adamw_flat_
from torch import nn
from torch.optim import Optimizer

ALIGNMENT = 32
"""Elements: every parameter begins at a multiple of 128 bytes, as kernels like to read."""


def _room(parameter: nn.Parameter) -> int:
    return -(-parameter.numel() // ALIGNMENT) * ALIGNMENT


class FlatAdamW(Optimizer):
    """AdamW, Loshchilov & Hutter 2017, arXiv:1711.05101, with one buffer [n] of each kind.

    The parameters (fp32, of one device) become views of a buffer, and their moments are views of
    two others: what is read and written by name stays what it was. The gradients of a step are
    put into a buffer by ``gather``, when they are all there: gradients that already lay in one
    would have to be added to it, an operation for each parameter and micro batch.
    """

    found_inf: torch.Tensor | None = None
    """fp32 scalar on the device: unless it is 0, the next step changes nothing. As torch has it."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._owned: list[nn.Parameter] = [p for g in self.param_groups for p in g["params"]]
        self._room = [_room(p) for p in self._owned]
        sizes = (sum(map(_room, group["params"])) for group in self.param_groups)
        self._ranges = list(pairwise(accumulate(sizes, initial=0)))
        device = self._owned[0].device
        assert {(p.device, p.dtype) for p in self._owned} == {(device, torch.float32)}
        self._master, self._exp_avg, self._exp_avg_sq = (
            torch.zeros(sum(self._room), device=device) for _ in range(3)
        )
        self._step = torch.zeros((), device=device)
        self._rates = [torch.zeros((), device=device) for _ in self.param_groups]
        self._gaps = torch.zeros(ALIGNMENT, device=device)
        self._gradients: torch.Tensor | None = None
        self._take_over()

    @torch.no_grad()
    def _take_over(self) -> None:
        moments = (self._views(self._exp_avg), self._views(self._exp_avg_sq))
        masters = self._views(self._master)
        for parameter, master, first, second in zip(self._owned, masters, *moments, strict=True):
            master.copy_(parameter)
            parameter.data = master
            self.state[parameter] = {
                "step": self._step,
                "exp_avg": first,
                "exp_avg_sq": second,
            }

    def _views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The part of each parameter, in its shape."""
        pieces = buffer.split(self._room)
        pairs = zip(pieces, self._owned, strict=True)
        return [piece[: p.numel()].view(p.shape) for piece, p in pairs]

    @torch.no_grad()
    def gather(self) -> torch.Tensor:
        """The gradients of this step in one buffer [n], of which they become views.

        Zeros where there is none, and between parameters. Once a step, until ``zero_grad``.
        """
        if self._gradients is None:
            pieces = []
            for parameter, room in zip(self._owned, self._room, strict=True):
                gradient = parameter.grad
                pieces.append(torch.zeros_like(parameter) if gradient is None else gradient)
                pieces.append(self._gaps[: room - parameter.numel()])
            self._gradients = torch.cat([piece.flatten() for piece in pieces if piece.numel()])
            views = self._views(self._gradients)
            for parameter, view in zip(self._owned, views, strict=True):
                parameter.grad = view
        return self._gradients

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients and their buffer."""
        super().zero_grad(set_to_none=True)
        self._gradients = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every group by one operation, unless ``found_inf`` says no."""
        assert closure is None
        blocked, self.found_inf = self.found_inf, None
        gradients = self.gather()
        self._step.add_(1.0 if blocked is None else 1.0 - blocked)
        for group, rate, (start, stop) in zip(
            self.param_groups, self._rates, self._ranges, strict=True
        ):
            rate.fill_(group["lr"])
            beta1, beta2 = group["betas"]
            adamw_flat_(
                self._master[start:stop],
                gradients[start:stop],
                self._exp_avg[start:stop],
                self._exp_avg_sq[start:stop],
                shadow=None,
                clip_scale=None,
                lr=rate,
                step=self._step,
                blocked=blocked,
                beta1=beta1,
                beta2=beta2,
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )
        # Autograd knows a parameter by its own count of changes, not by that of the buffer.
        torch.autograd.graph.increment_version(self._owned)
