"""No rank holds more of a model than its share while it loads."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.throughput.load_memory import MIB, Measurement, measure, table, write_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of 64 MiB, and a small one for the libraries to warm up with."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "model", 64.0)
    write_model(folder / "small", 2.0)
    return folder / "model", folder / "small"


def measured(
    models: tuple[Path, Path], engine: str, method: str = "full", quant: str = "none"
) -> Measurement:
    """One measurement in fp32, shown where a test fails."""
    row = measure(*models, engine=engine, method=method, precision="fp32", quant=quant)
    sys.stdout.write(table([row]) + "\n")
    return row


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero2", "zero3"])
def test_peak_of_loading_is_the_share_and_the_largest_tensor(
    models: tuple[Path, Path], engine: str
) -> None:
    row = measured(models, engine)
    assert row.peak <= row.bound
    # The measurement sees what is held: a rank that held all of it once more would be above.
    assert row.peak > 0.8 * row.share.total
    assert replace(row, peak=row.peak + 64 * MIB).peak > row.bound


def test_fsdp_holds_half_of_what_a_replica_holds(models: tuple[Path, Path]) -> None:
    half, whole = measured(models, "fsdp", "lora"), measured(models, "ddp", "lora")
    assert half.peak < 0.6 * whole.peak


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_a_base_in_4_bits_is_never_there_in_floats(models: tuple[Path, Path], engine: str) -> None:
    """Floats of a piece at a time, while the bytes are made; the plain quantiser makes several."""
    row = measured(models, engine, "lora", "nf4")
    assert row.share.total < 0.5 * row.model
    assert row.peak <= row.bound
    assert replace(row, peak=row.peak + row.model).peak > row.bound
