# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       model.init: "The first weights, drawn as PyTorch draws them."
# ---

# %% [markdown]
# # Draw the first weights as PyTorch draws them
#
# > Where training starts: normal numbers of the right size, made from
# > MT19937's bits in PyTorch's order, so that one seed gives one model.

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="matmul")

# %% [markdown]
# *Figure 1.14.1. The lit layers hold nearly all the numbers that are drawn at
# random: the weight matrices, of which the last is the token table too.*
#
# The layers are derived; now their weights need first values. All zeros
# would be a trap: equal rows get equal gradients and stay equal. Numbers
# that are too large or too small are another, and a deep model falls into
# it. So the weights are drawn at random, from a distribution whose width we
# can derive. This chapter builds `Generator` and `init_params`. At its end
# you can
#
# - say how a weight's standard deviation changes the size of activations
#   and gradients from layer to layer, and where $1/\sqrt{2L}$ comes from;
# - make random bits with MT19937, uniforms from bits, normals from uniforms;
# - draw the very weights that PyTorch draws from the same seed;
# - say what it will mean that our model equals PyTorch's.
#
# You need the linear layer of [chapter 1.7](07_matmul.ipynb), LayerNorm from
# [chapter 1.6](06_layernorm.ipynb) and the 16 tensors of
# [chapter 1.4](04_gpt2.ipynb).

# %% [markdown]
# ## Setup

# %% setup
import json
from collections import deque
from pathlib import Path

import matplotlib.pyplot as plt

from llmnb.config import GPT2Config
from llmnb.book.diagram import PALETTE
from llmnb.timing import fastest, machine
from llmnb.book.verify import compare, verdict

# %% imports tags=["export"]
import math

import numpy as np

from llmnb.checks import check_array
from llmnb.config import parameter_shapes
from llmnb.shapes import check_number

# %% the seed
rng = np.random.default_rng(11)

# %% [markdown]
# ## By hand
#
# One output of a linear layer is a sum $y = w_1 x_1 + w_2 x_2 + w_3 x_3$.
# Let the input be $x = (1, -1, 1)$ and let every weight be $+s$ or $-s$ with
# equal chance. There are eight equally likely cases. In two of them all
# three terms agree and $y = \pm 3s$; in the other six $y = \pm s$. The mean
# of $y^2$ is $(2 \cdot 9 + 6 \cdot 1)\, s^2 / 8 = 3 s^2$: one $s^2$ for each
# of the three inputs. For $y$ to be as large as its inputs, which have mean
# square 1, $s$ must be $1/\sqrt 3$.

# %% eight cases by hand
signs = np.stack(np.meshgrid(*[[-1, 1]] * 3), axis=-1).reshape(8, 3)
y = signs @ np.array([1, -1, 1])
print("y / s      ", y)
print("mean square", (y**2).mean())

# %% [markdown]
# | tensor | shape | first values |
# |---|---|---|
# | `wte` | (Vp, C) | N(0, 0.02²) in the first V rows, 0 in the padding |
# | `wpe` | (max_T, C) | N(0, 0.02²) |
# | `qkvw`, `fcw` | (L, 3C, C), (L, 4C, C) | N(0, 0.02²) |
# | `attprojw`, `fcprojw` | (L, C, C), (L, C, 4C) | N(0, 0.02² / 2L) |
# | `ln1w`, `ln2w`, `lnfw` | (L, C), (L, C), (C,) | 1 |
# | all biases | | 0 |
#
# N(0, σ²) is the normal distribution with mean 0 and standard deviation σ.
# The rest of the chapter is about the third column: first why these sizes,
# then how to draw them.

# %% [markdown]
# ## Why the size matters
#
# Take a linear layer with $C$ inputs, $y_i = \sum_j w_{ij} x_j$, whose
# weights are independent with mean 0 and variance $\sigma^2$. For a given
# $x$ the terms are independent with mean 0, so their variances add:
#
# $$ \operatorname{var}(y_i) = \sum_j \operatorname{var}(w_{ij})\, x_j^2
#    = C \sigma^2 \cdot \overline{x^2} ,
#    \qquad \overline{x^2} = \frac1C \sum_j x_j^2 . \tag{1.14.1} $$
#
# The layer multiplies the mean square by $C \sigma^2$. A stack of $d$ such
# layers, each with $C$ inputs and outputs, multiplies it by
#
# $$ (C \sigma^2)^d , \tag{1.14.2} $$
#
# which vanishes or explodes with $d$ unless $\sigma = 1/\sqrt C$. The
# backward pass runs through the same matrices the other way,
# $dx_j = \sum_i w_{ij}\, dy_i$, so its gradients change by a factor of the
# same form, with the number of outputs in place of $C$. The root of the
# mean square, or RMS, is what we plot: it is the typical size of an entry.


# %% a stack of linear layers, forward and backward
def rms(x):
    return float(np.sqrt(np.mean(x * x)))


def stack(std, C=256, depth=24, rows=64):
    """RMS of activations and of gradients, entering each layer."""
    weights = rng.normal(0, std, (depth, C, C))
    x, dx = rng.normal(size=(2, rows, C))
    forward, backward = [rms(x)], [rms(dx)]
    for w in weights:
        x = x @ w.T
        forward.append(rms(x))
    for w in weights[::-1]:
        dx = dx @ w
        backward.append(rms(dx))
    return np.array(forward), np.array(backward)[::-1]


