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
# *Reading time: 28 minutes. You need: [chapter 1.6](06_layernorm.ipynb) for
# derivatives and their proof, and [chapter 1.7](07_matmul.ipynb), whose layer
# makes the queries, keys and values. The fast versions: chapters
# [2.5](../2_cpu/05_attention.ipynb) and [3.9](../3_gpu/09_attention.ipynb).*

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="attention")

# %% [markdown]
# *Figure 1.8.1. Attention stands once in every block, between the linear layer
# that makes q, k and v and the one that projects its output.*
#
# Every other layer of GPT-2 treats each token alone. Attention is the one
# place where tokens meet: each position reads from the positions before it
# and from itself. Three vectors of a position take part. Its *query* says
# what it looks for, its *key* what it offers to those who look, and its
# *value* is what they take home. This chapter builds `attention_forward` and
# `attention_backward`. At its end you can
#
# - work out one attention by hand, from three vectors a position to the
#   weighted mean;
# - say why scores are divided by the root of the head size;
# - derive the backward pass and say where $T^3$ turns into $T^2$;
# - say what the forward pass must save, and why one number a row is enough.

# %% [markdown]
# ## Setup

# %% setup
import matplotlib.pyplot as plt

from llmnb.book.diagram import PALETTE
from llmnb.book.verify import compare, numerical_gradient, verdict

# %% imports tags=["export"]
from typing import NamedTuple

import numpy as np

from llmnb.shapes import shapes

# %% the seed
rng = np.random.default_rng(6)

# %% [markdown]
# ## By hand
#
# Take $T = 3$ positions whose queries, keys and values have two numbers
# each:
#
# | position | query | key | value |
# |---|---|---|---|
# | 0 | (1, 0) | (1, 0) | (1, 0) |
# | 1 | (0, 2) | (0, 1) | (0, 1) |
# | 2 | (1, 1) | (1, 1) | (2, 2) |
#
# Position 2 asks. The dot products of its query (1, 1) with the three keys
# are 1, 1 and 2. We divide by $\sqrt 2$, for a reason given later:
# $0.7071, 0.7071, 1.4142$. A *softmax* turns these *scores* into positive
# weights with sum 1: exponentials $2.0281, 2.0281, 4.1133$, divided by
# their sum $8.1695$, give $0.2483, 0.2483, 0.5035$. The output is the mean
# of the values with these weights,
#
# $$ 0.2483\,(1, 0) + 0.2483\,(0, 1) + 0.5035\,(2, 2)
#    = (1.2552, 1.2552), $$
#
# give or take the last digit.
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

# %% who looks at whom
fig, ax = plt.subplots(figsize=(4.6, 3.6), dpi=100)
ax.imshow(weights, cmap="Blues", vmin=0, vmax=1.3)
for t, u in np.ndindex(3, 3):
    label = f"{weights[t, u]:.2f}" if u <= t else "future"
    ink = "white" if weights[t, u] > 0.9 else PALETTE["ink"]
    ax.text(u, t, label, ha="center", va="center", size=12, color=ink)
ax.set(xticks=range(3), yticks=range(3))
ax.set(xlabel="is read (key, value)", ylabel="reads (query)")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.8.2. Who looks at whom: each row holds the weights of one reading
# position and sums to 1, and the triangle above the diagonal, the future,
# has no weight.*
#
# Hiding the future is what makes the layer *causal*. GPT-2 learns to
# predict the next token at every position of a text at once. A position
# that could read the next one would learn to copy it.
#
# ## Heads
#
# One look finds one thing. A position may need several: the subject of its
# sentence, the word before it, the bracket that is still open. So GPT-2
# looks $NH$ times side by side. The $C$ channels are cut into $NH$ *heads*
# of $hs = C / NH$ channels, and each head has queries, keys, values and
# weights of its own. A head's output is $hs$ numbers, and the outputs stand
# side by side in `out`. Nothing in this layer mixes them: channel 5 of head
# 0 knows nothing of head 1. That is why a linear layer, the *projection*,
# follows, in which every output reads all heads.
#
# Keys and values need not be as many as queries. In *grouped* attention $NKV$
# heads of keys and values serve $NH$ heads of queries, $G = NH / NKV$ of
# them each. GPT-2 has $NKV = NH$; with fewer, less has to be kept while
# a model writes. It costs us one more axis, so we build it in.
#
# | tensor | shape | what it holds |
# |---|---|---|
# | `inp` | (B, T, (NH + 2 NKV) hs) | heads of queries, then of keys, then of values |
# | `out` | (B, T, NH hs) | the heads' weighted means, side by side |
# | `lse` | (B, NH, T) | one number for each row of scores, explained later |
#
# For GPT-2 the width of `inp` is 3C. The three shapes say all that there is
# to know of heads: `lse` has $NH$, `out` then has $hs$, and what is left of
# the width of `inp` is $2\,NKV\,hs$.


