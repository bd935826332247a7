# Written by `make export` from notebooks/5_modern/01_rmsnorm.py: edit that file.

"""RMSNorm, compiled for the processor's cores."""

__all__ = ["rmsnorm_backward", "rmsnorm_forward"]


# imports of the CPU module
import math

import numpy as np

from llmnb.backend import noted
from llmnb.cpu.jit import arguments, share, team
from llmnb.cpu.layernorm import add_rows
from llmnb.shapes import shapes


# the forward kernel
@team
def _rmsnorm_forward(part, parts, address):
    out, rstd, inp, weight, eps, offset = arguments(address)
    (rows, C), number = inp.shape, inp.dtype.type
    zero, one, size = number(0), number(1), number(C)
    shift, small = number(offset), number(eps)
    mine = share(rows, part, parts)
    for n in range(mine.start, mine.stop):
        squares = zero
        for i in range(C):
            squares += inp[n, i] * inp[n, i]
        r = one / math.sqrt(squares / size + small)
        for i in range(C):
            out[n, i] = inp[n, i] * r * (weight[i] + shift)
        rstd[n] = r


# rmsnorm, forward, compiled
@shapes("B T C!, B T!, B T C, C", eps="above 0", offset="at least 0")
def rmsnorm_forward(out, rstd, inp, weight, eps=1e-5, offset=0.0):
    """Divide each row of inp by its root mean square, then scale.

    out, inp: (B, T, C). rstd: (B, T), the reciprocal of each row's root
    mean square, saved for the backward pass. weight: (C,); each channel is
    multiplied by offset + weight. eps: added to the mean square. All
    float32 or all float64 and C-contiguous; out and rstd are overwritten.
    Raises TypeError or ValueError before it computes anything.

    Derived in chapter 5.1.
    """
    C = inp.shape[-1]
    y, x = out.reshape(-1, C), inp.reshape(-1, C)
    numbers = float(eps), float(offset)
    _rmsnorm_forward(y, rstd.reshape(-1), x, weight, *numbers)


# the backward kernel
@team
def _rmsnorm_backward(part, parts, address):
    dinp, dw, dout, inp, weight, rstd, offset, add = arguments(address)
    (rows, C), number = inp.shape, inp.dtype.type
    zero, size, shift = number(0), number(C), number(offset)
    mine = share(len(dw), part, parts)
    for k in range(mine.start, mine.stop):
        some = share(rows, k, len(dw))
        dw[k] = 0
        for n in range(some.start, some.stop):
            r, mean = rstd[n], zero
            for i in range(C):
                mean += dout[n, i] * (weight[i] + shift) * inp[n, i]
            mean *= r / size
            for i in range(C):
                dhat = dout[n, i] * (weight[i] + shift)
                grad = r * (dhat - inp[n, i] * r * mean)
                if add:
                    grad += dinp[n, i]
                dinp[n, i] = grad
            for i in range(C):
                dw[k, i] += dout[n, i] * inp[n, i] * r


# rmsnorm, backward, compiled
@shapes("B T C!, C!, B T C, B T C, C, B T", offset="at least 0")
def rmsnorm_backward(
    dinp, dweight, dout, inp, weight, rstd, offset=0.0, add=True
):
    """Add RMSNorm's gradients to dinp and dweight.

    dinp, dout, inp: (B, T, C). dweight, weight: (C,). rstd: (B, T), as the
    forward pass left it. offset: as there. add: False overwrites dinp
    instead of adding to it. All float32 or all float64 and C-contiguous.
    Raises TypeError or ValueError before it computes anything.

    Derived in chapter 5.1.
    """
    C = inp.shape[-1]
    dx, dy, x = (a.reshape(-1, C) for a in (dinp, dout, inp))
    sums = np.empty((min(64, -(-len(x) // 16)), C), inp.dtype)
    how = float(offset), bool(add)
    _rmsnorm_backward(dx, sums, dy, x, weight, rstd.reshape(-1), *how)
    noted(add_rows, dweight, sums)
