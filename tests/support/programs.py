"""Sampling programs made by hand and by chance, and pipelines' transformers called as programs call them."""

import math

import torch
from hypothesis import strategies as st

from difa_compile.bundle.program import (
    DTYPES,
    Argument,
    Call,
    Clamp,
    Condition,
    ConditionRow,
    Draw,
    Form,
    Program,
    Sample,
    Scale,
    Term,
    View,
)

NUMBERS = st.floats(-8, 8, allow_nan=False, width=32)


def small_program(**changes):
    """Two steps of a guided model whose output has a channel too many, with a draw amid them and a clamp."""
    form = Form(
        "transformer",
        None,
        2,
        Argument("hidden_states", "float32", (2, 3)),
        None,
        (4, 3),
        View((6,), (1,)),
        (Argument("timestep", "int64", ()),),
        (
            Condition(Argument("labels", "int64", ()), (ConditionRow("cond"), ConditionRow("uncond", True, (1000.0,)))),
            Condition(Argument("ids", "float32", (5,), False), (ConditionRow("cond", True),)),
        ),
    )
    both = (0, 1)
    guided = ((1, 0, (0.0, 0.5)), (1, 1, (0.5, -0.5)))
    fields = {
        "pipeline": "MadePipeline",
        "scheduler": "MadeScheduler",
        "steps": 2,
        "images": None,
        "shape": (2, 3),
        "scales": (Scale("guidance_scale", 4.0, 1.0),),
        "baked": (Scale("true_cfg_scale", 1.0),),
        "forms": (form,),
        "operations": (
            Draw(1, (3, 2), "float32", True, View((2, 3), (1, 2))),
            Call(0, 0, tuple((Term(0, 0, (2.0,)),) for _ in both), (((900.0,), (900.0,)),)),
            Clamp(((Term(0, 0, (1.0,)), *(Term(*each) for each in guided)),), -1.0, 1.0),
            Draw(1, (2, 3), "float32", True),
            Sample(((Term(2, 0, (0.5,)), Term(3, 0, (0.25,))),)),
            Call(0, 1, tuple((Term(4, 0, (1.0,)),) for _ in both), (((100.0, 1.0), (100.0,)),)),
            Sample(((Term(4, 0, (1.0,)), Term(5, 0, (0.0, -1.0)), Term(5, 1, (-1.0, 1.0))),)),
        ),
        "final": (Term(6, 0, (1.0,)),),
        "error": 1e-7,
    }
    return Program(**{**fields, **changes})


@st.composite
def programs(draw):
    """Programs that hold together, whatever they compute."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    scales = tuple(
        Scale(f"scale_{index}", draw(NUMBERS), draw(st.none() | NUMBERS)) for index in range(draw(st.integers(0, 2)))
    )
    dtypes = st.sampled_from(sorted(DTYPES))
    number = st.lists(NUMBERS, min_size=0, max_size=1 + len(scales)).map(tuple)
    forms = []
    for branch in draw(st.sampled_from([(None,), ("cond", "uncond")])):
        groups = draw(st.integers(1, 2))
        values = tuple(Argument(f"value_{index}", draw(dtypes), (), draw(st.booleans())) for index in range(2))
        row = ConditionRow("cond", True, (draw(NUMBERS),))
        forms.append(
            Form(
                "transformer", branch, groups, Argument("x", draw(dtypes), shape), None, (2, *shape),
                View((math.prod(shape),), (1,), draw(st.integers(0, math.prod(shape)))), values,
                (Condition(Argument("y", draw(dtypes), ()), (row, *(ConditionRow("uncond"),) * (groups - 1))),),
            )
        )  # fmt: skip
    operations = [Draw(1, shape, draw(dtypes), draw(st.booleans()))]
    steps = 0

    def combination():
        found = []
        for _ in range(draw(st.integers(0, 3))):
            value = draw(st.integers(0, len(operations) - 1))
            operation = operations[value]
            groups = forms[operation.form].groups if isinstance(operation, Call) else operation.groups
            found.append(Term(value, draw(st.integers(0, groups - 1)), draw(number)))
        return tuple(found)

    for kind in [*draw(st.lists(st.sampled_from(["draw", "call", "clamp", "sample"]), max_size=6)), "sample"]:
        if kind == "draw":
            operations.append(Draw(draw(st.integers(1, 2)), shape, draw(dtypes), draw(st.booleans())))
        elif kind == "call":
            index = draw(st.integers(0, len(forms) - 1))
            form = forms[index]
            values = tuple(
                tuple(draw(number) for _ in range(form.groups if argument.batched else 1)) for argument in form.values
            )
            operations.append(Call(index, steps, tuple(combination() for _ in range(form.groups)), values))
        elif kind == "clamp":
            low = draw(NUMBERS)
            high = draw(st.none() | st.floats(low, 9, allow_nan=False))
            operations.append(Clamp((combination(),), low, high))
        else:
            operations.append(Sample((combination(),)))
            steps += 1
    return Program(
        "P", "S", steps, draw(st.none() | st.integers(1, 9)), shape, scales, (Scale("held", draw(NUMBERS)),),
        tuple(forms), tuple(operations), (Term(len(operations) - 1, 0, (1.0,)),), draw(st.floats(0, 1)),
    )  # fmt: skip


def nested(inputs):
    """Arguments of a forward from inputs by name: ``a.b`` is ``b`` of the dictionary ``a``."""
    found = {}
    for name, tensor in inputs.items():
        outer, _, inner = name.partition(".")
        if inner:
            found.setdefault(outer, {})[inner] = tensor
        else:
            found[name] = tensor
    return found


def calling(pipe, **further):
    """What stands for the engines in a replay: the pipeline's own transformers."""

    @torch.no_grad()
    def call(form, operation, inputs):
        model = getattr(pipe, form.model)
        return model(**nested(inputs), **further, return_dict=False)[0]

    return call
