# Written by `make export` from notebooks/3_gpu/30_walks.py: edit that file.

"""Attention on a GPU, backward: one walk by keys and one by queries."""

__all__ = [
    "attention_backward",
    "attention_scratch",
]


# imports of the GPU's kernels
import functools
import math

import numpy as np

from llmnb.cuda.attention import (
    _side,
    _stride,
    _tile_add,
    _tile_copy,
    _tile_dots,
    _tile_write,
    check_heads,
)
from llmnb.gpu.launch import DEVICE, aligned, device, empty, kernel
from llmnb.gpu.simulator import cuda
from llmnb.gpu.warp import warp_sum
from llmnb.shapes import shapes


# the dot products of the rows
@kernel
def _attention_rows(D, dout, out, NH):
    """A warp a row of a head: (1.8.9). D: (B * NH, T)."""
    B, T, C = out.shape
    row, lane = cuda.grid(1) // 32, cuda.grid(1) % 32
    b, t, h = row // (T * NH), row // NH % T, row % NH
    hs = C // NH
    if b < B:
        total = np.float32(0)
        for i in range(h * hs + lane, h * hs + hs, 32):
            total += dout[b, t, i] * out[b, t, i]
        total = warp_sum(total)
        if lane == 0:
            D[b * NH + h, t] = total


# weights and gradients of a tile
@functools.cache
def _tile_gradients(R, BY_KEY):
    """gradients(s, ds, lse, D, head, first, start, scale): (1.8.4), (1.8.8).

    s, ds hold dot products of a tile; they become weights and gradients of
    scores. BY_KEY: whether its rows, from `first` on, are keys and its
    columns, from `start` on, queries; else the other way.
    """

    @device
    def gradients(s, ds, lse, D, head, first, start, scale):
        row, lane = cuda.threadIdx.x // 8, cuda.threadIdx.x % 8
        T = lse.shape[1]
        for r in range(R):
            for j in range(R):
                t, u = first + row + 8 * r, start + lane + 8 * j
                if BY_KEY:
                    t, u = u, t
                a = d = np.float32(0)
                if u <= t and t < T:
                    a = math.exp(s[R * r + j] * scale - lse[head, t])
                    d = a * (ds[R * r + j] - D[head, t]) * scale
                s[R * r + j], ds[R * r + j] = a, d

    return gradients


# hand numbers to the warp
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


# walk over queries
@functools.cache
def _keys_kernel(hs, FOURS):
    R, STRIDE = _side(hs), _stride(hs)
    ROWS, WIDTH = 8 * R, 8 * R + 8
    SUMS, PAIRS = R * (STRIDE // 8), R * R
    copy, write = _tile_copy(hs, FOURS), _tile_write(hs, 8, R, FOURS)
    dots, add = _tile_dots(hs, 8, R), _tile_add(hs, 8, R)
    gradients, share = _tile_gradients(R, True), _tile_share(R)

    @kernel(launch_bounds=64)
    def attention_backward_keys(dinp, dout, inp, lse, D, NH, scale, more):
        T, C = lse.shape[1], NH * hs
        tiles = (T + ROWS - 1) // ROWS
        head = cuda.blockIdx.x // tiles
        first = cuda.blockIdx.x % tiles * ROWS
        y = head // NH * T * C + head % NH * hs
        x = head // NH * T * 3 * C + head % NH * hs
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
        copy(k, inp, x + C, 3 * C, first, T)
        copy(v, inp, x + 2 * C, 3 * C, first, T)
        for start in range(first, T, ROWS):
            cuda.syncthreads()
            copy(q, inp, x, 3 * C, start, T)
            copy(do, dout, y, C, start, T)
            cuda.syncthreads()
            dots(s, k, q)
            dots(ds, v, do)
            gradients(s, ds, lse, D, head, first, start, scale)
            share(weights, s)
            add(dv, weights, do)
            share(weights, ds)
            add(dk, weights, q)
        write(dinp, dk, x + C, 3 * C, first, T, more)
        write(dinp, dv, x + 2 * C, 3 * C, first, T, more)

    return attention_backward_keys


# walk over keys
@functools.cache
def _queries_kernel(hs, FOURS):
    R, STRIDE = _side(hs), _stride(hs)
    ROWS, WIDTH = 8 * R, 8 * R + 8
    SUMS, PAIRS = R * (STRIDE // 8), R * R
    copy, write = _tile_copy(hs, FOURS), _tile_write(hs, 8, R, FOURS)
    dots, add = _tile_dots(hs, 8, R), _tile_add(hs, 8, R)
    gradients, share = _tile_gradients(R, False), _tile_share(R)

    @kernel(launch_bounds=(64, 5))
    def attention_backward_queries(dinp, dout, inp, lse, D, NH, scale, more):
        T, C = lse.shape[1], NH * hs
        tiles = (T + ROWS - 1) // ROWS
        head = cuda.blockIdx.x // tiles
        first = (tiles - 1 - cuda.blockIdx.x % tiles) * ROWS
        y = head // NH * T * C + head % NH * hs
        x = head // NH * T * 3 * C + head % NH * hs
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
        copy(q, inp, x, 3 * C, first, T)
        copy(do, dout, y, C, first, T)
        for start in range(0, min(first + ROWS, T), ROWS):
            cuda.syncthreads()
            copy(k, inp, x + C, 3 * C, start, T)
            copy(v, inp, x + 2 * C, 3 * C, start, T)
            cuda.syncthreads()
            dots(s, q, k)
            dots(ds, do, v)
            gradients(s, ds, lse, D, head, first, start, scale)
            share(weights, ds)
            add(dq, weights, k)
        write(dinp, dq, x, 3 * C, first, T, more)

    return attention_backward_queries


# attention, backward
def attention_scratch(B, T, NH):
    """How many floats of `work` attention_backward wants.

    Derived in chapter 3.30.
    """
    return B * NH * T


@shapes("B T 3C!, B T C, B T 3C, B T C, B NH|C T", DEVICE, work="W!?")
def attention_backward(dinp, dout, inp, out, lse, add=True, work=None):
    """Add attention's gradient to dinp.

    dinp, inp: (B, T, 3C). dout, out: (B, T, C). lse: (B, NH, T). out and
    lse are as the forward pass left them. All float32 on a device; heads of
    at most 128 channels. add: False overwrites dinp instead of adding.
    work: scratch of attention_scratch() floats, or None to allocate it.
    Every element is summed in one order. Raises TypeError or ValueError
    before it launches anything.

    Derived in chapter 3.30.
    """
    name = "attention_backward"
    check_heads(name, lse, out.shape[2])
    B, NH, T = lse.shape
    hs, count = out.shape[2] // NH, attention_scratch(B, T, NH)
    work = empty(count, like=inp) if work is None else work
    if work.size < count:
        raise ValueError(
            f"{name}: work must hold {count} floats, got {work.size}"
        )
    scale, more = np.float32(1 / math.sqrt(hs)), int(add)
    D, lse = work[:count].reshape(B * NH, T), lse.reshape(B * NH, T)
    _attention_rows[-(-lse.size // 4), 128](D, dout, out, NH)
    grid, arrays = B * NH * -(-T // (8 * _side(hs))), (dinp, dout, inp)
    fours = hs % 4 == 0 and aligned(*arrays)
    args = *(x.reshape(-1) for x in arrays), lse, D, NH, scale, more
    _keys_kernel(hs, fours)[grid, 64](*args)
    _queries_kernel(hs, fours)[grid, 64](*args)
