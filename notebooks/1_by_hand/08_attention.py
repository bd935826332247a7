# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       reference.attention: "Causal attention in NumPy, forward and backward."
#       cpu.math: "The exponential and the hyperbolic tangent, in vector instructions."
#       cpu.attention: "Attention in blocks with an online softmax, for the processor's cores."
#       cuda.attention: "Attention on a GPU, forward and backward."
# ---

# %% [markdown]
# # Let each position look back and differentiate the look
#
# > Causal self-attention: every position takes a weighted mean of the values
# > at and before it, with weights from a softmax of dot products.

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
# - compute a softmax over a row that you never hold in memory;
# - write an exponential that vectorises;
# - share the scores of a head among the blocks of a GPU, so that every
#   element of the result has one owner, forward and backward.
#
# You need central differences from [chapter 1.4](04_gpt2.ipynb), the `kernel`
# decorator from [chapter 1.5](05_encoder.ipynb), the panels of
# [chapter 1.7](07_matmul.ipynb), and for the GPU the simulator of
# [chapter 3.1](../3_gpu/01_threads.ipynb).

# %% [markdown]
# ## Setup

# %% setup
from types import SimpleNamespace

import matplotlib.pyplot as plt

from llmnb.book.diagram import PALETTE
from llmnb.timing import fastest, machine
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

# %% [markdown]
# in float32. The weights of all layers together would be several times the
# model. So no weight is saved: backward recomputes it from $q$ and $k$, which
# are in memory anyway, and from $L_t$, by (1.8.4). The reference builds the
# square as a temporary; the CPU version below never does.

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
# ## Fast on a CPU
#
# NumPy computes the square of scores whole, though nearly half of it is
# masked; it writes it to memory and reads it back for every step of the
# softmax. We want one pass, the triangle only, and no square. Three pieces
# are missing: an exponential that vectorises, a softmax that does not need
# its row, and a way to share out the work.

# %% keep the NumPy versions
reference = SimpleNamespace(
    forward=attention_forward, backward=attention_backward
)

# %% [markdown]
# ### An exponential that vectorises
#
# `math.exp` in a compiled loop is a call of a library function, one number
# at a time. Eight numbers at a time need a formula made of operations that
# vector units have. Split the exponent at the powers of two:
#
# $$ x = n \log 2 + r , \qquad n = \lfloor x / \log 2 + \tfrac12 \rfloor ,
#    \qquad e^x = 2^n e^r , \qquad |r| \le \tfrac12 \log 2 . \tag{1.8.11} $$
#
# On this short interval the series
# $1 + r + r^2/2! + \dots + r^7/7!$ is off by about
# $|r|^8 / 8! < 6 \cdot 10^{-9}$, well below the $6 \cdot 10^{-8}$ to which
# float32 rounds. And $2^n$ costs nothing to compute: a float32 *is* a power
# of two times a fraction, with $n + 127$ stored in the bits from the 23rd
# upwards. The integer $(n + 127) \cdot 2^{23}$, read as a float32, is $2^n$.
#
# One trap is left. $n \log 2$ is rounded when we subtract it from $x$, and
# $r$ inherits an error that grows with $n$. So $\log 2$ is split in two: a
# high part of few bits, whose product with any $n$ in question is exact, and
# a small low part. This works only if the compiler keeps the order of
# operations. Our kernels allow it to reorder (`fastmath`), and then it
# merges the two parts again, which undoes the repair. So this one function
# is compiled with leave to contract a product and a sum into one
# instruction, and with no other; the test of its error below fails when it
# is not. numba's `overload`, which says what the compiler is to put in the
# place of a call, has the option, and it picks by the type of the argument:
# a float64 goes to `math.exp`, slower, and exact enough for proofs.

# %% imports of the fast exponential tags=["export"] module="cpu.math"
import math

import numba
import numpy as np
from numba.extending import overload

from llmnb.cpu.jit import inner

# %% the constants tags=["exporti"] module="cpu.math"
LIMIT = np.float32(88)
LOG2_E = np.float32(math.log2(math.e))
LOG_2_HIGH = np.float32(0.693359375)  # 355 / 512: nine bits
LOG_2_LOW = np.float32(math.log(2) - 0.693359375)
HALF, ONE, BIAS = np.float32(0.5), np.float32(1), np.float32(127)
SHIFT = np.float32(2**23)
E2, E3, E4, E5, E6, E7 = (
    np.float32(1 / math.factorial(n)) for n in range(2, 8)
)


# %% e to the x in float32 tags=["exporti"] module="cpu.math"
def _exp_float32(x):
    x = min(max(x, -LIMIT), LIMIT)
    n = np.floor(x * LOG2_E + HALF)
    r = (x - n * LOG_2_HIGH) - n * LOG_2_LOW
    p = E3 + r * (E4 + r * (E5 + r * (E6 + r * E7)))
    p = ONE + r * (ONE + r * (E2 + r * p))
    return p * np.int32((n + BIAS) * SHIFT).view(np.float32)


def _exp(x):
    raise NotImplementedError("for compiled code: call fast_exp")


@overload(_exp, jit_options={"fastmath": {"contract"}})
def _choose_exp(x):
    if x == numba.float32:
        return _exp_float32
    return lambda x: math.exp(x)


# %% the fast exponential tags=["export"] module="cpu.math"
@inner
def fast_exp(x):
    """exp(x) for compiled kernels, in a form that LLVM vectorises.

    A float32 gives a float32 with a relative error below 1.5e-7 for x from
    -87 to 88. Below -88 it gives 0 and above 88 exp(88), so never an
    infinity. Any other number goes to math.exp in float64.
    """
    return _exp(x)


# %% [markdown]
# We measure its error against float64 on two million numbers, the ends
# included.


# %% the error of the fast exponential
def fill(y, x):
    for i in range(x.size):
        y[i] = fast_exp(x[i])


fill = inner(fill)
grid = np.linspace(-87, 88, 2_000_001).astype(np.float32)
got, exact = np.empty_like(grid), np.exp(grid.astype(np.float64))
fill(got, grid)
error = np.abs(got / exact - 1).max()
verdict("fast_exp", error < 1.5e-7, "relative error < 1.5e-07")
ends = np.empty(3, np.float32)
fill(ends, np.array([-1000, 0, 1000], np.float32))
verdict("ends", ends[0] == 0 and ends[1] == 1, "exp(-1000) = 0, exp(0) = 1")
verdict("overflow", bool(np.isfinite(ends[2])), "none at 1000")


# %% against the library's tags=["nbval-ignore-output"]
def fill_by_library(y, x):
    for i in range(x.size):
        y[i] = math.exp(x[i])


fill_by_library = inner(fill_by_library)
fill_by_library(got, grid)
print(f"{machine()}, one thread")
for name, function in (("math.exp", fill_by_library), ("fast_exp", fill)):
    seconds = fastest(function, got[:4096], grid[:4096], runs=200)
    print(f"{name} {seconds / 4096 * 1e9:5.2f} ns a number")

# %% [markdown]
# ### A softmax without its row
#
# (1.8.4) needs the row's maximum before the first exponential. But a maximum
# found so far, $m$, will do if we repair what we have when a larger one
# comes along. Keep three things for a row: $m$, the sum $\ell = \sum
# e^{s_u - m}$ and the unfinished output $\omega_i = \sum e^{s_u - m}\,
# v_{ui}$, over the positions seen. A new group of scores arrives, with the
# maximum $m'$ of old and new together. All that was summed carries the
# factor $e^{-m}$ and should carry $e^{-m'}$, so multiply it by $e^{m - m'}$:
#
# $$ \ell \leftarrow e^{m - m'} \ell + \sum_{u \text{ new}} e^{s_u - m'} ,
#    \qquad
#    \omega_i \leftarrow e^{m - m'} \omega_i
#      + \sum_{u \text{ new}} e^{s_u - m'} v_{ui} . \tag{1.8.12} $$
#
# At the end of the row
#
# $$ o_i = \omega_i / \ell , \qquad L = m + \log \ell . \tag{1.8.13} $$
#
# This is called *online softmax*. In NumPy, four scores at a time:


# %% online softmax
def online(scores, values, group=4):
    m, total, out = -1e30, 0.0, np.zeros(values.shape[1])
    for u in range(0, len(scores), group):
        s, v = scores[u : u + group], values[u : u + group]
        new = max(m, s.max())
        e = np.exp(s - new)
        total = np.exp(m - new) * total + e.sum()
        out = np.exp(m - new) * out + e @ v
        m = new
    return out / total, m + np.log(total)


scores, values = 30 * rng.normal(size=50), rng.normal(size=(50, 3))
o, L = online(scores, values)
e = np.exp(scores - scores.max())
compare("output", o, e @ values / e.sum(), tol=1e-12)
compare("log-sum-exp", L, scores.max() + np.log(e.sum()), tol=1e-12)

# %% [markdown]
# ### First version: a row at a time
#
# A thread takes a row and walks over the keys before it in groups of 64:
# 64 dot products, 64 exponentials, 64 additions to the row of `out`, which
# holds $\omega$ until the end. The last group ends at the row's own
# position, which is the causal mask. Seen as (B·T, 3·NH, hs), `inp` has a
# position's query of head $h$ in slot $h$, its key in slot $NH + h$ and its
# value in slot $2 NH + h$.


# %% first version, one row
from llmnb.cpu.jit import kernel


@inner
def one_row(out, scores, qkv, row, h, NH, first, last, scale):
    """Row `row` of head h, over positions first to last: (1.8.12), (1.8.13)."""
    m, total = scores.dtype.type(-1e30), scores.dtype.type(0)
    y = out[row, h]
    for u in range(first, last, 64):
        n = min(64, last - u)
        new = m
        for j in range(n):
            dot = scores.dtype.type(0)
            for i in range(y.size):
                dot += qkv[row, h, i] * qkv[u + j, NH + h, i]
            scores[j] = dot * scale
            new = max(new, scores[j])
        factor, m = fast_exp(m - new), new
        total *= factor
        for i in range(y.size):
            y[i] *= factor
        for j in range(n):
            e = fast_exp(scores[j] - m)
            total += e
            for i in range(y.size):
                y[i] += e * qkv[u + j, 2 * NH + h, i]
    for i in range(y.size):
        y[i] /= total


# %% first version, all rows
@kernel
def all_rows(out, qkv, T):
    NH, hs = out.shape[1:]
    scale = out.dtype.type(1 / math.sqrt(hs))
    for row in numba.prange(out.shape[0]):
        scores, first = np.empty(64, out.dtype), row // T * T
        out[row] = 0
        for h in range(NH):
            one_row(out, scores, qkv, row, h, NH, first, row + 1, scale)


