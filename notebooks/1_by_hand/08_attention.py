# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       reference.attention: "Causal attention in NumPy, forward and backward."
# ---

# %% [markdown]
# # Attention: let each position look back and differentiate the look
#
# > Causal self-attention: every position takes a weighted mean of the values
# > at and before it, with weights from a softmax of dot products.
#
# *Reading time: 28 minutes. You need: the softmax of [chapter
# 1.1](01_learns.ipynb), and [chapter 1.7](07_matmul.ipynb), whose layer makes
# the queries, keys and values. The fast versions: chapters
# [2.5](../2_cpu/05_attention.ipynb) and [3.9](../3_gpu/09_attention.ipynb).*
#
# ## Where we are

# %% where we are
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="attention")

# %% [markdown]
# *Figure 1.8.1. Attention stands once in every block, between the linear layer
# that makes q, k and v and the one that projects its output.*
#
# Every other layer of GPT-2 treats each token alone. Attention is the one
# place where tokens meet: each position reads from the positions before it and
# from itself. Three vectors of a position take part. Its *query* says what it
# looks for, its *key* what it offers to those who look, and its *value* is
# what they take home. At the end of this chapter you can
#
# - work out one attention by hand;
# - say why there are several heads, and why a linear layer follows them;
# - say why scores are divided by the root of the head size;
# - derive the backward pass, and say where $T^3$ turns into $T^2$ and why one
#   saved number a row is enough.
#
# ## Setup

# %% setup
import matplotlib.pyplot as plt

from llmnb.book.diagram import PALETTE
from llmnb.book.verify import compare, numerical_gradient, verdict

# %% imports tags=["export"]
from typing import NamedTuple

import numpy as np

from llmnb.shapes import shapes

# %% [markdown]
# ## By hand
#
# Take $T = 3$ positions whose queries, keys and values have two numbers each:
#
# | position | query | key | value |
# |---|---|---|---|
# | 0 | (1, 0) | (1, 0) | (1, 0) |
# | 1 | (0, 2) | (0, 1) | (0, 1) |
# | 2 | (1, 1) | (1, 1) | (2, 2) |
#
# Position 2 asks. The dot products of its query (1, 1) with the three keys are
# 1, 1 and 2. We divide by $\sqrt 2$, for a reason given later: $0.7071,
# 0.7071, 1.4142$. A *softmax* turns these *scores* into positive weights with
# sum 1: exponentials $2.0281, 2.0281, 4.1133$, divided by their sum $8.1695$,
# give $0.2483, 0.2483, 0.5035$. The output is the mean of the values with
# these weights,
#
# $$
# \begin{aligned}
# &0.2483\,(1, 0) + 0.2483\,(0, 1) + 0.5035\,(2, 2) \\
# &\approx (1.2552, 1.2552) .
# \end{aligned}
# $$
#
# Position 1 may look at positions 0 and 1 only. Its scores are $0$ and
# $1.4142$, its weights $0.1956$ and $0.8044$. Position 0 sees nobody but
# itself: its weight is 1, whatever its score.

# %% three positions by hand
q = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
k = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
v = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
weights = np.exp(q @ k.T / np.sqrt(2)) * np.tri(3)
weights /= weights.sum(axis=1, keepdims=True)
print(np.round(weights, 4))
print(np.round(weights @ v, 4))

# %% [markdown]
# Each row holds the weights of one position that reads. The triangle of zeros
# is the future. Hiding it makes the layer *causal*: GPT-2 learns to predict
# the next token at every position of a text at once, and a position that could
# read the next one would learn to copy it: a loss near 0, and no prediction.
#
# ## Heads
#
# One look gives one mean. A position may need several things: the subject of
# its sentence, the word before it, the bracket that is still open. So GPT-2
# looks $NH$ times side by side. The $C$ channels are cut into $NH$ *heads* of
# $hs = C / NH$ channels, each with queries, keys, values and weights of its
# own, and the heads' outputs stand side by side in `out`.


# %% splitting and merging heads tags=["hide-input"]
def cells(x, y, colour, shade):
    """Four rows of two squares, the upper left corner at (x, y)."""
    look = {"fc": PALETTE[colour], "ec": "white", "alpha": shade}
    for i, j in np.ndindex(4, 2):
        ax.add_patch(plt.Rectangle((x + j, y - i), 1, -1, **look))


