"""A call of a pipeline with something else in place of a plan: what it is given, and that it is left as it was."""

import builtins
import copy
import re

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline, HeunDiscreteScheduler

from difa_compile.backend.options import Options
from difa_compile.backend.run import Run
from difa_compile.calibration.sampling import (
    call_arguments,
    identity_of,
    models_of,
    plain,
    progress_bar,
    sample_with,
)
from difa_compile.errors import (
    CalibrationError,
    MissingDependencyError,
    PipelineCallError,
    ScheduleError,
    UnsupportedPipelineError,
)
from difa_compile.plan.guidance import StatedGuidance, settle
from difa_compile.plan.schedule import FULL_ROLE
from tests.support.slow_search import LAYERS, inputs
from tests.support.tiny_pipelines import tiny_pipeline, tiny_transformer

STEPS = 3


class Everything(Run):
    """Computes everything; notes what it is asked."""

    def __init__(self, model, progress, seen, raises):
        super().__init__(model, len(progress), progress=progress)
        self.seen, self.raises = seen, raises

    def call(self, capture, args):
        self.calls += 1
        self.seen.append(self.index)
        if self.raises is not None and self.index == 1:
            raise self.raises
        return capture.execute(args, (FULL_ROLE,) * len(capture.model.units), {})[0]


class Sampled:
    def __init__(self, pipe, raises=None, done=0):
        self.models = (pipe.transformer,)
        self.progress = ()
        self.done = done
        self.raises = raises
        self.seen, self.guided, self.closed = [], None, 0

    def open(self, progress, guided):
        self.progress, self.guided = progress, guided
        return Everything(self.models[0], progress, self.seen, self.raises)

    def close(self):
        self.closed += 1


def sampled(pipe, with_what, given=None):
    guidance = settle(pipe, StatedGuidance(conditional_half=None))
    options = Options(inner="eager", cfg={"conditional_half": 0})
    call = call_arguments(pipe, given or inputs(), STEPS)
    return sample_with(pipe, call, with_what, guidance, options, what="a test", kept=lambda: "a file")


def test_every_step_passes_by_and_the_pipeline_is_left_as_it_was(pipe):
    pipe.set_progress_bar_config(desc="mine")
    given = inputs()
    before = given["generator"].get_state()
    everything = Sampled(pipe)
    found = sampled(pipe, everything, given)
    assert everything.seen == list(range(STEPS))
    assert everything.guided is True
    assert everything.closed == 1
    assert len(everything.progress) == STEPS
    assert torch.equal(given["generator"].get_state(), before)
    assert pipe._progress_bar_config == {"desc": "mine"}
    assert type(pipe) is DiTPipeline
    assert pipe.transformer._compiled_call_impl is None
    wanted = pipe(**given, num_inference_steps=STEPS, output_type="latent")
    assert np.allclose(np.asarray(found.images), np.asarray(wanted.images), atol=1e-5)


@pytest.mark.parametrize(
    ("error", "done", "note"),
    [
        pytest.param(
            KeyboardInterrupt,
            0,
            f"interrupted after 0 of {STEPS} steps. Start it again.*from the beginning",
            marks=pytest.mark.slow,
        ),
        (KeyboardInterrupt, 1, f"interrupted after 1 of {STEPS} steps; they are saved in a file. Start it.*from there"),
        pytest.param(CalibrationError, 1, None, marks=pytest.mark.slow),
    ],
)
def test_an_error_in_mid_run_leaves_the_pipeline_as_it_was(pipe, error, done, note):
    given = inputs()
    before = given["generator"].get_state()
    everything = Sampled(pipe, error("stop"), done)
    with pytest.raises(error, match="stop") as caught:
        sampled(pipe, everything, given)
    assert everything.closed == 1
    assert torch.equal(given["generator"].get_state(), before)
    assert type(pipe) is DiTPipeline
    assert pipe.transformer._compiled_call_impl is None
    notes = getattr(caught.value, "__notes__", [])
    if note is None:
        assert not [each for each in notes if "interrupted" in each]
    else:
        assert re.search(note, notes[-1])


