"""``dtune merge``: what is published equals what was trained, or nothing is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dtune import inference
from dtune.cli import main
from dtune.evaluate.compare import Bounds, compare_logits
from dtune.types import Example
from tests.integration.train_runs import read_json
from tests.integration.trained_runs import BASE, base_model, save_adapter, train_run

# Methods whose merge has maths of its own in peft, one of each; more are in the matrix.
METHODS = ("lora", "dora", "pissa", "ia3", "oft", "layernorm")
IDS = torch.arange(3, 60).view(1, -1)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def is_torn(folder: Path) -> bool:
    """Whether anything is left of a folder that was to be published."""
    return folder.exists() or any(folder.parent.glob(f".tmp-{folder.name}*"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_run(tmp_path_factory.mktemp("run"), "peft=lora")


@pytest.mark.parametrize("method", METHODS)
def test_a_merged_model_alone_gives_the_logits_of_base_and_adapter(
    method: str, tmp_path: Path
) -> None:
    run, out = train_run(tmp_path, f"peft={method}"), tmp_path / "merged"
    assert main(["merge", f"run_dir={run}", f"out={out}", "dtype=fp32"]) == 0
    found = logits(AutoModelForCausalLM.from_pretrained(out).eval())
    whole = logits(peft.PeftModel.from_pretrained(base_model(), run / "adapter").eval())
    scale = float(whole.std())
    bounds = Bounds.of_rounding([torch.float32], num_layers=4, width=128, perplexity_ratio=1.02)
    assert float((found - whole).abs().mean()) / scale <= bounds.mean
    assert float((logits(base_model()) - whole).abs().mean()) / scale > 1000 * bounds.mean
    record = read_json(out / "merge.json")
    assert record["difference"]["mean"] / record["difference"]["spread"] <= bounds.mean
    assert record["adapter_moves_logits"] > 0.01
    assert AutoTokenizer.from_pretrained(out).chat_template is not None


@pytest.mark.parametrize(
    "setting", ["model.added_tokens=['<|new|>']", "peft.targets=[q_proj,head]"]
)
def test_what_reaches_the_embedding_and_the_head_is_merged_into_both_or_one(
    setting: str, tmp_path: Path
) -> None:
    run, out = train_run(tmp_path, "peft=lora", setting), tmp_path / "merged"
    # Compared with dtune's own model, new tokens among the prompts.
    assert main(["merge", f"run_dir={run}", f"out={out}", "dtype=fp32"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(out)
    is_tied = merged.lm_head.weight is merged.model.embed_tokens.weight
    assert is_tied == ("added_tokens" in setting)
    new = len(AutoTokenizer.from_pretrained(out)) - len(AutoTokenizer.from_pretrained(BASE))
    assert new == int("added_tokens" in setting)


@pytest.mark.parametrize("cell", ["lora nf4", "pissa nf4", "lora int8"])
def test_over_a_quantised_base_what_was_trained_against_is_merged(
    cell: str, tmp_path: Path
) -> None:
    method, quant = cell.split()
    run, out = train_run(tmp_path, f"peft={method}", f"quant={quant}"), tmp_path / "merged"
    assert main(["merge", f"run_dir={run}", f"out={out}", "dtype=fp32"]) == 0
    # dtune's own model of bytes gave the reference; the base as it is stored is far from it.
    merged = logits(AutoModelForCausalLM.from_pretrained(out).eval())
    stored = logits(peft.PeftModel.from_pretrained(base_model(), run / "adapter").eval())
    bounds = Bounds.of_rounding([torch.float32], num_layers=4, width=128, perplexity_ratio=1.02)
    assert float((merged - stored).abs().mean() / stored.std()) > 100 * bounds.mean


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [("bf16", torch.bfloat16), ("fp16", torch.float16), ("base", torch.float16)],
)
def test_the_dtype_that_is_asked_for_is_written(
    dtype: str, stored: torch.dtype, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    assert main(["merge", f"run_dir={run}", f"out={out}", f"dtype={dtype}"]) == 0
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {stored}
    said, record = capsys.readouterr().out, read_json(out / "merge.json")
    for name in ("perplexity", "reference_perplexity"):
        assert f"{record['difference'][name]:.4f}" in said


def test_what_was_merged_can_be_quantised(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    assert main(["merge", f"run_dir={run}", f"out={out}", "quantize=nf4"]) == 0
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert "Linear4bit" in {type(module).__name__ for module in model.modules()}
    record = read_json(out / "merge.json")
    assert 1 < record["quantized"]["difference"]["perplexity"] < 20
    assert not (out / "float").exists()
    # Stricter than 4 bits can be.
    strict = [f"out={tmp_path / 'strict'}", "quantize=nf4", "max_perplexity_ratio=1.0000001"]
    assert main(["merge", f"run_dir={run}", "dtype=fp32", *strict]) == 2
    assert not is_torn(tmp_path / "strict")


def halve(adapter: Path) -> None:
    """Make the adapter's update half as large, by its config alone."""
    config = read_json(adapter / "adapter_config.json")
    config["lora_alpha"] /= 2
    (adapter / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_merge_is_refused_and_leaves_nothing(
    dtype: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, out = train_run(tmp_path, "peft=lora"), tmp_path / "merged"
    real = inference.load_float_base

    def tampered(*args: Any, **kwargs: Any) -> Any:
        # Called when the trained model has answered, and before peft reads the adapter.
        halve(run / "adapter")
        return real(*args, **kwargs)

    monkeypatch.setattr(inference, "load_float_base", tampered)
    assert main(["merge", f"run_dir={run}", f"out={out}", f"dtype={dtype}"]) == 2
    said = capsys.readouterr()
    assert "mean difference of logits" in said.err
    assert "Nothing was published" in said.err
    assert "perplexity" in said.out
    assert not is_torn(out)
    # The config was tampered with, which a merge after that notices before weights are read.
    assert main(["merge", f"run_dir={run}", f"out={out}"]) == 2
    assert "lora_alpha is 16.0" in capsys.readouterr().err


def test_an_adapter_of_anyone_is_merged_into_its_base(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "lm_head"], bias="none"
    )
    whole = save_adapter(tmp_path / "adapter", config, size=0.05)
    argv = [f"adapter={tmp_path / 'adapter'}", "model=tiny", f"out={tmp_path / 'merged'}"]
    assert main(["merge", *argv, "dtype=fp32"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    # The head is one with the embedding in the base, and must not be after its update.
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
    assert torch.equal(merged.model.embed_tokens.weight, base_model().model.embed_tokens.weight)
    assert torch.allclose(logits(merged), logits(whole), atol=1e-4)


@pytest.mark.parametrize("method", ["prefix", "prompt", "p_tuning", "adapter"])
def test_what_changes_no_weight_is_not_merged(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_run(tmp_path, f"peft={method}", "train.max_steps=1")
    assert main(["merge", f"run_dir={run}", f"out={tmp_path / 'merged'}"]) == 2
    said = capsys.readouterr().err
    assert "cannot be merged into weights" in said
    assert "dtune chat or dtune generate" in said


def test_a_whole_model_needs_no_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train_run(tmp_path, "peft=full", "train.max_steps=1")
    assert main(["merge", f"run_dir={run}", f"out={tmp_path / 'merged'}"]) == 2
    assert f"whole already, at {run / 'model'}" in capsys.readouterr().err


def test_settings_that_cannot_be_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    out = f"out={tmp_path / 'merged'}"
    cases = [
        ([f"run_dir={run}"], "out names the folder"),
        ([out], "set run_dir=RUN, or adapter=FOLDER"),
        ([f"run_dir={run}", f"out={tmp_path / 'full'}"], "exists and is not empty"),
        ([f"run_dir={run}", out, "dtype=f16"], "dtype=f16 is not one of base, bf16"),
        ([f"run_dir={run}", out, "max_logit_diff=1"], "did you mean max_logit_difference or"),
        ([f"run_dir={run}", out, "max_perplexity_ratio=0.5"], "must be 1 or more"),
        ([f"run_dir={run}", out, "adapter=x"], "set one of them"),
        (["adapter=nowhere", out], "adapter=nowhere: there is no such folder"),
    ]
    for argv, said in cases:
        assert main(["merge", *argv]) == 2, argv
        assert said in capsys.readouterr().err
    assert (tmp_path / "full" / "file").read_text() == "mine"


def examples() -> list[Example]:
    return [Example(0, [1, 2, 3, 4], [-100, 2, 3, 4])]


def test_bounds_let_through_what_is_equal_and_nothing_that_is_not_finite() -> None:
    torch.manual_seed(0)
    right = [torch.randn(4, 50)]
    bounds = Bounds.of_rounding([torch.bfloat16], num_layers=4, width=128, perplexity_ratio=1.02)
    assert not bounds.broken_by(compare_logits(examples(), right, right))
    for wrong in (right[0] * 1.05, right[0] * torch.nan, right[0] + torch.inf):
        assert bounds.broken_by(compare_logits(examples(), right, [wrong]))
    one = right[0].clone()
    one[2, 7] += 1.0
    broken = bounds.broken_by(compare_logits(examples(), right, [one]))
    assert any(line.startswith("largest difference of logits") for line in broken)
