# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       reference.matmul: "The linear layer in NumPy, forward and backward."
# ---

# %% [markdown]
# # Linear layer: multiply by a weight matrix, and differentiate it
#
# > One matrix product forward and two backward; nearly all of GPT-2's
# > arithmetic happens in these three.
#
# *Reading time: 21 minutes. You need: [chapter 1.1](01_learns.ipynb) for the
# loss and its gradient, and the way a layer is laid out in
# [chapter 1.6](06_layernorm.ipynb).*
#
# ## Where we are

# %% where we are
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="matmul")

# %% [markdown]
# *Figure 1.7.1. The linear layer stands four times in every block and once
# before the loss, where it turns a vector into one score for each token of
# the vocabulary.*
#
# A linear layer mixes channels: every output channel is a weighted sum of all
# input channels. Most of what the model learns lies in these weights. At the
# end of this chapter you can
#
# - say why a model computes its logits from vectors and not from a table;
# - compute a linear layer by hand, and say what a row of its weight is for;
# - derive the three products of training and check each by its shapes;
# - say what the layer saves for its backward pass, and why that is nothing;
# - count its operations, and its share of the whole model.
#
# The fast versions: chapters [2.4](../2_cpu/04_matmul.ipynb) and
# [3.6](../3_gpu/06_matmul.ipynb).
#
# ## Setup

# %% setup
import gzip
import json

import matplotlib.pyplot as plt
import numpy as np

from llmnb.book.diagram import PALETTE
from llmnb.book.verify import compare, numerical_gradient, verdict

rng = np.random.default_rng(5)

# %% [markdown]
# ## Why it is there
#
# The model of [chapter 1.1](01_learns.ipynb) was a table: for each letter that
# may come first a row of logits, one for each letter that may come next. With
# 128 letters that is 16,384 numbers. GPT-2 has 50,257 tokens:

# %% a table against vectors and weights
V, C = 50257, 768
print(f"a table of all pairs     {V * V:>13,} numbers")
print(f"vectors, and weights     {V * C + C * V:>13,} numbers")

# %% [markdown]
# The table would be twenty times as large as the whole of GPT-2 and would look
# at one token. And its rows know nothing of one another: what follows an `a`
# much resembles what follows an `o`, and the table must learn each by itself.
#
# [Chapter 1.5](05_encoder.ipynb) gave each token a vector of $C$ numbers. Let
# a logit be a weighted sum of the numbers in the vector, with one row of $C$
# weights for each token that may come next. Then $V C$ numbers for the vectors
# and as many for the weights stand in the place of $V^2$, and tokens with
# similar vectors get similar logits, whether or not the text has shown each
# case. Many weighted sums of one vector, that is a linear layer. When it is
# there, we train this model.
#
# ## By hand
#
# Take one token with three channels, $x = (1, 2, 3)$, and a layer with two
# output channels. Each output channel has its own row of weights, as long
# as the input: $(1, 0, -1)$ and $(2, 1, 0)$. An output is the dot product
# of the token with that row, the sum of the products channel by channel,
# plus the channel's bias, here $10$ and $20$:
#
# $$
# \begin{aligned}
# 1 \cdot 1 + 2 \cdot 0 + 3 \cdot (-1) + 10 &= 8 , \\
# 1 \cdot 2 + 2 \cdot 1 + 3 \cdot 0 + 20 &= 24 .
# \end{aligned}
# $$
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
# Tokens do not meet in this layer, so B and T act as one axis: tokens are $n =
# 0 \dots N - 1$ with $N = BT$, input channels $c$, output channels $o$.
#
# ## Forward
#
# What we did by hand, for every token and every output channel:
#
# $$ y_{n,o} = \sum_c x_{n,c}\, W_{o,c} + b_o . \tag{1.7.1} $$
#
# As matrices this is $Y = X W^\top + b$. In the line over the function, `?`
# marks what may be `None`, and `~` what may be the array that is written.


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
y = np.zeros((1, 2, 2))
matmul_forward(y, x[None], w, b)
compare("by hand", y[0], [[8, 24], [9, 21]])
matmul_forward(y, x[None], w, None)
compare("without bias", y[0], [[-2, 4], [-1, 1]])
matmul_forward(y, x[None], w, b, residual=y)
compare("added to those", y[0], [[6, 28], [8, 22]])

