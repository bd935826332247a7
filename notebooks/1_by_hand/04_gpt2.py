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
# # See GPT-2 on one page
#
# > The model as one diagram, its shapes, and where its parameters, its
# > operations and its bytes are.

# %% [markdown]
# ## Where we are
#
# GPT-2 is a function. It takes a row of numbers, each standing for a piece of
# text, and returns for every place in the row a score for each piece that
# might come next. Training adjusts 124 million constants inside that function
# until the scores are good. This book builds the function, its derivative and
# the adjustment, and uses no framework for any of it.
#
# This chapter looks at the whole before the parts. At its end you can
#
# - name the layers in the order in which a token meets them;
# - read the sixteen parameter tensors and their shapes;
# - say where the parameters, the arithmetic and the memory are;
# - use the three instruments of every later chapter: a verdict, a central
#   difference and a stopwatch.
#
# You need Python with NumPy, and calculus as far as partial derivatives.

# %% [markdown]
# ## Setup

# %% setup
import matplotlib.pyplot as plt
import numpy as np

from llmnb.book.diagram import PALETTE, gpt2_diagram
from llmnb.book.verify import compare, verdict

# %% [markdown]
# ## The model
#
# Every chapter opens with the same picture and lights the part that it
# builds. The cells that draw it come first.
#
# They are the first of many that are marked as *exported*. What they define
# is written, under the same names, to the Python package `llmnb`, here to its
# module `llmnb.book.diagram`, and later chapters import it from there
# ([chapter A.10](../appendix/10_book.ipynb) shows how). The package has no other source
# than these chapters. If you want to see the model first, go on to figure
# 1.4.1.


# %% the whole of GPT-2
gpt2_diagram()

# %% [markdown]
# *Figure 1.4.1. Text becomes tokens, tokens become vectors; L blocks work on
# the vectors; a last product turns them into scores. A block has two halves,
# and each half adds its result to what came in.*
#
# Follow one token through it.
#
# 1. **Tokens.** Text is cut into pieces, and each piece has a number between
#    0 and 50,256 ([chapter 1.2](02_tokens.ipynb)).
# 2. **Encoder.** The number picks a row of a table: a *vector* of 768
#    numbers. A second table adds a vector for the place in the row
#    ([chapter 1.5](05_encoder.ipynb)). From here to the end the token *is*
#    this vector.
# 3. **Block**, twelve times. Its first half lets the token look at the tokens
#    before it: LayerNorm brings the vector to a standard size
#    ([chapter 1.6](06_layernorm.ipynb)), a matrix product makes three vectors
#    of it ([chapter 1.7](07_matmul.ipynb)), attention mixes those of different
#    tokens ([chapter 1.8](08_attention.ipynb)), another product returns to 768
#    numbers, and the result is *added* to the vector
#    ([chapter 1.10](10_residual.ipynb)). The second half, called *feed-forward*
#    or *MLP* (multi-layer perceptron), works on each token alone: up to 3,072
#    numbers, through a curve called GELU ([chapter 1.9](09_gelu.ipynb)), back
#    down to 768, and added.
# 4. **Logits.** A last LayerNorm, and a product with the first table: one
#    score, called a *logit*, for each of the 50,257 pieces.
# 5. **Loss.** Softmax turns scores into probabilities; cross-entropy is the
#    surprise at what really came next
#    ([chapter 1.11](11_crossentropy.ipynb)). The mean of it over all places is
#    the one number that training lowers.
#
# Models that are built of such blocks are called *transformers*.
#
# Then everything runs backwards: from the loss, gradient by gradient, to each
# of the parameters, and AdamW moves them a little
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
# Two more numbers belong to the batch and not to the model: $B$ rows of $T$
# tokens each go through at once. The padding of the vocabulary adds rows to
# the token table that no token uses; it makes the largest product of the model
# a round size, which suits hardware, and we shall see to it that these rows
# get no probability.

