"""Fixtures and rules shared by all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

# What the machine costs must not decide what a test finds; tests of profiles name one of their own.
os.environ["DIFA_PROFILE"] = "off"

# Tests run on small tensors, where more threads only add waiting: one, where several processes share the work.
# DIFA_TEST_THREADS overrides.
alone = "PYTEST_XDIST_WORKER" not in os.environ
torch.set_num_threads(int(os.environ.get("DIFA_TEST_THREADS", min(2, os.cpu_count() or 1) if alone else 1)))


# The same examples in every run, and no time asserted, not even of drawing them: machines differ.
settings.register_profile("difa", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("difa")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips must say why, and tests marked ``gpu`` are skipped, saying so, where there is no CUDA device."""
    no_gpu = pytest.mark.skip(reason="needs a CUDA device, torch sees none")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        for marker in item.iter_markers():
            # The reason of skip may stand first; the first argument of the other two is a condition.
            given = marker.kwargs.get("reason") or (marker.name == "skip" and marker.args)
            if marker.name in ("skip", "skipif", "xfail") and not given:
                raise pytest.UsageError(f"{item.nodeid}: @pytest.mark.{marker.name} must give a reason")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C interrupts this process and those it starts; processes that run tests for another one ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def profile_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts a made-up profile of this machine (:func:`tests.support.profiles.made_up`) in force; returns its path."""

    def put(**options: Any) -> Path:
        from tests.support.profiles import made_up

        path = tmp_path / "profile.json"
        monkeypatch.setenv("DIFA_PROFILE", str(path))
        return made_up(**options).save()

    return put


_keeper: str | None = None
"""The module marked ``keeps_graphs`` whose graphs Dynamo holds now."""


@pytest.fixture(autouse=True)
def _fresh_compiler(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test starts with an empty Dynamo cache, so that counts of captures and recompiles are its own.

    A module marked ``keeps_graphs`` starts with one: a pipeline under a plan that an earlier test had under an equal
    one is not captured again.
    """
    global _keeper
    keeps = request.module.__name__ if request.node.get_closest_marker("keeps_graphs") else None
    if keeps is None or keeps != _keeper:
        torch._dynamo.reset()
    _keeper = keeps
    yield
    if keeps is None:
        torch._dynamo.reset()