# %% three widths of the distribution
C = 256
curves = {std: stack(std) for std in (0.02, C**-0.5, 0.12)}
depths = np.arange(25)
for std, (forward, _) in curves.items():
    growth = (forward[-1] / forward[0]) ** (1 / 24)
    print(f"std {std:.4f}: a layer multiplies by {growth:.2f}", end=", ")
    print(f"predicted {np.sqrt(C) * std:.2f}")

# %% draw them
fig, axes = plt.subplots(1, 2, figsize=(7.6, 3.6), dpi=100, sharey=True)
colours = PALETTE["blue"], PALETTE["green"], PALETTE["orange"]
for k, title in enumerate(("activations", "gradients")):
    ax = axes[k]
    power = (depths, depths[::-1])[k]
    for colour, (std, pair) in zip(colours, curves.items(), strict=True):
        ax.plot(depths, (np.sqrt(C) * std) ** power, "--", c=colour, lw=0.9)
        ax.plot(depths, pair[k], ".", c=colour)
        ax.annotate(
            f"std {std:.4g}",
            (24.5, pair[k][-1]) if k == 0 else (-0.5, pair[k][0]),
            (0, 9 if std > 0.03 else -9),
            textcoords="offset points",
            ha="right" if k == 0 else "left",
            va="bottom" if std > 0.03 else "top",
            color=colour,
        )
    ax.set(title=title, xlabel="layer", yscale="log", ylim=(1e-15, 1e10))
axes[0].set_ylabel("RMS")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.14.2. In 24 linear layers with 256 channels, a standard deviation
# of 0.02 shrinks the activations to $10^{-12}$ and one of 0.12 blows them up
# past $10^6$; gradients do the same on their way back. With
# $1/\sqrt{256}$ both keep their size. Dots are measured, dashed lines are
# the root of (1.14.2).*

# %% [markdown]
# ## Why 0.02 serves, and what 1/√(2L) is for
#
# GPT-2 uses 0.02 for any $C$. For 768 channels $C \sigma^2 = 0.31$, not 1,
# yet nothing vanishes, because LayerNorm stands before each matrix and
# restores mean square 1. The output of a branch, attention or feed-forward,
# then has some mean square $s^2$ that depends on $\sigma$ and not on how
# deep the branch sits.
#
# Depth returns through the residual connections of
# [chapter 1.10](10_residual.ipynb). They add the branches up:
# $x_{d+1} = x_d + f_d(x_d)$. At the start the branches' outputs are close to
# independent, with mean 0, and variances add once more. After the $2L$
# branches of $L$ blocks the stream has mean square
#
# $$ \overline{x_{2L}^2} = \overline{x_0^2} + 2L\, s^2 , \tag{1.14.3} $$
#
# which grows with the depth of the model. The last matrix of each branch,
# `attprojw` or `fcprojw`, multiplies what the branch adds. Divide its
# standard deviation by $\sqrt{2L}$ and $s^2$ is divided by $2L$:
#
# $$ \overline{x_{2L}^2} = \overline{x_0^2}
#    + 2L\, \frac{s^2}{2L} = \overline{x_0^2} + s^2 . \tag{1.14.4} $$
#
# The end of the stream has one size for every $L$. We measure it with
# feed-forward branches, LayerNorm, matrix, GELU, matrix, whose
# $C \sigma^2$ is that of the 124M model.

# %% a stream of feed-forward branches
from llmnb.reference.gelu import gelu_forward


def stream(branches, scaled, C=128, rows=64):
    """RMS of the residual stream before and after each branch."""
    std = 0.02 * np.sqrt(768 / C)
    last = std / np.sqrt(branches) if scaled else std
    x = rng.normal(0, 0.02 * np.sqrt(2), (rows, C))
    sizes = [rms(x)]
    for _ in range(branches):
        norm = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
        hidden = norm @ rng.normal(0, std, (C, 4 * C))
        gelu_forward(hidden, hidden)
        x = x + hidden @ rng.normal(0, last, (4 * C, C))
        sizes.append(rms(x))
    return sizes


# %% three depths, with and without the factor
sizes = {
    (branches, scaled): stream(branches, scaled)
    for branches in (12, 24, 96)
    for scaled in (False, True)
}
ends = [sizes[b, True][-1] for b in (12, 24, 96)]
verdict("scaled", max(ends) < 1.5 * min(ends), "ends alike at any depth")
ends = [sizes[b, False][-1] for b in (12, 24, 96)]
verdict("unscaled", ends[2] > 2 * ends[0], "grows with depth")

# %% draw the stream
fig, axes = plt.subplots(1, 2, figsize=(7.6, 3.3), dpi=100, sharey=True)
styles = "-", "--", ":"
for ax, scaled in zip(axes, (False, True), strict=True):
    for k, branches in enumerate((12, 24, 96)):
        y = sizes[branches, scaled]
        way = np.linspace(0, 1, branches + 1)
        ax.plot(way, y, styles[k], c=colours[k])
        if not scaled:
            end = (1.02, y[-1])
            ax.annotate(f"2L = {branches}", end, color=colours[k], va="center")
    ax.set(xlim=(0, 1.35), xlabel="part of the way through the model")
    ax.set_xticks([0, 0.5, 1])
