"""Models that run under autocast, or turn it on or off themselves: planned, they compute what they compute altered by
hand under the same autocast.

The oracle is :class:`tests.support.altered.Altered`, its windows computed by the same kernel on values that are cast
here.
"""

from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import difa_compile
from difa_compile.backend.batch_sizes import pattern_of
from difa_compile.backend.entry import eager
from difa_compile.backend.inductor import inductor
from difa_compile.calibration.state import CalibrationState
from difa_compile.decision import FULL, Decision, Kind, Window
from difa_compile.layout import Layout
from difa_compile.ops.local_attention import local_attention
from difa_compile.passes.replay import SHARING_TOLERANCE
from difa_compile.pipeline.rules import plan_from_rule
from difa_compile.plan.schedule import assign_roles
from tests.support.altered import Altered
from tests.support.captures import capture_of
from tests.support.tiny_models import ATTENTIONS, FAMILIES, Block, PlainTransformer, at_step, graph_of
from tests.support.tiny_pipelines import sample, tiny_pipeline

pytest.importorskip("diffusers")

LAYOUTS = {
    "dit": Layout((4, 4)),
    "pixart": Layout((4, 4)),
    "sd3": Layout((4, 6), after=7),
    "flux": Layout((4, 6), before=7),
    "wan": Layout((3, 4, 4)),
}


class Cast(Altered):
    """:class:`Altered` whose windows are computed in the dtype of full attention, which autocast has cast."""

    @contextmanager
    def attending(self, index, decision):
        attention = F.scaled_dot_product_attention
        window = decision.window or self.window

        def attend(query, key, value, attn_mask=None, **options):
            full = attention(query, key, value, attn_mask=attn_mask, **options)
            mask = attn_mask.to(full.dtype) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
            with torch.autocast("cpu", enabled=False):
                cast = (part.to(full.dtype) for part in (query, key, value))
                near = local_attention(*cast, self.layouts[index], window, options.get("scale"), mask)
            if decision.kind is Kind.FULL:
                left = full - near
                self.residuals[index] = torch.cat([left, left]) if decision.cfg_shared else left
                return full
            if decision.kind is Kind.WINDOW:
                return near
            left = self.residuals[index]
            return near + (self.conditional(left) if decision.cfg_shared else left)

        F.scaled_dot_product_attention = attend
        try:
            yield
        finally:
            F.scaled_dot_product_attention = attention


