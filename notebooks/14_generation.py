# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     module: generate
# ---

# %% [markdown]
# # Write text by drawing tokens
#
# > A trained model gives a distribution over the next token. Temperature,
# > top-k and top-p reshape it, a seeded draw picks one, and the loop repeats.

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.diagram import gpt2_diagram

gpt2_diagram(lit="crossentropy")

# %% [markdown]
# *Figure 14.1. To write, the model runs forward as far as the softmax. The
# probabilities of the next token come out; one token is drawn from them and
# joins the tokens at the top.*
#
# [Chapter 13](13_training.ipynb) ended with a text that nobody wrote, drawn
# by ten lines of code. This chapter takes those lines apart. It builds
# `generate`, and `llmnb`, the command that brings training and writing to
# your terminal. At its end you can
#
# - say what temperature does to the entropy of a distribution, and prove it;
# - derive top-k and top-p from one principle;
# - show why the padding behind a text cannot change what comes next;
# - read off a model's probabilities what it has learnt.
#
# You need softmax from [chapter 9](09_crossentropy.ipynb) and the training
# run of [chapter 13](13_training.ipynb).

# %% [markdown]
# ## Setup

# %% setup
import matplotlib.pyplot as plt

from llmnb.diagram import PALETTE
from llmnb.verify import compare, verdict

# %% imports of the sampler tags=["export"]
import codecs
import math

import numpy as np

from llmnb.checks import check_tokens

# %% [markdown]
# ## By hand: why draw at all
#
# Suppose that after `for` the model says: `i` 0.5, `x` 0.3, `line` 0.2. We
# could always take the most probable token. That is called **greedy**
# decoding, and it gives `i` every time. A text written so is the same on
# each run, and it often falls into a loop: once a phrase has come twice, a
# third time is the most probable continuation. Drawing by the
# probabilities gives `line` in a fifth of the cases, as the training text
# had it.
#
# A draw needs one random number $u$, uniform in $[0, 1)$. Lay the
# probabilities end to end; the token is the piece that $u$ falls into.
# The borders are the running sums 0.5, 0.8, 1.0. With $u = 0.65$ we get
# `x`.

# %% three draws by hand
borders = np.cumsum([0.5, 0.3, 0.2])
names = np.array(["i", "x", "line"])
for u in (0.1, 0.65, 0.93):
    print(u, names[np.searchsorted(borders, u, side="right")])

# %% [markdown]
# The function below does this for any distribution. It scales $u$ by the
# last border, which rounding may leave a little off 1, and never returns a
# token of probability 0: such a piece has no length, and
# `side="right"` steps over it.


# %% one draw tags=["export"]
def draw(probs, u):
    """The token that a number u in [0, 1) falls on, an int.

    probs: (V,), not negative, with a positive sum. A token of probability 0
    is never returned.

    Derived in chapter 14.
    """
    borders = np.cumsum(probs, dtype=np.float64)
    token = int(np.searchsorted(borders, u * borders[-1], side="right"))
    return min(token, int(np.flatnonzero(probs)[-1]))


# %% a hundred thousand draws
rng = np.random.RandomState(14)
probs = np.array([0.0, 0.5, 0.3, 0.0, 0.2, 0.0])
drawn = np.bincount([draw(probs, u) for u in rng.random_sample(100_000)])
compare("frequencies", drawn / 100_000, probs[:5], tol=0.01)
verdict("never drawn", drawn[0] == drawn[3] == 0, "probability 0")
ends = draw(probs, 0.0), draw(probs, 1 - 2**-53)
verdict("u at its ends", ends == (1, 4), "the first and the last")

# %% [markdown]
# ## Temperature
#
# Between the greedy choice and the plain draw lies a whole scale. Divide the
# logits $z_v$ by a **temperature** $\tau > 0$ before the softmax:
#
# $$ p_v(\tau) = \frac{e^{z_v / \tau}}{\sum_w e^{z_w / \tau}} . \tag{14.1} $$
#
# At $\tau = 1$ these are the model's own probabilities. The ratio of two of
# them is $p_v / p_w = e^{(z_v - z_w)/\tau}$. As $\tau \to 0$ the ratio of
# the best to any other grows beyond all bounds, and the distribution
# becomes the greedy choice. As $\tau \to \infty$ every ratio goes to 1: a
# uniform guess. In between, how does the uncertainty grow? It is measured by
# the entropy
#
# $$ H(\tau) = -\sum_v p_v \log p_v . \tag{14.2} $$
#
# Write $\beta = 1/\tau$ and $Z = \sum_w e^{\beta z_w}$, so that
# $\log p_v = \beta z_v - \log Z$. Put this into (14.2), with
# $\langle z \rangle = \sum_v p_v z_v$ for the mean logit:
#
# $$ H = \log Z - \beta \langle z \rangle . \tag{14.3} $$
#
# Two derivatives by $\beta$ are needed. The first is
# $\partial \log Z / \partial \beta = \frac1Z \sum_w z_w e^{\beta z_w}
# = \langle z \rangle$. For the second, differentiate
# $p_v = e^{\beta z_v} / Z$:
#
# $$ \frac{\partial p_v}{\partial \beta} = p_v \, (z_v - \langle z \rangle) ,
#    \qquad
#    \frac{\partial \langle z \rangle}{\partial \beta}
#    = \sum_v z_v\, p_v \, (z_v - \langle z \rangle)
#    = \operatorname{Var}(z) . \tag{14.4} $$
#
# So $\partial H / \partial \beta =
# \langle z \rangle - \langle z \rangle - \beta \operatorname{Var}(z)$,
# and with $d\beta / d\tau = -1/\tau^2$
#
# $$ \frac{d H}{d \tau} = \frac{\operatorname{Var}(z)}{\tau^3} \ge 0 .
#    \tag{14.5} $$
#
# Raising the temperature never lowers the entropy, and where the logits
# under $p$ differ at all, it raises it.


# %% the distribution at a temperature
def softmax(z, tau):
    p = np.exp((z - z.max()) / tau)
    return p / p.sum()


def entropy(p):
    p = p[p > 0]
    return -(p * np.log(p)).sum()


z = np.array([2.0, 1.0, 0.0, -1.0])
for tau in (0.25, 0.5, 1.0, 2.0, 100.0):
    p = softmax(z, tau)
    print(f"{tau:6}: p", *(f"{x:.4f}" for x in p), f" H {entropy(p):.4f}")

