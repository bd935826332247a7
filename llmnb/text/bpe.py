# Written by `make export` from notebooks/1_by_hand/02_tokens.py: edit that file.

"""Byte-pair encoding, learnt from a text: the tokens of GPT-2's kind."""

__all__ = ["byte", "from_tokens", "train"]


# imports of the tokenizer
import heapq
from collections import Counter

import regex


# how a text is cut into words
EOT = "<|endoftext|>"
WORDS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+"
    r"| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)


# count the words
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


# the words as linked symbols
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


# merge one pair everywhere
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


# the fast training
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


# the encoding object
def from_tokens(name, tokens):
    """A tiktoken.Encoding of tokens in order of rank; EOT is among them,
    or comes after them.

    Derived in chapter 1.2.
    """
    import tiktoken  # not before it is needed: it takes time

    ranks = {token: rank for rank, token in enumerate(tokens)}
    eot = ranks.pop(EOT.encode(), len(tokens))
    return tiktoken.Encoding(
        name, pat_str=WORDS, mergeable_ranks=ranks, special_tokens={EOT: eot}
    )


# bytes as tokens
def byte():
    """The encoding without merges: 256 bytes and `<|endoftext|>`.

    Returns a tiktoken.Encoding with 257 tokens; a byte is its own number.

    Derived in chapter 1.2.
    """
    return from_tokens("byte", [bytes([i]) for i in range(256)])


# train an encoding
def train(text, vocab_size):
    """Train a byte-level BPE and return it as a tiktoken.Encoding.

    text: a str, or an iterable of str (documents). vocab_size counts the 256
    bytes, the merges and `<|endoftext|>`, which is the last token: from 257
    to 65,536, so that a token fits into two bytes. The result depends on
    text and vocab_size alone. Raises ValueError when vocab_size is out of
    range or the text too small to fill it, TypeError when it is not str.

    Derived in chapter 1.2.
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
