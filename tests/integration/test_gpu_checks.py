"""The scripts for a machine with a GPU, run with a stand-in for Python, and what they say."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
STAND_IN = """#!/bin/bash
if [[ "$*" == - ]]; then
  cat > /dev/null
  [[ -n "$NO_GPU" ]] && { echo "no CUDA device"; exit 1; }
  echo "a GPU"
elif [[ "$*" == *"-c import xdist"* ]]; then
  exit 1
else
  echo "ran $*"
  echo "3 passed, 0 failed"
  echo "rope, both, 8b: wanted 85% of the measured ceilings: missed by 20%, 68%"
  echo "ratio 1.0"
  echo "| lora | 16,000 |"
  [[ -n "$FAILS" && "$*" == *"$FAILS"* ]] && exit 1
  exit 0
fi
"""
STEPS = ("gpu_kernels", "gpu_tests", "gpu_tests_large", "gpu_kernels_speed", "gpu_loop_overhead")


SPEED_STEPS = ("gpu_bench_llama8b", "gpu_peers_llama8b", "gpu_peers_llama1b", "gpu_bench_torch")
JUDGED = ("gpu_plan_error", "gpu_aims")


def run(
    folder: Path, script: str = "gpu_checks.sh", **environment: str
) -> subprocess.CompletedProcess[str]:
    python = folder / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    return subprocess.run(
        ["bash", str(SCRIPTS / script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={
            **os.environ,
            "PYTHON": str(python),
            "OUT": str(folder / "out"),
            "NO_GPU": "",
            "FAILS": "",
            **environment,
        },
    )


def verdicts(output: str) -> dict[str, str]:
    """The last table: verdict by step, in the order of the table."""
    rows = [line.split() for line in output.splitlines()]
    kinds = ("passed", "FAILED", "skipped")
    return {row[1]: row[0] for row in rows if len(row) > 2 and row[0] in kinds}


def test_every_step_is_run_and_reported(tmp_path: Path) -> None:
    done = run(tmp_path, COMMIT="abc")
    assert done.returncode == 0, done.stdout
    table = verdicts(done.stdout)
    assert tuple(table)[: len(STEPS)] == STEPS
    assert {table[step] for step in STEPS} == {"passed"}
    ran = {step: (tmp_path / "out" / f"{step}.txt").read_text() for step in STEPS}
    assert "kernels check --dtype bf16" in ran["gpu_kernels"]
    assert "--ignore tests/gpu/test_gpu_kernels_large.py" in ran["gpu_tests"]
    assert "--commit abc" in ran["gpu_kernels_speed"]
    after = done.stdout.partition("\n\n")[2]
    for wanted in ("a GPU", "3 passed", "missed by 20%", "ratio 1.0"):
        assert wanted in after, wanted


@pytest.mark.parametrize("fails", ["kernels check", "--ignore", "run.py"])
def test_a_step_that_fails_is_named_and_the_others_go_on(tmp_path: Path, fails: str) -> None:
    done = run(tmp_path, FAILS=fails)
    assert done.returncode == 1
    table = verdicts(done.stdout)
    assert [table[step] for step in STEPS].count("FAILED") == 1
    assert "exit code 1" in done.stdout


def test_what_there_is_no_time_for_is_no_success(tmp_path: Path) -> None:
    done = run(tmp_path, LIMIT="0")
    assert done.returncode == 1
    assert {verdicts(done.stdout)[step] for step in STEPS} == {"FAILED"}
    assert "not begun: no time was left" in done.stdout


def test_without_a_gpu_nothing_is_run(tmp_path: Path) -> None:
    done = run(tmp_path, NO_GPU="1")
    assert done.returncode == 2
    assert "no CUDA device" in done.stdout
    assert not verdicts(done.stdout)


def test_speed_is_measured_beside_the_plan_and_beside_peers(tmp_path: Path) -> None:
    done = run(tmp_path, "gpu_speed.sh", FAILS="model=llama1b")
    assert done.returncode == 1
    table = verdicts(done.stdout)
    assert tuple(table) == (*SPEED_STEPS, *JUDGED)
    assert [step for step, verdict in table.items() if verdict == "FAILED"] == ["gpu_peers_llama1b"]
    ran = (tmp_path / "out" / "gpu_bench_llama8b.txt").read_text()
    assert "kernels=triton peft=lora,qlora -m" in ran
    assert "data.max_length=4096" in ran
    assert done.stdout.partition("\n\n")[2].count("| lora | 16,000 |") == len(SPEED_STEPS)


@pytest.mark.parametrize("fails", ["benchmarks.aims plan", "benchmarks.aims speed"])
def test_an_aim_that_is_missed_fails_the_speed_script(tmp_path: Path, fails: str) -> None:
    done = run(tmp_path, "gpu_speed.sh", FAILS=fails)
    assert done.returncode == 1
    failed = [step for step, verdict in verdicts(done.stdout).items() if verdict == "FAILED"]
    assert failed == [JUDGED["speed" in fails]]


def test_the_plan_of_plain_pytorch_is_left_out_where_time_is_short(tmp_path: Path) -> None:
    done = run(tmp_path, "gpu_speed.sh", LIMIT="100")
    assert done.returncode == 0, done.stdout
    assert verdicts(done.stdout)["gpu_bench_torch"] == "skipped"
