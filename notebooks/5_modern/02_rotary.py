# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       reference.rotary: "Rotary positions in NumPy: tables, forward and backward."
#       cpu.rotary: "Rotary positions, compiled for the processor's cores."
#       cuda.rotary: "Rotary positions on a GPU, forward and backward."
# ---

# %% [markdown]
# # Rotary positions: turn, and only the distance remains
#
# > A pair of channels is turned by an angle that grows with the position; a dot
# > product then sees the difference of two positions.
#
# *Reading time: 30 minutes. You need: attention
# ([chapter 1.8](../1_by_hand/08_attention.ipynb)); for the last two sections
# chapters [2.2](../2_cpu/02_rows.ipynb) and [3.1](../3_gpu/01_threads.ipynb).*
#
# ## Where we are
#
# Attention compares vectors and knows nothing of order. GPT-2 adds a vector for
# the position to that of the token, once, at the very beginning. The models of this
# part add nothing. They turn queries and keys, in every block, just before they
# meet: *rotary positions*, RoPE for short. At the end of this chapter you can
#
# - say which terms of a score a sum of two vectors makes, and which one you wanted;
# - derive that turned vectors see a distance, and read distances off a clock;
# - tell both layouts of the pairs apart, and say why the wrong one is hard to see;
# - take a gradient through the turn, with nothing saved;
# - stretch a trained model to longer texts, as Llama 3.1 does.

# %% setup
import matplotlib.pyplot as plt
import numpy as np

from llmnb.book.diagram import PALETTE
from llmnb.book.verify import compare, numerical_gradient, verdict

rng = np.random.default_rng(2)

# %% [markdown]
# ## Why a sum is clumsy
#
# In GPT-2 the stream of position $t$ begins as $x_t + P_t$, a token's vector and
# a position's. Multiply by the weights that make queries and keys, and a score has
# four terms:
#
# $$ q_t \cdot k_u = x_t^q \cdot x_u^k + x_t^q \cdot P_u^k + P_t^q \cdot x_u^k
#    + P_t^q \cdot P_u^k . \tag{5.2.1} $$
#
# The first compares what the tokens say, the last compares places, and the two
# between compare a word with a place, which rarely means anything. Worse, "three
# tokens back" is nowhere to be seen. The table has a row for place 17 and one for
# place 14, another for 18 and 15, and that the two pairs are alike has to be
# learned for each of them. What lies behind the last row does not exist.
#
# We would rather have scores that depend on the tokens and on $t - u$ alone.
#
# ## Turn a pair
#
# Take two channels of a query, $(a, b)$, as a point in the plane, and turn it by
# the angle $t f$: a *frequency* $f$ for each place that the text goes on.
#
# $$
# \begin{aligned}
# R_t \begin{pmatrix} a \\ b \end{pmatrix}
#    &= \begin{pmatrix} \cos tf & -\sin tf \\ \sin tf & \cos tf \end{pmatrix}
#       \begin{pmatrix} a \\ b \end{pmatrix} \\
#    &= \begin{pmatrix} a \cos tf - b \sin tf \\ a \sin tf + b \cos tf
#       \end{pmatrix} .
# \end{aligned}
# \tag{5.2.2}
# $$
#
# Turn the query at $t$ and the key at $u$, each by its own place. What is their
# dot product? It needs the product $R_t^\top R_u$, row by column:
#
# $$
# \begin{aligned}
# R_t^\top R_u
#    &= \begin{pmatrix} \cos tf & \sin tf \\ -\sin tf & \cos tf \end{pmatrix} \\
#    &\quad {} \cdot
#       \begin{pmatrix} \cos uf & -\sin uf \\ \sin uf & \cos uf \end{pmatrix} .
# \end{aligned}
# \tag{5.2.3}
# $$
#
# The first element is $\cos tf \cos uf + \sin tf \sin uf = \cos\,(u - t) f$, the
# one below it $\cos tf \sin uf - \sin tf \cos uf = \sin\,(u - t) f$, by the
# addition theorems, and the other two likewise. That is a turn again, by the
# difference:
#
# $$ (R_t\, q) \cdot (R_u\, k) = q^\top R_t^\top R_u\, k
#    = q^\top R_{u - t}\, k . \tag{5.2.4} $$
#
# $t$ and $u$ have gone, $u - t$ has stayed. Nothing was learned for it, no
# place is the last, and there are no mixed terms: the tokens make $q$ and $k$,
# the distance makes the turn between them. Values are not turned, for they
# are added up and not compared.
#
# **By hand.** Turn $(3, 4)$ by the angle with $\cos = 0.6$ and $\sin = 0.8$:
# $(3 \cdot 0.6 - 4 \cdot 0.8,\; 3 \cdot 0.8 + 4 \cdot 0.6) = (-1.4,\ 4.8)$. Its length
# was $\sqrt{9 + 16} = 5$ and is $\sqrt{1.96 + 23.04} = 5$. A turn changes no
# length, so it cannot make a score run away.
#
# ## A clock with many hands
#
# One pair cannot tell 1 from $1 + 2\pi / f$, where it has gone round. So each of
# the $hs / 2$ pairs of a head has its own frequency, from 1 down, in equal ratios,
# with a *base* $\theta$, mostly 10,000 or more:
#
# $$ f_i = \theta^{-2i / hs} , \qquad 0 \le i < hs / 2 . \tag{5.2.5} $$
#
# It is a clock. A fast hand tells neighbours apart and soon repeats, a slow one
# hardly moves in a paragraph and tells the pages. All of them together name a
# distance.

