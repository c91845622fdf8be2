"""The torch.compile backend: its options, its errors, and that plans survive inductor."""

import copy
import sys
import types
import warnings

import pytest
import torch
from torch._dynamo.backends.registry import list_backends, register_backend
from torch._dynamo.exc import BackendCompilerFailed

from difa_compile.backend.entry import difa
from difa_compile.backend.run import sampling
from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.errors import (
    DecisionError,
    LayoutError,
    MissingDependencyError,
    NoAttentionError,
    OutputError,
    PassError,
    PlanFormatError,
    PlanMismatchError,
    RunError,
    SiteSkippedError,
)
from difa_compile.passes import order
from difa_compile.passes.order import ANALYSIS, PREPARATION
from tests.support.tiny_models import (
    FAMILIES,
    Average,
    at_step,
    captured,
    captured_plain,
    family_plan,
    graph_of,
    plain,
    plain_plan,
    plan_of,
    sites_of,
)

pytest.importorskip("diffusers")

D = Decision.parse


def compiled(model, plan, **options):
    return torch.compile(model, backend=difa, options={"plan": plan, "inner": "eager", **options})


def first(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_plan_is_the_unmodified_model_to_the_bit(family):
    model, inputs, _, _ = captured(family)
    fast = compiled(model, family_plan(family, [FULL] * 2, conditional_half=0), strict=True)
    with torch.no_grad(), sampling(fast, 2) as run:
        for step in range(2):
            run.step(step)
            now = at_step(inputs, step)
            assert torch.equal(fast(**now)[0], model(**now)[0])
        assert run.peak_cache_bytes == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_inductor_computes_what_eager_computes(family):
    model, inputs = FAMILIES[family](layers=1)
    module, values = graph_of(model, inputs)
    infos = [site.info for site in sites_of(module, values)]
    rows = [FULL, D("window(box:1)+residual+cfg"), REUSE]
    plan = plan_of(model, infos, rows, conditional_half=0)
    outputs = {}
    for inner in ("eager", "inductor"):
        torch._dynamo.reset()
        fast = compiled(model, plan, strict=True, inner=inner)
        with (
            torch.no_grad(),
            torch._dynamo.config.patch(error_on_recompile=True),
            sampling(fast, len(rows)) as run,
        ):
            for step in range(len(rows)):
                run.step(step)
                outputs[inner, step] = fast(**at_step(inputs, step))[0]
    for step in range(len(rows)):
        one, two = outputs["inductor", step], outputs["eager", step]
        assert (one - two).abs().max() <= 1e-5 * two.abs().max(), step


@pytest.mark.slow
def test_without_options_difa_is_inductor():
    model, inputs, _, _ = captured_plain()
    if "difa" not in list_backends():
        register_backend(difa, name="difa")
    with torch.no_grad():
        fast = torch.compile(model, backend="difa")(**inputs)
        torch._dynamo.reset()
        plain_inductor = torch.compile(model, backend="inductor")(**inputs)
    assert torch.equal(fast, plain_inductor)


def test_without_options_training_works():
    """No plan: gradients flow as they do without this package."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())
    reference = copy.deepcopy(model)
    x = torch.randn(2, 4)
    torch.compile(model, backend=difa)(x).sum().backward()
    reference(x).sum().backward()
    torch.testing.assert_close(model[0].weight.grad, reference[0].weight.grad)


def test_a_plan_may_be_a_path(tmp_path):
    model, inputs, _, _ = captured_plain()
    plan = plain_plan([FULL, REUSE])
    plan.save(tmp_path / "plan.json")
    outputs = []
    for given in (plan, tmp_path / "plan.json", str(tmp_path / "plan.json")):
        torch._dynamo.reset()
        fast = compiled(model, given)
        with torch.no_grad(), sampling(fast, 2) as run:
            fast(**inputs)
            run.step(1)
            outputs.append(fast(**at_step(inputs, 1)))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_a_plan_file_that_changed_is_said(tmp_path):
    """Dynamo keeps what it compiled for the path; the old plan is followed, not silently."""
    model, inputs, _, _ = captured_plain()
    path = tmp_path / "plan.json"
    plain_plan([FULL, REUSE]).save(path)

    def sample():
        fast = compiled(model, path)
        with torch.no_grad(), sampling(fast, 2) as run:
            fast(**inputs)
            run.step(1)
            return fast(**at_step(inputs, 1))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = sample()
        assert torch.equal(sample(), before)
    plain_plan([FULL, D("window(band:2)")]).save(path)
    with pytest.warns(UserWarning, match=r"plan\.json was written again .* torch\._dynamo\.reset"):
        assert torch.equal(sample(), before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample()  # said once
        path.unlink()
        assert torch.equal(sample(), before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"plans": None}, DecisionError, "does not know option 'plans'"),
        ({"plan": 3}, DecisionError, "option plan is a int"),
        ({"plan": None, "layout": (4, 6)}, LayoutError, "option layout is"),
        ({"plan": None, "inner": "onnx"}, DecisionError, "inner compiler 'onnx' is unknown"),
        ({"plan": None, "cfg": {"conditional_half": 2}}, DecisionError, "conditional_half is 2"),
        ({"plan": None, "mode": "fastest"}, DecisionError, "mode is 'fastest'; choose one of .*reduce-overhead"),
        (
            {"plan": None, "inductor_options": {"max_autotun": True}},
            DecisionError,
            "'max_autotun', which inductor",
        ),
        (
            {"plan": None, "inductor_options": {"max_autotune": "yes"}},
            DecisionError,
            "as 'yes'; give a bool",
        ),
        ({"plan": None, "inductor_options": "max_autotune"}, DecisionError, "inductor_options is a str; give a dict"),
        ({"plan": None, "inner": "eager", "mode": "reduce-overhead"}, DecisionError, "inner='eager' compiles nothing"),
        ({"inner": "tensorrt", "mode": "reduce-overhead"}, DecisionError, "inner='tensorrt' is not inductor"),
        ({"plan": "/nowhere/plan.json"}, PlanFormatError, "/nowhere/plan.json"),
    ],
)
def test_wrong_options_are_refused_as_themselves(options, error, message):
    """Not wrapped in Dynamo's BackendCompilerFailed."""
    with torch.no_grad(), pytest.raises(error, match=message):
        torch.compile(torch.nn.Linear(2, 2), backend=difa, options=options)(torch.ones(1, 2))


@pytest.fixture
def compiled_by_tensorrt(monkeypatch):
    """The graphs that are handed to torch-tensorrt, in whose place they run as they are."""
    graphs = []

    def backend(module, example_inputs):
        graphs.append(module)
        return module.forward

    monkeypatch.setitem(sys.modules, "torch_tensorrt", types.ModuleType("torch_tensorrt"))
    known = torch._dynamo.lookup_backend
    monkeypatch.setattr(
        torch._dynamo, "lookup_backend", lambda name: backend if name == "torch_tensorrt" else known(name)
    )
    return graphs


def test_torch_tensorrt_is_handed_what_inductor_would_be(compiled_by_tensorrt):
    model, inputs = plain()
    with torch.no_grad():
        wanted = model(**inputs)
        alone = torch.compile(model, backend=difa, options={"inner": "tensorrt"})(**inputs)
        torch._dynamo.reset()
        assert len(compiled_by_tensorrt) == 1
        followed = torch.compile(model, backend=difa, options={"plan": plain_plan([FULL]), "inner": "tensorrt"})
        again = followed(**inputs)
    assert torch.equal(alone, wanted)
    assert torch.equal(again, wanted)
    assert len(compiled_by_tensorrt) > 1, "the segments of the planned model"


def test_without_torch_tensorrt(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)  # as if it were not installed
    model, inputs = plain()
    with torch.no_grad(), pytest.raises(MissingDependencyError, match="pip install torch-tensorrt"):
        torch.compile(model, backend=difa, options={"plan": plain_plan([FULL]), "inner": "tensorrt"})(**inputs)


def test_a_misspelt_resize_is_refused_at_once():
    model, inputs = plain()
    with torch.no_grad(), pytest.raises(DecisionError, match="fraction, tokens"):
        compiled(model, plain_plan([FULL]), resize="fractoin")(**inputs)


@pytest.mark.parametrize("mode", ["max-autotune-no-cudagraphs", "reduce-overhead"])
def test_without_a_plan_a_mode_is_inductors(monkeypatch, mode):
    given = []
    monkeypatch.setattr(
        "difa_compile.backend.entry.inductor", lambda module, inputs, config: given.append(dict(config))
    )
    difa(*graph_of(torch.nn.Linear(2, 2), {"input": torch.ones(1, 2)}), mode=mode)
    assert given == [torch._inductor.list_mode_options(mode)]


def test_a_model_without_attention_is_refused_as_itself():
    with torch.no_grad(), pytest.raises(NoAttentionError, match="nothing a plan could change"):
        compiled(Average().eval(), plain_plan([FULL]))(torch.randn(2, 4, 8))


def test_a_plan_for_another_model_is_refused():
    model, inputs, _, _ = captured_plain()
    with torch.no_grad(), pytest.raises(PlanMismatchError, match=r"transformer_blocks\.0\.attn1"):
        compiled(model, family_plan("dit", [FULL]))(**inputs)


def test_gradients_are_refused():
    model, inputs, _, _ = captured_plain()
    with pytest.raises(RunError, match=r"torch\.no_grad"):
        compiled(model, plain_plan([FULL]))(**inputs)


def test_inference_mode_works():
    model, inputs, _, _ = captured_plain()
    fast = compiled(model, plain_plan([FULL, REUSE]))
    with torch.inference_mode(), sampling(fast, 2) as run:
        whole = fast(**inputs)
        run.step(1)
        again = fast(**inputs)
        assert torch.equal(whole, model(**inputs))
    assert torch.equal(whole, again), "the same inputs, so the reused outputs are the full ones"


def test_strict_names_the_site_and_the_reason():
    model, inputs = plain(masks=("none", "causal"))
    plan = plain_plan([D("window(band:2)")])
    with torch.no_grad(), pytest.raises(SiteSkippedError, match=r"layers\.1\.attention.*is causal"):
        compiled(model, plan, strict=True)(**inputs)


def test_a_causal_site_is_left_full_and_the_other_windowed():
    model, inputs = plain(masks=("none", "causal"))
    masked = compiled(model, plain_plan([D("window(band:2)")]))
    with torch.no_grad(), sampling(masked, 1):
        found = masked(**inputs)
    wanted = copy.deepcopy(model)
    tokens = torch.arange(24)
    near = (tokens[:, None] - tokens).abs() <= 2
    attention = wanted.layers[0].attention

    def windowed(x):
        q, k, v = attention.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-1, -2) / 4.0).masked_fill(~near, -torch.inf)
        return attention.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    attention.forward = windowed
    with torch.no_grad():
        torch.testing.assert_close(found, wanted(**inputs), atol=3e-6, rtol=0)
        assert not torch.allclose(found, model(**inputs), atol=1e-3)


