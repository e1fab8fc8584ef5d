"""Patches: a patched model computes what the model computes, and says what was replaced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from dtune.errors import ConfigError
from dtune.objectives.causal import causal_loss
from dtune.patch.apply import apply_patches, choose_patches, unpatch
from dtune.patch.base import PatchRow, kind_of, patch_names
from dtune.patch.schema import Backend, KernelsConfig
from tests.distributed.training import make_batch
from tests.unit.families import FAMILIES
from tests.unit.patched import adapted, largest_difference, train_step

ALL = patch_names()
ROUNDING = 5e-5
"""Two fp32 computations of one formula, two layers deep; an error of 1 % shows as 1e-3 or more."""


def row(rows: list[PatchRow], patch: str, modules: str) -> PatchRow:
    (found,) = [r for r in rows if r.patch == patch and r.modules == modules]
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packed", [False, True])
def test_a_patched_step_equals_the_step(family: str, packed: bool) -> None:
    model, spec = adapted(family)
    batch = make_batch(1, 0, packed=packed)
    plain = train_step(model, batch)
    rows = apply_patches(model, ALL, spec)
    assert {r.patch for r in rows if not r.reason} >= {"rope", "mlp", "lora_linear", "loss_head"}
    patched = train_step(model, batch)
    assert largest_difference(plain, patched) < ROUNDING
    # The comparison sees an error of one adapter's scale.
    next(m for m in model.modules() if kind_of(m) == "LoraLinear").scale *= 1.01
    assert largest_difference(plain, train_step(model, batch)) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_curve_of_32_patched_steps_equals_the_curve(family: str) -> None:
    def curve(names: tuple[str, ...]) -> list[float]:
        model, spec = adapted(family)
        if names:
            apply_patches(model, names, spec)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        losses = []
        for step in range(32):
            losses.append(float(train_step(model, make_batch(step, 0, packed=True)).loss))
            optimizer.step()
        return losses

    plain, patched = curve(()), curve(ALL)
    assert plain[-1] != plain[0]
    assert patched == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_unpatch_restores_the_model_bit_for_bit(family: str) -> None:
    model, spec = adapted(family)
    names, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    plain = train_step(model)
    apply_patches(model, ALL, spec)
    assert list(model.state_dict()) == names
    assert unpatch(model) > 0
    assert [type(m) for m in model.modules()] == kinds
    assert largest_difference(plain, train_step(model)) == 0


@pytest.mark.parametrize("name", ALL)
def test_each_patch_alone_equals_the_step(name: str) -> None:
    model, spec = adapted("llama", peft="dora" if name == "dora_linear" else "lora")
    plain = train_step(model)
    rows = apply_patches(model, (name,), spec)
    assert {r.patch for r in rows} == {name}
    assert largest_difference(plain, train_step(model)) < ROUNDING


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], ["mlp"], ["attention"], ["down_proj"], ["k_proj", "up_proj"]]
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_groups_with_some_targets_equal_the_step(family: str, targets: list[str]) -> None:
    model, spec = adapted(family, targets=targets)
    plain = train_step(model)
    apply_patches(model, ALL, spec)
    assert largest_difference(plain, train_step(model)) < ROUNDING


@pytest.mark.parametrize("family", FAMILIES)
def test_full_fine_tuning_keeps_its_linears_and_equals_the_step(family: str) -> None:
    model, spec = adapted(family, peft="full")
    plain = train_step(model)
    rows = apply_patches(model, ALL, spec)
    kept = "its q, k and v are one linear already" if family == "phi3" else "its base weight is tr"
    assert row(rows, "attention", "model.layers.*.self_attn").reason.startswith(kept)
    assert {r.patch for r in rows if not r.reason} == {"rms_norm", "rope", "mlp", "loss_head"}
    assert largest_difference(plain, train_step(model)) < ROUNDING


def test_the_table_says_what_was_replaced_and_how_often() -> None:
    model, spec = adapted("qwen3")
    rows = apply_patches(model, ALL, spec)
    attention = row(rows, "attention", "model.layers.*.self_attn")
    assert (attention.before, attention.count) == ("Qwen3Attention", 2)
    assert attention.after == "GroupedAttention with its norm"
    assert row(rows, "rms_norm", "model.layers.*.self_attn.q_norm").count == 2
    assert row(rows, "rms_norm", "model.norm").count == 1
    assert str(row(rows, "rope", "model.layers.*.self_attn")) == (
        "rope: 2 x Qwen3Attention (model.layers.*.self_attn) -> RopeAttention"
    )


def test_what_is_kept_is_named_with_its_reason() -> None:
    model, spec = adapted("phi3")
    kept = row(apply_patches(model, ALL, spec), "attention", "model.layers.*.self_attn")
    assert kept.reason == "its q, k and v are one linear already"
    assert str(kept).startswith("attention: kept 2 x Phi3Attention (model.layers.*.self_attn): ")

    model, spec = adapted("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.ReLU()
    plain = train_step(model)
    kept = row(apply_patches(model, ALL, spec), "mlp", "model.layers.*.mlp")
    assert kept.reason == "its activation ReLU is not known"
    assert largest_difference(plain, train_step(model)) < ROUNDING


def test_a_class_that_only_has_the_name_is_not_taken() -> None:
    class LlamaRMSNorm(nn.Module):
        variance_epsilon = 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 3

    model, spec = adapted("llama")
    model.model.norm = LlamaRMSNorm()
    rows = apply_patches(model, ("rms_norm",), spec)
    assert "model.norm" not in {r.modules for r in rows}
    assert type(model.model.norm) is LlamaRMSNorm


def test_dropout_is_off_in_evaluation_and_on_in_training() -> None:
    model, spec = adapted("llama", dropout=0.5)
    model.eval()
    plain = train_step(model)
    apply_patches(model, ALL, spec)
    assert largest_difference(plain, train_step(model)) < ROUNDING
    model.train()
    first, second = train_step(model), train_step(model)
    assert largest_difference(first, second) > 1e-2


def test_generation_runs_patched() -> None:
    model, spec = adapted("gemma2")
    ids = torch.randint(4, 90, (2, 7))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    plain = model.eval().generate(ids, **options)
    apply_patches(model, ALL, spec)
    assert torch.equal(model.generate(ids, **options), plain)


def test_a_patch_that_is_unknown_or_matches_nothing_is_refused() -> None:
    model, spec = adapted("llama", peft="full")
    with pytest.raises(ConfigError, match=r"no patch 'rmsnorm'; did you mean rms_norm\?"):
        apply_patches(model, ("rmsnorm",), spec)
    with pytest.raises(ConfigError, match="its base weight is trained; set kernels=torch"):
        apply_patches(model, ("attention",), spec)


@pytest.mark.parametrize("peft", ["lora", "full"])
def test_a_model_is_patched_once_and_again_after_unpatch(peft: str) -> None:
    model, spec = adapted("gemma3", peft=peft)
    plain = train_step(model)
    rows = apply_patches(model, ALL, spec)
    with pytest.raises(AssertionError, match="the model is patched"):
        apply_patches(model, ALL, spec)
    unpatch(model)
    assert apply_patches(model, ALL, spec) == rows
    assert largest_difference(plain, train_step(model)) < ROUNDING


def test_triton_is_never_left_out_silently(caplog: pytest.LogCaptureFixture) -> None:
    cpu = torch.device("cpu")
    triton = KernelsConfig(Backend.triton, ["rope"])
    with pytest.raises(ConfigError, match="kernels=triton cannot run here: it needs a CUDA or RO"):
        choose_patches(triton, cpu)
    assert choose_patches(triton, None) == ("rope",)
    with caplog.at_level("INFO", logger="dtune"):
        assert choose_patches(KernelsConfig(Backend.auto, ["rope"]), cpu) == ()
    assert "kernels=auto patches nothing here: it needs a CUDA" in caplog.text
    assert choose_patches(KernelsConfig(Backend.reference, ["rope"]), cpu) == ("rope",)
    with pytest.raises(ConfigError, match="kernels=torch applies no patches"):
        KernelsConfig(Backend.torch, ["rope"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_block_has_no_graph_break(family: str) -> None:
    torch._dynamo.reset()
    model, spec = adapted(family)
    plain = train_step(model)
    apply_patches(model, ALL, spec)
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    assert largest_difference(plain, train_step(model)) < ROUNDING


def test_compiled_blocks_are_compiled_once_for_all() -> None:
    torch._dynamo.reset()
    model, spec = adapted("llama", attention="sdpa", layers=5)
    apply_patches(model, ALL, spec)
    compiler = CompileCounterWithBackend("aot_eager")
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend=compiler)
    train_step(model)
    # The first block's input needs no gradient; the others' does.
    assert compiler.frame_count == 2
    train_step(model, make_batch(2, 0, packed=False))
    assert compiler.frame_count == 2


class _NoSync(TorchDispatchMode):
    """Raises where the host would wait for the device to hand it a number or a shape."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        assert name not in SYNCS, name
        return func(*args, **(kwargs or {}))


SYNCS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_patched_step_never_waits_for_the_device(family: str, dropout: float) -> None:
    model, spec = adapted(family, dropout=dropout)
    apply_patches(model, ALL, spec)
    batch = make_batch(1, 0, packed=True)
    with _NoSync():
        causal_loss(model, batch).total.backward()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), _NoSync():
        batch.labels.sum().item()


def test_a_model_that_patches_do_not_know_is_left_alone_where_they_are_not_required() -> None:
    model, spec = adapted("llama", peft="full")
    kinds = [type(m) for m in model.modules()]
    rows = apply_patches(model, ("attention",), spec, required=False)
    assert [type(m) for m in model.modules()] == kinds
    assert all(r.reason for r in rows)
