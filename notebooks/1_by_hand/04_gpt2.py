# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       config: "The numbers that fix a GPT-2's shape, and what they count."
# ---

# %% [markdown]
# # GPT-2 on one page: the whole before its parts
#
# > The model as one diagram, its shapes, and where its parameters, its
# > operations and its bytes are.
#
# *Reading time: 18 minutes. You need: [chapter 1.3](03_batches.ipynb).*

# %% [markdown]
# ## Where we are
#
# GPT-2 is a function. It takes a row of tokens, and returns for every place in
# the row a logit for each token that might come next, as the table of [chapter
# 1.1](01_learns.ipynb) did. Its loss is that of chapter 1.1 too, and so is
# what training does: a gradient, a step. What is new stands between the tokens
# and the logits. This book builds it and its derivative, and uses no framework
# for either.
#
# This chapter looks at the whole. Do not expect to understand how a part
# works: each has its own chapter. At the end you can
#
# - name the [layers](../../book/glossary.md#term-layer) in the order in which
#   a token meets them;
# - read the sixteen arrays of parameters and their shapes;
# - say where the parameters, the arithmetic and the memory are.

# %% [markdown]
# ## Setup

# %% setup
import matplotlib.pyplot as plt
import numpy as np

from llmnb.book.diagram import BOXES, PALETTE, draw_arrows, draw_box
from llmnb.book.verify import compare, verdict

# %% [markdown]
# ## The model
#
# Most chapters of Part 1 open with this picture and light the part that they
# build. $(B, T, C)$ means $B$ rows of $T$ vectors of $C$ numbers.

# %% the whole of GPT-2 tags=["hide-input"]
stream, wide = "(B, T, C)", "(B, T, 4C)"
shapes = ["", "", "(B, T)", stream]
shapes += [stream, "(B, T, 3C)", stream, stream, stream]
shapes += [stream, wide, wide, stream, stream]
shapes += [stream, "(B, T, Vp)", "(B, T)", "one number", ""]
tensors = ["", "", "", "wte, wpe"]
tensors += ["ln1w, ln1b", "qkvw, qkvb", "", "attprojw, attprojb", ""]
tensors += ["ln2w, ln2b", "fcw, fcb", "", "fcprojw, fcprojb", ""]
tensors += ["lnfw, lnfb", "wte", "", "", ""]

fig, ax = plt.subplots(figsize=(8, 5.4), dpi=100)
ax.add_patch(plt.Rectangle((-0.52, -2.88), 5.08, 2.22, fc=PALETTE["pale"]))
draw_arrows(ax)
for (label, _, x, y), shape, held in zip(BOXES, shapes, tensors, strict=True):
    draw_box(ax, label, x, y, lit=False)
    aside = 0.33 * label.startswith(("encoder", "residual"))  # of an arrow
    style = {"ha": "center", "va": "center", "size": 8}
    ax.text(x + aside, y - 0.36, shape, **style)
    ax.text(x + aside, y - 0.5, held, color=PALETTE["blue"], **style)
ax.text(4.5, -0.62, "one block, L times", ha="right", size=10)
tie = {"color": PALETTE["purple"], "lw": 1.5, "ls": "--"}
ax.plot([3.43, 4.75, 4.75, 1, 1], [0.1, 0.1, -4.15, -4.15, -4.02], **tie)
ax.text(4.7, 0.32, "wte: one table, used at both ends",
        ha="right", size=9, color=PALETTE["purple"])  # fmt: skip
ax.set(xlim=(-0.55, 4.85), ylim=(-4.25, 0.5))
ax.axis("off")
fig.subplots_adjust(0, 0, 1, 1)
plt.show()

