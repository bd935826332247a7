# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       train.evaluation: 'What a model knows: perplexity, bits a byte, multiple choice.'
# ---

# %% [markdown]
# # Measure what a model knows
#
# > Perplexity and bits a byte of any text, with strided windows; multiple
# > choice as HellaSwag asks it; and how far to trust each number.

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.book.diagram import PALETTE, gpt2_diagram

gpt2_diagram(lit="crossentropy")

# %% [markdown]
# *Figure 4.16.1. Everything in this chapter is read off the last box: the loss
# of each token, given those before it.*
#
# Training reports a loss on batches of its own shape. That is enough to steer
# a run, and not enough to compare two models: their tokens may differ, their
# contexts may differ, and a number without an error bar says little. At the
# end of this chapter you can
#
# - turn a loss a token into bits a byte, and say why only these compare;
# - say what the stride of the windows buys and what it costs;
# - score a multiple choice with a language model, by sum and by mean, and say
#   which mistake each makes;
# - put a standard error on an accuracy.
#
# You need the loss of [chapter 1.11](../1_by_hand/11_crossentropy.ipynb), training from
# [chapter 1.16](../1_by_hand/16_training.ipynb), and the readers of
# [chapter 4.9](09_shards.ipynb).

# %% [markdown]
# ## Setup

# %% setup
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt

from llmnb.config import GPT2Config
from llmnb.model.gpt2 import GPT2
from llmnb.book.verify import compare, verdict

# %% [markdown]
# ## By hand
#
# A model reads the text `spam` and gives its four letters the probabilities
# 1/2, 1/4, 1/4 and 1/8, each given the letters before. Then it gives the whole
# text their product, 1/256. The loss is the mean of $-\log p$; the
# **perplexity** is $e$ to the loss:
#
# $$ \mathcal L = -\frac1N \sum_{i=1}^{N} \log p(x_i \mid x_{<i}), \qquad
#    \mathrm{PPL} = e^{\mathcal L}
#    = \Bigl(\prod_i p(x_i \mid x_{<i})\Bigr)^{-1/N} . \tag{4.16.1} $$
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
#    = \frac{N}{n} \cdot \frac{\mathcal L}{\log 2} . \tag{4.16.2} $$
#
# Strictly, $P$ is the probability of one way to cut the text, the one that the
# tokenizer takes. A model spreads a little probability over other cuts that
# spell the same text, so (4.16.2) is at most too high.
#
# Three conventions must be stated, or the number means nothing. The text of a
# document begins behind `<|endoftext|>`, which is given and not scored, so
# that the first token has a context as in training. Each token of the text is
# scored once. The `<|endoftext|>` between two documents is not scored: it has
# no bytes.

# %% imports of the evaluation tags=["export"]
import math
import os
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np

from llmnb.files import replacing, what_is
from llmnb.text.reader import check_text, open_stream, read_records, text_of
from llmnb.text.tokenizer import EOT, encode_text


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
        """e to the loss; (4.16.1)."""
        return math.exp(min(self.loss, 700))

    @property
    def bits_per_byte(self):
        """Bits of an ideal code for each byte of the text; (4.16.2)."""
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
            yield _finite(losses[b, : len(row) - 1].astype(np.float64))


