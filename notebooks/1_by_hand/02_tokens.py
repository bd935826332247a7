# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       text.tokenizer: "Byte-pair encoding: learnt, kept in a file, read as tiktoken's."
#       text.reader: 'Text from files that strangers send: packed, encoded, broken.'
#       text.corpus: "Texts to train on, found, downloaded and kept."
#       text.data: "Shards of tokens, and the batches that are read from them."
# ---

# %% [markdown]
# # Turn text into tokens
#
# > Byte-level BPE trained from scratch, the text to train on, and the shards
# > and batches that bring tokens to the model.

# %% [markdown]
# ## Where we are
#
# GPT-2 does not read letters. It reads whole numbers below a limit $V$, and
# it predicts the next number from those before it. Such a number is a
# **token**, and $V$ is the size of the **vocabulary**. This chapter makes the
# first two boxes of the diagram: from text to tokens, and from tokens to the
# arrays of shape $(B, T)$ that a training step takes.

# %% where we are
from llmnb.book.diagram import PALETTE, gpt2_diagram

gpt2_diagram(lit="tokens")

# %% [markdown]
# *Figure 1.2.1. GPT-2's forward pass with this chapter's boxes lit: text enters
# at the top left and becomes tokens before any arithmetic begins.*
#
# At the end you can
#
# - train a byte-level BPE (byte-pair encoding) by hand on one line of text and
#   say why each merge was chosen;
# - say why the fast training finds the same merges as the slow one, and what
#   each of them costs;
# - encode and decode any sequence of bytes;
# - read the header of a shard, a file of tokens, byte by byte;
# - read a compressed file from a stranger without trusting its sizes;
# - say which windows the next batch holds, also after a restart.
#
# You need the letters $B$, $T$ and $V$ from [chapter 1.4](04_gpt2.ipynb).

# %% [markdown]
# ## Setup

# %% setup
import os
import random
import tempfile
import time

import matplotlib.pyplot as plt

from llmnb.timing import fastest, machine
from llmnb.book.verify import verdict

# %% [markdown]
# ## By hand
#
# ### From characters to bytes
#
# A Python string is a sequence of Unicode characters, and Unicode has more
# than 150,000 of them. A vocabulary with a number for each would spend most
# of its entries on characters that the training text never shows.
#
# UTF-8 writes each character as one to four **bytes**, numbers from 0 to 255.
# So 256 numbers are enough for every text there is. The first 128 characters,
# which English and Python code consist of, take one byte each.

# %% characters and their bytes
for char in "aé€🙂":
    code, raw = f"U+{ord(char):04X}", char.encode("utf-8")
    print(f"{code:<8} {len(raw)} byte(s): {list(raw)}")

# %% [markdown]
# Bytes alone make a complete vocabulary with $V = 256$. Its fault is the
# length of the sequences: one token a byte. A model of $T$ positions then
# sees $T$ bytes of the past, and [attention](08_attention.ipynb) compares
# every position with all those before it. Longer tokens let the same $T$
# reach further back.
#
# ### Merging by hand
#
# **Byte-pair encoding** (BPE) starts from bytes and gives the most frequent
# pair of neighbours a token of its own, again and again. Take one line:
#
# > hush, the rushes brush the thrush
#
# First we cut it into words, each with the space before it, for a merge must
# not reach from one word into the next:
#
# `hush` `,` `␣the` `␣rushes` `␣brush` `␣the` `␣thrush`
#
# Now count neighbours within the words. `us` and `sh` stand in four of them,
# `␣t`, `th`, `he` and `ru` in three. Two pairs share the first place; we take
# the one whose first byte is lower, and `s` (115) comes before `u` (117).
#
# | merge | pair | count | new token | the words now |
# |---|---|---|---|---|
# | 1 | `s` `h` | 4 | `sh` | `h·u·sh` `␣·r·u·sh·e·s` `␣·b·r·u·sh` ... |
# | 2 | `u` `sh` | 4 | `ush` | `h·ush` `␣·r·ush·e·s` `␣·b·r·ush` ... |
# | 3 | `␣` `t` | 3 | `␣t` | `␣t·h·e` `␣t·h·r·ush` ... |
# | 4 | `r` `ush` | 3 | `rush` | `␣·rush·e·s` `␣·b·rush` `␣t·h·rush` |
# | 5 | `␣t` `h` | 3 | `␣th` | `␣th·e` `␣th·rush` |
#
# In merges 3 to 5 the count is the same and the lower number decides again: a
# blank is 32, `r` is 114, and `␣t`, the third token after the bytes 0 to 255,
# is 258. Look at `he`: it stood in three words, and after merge 1 it is in
# two, since the `h` of `rushes` now belongs to `sh`. Counts change as we
# merge.

# %% [markdown]
# ## Train
#
# ### Cut the text into words
#
# GPT-2 cuts with one regular expression. An apostrophe ending (`'s`, `'ll`) is
# a piece; so is a run of letters, a run of digits, or a run of other signs,
# each with one space before it if there is one; so is a run of blanks, which
# leaves its last blank to the word that follows. Together the pieces are the
# text: nothing is dropped. We call a piece a **word**. The expression needs
# Unicode classes (`\p{L}`: any letter, `\p{N}`: any digit), which the `regex`
# package has and Python's own `re` has not; `tiktoken`, the library that we
# use for encoding, brings it along.

# %% imports of the tokenizer tags=["export"]
import base64
import heapq
import re
from collections import Counter
from pathlib import Path

import numpy as np
import regex
import tiktoken

from llmnb.files import read_small, replacing, what_is

# %% how a text is cut into words tags=["exporti"]
EOT = "<|endoftext|>"
WORDS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+"
    r"| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)

# %% words of two lines
line = "hush, the rushes brush the thrush"
print(regex.findall(WORDS, line))
print(regex.findall(WORDS, "It's   42 trees,\n\n  naïve ones"))

# %% [markdown]
# A merge never leaves a word, so all that training needs to know is which
# words there are and how often each stands in the text. Text repeats itself:
# the distinct words are far fewer than the words.


# %% count the words tags=["exporti"]
def _count_words(text):
    """How often each word stands in a text or an iterable of texts."""
    counts = Counter()
    for document in [text] if isinstance(text, str) else text:
        if not isinstance(document, str):
            kind = type(document).__name__
            raise TypeError(f"train: text must be str, got {kind}")
        counts.update(regex.findall(WORDS, document))
    return {word.encode("utf-8"): n for word, n in counts.items()}


# %% the words of our line
words = _count_words(line)
print(words)

# %% [markdown]
# ### The slow way, which is the definition
#
# Let word $w$ stand $c_w$ times in the text, as symbols $w_1 w_2 \dots$ that
# are bytes at first. The count of a pair is
#
# $$ n(a,b) = \sum_w c_w \, \#\{ i : w_i = a,\; w_{i+1} = b \} \tag{1.2.1} $$
#
# and the pair that gets the next token is the one with the largest count,
# the lowest numbers deciding a tie:
#
# $$ (a,b)^\ast = \arg\min_{(a,b)} \bigl(-n(a,b),\; a,\; b\bigr) \tag{1.2.2} $$
#
# The new token takes the next free number, from 256 up, and stands for the
# bytes of its parts, one after the other:
#
# $$ \mathrm{bytes}(k) = \mathrm{bytes}(a)\,\mathrm{bytes}(b) \tag{1.2.3} $$
#
# Then every occurrence of $a$ followed by $b$ becomes $k$, from left to right.
# The order matters when $a = b$: `aaa` becomes `aa·a`.


# %% the slow training
def replace(symbols, pair, new):
    out, i = [], 0
    while i < len(symbols):
        here = symbols[i : i + 2] == pair
        out.append(new if here else symbols[i])
        i += 2 if here else 1
    return tuple(out)


def learn_slowly(words, number, replace=replace):
    symbols, merges = {tuple(w): n for w, n in words.items()}, []
    for new in range(256, 256 + number):
        count = Counter()
        for word, n in symbols.items():
            for pair in zip(word, word[1:], strict=False):
                count[pair] += n  # (1.2.1)
        best = min(count, key=lambda p: (-count[p], p))  # (1.2.2)
        merges.append(best)
        symbols = {replace(w, best, new): n for w, n in symbols.items()}
    return merges


# %% [markdown]
# The five merges of the table, as numbers and as bytes:


# %% the five merges
def spell(merges):
    tokens = [bytes([i]) for i in range(256)]
    for a, b in merges:
        tokens.append(tokens[a] + tokens[b])  # (1.2.3)
    return tokens


slow = learn_slowly(words, 5)
print(slow)
print(spell(slow)[256:])

# %% [markdown]
# Each merge recounts every pair of every distinct word. With $S$ symbols in
# the distinct words and $M$ merges that is $O(MS)$ steps, nearly all of them
# spent on counting again what did not change.
#
# ### The fast way: change only what changes
#
# Look at one occurrence of the pair $(a,b)$ between its neighbours $h$ and
# $k$, in a word that stands $c_w$ times.

# %% draw pieces
BLUE, GREY, ORANGE = PALETTE["blue"], PALETTE["pale"], PALETTE["orange"]


def draw_pieces(ax, y, pieces, colours, width=1.0, size=11):
    x = 0.0
    for piece, colour in zip(pieces, colours, strict=True):
        w = width * len(piece)
        box = plt.Rectangle(
            (x + 0.05, y - 0.36), w - 0.1, 0.72, facecolor=colour,
            edgecolor=PALETTE["grey"],
        )  # fmt: skip
        ax.add_patch(box)
        ink = "white" if colour in (BLUE, ORANGE) else PALETTE["ink"]
        ax.text(x + w / 2, y, piece, ha="center", va="center",
                color=ink, size=size)  # fmt: skip
        x += w


# %% one merge drawn
fig, ax = plt.subplots(figsize=(8, 2.3), dpi=100)
draw_pieces(ax, 1.5, "habk", [GREY, BLUE, BLUE, GREY], width=1.2, size=14)
after = ["h", "ab", "k"]
draw_pieces(ax, 0.2, after, [GREY, ORANGE, GREY], width=1.2, size=14)
ax.text(5.2, 1.5, "(h,a)   (a,b)   (b,k)   fall by c", va="center", size=12)
ax.text(5.2, 0.2, "(h,ab)   (ab,k)   rise by c", va="center", size=12)
ax.annotate("", (2.4, 0.62), (2.4, 1.08), arrowprops={"arrowstyle": "-|>"})
ax.set(xlim=(-0.1, 9.6), ylim=(-0.4, 2.1))
ax.axis("off")
fig.subplots_adjust(0, 0, 1, 1)
plt.show()

# %% [markdown]
# *Figure 1.2.2. A merge at one place changes five counts and no others: three
# pairs lose this occurrence, two pairs gain it.*
#
# $$
# \begin{aligned}
# n(h,a) &\mathrel{-}= c_w, & n(b,k) &\mathrel{-}= c_w, \\
# n(h,ab) &\mathrel{+}= c_w, & n(ab,k) &\mathrel{+}= c_w, & n(a,b) &= 0
# \end{aligned}
# \tag{1.2.4}
# $$
#
# So we keep the counts, and for each pair a list of the places where it
# stands. The words lie end to end in one list, parted by $-1$, and each symbol
# knows the next and the previous one, so that taking one out moves nothing. A
# symbol that was merged into its left neighbour is marked $-2$. The list ends
# with $-1$, which Python's index $-1$ finds: the first symbol, too, has a
# border on its left.


