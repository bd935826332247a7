# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       cpu.decode: "Layers for writing: packed weights, and attention over kept keys."
# ---

# %% [markdown]
# # Cache: keep keys and values
#
# > What a position has computed never changes when the text grows. Keep its
# > keys and values, and the next token costs one position, not all of them.
#
# *Reading time: 30 minutes. You need: attention
# ([chapter 1.8](../1_by_hand/08_attention.ipynb)) and the products of
# [chapter 2.4](../2_cpu/04_matmul.ipynb).*

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="attention")

# %% [markdown]
# *Figure 4.19.1. Attention is the one layer in which a position reads others.
# What it reads there, keys and values, is all that has to be kept.*
#
# [Chapter 1.19](../1_by_hand/19_writing.ipynb) computes a whole window for every token it
# draws, although all but one of the positions held the same tokens before.
# This chapter computes each position once. At its end you can
#
# - prove which numbers of a position never change, and which of them later
#   positions read;
# - count what a token costs with a cache and without, in operations and bytes;
# - say why a product with one row is bound by memory, and lay out a weight so
#   that it is read once, in order;
# - make the cached result equal to the recomputed one to the last bit, and
#   say what that takes.

# %% [markdown]
# ## Setup

# %% setup
import matplotlib.pyplot as plt
import numpy as np

from llmnb import reference
from llmnb.book.diagram import PALETTE
from llmnb.config import GPT2Config
from llmnb.model.tensors import parameter_count
from llmnb.model.gpt2 import GPT2
from llmnb.book.verify import compare, verdict

rng = np.random.RandomState(15)

# %% [markdown]
# ## By hand
#
# One head with two channels, three positions:
#
# | position | query | key | value |
# |---|---|---|---|
# | 0 | (1, 0) | (1, 0) | (2, 0) |
# | 1 | (0, 1) | (0, 1) | (0, 4) |
# | 2 | (1, 1) | (1, 1) | (6, 6) |
#
# Position 1 compares its query with the keys 0 and 1. The scores are 0 and 1,
# divided by $\sqrt 2$; the softmax makes 0.330 and 0.670 of them, and its
# output is $0.330 \cdot (2, 0) + 0.670 \cdot (0, 4) = (0.66, 2.68)$. Now a
# third token comes. Nothing in these lines changes: position 1 does not look
# at key 2. And for its own output position 2 takes its own query, and the
# keys and values of all three. It does not ask for the queries 0 and 1.
#
# So when a token is added, one row of attention is new. The rows above it
# have been computed, and all they leave to the future is their keys and
# values.

# %% one row at a time
Q = np.array([[1.0, 0], [0, 1], [1, 1]])
K, V = Q.copy(), np.array([[2.0, 0], [0, 4], [6, 6]])


def look_back(q, keys, values):
    scores = keys @ q / np.sqrt(len(q))
    p = np.exp(scores - scores.max())
    return p @ values / p.sum()


for n in (2, 3):
    rows = [look_back(Q[t], K[: t + 1], V[: t + 1]) for t in range(n)]
    print(f"{n} positions:", *np.round(rows, 2))

# %% [markdown]
# ## What never changes
#
# [Chapter 1.19](../1_by_hand/19_writing.ipynb) has proved that the vector $x^\ell_t$ at
# position $t$ above block $\ell$ depends on the tokens $0, \dots, t$ alone. A
# token that is appended later is none of them. So every number that a position
# has ever computed, in every block, is final.
#
# Which of them does a later position read? Go through a block, with $t$ for
# the later position. LayerNorm, the linear layers, GELU and the residual sum
# of $t$ read position $t$ only. Attention of $t$ is
#
# $$ y_t = \sum_{u \le t} \frac{e^{q_t \cdot k_u / \sqrt{hs}}}
#    {\sum_{w \le t} e^{q_t \cdot k_w / \sqrt{hs}}} \; v_u . \tag{4.19.1} $$
#
# From $u < t$ it reads $k_u$ and $v_u$: for all heads together C numbers
# each, in each of L blocks. Everything else can be thrown away, the queries
# and the residual stream too. A position leaves behind
#
# $$ 2 L C \text{ numbers}, \tag{4.19.2} $$
#
# 18,432 for GPT-2 124M, or 74 kB in float32: a full window of 1,024 positions
# takes 75 MB. These are the **key-value cache**, or KV cache.

