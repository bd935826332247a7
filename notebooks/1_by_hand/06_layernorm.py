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
# *Reading time: 24 minutes. You need: [chapter 1.5](05_encoder.ipynb) for how a
# layer's gradients are derived and proved. The fast versions: chapters [2.2](../2_cpu/02_rows.ipynb) and
# [3.4](../3_gpu/04_layernorm.ipynb).*
#
# ## Where we are

# %% where we are
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="layernorm")

# %% [markdown]
# *Figure 1.6.1. LayerNorm stands before attention, before the feed-forward
# half of every block, and once more before the logits: 2L + 1 times.*
#
# A token's vector passes through many layers, and each of them may stretch it
# or move it away from zero. LayerNorm undoes that, before the next layer reads
# it. At the end of this chapter you can
#
# - say what becomes of a vector in a deep network without it;
# - compute a LayerNorm by hand and name what it cannot change;
# - derive its gradient without matrices, and say why two sums a row suffice;
# - say what the forward pass must save, and why two numbers a row do.
#
# ## Setup

# %% setup
import matplotlib.pyplot as plt

from llmnb.book.diagram import PALETTE
from llmnb.book.verify import compare, numerical_gradient, verdict

# %% imports tags=["export"]
import numpy as np

from llmnb.shapes import shapes

# %% the seed
rng = np.random.default_rng(4)

# %% [markdown]
# ## Why it is there
#
# What becomes of a vector on its way through many layers? Take 64 random
# vectors of 96 numbers and multiply them by twelve matrices, one after the
# other, drawn at random. A sum of 96 products keeps the size of the vector's
# numbers when those of the matrix have standard deviation $1/\sqrt{96}$: the
# variances of the products add up, 96 times $1/96$. We take this deviation a
# fifth smaller, and a quarter larger. The size of a vector is the root of its
# numbers' mean square. Then we do it again and *normalise* each vector before
# each matrix: take away its mean, divide by its standard deviation.


# %% twelve layers, with and without
def normalise(x):
    x = x - x.mean(axis=1, keepdims=True)
    return x / x.std(axis=1, keepdims=True)


def sizes(factor, normed):
    x, steps = rng.normal(size=(64, 96)), []
    for _ in range(12):
        matrix = rng.normal(scale=factor / np.sqrt(96), size=(96, 96))
        x = (normalise(x) if normed else x) @ matrix
        steps.append(np.sqrt((x**2).mean()))
    return steps


small, small_normed = sizes(0.8, False), sizes(0.8, True)
large, large_normed = sizes(1.25, False), sizes(1.25, True)
verdict("without", small[-1] < 0.1 and large[-1] > 10, "0.1 and 10 are passed")
calm = small_normed + large_normed
verdict("normalised", 0.7 < min(calm) < max(calm) < 1.4, "stay near 1")

# %% draw it tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7, 3.3), dpi=100)
curves = (
    (large, "orange", "-", "a quarter too large"),
    (large_normed, "blue", "-", "the same, normalised"),
    (small_normed, "blue", ":", "the same, normalised"),
    (small, "orange", ":", "a fifth too small"),
)
for steps, colour, style, name in curves:
    line = {"color": PALETTE[colour], "ls": style, "lw": 2}
    ax.semilogy(range(1, 13), steps, **line)
    place = (12.2, steps[-1])
    ax.text(*place, name, va="center", color=PALETTE[colour], size=9)
ax.set(xlabel="layer", ylabel="size of the numbers", xlim=(1, 12))
ax.set_xticks(range(1, 13))
ax.spines[["top", "right"]].set_visible(False)
fig.subplots_adjust(0.1, 0.15, 0.78, 0.97)
plt.show()

# %% [markdown]
# *Figure 1.6.2. A fifth or a quarter is enough: after twelve layers the
# numbers have shrunk or grown more than tenfold, by about the same factor at
# each layer. Normalised, every layer begins anew, and its wrong factor is not handed on.*
#
# One could draw the first matrices just right, but training changes them at
# every step. The sizes matter, because later chapters bring layers that are
# curves: they bend at numbers of size 1, and near zero or far out they are as
# good as straight or flat. The same holds on the way back: a gradient passes
# the same matrices, and shrinks or grows as the vectors do.
#
# ## By hand
#
# Take two tokens with three channels each, $x_0 = (1, 2, 3)$ and $x_1 = (0,
# 10, 20)$. The first has mean 2 and squared distances from it 1, 0, 1, so its
# variance is $2/3$ (divided by the number of channels, not by one less) and
# its standard deviation $0.8165$. Subtract, divide: $(-1.2247, 0, 1.2247)$.
# The second row is ten times the first, less ten. Its mean is 10, its
# deviation $8.165$, and the result is the same three numbers. LayerNorm is
# blind to the scale and to the offset of a row.

