# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       reference.encoder: "The encoder in NumPy: token and position vectors, and their gradients."
# ---

# %% [markdown]
# # Encoder: turn tokens into vectors
#
# > A token's vector is a row of one table plus a row of another; the backward
# > pass adds into the rows that were read.
#
# *Reading time: 22 minutes. You need: [chapter 1.1](01_learns.ipynb) for
# gradients, [chapter 1.2](02_tokens.ipynb) for tokens,
# [chapter 1.4](04_gpt2.ipynb) for the whole model's shape.*
#
# ## Where we are

# %% where we are
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="encoder")

# %% [markdown]
# *Figure 1.5.1. The encoder is the first layer: it turns token numbers into
# the vectors that all other layers work on.*
#
# A token's number means nothing: token 300 is not three times token 100. A
# model needs something that it can shift a little when it learns. So each
# token gets a vector of C numbers, its *embedding*, and these vectors are
# parameters. You have seen such a table: in [chapter 1.1](01_learns.ipynb)
# each letter had a row of logits, read as `W[inputs]`. Here a row has the C
# numbers that later layers work on. A second table holds a vector for each
# position in the text. The encoder adds the two.
#
# This is the first layer that we build, and its chapter has the form of those
# that follow. At its end you can
#
# - say what each of the two tables is for;
# - compute the encoder's output and its gradients by hand;
# - say why a table lookup is a matrix product, and what that view costs;
# - name the line of NumPy that loses gradients, and catch it.
#
# The fast versions: chapters [2.1](../2_cpu/01_compile.ipynb) and
# [3.3](../3_gpu/03_encoder.ipynb).
#
# ## Setup

# %% setup
import matplotlib.pyplot as plt

from llmnb.book.diagram import PALETTE
from llmnb.book.verify import compare, numerical_gradient, verdict

# %% imports of the reference tags=["export"]
import numpy as np

from llmnb.shapes import shapes

# %% the seed
rng = np.random.default_rng(3)

# %% [markdown]
# ## Why two tables
#
# Take a vocabulary of four letters, a to d, with C = 2 *channels*, as the
# numbers of a vector are called. Their embeddings are (1, 0) for a, (0, 1) for
# b, (2, 3) for c and (5, 5) for d. What would the rest of the model see of the
# texts "cac" and "acc", if each letter came as its embedding and as nothing
# else?

# %% without positions
wte = np.array([[1.0, 0], [0, 1], [2, 3], [5, 5]])
cac, acc = np.array([2, 0, 2]), np.array([0, 2, 2])


def bag(vectors):
    """The vectors without their order."""
    return sorted(map(tuple, vectors.tolist()))


verdict("letters alone", bag(wte[cac]) == bag(wte[acc]), "the same vectors")

# %% [markdown]
# The same three vectors, in another order. That would do if the later layers
# knew the order, and they do not. Nearly all of them work on each vector
# alone; attention ([chapter 1.8](08_attention.ipynb)) sees those before it,
# and not in which order they stand: at the end of both words it finds the
# same. So the order must be in the vectors themselves. Add a vector to each that says where it stands:

# %% with positions
wpe = np.array([[10.0, 10], [20, 20], [30, 30], [40, 40]])
differ = bag(wte[cac] + wpe[:3]) != bag(wte[acc] + wpe[:3])
verdict("letters and places", differ, "other vectors")

# %% [markdown]
# ## By hand
#
# Our batch is two texts of three letters, "cac" and "bca". The vector of
# position $t$ is $(10, 10)$, $(20, 20)$, $(30, 30)$ or $(40, 40)$. The first
# letter c becomes $(2, 3) + (10, 10) = (12, 13)$, the a after it
# $(1, 0) + (20, 20) = (21, 20)$, and the second c
# $(2, 3) + (30, 30) = (32, 33)$: one letter, two places, two vectors.

# %% two texts by hand
inp = np.array([[2, 0, 2], [1, 2, 0]], dtype=np.int32)
by_hand = np.array(
    [[[12, 13], [21, 20], [32, 33]], [[10, 11], [22, 23], [31, 30]]]
)

