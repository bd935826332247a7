# Written by `make export` from notebooks/2_cpu/05_attention.py: edit that file.

"""Attention in blocks with an online softmax, for the processor's cores."""

__all__ = ["attention_backward", "attention_forward"]


# imports of the kernels
import math
from typing import NamedTuple

import numpy as np

from llmnb.cpu.jit import arguments, inlined, team
from llmnb.cpu.math import fast_exp, fast_tanh, larger
from llmnb.cpu.microkernel import Place
from llmnb.cpu.panels import (
    ALL, SPARE, WORK, Ahead, Block, Flat, Routines, check_bf16,
    multiply_panels, pack, scratch,
)
from llmnb.cpu.tile import COLS, ROWS
from llmnb.reference.attention import count_heads
from llmnb.shapes import shapes


# places in the scratch memory
BLOCK = 96  # rows, and keys, that are taken at once
FOREVER = 1 << 40  # a window that leaves out nothing
ZEROS = SPARE + ROWS * COLS  # in work: a row of zeros


class Places(NamedTuple):
    """Where a thread's panels and tables begin in its scratch."""

    rows: int  # panels of rows: queries, then weights, then gradients
    keys: int  # panels of columns
    values: int  # the same
    transposed: int  # the same: the keys, channel by channel
    right: int  # the same: what the weights are multiplied with
    scores: int  # a table, of a block
    grads: int  # a table: the gradients of the scores
    sums: int  # a table: the unfinished output
    state: int  # of each row: the maximum and the sum so far
    end: int


