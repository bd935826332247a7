# Written by `make export` from notebooks/3_gpu/04_layernorm.py: edit that file.

"""LayerNorm on a GPU, forward and backward."""

__all__ = ["layernorm_backward", "layernorm_forward", "layernorm_scratch"]


# imports of the GPU module
import functools
import math

import numpy as np

from llmnb.gpu.launch import DEVICE, aligned, device, given_work, kernel
from llmnb.gpu.simulator import cuda, load4, store4
from llmnb.gpu.warp import warp_sum
from llmnb.shapes import shapes


# constants of the GPU module
EPS32 = np.float32(1e-5)  # a Python float would be float64
LANES = 32  # threads of a warp


def blocks(n, size):
    return -(-n // size)


# a warp a row, the kernel
@kernel(launch_bounds=256)
def _forward_warp(out, mean, rstd, inp, weight, bias):
    n, lane = cuda.grid(1) // 32, cuda.threadIdx.x % 32
    rows, C = inp.shape
    if n >= rows:  # the whole warp leaves, so exchanges stay complete
        return
    size, total, squares = np.float32(C), np.float32(0), np.float32(0)
    for i in range(lane, C, 32):
        total += inp[n, i]
    mu = warp_sum(total) / size
    for i in range(lane, C, 32):
        away = inp[n, i] - mu
        squares += away * away
    r = np.float32(1) / math.sqrt(warp_sum(squares) / size + EPS32)
    for i in range(lane, C, 32):
        out[n, i] = (inp[n, i] - mu) * r * weight[i] + bias[i]
    if lane == 0:
        mean[n] = mu
        rstd[n] = r


# a warp a row, the launch
def _warp_a_row(out, mean, rstd, inp, weight, bias):
    grid = blocks(len(inp), 256 // LANES)
    _forward_warp[grid, 256](out, mean, rstd, inp, weight, bias)


# sums and outputs in fours
@device
def _deviations(mu, a, b, c, d):
    """The squared distances of four numbers from mu, added."""
    a, b, c, d = a - mu, b - mu, c - mu, d - mu
    return (a * a + b * b) + (c * c + d * d)


@device
def _write_four(out, at, weight, bias, i, mu, r, four):
    """Normalise four channels from i on and store them at `at`."""
    a, b, c, d = four
    w0, w1, w2, w3 = load4(weight, i)
    b0, b1, b2, b3 = load4(bias, i)
    a, b = (a - mu) * r * w0 + b0, (b - mu) * r * w1 + b1
    c, d = (c - mu) * r * w2 + b2, (d - mu) * r * w3 + b3
    store4(out, at, a, b, c, d)


# kept rows, the kernel
KEPT_ROWS = 4  # rows, and warps, of a block
MOST_KEPT = 3072  # channels: four such rows fill 48 KB


@functools.cache
def _forward_kept(room):
    """The kernel for rows of at most `room` channels."""
    floats = KEPT_ROWS * room

    @kernel(launch_bounds=128)
    def forward_kept(out, mean, rstd, inp, weight, bias):
        kept = cuda.shared.array(floats, np.float32, alignment=16)
        n, lane = cuda.grid(1) // 32, cuda.threadIdx.x % 32
        rows, C = inp.shape
        if n >= rows:
            return
        at = cuda.threadIdx.x // 32 * room  # this warp's row in `kept`
        size, total, squares = np.float32(C), np.float32(0), np.float32(0)
        for i in range(4 * lane, C, 128):
            a, b, c, d = load4(inp, n * C + i)
            store4(kept, at + i, a, b, c, d)
            total += (a + b) + (c + d)
        mu = warp_sum(total) / size
        for i in range(4 * lane, C, 128):
            a, b, c, d = load4(kept, at + i)
            squares += _deviations(mu, a, b, c, d)
        r = np.float32(1) / math.sqrt(warp_sum(squares) / size + EPS32)
        for i in range(4 * lane, C, 128):
            four = load4(kept, at + i)
            _write_four(out, n * C + i, weight, bias, i, mu, r, four)
        if lane == 0:
            mean[n] = mu
            rstd[n] = r

    return forward_kept


# kept rows, the launch
def _kept_a_row(out, mean, rstd, inp, weight, bias):
    rows, C = inp.shape
    fours = C % 4 == 0 and aligned(out, inp, weight, bias)
    if not fours or C > MOST_KEPT:
        _warp_a_row(out, mean, rstd, inp, weight, bias)
        return
    grid, block = blocks(rows, KEPT_ROWS), KEPT_ROWS * LANES
    forward = _forward_kept(blocks(C, 256) * 256)
    forward[grid, block](out, mean, rstd, inp, weight, bias)


# layernorm, forward
@shapes("B T C!, B T!, B T!, B T C, C, C", DEVICE)
def layernorm_forward(out, mean, rstd, inp, weight, bias):
    """Normalise each row of inp, then scale and shift each channel.

    out, inp: (B, T, C). mean, rstd: (B, T), the mean and the reciprocal
    deviation of each row, saved for the backward pass. weight, bias: (C,).
    All float32 on a device and C-contiguous; out, mean and rstd are
    overwritten. Fastest where C % 4 == 0, C <= 3072 and the arrays begin
    at multiples of 16 bytes. Raises TypeError or ValueError before it
    computes anything.

    Derived in chapter 3.4.
    """
    rows, C = mean.size, len(weight)
    flat = mean.reshape(rows), rstd.reshape(rows)
    rows_in, rows_out = inp.reshape(rows, C), out.reshape(rows, C)
    _kept_a_row(rows_out, *flat, rows_in, weight, bias)


# the sums of a row
@device
def _two_means(n, lane, dout, inp, weight, mu, r):
    """The two means of (1.6.10) for row n, in every lane of a warp."""
    C = inp.shape[1]
    a, b, size = np.float32(0), np.float32(0), np.float32(C)
    for i in range(lane, C, 32):
        dnorm = dout[n, i] * weight[i]
        a += dnorm
        b += dnorm * ((inp[n, i] - mu) * r)
    return warp_sum(a) / size, warp_sum(b) / size


# room for sums on their way
def _parts(rows):
    """Into how many parts the rows are cut for dweight and dbias."""
    return min(512, blocks(rows, 4))


def layernorm_scratch(rows, C):
    """How many floats layernorm_backward wants to work in.

    rows: B * T, cut into at most 512 parts; there are two sums for each
    part and channel.

    Derived in chapter 3.4.
    """
    return _parts(rows) * 2 * C


# dx alone
@kernel(launch_bounds=256)
def _backward_rows(dinp, dout, inp, weight, mean, rstd):
    n, lane = cuda.grid(1) // 32, cuda.threadIdx.x % 32
    rows, C = inp.shape
    if n >= rows:
        return
    mu, r = mean[n], rstd[n]
    a, b = _two_means(n, lane, dout, inp, weight, mu, r)
    for i in range(lane, C, 32):
        norm = (inp[n, i] - mu) * r
        dinp[n, i] += r * (dout[n, i] * weight[i] - a - norm * b)


# the sums of a part
@kernel(launch_bounds=128)
def _backward_parts(table, dout, inp, mean, rstd):
    tile = cuda.shared.array((2, 4, 32), np.float32)
    warp, lane = cuda.threadIdx.x // 32, cuda.threadIdx.x % 32
    rows, C = inp.shape
    i = cuda.blockIdx.x * 32 + lane
    part, parts = cuda.blockIdx.y, cuda.gridDim.y
    dw, db = np.float32(0), np.float32(0)
    if i < C:
        for n in range(part + warp * parts, rows, 4 * parts):
            dy = dout[n, i]
            dw += dy * ((inp[n, i] - mean[n]) * rstd[n])
            db += dy
    tile[0, warp, lane], tile[1, warp, lane] = dw, db
    cuda.syncthreads()
    if warp < 2 and i < C:  # warp 0 adds up dw, warp 1 db
        total = np.float32(0)
        for k in range(4):
            total += tile[warp, k, lane]
        table[(2 * part + warp) * C + i] = total


# the sums of the table
@kernel(launch_bounds=512)
def _add_table(dweight, dbias, table, parts, width):
    tile = cuda.shared.array((16, 32), np.float32)
    warp, lane = cuda.threadIdx.x // 32, cuda.threadIdx.x % 32
    warps = cuda.blockDim.x // 32
    C, j = dweight.shape[0], cuda.blockIdx.x * 32 + lane
    total = np.float32(0)
    if j < width:
        for k in range(warp, parts, warps):
            total += table[k * width + j]
    tile[warp, lane] = total
    cuda.syncthreads()
    if warp == 0 and j < width:
        total = np.float32(0)
        for k in range(warps):
            total += tile[k, lane]
        if j < C:
            dweight[j] += total
        else:
            dbias[j - C] += total


def add_parts(dweight, dbias, table, parts, width):
    """Add the rows of a table to dweight and, from column C on, to dbias."""
    grid, block = blocks(width, LANES), LANES * min(16, parts)
    _add_table[grid, block](dweight, dbias, table, parts, width)


# sums of parts, the launches
def _sums_of_parts(dinp, dweight, dbias, dout, inp, weight, stats, table):
    """stats: mean and rstd."""
    rows, C = inp.shape
    parts = _parts(rows)
    grid = blocks(rows, 256 // LANES)
    _backward_rows[grid, 256](dinp, dout, inp, weight, *stats)
    grid = blocks(C, LANES), parts
    _backward_parts[grid, 128](table, dout, inp, *stats)
    add_parts(dweight, dbias, table, parts, 2 * C)


# sums of two over a block
@device
def _block_sums(a, b, tables, turn):
    """a and b summed over the block, in every thread.

    tables: shared, (2, 2, 32). turn: 0 and 1 from call to call, so that one
    barrier is enough.
    """
    a, b = warp_sum(a), warp_sum(b)
    if cuda.threadIdx.x % 32 == 0:
        tables[turn, 0, cuda.threadIdx.x // 32] = a
        tables[turn, 1, cuda.threadIdx.x // 32] = b
    cuda.syncthreads()
    a, b, lane = np.float32(0), np.float32(0), cuda.threadIdx.x % 32
    if lane < cuda.blockDim.x // 32:
        a, b = tables[turn, 0, lane], tables[turn, 1, lane]
    return warp_sum(a), warp_sum(b)


# four channels of a row
@device
def _load_row(x, dy, dx, inp, dout, dinp, at):
    """Three vectors of a row, all asked for before any is needed."""
    x[0], x[1], x[2], x[3] = load4(inp, at)
    dy[0], dy[1], dy[2], dy[3] = load4(dout, at)
    dx[0], dx[1], dx[2], dx[3] = load4(dinp, at)


@device
def _add_four(dw, db, x, dy, w, mu, r):
    """Normalise x, add to dw and db; return this thread's part of a and b."""
    a, b = np.float32(0), np.float32(0)
    for k in range(4):
        x[k] = (x[k] - mu) * r
        dw[k] += dy[k] * x[k]
        db[k] += dy[k]
        a += dy[k] * w[k]
        b += dy[k] * w[k] * x[k]
    return a, b


# a block a row, the kernel
@kernel(launch_bounds=512)
def _backward_block(dinp, table, dout, inp, weight, mean, rstd):
    tables = cuda.shared.array((2, 2, 32), np.float32)
    x = cuda.local.array(4, np.float32)  # of a row: inp, then normalised
    dy = cuda.local.array(4, np.float32)
    dx = cuda.local.array(4, np.float32)
    w = cuda.local.array(4, np.float32)
    dw = cuda.local.array(4, np.float32)
    db = cuda.local.array(4, np.float32)
    (rows, C), turn = inp.shape, 0
    i, part, size = 4 * cuda.threadIdx.x, cuda.blockIdx.x, np.float32(C)
    mine = i < C  # the last warp may hold threads with no channels
    for k in range(4):
        w[k] = dw[k] = db[k] = np.float32(0)
    if mine:
        w[0], w[1], w[2], w[3] = load4(weight, i)
    for n in range(part, rows, cuda.gridDim.x):
        a, b, r = np.float32(0), np.float32(0), rstd[n]
        if mine:
            _load_row(x, dy, dx, inp, dout, dinp, n * C + i)
            a, b = _add_four(dw, db, x, dy, w, mean[n], r)
        a, b = _block_sums(a, b, tables, turn)
        turn = 1 - turn
        if mine:
            a, b = a / size, b / size
            for k in range(4):
                dx[k] += r * (dy[k] * w[k] - a - x[k] * b)
            store4(dinp, n * C + i, dx[0], dx[1], dx[2], dx[3])
    if mine:
        at = 2 * part * C + i
        store4(table, at, dw[0], dw[1], dw[2], dw[3])
        store4(table, at + C, db[0], db[1], db[2], db[3])


# a block a row, the launches
MOST_THREADS = 512  # of a block; each has four channels


def _rows_once(dinp, dweight, dbias, dout, inp, weight, stats, table):
    rows, C = inp.shape
    fours = C % 4 == 0 and aligned(dinp, dout, inp, weight, table)
    if not fours or C > 4 * MOST_THREADS:
        _sums_of_parts(dinp, dweight, dbias, dout, inp, weight, stats, table)
        return
    parts, block = _parts(rows), blocks(C, 4 * LANES) * LANES
    _backward_block[parts, block](dinp, table, dout, inp, weight, *stats)
    add_parts(dweight, dbias, table, parts, 2 * C)


# layernorm, backward
@shapes("B T C!, C!, C!, B T C, B T C, C, B T, B T, W!?", DEVICE)
def layernorm_backward(
    dinp, dweight, dbias, dout, inp, weight, mean, rstd, *, work=None
):
    """Add LayerNorm's gradients to dinp, dweight and dbias.

    dinp, dout, inp: (B, T, C). dweight, dbias, weight: (C,). mean, rstd:
    (B, T), as the forward pass left them. work: at least
    layernorm_scratch(B * T, C) floats in one dimension, whose contents are
    lost; allocated if None. All float32 on a device and C-contiguous; the
    first three are added to in place. Fastest where C % 4 == 0, C <= 2048
    and the arrays begin at multiples of 16 bytes. Raises TypeError or
    ValueError before it computes anything.

    Derived in chapter 3.4.
    """
    name = "layernorm_backward"
    rows, C = mean.size, len(weight)
    work = given_work(name, work, layernorm_scratch(rows, C), inp)
    dx, dy, x = (a.reshape(rows, C) for a in (dinp, dout, inp))
    stats = mean.reshape(rows), rstd.reshape(rows)
    _rows_once(dx, dweight, dbias, dy, x, weight, stats, work)
