"""Look-ahead roles, buckets, progress, and the mapping of one schedule onto another."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difa_compile.decision import FULL, REUSE, Basis, Decision, Kind, Window, WindowShape
from difa_compile.errors import DecisionError, ScheduleError
from difa_compile.plan.schedule import (
    FULL_ROLE,
    Bucket,
    HeadCache,
    Promotion,
    Role,
    assign_roles,
    buckets,
    check_progress,
    forecast_weights,
    nearest_steps,
    normalised_progress,
    output_sources,
    scheduler_progress,
    take_rows,
    uniform_progress,
)

W1, W2 = Window(WindowShape.BAND, 4), Window(WindowShape.DISC, 3)
FULL_CFG = Decision(Kind.FULL, None, True)
WINDOW = Decision(Kind.WINDOW, W1)
RESIDUAL = Decision(Kind.WINDOW_RESIDUAL, W1)
RESIDUAL_2 = Decision(Kind.WINDOW_RESIDUAL, W2)
LETTERS = {
    "F": FULL,
    "f": FULL_CFG,
    "W": WINDOW,
    "R": RESIDUAL,
    "r": Decision(Kind.WINDOW_RESIDUAL, W1, True),
    "Q": RESIDUAL_2,
    ".": REUSE,
    ",": Decision(Kind.REUSE, None, True),
    "1": Decision(Kind.FORECAST, order=1),
    "2": Decision(Kind.FORECAST, None, True, 2, Basis.STEP),
    "3": Decision(Kind.FORECAST, order=3),
}


def column(text: str) -> list[Decision]:
    return [LETTERS[letter] for letter in text]


def rows(*columns: str) -> list[tuple[Decision, ...]]:
    """Rows of a schedule from one string per site, one letter per step."""
    return [tuple(LETTERS[letter] for letter in letters) for letters in zip(*columns, strict=True)]


def text(rows_: tuple[tuple[Decision, ...], ...], site: int = 0) -> str:
    names = {decision: letter for letter, decision in LETTERS.items()}
    return "".join(names[row[site]] for row in rows_)


def made_valid(decisions: list[Decision]) -> list[Decision]:
    """Readers without filler become full, and all residuals of one full step take the window of the first."""
    valid: list[Decision] = []
    window: Window | None = None
    for wanted in decisions:
        decision = wanted
        computed = sum(earlier.kind.fills("output") for earlier in valid)
        if decision.kind.reads == "output" and computed <= decision.order:
            decision = FULL
        if decision.kind is Kind.WINDOW_RESIDUAL:
            if not any(earlier.is_full for earlier in valid):
                decision = FULL
            else:
                window = window or decision.window
                decision = Decision(Kind.WINDOW_RESIDUAL, window, decision.cfg_shared)
        if decision.is_full:
            window = None
        valid.append(decision)
    return valid


def schedules(min_steps: int = 1, max_steps: int = 60) -> st.SearchStrategy[list[tuple[Decision, ...]]]:
    """Valid rows of 1 to 3 sites."""

    def of(size: tuple[int, int]) -> st.SearchStrategy[list[tuple[Decision, ...]]]:
        steps, sites = size
        one = st.lists(st.sampled_from(list(LETTERS.values())), min_size=steps, max_size=steps).map(made_valid)
        return st.lists(one, min_size=sites, max_size=sites).map(lambda columns: list(zip(*columns, strict=True)))

    return st.tuples(st.integers(min_steps, max_steps), st.integers(1, 3)).flatmap(of)


# --- roles -----------------------------------------------------------------------------------------------------------


def outputs(decisions: str) -> str:
    return "".join(" >"[role[0].emit_output] for role in assign_roles(rows(decisions)))


def residuals(decisions: str) -> list[str | None]:
    return [role[0].residual_window and str(role[0].residual_window) for role in assign_roles(rows(decisions))]


@pytest.mark.parametrize(
    ("decisions", "written"),
    [
        ("FFF", "   "),
        ("F.F", ">  "),
        ("F...F.", ">   > "),
        ("FW.", " > "),
        ("FR.R.", " > > "),
        ("W.", "> "),
        ("f,", "> "),
        ("FF1", ">> "),
        ("FFF1FF", " >>   "),  # the last two alone
        ("FFF2", ">>> "),
        ("FFFF3..", ">>>>   "),
        ("FF.1F1", ">>  > "),  # what is reused is older for the next
        ("FWR1", " >> "),
        ("FFF.F2", " >> > "),
        ("FF1F.", ">> > "),
    ],
)
def test_outputs_are_written_where_a_reuse_or_a_forecast_reads_them(decisions: str, written: str) -> None:
    assert outputs(decisions) == written


@pytest.mark.parametrize(
    ("decisions", "windows"),
    [
        ("FF", [None, None]),
        ("FR", ["band:4", None]),
        ("FFR", [None, "band:4", None]),  # the next full step takes over
        ("F.RWR", ["band:4", None, None, None, None]),  # neither reuse nor window refreshes it
        ("fr", ["band:4", None]),  # full+cfg counts as full
        ("FRFQ", ["band:4", None, "disc:3", None]),
        ("FWF", [None, None, None]),  # a window without residual reads nothing
    ],
)
def test_residuals_are_taken_where_one_is_read_before_the_next_full_step(
    decisions: str, windows: list[str | None]
) -> None:
    assert residuals(decisions) == windows


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("FF", ".F"), "step 0, site 1: reuse needs the output"),
        (("..",), "step 0, site 0: reuse"),
        (("FF", "FF", "WR"), r"step 1, site 2: window\(band:4\)\+residual needs the residual"),
        (("R",), "step 0, site 0"),
        (("FRQ",), "step 2, site 0: .*residual of step 0, which step 1 reads with window band:4"),
        (("F1",), "step 1, site 0: forecast:1 needs the outputs of 2 earlier steps, but only 1 earlier step of this"),
        (("1",), "step 0, site 0: forecast:1 needs the outputs of 2 earlier steps, but no earlier step of this site"),
        (("FFFF", "FF12"), "step 3, site 1: forecast.* of 3 earlier steps, but only 2 earlier steps of this site"),
        (("FFF3",), "step 3, site 0: forecast:3 needs the outputs of 4 earlier steps, but only 3 earlier steps"),
    ],
)
def test_readers_without_filler_are_refused(columns: tuple[str, ...], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        assign_roles(rows(*columns))


def test_empty_and_ragged_schedules_are_refused() -> None:
    with pytest.raises(ScheduleError, match="at least one step"):
        assign_roles([])
    with pytest.raises(ScheduleError, match="step 1 has decisions for 1 sites, but step 0 has 2"):
        assign_roles([(FULL, FULL), (FULL,)])


@given(schedules())
def test_roles_carry_out_the_plan(plan: list[tuple[Decision, ...]]) -> None:
    """Run the caches: each reader finds what the definition says, and nothing is written that nobody reads."""
    roles = assign_roles(plan)
    assert [tuple(role.decision for role in row) for row in roles] == plan
    for site in range(len(plan[0])):
        computed: list[int] = []
        held: list[int] = []
        """The steps whose outputs were written, the newest first."""
        residual: tuple[int, Window | None] | None = None
        unread: set[tuple[str, int]] = set()
        sources = output_sources([row[site] for row in plan])
        for step, row in enumerate(roles):
            role = row[site]
            earlier = range(step)
            if role.reads_output:
                wanted = computed[: role.decision.order + 1]
                assert held[: role.decision.order + 1] == wanted  # those computed last, and none of them left out
                assert sources[step] == tuple(wanted)
                unread -= {("output", each) for each in wanted}
            elif role.decision.kind.fills("output"):
                computed.insert(0, step)
            if role.reads_residual:
                last_full = max(s for s in earlier if plan[s][site].is_full)
                assert residual == (last_full, role.decision.window)
                unread.discard(("residual", last_full))
            if role.emit_output:
                held.insert(0, step)
                unread.add(("output", step))
            if role.emit_residual:
                residual = (step, role.residual_window)
                unread.add(("residual", step))
            # contract 2: in one variant a cache is an input or an output, never both
            assert not (role.emit_output and role.reads_output)
            assert not (role.emit_residual and role.reads_residual)
        assert not unread


@pytest.mark.parametrize(
    "arguments",
    [
        (REUSE, True),
        (LETTERS["1"], True),
        (WINDOW, False, True, W1),
        (FULL, False, True),
        (FULL, False, False, W1),
    ],
)
def test_roles_that_contradict_themselves_are_refused(arguments: tuple[object, ...]) -> None:
    with pytest.raises(DecisionError):
        Role(*arguments)  # type: ignore[arg-type]


def test_role_text() -> None:
    assert str(FULL_ROLE) == "full"
    assert str(Role(FULL, True, True, W1)) == "full >output >residual(band:4)"


# --- forecasts -------------------------------------------------------------------------------------------------------

_EXACT = 1e-10
"""Of the sum of the weighted outputs' sizes. Steps are 0.001 or more of the schedule apart: a difference of two loses
three digits."""


@st.composite
def forecasts(draw: st.DrawFn) -> tuple[tuple[float, ...], int, tuple[int, ...]]:
    """A schedule of uneven steps, one of them, and two to four earlier ones, the newest first."""
    order = draw(st.integers(1, 3))
    places = draw(st.lists(st.integers(0, 1000), min_size=order + 2, max_size=12, unique=True))
    step = draw(st.integers(order + 1, len(places) - 1))
    sources = draw(st.lists(st.integers(0, step - 1), min_size=order + 1, max_size=order + 1, unique=True))
    return tuple(place / 1000 for place in sorted(places, reverse=True)), step, tuple(sorted(sources, reverse=True))


@given(forecasts(), st.sampled_from(Basis), st.lists(st.integers(-9, 9), min_size=4, max_size=4))
def test_a_polynomial_of_the_order_of_a_forecast_is_forecast_exactly(
    case: tuple[tuple[float, ...], int, tuple[int, ...]], basis: Basis, coefficients: list[int]
) -> None:
    progress, step, sources = case
    weights = forecast_weights(progress, step, sources, basis)
    assert sum(weights) == pytest.approx(1, abs=_EXACT * sum(map(abs, weights)))

    def value(at: int) -> float:
        place = progress[at] if basis is Basis.PROGRESS else at
        return sum(factor * place**power for power, factor in enumerate(coefficients[: len(sources)]))

    parts = [weight * value(source) for weight, source in zip(weights, sources, strict=True)]
    assert sum(parts) == pytest.approx(value(step), abs=_EXACT * max(1.0, *map(abs, parts)))


@pytest.mark.parametrize(
    ("progress", "step", "sources", "weights"),
    [
        (uniform_progress(8), 6, (4, 0), (1.5, -0.5)),  # half as far again
        (uniform_progress(8), 3, (2, 1, 0), (3, -3, 1)),
        ((1.0, 0.8, 0.2), 2, (1, 0), (4, -3)),
        ((1.0, 0.5, 0.5), 2, (1, 0), (1, 0)),  # the same timestep again: the same output
    ],
)
def test_weights_by_hand(
    progress: tuple[float, ...], step: int, sources: tuple[int, ...], weights: tuple[float, ...]
) -> None:
    assert forecast_weights(progress, step, sources) == pytest.approx(weights)


@pytest.mark.parametrize(
    ("progress", "step", "sources", "weights"),
    [
        ((1.0, 0.5, 0.5, 0.2), 3, (2, 1), (2, -1)),
        ((1.0, 0.5, 0.5 - 1e-12, 0.2), 3, (2, 1), (2, -1)),
        ((1.0, 1.0, 0.5, 0.5, 0.1), 4, (2, 1, 0), (6, -8, 3)),
    ],
)
def test_where_outputs_are_of_one_timestep_the_number_of_the_step_counts(
    progress: tuple[float, ...], step: int, sources: tuple[int, ...], weights: tuple[float, ...]
) -> None:
    """As with Heun's two calls of a timestep: through two points at one place goes no line."""
    assert forecast_weights(progress, step, sources) == pytest.approx(weights)


