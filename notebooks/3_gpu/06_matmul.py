# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       cuda.matmul: "The linear layer on a GPU, by our own kernels."
#       bench.rungs_matmul: "Plainer products on a GPU, to be timed."
# ---

# %% [markdown]
# # Products on a GPU: tiles in two memories
#
# > A block of threads shares a tile in its memory, a thread keeps 64 sums in
# > registers: four versions of one product, and what each reads.
#
# *Reading time: 28 minutes. You need: the three products
# ([chapter 1.7](../1_by_hand/07_matmul.ipynb)), why tiles
# ([chapter 2.4](../2_cpu/04_matmul.ipynb)), and sectors and banks
# ([chapter 3.2](02_sectors.ipynb)).*

# %% [markdown]
# ## Where we are
#
# A GPU has the CPU's problem with other numbers. By NVIDIA's data sheets an
# A100 of 40 GB computes at 19.5 TFLOP/s in float32, 19.5 · 10¹² operations a
# second, and its memory delivers 1,555 GB/s: 12.5 operations for each byte.
# For an H100 SXM it is 67 TFLOP/s and 3,350 GB/s, 20 for each byte. One FMA
# is two operations, and it needs two factors, eight bytes: a product that
# fetches both for every FMA does a quarter of an operation for each byte. So
# again a number that has been fetched must be used many times, and again in
# two places: in the memory that a block of threads shares, and in the
# registers of one thread. At the end of this chapter you can
#
# - give each thread its part of a product, and count what each of four
#   versions reads from global and from shared memory;
# - choose a tile for a GPU from its operations a byte;
# - lay a tile in shared memory so that no two lanes want one bank;
# - sum the columns of a gradient in one order, with thousands of threads.
#
# No GPU has run these kernels. They run on the simulator; they are compiled
# for the A100's and the H100's generations, and tests read the machine code.

# %% [markdown]
# ## Setup

# %% setup
import matplotlib.pyplot as plt

from llmnb import reference
from llmnb.book.diagram import PALETTE
from llmnb.book.moving import moving
from llmnb.book.owners import draw_owners, walk
from llmnb.book.verify import compare, verdict
from llmnb.gpu.launch import empty, simulated, to_device, to_host
from llmnb.gpu.simulator import watch

# %% imports of the GPU's products tags=["export"]
import functools
import math
from typing import NamedTuple

import numpy as np

from llmnb.gpu.launch import DEVICE, aligned, device, given_work, kernel
from llmnb.gpu.simulator import cuda, load4, store4
from llmnb.shapes import shapes

# %% [markdown]
# ## One product for three
#
# All three products of the layer are one sum, $\sum_k a_{i,k}\,
# b_{j,k}$; they differ in how the factors lie. Either k runs *along* the
# rows of a matrix in memory, or *across* them:
#
# | product | a | k in a | b | k in b |
# |---|---|---|---|---|
# | forward, (1.7.1) | `inp` | along | `weight` | along |
# | `dinp`, (1.7.2) | `dout` | along | `weight` | across |
# | `dweight`, (1.7.3) | `dout` | across | `inp` | across |
#
# The bias is added at the end, on the way out of the registers, and so is a
# `start`: the residual, or a gradient so far.


# %% a product tags=["exporti"]
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


# %% [markdown]
# numba takes the variables of an enclosing function as constants. So each
# version is a function that returns a kernel, made for `along_a` and
# `along_b`, and no thread has to ask which product it is in. Every kernel has
# a block for each tile of `out`, and is launched alike.

# %% start a product tags=["exporti"]
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


# %% [markdown]
# ## Version 1: a thread an output
#
# The equation, as it stands. A warp is 32 columns of one row, so that its
# results lie side by side in `out`.

# %% imports of the plainer versions tags=["export"] module="bench.rungs_matmul"
import functools

from llmnb.cuda.matmul import (
    ZERO,
    launch,
    matmul_backward,
    matmul_forward,
    named,
    register_tiles,
    tile_kernel,
    write,
)
from llmnb.gpu.simulator import cuda