# %% [markdown]
# In GPT-2 every linear layer has a bias but the last one, which computes the
# logits. The `residual`, in the third call the array that is written, is for
# the layers whose output is added to what came before them ([chapter
# 1.10](10_residual.ipynb)). It enters the sum with
# factor 1, so its gradient is `dout` itself, and there is nothing to compute
# for it.
#
# ## Backward, derived
#
# The next layer hands us $dy_{n,o} = \partial \mathcal L / \partial y_{n,o}$.
# We owe $dx$, $dW$ and $db$.
#
# A prime marks the one element that we differentiate by; $\delta$ is 1 for
# equal indices and 0 otherwise, as in chapter 1.5.
#
# **The input.** $x_{n',c'}$ appears in the outputs of its own token only, and
# there in every output channel, with factor $W_{o,c'}$. The sum runs over all
# outputs, and $\delta_{n,n'}$ leaves those of one token:
#
# $$
# \begin{aligned}
# \frac{\partial y_{n,o}}{\partial x_{n',c'}} &= \delta_{n,n'}\, W_{o,c'} , \\
# dx_{n',c'} &= \sum_{n,o} dy_{n,o}\, \delta_{n,n'}\, W_{o,c'} \\
#   &= \sum_o dy_{n',o}\, W_{o,c'} .
# \end{aligned}
# \tag{1.7.2}
# $$
#
# **The weight.** $W_{o',c'}$ appears in its own output channel only, and
# there in every token, with factor $x_{n,c'}$:
#
# $$
# \begin{aligned}
# \frac{\partial y_{n,o}}{\partial W_{o',c'}} &= \delta_{o,o'}\, x_{n,c'} , \\
# dW_{o',c'} &= \sum_{n,o} dy_{n,o}\, \delta_{o,o'}\, x_{n,c'} \\
#   &= \sum_n dy_{n,o'}\, x_{n,c'} .
# \end{aligned}
# \tag{1.7.3}
# $$
#
# **The bias.** $b_{o'}$ appears in the same places, with factor 1:
#
# $$ \frac{\partial y_{n,o}}{\partial b_{o'}} = \delta_{o,o'} , \qquad
#    db_{o'} = \sum_n dy_{n,o'} . \tag{1.7.4} $$
#
# As matrices, $dX = dY\, W$ and $dW = dY^\top X$. The shapes leave no other
# way: $dW$ must be (OC, C), and of the factors at hand, $dY$ with (N, OC) and
# $X$ with (N, C), only $dY^\top X$ has it.

# %% draw the three products tags=["hide-input"]
products = (  # the result, its left and right factor, the side summed away
    (("out", "N", "OC"), "inp", "weight.T", "C"),
    (("dinp", "N", "C"), "dout", "weight", "OC"),
    (("dweight", "OC", "C"), "dout.T", "inp", "N"),
)
sides = {"N": 2.6, "C": 1.3, "OC": 1.9}
fig, axes = plt.subplots(1, 3, figsize=(8.4, 3.9), dpi=100)
for ax, (result, first, second, inner) in zip(axes, products, strict=True):
    name, rows, cols = result
    high, deep, wide = sides[rows], sides[inner], sides[cols]
    for corner, size, shade, label in (
        ((-deep - 0.2, -high), (deep, high), "blue", first),
        ((0, 0.2), (wide, deep), "green", second),
        ((0, -high), (wide, high), "orange", name),
    ):
        ax.add_patch(plt.Rectangle(corner, *size, color=PALETTE[shade]))
        middle = [c + s / 2 for c, s in zip(corner, size, strict=True)]
        turn = 90 if size[1] > size[0] else 0
        style = {"ha": "center", "va": "center", "rotation": turn}
        ax.text(*middle, label, color="white", weight="bold", **style)
    summed = {"color": PALETTE["purple"], "weight": "bold"}
    ax.text(-deep / 2 - 0.2, 0.1, inner, ha="center", va="bottom", **summed)
    ax.text(-0.1, deep / 2 + 0.2, inner, ha="right", va="center", **summed)
    ax.text(-deep - 0.3, -high / 2, rows, ha="right", va="center")
    ax.text(wide / 2, deep + 0.3, cols, ha="center", va="bottom")
    ax.set(xlim=(-3.2, 2.1), ylim=(-2.8, 3.2), aspect="equal")
    ax.axis("off")
fig.subplots_adjust(0, 0, 1, 1, 0)
plt.show()