# %% imports tags=["export"] module="reference.rotary"
import math

import numpy as np

from llmnb.shapes import shapes


# %% the angles tags=["export"] module="reference.rotary"
def rope_frequencies(hs, theta, scaling=None):
    """The angle a position that each pair of channels turns by: float64.

    hs: the channels of a head, an even number. theta: the base. scaling:
    None; ("linear", factor), which divides all; or ("llama3", factor, low,
    high, length), which divides the slow ones and leaves the fast. Returns
    (hs / 2,). Raises ValueError for an odd hs, or another scaling.
    """
    if hs % 2:
        raise ValueError(f"rope: hs must be even, got {hs}")
    found = theta ** (-np.arange(0, hs, 2) / hs)
    if scaling is None:
        return found
    kind, factor, *rest = scaling
    if kind == "linear":
        return found / factor
    if kind != "llama3":
        raise ValueError(f"rope: scaling {kind!r} is none of linear, llama3")
    low, high, length = rest
    wave = 2 * math.pi / found
    t = np.clip((length / wave - low) / (high - low), 0, 1)
    return (1 - t) * found / factor + t * found


def rope_table(length, hs, theta, scaling=None):
    """Cosines and sines of all positions: (length, hs), float64.

    The first half of a row are the cosines of the pairs' angles, the second
    their sines. theta, scaling: as for `rope_frequencies`.
    """
    frequencies = rope_frequencies(hs, theta, scaling)
    angles = np.arange(length)[:, None] * frequencies
    return np.hstack([np.cos(angles), np.sin(angles)])


# %% a clock of four hands, by its table
turns = rope_frequencies(8, 10000.0)
verdict("(5.2.5)", np.allclose(turns, [1, 0.1, 0.01, 0.001]), "four hands")
print("frequencies:", *[f"{x:g}" for x in turns])
print("places for a whole turn:", *[f"{2 * math.pi / x:.0f}" for x in turns])
small = rope_table(3, 8, 10000.0)
print("the table:", small.shape, "its first row:", small[0])

# %% draw it tags=["hide-input"]
fig, axes = plt.subplots(1, 6, figsize=(8.4, 1.8), dpi=100)
colours = [PALETTE[x] for x in ("orange", "blue", "green", "purple")]
for ax, t in zip(axes, (0, 1, 2, 6, 60, 600), strict=True):
    ax.add_patch(plt.Circle((0, 0), 1.08, fill=False, ec=PALETTE["grey"]))
    for i, (f, colour) in enumerate(zip(turns, colours, strict=True)):
        r, angle = 0.45 + 0.17 * i, t * f
        tip = r * math.sin(angle), r * math.cos(angle)
        ax.plot((0, tip[0]), (0, tip[1]), color=colour, lw=3.5 - 0.7 * i)
    ax.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), aspect="equal")
    ax.set_title(f"place {t}", size=10, color=PALETTE["grey"])
    ax.axis("off")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 5.2.1. Four pairs as the hands of a clock; the shorter, the faster. At place
# 6 the fast hand is almost back where it began, and the next tells 6 from 0; at
# place 600 the slowest has moved by a tenth of a turn. No two places look the
# same.*
#
# What does a score make of it? Let every pair of the query be the same as that of
# the key, and all pairs of one length. A pair and itself, turned by an angle, have
# the cosine of that angle as their dot product, but for the length squared. So
# by (5.2.4) the score at distance $u - t$ is the mean of $\cos\,(u - t) f_i$ over the
# pairs, if we call it 1 at distance 0.

