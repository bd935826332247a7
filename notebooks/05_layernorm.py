# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     module: reference.layernorm
# ---

# %% [markdown]
# # Normalise a layer and differentiate it
#
# > LayerNorm gives every token's vector mean 0 and variance 1, then scales
# > and shifts each channel; its backward pass takes two sums a row.

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.diagram import gpt2_diagram

gpt2_diagram(lit="layernorm")

# %% [markdown]
# *Figure 5.1. LayerNorm stands before attention, before the feed-forward
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
# - write it as a compiled loop that reads each row from memory once.
#
# You need central differences from [chapter 0](00_gpt2.ipynb) and the
# `kernel` decorator from [chapter 3](03_encoder.ipynb).

# %% [markdown]
# ## Setup

# %% setup
from types import SimpleNamespace

import matplotlib.pyplot as plt

from llmnb.diagram import PALETTE
from llmnb.timing import fastest, machine
from llmnb.verify import compare, numerical_gradient, verdict

# %% imports tags=["export"]
import numpy as np

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
#    v = \frac1C \sum_i (x_i - \mu)^2 . \tag{5.1} $$
#
# A row whose channels are all equal has $v = 0$, and dividing by its
# deviation would fail. A small $\epsilon = 10^{-5}$ under the root prevents
# that. We keep the *reciprocal* deviation, because multiplying is cheaper
# than dividing:
#
# $$ r = \frac{1}{\sqrt{v + \epsilon}} , \qquad
#    \hat x_i = (x_i - \mu)\, r . \tag{5.2} $$
#
# Every row now has mean 0 and, but for $\epsilon$, variance 1. That may be too
# strict: a layer may want one channel large and another near 3. So each
# channel gets a learned scale $w_i$ and shift $b_i$:
#
# $$ y_i = w_i \hat x_i + b_i . \tag{5.3} $$

# %% epsilon tags=["exporti"]
EPS = 1e-5


# %% layernorm, forward tags=["export"]
def layernorm_forward(out, mean, rstd, inp, weight, bias):
    """Normalise each row of inp, then scale and shift each channel.

    out, inp: (B, T, C). mean, rstd: (B, T), the mean and the reciprocal
    deviation of each row, saved for the backward pass. weight, bias: (C,).
    All of one float dtype; out, mean and rstd are overwritten.

    Derived in chapter 5.
    """
    mean[...] = inp.mean(axis=-1)
    centred = inp - mean[..., None]
    variance = (centred**2).mean(axis=-1)
    rstd[...] = 1 / np.sqrt(variance + EPS)
    out[...] = centred * rstd[..., None] * weight + bias


# %% [markdown]
# The caller brings the arrays, outputs first, and the function fills them.
# No layer of this book allocates its result: [chapter 2](02_memory.ipynb)
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
# $db$ and $dx$. The first two follow from (5.3) at once. One $w_i$ serves
# every row, so its gradient sums over all rows $n$:
#
# $$ dw_i = \sum_n dy_{n,i}\, \hat x_{n,i} , \qquad
#    db_i = \sum_n dy_{n,i} . \tag{5.4} $$
#
# And within one row, by (5.3) again,
#
# $$ d\hat x_i = w_i\, dy_i . \tag{5.5} $$
#
# For $dx$ we walk (5.2) and (5.1) backwards. An input $x_j$ reaches the loss
# by three roads: directly through $\hat x_j$, through the mean, and through
# the variance. Take the intermediates one at a time, the last computed
# first.
#
# **The reciprocal deviation.** $r$ enters every $\hat x_i$:
#
# $$ dr = \sum_i d\hat x_i\, (x_i - \mu) . \tag{5.6} $$
#
# **The variance.** From $r = (v + \epsilon)^{-1/2}$ follows
# $\partial r / \partial v = -\tfrac12 (v + \epsilon)^{-3/2}
# = -\tfrac12 r^3$, so
#
# $$ dv = -\tfrac12\, r^3\, dr
#       = -\tfrac12\, r^2 \sum_i d\hat x_i\, \hat x_i . \tag{5.7} $$
#
# The second form used $(x_i - \mu)\, r = \hat x_i$.
#
# **The mean.** $\mu$ enters each $\hat x_i$ with factor $-r$, and it enters
# $v$ with
# $\partial v / \partial \mu = -\tfrac2C \sum_i (x_i - \mu) = 0$, because
# distances from the mean sum to nothing. One term is left:
#
# $$ d\mu = -r \sum_i d\hat x_i . \tag{5.8} $$
#
# **The input.** $x_j$ enters $\hat x_j$ with factor $r$, enters $v$ with
# factor $\tfrac2C (x_j - \mu)$, and enters $\mu$ with factor $\tfrac1C$:
#
# $$ dx_j = r\, d\hat x_j + \tfrac2C (x_j - \mu)\, dv
#         + \tfrac1C\, d\mu . \tag{5.9} $$
#
# Put (5.7) and (5.8) in, use $(x_j - \mu)\, r = \hat x_j$ once more, and
# take $r$ outside:
#
# $$ dx_j = r \Bigl( d\hat x_j
#         - \underbrace{\tfrac1C \textstyle\sum_i d\hat x_i}_{a}
#         - \hat x_j\, \underbrace{\tfrac1C \textstyle\sum_i
#           d\hat x_i\, \hat x_i}_{b} \Bigr) . \tag{5.10} $$
#
# Two means of the row, $a$ and $b$, and one pass to write. Read it as
# geometry: the gradient loses its component along the constant vector
# ($a$) and its component along $\hat x$ itself ($b$). It had to. Moving a
# row along these two directions shifts it or stretches it, and LayerNorm
# is blind to both.
#
# **What to save.** (5.10) needs $\hat x$, which is $(x - \mu)\, r$. The
# input $x$ is in memory anyway, because it is the output of the layer
# below. Two numbers a row, $\mu$ and $r$, rebuild $\hat x$; storing
# $\hat x$ itself would cost $C$ numbers a row.


