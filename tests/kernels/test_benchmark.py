"""The benchmark of the kernels, with one repetition on a CPU: its path, not its numbers."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dtune_kernels.catalog import CATALOG, SMALL
from dtune_kernels.timing import Ceilings, Timing

FOLDER = Path(__file__).parents[2] / "benchmarks" / "kernels"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def call(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    root = FOLDER.parents[1]
    return subprocess.run(
        [sys.executable, str(FOLDER / "run.py"), "--out", str(out), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={
            **os.environ,
            "PYTHONPATH": f"{root}:{root / 'kernels'}",
            "OMP_NUM_THREADS": "1",
            "TRITON_INTERPRET": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
    )


def test_every_case_runs_and_is_written(tmp_path: Path) -> None:
    done = call(tmp_path, "--shape", "small", "--repeats", "1", "--no-compile", "--commit", "abc")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))
    cases = importlib.import_module("cases")
    assert {row["case"] for row in record["results"]} == {*cases.FUNCTIONS, *cases.OPS}
    assert len(cases.OPS) == len(CATALOG)
    for row in record["results"]:
        assert row["problem"] == ""
        assert row["left_out"] == {}
        assert len(row["measured"]) > 1
        assert row["nbytes"] > 0
        assert all(one["timing"]["median"] > 0 for one in row["measured"].values())
    peers = {name for row in record["results"] for name in row["measured"]}
    assert {"plain", "peft", "peft, autocast", "bitsandbytes", "bare GEMMs"} <= peers
    assert record["environment"]["commit"] == "abc"
    assert "--repeats 1" in record["environment"]["command"]
    assert done.stdout == (tmp_path / "kernels.txt").read_text(encoding="utf-8")
    assert len(record["aims"]) >= len(importlib.import_module("aims").AIMS)


def test_what_there_is_no_time_for_is_said(tmp_path: Path) -> None:
    done = call(tmp_path, "--shape", "small", "--repeats", "1", "--seconds", "0")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))
    assert record["results"] == []
    assert "rms_norm small" in record["left_out"]
    assert "no time was left for: dequantize nf4 nested small, " in done.stdout
    assert all(aim["got"] is None for aim in record["aims"])


def layer() -> Any:
    comparison = importlib.import_module("comparison")
    return comparison.Layer(SMALL, torch.float32, torch.device("cpu"))


def compared(**functions: Any) -> Any:
    """One computation of x [3] by dtune and by others."""
    comparison = importlib.import_module("comparison")
    x = torch.arange(1.0, 4.0, requires_grad=True)
    alternatives = {
        name: comparison.Alternative(function, (x,)) for name, function in functions.items()
    }
    (forward, both) = comparison.compare(
        "double",
        comparison.Comparison(alternatives, (torch.ones(3),)),
        layer(),
        Ceilings(1.0, 1.0),
        seconds=0.0,
        rounds=1,
    )
    assert (forward.direction, both.direction) == ("forward", "both")
    return both


def test_who_computes_something_else_gets_no_number() -> None:
    result = compared(
        dtune=lambda x: 2 * x, plain=lambda x: x + x, wrong=lambda x: x * x, more=lambda x: (x, x)
    )
    assert list(result.measured) == ["dtune", "plain"]
    assert "differs from dtune's by" in result.left_out["wrong"]
    assert set(result.left_out) == {"wrong", "more"}


def test_a_wrong_gradient_is_noticed() -> None:
    result = compared(dtune=lambda x: 2 * x, plain=lambda x: x + x.detach())
    assert result.problem == "dtune agrees with nobody"
    assert not result.measured


def test_who_raises_is_left_out_with_the_reason() -> None:
    def fails(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("not here\nat all")

    result = compared(dtune=lambda x: 2 * x, plain=lambda x: x + x, peer=fails)
    assert result.left_out == {"peer": "ValueError: not here"}


def test_operands_are_kept_from_who_overwrites_them() -> None:
    def overwrites(x: torch.Tensor) -> torch.Tensor:
        y = 2 * x
        x.data.zero_()
        return y

    result = compared(dtune=lambda x: 2 * x, plain=overwrites, late=lambda x: x + x)
    assert list(result.measured) == ["dtune", "plain", "late"]


def test_launches_and_bytes_are_those_of_ops_and_gemms() -> None:
    comparison = importlib.import_module("comparison")
    op = CATALOG["rms_norm_backward"]
    arguments = op.arguments(SMALL, torch.float32, torch.device("cpu"))
    cost = op.cost(*arguments)
    a, b = torch.randn(2, 3), torch.randn(3, 5)

    def run() -> None:
        op.call(*arguments)
        (a @ b).t().detach()

    counted = comparison.count(run)
    assert counted.launches == 2
    gemm = 4 * (6 + 15 + 10), 2 * 2 * 3 * 5
    assert counted.calls == ((cost.read + cost.written, cost.flops), gemm)
    assert counted.floor(Ceilings(1.0, 1e9)) == pytest.approx(cost.read + cost.written + gemm[0])


def result_of(case: str, share: float, **seconds: float) -> Any:
    comparison = importlib.import_module("comparison")
    return comparison.Result(
        case,
        "both",
        "8b",
        share=share,
        measured={
            name.replace("_", " "): comparison.Measured(Timing(t, t, t, 1), None)
            for name, t in seconds.items()
        },
    )


def test_aims_are_met_or_missed_by_how_much() -> None:
    aims = importlib.import_module("aims")
    fast = result_of("lora linear", 0.9, dtune=1.0, peft=1.15, peft_autocast=1.3, bare_GEMMs=0.95)
    slow = result_of("rope", 0.68, dtune=1.0, plain=2.0)
    verdicts = {str(v): v.met for v in aims.judge([fast, slow])}
    assert verdicts["lora linear, both, 8b: wanted 1.15 x as fast as peft: met, 1.15 x"]
    wanted = "rope, both, 8b: wanted 85% of the measured ceilings: missed by 20%, 68%"
    assert verdicts[wanted] is False
    unmeasured = [text for text, met in verdicts.items() if "not measured" in text and not met]
    assert any("linear_cross_entropy" in text for text in unmeasured)


def test_the_fastest_of_the_others_is_who_counts() -> None:
    aims = importlib.import_module("aims")
    result = result_of("lora linear", 0.9, dtune=1.0, peft=1.1, peft_autocast=1.3)
    found = [v for v in aims.judge([result]) if v.aim.against == "peft"]
    assert [(v.got, v.met) for v in found] == [(1.1, False)]
