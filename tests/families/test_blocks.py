"""Plans on whole pipelines that leave out blocks and spans of blocks, compared with the blocks left out by hand."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="whole pipelines of diffusers")
pytest.importorskip("transformers", reason="text encoders of whole pipelines")

from diffusers import HeunDiscreteScheduler

from difa_compile.decision import FULL, Decision
from difa_compile.pipeline.apply import apply, remove
from difa_compile.pipeline.loading import load_pipeline
from difa_compile.pipeline.rules import plan_from_rule
from tests.support.image_cases import CASES
from tests.support.left_out import sampled_by_hand
from tests.support.video_components import wan, wan_transformer

pytestmark = pytest.mark.keeps_graphs

CLOSE = 5e-6
"""Of the largest latent: sums in another order, carried on by sampling."""
BLOCKS = ("F F", "F F", "reuse F", "F F", "forecast:1 reuse", "F F", "F F", "F forecast:1(step)")
SPANS = ("F", "F", "F", "reuse", "F", "F", "forecast:1", "F")
"""By step what the even and the odd blocks do, and the span of them, where there is one."""


@dataclass
class Sampled:
    """A pipeline and how to sample with it; ``calls`` of its transformer per step."""

    pipe: object
    frames: object
    inputs: dict
    calls: int = 1
    span: bool = True


def images(name, change=lambda pipe: None, **arguments):
    def make(folder):
        case = CASES[name]
        pipe = case.make()
        change(pipe)
        inputs = case.inputs(**arguments)
        return Sampled(
            pipe,
            lambda steps, **more: case.sample(pipe, steps, **{**arguments, **more}).numpy(),
            inputs,
            2 if case.two_calls else 1,
        )

    return make


def heun(pipe):
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)


def videos(**components):
    def make(folder):
        made = {name: part() for name, part in components.items() if callable(part)}
        tiny = wan(folder, "euler", **{**components, **made})
        inputs = {**tiny.arguments, "output_type": "latent"}
        return Sampled(tiny.pipe, lambda steps: tiny.frames(num_inference_steps=steps), inputs, 2)

    return make


PIPELINES = {
    "dit": images("dit"),
    "dit, unguided": images("dit", guidance_scale=1.0),
    "dit, Heun": images("dit", heun),
    "pixart": images("pixart_sigma"),
    "sd3": images("sd3"),
    "flux": images("flux"),
    "flux, two calls": images("flux_true_cfg"),
    "wan, two calls": videos(),
}
QUICK = ("dit, Heun",)


def plan_for(sampled, blocks=BLOCKS, spans=SPANS, rule=lambda *_: FULL):
    def block_rule(step, block):
        return decision(blocks[step].split()[int(block.path.rpartition(".")[2]) % 2])

    def span_rule(step, span):
        return decision(spans[step])

    return plan_from_rule(sampled.pipe, len(blocks), rule, inputs=sampled.inputs, blocks=block_rule, spans=span_rule)


def decision(text):
    return FULL if text == "F" else Decision.parse(text)


def error(found, wanted):
    assert np.isfinite(found).all()
    return np.abs(found - wanted).max() / np.abs(wanted).max()


def steps_asked(name, steps):
    """Heun calls the model twice for each step that is asked for, but for the last."""
    return (steps + 1) // 2 if "Heun" in name else steps


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in PIPELINES]
)
def test_images_are_those_with_blocks_left_out_by_hand(name, tmp_path: Path):
    """Over the steps of the plan and over others; no recompiles, and no block runs that is left out."""
    sampled = PIPELINES[name](tmp_path)
    steps = 7 if "Heun" in name else 8
    plan = plan_for(sampled, BLOCKS[:steps], SPANS[:steps])
    assert any(site.blocks for site in plan.sites)
    others = 11 if "Heun" in name else 6
    full = {count: sampled.frames(steps_asked(name, count)) for count in (steps, others)}
    wanted, ran = {}, {}
    for count in (steps, others):
        with sampled_by_hand(sampled.pipe, plan, plan.resolve(count).rows, sampled.calls) as ran[count]:
            wanted[count] = sampled.frames(steps_asked(name, count))
    blocks = sum(site.is_block and not site.blocks for site in plan.sites)
    assert sum(ran[steps]) < sampled.calls * steps * blocks
    applied = apply(sampled.pipe, plan, inner="eager")
    for count in (steps, others, steps):
        found = sampled.frames(steps_asked(name, count))
        assert error(found, wanted[count]) < CLOSE
        assert error(full[count], wanted[count]) > 20 * CLOSE
        assert applied.last_run.calls == sampled.calls * count
    assert len(applied.captures) == 1
    assert [record for record in applied.records if record.outcome == "skipped"] == []
    remove(sampled.pipe)
    assert np.array_equal(sampled.frames(steps_asked(name, steps)), full[steps])


@pytest.mark.slow
def test_each_expert_has_caches_of_its_own(tmp_path: Path):
    """As in Wan 2.2: the second begins with no caches, and what it would read of the first one's is full."""
    sampled = videos(transformer_2=lambda: wan_transformer(7), boundary_ratio=0.8)(tmp_path)
    texts = ["F F"] * 2 + ["reuse F", "F reuse"] * 3
    plan = plan_for(sampled, texts, ["F"] * 8)
    seen = []
    handles = [
        model.register_forward_pre_hook(lambda module, _: seen.append(module))
        for model in (sampled.pipe.transformer, sampled.pipe.transformer_2)
    ]
    full = sampled.frames(8)
    for handle in handles:
        handle.remove()
    switch = next(i for i, model in enumerate(seen[::2]) if model is sampled.pipe.transformer_2)
    assert 3 <= switch <= 6
    rows = [list(row) for row in plan.decisions]
    first = sum(not site.is_block for site in plan.sites)
    for step in (switch, switch + 1):  # one block reads at the one, the other at the next, when it has been filled
        if step == switch:
            rows[step][first : first + 2] = [FULL, FULL]
    with sampled_by_hand(sampled.pipe, plan, rows, sampled.calls):
        wanted = sampled.frames(8)
    applied = apply(sampled.pipe, plan, inner="eager")
    assert error(sampled.frames(8), wanted) < CLOSE
    assert error(full, wanted) > 20 * CLOSE
    assert {promotion.step for promotion in applied.last_run.promotions} == {switch}


