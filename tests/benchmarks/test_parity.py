"""The table of parity has every model on every runtime, and holds what is said of it."""

import json

import pytest

from benchmarks import parity
from benchmarks._common import RESULTS

RUNTIMES = {dtype: ('backend="difa"', *targets) for dtype, targets in parity.TARGETS.items()}


@pytest.fixture(scope="module")
def rows():
    found = json.loads((RESULTS / "parity.json").read_text())["rows"]
    return {(row["model"], row["dtype"], row["runtime"]): row for row in found}


def test_every_model_dtype_and_runtime_is_in_it(rows):
    assert rows.keys() == {
        (model, dtype, runtime) for model in parity.MODELS for dtype in parity.DTYPES for runtime in RUNTIMES[dtype]
    }


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-5), ("float16", 0.05), ("bfloat16", 0.2)])
def test_engines_make_what_the_pipeline_makes(rows, dtype, most):
    for (_, of, _), row in rows.items():
        if of == dtype:
            assert 0 <= row["final"] <= row["worst_step"] <= most
