# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       model.generate: 'Text from a model: temperature, top-k, top-p, and the loop.'
# ---

# %% [markdown]
# # Writing: draw one token after the other
#
# > A trained model gives a distribution over the next token. Temperature,
# > top-k and top-p reshape it, a seeded draw picks one, and the loop repeats.
#
# *Reading time: 30 minutes. You need: softmax
# ([chapter 1.11](11_crossentropy.ipynb)) and a trained model
# ([chapter 1.17](17_training.ipynb)). The fast version:
# [chapter 4.19](../4_practice/19_cache.ipynb).*

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="crossentropy")

# %% [markdown]
# *Figure 1.18.1. To write, the model runs forward as far as the softmax. The
# probabilities of the next token come out; one token is drawn from them and
# joins the tokens at the top.*
#
# [Chapter 1.17](17_training.ipynb) ended with a text that nobody wrote, drawn
# by ten lines of code. This chapter takes those lines apart and builds
# `generate`. At its end you can
#
# - say what temperature does to the entropy of a distribution, and prove it;
# - derive top-k and top-p from one principle;
# - show why the padding behind a text cannot change what comes next;
# - draw several texts at once, each as if it were alone;
# - read off a model's probabilities what it has learnt.

# %% [markdown]
# ## Setup

# %% setup
import matplotlib.pyplot as plt

from llmnb.book.diagram import PALETTE
from llmnb.book.verify import compare, verdict

# %% imports of the sampler tags=["export"]
import codecs
import math
from functools import partial

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
# The next function does this for any distribution. It scales $u$ by the
# last border, which rounding may leave a little off 1, and never returns a
# token of probability 0: such a piece has no length, and
# `side="right"` steps over it.


