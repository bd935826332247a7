# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A model that learns: letters, in sixty lines
#
# > A table of numbers that learns which letter follows which. Everything that
# > trains a large model is here: a loss, its gradient, and a step downhill.
#
# *Reading time: 24 minutes. You need: Python, NumPy, and the derivatives of the
# exponential, the logarithm and a quotient.*

# %% [markdown]
# ## Where we are
#
# A [language model](../../book/glossary.md#term-language-model) answers one
# question: given the text so far, what comes next? It answers with a
# probability for each thing that might. GPT-2 looks at the last thousand pieces
# of text; the model of this chapter looks at one letter, and learns as GPT-2
# does. At the end of this chapter you can
#
# - say what a loss is, and in which unit;
# - derive the gradient of this model, and say what a gradient is for;
# - follow a derivative backwards through a computation, step by step;
# - tell a learning rate that is too small from one that is too large;
# - train the model until it is nearly as good as it can be, and let it write.
#
# From chapter to chapter the model becomes GPT-2, and it is trained in
# [chapter 1.18](18_training.ipynb). A word of the [glossary](../../book/glossary.md) is a link where the
# book first explains it.

# %% [markdown]
# ## Setup

# %% setup
import gzip
import json

import matplotlib.pyplot as plt
import numpy as np

from llmnb.book.diagram import PALETTE
from llmnb.book.verify import compare, numerical_gradient, verdict

# %% [markdown]
# ## By hand
#
# Take the text `banana`. Five times one letter follows another: `ba`, `an`,
# `na`, `an`, `na`. Such a pair is called a
# [bigram](../../book/glossary.md#term-bigram). Count them: after `b` came an
# `a`, once; after `a` an `n`, twice; after `n` an `a`, twice. So a model that
# has seen nothing else will say: after `a` comes `n`, and I am certain. Longer
# text is less certain, and the machine counts.

# %% the pairs of banana
letters = "abn"
counts = np.zeros((3, 3), int)
for first, second in zip("banana", "banana"[1:], strict=False):
    counts[letters.index(first), letters.index(second)] += 1
print("     next", *letters)
for letter, row in zip(letters, counts, strict=True):
    print(f"after {letter}   ", *row)

# %% [markdown]
# ## A text, and its pairs
#
# The text of this chapter is a piece of the library that comes with Python:
# programs, and comments in English. Here every character is called a letter, a
# blank and the end of a line too. Each has a number below 128, its code in
# ASCII; the few that have none are left out. The things that a model reads and
# predicts, one number each, are called
# [tokens](../../book/glossary.md#term-token). All of them together are the
# [vocabulary](../../book/glossary.md#term-vocabulary), and its size is $V$.
#
# Each token of the text is an *input*; the token after it is what the model
# should answer, the [target](../../book/glossary.md#term-target).

# %% the text as numbers
with gzip.open("../../tests/data/library.jsonl.gz") as lines:
    text = "".join(json.loads(line)["text"] for line in lines)[:300_000]
tokens = np.frombuffer(text.encode("ascii", "ignore"), np.uint8)
inputs, targets = tokens[:-1], tokens[1:]
V = 128
print(f"{len(inputs):,} pairs; the first: {text[:2]!r}, {text[1:3]!r}")

# %% [markdown]
# ## What a prediction costs
#
# Suppose the model gives the token that really came next, call it $y$, the
# probability $p_y$. How wrong was it? If $p_y = 1$, not at all; the less it
# expected the token, the worse. We want a measure that adds up over a text.
# The probability of two answers in a row is the product of theirs, and the
# logarithm makes a sum of a product. So the
# [loss](../../book/glossary.md#term-loss) of one prediction is
#
# $$ \ell = -\log p_y . \tag{1.1.1} $$
#
# The minus makes it positive, since the logarithm of a number below 1 is
# negative. With the natural logarithm its unit is the
# [nat](../../book/glossary.md#term-nat). A loss of 0 is certainty; a loss of
# $\log V$, here 4.85 nats, is what a model pays that knows nothing and gives
# every token the same probability, $1/V$. The loss of a model on a text is the
# mean over all predictions, $\mathcal L$. Lower is better.
#
# How low can it get? The model may look at one letter only, the last. Then the
# best it can do is to say the frequencies: of all the times that an `a` came,
# in which share was it followed by an `n`? The loss of these frequencies is
# the [entropy](../../book/glossary.md#term-entropy) of a letter when the one
# before it is known. No table of probabilities has a lower loss on this text;
# exercise 2 proves it. Between the two lies a model that looks at no letter
# and only knows which share of the text each of them has. (`np.add.at` adds 1
# for each pair, also for one that came before; `np.maximum` keeps a letter
# that never came from a division by 0.)

