# Written by `make export` from notebooks/1_by_hand/09_gelu.py: edit that file.

"""GELU in NumPy, forward and backward."""

__all__ = ["gelu_backward", "gelu_forward"]


# imports
import numpy as np

from llmnb.shapes import shapes


# the constants
ROOT = np.sqrt(2 / np.pi)
CUBIC = 0.044715


# GELU, forward
@shapes("...!, ...~")
def gelu_forward(out, inp):
    """Write GELU of every element of inp to out, by the tanh form.

    out, inp: arrays of one shape, any, and one float dtype; out is
    overwritten.

    Derived in chapter 1.9.
    """
    xi = ROOT * (inp + CUBIC * inp**3)
    out[...] = 0.5 * inp * (1 + np.tanh(xi))


# GELU, backward
@shapes("...!, ...~, ...")
def gelu_backward(dinp, dout, inp, add=True):
    """Add GELU's gradient to dinp, or overwrite dinp with it.

    dinp, dout, inp: arrays of one shape, any, and one float dtype; dinp is
    added to in place. With add=False it is overwritten and its old contents
    are not used, so it need not be zeroed.

    Derived in chapter 1.9.
    """
    tanh = np.tanh(ROOT * (inp + CUBIC * inp**3))
    dxi = ROOT * (1 + 3 * CUBIC * inp**2)
    grad = dout * 0.5 * (1 + tanh + inp * (1 - tanh**2) * dxi)
    dinp[...] = dinp + grad if add else grad
