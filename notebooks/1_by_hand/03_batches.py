# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       text.data: "The tokens of a text, cut into batches of tokens and targets."
# ---

# %% [markdown]
# # Batches: questions for the model
#
# > A text becomes one long row of tokens, the row becomes windows, and windows
# > become the arrays of tokens and targets that a training step takes.
#
# *Reading time: 23 minutes. You need: [chapter 1.2](02_tokens.ipynb).*
#
# ## Where we are
#
# A model learns from questions: here is some text, what comes next? A text
# holds as many of them as it has tokens, less one, and a training step asks a
# few hundred or thousand. This chapter cuts the text so that one pass over it
# asks no question twice and leaves out less than a step's worth. And it sets a
# part aside, to ask the model what it cannot have learned by heart.

# %% where we are
from llmnb.book.diagram import PALETTE, gpt2_diagram

gpt2_diagram(lit="batches")

# %% [markdown]
# *Figure 1.3.1. The box after the tokens. What leaves it are $B$ rows of $T$
# tokens; these two axes stay with all later layers.*
#
# At the end you can
#
# - say why a part of the text is set aside, and which;
# - write down the targets of any window, and count the windows of a text;
# - say which windows the next batch holds, also after a restart;
# - show that a loader which draws its windows at random forgets some.
#
# A [batch](../../book/glossary.md#term-batch) has $B$ rows of $T$ tokens. The
# rows have nothing to do with one another; the tokens of a row are a stretch
# of text.
#
# ## Setup

# %% setup
import gzip
import json

import matplotlib.pyplot as plt

from llmnb.book.verify import verdict
from llmnb.text import bpe

# %% imports of the data tags=["export"]
import os

import numpy as np

from llmnb.checks import check_tokens

# %% [markdown]
# ## By hand
#
# Take the first words of a book, a token for each word: *in the beginning was
# the word and the*. Cut them into *windows*, stretches of $T$ tokens. With
# $T = 3$ the first window asks three questions:
#
# | the model has read | and must answer |
# |---|---|
# | in | the |
# | in the | beginning |
# | in the beginning | was |
#
# So one window asks $T$ questions at once, and it needs $T + 1$ tokens: `in
# the beginning` are its tokens, `the beginning was` its
# [targets](../../book/glossary.md#term-target). The next window begins with
# `was`, the last target of the first: the windows share their borders, so that
# no question is left out.

# %% a row cut into windows tags=["hide-input"]
sentence = "in the beginning was the word and the word was with him"
words = sentence.split()
blue, orange, green = (PALETTE[x] for x in ("blue", "orange", "green"))
ink = PALETTE["ink"]


def draw_words(ax, x, y, words, face, size=7.5):
    for i, word in enumerate(words):
        box = plt.Rectangle((x + i + 0.03, y), 0.94, 0.7, fc=face, ec="white")
        ax.add_patch(box)
        middle = {"ha": "center", "va": "center", "color": "white"}
        ax.text(x + i + 0.5, y + 0.35, word, size=size, **middle)


fig, ax = plt.subplots(figsize=(8, 3.3), dpi=100)
draw_words(ax, 0, 4, words, green)
for i, name in ((0, "tokens"), (1, "targets")):
    x, face = 1.5 + 5.5 * i, (blue, orange)[i]
    ax.text(x + 1.5, 2.35, name, ha="center", color=face, size=11)
    for row in (0, 1):
        draw_words(ax, x, 1.3 - row, words[3 * row + i :][:3], face)
for row in (0, 1):
    x = 3 * row
    style = {"lw": 2.5, "solid_capstyle": "butt"}
    ax.plot([x + 0.05, x + 2.95], [3.85, 3.85], color=blue, **style)
    ax.plot([x + 1.05, x + 3.95], [3.7, 3.7], color=orange, **style)
    ax.text(1.3, 1.65 - row, f"row {row}", ha="right", va="center", color=ink)
ax.set(xlim=(-0.1, 12.1), ylim=(0, 4.9))
ax.axis("off")
fig.subplots_adjust(0, 0, 1, 1)
plt.show()

