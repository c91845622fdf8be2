"""Names of caches: what a graph reads of earlier steps and writes for later ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from difa_compile.decision import heads_text

CacheKind = Literal["output", "residual", "heads", "heads_residual"]


class CacheName(str):
    """The name of a cache: ``cache.<site>.output.<number>`` or ``cache.<site>.residual``, or, of some heads alone,
    ``cache.<site>.heads.<heads>`` or ``cache.<site>.heads_residual.<heads>``.

    A string, so it can stand wherever names do; built here and taken apart here, nowhere else. The *output* is what
    left a region (its ``number``-th value), the *residual* is full minus window attention. Of *heads* it is the
    attention's own output, before the output projection.
    """

    __slots__ = ()

    @classmethod
    def output(cls, site: str, number: int) -> CacheName:
        """The cache of the ``number``-th value that leaves the region of a site (its module path)."""
        return cls(f"cache.{site}.output.{number}")

    @classmethod
    def residual(cls, site: str) -> CacheName:
        """The cache of ``full - window`` at a site (its module path)."""
        return cls(f"cache.{site}.residual")

    @classmethod
    def heads(cls, site: str, heads: Sequence[int], *, residual: bool) -> CacheName:
        """The cache of the attention output of some heads (rising) of a site, or of their ``full - window``."""
        return cls(f"cache.{site}.{'heads_residual' if residual else 'heads'}.{heads_text(heads)}")

    @property
    def of_heads(self) -> bool:
        """Whether it holds single heads of a site."""
        return self.kind in ("heads", "heads_residual")

    @property
    def kind(self) -> CacheKind:
        if self.endswith(".residual"):
            return "residual"
        name = self.rpartition(".")[0]
        return (
            "heads" if name.endswith(".heads") else "heads_residual" if name.endswith(".heads_residual") else "output"
        )

    @property
    def site(self) -> str:
        """The module path of the site."""
        path = self.removeprefix("cache.")
        if self.of_heads:
            return path.rpartition(f".{self.kind}.")[0]
        return path.removesuffix(".residual") if self.kind == "residual" else path.rpartition(".output.")[0]

    @property
    def number(self) -> int:
        """Which of the region's outputs it holds; 0 for a residual, and of heads."""
        return 0 if self.kind != "output" else int(self.rpartition(".")[2])

    def at(self, site: str) -> CacheName:
        """The cache of the same kind and number at another site."""
        if self.of_heads:
            return CacheName(f"cache.{site}.{self.kind}.{self.rpartition('.')[2]}")
        return CacheName.residual(site) if self.kind == "residual" else CacheName.output(site, self.number)
