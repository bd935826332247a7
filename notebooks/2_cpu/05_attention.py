# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       cpu.attention: "Attention in blocks with an online softmax, for the processor's cores."
# ---

# %% [markdown]
# # Attention on a CPU: blocks, and a softmax without its row
#
# > A running maximum and sum give a softmax of a row that never stands in
# > memory; in blocks, all of attention is products of small matrices.
#
# *Reading time: 30 minutes. You need: [chapter 1.8](../1_by_hand/08_attention.ipynb),
# the compiler of [chapter 2.1](01_compile.ipynb) and the panels of
# [chapter 2.4](04_matmul.ipynb).*

# %% [markdown]
# ## Where we are
#
# At the end of this chapter you can
#
# - compute a softmax over a row that you never hold in memory;
# - write attention, forward and backward, as products of blocks that stay in a
#   core's cache;
# - say who owns which sum, so that no thread waits and every run is the same.

# %% [markdown]
# ## Setup

# %% setup
from types import SimpleNamespace

import numpy as np

from llmnb.book.verify import compare, verdict
import numba
from llmnb.reference.attention import attention_backward as backward_numpy
from llmnb.reference.attention import attention_forward as forward_numpy
from llmnb.timing import fastest, machine

rng = np.random.default_rng(6)
reference = SimpleNamespace(forward=forward_numpy, backward=backward_numpy)

# %% [markdown]
# ## What NumPy wastes
#
# NumPy computes the square of scores whole, though nearly half of it is
# masked; it writes it to memory and reads it back for every step of the
# softmax. We want one pass, the triangle only, and no square. Two pieces are
# missing: a softmax that does not need its row, and a way to share out the work.
# The exponential is that of [chapter 2.2](02_rows.ipynb).

# %% [markdown]
# ## A softmax without its row
#
# (1.8.4) needs the row's maximum before the first exponential. But a maximum
# found so far, $m$, will do if we repair what we have when a larger one
# comes along. Keep three things for a row: $m$, the sum $\ell = \sum
# e^{s_u - m}$ and the unfinished output $\omega_i = \sum e^{s_u - m}\,
# v_{ui}$, over the positions seen. A new group of scores arrives, with the
# maximum $m'$ of old and new together. All that was summed carries the
# factor $e^{-m}$ and should carry $e^{-m'}$, so multiply it by $e^{m - m'}$:
#
# $$ \ell \leftarrow e^{m - m'} \ell + \sum_{u \text{ new}} e^{s_u - m'} ,
#    \qquad
#    \omega_i \leftarrow e^{m - m'} \omega_i
#      + \sum_{u \text{ new}} e^{s_u - m'} v_{ui} . \tag{2.5.1} $$
#
# At the end of the row
#
# $$ o_i = \omega_i / \ell , \qquad L = m + \log \ell . \tag{2.5.2} $$
#
# This is called *online softmax*. In NumPy, four scores at a time:


# %% online softmax
def online(scores, values, group=4):
    m, total, out = -1e30, 0.0, np.zeros(values.shape[1])
    for u in range(0, len(scores), group):
        s, v = scores[u : u + group], values[u : u + group]
        new = max(m, s.max())
        e = np.exp(s - new)
        total = np.exp(m - new) * total + e.sum()
        out = np.exp(m - new) * out + e @ v
        m = new
    return out / total, m + np.log(total)


scores, values = 30 * rng.normal(size=50), rng.normal(size=(50, 3))
o, L = online(scores, values)
e = np.exp(scores - scores.max())
compare("output", o, e @ values / e.sum(), tol=1e-12)
compare("log-sum-exp", L, scores.max() + np.log(e.sum()), tol=1e-12)

# %% [markdown]
# ## First version: a row at a time
#
# A thread takes a row and walks over the keys before it in groups of 64:
# 64 dot products, 64 exponentials, 64 additions to the row of `out`, which
# holds $\omega$ until the end. The last group ends at the row's own
# position, which is the causal mask. Seen as (B·T, 3·NH, hs), `inp` has a
# position's query of head $h$ in slot $h$, its key in slot $NH + h$ and its
# value in slot $2 NH + h$.


