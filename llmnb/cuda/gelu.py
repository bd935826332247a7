# Written by `make export` from notebooks/1_by_hand/09_gelu.py: edit that file.

"""GELU on a GPU, forward and backward."""

__all__ = [
    "GELU_BACKWARD",
    "GELU_FORWARD",
    "gelu_backward",
    "gelu_forward",
]


# imports of the CUDA module
import math
from functools import partial

import numpy as np

from llmnb.cuda.elementwise import by_element, by_four
from llmnb.gpu.launch import DEVICE, device, kernel, numbered
from llmnb.gpu.simulator import cuda, load4, store4
from llmnb.shapes import shapes


# the constants of the GPU's kernels
SLOPE32 = np.float32(2 * math.sqrt(2 / math.pi))
CUBIC32 = np.float32(0.044715)
ONE, ZERO, THREE = np.float32(1), np.float32(0), np.float32(3)


# GELU of one number
@device
def _gelu(x):
    q = math.exp(-abs(SLOPE32 * x * (ONE + CUBIC32 * x * x)))
    return x * (ONE if x > ZERO else q) / (ONE + q)


@device
def _gelu_slope(x):
    q = math.exp(-abs(SLOPE32 * x * (ONE + CUBIC32 * x * x)))
    r = ONE / (ONE + q)
    dv = SLOPE32 * (ONE + THREE * CUBIC32 * x * x)
    return (ONE if x > ZERO else q) * r + x * dv * q * r * r


# version 1
@kernel
def _forward_elements(out, inp):
    i = cuda.grid(1)
    if i < inp.size:
        out[i] = _gelu(inp[i])


@kernel
def _backward_elements(dinp, dout, inp, add):
    i = cuda.grid(1)
    if i < inp.size:
        grad = dout[i] * _gelu_slope(inp[i])
        if add:
            grad += dinp[i]
        dinp[i] = grad


# version 2, forward
@kernel
def _forward_fours(out, inp):
    i, fours = cuda.grid(1), inp.size // 4
    if i < fours:
        a, b, c, d = load4(inp, 4 * i)
        store4(out, 4 * i, _gelu(a), _gelu(b), _gelu(c), _gelu(d))
    elif 3 * fours + i < inp.size:
        out[3 * fours + i] = _gelu(inp[3 * fours + i])


# version 2, backward
@kernel
def _backward_fours(dinp, dout, inp, add):
    i, fours = cuda.grid(1), inp.size // 4
    if i < fours:
        a, b, c, d = load4(inp, 4 * i)
        e, f, g, h = load4(dout, 4 * i)
        e, f = e * _gelu_slope(a), f * _gelu_slope(b)
        g, h = g * _gelu_slope(c), h * _gelu_slope(d)
        if add:
            a, b, c, d = load4(dinp, 4 * i)
            e, f, g, h = a + e, b + f, c + g, d + h
        store4(dinp, 4 * i, e, f, g, h)
    elif 3 * fours + i < inp.size:
        i += 3 * fours
        grad = dout[i] * _gelu_slope(inp[i])
        if add:
            grad += dinp[i]
        dinp[i] = grad


# GELU, forward
# one element a thread; four neighbours a thread
GELU_FORWARD = (
    partial(by_element, _forward_elements),
    partial(by_four, _forward_fours, _forward_elements),
)


@shapes("...!, ...~", DEVICE)
def gelu_forward(out, inp, version=2):
    """Write GELU of every element of inp to out, by the tanh form.

    out, inp: a device's arrays of one shape, any, float32; out is
    overwritten, and may be inp. version: which kernel, from 1 on. Raises
    TypeError or ValueError before it launches anything.

    Derived in chapter 1.9.
    """
    run = numbered(GELU_FORWARD, version, "gelu_forward")
    run((out.reshape(-1), inp.reshape(-1)))


# GELU, backward
# one element a thread; four neighbours a thread
GELU_BACKWARD = (
    partial(by_element, _backward_elements),
    partial(by_four, _backward_fours, _backward_elements),
)


@shapes("...!, ...~, ...", DEVICE)
def gelu_backward(dinp, dout, inp, add=True, version=2):
    """Add GELU's gradient to dinp, or overwrite dinp with it.

    dinp, dout, inp: a device's arrays of one shape, any, float32; dinp is
    added to in place. With add=False it is overwritten, and it may be dout
    itself. version: which kernel, from 1 on. Raises TypeError or ValueError
    before it launches anything.

    Derived in chapter 1.9.
    """
    run = numbered(GELU_BACKWARD, version, "gelu_backward")
    run([x.reshape(-1) for x in (dinp, dout, inp)], int(add))