# %% how many heads tags=["export"]
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
# A head's numbers are a strided *view* into `inp`: the same memory, read
# with other steps. `split_heads` makes such views, and copies nothing. Heads
# that share keys and values stand along an axis of their own.


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


# %% five positions, four heads of two channels, keys for two heads
inp = np.arange(5 * 16.0).reshape(1, 5, 16)
q, k, v = split_qkv(inp, Heads(4, 2, 2))
print("q", q.shape, "k", k.shape)
print("position 2, key of query heads 2 and 3:", k[0, 1, 0, 2])
shared = [np.shares_memory(x, inp) for x in (q, k, v)]
verdict("views", all(shared), "share inp's memory")

# %% [markdown]
# ## Forward
#
# From here on we look at one head of one sequence; heads and sequences
# never meet. Position $t$ reads, position $u \le t$ is read, $i$ counts the
# $hs$ channels of the head. The score is
#
# $$ s_{tu} = \frac{1}{\sqrt{hs}} \sum_i q_{ti}\, k_{ui} , \qquad u \le t .
#    \tag{1.8.1} $$
#
# **Why the root.** Suppose the components of $q_t$ and $k_u$ are
# independent, with mean 0 and variance 1. Each product $q_{ti} k_{ui}$ then
# has mean 0 and variance $1 \cdot 1 = 1$, and variances of independent terms
# add up: the dot product has variance $hs$. Divided by $\sqrt{hs}$ it has
# variance 1 for any head size. Without the division, scores of a head of 64
# would spread by 8, the largest would take nearly all the weight, and
# nothing would be left to learn from: the gradient of a score vanishes when
# one weight of its row is 1, as (1.8.8) will show.

# %% with and without the root
q, k = rng.normal(size=(2, 2000, 64))
keys = rng.normal(size=(2000, 32, 64))
dots = np.einsum("ni,nui->nu", q, keys)
for name, scores in (("plain", dots), ("scaled", dots / 8)):
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    largest = (e / e.sum(axis=1, keepdims=True)).max(axis=1).mean()
    print(f"{name:<7} variance {scores.var():5.1f}", end="  ")
    print(f"largest of 32 weights {largest:.2f}")

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
# The exponential of a large score overflows. It helps that a softmax does
# not change when the same number is taken from all scores of a row; we take
# the largest, so that every exponent is at most 0. The logarithm of the
# denominator, computed in this way, is the row's *log-sum-exp*,
#
# $$ L_t = m_t + \log \sum_{u \le t} e^{s_{tu} - m_t} , \quad
#    m_t = \max_{u \le t} s_{tu} , \qquad
#    a_{tu} = e^{s_{tu} - L_t} . \tag{1.8.4} $$
#
# One number a row, $L_t$, turns a score into its weight.


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
    top = scores.max(axis=-1)
    L = top + np.log(np.exp(scores - top[..., None]).sum(axis=-1))
    att = np.exp(scores - L[..., None])
    split_heads(out, heads.NKV, heads.hs)[...] = att @ v
    lse[...] = L.reshape(lse.shape)


