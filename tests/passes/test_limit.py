"""The limit on rewrites: what is beyond it is left out, and all of them are told."""

import pytest
import torch

from difa_compile.backend.entry import eager
from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.errors import PassError
from difa_compile.passes import limit
from difa_compile.passes.limit import RewriteLimit, rewrite_limit
from difa_compile.passes.order import rewrite
from difa_compile.passes.variant import Context
from difa_compile.plan.schedule import FULL_ROLE, Role
from tests.support.captures import capture_of
from tests.support.tiny_models import captured_plain, sites_of

D = Decision.parse
SHARED, WINDOW = D("full+cfg"), D("window(box:1)+cfg")


@pytest.fixture(autouse=True)
def begun_anew(monkeypatch):
    monkeypatch.setattr(limit, "_current", None)


def test_rewrites_are_counted_told_and_left_out(capsys):
    two = RewriteLimit(2)
    role = Role(WINDOW)
    assert [two.allows("share_cfg", "a", role), two.allows("window", "a", role), two.allows("window", "b", role)] == [
        True,
        True,
        False,
    ]
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == [
        "difa: rewrite 1: share_cfg at a (window(box:1)+cfg)",
        "difa: rewrite 2: window at a (window(box:1)+cfg)",
        "difa: rewrite 3: window at b (window(box:1)+cfg), left out",
    ]


def test_minus_one_leaves_nothing_out():
    endless = RewriteLimit(-1)
    assert all(endless.allows("window", "a", FULL_ROLE) for _ in range(20))
    assert endless.made == 20


@pytest.mark.parametrize("told", [None, "", "  "])
def test_who_asks_for_none_has_none(told, monkeypatch):
    monkeypatch.delenv("DIFA_PASS_LIMIT", raising=False)
    if told is not None:
        monkeypatch.setenv("DIFA_PASS_LIMIT", told)
    assert rewrite_limit() is None


def test_the_limit_of_a_process_is_one_until_another_is_asked_for(monkeypatch):
    monkeypatch.setenv("DIFA_PASS_LIMIT", " 3 ")
    first = rewrite_limit()
    first.allows("window", "a", FULL_ROLE)
    assert rewrite_limit() is first
    monkeypatch.setenv("DIFA_PASS_LIMIT", "4")
    assert (rewrite_limit().most, rewrite_limit().made) == (4, 0)
    monkeypatch.delenv("DIFA_PASS_LIMIT")
    assert rewrite_limit() is None
    monkeypatch.setenv("DIFA_PASS_LIMIT", "4")
    assert rewrite_limit().made == 0, "counted anew"


@pytest.mark.parametrize("told", ["many", "1.5", "-2", "--1", "1e3", "0x10", "9" * 13, "²"])
def test_what_is_no_number_of_rewrites_is_refused(told, monkeypatch):
    monkeypatch.setenv("DIFA_PASS_LIMIT", told)
    with pytest.raises(PassError, match=r"DIFA_PASS_LIMIT is .*; give how many rewrites to make, -1 for all of them"):
        rewrite_limit()


@pytest.mark.parametrize(
    ("most", "left"),
    [
        (0, [FULL, FULL]),
        (1, [SHARED, FULL]),
        (2, [SHARED, SHARED]),
        (3, [WINDOW, SHARED]),
        (4, [WINDOW, WINDOW]),
        (-1, [WINDOW, WINDOW]),
    ],
)
def test_a_variant_under_a_limit_is_that_of_its_first_rewrites(most, left):
    """Pass by pass, and in each site by site: both sites are shared before either has a window."""
    _, _, module, values = captured_plain()
    sites = sites_of(module, values)
    limited = rewrite(module, sites, [Role(WINDOW)] * 2, Context(1), limit=RewriteLimit(most))
    by_role = rewrite(module, sites, list(map(Role, left)), Context(1))
    found = limited.module(*values)[0]
    assert torch.equal(found, by_role.module(*values)[0])
    assert torch.equal(found, module(*values)[0]) == (most == 0)


def captured_under(told, monkeypatch):
    monkeypatch.setenv("DIFA_PASS_LIMIT", told)
    _, _, module, values = captured_plain()
    other = [value if isinstance(value, torch.nn.Parameter) else value + 1 for value in values]
    return capture_of(module, values, eager, conditional_half=0), values, other


@pytest.mark.parametrize(("told", "left"), [("0", [FULL, FULL]), ("1", [REUSE, FULL]), ("2", [REUSE, REUSE])])
def test_a_model_under_a_limit_is_that_of_its_first_rewrites(told, left, monkeypatch, capsys):
    """Caches are written whatever the limit, for later steps count on them; and equal blocks are told apart."""
    emit = [Role(FULL, emit_output=True)] * 2
    limited, values, other = captured_under(told, monkeypatch)
    written, caches = limited.execute(values, emit, {})
    assert set(caches) == {f"cache.layers.{i}.attention.output.0" for i in range(2)}
    found, _ = limited.execute(other, [Role(REUSE)] * 2, caches)
    again, _ = limited.execute(other, [Role(REUSE)] * 2, caches)
    assert capsys.readouterr().err.splitlines() == [
        f"difa: rewrite {i + 1}: reuse at layers.{i}.attention (reuse){'' if i < int(told) else ', left out'}"
        for i in range(2)
    ]
    monkeypatch.delenv("DIFA_PASS_LIMIT")
    _, _, module, _ = captured_plain()
    free = capture_of(module, values, eager, conditional_half=0)
    assert torch.equal(free.execute(values, emit, {})[0][0], written[0])
    wanted, _ = free.execute(other, list(map(Role, left)), caches)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(again[0], wanted[0])
    assert torch.equal(found[0], module(*other)[0]) == (told == "0")


def test_proofs_know_no_limit(monkeypatch, capsys):
    """What a site may do is found out by rewriting, which is neither limited nor counted."""
    limited, _, _ = captured_under("0", monkeypatch)
    assert limited.verdicts.why_not(0, REUSE) is None
    assert limited.verdicts.why_not(0, SHARED) is None
    assert capsys.readouterr().err == ""
