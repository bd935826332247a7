# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     module: reference.matmul
# ---

# %% [markdown]
# # Multiply by a weight matrix and differentiate it
#
# > The linear layer is one matrix product forward and two backward; nearly
# > all of GPT-2's arithmetic happens in these three.

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.diagram import gpt2_diagram

gpt2_diagram(lit="matmul")

# %% [markdown]
# *Figure 5.1. The linear layer stands four times in every block and once
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
# - turn a triple loop into one that keeps the arithmetic units busy, and
#   name what each step bought;
# - tell from a layer's shapes whether memory or arithmetic sets its speed.
#
# You need central differences from [chapter 0](00_gpt2.ipynb), the
# decorators `kernel` and `inner` from [chapter 3](03_encoder.ipynb), and
# the way a layer is laid out in [chapter 4](04_layernorm.ipynb).

# %% [markdown]
# ## Setup

# %% setup
import os
import subprocess
import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np

from llmnb.diagram import PALETTE
from llmnb.timing import fastest, machine
from llmnb.verify import compare, numerical_gradient, verdict

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
# $$ y_{n,o} = \sum_c x_{n,c}\, W_{o,c} + b_o . \tag{5.1} $$
#
# As matrices this is $Y = X W^\top + b$. The weight stands in memory as
# (OC, C), the row of an output channel in one piece. Both factors of the
# sum in (5.1) then run along memory, which will matter for speed.


# %% the linear layer, forward tags=["export"]
def matmul_forward(out, inp, weight, bias):
    """Map each row of inp to a row of out: out = inp @ weight.T + bias.

    out: (B, T, OC). inp: (B, T, C). weight: (OC, C). bias: (OC,) or None.
    All of one float dtype; out is overwritten.

    Derived in chapter 5.
    """
    out[...] = inp @ weight.T
    if bias is not None:
        out += bias


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
#    dx_{m,c} = \sum_o dy_{m,o}\, W_{o,c} . \tag{5.2} $$
#
# **The weight.** $W_{p,c}$ appears in output channel $p$ only, and there in
# every token $n$, with factor $x_{n,c}$:
#
# $$ \frac{\partial y_{n,o}}{\partial W_{p,c}}
#    = \begin{cases} x_{n,c} & o = p \\ 0 & o \ne p \end{cases}
#    \qquad \Longrightarrow \qquad
#    dW_{p,c} = \sum_n dy_{n,p}\, x_{n,c} . \tag{5.3} $$
#
# **The bias.** $b_p$ appears in output channel $p$ of every token, with
# factor 1:
#
# $$ db_p = \sum_n dy_{n,p} . \tag{5.4} $$
#
# As matrices, $dX = dY\, W$ and $dW = dY^\top X$. The shapes leave no other
# way to write them: $dW$ must be (OC, C), and of the two factors at hand,
# $dY$ with (N, OC) and $X$ with (N, C), only $dY^\top X$ sums the tokens
# away. The sum in (5.2) runs over output channels, in (5.3) over tokens, and
# in (5.1) over input channels: each of the three indices is summed once.
#
# **What to save.** (5.2) needs the weight, which is a parameter, and (5.3)
# needs $x$, which is the output of the layer below and is in memory anyway.
# The linear layer saves nothing of its own.


# %% the linear layer, backward tags=["export"]
def matmul_backward(dinp, dweight, dbias, dout, inp, weight):
    """Add the linear layer's gradients to dinp, dweight and dbias.

    dinp, inp: (B, T, C). dout: (B, T, OC). dweight, weight: (OC, C).
    dbias: (OC,), or None for a layer without bias. All of one float dtype;
    the first three are added to in place.

    Derived in chapter 5.
    """
    OC, C = weight.shape
    rows, drows = inp.reshape(-1, C), dout.reshape(-1, OC)
    dinp += dout @ weight
    dweight += drows.T @ rows
    if dbias is not None:
        dbias += drows.sum(axis=0)


# %% [markdown]
# The gradients are added, not written. In GPT-2 the matrix that computes the
# logits is also the table of token vectors of
# [chapter 3](03_encoder.ipynb): both layers put their share into the same
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
# NumPy hands `@` to a BLAS, a library of hand-tuned linear algebra, and no
# Python loop will pass it. We still write our own product, for two reasons.
# A BLAS has its own threads, which compete with numba's for the same cores.
# And it promises nothing about the order of its sums: with another number
# of threads, or another version, the last digits change. Here every element
# is summed in one fixed order, so that a training run can be repeated bit
# for bit. The BLAS serves as our yardstick.
#
# We climb in steps, on the product of GPT-2's largest inner layer, 256
# tokens of 768 channels to 3072. Every step is checked and timed on one
# thread; a product of $N$ by $C$ by $OC$ takes $2 N C \cdot OC$ operations,
# one multiplication and one addition a term.

