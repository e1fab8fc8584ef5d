"""Whole runs with kernels: trained, evaluated, saved and planned as runs without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from dtune.cli import main
from tests.integration.test_train_equal import assert_equal_curves
from tests.integration.train_runs import column, held_out, settings, train


@pytest.mark.parametrize("packing", ["true", "false"])
@pytest.mark.parametrize("peft", ["lora", "full"])
def test_a_patched_run_has_the_curve_and_the_adapter_of_the_run(
    tmp_path: Path, peft: str, packing: str
) -> None:
    common = (f"peft={peft}", f"data.packing={packing}", "optim=sgd", "optim.lr=1e-2")
    plain = train(settings(tmp_path / "plain", *common))
    patched = train(settings(tmp_path / "patched", *common, "kernels=reference"))
    assert_equal_curves(patched, plain)
    assert column(patched, "loss") != column(plain, "loss"), "the patches were not applied"
    folder = "adapter/adapter_model" if peft == "lora" else "model/model"
    ours, theirs = (
        load_file(tmp_path / name / f"{folder}.safetensors") for name in ("patched", "plain")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[n].float(), theirs[n].float(), atol=1e-4) for n in ours)


def test_dropout_and_evaluation_run_patched(tmp_path: Path) -> None:
    rows = train(
        settings(
            tmp_path / "run",
            "peft.dropout=0.1",
            "kernels=reference",
            held_out(tmp_path, rows=4),
            "evaluate.generate=true",
            "evaluate.max_new_tokens=4",
            "train.max_steps=6",
        )
    )
    losses = column(rows, "loss")
    assert losses[-1] < losses[0]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_triton_where_it_cannot_run_ends_before_anything_is_loaded(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *settings(tmp_path / "run", "kernels=triton")]) == 2
    said = capfd.readouterr().err
    assert "kernels=triton cannot run here: it needs a CUDA or ROCm device, this is cpu" in said
    assert "set kernels=auto or kernels=torch" in said


def test_what_was_trained_with_kernels_is_evaluated_without_where_they_cannot_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    train(settings(run_dir, "kernels=reference", held_out(tmp_path, rows=4)))
    frozen = run_dir / "config.yaml"
    text = frozen.read_text(encoding="utf-8")
    assert "name: reference" in text
    frozen.write_text(text.replace("name: reference", "name: triton"), encoding="utf-8")
    assert main(["eval", f"run_dir={run_dir}"]) == 0
    said = capfd.readouterr()
    assert "kernels=auto patches nothing here: it needs a CUDA or ROCm device" in said.err
    assert "loss" in said.out


@pytest.mark.parametrize("model", ["tiny", "llama3_8b", "llama3_70b", "qwen3_8b", "mistral_7b"])
def test_plan_shows_what_would_be_patched_without_a_device(
    model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", f"model={model}", "kernels=triton", f"run_dir={tmp_path / 'run'}"]) == 0
    said = capfd.readouterr().out
    assert "triton, planned for another machine: it needs a CUDA or ROCm device" in said
    for patch in ("rope", "attention", "mlp", "lora_linear", "rms_norm", "loss_head"):
        assert f"  {patch}: " in said


@pytest.mark.slow
def test_a_compiled_patched_run_has_the_curve_of_the_run(tmp_path: Path) -> None:
    common = ("optim=sgd", "optim.lr=1e-2", "kernels=reference")
    eager = train(settings(tmp_path / "eager", *common))
    torch._dynamo.reset()  # of what other tests have compiled
    counters.clear()
    compiled = train(settings(tmp_path / "compiled", *common, "train.compile=true"))
    assert_equal_curves(compiled, eager)
    # One graph for the first block, whose input needs no gradient, and one for all others.
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
