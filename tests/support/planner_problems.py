"""Small problems whose every plan can be tried."""

from itertools import product

import numpy as np

from difa_compile.decision import FULL, REUSE
from difa_compile.errors import ErrorTableError
from difa_compile.planner.effects import Effects, drift_of_values
from difa_compile.planner.problem import FORECAST, Costs, Problem, Unit, flat_response


def smooth_values(seed, steps, size=6):
    """Outputs (T, K) that change smoothly over the steps, with some noise."""
    rng = np.random.default_rng(seed)
    at = np.linspace(0, 1, steps)[:, None]
    values = np.sin(2 * at * rng.uniform(0.5, 2, size) + rng.uniform(0, 6, size)) * rng.uniform(0.2, 1, size)
    return values + 0.01 * rng.standard_normal((steps, size))


def make_problem(steps=8, units=1, seed=0, lags=None, readers=(FORECAST,), coherence=0.0, base=0.1, costs=None):
    costs = costs or Costs({FULL: 1.0})
    made = tuple(
        Unit((unit,), Effects(drift_of_values(smooth_values(seed + unit, steps), lags or steps)), costs)
        for unit in range(units)
    )
    progress = tuple((steps - step) / steps for step in range(steps))
    return Problem(progress, made, flat_response(steps), base, readers, coherence)


def all_columns(problem):
    """Every column that one unit can have: full steps anywhere, the best reader being tried for each other step."""
    options = dict.fromkeys([FULL, REUSE, *problem.readers])
    for column in product(options, repeat=problem.steps):
        if column[0] == FULL:
            yield column


def possible(call, *arguments):
    """The result, or None where a plan cannot be run."""
    try:
        return call(*arguments)
    except ErrorTableError:
        return None
