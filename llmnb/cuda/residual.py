# Written by `make export` from notebooks/3_gpu/05_elementwise.py: edit that file.

"""The residual sum on a GPU, forward and backward."""

__all__ = ["residual_backward", "residual_forward"]


# the sum
from llmnb.cuda.elementwise import elementwise
from llmnb.gpu.launch import DEVICE, device
from llmnb.shapes import shapes


@device
def _sum(a, b):
    return a + b


_add = elementwise(_sum, reads=2)


@shapes("...!, ...~, ...~", DEVICE)
def residual_forward(out, inp1, inp2):
    """Add two arrays.

    out, inp1, inp2: a device's arrays, float32, all of one shape; out is
    overwritten, and may be inp1 or inp2. Raises TypeError or ValueError
    before it launches anything.

    Derived in chapter 3.5.
    """
    _add(out.reshape(-1), inp1.reshape(-1), inp2.reshape(-1))


@shapes("...!, ...!, ...", DEVICE)
def residual_backward(dinp1, dinp2, dout):
    """Add the gradient of the sum to the gradients of both its terms.

    dinp1, dinp2, dout: a device's arrays, float32, all of one shape, three
    distinct ones; dinp1 and dinp2 are added to. Raises TypeError or
    ValueError before it launches anything.

    Derived in chapter 3.5.
    """
    for dinp in (dinp1.reshape(-1), dinp2.reshape(-1)):
        _add(dinp, dinp, dout.reshape(-1))
