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
# *Reading time: 29 minutes. You need: Python, and
# [chapter 1.1](01_learns.ipynb) for what a vocabulary is.*
#
# ## Where we are
#
# A language model reads [tokens](../../book/glossary.md#term-token), whole
# numbers below the size $V$ of its
# [vocabulary](../../book/glossary.md#term-vocabulary), and predicts the next.
# In [chapter 1.1](01_learns.ipynb) a token was a letter. In GPT-2 it is a
# piece of text, and the text itself suggests the pieces.

# %% where we are
from llmnb.book.diagram import PALETTE, gpt2_diagram

gpt2_diagram(lit="tokens")

# %% [markdown]
# *Figure 1.2.1. GPT-2's forward pass with this chapter's boxes lit: text
# enters at the top left and becomes tokens before any arithmetic begins.*
#
# At the end you can
#
# - find the pieces of one line of text by hand, and say why each was chosen;
# - say why the fast training finds the same pieces as the slow one, and what
#   each costs;
# - encode any text, and any bytes, and get them back;
# - say what a larger vocabulary saves, and what it costs.
#
# ## Setup

# %% setup
import gzip
import json
import random

import matplotlib.pyplot as plt

from llmnb.book.moving import moving
from llmnb.book.verify import verdict

with gzip.open("../../tests/data/library.jsonl.gz") as lines:
    library = [json.loads(line)["text"] for line in lines]

# %% [markdown]
# ## By hand
#
# ### From characters to bytes
#
# Unicode has more than 150,000 characters. A vocabulary with a number for each
# would spend most of its entries on those that the training text never shows.
#
# UTF-8 writes each character as one to four *bytes*, numbers from 0 to 255. So
# 256 numbers are enough for every text there is. The first 128 characters,
# those of English and Python code, take one byte each. Unicode numbers its
# characters, and writes the numbers to base 16: `U+0061` is 97.

# %% characters and their bytes
for char in "aé€🙂":
    code, raw = f"U+{ord(char):04X}", char.encode("utf-8")
    print(f"{code:<8} {len(raw)} byte(s): {list(raw)}")

# %% [markdown]
# Bytes alone make a complete vocabulary with $V = 256$. Its fault is the
# length of the sequences: a model that looks at $T$ tokens then sees $T$ bytes
# of the past. Longer tokens let the same $T$ reach further back.
#
# ### Merging by hand
#
# [Byte-pair encoding](../../book/glossary.md#term-BPE-byte-pair-encoding), BPE
# for short, starts from bytes and gives the most frequent pair of neighbours a
# token of its own, again and again. Each time is a
# [merge](../../book/glossary.md#term-merge). Take one line:
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
# | 1 | `s` `h` | 4 | `sh`, 256 | `h·u·sh` `␣·r·u·sh·e·s` `␣·b·r·u·sh` ... |
# | 2 | `u` `sh` | 4 | `ush`, 257 | `h·ush` `␣·r·ush·e·s` `␣·b·r·ush` ... |
# | 3 | `␣` `t` | 3 | `␣t`, 258 | `␣t·h·e` `␣t·h·r·ush` ... |
# | 4 | `r` `ush` | 3 | `rush`, 259 | `␣·rush·e·s` `␣·b·rush` `␣t·h·rush` |
# | 5 | `␣t` `h` | 3 | `␣th`, 260 | `␣th·e` `␣th·rush` |
#
# The new tokens are numbered behind the bytes. In merges 3 and 4 several pairs
# share the first place and the lower number decides again: a blank is 32, `r`
# is 114, and `␣t` is 258. In merge 5 only one pair is left that comes three
# times. Counts change as we merge: `he` stood in three words, and after merge
# 1 in two, since the `h` of `rushes` now belongs to `sh`.
#
# ## Train
#
# ### Cut the text into words
#
# GPT-2 cuts with one regular expression. An apostrophe ending (`'s`, `'ll`) is
# a piece; so is a run of letters, a run of digits, or a run of other signs,
# each with one space before it if there is one; so is a run of blanks, which
# leaves its last blank to the piece that follows. Nothing is dropped. We call
# a piece a **word**. The expression needs Unicode classes (`\p{L}`: any
# letter, `\p{N}`: any digit), which the `regex` package has and Python's own
# `re` has not. `\s` is any blank, a line's end too, and `\S` any other sign;
# `(?!\S)` demands that no such sign follows, so `\s+` before it gives back one
# blank. A word takes that blank if it is a space; otherwise the last `\s+`
# makes it a piece. Of three spaces before 42, two are a piece, and the third
# begins the word ` 42`.

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
# words there are and how often each stands in the text.


