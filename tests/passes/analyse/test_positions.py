"""Grids told by positions that meet the tokens, and sequences that hold more than one image.

Layouts are put to the test by windows: a disc on the layout against the same model run eagerly under a mask that is
written out from the tokens' own coordinates. Grids are odd and not square, so that rows taken for columns show.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from difa_compile.backend.entry import difa, eager
from difa_compile.backend.run import sampling
from difa_compile.decision import Decision
from difa_compile.errors import InputValuesError
from difa_compile.layout import Layout
from difa_compile.passes.analyse.positions import grid_of_table, grids_among
from difa_compile.pipeline.compiled_forward import CompiledForward
from difa_compile.pipeline.inspection import inspect_model
from difa_compile.plan.schedule import Role
from tests.support import tiny_models
from tests.support.altered import Altered
from tests.support.captures import capture_of
from tests.support.tiny_models import flux, graph_of, plan_of

TEXT, NOISY, REFERENCE = 3, (3, 5), (2, 4)


def cells(*sizes, image=0):
    """Coordinates of a grid's tokens, row by row, as (image, ...)."""
    return [(image, *(int(i) for i in cell)) for cell in torch.ones(sizes).nonzero()]


def by_hand(places, queries, radius=2):
    """Which keys each query sees: all but tokens of the windowed image, numbered 0, that are not near.

    ``places``: the keys' coordinates, None where no image. ``queries``: which keys the queries are.
    """
    seen = torch.ones(len(places), len(places), dtype=torch.bool)
    for i, one in enumerate(places):
        for j, two in enumerate(places):
            if one and two and one[0] == two[0] == 0:
                seen[i, j] = sum((a - b) ** 2 for a, b in zip(one, two, strict=True)) < radius**2
    return seen[queries]


def assert_windowed_by_hand(model, inputs, layout, places, queries=slice(None)):
    """The layout is found, and a disc on it is a disc on the tokens' own coordinates."""
    module, values = graph_of(model.eval(), inputs)
    capture = capture_of(module, values, eager)
    assert [site.layout for site in capture.model.sites] == [layout], capture.model.sites[0].layout_reason
    found, _ = capture.execute(values, [Role(Decision.parse("window(disc:2)"))], {})
    plain, mask = F.scaled_dot_product_attention, by_hand(places, queries)
    F.scaled_dot_product_attention = lambda q, k, v: plain(q, k, v, attn_mask=mask)
    try:
        with torch.no_grad():
            wanted, full = model(**inputs), module(*values)[0]
    finally:
        F.scaled_dot_product_attention = plain
    torch.testing.assert_close(found[0], wanted, atol=1e-5, rtol=0)
    assert (full - wanted).abs().max() > 1e-3, "the window must change something"


class Rotated(nn.Module):
    """Packed tokens whose queries and keys are multiplied by functions of their positions."""

    def __init__(self, angles):
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(nn.Linear(16, 32) for _ in range(3))
        self.out = nn.Linear(32, 16)
        self.angles = angles

    def forward(self, x, **given):
        q, k, v = (4 * part(x).unflatten(-1, (2, 16)).transpose(1, 2) for part in self.parts)
        turn = self.angles(**given)
        y = F.scaled_dot_product_attention(q * turn, k * turn, v)
        return x + self.out(y.transpose(1, 2).flatten(2))


SEQUENCE = [*[None] * TEXT, *cells(*REFERENCE, image=1), *cells(*NOISY)]
FREQUENCIES = torch.linspace(0.1, 0.5, 16)


def ids():
    """Rows (image, y, x): text in a line, a reference, the noisy image, which is the larger one."""
    rows = [(i, 0, 0) for i in range(TEXT)] + [(9 - place[0], *place[1:]) for place in SEQUENCE if place]
    return torch.tensor(rows)


def by_outer_products(ids):
    return torch.stack([torch.outer(column, FREQUENCIES) for column in ids.float().unbind(-1)]).sum(0).cos()