fig, ax = plt.subplots(figsize=(8, 5.2), dpi=100)
for h, shade in enumerate((0.95, 0.6, 0.3)):
    x = 10 * h + 4.2
    for part, colour in enumerate(("blue", "green", "orange")):
        cells(6 + 6 * part + 2 * h, 18, colour, shade)
        cells(10 * h + 3.2 * part, 10.5, colour, shade)
    cells(12 + 2 * h, 3, "purple", shade)
    ax.text(x, 11, f"head {h}, (T, hs) each", ha="center")
    arrow = {"arrowstyle": "->"}
    ax.annotate("", (x, 12), (15, 13.7), arrowprops=arrow)
    ax.annotate("", (13 + 2 * h, 3.3), (x, 6.2), arrowprops=arrow)
names = {(9, 18.5): "queries", (15, 18.5): "keys", (21, 18.5): "values"}
names |= {(3.4, 15.7): "inp (T, 3C)", (9.4, 0.8): "out (T, C)"}
for (x, y), name in names.items():
    ax.text(x, y, name, ha="center")
ax.set(xlim=(-0.5, 29), ylim=(-1.2, 19.5), aspect="equal")
ax.axis("off")
plt.show()

# %% [markdown]
# *Figure 1.8.2. Three heads of two channels, four positions. A head is two
# columns of the queries, two of the keys and two of the values (one shade),
# and fills two columns of the output: no column of one head meets another's.*
#
# Keys and values need not be as many as queries. In *grouped* attention $NKV$
# heads of keys and values serve $NH$ heads of queries, $NH / NKV$ of them
# each. GPT-2 has $NKV = NH$; other models have fewer, and it costs us one more
# axis, so we build it in.
#
# | tensor | shape | what it holds |
# |---|---|---|
# | `inp` | (B, T, (NH + 2 NKV) hs) | heads of queries, then of keys, then of values |
# | `out` | (B, T, NH hs) | the heads' weighted means, side by side |
# | `lse` | (B, NH, T) | one number for each row of scores, explained later |
#
# For GPT-2 the width of `inp` is 3C. `count_heads`, folded, reads the three
# numbers off the shapes: `lse` has $NH$, `out` then has $hs$, and what is left
# of `inp` is $2\,NKV\,hs$ wide.


# %% how many heads tags=["export", "hide-input"]
class Heads(NamedTuple):
    """How many heads of queries, how many of keys and values; their size."""

    NH: int
    NKV: int
    hs: int


def count_heads(layer, out, lse, inp):
    """The Heads that the shapes of attention's arrays speak of.

    layer: what a message calls it. Raises ValueError where inp is not
    (NH + 2 NKV) hs wide, for an NKV that divides NH.
    """
    NH, C, width = lse.shape[1], out.shape[2], inp.shape[2]
    hs = C // NH
    NKV = (width - C) // (2 * hs) if hs else 0
    if NKV < 1 or NH % NKV or width != (NH + 2 * NKV) * hs:
        raise ValueError(
            f"{layer}: inp must have shape (B, T, (NH + 2 NKV) hs), where "
            f"NH = {NH}, hs = {hs} and NKV divides NH, got {inp.shape}"
        )
    return Heads(NH, NKV, hs)


# %% [markdown]
# A head's numbers are a *view* into `inp`, the same memory read with other
# steps. The first $NH / NKV$ heads of queries share the first head of keys and
# of values, and so on; those that share stand along an axis of their own.


