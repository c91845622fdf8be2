"""Graphs as text that a test can hold: a node a line, as in traces, without long names and lines for weights."""

import difflib
import re
import textwrap
from functools import cache

import torch

from difa_compile.layout import Layout
from difa_compile.passes.trace import written
from tests.support.tiny_models import BareAttention, graph_of, sites_of


def printed(module):
    """A graph, a node a line; a weight is ``q.weight``, an input ``%x``, softmax attention ``sdpa``."""
    lines = [written(node) for node in module.graph.nodes if not is_weight(node)]
    return "\n".join(shortened(line) for line in lines)


def is_weight(node):
    return node.op == "placeholder" and isinstance(node.meta.get("example_value"), torch.nn.Parameter)


def shortened(line):
    line = re.sub(r"\$(\w+\.[\w.]+)", r"\1", line)
    line = line.replace("$", "%")
    line = line.replace("scaled_dot_product_attention", "sdpa").replace("local_attention_default", "local")
    return re.sub(r" {2,}", "  ", line)


def changes(before, after):
    """What is other in ``after``: the lines that are gone, with a minus, and those that have come, with a plus.

    Three dots stand for lines that both have.
    """
    told = []
    for line in difflib.ndiff(before.splitlines(), after.splitlines()):
        if line.startswith(("- ", "+ ")):
            told.append(line)
        elif line.startswith("  ") and told[-1:] != ["..."]:
            told.append("...")
    return "\n".join(told)


def graph_text(told):
    """A text of a test without what indents it."""
    return textwrap.dedent(told).strip()


@cache
def one_attention():
    """(graph, its sites, real values of its inputs) of one attention on 2 x 3 tokens; shared, so not to be changed."""
    torch.manual_seed(0)
    module, values = graph_of(BareAttention().eval(), {"x": torch.randn(2, 6, 16)})
    return module, sites_of(module, values, layout=Layout((2, 3))), values
