"""What a pipeline is called with, checked against its signature before anything long is begun.

diffusers finds a wrong argument where it is used, after minutes of other work and in words of its own, or not at all.
"""

from __future__ import annotations

import difflib
import inspect
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union

from difa_compile.errors import PipelineCallError
from difa_compile.wording import quoted, shown

_POSITIVE = frozenset(f"num_{things}_per_prompt" for things in ("images", "videos", "waveforms")) | {
    "height",
    "width",
    "num_frames",
    "max_sequence_length",
}
_PLAIN = (bool, int, float, str, list, tuple, dict)
"""What JSON can say. Only these are held against annotations: tensors, images and functions pass for many types."""


def check_call(pipe: Any, inputs: Mapping[str, Any]) -> None:
    """Raise :class:`PipelineCallError` for keyword arguments that a call of ``pipe`` does not have or cannot take.

    Names are compared with the signature, plain values with its annotations. Numbers must be finite, sizes and counts
    at least 1, prompts and labels not empty, and labels among the classes of the transformer's embedding.
    """
    if not callable(pipe):
        return
    call = type(pipe).__call__
    name = type(pipe).__name__
    try:
        parameters = dict(inspect.signature(call, eval_str=True).parameters)
    except Exception:  # annotations that only a type checker can read; they are not held against anything then
        parameters = dict(inspect.signature(call).parameters)
    parameters.pop(next(iter(parameters), ""), None)  # self
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for argument, value in inputs.items():
        known = parameters.get(argument)
        if known is None or known.kind is known.VAR_KEYWORD:
            if not open_ended:
                raise PipelineCallError(_unknown(name, argument, list(parameters)))
        elif not _fits(value, known):
            raise PipelineCallError(
                f"{argument} is {quoted(value)}, but a call of {shown(name)} takes {_written(known.annotation)} there"
            )
        _check_numbers(argument, value)
        _check_texts(argument, value)
    _check_labels(pipe, inputs.get("class_labels"))


def refused(pipe: Any, inputs: Mapping[str, Any], error: Exception) -> PipelineCallError:
    """For an error that a pipeline raised before it began to sample: its own check of the arguments."""
    reason = shown(error, 400)
    said = reason if isinstance(error, ValueError) else f"{type(error).__name__}: {reason}"
    return PipelineCallError(
        f"{shown(type(pipe).__name__)} does not take this call ({', '.join(map(shown, inputs))}): {said}"
    )


def _unknown(name: str, argument: object, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(shown(argument), known, n=1)
    remedy = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
    return f"a call of {shown(name)} has no argument {quoted(argument)}; {remedy}"


def _check_numbers(argument: str, value: object) -> None:
    items = value if isinstance(value, (list, tuple)) else [value]
    for item in items:
        if isinstance(item, float) and not math.isfinite(item):
            raise PipelineCallError(f"{argument} is {quoted(value)}; give a finite number")
    if argument in _POSITIVE and isinstance(value, int) and value < 1:
        raise PipelineCallError(f"{argument} is {quoted(value)}; give a whole number of at least 1")


def _check_texts(argument: str, value: object) -> None:
    if "prompt" in argument and isinstance(value, (list, tuple)) and not value:
        raise PipelineCallError(f"{argument} is empty; give one text or more")
    for item in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(item, str) and not item.isascii():
            try:
                item.encode()
            except UnicodeEncodeError:
                raise PipelineCallError(f"{argument} is {quoted(value)}, which is no text of UTF-8") from None


def _check_labels(pipe: Any, labels: object) -> None:
    if not isinstance(labels, (list, tuple)):
        return
    if not labels:
        raise PipelineCallError("class_labels is empty; give one class or more")
    config = getattr(getattr(pipe, "transformer", None), "config", None)
    classes = getattr(config, "num_embeds_ada_norm", None)
    for label in labels:
        if isinstance(label, bool) or not isinstance(label, int):
            raise PipelineCallError(f"class_labels has {quoted(label)}; classes are whole numbers")
        # One more than there are classes stands for none of them, where a model was trained for guidance.
        if label < 0 or (isinstance(classes, int) and label > classes):
            known = f"0 to {classes - 1}" if isinstance(classes, int) else "0 and up"
            raise PipelineCallError(f"class_labels has {quoted(label)}; the classes of this model are {known}")


def _fits(value: object, parameter: inspect.Parameter) -> bool:
    """Whether a plain value may stand for a parameter. An annotation that its own default breaks proves nothing, and
    diffusers writes one text where it takes several, too (``negative_prompt`` of PixArt)."""
    default = parameter.default
    if value is None or type(value) not in _PLAIN:
        return True
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value) and value:
        return _admits(parameter.annotation, value) or _admits(parameter.annotation, value[0])
    if default is not parameter.empty and default is not None and not _admits(parameter.annotation, default):
        return True
    return _admits(parameter.annotation, value)


def _admits(annotation: Any, value: object) -> bool:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (inspect.Parameter.empty, Any) or isinstance(annotation, (str, typing.TypeVar, typing.ForwardRef)):
        return True
    if origin in (Union, types.UnionType):
        return any(_admits(one, value) for one in arguments)
    if origin is typing.Annotated:
        return _admits(arguments[0], value)
    if origin is Literal:
        return value in arguments
    kind = origin if origin is not None else annotation
    if kind in (list, tuple) or kind is Sequence:
        if not isinstance(value, (list, tuple)):
            return False
        inner = [one for one in arguments if one is not Ellipsis]
        return not inner or all(any(_admits(_loose(one), item) for one in inner) for item in value)
    if kind in (dict, Mapping):
        return isinstance(value, dict)
    if kind in (int, float):
        return isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    return isinstance(kind, type) and isinstance(value, kind)


def _loose(annotation: Any) -> Any:
    """Of the items of a list: diffusers writes whole numbers where it takes any (``timesteps``)."""
    return float if annotation is int else annotation


def _written(annotation: Any) -> str:
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    return shown(str(annotation).replace("typing.", "").replace("NoneType", "None"))
