# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       train.evaluation: "What a model pays for a text: perplexity, bits a byte."
# ---

# %% [markdown]
# # Evaluation: what a model pays for a text
#
# > Perplexity and bits a byte of any text, with windows that overlap, and why
# > only bytes compare.
#
# *Reading time: 18 minutes. You need:
# [chapter 1.11](../1_by_hand/11_crossentropy.ipynb) and the readers of
# [chapter 4.7](07_reading.ipynb).*

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.book.diagram import PALETTE, gpt2_diagram

gpt2_diagram(lit="crossentropy")

# %% [markdown]
# *Figure 4.21.1. Everything in this chapter is read off the last box: the loss
# of each token, given those before it.*
#
# Training reports a loss on batches of its own shape. That is enough to steer
# a run, and not enough to compare two models: their tokens may differ, their
# contexts may differ, and a number without an error bar says little. At the
# end of this chapter you can
#
# - turn a loss a token into bits a byte, and say why only these compare;
# - say what the stride of the windows buys and what it costs;
# - draw what a token's place in the window is worth.
#
# How a model answers a multiple choice is told in
# [chapter 4.22](22_choices.ipynb).

# %% [markdown]
# ## Setup

# %% setup
import matplotlib.pyplot as plt

from llmnb.book.verify import compare, verdict
from llmnb.config import GPT2Config
from llmnb.model.gpt2 import GPT2

# %% [markdown]
# ## By hand
#
# A model reads the text `spam` and gives its four letters the probabilities
# 1/2, 1/4, 1/4 and 1/8, each given the letters before. Then it gives the whole
# text their product, 1/256. The loss is the mean of $-\log p$; the
# **perplexity** is $e$ to the loss:
#
# $$ \begin{aligned}
#    \mathcal L &= -\frac1N \sum_{i=1}^{N} \log p(x_i \mid x_{<i}) , \\
#    \mathrm{PPL} &= e^{\mathcal L}
#      = \Bigl(\prod_i p(x_i \mid x_{<i})\Bigr)^{-1/N} .
#    \end{aligned} \tag{4.21.1} $$
#
# Here it is $256^{1/4} = 4$: the model is as unsure as if it had to guess
# among four letters each time.

# %% four letters by hand
import numpy as np

p = np.array([1 / 2, 1 / 4, 1 / 4, 1 / 8])
loss = -np.log(p).mean()
print("perplexity", round(float(np.exp(loss)), 6))
print("bits a byte", round(float(loss / np.log(2)), 6))

# %% [markdown]
# ## Why only bytes compare
#
# Let a second model cut `spam` into two tokens, `sp` and `am`, with the
# probabilities 1/8 and 1/32. Their product is 1/256 too: the two models believe
# the same of this text. But the second one's loss is $\tfrac12 \log 256$, twice
# the first one's, and its perplexity is 16. A loss a token measures the model
# *and* the length of its tokens.
#
# What does not depend on the cutting is the probability of the text,
# $P = \prod_i p(x_i \mid x_{<i})$. Its negative logarithm to base 2 is the
# number of bits that an ideal code needs for the text, and the text has a
# length that all agree on, its bytes $n$:
#
# $$ \text{bits a byte} = \frac{-\log_2 P}{n}
#    = \frac{N}{n} \cdot \frac{\mathcal L}{\log 2} . \tag{4.21.2} $$
#
# Strictly, $P$ is the probability of one way to cut the text, the one that the
# tokenizer takes. A model spreads a little probability over other cuts that
# spell the same text, so (4.21.2) can be too high, and never too low.
#
# Three conventions must be stated, or the number means nothing. The text of a
# document begins behind `<|endoftext|>`, which is given and not scored, so
# that the first token has a context as in training. Each token of the text is
# scored once. The `<|endoftext|>` between two documents is not scored: it has
# no bytes.

# %% imports of the evaluation tags=["export"]
import math
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np

from llmnb.text.bpe import EOT
from llmnb.text.tokenizer import document_start, encode_text, text_start
from llmnb.train.group import ALONE