axes[1].annotate("all three", (1.02, y[-1]), va="center")
axes[0].set(title="one std for all matrices", ylabel="RMS of the stream")
axes[1].set(title="last matrices divided by √(2L)")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.14.3. Without the factor the residual stream of a model with 96
# branches ends nearly three times as large as one with 12; with it, all end
# at one small size.*
#
# What would be wrong with a large stream? The last LayerNorm divides by its
# size, and by (1.6.10) of [chapter 1.6](06_layernorm.ipynb) the gradient that
# enters the stream from above is divided too. It would shrink as models grow
# deeper. With (1.14.4) it enters with one size at any depth.

# %% [markdown]
# ## Bits: MT19937
#
# A computer draws random numbers by a recurrence that looks like chance but
# is fixed by its start, the *seed*. PyTorch uses MT19937, the Mersenne
# Twister, on the CPU. Its state is 624 words of 32 bits. From a seed $s$
# they are filled by
#
# $$ x_0 = s , \qquad x_i = \bigl( 1812433253\,
#    (x_{i-1} \oplus (x_{i-1} \gg 30)) + i \bigr) \bmod 2^{32} , \tag{1.14.5} $$
#
# where $\oplus$ is the exclusive or, bit by bit, and $\gg$ shifts right.
# Each following word mixes three earlier ones. Let $h$ be the word whose top
# bit is that of $x_k$ and whose other 31 bits are those of $x_{k+1}$. Then
#
# $$ x_{k+624} = x_{k+397} \oplus (h \gg 1) \oplus
#    \begin{cases} 0 & h \text{ even} \\
#    \texttt{9908B0DF}_{16} & h \text{ odd.} \end{cases} \tag{1.14.6} $$
#
# Only one bit of $x_k$ enters, so the state that matters has
# $623 \cdot 32 + 1 = 19937$ bits, and the constants are chosen such that it
# runs through all $2^{19937} - 1$ states other than zero before it repeats.
# Neighbouring words still resemble each other, so a word is *tempered* on
# its way out: four steps, each of which can be undone, that spread its bits.
#
# $$ \begin{aligned}
#    y &\leftarrow y \oplus (y \gg 11) \\
#    y &\leftarrow y \oplus ((y \ll 7) \mathbin{\&}
#       \texttt{9D2C5680}_{16}) \\
#    y &\leftarrow y \oplus ((y \ll 15) \mathbin{\&}
#       \texttt{EFC60000}_{16}) \\
#    y &\leftarrow y \oplus (y \gg 18) \end{aligned} \tag{1.14.7} $$
#
# The three equations are three short functions.


# %% the seed becomes 624 words tags=["export"]
def seed_state(seed):
    """The 624 words of MT19937's state that a seed stands for.

    seed: an integer in [0, 2**32), else TypeError or ValueError. Returns a
    list of 624 integers below 2**32.
    """
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must lie in [0, 2**32), got {seed}")
    state = [int(seed)]
    for i in range(1, 624):
        last = state[-1]
        state.append(1812433253 * (last ^ last >> 30) + i & 0xFFFFFFFF)
    return state


# %% the recurrence and the tempering, one word at a time
def temper(y):
    y ^= y >> 11
    y ^= y << 7 & 0x9D2C5680
    y ^= y << 15 & 0xEFC60000
    return y ^ y >> 18


def plain_words(seed):
    """MT19937's words, one after another, without end."""
    x = deque(seed_state(seed), maxlen=624)
    while True:
        h = x[0] & 0x80000000 | x[1] & 0x7FFFFFFF
        x.append(x[397] ^ h >> 1 ^ (0x9908B0DF if h & 1 else 0))
        yield temper(x[-1])


# %% its first words
words = plain_words(137)
first = [next(words) for _ in range(2)]
print(first)
verdict("PyTorch's", first == [4053805790, 2173880614], "first two words")

# %% [markdown]
# These are the words that PyTorch's generator gives for seed 137. (The
# `deque` drops its oldest word when a new one comes in.) Word by word is
# slow in Python, though, and the model needs 124 million. NumPy holds a
# compiled MT19937 and lets us set its state. Its default seeding differs
# from (1.14.5), so we fill in the 624 words ourselves. Position 624 says that
# all words of this state are used up and the recurrence comes next.


# %% the stream of bits tags=["export"]
class MersenneTwister:
    """MT19937 seeded as PyTorch seeds its CPU generator."""

    def __init__(self, seed):
        key = np.array(seed_state(seed), np.uint32)
        self._core = np.random.MT19937()
        state = {"key": key, "pos": 624}
        self._core.state = {"bit_generator": "MT19937", "state": state}

    def uint32(self, n):
        """The next n words, a uint32 array."""
        return self._core.random_raw(n).astype(np.uint32)

    def uniform(self, n):
        """n float32 numbers in [0, 1): 24 bits of one word each."""
        bits = self.uint32(n) & np.uint32(2**24 - 1)
        return bits.astype(np.float32) * np.float32(2**-24)

    def uniform64(self):
        """One float in [0, 1): 53 bits of two words."""
        high, low = (int(word) for word in self.uint32(2))
        return ((high << 32 | low) & 2**53 - 1) * 2**-53


# %% the same words, ten thousand of them
twister = MersenneTwister(137)
words = plain_words(137)
want = [next(words) for _ in range(10_000)]
same = twister.uint32(10_000).tolist() == want
verdict("MersenneTwister", same, "10,000 words as (1.14.5) to (1.14.7)")