# %% first version, one row
import math

import numba

from llmnb.cpu.jit import inner
from llmnb.cpu.math import fast_exp


@inner
def one_row(out, scores, qkv, row, h, NH, first, last, scale):
    """Row `row` of head h, over positions first to last: (2.5.1), (2.5.2)."""
    m, total = scores.dtype.type(-1e30), scores.dtype.type(0)
    y = out[row, h]
    for u in range(first, last, 64):
        n = min(64, last - u)
        new = m
        for j in range(n):
            dot = scores.dtype.type(0)
            for i in range(y.size):
                dot += qkv[row, h, i] * qkv[u + j, NH + h, i]
            scores[j] = dot * scale
            new = max(new, scores[j])
        factor, m = fast_exp(m - new), new
        total *= factor
        for i in range(y.size):
            y[i] *= factor
        for j in range(n):
            e = fast_exp(scores[j] - m)
            total += e
            for i in range(y.size):
                y[i] += e * qkv[u + j, 2 * NH + h, i]
    for i in range(y.size):
        y[i] /= total


# %% first version, all rows
@numba.njit(parallel=True, fastmath=True, error_model="numpy")
def all_rows(out, qkv, T):
    NH, hs = out.shape[1:]
    scale = out.dtype.type(1 / math.sqrt(hs))
    for row in numba.prange(out.shape[0]):
        scores, first = np.empty(64, out.dtype), row // T * T
        out[row] = 0
        for h in range(NH):
            one_row(out, scores, qkv, row, h, NH, first, row + 1, scale)


def first_version(out, lse, inp):
    NH, rows = lse.shape[1], inp.shape[0] * inp.shape[1]
    heads = out.reshape(rows, NH, -1)
    all_rows(heads, inp.reshape(rows, 3 * NH, -1), inp.shape[1])


B, T, NH, C = 2, 5, 3, 12
inp = rng.normal(size=(B, T, 3 * C))
out, lse = np.empty((B, T, C)), np.empty((B, NH, T))
reference.forward(out, lse, inp)
check = np.empty_like(out)
first_version(check, lse, inp)
compare("first version", check, out, tol=1e-12)

# %% [markdown]
# No square is stored, and the masked half is never computed. But the inner
# loops are as short as a head, each dot product ends with a sum across the
# lanes of a vector, for which such units are not made, and a key is loaded
# anew for every row.
#
# ## Second version: blocks of rows
#
# [Chapter 2.4](04_matmul.ipynb) has the cure, if we can say attention in
# matrix products. Take 96 rows at once, and the keys in groups of 96. The
# scores of such a block are a product, $S = Q K^\top$, and so is what
# the group adds to the output, $\Omega \mathrel{+}= E V$ with $E = e^{S -
# m}$. Between the two stands (2.5.1), for 96 rows. Everything that a block
# needs, 96 by 96 scores and a few panels, fits in the second-level cache of
# a core. Blocks right of the diagonal are skipped; in the blocks on the
# diagonal the masked scores are computed and then set to zero.
#
# We use the pieces of [appendix A.3](../appendix/03_panels.ipynb): the routines that pack rows, pack columns
# and multiply panels, on flat arrays by offset and step. `code` holds their
# addresses.
# All scratch lies in the thread's own row of `work`, which the products of
# the linear layers use too, though not at the same time.

# %% imports of the kernels tags=["export"] module="cpu.attention"
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

# %% [markdown]
# The places of the panels and tables in a thread's scratch. A panel takes
# whole tiles, so sizes are rounded up.

# %% places in the scratch memory tags=["exporti"] module="cpu.attention"
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


# %% a product of two panels tags=["exporti"] module="cpu.attention"
@inlined
def _add_product(code, out, at, step, fresh, panels, a, b, sizes, w):
    """Add a product to the block of out that begins at `at`, or write it."""
    place, start = (at, step, at, step, 1, ZEROS, 0), out
    if fresh:
        place, start = (at, step, ZEROS, 0, 0, ZEROS, 0), w
    spare = w[SPARE:]
    multiply_panels(code[2], out, place, start, w, panels, a, b, sizes, spare)


