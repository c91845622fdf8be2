"""What local attention refuses to read: through the public op and through ``difa::local_attention_cpu``."""

import itertools

import pytest
import torch

from difa_compile.decision import MAX_RADIUS, Decision, Window
from difa_compile.errors import DecisionError, DifaError, LayoutError, OperandError
from difa_compile.layout import Layout
from difa_compile.ops import gradient, reference
from difa_compile.ops.kernels import LocalCall
from difa_compile.ops.local_attention import local_attention
from difa_compile.ops.pairs import visible_pairs
from difa_compile.plugins import cpu, token_order
from difa_compile.plugins.geometry import Geometry
from difa_compile.plugins.triton.tiling import choose

LAYOUT, WINDOW = Layout((3, 4), 2, 1), Window("box", 1)
REFUSED = (RuntimeError, ValueError)  # the C++ op's
EDGES = (-(2**63), -1, 0, 1, 2, 4096, 2**24, 2**24 + 1, 2**31, 2**32, 2**62, 2**63 - 1)


def operands(**changes):
    made = {name: torch.randn(2, 4, 15, 8) for name in ("query", "key", "value")}
    return made | changes


def freed():
    tensor = torch.randn(2, 4, 15, 8)
    tensor.untyped_storage().resize_(16)
    return tensor


def others(like):
    """What stands for ``like`` and is not to be read as it, by what it is."""
    jagged = torch.nested.nested_tensor([torch.randn(4, 15, 8)] * 2)
    return {
        "bfloat16": like.bfloat16(),
        "float64": like.double(),
        "int32": like.int(),
        "complex64": like.to(torch.complex64),
        "float8_e4m3fn": like.to(torch.float8_e4m3fn),
        "meta": like.to("meta"),
        "sparse": like.to_sparse(),
        "mkldnn": like.to_mkldnn(),
        "nested": jagged,
        "quint8": torch.quantize_per_tensor(like, 0.1, 0, torch.quint8),
        "three dimensions": like[0],
        "five dimensions": like[None],
        "fewer tokens": like[:, :, :-1],
        "other channels": like[..., :4],
        "another batch": like[:1],
        "other heads": like[:, :3],
        "no heads": like[:, :0],
        "freed": freed(),
    }


ALLOWED = [("value", "other channels"), ("query", "no heads")]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pair
        for pair in itertools.product(("query", "key", "value"), others(torch.zeros(2, 4, 15, 8)))
        if pair not in ALLOWED
    ],
)
def test_an_operand_that_does_not_go_with_the_others_is_refused(name, kind):
    given = operands(**{name: others(torch.randn(2, 4, 15, 8))[kind]})
    with pytest.raises((OperandError, LayoutError, NotImplementedError)):
        local_attention(**given, layout=LAYOUT, window=WINDOW)
    assert cpu.why_not_built() is None
    with pytest.raises(REFUSED):
        bare(**given)


def bare(
    query, key, value, mask=None, grid=(3, 4), before=2, after=1, pooled=0, radius=1, scale=0.3, tile=0, disc=False
):
    where = (list(grid), before, after, pooled, disc, radius, scale)
    return torch.ops.difa.local_attention_cpu(query, key, value, *where, mask, tile)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(15, 15, dtype=torch.int64),
        torch.ones(15, 15, dtype=torch.complex64),
        torch.ones(15, 15, device="meta"),
        torch.ones(15, 15).to_sparse(),
        torch.ones(14, 15),
        torch.ones(15, 1, 15),
        torch.ones(1, 2, 4, 15, 15),
        torch.ones(0, 15),
    ],
    ids=lambda mask: f"{mask.dtype} {tuple(mask.shape)} {mask.layout} {mask.device}",
)
def test_a_mask_that_does_not_go_with_the_operands_is_refused(mask):
    with pytest.raises(OperandError, match="mask"):
        local_attention(**operands(), layout=LAYOUT, window=WINDOW, mask=mask)
    assert cpu.why_not_built() is None
    with pytest.raises(REFUSED):
        bare(**operands(), mask=mask)


