"""Plans on transformers that accelerate or diffusers have put hooks around."""

import accelerate
import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry, apply_group_offloading
from diffusers.hooks import ModelHook as DiffusersHook

import difa_compile
from difa_compile.comparison.compare import compiled_by
from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.errors import UnsupportedPipelineError
from difa_compile.pipeline.apply import apply, remove
from difa_compile.pipeline.inspection import inspect_model
from difa_compile.pipeline.module_hooks import check_hooks, inner_forward, outer_hook
from difa_compile.pipeline.rules import plan_from_rule
from tests.support.tiny_pipelines import sample, sample_plainly, tiny_pipeline

LABELS = {"class_labels": [1, 2]}
ROWS = [(FULL, FULL), (REUSE, Decision.parse("full+cfg")), (FULL, REUSE), (REUSE, REUSE)]


def plan_of(pipe):
    return plan_from_rule(
        pipe, 4, lambda step, site: ROWS[step][int(site.path.split(".")[1])], inputs=LABELS, conditional_half=0
    )


def close(left, right):
    return np.allclose(left, right, atol=2e-5, rtol=0)


class Absent(ModelHook):
    """Keeps the weights out of the model but for the time of a call, as offloading does."""

    def __init__(self):
        self.weights = {}
        self.calls = 0

    def init_hook(self, module):
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                self.weights.setdefault(name, parameter.clone())
                parameter.fill_(float("nan"))
        return module

    def pre_forward(self, module, *args, **kwargs):
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(self.weights[name])
        self.calls += 1
        return args, kwargs

    def post_forward(self, module, output):
        self.init_hook(module)
        return output


@pytest.fixture
def pipe():
    return tiny_pipeline()


# The hook around the whole transformer


@pytest.mark.slow
def test_a_hook_around_the_transformer_brings_the_weights_for_every_planned_call(pipe):
    wanted = sample_plainly(pipe, ROWS)
    full = sample(pipe)
    hook = Absent()
    add_hook_to_module(pipe.transformer, hook)
    assert np.array_equal(sample(pipe), full)
    plan = plan_of(pipe)
    calls = hook.calls
    applied = apply(pipe, plan, inner="eager")
    assert close(sample(pipe), wanted)
    assert not close(wanted, full)
    assert hook.calls == calls + 4
    assert [record for record in applied.records if record.outcome == "skipped"] == []
    assert len(applied.captures) == 1
    remove(pipe)
    assert outer_hook(pipe.transformer) is hook
    assert np.array_equal(sample(pipe), full)


@pytest.mark.slow
def test_calibration_and_inspection_run_within_the_hook(pipe):
    settings = {"steps": 3, "threshold": 0.5, "inner": "eager", "progress": False}
    sites = inspect_model(pipe, LABELS).site_infos
    plan = difa_compile.calibrate(pipe, LABELS, **settings)
    add_hook_to_module(pipe.transformer, Absent())
    assert inspect_model(pipe, LABELS).site_infos == sites
    assert difa_compile.calibrate(pipe, LABELS, **settings).rows == plan.rows


def test_a_hook_may_come_go_and_change_while_a_plan_is_applied(pipe):
    wanted = sample_plainly(pipe, ROWS)
    applied = apply(pipe, plan_of(pipe), inner="eager")
    assert close(sample(pipe), wanted)
    add_hook_to_module(pipe.transformer, Absent())
    assert close(sample(pipe), wanted)
    hook = pipe.transformer._hf_hook
    remove_hook_from_module(pipe.transformer)
    hook.pre_forward(pipe.transformer)  # what was taken away is given back
    assert close(sample(pipe), wanted)
    seen = []

    class Watching(ModelHook):
        no_grad = True

        def post_forward(self, module, output):
            seen.append(torch.is_grad_enabled())
            return output

    add_hook_to_module(pipe.transformer, SequentialHook(Watching(), Absent()))
    assert close(sample(pipe), wanted)
    assert len(seen) == 4
    assert len(applied.captures) <= 2


