"""The planner: from a table of measured effects the best decisions under a budget of time or of error.

In: a :class:`~difa_compile.planner.problem.Problem` (numpy arrays: effects, costs, response). Out: a
:class:`~difa_compile.planner.problem.Outcome` (decisions[step][site], predicted share of time, predicted error), from
``choice.choose``, ``choice.choose_error``, ``make.front_of``; ``rows.limit_rows`` holds it to few distinct rows,
``proof.optimum`` is the exact optimum of small cases. ``effects``, ``paths``, ``forms`` and ``settle`` are what these
are made of; ``groups`` says which heads take which window. Imports numpy and plan.
"""
