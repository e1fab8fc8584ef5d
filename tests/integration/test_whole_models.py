"""Runs of methods that export a whole model: what ``dtune eval`` and further runs make of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dtune.cli import main
from dtune.peft.schema import PEFT
from tests.integration.test_train_eval import base_in_fp32
from tests.integration.train_runs import held_out, read_json, settings

METHODS = ("bitfit", "freeze", "full")


def scores(run: Path) -> tuple[float, float]:
    """Held-out loss as the run reported it, and as ``dtune eval`` finds it."""
    assert main(["eval", f"run_dir={run}"]) == 0
    after = read_json(run / "result.json")["after"]["loss"]
    return after, read_json(run / "eval.json")["loss"]


def test_the_config_says_what_the_method_exports() -> None:
    for name in PEFT.names():
        config = PEFT.config(name)()
        assert (config.build().export_name == "model") is config.exports_model, name
    assert all(PEFT.config(name).exports_model for name in METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_run_that_starts_from_an_export_is_evaluated_by_its_own(
    tmp_path: Path, method: str
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    common = [held_out(tmp_path), base_in_fp32(tmp_path / "base"), f"peft={method}"]
    assert main(["train", *settings(first, *common)]) == 0
    start = f"peft.init_from={first / 'model'}"
    more = [*common, start, "evaluate.before=true", "train.max_steps=2", "optim.lr=1e-2"]
    assert main(["train", *settings(second, *more)]) == 0
    ended, found = scores(first)
    assert found == ended
    assert read_json(second / "result.json")["before"]["loss"] == ended
    further, found = scores(second)
    assert found == further != ended


@pytest.mark.parametrize("method", ["bitfit", "freeze"])
def test_over_a_quantised_base_the_export_computes_what_was_trained(
    tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    common = [held_out(tmp_path), base_in_fp32(tmp_path / "base"), f"peft={method}", "quant=nf4"]
    assert main(["train", *settings(run, *common, "evaluate.before=true")]) == 0
    ended, found = scores(run)
    # The bytes are multiplied as the same floats, which are those of the export.
    assert found == ended
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    frozen = "model.layers.0.mlp.up_proj.weight"
    exported = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    assert not torch.equal(exported[frozen], stored[frozen])
    assert torch.allclose(exported[frozen], stored[frozen], atol=float(stored[frozen].abs().max()))
    # And a further run finds its own base in it.
    start = f"peft.init_from={run / 'model'}"
    assert main(["train", *settings(again, *common, start, "evaluate.before=true")]) == 0
    assert read_json(again / "result.json")["before"]["loss"] == ended
    capsys.readouterr()
    assert main(["eval", f"run_dir={run}", "quant.block_size=128"]) == 2
    assert "is a whole model in float" in capsys.readouterr().err
