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
# *Reading time: 30 minutes. You need: softmax ([chapter
# 1.11](11_crossentropy.ipynb)) and a trained model ([chapter
# 1.18](18_training.ipynb)). The fast version: [chapter
# 4.19](../4_practice/19_cache.ipynb).*
#
# ## Where we are

# %% where we are
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="writing")

# %% [markdown]
# *Figure 1.19.1. To write, the model runs forward as far as the softmax. The
# probabilities of the next token come out; one token is drawn from them and
# joins the tokens at the top.*
#
# [Chapter 1.18](18_training.ipynb) drew texts with ten lines of code. This chapter
# takes those lines apart and builds `generate`. At its end you can
#
# - watch a text being drawn, a token at a time, and say why each came;
# - say what temperature does to the entropy of a distribution, and prove it;
# - derive top-k and top-p from one principle;
# - show why the padding behind a text cannot change what comes next;
# - draw several texts at once, each as if it were alone.
#
# ## Setup

# %% setup
import matplotlib.pyplot as plt

from llmnb.book.diagram import PALETTE
from llmnb.book.verify import compare, verdict

# %% imports of the sampler tags=["export"]
import codecs
import math
from functools import partial
from numbers import Integral, Real

import numpy as np

from llmnb.checks import check_tokens

# %% [markdown]
# ## By hand: why draw at all
#
# Suppose that after `for` the model says: `i` 0.5, `x` 0.3, `line` 0.2. We
# could always take the most probable token. That is called
# [greedy decoding](../../book/glossary.md#term-greedy-decoding), and it often falls
# into a loop, as chapter 1.18 saw. Drawing by the probabilities gives `line` in a
# fifth of the cases, as the training text had it. This is
# [sampling](../../book/glossary.md#term-sampling).
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
# The next function does this for any distribution. It scales $u$ by the last
# border, which rounding may leave a little off 1, and never returns a token of
# probability 0: such a piece has no length, and `side="right"` steps over it.
# Should the scaled $u$ round up to the last border, `min` brings it back.


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
# ## A model to draw from
#
# We take the one that trained for an hour in chapter 1.18, with a window of 64
# tokens, one text at a time. To use a model of your own, set `RUN` to its folder. The
# texts depend on the last bits of the logits, which are others on another processor, so
# those outputs are not compared when the notebook is verified.

# %% the model of the hour
from llmnb.config import GPT2Config
from llmnb.model.gpt2 import GPT2
from llmnb.text import tokenizer
from llmnb.train.folder import load_run

RUN = None  # or a folder such as "../../runs/stdlib"
HOUR = "../../book/hour/"

model = GPT2.from_checkpoint(HOUR + "model.bin", batch_size=1, seq_len=64)
encoding = tokenizer.load(HOUR + "tokenizer.tiktoken")
if RUN:
    model, encoding, _ = load_run(RUN)
T, V = model.seq_len, encoding.n_vocab

# %% [markdown]
# A prompt goes in, and one row of logits comes out: that of the prompt's last
# position. Before the prompt stands `<|endoftext|>`, as it did before each text of the
# training. Behind it the window holds zeros. That they change nothing is
# proved later.


# %% the logits after a text
def logits_after(text):
    ids = [encoding.eot_token, *encoding.encode_ordinary(text)][-T:]
    window = np.zeros((1, T), np.int32)
    window[0, : len(ids)] = ids
    model.forward(window)
    return model.logits[0, len(ids) - 1, :V].astype(np.float64)


def shown(token):
    text = encoding.decode([int(token)])
    return text.replace(" ", "␣").replace("\n", "⏎") or "∅"


