"""What a rank really holds while it trains, counted on live tensors, and what is planned of it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from dtune.measure.storages import StorageTally, distinct_bytes
from dtune.models.load import build_model
from dtune.models.schema import Attention, ModelConfig
from dtune.objectives.causal import causal_loss
from dtune.optim.schema import OPTIM, OptimConfig
from dtune.optim.schema.schedule import ScheduleConfig
from dtune.parallel.base import COMPUTE_DTYPES, TorchEngine
from dtune.parallel.deepspeed import DeepSpeedEngine
from dtune.parallel.schema import PARALLEL
from dtune.patch.apply import apply_patches
from dtune.patch.base import patch_names
from dtune.peft.schema import PEFT
from dtune.plan.memory import MemoryPlan, MemoryRequest, plain_loss, plan_memory
from dtune.quant.schema import QUANT
from dtune.runtime.schema import Precision, Recompute
from dtune.runtime.world import World
from dtune.types import Batch, Engine, ModelSpec, PeftMethod
from tests.distributed.training import Setup, build_engine, build_schedule_of, make_batch

LIVE = ("frozen", "masters", "copies", "gradients", "optimizer", "activations")
"""What is planned of a rank, and counted."""


@dataclass
class Census:
    """Bytes that one rank holds, counted."""

    frozen: int = 0
    masters: int = 0
    copies: int = 0
    gradients: int = 0
    """The most that is left by a backward pass, of a first or a last micro batch."""
    optimizer: int = 0
    activations: int = 0
    gathered: int = 0


def held_part(parameter: nn.Parameter) -> torch.Tensor:
    """This rank's part of a parameter, also where DeepSpeed has taken its values out."""
    part: Any = parameter
    return part.ds_tensor if hasattr(part, "ds_tensor") else parameter


SETTLES_WITHIN = 60.0
"""Seconds in which gloo's threads let go of the tensors of a collective that has ended."""


def _settled(count: Callable[[], int], planned: int) -> int:
    """The count, as soon as it is not above the plan, or else as it is after SETTLES_WITHIN."""
    deadline = time.monotonic() + SETTLES_WITHIN
    while (counted := count()) > planned and time.monotonic() < deadline:
        time.sleep(0.01)
    return counted


