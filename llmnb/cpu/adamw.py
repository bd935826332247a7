# Written by `make export` from notebooks/2_cpu/03_loss.py: edit that file.

"""AdamW and clipping, compiled for the processor's cores."""

__all__ = [
    "PIECES", "adamw_update", "clip_gradients", "global_norm", "piece_length",
    "shrink", "squares",
]


# imports of AdamW
import math

import numpy as np

from llmnb.cpu.jit import arguments, inlined, share, team
from llmnb.shapes import shapes


# the kernel
@inlined
def learn(params, grads, m, v, factors):
    """AdamW on some parameters; returns the sum of their grads' squares."""
    keep, new1, beta2, new2, root, eps, size = factors
    total = grads.dtype.type(0)
    for i in range(params.size):
        g = grads[i]
        total += g * g
        m[i] += new1 * (g - m[i])
        v[i] = beta2 * v[i] + new2 * g * g
        spread = math.sqrt(v[i]) / root + eps
        params[i] = keep * params[i] - size * m[i] / spread
    return total


@team
def _adamw_update(part, parts, address):
    params, grads, m, v, factors = arguments(address)
    mine = share(params.size, part, parts)
    learn(params[mine], grads[mine], m[mine], v[mine], factors)


# one step of AdamW
@shapes("N!, N, N!, N!")
def adamw_update(params, grads, m, v, settings):
    """Take one step of AdamW, in the order in which torch.optim.AdamW does.

    params, grads, m, v: float32 or float64, flat, of one length; params, m
    and v change in place. m and v are the running means of the gradient and
    of its square, zero before the first step. settings: an AdamW; its decay
    applies to every element. Raises TypeError or ValueError for a wrong
    dtype or shape and for settings out of range.

    Derived in chapter 2.3.
    """
    factors = map(params.dtype.type, settings.factors("adamw_update"))
    _adamw_update(params, grads, m, v, tuple(factors))


# the kernels
@team
def _sum_of_squares(part, parts, address):
    grads, sums, length = arguments(address)
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


# the norm and the clip
PIECES = 256  # of an array, each summed by itself


@shapes("N")
def global_norm(grads):
    """The Euclidean norm of a flat array, summed in float64, as a float.

    The sum is taken over 256 pieces whose bounds depend on the length alone
    and then over the pieces, so that the number of threads does not change
    it. Raises TypeError or ValueError unless `grads` is flat and
    float32 or float64.

    Derived in chapter 2.3.
    """
    sums, found = np.zeros(PIECES), squares(grads, piece_length(grads.size))
    sums[: found.size] = found
    return math.sqrt(sums.sum())


def piece_length(size):
    """Elements in each of the pieces of an array, but for the last ones.

    Derived in chapter 2.3.
    """
    return max(1, -(-size // PIECES))


def squares(grads, length):
    """The sums of squares of pieces of so many elements; in float64.

    grads: flat. Each sum is of one piece alone, whatever lies beside it.

    Derived in chapter 2.3.
    """
    sums = np.empty(-(-grads.size // length))
    _sum_of_squares(grads, sums, length)
    return sums


@shapes("N!, above 0")
def clip_gradients(grads, max_norm):
    """Scale a flat array down to norm `max_norm` if it is longer.

    Returns the norm before clipping and scales `grads` in place by
    max_norm / (norm + 1e-6) where that is below 1, as torch's
    clip_grad_norm_. When the norm is infinite or NaN, `grads` is left as it
    is: the caller sees the norm and decides. Raises ValueError unless
    max_norm is positive, and as `global_norm` does.

    Derived in chapter 2.3.
    """
    norm = global_norm(grads)
    shrink(grads, norm, max_norm)
    return norm


def shrink(grads, norm, max_norm):
    """Scale a flat array in place as `clip_gradients` does, for a norm.

    Derived in chapter 2.3.
    """
    scale = max_norm / (norm + 1e-6)
    if math.isfinite(norm) and scale < 1:
        _scale(grads, grads.dtype.type(scale))
