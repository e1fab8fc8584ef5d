"""What dtune writes is loaded by transformers and peft where there is no dtune."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dtune.cli import main
from dtune.commands.trained import choose_trained
from dtune.evaluate.compare import Bounds, logits_of
from dtune.inference import assemble_inference
from dtune.types import Example
from tests.integration.trained_runs import BASE, train_run

IDS = list(range(3, 60))

LOAD = """
import json, sys


class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("dtune", "dtune_kernels", "dtune_launch"):
            raise ModuleNotFoundError(name)


# An editable install leaves a folder of data by that name, and a wheel the packages.
sys.meta_path.insert(0, Refuse())

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model, adapter, ids = json.loads(sys.argv[1])
try:
    import dtune
except ModuleNotFoundError:
    pass
else:
    raise AssertionError(dtune)
loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
if adapter:
    from peft import PeftModel
    loaded = PeftModel.from_pretrained(loaded, adapter)
template = AutoTokenizer.from_pretrained(adapter or model).chat_template
assert "generation" in template, template
with torch.no_grad():
    logits = loaded.eval()(input_ids=torch.tensor([ids])).logits[0]
torch.save(logits, sys.argv[2])
assert not [name for name in sys.modules if name.split(".")[0].startswith("dtune")]
"""

Load = Callable[..., torch.Tensor]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Logits of a model, with an adapter or without, by a Python that cannot import dtune."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder / "environment", with_pip=False)
    base = str(folder / "environment")
    home = Path(sysconfig.get_path("purelib", vars={"base": base}))
    # As a .pth line it adds the packages there, but not what their own .pth files add: an editable
    # dtune stays out.
    (home / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (folder / "load.py").write_text(LOAD)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def logits(model: Path | str, adapter: Path | str = "") -> torch.Tensor:
        out = folder / "logits.pt"
        told = json.dumps([str(model), str(adapter), IDS])
        done = subprocess.run(
            [Path(base, "bin", "python"), "-I", folder / "load.py", told, out],
            cwd=folder,
            env={**clean, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        found: torch.Tensor = torch.load(out, weights_only=True)
        return found

    return logits


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_run(tmp_path_factory.mktemp("run"), "peft=lora")


def logits_by_dtune(run: Path) -> torch.Tensor:
    """Of the run's weights, as ``dtune eval`` has them."""
    from dtune.commands.trained import one_process

    trained = choose_trained(str(run), "", [])
    assert trained is not None
    with one_process(quiet=True) as world:
        engine = assemble_inference(trained.config, world).load(world, trained.exported)
        rows = [Example(0, IDS, IDS)]
        return logits_of(engine.module, rows, world.device, engine.compute)[0]


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean absolute difference in units of the spread."""
    return float((one - other).abs().mean() / other.std())


def test_adapter_and_merged_model_give_dtunes_logits_where_there_is_no_dtune(
    run: Path, load: Load, tmp_path: Path
) -> None:
    trained = logits_by_dtune(run)
    bound = Bounds.of_rounding([torch.float32], num_layers=4, width=128, perplexity_ratio=1.02)
    with_adapter = load(BASE, run / "adapter")
    assert difference(with_adapter, trained) <= bound.mean
    assert main(["merge", f"run_dir={run}", f"out={tmp_path / 'merged'}", "dtype=fp32"]) == 0
    assert difference(load(tmp_path / "merged"), trained) <= bound.mean
    # The base alone is far away.
    assert difference(load(BASE), trained) > 1000 * bound.mean


def test_a_model_of_a_run_gives_dtunes_logits_where_there_is_no_dtune(
    load: Load, tmp_path: Path
) -> None:
    run = train_run(tmp_path, "peft=full")
    bound = Bounds.of_rounding([torch.float32], num_layers=4, width=128, perplexity_ratio=1.02)
    # Loaded by both from the export, which is in the dtype of its base.
    assert difference(load(run / "model"), logits_by_dtune(run)) <= bound.mean