# %% [markdown]
# | tensor | shape | what it holds |
# |---|---|---|
# | `inp` | (B, T) | the tokens: B texts, T tokens in each |
# | `wte` | (Vp, C) | the embedding of each token of the vocabulary |
# | `wpe` | (T_max, C) | the vector of each position |
# | `out` | (B, T, C) | their sums |
#
# T_max is the longest text that the model can read, Vp the padded size of the
# vocabulary ([chapter 1.4](04_gpt2.ipynb)). The names are short for *weights
# of the token embedding* and *of the position embedding*.
#
# ## Forward
#
# Write $x_{b,t}$ for the token at position $t$ of text $b$, $E$ for `wte`
# and $P$ for `wpe`. Channel $i$ of the output is
#
# $$ y_{b,t,i} = E_{x_{b,t},\, i} + P_{t,i} . \tag{1.5.1} $$
#
# `wte[inp]` takes one row of the table for each element of `inp` and has the
# shape (B, T, C); the first T rows of `wpe` are added to every text of the
# batch. The line over the function says what the arrays must be and refuses
# others ([chapter A.9](../appendix/09_checks.ipynb)): B, T and C are any
# sizes, `of Vp` means numbers from 0 to Vp - 1, `T+` a size of at least T, and
# `!` marks what is written.


# %% the forward pass tags=["export"]
@shapes("B T C!, B T of Vp, Vp C, T+ C")
def encoder_forward(out, inp, wte, wpe):
    """Sum the vector of each token and the vector of its position.

    out   (B, T, C)      float, overwritten
    inp   (B, T)         integer, each in [0, Vp)
    wte   (Vp, C)        float, the table of tokens
    wpe   (T_max, C)     float, the table of positions; T <= T_max
    """
    T = inp.shape[1]
    out[...] = wte[inp] + wpe[:T]


# %% the two texts through the function
out = np.zeros((2, 3, 2))
encoder_forward(out, inp, wte, wpe)
compare("by hand", out, by_hand, tol=1e-12)

# %% [markdown]
# **The same as a matrix product.** Give each token a row of length Vp that
# is 1 at the token's number and 0 elsewhere, a *one-hot* row. Write $\delta$
# for 1 where its two indices are equal and 0 otherwise, as in chapter 1.1. The
# one-hot rows of a batch are
#
# $$ O_{b,t,v} = \delta_{v,\, x_{b,t}} , \qquad
#    y_{b,t,i} = \sum_v O_{b,t,v}\, E_{v,i} + P_{t,i} . \tag{1.5.2} $$
#
# The sum over $v$ has one term that is not zero, and it is $E_{x_{b,t},\,i}$.
# So the encoder is a matrix product whose input happens to be one-hot. We use
# this view to derive the gradient, and not to compute:

# %% one-hot rows times the table
onehot = np.eye(4)[inp]
print(onehot[0].astype(int))
compare("one-hot", onehot @ wte + wpe[:3], by_hand, tol=1e-12)

# %% [markdown]
# At GPT-2's size all but one in 50304 of the product's multiplications
# would be by zero:

# %% what the matrix product would cost at GPT-2's size
B, T, C, Vp = 4, 64, 768, 50304
print(f"one-hot product  {2 * B * T * Vp * C:>14,} FLOPs")
print(f"lookup           {B * T * C:>14,} FLOPs")
print(f"one-hot matrix   {4 * B * T * Vp:>14,} bytes")