# %% [markdown]
# ## Temperature
#
# Divide the logits $z_i$ by a
# [temperature](../../book/glossary.md#term-temperature) $\tau > 0$ before the softmax:
#
# $$ p_i = \frac{e^{z_i / \tau}}{\sum_j e^{z_j / \tau}} . \tag{1.19.1} $$
#
# At $\tau = 1$ these are the model's own probabilities. The ratio of two of
# them is $p_i / p_j = e^{(z_i - z_j)/\tau}$. As $\tau \to 0$ the ratio of the best
# to any other grows beyond all bounds: the greedy choice. As $\tau \to \infty$
# every ratio goes to 1: a uniform guess. In between, how does the uncertainty grow?
# It is measured by the [entropy](../../book/glossary.md#term-entropy)
#
# $$ H = -\sum_i p_i \log p_i . \tag{1.19.2} $$
#
# Write $Z = \sum_j e^{z_j / \tau}$, so that $\log p_i = z_i / \tau - \log Z$.
# Put this into (1.19.2), with $\langle z \rangle = \sum_i p_i z_i$ for the mean
# logit:
#
# $$ H = \log Z - \frac{\langle z \rangle}{\tau} . \tag{1.19.3} $$
#
# Three derivatives by $\tau$ are needed. Each exponential has
# $\partial e^{z_j/\tau} / \partial \tau = -\frac{z_j}{\tau^2}\, e^{z_j/\tau}$,
# so the first is
#
# $$ \frac{\partial \log Z}{\partial \tau}
#    = \frac1Z \sum_j -\frac{z_j}{\tau^2}\, e^{z_j / \tau}
#    = -\frac{\langle z \rangle}{\tau^2} . \tag{1.19.4} $$
#
# With it the second follows from $\log p_i = z_i/\tau - \log Z$, since
# $\partial p_i = p_i\, \partial \log p_i$, and the third from the second:
#
# $$
# \begin{aligned}
# \frac{\partial p_i}{\partial \tau}
#   &= p_i\, \frac{\langle z \rangle - z_i}{\tau^2} , \\
# \frac{\partial \langle z \rangle}{\partial \tau}
#   &= \sum_i z_i\, p_i\, \frac{\langle z \rangle - z_i}{\tau^2}
#    = -\frac{\operatorname{Var}(z)}{\tau^2} ,
# \end{aligned}
# \tag{1.19.5}
# $$
#
# where $\operatorname{Var}(z) = \sum_i p_i z_i^2 - \langle z \rangle^2$ is the
# variance of the logits when tokens are drawn. Now differentiate (1.19.3). The
# first term gives (1.19.4). In the second, the derivative of $1/\tau$ gives
# $+\langle z \rangle / \tau^2$ and cancels it. That of $\langle z \rangle$ is left:
#
# $$ \frac{\partial H}{\partial \tau}
#    = -\frac1\tau\, \frac{\partial \langle z \rangle}{\partial \tau}
#    = \frac{\operatorname{Var}(z)}{\tau^3} \ge 0 . \tag{1.19.6} $$
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

# %% (1.19.6) against central differences
h = 1e-5
for tau in (0.3, 1.0, 3.0):
    p = softmax(z, tau)
    slope = (p @ z**2 - (p @ z) ** 2) / tau**3
    more, less = (entropy(softmax(z, tau + step)) for step in (h, -h))
    compare(f"dH/dtau at {tau}", slope, (more - less) / (2 * h), tol=1e-8)

# %% [markdown]
# ## Top-k and top-p
#
# A vocabulary has a long tail. Each of a thousand unlikely tokens may have a
# probability of 0.0002; together they come up in every fifth draw, and one
# wrong token can spoil the rest of the text. Cutting the tail helps. Which
# tokens should stay, and with what probabilities?
#
# Let $\mathcal K$ be the set that is kept, and let $q$ be a distribution on it. We
# want the $q$ that distorts the model's $p$ least. Measure the distortion by the
# Kullback-Leibler divergence of (1.11.4), the nats lost when text drawn from $q$ is
# charged with $p$ in place of $q$:
#
# $$ \mathrm{KL}(q \,\|\, p) = \sum_{i \in \mathcal K} q_i \log \frac{q_i}{p_i} .
#    \tag{1.19.7} $$
#
# Write $p(\mathcal K) = \sum_{i \in \mathcal K} p_i$. Then $p_i / p(\mathcal K)$ is
# a distribution on $\mathcal K$, the model's own, scaled up. Since $\log
# \frac{q_i}{p_i} = \log \frac{q_i}{p_i / p(\mathcal K)} - \log p(\mathcal K)$ and
# the $q_i$ sum to 1,
#
# $$ \mathrm{KL}(q \,\|\, p) = \mathrm{KL}\bigl(q \,\|\, p / p(\mathcal K)\bigr)
#    - \log p(\mathcal K) . \tag{1.19.8} $$
#
# The first term is never negative, and it is zero for $q = p / p(\mathcal K)$. So
# the best $q$ keeps the proportions, and the price is
#
# $$ \mathrm{KL} = -\log p(\mathcal K) . \tag{1.19.9} $$
#
# Now choose the set. If it may hold $k$ tokens, the price is least when their
# probabilities sum to most: take the $k$ most probable ones. This is
# [top-k](../../book/glossary.md#term-top-k-top-p). If instead the price is limited, by
# a sum that must be reached (a sum of 0.9 at least is a price of $-\log 0.9 = 0.105$
# nats at most), the smallest set that affords it is again filled from the top. This
# is [top-p](../../book/glossary.md#term-top-k-top-p), also called nucleus sampling.
# Top-k fixes the number of tokens and lets the price vary; top-p limits the price
# and lets the number vary: one or two tokens when the model is sure, hundreds when
# it is not.


