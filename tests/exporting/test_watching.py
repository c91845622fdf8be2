"""A call of a pipeline, watched: what is seen, that values can be exchanged, and that nothing stays behind."""

import pytest
import torch

pytest.importorskip("diffusers", reason="whole pipelines of diffusers")

from diffusers import DDIMScheduler, DDPMScheduler

from difa_compile.errors import NotLinearError, SamplingLoopError
from difa_compile.exporting.watching import Watch, first_tensor, put, quiet, wide, with_first
from tests.support.tiny_pipelines import NamedCalls, sample, tiny_pipeline, two_call_pipeline


def watched(pipe, value=lambda event, given: given() if event.kind == "call" else None, **call):
    watch = Watch(pipe, {"transformer": pipe.transformer}, value, native=True)
    arguments = {"class_labels": [1], "num_inference_steps": 2, "generator": torch.Generator().manual_seed(3)}
    watch.run({**arguments, **call})
    return watch


def test_what_happens_is_seen_in_order():
    events = watched(tiny_pipeline()).events
    kinds = [(event.kind, event.step, event.rows, event.shape) for event in events]
    one, two = (1, (1, 8, 8)), (2, (1, 8, 8))
    assert kinds == [
        ("draw", 0, *one),
        ("call", 0, 0, ()),
        ("clamp", 0, *two),
        ("sample", 0, *two),
        ("call", 1, 0, ()),
        ("clamp", 1, *two),
        ("sample", 1, *two),
    ]
    assert [event.number for event in events] == list(range(7))
    assert events[0].told == ("float32", True)
    assert events[2].told == (-1.0, 1.0)
    assert set(events[1].tensors) == {"hidden_states", "timestep", "class_labels"}


def test_where_decoding_begins_the_call_ends():
    pipe = tiny_pipeline()
    watch = watched(pipe)
    assert watch.result.shape == (1, 1, 8, 8)
    last = watch.events[-1].tensors["output"]
    torch.testing.assert_close(watch.result, last[:1] / pipe.vae.config.scaling_factor)


@pytest.mark.parametrize(("kind", "at"), [(NamedCalls, "cond"), (None, None)])
def test_calls_of_a_branch(kind, at):
    """As diffusers names them; calls without names are the first and the second of their step."""
    pipe = two_call_pipeline(kind) if kind else two_call_pipeline()
    if kind:
        pipe.transformer.cache_context = cache_context
    branches = [event.form[1] for event in watched(pipe).events if event.kind == "call"]
    assert branches == [at, "uncond"] * 2


def cache_context(name):
    raise AssertionError("the watch stands in its place")


def test_values_are_exchanged():
    pipe = tiny_pipeline()

    def value(event, given):
        if event.kind == "call":
            return given()
        return torch.full((event.rows, *event.shape), float(event.number))

    watch = watched(pipe, value)
    calls = [event for event in watch.events if event.kind == "call"]
    assert bool((calls[0].tensors["hidden_states"] == 0).all())
    assert bool((calls[1].tensors["hidden_states"] == 3).all())
    assert bool((watch.events[-1].tensors["given"] == 3).all())


def test_a_watched_call_is_the_call_it_would_have_been():
    pipe = tiny_pipeline(scheduler=DDIMScheduler(clip_sample=False))
    wanted = sample(pipe, 3, labels=(1,))
    found = watched(pipe, num_inference_steps=3).result
    images = (pipe.vae.decode(found).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(images.detach(), torch.from_numpy(wanted))


def test_nothing_stays_behind_when_a_call_fails():
    pipe = tiny_pipeline()

    def value(event, given):
        raise RuntimeError("no value")

    with pytest.raises(RuntimeError, match="no value"):
        watched(pipe, value)
    for each in (pipe.transformer, pipe.vae, pipe.scheduler):
        assert {"forward", "decode", "step"}.isdisjoint(each.__dict__)
    assert torch.overrides._get_current_function_mode_stack() == []
    assert sample(pipe, 2).shape == (2, 8, 8, 1)


def test_other_draws_are_refused_by_name():
    pipe = tiny_pipeline(scheduler=DDPMScheduler())
    plain = pipe.scheduler.step

    def step(model_output, timestep, sample):
        return plain(model_output + torch.randn_like(model_output), timestep, sample)

    pipe.scheduler.step = step
    with pytest.raises(SamplingLoopError, match="torch's randn_like"):
        watched(pipe)


def test_dynamic_thresholding_is_refused_by_name():
    pipe = tiny_pipeline(scheduler=DDIMScheduler(thresholding=True))
    with pytest.raises(NotLinearError, match="dynamic thresholding"):
        watched(pipe)


def test_half_precision_gives_way_unless_it_is_wanted():
    assert [wide(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)] == [
        torch.float32, torch.float32, torch.float32, torch.float64, torch.int64,
    ]  # fmt: skip


def test_what_models_return_with_another_tensor():
    one, other = torch.zeros(2), torch.ones(3)
    assert with_first((one, 5), other, "sample") == (other, 5)
    assert with_first(one, other, "sample") is other
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    made = with_first(Transformer2DModelOutput(sample=one), other, "sample")
    assert made.sample is other
    assert first_tensor(made, "sample") is other
    assert first_tensor([one], "sample") is one
    with pytest.raises(SamplingLoopError, match="a tensor was expected"):
        first_tensor(("text",), "sample")


def test_what_stood_there_before_comes_back():
    from contextlib import ExitStack

    class Thing:
        def method(self):
            return "plain"

    thing = Thing()
    with ExitStack() as stack:
        put(stack, thing, "method", lambda: "other", None)
        assert thing.method() == "other"
    assert "method" not in thing.__dict__
    thing.method = held = lambda: "held"
    with ExitStack() as stack:
        put(stack, thing, "method", lambda: "other", None)
    assert thing.method is held


def test_no_progress_bar():
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(desc="kept")
    with quiet(pipe):
        assert pipe._progress_bar_config["disable"] is True
    assert pipe._progress_bar_config == {"desc": "kept"}
    with quiet(object()):
        pass
