# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       cuda.attention: "Attention on a GPU, forward and backward."
# ---

# %% [markdown]
# # Attention on a GPU: tiles, and two walks
#
# > A block of threads owns a tile of queries and walks over the keys; backward
# > walks twice, so that no two blocks add to one number.
#
# *Reading time: 30 minutes. You need: [chapter 1.8](../1_by_hand/08_attention.ipynb),
# the online softmax of [chapter 2.5](../2_cpu/05_attention.ipynb) and chapters
# [3.2](02_sectors.ipynb) and [3.6](06_matmul.ipynb).*

# %% [markdown]
# ## Where we are
#
# At the end of this chapter you can
#
# - say why the square of scores must not travel through a GPU's memory;
# - share the scores of a head among the blocks of a GPU, so that every element
#   of the result has one owner, forward and backward;
# - lay out tiles in shared memory so that lanes meet different banks.

# %% [markdown]
# ## Setup

# %% setup
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np

from llmnb.book.moving import moving
from llmnb.book.owners import draw_owners, walk
from llmnb.book.verify import compare, verdict
from llmnb.gpu.launch import simulated, to_device, to_host
from llmnb.gpu.simulator import RaceError, watch
from llmnb.reference import attention as reference

rng = np.random.default_rng(6)


# %% a problem of any size
def problem(B, T, NH, hs, NKV=None):
    p, dtype = SimpleNamespace(), np.float32
    width = (NH + 2 * (NKV or NH)) * hs
    p.inp = rng.normal(size=(B, T, width)).astype(dtype)
    p.dinp = np.zeros_like(p.inp)
    p.dout = rng.normal(size=(B, T, NH * hs)).astype(dtype)
    p.out, p.lse = np.zeros_like(p.dout), np.zeros((B, NH, T), dtype)
    return p


# %% [markdown]
# ## What a GPU must not do
#
# Attention gives a GPU plenty to do at once: $B \cdot NH$ heads that never
# meet, and in each of them $T$ rows that need nothing of one another. On a CPU
# arithmetic was the limit, because blocks stay in a cache. Here a block of
# threads has 48 KB of *shared memory* unless it asks for more, as ours do not
# ([chapter 3.1](01_threads.ipynb)), and what does not fit there travels through
# global memory. These kernels were simulated and compiled, not run on a GPU.

# %% imports of the GPU's kernels tags=["export"] module="cuda.attention"
import functools
import math

import numpy as np

from llmnb.gpu.launch import DEVICE, aligned, device, given_work, kernel
from llmnb.gpu.simulator import cuda, load4, store4
from llmnb.gpu.warp import warp_sum
from llmnb.reference.attention import count_heads
from llmnb.shapes import shapes

WIDEST_HEAD = 256  # channels; shared memory holds tiles of no more

# %% what a score is before one is seen tags=["exporti"] module="cuda.attention"
# exp makes 0 of it; and it is no infinity, which fastmath rules out
LOWEST = np.float32(-1e30)

# %% [markdown]
# ## Forward: no square
#
# The shortest way would be a kernel for each of (1.8.1), (1.8.2) and (1.8.3),
# with the square of scores between them in scratch memory. For 16 sequences
# of 1024 positions and the 12 heads of GPT-2 124M it takes

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
# the output, which makes 16 a byte. An H100 does 20 for each byte that it moves
# ([chapter 3.6](06_matmul.ipynb)): the square alone asks more of its memory
# than of its arithmetic.
#
# ## Tiles, and two walks
#
# Online softmax, (2.5.1), lets one kernel do all three steps. A block of
# threads owns a *tile* of queries of one head, which it copies to shared
# memory. Then it walks over the keys of the head, a tile at a time, up to the
# diagonal. Each step copies a tile of keys and one of values and takes the
# scores of its queries with them. Where a row's maximum grows it
# rescales what was summed, and adds the new values: this is known as
# FlashAttention. The backward pass walks too; here are both walks.


