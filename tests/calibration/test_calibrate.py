"""Calibration: what comes of it, going on after interruptions, guidance, and everything that can go wrong around it."""

import json
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler

from difa_compile.backend.capture import Capture
from difa_compile.calibration.search import CANDIDATES, PUBLISHED_CANDIDATES
from difa_compile.calibration.state import CalibrationState
from difa_compile.decision import FULL, REUSE, Decision, Kind
from difa_compile.errors import (
    CalibrationError,
    CalibrationStateError,
    DecisionError,
    NonFiniteError,
    NotAppliedError,
    OutputError,
    PipelineCallError,
    ScheduleError,
    ThresholdError,
    UnsupportedPipelineError,
)
from difa_compile.passes.analysed_model import AnalysedModel
from difa_compile.pipeline.apply import apply, remove
from difa_compile.plan.guidance import Guidance
from difa_compile.plan.plan import Plan
from tests.support.slow_search import (
    DECISIONS,
    LAYERS,
    STEPS,
    THRESHOLD,
    WINDOW,
    inputs,
    interrupted_after,
    quick,
    slow_loss,
)
from tests.support.tiny_models import sd3
from tests.support.tiny_pipelines import PlainSites, sample, sample_plainly, tiny_pipeline


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What calibrating the usual pipeline without interruption gives."""
    torch._dynamo.reset()
    return quick(tiny_pipeline(layers=LAYERS), state=tmp_path_factory.mktemp("whole") / "state.json")


# The search


def test_one_capture_and_one_variant_per_kind_of_role(pipe, monkeypatch):
    """No compilation per candidate: the variants are few and the same for all blocks and steps."""
    captures = set()
    begin = Capture.begin

    def noting(self, args):
        captures.add(self)
        return begin(self, args)

    monkeypatch.setattr(Capture, "begin", noting)
    with torch._dynamo.config.patch(error_on_recompile=True):
        quick(pipe)
    (capture,) = captures
    structures = {segment.structure for segment in capture.model.split.segments}
    # Per kind of segment: full; full that keeps caches; and the four candidates.
    assert capture.compiled_variants <= 6 * len(structures)


def test_the_plan_runs_and_is_what_was_measured(pipe, whole):
    plan = whole
    wanted = sample_plainly(pipe, plan.decisions, residual_window=WINDOW)
    applied = apply(pipe, plan, inner="eager")
    assert np.allclose(sample(pipe, steps=STEPS), wanted, atol=2e-5)
    assert applied.last_run.promotions == ()
    assert not [record for record in applied.records if record.outcome == "skipped"]


def test_the_plan_says_how_it_was_found(pipe, whole, tmp_path):
    plan = whole
    pipe.scheduler.set_timesteps(STEPS)
    settings = plan.settings
    assert (settings.method, settings.threshold, settings.loss, settings.window) == (
        "weighed",
        THRESHOLD,
        "paper",
        "band:2",
    )
    assert settings.candidates == PUBLISHED_CANDIDATES
    assert (settings.guidance, settings.conditional_half) == ("batched", 0)
    assert [site.path for site in plan.sites] == [f"transformer_blocks.{block}.attn1" for block in range(LAYERS)]
    assert plan.steps == STEPS
    assert plan.progress == tuple(t / 1000 for t in pipe.scheduler.timesteps.tolist())
    assert all(cell.decision == FULL and not cell.trials for cell in plan.rows[0])
    for row in plan.rows[1:]:
        for block, cell in enumerate(row):
            assert cell.trials
            for trial in cell.trials:
                assert trial.threshold == pytest.approx((block + 1) / LAYERS * THRESHOLD)
            prices = {trial.decision: trial.price for trial in cell.trials} | {FULL: 1.0}
            assert cell.decision == min(prices, key=prices.get)
            assert (cell.flops_saved == 0) == (cell.decision == FULL)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_same_inputs_give_the_same_plan_and_the_generator_is_put_back(pipe, whole):
    given = inputs()
    before = given["generator"].get_state()
    assert quick(pipe, given) == whole
    assert torch.equal(given["generator"].get_state(), before)


def test_without_a_generator_sampling_is_seeded(pipe):
    seeded = {"class_labels": [1, 2], "generator": torch.Generator().manual_seed(0)}
    assert quick(pipe, {"class_labels": [1, 2]}, steps=3) == quick(pipe, seeded, steps=3)


def test_one_step_is_all_full(pipe):
    plan = quick(pipe, steps=1)
    assert plan.decisions == ((FULL,) * LAYERS,)


def test_second_order_scheduler_has_a_row_per_call(pipe):
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    assert quick(pipe, steps=3).steps == 5


# Resuming


@pytest.mark.parametrize("done", [0, 3, 5])
def test_goes_on_after_an_interrupt_as_if_nothing_had_happened(pipe, whole, tmp_path, done):
    state = tmp_path / "state.json"
    with interrupted_after(pipe, done), pytest.raises(KeyboardInterrupt) as caught:
        quick(pipe, state=state)
    assert f"interrupted after {done} of {STEPS} steps" in caught.value.__notes__[0]
    assert (str(state) in caught.value.__notes__[0]) == (done > 0)
    assert state.exists() == (done > 0)
    assert type(pipe) is DiTPipeline

    searched = []
    measured = Capture.outputs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Capture, "outputs", lambda self, state: searched.append(1) or measured(self, state))
        resumed = quick(pipe, state=state)
    assert resumed == whole
    assert resumed.digest == whole.digest
    assert not state.exists()
    # Steps decided before are one model call each, not a search.
    trials = sum(len(cell.trials) for row in whole.rows[done:] for cell in row)
    assert len(searched) <= trials + 2 * STEPS


def test_default_state_is_found_again(pipe, whole, cache_home):
    with interrupted_after(pipe, 2), pytest.raises(KeyboardInterrupt) as interrupt:
        quick(pipe)
    assert "Start it again with the same arguments" in interrupt.value.__notes__[-1]
    assert len(list(cache_home.rglob("*.json"))) == 1
    assert quick(pipe) == whole
    assert not list(cache_home.rglob("*.json"))


def test_state_of_another_calibration_is_refused(pipe, tmp_path):
    state = tmp_path / "state.json"
    with interrupted_after(pipe, 2), pytest.raises(KeyboardInterrupt):
        quick(pipe, state=state)
    for what, call in {
        "settings": lambda: quick(pipe, state=state, threshold=0.3),
        "inputs": lambda: quick(pipe, inputs(seed=4), state=state),
        "weights": lambda: quick(tiny_pipeline(seed=9, layers=LAYERS), state=state),
        "model config_digest": lambda: quick(tiny_pipeline(layers=3), state=state),
        "scheduler": lambda: quick(tiny_pipeline(layers=LAYERS, scheduler=HeunDiscreteScheduler()), state=state),
    }.items():
        with pytest.raises(CalibrationStateError, match=what):
            call()


def test_a_call_that_fails_at_once_leaves_nothing_that_refuses_the_next(pipe, whole, tmp_path):
    with pytest.raises(PipelineCallError):
        quick(pipe, {**inputs(), "no_such_argument": 1}, state=tmp_path / "state.json")
    with interrupted_after(pipe, 0), pytest.raises(KeyboardInterrupt) as interrupt:
        quick(pipe, inputs(seed=4), state=tmp_path / "state.json")
    assert interrupt.value.__notes__ == [
        f"calibration interrupted after 0 of {STEPS} steps. Start it again with the same arguments to go on from the "
        "beginning."
    ]
    assert list(tmp_path.iterdir()) == []
    assert quick(pipe, state=tmp_path / "state.json", keep_state=True) == whole
    assert len(CalibrationState.open(tmp_path / "state.json", saved_identity(tmp_path)).rows) == STEPS


def saved_identity(folder):
    return json.loads((folder / "state.json").read_text())["identity"]


def test_other_failures_keep_the_state_too(pipe, whole, tmp_path):
    with interrupted_after(pipe, 3, RuntimeError), pytest.raises(RuntimeError):
        quick(pipe, state=tmp_path / "state.json")
    assert quick(pipe, state=tmp_path / "state.json") == whole


def test_state_that_cannot_be_written_shows_at_once(pipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        quick(pipe, state=tmp_path / "file" / "state.json")


# Guidance


def pretend(monkeypatch, guidance):
    """All pipelines do guidance this way."""
    monkeypatch.setattr("difa_compile.plan.guidance.guidance_of", lambda pipe: guidance)


def test_guidance_off_leaves_sharing_out_and_says_why(pipe):
    plan = quick(pipe, {**inputs(), "guidance_scale": 1.0}, steps=3)
    assert plan.settings.guidance == "none"
    assert plan.settings.conditional_half is None
    trials = [trial for row in plan.rows for cell in row for trial in cell.trials if trial.decision.cfg_shared]
    assert trials
    assert all(trial.loss is None and "guidance is off" in trial.reason for trial in trials)


def test_order_of_halves_that_is_not_known(pipe, whole, monkeypatch):
    pretend(monkeypatch, Guidance("unknown"))
    with pytest.raises(UnsupportedPipelineError, match="conditional_half=0"):
        quick(pipe, candidates=["full+cfg"])
    shared = [t for row in quick(pipe, steps=2).rows for cell in row for t in cell.trials if t.decision.cfg_shared]
    assert shared
    assert all("conditional_half=0" in trial.reason for trial in shared)
    told = quick(pipe, conditional_half=0)
    assert told.rows == whole.rows
    assert told.settings.conditional_half == 0


class TwoCalls(DiTPipeline):
    """Guidance in two calls per step, each named by ``cache_context``."""

    @staticmethod
    @contextmanager
    def named(model, name):
        yield

    @torch.no_grad()
    def __call__(self, class_labels, generator=None, num_inference_steps=STEPS, order=("cond", "uncond")):
        latents = torch.randn(len(class_labels), 1, 8, 8, generator=generator)
        labels = {"cond": torch.tensor(class_labels), "uncond": torch.full((len(class_labels),), 1000)}
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            noise = {}
            for name in order:
                with self.transformer.cache_context(name):
                    noise[name] = self.transformer(
                        latents, timestep=t.expand(len(latents)), class_labels=labels[name]
                    ).sample
            guided = noise["cond"]
            if "uncond" in noise:
                guided = noise["uncond"] + 2 * (noise["cond"] - noise["uncond"])
            latents = self.scheduler.step(guided, t, latents).prev_sample
        return latents


@pytest.fixture
def two_calls(monkeypatch):
    pipe = tiny_pipeline(layers=LAYERS)
    pipe.__class__ = TwoCalls
    monkeypatch.setattr(type(pipe.transformer), "cache_context", TwoCalls.named, raising=False)
    pretend(monkeypatch, Guidance("two-call"))
    return pipe


class SlowTwoCalls:
    """The two-call search written plainly, without reuse across steps, and the plain execution of its rows."""

    THRESHOLD = 0.5
    LABELS: ClassVar = [1000, 2]
    """One image without class, whose halves agree, so that some sharing is accepted."""

    def __init__(self, pipe, rows=None):
        self.pipe = pipe
        self.plain = PlainSites(pipe.transformer, half=0, residual_window=WINDOW)
        self.given = rows
        self.decisions = [d for d in DECISIONS[1:] if not d.cfg_shared]
        self.rows = []
        self.caches = {"cond": {}, "uncond": {}}
        self.first = True

    def run(self):
        self.pipe.transformer.forward = self.forward
        try:
            return self.pipe(**inputs(labels=self.LABELS))
        finally:
            del self.pipe.transformer.forward

    def forward(self, *args, **kwargs):
        branch = "cond" if self.first else "uncond"
        self.first = not self.first
        if branch == "cond":
            row = self.given[len(self.rows)] if self.given else self.search(args, kwargs)
            self.rows.append(tuple(row))
            row = [Decision(d.kind, d.window) for d in row]
        else:
            row = list(self.rows[-1])
            if not self.given and len(self.rows) > 1:
                row = self.search_sharing(row, args, kwargs)
                self.rows[-1] = tuple(row)
            taken = [block for block, d in enumerate(row) if d.cfg_shared]
            self.take(taken)
            row = [REUSE if block in taken else d for block, d in enumerate(row)]
        output, written = self.plain.call(row, kwargs, self.caches[branch], args)
        self.caches[branch].update(written)
        return output

    def take(self, blocks):
        for block in blocks:
            self.caches["uncond"][block, "output"] = self.caches["cond"][block, "output"]
            if self.rows[-1][block].kind is Kind.FULL:
                self.caches["uncond"][block, "residual"] = self.caches["cond"][block, "residual"]

    def loss(self, full, row, args, kwargs, caches):
        return slow_loss(full, self.plain.call(row, kwargs, caches, args)[0].sample)

    def search(self, args, kwargs):
        row, caches = [], self.caches["cond"]
        full = self.plain.call([FULL] * LAYERS, kwargs, caches, args)[0].sample
        for block in range(LAYERS):
            chosen = FULL
            for decision in self.decisions if self.rows else ():
                trial = [*row, decision, *[FULL] * (LAYERS - block - 1)]
                if self.loss(full, trial, args, kwargs, caches) < (block + 1) / LAYERS * self.THRESHOLD:
                    chosen = decision
                    break
            row.append(chosen)
        return row

    def search_sharing(self, row, args, kwargs):
        full = self.plain.call([FULL] * LAYERS, kwargs, self.caches["uncond"], args)[0].sample
        row = list(row)
        shared = []
        for block, decision in enumerate(row):
            if decision.kind is Kind.REUSE:
                continue
            trial = [REUSE if b in shared or b == block else d for b, d in enumerate(row[: block + 1])]
            caches = dict(self.caches["uncond"])
            caches |= {(b, "output"): self.caches["cond"][b, "output"] for b in [*shared, block]}
            trial += [FULL] * (LAYERS - block - 1)
            if self.loss(full, trial, args, kwargs, caches) < (block + 1) / LAYERS * self.THRESHOLD:
                shared.append(block)
                row[block] = Decision(decision.kind, decision.window, True)
        return row


def test_two_calls_share_where_the_second_call_allows(two_calls):
    slow = SlowTwoCalls(two_calls)
    slow.run()
    given = inputs(labels=slow.LABELS)
    plan = quick(two_calls, given, threshold=slow.THRESHOLD, candidates=PUBLISHED_CANDIDATES[1:], rank="published")
    assert plan.decisions == tuple(slow.rows)
    assert len({decision for row in plan.decisions for decision in row if decision.cfg_shared}) == 2
    assert (plan.settings.guidance, plan.settings.conditional_half) == ("two-call", None)
    wanted = SlowTwoCalls(two_calls, plan.decisions).run()
    apply(two_calls, plan, inner="eager")
    assert torch.allclose(two_calls(**given), wanted, atol=2e-5)
    remove(two_calls)


def test_two_calls_that_are_weighed_share_where_that_changes_less_than_the_calls_own_decision_costs(two_calls):
    given = inputs(labels=SlowTwoCalls.LABELS)
    plan = quick(two_calls, given, threshold=SlowTwoCalls.THRESHOLD, rank="flops")
    met = 0
    for cell in (cell for row in plan.rows[1:] for cell in row):
        alone = replace(cell.decision, cfg_shared=False)
        own = next((trial.price for trial in cell.trials if trial.decision == alone), 1.0)
        for trial in (trial for trial in cell.trials if trial.decision.cfg_shared and trial.loss is not None):
            assert trial.cost == 0.0  # the other call's output is copied
            assert cell.decision.cfg_shared == (trial.loss / trial.threshold < own)
            met += 1
    assert met
    assert any(decision.cfg_shared for row in plan.decisions for decision in row)


def test_two_calls_resume(two_calls, tmp_path):
    settings = {"threshold": SlowTwoCalls.THRESHOLD, "steps": 4}
    given = inputs(labels=SlowTwoCalls.LABELS)
    uninterrupted = quick(two_calls, given, **settings)
    with interrupted_after(two_calls, 2), pytest.raises(KeyboardInterrupt):
        quick(two_calls, given, state=tmp_path / "state.json", **settings)
    assert quick(two_calls, given, state=tmp_path / "state.json", **settings) == uninterrupted


@pytest.mark.parametrize("order", [("uncond", "cond"), ("cond",)])
def test_two_calls_without_a_second_one_say_so(two_calls, order):
    plan = quick(two_calls, {**inputs(), "order": order}, steps=3)
    shared = [t for row in plan.rows[1:] for cell in row for t in cell.trials if t.decision.cfg_shared]
    assert shared
    assert all(t.loss is None and "no unconditional call" in t.reason for t in shared)
    assert not any(decision.cfg_shared for row in plan.decisions for decision in row)
    apply(two_calls, plan, inner="eager")
    assert torch.isfinite(two_calls(**inputs(), order=order)).all()


class TwoTexts(DiTPipeline):
    """Joint attention to texts of two lengths, one per guidance call."""

    @torch.no_grad()
    def __call__(self, lengths, generator=None, num_inference_steps=STEPS):
        latents = torch.randn(1, 4, 8, 12, generator=generator)
        texts = {
            name: torch.randn(1, length, 24, generator=generator)
            for name, length in zip(("cond", "uncond"), lengths, strict=True)
        }
        pooled = torch.randn(1, 20, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            noise = {}
            for name, text in texts.items():
                with self.transformer.cache_context(name):
                    noise[name] = self.transformer(
                        hidden_states=latents,
                        encoder_hidden_states=text,
                        pooled_projections=pooled,
                        timestep=t.expand(1),
                    ).sample
            guided = noise["uncond"] + 2 * (noise["cond"] - noise["uncond"])
            latents = self.scheduler.step(guided, t, latents).prev_sample
        return latents


@pytest.mark.parametrize("lengths", [(7, 5), (6, 6)])
def test_two_calls_with_joint_attention_to_texts_share_if_their_lengths_agree(monkeypatch, lengths):
    pipe = tiny_pipeline(transformer=sd3(batch=1)[0], scheduler=FlowMatchEulerDiscreteScheduler())
    pipe.__class__ = TwoTexts
    pretend(monkeypatch, Guidance("two-call"))
    monkeypatch.setattr(type(pipe.transformer), "cache_context", TwoCalls.named, raising=False)
    given = {"lengths": lengths, "generator": torch.Generator().manual_seed(2)}
    names = ["window+residual+cfg", "window+residual", "full+cfg"]
    plan = quick(pipe, given, steps=3, threshold=10.0, candidates=names)
    assert plan.settings.guidance == "two-call"
    shared = [t for row in plan.rows[1:] for cell in row for t in cell.trials if t.decision.cfg_shared]
    assert shared
    if lengths[0] == lengths[1]:
        assert any(decision.cfg_shared for row in plan.decisions for decision in row)
    else:
        assert all("different lengths" in trial.reason for trial in shared)
        assert Kind.WINDOW_RESIDUAL in {decision.kind for row in plan.decisions for decision in row}
    applied = apply(pipe, plan, inner="eager")
    assert torch.isfinite(pipe(**given, num_inference_steps=3)).all()
    assert [record for record in applied.records if record.outcome == "skipped"] == []


# What goes wrong


@pytest.mark.parametrize("threshold", [0, -0.1, 10.5, float("nan"), float("inf"), True])
def test_threshold_out_of_range(pipe, threshold):
    with pytest.raises(ThresholdError, match="above 0"):
        quick(pipe, threshold=threshold)


@pytest.mark.parametrize("steps", [0, -3, 2.5, True])
def test_no_steps(pipe, steps):
    with pytest.raises(ScheduleError, match="at least 1"):
        quick(pipe, steps=steps)


def test_settings_that_do_not_exist(pipe):
    with pytest.raises(DecisionError, match="candidate 'windows' is unknown"):
        quick(pipe, candidates=["windows"])
    for nothing in ([], "reuse"):
        with pytest.raises(DecisionError, match="give a list of names"):
            quick(pipe, candidates=nothing)
    with pytest.raises(DecisionError, match="SHAPE:RADIUS"):
        quick(pipe, window="32")
    with pytest.raises(DecisionError, match="choose paper or code"):
        quick(pipe, loss="mse")
    with pytest.raises(DecisionError, match="give 0"):
        quick(pipe, conditional_half=2)
    with pytest.raises(DecisionError, match="contradicts DiTPipeline"):
        quick(pipe, conditional_half=1)
    with pytest.raises(ScheduleError, match="leave num_inference_steps out"):
        quick(pipe, {**inputs(), "num_inference_steps": 20})
    assert set(PUBLISHED_CANDIDATES) <= set(CANDIDATES)


def test_nan_in_the_model_names_the_step(pipe):
    with torch.no_grad():
        pipe.transformer.proj_out_2.bias[0] = float("nan")
    with pytest.raises(NonFiniteError, match="step 0, all sites full"):
        quick(pipe)
    assert type(pipe) is DiTPipeline


def test_nan_of_a_candidate_names_site_and_candidate(pipe, monkeypatch):
    outputs, count = Capture.outputs, 0

    def breaking(self, state):
        nonlocal count
        count += 1
        values = outputs(self, state)
        # step 0: check and result; step 1: all full, then the first candidate of the first site
        return [values[0] * float("nan")] if count == 4 else values

    monkeypatch.setattr(Capture, "outputs", breaking)
    with pytest.raises(NonFiniteError, match=r"step 1, site transformer_blocks\.0\.attn1, candidate reuse"):
        quick(pipe)


def test_candidate_that_cannot_be_carried_out_is_noted(pipe, monkeypatch):
    why_not = AnalysedModel.why_not

    def no_windows(self, site, decision):
        return "an attention mask" if site == 1 and decision.window else why_not(self, site, decision)

    monkeypatch.setattr(AnalysedModel, "why_not", no_windows)
    plan = quick(pipe, steps=3)
    cells = [row[1] for row in plan.rows[1:]]
    noted = [trial for cell in cells for trial in cell.trials if trial.reason]
    assert noted
    assert all(trial.loss is None and trial.reason == "an attention mask" for trial in noted)
    assert all(trial.decision.window for trial in noted)
    assert not [cell for cell in cells if cell.decision.window]


def test_pipelines_that_do_not_go_through_the_schedule_once(pipe):
    class Stops(DiTPipeline):
        @torch.no_grad()
        def __call__(self, class_labels, num_inference_steps=2, turns=1, most=1):
            for _ in range(turns):
                self.scheduler.set_timesteps(num_inference_steps)
                latents = torch.zeros(2, 1, 8, 8)
                for t in self.scheduler.timesteps[:most]:
                    labels = torch.tensor([1, 1000])
                    noise = self.transformer(latents, timestep=t.expand(2), class_labels=labels).sample
                    latents = self.scheduler.step(noise, t, latents).prev_sample

    pipe.__class__ = Stops
    with pytest.raises(CalibrationError, match="ended after 1 of 6 steps"):
        quick(pipe, {"class_labels": [1]})
    with pytest.raises(UnsupportedPipelineError, match="more than once"):
        quick(pipe, {"class_labels": [1], "turns": 2, "most": 9})


def test_pipeline_with_a_plan(pipe, whole):
    apply(pipe, whole)
    with pytest.raises(NotAppliedError, match="call remove"):
        quick(pipe)


def test_the_pipeline_is_left_as_it_was(pipe):
    pipe.set_progress_bar_config(desc="mine")
    before = sample(pipe)
    quick(pipe, steps=2)
    assert pipe._progress_bar_config == {"desc": "mine"}
    assert type(pipe) is DiTPipeline
    assert pipe.transformer._compiled_call_impl is None
    assert np.array_equal(sample(pipe), before)


def test_progress_bar_counts_decisions(pipe, capsys):
    quick(pipe, steps=2, progress=True)
    shown = capsys.readouterr().err
    assert "calibrating: 100%" in shown
    assert f"{2 * LAYERS}/{2 * LAYERS}" in shown
