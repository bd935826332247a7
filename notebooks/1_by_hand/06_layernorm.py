# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       reference.layernorm: "LayerNorm in NumPy, forward and backward."
#       cpu.layernorm: "LayerNorm, compiled for the processor's cores."
#       cuda.layernorm: "LayerNorm on a GPU, forward and backward."
# ---

# %% [markdown]
# # Normalise a layer and differentiate it
#
# > LayerNorm gives every token's vector mean 0 and variance 1, then scales
# > and shifts each channel; its backward pass takes two sums a row.

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="layernorm")

# %% [markdown]
# *Figure 1.6.1. LayerNorm stands before attention, before the feed-forward
# half of every block, and once more before the logits: 2L + 1 times.*
#
# A token's vector passes through many layers, and each of them may stretch
# it or move it away from zero. LayerNorm undoes that: it brings each vector
# to a standard size before the next layer reads it. This chapter builds
# `layernorm_forward` and `layernorm_backward`. At its end you can
#
# - compute a LayerNorm by hand and name what it cannot change;
# - derive its gradient without matrices, and say why two sums a row suffice;
# - say what the forward pass must save, and why two numbers a row do;
# - write it as a compiled loop that reads each row from memory once;
# - give its rows to the threads of a GPU, and show the race of two sums that
#   share one piece of memory.
#
# You need central differences from [chapter 1.4](04_gpt2.ipynb), the
# `kernel` decorator from [chapter 1.5](05_encoder.ipynb), and for the GPU
# the simulator from [chapter 3.1](../3_gpu/01_threads.ipynb).

# %% [markdown]
# ## Setup

# %% setup
from types import SimpleNamespace

import matplotlib.pyplot as plt

from llmnb.book.diagram import PALETTE
from llmnb.timing import fastest, machine
from llmnb.book.verify import compare, numerical_gradient, verdict

# %% imports tags=["export"]
import numpy as np

from llmnb.shapes import shapes

# %% the seed
rng = np.random.default_rng(4)

# %% [markdown]
# ## By hand
#
# Take two tokens with three channels each, $x_0 = (1, 2, 3)$ and
# $x_1 = (0, 10, 20)$. The first has mean 2 and squared distances from it
# 1, 0, 1, so its variance is $2/3$ (divided by the number of channels, not
# by one less) and its standard deviation $0.8165$. Subtract, divide:
# $(-1.2247, 0, 1.2247)$. The second row is the first one times ten, moved
# by ten. Its mean is 10, its deviation $8.165$, and the result is the same
# three numbers. LayerNorm is blind to the scale and to the offset of a row.

# %% two rows by hand
x = np.array([[1.0, 2.0, 3.0], [0.0, 10.0, 20.0]])
centred = x - x.mean(axis=1, keepdims=True)
deviation = np.sqrt((centred**2).mean(axis=1, keepdims=True))
print(np.round(centred / deviation, 4) + 0.0)

# %% [markdown]
# | tensor | shape | what it holds |
# |---|---|---|
# | `inp`, `out` | (B, T, C) | C numbers for each of the B·T tokens |
# | `mean`, `rstd` | (B, T) | the row's mean and one over its deviation |
# | `weight`, `bias` | (C,) | a learned scale and shift for each channel |
#
# Below, one row is one token: $x_i$ is its channel $i$, and $C$ the number
# of channels. Rows never meet, so what holds for one holds for all.

# %% [markdown]
# ## Forward
#
# The mean and the variance of a row are
#
# $$ \mu = \frac1C \sum_i x_i , \qquad
#    v = \frac1C \sum_i (x_i - \mu)^2 . \tag{1.6.1} $$
#
# A row whose channels are all equal has $v = 0$, and dividing by its
# deviation would fail. A small $\epsilon = 10^{-5}$ under the root prevents
# that. We keep the *reciprocal* deviation, because multiplying is cheaper
# than dividing:
#
# $$ r = \frac{1}{\sqrt{v + \epsilon}} , \qquad
#    \hat x_i = (x_i - \mu)\, r . \tag{1.6.2} $$
#
# Every row now has mean 0 and, but for $\epsilon$, variance 1. That may be too
# strict: a layer may want one channel large and another near 3. So each
# channel gets a learned scale $w_i$ and shift $b_i$:
#
# $$ y_i = w_i \hat x_i + b_i . \tag{1.6.3} $$

# %% epsilon tags=["exporti"]
EPS = 1e-5


# %% layernorm, forward tags=["export"]
@shapes("B T C!, B T!, B T!, B T C, C, C")
def layernorm_forward(out, mean, rstd, inp, weight, bias):
    """Normalise each row of inp, then scale and shift each channel.

    out, inp: (B, T, C). mean, rstd: (B, T), the mean and the reciprocal
    deviation of each row, saved for the backward pass. weight, bias: (C,).
    All of one float dtype; out, mean and rstd are overwritten.
    """
    mean[...] = inp.mean(axis=-1)
    centred = inp - mean[..., None]
    variance = (centred**2).mean(axis=-1)
    rstd[...] = 1 / np.sqrt(variance + EPS)
    out[...] = centred * rstd[..., None] * weight + bias


# %% [markdown]
# The caller brings the arrays, outputs first, and the function fills them.
# No layer of this book allocates its result: [chapter 1.13](13_memory.ipynb)
# has laid all of them out beforehand.

# %% the two rows through the function
y, mean, rstd = np.empty((1, 2, 3)), np.empty((1, 2)), np.empty((1, 2))
layernorm_forward(y, mean, rstd, x[None], np.ones(3), np.zeros(3))
print("mean", mean)
print("rstd", np.round(rstd, 4))
compare("by hand", y[0], centred / deviation, tol=1e-4)

# %% [markdown]
# The tolerance is loose because of $\epsilon$, which the hand calculation
# left out. The rows below have deviations near 100, beside which $\epsilon$ is
# nothing, and their outcome has mean 0 and deviation 1:

# %% any rows come out alike
wild = rng.normal(5, 100, (2, 4, 768))
y, mean, rstd = np.empty_like(wild), np.empty((2, 4)), np.empty((2, 4))
layernorm_forward(y, mean, rstd, wild, np.ones(768), np.zeros(768))
compare("row means", y.mean(axis=-1), np.zeros((2, 4)), tol=1e-12)
compare("row deviations", y.std(axis=-1), np.ones((2, 4)), tol=1e-8)

# %% [markdown]
# ## Backward, derived
#
# The loss $\mathcal L$ depends on $y$; the layers above hand us
# $dy_i = \partial \mathcal L / \partial y_i$. We owe three gradients: $dw$,
# $db$ and $dx$. The first two follow from (1.6.3) at once. One $w_i$ serves
# every row, so its gradient sums over all rows $n$:
#
# $$ dw_i = \sum_n dy_{n,i}\, \hat x_{n,i} , \qquad
#    db_i = \sum_n dy_{n,i} . \tag{1.6.4} $$
#
# And within one row, by (1.6.3) again,
#
# $$ d\hat x_i = w_i\, dy_i . \tag{1.6.5} $$
#
# For $dx$ we walk (1.6.2) and (1.6.1) backwards. An input $x_j$ reaches the loss
# by three roads: directly through $\hat x_j$, through the mean, and through
# the variance. Take the intermediates one at a time, the last computed
# first.
#
# **The reciprocal deviation.** $r$ enters every $\hat x_i$:
#
# $$ dr = \sum_i d\hat x_i\, (x_i - \mu) . \tag{1.6.6} $$
#
# **The variance.** From $r = (v + \epsilon)^{-1/2}$ follows
# $\partial r / \partial v = -\tfrac12 (v + \epsilon)^{-3/2}
# = -\tfrac12 r^3$, so
#
# $$ dv = -\tfrac12\, r^3\, dr
#       = -\tfrac12\, r^2 \sum_i d\hat x_i\, \hat x_i . \tag{1.6.7} $$
#
# The second form used $(x_i - \mu)\, r = \hat x_i$.
#
# **The mean.** $\mu$ enters each $\hat x_i$ with factor $-r$, and it enters
# $v$ with
# $\partial v / \partial \mu = -\tfrac2C \sum_i (x_i - \mu) = 0$, because
# distances from the mean sum to nothing. One term is left:
#
# $$ d\mu = -r \sum_i d\hat x_i . \tag{1.6.8} $$
#
# **The input.** $x_j$ enters $\hat x_j$ with factor $r$, enters $v$ with
# factor $\tfrac2C (x_j - \mu)$, and enters $\mu$ with factor $\tfrac1C$:
#
# $$ dx_j = r\, d\hat x_j + \tfrac2C (x_j - \mu)\, dv
#         + \tfrac1C\, d\mu . \tag{1.6.9} $$
#
# Put (1.6.7) and (1.6.8) in, use $(x_j - \mu)\, r = \hat x_j$ once more, and
# take $r$ outside:
#
# $$ dx_j = r \Bigl( d\hat x_j
#         - \underbrace{\tfrac1C \textstyle\sum_i d\hat x_i}_{a}
#         - \hat x_j\, \underbrace{\tfrac1C \textstyle\sum_i
#           d\hat x_i\, \hat x_i}_{b} \Bigr) . \tag{1.6.10} $$
#
# Two means of the row, $a$ and $b$, and one pass to write. Read it as
# geometry: the gradient loses its component along the constant vector
# ($a$) and its component along $\hat x$ itself ($b$). It had to. Moving a
# row along these two directions shifts it or stretches it, and LayerNorm
# is blind to both.
#
# **What to save.** (1.6.10) needs $\hat x$, which is $(x - \mu)\, r$. The
# input $x$ is in memory anyway, because it is the output of the layer
# below. Two numbers a row, $\mu$ and $r$, rebuild $\hat x$; storing
# $\hat x$ itself would cost $C$ numbers a row.


