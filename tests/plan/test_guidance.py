"""Which half of a guided batch is conditional, checked against the source of the installed diffusers pipelines."""

import ast
import inspect
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from difa_compile.errors import DecisionError
from difa_compile.plan.guidance import (
    CONDITIONAL_FIRST,
    NO_HALVES,
    TWO_CALLS,
    UNCONDITIONAL_FIRST,
    Guidance,
    StatedGuidance,
    _guidance_in,
    guidance_is_on,
    guidance_of,
    how_to_guide,
    settle,
)

diffusers = pytest.importorskip("diffusers")


def bare(cls):
    """An instance without components: guidance is a fact of the class."""
    return object.__new__(cls)


def transformer_pipelines():
    """All pipeline classes of the installed diffusers with a denoising transformer."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in dir(diffusers):
            try:
                cls = getattr(diffusers, name, None)  # some names stand for what is not installed, or is gone
            except (ImportError, RuntimeError):  # of a library that is not installed
                continue
            if inspect.isclass(cls) and issubclass(cls, diffusers.DiffusionPipeline):
                taken = inspect.signature(cls.__init__).parameters
                if {"transformer", "transformer_2"} & set(taken):
                    found.append(cls)
    return found


PIPELINES = transformer_pipelines()


def by_form(form):
    return [cls for cls in PIPELINES if guidance_of(bare(cls)).form == form]


def call_source(cls):
    return inspect.getsource(inspect.unwrap(cls.__call__))


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

    assert guidance_of(bare(Mine)) == Guidance("batched", 0)


@pytest.mark.parametrize("name", ["AllegroPipeline", "AuraFlowPipeline", "LattePipeline", "MochiPipeline"])
def test_order_read_from_the_source(name):
    """The output is taken apart as (uncond, text) in these."""
    source = inspect.getsource(getattr(diffusers, name).__call__)
    assert re.search(r"uncond\w*, \w+ = noise_pred\.chunk\(2\)", source)
    assert guidance_of(bare(getattr(diffusers, name))) == Guidance("batched", 1)


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
        if _guidance_in(f"{path.parent.name}.{path.stem}").form != "two-call":
            continue
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

    assert re.search("Own: it is not known.*conditional_half=0", settle(Own()).why_no_half)
    assert re.search("WanPipeline calls.*once for the conditional", settle(bare(diffusers.WanPipeline)).why_no_half)
    assert settle(bare(diffusers.DiTPipeline)).why_no_half is None


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
    assert settle(dit) == settle(dit, StatedGuidance("batched")) == Guidance("batched", 0)
    assert settle(dit, StatedGuidance("none")) == Guidance("none")
    assert settle(wan) == settle(wan, StatedGuidance("two-call")) == Guidance("two-call", conditional_first=True)
    assert settle(wan, StatedGuidance("none")).form == "none"
    assert settle(other) == settle() == Guidance("unknown")
    assert settle(other, StatedGuidance("two-call")) == Guidance("two-call")
    assert settle(other, StatedGuidance(conditional_half=1)) == Guidance("batched", 1)


def test_what_is_not_stated_is_as_the_plan_says():
    for made_for, half, told, form in (("two-call", None, 0, "two-call"), ("batched", 1, 0, "batched")):
        plan = SimpleNamespace(settings=SimpleNamespace(guidance=made_for, conditional_half=half), decisions=())
        settled = settle(stated=StatedGuidance(conditional_half=told), plan=plan)
        assert settled.form == form
        assert settled.conditional_half == (told if form == "batched" else None)


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
        settle(bare(cls), StatedGuidance(form, half))


# --- every pipeline that the installed diffusers has -----------------------------------------------------------------

FOLDERS = Path(diffusers.__file__).parent / "pipelines"
PARTS = re.compile(r"(\w+), (\w+) = (?:torch\.split\(|[\w.]+\.chunk\()")
"""Where a pipeline takes the model's output apart into two."""
OTHER_ORDERS = {
    "AceStepPipeline": r"torch\.cat\(\[encoder_hidden_states, null_encoder_hidden_states\], dim=0\)",
    "ZImage": r"pos_out = model_out_list\[:",
}
"""Those that do it otherwise: what in their source says that the conditional half stands first."""


def is_unconditional(name):
    return re.search("uncond|neg|null", name) is not None


