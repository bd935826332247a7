# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       reference.rmsnorm: "RMSNorm in NumPy, forward and backward."
#       cpu.rmsnorm: "RMSNorm, compiled for the processor's cores."
#       cuda.rmsnorm: "RMSNorm on a GPU, forward and backward."
# ---

# %% [markdown]
# # RMSNorm: keep the size, forget the mean
#
# > RMSNorm divides a row by its root mean square and subtracts nothing; what
# > LayerNorm did beyond that, the layers around it can do. Gemma multiplies by
# > 1 + w.
#
# *Reading time: 30 minutes. You need: LayerNorm
# ([chapter 1.6](../1_by_hand/06_layernorm.ipynb)); for the last two sections
# chapters [2.2](../2_cpu/02_rows.ipynb) and
# [3.4](../3_gpu/04_layernorm.ipynb).*

# %% [markdown]
# ## Where we are
#
# Parts 1 to 4 built one model, GPT-2 of 2019. The models of this part are put
# together in the same way: a stream, blocks of two halves, a table of tokens.
# What has changed is inside the boxes, and we change one box a chapter. The
# first is the norm, which stands where LayerNorm stood: before each half of a
# block, and once more before the logits. Llama, Mistral, Gemma and Qwen all have
# *RMSNorm*, LayerNorm with two things left out. At the end you can
#
# - say which half of LayerNorm keeps the sizes steady, and which does not;
# - turn a network with LayerNorm into one with RMSNorm that computes the same;
# - derive RMSNorm's gradient, with one sum a row in place of two;
# - say why Gemma learns $w$ and multiplies by $1 + w$, and what is lost when
#   that product is rounded too early.

# %% [markdown]
# ## Setup

# %% setup
from functools import partial

import matplotlib.pyplot as plt

from llmnb.book.diagram import PALETTE
from llmnb.book.verify import compare, numerical_gradient, verdict

# %% imports of the layer tags=["export"] module="reference.rmsnorm"
import numpy as np

from llmnb.shapes import shapes

# %% the seed
rng = np.random.default_rng(8)

# %% [markdown]
# ## Why it is there
#
# LayerNorm does two things to a row: it takes the mean away, and it divides by
# the deviation. [Chapter 1.6](../1_by_hand/06_layernorm.ipynb) showed what a
# deep network is without them: its numbers grow or shrink by the same factor
# at every layer. Which of the two is it that helps? Take the experiment of
# figure 1.6.2 again, 64 vectors and twelve matrices drawn a quarter too large,
# and do only one of them before each matrix. The first vectors have a
# mean of 3, so that there is something to take away. The *size* of numbers is again
# the root of their mean square.


# %% one half of LayerNorm at a time
def centred(x):
    return x - x.mean(axis=1, keepdims=True)


def divided(x):
    return x / np.sqrt((x**2).mean(axis=1, keepdims=True))


def sizes(*before):
    x, found = rng.normal(3, 1, (64, 96)), []
    for _ in range(12):
        for step in before:
            x = step(x)
        x = x @ rng.normal(scale=1.25 / np.sqrt(96), size=(96, 96))
        found.append(np.sqrt((x**2).mean()))
    return found


curves = {
    "neither": sizes(),
    "mean taken away": sizes(centred),
    "divided by size": sizes(divided),
    "both": sizes(centred, divided),
}
for name in ("neither", "mean taken away"):
    verdict(name, curves[name][-1] > 5, "the numbers grow fivefold")
for name in ("divided by size", "both"):
    calm = 1 < min(curves[name]) < max(curves[name]) < 1.5
    verdict(name, calm, "they stay near 1.25")

# %% [markdown]
# So the mean could go, as far as sizes are concerned. But does the network
# lose something that it could compute before? It does not. LayerNorm is
# RMSNorm of a row whose mean was taken away. What it reads is the stream, and
# the stream is a sum: of the token's vector and of what each half block has
# written. If everything that writes into the stream writes rows of mean 0, the
# stream has mean 0 everywhere, and LayerNorm has nothing to take away. And to
# make a writer do so, we subtract from its matrix, once and for all, the mean
# over its output channels:
#
# $$ W'_{oi} = W_{oi} - \frac1C \sum_j W_{ji} . \tag{5.1.1} $$
#
# For then each column of $W'$ sums to 0, and so does $W' x$, whatever $x$ is. The
# biases of writers and the tokens' vectors lose their means in the same way.
# A network with LayerNorm is so turned into one with RMSNorm that computes the
# same. We can watch it happen. Eight tokens and three half blocks, each a
# matrix to a wider layer, a bend and a matrix back:


# %% two norms without weights
def rmsnorm(x):
    return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5)


def layernorm(x):
    return rmsnorm(centred(x))


