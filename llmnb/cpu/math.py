# Written by `make export` from notebooks/2_cpu/02_rows.py: edit that file.

"""The exponential in vector instructions."""

__all__ = [
    "fast_exp",
]


# imports of the fast exponential
import math

import numba
import numpy as np
from numba.extending import overload

from llmnb.cpu.jit import inner


# the constants
LIMIT = np.float32(88)
LOG2_E = np.float32(math.log2(math.e))
LOG_2_HIGH = np.float32(0.693359375)  # 355 / 512: nine bits
LOG_2_LOW = np.float32(math.log(2) - 0.693359375)
HALF, ONE, BIAS = np.float32(0.5), np.float32(1), np.float32(127)
SHIFT = np.float32(2**23)
E2, E3, E4, E5, E6, E7 = (
    np.float32(1 / math.factorial(n)) for n in range(2, 8)
)


# e to the x in float32
def _exp_float32(x):
    x = min(max(x, -LIMIT), LIMIT)
    n = np.floor(x * LOG2_E + HALF)
    r = (x - n * LOG_2_HIGH) - n * LOG_2_LOW
    p = E3 + r * (E4 + r * (E5 + r * (E6 + r * E7)))
    p = ONE + r * (ONE + r * (E2 + r * p))
    return p * np.int32((n + BIAS) * SHIFT).view(np.float32)


def _exp(x):
    raise NotImplementedError("for compiled code: call fast_exp")


@overload(_exp, jit_options={"fastmath": {"contract"}})
def _choose_exp(x):
    if x == numba.float32:
        return _exp_float32
    return lambda x: math.exp(x)


# the fast exponential
@inner
def fast_exp(x):
    """exp(x) for compiled kernels, in a form that LLVM vectorises.

    A float32 gives a float32 with a relative error below 1.5e-7 for x from
    -87 to 88. Below -88 it gives 0 and above 88 exp(88), so never an
    infinity. Any other number goes to math.exp in float64.

    Derived in chapter 2.2.
    """
    return _exp(x)