# %% check the settings tags=["export"]
def check_sampling(temperature, top_k, top_p):
    """Raise ValueError unless these can shape a distribution.

    temperature: at least 0 and finite. top_k: None or a whole number of at
    least 1. top_p: None or a number above 0 and at most 1.
    """
    if not isinstance(temperature, Real) or not 0 <= temperature < math.inf:
        raise ValueError(
            f"temperature must be at least 0 and finite, got {temperature!r}"
        )
    k, p = (1 if x is None else x for x in (top_k, top_p))
    if not isinstance(k, Real) or k % 1 != 0 or k < 1:
        raise ValueError(
            f"top_k must be a whole number of at least 1, got {k!r}"
        )
    if not isinstance(p, Real) or not 0 < p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {p!r}")


# %% [markdown]
# Top-p comes last, on what temperature and top-k have left, renormalised, as is
# usual; it would keep other tokens in any other place. Among equals the
# lower number comes first, so that the result is the same everywhere.
#
# Both cuts need the largest of $V$ numbers in order. A *partition* finds the $k$-th
# largest in time proportional to $V$, without sorting; what reaches it is then
# sorted, and that is little. Top-p does not know its $k$ beforehand. It tries 64,
# and each time eight times as many, until the sum is reached. Then a token stays as
# long as those before it, `before`, do not yet reach the sum by themselves.


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
    ValueError for settings out of range, for logits of another shape and
    when one is not a number.
    """
    check_sampling(temperature, top_k, top_p)
    z = np.asarray(logits, np.float64)
    if z.ndim != 1 or not z.size:
        raise ValueError(f"the logits must have shape (V,), got {z.shape}")
    if not np.isfinite(z.max()) or np.isnan(z).any():
        raise ValueError("the logits are not finite: the model is damaged")
    if temperature == 0:
        return _only([np.argmax(z)], 1.0, len(z))
    kept = np.arange(len(z)) if top_k is None else _largest(z, int(top_k))
    with np.errstate(over="ignore"):  # to -inf, by a temperature near 0
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


# %% [markdown]
# Check the claim behind the formulas: among all sets of three tokens the
# top three cost least, and (1.19.9) is their price.

# %% every set of three
from itertools import combinations


def divergence(q, p):
    on = q > 0
    return (q[on] * np.log(q[on] / p[on])).sum()


p = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
z = np.log(p)
prices = {}
for kept in map(list, combinations(range(6), 3)):
    q = np.zeros(6)
    q[kept] = p[kept] / p[kept].sum()
    prices[tuple(kept)] = divergence(q, p)
best = min(prices, key=prices.get)
verdict("best set", best == (0, 1, 2), "the three most probable")
compare("its price", prices[best], -np.log(p[:3].sum()), tol=1e-12)
cuts = (1, 3), (0.5, 3, 0.7), (0, None)  # what is kept: three, two, the first
got = [distribution(z, *how) for how in cuts]
got.append(distribution(0 * z, top_k=1))  # all are equal: the first as well
kept = p[:3] / 0.8, p[:2] ** 2 / (p[:2] ** 2).sum(), [1], [1]
want = [[*some, *(6 - len(some)) * [0]] for some in kept]
compare("top_k=3", got, want, tol=1e-12)

# %% [markdown]
# And top-p: what it keeps is as small as any set that reaches the sum.

# %% the smallest set that reaches a sum
for top_p, wanted in ((0.3, 1), (0.6, 2), (0.7, 3), (0.95, 5)):
    kept = np.flatnonzero(distribution(z, top_p=top_p))
    reach = [
        len(some) for size in range(1, 7) for some in combinations(p, size)
        if sum(some) >= top_p
    ]  # fmt: skip
    ok = len(kept) == min(reach) == wanted and p[kept].sum() >= top_p
    verdict(f"top_p={top_p}", ok, f"keeps {wanted}")

# %% [markdown]
# Figure 1.19.2 shows all three on the model's own distribution after
# `import`, where much is possible.

# %% a distribution, reshaped tags=["hide-input"]
z = logits_after("import")
order = np.argsort(-z, kind="stable")[:14]
panels = {
    "temperature 0.5": {"temperature": 0.5}, "the model's own": {},
    "temperature 2": {"temperature": 2}, "top_k = 5": {"top_k": 5},
    "top_p = 0.5": {"top_p": 0.5},
}  # fmt: skip
fig, axes = plt.subplots(1, 5, figsize=(8, 3.6), dpi=100, sharey=True)
for ax, (name, how) in zip(axes, panels.items(), strict=True):
    p = distribution(z, **how)
    colour = PALETTE["orange" if how else "blue"]
    ax.barh(range(14), p[order], color=colour)
    ax.plot(distribution(z)[order], range(14), "|", color=PALETTE["ink"], ms=9)
    ax.set_title(f"{name}\nentropy {entropy(p):.2f}", size=9)
    ax.spines[["top", "right"]].set_visible(False)
axes[0].set_yticks(range(14), [shown(x) for x in order], family="monospace")
axes[0].invert_yaxis()
fig.supxlabel("probability", size=10)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.19.2. The fourteen likeliest tokens after `import` (␣ is a space),
# reshaped, each panel on a scale of its own; the ticks mark the model's own
# probabilities. A low temperature puts more on the first, a high one lets the
# tail rise. Top-k and top-p cut the tail off and scale up what stays.*
#
# ## The window
#
# The model always computes $T$ positions. A shorter text fills the first of them
# and leaves padding behind it. The probabilities of the next token stand at the
# text's last position.
#
# The padding is harmless, and here is the proof. Let $x_{l,t}$ be the vector at
# position $t$ that block $l$ reads. Claim: it depends on tokens $0, \dots, t$ and
# no others. For $l = 0$ it is the sum of the token's row of `wte` and the
# position's row of `wpe`: true. Suppose it holds for block $l$. LayerNorm, the
# linear layers, GELU and the residual sum read position $t$ alone. Attention
# reads positions $u \le t$, whose vectors depend on tokens $0, \dots, u$ by
# assumption, all of them among $0, \dots, t$. So it holds for what the block
# hands to the next, and at last for the logits.
#
# The proof is about equations; a program adds numbers in an order of its own and
# could still mix in what it should not. So put two different paddings behind one
# text and compare bits:

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
# What if the text grows longer than the window? The model knows no more than $T$
# positions, so it must forget the beginning. Were one token dropped for each that is
# drawn, the tokens that stay would move to other positions each time, and all that
# was computed for them would be void. We drop half a window at once: when a token
# more than $T$ would be needed, the older half goes. So the beginning is what
# exceeds $T$, rounded up to half windows (`-(-a // b)` rounds up, as in
# [chapter 1.16](16_memory.ipynb)). It is a function of the text's length
# alone, which will let [chapter 4.19](../4_practice/19_cache.ipynb) keep
# what it has computed and still draw the same tokens.


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
# Fill the window, run forward, shape the distribution, draw, append. The columns of
# the logits that pad the vocabulary are cut off, so their numbers are never drawn.
# The end of a text is itself a token, `<|endoftext|>`: when it is drawn, the text is
# over.
#
# Often we want several texts that continue one prompt. They are rows of a batch, and
# one forward pass serves all of them. Text $i$ draws with a random stream of its
# own, from seed + $i$. So it comes out the same however many are written beside it.
# (The streams are NumPy's `RandomState`, which is promised never to change.)
# A text that has ended keeps its row until all have ended, and grows, so that all
# stay equally long; what the model says there is thrown away.
#
# The loop asks for one thing only, the logits that follow some texts. A model that
# has a method `following` answers by itself ([chapter
# 4.20](../4_practice/20_decoder.ipynb) makes one); for a GPT2 the next function
# fills a window and runs it forward.


# %% what follows some texts tags=["export"]
def window_logits(model, texts):
    """The logits (N, V) of the token that follows each of N texts.

    model: a GPT2. texts: lists of tokens of one length, 1 to model.seq_len.
    Everything is computed anew, for batch_size texts at a time. Raises
    ValueError for a text of another length.
    """
    found = []
    for i in range(0, len(texts), model.batch_size):
        rows = np.array(texts[i : i + model.batch_size])
        count, length = rows.shape
        if not 1 <= length <= model.seq_len:
            raise ValueError(
                f"window_logits: a text must have 1 to {model.seq_len} "
                f"tokens, got {length}"
            )
        window = np.zeros((model.batch_size, model.seq_len), np.int32)
        window[:count, :length] = rows
        model.forward(window)
        found.append(model.logits_at(length - 1)[:count])
    return np.concatenate(found)


# %% the loop tags=["export"]
def _check_whole(name, value, least):
    if not isinstance(value, Integral) or value < least:
        raise ValueError(
            f"generate: {name} must be a whole number of at least {least}, "
            f"got {value!r}"
        )


def generate_samples(
    model,
    tokens,
    count,
    samples,
    temperature=1.0,
    top_k=None,
    top_p=None,
    *,
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
    tokens = np.array(tokens)
    if not tokens.size:
        raise ValueError("generate: tokens must hold at least one token")
    check_tokens("generate: tokens", tokens, model.cfg.vocab_size)
    if tokens.ndim != 1:
        raise ValueError(
            f"generate: tokens must have shape (n,), got {tokens.shape}"
        )
    _check_whole("count", count, 0)
    _check_whole("samples", samples, 1)
    if not isinstance(seed, Integral) or not 0 <= seed < 2**32:
        raise ValueError(
            f"generate: seed must be a whole number in [0, 2**32), "
            f"got {seed!r}"
        )
    settings = temperature, top_k, top_p
    texts = [tokens.tolist() for _ in range(samples)]
    seeds = [(int(seed) + i) % 2**32 for i in range(samples)]
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
    steps = generate_samples(
        model, tokens, count, 1, temperature, top_k, top_p,
        seed=seed, stop=stop,
    )  # fmt: skip
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
# A token may end in the middle of a character: the two bytes of `é` can be two
# tokens. An incremental decoder holds the first byte back until the second arrives,
# so that text can be printed while it is written. Many models have some more rows than
# their tokenizer has tokens. No text has taught them, yet one may be drawn; it has no
# bytes, so it becomes a byte that no character has.


# %% tokens become text tags=["export"]
def decoded(encoding, tokens):
    """Yield the text of an iterable of tokens, piece by piece.

    encoding: a tiktoken.Encoding. Bytes that form no character become the
    replacement character, at the latest at the end; so does a token that
    the encoding has not.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        known = token < encoding.n_vocab
        raw = encoding.decode_single_token_bytes(token) if known else b"\xff"
        piece = decoder.decode(raw)
        if piece:
            yield piece
    piece = decoder.decode(b"", final=True)
    if piece:
        yield piece


