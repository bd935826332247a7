# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       train.landmarks: "What counting alone pays for a text."
#       text.readers: "A text cut into equal parts, one for each row of a batch."
# ---

# %% [markdown]
# # Training: the loss falls
#
# > Batches become gradients, gradients become a model that predicts better than
# > counting can, along the curve that PyTorch draws.
#
# *Reading time: 25 minutes. You need: all chapters before this one, above all AdamW
# ([chapter 1.12](12_adamw.ipynb)) and the model ([chapter 1.17](17_model.ipynb)).
# Runs that are kept, resumed and fast: Parts [2](../2_cpu/07_step.ipynb) and
# [4](../4_practice/13_loop.ipynb).*
#
# ## Where we are

# %% where we are
from llmnb.book.diagram import PALETTE, gpt2_diagram

gpt2_diagram(lit="training")

# %% [markdown]
# *Figure 1.18.1. Each box has a forward pass and a proven backward pass. What
# is missing is the loop around them: after each update, the next batch.*
#
# This chapter writes that loop, in NumPy, and runs it until a model has learnt to
# write something like a program. At its end you can
#
# - say what loss to expect before the first step, and which landmarks a trained
#   model must pass;
# - write a training step as five calls, in the one order that works;
# - read a loss curve: the fall, the bend, the gap between training and
#   validation;
# - show that our arithmetic is PyTorch's, step after step.
#
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
from operator import index

import numpy as np

from llmnb.checks import check_tokens
from llmnb.shapes import check_number

# %% [markdown]
# ## By hand: what a loss means
#
# A model that gives every one of $V$ tokens the probability $1/V$ pays
#
# $$ \mathcal L_\text{uniform} = \log V \tag{1.18.1} $$
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
# Counting is the best that can be done without looking at the context. Let $n_v$
# count how often token $v$ occurs among $N$ tokens, and let a model that ignores its
# input give token $v$ the probability $q_v$. Its loss is
#
# $$ \mathcal L(q) = -\sum_v \frac{n_v}{N} \log q_v ,
#    \qquad \sum_v q_v = 1 . \tag{1.18.2} $$
#
# This is the cross-entropy (1.11.4) of the shares $n_v / N$ and of what the model
# believes. As shown there, it is never less than the entropy of the shares, and is
# that only where the model believes in them:
#
# $$ q_v = \frac{n_v}{N} . \tag{1.18.3} $$
#
# This $q$ is the **unigram distribution**, and the loss at it the **unigram
# entropy**. A network whose loss is above it has not yet learnt how frequent each
# token is; one below it must be using the tokens that came before. We count on the
# training text and charge the validation text, and add 1 to every count so that a
# token never seen does not cost infinitely much.


# %% the unigram entropy tags=["export"]
def unigram_entropy(train_tokens, tokens, vocab_size):
    """Mean -log p of `tokens` under the token frequencies of a text.

    train_tokens, tokens: 1-D integer arrays with values in [0, vocab_size).
    Every count is raised by 1. Returns nats a token, a float.
    """
    return ngram_entropy(train_tokens, tokens, vocab_size, 1)


# %% [markdown]
# Counting can look back, too. A table of **bigrams** holds how often $v$ came
# after each token, as in [chapter 1.1](01_learns.ipynb); a table of **trigrams**,
# how often it came after each pair. The longer the context $u$, the fewer times it
# was seen, and most contexts of two tokens were never seen at all. So a long
# context's counts are mixed with what the context $u'$ without its first token
# says:
#
# $$ p(v \mid u) = \frac{n_{uv} + \alpha\, p(v \mid u')}{n_u + \alpha} .
#    \tag{1.18.4} $$
#
# Here $n_u$ counts how often the context $u$ was followed by any token, and $n_{uv}$
# how often by $v$. The right side is $\frac{n_u}{n_u + \alpha}$ times the plain
# frequency $n_{uv} / n_u$, and $\frac{\alpha}{n_u + \alpha}$ times the shorter
# context's answer: a context seen $\alpha$ times is trusted half, one never seen
# not at all. Without any context, $p(v)$ is (1.18.3) with the counts raised by 1.
# We take $\alpha = 32$; twice as much does a little better on this chapter's text,
# half as much worse. These tables are honest rivals: they remember all that they ever
# saw, and make no mistake in counting. A transformer that ends above the trigrams
# has learnt less from 64 tokens than a table from two.
#
# To count runs of $n$ tokens, `_counts` reads each as one whole number whose digits,
# in base $V$, are the tokens. The numbers of the text are sorted and counted, and
# `searchsorted` finds the place where each number that is asked for would stand.


