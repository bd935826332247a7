# Written by `make export` from notebooks/5_modern/01_rmsnorm.py: edit that file.

"""RMSNorm in NumPy, forward and backward."""

__all__ = ["rmsnorm_backward", "rmsnorm_forward"]


# imports of the layer
import numpy as np

from llmnb.shapes import shapes


# rmsnorm, forward
@shapes("B T C!, B T!, B T C, C", eps="above 0", offset="at least 0")
def rmsnorm_forward(out, rstd, inp, weight, eps=1e-5, offset=0.0):
    """Divide each row of inp by its root mean square, then scale.

    out, inp: (B, T, C). rstd: (B, T), the reciprocal of each row's root
    mean square, saved for the backward pass. weight: (C,); each channel is
    multiplied by offset + weight, offset 1 in Gemma and 0 elsewhere. eps:
    added to the mean square. All of one float dtype; out and rstd are
    overwritten.

    Derived in chapter 5.1.
    """
    rstd[...] = 1 / np.sqrt((inp**2).mean(axis=-1) + float(eps))
    out[...] = inp * rstd[..., None] * (weight + float(offset))


# rmsnorm, backward
@shapes("B T C!, C!, B T C, B T C, C, B T", offset="at least 0")
def rmsnorm_backward(
    dinp, dweight, dout, inp, weight, rstd, offset=0.0, add=True
):
    """Add RMSNorm's gradients to dinp and dweight.

    dinp, dout, inp: (B, T, C). dweight, weight: (C,). rstd: (B, T), as the
    forward pass left it. offset: as there. add: False overwrites dinp
    instead of adding to it. All of one float dtype.

    Derived in chapter 5.1.
    """
    hat = inp * rstd[..., None]
    dweight += (dout * hat).sum(axis=(0, 1))
    dhat = dout * (weight + float(offset))
    mean = (dhat * hat).mean(axis=-1, keepdims=True)
    grad = rstd[..., None] * (dhat - hat * mean)
    dinp[...] = dinp + grad if add else grad