# %% (14.5) against central differences
h = 1e-5
for tau in (0.3, 1.0, 3.0):
    p = softmax(z, tau)
    slope = (p @ z**2 - (p @ z) ** 2) / tau**3
    above, below = (entropy(softmax(z, tau + s)) for s in (h, -h))
    compare(f"dH/dtau at {tau}", slope, (above - below) / (2 * h), tol=1e-8)

# %% the entropy, drawn
logits = np.random.RandomState(5).normal(0, 2, 1024)
scales = np.geomspace(0.02, 50, 200)
fig, ax = plt.subplots(figsize=(8, 3.8), dpi=100)
curve = [entropy(softmax(logits, tau)) for tau in scales]
ax.semilogx(scales, curve, color=PALETTE["blue"], lw=2)
ax.axhline(np.log(1024), color=PALETTE["ink"], lw=1, ls="--")
ax.text(0.02, np.log(1024) - 0.1, "uniform: log 1024", va="top")
one = entropy(softmax(logits, 1.0))
ax.plot(1, one, "o", color=PALETTE["orange"])
ax.annotate("the model's own", (1, one), (1.25, one - 0.3), va="top")
ax.set(xlabel="temperature", ylabel="entropy (nats)", ylim=(-0.2, 7.3))
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 14.2. Entropy rises with temperature all the way from 0, the
# greedy choice, to the logarithm of the vocabulary, the uniform guess. Most
# of the climb happens within one power of ten around 1.*

# %% [markdown]
# ## Top-k and top-p
#
# A vocabulary has a long tail. Each of a thousand unlikely tokens may have a
# probability of 0.0002; together they come up in every fifth draw, and one
# wrong token can spoil the rest of the text. Cutting the tail helps. Which
# tokens should stay, and with what probabilities?
#
# Let $S$ be the set that stays, and let $q$ be a distribution on $S$. We
# want the $q$ that distorts the model's $p$ least. Measure the distortion
# by the Kullback-Leibler divergence, the nats lost when text drawn from $q$
# is charged with $p$ in place of $q$:
#
# $$ D(q \,\|\, p) = \sum_{v \in S} q_v \log \frac{q_v}{p_v} . \tag{14.6} $$
#
# Write $P(S) = \sum_{v \in S} p_v$ and $r_v = p_v / P(S)$, which is a
# distribution on $S$. Since $\log (q_v / p_v) = \log (q_v / r_v) - \log
# P(S)$,
#
# $$ D(q \,\|\, p) = D(q \,\|\, r) - \log P(S) . \tag{14.7} $$
#
# The first term is never negative and is zero for $q = r$ alone. So the
# best $q$ keeps the proportions and divides by $P(S)$, and the price is
#
# $$ D = -\log P(S) . \tag{14.8} $$
#
# Now choose $S$. If it may hold $k$ tokens, the price is least when $P(S)$
# is largest: take the $k$ most probable ones. This is **top-k**. If instead
# the price may be at most $-\log P$ for a given $P$, the smallest set that
# affords it is again filled from the top, until its sum reaches $P$. This is
# **top-p**, also called nucleus sampling. Top-k fixes the number of tokens
# and lets the price vary; top-p fixes the price and lets the number vary.
# When the model is sure, top-p keeps one or two tokens; when it is not, it
# keeps hundreds.


