# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       train.landmarks: "What counting alone pays for a text."
# ---

# %% [markdown]
# # Training: the loss falls
#
# > Batches become gradients, gradients become a model that predicts better than
# > counting can, along the curve that PyTorch draws.
#
# *Reading time: 25 minutes. You need: all chapters before this one, above all
# AdamW ([chapter 1.12](12_adamw.ipynb)) and the model
# ([chapter 1.16](16_model.ipynb)). Runs that are kept, resumed and fast: Parts
# [2](../2_cpu/07_step.ipynb) and [4](../4_practice/13_loop.ipynb).*

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.book.diagram import PALETTE, gpt2_diagram

gpt2_diagram(lit="all")

# %% [markdown]
# *Figure 1.17.1. Every box is lit: each has a forward pass and a proven backward
# pass. What is missing is the loop around them.*
#
# This chapter writes that loop, in NumPy, and runs it until a model has learnt to
# write something like a program. At its end you can
#
# - say what loss to expect before the first step, and which two numbers a
#   trained model must beat;
# - write a training step as five calls, in the one order that works;
# - read a loss curve: the fall, the bend, the gap between training and
#   validation;
# - show that our arithmetic is PyTorch's, step after step.

# %% [markdown]
# ## Setup

# %% setup
import gzip
import json
from pathlib import Path

import matplotlib.pyplot as plt

from llmnb.book.verify import compare, verdict
from llmnb.config import GPT2Config
from llmnb.model.gpt2 import GPT2
from llmnb.model.tensors import decaying
from llmnb.text import tokenizer
from llmnb.formats.shard import read_shard
from llmnb.text.data import DataLoader
from llmnb.train.schedule import learning_rate

# %% imports of the landmarks tags=["export"]
import numpy as np

# %% [markdown]
# ## By hand: what a loss means
#
# The loss is the mean of $-\log p$ over the tokens that came true, in nats.
# A model that gives every one of $V$ tokens the probability $1/V$ pays
#
# $$ \mathcal L_\text{uniform} = \log V \tag{1.17.1} $$
#
# for each token. For a toy language of four tokens that is
# $\log 4 = 1.3863$. Suppose its text is `a a a a b b c d`. A model that has
# counted says $p = (\tfrac12, \tfrac14, \tfrac18, \tfrac18)$ and pays
# $\tfrac12 \log 2 + \tfrac14 \log 4 + \tfrac28 \log 8 = 1.2130$.

# %% two guesses by hand
p = np.array([4, 2, 1, 1]) / 8
print("uniform", np.round(np.log(4), 4))
print("counted", np.round(-(p * np.log(p)).sum(), 4))

# %% [markdown]
# Counting is the best that can be done without looking at the context, and
# here is why. Let $n_v$ count how often token $v$ occurs among $N$ tokens,
# and let a model that ignores its input give token $v$ the probability
# $q_v$. Its loss is
#
# $$ \mathcal L(q) = -\sum_v \frac{n_v}{N} \log q_v ,
#    \qquad \sum_v q_v = 1 . \tag{1.17.2} $$
#
# With a multiplier $\kappa$ for the constraint, the derivative by $q_v$ is
# $-n_v / (N q_v) + \kappa$. It vanishes when $q_v = n_v / (\kappa N)$, and
# the sum over $v$ gives $\kappa = 1$:
#
# $$ q_v = \frac{n_v}{N} . \tag{1.17.3} $$
#
# The loss at this $q$ is the **unigram entropy**. A network whose loss is
# above it has not yet learned how frequent each token is; a network below
# it must be using the tokens that came before. We count on the training
# text and charge the validation text, and add 1 to every count so that a
# token never seen does not cost infinitely much.


# %% the unigram entropy tags=["export"]
def unigram_entropy(train_tokens, tokens, vocab_size):
    """Mean -log p of `tokens` under the token frequencies of a text.

    train_tokens, tokens: 1-D integer arrays with values in [0, vocab_size).
    Every count is raised by 1. Returns nats a token, a float.
    """
    counts = np.bincount(train_tokens, minlength=vocab_size) + 1.0
    return float(-np.log(counts / counts.sum())[tokens].mean())