# %% imports of the configuration tags=["export"]
from dataclasses import dataclass
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

    # what its blocks are made of, by the names in llmnb.model.parts
    norm: ClassVar[str] = "layernorm"
    feedforward: ClassVar[str] = "gelu"
    bias: ClassVar[bool] = True  # whether linear layers have one

    def __post_init__(self):
        for name, value in vars(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"GPT2Config: {name} must be a positive integer, "
                    f"got {value!r}"
                )
        if self.channels % self.num_heads:
            raise ValueError(
                f"GPT2Config: channels must be a multiple of num_heads, "
                f"got {self.channels} and {self.num_heads}"
            )

    @property
    def padded_vocab_size(self):
        """Vp: the vocabulary rounded up to a multiple of 128."""
        return -(-self.vocab_size // 128) * 128

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
except ValueError as error:
    print(error)

# %% [markdown]
# ## Sixteen tensors
#
# A *tensor* is an array of numbers with any number of axes. All parameters
# live in sixteen of them, named as in llm.c, Andrej Karpathy's GPT-2 in plain
# C, which this book re-creates in Python. Those with a leading $L$ hold one
# slice for each block. A weight matrix has shape
# (outputs, inputs): row $o$ holds the factors that make output $o$.
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
# is looked for. This is called *weight tying*.
#
# [Chapter 1.13](13_block.ipynb) makes the table that knows all of this about a
# tensor; here we only read it.


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
# weights, and biases and LayerNorms another $13 C$. With the two tables and
# the last LayerNorm,
#
# $$ N = V C + T_{max} C + L\,(12 C^2 + 13 C) + 2 C . \tag{1.4.1} $$


# %% equation (1.4.1)
V, C, L = cfg.vocab_size, cfg.channels, cfg.num_layers
N = V * C + cfg.max_seq_len * C + L * (12 * C**2 + 13 * C) + 2 * C
print(f"{N:,} parameters, {parameter_count(cfg):,} with padding")
assert parameter_count(cfg, padded=False) == N

# %% [markdown]
# The function also counts the operations. A product of a vector with an
# $(O, I)$ matrix multiplies and adds $O \cdot I$ times: two operations for
# each weight. Going backward there are two such products for each forward
# one, as [chapter 1.7](07_matmul.ipynb) derives. So each weight costs six
# operations a token, and
#
# $$ \text{FLOPs a token} = 6 N + 6\, L\, C\, T . \tag{1.4.2} $$
#
# A **FLOP** is one floating-point addition or multiplication. In (1.4.2) $N$
# stands for all parameters: `wte` does no arithmetic where it is read as a
# table, but it does at the logits, where it is used again; `wpe` and the
# vectors are too small to matter. The second term is attention's. A token
# compares itself with the tokens before it, $T/2$ on average, and takes a
# weighted sum of as many vectors: two products of $C$ multiplications and
# additions with each, $2 C T$ operations a block forward and twice that
# backward. (What chapter 1.8 computes a second time, to save memory, is not
# counted.)

# %% for one batch of 4 x 1024
T, B = 1024, 4
per_token = flops_per_token(cfg, T)
print(f"{per_token / 1e6:.0f} MFLOP a token")
print(f"{per_token * B * T / 1e12:.2f} TFLOP a training step")

# %% [markdown]
# We draw both, the parameters and the operations split by their part in the
# model; the logits' product uses the weights of `wte`.

# %% who has what
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
for name, (held, flops) in parts.items():
    print(f"{name:<24} {held / N:6.1%} {flops / per_token:6.1%}")

# %% draw it
fig, ax = plt.subplots(figsize=(8, 2.9), dpi=100)
colours = ("grey", "ink", "blue", "yellow", "orange", "green")
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
# *Figure 1.4.2. Nearly a third of the parameters sits in the token table, which
# works only at the logits. Two fifths of the arithmetic are the MLP's;
# attention itself, at T = 1024, takes a small share.*

# %% [markdown]
# ## Where the bytes are
#
# A float32 takes four bytes. Training needs four arrays of $N$ numbers:
# the parameters, their gradients, and AdamW's two averages, $m$ and $v$.
# Then the *activations*, what the forward pass must keep so that the
# backward pass can run: they grow with $B \cdot T$.
# [Chapter 1.14](14_memory.ipynb) lays all of it out in one block. The rough sum,
# for each token: $10 C$ numbers a block, and the logits.

# %% bytes for four rows of two lengths
static = 4 * 4 * parameter_count(cfg)
print(f"parameters, gradients, m, v: {static / 1e9:.2f} GB")
for T in (64, 1024):
    blocks = 4 * B * T * L * 10 * C
    logits = 4 * B * T * cfg.padded_vocab_size
    print(
        f"T = {T:<5} blocks {blocks / 1e9:.2f} GB, "
        f"logits {logits / 1e9:.2f} GB"
    )

# %% [markdown]
# One layer's output is larger than all others: the logits, with 50,304
# numbers for each token. [Chapter 1.11](11_crossentropy.ipynb) takes care not to
# store it twice.

# %% [markdown]
# ## Take away
#
# - A token becomes a vector; blocks add to it; a product with the token table
#   turns it into scores.
# - GPT-2's parameters are $VC + T_{max}C + 12LC^2$ and small change; training
#   costs six operations a parameter and token, and attention some more.
# - A claim is a verdict. A gradient is proved in float64, with a step of
#   $10^{-5}$.

# %% [markdown]
# ## Design note
#
# PyTorch would let us write this model in a fraction of the lines and would
# find the gradients by itself. We write each gradient by hand, for three reasons. You
# see what a framework does, and what it costs. The whole memory can be laid
# out beforehand, because nothing is created on the way. And what is left when
# the framework is gone is small: a handful of packages to install.
#
# The price is that a new layer needs a new derivation. For a fixed model that
# is a good bargain; for research into new layers it is not.

# %% [markdown]
# ## Exercises
#
# **1** (★). GPT-2 comes in four sizes: (L, NH, C) = (12, 12, 768),
# (24, 16, 1024), (36, 20, 1280), (48, 25, 1600). Compute their parameters.
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
# By (1.4.2) when $6LCT = 6N$, so $T = N / (LC)$, about 13,500 tokens: more than
# ten times the length that GPT-2 was trained with.
# :::

# %% exercise 2 tags=["hide-cell"]
length = round(N / (L * C))

# %% exercise 2, checked
print(length)
ratio = flops_per_token(cfg, length) / (6 * N)
compare("all / rest", ratio, 2.0, tol=1e-3)

# %% [markdown]
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
#   about a thousand lines of C, which this book re-creates.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.4")
