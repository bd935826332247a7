# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       cuda.bf16_attention: "Attention in bfloat16, on tensor cores."
# ---

# %% [markdown]
# # Attention on tensor cores: scores never leave their lanes
#
# > The product of queries and keys lies in the lanes as a factor of the next
# > product must. Forward in one kernel, backward with five products instead of
# > seven, and every sum in one order.
#
# *Reading time: 22 minutes. You need: attention on a GPU
# ([chapter 3.9](09_attention.ipynb)) and products on tensor cores
# ([chapter 3.14](14_tensor_products.ipynb)).*

# %% [markdown]
# ## Where we are
#
# In [chapter 3.9](09_attention.ipynb) a block walked over tiles of keys, and
# its lanes handed weights to each other through shared memory. On tensor cores
# they need not, for the fragments of two results side by side lie as those of
# a left factor do (figure 3.13.1). At the end of this chapter you can
#
# - follow a score from `mma` through the softmax into the next `mma`, in the
#   registers of one lane;
# - count the products of the backward pass, and save two of the seven;
# - say which rounding costs how much, and take a factor in two parts;
# - add up the gradient of the queries from many blocks without an atomic, in
#   one order.

# %% [markdown]
# ## Setup

# %% setup
import matplotlib.pyplot as plt

from llmnb.book.owners import draw_owners
from llmnb.book.verify import verdict
from llmnb.gpu.launch import empty, simulated, to_host
from llmnb.gpu.simulator import watch
from llmnb.reference import attention as reference
from llmnb.reference.bfloat16 import from_bfloat16, to_bfloat16

# %% imports of the kernels tags=["export"]
import functools
import math

import numpy as np

from llmnb.cuda.attention import LOWEST, check_heads
from llmnb.cuda.bf16_matmul import filler, halves, multiply, pairs, swizzle
from llmnb.cuda.bf16_matmul import taker, write_pair
from llmnb.cuda.matmul import ZERO
from llmnb.gpu.fragments import cp_async_commit, cp_async_wait
from llmnb.gpu.fragments import pack, unpack
from llmnb.gpu.launch import device, given_work, kernel
from llmnb.gpu.simulator import cuda
from llmnb.gpu.warp import warp_sum
from llmnb.shapes import shapes

# %% [markdown]
# ## Tiles of a head
#
# A block has four warps and 64 queries, 16 for each warp, and takes 64 keys at
# a time. A tile is 64 rows of a head; a row of $hs$ bfloat16 numbers is $hs/8$
# chunks, which change places as in [chapter 3.14](14_tensor_products.ipynb).
# All of it comes from there: how a tile is filled, and how fragments are taken
# from it. Heads have 16, 32 or 64 channels; GPT-2's have 64. At 128 the four
# tiles of the forward pass, two of keys and two of values, would take 64 KB,
# more than the 48 that a kernel may declare.
#
# One piece is new: sums that become a factor, or two.

# %% the pieces tags=["exporti"]
WIDTHS = 16, 32, 64  # channels of a head


@device
def in_two(x, y):
    """A pair in bfloat16, and as such a pair what its rounding left over."""
    pair = pack(x, y)
    low, high = unpack(pair)
    return pair, pack(x - low, y - high)


@device
def as_factors(s, j):
    """Sums j to j + 8 as left factors of 16 steps: two, to be added up."""
    a0, b0 = in_two(s[j], s[j + 1])
    a1, b1 = in_two(s[j + 2], s[j + 3])
    a2, b2 = in_two(s[j + 4], s[j + 5])
    a3, b3 = in_two(s[j + 6], s[j + 7])
    return (a0, a1, a2, a3), (b0, b1, b2, b3)


# %% [markdown]
# `as_factors` is the whole trick. Sums j to j + 3 are four numbers of D, for
# eight columns, the next four for the next eight. As A of the next product
# those columns are 16 steps, and the table of
# [chapter 3.13](13_tensor_cores.ipynb) wants: the row of the group and its two
# columns; the row eight further down; the same for the columns eight further.
# They are there. Only the rounding to bfloat16 is left to do. What it leaves
# over, rounded as well, makes a second factor: with both, a sum goes into the
# product with 16 significant bits. The right factor is taken once for the two.