# %% keep the NumPy versions
reference = SimpleNamespace(forward=matmul_forward, backward=matmul_backward)

# %% imports of the CPU module tags=["export"] module="cpu.matmul"
import numba

from llmnb.checks import check_array, check_float
from llmnb.cpu.jit import inner, kernel

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
# **The wrong order.** Three loops can be nested in six orders, and (5.1)
# does not say which. Suppose the innermost one walks over output channels.
# Then each step reads the weight C places further on, and of the 64 bytes
# that memory delivers at a time (a cache line), it uses four.


# %% step 1, innermost over output channels
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


# %% step 2, innermost over input channels
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
# **Nine sums at once.** Each FMA of step 2 needs two loads, and a core can
# do about as many loads as FMAs in a cycle. So it waits for data, even when
# they are in its nearest cache. Take three tokens and three output
# channels together: six loads bring what nine FMAs need. The nine running
# sums fill nine of the sixteen vector registers. They also do not depend
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
# *Figure 5.2. A tile of one sum loads two vectors for each FMA; a tile of
# three by three loads six vectors for nine.*


# %% nine sums at once tags=["exporti"] module="cpu.matmul"
@inner
def _nine_sums(out, a0, a1, a2, b0, b1, b2):
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
    out[0, 0], out[0, 1], out[0, 2] = s00, s01, s02
    out[1, 0], out[1, 1], out[1, 2] = s10, s11, s12
    out[2, 0], out[2, 1], out[2, 2] = s20, s21, s22


# %% [markdown]
# Where the sizes are no multiples of three, rows and columns are left at
# the edges. They take the plain loop of step 2.


# %% the edges tags=["exporti"] module="cpu.matmul"
@inner
def _single_sums(out, a, b):
    for i in range(a.shape[0]):
        for j in range(b.shape[0]):
            total = out.dtype.type(0)
            for k in range(a.shape[1]):
                total += a[i, k] * b[j, k]
            out[i, j] = total


# %% one block of out tags=["exporti"] module="cpu.matmul"
@inner
def _multiply_block(out, a, b):
    rows, cols = out.shape
    for i in range(0, rows, 3):
        for j in range(0, cols, 3):
            if i + 3 <= rows and j + 3 <= cols:
                _nine_sums(
                    out[i : i + 3, j : j + 3],
                    *(a[i], a[i + 1], a[i + 2]),
                    *(b[j], b[j + 1], b[j + 2]),
                )
            else:
                m, n = min(i + 3, rows), min(j + 3, cols)
                _single_sums(out[i:m, j:n], a[i:m], b[j:n])


# %% step 3, nine sums at once
climb("nine sums", _multiply_block, runs=5)

# %% [markdown]
# **Blocks.** Step 3 reads the whole weight, 9.4 MB, once for every three
# tokens. That is more than the second-level cache of a core holds (half a
# megabyte to two), so it comes from further away each time. Cut `out` into
# blocks of 48 by 48. A block needs 48 rows of each factor, 147 KB apiece
# at C = 768; they stay in the second-level cache and are used 16 times.
#
# **Threads.** Blocks are independent, so `prange` deals them out. They are
# numbered down the columns first: consecutive blocks share rows of the
# weight. The size of a block does not depend on the number of threads, and
# within a block nothing does, so no bit of the result does.

# %% the blocks tags=["exporti"] module="cpu.matmul"
BLOCK = 48  # rows and columns of out that one thread takes at a time
PANEL = 768  # columns that are added to in one sweep, see the backward pass