# %% [markdown]
# The softmax of a block. `w` is the thread's scratch. Row `i` of the scores
# begins at `s + i * n`; its maximum and sum so far follow the table of
# outputs. A row sees `seen` of the block's keys, which on the diagonal is
# one more for each row.


# %% one row of the softmax tags=["exporti"] module="cpu.attention"
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


# %% the softmax of a block tags=["exporti"] module="cpu.attention"
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


# %% a block of rows, forward tags=["exporti"] module="cpu.attention"
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


# %% [markdown]
# A late block has more keys to read than an early one. Each thread takes
# every second block, or every third, as many as there are threads: long and
# short ones come out evenly, and which thread has a block changes nothing
# in it.


# %% the forward kernel tags=["exporti"] module="cpu.attention"
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


# %% [markdown]
# The public function checks, and finds sizes, places and scratch memory.


# %% attention, forward tags=["export"] module="cpu.attention"
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
    """
    check_bf16("attention_forward", bf16, inp.dtype)
    heads = count_heads("attention_forward", out, lse, inp)
    scratch = _scratch(heads, lse, work, bf16)
    _attention_forward(out.reshape(-1), lse, inp.reshape(-1), *scratch)


# %% what both kernels take tags=["exporti"] module="cpu.attention"
def _scratch(heads, lse, work, bf16):
    """T, heads and the size of a block; places; the panels' scratch."""
    NH, NKV, hs = heads
    block = block_size(hs)
    made = scratch(work, bf16, lse.dtype)
    return (lse.shape[2], NH, NKV, hs, block), _places(block, hs), *made


# %% [markdown]
# ## Backward in blocks
#
# Row $t$ of the triangle adds to $dq_t$ and to $dk_u$, $dv_u$ of every
# $u \le t$. If two threads shared a head, they would add to the same rows
# in an order that changes from run to run. So a thread takes a head of keys
# and values whole, with all heads of queries that read it, and the order is
# that of its loops. The price: no more threads can work than there are such
# heads in the batch, $B \cdot NKV$.
#
# For a block of rows and a block of keys, (1.8.1), (1.8.6), (1.8.5)
# and (1.8.10) are five products:
#
# $$ S = Q K^\top / \sqrt{hs} , \quad dA = dO\, V^\top , \quad
#    dV \mathrel{+}= A^\top dO , \quad dK \mathrel{+}= dS^\top Q , \quad
#    dQ \mathrel{+}= dS\, K , \tag{2.5.3} $$
#
# with $A = e^{S - L}$ and $dS = A \circ (dA - D) / \sqrt{hs}$ in
# between; the scale of $S$ is applied with the exponential. A transpose costs nothing: packing takes the same table with its
# two steps exchanged.


# %% the softmax of a block, backward tags=["exporti"] module="cpu.attention"
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


# %% all rows of a block tags=["exporti"] module="cpu.attention"
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


# %% the weights of a block tags=["exporti"] module="cpu.attention"
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


# %% the gradients of a block tags=["exporti"] module="cpu.attention"
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


# %% a head, backward tags=["exporti"] module="cpu.attention"
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


# %% [markdown]
# A key block first meets the rows of its own block, and a row block first
# meets key block 0. With `add=False` the first meeting writes and the later
# ones add, so nobody has to clear the gradient before.


# %% the backward kernel tags=["exporti"] module="cpu.attention"
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