# %% layernorm, backward tags=["export"]
@shapes("B T C!, C!, C!, B T C, B T C, C, B T, B T")
def layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd):
    """Add LayerNorm's gradients to dinp, dweight and dbias.

    dinp, dout, inp: (B, T, C). dweight, dbias, weight: (C,). mean, rstd:
    (B, T), as the forward pass left them. All of one float dtype; the first
    three are added to in place.
    """
    norm = (inp - mean[..., None]) * rstd[..., None]
    dweight += (dout * norm).sum(axis=(0, 1))
    dbias += dout.sum(axis=(0, 1))
    dnorm = dout * weight
    a = dnorm.mean(axis=-1, keepdims=True)
    b = (dnorm * norm).mean(axis=-1, keepdims=True)
    dinp += rstd[..., None] * (dnorm - a - norm * b)


# %% [markdown]
# The gradients are *added*, not written. The vector that LayerNorm reads is
# also read by the residual connection around it, so its gradient is a sum
# of two contributions, and whoever comes second must not erase the first.

# %% [markdown]
# ## Proof
#
# Choose a fixed random array $g$ and let $\mathcal L = \sum g \cdot y$.
# Then $dy = g$ exactly, and the gradient of $\mathcal L$ by central
# differences must agree with our three. We work in float64 with step
# $h = 10^{-5}$; the method's error is of the order $h^2 = 10^{-10}$, so a
# tolerance of $10^{-8}$ leaves room for rounding and none for a mistake.

# %% a problem to differentiate
B, T, C = 2, 3, 5
inp, g = rng.normal(size=(2, B, T, C))
weight, bias = rng.normal(size=(2, C))
out, mean, rstd = np.empty((B, T, C)), np.empty((B, T)), np.empty((B, T))


def loss():
    layernorm_forward(out, mean, rstd, inp, weight, bias)
    return (g * out).sum()


# %% our gradients
def gradients(backward):
    grads = [np.zeros_like(a) for a in (inp, weight, bias)]
    loss()
    backward(*grads, g, inp, weight, mean, rstd)
    return grads


dinp, dweight, dbias = gradients(layernorm_backward)

# %% against central differences
compare("dinp", dinp, numerical_gradient(loss, inp), tol=1e-8)
compare("dweight", dweight, numerical_gradient(loss, weight), tol=1e-8)
compare("dbias", dbias, numerical_gradient(loss, bias), tol=1e-8)

# %% [markdown]
# A proof that cannot fail proves nothing. Suppose someone forgets that the
# variance depends on $x$ and drops $b$ from (1.6.10). The formula still looks
# plausible. The test says otherwise, and so does the geometry: without $b$
# the gradient has a component along $\hat x$.


# %% a gradient made wrong on purpose
def without_variance(dinp, dweight, dbias, dout, inp, weight, mean, rstd):
    dnorm = dout * weight
    a = dnorm.mean(axis=-1, keepdims=True)
    dinp += rstd[..., None] * (dnorm - a)


wrong, _, _ = gradients(without_variance)
try:
    compare("dinp, no b", wrong, numerical_gradient(loss, inp), tol=1e-8)
    caught = False
except AssertionError:
    caught = True
verdict("the mistake", caught, "is caught")

# %% the two blind directions
norm = (inp - mean[..., None]) * rstd[..., None]
zeros = np.zeros((B, T))
compare("along ones", dinp.sum(axis=-1), zeros, tol=1e-12)
compare("along norm", (dinp * norm).sum(axis=-1), zeros, tol=1e-4)

# %% [markdown]
# The first is zero up to rounding. The second is zero but for $\epsilon$,
# which makes LayerNorm a little less than blind to scale.

# %% [markdown]
# ## Fast on a CPU
#
# NumPy runs (1.6.1) to (1.6.3) as eight separate operations on whole arrays, the
# copy into `out` among them. Most of them write a whole temporary, which the
# next one reads again. For B·T = 1024 rows of 768 channels an array takes
# 3 MB, more than a core keeps in its nearest caches, so much of the work is
# moving data. A compiled loop does all the work on one row while the row,
# 3 KB, sits in the first-level cache.
#
# The CPU functions take the same names as the NumPy ones, so we keep those
# at hand under `reference`.

# %% keep the NumPy versions
reference = SimpleNamespace(
    forward=layernorm_forward, backward=layernorm_backward
)

# %% imports of the CPU module tags=["export"] module="cpu.layernorm"
import math

import numba
import numpy as np

from llmnb.cpu.jit import arguments, share, team
from llmnb.shapes import shapes

# %% [markdown]
# One row is one unit of work. Rows are independent, so the threads share them
# out; inside a row the loops are plain, and LLVM turns them into vector
# instructions. The variance is summed from $x_i - \mu$ in
# a second sweep over the row: the one-sweep formula
# $\overline{x^2} - \mu^2$ subtracts two large numbers and loses digits, and
# the second sweep costs little because the row is in cache.

# %% the forward kernel tags=["exporti"] module="cpu.layernorm"
EPS = 1e-5


@team
def _layernorm_forward(part, parts, address):
    out, mean, rstd, inp, weight, bias = arguments(address)
    rows, C = inp.shape
    number = inp.dtype.type
    zero, one, size, eps = number(0), number(1), number(C), number(EPS)
    mine = share(rows, part, parts)
    for n in range(mine.start, mine.stop):
        total = squares = zero
        for i in range(C):
            total += inp[n, i]
        mu = total / size
        for i in range(C):
            squares += (inp[n, i] - mu) * (inp[n, i] - mu)
        r = one / math.sqrt(squares / size + eps)
        for i in range(C):
            out[n, i] = (inp[n, i] - mu) * r * weight[i] + bias[i]
        mean[n] = mu
        rstd[n] = r


# %% [markdown]
# Every constant takes the array's own dtype, the zeros too. A bare `1e-5`
# is a float64, and numba makes float64 of a float32 divided by an integer
# as well; either would pull the whole row into float64, of which a vector
# register holds half as many, and with other rounding.
#
# We write `inp[n, i]` and take no view `x = inp[n]` of the row. A view
# would be shorter to read and longer to compile: numba makes an array of
# it, with code that counts its owners.
#
# The public function has the line of the reference above it, and views the
# (B, T, C) arrays as rows.


# %% layernorm, forward tags=["export"] module="cpu.layernorm"
@shapes("B T C!, B T!, B T!, B T C, C, C")
def layernorm_forward(out, mean, rstd, inp, weight, bias):
    """Normalise each row of inp, then scale and shift each channel.

    out, inp: (B, T, C). mean, rstd: (B, T), the mean and the reciprocal
    deviation of each row, saved for the backward pass. weight, bias: (C,).
    All float32 or all float64 and C-contiguous; out, mean and rstd are
    overwritten. Raises TypeError or ValueError before it computes anything.
    """
    C = inp.shape[-1]
    rows = [a.reshape(-1, C) for a in (out, inp)]
    _layernorm_forward(
        rows[0], mean.reshape(-1), rstd.reshape(-1), rows[1], weight, bias
    )


# %% [markdown]
# The backward pass has two shapes of work. $dx$ is again one row at a time.
# $dw$ and $db$ sum over rows, and if each thread added into the same
# $dw_i$, additions would be lost, and their order, with it the last bits,
# would change from run to run. We could turn the work around and give each
# thread a block of channels to sum down all rows. But that reads both
# arrays a second time, and in short pieces, which memory serves slowly.
#
# Instead we cut the rows into parts. A part has its own row of sums, which
# stays in the first-level cache while $dx$, $dw$ and $db$ are computed from
# a row in passing; in the end the sums of all parts are added. How many
# parts there are follows from the number of rows, never from the number of
# threads: 16 rows in each, 64 parts at most. So every sum is taken in one
# fixed order, whatever the number of threads.


# %% the backward kernel tags=["exporti"] module="cpu.layernorm"
@team
def _layernorm_backward(part, parts, address):
    dinp, dw, db, dout, inp, weight, mean, rstd = arguments(address)
    (rows, C), number = inp.shape, inp.dtype.type
    mine, zero, size = share(len(dw), part, parts), number(0), number(C)
    for k in range(mine.start, mine.stop):
        some = share(rows, k, len(dw))
        for n in range(some.start, some.stop):
            mu, r = mean[n], rstd[n]
            a = b = zero
            for i in range(C):
                dnorm = dout[n, i] * weight[i]
                a += dnorm
                b += dnorm * (inp[n, i] - mu) * r
            a /= size
            b /= size
            for i in range(C):
                norm = (inp[n, i] - mu) * r
                dinp[n, i] += r * (dout[n, i] * weight[i] - a - norm * b)
            for i in range(C):
                dw[k, i] += dout[n, i] * (inp[n, i] - mu) * r
                db[k, i] += dout[n, i]


