"""Tuning: what is measured, and prices fitted to it."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difa_compile.decision import FULL
from difa_compile.errors import ProfileError
from difa_compile.layout import Layout
from difa_compile.machine import tune as tuning
from difa_compile.machine.profile import FullCall, Machine, Sample
from difa_compile.plan.cost import Setting, site_seconds
from difa_compile.plan.data import SiteInfo

SITE = SiteInfo("blocks.0.attn1", "self", 4, 8, 24, 32, Layout((4, 6)))
SETTING = Setting(2, torch.float32, torch.device("cpu"))


def synthetic(prices, count=24, noise=0.0):
    """Samples of attention in many sizes that cost exactly ``prices``, or with some noise."""
    chance = random.Random(0)
    samples = []
    for _ in range(count):
        tokens = chance.choice([256, 576, 1024, 4096])
        work = FullCall(1, chance.randint(1, 16), tokens, chance.choice([256, 1024, 4096]), chance.randint(8, 128)).work
        seconds = sum(prices.get(kind, 0.0) * amount for kind, amount in work.items())
        samples.append(Sample("made up", work, tokens, seconds * (1 + noise * chance.uniform(-1, 1))))
    return samples


def test_fitting_recovers_known_prices():
    prices = {"calls": 2e-5, "multiply_adds": 1e-11, "pairs": 4e-10, "queries x dims": 3e-10}
    found = tuning.fit_prices(synthetic(prices))
    assert {kind: price for kind, price in found.items() if price > 1e-16} == pytest.approx(prices, rel=1e-4)


def test_held_out_errors_are_of_the_size_of_the_noise():
    fit = tuning.fitted("full", "float32", synthetic({"calls": 1e-5, "pairs": 4e-10}, 40, noise=0.1))
    assert 0.01 < fit.held_out_error < 0.1
    exact = tuning.fitted("full", "float32", synthetic({"calls": 1e-5, "pairs": 4e-10}, 40))
    assert exact.held_out_error < 1e-4


@settings(max_examples=15)
@given(st.lists(st.floats(1e-6, 1e-2), min_size=3, max_size=12))
def test_no_price_is_ever_negative(seconds):
    work = synthetic({"pairs": 1.0}, len(seconds))
    prices = tuning.fit_prices([replace(sample, seconds=time) for sample, time in zip(work, seconds, strict=True)])
    assert min(prices.values()) >= 0
    assert max(prices.values()) > 0


def test_cases_cover_every_operation_with_samples_enough_to_hold_some_out():
    counts = {}
    for case in tuning.cases(torch.float32, torch.device("cpu")):
        counts[case.operation] = counts.get(case.operation, 0) + 1
    local = next(name for name in counts if name.startswith("local "))
    assert set(counts) == {"full", local, "linear", "elementwise"}
    assert min(counts.values()) >= 10


def test_tuning_measures_fits_and_covers_what_was_asked_for(monkeypatch):
    """On two cases per operation, for the sake of time."""
    real, told = tuning.cases, []

    def few(dtype, device, quick):
        seen = {}
        for case in real(dtype, device, quick):
            seen[case.operation] = seen.get(case.operation, 0) + 1
            if seen[case.operation] <= 2:
                yield case

    monkeypatch.setattr(tuning, "cases", few)
    profile = tuning.tune("cpu", [torch.float32], progress=lambda done, of: told.append((done, of)))
    assert profile.machine == Machine.here("cpu")
    assert profile.dtypes == (torch.float32,)
    assert told == [(done, 8) for done in range(1, 9)]
    assert all(fit.seconds(sample.work) > 0 for fit in profile.fits for sample in fit.samples)
    assert site_seconds(FULL, SITE, SETTING, profile) > 0


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_what_cannot_be_measured_is_refused(device):
    if device == "cuda" and torch.cuda.is_available():
        device = "meta"
    with pytest.raises(ProfileError, match=r"cannot be profiled; choose one of cpu, cuda|no CUDA device"):
        tuning.tune(device)
