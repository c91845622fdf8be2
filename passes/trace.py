"""Write the graph after every pass, so that one can read what each has done.

A folder holds one folder per captured graph, ``capture-00``, with a file per pass, ``03-specialize.txt``, and one
folder per variant that was made of it, ``variant-02-blocks.3``, likewise. A file lists the graph, a node a line, with
the shape and dtype of its value and what analyses have noted on it. A line that a pass has made or changed bears its
name::

    %add_1 = add(%mul, $blocks.0.norm.weight)   float32 (2, 24, 32), batch 0
    %local_attention_default = local_attention(%q, %k, %v, [4, 6], 0, 0, 'band', 2, None, None)
                                        float32 (2, 4, 24, 8)                        << window

Nodes that are gone are listed at the end of the file of the pass that took them out.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import fx

from difa_compile.errors import OutputError
from difa_compile.files.writing import check_writable, write_whole
from difa_compile.passes.graph import clean_path, is_parameter, op_name, source_name, tensor_of

_lock = threading.Lock()


class Trace:
    """The trace of one captured graph, or of one variant: files are written to ``folder``, which is made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stages = 0
        self._variants = 0
        self._lines: dict[str, str] = {}
        self._marks: dict[str, str] = {}

    @classmethod
    def begin(cls, folder: str | Path) -> Trace:
        """The trace of a captured graph, in a new folder inside ``folder``. Raises :class:`OutputError`."""
        return cls(_numbered(check_writable(folder), "capture"))

    def variant(self, name: str) -> Trace:
        """The trace of a variant that is made of this graph; its marks are of its own passes alone."""
        with _lock:
            number, self._variants = self._variants, self._variants + 1
        return Trace(self.folder / f"variant-{number:02}-{_plain(name)}")

    def after(
        self, name: str, module: fx.GraphModule, title: str = "", notes: Mapping[fx.Node, str] | None = None
    ) -> None:
        """Write the graph as it is after pass ``name``. ``title``: what the file begins with. ``notes``: on nodes.

        The first graph of a trace bears no marks. Raises :class:`OutputError`.
        """
        first = not self._lines
        lines: dict[str, str] = {}
        for node in module.graph.nodes:
            text = written(node, (notes or {}).get(node, ""))
            lines[node.name] = text
            if not first and self._lines.get(node.name) != text:
                self._marks[node.name] = name
        gone = [text for node, text in self._lines.items() if node not in lines]
        self._lines = lines
        width = min(100, max(map(len, lines.values()), default=0))
        given = {node.name for node in module.graph.nodes if node.op == "placeholder" and is_parameter(node)}
        marked = {n: f"{text:<{width}}  << {self._marks[n]}" if n in self._marks else text for n, text in lines.items()}
        head = [f"# {name}", *(f"# {line}" for line in title.splitlines())]
        blocks = [head, [text for n, text in marked.items() if n not in given]]
        if given:
            blocks.append([f"# {len(given)} parameters and buffers", *(marked[n] for n in marked if n in given)])
        if gone:
            blocks.append([f"# {len(gone)} nodes that are gone", *(f"- {text}" for text in gone)])
        path = self.folder / f"{self._stages:02}-{_plain(name)}.txt"
        self._stages += 1
        write_whole(path, "\n\n".join("\n".join(block) for block in blocks) + "\n", "the trace")


def written(node: fx.Node, note: str = "") -> str:
    """A node as a line of text: its name, what it calls on what, what its value is, what is noted on it.

    An input is called as in the model: ``$hidden_states``, ``$transformer_blocks.0.attn1.to_q.weight``.
    """
    if node.op == "placeholder":
        text = f"{_name(node)} = input {node.meta.get('argument', '')}".rstrip()
    elif node.op == "output":
        text = f"return {_argument(node.args[0])}"
    elif node.op == "get_attr":
        text = f"%{node.name} = {node.target}"
    else:
        given = [_argument(each) for each in node.args]
        given += [f"{key}={_argument(each)}" for key, each in node.kwargs.items()]
        text = f"%{node.name} = {op_name(node)}({', '.join(given)})"
    facts = []
    value = tensor_of(node)
    if value is not None:
        facts.append(f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}")
    if "batch_dim" in node.meta:
        facts.append(f"batch {node.meta['batch_dim']}")
    if "difa_cache" in node.meta:
        facts.append(str(node.meta["difa_cache"]))
    return "   ".join([text, ", ".join([*facts, *([note] if note else [])])]).rstrip()


def _name(node: fx.Node) -> str:
    """What a node is called: an input as in the model, any other as in the graph."""
    source = source_name(node) if node.op == "placeholder" else ""
    path = re.sub(r"\b_(parameters|buffers)\.", "", clean_path(source))
    return f"${path}" if path else f"%{node.name}"


def _argument(value: object) -> str:
    if isinstance(value, fx.Node):
        return _name(value)
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(_argument, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if isinstance(value, slice):
        return ":".join("" if each is None else _argument(each) for each in (value.start, value.stop, value.step))
    return repr(value) if not isinstance(value, torch.dtype) else str(value).removeprefix("torch.")


def _plain(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^\w.+-]+", "_", name)[:80] or "graph"


def _numbered(folder: Path, name: str) -> Path:
    """A new folder ``name-NN`` inside ``folder``, the first number that is free."""
    for number in range(10_000):
        path = folder / f"{name}-{number:02}"
        try:
            path.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise OutputError(f"the trace cannot be written to {folder}: {error}") from error
        return path
    raise OutputError(f"{folder} holds 10000 traces; remove some, or name another folder")
