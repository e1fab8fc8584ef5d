"""Small random models as the framework sees them, for tests of what is put into a model."""

from __future__ import annotations

import copy
import itertools
import resource
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dtune.errors import CheckpointError
from dtune.models.sources import RenamedSource
from dtune.peft.lora import LoraLinear
from dtune.types import ModelSpec, PeftMethod, Role, TensorSource

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def save_base(folder: Path, family: str, *, tied: bool = False, dtype: str = "float32") -> Path:
    """Write a random model of the family in Hugging Face's layout, with loud weights."""
    torch.manual_seed(0)
    sizes = {**SIZES, "tie_word_embeddings": tied, "initializer_range": 0.2}
    model: PreTrainedModel
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=8))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def load_base(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).float().eval()


def build_on_meta(folder: Path) -> tuple[PreTrainedModel, ModelSpec]:
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).float()
    model.tie_weights()
    block = type(model.model.layers[0])
    spec = ModelSpec(
        family=config.model_type,
        path=str(folder),
        config=config,
        block_types=(block,),
        linears={name: _role(name) for name, m in model.named_modules() if type(m) is nn.Linear},
        tied={"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {},
    )
    return model, spec


def _role(path: str) -> Role:
    leaf = path.rpartition(".")[2]
    if leaf == "lm_head":
        return Role.head
    return Role.attention if leaf in ATTENTION else Role.mlp


class DictSource:
    """A TensorSource over tensors in memory."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(self._tensors[name].shape)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements of the flattened tensor."""
        return self._tensors[name].detach().reshape(-1)[start:stop]


def sources(method: PeftMethod, base: Path, *, seed: int = 0) -> tuple[TensorSource, TensorSource]:
    """Values of the base as the injected model holds it, and of what the method added."""
    stored = RenamedSource(DictSource(load_base(base).state_dict()), method.stored_name)
    held = method.base(stored)
    return held, method.source(stored, held, seed)


def materialize(model: PreTrainedModel, method: PeftMethod, base: Path, *, seed: int = 0) -> None:
    """Give an injected meta model the base's weights and the method's initial values."""
    held, added = sources(method, base, seed=seed)
    values = {
        name: read_whole(added if name in added else held, name)
        for name, _ in model.named_parameters()
    }
    fill(model, values, base)


def fill(model: PreTrainedModel, values: dict[str, torch.Tensor], base: Path) -> None:
    """Put a model that is on the meta device on the CPU, with these parameters."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    first = {parameter: name for name, parameter in model.named_parameters()}
    names = {name: first[p] for name, p in model.named_parameters(remove_duplicate=False)}
    buffers = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}
    model.to_empty(device="cpu")
    for name, buffer in [*buffers.items(), *load_base(base).named_buffers()]:
        model.get_buffer(name).copy_(buffer)
    for name, shared in names.items():
        if name != shared:  # to_empty unties
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, model.get_parameter(shared))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    model.eval()


def injected_twin(base: Path, method: PeftMethod, *, noise: float) -> PreTrainedModel:
    """A model with a method in it whose trained values are away from their start."""
    model, spec = build_on_meta(base)
    method.inject(model, spec)
    materialize(model, method, base)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
    return model


def check_failed_save(model: nn.Module, method: PeftMethod, folder: Path) -> None:
    """A save on a full disk fails on every rank alike and leaves the older files as they were."""
    method.save(trained_tensors(model), str(folder))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    taken = itertools.count()
    counted = ((next(taken), item)[1] for item in trained_tensors(model))
    with limited_file_size(8192), pytest.raises(CheckpointError, match="File too large"):
        method.save(counted, str(folder))
    assert next(taken) == len(list(trained_tensors(model)))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def read_whole(source: TensorSource, name: str) -> torch.Tensor:
    shape = source.shape(name)
    return source.read(name, 0, torch.Size(shape).numel()).reshape(shape)


def trained_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What ``Engine.full_tensors`` gives on the first rank."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter.detach().clone()


def exported_tensors(model: nn.Module, method: PeftMethod) -> Iterator[tuple[str, torch.Tensor]]:
    """What a run exports: what was trained, and for a whole model also what was not."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or method.export_name == "model":
            yield name, parameter.detach().clone()


def equal_within(a: torch.Tensor, b: torch.Tensor, limit: float) -> bool:
    """Bit-equal where the limit is 0."""
    return torch.equal(a, b) if limit == 0 else bool((a - b).abs().max() <= limit)


@torch.no_grad()
def rounding_of(model: PreTrainedModel, method: PeftMethod, base: Path) -> float:
    """How far rounding may take logits from those of a model that sums the same terms otherwise.

    0 where the model holds the base's own weights. PiSSA and OLoRA hold W - s B0 A0 beside s B A:
    W is then another sum of the same terms, and W + s B A - s B0 A0, which is what others load, a
    third. The error of each linear grows with the magnitudes that are summed. So the limit is the
    error of this model, as fp64 tells it, once for itself and once, times the growth of those
    magnitudes, for the other; and all of it twice, as the largest of some logits is a sample.
    """
    stored, added = load_base(base).state_dict(), sources(method, base)[1]
    growth = 0.0
    for path, module in model.named_modules():
        if not isinstance(module, LoraLinear):
            continue
        whole = stored[f"{path}.weight"]
        if torch.equal(module.base.weight, whole):
            continue
        a0, b0 = (read_whole(added, f"{path}.lora_{x}").abs() for x in "AB")
        own = module.scale * module.lora_B.abs() @ module.lora_A.abs()
        theirs = whole.abs() + own + module.scale * b0 @ a0
        growth = max(growth, float(theirs.norm() / (module.base.weight.abs() + own).norm()))
    exact = copy.deepcopy(model).double()(token_ids()).logits
    error = float((model(token_ids()).logits - exact).abs().max())
    return 2 * (1 + growth) * error if growth else 0.0


def token_ids() -> torch.Tensor:
    return torch.randint(
        0, SIZES["vocab_size"], (2, 16), generator=torch.Generator().manual_seed(1)
    )


@contextmanager
def limited_file_size(num_bytes: int) -> Iterator[None]:
    """A disk on which no file may grow beyond a size, as a full one: writing raises OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
