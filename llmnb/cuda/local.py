# Written by `make export` from notebooks/5_modern/04_attention.py: edit that file.

"""Attention with a window, a scale and a soft cap; on a GPU."""

__all__ = ["local_attention_backward", "local_attention_forward"]


# imports of the GPU module
import functools
import math

import numpy as np

from llmnb.cuda.attention import (
    check_heads, launch_backward, launch_forward, plain_score,
)
from llmnb.gpu.launch import DEVICE, device, given_work
from llmnb.reference.local import check_rule
from llmnb.shapes import shapes


# a rule as a kernel's constants
ONE, TWO = np.float32(1), np.float32(2)


@device
def soft_tanh(x):
    """tanh(x), to its last digits near 0 too."""
    less = math.expm1(-TWO * abs(x))
    t = -less / (TWO + less)
    return t if x > 0 else -t


@functools.cache
def _capped_score(scale, softcap):
    INNER, CAP = np.float32(scale / softcap), np.float32(softcap)
    SCALE = np.float32(scale)

    @device
    def score(product):
        t = soft_tanh(product * INNER)
        return CAP * t, (ONE - t * t) * SCALE

    return score


def _rule(layer, hs, window, scale, softcap):
    """The rule of chapter 3.9 that these make."""
    window, scale, softcap = check_rule(layer, window, scale, softcap)
    if scale is None:
        scale = 1 / math.sqrt(hs)
    if softcap is None:
        score = plain_score(float(scale))
    else:
        score = _capped_score(float(scale), float(softcap))
    return window or 0, score


# attention with a window on a GPU
@shapes("B T C!, B NH|C T!, B T QKV", DEVICE)
def local_attention_forward(
    out, lse, inp, window=None, scale=None, softcap=None
):
    """Causal self-attention that looks back a window only.

    inp: (B, T, (NH + 2 NKV) * hs), the heads of queries, of keys and of
    values; NKV divides NH, and hs is at most 256. Writes out (B, T, NH * hs)
    and lse (B, NH, T), the log-sum-exp of each row of scores, which the
    backward pass needs. window: how many positions a query sees, its own
    the last of them; None for all. scale: of the products, 1 / sqrt(hs)
    where None. softcap: c where scores become c tanh(score / c), or None. A
    kernel is compiled for each rule. All float32 on a device. Raises
    TypeError or ValueError before it launches anything.

    Derived in chapter 5.4.
    """
    layer = "local_attention_forward"
    heads = check_heads(layer, out, lse, inp)
    rule = _rule(layer, heads.hs, window, scale, softcap)
    launch_forward(heads, rule, out, lse, inp)


@shapes("B T QKV!, B T C, B T QKV, B T C, B NH|C T", DEVICE, work="W!?")
def local_attention_backward(
    dinp, dout, inp, out, lse, add=True, window=None, scale=None,
    softcap=None, work=None,
):  # fmt: skip
    """Add the gradient of attention with a window to dinp.

    dinp, inp: (B, T, (NH + 2 NKV) * hs). dout, out: (B, T, NH * hs). lse:
    (B, NH, T). out and lse are as the forward pass left them. add: False
    overwrites dinp instead of adding. window, scale, softcap: as in the
    forward pass. work: as for attention_backward. All float32 on a device.
    Raises TypeError or ValueError before it launches anything.

    Derived in chapter 5.4.
    """
    layer = "local_attention_backward"
    heads = check_heads(layer, out, lse, inp)
    rule = _rule(layer, heads.hs, window, scale, softcap)
    work = given_work(layer, work, lse.size, inp)
    launch_backward(heads, rule, (dinp, dout, inp, out, lse), add, work)