# %% two rows by hand
x = np.array([[1.0, 2.0, 3.0], [0.0, 10.0, 20.0]])
centred = x - x.mean(axis=1, keepdims=True)
deviation = np.sqrt((centred**2).mean(axis=1, keepdims=True))
print(np.round(centred / deviation, 4) + 0.0)  # + 0 clears the sign of -0

# %% [markdown]
# | tensor | shape | what it holds |
# |---|---|---|
# | `inp`, `out` | (B, T, C) | C numbers for each of the B·T tokens |
# | `mean`, `rstd` | (B, T) | the row's mean and one over its deviation |
# | `weight`, `bias` | (C,) | a learned scale and shift for each channel |
#
# From here on we look at one row, a token: $x_i$ is its channel $i$. Rows
# never meet.
#
# ## Forward
#
# The mean and the variance of a row are
#
# $$ \mu = \frac1C \sum_i x_i , \qquad
#    \sigma^2 = \frac1C \sum_i (x_i - \mu)^2 . \tag{1.6.1} $$
#
# A row whose channels are all equal has $\sigma^2 = 0$, and dividing by its
# deviation would fail. A small $\epsilon = 10^{-5}$ under the root prevents
# that. We keep the *reciprocal* deviation:
#
# $$ r = \frac{1}{\sqrt{\sigma^2 + \epsilon}} , \qquad
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
# The caller brings the arrays, outputs first, and the function fills them:
# [chapter 1.16](16_memory.ipynb) lays all of them out beforehand.
# `mean[..., None]` gives the means a last axis of length 1, which
# *broadcasting* repeats for every channel.

# %% the two rows through the function
y, mean, rstd = np.zeros((1, 2, 3)), np.zeros((1, 2)), np.zeros((1, 2))
layernorm_forward(y, mean, rstd, x[None], np.ones(3), np.zeros(3))
print("mean", mean)
print("rstd", np.round(rstd, 4))
compare("by hand", y[0], centred / deviation, tol=1e-5)

# %% [markdown]
# The tolerance is for $\epsilon$, which the hand calculation left out. It
# makes $r$ smaller by a share of about $\epsilon / (2 \sigma^2)$, the first
# term of the series of $(1 + \epsilon / \sigma^2)^{-1/2}$, in the first row
# $0.75 \cdot 10^{-5}$, and $1.2247$ times that is $0.92 \cdot 10^{-5}$.
#
# ## Backward, derived
#
# Later layers hand us $dy_i = \partial \mathcal L / \partial y_i$. We owe
# $dw$, $db$ and $dx$. The first two follow from (1.6.3) at once. One $w_i$
# serves every row, so its gradient sums over all rows $n$:
#
# $$ dw_i = \sum_n dy_{n,i}\, \hat x_{n,i} , \qquad
#    db_i = \sum_n dy_{n,i} . \tag{1.6.4} $$
#
# And within one row, by (1.6.3) again,
#
# $$ d\hat x_i = w_i\, dy_i . \tag{1.6.5} $$
#
# For $dx$ we walk (1.6.2) and (1.6.1) backwards. An input $x_j$ reaches the
# loss by three roads: directly through $\hat x_j$, through the mean, and
# through the variance.