# %% the words as linked symbols tags=["exporti"]
class _Symbols:
    """Words laid end to end as linked symbols, with their pairs counted."""

    def __init__(self, words):
        self.ids, self.weight = [], []
        for word, count in words.items():
            self.ids += [*word, -1]
            self.weight += [count] * len(word) + [0]
        self.next = [*range(1, len(self.ids)), 0]
        self.prev = [*range(-1, len(self.ids) - 1)]
        self.count, self.where = {}, {}
        for i in range(len(self.ids) - 1):
            self.add(i)

    def add(self, i):
        """Count the pair that begins at i and remember the place."""
        pair = a, b = self.ids[i], self.ids[self.next[i]]
        if a < 0 or b < 0:
            return None
        self.count[pair] = self.count.get(pair, 0) + self.weight[i]
        self.where.setdefault(pair, []).append(i)
        return pair

    def drop(self, i):
        """Uncount the pair that begins at i, if one does."""
        pair = a, b = self.ids[i], self.ids[self.next[i]]
        if a >= 0 and b >= 0:
            self.count[pair] -= self.weight[i]


# %% [markdown]
# `drop` leaves the place in its list. When the pair's turn comes we look
# whether it still stands there, and pass on if not. The places are visited in
# order, so that `aaa` becomes `aa·a` here too.


# %% merge one pair everywhere tags=["exporti"]
def _merge(symbols, pair, new):
    """Put `new` in place of `pair` everywhere; return the pairs it forms."""
    ids, following, before = symbols.ids, symbols.next, symbols.prev
    formed = set()
    for i in sorted(symbols.where.pop(pair)):
        j = following[i]
        if (ids[i], ids[j]) != pair:
            continue
        h, k = before[i], following[j]
        symbols.drop(h)
        symbols.drop(j)
        ids[i], ids[j] = new, -2
        following[i], before[k] = k, i
        formed |= {symbols.add(h), symbols.add(i)}
    del symbols.count[pair]
    return formed - {None}


# %% [markdown]
# The pair with the largest count comes from a **heap**, a list that yields
# its smallest entry in $O(\log n)$. Its entries are $(-n(a,b),\,(a,b))$,
# which is the order of (1.2.2). Counts of old pairs can only fall, so an entry
# may promise too much, never too little. When the promise at the top is
# false, we put the entry back with its true count; the first true one is the
# largest.


# %% the fast training tags=["exporti"]
def _best(heap, count):
    """Take the pair with the largest count from the heap, or None."""
    while heap:
        promise, pair = heapq.heappop(heap)
        if 0 < count[pair] == -promise:
            return pair
        if count[pair] > 0:
            heapq.heappush(heap, (-count[pair], pair))
    return None


def _learn(words, number):
    """At most `number` merges, as pairs of token numbers, in order."""
    symbols, merges = _Symbols(words), []
    heap = [(-n, pair) for pair, n in symbols.count.items()]
    heapq.heapify(heap)
    while len(merges) < number:
        pair = _best(heap, symbols.count)
        if pair is None:
            break
        for formed in _merge(symbols, pair, 256 + len(merges)):
            heapq.heappush(heap, (-symbols.count[formed], formed))
        merges.append(pair)
    return merges


# %% the same five merges
verdict("five merges", _learn(words, 5) == slow, "fast equals slow")

# %% [markdown]
# What does it cost? A merge at one place removes one symbol for good. There
# are $S$ symbols at the start, so there are fewer than $S$ such places **in
# the whole of the training, however many merges we ask for**. Each adds at
# most two places to the lists and makes at most two promises false. The
# whole costs $O(S \log S)$.
#
# One line proves little. Here are 200 small texts over few letters, made so
# that pairs overlap (`aaaa`) and counts tie.


# %% fast against slow
def random_text(rng, letters, longest):
    return "".join(rng.choices(letters, k=rng.randint(1, longest)))


def merges_agree(trials, replace=replace):
    rng = random.Random(1)
    for _ in range(trials):
        words = _count_words(random_text(rng, "aab. \n", 200))
        fast = _learn(words, 40)
        if fast != learn_slowly(words, len(fast), replace):
            return False
    return True


verdict("merges", merges_agree(200), "fast equals slow, 200 texts")

# %% [markdown]
# Can this check fail? Let the slow training replace from right to left, so
# that `aaa` becomes `a·aa`.


# %% from the wrong end
def replace_backwards(symbols, pair, new):
    return replace(symbols[::-1], pair[::-1], new)[::-1]


wrong = not merges_agree(200, replace_backwards)
verdict("right to left", wrong, "is caught")

# %% [markdown]
# ## Encode and decode
#
# Training leaves a list of tokens in the order in which they were made. A
# token's place in that list is its **rank**, and its rank is its number. The
# single bytes come first, with ranks 0 to 255.
#
# To encode a word, repeat the merges in the order of training: among all
# neighbours whose bytes together are a token, join those of lowest rank, the
# leftmost first, until none is left.
#
# $$
# i^\ast = \arg\min_i \bigl(\mathrm{rank}(p_i\,p_{i+1}),\; i\bigr) \tag{1.2.5}
# $$


# %% the encoder
def encode_word(word, ranks):
    parts = [bytes([b]) for b in word]
    while True:
        joined = [x + y for x, y in zip(parts, parts[1:], strict=False)]
        ranked = [(ranks[x], i) for i, x in enumerate(joined) if x in ranks]
        if not ranked:
            return [ranks[part] for part in parts]
        i = min(ranked)[1]  # (1.2.5)
        parts[i : i + 2] = [joined[i]]


def encode(text, ranks):
    out = []
    for word in regex.findall(WORDS, text):
        out += encode_word(word.encode("utf-8"), ranks)
    return out


ranks = {token: rank for rank, token in enumerate(spell(slow))}
print(encode("the thrush hushes", ranks))

# %% [markdown]
# Decoding is a table: the bytes of the tokens, one after the other. It undoes
# encoding whatever the merges are, because no merge changes a byte.
#
# Figure 1.2.3 follows one word through (1.2.5).


# %% one word, merge by merge
def stages(word, ranks):
    for limit in range(255, max(ranks.values()) + 1):
        known = {x: r for x, r in ranks.items() if r <= limit}
        names = {r: x for x, r in known.items()}
        parts = [names[i] for i in encode_word(word, known)]
        yield [p.decode("utf-8").replace(" ", "␣") for p in parts]


fig, ax = plt.subplots(figsize=(7, 3.6), dpi=100)
rows = list(stages(b" thrush", ranks))
for y, row in enumerate(rows):
    fresh = [len(p) > 1 and p not in rows[y - 1] for p in row]
    old = [BLUE if len(p) > 1 else GREY for p in row]
    colours = [ORANGE if f else o for f, o in zip(fresh, old, strict=True)]
    draw_pieces(ax, -y, row, colours)
    label = "bytes" if y == 0 else f"merge {y}"
    ax.text(-0.2, -y, label, ha="right", va="center", size=11)
ax.set(xlim=(-1.6, 7.2), ylim=(-len(rows) + 0.5, 0.5))
ax.axis("off")
fig.subplots_adjust(0, 0, 1, 1)
plt.show()

# %% [markdown]
# *Figure 1.2.3. The word ␣thrush through the five merges, a row a merge, the
# part just made in orange: seven bytes become two tokens, ␣th and rush.*
#
# ### Why looking at bytes is enough
#
# Training merges pairs of numbers; (1.2.5) asks whether the joined *bytes* are a
# token. Could `a·bc` be the token `abc` and `ab·c` something else? No. Take a
# stretch of a word whose two ends are still borders between parts after some
# number of merges. No merge so far has crossed these ends, so each merge did
# inside the stretch what it would have done had the stretch been a word of
# its own. How a stretch is divided at a given moment therefore depends on its
# bytes alone. When the token `abc` was made from `a·bc`, every stretch `abc`
# that was two parts was those two, and all of them were joined. Two facts
# follow: no two tokens have the same bytes, and joining two parts never forms
# a pair of lower rank that was left behind. So (1.2.5) repeats the training
# merge by merge.
#
# ### The encoding as an object
#
# `encode_word` looks at a word of $n$ bytes up to $n$ times. We leave
# the work to **tiktoken**, OpenAI's encoder, which does the same in
# compiled code. It wants the expression, the ranks, and the **special
# tokens**, which no text can produce. We have one, `<|endoftext|>`: it stands
# before each document and tells the model that what follows has nothing to do
# with what came before. It takes the last number, as in GPT-2.


# %% the encoding object tags=["exporti"]
def _encoding(name, tokens):
    """A tiktoken.Encoding of tokens in order of rank; EOT is among them,
    or comes after them."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    eot = ranks.pop(EOT.encode(), len(tokens))
    return tiktoken.Encoding(
        name, pat_str=WORDS, mergeable_ranks=ranks, special_tokens={EOT: eot}
    )


# %% bytes as tokens tags=["export"]
def byte():
    """The encoding without merges: 256 bytes and `<|endoftext|>`.

    Returns a tiktoken.Encoding with 257 tokens; a byte is its own number.
    """
    return _encoding("byte", [bytes([i]) for i in range(256)])


# %% train an encoding tags=["export"]
def train(text, vocab_size):
    """Train a byte-level BPE and return it as a tiktoken.Encoding.

    text: a str, or an iterable of str (documents). vocab_size counts the 256
    bytes, the merges and `<|endoftext|>`, which is the last token: from 257
    to 65,536, what a shard's uint16 can hold. The result depends on text and
    vocab_size alone. Raises ValueError when vocab_size is out of range or
    the text is too small to fill it, TypeError when the text is not str.
    """
    if not 257 <= vocab_size <= 65536:
        raise ValueError(
            f"train: vocab_size must lie in [257, 65536], got {vocab_size}"
        )
    tokens = [bytes([i]) for i in range(256)]
    for a, b in _learn(_count_words(text), vocab_size - 257):
        tokens.append(tokens[a] + tokens[b])
    if len(tokens) + 1 < vocab_size:
        raise ValueError(
            f"train: this text has pairs for a vocab_size of at most "
            f"{len(tokens) + 1}, got {vocab_size}"
        )
    return _encoding(f"bpe-{vocab_size}", tokens)


# %% [markdown]
# A passage to train on, the same on every machine, and the fourteen tokens
# that come first:

# %% a passage to train on
PASSAGE = """\
The harbour wakes before the town. Ropes creak, gulls argue over the wall,
and the first boats slide out past the lighthouse with their lamps still lit.
An old man counts them as they go. He has counted them for thirty years, and
he has never written a number down. "Seventeen," he says to the dog, and the
dog, who has heard larger numbers, goes back to sleep.

