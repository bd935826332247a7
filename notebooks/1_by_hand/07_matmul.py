# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       reference.matmul: "The linear layer in NumPy, forward and backward."
#       cpu.tile: "The innermost tile of a matrix product, in LLVM's vector instructions."
#       cpu.panels: "Matrices packed in panels, and their products tile by tile."
#       cpu.matmul: "The linear layer, compiled for the processor's cores."
#       bench.peak: "The multiply-add rate that this processor can reach."
#       cuda.matmul: "The linear layer on a GPU, by our own kernels."
#       cuda.cublas: "The linear layer on a GPU, by cuBLASLt."
# ---

# %% [markdown]
# # Multiply by a weight matrix and differentiate it
#
# > The linear layer is one matrix product forward and two backward; nearly
# > all of GPT-2's arithmetic happens in these three.

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="matmul")

# %% [markdown]
# *Figure 1.7.1. The linear layer stands four times in every block and once
# before the loss, where it turns a vector into one score for each token of
# the vocabulary.*
#
# A linear layer mixes channels: every output channel is a weighted sum of
# all input channels. The weights are what the model learns, and here lie
# most of them. This chapter builds `matmul_forward` and `matmul_backward`,
# with and without a bias. At its end you can
#
# - derive the three products of training and check each by its shapes;
# - say what the layer saves for its backward pass, and why that is nothing;
# - climb from a triple loop to a product near the speed of a library written
#   in assembly, and name what each rung bought;
# - measure the peak of a machine and say how far a product is from it;
# - give each thread of a GPU its part of a product, and count what each of
#   four versions reads from global and from shared memory;
# - tell from a layer's shapes whether memory or arithmetic sets its speed.
#
# You need central differences from [chapter 1.4](04_gpt2.ipynb), the
# decorators `kernel` and `inner` from [chapter 1.5](05_encoder.ipynb), the
# threads, warps and simulator of [chapter 3.1](../3_gpu/01_threads.ipynb), and the way a
# layer is laid out in [chapter 1.6](06_layernorm.ipynb).

# %% [markdown]
# ## Setup

# %% setup
import os
import subprocess
import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np

from llmnb.book.diagram import PALETTE
from llmnb.timing import fastest, machine
from llmnb.book.verify import compare, numerical_gradient, verdict

rng = np.random.default_rng(5)

# %% [markdown]
# ## By hand
#
# Take one token with three channels, $x = (1, 2, 3)$, and a layer with two
# output channels. Each output channel has its own row of weights, as long
# as the input: $(1, 0, -1)$ and $(2, 1, 0)$. An output is the dot product
# of the token with that row, the sum of the products channel by channel,
# plus the channel's bias, here $10$ and $20$:
#
# $$ 1 \cdot 1 + 2 \cdot 0 + 3 \cdot (-1) + 10 = 8 , \qquad
#    1 \cdot 2 + 2 \cdot 1 + 3 \cdot 0 + 20 = 24 . $$
#
# A second token, $(0, 1, 1)$, meets the same two rows and gives $9$ and
# $21$.

# %% two tokens by hand
x = np.array([[1.0, 2.0, 3.0], [0.0, 1.0, 1.0]])
w = np.array([[1.0, 0.0, -1.0], [2.0, 1.0, 0.0]])
b = np.array([10.0, 20.0])
for token in x:
    print([int(token @ row + shift) for row, shift in zip(w, b, strict=True)])

# %% [markdown]
# | tensor | shape | what it holds |
# |---|---|---|
# | `inp` | (B, T, C) | C numbers for each of the B·T tokens |
# | `weight` | (OC, C) | a row of C weights for each output channel |
# | `bias` | (OC,) | a shift for each output channel; may be absent |
# | `out` | (B, T, OC) | OC numbers for each token |
#
# Tokens do not meet in this layer, so B and T act as one axis. We number
# the tokens $n = 1 \dots N$ with $N = BT$, input channels $c$, output
# channels $o$.

# %% [markdown]
# ## Forward
#
# What we did by hand, for every token and every output channel:
#
# $$ y_{n,o} = \sum_c x_{n,c}\, W_{o,c} + b_o . \tag{1.7.1} $$
#
# As matrices this is $Y = X W^\top + b$. The weight stands in memory as
# (OC, C), the row of an output channel in one piece. Both factors of the
# sum in (1.7.1) then run along memory, which will matter for speed.


# %% imports tags=["export"]
from llmnb.shapes import shapes


# %% the linear layer, forward tags=["export"]
@shapes("B T OC!, B T C, OC C, OC?, B T OC?~")
def matmul_forward(out, inp, weight, bias, residual=None):
    """Map each row of inp to a row of out: out = inp @ weight.T + bias.

    out: (B, T, OC). inp: (B, T, C). weight: (OC, C). bias: (OC,) or None.
    residual: (B, T, OC), added to the result, or None. All of one float
    dtype; out is overwritten, and may be residual itself.
    """
    y = inp @ weight.T
    if bias is not None:
        y += bias
    if residual is not None:
        y += residual
    out[...] = y


# %% the two tokens through the function
y = np.empty((1, 2, 2))
matmul_forward(y, x[None], w, b)
compare("by hand", y[0], [[8, 24], [9, 21]])
matmul_forward(y, x[None], w, None)
compare("without bias", y[0], [[-2, 4], [-1, 1]])

# %% [markdown]
# In GPT-2 every linear layer has a bias but the last one, which computes the
# logits.

# %% [markdown]
# ## Backward, derived
#
# The layer above hands us $dy_{n,o} = \partial \mathcal L / \partial
# y_{n,o}$. We owe $dx$, $dW$ and $db$. For each the chain rule says: go
# through every output that the variable reaches, and add up.
#
# **The input.** $x_{m,c}$ appears in the outputs of its own token $m$ only,
# and there in every output channel $o$, with factor $W_{o,c}$:
#
# $$ \frac{\partial y_{n,o}}{\partial x_{m,c}}
#    = \begin{cases} W_{o,c} & n = m \\ 0 & n \ne m \end{cases}
#    \qquad \Longrightarrow \qquad
#    dx_{m,c} = \sum_o dy_{m,o}\, W_{o,c} . \tag{1.7.2} $$
#
# **The weight.** $W_{p,c}$ appears in output channel $p$ only, and there in
# every token $n$, with factor $x_{n,c}$:
#
# $$ \frac{\partial y_{n,o}}{\partial W_{p,c}}
#    = \begin{cases} x_{n,c} & o = p \\ 0 & o \ne p \end{cases}
#    \qquad \Longrightarrow \qquad
#    dW_{p,c} = \sum_n dy_{n,p}\, x_{n,c} . \tag{1.7.3} $$
#
# **The bias.** $b_p$ appears in output channel $p$ of every token, with
# factor 1:
#
# $$ db_p = \sum_n dy_{n,p} . \tag{1.7.4} $$
#
# As matrices, $dX = dY\, W$ and $dW = dY^\top X$. The shapes leave no other
# way to write them: $dW$ must be (OC, C), and of the two factors at hand,
# $dY$ with (N, OC) and $X$ with (N, C), only $dY^\top X$ sums the tokens
# away. The sum in (1.7.2) runs over output channels, in (1.7.3) over tokens, and
# in (1.7.1) over input channels: each of the three indices is summed once.
#
# **What to save.** (1.7.2) needs the weight, which is a parameter, and (1.7.3)
# needs $x$, which is the output of the layer below and is in memory anyway.
# The linear layer saves nothing of its own.


# %% the linear layer, backward tags=["export"]
@shapes("B T C!, OC C!, OC!?, B T OC, B T C, OC C")
def matmul_backward(
    dinp, dweight, dbias, dout, inp, weight, add_dinp=True, add_dweight=True
):
    """Add the linear layer's gradients to dinp, dweight and dbias.

    dinp, inp: (B, T, C). dout: (B, T, OC). dweight, weight: (OC, C).
    dbias: (OC,), or None for a layer without bias. All of one float dtype.
    add_dinp, add_dweight: False overwrites dinp, or dweight and dbias,
    instead of adding.
    """
    if not add_dinp:
        dinp.fill(0)
    if not add_dweight:
        dweight.fill(0)
        if dbias is not None:
            dbias.fill(0)
    OC, C = weight.shape
    rows, drows = inp.reshape(-1, C), dout.reshape(-1, OC)
    dinp += dout @ weight
    dweight += drows.T @ rows
    if dbias is not None:
        dbias += drows.sum(axis=0)


# %% [markdown]
# The gradients are added, not written. In GPT-2 the matrix that computes the
# logits is also the table of token vectors of
# [chapter 1.5](05_encoder.ipynb): both layers put their share into the same
# `dweight`.

# %% [markdown]
# ## Proof
#
# As before, $\mathcal L = \sum g \cdot y$ for a fixed random $g$, float64,
# step $h = 10^{-5}$, tolerance $10^{-8}$. The layer is linear in each of its
# arguments, so central differences have no error but rounding. We make it
# square, C = OC, for a reason that comes next.

# %% a problem to differentiate
B, T, C, OC = 2, 3, 4, 4
inp, g = rng.normal(size=(B, T, C)), rng.normal(size=(B, T, OC))
weight, bias = rng.normal(size=(OC, C)), rng.normal(size=OC)
out = np.empty((B, T, OC))


def loss():
    matmul_forward(out, inp, weight, bias)
    return (g * out).sum()


def gradients(backward):
    grads = [np.zeros_like(a) for a in (inp, weight, bias)]
    backward(*grads, g, inp, weight)
    return grads


# %% against central differences
dinp, dweight, dbias = gradients(matmul_backward)
compare("dinp", dinp, numerical_gradient(loss, inp), tol=1e-8)
compare("dweight", dweight, numerical_gradient(loss, weight), tol=1e-8)
compare("dbias", dbias, numerical_gradient(loss, bias), tol=1e-8)

# %% [markdown]
# The frequent mistake is a transpose too many. In most layers the shapes
# then do not fit and NumPy complains. In a square layer they fit, training
# runs, and the model learns badly. The proof does not care about shapes:


# %% a gradient made wrong on purpose
def with_transpose(dinp, dweight, dbias, dout, inp, weight):
    dinp += dout @ weight.T


wrong, _, _ = gradients(with_transpose)
try:
    compare("dinp, W.T", wrong, numerical_gradient(loss, inp), tol=1e-8)
    caught = False
except AssertionError:
    caught = True
verdict("the mistake", caught, "is caught")

# %% [markdown]
# ## Fast on a CPU
#
# NumPy hands `@` to a BLAS, a library of hand-tuned linear algebra, most of
# it written in assembly. We write our own product and mean to reach it, for
# three reasons. A BLAS has its own threads, which compete with numba's for
# the same cores. It promises nothing about the order of its sums: with
# another number of threads, or another version, the last digits change. And
# it stops at the product: bias, residual and the sum over batches then cost
# a pass over memory each.
#
# We climb a ladder, on the product of GPT-2's largest inner layer, 256
# tokens of 768 channels to 3072. Every rung is checked and timed on one
# thread; a product of $N$ by $C$ by $OC$ takes $2 N C \cdot OC$ operations,
# one multiplication and one addition a term.

# %% keep the NumPy versions
reference = SimpleNamespace(forward=matmul_forward, backward=matmul_backward)

# %% the problem of the ladder
import numba

