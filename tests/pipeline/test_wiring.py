"""Attaching to pipelines in place: what stays as it was, what is shared, and that calls do not see each other."""

import copy
import gc
import inspect
import pickle
import threading
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from difa_compile.decision import FULL
from difa_compile.errors import UnsupportedPipelineError
from difa_compile.pipeline.apply import apply, remove
from difa_compile.pipeline.rules import plan_from_rule
from difa_compile.pipeline.schedule_follower import ScheduleFollower
from difa_compile.pipeline.wiring import Wiring, unwired, wiring_of
from tests.support.fake_run import FakeRun
from tests.support.tiny_pipelines import sample, tiny_pipeline, tiny_transformer


class Called:
    """A function in place of a compiled forward."""

    def __init__(self, forward):
        self.forward = forward

    def attempt(self, args, kwargs):
        return nullcontext(SimpleNamespace(forward=self.forward))


class Watched:
    """A pipeline wired to a forward that adds ``offset`` to the model's output and notes step and branch."""

    def __init__(self, pipe, offset=0.0):
        self.pipe = pipe
        self.model = pipe.transformer
        self.runs = []
        self.calls = []
        self.offset = offset
        self.wiring = Wiring(pipe, {self.model: Called(self.forward)}, self.start)
        self.wiring.connect()

    def start(self, pipe, scheduler, arguments):
        def open_run(progress):
            self.runs.append(FakeRun(progress))
            return self.runs[-1]

        return ScheduleFollower(scheduler, open_run, one_call_each=True)

    def forward(self, *args, **kwargs):
        run = self.runs[-1]
        self.calls.append((run.steps[-1], run.branches[-1]))
        output = self.model._call_impl(*args, **kwargs)
        if self.offset:
            output.sample.add_(self.offset)
        return output


def test_pipeline_looks_the_same_and_is_restored():
    pipe = tiny_pipeline()
    config = pipe.config
    signature = inspect.signature(pipe.__call__)
    steps = inspect.signature(pipe.scheduler.set_timesteps)
    before = sample(pipe)
    watched = Watched(pipe)
    assert isinstance(pipe, DiTPipeline)
    assert (type(pipe).__name__, type(pipe).__module__, type(pipe).__qualname__) == (
        "DiTPipeline",
        DiTPipeline.__module__,
        "DiTPipeline",
    )
    assert isinstance(pipe.scheduler, DDIMScheduler)
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"
    assert inspect.signature(pipe.__call__) == signature
    assert inspect.signature(pipe.scheduler.set_timesteps) == steps
    assert pipe.config == config
    assert pipe.transformer is watched.model
    assert np.array_equal(sample(pipe), before)
    assert watched.calls == [(0, None), (1, None), (2, None), (3, None)]

    watched.wiring.disconnect()
    assert type(pipe) is DiTPipeline
    assert type(pipe.scheduler) is DDIMScheduler
    assert pipe.transformer._compiled_call_impl is None
    assert "cache_context" not in vars(pipe.transformer)
    assert wiring_of(pipe) is None
    assert np.array_equal(sample(pipe), before)
    assert len(watched.calls) == 4


def test_saved_files_are_unaffected(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "before")
    watched = Watched(pipe)
    sample(pipe)
    pipe.save_pretrained(tmp_path / "wired")
    for name in ("model_index.json", "scheduler/scheduler_config.json", "transformer/config.json"):
        assert (tmp_path / "wired" / name).read_text() == (tmp_path / "before" / name).read_text()
    assert watched.calls


def test_copies_are_plain():
    pipe = tiny_pipeline()
    watched = Watched(pipe)
    for scheduler in (copy.deepcopy(pipe.scheduler), pickle.loads(pickle.dumps(pipe.scheduler))):
        assert type(scheduler) is DDIMScheduler
        scheduler.set_timesteps(7)
        assert len(scheduler.timesteps) == 7
    twin = copy.deepcopy(pipe)
    assert type(twin) is DiTPipeline
    assert wiring_of(twin) is None
    assert twin.transformer._compiled_call_impl is None
    assert np.array_equal(sample(twin), sample(pipe))
    assert len(watched.calls) == 4