# %% [markdown]
# *Figure 1.4.1. Text becomes tokens, tokens become vectors; L blocks work on
# the vectors; a last product turns them into logits. A block has two halves,
# and each half adds its result to what came in. Below a box: the shape that
# leaves it, and in blue the parameters that it holds. Vp is the size of the
# vocabulary, rounded up.*
#
# Follow one token through it.
#
# 1. **Tokens.** Text is cut into pieces, and each piece has a number between
#    0 and 50,256 ([chapter 1.2](02_tokens.ipynb)).
# 2. **Encoder.** The number picks a row of a table: a *vector* of 768
#    numbers. A second table adds a vector for its *position*, the place in the
#    row ([chapter 1.5](05_encoder.ipynb)). From here to the end the token *is*
#    this vector.
# 3. **Block**, twelve times. Its first half lets the token look at the tokens
#    before it: LayerNorm brings the vector to a common size
#    ([chapter 1.6](06_layernorm.ipynb)), a matrix product makes three vectors
#    of it, called q, k and v ([chapter 1.7](07_matmul.ipynb)), attention, the
#    one layer in which tokens meet, mixes those of different tokens ([chapter
#    1.8](08_attention.ipynb)), another product returns to 768 numbers, and the
#    result is *added* to the vector ([chapter 1.10](10_residual.ipynb)). One
#    can only add what has the same size, so the vector has 768 numbers
#    throughout. The second half, called *feed-forward* or *MLP* (multi-layer
#    perceptron), works on each token alone: up to 3,072 numbers, through a
#    curve called GELU ([chapter 1.9](09_gelu.ipynb)), back down to 768, and
#    added.
# 4. **Logits.** A last LayerNorm, and a product with the first table: one
#    logit for each of the 50,257 pieces.
# 5. **Loss.** Softmax and the logarithm, as in chapter 1.1. Here their pair is
#    called cross-entropy ([chapter 1.11](11_crossentropy.ipynb)). The mean over
#    all places is the one number that training lowers.
#
# Models that are built of such blocks are called
# [transformers](../../book/glossary.md#term-transformer).
#
# Then everything runs backwards, box by box, as chapter 1.1 did with two
# steps. AdamW, a wiser step than (1.1.3), moves the parameters a little
# ([chapter 1.12](12_adamw.ipynb)).

# %% [markdown]
# ## Five numbers fix it
#
# | symbol | name in code | GPT-2 124M | what it counts |
# |---|---|---|---|
# | $T_{max}$ | `max_seq_len` | 1024 | places the model knows |
# | $V$ | `vocab_size` | 50257 | pieces of text it knows |
# | $L$ | `num_layers` | 12 | blocks |
# | $NH$ | `num_heads` | 12 | heads of attention in a block |
# | $C$ | `channels` | 768 | numbers in a token's vector |
# | $V_p$ | `padded_vocab_size` | 50304 | $V$ rounded up to a multiple of 128 |
#
# The last follows from $V$. A *head* is one of the equal parts, of $C / NH$
# numbers each, into which attention divides a vector, so $C$ must be a
# multiple of $NH$.
#
# Two more numbers belong to the batch: $B$ rows of $T$ tokens go through at
# once. The padding of the vocabulary adds rows to the token table that no
# token uses; it makes the largest product of the model a round size, which
# suits hardware, and we shall see to it that these rows get no probability.
#
# The next class holds the five. Four names (`family`, `norm`, `feedforward`,
# `bias`) say of what a block is made, and `num_kv_heads` counts the heads that
# have a k and a v of their own. For GPT-2 they are fixed, and you can pass
# them over: they leave room for models whose blocks differ ([chapter
# 1.13](13_block.ipynb)).

# %% imports of the configuration tags=["export"]
from dataclasses import dataclass
from numbers import Integral
from typing import ClassVar


