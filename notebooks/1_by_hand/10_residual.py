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
# *Reading time: 27 minutes. You need: LayerNorm ([chapter
# 1.6](06_layernorm.ipynb)) and GELU ([chapter 1.9](09_gelu.ipynb)). The fast
# versions: chapters [2.2](../2_cpu/02_rows.ipynb) and
# [3.5](../3_gpu/05_elementwise.ipynb).*
#
# ## Where we are

# %% where we are
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="residual")

# %% [markdown]
# *Figure 1.10.1. Each block ends its two halves with an addition: what the
# half computed is added to what the half was given. The arrows that pass by
# the layers carry the input there.*
#
# The addition is called a *residual connection*: the layers in between compute
# only the difference, the residue, between input and output. What runs through
# all the additions, from the encoder to the last LayerNorm, is the *residual
# stream*. At the end of this chapter you can
#
# - say what becomes of a deep network without it, on the way forward and back;
# - derive its gradient, and say why a gradient is added and not written;
# - compute how the variance of the stream grows with depth;
# - say where the factor $1/\sqrt{2L}$ in GPT-2's first weights comes from.
#
# ## Setup

# %% setup
import gzip
import json
from typing import NamedTuple

import matplotlib.pyplot as plt

from llmnb.book.diagram import PALETTE
from llmnb.book.verify import compare, numerical_gradient, verdict
from llmnb.reference.gelu import gelu_backward, gelu_forward
from llmnb.reference.layernorm import layernorm_backward, layernorm_forward

# %% imports of the reference tags=["export"]
import numpy as np

from llmnb.shapes import shapes

# %% the seed
rng = np.random.default_rng(8)

# %% [markdown]
# ## Why it is there
#
# We have all the layers of a block's second half: LayerNorm, a matrix up to 4C
# channels, GELU, a matrix down to C. Call them together $f$. Deep models are
# many such halves, one after the other. Let us build one *without* the
# addition and see whether it learns what the table of [chapter
# 1.1](01_learns.ipynb) learnt: which letter follows which.
#
# The matrices are drawn as GPT-2 draws them, normal with deviation 0.02 at C
# = 768. We take fewer channels and raise the deviation, so that sums have the
# same size: at C = 16 it is 0.14. Biases are left out.


# %% one half block
class Half(NamedTuple):
    """The matrices of a half block: up to 4C channels, and down to C."""

    up: np.ndarray
    down: np.ndarray


def draw_half(rng, C, scale=1.0):
    deviation = 0.02 * np.sqrt(768 / C)
    up = rng.normal(0, deviation, (4 * C, C))
    return Half(up, rng.normal(0, deviation * scale, (C, 4 * C)))


def half_forward(x, half, norm):
    """f(x), and what its backward pass needs; x: (1, N, C)."""
    normed, stats, C = x, None, x.shape[2]
    if norm:
        normed, stats = np.empty_like(x), np.empty((2, *x.shape[:2]))
        layernorm_forward(normed, *stats, x, np.ones(C), np.zeros(C))
    wide = normed @ half.up.T
    bent = np.empty_like(wide)
    gelu_forward(bent, wide)
    return bent @ half.down.T, (x, stats, normed, wide, bent)


# %% its gradients
def half_backward(dout, half, kept):
    """The gradient of a half block's input, and those of its matrices."""
    x, stats, normed, wide, bent = kept
    dwide, dx = np.zeros_like(wide), np.zeros_like(x)
    gelu_backward(dwide, dout @ half.down, wide)
    gradients = Half(dwide[0].T @ normed[0], dout[0].T @ bent[0])
    dnormed = dwide @ half.up
    if stats is None:
        return dnormed, gradients
    one, unused = np.ones(x.shape[2]), np.zeros((2, x.shape[2]))
    layernorm_backward(dx, *unused, dnormed, x, one, *stats)
    return dx, gradients


