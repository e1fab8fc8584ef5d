"""README leads to every page of docs/, and no page leads to one that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))


def linked(page: Path) -> set[Path]:
    """Files of the repository that a page links to."""
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    files = (target.split("#")[0] for target in targets if "://" not in target)
    return {(page.parent / file).resolve() for file in files if file}


def test_readme_leads_to_every_page() -> None:
    assert sorted(set(PAGES) - linked(README)) == []


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    assert sorted(path for path in linked(page) if not path.exists()) == []


# Of each command that a new user would not find by himself, one word that only it has.
@pytest.mark.parametrize(
    "command",
    [
        *("launch=torchrun", "launch=slurm", "dtune status", "dtune logs", "dtune cancel"),
        *("dtune verify", "dtune convert", "--cluster", "dtune sweep", "hydra/sweeper="),
    ],
)
def test_readme_shows_the_command(command: str) -> None:
    use = README.read_text(encoding="utf-8").split("## Use")[1].split("\n## ")[0]
    assert command in use
