# Written by `make export` from notebooks/1_by_hand/08_attention.py: edit that file.

"""Causal attention in NumPy, forward and backward."""

__all__ = [
    "attention_backward",
    "attention_forward",
    "masked_scores",
    "split_heads",
]


# imports
import numpy as np

from llmnb.shapes import shapes


# the heads as views
def split_heads(x, NH, parts):
    """The heads of each part of x as views.

    x: (B, T, parts * C), C-contiguous; parts is 3 for queries, keys and
    values, 1 for an output. Returns a view (parts, B, NH, T, hs) with
    hs = C / NH, so what is written into it lands in x.

    Derived in chapter 1.8.
    """
    B, T, width = x.shape
    heads = x.reshape(B, T, parts, NH, width // (parts * NH))
    return heads.transpose(2, 0, 3, 1, 4)


# the scores
def masked_scores(q, k):
    """Scaled dot products of queries and keys; the future is -inf.

    q, k: (B, NH, T, hs). Returns a new array (B, NH, T, T), reading
    positions along the third axis.

    Derived in chapter 1.8.
    """
    T, hs = q.shape[-2:]
    scores = (q @ k.swapaxes(-1, -2)) * q.dtype.type(1 / np.sqrt(hs))
    scores[..., ~np.tri(T, dtype=bool)] = -np.inf
    return scores


# attention, forward
@shapes("B T C!, B NH|C T!, B T 3C")
def attention_forward(out, lse, inp):
    """Causal self-attention of NH heads.

    inp: (B, T, 3C), queries, keys and values along the last axis. Writes
    out (B, T, C) and lse (B, NH, T), the log-sum-exp of each row of scaled,
    masked scores, which the backward pass needs. All of one float dtype.

    Derived in chapter 1.8.
    """
    NH = lse.shape[1]
    q, k, v = split_heads(inp, NH, 3)
    scores = masked_scores(q, k)
    top = scores.max(axis=-1)
    lse[...] = top + np.log(np.exp(scores - top[..., None]).sum(axis=-1))
    att = np.exp(scores - lse[..., None])
    split_heads(out, NH, 1)[0] = att @ v


# attention, backward
@shapes("B T 3C!, B T C, B T 3C, B T C, B NH|C T")
def attention_backward(dinp, dout, inp, out, lse, add=True):
    """Add attention's gradient to dinp.

    dinp, inp: (B, T, 3C). dout, out: (B, T, C). lse: (B, NH, T). out and
    lse are as the forward pass left them. All of one float dtype. add:
    False overwrites dinp instead of adding.

    Derived in chapter 1.8.
    """
    if not add:
        dinp.fill(0)
    NH = lse.shape[1]
    q, k, v = split_heads(inp, NH, 3)
    dq, dk, dv = split_heads(dinp, NH, 3)
    o, do = split_heads(out, NH, 1)[0], split_heads(dout, NH, 1)[0]
    att = np.exp(masked_scores(q, k) - lse[..., None])
    dv += att.swapaxes(-1, -2) @ do
    datt = do @ v.swapaxes(-1, -2)
    D = (do * o).sum(axis=-1, keepdims=True)
    dscores = att * (datt - D) * q.dtype.type(1 / np.sqrt(q.shape[-1]))
    dq += dscores @ k
    dk += dscores.swapaxes(-1, -2) @ q
