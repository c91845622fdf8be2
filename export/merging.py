"""Rows merged until at most K engines run them all: both steps then do what the two rows have in common.

Where they differ they compute in full, so what is computed is never less than before. Rows that differ in the caches
alone which they write share the engine that writes the caches of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import combinations, islice

from difa_compile.backend.two_calls import alone, conditional_role, taking_role
from difa_compile.decision import FULL, Decision
from difa_compile.errors import RowLimitError, ScheduleError
from difa_compile.plan.cost import row_flops
from difa_compile.plan.data import SiteInfo, blocks_of
from difa_compile.plan.schedule import Blocks, Role, assign_roles
from difa_compile.planner.rows import check_most

Decisions = tuple[tuple[Decision, ...], ...]
"""By step a decision per site of a plan."""
Row = tuple[Role, ...]
Cost = Callable[[Row], float]
EngineKey = tuple[int, Row]
"""The place of the captured call that it is made from, and the roles."""

_TRIED, _FAR = 10, 8
"""Changes worked out in full at each step of merging; a third of them while so many engines more must go."""


@dataclass(frozen=True)
class Guided:
    """How a step's calls are made. ``two_call``: sharing guidance's halves is between two calls, which then do two
    things (:mod:`difa_compile.backend.two_calls`). ``graphs``: how many graphs its calls have: two, where the texts of
    the branches differ in length."""

    two_call: bool = False
    graphs: int = 1


@dataclass(frozen=True)
class Merged:
    """``rows[schedule][step][site]`` after merging; ``engines``: how many they need, where rows of roles that differ in
    what they write alone share one. ``before`` and ``after``: the cost of all calls of all schedules."""

    rows: tuple[Decisions, ...]
    engines: int
    before: float
    after: float


def merged(
    schedules: Sequence[Decisions],
    sites: Sequence[SiteInfo],
    most: int,
    *,
    guided: Guided = Guided(),
    cost: Cost | None = None,
) -> Merged:
    """Rows of several schedules of one model, merged until at most ``most`` engines run them all.

    Decisions only become full, or, at a site or block that was covered and now is not, what the other row says; where
    guidance is two calls they may also stop sharing. What is changed is chosen greedily, by what it costs for each
    engine that it saves: of the changes that seem to cost least those are worked out in full, roles assigned anew.
    ``cost``: of a row of roles, by default its operations (:func:`difa_compile.plan.cost.row_flops`).

    Raises :class:`RowLimitError` for a limit below the number of graphs and :class:`ScheduleError` for rows that cannot
    be run.
    """
    check_most(most)
    if most < guided.graphs:
        raise RowLimitError(
            f"{most} engines were allowed, but the calls of a step have {guided.graphs} graphs, each of which needs "
            f"one; allow at least {guided.graphs}"
        )
    price = cache(cost or partial(row_flops, sites=sites))
    assess = partial(_State.of, blocks=blocks_of(sites), guided=guided, price=price)
    state = assess(schedules)
    before = state.cost
    while state.engines > most:
        changes = sorted(
            ((_estimate(groups, guided, price), i, groups) for i, groups in enumerate(_changes(state, guided))),
            key=lambda change: change[:2],
        )
        every = (state.changed(groups, assess) for _, _, groups in changes)
        count = _TRIED if state.engines - most <= _FAR else _TRIED // 3
        tried = list(islice((each for each in every if each.schedules != state.schedules), count))
        state = _best(state, tried, most)
    return Merged(state.schedules, state.engines, before, state.cost)


def _best(state: _State, tried: Sequence[_State], most: int) -> _State:
    """Of changed states the one that costs least for each engine that is saved, of those that are still too many."""

    def saved(one: _State) -> int:
        return min(state.engines - one.engines, state.engines - most)

    useful = [each for each in tried if saved(each) > 0]
    return min(useful or tried, key=lambda each: (each.cost - state.cost) / max(1, saved(each)))


Group = tuple[tuple[Row, int], ...]
"""Rows of roles that do the same, with how many steps have each."""


def _changes(state: _State, guided: Guided) -> Iterable[tuple[Group, ...]]:
    """What can be changed: two groups of rows become one; one stops sharing."""
    yield from combinations(state.groups, 2)
    if guided.two_call:
        yield from ((group,) for group in state.groups if any(role.decision.cfg_shared for role in group[0][0]))


@dataclass(frozen=True)
class _State:
    """Rows of schedules, with their roles. ``groups``: the distinct rows of roles. ``engines``: how many they need."""

    schedules: tuple[Decisions, ...]
    roles: tuple[tuple[Row, ...], ...]
    groups: tuple[Group, ...]
    engines: int
    cost: float

    @classmethod
    def of(cls, schedules: Sequence[Decisions], blocks: Blocks, guided: Guided, price: Cost) -> _State:
        roles = tuple(assign_roles(rows, blocks) for rows in schedules)
        counts: dict[Row, int] = {}
        for row in (row for rows in roles for row in rows):
            counts[row] = counts.get(row, 0) + 1
        groups = tuple(tuple((row, counts[row]) for row in each) for each in packed(counts))
        branches = list(zip(*(_calls_of(row, guided) for row in counts), strict=True))
        if guided.graphs > 1:
            engines = sum(len(packed(dict.fromkeys(rows))) for rows in branches)
        else:
            engines = len(packed(dict.fromkeys(row for rows in branches for row in rows)))
        cost = sum(_cost_of(row, guided, price) * n for row, n in counts.items())
        return cls(tuple(map(tuple, schedules)), roles, groups, engines, cost)

    def changed(self, groups: Sequence[Group], assess: Callable[[Sequence[Decisions]], _State]) -> _State:
        """The state in which the steps of two groups do the same, or those of one share nothing."""
        rows = {row for group in groups for row, _ in group}
        for lenient in (True, False):
            row = _common([group[0][0] for group in groups], lenient)
            schedules = [
                tuple(row if roles in rows else own for own, roles in zip(decisions, of, strict=True))
                for decisions, of in zip(self.schedules, self.roles, strict=True)
            ]
            try:
                return assess(schedules)
            except ScheduleError:
                if not lenient:
                    raise
        raise AssertionError


def _calls_of(row: Row, guided: Guided) -> tuple[Row, ...]:
    """What the calls of a step do, by branch, for its row of roles."""
    if guided.two_call:
        shared = [role.decision.cfg_shared for role in row]
        return (
            tuple(conditional_role(role) if share else role for role, share in zip(row, shared, strict=True)),
            tuple(taking_role(role) if share else role for role, share in zip(row, shared, strict=True)),
        )
    return (row,) * guided.graphs


def _cost_of(row: Row, guided: Guided, price: Cost) -> float:
    calls = _calls_of(row, guided)
    return sum(map(price, calls)) / len(calls)


def _common(rows: Sequence[Row], lenient: bool) -> tuple[Decision, ...]:
    """What two rows have in common; of one what it is without sharing."""
    return tuple(alone(role.decision) for role in rows[0]) if len(rows) == 1 else _joined(rows[0], rows[1], lenient)


def _joined(one: Row, other: Row, lenient: bool) -> tuple[Decision, ...]:
    """What two rows have in common, and full elsewhere, halves shared where both do. ``lenient``: where the one is
    covered what the other says, else full there too."""

    def at(mine: Role, theirs: Role) -> Decision:
        if _core(mine) == _core(theirs):
            return mine.decision
        if lenient and mine.covered != theirs.covered:
            return theirs.decision if mine.covered else mine.decision
        return replace(FULL, cfg_shared=mine.decision.cfg_shared and theirs.decision.cfg_shared)

    return tuple(at(mine, theirs) for mine, theirs in zip(one, other, strict=True))


def _estimate(groups: Sequence[Group], guided: Guided, price: Cost) -> float:
    """About what a change of groups costs."""
    row = tuple(map(Role, _common([group[0][0] for group in groups], True)))
    cost = _cost_of(row, guided, price)
    return sum(n * (cost - _cost_of(each, guided, price)) for group in groups for each, n in group)


def _core(role: Role) -> tuple[object, ...]:
    """What a role does, but for the caches that it writes."""
    return role.decision, role.covered, role.head_reads


def united(one: Row, other: Row) -> Row | None:
    """The row that does what two rows do and writes what either writes; None if they do not do the same, or take
    residuals against two windows."""
    found = []
    for mine, theirs in zip(one, other, strict=True):
        if mine is theirs or mine == theirs:
            found.append(mine)
            continue
        windows = {mine.residual_window, theirs.residual_window} - {None}
        if _core(mine) != _core(theirs) or len(windows) > 1:
            return None
        found.append(
            replace(
                mine,
                emit_output=mine.emit_output or theirs.emit_output,
                emit_residual=bool(windows),
                residual_window=next(iter(windows), None),
                head_writes=tuple(dict.fromkeys((*mine.head_writes, *theirs.head_writes))),
            )
        )
    return tuple(found)


def packed(rows: Iterable[Row]) -> tuple[tuple[Row, ...], ...]:
    """Rows in as few groups as are found, each of which one row can do (:func:`united`)."""
    groups: list[tuple[Row, list[Row]]] = []
    doing: dict[tuple[object, ...], list[int]] = {}
    """By what rows do, but for the caches that they write, the places of their groups."""
    for row in rows:
        places = doing.setdefault(tuple(map(_core, row)), [])
        for i in places:
            whole, group = groups[i]
            both = united(whole, row)
            if both is not None:
                groups[i] = both, [*group, row]
                break
        else:
            places.append(len(groups))
            groups.append((row, [row]))
    return tuple(tuple(group) for _, group in groups)


def widened(rows: Mapping[EngineKey, int], most: int, cost: Cost) -> dict[EngineKey, Row]:
    """For engines, and how many calls run each, those that write more caches and run in their place, so that there are
    at most ``most``; as few as can be where that is not possible. What writing more costs is kept low, greedily."""
    serving = {key: key[1] for key in rows}
    while len(engines := {(key[0], row) for key, row in serving.items()}) > most:
        counts = {each: sum(rows[key] for key, row in serving.items() if (key[0], row) == each) for each in engines}
        found: list[tuple[float, int, EngineKey, EngineKey, Row]] = []
        ordered = sorted(engines, key=lambda each: (each[0], str(list(map(str, each[1])))))
        for i, (one, other) in enumerate(combinations(ordered, 2)):
            both = united(one[1], other[1]) if one[0] == other[0] else None
            if both is not None:
                added = sum(counts[each] * (cost(both) - cost(each[1])) for each in (one, other))
                found.append((added, i, one, other, both))
        if not found:
            break
        _, _, one, other, both = min(found, key=lambda each: each[:2])
        serving = {key: both if (key[0], row) in (one, other) else row for key, row in serving.items()}
    return {key: row for key, row in serving.items() if row != key[1]}
