"""Peak host memory of a rank while it loads a model, against what it has to hold.

    python benchmarks/throughput/load_memory.py [--mib 200] [--precision fp32] [ENGINE ...]

Writes a random model of the given size in fp32, loads it on two ranks under each engine, and
prints the peak growth beside its bound: the rank's share + the largest tensor + 15 %. Measured is
``RssAnon`` of each rank, sampled from outside every millisecond: anonymous memory without the pages
of mapped files, which the kernel may drop. The baseline is read after a small model was loaded the
same way, so that libraries and their buffers do not count. Runs on CPU, where a rank's share lies
in host memory.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing as mp
import os
import socket
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

MIB = 1 << 20
RANKS = 2
ENGINES = ("single", "ddp", "fsdp", "zero1", "zero2", "zero3")
METHODS = ("full", "lora")
QUANTISING = 4
"""fp32 tensors of the size of a weight that the plain quantiser of a CPU makes on its way."""


@dataclass(frozen=True)
class Share:
    """Bytes that a rank has to hold when it is ready to train.

    Trained parameters are their own fp32 masters but under DeepSpeed, which keeps masters apart
    and allocates the rank's part of the gradients when it starts; others do so in backward.
    """

    parameters: int
    masters: int
    gradients: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.masters + self.gradients


@dataclass(frozen=True)
class Measurement:
    """Peak growth of the rank that grew most, and what it may be, in bytes.

    ``model``: of the model before quantisation.
    """

    engine: str
    method: str
    precision: str
    quant: str
    model: int
    share: Share
    largest: int
    peak: int

    @property
    def bound(self) -> float:
        """The share and the largest tensor, and 15 %."""
        return 1.15 * (
            self.share.total + self.largest * (1 if self.quant == "none" else QUANTISING)
        )


def write_model(folder: Path, mib: float) -> None:
    """Write a random Llama of about ``mib`` MiB in fp32, in two files as large models have."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    layers = 8
    # Parameters: per layer 4 h^2 + 3 h (2.75 h), and two tables of 8 h rows of h.
    hidden = round((mib * MIB / 4 / (12.25 * layers + 16)) ** 0.5 / 32) * 32
    config = LlamaConfig(
        vocab_size=8 * hidden,
        hidden_size=hidden,
        intermediate_size=11 * hidden // 4,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=f"{max(1, int(mib * 0.6))}MB")


def _load(
    world: Any, folder: Path, engine: str, method: str, precision: str, quant: str
) -> tuple[Any, Any]:

    from dtune.models.load import build_model, open_weights
    from dtune.models.schema import Attention, ModelConfig
    from dtune.models.sources import ChainedSource, RenamedSource
    from dtune.optim.schedules import build_schedule
    from dtune.optim.schema.adamw import AdamwConfig
    from dtune.optim.schema.schedule import ScheduleConfig
    from dtune.parallel.base import COMPUTE_DTYPES
    from dtune.parallel.schema import PARALLEL
    from dtune.peft.schema import PEFT
    from dtune.quant.schema import QUANT
    from dtune.runtime.schema import Precision, Recompute

    config = ModelConfig(path=str(folder), attention=Attention.sdpa)
    dtype = COMPUTE_DTYPES[Precision(precision)]
    model, spec = build_model(config, dtype=dtype, device=world.device)
    weights = open_weights(config, model, spec, seed=0)
    peft = PEFT.config(method)().build()
    peft.inject(model, spec)
    whole = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    quantizer = QUANT.config(quant)().build(world.device)
    quantizer.quantize(model, spec, peft.stored_name)
    stored = RenamedSource(weights, peft.stored_name)
    held = quantizer.source(stored)
    sizes = [(p.numel(), p.requires_grad, p.itemsize) for p in model.parameters()]
    built = PARALLEL.config(engine)().build(world, Precision(precision))
    built.prepare(
        model,
        spec,
        source=ChainedSource([peft.source(stored, held, 0), held]),
        optimizer=AdamwConfig().build,
        schedule=lambda optimizer: build_schedule(ScheduleConfig(), optimizer, 10),
        recompute=Recompute.none,
        compile_blocks=False,
    )
    return built, (whole, sizes)


def _rank(rank: int, port: int, jobs: dict[str, Any], pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(jobs["size"]),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(jobs["size"]),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
    )
    from dtune.runtime.imports import uncollected

    with uncollected():
        from dtune.runtime.world import World

        importlib.import_module("dtune.assemble")
    world = World.start()
    how = (jobs["engine"], jobs["method"], jobs["precision"], jobs["quant"])
    small = _load(world, jobs["small"], *how)
    world.barrier()
    pipe.send("ready")
    pipe.recv()
    loaded, sizes = _load(world, jobs["folder"], *how)
    pipe.send(sizes)
    pipe.recv()
    del small, loaded


def _anonymous(pid: int) -> int:
    """Bytes of anonymous memory that a process has in RAM."""
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


Sizes = list[tuple[int, bool, int]]
"""Elements of each parameter, whether it is trained, and bytes of an element while it is not."""


def share_of(engine: str, sizes: Sizes, precision: str, ranks: int) -> Share:
    """What a rank holds of the parameters."""
    low = 4 if precision == "fp32" else 2
    frozen = sum(numel * itemsize for numel, trained, itemsize in sizes if not trained)
    trained = sum(numel for numel, trained, _ in sizes if trained)
    if engine in ("single", "ddp"):
        return Share(frozen + 4 * trained, 0, 0)
    if engine == "fsdp":
        return Share((frozen + 4 * trained) // ranks, 0, 0)
    whole = frozen + low * trained
    cut = 4 * trained // ranks
    return Share(whole // ranks if engine == "zero3" else whole, cut, cut)


def measure(
    folder: Path, small: Path, *, engine: str, method: str, precision: str, quant: str = "none"
) -> Measurement:
    """Load once in fresh processes and return what was measured."""
    size = 1 if engine == "single" else RANKS
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = int(server.getsockname()[1])
    # Freed blocks go back to the kernel. Otherwise glibc keeps them for reuse, memory that nobody
    # holds. The C library reads this when a process starts.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(64 * 1024)
    context = mp.get_context("spawn")
    jobs = {
        "engine": engine,
        "method": method,
        "precision": precision,
        "quant": quant,
        "size": size,
        "folder": folder,
        "small": small,
    }
    pipes, processes = [], []
    for rank in range(size):
        ours, theirs = context.Pipe()
        process = context.Process(target=_rank, args=(rank, port, jobs, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    for pipe in pipes:
        assert pipe.recv() == "ready"
    pids = [process.pid for process in processes]
    assert all(pids)
    base = [_anonymous(pid) for pid in pids if pid]
    peaks = list(base)
    for pipe in pipes:
        pipe.send("go")
    while not all(pipe.poll() for pipe in pipes):
        peaks = [max(p, _anonymous(pid)) for p, pid in zip(peaks, pids, strict=True) if pid]
        time.sleep(0.001)
    model, sizes = pipes[0].recv()
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send("end")
        process.join()
    largest = max(numel * (4 if trained else itemsize) for numel, trained, itemsize in sizes)
    return Measurement(
        engine,
        method,
        precision,
        quant,
        model=model,
        share=share_of(engine, sizes, precision, size),
        largest=largest,
        peak=max(peak - start for peak, start in zip(peaks, base, strict=True)),
    )


def table(rows: list[Measurement]) -> str:
    """The measurements as text, in MiB."""
    names = ("model", "params", "masters", "grads", "largest", "bound", "peak")
    head = f"{'engine':8}{'method':8}{'precision':10}{'quant':6}" + "".join(
        f"{name:>8}" for name in names
    )
    lines = ["MiB per rank; bound: 1.15 x (params + masters + grads + largest)", head + "  verdict"]
    for row in rows:
        share = row.share
        held = (share.parameters, share.masters, share.gradients)
        sizes = (row.model, *held, row.largest, row.bound, row.peak)
        verdict = "within" if row.peak <= row.bound else "ABOVE"
        lines.append(
            f"{row.engine:8}{row.method:8}{row.precision:10}{row.quant:6}"
            + "".join(f"{size / MIB:8.1f}" for size in sizes)
            + f"  {verdict}"
        )
    return "\n".join(lines)


def main() -> int:
    """Measure, print, and fail if a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engines", nargs="*", default=ENGINES)
    parser.add_argument("--mib", type=float, default=200.0)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--quant", default="none", choices=("none", "nf4", "fp4", "int8"))
    parser.add_argument("--json", type=Path, help="also write the measurements to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, small = Path(scratch, "model"), Path(scratch, "small")
        write_model(folder, arguments.mib)
        write_model(small, 2.0)
        rows = [
            measure(
                folder,
                small,
                engine=e,
                method=m,
                precision=arguments.precision,
                quant=arguments.quant,
            )
            for e in arguments.engines
            for m in (METHODS if arguments.quant == "none" else METHODS[1:])
        ]
    sys.stdout.write(table(rows) + "\n")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2))
    return int(any(row.peak > row.bound for row in rows))


if __name__ == "__main__":
    sys.exit(main())
