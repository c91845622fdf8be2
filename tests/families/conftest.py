"""Fixtures of all whole pipelines."""

import pytest


@pytest.fixture(autouse=True)
def _own_cache_folder(tmp_path, monkeypatch):
    """Calibrations of other tests, and of the user, are not gone on with."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