# %% the three positions through the function
q, k, v = [[1, 0], [0, 2], [1, 1]], [[1, 0], [0, 1], [1, 1]], np.eye(3, 2)
v[2] = 2
inp = np.concatenate((q, k, v), axis=1)[None]
out, lse = np.empty((1, 3, 2)), np.empty((1, 1, 3))
attention_forward(out, lse, inp)
print("lse", np.round(lse, 4))
compare("by hand", out[0], weights @ v, tol=1e-12)

# %% [markdown]
# The function builds all weights of a row before it uses them, so it holds
# a (B, NH, T, T) array, and more than one at a time. For GPT-2 124M with
# four sequences of 1024 positions one such array takes

# %% the square and the row
B, NH, T, layers = 4, 12, 1024, 12
square, row = 4 * B * NH * T * T, 4 * B * NH * T
print(
    f"weights: {square / 1e6:6.1f} MB a layer, {layers * square / 1e9:.1f} GB"
)
print(f"lse:     {row / 1e6:6.1f} MB a layer, {layers * row / 1e6:.1f} MB")

# %% [markdown]
# in float32. The weights of all layers together would be several times the
# model. So no weight is saved: backward recomputes it from $q$ and $k$, which
# are in memory anyway, and from $L_t$, by (1.8.4). The reference builds the
# square as a temporary; the fast versions never do.

# %% [markdown]
# ## Backward, derived
#
# The layers that follow hand us $do_{ti} = \partial \mathcal L / \partial o_{ti}$.
# We owe $dq$, $dk$ and $dv$, and walk (1.8.3), (1.8.2), (1.8.1) backwards.
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
# **The scores.** Each score enters all weights of its row, because it
# stands in the denominator of (1.8.2). Differentiate the quotient. For $w = u$
# the numerator depends on $s_{tu}$ too, which gives the first term:
#
# $$ \frac{\partial a_{tw}}{\partial s_{tu}}
#    = a_{tw}\, \delta_{wu} - a_{tw}\, a_{tu} . \tag{1.8.7} $$
#
# Here $\delta_{wu}$ is 1 for $w = u$ and 0 otherwise. Summed over the
# weights of the row,
#
# $$ ds_{tu} = \sum_{w \le t} da_{tw}\, a_{tw}\, (\delta_{wu} - a_{tu})
#    = a_{tu} \Bigl( da_{tu} - \sum_{w \le t} a_{tw}\, da_{tw} \Bigr) .
#    \tag{1.8.8} $$
#
# Where one weight is 1, it is the whole row: the others are 0, the inner sum
# is its own $da$, and no score of the row has a gradient. That is what a
# missing root would lead to.
#
# Stop here for a moment. A program that follows the left-hand sum as it
# stands forms the matrix (1.8.7) of every row, $t^2$ numbers, and takes
# $\sum_t t^2 \approx T^3/3$ steps. On the right the inner sum no longer
# depends on $u$: one number a row, taken once, and $T^2$ steps in all. That
# sum shrinks once more. Put in (1.8.6), change the order of the sums, and find
# (1.8.3) inside:
#
# $$ D_t = \sum_{w \le t} a_{tw}\, da_{tw}
#    = \sum_i do_{ti} \sum_{w \le t} a_{tw}\, v_{wi}
#    = \sum_i do_{ti}\, o_{ti} . \tag{1.8.9} $$
#
# So $D_t$ is a dot product of $hs$ numbers, known before any weight of the
# row is. Backward can take the weights in any order, one at a time.
#
# **Queries and keys.** By (1.8.1), $q_{ti}$ enters the scores of row $t$, and
# $k_{ui}$ those of column $u$:
#
# $$ dq_{ti} = \frac{1}{\sqrt{hs}} \sum_{u \le t} ds_{tu}\, k_{ui} , \qquad
#    dk_{ui} = \frac{1}{\sqrt{hs}} \sum_{t \ge u} ds_{tu}\, q_{ti} .
#    \tag{1.8.10} $$
#
# Heads that share keys and values add up: $dk$ and $dv$ of a group are sums
# over its $G$ heads.
#
# **What to save.** $q$, $k$, $v$ and $o$ are in memory as input and output
# of the layer. (1.8.4) rebuilds $a$ from $L$, (1.8.9) gets $D$ from $o$. So the
# forward pass saves $L_t$, one number a row, and no more.


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
    L = lse.reshape(*q.shape[:-1], 1)
    att = np.exp(masked_scores(q, k) - L)
    dv += (att.swapaxes(-1, -2) @ do).sum(axis=2, keepdims=True)
    datt = do @ v.swapaxes(-1, -2)
    D = (do * o).sum(axis=-1, keepdims=True)
    dscores = att * (datt - D) * q.dtype.type(1 / np.sqrt(heads.hs))
    dq += dscores @ k
    dk += (dscores.swapaxes(-1, -2) @ q).sum(axis=2, keepdims=True)


