"""The parts of a plan: what each refuses, and the digest of a model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.errors import DifaError, LayoutError, PlanFormatError
from difa_compile.layout import Layout
from difa_compile.plan.data import Cell, ModelInfo, Promise, Settings, SiteInfo, Trial, model_digest
from tests.support.plans import Configured, Plain

LINE = Decision.parse("forecast:1")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SiteInfo("a", "cross", 1, 1, 1, 1, None), PlanFormatError, "self, joint"),
        (lambda: SiteInfo("a", "self", 0, 1, 1, 1, None), PlanFormatError, "heads"),
        (lambda: SiteInfo("a", "self", 1, 1, 5, 1, Layout((2, 2))), LayoutError, "4 tokens .* has 5"),
        (lambda: ModelInfo("A", "00", -1), PlanFormatError, "parameters"),
        (lambda: Trial(FULL, float("nan"), 0.1), PlanFormatError, "loss of full is nan"),
        (lambda: Trial(FULL, 0.1, float("inf")), PlanFormatError, "threshold of full is inf"),
        (lambda: Trial(FULL, 0.1, 0.2, cost=-1.0), PlanFormatError, "cost of full is -1"),
        (lambda: Cell(FULL, (), 1.5), PlanFormatError, "at most 1"),
        (lambda: Cell(FULL, (), -0.1), PlanFormatError, "flops_saved"),
        (lambda: Cell(REUSE, weights=(1.0,)), PlanFormatError, "reuse has weights, and forecasts alone"),
        (lambda: Cell(LINE, weights=(1.0,)), PlanFormatError, "forecast:1 reads 2 outputs, and has 1 weights"),
        (lambda: Cell(LINE, weights=(1.5, -0.4)), PlanFormatError, "forecast:1 sum to 1.1; they must sum to 1"),
        (lambda: Cell(LINE, weights=(float("nan"), 1.0)), PlanFormatError, "a weight of forecast:1 is nan"),
        (lambda: Cell(LINE, weights=(-1e5, 1e5 + 1)), PlanFormatError, "a weight of forecast:1 is -100000"),
        (lambda: Cell(LINE, weights=(1e5, 1 - 1e5)), PlanFormatError, "a weight of forecast:1 is (100000|-99999)"),
        (lambda: Settings("guess"), PlanFormatError, "greedy, weighed, planned, rule"),
        (lambda: Settings("rule", loss="mse"), PlanFormatError, "paper, code"),
        (lambda: Settings("rule", guidance="both"), PlanFormatError, "batched, two-call, none"),
        (lambda: Settings("rule", conditional_half=2), PlanFormatError, "conditional_half"),
    ],
)
def test_odd_parts_are_refused(make: Callable[[], object], error: type[DifaError], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_weights_are_floats_so_that_the_file_says_the_same() -> None:
    (first, _) = Cell(LINE, weights=(2, -1)).weights
    assert isinstance(first, float)


def test_settings_name_the_installed_versions() -> None:
    assert Settings("rule").torch == torch.__version__.partition("+")[0] or Settings("rule").torch == torch.__version__


def test_model_digest_of_a_configured_model_is_its_class_and_config() -> None:
    info = model_digest(Configured(layers=2, size=[4, 4]))
    assert info.class_name == "Configured"
    assert info.parameters == 8
    assert len(info.config_digest) == 64
    assert model_digest(Configured(size=[4, 4], layers=2, _name_or_path="elsewhere")) == info
    assert model_digest(Configured(layers=3, size=[4, 4])).config_digest != info.config_digest


def test_model_digest_of_any_other_module_is_its_parameters() -> None:
    info = model_digest(Plain())
    assert model_digest(Plain()) == info  # other weights, same model
    assert model_digest(Plain(4)).config_digest != info.config_digest
    assert model_digest(torch.compile(Plain())) == info  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), True, "0.5", 10**400])
@pytest.mark.parametrize("name", ["predicted_share", "predicted_psnr", "measured_share", "measured_psnr"])
def test_promises_are_of_finite_numbers(name: str, value: object) -> None:
    given = {"predicted_share": 0.5, "predicted_psnr": 30.0, name: value}
    with pytest.raises(PlanFormatError, match=f"promise: {name}"):
        Promise("budget 0.5", **given)  # type: ignore[arg-type]


def test_a_promise_in_words() -> None:
    with pytest.raises(PlanFormatError, match="promise: predicted_share"):
        Promise("budget 0.5", None, None)  # type: ignore[arg-type]
    assert str(Promise("budget 1", 1.0, None)) == "budget 1: predicted 1.00 of full's time, the same images"
    promise = Promise("budget 0.5", 0.49, 54.2, 0.51, 53.9, 53.5, "over")
    assert str(promise) == (
        "budget 0.5: predicted 0.49 of full's time, 54.2 dB; measured 0.51, 53.9 dB (held out 53.5 dB); over"
    )
    hostile = str(Promise("\x1b[31m" * 100, 0.5, 30.0, note="\x07" * 1000))
    assert hostile.isprintable()
    assert len(hostile) < 800