def test_in_steps_the_timesteps_do_not_count() -> None:
    assert forecast_weights((1.0, 0.8, 0.2), 2, (1, 0), Basis.STEP) == (2, -1)
    assert forecast_weights((1.0, 0.8, 0.2), 2, (1, 0), "step") == (2, -1)


def test_sources_of_each_step() -> None:
    sources = output_sources(column("FW.1FF2."))
    assert sources == ((), (), (1,), (1, 0), (), (), (5, 4, 1), (5,))
    assert output_sources(column("F12")) == ((), (0,), (0,))  # as many as there are


# --- heads -----------------------------------------------------------------------------------------------------------

D = Decision.parse
R1 = f"window({W1})+residual"


def of_one_site(*texts: str) -> list[tuple[Decision]]:
    return [(D(text),) for text in texts]


def caches_of(*texts: str) -> list[tuple[str, str]]:
    """What each step reads and what it writes of single heads."""
    roles = assign_roles(of_one_site(*texts))
    return [(", ".join(map(str, role.head_reads)), ", ".join(map(str, role.head_writes))) for (role,) in roles]


def test_heads_that_are_read_alike_share_a_cache_and_no_others_are_written() -> None:
    assert caches_of(
        "full", "heads(0-3:reuse;4-7:full)", "heads(0-1,4:reuse;2-3,5-7:full)", "heads(4:reuse;0-3,5-7:full)"
    ) == [
        ("", "output of heads 0-1, output of heads 2-3"),
        ("output of heads 0-1, output of heads 2-3", "output of heads 4"),
        ("output of heads 0-1, output of heads 4", ""),
        ("output of heads 4", ""),
    ]


