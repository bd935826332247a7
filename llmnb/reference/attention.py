# Written by `make export` from notebooks/1_by_hand/08_attention.py: edit that file.

"""Causal attention in NumPy, forward and backward."""

__all__ = [
    "Heads", "attention_backward", "attention_forward", "count_heads",
    "masked_scores", "split_heads", "split_qkv",
]


# imports
from typing import NamedTuple

import numpy as np

from llmnb.shapes import shapes


# how many heads
class Heads(NamedTuple):
    """How many heads of queries, how many of keys and values; their size.

    Derived in chapter 1.8.
    """

    NH: int
    NKV: int
    hs: int


def count_heads(layer, out, lse, inp):
    """The Heads that the shapes of attention's arrays speak of.

    layer: what a message calls it. Raises ValueError where inp is not
    (NH + 2 NKV) hs wide, for an NKV that divides NH.

    Derived in chapter 1.8.
    """
    NH, C, width = lse.shape[1], out.shape[2], inp.shape[2]
    hs = C // NH
    NKV = (width - C) // (2 * hs) if hs else 0
    if NKV < 1 or NH % NKV or width != (NH + 2 * NKV) * hs:
        raise ValueError(
            f"{layer}: inp must have shape (B, T, (NH + 2 NKV) hs), where "
            f"NH = {NH}, hs = {hs} and NKV divides NH, got {inp.shape}"
        )
    return Heads(NH, NKV, hs)


# the heads as views
def split_heads(x, NKV, hs):
    """The heads of x as a view.

    x: (B, T, n * hs), of n heads. Returns a view (B, NKV, n / NKV, T, hs),
    so what is written into it lands in x.

    Derived in chapter 1.8.
    """
    B, T, width = x.shape
    heads = x.reshape(B, T, NKV, width // (NKV * hs), hs)
    return heads.transpose(0, 2, 3, 1, 4)


def split_qkv(x, heads):
    """Queries, keys and values of x, packed as in inp, as views.

    heads: Heads. Queries are (B, NKV, NH / NKV, T, hs), keys and values
    (B, NKV, 1, T, hs).

    Derived in chapter 1.8.
    """
    NH, NKV, hs = heads
    ends = NH * hs, (NH + NKV) * hs
    parts = x[..., : ends[0]], x[..., ends[0] : ends[1]], x[..., ends[1] :]
    return [split_heads(part, NKV, hs) for part in parts]


# the scores
def masked_scores(q, k):
    """Scaled dot products of queries and keys; the future is -inf.

    q, k: (..., T, hs). Returns a new array (..., T, T), reading positions
    along the last axis but one.

    Derived in chapter 1.8.
    """
    T, hs = q.shape[-2:]
    scores = (q @ k.swapaxes(-1, -2)) * q.dtype.type(1 / np.sqrt(hs))
    scores[..., ~np.tri(T, dtype=bool)] = -np.inf
    return scores


# attention, forward
@shapes("B T C!, B NH|C T!, B T QKV")
def attention_forward(out, lse, inp):
    """Causal self-attention of NH heads.

    inp: (B, T, (NH + 2 NKV) * hs), the heads of queries, of keys and of
    values; NKV divides NH. Writes out (B, T, NH * hs) and lse (B, NH, T),
    the log-sum-exp of each row of scaled, masked scores, which the backward
    pass needs. All of one float dtype.

    Derived in chapter 1.8.
    """
    heads = count_heads("attention_forward", out, lse, inp)
    q, k, v = split_qkv(inp, heads)
    scores = masked_scores(q, k)
    top = scores.max(axis=-1, initial=-np.inf)
    total = top + np.log(np.exp(scores - top[..., None]).sum(axis=-1))
    att = np.exp(scores - total[..., None])
    split_heads(out, heads.NKV, heads.hs)[...] = att @ v
    lse[...] = total.reshape(lse.shape)


# attention, backward
@shapes("B T QKV!, B T C, B T QKV, B T C, B NH|C T")
def attention_backward(dinp, dout, inp, out, lse, add=True):
    """Add attention's gradient to dinp.

    dinp, inp: (B, T, (NH + 2 NKV) * hs). dout, out: (B, T, NH * hs). lse:
    (B, NH, T). out and lse are as the forward pass left them. All of one
    float dtype. add: False overwrites dinp instead of adding.

    Derived in chapter 1.8.
    """
    heads = count_heads("attention_backward", out, lse, inp)
    if not add:
        dinp.fill(0)
    q, k, v = split_qkv(inp, heads)
    dq, dk, dv = split_qkv(dinp, heads)
    o, do = (split_heads(x, heads.NKV, heads.hs) for x in (out, dout))
    att = np.exp(masked_scores(q, k) - lse.reshape(*q.shape[:-1], 1))
    dv += (att.swapaxes(-1, -2) @ do).sum(axis=2, keepdims=True)
    datt = do @ v.swapaxes(-1, -2)
    D = (do * o).sum(axis=-1, keepdims=True)
    dscores = att * (datt - D) * q.dtype.type(1 / np.sqrt(heads.hs))
    dq += dscores @ k
    dk += (dscores.swapaxes(-1, -2) @ q).sum(axis=2, keepdims=True)