# %% [markdown]
# The sums of the parts are the one thing that this layer allocates: up to
# $64 \cdot 2\,C$ numbers, which are gone when it returns.


# %% layernorm, backward tags=["export"] module="cpu.layernorm"
@shapes("B T C!, C!, C!, B T C, B T C, C, B T, B T")
def layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd):
    """Add LayerNorm's gradients to dinp, dweight and dbias.

    dinp, dout, inp: (B, T, C). dweight, dbias, weight: (C,). mean, rstd:
    (B, T), as the forward pass left them. All float32 or all float64 and
    C-contiguous; the first three are added to in place. Raises TypeError or
    ValueError before it computes anything.
    """
    C = inp.shape[-1]
    dx, dy, x = (a.reshape(-1, C) for a in (dinp, dout, inp))
    sums = np.zeros((2, min(64, -(-len(x) // 16)), C), inp.dtype)
    stats = mean.reshape(-1), rstd.reshape(-1)
    _layernorm_backward(dx, *sums, dy, x, weight, *stats)
    dweight += sums[0].sum(axis=0)
    dbias += sums[1].sum(axis=0)


# %% [markdown]
# The verdict, on the problem of the proof and on a larger one in float32,
# whose sizes divide nothing:

# %% the same gradients from the kernels
for name, got, want in zip(
    ("dinp", "dweight", "dbias"),
    gradients(layernorm_backward),
    (dinp, dweight, dbias),
    strict=True,
):
    compare(name, got, want, tol=1e-12)


# %% a problem of any size and dtype
def problem(B, T, C, dtype=np.float32):
    p = SimpleNamespace()
    p.inp, p.dout = rng.normal(size=(2, B, T, C)).astype(dtype)
    p.weight, p.bias = rng.normal(size=(2, C)).astype(dtype)
    p.out, p.dinp = np.zeros((2, B, T, C), dtype)
    p.dweight, p.dbias = np.zeros((2, C), dtype)
    p.mean, p.rstd = np.zeros((2, B, T), dtype)
    return p


def forward_and_backward(p, layer):
    layer.forward(p.out, p.mean, p.rstd, p.inp, p.weight, p.bias)
    layer.backward(
        p.dinp, p.dweight, p.dbias, p.dout, p.inp, p.weight, p.mean, p.rstd
    )


# %% float32, odd sizes
cpu = SimpleNamespace(forward=layernorm_forward, backward=layernorm_backward)
p = problem(3, 37, 331)
forward_and_backward(p, cpu)
got = {k: getattr(p, k).copy() for k in ("out", "dinp", "dweight", "dbias")}
for name in got:
    getattr(p, name)[...] = 0
forward_and_backward(p, reference)
for name in got:
    compare(name, got[name], getattr(p, name), tol=1e-5)

# %% [markdown]
# The sums are said to have a fixed order. Then one thread must find the same
# bits as all of them:

# %% one thread and all threads
for name in got:
    getattr(p, name)[...] = 0
threads = numba.get_num_threads()
numba.set_num_threads(1)
forward_and_backward(p, cpu)
numba.set_num_threads(threads)
same = all(np.array_equal(got[name], getattr(p, name)) for name in got)
verdict("one thread", same, "the same bits")

# %% [markdown]
# And a shape that does not fit is refused before any kernel runs:

# %% a shape that does not fit
try:
    layernorm_forward(p.out, p.mean, p.rstd, p.inp, p.weight[:5], p.bias)
except ValueError as error:
    print(error)

# %% [markdown]
# Now the time. Both versions do the same work on the same arrays, in turn;
# we take the fastest of several runs, because other programs can only slow
# a run down.

# %% NumPy against the kernels tags=["nbval-ignore-output"]
p = problem(4, 256, 768)
slow, fast = (
    fastest(forward_and_backward, p, reference),
    fastest(forward_and_backward, p, cpu),
)
print(f"{machine()}, {numba.get_num_threads()} threads")
print(f"NumPy  {slow * 1e3:7.2f} ms")
print(f"numba  {fast * 1e3:7.2f} ms, {slow / fast:.1f} times as fast")

# %% [markdown]
# ## On a GPU
#
# The compiled loops left the layer bound by memory: about one operation a
# byte, as the next section counts. On a GPU it is the same layer. New is
# the question which thread touches which element, because memory serves
# a warp's 32 threads at once, in sectors of 32 bytes
# ([chapter 3.1](../3_gpu/01_threads.ipynb)). The forward pass must read `inp` and write
# `out`, 8 bytes an element, for 8 operations; the backward pass must read
# `inp`, `dout` and `dinp` and write `dinp`, 16 bytes for 17 operations.
# Every sector beyond that is waste, and the simulator counts sectors.
#
# No GPU has run these kernels yet. Their results come from the simulator,
# and tests compile them for two generations, `sm_80` (the A100's) and
# `sm_90` (the H100's), and look at the machine code: no double precision, no
# register spilled to memory, vector loads where the text claims them. So
# this section states no times: `llmnb bench --backend cuda --kernels`
# measures them where there is a GPU, and the results page shows what was
# measured.

# %% what a GPU section needs
from llmnb.gpu.launch import simulated, to_device, to_host
from llmnb.gpu.simulator import RaceError, watch
from llmnb.gpu.warp import block_sum
from llmnb.book.owners import draw_owners

# %% imports of the GPU module tags=["export"] module="cuda.layernorm"
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
from llmnb.gpu.warp import warp_sum
from llmnb.shapes import shapes

# %% [markdown]
# Rows are independent, so rows are what threads can share out. Three ways to
# do so are in the figure; each is a version below.

# %% who owns what, forward
lanes = np.arange(16)
fig, axes = plt.subplots(3, 1, figsize=(6, 5.6), dpi=100)
for ax, title, owner in (
    (axes[0], "1: a thread a row", 0 * lanes),
    (axes[1], "2: a warp a row", lanes % 4),
    (axes[2], "3 and 4: a warp a row, four channels a lane", lanes // 4),
):
    step = 1 if title.startswith("1") else 4
    who = [[step * n + k for k in owner] for n in range(4)]
    draw_owners(ax, who, title, step, rows="rows", cols="channels")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.6.2. The threads that own the elements of four rows, with warps of
# 4 threads drawn in place of 32; a colour is a warp, but in the first
# panel a thread. At any moment each thread reads the leftmost element that
# it has not read yet: in the first panel these lie a row apart, in the
# others side by side.*

# %% [markdown]
# ### Version 1: a thread a row
#
# The shortest way from the CPU to a GPU: the loop over rows goes, and
# thread $n$ does what its body did for row $n$.

# %% constants of the GPU module tags=["exporti"] module="cuda.layernorm"
EPS32 = np.float32(1e-5)  # a Python float would be float64
LANES = 32  # threads of a warp


def _blocks(n, size):
    return -(-n // size)


# %% a thread a row, the kernel tags=["exporti"] module="cuda.layernorm"
@kernel(launch_bounds=128)
def _forward_thread(out, mean, rstd, inp, weight, bias):
    n = cuda.grid(1)
    rows, C = inp.shape
    if n >= rows:
        return
    size, total, squares = np.float32(C), np.float32(0), np.float32(0)
    for i in range(C):
        total += inp[n, i]
    mu = total / size
    for i in range(C):
        away = inp[n, i] - mu
        squares += away * away
    r = np.float32(1) / math.sqrt(squares / size + EPS32)
    for i in range(C):
        out[n, i] = (inp[n, i] - mu) * r * weight[i] + bias[i]
    mean[n] = mu
    rstd[n] = r


# %% a thread a row, the launch tags=["exporti"] module="cuda.layernorm"
def _thread_a_row(out, mean, rstd, inp, weight, bias):
    grid = _blocks(len(inp), 128)
    _forward_thread[grid, 128](out, mean, rstd, inp, weight, bias)


# %% [markdown]
# Like the functions for the CPU, those for the GPU take the NumPy names, and
# we test each version as soon as it stands. `problem` makes the arrays; the
# reference fills its own, and a version fills copies on the device.


# %% what a version is called
def title(version):
    return version.__name__.strip("_").replace("_", " ")


# %% arrays on the device, as rows
def on_device(p, place=to_device):
    return {k: place(v) for k, v in vars(p).items()}


def rows_of(d):
    """The forward arguments, (B, T, C) as rows and (B, T) flat."""
    C = d["inp"].shape[-1]
    three = [d[k].reshape(-1, C) for k in ("out", "inp")]
    flat = d["mean"].reshape(-1), d["rstd"].reshape(-1)
    return three[0], *flat, three[1], d["weight"], d["bias"]


# %% the verdict on a forward version
def forward_verdict(version, *shape):
    p = problem(*shape)
    d = on_device(p)
    version(*rows_of(d))
    reference.forward(p.out, p.mean, p.rstd, p.inp, p.weight, p.bias)
    print(f"{title(version)}, {shape[-1]} channels")
    for k in ("out", "mean", "rstd"):
        compare(k, to_host(d[k]), getattr(p, k), tol=1e-5)


forward_verdict(_thread_a_row, 3, 11, 37)

# %% [markdown]
# What does it move? A function that runs a version on the simulator, whether
# or not there is a GPU, and prints what `watch` counted for 32 rows of 256
# channels. The least number of sectors is 2,048: $32 \cdot 256$ numbers
# of `inp` and as many of `out`, eight to a sector.

# %% what a forward version moves
row_of_counts = "{:<16}{:>9}{:>9}{:>12}{:>10}".format
q = problem(2, 16, 256)


def count_forward(*versions):
    print(row_of_counts("", "requests", "sectors", "bytes read", "exchanges"))
    for version in versions:
        with watch() as seen:
            version(*rows_of(on_device(q, simulated)))
        moved = seen.requests, seen.sectors, seen.read_bytes
        print(row_of_counts(title(version), *moved, seen.exchanges))


count_forward(_thread_a_row)

# %% [markdown]
# Sixteen times the least. (Exchanges are the calls of warp operations, of
# which there are none yet.) Each request of a warp asks for one element in
# each of 32 rows, which lie in 32 sectors, and uses 4 of the 32 bytes of
# each. A cache may keep the rest until it is wanted, in the next seven
# steps. But it would have to keep a sector for every thread, and a
# multiprocessor may hold 64 warps: that is 64 KB. And with B·T = 1024 rows,
# only 1024 threads have work.
#
# ### Version 2: a warp a row
#
# Let the 32 lanes of a warp share a row: lane $l$ takes the channels
# $l, l + 32, l + 64, \dots$ A request then asks for 32 neighbours, 128
# bytes in 4 sectors, and uses them all. There are as many requests as
# before, with 4 sectors each in place of 32, and 32 times as many threads.
# The price: a sum over the row is now spread over the lanes, and `warp_sum`
# gathers it in five exchanges, without memory and without a barrier. Two
# sums a row make ten exchanges a lane.


# %% a warp a row, the kernel tags=["exporti"] module="cuda.layernorm"
@kernel(launch_bounds=256)
def _forward_warp(out, mean, rstd, inp, weight, bias):
    n, lane = cuda.grid(1) // 32, cuda.threadIdx.x % 32
    rows, C = inp.shape
    if n >= rows:  # the whole warp leaves, so exchanges stay complete
        return
    size, total, squares = np.float32(C), np.float32(0), np.float32(0)
    for i in range(lane, C, 32):
        total += inp[n, i]
    mu = warp_sum(total) / size
    for i in range(lane, C, 32):
        away = inp[n, i] - mu
        squares += away * away
    r = np.float32(1) / math.sqrt(warp_sum(squares) / size + EPS32)
    for i in range(lane, C, 32):
        out[n, i] = (inp[n, i] - mu) * r * weight[i] + bias[i]
    if lane == 0:
        mean[n] = mu
        rstd[n] = r


# %% a warp a row, the launch tags=["exporti"] module="cuda.layernorm"
def _warp_a_row(out, mean, rstd, inp, weight, bias):
    grid = _blocks(len(inp), 256 // LANES)
    _forward_warp[grid, 256](out, mean, rstd, inp, weight, bias)


# %% version 2, verdict and counts
forward_verdict(_warp_a_row, 3, 11, 37)
count_forward(_thread_a_row, _warp_a_row)

# %% [markdown]
# The sectors fall to less than a fifth. Six accesses for each element are
# left, where two would do: `inp` three times, `weight`, `bias` and `out`.
# In version 1, a lane's `weight[i]` was that of all other lanes too, one
# sector for the warp; here each warp reads the whole of `weight` and
# `bias`. They are the same 2 C numbers for every row, so a cache has them;
# the requests remain.
#
# ### Version 3: four channels a request
#
# A request has its own cost: an instruction, an address for each lane, a
# place in the queue to memory. A lane can ask for 16 bytes as easily as for
# 4. With `load4`, a warp's request is for 512 bytes in 16 sectors: the
# sectors stay as many, and four requests become one. It needs rows that
# begin at multiples of 16 bytes, so $C$ must be a multiple of 4 and the
# arrays must begin at one; otherwise the host function falls back to
# version 2.


# %% sums and outputs in fours tags=["exporti"] module="cuda.layernorm"
@device
def _deviations(mu, a, b, c, d):
    """The squared distances of four numbers from mu, added."""
    a, b, c, d = a - mu, b - mu, c - mu, d - mu
    return (a * a + b * b) + (c * c + d * d)


@device
def _write_four(out, at, weight, bias, i, mu, r, a, b, c, d):
    """Normalise four channels from i on and store them at `at`."""
    w0, w1, w2, w3 = load4(weight, i)
    b0, b1, b2, b3 = load4(bias, i)
    a, b = (a - mu) * r * w0 + b0, (b - mu) * r * w1 + b1
    c, d = (c - mu) * r * w2 + b2, (d - mu) * r * w3 + b3
    store4(out, at, a, b, c, d)


# %% vectors of four, the kernel tags=["exporti"] module="cuda.layernorm"
@kernel(launch_bounds=256)
def _forward_vector(out, mean, rstd, inp, weight, bias):
    n, lane = cuda.grid(1) // 32, cuda.threadIdx.x % 32
    rows, C = inp.shape
    if n >= rows:
        return
    size, total, squares = np.float32(C), np.float32(0), np.float32(0)
    for i in range(4 * lane, C, 128):
        a, b, c, d = load4(inp, n * C + i)
        total += (a + b) + (c + d)
    mu = warp_sum(total) / size
    for i in range(4 * lane, C, 128):
        a, b, c, d = load4(inp, n * C + i)
        squares += _deviations(mu, a, b, c, d)
    r = np.float32(1) / math.sqrt(warp_sum(squares) / size + EPS32)
    for i in range(4 * lane, C, 128):
        a, b, c, d = load4(inp, n * C + i)
        _write_four(out, n * C + i, weight, bias, i, mu, r, a, b, c, d)
    if lane == 0:
        mean[n] = mu
        rstd[n] = r


# %% vectors of four, the launch tags=["exporti"] module="cuda.layernorm"
def _vector_a_row(out, mean, rstd, inp, weight, bias):
    rows, C = inp.shape
    if C % 4 or not aligned(out, inp, weight, bias):
        _warp_a_row(out, mean, rstd, inp, weight, bias)
        return
    grid = _blocks(rows, 256 // LANES)
    _forward_vector[grid, 256](out, mean, rstd, inp, weight, bias)


# %% version 3, verdict and counts
forward_verdict(_vector_a_row, 3, 11, 36)
forward_verdict(_vector_a_row, 1, 5, 37)
count_forward(_warp_a_row, _vector_a_row)

# %% [markdown]
# Wherever channels are read or written, one request stands for four. Those
# for `mean` and `rstd` stay, and so do the exchanges, for each lane still
# has one sum.
#
# ### Version 4: the row stays at hand
#
# What is left is the row itself, read three times. The first time it comes
# from memory, and after that from a cache, if other rows have not pushed it
# out. What is put into shared memory stays there. A warp copies its row
# while it adds it up, and reads the copy for the variance and for the
# output, so that `inp` is read once.
#
# A lane reads back only what it wrote itself. So nothing has to be ordered
# between threads, and there is no barrier.
#
# How much shared memory? numba wants the size as a constant, and a block of
# 4 warps that holds 4 rows of $C$ numbers takes $16\,C$ bytes. An array of
# constant size may have 48 KB on any of NVIDIA's GPUs, hence rows of at most
# 3,072 channels. But the more a block takes, the fewer blocks find room on a
# multiprocessor. So we make a kernel for each multiple of 256 channels:
# GPT-2's 768 channels take 12 KB a block, and the 1,600 of its largest model
# are rounded up to 1,792 and take 28 KB. Longer rows fall back to version 3.

# %% kept rows, the kernel tags=["exporti"] module="cuda.layernorm"
KEPT_ROWS = 4  # rows, and warps, of a block
MOST_KEPT = 3072  # channels: four such rows fill 48 KB


@functools.cache
def _forward_kept(room):
    """The kernel for rows of at most `room` channels."""
    floats = KEPT_ROWS * room

    @kernel(launch_bounds=128)
    def forward_kept(out, mean, rstd, inp, weight, bias):
        kept = cuda.shared.array(floats, np.float32, alignment=16)
        n, lane = cuda.grid(1) // 32, cuda.threadIdx.x % 32
        rows, C = inp.shape
        if n >= rows:
            return
        at = cuda.threadIdx.x // 32 * room  # this warp's row in `kept`
        size, total, squares = np.float32(C), np.float32(0), np.float32(0)
        for i in range(4 * lane, C, 128):
            a, b, c, d = load4(inp, n * C + i)
            store4(kept, at + i, a, b, c, d)
            total += (a + b) + (c + d)
        mu = warp_sum(total) / size
        for i in range(4 * lane, C, 128):
            a, b, c, d = load4(kept, at + i)
            squares += _deviations(mu, a, b, c, d)
        r = np.float32(1) / math.sqrt(warp_sum(squares) / size + EPS32)
        for i in range(4 * lane, C, 128):
            a, b, c, d = load4(kept, at + i)
            _write_four(out, n * C + i, weight, bias, i, mu, r, a, b, c, d)
        if lane == 0:
            mean[n] = mu
            rstd[n] = r

    return forward_kept


# %% kept rows, the launch tags=["exporti"] module="cuda.layernorm"
def _kept_a_row(out, mean, rstd, inp, weight, bias):
    rows, C = inp.shape
    fours = C % 4 == 0 and aligned(out, inp, weight, bias)
    if not fours or C > MOST_KEPT:
        _vector_a_row(out, mean, rstd, inp, weight, bias)
        return
    grid, block = _blocks(rows, KEPT_ROWS), KEPT_ROWS * LANES
    forward = _forward_kept(_blocks(C, 256) * 256)
    forward[grid, block](out, mean, rstd, inp, weight, bias)


# %% version 4, verdict and counts
forward_verdict(_kept_a_row, 3, 11, 36)
forward_verdict(_kept_a_row, 1, 5, 37)
count_forward(_vector_a_row, _kept_a_row)

# %% [markdown]
# A third of the sectors is gone: `inp` comes once and `out` goes once,
# 2,048 sectors. Nearly all of the rest is `weight` and `bias`, read for each
# row: the same few kilobytes every time, which a cache can hold.
#
# The public function checks the arrays, then runs a version, the best
# unless told otherwise.


# %% layernorm, forward tags=["export"] module="cuda.layernorm"
# from a thread a row to rows kept in shared memory; see chapter 1.6
LAYERNORM_FORWARD = _thread_a_row, _warp_a_row, _vector_a_row, _kept_a_row


@shapes("B T C!, B T!, B T!, B T C, C, C", DEVICE)
def layernorm_forward(out, mean, rstd, inp, weight, bias, version=4):
    """Normalise each row of inp, then scale and shift each channel.

    out, inp: (B, T, C). mean, rstd: (B, T), the mean and the reciprocal
    deviation of each row, saved for the backward pass. weight, bias: (C,).
    All float32 on a device and C-contiguous; out, mean and rstd are
    overwritten. version: a rung of the chapter's ladder, 1 to 4. Version 3
    needs C % 4 == 0 and arrays that begin at multiples of 16 bytes, version
    4 also C <= 3072; where that does not hold, a lower one runs. Raises
    TypeError or ValueError before it computes anything.
    """
    name = "layernorm_forward"
    forward = numbered(LAYERNORM_FORWARD, version, name)
    rows, C = mean.size, len(weight)
    flat = mean.reshape(rows), rstd.reshape(rows)
    rows_in, rows_out = inp.reshape(rows, C), out.reshape(rows, C)
    forward(rows_out, *flat, rows_in, weight, bias)


# %% [markdown]
# The public function, on (B, T, C), and a shape that does not fit:

# %% layernorm_forward on a device
p = problem(3, 7, 64)
d = on_device(p)
names = "out", "mean", "rstd", "inp", "weight", "bias"
layernorm_forward(*(d[k] for k in names))
reference.forward(*(getattr(p, k) for k in names))
compare("out", to_host(d["out"]), p.out, tol=1e-5)
try:
    layernorm_forward(*(d[k] for k in names[:-1]), d["bias"][:5])
except ValueError as error:
    print(error)

# %% [markdown]
# ### A block a row, and a race
#
# Why stop at a warp? With few rows a whole block might share one: more
# threads, each with less to do. Then warps must add up among themselves, in
# shared memory: each warp's first lane writes its sum into a table, a
# barrier, and every thread reads the table. It looks complete.


# %% a block's sum in a hurry
@device
def hasty_sum(value, parts):
    value = warp_sum(value)
    if cuda.threadIdx.x % 32 == 0:
        parts[cuda.threadIdx.x // 32] = value
    cuda.syncthreads()
    total = np.float32(0)
    for i in range(cuda.blockDim.x // 32):
        total += parts[i]
    return total


# %% rows normalised by blocks
def block_a_row(add):
    @kernel
    def normalised(out, inp):
        parts = cuda.shared.array(32, np.float32)
        n, C, zero = cuda.blockIdx.x, inp.shape[1], np.float32(0)
        total, squares, size = zero, zero, np.float32(C)
        for i in range(cuda.threadIdx.x, C, cuda.blockDim.x):
            total += inp[n, i]
        mu = add(total, parts) / size
        for i in range(cuda.threadIdx.x, C, cuda.blockDim.x):
            away = inp[n, i] - mu
            squares += away * away
        r = np.float32(1) / math.sqrt(add(squares, parts) / size + EPS32)
        for i in range(cuda.threadIdx.x, C, cuda.blockDim.x):
            out[n, i] = (inp[n, i] - mu) * r

    return normalised


# %% [markdown]
# The kernel asks for two sums, so the table is used twice. The result is
# right:

# %% right, this time
p = problem(1, 3, 150)
ones, nil = np.ones(150, np.float32), np.zeros(150, np.float32)
reference.forward(p.out, p.mean, p.rstd, p.inp, ones, nil)
x = simulated(p.inp[0])
y = empty((3, 150), like=x)
block_a_row(hasty_sum)[3, 64](y, x)
compare("hasty_sum", to_host(y), p.out[0], tol=1e-5)

# %% [markdown]
# The simulator let the warps take turns. Nothing obliges a GPU to. The first
# warp may read the table, compute its squares and write its second sum into
# `parts[0]`, all before the second warp has read the first sum from there.
# `watch` needs no bad luck to see it. It asks whether a barrier stands
# between the two accesses:

# %% the race, seen
try:
    with watch():
        block_a_row(hasty_sum)[3, 64](y, x)
    caught = False
except RaceError as error:
    caught = True
    print(error)
verdict("the race", caught, "is caught")

# %% [markdown]
# The repair is a second barrier, after the reading, as in chapter 3.1's
# `block_sum`: now all have read before any may go on to write.

# %% the race, repaired
with watch() as seen:
    block_a_row(block_sum)[3, 64](y, x)
compare("block_sum", to_host(y), p.out[0], tol=1e-5)
print(seen.barriers // seen.threads, "barriers for each thread, a row")

# %% [markdown]
# Four barriers a row, at each of which the whole block waits for its slowest
# warp. A warp a row has none, which is why the ladder stopped there. But
# remember the table that is used again: the backward pass will need a
# block for each row, and finds a way with one barrier.

# %% [markdown]
# ### Backward, version 1: atomics
#
# Backward has the two shapes of work that it had on the CPU. $dx$ goes row
# by row, so a warp takes a row again: one sweep for the sums $a$ and $b$ of
# (1.6.10), a second one to write. $dw$ and $db$ sum over rows, across all
# warps. The shortest way is an atomic addition, which nobody can interrupt:
# no addition is lost.


# %% the sums of a row tags=["exporti"] module="cuda.layernorm"
@device
def _two_means(n, lane, dout, inp, weight, mu, r):
    """a and b of (1.6.10) for row n, in every lane of a warp."""
    C = inp.shape[1]
    a, b, size = np.float32(0), np.float32(0), np.float32(C)
    for i in range(lane, C, 32):
        dnorm = dout[n, i] * weight[i]
        a += dnorm
        b += dnorm * ((inp[n, i] - mu) * r)
    return warp_sum(a) / size, warp_sum(b) / size


# %% backward with atomics, the kernel tags=["exporti"] module="cuda.layernorm"
@kernel(launch_bounds=256)
def _backward_atomic(dinp, dweight, dbias, dout, inp, weight, mean, rstd):
    n, lane = cuda.grid(1) // 32, cuda.threadIdx.x % 32
    rows, C = inp.shape
    if n >= rows:
        return
    mu, r = mean[n], rstd[n]
    a, b = _two_means(n, lane, dout, inp, weight, mu, r)
    for i in range(lane, C, 32):
        norm, dy = (inp[n, i] - mu) * r, dout[n, i]
        dinp[n, i] += r * (dy * weight[i] - a - norm * b)
        cuda.atomic.add(dweight, i, dy * norm)
        cuda.atomic.add(dbias, i, dy)


# %% backward with atomics, the launch tags=["exporti"] module="cuda.layernorm"
def _atomic_sums(dinp, dweight, dbias, dout, inp, weight, mean, rstd, table):
    grid = _blocks(len(inp), 256 // LANES)
    _backward_atomic[grid, 256](
        dinp, dweight, dbias, dout, inp, weight, mean, rstd
    )


# %% [markdown]
# The last argument is memory for sums on their way, of which this version
# has no need. The next ones will have; we fix its size here, so that all
# versions can be called alike.


# %% room for sums on their way tags=["export"] module="cuda.layernorm"
def _parts(rows):
    """Into how many parts the rows are cut for dweight and dbias."""
    return min(512, _blocks(rows, 4))


def layernorm_scratch(rows, C):
    """How many floats layernorm_backward wants to work in.

    rows: B * T, cut into at most 512 parts; there are two sums for each
    part and channel.
    """
    return _parts(rows) * 2 * C


# %% the verdict on a backward version
def backward_arguments(d):
    """Rows and flat arrays, as a version wants them, and a table."""
    rows, C = d["mean"].size, d["weight"].size
    x = {k: d[k].reshape(rows, C) for k in ("dinp", "dout", "inp")}
    stats = d["mean"].reshape(rows), d["rstd"].reshape(rows)
    sums = x["dinp"], d["dweight"], d["dbias"]
    table = empty(layernorm_scratch(rows, C), like=d["inp"])
    return *sums, x["dout"], x["inp"], d["weight"], *stats, table


def backward_verdict(version, *shape):
    p = problem(*shape)
    p.dinp += 1  # gradients are added: start from something
    reference.forward(p.out, p.mean, p.rstd, p.inp, p.weight, p.bias)
    d = on_device(p)
    version(*backward_arguments(d))
    names = "dinp", "dweight", "dbias"
    rest = p.dout, p.inp, p.weight, p.mean, p.rstd
    reference.backward(*(getattr(p, k) for k in names), *rest)
    print(f"{title(version)}, {shape[-1]} channels")
    for k in names:
        compare(k, to_host(d[k]), getattr(p, k), tol=1e-5)


backward_verdict(_atomic_sums, 3, 11, 37)

# %% what a backward version moves
line = "{:<13}{:>9}{:>8}{:>10}{:>8}{:>9}{:>9}".format


def count_backward(*versions):
    heads = "requests", "sectors", "exchanges", "atomics", "barriers"
    print(line("", *heads, "launches"))
    for version in versions:
        with watch() as seen:
            version(*backward_arguments(on_device(q, simulated)))
        moved = seen.requests, seen.sectors, seen.exchanges
        told = seen.atomics, seen.barriers, len(seen.launches)
        print(line(title(version), *moved, *told))


count_backward(_atomic_sums)

# %% [markdown]
# Right, but on a GPU not the same twice. Atomics come in the order in which
# warps happen to run, and a sum in floating point depends on its order, so the
# last bits of $dw$ and $db$ change from run to run, and two equal runs of a
# training drift apart. Besides, all rows queue up at the same $2\,C$
# addresses: one atomic for each element of `dout`, and another. $dx$ has
# neither fault, since one warp owns a row.
#
# ### Backward, version 2: sums in a fixed order
#
# The remedy is the CPU's: cut the rows into parts, give each part its own
# row in a table of sums, and add the table in the end, always in the same
# order. There is a part for every 4 rows, up to 512 parts; as on the CPU,
# the number follows from the number of rows alone. Part $p$ of $P$ has the
# rows $p, p + P, p + 2P, \dots$ The table has a row of $2\,C$ numbers for
# each part, $dw$ and then $db$. It takes three launches, because no barrier
# reaches beyond a block; the next kernel starts when the last has ended, and
# that is the barrier.
#
# 1. `_backward_rows` writes $dx$, a warp a row, as before.
# 2. `_backward_parts` sums down the rows. A block has 4 warps, 32 channels
#    and one part: each lane its channel, each warp every fourth row of the
#    part. The 4 sums of a channel meet in shared memory.
# 3. `_add_table` sums down the table in the same manner, with up to 16
#    warps a block, and adds the outcome to $dw$ and $db$.


# %% dx alone tags=["exporti"] module="cuda.layernorm"
@kernel(launch_bounds=256)
def _backward_rows(dinp, dout, inp, weight, mean, rstd):
    n, lane = cuda.grid(1) // 32, cuda.threadIdx.x % 32
    rows, C = inp.shape
    if n >= rows:
        return
    mu, r = mean[n], rstd[n]
    a, b = _two_means(n, lane, dout, inp, weight, mu, r)
    for i in range(lane, C, 32):
        norm = (inp[n, i] - mu) * r
        dinp[n, i] += r * (dout[n, i] * weight[i] - a - norm * b)


# %% the sums of a part tags=["exporti"] module="cuda.layernorm"
@kernel(launch_bounds=128)
def _backward_parts(table, dout, inp, mean, rstd):
    tile = cuda.shared.array((2, 4, 32), np.float32)
    warp, lane = cuda.threadIdx.x // 32, cuda.threadIdx.x % 32
    rows, C = inp.shape
    i = cuda.blockIdx.x * 32 + lane
    part, parts = cuda.blockIdx.y, cuda.gridDim.y
    dw, db = np.float32(0), np.float32(0)
    if i < C:
        for n in range(part + warp * parts, rows, 4 * parts):
            dy = dout[n, i]
            dw += dy * ((inp[n, i] - mean[n]) * rstd[n])
            db += dy
    tile[0, warp, lane], tile[1, warp, lane] = dw, db
    cuda.syncthreads()
    if warp < 2 and i < C:  # warp 0 adds up dw, warp 1 db
        total = np.float32(0)
        for k in range(4):
            total += tile[warp, k, lane]
        table[(2 * part + warp) * C + i] = total


# %% the sums of the table tags=["exporti"] module="cuda.layernorm"
@kernel(launch_bounds=512)
def _add_table(dweight, dbias, table, parts):
    tile = cuda.shared.array((16, 32), np.float32)
    warp, lane = cuda.threadIdx.x // 32, cuda.threadIdx.x % 32
    warps = cuda.blockDim.x // 32
    C, j = dweight.shape[0], cuda.blockIdx.x * 32 + lane
    total = np.float32(0)
    if j < 2 * C:
        for k in range(warp, parts, warps):
            total += table[k * 2 * C + j]
    tile[warp, lane] = total
    cuda.syncthreads()
    if warp == 0 and j < 2 * C:
        total = np.float32(0)
        for k in range(warps):
            total += tile[k, lane]
        if j < C:
            dweight[j] += total
        else:
            dbias[j - C] += total


def _add_parts(dweight, dbias, table, parts):
    grid = _blocks(2 * len(dweight), LANES)
    block = LANES * min(16, parts)
    _add_table[grid, block](dweight, dbias, table, parts)


# %% sums of parts, the launches tags=["exporti"] module="cuda.layernorm"
def _sums_of_parts(dinp, dweight, dbias, dout, inp, weight, mean, rstd, table):
    rows, C = inp.shape
    parts = _parts(rows)
    grid = _blocks(rows, 256 // LANES)
    _backward_rows[grid, 256](dinp, dout, inp, weight, mean, rstd)
    grid = _blocks(C, LANES), parts
    _backward_parts[grid, 128](table, dout, inp, mean, rstd)
    _add_parts(dweight, dbias, table, parts)


# %% version 2, verdict and counts
backward_verdict(_sums_of_parts, 3, 11, 37)
count_backward(_atomic_sums, _sums_of_parts)

# %% [markdown]
# No atomics, and a fixed order. The sectors seem to rise, because those of
# the 16,384 atomics are not counted. The two kernels that take rows read
# `inp` and `dout` three times between them, twice for $dx$ and once for the
# sums.
#
# ### Backward, version 3: every row once
#
# What would it take to read a row once? Someone must hold `inp` and `dout`
# of the whole row while the sums $a$ and $b$ are found, then use them for
# $dx$, and in passing for $dw$ and $db$, and still know $dw$ and $db$ when
# the next row comes. A warp could, in registers: with $C = 1600$, each lane
# would have 50 channels and four numbers for each, 200 registers of the
# 255 that a thread may have. That is too tight. With a block for a row, each
# thread has *four* channels, one vector: `inp`, `dout`, `dinp`, `weight`,
# $dw$ and $db$ of it are 24 registers, however long the row. Then there are
# addresses and whatever else the compiler keeps at hand. A multiprocessor
# has 65,536 registers. We let a block have up to 512 threads, which leaves
# 128 for each and serves rows of up to 2,048 channels.

# %% who owns what, backward
channels = np.arange(16) // 4
fig, axes = plt.subplots(1, 2, figsize=(8, 3), dpi=100)
who = [[4 * (n % 3) + t for t in channels] for n in range(7)]
draw_owners(
    axes[0], who, "dx: blocks take rows in turn", 4, "rows", "channels"
)
who = [[4 * part + t for t in channels] for part in range(3)]
draw_owners(axes[1], who, "table, dw: a row a part", 4, "parts", "channels")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.6.3. Seven rows in three parts, a block of 4 threads for each; a
# colour is a block. A thread keeps to its four channels while its block goes
# down the rows of the part, so it can sum $dw$ and $db$ in registers and
# write to the table once.*
#
# The sums $a$ and $b$ now cross warps, by way of a table in shared memory,
# for every row anew. That is the race of above, and asks for a second
# barrier. There are *two* tables here instead, used in turn. The barrier of
# row $n$ stands between writing table 0 and reading it. Who writes table 0
# next, for row $n + 2$, has passed the barrier of row $n + 1$, and to that
# one every thread comes only after it has read table 0. So the one barrier a
# row orders both. (In these two sentences row $n + 1$ is the next one of the
# part.)


# %% sums of two over a block tags=["exporti"] module="cuda.layernorm"
@device
def _block_sums(a, b, tables, turn):
    """a and b summed over the block, in every thread.

    tables: shared, (2, 2, 32). turn: 0 and 1 from call to call, so that one
    barrier is enough.
    """
    a, b = warp_sum(a), warp_sum(b)
    if cuda.threadIdx.x % 32 == 0:
        tables[turn, 0, cuda.threadIdx.x // 32] = a
        tables[turn, 1, cuda.threadIdx.x // 32] = b
    cuda.syncthreads()
    a, b, lane = np.float32(0), np.float32(0), cuda.threadIdx.x % 32
    if lane < cuda.blockDim.x // 32:
        a, b = tables[turn, 0, lane], tables[turn, 1, lane]
    return warp_sum(a), warp_sum(b)


# %% four channels of a row tags=["exporti"] module="cuda.layernorm"
@device
def _load_row(x, dy, dx, inp, dout, dinp, at):
    """Three vectors of a row, all asked for before any is needed."""
    x[0], x[1], x[2], x[3] = load4(inp, at)
    dy[0], dy[1], dy[2], dy[3] = load4(dout, at)
    dx[0], dx[1], dx[2], dx[3] = load4(dinp, at)


@device
def _add_four(dw, db, x, dy, w, mu, r):
    """Normalise x, add to dw and db; return this thread's part of a and b."""
    a, b = np.float32(0), np.float32(0)
    for k in range(4):
        x[k] = (x[k] - mu) * r
        dw[k] += dy[k] * x[k]
        db[k] += dy[k]
        a += dy[k] * w[k]
        b += dy[k] * w[k] * x[k]
    return a, b


# %% a block a row, the kernel tags=["exporti"] module="cuda.layernorm"
@kernel(launch_bounds=512)
def _backward_block(dinp, table, dout, inp, weight, mean, rstd):
    tables = cuda.shared.array((2, 2, 32), np.float32)
    x = cuda.local.array(4, np.float32)  # of a row: inp, then normalised
    dy = cuda.local.array(4, np.float32)
    dx = cuda.local.array(4, np.float32)
    w = cuda.local.array(4, np.float32)
    dw = cuda.local.array(4, np.float32)
    db = cuda.local.array(4, np.float32)
    (rows, C), turn = inp.shape, 0
    i, part, size = 4 * cuda.threadIdx.x, cuda.blockIdx.x, np.float32(C)
    mine = i < C  # the last warp may hold threads with no channels
    for k in range(4):
        w[k] = dw[k] = db[k] = np.float32(0)
    if mine:
        w[0], w[1], w[2], w[3] = load4(weight, i)
    for n in range(part, rows, cuda.gridDim.x):
        a, b, r = np.float32(0), np.float32(0), rstd[n]
        if mine:
            _load_row(x, dy, dx, inp, dout, dinp, n * C + i)
            a, b = _add_four(dw, db, x, dy, w, mean[n], r)
        a, b = _block_sums(a, b, tables, turn)
        turn = 1 - turn
        if mine:
            a, b = a / size, b / size
            for k in range(4):
                dx[k] += r * (dy[k] * w[k] - a - x[k] * b)
            store4(dinp, n * C + i, dx[0], dx[1], dx[2], dx[3])
    if mine:
        at = 2 * part * C + i
        store4(table, at, dw[0], dw[1], dw[2], dw[3])
        store4(table, at + C, db[0], db[1], db[2], db[3])


# %% a block a row, the launches tags=["exporti"] module="cuda.layernorm"
MOST_THREADS = 512  # of a block; each has four channels


def _rows_once(dinp, dweight, dbias, dout, inp, weight, mean, rstd, table):
    rows, C = inp.shape
    fours = C % 4 == 0 and aligned(dinp, dout, inp, weight, table)
    if not fours or C > 4 * MOST_THREADS:
        _sums_of_parts(
            dinp, dweight, dbias, dout, inp, weight, mean, rstd, table
        )
        return
    parts, block = _parts(rows), _blocks(C, 4 * LANES) * LANES
    _backward_block[parts, block](dinp, table, dout, inp, weight, mean, rstd)
    _add_parts(dweight, dbias, table, parts)


# %% version 3, verdict and counts
backward_verdict(_rows_once, 3, 11, 36)
backward_verdict(_rows_once, 1, 5, 37)
count_backward(_sums_of_parts, _rows_once)

# %% [markdown]
# `watch` raised no RaceError over the two tables in shared memory. `inp`,
# `dout` and `dinp` come once and `dinp` goes once, the least there is;
# `weight` is read once for each part instead of twice a row. The price is in
# exchanges, twenty a lane for each row in place of ten, by two warps here,
# and in one barrier a row. The table comes on top, written and read once.
# With 4,096 rows it is a quarter of the size of `inp`, with 16,384 rows a
# sixteenth. Where $C$ is not a multiple of 4 or above 2,048, or where an
# array does not begin at a multiple of 16 bytes, version 2 runs.


# %% the check of the work space tags=["exporti"] module="cuda.layernorm"
def _check_work(name, work, floats, inp):
    """The memory to work in: `work` if it is large enough, or a new one."""
    if work is None:
        return empty(floats, like=inp)
    if work.size < floats:
        raise ValueError(
            f"{name}: work must hold {floats} floats, got {work.size}"
        )
    return work


# %% layernorm, backward tags=["export"] module="cuda.layernorm"
# from atomics to a block a row, each row read once; see chapter 1.6
LAYERNORM_BACKWARD = _atomic_sums, _sums_of_parts, _rows_once


@shapes("B T C!, C!, C!, B T C, B T C, C, B T, B T, W!?", DEVICE)
def layernorm_backward(
    dinp,
    dweight,
    dbias,
    dout,
    inp,
    weight,
    mean,
    rstd,
    work=None,
    version=3,
):
    """Add LayerNorm's gradients to dinp, dweight and dbias.

    dinp, dout, inp: (B, T, C). dweight, dbias, weight: (C,). mean, rstd:
    (B, T), as the forward pass left them. work: at least
    layernorm_scratch(B * T, C) floats in one dimension, whose contents are
    lost; allocated if None. All float32 on a device and C-contiguous; the
    first three are added to in place. version: a rung of the chapter's
    ladder, 1 to 3. Version 3 needs C % 4 == 0, C <= 2048 and arrays that
    begin at multiples of 16 bytes; where that does not hold, version 2
    runs. The result of version 1 depends on the order in which threads
    happen to run, in the last bits; that of the others does not. Raises
    TypeError or ValueError before it computes anything.
    """
    name = "layernorm_backward"
    backward = numbered(LAYERNORM_BACKWARD, version, name)
    rows, C = mean.size, len(weight)
    work = _check_work(name, work, layernorm_scratch(rows, C), inp)
    dx, dy, x = (a.reshape(rows, C) for a in (dinp, dout, inp))
    flat = mean.reshape(rows), rstd.reshape(rows)
    backward(dx, dweight, dbias, dy, x, weight, *flat, work)


# %% [markdown]
# The model hands in `work` from its arena, so that training allocates
# nothing. And twice the same call, with rows enough for several parts, must
# give the same bits:

# %% the same bits twice
p = problem(2, 19, 64)
reference.forward(p.out, p.mean, p.rstd, p.inp, p.weight, p.bias)
names = "dinp", "dweight", "dbias"
rest = "dout", "inp", "weight", "mean", "rstd"
results = []
for _ in range(2):
    d = on_device(p)
    work = empty(layernorm_scratch(2 * 19, 64), like=d["inp"])
    layernorm_backward(*(d[k] for k in names + rest), work=work)
    results.append([to_host(d[k]) for k in names])
same = all(map(np.array_equal, *results))
verdict("backward", same, "the same bits twice")

# %% [markdown]
# On the simulator, which runs threads in one order, even atomics would pass
# this; on a GPU the cell says what it claims to.

# %% [markdown]
# ## Count it
#
# Per element the forward pass takes 1 operation for the mean, 3 for the
# variance and 4 for the output; the backward pass takes 6 in the first sweep
# over a row and 11 in the second. The bytes are what counts. With rows that
# stay in cache, forward reads `inp` and writes `out`; backward reads `inp`
# and `dout` and reads and writes `dinp`.

# %% predicted traffic and intensity
elements = 4 * 256 * 768
flops = (8 + 6 + 11) * elements
moved = (2 + 4) * elements * 4
print(f"{flops / 1e6:.1f} MFLOP, {moved / 1e6:.1f} MB moved")
print(f"{flops / moved:.2f} FLOP a byte")

# %% [markdown]
# About one operation a byte: memory decides, not arithmetic. To
# predict the time we measure how fast this machine moves data, with a plain
# copy of an array that fits in no cache, and divide.

# %% predicted against measured time tags=["nbval-ignore-output"]
a, b = np.ones((2, 1 << 25), np.float32)
bandwidth = 2 * a.nbytes / fastest(np.copyto, a, b, runs=5)
print(f"copy: {bandwidth / 1e9:.1f} GB/s")
print(f"predicted {moved / bandwidth * 1e3:.2f} ms, measured {fast * 1e3:.2f}")

# %% [markdown]
# Where the measured time is below the prediction, the arrays of 3 MB have
# stayed in the last-level cache between one kernel and the next; the copy
# went to main memory. Where it is above, it holds the start of the threads,
# twice, and on a machine whose cores are busy with other programs the
# wait for the slowest.
#
# Saved for the backward pass: two numbers a row, $2BT$, against $BTC$ had
# we kept $\hat x$.
#
# The last versions for a GPU move the same six arrays of $BTC$, and on top
# of them the table of sums, at most $512 \cdot 2\,C$ numbers, out and back.

# %% [markdown]
# ## See it
#
# Take one row with three channels, and let $\mathcal L = y_0$: the gradient
# points to where channel 0 of the output grows. All rows of a given mean and
# deviation lie on a circle, seen here along the constant direction. The
# gradient is drawn at points of three circles.

# %% the gradient field
e1 = np.array([2.0, -1.0, -1.0]) / np.sqrt(6)
e2 = np.array([0.0, 1.0, -1.0]) / np.sqrt(2)
angle, radius = np.meshgrid(
    np.linspace(0, 2 * np.pi, 24, endpoint=False), [0.8, 1.6, 2.4]
)
u, v = radius * np.cos(angle), radius * np.sin(angle)
rows = u[..., None] * e1 + v[..., None] * e2
field = np.zeros_like(rows)
up = np.zeros_like(rows)
up[..., 0] = 1
mean, rstd = np.empty(u.shape), np.empty(u.shape)
ones, nil = np.ones(3), np.zeros(3)
cpu.forward(np.empty_like(rows), mean, rstd, rows, ones, nil)
cpu.backward(field, np.zeros(3), np.zeros(3), up, rows, ones, mean, rstd)

# %% draw it
fig, ax = plt.subplots(figsize=(5.2, 5.2), dpi=100)
for r in radius[:, 0]:
    circle = plt.Circle((0, 0), r, fill=False, color=PALETTE["grey"], lw=0.8)
    ax.add_patch(circle)
ax.quiver(
    u, v, field @ e1, field @ e2, color=PALETTE["blue"], scale=18, width=0.005
)
ax.text(3.1, 0, "channel 0", va="center")
ax.annotate("", (3.0, 0), (0, 0), arrowprops={"arrowstyle": "->"})
ax.set(xlim=(-2.6, 4.4), ylim=(-2.8, 2.8), aspect="equal")
ax.axis("off")
plt.show()

# %% [markdown]
# *Figure 1.6.4. The gradient turns a row towards channel 0 and never
# stretches it: every arrow is tangent to its circle. On a circle of twice
# the radius the arrows are half as long, so large rows learn slowly.*
#
# That last fact, the factor $r$ in (1.6.10), is one reason why a network
# with LayerNorm bears large learning rates: rows that grow are turned less.

# %% [markdown]
# ## Take away
#
# - LayerNorm works on each token alone: subtract the mean, divide by the
#   deviation, scale and shift each channel.
# - It cannot see the offset or the scale of a row, so its gradient has no
#   component along them; (1.6.10) subtracts exactly these two.
# - Two saved numbers a row are enough to rebuild what backward needs.
# - Its speed is that of memory. One row at a time in cache is what helps.
# - On a GPU a warp shares a row, so that its lanes read neighbours. Memory
#   that threads share and use again needs an order between the last read
#   and the next write: a second barrier, or a second piece of memory.

# %% [markdown]
# ## Design note
#
# We could have saved $\hat x$ and spared backward the subtraction and the
# product that rebuild it. In GPT-2 124M with B·T = 4·1024 that is 25
# arrays of 12.6 MB, 315 MB in all, read back from main memory. Two
# operations on numbers that are in registers cost less than reading a third
# one from memory, so recomputing wins in space and in time.
#
# The other alternative is RMSNorm, which drops the mean and the bias:
# $y_i = w_i x_i / \sqrt{\overline{x^2} + \epsilon}$. It saves one sum a row
# and trains as well in many models. GPT-2 has LayerNorm, and we re-create
# GPT-2. Exercise 2 derives the gradient of RMSNorm.

# %% [markdown]
# ## Exercises
#
# **1** (★). A row is multiplied by 1000. By what factor does its `dinp`
# change? Predict it from (1.6.10), then check.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# $\hat x$ stays as it is (but for $\epsilon$), and $r$ is divided by 1000,
# so $dx$ is divided by 1000.
# :::

# %% exercise 1, checked tags=["hide-cell"]
p = problem(1, 1, 64, np.float64)
forward_and_backward(p, cpu)
once = p.dinp.copy()
p.inp *= 1000
p.dinp[...] = 0
forward_and_backward(p, cpu)
compare("1000 dinp", 1000 * p.dinp, once, tol=1e-4)

# %% [markdown]
# **2** (★★). Derive the backward pass of RMSNorm and check it. Which of the
# two blind directions is left?
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# With $r = (\overline{x^2} + \epsilon)^{-1/2}$ and $\hat x_i = x_i r$ the
# mean's road is gone, so $a$ disappears from (1.6.10):
# $dx_j = r\,(d\hat x_j - \hat x_j\, b)$. The gradient still has no component
# along $\hat x$; it may have one along the constant vector.
# :::


# %% exercise 2, the gradient tags=["hide-cell"]
def rmsnorm(x, w):
    r = 1 / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPS)
    return x * r * w, r


def rmsnorm_backward(dout, x, w):
    _, r = rmsnorm(x, w)
    norm, dnorm = x * r, dout * w
    return r * (dnorm - norm * (dnorm * norm).mean(axis=-1, keepdims=True))


# %% exercise 2, checked
want = numerical_gradient(lambda: (g * rmsnorm(inp, weight)[0]).sum(), inp)
compare("rmsnorm dinp", rmsnorm_backward(g, inp, weight), want, tol=1e-8)

# %% [markdown]
# **3** (★★★). The one-sweep variance $\overline{x^2} - \mu^2$ reads the row
# once instead of twice. Find a float32 row of 768 numbers on which it is
# wrong by more than a tenth while (1.6.1) is right to five digits.
#
# :::{admonition} Solution to exercise 3
# :class: dropdown
# Any row whose mean is large against its spread. With mean 10,000 and
# deviation 1, $\overline{x^2}$ is about $10^8$, where neighbouring float32
# numbers are 8 apart: the variance 1 drowns.
# :::

# %% exercise 3, the row tags=["hide-cell"]
row = (10_000 + rng.choice([-1.0, 1.0], 768)).astype(np.float32)

# %% exercise 3, checked
exact = row.astype(np.float64).var()
one_sweep = np.mean(row * row) - np.mean(row) ** 2
two_sweeps = np.mean((row - np.mean(row)) ** 2)
verdict("one sweep", abs(one_sweep - exact) > 0.1 * exact, "is off by > 10 %")
verdict("two sweeps", abs(two_sweeps - exact) < 1e-5, "is right to 1e-05")

# %% [markdown]
# **4** (★★★). Version 4 reads `weight` and `bias` for each row. Let a block
# of 4 warps copy both to shared memory first, and then take 32 rows, 8 a
# warp. How many sectors do 32 rows of 256 channels take, in place of 4,160?
# Write the kernel for $C = 256$ and any number of rows, and beware of the
# barrier: a warp without rows must reach it too.
#
# :::{admonition} Solution to exercise 4
# :class: dropdown
# `inp` and `out` take 1,024 sectors each, `weight` and `bias` 32 each, once,
# and a row's `mean` and `rstd` one each: 2,176. Against it stands that 32
# rows now need one block where version 4 has eight, so a small batch leaves
# most of a GPU without work.
# :::


# %% exercise 4, the kernel tags=["hide-cell"]
@kernel(launch_bounds=128)
def shared_weights(out, mean, rstd, inp, weight, bias):
    w = cuda.shared.array(256, np.float32, alignment=16)
    b = cuda.shared.array(256, np.float32, alignment=16)
    warp, lane = cuda.threadIdx.x // 32, cuda.threadIdx.x % 32
    for i in range(cuda.threadIdx.x, 256, 128):
        w[i], b[i] = weight[i], bias[i]
    cuda.syncthreads()
    first = cuda.blockIdx.x * 32 + warp
    for n in range(first, min(first + 32, len(inp)), 4):
        normalise(out, mean, rstd, inp, w, b, n, lane)


# %% exercise 4, a row tags=["hide-cell"]
@device
def normalise(out, mean, rstd, inp, w, b, n, lane):
    kept = cuda.shared.array(1024, np.float32, alignment=16)
    total, squares, size = np.float32(0), np.float32(0), np.float32(256)
    here = cuda.threadIdx.x // 32 * 256
    for i in range(4 * lane, 256, 128):
        four = load4(inp, n * 256 + i)
        store4(kept, here + i, four[0], four[1], four[2], four[3])
        total += (four[0] + four[1]) + (four[2] + four[3])
    mu = warp_sum(total) / size
    for i in range(4 * lane, 256, 128):
        four = load4(kept, here + i)
        squares += _deviations(mu, four[0], four[1], four[2], four[3])
    r = np.float32(1) / math.sqrt(warp_sum(squares) / size + EPS32)
    for i in range(4 * lane, 256, 128):
        x0, x1, x2, x3 = load4(kept, here + i)
        _write_four(out, n * 256 + i, w, b, i, mu, r, x0, x1, x2, x3)
    if lane == 0:
        mean[n], rstd[n] = mu, r


# %% exercise 4, checked
def eight_rows_a_warp(*arrays):
    shared_weights[-(-len(arrays[0]) // 32), 128](*arrays)


forward_verdict(eight_rows_a_warp, 3, 11, 256)
with watch() as seen:
    eight_rows_a_warp(*rows_of(on_device(q, simulated)))
verdict("sectors", seen.sectors == 2176, "are 2,176")

# %% [markdown]
# ## Further reading
#
# - Ba, Kiros and Hinton (2016),
#   [Layer Normalization](https://arxiv.org/abs/1607.06450): section 3 for
#   the definition, section 5 for the invariances shown in figure 1.6.4.
# - Xiong et al. (2020),
#   [On Layer Normalization in the Transformer Architecture](https://arxiv.org/abs/2002.04745):
#   why GPT-2 places it before each half block and not after.
# - Zhang and Sennrich (2019),
#   [Root Mean Square Layer Normalization](https://arxiv.org/abs/1910.07467):
#   the variant of exercise 2 and the case for it.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.6")