By noon the boats return. The man counts again. When the count is right he
walks home; when it is wrong he waits on the wall until it is. That's all he
does. Nobody asked him to, nobody pays him, and nobody in the harbour would
think of going out on a morning when he was not there to count them.
"""
enc = train(PASSAGE, 400)
tokens = [enc.decode_single_token_bytes(i) for i in range(enc.n_vocab)]
print(tokens[256:270])
print(tokens[-4:])

# %% [markdown]
# Common pairs of letters come first, and ` the` with its space is the third
# token already. The last merges make parts of words. Here is `tiktoken`'s
# answer for a sentence, cut into its parts:

# %% a sentence in tokens
sentence = "The dog counts the boats, and nobody asked."
ids = enc.encode_ordinary(sentence)
print("|".join(tokens[i].decode() for i in ids))
print(len(sentence), "bytes,", len(ids), "tokens")

# %% [markdown]
# ## Proof
#
# Three claims. Our encoder and `tiktoken` agree on any text; decoding undoes
# encoding for any text; and it does so for any bytes at all, whether they are
# UTF-8 or not. The texts are drawn at random from letters, blanks, digits,
# accents, Chinese characters and emoji.

# %% encode, decode
LETTERS = "aehnorst  .,'\n\t0123éñß中文字🙂🚢€" + PASSAGE[:120]
rng = random.Random(2)
ranks = {token: rank for rank, token in enumerate(tokens[:-1])}
texts = [random_text(rng, LETTERS, 80) for _ in range(500)]
raws = [rng.randbytes(rng.randint(1, 40)) for _ in range(500)]

same = all(encode(t, ranks) == enc.encode_ordinary(t) for t in texts)
verdict("encode", same, "ours equals tiktoken's")
back = all(enc.decode(enc.encode_ordinary(t)) == t for t in texts)
verdict("text", back, "decode(encode(x)) == x")
back = all(enc.decode_bytes(encode_word(r, ranks)) == r for r in raws)
verdict("bytes", back, "decode(encode(x)) == x")

# %% [markdown]
# A tempting encoder takes the longest token that the text begins with, and
# goes on behind it. It decodes to the same text, so the second claim would
# pass it; but it is not what the merges do, and a model trained on the tokens
# of one encoder would meet sequences from the other that it never saw. The
# first claim catches it.


# %% the greedy encoder
def encode_greedily(text, ranks):
    out, raw, longest = [], text.encode("utf-8"), max(map(len, ranks))
    while raw:
        sizes = range(min(longest, len(raw)), 0, -1)
        size = next(n for n in sizes if raw[:n] in ranks)
        out.append(ranks[raw[:size]])
        raw = raw[size:]
    return out


greedy = [encode_greedily(t, ranks) for t in texts]
exact = all(enc.decode(g) == t for g, t in zip(greedy, texts, strict=True))
verdict("greedy", exact, "decode(encode(x)) == x")
wrong = [enc.encode_ordinary(t) for t in texts] != greedy
verdict("greedy", wrong, "is caught by the first claim")

# %% [markdown]
# ### A million blanks
#
# A file may hold a million blanks in a row. The expression finds their end by
# trying: `\s+(?!\S)` takes all of them, remembers each as a place to go back
# to, and `tiktoken` gives up when it remembers a million. We need not ask. We
# know the word: it is the run without its last blank, or the whole run where
# the text ends. The expression never looks back, and what it looks at ahead of
# the run is a blank. So a very long run is taken out, its word goes to the
# merges as it is, and the text before it and the text behind the word are
# encoded apart.
#
# A run of $R$ blanks covers a place whose number is a multiple of $R$, so that
# looking at every $R$-th character finds it. Letters, digits and other signs
# need none of this: the end of their runs is found without going back.

# %% long runs of blanks tags=["exporti"]
SPACES = (  # all that is \s
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006"
    "\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
)
RUN = 1 << 16  # blanks in a row that the expression is spared


def _long_words(text):
    """Yield (start, end) of each word made of about RUN blanks or more."""
    end = 0
    for i in range(RUN - 1, len(text), RUN):
        if i < end or text[i] not in SPACES:
            continue
        head = text[max(end, i - RUN + 1) : i]
        start = i - len(head) + len(head.rstrip(SPACES))
        end = re.compile(f"[{SPACES}]*").match(text, i).end()
        if end - start >= RUN:
            yield start, end - (end < len(text))


# %% encode any text tags=["export"]
def encode_text(encoding, text, endoftext=False):
    """The tokens of a text, an array of shape (N,), uint32.

    encoding: a tiktoken.Encoding with GPT-2's expression. endoftext: take
    `<|endoftext|>` in the text as the token; else it is ordinary text. A
    run of a million blanks, which tiktoken refuses, has the tokens that its
    merges give.
    """
    parts, eot = [], np.array([encoding.eot_token], np.uint32)
    for part in text.split(EOT) if endoftext else [text]:
        place = 0
        for start, end in _long_words(part):
            parts.append(_encode_part(encoding, part[place:start]))
            # tiktoken's own way around the expression
            word = encoding._encode_single_piece(part[start:end])
            parts.append(np.array(word, np.uint32))
            place = end
        parts += [_encode_part(encoding, part[place:]), eot]
    return np.concatenate(parts[:-1])


def _encode_part(encoding, text):
    try:
        return encoding.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:  # half a character becomes U+FFFD
        return np.array(encoding.encode_ordinary(text), np.uint32)


# %% [markdown]
# Runs short enough for `tiktoken` prove it: with a small $R$, texts full of
# blanks are taken apart at every run, and their tokens must stay as they are.
# Taking the last blank too is caught.


# %% runs taken apart
def runs_agree():
    rng = random.Random(4)
    texts = [random_text(rng, "ab. \n\t\u3000'   ", 90) for _ in range(500)]
    return all(
        encode_text(enc, x).tolist() == enc.encode_ordinary(x) for x in texts
    )


kept, RUN, right = RUN, 2, _long_words
verdict("runs", runs_agree(), "tokens of the whole")


def _long_words(text):
    return [(a, min(b + 1, len(text))) for a, b in right(text)]


verdict("one blank more", not runs_agree(), "is caught")
RUN, _long_words = kept, right
blanks = " " * 1_000_000 + "The dog" + "\n" * 1_000_000
ids = encode_text(enc, blanks).tolist()
verdict("two million", enc.decode(ids) == blanks, "decode(encode(x)) == x")

# %% [markdown]
# ## Keep it in a file
#
# `tiktoken` keeps ranks in a text file: a line for each token, its bytes in
# base64 (64 printable characters stand for any bytes), a space, its rank. The
# file holds neither the expression nor the special token; ours are always the
# same. It is written by `replacing` of [chapter 1.4](04_gpt2.ipynb), so that a
# reader never meets half a vocabulary.


# %% save an encoding tags=["export"]
def check_special(encoding):
    """Raise ValueError unless the one special token is `<|endoftext|>`."""
    if encoding.special_tokens_set != {EOT}:
        raise ValueError(
            f"save: the one special token must be {EOT}, by custom with the "
            f"last rank, got {sorted(encoding.special_tokens_set)}"
        )


def save(encoding, path):
    """Write an encoding's tokens as a tiktoken rank file.

    encoding: a tiktoken.Encoding that `check_special` accepts. The special
    token is left out where it is the last of all, as it mostly is. The file
    is written beside `path` and renamed into place.
    """
    check_special(encoding)
    last, lines = encoding.n_vocab - 1, []
    for rank in range(last + (encoding.eot_token < last)):
        token = base64.b64encode(encoding.decode_single_token_bytes(rank))
        lines.append(b"%s %d\n" % (token, rank))
    with replacing(path) as file:
        file.write(b"".join(lines))


# %% [markdown]
# A file from elsewhere may be damaged, and a damaged vocabulary that loads
# would train a model on nonsense. So each line is checked, and then the whole:
# every rank from 0 up is there once, every token once, and all 256 bytes.


# %% read one line of a rank file tags=["exporti"]
def _read_line(where, line):
    """Token and rank of a line, or a ValueError that names the place."""
    fields = line.split()
    if len(fields) != 2:
        raise ValueError(
            f"{where}: a line must be a token and its rank, got {line!r:.99}"
        )
    try:
        token = base64.b64decode(fields[0], validate=True)
    except ValueError:
        raise ValueError(
            f"{where}: the token must be base64, got {fields[0]!r:.99}"
        ) from None
    if not (token and re.fullmatch("[0-9]{1,9}", fields[1])):
        raise ValueError(
            f"{where}: the rank must be a whole number and the token not "
            f"empty, got {line!r:.99}"
        )
    return token, int(fields[1])


# %% load an encoding tags=["export"]
def load(path):
    """Read a tiktoken rank file into a tiktoken.Encoding.

    The expression is GPT-2's and `<|endoftext|>`, unless it is in the file,
    takes the rank after the last. Raises ValueError, naming the file and the
    line, for a line that is no token and rank, a rank or a token that comes
    twice, a gap in the ranks or a byte that is missing, and for a file of
    more than 16 MiB.
    """
    path = Path(path)
    raw = read_small(path, 1 << 24)
    try:
        tokens = _ranked(path, raw.decode("ascii", "backslashreplace"))
    except ValueError as error:
        what = what_is(path)
        raise ValueError(str(error) + (what and f": {what}")) from None
    return _encoding(path.stem, tokens)


def _ranked(path, text):
    """The tokens of a rank file, in order of rank."""
    by_rank, seen = {}, set()
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            token, rank = _read_line(f"{path}:{number}", line)
            if rank in by_rank:
                raise ValueError(f"{path}:{number}: rank {rank} comes twice")
            if token in seen:
                raise ValueError(f"{path}:{number}: {token} comes twice")
            by_rank[rank] = token
            seen.add(token)
    return _check_ranks(path, by_rank, seen)


# %% check the ranks tags=["exporti"]
def _check_ranks(path, by_rank, seen):
    """The tokens in order of rank, once the file is known to be whole."""
    for byte in range(256):
        if bytes([byte]) not in seen:
            raise ValueError(f"{path}: no token for the byte {byte}")
    for rank in range(len(by_rank)):
        if rank not in by_rank:
            raise ValueError(f"{path}: no token of rank {rank}")
    return [by_rank[rank] for rank in range(len(by_rank))]


# %% save and load
scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
folder = Path(scratch.name)
save(enc, folder / "harbour.tiktoken")
again = load(folder / "harbour.tiktoken")
kept = all(again.encode_ordinary(t) == enc.encode_ordinary(t) for t in texts)
verdict("load(save(enc))", kept, "encodes as enc does")
lines = (folder / "harbour.tiktoken").read_text().splitlines()
print(lines[97], lines[256], lines[-1], sep="\n")


# %% [markdown]
# `YQ==` is the letter `a`, byte 97. Some ways to damage the file:


# %% damaged files
def complaint(function, *args):
    try:
        function(*args)
    except (ValueError, TypeError, OSError) as error:
        return str(error).replace(f"{folder}{os.sep}", "")
    raise AssertionError("no complaint")


damages = [lines[:5] + lines[6:], [*lines, lines[9]], [*lines, "a? 399"]]
for damaged in [*damages, lines[:300] + lines[301:]]:
    (folder / "bad.tiktoken").write_text("\n".join(damaged))
    print(complaint(load, folder / "bad.tiktoken"))

# %% [markdown]
# ## GPT-2's own encoding
#
# OpenAI trained GPT-2 on web pages that Reddit users had linked to. Its
# encoding has 50,000 merges, which with 256 bytes and `<|endoftext|>` make
# 50,257 tokens. `tiktoken` knows where the merges are, fetches them once
# (1.5 MB) and checks their hashes. To use GPT-2's trained weights you need
# GPT-2's tokens, since row $k$ of its token table belongs to token $k$.


# %% GPT-2's encoding tags=["export"]
def gpt2():
    """GPT-2's encoding: 50,257 tokens, `<|endoftext|>` is number 50,256.

    tiktoken downloads it once and keeps it in the folder that
    TIKTOKEN_CACHE_DIR names, or in a temporary one. Raises ConnectionError
    when the files are neither there nor to be had.
    """
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:
        raise ConnectionError(
            "gpt2: tiktoken cannot fetch GPT-2's vocabulary; connect to the "
            "internet once, or name a folder that holds it in "
            "TIKTOKEN_CACHE_DIR"
        ) from error


# %% GPT-2's tokens tags=["nbval-ignore-output"]
try:
    big = gpt2()
    for sentence in ("The dog counts the boats.", "x = np.zeros((4, 4))"):
        parts = [big.decode([i]) for i in big.encode_ordinary(sentence)]
        print(len(sentence), "bytes:", "|".join(parts))
except ConnectionError as error:
    print(error)

# %% [markdown]
# Words common on the web are one token each. Source code, rare among those
# pages, comes out in smaller parts.
#
# ## Read what strangers send
#
# A text comes as a file of its own or as a line of **JSON lines** (a JSON object
# a line, the text in one of its fields), plain or compressed with gzip or zstd.
# Each can be damaged, and some are made to do damage: a *bomb* is a compressed
# file of kilobytes that unpacks to gigabytes. Four rules keep us safe.
#
# - Only a regular file is opened. A pipe that nobody writes to would be waited
#   for, and some devices never end.
# - Nothing is unpacked whole. We ask for a block of a given size, use it, and
#   ask again; a bomb is then a long text and no more.
# - A line has at most 16 MB. JSON of that size can take half a gigabyte once
#   it is Python objects, and longer documents belong in files of their own.
# - What is wrong is said with the place: the file, and the line or the byte.
#
# gzip is in the standard library, and its reader returns as many bytes as are
# asked for. The zstandard package has two readers. One is bounded, but takes a
# file that ends early for a file that ends. The other knows the end of a frame
# but returns all that its input yields. A frame is made of blocks of at most
# 128 KB, and each takes four bytes of input or more, so that $n$ bytes of
# input yield at most
#
# $$ \lfloor n / 4 \rfloor \cdot 128\ \text{KB} \tag{1.2.6} $$
#
# and 1,024 bytes at a time at most 32 MB. We take the second reader and feed
# it so. Its window, the part of the output that later blocks may refer to, is
# limited to 128 MB. A header may ask for more, up to what `zstd --long=31`
# makes, 2 GB; that file is whole, and we say so, with what to do.

# %% imports of the reader tags=["export"] module="text.reader"
import codecs
import contextlib
import gzip
import io
import json
import os
import re
import tokenize
import zlib
from collections import Counter
from pathlib import Path

from llmnb.text.tokenizer import EOT

# %% zstd, read in small bites tags=["exporti"] module="text.reader"
WINDOW = 1 << 27  # bytes that a zstd frame may refer back to, at most


class _Zstd(io.RawIOBase):
    """The bytes of a zstd file; EOFError when it is damaged."""

    def __init__(self, raw):
        self.raw, self.frame, self.head = raw, None, b""
        self.packed, self.ready = b"", memoryview(b"")

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.ready:
            self.packed = self.packed or self.raw.read(1024)  # (1.2.6)
            if not self.packed and self.frame:
                raise EOFError("the file ends within a zstd frame")
            if not self.packed:
                return 0
            self._unpack()
        count = min(len(buffer), len(self.ready))
        buffer[:count] = self.ready[:count]
        self.ready = self.ready[count:]
        return count

    def _unpack(self):
        z = _zstandard()
        if self.frame is None:
            window = z.ZstdDecompressor(max_window_size=WINDOW)
            self.frame, self.head = window.decompressobj(), b""
        self.head = (self.head + self.packed)[:18]  # a header has no more
        try:
            self.ready = memoryview(self.frame.decompress(self.packed))
        except z.ZstdError as error:
            self._check_window()
            raise EOFError(f"{error}") from None
        self.packed = b""
        if self.frame.eof:
            self.packed, self.frame = self.frame.unused_data, None

    def _check_window(self):
        z, window = _zstandard(), 0
        with contextlib.suppress(z.ZstdError):
            window = z.get_frame_parameters(self.head).window_size
        if window > WINDOW:
            raise ValueError(
                f"{self.raw.name} has a zstd window of {window:,} bytes, at "
                f"most {WINDOW:,} are taken: unpack it with `zstd -d "
                "--long=31`, and pack it again with no more than --long=27"
            ) from None


# %% zstd, if it is there tags=["exporti"] module="text.reader"
def _zstandard():
    try:
        import zstandard
    except ImportError:
        raise ValueError(
            "to read .zst files install the zstandard package: "
            "pip install 'llmnb[zstd]'"
        ) from None
    return zstandard


# %% open a file tags=["export"] module="text.reader"
@contextlib.contextmanager
def open_stream(path):
    """Open a file for reading bytes, unpacked if it ends in .gz or .zst.

    Gives (stream, raw): the bytes, and the file itself, whose tell() says
    how much of it is read. Raises ValueError, naming the file and the byte,
    when it is damaged or ends early, when it is no regular file, and when
    zstandard is missing.
    """
    suffix = Path(path).suffix.lower()
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} must be a regular file")
    with open(path, "rb") as raw:
        stream = raw
        if suffix == ".gz":
            stream = gzip.GzipFile(fileobj=raw)
        elif suffix == ".zst":
            _zstandard()
            stream = io.BufferedReader(_Zstd(raw), 1 << 17)
        try:
            yield stream, raw
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(
                f"{path}: damaged near byte {raw.tell():,}: {error}"
            ) from None


# %% [markdown]
# Text is decoded block by block. The decoder keeps the bytes of a character
# that a block cuts in two, and another one around it makes every line end
# `\n`, whatever the system that wrote it.
#
# A Python source may name another encoding than UTF-8 in its first lines. Not
# every name will do: Python's codecs include `rot13`, which decodes no bytes,
# `undefined`, which always fails, and `punycode`, whose time is quadratic. So
# there is a list of those that are encodings of text files.


# %% text, block by block tags=["export"] module="text.reader"
class NotText(ValueError):
    """A file that holds something else than text."""


BLOCK = 1 << 20  # bytes that are read at once


def text_blocks(path, stream):
    """Yield the text of a stream, decoded in blocks.

    path: of its file, a Path, whose name and first lines say how it is
    encoded. Raises NotText, naming the file and the byte.
    """
    decoder = codecs.getincrementaldecoder(_codec_of(path))()
    decoder, seen = io.IncrementalNewlineDecoder(decoder, True), 0
    block = b"-"
    while block:
        block = stream.read(BLOCK)
        seen += len(block)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            place = seen - len(error.object) + error.start
            raise NotText(
                f"{path} must be UTF-8 text, got "
                f"{error.object[error.start]:#04x} at byte {place:,}"
            ) from None
        if "\0" in text:
            raise NotText(f"{path} must be UTF-8 text, got a zero byte")
        yield text


def read_text(path):
    """The whole text of a file, plain or packed; NotText when it has none."""
    with open_stream(path) as (stream, _):
        return "".join(text_blocks(path, stream))


# %% the encoding of a file tags=["exporti"] module="text.reader"
CODECS = re.compile(
    "utf-8(-sig)?|ascii|iso8859-[0-9]+|cp(125[0-8]|437|850|866|932|949|950)"
    "|koi8-[rtu]|euc_(jp|kr)|shift_jis|gb(k|2312|18030)|big5"
)


def _codec_of(path):
    """UTF-8, or what the first lines of a .py file declare."""
    if path.suffix != ".py":
        return "utf-8-sig"
    with open(path, "rb") as file:
        try:
            name = tokenize.detect_encoding(lambda: file.readline(1 << 12))[0]
        except SyntaxError:
            raise NotText(f"{path} must be UTF-8 text") from None
    name = codecs.lookup(name).name
    if not CODECS.fullmatch(name):
        raise NotText(f"{path} must be UTF-8 text, it declares {name}")
    return name


# %% the record in a line tags=["export"] module="text.reader"
LINE = 1 << 24  # bytes of a line of JSON, at most


def read_record(where, line):
    """The JSON object in a line of bytes, a dict.

    Raises ValueError, naming `where`, for anything else, and for a line of
    more than 16 MB.
    """
    if len(line) > LINE:
        raise ValueError(f"{where}: a line must have at most {LINE:,} bytes")
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: must be UTF-8, got {line[error.start]:#04x} at byte "
            f"{error.start:,} of the line"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: must be JSON: {error}") from None
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise ValueError(f"{where}: must be a JSON object, got {kind}")
    return record


# %% the text of a record tags=["export"] module="text.reader"
def text_of(where, record, field):
    """The text in a field of a record, or ValueError, naming `where`."""
    if field not in record:
        got = ", ".join(repr(name[:30]) for name in [*record][:9])
        raise ValueError(f"{where}: must have a field {field!r}, got {got}")
    return check_text(f"{where}: {field!r}", record[field])


def check_text(where, text):
    """A text, or ValueError when it is none or has half a character."""
    if not isinstance(text, str):
        kind = type(text).__name__
        raise ValueError(f"{where} must be text, got {kind}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} must be Unicode text, got half a character, "
            f"U+{ord(text[error.start]):04X}, at {error.start:,}"
        ) from None
    return text


# %% [markdown]
# A file of empty lines is a bomb too: three hundred megabytes of `\n` are as
# many lines, and taking each of them costs a minute. A run of blank lines is
# counted where it lies in the reader's buffer.


# %% lines of a stream tags=["export"] module="text.reader"
def read_lines(path, stream):
    """Yield (where, line) for the lines of a stream that are not blank.

    where: "path:number", for messages. Of a line of more than 16 MB only
    the beginning is given, which `read_record` refuses.
    """
    number = 0
    while line := stream.readline(LINE + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip() or len(line) > LINE:
            yield f"{path}:{number}", line
            while len(line) > LINE and line[-1:] != b"\n":
                line = stream.readline(LINE + 1)
        else:
            number += _skip_blank_lines(stream)


def _skip_blank_lines(stream):
    """Read on to the first line that is not blank; returns how many are."""
    count, end = 0, 1
    while end:
        ahead = stream.peek(1)
        blank = len(ahead) - len(ahead.lstrip())
        end = ahead.rfind(b"\n", 0, blank) + 1
        count += ahead.count(b"\n", 0, end)
        stream.read(end)
    return count


# %% [markdown]
# In a folder there is more than text. What cannot be read is passed over, and
# so is a bad record of JSON lines if that is asked for; but it is counted, for
# a corpus that lost half of its files should not look like one that lost none.
# Something else is worth a word. `<|endoftext|>` in a text is ordinary text, as
# the special tokens should come from us alone; yet some corpora part their
# documents with it. So we count these too, and leave the choice to you.


# %% what was passed over tags=["export"] module="text.reader"
class Tally:
    """Counts what is passed over in reading, and `<|endoftext|>`."""

    def __init__(self):
        self._counts = {}

    def note(self, what, where, count=1):
        """Note `count` of `what` in a file, instead of an earlier count."""
        self._counts[what, str(where)] = count

    def words(self, endoftext=False):
        """What there is to say, behind a semicolon, or "".

        endoftext: whether `<|endoftext|>` was taken as the token.
        """
        sums = Counter()
        for (what, _), count in self._counts.items():
            sums[what] += count
        times, words = sums.pop(EOT, 0), ""
        if sums:
            each = [f"{what} {n:,}" for what, n in sorted(sums.items())]
            words = f"; passed over: {', '.join(each)}"
        if times and not endoftext:
            words += (
                f"; {EOT} as ordinary text: {times:,} (--endoftext takes it "
                "as the token)"
            )
        return words


@contextlib.contextmanager
def passing_over(path, tally):
    """Note a file that has no text or cannot be read, and go on."""
    try:
        yield
    except NotText:
        tally.note("not text", path)
    except (FileNotFoundError, PermissionError):
        tally.note("not readable", path)


# %% records of JSON lines tags=["export"] module="text.reader"
def is_json_lines(path):
    """Whether a file has JSON lines, by its name."""
    return bool(re.search(r"\.jsonl(\.gz|\.zst)?$", Path(path).name.lower()))


def read_records(path, stream, take, skip_bad=False, tally=None):
    """Yield (where, take(where, record)) for a stream of JSON lines.

    take: a function that raises ValueError for a record that is not as it
    should be. skip_bad: pass over bad lines and note them in the `Tally`;
    else ValueError is raised, naming the line.
    """
    bad = 0
    for where, line in read_lines(path, stream):
        try:
            found = take(where, read_record(where, line))
        except ValueError as error:
            if not skip_bad:
                how = "(--skip-bad passes over bad records)"
                raise ValueError(f"{error} {how}") from None
            bad += 1
            tally.note("bad records", path, bad)
        else:
            yield where, found


# %% [markdown]
# ## A text to train on
#
# We need megabytes of text, preferably without a network. Your Python has
# them: the source of its standard library and the manual pages that `help()`
# shows. We leave out tests, installed packages, and tables that a program has
# written.


# %% imports of the corpora tags=["export"] module="text.corpus"
import hashlib
import os
import re
import sys
import sysconfig
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llmnb.files import replacing
from llmnb.text.reader import (
    NotText,
    Tally,
    is_json_lines,
    open_stream,
    passing_over,
    read_records,
    read_text,
    text_blocks,
    text_of,
)
from llmnb.text.tokenizer import EOT, encode_text

# %% where the text is tags=["exporti"] module="text.corpus"
SKIPPED = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idle_test",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}
SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/"
    "data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = (
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
)


# %% [markdown]
# A corpus may be the folder in which we work, and then the last run lies in it,
# with its log and its sample, and so do shards. Read as text they would change
# the corpus from one command to the next. Both hold the tokenizer's file, a run
# its states: folders with such files are left out, and counted. Links to
# folders are not followed, as they may lead back to where we are.

# %% files below a folder tags=["export"] module="text.corpus"
OUTPUT = re.compile(
    r"(tokenizer\.tiktoken|unfinished\.json|state_\d+\.safetensors)(\..*)?"
)


def files_below(folder, skipped=(), tally=None):
    """Paths of all files below a folder, sorted by name.

    Hidden files and folders are left out, and folders named in `skipped`.
    What is noted in `tally`, a `Tally`: runs and folders of shards, links to
    folders, folders that cannot be read, and pipes, devices, and links that
    lead nowhere.
    """
    found, tally = [], tally or Tally()

    def unreadable(error):
        tally.note("not readable", error.filename)

    for here, folders, names in os.walk(folder, onerror=unreadable):
        if any(map(OUTPUT.fullmatch, names)):
            tally.note("runs or shards", here)
            folders.clear()
            continue
        folders[:] = [x for x in folders if x not in skipped and x[0] != "."]
        for link in filter(os.path.islink, (Path(here, x) for x in folders)):
            tally.note("links to folders", link)
        for path in (Path(here, x) for x in names if x[0] != "."):
            if os.path.isfile(path):
                found.append(path)
            else:
                tally.note("not files", path)
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


# %% the text of a module tags=["exporti"] module="text.corpus"
def _read(path):
    """The text of a file, or None when it has none."""
    try:
        return read_text(path)
    except NotText:
        return None


# %% [markdown]
# In which order? By name, the part that we set aside for validation would be
# all of one letter, and a limit would keep only the modules from *a* to *c*.
# We sort by the hash of the name: as good as shuffled, and the same each time.


# %% the standard library tags=["exporti"] module="text.corpus"
def _standard_library():
    """Yield the source and the manual pages of the running Python."""
    root = Path(sysconfig.get_path("stdlib"))
    readers = {}
    for path in files_below(root, SKIPPED):
        name = path.relative_to(root).as_posix()
        if path.suffix == ".py" and not name.startswith("_sysconfigdata"):
            readers[name] = lambda path=path: _read(path)
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}
    for name, text in topics.items():
        readers[f"topic {name}"] = lambda text=text: text
    for name in sorted(readers, key=_hash):
        yield readers[name]()


def _hash(text):
    """SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


