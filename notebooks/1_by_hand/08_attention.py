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
# # Attention: each position looks back
#
# > Every position takes a weighted mean of the values at and before it, with
# > weights from a softmax of dot products; and backward needs one number a row.
#
# *Reading time: 29 minutes. You need: [chapter 1.7](07_matmul.ipynb), and the
# proof by central differences of [chapter 1.4](04_gpt2.ipynb).*

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
# and from itself. What it looks for, what it finds and what it takes home
# are three vectors of the position, its *query*, *key* and *value*, which
# the linear layer of [chapter 1.7](07_matmul.ipynb) has computed. This chapter
# builds `attention_forward` and `attention_backward`. At its end you can
#
# - work out one attention by hand, from three vectors a position to the
#   weighted mean;
# - say why scores are divided by the root of the head size;
# - derive the backward pass and say where $T^3$ turns into $T^2$;
# builds `attention_forward` and `attention_backward`. At its end you can
#
# - work out one attention by hand, from three vectors a position to the
#   weighted mean;
# - say why scores are divided by the root of the head size;
# - derive the backward pass and say where $T^3$ turns into $T^2$.

# %% [markdown]
# ## Setup

# %% setup
import matplotlib.pyplot as plt

from llmnb.book.diagram import PALETTE
from llmnb.book.verify import compare, numerical_gradient, verdict

# %% imports tags=["export"]
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
# are 1, 1 and 2. We divide by $\sqrt 2$, for a reason given below:
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
# GPT-2 does this $NH$ times side by side. The $C$ channels are cut into
# $NH$ *heads* of $hs = C / NH$ channels, each with weights of its own, so a
# position can look at several places for several reasons.
#
# | tensor | shape | what it holds |
# |---|---|---|
# | `inp` | (B, T, 3C) | all queries, then keys, then values, of a position |
# | `out` | (B, T, C) | the heads' weighted means, side by side |
# | `lse` | (B, NH, T) | one number for each row of scores, explained below |
#
# A head's queries are a strided *view* into `inp`: the same memory, read
# with other steps. `split_heads` makes such views, and copies nothing.


