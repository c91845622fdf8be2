"""The Triton kernel of local attention: one source for just-in-time launches and for cubins made ahead of time.

A program owns a patch of queries on the token grid (or a run of text queries) of one head. It visits

1. the *others*: every token that is not of the image, and pooled keys if there are any, as one run;
2. the *window*: patches of keys, laid from the corner of the rectangle that the window of the whole query patch spans,
   row of patches by row of patches. A disc narrows each row to the reach it has left there. A patch whose every key is
   seen by every query of the tile takes no mask;
3. with ``WITH_FULL``, the *rest*: all image keys outside the window, after the output so far was stored. Attention to
   the rest, merged by the online softmax into attention to the window, is full attention, so one set of accumulators
   gives both outputs.

``MASK`` composes each of these with a mask of the model's own, read where it lies by its strides. A row that then sees
nothing gives 0.

Text queries see all tokens: for them the run of part 1 is the whole sequence, and parts 2 and 3 are empty.

Tokens stay row-major in memory; a patch is gathered by computed addresses. Coordinates inside masks are relative to
the query patch and held in float32, where whole numbers and their sums of squares are exact below 2^24; keys outside
the grid are infinitely far and so fall out of every window.

The grid has three axes throughout, (frames, height, width). ``RANK`` says how many are in use, and the unused leading
ones have size 1, so that a video, an image and a sequence share this source without paying for each other.
"""

# Compile-time arguments are in capitals. Returns after `else` and unmerged branches: constants prune them.
# ruff: noqa: N803, RET505, SIM114

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _reach(radius, used, DISC: tl.constexpr):
    """How far a window reaches along one axis, ``used`` being the squared distance along the axes before.

    For a disc the whole part of a square root; whole numbers mend what the hardware's approximate one may be off.
    """
    if DISC:
        left = tl.maximum(radius * radius - 1 - used, 0)
        root = tl.sqrt(left.to(tl.float32)).to(tl.int32)
        root = tl.where(root * root > left, root - 1, root)
        return tl.where((root + 1) * (root + 1) <= left, root + 1, root)
    else:
        return radius


@triton.jit
def _used(first, end, corner, last, SIZE: tl.constexpr, DISC: tl.constexpr):
    """Squared distance, along one axis, between keys [first, first + SIZE) below ``end`` and queries [corner, last].

    0 for a box, where no axis narrows another.
    """
    if DISC:
        gap = tl.maximum(tl.maximum(corner - tl.minimum(first + SIZE, end) + 1, first - last), 0)
        return gap * gap
    else:
        return 0


@triton.jit
def _first(query_first, reach):
    return tl.maximum(query_first - reach, 0)


@triton.jit
def _end(query_last, reach, size):
    return tl.minimum(query_last + reach + 1, size)