# %% [markdown]
# ## Backward, derived
#
# **What a layer gets, and what it hands on.** Back-propagation hands each
# layer the derivative of the loss $\mathcal L$ by its output, $dy$, in code
# `dout`. From it the layer works out the derivatives by its parameters, which
# will be moved by them, and by its input, which it hands to the layer before
# it.
#
# So later layers hand us $dy_{b,t,i} = \partial \mathcal L / \partial
# y_{b,t,i}$. Differentiate (1.5.2) by one element of the table, $E_{v,j}$. The
# output $y_{b,t,i}$ depends on it only when the channel is the same and the
# token is $v$:
#
# $$ \frac{\partial y_{b,t,i}}{\partial E_{v,j}}
#    = O_{b,t,v}\, \delta_{i,j} = \delta_{v,\,x_{b,t}}\, \delta_{i,j} .
#    \tag{1.5.3} $$
#
# The chain rule sums over every output that the element reaches, and
# $\delta_{i,j}$ leaves one channel:
#
# $$
# \begin{aligned}
# dE_{v,j} &= \sum_{b,t,i} dy_{b,t,i}\,
#      \frac{\partial y_{b,t,i}}{\partial E_{v,j}} \\
#   &= \sum_{b,t} \delta_{v,\,x_{b,t}}\, dy_{b,t,j}
#    = \sum_{(b,t)\,:\,x_{b,t} = v} dy_{b,t,j} .
# \end{aligned}
# \tag{1.5.4}
# $$
#
# Row $v$ of the gradient is the sum of the rows of $dy$ at all places where
# token $v$ stood, and a token that stands nowhere gets zero. With the $BT$
# places $(b, t)$ as rows of $O$ and of $dy$, (1.5.4) is the matrix product
# $O^\top dy$, the transpose of the lookup: where the forward pass *gathers*
# rows of the table, the backward pass *scatters* rows back and adds where they
# meet.

# %% draw gather and scatter tags=["hide-input"]
fig, axes = plt.subplots(1, 2, figsize=(8.2, 3.1), dpi=100)
word, colours = "cac", ("orange", "blue", "orange")
sums = ("$dy_1$", "0", "$dy_0 + dy_2$", "0")
for ax, way in zip(axes, ("forward", "backward"), strict=True):
    for row, letter in enumerate("abcd"):
        used = PALETTE["pale"] if letter in word else "white"
        box = plt.Rectangle((0, -row), 2.2, 0.75, fc=used, ec=PALETTE["grey"])
        ax.add_patch(box)
        ax.text(-0.25, 0.37 - row, letter, ha="right", va="center", size=12)
        if way == "backward":
            ax.text(1.1, 0.37 - row, sums[row], ha="center", va="center")
    for place, (letter, colour) in enumerate(zip(word, colours, strict=True)):
        at = (5, -0.5 - place)
        box = plt.Rectangle(at, 1.6, 0.75, fc=PALETTE[colour])
        ax.add_patch(box)
        name = f"$y_{place}$" if way == "forward" else f"$dy_{place}$"
        ax.text(5.8, at[1] + 0.37, name, ha="center", va="center",
                color="white", size=12)  # fmt: skip
        ends = [(2.25, 0.37 - "abcd".index(letter)), (4.95, at[1] + 0.37)]
        start, stop = ends if way == "forward" else ends[::-1]
        arrow = {"arrowstyle": "-|>", "lw": 1.6, "color": PALETTE[colour]}
        ax.annotate("", stop, start, arrowprops=arrow)
        ax.text(6.8, at[1] + 0.37, letter, va="center", size=12)
    title = "wte to out: gather" if way == "forward" else "dout to dwte: add"
    ax.set(xlim=(-0.6, 7.2), ylim=(-3.2, 1), title=f"{way}, {title}")
    ax.axis("off")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.5.2. The text "cac". Forward, positions 0 and 2 read the same row
# of the table; backward, that row gets the sum of both gradients, and the rows
# of b and d, which nobody read, get none. (The vectors of the positions are
# left out.)*
#
# The position table enters (1.5.1) once for every text: $P_{t',j}$ reaches
# $y_{b,t,i}$ with factor $1$ when $t = t'$ and $i = j$, and with $0$
# otherwise. The sum over the outputs keeps one position and one channel of
# each text, and no position from $T$ on:
#
# $$
# \begin{aligned}
# dP_{t',j} &= \sum_{b,t,i} dy_{b,t,i}\, \delta_{t,t'}\, \delta_{i,j} \\
#   &= \sum_{b} dy_{b,t',j} & (t' &< T) , \\
# dP_{t',j} &= 0 & (t' &\ge T) .
# \end{aligned}
# \tag{1.5.5}
# $$
#
# The tokens themselves get no gradient: there is no token a little to the side
# of token 300. Here the walk ends.
#
# **What to save.** Neither (1.5.4) nor (1.5.5) contains $E$, $P$ or $y$.
# Backward needs the tokens, which are there already, and no more.


