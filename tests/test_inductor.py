"""What inductor is told about a variant, and what it keeps for the next process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._inductor import compile_fx

from difa_compile.backend import inductor
from difa_compile.capture import Capture
from difa_compile.decision import Decision
from difa_compile.schedule import FULL_ROLE, assign_roles
from tests.tiny_models import captured

pytest.importorskip("diffusers")


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

    capture = Capture(module, values, compiler, conditional_half=0)
    caches = {}
    rows = [[Decision.parse(text)] * len(capture.sites) for text in ("full", "window(box:1)+residual+cfg", "reuse")]
    for roles in assign_roles(rows):
        _, written = capture.execute(values, roles, caches)
        caches.update(written)
    assert told == seen, "by segment: positions of the model's tensors among the inputs"
    assert all(positions for positions in told), "every segment of these models has weights"
    capture.execute(values, [FULL_ROLE] * len(capture.sites), {})
    assert told[-1] == plain, "the whole graph is told of as torch.compile does"


TWICE = """
import json, sys
import torch
from torch._dynamo.utils import counters
from difa_compile.backend import difa
from difa_compile.decision import FULL, REUSE
from difa_compile.plan import Plan
from difa_compile.run import sampling
from tests.tiny_models import plain

torch.set_num_threads(1)
model, inputs = plain(masks=("none",))
plan = Plan.from_rule(model, 2, lambda step, site: REUSE if step else FULL, inputs=inputs)
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
            "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])),
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