# %% how often each row occurs tags=["exporti"]
def _counts(text, asked, n, vocab_size):
    """How often each run of n tokens of `asked` occurs in `text`."""
    weights = vocab_size ** np.arange(n)[::-1]
    windows = np.lib.stride_tricks.sliding_window_view
    numbers = windows(text, n) @ weights
    known, counts = np.unique(numbers, return_counts=True)
    wanted = windows(asked, n) @ weights
    place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return np.where(known[place] == wanted, counts[place], 0)


# %% the probabilities of a table tags=["exporti"]
def _ngram(text, asked, vocab_size, n, trust):
    """The probability of each token of `asked`, from n - 1 before it."""
    if n == 1:
        counts = np.bincount(text, minlength=vocab_size) + 1.0
        return (counts / counts.sum())[asked]
    shorter = _ngram(text, asked, vocab_size, n - 1, trust)
    # the context of a run is the run without its last token
    context = _counts(text[:-1], asked[:-1], n - 1, vocab_size)
    whole = _counts(text, asked, n, vocab_size)
    mixed = (whole + trust * shorter[n - 1 :]) / (context + trust)
    return np.concatenate([shorter[: n - 1], mixed])


# %% the entropy of a table tags=["export"]
def _checked(name, tokens, vocab_size):
    tokens = np.asarray(tokens)
    if tokens.size:  # of no elements the type says nothing
        check_tokens(f"ngram_entropy: {name}", tokens, vocab_size)
    return tokens.astype(np.int64)


def ngram_entropy(train_tokens, tokens, vocab_size, n, trust=32):
    """Mean -log p of `tokens` under a table of n-grams of a text.

    train_tokens, tokens: 1-D integer arrays with values in [0, vocab_size).
    n: the length of a run, its last token being the predicted one; 1 looks at
    no context. trust: how often a context must have been seen to be trusted
    half. Returns nats a token. Raises TypeError or ValueError for anything
    else, and unless vocab_size ** n is below 2 ** 63.
    """
    vocab_size, n = index(vocab_size), index(n)  # NumPy's powers overflow
    check_number("ngram_entropy: n", n, "at least 1")
    check_number("ngram_entropy: trust", trust, "above 0")
    if vocab_size**n >= 2**63:
        raise ValueError(
            f"ngram_entropy: {vocab_size} ** {n} runs do not fit in an int64"
        )
    text = _checked("train_tokens", train_tokens, vocab_size)
    asked = _checked("tokens", tokens, vocab_size)
    if not asked.size:
        raise ValueError("ngram_entropy: tokens must hold at least one token")
    longest = max(1, min(n, len(text), len(asked)))  # of the runs there are
    p = _ngram(text, asked, vocab_size, longest, trust)
    return float(-np.log(p).mean())


# %% the toy language again
toy = np.array([0, 0, 0, 0, 1, 1, 2, 3])
far = unigram_entropy(np.tile(toy, 1000), toy, 4)
compare("toy language", far, -(p * np.log(p)).sum(), tol=1e-3)
turns = np.tile([0, 1, 2, 1], 1000)  # after a 1, only the pair can tell
costs = [ngram_entropy(turns, turns, 3, n, trust=1) for n in (1, 2, 3)]
for name, cost, wanted in zip(
    ("alone", "pairs", "triples"), costs,
    (1.5 * np.log(2), np.log(2) / 2, 0), strict=True,
):  # fmt: skip
    compare(name, cost, wanted, tol=1e-2)

# %% [markdown]
# ## A text, a model
#
# The text is source code of Python's own library, as in
# [chapter 1.1](01_learns.ipynb), 400,000 characters of it. It becomes tokens of
# [chapter 1.2](02_tokens.ipynb), and [chapter 1.3](03_batches.ipynb) makes the
# batches. The last tenth is set aside: `validate` reads it from its beginning each
# time, so that one loss can be compared with the next.

