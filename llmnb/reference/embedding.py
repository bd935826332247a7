# Written by `make export` from notebooks/5_modern/05_architectures.py: edit that file.

"""Token vectors in NumPy, without positions."""

__all__ = ["embedding_backward", "embedding_forward"]


# imports of the embedding
import numpy as np

from llmnb.shapes import shapes


# token vectors
@shapes("B T C!, B T of Vp, Vp C", scale="above 0")
def embedding_forward(out, inp, wte, scale=1.0):
    """Write the vector of each token, times scale.

    out: (B, T, C), overwritten. inp: (B, T) integers, each in [0, Vp). wte:
    (Vp, C). out and wte of one float dtype.

    Derived in chapter 5.5.
    """
    out[...] = wte[inp] * wte.dtype.type(scale)


@shapes("Vp C!, B T C, B T of Vp", scale="above 0")
def embedding_backward(dwte, dout, inp, scale=1.0):
    """Add dout's rows, times scale, to the rows that they came from.

    dwte: (Vp, C), added to. dout: (B, T, C). inp: (B, T) integers.

    Derived in chapter 5.5.
    """
    np.add.at(dwte, inp, dout * dwte.dtype.type(scale))
