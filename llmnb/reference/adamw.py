# Written by `make export` from notebooks/1_by_hand/12_adamw.py: edit that file.

"""AdamW and the clipping of gradients in NumPy."""

__all__ = [
    "ADAMW_LIMITS", "AdamW", "Factors", "adamw_update", "clip_gradients",
    "global_norm",
]


# imports
import math
from typing import NamedTuple

import numpy as np

from llmnb.shapes import check_number, shapes


# the settings of a step
ADAMW_LIMITS = {
    "learning_rate": "at least 0",
    "beta1": "in [0, 1)",
    "beta2": "in [0, 1)",
    "eps": "above 0",  # a gradient that is always 0 would divide 0 by 0
    "weight_decay": "at least 0",
    "step": "at least 1",
}


class Factors(NamedTuple):
    """The numbers of an update that are the same for all parameters.

    Derived in chapter 1.12.
    """

    keep: float  # of a parameter, after decay
    new1: float  # the share of the new gradient in m
    beta2: float  # of the old square in v
    new2: float  # and of the new one
    root: float  # of the correction of v
    eps: float
    size: float  # of a step, with the correction of m


class AdamW(NamedTuple):
    """The settings of one step of AdamW; step counts from 1.

    Derived in chapter 1.12.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    step: int = 1

    def factors(self, name):
        """The Factors of this step; name: what a message calls the caller.

        Raises TypeError or ValueError for a setting out of range.
        """
        for key, limit in ADAMW_LIMITS.items():
            check_number(f"{name}: {key}", getattr(self, key), limit)
        # NumPy's numbers would widen the arrays that they multiply
        rate, beta1, beta2, eps, decay, step = map(float, self)
        keep, root = 1 - rate * decay, math.sqrt(1 - beta2**step)
        size = rate / (1 - beta1**step)
        return Factors(keep, 1 - beta1, beta2, 1 - beta2, root, eps, size)


# the arithmetic of a step
def learn(params, grads, m, v, factors):
    """AdamW on some parameters; factors: the Factors, or an array of them."""
    keep, new1, beta2, new2, root, eps, size = factors
    params *= keep
    m += new1 * (grads - m)
    v *= beta2
    v += new2 * grads * grads
    params -= size * m / (np.sqrt(v) / root + eps)


# one step of AdamW
@shapes("N!, N, N!, N!")
def adamw_update(params, grads, m, v, settings):
    """Take one step of AdamW, in the order in which torch.optim.AdamW does.

    params, grads, m, v: float, of one shape; params, m and v change in
    place. m and v are the running means of the gradient and of its square,
    zero before the first step. settings: an AdamW; its decay applies to every
    element. Raises ValueError for settings out of range.

    Derived in chapter 1.12.
    """
    learn(params, grads, m, v, settings.factors("adamw_update"))


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
    scale = float(max_norm) / (norm + 1e-6)
    if math.isfinite(norm) and scale < 1:
        grads *= scale
    return norm