# %% a stream, and one whose writers are centred
def stream(norm, tokens, blocks):
    x = tokens
    for reads, writes in blocks:
        x = x + np.tanh(norm(x) @ reads.T) @ writes.T
    return norm(x)


tokens = rng.normal(1, 1, (8, 12))
blocks = [
    (rng.normal(size=(48, 12)), rng.normal(size=(12, 48))) for _ in range(3)
]
without_mean = [(reads, centred(writes.T).T) for reads, writes in blocks]
want = stream(layernorm, tokens, blocks)
got = stream(rmsnorm, centred(tokens), without_mean)
compare("RMSNorm, centred", got, want, tol=1e-12)

# %% [markdown]
# The second thing left out is the shift $b$. After a norm comes a linear
# layer, and it makes of $b$ a constant vector, $W b$. A linear layer that has a
# bias of its own has that already. Llama and its relatives leave out the
# biases of the linear layers as well, and there the argument ends: such a model
# can do a little less, by a constant in each layer. The makers of
# [PaLM](https://arxiv.org/abs/2204.02311) report that large models train more
# steadily so.

# %% [markdown]
# ## By hand
#
# Three tokens of three channels: $(1, 2, 3)$, ten times as much, and ten more.
# The squares of the first are 1, 4 and 9, their mean is $14/3$, and the root of
# it, the *root mean square*, is 2.1602. Divide: $(0.4629, 0.9258, 1.3887)$.
# $(10, 20, 30)$ has ten times the root mean square and gives the same three
# numbers. $(11, 12, 13)$ does not: its root mean square is 12.0277, and the
# result $(0.9146, 0.9977, 1.0808)$. LayerNorm would give the same to all three.

# %% three rows by hand
x = np.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0], [11.0, 12.0, 13.0]])
size = np.sqrt((x**2).mean(axis=1, keepdims=True))
by_hand = x / size
print(np.round(by_hand, 4))

# %% [markdown]
# | tensor | shape | what it holds |
# |---|---|---|
# | `inp`, `out` | (B, T, C) | C numbers for each of the B·T tokens |
# | `rstd` | (B, T) | one over the row's root mean square |
# | `weight` | (C,) | a learned scale for each channel |

# %% [markdown]
# ## Forward
#
# With the mean square of a row, and a small $\epsilon$ for rows of zeros,
#
# $$ \overline{x^2} = \frac1C \sum_i x_i^2 , \qquad
#    r = \frac{1}{\sqrt{\overline{x^2} + \epsilon}} , \tag{5.1.2} $$
#
# the row is multiplied by $r$, and each channel by its learned scale:
#
# $$ \hat x_i = x_i\, r , \qquad y_i = w_i\, \hat x_i . \tag{5.1.3} $$
#
# $\epsilon$ is $10^{-5}$ in Llama and Mistral, $10^{-6}$ in Gemma and Qwen 3.
# It is a number of the model, in its file, and a wrong one shows only as
# slightly worse text; so the function takes it as an argument.
#
# **Gemma's weights.** Gemma stores another number for each channel, the
# distance of the scale from 1:
#
# $$ y_i = (1 + w_i)\, \hat x_i . \tag{5.1.4} $$
#
# It computes nothing that (5.1.3) could not. But a fresh model has $w = 0$ in
# place of 1. And weight decay, for whoever applies it to norms too, pulls $w$
# towards 0 and so the scale towards 1: towards a norm that does nothing more,
# where in (5.1.3) it would pull towards a layer that puts out nothing. (In this
# book norms do not decay, [chapter 1.12](../1_by_hand/12_adamw.ipynb).) The
# function has an argument `offset` for it, 1 in Gemma and 0 elsewhere.


# %% rmsnorm, forward tags=["export"] module="reference.rmsnorm"
@shapes("B T C!, B T!, B T C, C", eps="above 0", offset="at least 0")
def rmsnorm_forward(out, rstd, inp, weight, eps=1e-5, offset=0.0):
    """Divide each row of inp by its root mean square, then scale.

    out, inp: (B, T, C). rstd: (B, T), the reciprocal of each row's root
    mean square, saved for the backward pass. weight: (C,); each channel is
    multiplied by offset + weight, offset 1 in Gemma and 0 elsewhere. eps:
    added to the mean square. All of one float dtype; out and rstd are
    overwritten.
    """
    rstd[...] = 1 / np.sqrt((inp**2).mean(axis=-1) + float(eps))
    out[...] = inp * rstd[..., None] * (weight + float(offset))


# %% the three rows through the function
y, rstd = np.zeros((1, 3, 3)), np.zeros((1, 3))
rmsnorm_forward(y, rstd, x[None], np.ones(3))
compare("by hand", y[0], by_hand, tol=2e-6)

