# Written by `make export` from notebooks/1_by_hand/11_crossentropy.py: edit that file.

"""Softmax and cross-entropy in NumPy, forward and backward."""

__all__ = [
    "crossentropy_backward",
    "crossentropy_forward",
    "crossentropy_softmax_backward",
    "crossentropy_softmax_forward",
    "softmax_backward",
    "softmax_forward",
]


# imports
import numpy as np

from llmnb.shapes import shapes


# the softmax
@shapes("B T Vp!, B T Vp~, 1 to Vp")
def softmax_forward(probs, logits, V):
    """Probabilities of the first V logits in each row.

    probs, logits: float (B, T, Vp). Columns from V on are padding: their
    logits are not read and their probability is 0. Writes `probs`, which
    may be `logits` itself.

    Derived in chapter 1.11.
    """
    shifted = logits[..., :V] - logits[..., :V].max(-1, keepdims=True)
    exps = np.exp(shifted)
    probs[..., :V] = exps / exps.sum(-1, keepdims=True)
    probs[..., V:] = 0


# the cross-entropy
@shapes("B T!, B T Vp, B T of Vp")
def crossentropy_forward(losses, probs, targets):
    """Surprise at each target, in nats: minus the log of its probability.

    losses: float (B, T), written. probs: float (B, T, Vp). targets: int
    (B, T). A probability below the smallest normal number counts as that
    number, so that a loss is never infinite.

    Derived in chapter 1.11.
    """
    tiny = np.finfo(probs.dtype).tiny
    hit = np.take_along_axis(probs, targets[..., None], -1)[..., 0]
    losses[...] = -np.log(np.maximum(hit, tiny))


# the gradient of the cross-entropy
@shapes("B T Vp!, B T, B T Vp, B T of Vp")
def crossentropy_backward(dprobs, dlosses, probs, targets):
    """Add the gradient of the losses by the probabilities to `dprobs`.

    dprobs, probs: float (B, T, Vp); dlosses: (B, T); targets: int (B, T).
    Only the targets' columns of `dprobs` change.

    Derived in chapter 1.11.
    """
    tiny = np.finfo(probs.dtype).tiny
    b, t = np.indices(targets.shape)
    hit = np.maximum(probs[b, t, targets], tiny)
    dprobs[b, t, targets] -= dlosses / hit


# the gradient of the softmax
@shapes("B T Vp!, B T Vp, B T Vp")
def softmax_backward(dlogits, dprobs, probs):
    """Add the gradient by the logits to `dlogits`.

    dlogits, dprobs, probs: float (B, T, Vp). Padding has probability 0, so
    its columns receive 0.

    Derived in chapter 1.11.
    """
    inside = (dprobs * probs).sum(-1, keepdims=True)
    dlogits += probs * (dprobs - inside)


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
