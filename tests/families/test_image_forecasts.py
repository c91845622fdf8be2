"""Plans that forecast, on whole image pipelines of diffusers, compared with the same attention altered by hand."""

from dataclasses import replace

import pytest

pytest.importorskip("diffusers", reason="whole pipelines of diffusers")
pytest.importorskip("transformers", reason="text encoders of whole pipelines")


from diffusers import HeunDiscreteScheduler

from difa_compile.decision import Decision, Kind
from difa_compile.pipeline.apply import apply
from difa_compile.plan.schedule import output_sources
from tests.support.image_cases import CASES, CLOSE, R, W, close, distance

pytestmark = pytest.mark.keeps_graphs

GUIDED = (
    ("full", "full+cfg", W),
    ("full", "full", "full"),
    ("forecast:1", R, "forecast:1"),
    ("forecast:1", "forecast:2+cfg", "full"),
    (W, "forecast:1(step)", "forecast:2(step)"),
    ("forecast:2", "full+cfg", "reuse"),
    ("full+cfg", "forecast:1+cfg", "forecast:2+cfg"),
    ("forecast:1(step)+cfg", "reuse+cfg", "full+cfg"),
)
"""Gaps of one to three steps, all that computes an output between; the third site only SD3 has."""
SLOW = ("dit", "pixart_sigma", "sd3", "flux")
"""All but true guidance, with two calls per step. Halves of a batch are quick in tests of bare models."""
ALL = ("flux_true_cfg", *SLOW)


def rows_of(case):
    shares = case.unguided is not None
    return tuple(
        tuple(Decision.parse(text if shares else text.replace("+cfg", "")) for text in row[: len(case.paths)])
        for row in GUIDED
    )


@pytest.mark.parametrize("name", ["flux_true_cfg", *[pytest.param(name, marks=pytest.mark.slow) for name in SLOW]])
def test_planned_images_are_those_of_attention_altered_by_hand(name):
    case = CASES[name]
    pipe = case.make()
    rows = rows_of(case)
    full = case.sample(pipe, len(rows))
    wanted = case.sample_altered(pipe, rows)
    applied = apply(pipe, case.plan(pipe, rows), inner="eager")
    assert close(case.sample(pipe, len(rows)), wanted)
    assert distance(full, wanted) > 50 * CLOSE
    assert [record for record in applied.records if record.outcome == "skipped"] == []
    assert applied.last_run.promotions == ()
    assert len(applied.captures) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_every_forecast_shows_in_the_altered_images(name):
    """What planned images are compared with would tell a forecast from full attention, reuse and another order."""
    case = CASES[name]
    pipe = case.make()
    rows = rows_of(case)
    wanted = case.sample_altered(pipe, rows)
    for step, row in enumerate(rows):
        for site, decision in enumerate(row):
            if not decision.order:
                continue
            others = {replace(decision, kind=kind, order=0, basis=None) for kind in (Kind.FULL, Kind.REUSE)}
            if sum(earlier[site].kind.fills("output") for earlier in rows[:step]) > 2:
                others.add(replace(decision, order=3 - decision.order))
            if site not in case.textless and decision.cfg_shared:
                others.add(replace(decision, cfg_shared=False))
            for other in others:
                changed = [*rows]
                changed[step] = (*row[:site], other, *row[site + 1 :])
                assert distance(case.sample_altered(pipe, changed), wanted) > 2 * CLOSE, (step, site, str(other))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_other_numbers_of_steps_follow_the_resolved_plan(name):
    case = CASES[name]
    pipe = case.make()
    plan = case.plan(pipe, rows_of(case))
    resolved = {steps: plan.resolve(steps) for steps in (5, 11)}
    assert resolved[5].promotions
    assert any(decision.order for row in resolved[5].rows for decision in row)
    wanted = {steps: case.sample_altered(pipe, there.rows) for steps, there in resolved.items()}
    applied = apply(pipe, plan, inner="eager")
    for steps in (11, 5, 11):
        assert close(case.sample(pipe, steps), wanted[steps])
        assert applied.last_run.promotions == resolved[steps].promotions
    assert len(applied.captures) == 1


@pytest.mark.slow
def test_image_to_image_forecasts_from_the_outputs_of_its_own_steps():
    """Half of the schedule is left out; the weights go by the timesteps that are made."""
    case = CASES["sd3_img2img"]
    pipe = case.make()
    rows = rows_of(case)
    wanted = case.sample_altered(pipe, rows)
    applied = apply(pipe, case.plan(pipe, rows), inner="eager")
    assert close(case.sample(pipe, len(rows)), wanted)
    assert applied.last_run.steps == len(rows)


@pytest.mark.slow
def test_with_two_calls_per_timestep_the_number_of_the_step_counts_where_the_timestep_cannot():
    """Heun's method: of the outputs that a forecast reads two may be of one timestep."""
    case = CASES["pixart_sigma"]
    pipe = case.make(HeunDiscreteScheduler(prediction_type="v_prediction"))
    rows = rows_of(case)[:7]
    full = case.sample(pipe, 4)
    wanted = case.sample_altered(pipe, rows, steps=4)
    timesteps = [float(t) for t in pipe.scheduler.timesteps]
    assert len(timesteps) == len(rows)
    columns = [[row[site] for row in rows] for site in range(2)]
    read = [[timesteps[i] for i in steps] for column in columns for steps in output_sources(column) if len(steps) > 1]
    assert {len(set(places)) < len(places) for places in read} == {False, True}
    applied = apply(pipe, case.plan(pipe, rows), inner="eager")
    assert close(case.sample(pipe, 4), wanted)
    assert distance(full, wanted) > 50 * CLOSE
    assert applied.last_run.steps == len(rows)
