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
# *Reading time: 16 minutes. You need: Python, NumPy, and the derivative of the
# exponential.*

# %% [markdown]
# ## Where we are
#
# A language model answers one question: given the text so far, what comes
# next? It answers with a probability for each thing that might. GPT-2 looks at
# a thousand places of text to answer; the model of this chapter looks at one
# letter. It is as small as a model can be that still learns from examples, and
# it learns as GPT-2 does. At the end of this chapter you can
#
# - say what a loss is, and in which unit;
# - derive the gradient of this model, and say what a gradient is for;
# - follow a derivative backwards through a computation, step by step;
# - train the model until it is as good as it can be, and let it write.
#
# Each later chapter makes one thing about this model better, until it is
# GPT-2.

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
# `na`, `an`, `na`. Such a pair is called a *bigram*. Count them: after `b`
# came an `a`, once; after `a` an `n`, twice; after `n` an `a`, twice. So a
# model that has seen nothing else will say: after `a` comes `n`, and I am
# certain. That is all there is to learning from counts. Text is longer and
# less certain, so we let the machine count.

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
# programs, and comments in English. Each letter has a number below 128, its
# code in ASCII; the few letters that have none are left out. What a model
# reads and predicts, one number each, are called *tokens*, and how many
# different ones there are is the size of its *vocabulary*, $V$.

# %% the text as numbers
with gzip.open("../../tests/data/library.jsonl.gz", "rt") as lines:
    text = "".join(json.loads(line)["text"] for line in lines)[:300_000]
tokens = np.frombuffer(text.encode("ascii", "ignore"), np.uint8)
x, y = tokens[:-1], tokens[1:]  # each token, and the one that follows
V = 128
print(f"{len(x):,} pairs; the first: {text[:2]!r}, {text[1:3]!r}")

# %% [markdown]
# ## What a prediction costs
#
# Suppose the model gives the letter that really came next the probability
# $p$. How wrong was it? If $p = 1$, not at all. The less it expected the
# letter, the worse, and there is a measure in which the surprises of
# independent events add up, as their probabilities multiply: the logarithm.
# The **loss** of one prediction is
#
# $$ \ell = -\log p . \tag{1.1.1} $$
#
# With the natural logarithm its unit is the *nat*. A loss of 0 is certainty; a
# loss of $\log V$, here 4.85 nats, is what a model pays that knows nothing and
# gives every token the same probability. The loss of a model on a text is the
# mean over all predictions. Lower is better, and the one number says it all.
#
# How low can it get? The model may only look at the letter before. Then the
# best it can do is to say the frequencies: of all the times that an `a` came,
# in which share was it followed by an `n`? Their loss is called the *entropy*
# of the pairs, and no table of probabilities has a lower one on this text.

# %% the entropy of the pairs
pairs = np.zeros((V, V))
np.add.at(pairs, (x, y), 1)
frequencies = pairs / np.maximum(pairs.sum(axis=1, keepdims=True), 1)
entropy = -np.log(frequencies[x, y]).mean()
print(f"knows nothing: {np.log(V):.3f} nats, the counts: {entropy:.3f}")

# %% [markdown]
# Counting has found the answer at once. Why learn? Because counting ends
# here. After two letters there are $V^2$ rows to fill, after ten there are
# more rows than letters in all the world's books, and most of them stay empty.
# A model that can *learn* its numbers need not have one for every case. So we
# learn what we could have counted, to see that learning works.
#
# ## A table of logits
#
# Let the model be a table $W$ of $V \times V$ numbers, one row for each letter
# that may come first. The row says how much the model favours each next
# letter, by any number, positive or negative. Such a score is called a
# **logit**. To make probabilities of a row of logits $w$, make them positive
# and let them sum to 1:
#
# $$ p_j = \frac{e^{w_j}}{\sum_k e^{w_k}} . \tag{1.1.2} $$
#
# This is the *softmax*. The numbers in $W$ are the model's **parameters**: what
# training may change. They begin at 0, where all letters are equally likely.


