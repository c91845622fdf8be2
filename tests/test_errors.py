"""The errors of the package: one class per kind of mistake, each of which is made somewhere and tested somewhere."""

import ast
import inspect

import pytest

from difa_compile import errors
from difa_compile.errors import DifaError
from tests.support.places import ROOT

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]

ASKING = {"isinstance", "issubclass", "suppress", "raises"}
"""Calls that are given a class of error without raising it."""


def trees(*folders):
    """The syntax tree of every source file in some folders, the module of errors left out."""
    files = {file.resolve() for folder in folders for file in (ROOT / folder).rglob("*.py")}
    return [ast.parse(file.read_text()) for file in sorted(files - {ROOT / "difa_compile" / "errors.py"})]


def names(node):
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


def raised(tree):
    """What stands in a ``raise``, or is handed to something that raises or warns."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            found |= names(node.exc)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) not in ASKING:
            for given in (*node.args, *(keyword.value for keyword in node.keywords)):
                found |= {given.id} if isinstance(given, ast.Name) else set()
        elif isinstance(node, ast.IfExp):  # this one or that one, raised a line later
            found |= {each.id for each in (node.body, node.orelse) if isinstance(each, ast.Name)}
    return found


@pytest.fixture(scope="module")
def made():
    return set().union(*map(raised, trees("difa_compile", "passes", "plugins", "exporting")))


@pytest.fixture(scope="module")
def tested():
    return set().union(*map(names, trees("tests")))


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_is_ours_told_raised_and_tested(kind, made, tested):
    assert issubclass(kind, (DifaError, Warning))
    assert (kind.__doc__ or "").strip().endswith("."), "say what the mistake is"
    assert kind is DifaError or kind.__name__ in made, "nothing raises it"
    assert kind.__name__ in tested, "no test knows it"


def test_warnings_are_warnings_and_all_else_is_an_error():
    assert [kind.__name__ for kind in CLASSES if issubclass(kind, Warning)] == [
        "CachesLostWarning",
        "PlanNotFollowedWarning",
    ]
    assert not [kind for kind in CLASSES if issubclass(kind, Warning) == kind.__name__.endswith("Error")]


def test_what_means_a_bad_value_can_be_caught_as_one():
    for kind in (errors.DecisionError, errors.LayoutError, errors.PlanFormatError, errors.ThresholdError):
        with pytest.raises(ValueError, match="so it is"):
            raise kind("so it is")
    with pytest.raises(OSError, match="so it is"):
        raise errors.CacheFolderError("so it is")
    with pytest.raises(ImportError, match="so it is"):
        raise errors.MissingDependencyError("so it is")
