"""How results of kernels are judged, and how kernels run without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from dtune_kernels.catalog import CATALOG
from dtune_kernels.check import errors
from torch.utils._python_dispatch import TorchDispatchMode

EMPTY = ("aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided")


class _TritonOnCpu(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        if name.startswith("dtune::"):
            with self:  # what the launcher allocates, too
                return CATALOG[name.removeprefix("dtune::")].triton(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        # What is allocated and not written must show.
        if name in EMPTY and out.is_floating_point():
            out.fill_(float("nan"))
        return out


@contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Run ``dtune::`` ops on CPU tensors by their Triton kernels, interpreted.

    Only fp32 and fp16 (and integers): the interpreter computes bf16 wrongly. Memory that is
    allocated empty starts as NaN.
    """
    with _TritonOnCpu():
        yield


def accepts(got: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> bool:
    """Whether the error is at most twice that of the plain path, or of one rounding."""
    if got.shape != exact.shape or not torch.isfinite(got).all():
        return False
    if exact.numel() == 0:
        return True
    if not exact.any():
        return not got.any()
    floor = torch.finfo(got.dtype).eps / 2
    return all(
        ours <= 2 * max(theirs, floor)
        for ours, theirs in zip(
            errors(got, exact.double()), errors(plain, exact.double()), strict=True
        )
    )


def assert_parity(got: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> None:
    """``got`` is as near to ``exact`` (fp64) as plain PyTorch in the same dtype, within a factor 2.

    The comparison itself is shown to reject zeros and a result that is 5 % too large.
    """
    assert got.dtype == plain.dtype, (got.dtype, plain.dtype)
    assert accepts(got, exact, plain), (
        f"errors {errors(got, exact)}, plain {errors(plain, exact)}, shape {list(got.shape)}"
    )
    if exact.any():
        assert not accepts(torch.zeros_like(got), exact, plain), "zeros would pass"
        assert not accepts((got.double() * 1.05).to(got.dtype), exact, plain), "x1.05 would pass"
