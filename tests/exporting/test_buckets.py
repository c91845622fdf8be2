"""Engines on the steps of whole pipelines, as many as there are or few."""

from dataclasses import replace
from functools import cache, partial

import pytest
import torch

pytest.importorskip("diffusers", reason="pipelines of diffusers are exported")
pytest.importorskip("transformers", reason="text encoders of whole pipelines")

import difa_compile
from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.errors import EngineError, RowLimitError
from difa_compile.exporting.buckets import (
    Schedule,
    Slot,
    buckets_of,
    engines_for,
    limited,
)
from difa_compile.exporting.captured import captured, more_images, progress_of
from difa_compile.passes.caches import CacheName
from difa_compile.pipeline.apply import apply, remove
from difa_compile.pipeline.rules import plan_from_rule
from difa_compile.plan.data import Cell
from difa_compile.plan.engines import engine_of_steps, engines_of
from difa_compile.plan.schedule import FULL_ROLE, uniform_progress
from tests.support.image_cases import CASES
from tests.support.played import Played
from tests.support.tiny_pipelines import sample, tiny_pipeline


def play(pipe, run, course, engines):
    """What a pipeline makes whose transformers' calls are made by engines."""
    models = [pipe.transformer, *([pipe.transformer_2] if getattr(pipe, "transformer_2", None) else [])]
    with Played(course, engines).instead_of(*models):
        return run()


def made_of(calls, buckets):
    return [engines_for(row, [calls])[0] for row in buckets.rows]


def applied(pipe, plan, run):
    found = apply(pipe, plan, inner="eager")
    try:
        return run(), found.last_run
    finally:
        remove(pipe)


DECISIONS = [("full", "full"), ("window(band:3)+residual", "reuse"), ("reuse+cfg", "full+cfg"), ("full", "forecast:1")]
LABELS = {"class_labels": [1, 2]}


@cache
def tiny():
    """A pipeline, a plan for it, and its captured calls."""
    pipe = tiny_pipeline()

    def rule(step, info):
        return Decision.parse(DECISIONS[step][info.path.startswith("transformer_blocks.1.")])

    plan = plan_from_rule(pipe, len(DECISIONS), rule, inputs=LABELS)
    return pipe, plan, captured(pipe, LABELS, plan)


def test_engines_in_the_transformers_place_make_the_same_images():
    pipe, plan, calls = tiny()
    schedules = [Schedule(plan, progress_of(pipe, LABELS, steps)) for steps in (4, 3)]
    buckets = buckets_of(calls, schedules)
    assert sum(row.calls for row in buckets.rows) == 7
    engines = made_of(calls, buckets)
    for steps, course in zip((4, 3), buckets.courses, strict=True):
        run = partial(sample, pipe, steps=steps)
        wanted, stats = applied(pipe, plan, run)
        assert (play(pipe, run, course, engines) == wanted).all()
        assert 0 < stats.peak_cache_bytes <= sum(slot.bytes for slot in buckets.slots)
    assert (play(pipe, partial(sample, pipe, steps=4), buckets.courses[0], engines) != sample(pipe, 4)).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dit", "pixart_sigma", "sd3", "flux_true_cfg"])
def test_engines_make_the_images_of_a_pipeline_with_its_plan(name):
    """Over the plan's steps and others, with the plan's own rows and with few engines (two calls: the hardest)."""
    case = CASES[name]
    pipe = case.make()
    plan = case.plan(pipe, case.rows)
    inputs = case.inputs()
    calls = captured(pipe, inputs, plan)
    assert len(calls) == 1 + case.two_calls
    counts = (6, 4)
    schedules = [Schedule(plan, progress_of(pipe, inputs, steps * case.asked)) for steps in counts]
    for most in (None, 3) if case.two_calls else (None,):
        found = limited(calls, schedules, most)
        assert most is None or len(found.buckets.rows) <= most < len(buckets_of(calls, schedules).rows)
        engines = made_of(calls, found.buckets)
        for steps, course, schedule in zip(counts, found.buckets.courses, found.schedules, strict=True):
            run = partial(case.sample, pipe, steps=steps)
            wanted, _ = applied(pipe, schedule.plan, run)
            assert torch.equal(play(pipe, run, course, engines), wanted), (most, steps)