def _finite(losses):
    """The losses themselves: every score comes from them."""
    if not np.isfinite(losses).all():
        raise FloatingPointError(
            f"the loss of a token is {losses[~np.isfinite(losses)][0]}: the "
            "model computes no numbers, its weights may be too large"
        )
    return losses


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
# stretches of $T$ and score each by itself: every token is scored once, but the
# first token of a stretch has no context, the second has one token of it, and
# so on. On average a token sees $(T+1)/2$ tokens, where it could see $T$.
#
# Let the windows overlap instead: each begins $s$ tokens behind the last one,
# $1 \le s \le T$, and of each only the tokens are scored that the windows
# before it did not reach. Window $k$ covers the tokens $ks$ to $ks + T$; past
# the first, it scores the last $s$ of its $T$:
#
# $$ \text{context of a scored token}: \quad T - s + 1 \ \text{to}\ T, \qquad
#    \text{on average } T - \tfrac{s-1}{2} . \tag{4.16.3} $$
#
# With $s = T$ these are the stretches, $(T+1)/2$ on average. With $s = 1$ every
# token sees $T$. What is the price? $N$ tokens need about $N/s$ windows of $T$
# tokens each, so
#
# $$ \text{cost} \approx \frac{N}{s} \cdot T \quad\text{tokens of work}: \qquad
#    \frac{T}{s} \text{ times that of } s = T . \tag{4.16.4} $$
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
def text_losses(model, tokens, stride=None, progress=iter):
    """Yield the losses of tokens[1:], window after window, float64 arrays.

    tokens: integers (N,), N of at least 2. stride: tokens that each window
    scores past the first, by default half the context. progress: wraps the
    list of windows, as tqdm does. Together the arrays have N - 1 numbers, in
    order.
    """
    if len(tokens) < 2:
        raise ValueError("there must be at least one token to score")
    T = model.seq_len
    stride = max(1, T // 2) if stride is None else stride
    plan = list(windows(len(tokens) - 1, T, stride))
    rows = (tokens[start : end + 1] for start, _, end in plan)
    losses = row_losses(model, rows)
    pairs = zip(progress(plan), losses, strict=True)
    for (start, first, _), loss in pairs:
        yield loss[first - start :]


# %% score a text tags=["export"]
def score_text(model, encoding, documents, stride=None):
    """The `Score` of a text, and of nothing but the text.

    documents: a str, or an iterable of str, each read behind
    `<|endoftext|>`, which is not scored. stride: as for text_losses. Raises
    ValueError when there is no text.
    """
    if isinstance(documents, str):
        documents = [documents]
    pieces = ((True, text) for text in documents)
    return score_pieces(model, encoding, pieces, stride)


def score_pieces(
    model, encoding, pieces, stride=None, progress=iter, endoftext=False
):
    """`score_text` of documents in pieces, as `llmnb.text.documents` cuts them.

    pieces: an iterable of (whether a document begins, str). progress: wraps
    the list of windows, as tqdm does. endoftext: `<|endoftext|>` in a text
    is the token, behind which a document begins.
    """
    parts, size, eot = [], 0, encoding.eot_token
    for first, text in pieces:
        parts.append(np.array([eot] * first, np.uint32))
        parts.append(encode_text(encoding, text, endoftext))
        text = text.replace(EOT, "") if endoftext else text
        size += len(text.encode("utf-8"))
    if not size:
        raise ValueError("there is no text to score")
    tokens = np.concatenate(parts).astype(np.int32)
    losses = np.concatenate([*text_losses(model, tokens, stride, progress)])
    scored = losses[tokens[1:] != eot]
    return Score(float(scored.sum()), len(scored), size)


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
# Now a model that has learnt something: two layers and four hundred steps on
# the text of [chapter 1.16](../1_by_hand/16_training.ipynb).

# %% a small model that has learnt
from llmnb.train.train import TrainConfig, loaders, new_model, prepare, train

config = TrainConfig(
    corpus=("../../tests/data/library.jsonl.gz",), limit=1_500_000,
    num_layers=2, channels=96, seq_len=64, steps=400,
)  # fmt: skip
data = prepare(config)
student = new_model(config, data.encoding.n_vocab)
batches, _ = loaders(config, data)
steps = [step.loss for step in train(config, student, batches)]
verdict("training", np.mean(steps[-20:]) < steps[0] - 1.5, "has learnt")

# %% losses by position and by stride
held_out = data.val_tokens[: 64 * 240 + 1]
by_place = np.stack(list(text_losses(student, held_out, 64)))
mean = by_place.mean(axis=0)
error = by_place.std(axis=0) / np.sqrt(len(by_place))
strides = [32, 16, 8]
part = held_out[: 64 * 100 + 1]
whole = np.concatenate(list(text_losses(student, part, 64)))
saved = np.stack(
    [
        whole - np.concatenate(list(text_losses(student, part, s)))
        for s in strides
    ]
)
verdict("context", mean[32:].mean() < mean[:4].mean(), "helps")
verdict("stride", saved[0].mean() > 0, "half the context pays less")

# %% draw them
fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), dpi=100)
place = np.arange(1, 65)
left.fill_between(
    place, mean - error, mean + error, color=PALETTE["pale"], lw=0
)
left.plot(place, mean, color=PALETTE["blue"])
left.set(xlabel="tokens of context", ylabel="loss (nats a token)")
doubt = saved.std(axis=1) / np.sqrt(saved.shape[1])
right.errorbar(
    range(3), saved.mean(axis=1), doubt, fmt="o", color=PALETTE["orange"],
    capsize=4,
)  # fmt: skip
right.axhline(0, color=PALETTE["grey"], lw=1)
right.set(xlabel="stride", ylabel="nats a token saved", xlim=(-0.5, 2.5))
right.set_xticks(range(3), strides)
for ax in (left, right):
    ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 4.16.2. Left: the loss of a token by the number of tokens before it,