# %% the entropy of the pairs
pairs = np.zeros((V, V))
np.add.at(pairs, (inputs, targets), 1)
frequencies = pairs / np.maximum(pairs.sum(axis=1, keepdims=True), 1)
entropy = -np.log(frequencies[inputs, targets]).mean()
share = pairs.sum(axis=0) / len(targets)
single = -np.log(share[targets]).mean()
print(f"knows nothing:                 {np.log(V):.3f} nats")
print(f"counts of single letters:      {single:.3f} nats")
print(f"counts of pairs, the entropy:  {entropy:.3f} nats")

# %% [markdown]
# Counting has found the answer at once. Why learn? Because counting ends here.
# After two letters there are $V^2$ rows to fill, after ten there are more rows
# than letters in all the world's books. A model that can *learn* its numbers
# need not have one for every case. So we learn what we could have counted, to
# see that learning works.
#
# ## A table of logits
#
# Let the model be a table $W$ of $V \times V$ numbers, one row for each letter
# that may come first. The row says how much the model favours each next
# letter, by any number, positive or negative. Such a score is called a
# [logit](../../book/glossary.md#term-logit), $z_i$ for token $i$. To make
# probabilities of a row of logits, make them positive and let them sum to 1:
#
# $$ p_i = \frac{e^{z_i}}{\sum_j e^{z_j}} . \tag{1.1.2} $$
#
# This is the [softmax](../../book/glossary.md#term-softmax). A logit that is
# larger by 1 makes its token $e$ times as likely, compared with the others.
# The numbers in $W$ are the model's
# [parameters](../../book/glossary.md#term-parameter): what training may
# change. They begin at 0, where all letters are equally likely. `verdict`
# checks that: it prints a line, and would stop the notebook were the claim
# false; so does `compare`, which asks how far two arrays differ at most.


# %% softmax of rows
def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


W = np.zeros((V, V))
start = -np.log(softmax(W)[inputs, targets]).mean()
verdict("zero logits", abs(start - np.log(V)) < 1e-12, "know nothing")

# %% [markdown]
# Subtracting the largest logit changes no probability: it divides what stands
# above the line of (1.1.2), and what stands below, by the same number,
# $e^{\max z}$. It keeps the exponential from overflowing.
#
# ## What a gradient is for
#
# Take one parameter $w$ of the table, say, how much it favours an `n` after an
# `a`. Make it larger by a little, and the loss changes by about that little
# times the derivative $\partial \mathcal L / \partial w$. If the derivative is
# negative, a larger parameter means a lower loss: raise it. If it is positive,
# lower it. All these derivatives together, one for each parameter, are the
# [gradient](../../book/glossary.md#term-gradient). It points where the loss
# grows fastest, so the way down is against it:
#
# $$ W \leftarrow W - \eta \, \frac{\partial \mathcal L}{\partial W} .
#    \tag{1.1.3} $$
#
# The factor $\eta$, the [learning
# rate](../../book/glossary.md#term-learning-rate), says how far to go. The
# derivative only speaks about small changes, so we go a little way, compute it
# anew, and go on. That is **training**.
#
# One could find the gradient by trying: change each parameter and compute the
# loss anew, 16,384 times here and 124 million times in GPT-2. Calculus gives
# all of it for about the price of three losses: one for the loss, and two for
# the way back ([chapter 1.7](07_matmul.ipynb) counts them).
#
# ## Going backwards
#
# The loss of one prediction is computed in two steps. Figure 1.1.1 shows them
# for a vocabulary of three letters and the logits 1, 0 and 2, when the third
# letter came.

