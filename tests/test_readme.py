"""The README's code runs as it stands, and what it says about files and commands is there."""

from __future__ import annotations

import re

import pytest

from tests.support.places import ROOT

DOCUMENTS = ("README.md", "DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")


def python_blocks(document: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    """In one namespace, in an empty folder. To be quick, schedules of 50 and 20 steps are cut to 4 and 3, a tiny
    pipeline stands in for the demo model, and variants run as the graphs they are instead of going through inductor."""
    pytest.importorskip("diffusers", reason="the README's pipeline is a diffusers pipeline")
    import difa_compile
    from difa_compile.backend import entry as backend
    from tests.support.tiny_pipelines import tiny_pipeline

    pipelines = {"demo": tiny_pipeline()}
    monkeypatch.setattr(difa_compile, "load_pipeline", pipelines.__getitem__)
    monkeypatch.setattr(backend, "inductor", lambda module, inputs, config: backend.eager(module, inputs))
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks("README.md")
    assert len(blocks) == 3
    namespace: dict[str, object] = {}
    for block in blocks:
        quick = re.sub(r"\b50\b", "4", re.sub(r"\b20\b", "3", block))
        assert re.search(r"steps=\d\b", quick)
        exec(compile(quick, "README.md", "exec"), namespace)  # the document under test is our own
    assert len(namespace["images"]) == 3
    assert namespace["output"].isfinite().all()
    assert namespace["plan"].steps == 4


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_to_files_resolve(document):
    text = (ROOT / document).read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith(("http", "#"))]
    missing = [link for link in links if not (ROOT / document).parent.joinpath(link.split("#")[0]).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_source_files_that_are_named_exist(document):
    text = (ROOT / document).read_text()
    places = ("", "difa_compile", "passes", "plugins", "benchmarks", "tests", "examples")
    names = set(re.findall(r"`((?:\w+/)*\w+\.(?:py|sh|toml|cpp))`", text))
    names = {name for name in names if "NAME" not in name}
    missing = [name for name in names if not any((ROOT / place / name).exists() for place in places)]
    assert not missing


def test_commands_in_the_readme_exist():
    pytest.importorskip("typer", reason="the difa command is made with typer")
    from typer.testing import CliRunner

    from difa_compile.cli.app import app

    text = (ROOT / "README.md").read_text()
    commands = set(re.findall(r"^difa (\w+)", text, re.MULTILINE))
    assert commands == {"demo", "tune", "calibrate", "inspect", "compare", "report"}
    for command in commands:
        result = CliRunner().invoke(app, [command, "--help"])
        assert result.exit_code == 0, result.output
    targets = set(re.findall(r"^make (\w+)", text, re.MULTILINE))
    assert targets == {"demo", "test"}
    assert targets <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