@pytest.mark.slow
def test_engines_of_two_experts_over_two_calls_with_blocks(tmp_path):
    """The second expert begins with no caches, and has engines of its own: their weights are others."""
    from tests.families.test_video_pipelines import wan_with_experts

    tiny_wan = wan_with_experts(tmp_path)
    pipe = tiny_wan.pipe
    inputs = {key: value for key, value in tiny_wan.arguments.items() if key != "num_inference_steps"}
    texts = ["full", "full", "reuse", "forecast:1", "full", "reuse"]
    plan = plan_from_rule(
        pipe,
        6,
        lambda step, _: Decision.parse("window(box:1)") if step == 1 else FULL,
        inputs=inputs,
        blocks=lambda step, block: Decision.parse(texts[step]) if block.path == "blocks.1" else FULL,
        spans=lambda step, _: REUSE if step == 5 else FULL,
    )
    calls = captured(pipe, inputs, plan)
    seen = []
    models = [pipe.transformer, pipe.transformer_2]
    handles = [m.register_forward_pre_hook(lambda module, _: seen.append(models.index(module))) for m in models]
    tiny_wan.frames(num_inference_steps=6)
    for handle in handles:
        handle.remove()
    order = tuple(((expert, "cond"), (expert, "uncond")) for expert in seen[::2])
    schedule = Schedule(plan, progress_of(pipe, inputs, 6), order)
    buckets = buckets_of(calls, [schedule])
    run = partial(tiny_wan.frames, num_inference_steps=6)
    wanted, stats = applied(pipe, plan, run)
    assert stats.promotions
    assert {calls[row.call].expert for row in buckets.rows} == {0, 1}
    assert (play(pipe, run, buckets.courses[0], made_of(calls, buckets)) == wanted).all()
    two = limited(calls, [schedule], 2)
    assert [calls[row.call].expert for row in two.buckets.rows] == [0, 1]
    with pytest.raises(RowLimitError, match="even if everything is full at every step 2 are needed"):
        limited(calls, [schedule], 1)


@pytest.mark.slow
def test_engines_of_two_calls_with_texts_of_two_lengths(tmp_path):
    """A graph for each call, which share what they share all the same."""
    from tests.families.test_video_pipelines import WAN_ROWS, plan_of, texts_of_two_lengths, wan

    tiny_wan = wan(tmp_path)
    pipe = tiny_wan.pipe
    inputs = {**tiny_wan.arguments, **texts_of_two_lengths()}
    del inputs["num_inference_steps"]
    plan = plan_of(tiny_wan, WAN_ROWS, **texts_of_two_lengths())
    calls = captured(pipe, inputs, plan)
    assert calls[0].capture is not calls[1].capture
    found = limited(calls, [Schedule(plan, progress_of(pipe, inputs, len(WAN_ROWS)))], 5)
    assert {row.call for row in found.buckets.rows} == {0, 1}
    assert len(found.buckets.rows) <= 5
    run = partial(tiny_wan.frames, **texts_of_two_lengths())
    wanted, _ = applied(pipe, found.schedules[0].plan, run)
    engines = made_of(calls, found.buckets)
    assert (play(pipe, run, found.buckets.courses[0], engines) == wanted).all()


@pytest.mark.slow
def test_engines_of_the_demo_model_for_any_number_of_images():
    pipe = difa_compile.load_pipeline("demo")
    pipe.set_progress_bar_config(disable=True)
    texts = ["full", "window(disc:4)+residual", "reuse+cfg"]
    inputs = {"class_labels": [3]}
    plan = plan_from_rule(pipe, 3, lambda step, _: Decision.parse(texts[step]), inputs=inputs)
    calls = [captured(pipe, more_images(pipe, inputs, images), plan) for images in (1, 2, 3)]
    buckets = buckets_of(calls[0], [Schedule(plan, progress_of(pipe, inputs, 3))])
    engines = [engines_for(row, calls, 8) for row in buckets.rows]
    assert [[engine.images for engine in each] for each in engines] == [[(1, 8)]] * 3
    for labels in ([3], [1, 4, 1, 5]):
        run = partial(sample, pipe, steps=3, labels=labels)
        wanted, _ = applied(pipe, plan, run)
        assert (play(pipe, run, buckets.courses[0], [each[0] for each in engines]) == wanted).all()