# %% products of a tile tags=["exporti"]
def _weighted(hs):
    """weighted(o, s, tile, b): add the sums s, 16 by 64, times 64 rows."""
    right, PARTS = taker(hs // 8, False, False), hs // 16

    @device
    def weighted(o, s, tile, b):
        for j in range(4):
            first, second = as_factors(s, 8 * j)
            for n in range(PARTS):
                values = right(tile, b, 16 * n, 16 * j)
                multiply(o, 8 * n, first, values)
                multiply(o, 8 * n, second, values)

    return weighted


# %% [markdown]
# ## Forward
#
# A lane has sums of two rows: row lane // 4 and the one eight further. A row's
# maximum and sum are therefore over four lanes, two shuffles. Below the
# diagonal nothing is masked; the one tile on it is, and the tiles above it are
# never loaded. Keys from T on arrive as zeros; they come after every query
# that is written, and so the mask hides them too. The rest is (2.5.1), as in
# chapter 3.9. The weights go into the product with the values in two parts,
# and what rounding leaves of the output can be kept, too, in an array `rest`:
# the backward pass will want it.


# %% the softmax of fragments tags=["exporti"]
@device
def _quad_max(value):
    value = max(value, cuda.shfl_xor_sync(0xFFFFFFFF, value, 1))
    return max(value, cuda.shfl_xor_sync(0xFFFFFFFF, value, 2))


def _softmax(hs):
    """softmax(s, o, top, total, scale, back): (2.5.1) for two rows a lane.

    back: by how much the lane's first row is after the tile's first key;
    the tile is masked where that is less than 64.
    """
    PARTS = hs // 8

    @device
    def softmax(s, o, top, total, scale, back):
        near = 2 * (cuda.laneid & 3)
        for half in range(2):
            new = top[half]
            for n in range(8):
                for m in range(2):
                    i, ahead = 4 * n + 2 * half + m, 8 * n + near + m
                    value = s[i] * scale
                    if ahead > back + 8 * half:
                        value = LOWEST
                    s[i], new = value, max(new, value)
            new = _quad_max(new)
            factor = math.exp(top[half] - new)
            top[half], total[half] = new, total[half] * factor
            for n in range(8):
                for m in range(2):
                    i = 4 * n + 2 * half + m
                    s[i] = math.exp(s[i] - new)
                    total[half] += s[i]
            for n in range(PARTS):
                o[4 * n + 2 * half] *= factor
                o[4 * n + 2 * half + 1] *= factor

    return softmax


# %% write rows tags=["exporti"]
@functools.cache
def _writer(hs, rest=False):
    """write(out, o, rows, at, pitch, scales, add): 16 rows of a head.

    rows: the warp's first and where they stop; at, pitch: in pairs; scales:
    by what the rows of each half are multiplied. rest: whether to write what
    rounding leaves, and not to add.
    """
    PARTS = hs // 8

    @device
    def write(out, o, rows, at, pitch, scales, add):
        row, stop = rows
        for half in range(2):
            r = row + (cuda.laneid >> 2) + 8 * half
            if r < stop:
                for n in range(PARTS):
                    i = r * pitch + at + 4 * n + (cuda.laneid & 3)
                    x = o[4 * n + 2 * half] * scales[half]
                    y = o[4 * n + 2 * half + 1] * scales[half]
                    if rest:
                        _, out[i] = in_two(x, y)
                    else:
                        write_pair(out, out, i, x, y, add)

    return write


# %% the end of the rows tags=["exporti"]
@device
def _finish(lse, at, top, total, t, T):
    """Write (2.5.2) for rows t and t + 8; total becomes its inverse."""
    for half in range(2):  # both before lanes part: they have to meet for it
        total[half] = warp_sum(total[half], 4)
    for half in range(2):
        if (cuda.laneid & 3) == 0 and t + 8 * half < T:
            lse[at + t + 8 * half] = top[half] + math.log(total[half])
        total[half] = np.float32(1) / total[half]


# %% queries in registers, and their scores tags=["exporti"]
def _scores(hs):
    """hold(q, tile, row): 16 queries; scores(s, q, tile, base): by 64 keys."""
    left, right = taker(hs // 8, True, True), taker(hs // 8, True, False)
    STEPS = hs // 16

    @device
    def hold(q, tile, row):
        for k in range(STEPS):
            i = 4 * k
            q[i], q[i + 1], q[i + 2], q[i + 3] = left(tile, 0, row, 16 * k)

    @device
    def scores(s, q, tile, base):
        for n in range(32):
            s[n] = ZERO
        for k in range(STEPS):
            i = 4 * k
            factor = q[i], q[i + 1], q[i + 2], q[i + 3]
            for j in range(4):
                keys = right(tile, base, 16 * j, 16 * k)
                multiply(s, 8 * j, factor, keys)

    return hold, scores


# %% the kernel of the forward pass tags=["exporti"]
@functools.cache
def _forward_kernel(hs, keep):
    TILE, ROOM, SUMS, HEAD, Q = 32 * hs, 128 * hs, hs // 2, hs // 2, hs // 4
    fill, (hold, scores) = filler(64, hs // 8, 128), _scores(hs)
    softmax, weighted = _softmax(hs), _weighted(hs)
    write, leave = _writer(hs), _writer(hs, True)

    def attention_forward_bf16_tiles(out, lse, inp, T, NH, NKV, scale, rest):
        tile = cuda.shared.array(ROOM, np.int32, alignment=16)
        q = cuda.local.array(Q, np.int32)
        s = cuda.local.array(32, np.float32)
        o = cuda.local.array(SUMS, np.float32)
        top = cuda.local.array(2, np.float32)
        total = cuda.local.array(2, np.float32)
        now, W, tiles = 0, (NH + 2 * NKV) * HEAD, (T + 63) // 64
        unit, warp = cuda.blockIdx.x // tiles, cuda.threadIdx.x // 32
        first = (tiles - 1 - cuda.blockIdx.x % tiles) * 64
        row, h = unit // NH * T, unit % NH
        stop, key = row + T, (NH + h * NKV // NH) * HEAD
        value, t = key + NKV * HEAD, first + 16 * warp + (cuda.laneid >> 2)
        fill(tile, 0, inp, row + first, stop, h * HEAD, W)
        cp_async_commit()
        cp_async_wait()
        cuda.syncthreads()
        hold(q, tile, 16 * warp)
        for n in range(SUMS):
            o[n] = ZERO
        for half in range(2):
            top[half], total[half] = LOWEST, ZERO
        cuda.syncthreads()  # the queries are in registers
        fill(tile, 0, inp, row, stop, key, W)
        fill(tile, TILE, inp, row, stop, value, W)
        cp_async_commit()
        for start in range(0, first + 64, 64):
            cp_async_wait()
            cuda.syncthreads()
            if start < first:
                there, after = row + start + 64, 2 * TILE - now
                fill(tile, after, inp, there, stop, key, W)
                fill(tile, after + TILE, inp, there, stop, value, W)
                cp_async_commit()
            scores(s, q, tile, now)
            softmax(s, o, top, total, scale, t - start)
            weighted(o, s, tile, now + TILE)
            now = 2 * TILE - now
        _finish(lse, unit * T, top, total, t, T)
        rows = row + first + 16 * warp, stop
        write(out, o, rows, h * HEAD, NH * HEAD, total, False)
        if keep:
            leave(rest, o, rows, h * HEAD, NH * HEAD, total, False)

    return kernel(attention_forward_bf16_tiles, launch_bounds=128)


# %% attention, forward tags=["export"]
@shapes("B T C!, B NH|C T!, B T QKV", halves("lse"), rest="B T C!?")
def attention_forward_bf16(out, lse, inp, rest=None):
    """Causal self-attention of NH heads, in bfloat16 on tensor cores.

    inp: (B, T, (NH + 2 NKV) * hs), the heads of queries, of keys and of
    values; out: (B, T, NH * hs): bits of bfloat16, uint16, on a device. lse:
    (B, NH, T), float32. rest: None, or as out: what its rounding left over,
    for the backward pass. hs is 16, 32 or 64; NKV divides NH. All but inp is
    float32 until it is written. Raises TypeError or ValueError before it
    launches anything.
    """
    heads = _count_heads("attention_forward_bf16", out, lse, inp)
    B, NH, T = lse.shape
    scale = np.float32(1 / math.sqrt(heads.hs))
    made = _forward_kernel(heads.hs, rest is not None)
    left, shape = pairs(out if rest is None else rest), (T, NH, heads.NKV)
    made[B * NH * -(-T // 64), 128](
        pairs(out), lse.reshape(-1), pairs(inp), *shape, scale, left
    )


# %% the heads tags=["exporti"]
def _count_heads(name, out, lse, inp):
    """The Heads; raise for what the kernels cannot take."""
    heads = check_heads(name, out, lse, inp)
    if heads.hs not in WIDTHS:
        raise ValueError(
            f"{name}: in bfloat16 a head has {', '.join(map(str, WIDTHS))} "
            f"channels, got {heads.hs}"
        )
    return heads


# %% [markdown]
# The verdict, against attention in float64 on the same bfloat16 numbers, over
# two tiles, the second not full, with two heads of queries for one of keys:

# %% forward, against float64
draw = np.random.default_rng(15)
B, T, NH, NKV, hs = 1, 72, 2, 1, 16


def half(*shape):
    return to_bfloat16(draw.normal(size=shape).astype(np.float32))


def error(got, want):
    got = from_bfloat16(got) if got.dtype == np.uint16 else got
    return np.linalg.norm(got - want) / np.linalg.norm(want)


inp, dout = half(B, T, (NH + 2 * NKV) * hs), half(B, T, NH * hs)
wide_inp, wide_dout = (
    from_bfloat16(x).astype(np.float64) for x in (inp, dout)
)
want, want_lse = np.empty((B, T, NH * hs)), np.empty((B, NH, T))
reference.attention_forward(want, want_lse, wide_inp)
there = simulated(inp)
out, lse = empty((B, T, NH * hs), np.uint16), empty((B, NH, T))
rest = empty(out.shape, np.uint16)
with watch():
    attention_forward_bf16(out, lse, there, rest)
verdict("out", error(to_host(out), want) < 2e-3, "within 2e-3 of float64")
both = sum(from_bfloat16(to_host(x)) for x in (out, rest))
verdict("out + rest", error(both, want) < 1e-5, "within 1e-5")
verdict("lse", error(to_host(lse), want_lse) < 1e-6, "within 1e-6")

# %% [markdown]
# ## Backward: five products
#
# (1.8.4) to (1.8.8) need the weights A once more, from scores S, and the
# gradients dA of the weights. With those come the three gradients:
#
# | product | of |
# |---|---|
# | S | queries and keys |
# | dA | gradients of the output and values |
# | dv | A and gradients of the output |
# | dk | dS and queries |
# | dq | dS and keys |
#
# The first four are at hand where a block owns a tile of keys and walks over
# the queries; dq is a sum over keys and wants a walk over those. In chapter
# 3.9 two kernels walked, and both made S and dA: seven products. Here one
# kernel makes all five. It adds its part of dq, 64 queries by $hs$, to an array
# in global memory. If all blocks of a head added to one array they would need
# atomics, and the order of a sum would be that in which they came. So the
# tiles of keys are dealt to a few *strips*, and each strip has an array of
# its own: one block walks over all tiles of its strip, one after the other,
# and adds in that order. A last kernel adds up the arrays of the strips.
#
# How many strips? A block a head would be enough for the order, but not for
# the GPU: 16 sequences of 12 heads make 192 blocks, where each of an H100's
# 132 multiprocessors holds two, even if a lane takes all 255 registers. With
# three strips there are 576. A tile's work grows with the queries that see it,
# and so the strips take turns: strip 0 has tiles 0, 3 and 6, strip 1 has 1, 4
# and 7. The price is memory, strips times dq in float32.

# %% who walks over what tags=["hide-input"]
tiles, strips = 8, 3
owner = [
    [keys % strips if queries >= keys else -1 for keys in range(tiles)]
    for queries in range(tiles)
]
fig, ax = plt.subplots(figsize=(3, 3), dpi=100)
draw_owners(ax, owner, "strips", rows="tiles of queries", cols="of keys")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 3.15.1. Eight tiles of keys in three strips. A block goes down its
# columns, one after the other, from the diagonal on; a row of dq gets a sum
# from each column left of the diagonal, the strips' columns in order.*
#
# In a block, a warp owns 16 keys and all channels of their dk and dv. It makes
# S and dA transposed, keys by queries, so that both are left factors for dv
# and dk as they are; and it takes 16 queries at a time: then S and dA take
# only eight registers each. For dq the sum is over the keys of all four warps;
# dS goes through shared memory once, and each warp takes 16 queries.


# %% the row sums of (1.8.9) tags=["exporti"]
@kernel
def _rows(D, dout, out, rest, kept):
    """A warp a row of a head. D: (B, NH, T); the others: pairs."""
    B, NH, T = D.shape
    row, lane = cuda.grid(1) // 32, cuda.grid(1) % 32
    b, t, h = row // (T * NH), row // NH % T, row % NH
    HALF = out.size // (B * T * NH)
    if b < B:
        total = ZERO
        for i in range(row * HALF + lane, row * HALF + HALF, 32):
            x, y = unpack(dout[i])
            u, v = unpack(out[i])
            if kept:
                low, high = unpack(rest[i])
                u, v = u + low, v + high
            total += x * u + y * v
        total = warp_sum(total)
        if lane == 0:
            D[b, h, t] = total


# %% weights and gradients of scores tags=["exporti"]
@device
def _gradients(s, ds, head, u, start):
    """s becomes weights, (1.8.4), and ds gradients of scores, (1.8.8).

    For 16 queries from `start` on. head: lse and D, flat, where the head's
    rows begin in them, T and the scale; u: the lane's first key.
    """
    lse, D, at, T, scale = head
    for n in range(2):
        for m in range(2):
            t = start + 8 * n + 2 * (cuda.laneid & 3) + m
            top = share = ZERO
            if t < T:
                top, share = lse[at + t], D[at + t]
            for half in range(2):
                i, a = 4 * n + 2 * half + m, ZERO
                if u + 8 * half <= t and t < T:
                    a = math.exp(s[i] * scale - top)
                s[i], ds[i] = a, a * (ds[i] - share)


# %% hand dS to the block tags=["exporti"]
_DS_PLACE, REST = swizzle(8), 2048  # how far behind dS its rest lies


@device
def _share(tile, base, factor, row, j):
    """A warp's 16 keys and 16 queries, from 16 j on, to shared memory."""
    a0, a1, a2, a3 = factor
    low, near = row + (cuda.laneid >> 2), base + (cuda.laneid & 3)
    tile[near + _DS_PLACE(low, 2 * j)] = a0
    tile[near + _DS_PLACE(low + 8, 2 * j)] = a1
    tile[near + _DS_PLACE(low, 2 * j + 1)] = a2
    tile[near + _DS_PLACE(low + 8, 2 * j + 1)] = a3


# %% four of the five products tags=["exporti"]
def _key_parts(hs):
    """parts(sums, tile, own, head, u, start): add a tile of queries' part.

    sums: dk, dv, and room for 16 columns of S and dA; own: the warp's first
    key in the tile; head, u: as for _gradients.
    """
    TILE, STEPS, PARTS = 32 * hs, hs // 16, hs // 16
    V, Q, DO, DS = TILE, 2 * TILE, 3 * TILE, 4 * TILE
    left, right = taker(hs // 8, True, True), taker(hs // 8, True, False)
    rows = taker(hs // 8, False, False)

    @device
    def parts(sums, tile, own, head, u, start):
        dk, dv, s, ds = sums
        for j in range(4):
            for n in range(8):
                s[n] = ds[n] = ZERO
            for k in range(STEPS):
                keys = left(tile, 0, own, 16 * k)
                multiply(s, 0, keys, right(tile, Q, 16 * j, 16 * k))
                values = left(tile, V, own, 16 * k)
                multiply(ds, 0, values, right(tile, DO, 16 * j, 16 * k))
            _gradients(s, ds, head, u, start + 16 * j)
            (a, a_rest), (g, g_rest) = as_factors(s, 0), as_factors(ds, 0)
            _share(tile, DS, g, own, j)
            _share(tile, DS + REST, g_rest, own, j)
            for n in range(PARTS):
                right_dv = rows(tile, DO, 16 * n, 16 * j)
                multiply(dv, 8 * n, a, right_dv)
                multiply(dv, 8 * n, a_rest, right_dv)
                right_dk = rows(tile, Q, 16 * n, 16 * j)
                multiply(dk, 8 * n, g, right_dk)
                multiply(dk, 8 * n, g_rest, right_dk)

    return parts


# %% a part of dq tags=["exporti"]
def _query_part(hs):
    """part(dq, tile, ds, k, row): 16 queries by hs, over 64 keys.

    add(parts, dq, at, pitch, row, T, more): to a strip's array.
    """
    left, right = taker(8, False, True), taker(hs // 8, False, False)
    PARTS, SUMS = hs // 16, hs // 2

    @device
    def part(dq, tile, ds, k, row):
        for n in range(SUMS):
            dq[n] = ZERO
        for j in range(4):
            first = left(tile, ds, row, 16 * j)
            second = left(tile, ds + REST, row, 16 * j)
            for n in range(PARTS):
                keys = right(tile, k, 16 * n, 16 * j)
                multiply(dq, 8 * n, first, keys)
                multiply(dq, 8 * n, second, keys)

    @device
    def add(parts, dq, at, pitch, row, T, more):
        for half in range(2):
            t = row + (cuda.laneid >> 2) + 8 * half
            if t < T:
                i = at + t * pitch + 2 * (cuda.laneid & 3)
                for n in range(2 * PARTS):
                    for m in range(2):
                        value = dq[4 * n + 2 * half + m]
                        if more:
                            value += parts[i + 8 * n + m]
                        parts[i + 8 * n + m] = value

    return part, add


# %% the kernel of the backward pass tags=["exporti"]
@functools.cache
def _backward_kernel(hs):
    TILE, SUMS, HEAD, ROOM = 32 * hs, hs // 2, hs // 2, 128 * hs + 2 * REST
    V, Q, DO, DS = TILE, 2 * TILE, 3 * TILE, 4 * TILE
    fill, key_parts = filler(64, hs // 8, 128), _key_parts(hs)
    (part, add), write = _query_part(hs), _writer(hs)

    def attention_backward_bf16_tiles(
        dinp, parts, dout, inp, lse, D, B, T, NH, NKV, scale, strips, more
    ):
        tile = cuda.shared.array(ROOM, np.int32, alignment=16)
        dk = cuda.local.array(SUMS, np.float32)
        dv = cuda.local.array(SUMS, np.float32)
        dq = cuda.local.array(SUMS, np.float32)
        s = cuda.local.array(8, np.float32)
        ds = cuda.local.array(8, np.float32)
        scales = cuda.local.array(2, np.float32)
        C, W, group = NH * HEAD, (NH + 2 * NKV) * HEAD, NH // NKV
        unit, strip = cuda.blockIdx.x // strips, cuda.blockIdx.x % strips
        b, kv, own = unit // NKV, unit % NKV, cuda.threadIdx.x // 32 * 16
        row, stop, key = b * T, b * T + T, (NH + kv) * HEAD
        value = key + NKV * HEAD
        for first in range(strip * 64, T, strips * 64):
            cuda.syncthreads()
            fill(tile, 0, inp, row + first, stop, key, W)
            fill(tile, V, inp, row + first, stop, value, W)
            sums, u = (dk, dv, s, ds), first + own + (cuda.laneid >> 2)
            for n in range(SUMS):
                dk[n] = dv[n] = ZERO
            for h in range(kv * group, kv * group + group):
                head = lse, D, (b * NH + h) * T, T, scale
                there = ((strip * B + b) * T * NH + h) * hs
                for start in range(first, T, 64):
                    cuda.syncthreads()
                    fill(tile, Q, inp, row + start, stop, h * HEAD, W)
                    fill(tile, DO, dout, row + start, stop, h * HEAD, C)
                    cp_async_commit()
                    cp_async_wait()
                    cuda.syncthreads()
                    key_parts(sums, tile, own, head, u, start)
                    cuda.syncthreads()
                    part(dq, tile, DS, 0, own)
                    again = first > strip * 64
                    add(parts, dq, there, 2 * C, start + own, T, again)
            rows = row + first + own, stop
            scales[0] = scales[1] = scale
            write(dinp, dk, rows, key, W, scales, more)
            scales[0] = scales[1] = np.float32(1)
            write(dinp, dv, rows, value, W, scales, more)

    return kernel(attention_backward_bf16_tiles, launch_bounds=128)


# %% [markdown]
# The last kernel has a thread for each pair of channels of a query. A strip
# whose first tile of keys comes after the query has no part in it.


# %% add up the strips tags=["exporti"]
@kernel(launch_bounds=256)
def _sum_parts(dinp, parts, B, T, NH, NKV, hs, scale, strips, more):
    i, C = cuda.grid(1), NH * hs // 2
    row, c = i // C, i % C
    if row < B * T:
        x = y = ZERO
        for strip in range(min(strips, row % T // 64 + 1)):
            at = 2 * (strip * B * T * C + i)
            x, y = x + parts[at], y + parts[at + 1]
        at = row * (NH + 2 * NKV) * hs // 2 + c
        write_pair(dinp, dinp, at, x * scale, y * scale, more)


# %% how many strips tags=["exporti"]
BLOCKS = 512  # that a GPU should have at least, where there are tiles enough


def _strips(B, T, NKV):
    return min(-(-T // 64), -(-BLOCKS // (B * NKV)))


# %% attention, backward tags=["export"]
def attention_scratch_bf16(B, T, NH, NKV, hs):
    """How many floats of `work` the backward pass wants.

    One for each row of a head, and the gradient of the queries for each
    strip.
    """
    return B * NH * T * (1 + _strips(B, T, NKV) * hs)


@shapes(
    "B T QKV!, B T C, B T QKV, B T C, B NH|C T", halves("lse", "work"),
    work="W!?", rest="B T C?",
)  # fmt: skip
def attention_backward_bf16(
    dinp, dout, inp, out, lse, add=True, work=None, rest=None
):
    """Add attention's gradient to dinp, in bfloat16 on tensor cores.

    dinp, inp: (B, T, (NH + 2 NKV) * hs). dout, out: (B, T, NH * hs): bits of
    bfloat16, uint16, on a device. lse: (B, NH, T), float32; out, lse and
    rest as the forward pass left them. add: False overwrites dinp. work:
    scratch of attention_scratch_bf16() floats, or None to allocate it. rest:
    None lets the sums of (1.8.9) suffer from out's rounding. Every sum is
    float32 and in one order. Raises TypeError or ValueError before it
    launches anything.
    """
    name = "attention_backward_bf16"
    (NH, NKV, hs), (B, _, T) = _count_heads(name, out, lse, inp), lse.shape
    wanted = attention_scratch_bf16(B, T, NH, NKV, hs)
    work = given_work(name, work, wanted, lse)
    D, parts = work[: lse.size], work[lse.size : wanted]
    dx, dy, x, y = (pairs(z) for z in (dinp, dout, inp, out))
    left, kept = (y, 0) if rest is None else (pairs(rest), 1)
    _rows[-(-lse.size // 4), 128](D.reshape(B, NH, T), dy, y, left, kept)
    shape, strips = (B, T, NH, NKV), _strips(B, T, NKV)
    how = np.float32(1 / math.sqrt(hs)), strips, int(add)
    arrays, made = (dy, x, lse.reshape(-1), D), _backward_kernel(hs)
    made[B * NKV * strips, 128](dx, parts, *arrays, *shape, *how)
    _sum_parts[-(-y.size // 256), 256](dx, parts, *shape, hs, *how)


# %% [markdown]
# The verdict:

# %% backward, against float64
grads = np.zeros(inp.shape)
reference.attention_backward(grads, wide_dout, wide_inp, want, want_lse)
dinp = empty(inp.shape, np.uint16)
with watch():
    given = dinp, simulated(dout), there, out, lse
    attention_backward_bf16(*given, add=False, rest=rest)
dinp = from_bfloat16(to_host(dinp)).reshape(B, T, -1, hs)
grads = grads.reshape(B, T, -1, hs)
for name, part in (("dq", [0, 1]), ("dk", [2]), ("dv", [3])):
    small = error(dinp[:, :, part], grads[:, :, part]) < 2e-3
    verdict(name, small, "within 2e-3 of float64")

# %% [markdown]
# ## Which rounding costs how much
#
# On tensor cores a product of sums rounds them first, and so there could be
# four roundings: the weights A, the gradients dS of the scores, the output,
# from which (1.8.9) takes its sums, and the results. Here are the same
# equations in float64, where each can be had alone. The measure is that of all
# verdicts in this chapter: the difference's norm over that of what is right.


# %% one rounding at a time
def heads(x):
    """(heads, T, hs), of the one sequence."""
    return x.reshape(T, -1, hs).transpose(1, 0, 2)


def by_hand(*rounded):
    """(1.8.4) to (1.8.9) in float64, but for what is rounded, by name."""

    def near(name, x):
        if name not in rounded:
            return x
        return from_bfloat16(to_bfloat16(x.astype(np.float32)))

    x, dy = heads(wide_inp), heads(wide_dout)
    q, k, v = x[:NH], x[[NH]], x[[NH + 1]]
    s = q @ k.swapaxes(1, 2) / np.sqrt(hs)
    s = np.where(np.tri(T), s, -np.inf)
    a = np.exp(s - s.max(-1, keepdims=True))
    y = near("A", a) @ v / a.sum(-1, keepdims=True)
    a /= a.sum(-1, keepdims=True)
    share = (dy * near("out", y)).sum(-1, keepdims=True)
    ds = near("dS", a * (dy @ v.swapaxes(1, 2) - share))
    dk = (ds.swapaxes(1, 2) @ q).sum(0, keepdims=True) / np.sqrt(hs)
    dv = (near("A", a).swapaxes(1, 2) @ dy).sum(0, keepdims=True)
    found = np.concatenate([y, ds @ k / np.sqrt(hs), dk, dv])
    return near("results", found)


parts = {"out": [0, 1], "dq": [2, 3], "dk": [4], "dv": [5]}
every, right = ("A", "dS", "out", "results"), by_hand()
print(" " * 9, *(f"{x:>7}" for x in parts))
for words, names in ({x: (x,) for x in every} | {"all four": every}).items():
    found = by_hand(*names)
    each = (error(found[x], right[x]) for x in parts.values())
    cells = [f"{x:.1e}" if x > 1e-9 else "      0" for x in each]
    print(f"{words:9}", *cells)
same = error(heads(dinp), by_hand("results")[2:]) < 2e-4
verdict("the kernels", same, "round the results, and nothing else")

# %% [markdown]
# The errors of several roundings add up as squares do. The results' alone is
# 1.5e-3 to 1.6e-3: that is the floor of whatever is stored in bfloat16, and
# below 2e-3 it leaves little more than 1e-3 for all others together. Each of
# the others alone brings more than that, and so all three had to go. The first
# version of these kernels rounded all four, as the last row does. So does
# PyTorch 2.13 on a CPU: for four heads of 64 channels and 256 positions its
# dq, dk and dv were 2.6e-3, 3.8e-3 and 3.4e-3 off where 1.7e-3 is the floor.
#
# What does it cost? Prediction: of the seven products, two forward and five
# backward, four have sums as their left factor, and those are made twice; the
# right factor is there already. Heads of 64 had 64 and 160 `mma` for a warp
# and a pair of tiles, which becomes 96 and 256. Counted in the machine code,
# where a loop of four turns makes four of the five products:
#
# | heads of 64 | `mma` | `ldmatrix` | registers, sm_80, sm_90 | shared |
# |---|---|---|---|---|
# | forward, rounded | 64 | 36 | 166, 229 | 32 KB |
# | forward, in two parts | 96 | 36 | 194, 201 | 32 KB |
# | backward, rounded | 64 | 44 | 229, 236 | 40 KB |
# | backward, in two parts | 112 | 48 | 231, 234 | 48 KB |
#
# None spills; 48 KB is all that a kernel may declare. `rest` is as large as
# the output, 25 MB a layer of GPT-2 124M at B = 16 and T = 1,024. A walk over
# the keys with S and dA once more could give (1.8.9) without it: no memory,
# two products. At half of an A100's peak those take 0.18 ms, where to write
# and read `rest` takes 0.03.
#
# ## Count it
#
# A product of a pair of tiles is $64 \cdot 64 \cdot hs$ FMAs. For each pair
# on or below the diagonal there are two products forward and five backward,
# where chapter 3.9 had seven; in two parts they count as three and eight. For
# T = 1,024 the 16 tiles make 136 pairs of 256.

# %% FMAs of a layer
B, T, NH, hs = 16, 1024, 12, 64
pairs_of_tiles = B * NH * (T // 64) * (T // 64 + 1) // 2
for name, products in (("forward", 3), ("backward", 8)):
    fmas = pairs_of_tiles * products * 64 * 64 * hs
    print(f"{name:8} {2 * fmas / 1e9:6.1f} GFLOP")

# %% [markdown]
# Prediction: at half of an A100's 312 TFLOP/s that is 0.26 ms forward and 0.70
# ms backward for a layer of GPT-2 124M, 16 sequences of 1,024 tokens. The
# softmax, which no tensor core does, should keep it from more.
#
# ## Take away
#
# - Sums of one product are a left factor of the next, in the lanes where they
#   are. Only a rounding lies between.
# - A walk over queries makes four products from one tile of keys; the fifth,
#   dq, is added to an array of the strip's own. Five products, no atomic, one
#   order.
# - Scores, softmax and sums are float32. Into a product goes bfloat16, sums
#   twice: rounded, and what that left over.

# %% [markdown]
# ## Design note
#
# dq could also be added in order to one array: each block waits until the
# block of the tile before it has added. That takes less memory, but blocks
# that fill the GPU while they wait for one that has not begun wait for ever.
# As far as we know blocks begin in the order of their numbers; we know of no
# manual that promises it. Strips need no such promise.

# %% [markdown]
# ## Exercises
#
# **1** (★★). How many floats do the strips take for GPT-2 124M at B = 16 and
# T = 1,024? How many for B = 1?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# At B = 16 there are 192 heads, and 3 strips, each of $B\,T\,C$ numbers, are
# the fewest that make 512 blocks. With one sequence there are 12 heads, and 16
# strips, as many as tiles. `attention_scratch_bf16` says the same, with one
# number more for each row of a head.
# :::

# %% exercise 1, floats by batch tags=["hide-cell"]
floats = {16: 3 * 16 * 1024 * 768, 1: 16 * 1024 * 768}

# %% exercise 1, checked
for B, found in floats.items():
    rows = B * NH * T
    same = found == attention_scratch_bf16(B, T, NH, NH, hs) - rows
    verdict(f"B = {B}", same, f"{found:,} floats")

# %% [markdown]
# ## Further reading
#
# - Dao (2023), [FlashAttention-2](https://arxiv.org/abs/2307.08691): the same
#   five products, with atomics for dq; how work is dealt to warps.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("3.15")
