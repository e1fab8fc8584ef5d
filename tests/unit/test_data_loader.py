"""Batches: the same rows a step on any number of ranks, whole documents, nothing lost."""

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from dtune.data import pack
from dtune.data.dataset import DatasetWriter, TokenDataset, load_dataset_folder
from dtune.data.loader import Loader, check_batch_sizes, prefetch
from dtune.data.pack import Packing, plan_packing
from dtune.data.report import DataReport
from dtune.data.schema import DataConfig
from dtune.errors import ConfigError
from dtune.types import IGNORE_INDEX, Batch, Example

PAD = 9999
ROWS = 53
LENGTH = 32


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    """Row r has 3 + 7r mod 20 tokens, each r * 100 + position, and answers after the second."""
    folder = tmp_path_factory.mktemp("tokens")
    writer = DatasetWriter(folder)
    for row in range(ROWS):
        tokens = [row * 100 + position for position in range(3 + 7 * row % 20)]
        labels = [IGNORE_INDEX, IGNORE_INDEX, *tokens[2:]]
        writer.add(Example(row, tokens, labels), f"f:{row}")
    writer.finish(DataReport())
    found = load_dataset_folder(folder)
    assert found is not None
    return found


def load(
    dataset: TokenDataset, *, packing: bool = True, max_length: int = LENGTH, **options: object
) -> Loader:
    settings: dict[str, object] = {
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "seed": 1,
        "rank": 0,
        "world_size": 1,
        "pad_token_id": PAD,
    }
    config = DataConfig(path="x", max_length=max_length, packing=packing)
    return Loader(dataset, config, **(settings | options))  # type: ignore[arg-type]


def documents(batch: Batch) -> list[tuple[list[int], list[int], list[int]]]:
    """Tokens, labels and positions of each document of a batch."""
    found = []
    for b, rows in enumerate(batch.rows):
        for document in range(len(rows)):
            at = batch.document_ids[b] == document
            found.append(
                (
                    batch.input_ids[b][at].tolist(),
                    batch.labels[b][at].tolist(),
                    batch.position_ids[b][at].tolist(),
                )
            )
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_documents_stay_whole_with_their_own_labels_and_positions(
    dataset: TokenDataset, packing: bool
) -> None:
    loader = load(dataset, packing=packing, epochs=1.0)
    for step in range(loader.steps_for(1)):
        for batch in loader.batches(step):
            numbers = [row for rows in batch.rows for row in rows]
            for number, (tokens, labels, positions) in zip(numbers, documents(batch), strict=True):
                example = dataset.example(number)
                assert tokens == example.input_ids
                assert labels == example.labels
                assert labels[0] == IGNORE_INDEX
                assert positions == list(range(len(tokens)))


@pytest.mark.parametrize("packing", [True, False])
def test_sequences_until_a_step_are_those_with_rows(dataset: TokenDataset, packing: bool) -> None:
    loader = load(dataset, packing=packing, epochs=1.0)
    steps = loader.steps_for(1)
    assert loader.sequences_until(steps) == loader.sequences_per_epoch
    for step in range(steps):
        held = sum(bool(rows) for batch in loader.batches(step) for rows in batch.rows)
        assert loader.sequences_until(step + 1) - loader.sequences_until(step) == held
    endless = load(dataset, packing=packing)
    assert endless.sequences_until(3) == 3 * endless.sequences_until(1) > 0


@pytest.mark.parametrize("packing", [True, False])
def test_padding_is_marked_everywhere_and_counts_are_right(
    dataset: TokenDataset, packing: bool
) -> None:
    loader = load(dataset, packing=packing, epochs=1.0)
    tokens = targets = 0
    for step in range(loader.steps_for(1)):
        for batch in loader.batches(step):
            padding = batch.document_ids == -1
            assert torch.equal(padding, batch.input_ids == PAD)
            assert (batch.labels[padding] == IGNORE_INDEX).all()
            assert batch.num_tokens == int((~padding).sum())
            assert batch.num_targets == int((batch.labels != IGNORE_INDEX).sum())
            assert (batch.labels[:, 0] == IGNORE_INDEX).all()
            tokens += batch.num_tokens
            targets += batch.num_targets
    assert tokens == int(dataset.lengths.sum())
    assert targets == tokens - 2 * ROWS


