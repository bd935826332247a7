# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       reference.bfloat16: "Rounding to bfloat16 and back, in NumPy."
# ---

# %% [markdown]
# # bfloat16: half the bits of every factor
#
# > A float32 without its lower half.

# %% imports of the rounding tags=["export"] module="reference.bfloat16"
import numpy as np


# %% to bfloat16 and back tags=["export"] module="reference.bfloat16"
def to_bfloat16(x):
    """The 16 bits of the bfloat16 nearest to each number, equation (2.6.1).

    x: float32, of any shape. Returns uint16 of the same shape. A tie goes
    to the even neighbour, what is too large to infinity; NaN stays NaN.
    """
    bits = x.view(np.uint32)
    nearest = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    cut = bits >> 16 | 0x40
    return np.where(np.isnan(x), cut, nearest).astype(np.uint16)


def from_bfloat16(bits):
    """The float32 numbers that bfloat16 bits (uint16) stand for, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
