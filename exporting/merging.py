"""Rows merged until at most K engines run them all: both steps then do what the two rows have in common.

Where they differ they compute in full, so what is computed is never less than before. Rows that differ in the caches
alone which they write share the engine that writes the caches of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import combinations, islice

from difa_compile.backend.two_calls import alone, conditional_role, taking_role
from difa_compile.decision import FULL, Decision
from difa_compile.errors import RowLimitError, ScheduleError
from difa_compile.plan.cost import row_flops
from difa_compile.plan.data import SiteInfo, blocks_of
from difa_compile.plan.schedule import COVERED_ROLE, Blocks, Role, assign_roles
from difa_compile.planner.rows import check_most

Decisions = tuple[tuple[Decision, ...], ...]
"""By step a decision per site of a plan."""
Row = tuple[Role, ...]
Cost = Callable[[Row], float]
EngineKey = tuple[int, Row]
"""The place of the captured call that it is made from, and the roles."""

_TRIED, _FAR = 10, 8
"""Changes worked out in full at each step of merging; a third of them while so many engines more must go."""
_PASSES = 8
"""How often every row is tried in every other group."""
_FULL = (FULL, replace(FULL, cfg_shared=True))
"""Without and with halves shared."""


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
    guidance is two calls they may also stop sharing. Several ways are tried and the one that costs least is taken:

    * greedily, row by row, what costs least for each engine that it saves;
    * rows in an order (by cost, by when they are run, by likeness), cut into groups where estimates say that it costs
      least, by dynamic programming; then single rows moved between groups as long as that helps. If there are too many
      engines then, since what steps keep for each other has changed, it goes on greedily from there.

    Each is worked out in full, roles assigned anew, so what is returned is what it costs, and never more than greedy
    merging alone. The tests hold it to within 5 % of the least over all groupings of few rows.

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
    blocks = blocks_of(sites)
    assess = partial(_State.of, blocks=blocks, guided=guided, price=price)
    first = assess(schedules)
    if first.engines <= most:
        return Merged(first.schedules, first.engines, first.cost, first.cost)
    best = _shrunk(first, most, guided, price, assess)
    regrouping = _Regrouping(first, blocks, guided, price)
    for groups in regrouping.found(best, most):
        tried = _shrunk(regrouping.state(groups, assess), most, guided, price, assess)
        best = min(best, tried, key=lambda state: state.cost)
    return Merged(best.schedules, best.engines, first.cost, best.cost)


def _shrunk(state: _State, most: int, guided: Guided, price: Cost, assess: Assess) -> _State:
    """The state after as many changes as it takes, each of which is what costs least for each engine that it saves."""
    while state.engines > most:
        changes = sorted(
            ((_estimate(groups, guided, price), i, groups) for i, groups in enumerate(_changes(state, guided))),
            key=lambda change: change[:2],
        )
        every = (state.changed(groups, assess) for _, _, groups in changes)
        count = _TRIED if state.engines - most <= _FAR else _TRIED // 3
        tried = list(islice((each for each in every if each.schedules != state.schedules), count))
        state = _best(state, tried, most)
    return state


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

    def changed(self, groups: Sequence[Group], assess: Assess) -> _State:
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


Assess = Callable[[Sequence[Decisions]], _State]


# --- steps grouped anew ----------------------------------------------------------------------------------------------

_Held = tuple[int, ...]
"""Of a group of rows, by site, what all its rows do there: a place in what is known, 0 where all are covered."""


@dataclass(frozen=True)
class _Together:
    """Rows, by number, that become one; ``shares``: the halves of guidance as they do."""

    rows: tuple[int, ...]
    shares: bool = True


class _Regrouping:
    """The distinct rows of a state, by number, put into groups that become one row each.

    What a group costs is estimated from its rows alone: a step that becomes full may spare another one what it keeps,
    and that is seen only when roles are assigned anew.
    """

    def __init__(self, state: _State, blocks: Blocks, guided: Guided, price: Cost) -> None:
        self._first, self._blocks, self._guided, self._price = state, blocks, guided, price
        self._known: dict[tuple[object, ...], int] = {_core(COVERED_ROLE): 0}
        self._decisions: list[Decision] = [FULL]
        self._full = tuple(self._place(Role(full)) for full in _FULL)
        self._rows: dict[_Held, int] = {}
        self._counts: list[int] = []
        self._costs: dict[tuple[_Held, bool], float] = {}
        self._of: list[list[int]] = []
        """By schedule and step the number of its row."""
        self._when: list[float] = []
        """By row the mean place in the schedules of the steps that have it."""
        for rows in state.roles:
            self._of.append([])
            for step, row in enumerate(rows):
                held = tuple(map(self._place, row))
                number = self._rows.setdefault(held, len(self._rows))
                self._of[-1].append(number)
                if number == len(self._counts):
                    self._counts.append(0)
                    self._when.append(0.0)
                self._counts[number] += 1
                self._when[number] += step / len(rows)
        self._when = [when / count for when, count in zip(self._when, self._counts, strict=True)]
        self._held = tuple(self._rows)

    def _place(self, role: Role) -> int:
        core = _core(role)
        if core not in self._known:
            self._known[core] = len(self._decisions)
            self._decisions.append(role.decision)
        return self._known[core]

    # --- what a group is and costs

    def _join(self, one: _Held, other: _Held, lenient: bool = True) -> _Held:
        """As :func:`_joined`. The order in which rows are joined does not matter."""
        if one == other:
            return one

        def at(mine: int, theirs: int) -> int:
            if mine == theirs:
                return mine
            if lenient and not (mine and theirs):
                return mine or theirs
            return self._full[self._decisions[mine].cfg_shared and self._decisions[theirs].cfg_shared]

        return tuple(map(at, one, other))

    def _whole(self, rows: Iterable[int], lenient: bool = True) -> _Held:
        first, *others = [self._held[row] for row in rows]
        for other in others:
            first = self._join(first, other, lenient)
        return first

    def _said(self, held: _Held, shares: bool) -> tuple[Decision, ...]:
        found = tuple(self._decisions[place] for place in held)
        return found if shares else tuple(map(alone, found))

    def _cost(self, held: _Held, shares: bool) -> float:
        """Of one step."""
        key = held, shares
        if key not in self._costs:
            said = self._said(held, shares)
            row = [Role(decision) for decision in said]
            for site, block in enumerate(self._blocks):
                while block is not None:
                    if said[block].kind.reads == "output":
                        row[site] = COVERED_ROLE
                    block = self._blocks[block]
            self._costs[key] = _cost_of(tuple(row), self._guided, self._price)
        return self._costs[key]

    def _ways(self, held: _Held) -> tuple[tuple[int, bool], ...]:
        """How many engines a group may have, and whether it shares the halves of guidance then."""
        guided = self._guided
        if not guided.two_call or not any(self._decisions[place].cfg_shared for place in held):
            return ((1, True),)
        return ((2 // guided.graphs, True), (1, False))

    # --- groups

    def found(self, greedy: _State, most: int) -> Iterator[tuple[_Together, ...]]:
        """Groups that seem to cost little, of at most so many engines, none twice."""
        limit = most // self._guided.graphs
        seen = set()
        by_cost = sorted(range(len(self._held)), key=lambda row: (self._cost(self._held[row], True), row))
        by_time = sorted(range(len(self._held)), key=lambda row: (self._when[row], row))
        for start in (self._as_in(greedy), *(self.cut(order, limit) for order in (by_cost, by_time, self._alike()))):
            for groups in (start, self._moved(start, limit)):
                key = frozenset(groups)
                if key not in seen:
                    seen.add(key)
                    yield groups

    def cut(self, order: Sequence[int], limit: int) -> tuple[_Together, ...]:
        """Rows in an order, cut into groups so that the estimates' sum is least: by dynamic programming."""
        count = len(order)
        least = [[0.0] + [math.inf] * count] + [[math.inf] * (count + 1) for _ in range(limit)]
        """By engines and rows the least that they cost: those of no row nothing."""
        taken: dict[tuple[int, int], tuple[int, int, bool]] = {}
        for end in range(1, count + 1):
            held: _Held = self._held[order[end - 1]]
            calls = 0
            for start in range(end - 1, -1, -1):
                held = self._join(self._held[order[start]], held)
                calls += self._counts[order[start]]
                for engines, shares in self._ways(held):
                    cost = calls * self._cost(held, shares)
                    for used in range(engines, limit + 1):
                        total = least[used - engines][start] + cost
                        if total < least[used][end]:
                            least[used][end] = total
                            taken[used, end] = start, engines, shares
        used = min(range(limit + 1), key=lambda used: least[used][count])
        groups = []
        end = count
        while end:
            start, engines, shares = taken[used, end]
            groups.append(_Together(tuple(sorted(order[start:end])), shares))
            used, end = used - engines, start
        return tuple(sorted(groups, key=lambda group: group.rows))

    def _as_in(self, state: _State) -> tuple[_Together, ...]:
        """The groups that have become one in a state."""
        saying: dict[tuple[Decision, ...], set[int]] = {}
        for numbers, decisions in zip(self._of, state.schedules, strict=True):
            for number, said in zip(numbers, decisions, strict=True):
                saying.setdefault(said, set()).add(number)
        found = []
        for said, together in saying.items():
            held = self._whole(sorted(together))
            shares = said == self._said(held, True) or said != self._said(held, False)
            found.append(_Together(tuple(sorted(together)), shares))
        return tuple(sorted(found, key=lambda group: group.rows))

    def _alike(self) -> list[int]:
        """An order in which rows stand side by side whose common row costs little more than they do."""
        parts = [([row], held, self._counts[row]) for row, held in enumerate(self._held)]

        def added(one: tuple[list[int], _Held, int], other: tuple[list[int], _Held, int]) -> float:
            each = (n * self._cost(held, True) for _, held, n in (one, other))
            return (one[2] + other[2]) * self._cost(self._join(one[1], other[1]), True) - sum(each)

        prices = {(i, j): added(parts[i], parts[j]) for i, j in combinations(range(len(parts)), 2)}
        left = list(range(len(parts)))
        while len(left) > 1:
            i, j = min(combinations(left, 2), key=lambda pair: (prices[pair], pair))
            parts.append((parts[i][0] + parts[j][0], self._join(parts[i][1], parts[j][1]), parts[i][2] + parts[j][2]))
            left = [each for each in left if each not in (i, j)]
            prices |= {(each, len(parts) - 1): added(parts[each], parts[-1]) for each in left}
            left.append(len(parts) - 1)
        return parts[left[0]][0]

    def _moved(self, groups: tuple[_Together, ...], limit: int) -> tuple[_Together, ...]:
        """Groups between which single rows have moved, as long as the estimates' sum falls."""

        def price(rows: Sequence[int], shares: bool) -> float:
            return sum(self._counts[row] for row in rows) * self._cost(self._whole(rows), shares) if rows else 0.0

        parts = [(list(group.rows), group.shares) for group in groups]
        costs = [price(*part) for part in parts]
        for _ in range(_PASSES):
            again = False
            for row in range(len(self._held)):
                own = next(i for i, (rows, _) in enumerate(parts) if row in rows)
                rest = [each for each in parts[own][0] if each != row]
                spared = costs[own] - price(rest, parts[own][1])
                tried = [
                    (price([*rows, row], shares) - costs[i], i) for i, (rows, shares) in enumerate(parts) if i != own
                ]
                added, to = min(tried, default=(math.inf, own))
                if added < spared * (1 - 1e-9):
                    parts[own] = rest, parts[own][1]
                    parts[to] = [*parts[to][0], row], parts[to][1]
                    costs[own], costs[to] = costs[own] - spared, costs[to] + added
                    again = True
            if not again:
                break
        found = (_Together(tuple(sorted(rows)), shares) for rows, shares in parts if rows)
        return tuple(sorted(found, key=lambda group: group.rows))

    def state(self, groups: Sequence[_Together], assess: Assess) -> _State:
        """The state in which each group's steps do the same."""
        for lenient in (True, False):
            of = {
                row: self._said(self._whole(group.rows, lenient), group.shares)
                for group in groups
                for row in group.rows
            }
            try:
                return assess([tuple(of[number] for number in numbers) for numbers in self._of])
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
        return _FULL[mine.decision.cfg_shared and theirs.decision.cfg_shared]

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
