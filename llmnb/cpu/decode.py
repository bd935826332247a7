# Written by `make export` from notebooks/4_practice/19_cache.py: edit that file.

"""Layers for writing: packed weights, and attention over kept keys."""

__all__ = [
    "cache_attention",
    "cache_shapes",
    "embed_forward",
    "pack_weight",
    "panels_forward",
    "panels_shape",
]


# imports of the kernels
import math

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from llmnb.checks import check_fit
from llmnb.cpu.attention import block_size, softmax_block
from llmnb.cpu.jit import arguments, inner, team
from llmnb.cpu.panels import DEPTH, pack, scratch
from llmnb.cpu.tile import (
    COLS,
    I32,
    LANES,
    ROWS,
    VECTORS,
    constant,
    data,
    load,
    multiply_add,
    spread,
    store,
    sum_loop,
)
from llmnb.shapes import COMPILED, shapes


# the loop over the sum
def _sums(builder, inp, panel, line, depth, rows):
    """The sums of some rows over a panel, as vectors, row by row."""

    def turn(pointers, sums):
        panel, *inp = pointers
        weights = [
            load(builder, builder.gep(panel, [I32(v * LANES)]), LANES)
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


# some rows by a panel
def _rows_by_panel(rows):
    @intrinsic
    def multiply(typing, out, o, start, s, bias, b, inp, x, panel, p, depth):
        n, two = types.int64, types.UniTuple(types.int64, 2)
        signature = types.void(
            out, two, start, two, bias, n, inp, two, panel, two, n
        )

        def codegen(context, builder, signature, args):
            kinds = signature.args

            def places(i, vectors):
                at, step = cgutils.unpack_tuple(builder, args[i + 1])
                base = builder.gep(
                    data(context, builder, kinds[i], args[i]), [at]
                )
                for r in range(rows):
                    down = builder.mul(step, step.type(r))
                    for v in range(vectors):
                        place = builder.add(down, step.type(v * LANES))
                        yield builder.gep(base, [place])

            panel = data(context, builder, kinds[8], args[8])
            p, line = cgutils.unpack_tuple(builder, args[9])
            inputs = [*places(6, 1)]
            found = _sums(
                builder, inputs, builder.gep(panel, [p]), line, args[10], rows
            )
            bias = builder.gep(
                data(context, builder, kinds[4], args[4]), [args[5]]
            )
            shift = [
                load(builder, builder.gep(bias, [I32(v * LANES)]), LANES)
                for v in range(VECTORS)
            ] * rows
            outs, starts = places(0, VECTORS), places(2, VECTORS)
            for q, f, z, y in zip(outs, starts, found, shift, strict=True):
                z = builder.fadd(builder.fadd(z, y), load(builder, f, LANES))
                store(builder, z, q)
            return context.get_dummy_value()

        return signature, codegen

    return multiply


_all_rows, _two_rows, _one_row = map(_rows_by_panel, (ROWS, 2, 1))


# all rows by a panel
@inner
def _panel_product(out, o, start, s, bias, b, inp, x, panel, p, depth, count):
    """o, s, x: where the first row begins, and the step to the next."""
    i = 0
    while i < count:
        places = (o[0] + i * o[1], o[1]), (s[0] + i * s[1], s[1])
        row = x[0] + i * x[1], x[1]
        how = bias, b, inp, row, panel, p, depth
        if count - i >= ROWS:
            _all_rows(out, places[0], start, places[1], *how)
            i += ROWS
        elif count - i >= 2:
            _two_rows(out, places[0], start, places[1], *how)
            i += 2
        else:
            _one_row(out, places[0], start, places[1], *how)
            i += 1


# a column of the output
@inner
def _column(out, start, s, inp, panels, p, j, sizes, zeros):
    """Columns j to j + COLS of all rows; s: the step of start's rows."""
    count, OC, C = sizes
    for k in range(0, C, DEPTH):
        depth = min(DEPTH, C - k)
        x, panel = (k, C), (p + k * COLS, COLS)
        if k == 0:
            at = (j if s else 0), s
            _panel_product(
                *(out, (j, OC), start, at, panels, p + C * COLS),
                *(inp, x, panels, panel, depth, count),
            )
        else:
            _panel_product(
                *(out, (j, OC), out, (j, OC), zeros, 0),
                *(inp, x, panels, panel, depth, count),
            )


# the column at the edge
@inner
def _edge_column(out, start, s, inp, panels, p, j, sizes, zeros):
    """A column of fewer than COLS numbers, by way of a wider copy."""
    count, OC, C = sizes
    wide = np.zeros(count * COLS, out.dtype)
    for i in range(count):
        for c in range(OC - j if s else 0):
            wide[i * COLS + c] = start[i * s + j + c]
    shape = count, COLS, C
    _column(wide, wide, COLS, inp, panels, p, 0, shape, zeros)
    for i in range(count):
        for c in range(OC - j):
            out[i * OC + j + c] = wide[i * COLS + c]


# the kernel of the product
@team
def _panels_forward(part, parts, address):
    out, start, s, inp, panels, sizes = arguments(address)
    _, OC, C = sizes
    count, size = -(-OC // COLS), (C + 1) * COLS
    zeros = np.zeros(COLS, out.dtype)
    first = start if s else zeros
    for q in range(part * count // parts, (part + 1) * count // parts):
        j, p = q * COLS, q * size
        if j + COLS <= OC:
            _column(out, first, s, inp, panels, p, j, sizes, zeros)
        else:
            _edge_column(out, first, s, inp, panels, p, j, sizes, zeros)


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
    start = out if residual is None else residual
    s = 0 if residual is None else OC
    flat = (x.reshape(-1) for x in (start, inp, panels))
    start, inp, panels = flat
    sizes = B * T, OC, C
    _panels_forward(out.reshape(-1), start, s, inp, panels, sizes)


# pack a weight
@team
def _pack_weight(part, parts, address):
    panels, weight, OC, C, code = arguments(address)
    size = (C + 1) * COLS
    for q in range(part, -(-OC // COLS), parts):
        rows = min(COLS, OC - q * COLS)
        pack(code, panels, q * size, weight, q * COLS * C, C, 1, rows, C)


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
def cache_shapes(B, NKV, T, hs):
    """Shapes of the cached keys and values of T positions.

    Keys (B, NKV, T / COLS, hs, COLS) are panels of COLS positions; values
    (B, NKV, T, hs), with hs rounded up to a multiple of COLS.

    Derived in chapter 4.19.
    """
    wide = -(-hs // COLS) * COLS
    keys = B, NKV, -(-T // COLS), hs, COLS
    return {"keys": keys, "values": (B, NKV, T, wide)}


# keep keys and values
@inner
def _keep(keys, values, qkv, first, k, v):
    """Of one row of the batch and one head: the new positions.

    k, v: where the head's keys and values begin in a row of qkv.
    """
    hs = keys.shape[1]
    for t in range(len(qkv)):
        panel, lane = (first + t) // COLS, (first + t) % COLS
        for c in range(hs):
            keys[panel, c, lane] = qkv[t, k + c]
            values[first + t, c] = qkv[t, v + c]


# one query
@inner
def _look_back(out, query, keys, values, seen, hs, block, w, zeros):
    """Attention from one position to `seen` keys; w: scores, then sums."""
    wide, scale = len(zeros), w.dtype.type(1 / math.sqrt(hs))
    acc, none = len(w) - wide - 2, (0, 0)
    for j in range(0, seen, COLS):
        _one_row(
            *(w, (j, 0), zeros, none, zeros, 0, query, none),
            *(keys, (j * hs, COLS), hs),
        )
    w[acc : acc + wide] = 0
    w[acc + wide], w[acc + wide + 1] = -1e30, 0
    for u in range(0, seen, block):
        cols = min(block, seen - u)
        softmax_block(w, u, acc, cols, 1, cols, 1, wide, scale)
        for c in range(0, wide, COLS):
            at = acc + c, 0
            _one_row(
                *(w, at, w, at, zeros, 0, w, (u, 0)),
                *(values, (u * wide + c, wide), cols),
            )
    total = w[acc + wide + 1]
    sums = w[acc : acc + wide]
    for c in range(hs):
        out[c] = sums[c] / total


# all heads
@team
def _cache_attention(part, parts, address):
    out, keys, values, qkv, first, block = arguments(address)
    B, T, C = out.shape
    NKV, hs, wide = keys.shape[1], keys.shape[3], values.shape[3]
    group = C // (NKV * hs)
    room = keys.shape[2] * COLS + wide + 2
    w, zeros = np.empty(room, out.dtype), np.zeros(wide, out.dtype)
    for unit in range(part, B * NKV, parts):
        b, kv = unit // NKV, unit % NKV
        K, V, k = keys[b, kv], values[b, kv], C + kv * hs
        _keep(K, V, qkv[b], first, k, k + NKV * hs)
        K, V = K.reshape(-1), V.reshape(-1)
        for h in range(kv * group, kv * group + group):
            for t in range(T):
                a, seen = h * hs, first + t + 1
                y, q = out[b, t, a : a + hs], qkv[b, t, a : a + hs]
                _look_back(y, q, K, V, seen, hs, block, w, zeros)


# attention over a cache
@shapes("B T C!, B NKV P hs S!, B NKV room W!, B T QKV")
def cache_attention(out, keys, values, inp, first):
    """Attention of new positions to all before them; keeps theirs.

    out: (B, T, NH * hs), overwritten. inp: (B, T, (NH + 2 NKV) * hs), heads
    of queries, keys and values of positions first to first + T - 1. keys,
    values: as cache_shapes has it; positions before `first` are read, the
    new ones written. All float32 or all float64 and C-contiguous. Every
    number equals that of attention_forward to the last bit. Raises
    TypeError or ValueError before it computes anything.

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
    if not 0 <= first <= room - T:
        raise ValueError(
            f"{name}: positions {first} to {first + T - 1}, where the cache "
            f"has {room}"
        )
    want = cache_shapes(B, NKV, room, hs)
    check_fit(f"{name}: keys", keys, want["keys"], out.dtype)
    check_fit(f"{name}: values", values, want["values"], out.dtype)
    block = block_size(hs)
    _cache_attention(out, keys, values, inp, first, block)


# a row back out of panels
@inner
def _embed(out, tokens, panels, wpe, first):
    B, T, C = out.shape
    for b in range(B):
        for t in range(T):
            panel, lane = tokens[b, t] // COLS, tokens[b, t] % COLS
            for c in range(C):
                out[b, t, c] = panels[panel, c, lane] + wpe[first + t, c]


# embed from panels
@shapes(f"B T C!, B T of {COLS}P, P D {COLS}, T+ C", COMPILED)
def embed_forward(out, tokens, panels, wpe, first):
    """Sum each token's vector and its position's, from packed wte.

    out: (B, T, C), overwritten. tokens: int32 (B, T). panels: wte, packed.
    wpe: (max_T, C). first: the position of the first token. Raises
    TypeError or ValueError where they do not fit.

    Derived in chapter 4.19.
    """
    name = "embed_forward"
    B, T, C = out.shape
    _check_panels(name, panels, len(panels) * COLS, C)
    if not 0 <= first <= len(wpe) - T:
        raise ValueError(
            f"{name}: positions {first} to {first + T - 1}, where wpe has "
            f"{len(wpe)}"
        )
    _embed(out, tokens, panels, wpe, first)
