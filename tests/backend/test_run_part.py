"""The part of a run that belongs to some captures: which caches it keeps, for whom, and when it lets go of them."""

from dataclasses import replace

import pytest
import torch

from difa_compile.backend.capture import Capture
from difa_compile.backend.run import Run, sampling
from difa_compile.backend.run_part import Fit, apart
from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.errors import RunError
from difa_compile.passes.caches import CacheName
from difa_compile.pipeline.rules import plan_from_rule
from tests.support import two_attentions
from tests.support.by_hand import assert_near, by_hand, call, compiled, plain_output
from tests.support.tiny_models import (
    Attention,
    BareAttention,
    PlainTransformer,
    at_step,
    captured_plain,
    graph_of,
    plain_plan,
    plan_of,
    sharpened,
    sites_of,
)

D = Decision.parse
OUTPUT = 24 * 32 * 4
"""Bytes of a site's output, of one image."""


def test_memory_held_by_caches_is_counted_and_let_go():
    model, inputs, _, _ = captured_plain()
    window = "window(disc:2)"
    fast = compiled(model, plain_plan([FULL, D(window), D(f"{window}+residual"), REUSE, D(window), FULL]))
    output, residual = 2 * 24 * 32 * 4, 2 * 2 * 24 * 16 * 4
    held = []
    with sampling(fast, 6) as run:
        for step in range(6):
            run.step(step)
            call(fast, at_step(inputs, step))
            held.append(run.cache_bytes())
        assert run.peak_cache_bytes == 2 * max(output, residual)
    assert held == [2 * residual, 2 * residual, 2 * output, 0, 0, 0]
    assert run.cache_bytes() == 0


def test_of_outputs_no_more_are_held_than_a_later_step_reads():
    """k + 1 for a forecast of order k, and only from the first step whose output is read."""
    model, inputs, _, _ = captured_plain()
    column = ["full"] * 5 + ["forecast:2", "forecast:1", "full", "forecast:2", "full", "reuse", "full", "full"]
    fast = compiled(model, plain_plan([D(text) for text in column]))
    held = []
    with sampling(fast, len(column)) as run:
        for step in range(len(column)):
            run.step(step)
            call(fast, at_step(inputs, step))
            held.append(run.cache_bytes() / (2 * 2 * OUTPUT))  # two sites, two images
        assert run.peak_cache_bytes == 3 * 2 * 2 * OUTPUT
    assert held == [0, 0, 1, 2, 3, 2, 2, 3, 0, 1, 0, 0, 0]


def test_across_two_calls_no_older_outputs_are_held_than_the_other_call_reads():
    """The newest where it was computed for both; as many as a forecast reads where it is forecast for both."""
    model, inputs, _, _ = captured_plain()
    column = ["full+cfg"] * 4 + ["forecast:1+cfg", "full+cfg", "full+cfg"]
    fast = compiled(model, plain_plan([D(text) for text in column], guidance="two-call"))
    held = {"cond": [], "uncond": []}
    with sampling(fast, len(column)) as run:
        for step in range(len(column)):
            run.step(step)
            for name in held:
                run.branch(name)
                call(fast, at_step(inputs, step))
                held[name].append(run.cache_bytes() / (2 * 2 * OUTPUT))
    # What the other branch has taken over is no copy.
    assert held == {"cond": [1, 1, 1, 2, 2, 1, 1], "uncond": [1, 1, 1, 2, 2, 1, 1]}


