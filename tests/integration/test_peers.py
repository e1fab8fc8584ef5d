"""dtune beside other frameworks on the tiny model: the whole command, in processes of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from dtune.bench.record import CaseResult, Status, read_jsonl

ROOT = Path(__file__).parents[2]
SMALL = "model=tiny rounds=1 warmup=2 steps=2 length=64 threads=1 device=cpu".split()


def compare(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.peers.run", *SMALL, f"out={out}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], CaseResult]:
    """Results by contestant and setting."""
    out = tmp_path_factory.mktemp("peers") / "peers.jsonl"
    done = compare(out, "peers=hf-peft,liger,trl,torchtune,unsloth", "settings=plain,recompute")
    assert done.returncode == 0, done.stdout + done.stderr
    assert out.with_suffix(".md").read_text(encoding="utf-8") in done.stdout
    return {(one.framework, one.case): one for one in read_jsonl(out)}


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["plain", "recompute"])
def test_dtune_and_the_trainer_of_transformers_do_the_same_work(
    compared: dict[tuple[str, str], CaseResult], setting: str
) -> None:
    own, peer = compared["dtune", setting].measured, compared["hf-peft", setting].measured
    assert own is not None
    assert peer is not None
    # Equal weights, adapter, tokens, optimizer and clipping: the curves are one but for rounding.
    assert own.loss_curve == pytest.approx(peer.loss_curve, rel=1e-5)
    assert own.loss_last < own.loss_first
    assert len(peer.step_seconds) == 2
    assert peer.peak_rss_bytes
    assert peer.peak_allocated_bytes is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["liger", "trl", "torchtune", "unsloth"])
def test_who_cannot_run_has_a_row_that_says_why(
    compared: dict[tuple[str, str], CaseResult], name: str
) -> None:
    row = compared[name, "plain"]
    module = {"liger": "liger_kernel"}.get(name, name)
    if importlib.util.find_spec(module) is None:
        assert row.status is Status.refused
        assert "not installed" in row.reason
    elif name in ("liger", "unsloth"):
        assert "GPU" in row.reason
    else:
        assert row.status is Status.ok, row.reason


@pytest.mark.slow
def test_documents_of_a_row_stay_apart_everywhere(tmp_path: Path) -> None:
    out = tmp_path / "peers.jsonl"
    done = compare(out, "peers=hf-peft,trl", "settings=plain", "documents=4", "accumulation=2")
    assert done.returncode == 0, done.stdout + done.stderr
    ok = {one.framework for one in read_jsonl(out) if one.status is Status.ok}
    assert {"dtune", "hf-peft"} <= ok
    assert "trl" in ok or importlib.util.find_spec("trl") is None


def test_a_wrong_setting_ends_the_command_with_2(tmp_path: Path) -> None:
    done = compare(tmp_path / "peers.jsonl", "peer=trl")
    assert done.returncode == 2
    assert done.stderr == "peers: unknown key peer; did you mean peers?\n"