# with a band of one standard error. It falls steeply over the first few tokens
# and hardly after them. Right: what a smaller stride saves against a stride of
# the whole context, 64, on the same text, with one standard error: about a
# hundredth of a nat at a half, and no more that could be told beyond.*
#
# The two pictures explain each other: with $s = T$ the steep part on the left
# is in the mean, with $s = T/2$ it is not. What lies beyond depends on the
# model. This one was trained briefly and makes little of more than a few
# tokens; the longer the context that a model can use, the more a small stride
# brings. Either way the stride belongs to the number: perplexities that were
# taken with different strides do not compare.

# %% its score as numbers tags=["nbval-ignore-output"]
text = data.encoding.decode(part[:4000].tolist())
texts = [x for x in text.split("<|endoftext|>") if x]
score = score_text(student, data.encoding, texts)
print(f"{score.loss:.3f} nats a token, perplexity {score.perplexity:.1f}")
print(f"{score.bits_per_byte:.3f} bits a byte of {score.bytes:,}")

# %% [markdown]
# ## Multiple choice
#
# **HellaSwag** gives the beginning of a scene and four ways to go on, of which
# one is the true one. A language model answers without being asked: it says how
# probable each ending is. For a context $c$ and an ending $e$ of $n$ tokens
# the probability of the ending is
#
# $$ \log P(e \mid c) = \sum_{i=1}^{n} \log p(e_i \mid c, e_{<i}) . \tag{4.16.5} $$
#
# Choose the ending with the largest. This is `acc`. Its fault: each token
# multiplies $P$ by a number below 1, so a longer ending is less probable
# whatever it says. Suppose all tokens cost about the same, $\bar\ell$ nats. Then
# $-\log P \approx n \bar\ell$, and the shortest ending wins. Dividing by the
# length takes this out:
#
# $$ \hat e = \arg\min_e \; \frac1n \sum_{i=1}^{n} -\log p(e_i \mid c, e_{<i})
#    . \tag{4.16.6} $$
#
# That is `acc_norm`, as llm.c has it: the mean loss over the tokens of the
# ending, and the lowest wins. It errs the other way, a little: the later tokens
# of a long ending are easy, since the ending itself explains them. (Some
# programs divide by the bytes of the ending instead; their numbers differ.)
#
# A row that is longer than the context loses its beginning, as the last tokens
# before an ending say most about it. `llmnb eval` says how many examples were
# cut, for a model with a short context answers another question.


# %% an example tags=["export"]
class Example(NamedTuple):
    """A multiple choice, in tokens.

    context: a 1-D integer array. endings: four of them. label: the index of
    the true one.
    """

    context: np.ndarray
    endings: list
    label: int


class Choice(NamedTuple):
    """What a model chose: by the mean, by the sum, and the truth.

    losses: of the four endings, (4,) means.
    """

    by_mean: int
    by_sum: int
    label: int
    losses: np.ndarray