# %% [markdown]
# *Figure 1.3.2. One long row of tokens, and the first batch cut from it, with
# $B = 2$ rows of $T = 3$. The targets are the same stretch, one token on; the
# last target of a row of the batch is where the next one begins.*
#
# ## One long row
#
# The text is the one of which [chapter 1.1](01_learns.ipynb) took the
# beginning, a part of Python's library. A *document* is a stretch of text that
# belongs together, here one module or one page of the manual. We write the
# documents one after the other, and put `<|endoftext|>` before each. A window
# may reach over the border of two documents; from that token the model can
# learn that what came before has nothing to say about what follows. The
# encoding is trained on the first fifty documents only, to save time. A token
# is kept in two bytes, as `uint16`: all numbers are below 65,536.

# %% documents, and their tokens
with gzip.open("../../tests/data/library.jsonl.gz") as lines:
    documents = [json.loads(line)["text"] for line in lines]
encoding = bpe.train(documents[:50], 512)
parts = []
for document in documents:
    parts += [encoding.eot_token, *encoding.encode_ordinary(document)]
stream = np.array(parts, np.uint16)
print(len(documents), "documents,", stream.dtype, stream.shape)
starts = np.flatnonzero(stream == encoding.eot_token)
verdict("documents", len(starts) == len(documents), "each begins once")

# %% [markdown]
# The first part is set aside for *validation*: the model never trains on it.
# Its loss there, the [validation
# loss](../../book/glossary.md#term-validation-loss), says whether it has
# learned more than to repeat what it has seen. Which part? Any that is not
# chosen by its content; we take the first tokens, as llm.c does, Andrej
# Karpathy's GPT-2 in plain C, which this book re-creates. (The encoding has
# seen their text. That can make the tokens a little fewer; it shows the model
# none of their questions.)


