"""The order of passes: what stands in it, what becomes of a pass that fails, whole graphs and segments alike."""

import inspect
import re
import sys

import pytest
import torch

from difa_compile.backend.entry import eager
from difa_compile.decision import FULL, REUSE, Decision, Window
from difa_compile.errors import LayoutError, PassError
from difa_compile.layout import Layout
from difa_compile.passes import order
from difa_compile.passes.order import ANALYSIS, PREPARATION, REWRITES, analyse, rewrite
from difa_compile.passes.variant import Context, Rewrite
from difa_compile.plan.schedule import FULL_ROLE, Role
from tests.support.captures import capture_of
from tests.support.printed import one_attention
from tests.support.tiny_models import captured, captured_plain, graph_of, plain

D = Decision.parse
EVERY_PASS = [*PREPARATION, *ANALYSIS, *(each.apply for each in REWRITES)]


@pytest.mark.parametrize("made", EVERY_PASS, ids=lambda made: made.__name__)
def test_every_pass_says_what_it_does(made):
    """Its file begins with the graph before and after, or with what it finds or notes."""
    assert (made.__doc__ or "").strip().endswith((".", "?"))
    told = sys.modules[made.__module__].__doc__
    assert re.search(r"^(Finds|Notes) " if made in ANALYSIS else r"^Before(,[^:]*)?: .*\bAfter: ", told, re.M | re.S), (
        told
    )


@pytest.mark.parametrize("made", EVERY_PASS, ids=lambda made: made.__name__)
def test_every_pass_of_a_kind_has_its_signature(made):
    names = list(inspect.signature(made).parameters)
    assert names == (["variant", "target"] if made in [each.apply for each in REWRITES] else ["module", "facts"])


def test_every_pass_stands_once_and_no_name_twice():
    assert len({made.__name__ for made in EVERY_PASS}) == len(EVERY_PASS)


@pytest.mark.parametrize(
    ("role", "concerned"),
    [
        (FULL_ROLE, []),
        (Role(REUSE), ["reuse"]),
        (Role(D("reuse+cfg")), ["reuse"]),
        (Role(D("full+cfg")), ["share_cfg"]),
        (Role(D("window(box:1)"), emit_output=True), ["window", "emit_caches"]),
        (Role(D("window(box:1)+residual+cfg")), ["share_cfg", "window"]),
        (Role(FULL, emit_residual=True, residual_window=Window("box", 1)), ["emit_caches"]),
    ],
    ids=str,
)
def test_which_passes_a_role_concerns_in_their_order(role, concerned):
    assert [each.name for each in REWRITES if each.concerns(role)] == concerned


# --- passes that fail ------------------------------------------------------------------------------------------------


def broken(variant, target):
    """Insert something, then fail."""
    variant.call_after(target.attention, torch.narrow, (target.attention, 0, 0, 1))
    raise KeyError("no such thing")


def test_a_rewrite_that_fails_is_told_with_its_site_and_node(monkeypatch):
    module, sites, _ = one_attention()
    monkeypatch.setattr(order, "REWRITES", (Rewrite(broken, lambda role: True),))
    with pytest.raises(PassError, match="pass broken failed at site attention, node narrow: KeyError") as failed:
        rewrite(module, sites, [FULL_ROLE], Context())
    assert "a fault of difa-compile, not of the model or the plan" in str(failed.value)
    assert isinstance(failed.value.__cause__, KeyError)


def test_before_anything_was_inserted_the_attention_is_named(monkeypatch):
    def at_once(variant, target):
        raise KeyError("x")

    module, sites, _ = one_attention()
    monkeypatch.setattr(order, "REWRITES", (Rewrite(at_once, lambda role: True),))
    with pytest.raises(PassError, match="at site attention, node scaled_dot_product_attention: KeyError: 'x'"):
        rewrite(module, sites, [FULL_ROLE], Context())


def test_a_role_that_is_not_possible_fails_as_well():
    """Whoever rewrites asks for the reasons first; sharing the halves of three samples has one."""
    model, inputs = plain(batch=3)
    module, values = graph_of(model, inputs)
    analysed = analyse(module, values, Context(0))
    assert analysed.why_not(0, D("full+cfg")) == "a batch of 3 has no two CFG halves"
    with pytest.raises(PassError, match=r"pass share_cfg failed at site layers\.0\.attention, node .*: HalvingError: "):
        rewrite(analysed.canonical, analysed.sites, [Role(D("full+cfg"))] * 2, Context(0))


@pytest.mark.parametrize("kind", ["PREPARATION", "ANALYSIS"])
def test_what_goes_wrong_unforeseen_names_its_pass(kind, monkeypatch):
    def careless(module, facts):
        return {}["missing"]

    model, inputs = plain()
    module, values = graph_of(model, inputs)
    monkeypatch.setattr(order, kind, (*getattr(order, kind), careless))
    with pytest.raises(PassError, match="pass careless failed: KeyError: 'missing'"):
        analyse(module, values)


def test_what_is_foreseen_stays_as_it_is():
    model, inputs = plain()
    module, values = graph_of(model, inputs)
    with pytest.raises(LayoutError, match="layout"):
        analyse(module, values, layout=Layout((5, 5)))


# --- whole graphs and segments ---------------------------------------------------------------------------------------

WINDOW = Window("box", 1)
ROWS = [
    [Role(FULL, emit_output=True, emit_residual=True, residual_window=WINDOW)] * 2,
    [Role(D("window(box:1)+residual+cfg")), Role(REUSE)],
    [Role(D("reuse+cfg")), Role(D("window(box:1)"))],
    [Role(D("full+cfg"), emit_output=True), FULL_ROLE],
]


@pytest.mark.parametrize("name", ["plain", "plain, rotated", "dit", "sd3"])
def test_the_whole_graph_and_its_segments_give_the_same_to_the_bit(name):
    if name.startswith("plain"):
        _, _, module, values = captured_plain(rotate=name != "plain")
    else:
        pytest.importorskip("diffusers")
        _, _, module, values = captured(name)
    capture = capture_of(module, values, eager, conditional_half=0)
    model, caches = capture.model, {}
    with torch.no_grad():
        for row in ROWS:
            outputs, written = capture.execute(values, row, caches)
            whole = rewrite(model.canonical, model.sites, row, Context(0))
            found = whole.module(*values, *[caches[name] for name in whole.cache_inputs])
            cut = len(found) - len(whole.cache_outputs)
            assert all(map(torch.equal, found[:cut], outputs))
            assert dict.fromkeys(whole.cache_outputs) == dict.fromkeys(written)
            for cache, value in zip(whole.cache_outputs, found[cut:], strict=True):
                assert torch.equal(value, written[cache])
            caches |= written