def test_copies_of_a_transformer_have_a_plain_cache_context():
    pipe = tiny_pipeline()
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, ffn_dim=8, num_layers=1
    )
    wiring = Wiring(pipe, {model: Called(model._call_impl)}, lambda *arguments: None)
    wiring.connect()
    assert "cache_context" in vars(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.cache_context.__self__ is twin
        with twin.cache_context("cond"):
            pass
    wiring.disconnect()
    assert "cache_context" not in vars(model)


def test_direct_calls_of_the_transformer_run_it_as_it_was():
    pipe = tiny_pipeline()
    watched = Watched(pipe, offset=5.0)
    inputs = {
        "hidden_states": torch.zeros(2, 1, 8, 8),
        "timestep": torch.tensor([3, 3]),
        "class_labels": torch.tensor([1, 2]),
    }
    with torch.no_grad():
        direct = pipe.transformer(**inputs).sample
        assert torch.equal(direct, pipe.transformer._call_impl(**inputs).sample)
    assert watched.calls == []


def test_unwired_block():
    pipe = tiny_pipeline()
    before = sample(pipe)
    watched = Watched(pipe, offset=0.5)
    with unwired():
        assert np.array_equal(sample(pipe), before)
    assert watched.calls == []
    assert not np.array_equal(sample(pipe), before)


def test_earlier_compilation_of_the_transformer_comes_back():
    pipe = tiny_pipeline()
    pipe.transformer.compile(backend="eager")
    before = pipe.transformer._compiled_call_impl
    watched = Watched(pipe)
    sample(pipe)
    watched.wiring.disconnect()
    assert pipe.transformer._compiled_call_impl is before


def test_pipelines_may_share_a_transformer_and_a_scheduler():
    transformer = tiny_transformer()
    scheduler = DDIMScheduler()
    one, two, plain = (tiny_pipeline(transformer=transformer, scheduler=scheduler) for _ in range(3))
    unwired = sample(plain)
    first, second = Watched(one), Watched(two, offset=0.5)
    assert np.array_equal(sample(one), unwired)
    assert not np.array_equal(sample(two), unwired)
    assert np.array_equal(sample(plain), unwired)
    assert (len(first.calls), len(second.calls)) == (4, 4)
    first.wiring.disconnect()
    assert np.array_equal(sample(one), unwired)
    assert not np.array_equal(sample(two), unwired)
    assert (len(first.calls), len(second.calls)) == (4, 8)
    second.wiring.disconnect()
    assert type(scheduler) is DDIMScheduler
    assert transformer._compiled_call_impl is None


def test_scheduler_may_be_exchanged():
    pipe = tiny_pipeline()
    old = pipe.scheduler
    watched = Watched(pipe)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(old.config)
    new = pipe.scheduler
    sample(pipe, steps=3)
    assert watched.calls == [(0, None), (1, None), (2, None)]
    assert type(old) is DDIMScheduler
    assert isinstance(new, DPMSolverMultistepScheduler)
    assert type(new) is not DPMSolverMultistepScheduler
    watched.wiring.disconnect()
    assert type(new) is DPMSolverMultistepScheduler


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_call_that_raises_ends_its_run(error):
    pipe = tiny_pipeline()
    before = sample(pipe)
    watched = Watched(pipe)
    plain = watched.forward

    def breaking(*args, **kwargs):
        if watched.runs[-1].steps[-1] == 2:
            raise error
        return plain(*args, **kwargs)

    watched.wiring.compiled = {watched.model: Called(breaking)}
    with pytest.raises(error):
        sample(pipe)
    assert watched.runs[0].resets == 1
    assert not watched.runs[0].active
    watched.wiring.compiled = {watched.model: Called(plain)}
    assert np.array_equal(sample(pipe), before)
    assert watched.runs[1].steps == [0, 1, 2, 3]


def test_wrong_arguments_are_reported_by_the_pipeline_itself():
    pipe = tiny_pipeline()
    Watched(pipe)
    with pytest.raises(TypeError, match="no_such_argument"):
        pipe(class_labels=[1], no_such_argument=1)


def test_cache_context_names_the_branch():
    pipe = tiny_pipeline()
    watched = Watched(pipe)
    inputs = {
        "hidden_states": torch.zeros(2, 1, 8, 8),
        "timestep": torch.tensor([3, 3]),
        "class_labels": torch.tensor([1, 2]),
    }
    entered = []

    @contextmanager
    def noting(self, name):
        entered.append(name)
        yield

    def two_calls(self, *args, **kwargs):
        self.scheduler.set_timesteps(2)
        for t in self.scheduler.timesteps:
            for name in ("cond", "uncond"):
                with self.transformer.cache_context(name):
                    output = self.transformer(**inputs).sample
            self.scheduler.step(output, t, inputs["hidden_states"])

    watched.wiring.disconnect()
    cls = type("TwoCalls", (DiTPipeline,), {"__call__": torch.no_grad()(two_calls)})
    pipe.__class__ = cls
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipe.transformer), "cache_context", noting, raising=False)
        watched = Watched(pipe)
        pipe()
        watched.wiring.disconnect()
    assert watched.calls == [(0, "cond"), (0, "uncond"), (1, "cond"), (1, "uncond")]
    assert entered == ["cond", "uncond", "cond", "uncond"]