# %% [markdown]
# Now the chain of them. `residual`: what a half computes is added to what it
# was given, and does not take its place. The step of training that follows it
# is folded; it is that of chapter 1.7, with the chain between the vectors and
# the logits.


# %% a chain of half blocks, forward and backward
def chain_forward(x, halves, residual, norm):
    """The vectors at the start and after each half, and what was kept."""
    stream, kept = [x], []
    for half in halves:
        out, saved = half_forward(stream[-1], half, norm)
        stream.append(stream[-1] + out if residual else out)
        kept.append(saved)
    return stream, kept


def chain_backward(dout, halves, kept, residual):
    """The gradients of the vectors, and of the matrices."""
    dstream, gradients = [dout], []
    for half, saved in zip(halves[::-1], kept[::-1], strict=True):
        through, gradient = half_backward(dstream[-1], half, saved)
        dstream.append(dstream[-1] + through if residual else through)
        gradients.append(gradient)
    return dstream[::-1], gradients[::-1]


# %% a batch of letters: loss, and one step downhill tags=["hide-input"]
with gzip.open("../../tests/data/library.jsonl.gz") as lines:
    text = "".join(json.loads(line)["text"] for line in lines)[:300_000]
letters = np.frombuffer(text.encode("ascii", "ignore"), np.uint8)


def step(batch, tables, halves, residual, norm):
    """The loss of some pairs of letters, before one step at rate 0.3."""
    first, second, each = letters[batch], letters[batch + 1], range(len(batch))
    wte, w = tables
    stream, kept = chain_forward(wte[first][None], halves, residual, norm)
    e = np.exp(stream[-1] @ w.T)
    dlogits = e / e.sum(axis=-1, keepdims=True)
    loss = -np.log(dlogits[0, each, second]).mean()
    dlogits[0, each, second] -= 1  # (1.1.6)
    dlogits /= len(batch)
    ends, gradients = chain_backward(dlogits @ w, halves, kept, residual)
    w -= 0.3 * dlogits[0].T @ stream[-1][0]
    np.add.at(wte, first, -0.3 * ends[0][0])
    for half, gradient in zip(halves, gradients, strict=True):
        for weight, dweight in zip(half, gradient, strict=True):
            weight -= 0.3 * dweight
    return loss


# %% [markdown]
# Twelve halves of $C = 16$ channels are trained three times from the same
# first weights: as a plain chain; with LayerNorm in each half; and with
# LayerNorm and the addition. The rate is 0.3. At 1 the second and the third
# run to numbers without end; at 0.1, or with five times the steps, they come
# out in the same order. At the end we ask how alike the vectors are that the
# chain makes of two letters: the mean cosine of the angle between them.


# %% three times two hundred steps
def train(residual, norm):
    rng = np.random.default_rng(9)
    tables = rng.normal(size=(128, 16)), rng.normal(0, 0.14, (128, 16))
    halves = [draw_half(rng, 16) for _ in range(12)]
    batches = rng.integers(0, len(letters) - 1, (200, 64))
    curve = [step(b, tables, halves, residual, norm) for b in batches]
    common = tables[0][share > 0.01][None]
    ends = chain_forward(common, halves, residual, norm)[0][-1][0]
    ends /= np.linalg.norm(ends, axis=1, keepdims=True)
    return curve, (ends @ ends.T).mean()


share = np.bincount(letters, minlength=128) / len(letters)
runs = {
    "neither": train(residual=False, norm=False),
    "LayerNorm": train(residual=False, norm=True),
    "both": train(residual=True, norm=True),
}
final = {name: np.mean(curve[-50:]) for name, (curve, _) in runs.items()}
alone = -(share * np.log(share.clip(1e-9))).sum()  # no letter looked at
verdict("neither", abs(final["neither"] - np.log(128)) < 0.01, "knows nothing")
verdict("LayerNorm", final["LayerNorm"] > alone - 0.05, "looks at no letter")
verdict("both", final["both"] < alone - 0.2, "has learnt pairs")
verdict("LayerNorm", runs["LayerNorm"][1] > 0.9, "makes all letters alike")
verdict("both", runs["both"][1] < 0.7, "keeps them apart")

