# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       text.bpe: "Byte-pair encoding, learnt from a text: the tokens of GPT-2's kind."
# ---

# %% [markdown]
# # Tokens: from text to whole numbers
#
# > Byte-pair encoding, trained from scratch: the pairs of bytes that a text
# > repeats become numbers of their own, and any text becomes a list of them.
#
# *Reading time: 28 minutes. You need: Python, and
# [chapter 1.1](01_learns.ipynb) for what a vocabulary is.*

# %% [markdown]
# ## Where we are
#
# GPT-2 does not read letters. It reads whole numbers below a limit $V$, and it
# predicts the next number from those before it. Such a number is a **token**,
# and $V$ is the size of the **vocabulary**. In [chapter 1.1](01_learns.ipynb)
# a token was a letter. Here it becomes a piece of text that the text itself
# suggests.

# %% where we are
from llmnb.book.diagram import PALETTE, gpt2_diagram

gpt2_diagram(lit="tokens")

# %% [markdown]
# *Figure 1.2.1. GPT-2's forward pass with this chapter's boxes lit: text
# enters at the top left and becomes tokens before any arithmetic begins.*
#
# At the end you can
#
# - train a byte-level BPE (byte-pair encoding) by hand on one line of text and
#   say why each merge was chosen;
# - say why the fast training finds the same merges as the slow one, and what
#   each of them costs;
# - encode any text, and any bytes, and get them back;
# - say what a larger vocabulary saves, and what it costs.

# %% [markdown]
# ## Setup

# %% setup
import gzip
import json
import random
import time

import matplotlib.pyplot as plt

from llmnb.timing import machine
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
# In merges 3 and 4 several pairs share the first place and the lower number
# decides again: a blank is 32, `r` is 114, and `␣t`, the third token after the
# bytes 0 to 255, is 258. In merge 5 only one pair is left that comes three
# times. Look at `he`: it stood in three words, and after merge 1 it is in two,
# since the `h` of `rushes` now belongs to `sh`. Counts change as we merge.

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
import heapq
from collections import Counter

import regex

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
# The new token, call it $ab$, takes the next free number, from 256 up, and
# stands for the bytes of its parts, one after the other:
#
# $$ \mathrm{bytes}(ab) = \mathrm{bytes}(a)\,\mathrm{bytes}(b) \tag{1.2.3} $$
#
# Then every occurrence of $a$ followed by $b$ becomes $ab$, from left to
# right. The order matters when $a = b$: `aaa` becomes `aa·a`.


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
# Here is the list with one short word in it, before and after a merge of `b`
# and `c`: nothing moves, the neighbours of the removed symbol point past it.

# %% one symbol taken out
few = _Symbols({b"abcd": 1})
for step in ("before", "after"):
    print(step, few.ids, "next", few.next, "previous", few.prev)
    if step == "before":
        _merge(few, (98, 99), 256)

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
# Training merges pairs of numbers; (1.2.5) asks whether the joined *bytes* are
# a token. Could `a·bc` be the token `abc` and `ab·c` something else? No. Take
# a stretch of a word whose two ends are still borders between parts after some
# number of merges. No merge so far has crossed these ends, so each merge did
# inside the stretch what it would have done had the stretch been a word of its
# own. How a stretch is divided at a given moment therefore depends on its
# bytes alone. (Where pairs overlap, as in `aaa`, the order from left to right
# keeps this true. If the left end is still a border after the merge, then the
# symbol before it was left alone or joined to *its* left neighbour; in both
# cases the search went on at the left end, as at the beginning of a word.)
# When the token `abc` was made from `a·bc`, every stretch `abc` that was two
# parts was those two, and all of them were joined. Two facts follow: no two
# tokens have the same bytes, and joining two parts never forms a pair of lower
# rank that was left behind. So (1.2.5) repeats the training merge by merge.
#
# ### The encoding as an object
#
# `encode_word` looks at a word of $n$ bytes up to $n$ times. We leave
# the work to **tiktoken**, OpenAI's encoder, which does the same much faster.
# It wants the expression, the ranks, and the **special
# tokens**, which no text can produce. We have one, `<|endoftext|>`: it stands
# before each document and tells the model that what follows has nothing to do
# with what came before. It takes the last number, as in GPT-2.


