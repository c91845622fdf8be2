"""Runs: steps, branches and caches of one pass through a schedule."""

import threading
import warnings
from dataclasses import replace

import pytest
import torch

from difa_compile.backend.run import Run, is_sampled, sampling
from difa_compile.decision import FULL, REUSE, Decision, Window
from difa_compile.errors import PlanMismatchError, RunError, ScheduleError
from difa_compile.layout import Layout
from tests.support.altered import Altered
from tests.support.by_hand import EXACT, assert_near, by_hand, call, compiled, plain_output, with_text
from tests.support.tiny_models import (
    ATTENTIONS,
    FAMILIES,
    at_step,
    captured,
    captured_plain,
    family_plan,
    plain,
    plain_plan,
)

pytest.importorskip("diffusers")

D = Decision.parse
LAYOUTS = {
    "dit": Layout((4, 4)),
    "pixart": Layout((4, 4)),
    "sd3": Layout((4, 6), after=7),
    "flux": Layout((4, 6), before=7),
    "wan": Layout((3, 4, 4)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_follows_its_plan_through_a_schedule_without_recompiling(family):
    model, inputs, _, _ = captured(family)
    window = "window(band:3)"
    rows = [
        D(text.replace("W", window))
        for text in (
            "full",
            "W+residual",
            "reuse",
            "W+residual+cfg",
            "forecast:1",
            "full+cfg",
            "reuse+cfg",
            "forecast:2(step)+cfg",
            "forecast:1",
        )
    ]
    progress = (1.0, 0.95, 0.9, 0.8, 0.7, 0.65, 0.5, 0.2, 0.1)
    plan = family_plan(family, rows, conditional_half=1)
    paths = [name for name, _ in model.named_modules() if ATTENTIONS[family](name)]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fast = compiled(model, plan, strict=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            expected = Altered(model, paths, [LAYOUTS[family]] * len(paths), 1, Window.parse("band:3"))
            with sampling(fast, len(rows), progress=progress) as run:
                for step, decision in enumerate(rows):
                    run.step(step)
                    now = at_step(inputs, step)
                    with torch._dynamo.config.patch(disable=True):
                        wanted = expected([decision] * len(paths), now, progress[step])
                    assert_near(call(fast, now), wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_nested_runs_keep_their_caches_apart():
    model, inputs, _, _ = captured_plain()
    fast = compiled(model, plain_plan([FULL, REUSE]))
    with sampling(fast, 2) as outer:
        first = call(fast, at_step(inputs, 0))
        with sampling(fast, 2) as inner:
            call(fast, at_step(inputs, 7))
            inner.step(1)
            inside = call(fast, at_step(inputs, 8))
            assert inner.cache_bytes() == 0, "the last step needs nothing any more"
            assert outer.cache_bytes() > 0
        outer.step(1)
        outside = call(fast, at_step(inputs, 1))
    for start, step, found in ((0, 1, outside), (7, 8, inside)):
        expected = by_hand(model)
        once = plain_output(expected, [FULL] * 2, at_step(inputs, start))
        if start == 0:
            assert torch.equal(first, once)
        assert_near(found, plain_output(expected, [REUSE] * 2, at_step(inputs, step)))


def test_threads_do_not_share_runs():
    model, inputs, _, _ = captured_plain()
    steps = 4
    fast = compiled(model, plain_plan([FULL] + [REUSE] * (steps - 1)))
    with sampling(fast, steps):
        call(fast, inputs)  # compile here, so that the threads only run
    found, failures = {}, []
    together = threading.Barrier(2, timeout=60)

    def sample(name, offset):
        try:
            with sampling(fast, steps) as run:
                for step in range(steps):
                    together.wait()
                    run.step(step)
                    found[name, step] = call(fast, at_step(inputs, offset + step))
        except Exception as error:
            failures.append(error)
            together.abort()

    threads = [threading.Thread(target=sample, args=(name, offset)) for name, offset in (("a", 0), ("b", 50))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures
    for name, offset in (("a", 0), ("b", 50)):
        expected = by_hand(model)
        for step in range(steps):
            row = [REUSE if step else FULL] * 2
            assert_near(found[name, step], plain_output(expected, row, at_step(inputs, offset + step)))


def test_stepping_back_starts_over():
    model, inputs, _, _ = captured_plain()
    fast = compiled(model, plain_plan([FULL, REUSE, REUSE]))
    with sampling(fast, 3) as run:
        call(fast, at_step(inputs, 0))
        run.step(1)
        call(fast, at_step(inputs, 1))
        assert run.cache_bytes() > 0
        run.step(0)
        assert run.cache_bytes() == 0
        again = call(fast, at_step(inputs, 5))
        run.step(1)
        second = call(fast, at_step(inputs, 6))
    expected = by_hand(model)
    assert torch.equal(again, plain_output(expected, [FULL] * 2, at_step(inputs, 5)))
    assert_near(second, plain_output(expected, [REUSE] * 2, at_step(inputs, 6)))


def test_leaving_a_step_out_is_refused():
    model, inputs, _, _ = captured_plain()
    fast = compiled(model, plain_plan([FULL, FULL, REUSE]))
    with sampling(fast, 3) as run:
        call(fast, inputs)
        with pytest.raises(ScheduleError, match="step 2 follows step 0: 1 steps were left out"):
            run.step(2)


@pytest.mark.parametrize("step", [-1, 3, 1.0, True, "1"])
def test_a_step_outside_the_schedule_is_refused(step):
    with sampling(torch.nn.Linear(1, 1), 3) as run, pytest.raises(ScheduleError, match="outside the 3 steps"):
        run.step(step)


@pytest.mark.parametrize("steps", [0, -2, 1.5, True])
def test_a_run_needs_a_whole_number_of_steps(steps):
    with pytest.raises(ScheduleError):
        Run(torch.nn.Linear(1, 1), steps)


def test_progress_must_fit_the_steps():
    with pytest.raises(ScheduleError, match="progress has 2 values"):
        Run(torch.nn.Linear(1, 1), 3, progress=(1.0, 0.5))


def test_entering_in_the_middle_promotes_readers_to_full():
    model, inputs, _, _ = captured_plain()
    fast = compiled(model, plain_plan([FULL, REUSE, REUSE, FULL, REUSE]))
    with sampling(fast, 5) as run:
        run.step(2)
        found = call(fast, at_step(inputs, 2))
        assert [(p.step, p.site, p.wanted) for p in run.promotions] == [(2, 0, REUSE), (2, 1, REUSE)]
        run.step(3)
        call(fast, at_step(inputs, 3))
        run.step(4)
        last = call(fast, at_step(inputs, 4))
    expected = by_hand(model)
    assert torch.equal(found, plain_output(expected, [FULL] * 2, at_step(inputs, 2)))
    plain_output(expected, [FULL] * 2, at_step(inputs, 3))
    assert_near(last, plain_output(expected, [REUSE] * 2, at_step(inputs, 4)))


def test_a_plan_is_carried_onto_another_number_of_steps():
    model, inputs, _, _ = captured_plain()
    fast = compiled(model, plain_plan([FULL, REUSE]))
    expected = by_hand(model)
    with sampling(fast, 4) as run:
        for step, decision in enumerate([FULL, FULL, REUSE, REUSE]):
            run.step(step)
            now = at_step(inputs, step)
            assert_near(call(fast, now), plain_output(expected, [decision] * 2, now))


def test_an_exception_inside_a_step_leaves_the_next_run_clean():
    model, inputs, _, _ = captured_plain()
    fast = compiled(model, plain_plan([FULL, REUSE]))
    opened = []

    def fail():
        with sampling(fast, 2) as run:
            opened.append(run)
            call(fast, at_step(inputs, 9))
            assert run.cache_bytes() > 0
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert opened[0].cache_bytes() == 0
    assert not is_sampled(model)
    expected = by_hand(model)
    with sampling(fast, 2) as run:
        assert is_sampled(model)
        assert torch.equal(call(fast, inputs), plain_output(expected, [FULL] * 2, inputs))
        run.step(1)
        assert_near(call(fast, at_step(inputs, 1)), plain_output(expected, [REUSE] * 2, at_step(inputs, 1)))


def test_outside_a_run_the_model_is_full_and_warns_once():
    model, inputs, _, _ = captured_plain()
    fast = compiled(model, plain_plan([FULL, REUSE]))
    with torch.no_grad():
        wanted = model(**inputs)
    with pytest.warns(UserWarning, match="outside a sampling run"):
        assert torch.equal(call(fast, inputs), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(call(fast, inputs), wanted)


def test_a_run_of_another_model_is_not_used():
    model, inputs, _, _ = captured_plain()
    other, _ = plain()
    fast = compiled(model, plain_plan([FULL, REUSE]))
    with sampling(fast, 2) as mine:
        call(fast, inputs)
        mine.step(1)
        with sampling(other, 2) as theirs:
            found = call(fast, at_step(inputs, 1))
            assert theirs.peak_cache_bytes == 0
    expected = by_hand(model)
    plain_output(expected, [FULL] * 2, inputs)
    assert_near(found, plain_output(expected, [REUSE] * 2, at_step(inputs, 1)))
    with sampling(other, 2), pytest.warns(UserWarning, match="outside a sampling run"):
        call(compiled(model, plain_plan([FULL])), inputs)


# --- classifier-free guidance in two calls ------------------------------------------------------------------------


def two_calls(rows):
    return plain_plan([D(text) for text in rows], guidance="two-call")


def test_the_unconditional_call_takes_what_the_conditional_call_computed():
    model, inputs, _, _ = captured_plain()
    rows = ["full+cfg", "reuse", "window(band:2)+residual+cfg", "forecast:1+cfg", "full", "reuse+cfg"]
    rows += ["forecast:2+cfg", "forecast:1", "full+cfg", "forecast:2", "forecast:1(step)+cfg"]
    progress = tuple((1 - step / 20) ** 2 for step in range(len(rows)))
    fast = compiled(model, two_calls(rows))
    expected = {name: by_hand(model) for name in ("cond", "uncond")}
    with sampling(fast, len(rows), progress=progress) as run:
        for step, text in enumerate(rows):
            decision = D(text)
            run.step(step)
            alone = replace(decision, cfg_shared=False)
            for name, offset in (("cond", 0), ("uncond", 30)):
                run.branch(name)
                now = at_step(inputs, offset + step)
                found = call(fast, now)
                row, cond = ([alone] * 2, None) if name == "cond" else ([decision] * 2, expected["cond"])
                wanted = plain_output(expected[name], row, now, place=progress[step], conditional=cond)
                difference = ((found - wanted).abs().max() / wanted.abs().max()).item()
                assert difference <= EXACT, f"{name} call of step {step} ({text}): {difference}"


def test_the_conditional_call_must_come_first():
    model, inputs, _, _ = captured_plain()
    fast = compiled(model, two_calls(["full+cfg", "reuse"]))
    with sampling(fast, 2) as run:
        run.branch("uncond")
        with pytest.raises(RunError, match="call the conditional branch first"):
            call(fast, inputs)
    with sampling(fast, 2), pytest.raises(RunError, match="does not know which call this is"):
        call(fast, inputs)


def test_branches_keep_their_own_caches():
    model, inputs, _, _ = captured_plain()
    fast = compiled(model, two_calls(["full", "reuse"]))
    expected = {name: by_hand(model) for name in ("cond", "uncond")}
    with sampling(fast, 2) as run:
        for step, decision in enumerate((FULL, REUSE)):
            run.step(step)
            for name, offset in (("uncond", 30), ("cond", 0)):
                run.branch(name)
                now = at_step(inputs, offset + step)
                assert_near(call(fast, now), plain_output(expected[name], [decision] * 2, now))


# --- other shapes ---------------------------------------------------------------------------------------------------


def test_other_batch_sizes_have_captures_of_their_own():
    """The second size makes Dynamo turn the batch symbolic; results must stay those of each size."""
    model, inputs, _, _ = captured_plain()
    fast = compiled(model, plain_plan([FULL, D("window(band:2)+residual+cfg"), REUSE], conditional_half=0))
    for batch in (2, 4, 6, 2):
        expected = by_hand(model)
        generator = torch.Generator().manual_seed(batch)
        with sampling(fast, 3) as run:
            for step, text in enumerate(("full", "window(band:2)+residual+cfg", "reuse")):
                run.step(step)
                now = {"x": torch.randn(batch, 3, 8, 12, generator=generator)}
                assert_near(call(fast, now), plain_output(expected, [D(text)] * 2, now))
    assert inputs["x"].shape[0] == 2


def test_more_batch_sizes_than_dynamo_compiles_are_not_silent():
    """Beyond its limit Dynamo runs the model as it is; the run notices that nobody asked it."""
    model, _, _, _ = captured_plain()
    fast = compiled(model, plain_plan([FULL, REUSE]))

    def sample(batch):
        with sampling(fast, 2) as run:
            for step in range(2):
                run.step(step)
                call(fast, {"x": torch.randn(batch, 3, 8, 12)})

    with torch._dynamo.config.patch(recompile_limit=2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sample(2)
            sample(3)
        with pytest.warns(UserWarning, match=r"no call of PlainTransformer followed a plan.*recompile_limit"):
            sample(4)


def test_another_image_size_is_refused_with_the_remedy():
    model, inputs, _, _ = captured_plain()
    fast = compiled(model, plain_plan([FULL, REUSE]))
    with sampling(fast, 2):
        call(fast, inputs)
        with pytest.raises(PlanMismatchError, match="calibrate a plan at this image size"):
            call(fast, {"x": torch.randn(2, 3, 12, 12)})


def joint_by_hand(model, tokens):
    paths = [name for name, _ in model.named_modules() if ATTENTIONS["sd3"](name)]
    return Altered(model, paths, [Layout((4, 6), after=tokens)] * len(paths), 0, Window.parse("band:3"))


@pytest.mark.slow
def test_a_plan_serves_texts_of_any_length_beside_the_image():
    """Made for 7 tokens of text; in joint attention other lengths make other sizes, but the image is the same."""
    model, inputs, _, _ = captured("sd3")
    rows = [D(text) for text in ("full", "window(band:3)+residual", "reuse", "window(band:3)")]
    fast = compiled(model, family_plan("sd3", rows))
    for tokens in (7, 4, 11):
        expected = joint_by_hand(model, tokens)
        with sampling(fast, len(rows)) as run:
            for step, decision in enumerate(rows):
                run.step(step)
                now = with_text(inputs, tokens, step)
                assert_near(call(fast, now), expected([decision] * len(expected.modules), now))


@pytest.mark.slow
@pytest.mark.parametrize("shorter", ["cond", "uncond"])
def test_joint_attention_to_texts_of_two_lengths_is_not_shared_across_the_calls(shorter):
    model, inputs, _, _ = captured("sd3")
    lengths = {name: 4 if name == shorter else 7 for name in ("cond", "uncond")}
    rows = [D(text) for text in ("full", "window(band:3)+residual", "full")]
    fast = compiled(model, family_plan("sd3", rows, guidance="two-call"))
    expected = {name: joint_by_hand(model, tokens) for name, tokens in lengths.items()}
    with sampling(fast, len(rows)) as run:
        for step, decision in enumerate(rows):
            run.step(step)
            for name, tokens in lengths.items():
                run.branch(name)
                now = with_text(inputs, tokens, step)
                assert_near(call(fast, now), expected[name]([decision] * len(expected[name].modules), now))
    shares = compiled(model, family_plan("sd3", [FULL, FULL, D("full+cfg")], guidance="two-call"))
    with sampling(shares, 3) as run:
        run.branch("cond")
        call(shares, with_text(inputs, lengths["cond"], 0))
        run.branch("uncond")
        with pytest.raises(PlanMismatchError, match=r"attn: the plan shares .* texts of equal length"):
            call(shares, with_text(inputs, lengths["uncond"], 0))


def test_models_that_share_a_capture_and_a_run_keep_their_caches_apart():
    """Two experts of one class: the second takes over at the third step, with nothing cached."""
    models = [plain()[0] for _ in range(2)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(1.2)
    _, inputs = plain()
    rows = [FULL, REUSE, REUSE, REUSE, D("window(band:2)+residual")]
    fast = [compiled(model, plain_plan(rows)) for model in models]
    captures = []

    class Noting(Run):
        def call(self, capture, args):
            captures.append(capture)
            return super().call(capture, args)

    run = Noting(models[0], len(rows), experts=models[1:])
    run.activate()
    assert is_sampled(models[1])
    expected = [by_hand(model) for model in models]
    try:
        held = []
        for step, decision in enumerate((FULL, REUSE, FULL, REUSE, D("window(band:2)+residual"))):
            run.step(step)
            expert = int(step >= 2)
            now = at_step(inputs, step)
            found = call(fast[expert], now)
            assert_near(found, plain_output(expected[expert], [decision] * 2, now))
            held.append(run.cache_bytes())
    finally:
        run.deactivate()
    assert len({id(capture) for capture in captures}) == 1
    assert [(p.step, p.site) for p in run.promotions] == [(2, 0), (2, 1)]
    assert held[2] > held[1]  # for the length of a step both are held
    assert held[3] < held[2]
