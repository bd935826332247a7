# Written by `make export` from notebooks/1_by_hand/12_adamw.py: edit that file.

"""AdamW and the clipping of gradients in NumPy."""

__all__ = [
    "adamw_update",
    "clip_gradients",
    "global_norm",
]


# imports
import math

import numpy as np

from llmnb.shapes import shapes


# the settings
ADAMW_LIMITS = {
    "learning_rate": "at least 0",
    "beta1": "in [0, 1)",
    "beta2": "in [0, 1)",
    "eps": "above 0",  # a gradient that is always 0 would divide 0 by 0
    "weight_decay": "at least 0",
    "step": "at least 1",
}


# one step of AdamW
@shapes("N!, N, N!, N!", **ADAMW_LIMITS)
def adamw_update(
    params, grads, m, v,
    learning_rate, beta1, beta2, eps, weight_decay, step,
):  # fmt: skip
    """Take one step of AdamW, in the order in which torch.optim.AdamW does.

    params, grads, m, v: float, of one shape; params, m and v change in
    place. m and v are the running means of the gradient and of its square,
    zero before the first step. step counts from 1. weight_decay applies to
    every element. Raises ValueError for settings out of range.

    Derived in chapter 1.12.
    """
    correction1 = 1 - beta1**step
    correction2 = 1 - beta2**step
    params *= 1 - learning_rate * weight_decay
    m += (1 - beta1) * (grads - m)
    v *= beta2
    v += (1 - beta2) * grads * grads
    spread = np.sqrt(v) / math.sqrt(correction2) + eps
    params -= learning_rate / correction1 * m / spread


# the norm of all gradients
@shapes("N")
def global_norm(grads):
    """The Euclidean norm of a flat array, summed in float64, as a float.

    Derived in chapter 1.12.
    """
    wide = grads.astype(np.float64)
    return math.sqrt(np.sum(wide * wide))


# clip the gradients
@shapes("N!, above 0")
def clip_gradients(grads, max_norm):
    """Scale a flat array down to norm `max_norm` if it is longer.

    Returns the norm before clipping and scales `grads` in place by
    max_norm / (norm + 1e-6) where that is below 1, as torch's
    clip_grad_norm_. When the norm is infinite or NaN, `grads` is left as it
    is: the caller sees the norm and decides. Raises ValueError unless
    max_norm is positive.

    Derived in chapter 1.12.
    """
    norm = global_norm(grads)
    scale = max_norm / (norm + 1e-6)
    if math.isfinite(norm) and scale < 1:
        grads *= scale
    return norm