# %% the configuration tags=["export"]
@dataclass(frozen=True)
class GPT2Config:
    """The numbers that fix a GPT-2's shape; the defaults are its 124M.

    max_seq_len: positions the model knows. vocab_size: tokens it knows (V).
    num_layers (L), num_heads (NH) and channels (C): C must be a multiple of
    NH. Every number must be a positive integer, or ValueError is raised.
    """

    max_seq_len: int = 1024
    vocab_size: int = 50257
    num_layers: int = 12
    num_heads: int = 12
    channels: int = 768

    family: ClassVar[str] = "gpt2"
    # what its blocks are made of, by the names in llmnb.model.parts
    norm: ClassVar[str] = "layernorm"
    feedforward: ClassVar[str] = "gelu"
    bias: ClassVar[bool] = True  # whether linear layers have one

    def __post_init__(self):
        for name, value in vars(self).items():
            whole = isinstance(value, Integral) and value is not True
            if not whole or value < 1:
                raise ValueError(
                    f"GPT2Config: {name} must be a positive integer, "
                    f"got {value!r}"
                )
            # NumPy's become Python's, which do not overflow
            object.__setattr__(self, name, int(value))
        if self.channels % self.num_heads:
            raise ValueError(
                f"GPT2Config: channels must be a multiple of num_heads, "
                f"got {self.channels} and {self.num_heads}"
            )

    @property
    def padded_vocab_size(self):
        """Vp: the vocabulary rounded up to a multiple of 128."""
        return -(-self.vocab_size // 128) * 128  # two minuses round up

    @property
    def head_size(self):
        """hs: the channels of a head."""
        return self.channels // self.num_heads

    @property
    def num_kv_heads(self):
        """Heads that have keys and values of their own: in GPT-2 all."""
        return self.num_heads


# %% GPT-2 124M
cfg = GPT2Config()
print(cfg)
print("Vp =", cfg.padded_vocab_size)

# %% [markdown]
# A configuration that cannot be a model is refused where it is made:

# %% no such model
try:
    GPT2Config(num_heads=7)
    verdict("no such model", False, "is refused")
except ValueError as error:
    print(error)

# %% [markdown]
# ## Sixteen tensors
#
# A [tensor](../../book/glossary.md#term-tensor) is an array of numbers with
# any number of axes. All parameters live in sixteen of them, named as in
# llm.c. Those with a leading $L$ hold one slice for each block. A matrix
# product has two: its [weights](../../book/glossary.md#term-weight), a matrix
# of shape (outputs, inputs) whose row $o$ holds the factors that make output
# $o$, and its [biases](../../book/glossary.md#term-bias), a number for each
# output that is added.
#
# | tensors | where | what they do |
# |---|---|---|
# | `wte`, `wpe` | encoder | a vector for each token, a vector for each place |
# | `ln1w`, `ln1b` | first half | scale and shift of the LayerNorm |
# | `qkvw`, `qkvb` | first half | the product that makes q, k and v |
# | `attprojw`, `attprojb` | first half | the product after attention |
# | `ln2w`, `ln2b` | second half | scale and shift of the LayerNorm |
# | `fcw`, `fcb` | second half | the product up to $4C$ |
# | `fcprojw`, `fcprojb` | second half | the product down to $C$ |
# | `lnfw`, `lnfb` | end | scale and shift of the last LayerNorm |
#
# The logits need a matrix too, $(V_p, C)$. GPT-2 uses `wte` a second time
# there: the vector that a token goes in as is also the direction in which it
# is looked for. This is called [weight
# tying](../../book/glossary.md#term-weight-tying).
#
# [Chapter 1.13](13_block.ipynb) makes the table that we read here.


# %% their sizes
from llmnb.model.tensors import (
    flops_per_token,
    parameter_count,
    parameter_shapes,
)

for name, shape in parameter_shapes(cfg).items():
    print(f"{name:<9} {str(shape):<16} {np.prod(shape):>12,}")

# %% [markdown]
# ## Where the parameters are
#
# Per block, the four products hold $3C^2 + C^2 + 4C^2 + 4C^2 = 12 C^2$
# weights and $3C + C + 4C + C = 9C$ biases, and the two LayerNorms $4C$
# numbers. With the two tables and the last LayerNorm the model has
#
# $$ N = V C + T_{max} C + L\,(12 C^2 + 13 C) + 2 C \tag{1.4.1} $$
#
# parameters.


# %% equation (1.4.1)
V, C, L = cfg.vocab_size, cfg.channels, cfg.num_layers
N = V * C + cfg.max_seq_len * C + L * (12 * C**2 + 13 * C) + 2 * C
print(f"{N:,} parameters, {parameter_count(cfg):,} with padding")
assert parameter_count(cfg, padded=False) == N

# %% [markdown]
# The operations are counted by `flops_per_token`. A product of a vector with a
# matrix multiplies and adds once for each weight: two operations. Going
# backward there are two such products for each forward one, as [chapter
# 1.7](07_matmul.ipynb) derives. So each weight costs six operations a token,
# and
#
# $$ \text{FLOPs a token} = 6 N + 6\, L\, C\, T . \tag{1.4.2} $$
#
# A [FLOP](../../book/glossary.md#term-FLOP) is one floating-point addition or
# multiplication; an MFLOP is a million of them, a TFLOP a million million. In
# (1.4.2) $N$ stands for all parameters: `wte` does its arithmetic at the
# logits, and `wpe`, the biases and the LayerNorms are too small to matter. The
# second term is attention's. A token compares itself with those up to it,
# about $T/2$ on average, which takes $C$ multiplications and $C$ additions for
# each, and takes a weighted sum of as many vectors, which takes as many again.
# That is $4 C \cdot T/2 = 2 C T$ operations a block forward and twice that
# backward. (What chapter 1.8 computes a second time, to save memory, is not
# counted.)

# %% for one batch of 4 x 1024
T, B = 1024, 4
per_token = flops_per_token(cfg, T)
print(f"{per_token / 1e6:.0f} MFLOP a token")
print(f"{6 * L * C * T / 1e6:.0f} of them attention's")
print(f"{per_token * B * T / 1e12:.2f} TFLOP a training step")

# %% [markdown]
# Now split both by their part in the model; the logits' product uses the
# weights of `wte`.

# %% who has what tags=["hide-input"]
mlp = L * 8 * C * C
projections = L * 4 * C * C
parts = {  # name: parameters, operations a token
    "token table": (V * C, 0),
    "place table": (cfg.max_seq_len * C, 0),
    "q, k, v and projection": (projections, 6 * projections),
    "attention itself": (0, 6 * L * C * T),
    "up and down (MLP)": (mlp, 6 * mlp),
    "logits": (0, 6 * V * C),
}
known = np.sum(list(parts.values()), axis=0)
parts["all else"] = tuple((N, per_token) - known)
for name, (held, flops) in parts.items():
    print(f"{name:<24} {held / N:6.1%} {flops / per_token:6.1%}")

# %% draw it tags=["hide-input"]
fig, ax = plt.subplots(figsize=(8, 2.9), dpi=100)
colours = ("grey", "ink", "blue", "yellow", "orange", "green", "purple")
left = np.zeros(2)
for (name, share), colour in zip(parts.items(), colours, strict=True):
    width = np.array(share) / (N, per_token)
    ax.barh([1, 0], width, 0.55, left, label=name, color=PALETTE[colour])
    left += width
ax.set(yticks=[1, 0], yticklabels=["parameters", "operations"], xlim=(0, 1))
ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
ax.spines[["top", "right", "left"]].set_visible(False)
ax.tick_params(left=False, labelsize=11)
ax.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.45, 1), frameon=False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.4.2. Nearly a third of the parameters sits in the
# token table, which works only at the logits. Two fifths of the arithmetic are
# the MLP's; attention itself, at T = 1024, takes a small share. All else:
# biases and LayerNorms, and in the lower bar the table of places, which
# (1.4.2) counts as if it did arithmetic.*

