# Written by `make export` from notebooks/1_by_hand/10_residual.py: edit that file.

"""The residual sum on a GPU, alone and with LayerNorm."""

__all__ = [
    "FUSED_RESIDUAL_FORWARD",
    "RESIDUAL_BACKWARD",
    "RESIDUAL_FORWARD",
    "fused_residual_forward",
    "residual_backward",
    "residual_forward",
]


# imports of the GPU's kernels
import math
from functools import cache, partial

import numpy as np

from llmnb.cuda.elementwise import by_element, by_four
from llmnb.gpu.launch import DEVICE, aligned, device, kernel, numbered
from llmnb.cuda.layernorm import layernorm_forward as normalise
from llmnb.gpu.simulator import cuda, load4, store4
from llmnb.gpu.warp import warp_sum
from llmnb.shapes import shapes


# sizes
ROWS = 4  # a block's, one for each warp, where a warp owns a row
WIDEST = 2048  # channels that a warp can keep in registers
EPS = np.float32(1e-5)
ZERO, ONE = np.float32(0), np.float32(1)


# version 1
@kernel
def _add_elements(out, inp1, inp2):
    i = cuda.grid(1)
    if i < out.size:
        out[i] = inp1[i] + inp2[i]


@kernel
def _add_back_elements(dinp1, dinp2, dout):
    i = cuda.grid(1)
    if i < dout.size:
        d = dout[i]
        dinp1[i] += d
        dinp2[i] += d


# version 2
@kernel
def _add_fours(out, inp1, inp2):
    i, fours = cuda.grid(1), out.size // 4
    if i < fours:
        a, b, c, d = load4(inp1, 4 * i)
        e, f, g, h = load4(inp2, 4 * i)
        store4(out, 4 * i, a + e, b + f, c + g, d + h)
    elif 3 * fours + i < out.size:
        i += 3 * fours
        out[i] = inp1[i] + inp2[i]


@kernel
def _add_back_fours(dinp1, dinp2, dout):
    i, fours = cuda.grid(1), dout.size // 4
    if i < fours:
        a, b, c, d = load4(dout, 4 * i)
        e, f, g, h = load4(dinp1, 4 * i)
        store4(dinp1, 4 * i, a + e, b + f, c + g, d + h)
        e, f, g, h = load4(dinp2, 4 * i)
        store4(dinp2, 4 * i, a + e, b + f, c + g, d + h)
    elif 3 * fours + i < dout.size:
        i += 3 * fours
        d = dout[i]
        dinp1[i] += d
        dinp2[i] += d


# residual, forward
# one element a thread; four neighbours a thread
RESIDUAL_FORWARD = (
    partial(by_element, _add_elements),
    partial(by_four, _add_fours, _add_elements),
)


@shapes("...!, ...~, ...~", DEVICE)
def residual_forward(out, inp1, inp2, version=2):
    """Add two arrays.

    out, inp1, inp2: a device's arrays, float32, all of one shape; out is
    overwritten, and may be inp1 or inp2. version: which kernel, from 1 on.
    Raises TypeError or ValueError before it launches anything.

    Derived in chapter 1.10.
    """
    run = numbered(RESIDUAL_FORWARD, version, "residual_forward")
    run([x.reshape(-1) for x in (out, inp1, inp2)])


# residual, backward
# one element a thread; four neighbours a thread
RESIDUAL_BACKWARD = (
    partial(by_element, _add_back_elements),
    partial(by_four, _add_back_fours, _add_back_elements),
)


@shapes("...!, ...!, ...", DEVICE)
def residual_backward(dinp1, dinp2, dout, version=2):
    """Add the gradient of the sum to the gradients of both its terms.

    dinp1, dinp2, dout: a device's arrays, float32, all of one shape, three
    distinct ones; dinp1 and dinp2 are added to. version: which kernel, from
    1 on. Raises TypeError or ValueError before it launches anything.

    Derived in chapter 1.10.
    """
    run = numbered(RESIDUAL_BACKWARD, version, "residual_backward")
    run([x.reshape(-1) for x in (dinp1, dinp2, dout)])


# fused, version 1
def _unfused(residual, out, mean, rstd, inp1, inp2, weight, bias):
    residual_forward(residual, inp1, inp2)
    version = 4 if aligned(residual, out, weight, bias) else 2
    rows = [x.reshape(1, *x.shape) for x in (out, mean, rstd, residual)]
    normalise(*rows, weight, bias, version=version)


# fused, version 2
@cache
def _fused_elements(turns):
    @kernel
    def fused_elements(residual, out, mean, rstd, inp1, inp2, weight, bias):
        row, lane = cuda.grid(1) // 32, cuda.threadIdx.x % 32
        rows, C = out.shape
        if row >= rows:
            return
        mine, size = cuda.local.array(turns, np.float32), np.float32(C)
        total = ZERO
        for k in range(turns):
            c = lane + 32 * k
            if c < C:
                x = inp1[row, c] + inp2[row, c]
                residual[row, c] = mine[k] = x
                total += x
        mu = warp_sum(total) / size
        total = ZERO
        for k in range(turns):
            if lane + 32 * k < C:
                x = mine[k] - mu
                total += x * x
        r = ONE / math.sqrt(warp_sum(total) / size + EPS)
        if lane == 0:
            mean[row], rstd[row] = mu, r
        for k in range(turns):
            c = lane + 32 * k
            if c < C:
                out[row, c] = (mine[k] - mu) * r * weight[c] + bias[c]

    return fused_elements