# %% [markdown]
# ## Rounded once
#
# Published models are stored, and mostly run, in bfloat16, the 16-bit numbers
# of [chapter 2.6](../2_cpu/06_bfloat16.ipynb). They have eight significant
# bits: between 1 and 2 neighbours lie $2^{-7} = 0.0078$ apart, and near 0.003
# they lie $2^{-16}$ apart. Gemma's stored $w$ is near 0, where the numbers are
# dense. Compute $1 + w$ in bfloat16, and it is near 1, where they are sparse:

# %% what 1 + w is in bfloat16
from llmnb.reference.bfloat16 import from_bfloat16, to_bfloat16


def rounded(x):
    """The nearest bfloat16 numbers, as float32."""
    return from_bfloat16(to_bfloat16(x.astype(np.float32)))


w = rounded(rng.normal(scale=0.02, size=4096))
verdict("1 + 0.003", rounded(np.array([1.003]))[0] == 1, "is 1 in bfloat16")
stored, left = (len(np.unique(z)) for z in (w, rounded(1 + w)))
verdict("weights", 20 * left < stored, "less than a twentieth is left")

# %% [markdown]
# Of all the different weights, fewer than one in twenty are left. So Gemma
# computes the root, the sum $1 + w$ and the product in float32 and rounds once, at
# the end. Llama's published code rounds $\hat x$ first and multiplies then, which
# rounds the product a second time. How far off is each, at most?

# %% three orders of rounding
x = rng.normal(size=(64, 4096)).astype(np.float32)
norm = divided(x.astype(np.float64))
exact = norm * (1 + w.astype(np.float64))
orders = {
    "product rounded": rounded(norm * (1 + w)),
    "the norm too": rounded(rounded(norm) * (1 + w)),
    "and 1 + w": rounded(rounded(norm) * rounded(1 + w)),
}
worst = {k: (np.abs(v / exact - 1)).max() for k, v in orders.items()}
for k, limit in zip(worst, (1, 2, 3), strict=True):
    inside = limit - 1 < 256 * worst[k] < limit
    verdict(k, inside, f"off by up to {limit} / 256")

# %% [markdown]
# A number that is rounded to eight bits is off by up to $1/256$ of itself, and each
# rounding adds its share. llmnb need not choose: its arrays between the
# layers are float32 even where products are taken in bfloat16, so a norm never
# rounds to 16 bits (but for training on a GPU, [chapter 5.12](12_bfloat16.ipynb)).
# Against a library that does, this is where logits part.

# %% [markdown]
# ## Backward, derived
#
# Later layers hand us $dy$. The scale is one for all rows $n$, and within a row
# (5.1.3) is a product:
#
# $$ dw_i = \sum_n dy_{n,i}\, \hat x_{n,i} , \qquad
#    d\hat x_i = w_i\, dy_i . \tag{5.1.5} $$
#
# With Gemma's (5.1.4) the first stays as it is, since the derivative of
# $1 + w_i$ by $w_i$ is 1, and in the second $1 + w_i$ stands in the place of
# $w_i$.
#
# For $dx$ look at figure 1.6.3, the roads by which an input of LayerNorm
# reaches the loss, and strike out the green one: no mean is taken away. Two
# are left, directly through $\hat x_j$, and through the mean square and $r$.
#
# **The factor.** $r$ enters every $\hat x_i$, with factor $x_i$:
#
# $$ dr = \sum_i d\hat x_i\, x_i . \tag{5.1.6} $$
#
# **The mean square.** It enters $r$ alone. From
# $r = (\overline{x^2} + \epsilon)^{-1/2}$ the derivative is
# $-\frac12 (\overline{x^2} + \epsilon)^{-3/2} = -\frac12 r^3$. Put in (5.1.6),
# and let one of the factors $r$ make $\hat x_i$ of $x_i$:
#
# $$ d\bigl(\overline{x^2}\bigr) = -\tfrac12\, r^3\, dr
#    = -\tfrac12\, r^2 \sum_i d\hat x_i\, \hat x_i . \tag{5.1.7} $$
#
# **The input.** $x_j$ enters $\hat x_j$ with factor $r$, and the mean square
# with factor $\frac2C x_j$:
#
# $$ dx_j = r\, d\hat x_j + \tfrac2C\, x_j\, d\bigl(\overline{x^2}\bigr) .
#    \tag{5.1.8} $$
#
# With (5.1.7) the second term is
# $-\frac1C\, r^2 x_j \sum_i d\hat x_i\, \hat x_i$. Again one factor $r$ makes
# $\hat x_j$ of $x_j$, the other comes out of the bracket, and the sum over $C$
# is a mean of the row:
#
# $$
# \begin{aligned}
# dx_j &= r \Bigl( d\hat x_j - \hat x_j\; \overline{d\hat x\, \hat x} \Bigr) , \\
# \overline{d\hat x\, \hat x} &= \tfrac1C \sum_i d\hat x_i\, \hat x_i .
# \end{aligned}
# \tag{5.1.9}
# $$
#
# It is (1.6.10) without its first mean: the gradient loses its component along
# $\hat x$, because a longer row gives the same output, and keeps that along the
# constant vector, because a row moved by a constant does not.
#
# **What to save.** $r$, one number a row; $x$ is in memory anyway.


