"""dtune beside other frameworks on the tiny model: the whole command, in processes of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.peers.run import main
from dtune.bench.record import CaseResult, Status, read_jsonl
from tests.integration.peer_runs import SMALL, prepared, side_by_side

ROOT = Path(__file__).parents[2]


def compare(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.peers.run", *SMALL, "device=cpu"]
    command += [f"out={out}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_dtune_and_the_trainer_of_transformers_do_the_same_work(tmp_path: Path) -> None:
    work = prepared(tmp_path, "device=cpu")
    for setting in ("plain", "recompute"):
        own, peer = side_by_side(work, setting, "dtune", "hf-peft")
        # Equal weights, adapter, tokens, optimizer, clipping: the curves are one but for rounding.
        assert own.loss_curve == pytest.approx(peer.loss_curve, rel=1e-5)
        assert own.loss_last < own.loss_first
        assert len(peer.step_seconds) == 2
        assert peer.peak_rss_bytes
        assert peer.peak_allocated_bytes is None


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CaseResult]:
    """Results of the whole command by contestant."""
    out = tmp_path_factory.mktemp("peers") / "peers.jsonl"
    done = compare(out, "peers=liger,trl,torchtune,unsloth", "settings=plain")
    assert done.returncode == 0, done.stdout + done.stderr
    assert out.with_suffix(".md").read_text(encoding="utf-8") in done.stdout
    return {one.framework: one for one in read_jsonl(out)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["liger", "torchtune", "unsloth"])
def test_who_cannot_run_has_a_row_that_says_why(compared: dict[str, CaseResult], name: str) -> None:
    row, module = compared[name], {"liger": "liger_kernel"}.get(name, name)
    is_there = importlib.util.find_spec(module) is not None
    if is_there and name == "torchtune":
        assert row.status is Status.ok, row.reason
        return
    assert row.status is Status.refused
    assert ("GPU" if is_there else f"not installed: {module}") in row.reason


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="trl is in the extra peers")
def test_dtune_and_the_trainer_of_trl_do_the_same_work(compared: dict[str, CaseResult]) -> None:
    own, peer = (compared[name] for name in ("dtune", "trl"))
    assert [own.reason, peer.reason] == ["", ""]
    assert own.measured is not None
    assert peer.measured is not None
    assert peer.measured.loss_curve == pytest.approx(own.measured.loss_curve, rel=1e-5)
    assert own.measured.loss_last < own.measured.loss_first
    assert len(peer.measured.step_seconds) == 2


def test_a_wrong_setting_ends_the_command_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["peer=trl"]) == 2
    assert capsys.readouterr().err == "peers: unknown key peer; did you mean peers?\n"
