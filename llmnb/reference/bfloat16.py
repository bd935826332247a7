# Written by `make export` from notebooks/2_cpu/06_bfloat16.py: edit that file.

"""Rounding to bfloat16 and back, in NumPy."""

__all__ = ["from_bfloat16", "to_bfloat16"]


# imports of the rounding
import numpy as np

from llmnb.checks import check_fit


# to bfloat16 and back
def to_bfloat16(x):
    """The 16 bits of the bfloat16 nearest to each number, equation (2.6.1).

    x: float32, of any shape; TypeError for another dtype. Returns uint16 of
    the same shape. A tie goes to the even neighbour, what is too large to
    infinity; NaN stays NaN.

    Derived in chapter 2.6.
    """
    check_fit("to_bfloat16: x", x, None, np.float32)
    bits = x.view(np.uint32)
    nearest = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    cut = bits >> 16 | 0x40
    return np.where(np.isnan(x), cut, nearest).astype(np.uint16)


def from_bfloat16(bits):
    """The float32 numbers that bfloat16 bits (uint16) stand for, exactly.

    Derived in chapter 2.6.
    """
    return (bits.astype(np.uint32) << 16).view(np.float32)