# %% the tiles and the walks
def to_the_right(s, dq, q, k):  # a block owns a query
    t = cuda.blockIdx.x
    for u in range(t + 1):
        s[t, u] = q[t] * k[u]
        dq[t] += s[t, u] * k[u]


def down(s, dk, q, k):  # a block owns a key
    u = cuda.blockIdx.x
    for t in range(u, len(q)):
        s[t, u] = q[t] * k[u]
        dk[u] += s[t, u] * q[t]


fig, axes = plt.subplots(1, 2, figsize=(7.4, 3.9), dpi=100, layout="tight")
t, u = np.indices((5, 5))
names = {"rows": "tiles of queries", "cols": "tiles of keys"}
draw_owners(axes[0], np.where(u <= t, t, -1).tolist(), "out, dq", **names)
draw_owners(axes[1], np.where(u <= t, u, -1).tolist(), "dk, dv", **names)
for n in range(5):
    axes[0].arrow(0.1, n + 0.82, n + 0.6, 0, head_width=0.12)
    axes[1].arrow(n + 0.82, n + 0.1, 0, 4.6 - n, head_width=0.12)
plt.show()
args = np.zeros((5, 5)), np.zeros(5), *np.arange(10).reshape(2, 5) % 4 + 1
walks = [walk(f.__name__, f, 5, 1, args) for f in (to_the_right, down)]
moving("threads", "both walks, step by step", walks=walks)

# %% [markdown]
# *Figure 3.9.1. Which block takes which tiles of the scores of one head. A block
# that owns queries walks to the right until the diagonal, one that owns keys
# walks down from it. Nobody visits the empty triangle, and every element of a
# result has one owner that sums along its walk. The small kernels do so without
# a softmax; a tile is one number.*
#
# A row of scores lies in 8 neighbouring lanes of a warp, and its maximum
# is found with three exchanges. Every lane of the row keeps the row's $m$; it
# sums $\ell$ over its own scores only, and the parts are added at the end.
# The first tile has key 0, which every query may read, so that from then on
# $m$ is a real score and a masked one has the weight 0.
#
# The size of a head is a constant of the kernel, so that shared memory and
# registers can be laid out when it is compiled, once for each size.


# %% exchanges among lanes tags=["exporti"] module="cuda.attention"
@device
def _lanes_max(value):
    """The largest value of 8 neighbouring lanes, in each of them."""
    for step in (4, 2, 1):
        value = max(value, cuda.shfl_xor_sync(0xFFFFFFFF, value, step))
    return value


# %% [markdown]
# ## Tiles in registers
#
# If every product of two numbers read both of them from shared memory, that
# memory would be the limit. [Chapter 3.6](06_matmul.ipynb) met the same, and the cure is the
# same: a thread takes a small tile of the result in registers. Here 128
# threads stand in 16 rows of 8 and share 64 queries and 32 keys. Row $r$ of
# them owns queries $r, r + 16, r + 32, r + 48$, and lane $l$ of a row keys
# $l, l + 8, l + 16, l + 24$. With 4 queries and 4 keys a thread, 8 numbers
# read serve 16 products. And it reads four channels at once, with `load4`.


# %% which thread owns which scores
def small_tile(s, q, k):
    row, lane = cuda.threadIdx.x // 4, cuda.threadIdx.x % 4
    for t in (row, row + 2):
        for u in (lane, lane + 4):
            s[t, u] = q[t] * k[u]


fig, ax = plt.subplots(figsize=(5, 2.8), dpi=100, layout="tight")
who = [[4 * (t % 2) + u % 4 for u in range(8)] for t in range(4)]
draw_owners(ax, who, group=4, rows="queries", cols="keys")
plt.show()
args = np.zeros((4, 8)), np.arange(1, 5), np.arange(8) % 5 + 1
steps = walk("a small tile", small_tile, 1, 8, args, 4)
moving("threads", "eight threads, step by step", walks=[steps])