def test_a_head_reads_the_latest_step_that_computed_it_in_whatever_decision() -> None:
    assert caches_of("full", f"window({W1})", "reuse", "heads(0:reuse;1:full)") == [
        ("", ""),
        ("", "output of heads 0"),
        ("", ""),
        ("output of heads 0", ""),
    ]


def test_a_residual_is_that_of_the_latest_step_in_which_the_head_was_full() -> None:
    assert caches_of("full", "heads(0:full;1:reuse)", f"heads(0:{R1};1:{R1.replace('4', '2')})", "full") == [
        ("", "output of heads 1, residual(band:2) of heads 1"),
        ("output of heads 1", "residual(band:4) of heads 0"),
        ("residual(band:4) of heads 0, residual(band:2) of heads 1", ""),
        ("", ""),
    ]


def test_decisions_by_heads_fill_the_output_and_no_residual_of_the_whole() -> None:
    roles = assign_roles(of_one_site("full", "heads(0:full;1:reuse)", "reuse", R1))
    assert [role.emit_output for (role,) in roles] == [False, True, False, False]
    assert [role.emit_residual for (role,) in roles] == [True, False, False, False]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["heads(0:reuse;1:full)"], "step 0, site 0: head 0 is reused, but no earlier step"),
        ([f"window({W1})", f"heads(0:{R1};1:full)"], "step 1, site 0: .* in which head 0 is full, but there is none"),
        (
            ["full", f"heads(0:{R1};1:full)", "heads(0:window(disc:3)+residual;1:full)"],
            "step 2, site 0: .* of head 0 reads the residual of step 0, which step 1 reads with window band:4",
        ),
        (["full", "heads(0:full;1:reuse)", "heads(0-1:full;2:reuse)"], "step 1 names 2 heads, that of step 2 3"),
    ],
)
def test_heads_without_a_filler_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        assign_roles(of_one_site(*texts))