# %% check the settings tags=["export"]
def check_sampling(temperature, top_k, top_p):
    """Raise ValueError unless these can shape a distribution.

    temperature: at least 0. top_k: None or a whole number of at least 1.
    top_p: None or a number above 0 and at most 1.

    Derived in chapter 14.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if top_k is not None and (top_k != int(top_k) or top_k < 1):
        raise ValueError(
            f"top_k must be a whole number of at least 1, got {top_k}"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")


# %% [markdown]
# The order of the three matters, and this is the usual one: temperature
# first, then top-k, then top-p on what top-k has left, renormalised. The
# tokens are sorted once, from the most probable down; among equals the
# lower number comes first, so that the result is the same everywhere.


# %% the distribution we draw from tags=["export"]
def distribution(logits, temperature=1.0, top_k=None, top_p=None):
    """The probabilities a token is drawn with, a float64 array (V,).

    logits: (V,), of any float dtype. Temperature 0 leaves the largest logit
    alone, and the first of equals. Then top_k keeps the k most probable
    tokens, and top_p the fewest of those whose sum reaches p. Raises
    ValueError for settings out of range and when a logit is not a number.

    Derived in chapter 14.
    """
    check_sampling(temperature, top_k, top_p)
    z = np.asarray(logits, np.float64)
    if not np.isfinite(z.max()) or np.isnan(z).any():
        raise ValueError("the logits are not finite: the model is damaged")
    order = np.argsort(-z, kind="stable")
    if temperature == 0:
        return _only(order[:1], np.ones(1), len(z))
    kept = order[:top_k]
    p = np.exp((z[kept] - z[kept[0]]) / temperature)
    p /= p.sum()
    if top_p is not None:
        before = np.cumsum(p) - p
        count = max(1, int((before < top_p).sum()))
        kept, p = kept[:count], p[:count] / p[:count].sum()
    return _only(kept, p, len(z))


# %% probabilities in their places tags=["exporti"]
def _only(tokens, probs, size):
    out = np.zeros(size)
    out[tokens] = probs
    return out


# %% a small distribution, cut
z = np.log([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
for cut in ({}, {"top_k": 3}, {"top_p": 0.6}, {"temperature": 0}):
    print(f"{cut!s:<20}", np.round(distribution(z, **cut), 4) + 0.0)

# %% [markdown]
# Check the claim behind the formulas: among all sets of three tokens the
# top three cost least, and (14.8) is their price.

# %% every set of three
from itertools import combinations


def divergence(q, p):
    on = q > 0
    return (q[on] * np.log(q[on] / p[on])).sum()


p = distribution(z)
prices = {}
for kept in map(list, combinations(range(6), 3)):
    q = np.zeros(6)
    q[kept] = p[kept] / p[kept].sum()
    prices[tuple(kept)] = divergence(q, p)
best = min(prices, key=prices.get)
verdict("best set", best == (0, 1, 2), "the three most probable")
compare("its price", prices[best], -np.log(p[:3].sum()), tol=1e-12)
compare("top_k=3", distribution(z, top_k=3)[:3], p[:3] / 0.8, tol=1e-12)

# %% bad settings are refused
for bad in ({"temperature": -1}, {"top_k": 0}, {"top_p": 1.5}):
    try:
        distribution(z, **bad)
    except ValueError as error:
        print(error)

# %% [markdown]
# ## A model to draw from
#
# We train one here, small enough to take seconds, on the beginning of the
# standard library. To use a model of your own, set `RUN` to the folder that
# `llmnb train` has written; everything below works with either. The
# texts it writes depend on your Python's library, so those outputs are not
# compared when the notebook is verified.

# %% a few seconds of training
from llmnb.train import TrainConfig, loaders, new_model, prepare, train

RUN = None  # or a folder such as "../runs/stdlib"

config = TrainConfig(
    limit=2_000_000, num_layers=2, channels=96, seq_len=64, steps=500
)
data = prepare(config)
teacher = new_model(config, data.encoding.n_vocab)
batches, _ = loaders(config, data)
losses = [step.loss for step in train(config, teacher, batches)]
verdict("training", np.mean(losses[-20:]) < losses[0] - 2, "has learnt")

# %% a model of batch size 1 with the same weights
from pathlib import Path
from tempfile import TemporaryDirectory

from llmnb.gpt2 import GPT2
from llmnb.train import load_run

encoding = data.encoding
with TemporaryDirectory() as folder:
    path = Path(folder, "model.bin")
    teacher.save_checkpoint(path)
    model = GPT2.from_checkpoint(path, batch_size=1, seq_len=config.seq_len)
if RUN:
    model, encoding, config = load_run(RUN)
T, V = model.seq_len, encoding.n_vocab

# %% [markdown]
# ## The window
#
# The model was laid out for T tokens and always computes T positions. A text
# of $n < T$ tokens fills the first $n$ and leaves padding behind it. The
# probabilities of the next token stand at position $n - 1$.
#
# The padding is harmless, and here is the proof. Call the vector at
# position $t$ after layer $\ell$ $x^\ell_t$. Claim: $x^\ell_t$ depends on
# tokens $0, \dots, t$ and no others. For $\ell = 0$ it is the sum of the
# token's row of `wte` and the position's row of `wpe`: true. Suppose it
# holds below layer $\ell$. LayerNorm, the linear layers, GELU and the
# residual sum read position $t$ alone. Attention reads positions
# $s \le t$, whose vectors depend on tokens $0, \dots, s$ by assumption, all
# of them among $0, \dots, t$. So it holds above layer $\ell$ too, and at
# last for the logits.
#
# The proof is about equations; kernels add numbers in blocks and could still
# mix in what they should not. So put two different paddings behind one text
# and compare bits:

# %% two paddings, one answer
text = [encoding.eot_token, *encoding.encode_ordinary("def close(self):\n")]
n = len(text)
seen = []
for seed in (0, 1):
    window = np.random.RandomState(seed).randint(0, V, (1, T), np.int32)
    window[0, :n] = text
    model.forward(window)
    seen.append(model.logits[0].copy())
same = np.array_equal(seen[0][:n], seen[1][:n])
verdict("in the text", same, "equal to the last bit")
verdict("in the padding", not np.array_equal(*seen), "differs")

# %% [markdown]
# When the text is longer than the window, we keep its last T tokens. The
# model forgets what came before, and the tokens that stay move to lower
# positions, so nothing computed for the last window can be used again.
#
# ## The loop
#
# Fill the window, run forward, shape the distribution, draw, append. The
# model's logits have V columns: the columns that pad the vocabulary to a
# multiple of 128 are cut off, so their numbers are never drawn. The end of
# a text is itself a token, `<|endoftext|>`: when it is drawn, the text is
# over.


# %% the loop tags=["export"]
def generate(
    model,
    tokens,
    count,
    temperature=1.0,
    top_k=None,
    top_p=None,
    seed=42,
    stop=None,
):
    """An iterator over at most `count` tokens that continue `tokens`.

    model: a GPT2; row 0 of its batch is used, so a batch size of 1 wastes
    nothing. tokens: a sequence of at least one int in [0, V). temperature,
    top_k, top_p: as in `distribution`. seed: of the draws, in [0, 2**32).
    stop: a token that ends the text and is not yielded. Raises ValueError
    for a value out of range, before anything is computed.

    Derived in chapter 14.
    """
    check_sampling(temperature, top_k, top_p)
    if not len(tokens):
        raise ValueError("generate: tokens must hold at least one token")
    check_tokens("generate: tokens", np.array(tokens), model.cfg.vocab_size)
    if count < 0:
        raise ValueError(f"generate: count must be at least 0, got {count}")
    rng = np.random.RandomState(seed)
    settings = temperature, top_k, top_p
    return _continue(model, list(tokens), count, settings, rng, stop)


# %% window by window tags=["exporti"]
def _continue(model, text, count, settings, rng, stop):
    T = model.seq_len
    window = np.zeros((model.batch_size, T), np.int32)
    for _ in range(count):
        last = text[-T:]
        window[0, : len(last)] = last
        model.forward(window)
        probs = distribution(model.logits[0, len(last) - 1], *settings)
        token = draw(probs, rng.random_sample())
        if token == stop:
            return
        text.append(token)
        yield token


# %% [markdown]
# A token may end in the middle of a character: the two bytes of `é` can be
# two tokens. Decoding each token alone would give two broken characters. An
# incremental decoder holds the first byte back until the second arrives,
# so that text can be printed while it is written.


# %% tokens become text tags=["export"]
def decoded(encoding, tokens):
    """Yield the text of an iterable of tokens, piece by piece.

    encoding: a tiktoken.Encoding. Bytes that form no character become the
    replacement character, at the latest at the end.

    Derived in chapter 14.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        piece = decoder.decode(encoding.decode_single_token_bytes(token))
        if piece:
            yield piece
    piece = decoder.decode(b"", final=True)
    if piece:
        yield piece


# %% a character in two tokens
from llmnb import tokenizer

pieces = list(decoded(tokenizer.byte(), "café".encode()))
print(pieces)