# %% draw what is computed tags=["hide-input"]
words = ["to", "be", "or", "not", "to", "be"]
blue, orange, pale = (PALETTE[k] for k in ("blue", "orange", "pale"))
fig, axes = plt.subplots(1, 2, figsize=(8, 3.2), dpi=100)
for ax, cached in zip(axes, (False, True), strict=True):
    for n in range(len(words)):
        for t in range(len(words)):
            new = t == n or (t < n and not cached)
            face = orange if new else blue if t < n else pale
            ax.add_patch(plt.Rectangle((t, n), 0.92, 0.84, fc=face))
            if t <= n:
                word = "q k v" if new else "k v"
                style = {"ha": "center", "va": "center", "color": "white"}
                ax.text(t + 0.46, n + 0.42, word, size=9, **style)
    ax.set(xlim=(-0.1, 6), ylim=(6, -0.1), xlabel="position")
    ax.set_xticks(np.arange(6) + 0.46, words, va="baseline")
    ax.set_yticks(np.arange(6) + 0.42, range(1, 7))
    ax.tick_params(length=0)
    ax.tick_params(axis="x", pad=14)
    ax.spines[:].set_visible(False)
axes[0].set(title="without a cache: 21 positions", ylabel="tokens in the text")
axes[1].set(title="with a cache: 6 positions")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 4.19.2. A text grows by a token a line. Orange is computed in that
# line, blue is read from an earlier one: with a cache each line computes one
# position, whatever its length, and what it keeps of it is the key and value.*
#
# Its limit follows from the same proof. If the text loses its first token, all
# the others move to another position, get another row of `wpe`, and every
# number changes. The cache is worth nothing then. That is why chapter 1.19 lets
# half a window go at once.
#
# The whole algorithm fits in a cell. `cache` holds a pair of lists for each
# block; the layers are those of `llmnb.reference`.


# %% one position in NumPy
def norm(x, weight, bias):
    x = x - x.mean()
    return x / np.sqrt((x * x).mean() + 1e-5) * weight + bias


def next_logits(p, NH, cache, token):
    """The logits after one more token; appends to the cache."""
    x = p["wte"][token] + p["wpe"][len(cache[0][0])]
    for i, (keys, values) in enumerate(cache):
        qkv = p["qkvw"][i] @ norm(x, p["ln1w"][i], p["ln1b"][i]) + p["qkvb"][i]
        q, k, v = qkv.reshape(3, NH, -1)
        keys.append(k)
        values.append(v)
        heads = [(q[h], np.array(keys)[:, h], np.array(values)[:, h])
                 for h in range(NH)]  # fmt: skip
        y = np.concatenate([look_back(*head) for head in heads])
        x = x + p["attprojw"][i] @ y + p["attprojb"][i]
        h = p["fcw"][i] @ norm(x, p["ln2w"][i], p["ln2b"][i]) + p["fcb"][i]
        reference.gelu_forward(h, h.copy())
        x = x + p["fcprojw"][i] @ h + p["fcprojb"][i]
    return p["wte"] @ norm(x, p["lnfw"], p["lnfb"])


# %% against the whole window
cfg = GPT2Config(64, 500, 3, 4, 48)
T, vocabulary = cfg.max_seq_len, cfg.vocab_size
exact = GPT2(cfg, 1, T, "reference", "fp64", seed=15)
for weight in exact.params.values():
    weight *= 4  # far from uniform
text = rng.randint(0, vocabulary, T)
exact.forward(text[None])
cache = [([], []) for _ in range(cfg.num_layers)]
rows = [next_logits(exact.params, 4, cache, token) for token in text]
got = np.array(rows)[:, :vocabulary]
compare("one by one", got, exact.logits[0], tol=1e-10)

