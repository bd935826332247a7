# Written by `make export` from notebooks/3_gpu/02_sectors.py: edit that file.

"""Sums and maxima over a warp and over a block."""

__all__ = [
    "block_max",
    "block_sum",
    "warp_max",
    "warp_sum",
]


# imports of the warp
import numpy as np

from llmnb.gpu.launch import device
from llmnb.gpu.simulator import cuda


# sums in a warp
@device
def warp_sum(value):
    """The sum of `value` over the 32 lanes of a warp, in every lane.

    Every lane of the warp must call it. The order of the additions is
    fixed.

    Derived in chapter 3.2.
    """
    for step in (16, 8, 4, 2, 1):
        value += cuda.shfl_xor_sync(0xFFFFFFFF, value, step)
    return value


@device
def warp_max(value):
    """The largest `value` of the 32 lanes of a warp, in every lane.

    Derived in chapter 3.2.
    """
    for step in (16, 8, 4, 2, 1):
        value = max(value, cuda.shfl_xor_sync(0xFFFFFFFF, value, step))
    return value


# sums in a block
@device
def _on_board(value, parts):
    """Put the value of each warp on the board; all see it on return."""
    warp, lane = cuda.threadIdx.x // 32, cuda.threadIdx.x % 32
    if lane == 0:
        parts[warp] = value
    cuda.syncthreads()


@device
def block_sum(value, parts):
    """The sum of `value` over the threads of a block, in every thread.

    Every thread must call it. parts: shared memory, one element for each
    warp of the block (at most 32); it is free again when the call returns.
    Blocks are whole warps, in one dimension.

    Derived in chapter 3.2.
    """
    _on_board(warp_sum(value), parts)
    total = np.float32(0)
    for i in range(cuda.blockDim.x // 32):
        total += parts[i]
    cuda.syncthreads()
    return total


@device
def block_max(value, parts):
    """The largest `value` of a block's threads; otherwise as `block_sum`.

    Derived in chapter 3.2.
    """
    _on_board(warp_max(value), parts)
    top = parts[0]
    for i in range(1, cuda.blockDim.x // 32):
        top = max(top, parts[i])
    cuda.syncthreads()
    return top
