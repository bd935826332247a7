# Written by `make export` from notebooks/4_practice/19_cache.py: edit that file.

"""Layers for writing: packed weights, and attention over kept keys."""

__all__ = [
    "cache_attention", "cache_shapes", "embed_forward", "pack_weight",
    "panels_forward", "panels_shape", "ring_size",
]


# imports of the kernels
import math
from typing import NamedTuple

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from llmnb.checks import check_fit
from llmnb.cpu.attention import Look, block_size, look_of, softmax_row
from llmnb.cpu.jit import arguments, inlined, inner, team
from llmnb.cpu.panels import DEPTH, Block, pack, scratch
from llmnb.cpu.tile import (
    COLS, I32, LANES, ROWS, VECTORS, constant, data, multiply_add, peek, plus,
    spread, store, sum_loop,
)
from llmnb.shapes import COMPILED, shapes


# the loop over the sum
def _sums(builder, inp, panel, line, depth, rows):
    """The sums of some rows over a panel, as vectors, row by row."""

    def turn(pointers, sums):
        panel, *inp = pointers
        weights = [
            peek(builder, builder.gep(panel, [I32(v * LANES)]), LANES)
            for v in range(VECTORS)
        ]
        new = []
        for row in inp:
            x = spread(builder, builder.load(row))
            for y in weights:
                new.append(multiply_add(builder, x, y, sums[len(new)]))
        return new

    zero = constant(panel.type.pointee, [0.0] * LANES)
    pointers, steps = [panel, *inp], [line] + [I32(1)] * rows
    zeros = [zero] * (rows * VECTORS)
    return sum_loop(builder, depth, pointers, steps, zeros, turn)


# where rows are
class Line(NamedTuple):
    """A flat array, where a row begins in it, and the step to the next."""

    array: np.ndarray
    at: int
    step: int


@inlined
def _moved(line, rows):
    """The Line that begins some rows further on."""
    return Line(line.array, line.at + rows * line.step, line.step)


# some rows by a panel
def _rows_by_panel(rows):
    @intrinsic
    def multiply(typing, out, start, bias, inp, panel, depth):
        signature = types.void(out, start, bias, inp, panel, types.int64)

        def codegen(context, builder, signature, args):
            kinds = signature.args

            def line(i):
                """The address of a Line's begin, and its step."""
                array, at, step = cgutils.unpack_tuple(builder, args[i])
                base = data(context, builder, kinds[i].types[0], array)
                return builder.gep(base, [at]), step

            def places(i, rows, vectors):
                base, step = line(i)
                for r in range(rows):
                    down = builder.mul(step, step.type(r))
                    for v in range(vectors):
                        place = builder.add(down, step.type(v * LANES))
                        yield builder.gep(base, [place])

            inputs, (panel, step) = [*places(3, rows, 1)], line(4)
            found = _sums(builder, inputs, panel, step, args[5], rows)
            bias = places(2, 1, VECTORS)
            shift = [peek(builder, p, LANES) for p in bias] * rows
            outs, starts = places(0, rows, VECTORS), places(1, rows, VECTORS)
            for q, f, z, y in zip(outs, starts, found, shift, strict=True):
                z = plus(builder, z, y)
                store(builder, plus(builder, z, peek(builder, f, LANES)), q)
            return context.get_dummy_value()

        return signature, codegen

    return multiply


_all_rows, _two_rows, _one_row = map(_rows_by_panel, (ROWS, 2, 1))


# all rows by a panel
@inner
def _panel_product(out, start, bias, inp, panel, depth, count):
    """Each of `count` rows, from Lines: out = start + bias + inp by panel."""
    i = 0
    while i < count:
        y, s, x = _moved(out, i), _moved(start, i), _moved(inp, i)
        if count - i >= ROWS:
            _all_rows(y, s, bias, x, panel, depth)
            i += ROWS
        elif count - i >= 2:
            _two_rows(y, s, bias, x, panel, depth)
            i += 2
        else:
            _one_row(y, s, bias, x, panel, depth)
            i += 1