# %% rmsnorm, backward tags=["export"] module="reference.rmsnorm"
@shapes("B T C!, C!, B T C, B T C, C, B T", offset="at least 0")
def rmsnorm_backward(
    dinp, dweight, dout, inp, weight, rstd, offset=0.0, add=True
):
    """Add RMSNorm's gradients to dinp and dweight.

    dinp, dout, inp: (B, T, C). dweight, weight: (C,). rstd: (B, T), as the
    forward pass left it. offset: as there. add: False overwrites dinp
    instead of adding to it. All of one float dtype.
    """
    hat = inp * rstd[..., None]
    dweight += (dout * hat).sum(axis=(0, 1))
    dhat = dout * (weight + float(offset))
    mean = (dhat * hat).mean(axis=-1, keepdims=True)
    grad = rstd[..., None] * (dhat - hat * mean)
    dinp[...] = dinp + grad if add else grad


# %% [markdown]
# ## Proof
#
# As in Part 1: $\mathcal L = \sum g \cdot y$, float64, step $h = 10^{-5}$,
# tolerance $10^{-8}$; for an offset of 0, and of 1.

# %% a problem to differentiate
inp, g, out = rng.normal(size=(3, 2, 3, 5))
weight, rstd = rng.normal(size=5), np.empty((2, 3))


def loss(offset):
    rmsnorm_forward(out, rstd, inp, weight, offset=offset)
    return (g * out).sum()


# %% our gradients
def gradients(backward, offset=0.0):
    grads = np.ones_like(inp), np.ones_like(weight)
    loss(offset)
    backward(*grads, g, inp, weight, rstd, offset)
    return [grad - 1 for grad in grads]


# %% against central differences
for offset in (0.0, 1.0):
    dinp, dweight = gradients(rmsnorm_backward, offset)
    want = numerical_gradient(partial(loss, offset), inp)
    compare(f"dinp, offset {offset:.0f}", dinp, want, tol=1e-8)
    want = numerical_gradient(partial(loss, offset), weight)
    compare(f"dweight, offset {offset:.0f}", dweight, want, tol=1e-8)

# %% [markdown]
# A plausible mistake with Gemma's weights: the forward pass multiplies by
# $1 + w$, and the backward pass, written for Llama, still by $w$. In a fresh
# model $w$ is 0, no gradient passes, and nothing crashes. The check catches it:


# %% a gradient made wrong on purpose
def without_the_one(dinp, dweight, dout, inp, weight, rstd, offset):
    rmsnorm_backward(dinp, dweight, dout, inp, weight, rstd)


wrong, _ = gradients(without_the_one, 1.0)
try:
    want = numerical_gradient(partial(loss, 1.0), inp)
    compare("dinp, by w", wrong, want, tol=1e-8)
    caught = False
except AssertionError:
    caught = True
verdict("the mistake", caught, "is caught")

# %% [markdown]
# And the two directions of LayerNorm. A gradient of RMSNorm has no component
# along its row, but for $\epsilon$, and it may have one along the constant vector:

# %% the direction in which it is blind, and one in which it is not
dinp, _ = gradients(rmsnorm_backward)
along = (dinp * inp).sum(axis=-1)
compare("along the row", along, np.zeros((2, 3)), tol=1e-4)  # epsilon's
seen = np.abs(dinp.sum(axis=-1)).max() > 0.1
verdict("along ones", seen, "it is not zero")

# %% [markdown]
# ## See it
#
# With two channels a row is a point of the plane, and both norms can be drawn.
# LayerNorm takes the mean away, which leaves a line, and divides by the
# distance from 0, which leaves two points of it: whatever the row was, the
# output says only which of its channels was larger. RMSNorm divides by the
# length, and the direction is left: a circle. For the way back let
# $\mathcal L = y_0$ with $w = 1$, at rows on two circles.

# %% rows, where they land, and their gradients
angle = np.linspace(0, 2 * np.pi, 16, endpoint=False)
circle = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
rows = np.stack([1.0 * circle, 2.0 * circle])
r = np.empty(rows.shape[:2])
rmsnorm_forward(np.empty_like(rows), r, rows, np.ones(2))
up, field = np.zeros_like(rows), np.zeros_like(rows)
up[..., 0] = 1
rmsnorm_backward(field, np.zeros(2), up, rows, np.ones(2), r)
outward = (field * rows).sum(axis=-1)
compare("right angles", outward, np.zeros((2, 16)), tol=1e-4)
compare("twice as far", 2 * field[1], field[0], tol=1e-4)
cloud = rng.normal(size=(40, 2))
landed = np.abs(layernorm(cloud))
compare("two points", landed, np.ones((40, 2)), tol=0.1)

