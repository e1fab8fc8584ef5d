"""What is imported at the end of every run costs no second that it need not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from dtune.runtime.imports import uncompiled

# In a process of its own: what this one has imported stays.
SAVES = """
import os, sys, torch
from dtune.peft.export import peft_config
assert peft_config({"peft_type": "LORA", "r": 3}).to_dict()["r"] == 3
assert "bitsandbytes" in sys.modules
assert "torch._inductor.compile_fx" not in sys.modules
assert "TORCHDYNAMO_DISABLE" not in os.environ
calls = []
def backend(graph, inputs):
    calls.append(graph)
    return graph
compiled = torch.compile(lambda x: x + 1, backend=backend)
assert compiled(torch.ones(2)).tolist() == [2.0, 2.0] and calls
"""


def test_a_config_of_peft_imports_no_compiler_and_leaves_compiling_as_it_was() -> None:
    pytest.importorskip("bitsandbytes", reason="without it peft imports no compiler anyway")
    done = subprocess.run(
        [sys.executable, "-c", SAVES], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_nothing_is_compiled_inside_and_the_environment_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x

    for value in ("0", None):
        if value is None:
            monkeypatch.delenv("TORCHDYNAMO_DISABLE")
        else:
            monkeypatch.setenv("TORCHDYNAMO_DISABLE", value)
        with uncompiled():
            assert torch.compile(function) is function
        assert os.environ.get("TORCHDYNAMO_DISABLE") == value