# %% how much faster tags=["nbval-ignore-output"]
slow = fastest(lambda: [next(words) for _ in range(5_000)], runs=5) / 5e3
fast = fastest(twister.uint32, 1 << 14) / 2**14
print(machine())
print(f"plain Python {slow * 1e9:.0f} ns a word, NumPy's {fast * 1e9:.1f} ns")

# %% [markdown]
# ## Uniforms: 24 bits and 53
#
# A float32 has 24 significant bits, so every multiple of $2^{-24}$ in
# $[0, 1)$ is a float32 exactly. PyTorch keeps the low 24 bits of a word,
# $b = y \bmod 2^{24}$, and takes
#
# $$ u = b \cdot 2^{-24} . \tag{1.14.8} $$
#
# With all 32 bits, $b \cdot 2^{-32}$ would have to be rounded, and words near
# the top would round to 1, which (1.14.8) never gives. For a float64 it joins
# two words, the first above the second, and keeps 53 bits. `uniform` and
# `uniform64` above do so.

# %% exact, and never 1
u = MersenneTwister(1).uniform(1 << 16)
grid = u.astype(np.float64) * 2**24
verdict("uniform", bool((grid == np.floor(grid)).all()), "multiples of 2^-24")
verdict("24 bits", np.float32(2**24 - 1) / np.float32(2**24) < 1, "below 1")
verdict("32 bits", np.float32(2**32 - 1) / np.float32(2**32) == 1, "reach 1")

# %% [markdown]
# ## Normals: the polar change of variables
#
# The normal distribution has density
# $\varphi(x) = e^{-x^2/2} / \sqrt{2\pi}$. Its integral has no closed form,
# but that of *two* independent normals has. Their joint density depends on
# the distance from the origin alone:
#
# $$ \varphi(x)\, \varphi(y)\, dx\, dy
#    = \frac{1}{2\pi}\, e^{-(x^2 + y^2)/2}\, dx\, dy . \tag{1.14.9} $$
#
# Go to polar coordinates, $x = r \cos\theta$ and $y = r \sin\theta$. The
# area element becomes $dx\, dy = r\, dr\, d\theta$, because the determinant
# of the derivatives is
# $\cos\theta \cdot r \cos\theta + r \sin\theta \cdot \sin\theta = r$. So
#
# $$ \varphi(x)\, \varphi(y)\, dx\, dy
#    = \frac{d\theta}{2\pi} \cdot r\, e^{-r^2/2}\, dr . \tag{1.14.10} $$
#
# This is a product of a factor in $\theta$ and a factor in $r$: the angle
# and the radius are independent. The angle is uniform on a full turn. The
# radius has a distribution function that we can integrate,
#
# $$ P(R \le r) = \int_0^r t\, e^{-t^2/2}\, dt = 1 - e^{-r^2/2} ,
#    \tag{1.14.11} $$
#
# and a uniform $u_1$ becomes such a radius if we set it equal to the
# distribution function and solve for $r$: then $R \le r$ exactly when
# $u_1 \le 1 - e^{-r^2/2}$, which has the probability it should. With a second
# uniform for the angle,
#
# $$ r = \sqrt{-2 \ln(1 - u_1)} , \qquad \theta = 2\pi u_2 , \tag{1.14.12} $$
#
# $$ z_1 = r \cos\theta , \qquad z_2 = r \sin\theta . \tag{1.14.13} $$
#
# Two uniforms in, two independent normals out. This is the Box-Muller
# transform. $1 - u_1$ lies in $(0, 1]$, so the logarithm is finite.
#
# By hand: $u_1 = 1 - e^{-2}$ gives radius 2, and $u_2 = \tfrac14$ a quarter
# turn, so the pair is $(0, 2)$.
#
# PyTorch fills an array with uniforms first, then transforms it in place, in
# blocks of 16. In a block number $j$ gives the radius and number $j + 8$ the
# angle, for $j < 8$; the cosine goes back to place $j$, the sine to $j + 8$.
# All of it is float32.


# %% sixteen uniforms become sixteen normals tags=["export"]
def box_muller(uniforms, mean, std):
    """Turn uniforms into normals, in blocks of 16 as PyTorch does.

    uniforms: float32 (n), n a multiple of 16. In each block, number j < 8
    gives the radius and number j + 8 the angle of one pair, whose cosine
    goes to place j and whose sine to place j + 8. Returns float32 (n).
    """
    u = uniforms.reshape(-1, 2, 8)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - u[:, 0]))
    angle = np.float32(2 * np.pi) * u[:, 1]
    normals = np.empty_like(u)
    np.multiply(radius, np.cos(angle), out=normals[:, 0])
    np.multiply(radius, np.sin(angle), out=normals[:, 1])
    normals *= np.float32(std)
    normals += np.float32(mean)
    return normals.reshape(-1)


# %% the pair by hand, in one block
block = np.zeros(16, np.float32)
block[0], block[8] = 1 - np.exp(-2), 0.25
z = box_muller(block, 0.0, 1.0)
compare("(0, 2)", z[[0, 8]], np.array([0.0, 2.0]), tol=1e-6)