# %% [markdown]
# *Figure 1.7.2. The three products, each side as long as its size. The left
# factor is blue, the right one green, the result orange. The side that the
# factors share, in purple, is summed away: C forward, OC for the input's
# gradient, N for the weight's.*
#
# **What to save.** (1.7.2) needs the weight, a parameter, and (1.7.3) needs
# $x$, the output of the layer before. Both are in memory anyway, or the layer
# before makes its output again; the linear layer saves nothing of its own.


# %% the linear layer, backward tags=["export"]
@shapes("B T C!, OC C!?, OC!?, B T OC, B T C, OC C")
def matmul_backward(
    dinp, dweight, dbias, dout, inp, weight, add_dinp=True, add_dweight=True
):
    """Add the linear layer's gradients to dinp, dweight and dbias.

    dinp, inp: (B, T, C). dout: (B, T, OC). dweight, weight: (OC, C); the
    first may be None for a weight that does not learn. dbias: (OC,), or
    None for a layer without bias. All of one float dtype. add_dinp,
    add_dweight: False overwrites dinp, or dweight and dbias, instead of
    adding.
    """
    if not add_dinp:
        dinp.fill(0)
    for x in (dweight, dbias):
        if x is not None and not add_dweight:
            x.fill(0)
    OC, C = weight.shape
    rows, drows = inp.reshape(-1, C), dout.reshape(-1, OC)
    dinp += dout @ weight  # (1.7.2)
    if dweight is not None:
        dweight += drows.T @ rows  # (1.7.3)
    if dbias is not None:
        dbias += drows.sum(axis=0)  # (1.7.4)


# %% [markdown]
# The gradients are added, not written, unless the caller wants that. In GPT-2
# the matrix that computes the logits is also the encoder's table: both layers
# put their share into one gradient.
#
# ## Proof
#
# As before, $\mathcal L = \sum g \cdot y$ for a fixed random $g$, float64,
# step $h = 10^{-5}$, tolerance $10^{-8}$, gradients that start from ones. We
# make the layer square, C = OC, for a reason that comes next.

# %% a problem to differentiate
B, T, C, OC = 2, 3, 4, 4
inp, g = rng.normal(size=(B, T, C)), rng.normal(size=(B, T, OC))
weight, bias = rng.normal(size=(OC, C)), rng.normal(size=OC)
out = np.empty((B, T, OC))


def loss():
    matmul_forward(out, inp, weight, bias)
    return (g * out).sum()


def gradients(backward, **add):
    grads = [np.ones_like(a) for a in (inp, weight, bias)]
    backward(*grads, g, inp, weight, **add)
    return grads if add else [grad - 1 for grad in grads]


# %% against central differences
dinp, dweight, dbias = gradients(matmul_backward)
compare("dinp", dinp, numerical_gradient(loss, inp), tol=1e-8)
compare("dweight", dweight, numerical_gradient(loss, weight), tol=1e-8)
compare("dbias", dbias, numerical_gradient(loss, bias), tol=1e-8)
written = gradients(matmul_backward, add_dinp=False, add_dweight=False)
for name, got, want in zip(
    "xWb", written, (dinp, dweight, dbias), strict=True
):
    compare(f"d{name}, written", got, want, tol=1e-12)
matmul_backward(inp.copy(), None, written[2], g, inp, weight)
compare("db, W fixed", written[2], 2 * dbias, tol=1e-12)

# %% [markdown]
# The frequent mistake is a transpose too many. In most layers the shapes then
# do not fit and NumPy complains. In a square layer they fit, and training
# runs. So we test a square one, where only the numbers can tell.


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
# ## Put to work: the table in a seventh of its numbers
#
# Now the model that we began with. The text and its pairs are those of chapter
# 1.1. Each letter has a vector of $C = 8$ numbers, a row of `wte`, and a
# linear layer with weight `w` and bias `b` makes 128 logits of it. Vectors and
# weights are drawn at random, and trained.

# %% the pairs, and what counting gives
with gzip.open("../../tests/data/library.jsonl.gz") as lines:
    text = "".join(json.loads(line)["text"] for line in lines)[:300_000]
letters = np.frombuffer(text.encode("ascii", "ignore"), np.uint8)
x, y, V, C = letters[:-1], letters[1:], 128, 8
pairs = np.zeros((V, V))
np.add.at(pairs, (x, y), 1)
entropy = -np.log((pairs / pairs.sum(axis=1, keepdims=True).clip(1))[x, y])
unigram = -np.log((pairs.sum(axis=0) / len(y))[y])
print(f"the table, counted: {entropy.mean():.2f} nats")
print(f"without the letter before: {unigram.mean():.2f} nats")

