# Written by `make export` from notebooks/5_modern/04_attention.py: edit that file.

"""Attention with a window, a scale and a soft cap; norms of heads; in NumPy."""

__all__ = [
    "headnorm_backward", "headnorm_forward", "local_attention_backward",
    "local_attention_forward",
]


# imports
import numpy as np

from llmnb.reference.attention import count_heads, split_heads, split_qkv
from llmnb.shapes import check_number, shapes


# a rule, and its scores
def check_rule(layer, window, scale, softcap):
    """The rule, its window an int; raise for one that no attention has."""
    whole = isinstance(window, (int, np.integer))
    if window is not None and (not whole or window < 1):
        raise ValueError(
            f"{layer}: window must be None or a positive integer, got "
            f"{window!r}"
        )
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is not None:
            check_number(f"{layer}: {name}", value, "above 0")
    window = window and min(int(window), 2**31)  # no text is longer
    return window, scale, softcap


def _local_scores(q, k, window, scale, softcap):
    """Scores, and their slope by the products; what is unseen: -inf.

    q, k: (..., T, hs). window: a query sees itself and the window - 1 keys
    before it; None is all. The slope is the scale if there is no soft cap.
    """
    T, hs = q.shape[-2:]
    number = q.dtype.type
    scale = number(1 / np.sqrt(hs) if scale is None else scale)
    scores, slope = (q @ k.swapaxes(-1, -2)) * scale, number(1)
    if softcap is not None:
        tanh = np.tanh(scores / number(softcap))
        scores, slope = number(softcap) * tanh, 1 - tanh**2
    seen = np.tri(T, dtype=bool)
    if window is not None:
        seen &= ~np.tri(T, k=-window, dtype=bool)
    scores[..., ~seen] = -np.inf
    return scores, slope * scale


# attention with a window, forward
@shapes("B T C!, B NH|C T!, B T QKV")
def local_attention_forward(
    out, lse, inp, window=None, scale=None, softcap=None
):
    """Causal self-attention that looks back a window only.

    inp: (B, T, (NH + 2 NKV) * hs), the heads of queries, of keys and of
    values; NKV divides NH. Writes out (B, T, NH * hs) and lse (B, NH, T),
    the log-sum-exp of each row of scores, which the backward pass needs.
    All of one float dtype. window: how many positions a query sees, its own
    the last of them; None for all. scale: of the products, 1 / sqrt(hs)
    where None. softcap: c where scores become c tanh(score / c), or None.

    Derived in chapter 5.4.
    """
    layer = "local_attention_forward"
    heads = count_heads(layer, out, lse, inp)
    rule = check_rule(layer, window, scale, softcap)
    q, k, v = split_qkv(inp, heads)
    scores, _ = _local_scores(q, k, *rule)
    top = scores.max(axis=-1, initial=-np.inf)
    total = top + np.log(np.exp(scores - top[..., None]).sum(axis=-1))
    att = np.exp(scores - total[..., None])
    split_heads(out, heads.NKV, heads.hs)[...] = att @ v
    lse[...] = total.reshape(lse.shape)


# attention with a window, backward
@shapes("B T QKV!, B T C, B T QKV, B T C, B NH|C T")
def local_attention_backward(
    dinp, dout, inp, out, lse, add=True, window=None, scale=None, softcap=None
):
    """Add the gradient of attention with a window to dinp.

    dinp, inp: (B, T, (NH + 2 NKV) * hs). dout, out: (B, T, NH * hs). lse:
    (B, NH, T). out and lse are as the forward pass left them. All of one
    float dtype. add: False overwrites dinp instead of adding. window,
    scale, softcap: as in the forward pass.

    Derived in chapter 5.4.
    """
    layer = "local_attention_backward"
    heads = count_heads(layer, out, lse, inp)
    rule = check_rule(layer, window, scale, softcap)
    if not add:
        dinp.fill(0)
    q, k, v = split_qkv(inp, heads)
    dq, dk, dv = split_qkv(dinp, heads)
    o, do = (split_heads(x, heads.NKV, heads.hs) for x in (out, dout))
    scores, slope = _local_scores(q, k, *rule)
    att = np.exp(scores - lse.reshape(*q.shape[:-1], 1))
    dv += (att.swapaxes(-1, -2) @ do).sum(axis=2, keepdims=True)
    datt = do @ v.swapaxes(-1, -2)
    D = (do * o).sum(axis=-1, keepdims=True)
    dproducts = att * (datt - D) * slope
    dq += dproducts @ k
    dk += (dproducts.swapaxes(-1, -2) @ q).sum(axis=2, keepdims=True)