# %% [markdown]
# ## Count it
#
# For a text of $n$ tokens, with N parameters and no cache, the next token
# costs $n$ positions of $2N$ operations, and attention: $2LCn$ for each
# position on average. With a cache it is one position, whose query meets all
# $n$ keys:
#
# $$ \underbrace{n \,(2N + 2LCn)}_{\text{recomputed}}
#    \qquad
#    \underbrace{2N + 4LCn}_{\text{cached}} . \tag{4.19.3} $$
#
# That is nearly $n$ times fewer. But time is not only operations. With one
# position every weight is read for one multiplication and one addition: four
# bytes for two operations. The **arithmetic intensity** is half an operation a
# byte. A core that can do a hundred operations in the time in which memory
# delivers four bytes waits for memory. So count bytes: the cached token reads
# all parameters, and the cache,
#
# $$ 4N + 8LCn \text{ bytes}. \tag{4.19.4} $$
#
# A table for GPT-2 124M, with the embedding counted as the last product, since
# that reads all of it:

# %% a token of GPT-2 124M
big = GPT2Config()
N = parameter_count(big) - big.max_seq_len * big.channels  # wpe: one row
LC = big.num_layers * big.channels
print("  n   recomputed     cached  intensity   weights   cache")
for n in (16, 128, 1024):
    whole, one = n * (2 * N + 2 * LC * n), 2 * N + 4 * LC * n
    weights, kept = 4 * N, 8 * LC * n
    print(f"{n:4} {whole / 1e9:6.1f} GFLOP {one / 1e9:4.2f} GFLOP "
          f"{one / (weights + kept):5.2f} {weights / 1e6:8.0f} MB "
          f"{kept / 1e6:4.0f} MB")  # fmt: skip

# %% [markdown]
# At 20 GB/s the 495 MB of weights take 25 ms, and no cleverness in arithmetic
# makes a token cheaper than that. What can be done is to come near: read each
# weight once, in the order in which it lies in memory, with all threads.
#
# Several texts at once change the count. With $R$ rows each weight serves $R$
# multiplications, and $R$ texts cost little more than one, as long as
# $R/2$ operations a byte are below what the machine can do.
#
# ## To the last bit
#
# It would be good if a cache changed nothing at all: the same seed, the same
# text. Near is not enough for that. Two logits that differ in their last bit
# can swap places, and one other token makes another text. So we ask for
# *equal*, not for close.
#
# In floating point $(a + b) + c$ is not $a + (b + c)$. Numbers are equal to
# the last bit if they come from the same operations in the same order. Which
# order does a number of [chapter 2.4](../2_cpu/04_matmul.ipynb)'s product come from? With
# blocks of `DEPTH` = 384 steps, $S_b$ for the sum over block $b$, bias $\beta$
# and residual $r$,
#
# $$ \begin{aligned}
#    \text{out} &= \bigl(\dots\bigl((S_0 + \beta) + r\bigr) + S_1\bigr)
#                  + \dots, \\
#    S_b &= \operatorname{fma}(x_{k}, w_{k}, \dots \\
#        &\quad \operatorname{fma}(x_1, w_1, \operatorname{fma}(x_0, w_0, 0))) .
#    \end{aligned} \tag{4.19.5} $$
#
# No thread and no tile has a part in (4.19.5): a number does not depend on where
# its row lies, on how many rows there are, or on who computes it. So a product
# for one row that keeps to (4.19.5) gives the same bits as the product for all.
#
# Such a product must run down $k$ one step after the other, and for speed it
# must compute many outputs side by side, one in each lane of a vector. At step
# $k$ it wants the weights $w_{j,k}$ for `COLS` neighbouring outputs $j$. In
# the weight's own order, (OC, C), these are C numbers apart. Chapter 2.4 packs
# them into panels for this reason, on each call, and with one row the packing
# costs more than the product. But while a model writes, its weights do not
# change. We pack them **once**, here with `COLS` = 16:
#
#     panel q:   w[16 q, 0]   w[16 q + 1, 0]   ...  w[16 q + 15, 0]
#                w[16 q, 1]   w[16 q + 1, 1]   ...  w[16 q + 15, 1]
#                ...
#                w[16 q, C-1]                  ...  w[16 q + 15, C-1]
#                bias[16 q]   bias[16 q + 1]   ...  bias[16 q + 15]
#
# and a thread reads its panels from the first byte to the last. The bias is
# the last line.
#
# ### A tile without packing
#
# The inner loop is that of the tile in [appendix A.2](../appendix/02_tile.ipynb),
# with one change: the inputs are read where they are, a number from each row,
# and not from a panel.