# %% the backward pass tags=["export"]
@shapes("Vp C!, T+ C!, B T C, B T of Vp")
def encoder_backward(dwte, dwpe, dout, inp):
    """Add dout's rows to the rows of the tables that they came from.

    dwte  (Vp, C)        float, added to; rows of absent tokens stay
    dwpe  (T_max, C)     float, added to; rows from T on stay
    dout  (B, T, C)      float
    inp   (B, T)         integer, as in the forward pass
    """
    T = inp.shape[1]
    np.add.at(dwte, inp, dout)
    dwpe[:T] += dout.sum(axis=0)


# %% [markdown]
# Let every row of `dout` be $(1, 1)$. Then row $v$ of `dwte` counts how often
# token $v$ occurs: a twice, b once, c three times, d never. Each position
# occurs in both texts, and position 3 is beyond T. (Both tables are printed
# lying down: a column for each of their rows.)

# %% gradients that count
dwte, dwpe = np.zeros((4, 2)), np.zeros((4, 2))
encoder_backward(dwte, dwpe, np.ones((2, 3, 2)), inp)
print(dwte.T.astype(int))
print(dwpe.T.astype(int))

# %% [markdown]
# Both gradients are *added* to what is there. `wte` has a second use at the
# other end of the model, where it turns vectors into logits
# ([chapter 1.17](17_model.ipynb)), so its gradient is the sum of two layers'
# contributions.
#
# **The trap.** The line `dwte[inp] += dout` looks like (1.5.4) and is not.
# NumPy gathers `dwte[inp]` into a temporary, adds `dout` to that, and writes
# its rows back. All copies of a repeated token start from the same old row,
# and the last one written wins.


# %% the line that loses repeats
def lossy_backward(dwte, dwpe, dout, inp):
    dwte[inp] += dout
    dwpe[: inp.shape[1]] += dout.sum(axis=0)


lost = np.zeros((4, 2))
lossy_backward(lost, np.zeros((4, 2)), np.ones((2, 3, 2)), inp)
print(lost.T.astype(int))

# %% [markdown]
# The letters a and c count once now, and nothing warns you: a frequent token
# would learn from the last of its places only.
#
# ## Proof
#
# Choose a fixed random array $g$ and let $\mathcal L = \sum g \cdot y$, the
# sum of products element by element, so that $dy = g$. The gradients must
# agree with central differences of $\mathcal L$ in float64, with step $h =
# 10^{-5}$. The encoder is linear, so the method has no error of its own and
# only rounding remains, about $10^{-16} / h = 10^{-11}$ times the size of
# $\mathcal L$; we ask for $10^{-8}$. Five tokens at eight places must repeat.
# The gradients start from ones, which must still be there: a backward pass
# that wrote instead of adding would be caught.

# %% a problem to differentiate
B, T, C, Vp, T_max = 2, 4, 3, 5, 6
inp = rng.integers(0, Vp, (B, T), dtype=np.int32)
wte, wpe = rng.normal(size=(Vp, C)), rng.normal(size=(T_max, C))
g, out = rng.normal(size=(B, T, C)), np.empty((B, T, C))


def loss():
    encoder_forward(out, inp, wte, wpe)
    return (g * out).sum()


want = numerical_gradient(loss, wte), numerical_gradient(loss, wpe)
print(inp)


# %% against central differences
def gradients(backward):
    grads = np.ones_like(wte), np.ones_like(wpe)
    backward(*grads, g, inp)
    return [grad - 1 for grad in grads]


for name, got, numeric in zip(
    ("dwte", "dwpe"), gradients(encoder_backward), want, strict=True
):
    compare(name, got, numeric, tol=1e-8)

