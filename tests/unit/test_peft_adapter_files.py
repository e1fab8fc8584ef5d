"""Folders that ``peft.init_from`` may name: what does not fit is said before anything is loaded."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dtune.errors import ConfigError
from dtune.peft.export import base_name, serving_problems
from dtune.peft.schema import PEFT
from dtune.peft.schema.lora import LoraConfig
from dtune.types import PeftMethod
from tests.contracts.small_models import (
    build_on_meta,
    materialize,
    read_whole,
    save_base,
    trained_tensors,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "Llama-3.1-8B", "llama")


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    model, spec = build_on_meta(base)
    method = LoraConfig(rank=4).build()
    method.inject(model, spec)
    materialize(model, method, base)
    method.save(trained_tensors(model), str(folder))
    return folder


@pytest.fixture
def adapter(whole: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "adapter"))


def method_of(base: Path, **options: Any) -> PeftMethod:
    model, spec = build_on_meta(base)
    method = LoraConfig(**{"rank": 4, **options}).build()
    method.inject(model, spec)
    return method


def with_fields(**fields: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        saved = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**saved, **fields}))

    return change


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def holding(name: str, data: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return change


def cut_short(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) - 64])


def with_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return rewrite


KEY = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"

SPOILED = {
    "no weights": (without(WEIGHTS), "holds no adapter: adapter_model.safetensors missing"),
    "no config": (without(CONFIG), "holds no adapter: adapter_config.json missing"),
    "torn JSON": (holding(CONFIG, b'{"peft_type": "LO'), "cannot be read as JSON"),
    "no text": (holding(CONFIG, b"\xff\xfe\x00"), "cannot be read as JSON"),
    "a list": (holding(CONFIG, b"[]"), "holds no JSON object"),
    "truncated": (cut_short, "not a whole safetensors file"),
    "a pickle": (holding(WEIGHTS, b"PK\x03\x04 archive/data.pkl"), "not a whole safetensors"),
    "empty": (holding(WEIGHTS, b""), "not a whole safetensors file"),
    "another method": (with_fields(peft_type="IA3"), "peft_type is IA3.*peft=..."),
    "no method": (with_fields(peft_type=None), "peft_type is None"),
    "another rank": (with_fields(r=8), "r is 8, but the run's peft has 4; turn peft.rank"),
    "another scale": (with_fields(lora_alpha=16), "lora_alpha is 16.*turn peft.alpha"),
    "rslora": (with_fields(use_rslora=True), "use_rslora is True.*turn peft=rslora"),
    "dora": (with_fields(use_dora=True), "use_dora is True.*turn peft=dora"),
    "ranks of its own": (with_fields(rank_pattern={"q_proj": 8}), "rank_pattern is"),
    "another base": (
        with_fields(base_model_name_or_path="Qwen/Qwen3-8B"),
        "belongs to Qwen/Qwen3-8B, and model.path is .*turn model.path or peft.init_from",
    ),
    "a layer less": (with_tensors(lambda t: t.pop(KEY)), "peft.targets names other.*is missing"),
    "a layer more": (
        with_tensors(lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.ones(1)})),
        "peft.targets names other layers.*it holds base_model.model.lm_head",
    ),
    "another shape": (
        with_tensors(lambda t: t.update({KEY: torch.ones(4, 31)})),
        r"has shape \[4, 31\], this model wants \[4, 32\]; turn model.path",
    ),
}


@pytest.mark.parametrize("what", SPOILED)
def test_what_does_not_fit_is_refused(base: Path, adapter: Path, what: str) -> None:
    spoil, said = SPOILED[what]
    method = method_of(base)
    method.saved(str(adapter))
    spoil(adapter)
    with pytest.raises(ConfigError, match=said) as refused:
        method.saved(str(adapter))
    assert str(adapter) in str(refused.value)


SNAPSHOT = (
    "/hub/models--meta-llama--Llama-3.1-8B/snapshots/d04e592bb4f6aa9cfee91e2e20afa771667e1d4b"
)


@pytest.mark.parametrize(
    "path", ["meta-llama/Llama-3.1-8B", "/data/llama-3.1-8b/", SNAPSHOT, "", None]
)
def test_the_same_base_elsewhere_fits(base: Path, adapter: Path, path: str | None) -> None:
    with_fields(base_model_name_or_path=path)(adapter)
    assert read_whole(method_of(base).saved(str(adapter)), KEY[17:].removesuffix(".weight")).any()


def test_fields_that_an_older_file_lacks_mean_what_peft_says(base: Path, adapter: Path) -> None:
    saved = json.loads((adapter / CONFIG).read_text())
    for field in ("use_dora", "use_rslora", "alpha_pattern", "rank_pattern"):
        del saved[field]
    (adapter / CONFIG).write_text(json.dumps(saved))
    method_of(base).saved(str(adapter))
    del saved["lora_alpha"]
    (adapter / CONFIG).write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match="lora_alpha is 8"):
        method_of(base).saved(str(adapter))


def test_base_name_is_the_last_component() -> None:
    assert base_name("dtune/tiny") == "tiny"
    assert base_name("C:\\models\\tiny\\") == "tiny"
    assert base_name("snapshots") == "snapshots"


SERVED = {"peft_type": "LORA", "r": 512, "bias": "none", "use_rslora": True, "use_dora": False}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "DoRA; set peft=rslora"),
        ({"r": 513}, "is 513, servers take 512 at most; lower peft.rank"),
        ({"bias": "all"}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"trainable_token_indices": [1]}, "tokens"),
        ({"rank_pattern": {"q_proj": 8}}, "one rank"),
    ],
)
def test_what_cannot_be_served_is_told_with_what_to_change(
    change: dict[str, object], said: str
) -> None:
    assert serving_problems(SERVED) == []
    (problem,) = serving_problems({**SERVED, **change})
    assert said in problem
    assert "merge it" in problem


@pytest.mark.parametrize(
    ("name", "options", "warned"),
    [
        ("lora", {}, False),
        ("dora", {}, True),
        ("pissa", {"rank": 16}, False),
        ("ia3", {}, True),
        ("prefix", {}, True),
        ("adapter", {}, True),
        ("full", {}, False),
    ],
)
def test_the_run_warns_at_its_start(
    base: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    options: dict[str, Any],
    warned: bool,
) -> None:
    model, spec = build_on_meta(base)
    with caplog.at_level(logging.WARNING, "dtune"):
        PEFT.config(name)(**options).build().inject(model, spec)
    assert ("cannot be served" in caplog.text) is warned
