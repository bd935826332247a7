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
# - say who owns which sum, so that every run has the same bits.

# %% [markdown]
# ## Setup

# %% setup
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np

from llmnb.book.diagram import PALETTE
from llmnb.book.moving import moving
from llmnb.book.verify import compare, verdict
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
# softmax. We want one pass, the triangle only, and no square. What is missing
# is a softmax that does not need its row, and a way to share out the work.
#
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
# $$ \begin{aligned}
#    \ell &\leftarrow e^{m - m'} \ell + \sum_{u \text{ new}} e^{s_u - m'} , \\
#    \omega_i &\leftarrow e^{m - m'} \omega_i
#      + \sum_{u \text{ new}} e^{s_u - m'} v_{ui} .
#    \end{aligned} \tag{2.5.1} $$
#
# At the end of the row
#
# $$ o_i = \omega_i / \ell , \qquad L = m + \log \ell . \tag{2.5.2} $$
#
# This is called *online softmax*. In NumPy, four scores at a time. Before the
# first score there is no maximum. $m = -10^{30}$ stands in for it: it is lower
# than any score, so the first group replaces it, and $e^{m - m'}$ is then 0. It
# is not $-\infty$, because $\infty - \infty$ is no number, and because the
# kernels are compiled under the assumption that no infinity occurs
# ([chapter A.4](../appendix/04_kernels.ipynb)).


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

# %% a row of sixteen scores, in four groups
row = np.array([1, 0.2, 1.5, 0.4, 2.6, 0.9, 1.8, 0.1] * 2)
row[8:] += [-1, 0.4, -1.3, 0, 1.4, -0.3, -1.2, 1]
groups = row.reshape(4, 4)
tops = np.maximum.accumulate(groups.max(axis=1))
sums, sizes = 0.0, []
for g, m in enumerate(tops):
    factor = np.exp(tops[g - 1] - m) if g else 0.0
    new = np.exp(groups[g] - m).sum()
    sums = factor * sums + new
    sizes.append((factor, sums - new, new))