# %% one draw tags=["export"]
def draw(probs, u):
    """The token that a number u in [0, 1) falls on, an int.

    probs: (V,), not negative, with a positive sum. A token of probability 0
    is never returned.
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
# $$ p_v(\tau) = \frac{e^{z_v / \tau}}{\sum_w e^{z_w / \tau}} . \tag{1.18.1} $$
#
# At $\tau = 1$ these are the model's own probabilities. The ratio of two of
# them is $p_v / p_w = e^{(z_v - z_w)/\tau}$. As $\tau \to 0$ the ratio of
# the best to any other grows beyond all bounds, and the distribution
# becomes the greedy choice. As $\tau \to \infty$ every ratio goes to 1: a
# uniform guess. In between, how does the uncertainty grow? It is measured by
# the entropy
#
# $$ H(\tau) = -\sum_v p_v \log p_v . \tag{1.18.2} $$
#
# Write $\beta = 1/\tau$ and $Z = \sum_w e^{\beta z_w}$, so that
# $\log p_v = \beta z_v - \log Z$. Put this into (1.18.2), with
# $\langle z \rangle = \sum_v p_v z_v$ for the mean logit:
#
# $$ H = \log Z - \beta \langle z \rangle . \tag{1.18.3} $$
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
#    = \operatorname{Var}(z) . \tag{1.18.4} $$
#
# So $\partial H / \partial \beta =
# \langle z \rangle - \langle z \rangle - \beta \operatorname{Var}(z)$,
# and with $d\beta / d\tau = -1/\tau^2$
#
# $$ \frac{d H}{d \tau} = \frac{\operatorname{Var}(z)}{\tau^3} \ge 0 .
#    \tag{1.18.5} $$
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

# %% (1.18.5) against central differences
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
# *Figure 1.18.2. Entropy rises with temperature all the way from 0, the
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
# $$ D(q \,\|\, p) = \sum_{v \in S} q_v \log \frac{q_v}{p_v} . \tag{1.18.6} $$
#
# Write $P(S) = \sum_{v \in S} p_v$ and $r_v = p_v / P(S)$, which is a
# distribution on $S$. Since $\log (q_v / p_v) = \log (q_v / r_v) - \log
# P(S)$,
#
# $$ D(q \,\|\, p) = D(q \,\|\, r) - \log P(S) . \tag{1.18.7} $$
#
# The first term is never negative and is zero for $q = r$ alone. So the
# best $q$ keeps the proportions and divides by $P(S)$, and the price is
#
# $$ D = -\log P(S) . \tag{1.18.8} $$
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
# first, then top-k, then top-p on what top-k has left, renormalised. Among
# equals the lower number comes first, so that the result is the same
# everywhere.
#
# Both cuts need the largest of V numbers in order, and V is 50,257 for
# GPT-2. To sort them all takes some milliseconds, a good part of what a
# token costs. But we want only the first few in order. A **partition** finds
# the $k$-th largest number in time proportional to V, without sorting; what
# reaches it is then sorted, and that is little. Top-p does not know its $k$
# beforehand. It tries 64, and eight times more until the sum is reached.


# %% the largest, in order tags=["exporti"]
def _above(x, count):
    """Places of the `count` largest numbers, and of what equals the last."""
    if count >= len(x):
        return np.arange(len(x))
    return np.flatnonzero(x >= np.partition(x, -count)[-count])


def _largest(x, count):
    """Places of the largest numbers, downwards; of equals the first."""
    found = _above(x, count)
    return found[np.argsort(-x[found], kind="stable")][:count]


def _nucleus(p, top_p):
    """Places of the fewest probabilities whose sum reaches top_p."""
    count = 64
    while count < len(p) and p[_above(p, count)].sum() < top_p:
        count *= 8
    order = _largest(p, max(count, len(_above(p, count))))
    before = np.cumsum(p[order]) - p[order]
    return order[: max(1, int((before < top_p).sum()))]


# %% the distribution we draw from tags=["export"]
def distribution(logits, temperature=1.0, top_k=None, top_p=None):
    """The probabilities a token is drawn with, a float64 array (V,).

    logits: (V,), of any float dtype. Temperature 0 leaves the largest logit
    alone, and the first of equals. Then top_k keeps the k most probable
    tokens, and top_p the fewest of those whose sum reaches p. Raises
    ValueError for settings out of range and when a logit is not a number.
    """
    check_sampling(temperature, top_k, top_p)
    z = np.asarray(logits, np.float64)
    if not np.isfinite(z.max()) or np.isnan(z).any():
        raise ValueError("the logits are not finite: the model is damaged")
    if temperature == 0:
        return _only([np.argmax(z)], 1.0, len(z))
    kept = np.arange(len(z)) if top_k is None else _largest(z, int(top_k))
    p = np.exp((z[kept] - z.max()) / temperature)
    p /= p.sum()
    if top_p is not None:
        chosen = _nucleus(p, top_p)
        kept, p = kept[chosen], p[chosen] / p[chosen].sum()
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
# top three cost least, and (1.18.8) is their price.

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
# We train one here, small enough to take seconds, on the text of
# [chapter 1.17](17_training.ipynb). To use a model of your own, set `RUN` to its
# folder; the rest of the chapter works with either.
# The texts it writes hang on the last bits of its logits, which are others on
# another processor, so those outputs are not compared when the notebook is
# verified.

# %% a few seconds of training
from llmnb.train.feed import loaders, prepare
from llmnb.train.loop import train
from llmnb.train.options import TrainConfig
from llmnb.train.start import new_model

RUN = None  # or a folder such as "../../runs/stdlib"

config = TrainConfig(
    corpus=("../../tests/data/library.jsonl.gz",),
    num_layers=2, channels=96, seq_len=64, steps=500,
)  # fmt: skip
data = prepare(config)
teacher = new_model(config, data.encoding.n_vocab)
batches, _ = loaders(config, data)
losses = [step.loss for step in train(config, teacher, batches)]
verdict("training", np.mean(losses[-20:]) < losses[0] - 2, "has learnt")

# %% a model of batch size 1 with the same weights
from pathlib import Path
from tempfile import TemporaryDirectory

from llmnb.model.gpt2 import GPT2
from llmnb.train.folder import load_run

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
# holds before layer $\ell$. LayerNorm, the linear layers, GELU and the
# residual sum read position $t$ alone. Attention reads positions
# $s \le t$, whose vectors depend on tokens $0, \dots, s$ by assumption, all
# of them among $0, \dots, t$. So it holds after layer $\ell$ too, and at
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
# What if the text grows longer than the window? The model knows no more
# than T positions, so it must forget the beginning. It could drop one token
# for each that it draws. But then the tokens that stay move to other
# positions each time, and all that was computed for them is void. We drop
# half a window at once instead: when T tokens are full, the older half goes,
# and the text grows in peace until the window is full again. The model sees
# between T/2 and T tokens. Where its window begins is a function of the
# length of the text alone, which will let
# [chapter 4.19](../4_practice/19_cache.ipynb) keep what it has computed and still draw
# the same tokens.


# %% where the window begins tags=["export"]
def window_start(length, T):
    """The first of `length` tokens that a model of T positions still sees.

    0 as long as all fit; then it moves on by half a window at a time.
    """
    half = (T + 1) // 2
    return max(0, -(-(length - T) // half) * half)


# %% a window of 8
for length in (1, 8, 9, 12, 13, 100):
    first = window_start(length, 8)
    print(f"{length:4} tokens: the model sees {first} to {length - 1}")
spans = [n - window_start(n, 8) for n in range(9, 1000)]
verdict("the window", min(spans) == 5 and max(spans) == 8, "5 to 8 tokens")

# %% [markdown]
# ## The loop
#
# Fill the window, run forward, shape the distribution, draw, append. The
# model's logits have V columns: the columns that pad the vocabulary to a
# multiple of 128 are cut off, so their numbers are never drawn. The end of
# a text is itself a token, `<|endoftext|>`: when it is drawn, the text is
# over.
#
# Often we want several texts that continue one prompt. They are rows of a
# batch, and one forward pass serves all of them. Each has a random stream of
# its own: text $i$ draws with seed + $i$. So it comes out the same however
# many are written beside it, and to see the third text of seed 42 again you
# ask for seed 44. A text that has ended keeps its row until all have ended;
# what the model says there is thrown away.
#
# The loop asks for one thing only, the logits that follow some texts. A
# model that has a method `following` answers by itself; for a GPT2 the
# next function fills a window and runs it forward. The whole window is computed
# for every token; what keeps keys and values instead is the `Decoder` of
# [chapter 4.20](../4_practice/20_decoder.ipynb).


# %% what follows some texts tags=["export"]
def window_logits(model, texts):
    """The logits (N, V) of the token that follows each of N texts.

    model: a GPT2. texts: lists of tokens of one length, 1 to model.seq_len.
    Everything is computed anew, for batch_size texts at a time.
    """
    found = []
    for i in range(0, len(texts), model.batch_size):
        rows = np.array(texts[i : i + model.batch_size])
        count, length = rows.shape
        window = np.zeros((model.batch_size, model.seq_len), np.int32)
        window[:count, :length] = rows
        model.forward(window)
        found.append(model.logits_at(length - 1)[:count])
    return np.concatenate(found)


# %% the loop tags=["export"]
def generate_samples(
    model,
    tokens,
    count,
    samples,
    temperature=1.0,
    top_k=None,
    top_p=None,
    seed=42,
    stop=None,
):
    """An iterator over steps in which several texts continue `tokens`.

    model: a GPT2, or another object with cfg, seq_len and a method
    following(texts), such as a Decoder. tokens: a sequence of at least one
    int in [0, V). count: the most steps. temperature, top_k, top_p: as in
    `distribution`. seed: in [0, 2**32); text i draws with seed + i, so it
    does not depend on how many there are. stop: a token that ends a text.
    Each step is a list of `samples` tokens, with None for a text that has
    ended. Raises ValueError for a value out of range, before anything is
    computed.
    """
    check_sampling(temperature, top_k, top_p)
    if not len(tokens):
        raise ValueError("generate: tokens must hold at least one token")
    check_tokens("generate: tokens", np.array(tokens), model.cfg.vocab_size)
    if count < 0:
        raise ValueError(f"generate: count must be at least 0, got {count}")
    if samples < 1:
        raise ValueError(f"generate: samples must be at least 1: {samples}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"generate: seed must be in [0, 2**32), got {seed}")
    settings = temperature, top_k, top_p
    texts = [list(tokens) for _ in range(samples)]
    seeds = [(seed + i) % 2**32 for i in range(samples)]
    return _continue(model, texts, count, settings, seeds, stop)


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

    It ends before `stop`. The arguments are those of `generate_samples`,
    and so is what it raises. A GPT2's batch size of 1 wastes nothing.
    """
    settings = temperature, top_k, top_p, seed, stop
    steps = generate_samples(model, tokens, count, 1, *settings)
    return (step[0] for step in steps)