# a column of the output
@inner
def _column(out, start, inp, panel, zeros, count):
    """COLS columns of all rows; all but count are Lines."""
    C = inp.step
    bias = Line(panel.array, panel.at + C * COLS, 0)
    for k in range(0, C, DEPTH):
        depth, x = min(DEPTH, C - k), Line(inp.array, k, C)
        _panel_product(out, start, bias, x, _moved(panel, k), depth, count)
        start, bias = out, zeros


# the column at the edge
@inner
def _edge_column(out, start, inp, panel, zeros, count):
    """A column of fewer than COLS numbers, by way of a wider copy."""
    cols = out.step - out.at  # out is at its first row
    wide = Line(np.zeros(count * COLS, out.array.dtype), 0, COLS)
    for i in range(count):
        for c in range(cols if start.step else 0):
            there = start.at + i * start.step
            wide.array[i * COLS + c] = start.array[there + c]
    _column(wide, wide, inp, panel, zeros, count)
    for i in range(count):
        for c in range(cols):
            there = out.at + i * out.step
            out.array[there + c] = wide.array[i * COLS + c]


# the kernel of the product
@team
def _panels_forward(part, parts, address):
    out, start, add, inp, panels, count, C = arguments(address)
    OC = out.size // count
    columns, size = -(-OC // COLS), (C + 1) * COLS
    zeros, inp = Line(np.zeros(COLS, out.dtype), 0, 0), Line(inp, 0, C)
    for q in range(part * columns // parts, (part + 1) * columns // parts):
        j, panel = q * COLS, Line(panels, q * size, COLS)
        y, first = Line(out, j, OC), Line(start, j, OC) if add else zeros
        if j + COLS <= OC:
            _column(y, first, inp, panel, zeros, count)
        else:
            _edge_column(y, first, inp, panel, zeros, count)


# the product
def panels_shape(OC, C):
    """The shape of a weight (OC, C) and its bias as panels.

    A panel holds COLS rows of the weight, side by side, and below them the
    numbers of the bias.

    Derived in chapter 4.19.
    """
    return -(-OC // COLS), C + 1, COLS


def _check_panels(layer, panels, OC, C):
    shape = panels_shape(OC, C)
    check_fit(f"{layer}: panels", panels, shape, panels.dtype)


@shapes("B T OC!, B T C, P D S, B T OC?~")
def panels_forward(out, inp, panels, residual=None):
    """out = inp @ weight.T + bias + residual, from packed weights.

    out, residual: (B, T, OC). inp: (B, T, C). panels: panels_shape(OC, C),
    as pack_weight leaves them. residual may be None or out itself. All
    float32 or all float64 and C-contiguous. Every number equals that of
    matmul_forward to the last bit. Raises TypeError or ValueError before it
    computes anything.

    Derived in chapter 4.19.
    """
    (B, T, C), OC = inp.shape, out.shape[2]
    _check_panels("panels_forward", panels, OC, C)
    add, start = residual is not None, out if residual is None else residual
    out, start, inp, panels = (
        x.reshape(-1) for x in (out, start, inp, panels)
    )
    _panels_forward(out, start, add, inp, panels, B * T, C)


# pack a weight
@team
def _pack_weight(part, parts, address):
    panels, weight, OC, C, code = arguments(address)
    size = (C + 1) * COLS
    for q in range(part, -(-OC // COLS), parts):
        block = Block(q * COLS * C, C, 1, min(COLS, OC - q * COLS), C)
        pack(code, panels, q * size, weight, block)


# weights into panels
@shapes("P D S!, OC C, OC?")
def pack_weight(panels, weight, bias=None):
    """Write a weight (OC, C) and a bias (OC,) into panels, in place.

    panels: panels_shape(OC, C). All float32 or all float64 and
    C-contiguous. Raises TypeError or ValueError before anything is written.

    Derived in chapter 4.19.
    """
    OC, C = weight.shape
    _check_panels("pack_weight", panels, OC, C)
    code = scratch(np.empty(0, weight.dtype), False, weight.dtype)[0][1]
    _pack_weight(panels.reshape(-1), weight.reshape(-1), OC, C, code)
    last = np.zeros(len(panels) * COLS, weight.dtype)
    last[:OC] = 0 if bias is None else bias
    panels[:, -1] = last.reshape(-1, COLS)


# the shape of a cache
def ring_size(hs, window):
    """Positions that a cache keeps where attention looks back a window.

    Derived in chapter 4.19.
    """
    step = math.lcm(block_size(hs), COLS)
    return -(-window // step) * step


def cache_shapes(B, NKV, T, hs, window=None):
    """Shapes of the cached keys and values of T positions.

    Keys (B, NKV, T / COLS, hs, COLS) are panels of COLS positions; values
    (B, NKV, T, hs), with hs rounded up to a multiple of COLS. window: how
    many positions a query sees, None for all; no more than ring_size of
    them are kept.

    Derived in chapter 4.19.
    """
    T = T if window is None else min(T, ring_size(hs, window))
    wide = -(-hs // COLS) * COLS
    keys = B, NKV, -(-T // COLS), hs, COLS
    return {"keys": keys, "values": (B, NKV, T, wide)}


# keep keys and values
@team
def _keep(part, parts, address):
    """Write the keys and values of new positions into the cache."""
    keys, values, qkv, C, first, begin, end = arguments(address)
    (B, NKV, room, _), hs = values.shape, keys.shape[3]
    for unit in range(part, B * NKV, parts):
        b, kv = unit // NKV, unit % NKV
        K, V, k = keys[b, kv], values[b, kv], C + kv * hs
        v = k + NKV * hs
        for t in range(begin, end):
            row, p = qkv[b, t], (first + t) % room
            for c in range(hs):
                K[p // COLS, c, p % COLS] = row[k + c]
                V[p, c] = row[v + c]


# some queries
class Reach(NamedTuple):
    """What neighbouring queries see, and where it lies.

    look: of chapter 2.5. first: the position of the first query. room:
    position p lies at p % room. block: how many keys are taken at once.
    """

    look: Look
    first: int
    room: int
    block: int


@inner
def _weigh(scores, sums, state, begin, reach, at):
    """The softmax of a block that begins at a position, for all rows.

    at: where the block lies in the scores, begin and end. A weight that a
    row does not see becomes 0.
    """
    look, cols = reach.look, at[1] - at[0]
    for i in range(len(sums)):
        end = reach.first + i + 1
        low = min(cols, max(0, end - look.window - begin))
        end = min(cols, end - begin)
        row = scores[i, at[0] : at[1]]
        row[:low] = 0
        if low < end:
            softmax_row(row[low:], end - low, sums[i], state[i], look)
        else:
            row[:] = 0


@inner
def _look_back(out, query, keys, values, reach, scores, sums):
    """Attention of some queries, from Lines; scores, sums: a row each."""
    (look, first, room, block), rows = reach, len(sums)
    wide, width, hs = sums.shape[1], scores.shape[1], out.shape[1]
    zeros, last = Line(np.zeros(COLS, sums.dtype), 0, 0), first + rows
    weights, flat = Line(scores.reshape(-1), 0, width), sums.reshape(-1)
    for j in range(0, min(last, room), COLS):
        y, panel = Line(weights.array, j, width), Line(keys, j * hs, COLS)
        _panel_product(y, zeros, zeros, query, panel, hs, rows)
    state, low = np.empty((rows, 2), sums.dtype), first + 1 - look.window
    sums[:], state[:, 0], state[:, 1] = 0, -1e30, 0
    for u in range(max(0, low) // block * block, last, block):
        begin = max(u, low)
        at, cols = begin % room, min(u + block, last) - begin
        _weigh(scores, sums, state, begin, reach, (at, at + cols))
        weights = Line(weights.array, at, width)
        for c in range(0, wide, COLS):
            y, panel = Line(flat, c, wide), Line(values, at * wide + c, wide)
            _panel_product(y, y, zeros, weights, panel, cols, rows)
    for i in range(rows):
        for c in range(hs):
            out[i, c] = sums[i, c] / state[i, 1]


# all heads
@team
def _cache_attention(part, parts, address):
    out, keys, values, qkv, first, begin, end, block, look = arguments(address)
    (B, T, C), W, flat = out.shape, qkv.shape[2], qkv.reshape(-1)
    (_, NKV, room, wide), hs = values.shape, keys.shape[3]
    NH, groups = C // hs, -(-(end - begin) // ROWS)
    scores = np.empty((ROWS, keys.shape[2] * COLS), out.dtype)
    sums = np.empty((ROWS, wide), out.dtype)
    for unit in range(part, B * NH * groups, parts):
        b, h = unit // (NH * groups), unit // groups % NH
        t, a = begin + unit % groups * ROWS, h * hs
        n, kv = min(ROWS, end - t), h * NKV // NH
        K, V = keys[b, kv].reshape(-1), values[b, kv].reshape(-1)
        query = Line(flat, (b * T + t) * W + a, W)
        reach = Reach(Look(*look), first + t, room, block)
        y = out[b, t : t + n, a : a + hs]
        _look_back(y, query, K, V, reach, scores[:n], sums[:n])


# attention over a cache
@shapes("B T C!, B NKV P hs S!, B NKV room W!, B T QKV")
def cache_attention(
    out, keys, values, inp, first, window=None, scale=None, softcap=None
):
    """Attention of new positions to all before them; keeps theirs.

    out: (B, T, NH * hs), overwritten. inp: (B, T, (NH + 2 NKV) * hs), heads
    of queries, keys and values of positions first to first + T - 1. keys,
    values: as cache_shapes has it; positions before `first` are read, the
    new ones written. window, scale, softcap: as in chapter 5.4, which
    checks them; with a window the cache may be shorter than the text. All
    float32 or all float64 and C-contiguous. Every number equals that of
    attention_forward to the last bit. Raises TypeError or ValueError before
    it computes anything.

    Derived in chapter 4.19.
    """
    name = "cache_attention"
    (B, T, C), (_, NKV, _, hs, _) = out.shape, keys.shape
    room, width = values.shape[2], C + 2 * NKV * hs
    if not NKV * hs or C % (NKV * hs) or inp.shape[2] != width:
        raise ValueError(
            f"{name}: inp must have shape (B, T, (NH + 2 NKV) hs), where "
            f"NKV = {NKV}, hs = {hs} and NKV divides NH, got {inp.shape}"
        )
    ring = window is not None and room == ring_size(hs, window)
    if first < 0 or (first > room - T and not ring):
        raise ValueError(
            f"{name}: positions {first} to {first + T - 1}, where the cache "
            f"has {room}"
        )
    want = cache_shapes(B, NKV, room, hs)
    check_fit(f"{name}: keys", keys, want["keys"], out.dtype)
    check_fit(f"{name}: values", values, want["values"], out.dtype)
    block, look = block_size(hs), look_of(hs, window, scale, softcap)
    # as many at a time as push nothing out that the first of them sees
    size = room - window + 1 if ring else max(1, T)
    for t in range(0, T, size):
        these = first, t, min(T, t + size)
        _keep(keys, values, inp, C, *these)
        _cache_attention(out, keys, values, inp, *these, block, look)


# a row back out of panels
@inner
def _embed(out, tokens, panels, scale):
    B, T, C = out.shape
    for b in range(B):
        for t in range(T):
            panel, lane = tokens[b, t] // COLS, tokens[b, t] % COLS
            for c in range(C):
                out[b, t, c] = panels[panel, c, lane] * scale


# embed from panels
@shapes(f"B T C!, B T of {COLS}P, P D {COLS}, T+ C?", COMPILED)
def embed_forward(out, tokens, panels, wpe=None, first=0, scale=1.0):
    """Sum each token's vector, times scale, and its position's.

    out: (B, T, C), overwritten. tokens: int32 (B, T). panels: wte, packed.
    wpe: (max_T, C), or None where a model has no such table. first: the
    position of the first token. Raises TypeError or ValueError where they
    do not fit.

    Derived in chapter 4.19.
    """
    name = "embed_forward"
    B, T, C = out.shape
    _check_panels(name, panels, len(panels) * COLS, C)
    if wpe is not None and not 0 <= first <= len(wpe) - T:
        raise ValueError(
            f"{name}: positions {first} to {first + T - 1}, where wpe has "
            f"{len(wpe)}"
        )
    _embed(out, tokens, panels, out.dtype.type(scale))
    if wpe is not None:
        out += wpe[first : first + T]
