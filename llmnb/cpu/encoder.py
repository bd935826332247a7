# Written by `make export` from notebooks/2_cpu/01_compile.py: edit that file.

"""The encoder, compiled for the processor's cores."""

__all__ = ["encoder_backward", "encoder_forward"]


# imports of the CPU version
from llmnb.backend import noted
from llmnb.cpu.jit import inner
from llmnb.shapes import COMPILED, shapes


# the kernels
@inner
def _encoder_forward(out, inp, wte, wpe, T):
    rows, C = out.shape
    for n in range(rows):
        y, token, position = out[n], wte[inp[n]], wpe[n % T]
        for c in range(C):
            y[c] = token[c] + position[c]


@inner
def _encoder_backward(dwte, dwpe, dout, inp, T):
    rows, C = dout.shape
    for n in range(rows):
        dtoken, dposition, dy = dwte[inp[n]], dwpe[n % T], dout[n]
        for c in range(C):
            dtoken[c] += dy[c]
            dposition[c] += dy[c]


# encoder, forward
@shapes("B T C!, B T of Vp, Vp C, T+ C", COMPILED)
def encoder_forward(out, inp, wte, wpe):
    """Sum the vector of each token and the vector of its position.

    out   (B, T, C)      float32 or float64, overwritten
    inp   (B, T)         int32, each in [0, Vp)
    wte   (Vp, C)        as out, the table of tokens
    wpe   (T_max, C)     as out, the table of positions; T <= T_max

    Raises TypeError or ValueError where an array does not fit, a token is
    out of range or T exceeds T_max.

    Derived in chapter 2.1.
    """
    rows = out.reshape(inp.size, out.shape[2])
    noted(_encoder_forward, rows, inp.reshape(-1), wte, wpe, inp.shape[1])


# encoder, backward
@shapes("Vp C!, T+ C!, B T C, B T of Vp", COMPILED)
def encoder_backward(dwte, dwpe, dout, inp):
    """Add dout's rows to the rows of the tables that they came from.

    dwte  (Vp, C)        as dout, added to; rows of absent tokens stay
    dwpe  (T_max, C)     as dout, added to; rows from T on stay
    dout  (B, T, C)      float32 or float64
    inp   (B, T)         int32, as in the forward pass

    Raises as `encoder_forward` does. One thread adds all rows in the order
    of the text.

    Derived in chapter 2.1.
    """
    rows, flat = dout.reshape(inp.size, dout.shape[2]), inp.reshape(-1)
    noted(_encoder_backward, dwte, dwpe, rows, flat, inp.shape[1])