# %% the encoding object tags=["export"]
def from_tokens(name, tokens):
    """A tiktoken.Encoding of tokens in order of rank; EOT is among them,
    or comes after them."""
    import tiktoken  # not before it is needed: it takes time

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
    return from_tokens("byte", [bytes([i]) for i in range(256)])


# %% train an encoding tags=["export"]
def train(text, vocab_size):
    """Train a byte-level BPE and return it as a tiktoken.Encoding.

    text: a str, or an iterable of str (documents). vocab_size counts the 256
    bytes, the merges and `<|endoftext|>`, which is the last token: from 257
    to 65,536, so that a token fits into two bytes. The result depends on
    text and vocab_size alone. Raises ValueError when vocab_size is out of
    range or the text too small to fill it, TypeError when it is not str.
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
    return from_tokens(f"bpe-{vocab_size}", tokens)


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
# ## What it costs
#
# The two trainings on the same text, and few merges, for the slow one needs
# patience. The fast one counts once, and its merges cost little after that.

# %% slow against fast, timed tags=["nbval-ignore-output"]
with gzip.open("../../tests/data/library.jsonl.gz", "rt") as lines:
    library = [json.loads(line)["text"] for line in lines]
print(machine())
words = _count_words("".join(library)[:300_000])
for number in (10, 20, 40):
    start = time.perf_counter()
    slow = learn_slowly(words, number)
    middle = time.perf_counter()
    verdict(f"{number} merges", _learn(words, number) == slow, "equal")
    end = time.perf_counter()
    slow_time, fast_time = middle - start, end - middle
    print(f"  slow {slow_time:.2f} s, fast {fast_time:.2f} s")

# %% [markdown]
# The text is a part of Python's library. The slow time grows with the number
# of merges, a little less than in proportion, since words get shorter.
#
# ## Count it
#
# How large should a vocabulary be? A larger one makes shorter sequences, and
# the gain shrinks with every merge. Because the merges do not depend on how
# many we ask for, **one training holds all smaller ones**: the vocabulary of
# 512 is the first part of that of 4,096. So we train once, cut the list at
# several lengths, and measure bytes a token on text that the training did not
# see.

# %% vocabularies cut to size
seen, unseen = library[: len(library) // 2], "".join(library[-20:])
merges = spell(_learn(_count_words(seen), 4096 - 257))
sizes = [257, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]
density = []
for size in sizes:
    cut = from_tokens("cut", merges[: size - 1])
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
right.text(4096, share[-1] + 4, "tokens", color=BLUE, ha="right")
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
# *Figure 1.2.4. Text that the training did not see. Left: tokens
# grow longer with the vocabulary, and each doubling adds less than the last.
# Right: the tokens of a given text, and the pairs of positions that attention
# compares in it, as a percentage of what single bytes need: the first thousand
# tokens bring most of the saving.*
#
# The price is the token table, which has $V$ rows of $C$ numbers. At GPT-2's
# size, $C = 768$, 50,257 rows are 38.6 million parameters, near a third of the
# model's 124 million. At the size that a laptop trains in minutes, $C = 128$,
# a table of that height would outweigh all the rest; with $V = 1024$ it has
# 131,072 numbers. That is why [training](17_training.ipynb) uses a small
# vocabulary of its own.

# %% [markdown]
# ## Take away
#
# - UTF-8 turns every text into bytes, and 256 tokens can hold any of them. BPE
#   adds the most frequent pair, again and again.
# - A merge changes five counts around each place, and each place costs a
#   symbol: training is $O(S \log S)$ in the symbols of the distinct words,
#   however many merges there are.
# - Encoding repeats the merges in the order of rank. Decoding is a table.
# - The first thousand tokens bring most of the saving; the token table pays
#   for the rest.
#
# ## Design note
#
# Why cut the text into words first? Without the cut, the most frequent pairs
# would soon be the end of one word with the beginning of the next, `e␣t` and
# `,␣a`, and a common word would have a different spelling in tokens after
# every neighbour. The cut costs something too: ` of the` can never be one
# token, however often it comes. And it decides what a word is once and for
# all, by the rules of English. For a text in a language without spaces the
# expression cuts far too little.

# %% [markdown]
# ## Exercises
#
# **1** (★★). A token may end in the middle of a character: an emoji is four
# bytes. Write `stream_text(encoding, ids)`, which yields text as tokens come
# in and never half a character. The pieces together must be the text.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# Python's incremental decoder keeps the bytes of an unfinished character until
# the rest arrives. At the end it is told that nothing more will come; what is
# left over then was never a character, and U+FFFD stands for it.
# :::

# %% exercise 1, the function tags=["hide-cell"]
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


# %% exercise 1, checked
ids = enc.encode_ordinary("a 🙂 at 中")
pieces = list(stream_text(enc, ids))
print(len(ids), "tokens,", len(pieces), "pieces:", pieces)
whole = all(
    "".join(stream_text(enc, enc.encode_ordinary(t))) == t for t in texts
)
split_up = any("\ufffd" in piece for piece in pieces)
verdict("exercise 1", whole and not split_up, "nothing is split")

# %% [markdown]
# **2** (★★). A model with longer tokens has a larger loss a token, since each
# token says more. To compare models over different vocabularies, turn the loss
# into **bits a byte**. Write `bits_per_byte(loss, encoding, text)`, for a mean
# loss in nats a token ($\ln 2$ nats are a bit). A uniform guess over bytes,
# with loss $\ln 256$, must give 8.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# The loss of the whole text is the mean loss times the number of tokens.
# Divide by $\ln 2$ for bits and by the bytes of the text. The uniform guess
# over the larger vocabulary is the better one: a vocabulary that was trained
# on a text already knows something about it.
# :::

# %% exercise 2, the function tags=["hide-cell"]
import math


def bits_per_byte(loss, encoding, text):
    count = len(encoding.encode_ordinary(text))
    return loss / math.log(2) * count / len(text.encode("utf-8"))


# %% exercise 2, checked
eight = bits_per_byte(math.log(256), byte(), PASSAGE)
verdict("exercise 2", abs(eight - 8) < 1e-9, "ln 256 over bytes is 8")
uniform = bits_per_byte(math.log(enc.n_vocab), enc, PASSAGE)
print(f"a uniform guess over {enc.n_vocab} tokens: {uniform:.2f}")

# %% [markdown]
# **3** (★★★). `encode_word` is quadratic in the length of a word: it ranks
# every pair anew after each merge. Write `encode_long(word, ranks)` in $O(n
# \log n)$, with the linked list and the heap of this chapter.
#
# :::{admonition} Solution to exercise 3
# :class: dropdown
# Each entry of the heap holds the rank, the place and the two parts it was
# made for. An entry whose parts are gone is passed over. The separator at the
# end of the list is `None`, and so is a part that was merged away, which keeps
# either from pairing. Every merge offers two new pairs: at most $3n$ entries.
# :::


# %% exercise 3, the function tags=["hide-cell"]
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


# %% exercise 3, checked
rng = random.Random(5)
longs = [rng.choices(b" aehorst", k=rng.randint(1, 400)) for _ in range(50)]
same = all(
    encode_long(bytes(w), ranks) == encode_word(bytes(w), ranks) for w in longs
)
verdict("exercise 3", same, "equals encode_word")

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

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.2")
