"""ZeRO by DeepSpeed: the only module that imports it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dtune.errors import ConfigError
from dtune.parallel.base import COMPUTE_DTYPES, set_schedule
from dtune.parallel.ranges import fill, fill_buffers, gather, get_step, set_step
from dtune.parallel.replica import allocate
from dtune.parallel.saved import parameters_by_name
from dtune.parallel.schema.zero import ZeroConfig
from dtune.parallel.wrap import wrap_blocks
from dtune.parallel.zero_layout import PartitionedLayout, ReplicatedLayout, ZeroLayout
from dtune.runtime.schema import Precision, Recompute
from dtune.runtime.world import World
from dtune.types import (
    EngineState,
    FlatShard,
    ModelSpec,
    OptimizerFactory,
    ScheduleFactory,
    TensorSource,
)

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine as Runtime

INITIAL_SCALE_POWER = 16
SCALE_WINDOW = 2000


def _import_deepspeed(world: World) -> Any:
    """Import DeepSpeed, quiet, for this run's device, and with nothing to compile.

    Raises:
        ConfigError: It is not installed.
    """
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # It reads its place from torchrun's variables, which a single process does not have.
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    os.environ.setdefault("RANK", str(world.rank))
    os.environ.setdefault("WORLD_SIZE", str(world.size))
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise ConfigError(
            f"parallel=zero1, zero2 and zero3 need DeepSpeed ({error}): pip install "
            "'dtune[deepspeed]', or set parallel=fsdp"
        ) from error
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # On CPU it would compile an all-reduce over shared memory at first use, for a minute, and
    # ranks that compile at once abort. gloo does the same.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class DeepSpeedEngine:
    """ZeRO 1, 2 and 3.

    Parameters are in the compute dtype, and masters of what is trained in fp32. Gradients are
    clipped inside DeepSpeed's step, once, by the norm that ``clip`` has measured before it.
    """

    model: nn.Module
    skipped_steps: int = 0

    def __init__(self, config: ZeroConfig, world: World, precision: Precision) -> None:
        self.world = world
        self.precision = precision
        self.grad_scale = float(world.size)  # gradients are averaged over ranks
        self._config = config
        self._dtype = COMPUTE_DTYPES[precision]
        self._deepspeed = _import_deepspeed(world)
        self._deepspeed.init_distributed(dist_backend=None, verbose=False)
        accelerator = self._deepspeed.accelerator.get_accelerator()
        if precision is Precision.fp16 and not accelerator.is_fp16_supported():
            raise ConfigError(
                f"parallel={config.name} with precision=fp16 cannot run on this "
                f"{world.device.type}; set precision=bf16"
            )
        self._trained: dict[str, nn.Parameter]
        self._runtime: Runtime
        self._layout: ZeroLayout
        self._schedule: LRScheduler

    def prepare(
        self,
        model: nn.Module,
        spec: ModelSpec,
        *,
        source: TensorSource,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory,
        recompute: Recompute,
        compile_blocks: bool,
        offload: bool = False,
    ) -> None:
        """Recompute -> compile -> shard -> load -> optimizer, from a model on the meta device."""
        self._check(recompute, compile_blocks=compile_blocks)
        wrap_blocks(
            model, spec, recompute=recompute, compile_blocks=compile_blocks, offload=offload
        )
        base = self._optimizer_of(model, optimizer)
        settings = self._settings(model)
        self._spread(model, base, settings)
        self._trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._runtime = self._start(model, base, settings)
        zero = self._zero()
        layout = PartitionedLayout if self._config.stage == 3 else ReplicatedLayout
        self._layout = layout(zero, self.world)
        self._layout.load(model, source)
        fill_buffers(model, source)
        self._schedule = schedule(zero.optimizer)
        self.model = self._runtime
        self.module = model

    def _check(self, recompute: Recompute, *, compile_blocks: bool) -> None:
        """Refuse what stage 3 cannot do, because it gathers inside of blocks."""
        if self._config.stage != 3:
            return
        if recompute is Recompute.selective:
            raise ConfigError(
                "train.recompute=selective cannot run under parallel=zero3, which gathers other "
                "parameters when a block is computed again; set train.recompute=full, or "
                "parallel=fsdp"
            )
        if compile_blocks:
            raise ConfigError(
                "train.compile=true gains nothing under parallel=zero3, whose gathering is Python "
                "between the modules of a block; set train.compile=false, or parallel=fsdp"
            )

    def _zero(self) -> Any:
        return self._runtime.optimizer

    def _optimizer_of(self, model: nn.Module, factory: OptimizerFactory) -> Optimizer:
        """Build the optimizer on stand-ins that have the shapes of the trained parameters.

        Partitioned parameters have lost their shape, and an optimizer groups by it. Stand-ins
        share one element; ``_spread`` puts the real parameters in their places.
        """
        self._stand_ins: dict[int, nn.Parameter] = {}
        named = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                element = torch.empty((), device=self.world.device)
                stand_in = nn.Parameter(element.expand(parameter.shape))
                self._stand_ins[id(parameter)] = stand_in
                named.append((name, stand_in))
        assert named, "nothing to train"
        return factory(named, whole=False)

    def _spread(self, model: nn.Module, base: Optimizer, settings: dict[str, Any]) -> None:
        real: dict[int, nn.Parameter] = {}
        partition = self._partitioner(settings) if self._config.stage == 3 else _leave_whole
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(self._dtype)

        def made(old: nn.Parameter, new: nn.Parameter) -> None:
            if id(old) in self._stand_ins:
                real[id(self._stand_ins[id(old)])] = new
            partition(new)

        allocate(model, self.world.device, made=made)
        for group in base.param_groups:
            group["params"] = [real[id(stand_in)] for stand_in in group["params"]]
        del self._stand_ins

    def _partitioner(self, settings: dict[str, Any]) -> Callable[[nn.Parameter], None]:
        """What cuts one parameter, still without values, into the ranges of ranks."""
        init = self._deepspeed.zero.Init(config_dict_or_path=settings, dtype=self._dtype)
        available = self._deepspeed.runtime.swap_tensor.partitioned_param_swapper
        status = available.PartitionedParamStatus.AVAILABLE

        def partition(parameter: nn.Parameter) -> None:
            # Not Init's own conversion: that broadcasts every parameter whole, and copies its
            # part, although there is no value yet.
            init._convert_to_deepspeed_param(parameter)
            place: Any = parameter
            device = init.local_device if place.ds_persist else init.remote_device
            aligned = place.aligned_size()
            shape = (aligned // self.world.size,)
            part: Any = torch.empty(shape, dtype=parameter.dtype, device=device)
            if init.pin_memory and part.device.type == "cpu":
                part = part.pin_memory()
            part.ds_numel = part.numel()
            part.status = status
            part.final_location = None
            place.ds_tensor = part
            place.ds_numel_aligned = aligned
            place.partition()  # frees the whole parameter

        return partition

    def _settings(self, model: nn.Module) -> dict[str, Any]:
        stage = self._config.stage
        offload = {"device": "cpu", "pin_memory": self.world.device.type == "cuda"}
        offloads = self._config.cpu_offload and self.world.device.type != "cpu"
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        bf16 = self.precision is Precision.bf16
        # DeepSpeed has another optimizer for fp32 accumulation under bf16 in stage 1, which keeps
        # the gradients of the whole model in fp32; stage 1 accumulates in bf16 instead.
        accumulate = "bf16" if bf16 and stage == 1 else "fp32"
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # the trainer divides by tokens, not by this
            "steps_per_print": None,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": accumulate},
            "bf16": {"enabled": bf16},
            "fp16": {
                "enabled": self.precision is Precision.fp16,
                "initial_scale_power": INITIAL_SCALE_POWER,
                "loss_scale_window": SCALE_WINDOW,
                "hysteresis": 1,
                "min_loss_scale": 1,
            },
            "zero_optimization": {
                "stage": stage,
                "reduce_bucket_size": min(self._config.reduce_bucket_size, trained),
                "contiguous_gradients": True,
                "stage3_param_persistence_threshold": self._config.param_persistence_threshold,
                **({"offload_optimizer": offload} if offloads else {}),
                **({"offload_param": offload} if offloads and stage == 3 else {}),
            },
        }

    def _start(self, model: nn.Module, base: Optimizer, settings: dict[str, Any]) -> Runtime:
        deepspeed = self._deepspeed

        class Runtime(deepspeed.DeepSpeedEngine):  # type: ignore[misc, name-defined]
            def _broadcast_model(self) -> None:
                """Nothing: every rank reads the same values, afterwards."""

        runtime = Runtime(
            args=None,
            model=model,
            optimizer=base,
            config=settings,
            config_class=deepspeed.DeepSpeedConfig(settings),
            dont_change_device=True,
        )
        return runtime

    def compute(self) -> AbstractContextManager[None]:
        """Around a forward pass: parameters are in the precision's dtype by themselves."""
        return nullcontext()

    def micro(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro batch; ``last`` ends the accumulation."""
        return self._micro(last)

    @contextmanager
    def _micro(self, last: bool) -> Iterator[None]:
        self._runtime.set_gradient_accumulation_boundary(last)
        with parameters_by_name() if self._config.stage == 3 else nullcontext():
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss."""
        self._runtime.backward(loss, scale_wrt_gas=False)

    @torch.no_grad()
    def clip(self, max_norm: float) -> torch.Tensor:
        """Have the step scale gradients to a norm of at most ``max_norm`` (0: only measure)."""
        zero = self._zero()
        zero.clip_grad = max_norm
        scaled = self._layout.norm().float()
        return torch.where(scaled < 0, torch.inf, scaled / zero.loss_scale)

    def step(self, blocked: torch.Tensor | None = None) -> None:
        """Optimizer, schedule, zero_grad; an overflow skips the first two.

        A ``blocked`` step is passed over. DeepSpeed's step waits for the device anyway.
        """
        if blocked is not None and bool(blocked):
            self.pass_over()
            return
        self._runtime.step()
        self._zero().clip_grad = 0.0
        if self._runtime.was_step_applied():
            self._schedule.step()
        else:
            self.skipped_steps += 1

    def pass_over(self) -> None:
        """Drop the gradients; the schedule goes on, parameters and optimizer stay as they are.

        DeepSpeed's own step frees its buffers, and writes masters that have not changed to the
        parameters.
        """
        optimizer = self._zero().optimizer
        take = optimizer.step
        optimizer.step = _do_nothing
        try:
            self._runtime.step()
        finally:
            optimizer.step = take
        self._zero().clip_grad = 0.0
        self._schedule.step()

    def learning_rate(self) -> float:
        """Of the first parameter group, for the step to come."""
        return float(self._zero().optimizer.param_groups[0]["lr"])

    def _state_shards(self) -> list[FlatShard]:
        self._layout.create_state()
        shards = []
        for name, parameter in self._trained.items():
            shards.append(replace(self._layout.master(name, parameter), name=f"param/{name}"))
            shards.extend(self._layout.states(name, parameter))
        return shards

    @torch.no_grad()
    def state(self) -> EngineState:
        """Masters and optimizer state as ranges that share storage with the engine's own."""
        shards = self._state_shards()
        scalars: dict[str, float | int] = {
            "skipped_steps": self.skipped_steps,
            "schedule_position": self._schedule.last_epoch,
            "optimizer_step": get_step(self._zero().optimizer),
        }
        if self.precision is Precision.fp16:
            scaler = self._zero().loss_scaler
            scalars["loss_scale"] = scaler.cur_scale
            good_steps = scaler.cur_iter - scaler.last_overflow_iter - 1
            scalars["loss_scale_good_steps"] = good_steps % SCALE_WINDOW
        return EngineState(shards, scalars)

    @torch.no_grad()
    def load_state(self, source: TensorSource, scalars: Mapping[str, float | int]) -> None:
        """Go on where a state was taken, bit for bit on as many ranks."""
        fill(self._state_shards(), source)
        self._layout.refresh()
        set_step(self._zero().optimizer, int(scalars["optimizer_step"]))
        set_schedule(self._schedule, int(scalars["schedule_position"]))
        self.skipped_steps = int(scalars["skipped_steps"])
        if self.precision is Precision.fp16:
            scaler = self._zero().loss_scaler
            scaler.cur_scale = float(scalars["loss_scale"])
            scaler.cur_iter = int(scalars["loss_scale_good_steps"])
            scaler.last_overflow_iter = -1

    @torch.no_grad()
    def full_tensors(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Each trainable parameter whole, fp32 on CPU; None but on the first rank."""
        for name, parameter in self._trained.items():
            yield name, gather(self._layout.master(name, parameter), self.world)


def _do_nothing(*args: object, **kwargs: object) -> None:
    """A step of an optimizer that is not taken."""


def _leave_whole(parameter: nn.Parameter) -> None:
    """Stages 1 and 2 keep parameters whole."""
