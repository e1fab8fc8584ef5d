"""AdaLoRA, Zhang et al. 2023, arXiv:2303.10512: layers and importance by HF ``peft``.

Shape legend: R rank at first, D input features, O output features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import peft
import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.adalora.layer import AdaLoraLayer, RankAllocator
from torch import nn

from dtune.errors import ConfigError
from dtune.peft.export import (
    ADAPTER_CONFIG,
    AdapterPlan,
    adapter_source,
    read_json,
    save_adapter,
)
from dtune.peft.schema.adalora import AdaloraConfig
from dtune.peft.tuners import ADAPTER, TensorsSource, Tuner, whole_number
from dtune.types import InjectReport, ModelSpec, TensorSource

DECISIVE = ("init_r", "lora_alpha", "bias", "fan_in_fan_out")
"""Fields of ``adapter_config.json`` without which the tensors mean something else."""
_KINDS = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class Adalora(Tuner):
    """B diag(e) A in place of BA: where e is set to 0, a rank is taken away.

    Takes part in steps: a penalty keeps A and B orthogonal, and in the middle of the run those
    ranks lose their place, over all targets, that matter least (eq. 8 to 12).
    """

    key = "peft=adalora"

    def __init__(self, config: AdaloraConfig) -> None:
        super().__init__(config.targets)
        self.config = config
        self._total_steps = 1
        self._gradients: dict[str, torch.Tensor] = {}
        self._state: dict[str, torch.Tensor] = {}

    def peft_config(self, targets: list[str]) -> peft.PeftConfig:
        """Settings as ``peft`` takes them, for a run of as many steps as are known of."""
        config, total = self.config, self._total_steps
        return peft.AdaLoraConfig(
            init_r=config.rank,
            target_r=config.final_rank,
            lora_alpha=whole_number(config.alpha),
            lora_dropout=config.dropout,
            target_modules=targets,
            tinit=int(config.initial_share * total),
            tfinal=total - self._last_round,
            deltaT=config.prune_every,
            beta1=config.importance_decay,
            beta2=config.uncertainty_decay,
            orth_reg_weight=config.orthogonality,
            total_step=total,
        )

    def adapt(self, model: nn.Module) -> None:
        """Keep the ranks by which updates are divided as buffers: they are constants."""
        for module in model.modules():
            if isinstance(module, AdaLoraLayer):
                rank = torch.full((1,), float(self.config.rank))
                module.ranknum = BufferDict({ADAPTER: rank}, persistent=False)

    def inject(self, model: nn.Module, spec: ModelSpec) -> InjectReport:
        """Put the layers in, in place. ConfigError where a target or a setting does not fit."""
        report = super().inject(model, spec)
        self._allocator = RankAllocator(model, self.peft_config([]), ADAPTER)
        return report

    def penalty(self) -> torch.Tensor:
        """Mean distance of A A^T and B^T B from the identity, weighted: eq. 5 per matrix."""
        distances = []
        for name, parameter in self._factors():
            if ".lora_E." in name:
                continue
            with torch.autocast(parameter.device.type, enabled=False):
                square = parameter @ parameter.T if ".lora_A." in name else parameter.T @ parameter
                unit = torch.eye(len(square), dtype=square.dtype, device=square.device)
                distances.append(torch.linalg.matrix_norm(square - unit))
        # One by one, as peft adds them up.
        total: torch.Tensor = sum(distances[1:], start=distances[0])
        weighted: torch.Tensor = self.config.orthogonality * (total / len(distances))
        return weighted

    def before_step(self) -> None:
        """Keep the gradients, which are gone after the step, by which importance is judged."""
        for name, parameter in self._factors():
            assert parameter.grad is not None, name
            self._gradients[name] = parameter.grad

    def after_step(self, step: int, total_steps: int) -> None:
        """Judge ranks by the stepped parameters, and take away those that are over the budget."""
        self._prepare_state()
        self._total_steps = total_steps
        self._allocator.peft_config = self.peft_config([])
        if step >= self._last_round > 1:
            if not self._is_final:
                self._prune(step)
                self._state["is_final"].fill_(1.0)
            self._keep_pruned()
        elif step < self._last_round:
            self._prune(step)
        self._gradients = {}

    def state(self) -> Mapping[str, torch.Tensor]:
        """Importance and its uncertainty of each element, ranks that are left, and the phase."""
        self._prepare_state()
        return self._state

    @property
    def _last_round(self) -> int:
        """Step of the last round; the first step is too early, because nothing is judged yet."""
        last = self._total_steps - int(self.config.final_share * self._total_steps)
        return min(max(last, 2), self._total_steps)

    @property
    def _is_final(self) -> bool:
        return bool(self._state["is_final"])

    def _factors(self) -> list[tuple[str, nn.Parameter]]:
        """A, B and e of every target, by their names in the model."""
        return [(n, p) for n, p in self._model.named_parameters() if n in self._shapes]

    @torch.no_grad()
    def _prune(self, step: int) -> None:
        """One round of ``peft``'s allocator: importance, then the ranks over the budget."""
        allocator, state = self._allocator, self._state
        averages = (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc)
        factors = self._factors()
        for name, parameter in factors:
            parameter.grad = self._gradients[name]
            for kind, average in zip(_KINDS, averages, strict=True):
                average[name] = state[f"{kind}/{name}"]
        final = step >= self._last_round
        _, pattern = allocator.update_and_allocate(self._model, step, force_mask=final)
        for name, parameter in factors:
            parameter.grad = None
            for kind, average in zip(_KINDS, averages, strict=True):
                state[f"{kind}/{name}"].copy_(average[name])
        # The averages are in the state: those that the allocator made would be held twice.
        allocator.reset_ipt()
        for name, kept in (pattern or {}).items():
            state[f"kept/{name}"].copy_(torch.tensor(kept, dtype=torch.float32))

    @torch.no_grad()
    def _keep_pruned(self) -> None:
        """Set e to 0 where a rank has been taken away."""
        for name, parameter in self._factors():
            if ".lora_E." in name:
                parameter.masked_fill_(self._state[f"kept/{name}"][:, None] == 0, 0.0)

    def _prepare_state(self) -> None:
        if self._state:
            return
        factors = self._factors()
        device = factors[0][1].device
        for name, parameter in factors:
            for kind in _KINDS:
                self._state[f"{kind}/{name}"] = torch.zeros(parameter.shape, device=device)
            if ".lora_E." in name:
                self._state[f"kept/{name}"] = torch.ones(len(parameter), device=device)
        self._state["is_final"] = torch.zeros(1, device=device)

    def adapter_plan(self) -> AdapterPlan:
        """The files of the adapter with every rank."""
        return replace(super().adapter_plan(), decisive=DECISIVE)

    def save(self, tensors: Iterator[tuple[str, torch.Tensor | None]], folder: str) -> None:
        """Write the adapter as ``peft`` does: without the ranks that have been taken away."""
        kept = {n: self._state[f"kept/{n}"].bool().cpu() for n in self._pruned_names()}
        cut = ((n, None if t is None else _cut(n, t, kept)) for n, t in tensors)
        save_adapter(cut, Path(folder), self._cut_plan(kept))

    def saved(self, folder: str) -> TensorSource:
        """What ``save``, or ``peft``, wrote; ranks that were taken away begin anew, at e = 0."""
        path = Path(folder) / ADAPTER_CONFIG
        pattern = read_pattern(path) if path.is_file() else {}
        kept = {}
        for name, chosen in pattern.items():
            leaf = name.removeprefix("base_model.model.")
            kept[f"{leaf}.{ADAPTER}"] = torch.tensor(chosen)
        strange = sorted(name for name in kept if name not in self._shapes)
        if strange:
            raise ConfigError(f"{path}: peft.targets names other layers; for example {strange[0]}")
        source = adapter_source(Path(folder), self._cut_plan(kept))
        if not kept:
            return source
        values = self.initial(0)
        return TensorsSource({n: _put_back(n, values[n], source, kept) for n in self._shapes})

    def _pruned_names(self) -> list[str]:
        """Names of e where ranks have been taken away for good."""
        if not self._state or not self._is_final:
            return []
        return [name for name in self._shapes if ".lora_E." in name]

    def _cut_plan(self, kept: Mapping[str, torch.Tensor]) -> AdapterPlan:
        plan = self.adapter_plan()
        empty = {n: torch.empty(shape, device="meta") for n, shape in self._shapes.items()}
        shapes = {n: tuple(_cut(n, t, kept).shape) for n, t in empty.items()}
        pattern = {n.removesuffix(f".{ADAPTER}"): chosen.tolist() for n, chosen in kept.items()}
        fields = {**plan.fields, "rank_pattern": pattern or None}
        return replace(plan, fields=fields, shapes=shapes)


