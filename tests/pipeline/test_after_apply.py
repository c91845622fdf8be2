"""What the user does to a transformer after a plan was applied: it counts as if done before, or the user is told."""

import copy
import types
import warnings

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from difa_compile.decision import FULL, REUSE
from difa_compile.errors import (
    NotAppliedError,
    PlanMismatchError,
    PlanNotFollowedError,
    PlanNotFollowedWarning,
    UnsupportedPipelineError,
)
from difa_compile.pipeline.apply import apply, remove
from difa_compile.pipeline.rules import plan_from_rule
from tests.support.tiny_pipelines import sample, tiny_pipeline, tiny_transformer

ROWS = [(FULL, FULL), (REUSE, FULL), (FULL, REUSE)]


def plan_of(pipe, rows=ROWS):
    return plan_from_rule(
        pipe, 3, lambda step, site: rows[step][int(site.path.split(".")[1])], inputs={"class_labels": [1, 2]}
    )


def close(left, right):
    return np.allclose(left, right, atol=2e-5, rtol=0)


def doubled(result):
    return type(result)(sample=result.sample * 1.5) if hasattr(result, "sample") else result * 1.5


def first_block(pipe):
    return pipe.transformer.transformer_blocks[0]


def patched(module):
    """``forward`` of an instance replaced by one that changes its result."""
    original = type(module).forward

    def forward(self, *args, **kwargs):
        return doubled(original(self, *args, **kwargs))

    module.forward = types.MethodType(forward, module)


def scaled_attention(pipe):
    class Scaled(AttnProcessor2_0):
        def __call__(self, *args, **kwargs):
            return 1.5 * super().__call__(*args, **kwargs)

    pipe.transformer.transformer_blocks[0].attn1.set_processor(Scaled())


def with_lora(pipe, scale):
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(5)
    config = LoraConfig(r=2, lora_alpha=scale, target_modules=["to_q", "to_v"], init_lora_weights=False)
    inject_adapter_in_model(config, pipe.transformer)


def rescaled_lora(pipe):
    for module in pipe.transformer.modules():
        if hasattr(module, "scaling"):
            module.scaling = dict.fromkeys(module.scaling, 3.0)


def other_weights(pipe):
    with torch.no_grad():
        for parameter in first_block(pipe).parameters():
            parameter.mul_(1.1)


def fused(pipe):
    for block in pipe.transformer.transformer_blocks:
        block.attn1.fuse_projections()
        block.attn1.set_processor(FusedAttnProcessor2_0())


def in_training(pipe):
    for module in pipe.transformer.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0  # of labels: it would draw
    pipe.transformer.train()


def replaced_block(pipe):
    pipe.transformer.transformer_blocks[0] = tiny_transformer(seed=4).transformer_blocks[0]


HOOKS = {
    "hook": lambda pipe: pipe.transformer.register_forward_hook(lambda m, args, out: doubled(out)),
    "hook with kwargs": lambda pipe: pipe.transformer.register_forward_hook(
        lambda m, args, kwargs, out: doubled(out) if "class_labels" in kwargs else out, with_kwargs=True
    ),
    "pre-hook": lambda pipe: pipe.transformer.register_forward_pre_hook(lambda m, args: args[0] * 1.5),
    "pre-hook with kwargs": lambda pipe: pipe.transformer.register_forward_pre_hook(
        lambda m, args, kwargs: (args, {**kwargs, "class_labels": kwargs["class_labels"].flip(0)}), with_kwargs=True
    ),
    "global hook": lambda pipe: register_module_forward_hook(
        lambda m, args, out: doubled(out) if isinstance(m, nn.Linear) else None
    ),
    "global pre-hook": lambda pipe: register_module_forward_pre_hook(
        lambda m, args: (args[0] * 1.1,) if isinstance(m, nn.SiLU) else None
    ),
    "hook of a block": lambda pipe: first_block(pipe).register_forward_hook(lambda m, args, out: doubled(out)),
    "pre-hook of a block": lambda pipe: first_block(pipe).register_forward_pre_hook(lambda m, args: (args[0] * 1.5,)),
    "hook of an attention": lambda pipe: first_block(pipe).attn1.register_forward_hook(lambda m, a, out: doubled(out)),
    "hook of a layer": lambda pipe: first_block(pipe).attn1.to_q.register_forward_hook(lambda m, a, out: out * 1.5),
    "hook of a layer with kwargs": lambda pipe: first_block(pipe).attn1.to_q.register_forward_hook(
        lambda m, args, kwargs, out: out * 1.5, with_kwargs=True
    ),
}
CHANGES = {
    **HOOKS,
    "forward": lambda pipe: patched(pipe.transformer),
    "forward of an attention": lambda pipe: patched(first_block(pipe).attn1),
    "forward of a layer": lambda pipe: patched(first_block(pipe).attn1.to_q),
    "attention processor": scaled_attention,
    "fused projections": fused,
    "LoRA": lambda pipe: with_lora(pipe, 4.0),
    "chunked feed-forward": lambda pipe: [
        block.set_chunk_feed_forward(8, 1) for block in pipe.transformer.transformer_blocks
    ],
    "weights": other_weights,
    "block": replaced_block,
    "dtype": lambda pipe: pipe.to(dtype=torch.float64),
    "training": in_training,
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "scheduler": lambda pipe: setattr(
        pipe, "scheduler", DDIMScheduler.from_config(pipe.scheduler.config, beta_schedule="scaled_linear")
    ),
}
QUICK = {"pre-hook with kwargs", "hook of a layer", "attention processor", "forward", "scheduler"}
SILENT_ON_IMAGES = {"fused projections", "chunked feed-forward", "training", "model offload"}


