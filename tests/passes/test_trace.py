"""Traces: a file per pass with the graph as it was then, what the pass changed marked, what it took out at the end."""

import re

import pytest
import torch

from difa_compile.backend.capture import Capture
from difa_compile.backend.entry import eager
from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.errors import OutputError
from difa_compile.passes.order import analyse, rewrite
from difa_compile.passes.trace import Trace, written
from difa_compile.passes.variant import Context, start_variant
from difa_compile.plan.schedule import FULL_ROLE, Role
from tests.support.printed import one_attention
from tests.support.tiny_models import BareAttention, captured_plain, graph_of

ROLE = Role(Decision.parse("window(box:1)+cfg"), emit_output=True)


def files(folder):
    return [path.name for path in sorted(folder.iterdir()) if path.is_file()]


def marks(file):
    """The names of marked nodes, by the pass that they are marked with."""
    found = {}
    for name, by in re.findall(r"^%(\w+) .* << (\w+)$", file.read_text(), re.MULTILINE):
        found.setdefault(by, []).append(name)
    return found


def test_analysing_writes_a_file_per_pass(tmp_path):
    torch.manual_seed(0)
    module, values = graph_of(BareAttention().eval(), {"x": torch.randn(2, 6, 16)})
    analyse(module, values, Context(0), trace=Trace.begin(tmp_path))
    folder = tmp_path / "capture-00"
    assert files(folder) == [
        "00-captured.txt",
        "01-name_arguments.txt",
        "02-answer_questions.txt",
        "03-specialize.txt",
        "04-canonicalise.txt",
        "05-find_sample.txt",
        "06-follow_batch.txt",
        "07-find_sites.txt",
        "08-hold_positions.txt",
        "09-find_blocks.txt",
        "10-cut_segments.txt",
        "11-prove_regions.txt",
    ]
    assert marks(folder / "00-captured.txt") == {}, "nothing has changed anything yet"
    assert (folder / "05-find_sample.txt").read_text().count("the noisy sample") == 1
    batched = marks(folder / "06-follow_batch.txt")["follow_batch"]
    assert {"query", "key", "value", "add"} <= set(batched)
    sites = (folder / "07-find_sites.txt").read_text()
    assert sites.startswith("# find_sites\n# attention: self, the graph does not show which grid")
    assert re.search(
        r"^%scaled_dot_product_attention = .*, batch 0, attention of attention +<< find_sites$", sites, re.M
    )
    assert re.search(r"^%linear_3 = .*, output of attention +<< find_sites$", sites, re.M)
    assert "segment 0: " in (folder / "10-cut_segments.txt").read_text()


def test_rewriting_marks_what_each_pass_made_and_lists_what_it_took_out(tmp_path):
    module, sites, _ = one_attention()
    trace = Trace.begin(tmp_path).variant("attention")
    rewrite(module, sites, [ROLE], Context(0), trace=trace)
    assert files(trace.folder) == [
        "00-before.txt",
        "01-reuse.txt",
        "02-forecast.txt",
        "03-share_cfg.txt",
        "04-window.txt",
        "05-heads.txt",
        "06-emit_caches.txt",
    ]
    assert (
        (trace.folder / "00-before.txt")
        .read_text()
        .startswith("# before\n# attention: window(box:1)+cfg >output\n\n$x = input   float32 (2, 6, 16), batch 0\n")
    )
    assert marks(trace.folder / "01-reuse.txt") == {}
    shared = marks(trace.folder / "03-share_cfg.txt")["share_cfg"]
    assert {"narrow", "linear", "query", "scaled_dot_product_attention", "repeat", "add"} <= set(shared)
    window = trace.folder / "04-window.txt"
    assert marks(window)["window"] == ["local_attention_default", "transpose_3"]
    assert "scaled_dot_product_attention" not in marks(window)["share_cfg"]
    assert window.read_text().endswith(
        "# 1 nodes that are gone\n"
        "- %scaled_dot_product_attention = scaled_dot_product_attention(%query, %key, %value)"
        "   float32 (1, 2, 6, 8), batch 0\n"
    )
    last = trace.folder / "06-emit_caches.txt"
    assert marks(last)["emit_caches"] == ["contiguous"]
    assert marks(last)["window"] == ["local_attention_default", "transpose_3"], "marks stay"
    assert "gone" not in last.read_text(), "what went before is not told again"


def test_captures_and_variants_are_numbered(tmp_path):
    _, _, module, values = captured_plain()
    for number in range(2):
        trace = Trace.begin(tmp_path)
        assert trace.folder.name == f"capture-{number:02}"
    capture = Capture(analyse(module, values, Context(0)), eager, trace=trace)
    emitting = [Role(FULL, emit_output=True), FULL_ROLE]
    _, caches = capture.execute(values, emitting, {})
    capture.execute(values, [Role(REUSE), FULL_ROLE], caches)
    capture.execute(values, [Role(REUSE), FULL_ROLE], caches)
    assert [path.name for path in sorted((tmp_path / "capture-01").iterdir())] == [
        "variant-00-between",
        "variant-01-layers.0.attention",
        "variant-02-layers.1.attention",
        "variant-03-between",
        "variant-04-layers.0.attention",
    ]
    reused = tmp_path / "capture-01" / "variant-04-layers.0.attention" / "01-reuse.txt"
    assert "cache.layers.0.attention.output.0" in reused.read_text()
    assert re.search(r"^# \d+ nodes that are gone$", reused.read_text(), re.MULTILINE)


def test_what_is_traced_computes_the_same(tmp_path):
    module, sites, values = one_attention()
    traced = rewrite(module, sites, [ROLE], Context(0), trace=Trace.begin(tmp_path))
    assert torch.equal(traced.module(*values)[0], rewrite(module, sites, [ROLE], Context(0)).module(*values)[0])


def test_names_of_modules_become_names_of_files(tmp_path):
    trace = Trace(tmp_path).variant("../blocks[3] 'x'")
    assert trace.folder.parent == tmp_path
    assert trace.folder.name == "variant-00-.._blocks_3_x_"
    assert Trace(tmp_path).variant("").folder.name == "variant-00-graph"


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        Trace.begin(tmp_path / "file" / "traces")
    with pytest.raises(OutputError, match="cannot be written"):
        Trace.begin("/proc/difa")
    module, _, _ = one_attention()
    with pytest.raises(OutputError, match=r"the trace cannot be written to .*00-before"):
        Trace(tmp_path / "file").after("before", module)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda x: x[:, 1:, ::2], "getitem($x, (::, 1::, ::2))"),
        (lambda x: x.to(torch.bfloat16), "to($x, bfloat16)"),
        (lambda x: torch.cat([x, x], dim=1), "cat([$x, $x], dim=1)"),
        (lambda x: x.split((1, 3), 1)[0], "split($x, (1, 3), 1)"),
    ],
)
def test_arguments_are_written_as_they_are_read(call, line):
    module, _ = graph_of(call, {}, args=(torch.randn(2, 4, 6),))
    found = [written(node) for node in module.graph.nodes]
    assert any(text.partition(" = ")[2].partition("   ")[0] == line for text in found), found


def test_a_note_stands_behind_what_the_graph_says():
    module, sites, _ = one_attention()
    variant = start_variant(module, sites, [FULL_ROLE])
    (attention,) = (target.attention for target in variant.targets)
    assert written(attention, "mine").endswith("   float32 (2, 2, 6, 8), batch 0, mine")
