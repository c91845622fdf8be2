"""Rows joined to one function: the same results as walking the segments, without walking them."""

import pytest
import torch

from difa_compile.backend.entry import eager
from difa_compile.backend.stitch import Link, source_of, stitch
from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.plan.schedule import FULL_ROLE, Role
from tests.support.captures import capture_of
from tests.support.tiny_models import captured, captured_plain

pytest.importorskip("diffusers")


@pytest.mark.parametrize("family", ["dit", "flux", "wan"])
def test_a_row_run_again_is_the_row_run_first(family):
    _, _, module, values = captured(family)
    capture = capture_of(module, values, eager)
    rest = [FULL_ROLE] * (len(capture.model.sites) - 1)
    row = [Role(FULL, emit_output=True), *rest]
    first, written = capture.execute(values, row, {})
    again, rewritten = capture.execute(values, row, {})
    assert written.keys() == rewritten.keys()
    assert all(torch.equal(written[name], rewritten[name]) for name in written)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    reading = [Role(REUSE), *rest]
    first, _ = capture.execute(values, reading, written)
    again, none = capture.execute(values, reading, written)
    assert not none
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_known_row_does_not_walk_the_segments(monkeypatch):
    _, _, module, values = captured_plain()
    capture = capture_of(module, values, eager)
    row = [Role(Decision.parse("window(band:2)"))] * 2
    first, _ = capture.execute(values, row, {})
    built = capture.compiled_variants
    monkeypatch.setattr(capture, "advance", None)
    again, _ = capture.execute(values, row, {})
    assert torch.equal(first[0], again[0])
    assert capture.compiled_variants == built


def test_values_are_let_go_when_nobody_reads_them_any_more():
    _, _, module, values = captured_plain()
    capture = capture_of(module, values, eager)
    links = [Link(each.module.forward, each.inputs, (), ()) for each in capture.model.split.segments]
    source = source_of(capture.model.split, links)
    let_go = {
        name.strip(",") for line in source.splitlines() if line.strip().startswith("del ") for name in line.split()[1:]
    }
    between = {f"v{n}" for segment in capture.model.split.segments for n in segment.outputs}
    results = {f"v{number}" for number in capture.model.split.results}
    assert let_go == between - results
    found, _ = stitch(capture.model.split, links)(values, {})
    assert torch.equal(found[0], module(*values)[0])
