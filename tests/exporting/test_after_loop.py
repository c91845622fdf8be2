"""What a pipeline does after its loop, as a graph: against the pipeline's own images."""

import pytest
import torch

pytest.importorskip("diffusers", reason="whole pipelines of diffusers")
pytest.importorskip("transformers", reason="text encoders of whole pipelines")

import numpy as np
from diffusers import DPMSolverMultistepScheduler

from difa_compile.bundle.program import replay
from difa_compile.demo import load_demo
from difa_compile.errors import AfterLoopError, NotAppliedError
from difa_compile.exporting.after_loop import after_loop
from difa_compile.exporting.probing import probe
from tests.support.image_cases import CASES
from tests.support.programs import calling
from tests.support.tiny_pipelines import quiet, tiny_pipeline
from tests.support.video_components import wan

STEPS = 3
ROUNDING = 2e-5
"""Of images from 0 to 1: what the latents of a replay and of the pipeline differ by, through a decoder."""


def generator():
    return torch.Generator().manual_seed(3)


def replayed(pipe, inputs, images, further=None):
    probed = probe(pipe, inputs, STEPS)
    latents = replay(probed.program, generator(), probed.conditioning, calling(pipe, **(further or {})), images=images)
    return probed.program, latents


def images_of(pipe, inputs, output_type="pt"):
    return pipe(**{**inputs, "num_inference_steps": STEPS, "generator": generator(), "output_type": output_type})[0]


@pytest.mark.parametrize("as_bytes", [False, True])
def test_images_of_a_replay_are_the_pipelines(as_bytes):
    """From noise to images with no scheduler and no pipeline; labels for guidance in one call."""
    pipe, inputs = tiny_pipeline(), {"class_labels": [1, 2]}
    program, latents = replayed(pipe, inputs, 2)
    after = after_loop(pipe, inputs, program, 2, as_bytes=as_bytes)
    found = after.program.module()(latents)
    assert (after.least, after.most) == (1, None)
    assert (tuple(found.shape[1:]), found.dtype) == (after.shape, after.dtype)
    if as_bytes:
        wanted = torch.from_numpy((images_of(pipe, inputs, "np") * 255).round().astype(np.uint8))
        assert found.dtype is torch.uint8
        assert int((found.int() - wanted.int()).abs().max()) <= 1
        assert float((found != wanted).float().mean()) < 0.01
    else:
        assert float((found - images_of(pipe, inputs)).abs().max()) < ROUNDING
    # Other numbers of images by the same graph.
    one = after.program.module()(latents[1:])
    assert torch.allclose(one.float(), found[1:].float(), atol=ROUNDING)
    assert len(after.program.module()(torch.cat([latents] * 3))) == 6


def test_weights_are_the_decoders_under_their_own_names():
    pipe, inputs = tiny_pipeline(), {"class_labels": [1]}
    program = probe(pipe, inputs, STEPS).program
    after = after_loop(pipe, inputs, program, 1)
    own = dict(pipe.vae.named_parameters(prefix="vae"))
    assert after.weights
    assert set(after.weights) == {name for name in own if name.startswith("vae.decoder.")}
    assert set(after.program.state_dict) == {*after.weights, *after.constants}
    assert not after.program.constants
    assert all(torch.equal(after.program.state_dict[name], own[name]) for name in after.weights)
    assert not [name for name in after.constants if after.program.state_dict[name].numel() > 16]
    # Exchanged weights are read: nothing of them is baked.
    latents = torch.randn(1, *program.shape, generator=generator())
    before = after.program.module()(latents)
    with torch.no_grad():
        for parameter in pipe.vae.decoder.parameters():
            parameter.mul_(1.5)
    changed = after_loop(pipe, inputs, program, 1).program.module()(latents)
    loaded = after.program.module()
    loaded.load_state_dict({name: own[name] for name in after.weights}, strict=False)
    assert torch.equal(loaded(latents), changed)
    assert not torch.equal(changed, before)
    assert len(list(pipe.vae.encoder.parameters())) > 0