@pytest.fixture(scope="module")
def plan():
    return plan_of(tiny_pipeline())


def written_out(pipe):
    for block in pipe.transformer.transformer_blocks:
        block.attn1.set_processor(AttnProcessor())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda pipe: patched(first_block(pipe)), r"not in the model: transformer_blocks\.0\.attn1"),
        (written_out, r"2 heads x 8.*here it is self, 1 heads x 8"),
    ],
)
def test_a_change_that_gives_the_sites_another_name_or_form_is_said(change, words, plan):
    """A forward in place of a block's is what its attention is then found under; plain products have no heads."""
    pipe = tiny_pipeline()
    apply(pipe, plan, inner="eager")
    change(pipe)
    with pytest.raises(PlanMismatchError, match=words):
        sample(pipe, steps=1)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CHANGES]
)
def test_a_change_after_apply_counts_as_one_before(name, plan):
    early, late, plain = (tiny_pipeline() for _ in range(3))
    before, first = sample(plain, steps=3), sample(plain, steps=1)
    apply(late, plan, inner="eager")
    assert close(sample(late, steps=1), first), "the first step is full"
    changed = (plain,) if name.startswith("global") else (plain, late, early)
    handles = [CHANGES[name](pipe) for pipe in changed]
    try:
        apply(early, plan, inner="eager")
        now = sample(plain, steps=3)
        assert close(before, now) == (name in SILENT_ON_IMAGES), "a change that changes nothing tests nothing"
        assert close(sample(late, steps=1), sample(plain, steps=1)), "what is full is the model as it is by now"
        planned = sample(late, steps=3)
        assert close(planned, sample(early, steps=3))
        assert not close(planned, now), "nothing was reused"
    finally:
        for handle in handles:
            if isinstance(handle, RemovableHandle):
                handle.remove()
    if name in HOOKS:
        assert close(sample(late, steps=1), first), "the hook is gone again"


@pytest.mark.slow
def test_the_scale_of_a_lora_may_change():
    pipe, plain = tiny_pipeline(), tiny_pipeline()
    for each in (pipe, plain):
        with_lora(each, 4.0)
    apply(pipe, plan_of(pipe, [(FULL, FULL)] * 3), inner="eager")
    before = sample(pipe, steps=3)
    for each in (pipe, plain):
        rescaled_lora(each)
    assert close(sample(pipe, steps=3), sample(plain, steps=3))
    assert not close(sample(pipe, steps=3), before)


def test_hooks_are_called_as_the_module_calls_them():
    """Order, what each is given, replaced results, and ``always_call`` where the model raises."""
    model = tiny_transformer()
    inputs = {
        "timestep": torch.tensor([3, 3]),
        "class_labels": torch.tensor([1, 2]),
    }
    seen = []

    def note(name, result=None):
        def hook(module, *given):
            seen.append((name, module is model, [type(each).__name__ for each in given]))
            return result

        return hook

    pipe = tiny_pipeline(transformer=model)
    apply(pipe, plan_of(pipe), inner="eager")
    handles = [
        model.register_forward_hook(note("second")),
        model.register_forward_hook(note("first"), prepend=True),
        model.register_forward_hook(note("always"), always_call=True, with_kwargs=True),
        model.register_forward_pre_hook(note("pre")),
        model.register_forward_pre_hook(note("pre kwargs"), with_kwargs=True),
        model.register_forward_hook(note("replaces", ("replaced",))),
    ]
    plain = model._call_impl
    from difa_compile.pipeline.module_hooks import call_in_hooks

    with torch.no_grad():
        for broken in (False, True):
            x = torch.zeros(2, 3 if broken else 1, 8, 8)
            outcomes = []
            for call in (plain, lambda *a, **k: call_in_hooks(model, model.forward, a, k)):
                seen.clear()
                try:
                    result = call(x, **inputs)
                except RuntimeError as error:
                    result = str(error)
                outcomes.append((result, list(seen)))
            assert outcomes[0] == outcomes[1]
            assert [name for name, *_ in seen][-1] == ("always" if broken else "replaces")
    for handle in handles:
        handle.remove()


