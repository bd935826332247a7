# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       model.init: "The first weights, of a size that depth does not spoil."
# ---

# %% [markdown]
# # First weights: as large as depth allows
#
# > Zeros would never part, large numbers explode and small ones vanish: the
# > width of the first weights decides whether a deep model can learn at all.
#
# *Reading time: 20 minutes. You need: the 16 tensors of [chapter
# 1.4](04_gpt2.ipynb), LayerNorm ([chapter 1.6](06_layernorm.ipynb)), the
# linear layer ([chapter 1.7](07_matmul.ipynb)), GELU ([1.9](09_gelu.ipynb)), the
# residual stream ([1.10](10_residual.ipynb)), the loss
# ([1.11](11_crossentropy.ipynb)), the table of tensors
# ([1.13](13_block.ipynb)) and the page ([1.14](14_page.ipynb)).*
#
# ## Where we are

# %% where we are
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="weights")

# %% [markdown]
# *Figure 1.15.1. The lit layers hold the numbers that are drawn at random: the
# encoder's tables and the weight matrices, of which the last is the token
# table once more.*
#
# The page of [chapter 1.14](14_page.ipynb) drew its matrices with the standard
# deviation 0.02 and gave no reason. Such a choice is a model's *initialisation*. This
# chapter says why it must be about so small, does what (1.10.6) asked of two matrices a
# block, and builds `init_params`. At its end you can
#
# - say why weights must not begin equal;
# - say how a weight's standard deviation changes the size of activations
#   and gradients from layer to layer;
# - compute what GPT-2's 0.02 does to a half block, to the stream and to the
#   first loss, and check each by drawing;
# - say why our weights are those that PyTorch draws.
#
# ## Setup

# %% setup
import matplotlib.pyplot as plt
import numpy as np

from llmnb.book.diagram import PALETTE
from llmnb.book.verify import verdict
from llmnb.config import GPT2Config
from llmnb.reference.gelu import gelu_backward, gelu_forward

# %% imports tags=["export"]
from llmnb.checks import check_array
from llmnb.model.tensors import parameter_shapes, tensor_table
from llmnb.model.random import Generator

# %% the seed
rng = np.random.default_rng(11)

# %% [markdown]
# ## Why not zeros
#
# Let two layers compute $y = W_2 \operatorname{GELU}(W_1 x)$, and let all weights
# begin at one value. Then all the hidden numbers, those of $W_1 x$, are equal, and
# so are the gradients that come back to them, and so are the rows of $dW_1$ and the
# columns of $dW_2$: after the step the channels are alike again. Four hidden
# channels stay four copies of one. With zeros it is worse: $W_2 = 0$ sends no
# gradient back to $W_1$, and since $\operatorname{GELU}(0) = 0$ gives $W_2$ nothing
# to weigh, its own gradient is 0 too. Neither ever moves.


# %% equal rows, and rows drawn at random
def ten_steps(first, second):
    """Both matrices after ten steps of descent."""
    x, wanted = rng.normal(size=(2, 3))
    for _ in range(10):
        hidden = first @ x
        bent = np.empty_like(hidden)
        gelu_forward(bent, hidden)
        dy = second @ bent - wanted
        dhidden = np.zeros_like(hidden)
        gelu_backward(dhidden, second.T @ dy, hidden)
        second = second - 0.1 * np.outer(dy, bent)
        first = first - 0.1 * np.outer(dhidden, x)
    return first, second


def rows_that_differ(matrix):
    return len(np.unique(matrix.round(12), axis=0))


equal, _ = ten_steps(np.full((4, 3), 0.5), np.full((3, 4), 0.5))
verdict("equal", rows_that_differ(equal) == 1, "four channels are one")
zeros = ten_steps(np.zeros((4, 3)), np.zeros((3, 4)))
verdict("zeros", not np.any(zeros[0]) and not np.any(zeros[1]), "never move")
drawn, _ = ten_steps(rng.normal(size=(4, 3)), rng.normal(size=(3, 4)))
verdict("drawn", rows_that_differ(drawn) == 4, "four channels are four")

