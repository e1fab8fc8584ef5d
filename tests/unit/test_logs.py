"""The log files of ranks."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from dtune.runtime.logs import RankFile


def test_a_log_that_the_disk_does_not_take_is_told_of_once_and_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rank-0.log"
    path.symlink_to("/dev/full")
    log = logging.Logger("of this test")
    file = RankFile(path)
    log.addHandler(file)
    log.warning("first")
    log.warning("second")
    log.removeHandler(file)
    said = capsys.readouterr().err
    assert said.count("rank-0.log lacks lines") == 1
    assert "No space left on device" in said
    assert "Traceback" not in said