# %% train and validation tags=["export"]
def split(tokens, validation=None):
    """Cut tokens into (train, validation); both are views.

    tokens: array of shape (N,). The first `validation` tokens are set aside;
    by default 32,768, as llm.c does, or a tenth of the tokens if that is
    less. Raises ValueError unless both parts hold a token.
    """
    if validation is None:
        validation = min(32768, len(tokens) // 10)
    if not 0 < validation < len(tokens):
        raise ValueError(
            f"split: validation must lie between 0 and the number of tokens, "
            f"{len(tokens)}, got {validation}"
        )
    return tokens[validation:], tokens[:validation]


# %% the library, split
training, validation = split(stream)
print(training.shape, validation.shape)
whole = np.array_equal(np.concatenate((validation, training)), stream)
sizes = [len(split(stream[:n])[1]) for n in (99, len(stream))]
verdict("validation", whole and sizes == [9, 32_768], "is the first part")

# %% [markdown]
# ## The data loader
#
# Count everything from 0, as Python does. Then window $j$ of the long row has
# at its place $t$
#
# $$
# \begin{aligned}
# \mathrm{token}_{j,t} &= \mathrm{row}_{\,jT + t} , \\
# \mathrm{target}_{j,t} &= \mathrm{row}_{\,jT + t + 1}
#    \qquad (0 \le t < T) .
# \end{aligned}
# \tag{1.3.1}
# $$
#
# The last target of a window is the first token of the next. So windows cost
# $T$ tokens each, and one token more is needed: the first of the row is
# nobody's target, hence the $-1$ in the count:
#
# $$
# \begin{aligned}
# \text{windows} &= \Bigl\lfloor \frac{\text{tokens} - 1}{T} \Bigr\rfloor , \\
# \text{batches} &= \Bigl\lfloor \frac{\text{windows}}{B} \Bigr\rfloor .
# \end{aligned}
# \tag{1.3.2}
# $$
#
# The brackets round down: what does not fill a window is left out, at most
# $T - 1$ questions, and at most $B - 1$ windows that do not fill a batch, of
# $T$ questions each; together at most $BT - 1$ questions. A large text comes in
# several rows, which we call [shards](../../book/glossary.md#term-shard). One
# pass over all of them is an [epoch](../../book/glossary.md#term-epoch). For
# training we shuffle, anew in each epoch: the order of the shards, and of the
# windows within a shard. If the windows of a batch were neighbours, they would
# speak of one matter, and the step would suit that more than the rest of the
# text.
#
# The shuffle must be the same wherever the program runs. NumPy promises that
# for its old generator, `RandomState`, and not for the new one.
#
# Two cells of helpers come first, folded: they refuse what cannot be right (in
# int32 the token $2^{40}$ would become 0 without a word, and a text must fill
# one batch), and they count and shuffle the windows. A shard may also be the
# path of a file, which [chapter 4.9](../4_practice/09_shards.ipynb) makes.


# %% check what is given tags=["exporti", "hide-input"]
def check_int(name, value, low, high):
    """Raise unless value is an integer in [low, high)."""
    if not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be int, got {type(value).__name__}")
    if not low <= value < high:
        raise ValueError(f"{name} must lie in [{low}, {high}), got {value}")


def _check_array(shard):
    """The number of tokens in an array, or an error when some are none."""
    tokens, name = np.asarray(shard), "DataLoader: tokens"
    if tokens.size:  # of no elements the type says nothing
        check_tokens(name, tokens, 2**31)
    if tokens.ndim != 1:
        raise ValueError(
            f"{name} must have one dimension, got shape {tokens.shape}"
        )
    return tokens.size


# %% shards and their order tags=["exporti", "hide-input"]
def _is_path(shard):
    return isinstance(shard, (str, os.PathLike))


def _open(shard, seq_len):
    """A shard's tokens: a path is opened, an array is taken as it is."""
    if _is_path(shard):
        from llmnb.formats.shard import ShardFile

        return ShardFile(shard, seq_len)
    return np.asarray(shard)


def _count_windows(shard, batch_size, seq_len):
    """The windows of (1.3.2), or an error when there is not one batch."""
    if _is_path(shard):
        from llmnb.formats.shard import shard_length

        count, name = shard_length(shard), shard
    else:
        count, name = _check_array(shard), "an array"
    if count < batch_size * seq_len + 1:
        raise ValueError(
            f"DataLoader: {name} has {count} tokens, one batch of "
            f"{batch_size} x {seq_len} needs {batch_size * seq_len + 1}"
        )
    return (count - 1) // seq_len


def _fill_order(order, key):
    """Write 0, 1, 2, ... into `order`, shuffled by `key` unless it is None."""
    order[:] = np.arange(len(order))
    if key is not None:
        np.random.RandomState(key).shuffle(order)


# %% [markdown]
# The order of the shards is drawn by a generator that starts from the *key*
# (seed, epoch), the shuffle of a shard by one that starts from (seed, epoch,
# number of the shard). No generator lives on from one to the next. So the
# place of the loader is three whole numbers: the epoch, the shard, counted in
# the order of that epoch, and the position, the batch within the shard. A run
# that was stopped goes on where it was when they are set again. The cell that
# keeps this place, as a dict called `state`, is folded too.


# %% what an epoch is made of tags=["exporti"]
class _Epochs:
    """Shards cut into windows, and the order of both in every epoch."""

    def __init__(self, shards, batch_size, seq_len, seed, shuffle):
        if isinstance(shards, (str, os.PathLike, np.ndarray)):
            shards = [shards]
        self.shards, self.seed, self.shuffle = list(shards), seed, shuffle
        if not self.shards:
            raise ValueError("DataLoader: the list of shards is empty")
        counts = [_count_windows(s, batch_size, seq_len) for s in self.shards]
        self.windows, self.batch_size = counts, batch_size
        self.seq_len = seq_len
        self.shard_order = np.empty(len(counts), np.int64)
        self.window_order = np.empty(max(counts), np.int64)
        self.entered = self.tokens = None

    def enter(self, epoch, shard):
        """Make ready the shard of this place; return its batches."""
        if self.entered != (epoch, shard):
            self.entered = None  # nor the old place, should this one fail
            key = [self.seed, epoch] if self.shuffle else None
            _fill_order(self.shard_order, key)
            k = int(self.shard_order[shard])
            key = key and [*key, k]
            _fill_order(self.window_order[: self.windows[k]], key)
            self.tokens = _open(self.shards[k], self.seq_len)
            self.batches = self.windows[k] // self.batch_size
            self.entered = epoch, shard  # last, when all else is there
        return self.batches


# %% a place that can be read and set tags=["exporti", "hide-input"]
PLACE = "epoch", "shard", "position"


class _Bookmark:
    """Where a loader stands among its epochs."""

    def reset(self):
        """Go back to the first batch of epoch 0."""
        self._place = 0, 0, 0

    def skip(self, count=1):
        """Move on by so many batches, unread."""
        for _ in range(count):
            epoch, shard, position = self._place
            position += 1
            if position == self._epochs.enter(epoch, shard):
                position, shard = 0, shard + 1
            if shard == len(self._epochs.shards):
                shard, epoch = 0, epoch + 1
            self._place = epoch, shard, position  # at once, or not at all

    @property
    def state(self):
        """Place of the next batch: epoch, shard of it, batch of that."""
        return dict(zip(PLACE, self._place, strict=True))

    @state.setter
    def state(self, state):
        if set(state) != set(PLACE):
            raise ValueError(
                f"DataLoader: state must have epoch, shard and position, "
                f"got {sorted(state)}"
            )
        epoch, shard, position = (state[name] for name in PLACE)
        check_int("DataLoader: epoch", epoch, 0, 2**32)
        check_int("DataLoader: shard", shard, 0, len(self._epochs.shards))
        batches = self._epochs.enter(epoch, shard)
        check_int("DataLoader: position", position, 0, batches)
        self._place = int(epoch), int(shard), int(position)


# %% the data loader tags=["export"]
class DataLoader(_Bookmark):
    """Batches of tokens and targets from shards, epoch after epoch.

    shards: a list of paths of shards and of integer arrays of shape (N,).
    Each must hold batch_size * seq_len + 1 tokens or more. With shuffle,
    every epoch takes the shards, and the windows of a shard, in an order
    drawn from seed; without, as they lie. The windows of a shard that do not
    fill a batch are left out of that epoch. Raises TypeError or ValueError,
    for tokens of an array that are not in [0, 2**31) too, and OSError when
    a shard has been cut short since.

    batches_per_epoch: batches in one epoch. shards: a list of what was
    given. state: the place of the next batch, a dict of ints; set it to go
    on from there. reset(): back to the start. skip(count): on by so many
    batches.
    """

    def __init__(self, shards, batch_size, seq_len, seed=0, shuffle=True):
        check_int("DataLoader: batch_size", batch_size, 1, 2**31)
        check_int("DataLoader: seq_len", seq_len, 1, 2**31)
        check_int("DataLoader: seed", seed, 0, 2**32)
        B, T = int(batch_size), int(seq_len)  # NumPy's, of 8 bits, overflow
        self._epochs = _Epochs(shards, B, T, seed, shuffle)
        self.shards, windows = self._epochs.shards, self._epochs.windows
        self.batches_per_epoch = sum(w // B for w in windows)
        self._tokens = np.empty((B, T), np.int32)
        self._targets = np.empty((B, T), np.int32)
        self.reset()

    def next_batch(self):
        """The next batch: (tokens, targets), int32, (batch_size, seq_len).

        Both arrays are the loader's own and are overwritten by the next
        call: nothing is allocated at a step. Copy what you want to keep.
        """
        (epoch, shard, position), (B, T) = self._place, self._tokens.shape
        self._epochs.enter(epoch, shard)
        first = position * B
        for b, j in enumerate(self._epochs.window_order[first : first + B]):
            window = self._epochs.tokens[j * T : j * T + T + 1]
            self._tokens[b] = window[:-1]  # (1.3.1)
            self._targets[b] = window[1:]
        self.skip()
        return self._tokens, self._targets


# %% [markdown]
# A first batch without shuffling, $B = 2$ and $T = 6$, as text:

# %% a first batch
loader = DataLoader([stream], batch_size=2, seq_len=6, shuffle=False)
inputs, targets = loader.next_batch()
print(inputs.dtype, inputs.shape, targets.shape)
for b in range(2):
    print([encoding.decode([i]) for i in inputs[b]])
    print([encoding.decode([i]) for i in targets[b]])

# %% [markdown]
# To see the order we feed numbers instead of text: with tokens 0, 1, 2, ...
# the first token of a row, divided by $T$, says which window it is.


# %% which window is read when
def visits(loader, T, batches):
    rows = [loader.next_batch()[0][:, 0] // T for _ in range(batches)]
    return np.array(rows)


numbers = np.arange(24 * 4 + 1)
plain = DataLoader([numbers], 4, 4, shuffle=False)
mixed = DataLoader([numbers], 4, 4, seed=1)
epochs = [visits(loader, 4, 6) for loader in (plain, mixed, mixed)]
print(epochs[0][0], epochs[1][0], epochs[2][0])
verdict("no shuffle", [*epochs[0].flat] == [*range(24)], "as they lie")

# %% the windows, drawn tags=["hide-input"]
from matplotlib.colors import ListedColormap

names = ["blue", "orange", "green", "purple", "yellow", "grey"]
colours = ListedColormap([PALETTE[name] for name in names])
titles = ["no shuffle, any epoch", "shuffled, epoch 0", "shuffled, epoch 1"]
fig, axes = plt.subplots(3, 1, figsize=(8, 2.9), dpi=100)
for ax, title, rows in zip(axes, titles, epochs, strict=True):
    batch_of = np.empty(24, int)
    for batch, row in enumerate(rows):
        batch_of[row] = batch
    ax.pcolormesh(batch_of[None], cmap=colours, edgecolor="white")
    for w in range(24):
        ink = "white" if batch_of[w] < 4 else PALETTE["ink"]
        ax.text(w + 0.5, 0.5, batch_of[w], ha="center", va="center", color=ink)
    ax.set_title(title, loc="left", size=10)
    ax.axis("off")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.3.3. The 24 windows of a shard from left to right; number and
# colour say in which of the six batches of an epoch a window is read. Without
# shuffling a batch is four neighbours. Shuffled, its windows come from all
# over the shard, in another order each epoch; each window is read once.*
#
# ### Proof
#
# Three shards of different length, whose windows fill their batches. In every
# epoch each window must be read once, its tokens in order and its targets one
# token on; the order must differ between epochs; and a second loader that is
# given the state of the first must go on with the same batches.

# %% each window once tags=["hide-input"]
parts = [np.arange(0, 121), np.arange(500, 581), np.arange(900, 1101)]
loader = DataLoader(parts, batch_size=4, seq_len=5, seed=11)
orders = []
for _ in range(3):
    rows = []
    for _ in range(loader.batches_per_epoch):
        x, y = loader.next_batch()
        right = x[:, :1] + np.arange(5)  # the tokens count 0, 1, 2, ...
        fits = np.array_equal(x, right) and np.array_equal(y, right + 1)
        rows += x[:, 0].tolist() if fits else [None]
    orders.append(rows)
every = [n for part in parts for n in part[:-1:5].tolist()]
once = all(sorted(rows) == every for rows in orders)
verdict("windows", once, "each once an epoch")
differ = len({tuple(rows) for rows in orders}) == 3
verdict("epochs", differ, "differ in order")

# %% stop and go on
for _ in range(7):
    loader.next_batch()
second = DataLoader(parts, batch_size=4, seq_len=5, seed=11)
second.state = loader.state
print(second.state, "of", loader.batches_per_epoch, "batches an epoch")
third = DataLoader(parts, batch_size=4, seq_len=5, seed=11)
third.skip(3 * third.batches_per_epoch + 7)
verdict("skipped", third.state == loader.state, "as far as was read")
same = all(
    np.array_equal(loader.next_batch(), second.next_batch()) for _ in range(50)
)
verdict("resumed", same, "50 batches are the same")

# %% [markdown]
# A loader that drew its windows at random, each time anew, would be shorter to
# write, and would see some windows twice and others never. Of $n$ windows, $n$
# draws all miss a given one with probability $(1 - 1/n)^n$, near $1/e$: about
# 37 of 100 are never read, or 29 of the 80 windows here. The first verdict
# catches it:

# %% windows drawn anew
rng = np.random.RandomState(0)
drawn = sorted(every[i] for i in rng.randint(len(every), size=len(every)))
verdict("drawn anew", drawn != every, "is caught")
print(len(set(drawn)), "of", len(every), "windows seen")

# %% [markdown]
# ## Take away
#
# - A text is one row of tokens, each document with `<|endoftext|>` before it.
#   The first part of the row is never trained on.
# - A window of $T$ tokens asks $T$ questions, and its targets are the tokens
#   one further on.
# - What is shuffled is drawn from the seed, the epoch and the shard's number,
#   so epoch, shard and position say where a run stands.
#
# ## Design note
#
# What should be shuffled? llm.c's loader shuffles the order of the *batches*
# in a shard: each batch is one contiguous stretch of $BT$ tokens. That needs
# an order $B$ times shorter. We shuffle *windows*, so the rows of a batch come
# from $B$ places. On a small text the difference matters: with $B = 16$ and $T
# = 128$ a contiguous batch would often be a single Python module, and the loss
# would swing with the module.
#
# ## Exercises
#
# **1** (★). Write `batches(tokens, B, T)`, the number of batches in a shard of
# so many tokens, without building a loader.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# A window needs its $T$ tokens and one more for the last target, and the
# windows share these borders: that is (1.3.2). A batch takes $B$ windows.
# :::


# %% exercise 1, the function tags=["hide-cell"]
def batches(tokens, B, T):
    return (tokens - 1) // T // B  # (1.3.2)


# %% exercise 1, checked
cases = [(13, 2, 6), (25, 2, 6), (24, 2, 6), (1000, 3, 7), (65, 1, 64)]
got = [batches(*case) for case in cases]
want = [
    DataLoader([np.arange(n)], B, T).batches_per_epoch for n, B, T in cases
]
verdict("exercise 1", got == want, f"{got}")

# %% [markdown]
# **2** (★★). How many tokens of a text are never a target in an epoch, and
# which? Write `never_asked(tokens, B, T)` for one shard without shuffling, and
# check it with a loader.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# The first token is no target, since nothing comes before it. The batches ask
# $BT \cdot \text{batches}$ questions, and the targets of these are the tokens
# behind the first. All other tokens are never asked for: the first, and those
# at the end. When the windows are shuffled, those that fill no batch are
# others in each epoch; the last questions, fewer than $T$, which fill no
# window, are never asked.
# :::


# %% exercise 2, the function tags=["hide-cell"]
def never_asked(tokens, B, T):
    return tokens - batches(tokens, B, T) * B * T


# %% exercise 2, checked
asked = DataLoader([np.arange(1000)], 3, 7, shuffle=False)
seen = {
    int(y)
    for _ in range(asked.batches_per_epoch)
    for y in asked.next_batch()[1].flat
}
number = 1000 - never_asked(1000, 3, 7)
same = seen == set(range(1, 1 + number))
verdict("exercise 2", same, "all but the first and the last")

# %% [markdown]
# ## Further reading
#
# - [llm.c](https://github.com/karpathy/llm.c): `llmc/dataloader.h`, the loader
#   that shuffles batches.
# - Léon Bottou, Frank Curtis and Jorge Nocedal, [Optimization Methods for
#   Large-Scale Machine Learning](https://arxiv.org/abs/1606.04838), 2018: read
#   section 3 for what a step owes to the batch it was computed from.
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.3")