def test_threads_do_not_see_each_other():
    transformer = tiny_transformer()
    pipes = [tiny_pipeline(transformer=transformer) for _ in range(2)]
    expected = [sample(pipe, steps=steps, seed=steps) for pipe, steps in zip(pipes, (5, 8), strict=True)]
    watched = [Watched(pipe) for pipe in pipes]
    barrier = threading.Barrier(2, timeout=30)
    for watch in watched:
        plain = watch.forward

        def meeting(*args, plain=plain, watch=watch, **kwargs):
            if watch.runs[-1].steps[-1] < 5:
                barrier.wait()  # both are in mid-run at the same step
            return plain(*args, **kwargs)

        watch.wiring.compiled = {watch.model: Called(meeting)}
    images = [None, None]

    def work(index, steps):
        images[index] = sample(pipes[index], steps=steps, seed=steps)

    threads = [threading.Thread(target=work, args=arguments) for arguments in ((0, 5), (1, 8))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(watch.calls) for watch in watched] == [5, 8]
    for image, wanted in zip(images, expected, strict=True):
        assert np.array_equal(image, wanted)


def test_flow_matching_scheduler():
    pipe = tiny_pipeline(scheduler=FlowMatchEulerDiscreteScheduler())
    pipe.scheduler.scale_model_input = lambda sample, timestep: sample  # DiTPipeline asks for it
    watched = Watched(pipe)
    sample(pipe, steps=3)
    assert [step for step, _ in watched.calls] == [0, 1, 2]
    assert watched.runs[0].progress[0] == pytest.approx(1.0)


def test_a_class_that_dynamo_gave_up_on_is_named_with_the_remedy():
    """Dynamo's limit of graphs is one per code, whoever compiles it."""
    other = tiny_pipeline()
    other.transformer.compile(backend="eager", dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1):
        for labels in ([1], [1, 2], [1, 2, 3]):
            sample(other, labels=labels)
    pipe = tiny_pipeline()
    apply(pipe, plan_from_rule(pipe, 4, lambda step, site: FULL), inner="eager")
    with pytest.raises(UnsupportedPipelineError, match=r"no longer compiles DiTTransformer2DModel.*Call torch._dynamo"):
        sample(pipe)
    torch._dynamo.reset()
    assert np.isfinite(sample(pipe)).all()


def test_a_transformer_is_left_as_it_was_though_another_pipeline_of_it_is_gone():
    one, two = tiny_pipeline(), tiny_pipeline()
    two.transformer = one.transformer
    for pipe in (one, two):
        apply(pipe, plan_from_rule(pipe, 2, lambda step, site: FULL), inner="eager")
    transformer = two.transformer
    del one, pipe
    gc.collect()
    remove(two)
    assert transformer._compiled_call_impl is None
    assert "cache_context" not in transformer.__dict__
