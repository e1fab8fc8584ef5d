"""Small models with random adapters, and what one training step of them gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dtune.models.attention import install_documents
from dtune.models.spec import describe
from dtune.objectives.causal import causal_loss
from dtune.peft.schema import PEFT
from dtune.types import Batch, ModelSpec
from tests.distributed.training import VOCABULARY, make_batch
from tests.unit.families import family_config


@dataclass(frozen=True)
class Step:
    """Loss and the gradients of all that is trained, by name."""

    loss: torch.Tensor
    grads: dict[str, torch.Tensor]


def adapted(
    family: str,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "eager",
    peft: str = "lora",
    layers: int = 2,
    config: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[nn.Module, ModelSpec]:
    """A model whose adapters, norms and biases are random, so that no mix-up hides."""
    torch.manual_seed(0)
    changes = {"vocab_size": VOCABULARY, "num_hidden_layers": layers, **(config or {})}
    model = AutoModelForCausalLM.from_config(
        family_config(family, **changes), attn_implementation=attention
    )
    install_documents(model)
    spec = describe(model, family)
    PEFT.config(peft)(**options).build().inject(model, spec)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.uniform_(0.5, 1.5)
            elif "lora_" in name:
                parameter.normal_(std=0.2)
            elif "norm" in name or "bias" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype), spec


def train_step(model: nn.Module, batch: Batch | None = None) -> Step:
    """Forward and backward of one micro batch, from gradients of zero."""
    batch = make_batch(1, 0, packed=False) if batch is None else batch
    model.zero_grad()
    loss = causal_loss(model, batch).total
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return Step(loss.detach().clone(), grads)


def largest_difference(a: Step, b: Step) -> float:
    """Of loss and gradients, relative to the largest element of each."""
    assert a.grads.keys() == b.grads.keys()
    pairs = [(a.loss, b.loss), *((a.grads[name], b.grads[name]) for name in a.grads)]
    assert all(x.any() for x, _ in pairs), "a gradient of zeros would compare equal"
    return max(float((x - y).abs().max() / x.abs().max()) for x, y in pairs)
