# Written by `make export` from notebooks/3_gpu/09_attention.py: edit that file.

"""Attention on a GPU, forward and backward."""

__all__ = [
    "WIDEST_HEAD", "attention_backward", "attention_forward",
    "attention_scratch",
]


# imports of the GPU's kernels
import functools
import math

import numpy as np

from llmnb.gpu.launch import DEVICE, aligned, device, given_work, kernel
from llmnb.gpu.simulator import cuda, load4, store4
from llmnb.gpu.warp import warp_sum
from llmnb.reference.attention import count_heads
from llmnb.shapes import shapes

WIDEST_HEAD = 256  # channels; shared memory holds tiles of no more


# what a score is before one is seen
# exp makes 0 of it; and it is no infinity, which fastmath rules out
LOWEST = np.float32(-1e30)


# exchanges among lanes
@device
def _lanes_max(value):
    """The largest value of 8 neighbouring lanes, in each of them."""
    for step in (4, 2, 1):
        value = max(value, cuda.shfl_xor_sync(0xFFFFFFFF, value, step))
    return value


# copy a tile
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


# what makes a score
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


# the softmax of a tile
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


# the end of the rows
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


# the kernel of the forward pass
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


# the checks on a GPU
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


# attention, forward
@shapes("B T C!, B NH|C T!, B T QKV", DEVICE)
def attention_forward(out, lse, inp):
    """Causal self-attention of NH heads.

    inp: (B, T, (NH + 2 NKV) * hs), the heads of queries, of keys and of
    values; NKV divides NH, and hs is at most 256. Writes out (B, T, NH * hs)
    and lse (B, NH, T), the log-sum-exp of each row of scaled, masked scores,
    which the backward pass needs. All float32 on a device. Raises TypeError
    or ValueError before it launches anything.

    Derived in chapter 3.9.
    """
    heads = check_heads("attention_forward", out, lse, inp)
    rule = 0, plain_score(1 / math.sqrt(heads.hs))
    launch_forward(heads, rule, out, lse, inp)


# the launch, forward
def launch_forward(heads, rule, out, lse, inp):
    hs, T = heads.hs, lse.shape[2]
    grid = len(lse) * heads.NH * -(-T // (16 * _side(hs)))
    tiles = _forward_kernel(hs, hs % 4 == 0 and aligned(out, inp), rule)
    tiles[grid, 128](out.reshape(-1), lse, inp.reshape(-1), heads.NKV)


# the dot products of the rows
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


# weights and gradients of a tile
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


# what both walks are made of
def _pieces(hs, FOURS, BY_KEY, rule):
    """What both walks are made of."""
    R = _side(hs)
    products = _tile_dots(hs, 8, R), _tile_add(hs, 8, R)
    gradients = _tile_gradients(R, BY_KEY, rule), _tile_share(R)
    copies = _tile_copy(hs, FOURS), _tile_write(hs, 8, R, FOURS)
    return *copies, *products, *gradients


# walk over queries
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


# walk over keys
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


# attention, backward
def attention_scratch(B, T, NH):
    """How many floats of `work` the backward pass wants: one a row.

    Derived in chapter 3.9.
    """
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

    Derived in chapter 3.9.
    """
    name = "attention_backward"
    heads = check_heads(name, out, lse, inp)
    work = given_work(name, work, lse.size, inp)
    arrays = dinp, dout, inp, out, lse
    rule = 0, plain_score(1 / math.sqrt(heads.hs))
    launch_backward(heads, rule, arrays, add, work)


# the launches, backward
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
