"""What tests of the report share: a plan, its comparison, and the page that shows both."""

from __future__ import annotations

import pytest

from difa_compile.report import write_report
from tests.support.pages import read
from tests.support.report_sample import MACHINE, make_comparison, make_plan


@pytest.fixture(scope="session")
def plan():
    return make_plan()


@pytest.fixture(scope="session")
def comparison(plan):
    return make_comparison(plan)


@pytest.fixture(scope="session")
def path(plan, comparison, tmp_path_factory):
    return write_report(
        tmp_path_factory.mktemp("report") / "made" / "here",
        plan=plan,
        comparison=comparison,
        records=comparison.records,
        title="Digits <faster> & better",
        machine=MACHINE,
        versions={"torch": "2.13.0"},
        command="difa demo --steps 50",
        captions=[f"digit {index % 10}" for index in range(20)],
    )


@pytest.fixture(scope="session")
def page(path):
    return read(path)