def test_model_offload_of_diffusers(pipe):
    """The pipeline takes the hooks off and puts them on again at the end of every call."""
    wanted = sample_plainly(pipe, ROWS)
    full = sample(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    applied = apply(pipe, plan_of(pipe), inner="eager")
    for _ in range(2):
        assert close(sample(pipe), wanted)
    pipe.remove_all_hooks()
    assert close(sample(pipe), wanted)
    pipe.enable_model_cpu_offload(device="cpu")
    assert close(sample(pipe), wanted)
    assert len(applied.captures) <= 2
    remove(pipe)
    assert np.array_equal(sample(pipe), full)
    pipe.remove_all_hooks()
    assert np.array_equal(sample(pipe), full)


def test_inspection_leaves_offloaded_models_offloaded(pipe):
    """It stops the pipeline before the point at which that would free what was brought in."""
    freed = []
    pipe.maybe_free_model_hooks = lambda: freed.append(1)
    inspect_model(pipe, LABELS)
    assert freed == [1]


def test_comparisons_compile_within_the_hook(pipe):
    full = sample(pipe)
    hook = Absent()
    add_hook_to_module(pipe.transformer, hook)
    with compiled_by(pipe.transformer, "aot_eager"):
        assert close(sample(pipe), full)
    assert hook.calls == 4
    assert pipe.transformer._compiled_call_impl is None


def test_an_error_within_the_hook_is_raised_as_itself(pipe):
    plan = plan_of(pipe)
    add_hook_to_module(pipe.transformer, Absent())
    apply(pipe, plan, inner="eager")
    with pytest.raises(difa_compile.errors.PlanMismatchError, match="guidance off"):
        sample(pipe, guidance_scale=1.0)


def test_forward_hooks_lie_around_the_hook_of_accelerate(pipe):
    plan, order = plan_of(pipe), []
    wanted = sample_plainly(pipe, ROWS)

    class Noting(Absent):
        def pre_forward(self, module, *args, **kwargs):
            order.append("accelerate")
            return super().pre_forward(module, *args, **kwargs)

    add_hook_to_module(pipe.transformer, Noting())
    apply(pipe, plan, inner="eager")
    pipe.transformer.register_forward_pre_hook(lambda module, args: order.append("before"))
    pipe.transformer.register_forward_hook(lambda module, args, output: order.append("after"))
    assert close(sample(pipe), wanted)
    assert order == ["before", "accelerate", "after"] * 4


# Hooks between the layers


def by_layer(pipe):
    accelerate.cpu_offload(pipe.transformer, torch.device("cpu"))


def by_group(level):
    def enable(pipe):
        where = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
        apply_group_offloading(pipe.transformer, **where, offload_type=level, num_blocks_per_group=1)

    return enable


def casting(pipe):
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def device_map(pipe):
    add_hook_to_module(pipe.transformer.transformer_blocks[1], accelerate.hooks.AlignDevicesHook("cpu"))


def cache(pipe):
    block = pipe.transformer.transformer_blocks[0]
    HookRegistry.check_if_exists_or_initialize(block).register_hook(DiffusersHook(), "block_cache")


REFUSED = {
    "sequential": (by_layer, "offloaded layer by layer"),
    "group leaf": (by_group("leaf_level"), "group offloading"),
    "group block": (by_group("block_level"), "group offloading"),
    "casting": (casting, "layerwise casting"),
    "device map": (device_map, "a device map"),
    "cache": (cache, r"hook of diffusers \(block_cache\)"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_hooks_between_layers_are_refused(pipe, name):
    """By whatever needs the graph, and also where they are enabled after the plan was applied."""
    enable, words = REFUSED[name]
    plan = plan_of(pipe)
    apply(pipe, plan, inner="eager")
    enable(pipe)
    with pytest.raises(UnsupportedPipelineError, match=words):
        sample(pipe)
    remove(pipe)
    settings = {"steps": 3, "inner": "eager", "progress": False}
    for attempt in (
        lambda: apply(pipe, plan, inner="eager"),
        lambda: difa_compile.calibrate(pipe, LABELS, **settings),
        lambda: inspect_model(pipe, LABELS),
    ):
        with pytest.raises(UnsupportedPipelineError, match=rf"(?s){words}.*Remedy"):
            attempt()


def test_models_without_hooks_pass(pipe):
    check_hooks(pipe.transformer)
    with pipe.transformer.cache_context("cond") if hasattr(pipe.transformer, "cache_context") else torch.no_grad():
        check_hooks(pipe.transformer)  # an empty registry of diffusers may be there
    assert outer_hook(pipe.transformer) is None
    assert inner_forward(pipe.transformer) == pipe.transformer.forward