# %% tokens and batches
with gzip.open("../../tests/data/library.jsonl.gz") as lines:
    text = "".join(json.loads(line)["text"] for line in lines)[:400_000]
encoding = tokenizer.train([text[:200_000]], vocab_size=1024)
tokens = np.array(encoding.encode_ordinary(text), np.uint16)
held_out = tokens[-len(tokens) // 10 :]
learnt = tokens[: -len(tokens) // 10]
B, T, V = 4, 64, encoding.n_vocab
batches = DataLoader([learnt], B, T, seed=42)
validation = DataLoader([held_out], B, T, shuffle=False)
print(f"{len(learnt):,} tokens to train on, {len(held_out):,} to validate on")

# %% a small GPT-2
cfg = GPT2Config(T, V, num_layers=2, num_heads=4, channels=64)
model = GPT2(cfg, B, T, backend="reference", seed=42)


def validate(model):
    """The mean loss over the batches of the validation text."""
    validation.reset()
    count = (len(held_out) - 1) // (B * T)
    losses = [model.forward(*validation.next_batch()) for _ in range(count)]
    return np.mean(losses)


# %% the landmarks
names = {1: "unigrams", 2: "bigrams", 3: "trigrams"}
marks = {"uniform": np.log(V)}
for n, name in names.items():
    marks[name] = ngram_entropy(learnt, held_out, V, n)
for name, loss in marks.items():
    print(f"{name:<9}{loss:6.2f}")
tried = [ngram_entropy(learnt, held_out, V, 3, x) for x in (16, 32, 64, 128)]
print("trigrams with a trust of 16, 32, 64, 128:", np.round(tried, 3))
verdict("trust 32", tried[1] < min(tried) + 0.03, "is within 0.03 of the best")

# %% [markdown]
# These are the landmarks. A run that has passed the last of them knows more of
# Python than a table of all triples of tokens.
#
# What will the very first loss be? With logits that do not depend on the target,
# (1.15.4) has derived it:
#
# $$ \mathbb E \Bigl[ \log \sum_v e^{z_v} - z_\text{target} \Bigr]
#    \approx \log V + \tfrac12 C \sigma^2 . \tag{1.18.5} $$
#
# With 64 channels and $\sigma = 0.02$ the excess over (1.18.1) is
# $\tfrac12 \cdot 64 \cdot 0.0004 = 0.0128$. A first loss that is far from this
# means that something is broken before training has begun. Well above it: weights
# that are too wide. Well below: targets that are not shifted by one, since a token's
# own logit begins larger than the others (`wte` reads it and writes the logits). The
# check allows an error of half the excess, so that (1.18.1) alone would fail it.

# %% the first loss, predicted
predicted = marks["uniform"] + cfg.channels * 0.02**2 / 2
draw = np.random.default_rng(0)
pairs = [draw.integers(0, V, (2, B, T)) for _ in range(16)]
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
#
# ## The loop
#
# One **training step** is five calls:
#
# | call | reads | writes |
# |---|---|---|
# | `forward` | a batch, the weights | activations, the loss |
# | `backward` | activations, the weights | gradients |
# | `clip_gradients` | gradients | gradients, if their norm is above 1 |
# | `learning_rate` | the step's number | nothing: a function of the step |
# | `update` | gradients, the rate | the weights, AdamW's two averages |
#
# The order is forced. Only the rate is free: any moment before `update` will do.
# `backward` needs the activations of the very `forward` before it, and clipping must
# see all gradients together. `update` counts its steps from 1.


# %% a training step
def train_step(model, batch, step, rate):
    """Train once; returns the loss before the update."""
    loss = model.forward(*batch)
    model.backward()
    model.clip_gradients(1.0)
    model.update(
        rate, beta2=0.95, weight_decay=0.1, step=step + 1,
        decay=decaying(model.cfg),
    )  # fmt: skip
    return loss


# %% [markdown]
# Now and then we want to hear how far it is. The model writes: draw a token with
# the probabilities it gives, append it, ask again ([chapter 1.19](19_writing.ipynb)
# does it with more care).


# %% let it write
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
# Here is the whole of it. `learning_rate` is given the step, the peak, the steps of
# warm-up, how many steps there are, and what share of the peak is left at the end.

# %% the loop
STEPS, SHOWN = 3000, (0, 200, 1000, 3000)
losses, checks, samples = [], {}, {}


def train(until):
    for step in range(len(losses), until):
        rate = learning_rate(step, 5e-3, 150, STEPS, final=0.05)
        loss = train_step(model, batches.next_batch(), step, rate)
        losses.append(loss)
    checks[until] = validate(model)
    samples[until] = sample(model)


train(0)
train(50)
train(200)

# %% [markdown]
# A minute or two for the rest, and every product in it you have derived.

# %% a third of the way
train(600)
train(1000)

# %% half way and beyond
train(1500)
train(2000)

# %% the end
train(2500)
train(STEPS)

# %% [markdown]
# Which landmarks has it passed?

# %% the landmarks, passed
final = checks[STEPS]
verdict("200 steps", checks[200] < marks["unigrams"], "uses the last tokens")
verdict("the end", final < marks["bigrams"], "knows more than pairs")
verdict("the end", final < marks["trigrams"], "knows more than triples")
gap = final - np.mean(losses[-200:])
verdict("the gap", abs(gap - 0.8) < 0.15, "about 0.8 nats at the end")

# %% the loss curve tags=["hide-input"]
fig, ax = plt.subplots(figsize=(8, 4.4), dpi=100)
ax.plot(losses, color=PALETTE["grey"], lw=0.5, label="one batch")
mean = np.convolve(losses, np.ones(50) / 50, "valid")
where = np.arange(len(mean)) + 24.5
ax.plot(where, mean, color=PALETTE["blue"], label="mean of 50")
ax.plot(
    *zip(*checks.items(), strict=True),
    "o-",
    color=PALETTE["orange"],
    label="validation",
)
for name, height in marks.items():
    ax.axhline(height, color=PALETTE["ink"], lw=1, ls="--")
    ax.text(STEPS * 1.06, height, name, va="center")
ax.set(xlabel="step", ylabel="loss (nats a token)")
ax.margins(x=0.05)
ax.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.7))
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.18.2. The loss falls fast to the unigrams, bends at about 5, and ends
# just under the triples.*
#
# In fifty steps the loss falls to the unigrams: the model has learnt which tokens
# are frequent. It falls on to about 5, where it bends, and from there more slowly,
# as the model learns what follows what: past the pairs, and in the end past the
# triples. The batches that it trains on soon cost it less than the text it has not
# seen, and in the end 0.8 nats less: by then it has been through them nearly six
# times.
#
# The triples are passed, but narrowly: this is a run of minutes, and a table whose
# trust was chosen for this text comes closer still. The hour at the end of the
# chapter leaves them far behind.
#
# And here is what it wrote on the way. Nobody told it about words, brackets or
# indents. (A � stands for bytes that are no whole character.)