# %% imports of the kernels tags=["export"] module="cpu.decode"
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
    COLS,
    I32,
    LANES,
    ROWS,
    VECTORS,
    constant,
    data,
    multiply_add,
    peek,
    plus,
    spread,
    store,
    sum_loop,
)
from llmnb.shapes import COMPILED, shapes


# %% the loop over the sum tags=["exporti"] module="cpu.decode"
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


# %% [markdown]
# Around it an intrinsic that finds the addresses, and adds bias and start in
# the order of (4.19.5). A `Line` says where something begins and how far it is
# to the next row, or the next line of a panel. The intrinsic is made for as
# many rows as a tile has, for two, and for one.


# %% where rows are tags=["exporti"] module="cpu.decode"
class Line(NamedTuple):
    """A flat array, where a row begins in it, and the step to the next."""

    array: np.ndarray
    at: int
    step: int


@inlined
def _moved(line, rows):
    """The Line that begins some rows further on."""
    return Line(line.array, line.at + rows * line.step, line.step)


# %% some rows by a panel tags=["exporti"] module="cpu.decode"
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


# %% all rows by a panel tags=["exporti"] module="cpu.decode"
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


# %% [markdown]
# A column of panels runs through the blocks of `DEPTH` steps. The first adds
# bias and residual, the others go on from `out`. Where OC is not a multiple of
# `COLS`, the last column goes by way of a wider copy. Lines of zeros whose step
# is 0 stand in for what is not there.


# %% a column of the output tags=["exporti"] module="cpu.decode"
@inner
def _column(out, start, inp, panel, zeros, count):
    """COLS columns of all rows; all but count are Lines."""
    C = inp.step
    bias = Line(panel.array, panel.at + C * COLS, 0)
    for k in range(0, C, DEPTH):
        depth, x = min(DEPTH, C - k), Line(inp.array, k, C)
        _panel_product(out, start, bias, x, _moved(panel, k), depth, count)
        start, bias = out, zeros


# %% the column at the edge tags=["exporti"] module="cpu.decode"
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


# %% the kernel of the product tags=["exporti"] module="cpu.decode"
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


# %% the product tags=["export"] module="cpu.decode"
def panels_shape(OC, C):
    """The shape of a weight (OC, C) and its bias as panels.

    A panel holds COLS rows of the weight, side by side, and below them the
    numbers of the bias.
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
    """
    (B, T, C), OC = inp.shape, out.shape[2]
    _check_panels("panels_forward", panels, OC, C)
    add, start = residual is not None, out if residual is None else residual
    out, start, inp, panels = (
        x.reshape(-1) for x in (out, start, inp, panels)
    )
    _panels_forward(out, start, add, inp, panels, B * T, C)