class Zeros:
    """Values for every tensor: what is held does not depend on them."""

    def __init__(self, model: nn.Module) -> None:
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._shapes[name]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Zeros."""
        return torch.zeros(()).expand(stop - start)


def optim_of(setup: Setup) -> OptimConfig:
    """The optimizer of a setup, at whatever rate."""
    return OPTIM.config(setup.optim)(**dict(setup.optim_options))


def empty_engine(world: World, setup: Setup) -> Engine:
    """The engine of one process over zeros: no weights are read, and none decomposed."""
    precision = Precision(setup.precision)
    model, spec, method = build_meta(setup, precision)
    engine = PARALLEL.config("single")().build(world, precision)
    engine.prepare(
        model,
        spec,
        source=Zeros(model),
        optimizer=partial(optim_of(setup).build, rate_factor=method.rate_factor),
        schedule=partial(build_schedule_of, ScheduleConfig()),
        recompute=Recompute(setup.recompute),
        compile_blocks=False,
        offload=setup.offload,
    )
    engine.model.train()
    return engine


def take_census(
    world: World, *, setup: Setup, planned: dict[str, int], zeros: bool = False
) -> dict[str, int]:
    """Train one step, and count in the second.

    ``planned`` is only what a count is waited for to fall to; what is counted is returned. With
    ``zeros`` by one process, over no values, in a first step of one micro batch.
    """
    engine = empty_engine(world, setup) if zeros else build_engine(world, setup)
    batch = make_batch(0, 0, packed=setup.packed).to(world.device)
    micros = (True,) if zeros else (False, True)
    if not zeros:
        for last in micros:
            _micro(engine, batch, last=last)
        engine.clip(1.0)
        engine.step()
    found = Census()
    model = engine.module
    for last in micros:
        tally = StorageTally()
        with tally, engine.micro(last=last):
            loss = causal_loss(engine.model, batch).total
            gc.collect()  # DeepSpeed's hooks are in cycles with what they have seen
            live = partial(_activations, engine, tally, batch)
            if last:
                # In the one before DDP makes its buckets anew, which are no activations.
                found.activations = _settled(live, planned["activations"])
            found.gathered = distinct_bytes(model.parameters()) if _is_zero3(engine) else 0
            engine.backward(loss / 100)
            del loss
            gc.collect()
        left = _settled(partial(_gradients, engine, tally, batch), planned["gradients"])
        found.gradients = max(found.gradients, left)
    found.frozen = distinct_bytes(held_part(p) for p in model.parameters() if not p.requires_grad)
    trained = [held_part(p) for p in model.parameters() if p.requires_grad]
    if isinstance(engine, TorchEngine):
        found.masters = distinct_bytes(trained)
    else:
        found.masters, found.copies = distinct_bytes(_masters(engine)), distinct_bytes(trained)
    engine.clip(1.0)
    engine.step()
    found.optimizer = distinct_bytes(_states(engine))
    return asdict(found)


def _micro(engine: Engine, batch: Batch, *, last: bool) -> None:
    with engine.micro(last=last):
        engine.backward(causal_loss(engine.model, batch).total / 100)


def _is_zero3(engine: Engine) -> bool:
    return any(hasattr(p, "ds_tensor") for p in engine.module.parameters())


def _inputs(batch: Batch) -> list[torch.Tensor]:
    tensors = [batch.input_ids, batch.labels, batch.position_ids, batch.document_ids]
    return [*tensors, *([] if batch.attention_mask is None else [batch.attention_mask])]


def _activations(engine: Engine, tally: StorageTally, batch: Batch) -> int:
    return tally.alive(besides=[*_persistent(engine), *_inputs(batch)])


def _persistent(engine: Engine) -> Iterator[torch.Tensor]:
    """What is there before and after, and what a rank gathers of others."""
    model = engine.module
    yield from (held_part(p) for p in model.parameters())
    yield from model.parameters()
    yield from model.buffers()
    yield from (p.grad for p in model.parameters() if p.grad is not None)
    if isinstance(engine, DeepSpeedEngine):
        yield from _masters(engine)
        zero: Any = engine._zero()
        if hasattr(zero, "grad_partitions_flat_buffer"):
            yield zero.grad_partitions_flat_buffer


def _masters(engine: Any) -> list[torch.Tensor]:
    zero = engine._zero()
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return list(zero.fp32_partitioned_groups_flat)
    return list(zero.single_partition_of_fp32_groups)


def _states(engine: Any) -> Iterator[torch.Tensor]:
    optimizer = engine._optimizer if isinstance(engine, TorchEngine) else engine._zero().optimizer
    for state in optimizer.state.values():
        # Not the count of steps, a number of its own.
        yield from (v for v in state.values() if isinstance(v, torch.Tensor) and v.numel() > 1)


def _gradients(engine: Any, tally: StorageTally, batch: Batch) -> int:
    model = engine.module
    if isinstance(engine, TorchEngine):
        whole = _unsharded(model) if isinstance(model, FSDPModule) else []
        return distinct_bytes([*(p.grad for p in model.parameters() if p.grad is not None), *whole])
    zero = engine._zero()
    if hasattr(zero, "grad_partitions_flat_buffer"):
        return distinct_bytes([zero.grad_partitions_flat_buffer])
    buckets = [b for bucket in zero.ipg_buckets.values() for b in bucket.buffer]
    besides = [*model.parameters(), *model.buffers(), *_masters(engine), *buckets, *_inputs(batch)]
    return tally.alive(besides=besides)


def _unsharded(model: nn.Module) -> Iterator[torch.Tensor]:
    """Gradients that FSDP2 keeps whole because it has not reduced them."""
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        group: Any = module._get_fsdp_state()._fsdp_param_group
        for one in group.fsdp_params if group else ():
            if one.unsharded_accumulated_grad is not None:
                yield one.unsharded_accumulated_grad
            unsharded = one._unsharded_param if hasattr(one, "_unsharded_param") else None
            if unsharded is not None and unsharded.grad is not None:
                yield unsharded.grad


def plan(setup: Setup, *, ranks: int, recompute: str = "") -> dict[str, int]:
    """The same numbers planned, as ``dtune plan`` does; ``recompute`` overrides the setup's."""
    found = _plan(setup, 1 if setup.engine == "single" else ranks, recompute or setup.recompute)
    held = asdict(found.held)
    saved = found.saved.activations + found.saved.copies
    return {**{key: held[key] for key in LIVE if key in held}, "activations": saved}


def build_meta(setup: Setup, precision: Precision) -> tuple[PreTrainedModel, ModelSpec, PeftMethod]:
    """The model on the meta device with its method in place."""
    device = torch.device("cpu")
    config = ModelConfig(path=setup.model, attention=Attention.sdpa)
    model, spec = build_model(config, dtype=COMPUTE_DTYPES[precision], device=device)
    method = PEFT.config(setup.peft)(**dict(setup.peft_options)).build()
    method.inject(model, spec)
    QUANT.config(setup.quant)().build(device).quantize(model, spec, method.stored_name)
    if setup.kernels:
        apply_patches(model, patch_names(), spec)
    return model, spec, method


def _plan(setup: Setup, ranks: int, recompute: str) -> MemoryPlan:
    precision = Precision(setup.precision)
    model, spec, method = build_meta(setup, precision)
    request = MemoryRequest(
        parallel=PARALLEL.config(setup.engine)(**dict(setup.engine_options)),
        optim=optim_of(setup),
        precision=precision,
        recompute=Recompute(recompute),
        offload=setup.offload,
        ranks=ranks,
        accumulates=True,
        device=torch.device("cpu"),
        rate_factor=method.rate_factor,
    )
    batch = make_batch(0, 0, packed=setup.packed)
    return plan_memory(model, spec, request, batch, plain_loss)