# %% choose tags=["export"]
def choose(model, examples):
    """Yield the `Choice` of a model for every `Example`.

    The four rows of an example, context and ending, are scored in the
    model's batches: in one if batch_size is 4. A row of more than
    model.seq_len + 1 tokens loses those on its left.
    """
    examples, most = list(examples), model.seq_len + 1
    rows = (
        np.concatenate([x.context, e])[-most:]
        for x in examples
        for e in x.endings
    )
    losses = row_losses(model, rows)
    for example in examples:
        four = list(islice(losses, 4))
        pairs = zip(four, example.endings, strict=True)
        ending = [row[-len(e) :] for row, e in pairs]
        means = np.array([x.mean() for x in ending])  # (4.16.6)
        sums = [x.sum() for x in ending]  # (4.16.5)
        best = int(np.argmin(means)), int(np.argmin(sums))
        yield Choice(*best, example.label, means)


def longest_row(example):
    """The tokens of an example's longest row."""
    return len(example.context) + max(map(len, example.endings))


# %% [markdown]
# How far can the fraction of right answers be trusted? Each answer is right
# with an unknown probability $q$, a random number $r \in \{0, 1\}$ with mean $q$
# and variance $\mathbb E r^2 - q^2 = q - q^2$. The mean of $n$ independent ones
# has the variance $q(1-q)/n$. Put the measured fraction in place of $q$:
#
# $$ \mathrm{SE} = \sqrt{\frac{\hat q (1 - \hat q)}{n}} . \tag{4.16.7} $$
#
# On HellaSwag's 10,042 examples, at $\hat q = 0.3$, that is 0.0046: two models
# that differ by less than a hundredth may be equal. On 100 examples it is
# 0.046, and a guess (0.25) cannot be told from GPT-2 (0.29).


# %% the error of an accuracy tags=["export"]
def standard_error(accuracy, count):
    """The standard error of a fraction of `count` answers; (4.16.7)."""
    return math.sqrt(accuracy * (1 - accuracy) / count)


# %% ten thousand examinations
answers = rng.random_sample((10_000, 500)) < 0.3
spread = answers.mean(axis=1).std()
compare("standard error", standard_error(0.3, 500), spread, tol=1e-3)
print(
    round(standard_error(0.3, 10_042), 4), round(standard_error(0.3, 100), 3)
)

# %% [markdown]
# ### The file
#
# HellaSwag comes as JSON lines: `ctx`, four `endings`, and `label`. An ending
# is encoded with a space before it, as it would stand in the text. llm.c keeps
# the tokens in a file: a header of 256 int32, of which four are used, then
# uint16 numbers.
#
# | place | number |
# |---|---|
# | header 0 to 3 | 20240522, version 1, examples, bytes of the longest one |
# | example 0 to 4 | 65535, its bytes, its index, the label, 4 |
# | example 5 | tokens of the context, and then these tokens |
# | four times | tokens of the ending, and then these tokens |


# %% examples from JSON lines tags=["export"]
def read_examples_json(path, encoding, skip_bad=False, tally=None):
    """The examples of a file of JSON lines: a list of `Example`.

    Each line has ctx, four endings, and label, from 0 to 3; the file may be
    packed (.gz, .zst). Raises ValueError, naming the file and the line, or
    with skip_bad passes over bad lines and notes them in `tally`, a `Tally`.
    """
    take = partial(_example_of, encoding=encoding)
    with open_stream(path) as (stream, _):
        lines = read_records(path, stream, take, skip_bad, tally)
        found = [example for _, example in lines]
    if not found:
        raise ValueError(f"{path}: holds no example")
    return found


# %% one line tags=["exporti"]
def _example_of(where, record, encoding):
    """A HellaSwag record in tokens, or ValueError."""
    context = text_of(where, record, "ctx")
    endings, label = record.get("endings"), record.get("label")
    if not isinstance(endings, list) or len(endings) != 4:
        raise ValueError(f"{where}: 'endings' must be a list of four texts")
    if str(label) not in ("0", "1", "2", "3"):
        raise ValueError(f"{where}: 'label' must be 0 to 3, got {label!r:.40}")
    texts = [f" {check_text(f'{where}: an ending', e)}" for e in endings]
    ids = [
        encode_text(encoding, x).astype(np.int32) for x in (context, *texts)
    ]
    if not ids[0].size:
        raise ValueError(f"{where}: 'ctx' must not be empty")
    return Example(ids[0], ids[1:], int(label))


