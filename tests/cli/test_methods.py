"""Options belong to methods."""

import pytest
import typer

from difa_compile.cli.methods import RUNS, Method, check_options_of
from difa_compile.comparison import holding


def test_options_of_the_method_and_those_not_given_pass():
    check_options_of(Method.PLANNER, {"--budget": 0.5}, Method.PLANNER)
    check_options_of(Method.PLANNER, {"--rank": None}, Method.WEIGHED)


def test_an_option_of_another_method_is_refused():
    with pytest.raises(typer.BadParameter, match="belongs to --method weighed and published") as error:
        check_options_of(Method.PLANNER, {"--loss": None, "--rank": 0}, Method.WEIGHED, Method.PUBLISHED)
    assert error.value.param_hint == "--rank"


def test_as_many_plans_are_tried_as_by_the_library():
    assert holding.RUNS == RUNS
