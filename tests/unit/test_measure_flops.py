"""The formula behind MFU, against what torch counts operation by operation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from dtune.build import BuiltModel, build_trained_model
from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.measure.flops import FlopsModel, MatrixCounts, peak_flops
from dtune.models.load import build_model
from dtune.models.schema import Attention, Init, ModelConfig
from dtune.parallel.replica import allocate
from dtune.peft.schema import PEFT
from dtune.runtime.schema import Precision
from dtune.runtime.world import World
from dtune.train.speed import Speed, count_matrices, flops_model, speed_of

HIDDEN, LAYERS, VOCABULARY, LENGTH, ROWS = 64, 3, 96, 40, 2
CPU = World(0, 1, 0, 1, torch.device("cpu"), None)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Counted:
    """FLOPs of one training step on documents of LENGTH tokens."""

    model: nn.Module
    by_torch: float
    """A token, forward and backward, both triangles of attention."""
    by_formula: float
    """A token, at twice the length: causal attention to it costs what both triangles do here."""


@pytest.fixture(scope="module", params=["full", "lora"])
def counted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Counted:
    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ).save_pretrained(folder)
    config = ModelConfig(path=str(folder), attention=Attention.eager, init=Init.random)
    model, spec = build_model(config, dtype=torch.float32)
    PEFT.config(request.param)().build().inject(model, spec)
    lengths = np.full(5, 2 * LENGTH)
    matrices = count_matrices(model, spec)
    formula = speed_of(matrices, spec, lengths, Precision.fp32, CPU).flops_per_token(1.0)
    # Of whatever values: operations are counted.
    allocate(model, CPU.device)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    return Counted(model, counter.get_total_flops() / ids.numel(), formula)


def test_the_formula_is_what_torch_counts(counted: Counted) -> None:
    """Exactly, apart from what is known not to be a product of matrices, or not to be needed."""
    named = dict(counted.model.named_parameters())
    is_full = all(p.requires_grad for p in named.values())
    norms = sum(p.numel() for name, p in named.items() if "norm" in name)
    apart = (6 if is_full else 4) * norms
    if not is_full:
        # Nothing before the first adapters is trained, so their input needs no gradient.
        first = [
            p.numel()
            for name, p in named.items()
            if "layers.0.self_attn." in name
            and any(f"{x}_proj" in name for x in "qkv")
            and not name.endswith("lora_B")
        ]
        assert len(first) == 6
        apart += 2 * sum(first)
    assert counted.by_formula - apart == counted.by_torch


def test_what_is_left_out_is_small_and_a_wrong_factor_is_not(counted: Counted) -> None:
    ratio = counted.by_formula / counted.by_torch
    # Norms are HIDDEN of about 8 HIDDEN**2 parameters of a block; the inputs of the first of
    # three blocks are a third of a tenth.
    assert 1.0 <= ratio <= 1.08
    assert not 1.0 <= ratio * 4 / 6 <= 1.08
    assert not 1.0 <= ratio * 6 / 4 <= 1.08


def test_a_longer_document_costs_more_by_its_attention_alone() -> None:
    model = FlopsModel(MatrixCounts(1000, 10, 0, 0), num_layers=2, hidden=8)
    assert model.per_token(0) == 4 * 1000 + 6 * 10
    # Two products over half of the positions forward, twice that backward, of two FLOPs each.
    assert model.per_token(100) - model.per_token(0) == 3 * 2 * 2 * (100 / 2) * 2 * 8


def test_utilisation_needs_a_known_device() -> None:
    flops = FlopsModel(MatrixCounts(400, 0, 100, 0), num_layers=0, hidden=8)
    assert Speed(flops, 64, 4e6).mfu(1000.0, 1000.0) == 0.5
    # Without a target the head has nothing to do, whatever it computes.
    assert Speed(flops, 64, 4e6).mfu(1000.0, 0.0) == 0.4
    assert Speed(flops, 64, 4e6).mfu(1000.0, 250.0) == 0.425
    assert Speed(flops, 64, None).mfu(250.0, 250.0) is None
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("Some Other GPU") is None


def test_documents_count_by_their_tokens(tmp_path: Path) -> None:
    """Of one long and one short document most tokens attend as far as the long one reaches."""
    LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)
    model, spec = build_model(
        ModelConfig(path=str(tmp_path), init=Init.random), dtype=torch.float32
    )
    matrices = count_matrices(model, spec)
    mixed = speed_of(matrices, spec, np.array([90, 10]), Precision.fp32, CPU)
    even = speed_of(matrices, spec, np.array([82, 82]), Precision.fp32, CPU)
    assert mixed == even  # (90**2 + 10**2) / 100 = 82
    assert mixed.mean_length == 82


def built(*settings: str) -> BuiltModel:
    run = load_frozen(compose_overrides("train", ["run_dir=/none", "model=tiny", *settings]))
    return build_trained_model(run, load=False, device=CPU.device)


@pytest.mark.parametrize("peft", ["lora", "full", "bitfit", "prompt", "prefix", "ia3"])
def test_backward_reaches_every_block_of_what_trains_in_all(peft: str) -> None:
    matrices = built(f"peft={peft}").matrices
    assert (matrices.unreached_blocks, matrices.unreached) == (0, 0)


def test_blocks_below_all_that_is_trained_compute_no_backward() -> None:
    model = built("peft=freeze", "peft.last_blocks=1")
    matrices = model.matrices
    # Of each: attention of 4 heads and 2 of keys, an MLP of three products, two norms.
    block = 128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 384 + 2 * 128
    assert (matrices.unreached_blocks, matrices.unreached) == (3, 3 * block)
    flops = flops_model(matrices, model.spec)
    all_reached = replace(flops, matrices=replace(matrices, unreached=0, unreached_blocks=0))
    spared = all_reached.per_token(64) - flops.per_token(64)
    assert spared == 3 * (2 * block + 4 * 128 * 64)
    # The embedding is the head as well: what is trained of it comes before the blocks.
    both = ["peft.embeddings=true", "peft.head=true"]
    assert built("peft=freeze", "peft.last_blocks=1", *both).matrices.unreached_blocks == 0


def test_flops_without_backward_are_those_that_torch_counts() -> None:
    model = built("peft=freeze", "peft.last_blocks=1")
    tokens = 32
    with FlopCounterMode(display=False) as counter:
        logits = model.model(torch.zeros(1, tokens, dtype=torch.long, device="meta")).logits
        logits.sum().backward()
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    # Of no length, so without attention; norms multiply no matrices.
    formula = flops_model(model.matrices, model.spec).per_token(0)
    norms = 3 * 2 * 2 * 128 + 6 * 2 * 128 + 4 * 128
    assert counted == tokens * (formula - norms)


@pytest.mark.parametrize(
    ("settings", "head_frozen", "head_trained"),
    [
        (["peft=lora"], 128, 0),
        (["peft=full"], 0, 128),
        # An adapter of rank 16 on the head: A reads 128 values, B gives one for each token.
        (["peft=lora", "peft.targets=[lm_head]", "peft.rank=16"], 128, 16),
    ],
)
def test_the_head_is_counted_apart(
    settings: list[str], head_frozen: int, head_trained: int
) -> None:
    model = built(*settings)
    tokens = int(model.spec.config.vocab_size)
    beside = 16 * 128 if head_trained == 16 else 0
    matrices = model.matrices
    assert matrices.head_frozen == head_frozen * tokens
    assert matrices.head_trained == head_trained * tokens + beside
    flops = flops_model(matrices, model.spec)
    half = flops.per_token(10, targets=0.5)
    assert flops.per_token(10) - half == 0.5 * flops.per_target > 0
