# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       cpu.matmul: "The linear layer, compiled for the processor's cores."
# ---

# %% [markdown]
# # Products: a ladder to the machine's limit
#
# > From a triple loop to a product near the speed of a library written in
# > assembly, one rung at a time, and what each rung bought.
#
# *Reading time: 28 minutes. You need: the three products of the linear layer
# ([chapter 1.7](../1_by_hand/07_matmul.ipynb)) and compiled kernels
# ([chapter 2.1](01_compile.ipynb)).*

# %% [markdown]
# ## Where we are
#
# Nearly all of GPT-2's arithmetic is the three products of the linear layer.
# NumPy hands `@` to a BLAS, a library of hand-tuned linear algebra, most of
# it written in assembly. We write our own product and mean to reach it, for
# three reasons. A BLAS has its own threads, which compete with numba's for
# the same cores. It promises nothing about the order of its sums: with
# another number of threads, or another version, the last digits change. And
# it stops at the product: bias, residual and the sum over batches then cost
# a pass over memory each. At the end of this chapter you can
#
# - climb from a triple loop to that speed, and name what each rung bought;
# - place the blocks of a product in the caches of a processor;
# - measure the peak of a machine and say how far a product is from it;
# - tell from a layer's shapes whether memory or arithmetic sets its speed.

# %% [markdown]
# ## Setup

# %% setup
import os
import subprocess
import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numba
import numpy as np

from llmnb import reference
from llmnb.book.diagram import PALETTE
from llmnb.book.moving import moving
from llmnb.book.verify import compare, verdict
from llmnb.cpu.jit import inner
from llmnb.timing import fastest, machine

rng = np.random.default_rng(5)

# %% [markdown]
# ## The ladder
#
# We climb on the product of GPT-2's largest inner layer, 256 tokens of 768
# channels to 3072. Every rung is checked and timed, all but the last on one
# thread; a product of $N$ by $C$ by $OC$ takes $2 N C \cdot OC$ operations, one
# multiplication and one addition a term.

# %% the problem of the ladder
N, C, OC = 256, 768, 3072
a = rng.normal(size=(N, C)).astype(np.float32)
w = rng.normal(size=(OC, C)).astype(np.float32)
want = a @ w.T
speeds = {}


def climb(name, multiply, runs):
    got = np.zeros((N, OC), np.float32)
    multiply(got, a, w)
    compare(name, got, want)
    seconds = fastest(multiply, got, a, w, runs=runs)
    speeds[name] = 2 * N * C * OC / seconds / 1e9


# %% [markdown]
# **The wrong order.** Three loops can be nested in six orders, and (1.7.1)
# does not say which. Suppose the innermost one walks over output channels.
# Then each step reads the weight C places further on, and of the 64 bytes
# that memory delivers at a time (a cache line), it uses four.


# %% rung 1, innermost over output channels
@inner
def wrong_order(out, a, w):
    out[...] = 0
    for n in range(out.shape[0]):
        for c in range(a.shape[1]):
            for o in range(out.shape[1]):
                out[n, o] += a[n, c] * w[o, c]


climb("wrong order", wrong_order, runs=1)


# %% [markdown]
# **The right order.** Innermost over input channels, both factors run along
# memory and the sum stays in a register. A vector register of AVX2 holds 8
# numbers of float32, and one instruction, the *fused multiply-add* or FMA,
# multiplies 8 pairs and adds them to 8 running sums. LLVM may use it because
# `fastmath` lets it split one sum into 8 that are added at the end.


# %% rung 2, innermost over input channels
@inner
def right_order(out, a, w):
    for n in range(out.shape[0]):
        for o in range(out.shape[1]):
            total = out.dtype.type(0)
            for c in range(a.shape[1]):
                total += a[n, c] * w[o, c]
            out[n, o] = total


climb("right order", right_order, runs=5)

# %% [markdown]
# **Tiles.** Each FMA of rung 2 needs two loads, and a core can do about as
# many loads as FMAs in a cycle. So it waits for data, even when they are in
# its nearest cache. Take three tokens and three output channels together:
# six loads bring what nine FMAs need. The nine running sums do not depend
# on one another, which matters as much: an FMA takes about four cycles to
# deliver, so one sum alone would leave the unit idle most of the time.