# %% the graph of one prediction tags=["hide-input"]
fig, ax = plt.subplots(figsize=(8, 2.9), dpi=100)
z, came = np.array([1.0, 0.0, 2.0]), np.array([0, 0, 1])
p = softmax(z)


def column(numbers):
    return "\n".join(f"{x:.3f}".replace("-", "−") for x in numbers)


nodes = {
    0.0: ("logits $z$", column(z), column(p - came)),
    4.0: ("probabilities $p$", column(p), column(-came / p + 0)),
    8.0: ("loss $\\ell$", column([-np.log(p[2])]), "1"),
}
INK, BLUE, ORANGE = (PALETTE[name] for name in ("ink", "blue", "orange"))
for x, (name, value, handed) in nodes.items():
    box = plt.Rectangle((x - 0.8, -0.75), 1.6, 1.5, fill=False, ec=INK, lw=1.2)
    ax.add_patch(box)
    style = {"ha": "center", "va": "center", "linespacing": 1.4}
    ax.text(x, 1.05, name, color=INK, size=12, **style)
    ax.text(x - 0.4, 0, value, color=BLUE, size=10, **style)
    ax.text(x + 0.38, 0, handed, color=ORANGE, size=10, **style)
steps = {0.8: ("softmax", "× (1.1.5)"), 4.8: ("−log", "× (1.1.4)")}
for x, (forth, back) in steps.items():
    for y, a, b, colour in (
        (0.3, x, x + 2.4, BLUE),
        (-0.3, x + 2.4, x, ORANGE),
    ):
        arrow = {
            "arrowstyle": "-|>",
            "color": colour,
            "shrinkA": 2,
            "shrinkB": 2,
        }
        ax.annotate("", (b, y), (a, y), arrowprops=arrow)
    ax.text(x + 1.2, 0.5, forth, color=BLUE, size=11, ha="center")
    ax.text(x + 1.2, -0.62, back, color=ORANGE, size=11, ha="center")
ax.text(4, -1.15, "forward, then backward", color=INK, ha="center", size=11)
ax.set(xlim=(-1, 9), ylim=(-1.35, 1.35))
ax.axis("off")
fig.subplots_adjust(0, 0, 1, 1)
plt.show()

# %% [markdown]
# *Figure 1.1.1. Blue, from left to right: the values. Orange, from right to
# left: what each node is handed, the derivative of the loss by its values.
# Each step multiplies what it was handed by its own derivative, the equation
# below its arrow, which is yet to come, and passes the result on; it need not
# know the other steps.*
#
# The rule behind the figure is the chain rule, read **backwards**. For any
# array $z$ on the way, write $dz$ for the derivative of the loss by it: an
# array of the same shape, which says by how much the loss grows for each unit
# that an element of $z$ grows. Until (1.1.7) the loss is that of one
# prediction, $\ell$. Begin at the end. The derivative of $\ell$ by itself
# is 1. The last step was $\ell = -\log p_y$, in which no other probability
# appears. So
#
# $$
# \begin{aligned}
# dp_y &= \frac{\partial \ell}{\partial p_y} = -\frac{1}{p_y} , \\
# dp_i &= \frac{\partial \ell}{\partial p_i} = 0 \quad (i \ne y) .
# \end{aligned}
# \tag{1.1.4}
# $$
#
# Hand that down to the step before, the softmax. The logit $z_j$ stands in the
# sum below the line of every $p_i$, and above the line of one of them, $p_j$.
# By the quotient rule on (1.1.2), whose sum is here over $v$, for $i = j$ and
# for $i \ne j$,
#
# $$
# \begin{aligned}
# \frac{\partial p_j}{\partial z_j}
#   &= \frac{e^{z_j} \sum_v e^{z_v} - e^{z_j} e^{z_j}}
#           {\bigl(\sum_v e^{z_v}\bigr)^2} = p_j - p_j\, p_j , \\
# \frac{\partial p_i}{\partial z_j}
#   &= \frac{0 - e^{z_i} e^{z_j}}{\bigl(\sum_v e^{z_v}\bigr)^2}
#    = - p_i\, p_j .
# \end{aligned}
# $$
#
# With $\delta_{ij}$ for 1 where $i = j$ and 0 elsewhere both are one line:
#
# $$ \frac{\partial p_i}{\partial z_j} = p_i\, (\delta_{ij} - p_j) .
#    \tag{1.1.5} $$
#
# The logit $z_j$ acts on the loss through all probabilities. What comes down
# these ways adds up, and by (1.1.4) one way only carries anything, $i = y$:
#
# $$
# \begin{aligned}
# dz_j &= \sum_i dp_i\, \frac{\partial p_i}{\partial z_j} \\
#   &= -\frac{1}{p_y}\, p_y\, (\delta_{yj} - p_j)
#    = p_j - \delta_{yj} .
# \end{aligned}
# \tag{1.1.6}
# $$
#
# What is left is the probability that the model gave, minus 1 for the letter
# that came. A step against it pushes down the logits of letters that did not
# come, each by as much as it was expected, and pulls up that of the one that
# came. Nothing happens when the model was certain and right.

