# Written by `make export` from notebooks/1_by_hand/06_layernorm.py: edit that file.

"""LayerNorm in NumPy, forward and backward."""

__all__ = ["layernorm_backward", "layernorm_forward"]


# imports
import numpy as np

from llmnb.shapes import shapes


# epsilon
EPS = 1e-5


# layernorm, forward
@shapes("B T C!, B T!, B T!, B T C, C, C")
def layernorm_forward(out, mean, rstd, inp, weight, bias):
    """Normalise each row of inp, then scale and shift each channel.

    out, inp: (B, T, C). mean, rstd: (B, T), the mean and the reciprocal
    deviation of each row, saved for the backward pass. weight, bias: (C,).
    All of one float dtype; out, mean and rstd are overwritten.

    Derived in chapter 1.6.
    """
    mean[...] = inp.mean(axis=-1)
    centred = inp - mean[..., None]
    variance = (centred**2).mean(axis=-1)
    rstd[...] = 1 / np.sqrt(variance + EPS)
    out[...] = centred * rstd[..., None] * weight + bias


# layernorm, backward
@shapes("B T C!, C!, C!, B T C, B T C, C, B T, B T")
def layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd):
    """Add LayerNorm's gradients to dinp, dweight and dbias.

    dinp, dout, inp: (B, T, C). dweight, dbias, weight: (C,). mean, rstd:
    (B, T), as the forward pass left them. All of one float dtype; the first
    three are added to in place.

    Derived in chapter 1.6.
    """
    norm = (inp - mean[..., None]) * rstd[..., None]
    dweight += (dout * norm).sum(axis=(0, 1))
    dbias += dout.sum(axis=(0, 1))
    dnorm = dout * weight
    dnorm_mean = dnorm.mean(axis=-1, keepdims=True)
    dnorm_norm_mean = (dnorm * norm).mean(axis=-1, keepdims=True)
    dinp += rstd[..., None] * (dnorm - dnorm_mean - norm * dnorm_norm_mean)