# %% draw the three roads tags=["hide-input"]
places = {
    "$x_j$": (0, 0),
    "$\\mu$": (2.4, 1.2),
    "$\\sigma^2$": (2.4, -1.2),
    "$r$": (4.4, -1.2),
    "$\\hat x_i$": (6.6, 0),
    "$y_i$": (8.2, 0),
    "loss": (9.8, 0),
}
x_, mu, var, r_, xhat, y_, end = places
roads = [  # from, to, the derivative, its place, the road's colour
    (x_, xhat, "$r$, for $i = j$ only", (3.6, 0.17), "blue"),
    (x_, mu, "$1/C$", (0.8, 0.78), "green"),
    (mu, xhat, "$-r$", (4.8, 0.86), "green"),
    (x_, var, "$2(x_j - \\mu)/C$", (0.5, -0.86), "orange"),
    (var, r_, "$-\\frac{1}{2} r^3$", (3.4, -0.98), "orange"),
    (r_, xhat, "$x_i - \\mu$", (6.1, -0.86), "orange"),
    (xhat, y_, "$w_i$", (7.35, 0.17), "ink"),
    (y_, end, "", (0, 0), "ink"),
]
fig, ax = plt.subplots(figsize=(8.2, 3.1), dpi=100)
for start, stop, label, place, colour in roads:
    arrow = {"arrowstyle": "-|>", "lw": 1.8, "color": PALETTE[colour]}
    arrow |= {"shrinkA": 17, "shrinkB": 17}
    ax.annotate("", places[stop], places[start], arrowprops=arrow)
    ax.text(*place, label, ha="center", color=PALETTE[colour], size=11)
arrow = {"arrowstyle": "-|>", "ls": ":", "color": PALETTE["grey"]}
arrow |= {"shrinkA": 17, "shrinkB": 17}
ax.annotate("", places[var], places[mu], arrowprops=arrow)
ax.text(2.5, -0.4, "0", color=PALETTE["grey"], size=11)
for name, place in places.items():
    box = {"boxstyle": "round,pad=0.35", "fc": "white", "ec": PALETTE["grey"]}
    ax.text(*place, name, ha="center", va="center", size=13, bbox=box)
ax.set(xlim=(-0.5, 10.3), ylim=(-1.7, 1.6))
ax.axis("off")
fig.subplots_adjust(0, 0, 1, 1)
plt.show()

# %% [markdown]
# *Figure 1.6.3. The three roads of an input: direct (blue), through the mean
# (green), through the variance (orange). At each arrow stands the derivative
# of its end by its beginning: what multiplies a gradient that comes back along
# it. Where roads meet, gradients add up. The dotted road carries nothing.*
#
# Take the intermediates one at a time, the last computed first.
#
# **The reciprocal deviation.** $r$ enters every $\hat x_i$, with factor
# $x_i - \mu$:
#
# $$ dr = \sum_i d\hat x_i\, (x_i - \mu) . \tag{1.6.6} $$
#
# **The variance.** It enters $r$ alone. From
# $r = (\sigma^2 + \epsilon)^{-1/2}$ follows
# $\partial r / \partial \sigma^2 = -\tfrac12 (\sigma^2 + \epsilon)^{-3/2}
# = -\tfrac12 r^3$. With (1.6.6) in the place of $dr$, and
# $(x_i - \mu)\, r = \hat x_i$,
#
# $$ d(\sigma^2) = -\tfrac12\, r^3\, dr
#    = -\tfrac12\, r^2 \sum_i d\hat x_i\, \hat x_i . \tag{1.6.7} $$
#
# **The mean.** $\mu$ enters each $\hat x_i$ with factor $-r$, and it enters
# $\sigma^2$ with $\partial \sigma^2 / \partial \mu = -\tfrac2C \sum_i (x_i -
# \mu) = 0$, because distances from the mean sum to nothing: the dotted road.
# One term is left:
#
# $$ d\mu = -r \sum_i d\hat x_i . \tag{1.6.8} $$
#
# **The input.** $x_j$ enters $\hat x_j$ with factor $r$, enters $\sigma^2$
# with factor $\tfrac2C (x_j - \mu)$, and enters $\mu$ with factor $\tfrac1C$.
# (That $\mu$ moves with $x_j$ changes nothing in the second: by the dotted
# road.) Three roads, three terms:
#
# $$ dx_j = r\, d\hat x_j + \tfrac2C (x_j - \mu)\, d(\sigma^2)
#         + \tfrac1C\, d\mu . \tag{1.6.9} $$
#
# Put (1.6.7) in the second term. It becomes
# $-\tfrac1C\, r^2 (x_j - \mu) \sum_i d\hat x_i\, \hat x_i$, and one of the two
# factors $r$ makes $\hat x_j$ of $x_j - \mu$. With (1.6.8) the third becomes
# $-\tfrac1C\, r \sum_i d\hat x_i$. Every term has a factor $r$ now. Take it
# outside, and write a mean over the row as a bar:
#
# $$
# \begin{aligned}
# dx_j &= r \Bigl( d\hat x_j - \overline{d\hat x}
#         - \hat x_j\; \overline{d\hat x\, \hat x} \Bigr) , \\
# \overline{d\hat x} &= \tfrac1C \sum_i d\hat x_i , \qquad
#    \overline{d\hat x\, \hat x} = \tfrac1C \sum_i d\hat x_i\, \hat x_i .
# \end{aligned}
# \tag{1.6.10}
# $$
#
# Read it as geometry: the gradient loses its component along the constant
# vector (the first mean) and its component along $\hat x$ itself (the second).
# (Both vectors have squared length $C$, but for $\epsilon$ in the second. So a
# mean product with one of them, times that vector, is the component along it.
# And they stand at right angles, since $\hat x$ sums to 0: to take off the one
# component leaves the other as it is.)
# It had to: moving a row along these two directions shifts it, or stretches it
# about its mean, and LayerNorm is blind to both.
#
# **What to save.** (1.6.10) needs $\hat x$, which is $(x - \mu)\, r$. The
# input $x$ is in memory anyway, as the output of the layer before. Two numbers
# a row, $\mu$ and $r$, rebuild $\hat x$; storing it would cost $C$ numbers a
# row.


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
    dnorm_mean = dnorm.mean(axis=-1, keepdims=True)
    dnorm_norm_mean = (dnorm * norm).mean(axis=-1, keepdims=True)
    dinp += rstd[..., None] * (dnorm - dnorm_mean - norm * dnorm_norm_mean)