# %% the heads as views tags=["export"]
def split_heads(x, NH, parts):
    """The heads of each part of x as views.

    x: (B, T, parts * C), C-contiguous; parts is 3 for queries, keys and
    values, 1 for an output. Returns a view (parts, B, NH, T, hs) with
    hs = C / NH, so what is written into it lands in x.
    """
    B, T, width = x.shape
    heads = x.reshape(B, T, parts, NH, width // (parts * NH))
    return heads.transpose(2, 0, 3, 1, 4)


# %% one sequence of five positions, two heads of four channels
inp = np.arange(5 * 24.0).reshape(1, 5, 24)
q, k, v = split_heads(inp, 2, 3)
print("q", q.shape, "strides in numbers", [s // 8 for s in q.strides])
print("head 1, position 2, key:", k[0, 1, 2])
verdict("views", np.shares_memory(q, inp), "share inp's memory")

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
# nothing would be left to learn from: we shall see that the gradient of a
# score carries the factor $a_{tu}$, and that it vanishes when a weight is 1.

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

    q, k: (B, NH, T, hs). Returns a new array (B, NH, T, T), reading
    positions along the third axis.
    """
    T, hs = q.shape[-2:]
    scores = (q @ k.swapaxes(-1, -2)) * q.dtype.type(1 / np.sqrt(hs))
    scores[..., ~np.tri(T, dtype=bool)] = -np.inf
    return scores


# %% attention, forward tags=["export"]
@shapes("B T C!, B NH|C T!, B T 3C")
def attention_forward(out, lse, inp):
    """Causal self-attention of NH heads.

    inp: (B, T, 3C), queries, keys and values along the last axis. Writes
    out (B, T, C) and lse (B, NH, T), the log-sum-exp of each row of scaled,
    masked scores, which the backward pass needs. All of one float dtype.
    """
    NH = lse.shape[1]
    q, k, v = split_heads(inp, NH, 3)
    scores = masked_scores(q, k)
    top = scores.max(axis=-1)
    lse[...] = top + np.log(np.exp(scores - top[..., None]).sum(axis=-1))
    att = np.exp(scores - lse[..., None])
    split_heads(out, NH, 1)[0] = att @ v


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
B, NH, T, L = 4, 12, 1024, 12
square, row = 4 * B * NH * T * T, 4 * B * NH * T
print(f"weights: {square / 1e6:6.1f} MB a layer, {L * square / 1e9:.1f} GB")
print(f"lse:     {row / 1e6:6.1f} MB a layer, {L * row / 1e6:.1f} MB")
# are in memory anyway, and from $L_t$, by (1.8.4). This reference builds the
# square as a temporary; the kernels of chapters [2.5](../2_cpu/05_attention.ipynb)
# and [3.9](../3_gpu/09_attention.ipynb) never do.

# %% [markdown]
# ## Backward, derived
#
# The layers above hand us $do_{ti} = \partial \mathcal L / \partial o_{ti}$.
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
# **What to save.** $q$, $k$, $v$ and $o$ are in memory as input and output
# of the layer. (1.8.4) rebuilds $a$ from $L$, (1.8.9) gets $D$ from $o$. So the
# forward pass saves $L_t$, one number a row, and no more.


# %% attention, backward tags=["export"]
@shapes("B T 3C!, B T C, B T 3C, B T C, B NH|C T")
def attention_backward(dinp, dout, inp, out, lse, add=True):
    """Add attention's gradient to dinp.

    dinp, inp: (B, T, 3C). dout, out: (B, T, C). lse: (B, NH, T). out and
    lse are as the forward pass left them. All of one float dtype. add:
    False overwrites dinp instead of adding.
    """
    if not add:
        dinp.fill(0)
    NH = lse.shape[1]
    q, k, v = split_heads(inp, NH, 3)
    dq, dk, dv = split_heads(dinp, NH, 3)
    o, do = split_heads(out, NH, 1)[0], split_heads(dout, NH, 1)[0]
    att = np.exp(masked_scores(q, k) - lse[..., None])
    dv += att.swapaxes(-1, -2) @ do
    datt = do @ v.swapaxes(-1, -2)
    D = (do * o).sum(axis=-1, keepdims=True)
    dscores = att * (datt - D) * q.dtype.type(1 / np.sqrt(q.shape[-1]))
    dq += dscores @ k
    dk += dscores.swapaxes(-1, -2) @ q


# %% [markdown]
# Each line is an equation: (1.8.4), (1.8.5), (1.8.6), (1.8.9), (1.8.8) with the scale
# of (1.8.10) folded in, and the two halves of (1.8.10). The future needs no care
# here, because its weights are zero.
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
# in one array, so one comparison tests all three.

# %% a problem to differentiate
B, T, NH, hs = 2, 5, 3, 4
C = NH * hs
inp = rng.normal(size=(B, T, 3 * C))
g = rng.normal(size=(B, T, C))
out, lse = np.empty((B, T, C)), np.empty((B, NH, T))


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
    split_heads(dinp, NH, 3),
    split_heads(want, NH, 3),
    strict=True,
):
    compare(name, mine, theirs, tol=1e-8)

# %% [markdown]
# Now leave out $D_t$, as if the denominator of (1.8.2) were a constant.


# %% a gradient made wrong on purpose
def without_denominator(dinp, dout, inp, out, lse):
    attention_backward(dinp, dout, inp, np.zeros_like(out), lse)


wrong = split_heads(gradient(without_denominator), NH, 3)
right = split_heads(want, NH, 3)
compare("dv, no D", wrong[2], right[2], tol=1e-8)
try:
    compare("dq, no D", wrong[0], right[0], tol=1e-8)
    caught = False
except AssertionError:
    caught = True
verdict("the mistake", caught, "is caught")

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
# ## Take away
#
# - Attention is a weighted mean of values at and before a position; the
#   weights come from a softmax of scaled dot products.
# - Its backward pass needs one number a row from the forward pass, the
#   log-sum-exp. The weights are computed again.
# - The softmax's matrix of derivatives is never formed: its product
#   collapses to $a\,(da - D)$, with $D = do \cdot o$.

# %% [markdown]
# ## Design note
#
# Saving the weights would spare backward one of its five products and all
# exponentials. For short sequences that is a fair trade. For four sequences
# of 1024 positions it costs the 2.4 GB counted above, several times the
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
moved, moved_out = inp.copy(), np.empty_like(before)
split_heads(moved, 3, 3)[1] += rng.normal(size=4)
attention_forward(moved_out, np.empty_like(lse), moved)

# %% exercise 1, checked
compare("output", moved_out, before, tol=1e-12)
dk = split_heads(dinp, 3, 3)[1]
compare("sum of dk", dk.sum(axis=2), np.zeros((2, 3, 4)), tol=1e-12)

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
    q, k, v = split_heads(x, NH, 3)
    age = np.arange(x.shape[1])[:, None] - np.arange(x.shape[1])
    scores = masked_scores(q, k) - slope * age
    a = np.exp(scores - scores.max(axis=-1, keepdims=True))
    a /= a.sum(axis=-1, keepdims=True)
    o, do = a @ v, split_heads(g, NH, 1)[0]
    ds = a * (do @ v.swapaxes(-1, -2) - (do * o).sum(-1, keepdims=True))
    ds /= np.sqrt(q.shape[-1])
    dx = np.zeros_like(x)
    dx_heads = split_heads(dx, NH, 3)
    dx_heads[0] = ds @ k
    dx_heads[1] = ds.swapaxes(-1, -2) @ q
    dx_heads[2] = a.swapaxes(-1, -2) @ do
    return (do * o).sum(), dx


# %% exercise 2, checked
NH = 3
want = numerical_gradient(lambda: biased(inp, g)[0], inp)
compare("biased dinp", biased(inp, g)[1], want, tol=1e-8)

# %% [markdown]
# ## Further reading
#
# - Vaswani et al. (2017),
#   [Attention Is All You Need](https://arxiv.org/abs/1706.03762): section
#   3.2 defines what this chapter differentiates, with the reason for the
#   root in a footnote.
# - Olsson et al. (2022),
#   [In-context Learning and Induction Heads](https://arxiv.org/abs/2209.11895):
#   the heads of figure 1.8.3, found in trained models.

# % [markdown]
# ## What llmnb gained

# % what llmnb gained
from llmnb.book.index import gained

gained("1.8")
