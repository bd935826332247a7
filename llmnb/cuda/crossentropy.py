# Written by `make export` from notebooks/3_gpu/08_classifier.py: edit that file.

"""Softmax and cross-entropy on a GPU, forward and backward."""

__all__ = [
    "crossentropy_softmax_backward", "crossentropy_softmax_forward",
    "fused_classifier",
]


# imports of the kernels
import math

import numpy as np

from llmnb.gpu.launch import DEVICE, aligned, device, kernel
from llmnb.gpu.simulator import cuda, load4, store4
from llmnb.shapes import shapes


# two pairs
LOWEST = np.float32(-1e38)  # below every logit; times log2(e) still finite


@device
def _merged(top, total, other, more):
    """The pair of two sets of logits from the pair of each."""
    less = math.exp(-abs(other - top))
    if other > top:
        return other, total * less + more
    return top, total + more * less


# the pair of a warp
@device
def _warp_merged(top, total):
    """The pair of all logits that the lanes of a warp have seen."""
    for step in (16, 8, 4, 2, 1):
        other = cuda.shfl_xor_sync(0xFFFFFFFF, top, step)
        more = cuda.shfl_xor_sync(0xFFFFFFFF, total, step)
        top, total = _merged(top, total, other, more)
    return top, total


# the pair of a block
@device
def block_merged(top, total, tops, totals):
    """The pair of all logits that the threads of a block have seen.

    tops, totals: shared memory, 32 elements each.
    """
    warp, lane = cuda.threadIdx.x // 32, cuda.threadIdx.x % 32
    top, total = _warp_merged(top, total)
    if lane == 0:
        tops[warp], totals[warp] = top, total
    cuda.syncthreads()
    top, total = LOWEST, np.float32(0)
    if lane < cuda.blockDim.x // 32:
        top, total = tops[lane], totals[lane]
    return _warp_merged(top, total)


# four logits at once
def _whole(V, *arrays):
    """How many of the first V columns can be moved in vectors of four."""
    fits = arrays[0].shape[1] % 4 == 0 and aligned(*arrays)
    return V - V % 4 if fits else 0


