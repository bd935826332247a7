# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       reference.residual: "The residual sum in NumPy, forward and backward."
# ---

# %% [markdown]
# # Residual stream: add a layer's output to its input
#
# > The sum of a layer's output and its input keeps a road open along which
# > gradients reach the first layers unchanged.
#
# *Reading time: 20 minutes. You need: LayerNorm
# ([chapter 1.6](06_layernorm.ipynb)) and GELU ([chapter 1.9](09_gelu.ipynb)). The
# fast versions: chapters [2.2](../2_cpu/02_rows.ipynb) and
# [3.5](../3_gpu/05_elementwise.ipynb).*

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="residual")

# %% [markdown]
# *Figure 1.10.1. Each block ends its two halves with an addition: what the
# half computed is added to what the half was given. The arrows that pass by
# the layers carry the input there.*
#
# The addition is called a *residual connection*: the layers in between
# compute only the difference, the residue, between input and output. What
# runs through all the additions, from the encoder to the last LayerNorm, is
# the *residual stream*. This chapter builds `residual_forward` and
# `residual_backward`, the shortest layer of the book, and shows what it is
# for. At its end you can
#
# - derive its gradient, and say why a gradient is added and not written;
# - say what a chain of layers does to a gradient without the addition;
# - compute how the variance of the stream grows with depth;
# - say where the factor $1/\sqrt{2L}$ in GPT-2's first weights comes from.

# %% [markdown]
# ## Setup

# %% setup
from types import SimpleNamespace

import matplotlib.pyplot as plt

from llmnb.book.diagram import PALETTE
from llmnb.book.verify import compare, numerical_gradient, verdict

# %% imports of the reference tags=["export"]
import numpy as np

from llmnb.shapes import shapes

# %% the seed
rng = np.random.default_rng(8)

# %% [markdown]
# ## By hand
#
# Two tokens with three channels: the stream holds $(1, 2, 3)$ and
# $(4, 5, 6)$, and a layer has computed $(10, 0, 0)$ and $(0, 0, -6)$ from
# them. The stream goes on with $(11, 2, 3)$ and $(4, 5, 0)$. A channel
# where the layer says 0 passes as it was.
#
# | tensor | shape | what it holds |
# |---|---|---|
# | `inp1` | (B, T, C) | the stream |
# | `inp2` | (B, T, C) | what the half block computed from it |
# | `out` | (B, T, C) | the stream after this half block |

# %% two tokens by hand
stream = np.array([[[1.0, 2, 3], [4, 5, 6]]])
layer = np.array([[[10.0, 0, 0], [0, 0, -6]]])
print((stream + layer).astype(int))

# %% [markdown]
# ## Forward
#
# Let $x$ be the stream and $f$ all the layers of a half block. Then
#
# $$ y = x + f(x) . \tag{1.10.1} $$
#
# The function below sees two arrays and does not know that the second was
# computed from the first.


# %% the forward pass tags=["export"]
@shapes("...!, ...~, ...~")
def residual_forward(out, inp1, inp2):
    """Add two arrays.

    out, inp1, inp2: float, all of one shape; out is overwritten, and may be
    inp1 or inp2.
    """
    np.add(inp1, inp2, out=out)


# %% the two tokens through the function
out = np.empty_like(stream)
residual_forward(out, stream, layer)
compare("by hand", out[0], [[11, 2, 3], [4, 5, 0]], tol=1e-12)

# %% [markdown]
# ## Backward, derived
#
# Element $i$ of the output is $y_i = a_i + b_i$, with $a$ for `inp1` and
# $b$ for `inp2`, so $\partial y_i / \partial a_j = \delta_{i,j}$, which is 1
# for $i = j$ and 0 otherwise, and the same for $b$. The chain rule gives
#
# $$ da_j = \sum_i dy_i\, \delta_{i,j} = dy_j , \qquad
#    db_j = dy_j . \tag{1.10.2} $$
#
# An addition hands its gradient to both terms unchanged. Nothing of the
# forward pass appears in (1.10.2), so nothing is saved.
#
# **Two readers, one gradient.** In (1.10.1) the stream is read twice: by the
# addition and by $f$. Let $J_{ij} = \partial f_i / \partial x_j$. Each
# element $x_j$ reaches the loss by both roads:
#
# $$ dx_j = dy_j + \sum_i dy_i\, J_{ij} . \tag{1.10.3} $$
#
# The first term comes from `residual_backward`, the second from the
# backward pass of the half block's first layer, and both go into the same
# array. This is why a backward function of this book adds.


