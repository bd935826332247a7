# Written by `make export` from notebooks/03_encoder.py: edit that file.

"""Turn tokens into vectors and send gradients back.

A token's vector is a row of one table plus a row of another; the backward pass
adds into the rows that were read.
"""

__all__ = [
    "encoder_backward",
    "encoder_forward",
]


# imports of the CPU version
import numpy as np

from llmnb.checks import check_array, check_float, check_tokens
from llmnb.cpu.jit import inner


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


# the checks
def check_encoder(name, d, out, inp, wte, wpe):
    """Raise unless these fit together; `d` is "d" before gradients' names.

    Derived in chapter 3.
    """
    check_float(f"{name}: {d}out", out)
    if out.ndim != 3:
        raise ValueError(
            f"{name}: {d}out must have shape (B, T, C), got {out.shape}"
        )
    B, T, C = out.shape
    check_array(f"{name}: {d}out", out, out.shape, out.dtype)
    check_array(f"{name}: inp", inp, (B, T), np.int32)
    for table, array in (("wte", wte), ("wpe", wpe)):
        rows = len(array) if getattr(array, "ndim", 0) else 0
        check_array(f"{name}: {d}{table}", array, (rows, C), out.dtype)
    if len(wpe) < T:
        raise ValueError(
            f"{name}: T must be at most {len(wpe)}, the number of rows "
            f"of {d}wpe, got {T}"
        )
    check_tokens(f"{name}: inp", inp, len(wte))


# encoder, forward
def encoder_forward(out, inp, wte, wpe):
    """Sum the vector of each token and the vector of its position.

    out   (B, T, C)      float32 or float64, overwritten
    inp   (B, T)         int32, each in [0, Vp)
    wte   (Vp, C)        as out, the table of tokens
    wpe   (max_T, C)     as out, the table of positions; T <= max_T

    Raises TypeError or ValueError where an array does not fit, a token is
    out of range or T exceeds max_T.

    Derived in chapter 3.
    """
    check_encoder("encoder_forward", "", out, inp, wte, wpe)
    rows = out.reshape(inp.size, out.shape[2])
    _encoder_forward(rows, inp.reshape(-1), wte, wpe, inp.shape[1])


# encoder, backward
def encoder_backward(dwte, dwpe, dout, inp):
    """Add dout's rows to the rows of the tables that they came from.

    dwte  (Vp, C)        as dout, added to; rows of absent tokens stay
    dwpe  (max_T, C)     as dout, added to; rows from T on stay
    dout  (B, T, C)      float32 or float64
    inp   (B, T)         int32, as in the forward pass

    Raises as `encoder_forward` does. One thread adds all rows in the order
    of the text.

    Derived in chapter 3.
    """
    check_encoder("encoder_backward", "d", dout, inp, dwte, dwpe)
    rows = dout.reshape(inp.size, dout.shape[2])
    _encoder_backward(dwte, dwpe, rows, inp.reshape(-1), inp.shape[1])