HEADS = 4
forms = st.sampled_from([FULL, REUSE, WINDOW, RESIDUAL, RESIDUAL_2])


def columns_by_heads(min_steps: int = 1, max_steps: int = 12) -> st.SearchStrategy[list[Decision]]:
    """Valid columns of one site of four heads: decisions by heads among plain ones."""

    def valid(columns: list[list[Decision]]) -> list[Decision]:
        made = [made_valid(column) for column in columns]
        decisions = []
        for step in zip(*made, strict=True):
            decision = Decision.of_heads(step)
            plain = decision.kind in (Kind.REUSE, Kind.WINDOW_RESIDUAL)
            decisions.append(FULL if plain else decision)  # as a whole they would read other caches
        return decisions

    def of(steps: int) -> st.SearchStrategy[list[Decision]]:
        one = st.lists(forms, min_size=steps, max_size=steps)
        return st.lists(one, min_size=HEADS, max_size=HEADS).map(valid)

    return st.integers(min_steps, max_steps).flatmap(of)


def windows_agree(column: list[Decision]) -> bool:
    try:
        assign_roles([(decision,) for decision in column])
    except ScheduleError as error:
        return "a head keeps one residual" not in str(error)  # any other is the test's to meet
    return True


@given(columns_by_heads().filter(windows_agree))
def test_roles_carry_out_what_is_said_of_heads(column: list[Decision]) -> None:
    """Run the caches: each head finds what the definition says, and nothing is written that nobody reads."""
    held: dict[HeadCache, int] = {}
    unread: set[HeadCache] = set()
    for step, (role,) in enumerate(assign_roles([(decision,) for decision in column])):
        assert not {(c.heads, c.window is None) for c in role.head_reads} & {
            (c.heads, c.window is None) for c in role.head_writes
        }, "contract 2: a cache is an input or an output, never both"
        read = {(head, cache.window): held[cache] for cache in role.head_reads for head in cache.heads}
        for head in range(HEADS):
            form, before = column[step].form_of(head), range(step)
            if form.kind is Kind.REUSE:
                assert read.pop((head, None)) == max(
                    s for s in before if column[s].form_of(head).kind is not Kind.REUSE
                )
            elif form.kind is Kind.WINDOW_RESIDUAL:
                assert read.pop((head, form.window)) == max(s for s in before if column[s].form_of(head).is_full)
        assert not read
        unread -= set(role.head_reads)
        held |= dict.fromkeys(role.head_writes, step)
        assert not unread & set(role.head_writes)
        unread |= set(role.head_writes)
    assert not unread


@given(columns_by_heads(2).filter(windows_agree), st.integers(1, 20))
def test_on_another_schedule_heads_read_nothing_older_than_in_the_plan(column: list[Decision], steps: int) -> None:
    sources = nearest_steps(uniform_progress(len(column)), uniform_progress(steps))
    taken, promotions = take_rows([(decision,) for decision in column], sources)
    assign_roles(taken)
    promoted = {promotion.step for promotion in promotions}

    def latest(decisions: list[Decision], step: int, head: int, full: bool) -> int:
        kinds = [decision.form_of(head) for decision in decisions[:step]]
        fits = [i for i, form in enumerate(kinds) if (form.is_full if full else form.kind is not Kind.REUSE)]
        return fits[-1] if fits else -1

    new = [decision for (decision,) in taken]
    for step, source in enumerate(sources):
        fits = True
        for head, form in enumerate(column[source].forms):
            if form.kind in (Kind.REUSE, Kind.WINDOW_RESIDUAL):
                full = form.kind is Kind.WINDOW_RESIDUAL
                found = latest(new, step, head, full)
                fits = fits and (sources[found] if found >= 0 else -1) >= latest(column, source, head, full)
        assert (step in promoted) == (not fits)
        assert new[step] == (column[source] if fits else FULL)