# %% the promises, checked
start = [encoding.eot_token]
once = list(generate(model, start, 30, seed=7))
verdict("seeded", once == list(generate(model, start, 30, seed=7)), "repeats")
other = list(generate(model, start, 30, seed=8))
verdict("seeded", once != other, "another seed, another text")
greedy = list(generate(model, start, 30, temperature=0, seed=7))
cold = list(generate(model, start, 30, top_k=1, seed=8))
verdict("greedy", greedy == cold, "temperature 0 is top_k 1")
hot = list(generate(model, start, 200, temperature=1e6))
verdict("the padding", max(hot) < V, "never drawn, at any heat")

# %% four ways to continue tags=["nbval-ignore-output"]
prompt = [encoding.eot_token, *encoding.encode_ordinary("def close(self")]
ways = {
    "greedy": {"temperature": 0},
    "cool": {"temperature": 0.7},
    "the model's own": {"temperature": 1},
    "hot": {"temperature": 1.5},
    "top_p 0.9": {"top_p": 0.9},
}
for name, way in ways.items():
    text = encoding.decode([*generate(model, prompt, 40, **way)])
    print(f"{name}:\n    def close(self{text}\n".replace("\n", "\n    "))

# %% [markdown]
# ## See it: what the model has learnt
#
# A sample shows one path. The distribution shows what the model knows. Three
# prompts, and the eight most probable tokens after each:


# %% the next token
def following(prompt):
    ids = [encoding.eot_token, *encoding.encode_ordinary(prompt)][-T:]
    window = np.zeros((1, T), np.int32)
    window[0, : len(ids)] = ids
    model.forward(window)
    return distribution(model.logits[0, len(ids) - 1])


def shown(token):
    text = encoding.decode([int(token)])
    return text.replace(" ", "␣").replace("\n", "⏎") or "∅"


# %% draw three distributions
prompts = ("import", "def __init__(", "    return self")
fig, axes = plt.subplots(1, 3, figsize=(8, 3.6), dpi=100)
for ax, prompt in zip(axes, prompts, strict=True):
    p = following(prompt)
    top = np.argsort(-p, kind="stable")[:8][::-1]
    ax.barh(range(8), p[top], color=PALETTE["blue"])
    ax.set_yticks(range(8), [shown(x) for x in top], family="monospace")
    ax.set_title(prompt.replace(" ", "␣"), family="monospace", size=10)
    ax.set_xlabel("probability")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 14.3. The likeliest tokens after `import`, after `def __init__(` and
# after `return self` (␣ is a space, ⏎ a line's end): after the opening
# bracket of a method the model puts its money on `self`, after `self` on a
# dot, and after `import` it spreads it over many tokens.*


# %% what it knows about brackets
def chance(prompt, beginning):
    """The probability that the next token begins like this."""
    tokens = [encoding.decode_single_token_bytes(i) for i in range(V - 1)]
    hits = [x.startswith(beginning.encode()) for x in tokens]
    return following(prompt)[: V - 1][hits].sum()


opened = "    def __init__("
verdict("after (", chance(opened, "self") > 0.5, "self, most likely")
back = "        return self"
verdict(
    "after self", chance(back, ".") > chance(back, ","), "a dot, not a comma"
)

# %% [markdown]
# Turn the question round: take a line that people wrote and ask what each
# token of it cost, $-\log p$ in nats, given the tokens before. Cheap tokens
# are those the model expected.

# %% the cost of each token
line = (
    "    def read(self, size=-1):\n"
    "        if size < 0:\n"
    "            return self.buffer.read()\n"
)
ids = [encoding.eot_token, *encoding.encode_ordinary(line)][: T + 1]
window = np.zeros((1, T), np.int32)
window[0, : len(ids) - 1] = ids[:-1]
model.forward(window)
costs = [
    -np.log(distribution(model.logits[0, i])[token])
    for i, token in enumerate(ids[1:])
]

# %% draw the costs
fig, ax = plt.subplots(figsize=(8, 3.4), dpi=100)
known = np.array(costs) < 1
colours = np.where(known, PALETTE["blue"], PALETTE["orange"])
ax.bar(range(len(costs)), costs, color=colours)
ax.axhline(np.log(V), color=PALETTE["ink"], lw=1, ls="--")
ax.text(len(costs) - 0.5, np.log(V), "uniform", ha="right", va="bottom")
ax.set_xticks(
    range(len(costs)), [shown(x) for x in ids[1:]],
    rotation=90, family="monospace", size=8,
)  # fmt: skip
ax.set(ylabel="cost (nats)", xlim=(-0.7, len(costs) - 0.3))
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 14.4. What each token of three lines of Python costs. Blue bars cost
# less than one nat: `self`, the sign that must follow it, and a line's end
# with the right indentation. Names and operators, which the author chose,
# cost several nats, and so does the first indentation, which nothing
# announces.*
#
# This is the loss of chapter 13 token by token: its mean over many lines is
# the validation loss.

# %% [markdown]
# ## The command line
#
# `llmnb` has five commands, and each is a short function over what the
# chapters have built:
#
# | command | what it does |
# |---|---|
# | `llmnb train` | trains on a corpus and writes a run folder |
# | `llmnb generate RUN` | continues a prompt with a run's model |
# | `llmnb data FOLDER` | turns text into token shards |
# | `llmnb bench` | measures a training step, alone or against others |
# | `llmnb info` | versions, threads, and the size of a configuration |
#
# Three rules make it pleasant to use. `--help` answers at once: numba and
# matplotlib are imported by the commands that need them, when they run. An
# option has one home: the fields of `TrainConfig` with their help become
# the options of `llmnb train`. And a mistake of the user gets one line and
# an exit code that is not zero, without a traceback.

# %% imports of the command line tags=["export"] module="cli"
import argparse
import json
import math
import os
import re
import sys
import time
from dataclasses import fields
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from llmnb.files import replacing
from llmnb.train import (
    DataOptions,
    LearningOptions,
    ModelOptions,
    TrainConfig,
)


