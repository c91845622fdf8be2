"""The contracts of DESIGN.md, clause by clause: break one, and a test named here fails.

``PINNED`` names the tests that live with the part they are about. What follows below it are the clauses that no single
part can be held to.
"""

import ast
import functools
import itertools
import re

import pytest
import torch
from torch._inductor import compile_fx

from difa_compile.backend.capture import Capture
from difa_compile.backend.entry import difa, eager
from difa_compile.backend.run import sampling
from difa_compile.decision import FULL, REUSE, Decision, Window
from difa_compile.passes.graph import is_attention, is_linear
from difa_compile.passes.order import REWRITES, rewrite
from difa_compile.passes.variant import Context
from difa_compile.plan.plan import Plan
from difa_compile.plan.schedule import FULL_ROLE, Role
from tests.support.captures import capture_of
from tests.support.places import ROOT
from tests.support.tiny_models import (
    FAMILIES,
    at_step,
    captured,
    captured_plain,
    family_plan,
    plain,
    plain_plan,
    sites_of,
)

diffusers = pytest.importorskip("diffusers")

D = Decision.parse

PINNED = {
    "1. One capture, one rewrite pipeline": {
        "one capture serves all steps": (
            "backend/test_run.py",
            "test_a_family_follows_its_plan_through_a_schedule_without_recompiling",
        ),
        "any model, by no class of its own": (
            "passes/prepare/test_other_styles.py",
            "test_spatial_and_temporal_attention_of_a_video_model",
        ),
    },
    "2. Variants are pure": {
        "a cache is an input or an output": (
            "passes/rewrite/test_emit_caches.py",
            "test_a_cache_is_an_input_or_an_output_and_contiguous",
        ),
        "inputs and caches are not written to": (
            "passes/rewrite/test_emit_caches.py",
            "test_running_a_variant_changes_neither_its_inputs_nor_its_caches",
        ),
        "nothing hangs on modules": ("backend/test_entry.py", "test_nothing_is_stored_on_the_model"),
        "runs at the same time": ("backend/test_run.py", "test_threads_do_not_share_runs"),
        "nothing lies in memory that CUDA graphs reuse": (
            "backend/test_inductor.py",
            "test_what_outlives_a_call_is_not_in_memory_that_cuda_graphs_reuse",
        ),
        "an exception poisons nothing": (
            "backend/test_run.py",
            "test_an_exception_inside_a_step_leaves_the_next_run_clean",
        ),
    },
    "3. Full means full": {
        "to the bit": ("backend/test_entry.py", "test_a_full_plan_is_the_unmodified_model_to_the_bit"),
        "in segments too": ("backend/test_capture.py", "test_full_is_the_unmodified_model_to_the_bit"),
        "without a plan, compiled": ("backend/test_entry.py", "test_without_options_difa_is_inductor"),
    },
    "4. Nothing silent": {
        "skips have reasons, strict raises": (
            "backend/test_capture.py",
            "test_records_say_what_became_of_every_decision",
        ),
        "inspect shows them": ("pipeline/test_inspection.py", "test_causal_attention_shows_in_the_records"),
        "the report shows them": ("report/test_view.py", "test_skip_is_listed_once_with_its_reason"),
        "what Dynamo no longer compiles is said": (
            "backend/test_run.py",
            "test_more_batch_sizes_than_dynamo_compiles_are_not_silent",
        ),
        "kernels give reasons": ("ops/test_kernels.py", "test_kernels_give_reasons"),
        "a plan file that changed is said": ("backend/test_entry.py", "test_a_plan_file_that_changed_is_said"),
    },
    "5. Every region proves itself": {
        "not too narrow": ("passes/test_proofs.py", "test_a_region_that_hides_a_write_is_caught"),
        "not too wide": ("passes/test_proofs.py", "test_a_region_that_is_too_wide_is_caught"),
        "shared halves are not mixed": ("passes/test_proofs.py", "test_sharing_that_mixes_the_halves_is_caught"),
        "what fails stays full": ("passes/test_proofs.py", "test_a_site_that_fails_is_left_full_and_says_so"),
        "erased is the region, no more and no less": (
            "passes/rewrite/test_reuse.py",
            "test_writes_in_place_go_with_the_region_and_only_with_it",
        ),
    },
    "6. Plans outlive their run": {
        "other numbers of steps": ("plan/test_plan.py", "test_fifty_steps_onto_other_counts"),
        "other schedulers": ("plan/test_plan.py", "test_resolve_onto_schedulers"),
        "readers without a filler are full": (
            "plan/test_schedule.py",
            "test_promotion_happens_where_the_filler_fell_out_and_only_there",
        ),
        "everything is in the digest": ("plan/test_json_form.py", "test_everything_enters_the_digest"),
        "an edited file is refused": ("plan/test_json_form.py", "test_an_edited_file_is_refused"),
        "another schema is refused": (
            "plan/test_json_form.py",
            "test_other_schema_versions_are_refused_before_anything_else",
        ),
        "a misfit is refused, saying what differs": (
            "plan/test_plan.py",
            "test_a_plan_for_something_else_is_refused_saying_what_differs",
        ),
    },
    "7. CFG both ways": {
        "one call, either order": (
            "backend/test_capture.py",
            "test_every_decision_computes_what_the_model_altered_by_hand_computes",
        ),
        "two calls": ("backend/test_run.py", "test_the_unconditional_call_takes_what_the_conditional_call_computed"),
        "diffusers says which call it is": (
            "pipeline/test_schedule_follower.py",
            "test_guidance_branches_follow_cache_context",
        ),
        "a call nobody named is refused": (
            "backend/test_run_part.py",
            "test_two_unlabelled_calls_of_a_step_are_refused",
        ),
    },
    "8. Switching is free": {
        "no recompiles, no breaks": (
            "backend/test_run.py",
            "test_a_family_follows_its_plan_through_a_schedule_without_recompiling",
        ),
        "compiled once per kind of block and role": (
            "backend/test_capture.py",
            "test_equal_blocks_share_compiled_variants",
        ),
        "weights are static inputs": (
            "backend/test_inductor.py",
            "test_parameters_are_static_inputs_of_every_compiled_graph",
        ),
    },
    "9. References are the specification": {
        "kernels compute the reference": ("plugins/test_flex.py", "test_flex_attention_is_the_reference"),
    },
}