# %% the backward pass tags=["export"]
@shapes("...!, ...!, ...")
def residual_backward(dinp1, dinp2, dout):
    """Add the gradient of the sum to the gradients of both its terms.

    dinp1, dinp2, dout: float, all of one shape, three distinct arrays;
    dinp1 and dinp2 are added to.
    """
    dinp1 += dout
    dinp2 += dout


# %% [markdown]
# ## Proof
#
# A check of the addition alone would prove little. We check (1.10.3): let $f$
# be GELU, so that the stream is read twice, and let
# $\mathcal L = \sum g \cdot y$ with a fixed random $g$. Float64, step
# $10^{-5}$, tolerance $10^{-8}$.

# %% a problem to differentiate
from llmnb.reference.gelu import gelu_backward, gelu_forward

B, T, C = 2, 3, 5
x, g = rng.normal(size=(2, B, T, C))
f, y = np.empty((2, B, T, C))


def loss():
    gelu_forward(f, x)
    residual_forward(y, x, f)
    return (g * y).sum()


want = numerical_gradient(loss, x)


# %% both roads into one gradient
def gradient(backward):
    dx, df = np.zeros((2, B, T, C))
    backward(dx, df, g)
    gelu_backward(dx, df, x)
    return dx


compare("dx", gradient(residual_backward), want, tol=1e-8)

# %% [markdown]
# Suppose GELU's backward pass wrote its gradient where it should add it.
# The road along the stream is lost, and the check says so:


# %% a gradient made wrong on purpose
def stream_lost(dinp1, dinp2, dout):
    dinp2 += dout


try:
    compare("dx, lossy", gradient(stream_lost), want, tol=1e-8)
    caught = False
except AssertionError:
    caught = True
verdict("the mistake", caught, "is caught")

# %% [markdown]
# ## See it: a gradient on its way down
#
# What is the addition for? Take the chain of $2L$ half blocks. Without the
# addition, $x_{l+1} = f_l(x_l)$, the gradient at the bottom is the gradient
# at the top times a product of Jacobians; with it, each factor gets the
# identity matrix $I$. With the gradients as row vectors,
#
# $$ dx_0 = dx_{2L}\, J_{2L-1} \cdots J_1 J_0
#    \quad\text{against}\quad
#    dx_0 = dx_{2L}\, (I + J_{2L-1}) \cdots (I + J_1)(I + J_0) . \tag{1.10.4} $$
#
# With one channel the Jacobians are plain slopes. Let each be 0.3, up or
# down. A product of 24 such slopes has size $0.3^{24}$, about
# $3 \cdot 10^{-13}$: the first layers would learn nothing. The factors
# $1 \pm 0.3$ scatter about 1, and their product stays within reach of 1.
# Multiply the second product out and you find $I$ alone among its terms:
# one road on which the gradient passes no layer at all.
#
# Now with real layers. Our $f$ is the second half of a GPT-2 block,
# LayerNorm, a matrix up to 4C channels, GELU, a matrix down to C, with
# GPT-2's first weights. Those are normal with deviation 0.02 at C = 768; we
# take fewer channels and raise the deviation, so that sums have the same
# size as there. We can leave out LayerNorm, the addition, or both. Besides
# the size of a gradient we watch its *alignment* with the one at the top,
# the cosine of the angle between the two: 1 for the same direction, near 0
# for directions that have nothing to do with each other.

# %% one half block
from llmnb.reference.layernorm import layernorm_backward, layernorm_forward

C, N, L = 96, 16, 12
DEVIATION = 0.02 * np.sqrt(768 / C)
one, nil = np.ones(C), np.zeros(C)


def half_block(x, seed, scale, norm):
    draw = np.random.default_rng(seed).normal
    h = SimpleNamespace(inp=x, out=x)
    if norm:
        h.out, h.stats = np.empty_like(x), np.empty((2, *x.shape[:2]))
        layernorm_forward(h.out, *h.stats, x, one, nil)
    h.up = draw(0, DEVIATION, (4 * C, C))
    h.down = draw(0, DEVIATION * scale, (C, 4 * C))
    h.wide = h.out @ h.up.T
    h.bent = np.empty_like(h.wide)
    gelu_forward(h.bent, h.wide)
    h.out = h.bent @ h.down.T
    return h


