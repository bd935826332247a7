# Written by `make export` from notebooks/04_layernorm.py: edit that file.

"""Normalise a layer and differentiate it.

LayerNorm gives every token's vector mean 0 and variance 1, then scales and
shifts each channel; its backward pass takes two sums a row.
"""

__all__ = [
    "layernorm_backward",
    "layernorm_forward",
]


# imports of the CPU module
import math

import numba
import numpy as np

from llmnb.checks import check_array, check_float
from llmnb.cpu.jit import kernel


# the forward kernel
EPS = 1e-5


@kernel
def _layernorm_forward(out, mean, rstd, inp, weight, bias):
    rows, C = inp.shape
    for n in numba.prange(rows):
        x, y = inp[n], out[n]
        total = inp.dtype.type(0)
        for i in range(C):
            total += x[i]
        mu = total / inp.dtype.type(C)
        squares = inp.dtype.type(0)
        for i in range(C):
            squares += (x[i] - mu) * (x[i] - mu)
        variance = squares / inp.dtype.type(C)
        r = inp.dtype.type(1) / math.sqrt(variance + inp.dtype.type(EPS))
        for i in range(C):
            y[i] = (x[i] - mu) * r * weight[i] + bias[i]
        mean[n] = mu
        rstd[n] = r


# the checks
def _check(name, inp, like, mean, rstd, *channels):
    check_float(f"{name}: inp", inp)
    if inp.ndim != 3:
        raise ValueError(
            f"{name}: inp must have shape (B, T, C), got {inp.shape}"
        )
    B, T, C = inp.shape
    check_array(f"{name}: inp", inp, (B, T, C), inp.dtype)
    for label, array in like.items():
        check_array(f"{name}: {label}", array, (B, T, C), inp.dtype)
    check_array(f"{name}: mean", mean, (B, T), inp.dtype)
    check_array(f"{name}: rstd", rstd, (B, T), inp.dtype)
    for array in channels:
        check_array(f"{name}: each (C,) array", array, (C,), inp.dtype)


# layernorm, forward
def layernorm_forward(out, mean, rstd, inp, weight, bias):
    """Normalise each row of inp, then scale and shift each channel.

    out, inp: (B, T, C). mean, rstd: (B, T), the mean and the reciprocal
    deviation of each row, saved for the backward pass. weight, bias: (C,).
    All float32 or all float64 and C-contiguous; out, mean and rstd are
    overwritten. Raises TypeError or ValueError before it computes anything.

    Derived in chapter 4.
    """
    _check("layernorm_forward", inp, {"out": out}, mean, rstd, weight, bias)
    C = inp.shape[-1]
    rows = [a.reshape(-1, C) for a in (out, inp)]
    _layernorm_forward(
        rows[0], mean.reshape(-1), rstd.reshape(-1), rows[1], weight, bias
    )


# the backward kernel by rows
@kernel
def _backward_rows(dinp, dout, inp, weight, mean, rstd):
    rows, C = inp.shape
    for n in numba.prange(rows):
        x, dy, dx = inp[n], dout[n], dinp[n]
        mu, r = mean[n], rstd[n]
        a = b = inp.dtype.type(0)
        for i in range(C):
            dnorm = dy[i] * weight[i]
            a += dnorm
            b += dnorm * (x[i] - mu) * r
        a /= inp.dtype.type(C)
        b /= inp.dtype.type(C)
        for i in range(C):
            norm = (x[i] - mu) * r
            dx[i] += r * (dy[i] * weight[i] - a - norm * b)


# the backward kernel by channels
BLOCK = 64  # channels a thread owns: 256 bytes of each row, 4 cache lines


@kernel
def _backward_channels(dweight, dbias, dout, inp, mean, rstd):
    rows, C = inp.shape
    for block in numba.prange((C + BLOCK - 1) // BLOCK):
        first, last = block * BLOCK, min((block + 1) * BLOCK, C)
        dw, db = dweight[first:last], dbias[first:last]
        for n in range(rows):
            x, dy = inp[n, first:last], dout[n, first:last]
            mu, r = mean[n], rstd[n]
            for i in range(dw.size):
                dw[i] += dy[i] * (x[i] - mu) * r
                db[i] += dy[i]


# layernorm, backward
def layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd):
    """Add LayerNorm's gradients to dinp, dweight and dbias.

    dinp, dout, inp: (B, T, C). dweight, dbias, weight: (C,). mean, rstd:
    (B, T), as the forward pass left them. All float32 or all float64 and
    C-contiguous; the first three are added to in place. Raises TypeError or
    ValueError before it computes anything.

    Derived in chapter 4.
    """
    like = {"dinp": dinp, "dout": dout}
    channels = dweight, dbias, weight
    _check("layernorm_backward", inp, like, mean, rstd, *channels)
    C = inp.shape[-1]
    dx, dy, x = (a.reshape(-1, C) for a in (dinp, dout, inp))
    mu, r = mean.reshape(-1), rstd.reshape(-1)
    _backward_rows(dx, dy, x, weight, mu, r)
    _backward_channels(dweight, dbias, dy, x, mu, r)
