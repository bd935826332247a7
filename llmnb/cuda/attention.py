# Written by `make export` from notebooks/3_gpu/09_attention.py: edit that file.

"""Attention on a GPU, forward: a block of threads walks over the keys."""

__all__ = [
    "WIDEST_HEAD",
    "attention_forward",
    "check_heads",
]


# imports of the GPU's kernels
import functools
import math

import numpy as np

from llmnb.gpu.launch import DEVICE, aligned, device, kernel
from llmnb.gpu.simulator import cuda, load4, store4
from llmnb.shapes import shapes


# what a score is before one is seen
# exp makes 0 of it; and it is no infinity, which fastmath rules out
LOWEST = np.float32(-1e30)


# copy a tile
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


# products of rows with rows
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


# products of weights with rows
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


# write the sums
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


# sums and maxima of a row
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


# the softmax of a tile
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


# the end of the rows
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


# the forward kernel
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


# attention, forward
WIDEST_HEAD = 128  # channels of a head


def check_heads(name, lse, C):
    """Raise ValueError for heads that the kernels cannot take.

    name: of the function that was called. lse: (B, NH, T). C: channels.

    Derived in chapter 3.9.
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

    Derived in chapter 3.9.
    """
    check_heads("attention_forward", lse, out.shape[2])
    B, NH, T = lse.shape
    hs = out.shape[2] // NH
    scale = np.float32(1 / math.sqrt(hs))
    grid = B * NH * -(-T // (16 * _side(hs)))
    tiles = _forward_kernel(hs, hs % 4 == 0 and aligned(out, inp))
    out, inp, lse = out.reshape(-1), inp.reshape(-1), lse.reshape(B * NH, T)
    tiles[grid, 128](out, lse, inp, NH, scale)