# %% [markdown]
# ## Where the bytes are
#
# A number in float32 takes four bytes. Training needs four arrays of $N$
# numbers: the parameters, their gradients, and two averages that AdamW keeps
# of them. Then the [activations](../../book/glossary.md#term-activation), what
# the forward pass must keep so that the backward pass can run: they grow with
# $B \cdot T$. [Chapter 1.16](16_memory.ipynb) lists them and lays all of it
# out in one block. The rough sum, for each token: ten vectors of $C$ numbers a
# block, and the logits. The ten of figure 1.4.1 are q, k and v (three),
# attention's output (one), the output of the product up (four) and the two
# sums (two). The LayerNorms and GELU are computed again from these when their
# turn comes. To go backwards through an addition needs neither of the two
# numbers that were added.

# %% bytes for four rows of two lengths
static = 4 * 4 * parameter_count(cfg)
print(f"parameters, gradients, two averages: {static / 1e9:.2f} GB")
for T in (64, 1024):
    blocks = 4 * B * T * L * 10 * C
    logits = 4 * B * T * cfg.padded_vocab_size
    print(
        f"T = {T:<5} blocks {blocks / 1e9:.2f} GB, "
        f"logits {logits / 1e9:.2f} GB"
    )

# %% [markdown]
# The largest output of a layer is the logits, 50,304 numbers for each token.
# [Chapter 1.11](11_crossentropy.ipynb) takes care not to store them twice.