# %% [markdown]
# The second corpus is `tinyshakespeare`, a megabyte of Shakespeare's plays
# that Andrej Karpathy collected and that many small language models are tried
# on. It is downloaded once. What arrives is kept only if its SHA-256 hash is
# the right one, which also tells that it is whole.


# %% keep a download tags=["exporti"] module="text.corpus"
def _cache_folder():
    """The folder of this user in which downloads are kept."""
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "llmnb"


# %% fetch a file tags=["exporti"] module="text.corpus"
def _download(url, path):
    """Fetch a file into place; progress goes to stderr."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = bytearray()
    with urllib.request.urlopen(url, timeout=30) as reply:
        size = int(reply.headers.get("Content-Length") or 0) or None
        how = {"unit_scale": True, "disable": None}  # no bar in a file
        bar = tqdm(total=size, unit="B", desc=path.name, **how)
        with bar:
            while block := reply.read(1 << 16):
                raw += block
                bar.update(len(block))
    _check_hash(raw, url)
    with replacing(path) as file:
        file.write(raw)


# %% check a download tags=["exporti"] module="text.corpus"
def _check_hash(raw, name):
    """Raise ValueError unless these bytes are tinyshakespeare."""
    got = hashlib.sha256(raw).hexdigest()
    if got != SHAKESPEARE_SHA256:
        raise ValueError(
            f"{name} must have the SHA-256 {SHAKESPEARE_SHA256} to be "
            f"tinyshakespeare, got {got}"
        )


# %% find tinyshakespeare tags=["exporti"] module="text.corpus"
def _tinyshakespeare():
    """The text of tinyshakespeare, from LLMNB_DATA, the cache or the web."""
    name = "tinyshakespeare.txt"
    folder = os.environ.get("LLMNB_DATA")
    path = Path(folder, name) if folder else None
    if path is None or not path.exists():
        try:
            path = _cache_folder() / name
            if not path.exists():
                _download(SHAKESPEARE_URL, path)
        except (OSError, RuntimeError) as error:  # RuntimeError: no home
            raise ConnectionError(
                f"cannot fetch tinyshakespeare from {SHAKESPEARE_URL} "
                f"({error}); put it as {name} into a folder and name "
                f"the folder in LLMNB_DATA"
            ) from error
    raw = path.read_bytes()
    _check_hash(raw, path)
    return raw.decode("utf-8")


# %% [markdown]
# A **document** is a stretch of text that belongs together: a module, a
# manual page, a file. In tinyshakespeare it is one speech: the speeches are
# parted by blank lines, and the blank line stays at the end of the speech.
# The third kind of corpus is your own: files of text or of JSON lines, packed
# or not, and folders of them.


# %% documents of a play tags=["exporti"] module="text.corpus"
def _speeches(text):
    """Yield the sections of a text, each with the blank line that ends it."""
    sections = text.split("\n\n")
    for section in sections[:-1]:
        yield section + "\n\n"
    yield sections[-1]


# %% files of a corpus tags=["export"] module="text.corpus"
def files_of(path, tally):
    """Yield (path, whether it was named) for a file, or a folder's files.

    path: a Path. tally: as for `files_below`. Raises FileNotFoundError, or
    ValueError for a pipe or a device.
    """
    if path.is_dir():
        for inner in files_below(path, (), tally):
            yield inner, False
    elif path.exists() and not path.is_file():
        raise ValueError(f"{path} must be a regular file or a folder")
    elif path.exists():
        yield path, True
    else:
        raise FileNotFoundError(
            f"there is no corpus and no file called {path}; the corpora are "
            "stdlib and tinyshakespeare"
        )


# %% documents of own files tags=["exporti"] module="text.corpus"
def _own_files(paths, field, skip_bad, tally):
    """Yield the documents of these files, and of all files in folders."""
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    for path in map(Path, paths):
        for inner, named in files_of(path, tally):
            documents = _documents_of(inner, field, skip_bad, tally)
            if named:
                yield from documents
            else:
                with passing_over(inner, tally):
                    yield from documents


def _documents_of(path, field, skip_bad, tally):
    """Yield the documents of a file, each whole."""

    def take(where, record):
        return text_of(where, record, field)

    with open_stream(path) as (stream, _):
        if is_json_lines(path):
            found = read_records(path, stream, take, skip_bad, tally)
            yield from (text for _, text in found)
        else:
            yield "".join(text_blocks(path, stream))


# %% load a corpus tags=["export"] module="text.corpus"
def load(
    source="stdlib", limit=None, field="text", skip_bad=False, tally=None
):
    """The documents of a corpus, a list of str.

    source: "stdlib", the source and manual pages of the running Python;
    "tinyshakespeare", downloaded once unless the folder that LLMNB_DATA
    names has it; or a path or a list of paths of files and folders. Files
    that end in .jsonl, .jsonl.gz or .jsonl.zst have a document a line, in
    the field `field`; any other file, unpacked when it ends in .gz or .zst,
    is a document. Of folders, files that are no text are passed over, and
    noted in `tally`, a `Tally`; with skip_bad, bad lines too. limit: keep at
    most that many characters; the last document is cut to fit. The order is
    the same on every call. Raises FileNotFoundError, ConnectionError, or
    ValueError for a bad limit, a bad line, a file that is no text, or an
    empty corpus.
    """
    tally = tally or Tally()
    if limit is not None and limit < 1:
        raise ValueError(f"load: limit must be at least 1, got {limit}")
    if source == "stdlib":
        texts = _standard_library()
    elif source == "tinyshakespeare":
        texts = _speeches(_tinyshakespeare())
    else:
        texts = _own_files(source, field, skip_bad, tally)
    documents = list(_take(filter(None, texts), limit))
    if not documents:
        raise ValueError(f"load: no text in {source}{tally.words()}")
    if times := sum(text.count(EOT) for text in documents):
        tally.note(EOT, source, times)
    return documents


# %% keep to a limit tags=["exporti"] module="text.corpus"
def _take(texts, limit):
    """Yield texts until they hold `limit` characters, the last one cut."""
    for text in texts:
        if limit is None:
            yield text
        elif limit > 0:
            yield text[:limit]
            limit -= len(text)
        else:
            return


# %% a folder of many kinds
many = folder / "many"
(many / "run").mkdir(parents=True)
(many / "a.txt").write_text("A text.")
(many / "b.jsonl").write_text('{"text": "A line."}\n{"text": null}\n')
(many / "c.py").write_text("# coding: rot13\n")
(many / "d.png").write_bytes(b"\x89PNG")
save(enc, many / "run" / "tokenizer.tiktoken")
tally = Tally()
print(load(many, skip_bad=True, tally=tally), tally.words(), sep="\n")

# %% the standard library, loaded tags=["nbval-ignore-output"]
documents = load("stdlib")
characters = sum(map(len, documents))
print(f"Python {sys.version.split()[0]}: {len(documents)} documents,")
print(f"{characters / 1e6:.1f} million characters")

# %% [markdown]
# Your Python may be another version, so these numbers may be others, and
# nothing that the book verifies depends on them.
#
# The documents become one long array of tokens, with `<|endoftext|>` before
# each. The first part is set aside for **validation**: the model never trains
# on it, and its loss there says whether it has learned more than to repeat.


# %% tokens of documents tags=["export"] module="text.corpus"
def encode_documents(encoding, documents, endoftext=False):
    """Encode documents into one array, `<|endoftext|>` before each.

    encoding: a tiktoken.Encoding of at most 65,536 tokens, or ValueError is
    raised. documents: an iterable of str. Returns a uint16 array of shape
    (N,). Text that reads `<|endoftext|>` is encoded as ordinary text, or as
    the token with `endoftext`.
    """
    if encoding.n_vocab > 65536:
        raise ValueError(
            f"encode_documents: the encoding must have at most 65536 tokens, "
            f"got {encoding.n_vocab}"
        )
    if isinstance(documents, str):
        documents = [documents]
    parts, rest = [], iter(documents)
    encode = partial(encode_text, encoding, endoftext=endoftext)
    with ThreadPoolExecutor(8) as pool:  # tiktoken lets go of the lock
        while group := list(islice(rest, 256)):
            for ids in pool.map(encode, group):
                parts.append(np.uint16([encoding.eot_token]))
                parts.append(ids.astype(np.uint16))
    if not parts:
        raise ValueError("encode_documents: there are no documents")
    return np.concatenate(parts)


# %% train and validation tags=["export"] module="text.corpus"
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


# %% the passage as tokens
stream = encode_documents(enc, PASSAGE.split("\n\n"))
train_tokens, val_tokens = split(stream)
print(stream.dtype, stream.shape, train_tokens.shape, val_tokens.shape)
print("documents begin at", np.flatnonzero(stream == enc.eot_token))

# %% [markdown]
# ## Fast on a CPU
#
# The two trainings on the same text, and few merges, for the slow one needs
# patience. Its time is $O(MS)$: twice the merges should take about twice the
# time. The fast one counts once, and its merges cost little after that.

# %% slow against fast, timed tags=["nbval-ignore-output"]
print(machine())
words = _count_words(load("stdlib", limit=300_000))
for number in (10, 20, 40):
    start = time.perf_counter()
    slow = learn_slowly(words, number)
    middle = time.perf_counter()
    verdict(f"{number} merges", _learn(words, number) == slow, "equal")
    end = time.perf_counter()
    slow_time, fast_time = middle - start, end - middle
    print(f"  slow {slow_time:.2f} s, fast {fast_time:.2f} s")

# %% five million characters, timed tags=["nbval-ignore-output"]
print(machine())
sample = load("stdlib", limit=5_000_000)
start = time.perf_counter()
words = _count_words(sample)
middle = time.perf_counter()
_learn(words, 1024 - 257)
end = time.perf_counter()
print(f"{len(words):,} distinct words, {sum(words.values()):,} in all")
print(f"to count the words {middle - start:.1f} s")
print(f"to learn 767 merges {end - middle:.1f} s")

# %% [markdown]
# Five million characters to a vocabulary of 1,024. The merges see only the
# distinct words, which are few beside all of them, so that cutting the text
# into words is now a good part of the work.
#
# ## Count it
#
# How large should a vocabulary be? A larger one makes shorter sequences, and
# the gain shrinks with every merge. Because the merges do not depend on how
# many we ask for, **one training holds all smaller ones**: the vocabulary of
# 512 is the first part of that of 8,192. So we train once, cut the list at
# several lengths, and measure bytes a token on text that the training did not
# see.

# %% vocabularies cut to size tags=["nbval-ignore-output"]
seen, unseen = sample[: len(sample) // 2], "".join(sample[-40:])
merges = spell(_learn(_count_words(seen), 8192 - 257))
sizes = [257, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192]
density = []
for size in sizes:
    cut = _encoding("cut", merges[: size - 1])
    count = len(cut.encode_ordinary(unseen))
    density.append(len(unseen.encode("utf-8")) / count)
for size, value in zip(sizes, density, strict=True):
    print(f"{size:>6} tokens: {value:.2f} bytes a token")

# %% the saving, drawn
fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), dpi=100)
left.plot(sizes, density, "o-", color=BLUE)
left.set(ylabel="bytes a token", ylim=(0, None))
share = [100 / d for d in density]
square = [100 / d**2 for d in density]
right.plot(sizes, share, "o-", color=BLUE)
right.plot(sizes, square, "s--", color=ORANGE)
right.text(8192, share[-1] + 4, "tokens", color=BLUE, ha="right")
right.text(270, 5, "pairs of positions", color=ORANGE)
right.set(ylabel="percent of what bytes need", ylim=(0, 105))
for ax in (left, right):
    ax.set_xscale("log", base=2)
    ax.set_xticks([256, 1024, 4096], ["256", "1,024", "4,096"])
    ax.set_xlabel("size of the vocabulary")
    ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.2.4. Python source that the training did not see. Left: tokens
# grow longer with the vocabulary, and each doubling adds less than the last.
# Right: the tokens of a given text, and the pairs of positions that attention
# compares in it, as a percentage of what single bytes need: the first thousand
# tokens bring most of the saving.*
#
# The price is the token table, which has $V$ rows of $C$ numbers. At GPT-2's
# size, $C = 768$, 50,257 rows are 38.6 million parameters, near a third of the
# model's 124 million. At the size that a laptop trains in minutes, $C = 128$,
# a table of that height would outweigh all the rest; with $V = 1024$ it has
# 131,072 numbers. That is why [training](16_training.ipynb) uses a small
# vocabulary of its own.

# %% rows times channels
print(50257 * 768, 50257 * 128, 1024 * 128)

# %% [markdown]
# ## Shards
#
# Tokens are kept in files of a fixed format, llm.c's, so that its files and
# ours can be exchanged. Such a file is a **shard**: a large text is spread
# over several. It begins with a header of 256 int32, little endian (the lowest
# byte first), of which three are used:
#
# $$
# \underbrace{20240520}_{\text{magic}}\;
# \underbrace{1}_{\text{version}}\;
# \underbrace{N}_{\text{count}}\; 0\; \dots\; 0
# \qquad \text{size} = 1024 + 2N \text{ bytes} \tag{1.2.7}
# $$
#
# The **magic** number says what kind of file it is. Then come $N$ tokens of
# two bytes each: $V \le 65{,}536$ fits uint16, half of what int32 would take.

# %% imports of the data tags=["export"] module="text.data"
import errno
import io
import os
import re
from pathlib import Path

import numpy as np

from llmnb.files import replacing, what_is

# %% the header of a shard tags=["exporti"] module="text.data"
SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_BYTES = 1024


# %% write a shard tags=["export"] module="text.data"
def write_shard(path, tokens):
    """Write tokens as a shard in llm.c's format, uint16.

    tokens: one dimension of integers in [0, 65536), at least one and fewer
    than 2**31. The file is written beside `path` and renamed into place.
    Raises TypeError or ValueError for other tokens.
    """
    tokens = _check_stream("write_shard: tokens", tokens)
    if not 0 < tokens.size < 2**31:
        raise ValueError(
            f"write_shard: a shard must hold 1 to {2**31 - 1} tokens, "
            f"got {tokens.size}"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high > 65535:
        bad = low if low < 0 else high
        raise ValueError(
            f"write_shard: tokens must lie in [0, 65536), got {bad}"
        )
    header = np.zeros(256, "<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, tokens.size
    with replacing(path) as file:
        header.tofile(file)
        tokens.astype("<u2", copy=False).tofile(file)


# %% check a stream of tokens tags=["exporti"] module="text.data"
def _check_stream(name, tokens):
    """The tokens as a one-dimensional integer array, or an error."""
    tokens = np.asarray(tokens)
    if not np.issubdtype(tokens.dtype, np.integer):
        raise TypeError(f"{name} must be integers, got {tokens.dtype}")
    if tokens.ndim != 1:
        raise ValueError(
            f"{name} must have one dimension, got shape {tokens.shape}"
        )
    return tokens


# %% [markdown]
# Reading maps the file into memory: no byte is read until it is looked at,
# and a shard larger than the memory is no trouble. Before that, each number
# of (1.2.7) is checked.


# %% read a shard's header tags=["export"] module="text.data"
def shard_length(path):
    """The number of tokens in a shard, from its header alone.

    Raises ValueError, naming the file, what is wrong and what would be
    right, for a file shorter than its header, another magic number or
    version, a size that does not match the count, and a pipe or a device.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path}: a shard must be a regular file")
    with open(path, "rb", buffering=0) as file:
        size, header = os.fstat(file.fileno()).st_size, file.read(12)
    if size < HEADER_BYTES or len(header) < 12:
        what = what_is(path, SHARD_MAGIC)
        raise ValueError(
            f"{path}: a shard has a header of {HEADER_BYTES} bytes, "
            f"the file has {size}" + (what and f": {what}")
        )
    magic, version, count = np.frombuffer(header, "<i4").tolist()
    right = HEADER_BYTES + 2 * count
    for ok, what, must, got in (
        (magic == SHARD_MAGIC, "magic number", SHARD_MAGIC, magic),
        (version == SHARD_VERSION, "version", SHARD_VERSION, version),
        (count > 0, "token count", "positive", count),
        (size == right, f"size for {count} tokens", f"{right} bytes", size),
    ):
        if not ok:
            other = what_is(path, SHARD_MAGIC)
            raise ValueError(
                f"{path}: the {what} must be {must}, got {got}"
                + (other and f": {other}")
            )
    return count


