"""Remove a region whose outputs nobody reads any more.

Stock dead code elimination is no use here: it deletes in-place methods that matter and keeps in-place functions that
do not. This erases nodes of the region only, from the last to the first, as long as nothing outside needs them; a
write in place goes when the value it writes goes.
"""

from __future__ import annotations

from torch import fx

from difa_compile.passes.graph import alias_root, mutated_argument, reaching


def erase_region(interior: tuple[fx.Node, ...]) -> None:
    """Erase the nodes of ``interior`` (in graph order) that nothing outside still uses."""
    inside = set(interior)
    needed = [node for node in interior if any(user not in inside for user in node.users)]
    kept = reaching(needed) & inside
    while True:
        writers = {node for node in interior if mutated_argument(node) is not None and alias_root(node) in kept}
        grown = kept | (reaching(writers) & inside)
        if grown == kept:
            break
        kept = grown
    for node in reversed(interior):
        if node not in kept and not node.users:
            node.graph.erase_node(node)
