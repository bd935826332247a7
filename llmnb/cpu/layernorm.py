# Written by `make export` from notebooks/2_cpu/02_rows.py: edit that file.

"""LayerNorm, compiled for the processor's cores."""

__all__ = ["layernorm_backward", "layernorm_forward"]


# imports of the CPU module
import math

import numpy as np

from llmnb.backend import noted
from llmnb.cpu.jit import arguments, share, team
from llmnb.reference.layernorm import EPS
from llmnb.shapes import shapes


# the forward kernel
@team
def _layernorm_forward(part, parts, address):
    out, mean, rstd, inp, weight, bias = arguments(address)
    (rows, C), number = inp.shape, inp.dtype.type
    zero, one, size, eps = number(0), number(1), number(C), number(EPS)
    mine = share(rows, part, parts)
    for n in range(mine.start, mine.stop):
        total = squares = zero
        for i in range(C):
            total += inp[n, i]
        mu = total / size
        for i in range(C):
            squares += (inp[n, i] - mu) * (inp[n, i] - mu)
        r = one / math.sqrt(squares / size + eps)
        for i in range(C):
            out[n, i] = (inp[n, i] - mu) * r * weight[i] + bias[i]
        mean[n] = mu
        rstd[n] = r


# layernorm, forward
@shapes("B T C!, B T!, B T!, B T C, C, C")
def layernorm_forward(out, mean, rstd, inp, weight, bias):
    """Normalise each row of inp, then scale and shift each channel.

    out, inp: (B, T, C). mean, rstd: (B, T), the mean and the reciprocal
    deviation of each row, saved for the backward pass. weight, bias: (C,).
    All float32 or all float64 and C-contiguous; out, mean and rstd are
    overwritten. Raises TypeError or ValueError before it computes anything.

    Derived in chapter 2.2.
    """
    C = inp.shape[-1]
    y, x = (a.reshape(-1, C) for a in (out, inp))
    _layernorm_forward(y, mean.reshape(-1), rstd.reshape(-1), x, weight, bias)


# the backward kernel
@team
def _layernorm_backward(part, parts, address):
    dinp, dw, db, dout, inp, weight, mean, rstd = arguments(address)
    (rows, C), number = inp.shape, inp.dtype.type
    mine, zero, size = share(len(dw), part, parts), number(0), number(C)
    for k in range(mine.start, mine.stop):
        some = share(rows, k, len(dw))
        dw[k], db[k] = 0, 0
        for n in range(some.start, some.stop):
            mu, r = mean[n], rstd[n]
            a = b = zero
            for i in range(C):
                dnorm = dout[n, i] * weight[i]
                a += dnorm
                b += dnorm * (inp[n, i] - mu) * r
            a /= size
            b /= size
            for i in range(C):
                norm = (inp[n, i] - mu) * r
                dinp[n, i] += r * (dout[n, i] * weight[i] - a - norm * b)
            for i in range(C):
                dw[k, i] += dout[n, i] * (inp[n, i] - mu) * r
                db[k, i] += dout[n, i]


# add the sums
def add_rows(total, rows):
    """Add the sum of all rows to a vector, in place."""
    total += rows.sum(axis=0)


# layernorm, backward
@shapes("B T C!, C!, C!, B T C, B T C, C, B T, B T")
def layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd):
    """Add LayerNorm's gradients to dinp, dweight and dbias.

    dinp, dout, inp: (B, T, C). dweight, dbias, weight: (C,). mean, rstd:
    (B, T), as the forward pass left them. All float32 or all float64 and
    C-contiguous; the first three are added to in place. Raises TypeError or
    ValueError before it computes anything.

    Derived in chapter 2.2.
    """
    C = inp.shape[-1]
    dx, dy, x = (a.reshape(-1, C) for a in (dinp, dout, inp))
    sums = np.empty((2, min(64, -(-len(x) // 16)), C), inp.dtype)
    stats = mean.reshape(-1), rstd.reshape(-1)
    _layernorm_backward(dx, *sums, dy, x, weight, *stats)
    noted(add_rows, dweight, sums[0])
    noted(add_rows, dbias, sums[1])