def by_matrix_products(ids):
    positions = ids.permute(2, 0, 1)[:, :, None].float()  # (3, B, 1, N)
    angles = (FREQUENCIES[None, None, :, None] @ positions).transpose(2, 3)
    turned = angles[0].clone()
    columns = torch.arange(1, 16, 3)
    turned[..., columns] = angles[1][..., columns]
    turned[..., torch.arange(2, 16, 3)] = angles[2][..., torch.arange(2, 16, 3)]
    return turned.cos()[:, None]


def by_columns(ids):
    return by_outer_products(ids.T)


def by_meshes():
    """A mesh per image, as tables of angles one after the other, text at the origin."""
    tables = [torch.zeros(TEXT, 16)]
    for number, sizes in enumerate((REFERENCE, NOISY)):
        mesh = torch.stack(torch.meshgrid(torch.arange(1) + number, *map(torch.arange, sizes), indexing="ij"))
        tables.append(torch.cat([torch.outer(mesh[i].reshape(-1).float(), FREQUENCIES[:8]) for i in (1, 2)], 1))
    return torch.stack([torch.cat(tables)] * 2).cos()[:, None]


@pytest.mark.parametrize(
    ("angles", "given"),
    [
        (by_outer_products, {"ids": ids()}),
        (by_matrix_products, {"ids": ids().repeat(2, 1, 1)}),
        (by_columns, {"ids": ids().T.contiguous()}),
        (by_meshes, {}),
    ],
)
def test_the_noisy_image_is_found_among_text_and_a_reference(angles, given):
    layout = Layout(NOISY, before=TEXT + 8)
    assert_windowed_by_hand(Rotated(angles), {"x": torch.randn(2, len(SEQUENCE), 16), **given}, layout, SEQUENCE)


