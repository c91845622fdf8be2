"""Plans: construction, fitting a model, other schedules, other image sizes."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from difa_compile.decision import FULL, REUSE, Decision, Kind
from difa_compile.errors import DecisionError, PlanFormatError, PlanMismatchError, ScheduleError
from difa_compile.layout import Layout
from difa_compile.plan.plan import Cell, Plan, Settings, SiteInfo, Trial, model_digest, same_but_for_text
from difa_compile.plan.schedule import assign_roles, forecast_weights, uniform_progress
from tests.support.plans import BAND, GREEDY, LETTERS, MODEL, Configured, Plain, letters, plan_of, site

# --- construction ----------------------------------------------------------------------------------------------------


def test_properties() -> None:
    plan = plan_of("F.F.", "FWWR")
    assert plan.steps == 4
    assert plan.decisions[3] == (REUSE, LETTERS["R"])
    assert plan.roles == assign_roles(plan.decisions)
    assert [bucket.steps for bucket in plan.buckets] == [(0,), (1,), (2,), (3,)]


def test_a_plan_that_cannot_run_does_not_exist() -> None:
    with pytest.raises(ScheduleError, match="step 0, site 1: reuse"):
        plan_of("FF", ".F")
    with pytest.raises(ScheduleError, match="progress rises"):
        plan_of("FF", progress=(0.5, 1.0))
    with pytest.raises(ScheduleError, match="at least one step"):
        Plan(MODEL, GREEDY, (site(0),), (), ())


def test_rows_sites_and_progress_must_add_up() -> None:
    cell = Cell(FULL)
    with pytest.raises(PlanFormatError, match="at least one site"):
        Plan(MODEL, GREEDY, (), (1.0,), ((),))
    with pytest.raises(PlanFormatError, match=r"blocks\.0\.attn1' twice"):
        Plan(MODEL, GREEDY, (site(0), site(0)), (1.0,), ((cell, cell),))
    with pytest.raises(PlanFormatError, match="2 rows but the progress of 1 steps"):
        Plan(MODEL, GREEDY, (site(0),), (1.0,), ((cell,), (cell,)))
    with pytest.raises(PlanFormatError, match="step 1 of the plan has 2 cells for 1 sites"):
        Plan(MODEL, GREEDY, (site(0),), (1.0, 0.5), ((cell,), (cell, cell)))


def test_groups_of_heads_must_be_all_heads_of_the_site() -> None:
    def plan(text: str) -> Plan:
        return Plan(MODEL, GREEDY, (site(0),), (1.0, 0.5), ((Cell(FULL),), (Cell(Decision.parse(text)),)))

    assert Plan.from_json(plan("heads(0-2,5:reuse;3-4:full)").to_json()) == plan("heads(3-4:full;0-2,5:reuse)")
    for text, last in (("heads(0-2:reuse;3-4:full)", 4), ("heads(0-2:reuse;3-6:full)", 6)):
        with pytest.raises(
            PlanFormatError, match=rf"step 1: heads.* names heads 0 to {last}, but blocks\.0.* has 6 heads"
        ):
            plan(text)


# --- models ----------------------------------------------------------------------------------------------------------


def test_a_plan_fits_its_own_model_and_sites() -> None:
    model = Configured(layers=2)
    plan = dataclasses.replace(plan_of("FF", "F."), model=model_digest(model))
    plan.validate(model, plan.sites)
    plan.validate(model)
    plan.validate(sites=list(plan.sites))
    plan.validate()


@pytest.mark.parametrize(
    ("model", "sites", "message"),
    [
        (Plain(), None, "made for Configured, this is Plain"),
        (Configured(layers=3), None, "another configuration of Configured"),
        (None, (site(0, 32), site(1, 32)), r"256 tokens \(16x16\).*1024 tokens \(32x32\).*at this image size"),
        (None, (site(0),), r"names 2 sites, the model has 1, not in the model: blocks\.1\.attn1"),
        (None, (site(0), site(1), site(2)), r"not in the plan: blocks\.2\.attn1"),
        (None, (site(1), site(0)), "another order"),
        (Plain(), (site(0),), "this is Plain; the plan names 2 sites"),
    ],
)
def test_a_plan_for_something_else_is_refused_saying_what_differs(
    model: nn.Module | None, sites: tuple[SiteInfo, ...] | None, message: str
) -> None:
    plan = dataclasses.replace(plan_of("FF", "F."), model=model_digest(Configured(layers=2)))
    with pytest.raises(PlanMismatchError, match=message):
        plan.validate(model, sites)


def test_many_differences_are_shortened() -> None:
    plan = plan_of(*["F"] * 20)
    with pytest.raises(PlanMismatchError, match="and 12 more"):
        plan.validate(sites=[site(index, 8) for index in range(20)])


# --- other schedules -------------------------------------------------------------------------------------------------


def test_resolve_onto_the_same_steps_is_the_identity() -> None:
    plan = plan_of("F.F.", "FWWR")
    for resolved in (plan.resolve(4), plan.resolve(4, progress=plan.progress)):
        assert resolved.rows == resolved.decisions == plan.decisions
        assert resolved.roles == plan.roles
        assert resolved.buckets == plan.buckets
        assert resolved.source_steps == (0, 1, 2, 3)
        assert resolved.promotions == ()
        assert resolved.steps == 4
        assert resolved.plan is plan


@given(st.lists(st.text("FfWR.Pp", min_size=47, max_size=47).map(lambda text: "FFF" + text), min_size=1, max_size=2))
@settings(max_examples=50)
def test_fifty_steps_onto_other_counts(columns: list[str]) -> None:
    plan = plan_of(*columns)
    assert plan.resolve(50).rows == plan.decisions
    for steps in (20, 30, 100, 1, 7):
        resolved = plan.resolve(steps)
        assert resolved.steps == len(resolved.progress) == steps
        assert resolved.progress == pytest.approx(uniform_progress(steps))
        assert len(resolved.roles) == steps  # a reader without filler would raise
        promoted = {(promotion.step, promotion.site) for promotion in resolved.promotions}
        for step, source in enumerate(resolved.source_steps):
            for index, decision in enumerate(resolved.rows[step]):
                assert ((step, index) in promoted) == (decision != plan.decisions[source][index])
    assert plan.resolve(100).promotions == ()
    assert set(plan.resolve(100).source_steps) == set(range(50))


def test_fifty_onto_twenty_and_thirty_by_hand() -> None:
    """Even steps full, odd ones reuse: step j of 20 follows step 5j/2 of 50, halves going to the earlier step."""
    plan = plan_of("F." * 25)
    twenty = plan.resolve(20)
    assert twenty.source_steps[:5] == (0, 2, 5, 7, 10)
    assert letters(twenty.rows)[:6] == "FFFFFF"  # steps 5 and 7 read 4 and 6, which fell out
    assert [promotion.step for promotion in twenty.promotions][:3] == [2, 3, 6]
    thirty = plan.resolve(30)
    assert thirty.source_steps[:7] == (0, 2, 3, 5, 7, 8, 10)
    assert letters(thirty.rows)[:7] == "FF.FFFF"
    assert [promotion.step for promotion in thirty.promotions][:2] == [3, 4]


def test_fifty_steps_with_forecasts_onto_twenty_by_hand() -> None:
    """Every fourth step is computed. Steps 5 and 7 of 50 read 4, which fell out; 13 and 15 are read from 12."""
    twenty = plan_of("FFPP" + "FPPP" * 11 + "FP").resolve(20)
    assert twenty.source_steps[:8] == (0, 2, 5, 7, 10, 12, 15, 17)
    assert letters(twenty.rows)[:8] == "FFFPFFPF"
    assert [promotion.step for promotion in twenty.promotions][:4] == [1, 2, 4, 7]
    assert "needs the outputs of 2 earlier steps" not in twenty.promotions[2].reason
    assert twenty.promotions[2].reason.startswith("it reads the output of the plan's step 8, which no earlier step")


def with_weights(plan: Plan, weights: dict[int, tuple[float, ...]]) -> Plan:
    rows = tuple(
        tuple(dataclasses.replace(cell, weights=weights.get(step, ())) for cell in row)
        for step, row in enumerate(plan.rows)
    )
    return dataclasses.replace(plan, rows=rows)


def test_fitted_weights_hold_where_they_were_fitted_and_nowhere_else() -> None:
    plan = with_weights(plan_of("FFPFPPFP"), {2: (1.75, -0.75), 4: (1.25, -0.25), 7: (1.5, -0.5)})
    assert plan.fitted[4, 0] == ((3, 1), (1.25, -0.25))
    assert sorted(plan.fitted) == [(2, 0), (4, 0), (7, 0)]
    line = LETTERS["P"]
    same = plan.resolve(8)
    assert same.weights(2, 0, line, (1, 0)) == (1.75, -0.75)
    assert same.weights(5, 0, line, (3, 1)) == pytest.approx((2.0, -1.0)), "that of step 5 was not fitted"
    assert same.weights(4, 0, line, (3, 0)) == pytest.approx((4 / 3, -1 / 3)), "another source"
    two = LETTERS["p"]
    assert same.weights(4, 0, two, (3, 1, 0)) == pytest.approx(forecast_weights(plan.progress, 4, (3, 1, 0), "step"))
    near = plan.resolve(8, progress=[value - 1e-3 for value in plan.progress])
    assert near.weights(2, 0, line, (1, 0)) == (1.75, -0.75)
    shifted = plan.resolve(8, progress=[value - 5e-3 for value in plan.progress])
    assert shifted.source_steps == near.source_steps == tuple(range(8))
    assert shifted.weights(2, 0, line, (1, 0)) == pytest.approx((2.0, -1.0))
    longer = plan.resolve(16)
    assert longer.progress[4] == plan.progress[2]
    assert longer.weights(4, 0, line, (2, 0)) == pytest.approx((2.0, -1.0)), "all were fitted together"
    part = plan.resolve(5, progress=plan.progress[3:])
    assert part.weights(4, 0, line, (3, 0)) == (1.5, -0.5)
    assert part.weights(4, 0, line, (3, 2)) == pytest.approx((2.0, -1.0)), "of steps that the plan's own does not read"
    assert "weights fitted: of 3 of 4 forecasts, used on the plan's own schedule alone, so not here" in longer.summary()
    assert "fitted" not in same.summary()


def test_weights_fitted_in_a_part_of_the_schedule_hold_there() -> None:
    plan = with_weights(plan_of("FFFPFFPP"), {6: (1.75, -0.75)})
    part = plan.resolve(5, progress=plan.progress[3:])
    assert part.source_steps == (3, 4, 5, 6, 7)
    assert part.weights(3, 0, LETTERS["P"], (2, 1)) == (1.75, -0.75)


def test_weights_are_of_one_image_size() -> None:
    plan = with_weights(plan_of("FFPF"), {2: (1.75, -0.75)})
    assert plan.resized([site(0)]).fitted == plan.fitted
    assert plan.resized([site(0, 8)]).fitted == {}


def test_resolve_keeps_the_spacing_of_the_plan() -> None:
    """Without a schedule, a shifted plan is stretched, not mapped onto uniform steps."""
    shifted = (1.0, 0.9, 0.7, 0.3)
    assert plan_of("FFFF", progress=shifted).resolve(4).progress == shifted
    eight = plan_of("FFFF", progress=shifted).resolve(8)
    assert eight.progress == pytest.approx((1.0, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3, 0.15))
    assert plan_of("FFFF", progress=shifted).resolve(2).progress == (1.0, 0.7)


def test_resolve_onto_part_of_a_schedule_starts_full() -> None:
    """An image-to-image run starts in the middle, where nothing has filled the caches yet."""
    plan = plan_of("F...F...")
    resolved = plan.resolve(4, progress=(0.625, 0.5, 0.375, 0.25))
    assert resolved.source_steps == (3, 4, 5, 6)
    assert letters(resolved.rows) == "FF.."
    assert [promotion.step for promotion in resolved.promotions] == [0]


def test_resolve_onto_schedulers() -> None:
    diffusers = pytest.importorskip("diffusers", reason="the schedulers are diffusers'")
    ddim = diffusers.DDIMScheduler()
    ddim.set_timesteps(50)
    progress = tuple(timestep / 1000 for timestep in ddim.timesteps.tolist())
    plan = plan_of("F" + ".F..R" * 9 + "....", progress=progress)
    assert plan.resolve(50, ddim).rows == plan.decisions
    assert plan.resolve(50, diffusers.DDIMScheduler()).source_steps == tuple(range(50))
    twenty = plan.resolve(20, ddim)  # set to 50: a copy is set to 20
    assert ddim.num_inference_steps == 50
    assert twenty.progress[:2] == (0.95, 0.9)
    heun = plan.resolve(10, diffusers.HeunDiscreteScheduler())
    assert heun.steps == 19
    assert len(heun.roles) == 19


def test_a_rule_goes_by_position_in_the_run() -> None:
    """It was written in steps, so on any schedule of as many steps it is carried out step by step."""
    rule, greedy = plan_of("F..F", settings=Settings("rule")), plan_of("F..F")
    progress = (0.4, 0.3, 0.2, 0.1)
    assert rule.resolve(4, progress=progress).rows == rule.decisions
    assert rule.resolve(4, progress=progress).progress == progress
    assert greedy.resolve(4, progress=progress).rows != greedy.decisions
    assert rule.resolve(8, progress=[0.5] * 8).source_steps == (0, 0, 1, 1, 2, 2, 3, 3)


def test_resolve_checks_what_it_is_given() -> None:
    plan = plan_of("FF")
    with pytest.raises(ScheduleError, match="number of steps is 0"):
        plan.resolve(0)
    with pytest.raises(ScheduleError, match="3 steps are asked for, but progress has 2"):
        plan.resolve(3, progress=(1.0, 0.5))
    with pytest.raises(ScheduleError, match="give one of them"):
        plan.resolve(2, object(), progress=(1.0, 0.5))
    with pytest.raises(ScheduleError, match="rises"):
        plan.resolve(2, progress=(0.5, 1.0))


# --- other image sizes ------------------------------------------------------------------------------------------------


def test_windows_are_carried_onto_another_size_as_a_share_or_as_they_are():
    rows = [[FULL, FULL], [Decision(Kind.WINDOW, BAND), Decision.parse("window(disc:4)+cfg")], [REUSE, FULL]]
    cells = tuple(tuple(Cell(decision, (Trial(decision, 0.1, 0.2),), 0.5) for decision in row) for row in rows)
    plan = Plan(MODEL, GREEDY, (site(0), site(1)), uniform_progress(3), cells)
    larger = [site(0, 32), site(1, 32)]
    with pytest.raises(PlanMismatchError, match='resize="fraction"'):
        plan.validate(sites=larger)
    wide = plan.resized(larger)
    assert [str(cell.decision) for cell in wide.rows[1]] == ["window(band:128)", "window(disc:8)+cfg"]
    assert wide.sites == tuple(larger)
    assert wide.rows[1][0].trials == ()
    assert 0 < wide.rows[1][0].flops_saved < 1
    wide.validate(sites=larger)
    same = plan.resized(larger, "tokens")
    assert same.decisions == plan.decisions
    assert wide.resized(plan.sites).decisions == plan.decisions
    assert plan.resized([site(0, 2), site(1, 2)]).rows[1][0].decision.window.radius == 1
    with pytest.raises(DecisionError, match="fraction, tokens"):
        plan.resized(larger, "half")


def test_windows_of_heads_are_carried_onto_another_size():
    decision = Decision.parse("heads(0-1:window(band:32);2-4:window(disc:4);5:full)+cfg")
    plan = Plan(MODEL, GREEDY, (site(0),), (1.0,), ((Cell(decision),),))
    (cell,) = plan.resized([site(0, 32)]).rows[0]
    assert str(cell.decision) == "heads(0-1:window(band:128);2-4:window(disc:8);5:full)+cfg"
    assert 0.5 < cell.flops_saved < 1
    assert plan.resized([site(0, 32)], "tokens").decisions == plan.decisions


def test_only_the_size_may_differ():
    plan = Plan(MODEL, GREEDY, (site(0),), uniform_progress(1), ((Cell(FULL),),))
    for other in ([dataclasses.replace(site(0, 32), heads=5)], [site(1, 32)], [site(0, 32), site(1, 32)]):
        with pytest.raises(PlanMismatchError):
            plan.resized(other)


def test_texts_of_other_lengths_are_no_other_image():
    """A site's grid shows its image; where a site has none, the noisy sample has to be known, and the same."""
    known = SiteInfo("a", "joint", 2, 16, 7 + 24, 32, Layout((4, 6), before=7))
    unknown = SiteInfo("b", "joint", 2, 16, 31, 32)
    longer = dataclasses.replace(known, tokens=9 + 24, layout=Layout((4, 6), before=9))
    wider = dataclasses.replace(known, tokens=7 + 26, layout=Layout((2, 13), before=7))
    more = dataclasses.replace(unknown, tokens=33)
    same, other, nothing = ((8, 12), (8, 12)), ((8, 12), (4, 26)), (None, None)
    for samples in (same, other, nothing):
        assert same_but_for_text([known], [longer], samples)
        assert not same_but_for_text([known], [wider], samples)
        assert same_but_for_text([unknown], [unknown], samples)
        assert same_but_for_text([unknown], [more], samples) is (samples is same)
        assert same_but_for_text([known], [dataclasses.replace(longer, layout=None)], samples) is (samples is same)
        assert same_but_for_text([longer, more], [known, unknown], samples) is (samples is same)
        assert not same_but_for_text([known, unknown], [known], samples)
    for change in ({"path": "c"}, {"kind": "self"}, {"heads": 4}, {"head_dim": 8}, {"width": 64}):
        assert not same_but_for_text([unknown], [dataclasses.replace(more, **change)], same)


def test_the_sample_of_a_plan_is_kept_as_long_as_it_is_known():
    settings = dataclasses.replace(GREEDY, sample=(4, 32, 32))
    plan = Plan(MODEL, settings, (site(0),), uniform_progress(1), ((Cell(FULL),),))
    assert Plan.from_json(plan.to_json()).settings.sample == (4, 32, 32)
    assert "sample" not in dataclasses.replace(plan, settings=GREEDY).to_json()
    assert plan.resized([site(0)]).settings.sample == (4, 32, 32)
    assert plan.resized([site(0, 32)]).settings.sample is None
    with pytest.raises(PlanFormatError, match=r"settings: sample is 1\.5"):
        dataclasses.replace(GREEDY, sample=(4, 1.5))


def test_a_whole_block_has_no_heads_to_decide_on():
    block = SiteInfo("blocks.0", "block", 1, 32, 24, 32, None, 1000)
    rows = ((Cell(FULL), Cell(Decision.parse("heads(0:full;1:window(band:2))"))),)
    with pytest.raises(PlanFormatError, match=r"names heads, but blocks\.0 is a whole block, which has none"):
        Plan(MODEL, GREEDY, (site(0), block), uniform_progress(1), rows)
