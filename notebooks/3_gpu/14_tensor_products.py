# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       cuda.bf16_matmul: "The linear layer in bfloat16, on tensor cores."
# ---

# %% [markdown]
# # Products on tensor cores: the linear layer in bfloat16
#
# > One kernel for all three products of the linear layer: tiles whose chunks
# > change places to keep the banks apart, copied while the warps multiply.
#
# *Reading time: 20 minutes. You need: the product's tiles
# ([chapter 3.6](06_matmul.ipynb)) and the instructions of tensor cores
# ([chapter 3.13](13_tensor_cores.ipynb)).*

# %% [markdown]
# ## Where we are
#
# We have instructions that multiply, load and copy. A kernel must feed them.
# At the end of this chapter you can
#
# - lay a tile in shared memory so that eight rows of 16 bytes can be read at
#   once, whichever way the matrix lies;
# - keep a copy on its way while the warps multiply, with one barrier a tile;
# - say what is rounded to bfloat16 in a linear layer, and how often.

# %% [markdown]
# ## Setup

# %% setup
import matplotlib.pyplot as plt

from llmnb.book.owners import draw_owners
from llmnb.book.verify import verdict
from llmnb.gpu.launch import empty, simulated, to_host
from llmnb.gpu.simulator import watch
from llmnb.reference.bfloat16 import from_bfloat16, to_bfloat16

# %% imports of the product tags=["export"]
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


# %% [markdown]
# ## A warp's part
#
# A block owns a tile of 64 by 64 outputs with four warps, or of 128 by 128
# with eight; a warp owns 32 by 32 of it, or 64 by 32. The larger tile is taken
# where that leaves a tile for each of an A100's 108 multiprocessors, the
# smaller one for less. All take 32 steps of the sum at a time from two tiles
# in shared memory, while the next two are on their way. Counted for a warp and
# 16 steps of a tile of 128: six `ldmatrix` bring four fragments of A and four
# of B, for 16 `mma`, which are 32,768 FMAs.
#
# A tile lies in memory as in its matrix, by *chunks* of 16 bytes: each of its
# chunks is one row that `ldmatrix` wants. Eight lanes ask for eight rows of
# one column of chunks. Where a row has 8 chunks or 16, these are all in the
# same banks as they stand; where it has four, in two of the eight places that
# 128 bytes have. A chunk of padding for each row would do, as in
# [chapter 3.9](09_attention.ipynb), but it takes room, half of a tile where a
# row has two chunks and an eighth where it has eight. To exchange places takes
# none: chunk c of row r lies where chunk $c \oplus (r \bmod 8)$ was, $\oplus$
# being the exclusive or. Eight rows then use all eight columns of chunks of
# 128 bytes. Of short rows, several make 128 bytes; they share one change of
# place. This is called a *swizzle*.


# %% where a chunk lies tags=["exporti"]
@functools.cache
def swizzle(chunks):
    """place(row, chunk): where a chunk lies, rows having `chunks` of them."""
    FEW = min(chunks, 8)

    @device
    def place(row, chunk):
        return 4 * (row * chunks + (chunk ^ ((row & 7) * FEW >> 3)))

    return place


# %% eight rows of one column
for chunks in (2, 4, 8, 16):
    place = swizzle(chunks)
    for first in range(0, 32, 8):
        for chunk in range(chunks):
            banks = {place(first + r, chunk) % 32 for r in range(8)}
            assert len(banks) == 8
print("eight rows of a column of chunks: eight different fours of banks")

# %% [markdown]
# A block fills a tile with one copy of 16 bytes a lane and turn. A turn goes
# `DOWN` rows further, a multiple of 8, which changes nothing in the swizzle:
# so a lane asks for its place once, before the turns. Beyond the matrix a copy
# brings zeros, which add nothing.


# %% fill a tile of chunks tags=["exporti"]
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


# %% [markdown]
# The fragments come out of a tile in four ways. `along` is true if a row of
# the tile goes along k, and then `ldmatrix` loads it as it is; if not,
# transposed. Either way four matrices of 8 by 8 make a fragment of A, or those
# of two neighbours of B. Which lane names which row follows from the order of
# the registers in the table: `wide` goes down 16 rows first, then to the next
# chunk; else it goes to the next chunk first.