def first_version(out, lse, inp):
    NH, rows = lse.shape[1], inp.shape[0] * inp.shape[1]
    heads = out.reshape(rows, NH, -1)
    all_rows(heads, inp.reshape(rows, 3 * NH, -1), inp.shape[1])


reference.forward(out, lse, inp)
check = np.empty_like(out)
first_version(check, lse, inp)
compare("first version", check, out, tol=1e-12)

# %% [markdown]
# No square is stored, and the masked half is never computed. But the inner
# loops are as short as a head, each dot product ends with a sum across the
# lanes of a vector, for which such units are not made, and a key is loaded
# anew for every row.
#
# ### Second version: blocks of rows
#
# [Chapter 1.7](07_matmul.ipynb) has the cure, if we can say attention in
# matrix products. Take 96 rows at once, and the keys in groups of 96. The
# scores of such a block are a product, $S = Q K^\top$, and so is what
# the group adds to the output, $\Omega \mathrel{+}= E V$ with $E = e^{S -
# m}$. Between the two stands (1.8.12), for 96 rows. Everything that a block
# needs, 96 by 96 scores and a few panels, fits in the second-level cache of
# a core. Blocks right of the diagonal are skipped; in the blocks on the
# diagonal the masked scores are computed and then set to zero.
#
# We use the pieces of chapter 1.7: the routines that pack rows, pack columns
# and multiply panels, on flat arrays by offset and step. `code` holds their
# addresses.
# All scratch lies in the thread's own row of `work`, which the products of
# the linear layers use too, though not at the same time.

# %% imports of the kernels tags=["export"] module="cpu.attention"
import math

import numba
import numpy as np

from llmnb.cpu.jit import arguments, device, team
from llmnb.cpu.math import fast_exp
from llmnb.cpu.panels import (
    SPARE,
    WORK,
    check_bf16,
    multiply_panels,
    pack,
    scratch,
)
from llmnb.cpu.tile import COLS, ROWS
from llmnb.shapes import shapes

# %% [markdown]
# The places of the panels and tables in a thread's scratch. A panel takes
# whole tiles, so sizes are rounded up.

# %% places in the scratch memory tags=["exporti"] module="cpu.attention"
BLOCK = 96  # rows, and keys, that are taken at once
ZEROS = SPARE + ROWS * COLS  # in work: a row of zeros