class NormedAttention(nn.Module):
    """Queries and keys are normalised, which autocast leaves in float32; values are as the projection gives them."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(width // heads) for _ in range(2))

    def forward(self, x):
        query, key, value = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.to_q, self.to_k, self.to_v)
        )
        bias = -0.1 * torch.arange(x.shape[1]).view(1, 1, 1, -1).float() if self.masked else None
        attended = F.scaled_dot_product_attention(2 * self.norm_q(query), self.norm_k(key), value, attn_mask=bias)
        return self.out(attended.transpose(1, 2).flatten(2))

    masked = False


class RegionBlock(Block):
    """A block that may turn autocast on or off for itself, and then casts what it is given.

    Its input is laid out row by row, as it is behind a cut: bfloat16 norms round otherwise with other strides.
    """

    region = None

    def forward(self, x):
        x = x.contiguous()
        if self.region is None:
            return super().forward(x)
        with torch.autocast("cpu", **self.region):
            return super().forward(x if self.region.get("enabled", True) else x.float())


class Normed(PlainTransformer):
    """Three blocks; ``region`` is around the whole forward."""

    region = None

    def __init__(self):
        super().__init__([NormedAttention(32, 2) for _ in range(3)])
        self.layers = nn.ModuleList(RegionBlock(32, layer.attention) for layer in self.layers)

    def forward(self, x):
        if self.region is None:
            return (super().forward(x),)
        with torch.autocast("cpu", **self.region):
            return (super().forward(x),)


def normed():
    torch.manual_seed(0)
    return Normed().eval(), {"x": torch.randn(2, 3, 8, 12)}


ON, OFF = {"dtype": torch.bfloat16}, {"enabled": False}
HALF = {"dtype": torch.float16, "cache_enabled": False}
PLACES = {
    "around": (ON, None, None),
    "around, float16": (HALF, None, None),
    "inside": (None, ON, None),
    "inside another": (HALF, ON, None),
    "off inside": (ON, OFF, None),
    "off in a block": (ON, None, OFF),
    "off in a block, inside": (None, ON, OFF),
    "on in a block": (None, None, ON),
    "nested": (None, ON, HALF),
}
"""Settings of autocast around the call, in the model around its forward, and around the second of its blocks."""


def schedule(window):
    """Every decision after what it may read, as rows over three sites."""
    even = "full, W+residual, reuse, W+residual+cfg, reuse, full+cfg, W+residual, W, W+cfg, reuse+cfg"
    odd = "full, reuse, full+cfg, reuse, reuse+cfg, W+residual+cfg, W, reuse, W+residual, full"
    one, two = (
        [Decision.parse(text.replace("W", f"window({window})")) for text in column.split(", ")]
        for column in (even, odd)
    )
    return [(a, b) for a, b in zip(one, two, strict=True)]


def compare(model, inputs, around, layout, is_attention, compiler=eager, rows=None):
    """Run a schedule, planned and altered by hand; yields (found, wanted) of every step."""
    window = "box:1"
    with nullcontext() if around is None else torch.autocast("cpu", **around):
        module, values = graph_of(model, inputs)
        capture = capture_of(module, values, compiler, conditional_half=1)
        paths = [name for name, _ in model.named_modules() if is_attention(name)]
        assert [site.path for site in capture.model.sites] == paths
        wide = [[pair[i % 2] for i in range(len(paths))] for pair in rows or schedule(window)]
        for i, decision in {(i, row[i]) for row in wide for i in range(len(paths))}:
            assert capture.verdicts.why_not(i, decision) is None, (paths[i], str(decision))
        oracle, caches = Cast(model, paths, [layout] * len(paths), 1, Window.parse(window)), {}
        for step, (row, roles) in enumerate(zip(wide, assign_roles(wide), strict=True)):
            now = at_step(inputs, step)
            swapped = {inputs[name].data_ptr(): v for name, v in now.items() if isinstance(v, torch.Tensor)}
            args = [swapped.get(v.data_ptr(), v) if isinstance(v, torch.Tensor) else v for v in values]
            outputs, written = capture.execute(args, roles, caches)
            caches.update(written)
            yield outputs[0], oracle(row, now), caches
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_every_decision_computes_what_the_model_altered_by_hand_computes(place, masked, monkeypatch):
    around, inside, block = PLACES[place]
    model, inputs = normed()
    monkeypatch.setattr(NormedAttention, "masked", masked)
    model.region, model.layers[1].region = inside, block
    region = block or inside or around
    wanted_dtype = torch.float32 if region is OFF else region["dtype"]
    steps = list(compare(model, inputs, around, Layout((4, 6)), lambda path: path.endswith("attention")))
    for step, (found, wanted, _) in enumerate(steps):
        assert found.dtype == wanted.dtype
        assert torch.isfinite(found).all()
        assert torch.equal(found, wanted), step
    written = {name: value.dtype for _, _, caches in steps for name, value in caches.items()}
    assert written["cache.layers.1.attention.residual"] == wanted_dtype


@pytest.mark.slow
@pytest.mark.parametrize("place", ["around", "around, float16", "inside", "inside another", "off inside"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_what_it_computes_altered_by_hand(family, place):
    around, inside, _ = PLACES[place]
    model, inputs = FAMILIES[family]()
    if inside is not None:
        plain = type(model)

        class Inside(plain):
            def forward(self, *args, **kwargs):
                with torch.autocast("cpu", **inside):
                    return plain.forward(self, *args, **kwargs)

        model.__class__ = Inside
    for found, wanted, _ in compare(model, inputs, around, LAYOUTS[family], ATTENTIONS[family]):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["around", "nested", "off in a block"])
def test_through_inductor(place):
    """As close as rounding to bfloat16 leaves: inductor keeps in float32 what eager rounds."""
    around, inside, block = PLACES[place]
    model, inputs = normed()
    model.region, model.layers[1].region = inside, block
    rows = [[Decision.parse(text)] * 2 for text in ("full", "window(box:1)+residual", "reuse", "window(box:1)+cfg")]
    compared = compare(model, inputs, around, Layout((4, 6)), lambda path: path.endswith("attention"), inductor, rows)
    for found, wanted, _ in compared:
        assert found.dtype == wanted.dtype
        error = (found.float() - wanted.float()).abs().max() / wanted.float().abs().max()
        assert error <= SHARING_TOLERANCE[torch.bfloat16], "inductor keeps in float32 what eager rounds"


def test_equal_blocks_within_one_region_are_compiled_once():
    model, inputs = normed()
    model.region = ON
    module, values = graph_of(model, inputs)
    capture = capture_of(module, values, eager)
    blocks = [segment for segment in capture.model.split.segments if segment.sites and not segment.spanned]
    assert len(blocks) == 3
    assert len({segment.structure for segment in blocks}) == 1
    model.layers[1].region = HALF
    module, values = graph_of(model, inputs)
    unlike = [s.structure for s in capture_of(module, values, eager).model.split.segments if s.sites]
    assert unlike[1] not in (unlike[0], unlike[2])


# --- pipelines --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_pipeline_is_called_with_and_without_autocast_in_turn():
    """Two captures, each right: full attention is the pipeline without a plan, a window is something else."""
    pipe = tiny_pipeline()
    rules = (lambda step, site: FULL, lambda step, site: Decision.parse("window(band:4)+residual") if step else FULL)
    turns = (nullcontext(), torch.autocast("cpu", torch.bfloat16), nullcontext())

    def sampled():
        found = []
        for turn in turns:
            with turn:
                found.append(torch.as_tensor(sample(pipe, steps=2)))
        return found

    before = sampled()
    for rule, same in zip(rules, (True, False), strict=True):
        plan = plan_from_rule(pipe, steps=2, rule=rule)
        difa_compile.apply(pipe, plan, strict=True, inner="eager")
        found = sampled()
        difa_compile.remove(pipe)
        assert torch.equal(found[0], found[2])
        assert not torch.equal(found[0], found[1])
        for one, two in zip(found, before, strict=True):
            assert torch.isfinite(one).all()
            assert torch.equal(one, two) is same


def test_a_plan_calibrated_under_autocast_runs_under_it(tmp_path, monkeypatch):
    pipe, identities = tiny_pipeline(), []
    opened = CalibrationState.open
    monkeypatch.setattr(CalibrationState, "open", lambda path, made: identities.append(made) or opened(path, made))

    def calibrated():
        return difa_compile.calibrate(
            pipe,
            {"class_labels": [1, 2]},
            steps=2,
            threshold=0.5,
            window="band:4",
            state=tmp_path / "state.json",
            progress=False,
            inner="eager",
        )

    with torch.autocast("cpu", torch.bfloat16):
        plan = calibrated()
        assert any(decision != FULL for row in plan.decisions for decision in row)
        full = torch.as_tensor(sample(pipe, steps=2))
        difa_compile.apply(pipe, plan, strict=True, inner="eager")
        found = torch.as_tensor(sample(pipe, steps=2))
    difa_compile.remove(pipe)
    assert torch.isfinite(found).all()
    assert not torch.equal(found, full)
    calibrated()
    assert identities[0]["settings"] != identities[1]["settings"], "neither goes on where the other was interrupted"


def test_graphs_for_all_batch_sizes_are_told_apart_by_the_autocast_around_them():
    model, inputs = normed()
    module, values = graph_of(model, inputs)
    plain = pattern_of(module, values)
    with torch.autocast("cpu", torch.bfloat16):
        cast = pattern_of(module, values)
    assert plain[1] == cast[1]
    assert plain[0] != cast[0]


def test_time_is_predicted_for_the_dtype_that_attention_is_computed_in():
    model, inputs = normed()
    with torch.autocast("cpu", torch.bfloat16):
        module, values = graph_of(model, inputs)
        capture = capture_of(module, values, eager)
    assert capture.prediction._setting(0).dtype == torch.bfloat16, "queries are float32"