@pytest.mark.slow
def test_batches_of_other_sizes_are_served_by_one_compile(tmp_path: Path):
    sampled = PIPELINES["dit"](tmp_path)
    plan = plan_for(sampled)

    def frames(labels):
        return np.asarray(sampled.frames(8, class_labels=labels))

    batches = ([1, 2], [1, 2, 3], [4], [1, 2, 3, 4])
    wanted = []
    for labels in batches:
        with sampled_by_hand(sampled.pipe, plan, plan.decisions):
            wanted.append(frames(labels))
    applied = apply(sampled.pipe, plan, inner="eager", dynamic=True)
    for labels, images in zip(batches, wanted, strict=True):
        assert error(frames(labels), images) < CLOSE
    assert len(applied.captures) == len(batches)
    remove(sampled.pipe)


@pytest.mark.slow
def test_the_demo_through_inductor_with_spans_left_out():
    """A third of the calls leave out the span, and one block is forecast in others: what is compiled agrees with the
    graphs run as they are, and no more is compiled than there are kinds of segment."""
    pipe = load_pipeline("demo")
    pipe.set_progress_bar_config(disable=True)
    inputs = {"class_labels": [1, 2]}

    def frames():
        call = {**inputs, "num_inference_steps": 6, "generator": torch.Generator().manual_seed(3), "output_type": "np"}
        return np.asarray(pipe(**call).images)

    plan = plan_from_rule(
        pipe,
        6,
        lambda *_: FULL,
        inputs={**inputs, "num_inference_steps": 6},
        blocks=lambda step, block: decision("forecast:1" if step == 4 and block.path.endswith(".1") else "F"),
        spans=lambda step, span: decision("reuse" if step in (2, 5) else "F"),
    )
    full = frames()
    images = {}
    for inner in ("eager", "inductor"):
        applied = apply(pipe, plan, inner=inner)
        images[inner] = frames()
        assert [record for record in applied.records if record.outcome == "skipped"] == []
        (capture,) = applied.captures
        assert capture.compiled_variants <= 8
        remove(pipe)
    assert error(images["inductor"], images["eager"]) < 1e-3
    assert error(full, images["eager"]) > 1e-2