# %% the numbers of the figure
z, y = np.array([1.0, 0.0, 2.0]), 2
p = softmax(z)
dp = np.array([0, 0, -1 / p[y]])  # (1.1.4)
step = p[:, None] * (np.eye(3) - p)  # (1.1.5), row i and column j
dz = dp @ step  # (1.1.6), the sum
print("p ", p.round(3), " loss", round(-np.log(p[y]), 3))
print("dp", dp.round(3))
print("dz", dz.round(3))
compare("dz", dz, p - np.eye(3)[y], tol=1e-12)  # (1.1.6), what is left

# %% [markdown]
# Last comes the table. The logits of a pair are the row of $W$ that its input
# picks, so what is handed to the logits goes to that row. A row that several
# pairs have used acts on the loss through each of them, and again it adds up.
# The loss is now the mean over $B$ pairs, $\mathcal L$, so each counts for
# $1/B$. The row of token $v$ gets
#
# $$ dW_{v,j} = \frac1B \sum_{\text{pairs that begin with } v}
#    (p_j - \delta_{yj}) , \tag{1.1.7} $$
#
# where $p$ and $y$ are those of each pair. A row that no pair has used gets 0.
#
# In this book every layer is treated so. Its [forward
# pass](../../book/glossary.md#term-forward-pass) computes; its [backward
# pass](../../book/glossary.md#term-backward-pass) is handed the derivative of
# the loss by its output, written `dout` in code, and hands on the derivative
# by its input, `dinp`. Going through all steps from the loss to the parameters
# in this way is called
# [back-propagation](../../book/glossary.md#term-back-propagation).
#
# Why backwards? One could go forwards: ask for one parameter how all that
# follows changes with it, up to the loss. But then the next parameter needs a
# walk of its own. Seen from the loss, which is one number, one walk serves
# them all.


# %% forward, then backward
def forward(W, inputs, targets):
    """The mean loss of some pairs, and the probabilities for later."""
    probs = softmax(W[inputs])  # (1.1.2)
    losses = -np.log(probs[np.arange(len(targets)), targets])  # (1.1.1)
    return losses.mean(), probs


def backward(probs, inputs, targets):
    """The gradient of that mean by every parameter."""
    dlogits = probs.copy()
    dlogits[np.arange(len(targets)), targets] -= 1  # (1.1.6)
    dW = np.zeros((dlogits.shape[1], dlogits.shape[1]))
    np.add.at(dW, inputs, dlogits / len(inputs))  # (1.1.7)
    return dW