# %% its gradient
def half_block_backward(h, dout, norm):
    dwide = np.zeros_like(h.wide)
    gelu_backward(dwide, dout @ h.down, h.wide)
    dnormed = dwide @ h.up
    if not norm:
        return dnormed
    dinp = np.zeros_like(h.inp)
    unused = np.zeros((2, C))
    layernorm_backward(dinp, *unused, dnormed, h.inp, one, *h.stats)
    return dinp


# %% down the whole chain
start, top = rng.normal(size=(2, 1, N, C))


def chain(halves, residual, norm, scale=1.0):
    x, variances, blocks = start, [start.var()], []
    for seed in range(halves):
        blocks.append(half_block(x, seed, scale, norm))
        x = blocks[-1].out + (x if residual else 0)
        variances.append(x.var())
    d, grads = top, [top]
    for h in reversed(blocks):
        through = half_block_backward(h, d, norm)
        d = through + (d if residual else 0)
        grads.append(d)
    return np.array(variances), grads[::-1]


size = np.linalg.norm


def alignment(d):
    return (d * top).sum() / size(d) / size(top)


chains = {
    "neither": chain(2 * L, residual=False, norm=False),
    "LayerNorm": chain(2 * L, residual=False, norm=True),
    "addition": chain(2 * L, residual=True, norm=False),
    "both": chain(2 * L, residual=True, norm=True),
}

# %% the size and the direction of the gradient
fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.6), dpi=100)
colours = [PALETTE[c] for c in ("blue", "purple", "green", "orange")]
for (name, (_, grads)), colour, style in zip(
    chains.items(), colours, ("-", "--", ":", "-"), strict=True
):
    line = {"color": colour, "ls": style, "label": name, "lw": 2}
    left.semilogy([size(d) / size(top) for d in grads], **line)
    right.plot([alignment(d) for d in grads], **line)
left.set(title="size of the gradient", xlabel="half block")
right.set(title="alignment with the top", xlabel="half block")
right.set(ylim=(-0.15, 1.05))
left.legend(frameon=False)
for ax in (left, right):
    ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.10.3. The gradient enters at the right, above half block 24, and
# travels left. With neither LayerNorm nor the addition it shrinks to a
# third at each half block and ends below a millionth of a millionth of its
# size. LayerNorm alone keeps the size, and the direction is lost after one
# half block. The addition alone keeps the size within a factor of ten, and
# the direction fades. With both, the size lasts, and nearly half of the
# alignment is left at the bottom.*
#
# The left panel shows what (1.10.4) promised. The right one shows why size is
# not enough: LayerNorm multiplies a vanishing signal up again, and what
# comes out is large and scrambled. The addition keeps a share of the loss's
# own gradient in every layer. With the addition alone, each half block adds
# in proportion to the stream, which grows like compound interest; LayerNorm
# in front of the half block makes that a straight line, as we see next.

# %% the same in numbers that could fail
ends = {name: grads[0] for name, (_, grads) in chains.items()}
ratio = {name: size(d) / size(top) for name, d in ends.items()}
verdict("neither", ratio["neither"] < 1e-12, "is below 1e-12 of the top")
for name in ("LayerNorm", "addition", "both"):
    verdict(name, 0.1 < ratio[name] < 10, "within 10 times the top")
cosine = {name: alignment(d) for name, d in ends.items()}
verdict("both", cosine["both"] > 0.3, "aligned more than 0.3")
for name in ("neither", "LayerNorm"):
    verdict(name, abs(cosine[name]) < 0.1, "aligned less than 0.1")

# %% [markdown]
# ## See it: the stream grows
#
# The addition has a price. Each half block adds something to the stream.
# LayerNorm stands first in $f$, so the size of what is added does not depend
# on the size of the stream: every half block adds about the same variance
# $s$; and before training, with random weights, what it adds is unrelated to
# what is there, so variances sum:
#
# $$ \operatorname{Var}(x_{l+1}) \approx \operatorname{Var}(x_l) + s ,
#    \qquad \operatorname{Var}(x_{2L}) \approx \operatorname{Var}(x_0)
#    + 2L\, s . \tag{1.10.5} $$
#
# A late half block adds its $s$ to a stream of variance near $2Ls$ and
# hardly changes it, the less the deeper the model. GPT-2's remedy is to
# multiply the first weights of the last matrix of each half block by
# $1/\sqrt{2L}$. The outputs shrink by that factor, their variances by its
# square, and
#
# $$ \operatorname{Var}(x_{2L}) \approx \operatorname{Var}(x_0)
#    + 2L\, \frac{s}{2L} = \operatorname{Var}(x_0) + s , \tag{1.10.6} $$
#
# for any depth. We measure it for 12 and for 48 blocks:

