"""Which flat ranges a rank holds under ZeRO: knows DeepSpeed's optimizers, imports nothing of it.

DeepSpeed cuts every trained parameter into contiguous flat ranges, one rank owning each, with fp32
masters and optimizer state in flat buffers per parameter group. Names of its attributes follow
deepspeed 0.16 to 0.19.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dtune.parallel.ranges import create_optimizer_state, fill
from dtune.runtime.world import World
from dtune.types import FlatShard, TensorSource


class ZeroLayout(ABC):
    """Ranges of masters, of optimizer state and of frozen parameters on this rank."""

    def __init__(self, optimizer: Any, world: World) -> None:
        self._optimizer = optimizer
        self._world = world

    @abstractmethod
    def held(self, name: str, parameter: nn.Parameter) -> FlatShard:
        """The range of a parameter in the compute dtype."""

    @abstractmethod
    def load(self, model: nn.Module, source: TensorSource) -> None:
        """Read every parameter and every master. Collective."""

    @abstractmethod
    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Shape of the whole parameter."""

    @abstractmethod
    def refresh(self) -> None:
        """Copy the masters into the compute dtype, on every rank. Collective."""

    @abstractmethod
    def norm(self) -> torch.Tensor:
        """Global norm of the gradients, still scaled; negative if it is not finite. Collective."""

    def create_state(self) -> None:
        """Make the optimizer allocate its state."""
        create_optimizer_state(self._optimizer.optimizer)

    @abstractmethod
    def _place(self, parameter: nn.Parameter) -> tuple[torch.Tensor, int, int, int]:
        """Flat buffer, offset in it, length, and start in the parameter, of this rank's range."""

    def master(self, name: str, parameter: nn.Parameter) -> FlatShard:
        """The range of the fp32 master of a trained parameter."""
        buffer, offset, length, start = self._place(parameter)
        local = buffer.detach()[offset : offset + length]
        return FlatShard(name, self.shape(parameter), start, local)

    def states(self, name: str, parameter: nn.Parameter) -> Iterator[FlatShard]:
        """The ranges of the optimizer's tensors of a trained parameter."""
        buffer, offset, length, start = self._place(parameter)
        state: Mapping[str, Any] = self._optimizer.optimizer.state[buffer]
        shard = FlatShard(name, self.shape(parameter), start, torch.empty(0))
        for key, value in sorted(state.items()):
            if key == "step" or not isinstance(value, torch.Tensor):
                continue
            assert value.numel() == buffer.numel(), f"{key} does not follow the parameters"
            local = value.detach()[offset : offset + length]
            yield replace(shard, name=f"{key}/{name}", local=local)


class ReplicatedLayout(ZeroLayout):
    """ZeRO 1 and 2: parameters whole on every rank, masters cut where groups are."""

    def held(self, name: str, parameter: nn.Parameter) -> FlatShard:
        """The whole of a parameter in the compute dtype."""
        return FlatShard(name, tuple(parameter.shape), 0, parameter.detach().view(-1))

    def load(self, model: nn.Module, source: TensorSource) -> None:
        """Read every parameter and every master.

        What is trained is read twice, not gathered from the masters: gloo's gathering takes
        memory for the whole model once more.
        """
        for name, parameter in model.named_parameters():
            fill([self.held(name, parameter)], source)
            if parameter.requires_grad:
                fill([self.master(name, parameter)], source)

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return tuple(parameter.shape)

    def refresh(self) -> None:
        """Copy the masters into the compute dtype, on every rank. Collective."""
        self._optimizer.update_lp_params()

    def norm(self) -> torch.Tensor:
        """Global norm of the gradients, still scaled; negative if it is not finite. Collective."""
        return torch.as_tensor(self._optimizer.scaled_global_norm(), device=self._world.device)

    def _place(self, parameter: nn.Parameter) -> tuple[torch.Tensor, int, int, int]:
        place: Any = parameter
        fragment = place._hp_mapping
        if fragment is None:  # wholly on other ranks
            return self._optimizer.single_partition_of_fp32_groups[0], 0, 0, parameter.numel()
        buffer = self._optimizer.single_partition_of_fp32_groups[fragment.param_group_index]
        address = fragment.hp_fragment_address
        return buffer, address.start, address.numel, fragment.lp_fragment_address.start


class PartitionedLayout(ZeroLayout):
    """ZeRO 3: every parameter cut into as many equal ranges as there are ranks, the last padded."""

    def load(self, model: nn.Module, source: TensorSource) -> None:
        """Read every frozen parameter and every master. Collective."""
        for name, parameter in model.named_parameters():
            trained = parameter.requires_grad
            fill([self.master(name, parameter) if trained else self.held(name, parameter)], source)
        self.refresh()

    def held(self, name: str, parameter: nn.Parameter) -> FlatShard:
        """The range of a parameter in the compute dtype."""
        place: Any = parameter
        start, length = self._range(parameter)
        return FlatShard(name, self.shape(parameter), start, place.ds_tensor.data[:length])

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        place: Any = parameter
        return tuple(place.ds_shape)

    def _range(self, parameter: nn.Parameter) -> tuple[int, int]:
        place: Any = parameter
        per_rank = place.ds_tensor.ds_numel
        start = min(self._world.rank * per_rank, place.ds_numel)
        return start, min(per_rank, place.ds_numel - start)

    def refresh(self) -> None:
        """Copy the masters into the compute dtype, and gather what stays gathered. Collective."""
        optimizer = self._optimizer
        optimizer._partition_all_parameters()
        for index in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        persistent = optimizer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)

    def norm(self) -> torch.Tensor:
        """Global norm of the gradients, still scaled; negative if it is not finite. Collective."""
        device = self._world.device
        norms = [torch.as_tensor(n, device=device) for n in self._optimizer._get_norm_groups()]
        stacked = torch.stack([norm.float().reshape(()) for norm in norms])
        return torch.where((stacked < 0).any(), -1.0, stacked.square().sum().sqrt())

    def create_state(self) -> None:
        """Make the optimizer allocate its state; its groups are empty between steps."""
        self._optimizer._set_fp32_optimizer_param_groups()
        create_optimizer_state(self._optimizer.optimizer)
        self._optimizer._clear_fp32_optimizer_param_groups()

    def _place(self, parameter: nn.Parameter) -> tuple[torch.Tensor, int, int, int]:
        optimizer = self._optimizer
        group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start, length = self._range(parameter)
        return optimizer.fp32_partitioned_groups_flat[group], int(offset), length, start
