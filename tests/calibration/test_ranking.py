"""What heads lose in windows, against attention written out plainly."""

import numpy as np
import pytest
import torch

from difa_compile.backend.options import Options
from difa_compile.calibration.ranking import HeadRanking, reusable_sites
from difa_compile.calibration.sampling import call_arguments, models_of, sample_with
from difa_compile.decision import Window
from difa_compile.errors import CalibrationError
from difa_compile.passes.analysed_model import AnalysedModel
from difa_compile.plan.guidance import StatedGuidance, settle
from tests.support.slow_search import LAYERS, inputs

STEPS = 3
WINDOWS = (Window("band", 2), Window("band", 5))


def ranked(pipe, windows=WINDOWS):
    guidance = settle(pipe, StatedGuidance())
    ranking = HeadRanking(models_of(pipe), windows)
    call = call_arguments(pipe, inputs(), STEPS)
    sample_with(pipe, call, ranking, guidance, Options(inner="eager"), what="ranking", kept=lambda: "nothing")
    return ranking


def by_hand(pipe):
    """The mean over the calls of each head's squared loss, relative to its squared output: (heads, windows)."""
    found = {}

    def hook(index):
        def look(attention, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            projections = (attention.to_q, attention.to_k, attention.to_v)
            query, key, value = (
                each(hidden).unflatten(-1, (attention.heads, -1)).transpose(1, 2) for each in projections
            )
            scores = query @ key.transpose(-1, -2) * attention.scale
            full = scores.softmax(-1) @ value
            positions = torch.arange(hidden.shape[1])
            losses = []
            for window in WINDOWS:
                far = (positions[:, None] - positions).abs() > window.radius
                near = scores.masked_fill(far, float("-inf")).softmax(-1) @ value
                losses.append((full - near).square().sum((0, 2, 3)) / full.square().sum((0, 2, 3)))
            found.setdefault(index, []).append(torch.stack(losses, 1))

        return look

    hooks = [
        block.attn1.register_forward_pre_hook(hook(index), with_kwargs=True)
        for index, block in enumerate(pipe.transformer.transformer_blocks)
    ]
    pipe(**inputs(), num_inference_steps=STEPS)
    for each in hooks:
        each.remove()
    return torch.cat([torch.stack(found[index]).mean(0) for index in range(LAYERS)]).numpy()


def test_errors_of_heads_and_what_they_save(pipe):
    wanted = by_hand(pipe)
    ranking = ranked(pipe)
    assert ranking.done == STEPS
    assert ranking.errors.shape == wanted.shape == (2 * LAYERS, 2)
    assert np.allclose(ranking.errors, wanted, rtol=1e-3)
    assert len(np.unique(wanted.round(6))) == wanted.size, "heads do not differ"
    tokens, radius = 16, 2
    pairs = sum(min(i + radius, tokens - 1) - max(i - radius, 0) + 1 for i in range(tokens))
    head_dim = pipe.transformer.config.attention_head_dim
    assert ranking.saved[:, 0] == pytest.approx([(tokens**2 - pairs) * 4 * head_dim] * 2 * LAYERS)


def test_heads_that_can_take_no_window_have_no_error(pipe, monkeypatch):
    why_not = AnalysedModel.why_not

    def asked(self, unit, decision):
        refused = bool(decision.windows) and unit == 0
        return "it is told to refuse" if refused else why_not(self, unit, decision)

    monkeypatch.setattr(AnalysedModel, "why_not", asked)
    found = ranked(pipe).errors
    assert np.isinf(found[:2]).all()
    assert np.isfinite(found[2:]).all()


def test_a_pipeline_that_calls_no_model_tells_nothing(pipe):
    with pytest.raises(CalibrationError, match="made no call of its model"):
        _ = HeadRanking(models_of(pipe), WINDOWS).errors


def test_only_sites_that_can_be_reused_are_looked_at(pipe, monkeypatch):
    monkeypatch.setattr(AnalysedModel, "why_not", lambda self, unit, decision: "no" if unit == 1 else None)
    seen = []
    call = HeadRanking.call
    monkeypatch.setattr(
        HeadRanking,
        "call",
        lambda self, capture, *given: seen.append(reusable_sites(capture)) or call(self, capture, *given),
    )
    assert len(ranked(pipe).errors) == 2
    assert set(seen) == {(0,)}