# %% what it wrote on the way tags=["nbval-ignore-output", "fold-input"]
for number in SHOWN:
    print(f"--- after {number} steps, loss {checks[number]:.2f}")
    print(samples[number])

# %% the numbers of this run tags=["nbval-ignore-output", "fold-input"]
for name, loss in marks.items():
    print(f"{loss:.3f}  {name}")
print(f"{final:.3f}  the model, on text it has not seen")

# %% [markdown]
# ## Why these numbers
#
# Every number of the run is a choice.
#
# - **$B = 4$, $T = 64$.** 256 tokens a step: many small steps learn more from the
#   same tokens than few large ones, as long as the noise of a batch does not drown
#   them.
# - **$V = 1024$.** Common words of code are single tokens, and the classifier stays
#   smaller than the blocks.
# - **2 layers, 64 channels, 4 heads.** What NumPy trains while you wait. One layer
#   cannot look for what followed the last time, two can
#   ([chapter 1.20](20_inside.ipynb)).
# - **3,000 steps.** Nearly six times through the text; more would be learnt by heart,
#   which is called *overfitting*.
# - **Peak 0.005.** Small models bear more than the 0.0006 usual at GPT-2's size, and not
#   any amount.
# - **150 steps of warm-up, clip at 1, $\beta_2 = 0.95$.** AdamW's defences ([chapter
#   1.12](12_adamw.ipynb)) against its first steps and against single bad batches.
# - **Final rate 0.05 of the peak.** The last steps settle what the large ones shook.
# - **Decay 0.1.** GPT-3's, taken over without a trial of our own.
#
# The same run was done again, on fast layers that compute the same numbers up to
# rounding, each time with one of these changed and from two or three seeds
# (`tests/record_ablations.py` records it). For each change, the mean of the last
# validation losses, and how far that is from the run as it is:

# %% each setting's price tags=["fold-input"]
lines = Path("../../tests/data/ablations.csv").read_text("utf-8").splitlines()
runs = {}
for name, _, *path in (x.split(",") for x in lines[1:]):
    runs.setdefault(name, []).append([float(x) for x in path])
ends = {name: np.array(found)[:, -1] for name, found in runs.items()}
usual, spread = ends["as it is"].mean(), np.ptp(ends["as it is"])
for name, found in ends.items():
    print(f"{name:<12}{found.mean():6.2f}  {found.mean() - usual:+.2f}")

# %% which differences count tags=["hide-input"]
verdict("no warm-up", ends["no warm-up"].min() > usual + 3 * spread, "dearer")
verdict(
    "no clipping", ends["no clipping"].max() > usual + 3 * spread, "a risk"
)
verdict("no clipping", ends["no clipping"].min() < usual + spread, "not a tax")
verdict("beta2 0.999", ends["beta2 0.999"].max() < usual + spread, "no dearer")
verdict("peak 0.01", ends["peak 0.01"].min() > usual + 3 * spread, "dearer")
low = abs(ends["peak 0.002"].mean() - usual)
verdict("peak 0.002", low < spread, "as good")
early = {name: np.array(found)[:, 1] for name, found in runs.items()}
behind = early["no clipping"] - early["as it is"].mean()
print(f"spread {spread:.3f}; no clipping, after 250 steps:", behind.round(2))

# %% [markdown]
# Three runs that differ in nothing but the seed end 0.022 apart, the *spread*, so a
# difference must be larger than that to mean anything; the checks ask for three
# times as much. Without warm-up both runs end 0.19 higher: what the first steps
# throw about is never quite put back. Clipping is an insurance. Of two runs without
# it, one ended as if nothing had been missing; the other was 0.2 behind after 250
# steps already, and never made it up.
#
# And $\beta_2$? With PyTorch's 0.999 the run ends no higher. The argument for the
# short memory in [chapter 1.12](12_adamw.ipynb) is about spikes, and this run,
# clipped, meets none that matter. We keep 0.95 because larger models are trained
# with it, and say that we have not shown why. A peak of 0.002 does as well as
# 0.005, too; 0.01 is too much.
#
# ## Proof: the same curve as PyTorch
#
# A falling loss does not prove that the arithmetic is right: a wrong gradient often
# points downhill too. So we compare with an implementation that shares no line with
# ours. PyTorch has trained the same model from the same seed on the same batches,
# and the loss of each of its 200 steps is recorded, once in float32 and once in
# float64. We follow it for a hundred, which is a severe test: an error in one step
# changes the weights of all later ones.
#
# The tokens come from a file this time: bytes of five modules of Python 3.11, each
# read once.

# %% the run that PyTorch recorded tags=["fold-input"]
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


# %% imports of the readers tags=["export"] module="text.readers"
import numpy as np


# %% eight readers of one text tags=["export"] module="text.readers"
class Readers:
    """Row b of each batch reads part b of a text, from its beginning.

    tokens: a 1-D integer array of B * T * n tokens, for n batches, and one
    more, or ValueError is raised. Its next_batch() returns (tokens, targets),
    each int32 (B, T).
    """

    def __init__(self, tokens, B, T):
        tokens = np.array(tokens, np.int32)
        if tokens.ndim != 1 or (tokens.size - 1) % (B * T):
            raise ValueError(
                f"Readers: tokens must have shape (n * {B * T} + 1,), "
                f"got {tokens.shape}"
            )
        self.tokens = tokens[:-1].reshape(B, -1, T)
        self.targets = tokens[1:].reshape(B, -1, T)
        self.step = 0

    def next_batch(self):
        """The batch that follows; IndexError after the last."""
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
        rate = learning_rate(number, 2e-3, 20, 200, final=0.1)
        found.append(train_step(student, feed.next_batch(), number, rate))
    return np.array(found)