# %% the toy language again
toy = np.array([0, 0, 0, 0, 1, 1, 2, 3])
far = unigram_entropy(np.tile(toy, 1000), toy, 4)
compare("toy language", far, -(p * np.log(p)).sum(), tol=1e-3)

# %% [markdown]
# ## A text, a model
#
# The text is source code of Python's own library, as in
# [chapter 1.1](01_learns.ipynb), 400,000 characters of it. It becomes tokens of
# [chapter 1.2](02_tokens.ipynb); a tenth is set aside to validate on, and
# [chapter 1.3](03_batches.ipynb) makes the batches.

# %% tokens and batches
with gzip.open("../../tests/data/library.jsonl.gz", "rt") as lines:
    text = "".join(json.loads(line)["text"] for line in lines)[:400_000]
encoding = tokenizer.train([text[:200_000]], vocab_size=512)
tokens = np.array(encoding.encode_ordinary(text), np.uint16)
held_out = tokens[-len(tokens) // 10 :]
learnt = tokens[: -len(tokens) // 10]
B, T, V = 8, 64, encoding.n_vocab
batches = DataLoader([learnt], B, T, seed=42)
validation = DataLoader([held_out], B, T, shuffle=False)
print(f"{len(learnt):,} tokens to train on, {len(held_out):,} to validate on")

# %% a small GPT-2
cfg = GPT2Config(T, V, num_layers=2, num_heads=4, channels=64)
model = GPT2(cfg, B, T, backend="reference", seed=42)


def validate(model, count=8):
    """The mean loss over the first batches of the validation text."""
    validation.reset()
    losses = [model.forward(*validation.next_batch()) for _ in range(count)]
    return np.mean(losses)


marks = {"uniform": np.log(V)}
marks["unigram"] = unigram_entropy(learnt, held_out, V)
verdict("landmarks", marks["unigram"] < marks["uniform"], "counting helps")

# %% [markdown]
# What will the very first loss be? The last LayerNorm makes vectors $x$ of
# $C$ channels with variance 1, and the logits are their products with the
# rows of `wte`, drawn from $N(0, \sigma^2)$ with $\sigma = 0.02$. A sum of
# $C$ products is close to normal with variance $s^2 = C \sigma^2$. If the
# logits $z_v$ are such numbers and independent of the target, the loss is
#
# $$ \mathbb E \Bigl[ \log \sum_v e^{z_v} - z_\text{target} \Bigr]
#    \approx \log \bigl( V\, \mathbb E\, e^{z} \bigr) - 0
#    = \log V + \tfrac12 C \sigma^2 , \tag{1.17.4} $$
#
# because the mean of $e^z$ for a normal $z$ of variance $s^2$ is $e^{s^2/2}$:
# completing the square in $e^z e^{-z^2/2s^2}$ moves the bell by $s^2$ and leaves
# that factor. With 64 channels the excess over (1.17.1) is
# $\tfrac12 \cdot 64 \cdot 0.0004 = 0.0128$. A first loss that is far from
# this means that something is broken before training has begun: a wrong
# initialisation, or targets that are not shifted by one.

# %% the first loss, predicted
predicted = marks["uniform"] + cfg.channels * 0.02**2 / 2
draw = np.random.default_rng(0)
pairs = [draw.integers(0, V, (2, B, T)) for _ in range(8)]
blind = np.mean([model.forward(*pair) for pair in pairs])
verdict(
    "random tokens", abs(blind - predicted) < 0.006, "as predicted, +-0.006"
)
verdict(
    "without it", abs(blind - marks["uniform"]) > 0.006, "log V is not enough"
)
first = validate(model)
verdict("real text", abs(first - predicted) < 0.05, "is not far from it")

# %% [markdown]
# Real text is not independent of the model even now: a token often comes twice in
# a row or nearly so, and `wte`, which reads it, also writes the logits.

# %% [markdown]
# ## The loop
#
# One **training step** is five calls, and their order is forced:
#
# | call | reads | writes |
# |---|---|---|
# | `forward` | a batch, the weights | activations, the loss |
# | `backward` | activations, the weights | gradients |
# | `clip_gradients` | gradients | gradients, if their norm is above 1 |
# | `learning_rate` | the step's number | nothing: a function of the step |
# | `update` | gradients | the weights, AdamW's two averages |
#
# `backward` needs the activations of the very `forward` before it, clipping must
# see all gradients together, and `update` spends them. It counts its steps from 1.


# %% a training step, and the loop
def step(model, batch, number, steps):
    """Train once; returns the loss before the update."""
    loss = model.forward(*batch)
    model.backward()
    model.clip_gradients(1.0)
    rate = learning_rate(number, 2e-3, steps // 10, steps, final=0.1)
    model.update(
        rate, beta2=0.95, weight_decay=0.1, step=number + 1,
        decay=decaying(model.cfg),
    )  # fmt: skip
    return loss


def sample(model, count=60, seed=3):
    """Draw tokens one after the other, each from what the model says."""
    rng, ids = np.random.default_rng(seed), [encoding.eot_token]
    window = np.zeros((B, T), np.int32)
    for _ in range(count):
        last = ids[-T:]
        window[0, : len(last)] = last
        model.forward(window)
        logits = model.logits[0, len(last) - 1].astype(np.float64)
        p = np.exp(logits - logits.max())
        ids.append(int(rng.choice(V, p=p / p.sum())))
    return encoding.decode(ids[1:])


# %% [markdown]
# Four times on the way we stop, validate, and let the model write: draw a token
# with the probabilities it gives, append it, ask again
# ([chapter 1.18](18_writing.ipynb) does it with more care).

# %% the run
STEPS, SHOWN = 250, (0, 50, 125, 250)
losses, checks, samples = [], {}, {}
for number in range(STEPS + 1):
    if number in SHOWN:
        checks[number] = validate(model)
        samples[number] = sample(model)
    if number < STEPS:
        losses.append(step(model, batches.next_batch(), number, STEPS))
final = checks[STEPS]
verdict(
    "half way", np.mean(losses[105:125]) < marks["unigram"], "uses context"
)
verdict("the end", final < checks[125] < checks[50] < first, "falls all along")

# %% the loss curve
fig, ax = plt.subplots(figsize=(8, 4), dpi=100)
ax.plot(losses, ".", color=PALETTE["grey"], ms=3, label="one batch")
mean = np.convolve(losses, np.ones(20) / 20, "valid")
ax.plot(
    np.arange(len(mean)) + 9.5, mean, color=PALETTE["blue"], label="mean of 20"
)
ax.plot(
    *zip(*checks.items(), strict=True),
    "o-",
    color=PALETTE["orange"],
    label="validation",
)
for name, height in marks.items():
    ax.axhline(height, color=PALETTE["ink"], lw=1, ls="--")
    ax.text(STEPS, height + 0.04, name, ha="right")
ax.set(xlabel="step", ylabel="loss (nats a token)")
ax.legend(frameon=False)
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.17.2. The loss falls steeply from the uniform guess to the unigram
# entropy while the model learns which tokens are frequent, bends under it, and
# falls on more slowly as it learns what follows what.*
#
# Here is what it wrote on the way. Nobody told it about words, brackets or
# indents: it saw numbers from 0 to 511 and was asked for the next one.

# %% what it wrote on the way tags=["nbval-ignore-output"]
for number, written in samples.items():
    print(f"--- after {number} steps, loss {checks[number]:.2f}")
    print(written)

# %% the numbers of this run tags=["nbval-ignore-output"]
print(f"{marks['uniform']:.3f}  a uniform guess")
print(f"{marks['unigram']:.3f}  the frequencies of the tokens")
print(f"{final:.3f}  the model, on text it has not seen")

# %% [markdown]
# ## Proof: the same curve as PyTorch
#
# A falling loss does not prove that the arithmetic is right. A wrong
# gradient often points downhill too, and the model learns, only worse. So
# we compare with an implementation that shares no line with ours. PyTorch
# has trained the same model from the same seed on the same batches, and the
# loss of each of its 200 steps is recorded, once in float32 and once in
# float64. We follow it for a hundred, which is a severe test: an error in one
# step changes the weights of all later ones. ([Chapter 2.7](../2_cpu/07_step.ipynb) follows it to the end.)
#
# The tokens come from a file this time, because the text of the standard
# library differs between Python versions. They are bytes of five modules of
# Python 3.11, and every byte is read once.

# %% the run that PyTorch recorded
recorded = Path("../../tests/data/torch_curve.csv").read_text("utf-8")
lines = recorded.splitlines()
rows = [x.split(",") for x in lines if x[0].isdigit()]
theirs, theirs64 = np.array(rows, float).T[1:]
print(*[x for x in lines if x.startswith(("# torch", "# seed"))], sep="\n")
print(len(theirs), "steps")

# %% [markdown]
# To keep each batch varied without a shuffle, the text is cut into eight
# equal parts and row $b$ of the batch reads part $b$ from its beginning,
# 64 tokens a step.


# %% eight readers of one text
class Readers:
    def __init__(self, tokens, B, T):
        tokens = np.array(tokens, np.int32)
        self.tokens = tokens[:-1].reshape(B, -1, T)
        self.targets = tokens[1:].reshape(B, -1, T)
        self.step = 0

    def next_batch(self):
        s, self.step = self.step, self.step + 1
        return self.tokens[:, s], self.targets[:, s]


# %% the same run, ours
bytes_of = read_shard("../../tests/data/curve_tokens.bin")


def our_curve(steps, precision="fp64", late=0):
    """Losses of the recorded run; late: by how much AdamW's count is off."""
    config = GPT2Config(64, 257, num_layers=2, num_heads=4, channels=64)
    student = GPT2(config, 8, 64, "reference", precision, seed=42)
    feed, found = Readers(bytes_of, 8, 64), []
    update = student.update
    student.update = lambda *a, step, **b: update(*a, step=step + late, **b)
    for number in range(steps):
        found.append(step(student, feed.next_batch(), number, 200))
    return np.array(found)


ours = our_curve(100)
worst = np.abs(ours - theirs64[:100]).max()
verdict("100 losses", worst < 1e-4, "within 1e-04 of PyTorch's")

# %% [markdown]
# Would the comparison notice a mistake? Make one that is hard to see in a
# falling loss: let the update count its steps from 2, so that AdamW's bias
# correction is off by one step.

# %% a mistake, seen in the curve
wrong = our_curve(40, late=1)
verdict("the mistake", wrong[-1] < wrong[0] - 1, "learns all the same")
far = np.abs(wrong - theirs64[:40]).max()
verdict("the mistake", far > 1e-3, "is far from the curve")

# %% two curves and their difference
fig, (top, low) = plt.subplots(
    2, 1, figsize=(8, 5.5), dpi=100, sharex=True, height_ratios=(2, 1)
)
top.plot(theirs, color=PALETTE["yellow"], lw=5, label="PyTorch")
top.plot(ours, color=PALETTE["blue"], lw=1.2, label="llmnb")
top.set(ylabel="loss (nats a byte)")
top.legend(frameon=False)
low.semilogy(
    np.abs(ours - theirs64[:100]), color=PALETTE["blue"], label="llmnb"
)
low.semilogy(
    np.abs(theirs - theirs64), color=PALETTE["orange"], label="PyTorch float32"
)
low.semilogy(
    np.abs(wrong - theirs64[:40]), color=PALETTE["grey"], label="the mistake"
)
low.set(xlabel="step", ylabel="distance to\nPyTorch float64", ylim=(1e-8, 9))
low.legend(frameon=False, ncols=3)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.17.3. Our curve, in float64, covers PyTorch's, bump for bump. Below, on
# a logarithmic scale, the distance to PyTorch's float64 run: that of PyTorch's own
# float32 run shows how far rounding alone leads from itself, and the mistake
# stands thousands of times further off.*
#
# What is left between ours and PyTorch's in float64 is the first weights, which
# both draw in float32 and round at other places
# ([chapter 1.15](15_weights.ipynb)).

# %% [markdown]
# ## Count it
#
# A token costs $6N + 6LCT$ floating-point operations
# ([chapter 1.4](04_gpt2.ipynb)). Times the tokens of all steps:

# %% the work of the run
from llmnb.model.tensors import flops_per_token, parameter_count

work = flops_per_token(cfg, T) * B * T * STEPS
print(f"{parameter_count(cfg):,} parameters, {B * T * STEPS:,} tokens")
print(f"{work / 1e12:.2f} TFLOP")

# %% [markdown]
# ## Take away
#
# - Before training, the loss must be near $\log V$, by (1.17.4). The unigram
#   entropy is the first thing to beat: below it, a model uses context.
# - A step is forward, backward, clip, rate, update.
# - Validation on fixed batches makes losses comparable between steps.
# - A hundred losses equal to PyTorch's test every gradient, the optimiser, the
#   schedule and the initialisation at once, and show a mistake that a falling
#   loss hides.
#
# ## Exercises
#
# **1** (★). How much of its training text did the run read, in epochs? What does
# that say about the gap between the two curves of figure 1.17.2?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# Steps times $BT$, divided by the number of training tokens: below one. No batch
# came twice, so each was as new to the model as the validation text, and nothing
# could be remembered.
# :::

# %% exercise 1, checked tags=["hide-cell"]
epochs = STEPS * B * T / len(learnt)
verdict("epochs", 0.5 < epochs < 1, "less than one")

# %% [markdown]
# **2** (★★). The next landmark is a table of pairs: predict each token from
# the one before it, with $p(v \mid u) = \bigl(n_{uv} + \alpha q_v\bigr) /
# \bigl(n_u + \alpha\bigr)$, where $q$ is the unigram distribution and
# $\alpha = 20$ says how much to trust it. Count on the
# training text. Has our model passed the table?
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# Count pairs with `np.add.at` into a (V, V) table. It pays a good deal less than
# the unigram entropy. Our model is small and has trained for a minute: it has yet
# to pass the table, and goes on falling.
# :::


# %% exercise 2, the table tags=["hide-cell"]
def bigram_entropy(text, tokens, V, trust=20):
    q = (np.bincount(text, minlength=V) + 1.0) / (len(text) + V)
    pairs = np.zeros((V, V))
    np.add.at(pairs, (text[:-1], text[1:]), 1)
    before, after = tokens[:-1], tokens[1:]
    known = pairs[before, after] + trust * q[after]
    return -np.log(known / (pairs.sum(axis=1)[before] + trust)).mean()


# %% exercise 2, checked
pair_loss = bigram_entropy(learnt, held_out, V)
verdict("bigrams", pair_loss < marks["unigram"], "below the unigrams")
verdict("the model", final > pair_loss, "has yet to pass them")

# %% [markdown]
# ## Further reading
#
# - Karpathy (2019),
#   [A Recipe for Training Neural Networks](https://karpathy.github.io/2019/04/25/recipe/):
#   the first loss, the single batch, and the order in which to distrust
#   things.
# - Shannon (1951),
#   [Prediction and Entropy of Printed English](https://doi.org/10.1002/j.1538-7305.1951.tb01366.x):
#   the landmarks of this chapter for English letters, measured with people
#   in place of the network.
# - Hoffmann et al. (2022),
#   [Training Compute-Optimal Large Language Models](https://arxiv.org/abs/2203.15556):
#   section 3, on how many tokens a model of a given size should read.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.17")
