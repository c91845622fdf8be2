"""What a pipeline is called with is checked before anything long begins, and nothing that it takes is refused."""

from __future__ import annotations

import inspect
import typing
from typing import Any, Literal, Optional, Union

import pytest
import torch

from difa_compile.calibration.calibrate import calibrate
from difa_compile.comparison.compare import compare
from difa_compile.decision import FULL
from difa_compile.errors import PipelineCallError
from difa_compile.pipeline.call_arguments import _admits, check_call, refused
from difa_compile.pipeline.loading import load_pipeline
from difa_compile.pipeline.rules import plan_from_rule

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize(
    ("annotation", "admitted", "refused"),
    [
        (int, [1, 0, -3], [True, 1.0, "1", [1], {}]),
        (float, [1, 1.5, -3], [True, "1", [1.0]]),
        (bool, [True, False], [0, 1, "true"]),
        (str, ["", "a"], [1, ["a"], {}]),
        (Optional[int], [1], ["1", 1.5]),  # noqa: UP045
        (int | None, [1], ["1", 1.5]),
        (Union[str, list[str]], ["a", ["a", "b"], []], [1, [1], ["a", 1], {}]),  # noqa: UP007
        (typing.List[str], [["a"], []], ["a", [1]]),  # noqa: UP006
        (list[int], [[1], [1, 2], [0.5]], [1, ["1"], [True]]),
        (list, [[1, "a"]], ["a", 1]),
        (tuple[int, int] | None, [[1, 2], (1, 2)], [1, ["a", "b"]]),
        (dict[str, Any] | None, [{}, {"a": 1}], ["a", 1, []]),
        (Literal["a", "b"], ["a"], ["c", 1]),
        (typing.Callable[[int], None] | None, [], ["a", 1]),
        (torch.Tensor | None, [], ["a", 1, [1.0]]),
        (torch.Tensor | list[torch.Tensor], [], ["a", [1.0]]),
        (Any, ["a", 1, []], []),
        (inspect.Parameter.empty, ["a", 1, []], []),
        ("Something", ["a", 1, []], []),
    ],
    ids=str,
)
def test_plain_values_are_held_against_annotations(annotation, admitted, refused):
    assert [value for value in admitted if not _admits(annotation, value)] == []
    assert [value for value in refused if _admits(annotation, value)] == []


class Pipeline:
    def __call__(self, class_labels: list[int], size: Hidden | None = None, height: int | None = None):  # noqa: F821
        """Annotations that only a type checker can read."""


class Odd:
    def __call__(self, class_labels: list[int], odd: int = "x"):
        """An annotation that its own default breaks."""


class OpenEnded:
    def __call__(self, *, prompt: str = "", **kwargs):
        """Takes any name."""


class Single:
    def __call__(self, prompt: str | list[str] = "", negative_prompt: str = ""):
        """One text is written where several are taken, as in PixArt."""


def test_several_texts_go_where_one_is_written():
    check_call(Single(), {"prompt": ["a", "b"], "negative_prompt": ["c", "d"]})
    for wrong in ([1], ["a", 1], 1):
        with pytest.raises(PipelineCallError, match=r"negative_prompt is .* takes str there"):
            check_call(Single(), {"negative_prompt": wrong})


def test_what_cannot_be_judged_passes():
    check_call(Pipeline(), {"class_labels": torch.tensor([1]), "size": [1, "a"], "height": 8})
    check_call(Odd(), {"class_labels": [1], "odd": "y"})
    check_call(OpenEnded(), {"anything": object(), "prompt": "a"})
    check_call(object(), {"anything": 1})
    with pytest.raises(PipelineCallError, match="prompt is 3, but a call of OpenEnded takes str there"):
        check_call(OpenEnded(), {"prompt": 3})


def test_no_message_is_steered_or_filled_by_what_it_is_about():
    for name, value in (("\x1b[2J" * 1000, 1), ("class_labels", ["\x1b[2J" * 1000]), ("class_labels", [-(10**5000)])):
        with pytest.raises(PipelineCallError) as failure:
            check_call(Pipeline(), {name: value})
        assert str(failure.value).isprintable()
        assert len(str(failure.value)) < 600
    error = refused(Pipeline(), {"\x1b" * 900: 1}, KeyError("\x1b" * 9000))
    assert str(error).isprintable()
    assert len(str(error)) < 1000


@pytest.fixture(scope="module")
def demo():
    return load_pipeline("demo")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": [1]}, "no argument 'labels'; did you mean class_labels?"),
        ({"class_labels": [1], "zzz": 1}, "no argument 'zzz'; it has class_labels, guidance_scale,"),
        ({"class_labels": "1"}, "class_labels is '1', but a call of DiTPipeline takes list"),
        ({"class_labels": []}, "class_labels is empty"),
        ({"class_labels": [1001]}, "class_labels has 1001; the classes of this model are 0 to 999"),
        ({"class_labels": [-1]}, "class_labels has -1"),
        ({"class_labels": [1], "guidance_scale": float("nan")}, "guidance_scale is nan; give a finite number"),
    ],
)
def test_calibrate_and_compare_check_before_they_begin(arguments, message, demo, monkeypatch):
    from tests.support.report_sample import make_plan

    monkeypatch.setattr(type(demo), "progress_bar", lambda *args, **kwargs: pytest.fail("it was called"))
    for run in (
        lambda: calibrate(demo, arguments, steps=2, inner="eager", progress=False),
        lambda: compare(demo, make_plan(2, 2), arguments, steps=2, backend_full="eager", progress=False),
    ):
        with pytest.raises(PipelineCallError) as failure:
            run()
        assert message in str(failure.value)


@pytest.fixture(scope="module")
def full(demo):
    return plan_from_rule(demo, 2, lambda step, site: FULL)


@pytest.mark.parametrize("error", [ValueError("not divisible by [8]\x1b"), TypeError("not divisible by [8]\x1b")])
def test_what_a_pipeline_itself_refuses_is_told_as_that(error, demo, full, monkeypatch, tmp_path):

    class Picky(type(demo)):
        def __call__(self, class_labels, num_inference_steps=50, generator=None, output_type="pil"):
            raise error

    monkeypatch.setattr(demo, "__class__", Picky)
    for run in (
        lambda: calibrate(demo, {"class_labels": [1]}, steps=2, inner="eager", progress=False, state=tmp_path / "s"),
        lambda: compare(demo, full, {"class_labels": [1]}, steps=2, backend_full="eager", progress=False),
    ):
        with pytest.raises(
            PipelineCallError, match=r"Picky does not take this call \(class_labels.*by \[8\]\\x1b"
        ) as failure:
            run()
        assert failure.value.__cause__ is error


@pytest.mark.slow
def test_the_defaults_of_all_pipelines_pass():
    """If its own defaults were refused, so would be what users give: annotations are read as diffusers means them."""
    judged = 0
    for name in dir(diffusers):
        pipeline = getattr(diffusers, name) if name.endswith("Pipeline") else None
        if pipeline is None or "__call__" not in dir(pipeline):
            continue
        for parameter in list(inspect.signature(pipeline.__call__).parameters.values())[1:]:
            if parameter.default not in (parameter.empty, None):
                assert _admits(parameter.annotation, parameter.default), (name, parameter)
                judged += 1
    assert judged > 1000