@pytest.mark.slow
def test_the_demo():
    pipe = quiet(load_demo())
    inputs = {"class_labels": [3, 4]}
    program, latents = replayed(pipe, inputs, 2)
    after = after_loop(pipe, inputs, program, 2)
    assert float((after.program.module()(latents) - images_of(pipe, inputs)).abs().max()) < ROUNDING
    assert (after.least, after.most) == (1, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "pixart_sigma", "sd3"])
def test_pipelines_with_an_autoencoder(name):
    """Convolutions are traced for two images and more, or for one: that is said."""
    case = CASES[name]
    pipe, inputs = case.make(), case.inputs()
    if name == "pixart_sigma":  # timesteps go through numpy
        pipe.scheduler = DPMSolverMultistepScheduler(prediction_type="v_prediction")
    further = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}} if name == "pixart_sigma" else {}
    program, latents = replayed(pipe, inputs, 2, further)
    after = after_loop(pipe, inputs, program, 2)
    found = after.program.module()(latents)
    assert float((found - images_of(pipe, inputs)).abs().max()) < ROUNDING
    assert (after.least, after.most) == (2, None)
    assert after.program.module()(torch.cat([latents, latents[:1]])).shape[0] == 3
    single = {key: value[:1] if isinstance(value, list) else value for key, value in inputs.items()}
    alone = after_loop(pipe, single, program, 1)
    assert (alone.least, alone.most) == (1, 1)
    assert float((alone.program.module()(latents[:1]) - found[:1]).abs().max()) < ROUNDING


@pytest.mark.slow
def test_videos(tmp_path):
    tiny = wan(tmp_path)
    inputs = {key: value for key, value in tiny.arguments.items() if key != "num_inference_steps"}
    program, latents = replayed(tiny.pipe, inputs, 1)
    after = after_loop(tiny.pipe, inputs, program, 1)
    assert float((after.program.module()(latents) - images_of(tiny.pipe, inputs)).abs().max()) < ROUNDING


def test_the_pipeline_is_left_as_it_was():
    pipe, inputs = tiny_pipeline(), {"class_labels": [1]}
    before = images_of(pipe, inputs)
    program = probe(pipe, inputs, STEPS).program
    after_loop(pipe, inputs, program, 1)
    for each in (pipe.transformer, pipe.vae, pipe.scheduler):
        assert {"forward", "decode", "step"}.isdisjoint(each.__dict__)
    assert torch.equal(images_of(pipe, inputs), before)


def test_another_number_of_images_than_the_call_makes_is_refused():
    pipe = tiny_pipeline()
    program = probe(pipe, {"class_labels": [1]}, STEPS).program
    with pytest.raises(AfterLoopError, match="how many images"):
        after_loop(pipe, {"class_labels": [1]}, program, 2)


class Lists(type(tiny_pipeline())):
    """Returns lists, as pipelines do that make texts or files."""

    def __call__(self, **arguments):
        return ([super().__call__(**arguments)[0]],)


class Asks(type(tiny_pipeline())):
    """Looks at its images before it returns them."""

    def __call__(self, class_labels, num_inference_steps=3, generator=None, output_type="pt"):
        images = super().__call__(class_labels, 1.0, generator, num_inference_steps, output_type)[0]
        return (images * 0 if bool((images > 2).any()) else images,)


def test_what_is_no_tensor_is_refused():
    pipe = tiny_pipeline()
    program = probe(pipe, {"class_labels": [1]}, STEPS).program
    pipe.__class__ = Lists
    with pytest.raises(AfterLoopError, match="returns list"):
        after_loop(pipe, {"class_labels": [1]}, program, 1)


def test_what_cannot_be_traced_is_refused():
    pipe = tiny_pipeline()
    program = probe(pipe, {"class_labels": [1], "guidance_scale": 1.0}, STEPS).program
    pipe.__class__ = Asks
    with pytest.raises(AfterLoopError, match="cannot be exported as one graph"):
        after_loop(pipe, {"class_labels": [1]}, program, 1)


def test_a_planned_pipeline_is_refused(monkeypatch):
    pipe = tiny_pipeline()
    program = probe(pipe, {"class_labels": [1]}, STEPS).program
    monkeypatch.setattr("difa_compile.exporting.after_loop.wiring_of", lambda pipe: object())
    with pytest.raises(NotAppliedError, match="carries a plan"):
        after_loop(pipe, {"class_labels": [1]}, program, 1)
