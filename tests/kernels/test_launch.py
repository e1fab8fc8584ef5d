"""What launchers ask of PyTorch before they start a kernel."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from dtune_kernels.launch import dot_precision

SWITCHES = {
    "": "ieee",
    "torch.backends.cuda.matmul.allow_tf32 = True": "tf32",
    "torch.set_float32_matmul_precision('high')": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": "tf32",
    "torch.backends.fp32_precision = 'tf32'": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'": "ieee",
}


def test_fp32_is_as_precise_as_each_of_pytorchs_switches_says() -> None:
    # In processes of their own: PyTorch refuses a mix of its older and its newer switches.
    for switch, wanted in SWITCHES.items():
        code = f"""
import torch
from dtune_kernels.launch import dot_precision
{switch}
print(dot_precision(torch.float32))
"""
        found = subprocess.run(
            [sys.executable, "-c", code], env=os.environ, text=True, capture_output=True
        )
        assert found.stdout.strip() == wanted, (switch, found.stderr)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_have_one_precision(dtype: torch.dtype) -> None:
    assert dot_precision(dtype) == "ieee"