# %% [markdown]
# So the weights are drawn, each apart from the others, with mean 0. How wide?
#
# ## By hand
#
# One output of a linear layer is a sum $y = W_0 x_0 + W_1 x_1 + W_2 x_2$. Let
# the input be $x = (1, -1, 1)$ and let every weight be $+\sigma$ or $-\sigma$
# with equal chance. There are eight equally likely cases. In two of them all
# three terms agree and $y = \pm 3\sigma$; in the other six $y = \pm \sigma$.
# The mean of $y^2$ is $(2 \cdot 9 + 6 \cdot 1)\, \sigma^2 / 8 = 3 \sigma^2$:
# one $\sigma^2$ for each of the three inputs. For $y$ to be as large as its
# inputs, which have mean square 1, $\sigma$ must be $1/\sqrt 3$.


# %% eight cases by hand
signs = np.stack(np.meshgrid(*[[-1, 1]] * 3), axis=-1).reshape(8, 3)
y = signs @ np.array([1, -1, 1])
print("y / sigma  ", y)
print("mean square", (y**2).mean())

# %% [markdown]
# | tensor | shape | first values |
# |---|---|---|
# | `wte` | (Vp, C) | N(0, 0.02²) in the first V rows, 0 in the padding |
# | `wpe` | (max_seq_len, C) | N(0, 0.02²) |
# | `qkvw`, `fcw` | (L, 3C, C), (L, 4C, C) | N(0, 0.02²) |
# | `attprojw`, `fcprojw` | (L, C, C), (L, C, 4C) | N(0, 0.02² / (2L)) |
# | `ln1w`, `ln2w`, `lnfw` | (L, C), (L, C), (C,) | 1 |
# | all biases | | 0 |
#
# N(0, σ²) is the normal distribution with mean 0 and standard deviation σ. The
# rest of the chapter is about the third column.
#
# ## Why the size matters
#
# Take a linear layer with $C$ inputs, $y_o = \sum_c W_{o,c}\, x_c$, whose
# weights are independent with mean 0 and variance $\sigma^2$. For a given $x$
# the terms are independent with mean 0, so their variances add:
#
# $$
# \begin{aligned}
# \operatorname{var}(y_o) &= \sum_c \operatorname{var}(W_{o,c})\, x_c^2
#    = C \sigma^2 \cdot \overline{x^2} , \\
# \overline{x^2} &= \frac1C \sum_c x_c^2 .
# \end{aligned}
# \tag{1.15.1}
# $$
#
# The mean of $y_o$ is 0, so its variance is the mean of its square: the layer
# multiplies the mean square by $C \sigma^2$. The next layer reads these outputs,
# and its weights are independent of them. So a stack of 24 such layers, each
# with $C$ inputs and outputs, multiplies it by
#
# $$ (C \sigma^2)^{24} , \tag{1.15.2} $$
#
# which vanishes or explodes unless $\sigma$ is near $1/\sqrt C$. The backward pass
# runs through the same matrices the other way, $dx_c = \sum_o W_{o,c}\, dy_o$.
# Where $dy$ does not depend on $W$, gradients change by a factor of the same form,
# with the number of outputs in place of $C$. The root of the mean square, or RMS,
# is what we plot: it is the typical size of an entry.


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

# %% draw them tags=["hide-input"]
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
# *Figure 1.15.2. In 24 linear layers with 256 channels, a standard deviation
# of 0.02 shrinks the activations to $10^{-12}$ and one of 0.12 blows them up
# past $10^6$; gradients do the same on their way back. With $1/\sqrt{256}$
# both keep their size. Dots are measured, dashed lines are the root of
# (1.15.2) with the layers passed so far in the place of 24.*
#
# ## What 0.02 does
#
# GPT-2 uses $\sigma = 0.02$ for any $C$. For 768 channels $C \sigma^2 = 0.31$, not
# 1, yet nothing vanishes, because LayerNorm stands at the start of each half block
# and restores mean square 1. What a half block adds to the stream, its $s$ in
# (1.10.5), depends on $C \sigma^2$ and not on how deep it sits. For the
# feed-forward half we can say how large it is. It reads rows of mean square 1, so
# by (1.15.1) its hidden numbers have variance $C \sigma^2$. Let $z$ be a normal
# number of that variance; the mean of $\operatorname{GELU}(z)^2$ is an integral
# that we take numerically. The last matrix has $4C$ inputs, so by (1.15.1)
#
# $$ s = 4\, C \sigma^2 \cdot \overline{\operatorname{GELU}(z)^2} .
#    \tag{1.15.3} $$
#
# Attention's half adds less. At the start its scores are small and its
# weights nearly equal, so position $t$ carries home the mean of $t + 1$
# values, and a mean of many random numbers is small. Even at $t = 0$, where it is
# one value, two matrices make it $(C \sigma^2)^2 = 0.09$, while $s$ is 0.13:


# %% the mean square after GELU
def after_gelu(variance):
    """The mean of GELU(z)^2 for z normal with this variance."""
    z = np.linspace(-9, 9, 20_001)
    out = np.empty_like(z)
    gelu_forward(out, np.sqrt(variance) * z)
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    return (out**2 * density).sum() * (z[1] - z[0])


# %% one half block of the 124M model
def feed_forward(x, last):
    """What a fresh feed-forward half adds; last: its second matrix's std."""
    C = x.shape[1]
    norm = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    hidden = norm @ rng.normal(0, 0.02, (C, 4 * C))
    gelu_forward(hidden, hidden)
    return hidden @ rng.normal(0, last, (4 * C, C))


# %% its size, predicted and drawn
variance = 768 * 0.02**2
s = 4 * variance * after_gelu(variance)
print(f"C sigma^2 = {variance:.3f}, s = {s:.3f}")
start = rng.normal(0, 0.02 * np.sqrt(2), (256, 768))
added = (feed_forward(start, last=0.02) ** 2).mean()
verdict("one half", abs(added / s - 1) < 0.1, "as (1.15.3), to 10 %")
print(f"the stream begins with mean square {2 * 0.02**2:.4f}")

# %% [markdown]
# A token's vector and a position's, each N(0, 0.02²), begin the stream at mean
# square 0.0008. A single half block adds far more than that, and there are $2L$ of
# them. Chapter 1.10 showed the remedy, (1.10.6): the last matrix of each,
# `attprojw` or `fcprojw`, gets its standard deviation divided by $\sqrt{2L}$, and
# the whole stream ends near one size whatever its depth: here at $s$ and the little
# with which it began, if all halves add what a feed-forward one does. A large
# stream would harm: what the later halves add would hardly change its direction,
# which is all that the last LayerNorm passes on. And by (1.6.10) that LayerNorm
# divides the gradient by the stream's size.

# %% the whole stream, predicted and drawn
ends = []
for depth in (1, 3):
    stream = start
    for _ in range(2 * depth):
        stream = stream + feed_forward(stream, 0.02 / np.sqrt(2 * depth))
    ends.append((stream**2).mean())
close = np.allclose(ends, 2 * 0.02**2 + s, rtol=0.1)
verdict("one block, or three", close, "end as (1.10.6), to 10 %")

# %% [markdown]
# The other end of the model has its own reason for a small $\sigma$. After the
# last LayerNorm a row has mean square 1, and the logits are its products with
# the rows of `wte`: normal numbers $z$ of variance $C \sigma^2$ again. By
# (1.11.10) the loss is $\log \sum_j e^{z_j} - z_y$. The target's logit is 0 on
# average, and the sum is near $V$ times the mean of $e^z$. That mean is the
# integral of $e^z$ times the bell curve of $z$, which falls as $e^{-z^2 / (2 C
# \sigma^2)}$. Complete the square in the exponent of the product:
#
# $$ z - \frac{z^2}{2 C\sigma^2}
#    = \tfrac12 C \sigma^2 - \frac{(z - C\sigma^2)^2}{2 C\sigma^2} , \qquad
#    \overline{e^z} = e^{C\sigma^2/2} , $$
#
# because the bell that is left, moved by $C\sigma^2$, has the same area as
# before. So the first loss is to be expected a little over $\log V$, at
#
# $$ \mathcal L_0 \approx \log V + \tfrac12\, C \sigma^2 . \tag{1.15.4} $$
#
# Draw such logits and compare, with 0.02 and with ten times as much:

# %% the first loss, predicted and drawn
V, C = 4096, 768
rows = rng.normal(size=(256, C))
rows /= np.sqrt((rows**2).mean(axis=1, keepdims=True))
excess = {}
for std in (0.02, 0.2):
    logits = rows @ rng.normal(0, std, (V, C)).T
    lse = np.log(np.exp(logits).sum(axis=1))
    # any token may come: the mean logit stands for the target's
    excess[std] = (lse - logits.mean(axis=1)).mean() - np.log(V)