# %% a character in two tokens
pieces = list(decoded(tokenizer.byte(), "café".encode()))
print(pieces)

# %% the promises, checked
start = [encoding.eot_token]
once, again, other = (
    list(generate(model, start, 30, seed=seed)) for seed in (7, 7, 8)
)
verdict("seeded", once == again != other, "repeats; another seed, another")
five = GPT2(GPT2Config(8, 5, 1, 1, 4), 1, 8)  # 5 tokens, and 123 of padding
hot = set(generate(five, [0], 200, temperature=1e6))
verdict("the padding", hot == {0, 1, 2, 3, 4}, "never drawn, at any heat")
trio = GPT2(model.cfg, 3, T, seed=None)  # three rows in one batch
trio.memory.flat("params")[:] = model.memory.flat("params")
three = [*generate_samples(trio, start, 30, 3, seed=6)]
verdict("three at once", [x[1] for x in three] == once, "the second is seed 7")
last = once[20]
cut = list(generate(model, start, 30, seed=7, stop=last))
verdict("stop", cut == once[: once.index(last)], "ends before it")

# %% [markdown]
# ## Watch it write
#
# Each row of figure 1.19.3 is one draw: all probabilities laid end to end, in the
# order of the tokens' numbers, and the number $u$ that falls on one of them.

