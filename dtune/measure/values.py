"""Values of a few integers beside tensors without values: what the host reads of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

LARGEST = 1 << 22
"""Tensors of more elements are not followed."""

_READ = torch.ops.aten._local_scalar_dense.default
_PLACES = torch.ops.aten.nonzero.default
_DRAW = torch.ops.aten.rand.default
_ABOVE = torch.ops.aten.gt.Scalar


class Unknown(LookupError):
    """The values of a tensor are not known."""


class Values:
    """Follows integers and truths that are computed of a batch's own, on the CPU.

    A model may ask how many documents a row holds, or whether a mask hides anything. What it asks
    of floats is not known.
    """

    def __init__(self) -> None:
        self._known: Any = WeakIdKeyDictionary()
        self._drawn: Any = WeakIdKeyDictionary()

    def tell(self, tensor: torch.Tensor, values: torch.Tensor) -> None:
        """Say what a tensor without values holds."""
        # A copy: what is computed in place stays here.
        self._known[tensor] = values.clone()

    def integers(self, tensor: torch.Tensor) -> list[int] | None:
        """What a flat tensor holds; None where it is not known."""
        known = self._known.get(tensor)
        if known is None:
            return None
        with _disable_current_modes():
            found: list[int] = known.tolist()
        return found

    def read(self, func: Any, args: tuple[Any, ...]) -> bool | int | torch.Tensor:
        """What the host reads of a tensor by this call: a number, or places that are not zero.

        Places come as a tensor without values, whose values are known. Unknown where the call is
        another, or the tensor's values are not known.
        """
        if func not in (_READ, _PLACES) or args[0] not in self._known:
            raise Unknown
        with _disable_current_modes():
            known = self._known[args[0]]
            found = known.item() if func is _READ else known.nonzero()
        if func is _READ:
            number: bool | int = found
            return number
        places: torch.Tensor = args[0].new_empty(found.shape, dtype=found.dtype)
        self._known[places] = found
        return places

    def follow(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], results: Any
    ) -> None:
        """Compute what a call gives, where it gives integers of known ones."""
        self._follow_draw(func, args, results)
        made = [leaf for leaf in tree_leaves(results) if isinstance(leaf, torch.Tensor)]
        if not made or any(one.is_floating_point() or one.numel() > LARGEST for one in made):
            return
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if not all(one in self._known for one in given):
            for one in given if func._schema.is_mutable else ():
                self._known.pop(one, None)
            return
        with _disable_current_modes():
            known = func(*self._of(args), **self._of({**kwargs, **_on_cpu(kwargs)}))
        values = [leaf for leaf in tree_leaves(known) if isinstance(leaf, torch.Tensor)]
        for one, value in zip(made, values, strict=True):
            self._known[one] = value

    def _of(self, tree: Any) -> Any:
        return tree_map_only(torch.Tensor, lambda one: self._known[one], tree)

    def _follow_draw(self, func: Any, args: tuple[Any, ...], results: Any) -> None:
        """A number in [0, 1) is above 0: what HF ``peft`` asks where no module is dropped."""
        if func is _DRAW:
            self._drawn[results] = True
        elif func is _ABOVE and args[1] == 0 and args[0] in self._drawn:
            with _disable_current_modes():
                self._known[results] = torch.ones(results.shape, dtype=torch.bool)


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"device": torch.device("cpu")} if kwargs.get("device") is not None else {}