class Noting(Run):
    """A run that notes how many variants its captures have had compiled after each call."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.compiled = []

    def call(self, capture, args):
        outputs = super().call(capture, args)
        self.compiled.append(capture.compiled_variants)
        return outputs


def test_one_variant_forecasts_over_every_gap():
    """The weights are inputs: neither the distance of the steps nor where they lie in the schedule is in the graph."""
    model, inputs, _, _ = captured_plain()
    column = [*["full"] * 3, *["forecast:1"] * 3, "full", "forecast:1", "full", "full", *["forecast:1"] * 2]
    progress = tuple((1 - step / 20) ** 2 for step in range(len(column)))
    torch._dynamo.utils.counters.clear()
    fast = compiled(model, plain_plan([D(text) for text in column]))
    expected = by_hand(model)
    run = Noting(model, len(column), progress=progress)
    run.activate()
    try:
        with torch._dynamo.config.patch(error_on_recompile=True):
            for step, text in enumerate(column):
                run.step(step)
                now = at_step(inputs, step)
                assert_near(call(fast, now), plain_output(expected, [D(text)] * 2, now, place=progress[step]))
    finally:
        run.deactivate()
    assert run.compiled[3] > run.compiled[2]
    assert set(run.compiled[3:]) == {run.compiled[3]}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_fitted_weights_are_what_a_forecast_sums_by():
    """At its own step, by the variant of all forecasts; others, and a schedule elsewhere, take the polynomial's."""
    model, inputs, _, _ = captured_plain()
    column = ["full", "full", "forecast:1", "forecast:1", "full"]
    plan = plain_plan([D(text) for text in column])
    own = {2: (0.25, 0.75)}
    rows = [[replace(cell, weights=own.get(step, ())) for cell in row] for step, row in enumerate(plan.rows)]
    fast = compiled(model, replace(plan, rows=tuple(map(tuple, rows))))
    plain = compiled(model, plan)

    def outputs(of, progress=plan.progress):
        with torch.no_grad(), sampling(of, steps=5, progress=progress) as run:
            found = []
            for step in range(5):
                run.step(step)
                found.append(call(of, at_step(inputs, step)))
            return found

    fitted, polynomial = outputs(fast), outputs(plain)
    for step in (0, 1, 3, 4):
        assert_near(fitted[step], polynomial[step])
    assert (fitted[2] - polynomial[2]).abs().max() > 1e-3
    near = [outputs(of, progress=[each - 1e-3 for each in plan.progress])[2] for of in (fast, plain)]
    far = [outputs(of, progress=[each - 2e-2 for each in plan.progress])[2] for of in (fast, plain)]
    assert (near[0] - near[1]).abs().max() > 1e-3
    assert_near(*far)


def test_caches_of_heads_are_kept_as_long_as_a_step_reads_them():
    model, inputs, _, _ = captured_plain()
    reader, both = D("heads(0:reuse;1:full)"), D("heads(0:reuse;1:window(disc:2)+residual)")
    fast = compiled(model, plain_plan([FULL, reader, FULL, both, reader, FULL]))
    head = 2 * 24 * 16 * 4
    held = []
    with sampling(fast, 6) as run:
        for step in range(6):
            run.step(step)
            call(fast, at_step(inputs, step))
            held.append(run.cache_bytes())
    assert held == [2 * head, 0, 2 * 2 * head, 2 * head, 0, 0]


def six_heads(rows):
    """A model of six heads, compiled for rows in which guidance is two calls, and its inputs."""
    torch.manual_seed(0)
    model = sharpened(PlainTransformer([Attention(24, 6)], width=24))
    inputs = {"x": torch.randn(2, 3, 8, 12)}
    sites = sites_of(*graph_of(model, inputs))
    plan = plan_of(model, [site.info for site in sites], rows, guidance="two-call")
    return compiled(model, plan, cfg={"two_call": True}), inputs


def test_a_call_that_has_left_steps_out_shares_no_heads_that_the_other_keeps_otherwise():
    """Made full where it begins anew, the unconditional call would leave heads to its next step in one piece that the
    conditional call holds in two, of two steps: it computes them by itself."""
    last = D("heads(0-3:reuse;4-5:full)")
    rows = [FULL, FULL, D("heads(0-1:reuse;2-5:full)+cfg"), last]
    found, wanted = {}, {}
    for kept, plan, steps in ((found, rows, (0, 2, 3)), (wanted, [FULL, FULL, FULL, last], (0, 1, 2, 3))):
        fast, inputs = six_heads(plan)
        with sampling(fast, 4) as run:
            for step in range(4):
                run.step(step)
                run.branch("cond")
                call(fast, at_step(inputs, step))
                if step in steps:
                    run.branch("uncond")
                    kept[step] = call(fast, at_step(inputs, 10 + step))
    for step in (2, 3):
        assert_near(found[step], wanted[step])