def table_of(*sizes):
    """Angles (tokens, 16) of a grid: each column by one axis, as rotary embeddings in several dimensions have it."""
    places = torch.ones(sizes).nonzero().float()
    table = torch.cat([torch.outer(column, FREQUENCIES[: 16 // len(sizes)]) for column in places.unbind(1)], 1)
    return F.pad(table, (0, 16 - table.shape[1]))


@pytest.mark.parametrize("sizes", [(3, 5), (2, 3, 5)])
@pytest.mark.parametrize("form", ["real", "complex", "a batch with heads"])
def test_angles_among_the_inputs_tell_the_grid(sizes, form):
    table = table_of(*sizes)
    if form == "complex":
        given = {"table": torch.polar(torch.ones_like(table), table)}
        angles = lambda table: torch.view_as_real(table)[..., 0]  # noqa: E731
    elif form == "real":
        given, angles = {"table": table}, lambda table: table.cos()
    else:
        given, angles = {"table": table.expand(2, 2, *table.shape).contiguous()}, lambda table: table.cos()
    x = torch.randn(2, len(table), 16)
    assert_windowed_by_hand(Rotated(angles), {"x": x, **given}, Layout(sizes), cells(*sizes))


def test_a_rotary_embedding_in_one_dimension_makes_a_line():
    """Numbers that count further than the tokens do, as tables made for the longest input."""

    def angles():
        return torch.outer(torch.arange(64).float(), FREQUENCIES)[:11].cos()

    places = [(0, i) for i in range(11)]
    assert_windowed_by_hand(Rotated(angles), {"x": torch.randn(2, 11, 16)}, Layout((11,)), places)


def test_numbers_along_text_and_image_together_tell_no_line():
    class WithText(Rotated):
        def forward(self, x, text):
            return super().forward(torch.cat([text, x], 1))

    model = WithText(lambda: torch.outer(torch.arange(18).float(), FREQUENCIES).cos())
    module, values = graph_of(model.eval(), {"x": torch.randn(2, 15, 16), "text": torch.randn(2, 3, 16)})
    (site,) = capture_of(module, values, eager).model.sites
    assert site.layout is None
    assert site.layout_reason == "the graph does not show which grid the 15 packed tokens are; give layout="


@pytest.mark.parametrize(
    ("table", "grid"),
    [
        (table_of(3, 5), (3, 5)),
        (table_of(5, 3), (5, 3)),
        (table_of(2, 3, 5), (2, 3, 5)),
        (torch.cat([table_of(3, 5), torch.ones(15, 4)], 1), (3, 5)),  # padding
        (table_of(15), None),  # a line
        (table_of(3, 5).reshape(3, 5, -1).transpose(0, 1).reshape(15, -1), (5, 3)),
        (table_of(3, 5).flip(0), (3, 5)),
        (table_of(3, 5)[torch.randperm(15, generator=torch.Generator().manual_seed(1))], None),
        (table_of(3, 5)[:, :8], None),  # rows alone: columns are not told
        (table_of(3, 5)[:, :8] + table_of(3, 5)[:, 8:], None),
        (torch.zeros(15, 16), None),
        (torch.randn(15, 16, generator=torch.Generator().manual_seed(1)), None),
    ],
)
def test_grids_of_tables(table, grid):
    assert grid_of_table(table) == grid


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        (cells(3, 5), [(1, 3, 5)]),
        ([(0, y, x) for y, x in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]], [(1, 2, 2), 1]),
        ([(i, 0, 0) for i in range(4)] + [(4, *place[1:]) for place in cells(3, 5)], [4, (1, 3, 5)]),
        ([(i, 0, 0) for i in range(4)] + [(3, *place[1:]) for place in cells(3, 5)], [4, (1, 3, 5)]),
        (cells(2, 3, 5), [(2, 3, 5)]),
        (cells(3, 5) + cells(3, 5, image=2), [(2, 3, 5)]),
        (cells(3, 5) + cells(2, 5, image=2), [(1, 3, 5), (1, 2, 5)]),
        (cells(3, 5)[::-1], [15]),
        ([(0, x, y) for _, y, x in cells(3, 5)], [15]),
        ([(0, 0, 0)] * 9, [9]),
    ],
)
def test_grids_among_position_ids(rows, found):
    parts = grids_among(torch.tensor(rows, dtype=torch.float64))
    wanted = [tuple(n for n in each if n > 1) if isinstance(each, tuple) else each for each in found]
    assert [tuple(a.size for a in part.axes) if part.known else part.length for part in parts] == wanted


class Patches(nn.Module):
    """Patches of a sample on a grid of 3 x 5, put into a sequence by ``arrange``; ``keys`` may add to these."""

    def __init__(self, arrange, keys=lambda y: y):
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(3, 16, 2, 2)
        self.parts = nn.ModuleList(nn.Linear(16, 32) for _ in range(3))
        self.out = nn.Linear(32, 16)
        self.arrange, self.keys = arrange, keys

    def forward(self, x, **given):
        y = self.arrange(lambda z: self.patch(z).flatten(2).transpose(1, 2), x, **given)
        q, k, v = (part(y) for part in self.parts)
        q, k, v = (4 * z.unflatten(-1, (2, 16)).transpose(1, 2) for z in (q, self.keys(k), self.keys(v)))
        return y + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


IMAGE = (6, 10)


def test_of_two_equal_images_the_first_is_windowed():
    def decoder_and_encoder(embed, x):
        return torch.cat([embed(x), 2 * embed(x)], 1)

    model, places = Patches(decoder_and_encoder), cells(*NOISY) + cells(*NOISY, image=1)
    assert_windowed_by_hand(model, {"x": torch.randn(2, 3, *IMAGE)}, Layout(NOISY, after=15), places)


def test_images_of_one_sample_in_an_order_of_the_models_own():
    """Several items per sample, of which the model moves the last to the front; each is an image of its own."""

    def rolled(embed, x):
        x = torch.cat([x[:, -1:], x[:, :-1]], 1)
        return embed(x.flatten(0, 1)).unflatten(0, (2, 3)).flatten(1, 2)

    model = Patches(rolled)
    places = [place for image in range(3) for place in cells(*NOISY, image=image)]
    assert_windowed_by_hand(model, {"x": torch.randn(2, 3, 3, *IMAGE)}, Layout(NOISY, after=30), places)


def put_by_copy(embed, x, text, image_places, text_places):
    sequence = x.new_zeros(x.shape[0], 20, 16).index_copy(1, text_places, text)
    return sequence.index_copy(1, image_places, embed(x))


def put_by_writing(embed, x, text, image_places, text_places):
    sequence = x.new_zeros(x.shape[0], 20, 16)
    sequence[:, image_places] = embed(x)
    sequence[:, text_places] = text
    return sequence


@pytest.mark.parametrize("put", [put_by_copy, put_by_writing])
def test_tokens_put_where_indices_say(put):
    indices = {"image_places": torch.arange(3, 18), "text_places": torch.arange(18, 20)}
    inputs = {"x": torch.randn(2, 3, *IMAGE), "text": torch.randn(2, 2, 16), **indices}
    places = [*[None] * 3, *cells(*NOISY), None, None]
    assert_windowed_by_hand(Patches(put), inputs, Layout(NOISY, before=3, after=2), places)


@pytest.mark.parametrize(
    ("put", "name"),
    [(put_by_copy, "image_places"), (put_by_writing, "image_places"), (put_by_writing, "text_places")],
)
def test_tokens_put_out_of_order_are_not_followed(put, name):
    indices = {"image_places": torch.arange(3, 18), "text_places": torch.arange(18, 20)}
    indices[name] = indices[name].flip(0)
    inputs = {"x": torch.randn(2, 3, *IMAGE), "text": torch.randn(2, 2, 16), **indices}
    module, values = graph_of(Patches(put).eval(), inputs)
    (site,) = capture_of(module, values, eager).model.sites
    assert site.layout is None


@pytest.mark.parametrize("after", [0, 2])
def test_keys_with_a_history_before_the_queries(after):
    torch.manual_seed(1)
    history, registers = torch.randn(2, 4, 32), torch.randn(2, after, 16)
    model = Patches(lambda embed, x: torch.cat([embed(x), registers], 1), keys=lambda y: torch.cat([history, y], 1))
    places = [*[None] * 4, *cells(*NOISY), *[None] * after]
    layout = Layout(NOISY, before=4, after=after)
    assert_windowed_by_hand(model, {"x": torch.randn(2, 3, *IMAGE)}, layout, places, queries=slice(4, None))


def test_tokens_of_another_input_say_whose_they_are():
    """Sound beside a video: it hears the video, but its tokens are no part of the noisy sample."""

    class Sound(Patches):
        def forward(self, x, sound):
            return super().forward(x, sound=sound)

    model = Sound(lambda embed, x, sound: sound + embed(x).mean(1, keepdim=True))
    module, values = graph_of(model.eval(), {"x": torch.randn(2, 3, *IMAGE), "sound": torch.randn(2, 7, 16)})
    (site,) = capture_of(module, values, eager).model.sites
    assert site.layout is None
    assert site.layout_reason == "the tokens are those of the input sound, not of the noisy sample; give layout="


@pytest.mark.slow
def test_images_of_another_form_with_as_many_tokens_are_captured_anew():
    """Equal shapes, other position ids: the windows must follow them, and a timestep is no position."""
    model, _ = flux()
    grids = [(4, 6), (6, 4), (3, 8)]
    calls = {grid: flux(grid=grid)[1] for grid in grids}
    decision = Decision.parse("window(disc:2)")
    captures = []

    def backend(module, example_inputs, *, options=None):
        captures.append(module)
        return difa(module, example_inputs, options=options)

    torch._dynamo.reset()
    first = calls[4, 6]
    infos = inspect_model(model, first).site_infos
    plan = plan_of(model, infos, [decision])
    torch._dynamo.reset()
    options = {"plan": plan, "inner": "eager", "resize": "tokens"}
    forward = CompiledForward(model, backend, options)
    paths = [info.path for info in infos]
    with torch.no_grad(), sampling(model, 1):
        for count, grid in [(1, (4, 6)), (2, (6, 4)), (3, (3, 8)), (3, (6, 4)), (3, (4, 6))]:
            inputs = calls[grid] | {"timestep": torch.rand(2)}
            found = forward(**inputs)[0]
            layouts = [Layout(grid, before=tiny_models.TEXT)] * len(paths)
            wanted = Altered(model, paths, layouts, None, None)([decision] * len(paths), inputs)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
            assert len(captures) == count
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="difa", options=options, dynamic=False)
    with torch.no_grad(), sampling(compiled, 1):
        compiled(**first)
        with pytest.raises(InputValuesError, match="positions of the tokens"):
            compiled(**calls[6, 4])