# %% version 1 tags=["export"] module="bench.rungs_matmul"
@functools.cache
def _simple_kernel(along_a, along_b):
    def multiply(out, start, bias, a, b, add, shift):
        j, i = cuda.grid(2)
        if i >= out.shape[0] or j >= out.shape[1]:
            return
        total = ZERO
        for k in range(a.shape[1] if along_a else a.shape[0]):
            x = a[i, k] if along_a else a[k, i]
            y = b[j, k] if along_b else b[k, j]
            total += x * y
        if shift:
            total += bias[j]
        write(out, start, (i, j), total, add)

    return named(multiply, "simple", along_a, along_b, 256)


def thread_an_output(p):
    """A product, one thread for each number of out; nothing is checked."""
    launch(_simple_kernel(p.along_a, p.along_b), (8, 32), (32, 8), p)


# %% [markdown]
# The verdict on a small problem that divides nothing, for all three
# layouts; and a product to count with, 64 tokens of 16 channels to 64,
# which is 65,536 FMAs or 2,048 by whole warps.

# %% check a version of the product
small = np.random.default_rng(6)
LAYOUTS = {"a bT": (True, True), "a b": (True, False), "aT b": (False, False)}


def check_product(version, rows, cols, steps):
    a, b = (
        small.normal(size=(n, steps)).astype(np.float32) for n in (rows, cols)
    )
    for name, along in LAYOUTS.items():
        out = empty((rows, cols))
        there = [
            to_device(x if way else x.T)
            for x, way in zip((a, b), along, strict=True)
        ]
        version(Product(out, *there, *along))
        compare(name, to_host(out), a @ b.T, tol=1e-5)


check_product(thread_an_output, 9, 35, 17)

# %% count what a version moves
counted = {}


def count(name, version, rows=64, cols=64, steps=16):
    out, a, b = (
        simulated(np.ones(shape, np.float32))
        for shape in ((rows, cols), (rows, steps), (cols, steps))
    )
    with watch() as seen:
        version(Product(out, a, b, True, True))
    counted[name] = seen
    fmas = rows * cols * steps
    print(f"read {seen.read_bytes / fmas:.3f} bytes for each FMA")
    print(f"global memory: {seen.requests} requests, {seen.sectors} sectors")
    print(f"shared memory: {seen.shared_requests} requests, ", end="")
    print(f"{seen.shared_passes} passes; {fmas // 32} FMAs by warps")


count("1", thread_an_output)

# %% [markdown]
# Eight bytes for an FMA, as predicted. The sectors are worse. `weight` runs
# along k, so the 32 lanes of a warp read 32 rows of it, C numbers apart:
# a request touches 32 sectors and uses 4 of the 32 bytes of each.
#
# ## Version 2: square tiles in shared memory
#
# Let a block of 256 threads own 16 by 16 outputs. All of them together need 16
# rows of `a` and 16 of `b`. They read 16 steps of those at a time into shared
# memory, wait, and then take the factors from there. Each number is read from
# global memory once for a block and used 16 times.
#
# The lanes go along the matrix when they read it, whichever way it lies, so
# that they share sectors. In shared memory both factors lie the same way:
# all numbers of step 0, then all of step 1, as in the panels of figure 2.4.2.
# Where k runs along the matrix, neighbouring lanes then write a whole line
# apart. Lines of 64 numbers would put those in one bank; a few numbers of
# padding spread them. The padding that fits follows from the lanes: with
# steps of 16, two rows are read at once, so two more numbers; with steps of
# 8, four.