# %% the forward kernel tags=["exporti"] module="cpu.matmul"
@kernel
def _matmul_forward(out, inp, weight, bias):
    rows, OC = out.shape
    down, across = -(-rows // BLOCK), -(-OC // BLOCK)
    for t in numba.prange(across * down):
        j, i = t // down * BLOCK, t % down * BLOCK
        block = out[i : i + BLOCK, j : j + BLOCK]
        _multiply_block(block, inp[i : i + BLOCK], weight[j : j + BLOCK])
        if bias is not None:
            for r in range(block.shape[0]):
                for c in range(block.shape[1]):
                    block[r, c] += bias[j + c]


# %% step 4, blocks, and step 5, threads
def without_bias(out, a, w):
    _matmul_forward(out, a, w, None)


most = numba.get_num_threads()
numba.set_num_threads(1)
climb("blocks", without_bias, runs=10)
numba.set_num_threads(most)
climb("threads", without_bias, runs=10)

# %% [markdown]
# For the yardstick we time NumPy's product in a process of its own, so that
# we can tell its BLAS how many threads to use and the two pools of threads
# do not meet.


# %% the yardstick
def blas(threads):
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
one, many = blas(1), blas(most)
print(f"{machine()}\n{'':12} GFLOP/s   on the step before   share of BLAS")
before = None
for name, speed in speeds.items():
    gain = f"{speed / before:5.1f} times" if before else ""
    share = speed / (many if name == "threads" else one)
    print(f"{name:12} {speed:7.1f}   {gain:>18}   {share:13.0%}")
    before = speed
print(f"BLAS         {one:7.1f} on 1 thread, {many:.1f} on {most}")

# %% draw the ladder tags=["nbval-ignore-output"]
fig, ax = plt.subplots(figsize=(7, 3), dpi=100)
names = [*speeds, "BLAS, 1 thread", f"BLAS, {most} threads"]
values = [*speeds.values(), one, many]
shades = [PALETTE["blue"]] * len(speeds) + [PALETTE["grey"]] * 2
ax.barh(names, values, color=shades)
for i, value in enumerate(values):
    ax.text(value, i, f" {value:.1f}", va="center")
ax.invert_yaxis()
ax.set(xlabel="GFLOP/s, more is better", xlim=(0, 1.15 * max(values)))
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 5.3. The order of the loops matters most. Nine sums and blocks each
# gain on the step before, and bring a page of Python into the range of a
# tuned library (grey).*

# %% [markdown]
# The public function checks its arguments and views (B, T, ·) as rows:


# %% the linear layer, forward tags=["export"] module="cpu.matmul"
def matmul_forward(out, inp, weight, bias):
    """Map each row of inp to a row of out: out = inp @ weight.T + bias.

    out: (B, T, OC). inp: (B, T, C). weight: (OC, C). bias: (OC,) or None.
    All float32 or all float64 and C-contiguous; out is overwritten. Raises
    TypeError or ValueError before it computes anything.

    Derived in chapter 5.
    """
    _check("matmul_forward", inp, weight, out=out)
    OC, C = weight.shape
    if bias is not None:
        check_array("matmul_forward: bias", bias, (OC,), inp.dtype)
    _matmul_forward(out.reshape(-1, OC), inp.reshape(-1, C), weight, bias)


# %% the checks tags=["exporti"] module="cpu.matmul"
def _check(name, inp, weight, **outs):
    check_float(f"{name}: inp", inp)
    check_float(f"{name}: weight", weight)
    if inp.ndim != 3:
        raise ValueError(
            f"{name}: inp must have shape (B, T, C), got {inp.shape}"
        )
    if weight.ndim != 2:
        raise ValueError(
            f"{name}: weight must have shape (OC, C), got {weight.shape}"
        )
    B, T, C = inp.shape
    OC = weight.shape[0]
    check_array(f"{name}: inp", inp, (B, T, C), inp.dtype)
    check_array(f"{name}: weight", weight, (OC, C), inp.dtype)
    for label, array in outs.items():
        check_array(f"{name}: {label}", array, (B, T, OC), inp.dtype)


# %% [markdown]
# **The two products of the backward pass** have another shape. Written as
# `out += a @ b`, the sum in (5.2) and (5.3) runs *down the rows* of `b`, and
# the sums of step 3 would read memory in strides. But along a row of `b`
# memory is in order, so we turn the loops around: a row of `out` is a sum
# of rows of `b`, each times one number of `a`,
#
# $$ \mathrm{out}_i \mathrel{+}= \sum_k a_{i,k}\, b_k . \tag{5.5} $$
#
# The vectors now lie along the columns $j$, and one FMA does 8 columns. The
# trouble moves to `out`: each FMA would load and store a piece of it. As
# before, taking several at once helps. Three rows of `out` and four terms
# of the sum together make twelve FMAs out of seven loads and three stores.


# %% three rows, four terms tags=["exporti"] module="cpu.matmul"
@inner
def _add_terms(out, a, b, i, k, cols):
    x, y, z = out[i, cols], out[i + 1, cols], out[i + 2, cols]
    b0, b1, b2, b3 = b[k, cols], b[k + 1, cols], b[k + 2, cols], b[k + 3, cols]
    p, q, r = i, i + 1, i + 2
    p0, p1, p2, p3 = a[p, k], a[p, k + 1], a[p, k + 2], a[p, k + 3]
    q0, q1, q2, q3 = a[q, k], a[q, k + 1], a[q, k + 2], a[q, k + 3]
    r0, r1, r2, r3 = a[r, k], a[r, k + 1], a[r, k + 2], a[r, k + 3]
    for j in range(x.size):
        s, t, u = x[j], y[j], z[j]
        s += p0 * b0[j]
        t += q0 * b0[j]
        u += r0 * b0[j]
        s += p1 * b1[j]
        t += q1 * b1[j]
        u += r1 * b1[j]
        s += p2 * b2[j]
        t += q2 * b2[j]
        u += r2 * b2[j]
        s += p3 * b3[j]
        t += q3 * b3[j]
        u += r3 * b3[j]
        x[j], y[j], z[j] = s, t, u


# %% [markdown]
# A thread owns 48 rows of `out` and sweeps them in panels of at most 768
# columns. For one set of four terms it goes down all its rows, so the four
# pieces of `b`, 12 KB, stay in the first-level cache. What is left over at
# the edges is added term by term. For the gradient of the weight, `a` is
# `dout` transposed: a view, no copy, since `a` is read one number at a
# time anyway.


# %% add a product tags=["exporti"] module="cpu.matmul"
@inner
def _add_panel(out, a, b, first, last, cols):
    terms = a.shape[1]
    threes, fours = last - (last - first) % 3, terms - terms % 4
    for k in range(0, fours, 4):
        for i in range(first, threes, 3):
            _add_terms(out, a, b, i, k, cols)
    for i in range(first, last):
        x = out[i, cols]
        for k in range(fours if i < threes else 0, terms):
            factor, y = a[i, k], b[k, cols]
            for j in range(x.size):
                x[j] += factor * y[j]


@kernel
def _add_product(out, a, b):
    rows, width = out.shape
    for t in numba.prange(-(-rows // BLOCK)):
        first, last = t * BLOCK, min(rows, (t + 1) * BLOCK)
        for j in range(0, width, PANEL):
            cols = slice(j, min(width, j + PANEL))
            _add_panel(out, a, b, first, last, cols)


# %% add the columns up tags=["exporti"] module="cpu.matmul"
@kernel
def _add_columns(dbias, dout):
    rows, OC = dout.shape
    for t in numba.prange(-(-OC // BLOCK)):
        total = dbias[t * BLOCK : (t + 1) * BLOCK]
        for n in range(rows):
            row = dout[n, t * BLOCK : (t + 1) * BLOCK]
            for j in range(total.size):
                total[j] += row[j]


# %% the linear layer, backward tags=["export"] module="cpu.matmul"
def matmul_backward(dinp, dweight, dbias, dout, inp, weight):
    """Add the linear layer's gradients to dinp, dweight and dbias.

    dinp, inp: (B, T, C). dout: (B, T, OC). dweight, weight: (OC, C).
    dbias: (OC,), or None for a layer without bias. All float32 or all
    float64 and C-contiguous; the first three are added to in place. Raises
    TypeError or ValueError before it computes anything.

    Derived in chapter 5.
    """
    name = "matmul_backward"
    _check(name, inp, weight, dout=dout)
    OC, C = weight.shape
    check_array(f"{name}: dinp", dinp, inp.shape, inp.dtype)
    check_array(f"{name}: dweight", dweight, (OC, C), inp.dtype)
    if dbias is not None:
        check_array(f"{name}: dbias", dbias, (OC,), inp.dtype)
    drows = dout.reshape(-1, OC)
    _add_product(dinp.reshape(-1, C), drows, weight)
    _add_product(dweight, drows.T, inp.reshape(-1, C))
    if dbias is not None:
        _add_columns(dbias, drows)


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
# The backward pass of the large layer against the BLAS of the yardstick,
# in the same units:

# %% the backward pass, measured tags=["nbval-ignore-output"]
p = problem(1, N, C, OC)
seconds = fastest(backward, p, cpu, runs=10)
speed = 4 * N * C * OC / seconds / 1e9
print(f"{machine()}, {most} threads")
print(f"backward {speed:.1f} GFLOP/s, {speed / many:.0%} of BLAS")

# %% [markdown]
# It falls behind the forward pass because of its stores: sums that stay in
# registers beat sums that go back to the cache after every four terms.

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
#        \frac{1}{\tfrac{1}{OC} + \tfrac{1}{N} + \tfrac{1}{C}} . \tag{5.6} $$
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
    args = p.out, p.inp, p.weight, p.bias
    cpu.forward(*args)
    seconds = fastest(cpu.forward, *args, runs=10)
    points[n] = intensity(n, 768, 3072), 2 * n * 768 * 3072 / seconds / 1e9
print(f"copy {bandwidth / 1e9:.1f} GB/s, BLAS {many:.0f} GFLOP/s")
for n, (i, speed) in points.items():
    roof = min(many, i * bandwidth / 1e9)
    print(f"N = {n:3}: I = {i:5.1f}, roof {roof:6.1f}, measured {speed:6.1f}")

# %% draw the roofline tags=["nbval-ignore-output"]
fig, ax = plt.subplots(figsize=(7, 3.8), dpi=100)
i = np.geomspace(0.25, 512, 100)
roof = np.minimum(many, i * bandwidth / 1e9)
ax.loglog(i, roof, color=PALETTE["ink"], label="roof: copy and BLAS")
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
# *Figure 5.4. With one token the layer lies at the left end, where memory
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
# - Speed comes from using a loaded number several times: nine sums for six
#   loads in registers, 48 rows for one read in cache.
# - The sums run in one order for any number of threads.

# %% [markdown]
# ## Design note
#
# Tuned libraries first copy both factors into a buffer, in the order in
# which the innermost loop will read them. Then every load is the next one in
# memory, whatever the strides of the matrices, and the same inner loop
# serves all three products. The price is the buffer, the copying, and code
# for both. Here we read the matrices where they lie: no memory beyond the
# tensors themselves, and two short inner loops, one for sums along rows and
# one for sums of rows.
#
# The other choice is the layout of the weight. Stored as (C, OC), as
# OpenAI's own GPT-2 files have it, forward would be a sum of rows and the
# gradient of the input a sum along rows: the two inner loops would trade
# places. (OC, C) is what PyTorch and llm.c use, so checkpoints load without
# a transpose.

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
# registers it is 5 by 5: 25 + 5 + 1 = 31, and 2.5 FMAs a load. We chose
# 3 by 3 all the same: it leaves three registers over, and a compiler uses
# them to load ahead. When registers run out it moves sums to memory and
# back, and each such sum then waits for its store in every step.
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
# (5.4) is then a case of (5.3): put a channel of ones behind the input and
# the bias behind the weight, and get `dbias` out of `dweight`.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# With $x_{n,C+1} = 1$ and $W_{o,C+1} = b_o$, (5.1) without bias is (5.1)
# with bias, and (5.3) for $c = C + 1$ reads
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
# after the other. With $H = X U^\top$ of shape (N, R), (5.3) for the second
# gives $dV = dY^\top H$, (5.2) gives $dH = dY\,V$, and (5.3) for the first
# gives $dU = dH^\top X$.
# :::


# %% exercise 3, the gradients tags=["hide-cell"]
def correction_backward(dY, X, U, V):
    dH = dY @ V
    return dH.T @ X, dY.T @ (X @ U.T)


# %% exercise 3, checked
U, V = rng.normal(size=(2, 4)), rng.normal(size=(4, 2))


def corrected():
    matmul_forward(out, inp, weight + V @ U, bias)
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
# ## Further reading
#
# - Goto and van de Geijn (2008),
#   [Anatomy of High-Performance Matrix Multiplication](https://doi.org/10.1145/1356052.1356053):
#   sections 4 and 5, which operand to keep in which cache, and why.
# - Williams, Waterman and Patterson (2009),
#   [Roofline](https://doi.org/10.1145/1498765.1498785): the picture of
#   figure 5.4 and how to read it.
# - Hu et al. (2021),
#   [LoRA](https://arxiv.org/abs/2106.09685): section 4 for the correction of
#   exercise 3 and what it saves.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.index import gained

gained("05_matmul")