# %% count the words tags=["exporti"]
def _count_words(text):
    """How often each word stands in a text or an iterable of texts."""
    counts = Counter()
    whole = isinstance(text, (str, bytes))  # bytes are refused, not their ints
    for document in [text] if whole else text:
        if not isinstance(document, str):
            kind = type(document).__name__
            raise TypeError(f"train: text must be str, got {kind}")
        counts.update(regex.findall(WORDS, document))
    return {word.encode("utf-8"): n for word, n in counts.items()}


# %% [markdown]
# ### The slow way, which is the definition
#
# Let each distinct word stand $n_\text{word}$ times in the text, as a row of
# symbols, which are bytes at first. The pair of symbols $a$ and $b$ stands in
# the text
#
# $$ n(a,b) = \sum_\text{words} n_\text{word} \cdot \#_\text{word}(a,b)
#    \tag{1.2.1} $$
#
# times, where $\#_\text{word}(a,b)$ counts the places in the word at which $a$
# stands before $b$. The pair with the largest count gets the next token, the
# lowest numbers deciding a tie. That is the pair whose triple (1.2.2) is
# least, if triples are compared as Python does, by their first entries first:
#
# $$ (a,b)^\ast = \arg\min_{\text{pairs}} \bigl(-n(a,b),\; a,\; b\bigr) \tag{1.2.2} $$
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


def learn_slowly(words, number):
    symbols, merges = {tuple(w): n for w, n in words.items()}, []
    for new in range(256, 256 + number):
        count = Counter()
        for word, n in symbols.items():
            for pair in zip(word, word[1:], strict=False):
                count[pair] += n  # (1.2.1)
        if not count:
            break  # every word is one symbol
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


words = _count_words(line)
print(words)
slow = learn_slowly(words, 5)
print(slow)
print(spell(slow)[256:])

# %% [markdown]
# Each merge recounts every pair of every word, though hardly any count has
# changed.
#
# ### The fast way: change only what changes
#
# Figure 1.2.2 shows one occurrence of a pair between its neighbours, in a word
# that stands $n_\text{word}$ times, before and after the merge.

# %% draw pieces tags=["hide-input"]
BLUE, GREY, ORANGE = PALETTE["blue"], PALETTE["pale"], PALETTE["orange"]


def draw_pieces(ax, y, pieces, colours, width=None):
    x, style = 0, {"ha": "center", "va": "center", "size": 11}
    for piece, colour in zip(pieces, colours, strict=True):
        w = width or len(piece)
        look = {"fc": colour, "ec": PALETTE["grey"]}
        box = plt.Rectangle((x + 0.05, y - 0.36), w - 0.1, 0.72, **look)
        ax.add_patch(box)
        ink = "white" if colour in (BLUE, ORANGE) else PALETTE["ink"]
        ax.text(x + w / 2, y, piece, color=ink, **style)
        x += w if width is None else 2


# %% one symbol taken out, drawn tags=["hide-input"]
def draw_links(ax, y, chain):
    """An arrow to the next symbol, and one back, along a chain of places."""
    for i, j in zip(chain, chain[1:], strict=False):
        bend, a, b = -0.42 * (j > i + 1), 2 * i + 1.15, 2 * j + 0.05
        way = {"connectionstyle": f"arc3,rad={bend}", "shrinkA": 0}
        look = way | {"arrowstyle": "-|>", "lw": 1.3, "shrinkB": 0}
        there, back = (look | {"color": PALETTE[c]} for c in LINKS)
        ax.annotate("", (b, y + 0.15), (a, y + 0.15), arrowprops=there)
        ax.annotate("", (a, y - 0.15), (b, y - 0.15), arrowprops=back)


