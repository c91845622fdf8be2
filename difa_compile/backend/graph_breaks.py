"""Where and why Dynamo did not capture a model as one graph, in words.

A plan needs the whole model in one graph. With ``fullgraph=True`` Dynamo raises at the place it cannot get over
(:func:`why_not_whole`). Without, it cuts the model into pieces and hands them to the backend one by one, each as if it
were all there is; :func:`why_piece` tells a piece from a whole model by three signs:

1. the graph ends in a graph break, as Dynamo notes on it;
2. the function captured is what Dynamo made of the rest of a function after a break;
3. between the call of what was compiled and the function captured, Python code is running that Dynamo let run as it
   is: a break in a loop makes it skip a whole function and capture what that calls.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import fx

from difa_compile.passes.prepare.arguments import captured_frame

TORCH = str(Path(torch.__file__).parent)
RESUMED = "torch_dynamo_resume_in_"
"""How the names of functions begin that Dynamo makes of what follows a break."""


def why_not_whole(failure: BaseException) -> str:
    """What Dynamo says of a model that it does not capture as one graph, and the line of the model's code.

    ``failure``: raised while what the inputs tell was answered (:func:`difa_compile.backend.dynamo_answers.answering`).
    """
    place = where(getattr(failure, "real_stack", None) or ())
    reason = reason_in(str(failure))
    if "data-dependent" in reason.lower():
        reason += "; it depends on more than the inputs, for instance on how many tokens the weights send to an expert"
    return reason + (f" ({place})" if place else "")


def reason_in(message: str) -> str:
    """The sentence of one of Dynamo's messages that says what is the matter."""
    lines = [line.strip() for line in message.strip().splitlines()] or [""]
    first = lines[0].removeprefix("Consider annotating your code using torch._check*(). ").partition(" (unhinted")[0]
    explained = next((line.removeprefix("Explanation: ") for line in lines if line.startswith("Explanation: ")), "")
    return ": ".join(each.rstrip(".") for each in (first, explained) if each)


def where(stack: Iterable[traceback.FrameSummary]) -> str:
    """The innermost line of a stack that is not torch's own: ``file.py:12, in f: code``; "" if there is none."""
    own = [frame for frame in stack if not frame.filename.startswith(TORCH)]
    if not own:
        return ""
    frame = own[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}, in {frame.name}" + (f": {frame.line}" if frame.line else "")


def why_piece(module: fx.GraphModule, model: str | None = None) -> str | None:
    """Why a graph that Dynamo is handing to a backend is a piece of what was compiled; None if it is the whole.

    ``model``: the class of the model; where its own ``forward`` is captured, it does not matter what runs around it.
    """
    reason = getattr(module, "compile_subgraph_reason", None)
    if reason is not None and reason.graph_break:
        return f"it ends in a graph break: {reason_in(reason.reason)} ({where(reason.user_stack)})"
    captured = captured_frame()
    if captured is None:
        return None
    code, variables = captured
    around = running_around()
    if code.co_name.startswith(RESUMED):
        return "it begins after a graph break" + (f" ({where_is(around)})" if around else "")
    owner = variables.get(code.co_varnames[0]) if code.co_argcount else None
    if around is None or (type(owner).__name__ == model and code in codes_of(getattr(type(owner), "forward", None))):
        return None
    return (
        f"it is {code.co_qualname}, called by code that Dynamo could not capture ({where_is(around)}){skipped(around)}"
    )


def codes_of(function: Any) -> list[CodeType]:
    """The code of a function and of those that it is a decorated form of."""
    found = []
    while function is not None:
        found.append(function.__code__)
        function = getattr(function, "__wrapped__", None)
    return found


def running_around() -> FrameType | None:
    """The innermost function that is running, not captured, within the compiled call in this thread."""
    frame: FrameType | None = sys._getframe()
    capturing = found = None
    while frame is not None:
        name = frame.f_code.co_filename
        if name.endswith("_dynamo/convert_frame.py"):
            capturing, found = frame, None
        elif capturing is not None and name.endswith("_dynamo/eval_frame.py"):
            return found
        elif capturing is not None and found is None and not name.startswith(TORCH):
            found = frame
        frame = frame.f_back
    return None


def where_is(frame: FrameType | None) -> str:
    """The line at which a frame is, as in :func:`where`."""
    return "" if frame is None else where(traceback.StackSummary.extract([(frame, frame.f_lineno)]))


def skipped(frame: FrameType) -> str:
    """Why Dynamo skips the function of ``frame``, as far as it has noted that; begins with a colon, or is ""."""
    from torch._dynamo.utils import counters

    code = frame.f_code
    wanted = f"frame skipped: {code.co_name} ({code.co_filename} line {code.co_firstlineno})"
    message = next((str(each) for each in counters["unimplemented"] if wanted in str(each)), "")
    return f": {reason_in(message)}" if message else ""
