"""Calls with numbers from the edges of their dtypes, and what any kernel must make of them. As a program: those of the
Triton kernel, in Triton's interpreter, which has to be switched on before triton is imported."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from difa_compile.decision import Window
from difa_compile.layout import Layout
from difa_compile.ops import reference

UNIT = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
PAYLOAD = {  # NaNs with bits that arithmetic on exponents, shifts and carries would lose, as integers
    torch.float32: (torch.int32, [0x7FC00000, 0x7FC01234, 0x7FFFFFFF, 0x7F800001, -0x400000, -1]),
    torch.bfloat16: (torch.int16, [0x7FC0, 0x7FC3, 0x7FFF, 0x7F81, -64, -1]),
    torch.float16: (torch.int16, [0x7E00, 0x7E33, 0x7FFF, 0x7C01, -512, -1]),
}
EXPONENTS = {torch.float32: (-38, 38), torch.bfloat16: (-38, 38), torch.float16: (-7, 4)}
LAYOUT = Layout((5, 6), 2, 1)


@dataclass(frozen=True)
class Extreme:
    """``powers`` of ten that query, key and value are of. ``mask``: None, "bool", "infinite" (-inf hides), "lowest"
    (the lowest number does), "large" (up to the largest). ``poison``: a NaN's number in ``PAYLOAD``, put ``into`` an
    operand."""

    window: str
    dtype: torch.dtype
    powers: tuple[float, float, float]
    scale: float | None = None
    mask: str | None = None
    poison: int = 0
    into: str | None = None
    layout: Layout = LAYOUT
    dim: int = 8
    seed: int = 0

    def operands(self) -> tuple[torch.Tensor, ...]:
        """Query, key, value (1, 2, tokens, dim) and mask."""
        generator = torch.Generator().manual_seed(self.seed)
        tokens, most = self.layout.tokens, torch.finfo(self.dtype).max
        made = []
        for power in self.powers:
            numbers = torch.randn(1, 2, tokens, self.dim, generator=generator, dtype=torch.float64) * 10.0**power
            made.append(numbers.clamp(-most, most).to(self.dtype))
        hidden = torch.rand(1, 1, tokens, tokens, generator=generator) < 0.3
        mask = None
        if self.mask == "bool":
            mask = ~hidden
        elif self.mask is not None:
            least = float("-inf") if self.mask == "infinite" else torch.finfo(self.dtype).min
            size = most * 0.9 if self.mask == "large" else 1.0
            mask = torch.rand(1, 1, tokens, tokens, generator=generator, dtype=torch.float64).mul(size).to(self.dtype)
            mask = mask.masked_fill(hidden, least)
        if self.into is not None:
            bits, numbers = PAYLOAD[self.dtype]
            at = int(torch.randint(tokens, (), generator=generator))
            operand = dict(zip(("query", "key", "value", "mask"), (*made, mask), strict=True))[self.into]
            nan = torch.tensor(numbers[self.poison], dtype=bits).view(self.dtype)
            (operand[..., at, :] if self.into != "mask" else operand[..., at]).view(bits).fill_(nan.view(bits))
        return (*made, mask)


def extremes(dtypes=tuple(UNIT)):
    """All of them: every dtype's range, every form of window and mask, every NaN."""

    def of(dtype):
        power = st.one_of(st.floats(*EXPONENTS[dtype]), st.sampled_from([0.0, 0.0, 4.5, *EXPONENTS[dtype]]))
        power = power.map(lambda x: min(x, EXPONENTS[dtype][1]))
        masks = st.sampled_from([None, None, "bool", "infinite", "lowest", "large"])
        poisons = st.sampled_from([None, None, "query", "key", "value", "mask"])
        return st.builds(
            lambda mask, into, **rest: Extreme(
                mask=mask, into=None if into == "mask" and mask in (None, "bool") else into, **rest
            ),
            window=st.sampled_from(["band:3", "disc:2", "box:1", "disc:40", f"box:{2**62}"]),
            dtype=st.just(dtype),
            powers=st.tuples(power, power, power),
            scale=st.sampled_from([None, None, 1.0, -0.5, 0.0, 1e-40]),
            mask=masks,
            into=poisons,
            poison=st.integers(0, 5),
            seed=st.integers(0, 10**6),
        )

    return st.sampled_from(dtypes).flatmap(of)