# %% the score of a text tags=["export"]
class Score(NamedTuple):
    """What a model pays for a text.

    nats: in all. tokens, bytes: that were scored.
    """

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self):
        """Nats a token, the mean of -log p."""
        return self.nats / self.tokens

    @property
    def perplexity(self):
        """e to the loss; (4.21.1)."""
        return math.exp(min(self.loss, 700))

    @property
    def bits_per_byte(self):
        """Bits of an ideal code for each byte of the text; (4.21.2)."""
        return self.nats / math.log(2) / self.bytes


# %% the same belief, two tokenizers
two = -np.log([1 / 8, 1 / 32]).sum()
letters, pairs = Score(-np.log(p).sum(), 4, 4), Score(two, 2, 4)
print(round(letters.perplexity), round(pairs.perplexity))
compare("bits a byte", letters.bits_per_byte, pairs.bits_per_byte)

# %% [markdown]
# ## Rows of losses
#
# The model takes batches $(B, T)$, and what we score are rows of any length up
# to $T$. A shorter row is filled up with zeros. Causal attention cannot see
# what stands behind a position, so the filling changes nothing before it, and
# the losses of the filling are thrown away.
#
# Every score of this chapter comes from these losses. One that is infinite or
# NaN is an error here, since later nobody would see it: the smallest of four
# NaN is the first, and a model that computes nothing would be right in a
# quarter of all questions.


# %% the losses of rows tags=["export"]
def row_losses(model, rows):
    """Yield the losses of every row: -log p of its tokens but the first.

    model: a GPT2. rows: an iterable of 1-D integer arrays of 2 to
    model.seq_len + 1 tokens, taken model.batch_size at a time. Yields a
    float64 array of len(row) - 1 nats for each. Raises ValueError for a row
    of another length, and FloatingPointError at a loss that is not finite.
    """
    rows, shape = iter(rows), (model.batch_size, model.seq_len)
    while batch := list(islice(rows, model.batch_size)):
        tokens, targets = np.zeros((2, *shape), np.int32)
        for b, row in enumerate(batch):
            if not 2 <= len(row) <= model.seq_len + 1:
                raise ValueError(
                    f"row_losses: a row must have 2 to {model.seq_len + 1} "
                    f"tokens, got {len(row)}"
                )
            tokens[b, : len(row) - 1] = row[:-1]
            targets[b, : len(row) - 1] = row[1:]
        model.forward(tokens, targets)
        losses = np.asarray(model.memory["acts"]["losses"])
        for b, row in enumerate(batch):
            found = losses[b, : len(row) - 1].astype(np.float64)
            for wrong in found[~np.isfinite(found)]:
                raise FloatingPointError(
                    f"the loss of a token is {wrong}: the model computes no "
                    "numbers, its weights may be too large"
                )
            yield found


# %% padding changes nothing
cfg = GPT2Config(32, 97, 2, 2, 16)
model = GPT2(cfg, 3, 32, backend="reference", precision="fp64", seed=18)
model.params["wte"][:97] *= 20
rng = np.random.RandomState(18)
rows = [rng.randint(0, 97, n) for n in (33, 9, 2, 20)]
losses = list(row_losses(model, rows))
print([len(x) for x in losses])
alone = GPT2(cfg, 1, 8, backend="reference", precision="fp64", seed=18)
alone.params["wte"][...] = model.params["wte"]
compare("a row alone", losses[1], next(row_losses(alone, rows[1:2])), 1e-12)

