"""What every fine-tuning method must do, whichever is registered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from dtune.peft.schema import PEFT
from dtune.peft.schema.adapter import Activation, AdapterConfig, Kind
from dtune.types import InjectReport, PeftMethod
from tests.contracts.small_models import (
    build_on_meta,
    equal_within,
    exported_tensors,
    load_base,
    materialize,
    read_whole,
    rounding_of,
    save_base,
    sources,
    token_ids,
)


def adapter_of(config: dict[str, Any]) -> PeftMethod:
    """The bottleneck adapter that its ``adapter_config.json`` tells of."""
    return AdapterConfig(
        kind=Kind(config["kind"]),
        bottleneck=config["bottleneck"],
        activation=Activation(config["activation"]),
        dropout=config["dropout"],
        scale=config["scale"],
    ).build()


OWN_FILES = {"BOTTLENECK": adapter_of}
"""Methods that HF peft lacks, built anew from what their config file says, by its type."""


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


def loaded(base: Path, folder: Path) -> torch.nn.Module:
    """What a folder holds, by transformers or peft; by dtune where peft lacks the method."""
    if not (folder / "adapter_config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(folder).eval()
    config = json.loads((folder / "adapter_config.json").read_text())
    if config["peft_type"] in peft.PeftType.__members__:
        return peft.PeftModel.from_pretrained(load_base(base), folder).eval()
    model, spec = build_on_meta(base)
    method = OWN_FILES[config["peft_type"]](config)
    method.inject(model, spec)
    # Other values than those that were trained: all of them come from the folder.
    materialize(model, method, base, seed=1)
    source = method.saved(str(folder))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(read_whole(source, name))
    return model.eval()


def test_starts_equal_to_its_base(base: Path, method: PeftMethod) -> None:
    model, _ = built(base, method)
    # Bit-equal: an update of exact zeros changes no sum. Else where a part of the base is trained.
    limit = rounding_of(model, method, base)
    logits, before = model(token_ids()).logits, load_base(base)(token_ids()).logits
    assert equal_within(logits, before, limit) is method.starts_at_base


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
            assert parameter.dtype == torch.float32, name
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
    method.save(exported_tensors(model, method), str(folder))
    logits, limit = model(token_ids()).logits, rounding_of(model, method, base)
    theirs = loaded(base, folder)(token_ids()).logits
    # peft gives logits of virtual tokens as well, before those of the tokens.
    assert equal_within(theirs[:, -logits.shape[1] :], logits, limit)
    assert not equal_within(load_base(base)(token_ids()).logits, logits, limit)


def test_what_is_saved_takes_the_room_that_was_said(
    base: Path, method: PeftMethod, tmp_path: Path
) -> None:
    model, _ = built(base, method)
    method.save(exported_tensors(model, method), str(tmp_path / "saved"))
    weights = [load_file(path) for path in (tmp_path / "saved").glob("*.safetensors")]
    written = sum(t.numel() * t.itemsize for tensors in weights for t in tensors.values())
    assert written == method.exported_bytes()


def test_saved_values_come_back_under_their_names(
    base: Path, method: PeftMethod, tmp_path: Path
) -> None:
    model, _ = built(base, method)
    train_two_steps(model)
    method.save(exported_tensors(model, method), str(tmp_path / "saved"))
    source = method.saved(str(tmp_path / "saved"))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(read_whole(source, name), parameter), name
