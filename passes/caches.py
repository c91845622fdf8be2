"""Names of caches: what a graph reads of earlier steps and writes for later ones."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Literal, TypeVar

from difa_compile.decision import MAX_ORDER, heads_text

T = TypeVar("T")

CacheKind = Literal["output", "residual", "weights", "heads", "heads_residual"]


class CacheName(str):
    """The name of a cache: ``cache.<site>.output.<number>``, ``cache.<site>.output.<number>.<age>`` or
    ``cache.<site>.residual``; of some heads alone, ``cache.<site>.heads.<heads>`` or
    ``cache.<site>.heads_residual.<heads>``; and of what goes with them, ``cache.<site>.weights``.

    A string, so it can stand wherever names do; built here and taken apart here, nowhere else. The *output* is what
    left a region (its ``number``-th value), the newest one or, with an ``age`` of 1, 2, ..., that of the computed step
    before, and so on; the *residual* is full minus window attention. Of *heads* it is the attention's own output,
    before the output projection, and has no age: no head is forecast. The *weights* of a forecast are numbers of the
    run, one per output that it reads, the newest first: no graph writes them.
    """

    __slots__ = ()

    @classmethod
    def output(cls, site: str, number: int, age: int = 0) -> CacheName:
        """The cache of the ``number``-th value that leaves the region of a site (its module path)."""
        return cls(f"cache.{site}.output.{number}" + (f".{age}" if age else ""))

    @classmethod
    def residual(cls, site: str) -> CacheName:
        """The cache of ``full - window`` at a site (its module path)."""
        return cls(f"cache.{site}.residual")

    @classmethod
    def weights(cls, site: str) -> CacheName:
        """The weights by which a site (its module path) is forecast."""
        return cls(f"cache.{site}.weights")

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
        if self.endswith(".weights"):
            return "weights"
        name = self.rpartition(".")[0]
        if name.endswith(".heads"):
            return "heads"
        return "heads_residual" if name.endswith(".heads_residual") else "output"

    @property
    def site(self) -> str:
        """The module path of the site."""
        path = self.removeprefix("cache.")
        if self.kind in ("residual", "weights"):
            return path.removesuffix(f".{self.kind}")
        return path.rpartition(f".{self.kind}.")[0]

    @property
    def number(self) -> int:
        """Which of the region's outputs it holds; 0 for what is no output."""
        return self._output[0]

    @property
    def age(self) -> int:
        """How many steps that computed the output came after it: 0 for the newest, and for what is no output."""
        return self._output[1]

    @property
    def _output(self) -> tuple[int, int]:
        if self.kind != "output":
            return 0, 0
        number, _, age = self.rpartition(".output.")[2].partition(".")
        return int(number), int(age or 0)

    def older(self) -> CacheName:
        """The name that an output has once the next one is computed."""
        return CacheName.output(self.site, self.number, self.age + 1)

    def at(self, site: str) -> CacheName:
        """The cache of the same kind, number, age and heads at another site."""
        if self.kind == "output":
            return CacheName.output(site, self.number, self.age)
        if self.of_heads:
            return CacheName(f"cache.{site}.{self.kind}.{self.rpartition('.')[2]}")
        return CacheName.residual(site) if self.kind == "residual" else CacheName.weights(site)


def renew(caches: MutableMapping[CacheName, T], written: Mapping[CacheName, T]) -> None:
    """Add what a step has written. Outputs that were the newest become older, by name alone: nothing is copied. What
    is no output, of single heads too, takes the place of what was held."""
    for name, value in written.items():
        if name.kind == "output":
            held, older = caches.get(name), name.older()
            while held is not None and older.age <= MAX_ORDER:
                caches[older], held, older = held, caches.get(older), older.older()
        caches[name] = value