# %% a million normals
z = box_muller(MersenneTwister(2).uniform(1 << 20), 0.0, 1.0)
z = z.astype(np.float64)
moments = np.array([z.mean(), (z**2).mean(), (z**3).mean(), (z**4).mean()])
compare("four moments", moments, np.array([0.0, 1, 0, 3]), tol=0.01)

# %% [markdown]
# The moments of the standard normal are 0, 1, 0 and 3. Of a million draws
# the fourth is uncertain by about $\sqrt{96 / 2^{20}} = 0.0096$; divided by
# 3, as `compare` does, the tolerance of 0.01 is three times that.
#
# The figure shows what (1.14.12) does to a square: it wraps it around the
# origin.


# %% lines in the unit square and where they go
def wrap(u1, u2):
    r, angle = np.sqrt(-2 * np.log(1 - u1)), 2 * np.pi * u2
    return r * np.cos(angle), r * np.sin(angle)


fig, axes = plt.subplots(1, 2, figsize=(7.6, 3.8), dpi=100)
t, points = np.linspace(0, 0.9997, 400), rng.random((2, 400))
for ax, place in zip(axes, (lambda a, b: (a, b), wrap), strict=True):
    for c in (0.2, 0.4, 0.6, 0.8, 0.95):
        ax.plot(*place(np.full(400, c), t), c=PALETTE["blue"], lw=1)
    for c in np.arange(8) / 8:
        ax.plot(*place(t, np.full(400, c)), c=PALETTE["orange"], lw=1)
    ax.plot(*place(*points), ".", c=PALETTE["ink"], ms=2)
axes[0].set(xlabel="$u_1$", ylabel="$u_2$", title="uniforms")
axes[1].set(xlabel="$z_1$", ylabel="$z_2$", title="normals", aspect="equal")
axes[1].set(xlim=(-3.6, 3.6), ylim=(-3.6, 3.6))
axes[0].set_aspect("equal")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.14.4. Box-Muller wraps the unit square around the origin: upright
# lines of constant $u_1$ become circles, level lines of constant $u_2$
# become rays, and 400 points strewn over the square become a round cloud that
# is densest in the middle.*

# %% [markdown]
# ## The last sixteen, and fewer than sixteen
#
# What if the size is not a multiple of 16? PyTorch fills the whole array
# with uniforms, transforms the whole blocks, and then draws 16 fresh
# uniforms for the *last* 16 places, of which some already held normals. For
# 21 numbers it draws $21 + 16$ words; normals 0 to 4 come from the first
# block and 5 to 20 from the fresh one.
#
# Fewer than 16 numbers take another road: one at a time, in float64. The
# first uniform gives the angle, the second the radius. The cosine is handed
# out and the sine kept for the next call, even if another array is filled in
# between. No tensor of a real model is so small. A tiny one's may be.


# %% one normal at a time tags=["export"]
class ScalarNormals(MersenneTwister):
    """MT19937 with the draws PyTorch makes for fewer than 16 numbers."""

    def __init__(self, seed):
        super().__init__(seed)
        self._spare = None

    def normal(self):
        """One standard normal float; every second one was kept in store."""
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        angle = 2 * math.pi * self.uniform64()
        radius = math.sqrt(-2 * math.log1p(-self.uniform64()))
        self._spare = radius * math.sin(angle)
        return radius * math.cos(angle)


# %% [markdown]
# The generator puts the roads together. It works on 16,384 numbers at a
# time: words, uniforms, radii and angles of a chunk take 128 KiB each at most
# and stay in a core's caches, and no temporary grows with the model.


# %% the size of a chunk tags=["exporti"]
CHUNK = 2**14  # numbers drawn at a time: they stay in the cache


# %% the generator tags=["export"]
class Generator(ScalarNormals):
    """Normal numbers as torch.Generator draws them on the CPU."""

    def normal_(self, array, mean=0.0, std=1.0):
        """Fill a C-contiguous float array in place with N(mean, std**2).

        float64 gets the float32 draws. Raises TypeError or ValueError.
        """
        check_array("normal_: array", array, written=True)
        check_number("normal_: std", std, "at least 0")
        flat, n = array.reshape(-1), array.size
        if n < 16:
            few = [self.normal() * std + mean for _ in range(n)]
            flat[:] = np.array(few, np.float32)
            return
        for start in range(0, n - n % 16, CHUNK):
            u = self.uniform(min(CHUNK, n - n % 16 - start))
            flat[start : start + len(u)] = box_muller(u, mean, std)
        if n % 16:
            self.uint32(n % 16)
            flat[-16:] = box_muller(self.uniform(16), mean, std)


# %% 21 numbers from two blocks
u = MersenneTwister(5).uniform(21 + 16)
want = box_muller(u[:16], 0.0, 1.0)[:5], box_muller(u[21:], 0.0, 1.0)
got = np.empty(21, np.float32)
Generator(5).normal_(got)
verdict(
    "21 numbers", (got == np.concatenate(want)).all(), "5 + 16, bit by bit"
)

# %% [markdown]
# ## Proof
#
# No gradient is derived here, so the proof is against what we claim to
# reproduce. `tests/data/parity_draws.json` holds numbers that PyTorch drew,
# recorded by `tests/record_parity.py`: from one generator 3 numbers, then
# 16, then 21, then 5. The 3 leave a spare, which the 5 take up after two
# arrays in between.