@pytest.mark.parametrize("contract", PINNED)
def test_the_tests_named_here_exist(contract):
    for clause, (file, name) in PINNED[contract].items():
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{clause}: {file}"


# --- 1. One capture, one rewrite pipeline ----------------------------------------------------------------------------


def sources():
    """(name, syntax tree) of every module that a captured graph goes through, and of what drives it."""
    folders = ("passes", "plugins", "difa_compile/ops", "difa_compile/plan", "difa_compile/backend")
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    files += [ROOT / "difa_compile/calibration/search.py", ROOT / "difa_compile/pipeline/inspection.py"]
    return [(str(file.relative_to(ROOT)), ast.parse(file.read_text())) for file in files]


def test_passes_are_put_together_in_one_place():
    """Calibration, the backend and export rewrite through ``rewrite``; nobody has a pipeline of its own."""
    owners = {(each.apply.__module__.rpartition(".")[2], each.name) for each in REWRITES}
    importers = {
        name
        for name, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        if any((node.module.rpartition(".")[2], alias.name) in owners for alias in node.names)
    }
    assert importers == {"passes/order.py"}


def test_no_model_has_code_of_its_own():
    classes = {name for name in dir(diffusers) if re.search(r"Transformer|Pipeline|Attn|Attention", name)}
    assert "FluxTransformer2DModel" in classes
    for name, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                imported = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not any(module.partition(".")[0] == "diffusers" for module in imported), name
            named = getattr(node, "id", getattr(node, "attr", getattr(node, "value", None)))
            assert not (isinstance(named, str) and named in classes), f"{name} names {named}"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["dit", "flux"])
def test_a_variant_goes_through_torch_export(family):
    """What export starts from: the same variants, as functions of inputs and caches and of nothing else."""
    _, _, module, values = captured(family)
    sites = sites_of(module, values)
    window = Window.parse("box:1")
    caches = {}
    for role in (
        Role(FULL, emit_output=True, emit_residual=True, residual_window=window),
        Role(D("window(box:1)+residual+cfg"), emit_output=True),
        Role(REUSE),
    ):
        variant = rewrite(module, sites, [role] * len(sites), Context(0))
        args = (*values, *(caches[name] for name in variant.cache_inputs))
        with torch.no_grad():
            wanted = variant.module(*args)
            found = torch.export.export(variant.module, args).module()(*args)
        assert len(found) == 1 + len(variant.cache_outputs)
        assert all(map(torch.equal, found, wanted))
        caches.update(zip(variant.cache_outputs, wanted[1:], strict=True))


def test_an_exported_graph_is_read_by_the_same_predicates():
    model, inputs, module, _ = captured("sd3")
    exported = torch.export.export(model, (), inputs, strict=False)
    for predicate in (is_attention, is_linear):
        assert sum(map(predicate, exported.graph.nodes)) == sum(map(predicate, module.graph.nodes)) > 0


# --- 2. Variants are pure --------------------------------------------------------------------------------------------


