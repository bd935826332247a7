# Written by `make export` from notebooks/14_generation.py: edit that file.

"""Write text by drawing tokens.

A trained model gives a distribution over the next token. Temperature, top-k
and top-p reshape it, a seeded draw picks one, and the loop repeats.
"""

__all__ = [
    "check_sampling",
    "decoded",
    "distribution",
    "draw",
    "generate",
]


# imports of the sampler
import codecs
import math

import numpy as np

from llmnb.checks import check_tokens


# one draw
def draw(probs, u):
    """The token that a number u in [0, 1) falls on, an int.

    probs: (V,), not negative, with a positive sum. A token of probability 0
    is never returned.

    Derived in chapter 14.
    """
    borders = np.cumsum(probs, dtype=np.float64)
    token = int(np.searchsorted(borders, u * borders[-1], side="right"))
    return min(token, int(np.flatnonzero(probs)[-1]))


# check the settings
def check_sampling(temperature, top_k, top_p):
    """Raise ValueError unless these can shape a distribution.

    temperature: at least 0. top_k: None or a whole number of at least 1.
    top_p: None or a number above 0 and at most 1.

    Derived in chapter 14.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if top_k is not None and (top_k != int(top_k) or top_k < 1):
        raise ValueError(
            f"top_k must be a whole number of at least 1, got {top_k}"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")


# the distribution we draw from
def distribution(logits, temperature=1.0, top_k=None, top_p=None):
    """The probabilities a token is drawn with, a float64 array (V,).

    logits: (V,), of any float dtype. Temperature 0 leaves the largest logit
    alone, and the first of equals. Then top_k keeps the k most probable
    tokens, and top_p the fewest of those whose sum reaches p. Raises
    ValueError for settings out of range and when a logit is not a number.

    Derived in chapter 14.
    """
    check_sampling(temperature, top_k, top_p)
    z = np.asarray(logits, np.float64)
    if not np.isfinite(z.max()) or np.isnan(z).any():
        raise ValueError("the logits are not finite: the model is damaged")
    order = np.argsort(-z, kind="stable")
    if temperature == 0:
        return _only(order[:1], np.ones(1), len(z))
    kept = order[:top_k]
    p = np.exp((z[kept] - z[kept[0]]) / temperature)
    p /= p.sum()
    if top_p is not None:
        before = np.cumsum(p) - p
        count = max(1, int((before < top_p).sum()))
        kept, p = kept[:count], p[:count] / p[:count].sum()
    return _only(kept, p, len(z))


# probabilities in their places
def _only(tokens, probs, size):
    out = np.zeros(size)
    out[tokens] = probs
    return out


# the loop
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

    model: a GPT2; row 0 of its batch is used, so a batch size of 1 wastes
    nothing. tokens: a sequence of at least one int in [0, V). temperature,
    top_k, top_p: as in `distribution`. seed: of the draws, in [0, 2**32).
    stop: a token that ends the text and is not yielded. Raises ValueError
    for a value out of range, before anything is computed.

    Derived in chapter 14.
    """
    check_sampling(temperature, top_k, top_p)
    if not len(tokens):
        raise ValueError("generate: tokens must hold at least one token")
    check_tokens("generate: tokens", np.array(tokens), model.cfg.vocab_size)
    if count < 0:
        raise ValueError(f"generate: count must be at least 0, got {count}")
    rng = np.random.RandomState(seed)
    settings = temperature, top_k, top_p
    return _continue(model, list(tokens), count, settings, rng, stop)


# window by window
def _continue(model, text, count, settings, rng, stop):
    T = model.seq_len
    window = np.zeros((model.batch_size, T), np.int32)
    for _ in range(count):
        last = text[-T:]
        window[0, : len(last)] = last
        model.forward(window)
        probs = distribution(model.logits[0, len(last) - 1], *settings)
        token = draw(probs, rng.random_sample())
        if token == stop:
            return
        text.append(token)
        yield token


# tokens become text
def decoded(encoding, tokens):
    """Yield the text of an iterable of tokens, piece by piece.

    encoding: a tiktoken.Encoding. Bytes that form no character become the
    replacement character, at the latest at the end.

    Derived in chapter 14.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        piece = decoder.decode(encoding.decode_single_token_bytes(token))
        if piece:
            yield piece
    piece = decoder.decode(b"", final=True)
    if piece:
        yield piece
