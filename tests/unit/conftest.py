"""Small bases on disk, which no test changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contracts.small_models import save_base


@pytest.fixture(scope="session", params=["llama", "qwen3"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), request.param)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), "llama")
