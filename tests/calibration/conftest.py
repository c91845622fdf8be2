"""What tests of calibration share: a tiny pipeline, and a folder of the test for states."""

import pytest

from tests.support.slow_search import LAYERS
from tests.support.tiny_pipelines import tiny_pipeline


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    """States go to a folder of the test."""
    monkeypatch.setenv("DIFA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pipe():
    return tiny_pipeline(layers=LAYERS)