@pytest.mark.parametrize("mask", [torch.bool, torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_masks_of_every_dtype_serve_every_dtype(dtype, mask):
    given = {name: x.to(dtype) for name, x in operands().items()}
    seen = (torch.rand(1, 1, 15, 15) > 0.3).to(mask)
    found = local_attention(**given, layout=LAYOUT, window=WINDOW, mask=seen)
    wanted = reference.local_attention(
        *(x.double() for x in given.values()), LAYOUT, WINDOW, None, seen if mask == torch.bool else seen.double()
    )
    torch.testing.assert_close(found.double(), wanted, atol=2e-2 if dtype.itemsize == 2 else 1e-5, rtol=0)


def test_what_the_dtypes_are_is_found_when_a_graph_is_made():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        given = {name: mode.from_tensor(x) for name, x in operands(value=torch.randn(2, 4, 15, 8).bfloat16()).items()}
        with pytest.raises(OperandError, match=r"the value is torch\.bfloat16, the query torch\.float32; cast them"):
            local_attention(**given, layout=LAYOUT, window=WINDOW)


def test_views_that_arithmetic_reads_otherwise_than_memory_are_read_as_arithmetic_does():
    given = operands()
    whole = torch.randn(2, 4, 15, 8, dtype=torch.complex64)
    given["key"] = whole.conj().imag  # lies in memory with the other sign
    assert given["key"].is_neg()
    wanted = local_attention(**(given | {"key": given["key"].resolve_neg()}), layout=LAYOUT, window=WINDOW)
    assert torch.equal(local_attention(**given, layout=LAYOUT, window=WINDOW), wanted)
    assert cpu.why_not_built() is None
    torch.testing.assert_close(bare(**given, scale=8**-0.5), wanted)


def test_empty_operands_give_empty_outputs_and_heads_without_channels_the_mean():
    for batch, heads, channels in ((0, 4, 8), (2, 0, 8), (2, 4, 0)):
        query = torch.randn(batch, heads, 15, 8)
        value = torch.randn(batch, heads, 15, channels)
        assert local_attention(query, query, value, LAYOUT, WINDOW).shape == (batch, heads, 15, channels)
    for dtype in (torch.float32, torch.bfloat16):
        query, value = torch.empty(2, 4, 15, 0, dtype=dtype), torch.randn(2, 4, 15, 8, dtype=dtype)
        found = local_attention(query, query, value, LAYOUT, WINDOW)
        wanted = reference.attention(query, query, value, reference.visible(LAYOUT, WINDOW))
        torch.testing.assert_close(found, wanted)


def test_the_bare_op_has_no_gradient_and_says_so():
    assert cpu.why_not_built() is None
    given = operands(key=torch.randn(2, 4, 15, 8, requires_grad=True))
    with pytest.raises(REFUSED, match=r"the key requires a gradient.*call difa::local_attention"):
        bare(**given)
    with torch.no_grad():
        assert bare(**given).isfinite().all()


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_a_scale_that_is_no_number_is_refused(scale):
    with pytest.raises(OperandError, match="give a finite number"):
        local_attention(**operands(), layout=LAYOUT, window=WINDOW, scale=scale)
    assert cpu.why_not_built() is None
    with pytest.raises(REFUSED, match="the scale must be"):
        bare(**operands(), scale=scale)


def test_every_number_of_the_schemas_is_in_bounds_or_refused():
    """Each in turn takes numbers from the edges of 64 bits; what is taken gives what its definition says."""
    given = operands()
    numbers = {"grid": [3, 4], "before": 2, "after": 1, "pooled": 0, "radius": 1}
    assert cpu.why_not_built() is None
    for name, edge, disc in itertools.product([*numbers, "height"], EDGES, [False, True]):
        given_sizes = {"grid": [edge], "height": [edge, 4]}
        asked = numbers | ({"grid": given_sizes[name]} if name in given_sizes else {name: edge})
        window = ("disc" if disc else "box", asked["radius"])
        try:
            where = Layout(tuple(asked["grid"]), asked["before"], asked["after"])
            fits = where.tokens + asked["pooled"] == 15 and asked["pooled"] >= 0
            wanted = reference.local_attention(*given.values(), where, Window(*window), 0.3) if fits else None
        except DifaError:
            wanted = None
        public = (asked["grid"], asked["before"], asked["after"], *window, 0.3, None, asked["pooled"])
        if wanted is None:
            with pytest.raises((LayoutError, DecisionError)):
                torch.ops.difa.local_attention(*given.values(), *public)
            with pytest.raises(REFUSED):
                bare(**given, **asked, disc=disc)
        else:
            torch.testing.assert_close(torch.ops.difa.local_attention(*given.values(), *public), wanted)
            torch.testing.assert_close(bare(**given, **asked, disc=disc), wanted)
        work = torch.ops.difa.local_attention_cpu_work
        where = (asked["grid"], asked["before"], asked["after"], asked["pooled"], 15, disc, asked["radius"])
        if wanted is None:
            with pytest.raises(REFUSED):
                work(*where[:4], -1, *where[5:], torch.float32)
        else:
            assert work(*where, torch.float32)[2] >= 15


def test_other_numbers_of_queries_tiles_and_heads_are_refused_by_the_bare_op():
    assert cpu.why_not_built() is None
    whole = torch.randn(1, 1, 12, 8)
    with pytest.raises(REFUSED, match="the queries are neither"):  # with nothing before the image
        bare(whole[:, :, :7], whole, whole, before=0, after=0)
    with pytest.raises(REFUSED, match="a tile has 16, 32 or 64"):
        bare(whole, whole, whole, before=0, after=0, tile=7)
    wide = torch.randn(1, 1, 12, 1).expand(1, 1, 12, 2**33)
    for given in ((wide, wide, whole), (whole, whole, wide[..., :1025])):
        with pytest.raises(REFUSED, match="must be 1 to 1024"):
            bare(*given, before=0, after=0)


@pytest.mark.parametrize("shape", ["band", "disc", "box"])
@pytest.mark.parametrize("radius", [2**31, 2**62, MAX_RADIUS])
def test_a_window_over_everything_is_full_attention_everywhere(shape, radius):
    window = Decision.parse(f"window({shape}:{radius})").window
    given = [x.double().requires_grad_() for x in operands().values()]
    full = reference.attention(*given)
    torch.testing.assert_close(local_attention(*given, LAYOUT, window), full)
    upstream = torch.randn_like(full)
    found = torch.autograd.grad(local_attention(*given, LAYOUT, window), given, upstream)
    for one, two in zip(found, torch.autograd.grad(full, given, upstream), strict=True):
        torch.testing.assert_close(one, two)
    narrow = [x.detach().float() for x in given]
    torch.testing.assert_close(local_attention(*narrow, LAYOUT, window), full.float(), atol=1e-5, rtol=0)
    assert visible_pairs(LAYOUT, window, 15) == 225
    geometry = Geometry.of(LAYOUT, window)
    assert (geometry.sizes, geometry.rank, geometry.disc) == ((1, 1, 12), 1, False)
    assert 11 <= geometry.reach <= 12
    assert token_order.best(LAYOUT, window, 15) == token_order.best(LAYOUT, Window("box", 9), 15)
    call = LocalCall(LAYOUT, window, None, (2, 4, 15, 8), torch.float32, torch.device("cpu"))
    assert cpu.why_not(call) is None
    assert cpu.work(call) == cpu.work(LocalCall(LAYOUT, Window("box", 9), None, *(call.shape, call.dtype, call.device)))
    assert sum(len(queries) for queries, _ in gradient.pieces(LAYOUT, call.window, 15, 0, call.device)) == 15
    assert window.scaled((3, 4), (300, 400)).radius <= MAX_RADIUS


@pytest.mark.parametrize("radius", [MAX_RADIUS + 1, 10**5000, -(10**5000)], ids=["a little", "far", "below"])
def test_a_radius_beyond_64_bits_is_refused(radius):
    with pytest.raises(DecisionError, match="radius"):
        Window("band", radius)


def test_digits_without_end_are_a_radius_beyond_64_bits():
    with pytest.raises(DecisionError, match="at most 2\\^63 - 1"):
        Window.parse("disc:" + "9" * 6000)
    assert Window.parse("disc:" + "0" * 6000 + "8") == Window("disc", 8)


@pytest.mark.parametrize("sizes", [(2**31,), (2**16, 2**16), (2**63,), (2**40, 2**40, 2**40)])
def test_sequences_whose_pairs_do_not_fit_are_refused(sizes):
    with pytest.raises(LayoutError, match=r"over 2\^31 - 1 tokens"):
        Layout(sizes)
    with pytest.raises(LayoutError, match=r"over 2\^31 - 1 tokens"):
        Layout((1,), 2**31 - 1)


def test_counting_takes_no_time_that_grows_with_the_radius():
    """Under a plain count each of these is minutes to forever."""
    for grid in ((2**29, 2), (2, 2**29), (2**15, 2**15), (2**10, 2**10, 2**10 + 1)):
        for radius in (2**20, 2**31, MAX_RADIUS):
            for shape in ("band", "disc", "box"):
                layout = Layout(grid)
                pairs = visible_pairs(layout, Window(shape, radius), layout.tokens)
                assert layout.tokens <= pairs <= layout.tokens**2
    choose(Geometry.of(Layout((2**22, 4)), Window("box", 2**21)), 64, 64)
    assert cpu.why_not_built() is None
    for grid, disc in itertools.product(([2**23, 2], [2**12, 2**12], [2**8] * 3), (False, True)):
        torch.ops.difa.local_attention_cpu_work(grid, 0, 0, 0, 2**24, disc, 2**11, torch.float32)


@pytest.mark.parametrize("form", ["disc:3", "box:2", "box:40", "disc:7"])
@pytest.mark.parametrize("grid", [(37,), (9, 14), (1, 33), (20, 1), (3, 5, 6)])
def test_the_work_of_the_cpu_kernel_is_that_of_a_walk_over_its_tiles(grid, form):
    """No more than every tile seeing every key, no less than the pairs; and by symmetry the same on a turned grid."""
    layout, window = Layout(grid, 2, 1), Window.parse(form)
    call = LocalCall(layout, window, None, (1, 1, layout.tokens, 16), torch.float32, torch.device("cpu"))
    assert cpu.why_not(call) is None
    pairs, keys = cpu.work(call)
    tile, tiles, _ = torch.ops.difa.local_attention_cpu_work(
        cpu.grid(call), 2, 1, 0, layout.tokens, form.startswith("disc"), call.window.radius, torch.float32
    )
    assert visible_pairs(layout, window, layout.tokens) <= pairs == tile * keys
    assert keys <= tiles * layout.tokens
