"""``dtune kernels check`` as a user types it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from dtune_kernels import check, launch, timing
from dtune_kernels.catalog import SHAPES

from dtune.cli import main
from dtune.commands import kernels

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@without_gpu
def test_without_a_gpu_it_says_so_and_what_to_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "check"]) == 2
    said = capsys.readouterr().err
    assert "it needs a CUDA or ROCm device, this is cpu" in said
    assert "kernels=auto" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "One of check"),
        (["chek"], "invalid choice: 'chek'"),
        (["check", "--dtype", "int4"], "choose from"),
        (["check", "--shape", "9b"], "choose from"),
        (["check", "--op", "rms_nrm"], "did you mean rms_norm"),
        (["check", "op=rms_norm"], "unrecognized arguments: op=rms_norm"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kernels", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\nfrom dtune.cli import main\n"
        "try: main(['kernels', 'check', '--help'])\n"
        "except SystemExit as ended: assert ended.code == 0, ended\n"
        "sys.exit('torch was imported' if 'torch' in sys.modules else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--shape" in done.stdout


def test_choices_are_those_of_the_kernels() -> None:
    assert set(kernels.SHAPES) == set(SHAPES)
    assert list(kernels.DTYPES) == list(check.DTYPES)


@pytest.mark.parametrize("passes", [True, False])
def test_the_exit_code_says_whether_all_passed(
    passes: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*_: object, **__: object) -> check.Parity:
        return check.Parity(1.0, 0.0, 9.0, "result 0 is wrong")

    # On a CPU the ops run their references; everything else is as on a GPU.
    monkeypatch.setattr(launch, "require_triton", lambda *_, **__: None)
    monkeypatch.setattr(timing, "MIN_ROUNDS", 1)
    monkeypatch.setattr(timing, "MAX_ROUNDS", 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "no GPU")
    if not passes:
        monkeypatch.setattr(check, "check_parity", wrong)
    arguments = ["--op", "rms_norm", "--op", "rope_", "--dtype", "bf16", "--shape", "small"]
    assert main(["kernels", "check", *arguments]) == int(not passes)
    said = capsys.readouterr().out
    assert ("2 passed, 0 failed" in said) is passes
    assert ("result 0 is wrong" in said) is not passes
    assert "glu" not in said
