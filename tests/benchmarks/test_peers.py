"""The rivals of the planner's benchmark do what their names say, and what cannot run is said."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers", reason="the rivals run on its pipelines")
from benchmarks import peers, planner
from tests.support.tiny_pipelines import sample, tiny_pipeline

STEPS = 8


def stack_outputs(stack, times, addition):
    """What a stack of two blocks makes of zeros at each of ``times``; together they add ``addition(time)``."""
    outputs = []
    for time in times:
        hidden = torch.zeros(1)
        timestep = torch.tensor([time])
        for index in (0, 1):
            half = lambda x, timestep: x + addition(timestep) / 2  # noqa: E731
            hidden = stack.block(hidden, forward=half, index=index, last=index == 1, timestep=timestep)
        outputs.append(float(hidden))
    return outputs


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_forecast_of_order_k_follows_polynomials_of_degree_k(order):
    times = [990.0, 700.0, 650.0, 400.0, 300.0, 20.0]
    stack = peers.UniformStack({0, 1, 2}, order)
    outputs = stack_outputs(stack, times, lambda time: 3 + time**order / 1000)
    assert outputs == pytest.approx([3 + time**order / 1000 for time in times], abs=0.02)
    outputs = stack_outputs(stack, times, lambda time: 5 + time**order / 1000)  # the next run knows nothing of the last
    assert outputs == pytest.approx([5 + time**order / 1000 for time in times], abs=0.02)


def test_reuse_repeats_the_last_computed_addition():
    stack = peers.UniformStack({0, 2}, 0)
    assert stack_outputs(stack, [9.0, 8.0, 7.0, 6.0], lambda time: time) == [9, 9, 7, 7]


def calls(pipe):
    """How often each block's attention was computed, counted from now on."""
    counts = [0] * len(pipe.transformer.transformer_blocks)
    for index, block in enumerate(pipe.transformer.transformer_blocks):

        def count(*_, index=index):
            counts[index] += 1

        block.attn1.register_forward_pre_hook(count)
    return counts


@pytest.mark.parametrize(
    ("every", "last", "computed"), [(1, False, STEPS), (2, False, 6), (3, False, 5), (3, True, 6), (9, False, 4)]
)
def test_uniform_recipes_compute_the_first_steps_and_every_nth(every, last, computed):
    pipe = tiny_pipeline()
    expected = sample(pipe, STEPS)
    peers.install_uniform(pipe, STEPS, every=every, order=1, last=last)
    counts = calls(pipe)
    images = sample(pipe, STEPS)
    assert counts == [computed] * 2
    assert (images == expected).all() == (every == 1)
    assert (sample(pipe, STEPS) == images).all()


@pytest.mark.parametrize(
    ("technique", "never", "often"),
    [
        ("FirstBlockCache", {"threshold": -1.0}, {"threshold": 1e9}),
        ("SeaCache", {"threshold": 0.0}, {"threshold": 1e9, "max_consecutive_cached": 2}),
        (
            "TaylorSeerCache",
            {"of": "projection", "cache_interval": 1, "max_order": 1},
            {"of": "projection", "cache_interval": 3, "max_order": 1},
        ),
        (
            "PyramidAttentionBroadcast",
            {"spatial_attention_block_skip_range": 1},
            {"spatial_attention_block_skip_range": 2},
        ),
        ("FasterCache", {"unconditional_batch_skip_range": 1}, {"unconditional_batch_skip_range": 4}),
    ],
)
def test_caches_of_diffusers_take_a_dit(technique, never, often):
    pipe = tiny_pipeline()
    expected = sample(pipe, STEPS)
    peers._enable_diffusers(pipe, STEPS, technique, never)
    assert abs(sample(pipe, STEPS) - expected).max() < 1e-5
    pipe = tiny_pipeline()
    peers._enable_diffusers(pipe, STEPS, technique, often)
    images = sample(pipe, STEPS)
    assert abs(images - expected).max() > 1e-5
    assert (sample(pipe, STEPS) == images).all()  # a run leaves nothing to the next


def test_names_are_unique():
    names = [case.name for case in (*peers.cases(), *map(peers.eager, peers.cases()))]
    assert len(set(names)) == len(names)


def test_a_tool_that_is_not_installed_has_no_cases(monkeypatch):
    monkeypatch.setattr(peers, "version", lambda tool: None if tool == peers.CACHE_DIT else "1.0")
    assert peers.missing() == [peers.CACHE_DIT]
    assert peers.CACHE_DIT not in {case.tool for case in peers.cases()}
    assert planner.notes_of_missing() == [{"case": "cache-dit", "tool": "cache-dit", "note": "not installed"}]


def test_a_case_that_fails_is_noted(monkeypatch):
    monkeypatch.setattr(peers._demo, "load", lambda model: tiny_pipeline())
    monkeypatch.setattr(planner._demo, "sample", lambda pipe, labels, steps: None)

    def fail(pipe, steps):
        raise RuntimeError("no such block")

    rows = []
    fine, broken = (peers.Case(name, "some tool", {"n": 1}, what) for name, what in (("a", print), ("b", fail)))
    assert list(planner.loaded([fine, broken], SimpleNamespace(steps=2, batch=1), rows)) == ["a"]
    assert [(row["case"], row["settings"], row["note"]) for row in rows] == [
        ("b", "n=1", "RuntimeError: no such block")
    ]


def test_the_best_within_a_budget_is_taken_of_each_tool():
    rows = [
        {"case": "inductor, full", "ratio_to_inductor": 1.0, "psnr_db": None},
        {"case": "a", "tool": "x", "ratio_to_inductor": 0.45, "psnr_db": 40.0},
        {"case": "b", "tool": "x", "ratio_to_inductor": 0.3, "psnr_db": 41.0},
        {"case": "c", "tool": "y", "ratio_to_inductor": 0.51, "psnr_db": 50.0},
        {"case": "d", "tool": "y", "ratio_to_inductor": 0.52, "psnr_db": 60.0},
        {"case": "y", "tool": "y", "note": "RuntimeError: no"},
    ]
    found = [(row["budget"], row["tool"], row["case"]) for row in planner.best(rows, (0.5, 0.35))]
    assert found == [(0.5, "x", "b"), (0.5, "y", "c"), (0.35, "x", "b"), (0.35, "y", "none is as quick")]


@pytest.mark.parametrize("own", [True, False])
def test_pipelines_with_code_of_their_own_leave_each_other_s_graphs(own):
    """Without it, what a hook breaks in one pipeline is broken in one that was compiled before."""
    torch._dynamo.reset()
    ready = peers.with_own_code if own else lambda pipe: pipe
    plain, hooked = (ready(tiny_pipeline()) for _ in range(2))
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    plain.transformer.compile(backend=count, dynamic=False)
    expected = sample(plain, STEPS)
    assert len(graphs) == 1
    settings = {"of": "projection", "cache_interval": 3, "max_order": 1}
    peers._enable_diffusers(hooked, STEPS, "TaylorSeerCache", settings)
    hooked.transformer.compile(backend="eager")
    sample(hooked, STEPS)
    assert (sample(plain, STEPS) == expected).all()
    assert (len(graphs) == 1) == own
    torch._dynamo.reset()