def _places(block, hs):
    """Offsets in a thread's scratch of the panels and tables, and its end.

    Panels of rows: queries (later weights), gradients. Panels of columns:
    keys, values, their transposes. Tables: scores, their gradients, output.
    """
    tall, wide = (-(-block // n) * n for n in (ROWS, COLS))
    deep = max(block, hs)
    head = -(-hs // COLS) * COLS
    sizes = [tall * deep, wide * hs, wide * hs, head * block, head * block]
    sizes += [block * block, block * block, block * (hs + 2)]
    return tuple(int(n) for n in np.cumsum([0, *sizes]))


def _block_size(hs):
    """The largest block that fits."""
    block = BLOCK
    while block and _places(block, hs)[-1] > SPARE:
        block //= 2
    if not block:
        raise ValueError(f"attention: a head of {hs} channels is too wide")
    return block


# %% a product of two panels tags=["exporti"] module="cpu.attention"
@device
def _add_product(code, out, at, step, fresh, panels, a, b, sizes, w):
    """Add a product to the block of out that begins at `at`, or write it."""
    place, start = (at, step, at, step, 1, ZEROS, 0), out
    if fresh:
        place, start = (at, step, ZEROS, 0, 0, ZEROS, 0), w
    spare = w[SPARE:]
    multiply_panels(code[2], out, place, start, w, panels, a, b, sizes, spare)


# %% [markdown]
# The softmax of a block. `w` is the thread's scratch. Row `i` of the scores
# begins at `s + i * n`; its maximum and sum so far follow the table of
# outputs. A row sees `seen` of the block's keys, which on the diagonal is
# one more for each row.


# %% one row of the softmax tags=["exporti"] module="cpu.attention"
@device
def _softmax_row(scores, seen, top, scale):
    """Scores to exponentials; returns the new maximum and their sum."""
    total, largest = scores.dtype.type(0), scores[0]
    for j in range(seen):
        largest = max(largest, scores[j])
    top = max(top, largest * scale)
    for j in range(seen):
        scores[j] = fast_exp(scores[j] * scale - top)
        total += scores[j]
    scores[seen:] = 0
    return top, total


# %% the softmax of a block tags=["exporti"] module="cpu.attention"
@device
def _softmax_block(w, s, acc, first, rows, cols, n, hs, scale):
    """first: how many of the block's keys row 0 sees."""
    for i in range(rows):
        state, seen = acc + n * hs + 2 * i, min(cols, first + i)
        before, scores = w[state], w[s + i * n : s + i * n + cols]
        top, total = _softmax_row(scores, seen, before, scale)
        factor = fast_exp(before - top)
        w[state] = top
        w[state + 1] = w[state + 1] * factor + total
        out = w[acc + i * hs : acc + i * hs + hs]
        for k in range(hs):
            out[k] *= factor


# %% a block of rows, forward tags=["exporti"] module="cpu.attention"
@device
def _forward_block(out, lse, qkv, b, h, first, sizes, places, code, panels, w):
    T, NH, hs, n = sizes
    A, K, _, _, B, S, _, acc, _ = places
    C, rows = NH * hs, min(n, T - first)
    scale = w.dtype.type(1 / math.sqrt(hs))
    q = (b * T + first) * 3 * C + h * hs
    w[acc : acc + n * hs] = 0
    for i in range(rows):
        w[acc + n * hs + 2 * i] = -1e30
        w[acc + n * hs + 2 * i + 1] = 0
    for u in range(0, first + rows, n):
        cols, k = min(n, T - u), (b * T + u) * 3 * C + C + h * hs
        pack(code[0], panels, A, qkv, q, 3 * C, 1, rows, hs)
        pack(code[1], panels, K, qkv, k, 3 * C, 1, cols, hs)
        _add_product(code, w, S, n, True, panels, A, K, (rows, cols, hs), w)
        seen = first - u + 1
        _softmax_block(w, S, acc, seen, rows, cols, n, hs, scale)
        pack(code[0], panels, A, w, S, n, 1, rows, cols)
        pack(code[1], panels, B, qkv, k + C, 1, 3 * C, hs, cols)
        _add_product(
            code, w, acc, hs, False, panels, A, B, (rows, hs, cols), w
        )
    for i in range(rows):
        t, state = first + i, acc + n * hs + 2 * i
        lse[b, h, t] = w[state] + math.log(w[state + 1])
        y, total = (b * T + t) * C + h * hs, w[state + 1]
        row, sums = out[y : y + hs], w[acc + i * hs : acc + i * hs + hs]
        for k in range(hs):
            row[k] = sums[k] / total


# %% [markdown]
# A late block has more keys to read than an early one. Each thread takes
# every second block, or every third, as many as there are threads: long and
# short ones come out evenly, and which thread has a block changes nothing
# in it.


# %% the forward kernel tags=["exporti"] module="cpu.attention"
@team
def _attention_forward(part, parts, address):
    out, lse, qkv, sizes, places, code, panels, work = arguments(address)
    B, NH, T = lse.shape
    blocks = -(-T // sizes[3])
    w = work[part]
    w[ZEROS : ZEROS + COLS] = 0
    for unit in range(part, B * NH * blocks, parts):
        b, h = unit // (NH * blocks), unit // blocks % NH
        first = unit % blocks * sizes[3]
        _forward_block(
            *(out, lse, qkv, b, h, first),
            *(sizes, places, code, panels[part], w),
        )


# %% [markdown]
# The public function checks, and finds sizes, places and scratch memory.


# %% attention, forward tags=["export"] module="cpu.attention"
@shapes("B T C!, B NH|C T!, B T 3C", work=WORK)
def attention_forward(out, lse, inp, work=None, bf16=False):
    """Causal self-attention of NH heads.

    inp: (B, T, 3C), queries, keys and values along the last axis. Writes
    out (B, T, C) and lse (B, NH, T), the log-sum-exp of each row of scaled,
    masked scores, which the backward pass needs. All float32 or all float64
    and C-contiguous. work: scratch of work_shape() and the same dtype, or
    None to allocate it. bf16: round the factors of every product to
    bfloat16, for float32 only. Raises TypeError or ValueError before it
    computes anything.
    """
    check_bf16("attention_forward", bf16, inp.dtype)
    scratch = _scratch(out, lse, work, bf16)
    _attention_forward(out.reshape(-1), lse, inp.reshape(-1), *scratch)


# %% what both kernels take tags=["exporti"] module="cpu.attention"
def _scratch(out, lse, work, bf16):
    """T, NH, hs and the size of a block; places; chapter 1.7's scratch."""
    _, NH, T = lse.shape
    hs = out.shape[2] // NH
    block = _block_size(hs)
    made = scratch(work, bf16, out.dtype)
    return (T, NH, hs, block), _places(block, hs), *made


# %% [markdown]
# ### Backward in blocks
#
# Row $t$ of the triangle adds to $dq_t$ and to $dk_u$, $dv_u$ of every
# $u \le t$. If two threads shared a head, they would add to the same rows
# in an order that changes from run to run. So a thread takes a head whole,
# and the order is that of its loops. The price: no more threads can work
# than there are heads in the batch, $B \cdot NH$.
#
# For a block of rows and a block of keys, (1.8.6) to (1.8.10) are five products:
#
# $$ S = Q K^\top , \quad dE = dO\, V^\top , \quad
#    dV \mathrel{+}= E^\top dO , \quad dK \mathrel{+}= dS^\top Q , \quad
#    dQ \mathrel{+}= dS\, K , \tag{1.8.14} $$
#
# with $E = e^{S / \sqrt{hs} - L}$ and $dS = E \circ (dE - D) / \sqrt{hs}$ in
# between. A transpose costs nothing: packing takes the same table with its
# two steps exchanged.


# %% the softmax of a block, backward tags=["exporti"] module="cpu.attention"
@device
def _softmax_row_backward(scores, grads, seen, y, dy, L, scale):
    """Scores to weights, their gradients to dS; masked ones to 0."""
    D = scores.dtype.type(0)
    for k in range(y.size):
        D += y[k] * dy[k]
    for j in range(seen):
        scores[j] = fast_exp(scores[j] * scale - L)
        grads[j] = scores[j] * (grads[j] - D) * scale
    scores[seen:] = 0
    grads[seen:] = 0


# %% all rows of a block tags=["exporti"] module="cpu.attention"
@device
def _weights_block(w, S, dS, dout, out, lse, y, C, hs, n, seen, rows, cols):
    """y: where the block's rows begin in dout and out; lse: theirs."""
    scale = w.dtype.type(1 / math.sqrt(hs))
    for i in range(rows):
        at = y + i * C
        _softmax_row_backward(
            *(
                w[S + i * n : S + i * n + cols],
                w[dS + i * n : dS + i * n + cols],
            ),
            *(min(seen + i, cols), out[at : at + hs], dout[at : at + hs]),
            *(lse[i], scale),
        )


# %% the weights of a block tags=["exporti"] module="cpu.attention"
@device
def _backward_scores(
    dout, qkv, out, lse, q, y, seen, sizes, places, code, panels, w
):
    """S and dS of a block of rows; its keys and values are packed."""
    C, hs, n, rows, cols = sizes
    A, K, V, _, _, S, dS, _, _ = places
    shape = rows, cols, hs
    pack(code[0], panels, A, qkv, q, 3 * C, 1, rows, hs)
    _add_product(code, w, S, n, True, panels, A, K, shape, w)
    pack(code[0], panels, A, dout, y, C, 1, rows, hs)
    _add_product(code, w, dS, n, True, panels, A, V, shape, w)
    shape = hs, n, seen, rows, cols
    _weights_block(w, S, dS, dout, out, lse, y, C, *shape)


# %% the gradients of a block tags=["exporti"] module="cpu.attention"
@device
def _backward_sums(
    dqkv, dout, qkv, q, k, y, fresh, sizes, places, code, panels, w
):
    """The last three products of (1.8.14); fresh: of keys, of queries."""
    C, hs, n, rows, cols = sizes
    A, _, _, KT, B, S, dS, _, _ = places
    step, shape = 3 * C, (cols, hs, rows)
    pack(code[0], panels, A, w, S, 1, n, cols, rows)
    pack(code[1], panels, B, dout, y, 1, C, hs, rows)
    _add_product(code, dqkv, k + C, step, fresh[0], panels, A, B, shape, w)
    pack(code[0], panels, A, w, dS, 1, n, cols, rows)
    pack(code[1], panels, B, qkv, q, 1, step, hs, rows)
    _add_product(code, dqkv, k, step, fresh[0], panels, A, B, shape, w)
    pack(code[0], panels, A, w, dS, n, 1, rows, cols)
    shape = rows, hs, cols
    _add_product(code, dqkv, q, step, fresh[1], panels, A, KT, shape, w)


# %% a head, backward tags=["exporti"] module="cpu.attention"
@device
def _backward_head(
    dqkv, dout, qkv, out, lse, b, h, add, sizes, places, code, panels, w
):
    T, NH, hs, n = sizes
    _, K, V, KT, _, _, _, _, _ = places
    C = NH * hs
    for u in range(0, T, n):
        cols, k = min(n, T - u), (b * T + u) * 3 * C + C + h * hs
        pack(code[1], panels, K, qkv, k, 3 * C, 1, cols, hs)
        pack(code[1], panels, V, qkv, k + C, 3 * C, 1, cols, hs)
        pack(code[1], panels, KT, qkv, k, 1, 3 * C, hs, cols)
        for t in range(u, T, n):
            shape = C, hs, n, min(n, T - t), cols
            q, y = (b * T + t) * 3 * C + h * hs, (b * T + t) * C + h * hs
            L, seen = lse[b, h, t:], t - u + 1
            _backward_scores(
                *(dout, qkv, out, L, q, y, seen),
                *(shape, places, code, panels, w),
            )
            fresh = not add and t == u, not add and u == 0
            _backward_sums(
                *(dqkv, dout, qkv, q, k, y, fresh),
                *(shape, places, code, panels, w),
            )


# %% [markdown]
# A key block first meets the rows of its own block, and a row block first
# meets key block 0. With `add=False` the first meeting writes and the later
# ones add, so nobody has to clear the gradient before.


# %% the backward kernel tags=["exporti"] module="cpu.attention"
@team
def _attention_backward(part, parts, address):
    given = arguments(address)
    dqkv, dout, qkv, out, lse, add = given[:6]
    sizes, places, code, panels, work = given[6:]
    B, NH, T = lse.shape
    w = work[part]
    w[ZEROS : ZEROS + COLS] = 0
    for unit in range(part, B * NH, parts):
        b, h = unit // NH, unit % NH
        _backward_head(
            *(dqkv, dout, qkv, out, lse, b, h, add),
            *(sizes, places, code, panels[part], w),
        )


# %% attention, backward tags=["export"] module="cpu.attention"
@shapes("B T 3C!, B T C, B T 3C, B T C, B NH|C T", work=WORK)
def attention_backward(
    dinp, dout, inp, out, lse, add=True, work=None, bf16=False
):
    """Add attention's gradient to dinp.

    dinp, inp: (B, T, 3C). dout, out: (B, T, C). lse: (B, NH, T). out and
    lse are as the forward pass left them. All float32 or all float64 and
    C-contiguous. add: False overwrites dinp instead of adding. work, bf16:
    as in attention_forward. Raises TypeError or ValueError before it
    computes anything.
    """
    check_bf16("attention_backward", bf16, inp.dtype)
    scratch = _scratch(out, lse, work, bf16)
    flat = (x.reshape(-1) for x in (dinp, dout, inp, out))
    _attention_backward(*flat, lse, add, *scratch)


# %% [markdown]
# The verdicts: the problem of the proof in float64, then one in float32
# whose sizes divide nothing and whose rows span several blocks.

# %% the same gradient from the kernels
compare("dinp", gradient(attention_backward), dinp, tol=1e-12)


# %% a problem of any size
def problem(B, T, NH, hs, dtype=np.float32):
    p = SimpleNamespace()
    p.inp = rng.normal(size=(B, T, 3 * NH * hs)).astype(dtype)
    p.dinp = np.zeros_like(p.inp)
    p.dout = rng.normal(size=(B, T, NH * hs)).astype(dtype)
    p.out, p.lse = np.zeros_like(p.dout), np.zeros((B, NH, T), dtype)
    return p


def forward_and_backward(p, layer):
    layer.forward(p.out, p.lse, p.inp)
    layer.backward(p.dinp, p.dout, p.inp, p.out, p.lse)


# %% float32, odd sizes
cpu = SimpleNamespace(forward=attention_forward, backward=attention_backward)
p = problem(2, 151, 3, 17)
forward_and_backward(p, cpu)
got = {name: getattr(p, name).copy() for name in ("out", "lse", "dinp")}
p.dinp[...] = 0
forward_and_backward(p, reference)
for name in got:
    compare(name, got[name], getattr(p, name), tol=1e-5)

# %% one thread or all, the same bits
threads = numba.get_num_threads()
numba.set_num_threads(1)
p.dinp[...] = 0
forward_and_backward(p, cpu)
numba.set_num_threads(threads)
same = all(np.array_equal(getattr(p, name), got[name]) for name in got)
verdict("one thread", same, "gives the same bits")

# %% a number of heads that does not fit
try:
    attention_forward(p.out, np.zeros((2, 4, 151), np.float32), p.inp)
except ValueError as error:
    print(error)

# %% [markdown]
# And the time, at the shape of one layer of GPT-2 124M, for four sequences of
# 64 positions and for one of 1024.


# %% NumPy against the kernels tags=["nbval-ignore-output"]
def race(p):
    """Milliseconds of NumPy and of both versions."""
    rows = [("forward, NumPy", reference.forward, p.out, p.lse, p.inp)]
    rows += [("first version", first_version, p.out, p.lse, p.inp)]
    rows += [("second version", cpu.forward, p.out, p.lse, p.inp)]
    args = p.dinp, p.dout, p.inp, p.out, p.lse
    rows += [("backward, NumPy", reference.backward, *args)]
    rows += [("second version", cpu.backward, *args)]
    p.seconds = [fastest(f, *args, runs=5) for _, f, *args in rows]
    for (name, *_), seconds in zip(rows, p.seconds, strict=True):
        print(f"{name:<16} {seconds * 1e3:7.1f} ms")


print(f"{machine()}, {numba.get_num_threads()} threads")
for B, T in ((4, 64), (1, 1024)):
    print(f"B = {B}, T = {T}")
    long = problem(B, T, 12, 64)
    race(long)

# %% [markdown]
# At 1024 positions a square takes 50 MB, and NumPy moves it through memory
# many times; the kernels have no square. At 64 positions one block holds a
# whole head: half of its scores are computed to be set to zero.

# %% [markdown]
# ## On a GPU
#
# Attention gives a GPU plenty to do at once: $B \cdot NH$ heads that never
# meet, and in each of them $T$ rows that need nothing of one another. The
# CPU version was bound by arithmetic, because its blocks stay in a cache. On
# a GPU that is a goal to be reached. A block of threads may have 48 KB of
# *shared memory* ([chapter 3.1](../3_gpu/01_threads.ipynb)), and what does not fit there
# travels through global memory.
#
# No GPU has run this section yet. Its kernels are compiled for two
# generations, sm_80 and sm_90, and their tests read the machine code: no
# double precision, no registers spilled to memory. What they compute, and
# what they count, comes from the simulator. `llmnb bench --backend cuda
# --kernels` measures them where there is a GPU, and the results page shows
# it once measured.
#
# The functions below bear the names of the CPU's; those stay with us as
# `cpu.forward` and `cpu.backward`.

# %% imports of the GPU's kernels tags=["export"] module="cuda.attention"
import functools
import math

import numpy as np

from llmnb.gpu.launch import (
    DEVICE,
    aligned,
    device,
    empty,
    kernel,
    numbered,
)
from llmnb.gpu.simulator import cuda, load4, store4
from llmnb.gpu.warp import warp_max, warp_sum
from llmnb.shapes import shapes

# %% what a score is before one is seen tags=["exporti"] module="cuda.attention"
# exp makes 0 of it; and it is no infinity, which fastmath rules out
LOWEST = np.float32(-1e30)

# %% [markdown]
# ### Forward, version 1: three kernels and a square
#
# The shortest way to a GPU: one kernel for each of (1.8.1), (1.8.2) and (1.8.3).
# The first has a thread for each pair $(t, u)$. The second has a warp for
# each row, as in [chapter 1.6](06_layernorm.ipynb), and turns scores into
# weights in place. The third has a thread for each number of `out`. What
# passes between them is the square of scores, in scratch memory.


# %% version 1, scores tags=["exporti"] module="cuda.attention"
@kernel
def _attention_scores(att, inp, NH, scale):
    """A thread a pair (t, u): (1.8.1). att: (B * NH, T, T)."""
    heads, T, _ = att.shape
    hs = inp.shape[2] // (3 * NH)
    pair = cuda.grid(1)
    head, t, u = pair // (T * T), pair // T % T, pair % T
    if head < heads and u <= t:
        b, q = head // NH, head % NH * hs
        dot = np.float32(0)
        for i in range(q, q + hs):
            dot += inp[b, t, i] * inp[b, u, NH * hs + i]
        att[head, t, u] = dot * scale


# %% version 1, weights tags=["exporti"] module="cuda.attention"
@kernel
def _attention_softmax(att, lse):
    """A warp a row: (1.8.4), in place. lse: (B * NH, T)."""
    heads, T = lse.shape
    row, lane = cuda.grid(1) // 32, cuda.grid(1) % 32
    head, t = row // T, row % T
    if head < heads:
        top, total = LOWEST, np.float32(0)
        for u in range(lane, t + 1, 32):
            top = max(top, att[head, t, u])
        top = warp_max(top)
        for u in range(lane, t + 1, 32):
            total += math.exp(att[head, t, u] - top)
        total = warp_sum(total)
        for u in range(lane, t + 1, 32):
            att[head, t, u] = math.exp(att[head, t, u] - top) / total
        if lane == 0:
            lse[head, t] = top + math.log(total)


# %% version 1, means tags=["exporti"] module="cuda.attention"
@kernel
def _attention_means(out, att, inp, NH):
    """A thread a number of out: (1.8.3)."""
    B, T, C = out.shape
    place = cuda.grid(1)
    b, t, c = place // (T * C), place // C % T, place % C
    if b < B:
        head, mean = b * NH + c * NH // C, np.float32(0)
        for u in range(t + 1):
            mean += att[head, t, u] * inp[b, u, 2 * C + c]
        out[b, t, c] = mean


# %% version 1 tags=["exporti"] module="cuda.attention"
def _forward_unfused(out, lse, inp, work):
    """Scores, weights and means, one after the other."""
    B, NH, T = lse.shape
    hs = out.shape[2] // NH
    att, lse = work.reshape(B * NH, T, T), lse.reshape(B * NH, T)
    scale = np.float32(1 / math.sqrt(hs))
    _attention_scores[-(-att.size // 128), 128](att, inp, NH, scale)
    _attention_softmax[-(-lse.size // 4), 128](att, lse)
    _attention_means[-(-out.size // 128), 128](out, att, inp, NH)


# %% [markdown]
# The scratch is what the CPU version was built to avoid, and the batch of a
# GPU is larger. For 16 sequences of 1024 positions and the 12 heads of GPT-2
# 124M:

# %% the square on a GPU
B, T, NH, hs = 16, 1024, 12, 64
square = 4 * B * NH * T * T
print(f"{square:,} bytes of scratch, {square / (4 * B * T * 768):.0f}", end="")
print(" times the output of the layer")
print(f"{4 * hs / 16:.0f} operations a byte of traffic with the square")

# %% [markdown]
# The half below the diagonal is written by the first kernel, read and written
# by the second and read by the third: 16 bytes a pair $(t, u)$, where no
# cache helps. A pair takes $2\,hs$ operations for its score and as many for
# the output, which makes 16 a byte. By NVIDIA's data sheet an H100 computes
# 67 TFLOP/s in float32 and moves 3,350 GB/s, 20 operations for each byte:
# the square alone asks more of its memory than of its arithmetic.
#
# ### Forward, version 2: tiles and no square
#
# Online softmax, (1.8.12), lets one kernel do all three steps. A block of
# threads owns a *tile* of 16 queries of one head, which it copies to shared
# memory. Then it walks over the keys of the head, 16 at a time, up to the
# diagonal. Each step copies a tile of keys and one of values and takes
# 16 x 16 scores, one by each of 256 threads. Where a row's maximum grows it
# rescales what was summed, and adds the new values. This way of working is
# known as FlashAttention; see the further reading. The backward pass will
# walk too, so here are both walks.

# %% the tiles and the walks
from llmnb.book.owners import draw_owners

fig, axes = plt.subplots(1, 2, figsize=(7.4, 3.9), dpi=100)
tiles = range(5)
by_query = [[t if u <= t else -1 for u in tiles] for t in tiles]
by_key = [[u if u <= t else -1 for u in tiles] for t in tiles]
draw_owners(axes[0], by_query, "out and dq", rows="tiles of queries")
draw_owners(axes[1], by_key, "dk and dv")
walk = {"arrowstyle": "->", "color": PALETTE["ink"], "lw": 1.5}
for n in tiles:
    start, end = (0.1, n + 0.82), (n + 0.9, n + 0.82)
    axes[0].annotate("", end, start, arrowprops=walk)
    start, end = (n + 0.82, n + 0.1), (n + 0.82, 4.9)
    axes[1].annotate("", end, start, arrowprops=walk)
for ax in axes:
    ax.set_xlabel("tiles of keys")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.8.3. The scores of one head in tiles, each with the number of the
# tile that its block owns. Left, a block owns a tile of queries and walks to
# the right until the diagonal; right, it owns a tile of keys and walks down
# from the diagonal. Nobody visits the empty triangle, and every element of a
# result has one owner that sums along its arrow.*
#
# A row of scores lies in 16 neighbouring lanes, half a warp, and its maximum
# is found with four exchanges. Every lane of the row keeps the row's $m$; it
# sums $\ell$ over its own scores only, and the parts are added at the end.
# The first tile has key 0, which every query may read, so that from then on
# $m$ is a real score and a masked one has the weight 0.
#
# The size of a head is a constant of the kernel, so that shared memory and
# registers can be laid out when it is compiled. `functools.cache` keeps one
# kernel for each size. Rows in shared memory are an odd number of floats
# apart: 16 lanes that read the same channel of 16 keys then find them in 16
# different banks.


# %% version 2, copy and exchange tags=["exporti"] module="cuda.attention"
@device
def _copy_rows(tile, inp, b, first, col, hs):
    """Rows first.. of inp[b], hs columns from col on; zeros beyond T."""
    for e in range(cuda.threadIdx.x, 16 * hs, 256):
        r, i = e // hs, e % hs
        value = np.float32(0)
        if first + r < inp.shape[1]:
            value = inp[b, first + r, col + i]
        tile[r, i] = value


@device
def _lanes_max(value, lanes):
    """The largest value of 8 or 16 neighbouring lanes, in each of them."""
    for step in (8, 4, 2, 1):
        if step < lanes:
            value = max(value, cuda.shfl_xor_sync(0xFFFFFFFF, value, step))
    return value


@device
def _lanes_sum(value, lanes):
    """The sum of value over 8 or 16 neighbouring lanes, in each of them."""
    for step in (8, 4, 2, 1):
        if step < lanes:
            value += cuda.shfl_xor_sync(0xFFFFFFFF, value, step)
    return value


# %% version 2, scores and sums tags=["exporti"] module="cuda.attention"
@device
def _one_score(q, k, row, lane, hs):
    """The dot product of a query and a key."""
    dot = np.float32(0)
    for i in range(hs):
        dot += q[row, i] * k[lane, i]
    return dot


@device
def _add_values(sums, factor, weights, v, row, lane, hs):
    """(1.8.12) for this thread's channels: lane, lane + 16 and so on."""
    for n in range(len(sums)):
        i, mean = lane + 16 * n, sums[n] * factor
        if i < hs:
            for u in range(16):
                mean += weights[row, u] * v[u, i]
        sums[n] = mean


# %% version 2, the kernel tags=["exporti"] module="cuda.attention"
@functools.cache
def _flash_kernel(hs):
    STRIDE, PER = hs | 1, -(-hs // 16)

    @kernel(launch_bounds=256)
    def attention_forward_flash(out, lse, inp, NH, scale):
        T, C = lse.shape[1], NH * hs
        tiles = (T + 15) // 16
        head = cuda.blockIdx.x // tiles
        first = (tiles - 1 - cuda.blockIdx.x % tiles) * 16
        row, lane = cuda.threadIdx.x // 16, cuda.threadIdx.x % 16
        b, col, t = head // NH, head % NH * hs, first + row
        q = cuda.shared.array((16, STRIDE), np.float32)
        k = cuda.shared.array((16, STRIDE), np.float32)
        v = cuda.shared.array((16, STRIDE), np.float32)
        weights = cuda.shared.array((16, 17), np.float32)
        sums = cuda.local.array(PER, np.float32)
        for n in range(PER):
            sums[n] = np.float32(0)
        top, total = LOWEST, np.float32(0)
        _copy_rows(q, inp, b, first, col, hs)
        for start in range(0, first + 16, 16):
            cuda.syncthreads()
            _copy_rows(k, inp, b, start, C + col, hs)
            _copy_rows(v, inp, b, start, 2 * C + col, hs)
            cuda.syncthreads()
            s = _one_score(q, k, row, lane, hs) * scale
            s = s if start + lane <= t else LOWEST
            new = max(top, _lanes_max(s, 16))
            e, factor = math.exp(s - new), math.exp(top - new)
            weights[row, lane] = e
            top, total = new, total * factor + e
            cuda.syncwarp()
            _add_values(sums, factor, weights, v, row, lane, hs)
        total = _lanes_sum(total, 16)
        if t < T:
            for n in range(PER):
                if lane + 16 * n < hs:
                    out[b, t, col + lane + 16 * n] = sums[n] / total
            if lane == 0:
                lse[head, t] = top + math.log(total)

    return attention_forward_flash


# %% [markdown]
# Two kinds of barriers: all threads wait before a tile is overwritten and
# after it is written, but a row's weights are written and read by lanes of
# one warp, so there the warp's own barrier is enough. The last queries have
# the longest walk. CUDA promises no order among blocks; in case they start
# in the order of their numbers, those of the last queries have the first
# ones, and short walks fill the end.


# %% version 2 tags=["exporti"] module="cuda.attention"
def _forward_flash(out, lse, inp, work):
    """A block for 16 queries, a thread a score."""
    B, NH, T = lse.shape
    hs = out.shape[2] // NH
    scale = np.float32(1 / math.sqrt(hs))
    grid = B * NH * -(-T // 16)
    lse = lse.reshape(B * NH, T)
    _flash_kernel(hs)[grid, 256](out, lse, inp, NH, scale)


# %% [markdown]
# ### Forward, version 3: tiles in registers
#
# In version 2 every product of two numbers reads both of them from shared
# memory. [Chapter 1.7](07_matmul.ipynb) met the same, and the cure is the
# same: a thread takes a small tile of the result in registers. Here 128
# threads stand in 16 rows of 8 and share 64 queries and 32 keys. Row $r$ of
# them owns queries $r, r + 16, r + 32, r + 48$, and lane $l$ of a row keys
# $l, l + 8, l + 16, l + 24$. With 4 queries and 4 keys a thread, 8 numbers
# read serve 16 products. And it reads four channels at once, with `load4`.

# %% which thread owns which scores
fig, ax = plt.subplots(figsize=(5.6, 6.0), dpi=100)
who = [[8 * (t % 16) + u % 8 for u in range(16)] for t in range(18)]
draw_owners(ax, who, group=32, rows="queries", cols="keys")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.8.4. A corner of a block's 64 x 32 scores, each with the number of
# its thread, coloured by warp. A thread's scores stand 16 queries and 8 keys
# apart; the eight threads of a row of scores share a warp, so that its
# maximum takes three exchanges and no barrier of the block.*
#
# The plan of shared memory, of which a block may have 48 KB, at $hs = 64$:
#
# | tile | rows | floats a row | bytes |
# |---|---|---|---|
# | queries | 64 | 68 | 17,408 |
# | keys | 32 | 68 | 8,704 |
# | values | 32 | 68 | 8,704 |
# | weights | 64 | 40 | 10,240 |
# | all | | | 45,056 |
#
# Why 68? Eight lanes read four floats each from eight neighbouring keys. A
# row of 64 would put all of them into the same four banks; with four more
# each row begins four banks further, and the eight lanes meet all 32 banks
# once. Other heads are padded with zeros up to a multiple of 32 channels,
# and then by four. The weights' rows are 40 apart for a like reason: the
# four rows that a warp writes begin 8 banks apart.
#
# For heads of more than 64 channels a thread takes 2 queries and 2 keys
# instead of 4 and 4; that fits up to 128 channels.
#
# Four pieces serve forward and backward alike. $G$ is how many rows of
# threads there are, and $R$ how many rows, and how many columns, of a tile a
# thread takes. The first piece copies a tile to shared memory. Where $hs$ is
# a multiple of 4 and the array begins at a multiple of 16 bytes, so does
# every row of a head, and `FOURS` is true: then it reads vectors of four,
# otherwise float by float. In shared memory every row is aligned;
# `alignment=16` asks for that.


# %% copy a tile tags=["exporti"] module="cuda.attention"
def _side(hs):
    """R: the rows, and the columns, of a tile that a thread takes."""
    return 4 if hs <= 64 else 2


def _stride(hs):
    """Floats from one row of a head to the next in shared memory."""
    return -(-hs // 32) * 32 + 4


@functools.cache
def _tile_copy(hs, FOURS):
    """copy(tile, x, at, step, first, T): rows first.. of a head to shared.

    x is flat, row r begins at `at + r * step`; zeros beyond T and hs.
    """
    QUADS, STRIDE = -(-hs // 32) * 8, _stride(hs)

    @device
    def copy(tile, x, at, step, first, T):
        for e in range(cuda.threadIdx.x, len(tile) * QUADS, cuda.blockDim.x):
            row, col = e // QUADS, e % QUADS * 4
            i = at + (first + row) * step + col
            a = b = c = d = np.float32(0)
            if first + row < T and col < hs:
                if FOURS:
                    a, b, c, d = load4(x, i)
                else:
                    a = x[i]
                    b = x[i + 1] if col + 1 < hs else np.float32(0)
                    c = x[i + 2] if col + 2 < hs else np.float32(0)
                    d = x[i + 3] if col + 3 < hs else np.float32(0)
            store4(tile, row * STRIDE + col, a, b, c, d)

    return copy


# %% [markdown]
# The second piece takes the scores of a tile, or anything that is a product
# of rows with rows. The third multiplies weights with a tile and adds to
# sums, $\Omega \mathrel{+}= E V$; a thread sums for its $R$ rows, and for
# channels $4l$ to $4l + 3$ of every 32. The fourth writes the sums.


# %% products of rows with rows tags=["exporti"] module="cuda.attention"
@functools.cache
def _tile_dots(hs, G, R):
    """dots(s, one, two): s = dot products of R rows of one, R of two."""
    STRIDE, LENGTH = _stride(hs), 4 * R

    @device
    def dots(s, one, two):
        row, lane = cuda.threadIdx.x // 8, cuda.threadIdx.x % 8
        y = cuda.local.array(LENGTH, np.float32)
        for n in range(R * R):
            s[n] = np.float32(0)
        for i in range(0, hs, 4):
            for j in range(R):
                a, b, c, d = load4(two, (lane + 8 * j) * STRIDE + i)
                y[4 * j], y[4 * j + 1] = a, b
                y[4 * j + 2], y[4 * j + 3] = c, d
            for r in range(R):
                a, b, c, d = load4(one, (row + G * r) * STRIDE + i)
                for j in range(R):
                    dot = s[R * r + j] + a * y[4 * j]
                    dot += b * y[4 * j + 1]
                    dot += c * y[4 * j + 2]
                    s[R * r + j] = dot + d * y[4 * j + 3]

    return dots


# %% products of weights with rows tags=["exporti"] module="cuda.attention"
@functools.cache
def _tile_add(hs, G, R):
    """add(sums, weights, tile): sums += weights @ tile, 8 * R rows of it."""
    PARTS, STRIDE = -(-hs // 32), _stride(hs)
    WIDTH, LENGTH = 8 * R + 8, 4 * R

    @device
    def add(sums, weights, tile):
        row, lane = cuda.threadIdx.x // 8, cuda.threadIdx.x % 8
        w = cuda.local.array(LENGTH, np.float32)
        for u in range(0, 8 * R, 4):
            for r in range(R):
                a, b, c, d = load4(weights, (row + G * r) * WIDTH + u)
                w[r], w[R + r], w[2 * R + r], w[3 * R + r] = a, b, c, d
            for v in range(4):
                for n in range(PARTS):
                    at = (u + v) * STRIDE + 32 * n + 4 * lane
                    a, b, c, d = load4(tile, at)
                    for r in range(R):
                        e, k = w[R * v + r], 4 * (PARTS * r + n)
                        sums[k] += e * a
                        sums[k + 1] += e * b
                        sums[k + 2] += e * c
                        sums[k + 3] += e * d

    return add


# %% write the sums tags=["exporti"] module="cuda.attention"
@functools.cache
def _tile_write(hs, G, R, FOURS):
    """write(x, sums, at, step, first, T, more): rows first.. of a head.

    more: whether to add to what x holds.
    """
    PARTS = -(-hs // 32)

    @device
    def write(x, sums, at, step, first, T, more):
        row, lane = cuda.threadIdx.x // 8, cuda.threadIdx.x % 8
        for r in range(R):
            for n in range(PARTS):
                t, col = first + row + G * r, 32 * n + 4 * lane
                i, k = at + t * step + col, 4 * (PARTS * r + n)
                if FOURS and t < T and col < hs:
                    a = b = c = d = np.float32(0)
                    if more:
                        a, b, c, d = load4(x, i)
                    a, b = a + sums[k], b + sums[k + 1]
                    c, d = c + sums[k + 2], d + sums[k + 3]
                    store4(x, i, a, b, c, d)
                for m in range(4):
                    if not FOURS and t < T and col + m < hs:
                        old = x[i + m] if more else np.float32(0)
                        x[i + m] = old + sums[k + m]

    return write


# %% [markdown]
# Between the products stands (1.8.12), for the $R$ rows of a thread.


# %% the softmax of a tile tags=["exporti"] module="cuda.attention"
@functools.cache
def _tile_softmax(hs, G, R):
    """softmax(weights, sums, s, top, total, first, start, scale): (1.8.12).

    first, start: the tile's first query and first key.
    """
    PER = -(-hs // 32) * 4

    @device
    def softmax(weights, sums, s, top, total, first, start, scale):
        row, lane = cuda.threadIdx.x // 8, cuda.threadIdx.x % 8
        for r in range(R):
            new = top[r]
            for j in range(R):
                seen = start + lane + 8 * j <= first + row + G * r
                s[R * r + j] = s[R * r + j] * scale if seen else LOWEST
                new = max(new, s[R * r + j])
            new = _lanes_max(new, 8)
            factor = math.exp(top[r] - new)
            top[r], total[r] = new, total[r] * factor
            for j in range(R):
                e = math.exp(s[R * r + j] - new)
                weights[row + G * r, lane + 8 * j] = e
                total[r] += e
            for n in range(PER):
                sums[PER * r + n] *= factor

    return softmax


# %% the end of the rows tags=["exporti"] module="cuda.attention"
@functools.cache
def _tile_finish(hs, G, R):
    """finish(lse, head, sums, top, total, first): (1.8.13)."""
    PER = -(-hs // 32) * 4

    @device
    def finish(lse, head, sums, top, total, first):
        row, lane = cuda.threadIdx.x // 8, cuda.threadIdx.x % 8
        for r in range(R):
            t, whole = first + row + G * r, _lanes_sum(total[r], 8)
            for n in range(PER):
                sums[PER * r + n] /= whole
            if lane == 0 and t < lse.shape[1]:
                lse[head, t] = top[r] + math.log(whole)

    return finish


# %% version 3, the kernel tags=["exporti"] module="cuda.attention"
@functools.cache
def _forward_kernel(hs, FOURS):
    R, STRIDE = _side(hs), _stride(hs)
    ROWS, COLS, WIDTH = 16 * R, 8 * R, 8 * R + 8
    SUMS, PAIRS = R * (STRIDE // 8), R * R
    copy, write = _tile_copy(hs, FOURS), _tile_write(hs, 16, R, FOURS)
    dots, add = _tile_dots(hs, 16, R), _tile_add(hs, 16, R)
    softmax, finish = _tile_softmax(hs, 16, R), _tile_finish(hs, 16, R)

    @kernel(launch_bounds=128)
    def attention_forward_tiles(out, lse, inp, NH, scale):
        T, C = lse.shape[1], NH * hs
        tiles = (T + ROWS - 1) // ROWS
        head = cuda.blockIdx.x // tiles
        first = (tiles - 1 - cuda.blockIdx.x % tiles) * ROWS
        y = head // NH * T * C + head % NH * hs
        x = head // NH * T * 3 * C + head % NH * hs
        q = cuda.shared.array((ROWS, STRIDE), np.float32, alignment=16)
        k = cuda.shared.array((COLS, STRIDE), np.float32, alignment=16)
        v = cuda.shared.array((COLS, STRIDE), np.float32, alignment=16)
        weights = cuda.shared.array((ROWS, WIDTH), np.float32, alignment=16)
        sums = cuda.local.array(SUMS, np.float32)
        s = cuda.local.array(PAIRS, np.float32)
        top = cuda.local.array(R, np.float32)
        total = cuda.local.array(R, np.float32)
        for n in range(SUMS):
            sums[n] = np.float32(0)
        for r in range(R):
            top[r], total[r] = LOWEST, np.float32(0)
        copy(q, inp, x, 3 * C, first, T)
        for start in range(0, min(first + ROWS, T), COLS):
            cuda.syncthreads()
            copy(k, inp, x + C, 3 * C, start, T)
            copy(v, inp, x + 2 * C, 3 * C, start, T)
            cuda.syncthreads()
            dots(s, q, k)
            softmax(weights, sums, s, top, total, first, start, scale)
            cuda.syncwarp()
            add(sums, weights, v)
        finish(lse, head, sums, top, total, first)
        write(out, sums, y, C, first, T, 0)

    return attention_forward_tiles


# %% version 3 tags=["exporti"] module="cuda.attention"
def _forward_tiles(out, lse, inp, work):
    """A block for 64 queries, 4 queries and 4 keys a thread."""
    B, NH, T = lse.shape
    hs = out.shape[2] // NH
    scale = np.float32(1 / math.sqrt(hs))
    grid = B * NH * -(-T // (16 * _side(hs)))
    tiles = _forward_kernel(hs, hs % 4 == 0 and aligned(out, inp))
    out, inp, lse = out.reshape(-1), inp.reshape(-1), lse.reshape(B * NH, T)
    tiles[grid, 128](out, lse, inp, NH, scale)


# %% [markdown]
# Rows of the last tile that lie beyond $T$ are zeros, compute something
# finite, and are not written. The public function checks, finds the scratch
# and calls a version. Versions 2 and 3 take heads of at most 128 channels.


# %% the versions of forward tags=["export"] module="cuda.attention"
# the square in memory; tiles in shared memory; tiles in registers as well
ATTENTION_FORWARD = (_forward_unfused, _forward_flash, _forward_tiles)
WIDEST_HEAD = 128  # channels of a head; only version 1 takes more


# %% the checks on a GPU tags=["exporti"] module="cuda.attention"
def _sizes(name, lse, C, version):
    """B, T and NH; raise for what the kernels cannot take."""
    B, NH, T = lse.shape
    if not lse.size:
        raise ValueError(f"{name}: lse must not be empty, got {lse.shape}")
    if version > 1 and C // NH > WIDEST_HEAD:
        raise ValueError(
            f"{name}: a head of {C // NH} channels is too wide for version "
            f"{version}, which takes {WIDEST_HEAD}; version 1 takes any"
        )
    return B, T, NH


# %% scratch tags=["export"] module="cuda.attention"
def attention_scratch(B, T, NH, forward=3, backward=2):
    """How many floats of `work` attention wants, for both passes.

    forward, backward: their versions; 0 for a pass that will not run.
    """
    square, row = B * NH * T * T, B * NH * T
    return max(
        (0, square, 0, 0)[forward], (0, 2 * square + row, row)[backward]
    )


# %% find the scratch tags=["exporti"] module="cuda.attention"
def _find_work(name, work, count, like):
    """`count` floats of work, which is allocated where it is None."""
    if work is None:
        return empty(count, like=like) if count else None
    if work.size < count:
        raise ValueError(
            f"{name}: work must hold {count} floats, got {work.size}"
        )
    return work[:count]


# %% attention, forward tags=["export"] module="cuda.attention"
@shapes("B T C!, B NH|C T!, B T 3C, W!?", DEVICE)
def attention_forward(out, lse, inp, work=None, version=3):
    """Causal self-attention of NH heads.

    inp: (B, T, 3C), queries, keys and values along the last axis. Writes
    out (B, T, C) and lse (B, NH, T), the log-sum-exp of each row of scaled,
    masked scores, which the backward pass needs. All float32 on a device.
    work: scratch of attention_scratch() floats, or None to allocate it.
    version: 1 keeps the scores in memory, 2 and 3 take heads of up to 128
    channels and need no scratch. Raises TypeError or ValueError before it
    launches anything.
    """
    name = "attention_forward"
    run = numbered(ATTENTION_FORWARD, version, name)
    sizes = _sizes(name, lse, out.shape[2], version)
    count = attention_scratch(*sizes, version, 0)
    run(out, lse, inp, _find_work(name, work, count, inp))


# %% [markdown]
# The verdicts, at sizes that divide no tile: 37 positions, heads of 5 and of
# 12 channels.

# %% forward against NumPy
from llmnb.gpu.launch import simulated, to_device, to_host


def on_gpu(p, version, place=to_device):
    """out and lse of a problem, as one version computes them."""
    there = place(p.out), place(p.lse)
    attention_forward(*there, place(p.inp), version=version)
    return [to_host(x) for x in there]


for hs in (5, 12):
    p = problem(1, 37, 2, hs)
    reference.forward(p.out, p.lse, p.inp)
    for version in (1, 2, 3):
        out, lse = on_gpu(p, version)
        compare(f"{version}: out", out, p.out, tol=1e-5)
        compare(f"{version}: lse", lse, p.lse, tol=1e-5)

# %% [markdown]
# And the counts, on the simulator, for one head of 32 channels and 64
# positions: requests of whole warps and sectors of global memory, requests
# and passes of shared memory, all defined in [chapter 3.1](../3_gpu/01_threads.ipynb).

# %% forward, counted
from llmnb.gpu.simulator import RaceError, watch


def count(run, versions, what):
    """Print what `watch` sees of each version."""
    print("version", *(f"{name:>16}" for name in what))
    for version in versions:
        with watch() as seen:
            run(version)
        print(f"{version:7}", *(f"{getattr(seen, k):16,}" for k in what))


p = problem(1, 64, 1, 32)
what = "requests", "sectors", "shared_requests", "shared_passes"
count(lambda version: on_gpu(p, version, simulated), (1, 2, 3), what)

# %% [markdown]
# Version 2 touches a small part of version 1's sectors. (The count knows no
# caches: a sector counts each time a warp asks for it.) It pays with shared
# memory, two reads for each product. Version 3 asks shared memory a ninth as
# often. But a request for four floats a lane takes four passes, so
# compare the passes: fewer than half. A larger tile a thread would need
# fewer still, and more registers. At $hs = 64$ a thread already takes more
# than half of the 255 that it may have.
#
# What a block reads for its tile of queries grows with the tile. At
# $T = 1024$ and $hs = 64$ a head has 1 MB of queries, keys, values and
# outputs, and its keys and values are read again by each block after them:

# %% keys and values read by the blocks of a head
T, hs = 1024, 64
for tile in (16, 64):
    rows = sum(range(tile, T + 1, tile))
    print(f"tiles of {tile} queries: {2 * 4 * hs * rows / 1e6:5.1f} MB")

# %% [markdown]
# Four times the queries in a tile, about a quarter of the reads.
#
# ### Backward, version 1: the square, twice
#
# As before, a kernel for each step, and what passes between them in scratch
# memory. A warp for each row of each head takes $D_t$, (1.8.9). A thread for
# each pair takes the weight $a_{tu}$ and $ds_{tu}$, (1.8.4), (1.8.6) and (1.8.8).
# Then a thread for each number of $dq$ sums over keys, and one for each
# number of $dk$ and $dv$ over queries.


# %% the dot products of the rows tags=["exporti"] module="cuda.attention"
@kernel
def _attention_rows(D, dout, out, NH):
    """A warp a row of a head: (1.8.9). D: (B * NH, T)."""
    B, T, C = out.shape
    row, lane = cuda.grid(1) // 32, cuda.grid(1) % 32
    b, t, h = row // (T * NH), row // NH % T, row % NH
    hs = C // NH
    if b < B:
        total = np.float32(0)
        for i in range(h * hs + lane, h * hs + hs, 32):
            total += dout[b, t, i] * out[b, t, i]
        total = warp_sum(total)
        if lane == 0:
            D[b * NH + h, t] = total


# %% version 1, the scores' gradients tags=["exporti"] module="cuda.attention"
@kernel
def _attention_pairs(att, ds, dout, inp, lse, D, NH, scale):
    """A thread a pair (t, u): its weight, and the gradient of its score."""
    heads, T, _ = att.shape
    C = dout.shape[2]
    hs = C // NH
    pair = cuda.grid(1)
    head, t, u = pair // (T * T), pair // T % T, pair % T
    if head < heads and u <= t:
        b, q = head // NH, head % NH * hs
        s, da = np.float32(0), np.float32(0)
        for i in range(q, q + hs):
            s += inp[b, t, i] * inp[b, u, C + i]
            da += dout[b, t, i] * inp[b, u, 2 * C + i]
        a = np.float32(math.exp(s * scale - lse[head, t]))
        att[head, t, u] = a
        ds[head, t, u] = a * (da - D[head, t]) * scale


# %% version 1, queries tags=["exporti"] module="cuda.attention"
@kernel
def _attention_dq(dinp, ds, inp, NH, add):
    """A thread a number of dq: (1.8.10)."""
    B, T, C = inp.shape[0], inp.shape[1], inp.shape[2] // 3
    place = cuda.grid(1)
    b, t, c = place // (T * C), place // C % T, place % C
    if b < B:
        head, dq = b * NH + c * NH // C, np.float32(0)
        if add:
            dq = dinp[b, t, c]
        for u in range(t + 1):
            dq += ds[head, t, u] * inp[b, u, C + c]
        dinp[b, t, c] = dq


# %% version 1, keys and values tags=["exporti"] module="cuda.attention"
@kernel
def _attention_dk_dv(dinp, att, ds, dout, inp, NH, add):
    """A thread a number of dk and its twin of dv: (1.8.10), (1.8.5)."""
    B, T, C = dout.shape
    place = cuda.grid(1)
    b, u, c = place // (T * C), place // C % T, place % C
    if b < B:
        head, dk, dv = b * NH + c * NH // C, np.float32(0), np.float32(0)
        if add:
            dk, dv = dinp[b, u, C + c], dinp[b, u, 2 * C + c]
        for t in range(u, T):
            dk += ds[head, t, u] * inp[b, t, c]
            dv += att[head, t, u] * dout[b, t, c]
        dinp[b, u, C + c], dinp[b, u, 2 * C + c] = dk, dv


# %% backward, version 1 tags=["exporti"] module="cuda.attention"
def _backward_unfused(dinp, dout, inp, out, lse, add, work):
    """A kernel a step, with two squares between them."""
    B, NH, T = lse.shape
    heads, square = B * NH, B * NH * T * T
    scale = np.float32(1 / math.sqrt(out.shape[2] // NH))
    att = work[:square].reshape(heads, T, T)
    ds = work[square : 2 * square].reshape(heads, T, T)
    D, lse = work[2 * square :].reshape(heads, T), lse.reshape(heads, T)
    _attention_rows[-(-lse.size // 4), 128](D, dout, out, NH)
    _attention_pairs[-(-square // 128), 128](
        att, ds, dout, inp, lse, D, NH, scale
    )
    grid = -(-out.size // 128)
    _attention_dq[grid, 128](dinp, ds, inp, NH, add)
    _attention_dk_dv[grid, 128](dinp, att, ds, dout, inp, NH, add)


# %% [markdown]
# ### Backward, version 2: two walks
#
# $dq_t$ is a sum over keys; $dk_u$ and $dv_u$ are sums over queries. The two
# want different owners, as in the two halves of figure 1.8.3. Could a block
# that owns keys add to $dq$ on its way? Here is that in small, a block for
# each key and a thread for each channel:


# %% a block for each key adds to dq
@kernel
def dq_by_key(dq, ds, k):
    u, i = cuda.blockIdx.x, cuda.threadIdx.x
    for t in range(u, dq.shape[0]):
        dq[t, i] += ds[t, u] * k[u, i]


small = [rng.normal(size=(3, n)).astype(np.float32) for n in (4, 3, 4)]
with watch():
    try:
        dq_by_key[3, 4](*map(simulated, small))
        caught = False
    except RaceError as error:
        print(error)
        caught = True
verdict("the race", caught, "is caught")

# %% [markdown]
# Other blocks add to the same numbers at the same time, and some of what
# they add is lost. Atomic additions would lose nothing, but their order, and
# with it the last bits, would change from run to run. So we walk twice: one
# kernel owns tiles of keys and walks down, for $dk$ and $dv$, and another
# owns tiles of queries and walks to the right, for $dq$. The price is that
# both take the products $S$ and $dE$ of (1.8.14): seven in all instead of
# five. It buys that every number has one owner, which sums in one order.
#
# The pieces of the forward pass do the work, now for blocks of 64 threads in
# 8 rows of 8, which take 32 queries and 32 keys ($G = 8$, $R = 4$). In the
# first kernel the *rows* of a tile are keys and its columns queries, so its
# scores are transposed: $E^\top$ and $dS^\top$ stand in shared memory ready
# for $dV \mathrel{+}= E^\top dO$ and $dK \mathrel{+}= dS^\top Q$. Four tiles
# of 32 rows and one of 32 x 40 weights take 39,936 bytes at $hs = 64$. The
# weights' tile serves twice: $E^\top$ first, and once the warp has read it,
# $dS^\top$. Its rows again belong to one warp each, whose barrier is enough.


# %% weights and gradients of a tile tags=["exporti"] module="cuda.attention"
@functools.cache
def _tile_gradients(R, BY_KEY):
    """gradients(s, ds, lse, D, head, first, start, scale): (1.8.4), (1.8.8).

    s, ds hold dot products of a tile; they become weights and gradients of
    scores. BY_KEY: whether its rows, from `first` on, are keys and its
    columns, from `start` on, queries; else the other way.
    """

    @device
    def gradients(s, ds, lse, D, head, first, start, scale):
        row, lane = cuda.threadIdx.x // 8, cuda.threadIdx.x % 8
        T = lse.shape[1]
        for r in range(R):
            for j in range(R):
                t, u = first + row + 8 * r, start + lane + 8 * j
                if BY_KEY:
                    t, u = u, t
                a = d = np.float32(0)
                if u <= t and t < T:
                    a = math.exp(s[R * r + j] * scale - lse[head, t])
                    d = a * (ds[R * r + j] - D[head, t]) * scale
                s[R * r + j], ds[R * r + j] = a, d

    return gradients


# %% hand numbers to the warp tags=["exporti"] module="cuda.attention"
@functools.cache
def _tile_share(R):
    """share(weights, s): a thread's R * R numbers to shared memory."""

    @device
    def share(weights, s):
        row, lane = cuda.threadIdx.x // 8, cuda.threadIdx.x % 8
        cuda.syncwarp()  # whoever still reads the last ones
        for r in range(R):
            for j in range(R):
                weights[row + 8 * r, lane + 8 * j] = s[R * r + j]
        cuda.syncwarp()

    return share


# %% walk over queries tags=["exporti"] module="cuda.attention"
@functools.cache
def _keys_kernel(hs, FOURS):
    R, STRIDE = _side(hs), _stride(hs)
    ROWS, WIDTH = 8 * R, 8 * R + 8
    SUMS, PAIRS = R * (STRIDE // 8), R * R
    copy, write = _tile_copy(hs, FOURS), _tile_write(hs, 8, R, FOURS)
    dots, add = _tile_dots(hs, 8, R), _tile_add(hs, 8, R)
    gradients, share = _tile_gradients(R, True), _tile_share(R)

    @kernel(launch_bounds=64)
    def attention_backward_keys(dinp, dout, inp, lse, D, NH, scale, more):
        T, C = lse.shape[1], NH * hs
        tiles = (T + ROWS - 1) // ROWS
        head = cuda.blockIdx.x // tiles
        first = cuda.blockIdx.x % tiles * ROWS
        y = head // NH * T * C + head % NH * hs
        x = head // NH * T * 3 * C + head % NH * hs
        k = cuda.shared.array((ROWS, STRIDE), np.float32, alignment=16)
        v = cuda.shared.array((ROWS, STRIDE), np.float32, alignment=16)
        q = cuda.shared.array((ROWS, STRIDE), np.float32, alignment=16)
        do = cuda.shared.array((ROWS, STRIDE), np.float32, alignment=16)
        weights = cuda.shared.array((ROWS, WIDTH), np.float32, alignment=16)
        dk = cuda.local.array(SUMS, np.float32)
        dv = cuda.local.array(SUMS, np.float32)
        s = cuda.local.array(PAIRS, np.float32)
        ds = cuda.local.array(PAIRS, np.float32)
        for n in range(SUMS):
            dk[n] = dv[n] = np.float32(0)
        copy(k, inp, x + C, 3 * C, first, T)
        copy(v, inp, x + 2 * C, 3 * C, first, T)
        for start in range(first, T, ROWS):
            cuda.syncthreads()
            copy(q, inp, x, 3 * C, start, T)
            copy(do, dout, y, C, start, T)
            cuda.syncthreads()
            dots(s, k, q)
            dots(ds, v, do)
            gradients(s, ds, lse, D, head, first, start, scale)
            share(weights, s)
            add(dv, weights, do)
            share(weights, ds)
            add(dk, weights, q)
        write(dinp, dk, x + C, 3 * C, first, T, more)
        write(dinp, dv, x + 2 * C, 3 * C, first, T, more)

    return attention_backward_keys


# %% [markdown]
# The second kernel keeps half as many sums. `launch_bounds=(64, 5)` asks the
# compiler to leave room for five of its blocks on a multiprocessor: 65,536
# registers for 320 threads are 204 each.


# %% walk over keys tags=["exporti"] module="cuda.attention"
@functools.cache
def _queries_kernel(hs, FOURS):
    R, STRIDE = _side(hs), _stride(hs)
    ROWS, WIDTH = 8 * R, 8 * R + 8
    SUMS, PAIRS = R * (STRIDE // 8), R * R
    copy, write = _tile_copy(hs, FOURS), _tile_write(hs, 8, R, FOURS)
    dots, add = _tile_dots(hs, 8, R), _tile_add(hs, 8, R)
    gradients, share = _tile_gradients(R, False), _tile_share(R)

    @kernel(launch_bounds=(64, 5))
    def attention_backward_queries(dinp, dout, inp, lse, D, NH, scale, more):
        T, C = lse.shape[1], NH * hs
        tiles = (T + ROWS - 1) // ROWS
        head = cuda.blockIdx.x // tiles
        first = (tiles - 1 - cuda.blockIdx.x % tiles) * ROWS
        y = head // NH * T * C + head % NH * hs
        x = head // NH * T * 3 * C + head % NH * hs
        q = cuda.shared.array((ROWS, STRIDE), np.float32, alignment=16)
        do = cuda.shared.array((ROWS, STRIDE), np.float32, alignment=16)
        k = cuda.shared.array((ROWS, STRIDE), np.float32, alignment=16)
        v = cuda.shared.array((ROWS, STRIDE), np.float32, alignment=16)
        weights = cuda.shared.array((ROWS, WIDTH), np.float32, alignment=16)
        dq = cuda.local.array(SUMS, np.float32)
        s = cuda.local.array(PAIRS, np.float32)
        ds = cuda.local.array(PAIRS, np.float32)
        for n in range(SUMS):
            dq[n] = np.float32(0)
        copy(q, inp, x, 3 * C, first, T)
        copy(do, dout, y, C, first, T)
        for start in range(0, min(first + ROWS, T), ROWS):
            cuda.syncthreads()
            copy(k, inp, x + C, 3 * C, start, T)
            copy(v, inp, x + 2 * C, 3 * C, start, T)
            cuda.syncthreads()
            dots(s, q, k)
            dots(ds, do, v)
            gradients(s, ds, lse, D, head, first, start, scale)
            share(weights, ds)
            add(dq, weights, k)
        write(dinp, dq, x, 3 * C, first, T, more)

    return attention_backward_queries


# %% backward, version 2 tags=["exporti"] module="cuda.attention"
def _backward_tiles(dinp, dout, inp, out, lse, add, work):
    """The rows' D, then a walk for dk and dv and a walk for dq."""
    B, NH, T = lse.shape
    hs = out.shape[2] // NH
    scale = np.float32(1 / math.sqrt(hs))
    D, lse = work.reshape(B * NH, T), lse.reshape(B * NH, T)
    _attention_rows[-(-lse.size // 4), 128](D, dout, out, NH)
    grid, arrays = B * NH * -(-T // (8 * _side(hs))), (dinp, dout, inp)
    fours = hs % 4 == 0 and aligned(*arrays)
    args = *(x.reshape(-1) for x in arrays), lse, D, NH, scale, add
    _keys_kernel(hs, fours)[grid, 64](*args)
    _queries_kernel(hs, fours)[grid, 64](*args)


# %% the versions of backward tags=["export"] module="cuda.attention"
# two squares in memory; two walks over tiles
ATTENTION_BACKWARD = (_backward_unfused, _backward_tiles)


# %% attention, backward tags=["export"] module="cuda.attention"
@shapes("B T 3C!, B T C, B T 3C, B T C, B NH|C T", DEVICE, work="W!?")
def attention_backward(
    dinp, dout, inp, out, lse, add=True, work=None, version=2
):
    """Add attention's gradient to dinp.

    dinp, inp: (B, T, 3C). dout, out: (B, T, C). lse: (B, NH, T). out and
    lse are as the forward pass left them. All float32 on a device. add:
    False overwrites dinp instead of adding. work: scratch of
    attention_scratch() floats, or None to allocate it. version: 1 keeps the
    weights in memory, 2 takes heads of up to 128 channels and needs one
    float a row. Every element is summed in one order. Raises TypeError or
    ValueError before it launches anything.
    """
    name = "attention_backward"
    run = numbered(ATTENTION_BACKWARD, version, name)
    sizes = _sizes(name, lse, out.shape[2], version)
    count = attention_scratch(*sizes, 0, version)
    work = _find_work(name, work, count, inp)
    run(dinp, dout, inp, out, lse, int(add), work)


# %% backward against NumPy
def back_on_gpu(p, version, place=to_device):
    """dinp of a problem, as one version computes it."""
    there = [place(x) for x in (p.dinp, p.dout, p.inp, p.out, p.lse)]
    attention_backward(*there, version=version)
    return to_host(there[0])


for hs in (5, 12):
    p = problem(1, 37, 2, hs)
    forward_and_backward(p, reference)
    want, p.dinp = p.dinp, np.zeros_like(p.dinp)
    for version in (1, 2):
        got = back_on_gpu(p, version)
        compare(f"{version}: dinp", got, want, tol=1e-5)

# %% [markdown]
# The counts once more, for 16 channels and 32 positions, and the scratch of
# the batch above.

# %% backward, counted
p = problem(1, 32, 1, 16)
reference.forward(p.out, p.lse, p.inp)
count(lambda version: back_on_gpu(p, version, simulated), (1, 2), what)
for version in (1, 2):
    floats = attention_scratch(16, 1024, 12, 0, version)
    print(f"version {version}: {4 * floats:,} bytes of scratch")

# %% [markdown]
# Of version 1's sectors about a twentieth is left, and of its scratch the
# numbers $D_t$, one a row.

# %% the same bits on every run
same = np.array_equal(back_on_gpu(p, 2), back_on_gpu(p, 2))
verdict("another run", same, "gives the same bits")

# %% [markdown]
# What these kernels leave undone: they compute the tiles on the diagonal
# whole, their copies do not overlap with the arithmetic, and their products
# run in float32, not on the units for products of small matrices in 16 bits
# that are called tensor cores.

# %% [markdown]
# ## Count it
#
# A head has $T(T+1)/2$ pairs $(t, u)$. Forward takes $2\,hs$ operations a
# pair for the score and $2\,hs$ for the output; backward, by (1.8.14), five
# such sums. The exponential adds about 25 operations a pair, once in forward
# and once in backward. The bytes are few: for each block of 96 rows the keys
# and values of a head pass by once.

# %% predicted work and intensity
B, T, NH, hs = 1, 1024, 12, 64
pairs = B * NH * T * (T + 1) // 2
forward_flops = (4 * hs + 25) * pairs
backward_flops = (10 * hs + 25) * pairs
forward_bytes = 4 * 2 * hs * pairs // 96
print(f"forward  {forward_flops / 1e9:.2f} GFLOP")
print(f"backward {backward_flops / 1e9:.2f} GFLOP")
print(f"forward  {forward_flops / forward_bytes:.0f} FLOP a byte")

# %% [markdown]
# With so many operations a byte, arithmetic decides, and its limit is the
# FMA peak of [chapter 1.7](07_matmul.ipynb).

# %% predicted against measured time tags=["nbval-ignore-output"]
from llmnb.bench.peak import fma_peak

peak = fma_peak()
print(f"FMA peak: {peak / 1e9:.0f} GFLOP/s")
for name, flops, seconds in (
    ("forward", forward_flops, long.seconds[2]),
    ("backward", backward_flops, long.seconds[4]),
):
    print(f"{name:<8} predicted {flops / peak * 1e3:6.1f} ms", end=", ")
    print(f"measured {seconds * 1e3:6.1f} ms")

# %% [markdown]
# What stands between: the masked part of the blocks on the diagonal, the
# packing of 96 by 64 numbers for products of 96 by 96 by 64, and the
# exponentials, which are not all FMAs.
#
# Saved for the backward pass: $B \cdot NH \cdot T$ numbers. Attention's
# share of a whole step grows with $T$, because its work is quadratic in $T$
# and that of all other layers linear.

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
    cpu.forward(out, lse, inp)
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
# *Figure 1.8.5. Left, random queries and keys: a causal average with uneven
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
# - A running maximum and sum give a softmax without its row, so no array
#   of size T × T exists.
# - On a GPU a block owns a tile of queries and walks over the keys. Backward
#   walks twice, by keys and by queries, so that no two blocks add to one
#   number.

# %% [markdown]
# ## Design note
#
# A thread that owns a whole head adds to $dk$ and $dv$ in the order of its
# loops. The price is that heads may be few: with one sequence and 12 heads a
# machine of 64 cores leaves 52 of them idle in this layer. Two sweeps, one by
# rows for $dq$ and one by columns for $dk$ and $dv$, would keep them all
# busy, with seven products instead of five. The other way out is to let
# threads add to shared memory under a lock or with atomic instructions. It
# makes the last bits depend on who came first, and then a run that is resumed
# is not the run that was interrupted. The GPU, which has far more places to
# fill than there are heads, takes the two sweeps. Forward, it is no question
# at all: rows are independent.
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
p = problem(1, 9, 2, 4, np.float64)
forward_and_backward(p, cpu)
moved = p.inp.copy()
split_heads(moved, 2, 3)[1] += rng.normal(size=4)
moved_out = np.empty_like(p.out)
cpu.forward(moved_out, np.empty_like(p.lse), moved)

# %% exercise 1, checked
compare("output", moved_out, p.out, tol=1e-12)
dk = split_heads(p.dinp, 2, 3)[1]
compare("sum of dk", dk.sum(axis=2), np.zeros((1, 2, 4)), tol=1e-12)

# %% [markdown]
# **2** (★★). A text is too long for one machine's memory, so two machines
# hold half of the keys and values each. Both get the query, and each sends
# back its output $o$ and its log-sum-exp $L$ over its own half. Combine the
# two into the output over all keys.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# Over half 1, $\omega^{(1)}_i = e^{L_1} o^{(1)}_i$ is the sum of
# $e^{s_u} v_{ui}$ and $e^{L_1}$ the sum of $e^{s_u}$. Both add up:
# $o = (e^{L_1} o^{(1)} + e^{L_2} o^{(2)}) / (e^{L_1} + e^{L_2})$. Subtract
# the larger of the two from both exponents, as ever.
# :::


# %% exercise 2, two halves merged tags=["hide-cell"]
def merge(o1, L1, o2, L2):
    L = np.logaddexp(L1, L2)
    return np.exp(L1 - L) * o1 + np.exp(L2 - L) * o2, L


# %% exercise 2, checked
scores, values = 30 * rng.normal(size=50), rng.normal(size=(50, 3))
halves = online(scores[:20], values[:20]), online(scores[20:], values[20:])
o, L = merge(*halves[0], *halves[1])
compare("merged o", o, online(scores, values)[0], tol=1e-12)
compare("merged L", L, online(scores, values)[1], tol=1e-12)

# %% [markdown]
# **3** (★★). Scores may favour the near past: subtract a fixed slope
# times the distance, $s_{tu} = q_t \cdot k_u / \sqrt{hs} - \beta\,(t - u)$.
# What changes in the backward pass? Write both passes and check them.
#
# :::{admonition} Solution to exercise 3
# :class: dropdown
# The bias is a constant, so $\partial s_{tu} / \partial q_{ti}$ and
# $\partial s_{tu} / \partial k_{ui}$ stay as they are. (1.8.5) to (1.8.10) hold
# word for word; only the weights rebuilt from $L$ must include the bias.
# :::


# %% exercise 3, biased scores tags=["hide-cell"]
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


# %% exercise 3, checked
NH = 3
want = numerical_gradient(lambda: biased(inp, g)[0], inp)
compare("biased dinp", biased(inp, g)[1], want, tol=1e-8)

# %% [markdown]
# **4** (★★★). With a *sliding window* a position reads the last $W$
# positions only, itself included. Write a forward pass that takes
# $O(T\,W\,hs)$ time, and show that with $W = T$ it is (1.8.3). How far back
# can information reach through $L$ such layers?
#
# :::{admonition} Solution to exercise 4
# :class: dropdown
# The first key of row $t$ is $\max(0, t - W + 1)$ instead of 0; nothing else
# changes. Each layer lets a vector move up to $W - 1$ positions forward in
# time, so $L$ layers reach back $L (W - 1)$ positions.
# :::


# %% exercise 4, a window tags=["hide-cell"]
def windowed(q, k, v, W):
    out = np.empty_like(v)
    for t in range(len(q)):
        first = max(0, t - W + 1)
        scores = k[first : t + 1] @ q[t] / np.sqrt(len(q[t]))
        out[t], _ = online(scores, v[first : t + 1])
    return out


# %% exercise 4, checked
p = problem(1, 40, 1, 8, np.float64)
cpu.forward(p.out, p.lse, p.inp)
q, k, v = split_heads(p.inp, 1, 3)[:, 0, 0]
compare("W = T", windowed(q, k, v, 40), p.out[0], tol=1e-12)
compare("W = 1", windowed(q, k, v, 1), v, tol=1e-12)
near = windowed(q, k, v, 5)
k[:30] += 1
far = windowed(q, k, v, 5)
verdict("out of sight", np.array_equal(near[34:], far[34:]), "is unread")

# %% [markdown]
# **5** (★★). How many tiles of scores do the blocks of version 3 of the GPU's
# forward pass visit for one head of 64 channels or fewer and $T$ positions?
# Check it by the barriers that its threads reach. Which part of the scores
# that they compute at $T = 1024$ is masked?
#
# :::{admonition} Solution to exercise 5
# :class: dropdown
# Block $n$ owns queries $64n$ to $\min(64(n + 1), T) - 1$ and visits every
# tile of 32 keys that begins before that end. Each visit has two barriers
# for each of 128 threads. At $T = 1024$ they visit $2 + 4 + \dots + 32 = 272$
# tiles of $64 \cdot 32$ scores, of which $T(T + 1)/2$ are wanted: about 6 %
# are masked.
# :::


# %% exercise 5, tiles visited tags=["hide-cell"]
def visited(T):
    ends = [min(first + 64, T) for first in range(0, T, 64)]
    return sum(-(-end // 32) for end in ends)


# %% exercise 5, checked
p = problem(1, 70, 1, 4)
with watch() as seen:
    on_gpu(p, 3, simulated)
verdict("barriers", seen.barriers == 2 * 128 * visited(70), "2 a tile")
masked = 1 - 1024 * 1025 / 2 / (visited(1024) * 64 * 32)
print(f"{visited(1024)} tiles at T = 1024, {masked:.0%} of them masked")

# %% [markdown]
# ## Further reading
#
# - Vaswani et al. (2017),
#   [Attention Is All You Need](https://arxiv.org/abs/1706.03762): section
#   3.2 defines what this chapter differentiates, with the reason for the
#   root in a footnote.
# - Milakov and Gimelshein (2018),
#   [Online normalizer calculation for softmax](https://arxiv.org/abs/1805.02867):
#   the running maximum and sum of (1.8.12).
# - Dao et al. (2022),
#   [FlashAttention](https://arxiv.org/abs/2205.14135): versions 2 and 3 of
#   the GPU section, with the traffic between memories counted.
# - Olsson et al. (2022),
#   [In-context Learning and Induction Heads](https://arxiv.org/abs/2209.11895):
#   the heads of figure 1.8.5, found in trained models.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.8")