fig, ax = plt.subplots(figsize=(8, 2.7), dpi=100)
LINKS, before = ("green", "purple"), [GREY, BLUE, BLUE, GREY, "white"]
after = [GREY, ORANGE, "white", GREY, "white"]
draw_pieces(ax, 2, ["a", "b", "c", "d", "−1"], before, width=1.2)
draw_pieces(ax, 0, ["a", "bc", "−2", "d", "−1"], after, width=1.2)
draw_links(ax, 2, range(5))
draw_links(ax, 0, [0, 1, 3, 4])
for y, when, counts in ((2, "before", "(a,b)  (b,c)  (c,d)  fall"),
                        (0, "after", "(a,bc)  (bc,d)  rise")):  # fmt: skip
    ax.text(-0.3, y, when, ha="right", va="center", size=11)
    ax.text(9.8, y, counts, va="center", size=11)
ax.set(xlim=(-1.6, 14), ylim=(-1.1, 2.7))
ax.axis("off")
fig.subplots_adjust(0, 0, 1, 1)
plt.show()

# %% [markdown]
# *Figure 1.2.2. The word abcd and the border behind it (−1), before and after
# the merge of b and c. Green arrows lead to the next symbol, purple ones back.
# Nothing moves: the symbol that is taken out (−2) keeps its place, and its
# neighbours point past it. Five counts change and no others (fewer where the
# pair begins or ends its word).*
#
# $$
# \begin{aligned}
# n(a,b),\; n(c,d) &\mathrel{-}= n_\text{word} , \\
# n(a,bc),\; n(bc,d) &\mathrel{+}= n_\text{word} , \\
# n(b,c) &= 0
# \end{aligned}
# \tag{1.2.4}
# $$
#
# The last holds when every occurrence of the pair has been merged; the others
# are for one of them. So we keep the counts, and for each pair a list of the
# places where it stands. The words lie end to end in one list, parted by $-1$,
# and each symbol knows the next, the previous one, and the $n_\text{word}$ of
# its word, its `weight`. A symbol that was merged into its left neighbour is
# marked $-2$. The list ends with $-1$, which Python's index $-1$ finds: the
# first symbol, too, has a border on its left.


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
# `drop` leaves the place in its list. When the pair's turn comes we pass on
# where it no longer stands. The places are visited in order, so that `aaa`
# becomes `aa·a` here too. Both pairs are dropped before anything changes,
# since `drop` looks at the symbols as they stand.


# %% merge one pair everywhere tags=["exporti"]
def _merge(symbols, pair, new):
    """Put `new` in place of `pair` everywhere; return the pairs it forms."""
    ids, following, before = symbols.ids, symbols.next, symbols.prev
    formed = set()
    for i in sorted(symbols.where.pop(pair)):
        j = following[i]
        if (ids[i], ids[j]) != pair:
            continue
        left, right = before[i], following[j]
        symbols.drop(left)
        symbols.drop(j)
        ids[i], ids[j] = new, -2
        following[i], before[right] = right, i
        formed |= {symbols.add(left), symbols.add(i)}
    del symbols.count[pair]
    return formed - {None}


# %% [markdown]
# The pair with the largest count comes from a *heap*, a list that yields its
# smallest entry in a time that grows as the logarithm of its length. Its
# entries are $(-n(a,b),\,(a,b))$, which is the order of (1.2.2). Counts of old
# pairs can only fall, because every pair that a merge forms has the new token
# in it. So an entry may promise too much, never too little. If the one at the
# top does, we put it back with its true count. The first true one is the
# largest: the others promise no more, and hold no more than they promise.


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


# %% [markdown]
# What does it cost? A merge at one place removes one symbol for good. So there
# are fewer such places than symbols at the start, *in the whole of the
# training, however many merges we ask for*. Each adds at most two places to
# the lists and makes at most two promises false, each of which is put back
# once. With $S$ symbols in the distinct words the heap is asked a few times
# $S$ times. So the whole costs at most a constant times $S \log S$, for which
# one writes $O(S \log S)$, where the slow way costs $O(S)$ for each merge. The
# logarithm is that of the heap, and of sorting the places.
#
# Does it find the same merges? Here are 200 small texts over few letters, made
# so that pairs overlap (`aaaa`) and counts tie. Both are asked for more merges
# than the text has, and must end at the same one.


# %% fast against slow
def random_text(rng, letters, longest):
    return "".join(rng.choices(letters, k=rng.randint(1, longest)))


