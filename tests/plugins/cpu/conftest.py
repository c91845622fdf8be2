"""What tests of building and keeping the CPU kernel share: a compiler that copies a tiny library."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from difa_compile.plugins.cpu import build
from tests.support.fake_compiler import SOURCE, Fake


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder with ``good.so``, which names the kernel's op, and ``foreign.so``, which does not."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc to make a library of a few lines")
    folder = tmp_path_factory.mktemp("tiny")
    for name, text in (("good", build.OP), ("foreign", "something else")):
        (folder / f"{name}.c").write_text(SOURCE % text)
        command = ["gcc", "-shared", "-fPIC", f"{name}.c", "-o", f"{name}.so"]
        subprocess.run(command, cwd=folder, check=True)
    return folder


@pytest.fixture
def fake(tiny, tmp_path, monkeypatch):
    made = Fake(tmp_path / "compiler", tiny / "good.so", tmp_path / "cache")
    made.write()
    monkeypatch.setenv("CXX", str(made.script))
    monkeypatch.setenv("DIFA_CACHE_DIR", str(made.cache))
    monkeypatch.delenv("DIFA_COMPILE_TIMEOUT", raising=False)
    return made


@pytest.fixture
def no_compiler(monkeypatch):
    return lambda: monkeypatch.setenv("CXX", "/nowhere/c++")