# %% errors in one line tags=["exporti"] module="cli"
class _Parser(argparse.ArgumentParser):
    """A parser whose errors take one line instead of the whole usage."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (try --help)\n")


def _one_line(error):
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


# %% options from fields tags=["exporti"] module="cli"
PARTS = {
    "what to read": DataOptions,
    "what the model looks like": ModelOptions,
    "how it learns": LearningOptions,
}


def _add_fields(parser, part, names=None):
    """One option for each field of a dataclass, or for those in names."""
    for field in fields(part):
        if names and field.name not in names:
            continue
        many = isinstance(field.default, tuple)
        shown = " ".join(field.default) if many else field.default
        note = f" (default: {shown})" if shown != "" else ""
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=str if many else field.type,
            nargs="+" if many else None,
            default=field.default,
            metavar=field.name.upper() if many else field.type.__name__,
            help=field.metadata["help"] + note,
        )


# %% fields from options tags=["exporti"] module="cli"
def _from_fields(args, part):
    values = {f.name: getattr(args, f.name) for f in fields(part)}
    return {k: tuple(v) if type(v) is list else v for k, v in values.items()}


# %% the number of threads tags=["exporti"] module="cli"
def _add_threads(parser):
    parser.add_argument(
        "--threads", type=int, metavar="int",
        help="threads of the kernels (default: one for each core)",
    )  # fmt: skip


def _set_threads(args):
    import numba

    if args.threads is not None:
        numba.set_num_threads(args.threads)


# %% llmnb train tags=["exporti"] module="cli"
def _add_train(commands):
    parser = commands.add_parser(
        "train",
        help="train a GPT-2 and write a run folder",
        description="Train a GPT-2 from scratch. The defaults take about two "
        "minutes on two cores.",
    )
    parser.add_argument(
        "--out", metavar="FOLDER",
        help="where to write (default: a new folder in runs/)",
    )  # fmt: skip
    parser.add_argument(
        "--force", action="store_true", help="write into a folder in use"
    )
    _add_threads(parser)
    for title, part in PARTS.items():
        _add_fields(parser.add_argument_group(title), part)
    parser.set_defaults(run=_train)


# %% a name for a run tags=["exporti"] module="cli"
RUNS = Path("runs")


def _new_folder(config):
    """runs/NAME, or the first of runs/NAME-2, -3, ... that is free."""
    first = Path(config.shards or config.corpus[0]).resolve().stem or "run"
    folder, number = RUNS / first, 1
    while folder.exists():
        number += 1
        folder = RUNS / f"{first}-{number}"
    return folder


def _newest_run():
    found = [x.parent for x in RUNS.glob("*/model.bin")]
    if not found:
        raise FileNotFoundError(
            f"there is no run in {RUNS}/ here: name a folder, or train one "
            "with `llmnb train`"
        )
    return max(found, key=lambda x: (x / "model.bin").stat().st_mtime)


# %% train, with a bar tags=["exporti"] module="cli"
def _train(args):
    from llmnb import train as t

    config = TrainConfig(**_from_fields(args, TrainConfig))
    _set_threads(args)
    folder = t.run_folder(args.out or _new_folder(config), args.force)
    start = time.perf_counter()
    data = t.prepare(config)
    _say("corpus", data.source)
    tokens = len(data.train_tokens), len(data.val_tokens)
    _say("tokens", "{:,} to train on, {:,} to validate on".format(*tokens))
    batches, validation = t.loaders(config, data)
    model = t.new_model(config, data.encoding.n_vocab)
    _say("model", _size_of(model))
    _say("folder", folder)
    run = t.train(config, model, batches, validation)
    steps = _follow(run, config, folder / "log.csv")
    t.save_run(folder, config, model, data, steps)
    _say("took", f"{time.perf_counter() - start:.0f} s")
    _report(folder, steps, t.landmarks(config, data))


# %% lines of a report tags=["exporti"] module="cli"
def _say(label, text):
    print(f"{label:<10} {text}", flush=True)


def _size_of(model):
    cfg = model.cfg
    count = sum(x.size for x in model.params.values())
    return (
        f"{cfg.num_layers} layers, {cfg.num_heads} heads, {cfg.channels} "
        f"channels, {cfg.vocab_size} tokens: {count:,} parameters, "
        f"{model.memory.nbytes / 1e6:.0f} MB in all"
    )


# %% follow a run tags=["exporti"] module="cli"
def _follow(run, config, log):
    """Collect the steps of a run; show a bar; keep the log up to date."""
    from tqdm import tqdm

    from llmnb.train import write_log

    steps, shown = [], {}
    bar = tqdm(total=config.steps, unit="step", dynamic_ncols=True)
    try:
        with bar:
            for step in run:
                steps.append(step)
                if step.val_loss is not None:
                    shown["val"] = f"{step.val_loss:.3f}"
                    write_log(log, steps)
                if step.loss is not None:
                    shown["loss"] = f"{step.loss:.3f}"
                    shown["tok/s"] = f"{step.tokens_per_second:,.0f}"
                    bar.update()
                bar.set_postfix(shown, refresh=False)
    except KeyboardInterrupt:
        if not steps:
            raise
        print("stopped: keeping what there is", file=sys.stderr)
    except FloatingPointError:
        write_log(log, steps)
        raise
    return steps


# %% the end of a run tags=["exporti"] module="cli"
SAMPLE = {"count": 200, "temperature": 0.8, "top_p": 0.95}


def _report(folder, steps, marks):
    from llmnb.files import replacing
    from llmnb.generate import decoded, generate
    from llmnb.train import load_run

    losses = [x.val_loss for x in steps if x.val_loss is not None]
    known = ", ".join(f"{name} {loss:.3f}" for name, loss in marks.items())
    _say("loss", f"{losses[-1]:.3f} on validation text ({known})")
    model, encoding, _ = load_run(folder)
    eot = encoding.eot_token
    tokens = generate(model, [eot], stop=eot, **SAMPLE)
    text = "".join(decoded(encoding, tokens))
    with replacing(folder / "sample.txt") as file:
        file.write(text.encode("utf-8"))
    print(f"\n{text}\n")
    names = " ".join(sorted(x.name for x in folder.iterdir()))
    _say("wrote", f"{folder}: {names}")
    _say("go on", f'llmnb generate {folder} --prompt "def "')


# %% llmnb generate tags=["exporti"] module="cli"
DRAWS = {
    "prompt": (str, "", "the beginning of the text"),
    "tokens": (int, 200, "tokens to write at most"),
    "temperature": (
        float,
        0.8,
        "0: the likeliest token; 1: as the model says",
    ),
    "top_k": (int, None, "draw among the k likeliest tokens only"),
    "top_p": (float, None, "draw among the likeliest that make up p only"),
    "seed": (int, 42, "another seed, another text"),
    "tokenizer": (str, "gpt2", "of a .bin file: gpt2, byte or a rank file"),
}


# %% the options of generate tags=["exporti"] module="cli"
def _add_generate(commands):
    parser = commands.add_parser(
        "generate",
        help="continue a prompt",
        description="Continue a prompt with the model of a run folder, or "
        "of a .bin file in llm.c's format.",
    )
    parser.add_argument(
        "model", nargs="?", metavar="RUN",
        help="a run folder or a .bin file (default: the newest in runs/)",
    )  # fmt: skip
    for name, (kind, default, text) in DRAWS.items():
        shown = "none" if default in (None, "") else default
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=kind,
            default=default,
            metavar=kind.__name__,
            help=f"{text} (default: {shown})",
        )
    _add_threads(parser)
    parser.set_defaults(run=_generate)


# %% write to the terminal tags=["exporti"] module="cli"
def _generate(args):
    from llmnb.generate import check_sampling, decoded, generate

    settings = args.temperature, args.top_k, args.top_p
    check_sampling(*settings)
    _set_threads(args)
    model, encoding = _load_model(args)
    eot = encoding.eot_token
    ids = [eot, *encoding.encode_ordinary(args.prompt)]
    tokens = generate(
        model, ids, args.tokens, *settings, seed=args.seed, stop=eot
    )
    print(args.prompt, end="", flush=True)
    for piece in decoded(encoding, tokens):
        print(piece, end="", flush=True)
    print()


# %% which model tags=["exporti"] module="cli"
def _load_model(args):
    from llmnb.train import load_run

    path = Path(args.model) if args.model else _newest_run()
    if not args.model:
        print(f"model: {path}", file=sys.stderr)
    if path.is_file():
        return _load_file(path, args)
    if not path.exists():
        raise FileNotFoundError(f"there is no run {path}")
    model, encoding, _ = load_run(path)
    return model, encoding


# %% a model from a file tags=["exporti"] module="cli"
def _load_file(path, args):
    """A .bin file's model, laid out for no more tokens than are asked for."""
    from llmnb.checkpoint import read_config
    from llmnb.gpt2 import GPT2
    from llmnb.train import make_encoding

    cfg = read_config(path)
    encoding = make_encoding(TrainConfig(tokenizer=args.tokenizer), [])
    if encoding.n_vocab != cfg.vocab_size:
        raise ValueError(
            f"{path} has {cfg.vocab_size} tokens, the tokenizer "
            f"{args.tokenizer} has {encoding.n_vocab}"
        )
    length = 1 + len(encoding.encode_ordinary(args.prompt)) + args.tokens
    length = max(1, min(length, cfg.max_seq_len))
    return GPT2.from_checkpoint(path, 1, length), encoding


