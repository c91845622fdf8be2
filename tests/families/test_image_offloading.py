"""Plans on image pipelines whose weights are offloaded to another device between calls."""

import pytest
import torch

pytest.importorskip("diffusers", reason="whole pipelines of diffusers")
pytest.importorskip("transformers", reason="text encoders of whole pipelines")


from difa_compile import calibrate
from difa_compile.pipeline.apply import apply, remove
from tests.support.image_cases import CASES, close


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "flux_true_cfg"])
def test_model_offload(name):
    """Weights are moved by a hook around each component, which the pipeline renews after every call."""
    case = CASES[name]
    pipe = case.make()
    wanted, full = case.sample_altered(pipe, case.rows), case.sample(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    applied = apply(pipe, case.plan(pipe, case.rows), inner="eager")
    for _ in range(2):
        assert close(case.sample(pipe), wanted)
    assert [record for record in applied.records if record.outcome == "skipped"] == []
    remove(pipe)
    assert torch.equal(case.sample(pipe), full)
    plan = calibrate(pipe, case.inputs(), steps=4, threshold=0.1, inner="eager", progress=False)
    pipe.remove_all_hooks()
    again = calibrate(pipe, case.inputs(), steps=4, threshold=0.1, inner="eager", progress=False)
    assert plan.digest == again.digest