# %% step by step tags=["exporti"]
def _continue(model, texts, count, settings, seeds, stop):
    following = getattr(model, "following", partial(window_logits, model))
    streams = [np.random.RandomState(seed) for seed in seeds]
    ended = [False] * len(texts)
    for _ in range(count):
        first = window_start(len(texts[0]), model.seq_len)
        logits = following([text[first:] for text in texts])
        for i, text in enumerate(texts):
            token = stop
            if not ended[i]:
                probs = distribution(logits[i], *settings)
                token = draw(probs, streams[i].random_sample())
                ended[i] = token == stop
            text.append(token)
        if all(ended):
            return
        pairs = zip(texts, ended, strict=True)
        yield [None if over else text[-1] for text, over in pairs]


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
from llmnb.text import tokenizer

pieces = list(decoded(tokenizer.byte(), "café".encode()))
print(pieces)

# %% the promises, checked
from llmnb.model.generate import generate_samples

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
three = [*generate_samples(model, start, 30, 3, seed=6)]
verdict("three texts", [x[1] for x in three] == once, "the second is seed 7")

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
# *Figure 1.18.3. The likeliest tokens after `import`, after `def __init__(` and
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
# *Figure 1.18.4. What each token of three lines of Python costs. Blue bars cost
# less than one nat: `self`, the sign that must follow it, and a line's end
# with the right indentation. Names and operators, which the author chose,
# cost several nats, and so does the first indentation, which nothing
# announces.*
#
# This is the loss of chapter 1.17 token by token: its mean over many lines is
# the validation loss.