def test_hooks_that_no_graph_can_hold_are_refused_with_words():
    pipe = tiny_pipeline()
    apply(pipe, plan_of(pipe), inner="eager")
    sample(pipe, steps=3)
    handle = first_block(pipe).register_forward_hook(lambda m, args, out: torch._dynamo.graph_break())
    with pytest.raises(UnsupportedPipelineError, match="cannot be captured as one graph"):
        sample(pipe, steps=3)
    handle.remove()
    sample(pipe, steps=3)


# --- what takes the plan off ----------------------------------------------------------------------------------------


def test_another_transformer_is_not_run_without_its_plan():
    pipe = tiny_pipeline()
    own = pipe.transformer
    apply(pipe, plan_of(pipe), inner="eager")
    wanted = sample(pipe, steps=3)
    pipe.transformer = tiny_transformer(seed=1)
    with pytest.raises(NotAppliedError, match=r"was exchanged after the plan was applied.*remove\(pipe\)"):
        sample(pipe, steps=3)
    pipe.transformer = own
    assert np.array_equal(sample(pipe, steps=3), wanted)
    remove(pipe)


def test_compilation_after_apply_is_not_silent():
    pipe = tiny_pipeline()
    apply(pipe, plan_of(pipe), inner="eager")
    own = pipe.transformer
    pipe.transformer = torch.compile(own, backend="eager")
    with pytest.raises(UnsupportedPipelineError, match=r"wrapped by torch\.compile"):
        sample(pipe, steps=3)
    pipe.transformer = own
    own.compile(backend="eager")
    with pytest.raises(NotAppliedError, match=r"compiled in place \(transformer.compile\(\)\)"):
        sample(pipe, steps=3)
    remove(pipe)
    assert np.isfinite(sample(pipe, steps=3)).all()


@pytest.mark.parametrize("strict", [False, True])
def test_a_plan_that_dynamo_was_told_to_leave_out_is_said(strict):
    pipe = tiny_pipeline()
    full = sample(pipe, steps=3)
    apply(pipe, plan_of(pipe), inner="eager", strict=strict)
    with torch._dynamo.config.patch(disable=True), pytest.raises(PlanNotFollowedError, match="tracing is disabled"):
        sample(pipe, steps=3)
    with torch.compiler.set_stance("force_eager"):
        if strict:
            with pytest.raises(PlanNotFollowedError, match="step 0: DiTTransformer2DModel was called as it is"):
                sample(pipe, steps=3)
            return
        with pytest.warns(PlanNotFollowedWarning, match="torch.compile is switched off") as said:
            assert close(sample(pipe, steps=3), full)
    assert len([each for each in said if each.category is PlanNotFollowedWarning]) == 1
    with pytest.raises(UnsupportedPipelineError, match=r"while torch\.compile was switched off\. Call"):
        sample(pipe, steps=3)  # Dynamo has noted that it is to leave this code alone
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", PlanNotFollowedWarning)
        assert not close(sample(pipe, steps=3), full)


def test_copies_carry_no_plan_and_work():
    pipe = tiny_pipeline()
    full = sample(pipe, steps=3)
    apply(pipe, plan_of(pipe), inner="eager")
    planned = sample(pipe, steps=3)
    twin = tiny_pipeline(transformer=copy.deepcopy(pipe.transformer))
    assert np.array_equal(sample(twin, steps=3), full)
    assert np.array_equal(sample(pipe, steps=3), planned)


# --- guidance that comes and goes -----------------------------------------------------------------------------------


def test_a_batch_that_loses_its_halves_in_mid_run_is_refused():
    """Guidance cut off at a step: what is left is a batch of images, of which half must not stand for the rest."""
    pipe = tiny_pipeline()
    from difa_compile.decision import Decision

    shared = Decision.parse("full+cfg")
    plan = plan_from_rule(pipe, 3, lambda step, site: shared, inputs={"class_labels": [1, 2]}, conditional_half=0)
    apply(pipe, plan, inner="eager")
    calls = []
    model = pipe.transformer

    def halve(module, args, kwargs):
        calls.append(1)
        if len(calls) < 2:
            return None
        half = {k: v[:2] if isinstance(v, torch.Tensor) and v.shape[:1] == (4,) else v for k, v in kwargs.items()}
        return (args[0][:2], *args[1:]), half

    model.register_forward_pre_hook(halve, with_kwargs=True)
    with pytest.raises(PlanMismatchError, match="batch of 2 in its attention, after one of 4"):
        sample(pipe, steps=3)
