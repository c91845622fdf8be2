"""The options of the backend: checked, explained, and equal for equal. ``test_backend.py`` has their errors."""

import ast
import inspect
from dataclasses import fields
from pathlib import Path

import pytest

from difa_compile.backend import options as module
from difa_compile.backend.batch_sizes import AnyBatch
from difa_compile.backend.options import NAMES, Options
from difa_compile.errors import DecisionError
from difa_compile.layout import Layout
from difa_compile.pipeline.apply import apply


def test_every_option_is_explained_once():
    (cls,) = (node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.ClassDef))
    explained = [
        one.target.id
        for one, other in zip(cls.body, cls.body[1:], strict=False)
        if isinstance(one, ast.AnnAssign) and isinstance(other, ast.Expr) and isinstance(other.value, ast.Constant)
    ]
    assert tuple(explained) == NAMES


def test_keyword_arguments_of_apply_are_options():
    taken = inspect.signature(apply).parameters
    assert set(taken) == set(NAMES) - {"cfg"} | {"pipe"}
    defaults = {field.name: field.default for field in fields(Options)}
    for name in ("strict", "layout", "inner", "resize", "mode", "allow_slower"):
        assert taken[name].default == defaults[name]


def test_nothing_given_is_the_default_and_a_text_is_a_path():
    assert Options.of({}) == Options() == Options.of({"cfg": None, "inductor_options": None, "strict": 0})
    assert Options.of({"plan": "plan.json"}).plan == Path("plan.json")


def test_what_torch_compile_is_handed():
    """Dynamo compares it with ``==``, and calls the backend with it."""
    assert Options().given == {"plan": None}
    given = {"plan": None, "strict": True, "cfg": {"two_call": True}, "layout": Layout((2, 3)), "resize": "tokens"}
    options = Options.of({**given, "allow_slower": False, "inner": "inductor"})
    assert options.given == given
    assert Options.of(options.given) == options
    one, two = (Options(dynamic=AnyBatch()) for _ in range(2))
    assert one.given == one.given != two.given


def test_mappings_are_copied():
    mine = {"max_autotune": True}
    options = Options.of({"inductor_options": mine})
    mine["max_autotune"] = False
    assert options.config == {"max_autotune": True}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"cfg": {"half": 0}}, r"option cfg is \{'half': 0\}; give"),
        ({"cfg": "two_call"}, "option cfg is 'two_call'; give"),
        ({"cfg": {"conditional_half": 0, "two_call": True}}, "has no halves of a batch"),
        ({"dynamic": True}, "option dynamic is True; give a difa_compile.AnyBatch"),
        ({"resize": "fractoin"}, "resize is 'fractoin'; choose one of fraction, tokens, or leave it out"),
    ],
)
def test_values_that_an_option_does_not_take(given, words):
    with pytest.raises(DecisionError, match=words):
        Options.of(given)
