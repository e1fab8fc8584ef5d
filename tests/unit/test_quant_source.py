"""Bytes made while weights are read: those of bitsandbytes, whichever ranges are asked for."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
from bitsandbytes import functional as bnb

from dtune.quant import layout as layouts
from dtune.quant.layout import ABSMAX2, PIECE, FourBitLayout, Int8Layout, Layout
from dtune.quant.source import QuantizedSource
from tests.contracts.small_models import DictSource, read_whole

CPU = torch.device("cpu")
# Whole and cut-short blocks, blocks that go on from row to row, several groups of scales, an odd
# number of elements.
SHAPES = [(64, 64), (40, 24), (7, 33), (300, 128), (1, 1)]
Kind = tuple[str, int, bool]
KINDS: list[Kind] = [
    ("nf4", 64, True),
    ("nf4", 64, False),
    ("nf4", 32, True),
    ("fp4", 64, True),
    ("fp4", 128, False),
    ("int8", 0, False),
]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


def layout_of(kind: Kind, shape: tuple[int, int]) -> Layout:
    name, block, double = kind
    return Int8Layout(shape) if name == "int8" else FourBitLayout(shape, name, block, double)


def random_weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    return torch.randn(shape, generator=generator).to(dtype)


def source_of(weight: torch.Tensor, layout: Layout) -> QuantizedSource:
    return QuantizedSource(DictSource({"x.weight": weight}), {"x": layout}, CPU)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def theirs(weight: torch.Tensor, kind: Kind) -> dict[str, torch.Tensor]:
    """What bitsandbytes keeps of a weight, and its float weight."""
    name, block, double = kind
    if name == "int8":
        codes, absmax, _ = bnb.int8_vectorwise_quant(weight.half())
        restored = bnb.int8_vectorwise_dequant(codes, absmax)
        return {"codes": as_bytes(codes), "absmax": as_bytes(absmax), "weight": restored}
    codes, state = bnb.quantize_4bit(
        weight.reshape(-1), blocksize=block, compress_statistics=double, quant_type=name
    )
    parts = {"codes": as_bytes(codes), "absmax": as_bytes(state.absmax)}
    if double:
        parts["absmax2"] = as_bytes(state.state2.absmax)
        parts["offset"] = as_bytes(state.offset.view(1))
    restored = bnb.dequantize_4bit(codes, state)
    return parts | {"weight": restored.float().view(weight.shape)}


@each_kind
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_are_those_of_bitsandbytes_however_they_are_cut(
    kind: Kind, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a range is quantised in many pieces, and whatever was read before."""
    monkeypatch.setattr(layouts, "PIECE", 512)
    # bitsandbytes quantises rows of int8 from fp16.
    weight = random_weight(shape, torch.float16 if kind[0] == "int8" else torch.float32)
    layout = layout_of(kind, shape)
    wanted = theirs(weight, kind)
    assert {*layout.sizes, "weight"} == set(wanted)
    cuts = torch.Generator().manual_seed(0)
    kept = source_of(weight, layout)
    for part, whole in wanted.items():
        flat = whole.reshape(-1)
        assert kept.shape(f"x.{part}") == (shape if part == "weight" else flat.shape)
        ranges = [(0, len(flat)), (len(flat) - 1, len(flat)), (0, 0)]
        for _ in range(8):
            start, stop = sorted(torch.randint(len(flat) + 1, (2,), generator=cuts).tolist())
            ranges.append((start, stop))
        for start, stop in ranges:
            for source in (kept, source_of(weight, layout)):
                read = source.read(f"x.{part}", start, stop)
                assert read.dtype == flat.dtype
                assert torch.equal(read, flat[start:stop]), (part, start, stop)


@each_kind
def test_what_the_source_restores_is_what_the_layout_computes(kind: Kind) -> None:
    shape = (40, 24)
    layout = layout_of(kind, shape)
    source = source_of(random_weight(shape), layout)
    parts = tuple(read_whole(source, f"x.{part}") for part in layout.sizes)
    restored = layout.weight(parts).dequantize(torch.float32)
    assert torch.equal(read_whole(source, "x.weight"), restored)
    # The largest of 16 steps of nf4 is 0.28 of a block's scale, of 8 in fp4 a third.
    error = (restored - random_weight(shape)).abs().max() / random_weight(shape).abs().max()
    assert 0 < error < 0.17


def test_other_tensors_pass_through_as_they_are() -> None:
    weights = DictSource({"x.weight": random_weight((8, 8)), "x.bias": torch.arange(8.0)})
    source = QuantizedSource(weights, {"x": Int8Layout((8, 8))}, CPU)
    assert "x.bias" in source
    assert "x.absmax2" not in source
    assert "y.codes" not in source
    assert torch.equal(source.read("x.bias", 2, 5), torch.tensor([2.0, 3.0, 4.0]))


