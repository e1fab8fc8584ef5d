"""``dtune verify``: what is damaged is named, and a resume that is not exact is told apart."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dtune_launch.spec import JobSpec
from safetensors.torch import load_file, save_file

from dtune.checkpoint.layout import dump_json, hash_bytes
from dtune.checkpoint.reader import CHECKPOINTS
from dtune.cli import main
from dtune.commands import verify_proof
from dtune.config.freeze import read_frozen
from dtune.runtime.world import World
from dtune.worker import run_worker
from tests.integration.train_runs import assembled, settings

STEP = "step-00000004"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps that has ended, saved at 2 and at 4."""
    run_dir = tmp_path_factory.mktemp("verify") / "run"
    with assembled(settings(run_dir, "checkpoint.every=2", "peft.dropout=0.1")) as it:
        it.finish()
    return run_dir


@pytest.fixture
def run_dir(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def reseal(step: Path, name: str) -> None:
    """Let the manifest vouch for a file that has been changed."""
    data = (step / name).read_bytes()
    body = json.loads((step / "manifest.json").read_bytes())["body"]
    body["files"][name] = {"size": len(data), "digest": hash_bytes(data)}
    outer = {"body": body, "checksum": hash_bytes(dump_json(body))}
    (step / "manifest.json").write_bytes(dump_json(outer))


def test_a_whole_run_is_good(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(whole)]) == 0
    said = capsys.readouterr().out
    for part in ("step-00000002  good", f"{STEP}  good", "adapter", "all good", f"on from {STEP}"):
        assert part in said, said
    assert main(["verify", f"run_dir={whole}"]) == 0


def flip(run_dir: Path) -> None:
    file = run_dir / CHECKPOINTS / STEP / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def lose_random_numbers(run_dir: Path) -> None:
    step = run_dir / CHECKPOINTS / STEP
    name = "rng/rank-00000.safetensors"
    states = load_file(step / name)
    del states["numpy"]
    save_file(states, step / name)
    reseal(step, name)


def put_value(value: float) -> Callable[[Path], None]:
    def put(run_dir: Path) -> None:
        step = run_dir / CHECKPOINTS / STEP
        file = step / "rank-00000.safetensors"
        ranges = load_file(file)
        name = next(name for name in sorted(ranges) if name.startswith("param/"))
        ranges[name][3] = value
        save_file(ranges, file)
        reseal(step, file.name)

    return put


def shorten_index(run_dir: Path) -> None:
    step = run_dir / CHECKPOINTS / STEP
    index = json.loads((step / "index.json").read_bytes())
    name = next(name for name in sorted(index) if name.startswith("param/"))
    index[name]["shape"] = [1, *index[name]["shape"]]
    (step / "index.json").write_bytes(dump_json(index))
    reseal(step, "index.json")


def lose_the_best(run_dir: Path) -> None:
    (run_dir / CHECKPOINTS / "BEST").write_text("step-00000009\n")


def cut_the_export(run_dir: Path) -> None:
    file = run_dir / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def spoil_the_export(run_dir: Path) -> None:
    file = run_dir / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = math.inf
    save_file(tensors, file)


def break_the_config(run_dir: Path) -> None:
    file = run_dir / "config.yaml"
    file.write_text(file.read_text() + "colour: red\n")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (flip, ("rank-00000.safetensors is damaged: its hash", "on from step-00000002")),
        (lose_random_numbers, ("rng/rank-00000.safetensors lacks numpy",)),
        (put_value(math.nan), ("param/", "not finite: 1 NaN")),
        (put_value(-math.inf), ("param/", "not finite: 1 inf")),
        (shorten_index, ("in the index and",)),
        (lose_the_best, ("BEST names 'step-00000009', which is not there",)),
        (cut_the_export, ("adapter_model.safetensors is not readable",)),
        (spoil_the_export, ("not finite: 1 inf",)),
        (break_the_config, ("unknown key colour",)),
    ],
)
def test_each_damage_is_named(
    run_dir: Path,
    capsys: pytest.CaptureFixture[str],
    harm: Callable[[Path], None],
    said: tuple[str, ...],
) -> None:
    harm(run_dir)
    assert main(["verify", str(run_dir)]) == 1
    out = capsys.readouterr().out
    for part in said:
        assert part in out, out
    assert "damaged: " in out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("step-00000009\n", "LATEST names 'step-00000009'"),
        ("step-00000002\n", "LATEST names 'step-00000002'"),
        ("", "LATEST names no step"),
    ],
)
def test_a_latest_that_is_behind_is_noted_and_no_damage(
    run_dir: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    (run_dir / CHECKPOINTS / "LATEST").write_text(text)
    assert main(["verify", str(run_dir)]) == 0
    out = capsys.readouterr().out
    for part in (f"{said}, and the newest is {STEP}", f"goes on from {STEP}", "all good"):
        assert part in out, out


def test_what_is_set_aside_is_noted_and_no_damage(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = run_dir / CHECKPOINTS
    shutil.copytree(checkpoints / STEP, checkpoints / f"{STEP}.superseded-ab")
    (checkpoints / STEP / "notes.txt").write_text("mine")
    (run_dir / "adapter" / "old.bin").write_bytes(b"")
    assert main(["verify", str(run_dir)]) == 0
    out = capsys.readouterr().out
    for part in ("set aside; nothing reads it", "notes.txt is no part", "old.bin may hold code"):
        assert part in out, out


@pytest.mark.parametrize("what", ["absent", "empty", "other"])
def test_a_folder_that_is_no_run_is_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    if what != "absent":
        (tmp_path / what).mkdir()
    if what == "other":
        (tmp_path / what / "thesis.tex").write_text("")
    assert main(["verify", str(tmp_path / what)]) == 2
    assert str(tmp_path / what) in capsys.readouterr().err


@pytest.mark.parametrize("steps", ["3", "0", "many"])
def test_a_proof_takes_an_even_number_of_steps(
    whole: Path, capsys: pytest.CaptureFixture[str], steps: str
) -> None:
    assert main(["verify", str(whole), "--resume-proof", f"steps={steps}"]) == 2
    assert steps in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_resume_is_proven_exact_in_processes_of_its_own(
    run_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in run_dir.parent.iterdir())
    assert main(["verify", str(run_dir), "--resume-proof", "steps=4"]) == 0
    assert "verdict: resumed equals uninterrupted, bit for bit" in capfd.readouterr().out
    assert sorted(path.name for path in run_dir.parent.iterdir()) == before


def train_here(job: JobSpec) -> int:
    """A run of the proof without the seconds that a process needs to start."""
    return run_worker(read_frozen(str(job.run_dir)), World.start())


def test_a_resume_that_is_not_exact_is_told(
    run_dir: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget_random_numbers(middle: Path, target: Path) -> None:
        """A checkpoint whose generators are not those of the run: dropout differs after it."""
        shutil.copytree(middle, target)
        name = "rng/rank-00000.safetensors"
        states = load_file(target / name)
        states["torch"] = torch.Generator().manual_seed(99).get_state()
        save_file(states, target / name)
        reseal(target, name)

    monkeypatch.setattr(verify_proof, "run_job", train_here)
    assert main(["verify", str(run_dir), "--resume-proof", "steps=4"]) == 0
    monkeypatch.setattr(verify_proof, "copy_checkpoint", forget_random_numbers)
    assert main(["verify", str(run_dir), "--resume-proof", "steps=4"]) == 1
    out = capfd.readouterr().out
    assert "verdict: resumed differs from uninterrupted" in out
    assert "step 3: loss is" in out
    assert "Two runs from that checkpoint are equal: what differs is not saved" in out
