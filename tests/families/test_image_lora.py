"""Plans on image pipelines whose weights change: LoRA by hand, fused, and through peft."""

import pytest
import torch

pytest.importorskip("diffusers", reason="whole pipelines of diffusers")
pytest.importorskip("transformers", reason="text encoders of whole pipelines")


from difa_compile import calibrate
from difa_compile.pipeline.apply import apply, remove
from tests.support.image_cases import CASES, CLOSE, close, distance
from tests.support.image_components import add_lora, take_lora_off


@pytest.fixture(params=["sd3", "flux_true_cfg"])
def lora_case(request):
    return CASES[request.param]


@pytest.mark.slow
def test_lora_loaded_before_apply(lora_case):
    case = lora_case
    pipe = case.make()
    bare = case.sample_altered(pipe, case.rows)
    added = add_lora(pipe.transformer)
    assert len(added) >= 8
    full, wanted = case.sample(pipe), case.sample_altered(pipe, case.rows)
    assert distance(wanted, bare) > 50 * CLOSE
    applied = apply(pipe, case.plan(pipe, case.rows), inner="eager")
    latents = case.sample(pipe)
    assert [record for record in applied.records if record.outcome == "skipped"] == []
    assert close(latents, wanted)
    assert distance(latents, full) > 50 * CLOSE
    remove(pipe)
    assert torch.equal(case.sample(pipe), full)


@pytest.mark.slow
def test_lora_loaded_changed_and_taken_off_after_apply(lora_case):
    case = lora_case
    pipe = case.make()
    wanted = {"bare": case.sample_altered(pipe, case.rows)}
    added = add_lora(pipe.transformer)
    wanted["loaded"] = case.sample_altered(pipe, case.rows)
    for lora in added.values():
        lora.scaling = 0.5
    wanted["scaled"] = case.sample_altered(pipe, case.rows)
    for lora in added.values():
        lora.lora_B["default"].weight.mul_(-1.0)
    wanted["other weights"] = case.sample_altered(pipe, case.rows)
    take_lora_off(pipe.transformer, added)
    plan = case.plan(pipe, case.rows)

    apply(pipe, plan, inner="eager")
    found = {"bare": case.sample(pipe)}
    added = add_lora(pipe.transformer)
    found["loaded"] = case.sample(pipe)
    for lora in added.values():
        lora.scaling = 0.5
    found["scaled"] = case.sample(pipe)
    for lora in added.values():
        lora.lora_B["default"].weight.mul_(-1.0)
    found["other weights"] = case.sample(pipe)
    take_lora_off(pipe.transformer, added)
    found["taken off"] = case.sample(pipe)
    wanted["taken off"] = wanted["bare"]
    for name, latents in wanted.items():
        assert close(found[name], latents), name
    assert distance(wanted["loaded"], wanted["scaled"]) > 10 * CLOSE
    assert distance(wanted["scaled"], wanted["other weights"]) > 10 * CLOSE


def test_lora_fused_into_the_weights_after_apply(lora_case):
    """In place, as ``fuse_lora`` does it: the same graph, other values."""
    case = lora_case
    pipe = case.make()
    wanted = case.sample_altered(pipe, case.rows)
    applied = apply(pipe, case.plan(pipe, case.rows), inner="eager")
    before = case.sample(pipe)
    added = add_lora(pipe.transformer)
    take_lora_off(pipe.transformer, added)
    with torch.no_grad():
        for lora in added.values():
            lora.base_layer.weight.add_(lora.delta())
    fused = case.sample(pipe)
    assert len(applied.captures) == 1
    remove(pipe)
    assert close(fused, case.sample_altered(pipe, case.rows))
    assert close(before, wanted)
    assert distance(fused, before) > 50 * CLOSE


@pytest.mark.slow
def test_calibration_follows_the_lora(lora_case):
    case = lora_case
    pipe = case.make()
    settings = {"steps": 4, "threshold": 0.02, "inner": "eager", "progress": False}
    bare = calibrate(pipe, case.inputs(), **settings)
    add_lora(pipe.transformer)
    plan = calibrate(pipe, case.inputs(), **settings)
    assert plan.rows != bare.rows
    wanted = case.sample_altered(pipe, plan.decisions)
    apply(pipe, plan, inner="eager")
    assert close(case.sample(pipe, 4), wanted)


# LoRA, by peft


@pytest.fixture
def lora_weights(lora_case):
    """Two sets of LoRA weights for the attention, as files of them hold them."""
    peft = pytest.importorskip("peft", reason="load_lora_weights needs peft")
    transformer = lora_case.make().transformer
    names = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_v_proj"]
    transformer.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=names))
    shapes = {name: value.shape for name, value in peft.get_peft_model_state_dict(transformer).items()}
    assert len(shapes) >= 16
    generator = torch.Generator().manual_seed(8)
    return [
        {f"transformer.{name}": 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for _ in range(2)
    ]


def lora_life(pipe, one, two):
    """What users do with LoRA, in turn: (what was done, whether it changes the images)."""
    yield "nothing", False
    pipe.load_lora_weights(dict(one), adapter_name="one")
    yield "loaded", True
    pipe.load_lora_weights(dict(two), adapter_name="two")
    pipe.set_adapters(["one", "two"], [0.5, -0.5])
    yield "two at once", True
    pipe.set_adapters(["two"], [0.7])
    yield "scaled", True
    pipe.disable_lora()
    yield "disabled", False
    pipe.enable_lora()
    pipe.fuse_lora(components=["transformer"])
    yield "fused", True
    pipe.unfuse_lora(components=["transformer"])
    pipe.delete_adapters("one")
    yield "unfused", True
    pipe.unload_lora_weights()
    yield "unloaded", False


@pytest.mark.slow
def test_life_of_a_lora_while_a_plan_is_applied(lora_case, lora_weights):
    case = lora_case
    pipe = case.make()
    wanted = {done: (case.sample_altered(pipe, case.rows), shows) for done, shows in lora_life(pipe, *lora_weights)}
    pipe = case.make()
    applied = apply(pipe, case.plan(pipe, case.rows), inner="eager")
    bare, last = wanted["nothing"][0], None
    for done, _ in lora_life(pipe, *lora_weights):
        latents, shows = wanted[done]
        assert close(case.sample(pipe), latents), done
        assert (distance(latents, bare) > 50 * CLOSE) is shows, done
        assert [record for record in applied.records if record.outcome == "skipped"] == [], done
        assert last is None or not shows or done == "unfused" or distance(latents, last) > 50 * CLOSE, done
        last = latents


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_plan_applied_on_a_loaded_lora(lora_case, lora_weights, fused):
    """With and without fusing; the plan is calibrated with the LoRA, and both are taken off in either order."""
    case = lora_case
    pipe = case.make()
    bare = case.sample(pipe)
    pipe.load_lora_weights(dict(lora_weights[0]), adapter_name="one")
    if fused:
        pipe.fuse_lora(components=["transformer"])
    full = case.sample(pipe)
    plan = calibrate(pipe, case.inputs(), steps=4, threshold=0.1, inner="eager", progress=False)
    wanted = case.sample_altered(pipe, plan.decisions)
    apply(pipe, plan, inner="eager")
    assert close(case.sample(pipe, 4), wanted)
    remove(pipe)
    assert torch.equal(case.sample(pipe), full)
    if fused:
        pipe.unfuse_lora(components=["transformer"])
    pipe.unload_lora_weights()
    assert close(case.sample(pipe), bare)