# %% [markdown]
# The gradients are *added*, not written. The vector that LayerNorm reads is
# also read by the sum that ends its half block (figure 1.4.1), so its gradient
# has two contributions, and whoever comes second must not erase the first. The
# gradients of weight and bias are added so that several batches can be summed.
#
# ## Proof
#
# As in chapter 1.5, $\mathcal L = \sum g \cdot y$ with a fixed random $g$, in
# float64 with step $h = 10^{-5}$. The method's error is of the order $h^2 =
# 10^{-10}$, so a tolerance of $10^{-8}$ leaves room for rounding and none for
# a mistake. As there, the gradients start from ones.

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
    grads = [np.ones_like(a) for a in (inp, weight, bias)]
    loss()
    backward(*grads, g, inp, weight, mean, rstd)
    return [grad - 1 for grad in grads]


dinp, dweight, dbias = gradients(layernorm_backward)

# %% against central differences
compare("dinp", dinp, numerical_gradient(loss, inp), tol=1e-8)
compare("dweight", dweight, numerical_gradient(loss, weight), tol=1e-8)
compare("dbias", dbias, numerical_gradient(loss, bias), tol=1e-8)

# %% [markdown]
# Suppose someone forgets that the variance depends on $x$ and drops the second
# mean from (1.6.10). The formula still looks plausible:


# %% a gradient made wrong on purpose
def without_variance(dinp, dweight, dbias, dout, inp, weight, mean, rstd):
    dnorm = dout * weight
    dnorm_mean = dnorm.mean(axis=-1, keepdims=True)
    dinp += rstd[..., None] * (dnorm - dnorm_mean)


wrong, _, _ = gradients(without_variance)
try:
    compare("dinp, one mean", wrong, numerical_gradient(loss, inp), tol=1e-8)
    caught = False
except AssertionError:
    caught = True
verdict("the mistake", caught, "is caught")

# %% [markdown]
# Last, the two blind directions. The component along ones is zero. That along
# $\hat x$ is zero but for $\epsilon$. By (1.6.2) $\sigma^2 = 1 / r^2 -
# \epsilon$, so the mean of $\hat x^2$, which is $\sigma^2 r^2$, is $1 -
# \epsilon\, r^2$ and not quite 1. Now sum (1.6.10) times $\hat x_j$ over $j$:
#
# $$
# \begin{aligned}
# \sum_j dx_j\, \hat x_j &= r \Bigl( \sum_j d\hat x_j\, \hat x_j - 0
#    - C\, (1 - \epsilon\, r^2)\; \overline{d\hat x\, \hat x} \Bigr) \\
#   &= \epsilon\, r^3 \sum_i d\hat x_i\, \hat x_i .
# \end{aligned}
# $$

