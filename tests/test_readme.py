"""The README's code runs as it stands, and what the documents say about files, commands and figures is there."""

from __future__ import annotations

import json
import re
import shlex
import tomllib

import pytest

from tests.support.places import ROOT

DOCUMENTS = (
    "README.md",
    "DESIGN.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "benchmarks/README.md",
    "examples/README.md",
)
README = (ROOT / "README.md").read_text()


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """The document without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def links(text: str) -> list[str]:
    """Targets of links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(text))


def anchors(text: str) -> set[str]:
    """The fragments under which GitHub offers a document's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.slow
def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    """Those of DESIGN.md after the README's, in one namespace, in an empty folder. To be quick, schedules of 50 steps
    are cut to 4, a tiny pipeline stands in for the demo model, and variants run as the graphs they are instead of going
    through inductor. ``inputs`` is what the README leaves to the reader."""
    pytest.importorskip("diffusers", reason="the README's pipeline is a diffusers pipeline")
    import difa_compile
    from difa_compile.backend import entry
    from difa_compile.pipeline.example_inputs import example_inputs
    from tests.support.tiny_pipelines import tiny_pipeline

    pipe = tiny_pipeline()
    monkeypatch.setattr(difa_compile, "load_pipeline", {"demo": pipe}.__getitem__)
    monkeypatch.setattr(entry, "inductor", lambda module, inputs, config: entry.eager(module, inputs))
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"inputs": example_inputs(pipe.transformer, batch=4)}
    for document, count in (("README.md", 2), ("DESIGN.md", 2)):
        found = blocks(document, "python")
        assert len(found) == count
        for block in found:
            quick = re.sub(r"\b50\b", "4", block).replace("budget=0.3", "budget=1.0")  # it has none to spare
            assert re.search(r"steps=4\b", quick)
            exec(compile(quick, document, "exec"), namespace)  # the document under test is our own
        if document == "README.md":
            assert namespace["plan"].settings.method != "rule"
    assert len(namespace["images"]) == 3
    assert namespace["output"].isfinite().all()
    assert namespace["plan"].settings.method == "rule"
    assert namespace["plan"].steps == 4


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_the_readme_shows_one_picture_near_its_top():
    first_screen = "\n".join(README.splitlines()[:15])
    pictures = re.findall(r"!\[([^]]+)\]\(([^)]+)\)", README)
    assert len(pictures) == 1
    (text, path), *_ = pictures
    assert f"![{text}]({path})" in first_screen
    content = (ROOT / path).read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(content) <= 150_000
    width, height = (int.from_bytes(content[start : start + 4]) for start in (16, 20))
    assert width >= 2 * height >= 600


def test_the_readme_has_one_table_of_few_figures():
    tables = re.findall(r"<!-- table:\w+ -->\n(.*?)<!-- /table -->", README, re.DOTALL)
    assert len(tables) == 1
    lines = [line for line in tables[0].splitlines() if line.startswith("|")]
    assert 1 <= len(lines) - 2 <= 8


def test_the_readme_names_public_things_only():
    import difa_compile

    assert set(re.findall(r"\bdifa_compile\.(\w+)", README)) <= set(difa_compile.__all__)
    assert not re.search(r"\bfrom difa_compile\.", README)


def test_the_counts_of_the_survey_are_those_of_its_result():
    rows = json.loads((ROOT / "benchmarks" / "results" / "model_survey.json").read_text())["rows"]
    right = {name: [row[name] for row in rows if row.get(name) is not None] for name in ("reuse", "cfg", "window")}
    captured = sum(row["captured"] for row in rows)
    counts = f"reuse is right on {len(right['reuse'])}, CFG sharing on {len(right['cfg'])}, windows on"
    text = " ".join(README.split())
    assert f"Of the {len(rows)} transformer classes" in text
    assert f"{captured} are captured as one graph" in text
    assert f"{counts} {len(right['window'])} " in text
    blocks_right, spans = (
        [row[name] for row in rows if row.get(name) is not None] for name in ("block_reuse", "span_reuse")
    )
    assert f"reuse of whole blocks on {len(blocks_right)} and of spans of blocks on {len(spans)}." in text
    exact = {name: values.count("exact") for name, values in right.items()}
    details = " ".join((ROOT / "benchmarks" / "README.md").read_text().split())
    assert (
        f"{captured} of {len(rows)} classes are captured; reuse is right on {len(right['reuse'])} (to the bit on "
        f"{exact['reuse']}), CFG sharing on {len(right['cfg'])} (on {exact['cfg']}), windows on {len(right['window'])}."
    ) in details
    held = [[int(count) for count in row["blocks"].split(" of ")] for row in rows if row.get("blocks")]
    assert (
        f"Blocks are reused right on {len(blocks_right)} (to the bit on {blocks_right.count('exact')}), "
        f"{sum(able for able, _ in held)} of {sum(every for _, every in held)} in all, spans on {len(spans)} "
        f"(on {spans.count('exact')})."
    ) in details


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_resolve(document):
    """To files of the repository and to headings in them."""
    text = (ROOT / document).read_text()
    wrong = []
    for link in links(text):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / document).parent / name if name else ROOT / document
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            wrong.append(link)
    assert not wrong


@pytest.mark.parametrize("document", DOCUMENTS)
def test_source_files_that_are_named_exist(document):
    text = (ROOT / document).read_text()
    places = ("", "difa_compile", "passes", "plugins", "benchmarks", "tests", "examples")
    names = set(re.findall(r"`((?:\w+/)*\w+\.(?:py|sh|toml|cpp))`", text))
    names = {name for name in names if "NAME" not in name}
    missing = [name for name in names if not any((ROOT / place / name).exists() for place in places)]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_modules_that_are_to_be_run_exist(document):
    names = set(re.findall(r"python -m ((?:benchmarks|examples)\.\w+)", (ROOT / document).read_text())) - {
        "benchmarks.NAME"
    }
    assert not [name for name in names if not (ROOT / f"{name.replace('.', '/')}.py").exists()]


def test_every_shell_command_of_the_readme_is_known():
    pytest.importorskip("typer", reason="the difa command is made with typer")
    lines = [line for block in blocks("README.md", "bash") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines]
    assert {tuple(words[:2]) for words in commands if words[0] == "make"} == {("make", "demo"), ("make", "test")}
    named = {words[1] for words in commands if words[0] == "difa"}
    planning = {"demo", "tune", "calibrate", "measure", "plan", "inspect", "compare", "report"}
    assert named == planning | {"export", "run", "bundle"}
    for words in commands:
        check = {"make": check_make, "difa": check_difa, "pip": check_pip}.get(words[0])
        assert check is not None, words
        check(words[1:])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_within_the_text_are_known(document):
    pytest.importorskip("typer", reason="the difa command is made with typer")
    for code in re.findall(r"`((?:make|difa) [a-z-][^`]*)`", prose((ROOT / document).read_text())):
        words = shlex.split(code)
        (check_make if words[0] == "make" else check_difa)(words[1:])


def check_make(words: list[str]) -> None:
    """Targets and variables of the Makefile."""
    text = (ROOT / "Makefile").read_text()
    for word in words:
        name = word.partition("=")[0]
        assert re.search(rf"^{re.escape(name)}( \?=|:)", text, re.MULTILINE), word


def check_difa(words: list[str]) -> None:
    """A command of ``difa`` or none, and options that it has; its help can be shown."""
    from typer.main import get_command
    from typer.testing import CliRunner

    from difa_compile.cli.app import app

    root = get_command(app)
    name = next((word for word in words if not word.startswith("-")), None)
    if name == "COMMAND":
        name = None
    command = root if name is None else root.commands[name]
    names = [] if name is None else [name]
    if name is not None and hasattr(command, "commands"):  # a group of commands
        names.append(words[words.index(name) + 1])
        command = command.commands[names[-1]]
    options = {option for parameter in (*command.params, *root.params) for option in parameter.opts} | {"--help"}
    assert {word for word in words if word.startswith("-")} <= options, words
    result = CliRunner().invoke(app, [*names, "--help"])
    assert result.exit_code == 0, result.output


def check_pip(words: list[str]) -> None:
    """Installs torch, or this package with extras that it has."""
    assert words[0] == "install"
    *options, what = words[1:]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    if what == "torch":
        assert not options
        return
    extras = re.fullmatch(r"\.\[([\w,]+)\]", what)
    assert options == ["-e"]
    assert extras is not None
    assert set(extras[1].split(",")) <= set(project["optional-dependencies"])


def test_the_versions_of_the_readme_are_the_projects():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11,<3.14"
    assert project["dependencies"] == ["torch>=2.11"]
    assert "diffusers>=0.36" in project["optional-dependencies"]["diffusers"]
    assert "Python 3.11 to 3.13, torch 2.11 or newer (the only hard dependency), diffusers 0.36 or newer" in README