def test_packed_rows_are_full_width_and_padding_is_a_document_of_its_own(
    dataset: TokenDataset,
) -> None:
    batch = load(dataset).batches(0)[0]
    assert batch.input_ids.shape == (2, LENGTH)
    assert batch.attention_mask is None
    assert max(len(rows) for rows in batch.rows) > 1
    for b in range(2):
        changes = batch.document_ids[b].diff() != 0
        assert torch.equal(changes, batch.position_ids[b].diff() != 1)
        assert int(batch.position_ids[b, 0]) == 0


@pytest.mark.parametrize("world_size", [1, 2])
def test_packed_batches_have_one_shape_for_the_whole_run(
    dataset: TokenDataset, world_size: int
) -> None:
    """Also the last, which is part empty: what is planned or captured for a shape serves all."""
    shapes = set()
    padding = slots = tokens = 0
    for rank in range(world_size):
        loader = load(dataset, rank=rank, world_size=world_size, epochs=2.5)
        for step in range(loader.steps_for(2.5)):
            for batch in loader.batches(step):
                fields = (batch.input_ids, batch.labels, batch.position_ids, batch.document_ids)
                shapes |= {(one.shape, one.dtype, one.stride()) for one in fields}
                assert batch.attention_mask is None
                padding += int((batch.document_ids == -1).sum())
                slots += batch.num_slots
                tokens += batch.num_tokens
    assert shapes == {((2, LENGTH), torch.int64, (LENGTH, 1))}
    # Padding is counted as what it is.
    assert padding == slots - tokens > 0