@triton.jit
def _product(one, two, acc, DOT: tl.constexpr):
    """acc + one @ two in float32.

    ``DOT`` is an input precision of ``tl.dot``, or "emulated" for Triton's interpreter, which knows no products of
    bfloat16; in float32 those are exact, as they are in a tensor core.
    """
    if DOT == "emulated":
        return tl.dot(one.to(tl.float32), two.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(one, two, acc, input_precision=DOT)


@triton.jit
def _scores(query, key, DOT: tl.constexpr):
    return _product(query, tl.trans(key), tl.zeros([query.shape[0], key.shape[0]], dtype=tl.float32), DOT)


@triton.jit
def _attend(acc, total, top, scores, value_ptrs, value_mask, scale, MASK: tl.constexpr, DOT: tl.constexpr):
    """One step of the online softmax. ``scores`` (M, N) are -inf where hidden; ``scale`` is in log2.

    Scores are unscaled, but under an "added" mask scaled and in natural units. The maximum is taken off before anything
    is multiplied: the largest score's difference is then 0 however large it is, the lowest number that masks hold
    included.
    """
    above = tl.maximum(top, tl.max(scores, 1))
    if MASK == "added":
        weights = tl.exp2((scores - above[:, None]) * 1.4426950408889634)
        fade = tl.exp2((top - above) * 1.4426950408889634)
    else:
        weights = tl.exp2((scores - above[:, None]) * scale)
        fade = tl.exp2((top - above) * scale)
    total = total * fade + tl.sum(weights, 1)
    acc = acc * fade[:, None]
    value = tl.load(value_ptrs, mask=value_mask, other=0.0)
    acc = _product(weights.to(value.dtype), value, acc, DOT)
    return acc, total, above


@triton.jit
def _masked(
    scores,
    mask_rows,
    mask_key,
    token,
    query_there,
    there,
    scale,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    """``scores`` (M, N) under the model's own mask; as they are without one.

    ``mask_rows``: where the mask's rows begin, (M), or with no ``MASK_ROWS``, the same for all queries, one. ``token``
    (N): the keys.
    """
    if MASK != "none":
        column = token.to(tl.int64) * mask_key
        if MASK_ROWS:
            mask = tl.load(mask_rows[:, None] + column[None, :], mask=query_there[:, None] & there[None, :], other=0)
        else:
            mask = tl.load(mask_rows + column, mask=there, other=0)[None, :]
        if MASK == "bool":
            scores = tl.where(mask != 0, scores, float("-inf"))
        else:
            scores = scores * (scale * 0.6931471805599453) + mask.to(tl.float32)
    return scores


@triton.jit
def _divided(acc, total, MASK: tl.constexpr):
    """acc (M, N) / total (M), 0 for a row that saw nothing, which takes a mask.

    By a reciprocal per row: quotients of each element would need registers of their own.
    """
    if MASK != "none":
        total = tl.where(total == 0.0, 1.0, total)
    return acc * (1.0 / total)[:, None]


@triton.jit
def _inside(
    query_t, query_y, query_x, key_t, key_y, key_x, there, radius, RANK: tl.constexpr, DISC: tl.constexpr
):  # fmt: skip
    """Which keys (N) each query (M) sees: bool (M, N), from float coordinates relative to the query patch.

    Keys that are not ``there`` (N) are infinitely far.
    """
    if DISC:
        # |key - query|^2 < r^2 as  |key|^2 - 2 query . key < r^2 - |query|^2: one multiply-add per axis and pair.
        far = key_y * key_y + key_x * key_x
        bound = radius * radius - query_y * query_y - query_x * query_x
        if RANK == 3:
            far += key_t * key_t
            bound -= query_t * query_t
        far = tl.where(there, far, float("inf"))
        far = far[None, :] - (2.0 * query_x)[:, None] * key_x[None, :]
        far = far - (2.0 * query_y)[:, None] * key_y[None, :]
        if RANK == 3:
            far = far - (2.0 * query_t)[:, None] * key_t[None, :]
        seen = far < bound[:, None]
    else:
        key_x = tl.where(there, key_x, float("inf"))
        seen = tl.abs(key_x[None, :] - query_x[:, None]) <= radius
        if RANK >= 2:
            seen = seen & (tl.abs(key_y[None, :] - query_y[:, None]) <= radius)
        if RANK == 3:
            seen = seen & (tl.abs(key_t[None, :] - query_t[:, None]) <= radius)
    return seen


@triton.jit
def _limited(
    scores,
    cut,
    query_t,
    query_y,
    query_x,
    key_t,
    key_y,
    key_x,
    there,
    radius,
    OUTSIDE: tl.constexpr,
    RANK: tl.constexpr,
    DISC: tl.constexpr,
    ADD_MASK: tl.constexpr,
):
    """``scores`` (M, N), -inf for keys not in the window, or with ``OUTSIDE`` for those in it; as is unless ``cut``.

    ``ADD_MASK`` adds a mask that is 0 unless ``cut``: before Hopper, Triton finds that two products are chained, and
    keeps the weights in registers between them, only if no branch stands on the way.
    """
    if ADD_MASK:
        mask = tl.zeros_like(scores)
        if cut:
            seen = _inside(query_t, query_y, query_x, key_t, key_y, key_x, there, radius, RANK, DISC)
            if OUTSIDE:
                seen = (seen ^ True) & there[None, :]
            mask = tl.where(seen, 0.0, float("-inf"))
        scores += mask
    elif cut:
        seen = _inside(query_t, query_y, query_x, key_t, key_y, key_x, there, radius, RANK, DISC)
        if OUTSIDE:
            seen = (seen ^ True) & there[None, :]
        scores = tl.where(seen, scores, float("-inf"))
    return scores


@triton.jit
def local_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    full_ptr,
    mask_ptr,
    scale,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    out_batch,
    out_head,
    out_token,
    full_batch,
    full_head,
    full_token,
    mask_batch,
    mask_head,
    mask_query,
    mask_key,
    batch,
    heads,
    group,
    frames,
    height,
    width,
    before,
    others,
    pooled,
    text_before,
    text_queries,
    radius,
    slabs,
    rows,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    RANK: tl.constexpr,
    DISC: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    PATCH_T: tl.constexpr,
    PATCH_Y: tl.constexpr,
    PATCH_X: tl.constexpr,
    ROWS: tl.constexpr,
    WITH_FULL: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WIDE: tl.constexpr,
    ADD_MASK: tl.constexpr,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    DOT: tl.constexpr,
):
    """Local attention of all heads; programs = batch * heads * (tiles of text queries + tiles of the grid).

    q (B, H, Q, D), k (B, H / group, S, D), v (B, H / group, S, DV), out and full (B, H, Q, DV), given by the strides of
    batch, head and token; the last axis is contiguous. Keys: ``before`` others, the image of frames * height * width,
    ``others - before`` others, ``pooled`` keys that only image queries see. Queries: ``text_before`` of
    text, the image's, ``text_queries - text_before`` of text. ``scale`` > 0 has log2(e) in it.

    ``slabs`` x ``rows`` bounds how many rows of key patches a tile visits, at most ``ROWS``. ``WIDE``: offsets inside a
    patch need 64 bits. ``full``: full attention, stored with ``WITH_FULL``; ``RESIDUAL`` then turns ``out`` into
    full - out.

    ``MASK``: "none", "bool" (bytes, 0 = hidden) or "added" (floating point), given for (B, H, Q, S) by strides that are
    0 where it broadcasts; without ``MASK_ROWS`` it is the same for all queries. What is "none" takes no argument.
    """
    BLOCK_M: tl.constexpr = TILE_T * TILE_Y * TILE_X
    BLOCK_N: tl.constexpr = PATCH_T * PATCH_Y * PATCH_X
    image = frames * height * width

    # Text tiles first: a text query sees every token, so they run longest.
    text_tiles = tl.cdiv(text_queries, BLOCK_M)
    tiles_y = tl.cdiv(height, TILE_Y)
    tiles_x = tl.cdiv(width, TILE_X)
    image_tiles = tl.cdiv(frames, TILE_T) * tiles_y * tiles_x
    program = tl.program_id(0)
    text_programs = text_tiles * batch * heads
    is_text = program < text_programs
    program = tl.where(is_text, program, program - text_programs)
    tiles = tl.where(is_text, text_tiles, image_tiles)
    tile = program % tiles
    head = (program // tiles) % heads
    element = program // (tiles * heads)

    # The tile's corner and, inside it, its last query on each axis.
    spot = tl.where(is_text, 0, tile)
    corner_x = (spot % tiles_x) * TILE_X
    corner_y = ((spot // tiles_x) % tiles_y) * TILE_Y
    corner_t = (spot // (tiles_x * tiles_y)) * TILE_T
    last_x = tl.minimum(corner_x + TILE_X, width) - 1
    last_y = tl.minimum(corner_y + TILE_Y, height) - 1
    last_t = tl.minimum(corner_t + TILE_T, frames) - 1

    m = tl.arange(0, BLOCK_M)
    m_x = m % TILE_X
    m_y = (m // TILE_X) % TILE_Y
    m_t = m // (TILE_X * TILE_Y)
    text = tile * BLOCK_M + m
    text_token = text + tl.where(text >= text_before, image, 0)
    image_token = ((corner_t + m_t) * height + corner_y + m_y) * width + corner_x + m_x + text_before
    in_grid = (m_x <= last_x - corner_x) & (m_y <= last_y - corner_y) & (m_t <= last_t - corner_t)
    query_token = tl.where(is_text, text_token, image_token).to(tl.int64)
    query_there = tl.where(is_text, text < text_queries, in_grid)
    query_x, query_y, query_t = m_x.to(tl.float32), m_y.to(tl.float32), m_t.to(tl.float32)

    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    q_ptr += element.to(tl.int64) * q_batch + head.to(tl.int64) * q_head
    k_ptr += element.to(tl.int64) * k_batch + (head // group).to(tl.int64) * k_head
    v_ptr += element.to(tl.int64) * v_batch + (head // group).to(tl.int64) * v_head
    out_ptr += element.to(tl.int64) * out_batch + head.to(tl.int64) * out_head
    full_ptr += element.to(tl.int64) * full_batch + head.to(tl.int64) * full_head
    out_mask = query_there[:, None]
    q_mask = query_there[:, None]
    if BLOCK_D != D:
        q_mask = q_mask & (d < D)[None, :]
    if BLOCK_DV != DV:
        out_mask = out_mask & (dv < DV)[None, :]
    query = tl.load(q_ptr + query_token[:, None] * q_token + d[None, :], mask=q_mask, other=0.0)

    mask_rows = mask_ptr
    if MASK != "none":
        mask_rows += element.to(tl.int64) * mask_batch + head.to(tl.int64) * mask_head
        if MASK_ROWS:
            mask_rows += query_token * mask_query

    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    # The lowest number, not -inf, so that a row with nothing yet gives no NaN.
    top = tl.full([BLOCK_M], -3.4028234663852886e38, dtype=tl.float32)

    # 1. The others, in one run; for text queries the whole sequence.
    n = tl.arange(0, BLOCK_N)
    run = tl.where(is_text, image + others, others + pooled)
    jump = tl.where(is_text, 0, image)
    for start in range(0, run, BLOCK_N):
        index = start + n
        there = index < run
        token = (index + tl.where(index >= before, jump, 0)).to(tl.int64)
        k_mask = there[:, None]
        v_mask = there[:, None]
        if BLOCK_D != D:
            k_mask = k_mask & (d < D)[None, :]
        if BLOCK_DV != DV:
            v_mask = v_mask & (dv < DV)[None, :]
        key = tl.load(k_ptr + token[:, None] * k_token + d[None, :], mask=k_mask, other=0.0)
        scores = _scores(query, key, DOT)
        scores = _masked(scores, mask_rows, mask_key, token, query_there, there, scale, MASK, MASK_ROWS)
        if ADD_MASK:
            scores = tl.where(there[None, :], scores, float("-inf"))
        elif start + BLOCK_N > run:
            scores = tl.where(there[None, :], scores, float("-inf"))
        values = v_ptr + token[:, None] * v_token + dv[None, :]
        acc, total, top = _attend(acc, total, top, scores, values, v_mask, scale, MASK, DOT)

    # 2. The window. How many patches: closed form for a box, a sum over the rows of patches for a disc.
    reach = _reach(radius, 0, DISC)
    t_first, t_end = _first(corner_t, reach), _end(last_t, reach, frames)
    row_reach = _reach(radius, _used(t_first, t_end, corner_t, last_t, PATCH_T, DISC), DISC)
    y_first, y_end = _first(corner_y, row_reach), _end(last_y, row_reach, height)
    if DISC:
        r = tl.arange(0, ROWS)
        r_t = t_first + (r // rows) * PATCH_T
        used = _used(r_t, t_end, corner_t, last_t, PATCH_T, DISC)
        r_reach = _reach(radius, used, DISC)
        r_end = _end(last_y, r_reach, height)
        r_y = _first(corner_y, r_reach) + (r % rows) * PATCH_Y
        used += _used(r_y, r_end, corner_y, last_y, PATCH_Y, DISC)
        r_reach = _reach(radius, used, DISC)
        across = tl.cdiv(_end(last_x, r_reach, width) - _first(corner_x, r_reach), PATCH_X)
        patches = tl.sum(tl.where((r < slabs * rows) & (r_t < t_end) & (r_y < r_end), across, 0))
    else:
        patches = tl.cdiv(_end(last_x, reach, width) - _first(corner_x, reach), PATCH_X)
        patches *= tl.cdiv(y_end - y_first, PATCH_Y) * tl.cdiv(t_end - t_first, PATCH_T)
    patches = tl.where(is_text, 0, patches)

    n_x = n % PATCH_X
    n_y = (n // PATCH_X) % PATCH_Y
    n_t = n // (PATCH_X * PATCH_Y)
    inner = (n_t * height + n_y) * width + n_x
    if WIDE:
        k_inner = (inner.to(tl.int64) * k_token)[:, None] + d[None, :]
        v_inner = (inner.to(tl.int64) * v_token)[:, None] + dv[None, :]
    else:
        k_inner = (inner * tl.cast(k_token, tl.int32))[:, None] + d[None, :]
        v_inner = (inner * tl.cast(v_token, tl.int32))[:, None] + dv[None, :]

    t, y = t_first, y_first
    used = _used(t, t_end, corner_t, last_t, PATCH_T, DISC)
    used += _used(y, y_end, corner_y, last_y, PATCH_Y, DISC)
    row_reach = _reach(radius, used, DISC)
    x, x_end = _first(corner_x, row_reach), _end(last_x, row_reach, width)
    for _ in range(0, patches):
        there = (n_x < x_end - x) & (n_y < y_end - y) & (n_t < t_end - t)
        k_mask = there[:, None]
        v_mask = there[:, None]
        if BLOCK_D != D:
            k_mask = k_mask & (d < D)[None, :]
        if BLOCK_DV != DV:
            v_mask = v_mask & (dv < DV)[None, :]
        token = ((t * height + y) * width + x + before).to(tl.int64)
        key = tl.load(k_ptr + token * k_token + k_inner, mask=k_mask, other=0.0)
        scores = _scores(query, key, DOT)
        scores = _masked(scores, mask_rows, mask_key, token + inner, query_there, there, scale, MASK, MASK_ROWS)

        # Is a key of the patch hidden from a query of the tile? The largest distances decide.
        cut = (x + PATCH_X > x_end) | (y + PATCH_Y > y_end) | (t + PATCH_T > t_end)
        most_x = tl.maximum(x + PATCH_X - 1 - corner_x, last_x - x)
        most_y = tl.maximum(y + PATCH_Y - 1 - corner_y, last_y - y)
        most_t = tl.maximum(t + PATCH_T - 1 - corner_t, last_t - t)
        if DISC:
            cut = cut | (most_x * most_x + most_y * most_y + most_t * most_t >= radius * radius)
        else:
            cut = cut | (tl.maximum(tl.maximum(most_x, most_y), most_t) > radius)
        key_x = (x - corner_x + n_x).to(tl.float32)
        key_y = (y - corner_y + n_y).to(tl.float32)
        key_t = (t - corner_t + n_t).to(tl.float32)
        scores = _limited(
            scores, cut, query_t, query_y, query_x, key_t, key_y, key_x, there, radius, False, RANK, DISC, ADD_MASK
        )
        values = v_ptr + token * v_token + v_inner
        acc, total, top = _attend(acc, total, top, scores, values, v_mask, scale, MASK, DOT)

        # The next patch: to the right, else the first of the next row, else of the next slab.
        x += PATCH_X
        if RANK >= 2:
            row_done = x >= x_end
            y = tl.where(row_done, y + PATCH_Y, y)
            used = 0
            if RANK == 3:
                slab_done = row_done & (y >= y_end)
                t = tl.where(slab_done, t + PATCH_T, t)
                used = _used(t, t_end, corner_t, last_t, PATCH_T, DISC)
                row_reach = _reach(radius, used, DISC)
                y = tl.where(slab_done, _first(corner_y, row_reach), y)
                y_end = tl.where(slab_done, _end(last_y, row_reach, height), y_end)
            used += _used(y, y_end, corner_y, last_y, PATCH_Y, DISC)
            row_reach = _reach(radius, used, DISC)
            x = tl.where(row_done, _first(corner_x, row_reach), x)
            x_end = tl.where(row_done, _end(last_x, row_reach, width), x_end)

    out = _divided(acc, total, MASK).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + query_token[:, None] * out_token + dv[None, :], out, mask=out_mask)

    if WITH_FULL:
        # 3. The rest of the image in runs; only the runs between the window's first and last token need a mask.
        y_first, y_end = _first(corner_y, reach), _end(last_y, reach, height)
        low = (t_first * height + y_first) * width + _first(corner_x, reach)
        high = ((t_end - 1) * height + y_end - 1) * width + _end(last_x, reach, width) - 1
        rest = tl.where(is_text, 0, image)
        for start in range(0, rest, BLOCK_N):
            index = start + n
            there = index < rest
            token = (index + before).to(tl.int64)
            k_mask = there[:, None]
            v_mask = there[:, None]
            if BLOCK_D != D:
                k_mask = k_mask & (d < D)[None, :]
            if BLOCK_DV != DV:
                v_mask = v_mask & (dv < DV)[None, :]
            key = tl.load(k_ptr + token[:, None] * k_token + d[None, :], mask=k_mask, other=0.0)
            scores = _scores(query, key, DOT)
            scores = _masked(scores, mask_rows, mask_key, token, query_there, there, scale, MASK, MASK_ROWS)
            cut = (start + BLOCK_N > rest) | ((start <= high) & (start + BLOCK_N > low))
            key_x = (index % width - corner_x).to(tl.float32)
            key_y = ((index // width) % height - corner_y).to(tl.float32)
            key_t = (index // (width * height) - corner_t).to(tl.float32)
            scores = _limited(
                scores, cut, query_t, query_y, query_x, key_t, key_y, key_x, there, radius, True, RANK, DISC, ADD_MASK
            )
            values = v_ptr + token[:, None] * v_token + dv[None, :]
            acc, total, top = _attend(acc, total, top, scores, values, v_mask, scale, MASK, DOT)
        full = _divided(acc, total, MASK).to(full_ptr.dtype.element_ty)
        tl.store(full_ptr + query_token[:, None] * full_token + dv[None, :], full, mask=out_mask)
        if RESIDUAL:
            tl.debug_barrier()  # what this program stored above is read back by other threads of it
            local = tl.load(out_ptr + query_token[:, None] * out_token + dv[None, :], mask=out_mask, other=0.0)
            residual = full.to(tl.float32) - local.to(tl.float32)
            tl.store(
                out_ptr + query_token[:, None] * out_token + dv[None, :],
                residual.to(out_ptr.dtype.element_ty),
                mask=out_mask,
            )