# %% write llm.c's format tags=["export"]
EVAL_MAGIC, EVAL_START, EVAL_VERSION = 20240522, 65535, 1


def write_examples(path, examples):
    """Write a list of `Example` in llm.c's format.

    The file is written beside `path` and renamed. Raises ValueError for an
    example that takes 65,536 bytes or more, and for an empty list.
    """
    blocks = []
    for i, example in enumerate(examples):
        body = [i % 65536, example.label, len(example.endings)]
        for tokens in [example.context, *example.endings]:
            body += [len(tokens), *map(int, tokens)]
        size = 2 * (len(body) + 2)
        if size > 65535 or max(body) > 65535 or min(body) < 0:
            raise ValueError(
                f"write_examples: example {i} must take less than 65536 "
                f"bytes and have tokens below 65536, it takes {size}"
            )
        blocks.append(np.array([EVAL_START, size, *body], "<u2"))
    if not blocks:
        raise ValueError("write_examples: there are no examples")
    header = np.zeros(256, "<i4")
    longest = max(block.nbytes for block in blocks)
    header[:4] = EVAL_MAGIC, EVAL_VERSION, len(blocks), longest
    with replacing(path) as file:
        file.write(header.tobytes() + b"".join(x.tobytes() for x in blocks))


# %% [markdown]
# Reading trusts nothing: the file's size bounds the count, and each length is
# checked against what is left of its example before it is used.


# %% read llm.c's format tags=["export"]
def read_examples(path):
    """The examples of a file in llm.c's format: a list of `Example`.

    Raises ValueError, naming the file, what is wrong and what would be
    right.
    """
    size = os.path.getsize(path)
    if size < 1024 or size % 2:
        what = what_is(path, EVAL_MAGIC)
        raise ValueError(
            f"{path}: must have a header of 1024 bytes and two bytes for "
            f"each number, the file has {size}" + (what and f": {what}")
        )
    header = np.fromfile(path, "<i4", 4)
    magic, version, count, longest = header.tolist()
    most = (size - 1024) // 30  # an example has 15 numbers or more
    for ok, what, must, got in (
        (magic == EVAL_MAGIC, "magic number", EVAL_MAGIC, magic),
        (version == EVAL_VERSION, "version", EVAL_VERSION, version),
        (0 < count <= most, "count", f"1 to {most} in {size} bytes", count),
    ):
        if not ok:
            other = what_is(path, EVAL_MAGIC)
            raise ValueError(
                f"{path}: the {what} must be {must}, got {got}"
                + (other and f": {other}")
            )
    numbers, place, found = np.fromfile(path, "<u2", offset=1024), 0, []
    for i in range(count):
        example, used = _parse(f"{path}: example {i}", numbers[place:])
        if 2 * used > longest:
            raise ValueError(
                f"{path}: example {i} has {2 * used} bytes, the header says "
                f"at most {longest}"
            )
        place += used
        found.append(example)
    if place != len(numbers):
        raise ValueError(
            f"{path}: {2 * (len(numbers) - place)} bytes follow the last "
            "example"
        )
    return found


