"""Runs whose model is captured anew in the middle: they go on with their caches, or say what they lose."""

import re
import threading
import time
import warnings

import pytest
import torch
from torch import nn

from difa_compile.backend.entry import difa
from difa_compile.backend.run import Run, sampling
from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.errors import CachesLostError, CachesLostWarning, PlanNotFollowedWarning
from difa_compile.pipeline.rules import plan_from_rule
from tests.support.by_hand import assert_near, by_hand, call, plain_output, with_text
from tests.support.tiny_models import at_step, captured, family_plan, plain, plain_plan

D = Decision.parse
ROWS = ["full", "window(band:2)+residual", "reuse", "window(band:2)+residual", "reuse", "reuse"]
DECISIONS = [D(text) for text in ROWS]


class Counting:
    """The backend, with the captures that Dynamo asked for."""

    def __init__(self):
        self.captured = 0

    def __call__(self, module, inputs, *, options):
        self.captured += 1
        return difa(module, inputs, options={"inner": "eager", **options})


def compiled(model, backend, rows=DECISIONS, **options):
    return torch.compile(model, backend=backend, dynamic=False, options={"plan": plain_plan(rows), **options})


def sampled(model, fast, change):
    """Outputs under the plan and by hand, with ``change`` made after the second step; and the run."""
    _, inputs = plain()
    expected, pairs = by_hand(model), []
    with sampling(fast, len(ROWS)) as run:
        for step in range(len(ROWS)):
            if step == 2:
                change()
            run.step(step)
            now = at_step(inputs, step)
            found = call(fast, now)
            with torch._dynamo.config.patch(disable=True):
                pairs.append((found, plain_output(expected, [DECISIONS[step]] * 2, now)))
    return pairs, run


