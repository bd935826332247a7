# Written by `make export` from notebooks/appendix/14_heads.py: edit that file.

"""Norms of heads, compiled for the processor's cores."""

__all__ = ["headnorm_backward", "headnorm_forward"]


# imports of the CPU's norms
import math

import numpy as np

from llmnb.backend import noted
from llmnb.cpu.jit import arguments, share, team
from llmnb.cpu.layernorm import add_rows
from llmnb.reference.local import key_heads
from llmnb.shapes import shapes


# norms of heads, the kernels
@team
def _headnorm_forward(part, parts, address):
    out, rstd, inp, qweight, kweight, NKV, eps, offset = arguments(address)
    (rows, _, hs), number = inp.shape, inp.dtype.type
    one, shift, small = number(1), number(offset), number(eps)
    mine, normed = share(rows, part, parts), rstd.shape[1]
    for n in range(mine.start, mine.stop):
        for h in range(normed):
            x, y, squares = inp[n, h], out[n, h], number(0)
            for i in range(hs):
                squares += x[i] * x[i]
            r = one / math.sqrt(squares / number(hs) + small)
            weight = qweight if h < normed - NKV else kweight
            for i in range(hs):
                y[i] = x[i] * r * (weight[i] + shift)
            rstd[n, h] = r
        out[n, normed:] = inp[n, normed:]


@team
def _headnorm_backward(part, parts, address):
    dinp, dw, inp, qweight, kweight, rstd, offset = arguments(address)
    (rows, heads, hs), number = inp.shape, inp.dtype.type
    normed, shift = rstd.shape[1], number(offset)
    queries = 2 * normed - heads
    mine = share(len(dw), part, parts)
    for k in range(mine.start, mine.stop):
        some = share(rows, k, len(dw))
        dw[k] = 0
        for n in range(some.start, some.stop):
            for h in range(normed):
                which = 0 if h < queries else 1
                weight = qweight if h < queries else kweight
                x, dx, r, mean = inp[n, h], dinp[n, h], rstd[n, h], number(0)
                for i in range(hs):
                    mean += dx[i] * (weight[i] + shift) * x[i]
                mean *= r / number(hs)
                for i in range(hs):
                    hat, dhat = x[i] * r, dx[i] * (weight[i] + shift)
                    dw[k, which, i] += dx[i] * hat
                    dx[i] = r * (dhat - hat * mean)


# norms of heads, compiled
@shapes(
    "B T QKV!, B T N!, B T QKV, hs, hs", eps="above 0", offset="at least 0"
)
def headnorm_forward(out, rstd, inp, qweight, kweight, eps=1e-6, offset=0.0):
    """RMSNorm over the channels of each head of queries and of keys.

    out, inp: (B, T, (NH + 2 NKV) * hs); values are copied. rstd: (B, T,
    NH + NKV), saved for the backward pass. qweight, kweight: (hs,), used
    for all heads. eps, offset: as for rmsnorm_forward. All float32 or all
    float64 and C-contiguous; out and rstd are overwritten. Raises TypeError
    or ValueError before it computes anything.

    Derived in chapter A.14.
    """
    hs = qweight.size
    NKV = key_heads("headnorm_forward", inp, rstd, hs)
    y, x = (a.reshape(-1, a.shape[2] // hs, hs) for a in (out, inp))
    arrays = y, rstd.reshape(-1, rstd.shape[2]), x, qweight, kweight
    _headnorm_forward(*arrays, NKV, float(eps), float(offset))


@shapes("B T QKV!, hs!, hs!, B T QKV, hs, hs, B T N", offset="at least 0")
def headnorm_backward(
    dinp, dqweight, dkweight, inp, qweight, kweight, rstd, offset=0.0
):
    """Take the gradient of headnorm_forward's output to its input, in place.

    dinp: (B, T, (NH + 2 NKV) * hs) holds the gradient of the output and
    receives that of the input. dqweight, dkweight: (hs,), added to. inp,
    qweight, kweight, rstd, offset: as in the forward pass. All float32 or
    all float64 and C-contiguous. Raises TypeError or ValueError before it
    computes anything.

    Derived in chapter A.14.
    """
    hs = qweight.size
    key_heads("headnorm_backward", inp, rstd, hs)
    dx, x = (a.reshape(-1, a.shape[2] // hs, hs) for a in (dinp, inp))
    sums = np.empty((min(64, -(-len(x) // 16)), 2, hs), inp.dtype)
    stats = rstd.reshape(-1, rstd.shape[2])
    _headnorm_backward(dx, sums, x, qweight, kweight, stats, float(offset))
    noted(add_rows, dqweight, sums[:, 0])
    noted(add_rows, dkweight, sums[:, 1])
