"""What the loader hands out on one core, and what is left of the data's preparation in a step.

Prints Markdown: tokens a second that a loader builds batches of, from tokenised rows on disk, by
the mean length of a row; then how long rows take to be tokenised, found again and packed, and how
long a step waits for its batches while one thread builds those of the next. 1,000,000 tokens a
second are aimed at, for packed rows of all lengths here.

    python benchmarks/throughput/loader.py [seconds for each row] [--check]

``--check`` ends with 1 where the aim is missed.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.data.dataset import DatasetWriter, TokenDataset, load_dataset_folder
from dtune.data.loader import Loader, prefetch
from dtune.data.report import DataReport
from dtune.data.schema import DataConfig
from dtune.data.tokenize import prepare_dataset
from dtune.models.load import load_tokenizer
from dtune.objectives.fingerprint import objective_fingerprint
from dtune.runtime.world import World
from dtune.types import IGNORE_INDEX, Example

AIM = 1_000_000
ROW_LENGTHS = (32, 256, 2048)
TOKENS = 4_000_000
MAX_LENGTH = 4096
MICRO = 4
STEP_SECONDS = 0.15


@dataclass(frozen=True)
class Speed:
    """What a loader did."""

    tokens_per_second: float
    fill: float
    """Share of the slots that are tokens."""
    shapes: int
    """Different shapes of its micro batches."""


def write_rows(folder: Path, mean: int) -> TokenDataset:
    """Rows of lengths around a mean, log-normal as those of instructions are; half is trained."""
    random = np.random.default_rng(mean)
    writer = DatasetWriter(folder)
    left, row = TOKENS, 0
    while left > 0:
        length = int(np.clip(random.lognormal(np.log(mean), 0.6), 2, MAX_LENGTH))
        tokens = random.integers(0, 32_000, length).tolist()
        labels = [IGNORE_INDEX] * (length // 2) + tokens[length // 2 :]
        writer.add(Example(row, tokens, labels), f"made:{row}")
        left, row = left - length, row + 1
    writer.finish(DataReport())
    dataset = load_dataset_folder(folder)
    assert dataset is not None
    return dataset


def loader_of(dataset: TokenDataset, *, packing: bool) -> Loader:
    """As a run of one process has it."""
    return Loader(
        dataset,
        DataConfig(path="made", max_length=MAX_LENGTH, packing=packing),
        micro_batch_size=MICRO,
        global_batch_size=MICRO,
        seed=0,
        rank=0,
        world_size=1,
        pad_token_id=0,
    )


def measure(loader: Loader, seconds: float) -> Speed:
    """Build batches for so many seconds, on the thread that asks."""
    loader.batches(0)
    shapes, tokens, slots, step = set(), 0, 0, 0
    began = time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        for batch in loader.batches(step):
            shapes.add(tuple(batch.input_ids.shape))
            tokens += batch.num_tokens
            slots += batch.num_slots
        step += 1
    return Speed(tokens / spent, tokens / slots, len(shapes))


def waits(loader: Loader, steps: int) -> list[float]:
    """Seconds that each step waits for batches, where computing leaves this thread idle."""
    found = []
    batches = prefetch(loader, 0, steps)
    for _ in range(steps):
        began = time.perf_counter()
        next(batches)
        found.append(time.perf_counter() - began)
        time.sleep(STEP_SECONDS)
    return found[1:]


def speeds(folder: Path, seconds: float) -> bool:
    """Print the first table; whether the aim is met."""
    print(f"| row, tokens | rows are | tokens/s | filled | shapes of {MICRO} rows |")
    print("|---:|---|---:|---:|---:|")
    met = True
    for mean in ROW_LENGTHS:
        place = folder / str(mean)
        place.mkdir()
        dataset = write_rows(place, mean)
        for packing in (True, False):
            speed = measure(loader_of(dataset, packing=packing), seconds)
            kind = f"packed to {MAX_LENGTH}" if packing else "padded"
            print(
                f"| {dataset.lengths.mean():.0f} | {kind} | {speed.tokens_per_second:,.0f} "
                f"| {speed.fill:.1%} | {speed.shapes} |"
            )
            met = met and (not packing or speed.tokens_per_second >= AIM)
    return met


def preparation(folder: Path) -> None:
    """Print what happens before the first step, and what a step waits for."""
    overrides = [f"data.cache_dir={folder / 'cache'}", "data=corpus", "objective=pretrain"]
    run = load_frozen(compose_overrides("train", overrides))
    data = replace(run.data, max_length=MAX_LENGTH)
    objective = run.objective.build(load_tokenizer(run.model))
    world = World.start()
    taken = []
    for _ in range(2):
        began = time.perf_counter()
        dataset = prepare_dataset(
            data,
            objective,
            which="train",
            fingerprint=objective_fingerprint(run.objective, load_tokenizer(run.model)),
            world=world,
        )
        taken.append(time.perf_counter() - began)
    world.stop()
    total = int(dataset.lengths.sum())
    began = time.perf_counter()
    loader = loader_of(dataset, packing=True)
    packing = time.perf_counter() - began
    steps = waits(loader, 20)
    print(f"\n{len(dataset):,} documents of the embedded corpus, {total:,} tokens:\n")
    print("| | |\n|---|---:|")
    print(f"| tokenised, once | {taken[0]:.1f} s, {total / taken[0]:,.0f} tokens/s |")
    print(f"| found in the cache | {taken[1]:.2f} s |")
    print(f"| packed, once a run | {packing:.2f} s |")
    print(
        f"| a step of {STEP_SECONDS * 1e3:.0f} ms waits for its {MICRO * MAX_LENGTH:,} slots "
        f"| {statistics.median(steps) * 1e3:.2f} ms (median), {max(steps) * 1e3:.2f} ms (most) |"
    )


def main() -> int:
    """Measure on one core."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("seconds", nargs="?", type=float, default=3.0)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    print(
        f"One core of {platform.processor() or platform.machine()}, Python "
        f"{platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}.\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        met = speeds(Path(folder), options.seconds)
        preparation(Path(folder))
    print(f"\nAim of {AIM:,} tokens/s, packed: {'met' if met else 'missed'}.")
    return int(options.check and not met)


if __name__ == "__main__":
    sys.exit(main())