# four channels of a row
@device
def _add_four(mine, k, residual, inp1, inp2, i):
    """Add, store and keep four channels from i on; return their sum."""
    a, b, c, d = load4(inp1, i)
    e, f, g, h = load4(inp2, i)
    a, b, c, d = a + e, b + f, c + g, d + h
    store4(residual, i, a, b, c, d)
    mine[k], mine[k + 1], mine[k + 2], mine[k + 3] = a, b, c, d
    return (a + b) + (c + d)


@device
def _normalise_four(mine, k, mu, r, out, i, weight, bias, channel):
    """Normalise the four channels that were kept, and store them."""
    a, b = (mine[k] - mu) * r, (mine[k + 1] - mu) * r
    c, d = (mine[k + 2] - mu) * r, (mine[k + 3] - mu) * r
    e, f, g, h = load4(weight, channel)
    a, b, c, d = a * e, b * f, c * g, d * h
    e, f, g, h = load4(bias, channel)
    store4(out, i, a + e, b + f, c + g, d + h)


# fused, version 3
@cache
def _fused_fours(turns):
    width = 4 * turns

    @kernel
    def fused_fours(residual, out, mean, rstd, inp1, inp2, weight, bias):
        row, lane = cuda.grid(1) // 32, cuda.threadIdx.x % 32
        rows, C = out.shape
        if row >= rows:
            return
        mine, size = cuda.local.array(width, np.float32), np.float32(C)
        total, i = ZERO, row * C
        for k in range(turns):
            c = 4 * (lane + 32 * k)
            if c < C:
                total += _add_four(mine, 4 * k, residual, inp1, inp2, i + c)
        mu = warp_sum(total) / size
        total = ZERO
        for k in range(width):
            if 4 * (lane + 32 * (k // 4)) < C:
                x = mine[k] - mu
                total += x * x
        r = ONE / math.sqrt(warp_sum(total) / size + EPS)
        if lane == 0:
            mean[row], rstd[row] = mu, r
        for k in range(turns):
            c, at = 4 * (lane + 32 * k), 4 * k
            if c < C:
                _normalise_four(mine, at, mu, r, out, i + c, weight, bias, c)

    return fused_fours


# launches of the fused kernels
def _by_rows(make, per_turn, *arrays):
    rows, C = arrays[1].shape
    turns, blocks = (C + per_turn - 1) // per_turn, (rows + ROWS - 1) // ROWS
    make(turns)[blocks, 32 * ROWS](*arrays)


def _fused_by_element(*arrays):
    if arrays[1].shape[1] > WIDEST:
        return _unfused(*arrays)
    return _by_rows(_fused_elements, 32, *arrays)


def _fused_by_four(*arrays):
    residual, out, _, _, *others = arrays
    C = out.shape[1]
    if C % 4 or C > WIDEST or not aligned(residual, out, *others):
        return _fused_by_element(*arrays)
    return _by_rows(_fused_fours, 128, *arrays)


# residual and LayerNorm
# two launches; a warp a row, the sum in registers; the same with vectors
FUSED_RESIDUAL_FORWARD = (_unfused, _fused_by_element, _fused_by_four)


@shapes("... C!, ... C!, ...!, ...!, ... C~, ... C~, C, C", DEVICE)
def fused_residual_forward(
    residual, out, mean, rstd, inp1, inp2, weight, bias, version=3
):  # fmt: skip
    """Add two arrays, and normalise each row of the sum.

    As `residual_forward(residual, inp1, inp2)` and then `layernorm_forward(
    out, mean, rstd, residual, weight, bias)`. residual, out, inp1, inp2: a
    device's arrays of one shape (..., C), float32; residual may be inp1 or
    inp2. mean, rstd: (...). weight, bias: (C,). residual, out, mean and rstd
    are overwritten. C must be at least 1; without rows nothing is launched.
    version: which kernel, from 1 on. Raises TypeError or ValueError before
    it launches anything.

    Derived in chapter 1.10.
    """
    label = "fused_residual_forward"
    run = numbered(FUSED_RESIDUAL_FORWARD, version, label)
    C = len(weight)
    if not C:
        raise ValueError(f"{label}: inp1 must have channels, got {inp1.shape}")
    whole, stats = (residual, out, inp1, inp2), (mean, rstd)
    sums, outs, a, b = (x.reshape(-1, C) for x in whole)
    stats = (x.reshape(-1) for x in stats)
    if inp1.size:
        run(sums, outs, *stats, a, b, weight, bias)