# %% [markdown]
# The check must also be able to fail. It catches the line of the trap:

# %% a gradient made wrong on purpose
try:
    compare("dwte, lossy", gradients(lossy_backward)[0], want[0], tol=1e-8)
    caught = False
except AssertionError:
    caught = True
verdict("the trap", caught, "is caught")

# %% [markdown]
# On a text without repeats both lines agree. A gradient check proves what its
# example exercises; choose examples that are small in size and rich in cases.
#
# ## See it
#
# Take a short text, one token a letter, and a random gradient `dout` with
# eight channels. The left panel is the transposed one-hot matrix of (1.5.2):
# a row for each letter of the alphabet, a column for each position. The
# right panel is `dwte`: its row for a letter is the sum of `dout`'s rows at
# the positions marked on its left.

# %% the gradient of a short text
text, letters = "to be or not to be", " abcdefghijklmnopqrstuvwxyz"
inp = np.array([[letters.index(c) for c in text]], dtype=np.int32)
dout = rng.normal(size=(1, len(text), 8))
dwte, dwpe = np.zeros((len(letters), 8)), np.zeros((len(text), 8))
encoder_backward(dwte, dwpe, dout, inp)
print(int(dwte.any(axis=1).sum()), "of", len(letters), "rows get a gradient")

# %% draw it tags=["hide-input"]
fig, (left, right) = plt.subplots(
    1, 2, figsize=(8, 6), dpi=100, sharey=True, width_ratios=(18, 10)
)
rows = np.arange(len(letters))
for row in np.unique(inp):
    for ax in (left, right):
        ax.axhspan(row - 0.5, row + 0.5, color=PALETTE["pale"], zorder=0)
left.scatter(np.arange(len(text)), inp[0], s=60, color=PALETTE["blue"])
left.set_xticks(np.arange(len(text)), list(text.replace(" ", "␣")))
left.set_yticks(rows, list(letters.replace(" ", "␣")))
left.set(title="where each letter stands", xlabel="the text, by position")
shown = np.where(dwte.any(axis=1, keepdims=True), dwte, np.nan)
image = right.imshow(shown, cmap="RdBu_r", vmin=-6, vmax=6, aspect="auto")
right.set_xticks(range(8))
right.set(title="dwte", xlabel="channel")
fig.colorbar(image, ax=right, label="gradient")
left.set(xlim=(-0.7, len(text) - 0.3), ylim=(len(letters) - 0.5, -0.5))
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.5.3. Six letters and the space occur in "to be or not to be", and
# only their rows get a gradient. The row of o collects four positions, the row
# of n one.*
#
# ## Count it
#
# The two tables hold $(V_p + T_{max}) C$ parameters. The forward pass makes
# one addition for each of the $B T C$ outputs. The backward pass makes two for
# each number of `dout`: a row of it goes to a row of `dwte` and to a row of
# `dwpe`. Nothing is kept.

# %% the encoder of GPT-2
B, T, C, Vp, T_max = 4, 64, 768, 50304, 1024
print(f"parameters          {(Vp + T_max) * C:>12,}")
print(f"additions, forward  {B * T * C:>12,}")
print(f"additions, backward {2 * B * T * C:>12,}")
print(f"rows of wte read    {B * T:>12,} of {Vp:,}, at most")

# %% [markdown]
# Nearly a third of GPT-2's 124 million parameters stand in these two tables,
# and the encoder touches a few hundred rows of them.
#
# ## Take away
#
# - The encoder adds a row of the token table and a row of the position
#   table. It is a matrix product with one-hot rows, computed as a lookup.
# - Without positions, attention could not tell in which order the tokens
#   before it came.
# - Backward adds each row of `dout` to the row it came from. Repeated tokens
#   add up, and `dwte[inp] += dout` would lose them.
# - A gradient check proves what its example exercises.
#
# ## Design note
#
# GPT-2 learns its position vectors. The first transformer used fixed waves of
# sine and cosine instead, and later models turn vectors inside attention by an
# angle that grows with the position. A learned table ends at T_max: there is
# no vector for position 1024, and that is why the length of the text is
# checked.
#
# ## Exercises
#
# **1** (★). A batch has B = 4 texts of T = 64 tokens, the vocabulary 50257.
# At most how many rows of `dwte` and of `dwpe` get a gradient from the
# encoder? Write it for any B, T and V, and check it on a batch that repeats no
# token before it has used all.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# At most $\min(B T, V) = 256$ rows of `dwte`, and exactly $T = 64$ rows of
# `dwpe`, whatever the tokens are.
# :::