def test_what_the_pipeline_does_not_take(pipe):
    everything = Sampled(pipe)
    with pytest.raises(PipelineCallError):
        sampled(pipe, everything, {**inputs(), "no_such_argument": 1})
    assert everything.closed == 1
    assert type(pipe) is DiTPipeline


# The call


def test_arguments_of_a_call(pipe):
    given = inputs()
    assert call_arguments(pipe, given, 7) == {**given, "num_inference_steps": 7, "output_type": "latent"}
    assert call_arguments(pipe, {**given, "output_type": "pt"}, 7)["output_type"] == "pt"
    assert call_arguments(pipe, {"class_labels": [1], "generator": None}, 7)["generator"].initial_seed() == 0
    assert call_arguments(pipe, {**given, "num_inference_steps": 7}, 7)["num_inference_steps"] == 7
    with pytest.raises(ScheduleError, match="ask for num_inference_steps=20, but calibration is over 7 steps"):
        call_arguments(pipe, {**given, "num_inference_steps": 20}, 7)
    assert "num_inference_steps" not in given


def test_a_pipeline_that_takes_neither_generator_nor_form():
    class Bare:
        def __call__(self, prompt, num_inference_steps=50):
            pass

    assert call_arguments(Bare(), {"prompt": "a"}, 3) == {"prompt": "a", "num_inference_steps": 3}


# Whose call it is


def test_transformers_must_be_of_one_kind(pipe, monkeypatch):
    assert models_of(pipe) == (pipe.transformer,)
    two = [tiny_transformer(), tiny_transformer(layers=3)]
    monkeypatch.setattr("difa_compile.calibration.sampling.find_transformers", lambda pipe: two)
    with pytest.raises(UnsupportedPipelineError, match="not of one class and configuration"):
        models_of(pipe)
    two[1] = tiny_transformer(seed=5)
    assert models_of(pipe) == tuple(two)


def test_a_pipeline_without_a_scheduler(pipe):
    pipe.scheduler = None
    with pytest.raises(UnsupportedPipelineError):
        models_of(pipe)


def test_the_identity_tells_everything_apart(pipe):
    def identity(pipe=pipe, call=None, settings=None, steps=3):
        call = call or call_arguments(pipe, inputs(), 3)
        return identity_of(pipe, models_of(pipe), call, settings or {"a": 1}, steps)

    usual = identity()
    assert identity() == usual
    assert identity(tiny_pipeline(layers=LAYERS)) == usual

    def differ(other):
        return {name for name in usual if other[name] != usual[name]}

    assert differ(identity(settings={"a": 2})) == {"settings"}
    assert differ(identity(steps=4)) == {"settings"}
    assert differ(identity(call=call_arguments(pipe, inputs(seed=4), 3))) == {"inputs"}
    assert differ(identity(tiny_pipeline(seed=9, layers=LAYERS))) == {"weights"}
    assert "model config_digest" in differ(identity(tiny_pipeline(layers=3)))
    other = copy.copy(pipe)
    other.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    assert differ(identity(other)) == {"scheduler"}
    with torch.autocast("cpu", torch.bfloat16):
        assert differ(identity()) == {"settings"}


def test_plain_configurations():
    config = {"a": (1, 2.5), "_hidden": 3, "b": {"c": None, "d": True}, 4: "text", "e": torch.float16}
    assert plain(config) == {"a": [1, 2.5], "b": {"c": None, "d": True}, "4": "text", "e": "torch.float16"}


# Progress


def test_the_bar_shows_what_is_done_and_where_it_goes_on(capsys):
    bar = progress_bar(10, 4, what="measuring", unit="step")
    bar.update(1)
    bar.close()
    shown = capsys.readouterr().err
    assert "measuring:  50%" in shown
    assert "5/10" in shown


def test_without_tqdm_the_remedy_is_named(monkeypatch):
    real = builtins.__import__

    def blocked(name, *rest, **options):
        if name == "tqdm":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(MissingDependencyError, match="pip install tqdm, or calibrate with progress=False"):
        progress_bar(10, 0, what="measuring", unit="step")