# %% llmnb data tags=["exporti"] module="cli"
def _add_data(commands):
    parser = commands.add_parser(
        "data",
        help="turn text into token shards",
        description="Write train.bin, val.bin and tokenizer.tiktoken, for "
        "`llmnb train --shards FOLDER`.",
    )
    parser.add_argument("out", metavar="FOLDER", help="where to write")
    parser.add_argument(
        "--force", action="store_true", help="write into a folder in use"
    )
    names = "corpus", "limit", "tokenizer", "vocab_size"
    _add_fields(parser, DataOptions, names)
    parser.set_defaults(run=_data)


# %% write the shards tags=["exporti"] module="cli"
def _data(args):
    from llmnb import tokenizer
    from llmnb.data import write_shard
    from llmnb.train import prepare, run_folder

    config = TrainConfig(
        corpus=tuple(args.corpus),
        limit=args.limit,
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
    )
    folder = run_folder(args.out, args.force)
    data = prepare(config)
    _say("corpus", data.source)
    for name, tokens in (
        ("train", data.train_tokens),
        ("val", data.val_tokens),
    ):
        write_shard(folder / f"{name}.bin", tokens)
        _say(name, f"{len(tokens):,} tokens in {folder / name}.bin")
    tokenizer.save(data.encoding, folder / "tokenizer.tiktoken")
    _say("go on", f"llmnb train --shards {folder}")


# %% llmnb bench tags=["exporti"] module="cli"
def _add_bench(commands):
    parser = commands.add_parser(
        "bench",
        help="measure a training step, alone or against others",
        description="Time training steps on random tokens: tokens a second, "
        "memory, where the time goes. Every contestant has a process of its "
        "own; they take turns, and all are in memory at once.",
    )
    _add_race(parser)
    _add_outputs(parser)
    _add_threads(parser)
    shape = parser.add_argument_group("the model, without --config")
    _add_fields(shape, DataOptions, ["vocab_size"])
    names = [x.name for x in fields(ModelOptions) if x.name != "precision"]
    _add_fields(shape, ModelOptions, names)
    parser.set_defaults(run=_bench)


# %% who races, on what tags=["exporti"] module="cli"
def _add_race(parser):
    add = parser.add_argument
    add(
        "--config", nargs="+", default=[], metavar="NAME",
        help="small, 124m-64, 124m-256, 124m-1024, or several",
    )  # fmt: skip
    add(
        "--precision", nargs="+", default=["fp32", "bf16"], metavar="NAME",
        help="what llmnb computes in (default: fp32 bf16)",
    )  # fmt: skip
    add(
        "--against", nargs="+", default=[], metavar="NAME",
        help="torch, torch-compile, torch-bf16, or llmc=PATH of llm.c's "
        "train_gpt2",
    )  # fmt: skip
    add(
        "--torch-python", default=sys.executable, metavar="PATH",
        help="the Python that has torch (default: this one)",
    )  # fmt: skip
    add(
        "--steps", type=int, default=10, metavar="int",
        help="steps of each to measure (default: 10)",
    )  # fmt: skip
    add(
        "--start", action="store_true",
        help="time the first step of fresh processes; without --config this "
        "alone",
    )  # fmt: skip


# %% what is written tags=["exporti"] module="cli"
def _add_outputs(parser):
    parser.add_argument(
        "--json", metavar="FILE", help="write all numbers; - prints them"
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="draw where the time goes, as a PNG"
    )


