"""Join compiled segments to one Python function per row of a plan, written out as source.

A row of a plan always runs the same variants on the same values, so what there is to decide is decided once and the
function is a list of calls, for instance (``name_0`` being ``cache.blocks.0.attn.residual``)::

    def row(args, caches):
        v0, v1 = args[0], args[1]
        v70, v71 = segment_0(v0, v1)
        v72, c0 = segment_1(v70, v1, caches['cache.blocks.0.attn.output.0'])
        del v70
        return [v72], {name_0: c0}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from difa_compile.passes.caches import CacheName
from difa_compile.passes.segments import Split

CompiledRow = Callable[[Sequence[Any], Mapping[CacheName, Tensor]], tuple[list[Any], dict[CacheName, Tensor]]]
"""A function of the graph's inputs and the caches read, giving its outputs and the caches written."""


@dataclass(frozen=True)
class Link:
    """What runs a segment in a row: a compiled function, the values (by number) that it is given, and the names of the
    caches that it reads and writes, in order. Without a function the values are handed on."""

    run: Callable[..., Any] | None
    inputs: tuple[int, ...]
    reads: tuple[CacheName, ...]
    writes: tuple[CacheName, ...]


def stitch(split: Split, links: Sequence[Link | None], overwrites: bool = False) -> CompiledRow:
    """The function that runs ``links``, one per segment of ``split``, one after the other; None for those left out.

    ``overwrites``: links return memory that is overwritten in the next call of the model (CUDA graphs), so each call is
    marked as a step of its own, and outputs are copied out of it.
    """
    source = source_of(split, links, overwrites)
    space: dict[str, Any] = {f"segment_{i}": link.run for i, link in enumerate(links) if link is not None}
    names = dict.fromkeys(name for link in links if link is not None for name in link.writes)
    space |= {f"name_{i}": name for i, name in enumerate(names)}
    space |= {"copied": copied, "begin_step": torch.compiler.cudagraph_mark_step_begin}
    exec(compile(source, "<difa row>", "exec"), space)
    row: CompiledRow = space["row"]
    return row


def copied(value: Any) -> Any:
    """A tensor in memory of its own; anything else as it is."""
    return value.clone() if isinstance(value, Tensor) else value


def source_of(split: Split, links: Sequence[Link | None], overwrites: bool = False) -> str:
    """The source of :func:`stitch`'s function."""
    made = {number for segment in split.segments for number in segment.outputs}
    wanted = [number for link in links if link is not None for number in link.inputs]
    wanted += [number for number in split.results if number is not None]
    given = sorted({number for number in wanted if number not in made})
    lines = ["begin_step()"] if overwrites else []
    lines += [f"v{number} = args[{number}]" for number in given]
    written: dict[CacheName, str] = {}
    run = [(i, segment, link) for i, (segment, link) in enumerate(zip(split.segments, links, strict=True)) if link]
    last_use = {number: i for i, segment, link in run for number in (*segment.outputs, *link.inputs)}
    for i, segment, link in run:
        arguments = [f"v{number}" for number in link.inputs] + [f"caches[{str(name)!r}]" for name in link.reads]
        fresh = [f"c{len(written) + k}" for k in range(len(link.writes))]
        written |= dict(zip(link.writes, fresh, strict=True))
        targets = [f"v{number}" for number in segment.outputs] + fresh
        call = f"segment_{i}({', '.join(arguments)})"
        if link.run is None:
            lines += [f"{to} = {of}" for to, of in zip(targets, arguments, strict=True)]
        else:
            lines.append(f"{', '.join(targets)}, = {call}" if targets else call)
        here = dict.fromkeys((*link.inputs, *segment.outputs))
        gone = [n for n in here if last_use[n] == i and n in made and n not in split.results]
        if gone:
            lines.append(f"del {', '.join(f'v{number}' for number in gone)}")
    result = "copied(v{})" if overwrites else "v{}"
    results = ", ".join("None" if number is None else result.format(number) for number in split.results)
    caches = ", ".join(f"name_{i}: {value}" for i, value in enumerate(written.values()))
    lines.append(f"return [{results}], {{{caches}}}")
    return "\n    ".join(["def row(args, caches):", *lines]) + "\n"