# %% [markdown]
# ## Take away
#
# - A token becomes a vector; blocks add to it; a product with the token table
#   turns it into scores.
# - GPT-2's parameters are $VC + T_{max}C + 12LC^2$ and small change; training
#   costs six operations a parameter and token, and attention some more.
# - Training keeps four numbers for each parameter, and beside them the
#   activations, which grow with the tokens of a batch.

# %% [markdown]
# ## Design note
#
# PyTorch would let us write this model in a fraction of the lines and would
# find the gradients by itself. We write each gradient by hand: so you see what
# a framework does, and what it costs; and the whole memory can be laid out
# beforehand, because nothing is created on the way.
#
# The price is that a new layer needs a new derivation: a good bargain for a
# fixed model, not for research into new layers.

# %% [markdown]
# ## Exercises
#
# **1** (★). GPT-2 comes in four sizes: (L, NH, C) = (12, 12, 768),
# (24, 16, 1024), (36, 20, 1280), (48, 25, 1600). Compute how many parameters
# they have.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# The sizes are known as 124M, 355M, 774M and 1558M after their parameters
# without padding.
# :::

# %% exercise 1 tags=["hide-cell"]
sizes = [
    parameter_count(GPT2Config(1024, 50257, *shape), padded=False)
    for shape in [
        (12, 12, 768),
        (24, 16, 1024),
        (36, 20, 1280),
        (48, 25, 1600),
    ]
]

# %% exercise 1, checked
millions = [round(n / 1e6) for n in sizes]
verdict("four sizes", millions == [124, 355, 774, 1558], f"{millions}")

# %% [markdown]
# **2** (★★). At which length $T$ does attention cost as much as everything
# else together? Take GPT-2 124M.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# By (1.4.2) when $6LCT = 6N$, so $T = N / (LC)$, about 13,500 tokens: more
# than ten times the length that GPT-2 was trained with.
# :::

# %% exercise 2 tags=["hide-cell"]
length = round(N / (L * C))

# %% exercise 2, checked
print(length)
ratio = flops_per_token(cfg, length) / (6 * N)
compare("all / rest", ratio, 2.0, tol=1e-4)  # length is rounded

# %% [markdown]
# ## Further reading
#
# - Radford et al. (2019),
#   [Language Models are Unsupervised Multitask Learners](https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf):
#   the paper on GPT-2; section 2.3 describes the model in half a page.
# - Vaswani et al. (2017),
#   [Attention Is All You Need](https://arxiv.org/abs/1706.03762): the
#   architecture's origin; GPT-2 is its decoder with the LayerNorms moved.
# - Kaplan et al. (2020),
#   [Scaling Laws for Neural Language Models](https://arxiv.org/abs/2001.08361):
#   section 2.1 counts parameters and operations much as we did, without the
#   two tables.
# - Karpathy (2024), [llm.c](https://github.com/karpathy/llm.c): the model in
#   about a thousand lines of C.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.4")
