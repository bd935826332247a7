# Written by `make export` from notebooks/3_gpu/02_sectors.py: edit that file.

"""Sums over a warp and over a block."""

__all__ = ["block_sum", "warp_sum"]


# imports of the warp
import numpy as np

from llmnb.gpu.launch import device
from llmnb.gpu.simulator import cuda


# sums in a warp
@device
def warp_sum(value, lanes=32):
    """The sum of `value` over the 32 lanes of a warp, in every lane.

    lanes: 16, 8, 4 or 2 for a sum over as many neighbours instead.
    Every lane of the warp must call it. The order of the additions is
    fixed.

    Derived in chapter 3.2.
    """
    for step in (16, 8, 4, 2, 1):
        if step < lanes:
            value += cuda.shfl_xor_sync(0xFFFFFFFF, value, step)
    return value


# sums in a block
@device
def block_sum(value, parts):
    """The sum of `value` over the threads of a block, in every thread.

    Every thread must call it. parts: shared memory, one element for each
    warp of the block (at most 32); it is free again when the call returns.
    Blocks are whole warps, in one dimension.

    Derived in chapter 3.2.
    """
    value = warp_sum(value)
    if cuda.threadIdx.x % 32 == 0:
        parts[cuda.threadIdx.x // 32] = value
    cuda.syncthreads()
    total = np.float32(0)
    for i in range(cuda.blockDim.x // 32):
        total += parts[i]
    cuda.syncthreads()
    return total