# %% read a shard tags=["export"] module="text.data"
def read_shard(path):
    """Map a shard's tokens into memory, read only.

    Returns a np.memmap, uint16, of shape (N,). Raises ValueError as
    `shard_length` does.
    """
    count = shard_length(path)
    return np.memmap(path, "<u2", "r", offset=HEADER_BYTES, shape=(count,))


# %% a shard in hexadecimal
shard = folder / "harbour.bin"
write_shard(shard, stream)
raw = shard.read_bytes()
for start in (0, 1008, 1024):
    row = raw[start : start + 16]
    print(f"{start:>5}  {row.hex(' ')}")
print(len(raw), "bytes =", HEADER_BYTES, "+ 2 *", len(stream))

# %% [markdown]
# Read the first row from the left, lowest byte first. `88 d8 34 01` is
# $\mathtt{0x0134d888} = 20240520$; then comes 1; then the count. At 1024
# stands the first token, `8f 01`: $\mathtt{0x018f} = 399$, which is
# `<|endoftext|>` of a vocabulary of 400.

# %% the header read by hand
header = [int.from_bytes(raw[i : i + 4], "little") for i in (0, 4, 8)]
first = int.from_bytes(raw[1024:1026], "little")
print(header, first, enc.decode([first]))
verdict("shard", np.array_equal(read_shard(shard), stream), "read == written")

