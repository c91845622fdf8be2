"""Captures of two plain attentions under a plan, with or without a profile of the machine."""

from difa_compile.backend.entry import eager
from difa_compile.decision import Decision
from tests.support.captures import capture_of
from tests.support.tiny_models import captured_plain, plain_plan

D = Decision.parse
WINDOW = D("window(band:2)")
RESIDUAL = D("window(band:2)+residual")
SHARED = D("window(band:2)+residual+cfg")
SLOW = {"full": 1.0, "window": 10.0}


def capture(rows, **options):
    """A :class:`Capture` of two plain attentions with a plan, run eagerly."""
    _, _, module, values = captured_plain()
    plan = plain_plan(rows, conditional_half=0)
    return capture_of(module, values, eager, plan=plan, conditional_half=0, **options)


def outcomes(found):
    return {record.decision: (record.outcome, record.reason) for record in found.verdicts.records}