favourite = np.exp(logits.max(axis=1) - lse).mean()  # of std 0.2
close = abs(excess[0.02] - C * 0.02**2 / 2) < 0.005
verdict("std 0.02", close, "as (1.15.4), to 0.005 nats")
verdict("std 0.2", 10 < excess[0.2] < 13, "10 to 13 nats too much")
verdict("its favourite", favourite > 0.4, "has over 0.4 of a row")

# %% [markdown]
# With 0.2 a fresh model gives one token of the 4096 over 0.4 of all
# probability, and nearly always it is a wrong one, which it would have to
# unlearn before it could learn. (There (1.15.4) itself is off: it says 15.4 nats,
# and here it was under 13. The moved bell has its middle at $C \sigma^2 = 31$,
# 5.5 deviations out, and none of 4096 logits is as large as that.) For the four
# sizes of GPT-2 (1.15.4) says:

# %% the four sizes of GPT-2
for C in (768, 1024, 1280, 1600):
    variance = C * 0.02**2
    print(f"C = {C:4}: C sigma^2 = {variance:.2f}", end=", ")
    print(f"first loss near {np.log(50257) + variance / 2:.2f}")

# %% [markdown]
# The number itself is OpenAI's, and nothing in the derivation asks for exactly
# 0.02. From 768 to 1600 channels it is 0.55 to 0.8 of $1/\sqrt C$. With LayerNorm
# at the start of each half block and $1/\sqrt{2L}$ at its end, the model is
# forgiving.
#
# ## The weights of a new model
#
# Random numbers on a computer follow from a seed. [Appendix
# A.1](../appendix/01_random.ipynb) derives a `Generator` whose normal numbers
# are those that PyTorch draws from the same seed. What is left is the order of
# the tensors: `wte`, `wpe`, then block by block `qkvw`, `attprojw`, `fcw`,
# `fcprojw`. It is the order in which a PyTorch model of this shape holds its
# parameters, with the vocabulary as it is: the padded rows of `wte` take no
# draws and stay 0. For a model in float64 the float32 draws are cast, so that
# both precisions start at the same point.


# %% the weights of a new model tags=["export"]
def init_params(params, cfg, seed):
    """Fill a model's parameter tensors for training from scratch.

    params: name -> array in the shapes of parameter_shapes(cfg), float32 or
    float64 (the float32 draws, cast). Matrices are drawn with the standard
    deviations of `tensor_table`; biases and padded rows of wte are 0,
    norms' weights 1. Raises TypeError or ValueError.
    """
    for name, shape in parameter_shapes(cfg).items():
        array = params.get(name)
        check_array(f"init_params: {name}", array, shape, written=True)
    table, generator = tensor_table(cfg), Generator(seed)
    for x in table:
        params[x.name].fill(x.start)
    drawn = [x for x in table if x.std]
    for x in drawn:
        if not x.stacked:
            generator.normal_(params[x.name][: x.used], std=x.std)
    for layer in range(cfg.num_layers):
        for x in drawn:
            if x.stacked:
                generator.normal_(params[x.name][layer], std=x.std)


# %% a small model, initialised
cfg = GPT2Config(
    max_seq_len=64, vocab_size=331, num_layers=3, num_heads=4, channels=64
)
shapes = parameter_shapes(cfg)
params = {n: np.full(s, np.nan, np.float32) for n, s in shapes.items()}
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
# ## Count it
#
# Every number of a matrix or table is drawn once, the padding not at all:

# %% numbers drawn for GPT-2 124M
cfg124 = GPT2Config()
L, C = cfg124.num_layers, cfg124.channels
tables = (cfg124.vocab_size + cfg124.max_seq_len) * C
blocks = L * (3 + 1 + 4 + 4) * C * C
print(f"drawn: {tables:,} in tables, {blocks:,} in blocks")