# %% pack a weight tags=["exporti"] module="cpu.decode"
@team
def _pack_weight(part, parts, address):
    panels, weight, OC, C, code = arguments(address)
    size = (C + 1) * COLS
    for q in range(part, -(-OC // COLS), parts):
        block = Block(q * COLS * C, C, 1, min(COLS, OC - q * COLS), C)
        pack(code, panels, q * size, weight, block)


# %% weights into panels tags=["export"] module="cpu.decode"
@shapes("P D S!, OC C, OC?")
def pack_weight(panels, weight, bias=None):
    """Write a weight (OC, C) and a bias (OC,) into panels, in place.

    panels: panels_shape(OC, C). All float32 or all float64 and
    C-contiguous. Raises TypeError or ValueError before anything is written.
    """
    OC, C = weight.shape
    _check_panels("pack_weight", panels, OC, C)
    code = scratch(np.empty(0, weight.dtype), False, weight.dtype)[0][1]
    _pack_weight(panels.reshape(-1), weight.reshape(-1), OC, C, code)
    last = np.zeros(len(panels) * COLS, weight.dtype)
    last[:OC] = 0 if bias is None else bias
    panels[:, -1] = last.reshape(-1, COLS)


# %% the bits of chapter 2.4
from llmnb.cpu import matmul_forward
from llmnb.cpu.decode import pack_weight, panels_forward, panels_shape

for rows, C, OC in ((1, 768, 2304), (5, 1000, 50), (64, 384, 131)):
    inp = rng.normal(0, 1, (1, rows, C)).astype(np.float32)
    weight = rng.normal(0, 1, (OC, C)).astype(np.float32)
    bias = rng.normal(0, 1, OC).astype(np.float32)
    residual = rng.normal(0, 1, (1, rows, OC)).astype(np.float32)
    panels = np.empty(panels_shape(OC, C), np.float32)
    pack_weight(panels, weight, bias)
    one, all_of_them = np.empty((2, 1, rows, OC), np.float32)
    panels_forward(one, inp, panels, residual)
    matmul_forward(all_of_them, inp, weight, bias, residual)
    same = np.array_equal(one, all_of_them)
    verdict(f"{rows} x {C} x {OC}", same, "equal to the last bit")

# %% [markdown]
# What does it gain, and how near does it come to memory? A kernel that only
# adds up the weights shows how fast they can be read. The weight here has
# 151 MB, more than a processor's cache holds.

# %% a product with one row tags=["nbval-ignore-output"]
import numba

from llmnb.timing import fastest, machine


@numba.njit(parallel=True, fastmath=True, error_model="numpy")
def read_all(sums, x):
    for t in numba.prange(len(x)):
        total = sums[t]
        for i in range(x.shape[1]):
            total += x[t, i]
        sums[t] = total


weight = rng.normal(0, 1, (49152, 768)).astype(np.float32)
panels = np.empty(panels_shape(*weight.shape), np.float32)
pack_weight(panels, weight)
inp, out = np.ones((1, 1, 768), "f"), np.empty((1, 1, 49152), "f")
sums = np.zeros(numba.get_num_threads(), np.float32)
times = {
    "read": fastest(read_all, sums, weight.reshape(len(sums), -1)),
    "chapter 2.4": fastest(matmul_forward, out, inp, weight, None),
    "packed once": fastest(panels_forward, out, inp, panels),
}
read_bytes = weight.nbytes
print(machine())
for name, spent in times.items():
    print(f"{name:<12} {read_bytes / spent / 1e9:6.1f} GB/s")

# %% [markdown]
# In the run whose output stands here, packing once was worth a factor of more
# than four over packing on each call, and came to some four fifths of the speed
# of reading alone.
#
# ### One query, many keys
#
# Attention is two products: the query with all keys, then the weights of the
# softmax with all values. In chapter 2.5 a score is one chain of
# multiplications over the channels of a head; the values are added up in
# blocks of keys, and between two blocks the softmax corrects its maximum. We
# keep to both orders.
# The keys are stored as panels of `COLS` positions, so that a vector holds
# that many scores. The values need no panels: a vector holds neighbouring
# channels of one position, and the next line is the next position.
#
# The softmax of a block is chapter 2.5's own function, `softmax_row`.
#
# Some models look back a window of $W$ positions only
# ([chapter 5.4](../5_modern/04_attention.ipynb)). What has left the window is
# never read again, so its place is free for what comes: the cache is a
# *ring*, and position $p$ lies at $p$ modulo the ring's size. A block of keys
# must lie in one piece, or its sums would be cut in two and have another
# order. So the ring is $W$ rounded up to whole blocks.


# %% the shape of a cache tags=["export"] module="cpu.decode"
def ring_size(hs, window):
    """Positions that a cache keeps where attention looks back a window."""
    step = math.lcm(block_size(hs), COLS)
    return -(-window // step) * step


def cache_shapes(B, NKV, T, hs, window=None):
    """Shapes of the cached keys and values of T positions.

    Keys (B, NKV, T / COLS, hs, COLS) are panels of COLS positions; values
    (B, NKV, T, hs), with hs rounded up to a multiple of COLS. window: how
    many positions a query sees, None for all; no more than ring_size of
    them are kept.
    """
    T = T if window is None else min(T, ring_size(hs, window))
    wide = -(-hs // COLS) * COLS
    keys = B, NKV, -(-T // COLS), hs, COLS
    return {"keys": keys, "values": (B, NKV, T, wide)}


# %% keep keys and values tags=["exporti"] module="cpu.decode"
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


# %% [markdown]
# A new word asks with one query a head. A prompt asks with many, and `ROWS`
# neighbours of them share what they read: each panel of keys, and each block
# of values, is read once for all of them. They do not see the same keys, but
# nearly: the last sees `ROWS - 1` more than the first. What a query does not
# see gets the weight 0, as in chapter 2.5, and adding 0 times a value changes
# no bit of its sum.


# %% some queries tags=["exporti"] module="cpu.decode"
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


# %% all heads tags=["exporti"] module="cpu.decode"
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


# %% attention over a cache tags=["export"] module="cpu.decode"
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


# %% the bits of chapter 2.5
from llmnb.cpu import attention_forward
from llmnb.cpu.decode import cache_attention, cache_shapes

NH, hs, n = 3, 20, 250
qkv = rng.normal(0, 1, (1, n, 3 * NH * hs)).astype(np.float32)
whole, lse = np.empty((1, n, NH * hs), "f"), np.empty((1, NH, n), "f")
attention_forward(whole, lse, qkv)
store = [np.zeros(s, "f") for s in cache_shapes(1, NH, n, hs).values()]
row, same = np.empty((1, 1, NH * hs), "f"), []
for t in range(n):
    cache_attention(row, *store, np.ascontiguousarray(qkv[:, [t]]), t)
    same.append(np.array_equal(row[0, 0], whole[0, t]))
verdict("attention", all(same), f"{n} rows equal to the last bit")

# %% [markdown]
# The other layers need nothing new: LayerNorm and GELU go row by row, with the
# kernels that they have. The embedding is looked up in the packed `wte`, where
# a token's vector is a column of a panel. So the model's largest matrix is in
# memory once, for its first use and for its last.


# %% a row back out of panels tags=["exporti"] module="cpu.decode"
@inner
def _embed(out, tokens, panels, scale):
    B, T, C = out.shape
    for b in range(B):
        for t in range(T):
            panel, lane = tokens[b, t] // COLS, tokens[b, t] % COLS
            for c in range(C):
                out[b, t, c] = panels[panel, c, lane] * scale


# %% embed from panels tags=["export"] module="cpu.decode"
@shapes(f"B T C!, B T of {COLS}P, P D {COLS}, T+ C?", COMPILED)
def embed_forward(out, tokens, panels, wpe=None, first=0, scale=1.0):
    """Sum each token's vector, times scale, and its position's.

    out: (B, T, C), overwritten. tokens: int32 (B, T). panels: wte, packed.
    wpe: (max_T, C), or None where a model has no such table. first: the
    position of the first token. Raises TypeError or ValueError where they
    do not fit.
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


# %% [markdown]
# ## Take away
#
# - In a causal model all that a position has computed is final; later
#   positions read its keys and values, $2LC$ numbers.
# - A cached token costs $2N + 4LCn$ operations and reads $4N + 8LCn$ bytes:
#   memory sets its time.
# - Equal to the last bit is a matter of order. Every number is added up in one
#   order that no tile, thread or row changes.
#
# ## Exercises
#
# **1** (★). At which length does GPT-2 124M read as many bytes of cache as of
# weights? What does that say about windows of 100,000 tokens?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# $8LCn = 4N$ gives $n = N / 2LC$, about 6,700. In a window of 100,000 the
# cache is fifteen times the weights: such models share keys among heads, or
# store them in fewer bits.
# :::

# %% exercise 1, checked tags=["hide-cell"]
n = 4 * (parameter_count(big) - 1024 * 768) / (8 * 12 * 768)
verdict("as much", 6000 < n < 7000, f"at {round(n, -2):.0f} tokens")

# %% [markdown]
# **2** (★★★). The NumPy decoder at the beginning agreed within $10^{-10}$, not
# to the last bit. Find out why: which of its sums have another order?
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# A matrix times a vector and a matrix times a matrix are two different
# functions of the BLAS, with different blocks and orders. The cell compares
# the two, and then the product of chapter 2.4, a row at a time and all at once.
# :::

# %% exercise 2, tried tags=["nbval-ignore-output", "hide-cell"]
x, w = rng.normal(0, 1, (64, 300)), rng.normal(0, 1, (300, 300))
one, whole = np.array([w @ row for row in x]), x @ w.T
print(f"{(one != whole).mean():.0%} of the numbers differ")
for t in range(64):
    matmul_forward(one[None, t : t + 1], x[None, t : t + 1], w, None)
matmul_forward(whole[None], x[None], w, None)
verdict("ours", np.array_equal(one, whole), "the same, to the last bit")

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("4.19")