from llmnb.cpu.jit import inner

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
# memory and the sum stays in a register. A vector register of an AVX2
# processor holds 8 numbers of float32, and one instruction, the fused
# multiply-add or FMA, multiplies 8 pairs and adds them to 8 running sums.
# LLVM may use it because `fastmath` lets it split one sum into 8 that are
# added at the end.


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
# *Figure 1.7.2. A tile of one sum loads two vectors for each FMA; a tile of
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
            nine_sums(
                *(out, i, j),
                *(a[i], a[i + 1], a[i + 2]),
                *(w[j], w[j + 1], w[j + 2]),
            )


climb("tiles", tiled, runs=5)

# %% [markdown]
# **Packing.** Rung 3 reads the whole weight, 9.4 MB, once for every three
# tokens, more than the second-level cache of a core holds. And it only
# works because both factors happen to run along memory. The two products of
# the backward pass, (1.7.2) and (1.7.3), sum down the rows of a matrix.
#
# Tuned libraries first copy a block of each factor into a buffer, in the
# order in which the innermost loop will read it. Figure 1.7.3 shows that
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
        ax.text(k, i, value, ha="center", va="center", size=9)
    ax.set(title=title, xlabel="step of the sum", xticks=[], yticks=[])
axes[0].set_ylabel("row")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.7.3. The numbers give the order in memory. On the left a row is in
# one piece; on the right the four numbers that one step of the sum needs
# lie side by side.*
#
# With panels the tile can be larger in one direction than a vector: the
# inner loop takes vectors along the columns, and multiplies them with
# single numbers from the rows. Here is the inner loop in plain Python, for
# 6 rows and 16 columns, and the two factors packed whole by NumPy.


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
# memory: it does not see that twelve of its registers would hold them. This
# is the one place of the book where we do not leave the choice to it.
# numba lets a function write LLVM's own language: an *intrinsic* is a
# Python function that runs once, while a kernel is being compiled, and
# emits the instructions that stand for the call. LLVM has vectors of any
# length among its types and turns them into what the processor has.
#
# How many rows and vectors a tile should have depends on the registers. An
# AVX2 processor has 16 of 8 numbers: 6 rows by 2 vectors make 12 sums, two
# more registers hold the vectors of the step, and one passes the numbers of
# the rows through. AVX-512 has 32 registers of 16 numbers, which fit 12 by
# 2. NEON, in ARM processors, has 32 of 4 numbers and gets 6 by 4. Anything
# else gets a small tile, which still is right. `LLMNB_TILE` overrides the
# choice, so that every shape can be tried, and tested, on any machine.

# %% imports of the tile tags=["exporti"] module="cpu.tile"
import os
import re

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


# %% what the processor has tags=["export"] module="cpu.tile"
def cpu_features():
    """The features of the processor that numba compiles for, as a set.

    By LLVM's names, such as "avx2". NUMBA_CPU_FEATURES masks them, as it
    does for numba.
    """
    chosen = numba.config.CPU_FEATURES
    if chosen is not None:
        return {f[1:] for f in chosen.split(",") if f.startswith("+")}
    return {name for name, has in llvm.get_host_cpu_features().items() if has}


def tile_shape():
    """Rows, vectors in a row, and numbers in a vector of the inner loop.

    From the processor's features, or from LLMNB_TILE, as in "6x2x8". Raises
    ValueError when that is not three such numbers.
    """
    chosen = os.environ.get("LLMNB_TILE")
    if chosen and not re.fullmatch(r"[1-9]\d?x[1-9]x(4|8|16)", chosen):
        raise ValueError(
            f"LLMNB_TILE must be rows x vectors x 4, 8 or 16 numbers, as in "
            f"6x2x8, got {chosen!r}"
        )
    if chosen:
        return tuple(map(int, chosen.split("x")))
    shapes = {"avx512f": (12, 2, 16), "avx2": (6, 2, 8), "neon": (6, 4, 4)}
    found = [shapes[f] for f in shapes if f in cpu_features()]
    return found[0] if found else (4, 2, 4)


# %% the tile of this machine tags=["export"] module="cpu.tile"
ROWS, VECTORS, LANES = tile_shape()
COLS = VECTORS * LANES  # columns of a tile

# %% [markdown]
# A few words of LLVM's language: load a vector, store one, spread one
# number over a vector, multiply and add. The type of the numbers comes from
# the array, so that float64 works too, in vectors of as many numbers.

# %% words for vectors tags=["exporti"] module="cpu.tile"
I32 = ir.IntType(32)


def _constant(number, values):
    return ir.Constant(ir.VectorType(number, len(values)), list(values))


def _data(context, builder, kind, array):
    """The address of an array's first number."""
    make = cgutils.create_struct_proxy(kind)
    return make(context, builder, value=array).data


def _load(builder, pointer, count):
    kind = ir.VectorType(pointer.type.pointee, count)
    return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=4)


def _store(builder, vector, pointer):
    pointer = builder.bitcast(pointer, vector.type.as_pointer())
    builder.store(vector, pointer, align=4)


def _spread(builder, number):
    vector = _constant(number.type, [ir.Undefined] * LANES)
    vector = builder.insert_element(vector, number, I32(0))
    return builder.shuffle_vector(vector, vector, _constant(I32, [0] * LANES))


# %% multiply and add tags=["exporti"] module="cpu.tile"
def _multiply_add(builder, a, b, c):
    double = isinstance(a.type.element, ir.DoubleType)
    name = f"llvm.fmuladd.v{a.type.count}f{64 if double else 32}"
    kind = ir.FunctionType(a.type, [a.type] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, [a, b, c])


# %% [markdown]
# The loop over the sum. In LLVM's language a variable that changes from one
# turn to the next is a *phi*: it has one value on entry and another when
# the loop comes back. Our sums are phis, one for each vector of the tile,
# and so they live in registers.


