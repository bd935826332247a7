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
# *Reading time: 16 minutes. You need: central differences from
# [chapter 1.4](04_gpt2.ipynb), and the way a layer is laid out in
# [chapter 1.6](06_layernorm.ipynb).*

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
# - compute a linear layer by hand, and say what a row of its weight is for;
# - derive the three products of training and check each by its shapes;
# - say what the layer saves for its backward pass, and why that is nothing;
# - count its operations, and its share of the whole model.
#
# The fast versions: chapters [2.4](../2_cpu/04_matmul.ipynb) and
# [3.6](../3_gpu/06_matmul.ipynb).

# %% [markdown]
# ## Setup

# %% setup
import matplotlib.pyplot as plt
import numpy as np

from llmnb.book.diagram import PALETTE
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
# the tokens $n = 0 \dots N - 1$ with $N = BT$, input channels $c$, output
# channels $o$.

# %% [markdown]
# ## Forward
#
# What we did by hand, for every token and every output channel:
#
# $$ y_{n,o} = \sum_c x_{n,c}\, W_{o,c} + b_o . \tag{1.7.1} $$
#
# As matrices this is $Y = X W^\top + b$. The weight stands in memory as
# (OC, C), the row of an output channel in one piece.


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
# logits. The `residual` is for the layers whose output is added to what came
# before them ([chapter 1.10](10_residual.ipynb)).

# %% [markdown]
# ## Backward, derived
#
# The next layer hands us $dy_{n,o} = \partial \mathcal L / \partial
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
# away.

# %% draw the three products
products = (
    ("$Y = X\\,W^T$", ("N", "C"), ("C", "OC")),
    ("$dX = dY\\,W$", ("N", "OC"), ("OC", "C")),
    ("$dW = dY^T\\,X$", ("OC", "N"), ("N", "C")),
)
sides = {"N": 2.4, "C": 1.2, "OC": 1.8}
fig, axes = plt.subplots(1, 3, figsize=(8.4, 3.2), dpi=100)
for ax, (title, (rows, inner), (_, cols)) in zip(axes, products, strict=True):
    high, deep, wide = sides[rows], sides[inner], sides[cols]
    for corner, size, shade in (
        ((-deep - 0.3, -high), (deep, high), "blue"),
        ((0, 0.3), (wide, deep), "green"),
        ((0, -high), (wide, high), "orange"),
    ):
        ax.add_patch(plt.Rectangle(corner, *size, color=PALETTE[shade]))
    ax.text(-deep / 2 - 0.3, 0.1, inner, ha="center", va="bottom")
    ax.text(-deep - 0.45, -high / 2, rows, ha="right", va="center")
    ax.text(wide + 0.15, deep / 2 + 0.3, inner, ha="left", va="center")
    ax.text(wide / 2, deep + 0.4, cols, ha="center", va="bottom")
    ax.set(title=title, xlim=(-3.2, 2.8), ylim=(-2.6, 3.2), aspect="equal")
    ax.axis("off")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.7.2. The left factor in blue, the right one in green, standing where
# its columns meet the result, in orange. The side they share is summed away:
# input channels forward, output channels for the input's gradient, tokens for
# the weight's. Each of the three sizes is summed once.*
#
# **What to save.** (1.7.2) needs the weight, which is a parameter, and (1.7.3)
# needs $x$, which is the output of the layer before and is in memory anyway.
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
# ## Count it
#
# A layer has $C \cdot OC$ weights and $OC$ biases. Each of the three products
# takes $2 N C \cdot OC$ operations, one multiplication and one addition a term.
# So forward takes two operations for each weight and token, backward four, and
# a training step six: $6 C \cdot OC$ for each token.

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

# %% the share of the whole model
inside = 12 * sum(2 * C * OC for C, OC in list(layers.values())[:4])
logits = 2 * 768 * 50304
mixing = 12 * 4 * 768 * 1024 / 2
total = inside + logits + mixing
print(f"blocks {inside / total:.0%}, logits {logits / total:.0%}, ", end="")
print(f"attention at T = 1024 {mixing / total:.0%} of the forward pass")

# %% [markdown]
# The first four stand in each of the twelve blocks. The mixing of tokens, the
# other products of attention, is left over: at its longest text less than a tenth
# of the arithmetic. So the speed of a model is that of its linear layers.

# %% [markdown]
# ## Take away
#
# - Forward is $X W^\top + b$; backward is $dY\,W$, $dY^\top X$ and the
#   column sums of $dY$. Each of the three indices is summed once.
# - The shapes say where each transpose belongs, but in a square layer only the
#   proof does.
# - The layer saves nothing: it needs its input, and that is there already.
# - A training step takes six operations for each weight and token.

# %% [markdown]
# ## Design note
#
# The other choice is the layout of the weight. Stored as (C, OC), as
# OpenAI's own GPT-2 files have it, forward would be $X A$ with no transpose and
# the gradient of the input would have one. (OC, C) is what PyTorch and llm.c
# use, so checkpoints load without a transpose; and the weights of one output
# channel, its row, lie in one piece.

# %% [markdown]
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
# for $c = C$ reads $dW_{p,C} = \sum_n dy_{n,p} \cdot 1$.
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
# learns a small correction $W + V U$, with $U$ of shape (R, C), $V$ of
# shape (OC, R) and R small. Derive $dU$ and $dV$ without ever forming an
# (OC, C) matrix.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# The correction adds $X U^\top V^\top$ to the output: two linear layers, one
# after the other. With $H = X U^\top$ of shape (N, R), (1.7.3) for the second
# gives $dV = dY^\top H$, (1.7.2) gives $dH = dY\,V$, and (1.7.3) for the first
# gives $dU = dH^\top X$.
# :::


# %% exercise 2, the gradients tags=["hide-cell"]
def correction_backward(dY, X, U, V):
    dH = dY @ V
    return dH.T @ X, dY.T @ (X @ U.T)


# %% exercise 2, checked
U, V = rng.normal(size=(2, 4)), rng.normal(size=(4, 2))


def corrected():
    matmul_forward(out, inp, weight + V @ U, bias)
    return (g * out).sum()


dU, dV = correction_backward(g.reshape(-1, 4), inp.reshape(-1, 4), U, V)
compare("dU", dU, numerical_gradient(corrected, U), tol=1e-8)
compare("dV", dV, numerical_gradient(corrected, V), tol=1e-8)

# %% [markdown]
# ## Further reading
#
# - Hu et al. (2021),
#   [LoRA](https://arxiv.org/abs/2106.09685): section 4 for the correction of
#   exercise 2 and what it saves.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.7")