# %% the variance along the stream
streams = {}
for depth in (12, 48):
    for scale in (1.0, 1 / np.sqrt(2 * depth)):
        variances, grads = chain(2 * depth, True, True, scale)
        streams[depth, scale < 1] = variances, grads[0]
s = half_block(start, 0, 1.0, True).out.var()

# %% draw it
fig, ax = plt.subplots(figsize=(7, 3.8), dpi=100)
for (depth, scaled), (variances, _) in streams.items():
    colour = PALETTE["blue" if scaled else "orange"]
    name = f"L = {depth}, " + ("scaled" if scaled else "not scaled")
    style = {"ls": "--" if depth == 12 else "-", "lw": 2}
    x = np.linspace(0, 1, len(variances))
    ax.plot(x, variances, color=colour, label=name, **style)
    rate = s / (2 * depth) if scaled else s
    line = variances[0] + rate * 2 * depth * x
    ax.plot(x, line, color=PALETTE["grey"], lw=1, zorder=0)
ax.set(xlabel="depth, as a share of the chain", ylabel="variance")
ax.set(title="variance of the residual stream", ylim=(0, None))
ax.legend(frameon=False)
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.10.4. Without scaling, the variance of the stream climbs on a
# straight line with the number of half blocks, four times as far for 48
# blocks as for 12. With the factor $1/\sqrt{2L}$ both depths end at the
# same variance, a little above where they began. Thin grey lines: (1.10.5)
# and (1.10.6), with $s$ measured on the first half block.*
#
# The gradient gains as well: by (1.10.3) its growth obeys the same
# arithmetic, with the Jacobian in place of the output.

# %% growth against prediction
for (depth, scaled), (variances, bottom) in streams.items():
    name = f"L={depth}" + (", scaled" if scaled else "")
    growth = variances[-1] - variances[0]
    predicted = s if scaled else 2 * depth * s
    close = abs(growth / predicted - 1) < 0.25
    verdict(name, close, "as predicted, to 25 %")
    if scaled:
        verdict(name, alignment(bottom) > 0.9, "gradient aligned > 0.9")

# %% [markdown]
# [Chapter 1.15](15_weights.ipynb) draws the first weights with this factor.

# %% [markdown]
# ## Count it
#
# No parameters; one addition an element forward, two backward; and nothing is
# saved for the backward pass, because the derivative of a sum does not depend on
# its terms.

# %% [markdown]
# ## Take away
#
# - A residual connection adds a layer's output to its input; its gradient
#   goes to both unchanged.
# - The stream is read twice, so its gradient is a sum: backward adds.
# - Along a chain the addition puts $I + J$ in place of $J$. The gradient
#   reaches the first layer with its size and much of its direction.
# - The stream's variance grows with depth; $1/\sqrt{2L}$ in the first
#   weights makes the growth the same for every depth.

# %% [markdown]
# ## Design note
#
# The model of [chapter 1.16](16_model.ipynb) calls neither function. Forward,
# the product that makes a layer's output adds the stream on the way to
# memory (`residual=` in [chapter 1.7](07_matmul.ipynb)), and a pass over three
# arrays is saved. Backward, (1.10.2) says that the gradient of the stream is the
# gradient of the sum. So the model keeps one array for both and lets each
# layer add its share to it: nothing is left to compute. The functions stay
# because they are the equations, and everything faster is tested against
# them.
#
# That one array must not be had by accident. The rule is that backward adds,
# and an exception to it should stand in the call, as `add=False` does for
# GELU. An array that is passed twice says nothing, so `residual_backward`
# refuses such a call.