# %% [markdown]
# `np.add.at` adds every row, also where one index comes twice;
# `dW[inputs] += ...` would keep the last one only.
#
# ## Proof
#
# A derivation can be wrong and look right. So we compute the gradient a second
# time: raise a parameter by a small step, lower it by the same, and divide the
# difference of the two losses by the whole way. This is a [central
# difference](../../book/glossary.md#term-central-difference).
# `numerical_gradient` does it for every element of an array in turn, with a
# step of $10^{-5}$ ([appendix A.11](../appendix/11_proofs.ipynb)). Forty pairs
# that begin with an `e` or a blank use two rows, each many times:

# %% the gradient of two rows, twice
rng = np.random.default_rng(1)
W = rng.normal(size=(V, V))
chosen = np.flatnonzero(np.isin(inputs, [ord("e"), ord(" ")]))[:40]
some = inputs[chosen], targets[chosen]
_, probs = forward(W, *some)
dW = backward(probs, *some)
for letter in "e ":
    row = W[ord(letter)]  # a view: what changes it changes W
    want = numerical_gradient(lambda: forward(W, *some)[0], row)
    compare(f"dW, row {letter!r}", dW[ord(letter)], want, tol=1e-8)
other = np.delete(dW, [ord("e"), ord(" ")], axis=0)
verdict("other rows", not other.any(), "are zero")

# %% [markdown]
# Two mistakes that look right: to forget the letter that came for one of the
# pairs, and to assign where one must add.

# %% both are caught
came = np.eye(V)[some[1]]  # a row a pair, 1 at the letter that came
assigned, forgotten = np.zeros((V, V)), np.zeros((V, V))
assigned[some[0]] += (probs - came) / 40
came[-1] = 0
np.add.at(forgotten, some[0], (probs - came) / 40)
verdict("one forgotten", np.abs(forgotten - dW).max() > 1e-3, "is caught")
verdict("assigned", np.abs(assigned - dW).max() > 1e-3, "is caught")

# %% [markdown]
# ## Train
#
# The whole text at once would be slow, and is not needed: a thousand pairs
# drawn at random, a [batch](../../book/glossary.md#term-batch), have nearly
# the same gradient. The loss will wobble, since each batch is another piece of
# text, and it will fall. This is called *stochastic gradient descent*:


# %% steps downhill
def train(rate, steps):
    """The table after so many steps, and the loss at each."""
    W, curve = np.zeros((V, V)), []
    rng = np.random.default_rng(2)
    for _ in range(steps):
        batch = rng.integers(0, len(inputs), 1000)
        loss, probs = forward(W, inputs[batch], targets[batch])
        W -= rate * backward(probs, inputs[batch], targets[batch])  # (1.1.3)
        curve.append(loss)
    return W, curve


# %% [markdown]
# How large should the learning rate be? Try three.

# %% three learning rates
runs = {rate: train(rate, 200) for rate in (1, 30, 600)}
ends = {
    rate: -np.log(softmax(W)[inputs, targets]).mean()
    for rate, (W, _) in runs.items()
}
verdict("rate 1", single < ends[1] < np.log(V), "learns, and is slow")
verdict("rate 30", ends[30] < single - 0.5, "learns what pairs tell")
verdict("rate 600", ends[600] > np.log(V), "is worse than nothing")

# %% the three curves tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7, 3.4), dpi=100)
styles = {1: ("green", "1, too small"), 30: ("blue", "30, right"),
          600: ("orange", "600, too large")}  # fmt: skip
for rate, (name, label) in styles.items():
    ax.plot(runs[rate][1], color=PALETTE[name], lw=1.2, label=label)
for height, name in (
    (np.log(V), "knows nothing"), (single, "single letters"),
    (entropy, "pairs: the entropy"),
):  # fmt: skip
    ax.axhline(height, color=PALETTE["grey"], lw=1, ls="--", zorder=0)
    ax.text(203, height, name, va="center", size=9, color=INK)
