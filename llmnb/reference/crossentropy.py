# Written by `make export` from notebooks/1_by_hand/11_crossentropy.py: edit that file.

"""Softmax and cross-entropy in one, in NumPy, forward and backward."""

__all__ = ["crossentropy_softmax_backward", "crossentropy_softmax_forward"]


# imports
import numpy as np

from llmnb.shapes import shapes


# both in one
@shapes("B T!, B T!, B T Vp, B T of V, 1 to Vp")
def crossentropy_softmax_forward(losses, lse, logits, targets, V):
    """Losses straight from the logits; no probability is stored.

    losses, lse: float (B, T), written; lse is the log of the sum of the
    exponentials of a row, all that the backward pass needs besides the
    logits. logits: float (B, T, Vp), of which columns from V on are not
    read. targets: int (B, T), each below V.

    Derived in chapter 1.11.
    """
    top = logits[..., :V].max(-1)
    sums = np.exp(logits[..., :V] - top[..., None]).sum(-1)
    lse[...] = top + np.log(sums)
    hit = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    losses[...] = lse - hit


# the gradient of both in one
@shapes("B T Vp!, B T, B T Vp~, B T, B T of V, 1 to Vp")
def crossentropy_softmax_backward(dlogits, dlosses, logits, lse, targets, V):
    """Write the gradient of the losses by the logits: p - y, scaled.

    dlogits: float (B, T, Vp), overwritten (not added to); it may be
    `logits` itself, which then is lost. dlosses, lse: (B, T), lse from the
    forward pass. targets: int (B, T). Columns from V on receive 0.

    Derived in chapter 1.11.
    """
    b, t = np.indices(targets.shape)
    dlogits[..., :V] = np.exp(logits[..., :V] - lse[..., None])
    dlogits[b, t, targets] -= 1
    dlogits[..., :V] *= dlosses[..., None]
    dlogits[..., V:] = 0