# %% sixteen draws tags=["hide-input"]
text, stream = "def read(self", np.random.RandomState(5)
fig, ax = plt.subplots(figsize=(8, 5.6), dpi=100)
for row in range(16):
    p, u = distribution(logits_after(text), 0.8), stream.random_sample()
    token, right = draw(p, u), np.cumsum(p)
    grey = np.where(np.arange(V) % 2, PALETTE["pale"], PALETTE["grey"])
    grey[token] = PALETTE["orange"]
    ax.barh(row, 1, 0.7, color=PALETTE["pale"])
    for i in np.flatnonzero((p > 0.004) | (np.arange(V) == token)):
        ax.barh(row, p[i], 0.7, right[i] - p[i], color=grey[i])
    ax.plot(u, row - 0.38, "v", color=PALETTE["ink"], ms=5)
    for i in np.flatnonzero(p > 0.09):
        ink = "white" if i == token else PALETTE["ink"]
        ax.text(right[i] - p[i] / 2, row, shown(i), size=8, clip_on=True,
                ha="center", va="center", family="monospace",
                color=ink)  # fmt: skip
    before = text.replace(" ", "␣").replace("\n", "⏎")[-24:]
    style = {"va": "center", "size": 9, "family": "monospace"}
    ax.text(-0.02, row, before, ha="right", **style)
    ax.text(1.02, row, f"{shown(token)}  {p[token]:.3f}", **style)
    text += encoding.decode([token])