# %% [markdown]
# Each line is an equation: from `att` on: (1.8.4), (1.8.5), (1.8.6), (1.8.9), (1.8.8)
# with the scale of (1.8.10) folded in, and the two halves of (1.8.10). The future needs no care
# here, because its weights are zero. The sums over axis 2 are those over a
# group; for GPT-2 that axis has length 1.
#
# How much does the collapse of (1.8.8) save? We count the steps of the loop
# that forms every row's matrix, as [llm.c](https://github.com/karpathy/llm.c)
# does in its CPU version, at four operations a step (a comparison aside, a
# subtraction, two products and an addition), against (1.8.8) with (1.8.9).


# %% the softmax backward with the whole matrix
def row_by_matrix(att, datt):
    ds, steps = np.zeros_like(att), 0
    for t in range(len(att)):
        for w in range(t + 1):
            for u in range(t + 1):
                jacobian = att[t, w] * ((u == w) - att[t, u])
                ds[t, u] += jacobian * datt[t, w]
                steps += 1
    return ds, steps


att = np.exp(masked_scores(*rng.normal(size=(2, 20, 8))))
att /= att.sum(axis=1, keepdims=True)
datt = rng.normal(size=(20, 20))
want, steps = row_by_matrix(att, datt)
D = (att * datt).sum(axis=1, keepdims=True)
compare("ds", att * (datt - D), want, tol=1e-12)
verdict("steps", steps == 20 * 21 * 41 // 6, "T (T + 1) (2T + 1) / 6")

# %% the price of the matrix
hs = 64
print("    T      matrix    collapsed  whole backward   (MFLOP a head)")
for T in (64, 256, 1024):
    matrix = 4 * T * (T + 1) * (2 * T + 1) // 6
    pairs = T * (T + 1) // 2
    collapsed = 2 * pairs + 2 * T * hs
    rest = (2 + 2 + 2 + 2 + 2) * hs * pairs + collapsed
    print(f"{T:5} {matrix / 1e6:11.2f} {collapsed / 1e6:12.2f}", end="")
    print(f" {rest / 1e6:15.2f}")

# %% [markdown]
# The last column counts all of backward: the five sums over channels or
# positions in (1.8.1), (1.8.5), (1.8.6) and (1.8.10), at two operations a pair and
# channel. At $T = 1024$ the matrix alone costs several times as much as
# everything else together, and it doubles its lead with every doubling
# of $T$.

# %% [markdown]
# ## Proof
#
# As before, $\mathcal L = \sum g \cdot o$ for a fixed random $g$, float64,
# step $h = 10^{-5}$, tolerance $10^{-8}$. `dinp` holds $dq$, $dk$ and $dv$
# in one array. The problem has four heads of queries and two of keys and
# values, so the sums over a group are tested too.

# %% a problem to differentiate
B, T, heads = 2, 5, Heads(4, 2, 3)
C, width = 4 * 3, (4 + 2 * 2) * 3
inp = rng.normal(size=(B, T, width))
g = rng.normal(size=(B, T, C))
out, lse = np.empty((B, T, C)), np.empty((B, 4, T))


def loss():
    attention_forward(out, lse, inp)
    return (g * out).sum()


def gradient(backward):
    dinp = np.zeros_like(inp)
    loss()
    backward(dinp, g, inp, out, lse)
    return dinp


# %% against central differences
want = numerical_gradient(loss, inp)
dinp = gradient(attention_backward)
for name, mine, theirs in zip(
    ("dq", "dk", "dv"),
    split_qkv(dinp, heads),
    split_qkv(want, heads),
    strict=True,
):
    compare(name, mine, theirs, tol=1e-8)

# %% [markdown]
# Now leave out $D_t$, as if the denominator of (1.8.2) were a constant.


# %% a gradient made wrong on purpose
def without_denominator(dinp, dout, inp, out, lse):
    attention_backward(dinp, dout, inp, np.zeros_like(out), lse)


wrong = split_qkv(gradient(without_denominator), heads)
right = split_qkv(want, heads)
compare("dv, no D", wrong[2], right[2], tol=1e-8)
try:
    compare("dq, no D", wrong[0], right[0], tol=1e-8)
    caught = False
except AssertionError:
    caught = True
verdict("the mistake", caught, "is caught")

# %% [markdown]
# And what is a group? Give every head of queries keys and values of its own,
# copies of those that its group shares. The outputs must be the same, and
# the gradient of what was shared must be the sum of the copies'.

# %% a group is copies, and its gradient their sum
q, k, v = split_qkv(inp, heads)
copies = np.empty((B, T, 3 * C))
for to, x in zip(split_qkv(copies, Heads(4, 4, 3)), (q, k, v), strict=True):
    full = np.broadcast_to(x, q.shape)
    to[...] = full.reshape(to.shape)
out2, dcopies = np.empty_like(out), np.zeros_like(copies)
attention_forward(out2, lse, copies)
attention_backward(dcopies, g, copies, out2, lse)
compare("output", out2, out, tol=1e-12)
each = split_qkv(dcopies, Heads(4, 4, 3))[1].reshape(B, 2, 2, T, 3)
dk = split_qkv(dinp, heads)[1]
compare("dk", each.sum(axis=2, keepdims=True), dk, tol=1e-12)

# %% [markdown]
# Causality has a proof of its own: change the input at one position, and no
# output before it may move by a single bit.

# %% the past does not depend on the future
loss()
before = out.copy()
inp[:, 3] += 1
loss()
verdict("before", np.array_equal(out[:, :3], before[:, :3]), "is unchanged")
verdict("after", bool((out[:, 3:] != before[:, 3:]).all()), "is changed")
inp[:, 3] -= 1

# %% [markdown]
# ## See it
#
# What can attention do that a fixed average cannot? We set queries and keys
# by hand so that a head *completes a pattern*. The sequence is a word
# spelt twice. A position's query is a code of its own letter, and its key
# is a code of the letter *before* it. (In a trained network an earlier
# layer's head, looking one place back, provides that.) So a query matches
# the position that follows an earlier occurrence of its letter. The values
# are the rows of an identity matrix: then (1.8.3) gives back the weights
# themselves, and we can look at them without touching the code.

# %% queries and keys made by hand
text = "ORBITSORBITS"
T, hs = len(text), 16
code = {letter: np.eye(hs)[i] for i, letter in enumerate(dict.fromkeys(text))}
q = 4 * np.sqrt(hs) * np.array([code[letter] for letter in text])
k = np.array([np.zeros(hs)] + [code[letter] for letter in text[:-1]])


def look(q, k):
    inp = np.concatenate((q, k, np.eye(T, hs)), axis=1)[None]
    out, lse = np.empty((1, T, hs)), np.empty((1, 1, T))
    attention_forward(out, lse, inp)
    return out[0, :, :T]


chance = look(*rng.normal(size=(2, T, hs)))
pattern = look(q, k)
found = pattern[6:].argmax(axis=1)
print("read from:", found, " letters there:", "".join(text[u] for u in found))
verdict("second word", list(found) == [1, 2, 3, 4, 5, 6], "reads what follows")

# %% draw both
fig, axes = plt.subplots(1, 2, figsize=(8, 4.3), dpi=100)
for ax, att, title in zip(
    axes, (chance, pattern), ("random q and k", "pattern completion"),
    strict=True,
):  # fmt: skip
    hidden = np.where(np.tri(T, dtype=bool), att, np.nan)
    ax.set_facecolor(PALETTE["pale"])
    ax.imshow(hidden, cmap="Blues", vmin=0, vmax=1)
    ax.set_xticks(range(T), text)
    ax.set_yticks(range(T), text)
    ax.set_title(title)
    ax.set_xlabel("is read")
axes[0].set_ylabel("reads")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.8.3. Left, random queries and keys: a causal average with uneven
# weights that follow no letter. Right, queries and keys made by hand: in the
# second word each letter reads the letter that followed it in the first, a
# dark line parallel to the diagonal. In the first word there is nothing
# to find yet, and a row spreads evenly over what it sees.*
#
# A head that works like the one on the right is called an *induction head*.
# What it reads is a good guess of the next letter. Trained language models
# are known to contain such heads; see the further reading.

# %% [markdown]
# ## Count it
#
# A head has $T(T+1)/2$ pairs $(t, u)$. Forward takes $2\,hs$ operations a
# pair for the score and $2\,hs$ for the output. Backward takes five such
# sums: the score again, $da$, and a term each of $dv$, $dq$ and $dk$. There
# is no parameter in this layer. It saves $B \cdot NH \cdot T$ numbers for
# the backward pass.
#
# Attention's share of a whole step grows with $T$, because its work is
# quadratic in $T$ and that of all other layers linear. At which length does
# it take as many operations as the four linear layers of its block, which
# have $12\,C^2$ weights and take $24\,C^2$ operations a position?

# %% where attention costs as much as the linear layers
C = 768
T = 24 * C * C / (4 * C / 2)  # 4 hs operations a pair, T / 2 pairs a row
print(f"forward: at {T:,.0f} positions of {C} channels")

# %% [markdown]
# ## Take away
#
# - Attention is a weighted mean of values at and before a position; the
#   weights come from a softmax of scaled dot products.
# - Its backward pass needs one number a row from the forward pass, the
#   log-sum-exp. The weights are computed again.
# - The softmax's matrix of derivatives is never formed: its product
#   collapses to $a\,(da - D)$, with $D = do \cdot o$.
# - Heads look side by side; heads of queries may share keys and values, and
#   then the gradients of what they share are sums.
#
# ## Design note
#
# Saving the weights would spare backward one of its five sums and all
# exponentials. For short sequences that is a fair trade. For four sequences
# of 1024 positions it costs the 2.4 GB counted earlier, several times the
# model itself. We keep one path for all lengths, the one whose memory grows
# with $T$ and not with its square.

# %% [markdown]
# ## Exercises
#
# **1** (★). Add the same vector $c$ to all keys of a head. What happens to
# the output? What does it say about $\sum_u dk_u$? Check both.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# Every score of row $t$ grows by $q_t \cdot c / \sqrt{hs}$, the same for all
# $u$, and a softmax does not see it: the output stays. So the loss has no
# slope along that direction, and its slope is $c \cdot \sum_u dk_u$. As $c$
# is arbitrary, $\sum_u dk_u = 0$. In a linear layer that makes $k$, this
# sum is the gradient of the bias: the bias of the keys never learns.
# :::

# %% exercise 1, moved keys tags=["hide-cell"]
loss()
moved = inp.copy()
split_qkv(moved, heads)[1][...] += rng.normal(size=3)
moved_out = np.empty_like(out)
attention_forward(moved_out, lse, moved)

# %% exercise 1, checked
compare("output", moved_out, out, tol=1e-12)
dk = split_qkv(dinp, heads)[1]
compare("sum of dk", dk.sum(axis=3), np.zeros((2, 2, 1, 3)), tol=1e-12)

# %% [markdown]
# **2** (★★). Scores may favour the near past: subtract a fixed slope
# times the distance, $s_{tu} = q_t \cdot k_u / \sqrt{hs} - \beta\,(t - u)$.
# What changes in the backward pass? Write both passes and check them.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# The bias is a constant, so $\partial s_{tu} / \partial q_{ti}$ and
# $\partial s_{tu} / \partial k_{ui}$ stay as they are. (1.8.5) to (1.8.10) hold
# word for word; only the weights rebuilt from $L$ must include the bias.
# :::


# %% exercise 2, biased scores tags=["hide-cell"]
def biased(x, g, slope=0.3):
    q, k, v = split_qkv(x, heads)
    age = np.arange(x.shape[1])[:, None] - np.arange(x.shape[1])
    scores = masked_scores(q, k) - slope * age
    a = np.exp(scores - scores.max(axis=-1, keepdims=True))
    a /= a.sum(axis=-1, keepdims=True)
    o, do = a @ v, split_heads(g, heads.NKV, heads.hs)
    ds = a * (do @ v.swapaxes(-1, -2) - (do * o).sum(-1, keepdims=True))
    ds /= np.sqrt(q.shape[-1])
    dx = np.zeros_like(x)
    dq, dk, dv = split_qkv(dx, heads)
    dq[...] = ds @ k
    dk[...] = (ds.swapaxes(-1, -2) @ q).sum(axis=2, keepdims=True)
    dv[...] = (a.swapaxes(-1, -2) @ do).sum(axis=2, keepdims=True)
    return (do * o).sum(), dx


# %% exercise 2, checked
want = numerical_gradient(lambda: biased(inp, g)[0], inp)
compare("biased dinp", biased(inp, g)[1], want, tol=1e-8)

# %% [markdown]
# **3** (★★★). With a *sliding window* a position reads the last $W$
# positions only, itself included. Write a forward pass that takes
# $O(T\,W\,hs)$ time, and show that with $W = T$ it is (1.8.3). How far back
# can information reach through several such layers?
#
# :::{admonition} Solution to exercise 3
# :class: dropdown
# The first key of row $t$ is $\max(0, t - W + 1)$ instead of 0; nothing else
# changes. Each layer lets a vector move up to $W - 1$ positions forward in
# time, so $n$ layers reach back $n (W - 1)$ positions.
# :::


# %% exercise 3, a window tags=["hide-cell"]
def windowed(q, k, v, W):
    out = np.empty_like(v)
    for t in range(len(q)):
        first = max(0, t - W + 1)
        scores = k[first : t + 1] @ q[t] / np.sqrt(len(q[t]))
        e = np.exp(scores - scores.max())
        out[t] = e @ v[first : t + 1] / e.sum()
    return out


# %% exercise 3, checked
x = rng.normal(size=(1, 40, 24))
y, lse = np.empty((1, 40, 8)), np.empty((1, 1, 40))
attention_forward(y, lse, x)
q, k, v = (part[0, 0, 0] for part in split_qkv(x, Heads(1, 1, 8)))
compare("W = T", windowed(q, k, v, 40), y[0], tol=1e-12)
compare("W = 1", windowed(q, k, v, 1), v, tol=1e-12)
near = windowed(q, k, v, 5)
k[:30] += 1
far = windowed(q, k, v, 5)
verdict("out of sight", np.array_equal(near[34:], far[34:]), "is unread")

# %% [markdown]
# ## Further reading
#
# - Vaswani et al. (2017),
#   [Attention Is All You Need](https://arxiv.org/abs/1706.03762): section
#   3.2 defines what this chapter differentiates, with the reason for the
#   root in a footnote.
# - Ainslie et al. (2023),
#   [GQA](https://arxiv.org/abs/2305.13245): heads of queries that share keys
#   and values, and what it costs in quality.
# - Olsson et al. (2022),
#   [In-context Learning and Induction Heads](https://arxiv.org/abs/2209.11895):
#   the heads of figure 1.8.3, found in trained models.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.8")
