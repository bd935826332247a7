# Written by `make export` from notebooks/1_by_hand/19_writing.py: edit that file.

"""Text from a model: temperature, top-k, top-p, and the loop."""

__all__ = [
    "check_sampling", "decoded", "distribution", "draw", "generate",
    "generate_samples", "window_logits", "window_start",
]


# imports of the sampler
import codecs
import math
from functools import partial
from numbers import Integral, Real

import numpy as np

from llmnb.checks import check_tokens


# one draw
def draw(probs, u):
    """The token that a number u in [0, 1) falls on, an int.

    probs: (V,), not negative, with a positive sum. A token of probability 0
    is never returned.

    Derived in chapter 1.19.
    """
    borders = np.cumsum(probs, dtype=np.float64)
    token = int(np.searchsorted(borders, u * borders[-1], side="right"))
    return min(token, int(np.flatnonzero(probs)[-1]))


# check the settings
def check_sampling(temperature, top_k, top_p):
    """Raise ValueError unless these can shape a distribution.

    temperature: at least 0 and finite. top_k: None or a whole number of at
    least 1. top_p: None or a number above 0 and at most 1.

    Derived in chapter 1.19.
    """
    if not isinstance(temperature, Real) or not 0 <= temperature < math.inf:
        raise ValueError(
            f"temperature must be at least 0 and finite, got {temperature!r}"
        )
    k, p = (1 if x is None else x for x in (top_k, top_p))
    if not isinstance(k, Real) or k % 1 != 0 or k < 1:
        raise ValueError(
            f"top_k must be a whole number of at least 1, got {k!r}"
        )
    if not isinstance(p, Real) or not 0 < p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {p!r}")


# the largest, in order
def _above(x, count):
    """Places of the `count` largest numbers, and of what equals the last."""
    if count >= len(x):
        return np.arange(len(x))
    return np.flatnonzero(x >= np.partition(x, -count)[-count])


def _largest(x, count):
    """Places of the largest numbers, downwards; of equals the first."""
    found = _above(x, count)
    return found[np.argsort(-x[found], kind="stable")][:count]


def _nucleus(p, top_p):
    """Places of the fewest probabilities whose sum reaches top_p."""
    count = 64
    while count < len(p) and p[_above(p, count)].sum() < top_p:
        count *= 8
    order = _largest(p, max(count, len(_above(p, count))))
    before = np.cumsum(p[order]) - p[order]
    return order[: max(1, int((before < top_p).sum()))]


# the distribution we draw from
def distribution(logits, temperature=1.0, top_k=None, top_p=None):
    """The probabilities a token is drawn with, a float64 array (V,).

    logits: (V,), of any float dtype. Temperature 0 leaves the largest logit
    alone, and the first of equals. Then top_k keeps the k most probable
    tokens, and top_p the fewest of those whose sum reaches p. Raises
    ValueError for settings out of range, for logits of another shape and
    when one is not a number.

    Derived in chapter 1.19.
    """
    check_sampling(temperature, top_k, top_p)
    z = np.asarray(logits, np.float64)
    if z.ndim != 1 or not z.size:
        raise ValueError(f"the logits must have shape (V,), got {z.shape}")
    if not np.isfinite(z.max()) or np.isnan(z).any():
        raise ValueError("the logits are not finite: the model is damaged")
    if temperature == 0:
        return _only([np.argmax(z)], 1.0, len(z))
    kept = np.arange(len(z)) if top_k is None else _largest(z, int(top_k))
    with np.errstate(over="ignore"):  # to -inf, by a temperature near 0
        p = np.exp((z[kept] - z.max()) / temperature)
    p /= p.sum()
    if top_p is not None:
        chosen = _nucleus(p, top_p)
        kept, p = kept[chosen], p[chosen] / p[chosen].sum()
    return _only(kept, p, len(z))


# probabilities in their places
def _only(tokens, probs, size):
    out = np.zeros(size)
    out[tokens] = probs
    return out


