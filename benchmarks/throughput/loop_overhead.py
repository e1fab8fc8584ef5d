"""What dtune's training loop costs on top of the arithmetic.

Steps of ``dtune train`` (its engine, loss, clipping, logging to files, prefetched batches) and of
a loop written by hand in plain PyTorch take turns in one process, on the same model, batches and
threads. Prints the median time of each, and their ratio: at most 1.10 is promised.

    python benchmarks/throughput/loop_overhead.py [steps]
"""

from __future__ import annotations

import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from dtune.assemble import assemble
from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.data.loader import prefetch
from dtune.resources import resolve_path
from dtune.run_folder import start_run_folder
from dtune.runtime.seed import seed_everything
from dtune.runtime.world import World
from dtune.types import Batch

WARMUP_STEPS = 5
PROMISED_RATIO = 1.10


class HandWrittenLoop:
    """Full fine-tuning as one would write it for this model alone."""

    def __init__(self, steps: int, lr: float, device: torch.device) -> None:
        self.device = device
        self.model: nn.Module = AutoModelForCausalLM.from_pretrained(
            resolve_path("dtune://tiny"), dtype=torch.float32
        ).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, fused=True)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.losses: list[float] = []

    def step(self, batches: Sequence[Batch]) -> None:
        """One optimizer step."""
        targets = sum(batch.num_targets for batch in batches)
        total = 0.0
        for batch in (batch.to(self.device) for batch in batches):
            logits = self.model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
            ).logits
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum"
            )
            (loss / targets).backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(total / targets)
        if self.device.type == "cuda":
            # As dtune does when it writes the step's numbers: else the next would pay for it.
            torch.cuda.synchronize()


def main(steps: int) -> int:
    """Measure; 1 if the ratio is above what is promised."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"run_dir={folder}/run",
            f"train.max_steps={steps}",
            "train.micro_batch_size=4",
            "train.global_batch_size=8",
            "peft=full",
            "optim.lr=1e-4",
            "log.progress=lines",
            "data.eval_path=none",
        ]
        text = compose_overrides("train", overrides)
        run = load_frozen(text)
        start_run_folder(run, text, command=sys.argv)
        world = World.start()
        seed_everything(run.seed, world.rank)
        trainer, _ = assemble(run, world)
        by_hand = HandWrittenLoop(steps, lr=1e-4, device=world.device)
        ours, theirs = [], []
        trainer.engine.model.train()
        for step, batches in enumerate(prefetch(trainer.loader, 0, steps), start=1):
            began = time.perf_counter()
            trainer.advance(step, batches)
            between = time.perf_counter()
            by_hand.step(batches)
            ours.append(between - began)
            theirs.append(time.perf_counter() - between)
        trainer.checkpointer.close()
        world.stop()
    return report(ours[WARMUP_STEPS:], theirs[WARMUP_STEPS:])


def report(ours: Sequence[float], theirs: Sequence[float]) -> int:
    """Print the medians and their ratio with the hardware and versions."""
    ratio = statistics.median(ours) / statistics.median(theirs)
    device = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    sys.stdout.write(
        f"{device}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{len(ours)} steps of each\n"
        f"dtune        {statistics.median(ours) * 1e3:8.1f} ms a step (median)\n"
        f"by hand      {statistics.median(theirs) * 1e3:8.1f} ms a step (median)\n"
        f"ratio        {ratio:8.3f}  (promised: at most {PROMISED_RATIO})\n"
    )
    return int(ratio > PROMISED_RATIO)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 60))
