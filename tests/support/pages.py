"""Report pages, written and read back."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from difa_compile.report import write_report

VOID = {"meta", "link", "img", "br", "col", "input", "line", "rect", "polyline"}


class Reader(HTMLParser):
    """Collects tags and text, and checks that what is opened is closed."""

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.words = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def read(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert reader.open == []
    return reader


def write(folder, plan, comparison, records=None, **more):
    kept = comparison.records if records is None else records
    made = write_report(folder, plan=plan, comparison=comparison, records=kept, title="t", machine={}, **more)
    return read(made)
