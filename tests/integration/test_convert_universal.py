"""A run of DeepSpeed itself goes on in dtune, from its universal checkpoint."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dtune.checkpoint.universal import open_universal, plain_name
from dtune.cli import main
from dtune.errors import ConfigError
from tests.distributed.moving import small_model, whole_tensors
from tests.distributed.pool import Pool
from tests.integration.train_runs import metrics

pytestmark = pytest.mark.slow

SAVED, TOTAL = 4, 14
RAW = "tests.distributed.raw_deepspeed:train"
TRAIN = "tests.integration.runs:train"
# As between engines: a few roundings of fp32 of a loss of about 7, carried on ten times.
LOSS_LIMIT = 1e-5
METHODS: dict[str, tuple[list[str], dict[str, Any] | None]] = {
    "full": (["peft=full", "data.packing=false"], None),
    "lora": (
        ["peft=lora", "peft.rank=8", "peft.alpha=16"],
        {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    ),
}


@dataclass(frozen=True)
class Raw:
    """A run of DeepSpeed."""

    folder: Path
    """With ``latest_universal`` in it."""
    settings: list[str]
    """Of the same run in dtune, but for its folder and engine."""
    losses: list[float]

    @property
    def universal(self) -> Path:
        return self.folder / f"global_step{SAVED}_universal"


def train_raw(method: str, two_ranks: Pool, folder: Path) -> Raw:
    """ZeRO-3 on two processes, saved in the middle, and made universal by DeepSpeed's own tool."""
    model = small_model(folder / "model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).save_pretrained(model)
    chosen, lora = METHODS[method]
    settings = [
        f"model.path={model}",
        *chosen,
        "precision=fp32",
        "schedule=constant",
        "optim.lr=1e-3",
        "optim.weight_decay=0",
        f"train.max_steps={TOTAL}",
        "train.micro_batch_size=3",
        "train.global_batch_size=6",
        "data.eval_path=none",
        "data.max_rows=64",
        "data.max_length=96",
        "evaluate.generate=false",
        "evaluate.before=false",
        "log.every=1",
        "log.progress=lines",
    ]
    saved = folder / "deepspeed"
    answers = two_ranks.run(RAW, settings=settings, stage=3, saved=SAVED, folder=saved, lora=lora)
    step = saved / f"global_step{SAVED}"
    tool = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    places = ["--input_folder", str(step), "--output_folder", f"{step}_universal"]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    subprocess.run(
        [*tool, *places, *workers],
        check=True,
        capture_output=True,
        timeout=300,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )
    assert answers[0] == answers[1]
    return Raw(saved, settings, answers[0])


@pytest.fixture(scope="module")
def raw(two_ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> Raw:
    """A whole model that is trained."""
    return train_raw("full", two_ranks, tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def raw_lora(two_ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> Raw:
    """A LoRA of peft."""
    return train_raw("lora", two_ranks, tmp_path_factory.mktemp("lora"))


def convert(source: Path, out: Path, *settings: str) -> int:
    return main(["convert", f"from={source}", f"to={out}", *settings])


def goes_on(raw: Raw, run: Path, pool: Pool, engine: str) -> None:
    """Each of the losses to come is that of the run that DeepSpeed has not stopped."""
    again = run.with_name(f"{engine}-{pool.size}")
    more = [f"run_dir={again}", f"parallel={engine}", f"resume={run}"]
    assert set(pool.run(TRAIN, overrides=[*raw.settings, *more])) == {"done"}
    rows = metrics(again, "train")
    assert [row["step"] for row in rows] == list(range(SAVED + 1, TOTAL + 1))
    pairs = zip(rows, raw.losses[SAVED:], strict=True)
    differences = [abs(float(row["loss"]) - expected) for row, expected in pairs]
    assert max(differences) <= LOSS_LIMIT, (engine, pool.size, differences)


@pytest.mark.parametrize("method", METHODS)
def test_dtune_goes_on_where_deepspeed_has_stopped(
    method: str,
    request: pytest.FixtureRequest,
    one_rank: Pool,
    two_ranks: Pool,
    tmp_path: Path,
) -> None:
    raw: Raw = request.getfixturevalue("raw" if method == "full" else "raw_lora")
    run = tmp_path / "run"
    assert convert(raw.folder, run, *raw.settings) == 0
    stored = whole_tensors(run / "checkpoints" / f"step-{SAVED:08d}")
    states = {"fp32": "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
    flat = {
        (state, plain_name(rest)): values
        for name, values in stored.items()
        for state, _, rest in [name.partition("/")]
    }
    parameters = [path for path in (raw.universal / "zero").iterdir() if path.is_dir()]
    assert len(flat) == len(stored) == 3 * len(parameters)
    for parameter in parameters:
        for key, state in states.items():
            theirs = torch.load(parameter / f"{key}.pt")
            assert torch.equal(flat[state, plain_name(parameter.name)], theirs)
    goes_on(raw, run, one_rank, "fsdp")
    if method == "full":
        goes_on(raw, run, two_ranks, "fsdp")
        goes_on(raw, run, two_ranks, "zero2")


def test_without_the_moments_the_losses_are_others(
    raw: Raw, one_rank: Pool, tmp_path: Path
) -> None:
    """The comparison above can fail: it tells a state apart whose first moments are lost."""
    spoiled = tmp_path / "spoiled"
    shutil.copytree(raw.universal, spoiled)
    for path in spoiled.glob("zero/*/exp_avg.pt"):
        torch.save(torch.zeros_like(torch.load(path)), path)
    run = tmp_path / "run"
    assert convert(spoiled, run, *raw.settings) == 0
    overrides = [*raw.settings, f"run_dir={run}", "parallel=fsdp", "resume=auto"]
    one_rank.run(TRAIN, overrides=overrides)
    losses = [float(row["loss"]) for row in metrics(run, "train")]
    worst = max(abs(a - b) for a, b in zip(losses, raw.losses[SAVED:], strict=True))
    assert worst > 10 * LOSS_LIMIT


def test_what_the_tool_writes_of_stages_1_and_2_is_read_as_well(raw: Raw, tmp_path: Path) -> None:
    """There a file holds a mapping, with the tensor in its shape, and a count of steps beside."""
    other, runs = tmp_path / "other", [tmp_path / "flat", tmp_path / "shaped"]
    shutil.copytree(raw.universal, other)
    state = torch.load(next(other.glob("*model_states.pt")))
    shapes = {name: shape for group in state["param_shapes"] for name, shape in group.items()}
    for path in other.glob("zero/*/*.pt"):
        values = torch.load(path).view(shapes[path.parent.name])
        torch.save({"param": values, "cat_dim": 0}, path)
        torch.save(torch.tensor(float(SAVED)), path.with_name("step.pt"))
    for source, run in zip((raw.universal, other), runs, strict=True):
        assert convert(source, run, *raw.settings) == 0
    flat, shaped = (whole_tensors(run / "checkpoints" / f"step-{SAVED:08d}") for run in runs)
    assert flat.keys() == shaped.keys()
    assert all(torch.equal(flat[name], shaped[name]) for name in flat)


class _Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self._path),)


@pytest.mark.parametrize(
    ("where", "form"),
    [
        ("zero/*/fp32.pt", "torch.save"),
        ("zero/*/exp_avg_sq.pt", "torch.save"),
        ("*model_states.pt", "torch.save"),
        ("zero/*/fp32.pt", "plain pickle"),
        ("zero/*/fp32.pt", "old torch.save"),
    ],
)
def test_a_crafted_file_is_refused_and_runs_nothing(
    raw: Raw, where: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crafted, canary = tmp_path / "crafted", tmp_path / "canary"
    shutil.copytree(raw.universal, crafted)
    for path in crafted.glob(where):
        if form == "plain pickle":
            path.write_bytes(pickle.dumps(_Canary(canary)))
        else:
            torch.save(_Canary(canary), path, _use_new_zipfile_serialization=form == "torch.save")
    assert convert(crafted, tmp_path / "run", *raw.settings) == 2
    assert str(crafted) in capsys.readouterr().err
    assert not canary.exists()
    assert not (tmp_path / "run").exists()
    # It is a canary: whoever unpickles freely lets it go.
    if form == "torch.save":
        torch.load(path, weights_only=False)
        assert canary.exists()


def spoil(raw: Raw, folder: Path, harm: str) -> Path:
    shutil.copytree(raw.universal, folder)
    first = sorted(path for path in (folder / "zero").iterdir() if path.is_dir())[0]
    if harm == "no moment":
        (first / "exp_avg.pt").unlink()
    elif harm == "no parameter":
        shutil.rmtree(first)
    elif harm == "another parameter":
        first.rename(first.with_name("lm_head.weight"))
    elif harm == "cut short":
        data = (first / "fp32.pt").read_bytes()
        (first / "fp32.pt").write_bytes(data[: len(data) // 2])
    elif harm == "another size":
        torch.save(torch.zeros(7), first / "fp32.pt")
    elif harm == "no steps":
        for path in folder.glob("*model_states.pt"):
            path.unlink()
    elif harm == "no zero":
        shutil.rmtree(folder / "zero")
    return folder


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("no moment", "exp_avg.pt is missing: the checkpoint is incomplete"),
        ("no parameter", "1 missing, 0 too many"),
        ("another parameter", "it has lm_head.weight"),
        ("cut short", "cannot be read as a file of torch.save"),
        ("another size", "7 elements, the run's model wants"),
        ("no steps", "give them with step=N"),
        ("no zero", "there is no run"),
    ],
)
def test_what_is_not_whole_is_refused(
    raw: Raw, harm: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = spoil(raw, tmp_path / "spoiled", harm)
    assert convert(folder, tmp_path / "run", *raw.settings) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_another_run_is_refused(
    raw: Raw, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [setting for setting in raw.settings if setting != "peft=full"]
    for more, said in (
        (["peft=lora"], "is of another model or method"),
        (["peft=full", "optim=sgd"], "a universal checkpoint is read with the state of AdamW"),
        (["peft=full", f"train.max_steps={SAVED - 1}"], f"the run ends at step {SAVED - 1}"),
    ):
        assert convert(raw.folder, tmp_path / "run", *settings, *more) == 2
        assert said in capsys.readouterr().err
    assert convert(raw.universal.with_name(f"global_step{SAVED}"), tmp_path / "run") == 2
    assert "ds_to_universal" in capsys.readouterr().err


def test_steps_are_given_where_the_files_do_not_tell(
    raw: Raw, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = spoil(raw, tmp_path / "spoiled", "no steps")
    assert open_universal(folder, steps=9).steps == 9
    assert convert(raw.folder, tmp_path / "run", *raw.settings, "train.global_batch_size=12") == 0
    assert f"has taken {6 * SAVED} sequences in {SAVED} steps" in capsys.readouterr().err


def test_names_of_wrappers_do_not_matter() -> None:
    assert plain_name("base_model.model.model.x.lora_A.default.weight") == "model.x.lora_A"
    assert plain_name("module.model.x.weight") == plain_name("model.x.weight")
    assert plain_name("base_model.model.x.lora_magnitude_vector.default.weight") == plain_name(
        "x.lora_magnitude_vector"
    )
    assert plain_name("model.default_head.weight") == "model.default_head.weight"


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "..", ""])
def test_latest_names_a_folder_beside_it(name: str, tmp_path: Path) -> None:
    (tmp_path / "latest_universal").write_text(name)
    with pytest.raises(ConfigError, match="no folder beside it"):
        open_universal(tmp_path)