# %% fragments from a tile tags=["exporti"]
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


# %% [markdown]
# With a fragment of A and two of B a warp does two `mma`, for eight sums of
# each lane: those of 16 rows and 16 columns.


# %% multiply fragments tags=["exporti"]
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


# %% [markdown]
# What is done with a sum at the end is compiled into the kernel: whether it is
# rounded to bfloat16 or kept in float32 (the gradients of weights), whether a
# bias or what is there already is added. The sum itself is always in float32,
# and is rounded to bfloat16 once.


# %% the end of a product tags=["exporti"]
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


# %% bring both tiles tags=["exporti"]
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


# %% the kernel tags=["exporti"]
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


# %% [markdown]
# ## The layer
#
# All that comes in rows begins at a multiple of 16 bytes, and so does each
# row, if the channels are a multiple of 8. That is checked, with the rest,
# before anything is launched. On the device a bfloat16 number is a uint16,
# since NumPy has no such type; each layer tells `halves` which arrays are
# float32 all the same.


# %% what a layer's arrays must be tags=["exporti"]
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


# %% launch a product tags=["exporti"]
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


# %% [markdown]
# The bias's gradient is summed in float32, by chunks of rows as in chapter 3.6,
# two columns a thread.


# %% the bias's gradient in float32 tags=["exporti"]
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


# %% the layer, forward tags=["export"]
@shapes("B T OC!, B T C, OC C, OC?, B T OC?~, W!?", halves("bias", "work"))
def matmul_forward_bf16(out, inp, weight, bias, residual=None, work=None):
    """out = inp @ weight.T + bias + residual, in bfloat16: (1.7.1).

    out, residual: (B, T, OC). inp: (B, T, C). weight: (OC, C). All bits of
    bfloat16, uint16, on a device; bias: (OC,), float32. bias and residual
    may be None, and out may be residual itself. Sums are float32, rounded
    once. work: not used. C and OC are multiples of 8. Raises TypeError or
    ValueError before it launches anything.
    """
    start = None if residual is None else as_rows(residual)
    y, x = as_rows(out), as_rows(inp)
    tensor_product(Product(y, x, weight, True, True, start, bias))


# %% the layer, backward tags=["export"]
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


# %% [markdown]
# The verdict, against float64, for a layer whose sizes no tile divides. The
# simulator adds in float64 and rounds to float32 once an `mma`, so that hardly
# more is left of an error here than one rounding of the result: a bfloat16
# number is off by at most $2^{-8}$ of its size, 0.4 %, and by less than half
# of that on the whole. How a GPU rounds inside an `mma` is open
# ([chapter 3.13](13_tensor_cores.ipynb)). The gradients of the weights,
# float32, are not rounded to bfloat16; their factors were bfloat16 already.

# %% the layer against float64
draw = np.random.default_rng(14)
B, T, C, OC = 1, 40, 24, 72


def half(*shape):
    return to_bfloat16(draw.normal(size=shape).astype(np.float32))


def error(got, want):
    """The size of the difference, relative to the size of what is right."""
    got = from_bfloat16(got) if got.dtype == np.uint16 else got
    return np.linalg.norm(got - want) / np.linalg.norm(want)


x, w, dy = half(B, T, C), half(OC, C), half(B, T, OC)
bias = draw.normal(size=OC).astype(np.float32)
wide_x, wide_w, wide_dy = (
    from_bfloat16(z).astype(np.float64) for z in (x, w, dy)
)
there = [simulated(z) for z in (x, w, bias, dy)]
y, dx = empty((B, T, OC), np.uint16), empty((B, T, C), np.uint16)
dw, db = empty((OC, C)), empty(OC)
with watch() as seen:
    matmul_forward_bf16(y, *there)  # dout serves as a residual
    matmul_backward_bf16(dx, dw, db, there[3], *there[:2], False, False)
    matmul_backward_bf16(dx, dw, db, there[3], *there[:2], False)  # and again
