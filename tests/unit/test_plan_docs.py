"""What docs/plan.md shows is what its commands print."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from dtune.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "plan.md").read_text("utf-8")
SHOWN = re.findall(
    r"```sh\n(dtune plan [^\n]*)\n```\n(?:[^`]*\n)??```text\n(.*?)\n```", PAGE, re.DOTALL
)


def test_the_page_shows_outputs() -> None:
    assert len(SHOWN) == PAGE.count("```text") == 3


@pytest.mark.slow
@pytest.mark.parametrize(("command", "output"), SHOWN)
def test_its_outputs_are_those_of_its_commands(
    capsys: pytest.CaptureFixture[str], command: str, output: str
) -> None:
    assert main(shlex.split(command)[1:]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line for line in output.splitlines() if line not in said] == []
