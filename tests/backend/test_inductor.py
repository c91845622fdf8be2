"""What inductor is told about a variant, and what it keeps for the next process."""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._inductor import compile_fx

from difa_compile.backend.entry import difa
from difa_compile.backend.inductor import inductor, inductor_config, uses_cuda_graphs
from difa_compile.backend.run import sampling
from difa_compile.decision import FULL, Decision
from difa_compile.ops.local_attention import LOCAL_ATTENTION
from difa_compile.plan.schedule import FULL_ROLE, assign_roles
from tests.support.by_hand import assert_near, by_hand, call, plain_output
from tests.support.captures import capture_of
from tests.support.places import ROOT
from tests.support.tiny_models import at_step, captured, captured_plain, plain_plan

pytest.importorskip("diffusers")

D = Decision.parse


@pytest.fixture
def told(monkeypatch):
    """Positions of the static inputs of each graph that reaches inductor, which runs it as it is."""
    positions = []

    def inner_compile(module, example_inputs, *, static_input_idxs=(), **_):
        positions.append(list(static_input_idxs))
        return make_boxed_func(module.forward)

    plain = compile_fx.compile_fx

    def uncompiled(module, inputs, **options):
        return plain(module, inputs, inner_compile=inner_compile, **options)

    monkeypatch.setattr(compile_fx, "compile_fx", uncompiled)
    with torch.compiler.config.patch(force_disable_caches=True):
        yield positions


@pytest.mark.slow
@pytest.mark.parametrize("family", ["dit", "sd3", "flux"])
def test_parameters_are_static_inputs_of_every_compiled_graph(family, told):
    """Else CUDA graphs would copy the weights at every call."""
    model, inputs, module, values = captured(family)
    own = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    seen = []

    def compiler(graph, example_inputs):
        compiled = inductor(graph, example_inputs)
        seen.append([i for i, value in enumerate(example_inputs) if id(value) in own])
        return compiled

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=compile_fx.compile_fx, dynamic=False)(**inputs)
    plain = told.pop()
    assert len(plain) >= 20

    capture = capture_of(module, values, compiler, conditional_half=0)
    caches = {}
    rows = [[D(text)] * len(capture.model.sites) for text in ("full", "window(box:1)+residual+cfg", "reuse")]
    for roles in assign_roles(rows):
        _, written = capture.execute(values, roles, caches)
        caches.update(written)
    assert told == seen, "by segment: positions of the model's tensors among the inputs"
    assert all(positions for positions in told), "every segment of these models has weights"
    capture.execute(values, [FULL_ROLE] * len(capture.model.sites), {})
    assert told[-1] == plain, "the whole graph is told of as torch.compile does"


def test_inductors_options_hold_for_every_graph_and_only_there(monkeypatch):
    found = []

    def inner_compile(module, example_inputs, **_):
        found.append(torch._inductor.config.max_autotune)
        return make_boxed_func(module.forward)

    monkeypatch.setattr(compile_fx, "compile_fx", functools.partial(compile_fx.compile_fx, inner_compile=inner_compile))
    model, inputs, _, _ = captured_plain()
    plan = plain_plan([FULL, FULL, D("reuse")])
    with torch.compiler.config.patch(force_disable_caches=True):
        for given in ({}, {"inductor_options": {"max_autotune": True}}):
            torch._dynamo.reset()
            fast = torch.compile(model, backend=difa, options={"plan": plan, **given})
            with torch.no_grad(), sampling(fast, 3) as run:
                for step in range(3):
                    run.step(step)
                    fast(**inputs)
    graphs = 1 + 3 + 1  # the whole; around the blocks and the block that writes its cache; the block that is reused
    assert found == [False] * graphs + [True] * graphs
    assert torch._inductor.config.max_autotune is False


class Replayed:
    """A compiler whose functions return memory that is no longer theirs once the next step is marked.

    As CUDA graphs do: they write every replay's results to the same addresses.
    """

    def __init__(self):
        self.handed_out = []
        self.steps = 0

    def __call__(self, module, example_inputs, config=None):
        def run(*args):
            results = list(module(*args))
            self.handed_out += [value for value in results if isinstance(value, torch.Tensor)]
            return results

        return run

    def mark_step(self):
        self.steps += 1
        for value in self.handed_out:
            value.fill_(torch.nan)
        self.handed_out.clear()


ROWS = ["full", "window(band:2)+residual", "reuse", "full+cfg", "window(band:2)+residual+cfg", "reuse"]
ROWS += ["forecast:1+cfg", "forecast:2"]


