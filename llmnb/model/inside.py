# Written by `make export` from notebooks/1_by_hand/20_inside.py: edit that file.

"""Measures of what a trained model does inside."""

__all__ = [
    "attention_maps", "induction_score", "logit_lens", "previous_token_score",
    "repeated_tokens", "surprises", "without_head",
]


# imports of the measures
import numpy as np

from llmnb.reference.gpt2 import attend, forward, layernorm, log_sum_exp


# the surprise of every token
def surprises(params, ids, num_heads, vocab_size):
    """How much each token of a text surprised the model, in nats.

    params: a dict of arrays, as `llmnb.reference.gpt2.forward` takes them.
    ids: integers (B, T). Returns (B, T - 1): -log p of ids[:, 1:].

    Derived in chapter 1.20.
    """
    _, kept = forward(params, ids[:, :-1], ids[:, 1:], num_heads, vocab_size)
    hit = np.take_along_axis(kept["logits"], ids[:, 1:, None], -1)
    return (kept["lse"] - hit)[..., 0]


# the attention of all heads
def attention_maps(params, ids, num_heads, vocab_size):
    """The attention weights of every head on a text.

    ids: integers (B, T). Returns (L, B, NH, T, T); each row sums to 1.

    Derived in chapter 1.20.
    """
    _, kept = forward(params, ids, ids, num_heads, vocab_size)
    return np.stack(
        [attend(block["qkv"], num_heads)[3] for block in kept["blocks"]]
    )


# the two scores
def previous_token_score(maps):
    """Mean weight on the token before, by (1.20.1).

    maps: (..., B, NH, T, T) attention weights. Returns (..., NH).

    Derived in chapter 1.20.
    """
    beside = np.diagonal(maps, -1, -2, -1)
    return beside.mean(-1).mean(-2)


def induction_score(maps, repeat):
    """Mean weight on what followed a token the last time, by (1.20.2).

    maps: (..., B, NH, T, T), of a text that repeats after `repeat` tokens,
    2 or more, T = 2 repeat. Returns (..., NH). Raises ValueError for another
    T.

    Derived in chapter 1.20.
    """
    length = maps.shape[-1]
    if repeat < 2 or length != 2 * repeat:
        raise ValueError(
            f"induction_score: maps must be of twice {repeat} tokens, "
            f"got {length}"
        )
    # row t and column t - repeat + 1, for t from `repeat` to T - 2; the
    # diagonal begins one row earlier
    followed = np.diagonal(maps, 1 - repeat, -2, -1)[..., 1:repeat]
    return followed.mean(-1).mean(-2)


# a text that repeats
def repeated_tokens(vocab_size, repeat, batch_size=4, seed=0):
    """Random tokens, and the same once more: integers (B, 2 repeat).

    Derived in chapter 1.20.
    """
    half = np.random.default_rng(seed).integers(
        0, vocab_size, (batch_size, repeat)
    )
    return np.concatenate([half, half], axis=1)


# silence a head
def without_head(params, layer, head, num_heads):
    """The same parameters with one head silenced; the others are shared.

    Raises IndexError for a layer or a head that there is not.

    Derived in chapter 1.20.
    """
    weight = params["attprojw"].copy()
    heads = weight.reshape(*weight.shape[:2], num_heads, -1)  # a view
    heads[layer, :, head] = 0
    return params | {"attprojw": weight}


# read the stream early
def logit_lens(params, ids, num_heads, vocab_size):
    """Log-probabilities of the next token, read after each block.

    ids: integers (B, T). Returns (L + 1, B, T, V): the first before any
    block, the last what the model says.

    Derived in chapter 1.20.
    """
    _, kept = forward(params, ids, ids, num_heads, vocab_size)
    streams = [block["x"] for block in kept["blocks"]] + [kept["x"]]
    logits = np.stack(
        [layernorm(x, params, "lnf") @ params["wte"].T for x in streams]
    )[..., :vocab_size]
    return logits - log_sum_exp(logits)
