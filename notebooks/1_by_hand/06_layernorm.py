# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       reference.layernorm: "LayerNorm in NumPy, forward and backward."
# ---

# %% [markdown]
# # LayerNorm: normalise a row and differentiate it
#
# > LayerNorm gives every token's vector mean 0 and variance 1, then scales and
# > shifts each channel; its backward pass takes two sums a row.
#
# *Reading time: 20 minutes. You need: [chapter 1.1](01_learns.ipynb) for what a
# gradient is. The fast versions: chapters [2.2](../2_cpu/02_rows.ipynb) and
# [3.4](../3_gpu/04_layernorm.ipynb).*

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
# - say what the forward pass must save, and why two numbers a row do.

# %% [markdown]
# ## Setup

# %% setup
from types import SimpleNamespace

import matplotlib.pyplot as plt

from llmnb.book.diagram import PALETTE
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
# No layer of this book allocates its result: [chapter 1.14](14_memory.ipynb)
# has laid all of them out beforehand. `mean[..., None]` gives the means a last
# axis of length 1, which NumPy reads as if it were repeated for every channel:
# this is *broadcasting*.

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


# %% a problem of any size
def problem(B, T, C):
    p = SimpleNamespace()
    p.inp, p.dout = rng.normal(size=(2, B, T, C))
    p.weight, p.bias = rng.normal(size=(2, C))
    p.out, p.dinp = np.zeros((2, B, T, C))
    p.dweight, p.dbias = np.zeros((2, C))
    p.mean, p.rstd = np.zeros((2, B, T))
    return p


def forward_and_backward(p):
    layernorm_forward(p.out, p.mean, p.rstd, p.inp, p.weight, p.bias)
    layernorm_backward(
        p.dinp, p.dweight, p.dbias, p.dout, p.inp, p.weight, p.mean, p.rstd
    )


# %% [markdown]
# ## Why it is there
#
# What becomes of a vector on its way through many layers? Let us push random
# vectors of 96 numbers through twelve linear layers, each drawn at random and a
# little too large or too small, and measure the root of their mean square
# after each; then again with LayerNorm before every layer.

# %% twelve layers, with and without
sizes = {}
for spread in (0.8, 1.25):
    for normed in (False, True):
        x, steps = rng.normal(size=(1, 64, 96)), []
        for _ in range(12):
            y = np.empty_like(x)
            if normed:
                stats = np.empty((2, 1, 64))
                layernorm_forward(y, *stats, x, np.ones(96), np.zeros(96))
            weights = rng.normal(scale=spread / np.sqrt(96), size=(96, 96))
            x = (y if normed else x) @ weights
            steps.append(np.sqrt((x**2).mean()))
        sizes[spread, normed] = steps
fig, ax = plt.subplots(figsize=(6, 3), dpi=100)
for (spread, normed), steps in sizes.items():
    colour = PALETTE["blue" if normed else "orange"]
    ax.semilogy(
        range(1, 13), steps, color=colour, ls="-" if spread > 1 else ":"
    )
ax.set(xlabel="layer", ylabel="size of the numbers")
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()
low, high = (sizes[x, False][-1] for x in (0.8, 1.25))
verdict("without it", low < 0.2 and high > 5, "they shrink or grow")
ends = [sizes[x, True][-1] for x in (0.8, 1.25)]
verdict(
    "with LayerNorm", 0.7 < min(ends) < max(ends) < 1.4, "they stay near 1"
)

# %% [markdown]
# *Figure 1.6.2. The size of the numbers after each of twelve layers whose
# weights are a fifth too small (dotted) or a quarter too large. Without
# LayerNorm (orange) it shrinks or grows by the same factor at each layer; with
# it (blue) every layer begins anew.*

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
# *Figure 1.6.3. The gradient turns a row towards channel 0 and never
# stretches it: every arrow is tangent to its circle. On a circle of twice
# the radius the arrows are half as long, so large rows learn slowly.*
#
# That last fact, the factor $r$ in (1.6.10), is one reason why a network
# with LayerNorm bears large learning rates: rows that grow are turned less.

# %% [markdown]
# ## Count it
#
# The layer has $2C$ parameters. Per element the forward pass takes 1 operation
# for the mean, 3 for the variance and 4 for the output; the backward pass takes
# 6 for the two sums of a row and 11 for the gradient. Saved for the backward
# pass: two numbers a row, $2BT$, against $BTC$ had we kept $\hat x$.

# %% [markdown]
# ## Take away
#
# - LayerNorm works on each token alone: subtract the mean, divide by the
#   deviation, scale and shift each channel.
# - It cannot see the offset or the scale of a row, so its gradient has no
#   component along them; (1.6.10) subtracts exactly these two.
# - Two saved numbers a row are enough to rebuild what backward needs.

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
p = problem(1, 1, 64)
forward_and_backward(p)
once = p.dinp.copy()
p.inp *= 1000
p.dinp[...] = 0
forward_and_backward(p)
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