rng, agree = random.Random(1), []
for _ in range(200):
    words = _count_words(random_text(rng, "aab. \n", 200))
    agree.append(_learn(words, 999) == learn_slowly(words, 999))
verdict("merges", all(agree), "fast equals slow, 200 texts")

# %% [markdown]
# ## Encode and decode
#
# Training leaves a list of tokens in the order in which they were made, the
# single bytes first. A token's place in that list is its **rank**, and its
# rank is its number.
#
# To encode a word, repeat the merges in the order of training: among all
# neighbours whose bytes together are a token, join those of lowest rank, the
# leftmost first, until none is left.
#
# $$
# i^\ast = \arg\min_i \bigl(\mathrm{rank}(
# \text{part}_i\,\text{part}_{i+1}),\; i\bigr) \tag{1.2.5}
# $$
#
# The least is taken over the $i$ for which there is such a token.


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
# The first three are the bytes of `the`, which no merge has joined: the `␣the`
# of training had a blank before it. ` thrush` is 260, 259, as in figure 1.2.3.
#
# Decoding is a table: the bytes of the tokens, one after the other. It undoes
# encoding, because no merge changes a byte.


# %% one word, merge by merge tags=["hide-input"]
def stages(word, ranks):
    for limit in range(255, max(ranks.values()) + 1):
        known = {x: r for x, r in ranks.items() if r <= limit}
        names = {r: x for x, r in known.items()}
        parts = [names[i] for i in encode_word(word, known)]
        yield [p.decode("utf-8").replace(" ", "␣") for p in parts]


