"""Checkpoints as Hugging Face's layout, and back."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from dtune.checkpoint.reader import CHECKPOINTS
from dtune.cli import main
from dtune.resources import resolve_path
from tests.distributed.moving import whole_tensors
from tests.integration.train_runs import (
    Scripted,
    assembled,
    held_out,
    metrics,
    settings,
    untimed,
)
from tests.integration.trained_runs import save_adapter

pytestmark = pytest.mark.slow


def convert(source: Path, out: Path, *more: str) -> int:
    return main(["convert", f"from={source}", f"to={out}", *more])


def step_folder(run: Path, step: int) -> Path:
    return run / CHECKPOINTS / f"step-{step:08d}"


def same_weights(one: Path, other: Path) -> bool:
    """Whether two exports hold the same bytes of weights, in as many files."""
    files = {path.name: path.read_bytes() for path in one.glob("*.safetensors")}
    assert files
    return files == {path.name: path.read_bytes() for path in other.glob("*.safetensors")}


# What each method keeps beside its parameters must come along: ranks of AdaLoRA, a base that is
# quantised, projections of VeRA, factors that PiSSA has begun with.
METHODS = {
    "lora": ["peft=lora"],
    "full": ["peft=full"],
    "adalora": ["peft=adalora", "peft.total_steps=4"],
    "nf4": ["peft=lora", "quant=nf4"],
    "pissa": ["peft=pissa"],
    "vera": ["peft=vera"],
    "freeze": ["peft=freeze"],
}


@pytest.mark.parametrize("method", METHODS)
def test_a_step_converts_to_what_the_run_exports_at_its_end(method: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    chosen = [one for one in METHODS[method] if not one.startswith("peft.total")]
    with assembled(settings(run, *chosen, "checkpoint.every=2", "checkpoint.keep=9")) as it:
        it.finish()
    (exported,) = [path for path in (run / "adapter", run / "model") if path.is_dir()]
    assert convert(run, tmp_path / "last") == 0
    assert same_weights(tmp_path / "last", exported)
    names = {path.name for path in exported.iterdir()}
    assert {path.name for path in (tmp_path / "last").iterdir()} == names
    assert convert(step_folder(run, 2), tmp_path / "middle") == 0
    assert not same_weights(tmp_path / "middle", exported)


def test_the_best_step_converts_to_the_best_export(tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ["train.eval_every=1", "checkpoint.every=1", "checkpoint.keep=9"]
    with assembled(settings(run, held_out(tmp_path, rows=2), *more)) as it:
        it.trainer.evaluator = Scripted([9, 3, 5, 6])
        it.finish()
    assert convert(run, tmp_path / "best", "export=best") == 0
    assert same_weights(tmp_path / "best", run / "best-adapter")
    assert not same_weights(tmp_path / "best", run / "adapter")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of LoRA on a base of its own, that has ended."""
    folder = tmp_path_factory.mktemp("trained")
    base = folder / "base"
    shutil.copytree(resolve_path("dtune://tiny"), base)
    with assembled(settings(folder / "run", f"model.path={base}", "peft.rank=4")) as it:
        it.finish()
    return folder / "run"


