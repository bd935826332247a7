# Written by `make export` from notebooks/3_gpu/06_matmul.py: edit that file.

"""The linear layer on a GPU, by our own kernels."""

__all__ = ["matmul_backward", "matmul_forward", "matmul_scratch"]


# imports of the GPU's products
import functools
import math
from typing import NamedTuple

import numpy as np

from llmnb.gpu.launch import DEVICE, aligned, device, given_work, kernel
from llmnb.gpu.simulator import cuda, load4, store4
from llmnb.shapes import shapes


# a product
class Product(NamedTuple):
    """out = start + bias + the sum over k of a and b, of matrices.

    along_a, along_b: whether k runs along the rows in memory: a is (rows of
    out, steps), or else (steps, rows of out). start and bias may be None.
    """

    out: object
    a: object
    b: object
    along_a: bool
    along_b: bool
    start: object = None
    bias: object = None


# start a product
ZERO = np.float32(0)


@device
def write(out, start, at, value, add):
    """out[at] = value, plus what start holds there if `add`."""
    if add:
        value += start[at]
    out[at] = value


def as_rows(array):
    """A view of an array as a matrix: its last axis as the columns."""
    *rows, columns = array.shape
    return array.reshape(math.prod(rows), columns)  # -1 fails for no columns


def named(function, name, along_a, along_b, threads):
    """A kernel, with a name that a profiler can show."""
    layout = ("n" if along_a else "t") + ("t" if along_b else "n")
    function.__name__ = f"matmul_{layout}_{name}"
    return kernel(function, launch_bounds=threads)


