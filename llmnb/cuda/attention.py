# Written by `make export` from notebooks/1_by_hand/08_attention.py: edit that file.

"""Attention on a GPU, forward and backward."""

__all__ = [
    "ATTENTION_BACKWARD",
    "ATTENTION_FORWARD",
    "WIDEST_HEAD",
    "attention_backward",
    "attention_forward",
    "attention_scratch",
]


# imports of the GPU's kernels
import functools
import math

import numpy as np

from llmnb.gpu.launch import (
    DEVICE,
    aligned,
    device,
    empty,
    kernel,
    numbered,
)
from llmnb.gpu.simulator import cuda, load4, store4
from llmnb.gpu.warp import warp_max, warp_sum
from llmnb.shapes import shapes


# what a score is before one is seen
# exp makes 0 of it; and it is no infinity, which fastmath rules out
LOWEST = np.float32(-1e30)


# version 1, scores
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


# version 1, weights
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


# version 1, means
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


# version 1
def _forward_unfused(out, lse, inp, work):
    """Scores, weights and means, one after the other."""
    B, NH, T = lse.shape
    hs = out.shape[2] // NH
    att, lse = work.reshape(B * NH, T, T), lse.reshape(B * NH, T)
    scale = np.float32(1 / math.sqrt(hs))
    _attention_scores[-(-att.size // 128), 128](att, inp, NH, scale)
    _attention_softmax[-(-lse.size // 4), 128](att, lse)
    _attention_means[-(-out.size // 128), 128](out, att, inp, NH)


# version 2, copy and exchange
@device
def _copy_rows(tile, inp, b, first, col, hs):
    """Rows first.. of inp[b], hs columns from col on; zeros beyond T."""
    for e in range(cuda.threadIdx.x, 16 * hs, 256):
        r, i = e // hs, e % hs
        value = np.float32(0)
        if first + r < inp.shape[1]:
            value = inp[b, first + r, col + i]
        tile[r, i] = value


@device
def _lanes_max(value, lanes):
    """The largest value of 8 or 16 neighbouring lanes, in each of them."""
    for step in (8, 4, 2, 1):
        if step < lanes:
            value = max(value, cuda.shfl_xor_sync(0xFFFFFFFF, value, step))
    return value


@device
def _lanes_sum(value, lanes):
    """The sum of value over 8 or 16 neighbouring lanes, in each of them."""
    for step in (8, 4, 2, 1):
        if step < lanes:
            value += cuda.shfl_xor_sync(0xFFFFFFFF, value, step)
    return value


# version 2, scores and sums
@device
def _one_score(q, k, row, lane, hs):
    """The dot product of a query and a key."""
    dot = np.float32(0)
    for i in range(hs):
        dot += q[row, i] * k[lane, i]
    return dot


@device
def _add_values(sums, factor, weights, v, row, lane, hs):
    """(1.8.12) for this thread's channels: lane, lane + 16 and so on."""
    for n in range(len(sums)):
        i, mean = lane + 16 * n, sums[n] * factor
        if i < hs:
            for u in range(16):
                mean += weights[row, u] * v[u, i]
        sums[n] = mean


# version 2, the kernel
@functools.cache
def _flash_kernel(hs):
    STRIDE, PER = hs | 1, -(-hs // 16)

    @kernel(launch_bounds=256)
    def attention_forward_flash(out, lse, inp, NH, scale):
        T, C = lse.shape[1], NH * hs
        tiles = (T + 15) // 16
        head = cuda.blockIdx.x // tiles
        first = (tiles - 1 - cuda.blockIdx.x % tiles) * 16
        row, lane = cuda.threadIdx.x // 16, cuda.threadIdx.x % 16
        b, col, t = head // NH, head % NH * hs, first + row
        q = cuda.shared.array((16, STRIDE), np.float32)
        k = cuda.shared.array((16, STRIDE), np.float32)
        v = cuda.shared.array((16, STRIDE), np.float32)
        weights = cuda.shared.array((16, 17), np.float32)
        sums = cuda.local.array(PER, np.float32)
        for n in range(PER):
            sums[n] = np.float32(0)
        top, total = LOWEST, np.float32(0)
        _copy_rows(q, inp, b, first, col, hs)
        for start in range(0, first + 16, 16):
            cuda.syncthreads()
            _copy_rows(k, inp, b, start, C + col, hs)
            _copy_rows(v, inp, b, start, 2 * C + col, hs)
            cuda.syncthreads()
            s = _one_score(q, k, row, lane, hs) * scale
            s = s if start + lane <= t else LOWEST
            new = max(top, _lanes_max(s, 16))
            e, factor = math.exp(s - new), math.exp(top - new)
            weights[row, lane] = e
            top, total = new, total * factor + e
            cuda.syncwarp()
            _add_values(sums, factor, weights, v, row, lane, hs)
        total = _lanes_sum(total, 16)
        if t < T:
            for n in range(PER):
                if lane + 16 * n < hs:
                    out[b, t, col + lane + 16 * n] = sums[n] / total
            if lane == 0:
                lse[head, t] = top + math.log(total)

    return attention_forward_flash


# version 2
def _forward_flash(out, lse, inp, work):
    """A block for 16 queries, a thread a score."""
    B, NH, T = lse.shape
    hs = out.shape[2] // NH
    scale = np.float32(1 / math.sqrt(hs))
    grid = B * NH * -(-T // 16)
    lse = lse.reshape(B * NH, T)
    _flash_kernel(hs)[grid, 256](out, lse, inp, NH, scale)


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


# the softmax of a tile
@functools.cache
def _tile_softmax(hs, G, R):
    """softmax(weights, sums, s, top, total, first, start, scale): (1.8.12).

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
            new = _lanes_max(new, 8)
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
    """finish(lse, head, sums, top, total, first): (1.8.13)."""
    PER = -(-hs // 32) * 4

    @device
    def finish(lse, head, sums, top, total, first):
        row, lane = cuda.threadIdx.x // 8, cuda.threadIdx.x % 8
        for r in range(R):
            t, whole = first + row + G * r, _lanes_sum(total[r], 8)
            for n in range(PER):
                sums[PER * r + n] /= whole
            if lane == 0 and t < lse.shape[1]:
                lse[head, t] = top[r] + math.log(whole)

    return finish


# version 3, the kernel
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


# version 3
def _forward_tiles(out, lse, inp, work):
    """A block for 64 queries, 4 queries and 4 keys a thread."""
    B, NH, T = lse.shape
    hs = out.shape[2] // NH
    scale = np.float32(1 / math.sqrt(hs))
    grid = B * NH * -(-T // (16 * _side(hs)))
    tiles = _forward_kernel(hs, hs % 4 == 0 and aligned(out, inp))
    out, inp, lse = out.reshape(-1), inp.reshape(-1), lse.reshape(B * NH, T)
    tiles[grid, 128](out, lse, inp, NH, scale)


# the versions of forward
# the square in memory; tiles in shared memory; tiles in registers as well
ATTENTION_FORWARD = (_forward_unfused, _forward_flash, _forward_tiles)
WIDEST_HEAD = 128  # channels of a head; only version 1 takes more


# the checks on a GPU
def _sizes(name, lse, C, version):
    """B, T and NH; raise for what the kernels cannot take."""
    B, NH, T = lse.shape
    if not lse.size:
        raise ValueError(f"{name}: lse must not be empty, got {lse.shape}")
    if version > 1 and C // NH > WIDEST_HEAD:
        raise ValueError(
            f"{name}: a head of {C // NH} channels is too wide for version "
            f"{version}, which takes {WIDEST_HEAD}; version 1 takes any"
        )
    return B, T, NH


# scratch
def attention_scratch(B, T, NH, forward=3, backward=2):
    """How many floats of `work` attention wants, for both passes.

    forward, backward: their versions; 0 for a pass that will not run.

    Derived in chapter 1.8.
    """
    square, row = B * NH * T * T, B * NH * T
    return max(
        (0, square, 0, 0)[forward], (0, 2 * square + row, row)[backward]
    )


# find the scratch
def _find_work(name, work, count, like):
    """`count` floats of work, which is allocated where it is None."""
    if work is None:
        return empty(count, like=like) if count else None
    if work.size < count:
        raise ValueError(
            f"{name}: work must hold {count} floats, got {work.size}"
        )
    return work[:count]


# attention, forward
@shapes("B T C!, B NH|C T!, B T 3C, W!?", DEVICE)
def attention_forward(out, lse, inp, work=None, version=3):
    """Causal self-attention of NH heads.

    inp: (B, T, 3C), queries, keys and values along the last axis. Writes
    out (B, T, C) and lse (B, NH, T), the log-sum-exp of each row of scaled,
    masked scores, which the backward pass needs. All float32 on a device.
    work: scratch of attention_scratch() floats, or None to allocate it.
    version: 1 keeps the scores in memory, 2 and 3 take heads of up to 128
    channels and need no scratch. Raises TypeError or ValueError before it
    launches anything.

    Derived in chapter 1.8.
    """
    name = "attention_forward"
    run = numbered(ATTENTION_FORWARD, version, name)
    sizes = _sizes(name, lse, out.shape[2], version)
    count = attention_scratch(*sizes, version, 0)
    run(out, lse, inp, _find_work(name, work, count, inp))


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


# version 1, the scores' gradients
@kernel
def _attention_pairs(att, ds, dout, inp, lse, D, NH, scale):
    """A thread a pair (t, u): its weight, and the gradient of its score."""
    heads, T, _ = att.shape
    C = dout.shape[2]
    hs = C // NH
    pair = cuda.grid(1)
    head, t, u = pair // (T * T), pair // T % T, pair % T
    if head < heads and u <= t:
        b, q = head // NH, head % NH * hs
        s, da = np.float32(0), np.float32(0)
        for i in range(q, q + hs):
            s += inp[b, t, i] * inp[b, u, C + i]
            da += dout[b, t, i] * inp[b, u, 2 * C + i]
        a = np.float32(math.exp(s * scale - lse[head, t]))
        att[head, t, u] = a
        ds[head, t, u] = a * (da - D[head, t]) * scale


# version 1, queries
@kernel
def _attention_dq(dinp, ds, inp, NH, add):
    """A thread a number of dq: (1.8.10)."""
    B, T, C = inp.shape[0], inp.shape[1], inp.shape[2] // 3
    place = cuda.grid(1)
    b, t, c = place // (T * C), place // C % T, place % C
    if b < B:
        head, dq = b * NH + c * NH // C, np.float32(0)
        if add:
            dq = dinp[b, t, c]
        for u in range(t + 1):
            dq += ds[head, t, u] * inp[b, u, C + c]
        dinp[b, t, c] = dq


# version 1, keys and values
@kernel
def _attention_dk_dv(dinp, att, ds, dout, inp, NH, add):
    """A thread a number of dk and its twin of dv: (1.8.10), (1.8.5)."""
    B, T, C = dout.shape
    place = cuda.grid(1)
    b, u, c = place // (T * C), place // C % T, place % C
    if b < B:
        head, dk, dv = b * NH + c * NH // C, np.float32(0), np.float32(0)
        if add:
            dk, dv = dinp[b, u, C + c], dinp[b, u, 2 * C + c]
        for t in range(u, T):
            dk += ds[head, t, u] * inp[b, t, c]
            dv += att[head, t, u] * dout[b, t, c]
        dinp[b, u, C + c], dinp[b, u, 2 * C + c] = dk, dv


# backward, version 1
def _backward_unfused(dinp, dout, inp, out, lse, add, work):
    """A kernel a step, with two squares between them."""
    B, NH, T = lse.shape
    heads, square = B * NH, B * NH * T * T
    scale = np.float32(1 / math.sqrt(out.shape[2] // NH))
    att = work[:square].reshape(heads, T, T)
    ds = work[square : 2 * square].reshape(heads, T, T)
    D, lse = work[2 * square :].reshape(heads, T), lse.reshape(heads, T)
    _attention_rows[-(-lse.size // 4), 128](D, dout, out, NH)
    _attention_pairs[-(-square // 128), 128](
        att, ds, dout, inp, lse, D, NH, scale
    )
    grid = -(-out.size // 128)
    _attention_dq[grid, 128](dinp, ds, inp, NH, add)
    _attention_dk_dv[grid, 128](dinp, att, ds, dout, inp, NH, add)


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


# backward, version 2
def _backward_tiles(dinp, dout, inp, out, lse, add, work):
    """The rows' D, then a walk for dk and dv and a walk for dq."""
    B, NH, T = lse.shape
    hs = out.shape[2] // NH
    scale = np.float32(1 / math.sqrt(hs))
    D, lse = work.reshape(B * NH, T), lse.reshape(B * NH, T)
    _attention_rows[-(-lse.size // 4), 128](D, dout, out, NH)
    grid, arrays = B * NH * -(-T // (8 * _side(hs))), (dinp, dout, inp)
    fours = hs % 4 == 0 and aligned(*arrays)
    args = *(x.reshape(-1) for x in arrays), lse, D, NH, scale, add
    _keys_kernel(hs, fours)[grid, 64](*args)
    _queries_kernel(hs, fours)[grid, 64](*args)


# the versions of backward
# two squares in memory; two walks over tiles
ATTENTION_BACKWARD = (_backward_unfused, _backward_tiles)


# attention, backward
@shapes("B T 3C!, B T C, B T 3C, B T C, B NH|C T", DEVICE, work="W!?")
def attention_backward(
    dinp, dout, inp, out, lse, add=True, work=None, version=2
):
    """Add attention's gradient to dinp.

    dinp, inp: (B, T, 3C). dout, out: (B, T, C). lse: (B, NH, T). out and
    lse are as the forward pass left them. All float32 on a device. add:
    False overwrites dinp instead of adding. work: scratch of
    attention_scratch() floats, or None to allocate it. version: 1 keeps the
    weights in memory, 2 takes heads of up to 128 channels and needs one
    float a row. Every element is summed in one order. Raises TypeError or
    ValueError before it launches anything.

    Derived in chapter 1.8.
    """
    name = "attention_backward"
    run = numbered(ATTENTION_BACKWARD, version, name)
    sizes = _sizes(name, lse, out.shape[2], version)
    count = attention_scratch(*sizes, 0, version)
    work = _find_work(name, work, count, inp)
    run(dinp, dout, inp, out, lse, int(add), work)
