"""How far a choice is from the optimum: small cases solved exactly by HiGHS (``scipy.optimize.milp``), for tests.

One binary variable says whether a unit goes from state (last computed step, the one before) to a next computed step;
what flows into a state flows out of it; the costs keep to the budget; the sum of squared errors is least. Readers are
those of least error. For units that are in no other and are computed in full or not, and for orders up to 1.
"""

from __future__ import annotations

import numpy as np

from difa_compile.decision import FULL
from difa_compile.errors import BudgetError, ErrorTableError, MissingDependencyError
from difa_compile.planner.paths import Readers
from difa_compile.planner.problem import Problem


def optimum(problem: Problem, budget: float, seconds: float = 60.0) -> float:
    """The least :func:`~difa_compile.planner.problem.additive_error` at a cost of at most ``budget`` of full's.

    Raises :class:`ErrorTableError` for a problem that is not of the simple kind, :class:`BudgetError` if nothing keeps
    to the budget or ``seconds`` do not suffice, :class:`MissingDependencyError` without scipy.
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_matrix
    except ImportError as missing:
        raise MissingDependencyError(f"the exact optimum needs scipy ({missing}); pip install scipy") from missing
    simple = all(unit.inside is None and len(unit.costs.computed) == 1 for unit in problem.units)
    if not simple or max(reader.order for reader in problem.readers) > 1:
        raise ErrorTableError("the exact optimum is for units in no other, full or not, and forecasts of order 1")
    readers = Readers(problem, range(len(problem.units)))
    prices = readers.priced(0.0)
    orders = np.array([reader.order + 1 for reader in readers.readers])
    steps, lags = problem.steps, readers.lags
    errors: list[float] = []
    costs: list[float] = []
    entries: list[tuple[int, int, float]] = []
    """(equation, variable, coefficient): flow through each state."""
    equations: dict[tuple[int, int, int], int] = {}

    def equation(unit: int, step: int, before: int) -> int:
        return equations.setdefault((unit, step, before), len(equations))

    for place, unit in enumerate(problem.units):
        equation(place, 0, 0)
        for start in range(steps):
            for before in range(min(start, lags) + 1):
                if (before == 0) != (start == 0):
                    continue
                error, cost, kept = 0.0, unit.costs.computed[FULL], False
                for gap in range(1, min(lags, steps - start) + 1):
                    if gap > 1:
                        cell = prices.cells[place, start, gap - 1, before, 0]
                        count = orders[prices.form[place, start, gap - 1, before, 0]]
                        error += float(cell)
                        cost += unit.costs.read * int(count) + (0.0 if kept else unit.costs.fill)
                        kept = True
                    if not np.isfinite(error):
                        break
                    variable = len(errors)
                    errors.append(error)
                    costs.append(cost)
                    entries.append((equation(place, start, before), variable, 1.0))
                    if start + gap < steps:
                        entries.append((equation(place, start + gap, gap), variable, -1.0))
    sources = np.zeros(len(equations))
    for place in range(len(problem.units)):
        sources[equations[place, 0, 0]] = 1.0
    rows, columns, values = zip(*entries, strict=True)
    flow = coo_matrix((values, (rows, columns)), shape=(len(equations), len(errors)))
    total = budget * problem.full_cost - problem.base * steps
    scale = max(*errors, 1e-300)
    found = milp(
        np.array(errors) / scale,
        constraints=[LinearConstraint(flow, sources, sources), LinearConstraint(np.array(costs)[None], -np.inf, total)],
        integrality=np.ones(len(errors)),
        bounds=Bounds(0, 1),
        options={"time_limit": seconds, "mip_rel_gap": 1e-9},
    )
    if found.status != 0:
        raise BudgetError(f"no exact optimum for a budget of {budget:.4g}: {found.message}")
    return float(found.fun) * scale