ax.set(xlim=(0, 1), ylim=(15.6, -0.6), xlabel="u", yticks=[])
ax.spines[["top", "right", "left"]].set_visible(False)
fig.subplots_adjust(0.3, 0.09, 0.86, 0.99)
plt.show()

# %% [markdown]
# *Figure 1.19.3. A text being drawn at temperature 0.8. Left: the end of the text
# so far. Middle: the probabilities end to end, the likely ones named, the drawn one
# orange, under the mark where $u$ fell; the greys only part neighbours. Right: what
# was drawn, and its probability. Where the model is sure, one piece fills the row
# and $u$ hardly matters; where it is not, $u$ decides. In the eighth row it fell
# into the tail, on a piece too small to see, and the text no longer makes sense.*
#
# And here is the text going on, five ways:

# %% five ways to continue tags=["nbval-ignore-output"]
prompt = [encoding.eot_token, *encoding.encode_ordinary("def close(self")]
ways = {
    "greedy": {"temperature": 0},
    "cool": {"temperature": 0.7},
    "the model's own": {"temperature": 1},
    "hot": {"temperature": 1.5},
    "top_p 0.9": {"top_p": 0.9},
}
for name, way in ways.items():
    text = encoding.decode([*generate(model, prompt, 60, **way)])
    print(f"{name}:\n    def close(self{text}\n".replace("\n", "\n    "))


# %% [markdown]
# ## Count it
#
# A token costs a forward pass over the whole window, $2N + 2LCT$ operations
# for each of its $T$ positions, by (1.4.2). Unless the window has just moved, all
# but one of these positions held the same tokens the last time, and as we proved,
# their vectors are the same too. [Chapter 4.19](../4_practice/19_cache.ipynb) keeps
# what they leave behind, and computes one position a token.

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
#   that is the least distortion, at the price $-\log p(\mathcal K)$.
# - Causal attention makes padding behind a text invisible to it, to the
#   last bit.
# - Text $i$ of several draws with seed + $i$, and does not depend on the
#   others.
#
# ## Design note
#
# When the window is full, most programs either stop or drop one token for each they
# draw. To slide by one gives the model the longest memory, and costs a whole window
# for every token. Half a window at once costs one window for every $T/2$ tokens, once
# a program keeps what it has computed. The price is that right after the cut the
# model sees little more than half of what it could.
#
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
# independent number $-\log(-\log u_i)$ with uniform $u_i$, and take
# the largest. Check by counting that this **Gumbel trick** draws from
# (1.19.1).
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# Call the scaled logits $z_i$. $-\log u_i$ is above $t$ when $u_i < e^{-t}$, which
# has probability $e^{-t}$: an exponential waiting time of rate 1. So
# $e^{-z_i} (-\log u_i)$ waits at rate $r_i = e^{z_i}$. The largest
# $z_i - \log(-\log u_i)$ belongs to the shortest wait. Clock $i$ is the first when
# it rings at some time $t$ and all others ring later:
# $\int_0^\infty r_i e^{-r_i t} \prod_{j \ne i} e^{-r_j t}\, dt
# = r_i / \sum_j r_j$, which is (1.19.1).
# :::


# %% exercise 2, checked tags=["hide-cell"]
def gumbel_draws(z, tau, count, rng):
    u = rng.random_sample((count, len(z)))
    return np.argmax(z / tau - np.log(-np.log(u)), axis=1)


z = np.array([2.0, 1.0, 0.0, -1.0])
tokens = gumbel_draws(z, 1.5, 100_000, np.random.RandomState(2))
drawn = np.bincount(tokens, minlength=4) / 100_000
compare("gumbel", drawn, distribution(z, temperature=1.5), tol=0.01)

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
# - Jang, Gu and Poole (2017),
#   [Categorical Reparameterization with Gumbel-Softmax](https://arxiv.org/abs/1611.01144):
#   section 2, for exercise 2.
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.19")
