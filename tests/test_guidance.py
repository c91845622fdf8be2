"""Which half of a guided batch is conditional, checked against the source of the installed diffusers pipelines."""

import ast
import inspect
import re
from pathlib import Path

import pytest

from difa_compile.errors import DecisionError, UnsupportedPipelineError
from difa_compile.guidance import (
    CONDITIONAL_FIRST,
    TWO_CALLS,
    UNCONDITIONAL_FIRST,
    Guidance,
    conditional_half_of,
    guidance_is_on,
    guidance_of,
    how_to_guide,
    stated_guidance,
)

diffusers = pytest.importorskip("diffusers")


def bare(cls):
    """An instance without components: guidance is a fact of the class."""
    return object.__new__(cls)


def test_families():
    assert guidance_of(bare(diffusers.DiTPipeline)) == Guidance("batched", 0)
    assert guidance_of(bare(diffusers.PixArtSigmaPipeline)) == Guidance("batched", 1)
    assert guidance_of(bare(diffusers.StableDiffusion3Pipeline)) == Guidance("batched", 1)
    assert guidance_of(bare(diffusers.WanPipeline)) == Guidance("two-call", conditional_first=True)
    assert guidance_of(bare(diffusers.FluxPipeline)) == Guidance("two-call", conditional_first=True)
    assert not CONDITIONAL_FIRST & UNCONDITIONAL_FIRST
    assert not TWO_CALLS & (CONDITIONAL_FIRST | UNCONDITIONAL_FIRST)


def test_subclass_of_a_known_pipeline_is_known():
    class Mine(diffusers.DiTPipeline):
        pass

    assert conditional_half_of(bare(Mine)) == 0


@pytest.mark.parametrize("name", ["AllegroPipeline", "AuraFlowPipeline", "LattePipeline", "MochiPipeline"])
def test_order_read_from_the_source(name):
    """The output is taken apart as (uncond, text) in these."""
    source = inspect.getsource(getattr(diffusers, name).__call__)
    assert re.search(r"uncond\w*, \w+ = noise_pred\.chunk\(2\)", source)
    assert conditional_half_of(bare(getattr(diffusers, name))) == 1


def transformer_calls(source):
    """The variables to which a pipeline's source assigns what its transformer returns, from top to bottom."""
    assigned = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assign)]
    found = {
        (node.lineno, ast.unparse(node.targets[0]))
        for node in assigned
        for call in ast.walk(node.value)
        if isinstance(call, ast.Call) and re.search(r"transformer(_2)?$", ast.unparse(call.func))
    }
    return [name for _, name in sorted(found) if name != "_"]


def test_unnamed_calls_are_the_conditional_one_first():
    pipelines = Path(diffusers.__file__).parent / "pipelines"
    seen = 0
    for path in (path for folder in sorted(TWO_CALLS) for path in sorted((pipelines / folder).glob("pipeline_*.py"))):
        source = path.read_text()
        calls = [re.search("uncond|neg|null", name) is not None for name in transformer_calls(source)]
        if "cache_context" not in source and any(calls):
            assert calls == [False, True], path.name
            seen += 1
    assert seen > 15


def test_dit_splits_conditional_first():
    source = inspect.getsource(diffusers.DiTPipeline.__call__)
    assert "cond_eps, uncond_eps = torch.split(" in source


def test_errors_say_what_to_do():
    class Own:
        pass

    with pytest.raises(UnsupportedPipelineError, match="conditional_half=0"):
        conditional_half_of(Own())
    with pytest.raises(UnsupportedPipelineError, match="once for the conditional"):
        conditional_half_of(bare(diffusers.WanPipeline))


def test_guidance_switched_off():
    class Told:
        do_classifier_free_guidance = False

    assert guidance_is_on(Told(), {"guidance_scale": 7.0}) is False
    assert guidance_is_on(object(), {"guidance_scale": 4.0}) is True
    assert guidance_is_on(object(), {"guidance_scale": 1.0}) is False
    assert guidance_is_on(object(), {}) is None


def test_true_guidance_needs_something_negative():
    pipe, scales = bare(diffusers.FluxPipeline), {"guidance_scale": 3.5, "true_cfg_scale": 4.0}
    assert guidance_is_on(pipe, {**scales, "negative_prompt": "grey"}) is True
    assert guidance_is_on(pipe, {**scales, "negative_prompt": None, "negative_prompt_embeds": object()}) is True
    assert guidance_is_on(pipe, {**scales, "negative_prompt": None}) is False
    assert guidance_is_on(pipe, {**scales, "negative_prompt": "grey", "true_cfg_scale": 1.0}) is False
    assert "true_cfg_scale > 1 and a negative_prompt" in how_to_guide(pipe, scales)


def test_a_scale_that_is_an_input_of_the_transformer_is_no_guidance():
    """No pipeline makes a second call without something negative to make it with."""
    fill = bare(diffusers.FluxFillPipeline)
    assert guidance_is_on(fill, {"guidance_scale": 30.0}) is False
    assert "input of its transformer" in how_to_guide(fill, {"guidance_scale": 30.0})
    assert guidance_is_on(bare(diffusers.Kandinsky5T2VPipeline), {"guidance_scale": 5.0, "negative_prompt": None})
    assert guidance_is_on(bare(diffusers.DiTPipeline), {"guidance_scale": 4.0}) is True


def test_what_is_stated_of_guidance_completes_what_is_known():
    dit, wan, other = bare(diffusers.DiTPipeline), bare(diffusers.WanPipeline), object()
    assert stated_guidance(dit, None, None) == Guidance("batched", 0)
    assert stated_guidance(dit, "batched", None) == Guidance("batched", 0)
    assert stated_guidance(wan, None, None) == stated_guidance(wan, "two-call", None) == Guidance("two-call")
    assert stated_guidance(wan, "none", None) == stated_guidance(other, None, None) == Guidance("none")
    assert stated_guidance(other, "two-call", None) == Guidance("two-call")
    assert stated_guidance(other, None, 1) == Guidance("batched", 1)


@pytest.mark.parametrize(
    ("cls", "form", "half", "words"),
    [
        (diffusers.WanPipeline, "batched", None, "guidance='batched' contradicts WanPipeline, whose guidance is two"),
        (diffusers.WanPipeline, None, 0, "conditional_half=0 contradicts WanPipeline, whose guidance is two-call"),
        (diffusers.DiTPipeline, None, 1, "contradicts DiTPipeline, which puts the conditional half at 0"),
        (diffusers.DiTPipeline, "two-call", None, "whose guidance is batched"),
        (object, "two-call", 0, "has no halves of a batch"),
        (object, "double", None, "choose batched, two-call or none"),
        (object, None, 2, "conditional_half is 2"),
    ],
)
def test_contradictions_about_guidance(cls, form, half, words):
    with pytest.raises(DecisionError, match=words):
        stated_guidance(bare(cls), form, half)
