# Written by `make export` from notebooks/2_cpu/02_rows.py: edit that file.

"""GELU, compiled for the processor's cores."""

__all__ = ["gelu_backward", "gelu_forward"]


# imports of the CPU module
import numpy as np

from llmnb.backend import noted
from llmnb.cpu.jit import arguments, inlined, share, team
from llmnb.cpu.math import fast_exp
from llmnb.reference.gelu import CUBIC, ROOT
from llmnb.shapes import shapes


# the slope of twice xi
SLOPE = 2 * ROOT


# the forward kernel
@team
def _gelu_forward(part, parts, address):
    out, inp = arguments(address)
    number, mine = inp.dtype.type, share(inp.size, part, parts)
    slope, cubic, one = number(SLOPE), number(CUBIC), number(1)
    out, inp = out[mine], inp[mine]
    for i in range(inp.size):
        x = inp[i]
        q = fast_exp(-abs(slope * x * (one + cubic * x * x)))
        out[i] = x * (one if x > 0 else q) / (one + q)


# the slope
@inlined
def _slope(x, slope, cubic, one):
    q = fast_exp(-abs(slope * x * (one + cubic * x * x)))
    r = one / (one + q)
    dv = slope * (one + (cubic + cubic + cubic) * x * x)
    return (one if x > 0 else q) * r + x * dv * q * r * r


# the backward kernel
@team
def _gelu_backward(part, parts, address):
    dinp, dout, inp, add = arguments(address)
    number, mine = inp.dtype.type, share(inp.size, part, parts)
    slope, cubic, one = number(SLOPE), number(CUBIC), number(1)
    dinp, dout, inp = dinp[mine], dout[mine], inp[mine]
    if add:
        for i in range(inp.size):
            dinp[i] += dout[i] * _slope(inp[i], slope, cubic, one)
    else:
        for i in range(inp.size):
            dinp[i] *= _slope(inp[i], slope, cubic, one)


# GELU, forward
@shapes("...!, ...~")
def gelu_forward(out, inp):
    """Write GELU of every element of inp to out, by the tanh form.

    out, inp: arrays of one shape, any; both float32 or both float64 and
    C-contiguous; out is overwritten. Raises TypeError or ValueError before
    it computes anything.

    Derived in chapter 2.2.
    """
    _gelu_forward(out.reshape(-1), inp.reshape(-1))


# GELU, backward
@shapes("...!, ...~, ...")
def gelu_backward(dinp, dout, inp, add=True):
    """Add GELU's gradient to dinp, or overwrite dinp with it.

    dinp, dout, inp: arrays of one shape, any; all float32 or all float64
    and C-contiguous; dinp is added to in place. With add=False it is
    overwritten, and it may be dout itself.
    Raises TypeError or ValueError before it computes anything.

    Derived in chapter 2.2.
    """
    if not add and dinp is not dout:
        noted(np.copyto, dinp, dout)
    flat = [x.reshape(-1) for x in (dinp, dout, inp)]
    _gelu_backward(*flat, bool(add))
