"""What every fine-tuning method must do, whichever is registered."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from dtune.peft.schema import PEFT
from dtune.types import InjectReport, PeftMethod
from tests.contracts.small_models import (
    build_on_meta,
    load_base,
    materialize,
    read_whole,
    save_base,
    sources,
    token_ids,
    trained_tensors,
)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), request.param, tied=request.param == "qwen3")


@pytest.fixture(params=PEFT.names())
def method(request: pytest.FixtureRequest) -> PeftMethod:
    return PEFT.config(request.param)().build()


def built(base: Path, method: PeftMethod) -> tuple[PreTrainedModel, InjectReport]:
    model, spec = build_on_meta(base)
    report = method.inject(model, spec)
    materialize(model, method, base)
    return model, report


def train_two_steps(model: PreTrainedModel) -> dict[str, float]:
    """Largest gradient of each trained parameter over two steps of a large SGD."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    largest = dict.fromkeys(trained, 0.0)
    for _ in range(2):
        ids = token_ids()
        model(ids, labels=ids).loss.backward()
        for name, parameter in trained.items():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            largest[name] = max(largest[name], parameter.grad.abs().max().item())
        optimizer.step()
        optimizer.zero_grad()
    return largest


def test_starts_equal_to_its_base(base: Path, method: PeftMethod) -> None:
    model, _ = built(base, method)
    # Bit-equal: an update of exact zeros changes no sum.
    assert torch.equal(model(token_ids()).logits, load_base(base)(token_ids()).logits)


def test_every_parameter_is_stored_in_the_base_or_has_an_initial_value(
    base: Path, method: PeftMethod
) -> None:
    model, spec = build_on_meta(base)
    stored = {name: tuple(p.shape) for name, p in model.named_parameters()}
    report = method.inject(model, spec)
    _, initial = sources(method, base)
    for name, parameter in model.named_parameters():
        assert parameter.is_meta, name
        if name in initial:
            assert initial.shape(name) == tuple(parameter.shape), name
            assert parameter.requires_grad, name
        else:
            assert stored[method.stored_name(name)] == tuple(parameter.shape), name
    counts = {p: p.numel() for p in model.parameters()}
    assert report.total == sum(counts.values())
    assert report.trainable == sum(n for p, n in counts.items() if p.requires_grad) > 0


def test_all_that_is_trained_gets_gradients_and_changes_and_nothing_else_does(
    base: Path, method: PeftMethod
) -> None:
    model, _ = built(base, method)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    largest = train_two_steps(model)
    assert all(value > 0 for value in largest.values()), largest
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter) is not parameter.requires_grad, name
        assert parameter.requires_grad or parameter.grad is None, name


def test_saved_and_loaded_by_hugging_face_it_gives_the_same_logits(
    base: Path, method: PeftMethod, tmp_path: Path
) -> None:
    model, _ = built(base, method)
    train_two_steps(model)
    folder = tmp_path / "saved"
    method.save(trained_tensors(model), str(folder))
    loaded = (
        peft.PeftModel.from_pretrained(load_base(base), folder)
        if (folder / "adapter_config.json").is_file()
        else AutoModelForCausalLM.from_pretrained(folder)
    )
    logits = model(token_ids()).logits
    assert torch.equal(loaded.eval()(token_ids()).logits, logits)
    assert not torch.equal(load_base(base)(token_ids()).logits, logits)


def test_saved_values_come_back_under_their_names(
    base: Path, method: PeftMethod, tmp_path: Path
) -> None:
    model, _ = built(base, method)
    train_two_steps(model)
    method.save(trained_tensors(model), str(tmp_path / "saved"))
    source = method.saved(str(tmp_path / "saved"))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(read_whole(source, name), parameter), name
