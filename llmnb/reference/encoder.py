# Written by `make export` from notebooks/1_by_hand/05_encoder.py: edit that file.

"""The encoder in NumPy: token and position vectors, and their gradients."""

__all__ = ["encoder_backward", "encoder_forward"]


# imports of the reference
import numpy as np

from llmnb.shapes import shapes


# the forward pass
@shapes("B T C!, B T of Vp, Vp C, T+ C")
def encoder_forward(out, inp, wte, wpe):
    """Sum the vector of each token and the vector of its position.

    out   (B, T, C)      float, overwritten
    inp   (B, T)         integer, each in [0, Vp)
    wte   (Vp, C)        float, the table of tokens
    wpe   (T_max, C)     float, the table of positions; T <= T_max

    Derived in chapter 1.5.
    """
    T = inp.shape[1]
    out[...] = wte[inp] + wpe[:T]


# the backward pass
@shapes("Vp C!, T+ C!, B T C, B T of Vp")
def encoder_backward(dwte, dwpe, dout, inp):
    """Add dout's rows to the rows of the tables that they came from.

    dwte  (Vp, C)        float, added to; rows of absent tokens stay
    dwpe  (T_max, C)     float, added to; rows from T on stay
    dout  (B, T, C)      float
    inp   (B, T)         integer, as in the forward pass

    Derived in chapter 1.5.
    """
    T = inp.shape[1]
    np.add.at(dwte, inp, dout)
    dwpe[:T] += dout.sum(axis=0)
