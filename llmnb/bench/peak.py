# Written by `make export` from notebooks/appendix/02_tile.py: edit that file.

"""The multiply-add rate that this processor can reach."""

__all__ = ["fma_peak"]


# imports of the peak
import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from llmnb.cpu.jit import arguments, team
from llmnb.cpu.tile import I32, LANES, multiply_add, spread, sum_loop
from llmnb.timing import fastest


# chains of FMAs
CHAINS, TURNS = 12, 200_000


@intrinsic
def _run_chains(typing, x):
    """The end of CHAINS chains of TURNS vectors of FMAs, from x on."""

    def codegen(context, builder, signature, args):
        x, turns = spread(builder, args[0]), ir.IntType(64)(TURNS)

        def turn(_, chains):
            return [multiply_add(builder, y, x, x) for y in chains]

        ends = sum_loop(builder, turns, [], [], [x] * CHAINS, turn)
        total = ends[0]
        for end in ends[1:]:
            total = builder.fadd(total, end)
        return builder.extract_element(total, I32(0))

    return x(x), codegen


# the peak of this machine
@team
def _all_threads(part, parts, address):
    (x,) = arguments(address)
    x[part] = _run_chains(x[part])


def fma_peak():
    """FLOP/s of float32 that numba's threads reach on registers alone.

    A measurement of about a tenth of a second, after compiling.

    Derived in chapter A.2.
    """
    x = np.full(numba.get_num_threads(), 0.5, np.float32)
    seconds = fastest(_all_threads, x, runs=200)
    return 2 * LANES * CHAINS * TURNS * x.size / seconds
