# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       cuda.attention: "Attention on a GPU, forward: a block of threads walks over the keys."
# ---

# %% [markdown]
# # Attention on a GPU: a walk over tiles
#
# > A block of threads owns a tile of queries and walks over the keys up to the
# > diagonal; each thread keeps a tile of scores in its registers.
#
# *Reading time: 30 minutes. You need: chapters
# [1.8](../1_by_hand/08_attention.ipynb), [2.5](../2_cpu/05_attention.ipynb) for
# the online softmax, [3.2](02_sectors.ipynb) and [3.6](06_matmul.ipynb).*

# %% [markdown]
# ## Where we are
#
# Attention gives a GPU plenty to do at once: $B \cdot NH$ heads that never
# meet, and in each of them $T$ rows that need nothing of one another. The
# CPU version was bound by arithmetic, because its blocks stay in a cache. On
# a GPU that is a goal to be reached. A block of threads may have 48 KB of
# *shared memory* ([chapter 3.1](01_threads.ipynb)), and what does not fit there
# travels through global memory. At the end of this chapter you can
#
# - say what a square of scores costs on a GPU;
# - share the scores of a head among blocks, so that every element of the
#   result has one owner;
# - lay out shared memory so that the lanes of a warp meet all its banks.
#
# No GPU has run this chapter yet. Its kernels are compiled for two
# generations, sm_80 and sm_90, and their tests read the machine code: no
# double precision, no registers spilled to memory. What they compute, and
# what they count, comes from the simulator. `llmnb bench --backend cuda
# --kernels` measures them where there is a GPU, and the results page shows
# it once measured.

# %% [markdown]
# ## Setup

# %% setup
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np

from llmnb.book.diagram import PALETTE
from llmnb.book.owners import draw_owners
from llmnb.book.verify import compare, verdict
from llmnb.gpu.launch import simulated, to_device, to_host
from llmnb.gpu.simulator import watch
from llmnb.reference.attention import attention_forward as forward_numpy

rng = np.random.default_rng(6)


# %% a problem of any size
def problem(B, T, NH, hs):
    p = SimpleNamespace()
    p.inp = rng.normal(size=(B, T, 3 * NH * hs)).astype(np.float32)
    p.out = np.zeros((B, T, NH * hs), np.float32)
    p.lse = np.zeros((B, NH, T), np.float32)
    return p


# %% imports of the GPU's kernels tags=["export"] module="cuda.attention"
import functools
import math

import numpy as np

from llmnb.gpu.launch import DEVICE, aligned, device, kernel
from llmnb.gpu.simulator import cuda, load4, store4
from llmnb.shapes import shapes

# %% what a score is before one is seen tags=["exporti"] module="cuda.attention"
# exp makes 0 of it; and it is no infinity, which fastmath rules out
LOWEST = np.float32(-1e30)

# %% [markdown]
# ## Three kernels and a square
#
# The shortest way to a GPU: one kernel for each of (1.8.1), (1.8.2) and (1.8.3).
# The first has a thread for each pair $(t, u)$. The second has a warp for
# each row, as in [chapter 3.4](04_layernorm.ipynb), and turns scores into
# weights in place. The third has a thread for each number of `out`. What
# passes between them is the square of scores, in scratch memory.


# %% with the square, scores
from llmnb.gpu.warp import warp_max, warp_sum


@kernel
def _attention_scores(att, inp, NH, scale):
    """A thread a pair (t, u): (1.8.1). att: (B * NH, T, T)."""
    heads, T, _ = att.shape
    hs = inp.shape[2] // (3 * NH)
    pair = cuda.grid(1)
    head, t, u = pair // (T * T), pair // T % T, pair % T
    if head < heads and u <= t:
        b, q = head // NH, head % NH * hs
        dot = np.float32(0)
        for i in range(q, q + hs):
            dot += inp[b, t, i] * inp[b, u, NH * hs + i]
        att[head, t, u] = dot * scale