def test_an_adapter_becomes_a_run_that_goes_on_from_it(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, straight, back = tmp_path / "run", tmp_path / "straight", tmp_path / "back"
    adapter = trained / "adapter"
    # Base, rank, alpha and targets come from the adapter's own config.
    only = [one for one in settings(run) if not one.startswith("run_dir=")]
    assert convert(adapter, run, *only) == 0
    command = shlex.split(capsys.readouterr().out.partition("to go on: ")[2])
    assert command[:4] == ["dtune", "train", f"run_dir={run}", "resume=auto"]
    assert convert(run, back) == 0
    assert same_weights(back, adapter)
    base = f"model.path={trained.parent / 'base'}"
    chosen = [base, "peft.rank=4", "peft.targets=[all-linear]"]
    with assembled(settings(straight, *chosen, f"peft.init_from={adapter}")) as it:
        it.finish()
    with assembled(command[2:]) as it:
        it.finish()
    assert metrics(run, "train") == metrics(straight, "train")
    assert same_weights(run / "adapter", straight / "adapter")


def test_an_adapter_of_peft_becomes_a_run(tmp_path: Path) -> None:
    adapter, run = tmp_path / "adapter", tmp_path / "run"
    save_adapter(
        adapter, LoraConfig(r=8, lora_alpha=12, target_modules=["q_proj", "v_proj"], use_dora=True)
    )
    only = [one for one in settings(run) if not one.startswith("run_dir=")]
    assert convert(adapter, run, *only) == 0
    stored = whole_tensors(step_folder(run, 0))
    masters = {name: values for name, values in stored.items() if name.startswith("param/")}
    theirs = load_file(adapter / "adapter_model.safetensors")
    assert len(masters) == len(theirs)
    for name, values in masters.items():
        key = "base_model.model." + name.removeprefix("param/")
        key += "" if key.endswith("magnitude_vector") else ".weight"
        assert torch.equal(values, theirs[key].reshape(-1).float()), name
    assert not any(values.any() for name, values in stored.items() if name not in masters)


def test_a_model_becomes_a_run_that_goes_on_from_it(tmp_path: Path) -> None:
    model, run, straight = (tmp_path / name for name in ("model", "run", "straight"))
    shutil.copytree(resolve_path("dtune://tiny"), model)
    only = [one for one in settings(run) if not one.startswith("run_dir=")]
    assert convert(model, run, *only) == 0
    chosen = [f"model.path={model}", "peft=full"]
    with assembled(settings(run, *chosen, "resume=auto")) as it:
        it.finish()
    with assembled(settings(straight, *chosen)) as it:
        it.finish()
        rows = untimed(it.memory.rows, "train")
    assert metrics(run, "train") == rows
    assert same_weights(run / "model", straight / "model")
    assert convert(run, tmp_path / "back") == 0
    assert same_weights(tmp_path / "back", run / "model")


def test_a_base_that_has_moved_is_named_and_another_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, base = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(trained, run)
    shutil.copytree(trained.parent / "base", base)
    config = run / "config.yaml"
    there = config.read_text(encoding="utf-8").replace("/base", "/gone")
    config.write_text(there, encoding="utf-8")
    assert convert(run, tmp_path / "out") == 2
    capsys.readouterr()
    assert convert(run, tmp_path / "out", f"model.path={base}") == 0
    assert same_weights(tmp_path / "out", run / "adapter")
    with assembled(settings(tmp_path / "other", "peft=full", "train.max_steps=1")) as it:
        it.finish()
    capsys.readouterr()
    more = f"model.path={tmp_path / 'other' / 'model'}"
    assert convert(run, tmp_path / "wrong", more) == 2
    assert "is of another base" in capsys.readouterr().err
    assert convert(run, tmp_path / "wrong", f"model.path={base}", "peft.rank=8") == 2
    assert "is of another model or other peft settings" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()


def make(folder: Path, what: str, trained: Path) -> Path:
    """A folder that cannot be converted."""
    if what == "file":
        folder.write_text("no folder")
        return folder
    if what == "absent":
        return folder
    folder.mkdir()
    names = {
        "config alone": "config.json",
        "config of an adapter alone": "adapter_config.json",
        "unpublished": "manifest.json",
        "of ranks of DeepSpeed": "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "of torch": "__0_0.distcp",
        "weights of another kind": "pytorch_model.bin",
    }
    if what in names:
        (folder / names[what]).write_text("{}")
    elif what == "run without a checkpoint":
        shutil.copy(trained / "config.yaml", folder)
        (folder / "checkpoints").mkdir()
    elif what == "step alone":
        shutil.copytree(step_folder(trained, 4), folder / "x" / "y" / "step-00000004")
        return folder / "x" / "y" / "step-00000004"
    elif what in ("damaged", "incomplete"):
        shutil.copytree(trained, folder, dirs_exist_ok=True)
        file = step_folder(folder, 4) / "rank-00000.safetensors"
        if what == "incomplete":
            file.unlink()
        else:
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
    return folder


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("absent", "there is no such folder"),
        ("file", "is a file; name the folder"),
        ("empty", "is no checkpoint: there is no run"),
        ("weights of another kind", "is no checkpoint: there is no run"),
        ("config alone", "no weights as safetensors"),
        ("config of an adapter alone", "has no adapter_model.safetensors"),
        ("unpublished", "was never published"),
        ("of ranks of DeepSpeed", "python -m deepspeed.checkpoint.ds_to_universal"),
        ("of torch", "torch.distributed.checkpoint"),
        ("run without a checkpoint", "has no checkpoint yet"),
        ("step alone", "has no config.yaml"),
        ("damaged", "its hash does not fit"),
        ("incomplete", "rank-00000.safetensors is missing"),
    ],
)
def test_what_cannot_be_converted_is_refused(
    what: str, said: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make(tmp_path / "source", what, trained)
    assert convert(source, tmp_path / "out") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_target_that_holds_something_is_left_alone(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "empty"
    full.mkdir()
    (full / "mine").write_text("mine")
    file.write_text("mine")
    for out in (full, file):
        assert convert(trained, out) == 2
        assert "exists and is not empty; name another folder" in capsys.readouterr().err
    assert ((full / "mine").read_text(), file.read_text()) == ("mine", "mine")
    empty.mkdir()
    assert convert(trained, empty) == 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["to=x"], "from names a folder"),
        (["from=x"], "to names a folder"),
        (["from={run}", "to=x", "export=first"], "export=first is not one of last, best"),
        (["from={run}", "to=x", "export=best"], "has no best step"),
        (["from={run}/adapter", "to=x", "export=best"], "chooses a step of a run"),
        (["from={run}", "to=x", "step=3"], "step=3 is for universal checkpoints"),
        (["from={run}", "to=x", "run_dir=y"], "reads from=PATH and writes to=PATH only"),
        (["from={run}", "to=x", "peft=full"], "the config of a run is frozen"),
        (["from={run}", "to=x", "launch.nproc=2"], "runs in one process"),
        (["from={run}", "to=x", "form=y"], "unknown key form"),
        (["from={run}/adapter", "to=x", "peft=full"], "adapter"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    argv: list[str], said: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [one.format(run=trained).replace("to=x", f"to={tmp_path / 'x'}") for one in argv]
    assert main(["convert", *given]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_help_and_wrong_paths_need_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from dtune.cli import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    for argv, code, said in (
        (["--help"], 0, "from="),
        ([f"from={tmp_path / 'gone'}", f"to={tmp_path / 'x'}"], 2, "there is no such folder"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, "convert", *argv],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert said in done.stdout + done.stderr
