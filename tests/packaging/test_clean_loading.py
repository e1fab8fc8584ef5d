"""What dtune writes is loaded by transformers and peft where there is no dtune."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
import venv
from pathlib import Path

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
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

try:
    import dtune
except ModuleNotFoundError:
    pass
else:
    raise AssertionError(dtune)

told = json.loads(sys.argv[1])
found = {}
for name, (model, adapter) in told["models"].items():
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter:
        loaded = PeftModel.from_pretrained(loaded, adapter)
    template = AutoTokenizer.from_pretrained(adapter or model).chat_template
    assert "generation" in template, template
    with torch.no_grad():
        found[name] = loaded.eval()(input_ids=torch.tensor([told["ids"]])).logits[0].clone()
torch.save(found, sys.argv[2])
assert not [name for name in sys.modules if name.split(".")[0].startswith("dtune")]
"""

# Name -> folder of a model, and of an adapter on it or nothing.
Models = dict[str, tuple[Path | str, Path | str]]


def load_elsewhere(folder: Path, models: Models) -> dict[str, torch.Tensor]:
    """Logits of models by a Python that has transformers and peft and cannot import dtune."""
    base = str(folder / "environment")
    venv.create(base, with_pip=False)
    home = Path(sysconfig.get_path("purelib", vars={"base": base}))
    # As a .pth line it adds the packages there, but not what their own .pth files add: an editable
    # dtune stays out.
    (home / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (folder / "load.py").write_text(LOAD)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    pairs = {name: [str(model), str(adapter)] for name, (model, adapter) in models.items()}
    told = json.dumps({"models": pairs, "ids": IDS})
    done = subprocess.run(
        [Path(base, "bin", "python"), "-I", folder / "load.py", told, folder / "logits.pt"],
        cwd=folder,
        env={**clean, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, torch.Tensor] = torch.load(folder / "logits.pt", weights_only=True)
    return found


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


def test_what_is_written_gives_dtunes_logits_where_there_is_no_dtune(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    lora, full = train_run(tmp_path, "peft=lora"), train_run(tmp_path / "full", "peft=full")
    merged = tmp_path / "merged"
    assert main(["merge", f"run_dir={lora}", f"out={merged}", "dtype=fp32"]) == 0
    found = load_elsewhere(
        tmp_path,
        {
            "base": (BASE, ""),
            "adapter": (BASE, lora / "adapter"),
            "merged": (merged, ""),
            "model": (full / "model", ""),
        },
    )
    bound = Bounds.of_rounding([torch.float32], num_layers=4, width=128, perplexity_ratio=1.02)
    trained = logits_by_dtune(lora)
    assert difference(found["adapter"], trained) <= bound.mean
    assert difference(found["merged"], trained) <= bound.mean
    # Both load the export, which is in the dtype of its base.
    assert difference(found["model"], logits_by_dtune(full)) <= bound.mean
    # What does not load the weights that were trained is far away.
    assert difference(found["base"], trained) > 1000 * bound.mean