# %% [markdown]
# *Figure 3.9.2. The same in small: 4 x 8 scores, each with the number of its
# thread, and two rows of four threads. Here a thread's scores stand 2 queries
# and 4 keys apart, in the kernel 16 and 8. There the eight threads of a row
# share a warp, so that its maximum takes three exchanges and no barrier of the
# block.*
#
# The plan of the 48 KB of shared memory at $hs = 64$:
#
# | tile | rows | floats a row | bytes |
# |---|---|---|---|
# | queries | 64 | 68 | 17,408 |
# | keys, values | 32 each | 68 | 17,408 |
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
# instead of 4 and 4; for more than 128, one and one; that fits up to 256.
#
# Four pieces serve forward and backward alike. $G$ is how many rows of
# threads there are, and $R$ how many rows, and how many columns, of a tile a
# thread takes. The first piece copies a tile to shared memory. Where $hs$ is
# a multiple of 4 and the array begins at a multiple of 16 bytes, so does
# every row of a head, and `FOURS` is true: then it reads vectors of four,
# otherwise float by float. In shared memory `alignment=16` aligns every row.


# %% copy a tile tags=["exporti"] module="cuda.attention"
def _side(hs):
    """R: the rows, and the columns, of a tile that a thread takes."""
    return 4 if hs <= 64 else 2 if hs <= 128 else 1


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
# Between the products stands (2.5.1), for the $R$ rows of a thread. What makes
# a score of a product is a *rule*: here $1 / \sqrt{hs}$ and no window. Others
# are in [chapter 5.4](../5_modern/04_attention.ipynb), which calls these
# kernels for other models. A row that sees no key of its first tile sums
# nonsense, and its first real score multiplies that by $e^{-10^{30} - m} = 0$.


# %% what makes a score tags=["exporti"] module="cuda.attention"
@functools.cache
def plain_score(scale):
    """score(product): the score, and its slope by the product.

    With how many keys a query sees, its own the last, or 0 for all, it is a
    rule, a pair.
    """
    SCALE = np.float32(scale)

    @device
    def score(product):
        return product * SCALE, SCALE

    return score