def test_a_promotion_says_which_head_wants_what() -> None:
    rows_ = of_one_site("full", "heads(0:full;1:reuse)", f"heads(0:{R1};1:reuse)+cfg", "full")
    taken, promotions = take_rows(rows_, (0, 2, 3))
    assert [str(row[0]) for row in taken] == ["full", "full+cfg", "full"]
    assert promotions == (
        Promotion(
            1,
            0,
            rows_[2][0],
            "it reads the residual of head 0 of the plan's step 1, which no earlier step of this schedule follows",
        ),
    )


def test_a_role_by_heads_has_a_cache_per_group_unless_told_otherwise() -> None:
    decision = D(f"heads(0,3:reuse;1:{R1};2:full)")
    assert Role(decision).head_reads == (HeadCache((0, 3)), HeadCache((1,), W1))
    assert Role(decision).depends_on_calls
    apart = (HeadCache((0,)), HeadCache((1,), W1), HeadCache((3,)))
    assert Role(decision, head_reads=apart).head_reads == apart
    assert str(Role(decision, head_writes=(HeadCache((2,)),))) == f"{decision} >output of heads 2"


@pytest.mark.parametrize(
    ("text", "reads", "writes"),
    [
        ("heads(0,3:reuse;1-2:full)", (HeadCache((0,)),), ()),
        ("heads(0,3:reuse;1-2:full)", (HeadCache((0, 3)), HeadCache((3,))), ()),
        ("heads(0,3:reuse;1-2:full)", (HeadCache((0, 3), W1),), ()),
        ("full", (HeadCache((0,)),), ()),
        ("heads(0,3:reuse;1-2:full)", (), (HeadCache((0,)),)),
        (f"window({W1})", (), (HeadCache((0,), W1),)),
        ("reuse", (), (HeadCache((0,)),)),
    ],
)
def test_roles_with_caches_of_heads_that_cannot_be_are_refused(
    text: str, reads: tuple[HeadCache, ...], writes: tuple[HeadCache, ...]
) -> None:
    with pytest.raises(DecisionError, match="heads"):
        Role(D(text), head_reads=reads, head_writes=writes)


def test_a_decision_by_heads_computes_an_output_that_others_read() -> None:
    again = "heads(0:reuse;1:full)"
    roles = [role for (role,) in assign_roles(of_one_site("full", again, "forecast:1", again, "reuse"))]
    assert [role.emit_output for role in roles] == [True, True, False, True, False]
    assert [role.head_writes for role in roles] == [(HeadCache((0,)),), (), (), (), ()], "a forecast computes no head"
    assert [role.head_reads for role in roles] == [(), (HeadCache((0,)),), (), (HeadCache((0,)),), ()]


def test_heads_of_a_site_whose_block_is_left_out_neither_read_nor_fill() -> None:
    blocks, first = (1, None), (HeadCache((0,)),)
    by_heads = (D("heads(0:reuse;1:full)"), FULL)
    rows_ = [(FULL, FULL), (FULL, REUSE), by_heads]
    roles = [row[0] for row in assign_roles(rows_, blocks)]
    assert [(role.covered, role.head_reads, role.head_writes) for role in roles] == [
        (False, (), first),
        (True, (), ()),
        (False, first, ()),
    ]
    for sources in ((0, 1, 2), (0, 2), (1, 2)):  # what the plan's step 1 has left out is not asked for
        taken, promotions = take_rows(rows_, sources, blocks)
        assert taken[-1] == by_heads
        assert {promotion.site for promotion in promotions} == ({1} if sources[0] == 1 else set())
    with pytest.raises(ScheduleError, match=r"heads.* is asked for, but the block that holds the site is left out"):
        assign_roles([*rows_, (by_heads[0], REUSE)], blocks)
    with pytest.raises(DecisionError, match="block is left out"):
        Role(FULL, covered=True, head_writes=first)


# --- buckets ---------------------------------------------------------------------------------------------------------


def test_buckets_group_equal_rows_in_order_of_first_step() -> None:
    roles = assign_roles(rows("F.F..F", "FFFFFF"))
    writing, plain, reusing = (Role(FULL, True), FULL_ROLE), (FULL_ROLE, FULL_ROLE), (Role(REUSE), FULL_ROLE)
    assert buckets(roles) == (Bucket(writing, (0, 2)), Bucket(reusing, (1, 3, 4)), Bucket(plain, (5,)))


@given(schedules())
def test_buckets_partition_the_steps(plan: list[tuple[Decision, ...]]) -> None:
    roles = assign_roles(plan)
    found = buckets(roles)
    assert sorted(step for bucket in found for step in bucket.steps) == list(range(len(plan)))
    assert all(roles[step] == bucket.row for bucket in found for step in bucket.steps)
    assert len({bucket.row for bucket in found}) == len(found)


# --- progress --------------------------------------------------------------------------------------------------------