def _threads(n):
    """Threads for n things: whole warps, and no more than a block has."""
    return min(1024, -(-n // 32) * 32)


@device
def _with_four(top, total, a, b, c, d):
    """The pair of some logits, and of four more: five exponentials."""
    most = max(max(top, max(a, b)), max(c, d))
    total *= math.exp(top - most)
    total += math.exp(a - most) + math.exp(b - most)
    total += math.exp(c - most) + math.exp(d - most)
    return most, total


# loss and lse by blocks
@device
def _row_merged(logits, row, V, whole, tops, totals):
    """The pair of a row, which all threads of a block read together."""
    me, step, Vp = cuda.threadIdx.x, cuda.blockDim.x, logits.shape[1]
    top, total = LOWEST, np.float32(0)
    for i in range(4 * me, whole, 4 * step):
        a, b, c, d = load4(logits, row * Vp + i)
        top, total = _with_four(top, total, a, b, c, d)
    for i in range(whole + me, V, step):
        top, total = _merged(top, total, logits[row, i], np.float32(1))
    return block_merged(top, total, tops, totals)


@kernel(launch_bounds=1024)
def _loss_by_blocks(losses, lse, logits, targets, V, whole):
    row = cuda.blockIdx.x
    tops = cuda.shared.array(32, np.float32)
    totals = cuda.shared.array(32, np.float32)
    top, total = _row_merged(logits, row, V, whole, tops, totals)
    if cuda.threadIdx.x == 0:
        lse[row] = top + math.log(total)
        losses[row] = top + math.log(total) - logits[row, targets[row]]


# the forward pass
def _rows(*arrays):
    """A device's arrays with one row, or number, a token."""
    if not all(x.size for x in arrays):
        raise ValueError("crossentropy: B, T and Vp must not be 0")
    return [x.reshape(-1, *tuple(x.shape)[2:]) for x in arrays]


@shapes("B T!, B T!, B T Vp, B T of V, 1 to Vp", DEVICE)
def crossentropy_softmax_forward(losses, lse, logits, targets, V):
    """Losses straight from the logits; no probability is stored.

    losses, lse: device's float32 (B, T), written; lse is the log of the sum
    of the exponentials of a row, all that the backward pass needs besides
    the logits. logits: (B, T, Vp), each read once, above -1e38; columns
    from V on are not read. targets: device's int32 (B, T), each in [0, V):
    the caller checks that on the host. Raises TypeError or ValueError for a
    wrong dtype or shape and for V outside [1, Vp].

    Derived in chapter 3.8.
    """
    losses, lse, logits, targets = _rows(losses, lse, logits, targets)
    grid, block, whole = len(logits), _threads(-(-V // 4)), _whole(V, logits)
    _loss_by_blocks[grid, block](losses, lse, logits, targets, V, whole)


# p - y of a row
@device
def _slope(x, shift, scale, hit):
    """The gradient by one logit: (1.11.12)."""
    y = np.float32(1) if hit else np.float32(0)
    return scale * (math.exp(x - shift) - y)


@device
def _row_of_slopes(dlogits, logits, row, k, shift, scale, V, whole):
    """Write p - y of a row, scaled; all threads of a block together."""
    me, step, Vp = cuda.threadIdx.x, cuda.blockDim.x, logits.shape[1]
    for i in range(4 * me, whole, 4 * step):
        a, b, c, d = load4(logits, row * Vp + i)
        a = _slope(a, shift, scale, i == k)
        b = _slope(b, shift, scale, i + 1 == k)
        c = _slope(c, shift, scale, i + 2 == k)
        d = _slope(d, shift, scale, i + 3 == k)
        store4(dlogits, row * Vp + i, a, b, c, d)
    for i in range(whole + me, Vp, step):
        slope = np.float32(0)
        if i < V:
            slope = _slope(logits[row, i], shift, scale, i == k)
        dlogits[row, i] = slope


@kernel(launch_bounds=1024)
def _slopes_by_blocks(dlogits, dlosses, logits, lse, targets, V, whole):
    row = cuda.blockIdx.x
    k, shift, scale = targets[row], lse[row], dlosses[row]
    _row_of_slopes(dlogits, logits, row, k, shift, scale, V, whole)


# the backward pass
@shapes("B T Vp!, B T, B T Vp~, B T, B T of V, 1 to Vp", DEVICE)
def crossentropy_softmax_backward(dlogits, dlosses, logits, lse, targets, V):
    """Write the gradient of the losses by the logits: p - y, scaled.

    dlogits: device's float32 (B, T, Vp), overwritten (not added to); it may
    be `logits` itself, which then is lost. dlosses, lse: (B, T), lse from
    the forward pass. targets: device's int32 (B, T), each in [0, V).
    Columns from V on receive 0. Raises as the forward pass does.

    Derived in chapter 3.8.
    """
    arrays = _rows(dlogits, dlosses, logits, lse, targets)
    whole, block = _whole(V, arrays[0], arrays[2]), _threads(-(-V // 4))
    _slopes_by_blocks[len(arrays[0]), block](*arrays, V, whole)


# loss and gradient in one launch
@kernel(launch_bounds=1024)
def _both_by_blocks(losses, lse, logits, dlosses, targets, V, whole):
    row = cuda.blockIdx.x
    tops = cuda.shared.array(32, np.float32)
    totals = cuda.shared.array(32, np.float32)
    k, scale = targets[row], dlosses[row]
    top, total = _row_merged(logits, row, V, whole, tops, totals)
    shift = top + math.log(total)
    if cuda.threadIdx.x == 0:
        lse[row] = shift
        losses[row] = shift - logits[row, k]
    cuda.syncthreads()
    _row_of_slopes(logits, logits, row, k, shift, scale, V, whole)


@shapes("B T!, B T!, B T Vp!, B T, B T of V, 1 to Vp", DEVICE)
def fused_classifier(losses, lse, logits, dlosses, targets, V):
    """Losses, and their gradient in the place of the logits, in one launch.

    The same as crossentropy_softmax_forward(losses, lse, logits, targets, V)
    and crossentropy_softmax_backward(logits, dlosses, logits, lse, targets,
    V), to the bit, and raises what they raise.

    Derived in chapter 3.8.
    """
    arrays = _rows(losses, lse, logits, dlosses, targets)
    whole, block = _whole(V, arrays[2]), _threads(-(-V // 4))
    _both_by_blocks[len(arrays[2]), block](*arrays, V, whole)