def test_a_call_that_fails_leaves_the_caches_as_they_were(monkeypatch):
    """It fails at the very end, when the step's own caches have been computed: they must not be taken over."""
    model, inputs, _, _ = captured_plain()
    fast = compiled(model, plain_plan([FULL, REUSE, FULL, REUSE]))
    expected = by_hand(model)

    row = Capture.compiled_row

    def failing(self, roles):
        def fail(args, caches):
            row(self, roles)(args, caches)
            raise MemoryError

        return fail

    with sampling(fast, 4) as run:
        call(fast, at_step(inputs, 0))
        run.step(1)
        with monkeypatch.context() as broken:
            broken.setattr(Capture, "compiled_row", failing)
            with pytest.raises(MemoryError):
                call(fast, at_step(inputs, 9))
        found = call(fast, at_step(inputs, 1))
    plain_output(expected, [FULL] * 2, at_step(inputs, 0))
    assert_near(found, plain_output(expected, [REUSE] * 2, at_step(inputs, 1)))


def test_two_unlabelled_calls_of_a_step_are_refused():
    """Guidance in two calls whose branches nobody named: each would read the other's caches."""
    model, inputs, _, _ = captured_plain()
    fast = compiled(model, plain_plan([FULL, REUSE]))
    with sampling(fast, 2):
        call(fast, at_step(inputs, 0))
        with pytest.raises(RunError, match="called twice without a branch"):
            call(fast, at_step(inputs, 5))


def test_a_branch_that_leaves_steps_out_reads_nothing_stale():
    """Guidance in an interval: the unconditional call is made at steps 0 and 3 only."""
    model, inputs, _, _ = captured_plain()
    fast = compiled(model, plain_plan([FULL, REUSE, FULL, REUSE]))
    with sampling(fast, 4) as run, torch.no_grad():
        for step in range(4):
            run.step(step)
            run.branch("cond")
            call(fast, at_step(inputs, step))
            if step in (0, 3):
                run.branch("uncond")
                found = call(fast, at_step(inputs, 10 + step))
        assert torch.equal(found, model(**at_step(inputs, 13))), "full: what step 2 would have left is not there"


def in_an_interval(column, uncond, progress, **options):
    """Outputs of both branches, by branch and step, where the unconditional call is made at some steps only."""
    model, inputs, _, _ = captured_plain()
    fast = compiled(model, plain_plan([D(text) for text in column], guidance="two-call"))
    found = {}
    with sampling(fast, len(column), progress=progress) as run:
        for step in range(len(column)):
            run.step(step)
            for name, made in (("cond", True), ("uncond", step in uncond)):
                if made:
                    run.branch(name)
                    found[name, step] = call(fast, at_step(inputs, step + 30 * (name == "uncond")))
    return found, {(promotion.step, promotion.reason) for promotion in run.promotions}


def by_hand_in_an_interval(row_of, steps, progress):
    """The same, with ``row_of[name][step]`` (None: no call); what is shared is the conditional call's of the step."""
    model, inputs, _, _ = captured_plain()
    expected = {name: by_hand(model) for name in ("cond", "uncond")}
    found = {}
    for step in range(steps):
        for name, altered in expected.items():
            text = row_of[name][step]
            altered.steps = step
            if text is not None:
                now = at_step(inputs, step + 30 * (name == "uncond"))
                cond = expected["cond"] if name == "uncond" else None
                decision = D(text) if cond else replace(D(text), cfg_shared=False)
                found[name, step] = plain_output(altered, [decision] * 2, now, place=progress[step], conditional=cond)
    return found


@pytest.mark.parametrize("shares", ["", "+cfg"])
def test_a_branch_that_leaves_steps_out_forecasts_from_its_own_outputs(shares):
    """It computes until it has as many as it needs, by itself where the other call forecasts; then shares again."""
    column = ["full", "full", *[f"forecast:1{shares}"] * 6]
    progress = (1.0, 0.9, 0.8, 0.75, 0.6, 0.5, 0.2, 0.1)
    left = ["full", None, None, "full", "full", *[f"forecast:1{shares}"] * 3]
    found, promotions = in_an_interval(column, (0, 3, 4, 5, 6, 7), progress)
    wanted = by_hand_in_an_interval({"cond": column, "uncond": left}, len(column), progress)
    assert found.keys() == wanted.keys()
    for place, output in found.items():
        assert_near(output, wanted[place])
    assert {step for step, _ in promotions} == {3, 4}
    assert any("needs the outputs of 2 earlier steps" in reason for _, reason in promotions)