def test_the_conditional_half_of_the_options_goes_before_the_plans():
    model, inputs, _, _ = captured_plain()
    outputs = {}
    for planned, told in ((0, None), (1, None), (0, 1)):
        torch._dynamo.reset()
        options = {} if told is None else {"cfg": {"conditional_half": told}}
        fast = compiled(model, plain_plan([D("full+cfg")], conditional_half=planned), **options)
        with torch.no_grad(), sampling(fast, 1):
            outputs[planned, told] = fast(**inputs)
    assert torch.equal(outputs[0, 1], outputs[1, None])
    assert not torch.allclose(outputs[0, None], outputs[1, None], atol=1e-3)


def test_two_models_of_a_class_share_a_capture_and_keep_their_runs_apart():
    model, inputs, _, _ = captured_plain()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    plan = plain_plan([FULL, D("window(band:2)+residual"), REUSE])
    captures = []

    def counted(module, example_inputs, *, options):
        captures.append(module)
        return difa(module, example_inputs, options=options)

    wanted = []
    for each in (model, other):
        torch._dynamo.reset()
        fast = compiled(each, plan)
        with torch.no_grad(), sampling(fast, 3) as run:
            wanted.append([(run.step(i), fast(**at_step(inputs, i)))[1] for i in range(3)])
    assert not torch.allclose(wanted[0][2], wanted[1][2], atol=1e-3)
    torch._dynamo.reset()
    options = {"plan": plan, "inner": "eager"}
    fasts = [torch.compile(each, backend=counted, options=options) for each in (model, other)]
    with torch.no_grad(), sampling(fasts[0], 3) as one, sampling(fasts[1], 3) as two:
        for step in range(3):
            for fast, run, images in zip(fasts, (one, two), wanted, strict=True):
                run.step(step)
                assert torch.equal(fast(**at_step(inputs, step)), images[step]), step
    assert len(captures) == 1