ax.set(xlabel="step", ylabel="loss, nats", ylim=(1.9, 25), xlim=(-4, 200))
ax.set_yscale("log")
ax.set_yticks([2, 3, 5, 10, 20], ["2", "3", "5", "10", "20"])
ax.minorticks_off()
ax.legend(title="learning rate", frameon=False, ncols=3, loc="upper center",
          bbox_to_anchor=(0.5, 1.27))  # fmt: skip
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.1.2. Three learning rates. With 1 the loss creeps. With 30 it soon
# passes what single letters can tell. With 600 each step jumps over the
# valley and lands high on the other side: a letter that was pulled up is far
# too likely in the next batch, and is pushed down as far.*
#
# A rate of 30 is large: later chapters have rates of a thousandth. Here only a
# few pairs of a batch use a row, and (1.1.7) divides by all $B$. [Chapter
# 1.12](12_adamw.ipynb) makes the right rate depend less on the model. Now
# train in earnest:

# %% a thousand steps
W, curve = train(30, 1000)
whole = -np.log(softmax(W)[inputs, targets]).mean()
print(f"trained: {whole:.2f} nats; the entropy: {entropy:.2f}")
verdict("the loss", whole < entropy + 0.1, "has come to the counts")
verdict("the counts", whole > entropy, "cannot be beaten")

# %% the curve tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7, 3.2), dpi=100)
ax.plot(curve, color=BLUE, lw=0.8)
for height, name in ((np.log(V), "knows nothing"), (entropy, "the entropy")):
    ax.axhline(height, color=PALETTE["grey"], lw=1, ls="--")
    ax.text(1000, height - 0.07, name, ha="right", va="top", color=INK)
ax.set(xlabel="step", ylabel="loss, nats", ylim=(2, 5.2))
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.1.3. The model begins with no opinion and ends near the frequencies
# of the text, though it was shown only examples. Where the curve dips below
# the entropy, a batch was easier than the whole text; no table is below it on
# the whole.*
#
# ## What it has learnt
#
# After `q` it expects a `u`; after a blank another blank, since Python's lines
# are indented, or a word's first letter; after a letter, what English and
# Python put there.

# %% its favourites
for letter in "q th(=":
    best = np.argsort(-W[ord(letter)])[:3]
    shown = ", ".join(repr(chr(j)) for j in best)
    print(f"after {letter!r}: {shown}")

# %% [markdown]
# It can write: begin with a letter, draw the next one with the probabilities
# of its row, and go on from there.


# %% let it write
def write(W, first, count, rng):
    written = [first]
    for _ in range(count):
        p = softmax(W[written[-1]])
        written.append(int(rng.choice(V, p=p)))
    return bytes(written).decode("ascii")


# %% before and after tags=["nbval-ignore-output"]
rng = np.random.default_rng(3)
print("untrained:", repr(write(np.zeros((V, V)), ord("d"), 40, rng)))
print("trained:")
print(write(W, ord("d"), 300, rng))

# %% [markdown]
# Here and there a syllable, and nothing makes sense: one letter is too little
# to go on. What the model lacks is what this book is about.
#
# | what is missing | what supplies it |
# |---|---|
# | pieces of text longer than a letter | tokens, [chapter 1.2](02_tokens.ipynb) |
# | a letter's meaning, not only its number | the encoder, [chapter 1.5](05_encoder.ipynb) |
# | a look further back | attention, [chapter 1.8](08_attention.ipynb) |
# | several steps of thought | blocks of layers, [chapter 1.13](13_block.ipynb) |
# | a wiser step than (1.1.3) | AdamW, [chapter 1.12](12_adamw.ipynb) |

# %% [markdown]
# ## Take away
#
# - A loss is minus the logarithm of the probability that the model gave to
#   what came; its unit is the nat.
# - A gradient says for every parameter which way the loss falls. One goes
#   backwards because the loss is one number: one walk serves all parameters.
# - $dz$ is the derivative of the loss by $z$. A step is handed it for its
#   output, multiplies by its own derivative, and hands on the one for its
#   input; where ways meet, they add.
# - For a softmax with this loss it is $p$, minus 1 at what came.
# - Training is: predict a batch, go backwards, step downhill, and again.
#
# ## Design note
#
# We could have begun with a network of neurons. A table has an answer that can
# be counted, so you can see that learning finds it. In GPT-2 all layers stand
# where the table stands here: between the number of a token and the logits.
#
# ## Exercises
#
# **1** (★). The model gives the right letter a probability of 1/8, every time.
# What is its loss, in nats and in bits (the logarithm to base 2)?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# $\log 8 = 2.08$ nats, or 3 bits.
# :::

