# Written by `make export` from notebooks/1_by_hand/12_adamw.py: edit that file.

"""AdamW and clipping, compiled for the processor's cores."""

__all__ = [
    "adamw_update",
    "clip_gradients",
    "global_norm",
]


# imports of the kernels
import math

import numba
import numpy as np

from llmnb.cpu.jit import arguments, share, team
from llmnb.reference.adamw import ADAMW_LIMITS
from llmnb.shapes import shapes


# the kernel
@team
def _adamw_update(part, parts, address):
    params, grads, m, v, numbers = arguments(address)
    keep, rate1, beta2, rate2, root, eps, size = numbers
    mine = share(params.size, part, parts)
    params, grads, m, v = params[mine], grads[mine], m[mine], v[mine]
    for i in range(params.size):
        g = grads[i]
        m[i] += rate1 * (g - m[i])
        v[i] = beta2 * v[i] + rate2 * g * g
        spread = math.sqrt(v[i]) / root + eps
        params[i] = keep * params[i] - size * m[i] / spread


# one step of AdamW
@shapes("N!, N, N!, N!", **ADAMW_LIMITS)
def adamw_update(
    params, grads, m, v,
    learning_rate, beta1, beta2, eps, weight_decay, step,
):  # fmt: skip
    """Take one step of AdamW, in the order in which torch.optim.AdamW does.

    params, grads, m, v: float32 or float64, flat, of one length; params, m
    and v change in place. m and v are the running means of the gradient and
    of its square, zero before the first step. step counts from 1.
    weight_decay applies to every element. Raises TypeError or ValueError
    for a wrong dtype or shape and for settings out of range.

    Derived in chapter 1.12.
    """
    keep = 1 - learning_rate * weight_decay
    root = math.sqrt(1 - beta2**step)
    size = learning_rate / (1 - beta1**step)
    numbers = (keep, 1 - beta1, beta2, 1 - beta2, root, eps, size)
    numbers = tuple([params.dtype.type(x) for x in numbers])
    _adamw_update(params, grads, m, v, numbers)


# the sum of squares
@team
def _sum_of_squares(part, parts, address):
    grads, sums = arguments(address)
    length = (grads.size + sums.size - 1) // sums.size
    for k in range(part, sums.size, parts):
        piece = grads[k * length : (k + 1) * length]
        total = 0.0
        for i in range(piece.size):
            x = np.float64(piece[i])
            total += x * x
        sums[k] = total


@team
def _scale(part, parts, address):
    grads, factor = arguments(address)
    mine = grads[share(grads.size, part, parts)]
    for i in range(mine.size):
        mine[i] *= factor


# the norm of all gradients
@shapes("N")
def global_norm(grads):
    """The Euclidean norm of a flat array, summed in float64, as a float.

    The sum is taken over 256 pieces whose bounds depend on the length alone
    and then over the pieces, so that the number of threads does not change
    it. Raises TypeError or ValueError unless `grads` is flat and
    float32 or float64.

    Derived in chapter 1.12.
    """
    sums = np.empty(256)
    _sum_of_squares(grads, sums)
    return math.sqrt(sums.sum())


# clip the gradients
@shapes("N!, above 0")
def clip_gradients(grads, max_norm):
    """Scale a flat array down to norm `max_norm` if it is longer.

    Returns the norm before clipping and scales `grads` in place by
    max_norm / (norm + 1e-6) where that is below 1, as torch's
    clip_grad_norm_. When the norm is infinite or NaN, `grads` is left as it
    is: the caller sees the norm and decides. Raises ValueError unless
    max_norm is positive, and as `global_norm` does.

    Derived in chapter 1.12.
    """
    norm = global_norm(grads)
    scale = max_norm / (norm + 1e-6)
    if math.isfinite(norm) and scale < 1:
        _scale(grads, grads.dtype.type(scale))
    return norm