# %% with the square, weights
@kernel
def _attention_softmax(att, lse):
    """A warp a row: (1.8.4), in place. lse: (B * NH, T)."""
    heads, T = lse.shape
    row, lane = cuda.grid(1) // 32, cuda.grid(1) % 32
    head, t = row // T, row % T
    if head < heads:
        top, total = LOWEST, np.float32(0)
        for u in range(lane, t + 1, 32):
            top = max(top, att[head, t, u])
        top = warp_max(top)
        for u in range(lane, t + 1, 32):
            total += math.exp(att[head, t, u] - top)
        total = warp_sum(total)
        for u in range(lane, t + 1, 32):
            att[head, t, u] = math.exp(att[head, t, u] - top) / total
        if lane == 0:
            lse[head, t] = top + math.log(total)


# %% with the square, means
@kernel
def _attention_means(out, att, inp, NH):
    """A thread a number of out: (1.8.3)."""
    B, T, C = out.shape
    place = cuda.grid(1)
    b, t, c = place // (T * C), place // C % T, place % C
    if b < B:
        head, mean = b * NH + c * NH // C, np.float32(0)
        for u in range(t + 1):
            mean += att[head, t, u] * inp[b, u, 2 * C + c]
        out[b, t, c] = mean


# %% with the square
def with_square(out, lse, inp, work):
    """Scores, weights and means, one after the other."""
    B, NH, T = lse.shape
    hs = out.shape[2] // NH
    att, lse = work.reshape(B * NH, T, T), lse.reshape(B * NH, T)
    scale = np.float32(1 / math.sqrt(hs))
    _attention_scores[-(-att.size // 128), 128](att, inp, NH, scale)
    _attention_softmax[-(-lse.size // 4), 128](att, lse)
    _attention_means[-(-out.size // 128), 128](out, att, inp, NH)


# %% [markdown]
# The scratch is what the CPU version was built to avoid, and the batch of a
# GPU is larger. For 16 sequences of 1024 positions and the 12 heads of GPT-2
# 124M:

# %% the square on a GPU
B, T, NH, hs = 16, 1024, 12, 64
square = 4 * B * NH * T * T
print(f"{square:,} bytes of scratch, {square / (4 * B * T * 768):.0f}", end="")
print(" times the output of the layer")
print(f"{4 * hs / 16:.0f} operations a byte of traffic with the square")

# %% [markdown]
# The half below the diagonal is written by the first kernel, read and written
# by the second and read by the third: 16 bytes a pair $(t, u)$, where no
# cache helps. A pair takes $2\,hs$ operations for its score and as many for
# the output, which makes 16 a byte. By NVIDIA's data sheet an H100 computes
# 67 TFLOP/s in float32 and moves 3,350 GB/s, 20 operations for each byte:
# the square alone asks more of its memory than of its arithmetic.
# ## Tiles and no square
#
# Online softmax, (2.5.1), lets one kernel do all three steps. A block of
# threads owns a *tile* of queries of one head, which it copies to shared
# memory. Then it walks over the keys of the head, a tile at a time, up to the
# diagonal. Each step copies a tile of keys and one of values and takes
# their scores with its queries. Where a row's maximum grows it
# rescales what was summed, and adds the new values. This way of working is
# known as FlashAttention; see the further reading. The backward pass will
# walk too, so here are both walks.

# %% the tiles and the walks
fig, axes = plt.subplots(1, 2, figsize=(7.4, 3.9), dpi=100)
tiles = range(5)
by_query = [[t if u <= t else -1 for u in tiles] for t in tiles]
by_key = [[u if u <= t else -1 for u in tiles] for t in tiles]
draw_owners(axes[0], by_query, "out and dq", rows="tiles of queries")
draw_owners(axes[1], by_key, "dk and dv")
walk = {"arrowstyle": "->", "color": PALETTE["ink"], "lw": 1.5}
for n in tiles:
    start, end = (0.1, n + 0.82), (n + 0.9, n + 0.82)
    axes[0].annotate("", end, start, arrowprops=walk)
    start, end = (n + 0.82, n + 0.1), (n + 0.82, 4.9)
    axes[1].annotate("", end, start, arrowprops=walk)
for ax in axes:
    ax.set_xlabel("tiles of keys")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 3.9.1. The scores of one head in tiles, each with the number of the
# tile that its block owns. Left, a block owns a tile of queries and walks to
# the right until the diagonal; right, it owns a tile of keys and walks down
# from the diagonal. Nobody visits the empty triangle, and every element of a
# result has one owner that sums along its arrow.*
#
# A row of scores lies in 16 neighbouring lanes, half a warp, and its maximum
#
# The first tile has key 0, which every query may read, so that from then on
# a row's maximum $m$ is a real score and a masked one has the weight 0. The
# size of a head is a constant of the kernel, so that shared memory and
# registers can be laid out when it is compiled. `functools.cache` keeps one
# kernel for each size.
#
# ## Tiles in registers
#
# If each product of two numbers read both of them from shared memory, that
# memory would be the limit. [Chapter 3.6](06_matmul.ipynb) met the same, and the
# cure is the same: a thread takes a small tile of the result in registers. Here 128
# threads stand in 16 rows of 8 and share 64 queries and 32 keys. Row $r$ of
# them owns queries $r, r + 16, r + 32, r + 48$, and lane $l$ of a row keys
# $l, l + 8, l + 16, l + 24$. With 4 queries and 4 keys a thread, 8 numbers
# read serve 16 products. And it reads four channels at once, with `load4`.

# %% which thread owns which scores
fig, ax = plt.subplots(figsize=(5.6, 6.0), dpi=100)
who = [[8 * (t % 16) + u % 8 for u in range(16)] for t in range(18)]
draw_owners(ax, who, group=32, rows="queries", cols="keys")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 3.9.2. A corner of a block's 64 x 32 scores, each with the number of
# its thread, coloured by warp. A thread's scores stand 16 queries and 8 keys
# apart; the eight threads of a row of scores share a warp, so that its
# maximum takes three exchanges and no barrier of the block.*
#
# The plan of shared memory, of which a block may have 48 KB, at $hs = 64$:
#
# | tile | rows | floats a row | bytes |
# |---|---|---|---|
# | queries | 64 | 68 | 17,408 |
# | keys | 32 | 68 | 8,704 |
# | values | 32 | 68 | 8,704 |
# | weights | 64 | 40 | 10,240 |
# | all | | | 45,056 |
#
# Why 68? Eight lanes read four floats each from eight neighbouring keys. A
# row of 64 would put all of them into the same four banks; with four more
# each row begins four banks further, and the eight lanes meet all 32 banks
# once. Other heads are padded with zeros up to a multiple of 32 channels,
# and then by four. The weights' rows are 40 apart for a like reason: the
# four rows that a warp writes begin 8 banks apart.
#
# For heads of more than 64 channels a thread takes 2 queries and 2 keys
# instead of 4 and 4; that fits up to 128 channels.
#
# Four pieces serve forward and backward alike. $G$ is how many rows of
# threads there are, and $R$ how many rows, and how many columns, of a tile a
# thread takes. The first piece copies a tile to shared memory. Where $hs$ is
# a multiple of 4 and the array begins at a multiple of 16 bytes, so does
# every row of a head, and `FOURS` is true: then it reads vectors of four,
# otherwise float by float. In shared memory every row is aligned;
# `alignment=16` asks for that.


# %% copy a tile tags=["exporti"] module="cuda.attention"
def _side(hs):
    """R: the rows, and the columns, of a tile that a thread takes."""
    return 4 if hs <= 64 else 2


def _stride(hs):
    """Floats from one row of a head to the next in shared memory."""
    return -(-hs // 32) * 32 + 4


@functools.cache
def _tile_copy(hs, FOURS):
    """copy(tile, x, at, step, first, T): rows first.. of a head to shared.

    x is flat, row r begins at `at + r * step`; zeros beyond T and hs.
    """
    QUADS, STRIDE = -(-hs // 32) * 8, _stride(hs)

    @device
    def copy(tile, x, at, step, first, T):
        for e in range(cuda.threadIdx.x, len(tile) * QUADS, cuda.blockDim.x):
            row, col = e // QUADS, e % QUADS * 4
            i = at + (first + row) * step + col
            a = b = c = d = np.float32(0)
            if first + row < T and col < hs:
                if FOURS:
                    a, b, c, d = load4(x, i)
                else:
                    a = x[i]
                    b = x[i + 1] if col + 1 < hs else np.float32(0)
                    c = x[i + 2] if col + 2 < hs else np.float32(0)
                    d = x[i + 3] if col + 3 < hs else np.float32(0)
            store4(tile, row * STRIDE + col, a, b, c, d)

    return copy


# %% [markdown]
# The second piece takes the scores of a tile, or anything that is a product
# of rows with rows. The third multiplies weights with a tile and adds to
# sums, $\Omega \mathrel{+}= E V$; a thread sums for its $R$ rows, and for
# channels $4l$ to $4l + 3$ of every 32. The fourth writes the sums.


# %% products of rows with rows tags=["exporti"] module="cuda.attention"
@functools.cache
def _tile_dots(hs, G, R):
    """dots(s, one, two): s = dot products of R rows of one, R of two."""
    STRIDE, LENGTH = _stride(hs), 4 * R

    @device
    def dots(s, one, two):
        row, lane = cuda.threadIdx.x // 8, cuda.threadIdx.x % 8
        y = cuda.local.array(LENGTH, np.float32)
        for n in range(R * R):
            s[n] = np.float32(0)
        for i in range(0, hs, 4):
            for j in range(R):
                a, b, c, d = load4(two, (lane + 8 * j) * STRIDE + i)
                y[4 * j], y[4 * j + 1] = a, b
                y[4 * j + 2], y[4 * j + 3] = c, d
            for r in range(R):
                a, b, c, d = load4(one, (row + G * r) * STRIDE + i)
                for j in range(R):
                    dot = s[R * r + j] + a * y[4 * j]
                    dot += b * y[4 * j + 1]
                    dot += c * y[4 * j + 2]
                    s[R * r + j] = dot + d * y[4 * j + 3]

    return dots


# %% products of weights with rows tags=["exporti"] module="cuda.attention"
@functools.cache
def _tile_add(hs, G, R):
    """add(sums, weights, tile): sums += weights @ tile, 8 * R rows of it."""
    PARTS, STRIDE = -(-hs // 32), _stride(hs)
    WIDTH, LENGTH = 8 * R + 8, 4 * R

    @device
    def add(sums, weights, tile):
        row, lane = cuda.threadIdx.x // 8, cuda.threadIdx.x % 8
        w = cuda.local.array(LENGTH, np.float32)
        for u in range(0, 8 * R, 4):
            for r in range(R):
                a, b, c, d = load4(weights, (row + G * r) * WIDTH + u)
                w[r], w[R + r], w[2 * R + r], w[3 * R + r] = a, b, c, d
            for v in range(4):
                for n in range(PARTS):
                    at = (u + v) * STRIDE + 32 * n + 4 * lane
                    a, b, c, d = load4(tile, at)
                    for r in range(R):
                        e, k = w[R * v + r], 4 * (PARTS * r + n)
                        sums[k] += e * a
                        sums[k + 1] += e * b
                        sums[k + 2] += e * c
                        sums[k + 3] += e * d

    return add


# %% write the sums tags=["exporti"] module="cuda.attention"
@functools.cache
def _tile_write(hs, G, R, FOURS):
    """write(x, sums, at, step, first, T, more): rows first.. of a head.

    more: whether to add to what x holds.
    """
    PARTS = -(-hs // 32)

    @device
    def write(x, sums, at, step, first, T, more):
        row, lane = cuda.threadIdx.x // 8, cuda.threadIdx.x % 8
        for r in range(R):
            for n in range(PARTS):
                t, col = first + row + G * r, 32 * n + 4 * lane
                i, k = at + t * step + col, 4 * (PARTS * r + n)
                if FOURS and t < T and col < hs:
                    a = b = c = d = np.float32(0)
                    if more:
                        a, b, c, d = load4(x, i)
                    a, b = a + sums[k], b + sums[k + 1]
                    c, d = c + sums[k + 2], d + sums[k + 3]
                    store4(x, i, a, b, c, d)
                for m in range(4):
                    if not FOURS and t < T and col + m < hs:
                        old = x[i + m] if more else np.float32(0)
                        x[i + m] = old + sums[k + m]

    return write


# %% [markdown]
# Between the products stands (2.5.1), for the $R$ rows of a thread.


# %% sums and maxima of a row tags=["exporti"] module="cuda.attention"
@device
def _row_max(value):
    """The largest value of 8 neighbouring lanes, in each of them."""
    for step in (4, 2, 1):
        value = max(value, cuda.shfl_xor_sync(0xFFFFFFFF, value, step))
    return value


@device
def _row_sum(value):
    """The sum of value over 8 neighbouring lanes, in each of them."""
    for step in (4, 2, 1):
        value += cuda.shfl_xor_sync(0xFFFFFFFF, value, step)
    return value


# %% the softmax of a tile tags=["exporti"] module="cuda.attention"
@functools.cache
def _tile_softmax(hs, G, R):
    """softmax(weights, sums, s, top, total, first, start, scale): (2.5.1).

    first, start: the tile's first query and first key.
    """
    PER = -(-hs // 32) * 4

    @device
    def softmax(weights, sums, s, top, total, first, start, scale):
        row, lane = cuda.threadIdx.x // 8, cuda.threadIdx.x % 8
        for r in range(R):
            new = top[r]
            for j in range(R):
                seen = start + lane + 8 * j <= first + row + G * r
                s[R * r + j] = s[R * r + j] * scale if seen else LOWEST
                new = max(new, s[R * r + j])
            new = _row_max(new)
            factor = math.exp(top[r] - new)
            top[r], total[r] = new, total[r] * factor
            for j in range(R):
                e = math.exp(s[R * r + j] - new)
                weights[row + G * r, lane + 8 * j] = e
                total[r] += e
            for n in range(PER):
                sums[PER * r + n] *= factor

    return softmax


# %% the end of the rows tags=["exporti"] module="cuda.attention"
@functools.cache
def _tile_finish(hs, G, R):
    """finish(lse, head, sums, top, total, first): (2.5.2)."""
    PER = -(-hs // 32) * 4

    @device
    def finish(lse, head, sums, top, total, first):
        row, lane = cuda.threadIdx.x // 8, cuda.threadIdx.x % 8
        for r in range(R):
            t, whole = first + row + G * r, _row_sum(total[r])
            for n in range(PER):
                sums[PER * r + n] /= whole
            if lane == 0 and t < lse.shape[1]:
                lse[head, t] = top[r] + math.log(whole)

    return finish


# %% the forward kernel tags=["exporti"] module="cuda.attention"
@functools.cache
def _forward_kernel(hs, FOURS):
    R, STRIDE = _side(hs), _stride(hs)
    ROWS, COLS, WIDTH = 16 * R, 8 * R, 8 * R + 8
    SUMS, PAIRS = R * (STRIDE // 8), R * R
    copy, write = _tile_copy(hs, FOURS), _tile_write(hs, 16, R, FOURS)
    dots, add = _tile_dots(hs, 16, R), _tile_add(hs, 16, R)
    softmax, finish = _tile_softmax(hs, 16, R), _tile_finish(hs, 16, R)

    @kernel(launch_bounds=128)
    def attention_forward_tiles(out, lse, inp, NH, scale):
        T, C = lse.shape[1], NH * hs
        tiles = (T + ROWS - 1) // ROWS
        head = cuda.blockIdx.x // tiles
        first = (tiles - 1 - cuda.blockIdx.x % tiles) * ROWS
        y = head // NH * T * C + head % NH * hs
        x = head // NH * T * 3 * C + head % NH * hs
        q = cuda.shared.array((ROWS, STRIDE), np.float32, alignment=16)
        k = cuda.shared.array((COLS, STRIDE), np.float32, alignment=16)
        v = cuda.shared.array((COLS, STRIDE), np.float32, alignment=16)
        weights = cuda.shared.array((ROWS, WIDTH), np.float32, alignment=16)
        sums = cuda.local.array(SUMS, np.float32)
        s = cuda.local.array(PAIRS, np.float32)
        top = cuda.local.array(R, np.float32)
        total = cuda.local.array(R, np.float32)
        for n in range(SUMS):
            sums[n] = np.float32(0)
        for r in range(R):
            top[r], total[r] = LOWEST, np.float32(0)
        copy(q, inp, x, 3 * C, first, T)
        for start in range(0, min(first + ROWS, T), COLS):
            cuda.syncthreads()
            copy(k, inp, x + C, 3 * C, start, T)
            copy(v, inp, x + 2 * C, 3 * C, start, T)
            cuda.syncthreads()
            dots(s, q, k)
            softmax(weights, sums, s, top, total, first, start, scale)
            cuda.syncwarp()
            add(sums, weights, v)
        finish(lse, head, sums, top, total, first)
        write(out, sums, y, C, first, T, 0)

    return attention_forward_tiles


# %% [markdown]
# Two kinds of barriers: all threads wait before a tile is overwritten and
# after it is written, but a row's weights are written and read by lanes of
# one warp, so there the warp's own barrier is enough. The last queries have
# the longest walk. CUDA promises no order among blocks; in case they start
# in the order of their numbers, those of the last queries have the first
# ones, and short walks fill the end.
#
# Rows of the last tile that lie beyond $T$ are zeros, compute something
# finite, and are not written. The public function checks and launches.


# %% attention, forward tags=["export"] module="cuda.attention"
WIDEST_HEAD = 128  # channels of a head


def check_heads(name, lse, C):
    """Raise ValueError for heads that the kernels cannot take.

    name: of the function that was called. lse: (B, NH, T). C: channels.
    """
    if not lse.size:
        raise ValueError(f"{name}: lse must not be empty, got {lse.shape}")
    if C // lse.shape[1] > WIDEST_HEAD:
        raise ValueError(
            f"{name}: a head of {C // lse.shape[1]} channels is too wide, at "
            f"most {WIDEST_HEAD} fit"
        )


@shapes("B T C!, B NH|C T!, B T 3C", DEVICE)
def attention_forward(out, lse, inp):
    """Causal self-attention of NH heads of at most 128 channels.

    inp: (B, T, 3C), queries, keys and values along the last axis. Writes
    out (B, T, C) and lse (B, NH, T), the log-sum-exp of each row of scaled,
    masked scores, which the backward pass needs. All float32 on a device.
    Raises TypeError or ValueError before it launches anything.
    """
    check_heads("attention_forward", lse, out.shape[2])
    B, NH, T = lse.shape
    hs = out.shape[2] // NH
    scale = np.float32(1 / math.sqrt(hs))
    grid = B * NH * -(-T // (16 * _side(hs)))
    tiles = _forward_kernel(hs, hs % 4 == 0 and aligned(out, inp))
    out, inp, lse = out.reshape(-1), inp.reshape(-1), lse.reshape(B * NH, T)
    tiles[grid, 128](out, lse, inp, NH, scale)


# %% [markdown]
# The verdicts, at sizes that divide no tile: 37 positions, heads of 5 and of
# 12 channels.


# %% forward against NumPy
def unfused(out, lse, inp):
    B, NH, T = lse.shape
    with_square(out, lse, inp, simulated(np.zeros(B * NH * T * T, "f4")))


def on_gpu(p, run, place=simulated):
    """out and lse of a problem, as a function computes them."""
    there = place(p.out), place(p.lse)
    run(*there, place(p.inp))
    return [to_host(x) for x in there]


for hs in (5, 12):
    p = problem(1, 37, 2, hs)
    forward_numpy(p.out, p.lse, p.inp)
    runs = (
        ("square", unfused, simulated),
        ("tiles", attention_forward, to_device),
    )
    for name, *run in runs:
        out, lse = on_gpu(p, *run)
        compare(f"{name}: out", out, p.out, tol=1e-5)
        compare(f"{name}: lse", lse, p.lse, tol=1e-5)

# %% [markdown]
# And the counts, on the simulator, for one head of 32 channels and 64
# positions: requests of whole warps and sectors of global memory, requests
# and passes of shared memory, all defined in chapters
# [3.1](01_threads.ipynb) and [3.2](02_sectors.ipynb).


# %% forward, counted
def count(rows, what):
    """Print what `watch` sees of each row's call."""
    print(" " * 8, *(f"{name:>16}" for name in what))
    for name, run in rows:
        with watch() as seen:
            run()
        print(f"{name:<8}", *(f"{getattr(seen, k):16,}" for k in what))


p = problem(1, 64, 1, 32)
what = "requests", "sectors", "shared_requests", "shared_passes"
rows = (("square", lambda: on_gpu(p, unfused)),)
rows += (("tiles", lambda: on_gpu(p, attention_forward)),)
count(rows, what)

# %% [markdown]
# The tiles touch a small part of the square's sectors. (The count knows no
# caches: a sector counts each time a warp asks for it.) They pay with shared
# memory, where a request for four floats a lane takes four passes. A larger
# tile a thread would need fewer, and more registers. At $hs = 64$ a thread
# already takes more than half of the 255 that it may have.
#
# What a block reads for its tile of queries grows with the tile. At
# $T = 1024$ and $hs = 64$ a head has 1 MB of queries, keys, values and
# outputs, and its keys and values are read again by each block after them:

# %% keys and values read by the blocks of a head
T, hs = 1024, 64
for tile in (16, 64):
    rows = sum(range(tile, T + 1, tile))
    print(f"tiles of {tile} queries: {2 * 4 * hs * rows / 1e6:5.1f} MB")

# %% [markdown]
# Four times the queries in a tile, about a quarter of the reads.
#
# What the kernel leaves undone: it computes the tiles on the diagonal whole,
# its copies do not overlap with the arithmetic, and its products run in
# float32, not on the units for products of small matrices in 16 bits that are
# called tensor cores.

# %% [markdown]
# ## Take away
#
# - The square of scores moves 16 bytes a pair through memory; tiles move none
#   of them.
# - A block owns a tile of queries and walks over the keys; every number of the
#   result has one owner.
# - Rows in shared memory are padded so that lanes meet different banks, and a
#   tile in registers reads each of its numbers once for several products.

# %% [markdown]
# ## Exercises
#
# **1** (★★). How many tiles of scores do the blocks of the forward pass
# visit for one head of 64 channels or fewer and $T$ positions?
# Check it by the barriers that its threads reach. Which part of the scores
# that they compute at $T = 1024$ is masked?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# Block $n$ owns queries $64n$ to $\min(64(n + 1), T) - 1$ and visits every
# tile of 32 keys that begins before that end. Each visit has two barriers
# for each of 128 threads. At $T = 1024$ they visit $2 + 4 + \dots + 32 = 272$
# tiles of $64 \cdot 32$ scores, of which $T(T + 1)/2$ are wanted: about 6 %
# are masked.
# :::


# %% exercise 1, tiles visited tags=["hide-cell"]
def visited(T):
    ends = [min(first + 64, T) for first in range(0, T, 64)]
    return sum(-(-end // 32) for end in ends)


# %% exercise 1, checked
p = problem(1, 70, 1, 4)
with watch() as seen:
    on_gpu(p, attention_forward)
verdict("barriers", seen.barriers == 2 * 128 * visited(70), "2 a tile")
masked = 1 - 1024 * 1025 / 2 / (visited(1024) * 64 * 32)
print(f"{visited(1024)} tiles at T = 1024, {masked:.0%} of them masked")

# %% [markdown]
# ## Further reading
#
# - Dao et al. (2022),
#   [FlashAttention](https://arxiv.org/abs/2205.14135): the walk over tiles,
#   with the traffic between memories counted.

# % [markdown]
# ## What llmnb gained

# % what llmnb gained
from llmnb.book.index import gained

gained("3.9")
