"""``dtune export``: says how, and that nothing was written."""

from __future__ import annotations

import pytest

from dtune.cli import main


def test_export_to_gguf_says_the_commands_and_writes_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["export", "gguf"]) == 2
    said = capsys.readouterr().err
    for command in ("dtune merge run_dir=RUN out=MERGED", "convert_hf_to_gguf.py MERGED"):
        assert command in said
    assert main(["export", "gguff"]) == 2
    assert "did you mean dtune export gguf?" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["chat", "generate", "merge", "eval", "export"])
def test_help_says_every_setting_and_loads_nothing(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"dtune {command}" in said
    if command != "export":
        assert "run_dir=" in said
