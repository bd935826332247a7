# Written by `make export` from notebooks/3_gpu/15_tensor_attention.py: edit that file.

"""Attention in bfloat16, on tensor cores."""

__all__ = [
    "attention_backward_bf16", "attention_forward_bf16",
    "attention_scratch_bf16",
]


# imports of the kernels
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


# the pieces
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


# products of a tile
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


# the softmax of fragments
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


# write rows
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


# the end of the rows
@device
def _finish(lse, at, top, total, t, T):
    """Write (2.5.2) for rows t and t + 8; total becomes its inverse."""
    for half in range(2):  # both before lanes part: they have to meet for it
        total[half] = warp_sum(total[half], 4)
    for half in range(2):
        if (cuda.laneid & 3) == 0 and t + 8 * half < T:
            lse[at + t + 8 * half] = top[half] + math.log(total[half])
        total[half] = np.float32(1) / total[half]


# queries in registers, and their scores
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


# the kernel of the forward pass
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


# attention, forward
@shapes("B T C!, B NH|C T!, B T QKV", halves("lse"), rest="B T C!?")
def attention_forward_bf16(out, lse, inp, rest=None):
    """Causal self-attention of NH heads, in bfloat16 on tensor cores.

    inp: (B, T, (NH + 2 NKV) * hs), the heads of queries, of keys and of
    values; out: (B, T, NH * hs): bits of bfloat16, uint16, on a device. lse:
    (B, NH, T), float32. rest: None, or as out: what its rounding left over,
    for the backward pass. hs is 16, 32 or 64; NKV divides NH. All but inp is
    float32 until it is written. Raises TypeError or ValueError before it
    launches anything.

    Derived in chapter 3.15.
    """
    heads = _count_heads("attention_forward_bf16", out, lse, inp)
    B, NH, T = lse.shape
    scale = np.float32(1 / math.sqrt(heads.hs))
    made = _forward_kernel(heads.hs, rest is not None)
    left, shape = pairs(out if rest is None else rest), (T, NH, heads.NKV)
    made[B * NH * -(-T // 64), 128](
        pairs(out), lse.reshape(-1), pairs(inp), *shape, scale, left
    )


# the heads
def _count_heads(name, out, lse, inp):
    """The Heads; raise for what the kernels cannot take."""
    heads = check_heads(name, out, lse, inp)
    if heads.hs not in WIDTHS:
        raise ValueError(
            f"{name}: in bfloat16 a head has {', '.join(map(str, WIDTHS))} "
            f"channels, got {heads.hs}"
        )
    return heads


# the row sums of (1.8.9)
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


# weights and gradients of scores
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


# hand dS to the block
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


# four of the five products
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


# a part of dq
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


# the kernel of the backward pass
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


# add up the strips
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


# how many strips
BLOCKS = 512  # that a GPU should have at least, where there are tiles enough


def _strips(B, T, NKV):
    return min(-(-T // 64), -(-BLOCKS // (B * NKV)))


# attention, backward
def attention_scratch_bf16(B, T, NH, NKV, hs):
    """How many floats of `work` the backward pass wants.

    One for each row of a head, and the gradient of the queries for each
    strip.

    Derived in chapter 3.15.
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

    Derived in chapter 3.15.
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