# %% measure tags=["exporti"] module="cli"
def _bench(args):
    from tqdm import tqdm

    from llmnb.bench import bench, report
    from llmnb.race import Settings

    settings = Settings(
        tuple(args.precision), tuple(args.against), args.steps,
        args.threads, args.backend, args.torch_python,
    )  # fmt: skip
    bar = partial(tqdm, unit="round", leave=False)
    configs = _configs_of(args)
    for path in filter(None, (args.json, args.plot)):
        if not Path(path).parent.is_dir():
            raise FileNotFoundError(f"there is no folder {Path(path).parent}")
    result = bench(configs, settings, args.start, bar)
    result = {"command": _command(sys.argv[1:]), **result}
    _write_result(args, result)
    as_json = json.dumps(result, indent=1)
    print(as_json if args.json == "-" else report(result))


# %% write the files tags=["exporti"] module="cli"
def _write_result(args, result):
    from llmnb.bench import layers_figure

    if args.json and args.json != "-":
        with replacing(args.json) as file:
            file.write(json.dumps(result, indent=1).encode() + b"\n")
    if args.plot:
        with replacing(args.plot) as file:
            layers_figure(result).savefig(file, format="png")


# %% the configurations tags=["exporti"] module="cli"
def _configs_of(args):
    from llmnb.bench import CONFIGS

    for name in args.config:
        if name not in CONFIGS:
            known = ", ".join(CONFIGS)
            raise ValueError(f"no config {name!r}: choose from {known}")
    if args.config or args.start:
        return {name: CONFIGS[name] for name in args.config}
    config = _config_of(args)
    cfg = config.model(config.vocab_size)
    return {"custom": (cfg, config.batch_size, config.seq_len)}


def _command(argv):
    """The command without the folders of this machine."""
    words = [re.sub(r"[^ =]*[/\\]", "", word) for word in argv]
    return " ".join(["llmnb", *words])


# %% the configuration of some options tags=["exporti"] module="cli"
def _config_of(args):
    names = {x.name for x in fields(ModelOptions)} - {"precision"}
    shape = {name: getattr(args, name) for name in names}
    return TrainConfig(**shape, vocab_size=args.vocab_size)


# %% llmnb info tags=["exporti"] module="cli"
def _add_info(commands):
    parser = commands.add_parser(
        "info",
        help="versions, threads, and the size of a model",
        description="Print versions, and what a configuration takes: "
        "parameters, bytes, operations a token.",
    )
    _add_fields(parser, DataOptions, ["vocab_size"])
    _add_fields(parser, ModelOptions)
    parser.set_defaults(run=_info)


# %% report tags=["exporti"] module="cli"
def _info(args):
    import numba

    from llmnb.config import flops_per_token, parameter_count
    from llmnb.layout import gpt2_layout
    from llmnb.timing import machine

    config = _config_of(args)
    cfg = config.model(config.vocab_size)
    names = "llmnb", "numpy", "numba", "tiktoken"
    _say("versions", ", ".join(f"{x} {version(x)}" for x in names))
    _say("machine", machine())
    _say("threads", numba.get_num_threads())
    _say("parameters", f"{parameter_count(cfg):,}")
    layout = gpt2_layout(cfg, config.batch_size, config.seq_len)
    sizes = {name: _bytes(*group) for name, group in layout.items()}
    shown = ", ".join(f"{k} {v / 1e6:.1f}" for k, v in sizes.items())
    _say("memory", f"{sum(sizes.values()) / 1e6:.1f} MB ({shown})")
    flops = flops_per_token(cfg, config.seq_len)
    _say("work", f"{flops / 1e6:.1f} MFLOP to train on a token")


def _bytes(dtype, shapes):
    sizes = [math.prod(shape) for shape in shapes.values()]
    return sum(sizes) * np.dtype(dtype).itemsize


# %% the command tags=["export"] module="cli"
USER_ERRORS = (ValueError, TypeError, OSError, ArithmeticError, MemoryError)


