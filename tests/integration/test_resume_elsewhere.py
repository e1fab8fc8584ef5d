"""Going on in another folder, from an earlier step, or with settings that have changed."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dtune.checkpoint.reader import CHECKPOINTS, find_checkpoint, open_checkpoint
from dtune.cli import main
from dtune.errors import ConfigError
from dtune.resources import resolve_path
from dtune.runtime.status import State, read_status
from dtune.train.finish import Result, finish_run
from dtune.train.sinks.base import Row
from dtune.train.sinks.jsonl import read_metrics
from tests.integration.train_runs import (
    Scripted,
    assembled,
    held_out,
    kept,
    metrics,
    pointer,
    read_json,
    settings,
)


def overrides(folder: Path, name: str, *more: str) -> list[str]:
    """A run of 6 steps that is evaluated and saved after each."""
    return settings(
        folder / name,
        held_out(folder, rows=2),
        "train.max_steps=6",
        "train.eval_every=1",
        "checkpoint.every=1",
        "checkpoint.keep=2",
        *more,
    )


def finish(argv: list[str], losses: Sequence[float]) -> Result:
    with assembled(argv) as it:
        it.trainer.evaluator = Scripted(losses)
        state, result = it.finish()
        assert state is State.done
    return result


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has ended; its best is step 3."""
    folder = tmp_path_factory.mktemp("old")
    finish(overrides(folder, "old", "checkpoint.keep=9"), [9, 8, 3, 5, 6, 7])
    return folder / "old"


@pytest.fixture
def copied(old: Path, tmp_path: Path) -> Path:
    """A copy of that run in a folder ``run`` of its own."""
    return Path(shutil.copytree(old, tmp_path / "run"))


@pytest.fixture(autouse=True)
def _warnings_reach_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("dtune"), "propagate", True)


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / CHECKPOINTS / f"step-{step:08d}"


def test_a_run_from_elsewhere_is_saved_before_its_first_step(old: Path, tmp_path: Path) -> None:
    argv = overrides(tmp_path, "new", f"resume={step_folder(old, 4)}")
    with assembled(argv) as it:
        it.trainer.stop.signal_name = "SIGUSR1"
        assert it.finish()[0] is State.preempted
    assert kept(tmp_path / "new") == [4]
    # Requeued with the same settings it goes on where it was, and not from the other run again.
    with assembled(argv) as it:
        it.trainer.evaluator = Scripted([9, 9])
        it.trainer.advance(5, it.trainer.loader.batches(4))
        it.trainer.save()
    with assembled(argv) as it:
        assert it.trainer.progress.step == 5


def test_a_best_step_that_lies_elsewhere_is_best_no_longer(old: Path, tmp_path: Path) -> None:
    argv = overrides(tmp_path, "new", f"resume={step_folder(old, 4)}")
    result = finish(argv, [4.5, 4.6])
    assert (result.best_step, result.best_export) == (5, str(tmp_path / "new" / "best-adapter"))
    assert pointer(tmp_path / "new", "BEST") == 5
    assert kept(tmp_path / "new") == [5, 6]


def test_a_best_step_that_is_gone_on_from_stays_the_best(old: Path, tmp_path: Path) -> None:
    argv = overrides(tmp_path, "new", f"resume={step_folder(old, 3)}", "checkpoint.keep=1")
    result = finish(argv, [4, 4, 4])
    assert (result.best_step, pointer(tmp_path / "new", "BEST")) == (3, 3)
    assert kept(tmp_path / "new") == [3, 6]
    best = load_file(Path(result.best_export) / "adapter_model.safetensors")
    before = load_file(old / "best-adapter" / "adapter_model.safetensors")
    assert all(torch.equal(best[name], before[name]) for name in before)