# %% lanes that want one bank
def most_in_a_bank(tile, depth, padding):
    pitch = tile + padding
    words = [e % depth * pitch + e // depth for e in range(32)]
    banks = [word % 32 for word in words]
    return max(banks.count(bank) for bank in banks)


for tile, depth in ((16, 16), (64, 8), (128, 8)):
    passes = [most_in_a_bank(tile, depth, n) for n in (0, 32 // depth)]
    print(f"{tile:3} numbers of {depth:2} steps: {passes[0]} passes, ", end="")
    print(f"{passes[1]} with {32 // depth} numbers of padding")

# %% [markdown]
# What lies outside of the matrix is filled with zeros, which add nothing;
# only the results need a guard. `own` says how many rows and columns a
# thread has, here one. It will be used in a moment.


# %% fill a tile tags=["exporti"]
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


# %% versions 2 and 3 tags=["exporti"]
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


# %% version 2, launched tags=["export"] module="bench.rungs_matmul"
def square_tiles(p):
    """A product by 16 by 16 outputs a block; nothing is checked."""
    made = tile_kernel(16, 16, 1, p.along_a, p.along_b)
    launch(made, (16, 16), 256, p)


# %% version 2, checked and counted
check_product(square_tiles, 9, 35, 17)
count("2", square_tiles)

# %% [markdown]
# A sixteenth of the bytes, half a byte for an FMA, and a request for 32
# lanes now touches four sectors, all of which are used. But look at shared
# memory. Each FMA still needs two requests; they go to shared memory now: 4,096
# for 2,048 FMAs, and 256 to write the tiles.
#
# ## Version 3: register tiles
#
# The remedy is that of the CPU, figure 2.4.1, a tile in registers: a thread
# owns 8 by 8 outputs. A step brings 8 numbers of `a` and 8 of `b`, 16 loads for
# 64 FMAs. With 8 by 8 a block of 64 threads covers 64 by 64 outputs, one of 256
# threads 128 by 128, and each number from global memory is used that many
# times. It is the kernel we have, with other constants. In Python the sums are
# a small array; the compiler unrolls the loops over it and keeps all 64 in
# registers, and the tests look whether it did.
#
# The larger tile reads less, $8/128$ of a byte for an FMA or 32 operations
# a byte, more than the 20 of an H100; the smaller one makes 16, more than
# the 12.5 of an A100. But a GPU must have work for all its multiprocessors,
# of which an A100 has 108: a product of 256 by 768 has 12 tiles of 128, and
# 48 of 64. So the large tile is for products that have at least 108 of
# them. No result depends on the choice: each output is a sum over k in
# rising order, in every version.


# %% version 3, launched tags=["exporti"]
PROCESSORS = 108  # multiprocessors of an A100


def tile_size(rows, cols):
    tiles = -(-rows // 128) * -(-cols // 128)
    return 128 if tiles >= PROCESSORS else 64


def register_tiles(p):
    """A product by 8 by 8 outputs a thread, of any sizes."""
    tile = tile_size(*p.out.shape)
    made = tile_kernel(tile, 8, 8, p.along_a, p.along_b)
    launch(made, (tile, tile), tile * tile // 64, p)


# %% version 3, checked and counted
check_product(register_tiles, 9, 67, 17)
count("3", register_tiles)

# %% [markdown]
# A quarter of the bytes of version 2, and shared memory is asked 576 times,
# not 4,352. Of these 512 are the reads, one for every four FMAs. In a warp
# eight lanes lie in a row of the tile; those of the next rows want the same
# words of `b`, and a word that several lanes want is served to all in one pass.
#
# The same kernel, made for tiles of 4 by 4 with 2 by 2 outputs a thread, is
# small enough to watch.

# %% a small tile, step by step
fig, axes = plt.subplots(1, 2, figsize=(6, 2.6), dpi=100)
brought = np.repeat(np.arange(4), 4).reshape(4, 4)
draw_owners(axes[0], brought.tolist(), "who brings it", rows="left, by steps")
owned = np.tile([[0, 1], [2, 3]], (2, 2))
draw_owners(axes[1], owned.tolist(), "who owns it", rows="out")
fig.tight_layout()
plt.show()
a = np.arange(32, dtype=np.float32).reshape(4, 8)
b, out = a % 5, np.zeros((4, 4), np.float32)
args = out, out, out[0], a, b, 0, 0
steps = walk("a tile", tile_kernel(4, 4, 2, True, True), 1, 4, args)
names = {"shared": ["left", "right"], "wrap": 4 + 32 // 4}
moving("threads", "a tile, step by step", walks=[steps], **names)
last = {s[7]: s[8][0] for s in steps["steps"]["alone"] if s[6] == "out"}
compare("the tile", [last[i] for i in range(16)], (a @ b.T).ravel())

# %% [markdown]
# *Figure 3.6.1. A block of four threads owns a tile of `out` of 4 by 4. Its
# sums have eight steps, one for each column of `a` and `b`, and the block
# takes them four at a time: four columns of each go into shared memory, `left`
# and `right`. Each number comes from global memory once, brought by one
# thread; then, behind the barrier, two threads read it from shared memory for
# two outputs each. The second barrier holds back those who would overwrite
# what others still read.*
#
# ## Version 4: vectors
#
# A load of four numbers is one instruction instead of four. For that a thread's
# eight columns must lie in fours. Eight in one piece would do, but a load takes
# four of them, and neighbouring lanes then begin eight numbers apart and leave
# out the banks between: two passes where one would serve. So a thread takes
# four columns in the left half of the tile and four in the right, and rows
# likewise.

# %% passes of eight lanes that read four numbers each
for apart, name in ((8, "eight in a piece"), (4, "four and four")):
    words = [lane * apart + i for lane in range(8) for i in range(4)]
    banks = [word % 32 for word in words]
    passes = max(banks.count(bank) for bank in banks)
    print(f"{name}: eight lanes take {passes}")

# %% draw the tiles
fig, ax = plt.subplots(figsize=(4.6, 4.6), dpi=100)
shades = [PALETTE[name] for name in ("blue", "green", "orange")]
places = (((0, 4.4), 1.4, 1.2), ((3, 7), 1.2, 1.4), ((3, 4.4), 1.2, 1.2))
for (corner, wide, high), shade in zip(places, shades, strict=True):
    ax.add_patch(plt.Rectangle(corner, wide, high, color=shade))
for corner, wide, high in (((0, 2), 1.4, 3.6), ((1.8, 7), 3.6, 1.4)):
    ax.add_patch(plt.Rectangle(corner, wide, high, fill=False))
for i, j in np.ndindex(3, 3):
    square = (1.8 + 1.2 * j, 2 + 1.2 * i)
    ax.add_patch(plt.Rectangle(square, 1.2, 1.2, fill=False))
ax.text(0.7, 1.5, "a", ha="center")
ax.text(3.6, 1.5, "out, in tiles", ha="center")
ax.text(3.6, 8.6, "b, transposed", ha="center")
ax.set(xlim=(-0.2, 5.6), ylim=(1.2, 9), aspect="equal")
ax.axis("off")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 3.6.2. A block owns a tile of `out`. It needs the rows of `a`, and of
# `b`, drawn as columns, that meet in its tile.*
#
# Global memory is read by fours too. And the threads no longer wait for it:
# while a block multiplies one tile, the loads of the next are under way.
# Their numbers arrive in registers, four or eight for each factor, and go to
# a second pair of tiles in shared memory. The two pairs take turns, and one
# barrier a tile is enough: whoever passes it knows that the tile to come is
# written and that nobody reads the one before any more.


# %% fetch the next tile tags=["exporti"]
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


# %% put it into shared memory tags=["exporti"]
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


# %% by fours tags=["exporti"]
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


# %% version 4 tags=["exporti"]
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


# %% one step of the sum, by fours
def one_step(out, left, right):
    p = cuda.local.array(8, np.float32)
    q = cuda.local.array(8, np.float32)
    y, x = cuda.threadIdx.x // 2 * 4, cuda.threadIdx.x % 2 * 4
    _take(p, left, y, 8)
    _take(q, right, x, 8)
    for i in range(8):
        r = y + i % 4 + i // 4 * 8
        for n in (0, 4):
            v = p[i] * q[n], p[i] * q[n + 1], p[i] * q[n + 2], p[i] * q[n + 3]
            store4(out, 16 * r + x + 2 * n, *v)


fig, ax = plt.subplots(figsize=(2.6, 2.6), dpi=100)
draw_owners(ax, np.tile([[0, 1], [2, 3]], (2, 2)).tolist())
fig.tight_layout()
plt.show()
left, right = (np.arange(16, dtype=np.float32) % n + 1 for n in (4, 5))
args = np.zeros((16, 16), np.float32), left, right
steps = walk("one step", one_step, 1, 4, args)
moving("threads", "one step of a sum, by fours", walks=[steps], wrap=16)

# %% [markdown]
# *Figure 3.6.3. One step of a sum in a tile of 16 by 16, in pieces of 4 by 4
# outputs, each with the number of its thread: a thread has four pieces, 8 by 8
# outputs in all. It takes two fours of `left` and two of `right`, its
# neighbour the fours beside. A tile of 64 has 8 by 8 such threads.*
#
# Four numbers at once must begin at a multiple of 16 bytes, so every row
# that is read or written by fours must be a multiple of four numbers long,
# and the arrays must begin at such a place. GPT-2's do; otherwise version 4
# calls version 3.


# %% version 4, launched tags=["exporti"]
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


# %% version 4, checked and counted
check_product(vectors, 12, 68, 20)
count("4", vectors)

# %% the ladder, counted
print("version  bytes an FMA  sectors  requests, shared  passes  barriers")
for name, seen in counted.items():
    each = seen.read_bytes / 64**2 / 16
    print(f"{name:>7}{each:14.3f}{seen.sectors:9}", end="")
    print(f"{seen.shared_requests:18}{seen.shared_passes:8}", end="")
    print(f"{seen.barriers // 32:10}")

# %% [markdown]
# From version 3 to 4 the bytes stay and the instructions go: four loads
# from shared memory stand in front of 64 FMAs, where there were sixteen.
# The passes stay too, for one pass serves eight lanes of a load of four
# numbers. The words are no cheaper; fewer instructions ask for them.
# Barriers are counted by warps: one for a tile instead of two.
#
# A test compiles version 4 for an A100 and an H100: with the tile of 128 a
# thread takes at most 128 registers, 64 of them sums, so that two blocks of
# 256 threads fit into the 65,536 of a multiprocessor. Nothing is spilled, and
# no array is in memory.
#
# ## The gradient of the bias
#
# (1.7.4) is a sum for each column. A thread a column reads whole sectors, for
# neighbours read neighbours. But 2,304 columns make 72 warps, and one
# multiprocessor alone may hold 64. So the rows are cut into chunks of 64. A
# first kernel gives each chunk and column a thread and writes its sum to
# `work`; a second adds these up, chunk by chunk. Atomic additions would save
# the second kernel, and add in whatever order the threads come. With two
# kernels the order is fixed, and so is every bit.


# %% add up the columns tags=["exporti"]
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


# %% how much scratch memory tags=["export"]
def matmul_scratch(rows, OC):
    """How many floats of scratch memory matmul_backward wants.

    rows: B * T.
    """
    return -(-rows // CHUNK) * OC


# %% the bias's gradient tags=["exporti"]
def bias_gradient(dbias, dout, add, work):
    """Sum the rows of dout; work: of `matmul_scratch`."""
    dout = as_rows(dout)
    across, chunks = -(-dbias.size // 128), -(-len(dout) // CHUNK)
    _sum_chunks[(across, chunks), 128](work, dout)
    add_chunks[across, 128](dbias, work, chunks, int(add))


# %% [markdown]
# ## The layer
#
# The public functions check what they are given before they launch
# anything. Scratch memory is needed for the bias's gradient alone.


# %% the layer on a GPU, forward tags=["export"]
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
    """
    y, x = as_rows(out), as_rows(inp)
    start = None if residual is None else as_rows(residual)
    version(Product(y, x, weight, True, True, start, bias))


# %% the layer on a GPU, backward tags=["export"]
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


# %% the ladder tags=["export"] module="bench.rungs_matmul"
def _by(layer, version):
    """The layer by a version of the product, under that version's name."""

    def by(*arguments, **options):
        layer(*arguments, version=version, **options)

    by.__name__ = version.__name__
    return by


_VERSIONS = thread_an_output, square_tiles, register_tiles
MATMUL_FORWARD = tuple(_by(matmul_forward, f) for f in _VERSIONS)
MATMUL_BACKWARD = tuple(_by(matmul_backward, f) for f in _VERSIONS)

# %% [markdown]
# The verdict, layer against layer, for every version:

# %% the same results from a GPU's kernels
B, T, C, OC = 1, 70, 8, 68
draw = np.random.default_rng(5)
x, w, b, dy = (
    draw.normal(size=shape).astype(np.float32)
    for shape in ((B, T, C), (OC, C), (OC,), (B, T, OC))
)
want = [np.zeros_like(z) for z in (dy, x, w, b)]
reference.matmul_forward(want[0], x, w, b, dy)  # any residual will do
for _ in range(2):  # the second time added
    reference.matmul_backward(*want[1:], dy, x, w)
versions = zip(
    (*MATMUL_FORWARD, matmul_forward),
    (*MATMUL_BACKWARD, matmul_backward),
    strict=True,
)
for number, (forward, backward) in enumerate(versions, 1):
    there = [to_device(z) for z in (x, w, b, dy)]
    y, dx, dw, db = (empty(z.shape) for z in want)
    forward(y, *there)
    backward(dx, dw, db, there[3], *there[:2], False, False)
    backward(dx, dw, db, there[3], *there[:2])
    for name, got, right in zip(
        ("out", "dinp", "dweight", "dbias"), (y, dx, dw, db), want, strict=True
    ):
        compare(f"{number}, {name}", to_host(got), right, tol=1e-5)

# %% [markdown]
# ## Take away
#
# - A GPU uses a number again in two places, as the CPU does: a block shares
#   a tile in its memory, and a thread keeps 8 by 8 sums in registers, 64
#   FMAs for four loads of four numbers.
# - Operations a byte say how large a tile must be, multiprocessors how large
#   it may be.
# - Padding spreads the lanes of a warp over the banks; fours in two halves do
#   the same for vectors.
# - While one tile is multiplied, the next is on its way.

# %% [markdown]
# ## Design note
#
# We cut the output only. Where the output is small and the sum long, as for the
# weight's gradient of a narrow layer, several blocks could share the sum of one
# tile, and a second kernel add up their parts, as for the bias. That fills a
# GPU that would be partly idle, takes memory for the parts, and makes the order
# of the sum depend on the number of parts.

# %% [markdown]
# ## Exercises
#
# **1** (★★). Tiles of R by S outputs: how many numbers does a GPU's product
# read from global memory? Compare with what the simulator counted for
# versions 2 and 3. How many operations for a byte does a tile of 128 by 64
# do, and would that suffice for an H100, were there no caches?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# There are $N \cdot OC / (R S)$ tiles, rounded up each way, and each reads
# R rows and S columns of C numbers: $N\,C \cdot OC\,(1/R + 1/S)$ numbers.
# At four bytes a number and two operations for each of $N\,C \cdot OC$
# FMAs that is $1 / (2/R + 2/S)$ operations a byte: 21.3 for 128 by 64, just
# more than the 20 of an H100. A square of the same area, 90.5, would make 22.6.
# :::


# %% exercise 1, numbers read tags=["hide-cell"]
def numbers_read(N, C, OC, R, S):
    tiles = -(-N // R) * -(-OC // S)
    return tiles * (R + S) * C


# %% exercise 1, checked
for version, side in (("2", 16), ("3", 64)):
    same = numbers_read(64, 16, 64, side, side) == counted[version].reads
    verdict(f"version {version}", same, "as counted")
per_byte = 2 * 128 * 64 * 16 / (4 * numbers_read(128, 16, 64, 128, 64))
verdict("128 by 64", 21 < per_byte < 22, "21.3 a byte")

# %% [markdown]
# ## Further reading
#
# - Boehm (2022),
#   [How to Optimize a CUDA Matmul Kernel](https://siboehm.com/articles/22/CUDA-MMM):
#   the same climb on a GPU, with times.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("3.6")