# %% a score by distance tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7.6, 2.8), dpi=100)
far = np.arange(0, 257)
for base, colour in ((1e2, "green"), (1e4, "orange"), (5e5, "blue")):
    score = np.cos(far[:, None] * rope_frequencies(64, base)).mean(axis=1)
    ax.plot(far, score, color=PALETTE[colour], label=f"base {base:,.0f}")
ax.axhline(0, color=PALETTE["grey"], lw=0.8)
ax.set(xlabel="distance", ylabel="score", xlim=(0, 256))
place = {"loc": "lower right", "bbox_to_anchor": (1, 0.98), "ncol": 3}
ax.legend(**place)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 5.2.2. The score of two equal vectors of 64 channels by their distance.
# What is near scores high without any learning, and a larger base makes the fall
# slower: it is for longer texts.*
#
# ## Forward
#
# | tensor | shape | what it holds |
# |---|---|---|
# | `x` | (B, T, n hs) | queries, keys, values; the first `heads` of n heads turn |
# | `table` | (R, hs) | of R positions: hs / 2 cosines, hs / 2 sines |
#
# A row has $NH$ heads of queries, then $NKV$ of keys and $NKV$ of values, so that
# turning the first $NH + NKV$ heads leaves the values. `first` is the position of the first row, for
# a model that writes and has the earlier ones in its cache. The function
# is (5.2.2) and works in place.


# %% how many heads turn tags=["exporti"] module="reference.rotary"
def check_turn(layer, x, table, heads, first):
    """Raise ValueError unless so many heads of x can turn by the table."""
    (_, T, width), hs = x.shape, table.shape[1]
    for name, n in (("heads", heads), ("first", first)):
        if not isinstance(n, (int, np.integer)):
            raise ValueError(f"{layer}: {name} must be an integer, got {n!r}")
    if not hs or hs % 2 or width % hs or not 1 <= heads <= width // hs:
        raise ValueError(
            f"{layer}: x must have shape (B, T, n hs), hs = {hs} even and "
            f"above 0, n at least heads = {heads}, got {x.shape}"
        )
    if not 0 <= first <= len(table) - T:
        raise ValueError(
            f"{layer}: positions {first} to {first + T - 1}, where the table "
            f"has {len(table)}"
        )


