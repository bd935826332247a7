# Written by `make export` from notebooks/5_modern/03_gated.py: edit that file.

"""Gated feed-forward layers in NumPy: SwiGLU and GeGLU."""

__all__ = [
    "geglu_backward", "geglu_forward", "swiglu_backward", "swiglu_forward",
]


# imports of the layer
import numpy as np

from llmnb.reference.gelu import gelu_backward, gelu_forward
from llmnb.shapes import shapes


# the sigmoid
def _sigmoid(x):
    q = np.exp(-np.abs(x))  # of no positive number: nothing overflows
    return np.where(x > 0, 1, q) / (1 + q)


# gates, forward
@shapes("B T H!, B T 2H")
def swiglu_forward(out, inp):
    """Multiply SiLU of the first half of each row by the second half.

    inp: (B, T, 2 H), gates and then values. out: (B, T, H), overwritten.
    Both of one float dtype.

    Derived in chapter 5.3.
    """
    gate, up = np.split(inp, 2, axis=-1)
    out[...] = gate * _sigmoid(gate) * up


@shapes("B T H!, B T 2H")
def geglu_forward(out, inp):
    """Multiply GELU of the first half of each row by the second half.

    inp: (B, T, 2 H), gates and then values. out: (B, T, H), overwritten.
    Both of one float dtype; GELU in the tanh form.

    Derived in chapter 5.3.
    """
    gate, up = (x.copy() for x in np.split(inp, 2, axis=-1))
    gelu_forward(out, gate)
    out *= up


# gates, backward
@shapes("B T 2H!, B T H, B T 2H")
def swiglu_backward(dinp, dout, inp):
    """Write the gradient of SwiGLU by gates and values.

    dinp, inp: (B, T, 2 H). dout: (B, T, H). All of one float dtype; dinp is
    overwritten.

    Derived in chapter 5.3.
    """
    gate, up = np.split(inp, 2, axis=-1)
    H, sigma = gate.shape[-1], _sigmoid(gate)
    dinp[..., :H] = dout * up * sigma * (1 + gate * (1 - sigma))
    dinp[..., H:] = dout * gate * sigma


@shapes("B T 2H!, B T H, B T 2H")
def geglu_backward(dinp, dout, inp):
    """Write the gradient of GeGLU by gates and values.

    dinp, inp: (B, T, 2 H). dout: (B, T, H). All of one float dtype; dinp is
    overwritten.

    Derived in chapter 5.3.
    """
    gate, up = (x.copy() for x in np.split(inp, 2, axis=-1))
    H, grad = gate.shape[-1], np.empty_like(gate)
    gelu_backward(grad, dout * up, gate, add=False)
    dinp[..., :H] = grad
    gelu_forward(grad, gate)
    dinp[..., H:] = dout * grad
