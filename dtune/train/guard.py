"""Bad steps: decided on the device, alike on all ranks, before the optimizer step.

A step is bad if its loss or gradient norm is not finite, or far above what it was (a spike). The
optimizer does not take it: neither parameters nor moments change. The host learns of it when it
next reads the numbers of the steps, so that a good step costs no waiting for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dtune.runtime.world import World
from dtune.train.guard_schema import GuardConfig, Policy, SpikePolicy

GOOD, NONFINITE, SPIKE = 0, 1, 2
"""Causes as the device says them."""

CAUSES = {NONFINITE: "nonfinite", SPIKE: "spike"}


@dataclass
class GuardState:
    """What the guard must have back to go on; part of a checkpoint, equal on all ranks."""

    skips: int = 0
    skips_in_a_row: int = 0
    rollbacks: int = 0
    left_out: list[int] = field(default_factory=list)
    """Steps, counted from 1, that are passed over."""
    losses: list[float] = field(default_factory=list)
    """Of the last good steps, oldest first; kept only where spikes are looked for."""
    norms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """What is to be done with a step; all on the device, equal on all ranks."""

    loss: torch.Tensor
    """fp32 scalar: mean loss over all ranks."""
    cause: torch.Tensor
    """int64 scalar: GOOD, NONFINITE or SPIKE."""
    blocked: torch.Tensor
    """bool scalar: the optimizer must not take the step."""


class Guard:
    """Judges every step by its loss and gradient norm."""

    def __init__(
        self, config: GuardConfig, world: World, *, scales_loss: bool, state: GuardState
    ) -> None:
        """``scales_loss``: an infinite norm alone is an overflow, of which the engine takes care.

        Goes on from the window of ``state``.
        """
        self._world = world
        self._scales_loss = scales_loss
        self._sigma = config.spike_sigma
        self._size = config.spike_window
        self._ends = {
            NONFINITE: config.nonfinite is not Policy.skip,
            SPIKE: config.spike is not SpikePolicy.skip,
        }
        self._finds_spikes = config.spike is not SpikePolicy.ignore
        self.restore(state)

    def restore(self, state: GuardState) -> None:
        """Begin with the window of a state; nothing is blocked any more."""
        device = self._world.device
        self._ended = torch.zeros((), dtype=torch.bool, device=device)
        window = torch.zeros((2, self._size), dtype=torch.float32)
        kept = len(state.losses[-self._size :])
        if kept:
            window[0, -kept:] = torch.tensor(state.losses[-self._size :])
            window[1, -kept:] = torch.tensor(state.norms[-self._size :])
        self._window = window.to(device)
        self._kept = torch.tensor(kept, device=device)

    def window(self) -> tuple[list[float], list[float]]:
        """Losses and norms that spikes are measured against. Waits for the device."""
        if not self._finds_spikes:
            return [], []
        kept = int(self._kept)
        losses, norms = self._window[:, self._size - kept :].tolist()
        return losses, norms

    @torch.no_grad()
    def judge(
        self, loss_share: torch.Tensor, norm: torch.Tensor, *, left_out: bool = False
    ) -> Verdict:
        """Decide about a step from this rank's share of the loss and the norm. Collective.

        A step that is ``left_out`` is blocked, and not bad, whatever its numbers. After a step
        that ends the run, or has it go back, all steps are blocked.
        """
        # One sum for both: whatever is not finite on one rank is not finite on all of them.
        mine = torch.stack([loss_share.float(), norm.float() / self._world.size])
        both = self._world.sum(mine)
        if left_out:
            nothing = torch.zeros((), dtype=torch.int64, device=both.device)
            return Verdict(both[0], nothing, nothing == GOOD)
        watched = both[:1] if self._scales_loss else both
        bad = ~torch.isfinite(watched).all()
        cause = bad.long() * NONFINITE
        ends = bad & self._ends[NONFINITE]
        if self._finds_spikes:
            spike = ~bad & self._is_spike(both)
            cause = cause + spike.long() * SPIKE
            ends = ends | (spike & self._ends[SPIKE])
        blocked = self._ended | (cause != GOOD)
        self._ended = self._ended | ends
        if self._finds_spikes:
            self._remember(both, ~blocked & torch.isfinite(both).all())
        return Verdict(both[0], cause, blocked)

    def _is_spike(self, both: torch.Tensor) -> torch.Tensor:
        """Whether loss or norm is above the mean of the window by many standard deviations."""
        slots = torch.arange(self._size, device=both.device)
        filled = (slots >= self._size - self._kept).double()
        window, kept = self._window.double(), self._kept.clamp(min=2)
        mean = (window * filled).sum(dim=1) / kept
        spread = (((window - mean[:, None]) * filled).square().sum(dim=1) / (kept - 1)).sqrt()
        # An infinite norm of fp16 is an overflow.
        above = (both.double() > mean + self._sigma * spread) & torch.isfinite(both)
        return above.any() & (self._kept >= self._size // 2)

    def _remember(self, both: torch.Tensor, good: torch.Tensor) -> None:
        """Put the numbers of a good step at the end of the window."""
        moved = torch.cat([self._window[:, 1:], both[:, None]], dim=1)
        self._window = torch.where(good, moved, self._window)
        self._kept = (self._kept + good.long()).clamp(max=self._size)