# where the window begins
def window_start(length, T):
    """The first of `length` tokens that a model of T positions still sees.

    0 as long as all fit; then it moves on by half a window at a time.

    Derived in chapter 1.19.
    """
    half = (T + 1) // 2
    return max(0, -(-(length - T) // half) * half)


# what follows some texts
def window_logits(model, texts):
    """The logits (N, V) of the token that follows each of N texts.

    model: a GPT2. texts: lists of tokens of one length, 1 to model.seq_len.
    Everything is computed anew, for batch_size texts at a time. Raises
    ValueError for a text of another length.

    Derived in chapter 1.19.
    """
    found = []
    for i in range(0, len(texts), model.batch_size):
        rows = np.array(texts[i : i + model.batch_size])
        count, length = rows.shape
        if not 1 <= length <= model.seq_len:
            raise ValueError(
                f"window_logits: a text must have 1 to {model.seq_len} "
                f"tokens, got {length}"
            )
        window = np.zeros((model.batch_size, model.seq_len), np.int32)
        window[:count, :length] = rows
        model.forward(window)
        found.append(model.logits_at(length - 1)[:count])
    return np.concatenate(found)


# the loop
def _check_whole(name, value, least):
    if not isinstance(value, Integral) or value < least:
        raise ValueError(
            f"generate: {name} must be a whole number of at least {least}, "
            f"got {value!r}"
        )


def generate_samples(
    model,
    tokens,
    count,
    samples,
    temperature=1.0,
    top_k=None,
    top_p=None,
    *,
    seed=42,
    stop=None,
):
    """An iterator over steps in which several texts continue `tokens`.

    model: a GPT2, or another object with cfg, seq_len and a method
    following(texts), such as a Decoder. tokens: a sequence of at least one
    int in [0, V). count: the most steps. temperature, top_k, top_p: as in
    `distribution`. seed: in [0, 2**32); text i draws with seed + i, so it
    does not depend on how many there are. stop: a token that ends a text.
    Each step is a list of `samples` tokens, with None for a text that has
    ended. Raises ValueError for a value out of range, before anything is
    computed.

    Derived in chapter 1.19.
    """
    check_sampling(temperature, top_k, top_p)
    tokens = np.array(tokens)
    if not tokens.size:
        raise ValueError("generate: tokens must hold at least one token")
    check_tokens("generate: tokens", tokens, model.cfg.vocab_size)
    if tokens.ndim != 1:
        raise ValueError(
            f"generate: tokens must have shape (n,), got {tokens.shape}"
        )
    _check_whole("count", count, 0)
    _check_whole("samples", samples, 1)
    if not isinstance(seed, Integral) or not 0 <= seed < 2**32:
        raise ValueError(
            f"generate: seed must be a whole number in [0, 2**32), "
            f"got {seed!r}"
        )
    settings = temperature, top_k, top_p
    texts = [tokens.tolist() for _ in range(samples)]
    seeds = [(int(seed) + i) % 2**32 for i in range(samples)]
    return _continue(model, texts, count, settings, seeds, stop)


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

    It ends before `stop`. The arguments are those of `generate_samples`,
    and so is what it raises. A GPT2's batch size of 1 wastes nothing.

    Derived in chapter 1.19.
    """
    steps = generate_samples(
        model, tokens, count, 1, temperature, top_k, top_p,
        seed=seed, stop=stop,
    )  # fmt: skip
    return (step[0] for step in steps)


# step by step
def _continue(model, texts, count, settings, seeds, stop):
    following = getattr(model, "following", partial(window_logits, model))
    streams = [np.random.RandomState(seed) for seed in seeds]
    ended = [False] * len(texts)
    for _ in range(count):
        first = window_start(len(texts[0]), model.seq_len)
        logits = following([text[first:] for text in texts])
        for i, text in enumerate(texts):
            token = stop
            if not ended[i]:
                probs = distribution(logits[i], *settings)
                token = draw(probs, streams[i].random_sample())
                ended[i] = token == stop
            text.append(token)
        if all(ended):
            return
        pairs = zip(texts, ended, strict=True)
        yield [None if over else text[-1] for text, over in pairs]


# tokens become text
def decoded(encoding, tokens):
    """Yield the text of an iterable of tokens, piece by piece.

    encoding: a tiktoken.Encoding. Bytes that form no character become the
    replacement character, at the latest at the end; so does a token that
    the encoding has not.

    Derived in chapter 1.19.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        known = token < encoding.n_vocab
        raw = encoding.decode_single_token_bytes(token) if known else b"\xff"
        piece = decoder.decode(raw)
        if piece:
            yield piece
    piece = decoder.decode(b"", final=True)
    if piece:
        yield piece