def _pairs(layer, x, table, heads, first):
    """Views of both halves of the heads that turn; cosines and sines."""
    check_turn(layer, x, table, heads, first)
    (B, T, width), hs = x.shape, table.shape[1]
    turning = x.reshape(B, T, width // hs, hs)[:, :, :heads]
    rows = table[int(first) :][:T, None]
    half = hs // 2
    return turning[..., :half], turning[..., half:], *np.split(rows, 2, -1)


# %% forward tags=["export"] module="reference.rotary"
@shapes("B T W!, R hs")
def rotary_forward(x, table, heads, first=0):
    """Turn the first heads of each row by their position's angles, in place.

    x: (B, T, n hs), n heads of which the first `heads` turn; channel i of a
    head and channel i + hs / 2 are a pair. table: (R, hs), of `rope_table`;
    first: the position of the first row. All of one float dtype.
    """
    a, b, cos, sin = _pairs("rotary_forward", x, table, heads, first)
    old = a.copy()
    a[...] = old * cos - b * sin
    b[...] = old * sin + b * cos


# %% by hand, and (5.2.4)
point = np.array([[[3.0, 4.0]]])
rotary_forward(point, np.array([[0.6, 0.8]]), heads=1)
print("(3, 4) becomes", point.ravel().round(12))

T, hs = 40, 16
table = rope_table(T, hs, 10000.0)
q, k = (np.tile(x, (1, T, 1)) for x in rng.normal(size=(2, hs)))
for x in (q, k):
    rotary_forward(x, table, heads=1)
scores = q[0] @ k[0].T  # the same query and key in every place
for far in (0, 1, 7, -7):
    line = np.diagonal(scores, far)
    compare(f"distance {far}", line, np.full_like(line, line[0]), tol=1e-12)
differ = bool(abs(scores[0, 7] - scores[7, 0]) > 0.1)
print("distances 7 and -7 differ:", differ)

# %% [markdown]
# The output's last line says that direction counts: before is not after.
#
# ## Two layouts
#
# Which two channels are a pair? Nothing in (5.2.2) says. The paper takes
# neighbours, $2i$ and $2i + 1$, and so do Meta's own Llama files and the GGUF files
# of Llamas: the *interleaved* layout. Hugging Face's files, and we, take $i$ and
# $i + hs / 2$, the *half-split* layout: a row is cut in two, and both halves are
# read in order. The channels of a head have no order of their own, because
# they come out of a matrix whose rows were learned. Reorder the rows of the
# weights of queries and of keys in the same way, and no dot product changes. So a
# file of one kind becomes one of the other by a permutation of rows:
#
# $$
# \begin{aligned}
# \text{row}'_{i} &= \text{row}_{2i} , \\
# \text{row}'_{i + hs/2} &= \text{row}_{2i + 1} , \\
# 0 \le i &< \tfrac{hs}{2} .
# \end{aligned}
# \tag{5.2.6}
# $$


# %% the other layout, and the way over
def turn_neighbours(x, table):
    """The interleaved rule, for one head: x (T, hs)."""
    cos, sin = np.split(table[: len(x)], 2, axis=1)
    a, b = x[:, 0::2], x[:, 1::2]
    return np.stack([a * cos - b * sin, a * sin + b * cos], 2).reshape(x.shape)


def turn_halves(x, table):
    found = x[None].copy()
    rotary_forward(found, table, heads=1)
    return found[0]


order = np.arange(hs).reshape(hs // 2, 2).T.ravel()
print("rows from:", *order)
q, k, v = rng.normal(size=(3, T, hs))
meant = turn_neighbours(q, table) @ turn_neighbours(k, table).T
moved = turn_halves(q[:, order], table) @ turn_halves(k[:, order], table).T
compare("permuted", moved, meant, tol=1e-12)

# %% [markdown]
# What if you forget the permutation? Nothing has the wrong shape, and no number is
# out of range. At distance 0 a query and its key are turned alike: the first position,
# which sees only itself, computes what it should. The next ones see
# scores that are wrong by little, for only the fast pairs have moved.


# %% forget it
def attend(scores):
    scores = np.where(np.tri(T, dtype=bool), scores, -np.inf) / math.sqrt(hs)
    a = np.exp(scores - scores.max(axis=1, keepdims=True))
    return a / a.sum(axis=1, keepdims=True) @ v


wrong = turn_halves(q, table) @ turn_halves(k, table).T
compare("distance 0", np.diag(wrong), np.diag(meant), tol=1e-12)
off = np.abs(attend(wrong) - attend(meant)).max(axis=1)
verdict("position 0", off[0] < 1e-12, "as it should be")
verdict("later ones", (off[1:] > 1e-3).all(), "are wrong, and nothing says so")

# %% [markdown]
# A model read with the wrong layout is right about the first position and nearly
# right about the next, so that what it writes looks plausible at first and then
# drifts. If a model of yours does so, suspect this.
#
# ## Backward
#
# One pair, with $(a', b')$ for what (5.2.2) makes. $a$ reaches the loss by both:
#
# $$
# \begin{aligned}
# da &= \frac{\partial a'}{\partial a}\, da' + \frac{\partial b'}{\partial a}\, db' \\
#    &= \cos tf\; da' + \sin tf\; db' ,
# \end{aligned}
# \tag{5.2.7}
# $$
#
# $$
# \begin{aligned}
# db &= \frac{\partial a'}{\partial b}\, da' + \frac{\partial b'}{\partial b}\, db' \\
#    &= -\sin tf\; da' + \cos tf\; db' .
# \end{aligned}
# \tag{5.2.8}
# $$
#
# The matrix of these two is that of (5.2.2) with rows and columns exchanged,
# $R_t^\top$, and by (5.2.4) with $u = 0$ that is $R_{-t}$: **the gradient is turned
# back.** No input is needed for it, so nothing is saved, and it works in place as
# well. Nothing is learned either: there is no other gradient.


# %% backward tags=["export"] module="reference.rotary"
@shapes("B T W!, R hs")
def rotary_backward(dx, table, heads, first=0):
    """Turn the gradients back, in place; arguments: as rotary_forward."""
    a, b, cos, sin = _pairs("rotary_backward", dx, table, heads, first)
    old = a.copy()
    a[...] = old * cos + b * sin
    b[...] = b * cos - old * sin


# %% [markdown]
# ## Proof
#
# Every element by central differences, in float64, with $h = 10^{-5}$, for three
# heads of which two turn; then the sign forgotten, which is the mistake to make.

# %% the proof
x, g = rng.normal(size=(2, 2, 5, 18))
table = rope_table(9, 6, 100.0)


def loss():
    y = x.copy()
    rotary_forward(y, table, heads=2, first=3)
    return (y * g).sum()


want, dx = numerical_gradient(loss, x), g.copy()
rotary_backward(dx, table, heads=2, first=3)
compare("dx", dx, want, tol=1e-8)
compare("values' dx", dx[..., 12:], g[..., 12:], tol=1e-15)
forgot = g.copy()
rotary_forward(forgot, table, heads=2, first=3)
error = np.abs(forgot - want).max()
verdict("sign forgotten", error > 0.1, "caught")

# %% [markdown]
# ## Count it
#
# For a token and a block $\frac12 (NH + NKV)\, hs$ pairs turn, each with four
# multiplications and two additions: $3\, (NH + NKV)\, hs$ operations, in
# Llama 3 8B 15,360, beside $2 C\, (NH + 2 NKV)\, hs$, or 50 million, for making
# queries, keys and values. Parameters: none; GPT-2's table has
# $1024 \cdot 768 = 786{,}432$. Numbers kept for the way back: none.
#
# ## What it buys
#
# A task that only positions can solve: at each place, say which token stood five
# places ago. One head, whose scores are made of positions alone, learns it on
# texts of 24 tokens; then it gets texts of 96. The first head has a vector for
# each position, for its query and its key, as GPT-2 could make them. The second
# has one query and one key for all positions, and turns them. There are twelve tokens,
# and each has a row of the identity for its value. So the output says how much
# weight each token got, and eight times that are its logits. A guess has a loss of
# $\ln 12 = 2.48$ nats.


# %% one head, by hand
def head(q, k, tokens, back=5, sharp=8.0):
    """Loss of each place from `back` on; gradients of q and k, (T, hs)."""
    T, hs = q.shape
    scores = np.where(np.tri(T, dtype=bool), q @ k.T / math.sqrt(hs), -np.inf)
    a = np.exp(scores - scores.max(axis=1, keepdims=True))
    a /= a.sum(axis=1, keepdims=True)
    seen = np.eye(12)[tokens]
    logits = sharp * (a @ seen)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    places = np.arange(back, T)
    right = p[places, tokens[places - back]]
    dlogits = p.copy()
    dlogits[places, tokens[places - back]] -= 1
    dlogits[:back] = 0
    da = sharp * dlogits @ seen.T / len(places)
    ds = a * (da - (da * a).sum(axis=1, keepdims=True)) / math.sqrt(hs)
    return -np.log(right), ds @ k, ds.T @ q


# %% with a table of positions, and turned
LONG, SHORT = 96, 24
table = rope_table(LONG, 16, 10000.0)


def spread(x, T, turned):
    """Queries or keys of T positions, (T, hs), from what is learned."""
    if not turned:
        return x[:T]
    y = np.repeat(x[None], T, axis=1)
    rotary_forward(y, table, heads=1)
    return y[0]


def collect(dx, x, turned):
    """The way back of `spread`: a gradient like x."""
    if not turned:
        return np.concatenate([dx, np.zeros((len(x) - len(dx), dx.shape[1]))])
    rotary_backward(dx[None], table, heads=1)
    return dx.sum(axis=0, keepdims=True)


# %% train both
def learn(turned, steps=1500):
    draw = np.random.default_rng(1)
    pair = draw.normal(size=(2, 1 if turned else LONG, 16))
    m = np.zeros_like(pair)
    v = m.copy()
    for step in range(1, steps + 1):
        tokens = draw.integers(0, 12, SHORT)
        both = [spread(x, SHORT, turned) for x in pair]
        _, *grads = head(*both, tokens)
        g = np.array(
            [collect(d, x, turned) for d, x in zip(grads, pair, strict=True)]
        )
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        fixed = m / (1 - 0.9**step), v / (1 - 0.99**step)
        pair -= 0.05 * fixed[0] / (np.sqrt(fixed[1]) + 1e-8)
    draws = [draw.integers(0, 12, LONG) for _ in range(100)]
    both = [spread(x, LONG, turned) for x in pair]
    return np.mean([head(*both, x)[0] for x in draws], axis=0)


losses = {"learned": learn(False), "turned": learn(True)}
inside = SHORT - 5
for name, x in losses.items():
    verdict(f"{name}, within", x[:inside].max() < 0.1, "loss below 0.1")
chance = math.log(12)
verdict("learned, beyond", losses["learned"][inside:].mean() > chance, "lost")
far = losses["turned"][inside:].max()
verdict("turned, beyond", far < 0.1, "loss below 0.1")

# %% draw it tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7.6, 2.8), dpi=100)
for (name, x), colour in zip(losses.items(), ("blue", "orange"), strict=True):
    ax.plot(np.arange(5, LONG), x, color=PALETTE[colour], label=name)
ax.axhline(chance, color=PALETTE["grey"], lw=0.8, ls="--")
ax.axvline(SHORT - 0.5, color=PALETTE["grey"], lw=0.8)
ax.set(xlabel="position", ylabel="loss, nats", ylim=(-0.2, None))
ax.legend()
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 5.2.3. The loss at each position; dashed is a guess among twelve tokens. Both
# heads solve the task as far as they were trained, position 23. From there on the
# vectors of the first have never learned, and its answers are worse than a guess. The
# second has learned a distance, and goes on.*
#
# This is the clean case. In a large model the same property holds for every
# score, but what has been learned with the distances of training is another matter.
#
# ## Longer texts: a blend
#
# A large model has learned with words and distances at once, and distances that
# it never saw are strange to it as well: a slow hand comes to angles at which it
# never stood. The first remedy is to divide all frequencies by a factor $s$, so
# that a text $s$ times as long turns no hand further than before (`"linear"`). But
# then neighbours are $s$ times as near on the fast hands, which had gone round
# often and had nothing new to see. Llama 3.1 does each where it is due. A hand
# goes round once in
#
# $$ \lambda_i = 2\pi / f_i \tag{5.2.9} $$
#
# places. In the $M$ places of the first training it has gone round $M / \lambda_i$
# times. More than $\beta$ times: leave it. Fewer than $\alpha$: divide. In between
# blend, by how far the number is on its way from $\alpha$ to $\beta$:
#
# $$
# \begin{aligned}
# \phi_i &= \frac{M / \lambda_i - \alpha}{\beta - \alpha} \;
#    \text{ held within 0 and 1} , \\
# f_i' &= (1 - \phi_i)\, \frac{f_i}{s} + \phi_i\, f_i .
# \end{aligned}
# \tag{5.2.10}
# $$
#
# At $M / \lambda_i = \alpha$ the blend gives $f_i / s$ and at $\beta$ it gives $f_i$, so
# there is no jump. Llama 3.1 has $s = 8$, $\alpha = 1$, $\beta = 4$ and
# $M = 8192$; it reads 131,072 tokens, after some more training on long texts.

# %% Llama 3.1's blend
plain = rope_frequencies(128, 500000.0)
scaled = rope_frequencies(128, 500000.0, ("llama3", 8.0, 1.0, 4.0, 8192))
kept, divided = scaled == plain, np.isclose(scaled, plain / 8)
print(f"of {len(plain)} pairs {kept.sum()} stay, {divided.sum()} are divided")
rounds = 8192 * plain / (2 * math.pi)  # M / lambda
blend = np.interp(rounds, (1, 4), (1 / 8, 1))  # 1/8 below 1, 1 from 4 on
compare("(5.2.10)", scaled / plain, blend, tol=1e-12)

# %% draw it tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7.6, 2.6), dpi=100)
wave = 2 * math.pi / plain
ax.semilogx(wave, scaled / plain, "o-", color=PALETTE["orange"], ms=4)
for x, name in ((2048, "M / 4"), (8192, "M")):
    ax.axvline(x, color=PALETTE["grey"], lw=0.8)
    ax.text(x * 1.1, 0.92, name, color=PALETTE["grey"])
ax.set(xlabel="places for a whole turn", ylabel="new frequency / old")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 5.2.4. What Llama 3.1 does to the 64 pairs of a head. Those that went
# round four times and more keep their frequency, those that never went round get
# an eighth of it, and few lie in between.*
#
# ## On a CPU
#
# A row of `x` lies in memory once, and so does its row of the table: all
# heads of a position turn by the same angles. A thread takes its share of the
# rows; nothing is copied, for both channels of a pair are read before either
# is written. The way back is the same turn with the sines' sign changed.

# %% imports of the CPU module tags=["export"] module="cpu.rotary"
from llmnb.cpu.jit import arguments, share, team
from llmnb.reference.rotary import check_turn
from llmnb.shapes import shapes


# %% the kernel tags=["exporti"] module="cpu.rotary"
@team
def _turn(part, parts, address):
    x, table, heads, first, T, back = arguments(address)
    rows, half = x.shape[0], table.shape[1] // 2
    mine = share(rows, part, parts)
    sign = x.dtype.type(-1 if back else 1)
    for n in range(mine.start, mine.stop):
        angles = table[first + n % T]
        for h in range(heads):
            a, b = x[n, h, :half], x[n, h, half:]
            for i in range(half):
                cos, sin = angles[i], sign * angles[half + i]
                old = a[i]
                a[i] = old * cos - b[i] * sin
                b[i] = old * sin + b[i] * cos


def _turn_rows(layer, x, table, heads, first, back):
    check_turn(layer, x, table, heads, first)
    (B, T, width), hs = x.shape, table.shape[1]
    rows = x.reshape(B * T, width // hs, hs)
    _turn(rows, table, int(heads), int(first), T, back)


# %% rotary, compiled tags=["export"] module="cpu.rotary"
@shapes("B T W!, R hs")
def rotary_forward(x, table, heads, first=0):
    """Turn the first heads of each row by their position's angles, in place.

    x: (B, T, n hs), n heads of which the first `heads` turn; channel i of a
    head and channel i + hs / 2 are a pair. table: (R, hs), of `rope_table`;
    first: the position of the first row. Both float32 or both float64 and
    C-contiguous. Raises TypeError or ValueError before it turns any.
    """
    _turn_rows("rotary_forward", x, table, heads, first, False)


@shapes("B T W!, R hs")
def rotary_backward(dx, table, heads, first=0):
    """Turn the gradients back, in place; arguments: as rotary_forward."""
    _turn_rows("rotary_backward", dx, table, heads, first, True)


# %% both ways, in float32 and float64
from functools import partial

from llmnb import cpu, reference
from llmnb.timing import fastest, machine


def turned(layer, x, table):
    y = x.copy()
    layer.rotary_forward(y, table, heads=5, first=2)
    back = y.copy()
    layer.rotary_backward(back, table, heads=5, first=2)
    return y, back


for dtype, tol in (("f4", 2e-6), ("f8", 1e-12)):
    x = rng.normal(size=(3, 37, 7 * 10)).astype(dtype)
    table = rope_table(39, 10, 10000.0).astype(dtype)
    want, got = turned(reference, x, table), turned(cpu, x, table)
    compare(f"{dtype}, forward", got[0], want[0], tol)
    compare(f"{dtype}, and back", got[1], x, tol)

# %% its time tags=["nbval-ignore-output"]
x = rng.normal(size=(4, 256, 12 * 64)).astype("f4")
table = rope_table(256, 64, 10000.0).astype("f4")
slow, fast = (
    fastest(partial(layer.rotary_forward, x, table, 8))
    for layer in (reference, cpu)
)
print(machine())
print(f"{slow / fast:.1f} times as fast")

# %% [markdown]
# ## On a GPU
#
# A thread takes a pair. Neighbouring threads take neighbouring pairs of a
# head, so a warp reads 32 channels that lie side by side, and 32 more half a
# head further on. No number has two owners.

# %% imports of the GPU module tags=["export"] module="cuda.rotary"
import numpy as np

from llmnb.gpu.launch import DEVICE, kernel
from llmnb.gpu.simulator import cuda
from llmnb.reference.rotary import check_turn
from llmnb.shapes import shapes

# %% a thread a pair tags=["exporti"] module="cuda.rotary"
BLOCK = 256  # threads of a block


@kernel(launch_bounds=BLOCK)
def _turn(x, table, heads, first, sign):
    T, hs = x.shape[1], table.shape[1]
    half = hs // 2
    n, pair = cuda.grid(1) // (heads * half), cuda.grid(1) % (heads * half)
    b, t, i = n // T, n % T, pair % half
    if b < x.shape[0]:
        at = pair // half * hs + i
        cos, sin = table[first + t, i], sign * table[first + t, half + i]
        old, other = x[b, t, at], x[b, t, at + half]
        x[b, t, at] = old * cos - other * sin
        x[b, t, at + half] = old * sin + other * cos


def _turn_pairs(layer, x, table, heads, first, sign):
    check_turn(layer, x, table, heads, first)
    heads, first = int(heads), int(first)
    pairs = x.shape[0] * x.shape[1] * heads * table.shape[1] // 2
    how = heads, first, np.float32(sign)
    _turn[-(-pairs // BLOCK), BLOCK](x, table, *how)


# %% rotary on a GPU tags=["export"] module="cuda.rotary"
@shapes("B T W!, R hs", DEVICE)
def rotary_forward(x, table, heads, first=0):
    """Turn the first heads of each row by their position's angles, in place.

    x: (B, T, n hs), n heads of which the first `heads` turn; channel i of a
    head and channel i + hs / 2 are a pair. table: (R, hs), of `rope_table`;
    first: the position of the first row. Both float32 on a device and
    C-contiguous. Raises TypeError or ValueError before it launches anything.
    """
    _turn_pairs("rotary_forward", x, table, heads, first, 1)


@shapes("B T W!, R hs", DEVICE)
def rotary_backward(dx, table, heads, first=0):
    """Turn the gradients back, in place; arguments: as rotary_forward."""
    _turn_pairs("rotary_backward", dx, table, heads, first, -1)


# %% both ways, on a simulated GPU tags=["fold-input"]
from llmnb import cuda as on_gpu
from llmnb.gpu.launch import simulated, to_host
from llmnb.gpu.simulator import watch

x = rng.normal(size=(2, 9, 7 * 10)).astype("f4")
table = rope_table(11, 10, 10000.0).astype("f4")
there, angles = simulated(x), simulated(table)
with watch():
    on_gpu.rotary_forward(there, angles, heads=5, first=2)
want = turned(reference, x, table)[0]
compare("GPU, forward", to_host(there), want, tol=2e-6)
on_gpu.rotary_backward(there, angles, heads=5, first=2)
compare("GPU, and back", to_host(there), x, tol=2e-6)

# %% [markdown]
# ## Exercises
#
# **1** (★). After how many places has the slowest pair of a head of 128 channels gone
# round once, with base 10,000, and with 500,000?
#
# **2** (★). A cache keeps turned keys. Show that a text which begins at position 100
# has the scores of one that begins at 0.
#
# **3** (★★). Show that `("linear", 4)` gives position $4t$ the angles which $t$ had.
#
# :::{admonition} Solutions to exercises 1 to 3
# :class: dropdown
# 1: by (5.2.9) with $i = hs/2 - 1$, after 54,410 and after 2,559,196. 2: by (5.2.4) both
# $t$ and $u$ grow by 100, and the difference stays. 3: $4t \cdot f / 4 = t f$.
# :::

# %% exercises 1 to 3, checked tags=["hide-cell"]
for base, places in ((10000.0, 54410), (500000.0, 2559196)):
    found = round(2 * math.pi / rope_frequencies(128, base)[-1])
    verdict(f"1: {base:,.0f}", found == places, f"{places:,} places")


def scores_from(first):
    both = np.random.default_rng(3).normal(size=(2, 1, 6, 16))
    long = rope_table(200, 16, 10000.0)
    for x in both:
        reference.rotary_forward(x, long, heads=1, first=first)
    return both[0, 0] @ both[1, 0].T


compare("2: from 100", scores_from(100), scores_from(0), tol=1e-12)
stretched = rope_table(37, 16, 10000.0, ("linear", 4.0))[::4]
compare("3: stretched", stretched, rope_table(10, 16, 10000.0), tol=1e-12)

# %% [markdown]
# ## Take away
#
# - A score of turned vectors depends on tokens and distance, (5.2.4), and costs no
#   parameter.
# - Many frequencies make a clock: fast hands for neighbours, slow ones for pages.
# - Half-split and interleaved files differ by a permutation of rows; position 0
#   does not show a mistake.
# - The gradient is turned back, and nothing is saved.
#
# **Design note.** The table is computed once, in float64, and rounded to the
# model's precision, so that the angles of far positions are good to the last bit
# that can be kept; an angle of 100,000 in float32 is off by up to 0.004. We hold
# one layout and permute files at the door, so kernels have one rule. The other
# choice, a flag in every kernel, would be a second path to test everywhere.
#
# ## Further reading
#
# - Su et al. (2021), [RoFormer](https://arxiv.org/abs/2104.09864): section 3.2 has the
#   turn of one pair from complex numbers, 3.4.3 the decay of figure 5.2.2.
# - Chen et al. (2023), [Position Interpolation](https://arxiv.org/abs/2306.15595):
#   section 3, why to divide rather than to go on.
# - Peng et al. (2023), [YaRN](https://arxiv.org/abs/2309.00071): section 3, which hands
#   to leave alone; the blend here is of its kind.
# - Press et al. (2021), [ALiBi](https://arxiv.org/abs/2108.12409): section 3, a distance
#   by subtraction, without turning.
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("5.2")