# %% layernorm, backward tags=["export"]
def layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd):
    """Add LayerNorm's gradients to dinp, dweight and dbias.

    dinp, dout, inp: (B, T, C). dweight, dbias, weight: (C,). mean, rstd:
    (B, T), as the forward pass left them. All of one float dtype; the first
    three are added to in place.

    Derived in chapter 5.
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
# variance depends on $x$ and drops $b$ from (5.10). The formula still looks
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
# NumPy runs (5.1) to (5.3) as eight separate operations on whole arrays, the
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

from llmnb.checks import check_array, check_float
from llmnb.cpu.jit import arguments, share, team

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
# numba does not check bounds: an array that is too short means a read from
# somebody else's memory. So the public function checks shapes and dtypes
# first, and views the (B, T, C) arrays as rows.


# %% the checks tags=["exporti"] module="cpu.layernorm"
def _check(name, inp, like, mean, rstd, *channels):
    check_float(f"{name}: inp", inp)
    if inp.ndim != 3:
        raise ValueError(
            f"{name}: inp must have shape (B, T, C), got {inp.shape}"
        )
    B, T, C = inp.shape
    check_array(f"{name}: inp", inp, (B, T, C), inp.dtype)
    for label, array in like.items():
        check_array(f"{name}: {label}", array, (B, T, C), inp.dtype)
    check_array(f"{name}: mean", mean, (B, T), inp.dtype)
    check_array(f"{name}: rstd", rstd, (B, T), inp.dtype)
    for array in channels:
        check_array(f"{name}: each (C,) array", array, (C,), inp.dtype)


# %% layernorm, forward tags=["export"] module="cpu.layernorm"
def layernorm_forward(out, mean, rstd, inp, weight, bias):
    """Normalise each row of inp, then scale and shift each channel.

    out, inp: (B, T, C). mean, rstd: (B, T), the mean and the reciprocal
    deviation of each row, saved for the backward pass. weight, bias: (C,).
    All float32 or all float64 and C-contiguous; out, mean and rstd are
    overwritten. Raises TypeError or ValueError before it computes anything.

    Derived in chapter 5.
    """
    _check("layernorm_forward", inp, {"out": out}, mean, rstd, weight, bias)
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
def layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd):
    """Add LayerNorm's gradients to dinp, dweight and dbias.

    dinp, dout, inp: (B, T, C). dweight, dbias, weight: (C,). mean, rstd:
    (B, T), as the forward pass left them. All float32 or all float64 and
    C-contiguous; the first three are added to in place. Raises TypeError or
    ValueError before it computes anything.

    Derived in chapter 5.
    """
    like = {"dinp": dinp, "dout": dout}
    channels = dweight, dbias, weight
    _check("layernorm_backward", inp, like, mean, rstd, *channels)
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
layernorm_forward(np.empty_like(rows), mean, rstd, rows, ones, nil)
layernorm_backward(field, np.zeros(3), np.zeros(3), up, rows, ones, mean, rstd)

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
# *Figure 5.2. The gradient turns a row towards channel 0 and never
# stretches it: every arrow is tangent to its circle. On a circle of twice
# the radius the arrows are half as long, so large rows learn slowly.*
#
# That last fact, the factor $r$ in (5.10), is one reason why a network
# with LayerNorm bears large learning rates: rows that grow are turned less.

# %% [markdown]
# ## Take away
#
# - LayerNorm works on each token alone: subtract the mean, divide by the
#   deviation, scale and shift each channel.
# - It cannot see the offset or the scale of a row, so its gradient has no
#   component along them; (5.10) subtracts exactly these two.
# - Two saved numbers a row are enough to rebuild what backward needs.
# - Its speed is that of memory. One row at a time in cache is what helps.

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
# change? Predict it from (5.10), then check.
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
# mean's road is gone, so $a$ disappears from (5.10):
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
# wrong by more than a tenth while (5.1) is right to five digits.
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
# ## Further reading
#
# - Ba, Kiros and Hinton (2016),
#   [Layer Normalization](https://arxiv.org/abs/1607.06450): section 3 for
#   the definition, section 5 for the invariances shown in figure 5.2.
# - Xiong et al. (2020),
#   [On Layer Normalization in the Transformer Architecture](https://arxiv.org/abs/2002.04745):
#   why GPT-2 places it before each half block and not after.
# - Zhang and Sennrich (2019),
#   [Root Mean Square Layer Normalization](https://arxiv.org/abs/1910.07467):
#   the variant of exercise 2 and the case for it.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.index import gained

gained("05_layernorm")