# %% the picture of a tile
fig, axes = plt.subplots(1, 2, figsize=(8, 3.1), dpi=100)
for ax, size in zip(axes, (1, 3), strict=True):
    for i in range(size):
        y = 2 - i
        ax.add_patch(plt.Rectangle((0, y), 2.6, 0.8, color=PALETTE["blue"]))
        x = 3.2 + i
        ax.add_patch(plt.Rectangle((x, 3.4), 0.8, 1.9, color=PALETTE["green"]))
        for j in range(size):
            cell = (3.2 + j, y)
            orange = PALETTE["orange"]
            ax.add_patch(plt.Rectangle(cell, 0.8, 0.8, color=orange))
    ax.text(1.3, 3.0, "inp", ha="center", color=PALETTE["blue"])
    right, middle = 3.2 + size, 2.9 - size / 2
    ax.text(right, 4.3, "weight", ha="left", color=PALETTE["green"])
    ax.text(right, middle, "sums", va="center", color=PALETTE["orange"])
    title = f"{2 * size} loads for {size**2} FMA" + "s" * (size > 1)
    ax.set(xlim=(-0.2, 8.2), ylim=(-0.2, 5.6), title=title, aspect="equal")
    ax.axis("off")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 2.4.1. A tile of one sum loads two vectors for each FMA; a tile of
# three by three loads six vectors for nine.*


# %% rung 3, nine sums at once
@inner
def nine_sums(out, i, j, a0, a1, a2, b0, b1, b2):
    s00 = s01 = s02 = s10 = s11 = s12 = s20 = s21 = s22 = out.dtype.type(0)
    for k in range(a0.size):
        s00 += a0[k] * b0[k]
        s01 += a0[k] * b1[k]
        s02 += a0[k] * b2[k]
        s10 += a1[k] * b0[k]
        s11 += a1[k] * b1[k]
        s12 += a1[k] * b2[k]
        s20 += a2[k] * b0[k]
        s21 += a2[k] * b1[k]
        s22 += a2[k] * b2[k]
    out[i, j], out[i, j + 1], out[i, j + 2] = s00, s01, s02
    out[i + 1, j], out[i + 1, j + 1], out[i + 1, j + 2] = s10, s11, s12
    out[i + 2, j], out[i + 2, j + 1], out[i + 2, j + 2] = s20, s21, s22


# %% rung 3, all tiles
@inner
def tiled(out, a, w):
    rows, cols = out.shape
    for r in range(0, rows, 3):
        for c in range(0, cols, 3):
            i, j = min(r, rows - 3), min(c, cols - 3)  # the last may overlap
            x, y = a[i : i + 3], w[j : j + 3]
            nine_sums(out, i, j, x[0], x[1], x[2], y[0], y[1], y[2])


climb("tiles", tiled, runs=5)

# %% [markdown]
# **Packing.** Rung 3 reads the whole weight, 9.4 MB, once for every three
# tokens, more than the second-level cache of a core holds. And it only
# works because both factors happen to run along memory. The two products of
# the backward pass, (1.7.2) and (1.7.3), sum down the rows of a matrix.
#
# Tuned libraries first copy a block of each factor into a buffer, in the
# order in which the innermost loop will read it. Figure 2.4.2 shows that
# order. A *panel* holds a few rows of `a`, or a few columns of `b`, and
# lists them step by step along the sum: all numbers of step 0, then all of
# step 1, and so on. Every load is then the next one in memory, whatever the
# strides of the matrix were, and one inner loop serves all three products.

# %% the picture of a panel
fig, axes = plt.subplots(1, 2, figsize=(8, 2.6), dpi=100)
order = np.arange(24).reshape(6, 4).T
for ax, numbers, title in (
    (axes[0], np.arange(24).reshape(4, 6), "four rows as they lie"),
    (axes[1], order, "the same rows in a panel"),
):
    ax.imshow(numbers, cmap="Blues", vmin=-6, vmax=34)
    for (i, k), value in np.ndenumerate(numbers):
        ax.text(k, i, value, ha="center", va="center", size=9,
                color="black")  # fmt: skip
    ax.set(title=title, xlabel="step of the sum", xticks=[], yticks=[])
axes[0].set_ylabel("row")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 2.4.2. The numbers give the order in memory. On the left a row is in
# one piece; on the right the four numbers that one step of the sum needs
# lie side by side.*
#
# With panels the tile can be larger in one direction than a vector: the
# inner loop takes vectors along the columns, and multiplies them with
# single numbers from the rows. Here is the inner loop as plain loops, for 6
# rows and 16 columns, and the two factors packed whole by NumPy.


# %% rung 4, the inner loop on panels
@inner
def panel_tile(tile, a, b, depth):
    tile[...] = 0
    for k in range(depth):
        for i in range(6):
            x = a[k, i]
            for j in range(16):
                tile[i, j] += x * b[k, j]


