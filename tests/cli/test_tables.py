"""Tables on the terminal."""

from __future__ import annotations

import re

import pytest
from rich.console import Console

from difa_compile.backend.verdicts import Record
from difa_compile.cli.tables import not_applicable, print_blocks, print_plan, print_records, print_sites
from difa_compile.machine.profile import ELEMENTWISE
from difa_compile.plan.data import SiteInfo
from difa_compile.wording import shown
from tests.support.foreign import FOREIGN
from tests.support.report_sample import make_plan


class Called:
    """A site of a model, or a record, in which every text is the one given."""

    def __init__(self, text):
        self.path = self.kind = self.layout_reason = self.mask = self.site = self.reason = text
        self.decision = self.outcome = text
        self.layout, self.tokens, self.query_shape = None, 4, (1, 2, 4, 8)
        self.width, self.blocks = 16, ()


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
        "blocks": lambda: print_blocks(console, [Called(text)], [Called(text)]),
        "profile": lambda: print_profile(console, replace(profile, fits=fits)),
        "plan": lambda: print_plan(console, hostile),
    }.items():
        show()
        printed = capsys.readouterr().out
        assert all(one.isprintable() or one in "\n\u00a0" for one in printed), name
        assert shown(text, 60)[:20] in printed, name
        printed.encode()


def test_candidates_that_were_not_tried_are_listed_once_each_with_the_reason(capsys):
    plan = make_plan(10, 4)
    lines = not_applicable(plan)
    assert [(site, reason) for site, _, reason in lines] == [
        ("transformer_blocks.2.attn1", "a mask stands on this attention")
    ] * 2
    assert len(set(lines)) == 2
    print_plan(Console(width=200), plan)
    printed = capsys.readouterr().out
    assert printed.count("a mask stands on this attention") == 2
    assert "why it was not tried" in printed


def test_where_nothing_is_to_be_said_no_table_is_shown(capsys):
    plan = make_plan(10, 2)
    assert not_applicable(plan) == ()
    print_plan(Console(width=200), plan)
    assert "why it was not tried" not in capsys.readouterr().out
    print_records(Console(width=200), [Record("a", "full", "full", "")])
    assert capsys.readouterr().out == ""


def test_what_became_of_decisions_is_told_once(capsys):
    skipped = Record("blocks.0.attn1", "window(box:1)", "skipped", "the attention is causal")
    print_records(Console(width=200), [skipped, Record("blocks.0.attn1", "full", "full", ""), skipped])
    printed = capsys.readouterr().out
    assert re.findall(r"blocks\.0\.attn1 +window\(box:1\) +skipped +the attention is causal", printed) == [
        printed.splitlines()[-1].strip()
    ]


def test_blocks_and_spans_are_told_apart(capsys):
    block = SiteInfo("blocks.0", "block", 1, 16, 4, 16)
    span = SiteInfo("blocks.0..blocks.2", "block", 1, 16, 4, 16, blocks=("blocks.0", "blocks.1", "blocks.2"))
    print_blocks(Console(width=200), [block, span], [Record("blocks.1", "any", "skipped", "it is no sum")])
    printed = capsys.readouterr().out
    assert "Blocks that a plan can leave out: 1; spans of blocks: 1" in printed
    assert re.search(r"blocks\.0 +block +4 +16", printed)
    assert re.search(r"blocks\.0\.\.blocks\.2 +span of 3 blocks +4 +16", printed)
    assert re.search(r"blocks\.1 +any +skipped +it is no sum", printed)
    print_blocks(Console(width=200), [], [])
    assert capsys.readouterr().out.strip().startswith("Blocks that a plan can leave out: 0; spans of blocks: 0")
