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
from numba import prange

from llmnb.checks import check_array, check_float, check_tokens
from llmnb.cpu.jit import kernel


# the forward kernel
@kernel
def _encoder_forward(out, inp, wte, wpe):
    B, T, C = out.shape
    for row in prange(B * T):
        b, t = row // T, row % T
        token = inp[b, t]
        for c in range(C):
            out[b, t, c] = wte[token, c] + wpe[t, c]


# the backward kernel
SLICE = 64  # channels that one thread owns at a time: 256 bytes of a row


@kernel
def _encoder_backward(dwte, dwpe, dout, inp):
    B, T, C = dout.shape
    for s in prange((C + SLICE - 1) // SLICE):
        first, last = s * SLICE, min((s + 1) * SLICE, C)
        for b in range(B):
            for t in range(T):
                token = inp[b, t]
                for c in range(first, last):
                    dwte[token, c] += dout[b, t, c]
                    dwpe[t, c] += dout[b, t, c]


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
    _encoder_forward(out, inp, wte, wpe)


# encoder, backward
def encoder_backward(dwte, dwpe, dout, inp):
    """Add dout's rows to the rows of the tables that they came from.

    dwte  (Vp, C)        as dout, added to; rows of absent tokens stay
    dwpe  (max_T, C)     as dout, added to; rows from T on stay
    dout  (B, T, C)      float32 or float64
    inp   (B, T)         int32, as in the forward pass

    Raises as `encoder_forward` does. Bit-identical for any number of
    threads: each adds its own channels, in the order of the text.

    Derived in chapter 3.
    """
    check_encoder("encoder_backward", "d", dout, inp, dwte, dwpe)
    _encoder_backward(dwte, dwpe, dout, inp)