# %% exercise 1, checked tags=["hide-cell"]
nats = -np.log(1 / 8)
compare("bits", nats / np.log(2), 3.0, tol=1e-12)

# %% [markdown]
# **2** (★★). Show that no row of probabilities $p$ has a lower loss than the
# frequencies $q$ of the letters that followed. Use $\log x \le x - 1$. Then
# show that the gradient (1.1.7) is zero there: learning that has come to rest
# has counted.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# The mean loss of the row's pairs is $-\sum_i q_i \log p_i$. Less the loss of
# the frequencies it is $-\sum_i q_i \log (p_i / q_i) \ge -\sum_i q_i (p_i
# / q_i - 1) = \sum_i q_i - \sum_i p_i \ge 0$, since the $q_i$ sum to 1 and the
# $p_i$ of the letters that came to at most 1. For the gradient, sum (1.1.6)
# over the row's pairs: each gives $p_j$, and a share $q_j$ of them gives $-1$,
# so the sum is their number times $p_j - q_j$. In the check `backward` is
# given the frequencies of the first 20,000 pairs, and those same pairs.
# :::

# %% exercise 2, checked tags=["hide-cell"]
some = inputs[:20_000], targets[:20_000]
counted = np.zeros((V, V))
np.add.at(counted, some, 1)
counted /= np.maximum(counted.sum(axis=1, keepdims=True), 1)
dW = backward(counted[some[0]], *some)
verdict("at rest", np.abs(dW).max() < 1e-12, "the counts have no gradient")
rng = np.random.default_rng(4)
tries = []
for _ in range(100):
    moved = np.log(frequencies + 1e-9)  # the log of 0 is not finite
    moved += rng.normal(0, 0.1, (V, V))
    tries.append(-np.log(softmax(moved)[inputs, targets]).mean())
verdict("100 tables", min(tries) > entropy, "none is better")

# %% [markdown]
# **3** (★★). Compute by hand the gradient of the table of `banana`, three
# letters and five pairs, when all logits are 0. Which row changes most at the
# first step?
#
# :::{admonition} Solution to exercise 3
# :class: dropdown
# All probabilities are 1/3. Row `b` has one pair, and `a` came: $\tfrac15
# (-\tfrac23, \tfrac13, \tfrac13)$ for `a`, `b`, `n`. Row `a` has two, and `n`
# came twice: $\tfrac25 (\tfrac13, \tfrac13, -\tfrac23)$. Row `n` has two, and
# `a` came twice: $\tfrac25 (-\tfrac23, \tfrac13, \tfrac13)$. The rows that
# were used twice change most, twice as much as `b`.
# :::

# %% exercise 3, checked tags=["hide-cell"]
a, b, n = range(3)
by_hand = np.zeros((3, 3))
by_hand[b] = np.array([-2, 1, 1]) / 15
by_hand[a] = np.array([2, 2, -4]) / 15
by_hand[n] = np.array([-4, 2, 2]) / 15
first, second = np.array([b, a, n, a, n]), np.array([a, n, a, n, a])
_, probs = forward(np.zeros((3, 3)), first, second)
compare("banana", backward(probs, first, second), by_hand, tol=1e-12)

# %% [markdown]
# ## Further reading
#
# - Karpathy (2022), *The spelled-out intro to language modeling: building
#   makemore*, a lecture: the same model, on names.
# - Shannon (1948),
#   [A Mathematical Theory of Communication](https://doi.org/10.1002/j.1538-7305.1948.tb01338.x):
#   section 3 lets pairs of letters write English; section 6 defines entropy.
