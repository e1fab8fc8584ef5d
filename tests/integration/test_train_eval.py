"""What a run exports has the scores that the run reported, by whichever software loads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from dtune.cli import main
from dtune.resources import resolve_path
from tests.integration.train_runs import held_out, read_json, settings

SCORES = ("evaluate.generate=true", "evaluate.max_new_tokens=8", "train.max_steps=6")


def base_in_fp32(folder: Path) -> str:
    """The setting that trains a copy of the embedded model whose weights are stored in fp32."""
    shutil.copytree(resolve_path("dtune://tiny"), folder)
    weights = load_file(folder / "model.safetensors")
    wide = {name: tensor.float() for name, tensor in weights.items()}
    save_file(wide, folder / "model.safetensors", metadata={"format": "pt"})
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return f"model.path={folder}"


@pytest.fixture(scope="module", params=["lora", "full", "full of fp32", "freeze of fp32"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has ended, with ``dtune eval`` run on it."""
    method, _, wide = request.param.partition(" of ")
    folder = tmp_path_factory.mktemp("trained")
    argv = settings(
        folder / "run", held_out(folder), *SCORES, f"peft={method}", "evaluate.before=true"
    )
    if wide:
        argv.append(base_in_fp32(folder / "base"))
    assert main(["train", *argv]) == 0
    assert main(["eval", f"run_dir={folder / 'run'}"]) == 0
    return folder / "run"


def is_exported_exactly(trained: Path) -> bool:
    """Whether the exported weights are the fp32 ones that were trained.

    A model is exported in the dtype of its base, which is fp16 for the embedded one.
    """
    return (trained / "adapter").is_dir() or (trained.parent / "base").is_dir()


def test_eval_gives_the_numbers_of_the_last_evaluation(trained: Path) -> None:
    scores = read_json(trained / "eval.json")
    result = read_json(trained / "result.json")
    assert set(result["after"]) == {"loss", "exact_match"}
    if is_exported_exactly(trained):
        assert {name: scores[name] for name in result["after"]} == result["after"]
    else:
        # fp16 rounds each weight by at most 2**-11 of itself, and not all one way.
        assert scores["loss"] == pytest.approx(result["after"]["loss"], rel=2**-11)
    answers = (trained / "answers.jsonl").read_text().splitlines()
    assert len(answers) == 12
    share = sum(json.loads(line)["ok"] for line in answers) / len(answers)
    assert share == scores["exact_match"]
    # The base scores otherwise, so that a run whose weights were not loaded would be noticed.
    assert result["before"]["loss"] != pytest.approx(result["after"]["loss"], rel=0.05)


def losses_of(model: Any, rows: list[dict[str, str]], tokenizer: Any) -> torch.Tensor:
    """Loss of every trained token, each row alone, labels by transformers' own mask."""
    losses = []
    for row in rows:
        user = row["instruction"] + (f"\n{row['input']}" if row["input"] else "")
        turns = [
            {"role": "user", "content": user},
            {"role": "assistant", "content": row["output"]},
        ]
        encoded = tokenizer.apply_chat_template(
            turns, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = torch.tensor([encoded["input_ids"]])
        trained = torch.tensor(encoded["assistant_masks"], dtype=torch.bool)[1:]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        losses.append(F.cross_entropy(logits[trained], ids[0, 1:][trained], reduction="none"))
    return torch.cat(losses)


def exported_model(trained: Path) -> Any:
    """By peft or transformers alone."""
    if (trained / "model").is_dir():
        return AutoModelForCausalLM.from_pretrained(trained / "model", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(resolve_path("dtune://tiny"), dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(trained / "adapter"))


def test_other_software_finds_the_same_held_out_loss_in_what_is_exported(trained: Path) -> None:
    folder = trained / ("model" if (trained / "model").is_dir() else "adapter")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = (trained.parent / "heldout.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    model = exported_model(trained).eval()
    single = losses_of(model, rows, tokenizer)
    exact = losses_of(model.double(), rows, tokenizer)
    # Twice the error that fp32 has here, token by token, without what cancels in a mean.
    rounding = 2 * float((single.double() - exact).abs().mean())
    found = read_json(trained / "eval.json")["loss"]
    before = read_json(trained / "result.json")["before"]["loss"]
    assert 0 < rounding < 1e-5
    assert abs(found - float(exact.mean())) <= rounding
    assert abs(before - float(exact.mean())) > 1000 * rounding
    # Nor would it pass if a token of the answer, its end, were left out.
    assert abs(found - float(exact[:-1].mean())) > rounding