def test_every_pipeline_has_an_entry():
    """A new release of diffusers shows here what is to be read off its source."""
    assert len(PIPELINES) > 100
    missing = sorted(f"{cls.__module__}.{cls.__name__}" for cls in by_form("unknown"))
    assert not missing, "add their folders to one of the tables in difa_compile/plan/guidance.py"


def test_every_module_with_a_transformer_has_an_entry():
    """Also those that cannot be imported here, because they need another library."""
    paths = [
        path for path in FOLDERS.rglob("pipeline_*.py") if re.search(r"\n +transformer=transformer,", path.read_text())
    ]
    assert len(paths) > 100
    names = [".".join(path.relative_to(FOLDERS).with_suffix("").parts) for path in paths]
    assert [name for name in names if _guidance_in(name) is None] == []


@pytest.mark.parametrize("cls", by_form("batched"), ids=lambda cls: cls.__name__)
def test_the_order_of_every_batched_pipeline_is_that_of_its_source(cls):
    source = call_source(cls)
    orders = [(is_unconditional(one), is_unconditional(two)) for one, two in PARTS.findall(source)]
    orders = {order for order in orders if any(order)}
    half = guidance_of(bare(cls)).conditional_half
    if orders:
        assert orders == {(half == 1, half == 0)}
    else:
        pattern = next(pattern for name, pattern in OTHER_ORDERS.items() if cls.__name__.startswith(name))
        assert half == 0
        assert re.search(pattern, source)


@pytest.mark.parametrize("cls", by_form("batched"), ids=lambda cls: cls.__name__)
def test_every_batched_pipeline_tells_when_it_does_not_guide(cls):
    """By its property, or because its scale at 1 leaves the batch as it is; there is no default that cannot be told."""
    pipe = bare(cls)
    if isinstance(getattr(cls, "do_classifier_free_guidance", None), property):
        pipe._guidance_scale = 0.0 if cls.__name__.startswith("ZImage") else 1.0
        for name in ("audio_guidance_scale", "_audio_guidance_scale"):
            setattr(pipe, name, 1.0) if not isinstance(getattr(cls, name, None), property) else None
        told = cls.do_classifier_free_guidance.fget
        try:
            assert told(pipe) is False
        except AttributeError:  # it asks its transformer too
            assert re.search("_guidance_scale", inspect.getsource(told))
        return
    parameters = inspect.signature(cls.__call__).parameters
    assert isinstance(parameters["guidance_scale"].default, (int, float))
    assert guidance_is_on(pipe, {"guidance_scale": 1.0}) is False
    assert re.search(r"guidance_scale\s*>\s*1", call_source(cls))


@pytest.mark.parametrize("cls", by_form("none"), ids=lambda cls: cls.__name__)
def test_pipelines_without_halves_are_refused_with_the_reason(cls):
    pipe, guidance = bare(cls), guidance_of(bare(cls))
    assert guidance.reason
    assert guidance_is_on(pipe, {"guidance_scale": 7.0}) is False
    assert guidance.reason in how_to_guide(pipe, {})
    assert guidance.reason in settle(pipe).why_no_half
    with pytest.raises(DecisionError, match=re.escape(guidance.reason)):
        settle(pipe, StatedGuidance(conditional_half=1))
    assert settle(pipe) == guidance
    if "guides in no way" in guidance.reason:
        source = call_source(cls)
        assert not any(is_unconditional(name) for pair in PARTS.findall(source) for name in pair)
        assert not any(name.startswith("negative") for name in inspect.signature(cls.__call__).parameters)


def test_perturbed_attention_guidance_has_three_parts():
    source = inspect.getsource(diffusers.PixArtSigmaPAGPipeline._apply_perturbed_attention_guidance)
    assert "noise_pred_uncond, noise_pred_text, noise_pred_perturb = noise_pred.chunk(3)" in source
    assert "noise_pred_text, noise_pred_perturb = noise_pred.chunk(2)" in source


def test_every_entry_is_of_a_pipeline_that_is_there():
    tables = CONDITIONAL_FIRST | UNCONDITIONAL_FIRST | TWO_CALLS | set(NO_HALVES)
    paths = {entry: FOLDERS / entry.replace(".", "/") for entry in tables}
    assert [entry for entry, path in paths.items() if not (path.is_dir() or path.with_suffix(".py").is_file())] == []
    assert len(tables) == sum(map(len, (CONDITIONAL_FIRST, UNCONDITIONAL_FIRST, TWO_CALLS, NO_HALVES)))
