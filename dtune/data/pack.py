"""Best-fit packing: which rows share a sequence, so that few slots stay empty."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """A way to put rows of given lengths into packs; which row of a length goes where is open.

    Slots are numbered by falling length. The packing depends on the multiset of lengths alone, so
    that every epoch has the same number of packs, and is made once.
    """

    slots: Ints
    """Slot numbers, pack after pack."""
    starts: Ints
    """Where each pack begins in ``slots``; one more entry than packs."""

    def __len__(self) -> int:
        return len(self.starts) - 1


class _Bins:
    """Open packs by the room they have left."""

    def __init__(self, capacity: int) -> None:
        self._by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
        # Bit r is set where some pack has r free positions: the best fit is one shift away.
        self._rooms = 0

    def put(self, room: int, packs: list[int]) -> None:
        """Add packs that have ``room`` left."""
        if packs and room:
            self._by_room[room].extend(packs)
            self._rooms |= 1 << room

    def smallest_room(self, length: int) -> int:
        """Least room of at least ``length`` that some pack has; 0 if none has."""
        fits = self._rooms >> length
        return length + (fits & -fits).bit_length() - 1 if fits else 0

    def take(self, room: int, number: int) -> list[int]:
        """Remove at most ``number`` packs that have ``room`` left."""
        packs = self._by_room[room]
        taken = packs[-number:]
        del packs[-number:]
        if not packs:
            self._rooms &= ~(1 << room)
        return taken


def plan_packing(lengths: Ints, capacity: int) -> Packing:
    """Pack by best-fit decreasing: each row goes where it leaves the least room.

    Rows of one length are placed together, which gives the same packs as one after another and
    takes time by the number of lengths rather than of rows.
    """
    assert lengths.min() > 0
    assert lengths.max() <= capacity
    values, counts = np.unique(lengths, return_counts=True)
    bins = _Bins(capacity)
    pack_of_slot: list[int] = []
    num_packs = 0
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        left = count
        while left:
            room = bins.smallest_room(length)
            each = (room or capacity) // length
            wanted = -(-left // each)
            if room:
                packs = bins.take(room, wanted)
            else:
                room = capacity
                packs = list(range(num_packs, num_packs + wanted))
                num_packs += wanted
            placed = min(left, each * len(packs))
            full, rest = divmod(placed, each)
            pack_of_slot += np.repeat(packs, each)[:placed].tolist()
            bins.put(room - each * length, packs[:full])
            bins.put(room - rest * length, packs[full : full + 1])
            left -= placed
    owners = np.asarray(pack_of_slot)
    starts = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=num_packs))])
    return Packing(slots=np.argsort(owners, kind="stable"), starts=starts)


class SequencePlan:
    """Which rows make up which sequence of an endless stream of epochs.

    A sequence is a pack of rows, or one row. The order of an epoch is a function of the seed and
    the epoch alone; every row comes exactly once in each epoch.
    """

    def __init__(
        self, lengths: Ints, *, max_length: int, packing: bool, shuffle: bool, seed: int
    ) -> None:
        self._lengths = lengths
        self._packing = plan_packing(lengths, max_length) if packing else None
        self._shuffle = shuffle
        self._seed = seed
        self._current = self._order(0)
        self.num_sequences = len(lengths) if self._packing is None else len(self._packing)

    def rows(self, position: int) -> list[int]:
        """Rows of the sequence at a position of the stream."""
        epoch, index = divmod(position, self.num_sequences)
        current = self._current
        if current.epoch != epoch:
            current = self._current = self._order(epoch)
        start, stop = current.starts[index : index + 2]
        rows: list[int] = current.rows[start:stop].tolist()
        return rows

    def _order(self, epoch: int) -> _Epoch:
        random = np.random.default_rng([self._seed, epoch])
        count = len(self._lengths)
        rows = random.permutation(count) if self._shuffle else np.arange(count)
        if self._packing is None:
            return _Epoch(epoch, rows, np.arange(count + 1))
        by_length = rows[np.argsort(-self._lengths[rows], kind="stable")]
        packed, starts = by_length[self._packing.slots], self._packing.starts
        if self._shuffle:
            order = random.permutation(len(self._packing))
        else:
            order = np.argsort(np.minimum.reduceat(packed, starts[:-1]), kind="stable")
        return _Epoch(epoch, *_reorder(packed, starts, order))


@dataclass(frozen=True)
class _Epoch:
    """Rows of all sequences of one epoch, one sequence after another, and where each begins."""

    epoch: int
    rows: Ints
    starts: Ints


def _reorder(values: Ints, starts: Ints, order: Ints) -> tuple[Ints, Ints]:
    """Bring groups of values into another order."""
    sizes = np.diff(starts)[order]
    new_starts = np.concatenate([[0], np.cumsum(sizes)])
    # Position within the group, added to where the group was before.
    within = np.arange(len(values)) - np.repeat(new_starts[:-1], sizes)
    return values[np.repeat(starts[:-1][order], sizes) + within], new_starts