@pytest.mark.parametrize("resize", ["fraction", "tokens"])
def test_one_plan_at_several_sizes_in_one_run_of_the_process(resize):
    """One capture per size; windows grow with the image or keep their tokens; no cache crosses."""
    model, _ = plain()
    plan = plain_plan([FULL, D("window(band:3)+residual"), REUSE])
    fast = compiled(model, plan, resize=resize, strict=True)
    inputs = {size: plain(size=size)[1] for size in ((8, 12), (16, 12))}
    found = {}
    with torch.no_grad():
        for size, values in inputs.items():
            with sampling(fast, 3) as run:
                found[size] = [(run.step(i), fast(**at_step(values, i)))[1] for i in range(3)]
        larger = [FULL, D(f"window(band:{6 if resize == 'fraction' else 3})+residual"), REUSE]
        module, values = graph_of(model, inputs[16, 12])
        own = plan_of(model, [site.info for site in sites_of(module, values)], [[d] * 2 for d in larger])
        torch._dynamo.reset()
        exact = compiled(model, own, strict=True)
        with sampling(exact, 3) as run:
            for i in range(3):
                run.step(i)
                assert torch.equal(exact(**at_step(inputs[16, 12], i)), found[16, 12][i]), i
    assert not torch.allclose(found[8, 12][1], model(**at_step(inputs[8, 12], 1)), atol=1e-3)


