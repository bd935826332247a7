# Written by `make export` from notebooks/1_by_hand/17_training.py: edit that file.

"""What counting alone pays for a text."""

__all__ = [
    "unigram_entropy",
]


# imports of the landmarks
import numpy as np


# the unigram entropy
def unigram_entropy(train_tokens, tokens, vocab_size):
    """Mean -log p of `tokens` under the token frequencies of a text.

    train_tokens, tokens: 1-D integer arrays with values in [0, vocab_size).
    Every count is raised by 1. Returns nats a token, a float.

    Derived in chapter 1.17.
    """
    counts = np.bincount(train_tokens, minlength=vocab_size) + 1.0
    return float(-np.log(counts / counts.sum())[tokens].mean())