# %% one example tags=["exporti"]
def _parse(where, numbers):
    """The `Example` at the start of an array, and the numbers it takes."""
    if len(numbers) < 15 or numbers[0] != EVAL_START:
        raise ValueError(f"{where} must begin with {EVAL_START}")
    size, _, label, four = numbers[1:5].tolist()
    if size % 2 or not 30 <= size <= 2 * len(numbers):
        raise ValueError(
            f"{where} must have an even size of 30 to {2 * len(numbers)} "
            f"bytes, got {size}"
        )
    if four != 4 or label > 3:
        raise ValueError(
            f"{where} must have 4 endings and a label of 0 to 3, got {four} "
            f"and {label}"
        )
    left, parts = numbers[5 : size // 2], []
    for _ in range(5):
        length = int(left[0]) if len(left) else 0
        if not 0 < length < len(left):
            raise ValueError(f"{where}: a text of {length} tokens cannot fit")
        parts.append(left[1 : length + 1].astype(np.int32))
        left = left[length + 1 :]
    if len(left):
        raise ValueError(f"{where}: {len(left)} numbers follow its endings")
    return Example(parts[0], parts[1:], label), size // 2


# %% [markdown]
# Three questions of our own, in both forms, which must give the same examples:

# %% three questions
import json
from pathlib import Path

QUESTIONS = [
    ("The kettle boiled, so she", ["made tea.", "ran.", "sold it.", "."], 0),
    ("He opened the umbrella as", ["if.", "the rain began.", "it.", "a"], 1),
    ("The bridge was shut, and", ["so", "birds", "they went round.", "a"], 2),
]
scratch = TemporaryDirectory(ignore_cleanup_errors=True)
folder = Path(scratch.name)
names = "ctx", "endings", "label"
lines = [json.dumps(dict(zip(names, q, strict=True))) for q in QUESTIONS]
_ = (folder / "three.jsonl").write_text("\n".join(lines), "utf-8")

# %% both forms
from llmnb.train.evaluation import (
    read_examples,
    read_examples_json,
    write_examples,
)

examples = read_examples_json(folder / "three.jsonl", data.encoding)
write_examples(folder / "three.bin", examples)
again = read_examples(folder / "three.bin")
same = all(
    np.array_equal(a.context, b.context)
    and all(map(np.array_equal, a.endings, b.endings))
    and a.label == b.label
    for a, b in zip(examples, again, strict=True)
)
verdict("two forms", same, "the same examples")
raw = (folder / "three.bin").read_bytes()
print(np.frombuffer(raw[:16], "<i4")[:3], len(raw) > 1024)

# %% [markdown]
# ### Try it
#
# Our student has read source code, and not enough of it to know about kettles.
# So we make it a test from text that it has not seen: sixteen tokens of
# validation text, the tokens that follow them, and three other stretches from
# elsewhere. Each ending has a length of its own, from 2 to 12 tokens.


# %% a test made from the text
def make_example(rng, tokens):
    at = rng.randint(0, len(tokens) - 30, 4)
    lengths = rng.randint(2, 13, 4)
    pairs = zip(at, lengths, strict=True)
    endings = [tokens[a + 16 : a + 16 + n] for a, n in pairs]
    order = rng.permutation(4)
    context = tokens[at[0] : at[0] + 16]
    label = int(np.flatnonzero(order == 0)[0])
    return Example(context, [endings[i] for i in order], label)


test = [make_example(rng, data.val_tokens) for _ in range(400)]
choices = list(choose(student, test))
right = np.mean([c.by_mean == c.label for c in choices])
error = standard_error(right, len(test))
verdict("the student", right > 0.25 + 3 * error, "is better than a guess")

# %% the length of what is chosen
lengths = np.array([[len(e) for e in x.endings] for x in test])
rows = np.arange(len(test))
by_sum = lengths[rows, [c.by_sum for c in choices]].mean()
by_mean = lengths[rows, [c.by_mean for c in choices]].mean()
verdict("the sum", by_sum < lengths.mean() - 1, "prefers short endings")
verdict("the mean", by_mean > by_sum + 1, "less so")

# %% the numbers tags=["nbval-ignore-output"]
summed = np.mean([c.by_sum == c.label for c in choices])
print(f"acc_norm {right:.3f}, acc {summed:.3f}, each +- {error:.3f}")
print(f"tokens chosen: {by_mean:.1f} by the mean, {by_sum:.1f} by the sum")

# %% [markdown]
# The bias of (4.16.5) on its own: a model without weights gives every token the
# same probability. All four means are $\log V$, so by the mean it has no
# preference, while by the sum it takes the shortest ending.

# %% no weights
guess = GPT2(config.model(data.encoding.n_vocab), 4, 64, seed=None)
blank = list(choose(guess, test[:50]))
means = np.array([c.losses for c in blank])
compare(
    "the mean", means, np.full((50, 4), np.log(guess.cfg.vocab_size)), 1e-5
)
shortest = [
    c.by_sum == np.argmin(n) for c, n in zip(blank, lengths, strict=False)
]
verdict("the sum", all(shortest), "takes the shortest")

# %% [markdown]
# Four damaged files, and what is said about them:


# %% damaged files
def complaint(raw):
    path = folder / "bad.bin"
    path.write_bytes(raw)
    try:
        read_examples(path)
    except ValueError as error:
        return str(error).replace(f"{path}", path.name)
    raise AssertionError("no complaint")


number = (2**31 - 1).to_bytes(4, "little")
print(complaint(raw[:-2]))
print(complaint(raw[:8] + number + raw[12:]))
print(complaint(raw[:1034] + b"\xff\xff" + raw[1036:]))
print(complaint(raw + b"\0\0"))

# %% [markdown]
# ## Take away
#
# - Perplexity depends on the tokenizer. Bits a byte do not: all models code the
#   same bytes.
# - Overlapping windows give every token a context of $T - s + 1$ or more, at
#   $T/s$ times the work. The stride is part of the number.
# - Dividing an ending's loss by its length takes out the preference for short
#   endings.
# - An accuracy over $n$ questions has a standard error of
#   $\sqrt{\hat q(1-\hat q)/n}$. Without it, a difference says nothing.
#
# ## Design note
#
# Programs that run many benchmarks build a prompt for each, with worked
# examples in front and answers in letters, and compare what the model writes.
# That measures what people want from a large model. A small model cannot follow
# such a prompt, and all its answers look like chance. Asking for the
# probability of an ending needs no instruction, and is therefore what one
# watches while a small model trains.
#
# We score an example in four rows and compute the context four times. Keeping
# the keys and values of the context ([chapter 4.13](13_cache.ipynb)) would save
# most of that when contexts are long; HellaSwag's endings are about as long as
# its contexts, and four equal rows are one batch.
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
# **2** (★★). Two models answer the same $n$ questions. Why is the standard
# error of the *difference* of their accuracies often much smaller than (4.16.7)
# suggests? Compute it from the two lists of right and wrong.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# Both meet the same hard questions, so their errors are correlated. Take the
# difference of each question, $-1$, 0 or 1, and the standard error of its mean:
# questions that both get right or both wrong add nothing.
# :::


# %% exercise 2, the function tags=["hide-cell"]
def error_of_difference(a, b):
    d = np.asarray(a, float) - np.asarray(b, float)
    return d.std() / np.sqrt(len(d))


# %% exercise 2, checked
a = rng.random_sample(2000) < 0.4
b = np.where(rng.random_sample(2000) < 0.9, a, ~a)
paired = error_of_difference(a, b)
apart = np.hypot(*(standard_error(x.mean(), 2000) for x in (a, b)))
verdict("exercise 2", paired < 0.6 * apart, "much smaller")

# %% [markdown]
# **3** (★★). Write `cost(N, T, s)`, the number of windows that `windows`
# yields, without yielding them.
#
# :::{admonition} Solution to exercise 3
# :class: dropdown
# One window covers $T$; each further one adds $s$:
# $1 + \lceil \max(0, N - T) / s \rceil$.
# :::


# %% exercise 3, the function tags=["hide-cell"]
def cost(N, T, s):
    return 1 + -(-max(0, N - T) // s)


# %% exercise 3, checked
from llmnb.train.evaluation import windows

cases = [(N, T, s) for N in (1, 8, 9, 30) for T in (4, 8) for s in (1, 3, 4)]
same = all(cost(*c) == len(list(windows(*c))) for c in cases)
verdict("exercise 3", same, "counts the windows")

# %% [markdown]
# ## Further reading
#
# - Zellers et al. (2019),
#   [HellaSwag: Can a Machine Really Finish Your Sentence?](https://arxiv.org/abs/1905.07830):
#   section 3, on how wrong endings were made that fool models and not people.
# - Gao (2021),
#   [Multiple Choice Normalization in LM Evaluation](https://blog.eleuther.ai/multiple-choice-normalization/):
#   the ways to divide by a length, and what each assumes.
# - Cover and Thomas (2006), *Elements of Information Theory*, chapter 1.6: why
#   $-\log_2 P$ is the length of a code.
# - Radford et al. (2019),
#   [Language Models are Unsupervised Multitask Learners](https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf):
#   section 3.1, where perplexities are taken a word to compare tokenizers.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("4.16")