# %% the model: vectors, and a linear layer
wte = rng.normal(scale=0.3, size=(V, C))
w, b = rng.normal(scale=0.1, size=(V, C)), np.zeros(V)
print(f"{wte.size + w.size + b.size:,} numbers for {V * V:,}")


# %% the loss of some pairs, and its gradients
def softmax(logits):
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def loss_and_gradients(x, y):
    each = np.arange(len(x))
    vectors, logits = wte[x][None], np.empty((1, len(x), V))
    matmul_forward(logits, vectors, w, b)
    probs = softmax(logits)
    loss = -np.log(probs[0, each, y]).mean()
    dlogits = probs  # the same memory: probs is not needed again
    dlogits[0, each, y] -= 1  # (1.1.6)
    dlogits /= len(x)
    dvectors, dwte, dw, db = map(np.zeros_like, (vectors, wte, w, b))
    matmul_backward(dvectors, dw, db, dlogits, vectors, w)
    np.add.at(dwte, x, dvectors[0])  # (1.5.4)
    return loss, (dwte, dw, db)


# %% [markdown]
# Read the function from the middle: the loss's gradient by the logits is that
# of chapter 1.1; our layer turns it into the gradient by its weights, its bias
# and the vectors; and the encoder's rule brings the last to the rows of `wte`.
# Training is (1.1.3), a thousand batches of 500 pairs. The rate, 3, was found
# by trying: with 1 the model learns less, with 10 its numbers grow without
# end.

# %% a thousand steps downhill
for _ in range(1000):
    batch = rng.integers(0, len(x), 500)
    loss, gradients = loss_and_gradients(x[batch], y[batch])
    for weights, gradient in zip((wte, w, b), gradients, strict=True):
        weights -= 3.0 * gradient
whole = -np.log(softmax(wte @ w.T + b)[x, y]).mean()
verdict("the loss", whole < entropy.mean() + 0.25, "within 0.25 of the table")
verdict("the letter", whole < unigram.mean() - 0.5, "is used")

# %% [markdown]
# Now look at the vectors. Which letters have come to lie in the direction of
# the letter `a`? And which rows of the table of pairs are likest to its row?

# %% the five nearest to a
common = np.flatnonzero(np.bincount(x, minlength=V) > 500)