# %% draw the row
fig, (ax, below) = plt.subplots(
    2, 1, figsize=(8, 4.2), dpi=100, sharex=True, height_ratios=(3, 2)
)
shades = [PALETTE["blue"] if x < tops[i // 4] else PALETTE["orange"]
          for i, x in enumerate(row)]  # fmt: skip
ax.bar(range(16), row, color=shades)
ax.step(np.arange(-0.5, 16, 4), [*tops, tops[-1]], where="post",
        color=PALETTE["ink"], label="m, the maximum so far")  # fmt: skip
ax.set(ylabel="score", ylim=(0, 4.9), xticks=range(16))
ax.legend(loc="upper left", frameon=False)
for g, (factor, old, new) in enumerate(sizes):
    below.bar(4 * g + 1.5, old, 2.4, color=PALETTE["grey"])
    below.bar(4 * g + 1.5, new, 2.4, bottom=old, color=PALETTE["green"])
    text = f"old times {factor:.2f}" if g else "nothing is old"
    below.text(4 * g + 1.5, old + new + 0.2, text, ha="center", size=9)
below.set(xlabel="key, in groups of four", ylabel="sum", ylim=(0, 5.4))
for a in (ax, below):
    a.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()
moving("softmax", "group by group", row=row.round(1).tolist(), group=4)

# %% [markdown]
# *Figure 2.5.1. A row of sixteen scores, in four groups. A group with a larger
# score raises $m$, and what was summed before is multiplied by $e^{m - m'}$; one
# without leaves the old sum as it is. Each group then adds its own exponentials, all
# of them at most 1. At no time does anyone hold more than a group of scores and the
# sums.*
#
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
# scores of such a block are a product, $S = Q K^\top / \sqrt{hs}$, and so is what
# the group adds to the output, $\Omega \mathrel{+}= E V$ with $E = e^{S -
# m}$. Between the two stands (2.5.1), for 96 rows. Everything that a block
# needs, 96 by 96 scores and a few panels, fits in the second-level cache of
# a core. Blocks right of the diagonal are skipped; in the blocks on the
# diagonal the masked scores are computed and then set to zero.
#
# We use the pieces of [chapter A.3](../appendix/03_panels.ipynb): the routines
# that pack rows, pack columns and multiply panels, on flat arrays by offset and
# step. `code` holds their addresses. All scratch lies in the thread's own row of
# `work`, which the products of the linear layers use too, though not at the same
# time.

# %% imports of the kernels tags=["export"] module="cpu.attention"
import math
from typing import NamedTuple

import numpy as np

from llmnb.cpu.jit import arguments, inlined, team
from llmnb.cpu.math import fast_exp, fast_tanh, larger
from llmnb.cpu.microkernel import Place
from llmnb.cpu.panels import (
    ALL, SPARE, WORK, Ahead, Block, Flat, Routines, check_bf16,
    multiply_panels, pack, scratch,
)  # fmt: skip
from llmnb.cpu.tile import COLS, ROWS
from llmnb.reference.attention import count_heads
from llmnb.shapes import shapes

# %% [markdown]
# The places of the panels and tables in a thread's scratch. A panel takes
# whole tiles, so sizes are rounded up.


# %% places in the scratch memory tags=["exporti"] module="cpu.attention"
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


# %% [markdown]
# What a kernel works with, under names. `Heads` are the sizes that a call has;
# `Thread` is what a thread needs besides the arrays of the layer. In GPT-2 a
# query sees all keys before it. [Chapter 5.4](../5_modern/04_attention.ipynb)
# calls these kernels for models whose queries see fewer, or whose scores are
# kept small: a `Look` says how, and here it says that nothing is left out.


# %% what a thread works with tags=["exporti"] module="cpu.attention"
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


# %% a product of two panels tags=["exporti"] module="cpu.attention"
@inlined
def _add_product(my, out, at, step, fresh, pair, sizes):
    """Add a product to the block of out that begins at `at`, or write it."""
    place, start = Place(at, step, at, step, 1, ZEROS, 0), out
    if fresh:
        place, start = Place(at, step, ZEROS, 0, 0, ZEROS, 0), my.w
    x = Flat(out, start, my.w, my.panels, my.w[SPARE:])
    nothing, sizes = Ahead(np.int64(my.w.ctypes.data), 0, 0), (*sizes, ALL)
    multiply_panels(my.code.multiply, x, place, pair, sizes, nothing)


# %% [markdown]
# (2.5.1) for one row. It sees the first `seen` of the scores; `sums` is
# $\omega$, and `state` holds $m$ and $\ell$.


# %% one row of the softmax tags=["exporti"] module="cpu.attention"
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


# %% [markdown]
# A block of rows goes over its keys, block by block: pack, multiply, softmax,
# pack the weights, multiply. On the diagonal each row sees one key more than
# the row before; at the window's edge it may see none of a block.


# %% the keys of a block that a row sees tags=["exporti"] module="cpu.attention"
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


# %% a block of rows, forward tags=["exporti"] module="cpu.attention"
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


# %% [markdown]
# A late block has more keys to read than an early one. Each thread takes
# every second block, or every third, as many as there are threads: long and
# short ones come out evenly, and which thread has a block changes nothing
# in it.


# %% the forward kernel tags=["exporti"] module="cpu.attention"
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


# %% attention, forward tags=["export"] module="cpu.attention"
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
    """
    made = prepared("attention_forward", (out, lse, inp), (), work, bf16)
    team_forward(out.reshape(-1), lse, inp.reshape(-1), *made)


# %% what both kernels take tags=["exporti"] module="cpu.attention"
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


# %% [markdown]
# ## Backward in blocks
#
# Row $t$ of the triangle adds to $dq_t$ and to $dk_u$, $dv_u$ of every
# $u \le t$. If two threads shared a head, they would add to the same rows
# in an order that changes from run to run. So a thread takes a head of keys
# and values whole, with all heads of queries that read it, and the order is
# that of its loops. The price: only $B \cdot NKV$ threads find work.
#
# For a block of rows and a block of keys, (1.8.1), (1.8.6), (1.8.5)
# and (1.8.10) are five products:
#
# $$ \begin{aligned}
#    S &= Q K^\top / \sqrt{hs} , & dA &= dO\, V^\top , \\
#    dV &\mathrel{+}= A^\top dO , & dK &\mathrel{+}= dS^\top Q , \\
#    dQ &\mathrel{+}= dS\, K ,
#    \end{aligned} \tag{2.5.3} $$
#
# with $A = e^{S - L}$ and $dS = A \circ (dA - D) / \sqrt{hs}$ in
# between; the scale of $S$ is applied with the exponential. A transpose costs
# nothing: packing takes the same table with its two steps exchanged.


# %% what the backward pass works on tags=["exporti"] module="cpu.attention"
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


# %% the softmax of a row, backward tags=["exporti"] module="cpu.attention"
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


# %% the weights of a block tags=["exporti"] module="cpu.attention"
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


# %% the gradients of a block tags=["exporti"] module="cpu.attention"
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


# %% a head, backward tags=["exporti"] module="cpu.attention"
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


# %% [markdown]
# A key block first meets the rows of its own block, and a row block first
# meets the first key block that it sees. With `add=False` the first meeting
# writes and the later ones add, so nobody has to clear the gradient before.


# %% the backward kernel tags=["exporti"] module="cpu.attention"
@team
def team_backward(part, parts, address):
    given = arguments(address)
    dqkv, dout, qkv, out, lse, add = given[:6]
    x, my = Arrays(dqkv, dout, qkv, out, lse), _thread(part, given[6:])
    T, NH, NKV = my.sizes[:3]
    for unit in range(part, lse.size // (NH * T) * NKV, parts):
        _backward_head(x, my, unit // NKV, unit % NKV, add)


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
    made = prepared("attention_backward", (out, lse, inp), (), work, bf16)
    flat = (x.reshape(-1) for x in (dinp, dout, inp, out, lse))
    team_backward(*flat, add, *made)


# %% [markdown]
# The verdicts: a small problem in float64 with keys that heads share, then one
# in float32 whose sizes divide nothing and whose rows span several blocks.


# %% a problem of any size
def problem(B, T, NH, hs, dtype=np.float32, NKV=None):
    p = SimpleNamespace()
    width = (NH + 2 * (NKV or NH)) * hs
    p.inp = rng.normal(size=(B, T, width)).astype(dtype)
    p.dinp = np.ones_like(p.inp)
    p.dout = rng.normal(size=(B, T, NH * hs)).astype(dtype)
    p.out, p.lse = np.zeros_like(p.dout), np.zeros((B, NH, T), dtype)
    return p


def forward_and_backward(p, layer, add=False):
    layer.forward(p.out, p.lse, p.inp)
    layer.backward(p.dinp, p.dout, p.inp, p.out, p.lse, add)


cpu = SimpleNamespace(forward=attention_forward, backward=attention_backward)

# %% the same gradient from the kernels
p = problem(2, 5, 4, 3, np.float64, NKV=2)
forward_and_backward(p, cpu, add=True)
got = p.out.copy(), p.dinp.copy()
p.dinp[...] = 1
forward_and_backward(p, reference, add=True)
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
# At 1024 positions the squares of 12 heads take 50 MB, and NumPy moves them
# through memory many times. The first version has no square either, and here it
# is no faster: what counts is that the second one computes in products of
# panels. At 64 positions one block holds a whole head: half of its scores are
# computed to be set to zero.

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
#
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
#
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


# %% exercise 1, checked tags=["hide-cell"]
def merge(o1, L1, o2, L2):
    L = np.logaddexp(L1, L2)
    return np.exp(L1 - L) * o1 + np.exp(L2 - L) * o2, L


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
