# Written by `make export` from notebooks/5_modern/04_attention.py: edit that file.

"""Soft caps of logits in NumPy, and cross-entropy through them."""

__all__ = ["capped_crossentropy_backward", "softcap_forward"]


# soft caps of logits
import numpy as np

from llmnb.shapes import shapes


@shapes("B T Vp!", softcap="above 0")
def softcap_forward(x, softcap):
    """Turn each logit x, (B, T, Vp), into c tanh(x / c); softcap: c.

    Derived in chapter 5.4.
    """
    x[...] = float(softcap) * np.tanh(x / float(softcap))


@shapes("B T Vp!, B T, B T Vp~, B T, B T of V, 1 to Vp", softcap="above 0")
def capped_crossentropy_backward(
    dlogits, dlosses, logits, lse, targets, V, softcap
):
    """Write the gradient of the losses by the logits before their cap.

    dlogits: float (B, T, Vp), overwritten; it may be `logits` itself, which
    then is lost. logits: after the cap. dlosses, lse: (B, T), lse from the
    forward pass. targets: int (B, T). Columns from V on receive 0.

    Derived in chapter 5.4.
    """
    slope = 1 - (logits[..., :V] / float(softcap)) ** 2
    b, t = np.indices(targets.shape)
    dlogits[..., :V] = np.exp(logits[..., :V] - lse[..., None])
    dlogits[b, t, targets] -= 1
    dlogits[..., :V] *= dlosses[..., None] * slope
    dlogits[..., V:] = 0