# %% the softmax of a tile tags=["exporti"] module="cuda.attention"
def _tile_softmax(hs, G, R, rule):
    """softmax(weights, sums, s, top, total, first, start): (2.5.1).

    first, start: the tile's first query and first key.
    """
    PER, (WINDOW, score) = -(-hs // 32) * 4, rule

    @device
    def softmax(weights, sums, s, top, total, first, start):
        row, lane = cuda.threadIdx.x // 8, cuda.threadIdx.x % 8
        for r in range(R):
            new = top[r]
            for j in range(R):
                back = first + row + G * r - (start + lane + 8 * j)
                seen = back >= 0 and (WINDOW == 0 or back < WINDOW)
                value, _ = score(s[R * r + j])
                s[R * r + j] = value if seen else LOWEST
                new = max(new, s[R * r + j])
            new = _lanes_max(new)
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
def _tile_finish(hs, G, R):
    """finish(lse, b, h, sums, top, total, first): (2.5.2)."""
    PER = -(-hs // 32) * 4

    @device
    def finish(lse, b, h, sums, top, total, first):
        row, lane = cuda.threadIdx.x // 8, cuda.threadIdx.x % 8
        for r in range(R):
            t, whole = first + row + G * r, warp_sum(total[r], 8)
            for n in range(PER):
                sums[PER * r + n] /= whole
            if lane == 0 and t < lse.shape[2]:
                lse[b, h, t] = top[r] + math.log(whole)

    return finish


# %% [markdown]
# Two kinds of barriers: all threads wait before a tile is overwritten and after
# it is written, but a row's weights are written and read by lanes of one warp,
# so there the warp's own barrier is enough. The last queries have the longest
# walk. CUDA promises no order among blocks; in case they start in the order of
# their numbers, those of the last queries have the first ones, and short walks
# fill the end. Rows of the last tile that lie beyond $T$ are zeros, compute
# something finite, and are not written.


# %% the kernel of the forward pass tags=["exporti"] module="cuda.attention"
@functools.cache
def _forward_kernel(hs, FOURS, rule):
    R, STRIDE, WINDOW = _side(hs), _stride(hs), rule[0]
    ROWS, COLS, WIDTH = 16 * R, 8 * R, 8 * R + 8
    SUMS, PAIRS = R * (STRIDE // 8), R * R
    copy, write = _tile_copy(hs, FOURS), _tile_write(hs, 16, R, FOURS)
    dots, add = _tile_dots(hs, 16, R), _tile_add(hs, 16, R)
    softmax, finish = _tile_softmax(hs, 16, R, rule), _tile_finish(hs, 16, R)

    @kernel(launch_bounds=128)
    def attention_forward_tiles(out, lse, inp, NKV):
        _, NH, T = lse.shape
        C, W = NH * hs, (NH + 2 * NKV) * hs
        tiles = (T + ROWS - 1) // ROWS
        unit = cuda.blockIdx.x // tiles
        first = (tiles - 1 - cuda.blockIdx.x % tiles) * ROWS
        b, h = unit // NH, unit % NH
        x, y = b * T * W, b * T * C + h * hs
        key = x + (NH + h * NKV // NH) * hs
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
        copy(q, inp, x + h * hs, W, first, T)
        low = max(0, first + 1 - WINDOW) // COLS * COLS if WINDOW else 0
        for start in range(low, min(first + ROWS, T), COLS):
            cuda.syncthreads()
            copy(k, inp, key, W, start, T)
            copy(v, inp, key + NKV * hs, W, start, T)
            cuda.syncthreads()
            dots(s, q, k)
            softmax(weights, sums, s, top, total, first, start)
            cuda.syncwarp()
            add(sums, weights, v)
        finish(lse, b, h, sums, top, total, first)
        write(out, sums, y, C, first, T, 0)

    return attention_forward_tiles


# %% the checks on a GPU tags=["exporti"] module="cuda.attention"
def check_heads(name, out, lse, inp):
    """The Heads; raise for what the kernels cannot take."""
    heads = count_heads(name, out, lse, inp)
    if not lse.size:
        raise ValueError(f"{name}: lse must not be empty, got {lse.shape}")
    if heads.hs > WIDEST_HEAD:
        raise ValueError(
            f"{name}: a head of {heads.hs} channels is too wide for a GPU, "
            f"which takes {WIDEST_HEAD}"
        )
    return heads


# %% attention, forward tags=["export"] module="cuda.attention"
@shapes("B T C!, B NH|C T!, B T QKV", DEVICE)
def attention_forward(out, lse, inp):
    """Causal self-attention of NH heads.

    inp: (B, T, (NH + 2 NKV) * hs), the heads of queries, of keys and of
    values; NKV divides NH, and hs is at most 256. Writes out (B, T, NH * hs)
    and lse (B, NH, T), the log-sum-exp of each row of scaled, masked scores,
    which the backward pass needs. All float32 on a device. Raises TypeError
    or ValueError before it launches anything.
    """
    heads = check_heads("attention_forward", out, lse, inp)
    rule = 0, plain_score(1 / math.sqrt(heads.hs))
    launch_forward(heads, rule, out, lse, inp)


# %% the launch, forward tags=["exporti"] module="cuda.attention"
def launch_forward(heads, rule, out, lse, inp):
    hs, T = heads.hs, lse.shape[2]
    grid = len(lse) * heads.NH * -(-T // (16 * _side(hs)))
    tiles = _forward_kernel(hs, hs % 4 == 0 and aligned(out, inp), rule)
    tiles[grid, 128](out.reshape(-1), lse, inp.reshape(-1), heads.NKV)


# %% forward against NumPy, and counted
def on_gpu(p, place=to_device):
    there = place(p.out), place(p.lse)
    attention_forward(*there, place(p.inp))
    return [to_host(x) for x in there]


for hs in (5, 12):  # neither they nor 37 divide a tile
    p = problem(1, 37, 2, hs, NKV=1)
    reference.attention_forward(p.out, p.lse, p.inp)
    out, lse = on_gpu(p)
    compare(f"{hs}: out", out, p.out, tol=1e-5)
    compare(f"{hs}: lse", lse, p.lse, tol=1e-5)
with watch() as seen:
    on_gpu(problem(1, 64, 1, 32), simulated)
for name in ("requests", "sectors", "shared_requests", "shared_passes"):
    print(f"{name:<15} {getattr(seen, name):9,}")

# %% [markdown]
# The counts are the simulator's, for one head of 32 channels and 64 positions
# ([chapter 3.2](02_sectors.ipynb) defines them). A request of shared memory for
# four floats a lane takes four passes. A larger tile a thread would need fewer,
# and more registers: at $hs = 64$ it takes more than half of the 255 that it may
# have. A block reads the keys and values before its queries once: with 64
# queries a tile, a quarter as often as with 16.
#
# ## The numbers of the rows
#
# Backward needs $D_t$, (1.8.9), for each row of each head before it takes any
# weight. A warp takes one.


# %% the dot products of the rows tags=["exporti"] module="cuda.attention"
@kernel
def _attention_rows(D, dout, out):
    """A warp a row of a head: (1.8.9). D: (B, NH, T)."""
    (B, T, C), NH = out.shape, D.shape[1]
    row, lane = cuda.grid(1) // 32, cuda.grid(1) % 32
    b, t, h = row // (T * NH), row // NH % T, row % NH
    hs = C // NH
    if b < B:
        total = np.float32(0)
        for i in range(h * hs + lane, h * hs + hs, 32):
            total += dout[b, t, i] * out[b, t, i]
        total = warp_sum(total)
        if lane == 0:
            D[b, h, t] = total


# %% [markdown]
# ## Backward: two walks
#
# $dq_t$ is a sum over keys; $dk_u$ and $dv_u$ are sums over queries. The two
# want different owners, as in the two halves of figure 3.9.1. Could a block
# that owns keys add to $dq$ on its way? Here is that in small, a block for
# each key and a thread for each channel:


# %% a block for each key adds to dq
@kernel
def dq_by_key(dq, ds, k):
    u, i = cuda.blockIdx.x, cuda.threadIdx.x
    for t in range(u, dq.shape[0]):
        dq[t, i] += ds[t, u] * k[u, i]


small = [rng.normal(size=(3, n)).astype(np.float32) for n in (4, 3, 4)]
try:
    with watch():
        dq_by_key[3, 4](*map(simulated, small))
    verdict("the race", False, "is caught")
except RaceError as error:
    print(str(error).replace(", and", ",\nand"))

# %% [markdown]
# Other blocks add to the same numbers at the same time, and some of what
# they add is lost. Atomic additions would lose nothing, but their order, and
# with it the last bits, would change from run to run. So we walk twice: one
# kernel owns tiles of keys and walks down, for $dk$ and $dv$, and another
# owns tiles of queries and walks to the right, for $dq$. The price is that
# both take the products $S$ and $dA$ of (2.5.3): seven in all instead of
# five. It buys that every number has one owner, which sums in one order.
#
# The pieces of the forward pass do the work, now for blocks of 64 threads in
# 8 rows of 8, which take 32 queries and 32 keys ($G = 8$, $R = 4$). In the
# first kernel the *rows* of a tile are keys and its columns queries, so its
# scores are transposed: $A^\top$ and $dS^\top$ stand in shared memory ready
# for $dV \mathrel{+}= A^\top dO$ and $dK \mathrel{+}= dS^\top Q$. Four tiles
# of 32 rows and one of 32 x 40 weights take 39,936 bytes at $hs = 64$. The
# weights' tile serves twice: $A^\top$ first, and once the warp has read it,
# $dS^\top$. Its rows again belong to one warp each, whose barrier is enough.


# %% weights and gradients of a tile tags=["exporti"] module="cuda.attention"
def _tile_gradients(R, BY_KEY, rule):
    """gradients(s, ds, lse, D, b, h, first, start): (1.8.4), (1.8.8).

    s, ds hold dot products of a tile; they become weights and gradients of
    scores. BY_KEY: whether its rows, from `first` on, are keys and its
    columns, from `start` on, queries; else the other way.
    """
    WINDOW, score = rule

    @device
    def gradients(s, ds, lse, D, b, h, first, start):
        row, lane = cuda.threadIdx.x // 8, cuda.threadIdx.x % 8
        T = lse.shape[2]
        for r in range(R):
            for j in range(R):
                t, u = first + row + 8 * r, start + lane + 8 * j
                if BY_KEY:
                    t, u = u, t
                a = d = np.float32(0)
                if u <= t and t < T and (WINDOW == 0 or t - u < WINDOW):
                    value, slope = score(s[R * r + j])
                    a = math.exp(value - lse[b, h, t])
                    d = a * (ds[R * r + j] - D[b, h, t]) * slope
                s[R * r + j], ds[R * r + j] = a, d

    return gradients


# %% hand numbers to the warp tags=["exporti"] module="cuda.attention"
@functools.cache
def _tile_share(R):
    """share(weights, s): a thread's R * R numbers to shared memory."""

    @device
    def share(weights, s):
        row, lane = cuda.threadIdx.x // 8, cuda.threadIdx.x % 8
        cuda.syncwarp()  # whoever still reads the last ones
        for r in range(R):
            for j in range(R):
                weights[row + 8 * r, lane + 8 * j] = s[R * r + j]
        cuda.syncwarp()

    return share


# %% [markdown]
# The walk to the right keeps half as many sums, and its
# `launch_bounds=(64, 5)` asks the compiler to leave room for five of its blocks
# on a multiprocessor: 65,536 registers for 320 threads are 204 each. A block
# that owns keys walks once for each head of queries that reads them.


# %% what both walks are made of tags=["exporti"] module="cuda.attention"
def _pieces(hs, FOURS, BY_KEY, rule):
    """What both walks are made of."""
    R = _side(hs)
    products = _tile_dots(hs, 8, R), _tile_add(hs, 8, R)
    gradients = _tile_gradients(R, BY_KEY, rule), _tile_share(R)
    copies = _tile_copy(hs, FOURS), _tile_write(hs, 8, R, FOURS)
    return *copies, *products, *gradients


# %% walk over queries tags=["exporti"] module="cuda.attention"
@functools.cache
def _keys_kernel(hs, FOURS, rule):
    """A block owns a tile of keys and values, for all heads that read it."""
    R, STRIDE, WINDOW = _side(hs), _stride(hs), rule[0]
    SUMS, PAIRS, ROWS, WIDTH = R * (STRIDE // 8), R * R, 8 * R, 8 * R + 8
    copy, write, dots, add, gradients, share = _pieces(hs, FOURS, True, rule)

    @kernel(launch_bounds=64)
    def attention_backward_keys(dinp, dout, inp, lse, D, NKV, more):
        _, NH, T = lse.shape
        C, W, group = NH * hs, (NH + 2 * NKV) * hs, NH // NKV
        tiles = (T + ROWS - 1) // ROWS
        unit, first = cuda.blockIdx.x // tiles, cuda.blockIdx.x % tiles * ROWS
        b, kv = unit // NKV, unit % NKV
        key = b * T * W + (NH + kv) * hs
        k = cuda.shared.array((ROWS, STRIDE), np.float32, alignment=16)
        v = cuda.shared.array((ROWS, STRIDE), np.float32, alignment=16)
        q = cuda.shared.array((ROWS, STRIDE), np.float32, alignment=16)
        do = cuda.shared.array((ROWS, STRIDE), np.float32, alignment=16)
        weights = cuda.shared.array((ROWS, WIDTH), np.float32, alignment=16)
        dk = cuda.local.array(SUMS, np.float32)
        dv = cuda.local.array(SUMS, np.float32)
        s = cuda.local.array(PAIRS, np.float32)
        ds = cuda.local.array(PAIRS, np.float32)
        for n in range(SUMS):
            dk[n] = dv[n] = np.float32(0)
        copy(k, inp, key, W, first, T)
        copy(v, inp, key + NKV * hs, W, first, T)
        stop = min(T, first + ROWS - 1 + WINDOW) if WINDOW else T
        for h in range(kv * group, kv * group + group):
            for start in range(first, stop, ROWS):
                cuda.syncthreads()
                copy(q, inp, b * T * W + h * hs, W, start, T)
                copy(do, dout, b * T * C + h * hs, C, start, T)
                cuda.syncthreads()
                dots(s, k, q)
                dots(ds, v, do)
                gradients(s, ds, lse, D, b, h, first, start)
                share(weights, s)
                add(dv, weights, do)
                share(weights, ds)
                add(dk, weights, q)
        write(dinp, dk, key, W, first, T, more)
        write(dinp, dv, key + NKV * hs, W, first, T, more)

    return attention_backward_keys


# %% walk over keys tags=["exporti"] module="cuda.attention"
@functools.cache
def _queries_kernel(hs, FOURS, rule):
    """A block owns a tile of queries."""
    R, STRIDE, WINDOW = _side(hs), _stride(hs), rule[0]
    SUMS, PAIRS, ROWS, WIDTH = R * (STRIDE // 8), R * R, 8 * R, 8 * R + 8
    copy, write, dots, add, gradients, share = _pieces(hs, FOURS, False, rule)

    @kernel(launch_bounds=(64, 5))
    def attention_backward_queries(dinp, dout, inp, lse, D, NKV, more):
        _, NH, T = lse.shape
        C, W = NH * hs, (NH + 2 * NKV) * hs
        tiles = (T + ROWS - 1) // ROWS
        unit = cuda.blockIdx.x // tiles
        first = (tiles - 1 - cuda.blockIdx.x % tiles) * ROWS
        b, h = unit // NH, unit % NH
        query = b * T * W + h * hs
        key = b * T * W + (NH + h * NKV // NH) * hs
        q = cuda.shared.array((ROWS, STRIDE), np.float32, alignment=16)
        do = cuda.shared.array((ROWS, STRIDE), np.float32, alignment=16)
        k = cuda.shared.array((ROWS, STRIDE), np.float32, alignment=16)
        v = cuda.shared.array((ROWS, STRIDE), np.float32, alignment=16)
        weights = cuda.shared.array((ROWS, WIDTH), np.float32, alignment=16)
        dq = cuda.local.array(SUMS, np.float32)
        s = cuda.local.array(PAIRS, np.float32)
        ds = cuda.local.array(PAIRS, np.float32)
        for n in range(SUMS):
            dq[n] = np.float32(0)
        copy(q, inp, query, W, first, T)
        copy(do, dout, b * T * C + h * hs, C, first, T)
        low = max(0, first + 1 - WINDOW) // ROWS * ROWS if WINDOW else 0
        for start in range(low, min(first + ROWS, T), ROWS):
            cuda.syncthreads()
            copy(k, inp, key, W, start, T)
            copy(v, inp, key + NKV * hs, W, start, T)
            cuda.syncthreads()
            dots(s, q, k)
            dots(ds, do, v)
            gradients(s, ds, lse, D, b, h, first, start)
            share(weights, ds)
            add(dq, weights, k)
        write(dinp, dq, query, W, first, T, more)

    return attention_backward_queries


# %% attention, backward tags=["export"] module="cuda.attention"
def attention_scratch(B, T, NH):
    """How many floats of `work` the backward pass wants: one a row."""
    return B * NH * T


@shapes("B T QKV!, B T C, B T QKV, B T C, B NH|C T", DEVICE, work="W!?")
def attention_backward(dinp, dout, inp, out, lse, add=True, work=None):
    """Add attention's gradient to dinp.

    dinp, inp: (B, T, (NH + 2 NKV) * hs). dout, out: (B, T, NH * hs). lse:
    (B, NH, T). out and lse are as the forward pass left them. All float32
    on a device. add: False overwrites dinp instead of adding. work: scratch
    of attention_scratch() floats, or None to allocate it. Every element is
    summed in one order. Raises TypeError or ValueError before it launches
    anything.
    """
    name = "attention_backward"
    heads = check_heads(name, out, lse, inp)
    work = given_work(name, work, lse.size, inp)
    arrays = dinp, dout, inp, out, lse
    rule = 0, plain_score(1 / math.sqrt(heads.hs))
    launch_backward(heads, rule, arrays, add, work)


# %% the launches, backward tags=["exporti"] module="cuda.attention"
def launch_backward(heads, rule, arrays, add, work):
    """arrays: dinp, dout, inp, out and lse."""
    (dinp, dout, inp, out, lse), (NH, NKV, hs) = arrays, heads
    B, _, T = lse.shape
    D = work[: lse.size].reshape(B, NH, T)
    _attention_rows[-(-lse.size // 4), 128](D, dout, out)
    tiles, fours = -(-T // (8 * _side(hs))), hs % 4 == 0
    fours = fours and aligned(dinp, dout, inp)
    flat = [x.reshape(-1) for x in (dinp, dout, inp)]
    keys = _keys_kernel(hs, fours, rule)
    queries = _queries_kernel(hs, fours, rule)
    keys[B * NKV * tiles, 64](*flat, lse, D, NKV, int(add))
    queries[B * NH * tiles, 64](*flat, lse, D, NKV, int(add))


# %% backward against NumPy
def back_on_gpu(p, place=to_device):
    there = [place(x) for x in (p.dinp, p.dout, p.inp, p.out, p.lse)]
    attention_backward(*there)
    return to_host(there[0])


for hs in (5, 12):
    p = problem(1, 37, 2, hs, NKV=1)
    reference.attention_forward(p.out, p.lse, p.inp)
    p.dinp[...], want = 1, np.ones_like(p.dinp)  # both add to it
    reference.attention_backward(want, p.dout, p.inp, p.out, p.lse)
    compare(f"dinp, heads of {hs}", back_on_gpu(p), want, tol=1e-5)
same = np.array_equal(back_on_gpu(p), back_on_gpu(p))
verdict("another run", same, "gives the same bits")

# %% [markdown]
# Left undone: tiles on the diagonal are computed whole, copies do not overlap
# with the arithmetic, and products run in float32, not on tensor cores.
#
# ## Take away
#
# - A block owns a tile of queries and walks over the keys; the square of
#   scores never leaves the chip.
# - A small tile of the result in registers spares most reads of shared memory.
# - Backward walks twice, by keys and by queries, so that no two blocks add to
#   one number and every run has the same bits.
#
# ## Exercises
#
# **1** (★★). A head of at most 64 channels has $T$ queries. How many tiles of
# keys do its blocks visit in the forward pass? Of the scores that they take for
# $T = 1024$, what part lies above the diagonal?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# A block whose queries begin at $f$ visits the tiles, of 32 keys, that begin
# before both $f + 64$ and $T$. For 1,024 they are 272, and 5.8 % lie above.
# :::


# %% exercise 1, a solution tags=["hide-cell"]
def visits(T):
    return sum(-(-min(f + 64, T) // 32) for f in range(0, T, 64))


# %% exercise 1, checked
with watch() as seen:
    on_gpu(problem(1, 70, 1, 4), simulated)
verdict("visits", seen.barriers == 2 * 128 * visits(70), "two barriers each")
above = 1 - (1024 * 1025 / 2) / (64 * 32 * visits(1024))
verdict("above", 0.0575 < above < 0.0585, "5.8 %")

# %% [markdown]
# ## Further reading
#
# - Dao et al. (2022), [FlashAttention](https://arxiv.org/abs/2205.14135): the
#   walk over tiles, with the traffic between memories counted.
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("3.9")