def test_two_models_captured_at_the_same_time_keep_their_caches():
    """Both miss Dynamo's graphs, so both are captured; the later graph then serves the first model, in mid-run."""
    models = [plain()[0], plain()[0]]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(1.1)
    capturing, about_to_call, second_has_called = (threading.Event() for _ in range(3))
    plans = [plain_plan(DECISIONS)] * 2
    handed = [set(), set()]
    backend_calls = []

    def backend(module, inputs, *, options):
        backend_calls.append(module)
        if len(backend_calls) == 1:
            capturing.set()
            assert about_to_call.wait(30)
            time.sleep(0.3)  # the other thread looks for a graph, finds none, and waits for Dynamo's lock
        return difa(module, inputs, options={"inner": "eager", **options})

    class Noting(Run):
        def call(self, capture, args):
            handed[int(self.models[0] is models[1])].add(capture)
            return super().call(capture, args)

    fast = [
        torch.compile(model, backend=backend, dynamic=False, options={"plan": plan})
        for model, plan in zip(models, plans, strict=True)
    ]
    found, promotions, failures = {}, {}, []

    def sample(index):
        try:
            if index == 1:
                assert capturing.wait(30)
            run = Noting(models[index], len(ROWS))
            run.activate()
            for step in range(len(ROWS)):
                if index == 0 and step == 2:
                    assert second_has_called.wait(30)
                run.step(step)
                if index == 1:
                    about_to_call.set()
                found[index, step] = call(fast[index], at_step(plain()[1], 50 * index + step))
                if index == 1:
                    second_has_called.set()
            promotions[index] = run.promotions
            run.deactivate()
        except BaseException as error:
            failures.append(error)
            for event in (capturing, about_to_call, second_has_called):
                event.set()

    threads = [threading.Thread(target=sample, args=(index,)) for index in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", CachesLostWarning)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert not failures, failures
    assert len(backend_calls) == 2, "the race that this test is about did not come about"
    assert len(handed[0]) == 2, "the first model was not switched to the later graph"
    assert promotions == {0: (), 1: ()}
    for index, model in enumerate(models):
        expected = by_hand(model)
        for step, decision in enumerate(DECISIONS):
            now = at_step(plain()[1], 50 * index + step)
            with torch._dynamo.config.patch(disable=True):
                assert_near(found[index, step], plain_output(expected, [decision] * 2, now))


class Switched(nn.Module):
    """An attention in two forms of one computation, and a scale, as LoRAs and attention processors are switched."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.scale = 1.0
        self.written_out = False

    def forward(self, x):
        y = self.inner(x)
        if self.written_out:
            y = y.clone()
        return y * self.scale


def switched(model):
    for layer in model.layers:
        layer.attention = Switched(layer.attention)
    return model


def in_another_thread(act):
    thread = threading.Thread(target=act)
    thread.start()
    thread.join()


CHANGES = {
    "reset": lambda model: torch._dynamo.reset,
    "reset in another thread": lambda model: lambda: in_another_thread(torch._dynamo.reset),
    "training flag": lambda model: model.train,
    "weights": lambda model: lambda: [parameter.data.mul_(1.05) for parameter in model.parameters()],
    "new parameters": lambda model: (
        lambda: [
            setattr(layer.norm, "weight", nn.Parameter(layer.norm.weight.detach() * 1.1)) for layer in model.layers
        ]
    ),
    "first parameter": lambda model: (
        lambda: setattr(model.patch, "weight", nn.Parameter(model.patch.weight.detach() * 1.1))
    ),
    "head": lambda model: (
        lambda: setattr(model, "head", nn.Sequential(model.head, nn.Linear(12, 12, bias=False)).requires_grad_(False))
    ),
}
RECAPTURED = {"reset", "reset in another thread", "head"}


@pytest.mark.parametrize("name", CHANGES)
def test_a_model_altered_in_mid_run_goes_on_with_its_caches(name):
    """As the model run by hand does: an output that the plan reuses is the one of the step before, whoever made it."""
    torch.manual_seed(1)
    model, _ = plain()
    backend = Counting()
    with warnings.catch_warnings():
        warnings.simplefilter("error", CachesLostWarning)
        warnings.simplefilter("error", PlanNotFollowedWarning)
        pairs, run = sampled(model, compiled(model, backend), CHANGES[name](model))
    assert backend.captured == 1 + (name in RECAPTURED)
    assert run.promotions == ()
    for found, wanted in pairs:
        assert_near(found, wanted)


@pytest.mark.parametrize("change", [("scale", 0.5), ("written_out", True)])
def test_an_attention_altered_in_mid_run_goes_on_with_its_caches(change):
    model = switched(plain()[0])
    backend = Counting()
    plan = plan_from_rule(model, len(ROWS), lambda step, site: DECISIONS[step], inputs=plain()[1])
    fast = torch.compile(model, backend=backend, dynamic=False, options={"plan": plan})

    def alter():
        for layer in model.layers:
            setattr(layer.attention, *change)

    outputs = []
    with warnings.catch_warnings(), sampling(fast, len(ROWS)) as run:
        warnings.simplefilter("error", CachesLostWarning)
        for step in range(len(ROWS)):
            if step == 2:
                alter()
            run.step(step)
            outputs.append(call(fast, at_step(plain()[1], step)))
    assert backend.captured == 2
    assert run.promotions == ()
    with torch.no_grad():
        assert not torch.allclose(outputs[2], model(**at_step(plain()[1], 2)), atol=1e-4), "nothing was reused"


# --- caches that do not fit -----------------------------------------------------------------------------------------


def larger_batch(inputs):
    return {"x": torch.cat([inputs["x"], inputs["x"]])}


class Lowered:
    """The compiled model, called under autocast."""

    def __init__(self, fast):
        self.fast = fast

    def __call__(self, **inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return self.fast(**inputs)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("alter", "words"),
    [
        (lambda fast, inputs: (fast, larger_batch(inputs)), "its attention has a batch of 4, not 2"),
        (lambda fast, inputs: (Lowered(fast), inputs), "is in torch.bfloat16 on cpu, not torch.float32 on cpu"),
    ],
)
def test_caches_that_do_not_fit_are_lost_with_words(alter, words, strict):
    model, inputs = plain()
    fast = compiled(model, difa, inner="eager", strict=strict)

    def sample(run):
        for step in range(len(ROWS)):
            run.step(step)
            one, now = alter(fast, at_step(inputs, step)) if step >= 2 else (fast, at_step(inputs, step))
            call(one, now)

    match = rf"step 2: PlainTransformer goes on as another graph.*{words}.*layers.0.attention and 1 more sites"
    if strict:
        with sampling(fast, len(ROWS)) as run, pytest.raises(CachesLostError, match=match):
            sample(run)
        return
    with warnings.catch_warnings(record=True) as said, sampling(fast, len(ROWS)) as run:
        warnings.simplefilter("always")
        sample(run)
    lost = [warning for warning in said if warning.category is CachesLostWarning]
    assert len(lost) == 1, "once per run"
    assert re.search(match, str(lost[0].message))
    assert {promotion.step for promotion in run.promotions} == {2}


def test_forms_that_take_turns_lose_their_caches_at_every_turn_and_say_so_once():
    """Batches of 2 and 4 by turns, in one branch: neither may read what it has left two steps before."""
    model, inputs = plain()
    fast = compiled(model, difa, [FULL, REUSE, REUSE, REUSE], inner="eager")

    def sample():
        with sampling(fast, 4) as run:
            for step in range(4):
                run.step(step)
                now = at_step(inputs, step)
                now = larger_batch(now) if step % 2 else now
                found = call(fast, now)
                with torch.no_grad(), torch._dynamo.config.patch(disable=True):
                    assert torch.equal(found, model(**now)), step

    with pytest.warns(CachesLostWarning, match="step 1") as said:
        sample()
    assert len(said) == 1


def test_a_form_that_only_joins_in_loses_nothing():
    """Two forms in every step, each with caches of its own; a third begins where nothing is read."""
    model, inputs = plain()
    fast = compiled(model, difa, [FULL, REUSE, FULL, REUSE], inner="eager")
    with warnings.catch_warnings(), sampling(fast, 4) as run:
        warnings.simplefilter("error", CachesLostWarning)
        for step in range(4):
            run.step(step)
            now = at_step(inputs, step)
            call(fast, now if step < 2 else larger_batch(now))
    assert run.promotions == ()


def test_a_text_of_another_length_in_mid_run_is_said():
    model, inputs, _, _ = captured("sd3")
    fast = torch.compile(
        model, backend=difa, dynamic=False, options={"plan": family_plan("sd3", [FULL, REUSE, REUSE]), "inner": "eager"}
    )

    def sample():
        with sampling(fast, 3) as run:
            for step, tokens in enumerate((7, 4, 4)):
                run.step(step)
                call(fast, with_text(inputs, tokens, step))

    with pytest.warns(CachesLostWarning, match=r"step 1: SD3.*has 28 tokens, not 31"):
        sample()


def test_experts_and_intervals_of_guidance_are_no_loss():
    """A model that takes over, and a branch that is entered again, begin anew by design; it is in the promotions."""
    models = [plain()[0] for _ in range(2)]
    rows = [FULL, REUSE, REUSE, REUSE]
    fast = [compiled(model, difa, rows, inner="eager") for model in models]
    run = Run(models[0], 4, experts=models[1:])
    run.activate()
    with warnings.catch_warnings():
        warnings.simplefilter("error", CachesLostWarning)
        for step in range(4):
            run.step(step)
            for name in ("cond", "uncond") if step != 1 else ("cond",):
                run.branch(name)
                call(fast[step > 1], at_step(plain()[1], step))
    run.deactivate()
    assert run.promotions


# --- whose caches, whose calls --------------------------------------------------------------------------------------


def test_an_id_that_is_given_anew_owns_nothing():
    """Ids of freed parameters are those of later ones: a run must not take another model's calls for its own."""
    model = plain()[0]
    run = Run(model, 2)
    assert run.owns(model.patch.weight)
    weight = model.patch.weight
    model.patch.weight = nn.Parameter(weight.detach().clone())
    assert run.owns(model.patch.weight)
    other = nn.Parameter(torch.zeros(1))
    run._owners[id(other)] = run._owners.pop(id(weight), next(iter(run._owners.values())))
    assert not run.owns(other)


def test_dynamos_limit_in_mid_run_is_said():
    """Beyond its limit Dynamo runs the model as it is; here that happens in the middle of a run that went well."""
    model, inputs = plain()
    fast = compiled(model, difa, [FULL] * 4, inner="eager")

    def sample():
        with torch._dynamo.config.patch(recompile_limit=1), sampling(fast, 4) as run:
            for step in range(4):
                run.step(step)
                call(fast, larger_batch(inputs) if step in (1, 2) else inputs)
            assert run.calls == 2

    with pytest.warns(PlanNotFollowedWarning, match="step 1 and 1 more of a sampling run.*recompile_limit"):
        sample()
