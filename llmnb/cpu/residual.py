# Written by `make export` from notebooks/2_cpu/02_rows.py: edit that file.

"""The residual sum, compiled for the processor's cores."""

__all__ = ["residual_backward", "residual_forward"]


# imports of the CPU version
from llmnb.cpu.jit import arguments, share, team
from llmnb.shapes import shapes


# the kernels
@team
def _residual_forward(part, parts, address):
    out, inp1, inp2 = arguments(address)
    mine = share(out.size, part, parts)
    out, inp1, inp2 = out[mine], inp1[mine], inp2[mine]
    for i in range(out.size):
        out[i] = inp1[i] + inp2[i]


@team
def _residual_backward(part, parts, address):
    dinp1, dinp2, dout = arguments(address)
    mine = share(dout.size, part, parts)
    dinp1, dinp2, dout = dinp1[mine], dinp2[mine], dout[mine]
    for i in range(dout.size):
        dinp1[i] += dout[i]
        dinp2[i] += dout[i]


# residual, forward
@shapes("...!, ...~, ...~")
def residual_forward(out, inp1, inp2):
    """Add two arrays.

    out, inp1, inp2: float32 or float64, all of one shape; out is
    overwritten, and may be inp1 or inp2.

    Raises TypeError or ValueError where shapes or dtypes differ.

    Derived in chapter 2.2.
    """
    _residual_forward(out.reshape(-1), inp1.reshape(-1), inp2.reshape(-1))


# residual, backward
@shapes("...!, ...!, ...")
def residual_backward(dinp1, dinp2, dout):
    """Add the gradient of the sum to the gradients of both its terms.

    dinp1, dinp2, dout: float32 or float64, all of one shape, three distinct
    arrays; dinp1 and dinp2 are added to.

    Raises TypeError or ValueError where shapes or dtypes differ, ValueError
    where two of the arrays share memory.

    Derived in chapter 2.2.
    """
    _residual_backward(dinp1.reshape(-1), dinp2.reshape(-1), dout.reshape(-1))
