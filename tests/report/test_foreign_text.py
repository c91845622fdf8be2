"""Names that are not ours on the page: shown as they are, whatever they are, and never read as anything else."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser

import pytest

from difa_compile.backend.verdicts import Record
from difa_compile.report import write_report
from difa_compile.report.view import build_page
from difa_compile.report.write import render
from difa_compile.wording import shown, visible
from tests.support.report_sample import MACHINE, make_comparison, make_plan

MARK = "@@"
"""Stands at both ends of every foreign text, so that it can be found again on the page."""
FOREIGN = [
    "plain",
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</title><h1>x</h1>",
    "<!--",
    "-->",
    "]]>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "javascript:alert(1)",
    "{{ page.title }}{% for x in y %}",
    "&lt;b&gt; & &amp;",
    "a\nb\tc\rd",
    "\x00\x1b[2J\x07\x7f\x9b",
    "\u202egnp.exe\u2066",
    "\ud800\udfff",
    "\ufffe\U0001f600",
    "日本語" * 5,
    "</pre></table></svg>",
]


class Page(HTMLParser):
    """Tags in order, texts, and attribute values of a page."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts, self.values = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, tuple(name for name, _ in attributes)))
        self.values += [value or "" for _, value in attributes]

    def handle_data(self, data):
        self.texts.append(data)

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")


def write(folder, text, plan, comparison):
    """A page on which every text that comes from elsewhere is ``text`` between marks."""
    text = f"{MARK}{text}{MARK}"
    hostile = replace(
        plan,
        model=replace(plan.model, class_name=text),
        sites=tuple(replace(site, path=f"{text}{index}") for index, site in enumerate(plan.sites)),
        settings=replace(plan.settings, torch=text, diffusers=text, candidates=(text,)),
        rows=tuple(
            tuple(
                replace(cell, trials=tuple(replace(t, reason=text) if t.loss is None else t for t in cell.trials))
                for cell in row
            )
            for row in plan.rows
        ),
    )
    measured = replace(comparison, pipeline=text, device=text, dtype=text, backend_full=text)
    return write_report(
        folder,
        plan=hostile,
        comparison=measured,
        records=[Record(text, text, "skipped", text)],
        title=text,
        machine={text: text},
        versions={text: text},
        command=text,
        captions=[text] * 10,
    ).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def plan():
    return make_plan(5, 4)


@pytest.fixture(scope="module")
def comparison(plan):
    return make_comparison(plan, images=10)


@pytest.fixture(scope="module")
def harmless(plan, comparison, tmp_path_factory):
    return Page(write(tmp_path_factory.mktemp("page"), "plain", plan, comparison))


@pytest.mark.parametrize("text", FOREIGN, ids=ascii)
def test_foreign_text_adds_nothing_to_the_page_but_itself(text, plan, comparison, harmless, tmp_path):
    source = write(tmp_path, text, plan, comparison)
    page = Page(source)
    assert page.tags == harmless.tags
    assert all(character.isprintable() or character in "\n\t\u00a0" for character in source)
    for found, expected in ((page.texts, harmless.texts), (page.values, harmless.values)):
        inside = re.findall(f"{MARK}(.*?){MARK}", "\n".join(found), re.DOTALL)
        # Names are on one line everywhere; a title and a command are shown as they are, line breaks and all.
        assert set(inside) <= {shown(text), visible(text)}
        assert len(inside) == len(re.findall(MARK, "\n".join(expected))) // 2 > 0


@pytest.mark.parametrize("length", [10_000, 1_000_000])
def test_long_names_do_not_fill_the_page(length, plan, comparison, tmp_path):
    assert len(write(tmp_path, "x" * length, plan, comparison)) < 2_000_000 + 3 * length


def test_every_text_of_a_page_passes_the_escape(plan, comparison):
    """Whatever text is added to the page's content one day: markup in it stays text."""
    page = build_page(plan, comparison, comparison.records, "t", MACHINE, {}, "c", ())
    poison = "<i class=poison>\x1b\ud800"

    def poisoned(value, name=""):
        if isinstance(value, str):
            return value if not value or name in ("svg", "uri", "light", "dark", "key", "site_width") else poison
        if isinstance(value, tuple):
            return tuple(map(poisoned, value))
        if is_dataclass(value):
            return replace(value, **{f.name: poisoned(getattr(value, f.name), f.name) for f in fields(value)})
        return value

    source = render(poisoned(page))
    assert source.count("&lt;i class=poison&gt;") > 100
    assert Page(source).tags == Page(render(page)).tags
    assert not {"\x1b", "\ud800"} & set(source)


def test_charts_escape_what_they_are_given():
    from difa_compile.report.charts import step_chart

    chart = step_chart('<b>"&', "note", [1.0, 2.0], [1.0, 1.0], lambda value: f'<u>"{value}')
    tags = [tag for tag, _ in Page(chart.svg).tags]
    assert set(tags) == {"svg", "line", "text", "g", "title", "rect"}