# %% [markdown]
# ## Exercises
#
# **1** (★). A layer adds the stream to itself, $y = x + x$. What is $dx$?
# Predict what the two lines of the NumPy version leave in `dx` when both their
# outputs are `dx`, and what a version would leave that writes where ours
# adds. (`residual_backward.__wrapped__` is the function without its decorator, which
# would refuse.)
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# $y = 2x$, so $dx = 2\,dy$. NumPy carries out one line after the other and
# adds `dout` twice, which is right. A version that writes would leave
# `dout`, half of the truth.
# :::


# %% exercise 1, a solution tags=["hide-cell"]
def prediction(dout):
    return 2 * dout


# %% exercise 1, checked
d = rng.normal(size=(3, 5, 7))
dx = np.zeros_like(d)
residual_backward.__wrapped__(dx, dx, d)
verdict("x + x", np.array_equal(dx, prediction(d)), "as predicted")

# %% [markdown]
# **2** (★★). Let the slopes $a_l$ of a one-channel chain be independent,
# with mean 0 and variance $\sigma^2$. What is the mean of the squared
# gradient $\prod_l (1 + a_l)^2$ over $2L$ half blocks? And with every slope
# scaled by $1/\sqrt{2L}$? Give the limit for large $L$.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# The mean of a product of independent factors is the product of their
# means, and the mean of $(1 + a)^2$ is $1 + \sigma^2$. So it is
# $(1 + \sigma^2)^{2L}$, which grows without limit, and scaled
# $(1 + \sigma^2 / 2L)^{2L}$, which approaches $e^{\sigma^2}$.
# :::


# %% exercise 2, a solution tags=["hide-cell"]
def mean_square(variance, halves):
    return (1 + variance) ** halves


# %% exercise 2, checked
slopes = rng.choice([-0.3, 0.3], (200_000, 24)) / np.sqrt(24)
measured = ((1 + slopes) ** 2).prod(axis=1).mean()
compare("drawn", measured, mean_square(0.09 / 24, 24), tol=0.01)
compare("limit", mean_square(0.09 / 1e6, 1e6), np.exp(0.09), tol=1e-6)

# %% [markdown]
# **3** (★★). GPT-2 places LayerNorm inside the half block. The first
# transformer placed it after the addition, $x_{l+1} =
# \operatorname{LN}(x_l + f(x_l))$, with no LayerNorm in $f$. Let the
# gradient run down 24 such half blocks without scaling. Does it keep its
# direction as well as with GPT-2's placement, which is called *pre-LN*?
#
# :::{admonition} Solution to exercise 3
# :class: dropdown
# No. Every LayerNorm stands in the stream itself, divides the gradient by
# the deviation there and takes two components away, so no road is left on
# which the gradient passes unchanged. Its alignment with the top ends
# below that of figure 1.10.3.
# :::


# %% exercise 3, a solution tags=["hide-cell"]
def norm_after(halves):
    x, saved = start, []
    for seed in range(halves):
        h = half_block(x, seed, 1.0, norm=False)
        total, x = x + h.out, np.empty_like(x)
        stats = np.empty((2, 1, N))
        layernorm_forward(x, *stats, total, one, nil)
        saved.append((h, total, stats))
    d = top
    for h, total, stats in reversed(saved):
        dtotal = np.zeros_like(d)
        layernorm_backward(dtotal, *np.zeros((2, C)), d, total, one, *stats)
        d = dtotal + half_block_backward(h, dtotal, norm=False)
    return d


# %% exercise 3, checked
after, before = norm_after(2 * L), ends["both"]
less = alignment(after) < alignment(before) - 0.1
verdict("LN after", less, "aligned less")

# %% [markdown]
# ## Further reading
#
# - He, Zhang, Ren and Sun (2015),
#   [Deep Residual Learning for Image Recognition](https://arxiv.org/abs/1512.03385):
#   figure 1, where a deeper network without the addition trains worse.
# - He, Zhang, Ren and Sun (2016),
#   [Identity Mappings in Deep Residual Networks](https://arxiv.org/abs/1603.05027):
#   section 2 derives the road of (1.10.4) that passes no layer, and argues for
#   a stream that nothing interrupts.
# - Balduzzi et al. (2017),
#   [The Shattered Gradients Problem](https://arxiv.org/abs/1702.08591):
#   why size alone does not make a gradient useful.
# - Radford et al. (2019),
#   [Language Models are Unsupervised Multitask Learners](https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf):
#   section 2.3 names the scaling of the residual layers' first weights.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.10")
