# Written by `make export` from notebooks/3_gpu/05_elementwise.py: edit that file.

"""GELU on a GPU, forward and backward."""

__all__ = ["gelu_backward", "gelu_forward"]


# imports of GELU
import math

import numpy as np

from llmnb.cuda.elementwise import elementwise
from llmnb.gpu.launch import DEVICE, device
from llmnb.shapes import shapes


# the constants of the GPU's kernels
SLOPE32 = np.float32(2 * math.sqrt(2 / math.pi))
CUBIC32 = np.float32(0.044715)
ONE, ZERO, THREE = np.float32(1), np.float32(0), np.float32(3)


# GELU of one number
@device
def gelu_of(x):
    q = math.exp(-abs(SLOPE32 * x * (ONE + CUBIC32 * x * x)))
    return x * (ONE if x > ZERO else q) / (ONE + q)


@device
def gelu_back(dout, x):
    q = math.exp(-abs(SLOPE32 * x * (ONE + CUBIC32 * x * x)))
    r = ONE / (ONE + q)
    dv = SLOPE32 * (ONE + THREE * CUBIC32 * x * x)
    return dout * ((ONE if x > ZERO else q) * r + x * dv * q * r * r)


# the layer
_forward = elementwise(gelu_of, reads=1)
_backward = elementwise(gelu_back, reads=2)


@shapes("...!, ...~", DEVICE)
def gelu_forward(out, inp):
    """Write GELU of every element of inp to out, by the tanh form.

    out, inp: a device's arrays of one shape, any, float32; out is
    overwritten, and may be inp. Raises TypeError or ValueError before it
    launches anything.

    Derived in chapter 3.5.
    """
    _forward(out.reshape(-1), inp.reshape(-1))


@shapes("...!, ...~, ...", DEVICE)
def gelu_backward(dinp, dout, inp, add=True):
    """Add GELU's gradient to dinp, or overwrite dinp with it.

    dinp, dout, inp: a device's arrays of one shape, any, float32; dinp is
    added to in place. With add=False it is overwritten, and it may be dout
    itself. Raises TypeError or ValueError before it launches anything.

    Derived in chapter 3.5.
    """
    flat = [x.reshape(-1) for x in (dinp, dout, inp)]
    _backward(*flat, add=int(add))
