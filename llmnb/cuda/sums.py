# Written by `make export` from notebooks/6_machines/05_gpus.py: edit that file.

"""What a group of GPUs adds up: blocks by a tree, squares by pieces."""

__all__ = ["DEPTH", "clip_by_pieces", "square_pieces", "tree_sum"]


# imports of the sums
import numpy as np

from llmnb.cuda.adamw import WARPS, ZERO, _root_of_sum, clip_scratch, shrink
from llmnb.cuda.elementwise import BLOCK
from llmnb.gpu.launch import DEVICE, device, given_work, kernel
from llmnb.gpu.simulator import cuda
from llmnb.gpu.warp import block_sum
from llmnb.shapes import shapes


# add rows by a list
DEPTH = 32  # blocks that wait at most, of fewer than 2^31 micro-batches


@kernel(fastmath=False)
def _tree_sum(out, came, order, width):
    i = cuda.grid(1)
    if i >= out.size:
        return
    waiting, top = cuda.local.array(DEPTH, np.float32), 0
    for k in range(0, order.size, 2):
        total = came[order[k] * width + i]
        for _ in range(order[k + 1]):
            top -= 1
            total = waiting[top] + total
        waiting[top] = total
        top += 1
    out[i] = waiting[0]


@shapes("N!, M, K of 2147483647, at least 1", DEVICE)
def tree_sum(out, came, order, width):
    """Add the rows of what came, in the order of a list.

    out: a device's float32 array, overwritten. came: flat, rows of `width`
    floats, of which the first out.size are added. order: int32, pairs of a
    row and of how many that wait it joins, as `llmnb.train.gpus.tree_order`
    makes them; not checked, for it lies on the device. Allocates nothing and
    does not wait.

    Derived in chapter 6.5.
    """
    _tree_sum[-(-out.size // BLOCK), BLOCK](out, came, order, width)


# the squares of a piece
@device
def _at(grads, k, stop):
    return grads[k] if k < stop else ZERO


@kernel(fastmath=False)
def _square_pieces(sums, grads, length):
    parts = cuda.shared.array(WARPS, np.float32)
    start = cuda.blockIdx.x * length
    stop = min(start + length, grads.size)
    s0 = s1 = s2 = s3 = ZERO
    threads = cuda.blockDim.x
    for k in range(start + cuda.threadIdx.x, stop, 4 * threads):
        a, b = _at(grads, k, stop), _at(grads, k + threads, stop)
        c = _at(grads, k + 2 * threads, stop)
        d = _at(grads, k + 3 * threads, stop)
        s0, s1, s2, s3 = s0 + a * a, s1 + b * b, s2 + c * c, s3 + d * d
    total = block_sum((s0 + s1) + (s2 + s3), parts)
    if cuda.threadIdx.x == 0:
        sums[cuda.blockIdx.x] = total


@shapes("N!, M, at least 1", DEVICE)
def square_pieces(sums, grads, length):
    """Leave in sums the sum of squares of each piece of `length` elements.

    sums, grads: a device's float32 arrays, flat. Of a piece beyond the end
    it is 0. The length decides the order. Allocates nothing and does not wait.

    Derived in chapter 6.5.
    """
    warps = min(WARPS, -(-length // 128))  # four elements or more a thread
    _square_pieces[sums.size, 32 * warps](sums, grads, length)


@shapes("N!, above 0, W!", DEVICE)
def clip_by_pieces(grads, max_norm, work, pieces):
    """Clip to `max_norm` by the pieces' sums; leave the norm in work[0].

    grads: a part of a longer array, or all of it. work: as `clip_apply`
    wants it, with the sums of all pieces from work[1] on, so many.

    Derived in chapter 6.5.
    """
    given_work("clip_by_pieces", work, clip_scratch(), grads)
    _root_of_sum[1, BLOCK](work, pieces)
    shrink(grads, max_norm, work)
