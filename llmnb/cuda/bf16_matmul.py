# Written by `make export` from notebooks/3_gpu/14_tensor_products.py: edit that file.

"""The linear layer in bfloat16, on tensor cores."""

__all__ = ["matmul_backward_bf16", "matmul_forward_bf16"]


# imports of the product
import functools

import numpy as np

from llmnb.cuda.matmul import CHUNK, ZERO, Product, add_chunks, as_rows
from llmnb.cuda.matmul import matmul_scratch, tile_size
from llmnb.gpu.fragments import cp_async, cp_async_commit, cp_async_wait
from llmnb.gpu.fragments import ldmatrix, ldmatrix_trans, mma, pack, unpack
from llmnb.gpu.launch import address, check_device, device, device_kind
from llmnb.gpu.launch import given_work, kernel, overlap
from llmnb.gpu.simulator import cuda
from llmnb.shapes import Memory, shapes


# where a chunk lies
@functools.cache
def swizzle(chunks):
    """place(row, chunk): where a chunk lies, rows having `chunks` of them."""
    FEW = min(chunks, 8)

    @device
    def place(row, chunk):
        return 4 * (row * chunks + (chunk ^ ((row & 7) * FEW >> 3)))

    return place


# fill a tile of chunks
@functools.cache
def filler(rows, chunks, threads):
    """fill(tile, base, source, first, stop, left, pitch), by all threads.

    Rows first to first + rows of a matrix of `pitch` int32 a row, the last
    one before `stop`, from column `left` on, in int32.
    """
    place, DOWN = swizzle(chunks), threads // chunks

    @device
    def fill(tile, base, source, first, stop, left, pitch):
        row, chunk = cuda.threadIdx.x // chunks, cuda.threadIdx.x % chunks
        there, c = base + place(row, chunk), left + 4 * chunk
        for turn in range(rows // DOWN):
            r = first + row + DOWN * turn
            inside = r < stop and c < pitch
            size = 16 if inside else 0
            at = r * pitch + c if inside else 0
            cp_async(tile, there + 4 * chunks * DOWN * turn, source, at, size)

    return fill


# fragments from a tile
@functools.cache
def taker(chunks, along, left):
    """take(tile, base, first, k): four registers of a lane.

    left: a fragment of A, rows first to first + 16 of the output; or else
    two fragments of B, 16 columns. For 16 steps of the sum from k on.
    """
    WIDE, FEW = along == left, min(chunks, 8)
    load = ldmatrix if along else ldmatrix_trans

    @device
    def take(tile, base, first, k):
        lane = cuda.laneid
        if WIDE:
            row, chunk = lane & 15, lane >> 4
        else:
            row, chunk = (lane & 7) + (lane >> 4) * 8, lane >> 3 & 1
        down, right = (first, k) if along else (k, first)
        chunk = (chunk + right // 8) ^ ((row & 7) * FEW >> 3)
        return load(tile, base + 4 * ((row + down) * chunks + chunk))

    return take


# multiply fragments
@device
def multiply(s, j, a, b):
    """Add to sums j to j + 8, 16 rows by 16 columns, 16 steps of a and b."""
    a0, a1, a2, a3 = a
    b0, b1, b2, b3 = b
    s[j], s[j + 1], s[j + 2], s[j + 3] = mma(
        s[j], s[j + 1], s[j + 2], s[j + 3], a0, a1, a2, a3, b0, b1
    )
    s[j + 4], s[j + 5], s[j + 6], s[j + 7] = mma(
        s[j + 4], s[j + 5], s[j + 6], s[j + 7], a0, a1, a2, a3, b2, b3
    )


# the end of a product
@device
def write_pair(out, start, i, x, y, add):
    """out[i] = x and y, rounded, plus what start holds there if `add`."""
    if add:
        low, high = unpack(start[i])
        x, y = x + low, y + high
    out[i] = pack(x, y)


def _finisher(wide, add, shift):
    """finish(out, start, bias, at, c, x, y): elements at and at + 1."""

    @device
    def shifted(bias, c, x, y):
        if shift:
            return x + bias[c], y + bias[c + 1]
        return x, y

    @device
    def finish_wide(out, start, bias, at, c, x, y):
        if add:
            x, y = x + start[at], y + start[at + 1]
        out[at], out[at + 1] = x, y

    @device
    def finish(out, start, bias, at, c, x, y):
        x, y = shifted(bias, c, x, y)
        write_pair(out, start, at // 2, x, y, add)

    return finish_wide if wide else finish


# bring both tiles
DEPTH = 32  # steps of the sum in a tile


@functools.cache
def _bringer(tile, along):
    """bring(shared, base, source, first, count, k, steps): copy a tile.

    first: its first row or column of the output, of `count`; k: its first
    step of the sum, of `steps`.
    """
    rows, chunks = (tile, DEPTH // 8) if along else (DEPTH, tile // 8)
    fill = filler(rows, chunks, 2 * tile)

    @device
    def bring(shared, base, source, first, count, k, steps):
        if along:
            fill(shared, base, source, first, count, k // 2, steps // 2)
        else:
            fill(shared, base, source, k, steps, first // 2, count // 2)

    return bring, taker(chunks, along, True), taker(chunks, along, False)


# the kernel
@functools.cache
def _product_kernel(tile, along_a, along_b, end):
    HALF, PARTS, STAGE = tile // 2, tile // 32, tile * DEPTH // 2
    ROOM, SUMS = 2 * STAGE, 16 * PARTS
    bring_a, take_a, _ = _bringer(tile, along_a)
    bring_b, _, take_b = _bringer(tile, along_b)
    finish = _finisher(*end)

    def product(out, start, bias, a, b, rows, cols, steps):
        left = cuda.shared.array(ROOM, np.int32, alignment=16)
        right = cuda.shared.array(ROOM, np.int32, alignment=16)
        s = cuda.local.array(SUMS, np.float32)
        top, edge = cuda.blockIdx.y * tile, cuda.blockIdx.x * tile
        warp, lane = cuda.threadIdx.x // 32, cuda.laneid
        down, across = warp // PARTS * HALF, warp % PARTS * 32
        for n in range(SUMS):
            s[n] = ZERO
        bring_a(left, 0, a, top, rows, 0, steps)
        bring_b(right, 0, b, edge, cols, 0, steps)
        cp_async_commit()
        now = 0
        for k in range(DEPTH, steps + DEPTH, DEPTH):
            cp_async_wait()
            cuda.syncthreads()  # all copies are here, and all have used
            if k < steps:  # the other half of the tiles
                bring_a(left, STAGE - now, a, top, rows, k, steps)
                bring_b(right, STAGE - now, b, edge, cols, k, steps)
                cp_async_commit()
            for step in range(0, DEPTH, 16):
                b0 = take_b(right, now, across, step)
                b1 = take_b(right, now, across + 16, step)
                for part in range(PARTS):
                    rows_a = take_a(left, now, down + 16 * part, step)
                    multiply(s, 16 * part, rows_a, b0)
                    multiply(s, 16 * part + 8, rows_a, b1)
            now = STAGE - now
        r, c = top + down + lane // 4, edge + across + lane % 4 * 2
        for part in range(PARTS):
            for half in range(2):
                there, i = r + 16 * part + 8 * half, 16 * part + 2 * half
                if there < rows:
                    for n in range(4):
                        k, j = c + 8 * n, i + 4 * n
                        if k < cols:
                            at = there * cols + k
                            finish(out, start, bias, at, k, s[j], s[j + 1])

    name = "nt"[not along_a] + "nt"[along_b]
    product.__name__ = f"matmul_bf16_{name}_{tile}"
    return kernel(product, launch_bounds=(2 * tile, 2))


# what a layer's arrays must be
def check_eights(name, size):
    """Raise unless the size of a row is a multiple of 8."""
    if size % 8:
        raise ValueError(
            f"{name}: in bfloat16 a row must hold a multiple of 8 numbers, "
            f"got {size}"
        )


def halves(*wide):
    """How to look at arrays in bfloat16 (uint16), but for those named."""

    def check(name, array, shape=None, kinds=None, written=False):
        layer, _, own = name.rpartition(": ")
        if kinds != (np.dtype(np.int32),):
            kinds = np.float32 if own in wide else np.uint16
        check_device(name, array, shape, kinds)
        if kinds == np.uint16:
            check_eights(layer, array.shape[-1])
        if kinds == np.uint16 and address(array) % 16:
            raise ValueError(f"{name} must begin at a multiple of 16 bytes")

    floats = np.dtype(np.float32), np.dtype(np.uint16)
    ints = (np.dtype(np.int32),)
    return Memory(check, device_kind, overlap, floats, ints, bounded=False)


def pairs(array):
    """A flat view of an array in bfloat16 as pairs, int32."""
    return array.reshape(-1).view(np.int32)


# launch a product
def tensor_product(p, tile=None):
    """A Product on tensor cores: factors in bfloat16; out in it or float32."""
    rows, cols = p.out.shape
    steps = p.a.shape[1 if p.along_a else 0]
    tile = tile or tile_size(rows, cols)
    wide, add = p.out.dtype == np.float32, p.start is not None
    out = p.out.reshape(-1) if wide else pairs(p.out)
    start = out
    if add:
        start = p.start.reshape(-1) if wide else pairs(p.start)
    shift = p.bias is not None
    bias = p.bias if shift else out
    made = _product_kernel(tile, p.along_a, p.along_b, (wide, add, shift))
    grid = -(-cols // tile), -(-rows // tile)
    factors = pairs(p.a), pairs(p.b)
    made[grid, 2 * tile](out, start, bias, *factors, rows, cols, steps)


# the bias's gradient in float32
@kernel(launch_bounds=128)
def _sum_pairs(work, dout, rows, cols):
    """Two columns a thread, CHUNK rows of them."""
    c, chunk = 2 * cuda.grid(1), cuda.blockIdx.y
    x = y = ZERO
    if c < cols:
        last = min(rows, (chunk + 1) * CHUNK)
        for r in range(chunk * CHUNK, last):
            low, high = unpack(dout[(r * cols + c) // 2])
            x, y = x + low, y + high
        work[chunk * cols + c], work[chunk * cols + c + 1] = x, y


def bias_gradient_bf16(dbias, dout, add, work):
    """Sum the rows of dout; work: of `matmul_scratch`."""
    rows, cols = dout.shape
    chunks = -(-rows // CHUNK)
    grid = -(-cols // 256), chunks
    _sum_pairs[grid, 128](work, pairs(dout), rows, cols)
    add_chunks[-(-cols // 128), 128](dbias, work, chunks, int(add))


# the layer, forward
@shapes("B T OC!, B T C, OC C, OC?, B T OC?~, W!?", halves("bias", "work"))
def matmul_forward_bf16(out, inp, weight, bias, residual=None, work=None):
    """out = inp @ weight.T + bias + residual, in bfloat16: (1.7.1).

    out, residual: (B, T, OC). inp: (B, T, C). weight: (OC, C). All bits of
    bfloat16, uint16, on a device; bias: (OC,), float32. bias and residual
    may be None, and out may be residual itself. Sums are float32, rounded
    once. work: not used. C and OC are multiples of 8. Raises TypeError or
    ValueError before it launches anything.

    Derived in chapter 3.14.
    """
    start = None if residual is None else as_rows(residual)
    y, x = as_rows(out), as_rows(inp)
    tensor_product(Product(y, x, weight, True, True, start, bias))


# the layer, backward
@shapes(
    "B T C!, OC C!, OC!?, B T OC, B T C, OC C",
    halves("dweight", "dbias", "work"),
    work="W!?",
)
def matmul_backward_bf16(
    dinp, dweight, dbias, dout, inp, weight,
    add_dinp=True, add_dweight=True, *, work=None,
):  # fmt: skip
    """Add the linear layer's gradients to dinp, dweight and dbias.

    dinp, inp: (B, T, C). dout: (B, T, OC). weight: (OC, C). All bits of
    bfloat16, uint16. dweight: (OC, C), dbias: (OC,) or None, float32.
    add_dinp, add_dweight: False overwrites. work: scratch of
    matmul_scratch(B * T, OC) floats, or None to allocate it; not used
    without dbias. C and OC are multiples of 8. Raises TypeError or
    ValueError before it launches anything.

    Derived in chapter 3.14.
    """
    dx, dy, x = as_rows(dinp), as_rows(dout), as_rows(inp)
    if dbias is not None:
        sums = matmul_scratch(*dy.shape)
        work = given_work("matmul_backward_bf16", work, sums, dweight)
    start = dx if add_dinp else None
    tensor_product(Product(dx, dy, weight, True, False, start))
    start = dweight if add_dweight else None
    tensor_product(Product(dweight, dy, x, False, False, start))
    if dbias is not None:
        bias_gradient_bf16(dbias, dy, add_dweight, work)