def test_schedules_share_engines_and_slots():
    pipe, plan, calls = tiny()
    progress = progress_of(pipe, LABELS, 4)
    one, both = (buckets_of(calls, [Schedule(plan, progress)] * count) for count in (1, 2))
    assert both.courses[0] == both.courses[1] == one.courses[0]
    assert (both.slots, len(both.rows)) == (one.slots, len(one.rows))
    assert [row.calls for row in both.rows] == [2 * row.calls for row in one.rows]
    full = plan_from_rule(pipe, 4, lambda *_: FULL, inputs=LABELS)
    tiers = buckets_of(calls, [Schedule(plan, progress), Schedule(full, progress)])
    assert tiers.courses[0] == one.courses[0]
    assert len(tiers.rows) == len(one.rows) + 1
    assert {call.engine for call in tiers.courses[1]} == {len(one.rows)}
    assert tiers.rows[-1].roles == (FULL_ROLE,) * len(calls[0].capture.model.units)
    assert calls[0].capture.plan == plan, "the captures follow their own plan still"


@pytest.mark.parametrize(
    "texts",
    [
        [("full", "full"), ("reuse", "window(band:3)"), ("reuse", "reuse"), ("full", "reuse"), ("full", "full")],
        [("full", "full"), ("full+cfg", "full"), ("window(band:3)+residual+cfg", "reuse"), ("reuse+cfg", "reuse")],
        [("full", "full"), ("full", "full"), ("forecast:1", "reuse"), ("forecast:1", "full"), ("reuse", "forecast:2")],
        [("full", "full"), ("heads(0:reuse;1:full)", "full"), ("heads(0:full;1:window(band:3)+residual)", "reuse")],
    ],
)
def test_a_plan_tells_the_engines_that_it_needs(texts):
    """Without its model: as many, each for as many steps, with as many caches."""
    pipe, plan, calls = tiny()
    progress = progress_of(pipe, LABELS, len(texts))
    rows = [
        tuple(Cell(Decision.parse(text[info.path.startswith("transformer_blocks.1.")])) for info in plan.sites)
        for text in texts
    ]
    plan = replace(plan, rows=tuple(rows), progress=progress)
    made = buckets_of(calls, [Schedule(plan, progress)])
    told = engines_of(plan)
    assert [len(each.steps) for each in told] == [row.calls for row in made.rows]
    assert engine_of_steps(told) == tuple(call.engine for call in made.courses[0])
    for call in made.courses[0]:
        each = told[call.engine]
        assert (each.reads.caches, each.writes.caches) == (len(call.reads), len(call.writes))


def test_a_plan_with_blocks_tells_the_engines_that_it_needs():
    pipe, _, calls = tiny()
    blocks = ["full", "full", "reuse", "forecast:1", "full", "reuse"]
    plan = plan_from_rule(
        pipe,
        6,
        lambda step, _: Decision.parse("window(band:3)") if step == 1 else FULL,
        inputs=LABELS,
        blocks=lambda step, block: Decision.parse(blocks[step]) if block.path.endswith(".1") else FULL,
        spans=lambda step, _: REUSE if step == 5 else FULL,
    )
    calls = captured(pipe, LABELS, plan)
    made = buckets_of(calls, [Schedule(plan, progress_of(pipe, LABELS, 6))])
    told = engines_of(plan)
    assert len(told) == len(made.rows) > 3
    assert engine_of_steps(told) == tuple(call.engine for call in made.courses[0])


def test_no_call_writes_what_it_reads_and_slots_are_used_again():
    pipe, plan, calls = tiny()
    buckets = buckets_of(calls, [Schedule(plan, progress_of(pipe, LABELS, 12))])
    held = {}
    for call in buckets.courses[0]:
        for name, slot in call.reads:
            assert held[slot][0].site == name.site
        written = [slot for _, slot in call.writes if slot is not None]
        assert len(set(written)) == len(written)
        assert not set(written) & {slot for _, slot in call.reads}
        for name, slot in call.writes:
            held[slot] = (name, call.step)
    writes = sum(slot is not None for call in buckets.courses[0] for _, slot in call.writes)
    assert len(buckets.slots) < writes
    assert Slot((2, 3), torch.float16).bytes == 12


def test_weights_of_forecasts_are_numbers_of_the_course():
    _, plan, calls = tiny()
    buckets = buckets_of(calls, [Schedule(plan, (1.0, 0.8, 0.5, 0.1))])
    weights = [dict(call.weights) for call in buckets.courses[0]]
    assert weights[:3] == [{}, {}, {}]
    ((name, numbers),) = weights[3].items()
    assert name == "cache.transformer_blocks.1.attn1.weights"
    assert numbers == pytest.approx(((0.1 - 1) / (0.5 - 1), (0.1 - 0.5) / (1 - 0.5)))


