"""Activations that wait for the backward pass in host memory instead of on the device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from dtune.parallel.saved import check_unchanged, keep, parameter_of, restore

Hooks = tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]
"""Pack and unpack, as of ``saved_tensors_hooks``."""

MIN_BYTES = 4096
"""Storages below it stay on the device: a copy of its own costs more than they take."""


@dataclass(eq=False, slots=True, weakref_slot=True)
class _Slot:
    """One storage: on the device, in host memory, or on its way."""

    device: torch.UntypedStorage | None
    nbytes: int
    place: torch.device
    host: torch.Tensor | None = None


@dataclass(slots=True)
class _Packed:
    """A saved tensor as autograd keeps it: a view of a slot."""

    stash: Stash
    slot: _Slot
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Lane:
    """The stream that copies beside the computing one; on a CPU there is none, a copy is done."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def behind(self, device: torch.device) -> AbstractContextManager[Any]:
        """Run what is inside on the side stream, after all that computing has queued so far."""
        if device.type != "cuda":
            return nullcontext()
        stream = self._stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(stream)

    def join(self, device: torch.device) -> None:
        """Let computing go on only after all that the side stream has queued so far."""
        if device.type == "cuda":
            torch.cuda.current_stream(device).wait_stream(self._stream(device))

    def borrow(self, tensor: torch.Tensor) -> None:
        """Keep memory of the computing stream until the side stream, too, is done with it."""
        if tensor.device.type == "cuda":
            tensor.record_stream(self._stream(tensor.device))


class Stash:
    """What one run of one block saved.

    Its storages leave for the host while the next block computes, and come back while the block
    after it, in backward, does. A storage is copied once however many tensors view it. Only what
    autograd still refers to is kept, here or there.
    """

    def __init__(self, lane: _Lane, before: Stash | None, *, stays: bool) -> None:
        self._lane = lane
        self._before = None if before is None else weakref.ref(before)
        self._after: weakref.ref[Stash] | None = None
        if before is not None:
            before._after = weakref.ref(self)
        self._stays = stays
        self._slots: list[weakref.ref[_Slot]] = []
        self._by_storage: dict[int, _Slot] = {}
        self._leaving: list[tuple[_Slot, torch.Tensor, int]] = []
        self._arriving: set[torch.device] = set()
        self._is_used = False

    def pack(self, tensor: torch.Tensor) -> _Packed:
        """Start the copy to the host, unless the storage is on its way already."""
        storage = tensor.untyped_storage()
        slot = self._by_storage.get(storage._cdata)
        if slot is None:
            slot = self._send(tensor.detach())
            self._by_storage[storage._cdata] = slot
        return _Packed(
            self, slot, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset())
        )

    def _send(self, tensor: torch.Tensor) -> _Slot:
        storage = tensor.untyped_storage()
        slot = _Slot(storage, storage.nbytes(), tensor.device)
        self._slots.append(weakref.ref(slot))
        if self._stays:
            return slot
        self._leaving.append((slot, tensor, tensor._version))
        if storage.device.type == "meta":  # a plan: nothing to copy
            slot.host = torch.empty(slot.nbytes, dtype=torch.uint8, device="meta")
            return slot
        is_cuda = tensor.device.type == "cuda"
        slot.host = torch.empty(slot.nbytes, dtype=torch.uint8, pin_memory=is_cuda)
        with self._lane.behind(tensor.device):
            slot.host.copy_(_bytes_of(storage), non_blocking=True)
        return slot

    def close(self) -> None:
        """End of the block's forward: later storages are others, whatever their address."""
        self._by_storage.clear()

    def release(self) -> None:
        """Free the device's copies; computing waits until they have been read."""
        for device in {slot.place for slot, _, _ in self._leaving if _is_real(slot)}:
            self._lane.join(device)
        for slot, tensor, version in self._leaving:
            check_unchanged(tensor, version)
            slot.device = None
        self._leaving.clear()

    def unpack(self, packed: _Packed) -> torch.Tensor:
        """The saved tensor on its device; the first one of a block fetches the block before."""
        if packed.slot.device is None:
            self._bring()
        for device in self._arriving:
            self._lane.join(device)
        self._arriving.clear()
        if not self._is_used:
            self._is_used = True
            self._take_turns()
        storage = packed.slot.device
        assert storage is not None
        empty = torch.empty(0, dtype=packed.dtype, device=packed.slot.place)
        return empty.set_(storage, packed.offset, packed.size, packed.stride)

    def _take_turns(self) -> None:
        before = self.before
        after = None if self._after is None else self._after()
        if after is not None:
            after._drop()
        if before is not None:
            before._bring()

    def _alive(self) -> Iterator[_Slot]:
        for reference in self._slots:
            slot = reference()
            if slot is not None:
                yield slot

    def _bring(self) -> None:
        """Start copying back what is still needed and not on the device."""
        for slot in self._alive():
            if slot.device is not None:
                continue
            assert slot.host is not None
            target = torch.empty(slot.nbytes, dtype=torch.uint8, device=slot.place)
            slot.device = target.untyped_storage()
            if not _is_real(slot):
                continue
            with self._lane.behind(slot.place):
                target.copy_(slot.host, non_blocking=True)
            self._lane.borrow(target)
            self._arriving.add(slot.place)

    def _drop(self) -> None:
        """Free what backward has passed by; it would come back if it were asked for again."""
        for slot in self._alive():
            if slot.host is not None:
                slot.device = None

    @property
    def host_bytes(self) -> int:
        """Bytes of what is still needed and has left the device."""
        return sum(slot.nbytes for slot in self._alive() if slot.device is None)

    @property
    def before(self) -> Stash | None:
        """That of the block before, if anything of it is still needed."""
        return None if self._before is None else self._before()


