"""What it gains to keep the weights of a 4-bit base dequantised (``quant.cache_gib``).

Steps of LoRA over a random Llama in nf4 take turns in one process, with no weight kept, about half
of them, and all. Prints dequantisations a step and the median time of each, as Markdown. Losses
must be equal to the last bit.

    python benchmarks/throughput/dequant_cache.py [steps]
"""

from __future__ import annotations

import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from dtune.assemble import assemble
from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.quant.linear import QuantizedLinear
from dtune.run_folder import start_run_folder
from dtune.runtime.seed import seed_everything
from dtune.runtime.world import World
from dtune.train.step import train_step
from dtune.train.trainer import Trainer

WARM_UP = 2
HIDDEN, FFN, BLOCKS = 512, 1408, 4


class Dequantisations(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += "dequantize" in func._schema.name
        return func(*args, **(kwargs or {}))


@dataclass
class Case:
    """A run with a cache of some size."""

    gib: float
    trainer: Trainer
    dequantisations: int = 0
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def kept(self) -> tuple[int, int]:
        """Weights that are kept, and all."""
        modules = self.trainer.engine.module.modules()
        linears = [one for one in modules if isinstance(one, QuantizedLinear)]
        return sum(one.floats is not None for one in linears), len(linears)

    def step(self, number: int) -> None:
        """One optimizer step, timed."""
        trainer = self.trainer
        batches = trainer.loader.batches(number - 1)
        began = time.perf_counter()
        stats = train_step(
            number,
            batches,
            engine=trainer.engine,
            objective=trainer.objective,
            world=trainer.world,
            max_norm=1.0,
            guard=trainer.guard,
        )
        self.seconds.append(time.perf_counter() - began)
        self.losses.append(float(stats.verdict.loss))


def build(folder: Path, model: Path, gib: float, world: World) -> Case:
    """Assemble one run."""
    overrides = [
        f"run_dir={folder}/run-{gib}",
        f"model.path={model}",
        "model.init=random",
        "model.tokenizer=dtune://tiny",
        "peft=lora",
        "quant=nf4",
        f"quant.cache_gib={gib}",
        "data.max_length=128",
        "data.eval_path=none",
        "train.max_steps=1000",
        "train.micro_batch_size=2",
        "train.global_batch_size=2",
    ]
    text = compose_overrides("train", overrides)
    run = load_frozen(text)
    start_run_folder(run, text, command=sys.argv)
    seed_everything(run.seed, world.rank)
    trainer, _ = assemble(run, world)
    trainer.engine.model.train()
    return Case(gib, trainer)


def main(steps: int) -> int:
    """Measure; 1 where losses differ."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        LlamaConfig(
            vocab_size=2048,
            hidden_size=HIDDEN,
            intermediate_size=FFN,
            num_hidden_layers=BLOCKS,
            num_attention_heads=8,
            num_key_value_heads=4,
        ).save_pretrained(model)
        weights = BLOCKS * (2 * HIDDEN * HIDDEN + HIDDEN * HIDDEN + 3 * HIDDEN * FFN)
        world = World.start()
        sizes = (0.0, weights * 4 / 2 / 2**30, 1.0)
        cases = [build(Path(folder), model, size, world) for size in sizes]
        for number in range(1, steps + WARM_UP + 1):
            for case in cases:
                case.step(number)
        for case in cases:
            counter = Dequantisations()
            with counter:
                case.step(steps + WARM_UP + 1)
            case.dequantisations = counter.count
            case.seconds.pop()
        for case in cases:
            case.trainer.checkpointer.close()
        world.stop()
    return report(cases, steps)


def report(cases: list[Case], steps: int) -> int:
    """Print the table."""
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}; {steps} steps of each, in turn; {BLOCKS} blocks of hidden {HIDDEN}, "
        "256 slots a step, fp32.\n"
    )
    print("| weights kept | dequantisations a step | ms a step (median) |")
    print("|---:|---:|---:|")
    for case in cases:
        kept, every = case.kept
        median = statistics.median(case.seconds[WARM_UP:]) * 1e3
        print(f"| {kept} of {every} | {case.dequantisations} | {median:.1f} |")
    equal = all(case.losses == cases[0].losses for case in cases)
    print(f"\nLosses are {'equal to the last bit' if equal else 'NOT equal'}.")
    return int(not equal)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 30))
