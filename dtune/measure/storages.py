"""Which storages a computation leaves alive: memory counted, not sampled."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PRUNE_AT = 4096
_COPY = torch.ops.aten._to_copy.default


def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage:
    """Of this rank's part, where a tensor is spread."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage()


def distinct_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages of tensors, each counted once however many share it."""
    storages = (storage_of(tensor) for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


class StorageTally(TorchDispatchMode):
    """Notes the storage of every result inside of it, without keeping any alive.

    What is alive afterwards is what somebody holds: autograd, a cache, a recomputation's inputs.
    Works on tensors with and without memory (FakeTensorMode).
    """

    def __init__(self, *, copied_from: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sources = {storage_of(tensor)._cdata for tensor in copied_from}
        self._seen: dict[int, tuple[StorageWeakRef, bool]] = {}
        self._limit = _PRUNE_AT

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation and note what it returns."""
        results = func(*args, **(kwargs or {}))
        is_copy = func is _COPY and storage_of(args[0])._cdata in self._sources
        for leaf in tree_leaves(results):
            if isinstance(leaf, torch.Tensor):
                reference = StorageWeakRef(storage_of(leaf))
                self._seen.setdefault(reference.cdata, (reference, is_copy))
        if len(self._seen) > self._limit:
            self._seen = {k: v for k, v in self._seen.items() if not v[0].expired()}
            self._limit = 2 * len(self._seen) + _PRUNE_AT
        return results

    def alive(self, *, besides: Iterable[torch.Tensor] = ()) -> int:
        """Bytes of noted storages that are alive, but those of the tensors ``besides``."""
        known = {storage_of(tensor)._cdata for tensor in besides}
        return sum(
            _bytes_behind(reference)
            for address, (reference, _) in self._seen.items()
            if address not in known
        )

    def alive_copies(self) -> int:
        """Bytes of those of them that are copies of ``copied_from`` in another dtype."""
        return sum(_bytes_behind(ref) for ref, is_copy in self._seen.values() if is_copy)


def _bytes_behind(reference: StorageWeakRef) -> int:
    storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
    return 0 if storage is None else int(storage.nbytes())
