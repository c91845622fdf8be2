"""Trials that are made up."""

from contextlib import contextmanager

import pytest

from difa_compile.comparison import planned
from difa_compile.comparison.kept import ROUNDS


@pytest.fixture
def runs(monkeypatch):
    """Stands in for running plans: gives what is in ``held``, in turn, the last again and again; notes the rest.

    A plan that is timed again shows the same, or ``later``.
    ``judged``: PSNR of plans that are not timed, in turn; worse than any when there are no more.
    """
    seen = {
        "held": [], "plans": [], "seeds": None, "judged": [], "others": [], "checked": [], "state": None,
        "again": [], "later": None,
    }  # fmt: skip

    class Fake:
        def run(self, plan, rounds=ROUNDS):
            if rounds == ROUNDS:
                seen["plans"].append(plan)
                found = seen["held"].pop(0) if len(seen["held"]) > 1 else seen["held"][0]
                seen["last"] = found(plan) if callable(found) else found
            else:
                seen["again"].append((plan, rounds))
            return seen["later"] if seen["later"] and rounds > ROUNDS else seen["last"]

        def judge(self, plan):
            seen["others"].append(plan)
            return seen["judged"].pop(0) if seen["judged"] else 0.0

    @contextmanager
    def trials(pipe, inputs, steps, seeds, held_out, table, state):
        seen.update(seeds=(tuple(seeds), tuple(held_out)), state=state)
        yield Fake()

    monkeypatch.setattr(planned, "trials", trials)
    monkeypatch.setattr(planned, "check_table", lambda *given: seen["checked"].append(given))
    return seen