@pytest.mark.parametrize("shares", ["", "+cfg"])
def test_forecasts_read_what_decisions_by_heads_have_computed(shares):
    """In both calls, what is shared being the conditional one's; of the last step the heads are each call's own."""
    column = [
        "full",
        f"heads(0:reuse;1:full){shares}",
        f"forecast:1{shares}",
        f"heads(0:window(band:2)+residual;1:reuse){shares}",
        f"forecast:2{shares}",
        "reuse",
        "heads(0:full;1:reuse)",
        "forecast:1",
    ]
    progress = tuple((1 - step / 10) ** 2 for step in range(len(column)))
    found, promotions = in_an_interval(column, range(len(column)), progress)
    wanted = by_hand_in_an_interval({"cond": column, "uncond": column}, len(column), progress)
    for place, output in found.items():
        assert_near(output, wanted[place])
    assert found.keys() == wanted.keys()
    assert not promotions


def test_what_is_handed_out_is_not_the_cache():
    """A model that returns its attention's output as it is: writing to it must not reach the next step."""

    class Naked(BareAttention):
        def forward(self, x):
            q, k, v = (part(x).unflatten(-1, (2, 8)).transpose(1, 2) for part in (self.q, self.k, self.v))
            return self.o(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    model = Naked().eval()
    x = torch.randn(2, 6, 16)
    plan = plan_from_rule(model, 3, lambda step, site: REUSE if step else FULL, inputs={"x": x})
    fast = compiled(model, plan)
    with sampling(fast, 3) as run, torch.no_grad():
        wanted = model(x)
        for step in range(3):
            run.step(step)
            found = fast(x)
            assert torch.equal(found, wanted), step
            found.zero_()


# --- between which captures caches pass ------------------------------------------------------------------------------


def fit_of(rows, **options):
    return Fit.of(two_attentions.capture(rows, **options))


def test_captures_of_one_plan_fit():
    rows = [FULL, D("window(band:2)"), REUSE]
    one, two = fit_of(rows), fit_of(rows)
    assert one == two
    assert (one.two_call, one.batch) == (False, 2)
    assert one.caches[0] == (
        "layers.0.attention",
        24,
        ((2, 2, 24, 16), (2, 24, 32)),
        torch.float32,
        torch.float32,
        torch.device("cpu"),
    )


def test_what_is_carried_out_decides_and_not_what_was_decided(profile_at):
    """A plan whose windows are left out on this machine fits one that has full attention there."""
    window = D("window(band:2)")
    assert fit_of([FULL, window]) != fit_of([FULL, FULL])
    profile_at(**two_attentions.SLOW)
    assert fit_of([FULL, window]) == fit_of([FULL, FULL])


def test_what_differs_is_told():
    here = fit_of([FULL, REUSE])
    path, tokens, shapes, *dtypes, device = here.caches[1]

    def other(**changed):
        cache = {"tokens": tokens, "shapes": shapes, "dtypes": dtypes, "device": device, **changed}
        return (here.caches[0], (path, cache["tokens"], cache["shapes"], *cache["dtypes"], cache["device"]))

    half = [torch.bfloat16, torch.bfloat16]
    for changed, words in (
        (replace(here, batch=4), "its attention has a batch of 4, not 2"),
        (replace(here, caches=other(tokens=31)), "layers.1.attention has 31 tokens, not 24"),
        (
            replace(here, caches=other(dtypes=half)),
            "layers.1.attention is in torch.bfloat16 on cpu, not torch.float32 on cpu",
        ),
        (fit_of([FULL, FULL]), "at layers.0.attention the plan comes to full, not reuse"),
        (fit_of([FULL, REUSE, REUSE]), "it follows another plan"),
    ):
        assert changed != here
        assert changed.difference(here) == words


def test_what_is_handed_out_is_copied_where_a_cache_holds_the_same_memory():
    cache, own = torch.zeros(2, 3), torch.zeros(2, 3)
    outputs = apart([own, cache.T, cache[:1], None, 5], {CacheName.residual("a"): cache})
    assert outputs[0] is own
    assert outputs[3:] == [None, 5]
    for output in outputs[1:3]:
        output.fill_(1)
    assert not cache.any()