# %% draw it tags=["hide-input"]
fig, (left, right) = plt.subplots(1, 2, figsize=(8.4, 4.2), dpi=100)
for row, end in zip(cloud, layernorm(cloud), strict=True):
    colour = PALETTE["blue" if end[0] > 0 else "orange"]
    left.plot(*np.stack([row, end]).T, ":", lw=0.7, color=colour)
    left.plot(*row, "o", ms=3.5, color=colour)
    left.plot(*end, "o", ms=8, color=colour, zorder=5)
left.plot((-2.4, 2.4), (2.4, -2.4), lw=0.8, color=PALETTE["grey"])
left.set_title("LayerNorm: two points")
radius = np.sqrt(2)
ring = plt.Circle((0, 0), radius, fill=False, ec=PALETTE["orange"], lw=2)
right.add_patch(ring)
for points, arrows in zip(rows, field, strict=True):
    right.plot(*points.T, "o", ms=3.5, color=PALETTE["blue"])
    right.quiver(*points.T, *arrows.T, angles="xy", scale_units="xy",
                 scale=2.2, width=0.007, color=PALETTE["blue"])  # fmt: skip
for way in circle:
    right.plot(*np.outer(way, (0, 2)), ":", lw=0.6, color=PALETTE["grey"])
right.set_title("RMSNorm: a circle, and gradients along it")
for ax in (left, right):
    ax.set(xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), aspect="equal")
    ax.set(xlabel="channel 0", ylabel="channel 1", xticks=[], yticks=[])
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 5.1.1. Rows of two channels. Left: LayerNorm keeps one bit of them.
# Right: RMSNorm brings each along its ray to the orange circle and keeps its
# direction. The gradient of channel 0 (arrows) turns a row along a circle, and
# on the circle of twice the radius by half as much.*
#
# With $C$ channels LayerNorm takes two of $C$ dimensions, RMSNorm one. At
# $C = 768$ the difference is nothing; the picture is about which is taken.

# %% [markdown]
# ## Count it
#
# $C$ parameters, where LayerNorm has $2C$. Forward takes four operations a
# number, two for the mean square and two for the output, where LayerNorm takes
# seven. Backward takes one to rebuild $\hat x$, two for $dw$, one for
# $d\hat x$, two for the mean and four for $dx$: ten, where LayerNorm takes 14.
# One number a row is saved instead of two.
#
# None of this makes a model noticeably faster: at C = 768 the norms are less than
# a thousandth of its operations. What the change buys on text is measured in
# [chapter 5.5](05_architectures.ipynb), where each part takes its turn in
# Part 1's model.

# %% [markdown]
# ## On a CPU
#
# [Chapter 2.2](../2_cpu/02_rows.ipynb) has the plan: threads share out the
# rows, and each row is read from memory once and does all its work in the
# first-level cache. The second sweep over a row, which LayerNorm needs to sum
# distances from the mean, has nothing to do here and is gone.

# %% imports of the CPU module tags=["export"] module="cpu.rmsnorm"
import math

import numpy as np

from llmnb.backend import noted
from llmnb.cpu.jit import arguments, share, team
from llmnb.cpu.layernorm import add_rows
from llmnb.shapes import shapes


# %% the forward kernel tags=["exporti"] module="cpu.rmsnorm"
@team
def _rmsnorm_forward(part, parts, address):
    out, rstd, inp, weight, eps, offset = arguments(address)
    (rows, C), number = inp.shape, inp.dtype.type
    zero, one, size = number(0), number(1), number(C)
    shift, small = number(offset), number(eps)
    mine = share(rows, part, parts)
    for n in range(mine.start, mine.stop):
        squares = zero
        for i in range(C):
            squares += inp[n, i] * inp[n, i]
        r = one / math.sqrt(squares / size + small)
        for i in range(C):
            out[n, i] = inp[n, i] * r * (weight[i] + shift)
        rstd[n] = r


# %% [markdown]
# `eps` and `offset` arrive as float64 and are cast to the arrays' type once;
# in float32 they would otherwise pull the row into float64.