# %% softmax of rows
def softmax(w):
    e = np.exp(w - w.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


W = np.zeros((V, V))
start = -np.log(softmax(W)[x, y]).mean()
verdict("zero logits", abs(start - np.log(V)) < 1e-12, "know nothing")

# %% [markdown]
# Subtracting the largest logit changes no probability, since it multiplies
# both sides of the fraction by the same number; it keeps the exponential from
# overflowing.
#
# ## What a gradient is for
#
# Take one parameter, $W_{a,n}$: how much the model favours an `n` after an
# `a`. Make it a little larger, by $h$, and the loss changes by about
# $h \cdot \partial \ell / \partial W_{a,n}$. If that derivative is negative,
# a larger parameter means a lower loss: raise it. If it is positive, lower it.
# All these derivatives together, one for each parameter, are the **gradient**.
# It points where the loss grows fastest, so the way down is against it:
#
# $$ W \leftarrow W - \eta \, \frac{\partial \ell}{\partial W} . \tag{1.1.3} $$
#
# The factor $\eta$, the **learning rate**, says how far to go. Do it again with
# another example, and again: that is training, of this model and of GPT-2.
#
# One could find the gradient by trying: change each parameter and compute the
# loss anew. That takes as many computations of the loss as there are
# parameters, 16,384 here and 124 million in GPT-2. Calculus gives all of
# them for about the price of two.
#
# ## Going backwards
#
# The loss is computed in steps, and each step has a simple derivative:
#
#     w  ----softmax---->  p  ----minus log---->  l
#
# The chain rule puts them together, and it is best read **backwards**. Begin
# at the end: the derivative of $\ell$ by itself is 1. The last step was
# $\ell = -\log p_y$, where $y$ is the letter that came. So
#
# $$ \frac{\partial \ell}{\partial p_y} = -\frac{1}{p_y} , \qquad
#    \frac{\partial \ell}{\partial p_j} = 0 \quad (j \ne y) . \tag{1.1.4} $$
#
# Hand that down to the step before. By the quotient rule on (1.1.2), with
# $\delta_{jk}$ for 1 where $j = k$ and 0 elsewhere,
#
# $$ \frac{\partial p_k}{\partial w_j} = p_k (\delta_{jk} - p_j) .
#    \tag{1.1.5} $$
#
# Every $w_j$ acts on the loss through all probabilities $p_k$, so what they
# hand down adds up:
#
# $$ \frac{\partial \ell}{\partial w_j}
#    = \sum_k \frac{\partial \ell}{\partial p_k}
#      \frac{\partial p_k}{\partial w_j}
#    = -\frac{1}{p_y}\, p_y (\delta_{jy} - p_j)
#    = p_j - \delta_{jy} . \tag{1.1.6} $$
#
# Look at what is left: the probability the model gave, minus 1 for the letter
# that came. A letter that was expected and did not come is pushed down by as
# much as it was expected; the one that came is pulled up. Nothing happens when
# the model was certain and right.
#
# In this book every layer is treated so. Its *forward* pass computes; its
# *backward* pass is handed the derivative of the loss by its output, written
# `dout` in code, and hands on the derivative by its input, `dinp`. Going
# through all steps from the loss to the parameters in this way is called
# **back-propagation**. It goes backwards because the loss is one number and
# the parameters are many: what is handed down is never larger than the array
# it belongs to.


# %% forward, then backward
def forward(W, x, y):
    """The mean loss of some pairs, and the probabilities for later."""
    probs = softmax(W[x])  # (1.1.2)
    losses = -np.log(probs[np.arange(len(x)), y])  # (1.1.1)
    return losses.mean(), probs


def backward(probs, x, y):
    """The gradient of that mean by every parameter."""
    dlogits = probs.copy()
    dlogits[np.arange(len(x)), y] -= 1  # (1.1.6)
    dW = np.zeros((V, V))
    np.add.at(dW, x, dlogits / len(x))  # rows used twice get both shares
    return dW


# %% [markdown]
# ## Proof
#
# A derivation can be wrong and look right. So we compute the gradient a second
# time, by a method that knows nothing of (1.1.6): raise a parameter by a small
# $h$, lower it by $h$, and divide the difference of the two losses by $2h$.
# `compare` prints a verdict, and would stop the notebook
# ([appendix A.11](../appendix/11_proofs.ipynb)).

# %% the gradient of one row, twice
rng = np.random.default_rng(1)
W = rng.normal(size=(V, V))
some_x = np.full(20, ord("e"))
some_y = y[x == ord("e")][:20]
_, probs = forward(W, some_x, some_y)
row = W[ord("e")]  # a view: what changes it changes W
want = numerical_gradient(lambda: forward(W, some_x, some_y)[0], row)
compare("dW", backward(probs, some_x, some_y)[ord("e")], want, tol=1e-8)

# %% a mistake that looks right
wrong = backward(probs, some_x, some_y) + np.eye(V)[ord("e")] / 20
caught = np.abs(wrong[ord("e")] - want).max() > 1e-3
verdict("one share lost", caught, "is caught")

# %% [markdown]
# ## Train
#
# The whole text at once would be slow, and is not needed: a few thousand pairs
# drawn at random, a **batch**, have nearly the same gradient. The loss will
# wobble, since each batch is another piece of text, and it will fall.

# %% a thousand steps downhill
W, rate, curve = np.zeros((V, V)), 30.0, []
rng = np.random.default_rng(2)
for _ in range(1000):
    batch = rng.integers(0, len(x), 2000)
    loss, probs = forward(W, x[batch], y[batch])
    W -= rate * backward(probs, x[batch], y[batch])  # (1.1.3)
    curve.append(loss)
whole = -np.log(softmax(W)[x, y]).mean()
verdict("the loss", whole < entropy + 0.1, "has come near the counts")
verdict("the counts", whole > entropy, "cannot be beaten")

# %% the curve
fig, ax = plt.subplots(figsize=(7, 3.2), dpi=100)
ax.plot(curve, color=PALETTE["blue"], lw=0.8)
for height, name in ((np.log(V), "knows nothing"), (entropy, "the counts")):
    ax.axhline(height, color=PALETTE["grey"], lw=1, ls="--")
    ax.text(1000, height + 0.06, name, ha="right", color=PALETTE["ink"])
ax.set(xlabel="step", ylabel="loss, nats", ylim=(2, 5.2))
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.1.1. The model begins with no opinion and ends with the frequencies
# of the text, which it was never shown: only examples, one batch after the
# other.*
#
# ## What it has learnt
#
# The table now holds opinions. After `q` it expects a `u`; after a space, a
# word's first letter; after a letter, what English and Python put there.

# %% its favourites
for letter in "qth(=":
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
# Short words, indents and brackets come at about the right rate, and nothing
# makes sense: one letter is too little to go on. What the model lacks is what
# this book is about.
#
# | what is missing | what supplies it |
# |---|---|
# | pieces of text longer than a letter | tokens, [chapter 1.2](02_tokens.ipynb) |
# | a letter's meaning, not only its number | the encoder, [chapter 1.5](05_encoder.ipynb) |
# | a look further back | attention, [chapter 1.8](08_attention.ipynb) |
# | several steps of thought | blocks of layers, [chapter 1.16](16_model.ipynb) |
# | a wiser step than (1.1.3) | AdamW, [chapter 1.12](12_adamw.ipynb) |

# %% [markdown]
# ## Take away
#
# - A loss is minus the logarithm of the probability that the model gave to
#   what came; its unit is the nat.
# - A gradient says for every parameter which way the loss falls. One goes
#   backwards because what is handed down stays small.
# - For a softmax with this loss it is $p - y$: what was expected, minus what
#   came.
# - Training is: predict a batch, go backwards, step downhill, and again.
#
# ## Design note
#
# We could have begun with a network of neurons. A table is better to begin
# with: it has an answer that can be counted, so you can see that learning finds
# it, and all that is later called a layer stands between a row's number and its
# logits.
#
# ## Exercises
#
# **1** (★). The model gives the right letter a probability of 1/8, every time.
# What is its loss, in nats and in bits?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# $\log 8 = 2.08$ nats; with the logarithm to base 2 it is 3 bits.
# :::

# %% exercise 1, checked tags=["hide-cell"]
nats = -np.log(1 / 8)
compare("bits", nats / np.log(2), 3.0, tol=1e-12)

# %% [markdown]
# **2** (★★). Set the gradient of the mean loss to zero and show that $p_j$ is
# then the frequency of $j$ among the letters that followed: learning that has
# come to rest has counted.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# Sum (1.1.6) over the $n$ pairs that begin with the same letter. Their
# probabilities are the same row, so $n p_j - n_j = 0$, where $n_j$ counts the
# pairs that ended in $j$. Hence $p_j = n_j / n$.
# :::

# %% exercise 2, checked tags=["hide-cell"]
begun = pairs.sum(axis=1, keepdims=True)
dW = (begun * frequencies - pairs) / len(x)  # (1.1.6), summed over pairs
verdict("at rest", np.abs(dW).max() < 1e-12, "the counts have no gradient")

# %% [markdown]
# **3** (★★). What happens with a learning rate of 600? Try it, and say why.
#
# :::{admonition} Solution to exercise 3
# :class: dropdown
# The steps are so long that they jump over the valley: a letter that was pulled
# up is far too likely in the next batch and is pushed down as far. The loss
# ends higher than the counts of single letters would give.
# :::

# %% exercise 3, checked tags=["hide-cell"]
W = np.zeros((V, V))
rng = np.random.default_rng(2)
for _ in range(100):
    batch = rng.integers(0, len(x), 2000)
    loss, probs = forward(W, x[batch], y[batch])
    W -= 600 * backward(probs, x[batch], y[batch])
verdict(
    "a rate of 600",
    -np.log(softmax(W)[x, y]).mean() > entropy + 1,
    "jumps too far",
)

# %% [markdown]
# ## Further reading
#
# - Karpathy (2022), *The spelled-out intro to language modeling: building
#   makemore*, a lecture: the same model, on names.
# - Shannon (1948),
#   [A Mathematical Theory of Communication](https://doi.org/10.1002/j.1538-7305.1948.tb01338.x):
#   section 3 lets pairs of letters write English; section 6 defines entropy.