# %% [markdown]
# ## Why PyTorch's numbers
#
# [Chapter 1.17](17_model.ipynb) sets the model against PyTorch's. Its weights
# are those that PyTorch draws from the same seed, to within $2 \cdot 10^{-8}$.
# So a run can start from a bare seed and still be compared, loss by loss. Losses from
# other weights differ by far more than rounding, and a small mistake would hide there
# for ever.
#
# ## Take away
#
# - Weights that begin equal stay equal: they must be drawn.
# - A linear layer multiplies the mean square by $C \sigma^2$, forward, and
#   likewise backward: the standard deviation decides whether depth is
#   possible.
# - LayerNorm makes up for a $\sigma$ that is off. The residual sum grows with
#   depth, hence $1/\sqrt{2L}$ on the matrices that write into the stream.
# - The same first weights as PyTorch's let a run be compared with it, number by
#   number.
#
# ## Exercises
#
# **1** (★★). A stack of linear layers with a GELU after each has no LayerNorm
# and no residual connections. Which standard deviation keeps the mean square
# of the activations at 1, layer after layer? You need the mean of
# $\operatorname{GELU}(z)^2$ for a normal $z$; take it numerically.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# Say $\overline{x^2} = 1$ enters a layer. By (1.15.1) the layer's output is
# close to normal with variance $C \sigma^2$. GELU of twice a number is not
# twice its GELU, so no one factor tells how it changes the size, and we look
# for the $\sigma$ at which $\overline{x^2}$ stays at 1: the mean of
# $\operatorname{GELU}(z)^2$ over normal $z$ of variance $C\sigma^2$ must be 1.
# Halving an interval finds $C\sigma^2 \approx 2.15$, so $\sigma = \sqrt{2.15 /
# C}$.
# :::


# %% exercise 1, solve for the variance tags=["hide-cell"]
low, high = 1.0, 4.0
for _ in range(50):
    middle = (low + high) / 2
    enough = after_gelu(middle) >= 1
    low, high = (low, middle) if enough else (middle, high)
print(f"C sigma^2 = {middle:.2f}")

# %% exercise 1, checked
x = rng.normal(size=(256, 1024))
for _ in range(6):
    x = x @ rng.normal(0, np.sqrt(middle / 1024), (1024, 1024))
    gelu_forward(x, x)
verdict("six layers", abs(rms(x) - 1) < 0.15, "keep RMS 1 within 15 %")

# %% [markdown]
# **2** (★★). Two models differ in one thing: the second has one token more in
# its vocabulary. Both are drawn from one seed, with $C = 64$. Which entries of
# `wpe` do they share? Predict, then check. (The generator makes a stream of
# random *words*, takes one for each number of these tables, and works them up
# in blocks of 16: [appendix A.1](../appendix/01_random.ipynb).)
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# The extra row of `wte` takes 64 words, four blocks of 16, and the rest of the
# stream moves by one row. Row $i$ of the second `wpe` is drawn from the words
# of row $i + 1$ of the first; its last row comes from words that the first
# used for `qkvw`.
# :::

# %% exercise 2, one token more tags=["hide-cell"]
more = GPT2Config(64, 332, 3, 4, 64)
other = {n: np.empty(s, np.float32) for n, s in parameter_shapes(more).items()}
init_params(other, more, seed=42)

# %% exercise 2, checked
moved = (other["wpe"][:-1] == params["wpe"][1:]).all()
verdict("wpe", bool(moved), "moved by one row")
same = np.isin(other["wpe"], params["wpe"]).all(axis=1)
verdict("rows shared", int(same.sum()) == 63, "63 of 64")


# %% [markdown]
# ## Further reading
#
# - Glorot and Bengio (2010),
#   [Understanding the difficulty of training deep feedforward neural networks](https://proceedings.mlr.press/v9/glorot10a.html):
#   (1.15.1) forward and backward, and measured figures like 1.15.2.
# - He et al. (2015),
#   [Delving Deep into Rectifiers](https://arxiv.org/abs/1502.01852):
#   the calculation of exercise 1 for ReLU, where it has a closed form.
# - Radford et al. (2019),
#   [Language Models are Unsupervised Multitask Learners](https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf):
#   section 2.3 scales the weights of residual layers as (1.10.6) does.
# - The PyTorch authors,
#   [Reproducibility](https://docs.pytorch.org/docs/stable/notes/randomness.html):
#   what PyTorch promises about equal results, and what it does not.
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.15")
