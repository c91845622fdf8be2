"""Join compiled segments to one Python function per row of a plan, written out as source.

A row of a plan always runs the same variants on the same values, so what there is to decide is decided once and the
function is a list of calls, for instance::

    def row(args, caches):
        v0, v1 = args[0], args[1]
        v70, v71 = segment_0(v0, v1)
        v72, c0 = segment_1(v70, v1, caches['cache.blocks.0.attn.output.0'])
        del v70
        return [v72], {'cache.blocks.0.attn.residual': c0}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from difa_compile.passes.segments import Split

Row = Callable[[Sequence[Any], Mapping[str, Tensor]], tuple[list[Any], dict[str, Tensor]]]
"""A function of the graph's inputs and the caches read, giving its outputs and the caches written."""


@dataclass(frozen=True)
class Link:
    """What runs a segment in a row: a compiled function and the names of the caches it reads and writes, in order."""

    run: Callable[..., Any]
    reads: tuple[str, ...]
    writes: tuple[str, ...]


def stitch(split: Split, links: Sequence[Link]) -> Row:
    """The function that runs ``links``, one per segment of ``split``, one after the other."""
    source = source_of(split, links)
    space: dict[str, Any] = {f"segment_{i}": link.run for i, link in enumerate(links)}
    exec(compile(source, "<difa row>", "exec"), space)
    row: Row = space["row"]
    return row


def source_of(split: Split, links: Sequence[Link]) -> str:
    """The source of :func:`stitch`'s function."""
    made = {number for segment in split.segments for number in segment.outputs}
    wanted = [number for segment in split.segments for number in segment.inputs]
    wanted += [number for number in split.results if number is not None]
    given = sorted({number for number in wanted if number not in made})
    lines = [f"v{number} = args[{number}]" for number in given]
    written: dict[str, str] = {}
    for i, (segment, link) in enumerate(zip(split.segments, links, strict=True)):
        arguments = [f"v{number}" for number in segment.inputs] + [f"caches[{name!r}]" for name in link.reads]
        fresh = [f"c{len(written) + k}" for k in range(len(link.writes))]
        written |= dict(zip(link.writes, fresh, strict=True))
        targets = [f"v{number}" for number in segment.outputs] + fresh
        call = f"segment_{i}({', '.join(arguments)})"
        lines.append(f"{', '.join(targets)}, = {call}" if targets else call)
        if segment.last_use:
            lines.append(f"del {', '.join(f'v{number}' for number in segment.last_use)}")
    results = ", ".join("None" if number is None else f"v{number}" for number in split.results)
    caches = ", ".join(f"{name!r}: {value}" for name, value in written.items())
    lines.append(f"return [{results}], {{{caches}}}")
    return "\n    ".join(["def row(args, caches):", *lines]) + "\n"
