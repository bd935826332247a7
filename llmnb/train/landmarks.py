# Written by `make export` from notebooks/1_by_hand/18_training.py: edit that file.

"""What counting alone pays for a text."""

__all__ = ["ngram_entropy", "unigram_entropy"]


# imports of the landmarks
from operator import index

import numpy as np

from llmnb.checks import check_tokens
from llmnb.shapes import check_number


# the unigram entropy
def unigram_entropy(train_tokens, tokens, vocab_size):
    """Mean -log p of `tokens` under the token frequencies of a text.

    train_tokens, tokens: 1-D integer arrays with values in [0, vocab_size).
    Every count is raised by 1. Returns nats a token, a float.

    Derived in chapter 1.18.
    """
    return ngram_entropy(train_tokens, tokens, vocab_size, 1)


# how often each row occurs
def _counts(text, asked, n, vocab_size):
    """How often each run of n tokens of `asked` occurs in `text`."""
    weights = vocab_size ** np.arange(n)[::-1]
    windows = np.lib.stride_tricks.sliding_window_view
    numbers = windows(text, n) @ weights
    known, counts = np.unique(numbers, return_counts=True)
    wanted = windows(asked, n) @ weights
    place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return np.where(known[place] == wanted, counts[place], 0)


# the probabilities of a table
def _ngram(text, asked, vocab_size, n, trust):
    """The probability of each token of `asked`, from n - 1 before it."""
    if n == 1:
        counts = np.bincount(text, minlength=vocab_size) + 1.0
        return (counts / counts.sum())[asked]
    shorter = _ngram(text, asked, vocab_size, n - 1, trust)
    # the context of a run is the run without its last token
    context = _counts(text[:-1], asked[:-1], n - 1, vocab_size)
    whole = _counts(text, asked, n, vocab_size)
    mixed = (whole + trust * shorter[n - 1 :]) / (context + trust)
    return np.concatenate([shorter[: n - 1], mixed])


# the entropy of a table
def _checked(name, tokens, vocab_size):
    tokens = np.asarray(tokens)
    if tokens.size:  # of no elements the type says nothing
        check_tokens(f"ngram_entropy: {name}", tokens, vocab_size)
    return tokens.astype(np.int64)


def ngram_entropy(train_tokens, tokens, vocab_size, n, trust=32):
    """Mean -log p of `tokens` under a table of n-grams of a text.

    train_tokens, tokens: 1-D integer arrays with values in [0, vocab_size).
    n: the length of a run, its last token being the predicted one; 1 looks at
    no context. trust: how often a context must have been seen to be trusted
    half. Returns nats a token. Raises TypeError or ValueError for anything
    else, and unless vocab_size ** n is below 2 ** 63.

    Derived in chapter 1.18.
    """
    vocab_size, n = index(vocab_size), index(n)  # NumPy's powers overflow
    check_number("ngram_entropy: n", n, "at least 1")
    check_number("ngram_entropy: trust", trust, "above 0")
    if vocab_size**n >= 2**63:
        raise ValueError(
            f"ngram_entropy: {vocab_size} ** {n} runs do not fit in an int64"
        )
    text = _checked("train_tokens", train_tokens, vocab_size)
    asked = _checked("tokens", tokens, vocab_size)
    if not asked.size:
        raise ValueError("ngram_entropy: tokens must hold at least one token")
    longest = max(1, min(n, len(text), len(asked)))  # of the runs there are
    p = _ngram(text, asked, vocab_size, longest, trust)
    return float(-np.log(p).mean())