def test_every_cache_of_a_run_is_named_contiguous_and_not_both_read_and_written(monkeypatch):
    model, inputs, _, _ = captured("sd3")
    rows = [FULL, D("window(disc:2)+residual"), REUSE, D("full+cfg"), D("window(disc:2)+residual+cfg"), REUSE]
    mixed = [list(pair) for pair in itertools.pairwise([FULL, *rows])]
    plan = family_plan("sd3", mixed, conditional_half=0)
    calls = []
    row = Capture.compiled_row

    def watched(self, roles):
        def call(args, caches):
            before = {name: cache.clone() for name, cache in caches.items()}
            outputs, written = row(self, roles)(args, caches)
            calls.append((self, dict(caches), before, dict(written)))
            return outputs, written

        return call

    monkeypatch.setattr(Capture, "compiled_row", watched)
    fast = torch.compile(model, backend=difa, options={"plan": plan, "inner": "eager", "strict": True})
    with torch.no_grad(), sampling(fast, len(mixed)) as run:
        for step in range(len(mixed)):
            run.step(step)
            fast(**at_step(inputs, step))
    assert len(calls) == len(mixed)
    for capture, given, before, written in calls:
        for name in written:
            path, _, rest = name.removeprefix("cache.").partition(".attn.")
            assert f"{path}.attn" in {site.path for site in capture.model.sites}, name
            assert re.fullmatch(r"residual|output\.\d+", rest), name
        assert all(value.is_contiguous() for value in written.values())
        assert all(torch.equal(cache, before[name]) for name, cache in given.items()), "written in place"
    kinds = {name.rpartition(".attn.")[2] for *_, written in calls for name in written}
    assert kinds == {"residual", "output.0", "output.1"}


# --- 3. Full means full ----------------------------------------------------------------------------------------------


def test_a_full_plan_is_one_graph_without_segments_or_caches():
    _, inputs, module, values = captured_plain()
    nodes = [(node.op, str(node.target)) for node in module.graph.nodes]
    compiled = []

    def compiler(graph, example_inputs):
        compiled.append([(node.op, str(node.target)) for node in graph.graph.nodes])
        return eager(graph, example_inputs)

    capture = capture_of(module, values, compiler, plan=plain_plan([FULL] * 3))
    for _ in range(3):
        _, written = capture.execute(values, [FULL_ROLE] * len(capture.model.sites), {})
        assert written == {}
    assert compiled == [nodes]
    assert capture.compiled_variants == 0
    assert inputs.keys() == {"x"}


def test_without_a_plan_inductor_gets_the_captured_graph_itself(monkeypatch):
    given, returned = [], []

    def watched(module, example_inputs):
        given.append(module)
        returned.append(functools.partial(module))
        return returned[-1]

    monkeypatch.setattr(compile_fx, "compile_fx", watched)
    captures = []

    def backend(module, example_inputs):
        captures.append(module)
        compiled = difa(module, example_inputs)
        assert compiled is returned[-1]
        return compiled

    model, inputs = plain()
    with torch.no_grad():
        torch.compile(model, backend=backend)(**inputs)
    assert len(given) == len(captures) == 1
    assert given[0] is captures[0]


# --- 4. Nothing silent -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_has_a_record_of_every_decision_and_what_is_recorded_is_what_is_done(family):
    _, _, module, values = captured(family)
    decisions = [FULL, D("window(band:2)+residual"), D("full+cfg"), REUSE]
    capture = capture_of(module, values, eager, plan=family_plan(family, decisions))
    wanted = set(itertools.product((site.path for site in capture.model.sites), map(str, decisions)))
    assert {(record.site, record.decision) for record in capture.verdicts.records} == wanted
    assert len(capture.verdicts.records) == len(wanted)
    assert {record.outcome for record in capture.verdicts.records} == {"full", "rewritten", "skipped"}
    for index, site in enumerate(capture.model.sites):
        for record in (record for record in capture.verdicts.records if record.site == site.path):
            decision = D(record.decision)
            assert bool(record.reason) == (record.outcome == "skipped"), record
            assert capture.verdicts.effective(index, decision) == (FULL if record.outcome == "skipped" else decision), (
                record
            )
    assert all(record.outcome == "skipped" for record in capture.verdicts.records if record.decision == "full+cfg"), (
        "which half of the batch is conditional was not said"
    )


# --- 6. Plans outlive their run --------------------------------------------------------------------------------------


def test_two_plans_for_one_model_are_compiled_apart_and_equal_ones_together():
    model, inputs, _, _ = captured_plain()
    captures = []

    def counted(module, example_inputs, *, options):
        captures.append(options["plan"])
        return difa(module, example_inputs, options=options)

    def sample(plan):
        fast = torch.compile(model, backend=counted, options={"plan": plan, "inner": "eager"})
        with torch.no_grad(), sampling(fast, 2) as run:
            fast(**inputs)
            run.step(1)
            return fast(**at_step(inputs, 1))

    reused, windowed = plain_plan([FULL, REUSE]), plain_plan([FULL, D("window(band:2)")])
    one, two = sample(reused), sample(windowed)
    assert not torch.allclose(one, two, atol=1e-3)
    assert torch.equal(sample(Plan.from_json(reused.to_json())), one)
    assert captures == [reused, windowed]
