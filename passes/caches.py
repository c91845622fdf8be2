"""Names of caches: what a graph reads of earlier steps and writes for later ones."""

from __future__ import annotations

from typing import Literal

CacheKind = Literal["output", "residual"]


class CacheName(str):
    """The name of a cache: ``cache.<site>.output.<number>`` or ``cache.<site>.residual``.

    A string, so it can stand wherever names do; built here and taken apart here, nowhere else. The *output* is what
    left a region (its ``number``-th value), the *residual* is full minus window attention.
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

    @property
    def kind(self) -> CacheKind:
        return "residual" if self.endswith(".residual") else "output"

    @property
    def site(self) -> str:
        """The module path of the site."""
        path = self.removeprefix("cache.")
        return path.removesuffix(".residual") if self.kind == "residual" else path.rpartition(".output.")[0]

    @property
    def number(self) -> int:
        """Which of the region's outputs it holds; 0 for a residual."""
        return 0 if self.kind == "residual" else int(self.rpartition(".")[2])

    def at(self, site: str) -> CacheName:
        """The cache of the same kind and number at another site."""
        return CacheName.residual(site) if self.kind == "residual" else CacheName.output(site, self.number)