def test_rows_are_packed_before_the_first_step_and_never_again(
    dataset: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(*args: Any) -> Packing:
        calls.append(args)
        return plan_packing(*args)

    monkeypatch.setattr(pack, "plan_packing", counted)
    loader = load(dataset)
    assert len(calls) == 1
    for _ in prefetch(loader, 0, 3 * loader.sequences_per_epoch // 8):
        pass
    assert len(calls) == 1


def test_padded_batches_are_as_wide_as_their_longest_row_in_eights(dataset: TokenDataset) -> None:
    for step in range(6):
        for batch in load(dataset, packing=False).batches(step):
            longest = max(int(dataset.lengths[row]) for (row,) in batch.rows)
            assert batch.input_ids.shape[1] == -(-longest // 8) * 8
            assert batch.attention_mask is not None
            assert torch.equal(batch.attention_mask == 1, batch.document_ids == 0)
            width = batch.input_ids.shape[1]
            assert torch.equal(batch.position_ids, torch.arange(width).expand(2, -1))


def test_width_never_exceeds_max_length(dataset: TokenDataset) -> None:
    longest = int(dataset.lengths.max())
    assert longest % 8
    sizes = {"micro_batch_size": ROWS, "global_batch_size": ROWS, "max_length": longest}
    batch = load(dataset, packing=False, **sizes).batches(0)[0]
    assert batch.input_ids.shape == (ROWS, longest)


def rows_of(batches: list[Batch]) -> list[tuple[int, ...]]:
    return [rows for batch in batches for rows in batch.rows]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("micro", "world_size"), [(2, 1), (2, 2), (1, 4), (4, 2), (8, 1), (1, 8)])
def test_a_step_holds_the_same_rows_on_any_number_of_ranks(
    dataset: TokenDataset, packing: bool, micro: int, world_size: int
) -> None:
    alone = load(dataset, packing=packing, epochs=2.0)
    ranks = [
        load(
            dataset,
            packing=packing,
            micro_batch_size=micro,
            world_size=world_size,
            rank=rank,
            epochs=2.0,
        )
        for rank in range(world_size)
    ]
    assert {loader.accumulation for loader in ranks} == {8 // micro // world_size}
    for step in range(alone.steps_for(2)):
        expected = rows_of(alone.batches(step))
        found = [rows_of(loader.batches(step)) for loader in ranks]
        assert {len(rows) for rows in found} == {8 // world_size}
        assert sorted(row for rows in found for row in rows) == sorted(expected)
        flat = [row for sequence in expected for row in sequence]
        assert [loader.row_ids(step) for loader in ranks] == [flat] * world_size


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_two_epochs_have_every_row_twice_and_the_last_step_is_filled_up(
    dataset: TokenDataset, packing: bool, world_size: int
) -> None:
    seen: list[int] = []
    for rank in range(world_size):
        loader = load(dataset, packing=packing, rank=rank, world_size=world_size, epochs=2.0)
        for step in range(loader.steps_for(2)):
            batches = loader.batches(step)
            assert len(batches) == 8 // 2 // world_size
            seen += [row for rows in rows_of(batches) for row in rows]
    assert sorted(seen) == sorted([*range(ROWS), *range(ROWS)])


@pytest.mark.parametrize("packing", [True, False])
def test_what_fills_up_the_last_step_has_no_targets_and_sees_a_token(
    dataset: TokenDataset, packing: bool
) -> None:
    loader = load(dataset, packing=packing, micro_batch_size=1, global_batch_size=64, epochs=1.0)
    batch = loader.batches(loader.steps_for(1) - 1)[-1]
    assert batch.rows == ((),)
    assert (batch.num_tokens, batch.num_targets) == (0, 0)
    assert (batch.labels == IGNORE_INDEX).all()
    assert batch.attention_mask is None or batch.attention_mask.sum() == 1


def test_steps_for_epochs(dataset: TokenDataset) -> None:
    loader = load(dataset, packing=False)
    steps = {1.0: 7, 2.0: 14, 0.5: 4, 0.1: 1, 3.0: 20, 0.001: 1}
    assert {epochs: loader.steps_for(epochs) for epochs in steps} == steps
    tenth = load(dataset, packing=False, global_batch_size=2)
    # 53 rows: 10 epochs of a tenth are 5.3 rows each.
    assert tenth.steps_for(0.1) == 3
    packs = load(dataset)
    assert packs.steps_for(1) == -(-packs.sequences_per_epoch // 8)


def test_a_part_of_an_epoch_ends_within_it(dataset: TokenDataset) -> None:
    loader = load(dataset, packing=False, epochs=0.5)
    seen = [row for step in range(loader.steps_for(0.5)) for row in loader.row_ids(step)]
    assert len(seen) == len(set(seen)) == 27
    assert loader.row_ids(loader.steps_for(0.5)) == []


def test_a_stream_without_end_goes_on_into_the_next_epoch(dataset: TokenDataset) -> None:
    loader = load(dataset, packing=False)
    seen = [row for step in range(53) for row in loader.row_ids(step)]
    assert sorted(seen) == sorted(list(range(ROWS)) * 8)


def test_steps_can_be_taken_in_any_order(dataset: TokenDataset) -> None:
    loader, fresh = load(dataset), load(dataset)
    forward = [rows_of(loader.batches(step)) for step in range(12)]
    assert [rows_of(fresh.batches(step)) for step in reversed(range(12))] == forward[::-1]


def test_seed_and_shuffle_decide_the_order(dataset: TokenDataset) -> None:
    assert load(dataset).row_ids(0) != load(dataset, seed=2).row_ids(0)
    unshuffled = load(dataset, packing=False, shuffle=False)
    assert unshuffled.row_ids(1) == list(range(8, 16))


@pytest.mark.parametrize(
    ("micro", "together", "world_size", "nearest"),
    [(3, 8, 1, 9), (8, 4, 1, 8), (2, 6, 4, 8), (2, 16, 3, 18)],
)
def test_a_global_batch_that_does_not_divide_names_a_right_one(
    micro: int, together: int, world_size: int, nearest: int
) -> None:
    with pytest.raises(ConfigError) as error:
        check_batch_sizes(micro_batch_size=micro, global_batch_size=together, world_size=world_size)
    assert f"train.global_batch_size={together} is not a multiple of" in str(error.value)
    assert str(error.value).partition("set train.global_batch_size=")[2].split(",")[0] == str(
        nearest
    )
    # A micro batch is named only where one would do.
    named = str(error.value).partition("to a divisor of ")[2]
    assert named == (str(together // world_size) if together % world_size == 0 else "")


def test_prefetch_gives_the_same_batches(dataset: TokenDataset) -> None:
    loader = load(dataset)
    ahead = [rows_of(batches) for batches in prefetch(loader, 3, 9)]
    assert ahead == [rows_of(loader.batches(step)) for step in range(3, 9)]
    assert list(prefetch(loader, 3, 3)) == []


def test_prefetch_works_ahead_and_stops_when_it_is_left(dataset: TokenDataset) -> None:
    before = threading.active_count()
    steps = prefetch(load(dataset), 0, 100)
    next(steps)
    assert threading.active_count() == before + 1
    steps.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_an_error_in_the_thread_surfaces_where_batches_are_used(dataset: TokenDataset) -> None:
    arrays = {name: array for name, array in dataset.arrays.items() if name != "trained"}
    loader = load(replace(dataset, arrays=arrays))
    with pytest.raises(KeyError, match="trained"):
        next(prefetch(loader, 0, 5))