class Offload:
    """Runs the blocks of a model so that what they save for backward waits in host memory.

    The last block keeps what it saves: backward begins there. Parameters, their copies in another
    dtype and what a block shares with others (masks, rotary embeddings) stay where they are.
    """

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._lane = _Lane()
        self._latest: weakref.ref[Stash] | None = None
        self._leaving: Stash | None = None

    def run(
        self, index: int, inner: Callable[..., Any], forward: Callable[..., Any], *args: Any
    ) -> Any:
        """``inner(forward, *args, hooks=...)``: the forward of a block, or its checkpoint.

        ``args`` are the block's own; what ``forward`` binds by keyword is shared between blocks.
        ``hooks`` pack and unpack what is kept by other means than autograd's.
        """
        if not torch.is_grad_enabled():
            return forward(*args)
        previous = self._latest() if self._latest is not None and index else None
        stash = Stash(self._lane, previous, stays=index == self._num_blocks - 1)
        self._latest = weakref.ref(stash)
        shared = _storages(forward.keywords) if isinstance(forward, partial) else set()
        pack = partial(_pack, stash, shared)
        with saved_tensors_hooks(pack, _unpack):
            output = inner(forward, *args, hooks=(pack, _unpack))
        stash.close()
        if self._leaving is not None:
            self._leaving.release()
        self._leaving = stash if index < self._num_blocks - 1 else None
        return output

    @property
    def host_bytes(self) -> int:
        """Bytes of what the blocks of the latest forward pass have in host memory."""
        total, stash = 0, None if self._latest is None else self._latest()
        while stash is not None:
            total, stash = total + stash.host_bytes, stash.before
        return total


def _pack(stash: Stash, shared: set[int], tensor: torch.Tensor) -> Any:
    if parameter_of(tensor) is not None or _is_spread(tensor):
        return keep(tensor)
    storage = tensor.untyped_storage()
    if storage._cdata in shared or storage.nbytes() < MIN_BYTES or _is_autocast_copy(tensor):
        return keep(tensor)
    return stash.pack(tensor)


def _unpack(saved: Any) -> torch.Tensor:
    return saved.stash.unpack(saved) if isinstance(saved, _Packed) else restore(saved)


def _is_real(slot: _Slot) -> bool:
    """Whether there is something to copy: not in a plan."""
    return slot.host is not None and not slot.host.is_meta


def _storages(tree: Any) -> set[int]:
    return {
        leaf.untyped_storage()._cdata
        for leaf in tree_leaves(tree)
        if isinstance(leaf, torch.Tensor) and not _is_spread(leaf)
    }


def _is_spread(tensor: Any) -> bool:
    """Whether it is made of other tensors, as a DTensor is."""
    return bool(is_traceable_wrapper_subclass(tensor))


def _is_autocast_copy(tensor: torch.Tensor) -> bool:
    """Whether it is a parameter in another dtype: autocast keeps those for the whole step."""
    base = tensor if tensor._base is None else tensor._base
    node = base.grad_fn
    if node is None or node.name() != "ToCopyBackward0":
        return False
    leaf: Any = node.next_functions[0][0]
    is_leaf = leaf is not None and leaf.name().endswith("AccumulateGrad")
    return is_leaf and isinstance(leaf.variable, nn.Parameter)


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
