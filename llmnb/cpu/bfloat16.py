# Written by `make export` from notebooks/2_cpu/06_bfloat16.py: edit that file.

"""Products of factors rounded to bfloat16."""

__all__ = ["has_bf16"]


# imports of the pairs
import os

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types

from llmnb.cpu.tile import I32, LANES, constant, cpu_features, multiply_add


# pairs of bfloat16
HALVES = "avx512bf16" in cpu_features() and LANES == 16  # has vdpbf16ps


def steps_in(kind):
    """Steps of the sum in one line of a panel, an array of this type."""
    return 2 if kind.dtype == types.uint32 else 1


def pair(builder, low, high):
    """Round two vectors to bfloat16, side by side in uint32."""
    count = low.type.count

    def every(bits):
        return constant(I32, [bits] * count)

    def rounded(x):
        bits = builder.bitcast(x, ir.VectorType(I32, count))
        odd = builder.and_(builder.lshr(bits, every(16)), every(1))
        return builder.add(bits, builder.add(odd, every(0x7FFF)))

    low = builder.lshr(rounded(low), every(16))
    return builder.or_(low, builder.and_(rounded(high), every(0xFFFF0000)))


# multiply and add pairs
def multiply_add_pairs(builder, a, b, c):
    """c plus the products of both halves of two vectors of pairs."""
    if HALVES:
        llvm.initialize_native_asmparser()  # reads the instruction's name
        kind = ir.FunctionType(c.type, [a.type, b.type, c.type])
        text, where = "vdpbf16ps $2, $1, $0", "=v,v,v,0"
        return builder.call(ir.InlineAsm(kind, text, where), [b, a, c])
    a, b = (_split(builder, x, c.type) for x in (a, b))
    for x, y in zip(a, b, strict=True):
        c = multiply_add(builder, x, y, c)
    return c


def _split(builder, pairs, kind):
    """The two halves of a vector of pairs, as float32."""
    shift = ir.Constant(pairs.type, [16] * LANES)
    mask = ir.Constant(pairs.type, [0xFFFF0000] * LANES)
    halves = builder.shl(pairs, shift), builder.and_(pairs, mask)
    return [builder.bitcast(x, kind) for x in halves]


# is it worth it here
def has_bf16():
    """Whether this processor has an instruction for products of bfloat16.

    LLMNB_BF16=emulate says yes anyway, for tests on other processors.

    Derived in chapter 2.6.
    """
    return HALVES or os.environ.get("LLMNB_BF16") == "emulate"
