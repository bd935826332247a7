# Written by `make export` from notebooks/1_by_hand/07_matmul.py: edit that file.

"""The multiply-add rate that this processor can reach."""

__all__ = [
    "fma_peak",
]


# imports of the peak
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from llmnb.cpu.jit import arguments, team
from llmnb.cpu.tile import LANES
from llmnb.timing import fastest


# chains of FMAs
CHAINS, TURNS = 12, 200_000


@intrinsic
def _run_chains(typing, x):
    """Replace x by the end of CHAINS chains of TURNS vectors of FMAs."""

    def codegen(context, builder, signature, args):
        number = args[0].type
        vector = ir.VectorType(number, LANES)
        name = f"llvm.fmuladd.v{LANES}f32"
        kind = ir.FunctionType(vector, [vector] * 3)
        fma = cgutils.get_or_insert_function(builder.module, kind, name)
        empty = ir.Constant(vector, ir.Undefined)
        x = builder.insert_element(empty, args[0], ir.IntType(32)(0))
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), LANES), None)
        x = builder.shuffle_vector(x, x, lanes)
        places = [cgutils.alloca_once_value(builder, x) for _ in range(CHAINS)]
        with cgutils.for_range(builder, ir.IntType(64)(TURNS)):
            for place in places:
                y = builder.load(place)
                builder.store(builder.call(fma, [y, x, x]), place)
        total = builder.load(places[0])
        for place in places[1:]:
            total = builder.fadd(total, builder.load(place))
        return builder.extract_element(total, ir.IntType(32)(0))

    return x(x), codegen


# the peak of this machine
@team
def _all_threads(part, parts, address):
    (x,) = arguments(address)
    x[part] = _run_chains(x[part])


def fma_peak():
    """FLOP/s of float32 that numba's threads reach on registers alone.

    A measurement of about a tenth of a second, after compiling.

    Derived in chapter 1.7.
    """
    x = np.full(numba.get_num_threads(), 0.5, np.float32)
    seconds = fastest(_all_threads, x, runs=200)
    return 2 * LANES * CHAINS * TURNS * x.size / seconds