for name, got, want, most in (
    ("out", y, wide_x @ wide_w.T + bias + wide_dy, 2e-3),
    ("dinp", dx, wide_dy @ wide_w, 2e-3),
    ("dweight", dw, 2 * wide_dy[0].T @ wide_x[0], 1e-6),
    ("dbias", db, 2 * wide_dy[0].sum(axis=0), 1e-6),
):
    small = error(to_host(got), want) < most
    verdict(name, small, f"within {most:g} of float64")

# %% [markdown]
# All accesses were watched for races, the copies twice. And no two of eight
# rows wanted one bank: a request of 32 lanes for 16 bytes each takes four
# passes, the fewest that 512 bytes can take.

# %% the passes
verdict(
    "shared memory",
    seen.shared_passes == 4 * seen.shared_requests,
    "four passes for each request",
)

# %% [markdown]
# ## Count it
#
# What does a tile of 128 ask of memory? For 32 steps it brings 128 rows of A
# and 128 of B, 64 bytes each, and does $128^2 \cdot 32$ FMAs with them: 64
# operations for each byte. An A100 that computes 312 TFLOP/s and reads 1,555
# GB/s needs 200 operations a byte, and an H100 of 989 and 3,350 needs 295. So
# other blocks must find what one has read in the L2 cache, which all
# multiprocessors share: a row of tiles reads the same rows of A.
#
# Prediction, for a product of 16,384 rows by 768 steps and 2,304 columns, the
# queries, keys and values of GPT-2 124M for 16 sequences of 1,024 tokens: 58
# GFLOP, 0.31 ms at 60 % of an A100's rate. On an H100 we expect more than the
# 0.1 ms that 60 % of its rate would take, since that rate is for `wgmma`.

# %% [markdown]
# ## Take away
#
# - A product on tensor cores is the product of chapter 3.6: tiles in shared
#   memory, sums in registers. What is new is how a tile lies.
# - Chunks of 16 bytes change places by an exclusive or with the row; then
#   eight rows are in eight different places of the banks, in either direction.
# - Two pairs of tiles and one barrier: wait, meet, ask for the next tiles,
#   multiply.
# - Factors are bfloat16, sums are float32, and a result is rounded to bfloat16
#   once.

# %% [markdown]
# ## Design note
#
# Each lane writes its results two by two, four bytes at a time; four lanes
# make 16 bytes of a row. Through shared memory they could write whole sectors,
# for one more barrier and one more pass over the tile, once a tile. We expect
# long sums to hide either, and kept the shorter code.
#
# A library such as cuBLASLt has kernels for each shape and generation, and
# should be faster where it is there ([chapter 3.7](07_cublas.ipynb)). With
# this one, training in bfloat16 needs no library at all.

# %% [markdown]
# ## Exercises
#
# **1** (★★). Draw how a tile of eight rows of four chunks lies in shared
# memory, 128 bytes a line. Which row and chunk is at each place?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# Two rows share a line of eight chunks. `swizzle(4)` says where each goes.
# :::

# %% exercise 1, drawn tags=["hide-cell"]
lies = np.zeros((4, 8), int)
for row in range(8):
    for chunk in range(4):
        at = swizzle(4)(row, chunk) // 4
        lies[at // 8, at % 8] = 10 * row + chunk
fig, ax = plt.subplots(figsize=(4, 2.2), dpi=100)
draw_owners(ax, lies.tolist(), "row and chunk", group=10)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 3.14.1. Eight rows of four chunks: the tens are the row, the last
# figure is the chunk. A line holds a pair of rows, and each pair exchanges its
# chunks in another way: no column of this picture has a chunk twice.*

# %% exercise 1, checked
places = [10 * row + chunk for row in range(8) for chunk in range(4)]
verdict("a place", sorted(lies.ravel()) == places, "for each row and chunk")
once = all(len(set(column % 10)) == 4 for column in lies.T)
verdict("a column", once, "has each chunk once")

# %% [markdown]
# ## Further reading
#
# - NVIDIA, [CUTLASS](https://github.com/NVIDIA/cutlass): the same pieces,
#   general, as C++ templates; its documents explain the layouts.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("3.14")