# %% the loop over the sum tags=["exporti"] module="cpu.tile"
def _sum_loop(builder, a, b, depth, zero, multiply_add):
    """The sums of a tile over two panels, as vectors, row by row."""
    before = builder.block
    loop = builder.append_basic_block("step")
    after = builder.append_basic_block("done")
    builder.branch(loop)
    builder.position_at_end(loop)
    entry = [depth.type(0), a, b] + [zero] * (ROWS * VECTORS)
    phis = [builder.phi(value.type) for value in entry]
    k, a, b, *sums = phis
    columns = [
        _load(builder, builder.gep(b, [I32(v * LANES)]), LANES)
        for v in range(VECTORS)
    ]
    new = []
    for i in range(ROWS):
        x = _spread(builder, builder.load(builder.gep(a, [I32(i)])))
        for y in columns:
            new.append(multiply_add(builder, x, y, sums[len(new)]))
    steps = [builder.add(k, k.type(1))]
    steps += [builder.gep(a, [I32(ROWS)]), builder.gep(b, [I32(COLS)])]
    for phi, first, then in zip(phis, entry, steps + new, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(then, loop)
    again = builder.icmp_signed("<", steps[0], depth)
    builder.cbranch(again, loop, after)
    builder.position_at_end(after)
    return new


# %% [markdown]
# When the sums are done, two things may still be wanted: a bias, one number
# a column, and something to start from, such as the residual or the
# gradient of earlier batches. Both are added on the way from the registers
# to `out`. That is the *epilogue*, and it saves a pass over memory for
# each. Positions in arrays are given as an offset and steps: a row further
# on is `row` numbers away, a column `col` numbers. A step of 0 repeats the
# same number, so the same code adds a row of zeros where nothing is wanted.


# %% the vectors of a tile tags=["exporti"] module="cpu.tile"
def _places(builder, base, at, row, col):
    """The addresses of a tile's vectors, row by row."""
    for i in range(ROWS):
        for j in range(0, COLS, LANES):
            down = builder.mul(row, row.type(i))
            across = builder.mul(col, col.type(j))
            step = builder.add(at, builder.add(down, across))
            yield builder.gep(base, [step])


def _prefetch(builder, pointers):
    """Ask for the cache lines that will be written, ahead of time."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
    name = "llvm.prefetch.p0"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    for pointer in pointers:
        address = builder.bitcast(pointer, byte)
        builder.call(function, [address, I32(1), I32(3), I32(1)])


# %% one tile tags=["exporti"] module="cpu.tile"
I64 = types.int64


@intrinsic
def multiply_tile(typing, out, at, start, bias, panels, a, b, depth):
    """Write one tile: out = start + bias + the product of two panels.

    For kernels. out, start, bias and panels are flat arrays. at: seven
    integers, where the tile begins in out and out's step from row to row;
    where it begins in start and start's steps from row to row and from
    column to column; where it begins in bias and the step from column to
    column. a, b: where the panels begin; depth: their lines, at least 1.
    """
    signature = types.void(out, at, start, bias, panels, I64, I64, I64)

    def codegen(context, builder, signature, args):
        kinds = signature.args
        out, start, bias, panels = (
            _data(context, builder, kinds[i], args[i]) for i in (0, 2, 3, 4)
        )
        at = cgutils.unpack_tuple(builder, args[1])
        a, b = (builder.gep(panels, [x]) for x in args[5:7])
        one = at[0].type(1)
        places = list(_places(builder, out, at[0], at[1], one))
        _prefetch(builder, places[::VECTORS])
        zero = _constant(out.type.pointee, [0.0] * LANES)
        pairs = kinds[4].dtype == types.uint32
        fma = _multiply_add_pairs if pairs else _multiply_add
        sums = _sum_loop(builder, a, b, args[7], zero, fma)
        shift = list(_places(builder, bias, at[5], one.type(0), at[6]))
        starts = _places(builder, start, at[2], at[3], at[4])
        for x, p, q, r in zip(sums, places, starts, shift, strict=True):
            x = builder.fadd(x, _load(builder, r, LANES))
            _store(builder, builder.fadd(x, _load(builder, q, LANES)), p)
        return context.get_dummy_value()

    return signature, codegen


# %% [markdown]
# **Packing by vectors.** A thin layer uses each packed number only a few
# times, so packing must be quick. Where the columns of a panel run along
# memory, a vector can be copied as it is. Where the sum runs along memory, a
# square of 8 by 8 numbers is read as 8 vectors, transposed in
# registers, and written as 8 others. The transpose takes three rounds: swap
# blocks of 4 between vectors that are 4 apart, then of 2, then of 1.


# %% a transpose in registers tags=["exporti"] module="cpu.tile"
def _transposed(builder, rows):
    rows, distance = list(rows), LANES // 2
    while distance:
        first, second = [], []
        for j in range(LANES):
            far = bool(j & distance)
            first.append(j - distance + LANES if far else j)
            second.append(j + LANES if far else j + distance)
        for i in range(LANES):
            if not i & distance:
                x, y = rows[i], rows[i + distance]
                shuffle = _constant(I32, first)
                rows[i] = builder.shuffle_vector(x, y, shuffle)
                shuffle = _constant(I32, second)
                rows[i + distance] = builder.shuffle_vector(x, y, shuffle)
        distance //= 2
    return rows


# %% [markdown]
# Six rows are no whole number of vectors; they are stored in pieces of 4
# and 2. Both ways of loading give the same: for each of `LANES` steps of the
# sum the pieces of a line of the panel, with their places in it.


# %% two ways to load a square tags=["exporti"] module="cpu.tile"
def _pieces(width):
    """Split a width into vectors: pairs (first, count)."""
    first = 0
    while first < width:
        count = LANES
        while count > width - first:
            count //= 2
        yield first, count
        first += count


def _load_along(builder, pointer, width):
    return [
        [(j, _load(builder, pointer(k, j), n)) for j, n in _pieces(width)]
        for k in range(LANES)
    ]


def _load_across(builder, pointer, width):
    lines = [[] for _ in range(LANES)]
    for left in range(0, width, LANES):
        count = min(LANES, width - left)
        rows = [
            _load(builder, pointer(left + i, 0), LANES) for i in range(count)
        ]
        rows += rows[:1] * (LANES - count)  # their columns are not stored
        for line, x in zip(lines, _transposed(builder, rows), strict=True):
            for j, n in _pieces(count):
                part = _constant(I32, range(j, j + n))
                piece = builder.shuffle_vector(x, x, part)
                line.append((left + j, piece))
    return lines


# %% pack a square tags=["exporti"] module="cpu.tile"
def _packer(load):
    @intrinsic(prefer_literal=True)
    def pack(typing, panels, to, source, at, step, width):
        signature = types.void(panels, I64, source, I64, I64, width)

        def codegen(context, builder, signature, args):
            panels, source = (
                _data(context, builder, signature.args[i], args[i])
                for i in (0, 2)
            )
            _, to, _, at, step, _ = args

            def pointer(i, j):
                down = builder.add(at, builder.mul(step, step.type(i)))
                return builder.gep(source, [builder.add(down, at.type(j))])

            width = signature.args[5].literal_value
            lines = load(builder, pointer, width)
            per = _per_line(signature.args[0])
            for n in range(0, LANES, per):
                for parts in zip(*lines[n : n + per], strict=True):
                    first = n // per * width + parts[0][0]
                    place = builder.add(to, to.type(first))
                    vectors = [vector for _, vector in parts]
                    x = vectors[0] if per == 1 else _pair(builder, *vectors)
                    _store(builder, x, builder.gep(panels, [place]))
            return context.get_dummy_value()

        return signature, codegen

    return pack


pack_along, pack_across = _packer(_load_along), _packer(_load_across)

# %% [markdown]
# **Half the bits.** In that last cell a line of a panel may stand for two
# steps of the sum. That is for bfloat16, the upper half of a float32: one
# bit of sign, eight of exponent, seven of fraction. It has float32's range
# and two to three decimal digits. Rounding the factors of a product to it
# halves what is read, and processors with AVX512-BF16 have an instruction,
# `vdpbf16ps`, that multiplies 32 pairs and adds them to 16 sums in float32,
# twice the work of an FMA. It wants two neighbouring steps of the sum in one
# number of 32 bits, so a panel of type uint32 holds such pairs.
#
# To round to the nearest, add half a unit of the last place that stays and
# cut off the rest. A tie goes to the even neighbour, which is why the bit
# just above the cut is added too.


# %% pairs of bfloat16 tags=["exporti"] module="cpu.tile"
HALVES = "avx512bf16" in cpu_features() and LANES == 16  # has vdpbf16ps


def _per_line(kind):
    """Steps of the sum in one line of a panel."""
    return 2 if kind.dtype == types.uint32 else 1


def _pair(builder, low, high):
    """Round two vectors to bfloat16, side by side in uint32."""
    count = low.type.count

    def every(bits):
        return _constant(I32, [bits] * count)

    def rounded(x):
        bits = builder.bitcast(x, ir.VectorType(I32, count))
        odd = builder.and_(builder.lshr(bits, every(16)), every(1))
        return builder.add(bits, builder.add(odd, every(0x7FFF)))

    low = builder.lshr(rounded(low), every(16))
    return builder.or_(low, builder.and_(rounded(high), every(0xFFFF0000)))


# %% [markdown]
# Where the processor lacks the instruction, the same panels can still be
# multiplied: a shift or a mask turns each half back into a float32. That is
# slower than float32 throughout, so the model does not use it unless
# `LLMNB_BF16=emulate` asks for it; the tests do, and check all of this on any
# machine. One difference is left: `vdpbf16ps` takes *subnormal* numbers, those
# below $2^{-126} \approx 10^{-38}$, for zero, among its factors and its sums.
# The emulation keeps them, as float32 does.


# %% multiply and add pairs tags=["exporti"] module="cpu.tile"
def _multiply_add_pairs(builder, a, b, c):
    if HALVES:
        llvm.initialize_native_asmparser()  # reads the instruction's name
        kind = ir.FunctionType(c.type, [a.type, b.type, c.type])
        text, where = "vdpbf16ps $2, $1, $0", "=v,v,v,0"
        return builder.call(ir.InlineAsm(kind, text, where), [b, a, c])
    a, b = (_split(builder, x, c.type) for x in (a, b))
    for x, y in zip(a, b, strict=True):
        c = _multiply_add(builder, x, y, c)
    return c


def _split(builder, pairs, kind):
    """The two halves of a vector of pairs, as float32."""
    shift = ir.Constant(pairs.type, [16] * LANES)
    mask = ir.Constant(pairs.type, [0xFFFF0000] * LANES)
    halves = builder.shl(pairs, shift), builder.and_(pairs, mask)
    return [builder.bitcast(x, kind) for x in halves]


# %% is it worth it here tags=["export"] module="cpu.tile"
def has_bf16():
    """Whether this processor multiplies bfloat16 faster than float32.

    LLMNB_BF16=emulate says yes anyway, for tests on other processors.
    """
    return HALVES or os.environ.get("LLMNB_BF16") == "emulate"


# %% one number at a time tags=["exporti"] module="cpu.tile"
@intrinsic
def pack_one(typing, panels, to, low, high):
    """Write one number of a panel; high is the second of a pair, if any.

    For kernels.
    """
    signature = types.void(panels, I64, low, high)

    def codegen(context, builder, signature, args):
        panels = _data(context, builder, signature.args[0], args[0])
        empty = _constant(args[2].type, [ir.Undefined])
        vectors = [builder.insert_element(empty, x, I32(0)) for x in args[2:]]
        pairs = _per_line(signature.args[0]) == 2
        x = _pair(builder, *vectors) if pairs else vectors[0]
        _store(builder, x, builder.gep(panels, [args[1]]))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def steps_per_line(typing, panels):
    """2 for panels of pairs, else 1: a constant of the compiled kernel.

    For kernels.
    """
    count = ir.IntType(64)(_per_line(panels))
    return I64(panels), lambda context, builder, signature, args: count


# %% [markdown]
# From here on it is plain numba again. `pack` copies a block of a matrix
# into panels: whole squares by vectors, whatever is left over one number at
# a time, with zeros where a panel reaches beyond the matrix. `row` is the
# step between the panel's rows (or columns), `col` the step along the sum.
# Where rows lie side by side it goes along them through all panels first:
# neighbours in memory share a page, and looking up pages costs time too.

# %% imports of the panels tags=["exporti"] module="cpu.panels"
import functools

import numba
import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from llmnb.cpu.jit import device, routine
from llmnb.cpu.tile import (
    COLS,
    LANES,
    ROWS,
    multiply_tile,
    pack_across,
    pack_along,
    pack_one,
    steps_per_line,
)


# %% pack what is left over tags=["exporti"] module="cpu.panels"
@device
def _pack_rest(panels, to, source, at, row, col, rows, depth, first, width):
    per = steps_per_line(panels)
    lines = (depth + per - 1) // per
    for r in range(0, rows, width):
        for k in range(first if r + width <= rows else 0, depth, per):
            for i in range(width):
                low = high = source.dtype.type(0)
                if r + i < rows:
                    low = source[at + (r + i) * row + k * col]
                    if per == 2 and k + 1 < depth:
                        high = source[at + (r + i) * row + (k + 1) * col]
                pack_one(
                    panels, to + r * lines + k // per * width + i, low, high
                )


# %% pack a block tags=["exporti"] module="cpu.panels"
def _packing(width):
    @device
    def pack(panels, to, source, at, row, col, rows, depth):
        per = steps_per_line(panels)
        lines = (depth + per - 1) // per
        whole, body = rows - rows % width, depth - depth % LANES
        if col == 1:
            for r in range(0, whole, width):
                for k in range(0, body, LANES):
                    p = to + r * lines + k // per * width
                    q = at + r * row + k
                    pack_across(panels, p, source, q, row, width)
        elif row == 1:
            for k in range(0, body, LANES):
                for r in range(0, whole, width):
                    p = to + r * lines + k // per * width
                    q = at + r + k * col
                    pack_along(panels, p, source, q, col, width)
        else:
            body = 0
        args = source, at, row, col, rows, depth
        _pack_rest(panels, to, *args, body, width)

    return pack


_pack_rows, _pack_cols = _packing(ROWS), _packing(COLS)

# %% [markdown]
# `_multiply_panels` goes through all tiles of a block. Tiles at the right and
# lower edge are computed in a spare tile, and only the part that exists is
# copied to `out`. So nothing is ever written outside of it. The spare tile
# has a row for the bias, which is added first there too: a number does not
# depend on where its row lies in the batch, down to its last bit.


# %% a tile at the edge tags=["exporti"] module="cpu.panels"
@device
def _edge_tile(out, at, start, bias, panels, a, b, lines, spare, rows, cols):
    shift = (ROWS + 1) * COLS
    for j in range(cols):
        spare[shift + j] = bias[at[5] + j * at[6]]
        for i in range(rows):
            spare[i * COLS + j] = start[at[2] + i * at[3] + j * at[4]]
    place = 0, COLS, 0, COLS, 1, shift, 1
    multiply_tile(spare, place, spare, spare, panels, a, b, lines)
    for i in range(rows):
        for j in range(cols):
            out[at[0] + i * at[1] + j] = spare[i * COLS + j]


# %% all tiles of a block tags=["exporti"] module="cpu.panels"
@device
def _multiply_panels(out, at, start, bias, panels, a, b, sizes, spare):
    rows, cols, depth = sizes
    o, out_row, s, row, col, c, bias_col = at
    per = steps_per_line(panels)
    lines = (depth + per - 1) // per
    for j in range(0, cols, COLS):
        for i in range(0, rows, ROWS):
            place = (
                *(o + i * out_row + j, out_row),
                *(s + i * row + j * col, row, col),
                *(c + j * bias_col, bias_col),
            )
            p, q = a + i * lines, b + j * lines
            m, n = min(ROWS, rows - i), min(COLS, cols - j)
            if m == ROWS and n == COLS:
                multiply_tile(out, place, start, bias, panels, p, q, lines)
            else:
                tile = spare, m, n
                _edge_tile(out, place, start, bias, panels, p, q, lines, *tile)


# %% [markdown]
# **Compile once.** A kernel that calls a compiled function takes a copy of
# its code and optimises it again. With packing and tiles in every product and, in
# [chapter 1.8](08_attention.ipynb), ten times in attention, the first step of
# a training run would wait half a minute for the compiler. So these three
# functions are compiled once for each type of number, into routines with an
# address, as a C compiler would. Kernels get the addresses as arguments and
# jump there. An intrinsic writes the jump.


# %% three routines tags=["exporti"] module="cpu.panels"
ALL = 1 << 60  # the length of an array that is only an address


def _rows_routine(panels, to, source, at, row, col, rows, depth):
    panels, source = carray(panels, ALL), carray(source, ALL)
    _pack_rows(panels, to, source, at, row, col, rows, depth)


def _cols_routine(panels, to, source, at, row, col, rows, depth):
    panels, source = carray(panels, ALL), carray(source, ALL)
    _pack_cols(panels, to, source, at, row, col, rows, depth)


def _multiply_routine(
    out,
    o,
    out_row,
    s,
    row,
    col,
    c,
    bias_col,
    start,
    bias,
    panels,
    a,
    b,
    rows,
    cols,
    depth,
    spare,
):
    at, sizes = (o, out_row, s, row, col, c, bias_col), (rows, cols, depth)
    out, start, bias, panels, spare = (
        carray(out, ALL),
        carray(start, ALL),
        carray(bias, ALL),
        carray(panels, ALL),
        carray(spare, ALL),
    )
    _multiply_panels(out, at, start, bias, panels, a, b, sizes, spare)


# %% their addresses tags=["exporti"] module="cpu.panels"
_compiled = []  # an address is good as long as its routine is kept


@functools.cache
def _addresses(panel, number):
    """The addresses of the three routines for two dtypes of NumPy."""
    kinds = (types.CPointer(numba.from_dtype(d)) for d in (panel, number))
    p, x, n = *kinds, types.int64
    pack = types.void(p, n, x, *[n] * 5)
    multiply = types.void(x, *[n] * 7, x, x, p, *[n] * 5, x)
    made = (
        routine(_rows_routine, pack),
        routine(_cols_routine, pack),
        routine(_multiply_routine, multiply),
    )
    _compiled.extend(made)
    return tuple(one.address for one in made)


# %% jump to a routine tags=["exporti"] module="cpu.panels"
def _jump(context, builder, signature, args):
    """Call the address args[0] with the other arguments, arrays by address,
    tuples number by number."""
    values = []
    for kind, value in zip(signature.args[1:], args[1:], strict=True):
        if isinstance(kind, types.Array):
            make = cgutils.create_struct_proxy(kind)
            values.append(make(context, builder, value=value).data)
        elif isinstance(kind, types.BaseTuple):
            values += cgutils.unpack_tuple(builder, value)
        else:
            values.append(value)
    kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
    function = builder.inttoptr(args[0], kind.as_pointer())
    builder.call(function, values)
    return context.get_dummy_value()


# %% the routines, called from kernels tags=["exporti"] module="cpu.panels"
@intrinsic
def pack(typing, code, panels, to, source, at, row, col, rows, depth):
    """Pack a block of a matrix into panels; code: a packing routine.

    For kernels. The block begins at source[at] and has `rows` rows of
    `depth` numbers, row and col apart; for a routine that packs columns,
    columns are meant where it says rows. The panels begin at panels[to].
    """
    n = types.int64
    return types.void(n, panels, n, source, n, n, n, n, n), _jump


@intrinsic
def multiply_panels(
    typing, code, out, at, start, bias, panels, a, b, sizes, spare
):
    """Write a block: out = start + bias + the product of packed panels.

    For kernels. code: the multiplying routine. Arguments as for
    multiply_tile; sizes: rows, columns and steps of the block. spare: room
    for a tile, a row of zeros, and one for the bias.
    """
    n, seven, three = (
        types.int64,
        *(types.UniTuple(types.int64, k) for k in (7, 3)),
    )
    return types.void(
        n, out, seven, start, bias, panels, n, n, three, spare
    ), _jump


# %% [markdown]
# **Blocks.** The panels must stay in a cache while they are used. A panel of
# columns is 384 steps long, 24 KB in float32, and stays in the first-level
# cache while all panels of rows pass by. Those take at most 144 rows, 221
# KB, and stay in the second level while all columns pass by. At most 768
# columns are packed at a time; they wait in the third level.
#
# **Threads.** `out` is cut into strips along its longer side, one for each
# thread, and a thread packs in its own row of `work`. The strips depend on
# the number of threads, but no sum does: every number of `out` is summed in
# runs of 384 steps, one after the other, wherever the cuts are. So no bit of
# the result depends on it either.

# %% the blocks tags=["export"] module="cpu.panels"
DEPTH = 384  # steps of the sum in a block
HEIGHT = 144 // ROWS * ROWS  # rows in a block
WIDTH = 768 // COLS * COLS  # columns in a block
SPARE = (HEIGHT + WIDTH) * DEPTH  # where the spare tile begins


def work_shape():
    """The shape of the scratch memory that the products pack into.

    A row for each thread that numba may use, of 1.4 MB in float32.
    """
    return numba.config.NUMBA_NUM_THREADS, SPARE + (ROWS + 2) * COLS


WORK = "{} {}!?".format(*work_shape())  # as `shapes` reads it


# %% the scratch memory tags=["export"] module="cpu.panels"
def check_bf16(name, bf16, dtype):
    """Raise TypeError where products in dtype cannot be rounded."""
    if bf16 and dtype != np.float32:
        raise TypeError(f"{name}: bf16 wants float32 arrays, got {dtype}")


def scratch(work, bf16, dtype):
    """What kernels need: three addresses, panels and work.

    The addresses are those of the routines that pack rows, pack columns
    and multiply; they are compiled when they are not in the cache. work is
    allocated if it is None. panels is the same memory, for bf16 as uint32.
    """
    if work is None:
        work = np.empty(work_shape(), dtype)
    panels = work.view(np.uint32) if bf16 else work
    return _addresses(panels.dtype, work.dtype), panels, work


# %% [markdown]
# Now the product itself. A thread goes through its strip block by block,
# packs, and multiplies.

# %% imports of the CPU module tags=["exporti"] module="cpu.matmul"
import numba
import numpy as np

from llmnb.cpu.jit import arguments, device, team
from llmnb.cpu.panels import (
    DEPTH,
    HEIGHT,
    SPARE,
    WIDTH,
    WORK,
    check_bf16,
    multiply_panels,
    pack,
    scratch,
)
from llmnb.cpu.tile import COLS, ROWS
from llmnb.shapes import shapes


# %% a strip tags=["exporti"] module="cpu.matmul"
@device
def _multiply_strip(out, start, bias, a, b, strip, steps, code, panels, spare):
    i0, i1, j0, j1, depth = strip
    out_row, row, col, bias_col, a_row, a_col, b_row, b_col = steps
    zeros, right = ROWS * COLS, HEIGHT * DEPTH
    spare[zeros : zeros + COLS] = 0
    start, bias = start if col else spare, bias if bias_col else spare
    for j in range(j0, j1, WIDTH):
        cols = min(WIDTH, j1 - j)
        for k in range(0, depth, DEPTH):
            n = min(DEPTH, depth - k)
            p = j * b_col + k * b_row
            pack(code[1], panels, right, b, p, b_col, b_row, cols, n)
            for i in range(i0, i1, HEIGHT):
                rows = min(HEIGHT, i1 - i)
                p = i * a_row + k * a_col
                pack(code[0], panels, 0, a, p, a_row, a_col, rows, n)
                o = i * out_row + j
                at = o, out_row, o, out_row, 1, zeros, 0
                first, shift = out, spare  # go on from the sums so far
                if k == 0:
                    s = i * row + j * col if col else zeros
                    c = j if bias_col else zeros
                    at = o, out_row, s, row, col, c, bias_col
                    first, shift = start, bias
                sizes = rows, cols, n
                multiply_panels(
                    *(code[2], out, at, first, shift),
                    *(panels, 0, right, sizes, spare),
                )


# %% the kernel of all three products tags=["exporti"] module="cpu.matmul"
@team
def _multiply(part, parts, address):
    out, start, bias, a, b, sizes, steps, code, panels, work = arguments(
        address
    )
    rows, cols, depth = sizes
    down, across = rows, cols
    if rows > cols:
        down = -(-rows // (parts * ROWS)) * ROWS
    else:
        across = -(-cols // (parts * COLS)) * COLS
    i = part * down if down < rows else 0
    j = part * across if across < cols else 0
    if part == 0 or i + j > 0:
        strip = i, min(rows, i + down), j, min(cols, j + across), depth
        _multiply_strip(
            *(out, start, bias, a, b, strip, steps),
            *(code, panels[part], work[part, SPARE:]),
        )


# %% [markdown]
# In Python remains to say how the matrices lie. A transposed matrix is the
# same memory with its two steps exchanged.


# %% any product tags=["exporti"] module="cpu.matmul"
def _flat(x):
    """A matrix, or the transpose of one, as a flat view and two steps."""
    row, col = (step // x.itemsize for step in x.strides)
    return (x if x.flags.c_contiguous else x.T).reshape(-1), row, col


def _product(out, a, b, start=None, bias=None, work=None, bf16=False):
    """out = start + bias + a @ b for matrices; the first two may be None."""
    made = scratch(work, bf16, out.dtype)
    sizes = *out.shape, a.shape[1]
    (a, *a_steps), (b, *b_steps), (out, out_row, _) = map(_flat, (a, b, out))
    start, *start_steps = (out, 0, 0) if start is None else _flat(start)
    steps = out_row, *start_steps, int(bias is not None), *a_steps, *b_steps
    bias = out if bias is None else bias
    _multiply(out, start, bias, a, b, sizes, steps, *made)


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
# **How far is it to the top?** We measure the peak: FMAs on registers alone,
# twelve chains of them so that no one waits for another, on every thread.
# No product can be faster. As a second yardstick we time NumPy's product,
# in a process of its own, so that we can tell its BLAS how many threads to
# use and the two pools of threads do not meet.

# %% imports of the peak tags=["exporti"] module="bench.peak"
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from llmnb.cpu.jit import arguments, team
from llmnb.cpu.tile import LANES
from llmnb.timing import fastest

# %% chains of FMAs tags=["exporti"] module="bench.peak"
CHAINS, TURNS = 12, 200_000


@intrinsic
def _run_chains(typing, x):
    """Replace x by the end of CHAINS chains of TURNS vectors of FMAs."""

    def codegen(context, builder, signature, args):
        number = args[0].type
        vector = ir.VectorType(number, LANES)
        name = f"llvm.fmuladd.v{LANES}f32"
        kind = ir.FunctionType(vector, [vector] * 3)
        fma = cgutils.get_or_insert_function(builder.module, kind, name)
        empty = ir.Constant(vector, ir.Undefined)
        x = builder.insert_element(empty, args[0], ir.IntType(32)(0))
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), LANES), None)
        x = builder.shuffle_vector(x, x, lanes)
        places = [cgutils.alloca_once_value(builder, x) for _ in range(CHAINS)]
        with cgutils.for_range(builder, ir.IntType(64)(TURNS)):
            for place in places:
                y = builder.load(place)
                builder.store(builder.call(fma, [y, x, x]), place)
        total = builder.load(places[0])
        for place in places[1:]:
            total = builder.fadd(total, builder.load(place))
        return builder.extract_element(total, ir.IntType(32)(0))

    return x(x), codegen


# %% the peak of this machine tags=["export"] module="bench.peak"
@team
def _all_threads(part, parts, address):
    (x,) = arguments(address)
    x[part] = _run_chains(x[part])


def fma_peak():
    """FLOP/s of float32 that numba's threads reach on registers alone.

    A measurement of about a tenth of a second, after compiling.
    """
    x = np.full(numba.get_num_threads(), 0.5, np.float32)
    seconds = fastest(_all_threads, x, runs=200)
    return 2 * LANES * CHAINS * TURNS * x.size / seconds


# %% the yardsticks
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
# *Figure 1.7.4. The order of the loops and the tile bring one factor each.
# Packing alone loses, because LLVM leaves the sums in memory; vectors by
# hand then bring numba near a library written in assembly.*
#
# **The layer.** The public functions check their arguments and view (B, T, ·)
# as rows. Forward can add a `residual` in the same pass. Backward can
# overwrite instead of adding, so that nobody needs to clear the memory
# first. The gradient of the bias, (1.7.4), could be one more product, of a row
# of ones with `dout`, but a tile of one row leaves most of its registers
# idle. A plain loop over the rows of `dout` does one addition a number. It
# goes along strips of `STRIP` columns, whose sums stay in the first-level
# cache.


# %% add up the columns tags=["exporti"] module="cpu.matmul"
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


# %% the linear layer, forward tags=["export"] module="cpu.matmul"
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
    if residual is not None:
        residual = residual.reshape(-1, OC)
    rows, out = inp.reshape(-1, C), out.reshape(-1, OC)
    _product(out, rows, weight.T, residual, bias, work, bf16)


# %% the linear layer, backward tags=["export"] module="cpu.matmul"
@shapes("B T C!, OC C!, OC!?, B T OC, B T C, OC C", work=WORK)
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
    bf16=False,
):
    """Add the linear layer's gradients to dinp, dweight and dbias.

    dinp, inp: (B, T, C). dout: (B, T, OC). dweight, weight: (OC, C).
    dbias: (OC,), or None for a layer without bias. All float32 or all
    float64 and C-contiguous. add_dinp, add_dweight: False overwrites dinp,
    or dweight and dbias, instead of adding. work, bf16: as in
    matmul_forward. Raises TypeError or ValueError before it computes
    anything.
    """
    check_bf16("matmul_backward", bf16, inp.dtype)
    rows, drows, dinp = (x.reshape(-1, x.shape[2]) for x in (inp, dout, dinp))
    start = dinp if add_dinp else None
    _product(dinp, drows, weight, start, None, work, bf16)
    start = dweight if add_dweight else None
    _product(dweight, drows.T, rows, start, None, work, bf16)
    if dbias is not None:
        _sum_columns(dbias, drows, add_dweight)


# %% [markdown]
# The verdict, on the problem of the proof and on one in float32 whose sizes
# divide nothing:

# %% the same results from the kernels
cpu = SimpleNamespace(forward=matmul_forward, backward=matmul_backward)
for name, got, grad in zip(
    ("dinp", "dweight", "dbias"),
    gradients(cpu.backward),
    (dinp, dweight, dbias),
    strict=True,
):
    compare(name, got, grad, tol=1e-12)


# %% a problem of any size
def problem(B, T, C, OC):
    p = SimpleNamespace()
    p.inp = rng.normal(size=(B, T, C)).astype(np.float32)
    p.dout = rng.normal(size=(B, T, OC)).astype(np.float32)
    p.weight = rng.normal(size=(OC, C)).astype(np.float32)
    p.bias = rng.normal(size=OC).astype(np.float32)
    p.out = np.zeros_like(p.dout)
    p.dinp, p.dweight, p.dbias = map(np.zeros_like, (p.inp, p.weight, p.bias))
    return p


def backward(p, layer):
    layer.backward(p.dinp, p.dweight, p.dbias, p.dout, p.inp, p.weight)


# %% float32, odd sizes
outputs = "out", "dinp", "dweight", "dbias"


def results(p, layer):
    for name in outputs:
        getattr(p, name)[...] = 0
    layer.forward(p.out, p.inp, p.weight, p.bias)
    backward(p, layer)
    return {name: getattr(p, name).copy() for name in outputs}


p = problem(3, 37, 51, 331)
got, expected = results(p, cpu), results(p, reference)
for name in outputs:
    compare(name, got[name], expected[name])

# %% one thread and several, bit for bit
numba.set_num_threads(1)
alone = results(p, cpu)
numba.set_num_threads(most)
same = all(np.array_equal(alone[name], got[name]) for name in outputs)
verdict("threads", same, "change no bit")

# %% a shape that does not fit
try:
    cpu.forward(p.out, p.inp, p.weight[:, :50], p.bias)
except ValueError as error:
    print(error)

# %% [markdown]
# All three products of the large layer, in the same units. The backward
# pass has two of them, and the sum over the rows for the bias.

# %% the layer, measured tags=["nbval-ignore-output"]
from llmnb.cpu.panels import work_shape

p = problem(1, N, C, OC)
work = np.empty(work_shape(), np.float32)


def timed(function, *args):
    return fastest(lambda: function(*args, work=work), runs=10)


forward = timed(cpu.forward, p.out, p.inp, p.weight, p.bias)
both = p.dinp, p.dweight, p.dbias, p.dout, p.inp, p.weight
seconds = forward, timed(cpu.backward, *both)
print(f"{machine()}, {most} threads")
for name, s, products in zip(
    ("forward", "backward"), seconds, (1, 2), strict=True
):
    speed = products * 2 * N * C * OC / s / 1e9
    print(f"{name:<9}{speed:6.1f} GFLOP/s, {speed / top:.0%} of peak", end="")
    print(f", {speed / many:.0%} of BLAS")

# %% [markdown]
# And two larger products, forward: the same layer for one sequence of 1024
# tokens, and a square one.

# %% larger products tags=["nbval-ignore-output"]
for N, C, OC in ((1024, 768, 3072), (2048, 2048, 2048)):
    p = problem(1, N, C, OC)
    seconds = timed(cpu.forward, p.out, p.inp, p.weight, p.bias)
    speed = 2 * N * C * OC / seconds / 1e9
    print(f"{N} x {C} x {OC}: {speed:.0f} GFLOP/s, {speed / top:.0%}", end="")
    print(f" of peak, {speed / blas(most, N, C, OC):.0%} of BLAS")

# %% [markdown]
# ## On a GPU
#
# A GPU has the same problem with other numbers. By NVIDIA's data sheets an
# A100 of 40 GB computes at 19.5 TFLOP/s in float32, 19.5 · 10¹² operations a
# second, and its memory delivers 1,555 GB/s: 12.5 operations for each byte.
# For an H100 SXM it is 67 TFLOP/s and 3,350 GB/s, 20 for each byte. One FMA
# is two operations, and it needs two factors, eight bytes: a product that
# fetches both for every FMA does a quarter of an operation for each byte. So
# again a number that has been fetched must be used many times, and again in
# two places: in the memory that a block of threads shares, and in the
# registers of one thread.
#
# The ladder has four versions. No GPU has run them yet. They run on the
# simulator of [chapter 3.1](../3_gpu/01_threads.ipynb), which counts what they move, and
# tests compile them for the A100's and the H100's generations and read the
# machine code. `llmnb bench --backend cuda --kernels` measures them where
# there is a GPU, and the results page shows what was measured.
#
# All three products of this chapter are one sum, $\sum_k a_{i,k}\,
# b_{j,k}$; they differ in how the factors lie. Either k runs *along* the
# rows of a matrix in memory, or *across* them:
#
# | product | a | k in a | b | k in b |
# |---|---|---|---|---|
# | forward, (1.7.1) | `inp` | along | `weight` | along |
# | `dinp`, (1.7.2) | `dout` | along | `weight` | across |
# | `dweight`, (1.7.3) | `dout` | across | `inp` | across |
#
# numba takes the variables of an enclosing function as constants. So each
# version is a function that returns a kernel, made for `along_a` and
# `along_b`, and no thread has to ask which product it is in. The bias is
# added at the end, on the way out of the registers, and so is a `start`: the
# residual, or a gradient so far.

# %% imports of the GPU's products tags=["export"] module="cuda.matmul"
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

# %% nothing tags=["exporti"] module="cuda.matmul"
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


# %% start a product tags=["exporti"] module="cuda.matmul"
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


# %% [markdown]
# **Version 1, a thread an output.** The equation, as it stands. A warp is
# 32 columns of one row, so that its results lie side by side in `out`.


# %% version 1 tags=["exporti"] module="cuda.matmul"
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


# %% [markdown]
# The verdict on a small problem that divides nothing, for all three
# layouts; and a product to count with, 64 tokens of 16 channels to 64,
# which is 65,536 FMAs or 2,048 by whole warps.

# %% check a version of the product
from llmnb.gpu.launch import simulated, to_device, to_host
from llmnb.gpu.simulator import watch

small = np.random.default_rng(6)
LAYOUTS = {"a bT": (True, True), "a b": (True, False), "aT b": (False, False)}


def check_product(product, rows, cols, steps):
    a, b = (
        small.normal(size=(n, steps)).astype(np.float32) for n in (rows, cols)
    )
    for name, along in LAYOUTS.items():
        out = empty(rows * cols)
        flat = [
            to_device((x if way else x.T).reshape(-1))
            for x, way in zip((a, b), along, strict=True)
        ]
        product(out, None, None, *flat, (rows, cols, steps), along)
        compare(name, to_host(out).reshape(rows, cols), a @ b.T, tol=1e-5)


check_product(_thread_an_output, 9, 35, 17)

# %% count what a version moves
counted = {}


def count(name, product, along=(True, True), rows=64, cols=64, steps=16):
    out, a, b = (
        simulated(np.ones(m * n, np.float32))
        for m, n in ((rows, cols), (rows, steps), (cols, steps))
    )
    with watch() as seen:
        product(out, None, None, a, b, (rows, cols, steps), along)
    counted[name] = seen
    fmas = rows * cols * steps
    print(f"read {seen.read_bytes / fmas:.3f} bytes for each FMA")
    print(f"global memory: {seen.requests} requests, {seen.sectors} sectors")
    print(f"shared memory: {seen.shared_requests} requests, ", end="")
    print(f"{seen.shared_passes} passes; {fmas // 32} FMAs by warps")


count("1", _thread_an_output)

# %% [markdown]
# Eight bytes for an FMA, as predicted. The sectors are worse. `weight` runs
# along k, so the 32 lanes of a warp read 32 rows of it, C numbers apart:
# a request touches 32 sectors and uses 4 of the 32 bytes of each.
#
# **Version 2, square tiles in shared memory.** Let a block of 256 threads
# own 16 by 16 outputs. All of them together need 16 rows of `a` and 16 of
# `b`. They read 16 steps of those at a time into shared memory, wait, and
# then take the factors from there. Each number is read from global memory
# once for a block and used 16 times.
#
# The lanes go along the matrix when they read it, whichever way it lies, so
# that they share sectors. In shared memory both factors lie the same way:
# all numbers of step 0, then all of step 1, as in the panels of figure 1.7.3.
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


# %% fill a tile tags=["exporti"] module="cuda.matmul"
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


# %% versions 2 and 3 tags=["exporti"] module="cuda.matmul"
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


# %% version 2, launched tags=["exporti"] module="cuda.matmul"
def _square_tiles(out, start, bias, a, b, sizes, along):
    made = _tile_kernel(16, 16, 1, *along)
    _start(made, (16, 16), 256, out, start, bias, a, b, sizes)


# %% version 2, checked and counted
check_product(_square_tiles, 9, 35, 17)
count("2", _square_tiles)

# %% [markdown]
# A sixteenth of the bytes, half a byte for an FMA, and a request for 32
# lanes now touches four sectors, all of which are used. But look at shared
# memory. Each FMA still needs two requests; they only go there now: 4,096
# for 2,048 FMAs, and 256 to write the tiles.
#
# **Version 3, register tiles.** The remedy is that of the CPU, figure 1.7.2,
# a tile in registers: a thread owns 8 by 8 outputs. A step brings 8 numbers
# of `a` and 8 of `b`, 16 loads for 64 FMAs. With 8 by 8 a block of 64
# threads covers 64 by 64 outputs, one of 256 threads 128 by 128, and each
# number from global memory is used that many times. It is the kernel above
# with other constants. In Python the sums are a small array; the compiler
# unrolls the loops over it and keeps all 64 in registers, and the tests
# look whether it did.
#
# The larger tile reads less, $8/128$ of a byte for an FMA or 32 operations
# a byte, more than the 20 of an H100; the smaller one makes 16, more than
# the 12.5 of an A100. But a GPU must have work for all its multiprocessors,
# of which an A100 has 108: a product of 256 by 768 has 12 tiles of 128, and
# 48 of 64. So the large tile is for products that have at least 108 of
# them. No result depends on the choice: each output is a sum over k in
# rising order, in every version.


# %% version 3, launched tags=["exporti"] module="cuda.matmul"
PROCESSORS = 108  # multiprocessors of an A100


def _tile_size(rows, cols):
    tiles = -(-rows // 128) * -(-cols // 128)
    return 128 if tiles >= PROCESSORS else 64


def _register_tiles(out, start, bias, a, b, sizes, along):
    tile = _tile_size(*sizes[:2])
    made, threads = _tile_kernel(tile, 8, 8, *along), tile * tile // 64
    _start(made, (tile, tile), threads, out, start, bias, a, b, sizes)


# %% version 3, checked and counted
check_product(_register_tiles, 9, 67, 17)
count("3", _register_tiles)

# %% [markdown]
# A quarter of the bytes of version 2, and shared memory is asked 576 times,
# not 4,352. Of these 512 are the reads, one for every four FMAs. In a warp
# eight lanes lie in a row of the tile; those below want the same words of
# `b`, and a word that several lanes want is served to all in one pass.
#
# **Version 4, vectors.** A load of four numbers is one instruction instead
# of four. For that a thread's eight columns must lie in fours. Eight in one
# piece would do, but a load takes four of them, and neighbouring lanes then
# begin eight numbers apart and leave out the banks between: two passes
# where one would serve. So a thread takes four columns in the left half of
# the tile and four in the right, and rows likewise.

# %% passes of eight lanes that read four numbers each
for apart, name in ((8, "eight in a piece"), (4, "four and four")):
    words = [lane * apart + i for lane in range(8) for i in range(4)]
    banks = [word % 32 for word in words]
    passes = max(banks.count(bank) for bank in banks)
    print(f"{name}: eight lanes take {passes}")

# %% draw the tiles
from llmnb.book.owners import draw_owners

fig, axes = plt.subplots(1, 2, figsize=(8.6, 4.8), dpi=100)
shades = [PALETTE[name] for name in ("blue", "green", "orange")]
places = (((0, 4.4), 1.4, 1.2), ((3, 7), 1.2, 1.4), ((3, 4.4), 1.2, 1.2))
for (corner, wide, high), shade in zip(places, shades, strict=True):
    axes[0].add_patch(plt.Rectangle(corner, wide, high, color=shade))
for corner, wide, high in (((0, 2), 1.4, 3.6), ((1.8, 7), 3.6, 1.4)):
    axes[0].add_patch(plt.Rectangle(corner, wide, high, fill=False))
for i, j in np.ndindex(3, 3):
    square = (1.8 + 1.2 * j, 2 + 1.2 * i)
    axes[0].add_patch(plt.Rectangle(square, 1.2, 1.2, fill=False))
axes[0].text(0.7, 1.5, "a", ha="center")
axes[0].text(3.6, 1.5, "out, in tiles", ha="center")
axes[0].text(3.6, 8.6, "b", ha="center")
axes[0].set(xlim=(-0.2, 5.6), ylim=(1.2, 9), aspect="equal")
axes[0].set_title("a block owns a tile")
axes[0].axis("off")
pieces = np.arange(64).reshape(8, 8)
title = "a tile of 64 by 64 in pieces of 4 by 4"
with plt.rc_context({"font.size": 7}):
    draw_owners(axes[1], np.tile(pieces, (2, 2)).tolist(), group=32)
axes[1].set_title(title)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.7.5. Left, a block needs the rows of `a` and `b` that meet in its
# tile. Right, which thread owns each piece of 4 by 4 outputs, coloured by
# warp: a thread has four pieces, 8 by 8 outputs in all, and neighbours
# read neighbouring fours.*
#
# Global memory is read by fours too. And the threads no longer wait for it:
# while a block multiplies one tile, the loads of the next are under way.
# Their numbers arrive in registers, four or eight for each factor, and go to
# a second pair of tiles in shared memory. The two pairs take turns, and one
# barrier a tile is enough: whoever passes it knows that the tile to come is
# written and that nobody reads the one before any more.


# %% fetch the next tile tags=["exporti"] module="cuda.matmul"
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


# %% put it into shared memory tags=["exporti"] module="cuda.matmul"
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


# %% by fours tags=["exporti"] module="cuda.matmul"
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


# %% version 4 tags=["exporti"] module="cuda.matmul"
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


# %% [markdown]
# Four numbers at once must begin at a multiple of 16 bytes, so every row
# that is read or written by fours must be a multiple of four numbers long,
# and the arrays must begin at such a place. GPT-2's do; otherwise version 4
# calls version 3.


# %% version 4, launched tags=["exporti"] module="cuda.matmul"
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


# %% version 4, checked and counted
check_product(_vectors, 12, 68, 20)
count("4", _vectors)

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
# Compiled for an A100 or an H100, a thread of version 4 with the tile of
# 128 takes at most 128 registers, 64 of them sums, so that two blocks of
# 256 threads fit into the 65,536 of a multiprocessor. With the tile of 64
# it takes some more, for it fetches twice as many numbers ahead, but a
# block has a quarter of the threads. Nothing is spilled, and no array is in
# memory.
#
# **The gradient of the bias**, (1.7.4), is a sum for each column. A thread a
# column reads whole sectors, for neighbours read neighbours. But 2,304
# columns make 72 warps, and one multiprocessor alone may hold 64. So the
# rows are cut into chunks of 64. A first kernel gives each chunk and column
# a thread and writes its sum to `work`; a second adds these up, chunk by
# chunk. Atomic additions would save the second kernel, and add in whatever
# order the threads come. With two kernels the order is fixed, and so is
# every bit.


# %% add up the columns tags=["exporti"] module="cuda.matmul"
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


# %% [markdown]
# The public functions check what they are given before they launch
# anything. Scratch memory is needed for the bias's gradient alone.

# %% the versions and their scratch tags=["export"] module="cuda.matmul"
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
    """
    return -(-rows // CHUNK) * OC


# %% the checks on a GPU tags=["exporti"] module="cuda.matmul"
def _check_work(name, work, floats):
    if work is not None and work.size < floats:
        raise ValueError(
            f"{name}: work must hold {floats} floats, got {work.size}"
        )


# %% the layer on a GPU, forward tags=["export"] module="cuda.matmul"
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
    """
    name = "matmul_forward"
    product = numbered(MATMUL_FORWARD, version, name)
    (B, T, C), OC = inp.shape, len(weight)
    start = None if residual is None else residual.reshape(-1)
    y, x, w = (z.reshape(-1) for z in (out, inp, weight))
    product(y, start, bias, x, w, (B * T, OC, C), (True, True))


# %% the layer on a GPU, backward tags=["export"] module="cuda.matmul"
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


# %% [markdown]
# The verdict, layer against layer, for every version:

# %% the same results from a GPU's kernels
gpu = SimpleNamespace(forward=matmul_forward, backward=matmul_backward)
p = problem(1, 9, 8, 68)
expected = results(p, reference)
for version in range(1, len(MATMUL_FORWARD) + 1):
    x, w, b, dy = map(to_device, (p.inp, p.weight, p.bias, p.dout))
    y, dx, dw, db = (empty(x.shape) for x in (p.out, p.inp, p.weight, p.bias))
    gpu.forward(y, x, w, b, version=version)
    gpu.backward(dx, dw, db, dy, x, w, False, False, version=version)
    for name, got in zip(outputs, (y, dx, dw, db), strict=True):
        label = f"{version}, {name}"
        compare(label, to_host(got), expected[name], tol=1e-5)

# %% [markdown]
# ### A library's product
#
# The last version of the ladder is as far as this chapter goes by hand. A
# library holds many kernels, for every generation of GPU, and picks one by
# the shape. NVIDIA's is cuBLASLt, and `nvmath.bindings` hands its functions
# to Python. llmnb uses it where it is installed (`pip install
# 'llmnb[cuda]'`), and does without where it is not.
#
# cuBLASLt expects matrices by columns: element $(i, j)$ at $i + j\,\mathit{ld}$,
# where $\mathit{ld}$, the *leading dimension*, is the distance between two
# columns. Ours lie by rows. But a matrix by rows and its transpose by
# columns are the same bytes, so we ask for the transpose of every product:
#
# $$ y^\top = W x^\top + b\,1^\top, \qquad
#    dx^\top = W^\top dy^\top, \qquad
#    dW^\top = x^\top dy . \tag{1.7.5} $$
#
# What the library reads by columns is $W^\top$, $x^\top$ and $dy^\top$, and
# a flag says that it should transpose one of them back. All of this can be
# written down before any GPU is asked: the flags, the three sizes, the
# three leading dimensions. We call that a *plan*. It calls the factors
# `A` and `B` and the result `D`, as the library does.

# %% imports of the library's product tags=["export"] module="cuda.cublas"
import functools
import importlib.util
from typing import NamedTuple

import numpy as np

from llmnb.gpu.launch import (
    DEVICE,
    address,
    empty,
    missing,
    stream_address,
)
from llmnb.cuda.matmul import _bias_gradient, _check_work, matmul_scratch
from llmnb.shapes import shapes


# %% a plan tags=["export"] module="cuda.cublas"
class Plan(NamedTuple):
    """A product of matrices that lie by columns: D = op(A) op(B) + beta C.

    op(A) is (m, k), op(B) is (k, n), D and C are (m, n). transa, transb:
    whether op transposes what is stored. lda, ldb, ldd: elements from one
    column to the next; C has D's. bias: whether a vector of m numbers is
    added to every column.
    """

    transa: bool
    transb: bool
    m: int
    n: int
    k: int
    lda: int
    ldb: int
    ldd: int
    bias: bool = False

    def stored(self):
        """Rows, columns and leading dimension of A, B and D as stored."""
        a = (self.k, self.m) if self.transa else (self.m, self.k)
        b = (self.n, self.k) if self.transb else (self.k, self.n)
        return (*a, self.lda), (*b, self.ldb), (self.m, self.n, self.ldd)


# %% the three plans tags=["export"] module="cuda.cublas"
def forward_plan(rows, C, OC, bias):
    """out = inp weight^T: A is weight, B is inp, D is out.

    rows: of inp (rows, C) and out (rows, OC); weight is (OC, C).
    """
    return Plan(True, False, OC, rows, C, C, C, OC, bias)


def dinp_plan(rows, C, OC):
    """dinp = dout weight: A is weight, B is dout, D is dinp."""
    return Plan(False, False, C, rows, OC, C, OC, C)


def dweight_plan(rows, C, OC):
    """dweight = dout^T inp: A is inp, B is dout, D is dweight."""
    return Plan(False, True, C, OC, rows, C, OC, C)


# %% [markdown]
# A plan is only numbers, so NumPy can carry it out on the same bytes: view
# each flat array by columns, transpose where the flag says so, multiply.
# This is how a plan is proved on a machine that has no GPU.


# %% a plan in NumPy
def carry_out(plan, a, b, d, beta=0, c=None, bias=None):
    def by_columns(x, rows, cols, ld):
        steps = x.itemsize, ld * x.itemsize
        flat = x.reshape(-1)
        return np.lib.stride_tricks.as_strided(flat, (rows, cols), steps)

    A, B, D = map(by_columns, (a, b, d), *zip(*plan.stored(), strict=True))
    product = (A.T if plan.transa else A) @ (B.T if plan.transb else B)
    if beta:
        c = d if c is None else c
        product += beta * by_columns(c, *plan.stored()[2])
    if plan.bias:
        product += bias[:, None]
    D[...] = product


# %% the three plans, proved
rows, C, OC = 7, 5, 3
x, W = rng.normal(size=(rows, C)), rng.normal(size=(OC, C))
dy, b = rng.normal(size=(rows, OC)), rng.normal(size=OC)
before = rng.normal(size=(rows, OC))
y, dx, dW = np.empty_like(dy), np.empty_like(x), np.empty_like(W)
plan = forward_plan(rows, C, OC, bias=True)
carry_out(plan, W, x, y, beta=1, c=before, bias=b)
compare("forward", y, x @ W.T + b + before, tol=1e-12)
carry_out(dinp_plan(rows, C, OC), W, dy, dx)
compare("dinp", dx, dy @ W, tol=1e-12)
carry_out(dweight_plan(rows, C, OC), x, dy, dW)
compare("dweight", dW, dy.T @ x, tol=1e-12)

# %% [markdown]
# The bias is added on the way to memory, by what the library calls an
# *epilogue*. A residual costs no pass either: it is the $C$ of
# $D = AB + \beta C$, with $\beta = 1$, and $C = D$ adds a gradient to what
# is there. The bias gradient has an epilogue as well, but it overwrites,
# and we must be able to add; it stays our own kernel of fixed order.
#
# To carry a plan out, the library wants three descriptions of matrices and
# one of the product, then a search among its kernels. All this is done once
# for each plan and kept. The kernel that is found may want memory of its
# own, a *workspace*. We offer 32 MiB, which the cuBLAS documentation, under
# `cublasSetWorkspace`, recommends for an H100's generation.
#
# One word of the description allows *TF32*: the library may then round each
# factor to 10 bits after the point instead of 23, and multiply on the
# *tensor cores*, units of a GPU for products of small matrices. The sums are
# still float32.

# %% places and numbers tags=["exporti"] module="cuda.cublas"
WORKSPACE = 8 << 20  # floats: 32 MiB
ALIGNED = 256  # bytes: the most that is claimed of an address
NOUGHT, ONE = np.zeros(1, np.float32), np.ones(1, np.float32)


class _Places(NamedTuple):
    """The addresses of a product's operands on the device."""

    a: int
    b: int
    c: int
    d: int
    bias: int

    def alignments(self):
        """Of each, the largest power of two, up to 256, that divides it."""
        return tuple(min(x & -x or ALIGNED, ALIGNED) for x in self)


# %% set an attribute tags=["exporti"] module="cuda.cublas"
def _set(what, thing, name, value):
    """Set an attribute of a description; what: "matmul_desc" or so."""
    from nvmath.bindings import cublasLt as lt

    kinds = {
        "matmul_desc": lt.MatmulDescAttribute,
        "matmul_preference": lt.MatmulPreferenceAttribute,
    }
    attribute = kinds[what][name]
    dtype = getattr(lt, f"get_{what}_attribute_dtype")(attribute)
    value = np.array([value], dtype)
    change = getattr(lt, f"{what}_set_attribute")
    change(thing, attribute, value.ctypes.data, value.nbytes)


# %% describe a plan tags=["exporti"] module="cuda.cublas"
def _describe(plan, bias, tf32):
    """A plan as the library knows it: a product and three matrices."""
    from nvmath.bindings import cublas
    from nvmath.bindings import cublasLt as lt

    kind = cublas.ComputeType
    kind = kind.COMPUTE_32F_FAST_TF32 if tf32 else kind.COMPUTE_32F
    product = lt.matmul_desc_create(kind, 0)  # 0 is float32
    _set("matmul_desc", product, "TRANSA", int(plan.transa))
    _set("matmul_desc", product, "TRANSB", int(plan.transb))
    if plan.bias:
        _set("matmul_desc", product, "EPILOGUE", int(lt.Epilogue.BIAS))
        _set("matmul_desc", product, "BIAS_POINTER", bias)
    return product, *[lt.matrix_layout_create(0, *x) for x in plan.stored()]


# %% the library itself tags=["exporti"] module="cuda.cublas"
@functools.cache
def _library():
    """The library's handle; made once, on the GPU that is current."""
    from nvmath.bindings import cublasLt as lt

    return lt.create()


# %% choose a kernel tags=["exporti"] module="cuda.cublas"
@functools.cache
def _prepared(plan, alignments, size, tf32):
    """A plan described, and the kernel that the library chose for it.

    size: bytes that the kernel may use for itself. Kept for every later
    call with operands that are aligned alike. Raises RuntimeError when the
    library knows no kernel.
    """
    from nvmath.bindings import cublasLt as lt

    # the search looks at how the bias is aligned, so it needs an address
    product, A, B, D = _describe(plan, alignments[-1], tf32)
    wish = lt.matmul_preference_create()
    _set("matmul_preference", wish, "MAX_WORKSPACE_BYTES", size)
    for name, bytes_ in zip("ABCD", alignments, strict=False):
        _set("matmul_preference", wish, f"MIN_ALIGNMENT_{name}_BYTES", bytes_)
    found = np.zeros(1, lt.matmul_heuristic_result_dtype)
    count = np.zeros(1, np.int32)
    lt.matmul_algo_get_heuristic(
        *(_library(), product, A, B, D, D, wish, 1),
        *(found.ctypes.data, count.ctypes.data),
    )
    lt.matmul_preference_destroy(wish)
    if not count[0] or found["state"][0]:
        raise RuntimeError(f"cuBLASLt has no kernel for {plan}")
    return product, A, B, D, found


# %% carry it out tags=["exporti"] module="cuda.cublas"
def _enqueue(plan, places, beta, work, tf32):
    """Enqueue D = op(A) op(B) + beta C on the current stream."""
    from nvmath.bindings import cublasLt as lt

    start = -(-address(work) // ALIGNED) * ALIGNED
    size = max(0, address(work) + work.nbytes - start)
    kept = _prepared(plan, places.alignments(), size, tf32)
    product, A, B, D, found = kept
    if plan.bias:
        _set("matmul_desc", product, "BIAS_POINTER", places.bias)
    lt.matmul(
        *(_library(), product, ONE.ctypes.data, places.a, A, places.b, B),
        *((ONE if beta else NOUGHT).ctypes.data, places.c, D, places.d, D),
        *(found.ctypes.data, start, size, stream_address()),
    )


# %% can it be had tags=["export"] module="cuda.cublas"
@functools.cache
def no_cublas():
    """Why cuBLASLt cannot multiply here; empty where it can."""
    if missing():
        return missing()
    if importlib.util.find_spec("nvmath") is None:
        return "nvmath-python is not installed: pip install 'llmnb[cuda]'"
    try:
        _library()
    except Exception as error:  # no library to load, or one that refuses
        return f"cuBLASLt does not start: {error}"
    return ""


def cublas_scratch():
    """How many floats of scratch memory cuBLASLt should be given."""
    return WORKSPACE


# %% [markdown]
# The two functions take what `matmul_forward` and `matmul_backward` take.
# This much is known of them: the plans are proved above, and cuBLASLt 13.10
# has accepted the descriptions, on a machine without a GPU. The search for a
# kernel needs a GPU, and neither it nor a product has ever run.


# %% the linear layer, forward, by cuBLASLt tags=["export"] module="cuda.cublas"
@shapes("... OC!, ... C, OC C, OC?, ... OC?~, W!?", DEVICE)
def cublas_forward(
    out, inp, weight, bias, residual=None, work=None, tf32=False
):
    """The linear layer by cuBLASLt; otherwise as cuda.matmul_forward.

    work: float32, 1-D, of `cublas_scratch()` elements or as many as there
    are, allocated when None. tf32: let the library round the factors to 10
    bits after the point and use tensor cores. Needs a GPU: raises
    RuntimeError with `no_cublas()` otherwise, and where the library has no
    kernel for the shape.
    """
    rows = _rows("cublas_forward", inp)
    _check_work("cublas_forward", work, 0)
    OC, C = weight.shape
    work = empty(WORKSPACE, like=inp) if work is None else work
    d = address(out)
    c = d if residual is None else address(residual)
    b = 0 if bias is None else address(bias)
    plan = forward_plan(rows, C, OC, bias is not None)
    places = _Places(address(weight), address(inp), c, d, b)
    _enqueue(plan, places, residual is not None, work, tf32)


# %% check the arrays tags=["exporti"] module="cuda.cublas"
def _rows(name, inp):
    """The number of rows, where the library can be had."""
    if no_cublas():
        raise RuntimeError(f"{name}: {no_cublas()}")
    return inp.size // inp.shape[-1]


# %% the linear layer, backward, by cuBLASLt tags=["export"] module="cuda.cublas"
@shapes("... C!, OC C!, OC!?, ... OC, ... C, OC C", DEVICE, work="W!?")
def cublas_backward(
    dinp, dweight, dbias, dout, inp, weight,
    add_dinp=True, add_dweight=True, work=None, tf32=False,
):  # fmt: skip
    """The linear layer's gradients by cuBLASLt; as cuda.matmul_backward.

    work, tf32, what is raised: as for `cublas_forward`. dbias is summed by
    this chapter's own kernel, in a fixed order; with it, work must also hold
    matmul_scratch(B * T, OC) elements.
    """
    rows = _rows("cublas_backward", inp)
    OC, C = weight.shape
    sums = 0 if dbias is None else matmul_scratch(rows, OC)
    _check_work("cublas_backward", work, sums)
    if work is None:
        work = empty(max(WORKSPACE, sums), like=inp)
    x, w, dy = address(inp), address(weight), address(dout)
    dx, dw = address(dinp), address(dweight)
    places = _Places(w, dy, dx, dx, 0)
    _enqueue(dinp_plan(rows, C, OC), places, add_dinp, work, tf32)
    places = _Places(x, dy, dw, dw, 0)
    _enqueue(dweight_plan(rows, C, OC), places, add_dweight, work, tf32)
    if dbias is not None:
        flat = dout.reshape(-1)
        _bias_gradient(dbias, flat, rows, add_dweight, work)


# %% [markdown]
# Where there is a GPU with cuBLASLt, this cell compares its products with
# NumPy's. Elsewhere it says what is missing:

# %% the library against NumPy tags=["nbval-ignore-output"]
if no_cublas():
    print(no_cublas())
else:
    x, w, b, dy = map(to_device, (p.inp, p.weight, p.bias, p.dout))
    y, dx, dw, db = (empty(x.shape) for x in (p.out, p.inp, p.weight, p.bias))
    cublas_forward(y, x, w, b)
    cublas_backward(dx, dw, db, dy, x, w, False, False)
    for name, got in zip(outputs, (y, dx, dw, db), strict=True):
        compare(f"cuBLASLt, {name}", to_host(got), expected[name], tol=1e-5)

# %% [markdown]
# ## Count it
#
# Each of the three products takes $2 N C \cdot OC$ operations, so a training
# step takes $6 C \cdot OC$ for each token: six operations for each weight.
# The bytes are those of the three matrices, four for each number, provided
# that each is read or written once. Their quotient is the arithmetic
# intensity, in operations a byte:
#
# $$ I = \frac{2 N C \cdot OC}{4\,(N C + C \cdot OC + N \cdot OC)}
#      = \frac{1}{2}\,
#        \frac{1}{\tfrac{1}{OC} + \tfrac{1}{N} + \tfrac{1}{C}} . \tag{1.7.6} $$
#
# The smallest of the three sizes decides. In training $N$ is the number
# of tokens in a batch; when the model writes text it is 1.

# %% the linear layers of GPT-2 124M
layers = {
    "q, k, v": (768, 2304),
    "projection": (768, 768),
    "up to 4C": (768, 3072),
    "down to C": (3072, 768),
    "logits": (768, 50304),
}


def intensity(N, C, OC):
    return 0.5 / (1 / OC + 1 / N + 1 / C)


print(f"{'':12}{'C':>6}{'OC':>7}{'MFLOP/token':>13}{'I, N=256':>10}{'N=1':>6}")
for name, (C, OC) in layers.items():
    flops = 2 * C * OC / 1e6
    high, low = intensity(256, C, OC), intensity(1, C, OC)
    print(f"{name:12}{C:6}{OC:7}{flops:13.1f}{high:10.0f}{low:6.1f}")

# %% the share of the whole model
inside = 12 * sum(2 * C * OC for C, OC in list(layers.values())[:4])
logits = 2 * 768 * 50304
mixing = 12 * 4 * 768 * 1024 / 2
total = inside + logits + mixing
print(f"blocks {inside / total:.0%}, logits {logits / total:.0%}, ", end="")
print(f"attention at T = 1024 {mixing / total:.0%} of the forward pass")

# %% [markdown]
# A machine has an intensity too: its operations a second divided by the
# bytes its memory delivers in that time. A layer with less than that waits
# for memory; a layer with more waits for arithmetic. The smaller of the two
# limits, drawn over the intensity, is called the roofline.

# %% [markdown]
# ## See it

# %% measure both sides of the roof tags=["nbval-ignore-output"]
source, target = np.ones((2, 1 << 25), np.float32)
bandwidth = 2 * source.nbytes / fastest(np.copyto, target, source, runs=5)
points = {}
for n in (1, 4, 16, 64, 256):
    p = problem(1, n, 768, 3072)
    seconds = timed(cpu.forward, p.out, p.inp, p.weight, p.bias)
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

# %% [markdown]
# *Figure 1.7.6. With one token the layer lies at the left end, where memory
# is the limit: every weight is read for a single multiplication. With the
# tokens of a batch it lies under the flat part, where arithmetic is.*
#
# A point may lie above the slope: the copy goes to main memory, while a
# weight of 9.4 MB may stay in the last-level cache from one run to the
# next.

# %% [markdown]
# ## Take away
#
# - Forward is $X W^\top + b$; backward is $dY\,W$, $dY^\top X$ and the
#   column sums of $dY$. Each of the three indices is summed once.
# - The layer saves nothing: it needs its input, and that is there already.
# - Speed comes from using a loaded number several times: twelve FMAs for
#   eight loads in registers, a panel for 144 rows in the nearest cache.
# - Packing puts the numbers in the order in which they are read, and makes
#   one inner loop of three products.
# - The sums run in one order for any number of threads.
# - A GPU uses a number again in two places, as the CPU does: a block shares
#   a tile in its memory, and a thread keeps 8 by 8 sums in registers, 64
#   FMAs for four loads of four numbers.

# %% [markdown]
# ## Design note
#
# We could have read the matrices where they lie, with one inner loop for
# sums along rows and another for sums down them: no scratch memory, no
# intrinsics, and numba in its plainest form. Such a pair of loops reaches
# rung 3, and each new use, attention's five products among them, wants its
# own. Panels cost a megabyte for each thread and a page of LLVM's language,
# once.
#
# The other choice is the layout of the weight. Stored as (C, OC), as
# OpenAI's own GPT-2 files have it, forward would be a sum of rows and the
# gradient of the input a sum along rows: packing would trade places. (OC, C)
# is what PyTorch and llm.c use, so checkpoints load without a transpose.
#
# On the GPU we cut the output only. Where the output is small and the sum
# long, as for the weight's gradient of a narrow layer, several blocks could
# share the sum of one tile, and a second kernel add up their parts, as for
# the bias. That fills a GPU that would be partly idle, takes memory for the
# parts, and makes the order of the sum depend on the number of parts.
#
# What is not fused: GELU. It could be applied in the epilogue too. On the
# machine that built this page it takes about a hundredth of a step (see
# [chapter A.8](../appendix/08_racing.ipynb)), and most of that is arithmetic, which
# fusing would not save.

# %% [markdown]
# ## Exercises
#
# **1** (★). A tile of R by S sums does R·S FMAs for R + S loads. It needs
# R·S registers for the sums, R for one factor, and one through which the
# other factor passes. Which tile with R ≤ S gets the most FMAs out of a
# load with 16 registers? With 32?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# 3 by 4 with 16 registers: 12 + 3 + 1 = 16, and 12/7 FMAs a load. With 32
# registers it is 5 by 5: 25 + 5 + 1 = 31, and 2.5 FMAs a load. Ours, 2
# vectors by 6 rows, makes 12/8. Once the loads are no longer what one waits
# for, more FMAs a load buy nothing: `LLMNB_TILE=4x3x8` is no faster than
# `6x2x8`. And 64, the width of a head, is a multiple of 16 columns but not
# of 24.
# :::


# %% exercise 1, all tiles tags=["hide-cell"]
def best_tile(registers):
    tiles = [(r, s) for s in range(1, 32) for r in range(1, s + 1)]
    fits = [(r, s) for r, s in tiles if r * s + r + 1 <= registers]
    return max(fits, key=lambda tile: tile[0] * tile[1] / sum(tile))


# %% exercise 1, checked
verdict("16 registers", best_tile(16) == (3, 4), "3 by 4")
verdict("32 registers", best_tile(32) == (5, 5), "5 by 5")

# %% [markdown]
# **2** (★★). A bias is a weight on an input that is always 1. Show that
# (1.7.4) is then a case of (1.7.3): put a channel of ones behind the input and
# the bias behind the weight, and get `dbias` out of `dweight`.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# With $x_{n,C+1} = 1$ and $W_{o,C+1} = b_o$, (1.7.1) without bias is (1.7.1)
# with bias, and (1.7.3) for $c = C + 1$ reads
# $dW_{p,C+1} = \sum_n dy_{n,p} \cdot 1$.
# :::


# %% exercise 2, the wider layer tags=["hide-cell"]
def bias_gradient(dout, inp, weight, bias):
    wide = np.concatenate([inp, np.ones_like(inp[..., :1])], axis=-1)
    wider = np.concatenate([weight, bias[:, None]], axis=-1)
    dwide, dwider = np.zeros_like(wide), np.zeros_like(wider)
    cpu.backward(dwide, dwider, None, dout, wide, wider)
    return dwider[:, -1]


# %% exercise 2, checked
compare("dbias", bias_gradient(g, inp, weight, bias), dbias, tol=1e-12)

# %% [markdown]
# **3** (★★). To adapt a trained layer cheaply, one keeps $W$ fixed and
# learns a small correction $W + V U$, with $U$ of shape (R, C), $V$ of
# shape (OC, R) and R small. Derive $dU$ and $dV$ without ever forming an
# (OC, C) matrix.
#
# :::{admonition} Solution to exercise 3
# :class: dropdown
# The correction adds $X U^\top V^\top$ to the output: two linear layers, one
# after the other. With $H = X U^\top$ of shape (N, R), (1.7.3) for the second
# gives $dV = dY^\top H$, (1.7.2) gives $dH = dY\,V$, and (1.7.3) for the first
# gives $dU = dH^\top X$.
# :::


# %% exercise 3, the gradients tags=["hide-cell"]
def correction_backward(dY, X, U, V):
    dH = dY @ V
    return dH.T @ X, dY.T @ (X @ U.T)


# %% exercise 3, checked
U, V = rng.normal(size=(2, 4)), rng.normal(size=(4, 2))


def corrected():
    cpu.forward(out, inp, weight + V @ U, bias)
    return (g * out).sum()


dU, dV = correction_backward(g.reshape(-1, 4), inp.reshape(-1, 4), U, V)
compare("dU", dU, numerical_gradient(corrected, U), tol=1e-8)
compare("dV", dV, numerical_gradient(corrected, V), tol=1e-8)

# %% [markdown]
# **4** (★★★). An AVX2 unit splits a sum into 8 sums that are added at
# the end. Does that make the result better or worse? Add $2^{20}$ float32
# numbers between 0 and 1 one after the other, then in 8 lanes, and compare
# both errors.
#
# :::{admonition} Solution to exercise 4
# :class: dropdown
# Better. A rounding error is proportional to the running sum at that
# moment. Each of 8 lanes grows to an eighth of the total, so each addition
# rounds more finely. Summing in order is among the worst ways to add.
# :::


# %% exercise 4, both sums tags=["hide-cell"]
def sum_errors(x):
    exact = x.astype(np.float64).sum()
    serial = np.cumsum(x, dtype=np.float32)[-1]
    lanes = np.cumsum(x.reshape(-1, 8), axis=0, dtype=np.float32)[-1]
    eight = np.cumsum(lanes, dtype=np.float32)[-1]
    return abs(serial - exact), abs(eight - exact)


# %% exercise 4, checked
serial, eight = sum_errors(rng.random(1 << 20).astype(np.float32))
verdict("8 lanes", eight < serial, "err less than 1")

# %% [markdown]
# **5** (★★). Tiles of R by S outputs: how many numbers does a GPU's product
# read from global memory? Compare with what the simulator counted for
# versions 2 and 3. How many operations for a byte does a tile of 128 by 64
# do, and would that suffice for an H100, were there no caches?
#
# :::{admonition} Solution to exercise 5
# :class: dropdown
# There are $N \cdot OC / (R S)$ tiles, rounded up each way, and each reads
# R rows and S columns of C numbers: $N\,C \cdot OC\,(1/R + 1/S)$ numbers.
# At four bytes a number and two operations for each of $N\,C \cdot OC$
# FMAs that is $1 / (2/R + 2/S)$ operations a byte: 21.3 for 128 by 64, just
# above the 20 of an H100. A square of the same area, 90.5, would make 22.6.
# :::


# %% exercise 5, numbers read tags=["hide-cell"]
def numbers_read(N, C, OC, R, S):
    tiles = -(-N // R) * -(-OC // S)
    return tiles * (R + S) * C


# %% exercise 5, checked
for version, side in (("2", 16), ("3", 64)):
    same = numbers_read(64, 16, 64, side, side) == counted[version].reads
    verdict(f"version {version}", same, "as counted")
per_byte = 2 * 128 * 64 * 16 / (4 * numbers_read(128, 16, 64, 128, 64))
verdict("128 by 64", 21 < per_byte < 22, "21.3 a byte")

# %% [markdown]
# ## Further reading
#
# - Goto and van de Geijn (2008),
#   [Anatomy of High-Performance Matrix Multiplication](https://doi.org/10.1145/1356052.1356053):
#   sections 4 and 5, which operand to keep in which cache, and why.
# - Williams, Waterman and Patterson (2009),
#   [Roofline](https://doi.org/10.1145/1498765.1498785): the picture of
#   figure 1.7.6 and how to read it.
# - Hu et al. (2021),
#   [LoRA](https://arxiv.org/abs/2106.09685): section 4 for the correction of
#   exercise 3 and what it saves.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.7")