# %% exercise 1, a solution tags=["hide-cell"]
def touched_rows(B, T, V):
    return min(B * T, V), T


# %% exercise 1, checked
for V in (50257, 100):
    dwte, dwpe = np.zeros((V, 1)), np.zeros((1024, 1))
    tokens = np.arange(4 * 64).reshape(4, 64) % V
    encoder_backward(dwte, dwpe, np.ones((4, 64, 1)), tokens)
    counted = [np.count_nonzero(dwte), np.count_nonzero(dwpe)]
    right = counted == [*touched_rows(4, 64, V)]
    verdict(f"V = {V}", right, "as predicted")

# %% [markdown]
# **2** (★★). The encoder is blind to one change of its parameters: add one and
# the same vector to every row of `wte`, subtract it from every row of `wpe`,
# and the output stays the same. What does that say about the gradients? Find
# the equation that ties `dwte` to `dwpe`, and derive it from (1.5.4) and
# (1.5.5) as well.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# The loss does not change along this direction, so the gradient has no
# component along it: $\sum_v dE_{v,j} - \sum_t dP_{t,j} = 0$ for each
# channel $j$. From (1.5.4) and (1.5.5): summed over $v$ or over $t$, both are
# $\sum_{b,t} dy_{b,t,j}$.
# :::


# %% exercise 2, a solution tags=["hide-cell"]
def tie(dwte, dwpe):
    return dwte.sum(axis=0) - dwpe.sum(axis=0)


# %% exercise 2, checked
tokens = rng.integers(0, 11, (3, 20), dtype=np.int32)
dout = rng.normal(size=(3, 20, 6))
dwte, dwpe = np.zeros((11, 6)), np.zeros((20, 6))
encoder_backward(dwte, dwpe, dout, tokens)
compare("the tie", tie(dwte, dwpe), np.zeros(6), tol=1e-12)

# %% [markdown]
# **3** (★★). Add (1.5.4) to `dwte` without `np.add.at` and without a loop:
# sort the places by token, then sum each group of equal tokens.
# `np.argsort`, `np.unique` with `return_index` and `np.add.reduceat` are
# enough.
#
# :::{admonition} Solution to exercise 3
# :class: dropdown
# A stable sort brings equal tokens together and keeps the order of the text
# within each group. `np.unique` gives each token once, so the last line may
# use `+=`: there are no repeats left to lose.
# :::


# %% exercise 3, a solution tags=["hide-cell"]
def by_sorting(dwte, dout, inp):
    order = np.argsort(inp, axis=None, kind="stable")
    tokens, first = np.unique(inp.ravel()[order], return_index=True)
    rows = dout.reshape(-1, dout.shape[-1])[order]
    dwte[tokens] += np.add.reduceat(rows, first, axis=0)


# %% exercise 3, checked
got = np.ones_like(dwte)
by_sorting(got, dout, tokens)
compare("by sorting", got - 1, dwte, tol=1e-12)

# %% [markdown]
# ## Further reading
#
# - Bengio et al. (2003),
#   [A Neural Probabilistic Language Model](https://www.jmlr.org/papers/v3/bengio03a.html):
#   section 2, where a table of word vectors is trained with the network.
# - Vaswani et al. (2017),
#   [Attention Is All You Need](https://arxiv.org/abs/1706.03762):
#   sections 3.4 and 3.5, embeddings and the fixed waves of position.
# - Press and Wolf (2017),
#   [Using the Output Embedding to Improve Language Models](https://arxiv.org/abs/1608.05859):
#   the case for one table at both ends of the model.
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.5")