def test_another_size_without_resize_is_refused():
    model, _ = plain()
    fast = compiled(model, plain_plan([FULL, REUSE]))
    with torch.no_grad(), pytest.raises(PlanMismatchError, match="resize="):
        fast(**plain(size=(16, 12))[1])


def test_nothing_is_stored_on_the_model():
    model, inputs = plain()
    plan = plain_plan([FULL, D("window(band:2)+residual"), REUSE])

    def everything():
        parts = [*model.named_modules(), *model.named_parameters(), *model.named_buffers()]
        return {(name, type(part)): sorted(vars(part)) for name, part in parts}

    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        torch.compile(model, backend="eager")(**inputs)  # torch.compile itself leaves a mark
    before = everything()
    torch._dynamo.reset()
    fast = compiled(model, plan)
    with torch.no_grad(), sampling(fast, 3) as run:
        for step in range(3):
            run.step(step)
            fast(**at_step(inputs, step))
    assert everything() == before
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_bfloat16_follows_the_plan():
    """Rounding of another attention kernel, not of another computation: within a few units in the last place."""
    model, inputs = plain()
    model = model.to(torch.bfloat16)
    fast = compiled(model, plain_plan([FULL, D("window(band:2)+residual"), REUSE]), strict=True)
    single, _ = plain()
    exact = compiled(single, plain_plan([FULL, D("window(band:2)+residual"), REUSE]), strict=True)
    with torch.no_grad(), sampling(fast, 3) as one, sampling(exact, 3) as two:
        for step in range(3):
            one.step(step)
            two.step(step)
            now = at_step(inputs, step)
            found = fast(now["x"].to(torch.bfloat16)).float()
            wanted = exact(**now)
            unplanned = model(now["x"].to(torch.bfloat16)).float() - single(**now)
            assert (found - wanted).abs().max() <= 3 * unplanned.abs().max() + 1e-3, step


def test_a_trace_holds_the_graph_after_every_pass(tmp_path):
    """As an option of the backend: of the capture, and of each variant when it is first needed."""
    model, inputs, _, _ = captured_plain()
    fast = compiled(model, plain_plan([FULL, REUSE]), trace=str(tmp_path / "trace"))
    with torch.no_grad(), sampling(fast, 2) as run:
        fast(**inputs)
        run.step(1)
        fast(**inputs)
    (capture,) = (tmp_path / "trace").iterdir()
    passes = [path.stem[3:] for path in sorted(capture.glob("*.txt"))]
    assert passes == ["captured", *(each.__name__ for each in (*PREPARATION, *ANALYSIS))]
    reused = [path for path in capture.glob("variant-*/*reuse.txt") if "<< reuse" in path.read_text()]
    assert len(reused) == 1, "both blocks are of one kind"


def test_a_trace_is_a_folder_that_can_be_written(tmp_path):
    model, inputs, _, _ = captured_plain()
    (tmp_path / "file").write_text("")
    with torch.no_grad():
        with pytest.raises(BackendCompilerFailed, match="file") as failed:
            compiled(model, plain_plan([FULL]), trace=tmp_path / "file")(**inputs)
        assert isinstance(failed.value.inner_exception, OutputError)
        with pytest.raises(DecisionError, match="option trace is a int; give the path of a folder"):
            compiled(model, plain_plan([FULL]), trace=3)(**inputs)


def test_a_limit_on_rewrites_that_is_no_number_is_refused_until_it_is_one(monkeypatch):
    """What is no fault of the call is not kept: the next call tries again."""
    model, inputs, _, _ = captured_plain()
    fast = compiled(model, plain_plan([FULL]))
    monkeypatch.setenv("DIFA_PASS_LIMIT", "many")
    with torch.no_grad(), sampling(fast, 1):
        with pytest.raises(BackendCompilerFailed, match="DIFA_PASS_LIMIT is 'many'") as failed:
            fast(**inputs)
        assert isinstance(failed.value.inner_exception, PassError)
        monkeypatch.setenv("DIFA_PASS_LIMIT", "0")
        assert torch.equal(fast(**inputs), model(**inputs))


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), KeyError("a fault")])
def test_a_pass_that_fails_once_is_tried_again(error, monkeypatch):
    """For want of memory, which is said as such, or by a fault of its own."""
    model, inputs, _, _ = captured_plain()
    fast = compiled(model, plain_plan([FULL]))

    def fail(module, facts):
        raise error

    with torch.no_grad(), sampling(fast, 1):
        with monkeypatch.context() as broken:
            broken.setattr(order, "ANALYSIS", (*ANALYSIS, fail))
            with pytest.raises(BackendCompilerFailed) as failed:
                fast(**inputs)
        expected = PassError if isinstance(error, KeyError) else type(error)
        assert type(failed.value.inner_exception) is expected
        assert torch.equal(fast(**inputs), model(**inputs))