def test_bytes_that_are_stored_are_not_quantised_again() -> None:
    layout = FourBitLayout((8, 16), "nf4", 64, double=False)
    stored = {"x.codes": torch.arange(64, dtype=torch.uint8), "x.absmax": torch.full((8,), 7)}
    weights = DictSource({**stored, "x.weight": torch.full((8, 16), 0.5)})
    source = QuantizedSource(weights, {"x": layout}, CPU)
    for name, tensor in stored.items():
        assert torch.equal(source.read(name, 1, 5), tensor[1:5])
    assert torch.equal(source.read("x.weight", 0, 3), torch.full((3,), 0.5))


class Watched:
    """Weights of one linear, which sees what is asked for and what of it is alive at once."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.read_elements: list[tuple[int, int]] = []
        self.alive = self.most_alive = 0

    def __contains__(self, name: str) -> bool:
        return name == "x.weight"

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.weight.shape)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """A copy of a range."""
        values = self.weight.view(-1)[start:stop].clone()
        self.read_elements.append((start, stop))
        self.alive += values.numel()
        self.most_alive = max(self.most_alive, self.alive)
        weakref.finalize(values.untyped_storage(), self._freed, values.numel())
        return values

    def _freed(self, count: int) -> None:
        self.alive -= count

    @property
    def total(self) -> int:
        """Elements read."""
        return sum(stop - start for start, stop in self.read_elements)


@each_kind
def test_no_more_than_a_piece_of_the_float_weight_exists_at_once(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts, "PIECE", 1024)
    shape = (300, 128)
    layout, watched = layout_of(kind, shape), Watched(random_weight(shape))
    source = QuantizedSource(watched, {"x": layout}, CPU)
    for part, size in layout.sizes.items():
        source.read(f"x.{part}", 0, size)
    # A generator holds the last piece while it makes the next.
    assert 0 < watched.most_alive <= 2 * 1024
    whole = 300 * 128
    assert watched.total == (2 * whole if kind[0] == "int8" else whole)


def test_a_rank_reads_its_own_blocks_only() -> None:
    """Half of the codes, and their scales, from half of the weight, by whole blocks."""
    shape = (300, 128)
    layout, watched = FourBitLayout(shape, "nf4", 64, double=False), Watched(random_weight(shape))
    source = QuantizedSource(watched, {"x": layout}, CPU)
    source.read("x.codes", 0, 300 * 32)
    source.read("x.absmax", 0, 4 * 300)
    assert watched.read_elements == [(0, 300 * 64)]
    source.read("x.codes", 300 * 32 + 5, 300 * 32 + 6)
    assert watched.read_elements[1:] == [(300 * 64, 300 * 64 + 64)]


def test_second_scales_take_one_pass_over_what_was_not_read_before() -> None:
    shape = (300, 128)
    layout, watched = FourBitLayout(shape, "nf4", 64, double=True), Watched(random_weight(shape))
    source = QuantizedSource(watched, {"x": layout}, CPU)
    source.read("x.codes", 0, 300 * 64)
    source.read("x.absmax", 0, 10)
    source.read("x.offset", 0, 4)
    assert len(layout.sizes) == 4
    assert layout.sizes[ABSMAX2] == 4 * 3
    assert watched.total == 300 * 128
    assert PIECE <= 1 << 22, "16 MiB of fp32"


@pytest.fixture
def threads() -> Iterator[tuple[int, ...]]:
    """Numbers of threads to try; afterwards there are as many as before."""
    before = torch.get_num_threads()
    yield (1, 2, 3, 4)
    torch.set_num_threads(before)


def test_the_mean_of_many_scales_does_not_tell_how_many_threads_there_are(
    threads: tuple[int, ...],
) -> None:
    layout = FourBitLayout((16384, 128), "nf4", 32, double=True)
    generator = torch.Generator().manual_seed(0)
    shown = 0
    for _ in range(4):
        # Blocks of one number each, so that the scales are known.
        scales = torch.randn(16384 * 4, generator=generator) * 0.3 + 2
        weight = scales.repeat_interleave(32).view(layout.shape)
        means, offsets = set(), set()
        for count in threads:
            torch.set_num_threads(count)
            means.add(scales.abs().mean().item())
            offsets.add(tuple(source_of(weight, layout).read("x.offset", 0, 4).tolist()))
            assert torch.get_num_threads() == count
        assert len(offsets) == 1
        shown += len(means) > 1
    assert shown, "a plain mean tells, in one of these at least"
