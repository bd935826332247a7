# Written by `make export` from notebooks/2_cpu/03_loss.py: edit that file.

"""Softmax and cross-entropy, compiled for the processor's cores."""

__all__ = ["crossentropy_softmax_backward", "crossentropy_softmax_forward"]


# imports of cross-entropy
import math

import numpy as np

from llmnb.backend import noted
from llmnb.cpu.jit import arguments, share, team
from llmnb.cpu.math import fast_exp, larger
from llmnb.shapes import COMPILED, shapes


# the forward kernel
@team
def _softmax_forward(part, parts, address):
    logits, losses, lse, targets, V = arguments(address)
    zero, mine = logits.dtype.type(0), share(len(logits), part, parts)
    for n in range(mine.start, mine.stop):
        top, total = logits[n, 0], zero
        for i in range(V):
            top = larger(top, logits[n, i])
        for i in range(V):
            total += fast_exp(logits[n, i] - top)
        lse[n] = top + math.log(total)
        losses[n] = lse[n] - logits[n, targets[n]]


# the backward kernel
@team
def _softmax_backward(part, parts, address):
    dlogits, dlosses, lse, targets, V = arguments(address)
    mine = share(len(dlogits), part, parts)
    for n in range(mine.start, mine.stop):
        scale, shift = dlosses[n], lse[n]
        for i in range(V):
            dlogits[n, i] = scale * fast_exp(dlogits[n, i] - shift)
        dlogits[n, targets[n]] -= scale
        dlogits[n, V:] = 0


# the functions around them
def _rows(*arrays):
    """Arrays (B, T, Vp) or (B, T) with one row, or number, a token."""
    return [x.reshape(-1, *x.shape[2:]) for x in arrays]


@shapes("B T!, B T!, B T Vp, B T of V, 1 to Vp", COMPILED)
def crossentropy_softmax_forward(losses, lse, logits, targets, V):
    """Losses straight from the logits; no probability is stored.

    losses, lse: (B, T), written; lse is the log of the sum of the
    exponentials of a row, all that the backward pass needs besides the
    logits. logits: float32 or float64 (B, T, Vp), of which columns from V
    on are not read. targets: int32 (B, T), each below V. Raises TypeError
    or ValueError for a wrong dtype or shape, a target outside [0, V) and a
    V outside [1, Vp].

    Derived in chapter 2.3.
    """
    _softmax_forward(*_rows(logits, losses, lse, targets), V)


@shapes("B T Vp!, B T, B T Vp~, B T, B T of V, 1 to Vp", COMPILED)
def crossentropy_softmax_backward(dlogits, dlosses, logits, lse, targets, V):
    """Write the gradient of the losses by the logits: p - y, scaled.

    dlogits: (B, T, Vp), overwritten (not added to); it may be `logits`
    itself, which then is lost. dlosses, lse: (B, T), lse from the forward
    pass. logits: float32 or float64 (B, T, Vp). targets: int32 (B, T).
    Columns from V on receive 0. Raises as the forward pass does.

    Derived in chapter 2.3.
    """
    if dlogits is not logits:
        noted(np.copyto, dlogits, logits)
    _softmax_backward(*_rows(dlogits, dlosses, lse, targets), V)