ours = our_curve(100)
worst = np.abs(ours - theirs64[:100]).max()
verdict("100 losses", worst < 1e-6, "within 1e-06 of PyTorch's")
rounding = np.abs(theirs - theirs64)[:100].max()
verdict("nearer", worst < rounding, "than PyTorch's own float32")

# %% [markdown]
# Would the comparison notice a mistake? Make one that is hard to see in a
# falling loss: let the update count its steps from 2, so that AdamW's bias
# correction is off by one step.

# %% a mistake, seen in the curve
wrong = our_curve(40, late=1)
verdict("the mistake", wrong[-1] < wrong[0] - 1, "learns all the same")
far = np.abs(wrong - theirs64[:40]).max()
verdict("the mistake", far > 1e-2, "is far from the curve")

# %% two curves and their difference tags=["hide-input"]
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
low.set(xlabel="step", ylabel="distance to\nPyTorch float64", ylim=(1e-9, 9))
low.legend(frameon=False, ncols=3)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.18.3. Our curve, in float64, covers PyTorch's, bump for bump, as far as
# we follow. Below, on a logarithmic scale, the distance to PyTorch's float64 run.*
#
# That run is recorded to eight decimals; where both agree in all of them, a line
# leaves the picture. The distance of PyTorch's own float32 run shows how far
# rounding alone leads. Ours is closer than that, and the mistake, once the first
# update is done, stands thousands of times further off.
#
# ## An hour instead of minutes
#
# What would more of everything do? The same code with the fast layers of
# [Part 2](../2_cpu/07_step.ipynb), a model of 6 layers, 6 heads and 192 channels
# that looks at 256 tokens, all ten million characters of the library's source
# instead of 400,000, and 12,000 steps of 2,048 tokens instead of 3,000 of 256:
# 83 minutes on two cores, beside other work. Its log, its samples and its weights
# are kept in `book/hour`; `tests/record_hour.py` names the command. The landmarks
# are counted anew, on this run's own text.

# %% the log of the hour tags=["fold-input"]
HOUR = Path("../../book/hour")
hour_marks = json.loads((HOUR / "landmarks.json").read_text("utf-8"))
written = json.loads((HOUR / "samples.json").read_text("utf-8"))
lines = (HOUR / "log.csv").read_text("utf-8").splitlines()[1:]
log = [[float(x or "nan") for x in line.split(",")] for line in lines]
when, trained, validated = np.array(log).T
hour, known = validated[-1], ~np.isnan(validated)
for name, loss in hour_marks.items():
    print(f"{loss:5.2f}  {name}")
print(f"{hour:5.2f}  the model, on text it has not seen")

# %% what the log says tags=["hide-input"]
verdict("the hour", hour < hour_marks["trigrams"] - 1, "far under triples")
under = when[known & (validated < hour_marks["trigrams"])][0]
verdict("the triples", under == 2000, "passed at step 2,000")
least = when[known][validated[known].argmin()]
verdict("the least", least == 11_000, "at step 11,000, a little below the end")

# %% draw the hour tags=["hide-input"]
fig, ax = plt.subplots(figsize=(8, 4), dpi=100)
ax.plot(when, trained, color=PALETTE["blue"], lw=1, label="mean of 50 batches")
ax.plot(
    when[known], validated[known], "o-", ms=3, color=PALETTE["orange"],
    label="validation",
)  # fmt: skip
for name, height in hour_marks.items():
    ax.axhline(height, color=PALETTE["ink"], lw=1, ls="--")
    ax.text(when[-1] * 1.06, height, name, va="center")
ax.set(xlabel="step", ylabel="loss (nats a token)")
ax.margins(x=0.05)
ax.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.7))
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.18.4. The hour. It passes the triples after 2,000 steps and goes on.*
#
# The loss on the batches falls nearly to the end. That on unseen text falls more and
# more slowly, and not at all in the last thousand steps: there the text is read for
# the sixth and the seventh time, and the gap between the two curves is widest.
#
# What the model wrote on the way shows the same descent. Every text was begun by the
# same word, `class`, and a space, and drawn with the same seed, at a temperature of
# 0.8 ([chapter 1.19](19_writing.ipynb)).