# %% rmsnorm, forward, compiled tags=["export"] module="cpu.rmsnorm"
@shapes("B T C!, B T!, B T C, C", eps="above 0", offset="at least 0")
def rmsnorm_forward(out, rstd, inp, weight, eps=1e-5, offset=0.0):
    """Divide each row of inp by its root mean square, then scale.

    out, inp: (B, T, C). rstd: (B, T), the reciprocal of each row's root
    mean square, saved for the backward pass. weight: (C,); each channel is
    multiplied by offset + weight. eps: added to the mean square. All
    float32 or all float64 and C-contiguous; out and rstd are overwritten.
    Raises TypeError or ValueError before it computes anything.
    """
    C = inp.shape[-1]
    y, x = out.reshape(-1, C), inp.reshape(-1, C)
    numbers = float(eps), float(offset)
    _rmsnorm_forward(y, rstd.reshape(-1), x, weight, *numbers)


# %% [markdown]
# Backward sums $dw$ in parts whose number follows from the rows and never from
# the threads, so the order of the additions is always the same.


# %% the backward kernel tags=["exporti"] module="cpu.rmsnorm"
@team
def _rmsnorm_backward(part, parts, address):
    dinp, dw, dout, inp, weight, rstd, offset, add = arguments(address)
    (rows, C), number = inp.shape, inp.dtype.type
    zero, size, shift = number(0), number(C), number(offset)
    mine = share(len(dw), part, parts)
    for k in range(mine.start, mine.stop):
        some = share(rows, k, len(dw))
        dw[k] = 0
        for n in range(some.start, some.stop):
            r, mean = rstd[n], zero
            for i in range(C):
                mean += dout[n, i] * (weight[i] + shift) * inp[n, i]
            mean *= r / size
            for i in range(C):
                dhat = dout[n, i] * (weight[i] + shift)
                grad = r * (dhat - inp[n, i] * r * mean)
                if add:
                    grad += dinp[n, i]
                dinp[n, i] = grad
            for i in range(C):
                dw[k, i] += dout[n, i] * inp[n, i] * r