def test_fitted_weights_of_forecasts_are_those_of_the_course():
    """Also where rows are merged, for the forecasts that are left."""
    _, plan, calls = tiny()
    name = CacheName.weights("transformer_blocks.1.attn1")
    site = next(index for index, info in enumerate(plan.sites) if info.path == name.site)
    rows = [[Cell(FULL) for _ in plan.sites] for _ in range(6)]
    for step, weights in enumerate([(3.0, -2.0), (), (0.5, 0.5)], 2):
        rows[step][site] = Cell(Decision.parse("forecast:1"), weights=weights)
    rows[5][1 - site] = Cell(Decision.parse("window(band:3)"))
    schedule = Schedule(replace(plan, rows=tuple(map(tuple, rows)), progress=uniform_progress(6)), uniform_progress(6))
    plain = buckets_of(calls, [schedule])
    merged = limited(calls, [schedule], len(plain.rows) - 1)
    assert len(merged.buckets.rows) < len(plain.rows)
    for made in (plain, merged.buckets):
        numbers = [dict(call.weights).get(name) for call in made.courses[0]]
        assert numbers[2] == (3.0, -2.0)
        assert numbers[3] == pytest.approx((3.0, -2.0)), "the polynomial's, as it happens"
        assert numbers[4] == (0.5, 0.5)
    assert merged.schedules[0].plan.rows[4][site].weights == (0.5, 0.5)
    assert merged.schedules[0].plan.rows[3][site].weights == ()


def test_calls_that_were_not_captured_are_refused():
    _, plan, calls = tiny()
    with pytest.raises(EngineError, match="calls transformer 0 in branch cond, of which no call was captured"):
        buckets_of(calls, [Schedule(plan, (1.0, 0.5), (((0, "cond"),),) * 2)])
    with pytest.raises(EngineError, match="calls transformer 1, of which"):
        buckets_of(calls, [Schedule(plan, (1.0, 0.5), (((1, None),),) * 2)])
    (row,) = buckets_of(calls, [Schedule(plan, (1.0,))]).rows
    with pytest.raises(EngineError, match="of transformer 0 no call was captured for 2 images; capture such calls"):
        engines_for(row, [calls, [replace(calls[0], branch="cond")]])
    with pytest.raises(EngineError, match="has calls for 1 steps, but the progress of 2"):
        buckets_of(calls, [Schedule(plan, (1.0, 0.5), (((0, None),),))])


def test_few_engines_write_what_any_step_needs():
    """One that writes caches runs also where nobody reads them: they are written to no slot."""
    pipe, plan, calls = tiny()
    schedule = Schedule(plan, progress_of(pipe, LABELS, 4))
    least = limited(calls, [schedule], 3)
    assert len(least.buckets.rows) <= 3
    assert least.before < least.after
    run = partial(sample, pipe, steps=4)
    wanted, _ = applied(pipe, least.schedules[0].plan, run)
    engines = made_of(calls, least.buckets)
    assert (play(pipe, run, least.buckets.courses[0], engines) == wanted).all()
    one = limited(calls, [schedule], 1)
    assert one.buckets.rows[0].roles == (FULL_ROLE,) * len(calls[0].capture.model.units)
    same = limited(calls, [schedule], 9)
    assert same.schedules == (schedule,)
    assert same.before == same.after
    for wrong in (0, -1, True, 1.5):
        with pytest.raises(RowLimitError, match="give a whole number, at least 1"):
            limited(calls, [schedule], wrong)


def test_rows_are_weighed_by_predicted_time_where_the_machine_was_measured(profile_at):
    """Where attention in full is all that takes long, other rows are merged than by operations."""
    pipe, plan, calls = tiny()
    schedule = Schedule(plan, progress_of(pipe, LABELS, 4))
    assert limited(calls, [schedule], 3).weighed == "operations"
    profile_at(full=1.0, window=1e-9)
    timed = captured(pipe, LABELS, plan)
    found = limited(timed, [schedule], 3)
    assert found.weighed == "predicted time"
    predicted = timed[0].capture.prediction.row_seconds
    buckets = buckets_of(timed, [schedule])
    assert found.before == pytest.approx(sum(row.calls * predicted(row.roles) for row in buckets.rows))
    assert found.before < found.after
    profile_at(dtype="bfloat16")
    assert limited(captured(pipe, LABELS, plan), [schedule], 3).weighed == "operations", "another dtype"
