"""Tables on the terminal."""

from __future__ import annotations

import pytest
from rich.console import Console

from difa_compile.cli.tables import print_plan, print_records, print_sites
from difa_compile.machine.profile import ELEMENTWISE
from difa_compile.wording import shown
from tests.support.foreign import FOREIGN
from tests.support.report_sample import make_plan


class Called:
    """A site of a model, or a record, in which every text is the one given."""

    def __init__(self, text):
        self.path = self.kind = self.layout_reason = self.mask = self.site = self.reason = text
        self.decision = self.outcome = text
        self.layout, self.tokens, self.query_shape = None, 4, (1, 2, 4, 8)


@pytest.mark.parametrize("text", FOREIGN, ids=ascii)
def test_foreign_names_in_tables_stand_as_they_are(text, capsys):
    from dataclasses import replace

    from difa_compile.cli.tune import print_profile
    from tests.support.profiles import made_up

    console = Console(width=20_000)
    plan = make_plan(4, 2)
    sites = tuple(replace(site, path=f"{text}.{index}") for index, site in enumerate(plan.sites))
    settings = replace(plan.settings, torch=text, diffusers=text, candidates=(text,))
    hostile = replace(plan, sites=sites, settings=settings, model=replace(plan.model, class_name=text))
    profile = made_up()
    fits = tuple(replace(fit, operation=text, dtype=text) for fit in profile.fits if fit.operation != ELEMENTWISE)
    for name, show in {
        "sites": lambda: print_sites(console, text, [Called(text)]),
        "records": lambda: print_records(console, [Called(text)]),
        "profile": lambda: print_profile(console, replace(profile, fits=fits)),
        "plan": lambda: print_plan(console, hostile),
    }.items():
        show()
        printed = capsys.readouterr().out
        assert all(one.isprintable() or one in "\n\u00a0" for one in printed), name
        assert shown(text, 60)[:20] in printed, name
        printed.encode()