# %% the two blind directions
loss()  # mean and rstd of inp as it is: numerical_gradient had moved it
norm = (inp - mean[..., None]) * rstd[..., None]
left = EPS * rstd**3 * (g * weight * norm).sum(axis=-1)
compare("along ones", dinp.sum(axis=-1), np.zeros((B, T)), tol=1e-12)
compare("along norm", (dinp * norm).sum(axis=-1), left, tol=1e-12)

# %% [markdown]
# ## See it
#
# A row of $C$ channels is a point in a space of $C$ dimensions. Subtracting
# the mean drops the point onto the plane of rows with mean 0; dividing by the
# deviation moves it along a ray to where its distance from the origin is
# $\sqrt C$. With three channels the plane is a sheet of paper, and all rows
# land on a circle in it. For the way back let $\mathcal L = y_0$ with $w = 1$:
# the gradient says how to move a row so that channel 0 of the output grows.

# %% rows on two circles, and their gradients tags=["hide-input"]
e1 = np.array([2.0, -1.0, -1.0]) / np.sqrt(6)  # channel 0, mean taken off
e2 = np.array([0.0, 1.0, -1.0]) / np.sqrt(2)
angle = np.linspace(0, 2 * np.pi, 12, endpoint=False)
circle = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
flat = np.stack([1.4 * circle, 2.8 * circle])  # in the plane of e1 and e2
rows = flat @ np.stack([e1, e2])
up, field = np.zeros_like(rows), np.zeros_like(rows)
up[..., 0] = 1
at, r = np.empty((2, *rows.shape[:2]))
w, b = np.ones(3), np.zeros(3)
layernorm_forward(np.empty_like(rows), at, r, rows, w, b)
dw, db = np.zeros((2, 3))
layernorm_backward(field, dw, db, up, rows, w, at, r)
arrows = np.stack([field @ e1, field @ e2], axis=-1)
outward = (flat * arrows).sum(axis=-1)
compare("right angles", outward, np.zeros((2, 12)), tol=1e-4)
compare("twice as far", 2 * arrows[1], arrows[0], tol=1e-4)

# %% draw it tags=["hide-input"]
fig, (left, right) = plt.subplots(1, 2, figsize=(8.4, 4.3), dpi=100)
radius = np.sqrt(3)
ring = {"fill": False, "lw": 1.2}
left.add_patch(plt.Circle((0, 0), radius, ec=PALETTE["orange"], **ring))
for degrees, sizes_ in ((20, (0.6, 2.9)), (85, (0.9, 2.5)), (150, (0.5, 2.7)),
                        (215, (1.0, 2.9)), (300, (0.7, 2.4))):  # fmt: skip
    way = np.array([np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))])
    left.plot(*np.outer(way, (0, 3.1)), ":", lw=0.8, color=PALETTE["grey"])
    for size in sizes_:
        arrow = {"arrowstyle": "-|>", "color": PALETTE["blue"], "lw": 1.3}
        left.annotate("", radius * way, size * way, arrowprops=arrow)
        left.plot(*(size * way), "o", ms=5, color=PALETTE["blue"])
    left.plot(*(radius * way), "o", ms=7, color=PALETTE["orange"], zorder=5)
left.set_title("forward: a ray lands on one point")
for size, points in zip((1.4, 2.8), flat, strict=True):
    edge = PALETTE["grey"]
    right.add_patch(plt.Circle((0, 0), size, ec=edge, **ring))
    for point in points:
        right.plot(*np.outer(point, (0, 1)), ":", lw=0.6, color=edge)
    right.plot(*points.T, "o", ms=3.5, color=PALETTE["blue"])
right.quiver(*flat.reshape(-1, 2).T, *arrows.reshape(-1, 2).T, angles="xy",
             scale_units="xy", scale=1.3, width=0.007, zorder=4,
             color=PALETTE["blue"])  # fmt: skip
for tail in ((0, 2.8), (0, 1.4)):  # mark a right angle
    corner = np.add(tail, [[0, -0.22], [0.22, -0.22], [0.22, 0]])
    right.plot(*corner.T, lw=1, color=PALETTE["ink"])
