"""Captures of graphs that are at hand."""

from difa_compile.backend.capture import Capture
from difa_compile.passes.order import analyse
from difa_compile.passes.variant import Context


def capture_of(module, values, compiler, *, layout=None, conditional_half=None, two_call=False, **options):
    """What the backend makes of a graph and its real inputs."""
    return Capture(analyse(module, values, Context(conditional_half, two_call), layout=layout), compiler, **options)
