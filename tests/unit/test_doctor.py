"""``dtune doctor``: versions, devices, and what is missing for what."""

from __future__ import annotations

import pytest
import torch
import yaml

from dtune.config.compose import compose_overrides
from dtune.doctor import machine


def test_report_names_versions_host_and_every_optional_setting() -> None:
    text = machine.report()
    for said in (f"torch             {torch.__version__}", "CPU cores", "memory", "disk here"):
        assert " ".join(said.split()) in " ".join(text.split())
    for setting in ("zero3", "flash_attention_2", "varlen", "adamw8bit", "tensorboard", "wandb"):
        assert setting in text


def test_a_missing_package_is_reported_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "is_installed", lambda module: False)
    found = {feature.setting: feature for feature in machine.features()}
    assert "dtune[wandb]" in found["log=wandb"].remedy
    assert "dtune[deepspeed]" in found["parallel=zero1, zero2, zero3"].remedy


def test_every_setting_of_the_report_exists() -> None:
    for feature in machine.features():
        key, _, values = feature.setting.partition("=")
        for value in values.split(", "):
            chosen = yaml.safe_load(compose_overrides("train", [f"{key}={value}"]))
            for part in key.split("."):
                chosen = chosen[part]
            name = chosen["name"] if isinstance(chosen, dict) else chosen
            assert str(name).lower() == value


def test_zero_needs_neither_ninja_nor_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    monkeypatch.setattr(machine, "is_installed", lambda module: True)
    found = {feature.setting: feature for feature in machine.features()}
    assert not found["parallel=zero1, zero2, zero3"].problem
    assert "compiler" in found["train.compile=true"].problem


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_without_a_gpu_what_needs_one_says_so() -> None:
    problems = {feature.setting: feature.problem for feature in machine.features()}
    for setting in ("model.attention=varlen", "model.attention=flex"):
        assert "GPU" in problems[setting]
    assert not problems["optim=adamw8bit"]
    assert not problems["parallel=ddp, fsdp"]
    assert not problems["precision=bf16"]