@inner
def on_panels(out, a, b):
    rows, cols = out.shape
    tile = np.empty((6, 16), out.dtype)
    for j in range(cols // 16):
        for p in range(a.shape[0]):
            panel_tile(tile, a[p], b[j], a.shape[1])
            for i in range(min(6, rows - 6 * p)):
                out[6 * p + i, 16 * j : 16 * j + 16] = tile[i]


# %% rung 4, packed by NumPy
def packed(out, a, w):
    padded = np.zeros((-(-len(a) // 6) * 6, a.shape[1]), a.dtype)
    padded[: len(a)] = a
    left = padded.reshape(-1, 6, a.shape[1]).transpose(0, 2, 1)
    right = w.reshape(-1, 16, w.shape[1]).transpose(0, 2, 1)
    on_panels(out, np.ascontiguousarray(left), np.ascontiguousarray(right))


climb("packed", packed, runs=3)

# %% [markdown]
# **Vectors by hand.** The order is right now, but LLVM keeps the 96 sums in
# memory. `tile` is an array, and an array has an address: as far as LLVM can
# tell, writing `tile[i, j]` might change `a` or `b`, so it writes every sum
# back in every step. It would have to unroll two loops, 96 sums, before it
# could see that twelve registers of 8 would hold them, and it gives up before.
#
# So for this one loop we do not leave the choice to it. In a language with
# vectors for numbers, the inner loop would read
#
#     twelve vectors of sums, s[0..5][0..1], all zero
#     for k in range(depth):
#         y0, y1 = b[k, 0:8], b[k, 8:16]          two loads
#         for i in range(6):                      unrolled
#             x = a[k, i], eight times            one load
#             s[i][0] += x * y0                   one FMA
#             s[i][1] += x * y1                   one FMA
#     out = start + bias + s
#
# Twelve registers for the sums, two for `y0` and `y1`, one for `x`: 15 of the
# 16 that AVX2 has. LLVM's own language has such vectors, and numba lets a
# function write it. [Chapter A.2](../appendix/02_tile.ipynb) does, with a tile
# for each kind of processor; what it leaves is `multiply_tile`, this loop with
# a bias and something to start from added on the way out.
#
# **Blocks.** The panels must stay in a cache while they are used. There are
# three levels of caches, each larger and slower than the one before. Figure
# 2.4.3 places the parts of a product in them.

# %% draw the blocks in the caches
fig, ax = plt.subplots(figsize=(8, 3.4), dpi=100)
blocks = (
    ((0.0, 4.4), (6.4, 2.2), "pale"),
    ((0.0, 4.4), (0.5, 2.2), "green"),
    ((-2.9, 0.3), (2.2, 3.4), "blue"),
    ((-2.9, 3.2), (2.2, 0.5), "orange"),
    ((0.0, 0.3), (6.4, 3.4), None),
    ((0.0, 3.2), (0.5, 0.5), "purple"),
)
for corner, (wide, high), shade in blocks:
    color = {"color": PALETTE[shade]} if shade else {"fill": False}
    ax.add_patch(plt.Rectangle(corner, wide, high, **color))
notes = (
    (6.6, 6.1, "a block of b, 2.4 MB: third level"),
    (6.6, 5.1, "half a panel of it, 24 KB: first level"),
    (6.6, 3.4, "the tile of sums: registers"),
    (6.6, 2.2, "all panels of a, 811 KB: second level"),
    (6.6, 1.0, "one line of a panel at a time: registers"),
)
for x, y, text in notes:
    ax.text(x, y, text, va="center", size=9)
ax.text(-1.8, 1.7, "a", ha="center", color="white", size=12)
ax.text(3.2, 5.5, "b", ha="center", size=12)
ax.text(3.2, 1.7, "out", ha="center", size=12)
ax.set(xlim=(-3.2, 13.5), ylim=(0, 6.9), aspect="equal")
ax.axis("off")
fig.tight_layout()
plt.show()
moving("tiles", "a block of the product, tile by tile", rows=4, columns=6)

# %% [markdown]
# *Figure 2.4.3. A tile of `out` needs one panel of rows (orange) and one of
# columns (green), one half after the other. The half of the columns stays in
# the first level while a tile of rows passes by; the panels of rows stay in the
# second level while all columns of the block, which wait in the third, do.*
#
# In float32, with a tile 16 columns wide: panels are 768 steps long, those of
# `a` take at most 264 rows, 811 KB, those of `b` at most 768 columns, 2.4 MB.
# 768 steps are two chains of 384, and of a panel of columns each takes 24 KB. A
# tile of `out` takes in the sums of both while it is in the first level; one
# that came back for the second chain would have to be fetched again.
# [Chapter A.3](../appendix/03_panels.ipynb) packs such blocks from matrices that
# lie either way, with vectors where it can, and multiplies all tiles of a block.
# From here on we need two of its functions: `pack` writes the panels of a block,
# and `multiply_rows` multiplies a packed block of rows with columns. It packs
# these a panel at a time, just before they are needed, and asks memory for the
# next while it multiplies.
#
# ## The product
#
# **Threads.** `out` is cut into strips of whole tiles, one for each thread, along
# the side that leaves the largest strip the least, and along the longer one where
# both leave the same. (With AVX-512's tile of 8 x 48, two threads would get 96 and 32
# of 128 columns, but 64 each of 128 rows.)
# A thread packs in its own row of `work`. The strips depend on
# the number of threads, but no sum does: every number of `out` is summed in
# chains of 384 steps, one after the other, wherever the cuts are. So no bit of
# the result depends on it either.

# %% imports of the CPU module tags=["exporti"]
from llmnb.cpu.jit import arguments, inlined, team
from llmnb.cpu.microkernel import Place, moved, steps_per_line
from llmnb.cpu.panels import (
    HEIGHT, LENGTH, SPARE, WIDTH, WORK, Block, Flat, Routines, check_bf16,
    multiply_rows, pack, scratch,
)  # fmt: skip
from llmnb.cpu.tile import COLS, ROWS
from llmnb.shapes import shapes


# %% [markdown]
# A thread goes through its strip block by block: steps of the sum, then
# columns, then rows. `where` is the Place of the first block, how `out`, what
# there is to start from, and the bias lie (chapter A.2). The first block of the
# steps adds the latter two; the others go on from the sums so far, which are in
# `out`. Where there is nothing to add, a row of zeros in `spare` stands in,
# with steps of 0.


# %% a strip tags=["exporti"]
@inlined
def _multiply_strip(x, strip, where, steps, depth, code, panels, spare):
    """x: out, start, bias, a and b; strip: top, bottom, left and right.

    steps: from row to row and from column to column, of a and then of b.
    """
    out, start, bias, a, b = x
    top, bottom, left, right = strip
    a_row, a_col, b_row, b_col = steps
    zeros, per = ROWS * COLS, steps_per_line(panels)
    spare[zeros : zeros + COLS] = 0
    first = start if where.col else spare
    shift = bias if where.bias_col else spare
    several = bottom - top > HEIGHT
    width = WIDTH if several else right - left
    for k in range(0, depth, LENGTH):
        n = min(LENGTH, depth - k)
        apart = (n + per - 1) // per if several else 0
        if k > 0:
            first, shift = out, spare
        flat = Flat(out, first, shift, panels, spare)
        for j in range(left, right, width):
            p, cols = j * b_col + k * b_row, min(width, right - j)
            columns = Block(p, b_col, b_row, cols, n)
            for i in range(top, bottom, HEIGHT):
                rows, p = min(HEIGHT, bottom - i), i * a_row + k * a_col
                block = Block(p, a_row, a_col, rows, n)
                pack(code.pack_rows, panels, 0, a, block)
                at = moved(where, i, j)
                if k > 0:
                    o, line = at.out, at.out_row
                    at = Place(o, line, o, line, 1, zeros, 0)
                multiply_rows(
                    code, flat, at, rows, b, columns, apart, i == top
                )


# %% the kernel of all three products tags=["exporti"]
@team
def _multiply(part, parts, address):
    given = arguments(address)
    x, (sizes, where, steps, code, panels, work) = given[:5], given[5:]
    rows, cols, depth = sizes
    down = -(-rows // (parts * ROWS)) * ROWS
    across = -(-cols // (parts * COLS)) * COLS
    if (down * cols, cols) < (rows * across, rows):
        i, j, across = part * down, 0, cols
    else:
        i, j, down = 0, part * across, rows
    if i < rows and j < cols:  # else there are more threads than strips
        strip = i, min(rows, i + down), j, min(cols, j + across)
        _multiply_strip(
            x, strip, Place(*where), steps, depth, Routines(*code),
            panels[part], work[part, SPARE:],
        )  # fmt: skip


# %% [markdown]
# In Python remains to say how the matrices lie. A transposed matrix is the
# same memory with its two steps exchanged. The kernel gets plain tuples, which
# numba recognises soonest, and gives their places names.


# %% any product tags=["exporti"]
def as_flat(x):
    """A matrix, or the transpose of one, as a flat view and two steps."""
    row, col = (step // x.itemsize for step in x.strides)
    return (x if x.flags.c_contiguous else x.T).reshape(-1), row, col


def _product(out, a, b, start=None, bias=None, work=None, bf16=False):
    """out = start + bias + a @ b for matrices; the first two may be None."""
    if start is None and not a.shape[1]:  # no tokens, which no step has
        out[...] = 0
    made = scratch(work, bf16, out.dtype)
    sizes, zeros = (*out.shape, a.shape[1]), ROWS * COLS
    (a, *a_steps), (b, *b_steps) = map(as_flat, (a, b))
    out, line = out.reshape(-1), sizes[1]
    starts = (zeros, 0, 0) if start is None else (0, line, 1)
    shifts = (zeros, 0) if bias is None else (0, 1)
    start = out if start is None else start.reshape(-1)
    bias = out if bias is None else bias
    where, steps = (0, line, *starts, *shifts), (*a_steps, *b_steps)
    _multiply(out, start, bias, a, b, sizes, where, steps, *made)


# %% rung 5, vectors, and rung 6, threads
def by_vectors(out, a, w):
    cpu_product(out, a, w.T)


cpu_product = _product
most = numba.get_num_threads()
numba.set_num_threads(1)
climb("vectors", by_vectors, runs=10)
numba.set_num_threads(most)
climb("threads", by_vectors, runs=10)

# %% [markdown]
# ## How far is it to the top?
#
# We measure the peak: FMAs on registers alone, twelve chains of them so that no
# one waits for another, on every thread (`fma_peak`, from
# [chapter A.2](../appendix/02_tile.ipynb)). No product can be faster. As a
# second yardstick we time NumPy's product, in a process of its own, so that we
# can tell its BLAS how many threads to use and the two pools of threads do not
# meet.

# %% the yardsticks
from llmnb.bench.peak import fma_peak


def blas(threads, N=N, C=C, OC=OC):
    code = f"""if True:
        import numpy as np
        from llmnb.timing import fastest
        rng = np.random.default_rng(5)
        a = rng.normal(size=({N}, {C})).astype(np.float32)
        w = rng.normal(size=({OC}, {C})).astype(np.float32)
        out = a @ w.T
        print(fastest(np.matmul, a, w.T, out, runs=30))
    """
    names = "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"
    env = os.environ | dict.fromkeys(names, str(threads))
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=env, capture_output=True, check=True)
    return 2 * N * C * OC / float(run.stdout) / 1e9


# %% the ladder tags=["nbval-ignore-output"]
top = fma_peak() / 1e9
numba.set_num_threads(1)
top_one = fma_peak() / 1e9
numba.set_num_threads(most)
one, many = blas(1), blas(most)
print(f"{machine()}\n{'':12} GFLOP/s   on the rung before   share of peak")
before = None
for name, speed in speeds.items():
    gain = f"{speed / before:5.1f} times" if before else ""
    share = speed / (top if name == "threads" else top_one)
    print(f"{name:12} {speed:7.1f}   {gain:>18}   {share:13.0%}")
    before = speed
print(f"BLAS         {one:7.1f} on 1 thread, {many:.1f} on {most}")
print(f"FMA peak     {top_one:7.1f} on 1 thread, {top:.1f} on {most}")

# %% draw the ladder tags=["nbval-ignore-output"]
fig, ax = plt.subplots(figsize=(7, 3.6), dpi=100)
names = ["BLAS, 1 thread", f"BLAS, {most} threads"]
names = [*speeds, *names, "peak, 1 thread", f"peak, {most} threads"]
values = [*speeds.values(), one, many, top_one, top]
shades = [PALETTE["blue"]] * len(speeds) + [PALETTE["grey"]] * 4
ax.barh(names, values, color=shades)
for i, value in enumerate(values):
    ax.text(value, i, f" {value:.1f}", va="center")
ax.invert_yaxis()
ax.set(xlabel="GFLOP/s, more is better", xlim=(0, 1.15 * max(values)))
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 2.4.4. The right order and the tile each multiply the speed.
# Packing alone loses, because LLVM leaves the sums in memory; vectors by hand
# then bring numba to the speed of a library written in assembly, or past it.*
#
# ## The layer
#
# The public functions check their arguments and view (B, T, ·)
# as rows. Forward can add a `residual` in the same pass. Backward can
# overwrite instead of adding, so that nobody needs to clear the memory
# first. The gradient of the bias, (1.7.4), could be one more product, of a row
# of ones with `dout`, but a tile of one row leaves most of its registers
# idle. A plain loop over the rows of `dout` does one addition a number. It
# goes along strips of `STRIP` columns, whose sums stay in the first-level
# cache.


# %% add up the columns tags=["exporti"]
STRIP = 512


@team
def _sum_columns(part, parts, address):
    dbias, dout, add = arguments(address)
    rows, OC = dout.shape
    for t in range(part, -(-OC // STRIP), parts):
        total = dbias[t * STRIP : (t + 1) * STRIP]
        if not add:
            total[:] = 0
        for n in range(rows):
            row = dout[n, t * STRIP : (t + 1) * STRIP]
            for j in range(total.size):
                total[j] += row[j]


# %% the linear layer, forward tags=["export"]
@shapes("B T OC!, B T C, OC C, OC?, B T OC?~", work=WORK)
def matmul_forward(
    out, inp, weight, bias, residual=None, work=None, bf16=False
):
    """out = inp @ weight.T + bias + residual, in one pass.

    out, residual: (B, T, OC). inp: (B, T, C). weight: (OC, C). bias: (OC,).
    bias and residual may be None. All float32 or all float64 and
    C-contiguous; out is overwritten, and may be residual itself. work:
    scratch of work_shape() and the same dtype, or None to allocate it.
    bf16: round inp and weight to bfloat16, for float32 only. Raises
    TypeError or ValueError before it computes anything.
    """
    check_bf16("matmul_forward", bf16, inp.dtype)
    OC, C = weight.shape
    rows, out = inp.reshape(-1, C), out.reshape(-1, OC)
    _product(out, rows, weight.T, residual, bias, work, bf16)


# %% the linear layer, backward tags=["export"]
@shapes("B T C!, OC C!?, OC!?, B T OC, B T C, OC C", work=WORK)
def matmul_backward(
    dinp, dweight, dbias, dout, inp, weight,
    add_dinp=True, add_dweight=True, work=None, bf16=False,
):  # fmt: skip
    """Add the linear layer's gradients to dinp, dweight and dbias.

    dinp, inp: (B, T, C). dout: (B, T, OC). dweight, weight: (OC, C); the
    first may be None for a weight that does not learn. dbias: (OC,), or
    None for a layer without bias. All float32 or all float64 and
    C-contiguous. add_dinp, add_dweight: False overwrites dinp, or dweight
    and dbias, instead of adding. work, bf16: as in matmul_forward. Raises
    TypeError or ValueError before it computes anything.
    """
    check_bf16("matmul_backward", bf16, inp.dtype)
    rows, drows, dinp = (x.reshape(-1, x.shape[2]) for x in (inp, dout, dinp))
    start = dinp if add_dinp else None
    _product(dinp, drows, weight, start, None, work, bf16)
    if dweight is not None:
        start = dweight if add_dweight else None
        _product(dweight, drows.T, rows, start, None, work, bf16)
    if dbias is not None:
        _sum_columns(dbias, drows, add_dweight)


# %% [markdown]
# The verdict: the same results as chapter 1.7's functions in NumPy, in float64,
# and in float32 on sizes that divide nothing. All arrays begin as ones: `out` is
# its own residual, the gradients add in float64 and are written in float32.


# %% a problem of any size
def problem(B, T, C, OC, dtype=np.float32):
    p = SimpleNamespace()
    p.inp = rng.normal(size=(B, T, C)).astype(dtype)
    p.dout = rng.normal(size=(B, T, OC)).astype(dtype)
    p.weight = rng.normal(size=(OC, C)).astype(dtype)
    p.bias = rng.normal(size=OC).astype(dtype)
    p.out = np.zeros_like(p.dout)
    p.dinp, p.dweight, p.dbias = map(np.zeros_like, (p.inp, p.weight, p.bias))
    return p


# %% both layers, all results
outputs = "out", "dinp", "dweight", "dbias"
cpu = SimpleNamespace(
    matmul_forward=matmul_forward, matmul_backward=matmul_backward
)


def results(p, layer, add=False):
    for name in outputs:
        getattr(p, name)[...] = 1
    layer.matmul_forward(p.out, p.inp, p.weight, p.bias, p.out)
    grads = p.dinp, p.dweight, p.dbias
    layer.matmul_backward(*grads, p.dout, p.inp, p.weight, add, add)
    return {name: getattr(p, name).copy() for name in outputs}


for dtype, tol, add in ((np.float64, 1e-12, True), (np.float32, 2e-6, False)):
    p = problem(3, 37, 51, 331, dtype)
    got, expected = results(p, cpu, add), results(p, reference, add)
    for name in outputs:
        label = f"{name}, {np.dtype(dtype).name}"
        compare(label, got[name], expected[name], tol=tol)

# %% one thread and several, bit for bit
numba.set_num_threads(1)
alone = results(p, cpu)
numba.set_num_threads(most)
same = all(np.array_equal(alone[name], got[name]) for name in outputs)
verdict("threads", same, "change no bit")

# %% [markdown]
# All three products of the large layer, in the same units. The backward
# pass has two of them, and the sum over the rows for the bias. And two larger
# products, forward: the same layer for one sequence of 1024 tokens, and a
# square one. Times on a machine that does other things differ by a few parts
# in a hundred from run to run, and more where its clock follows its heat: so
# the same product may stand in this chapter with two speeds.

# %% the layer, measured tags=["nbval-ignore-output"]
from llmnb.cpu.panels import work_shape

p = problem(1, N, C, OC)
work = np.empty(work_shape(), np.float32)


def timed(function, *args):
    return fastest(lambda: function(*args, work=work), runs=10)


forward = timed(matmul_forward, p.out, p.inp, p.weight, p.bias)
both = p.dinp, p.dweight, p.dbias, p.dout, p.inp, p.weight
measured = forward, timed(matmul_backward, *both)
print(f"{machine()}, {most} threads")
for name, s, products in zip(
    ("forward", "backward"), measured, (1, 2), strict=True
):
    speed = products * 2 * N * C * OC / s / 1e9
    print(f"{name:<9}{speed:6.1f} GFLOP/s, {speed / top:.0%} of peak", end="")
    print(f", {speed / many:.0%} of BLAS")

# %% larger products tags=["nbval-ignore-output"]
for N, C, OC in ((1024, 768, 3072), (2048, 2048, 2048)):
    p = problem(1, N, C, OC)
    seconds = timed(matmul_forward, p.out, p.inp, p.weight, p.bias)
    speed = 2 * N * C * OC / seconds / 1e9
    print(f"{N} x {C} x {OC}: {speed:.0f} GFLOP/s, {speed / top:.0%}", end="")
    print(f" of peak, {speed / blas(most, N, C, OC):.0%} of BLAS")

# %% [markdown]
# ## Memory or arithmetic?
#
# A product of $N$ by $C$ by $OC$ reads or writes three matrices, four bytes a
# number, if each is read or written once. The quotient of its operations and
# its bytes is the *arithmetic intensity*, in operations a byte:
#
# $$ \begin{aligned}
#    I &= \frac{2 N C \cdot OC}{4\,(N C + C \cdot OC + N \cdot OC)} \\
#      &= \frac{1}{2}\,
#         \frac{1}{\tfrac{1}{OC} + \tfrac{1}{N} + \tfrac{1}{C}} .
#    \end{aligned} \tag{2.4.1} $$
#
# The smallest of the three sizes decides. In training $N$ is the number
# of tokens in a batch; when the model writes text it is 1.

# %% the intensity of GPT-2's layers
layers = {
    "q, k, v": (768, 2304),
    "projection": (768, 768),
    "up to 4C": (768, 3072),
    "down to C": (3072, 768),
    "logits": (768, 50304),
}


def intensity(N, C, OC):
    return 0.5 / (1 / OC + 1 / N + 1 / C)


print(f"{'':12}{'C':>6}{'OC':>7}{'I, N=256':>10}{'N=1':>6}")
for name, (C, OC) in layers.items():
    high, low = intensity(256, C, OC), intensity(1, C, OC)
    print(f"{name:12}{C:6}{OC:7}{high:10.0f}{low:6.1f}")

# %% [markdown]
# A machine has an intensity too: its operations a second divided by the
# bytes its memory delivers in that time. A layer with less than that waits
# for memory; a layer with more waits for arithmetic. The smaller of the two
# limits, drawn over the intensity, is called the *roofline*.

# %% measure both sides of the roof tags=["nbval-ignore-output"]
source, target = np.ones((2, 1 << 25), np.float32)
bandwidth = 2 * source.nbytes / fastest(np.copyto, target, source, runs=5)
points = {}
for n in (1, 4, 16, 64, 256):
    p = problem(1, n, 768, 3072)
    seconds = timed(matmul_forward, p.out, p.inp, p.weight, p.bias)
    points[n] = intensity(n, 768, 3072), 2 * n * 768 * 3072 / seconds / 1e9
print(f"copy {bandwidth / 1e9:.1f} GB/s, peak {top:.0f} GFLOP/s")
for n, (i, speed) in points.items():
    roof = min(top, i * bandwidth / 1e9)
    print(f"N = {n:3}: I = {i:5.1f}, roof {roof:6.1f}, measured {speed:6.1f}")

# %% draw the roofline tags=["nbval-ignore-output"]
fig, ax = plt.subplots(figsize=(7, 3.8), dpi=100)
i = np.geomspace(0.25, 512, 100)
roof = np.minimum(top, i * bandwidth / 1e9)
ax.loglog(i, roof, color=PALETTE["ink"], label="roof: copy and FMA peak")
xs, ys = zip(*points.values(), strict=True)
ax.plot(xs, ys, "o", color=PALETTE["orange"], label="forward, measured")
for n, (x, y) in points.items():
    above = y > np.interp(x, i, roof)  # keep the label off the line
    side, shift = ("right", (-6, 6)) if above else ("left", (6, -12))
    ax.annotate(f"N={n}", (x, y), shift, textcoords="offset points", ha=side)
ax.set(xlabel="FLOP a byte", ylabel="GFLOP/s", xticks=[1, 10, 100])
ax.set_yticks([1, 10, 100])
ax.xaxis.set_major_formatter("{x:g}")
ax.yaxis.set_major_formatter("{x:g}")
ax.tick_params(which="minor", labelleft=False, labelbottom=False)
ax.legend(loc="lower right", frameon=False)
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()
moving(
    "roofline", "the roof of any machine, for any number of tokens",
    copy=round(bandwidth / 1e9, 1), peak=round(top), measured="up to 4C",
    rows=[2**k for k in range(11)],
    layers=[[name, *size] for name, size in layers.items()],
    points=[[n, round(i, 1), round(v, 1)] for n, (i, v) in points.items()],
)  # fmt: skip

# %% [markdown]
# *Figure 2.4.5. A roofline, and the product up to 4C as measured under it. The
# slope is what memory can feed: its bytes a second times the operations for
# each. The flat part is what the arithmetic units can do. With one token the
# product lies at the left end, where memory is the limit: every weight is read
# for a single multiplication. With the tokens of a batch it lies under the
# flat part, where arithmetic is.*
#
# A point may lie over the slope: the copy goes to main memory, while a
# weight of 9.4 MB may stay in the last-level cache from one run to the
# next.

# %% [markdown]
# ## Take away
#
# - Speed comes from using a loaded number several times: twelve FMAs for
#   eight loads in registers, a panel for 264 rows in the nearest cache.
# - Memory is slow to answer, so ask early: what is packed next comes while
#   what is packed already is multiplied.
# - Packing puts the numbers in the order in which they are read, and makes
#   one inner loop of three products.
# - The sums run in one order for any number of threads.
# - The smallest size of a product says whether memory or arithmetic is its
#   limit.

# %% [markdown]
# ## Design note
#
# What is not fused: GELU. It could be applied on the way out of the registers
# too. [Chapter 2.8](08_time.ipynb) shows what share of a step it takes, and
# most of that is arithmetic, which fusing would not save.

# %% [markdown]
# ## Exercises
#
# **1** (★★★). An AVX2 unit splits a sum into 8 sums that are added at
# the end. Does that make the result better or worse? Add $2^{20}$ float32
# numbers between 0 and 1 one after the other, then in 8 lanes, and compare
# both errors, on the average of a few draws.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# Better. A rounding error is proportional to the running sum at that
# moment. Each of 8 lanes grows to an eighth of the total, so each addition
# rounds more finely. Summing in order is among the worst ways to add.
# :::


# %% exercise 1, both sums tags=["hide-cell"]
def sum_errors(x):
    exact = x.astype(np.float64).sum()
    serial = np.cumsum(x, dtype=np.float32)[-1]
    lanes = np.cumsum(x.reshape(-1, 8), axis=0, dtype=np.float32)[-1]
    eight = np.cumsum(lanes, dtype=np.float32)[-1]
    return abs(serial - exact), abs(eight - exact)


# %% exercise 1, checked
errors = [sum_errors(rng.random(1 << 20).astype("f4")) for _ in range(4)]
serial, eight = np.mean(errors, axis=0)  # of one draw luck may decide
verdict("8 lanes", eight < serial, "err less than one sum")

# %% [markdown]
# **2** (★). On a machine of 20 operations a byte, from how many tokens on does
# the layer of 768 to 3072 channels wait for arithmetic? Solve (2.4.1) for $N$.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# $\tfrac{1}{N} = \tfrac{1}{2 I} - \tfrac{1}{C} - \tfrac{1}{OC}$, with $I = 20$
# and $\tfrac{1}{768} + \tfrac{1}{3072} = \tfrac{5}{3072}$: $N = 42.8$, so from
# 43 tokens on.
# :::


# %% exercise 2, the tokens tags=["hide-cell"]
def tokens_for(rate, C, OC):
    return 1 / (1 / (2 * rate) - 1 / C - 1 / OC)


# %% exercise 2, checked
tokens = tokens_for(20, 768, 3072)
verdict("42.8 tokens", abs(tokens - 42.8) < 0.05, "are where it turns")
verdict("there", abs(intensity(tokens, 768, 3072) - 20) < 1e-9, "20 a byte")

# %% [markdown]
# ## Further reading
#
# - Goto and van de Geijn (2008),
#   [Anatomy of High-Performance Matrix Multiplication](https://doi.org/10.1145/1356052.1356053):
#   sections 4 and 5, which operand to keep in which cache, and why.
# - Williams, Waterman and Patterson (2009),
#   [Roofline](https://doi.org/10.1145/1498765.1498785): the picture of
#   figure 2.4.5 and how to read it.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("2.4")
