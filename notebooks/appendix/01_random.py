# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       model.random: "Random numbers, bit for bit and draw for draw PyTorch's."
# ---

# %% [markdown]
# # Random numbers: draw what PyTorch draws
#
# > A seed becomes 624 words, words become uniforms, pairs of uniforms become
# > pairs of normals; with PyTorch's order of each step, one seed gives one
# > model.
#
# *Reading time: 25 minutes. You need: Python, logarithms and polar
# coordinates, and no other chapter.*

# %% [markdown]
# ## Where we are
#
# The first weights of a model are random
# ([chapter 1.15](../1_by_hand/15_weights.ipynb)). NumPy would draw them in
# one line. This chapter draws them itself, for one reason: a model that
# begins with the very weights that PyTorch's begins with can be compared with
# it number by number, from nothing but a seed. At its end you can
#
# - make random bits with MT19937, uniforms from bits, normals from uniforms;
# - derive the Box-Muller transform;
# - draw the very numbers that PyTorch draws from the same seed;
# - say why a test of moments does not find a wrong order, and what does.

# %% [markdown]
# ## Setup

# %% setup
import json
from collections import deque
from pathlib import Path

import matplotlib.pyplot as plt

from llmnb.book.diagram import PALETTE
from llmnb.book.verify import compare, verdict
from llmnb.timing import fastest, machine

# %% imports tags=["export"]
import math

import numpy as np

from llmnb.checks import check_array
from llmnb.shapes import check_number

# %% the seed of what is drawn here
rng = np.random.default_rng(11)

# %% [markdown]
# ## Bits: MT19937
#
# A computer draws random numbers by a recurrence that looks like chance but
# is fixed by its start, the *seed*. PyTorch uses MT19937, the Mersenne
# Twister, on the CPU. Its state is 624 words of 32 bits. From a seed $s$
# they are filled by
#
# $$
# \begin{aligned}
# x_0 &= s , \\
# x_i &= \bigl( 1812433253\, (x_{i-1} \oplus (x_{i-1} \gg 30)) \\
#    &\qquad {} + i \bigr) \bmod 2^{32} ,
# \end{aligned}
# \tag{A.1.1}
# $$
#
# where $\oplus$ is the exclusive or, bit by bit, and $\gg$ shifts right.
# Each following word mixes three earlier ones. Let $h$ be the word whose top
# bit is that of $x_k$ and whose other 31 bits are those of $x_{k+1}$. Then
#
# $$
# \begin{aligned}
# x_{k+624} &= x_{k+397} \oplus (h \gg 1) \\
#    &\quad {} \oplus \begin{cases} 0 & h \text{ even} \\
#    \texttt{9908B0DF}_{16} & h \text{ odd.} \end{cases}
# \end{aligned}
# \tag{A.1.2}
# $$
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
#    y &\leftarrow y \oplus (y \gg 18) \end{aligned} \tag{A.1.3} $$
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
# from (A.1.1), so we fill in the 624 words ourselves. Position 624 says that
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
verdict("MersenneTwister", same, "10,000 words as (A.1.1) to (A.1.3)")

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
# $$ u = b \cdot 2^{-24} . \tag{A.1.4} $$
#
# With all 32 bits, $b \cdot 2^{-32}$ would have to be rounded, and words near
# the top would round to 1, which (A.1.4) never gives. For a float64 it joins
# two words, the first as the high half, and keeps 53 bits. `uniform` and
# `uniform64` do so.

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
#    = \frac{1}{2\pi}\, e^{-(x^2 + y^2)/2}\, dx\, dy . \tag{A.1.5} $$
#
# Go to polar coordinates, $x = r \cos\theta$ and $y = r \sin\theta$. The
# area element becomes $dx\, dy = r\, dr\, d\theta$, because the determinant
# of the derivatives is
# $\cos\theta \cdot r \cos\theta + r \sin\theta \cdot \sin\theta = r$. So
#
# $$ \varphi(x)\, \varphi(y)\, dx\, dy
#    = \frac{d\theta}{2\pi} \cdot r\, e^{-r^2/2}\, dr . \tag{A.1.6} $$
#
# This is a product of a factor in $\theta$ and a factor in $r$: the angle
# and the radius are independent. The angle is uniform on a full turn. The
# radius has a distribution function that we can integrate,
#
# $$ P(R \le r) = \int_0^r t\, e^{-t^2/2}\, dt = 1 - e^{-r^2/2} ,
#    \tag{A.1.7} $$
#
# and a uniform $u_1$ becomes such a radius if we set it equal to the
# distribution function and solve for $r$: then $R \le r$ exactly when
# $u_1 \le 1 - e^{-r^2/2}$, which has the probability it should. With a second
# uniform for the angle,
#
# $$ r = \sqrt{-2 \ln(1 - u_1)} , \qquad \theta = 2\pi u_2 , \tag{A.1.8} $$
#
# $$ z_1 = r \cos\theta , \qquad z_2 = r \sin\theta . \tag{A.1.9} $$
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
# The figure shows what (A.1.8) does to a square: it wraps it around the
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
# *Figure A.1.1. Box-Muller wraps the unit square around the origin: upright
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