# %% what it wrote during the hour tags=["fold-input"]
for step in ("500", "2000", "12000"):
    print(f"--- after {int(step):,} steps")
    print(written["after"][step])

# %% [markdown]
# At a glance the last one is Python: a class, its docstring, names that belong
# together. Read a second time it means nothing.
#
# The likeliest token each time, without any draw, is a harder test, and the
# model fails it:

# %% the likeliest text
print(written["greedy"])
words = written["greedy"].split()
verdict("greedy", len(set(words)) < len(words) / 2, "says the same again")

# %% [markdown]
# The reason is in this chapter's own loss. Nothing in it asks for a whole text
# to be likely, only for each next token after a text that people wrote. Once a
# phrase has stood there twice, a third time may well be the likeliest.
# [Chapter 1.19](19_writing.ipynb) draws instead. [Chapter 1.20](20_inside.ipynb)
# opens this model and shows heads that find what followed the last time.
#
# ## Count it
#
# A token costs $6N + 6LCT$ floating-point operations ([chapter
# 1.4](04_gpt2.ipynb)). Times the tokens of all steps:

# %% the work of the run
from llmnb.model.tensors import flops_per_token, parameter_count

work = flops_per_token(cfg, T) * B * T * STEPS
print(f"{parameter_count(cfg):,} parameters, {B * T * STEPS:,} tokens")
print(f"{work / 1e12:.2f} TFLOP")

# %% [markdown]
# ## Take away
#
# - Before training, the loss must be near $\log V$, by (1.18.5). The unigram
#   entropy is the first thing to beat: below it, a model uses context.
# - A step is forward, backward, clip, rate, update.
# - Validation on fixed batches makes losses comparable between steps.
# - A hundred losses equal to PyTorch's test every gradient, the optimiser, the
#   schedule and the initialisation at once, and show a mistake that a falling
#   loss hides.
#
# ## Exercises
#
# **1** (★). How much of its training text did the run of 3,000 steps read, in
# epochs (times through the text), and how much did the hour? What does that say
# about the gap between the two curves of figure 1.18.4?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# Steps times $BT$, divided by the number of training tokens: between five and six,
# and between six and seven. A text that comes for the sixth time is known in part
# by heart, and what is known by heart does not help on a text never seen.
# :::

# %% exercise 1, checked tags=["hide-cell"]
hour_tokens = json.loads((HOUR / "config.json").read_text("utf-8"))
epochs = [
    STEPS * B * T / len(learnt),
    12_000 * 8 * 256 / hour_tokens["train_tokens"],
]
verdict("minutes", 5 < epochs[0] < 6, "five to six times")
verdict("the hour", 6 < epochs[1] < 7, "six to seven times")

# %% [markdown]
# **2** (★★). Would a table of runs of four tokens be a better rival than the
# triples? Try it, and say why.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# Hardly. More than half of the validation text's contexts of three tokens never
# stood in the training text, and of the different runs of three that did stand
# there most stood once. (1.18.4) then hands back what the triples
# say, nearly unchanged. A table cannot know that two contexts are alike; a network
# is made of nothing else. With a trust of 64 the runs of four do a little better than
# the triples with any, and come level with our network of minutes.
# :::

# %% exercise 2, checked tags=["hide-cell"]
fours = ngram_entropy(learnt, held_out, V, 4)
verdict("four", abs(fours - marks["trigrams"]) < 0.05, "hardly differ")
better = ngram_entropy(learnt, held_out, V, 4, trust=64)
verdict("trust 64", better < min(fours, *tried), "a little better")
verdict("trust 64", abs(better - final) < 0.1, "level with the network")
long_text = (np.asarray(x, np.int64) for x in (learnt, held_out))
runs3, asked3 = (
    np.lib.stride_tricks.sliding_window_view(x, 3) @ [V**2, V, 1]
    for x in long_text
)
different, often = np.unique(runs3, return_counts=True)
verdict("never seen", (~np.isin(asked3, different)).mean() > 0.5, "over half")
verdict("seen once", (often == 1).mean() > 0.6, "most of the different ones")

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
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.18")
