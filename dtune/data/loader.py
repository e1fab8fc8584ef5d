"""Batches by the number of the optimizer step: computed, not iterated to."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from dtune.data.dataset import TokenDataset
from dtune.data.pack import SequencePlan
from dtune.data.schema import DataConfig
from dtune.errors import ConfigError
from dtune.types import IGNORE_INDEX, Batch

_MULTIPLE = 8
_AHEAD = 2


class Loader:
    """The batches of one rank.

    Sequences (packs, or single rows) form one endless stream over all epochs. Step ``i`` takes
    the next ``global_batch_size`` of them: micro batch ``a`` of rank ``r`` is the slice at
    ``(a * world_size + r) * micro_batch_size``. So the sequences of a step do not depend on the
    number of ranks, and the state of a loader is the step alone.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        config: DataConfig,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        pad_token_id: int,
        epochs: float = 0.0,
        shuffle: bool | None = None,
    ) -> None:
        """Plan the sequences.

        ``epochs`` ends the stream there: the last step is filled up with sequences that have no
        targets; 0 lets it go on. ``shuffle`` overrides the config (held-out data need none).

        Raises:
            ConfigError: The global batch cannot be split over ranks and micro batches.
        """
        self.dataset = dataset
        self.accumulation = check_batch_sizes(
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            world_size=world_size,
        )
        self._packing = config.packing
        self._max_length = config.max_length
        self._micro = micro_batch_size
        self._global = global_batch_size
        self._rank = rank
        self._world_size = world_size
        self._pad = pad_token_id
        self._pin = torch.cuda.is_available()
        self._plan = SequencePlan(
            dataset.lengths,
            max_length=config.max_length,
            packing=config.packing,
            shuffle=config.shuffle if shuffle is None else shuffle,
            seed=seed,
        )
        self._end = self._sequences(epochs) if epochs else None

    @property
    def sequences_per_epoch(self) -> int:
        """Packs, or rows, of one pass over the data."""
        return self._plan.num_sequences

    def _sequences(self, epochs: float) -> int:
        # 1e-9: 0.1 * 3 epochs of 10 sequences are 3, not the 4 that rounding up would make of it.
        return math.ceil(epochs * self._plan.num_sequences - 1e-9)

    def steps_for(self, epochs: float) -> int:
        """Optimizer steps that so many passes over the data take; the last may be part empty."""
        return max(1, math.ceil(self._sequences(epochs) / self._global))

    def sequences_until(self, steps: int) -> int:
        """Sequences with rows in them that the first ``steps`` optimizer steps take."""
        taken = steps * self._global
        return taken if self._end is None else min(taken, self._end)

    def batches(self, step: int) -> list[Batch]:
        """Micro batches of this rank for an optimizer step, counted from 0."""
        first = step * self._global
        offsets = (
            (micro * self._world_size + self._rank) * self._micro
            for micro in range(self.accumulation)
        )
        return [self._build(self._take(first + offset, self._micro)) for offset in offsets]

    def row_ids(self, step: int) -> list[int]:
        """Numbers in the data set of all rows of a step, over all ranks."""
        sequences = self._take(step * self._global, self._global)
        return [row for sequence in sequences for row in sequence]

    def _take(self, start: int, number: int) -> list[list[int]]:
        """Rows of sequences of the stream; none for those past its end."""
        end = start + number if self._end is None else self._end
        positions = range(start, start + number)
        return [self._plan.rows(at) if at < end else [] for at in positions]

    def _build(self, sequences: Sequence[list[int]]) -> Batch:
        """Fill the tensors of one micro batch."""
        lengths = [sum(int(self.dataset.lengths[row]) for row in rows) for rows in sequences]
        width = self._max_length
        if not self._packing:
            width = min(width, -(-max(1, *lengths) // _MULTIPLE) * _MULTIPLE)
        shape = (len(sequences), width)
        input_ids = np.full(shape, self._pad, np.int64)
        labels = np.full(shape, IGNORE_INDEX, np.int64)
        position_ids = np.zeros(shape, np.int64)
        document_ids = np.full(shape, -1, np.int64)
        for b, rows in enumerate(sequences):
            at = 0
            for document, row in enumerate(rows):
                tokens = self.dataset.tokens(row)
                stop = at + len(tokens)
                input_ids[b, at:stop] = tokens
                labels[b, at:stop] = np.where(self.dataset.trained(row), tokens, IGNORE_INDEX)
                position_ids[b, at:stop] = np.arange(len(tokens))
                document_ids[b, at:stop] = document
                at = stop
            # Packed: padding is one more document. Padded: positions go on to the end.
            start = 0 if self._packing else at
            position_ids[b, at:] = np.arange(start, start + width - at)
        mask = None if self._packing else self._mask(document_ids)
        return Batch(
            input_ids=self._tensor(input_ids),
            labels=self._tensor(labels),
            position_ids=self._tensor(position_ids),
            document_ids=self._tensor(document_ids),
            attention_mask=None if mask is None else self._tensor(mask),
            rows=tuple(tuple(rows) for rows in sequences),
            num_tokens=sum(lengths),
            num_targets=int(np.count_nonzero(labels != IGNORE_INDEX)),
        )

    @staticmethod
    def _mask(document_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        mask = (document_ids >= 0).astype(np.int64)
        # A row of padding alone must see one position: softmax over nothing is NaN.
        mask[:, 0] = 1
        return mask

    def _tensor(self, array: npt.NDArray[np.int64]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self._pin else tensor


def check_batch_sizes(*, micro_batch_size: int, global_batch_size: int, world_size: int) -> int:
    """Return the micro batches of one optimizer step on each rank.

    Raises:
        ConfigError: It would not be a whole number.
    """
    together = micro_batch_size * world_size
    accumulation, rest = divmod(global_batch_size, together)
    if rest or not accumulation:
        nearest = max(1, round(global_batch_size / together)) * together
        other = ""
        if global_batch_size % world_size == 0:
            other = f", or train.micro_batch_size to a divisor of {global_batch_size // world_size}"
        raise ConfigError(
            f"train.global_batch_size={global_batch_size} is not a multiple of "
            f"train.micro_batch_size={micro_batch_size} x {world_size} processes = {together}; "
            f"set train.global_batch_size={nearest}{other}"
        )
    return accumulation


def _device_chooser() -> Callable[[], None]:
    """Make a new thread use this thread's GPU: pinning would occupy the first one otherwise."""
    if not torch.cuda.is_available():
        return lambda: None
    return partial(torch.cuda.set_device, torch.cuda.current_device())


def prefetch(loader: Loader, start: int, stop: int) -> Iterator[list[Batch]]:
    """Batches of steps [start, stop), built ahead by one thread; its errors are raised here."""
    pool = ThreadPoolExecutor(
        max_workers=1, thread_name_prefix="dtune-batches", initializer=_device_chooser()
    )
    try:
        first = range(start, min(start + _AHEAD, stop))
        waiting = deque(pool.submit(loader.batches, step) for step in first)
        for step in range(start, stop):
            batches = waiting.popleft().result()
            if step + _AHEAD < stop:
                waiting.append(pool.submit(loader.batches, step + _AHEAD))
            yield batches
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