def main(argv=None):
    """Run the `llmnb` command; argv defaults to the process's arguments.

    Exits with code 2 for a wrong option and 1 for an error that the user
    can mend, each in one line on stderr; with 130 when interrupted. When
    the variable LLMNB_TRACEBACK is set, errors keep their traceback.

    Derived in chapter 14.
    """
    parser = _Parser("llmnb", description="Train GPT-2 and write with it.")
    parser.add_argument(
        "--version", action="version", version=f"llmnb {version('llmnb')}"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_train, _add_generate, _add_bench, _add_data, _add_info):
        add(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except USER_ERRORS as error:
        if "LLMNB_TRACEBACK" in os.environ:
            raise
        print(f"llmnb: error: {_one_line(error)}", file=sys.stderr)
        sys.exit(1)


# %% [markdown]
# Now the commands themselves, from a notebook cell as from a terminal. A
# small run, then its model asked to go on:

# %% train from the command line
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

from llmnb.cli import main as llmnb

TINY = (
    "--tokenizer byte --limit 100000 --num-layers 1 --channels 32 "
    "--num-heads 2 --seq-len 32 --batch-size 4 --steps 30"
)


def run(*args):
    """What a command prints, and its exit code."""
    out, err, code = StringIO(), StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            llmnb([str(x) for x in args])
        except SystemExit as stop:
            code = stop.code
    return out.getvalue(), err.getvalue(), code


# %% a run folder, written and used
with TemporaryDirectory() as place:
    folder = Path(place, "run")
    _, _, code = run("train", "--out", folder, *TINY.split())
    print(code, *sorted(x.name for x in folder.iterdir()))
    ask = ["generate", folder, "--prompt", "def ", "--tokens", 20]
    text, _, code = run(*ask)
    verdict("generate", code == 0 and text.startswith("def "), "goes on")
    verdict("generate", run(*ask)[0] == text, "same seed, same text")
    _, _, code = run("train", "--out", folder, *TINY.split())
    verdict("train", code == 1, "keeps a folder in use")

# %% mistakes get one line
for args in (
    ["train", "--stepz", 3],
    ["train", "--channels", 130],
    ["train", "--corpus", "no-such-file"],
    ["generate", "no-such-run"],
    ["bench", "--num-layers", "many"],
    ["bench", "--against", "nobody"],
):
    _, message, code = run(*args)
    print(code, message, end="")

# %% [markdown]
# ## Count it
#
# A token costs a forward pass over the whole window, $2N + 2LCT$ operations
# for each of its T positions, of which $T - 1$ are recomputed from the token
# before. A **key-value cache** would keep the keys and values of earlier
# positions and compute one position a token: T times less arithmetic.

# %% what a cache would save
from llmnb.config import flops_per_token

forward = flops_per_token(model.cfg, T) / 3  # a third of training's
print(f"the window, each token: {T} positions")
print(f"with a cache: 1 position, {T} times fewer operations")

# %% measured tags=["nbval-ignore-output"]
from llmnb.timing import fastest, machine

ids = np.zeros((1, T), np.int32)
seconds = fastest(model.forward, ids)
print(machine())
print(f"{1 / seconds:.0f} tokens a second")
print(f"{forward * T / seconds / 1e9:.1f} GFLOP/s")

# %% [markdown]
# ## Take away
#
# - Drawing needs one uniform number and the running sums of the
#   probabilities; a seed makes the text repeatable.
# - Temperature divides the logits; the entropy rises with it at the rate
#   $\operatorname{Var}(z) / \tau^3$.
# - Top-k and top-p keep the likeliest tokens and their proportions, because
#   that is the least distortion, at the price $-\log P(S)$.
# - Causal attention makes padding behind a text invisible to it, to the
#   last bit.
#
# ## Design note
#
# We recompute the window for every token. A key-value cache saves most of
# that work, and every program that serves a model has one. It would need a
# second path through the model: attention from one query to many stored
# keys, activations for one position, and care when the window slides. With
# the learned positions of GPT-2 a sliding window moves every token to
# another position, which makes the whole cache worthless at that moment.
# For a book whose subject is training, one path that is proven serves
# better than two; a window of 64 tokens is computed in milliseconds.
#
# The other choice is the random stream. `RandomState` is NumPy's old
# generator, and NumPy has promised never to change what it draws. A text
# drawn today with seed 42 will be drawn again in ten years from the same
# probabilities.

# %% [markdown]
# ## Exercises
#
# **1** (★). At what temperature is a token with logit 2 exactly $e$ times
# as likely as one with logit 1? And 10 times as likely?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# The ratio is $e^{(2 - 1)/\tau}$: $e$ at $\tau = 1$, and 10 at
# $\tau = 1 / \log 10 = 0.4343$.
# :::

# %% exercise 1, checked tags=["hide-cell"]
p = distribution([2.0, 1.0], temperature=1 / np.log(10))
compare("ratio", p[0] / p[1], 10, tol=1e-12)

# %% [markdown]
# **2** (★★). Draw without running sums: add to each scaled logit an
# independent number $g_v = -\log(-\log u_v)$ with uniform $u_v$, and take
# the largest. Check by counting that this **Gumbel trick** draws from
# (14.1).
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# $-\log u_v$ is an exponential waiting time of rate 1, so
# $e^{-z_v} (-\log u_v)$ waits at rate $e^{z_v}$. The largest
# $z_v + g_v$ belongs to the shortest wait, and the first of several
# independent exponential clocks is $v$ with probability
# $e^{z_v} / \sum_w e^{z_w}$.
# :::


# %% exercise 2, the draws tags=["hide-cell"]
def gumbel_draws(z, tau, count, rng):
    u = rng.random_sample((count, len(z)))
    return np.argmax(z / tau - np.log(-np.log(u)), axis=1)


# %% exercise 2, checked
z = np.array([2.0, 1.0, 0.0, -1.0])
tokens = gumbel_draws(z, 1.5, 100_000, np.random.RandomState(2))
drawn = np.bincount(tokens, minlength=4) / 100_000
compare("gumbel", drawn, distribution(z, temperature=1.5), tol=0.01)

# %% [markdown]
# **3** (★★). Greedy decoding loops. Write a function that finds the length
# of the loop at the end of a list of tokens: the smallest $p$ such that the
# last $2p$ tokens are two copies of one another.
#
# :::{admonition} Solution to exercise 3
# :class: dropdown
# Try $p = 1, 2, \dots$ and compare the last $p$ tokens with the $p$ before
# them. Then apply it to a long greedy text of the model above.
# :::


# %% exercise 3, the loop's length tags=["hide-cell"]
def period(tokens):
    for p in range(1, len(tokens) // 2 + 1):
        if tokens[-p:] == tokens[-2 * p : -p]:
            return p
    return None


# %% exercise 3, checked
verdict("period", period([5, 1, 2, 3, 1, 2, 3]) == 3, "is 3")
verdict("period", period([1, 2, 3, 4]) is None, "there is none")

# %% [markdown]
# **4** (★★★). **Min-p** keeps the tokens whose probability is at least a
# fraction $f$ of the largest. In which respect is it like top-p, and in
# which like neither? Write it, and check that temperature may be applied
# before or after by adapting $f$.
#
# :::{admonition} Solution to exercise 4
# :class: dropdown
# Like top-p it keeps few tokens when the model is sure. Its price (14.8) is
# not fixed, and neither is the number of tokens. With temperature the
# ratio $p_v / p_\text{max}$ becomes its $1/\tau$-th power, so cutting with
# $f$ before is cutting with $f^{1/\tau}$ after.
# :::


# %% exercise 4, min-p tags=["hide-cell"]
def min_p(p, fraction):
    kept = np.where(p >= fraction * p.max(), p, 0)
    return kept / kept.sum()


# %% exercise 4, checked
z, tau, f = np.random.RandomState(3).normal(0, 2, 50), 1.7, 0.05
before = min_p(distribution(z), f) > 0
after = min_p(distribution(z, temperature=tau), f ** (1 / tau)) > 0
verdict("min-p", np.array_equal(before, after), "the same tokens stay")

# %% [markdown]
# ## Further reading
#
# - Holtzman et al. (2020),
#   [The Curious Case of Neural Text Degeneration](https://arxiv.org/abs/1904.09751):
#   top-p, and figure 2 on how the likeliest text differs from what people
#   write.
# - Fan, Lewis and Dauphin (2018),
#   [Hierarchical Neural Story Generation](https://arxiv.org/abs/1805.04833):
#   top-k sampling, used there to write stories.
# - Radford et al. (2019),
#   [Language Models are Unsupervised Multitask Learners](https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf):
#   the samples in the appendix, drawn with top-k 40.
# - Jang, Gu and Poole (2017),
#   [Categorical Reparameterization with Gumbel-Softmax](https://arxiv.org/abs/1611.01144):
#   section 2, for exercise 2.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.index import gained

gained("14_generation")