def launch(made, tile, threads, p):
    """Launch a kernel with a block for each tile of out, (down, across)."""
    rows, cols = p.out.shape
    grid = -(-cols // tile[1]), -(-rows // tile[0])
    add, shift = int(p.start is not None), int(p.bias is not None)
    start = p.start if add else p.out  # not read then
    bias = p.bias if shift else p.out.reshape(-1)
    made[grid, threads](p.out, start, bias, p.a, p.b, add, shift)


# fill a tile
def _filler(tile, depth, threads, along):
    """How a block brings `tile` rows (or columns) of `depth` steps."""
    pitch = tile + 32 // depth

    @device
    def fill(shared, source, first, k):
        for turn in range(tile * depth // threads):
            e, value = cuda.threadIdx.x + turn * threads, ZERO
            if along:
                i, j = e // depth, e % depth  # a row, a step of the sum
                r, c = first + i, k + j
            else:
                i, j = e % tile, e // tile
                r, c = k + j, first + i
            if r < source.shape[0] and c < source.shape[1]:
                value = source[r, c]
            shared[j * pitch + i] = value

    return fill


# versions 2 and 3
@functools.cache
def tile_kernel(tile, depth, own, along_a, along_b):
    """A kernel: tiles of tile^2 outputs, own^2 of them for each thread."""
    side, pitch = tile // own, tile + 32 // depth
    room, count = depth * pitch, own * own
    fill_a = _filler(tile, depth, side * side, along_a)
    fill_b = _filler(tile, depth, side * side, along_b)

    def multiply(out, start, bias, a, b, add, shift):
        left = cuda.shared.array(room, np.float32)
        right = cuda.shared.array(room, np.float32)
        sums = cuda.local.array(count, np.float32)
        p = cuda.local.array(own, np.float32)
        q = cuda.local.array(own, np.float32)
        rows, cols = out.shape
        top, edge = cuda.blockIdx.y * tile, cuda.blockIdx.x * tile
        y, x = cuda.threadIdx.x // side, cuda.threadIdx.x % side
        for i in range(count):
            sums[i] = ZERO
        for k in range(0, a.shape[1] if along_a else a.shape[0], depth):
            fill_a(left, a, top, k)
            fill_b(right, b, edge, k)
            cuda.syncthreads()
            for step in range(depth):
                for i in range(own):
                    p[i] = left[step * pitch + y + i * side]
                    q[i] = right[step * pitch + x + i * side]
                for i in range(own):
                    for j in range(own):
                        sums[i * own + j] += p[i] * q[j]
            cuda.syncthreads()  # before the next tiles overwrite these
        for j in range(own):
            c = edge + x + j * side
            q[j] = bias[c] if shift and c < cols else ZERO
        for i in range(own):
            r = top + y + i * side
            for j in range(own):
                c, value = edge + x + j * side, sums[i * own + j] + q[j]
                if r < rows and c < cols:
                    write(out, start, (r, c), value, add)

    name = f"{tile}_scalars_{count}"
    return named(multiply, name, along_a, along_b, side * side)


# version 3, launched
PROCESSORS = 108  # multiprocessors of an A100


def tile_size(rows, cols):
    tiles = -(-rows // 128) * -(-cols // 128)
    return 128 if tiles >= PROCESSORS else 64


def register_tiles(p):
    """A product by 8 by 8 outputs a thread, of any sizes."""
    tile = tile_size(*p.out.shape)
    made = tile_kernel(tile, 8, 8, p.along_a, p.along_b)
    launch(made, (tile, tile), tile * tile // 64, p)


# fetch the next tile
SLICE = 8  # steps of the sum in a tile


def _fetcher(tile, along):
    """How a thread fetches its fours of a tile into registers."""
    threads = tile * tile // 64
    # fours that stand side by side, and the fours of one thread
    line, turns = (SLICE if along else tile) // 4, 128 // tile

    @device
    def fetch(held, source, first, k):
        for turn in range(turns):
            e = cuda.threadIdx.x + turn * threads
            r, c = (first, k) if along else (k, first)
            r, c = r + e // line, c + e % line * 4
            v = ZERO, ZERO, ZERO, ZERO
            if r < source.shape[0] and c < source.shape[1]:
                v = load4(source, r * source.shape[1] + c)
            for n in range(4):
                held[4 * turn + n] = v[n]

    return fetch


# put it into shared memory
def _putter(tile, along):
    """How a thread puts what it fetched into shared memory, from `base`."""
    threads, pitch = tile * tile // 64, tile + 4
    line, turns = (SLICE if along else tile) // 4, 128 // tile

    @device
    def put(shared, base, held):
        for turn in range(turns):
            e, n = cuda.threadIdx.x + turn * threads, 4 * turn
            far, near = e // line, e % line * 4
            if along:
                for m in range(4):
                    at = base + (near + m) * pitch + far
                    shared[at] = held[n + m]
            else:
                v, w, y, z = held[n], held[n + 1], held[n + 2], held[n + 3]
                store4(shared, base + far * pitch + near, v, w, y, z)

    return put


# by fours
@device
def _take(eight, shared, at, half):
    """Four numbers from `at` on, and four from half a tile further."""
    v, w = load4(shared, at), load4(shared, at + half)
    for n in range(4):
        eight[n], eight[4 + n] = v[n], w[n]


@device
def _plus(v, w):
    return v[0] + w[0], v[1] + w[1], v[2] + w[2], v[3] + w[3]


@device
def _write4(out, start, bias, at, column, v, add, shift):
    if shift:
        v = _plus(v, load4(bias, column))
    if add:
        v = _plus(v, load4(start, at))
    store4(out, at, v[0], v[1], v[2], v[3])


# version 4
@functools.cache
def _vector_kernel(tile, along_a, along_b):
    side, pitch, half = tile // 8, tile + 4, tile // 2
    room, few = 2 * SLICE * pitch, 512 // tile
    fetch_a, put_a = _fetcher(tile, along_a), _putter(tile, along_a)
    fetch_b, put_b = _fetcher(tile, along_b), _putter(tile, along_b)

    def multiply(out, start, bias, a, b, add, shift):
        left = cuda.shared.array(room, np.float32, alignment=16)
        right = cuda.shared.array(room, np.float32, alignment=16)
        next_a = cuda.local.array(few, np.float32)
        next_b = cuda.local.array(few, np.float32)
        sums = cuda.local.array(64, np.float32)
        p = cuda.local.array(8, np.float32)
        q = cuda.local.array(8, np.float32)
        (rows, cols), steps = out.shape, a.shape[1 if along_a else 0]
        top, edge = cuda.blockIdx.y * tile, cuda.blockIdx.x * tile
        y, x = cuda.threadIdx.x // side * 4, cuda.threadIdx.x % side * 4
        for i in range(64):
            sums[i] = ZERO
        fetch_a(next_a, a, top, 0)
        fetch_b(next_b, b, edge, 0)
        put_a(left, 0, next_a)
        put_b(right, 0, next_b)
        now = 0
        for k in range(SLICE, steps + SLICE, SLICE):
            cuda.syncthreads()
            if k < steps:
                fetch_a(next_a, a, top, k)
                fetch_b(next_b, b, edge, k)
            for at in range(now, now + SLICE * pitch, pitch):
                _take(p, left, at + y, half)
                _take(q, right, at + x, half)
                for i in range(8):
                    for j in range(8):
                        sums[8 * i + j] += p[i] * q[j]
            now = SLICE * pitch - now
            if k < steps:
                put_a(left, now, next_a)
                put_b(right, now, next_b)
        for i in range(8):
            r = top + y + i % 4 + i // 4 * half
            for n in range(8 * i, 8 * i + 8, 4):
                c = edge + x + n // 4 % 2 * half
                if r < rows and c < cols:
                    v = sums[n], sums[n + 1], sums[n + 2], sums[n + 3]
                    at = r * cols + c
                    _write4(out, start, bias, at, c, v, add, shift)

    return named(multiply, f"{tile}_vectors", along_a, along_b, side * side)


# version 4, launched
def vectors(p):
    """A product by fours, where all rows and arrays begin at fours."""
    arrays = p.out, p.start, p.bias, p.a, p.b
    used = [x for x in arrays if x is not None]
    if any(x.shape[-1] % 4 for x in used) or not aligned(*used):
        register_tiles(p)
        return
    tile = tile_size(*p.out.shape)
    made = _vector_kernel(tile, p.along_a, p.along_b)
    launch(made, (tile, tile), tile * tile // 64, p)


# add up the columns
CHUNK = 64  # rows that a thread adds up


@kernel(launch_bounds=128)
def _sum_chunks(work, dout):
    c, chunk, total = cuda.grid(1), cuda.blockIdx.y, ZERO
    rows, cols = dout.shape
    if c < cols:
        last = min(rows, (chunk + 1) * CHUNK)
        for r in range(chunk * CHUNK, last):
            total += dout[r, c]
        work[chunk * cols + c] = total


@kernel(launch_bounds=128)
def add_chunks(dbias, work, chunks, add):
    c, cols, total = cuda.grid(1), dbias.size, ZERO
    if c < cols:
        for chunk in range(chunks):
            total += work[chunk * cols + c]
        write(dbias, dbias, c, total, add)


# how much scratch memory
def matmul_scratch(rows, OC):
    """How many floats of scratch memory matmul_backward wants.

    rows: B * T.

    Derived in chapter 3.6.
    """
    return -(-rows // CHUNK) * OC


# the bias's gradient
def bias_gradient(dbias, dout, add, work):
    """Sum the rows of dout; work: of `matmul_scratch`."""
    dout = as_rows(dout)
    across, chunks = -(-dbias.size // 128), -(-len(dout) // CHUNK)
    _sum_chunks[(across, chunks), 128](work, dout)
    add_chunks[across, 128](dbias, work, chunks, int(add))


# the layer on a GPU, forward
@shapes("B T OC!, B T C, OC C, OC?, B T OC?~, W!?", DEVICE)
def matmul_forward(
    out, inp, weight, bias, residual=None, work=None, version=vectors
):
    """out = inp @ weight.T + bias + residual, in one launch: (1.7.1).

    out, residual: (B, T, OC). inp: (B, T, C). weight: (OC, C). bias: (OC,).
    bias and residual may be None. Device arrays of float32; out is
    overwritten, and may be residual itself. work: not used, there for the
    sake of one signature. version: of the product. Raises TypeError or
    ValueError before it launches anything.

    Derived in chapter 3.6.
    """
    y, x = as_rows(out), as_rows(inp)
    start = None if residual is None else as_rows(residual)
    version(Product(y, x, weight, True, True, start, bias))


# the layer on a GPU, backward
@shapes("B T C!, OC C!, OC!?, B T OC, B T C, OC C", DEVICE, work="W!?")
def matmul_backward(
    dinp, dweight, dbias, dout, inp, weight,
    add_dinp=True, add_dweight=True, *, work=None, version=vectors,
):  # fmt: skip
    """Add the linear layer's gradients to dinp, dweight and dbias.

    dinp, inp: (B, T, C). dout: (B, T, OC). dweight, weight: (OC, C).
    dbias: (OC,), or None for a layer without bias. Device arrays of
    float32. add_dinp, add_dweight: False overwrites dinp, or dweight and
    dbias, instead of adding. work: scratch of matmul_scratch(B * T, OC)
    floats or more, or None to allocate it; not used without dbias. version:
    of the products, (1.7.2) and (1.7.3). Raises TypeError or ValueError
    before it launches anything.

    Derived in chapter 3.6.
    """
    dx, dy, x = as_rows(dinp), as_rows(dout), as_rows(inp)
    if dbias is not None:
        sums = matmul_scratch(*dy.shape)
        work = given_work("matmul_backward", work, sums, dout)
    start = dx if add_dinp else None
    version(Product(dx, dy, weight, True, False, start))
    start = dweight if add_dweight else None
    version(Product(dweight, dy, x, False, False, start))
    if dbias is not None:
        bias_gradient(dbias, dout, add_dweight, work)