def test_uniform_progress_is_trailing() -> None:
    assert uniform_progress(4) == (1.0, 0.75, 0.5, 0.25)


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "4"])
def test_the_number_of_steps_must_be_positive_and_whole(steps: object) -> None:
    with pytest.raises(ScheduleError, match="number of steps"):
        uniform_progress(steps)  # type: ignore[arg-type]


def test_normalised_progress() -> None:
    assert normalised_progress([1000, 750, 750, 1], 1000) == (1.0, 0.75, 0.75, 0.001)
    assert normalised_progress([1000.0001, -0.0001], 1000) == (1.0, 0.0)
    assert normalised_progress([0, 250, 500], 1000) == (1.0, 0.75, 0.5)  # inverted sigmas count from the other end
    assert normalised_progress([7], 10) == (0.7,)


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ([], "empty"),
        ([1200, 3], "step 0: timestep 1200.0 lies outside"),
        ([5, -1], "step 1: timestep -1.0"),
        ([float("nan")], "step 0"),
        ([900, 500, 700], "step 2: progress rises"),
    ],
)
def test_odd_timesteps_are_refused(timesteps: list[float], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        normalised_progress(timesteps, 1000)
    with pytest.raises(ScheduleError, match="training timesteps"):
        normalised_progress([1], 0)


@pytest.mark.parametrize(
    ("progress", "message"), [([], "empty"), ([1.5], r"\[0, 1\]"), ([float("nan")], r"\[0, 1\]"), ([0.1, 0.2], "rises")]
)
def test_odd_progress_is_refused(progress: list[float], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        check_progress(progress)


class _Config:
    num_train_timesteps = 1000


class _Scheduler:
    """As diffusers' schedulers behave: unset until ``set_timesteps``; ``calls`` model calls per step."""

    def __init__(self, calls: int = 1, needs_mu: bool = False) -> None:
        self.config = _Config()
        self.calls, self.needs_mu = calls, needs_mu
        self.num_inference_steps: int | None = None
        self.timesteps = list(range(999, -1, -1))

    def set_timesteps(self, steps: int) -> None:
        if self.needs_mu:
            raise ValueError("mu is missing")
        self.num_inference_steps = steps
        self.timesteps = [1000 - 1000 * step // steps for step in range(steps) for _ in range(self.calls)]


def test_scheduler_is_copied_unless_it_is_set() -> None:
    fresh = _Scheduler()
    before = copy.deepcopy(fresh.__dict__, {id(fresh.config): fresh.config})
    assert scheduler_progress(fresh, 4) == (1.0, 0.75, 0.5, 0.25)
    assert fresh.__dict__ == before
    fresh.num_inference_steps, fresh.timesteps = 4, [800, 600, 400, 200]  # custom sigmas
    assert scheduler_progress(fresh, 4) == (0.8, 0.6, 0.4, 0.2)
    assert scheduler_progress(fresh, 2) == (1.0, 0.5)


def test_second_order_schedulers_have_one_value_per_model_call() -> None:
    assert scheduler_progress(_Scheduler(calls=2), 2) == (1.0, 1.0, 0.5, 0.5)


def test_a_scheduler_that_cannot_be_set_says_what_to_do() -> None:
    with pytest.raises(
        ScheduleError, match=r"_Scheduler cannot be set to 4 steps here .mu is missing.*set its timesteps"
    ):
        scheduler_progress(_Scheduler(needs_mu=True), 4)
    with pytest.raises(ScheduleError, match="object has no timesteps"):
        scheduler_progress(object(), 4)


def test_real_schedulers() -> None:
    diffusers = pytest.importorskip("diffusers", reason="the schedulers are diffusers'")
    ddim = diffusers.DDIMScheduler()
    assert scheduler_progress(ddim, 50)[:2] == (0.98, 0.96)
    assert len(scheduler_progress(diffusers.HeunDiscreteScheduler(), 10)) == 19
    assert scheduler_progress(diffusers.DPMSolverMultistepScheduler(), 20)[0] == pytest.approx(1, abs=0.01)
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert scheduler_progress(flow, 8)[0] == 1.0
    inverted = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    assert scheduler_progress(inverted, 8) == pytest.approx(
        scheduler_progress(diffusers.FlowMatchEulerDiscreteScheduler(), 8)
    )
    shifting = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(ScheduleError, match="set its timesteps first"):
        scheduler_progress(shifting, 8)
    shifting.set_timesteps(8, mu=1.0)
    assert len(scheduler_progress(shifting, 8)) == 8


# --- mapping ---------------------------------------------------------------------------------------------------------

progresses = (
    st.lists(st.integers(0, 1000), min_size=1, max_size=40)
    .map(lambda values: tuple(value / 1000 for value in sorted(values, reverse=True)))
    .map(check_progress)
)


@given(progresses)
def test_same_progress_maps_to_itself(progress: tuple[float, ...]) -> None:
    assert nearest_steps(progress, progress) == tuple(range(len(progress)))


@given(progresses, progresses)
def test_mapping_is_nearest_and_never_goes_back(own: tuple[float, ...], wanted: tuple[float, ...]) -> None:
    found = nearest_steps(own, wanted)
    assert list(found) == sorted(found)
    for value, step in zip(wanted, found, strict=True):
        closest = min(abs(candidate - value) for candidate in own)
        assert abs(own[step] - value) == pytest.approx(closest, abs=1e-8)
    distinct = tuple(dict.fromkeys(own))
    assert nearest_steps(distinct, tuple(dict.fromkeys(wanted))) == tuple(
        min(range(len(distinct)), key=lambda step: (round(abs(distinct[step] - value), 6), step))
        for value in dict.fromkeys(wanted)
    )


def test_ties_go_to_the_earlier_step() -> None:
    assert nearest_steps((1.0, 0.5), (0.75,)) == (0,)
    # 0.35 lies half-way between 0.36 and 0.34, but in floats a little nearer to 0.34
    fifty = uniform_progress(50)
    assert abs(fifty[33] - 0.35) < abs(fifty[32] - 0.35)
    assert nearest_steps(fifty, (0.35,)) == (32,)


def test_repeated_timesteps_are_matched_in_order() -> None:
    assert nearest_steps((1.0, 1.0, 0.5, 0.5), (1.0, 1.0, 0.6, 0.6, 0.4)) == (0, 1, 2, 3, 3)
    assert nearest_steps((1.0, 0.5), (1.0, 1.0, 0.5)) == (0, 0, 1)
    assert nearest_steps((1.0, 1.0, 0.5), (1.0, 0.5)) == (0, 2)


# --- taking rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "source_steps", "taken", "promoted"),
    [
        ("F.F.", (0, 1, 2, 3), "F.F.", []),
        ("F.F.", (0, 2), "FF", []),
        ("F.F.", (1, 3), "FF", [0, 1]),  # both fillers fell out
        ("F..", (1, 2), "F.", [0]),  # the promoted reader fills the cache for the next
        ("F.F.", (0, 3), "FF", [1]),  # an older output of the same site will not do
        ("F.,", (2,), "f", [0]),  # the CFG flag is kept
        ("FRF", (1, 2), "FF", [0]),
        ("FFR", (0, 2), "FF", [1]),
        ("Fr", (1,), "f", [0]),
        ("FW.R", (0, 2, 3), "FFR", [1]),  # the promoted reuse is a full step: a fresher residual
        ("FRR", (1, 1, 2), "FRR", [0]),
        ("FW.R", (0, 1, 2, 3), "FW.R", []),
        ("FW.", (0, 0, 1, 1, 2, 2), "FFWW..", []),
        ("FWR", (1, 2), "WF", [1]),
        ("FF1", (2,), "F", [0]),
        ("FF11", (1, 2, 3), "FF1", [1]),  # one output is held: the promoted forecast computes the other
        ("FF11", (0, 2, 3), "FF1", [1]),  # two rows are followed, but not the newest
        ("FF11", (0, 1, 3), "FF1", []),
        ("FFF11", (1, 2, 4), "FF1", []),  # of an order's outputs any will do, save the newest
        ("FFF22", (2, 3, 4), "Fff", [1, 2]),
        ("FFFF33", (3, 4, 5, 5, 5), "FFFF3", [1, 2, 3]),
        ("FF1.", (1, 2, 3), "FF.", [1]),
        ("FF.1", (1, 2, 3), "F.F", [2]),  # reuse needs one, the forecast two
        ("FFFF11", (0, 4, 5), "FF1", [1]),
    ],
)
def test_promotion_cases(plan: str, source_steps: tuple[int, ...], taken: str, promoted: list[int]) -> None:
    result, promotions = take_rows(rows(plan), source_steps)
    assert text(result) == taken
    assert [promotion.step for promotion in promotions] == promoted
    assert all(promotion.wanted == column(plan)[source_steps[promotion.step]] for promotion in promotions)


def test_promotions_say_why() -> None:
    _, promotions = take_rows(rows("FF", "F."), (1,))
    reason = "it reads the output of the plan's step 0, which no earlier step of this schedule follows"
    assert promotions == (Promotion(0, 1, REUSE, reason),)
    _, promotions = take_rows(rows("FFFFF", "FFF22"), (2, 3, 4))
    assert [promotion.reason for promotion in promotions] == [
        f"it needs the outputs of 3 earlier steps, and in this schedule only {computed} computes one"
        for computed in ("1 earlier step", "2 earlier steps")
    ]


@pytest.mark.parametrize("source_steps", [(0, 2), (-1,), (1, 0)])
def test_impossible_sources_are_refused(source_steps: tuple[int, ...]) -> None:
    with pytest.raises(ScheduleError, match="must not go back"):
        take_rows(rows("F."), source_steps)


@st.composite
def taken(draw: st.DrawFn) -> tuple[list[tuple[Decision, ...]], tuple[int, ...]]:
    plan = draw(schedules())
    sources = draw(st.lists(st.integers(0, len(plan) - 1), min_size=1, max_size=80))
    return plan, tuple(sorted(sources))


@given(taken())
def test_every_reader_finds_something_recent_enough(case: tuple[list[tuple[Decision, ...]], tuple[int, ...]]) -> None:
    plan, source_steps = case
    result, promotions = take_rows(plan, source_steps)
    assign_roles(result)  # every reader has a filler, and no two windows meet at one residual
    promoted = {(promotion.step, promotion.site): promotion for promotion in promotions}
    assert len(promoted) == len(promotions)
    for step, source in enumerate(source_steps):
        for site, decision in enumerate(result[step]):
            planned = plan[source][site]
            if (step, site) in promoted:
                assert promoted[step, site].wanted == planned
                assert planned.kind.reads
                assert decision == Decision(Kind.FULL, None, planned.cfg_shared)
            else:
                assert decision == planned


def fills(decision: Decision, reader: Decision) -> bool:
    """Whether a step with ``decision`` computes what ``reader`` reads."""
    if reader.kind is Kind.WINDOW_RESIDUAL:
        return decision.is_full
    return decision.kind not in (Kind.REUSE, Kind.FORECAST)


@given(taken())
def test_promotion_happens_where_the_filler_fell_out_and_only_there(
    case: tuple[list[tuple[Decision, ...]], tuple[int, ...]],
) -> None:
    plan, source_steps = case
    result, promotions = take_rows(plan, source_steps)
    promoted = {(promotion.step, promotion.site) for promotion in promotions}
    for step, source in enumerate(source_steps):
        for site in range(len(plan[0])):
            reader = plan[source][site]
            if not reader.kind.reads:
                continue
            needed = max(row for row in range(source) if fills(plan[row][site], reader))
            followed = needed in source_steps[:step]
            held = [s for s in range(step) if fills(result[s][site], reader)]
            recent = bool(held) and source_steps[held[-1]] >= needed
            assert ((step, site) in promoted) == (not recent or len(held) <= reader.order)
            assert recent or not followed
            if (step, site) not in promoted:
                # what is read is the wanted filler, or a reader of the same gap that was promoted before
                latest = held[-1]
                assert source_steps[latest] == needed or (
                    (latest, site) in promoted and needed < source_steps[latest] <= source
                )
                assert followed or (latest, site) in promoted


@pytest.mark.parametrize(
    ("steps", "once", "often"),
    [(20, "FFF" + "1" * 17, "FF" + "f." * 9), (7, "FF11111", "FFffffF"), (3, "FF1", "FFF")],
)
def test_fifty_steps_with_forecasts_onto_fewer(steps: int, once: str, often: str) -> None:
    """What is computed once serves to the end. Of steps computed often too few are followed: others are instead."""
    plan = rows("FFFF" + "1" * 46, "FFF" + "F222." * 9 + "F2")
    result, promotions = take_rows(plan, nearest_steps(uniform_progress(50), uniform_progress(steps)))
    assign_roles(result)
    assert (text(result), text(result, 1)) == (once, often)
    assert all(p.reason and p.wanted.kind.reads == "output" for p in promotions)


@given(schedules())
def test_the_same_rows_are_taken_unchanged(plan: list[tuple[Decision, ...]]) -> None:
    assert take_rows(plan, range(len(plan))) == (tuple(plan), ())


@given(schedules(max_steps=20), st.integers(1, 4))
def test_repeating_every_row_promotes_nothing(plan: list[tuple[Decision, ...]], times: int) -> None:
    repeated = [step for step in range(len(plan)) for _ in range(times)]
    assert take_rows(plan, repeated)[1] == ()


def nearest_by_trying_all(own, wanted):
    """The definition of :func:`nearest_steps`, every step against every other."""
    groups = []
    for step, value in enumerate(own):
        if step and abs(value - own[step - 1]) <= 1e-9:
            groups[-1].append(step)
        else:
            groups.append([step])
    found, visit = [], 0
    for step, value in enumerate(wanted):
        visit = visit + 1 if step and abs(value - wanted[step - 1]) <= 1e-9 else 0
        distances = [abs(own[group[0]] - value) for group in groups]
        group = groups[next(i for i, distance in enumerate(distances) if distance <= min(distances) + 1e-9)]
        found.append(max(group[min(visit, len(group) - 1)], found[-1] if found else 0))
    return tuple(found)


falling = st.lists(
    st.one_of(
        st.integers(0, 24).map(lambda n: n / 24), st.floats(0, 1), st.integers(0, 4).map(lambda n: 0.5 + n * 4e-10)
    ),
    min_size=1,
    max_size=20,
).map(lambda values: tuple(sorted(values, reverse=True)))


@settings(max_examples=400)
@given(falling, falling)
def test_nearest_steps_are_those_of_the_definition(own, wanted):
    assert nearest_steps(own, wanted) == nearest_by_trying_all(own, wanted)
