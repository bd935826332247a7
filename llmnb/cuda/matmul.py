# Written by `make export` from notebooks/1_by_hand/07_matmul.py: edit that file.

"""The linear layer on a GPU, by our own kernels."""

__all__ = [
    "MATMUL_BACKWARD",
    "MATMUL_FORWARD",
    "matmul_backward",
    "matmul_forward",
    "matmul_scratch",
]


# imports of the GPU's products
import functools

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
from llmnb.shapes import shapes


# nothing
ZERO = np.float32(0)


@device
def _write(out, start, at, value, add):
    """out[at] = value, plus what start holds there if `add`."""
    if add:
        value += start[at]
    out[at] = value


def _named(function, name, along_a, along_b, threads):
    """A kernel, with a name that a profiler can show."""
    layout = ("n" if along_a else "t") + ("t" if along_b else "n")
    function.__name__ = f"matmul_{layout}_{name}"
    return kernel(function, launch_bounds=threads)


# start a product
def _start(made, tile, threads, out, start, bias, a, b, sizes):
    """Launch a kernel with a block for each tile of out, (down, across)."""
    rows, cols, steps = sizes
    grid = -(-cols // tile[1]), -(-rows // tile[0])
    add, shift = int(start is not None), int(bias is not None)
    start = out if start is None else start  # not read then
    bias = out if bias is None else bias
    made[grid, threads](
        *(out, start, bias, a, b, rows, cols, steps, add, shift)
    )


# version 1
@functools.cache
def _simple_kernel(along_a, along_b):
    def multiply(out, start, bias, a, b, rows, cols, steps, add, shift):
        j, i = cuda.grid(2)
        if i >= rows or j >= cols:
            return
        a_at, a_step = (i * steps, 1) if along_a else (i, rows)
        b_at, b_step = (j * steps, 1) if along_b else (j, cols)
        total = ZERO
        for k in range(steps):
            total += a[a_at + k * a_step] * b[b_at + k * b_step]
        if shift:
            total += bias[j]
        _write(out, start, i * cols + j, total, add)

    return _named(multiply, "simple", along_a, along_b, 256)


def _thread_an_output(out, start, bias, a, b, sizes, along):
    made = _simple_kernel(*along)
    _start(made, (8, 32), (32, 8), out, start, bias, a, b, sizes)


# fill a tile
def _filler(tile, depth, threads, along):
    """How a block brings `tile` rows (or columns) of `depth` steps."""
    pitch = tile + 32 // depth

    @device
    def fill_along(shared, source, first, size, k, steps):
        for turn in range(tile * depth // threads):
            e = cuda.threadIdx.x + turn * threads
            i, j, value = first + e // depth, k + e % depth, ZERO
            if i < size and j < steps:
                value = source[i * steps + j]
            shared[e % depth * pitch + e // depth] = value

    @device
    def fill_across(shared, source, first, size, k, steps):
        for turn in range(tile * depth // threads):
            e = cuda.threadIdx.x + turn * threads
            i, j, value = k + e // tile, first + e % tile, ZERO
            if i < steps and j < size:
                value = source[i * size + j]
            shared[e // tile * pitch + e % tile] = value

    return fill_along if along else fill_across


# versions 2 and 3
@functools.cache
def _tile_kernel(tile, depth, own, along_a, along_b):
    side, pitch = tile // own, tile + 32 // depth
    room, count = depth * pitch, own * own
    fill_a = _filler(tile, depth, side * side, along_a)
    fill_b = _filler(tile, depth, side * side, along_b)

    def multiply(out, start, bias, a, b, rows, cols, steps, add, shift):
        left = cuda.shared.array(room, np.float32)
        right = cuda.shared.array(room, np.float32)
        sums = cuda.local.array(count, np.float32)
        p = cuda.local.array(own, np.float32)
        q = cuda.local.array(own, np.float32)
        top, edge = cuda.blockIdx.y * tile, cuda.blockIdx.x * tile
        y, x = cuda.threadIdx.x // side, cuda.threadIdx.x % side
        for i in range(count):
            sums[i] = ZERO
        for k in range(0, steps, depth):
            fill_a(left, a, top, rows, k, steps)
            fill_b(right, b, edge, cols, k, steps)
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
                    _write(out, start, r * cols + c, value, add)

    name = f"{tile}_scalars_{count}"
    return _named(multiply, name, along_a, along_b, side * side)


# version 2, launched
def _square_tiles(out, start, bias, a, b, sizes, along):
    made = _tile_kernel(16, 16, 1, *along)
    _start(made, (16, 16), 256, out, start, bias, a, b, sizes)


# version 3, launched
PROCESSORS = 108  # multiprocessors of an A100


def _tile_size(rows, cols):
    tiles = -(-rows // 128) * -(-cols // 128)
    return 128 if tiles >= PROCESSORS else 64


def _register_tiles(out, start, bias, a, b, sizes, along):
    tile = _tile_size(*sizes[:2])
    made, threads = _tile_kernel(tile, 8, 8, *along), tile * tile // 64
    _start(made, (tile, tile), threads, out, start, bias, a, b, sizes)


# fetch the next tile
SLICE = 8  # steps of the sum in a tile


def _fetcher(tile, along):
    """How a thread fetches its fours of a tile into registers."""
    threads = tile * tile // 64
    # fours that stand side by side, and the fours of one thread
    line, turns = (SLICE if along else tile) // 4, 128 // tile

    @device
    def fetch(held, source, first, size, k, steps):
        for turn in range(turns):
            e = cuda.threadIdx.x + turn * threads
            far, near = e // line, e % line * 4
            v = ZERO, ZERO, ZERO, ZERO
            if along:
                if first + far < size and k + near < steps:
                    v = load4(source, (first + far) * steps + k + near)
            elif k + far < steps and first + near < size:
                v = load4(source, (k + far) * size + first + near)
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

    def multiply(out, start, bias, a, b, rows, cols, steps, add, shift):
        left = cuda.shared.array(room, np.float32, alignment=16)
        right = cuda.shared.array(room, np.float32, alignment=16)
        next_a = cuda.local.array(few, np.float32)
        next_b = cuda.local.array(few, np.float32)
        sums = cuda.local.array(64, np.float32)
        p = cuda.local.array(8, np.float32)
        q = cuda.local.array(8, np.float32)
        top, edge = cuda.blockIdx.y * tile, cuda.blockIdx.x * tile
        y, x = cuda.threadIdx.x // side * 4, cuda.threadIdx.x % side * 4
        for i in range(64):
            sums[i] = ZERO
        fetch_a(next_a, a, top, rows, 0, steps)
        fetch_b(next_b, b, edge, cols, 0, steps)
        put_a(left, 0, next_a)
        put_b(right, 0, next_b)
        now = 0
        for k in range(SLICE, steps + SLICE, SLICE):
            cuda.syncthreads()
            if k < steps:
                fetch_a(next_a, a, top, rows, k, steps)
                fetch_b(next_b, b, edge, cols, k, steps)
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

    return _named(multiply, f"{tile}_vectors", along_a, along_b, side * side)


# version 4, launched
def _vectors(out, start, bias, a, b, sizes, along):
    rows, cols, steps = sizes
    lines = cols, steps if along[0] else rows, steps if along[1] else cols
    used = [x for x in (out, start, bias, a, b) if x is not None]
    if any(n % 4 for n in lines) or not aligned(*used):
        _register_tiles(out, start, bias, a, b, sizes, along)
        return
    tile = _tile_size(rows, cols)
    made, threads = _vector_kernel(tile, *along), tile * tile // 64
    _start(made, (tile, tile), threads, out, start, bias, a, b, sizes)


# add up the columns
CHUNK = 64  # rows that a thread adds up


@kernel(launch_bounds=128)
def _sum_chunks(work, dout, rows, cols):
    c, chunk, total = cuda.grid(1), cuda.blockIdx.y, ZERO
    if c < cols:
        last = min(rows, (chunk + 1) * CHUNK)
        for r in range(chunk * CHUNK, last):
            total += dout[r * cols + c]
        work[chunk * cols + c] = total


@kernel(launch_bounds=128)
def _add_chunks(dbias, work, chunks, cols, add):
    c, total = cuda.grid(1), ZERO
    if c < cols:
        for chunk in range(chunks):
            total += work[chunk * cols + c]
        _write(dbias, dbias, c, total, add)


def _bias_gradient(dbias, dout, rows, add, work):
    cols, chunks = dbias.size, -(-rows // CHUNK)
    across = -(-cols // 128)
    _sum_chunks[(across, chunks), 128](work, dout, rows, cols)
    _add_chunks[across, 128](dbias, work, chunks, cols, int(add))


# the versions and their scratch
# the products, from the simplest to the best
MATMUL_FORWARD = (
    _thread_an_output,
    _square_tiles,
    _register_tiles,
    _vectors,
)
MATMUL_BACKWARD = MATMUL_FORWARD


def matmul_scratch(rows, OC):
    """How many floats of scratch memory matmul_backward wants.

    rows: B * T.

    Derived in chapter 1.7.
    """
    return -(-rows // CHUNK) * OC


# the checks on a GPU
def _check_work(name, work, floats):
    if work is not None and work.size < floats:
        raise ValueError(
            f"{name}: work must hold {floats} floats, got {work.size}"
        )


# the layer on a GPU, forward
@shapes("B T OC!, B T C, OC C, OC?, B T OC?~, W!?", DEVICE)
def matmul_forward(
    out, inp, weight, bias, residual=None, work=None, version=4
):
    """out = inp @ weight.T + bias + residual, in one launch.

    out, residual: (B, T, OC). inp: (B, T, C). weight: (OC, C). bias: (OC,).
    bias and residual may be None. Device arrays of float32; out is
    overwritten, and may be residual itself. work: not used, there for the
    sake of one signature. version: 1 to 4, the rungs of the ladder; no
    result depends on it but by rounding. Raises TypeError or ValueError
    before it launches anything.

    Derived in chapter 1.7.
    """
    name = "matmul_forward"
    product = numbered(MATMUL_FORWARD, version, name)
    (B, T, C), OC = inp.shape, len(weight)
    start = None if residual is None else residual.reshape(-1)
    y, x, w = (z.reshape(-1) for z in (out, inp, weight))
    product(y, start, bias, x, w, (B * T, OC, C), (True, True))


# the layer on a GPU, backward
@shapes("B T C!, OC C!, OC!?, B T OC, B T C, OC C", DEVICE, work="W!?")
def matmul_backward(
    dinp,
    dweight,
    dbias,
    dout,
    inp,
    weight,
    add_dinp=True,
    add_dweight=True,
    work=None,
    version=4,
):
    """Add the linear layer's gradients to dinp, dweight and dbias.

    dinp, inp: (B, T, C). dout: (B, T, OC). dweight, weight: (OC, C).
    dbias: (OC,), or None for a layer without bias. Device arrays of
    float32. add_dinp, add_dweight: False overwrites dinp, or dweight and
    dbias, instead of adding. work: scratch of matmul_scratch(B * T, OC)
    floats or more, or None to allocate it; not used without dbias.
    version: as in matmul_forward. Raises TypeError or ValueError before it
    launches anything.

    Derived in chapter 1.7.
    """
    name = "matmul_backward"
    product = numbered(MATMUL_BACKWARD, version, name)
    (B, T, C), OC = inp.shape, len(weight)
    rows = B * T
    floats = 0 if dbias is None else matmul_scratch(rows, OC)
    _check_work(name, work, floats)
    x, w, dx, dw, dy = (
        z.reshape(-1) for z in (inp, weight, dinp, dweight, dout)
    )
    start, along = dx if add_dinp else None, (True, False)
    product(dx, start, None, dy, w, (rows, C, OC), along)
    start, along = dw if add_dweight else None, (False, False)
    product(dw, start, None, dy, x, (OC, C, rows), along)
    if dbias is not None:
        work = empty(floats, like=dout) if work is None else work
        _bias_gradient(dbias, dy, rows, add_dweight, work)