right.text(2.1, 0.12, "channel 0 →", ha="center", size=9)
right.set_title("backward: tangent, half as long")
for ax in (left, right):
    ax.set(xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), aspect="equal")
    ax.axis("off")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.6.4. LayerNorm with three channels, seen along the constant vector.
# Left: all rows on a ray, small or large, become the same point of the circle
# of radius $\sqrt 3$ (orange). Right: so a step along the ray could change
# nothing, and the gradient has no part in it: each arrow stands at a right
# angle to its ray and turns the row towards channel 0, at the right. On the
# circle of twice the radius the arrows are half as long.*
#
# That last fact is the factor $r$ in (1.6.10): a row that has grown is turned
# less.
#
# ## Count it
#
# The layer has $2C$ parameters. For each number of a row, forward takes one
# operation for the mean, three for the variance (subtract, square, add) and
# three for the output. Backward takes two to rebuild $\hat x$, three for $dw$
# and $db$, one for $d\hat x$, three for the two means and five for $dx$: 7
# and 14. Two numbers a row are saved, $2BT$.
#
# ## Take away
#
# - Without it sizes multiply from layer to layer; with it each layer reads
#   numbers of size 1.
# - LayerNorm works on each token alone: subtract the mean, divide by the
#   deviation, scale and shift each channel.
# - It cannot see the offset or the scale of a row, so its gradient has no
#   component along them; (1.6.10) subtracts exactly these two.
# - Two saved numbers a row rebuild what backward needs.
#
# ## Design note
#
# We could have saved $\hat x$ and spared backward the subtraction and the
# product that rebuild it. In GPT-2 124M with B·T = 4·1024 that is 25 arrays of
# 12.6 MB, 315 MB in all that the model would have to hold from the forward
# pass to the backward pass. Two operations a number are the smaller price.
#
# The other alternative is RMSNorm, which drops the mean and the bias: $y_i =
# w_i x_i / \sqrt{\overline{x^2} + \epsilon}$. It saves one sum a row and
# trains as well in many models. Exercise 2 derives its gradient.
#
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
once = gradients(layernorm_backward)[0]
inp *= 1000
compare("1000 dinp", 1000 * gradients(layernorm_backward)[0], once, tol=1e-4)
inp /= 1000

# %% [markdown]
# **2** (★★). Derive the backward pass of RMSNorm and check it. Which of the
# two blind directions is left?
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# With $r = (\overline{x^2} + \epsilon)^{-1/2}$ and $\hat x_i = x_i r$ the
# mean's road is gone. $x_j$ enters $\hat x_j$ with factor $r$, and $r$ with
# $\partial r / \partial x_j = -\tfrac12 r^3 \cdot \tfrac2C x_j$. As in
# (1.6.6), $dr = \sum_i d\hat x_i\, x_i$. So $dx_j = r\, d\hat x_j - \tfrac1C
# r^3 x_j \sum_i d\hat x_i\, x_i$, and with $x_i r = \hat x_i$, twice, this is
# $r\,(d\hat x_j - \hat x_j\; \overline{d\hat x\,\hat x})$: (1.6.10) without
# the first mean. The gradient still has no component along $\hat x$; it may
# have one along the constant vector.
# :::


# %% exercise 2, the gradient tags=["hide-cell"]
def rmsnorm(x, w):
    """What it puts out, and r, with a last axis of length 1."""
    r = 1 / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPS)
    return x * r * w, r


def rmsnorm_backward(dout, x, w):
    _, r = rmsnorm(x, w)
    norm, dnorm = x * r, dout * w
    return r * (dnorm - norm * (dnorm * norm).mean(axis=-1, keepdims=True))


# %% exercise 2, checked
y = rmsnorm(np.array([[1.0, 7.0]]), np.array([1.0, 2.0]))[0]  # 25: mean square
compare("by hand", y, [[0.2, 2.8]], tol=1e-5)
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
whole = row.dtype == np.float32 and row.shape == (768,)
verdict("the row", whole, "is 768 numbers in float32")
exact = row.astype(np.float64).var()
one_sweep = np.mean(row * row) - np.mean(row) ** 2
two_sweeps = np.mean((row - np.mean(row)) ** 2)
verdict("one sweep", abs(one_sweep - exact) > 0.1 * exact, "is off by > 10 %")
near = abs(two_sweeps - exact) < 1e-5 * exact
verdict("two sweeps", near, "is right to five digits")

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
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.6")