@pytest.mark.parametrize("guidance", ["batched", "two-call"])
def test_what_outlives_a_call_is_not_in_memory_that_cuda_graphs_reuse(monkeypatch, guidance):
    """All outputs of a run are kept to its end, all caches as long as the plan wants them, and none is spoiled."""
    model, inputs, _, _ = captured_plain()
    plan = plain_plan([D(text) for text in ROWS], guidance=guidance, conditional_half=0)

    def sample(**options):
        torch._dynamo.reset()
        fast = torch.compile(model, backend=difa, options={"plan": plan, "strict": True, **options})
        outputs = []
        with torch.no_grad(), sampling(fast, len(ROWS)) as run:
            for step in range(len(ROWS)):
                run.step(step)
                for branch in ("cond", "uncond") if guidance == "two-call" else (None,):
                    run.branch(branch)
                    outputs.append(fast(**at_step(inputs, step)))
            assert run.peak_cache_bytes > 0
        return outputs

    wanted = sample(inner="eager")
    replayed = Replayed()
    monkeypatch.setattr("difa_compile.backend.entry.inductor", replayed)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", replayed.mark_step)
    found = sample(mode="reduce-overhead")
    assert replayed.handed_out, "nothing was compiled"
    assert replayed.steps == len(found), "every call of the model is a step of its own"
    replayed.mark_step()
    assert all(map(torch.equal, found, wanted))


@pytest.mark.slow
def test_forecasts_compiled_by_inductor():
    """Weights reach compiled code as rows of a table, at addresses that no graph has been compiled for."""
    model, inputs, _, _ = captured_plain()
    column = [D(text) for text in ("full", "full", "forecast:1+cfg", "full", "forecast:2", "forecast:1")]
    progress = (1.0, 0.9, 0.7, 0.65, 0.4, 0.1)
    fast = torch.compile(model, backend=difa, options={"plan": plain_plan(column, conditional_half=0), "strict": True})
    expected = by_hand(model)
    with sampling(fast, len(column), progress=progress) as run:
        for step, decision in enumerate(column):
            run.step(step)
            now = at_step(inputs, step)
            assert_near(call(fast, now), plain_output(expected, [decision] * 2, now, place=progress[step]))


def test_full_calls_outside_of_a_plan_are_copied_too(monkeypatch):
    """Calibration and calls without a run: the whole graph, by way of ``Capture.full``."""
    _, _, module, values = captured_plain()
    replayed = Replayed()
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", replayed.mark_step)
    capture = capture_of(module, values, replayed, overwrites=True)
    first = capture.full()(values, {})[0][0]
    kept = first.clone()
    assert torch.equal(capture.full()(values, {})[0][0], kept)
    replayed.mark_step()
    assert torch.equal(first, kept)


def test_cuda_graphs_can_be_asked_for_in_every_way_inductor_knows():
    assert not uses_cuda_graphs(inductor_config())
    assert not uses_cuda_graphs(inductor_config("max-autotune-no-cudagraphs"))
    assert uses_cuda_graphs(inductor_config("reduce-overhead"))
    assert uses_cuda_graphs(inductor_config("max-autotune"))
    assert uses_cuda_graphs(inductor_config(options={"triton.cudagraphs": True}))
    assert not uses_cuda_graphs(inductor_config("max-autotune", {"triton.cudagraphs": False}))
    with torch._inductor.config.patch({"triton.cudagraphs": True}):
        assert uses_cuda_graphs(inductor_config())


def test_local_attention_is_kept_out_of_cuda_graphs():
    """Its kernels keep masks for the next call, which must not lie in a CUDA graph's memory."""
    assert torch.Tag.cudagraph_unsafe in LOCAL_ATTENTION.tags


TWICE = """
import json, sys
import torch
from torch._dynamo.utils import counters
from difa_compile.backend.entry import difa
from difa_compile.decision import FULL, REUSE
from difa_compile.pipeline.rules import plan_from_rule
from difa_compile.backend.run import sampling
from tests.support.tiny_models import plain

torch.set_num_threads(1)
model, inputs = plain(masks=("none",))
plan = plan_from_rule(model, 2, lambda step, site: REUSE if step else FULL, inputs=inputs)
torch._dynamo.reset()
counters.clear()
fast = torch.compile(model, backend=difa, options={"plan": plan, "strict": True})
outputs = []
with torch.no_grad(), sampling(fast, 2) as run:
    for step in range(2):
        run.step(step)
        outputs.append(fast(**inputs).double().sum().item())
kinds = {"inductor": "fxgraph_cache_", "aot_autograd": "autograd_cache_"}
found = {}
for part, start in kinds.items():
    found[part] = {key.removeprefix(start): n for key, n in counters[part].items() if key.startswith(start)}
print(json.dumps({**found, "outputs": outputs, "seed": hash("difa")}))
"""


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path):
    """Also if its hash seed is another one: nothing that is compiled depends on the order of a set."""

    def process(seed):
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }
        done = subprocess.run(
            [sys.executable, "-c", TWICE], env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    cold, warm = process("1"), process("2")
    assert cold["seed"] != warm["seed"], "the hash seeds are alike"
    graphs = cold["inductor"]["miss"]
    assert graphs == 4, "before the block, the block in full and in reuse, after the block"
    assert cold["inductor"] == {"miss": graphs}
    assert cold["aot_autograd"] == {"miss": graphs, "saved": graphs}
    assert warm["inductor"] == {"hit": graphs}
    assert warm["aot_autograd"] == {"hit": graphs}
    assert warm["outputs"] == cold["outputs"]