# %% the heads as views tags=["export"]
def split_heads(x, NKV, hs):
    """The heads of x as a view.

    x: (B, T, n * hs), of n heads. Returns a view (B, NKV, n / NKV, T, hs),
    so what is written into it lands in x.
    """
    B, T, width = x.shape
    heads = x.reshape(B, T, NKV, width // (NKV * hs), hs)
    return heads.transpose(0, 2, 3, 1, 4)


def split_qkv(x, heads):
    """Queries, keys and values of x, packed as in inp, as views.

    heads: Heads. Queries are (B, NKV, NH / NKV, T, hs), keys and values
    (B, NKV, 1, T, hs).
    """
    NH, NKV, hs = heads
    ends = NH * hs, (NH + NKV) * hs
    parts = x[..., : ends[0]], x[..., ends[0] : ends[1]], x[..., ends[1] :]
    return [split_heads(part, NKV, hs) for part in parts]


# %% [markdown]
# ## Forward
#
# Heads and sequences never meet; we look at one. Position $t$ reads, position
# $u \le t$ is read, $i$ counts the $hs$ channels. The score is
#
# $$ s_{tu} = \frac{1}{\sqrt{hs}} \sum_i q_{ti}\, k_{ui} , \qquad u \le t .
#    \tag{1.8.1} $$
#
# **Why the root.** Suppose the components of $q_t$ and $k_u$ are independent,
# with mean 0 and variance 1. Means of independent factors multiply: a product
# $q_{ti} k_{ui}$ has mean 0, and its square mean 1. Variances of independent
# terms add up: the dot product has variance $hs$, and divided by $\sqrt{hs}$
# variance 1 for any head size. Undivided, scores of a head of 64 deviate by 8,
# and the largest of the 32 weights in the next cell takes most of the sum.
# Little would be left to learn from: the gradient of a score vanishes when one
# weight of its row is 1, as (1.8.8) will show.

# %% with and without the root
rng = np.random.default_rng(6)
dots = rng.normal(size=(2000, 1, 64)) @ rng.normal(size=(2000, 64, 32))
for name, scores in (("plain", dots), ("scaled", dots / 8)):
    e = np.exp(scores)
    largest = (e / e.sum(axis=2, keepdims=True)).max(axis=2).mean()
    print(f"{name:<7} variance {scores.var():4.1f}, largest {largest:.2f}")

# %% [markdown]
# The weights are a softmax over the visible positions,
#
# $$ a_{tu} = \frac{e^{s_{tu}}}{\sum_{w \le t} e^{s_{tw}}} , \qquad
#    a_{tu} = 0 \text{ for } u > t , \tag{1.8.2} $$
#
# and the output is the weighted mean of the values:
#
# $$ o_{ti} = \sum_{u \le t} a_{tu}\, v_{ui} . \tag{1.8.3} $$
#
# As in chapter 1.1 we subtract the largest score of a row from all, so that no
# exponential overflows. The logarithm of the denominator, computed in this
# way, is the row's *log-sum-exp*,
#
# $$
# \begin{aligned}
# \operatorname{lse}_t &= \log \sum_{u \le t} e^{s_{tu}} \\
#   &= \max_{w \le t} s_{tw} + \log \sum_{u \le t}
#      e^{s_{tu} - \max_w s_{tw}} , \\
# a_{tu} &= e^{s_{tu} - \operatorname{lse}_t} .
# \end{aligned}
# \tag{1.8.4}
# $$
#
# One number a row turns a score into its weight. In the code a score of the
# future is $-\infty$, and its exponential 0, as (1.8.2) wants it.


# %% the scores tags=["export"]
def masked_scores(q, k):
    """Scaled dot products of queries and keys; the future is -inf.

    q, k: (..., T, hs). Returns a new array (..., T, T), reading positions
    along the last axis but one.
    """
    T, hs = q.shape[-2:]
    scores = (q @ k.swapaxes(-1, -2)) * q.dtype.type(1 / np.sqrt(hs))
    scores[..., ~np.tri(T, dtype=bool)] = -np.inf
    return scores


# %% attention, forward tags=["export"]
@shapes("B T C!, B NH|C T!, B T QKV")
def attention_forward(out, lse, inp):
    """Causal self-attention of NH heads.

    inp: (B, T, (NH + 2 NKV) * hs), the heads of queries, of keys and of
    values; NKV divides NH. Writes out (B, T, NH * hs) and lse (B, NH, T),
    the log-sum-exp of each row of scaled, masked scores, which the backward
    pass needs. All of one float dtype.
    """
    heads = count_heads("attention_forward", out, lse, inp)
    q, k, v = split_qkv(inp, heads)
    scores = masked_scores(q, k)
    top = scores.max(axis=-1, initial=-np.inf)
    total = top + np.log(np.exp(scores - top[..., None]).sum(axis=-1))
    att = np.exp(scores - total[..., None])
    split_heads(out, heads.NKV, heads.hs)[...] = att @ v
    lse[...] = total.reshape(lse.shape)


# %% the three positions through the function
inp = np.concatenate((q, k, v), axis=1)[None]
out, lse = np.zeros((1, 3, 2)), np.zeros((1, 1, 3))
attention_forward(out, lse, inp)
print("lse", np.round(lse, 4))
compare("by hand", out[0], weights @ v, tol=1e-12)
attention_forward(out, lse, 1000 * inp)
compare("large scores", out[0], 1000 * v, tol=1e-12)
try:
    attention_forward(out, lse, np.ones((1, 3, 5)))
    verdict("five channels", False, "are refused")
except ValueError as error:
    print(error)

# %% [markdown]
# In the line over the functions `NH|C` is an NH that divides C. The function
# holds a (B, NH, T, T) array of weights. For GPT-2 124M with four sequences of
# 1024 positions that is $4 \cdot 12 \cdot 1024^2$ numbers, 201 MB in float32
# and 2.4 GB for twelve layers, several times the model; `lse` has 0.2 MB a
# layer. So no weight is saved: backward computes it anew, by (1.8.4). The
# reference builds the square as a temporary; the fast versions never do.
#
# ## Backward, derived
#
# Later layers hand us $do_{ti} = \partial \mathcal L / \partial o_{ti}$. We
# owe $dq$, $dk$ and $dv$, and walk (1.8.3), (1.8.2), (1.8.1) backwards.
#
# **The values.** By (1.8.3), $v_{ui}$ enters $o_{ti}$ with factor $a_{tu}$,
# for every $t \ge u$ that reads it:
#
# $$ dv_{ui} = \sum_{t \ge u} a_{tu}\, do_{ti} . \tag{1.8.5} $$
#
# **The weights.** By (1.8.3) again, $a_{tu}$ enters $o_{ti}$ with factor
# $v_{ui}$, for every channel:
#
# $$ da_{tu} = \sum_i do_{ti}\, v_{ui} , \qquad u \le t . \tag{1.8.6} $$
#
# **The scores.** Each score $s_{tu}$ enters all weights $a_{tw}$ of its row,
# because it stands in the denominator of (1.8.2), which is
# $e^{\operatorname{lse}_t}$. The derivative of this denominator by $s_{tu}$ is
# $e^{s_{tu}}$; the numerator, $e^{s_{tw}}$, depends on $s_{tu}$ only for $w =
# u$. So by the quotient rule, with $\delta_{wu}$ for 1 where $w
# = u$ and 0 elsewhere,
#
# $$ \frac{\partial a_{tw}}{\partial s_{tu}}
#    = \frac{\delta_{wu}\, e^{s_{tw}}}{e^{\operatorname{lse}_t}}
#      - \frac{e^{s_{tw}}\, e^{s_{tu}}}{e^{2 \operatorname{lse}_t}}
#    = a_{tw}\, (\delta_{wu} - a_{tu}) . \tag{1.8.7} $$
#
# This is (1.1.5) in the letters of this chapter. Now sum over the weights of
# the row. The first term leaves $w = u$ alone, and $a_{tu}$ stands in both:
#
# $$
# \begin{aligned}
# ds_{tu} &= \sum_{w \le t} da_{tw}\, a_{tw}\, (\delta_{wu} - a_{tu}) \\
#   &= a_{tu} \Bigl( da_{tu} - \sum_{w \le t} a_{tw}\, da_{tw} \Bigr) .
# \end{aligned}
# \tag{1.8.8}
# $$
#
# Where one weight is 1, the others are 0, the inner sum is its own $da$, and
# no score of the row has a gradient: that is where a missing root would lead.
#
# A program that follows the first line as it stands forms the matrix (1.8.7)
# of every row, $t^2$ numbers, and takes $\sum_t t^2 \approx T^3/3$ steps. In
# the second the sum no longer depends on $u$: one number a row, taken once,
# and $T^2$ steps in all. That sum shrinks once more. Put in
# (1.8.6), change the order of the sums, and find (1.8.3) inside:
#
# $$
# \begin{aligned}
# D_t &= \sum_{w \le t} a_{tw}\, da_{tw} \\
#   &= \sum_i do_{ti} \sum_{w \le t} a_{tw}\, v_{wi}
#    = \sum_i do_{ti}\, o_{ti} .
# \end{aligned}
# \tag{1.8.9}
# $$
#
# So $D_t$ is a dot product of $hs$ numbers, known before any weight of the row
# is. With (1.8.4), all that backward needs beside the layer's input and output
# is one saved number a row.
#
# **Queries and keys.** By (1.8.1), $q_{ti}$ enters the scores of row $t$, each
# $s_{tu}$ with the factor $k_{ui} / \sqrt{hs}$, and $k_{ui}$ those of column
# $u$, with the factor $q_{ti} / \sqrt{hs}$:
#
# $$
# \begin{aligned}
# dq_{ti} &= \frac{1}{\sqrt{hs}} \sum_{u \le t} ds_{tu}\, k_{ui} , \\
# dk_{ui} &= \frac{1}{\sqrt{hs}} \sum_{t \ge u} ds_{tu}\, q_{ti} .
# \end{aligned}
# \tag{1.8.10}
# $$
#
# Where several heads read the same keys and values, these reach the loss
# through each of them: $dk$ and $dv$ of a group are sums over its heads.

# %% one score's way back tags=["hide-input"]
fig, ax = plt.subplots(figsize=(8, 3.8), dpi=100)
nodes = {"q_t": (0, 2.5), "k_u": (0, 0.5), "s_{tu}": (2, 1.5)}
nodes |= {"a_{t0}": (5, 2.7), "a_{tu}": (5, 1.5), "a_{tt}": (5, 0.3)}
nodes |= {"o_t": (7.2, 1.5)}
arrows = """s_{tu} q_t k_u/\\sqrt{hs} s_{tu} k_u q_t/\\sqrt{hs}
a_{t0} s_{tu} -a_{t0}a_{tu} a_{tu} s_{tu} a_{tu}(1-a_{tu})
a_{tt} s_{tu} -a_{tt}a_{tu} o_t a_{t0} v_0 o_t a_{tu} v_u o_t a_{tt} v_t"""
middle = {"ha": "center", "va": "center"}
for start, end, factor in np.reshape(arrows.split(), (-1, 3)):
    line = {"arrowstyle": "-|>", "color": PALETTE["orange"], "lw": 1.6}
    line |= {"shrinkA": 18, "shrinkB": 18}
    ax.annotate("", nodes[end], nodes[start], arrowprops=line)
    place = np.mean((nodes[end], nodes[start]), axis=0)
    white = {"fc": "white", "ec": "none", "pad": 1.5}
    ax.text(*place, f"${factor}$", bbox=white, **middle)
for name, place in nodes.items():
    ax.text(*place, f"${name}$", size=16, **middle)
heads = {0: "$dq$, $dk$ (1.8.10)", 2: "$ds$ (1.8.8)", 5: "$da$ (1.8.6)"}
for x, head in (heads | {7.2: "$do$"}).items():
    ax.text(x, 3.25, head, ha="center", color=PALETTE["orange"])
ax.set(xlim=(-0.7, 7.6), ylim=(0, 3.5))
ax.axis("off")
plt.show()

# %% [markdown]
# *Figure 1.8.3. One score's way back: what arrives is multiplied by the factor
# on each arrow, and what meets is added. The score touched every weight of its
# row (three are drawn), so all send it a gradient: in sum $a_{tu}$ times the
# difference of what its own weight gets, $da_{tu}$, and their mean, $D_t$.*


# %% attention, backward tags=["export"]
@shapes("B T QKV!, B T C, B T QKV, B T C, B NH|C T")
def attention_backward(dinp, dout, inp, out, lse, add=True):
    """Add attention's gradient to dinp.

    dinp, inp: (B, T, (NH + 2 NKV) * hs). dout, out: (B, T, NH * hs). lse:
    (B, NH, T). out and lse are as the forward pass left them. All of one
    float dtype. add: False overwrites dinp instead of adding.
    """
    heads = count_heads("attention_backward", out, lse, inp)
    if not add:
        dinp.fill(0)
    q, k, v = split_qkv(inp, heads)
    dq, dk, dv = split_qkv(dinp, heads)
    o, do = (split_heads(x, heads.NKV, heads.hs) for x in (out, dout))
    att = np.exp(masked_scores(q, k) - lse.reshape(*q.shape[:-1], 1))
    dv += (att.swapaxes(-1, -2) @ do).sum(axis=2, keepdims=True)
    datt = do @ v.swapaxes(-1, -2)
    D = (do * o).sum(axis=-1, keepdims=True)
    dscores = att * (datt - D) * q.dtype.type(1 / np.sqrt(heads.hs))
    dq += dscores @ k
    dk += (dscores.swapaxes(-1, -2) @ q).sum(axis=2, keepdims=True)


# %% [markdown]
# Each line is an equation, from `att` on: (1.8.4), (1.8.5), (1.8.6), (1.8.9),
# (1.8.8) with the scale of (1.8.10) folded in, and the two halves of (1.8.10).
# For the future `datt` has numbers too, but `att`, its factor, is zero there.
# The sums over axis 2 are those over a group, of length 1 in GPT-2.
#
# ## Proof
#
# As before, $\mathcal L = \sum g \cdot o$ for a fixed random $g$, float64,
# step $h = 10^{-5}$, tolerance $10^{-8}$, a gradient that starts from ones.
# Four heads of queries and two of keys and values test the sums over a group
# too; forward, the two must do what four would, of which two and two are equal.

# %% a problem to differentiate
heads = Heads(NH=4, NKV=2, hs=3)
inp, g = rng.normal(size=(2, 5, 24)), rng.normal(size=(2, 5, 12))
out, lse = np.empty((2, 5, 12)), np.empty((2, 4, 5))


def loss():
    attention_forward(out, lse, inp)
    return (g * out).sum()


def gradient(backward):
    dinp = np.ones_like(inp)
    loss()
    backward(dinp, g, inp, out, lse)
    return dinp - 1


# %% against central differences
want = numerical_gradient(loss, inp)
dinp = gradient(attention_backward)
parts = split_qkv(dinp, heads), split_qkv(want, heads)
for name, mine, theirs in zip(("dq", "dk", "dv"), *parts, strict=True):
    compare(name, mine, theirs, tol=1e-8)
written, four = np.full_like(inp, np.nan), np.zeros_like(out)
attention_backward(written, g, inp, out, lse, add=False)
compare("written", written, dinp, tol=1e-12)
pairs = inp[..., 12:].reshape(2, 5, 4, 3).repeat(2, axis=2)
twice = np.concatenate((inp[..., :12], pairs.reshape(2, 5, 24)), axis=2)
attention_forward(four, lse.copy(), twice)
compare("groups", four, out, tol=1e-12)

# %% [markdown]
# Now leave out $D_t$, as if the denominator of (1.8.2) were a constant. And a
# loss that sees positions 0 to 2 must not move by a single bit when the input
# at a later position does.


# %% a gradient made wrong on purpose
def without_denominator(dinp, dout, inp, out, lse):
    attention_backward(dinp, dout, inp, np.zeros_like(out), lse)


wrong = split_qkv(gradient(without_denominator), heads)
off = [np.abs(x - y).max() for x, y in zip(wrong, parts[1], strict=True)]
right = min(off[:2]) > 0.1 and off[2] < 1e-8
verdict("no D", right, "dq and dk are wrong, dv is not")

g[:, 3:] = 0  # a loss of positions 0 to 2
seen = numerical_gradient(loss, inp)
verdict("the future", not seen[:, 3:].any(), "does not count")

# %% [markdown]
# ## Why it is there
#
# Take a task that nobody can do without looking back. Sequences of eight
# random letters from an alphabet of eight; at every position from the fourth
# on two questions: which letter stood one place earlier, and which one three
# places earlier? The input has 16 channels, a 1 for the letter and a 1 for the
# position. One linear layer makes queries, keys and values of it, one linear
# layer makes two times eight logits of what attention has found, and the loss
# is that of [chapter 1.1](01_learns.ipynb). We train it four times for 250
# steps: without attention, with one head of 16 channels, with two heads of 8,
# and with two heads whose 16 outputs *are* the logits.


# %% the task tags=["hide-input"]
def questions(rng, B=32, T=8, V=8):
    """Letters and places as channels; the letters one and three back."""
    letters = rng.integers(0, V, (B, T))
    places = np.tile(np.eye(T), (B, 1, 1))
    x = np.concatenate((np.eye(V)[letters], places), axis=-1)
    back = np.roll(letters, 1, axis=1), np.roll(letters, 3, axis=1)
    return x, np.stack([np.eye(V)[y] for y in back], axis=-1)


def dlogits_of(logits, wanted):
    """Loss, and its gradient by the logits, from position 3 on."""
    z = logits.reshape(wanted.shape)[:, 3:]
    p = np.exp(z - z.max(axis=2, keepdims=True))
    p /= p.sum(axis=2, keepdims=True)
    hit, d = wanted[:, 3:], np.zeros(wanted.shape)
    d[:, 3:] = (p - hit) / hit.sum()  # (1.1.6)
    loss = -np.log((p * hit).sum(axis=2)).mean()
    return loss, d.reshape(logits.shape)


# %% train it tags=["hide-input"]
def train(NH, project=True, C=16, steps=250):
    """The losses, and the weights of queries, keys and values."""
    rng = np.random.default_rng(0)
    W = rng.normal(0, 0.3, (3 * C, C))
    P = rng.normal(0, 0.3, (C, C)) if project else np.eye(C)
    losses = []
    for _ in range(steps):
        x, wanted = questions(rng)
        inp = x @ W.T
        out, lse = inp[..., 2 * C :].copy(), np.empty((32, NH or 1, 8))
        if NH:
            attention_forward(out, lse, inp)
        loss, dlogits = dlogits_of(out @ P.T, wanted)
        dout, dinp = dlogits @ P, np.zeros_like(inp)
        if NH:
            attention_backward(dinp, dout, inp, out, lse)
        else:  # a position has nothing but its own value
            dinp[..., 2 * C :] = dout
        if project:
            P -= 2 * np.tensordot(dlogits, out, ((0, 1), (0, 1)))
        W -= 2 * np.tensordot(dinp, x, ((0, 1), (0, 1)))
        losses.append(loss)
    return np.array(losses), W


# %% four runs
runs = {
    "no attention": train(0),
    "one head": train(1),
    "two heads, no projection": train(2, project=False),
    "two heads": train(2),
}
ends = {name: losses[-50:].mean() for name, (losses, _) in runs.items()}
none, one, apart, two = ends.values()
verdict("no attention", abs(none - np.log(8)) < 0.01, "knows nothing: log 8")
verdict("one head", 0.65 < one < 0.75, "pays 0.7")
verdict("no projection", apart > one, "is no further")
verdict("two heads", two < 0.02, "has both answers")

# %% what they learn, and where the heads look tags=["hide-input"]
fig = plt.figure(figsize=(8, 5.6), dpi=100)
top = fig.add_subplot(2, 1, 1)
colours = [PALETTE[c] for c in ("grey", "orange", "purple", "blue")]
for colour, (name, (losses, _)) in zip(colours, runs.items(), strict=True):
    top.plot(losses, color=colour, label=name)
top.axhline(np.log(8), color=PALETTE["ink"], lw=0.8, ls=":")
top.text(251, np.log(8), "log 8", va="center")
top.set(xlabel="step", ylabel="loss", xlim=(0, 250))
top.legend(frameon=False, loc=(0.66, 0.5))
top.spines[["top", "right"]].set_visible(False)
x, _ = questions(np.random.default_rng(1))
maps = []
for name, NH in (("one head", 1), ("two heads", 2)):
    q, k, _ = split_qkv(x @ runs[name][1].T, Heads(NH, NH, 16 // NH))
    att = np.exp(masked_scores(q, k))
    maps += list((att / att.sum(-1, keepdims=True)).mean(0)[:, 0])
for i, title in enumerate(("one head", "two heads, the first", "the second")):
    att, ax = maps[i], fig.add_subplot(2, 3, 4 + i)
    ax.set_facecolor(PALETTE["pale"])
    ax.imshow(np.where(np.tri(8) > 0, att, np.nan), cmap="Blues", vmax=1)
    ax.set(title=title, xlabel="is read")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.8.4. Without attention nothing is learnt. One head looks at both
# places at once and takes home one mixture of two letters, out of which it has
# to make two answers. Two heads of half the size share the work, one place
# each; without a projection they have got no further than one head.*
#
# With more steps one head learns to give one of the letters more weight than
# the other, which tells them apart. Its loss falls, but slowly: a thousand
# steps do not bring it near two heads.

# %% who looks where
back = [(np.diag(att, -1)[2:], np.diag(att, -3)) for att in maps]
verdict("one head", np.min(back[0]) > 0.3, "looks at both places")
shared = min(back[1][1].min(), back[2][0].min()) > 0.8
verdict("two heads", shared, "one place each")
late = train(1, steps=1000)[0][-50:].mean()
verdict("one head", 10 * two < late < one, "1000 steps: lower, not near")

# %% [markdown]
# **Why a projection must follow.** The logits of the two questions take turns,
# channel by channel. So half of those of each stand in the channels of head 0,
# and without a projection there is only what head 0 has found: it has to serve
# both questions, as one head has to. In GPT-2 what head 0 finds could never
# leave the first $hs$ channels. A matrix in which every output reads all
# heads, the *projection*, undoes that. What the heads of a trained model look
# at, on a sentence of yours, [the first page](../../book/intro.md) shows.
#
# ## Count it
#
# A head has $T(T+1)/2$ pairs $(t, u)$. Forward takes $2\,hs$ operations a pair
# for the score and $2\,hs$ for the output. Backward takes five such sums: the
# score again, $da$, and a term each of $dv$, $dq$ and $dk$. There is no
# parameter, and $B \cdot NH \cdot T$ numbers are saved. A position sees $T/2$
# others on average, so attention takes $2\,T C$ operations a position,
# forward; the four linear layers of its block, with their $12\,C^2$ weights,
# take $24\,C^2$. The two are equal at $T = 12\,C$, 9,216 positions.
#
# ## Take away
#
# - Attention is a weighted mean of values at and before a position; the
#   weights come from a softmax of scaled dot products.
# - Heads look side by side, each at its own places, and a projection mixes
#   what they found.
# - The softmax's matrix of derivatives is never formed: its product
#   collapses to $a\,(da - D)$, with $D = do \cdot o$.
# - One saved number a row, the log-sum-exp, rebuilds the weights.
#
# ## Exercises
#
# **1** (★). Add the same vector $k'$ to all keys of a head. What happens to
# the output? What does it say about $\sum_u dk_u$? Check both.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# Every score of row $t$ grows by $q_t \cdot k' / \sqrt{hs}$, the same for all
# $u$, and a softmax does not see it: the output stays. So the loss has no
# slope along that direction, and its slope is $k' \cdot \sum_u dk_u$. As $k'$
# is arbitrary, $\sum_u dk_u = 0$. In a linear layer that makes $k$, this sum
# is the gradient of the bias: the bias of the keys never learns.
# :::

# %% exercise 1, moved keys tags=["hide-cell"]
loss()
moved, moved_out = inp.copy(), np.empty_like(out)
split_qkv(moved, heads)[1][...] += rng.normal(size=3)
attention_forward(moved_out, lse, moved)
compare("output", moved_out, out, tol=1e-12)
dk = split_qkv(dinp, heads)[1].sum(axis=3)
compare("sum of dk", dk, np.zeros_like(dk), tol=1e-12)

# %% [markdown]
# **2** (★★). The word `ORBITS` is spelt twice. Choose queries and keys by
# hand, so that in the second word each letter reads the letter that *followed*
# it in the first: the last `S` is to read an `O`. (A key may know the letter
# before its own: in a trained model a head of an earlier layer brings it.)
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# The query is a code of the position's own letter, the key a code of the
# letter *before* it. So a query matches the position after an earlier
# occurrence of its letter. The values are rows of an identity matrix: by
# (1.8.3) the output is then the weights. The factor $4 \sqrt{12}$ makes the
# score of a match 4, which wins over zeros. Such a head is called an
# *induction head*: what it reads is a good guess of the next letter.
# :::

# %% exercise 2, queries and keys made by hand tags=["hide-cell"]
text = "ORBITSORBITS"
code = {letter: np.eye(12)[i] for i, letter in enumerate("ORBITS")}
q = 4 * np.sqrt(12) * np.array([code[letter] for letter in text])
k = np.array([np.zeros(12)] + [code[letter] for letter in text[:-1]])
inp = np.concatenate((q, k, np.eye(12)), axis=1)[None]
out, lse = np.empty((1, 12, 12)), np.empty((1, 1, 12))
attention_forward(out, lse, inp)
found = out[0, 6:].argmax(axis=1)
print("read:", *(text[u] for u in found))
verdict("second word", list(found) == [1, 2, 3, 4, 5, 6], "reads what follows")

# %% [markdown]
# ## Further reading
#
# - Vaswani et al. (2017),
#   [Attention Is All You Need](https://arxiv.org/abs/1706.03762): section 3.2.
# - Olsson et al. (2022),
#   [In-context Learning and Induction Heads](https://arxiv.org/abs/2209.11895):
#   the heads of exercise 2, found in trained models.
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.8")