def test_a_run_that_goes_back_saves_and_exports_what_it_does_then(copied: Path) -> None:
    before = load_file(copied / "adapter" / "adapter_model.safetensors")
    argv = overrides(copied.parent, "run", f"resume={step_folder(copied, 2)}", "optim.lr=1e-3")
    result = finish(argv, [4, 5, 6, 7])
    # Of the first attempt: steps 1 and 2, of which 2 was its best, and those set aside.
    assert (result.best_step, pointer(copied, "BEST"), pointer(copied, "LATEST")) == (3, 3, 6)
    assert kept(copied) == [3, 5, 6]
    aside = [path for path in (copied / CHECKPOINTS).iterdir() if ".superseded-" in path.name]
    assert {path.name.partition(".")[0] for path in aside} == {
        f"step-{step:08d}" for step in (3, 4, 5, 6)
    }
    after = load_file(copied / "adapter" / "adapter_model.safetensors")
    assert not any(torch.equal(after[name], before[name]) for name in before)
    rates = {row["lr"] for row in metrics(copied, "train")}
    assert len(rates) == 6
    assert open_checkpoint(step_folder(copied, 6)).extra["last_evaluation"] == {"loss": 7}


@pytest.mark.parametrize("harm", ["missing", "damaged"])
def test_a_best_that_is_not_whole_does_not_fail_a_run_that_ends(
    old: Path, tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    argv = overrides(tmp_path, "new", f"resume={step_folder(old, 4)}")
    with assembled(argv) as it:
        it.trainer.evaluator = Scripted([4, 5])
        assert it.trainer.fit(evaluate_before=False) is State.done
        best = step_folder(tmp_path / "new", 5)
        if harm == "missing":
            shutil.rmtree(best)
        else:
            file = best / "rank-00000.safetensors"
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
        result = finish_run(it.trainer, State.done, it.exporter, title="test")
    assert (result.export, result.best_export) == (str(tmp_path / "new" / "adapter"), "")
    assert "best step is not exported" in caplog.text


def test_another_engine_than_that_of_the_checkpoint_is_told_of(
    copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with assembled(overrides(copied.parent, "run", "resume=auto")):
        assert "going on from" in caplog.text
        assert "it was saved by" not in caplog.text
    with assembled(overrides(copied.parent, "run", "resume=auto", "parallel=ddp")):
        expected = "saved by 1 ranks under parallel=single; they are 1 under parallel=ddp now"
        assert expected in caplog.text


def test_weights_of_an_earlier_end_go_when_the_run_goes_on(copied: Path) -> None:
    assert (copied / "best-adapter").is_dir()
    # At its end there is nothing to go on with: what is there stays.
    with assembled(overrides(copied.parent, "run", "resume=auto")):
        assert (copied / "adapter").is_dir()
    with assembled(overrides(copied.parent, "run", "resume=auto", "train.max_steps=8")):
        assert not (copied / "adapter").exists()
        assert not (copied / "best-adapter").exists()


def test_rows_of_an_attempt_that_never_saved_are_kept_apart(tmp_path: Path) -> None:
    class Die:
        def write(self, row: Row) -> None:
            if row["step"] == 3:
                raise KeyboardInterrupt

        def close(self) -> None:
            """Nothing is held."""

    argv = settings(tmp_path / "run")
    with assembled(argv) as it:
        it.trainer.sinks = [*it.trainer.sinks, Die()]
        with pytest.raises(KeyboardInterrupt):
            it.trainer.fit(evaluate_before=False)
    with assembled([*argv, "resume=auto"]) as it:
        it.finish()
    steps = [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4]
    assert len(read_metrics(tmp_path / "run" / "metrics.1.jsonl")) == 3


def test_fewer_steps_than_are_done_are_refused(copied: Path) -> None:
    argv = overrides(copied.parent, "run", "resume=auto")
    with (
        pytest.raises(ConfigError, match=r"step 6, and train\.max_steps=5 ends the run at step 5"),
        assembled([*argv, "train.max_steps=5"]),
    ):
        pass
    with (
        pytest.raises(ConfigError, match=r"train\.epochs=0\.1 ends"),
        assembled([*argv, "train.max_steps=0", "train.epochs=0.1"]),
    ):
        pass


def test_more_epochs_after_a_part_empty_step_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    argv = settings(tmp_path / "run", "train.max_steps=0", "data.max_rows=6", "data.packing=false")
    with assembled([*argv, "train.epochs=1"]) as it:
        assert it.finish()[1].steps == 2  # 6 rows in steps of 4
    with assembled([*argv, "train.epochs=1", "resume=auto"]):
        assert "left out" not in caplog.text
    with assembled([*argv, "train.epochs=2", "resume=auto"]):
        assert "the 2 sequences that would fill it are left out" in caplog.text


def test_a_base_that_has_moved_is_the_same_and_another_is_not(tmp_path: Path) -> None:
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    for folder in (one, two, other):
        shutil.copytree(resolve_path("dtune://tiny"), folder)
    # Another fine-tune of the same shapes.
    weights = load_file(other / "model.safetensors")
    changed = {name: tensor * 1.01 for name, tensor in weights.items()}
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    argv = settings(tmp_path / "run", "train.max_steps=1")
    with assembled([*argv, f"model.path={one}"]) as it:
        it.finish()
    with assembled([*argv, f"model.path={two}", "resume=auto"]) as it:
        assert it.trainer.progress.step == 1
    refused = [[f"model.path={other}"], [f"model.path={one}", "model.init=random"]]
    for more in refused:
        with (
            pytest.raises(ConfigError, match=r"model was 'llama, config\.json .*, weights "),
            assembled([*argv, *more, "resume=auto"]),
        ):
            pass


@pytest.mark.parametrize(("packing", "refused"), [("true", True), ("false", False)])
def test_another_length_is_another_run_where_rows_are_packed(
    tmp_path: Path, packing: str, refused: bool
) -> None:
    argv = settings(
        tmp_path / "run", "train.max_steps=1", "data.max_rows=20", f"data.packing={packing}"
    )
    with assembled([*argv, "data.max_length=200"]) as it:
        it.finish()
    longer = [*argv, "data.max_length=256", "resume=auto"]
    if refused:
        with pytest.raises(ConfigError, match=r"data\.max_length was 200"), assembled(longer):
            pass
    else:
        with assembled(longer) as it:
            assert it.trainer.progress.step == 1


def test_the_best_can_be_evaluated(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = {}
    for export, folder in (("last", "adapter"), ("best", "best-adapter")):
        assert main(["eval", f"run_dir={copied}", f"export={export}"]) == 0
        scores = read_json(copied / "eval.json")
        assert scores["weights"] == str(copied / folder)
        losses[export] = scores["loss"]
    assert losses["last"] != losses["best"]
    assert main(["eval", f"run_dir={copied}"]) == 0
    assert read_json(copied / "eval.json")["loss"] == losses["last"]
    # A best that is the last is exported once.
    shutil.rmtree(copied / "best-adapter")
    assert main(["eval", f"run_dir={copied}", "export=best"]) == 2
    result = read_json(copied / "result.json")
    (copied / "result.json").write_text(json.dumps({**result, "best_step": result["steps"]}))
    assert main(["eval", f"run_dir={copied}", "export=best"]) == 0
    assert read_json(copied / "eval.json")["loss"] == losses["last"]
    capsys.readouterr()
    for argv, said in (
        ([f"run_dir={copied}", "export=first"], "export=first is not one of last, best"),
        (["export=best", "model=tiny"], "set run_dir as well"),
    ):
        assert main(["eval", *argv]) == 2
        assert said in capsys.readouterr().err


def test_checkpoints_of_a_copied_run_are_its_own(copied: Path) -> None:
    with assembled(overrides(copied.parent, "run", "resume=auto")) as it:
        assert it.trainer.saved_step == 6
        found = find_checkpoint(copied, "auto", it.trainer.world)
        assert found is not None
        assert found.path == step_folder(copied, 6)


@pytest.mark.parametrize(
    ("resume", "more"), [("a step", []), ("a run", []), ("a run", ["peft.rank=4"])]
)
def test_a_checkpoint_that_does_not_fit_ends_with_exit_code_2(
    resume: str, more: list[str], copied: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    old, steps = copied, sorted((copied / CHECKPOINTS).glob("step-*"))
    if not more:
        for step in steps:
            (step / "rank-00000.safetensors").unlink()
    path = steps[-1] if resume == "a step" else old
    argv = overrides(tmp_path, "new", f"resume={path}", *more)
    assert main(["train", *argv]) == 2
    said = capfd.readouterr().err
    assert ("peft.rank was 16 and is 4" if more else "rank-00000.safetensors is missing") in said
    assert read_status(tmp_path / "new").state is State.config_error
