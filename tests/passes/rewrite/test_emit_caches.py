"""Caches: names and contents; an input or an output of a variant, never both; contiguous; held nowhere else."""

import itertools
import re

import pytest
import torch

from difa_compile.decision import FULL, Decision, Window
from difa_compile.errors import DecisionError
from difa_compile.passes.order import rewrite
from difa_compile.passes.variant import Context
from difa_compile.plan.schedule import Role
from tests.support.printed import changes, graph_text, one_attention, printed
from tests.support.tiny_models import FAMILIES, captured, captured_plain, sites_of

pytest.importorskip("diffusers")

WINDOW = Window("disc", 2)
ROLES = [
    Role(FULL, emit_output=True),
    Role(FULL, emit_output=True, emit_residual=True, residual_window=WINDOW),
    Role(Decision.parse("full+cfg"), emit_output=True, emit_residual=True, residual_window=WINDOW),
    Role(Decision.parse("window(disc:2)"), emit_output=True),
    Role(Decision.parse("window(disc:2)+residual+cfg"), emit_output=True),
    Role(Decision.parse("reuse")),
    Role(Decision.parse("forecast:2+cfg")),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_is_an_input_or_an_output_and_contiguous(family):
    _, _, module, values = captured(family)
    sites = sites_of(module, values)
    caches = {}
    for role in ROLES:
        variant = rewrite(module, sites, [role] * len(sites), Context(1))
        assert not set(variant.cache_inputs) & set(variant.cache_outputs)
        outputs = {f"cache.{s.path}.output.{i}" for s in sites for i in range(len(s.region.outputs))}
        residuals = {f"cache.{site.path}.residual" for site in sites}
        written = (outputs if role.emit_output else set()) | (residuals if role.emit_residual else set())
        assert set(variant.cache_outputs) == written
        reads = outputs if role.reads_output else residuals if role.reads_residual else set()
        if role.decision.order:
            older = {f"{name}.{age}" for name in outputs for age in (1, 2)}
            reads = reads | older | {f"cache.{site.path}.weights" for site in sites}
            caches |= {name: caches[name.rpartition(".")[0]] + 1 for name in older}
            caches |= {name: torch.tensor([3.0, -3.0, 1.0]) for name in reads if name.endswith(".weights")}
        assert set(variant.cache_inputs) == reads
        results = variant.module(*values, *[caches[name] for name in variant.cache_inputs])
        written = results[len(results) - len(variant.cache_outputs) :]
        for name, value in zip(variant.cache_outputs, written, strict=True):
            assert value.is_contiguous(), name
            assert value.shape[0] == 2, name
            caches[name] = value


def test_a_mixed_row_reads_some_and_writes_others():
    _, _, module, values = captured("sd3")
    sites = sites_of(module, values)
    for row in itertools.product((Role(FULL, emit_output=True), Role(Decision.parse("reuse"))), repeat=2):
        variant = rewrite(module, sites, row, Context())
        for site, role in zip(sites, row, strict=True):
            prefix = f"cache.{site.path}."
            reads = [name for name in variant.cache_inputs if name.startswith(prefix)]
            writes = [name for name in variant.cache_outputs if name.startswith(prefix)]
            assert (len(reads), len(writes)) == (
                (0, len(site.region.outputs)) if role.emit_output else (len(site.region.outputs), 0)
            )


def test_running_a_variant_changes_neither_its_inputs_nor_its_caches():
    model, _, module, values = captured_plain(rotate=True)
    sites = sites_of(module, values)
    role = Role(FULL, emit_output=True, emit_residual=True, residual_window=WINDOW)
    variant = rewrite(module, sites, [role] * 2, Context())
    kept = [value.detach().clone() for value in values]
    attributes = {name: sorted(vars(part)) for name, part in model.named_modules()}
    written = variant.module(*values)[1:]
    caches = dict(zip(variant.cache_outputs, written, strict=True))
    before = {name: value.clone() for name, value in caches.items()}
    for text in ("reuse", "window(disc:2)+residual"):
        reader = rewrite(module, sites, [Role(Decision.parse(text))] * 2, Context())
        reader.module(*values, *[caches[name] for name in reader.cache_inputs])
    assert all(torch.equal(one, two) for one, two in zip(kept, values, strict=True))
    assert all(torch.equal(caches[name], value) for name, value in before.items())
    assert {name: sorted(vars(part)) for name, part in model.named_modules()} == attributes


@pytest.mark.parametrize("half", [0, 1])
def test_on_half_a_batch_the_conditional_residual_is_stored_for_both(half):
    _, _, module, values = captured("dit")
    sites = sites_of(module, values)
    stored = {}
    for text in ("full", "full+cfg"):
        role = Role(Decision.parse(text), emit_residual=True, residual_window=WINDOW)
        variant = rewrite(module, sites, [role, Role(FULL)], Context(half))
        (name,) = variant.cache_outputs
        stored[text] = variant.module(*values)[-1]
        assert name == "cache.transformer_blocks.0.attn1.residual"
    own = stored["full"]
    assert not torch.allclose(own[0], own[1], atol=1e-3), "each half has its own"
    torch.testing.assert_close(stored["full+cfg"], own[[half, half]], atol=2e-6, rtol=0)


def test_roles_that_contradict_themselves_are_refused():
    with pytest.raises(DecisionError):
        Role(Decision.parse("reuse"), emit_output=True)
    with pytest.raises(DecisionError):
        Role(Decision.parse("window(disc:2)"), emit_residual=True, residual_window=WINDOW)
    with pytest.raises(DecisionError):
        Role(FULL, emit_residual=True)


# --- the graph before and after --------------------------------------------------------------------------------------


def added(role):
    """What a role that only writes caches adds to a graph."""
    module, sites, _ = one_attention()
    return changes(printed(module), printed(rewrite(module, sites, [role], Context(1)).module))


def test_the_output_is_returned_as_it_leaves_the_region():
    assert added(Role(FULL, emit_output=True)) == graph_text("""
        ...
        + %contiguous = contiguous(%linear_3)  float32 (2, 6, 16)
        ...
        - return (%add)
        + return (%add, %contiguous)
    """)


def test_the_residual_is_what_the_window_leaves_out():
    assert added(Role(FULL, emit_residual=True, residual_window=Window("box", 1))) == graph_text("""
        ...
        + %local = local_attention(%query, %key, %value, [2, 3], 0, 0, 'box', 1, None, None)  float32 (2, 2, 6, 8)
        + %sub = sub(%sdpa, %local)  float32 (2, 2, 6, 8)
        + %contiguous = contiguous(%sub)  float32 (2, 2, 6, 8)
        ...
        - return (%add)
        + return (%add, %contiguous)
    """)


def test_on_half_a_batch_both_caches_are_of_the_whole_one():
    role = Role(Decision.parse("full+cfg"), emit_output=True, emit_residual=True, residual_window=Window("box", 1))
    module, sites, _ = one_attention()
    lines = printed(rewrite(module, sites, [role], Context(1)).module).splitlines()
    assert "\n".join(line for line in lines if re.match(r"%(sub|repeat|contiguous|add)|return", line)) == graph_text("""
        %sub = sub(%sdpa, %local)  float32 (1, 2, 6, 8)
        %repeat_1 = repeat(%sub, 2, 1, 1, 1)  float32 (2, 2, 6, 8)
        %contiguous = contiguous(%repeat_1)  float32 (2, 2, 6, 8)
        %repeat = repeat(%linear_3, 2, 1, 1)  float32 (2, 6, 16), batch 0
        %contiguous_1 = contiguous(%repeat)  float32 (2, 6, 16)
        %add = add(%x, %repeat)  float32 (2, 6, 16), batch 0
        return (%add, %contiguous, %contiguous_1)
    """)
