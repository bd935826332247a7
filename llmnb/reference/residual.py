# Written by `make export` from notebooks/1_by_hand/10_residual.py: edit that file.

"""The residual sum in NumPy, forward and backward."""

__all__ = ["residual_backward", "residual_forward"]


# imports of the reference
import numpy as np

from llmnb.shapes import shapes


# the forward pass
@shapes("...!, ...~, ...~")
def residual_forward(out, inp1, inp2):
    """Add two arrays.

    out, inp1, inp2: float, all of one shape; out is overwritten, and may be
    inp1 or inp2.

    Derived in chapter 1.10.
    """
    np.add(inp1, inp2, out=out)


# the backward pass
@shapes("...!, ...!, ...")
def residual_backward(dinp1, dinp2, dout):
    """Add the gradient of the sum to the gradients of both its terms.

    dinp1, dinp2, dout: float, all of one shape, three distinct arrays;
    dinp1 and dinp2 are added to.

    Derived in chapter 1.10.
    """
    dinp1 += dout
    dinp2 += dout