def read_pattern(path: Path) -> dict[str, list[bool]]:
    """Which ranks of each target are in a saved adapter, by names without the adapter's.

    ConfigError where the file cannot be read.
    """
    pattern = read_json(path).get("rank_pattern") or {}
    if not isinstance(pattern, dict):
        raise ConfigError(f"peft.init_from: rank_pattern in {path} names no layers")
    return pattern


def _chosen(name: str, kept: Mapping[str, torch.Tensor]) -> tuple[int, torch.Tensor] | None:
    """The dim that counts ranks of A, B or e, and which ranks are left; None: all of them."""
    path, leaf, _ = name.rsplit(".", 2)
    chosen = kept.get(f"{path}.lora_E.{ADAPTER}")
    return None if chosen is None else (int(leaf == "lora_B"), chosen.nonzero()[:, 0])


def _cut(name: str, tensor: torch.Tensor, kept: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A, B or e with the ranks that are left."""
    chosen = _chosen(name, kept)
    if chosen is None:
        return tensor
    dim, ranks = chosen
    return tensor.index_select(dim, ranks.to(tensor.device)).contiguous()


def _put_back(
    name: str, first: torch.Tensor, source: TensorSource, kept: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """A, B or e with all ranks: those that are left as saved, e of the others 0."""
    saved = source.read(name, 0, torch.Size(source.shape(name)).numel())
    chosen = _chosen(name, kept)
    if chosen is None:
        return saved.view(first.shape)
    whole = torch.zeros_like(first) if ".lora_E." in name else first.clone()
    return whole.index_copy(*chosen, saved.view(source.shape(name)).to(whole.dtype))
