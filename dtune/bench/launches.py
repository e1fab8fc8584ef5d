"""How many kernels a step launches, or operations it dispatches where nothing is launched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from dtune.bench.timing import synchronize

KERNELS = "kernels"
OPERATIONS = "operations"

_ALIASES = frozenset(
    "view _unsafe_view t transpose permute expand slice select squeeze unsqueeze as_strided detach "
    "alias split split_with_sizes unbind reshape _reshape_alias chunk narrow diagonal".split()
)
"""Operations that compute nothing."""


@dataclass(frozen=True)
class Launches:
    """A count, and of what."""

    count: int
    of: str


def count_launches(step: Callable[[], object], device: torch.device) -> Launches:
    """Do one step and count; it is slower than others, and not to be timed."""
    if device.type == "cuda":
        return Launches(_count_kernels(step, device), KERNELS)
    counter = _Counter()
    with counter:
        step()
    return Launches(counter.count, OPERATIONS)


def _count_kernels(step: Callable[[], object], device: torch.device) -> int:
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        synchronize(device)
    return sum(
        event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
        for event in profiler.events() or ()
    )


class _Counter(TorchDispatchMode):
    """Counts what reaches the kernels of the dispatcher, without what only renames memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation, and count it."""
        self.count += func._schema.name.partition("::")[2] not in _ALIASES
        return func(*args, **(kwargs or {}))
