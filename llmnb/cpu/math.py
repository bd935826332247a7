# Written by `make export` from notebooks/2_cpu/02_rows.py: edit that file.

"""The exponential in vector instructions."""

__all__ = ["T3", "T5", "T7", "T9", "T_NEAR", "fast_exp", "fast_tanh"]


# imports of the fast exponential
import math

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic, overload

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


def _by_type(float32, other):
    """For compiled code: one function for float32, another for the rest."""

    def stub(x):
        raise NotImplementedError("for compiled code")

    @overload(stub, jit_options={"fastmath": {"contract"}})
    def choose(x):
        return float32 if x == numba.float32 else other

    return stub


_exp = _by_type(_exp_float32, lambda x: math.exp(x))


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


# tanh from it
T_NEAR = np.float32(0.3)
T3, T5, T7, T9 = map(np.float32, (-1 / 3, 2 / 15, -17 / 315, 62 / 2835))


def _tanh_float32(x):
    # near 0, where 1 - q would lose digits, the first terms of the series
    q, y = fast_exp(-abs(x + x)), x * x
    far = (ONE - q) / (ONE + q)
    near = x + x * y * (T3 + y * (T5 + y * (T7 + y * T9)))
    return near if abs(x) < T_NEAR else (far if x > 0 else -far)


_tanh = _by_type(_tanh_float32, lambda x: math.tanh(x))


@inner
def fast_tanh(x):
    """tanh(x) for compiled kernels, as fast_exp is exp(x).

    A float32 gives a float32 with a relative error below 3e-7; any other
    number goes to math.tanh.

    Derived in chapter 2.2.
    """
    return _tanh(x)


# the larger of two
@intrinsic
def larger(typing, x, y):
    """max(x, y) for compiled kernels, in a form that LLVM vectorises."""

    def codegen(context, builder, signature, args):
        number = args[0].type
        kind = ir.FunctionType(number, [number] * 2)
        names = "llvm.maxnum", [number], kind
        return builder.call(builder.module.declare_intrinsic(*names), args)

    return x(x, x), codegen
