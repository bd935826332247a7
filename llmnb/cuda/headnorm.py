# Written by `make export` from notebooks/appendix/14_heads.py: edit that file.

"""Norms of heads on a GPU, forward and backward."""

__all__ = [
    "ONE", "ZERO", "headnorm_backward", "headnorm_forward", "headnorm_scratch",
]


# imports of the GPU's norms
import functools
import math

import numpy as np

from llmnb.gpu.launch import DEVICE, given_work, kernel
from llmnb.gpu.simulator import cuda
from llmnb.gpu.warp import warp_sum
from llmnb.reference.local import key_heads
from llmnb.shapes import shapes

ZERO, ONE = np.float32(0), np.float32(1)


# norms of heads, a warp a head
@kernel(launch_bounds=256)
def _headnorm_forward(out, rstd, inp, qweight, kweight, NKV, eps, offset):
    item, lane = cuda.grid(1) // 32, cuda.threadIdx.x % 32
    (rows, heads, hs), normed = inp.shape, rstd.shape[1]
    n, h = item // heads, item % heads
    if n >= rows:  # the whole warp leaves, so exchanges stay complete
        return
    r, squares = ONE, ZERO
    if h < normed:
        for i in range(lane, hs, 32):
            squares += inp[n, h, i] * inp[n, h, i]
        r = ONE / math.sqrt(warp_sum(squares) / np.float32(hs) + eps)
        if lane == 0:
            rstd[n, h] = r
    for i in range(lane, hs, 32):
        x = inp[n, h, i] * r
        if h < normed - NKV:
            x *= qweight[i] + offset
        elif h < normed:
            x *= kweight[i] + offset
        out[n, h, i] = x


# norms of heads, backward
PARTS, WARPS = 64, 8  # blocks for each kind of head; warps of a block


@functools.cache
def _headnorm_backward(slots):
    """The kernel in which a lane has at most `slots` channels of a head."""

    @kernel(launch_bounds=256)
    def headnorm_backward(dinp, table, inp, qweight, kweight, rstd, offset):
        hat = cuda.local.array(slots, np.float32)
        dhat = cuda.local.array(slots, np.float32)
        dw = cuda.local.array(slots, np.float32)
        (rows, heads, hs), normed = inp.shape, rstd.shape[1]
        NKV, kind = heads - normed, cuda.blockIdx.y
        first, mine = 0, normed - NKV  # kind 0: queries
        if kind == 1:
            first, mine = normed - NKV, NKV
        warp, lane = cuda.grid(1) // 32, cuda.threadIdx.x % 32
        for k in range(slots):
            dw[k] = ZERO
        for item in range(warp, rows * mine, cuda.gridDim.x * WARPS):
            n, h, mean = item // mine, first + item % mine, ZERO
            for k in range(slots):
                i = lane + 32 * k
                if i < hs:
                    weight = kweight[i] if kind == 1 else qweight[i]
                    hat[k] = inp[n, h, i] * rstd[n, h]
                    dhat[k] = dinp[n, h, i] * (weight + offset)
                    dw[k] += dinp[n, h, i] * hat[k]
                    mean += dhat[k] * hat[k]
            mean = warp_sum(mean) / np.float32(hs)
            for k in range(slots):
                i = lane + 32 * k
                if i < hs:
                    dinp[n, h, i] = rstd[n, h] * (dhat[k] - hat[k] * mean)
        for k in range(slots):
            if lane + 32 * k < hs:
                table[kind, warp, lane + 32 * k] = dw[k]

    return headnorm_backward


@kernel(launch_bounds=256)
def _add_table(dqweight, dkweight, table):
    """A warp a channel of one kind of head."""
    column, lane = cuda.grid(1) // 32, cuda.threadIdx.x % 32
    _, count, hs = table.shape
    kind, i, total = column // hs, column % hs, ZERO
    if kind < 2:
        for k in range(lane, count, 32):
            total += table[kind, k, i]
        total = warp_sum(total)
        if lane == 0 and kind == 0:
            dqweight[i] += total
        elif lane == 0:
            dkweight[i] += total


# norms of heads on a GPU
@shapes(
    "B T QKV!, B T N!, B T QKV, hs, hs", DEVICE, eps="above 0",
    offset="at least 0",
)  # fmt: skip
def headnorm_forward(out, rstd, inp, qweight, kweight, eps=1e-6, offset=0.0):
    """RMSNorm over the channels of each head of queries and of keys.

    out, inp: (B, T, (NH + 2 NKV) * hs); values are copied. rstd: (B, T,
    NH + NKV), saved for the backward pass. qweight, kweight: (hs,), used
    for all heads. eps, offset: as for rmsnorm_forward. All float32 on a
    device and C-contiguous; out and rstd are overwritten. Raises TypeError
    or ValueError before it launches anything.

    Derived in chapter A.14.
    """
    hs = qweight.size
    NKV = key_heads("headnorm_forward", inp, rstd, hs)
    rows, normed = inp.shape[0] * inp.shape[1], rstd.shape[2]
    y, x = (a.reshape(rows, normed + NKV, hs) for a in (out, inp))
    arrays = y, rstd.reshape(rows, normed), x, qweight, kweight
    grid = -(-rows * (normed + NKV) // WARPS)
    numbers = np.float32(eps), np.float32(offset)
    _headnorm_forward[grid, 32 * WARPS](*arrays, NKV, *numbers)


def _parts(rows):
    """How many blocks share the heads of a kind."""
    return min(PARTS, -(-rows // WARPS))


def headnorm_scratch(rows, hs):
    """How many floats headnorm_backward wants to work in; rows: B * T.

    Derived in chapter A.14.
    """
    return 2 * _parts(rows) * WARPS * hs


@shapes(
    "B T QKV!, hs!, hs!, B T QKV, hs, hs, B T N", DEVICE,
    offset="at least 0", work="W!?",
)  # fmt: skip
def headnorm_backward(
    dinp, dqweight, dkweight, inp, qweight, kweight, rstd, offset=0.0,
    work=None,
):  # fmt: skip
    """Take the gradient of headnorm_forward's output to its input, in place.

    dinp: (B, T, (NH + 2 NKV) * hs) holds the gradient of the output and
    receives that of the input. dqweight, dkweight: (hs,), added to. inp,
    qweight, kweight, rstd, offset: as in the forward pass. work: scratch of
    headnorm_scratch(B * T, hs) floats, or None to allocate it. All float32
    on a device and C-contiguous. Every sum has one order. Raises TypeError
    or ValueError before it launches anything.

    Derived in chapter A.14.
    """
    layer, hs = "headnorm_backward", qweight.size
    NKV = key_heads(layer, inp, rstd, hs)
    rows, normed = inp.shape[0] * inp.shape[1], rstd.shape[2]
    floats = headnorm_scratch(rows, hs)
    work = given_work(layer, work, floats, inp)
    if rows:
        dx, x = (a.reshape(rows, normed + NKV, hs) for a in (dinp, inp))
        parts = _parts(rows)
        table = work[:floats].reshape(2, parts * WARPS, hs)
        arrays = dx, table, x, qweight, kweight, rstd.reshape(rows, normed)
        back = _headnorm_backward(-(-hs // 32))
        back[(parts, 2), 32 * WARPS](*arrays, np.float32(offset))
        grid = -(-2 * hs // WARPS)
        _add_table[grid, 32 * WARPS](dqweight, dkweight, table)