# %% [markdown]
# ## A text longer than the context
#
# A text of $N$ tokens, and a model that sees $T$ at a time. Cut the text into
# stretches of $T$ and score each by itself, behind the one token before it: every
# token is scored once, but the first of a stretch sees one token, the second two,
# and so on. On average a token sees $(T+1)/2$ tokens, where it could see $T$.
#
# Let the windows overlap instead: each begins $s$ tokens behind the last one,
# $1 \le s \le T$, and of each only the tokens are scored that the windows
# before it did not reach. Window $k$ covers the tokens $ks$ to $ks + T$; past
# the first, it scores the last $s$ of its $T$:
#
# $$ \begin{aligned}
#    &\text{context of a scored token}: \\
#    &\quad T - s + 1 \ \text{to}\ T , \\
#    &\quad \text{on average } T - \tfrac{s-1}{2} .
#    \end{aligned} \tag{4.21.3} $$
#
# With $s = T$ these are the stretches, $(T+1)/2$ on average. With $s = 1$ every
# token sees $T$. What is the price? $N$ tokens need about $N/s$ windows of $T$
# tokens each, so
#
# $$ \begin{aligned}
#    \text{cost} &\approx \frac{N}{s} \cdot T \quad \text{tokens of work}: \\
#      &\phantom{{}\approx{}} \frac{T}{s} \text{ times that of } s = T .
#    \end{aligned} \tag{4.21.4} $$
#
# The half, $s = T/2$, costs twice as much and lifts the least context from one
# token to $T/2 + 1$. It is the default here.


# %% the windows of a text tags=["export"]
def windows(count, seq_len, stride):
    """Yield (start, first, end) of windows over `count` predictions.

    A window reads the tokens from start on; its predictions from first to
    end (past its last) are scored, each of the `count` in one window.
    Raises ValueError unless 1 <= stride <= seq_len.
    """
    if not 1 <= stride <= seq_len:
        raise ValueError(
            f"stride must lie in [1, {seq_len}], the length of the context, "
            f"got {stride}"
        )
    start = first = 0
    while first < count:
        end = min(start + seq_len, count)
        yield start, first, end
        start, first = start + stride, end


# %% windows of ten tokens
for stride in (4, 2):
    print(f"stride {stride}:", list(windows(10, 4, stride)))