# %% [markdown]
# ## Count it
#
# A token costs a forward pass over the whole window, $2N + 2LCT$ operations
# for each of its T positions. All but one of these positions held the same
# tokens the last time, and by the proof of the window their vectors are the
# same too. [Chapter 4.19](../4_practice/19_cache.ipynb) keeps what they leave
# behind, and computes one position a token.

# %% operations a token
from llmnb.model.tensors import flops_per_token

forward = flops_per_token(model.cfg, T) / 3  # a third of training's
print(f"a window of {T} positions: {forward * T / 1e6:.0f} MFLOP a token")
print(f"its last position alone: {forward / 1e6:.1f} MFLOP")

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
# - Text $i$ of several draws with seed + $i$, and does not depend on the
#   others.
#
# ## Design note
#
# When the window is full, most programs either stop or drop one token for
# each they draw. To stop leaves the reader without a text; to slide by one
# gives the model the longest memory, and costs a whole window for every
# token, because GPT-2 has learned a vector for each position and a token
# that moves is another input. Half a window at once costs one window for
# every T/2 tokens. The price is that right after the cut the model sees half
# of what it could.
#
# `distribution` could return the few tokens it kept and their probabilities
# alone. It returns all V, most of them 0, because that is what the formulas
# mean and what tests and figures use.
#
# The last choice is the random stream. `RandomState` is NumPy's old
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
# (1.18.1).
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
# them. Then apply it to a long greedy text of this chapter's model.
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
from llmnb.book.index import gained

gained("1.18")