# %% rmsnorm, backward, compiled tags=["export"] module="cpu.rmsnorm"
@shapes("B T C!, C!, B T C, B T C, C, B T", offset="at least 0")
def rmsnorm_backward(
    dinp, dweight, dout, inp, weight, rstd, offset=0.0, add=True
):
    """Add RMSNorm's gradients to dinp and dweight.

    dinp, dout, inp: (B, T, C). dweight, weight: (C,). rstd: (B, T), as the
    forward pass left it. offset: as there. add: False overwrites dinp
    instead of adding to it. All float32 or all float64 and C-contiguous.
    Raises TypeError or ValueError before it computes anything.
    """
    C = inp.shape[-1]
    dx, dy, x = (a.reshape(-1, C) for a in (dinp, dout, inp))
    sums = np.empty((min(64, -(-len(x) // 16)), C), inp.dtype)
    how = float(offset), bool(add)
    _rmsnorm_backward(dx, sums, dy, x, weight, rstd.reshape(-1), *how)
    noted(add_rows, dweight, sums)


# %% float32, odd sizes, one thread and all
from types import SimpleNamespace

import numba

from llmnb import cpu, reference


def problem(B, T, C):
    p = SimpleNamespace(rstd=np.zeros((B, T), "f4"))
    p.inp, p.dout = rng.normal(size=(2, B, T, C)).astype("f4")
    p.weight, p.dweight = rng.normal(size=(2, C)).astype("f4")
    p.out, p.dinp = np.zeros((2, B, T, C), "f4")
    return p


def back(layer, p, add):
    arrays = p.dinp, p.dweight, p.dout, p.inp, p.weight, p.rstd
    layer.rmsnorm_backward(*arrays, offset=1.0, add=add)


def both_ways(layer, p):
    layer.rmsnorm_forward(p.out, p.rstd, p.inp, p.weight, 0.1, 1.0)
    back(layer, p, False)


def results(layer, p):
    p.out[...], p.dinp[...], p.dweight[...] = np.nan, np.nan, 1
    both_ways(layer, p)
    back(layer, p, True)  # and once more, added
    return [x.copy() for x in (p.out, p.dinp, p.dweight)]


p, threads = problem(3, 37, 331), numba.get_num_threads()
want, got = results(reference, p), results(cpu, p)
numba.set_num_threads(1)
alone = results(cpu, p)
numba.set_num_threads(threads)
for name, x, y in zip(("out", "dinp", "dweight"), got, want, strict=True):
    compare(name, x, y, tol=2e-5)
same = all(np.array_equal(x, y) for x, y in zip(got, alone, strict=True))
verdict("threads", same, "change no bit")

# %% [markdown]
# Its time against NumPy's:

# %% its time tags=["nbval-ignore-output"]
from llmnb.timing import fastest, machine

p = problem(4, 256, 768)
slow, fast = fastest(both_ways, reference, p), fastest(both_ways, cpu, p)
print(f"{machine()}, {threads} threads")
print(f"{slow / fast:.1f} times as fast")

# %% [markdown]
# ## On a GPU
#
# Again a warp shares a row, as in
# [chapter 3.4](../3_gpu/04_layernorm.ipynb), and its lanes add up their squares
# by five exchanges. LayerNorm's kernel keeps the row in shared memory, because
# it sweeps over it three times. Here two are left. We leave the row to the
# first-level cache in between, and the kernel needs no shared memory.

# %% imports of the GPU module tags=["export"] module="cuda.rmsnorm"
import math

import numpy as np

from llmnb.cuda.layernorm import _parts, add_parts, blocks
from llmnb.gpu.launch import DEVICE, given_work, kernel
from llmnb.gpu.simulator import cuda
from llmnb.gpu.warp import block_sum, warp_sum
from llmnb.shapes import shapes


# %% a warp a row tags=["exporti"] module="cuda.rmsnorm"
ZERO, ONE = np.float32(0), np.float32(1)


@kernel(launch_bounds=256)
def _forward(out, rstd, inp, weight, eps, offset):
    n, lane = cuda.grid(1) // 32, cuda.threadIdx.x % 32
    rows, C = inp.shape
    if n >= rows:  # the whole warp leaves, so exchanges stay complete
        return
    squares = ZERO
    for i in range(lane, C, 32):
        x = inp[n, i]
        squares += x * x
    r = ONE / math.sqrt(warp_sum(squares) / np.float32(C) + eps)
    for i in range(lane, C, 32):
        out[n, i] = inp[n, i] * r * (weight[i] + offset)
    if lane == 0:
        rstd[n] = r


# %% rmsnorm, forward, on a GPU tags=["export"] module="cuda.rmsnorm"
@shapes("B T C!, B T!, B T C, C", DEVICE, eps="above 0", offset="at least 0")
def rmsnorm_forward(out, rstd, inp, weight, eps=1e-5, offset=0.0):
    """Divide each row of inp by its root mean square, then scale.

    out, inp: (B, T, C). rstd: (B, T), the reciprocal of each row's root
    mean square, saved for the backward pass. weight: (C,); each channel is
    multiplied by offset + weight. eps: added to the mean square. All
    float32 on a device and C-contiguous; out and rstd are overwritten.
    Raises TypeError or ValueError before it launches anything.
    """
    rows, C = rstd.size, len(weight)
    arrays = out.reshape(rows, C), rstd.reshape(rows), inp.reshape(rows, C)
    numbers = np.float32(eps), np.float32(offset)
    _forward[blocks(rows, 8), 256](*arrays, weight, *numbers)


# %% [markdown]
# Backward, $n$ blocks share the rows: block $b$ takes rows $b$, $b + n$, $b + 2n$ and
# so on, and its threads share each row out. A thread has the same channels in all
# its rows, and adds its part of $dw$ to a row of a table that is the block's own. A
# second launch, LayerNorm's, adds the table up: no atomic operation, and one order
# of additions whatever runs first.


# %% a block a row tags=["exporti"] module="cuda.rmsnorm"
@kernel(launch_bounds=256)
def _backward(dinp, table, dout, inp, weight, rstd, offset, add):
    parts = cuda.shared.array(32, np.float32)
    (rows, C), first = inp.shape, cuda.threadIdx.x
    mine, step = cuda.blockIdx.x, cuda.blockDim.x  # this block's sums
    for i in range(first, C, step):
        table[mine, i] = ZERO
    for n in range(mine, rows, cuda.gridDim.x):
        r, mean = rstd[n], ZERO
        for i in range(first, C, step):
            mean += dout[n, i] * (weight[i] + offset) * (inp[n, i] * r)
        mean = block_sum(mean, parts) / np.float32(C)
        for i in range(first, C, step):
            dy, hat = dout[n, i], inp[n, i] * r
            grad = r * (dy * (weight[i] + offset) - hat * mean)
            dinp[n, i] = grad + (dinp[n, i] if add else ZERO)
            table[mine, i] += dy * hat


# %% rmsnorm, backward, on a GPU tags=["export"] module="cuda.rmsnorm"
def rmsnorm_scratch(rows, C):
    """How many floats rmsnorm_backward wants to work in; rows: B * T."""
    return _parts(rows) * C


@shapes(
    "B T C!, C!, B T C, B T C, C, B T", DEVICE, offset="at least 0", work="W!?"
)
def rmsnorm_backward(
    dinp, dweight, dout, inp, weight, rstd, offset=0.0, add=True, work=None
):
    """Add RMSNorm's gradients to dinp and dweight.

    dinp, dout, inp: (B, T, C). dweight, weight: (C,). rstd: (B, T), as the
    forward pass left it. offset: as there. add: False overwrites dinp
    instead of adding to it. work: at least rmsnorm_scratch(B * T, C) floats
    in one dimension, whose contents are lost; allocated if None. All
    float32 on a device and C-contiguous. Raises TypeError or ValueError
    before it launches anything.
    """
    rows, C = rstd.size, len(weight)
    floats, parts = rmsnorm_scratch(rows, C), _parts(rows)
    work = given_work("rmsnorm_backward", work, floats, inp)
    dx, dy, x = (a.reshape(rows, C) for a in (dinp, dout, inp))
    table = work[:floats].reshape(parts, C)
    arrays = dx, table, dy, x, weight, rstd.reshape(rows)
    _backward[parts, 256](*arrays, np.float32(offset), int(add))
    add_parts(dweight, dweight, work, parts, C)  # there is no dbias


# %% the same results on the simulator
from llmnb import cuda as on_gpu
from llmnb.gpu.launch import simulated, to_host
from llmnb.gpu.simulator import watch

for C in (36, 301):
    p = problem(1, 5, C)
    d = SimpleNamespace(**{k: simulated(x) for k, x in vars(p).items()})
    with watch() as seen:
        both_ways(on_gpu, d)
    back(on_gpu, d, True)
    both_ways(reference, p)
    back(reference, p, True)
    print(C, "channels:", *[k.__name__ for k, *_ in seen.launches])
    for name in ("out", "dinp", "dweight"):
        got, want = to_host(getattr(d, name)), getattr(p, name)
        compare(name, got, want, tol=1e-5)

# %% [markdown]
# `watch` would have stopped at an access outside an array, or at a race. These
# kernels have been simulated and compiled, and not run on a GPU.

# %% [markdown]
# ## Take away
#
# - Dividing by the size keeps the numbers of a deep network steady; taking the
#   mean away does not, and centred matrices can do it as well.
# - RMSNorm is blind to the length of a row and to nothing else, so its gradient
#   has one sum a row.
# - Gemma stores the distance of a scale from 1. In 16 bits that is worth
#   something only if $1 + w$ and its product are taken in 32.

# %% [markdown]
# ## Design note
#
# `offset` could have been left out: whoever loads a Gemma adds 1 to its weights,
# and whoever saves one takes it away. But then weight decay on norms would pull
# the scale towards 0, and a weight stored in 16 bits would come back with the
# digits of $1 + w$. A model should hold the numbers that its file holds.

# %% [markdown]
# ## Exercises
#
# **1** (★). The rows of a batch are multiplied by $-1$. What becomes of `out`,
# of `dinp` and of `dweight`, for the same `dout`?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# $r$ stays, $\hat x$ and $y$ change their sign. In (5.1.9) the mean changes its
# sign and so does $\hat x_j$ before it: $dx$ stays. $dw$ changes its sign.
# :::

# %% exercise 1, checked tags=["hide-cell"]
from llmnb.reference import rmsnorm_backward, rmsnorm_forward

dinp, dweight = gradients(rmsnorm_backward)
before = out.copy()
inp *= -1
turned = gradients(rmsnorm_backward)
compare("out", out, -before, tol=1e-12)
compare("dinp", turned[0], dinp, tol=1e-12)
compare("dweight", turned[1], -dweight, tol=1e-12)

# %% [markdown]
# **2** (★★). A norm's scale is redundant too: the matrix after it can take it
# over. Fold $w$ into a matrix so that RMSNorm without weights and the new
# matrix put out the same. Why do models keep $w$ all the same?
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# $\sum_i W_{oi} w_i \hat x_i$ is the product with a matrix whose column $i$ was
# multiplied by $w_i$. But the *steps* differ: one $w_i$ turns a channel up for
# all the outputs of the matrix at once, for which the matrix would have to move
# a whole column, and weight decay is not applied to it. A model that is trained
# already can be folded without loss.
# :::

# %% exercise 2, checked tags=["hide-cell"]
matrix, plain = rng.normal(size=(7, 5)), np.empty_like(out)
loss(0.0)
rmsnorm_forward(plain, rstd, inp, np.ones(5))
folded = matrix * weight
compare("folded", plain @ folded.T, out @ matrix.T, tol=1e-12)

# %% [markdown]
# ## Further reading
#
# - Zhang and Sennrich (2019),
#   [Root Mean Square Layer Normalization](https://arxiv.org/abs/1910.07467):
#   section 4 for the layer and its invariances.
# - Jiang, Gu, Zhu and Pan (2023),
#   [Pre-RMSNorm and Pre-CRMSNorm Transformers](https://arxiv.org/abs/2305.14858):
#   networks with LayerNorm turned into such with RMSNorm, as in (5.1.1).
# - Gemma Team (2024),
#   [Gemma: Open Models Based on Gemini Research and Technology](https://arxiv.org/abs/2403.08295):
#   section 2 for what Gemma takes and what it changes.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("5.1")
