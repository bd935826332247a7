# Written by `make export` from notebooks/1_by_hand/11_crossentropy.py: edit that file.

"""Softmax and cross-entropy, compiled for the processor's cores."""

__all__ = [
    "crossentropy_backward",
    "crossentropy_forward",
    "crossentropy_softmax_backward",
    "crossentropy_softmax_forward",
    "softmax_backward",
    "softmax_forward",
]


# imports of the kernels
import math

import numba
import numpy as np

from llmnb.cpu.jit import arguments, share, team
from llmnb.cpu.math import fast_exp
from llmnb.shapes import COMPILED, shapes


# the fused forward kernel
@team
def _fused_forward(part, parts, address):
    logits, losses, lse, targets, V = arguments(address)
    zero, mine = logits.dtype.type(0), share(len(logits), part, parts)
    for n in range(mine.start, mine.stop):
        top, total = logits[n, 0], zero
        for i in range(V):
            top = max(top, logits[n, i])
        for i in range(V):
            total += fast_exp(logits[n, i] - top)
        lse[n] = top + math.log(total)
        losses[n] = lse[n] - logits[n, targets[n]]


# the fused backward kernel
@team
def _fused_backward(part, parts, address):
    dlogits, dlosses, lse, targets, V = arguments(address)
    mine = share(len(dlogits), part, parts)
    for n in range(mine.start, mine.stop):
        scale, shift = dlosses[n], lse[n]
        for i in range(V):
            dlogits[n, i] = scale * fast_exp(dlogits[n, i] - shift)
        dlogits[n, targets[n]] -= scale


# views as rows
def _rows(*arrays):
    """Arrays (B, T, Vp) or (B, T) with one row, or number, a token."""
    return [x.reshape(-1, *x.shape[2:]) for x in arrays]


# the fused forward
@shapes("B T!, B T!, B T Vp, B T of V, 1 to Vp", COMPILED)
def crossentropy_softmax_forward(losses, lse, logits, targets, V):
    """Losses straight from the logits; no probability is stored.

    losses, lse: (B, T), written; lse is the log of the sum of the
    exponentials of a row, all that the backward pass needs besides the
    logits. logits: float32 or float64 (B, T, Vp), of which columns from V
    on are not read. targets: int32 (B, T), each below V. Raises TypeError
    or ValueError for a wrong dtype or shape, a target outside [0, V) and a
    V outside [1, Vp].

    Derived in chapter 1.11.
    """
    _fused_forward(*_rows(logits, losses, lse, targets), V)


# the fused backward
@shapes("B T Vp!, B T, B T Vp~, B T, B T of V, 1 to Vp", COMPILED)
def crossentropy_softmax_backward(dlogits, dlosses, logits, lse, targets, V):
    """Write the gradient of the losses by the logits: p - y, scaled.

    dlogits: (B, T, Vp), overwritten (not added to); it may be `logits`
    itself, which then is lost. dlosses, lse: (B, T), lse from the forward
    pass. logits: float32 or float64 (B, T, Vp). targets: int32 (B, T).
    Columns from V on receive 0. Raises as the forward pass does.

    Derived in chapter 1.11.
    """
    if dlogits is not logits:
        np.copyto(dlogits, logits)
    _fused_backward(*_rows(dlogits, dlosses, lse, targets), V)
    dlogits[..., V:] = 0


# the softmax kernel
@team
def _softmax_forward(part, parts, address):
    probs, V = arguments(address)
    zero, one = probs.dtype.type(0), probs.dtype.type(1)
    mine = share(len(probs), part, parts)
    for n in range(mine.start, mine.stop):
        top, total = probs[n, 0], zero
        for i in range(V):
            top = max(top, probs[n, i])
        for i in range(V):
            probs[n, i] = fast_exp(probs[n, i] - top)
            total += probs[n, i]
        factor = one / total
        for i in range(V):
            probs[n, i] *= factor


# the softmax, forward
@shapes("B T Vp!, B T Vp~, 1 to Vp")
def softmax_forward(probs, logits, V):
    """Probabilities of the first V logits in each row.

    probs, logits: float32 or float64 (B, T, Vp). Columns from V on are
    padding: their logits are not read and their probability is 0. Writes
    `probs`, which may be `logits` itself. Raises TypeError or ValueError
    for a wrong dtype or shape and for V outside [1, Vp].

    Derived in chapter 1.11.
    """
    if probs is not logits:
        np.copyto(probs, logits)
    _softmax_forward(*_rows(probs), V)
    probs[..., V:] = 0


# the softmax, backward
@team
def _softmax_backward(part, parts, address):
    probs, dlogits, dprobs = arguments(address)
    rows, Vp = probs.shape
    zero, mine = probs.dtype.type(0), share(rows, part, parts)
    for n in range(mine.start, mine.stop):
        inside = zero
        for i in range(Vp):
            inside += probs[n, i] * dprobs[n, i]
        for i in range(Vp):
            dlogits[n, i] += probs[n, i] * (dprobs[n, i] - inside)


@shapes("B T Vp!, B T Vp, B T Vp")
def softmax_backward(dlogits, dprobs, probs):
    """Add the gradient by the logits to `dlogits`.

    dlogits, dprobs, probs: float32 or float64 (B, T, Vp). Padding has
    probability 0, so its columns receive 0. Raises TypeError or ValueError
    for a wrong dtype or shape.

    Derived in chapter 1.11.
    """
    _softmax_backward(*_rows(probs, dlogits, dprobs))


# the cross-entropy, forward
@team
def _crossentropy_forward(part, parts, address):
    probs, losses, targets, tiny = arguments(address)
    mine = share(losses.size, part, parts)
    for n in range(mine.start, mine.stop):
        losses[n] = -math.log(max(probs[n, targets[n]], tiny))


@shapes("B T!, B T Vp, B T of Vp", COMPILED)
def crossentropy_forward(losses, probs, targets):
    """Surprise at each target, in nats: minus the log of its probability.

    losses: (B, T), written. probs: float32 or float64 (B, T, Vp). targets:
    int32 (B, T). A probability below the smallest normal number counts as
    that number. Raises TypeError or ValueError for a wrong dtype or shape
    and for a target outside [0, Vp).

    Derived in chapter 1.11.
    """
    rows = _rows(probs, losses, targets)
    _crossentropy_forward(*rows, np.finfo(probs.dtype).tiny)


# the cross-entropy, backward
@team
def _crossentropy_backward(part, parts, address):
    probs, dprobs, dlosses, targets, tiny = arguments(address)
    mine = share(dlosses.size, part, parts)
    for n in range(mine.start, mine.stop):
        k = targets[n]
        dprobs[n, k] -= dlosses[n] / max(probs[n, k], tiny)


@shapes("B T Vp!, B T, B T Vp, B T of Vp", COMPILED)
def crossentropy_backward(dprobs, dlosses, probs, targets):
    """Add the gradient of the losses by the probabilities to `dprobs`.

    dprobs, probs: float32 or float64 (B, T, Vp); dlosses: (B, T); targets:
    int32 (B, T). Only the targets' columns of `dprobs` change. Raises as
    `crossentropy_forward` does.

    Derived in chapter 1.11.
    """
    rows = _rows(probs, dprobs, dlosses, targets)
    _crossentropy_backward(*rows, np.finfo(probs.dtype).tiny)