# which heads have norms
def key_heads(layer, inp, rstd, hs):
    """NKV, from a row of NH + 2 NKV heads of which NH + NKV have a norm."""
    width, normed = inp.shape[2], rstd.shape[2]
    NKV = width // max(1, hs) - normed
    if not hs or width % hs or not 0 < NKV < normed:
        raise ValueError(
            f"{layer}: inp must have shape (B, T, (NH + 2 NKV) hs), where "
            f"hs = {hs} and NH + NKV = {normed}, got {inp.shape}"
        )
    return NKV


# norms of heads
def _normed(x, hs, rstd):
    """The heads that have a norm, (B, T, n, hs), and the rest of the row."""
    B, T, width = x.shape
    heads = x.reshape(B, T, width // hs, hs)
    return heads[:, :, : rstd.shape[2]], heads[:, :, rstd.shape[2] :]


def _both_weights(qweight, kweight, NKV, n, offset):
    """A row of weights for each of the n heads that have a norm."""
    queries = np.broadcast_to(qweight, (n - NKV, qweight.size))
    keys = np.broadcast_to(kweight, (NKV, kweight.size))
    return np.concatenate([queries, keys]) + float(offset)


@shapes(
    "B T QKV!, B T N!, B T QKV, hs, hs", eps="above 0", offset="at least 0"
)
def headnorm_forward(out, rstd, inp, qweight, kweight, eps=1e-6, offset=0.0):
    """RMSNorm over the channels of each head of queries and of keys.

    out, inp: (B, T, (NH + 2 NKV) * hs); values are copied. rstd: (B, T,
    NH + NKV), saved for the backward pass. qweight, kweight: (hs,), used
    for all heads. eps, offset: as for rmsnorm_forward. All of one float
    dtype; out and rstd are overwritten.

    Derived in chapter 5.4.
    """
    hs = qweight.size
    NKV = key_heads("headnorm_forward", inp, rstd, hs)
    x, values = _normed(inp, hs, rstd)
    y, copied = _normed(out, hs, rstd)
    rstd[...] = 1 / np.sqrt((x**2).mean(axis=-1) + float(eps))
    weights = _both_weights(qweight, kweight, NKV, rstd.shape[2], offset)
    y[...] = x * rstd[..., None] * weights
    copied[...] = values


@shapes("B T QKV!, hs!, hs!, B T QKV, hs, hs, B T N", offset="at least 0")
def headnorm_backward(
    dinp, dqweight, dkweight, inp, qweight, kweight, rstd, offset=0.0
):
    """Take the gradient of headnorm_forward's output to its input, in place.

    dinp: (B, T, (NH + 2 NKV) * hs) holds the gradient of the output and
    receives that of the input. dqweight, dkweight: (hs,), added to. inp,
    qweight, kweight, rstd, offset: as in the forward pass.

    Derived in chapter 5.4.
    """
    hs = qweight.size
    NKV = key_heads("headnorm_backward", inp, rstd, hs)
    hat = _normed(inp, hs, rstd)[0] * rstd[..., None]
    dx, _ = _normed(dinp, hs, rstd)
    dweights = (dx * hat).sum(axis=(0, 1))
    dqweight += dweights[:-NKV].sum(axis=0)
    dkweight += dweights[-NKV:].sum(axis=0)
    weights = _both_weights(qweight, kweight, NKV, rstd.shape[2], offset)
    dhat = dx * weights
    mean = (dhat * hat).mean(axis=-1, keepdims=True)
    dx[...] = rstd[..., None] * (dhat - hat * mean)