# %% the shard drawn
fig, ax = plt.subplots(figsize=(8, 1.5), dpi=100)
fields = [
    (0, 4, "magic", ORANGE), (4, 8, "version", BLUE), (8, 12, "count", ORANGE),
    (12, 20, "zeros ...", GREY), (20, 22, "", BLUE), (22, 24, "", BLUE),
    (24, 26, "", BLUE), (26, 30, "...", GREY),
]  # fmt: skip
for a, b, label, colour in fields:
    box = plt.Rectangle((a, 0), b - a, 1, facecolor=colour, edgecolor="white")
    ax.add_patch(box)
    ink = PALETTE["ink"] if colour == GREY else "white"
    ax.text((a + b) / 2, 0.5, label, ha="center", va="center", color=ink)
for x, label in [(0, "0"), (4, "4"), (8, "8"), (12, "12"), (20, "1024")]:
    ax.text(x, 1.15, label, size=9, ha="left")
ax.text(20, -0.2, "tokens, two bytes each", va="top")
ax.text(0, -0.2, "header, 256 int32", va="top")
ax.set(xlim=(-0.3, 30.3), ylim=(-0.65, 1.5))
ax.axis("off")
fig.subplots_adjust(0, 0, 1, 1)
plt.show()

# %% [markdown]
# *Figure 1.2.5. A shard from its first byte on, with the offsets above: three
# int32 that are used, zeros up to byte 1024, then two bytes a token. Not to
# scale.*
#
# Four damaged shards and what is said about them:

# %% damaged shards
wrong = folder / "wrong.bin"
for damaged in (
    raw[:100],
    (20240521).to_bytes(4, "little") + raw[4:],
    raw[:4] + b"\2" + raw[5:],
    raw[:-1],
):
    wrong.write_bytes(damaged)
    print(complaint(read_shard, wrong))

# %% [markdown]
# ### A folder of shards
#
# Some shards of a text are for training, the others for validation, and their
# names say which: `train.bin` and `val.bin` when there is one of each, else
# `train_000000.bin` and so on. llm.c puts the name of the text in front, as in
# `fineweb_train_000001.bin`. The order is that of the names.


# %% the shards of a folder tags=["export"] module="text.data"
SHARD_NAME = re.compile(r"(?:.*_)?(train|val)(?:_\d+)?\.bin")


def find_shards(folder):
    """The shards in a folder: two lists of paths, (train, val), by name.

    Raises FileNotFoundError when either list is empty.
    """
    found = {"train": [], "val": []}
    for path in sorted(Path(folder).iterdir()):
        if match := SHARD_NAME.fullmatch(path.name):
            found[match[1]].append(path)
    for part, paths in found.items():
        if not paths:
            raise FileNotFoundError(
                f"{folder} has no {part}.bin and no *{part}_*.bin: it must "
                "hold shards for training and for validation"
            )
    return found["train"], found["val"]


# %% many shards as one text tags=["export"] module="text.data"
class Shards:
    """The tokens of many shards, of which none is open.

    paths: the shards, in order. lengths: how many tokens each holds, from
    its header. len() is the sum; np.asarray() reads them all. Raises
    ValueError for a damaged header.
    """

    def __init__(self, paths):
        self.paths = list(paths)
        self.lengths = [shard_length(path) for path in self.paths]

    def __len__(self):
        return sum(self.lengths)

    def __array__(self, dtype=None, copy=None):
        parts = zip(self.paths, self.lengths, strict=True)
        return np.concatenate([_first_tokens(*x) for x in parts], dtype=dtype)