# %% draw it tags=["hide-input"]
colours = {"neither": "blue", "LayerNorm": "purple", "addition": "green",
           "both": "orange"}  # fmt: skip
fig, ax = plt.subplots(figsize=(7, 3.4), dpi=100)
for name, (curve, _) in runs.items():
    smooth = np.convolve(curve, np.ones(10) / 10, "valid")
    ax.plot(smooth, color=PALETTE[colours[name]], lw=2, label=name)
for height, name in ((np.log(128), "all letters alike"),
                     (alone, "how frequent each letter is")):  # fmt: skip
    ax.axhline(height, color=PALETTE["grey"], lw=1, ls=":")
    ax.text(190, height - 0.14, name, ha="right", size=9)
ax.set(xlabel="step", ylabel="loss, nats", ylim=(2.6, 5.1))
ax.legend(frameon=False, loc=(0.7, 0.5))
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.10.2. One task, one depth, one set of first weights (means over ten
# steps). A plain chain does not learn. With LayerNorm it learns at most how
# frequent the letters are: it has come to make nearly the same vector of every
# letter. With the addition it learns what follows what.*
#
# ## By hand
#
# Two tokens with three channels: the stream holds $(1, 2, 3)$ and $(4, 5, 6)$,
# and a layer has computed $(10, 0, 0)$ and $(0, 0, -6)$ from them. The stream
# goes on with $(11, 2, 3)$ and $(4, 5, 0)$.
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
# Let $x$ be the stream. Then
#
# $$ y = x + f(x) . \tag{1.10.1} $$


# %% the forward pass tags=["export"]
@shapes("...!, ...~, ...~")
def residual_forward(out, inp1, inp2):
    """Add two arrays.

    out, inp1, inp2: float, all of one shape; out is overwritten, and may be
    inp1 or inp2.
    """
    np.add(inp1, inp2, out=out)


# %% the two tokens through the function
out = np.zeros_like(stream)
residual_forward(out, stream, layer)
compare("by hand", out[0], [[11, 2, 3], [4, 5, 0]], tol=1e-12)

# %% [markdown]
# ## Backward, derived
#
# Write $f_i$ for what `inp2` holds. Element $i$ of the output is
# $y_i = x_i + f_i$, so $\partial y_i / \partial x_j = \delta_{i,j}$, which is
# 1 for $i = j$ and 0 otherwise, and the same for $f_j$. The chain rule gives
#
# $$ dx_j = \sum_i dy_i\, \delta_{i,j} = dy_j , \qquad
#    df_j = dy_j . \tag{1.10.2} $$
#
# An addition hands its gradient to both terms unchanged. Nothing is saved.
#
# **Two readers, one gradient.** In (1.10.1) the stream is read twice: by the
# addition and by $f$. Let $J_{ij} = \partial f_i / \partial x_j$, the
# *Jacobian* of $f$. By (1.10.2) each $f_i$ receives $df_i = dy_i$, and each
# element $x_j$ reaches the loss by both roads:
#
# $$ dx_j = dy_j + \sum_i dy_i\, J_{ij} . \tag{1.10.3} $$
#
# The first term comes from `residual_backward`, the second from the half
# block's first layer, and both go into one array. That is why backward adds.

# %% draw the two roads tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7.4, 2.7), dpi=100)
places = {"x": (0, 0), "f": (2.5, 0), "+": (5, 0), "y": (7, 0)}
for name, place in places.items():
    shape = "square,pad=0.6" if name == "f" else "circle,pad=0.35"
    box = {"boxstyle": shape, "fc": "white", "ec": PALETTE["grey"]}
    ax.text(*place, name, ha="center", va="center", size=13, bbox=box)
for start, stop, colour, bend in (
    ("x", "f", "ink", 0), ("f", "+", "ink", 0), ("+", "y", "ink", 0),
    ("x", "+", "ink", -0.45), ("y", "+", "orange", -0.3),
    ("+", "f", "orange", -0.3), ("f", "x", "orange", -0.3),
    ("+", "x", "orange", 0.62),
):  # fmt: skip
    arrow = {"arrowstyle": "-|>", "lw": 1.5, "color": PALETTE[colour]}
    arrow |= {"connectionstyle": f"arc3,rad={bend}", "shrinkA": 15}
    arrow["shrinkB"] = 15
    ax.annotate("", places[stop], places[start], arrowprops=arrow)
for place, label in (((6, -0.85), "dy"), ((3.75, -0.95), "dy"),
                     ((1.25, -0.95), "dy J"), ((2.5, 2.0), "dy"),
                     ((0, -1.4), "here they add up")):  # fmt: skip
    ax.text(*place, label, ha="center", color=PALETTE["orange"], size=11)
ax.add_patch(plt.Circle((0, 0), 0.62, fill=False, ec=PALETTE["orange"], lw=2))
ax.set(xlim=(-1.1, 7.6), ylim=(-1.6, 2.4), aspect="equal")
ax.axis("off")
fig.subplots_adjust(0, 0, 1, 1)
plt.show()

# %% [markdown]
# *Figure 1.10.3. Forward the vector goes two ways, through $f$ and
# past it. Backward (orange) the gradient comes back both ways, and where the
# ways part on the way forward, the gradients add up on the way back.*


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
# We check (1.10.3), with GELU for $f$, so that the stream is read twice;
# $\mathcal L = \sum g \cdot y$ with a fixed random $g$, float64, step
# $10^{-5}$, tolerance $10^{-8}$, gradients that start from ones.

# %% a problem to differentiate
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
    dx, df = np.ones((2, B, T, C))
    backward(dx, df, g)
    gelu_backward(dx, df - 1, x)
    return dx - 1


compare("dx", gradient(residual_backward), want, tol=1e-8)

# %% [markdown]
# Suppose someone writes where one must add, and the stream's share is lost:


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
# ## See it: forward and back through 24 halves
#
# Take a chain of $2L$ half blocks. Without the addition, $x_{l+1} = f_l(x_l)$,
# the gradient at the start is the gradient at the end times a product of
# Jacobians, $J_l$ that of $f_l$. With it, each factor gets the identity matrix
# $I$: with gradients as row vectors, (1.10.3) is
# $dx = dy + dy\, J = dy\, (I + J)$. From the last half to the first,
#
# $$
# \begin{aligned}
# dx_0 &= dx_{2L}\, J_{2L-1} \cdots J_0 \qquad \text{against} \\
# dx_0 &= dx_{2L}\, (I + J_{2L-1}) \cdots (I + J_0) .
# \end{aligned}
# \tag{1.10.4}
# $$
#
# With one channel the Jacobians are plain slopes. Let each be 0.3, up or down.
# A product of 24 such slopes has size $0.3^{24}$, about $3 \cdot 10^{-13}$:
# the first layers would learn nothing. The factors $1 \pm 0.3$ scatter about
# 1, and their product mostly stays within reach of it: with half of the slopes
# up and half down it is $0.91^{12}$, about 0.3. Among the terms of the second
# product is $I$ alone: one road on which the gradient passes no layer at all.
#
# Now with real halves of 96 channels, 24 of them, as many as GPT-2 has. Of the
# vectors we ask two things at each depth: their size, and their likeness to
# the vector that went in, the cosine again, near 0 for directions that have
# nothing to do with each other. Of the gradients we ask the same, beside the
# gradient at the end. Both are drawn at random.

# %% through the whole chain tags=["hide-input"]
C, N, L = 96, 16, 12
start, end = rng.normal(size=(2, 1, N, C))


def drawn_halves(count, scale=1.0):
    seeds = range(count)
    return [draw_half(np.random.default_rng(n), C, scale) for n in seeds]


def chain(halves, residual, norm):
    stream, kept = chain_forward(start, halves, residual, norm)
    return stream, chain_backward(end, halves, kept, residual)[0]


def cosine(d, other):
    return (d * other).sum() / np.linalg.norm(d) / np.linalg.norm(other)


chains = {
    "neither": chain(drawn_halves(2 * L), residual=False, norm=False),
    "LayerNorm": chain(drawn_halves(2 * L), residual=False, norm=True),
    "addition": chain(drawn_halves(2 * L), residual=True, norm=False),
    "both": chain(drawn_halves(2 * L), residual=True, norm=True),
}

# %% draw sizes and directions tags=["hide-input"]
fig, axes = plt.subplots(2, 2, figsize=(8.2, 5.6), dpi=100, sharex=True)
for name, both_ways in chains.items():
    style = {"LayerNorm": "--", "addition": ":"}.get(name, "-")
    line = {"color": PALETTE[colours[name]], "ls": style, "lw": 2}
    for row, vectors, origin in zip(
        axes, both_ways, (start, end), strict=True
    ):
        size = [np.linalg.norm(d) / np.linalg.norm(origin) for d in vectors]
        row[0].semilogy(size, label=name, **line)
        row[1].plot([cosine(d, origin) for d in vectors], **line)
axes[0, 0].set(title="size", ylabel="vectors, forward →")
axes[0, 1].set(title="likeness to where it began", ylim=(-0.15, 1.05))
axes[1, 0].set(xlabel="half block", ylabel="← gradients, backward")
axes[1, 1].set(xlabel="half block", ylim=(-0.15, 1.05))
axes[0, 0].legend(frameon=False, loc="lower left")
for ax in axes.flat:
    ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.10.4. Vectors go through 24 halves from left to right, gradients
# from right to left. Without the addition (blue, purple) one half is enough to
# lose the direction; LayerNorm then keeps the size, of something scrambled.
# The addition alone (green) keeps the direction for a while and lets the sizes
# grow. With both (orange) the size lasts, and the cosine is still nearly a
# half at the other end.*
#
# The left panels show what (1.10.4) promised. The right ones show why size is
# not enough: LayerNorm multiplies a vanishing signal up again, but each half
# turns it elsewhere, vectors and gradients alike, and training has to begin
# with that scramble. With the addition alone, each half block adds in
# proportion to the stream, which grows like compound interest; with LayerNorm
# its variance grows on a straight line, as we see next.

# %% the same in numbers that could fail
for name, (stream, grads) in chains.items():
    ratio = np.linalg.norm(grads[0]) / np.linalg.norm(end)
    if name == "neither":
        verdict(name, ratio < 1e-12, "the gradient has vanished")
    else:
        verdict(name, 0.1 < ratio < 10, "within 10 times the end's")
    far = cosine(stream[-1], start), cosine(grads[0], end)
    near = cosine(stream[1], start), cosine(grads[-2], end)
    if name == "both":
        verdict(name, min(far) > 0.45, "cosines over 0.45")
    if name in ("neither", "LayerNorm"):
        verdict(name, np.abs(near + far).max() < 0.1, "directions lost")

# %% [markdown]
# ## See it: the stream grows
#
# The addition has a price. LayerNorm stands first in $f$, so the size of what
# a half block adds does not depend on the size of the stream: each adds about
# the same variance $s$; and before training, with random weights, what it adds
# is unrelated to what is there, so variances sum:
#
# $$
# \begin{aligned}
# \operatorname{Var}(x_{l+1}) &\approx \operatorname{Var}(x_l) + s , \\
# \operatorname{Var}(x_{2L}) &\approx \operatorname{Var}(x_0) + 2L\, s .
# \end{aligned}
# \tag{1.10.5}
# $$
#
# A late half block adds its $s$ to a stream that has gathered nearly $2Ls$ and
# hardly changes it, the less the deeper the model. GPT-2's remedy is to draw
# the last matrix of each half block smaller by the factor $1/\sqrt{2L}$. The
# outputs shrink by that factor, their variances by its square, and
#
# $$ \operatorname{Var}(x_{2L}) \approx \operatorname{Var}(x_0)
#    + 2L\, \frac{s}{2L} = \operatorname{Var}(x_0) + s , \tag{1.10.6} $$
#
# for any depth. We measure it for 12 and for 48 blocks:

# %% the variance along the stream
streams = {}
for depth in (12, 48):
    for scale in (1.0, 1 / np.sqrt(2 * depth)):
        halves = drawn_halves(2 * depth, scale)
        stream, grads = chain(halves, residual=True, norm=True)
        variances = np.array([x.var() for x in stream])
        streams[depth, scale < 1] = variances, grads[0]
s = half_forward(start, drawn_halves(1)[0], norm=True)[0].var()

# %% draw it tags=["hide-input"]
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
# *Figure 1.10.5. Without scaling, the variance of the stream climbs on a
# straight line with the number of half blocks. With the factor $1/\sqrt{2L}$
# both depths end at the same variance, a little above where they began. Thin
# grey lines: (1.10.5) and (1.10.6), with $s$ measured on the first half
# block.*
#
# The gradient gains as well: with the factor its direction is nearly kept. Its
# growth obeys almost the same arithmetic. A half block turns the normalised
# stream's variance 1 into $s$, and so about on the way back; and LayerNorm has
# divided $J$ by the stream's deviation. So (1.10.3) makes the squared gradient
# larger by about the share $s / \operatorname{Var}(x_l)$, as (1.10.5) does the
# variance, and both grow by about the same factor from end to end.

# %% growth against prediction
for (depth, scaled), (variances, gradient) in streams.items():
    name = f"L={depth}" + (", scaled" if scaled else "")
    growth = variances[-1] - variances[0]
    predicted = s if scaled else 2 * depth * s
    close = abs(growth / predicted - 1) < 0.05
    verdict(name, close, "as predicted, to 5 %")
    factor = (gradient**2).sum() / (end**2).sum()
    alike = abs(factor / (variances[-1] / variances[0]) - 1) < 0.2
    verdict(name, alike, "gradient as well, to 20 %")
    if scaled:
        verdict(name, cosine(gradient, end) > 0.9, "cosine over 0.9")

# %% [markdown]
# [Chapter 1.15](15_weights.ipynb) draws the first weights with this factor.
#
# ## Count it
#
# No parameters; one addition an element forward, two backward; nothing saved.
#
# ## Take away
#
# - A residual connection adds a layer's output to its input; its gradient
#   goes to both unchanged.
# - The stream is read twice, so its gradient is a sum: backward adds.
# - Along a chain the addition puts $I + J$ in place of $J$: vectors and
#   gradients arrive with much of their direction.
# - Without it, a deep chain drawn as GPT-2 draws it learns next to nothing.
# - The stream's variance grows with depth; $1/\sqrt{2L}$ in the first
#   weights makes the growth the same for every depth.
#
# ## Design note
#
# The model of [chapter 1.17](17_model.ipynb) calls neither function. Forward,
# the product that makes a layer's output adds the stream as well (`residual=`
# in [chapter 1.7](07_matmul.ipynb)). Backward, by (1.10.2), the gradient of
# the stream is the gradient of the sum: the model keeps one array for both,
# and each layer adds its share to it. The functions stay because they are the
# equations, and everything faster is tested against them.
#
# Passed one array twice, `residual_backward` would add $dy$ twice; it refuses.
#
# ## Exercises
#
# **1** (★). A layer adds the stream to itself, $y = x + x$. What is $dx$, by
# (1.10.3)? What would a backward pass leave in `dx` that writes where ours
# adds?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# With $f(x) = x$ the Jacobian is $I$, so $dx = dy + dy = 2\,dy$. One that writes
# would leave $dy$, half of the truth.
# :::

# %% exercise 1, checked tags=["hide-cell"]
at, (dx, df) = np.zeros_like(g), np.zeros((2, *g.shape))
want = numerical_gradient(lambda: (g * (at + at)).sum(), at)
residual_backward(dx, df, g)
dx += df  # the backward pass of f(x) = x
compare("2 dy", 2 * g, want, tol=1e-8)
compare("added", dx, want, tol=1e-8)
dx[...] = df  # and one that writes
compare("written: dy", dx, want / 2, tol=1e-8)

# %% [markdown]
# **2** (★★). Let the slopes $J_l$ of a one-channel chain be independent,
# with mean 0 and variance $\sigma^2$. What is the mean of the squared
# gradient $\prod_l (1 + J_l)^2$ over $2L$ half blocks? And with every slope
# scaled by $1/\sqrt{2L}$? Give the limit for large $L$.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# The mean of a product of independent factors is the product of their
# means, and the mean of $(1 + J)^2$ is $1 + \sigma^2$. So it is
# $(1 + \sigma^2)^{2L}$, which grows without limit, and scaled
# $(1 + \sigma^2 / 2L)^{2L}$, which approaches $e^{\sigma^2}$.
# :::


# %% exercise 2, checked tags=["hide-cell"]
slopes = rng.choice([-0.3, 0.3], (200_000, 24)) / np.sqrt(24)
measured = ((1 + slopes) ** 2).prod(axis=1).mean()
compare("drawn", measured, (1 + 0.09 / 24) ** 24, tol=0.01)
compare("limit", (1 + 0.09 / 1e6) ** 1e6, np.exp(0.09), tol=1e-6)

# %% [markdown]
# **3** (★★). GPT-2 places LayerNorm inside the half block. The first
# transformer placed it after the addition,
# $x_{l+1} = \operatorname{LN}(x_l + f(x_l))$, with no LayerNorm in $f$. Let
# the gradient come back through 24 such half blocks without scaling. Does it
# keep its direction as well as with GPT-2's placement, which is called
# *pre-LN*?
#
# :::{admonition} Solution to exercise 3
# :class: dropdown
# No. Every LayerNorm stands in the stream itself, divides the gradient by
# the deviation there and takes two components away, so no road is left on
# which the gradient passes unchanged. Its cosine with the gradient at the end
# comes out less than in figure 1.10.4.
# :::


# %% exercise 3, a solution tags=["hide-cell"]
def norm_after(halves):
    x, saved, one, nil = start, [], np.ones(C), np.zeros(C)
    for half in halves:
        out, kept = half_forward(x, half, norm=False)
        total, stats, x = x + out, np.empty((2, 1, N)), np.empty_like(x)
        layernorm_forward(x, *stats, total, one, nil)
        saved.append((kept, total, stats))
    d = end
    for half, (kept, total, stats) in zip(halves[::-1], saved[::-1],
                                          strict=True):  # fmt: skip
        dtotal = np.zeros_like(d)
        layernorm_backward(dtotal, *np.zeros((2, C)), d, total, one, *stats)
        d = dtotal + half_backward(dtotal, half, kept)[0]
    return d


# %% exercise 3, checked
halves = drawn_halves(2 * L)
after, before = norm_after(halves), chains["both"][1][0]


def summed(x):
    """The sum of `end` times what these halves make of x."""
    for half in halves:
        total, x = x + half_forward(x, half, norm=False)[0], np.empty_like(x)
        layernorm_forward(
            x, *np.empty((2, 1, N)), total, np.ones(C), np.zeros(C)
        )
    return (end * x).sum()


step = 1e-5 * rng.normal(size=start.shape)
moved = (summed(start + step) - summed(start - step)) / 2
compare("a small step", (after * step).sum() / moved, 1, tol=1e-4)
less = cosine(after, end) < cosine(before, end) - 0.1
verdict("LN after", less, "keeps less of it")

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
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.10")
