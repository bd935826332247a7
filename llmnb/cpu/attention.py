# Written by `make export` from notebooks/2_cpu/05_attention.py: edit that file.

"""Attention in blocks with an online softmax, for the processor's cores."""

__all__ = [
    "attention_backward",
    "attention_forward",
]


# imports of the kernels
import math

import numba
import numpy as np

from llmnb.cpu.jit import arguments, inlined, team
from llmnb.cpu.math import fast_exp
from llmnb.cpu.panels import (
    SPARE,
    WORK,
    check_bf16,
    multiply_panels,
    pack,
    scratch,
)
from llmnb.cpu.tile import COLS, ROWS
from llmnb.reference.attention import count_heads
from llmnb.shapes import shapes


# places in the scratch memory
BLOCK = 96  # rows, and keys, that are taken at once
ZEROS = SPARE + ROWS * COLS  # in work: a row of zeros


def _places(block, hs):
    """Offsets in a thread's scratch of the panels and tables, and its end.

    Panels of rows: queries (later weights), gradients. Panels of columns:
    keys, values, their transposes. Tables: scores, their gradients, output.
    """
    tall, wide = (-(-block // n) * n for n in (ROWS, COLS))
    deep = max(block, hs)
    head = -(-hs // COLS) * COLS
    sizes = [tall * deep, wide * hs, wide * hs, head * block, head * block]
    sizes += [block * block, block * block, block * (hs + 2)]
    return tuple(int(n) for n in np.cumsum([0, *sizes]))


def block_size(hs):
    """The largest block that fits."""
    block = BLOCK
    while block and _places(block, hs)[-1] > SPARE:
        block //= 2
    if not block:
        raise ValueError(f"attention: a head of {hs} channels is too wide")
    return block


# a product of two panels
@inlined
def _add_product(code, out, at, step, fresh, panels, a, b, sizes, w):
    """Add a product to the block of out that begins at `at`, or write it."""
    place, start = (at, step, at, step, 1, ZEROS, 0), out
    if fresh:
        place, start = (at, step, ZEROS, 0, 0, ZEROS, 0), w
    spare = w[SPARE:]
    multiply_panels(code[2], out, place, start, w, panels, a, b, sizes, spare)


# one row of the softmax
@inlined
def _softmax_row(scores, seen, top, scale):
    """Scores to exponentials; returns the new maximum and their sum."""
    total, largest = scores.dtype.type(0), scores[0]
    for j in range(seen):
        largest = max(largest, scores[j])
    top = max(top, largest * scale)
    for j in range(seen):
        scores[j] = fast_exp(scores[j] * scale - top)
        total += scores[j]
    scores[seen:] = 0
    return top, total


# the softmax of a block
@inlined
def softmax_block(w, s, acc, first, rows, cols, n, hs, scale):
    """first: how many of the block's keys row 0 sees."""
    for i in range(rows):
        state, seen = acc + n * hs + 2 * i, min(cols, first + i)
        before, scores = w[state], w[s + i * n : s + i * n + cols]
        top, total = _softmax_row(scores, seen, before, scale)
        factor = fast_exp(before - top)
        w[state] = top
        w[state + 1] = w[state + 1] * factor + total
        out = w[acc + i * hs : acc + i * hs + hs]
        for k in range(hs):
            out[k] *= factor


# a block of rows, forward
@inlined
def _forward_block(out, lse, qkv, b, h, first, sizes, places, code, panels, w):
    T, NH, NKV, hs, n = sizes
    A, K, _, _, B, S, _, acc, _ = places
    C, W, rows = NH * hs, (NH + 2 * NKV) * hs, min(n, T - first)
    key = (NH + h * NKV // NH) * hs
    scale = w.dtype.type(1 / math.sqrt(hs))
    q = (b * T + first) * W + h * hs
    w[acc : acc + n * hs] = 0
    for i in range(rows):
        w[acc + n * hs + 2 * i] = -1e30
        w[acc + n * hs + 2 * i + 1] = 0
    for u in range(0, first + rows, n):
        cols, k = min(n, T - u), (b * T + u) * W + key
        pack(code[0], panels, A, qkv, q, W, 1, rows, hs)
        pack(code[1], panels, K, qkv, k, W, 1, cols, hs)
        _add_product(code, w, S, n, True, panels, A, K, (rows, cols, hs), w)
        seen = first - u + 1
        softmax_block(w, S, acc, seen, rows, cols, n, hs, scale)
        pack(code[0], panels, A, w, S, n, 1, rows, cols)
        pack(code[1], panels, B, qkv, k + NKV * hs, 1, W, hs, cols)
        _add_product(
            code, w, acc, hs, False, panels, A, B, (rows, hs, cols), w
        )
    for i in range(rows):
        t, state = first + i, acc + n * hs + 2 * i
        lse[b, h, t] = w[state] + math.log(w[state + 1])
        y, total = (b * T + t) * C + h * hs, w[state + 1]
        row, sums = out[y : y + hs], w[acc + i * hs : acc + i * hs + hs]
        for k in range(hs):
            row[k] = sums[k] / total


# the forward kernel
@team
def _attention_forward(part, parts, address):
    out, lse, qkv, sizes, places, code, panels, work = arguments(address)
    B, NH, T = lse.shape
    blocks = -(-T // sizes[4])
    w = work[part]
    w[ZEROS : ZEROS + COLS] = 0
    for unit in range(part, B * NH * blocks, parts):
        b, h = unit // (NH * blocks), unit // blocks % NH
        first = unit % blocks * sizes[4]
        _forward_block(
            *(out, lse, qkv, b, h, first),
            *(sizes, places, code, panels[part], w),
        )


# attention, forward
@shapes("B T C!, B NH|C T!, B T QKV", work=WORK)
def attention_forward(out, lse, inp, work=None, bf16=False):
    """Causal self-attention of NH heads.

    inp: (B, T, (NH + 2 NKV) * hs), the heads of queries, of keys and of
    values; NKV divides NH. Writes out (B, T, NH * hs) and lse (B, NH, T),
    the log-sum-exp of each row of scaled, masked scores, which the backward
    pass needs. All float32 or all float64
    and C-contiguous. work: scratch of work_shape() and the same dtype, or
    None to allocate it. bf16: round the factors of every product to
    bfloat16, for float32 only. Raises TypeError or ValueError before it
    computes anything.

    Derived in chapter 2.5.
    """
    check_bf16("attention_forward", bf16, inp.dtype)
    heads = count_heads("attention_forward", out, lse, inp)
    scratch = _scratch(heads, lse, work, bf16)
    _attention_forward(out.reshape(-1), lse, inp.reshape(-1), *scratch)


# what both kernels take
def _scratch(heads, lse, work, bf16):
    """T, heads and the size of a block; places; the panels' scratch."""
    NH, NKV, hs = heads
    block = block_size(hs)
    made = scratch(work, bf16, lse.dtype)
    return (lse.shape[2], NH, NKV, hs, block), _places(block, hs), *made


# the softmax of a block, backward
@inlined
def _softmax_row_backward(scores, grads, seen, y, dy, L, scale):
    """Scores to weights, their gradients to dS; masked ones to 0."""
    D = scores.dtype.type(0)
    for k in range(y.size):
        D += y[k] * dy[k]
    for j in range(seen):
        scores[j] = fast_exp(scores[j] * scale - L)
        grads[j] = scores[j] * (grads[j] - D) * scale
    scores[seen:] = 0
    grads[seen:] = 0


# all rows of a block
@inlined
def _weights_block(w, S, dS, dout, out, lse, y, C, hs, n, seen, rows, cols):
    """y: where the block's rows begin in dout and out; lse: theirs."""
    scale = w.dtype.type(1 / math.sqrt(hs))
    for i in range(rows):
        at = y + i * C
        _softmax_row_backward(
            *(
                w[S + i * n : S + i * n + cols],
                w[dS + i * n : dS + i * n + cols],
            ),
            *(min(seen + i, cols), out[at : at + hs], dout[at : at + hs]),
            *(lse[i], scale),
        )


# the weights of a block
@inlined
def _backward_scores(
    dout, qkv, out, lse, q, y, seen, sizes, places, code, panels, w
):
    """S and dS of a block of rows; its keys and values are packed."""
    C, W, hs, n, rows, cols = sizes
    A, K, V, _, _, S, dS, _, _ = places
    shape = rows, cols, hs
    pack(code[0], panels, A, qkv, q, W, 1, rows, hs)
    _add_product(code, w, S, n, True, panels, A, K, shape, w)
    pack(code[0], panels, A, dout, y, C, 1, rows, hs)
    _add_product(code, w, dS, n, True, panels, A, V, shape, w)
    shape = hs, n, seen, rows, cols
    _weights_block(w, S, dS, dout, out, lse, y, C, *shape)


# the gradients of a block
@inlined
def _backward_sums(
    dqkv, dout, qkv, q, k, v, y, fresh, sizes, places, code, panels, w
):
    """The last three products of (2.5.3); fresh: of keys, of queries."""
    C, step, hs, n, rows, cols = sizes
    A, _, _, KT, B, S, dS, _, _ = places
    shape = cols, hs, rows
    pack(code[0], panels, A, w, S, 1, n, cols, rows)
    pack(code[1], panels, B, dout, y, 1, C, hs, rows)
    _add_product(code, dqkv, v, step, fresh[0], panels, A, B, shape, w)
    pack(code[0], panels, A, w, dS, 1, n, cols, rows)
    pack(code[1], panels, B, qkv, q, 1, step, hs, rows)
    _add_product(code, dqkv, k, step, fresh[0], panels, A, B, shape, w)
    pack(code[0], panels, A, w, dS, n, 1, rows, cols)
    shape = rows, hs, cols
    _add_product(code, dqkv, q, step, fresh[1], panels, A, KT, shape, w)


# a head, backward
@inlined
def _backward_head(
    dqkv, dout, qkv, out, lse, b, kv, add, sizes, places, code, panels, w
):
    """Head kv of keys and values, and all heads of queries that read it."""
    T, NH, NKV, hs, n = sizes
    _, K, V, KT, _, _, _, _, _ = places
    C, W, group = NH * hs, (NH + 2 * NKV) * hs, NH // NKV
    for u in range(0, T, n):
        cols, k = min(n, T - u), (b * T + u) * W + (NH + kv) * hs
        v = k + NKV * hs
        pack(code[1], panels, K, qkv, k, W, 1, cols, hs)
        pack(code[1], panels, V, qkv, v, W, 1, cols, hs)
        pack(code[1], panels, KT, qkv, k, 1, W, hs, cols)
        for h in range(kv * group, kv * group + group):
            for t in range(u, T, n):
                shape = C, W, hs, n, min(n, T - t), cols
                q, y = (b * T + t) * W + h * hs, (b * T + t) * C + h * hs
                L, seen = lse[b, h, t:], t - u + 1
                _backward_scores(
                    *(dout, qkv, out, L, q, y, seen),
                    *(shape, places, code, panels, w),
                )
                first = t == u and h == kv * group
                fresh = not add and first, not add and u == 0
                _backward_sums(
                    *(dqkv, dout, qkv, q, k, v, y, fresh),
                    *(shape, places, code, panels, w),
                )


# the backward kernel
@team
def _attention_backward(part, parts, address):
    given = arguments(address)
    dqkv, dout, qkv, out, lse, add = given[:6]
    sizes, places, code, panels, work = given[6:]
    units = len(lse) * sizes[2]
    w = work[part]
    w[ZEROS : ZEROS + COLS] = 0
    for unit in range(part, units, parts):
        b, kv = unit // sizes[2], unit % sizes[2]
        _backward_head(
            *(dqkv, dout, qkv, out, lse, b, kv, add),
            *(sizes, places, code, panels[part], w),
        )


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
    check_bf16("attention_backward", bf16, inp.dtype)
    heads = count_heads("attention_backward", out, lse, inp)
    scratch = _scratch(heads, lse, work, bf16)
    flat = (x.reshape(-1) for x in (dinp, dout, inp, out))
    _attention_backward(*flat, lse, add, *scratch)