# %% attention, backward tags=["export"] module="cpu.attention"
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
    """
    check_bf16("attention_backward", bf16, inp.dtype)
    heads = count_heads("attention_backward", out, lse, inp)
    scratch = _scratch(heads, lse, work, bf16)
    flat = (x.reshape(-1) for x in (dinp, dout, inp, out))
    _attention_backward(*flat, lse, add, *scratch)


# %% [markdown]
# The verdicts: a small problem in float64, four heads of queries with two
# of keys and values, then one in float32
# whose sizes divide nothing and whose rows span several blocks.


# %% a problem of any size
def problem(B, T, NH, hs, dtype=np.float32, NKV=None):
    p = SimpleNamespace()
    width = (NH + 2 * (NKV or NH)) * hs
    p.inp = rng.normal(size=(B, T, width)).astype(dtype)
    p.dinp = np.zeros_like(p.inp)
    p.dout = rng.normal(size=(B, T, NH * hs)).astype(dtype)
    p.out, p.lse = np.zeros_like(p.dout), np.zeros((B, NH, T), dtype)
    return p


def forward_and_backward(p, layer):
    layer.forward(p.out, p.lse, p.inp)
    layer.backward(p.dinp, p.dout, p.inp, p.out, p.lse)


cpu = SimpleNamespace(forward=attention_forward, backward=attention_backward)

# %% the same gradient from the kernels
p = problem(2, 5, 4, 3, np.float64, NKV=2)
forward_and_backward(p, cpu)
got = p.out.copy(), p.dinp.copy()
p.dinp[...] = 0
forward_and_backward(p, reference)
compare("out", got[0], p.out, tol=1e-12)
compare("dinp", got[1], p.dinp, tol=1e-12)

# %% float32, odd sizes
p = problem(2, 151, 3, 17)
forward_and_backward(p, cpu)
got = {name: getattr(p, name).copy() for name in ("out", "lse", "dinp")}
p.dinp[...] = 0
forward_and_backward(p, reference)
for name in got:
    compare(name, got[name], getattr(p, name), tol=1e-5)

# %% one thread or all, the same bits
threads = numba.get_num_threads()
numba.set_num_threads(1)
p.dinp[...] = 0
forward_and_backward(p, cpu)
numba.set_num_threads(threads)
same = all(np.array_equal(getattr(p, name), got[name]) for name in got)
verdict("one thread", same, "gives the same bits")

# %% a number of heads that does not fit
try:
    attention_forward(p.out, np.zeros((2, 4, 151), np.float32), p.inp)
except ValueError as error:
    print(error)

# %% [markdown]
# And the time, at the shape of one layer of GPT-2 124M, for four sequences of
# 64 positions and for one of 1024.


# %% NumPy against the kernels tags=["nbval-ignore-output"]
def race(p):
    """Milliseconds of NumPy and of both versions."""
    rows = [("forward, NumPy", reference.forward, p.out, p.lse, p.inp)]
    rows += [("first version", first_version, p.out, p.lse, p.inp)]
    rows += [("second version", cpu.forward, p.out, p.lse, p.inp)]
    args = p.dinp, p.dout, p.inp, p.out, p.lse
    rows += [("backward, NumPy", reference.backward, *args)]
    rows += [("second version", cpu.backward, *args)]
    p.seconds = [fastest(f, *args, runs=5) for _, f, *args in rows]
    for (name, *_), seconds in zip(rows, p.seconds, strict=True):
        print(f"{name:<16} {seconds * 1e3:7.1f} ms")


print(f"{machine()}, {numba.get_num_threads()} threads")
for B, T in ((4, 64), (1, 1024)):
    print(f"B = {B}, T = {T}")
    long = problem(B, T, 12, 64)
    race(long)

# %% [markdown]
# At 1024 positions a square takes 50 MB, and NumPy moves it through memory
# many times. The first version has no square either, and here it is no faster:
# what counts is that the second one computes in products of panels. At 64 positions one block holds a
# whole head: half of its scores are computed to be set to zero.

# %% [markdown]
# ## Count it
#
# A head has $T(T+1)/2$ pairs $(t, u)$. Forward takes $2\,hs$ operations a
# pair for the score and $2\,hs$ for the output; backward, by (2.5.3), five
# such sums. The exponential adds about 25 operations a pair, once in forward
# and once in backward. The bytes are few: for each block of 96 rows the keys
# and values of a head pass by once.

# %% predicted work and intensity
B, T, NH, hs = 1, 1024, 12, 64
pairs = B * NH * T * (T + 1) // 2
forward_flops = (4 * hs + 25) * pairs
backward_flops = (10 * hs + 25) * pairs
forward_bytes = 4 * 2 * hs * pairs // 96
print(f"forward  {forward_flops / 1e9:.2f} GFLOP")
print(f"backward {backward_flops / 1e9:.2f} GFLOP")
print(f"forward  {forward_flops / forward_bytes:.0f} FLOP a byte")

# %% [markdown]
# With so many operations a byte, arithmetic decides, and its limit is the
# FMA peak of [chapter 2.4](04_matmul.ipynb).

# %% predicted against measured time tags=["nbval-ignore-output"]
from llmnb.bench.peak import fma_peak

peak = fma_peak()
print(f"FMA peak: {peak / 1e9:.0f} GFLOP/s")
for name, flops, seconds in (
    ("forward", forward_flops, long.seconds[2]),
    ("backward", backward_flops, long.seconds[4]),
):
    print(f"{name:<8} predicted {flops / peak * 1e3:6.1f} ms", end=", ")
    print(f"measured {seconds * 1e3:6.1f} ms")

# %% [markdown]
# What stands between: the masked part of the blocks on the diagonal, the
# packing of 96 by 64 numbers for products of 96 by 96 by 64, and the
# exponentials, which are not all FMAs.

# %% [markdown]
# ## Take away
#
# - A running maximum and sum give a softmax without its row, so no array
#   of size T × T exists.
# - In blocks, attention is five products of small matrices backward and two
#   forward; what makes products fast makes attention fast.
# - A thread that owns a head of keys and values adds to their gradients in one
#   order.
#
# ## Design note
#
# A thread that owns a whole head adds to $dk$ and $dv$ in the order of its
# loops. The price is that heads may be few: with one sequence and 12 heads a
# machine of 64 cores leaves 52 of them idle in this layer. Two sweeps, one by
# rows for $dq$ and one by columns for $dk$ and $dv$, would keep them all
# busy, with seven products instead of five. The other way out is to let
# threads add to shared memory under a lock or with atomic instructions. It
# makes the last bits depend on who came first, and then a run that is resumed
# is not the run that was interrupted.

# %% [markdown]
# ## Exercises
#
# **1** (★★). A text is too long for one machine's memory, so two machines
# hold half of the keys and values each. Both get the query, and each sends
# back its output $o$ and its log-sum-exp $L$ over its own half. Combine the
# two into the output over all keys.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# Over half 1, $\omega^{(1)}_i = e^{L_1} o^{(1)}_i$ is the sum of
# $e^{s_u} v_{ui}$ and $e^{L_1}$ the sum of $e^{s_u}$. Both add up:
# $o = (e^{L_1} o^{(1)} + e^{L_2} o^{(2)}) / (e^{L_1} + e^{L_2})$. Subtract
# the larger of the two from both exponents, as ever.
# :::


# %% exercise 1, two halves merged tags=["hide-cell"]
def merge(o1, L1, o2, L2):
    L = np.logaddexp(L1, L2)
    return np.exp(L1 - L) * o1 + np.exp(L2 - L) * o2, L


# %% exercise 1, checked
scores, values = 30 * rng.normal(size=50), rng.normal(size=(50, 3))
halves = online(scores[:20], values[:20]), online(scores[20:], values[20:])
o, L = merge(*halves[0], *halves[1])
compare("merged o", o, online(scores, values)[0], tol=1e-12)
compare("merged L", L, online(scores, values)[1], tol=1e-12)

# %% [markdown]
# ## Further reading
#
# - Milakov and Gimelshein (2018),
#   [Online normalizer calculation for softmax](https://arxiv.org/abs/1805.02867):
#   the running maximum and sum of (2.5.1).
# - Dao et al. (2022),
#   [FlashAttention](https://arxiv.org/abs/2205.14135): the blocks of this
#   chapter on a GPU, with the traffic between memories counted.
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("2.5")