# %% how many at a time tags=["exporti"]
AT_ONCE = 2**14  # numbers drawn at a time: they stay in the cache


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
        for start in range(0, n - n % 16, AT_ONCE):
            u = self.uniform(min(AT_ONCE, n - n % 16 - start))
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
# ## Count it
#
# One word a number, and 16 more for each array whose size is no multiple of
# 16. A pair of normals costs one logarithm, one root, one sine and one
# cosine. NumPy computes them with vector instructions; `math` computes one at
# a time.

# %% time for a million, and for the model tags=["nbval-ignore-output"]
million = np.empty(1 << 20, np.float32)
each = fastest(Generator(3).normal_, million, runs=5) / million.size
scalar = ScalarNormals(3)
plain = fastest(lambda: [scalar.normal() for _ in range(5_000)], runs=3)
print(machine())
print(
    f"one at a time {plain / 5e3 * 1e9:.0f} ns, in chunks {each * 1e9:.1f} ns"
)
print(f"124M weights in {124e6 * each:.1f} s")

# %% [markdown]
# ## Take away
#
# - A seed becomes 624 words, words become uniforms, pairs of uniforms become
#   pairs of normals. Each step is short, and its order is part of it.
# - Two normals are easier than one: in polar coordinates their density is a
#   product, and the radius has an integral that can be inverted.
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
# **2** (★★★). MT19937 is no secret: whoever sees 624 words in a row can
# foretell all that follow. Undo the tempering (A.1.3), rebuild the state, and
# foretell.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# Each line of (A.1.3) can be undone. In $y \oplus (y \gg 11)$ the top 11 bits
# are those of $y$; xor them, shifted, into the next 11, and so on down.
# Repeating $y \leftarrow z \oplus (y \gg 11)$ from $y = z$ gets 11 more bits
# right each time; the left shifts go the same way from the other end. The
# 624 untempered words are a state, and (A.1.2) does the rest.
# :::


# %% exercise 2, undo the tempering tags=["hide-cell"]
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


# %% exercise 2, foretell tags=["hide-cell"]
def foretell(seen, n):
    x = [untemper(word) for word in seen]
    for _ in range(n):
        h = x[-624] & 0x80000000 | x[-623] & 0x7FFFFFFF
        x.append(x[-227] ^ h >> 1 ^ (0x9908B0DF if h & 1 else 0))
    return [temper(word) for word in x[-n:]]


# %% exercise 2, checked
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
#   two pages, with the argument of (A.1.5) to (A.1.9).
# - The PyTorch authors,
#   [Reproducibility](https://docs.pytorch.org/docs/stable/notes/randomness.html):
#   what PyTorch promises about equal results, and what it does not.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("A.1")
