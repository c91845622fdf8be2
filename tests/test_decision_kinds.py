"""Who knows the kinds of decisions: the files that CONTRIBUTING.md names for adding one, and no others."""

import ast
import re

from difa_compile.decision import FULL, Decision, Kind
from difa_compile.layout import Layout
from difa_compile.plan.data import Cell, ModelInfo, Settings, SiteInfo
from difa_compile.plan.plan import Plan
from difa_compile.plan.text import letter
from difa_compile.report.heatmap import heat_map
from tests.support.places import ROOT


def named():
    """The files of the section."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = re.search(r"^## Adding a kind of decision$(.*?)^## ", text, re.DOTALL | re.MULTILINE)[1]
    return {ROOT / name for name in re.findall(r"`(difa_compile/[\w/]+\.py)`", section)}


def test_kinds_are_told_apart_in_these_files_alone():
    known = named()
    assert known
    assert all(path.exists() for path in known)
    folders = ("difa_compile", "passes", "plugins", "exporting")
    files = {path.resolve() for folder in folders for path in (ROOT / folder).rglob("*.py")}
    users = {
        path
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "Kind"
        and node.attr.isupper()
    }
    assert {path for path in users if path not in known} == set()


def test_every_kind_is_complete():
    """A kind reads what another fills, has a text form, a letter and colours."""
    made = {Decision.example(kind, shared) for kind in Kind for shared in (False, True)}
    assert {decision.kind for decision in made} == set(Kind)
    assert {Decision.parse(str(decision)) for decision in made} == made
    assert len({letter(decision) for decision in made}) == len(made)
    for kind in Kind:
        assert kind.reads in (None, "output", "residual")
        assert not (kind.reads and kind.fills(kind.reads))
        assert kind.reads is None or any(other.fills(kind.reads) for other in Kind)
    model, settings = ModelInfo("Model", "0" * 64, 1), Settings(method="rule")
    sites = tuple(SiteInfo(f"blocks.{i}", "self", 2, 8, 16, 8, Layout((4, 4))) for i in range(len(made)))
    rows = (*[[Cell(FULL)] * len(made)] * 2, [Cell(decision) for decision in made])
    colours = heat_map(Plan(model, settings, sites, (1.0, 0.7, 0.5), rows)).colours
    assert {colour.name for colour in colours} == {str(decision) for decision in made}
    assert len({colour.light for colour in colours}) == len({colour.dark for colour in colours}) == len(made)