# %% the losses of a text tags=["export"]
def text_losses(model, tokens, stride=None, bar=iter, group=ALONE):
    """Yield the losses of tokens[1:], window after window, float64 arrays.

    tokens: integers (N,), N of at least 2. stride: tokens that each window
    scores past the first, by default half the context. bar: wraps the
    list of windows, as tqdm does. Together the arrays have N - 1 numbers, in
    order; those of one process of a group are its share of the windows.
    """
    if len(tokens) < 2:
        raise ValueError("there must be at least one token to score")
    T = model.seq_len
    stride = max(1, T // 2) if stride is None else stride
    plan = list(windows(len(tokens) - 1, T, stride))
    mine = group.share(len(plan))
    plan = plan[mine.start : mine.stop]
    rows = (tokens[start : end + 1] for start, _, end in plan)
    pairs = zip(bar(plan), row_losses(model, rows), strict=True)
    for (start, first, _), loss in pairs:
        yield loss[first - start :]


# %% score a text tags=["export"]
def score_text(model, encoding, documents, stride=None):
    """The `Score` of a text, and of nothing but the text.

    documents: a str, or an iterable of str, each read behind its
    `text_start`, such as `<|endoftext|>`, which is not scored. stride: as for
    text_losses. Raises ValueError when there is no text.
    """
    if isinstance(documents, str):
        documents = [documents]
    pieces = ((True, text) for text in documents)
    return score_pieces(model, encoding, pieces, stride)


def score_pieces(
    model, encoding, pieces, stride=None, bar=iter, endoftext=False,
    group=ALONE,
):  # fmt: skip
    """`score_text` of documents in pieces, as `text.documents` cuts them.

    pieces: an iterable of (whether a document begins, str). bar: wraps
    the list of windows, as tqdm does. endoftext: `<|endoftext|>` in a text
    is the token, behind which a document begins. group: the Group that
    shares the work, of which each process calls this.
    """
    parts, size, marks = [], 0, document_start(encoding)
    for first, text in pieces:
        parts.append(np.array([text_start(encoding)] * first, np.uint32))
        parts.append(encode_text(encoding, text, endoftext))
        text = text.replace(EOT, "") if endoftext else text
        size += len(text.encode("utf-8"))
    if not size:
        raise ValueError("there is no text to score")
    tokens = np.concatenate(parts).astype(np.int32)
    losses = text_losses(model, tokens, stride, bar, group)
    losses = _of_all(group, np.concatenate([np.empty(0), *losses]))
    scored = losses[~np.isin(tokens[1:], marks)]
    return Score(float(scored.sum()), len(scored), size)


# %% [markdown]
# Windows do not know of each other, so several processes can share them, as they do
# in [Part 6](../6_machines/04_sharing.ipynb). All of them then get all losses, in the
# order of the windows, and add them up in that order: the score has the bits of one
# process.


# %% the losses of all tags=["exporti"]
def _of_all(group, losses):
    """The losses of all processes in their order, from this one's."""
    if group.size == 1:
        return losses
    ends = np.cumsum([0, *group.gather(len(losses))]).tolist()
    whole, spans = np.empty(ends[-1]), [*pairwise(ends)]
    whole[slice(*spans[group.rank])] = losses
    group.spread(whole, spans)
    return whole


# %% [markdown]
# ## Proof
#
# With a context as long as the text there is one window, and no stride can
# matter. With stride 1 each token must be scored by the $T$ tokens before it:
# we ask the model for each of these rows alone. And a window that scores its
# tokens one place off must be caught.

# %% one token at a time
tokens = rng.randint(0, 97, 40)
short = GPT2(cfg, 2, 8, backend="reference", precision="fp64", seed=18)
short.params["wte"][...] = model.params["wte"]
got = np.concatenate(list(text_losses(short, tokens, 1)))
each = [tokens[max(0, i - 8) : i + 1] for i in range(1, 40)]
want = [losses[-1] for losses in row_losses(short, each)]
compare("stride 1", got, want, tol=1e-12)
off = np.abs(np.array(want[1:]) - got[:-1]).max() > 1e-3
verdict("one place off", off, "is caught")

# %% one window
long = rng.randint(0, 97, 33)
strides = [
    np.concatenate(list(text_losses(model, long, s))) for s in (1, 7, 32)
]
same = all(np.array_equal(strides[0], x) for x in strides)
verdict("one window", same, "no stride matters")

# %% [markdown]
# ## What context is worth
#
# Now a model that has learnt something: the one that trained for an hour in
# [chapter 1.18](../1_by_hand/18_training.ipynb), with a context of 256 tokens. Its
# text for validation was the beginning of the library of Python 3.11, which is kept
# beside the book's tests. That it is the same text, its loss tells.

# %% the model of the hour, and text that it has not read
from llmnb.text.corpus import encode_documents, load_corpus
from llmnb.text.data import DataLoader
from llmnb.train.folder import load_run
from llmnb.train.loop import evaluate
from llmnb.train.watch import read_log

HOUR = "../../book/hour"
hour, encoding, _ = load_run(HOUR, batch_size=8)
T = hour.seq_len
documents = load_corpus("../../tests/data/library.jsonl.gz", limit=200_000)
held_out = encode_documents(encoding, documents)[:32_768]
loss = evaluate(hour, DataLoader([held_out], 8, T, shuffle=False), 20)
logged = read_log(HOUR)["val_loss"][1, -1]
print(round(loss, 3))
verdict("the text", abs(loss - logged) < 1e-3, "the loss of the log")

# %% losses by position and by stride
by_place = np.stack(list(text_losses(hour, held_out[: 127 * T + 1], T)))
edges = [0, *2 ** np.arange(9)]  # 1, 2, 3 to 4, 5 to 8, ..., 129 to 256
groups = [by_place[:, a:b].mean(axis=1) for a, b in pairwise(edges)]
mean = np.mean(groups, axis=1)
error = np.std(groups, axis=1) / np.sqrt(len(by_place))
strides = [T // 2, T // 4, T // 8]
part = held_out[: 40 * T + 1]
whole = np.concatenate(list(text_losses(hour, part, T)))
saved = np.stack(
    [whole - np.concatenate(list(text_losses(hour, part, s))) for s in strides]
)
worth, doubt = saved.mean(axis=1), saved.std(axis=1) / np.sqrt(len(whole))
steps = np.diff(mean[1:])
verdict("context", (steps < -0.05).all(), "each doubling helps, to the end")
verdict("half of it", abs(worth[0] - 0.12) < 0.02, "saves 0.12 nats")
more = worth[1:] - worth[0]
verdict("less", (more > 0).all() and (more < 0.03).all(), "little more")

# %% draw them
fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), dpi=100)
left.errorbar(edges[1:], mean, error, fmt="o-", ms=4, capsize=4)
left.set_xscale("log", base=2)
left.set_xticks(edges[1:], edges[1:])
left.minorticks_off()
left.set(xlabel="tokens of context, up to", ylabel="loss (nats a token)")
right.errorbar(
    range(3), worth, doubt, fmt="o", color=PALETTE["orange"], capsize=4
)
right.axhline(0, color=PALETTE["grey"], lw=1)
right.set(xlabel="stride", ylabel="nats a token saved", xlim=(-0.5, 2.5))
right.set_xticks(range(3), strides)
for ax in (left, right):
    ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 4.21.2. Left: the loss of a token by the number of tokens before it, 1, 2,