fig, ax = plt.subplots(figsize=(7, 3.6), dpi=100)
rows = list(stages(b" thrush", ranks))
for y, row in enumerate(rows):
    merged = [BLUE if p in rows[y - 1] else ORANGE for p in row]
    pairs = zip(row, merged, strict=True)
    draw_pieces(ax, -y, row, [m if len(p) > 1 else GREY for p, m in pairs])
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
# number of merges. A merge takes borders away and makes none, so they were
# borders all the time: no merge so far has crossed them, and each did inside
# the stretch what it would have done in a word of its own. How a stretch is
# divided at a given moment therefore depends on its bytes alone. (Where pairs
# overlap, as in `aaa`, the order from left to right keeps this true. If the
# left end is still a border after the merge, then the symbol before it was
# left alone or joined to *its* left neighbour; in both cases the search went
# on at the left end, as at the beginning of a word.) When the token `abc` was
# made from `a·bc`, every stretch `abc` between two borders was divided so, and
# all of them were joined. From then on such a stretch is one part, for its
# ends were borders then too. Two facts follow. No two tokens have the same
# bytes. And after the merge that made token $r$ no two parts side by side have
# its bytes, so that no later join leaves a pair of lower rank behind. So
# (1.2.5) repeats the training merge by merge.
#
# ### The encoding as an object
#
# We leave the work to **tiktoken**, OpenAI's encoder, which does the same as
# `encode_word`, much faster. It wants the expression, the ranks, and the
# *special tokens*, which no text can produce. We have one, `<|endoftext|>`: it
# stands before each document ([chapter 1.3](03_batches.ipynb)) and takes the
# last number, as in GPT-2.


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
    if vocab_size not in range(257, 65537):
        raise ValueError(
            f"train: vocab_size must be a whole number in [257, 65536], "
            f"got {vocab_size!r}"
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
# A passage to train on, and the fourteen tokens that come first: ` the` with
# its space is the third already. Then a sentence, cut by `tiktoken`; its
# `encode_ordinary` takes a text for nothing but text, and makes no special
# token of it:

# %% a passage to train on
PASSAGE = """\
The harbour wakes before the town. Ropes creak, gulls argue over the wall,
and the first boats slide out past the lighthouse with their lamps still lit.
An old man counts them as they go. He has counted them for thirty years, and
he has never written a number down. "Seventeen," he says to the dog, and the
dog, who has heard larger numbers, goes back to sleep.
"""
enc = train(PASSAGE, 400)
tokens = [enc.decode_single_token_bytes(i) for i in range(enc.n_vocab)]
print(tokens[256:270])
ids = enc.encode_ordinary("The old man has never heard of the town.")
print("|".join(tokens[i].decode() for i in ids))

# %% [markdown]
# ## Proof
#
# Three claims. Our encoder and `tiktoken` agree on any text; decoding undoes
# encoding for any text; and for any bytes at all, whether they are UTF-8 or
# not. The texts are drawn at random from letters, blanks, digits, accents,
# Chinese characters, emoji, and the words of the passage; the bytes are those
# of tokens drawn at random. (At characters that Unicode has added of late the
# two may cut differently: each has its own table of letters, of its own year.)

# %% encode, decode
PIECES = [*"aehnorst  .,'\n\t0123éñß中文字🙂🚢€"]
PIECES += regex.findall(WORDS, PASSAGE)
rng = random.Random(2)
ranks = {token: rank for rank, token in enumerate(tokens[:-1])}
texts = [random_text(rng, PIECES, 80) for _ in range(500)]
raws = [b"".join(rng.choices(tokens[:-1], k=20)) for _ in range(500)]

same = all(encode(t, ranks) == enc.encode_ordinary(t) for t in texts)
verdict("encode", same, "ours equals tiktoken's")
back = all(enc.decode(enc.encode_ordinary(t)) == t for t in texts)
verdict("text", back, "decode(encode(x)) == x")
back = all(enc.decode_bytes(encode_word(r, ranks)) == r for r in raws)
verdict("bytes", back, "decode(encode(x)) == x")

# %% [markdown]
# ## Count it
#
# How large should a vocabulary be? A larger one makes shorter sequences, and
# the gain shrinks with every merge. Because the merges do not depend on how
# many we ask for, **one training holds all smaller ones**. So we train once on
# Python's library, cut the list at several lengths, and measure bytes a token
# on text that the training did not see.

# %% vocabularies cut to size
seen, unseen = library[: len(library) // 2], "".join(library[-20:])
pairs = _learn(_count_words(seen), 4096 - 257)
merges = spell(pairs)
sizes = [257, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]
density = []
for size in sizes:
    cut = from_tokens("cut", merges[: size - 1])
    count = len(cut.encode_ordinary(unseen))
    density.append(len(unseen.encode("utf-8")) / count)
print(f"with 1,024 tokens {density[4]:.2f} bytes a token")
part = (1 - 1 / density[4]) / (1 - 1 / density[-1])
verdict("1,024 tokens", part > 0.8, "over four fifths of the saving")

# %% the saving, drawn tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7, 3.4), dpi=100)
share = [100 / d for d in density]
ax.plot(sizes, share, "o-", color=BLUE)
ax.plot(sizes, [x * x / 100 for x in share], "s--", color=ORANGE)
ax.text(4200, share[-1] + 4, "tokens", color=BLUE, ha="right")
ax.text(300, 14, "pairs of positions", color=ORANGE)
ax.set(ylabel="percent of what bytes need", ylim=(0, 105))
ax.set(xscale="log", xlabel="size of the vocabulary")
ax.set_xticks([256, 1024, 4096], ["256", "1,024", "4,096"])
ax.minorticks_off()
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.2.4. Text that the training did not see: its tokens, and the pairs
# of positions in it, as a percentage of what single bytes need. The first
# thousand tokens bring more than four fifths of what four thousand save.*

# %% one line in five vocabularies tags=["hide-input"]
mine, heights = "A tokenizer's mistakes: 1234 naïve bytes", sizes[::2]
fig, ax = plt.subplots(figsize=(8, 2.6), dpi=100)
for y, size in enumerate(heights):
    known = {token: rank for rank, token in enumerate(merges[: size - 1])}
    ids = encode(mine, known)
    row = [merges[i].decode("utf-8", "replace") for i in ids]
    row = [piece.replace(" ", "␣").replace("�", "·") for piece in row]
    colours = [BLUE if len(piece) > 1 else GREY for piece in row]
    draw_pieces(ax, -y, row, colours)
    ax.text(-0.4, -y, f"{size:,}", ha="right", va="center", size=11)
    ax.text(42.4, -y, f"{len(ids)} tokens", va="center", size=11)
ax.set(xlim=(-4, 50), ylim=(-len(heights) + 0.5, 0.6))
ax.axis("off")
fig.subplots_adjust(0, 0, 1, 1)
plt.show()
moving(
    "merges", "one line in five vocabularies, merge by merge",
    pairs=" ".join(f"{a} {b}" for a, b in pairs),
    words=WORDS, text=mine, sizes=heights,
)  # fmt: skip

# %% [markdown]
# *Figure 1.2.5. One line in vocabularies of five sizes, learnt from Python's
# library. A larger vocabulary goes on where a smaller one ends, for the merges
# are the same: common pieces are whole soon, and what the library never says
# stays in bytes.*
#
# Why does figure 1.2.4 count pairs of positions? GPT-2 compares each token
# with all before it ([chapter 1.8](08_attention.ipynb)): half the tokens are a
# quarter of the pairs.
#
# The price is the token table: the model has a row of $C$ numbers for each of
# the $V$ tokens ([chapter 1.5](05_encoder.ipynb)). At GPT-2's size, $C = 768$,
# 50,257 rows are 38.6 million parameters, nearly a third of the model's 124
# million. At the size that a laptop trains in minutes, $C = 128$, a table of
# that height would outweigh all the rest. That is why [chapter
# 1.18](18_training.ipynb) trains with a small vocabulary of its own.
#
# ## Take away
#
# - 256 bytes can write any text. BPE adds the most frequent pair, again and
#   again.
# - A merge changes five counts around each place, and each place costs a
#   symbol: training is $O(S \log S)$, however many merges there are.
# - Encoding repeats the merges in the order of rank. Decoding is a table.
# - The first thousand tokens bring most of the saving; each costs a row of the
#   token table.
#
# ## Design note
#
# Why cut the text into words first? Without the cut, the most frequent pairs
# would soon be the end of one word with the beginning of the next, such as
# `s␣` and `,␣a`, and a common word would have a different spelling in tokens
# after every neighbour. And training would have the whole text to go through,
# not each distinct word once. The cut costs something too: ` of the` can never
# be one token, however often it comes, and in a language without spaces the
# expression cuts far too little.
#
# ## Exercises
#
# **1** (★). Which pair is merged sixth in the line about the thrush, and how
# often does it come?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# After five merges the words are `h·ush`, `,`, twice `␣th·e`, `␣·rush·e·s`,
# `␣·b·rush` and `␣th·rush`. Only `␣th` `e` comes twice, so it becomes ` the`.
# :::

# %% exercise 1, checked tags=["hide-cell"]
words = _count_words(line)
sixth = spell(learn_slowly(words, 6))[-1]
verdict("exercise 1", sixth == b" the", "␣the")
times = sum(n for word, n in words.items() if sixth in word)
verdict("exercise 1", times == 2, "comes twice")

# %% [markdown]
# **2** (★★). A tempting encoder takes the longest token that the text begins
# with, and goes on behind it. Write it. Which of the three claims does it
# fail, and why does that matter?
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# The first: its tokens are not tiktoken's. They decode to the same text and the
# same bytes, so it passes the other two. It matters because a model trained on
# the tokens of one encoder would be shown sequences that it never saw.
# :::


# %% exercise 2, the greedy encoder tags=["hide-cell"]
def encode_greedily(text, ranks):
    out, raw = [], text.encode("utf-8")
    while raw:
        size = max(n for n in range(1, len(raw) + 1) if raw[:n] in ranks)
        out.append(ranks[raw[:size]])
        raw = raw[size:]
    return out


# %% exercise 2, checked
greedy = [encode_greedily(t, ranks) for t in texts]
back = all(enc.decode(g) == t for g, t in zip(greedy, texts, strict=True))
verdict("greedy", back, "decode(encode(x)) == x")
wrong = [enc.encode_ordinary(t) for t in texts] != greedy
verdict("greedy", wrong, "is caught by the first claim")

# %% [markdown]
# ## Further reading
#
# - Philip Gage, "A New Algorithm for Data Compression", *The C Users Journal*,
#   1994: where it began, as a way to compress files.
# - Rico Sennrich, Barry Haddow and Alexandra Birch, [Neural Machine
#   Translation of Rare Words with Subword
#   Units](https://arxiv.org/abs/1508.07909), 2016: section 3.2 brought it to
#   language models.
# - Alec Radford and others, "Language Models are Unsupervised Multitask
#   Learners", 2019: section 2.2, why GPT-2 merges bytes and cuts the text
#   first.
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.2")