# %% what PyTorch drew
recorded = json.loads(Path("../../tests/data/parity_draws.json").read_text())
print("torch", recorded["torch"], "with", recorded["capability"])
generator = Generator(recorded["seed"])
for n, draws in recorded["golden"].items():
    got = np.empty(int(n), np.float32)
    generator.normal_(got)
    compare(f"{n} numbers", got, np.array(draws), tol=1e-6)

# %% [markdown]
# Bits and uniforms are equal exactly. The normals may differ in the last
# place, because PyTorch and NumPy each have their own float32 logarithm,
# sine and cosine. The recording compared 16.8 million draws:

# %% how far apart
print("draws compared     ", recorded["compared"])
print("equal to the bit   ", f"{recorded['equal_to_the_bit']:.3f}")
print("largest difference ", f"{recorded['largest_difference']:.1e}")
print("float32 spacing at 4", f"{np.spacing(np.float32(4)):.1e}")

# %% [markdown]
# In most of the draws not one bit differs. The largest difference, 1.5
# spacings of float32 at 4, shrinks with the numbers: of a weight with
# standard deviation 0.02 it is 50 times smaller.
#
# Would a mistake be seen? Pair each uniform with its neighbour, 0 with 1 and
# 2 with 3, instead of with the one eight places on. The normals are every
# bit as good: a test of their moments cannot tell. The recorded draws can.


# %% an order made wrong on purpose
def neighbours(uniforms):
    pairs = uniforms.reshape(-1, 8, 2).transpose(0, 2, 1).reshape(-1)
    z = box_muller(pairs, 0.0, 1.0)
    return z.reshape(-1, 2, 8).transpose(0, 2, 1).reshape(-1)


z = neighbours(MersenneTwister(2).uniform(1 << 20)).astype(np.float64)
moments = np.array([z.mean(), (z**2).mean(), (z**3).mean(), (z**4).mean()])
compare("four moments", moments, np.array([0.0, 1, 0, 3]), tol=0.01)
twister = MersenneTwister(recorded["seed"])
twister.uint32(8)  # the first 3 numbers took two pairs of uniform64
got = neighbours(twister.uniform(16))
try:
    compare("16 numbers", got, np.array(recorded["golden"]["16"]), tol=1e-6)
    caught = False
except AssertionError:
    caught = True
verdict("the mistake", caught, "is caught")

# %% [markdown]
# ## The weights of a new model
#
# What is left is the order of the tensors: `wte`, `wpe`, then block by block
# `qkvw`, `attprojw`, `fcw`, `fcprojw`. It is the order in which a PyTorch
# model of this shape holds its parameters, with the vocabulary as it is: the
# padded rows of `wte` take no draws and stay 0. For a model in float64 the
# float32 draws are cast, so that both precisions start at the same point.


# %% the weights of a new model tags=["export"]
def init_params(params, cfg, seed):
    """Fill a model's 16 parameter tensors for training from scratch.

    params: name -> array in the shapes of parameter_shapes(cfg), float32 or
    float64 (the float32 draws, cast). Weights are N(0, 0.02**2), those that
    write into the residual stream divided by sqrt(2 L); biases and padded
    rows of wte are 0, layernorm weights 1. Raises TypeError or ValueError.
    """
    for name, shape in parameter_shapes(cfg).items():
        check_array(f"init_params: {name}", params[name], shape, written=True)
    for name in parameter_shapes(cfg):
        params[name].fill(name in ("ln1w", "ln2w", "lnfw"))
    generator = Generator(seed)
    generator.normal_(params["wte"][: cfg.vocab_size], std=0.02)
    generator.normal_(params["wpe"], std=0.02)
    small = 0.02 / math.sqrt(2 * cfg.num_layers)
    stds = {"qkvw": 0.02, "attprojw": small, "fcw": 0.02, "fcprojw": small}
    for layer in range(cfg.num_layers):
        for name, std in stds.items():
            generator.normal_(params[name][layer], std=std)


# %% a small model, initialised
cfg = GPT2Config(
    max_seq_len=64, vocab_size=331, num_layers=3, num_heads=4, channels=64
)
shapes = parameter_shapes(cfg)
params = {name: np.empty(s, np.float32) for name, s in shapes.items()}
init_params(params, cfg, seed=42)
for name in ("wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw"):
    drawn = params[name][: cfg.vocab_size] if name == "wte" else params[name]
    small = name in ("attprojw", "fcprojw")
    want = 0.02 / np.sqrt(2 * cfg.num_layers) if small else 0.02
    ok = bool(abs(drawn.std() / want - 1) < 0.05)
    verdict(name, ok, f"std within 5 % of {want:.4f}")

# %% what is not drawn
zero = not params["wte"][cfg.vocab_size :].any()
verdict("wte", zero, "padded rows are 0")
biases = [name for name in params if name.endswith("b")]
verdict("biases", not any(params[n].any() for n in biases), "are 0")
ones = all((params[n] == 1).all() for n in ("ln1w", "ln2w", "lnfw"))
verdict("layernorm", ones, "weights are 1")

# %% the same start in float64
doubles = {name: np.empty(s) for name, s in shapes.items()}
init_params(doubles, cfg, seed=42)
same = all((doubles[n] == params[n]).all() for n in params)
verdict("float64", same, "holds the float32 draws")

# %% [markdown]
# And a seed or an array that does not fit is refused:

# %% what does not fit
for attempt in (
    lambda: Generator(-1),
    lambda: Generator(0).normal_(np.empty((4, 4), np.float32).T[:2]),
    lambda: init_params(params | {"wpe": params["wte"]}, cfg, 42),
):
    try:
        attempt()
    except ValueError as error:
        print(error)

# %% [markdown]
# ## Count it
#
# One word a number, and 16 more for each array whose size is no multiple of
# 16. For GPT-2 124M no such array occurs:

# %% words drawn for GPT-2 124M
cfg124 = GPT2Config()
L, C = cfg124.num_layers, cfg124.channels
arrays = [cfg124.vocab_size * C, cfg124.max_seq_len * C]
arrays += L * [3 * C * C, C * C, 4 * C * C, 4 * C * C]
words = sum(n + 16 * (n % 16 > 0) for n in arrays)
print(f"{len(arrays)} arrays, {words:,} words, {words // 2:,} pairs")

# %% [markdown]
# A pair costs one logarithm, one root, one sine and one cosine. NumPy
# computes them with vector instructions; `math` computes one at a time.

# %% time for a million, and for the model tags=["nbval-ignore-output"]
million = np.empty(1 << 20, np.float32)
each = fastest(Generator(3).normal_, million, runs=5) / million.size
scalar = ScalarNormals(3)
plain = fastest(lambda: [scalar.normal() for _ in range(5_000)], runs=3)
print(machine())
print(
    f"one at a time {plain / 5e3 * 1e9:.0f} ns, in chunks {each * 1e9:.1f} ns"
)
print(f"124M weights in {words * each:.1f} s")

# %% [markdown]
# ## What parity will mean
#
# [Chapter 1.15](15_model.ipynb) sets the model against PyTorch's, and because
# both start from one set of weights the comparison can be sharp. *Parity* is
# three statements, each with its tolerance:
#
# - **The same start.** Every weight equals PyTorch's for the same seed, up
#   to the last places of a float32: $2 \cdot 10^{-8}$ at most.
# - **The same function.** From equal weights, in float64, the losses of ten
#   AdamW steps, the logits and all 16 gradients agree to $10^{-13}$. Two
#   programs that compute different functions do not agree to 13 digits by
#   accident; a forgotten bias or a wrong $\epsilon$ shows long before.
# - **The same up to rounding.** In float32, which training uses, sums in
#   another order round differently. The losses agree to $10^{-6}$, relative;
#   the logits to $2 \cdot 10^{-6}$ and a gradient tensor to
#   $5 \cdot 10^{-6}$: the norm of the difference over the norm.
#
# These are limits, each some way above what was measured. Four configurations,
# two of them with odd sizes, were recorded once with PyTorch, and
# `tests/test_parity.py` holds our model to them. The second and third
# statement start from PyTorch's recorded weights. The first is what lets a run
# start from a bare seed and still be compared: losses from other weights
# differ by far more than rounding, and a small mistake would hide there for
# ever.

# %% [markdown]
# ## Take away
#
# - A linear layer multiplies the mean square by $C \sigma^2$, forward, and
#   likewise backward: the standard deviation decides whether depth is
#   possible.
# - LayerNorm makes up for a $\sigma$ that is off. The residual sum grows with
#   depth, hence $1/\sqrt{2L}$ on the matrices that write into the stream.
# - A seed becomes 624 words, words become uniforms, pairs of uniforms become
#   pairs of normals. Each step is short, and its order is part of it.
# - Equal draws let a run that starts from a seed be compared with PyTorch's,
#   number by number, where otherwise only statistics could be.

# %% [markdown]
# ## Design note
#
# NumPy's own `Generator.normal` would have been one line and is as good a
# source. It draws other numbers, though, and our model could then be
# compared with PyTorch's only by carrying weights across, never from a bare
# seed. So we pay a page of code for equal draws.
#
# MT19937 has a price too: word $k + 1$ needs the words before it, so one
# thread draws them all. Counter-based generators, such as Philox, compute
# word $k$ from $k$ alone, in any order and on any number of threads.
# PyTorch uses Philox on a GPU, and so the same seed gives other weights
# there than on the CPU. We hold to the CPU's, whatever the model will run
# on.

# %% [markdown]
# ## Exercises
#
# **1** (★). What is the largest number that `normal_` can write into a
# large array with mean 0 and standard deviation 1?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# The smallest $1 - u_1$ is $2^{-24}$, so the largest radius is
# $\sqrt{2 \cdot 24 \ln 2} = 5.77$. No weight of a new GPT-2 exceeds
# $5.77 \cdot 0.02$.
# :::

# %% exercise 1, the extreme pair tags=["hide-cell"]
block = np.zeros(16, np.float32)
block[0] = 1 - 2**-24
largest = box_muller(block, 0.0, 1.0).max()

# %% exercise 1, checked
want = np.sqrt(48 * np.log(2))
compare("largest", largest, want, tol=1e-6)

# %% [markdown]
# **2** (★★). A stack of linear layers with a GELU after each has no
# LayerNorm and no residual connections. Which standard deviation keeps the
# mean square of the activations at 1, layer after layer? You need the mean
# of $\operatorname{GELU}(z)^2$ for a standard normal $z$; take it
# numerically.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# Say $\overline{x^2} = 1$ enters a layer. By (1.14.1) the layer's output is
# close to normal with variance $C \sigma^2$. GELU is not homogeneous, so we
# look for the $\sigma$ at which $\overline{x^2}$ stays at 1: with variance
# $v = C\sigma^2$ it must hold that the mean of
# $\operatorname{GELU}(\sqrt v z)^2$ is 1. Halving an interval finds
# $v \approx 2.15$, so $\sigma = \sqrt{2.15 / C}$.
# :::