# 3 to 4 and so on, with one standard error. From two on every doubling lowers it, the
# last by least. Right: what a smaller stride saves against a stride of the whole
# context, 256, on the same text, with one standard error: nearly all of it at a half.*
#
# The two pictures explain each other: with $s = T$ the dear tokens on the left are in
# the mean, with $s = T/2$ they are not, and between contexts of 129 and of 256 there
# is little to save. How much that is depends on the model: the longer the context
# that it can use, the more a small stride brings. Either way the stride belongs to the
# number: perplexities that were taken with different strides do not compare.
#
# Bits a byte compare with whatever codes the same bytes, a program that packs files
# too (which begins with nothing, where the model has read ten million characters of
# the kind):

# %% its score as numbers tags=["nbval-ignore-output"]
import lzma

raw = encoding.decode(part.tolist())
texts = [x for x in raw.split("<|endoftext|>") if x]
score = score_text(hour, encoding, texts)
packed = 8 * len(lzma.compress("".join(texts).encode())) / score.bytes
print(f"{score.loss:.2f} nats a token, perplexity {score.perplexity:.1f}")
print(f"{score.bits_per_byte:.2f} bits a byte of {score.bytes:,}")
print(f"{packed:.2f} bits a byte of the same text, packed by LZMA")
verdict("the model", score.bits_per_byte < packed, "packs it better")

# %% [markdown]
# ## Take away
#
# - Perplexity depends on the tokenizer. Bits a byte do not: all models code the
#   same bytes.
# - Overlapping windows give every token a context of $T - s + 1$ or more, at
#   $T/s$ times the work. The stride is part of the number.
#
# ## Exercises
#
# **1** (★). A model over bytes has a loss of 0.9 nats a byte, another with
# 4.2 bytes a token has 3.6 nats a token. Which predicts better?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# 0.9 nats are 1.30 bits a byte; 3.6 / 4.2 nats are 1.24. The second.
# :::

# %% exercise 1, checked tags=["hide-cell"]
first, second = Score(0.9, 1, 1), Score(3.6 * 10, 10, 42)
verdict("exercise 1", second.bits_per_byte < first.bits_per_byte, "the second")

# %% [markdown]
# **2** (★★). Write `cost(N, T, s)`, the number of windows that `windows`
# yields, without yielding them.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# One window covers $T$; each further one adds $s$:
# $1 + \lceil \max(0, N - T) / s \rceil$.
# :::


# %% exercise 2, the function tags=["hide-cell"]
def cost(N, T, s):
    return 1 + -(-max(0, N - T) // s)


# %% exercise 2, checked
cases = [(N, T, s) for N in (1, 8, 9, 30) for T in (4, 8) for s in (1, 3, 4)]
same = all(cost(*c) == len(list(windows(*c))) for c in cases)
verdict("exercise 2", same, "counts the windows")

# %% [markdown]
# ## Further reading
#
# - Cover and Thomas (2006), *Elements of Information Theory*, its fifth chapter:
#   why $-\log_2 P$ is the length of a code.
# - Radford et al. (2019),
#   [Language Models are Unsupervised Multitask Learners](https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf):
#   section 3.1, where perplexities are taken a word to compare tokenizers.
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("4.21")