def directions(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def nearest(rows):
    near = directions(rows[common]) @ directions(rows[[ord("a")]])[0]
    return sorted(chr(j) for j in common[np.argsort(-near)[1:6]])


points, best = directions(wte[common]), nearest(wte)
print("nearest to a:", *best)
print("in the table:", *nearest(pairs))

# %% draw the letters tags=["hide-input"]
_, _, axes = np.linalg.svd(points - points.mean(axis=0), full_matrices=False)
across, along = (points @ axes[:2].T).T
fig, ax = plt.subplots(figsize=(7.6, 6), dpi=100)
ax.scatter(across, along, alpha=0)
for j, here in zip(common, zip(across, along, strict=True), strict=True):
    sign, kind = chr(j), "grey"
    if sign.isalpha():
        kind = "green" if sign.isupper() else "blue"
    if sign in best or sign == "a":
        kind = "orange"
    shown = {" ": "space", "\n": "line end"}.get(sign, sign)
    ax.text(*here, shown, ha="center", va="center", size=12,
            color=PALETTE[kind], weight="bold")  # fmt: skip
ax.set(xticks=[], yticks=[])
for side in ax.spines.values():
    side.set_color(PALETTE["grey"])
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.7.3. The vectors of the frequent letters, brought to one length and
# seen from the side from which they differ most. Small letters (blue, the
# vowels orange), capitals (green) and other signs (grey) have parted into
# three groups. The picture keeps two of eight directions: vowels that are near
# one another in all eight may stand apart in it.*
#
# The nearest five are the other vowels, and nobody told the model of vowels.
# By (1.1.6) and (1.7.2) a step moves a letter's vector along the rows of `w`:
# towards those of the letters that came next, away from those that were
# expected. So letters that are followed by the same letters are moved alike.
# The table shows the same five, but learns each row alone. Here the letters
# share the weights: what comes after an `a` also teaches what comes after an
# `o`. That is what a vector buys.
#
# ## Count it
#
# A layer has $C \cdot OC$ weights and $OC$ biases. Each of the three products
# takes $2 N C \cdot OC$ operations, one multiplication and one addition a
# term. So forward takes two operations for each weight and token, backward
# four, and a training step six: $6 C \cdot OC$ for each token.

# %% the linear layers of GPT-2 124M
layers = {
    "q, k, v": (768, 2304),
    "projection": (768, 768),
    "up to 4C": (768, 3072),
    "down to C": (3072, 768),
    "logits": (768, 50304),
}
print(f"{'':12}{'C':>6}{'OC':>7}{'weights':>12}{'forward, MFLOP/token':>22}")
for name, (C, OC) in layers.items():
    print(f"{name:12}{C:6}{OC:7}{C * OC:12,}{2 * C * OC / 1e6:22.1f}")

# %% [markdown]
# The first four stand in each of the twelve blocks. With the logits they do 92
# of 100 operations of the model at $T = 1024$ ([chapter 1.4](04_gpt2.ipynb)):
# the speed of a model is that of its linear layers.
#
# ## Take away
#
# - A linear layer on learned vectors replaces a table of all pairs, and puts
#   tokens that behave alike near one another.
# - Forward is $X W^\top + b$; backward is $dY\,W$, $dY^\top X$ and the column
#   sums of $dY$.
# - The shapes say where each transpose belongs, but in a square layer only the
#   proof does.
# - The layer saves nothing: it needs its input, which the layer before has
#   kept or makes again.
# - A training step takes six operations for each weight and token.
#
# ## Design note
#
# The other choice is the layout of the weight. Stored as (C, OC), as OpenAI's
# own GPT-2 files have it, forward would have no transpose and the gradient of
# the input would have one. (OC, C) is what PyTorch and llm.c use; and the
# weights of one output channel, its row, lie in one piece.
#
# ## Exercises
#
# **1** (★★). A bias is a weight on an input that is always 1. Show that
# (1.7.4) is then a case of (1.7.3): put a channel of ones behind the input and
# the bias behind the weight, and get `dbias` out of `dweight`.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# The channels are $0 \dots C - 1$, and the new one is $C$. With $x_{n,C} = 1$
# and $W_{o,C} = b_o$, (1.7.1) without bias is (1.7.1) with bias, and (1.7.3)
# for $c' = C$ reads $dW_{o',C} = \sum_n dy_{n,o'} \cdot 1$.
# :::


# %% exercise 1, the wider layer tags=["hide-cell"]
def bias_gradient(dout, inp, weight, bias):
    wide = np.concatenate([inp, np.ones_like(inp[..., :1])], axis=-1)
    wider = np.concatenate([weight, bias[:, None]], axis=-1)
    dwide, dwider = np.zeros_like(wide), np.zeros_like(wider)
    matmul_backward(dwide, dwider, None, dout, wide, wider)
    return dwider[:, -1]


# %% exercise 1, checked
compare("dbias", bias_gradient(g, inp, weight, bias), dbias, tol=1e-12)

# %% [markdown]
# **2** (★★). To adapt a trained layer cheaply, one keeps $W$ fixed and
# learns a small correction $W + U D$, with $D$ of shape (R, C), $U$ of
# shape (OC, R) and R small. Derive $dD$ and $dU$ without ever forming an
# (OC, C) matrix.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# The correction adds $X D^\top U^\top$ to the output: two linear layers, one
# after the other. With $H = X D^\top$ of shape (N, R), (1.7.3) for the second
# gives $dU = dY^\top H$, (1.7.2) gives $dH = dY\,U$, and (1.7.3) for the first
# gives $dD = dH^\top X$.
# :::


# %% exercise 2, the gradients tags=["hide-cell"]
def correction_backward(dY, X, D, U):
    dH = dY @ U
    return dH.T @ X, dY.T @ (X @ D.T)


# %% exercise 2, checked
D, U = rng.normal(size=(2, 4)), rng.normal(size=(4, 2))


def corrected():
    matmul_forward(out, inp, weight + U @ D, bias)
    return (g * out).sum()


dD, dU = correction_backward(g.reshape(-1, 4), inp.reshape(-1, 4), D, U)
compare("dD", dD, numerical_gradient(corrected, D), tol=1e-8)
compare("dU", dU, numerical_gradient(corrected, U), tol=1e-8)

# %% [markdown]
# ## Further reading
#
# - Hu et al. (2021),
#   [LoRA](https://arxiv.org/abs/2106.09685): section 4 for the correction of
#   exercise 2 and what it saves.
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.7")
