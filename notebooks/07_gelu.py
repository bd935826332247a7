# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     module: reference.gelu
# ---

# %% [markdown]
# # Bend the line and differentiate the bend
#
# > GELU lets large numbers through and holds small ones back; written as a
# > sigmoid it costs one exponential an element, forward and backward.

# %% imports tags=["export"]
import numpy as np

# %% the constants tags=["exporti"]
ROOT = np.sqrt(2 / np.pi)
CUBIC = 0.044715


# %% GELU, forward tags=["export"]
def gelu_forward(out, inp):
    """Write GELU of every element of inp to out, by the tanh form.

    out, inp: arrays of one shape, any, and one float dtype; out is
    overwritten.

    Derived in chapter 7.
    """
    u = ROOT * (inp + CUBIC * inp**3)
    out[...] = 0.5 * inp * (1 + np.tanh(u))


# %% GELU, backward tags=["export"]
def gelu_backward(dinp, dout, inp):
    """Add GELU's gradient to dinp.

    dinp, dout, inp: arrays of one shape, any, and one float dtype; dinp is
    added to in place.

    Derived in chapter 7.
    """
    t = np.tanh(ROOT * (inp + CUBIC * inp**3))
    du = ROOT * (1 + 3 * CUBIC * inp**2)
    dinp += dout * 0.5 * (1 + t + inp * (1 - t**2) * du)


# %% imports of the CPU module tags=["export"] module="cpu.gelu"
import math

import numba

from llmnb.checks import check_array, check_float
from llmnb.cpu.jit import inner, kernel
from llmnb.cpu.math import fast_exp

# %% the constants of the kernels tags=["exporti"] module="cpu.gelu"
SLOPE = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715
BLOCK = 4096


# %% the exponential inside tags=["exporti"] module="cpu.gelu"
@inner
def _decay(x, slope, cubic, one):
    return fast_exp(-abs(slope * x * (one + cubic * x * x)))


# %% the forward kernel tags=["exporti"] module="cpu.gelu"
@kernel
def _gelu_forward(out, inp):
    number = inp.dtype.type
    slope, cubic, one = number(SLOPE), number(CUBIC), number(1)
    for t in numba.prange(-(-inp.size // BLOCK)):
        first, last = t * BLOCK, (t + 1) * BLOCK
        ys, xs = out[first:last], inp[first:last]
        for i in range(xs.size):
            x = xs[i]
            q = _decay(x, slope, cubic, one)
            ys[i] = x * (one if x > 0 else q) / (one + q)


# %% the backward kernel tags=["exporti"] module="cpu.gelu"
@kernel
def _gelu_backward(dinp, dout, inp):
    number = inp.dtype.type
    slope, cubic, one = number(SLOPE), number(CUBIC), number(1)
    triple = number(3 * CUBIC)
    for t in numba.prange(-(-inp.size // BLOCK)):
        first, last = t * BLOCK, (t + 1) * BLOCK
        dx, dy, xs = dinp[first:last], dout[first:last], inp[first:last]
        for i in range(xs.size):
            x = xs[i]
            q = _decay(x, slope, cubic, one)
            r = one / (one + q)
            dv = slope * (one + triple * x * x)
            s = (one if x > 0 else q) * r
            dx[i] += dy[i] * (s + x * dv * q * r * r)


# %% GELU, forward tags=["export"] module="cpu.gelu"
def gelu_forward(out, inp):
    """Write GELU of every element of inp to out, by the tanh form.

    out, inp: arrays of one shape, any; both float32 or both float64 and
    C-contiguous; out is overwritten. Raises TypeError or ValueError before
    it computes anything.

    Derived in chapter 7.
    """
    _check("gelu_forward", inp, out=out)
    _gelu_forward(out.reshape(-1), inp.reshape(-1))


def _check(name, inp, **others):
    check_float(f"{name}: inp", inp)
    check_array(f"{name}: inp", inp, inp.shape, inp.dtype)
    for label, array in others.items():
        check_array(f"{name}: {label}", array, inp.shape, inp.dtype)


# %% GELU, backward tags=["export"] module="cpu.gelu"
def gelu_backward(dinp, dout, inp):
    """Add GELU's gradient to dinp.

    dinp, dout, inp: arrays of one shape, any; all float32 or all float64
    and C-contiguous; dinp is added to in place. Raises TypeError or
    ValueError before it computes anything.

    Derived in chapter 7.
    """
    _check("gelu_backward", inp, dinp=dinp, dout=dout)
    _gelu_backward(dinp.reshape(-1), dout.reshape(-1), inp.reshape(-1))