def assert_right(found: torch.Tensor, case: Extreme) -> None:
    """NaN for the queries that see one. Where no operand is NaN and SDPA's output is finite, a finite one, and the
    exact one within what float32's rounding of the scores, the dtype's of the output and lost subnormals explain.

    Scores that a sum of their terms' sizes takes over float32's largest number before they are scaled are left out: it
    depends on the order of the terms whether they are infinite, in SDPA too.
    """
    query, key, value, mask = case.operands()
    window = Window.parse(case.window)
    near = reference.visible(case.layout, window)
    assert found.dtype == case.dtype
    assert found.shape == query.shape
    if case.into is not None:
        if case.into == "mask":
            spoilt = (near & mask.isnan()).any(-1)
        else:
            bad = {"query": query, "key": key, "value": value}[case.into].isnan().any(-1)  # (1, 2, tokens)
            seen = near if mask is None else near & (mask if mask.dtype == torch.bool else mask != float("-inf"))
            spoilt = bad & seen.any(-1) if case.into == "query" else (seen & bad[:, :, None, :]).any(-1)
        lost = spoilt[..., None] & ~found.isnan()
        assert spoilt.any()
        assert not lost.any(), f"{int(lost.sum())} numbers should be NaN"
        return
    bias = torch.zeros(near.shape).masked_fill(~near, float("-inf"))
    if mask is not None:
        bias = bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask.float()
    same = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(torch.float32), scale=case.scale)
    terms = (query.double().abs() @ key.double().abs().mT).masked_fill(~near, 0)
    finite = same.isfinite() & (terms.amax(-1, keepdim=True) < torch.finfo(torch.float32).max)
    assert found[finite].isfinite().all(), f"{int((~found[finite].isfinite()).sum())} are not finite where SDPA is"
    q, k, v = (x.double() for x in (query, key, value))
    wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
    exact = reference.local_attention(q, k, v, case.layout, window, case.scale, wide)
    scale = abs(reference.default_scale(case.dim) if case.scale is None else case.scale)
    tiny = 2.0**-126
    sizes = terms.amax(-1) * 2.0**-23 * (case.dim + 4)
    lost = tiny * case.dim * (q.abs().amax() + k.abs().amax() + 1)  # subnormals that processors take for 0
    added = torch.zeros(1, 1, 1)
    if mask is not None and mask.dtype != torch.bool:
        added = mask.double().abs().nan_to_num(0, 0, 0).amax(-1)
    logits = (sizes + lost) * scale + (added + sizes) * 2.0**-23
    weights = torch.expm1((2 * logits).clamp(max=2.0)).clamp(max=2.0)[..., None]
    bound = v.abs().amax() * (2 * UNIT[case.dtype] + weights + 64 * 2.0**-23) + 4 * case.layout.tokens * tiny
    bound = bound + (2.0**-24 if case.dtype == torch.float16 else 0)
    wrong = finite & ((found.double() - exact).abs() > bound)
    assert not wrong.any(), f"{int(wrong.sum())} are off: {found[wrong][:3].tolist()} for {exact[wrong][:3].tolist()}"


FEW = [
    Extreme("disc:2", torch.float32, (4.5, 4.5, 0.0)),
    Extreme("box:1", torch.float32, (7.0, 9.0, 0.0), mask="infinite"),
    Extreme("band:3", torch.float32, (0.0, 0.0, 30.0), mask="lowest"),
    Extreme("disc:2", torch.bfloat16, (6.0, 8.0, 0.0), mask="bool"),
    Extreme("disc:2", torch.float16, (2.0, 2.0, 4.0)),
    Extreme("disc:2", torch.float32, (0.0, 0.0, 0.0), into="key", poison=1),
    Extreme("box:1", torch.bfloat16, (0.0, 0.0, 0.0), into="query", poison=2),
    Extreme(f"disc:{2**62}", torch.float32, (-38.0, -38.0, -30.0)),
]


def main() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    from difa_compile.plugins.triton.configs import Config
    from difa_compile.plugins.triton.local_attention import attend

    for case in FEW:
        query, key, value, mask = case.operands()
        config = Config(16, 16, 4, 1)
        found = attend(query, key, value, case.layout, Window.parse(case.window), case.scale, mask, config=config)
        assert_right(found, case)
    print("done")


if __name__ == "__main__":
    main()