# %% exercise 2, solve for the variance tags=["hide-cell"]
def mean_square(v):
    z = np.linspace(-9, 9, 20_001)
    out = np.empty_like(z)
    gelu_forward(out, np.sqrt(v) * z)
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    return (out**2 * density).sum() * (z[1] - z[0])


low, high = 1.0, 4.0
for _ in range(50):
    v = (low + high) / 2
    low, high = (v, high) if mean_square(v) < 1 else (low, v)
print(f"v = {v:.2f}")

# %% exercise 2, checked
x = rng.normal(size=(256, 1024))
for _ in range(6):
    x = x @ rng.normal(0, np.sqrt(v / 1024), (1024, 1024))
    gelu_forward(x, x)
verdict("six layers", abs(rms(x) - 1) < 0.15, "keep RMS 1 within 15 %")

# %% [markdown]
# **3** (★★). Two models differ in one thing: the second has one token more
# in its vocabulary. Both are drawn from one seed, with $C = 64$. Which
# entries of `wpe` do they share? Predict, then check.
#
# :::{admonition} Solution to exercise 3
# :class: dropdown
# The extra row of `wte` takes 64 words, four blocks of 16, and the rest of
# the stream moves by one row. Row $i$ of the second `wpe` is drawn from the
# words of row $i + 1$ of the first; its last row comes from words that the
# first used for `qkvw`.
# :::

# %% exercise 3, one token more tags=["hide-cell"]
more = GPT2Config(64, 332, 3, 4, 64)
other = {n: np.empty(s, np.float32) for n, s in parameter_shapes(more).items()}
init_params(other, more, seed=42)

# %% exercise 3, checked
moved = (other["wpe"][:-1] == params["wpe"][1:]).all()
verdict("wpe", bool(moved), "moved by one row")
same = np.isin(other["wpe"], params["wpe"]).all(axis=1)
verdict("rows shared", int(same.sum()) == 63, "63 of 64")

# %% [markdown]
# **4** (★★★). MT19937 is no secret: whoever sees 624 words in a row can
# foretell all that follow. Undo the tempering (1.14.7), rebuild the state, and
# foretell.
#
# :::{admonition} Solution to exercise 4
# :class: dropdown
# Each line of (1.14.7) can be undone. In $y \oplus (y \gg 11)$ the top 11 bits
# are those of $y$; xor them, shifted, into the next 11, and so on down.
# Repeating $y \leftarrow z \oplus (y \gg 11)$ from $y = z$ gets 11 more bits
# right each time; the left shifts go the same way from the other end. The
# 624 untempered words are a state, and (1.14.6) does the rest.
# :::


# %% exercise 4, undo the tempering tags=["hide-cell"]
def undo(z, step, times):
    y = z
    for _ in range(times):
        y = z ^ step(y)
    return y


def untemper(z):
    z = undo(z, lambda y: y >> 18, 2)
    z = undo(z, lambda y: y << 15 & 0xEFC60000, 3)
    z = undo(z, lambda y: y << 7 & 0x9D2C5680, 5)
    return undo(z, lambda y: y >> 11, 3)


# %% exercise 4, foretell tags=["hide-cell"]
def foretell(seen, n):
    x = [untemper(word) for word in seen]
    for _ in range(n):
        h = x[-624] & 0x80000000 | x[-623] & 0x7FFFFFFF
        x.append(x[-227] ^ h >> 1 ^ (0x9908B0DF if h & 1 else 0))
    return [temper(word) for word in x[-n:]]


# %% exercise 4, checked
twister = MersenneTwister(2024)
seen = twister.uint32(624).tolist()
verdict("1,000 words", foretell(seen, 1000) == twister.uint32(1000).tolist(),
        "foretold")  # fmt: skip

# %% [markdown]
# ## Further reading
#
# - Matsumoto and Nishimura (1998),
#   [Mersenne Twister](https://doi.org/10.1145/272991.272995): section 2 for
#   the recurrence and the tempering, and why the period is what it is.
# - Box and Muller (1958),
#   [A Note on the Generation of Random Normal Deviates](https://doi.org/10.1214/aoms/1177706645):
#   two pages, with the argument of (1.14.9) to (1.14.13).
# - Glorot and Bengio (2010),
#   [Understanding the difficulty of training deep feedforward neural networks](https://proceedings.mlr.press/v9/glorot10a.html):
#   (1.14.1) forward and backward, and measured figures like 12.2.
# - He et al. (2015),
#   [Delving Deep into Rectifiers](https://arxiv.org/abs/1502.01852):
#   the calculation of exercise 2 for ReLU, where it has a closed form.
# - Radford et al. (2019),
#   [Language Models are Unsupervised Multitask Learners](https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf):
#   section 2.3 scales the weights of residual layers as (1.14.4) does.
# - The PyTorch authors,
#   [Reproducibility](https://docs.pytorch.org/docs/stable/notes/randomness.html):
#   what PyTorch promises about equal results, and what it does not.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.14")
