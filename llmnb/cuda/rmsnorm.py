# Written by `make export` from notebooks/5_modern/01_rmsnorm.py: edit that file.

"""RMSNorm on a GPU, forward and backward."""

__all__ = ["rmsnorm_backward", "rmsnorm_forward", "rmsnorm_scratch"]


# imports of the GPU module
import math

import numpy as np

from llmnb.cuda.layernorm import _parts, add_parts, blocks
from llmnb.gpu.launch import DEVICE, given_work, kernel
from llmnb.gpu.simulator import cuda
from llmnb.gpu.warp import block_sum, warp_sum
from llmnb.shapes import shapes


# a warp a row
ZERO, ONE = np.float32(0), np.float32(1)


@kernel(launch_bounds=256)
def _forward(out, rstd, inp, weight, eps, offset):
    n, lane = cuda.grid(1) // 32, cuda.threadIdx.x % 32
    rows, C = inp.shape
    if n >= rows:  # the whole warp leaves, so exchanges stay complete
        return
    squares = ZERO
    for i in range(lane, C, 32):
        x = inp[n, i]
        squares += x * x
    r = ONE / math.sqrt(warp_sum(squares) / np.float32(C) + eps)
    for i in range(lane, C, 32):
        out[n, i] = inp[n, i] * r * (weight[i] + offset)
    if lane == 0:
        rstd[n] = r


# rmsnorm, forward, on a GPU
@shapes("B T C!, B T!, B T C, C", DEVICE, eps="above 0", offset="at least 0")
def rmsnorm_forward(out, rstd, inp, weight, eps=1e-5, offset=0.0):
    """Divide each row of inp by its root mean square, then scale.

    out, inp: (B, T, C). rstd: (B, T), the reciprocal of each row's root
    mean square, saved for the backward pass. weight: (C,); each channel is
    multiplied by offset + weight. eps: added to the mean square. All
    float32 on a device and C-contiguous; out and rstd are overwritten.
    Raises TypeError or ValueError before it launches anything.

    Derived in chapter 5.1.
    """
    rows, C = rstd.size, len(weight)
    arrays = out.reshape(rows, C), rstd.reshape(rows), inp.reshape(rows, C)
    numbers = np.float32(eps), np.float32(offset)
    _forward[blocks(rows, 8), 256](*arrays, weight, *numbers)


# a block a row
@kernel(launch_bounds=256)
def _backward(dinp, table, dout, inp, weight, rstd, offset, add):
    parts = cuda.shared.array(32, np.float32)
    (rows, C), first = inp.shape, cuda.threadIdx.x
    mine, step = cuda.blockIdx.x, cuda.blockDim.x  # this block's sums
    for i in range(first, C, step):
        table[mine, i] = ZERO
    for n in range(mine, rows, cuda.gridDim.x):
        r, mean = rstd[n], ZERO
        for i in range(first, C, step):
            mean += dout[n, i] * (weight[i] + offset) * (inp[n, i] * r)
        mean = block_sum(mean, parts) / np.float32(C)
        for i in range(first, C, step):
            dy, hat = dout[n, i], inp[n, i] * r
            grad = r * (dy * (weight[i] + offset) - hat * mean)
            dinp[n, i] = grad + (dinp[n, i] if add else ZERO)
            table[mine, i] += dy * hat


# rmsnorm, backward, on a GPU
def rmsnorm_scratch(rows, C):
    """How many floats rmsnorm_backward wants to work in; rows: B * T.

    Derived in chapter 5.1.
    """
    return _parts(rows) * C


@shapes(
    "B T C!, C!, B T C, B T C, C, B T", DEVICE, offset="at least 0", work="W!?"
)
def rmsnorm_backward(
    dinp, dweight, dout, inp, weight, rstd, offset=0.0, add=True, work=None
):
    """Add RMSNorm's gradients to dinp and dweight.

    dinp, dout, inp: (B, T, C). dweight, weight: (C,). rstd: (B, T), as the
    forward pass left it. offset: as there. add: False overwrites dinp
    instead of adding to it. work: at least rmsnorm_scratch(B * T, C) floats
    in one dimension, whose contents are lost; allocated if None. All
    float32 on a device and C-contiguous. Raises TypeError or ValueError
    before it launches anything.

    Derived in chapter 5.1.
    """
    rows, C = rstd.size, len(weight)
    floats, parts = rmsnorm_scratch(rows, C), _parts(rows)
    work = given_work("rmsnorm_backward", work, floats, inp)
    dx, dy, x = (a.reshape(rows, C) for a in (dinp, dout, inp))
    table = work[:floats].reshape(parts, C)
    arrays = dx, table, dy, x, weight, rstd.reshape(rows)
    _backward[parts, 256](*arrays, np.float32(offset), int(add))
    add_parts(dweight, dweight, work, parts, C)  # there is no dbias