# %% a sample of them tags=["export"] module="text.data"
def sample_tokens(tokens, count):
    """At most `count` tokens, an array: from an array or from `Shards`.

    Of an array the first are taken, of shards the first of each of up to 64
    that lie evenly among them.
    """
    if not isinstance(tokens, Shards):
        return tokens[:count]
    chosen = tokens.paths[:: -(-len(tokens.paths) // 64)]
    share = count // len(chosen)
    return np.concatenate([_first_tokens(path, share) for path in chosen])


def _first_tokens(path, count):
    count = min(count, shard_length(path))
    return np.fromfile(path, "<u2", count, offset=HEADER_BYTES)


# %% a folder of two kinds
two = folder / "two"
two.mkdir()
for name in ("val.bin", "train_000000.bin", "train_000001.bin"):
    write_shard(two / name, stream)
several, single = find_shards(two)
print([x.name for x in several], [x.name for x in single])
count = len(Shards(several))
verdict("two shards", count == 2 * len(stream), "the sum of their tokens")

# %% [markdown]
# ## The data loader
#
# A training step takes a batch: `tokens` and `targets`, both of shape
# $(B, T)$. The target of a token is the token after it, so that one window of
# $T$ tokens asks $T$ questions at once. Window $w$ of a shard $s$ is
#
# $$
# \mathrm{tokens}_t = s_{wT + t}, \qquad
# \mathrm{targets}_t = s_{wT + t + 1}, \qquad 0 \le t < T \tag{1.2.8}
# $$
#
# The last target of a window is the first token of the next, so $N$ tokens
# hold $W$ windows, and $W$ windows fill
#
# $$
# W = \Bigl\lfloor \frac{N - 1}{T} \Bigr\rfloor, \qquad
# \text{batches} = \Bigl\lfloor \frac{W}{B} \Bigr\rfloor \tag{1.2.9}
# $$
#
# batches of $B$ windows. One pass over all shards is an **epoch**. For
# training we shuffle, anew in each epoch: the order of the shards, and of the
# windows within a shard. If the windows of a batch were neighbours, they would
# speak of one matter, and their gradients would agree with each other more
# than with the rest of the text.
#
# A large text is ten thousand shards. The loader reads only their headers when
# it is made, and opens one shard at a time, for a process may have a thousand
# or so. It does not map the shard. Should somebody cut a mapped file short, the
# next look behind its end kills the process without a word; a read that comes
# out short is an error that can name the file. It costs a window a microsecond
# or two.
#
# An array takes the place of a shard as well. Its numbers are looked at before
# anything runs: in the int32 of a batch, $2^{40}$ would become token 0.
#
# The shuffle must be the same wherever the program runs. NumPy promises that
# for the old generator, `RandomState`, whose numbers are frozen; it does not
# for the new one.


# %% a shard that is read in parts tags=["exporti"] module="text.data"
class _File:
    """An open shard; a slice of it is read, at most seq_len + 1 tokens."""

    def __init__(self, path, seq_len):
        shard_length(path)  # checks it
        self.path, self.file = path, io.FileIO(path)
        self.room = np.empty(seq_len + 1, "<u2")

    def __getitem__(self, part):
        room, got = self.room[: part.stop - part.start], 0
        raw, more = memoryview(room).cast("B"), 1
        self.file.seek(HEADER_BYTES + 2 * part.start)
        while got < len(raw) and more:
            more = self.file.readinto(raw[got:])
            got += more
        if not more:
            gone = part.start + got // 2
            what = f"has been cut short, token {gone:,} is gone"
            raise OSError(errno.EIO, what, str(self.path))
        return room

    def __del__(self):
        if hasattr(self, "file"):
            self.file.close()


# %% shards and their order tags=["exporti"] module="text.data"
def _open(shard, seq_len):
    """A shard's tokens: a path is opened, an array is taken as it is."""
    if isinstance(shard, (str, os.PathLike)):
        return _File(shard, seq_len)
    return np.asarray(shard)


def _check_array(shard):
    """The number of tokens in an array, or an error when some are none."""
    tokens, name = np.asarray(shard), "DataLoader: tokens"
    if tokens.size:  # of no elements the type says nothing
        _check_stream(name, tokens)
        for bad in (int(tokens.min()), int(tokens.max())):
            _check_int(name, bad, 0, 2**31)
    return tokens.size


def _count_windows(shard, batch_size, seq_len):
    """W of (1.2.9), or an error when there is not one batch."""
    path = isinstance(shard, (str, os.PathLike))
    count = shard_length(shard) if path else _check_array(shard)
    if count < batch_size * seq_len + 1:
        raise ValueError(
            f"DataLoader: {shard if path else 'an array'} has {count} "
            f"tokens, one batch of {batch_size} x {seq_len} needs "
            f"{batch_size * seq_len + 1}"
        )
    return (count - 1) // seq_len


def _fill_order(order, key):
    """Write 0, 1, 2, ... into `order`, shuffled by `key` unless it is None."""
    order[:] = np.arange(len(order))
    if key is not None:
        np.random.RandomState(key).shuffle(order)


# %% [markdown]
# The shuffle of shard $k$ in epoch $e$ is drawn from the key (seed, $e$, $k$),
# not from a generator that lives on. So the place of the loader is three whole
# numbers, epoch, shard and position, and a run that was stopped goes on where
# it was when they are set again.


# %% what an epoch is made of tags=["exporti"] module="text.data"
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
            key = [self.seed, epoch] if self.shuffle else None
            _fill_order(self.shard_order, key)
            k = int(self.shard_order[shard])
            key = key and [*key, k]
            _fill_order(self.window_order[: self.windows[k]], key)
            self.tokens = _open(self.shards[k], self.seq_len)
            self.entered = epoch, shard
            self.batches = self.windows[k] // self.batch_size
        return self.batches


# %% a place that can be read and set tags=["exporti"] module="text.data"
class _Place:
    """Where a loader stands among its epochs."""

    def reset(self):
        """Go back to the first batch of epoch 0."""
        self._place = {"epoch": 0, "shard": 0, "position": 0}

    @property
    def state(self):
        """Place of the next batch: epoch, shard of it, batch of that."""
        return dict(self._place)

    @state.setter
    def state(self, state):
        if set(state) != {"epoch", "shard", "position"}:
            raise ValueError(
                f"DataLoader: state must have epoch, shard and position, "
                f"got {sorted(state)}"
            )
        epoch, shard = state["epoch"], state["shard"]
        _check_int("DataLoader: epoch", epoch, 0, 2**32)
        _check_int("DataLoader: shard", shard, 0, len(self._epochs.shards))
        batches = self._epochs.enter(epoch, shard)
        _check_int("DataLoader: position", state["position"], 0, batches)
        self._place = {name: int(value) for name, value in state.items()}


# %% check a whole number tags=["exporti"] module="text.data"
def _check_int(name, value, low, high):
    """Raise unless value is an integer in [low, high)."""
    if not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be int, got {type(value).__name__}")
    if not low <= value < high:
        raise ValueError(f"{name} must lie in [{low}, {high}), got {value}")


# %% the data loader tags=["export"] module="text.data"
class DataLoader(_Place):
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
    on from there. reset(): back to the start.
    """

    def __init__(self, shards, batch_size, seq_len, seed=0, shuffle=True):
        _check_int("DataLoader: batch_size", batch_size, 1, 2**31)
        _check_int("DataLoader: seq_len", seq_len, 1, 2**31)
        _check_int("DataLoader: seed", seed, 0, 2**32)
        self._epochs = _Epochs(shards, batch_size, seq_len, seed, shuffle)
        self.shards, windows = self._epochs.shards, self._epochs.windows
        self.batches_per_epoch = sum(w // batch_size for w in windows)
        self._tokens = np.empty((batch_size, seq_len), np.int32)
        self._targets = np.empty((batch_size, seq_len), np.int32)
        self.reset()

    def next_batch(self):
        """The next batch: (tokens, targets), int32, (batch_size, seq_len).

        Both arrays are the loader's own and are overwritten by the next
        call: nothing is allocated at a step. Copy what you want to keep.
        """
        place, (B, T) = self._place, self._tokens.shape
        batches = self._epochs.enter(place["epoch"], place["shard"])
        first = place["position"] * B
        for b, w in enumerate(self._epochs.window_order[first : first + B]):
            window = self._epochs.tokens[w * T : w * T + T + 1]
            self._tokens[b] = window[:-1]  # (1.2.8)
            self._targets[b] = window[1:]
        place["position"] += 1
        if place["position"] == batches:
            place["position"], place["shard"] = 0, place["shard"] + 1
        if place["shard"] == len(self._epochs.shards):
            place["shard"], place["epoch"] = 0, place["epoch"] + 1
        return self._tokens, self._targets


# %% [markdown]
# A first batch without shuffling, $B = 2$ and $T = 6$, as text:

# %% a first batch
loader = DataLoader([shard], batch_size=2, seq_len=6, shuffle=False)
inputs, targets = loader.next_batch()
print(inputs.dtype, inputs.shape, targets.shape)
for b in range(2):
    print([tokens[i].decode() for i in inputs[b]])
    print([tokens[i].decode() for i in targets[b]])

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

# %% the windows, drawn
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
# *Figure 1.2.6. The 24 windows of a shard from left to right; number and colour
# say in which of the six batches of an epoch a window is read. Without
# shuffling a batch is four neighbours. Shuffled, its windows come from all
# over the shard, in another order each epoch; each window is read once.*
#
# ### Proof
#
# Three shards of different length, one of them a file. In every epoch each
# window must be read once, with its targets one token on; the order must
# differ between epochs; and a second loader that is given the state of the
# first must go on with the same batches.

# %% each window once
parts = [np.arange(0, 121), np.arange(500, 581), np.arange(900, 1101)]
write_shard(folder / "part.bin", parts[1])
shards = [parts[0], folder / "part.bin", parts[2]]
loader = DataLoader(shards, batch_size=4, seq_len=5, seed=11)
orders = []
for _ in range(3):
    rows = []
    for _ in range(loader.batches_per_epoch):
        x, y = loader.next_batch()
        verdict_ok = np.array_equal(x + 1, y) and np.ptp(x, axis=1).max() == 4
        rows += x[:, 0].tolist() if verdict_ok else [None]
    orders.append(rows)
every = [n for part in parts for n in part[:-1:5].tolist()]
once = all(sorted(rows) == every for rows in orders)
verdict("windows", once, "each once an epoch")
verdict("epochs", orders[0] != orders[1] != orders[2], "differ in order")

# %% stop and go on
for _ in range(7):
    loader.next_batch()
second = DataLoader(shards, batch_size=4, seq_len=5, seed=11)
second.state = loader.state
print(second.state, "of", loader.batches_per_epoch, "batches an epoch")
same = all(
    np.array_equal(loader.next_batch(), second.next_batch()) for _ in range(50)
)
verdict("resumed", same, "50 batches are the same")

# %% [markdown]
# A loader that drew its windows at random, each time anew, would be shorter to
# write. It would also see some windows twice and others never; the first
# verdict catches it:

# %% windows drawn anew
rng = np.random.RandomState(0)
drawn = sorted(every[i] for i in rng.randint(len(every), size=len(every)))
verdict("drawn anew", drawn != every, "is caught")
print(len(set(drawn)), "of", len(every), "windows seen")

# %% [markdown]
# How long does a batch take? The loader copies $2BT$ numbers, from pages of
# the file that the operating system keeps in memory.

# %% a batch, timed tags=["nbval-ignore-output"]
big_shard = folder / "big.bin"
write_shard(big_shard, np.arange(5_000_000) % 1024)
loader = DataLoader([big_shard], batch_size=16, seq_len=128)
seconds = fastest(loader.next_batch, runs=1000)
print(machine())
print(f"{1e6 * seconds:.0f} microseconds a batch of 16 x 128")

# %% [markdown]
# A training step on such a batch takes milliseconds at best, so the loader
# needs no thread of its own.
#
# ## Take away
#
# - UTF-8 turns every text into bytes, and 256 tokens can hold any of them.
#   BPE adds the most frequent pair, again and again.
# - A merge changes five counts around each place, and each place costs a
#   symbol: training is $O(S \log S)$ in the symbols of the distinct words,
#   however many merges there are.
# - Encoding repeats the merges in the order of rank. Decoding is a table.
# - A shard is a header of 1,024 bytes and two bytes a token. A window of $T$
#   tokens asks $T$ questions, and its targets are the tokens one further on.
# - What is shuffled is drawn from (seed, epoch, shard), so three numbers say
#   where a run stands.
#
# ## Design note
#
# What should be shuffled? llm.c's loader shuffles the order of the *batches*
# in a shard: each batch is one contiguous stretch of $BT$ tokens. That reads
# the disk in long runs and needs an order $B$ times shorter. We shuffle
# *windows*. The order then takes eight bytes a window, which at $T = 128$ is a
# sixteenth of a byte a token, and the rows of a batch come from $B$ places. On
# a small corpus the difference matters: with $B = 16$ and $T = 128$ a
# contiguous batch would often be a single Python module, and the loss would
# swing with the module. Without shuffling, both loaders give the same batches.
#
# ## Exercises
#
# **1** (★). Write `batches(N, B, T)`, the number of batches in a shard of $N$
# tokens, without building a loader.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# A window needs its $T$ tokens and one more for the last target, and the
# windows share these borders: $\lfloor (N-1)/T \rfloor$ windows. A batch takes
# $B$ of them.
# :::


# %% exercise 1, the function tags=["hide-cell"]
def batches(N, B, T):
    return (N - 1) // T // B  # (1.2.9)


# %% exercise 1, checked
cases = [(13, 2, 6), (25, 2, 6), (24, 2, 6), (1000, 3, 7), (65, 1, 64)]
got = [batches(*case) for case in cases]
want = [
    DataLoader([np.arange(N)], B, T).batches_per_epoch for N, B, T in cases
]
verdict("exercise 1", got == want, f"{got}")

# %% [markdown]
# **2** (★). The merges of a small vocabulary are the first of a large one.
# Write `shrink(encoding, vocab_size)`, which makes the smaller encoding
# without training again.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# Token $k$ depends on the tokens before it alone, so the first
# `vocab_size - 1` tokens are what training would have found. The special
# token takes the number after them.
# :::


# %% exercise 2, the function tags=["hide-cell"]
def shrink(encoding, vocab_size):
    ranks = range(vocab_size - 1)
    tokens = [encoding.decode_single_token_bytes(i) for i in ranks]
    return _encoding(f"bpe-{vocab_size}", tokens)


# %% exercise 2, checked
small, want = shrink(enc, 300), train(PASSAGE, 300)
same = all(small.encode_ordinary(t) == want.encode_ordinary(t) for t in texts)
verdict("exercise 2", same and small.n_vocab == 300, "as if trained so")

# %% [markdown]
# **3** (★★). A token may end in the middle of a character: an emoji is four
# bytes. Write `stream_text(encoding, ids)`, which yields text as tokens come
# in and never half a character. The pieces together must be the text.
#
# :::{admonition} Solution to exercise 3
# :class: dropdown
# Python's incremental decoder keeps the bytes of an unfinished character until
# the rest arrives. At the end it is told that nothing more will come; what is
# left over then was never a character, and U+FFFD stands for it.
# :::

# %% exercise 3, the function tags=["hide-cell"]
import codecs


def stream_text(encoding, ids):
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for i in ids:
        piece = decoder.decode(encoding.decode_single_token_bytes(i))
        if piece:
            yield piece
    rest = decoder.decode(b"", final=True)
    if rest:
        yield rest


# %% exercise 3, checked
ids = enc.encode_ordinary("a 🙂 at 中")
pieces = list(stream_text(enc, ids))
print(len(ids), "tokens,", len(pieces), "pieces:", pieces)
whole = all(
    "".join(stream_text(enc, enc.encode_ordinary(t))) == t for t in texts
)
split_up = any("\ufffd" in piece for piece in pieces)
verdict("exercise 3", whole and not split_up, "nothing is split")

# %% [markdown]
# **4** (★★). A model with longer tokens has a larger loss a token, since each
# token says more. To compare models over different vocabularies, turn the loss
# into **bits a byte**. Write `bits_per_byte(loss, encoding, text)`, for a mean
# loss in nats a token ($\ln 2$ nats are a bit). A uniform guess over bytes,
# with loss $\ln 256$, must give 8.
#
# :::{admonition} Solution to exercise 4
# :class: dropdown
# The loss of the whole text is the mean loss times the number of tokens.
# Divide by $\ln 2$ for bits and by the bytes of the text. The uniform guess
# over the larger vocabulary is the better one: a vocabulary that was trained
# on a text already knows something about it.
# :::

# %% exercise 4, the function tags=["hide-cell"]
import math


def bits_per_byte(loss, encoding, text):
    count = len(encoding.encode_ordinary(text))
    return loss / math.log(2) * count / len(text.encode("utf-8"))


# %% exercise 4, checked
eight = bits_per_byte(math.log(256), byte(), PASSAGE)
verdict("exercise 4", abs(eight - 8) < 1e-9, "ln 256 over bytes is 8")
uniform = bits_per_byte(math.log(enc.n_vocab), enc, PASSAGE)
print(f"a uniform guess over {enc.n_vocab} tokens: {uniform:.2f}")

# %% [markdown]
# **5** (★★★). `encode_word` is quadratic in the length of a word: it ranks
# every pair anew after each merge. Write `encode_long(word, ranks)` in $O(n
# \log n)$, with the linked list and the heap of this chapter.
#
# :::{admonition} Solution to exercise 5
# :class: dropdown
# Each entry of the heap holds the rank, the place and the two parts it was
# made for. An entry whose parts are gone is passed over. The separator at the
# end of the list is `None`, and so is a part that was merged away, which keeps
# either from pairing. Every merge offers two new pairs: at most $3n$ entries.
# :::


# %% exercise 5, the function tags=["hide-cell"]
def encode_long(word, ranks):
    parts = [word[i : i + 1] for i in range(len(word))] + [None]
    after = list(range(1, len(parts))) + [0]
    before = list(range(-1, len(word)))
    heap = []

    def offer(i):
        j = after[i]
        if parts[i] and parts[j] and parts[i] + parts[j] in ranks:
            rank = ranks[parts[i] + parts[j]]
            heapq.heappush(heap, (rank, i, parts[i], parts[j]))

    for i in range(len(word)):
        offer(i)
    while heap:
        _, i, left, right = heapq.heappop(heap)
        j = after[i]
        if (parts[i], parts[j]) == (left, right):
            parts[i], parts[j] = left + right, None
            after[i] = after[j]
            before[after[j]] = i
            offer(before[i])
            offer(i)
    return [ranks[part] for part in parts if part]


# %% exercise 5, checked
rng = random.Random(5)
longs = [rng.choices(b" aehorst", k=rng.randint(1, 400)) for _ in range(50)]
same = all(
    encode_long(bytes(w), ranks) == encode_word(bytes(w), ranks) for w in longs
)
verdict("exercise 5", same, "equals encode_word")

# %% [markdown]
# ## Further reading
#
# - Philip Gage, "A New Algorithm for Data Compression", *The C Users Journal*,
#   1994: byte-pair encoding where it began, as a way to compress files.
# - Rico Sennrich, Barry Haddow and Alexandra Birch,
#   [Neural Machine Translation of Rare Words with Subword
#   Units](https://arxiv.org/abs/1508.07909), 2016: read section 3.2, which
#   brought it to language models.
# - Alec Radford and others, "Language Models are Unsupervised Multitask
#   Learners", 2019: read section 2.2 for why GPT-2 merges bytes and why it
#   cuts the text first.
# - [RFC 3629](https://www.rfc-editor.org/rfc/rfc3629), 2003: read section 3,
#   the definition of UTF-8.
# - [RFC 8878](https://www.rfc-editor.org/rfc/rfc8878), 2021: read section 3.1.1
#   for frames and blocks, from which (1.2.6) follows, and section 7 on what a
#   stranger's file can do.
# - [tiktoken](https://github.com/openai/tiktoken): the encoder; its README has
#   the interface that we use.
# - [llm.c](https://github.com/karpathy/llm.c): `llmc/dataloader.h` for the
#   loader whose files ours reads.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.2")