def _places(block, hs):
    """The Places for blocks of this size."""
    tall, wide = (-(-block // n) * n for n in (ROWS, COLS))
    head = -(-hs // COLS) * COLS
    sizes = [tall * max(block, hs), wide * hs, wide * hs]
    sizes += [head * block, head * block, block * block, block * block]
    sizes += [block * hs, block * 2]
    return Places(*np.cumsum([0, *sizes]).tolist())


def block_size(hs):
    """The largest block that fits."""
    block = BLOCK
    while block and _places(block, hs).end > SPARE:
        block //= 2
    if not block:
        raise ValueError(f"attention: a head of {hs} channels is too wide")
    return block


# what a thread works with
class Heads(NamedTuple):
    """Positions, heads of queries, of keys, channels of each, a block."""

    T: int
    NH: int
    NKV: int
    hs: int
    block: int


class Look(NamedTuple):
    """What a query sees, and what its product with a key becomes.

    window: how many keys it sees, its own the last. scale: of the product,
    then the score. cap: c where c tanh(score / c) takes its place, or 0.
    """

    window: int
    scale: float
    cap: float


class Thread(NamedTuple):
    """Sizes, places, addresses, and the thread's own scratch, w.

    panels: the same memory, for bfloat16 as uint32.
    """

    sizes: Heads
    look: Look
    at: Places
    code: Routines
    panels: np.ndarray
    w: np.ndarray


@inlined
def _thread(part, made):
    """The Thread of a part, from what `prepared` gives."""
    sizes, look, places, code, panels, work = made
    w, code, look = work[part], Routines(*code), Look(*look)
    w[ZEROS : ZEROS + COLS] = 0
    return Thread(Heads(*sizes), look, Places(*places), code, panels[part], w)


@inlined
def _table(w, at, rows, cols):
    """A table in the scratch."""
    return w[at : at + rows * cols].reshape(rows, cols)


# a product of two panels
@inlined
def _add_product(my, out, at, step, fresh, pair, sizes):
    """Add a product to the block of out that begins at `at`, or write it."""
    place, start = Place(at, step, at, step, 1, ZEROS, 0), out
    if fresh:
        place, start = Place(at, step, ZEROS, 0, 0, ZEROS, 0), my.w
    x = Flat(out, start, my.w, my.panels, my.w[SPARE:])
    nothing, sizes = Ahead(np.int64(my.w.ctypes.data), 0, 0), (*sizes, ALL)
    multiply_panels(my.code.multiply, x, place, pair, sizes, nothing)


# one row of the softmax
@inlined
def softmax_row(scores, seen, sums, state, look):
    """Products with a block's keys to exponentials; repairs sums, state."""
    number = scores.dtype.type
    scale, cap = number(look.scale), number(look.cap)
    if cap > 0:
        for j in range(seen):
            scores[j] = cap * fast_tanh(scores[j] * scale / cap)
        scale = number(1)
    total, largest = number(0), scores[0]
    for j in range(seen):
        largest = larger(largest, scores[j])
    top = max(state[0], largest * scale)
    for j in range(seen):
        scores[j] = fast_exp(scores[j] * scale - top)
        total += scores[j]
    scores[seen:] = 0
    factor = fast_exp(state[0] - top)
    state[0] = top
    state[1] = state[1] * factor + total
    for k in range(sums.size):
        sums[k] *= factor


# the keys of a block that a row sees
@inlined
def _seen(before, cols, look):
    """The first key of a block that a row sees, and the end of those.

    before: how many positions lie from the block's first to the row's own.
    """
    return min(cols, max(0, before - look.window)), min(cols, before)


@inlined
def _first_block(row, my):
    """Where the first block of keys begins that a row sees."""
    return max(0, row + 1 - my.look.window) // my.sizes.block * my.sizes.block


# a block of rows, forward
@inlined
def _forward_block(out, lse, qkv, my, b, h, first):
    """Head h of the rows from `first` on."""
    (T, NH, NKV, hs, n), at, w, code = my.sizes, my.at, my.w, my.code
    C, W, rows = NH * hs, (NH + 2 * NKV) * hs, min(n, T - first)
    key = (NH + h * NKV // NH) * hs
    query = Block((b * T + first) * W + h * hs, W, 1, rows, hs)
    scores, sums = _table(w, at.scores, n, n), _table(w, at.sums, n, hs)
    state = _table(w, at.state, n, 2)
    sums[:rows] = 0
    state[:rows, 0], state[:rows, 1] = -1e30, 0
    for u in range(_first_block(first, my), first + rows, n):
        cols, k = min(n, T - u), (b * T + u) * W + key
        pack(code.pack_rows, my.panels, at.rows, qkv, query)
        pack(code.pack_cols, my.panels, at.keys, qkv, Block(k, W, 1, cols, hs))
        pair, shape = (at.rows, at.keys), (rows, cols, hs)
        _add_product(my, w, at.scores, n, True, pair, shape)
        for i in range(rows):
            low, end = _seen(first - u + 1 + i, cols, my.look)
            scores[i, :low] = 0
            if low < end:
                row = scores[i, low:cols]
                softmax_row(row, end - low, sums[i], state[i], my.look)
        weights = Block(at.scores, n, 1, rows, cols)
        values = Block(k + NKV * hs, 1, W, hs, cols)
        pack(code.pack_rows, my.panels, at.rows, w, weights)
        pack(code.pack_cols, my.panels, at.right, qkv, values)
        pair, shape = (at.rows, at.right), (rows, hs, cols)
        _add_product(my, w, at.sums, hs, False, pair, shape)
    for i in range(rows):
        t, total = first + i, state[i, 1]
        lse[b, h, t] = state[i, 0] + math.log(total)
        y = (b * T + t) * C + h * hs
        row = out[y : y + hs]
        for k in range(hs):
            row[k] = sums[i, k] / total


# the forward kernel
@team
def team_forward(part, parts, address):
    given = arguments(address)
    (out, lse, qkv), my = given[:3], _thread(part, given[3:])
    B, NH, T = lse.shape
    blocks = -(-T // my.sizes.block)
    for unit in range(part, B * NH * blocks, parts):
        b, h = unit // (NH * blocks), unit // blocks % NH
        first = unit % blocks * my.sizes.block
        _forward_block(out, lse, qkv, my, b, h, first)


# attention, forward
@shapes("B T C!, B NH|C T!, B T QKV", work=WORK)
def attention_forward(out, lse, inp, work=None, bf16=False):
    """Causal self-attention of NH heads.

    inp: (B, T, (NH + 2 NKV) * hs), the heads of queries, of keys and of
    values; NKV divides NH. Writes out (B, T, NH * hs) and lse (B, NH, T),
    the log-sum-exp of each row of scaled, masked scores, which the backward
    pass needs. All float32 or all float64 and C-contiguous. work: scratch
    of work_shape() and the same dtype, or None to allocate it. bf16: round
    the factors of every product to bfloat16, for float32 only. Raises
    TypeError or ValueError before it computes anything.

    Derived in chapter 2.5.
    """
    made = prepared("attention_forward", (out, lse, inp), (), work, bf16)
    team_forward(out.reshape(-1), lse, inp.reshape(-1), *made)


# what both kernels take
def look_of(hs, window=None, scale=None, softcap=None):
    """The Look of a rule, as a plain tuple."""
    scale = 1 / math.sqrt(hs) if scale is None else scale
    return int(window or FOREVER), float(scale), float(softcap or 0)


def prepared(layer, arrays, rule, work, bf16):
    """Heads, Look and Places, and the panels' scratch, as plain tuples.

    numba takes those from Python much faster than NamedTuples. arrays: out,
    lse and inp; layer: who is to blame for what does not fit. rule: window,
    scale and soft cap, each a number or None; () for GPT-2's.
    """
    out, lse, inp = arrays
    check_bf16(layer, bf16, inp.dtype)
    NH, NKV, hs = count_heads(layer, out, lse, inp)
    block = block_size(hs)
    sizes, at = (lse.shape[2], NH, NKV, hs, block), tuple(_places(block, hs))
    return sizes, look_of(hs, *rule), at, *scratch(work, bf16, lse.dtype)


# what the backward pass works on
class Arrays(NamedTuple):
    """The layer's arrays, flat."""

    dqkv: np.ndarray
    dout: np.ndarray
    qkv: np.ndarray
    out: np.ndarray
    lse: np.ndarray


class Meeting(NamedTuple):
    """A block of rows and a block of keys that it reads.

    Where queries, outputs, lse, keys and values begin in the flat arrays;
    how many positions lie from the first key to the first row's own; the
    numbers of rows and keys.
    """

    q: int
    y: int
    L: int
    k: int
    v: int
    before: int
    rows: int
    cols: int


# the softmax of a row, backward
@inlined
def _softmax_row_backward(scores, grads, seen, y, dy, L, look):
    """Products to weights, their gradients to dS; masked ones to 0."""
    number = scores.dtype.type
    scale, cap, D = number(look.scale), number(look.cap), number(0)
    for k in range(y.size):
        D += y[k] * dy[k]
    if cap > 0:
        for j in range(seen):
            t = fast_tanh(scores[j] * scale / cap)
            scores[j] = fast_exp(cap * t - L)
            slope = (number(1) - t * t) * scale
            grads[j] = scores[j] * (grads[j] - D) * slope
    else:
        for j in range(seen):
            scores[j] = fast_exp(scores[j] * scale - L)
            grads[j] = scores[j] * (grads[j] - D) * scale
    scores[seen:] = 0
    grads[seen:] = 0


# the weights of a block
@inlined
def _backward_scores(x, my, m):
    """A and dS of a Meeting; its keys and values are packed."""
    (_, NH, NKV, hs, n), at, w, code = my.sizes, my.at, my.w, my.code
    C, W, shape = NH * hs, (NH + 2 * NKV) * hs, (m.rows, m.cols, hs)
    query, dout = Block(m.q, W, 1, m.rows, hs), Block(m.y, C, 1, m.rows, hs)
    pack(code.pack_rows, my.panels, at.rows, x.qkv, query)
    _add_product(my, w, at.scores, n, True, (at.rows, at.keys), shape)
    pack(code.pack_rows, my.panels, at.rows, x.dout, dout)
    _add_product(my, w, at.grads, n, True, (at.rows, at.values), shape)
    scores, grads = _table(w, at.scores, n, n), _table(w, at.grads, n, n)
    for i in range(m.rows):
        low, end = _seen(m.before + i, m.cols, my.look)
        scores[i, :low] = 0
        grads[i, :low] = 0
        s, ds, y = scores[i, low : m.cols], grads[i, low : m.cols], m.y + i * C
        out, dout, L = x.out[y : y + hs], x.dout[y : y + hs], x.lse[m.L + i]
        seen = max(0, end - low)
        _softmax_row_backward(s, ds, seen, out, dout, L, my.look)


# the gradients of a block
@inlined
def _backward_sums(x, my, m, fresh_keys, fresh_rows):
    """The last three products of (2.5.3); fresh: written, not added to."""
    (_, NH, NKV, hs, n), at, w, code = my.sizes, my.at, my.w, my.code
    C, W, shape = NH * hs, (NH + 2 * NKV) * hs, (m.cols, hs, m.rows)
    pair = at.rows, at.right
    weights = Block(at.scores, 1, n, m.cols, m.rows)
    pack(code.pack_rows, my.panels, at.rows, w, weights)
    dout = Block(m.y, 1, C, hs, m.rows)
    pack(code.pack_cols, my.panels, at.right, x.dout, dout)
    _add_product(my, x.dqkv, m.v, W, fresh_keys, pair, shape)
    dscores = Block(at.grads, 1, n, m.cols, m.rows)
    pack(code.pack_rows, my.panels, at.rows, w, dscores)
    query = Block(m.q, 1, W, hs, m.rows)
    pack(code.pack_cols, my.panels, at.right, x.qkv, query)
    _add_product(my, x.dqkv, m.k, W, fresh_keys, pair, shape)
    dscores = Block(at.grads, n, 1, m.rows, m.cols)
    pack(code.pack_rows, my.panels, at.rows, w, dscores)
    pair, shape = (at.rows, at.transposed), (m.rows, hs, m.cols)
    _add_product(my, x.dqkv, m.q, W, fresh_rows, pair, shape)


# a head, backward
@inlined
def _backward_head(x, my, b, kv, add):
    """Head kv of keys and values, and all heads of queries that read it."""
    (T, NH, NKV, hs, n), at, cols = my.sizes, my.at, my.code.pack_cols
    C, W, group = NH * hs, (NH + 2 * NKV) * hs, NH // NKV
    for u in range(0, T, n):
        count, k = min(n, T - u), (b * T + u) * W + (NH + kv) * hs
        v, keys = k + NKV * hs, Block(k, W, 1, count, hs)
        pack(cols, my.panels, at.keys, x.qkv, keys)
        pack(cols, my.panels, at.values, x.qkv, Block(v, W, 1, count, hs))
        keys = Block(k, 1, W, hs, count)
        pack(cols, my.panels, at.transposed, x.qkv, keys)
        for h in range(kv * group, kv * group + group):
            for t in range(u, min(T, u + count - 1 + my.look.window), n):
                row, rows = b * T + t, min(n, T - t)
                q, y, L = row * W + h * hs, row * C + h * hs, (b * NH + h) * T
                m = Meeting(q, y, L + t, k, v, t - u + 1, rows, count)
                _backward_scores(x, my, m)
                first = t == u and h == kv * group
                fresh = u == _first_block(t, my)
                _backward_sums(x, my, m, not add and first, not add and fresh)


# the backward kernel
@team
def team_backward(part, parts, address):
    given = arguments(address)
    dqkv, dout, qkv, out, lse, add = given[:6]
    x, my = Arrays(dqkv, dout, qkv, out, lse), _thread(part, given[6:])
    T, NH, NKV = my.sizes[:3]
    for unit in range(part, lse.size // (NH * T) * NKV, parts):
        _backward_head(x, my, unit // NKV, unit % NKV, add)


# attention, backward
@shapes("B T QKV!, B T C, B T QKV, B T C, B NH|C T", work=WORK)
def attention_backward(
    dinp, dout, inp, out, lse, add=True, work=None, bf16=False
):
    """Add attention's gradient to dinp.

    dinp, inp: (B, T, (NH + 2 NKV) * hs). dout, out: (B, T, NH * hs). lse:
    (B, NH, T). out and lse are as the forward pass left them. All float32
    or all float64 and C-contiguous. add: False overwrites dinp instead of
    adding. work, bf16: as in attention_forward. Raises TypeError or
    ValueError before it computes anything.

    Derived in chapter 2.5.
    """
    made = prepared("attention_backward", (out, lse, inp), (), work, bf16)
    flat = (x.reshape(-1) for x in (dinp, dout, inp, out, lse))
    team_backward(*flat, add, *made)
