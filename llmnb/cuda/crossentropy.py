# Written by `make export` from notebooks/1_by_hand/11_crossentropy.py: edit that file.

"""Softmax and cross-entropy on a GPU, forward and backward."""

__all__ = [
    "CROSSENTROPY_BACKWARD",
    "CROSSENTROPY_FORWARD",
    "CROSSENTROPY_SOFTMAX_BACKWARD",
    "CROSSENTROPY_SOFTMAX_FORWARD",
    "FUSED_CLASSIFIER",
    "SOFTMAX_BACKWARD",
    "SOFTMAX_FORWARD",
    "crossentropy_backward",
    "crossentropy_forward",
    "crossentropy_softmax_backward",
    "crossentropy_softmax_forward",
    "fused_classifier",
    "softmax_backward",
    "softmax_forward",
]


# imports of the GPU's kernels
import math

import numpy as np

from llmnb.gpu.launch import DEVICE, aligned, device, kernel, numbered
from llmnb.gpu.simulator import cuda, load4, store4
from llmnb.gpu.warp import block_max, block_sum, warp_max, warp_sum
from llmnb.shapes import shapes


# views as rows
def _device_rows(name, first, *others):
    """The device's arrays with one row, or number, a token."""
    if not first.size:
        raise ValueError(f"{name}: B, T and Vp must not be 0")
    arrays = (first, *others)
    return [x.reshape(-1, *tuple(x.shape)[2:]) for x in arrays]


# version 1
@kernel
def _softmax_by_threads(probs, logits, V):
    row = cuda.grid(1)
    if row >= len(logits):
        return
    top, total = logits[row, 0], np.float32(0)
    for i in range(1, V):
        top = max(top, logits[row, i])
    for i in range(V):
        total += math.exp(logits[row, i] - top)
    scale = np.float32(1) / total
    for i in range(V):
        probs[row, i] = scale * math.exp(logits[row, i] - top)
    for i in range(V, logits.shape[1]):
        probs[row, i] = np.float32(0)


def _softmax_thread_a_row(probs, logits, V):
    grid = -(-len(logits) // 64)
    _softmax_by_threads[grid, 64](probs, logits, V)


# version 2
_LOWEST = np.float32(-1e38)  # below every logit; times log2(e) still finite


@device
def _put_probs(probs, logits, row, V, first, step, top, scale):
    """Write every step-th probability of a row, and 0 in the padding."""
    for i in range(first, logits.shape[1], step):
        p = np.float32(0)
        if i < V:
            p = scale * math.exp(logits[row, i] - top)
        probs[row, i] = p


@kernel
def _softmax_by_warps(probs, logits, V):
    row, lane = cuda.grid(1) // 32, cuda.threadIdx.x % 32
    if row >= len(logits):
        return
    top, total = _LOWEST, np.float32(0)
    for i in range(lane, V, 32):
        top = max(top, logits[row, i])
    top = warp_max(top)
    for i in range(lane, V, 32):
        total += math.exp(logits[row, i] - top)
    scale = np.float32(1) / warp_sum(total)
    _put_probs(probs, logits, row, V, lane, 32, top, scale)


def _softmax_warp_a_row(probs, logits, V):
    grid = -(-len(logits) // 4)
    _softmax_by_warps[grid, 128](probs, logits, V)


# version 3
def _threads(n, most=1024):
    """Threads for n things: whole warps, and no more than `most`."""
    return min(most, -(-n // 32) * 32)


@kernel(launch_bounds=1024)
def _softmax_by_blocks(probs, logits, V):
    row, me = cuda.blockIdx.x, cuda.threadIdx.x
    step, parts = cuda.blockDim.x, cuda.shared.array(32, np.float32)
    top, total = _LOWEST, np.float32(0)
    for i in range(me, V, step):
        top = max(top, logits[row, i])
    top = block_max(top, parts)
    for i in range(me, V, step):
        total += math.exp(logits[row, i] - top)
    scale = np.float32(1) / block_sum(total, parts)
    _put_probs(probs, logits, row, V, me, step, top, scale)


def _softmax_block_a_row(probs, logits, V):
    block = _threads(V)
    _softmax_by_blocks[len(logits), block](probs, logits, V)


# one more logit
@device
def _with_logit(top, total, x):
    """The pair of some logits, and of one more: one exponential."""
    less = math.exp(-abs(x - top))
    if x > top:
        return x, total * less + np.float32(1)
    return top, total + less


# two pairs
@device
def _merged(top, total, other, more):
    """The pair of two sets of logits from the pair of each."""
    less = math.exp(-abs(other - top))
    if other > top:
        return other, total * less + more
    return top, total + more * less


@device
def _warp_merged(top, total):
    """The pair of all logits that the lanes of a warp have seen."""
    for step in (16, 8, 4, 2, 1):
        other = cuda.shfl_xor_sync(0xFFFFFFFF, top, step)
        more = cuda.shfl_xor_sync(0xFFFFFFFF, total, step)
        top, total = _merged(top, total, other, more)
    return top, total


# the pairs of a block
@device
def _block_merged(top, total, tops, totals):
    """The pair of all logits that the threads of a block have seen.

    tops, totals: shared memory, 32 elements each.
    """
    warp, lane = cuda.threadIdx.x // 32, cuda.threadIdx.x % 32
    top, total = _warp_merged(top, total)
    if lane == 0:
        tops[warp], totals[warp] = top, total
    cuda.syncthreads()
    top, total = _LOWEST, np.float32(0)
    if lane < cuda.blockDim.x // 32:
        top, total = tops[lane], totals[lane]
    return _warp_merged(top, total)


# version 4
@kernel(launch_bounds=1024)
def _softmax_online(probs, logits, V):
    row, me, step = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
    tops = cuda.shared.array(32, np.float32)
    totals = cuda.shared.array(32, np.float32)
    top, total = _LOWEST, np.float32(0)
    for i in range(me, V, step):
        top, total = _with_logit(top, total, logits[row, i])
    top, total = _block_merged(top, total, tops, totals)
    scale = np.float32(1) / total
    _put_probs(probs, logits, row, V, me, step, top, scale)


def _softmax_one_pass(probs, logits, V):
    _softmax_online[len(logits), _threads(V)](probs, logits, V)


# four logits at once
def _whole(V, *arrays):
    """How many of the first V columns can be moved in vectors of four."""
    fits = arrays[0].shape[1] % 4 == 0 and aligned(*arrays)
    return V - V % 4 if fits else 0


@device
def _with_four(top, total, a, b, c, d):
    """The pair of some logits, and of four more: five exponentials."""
    most = max(max(top, max(a, b)), max(c, d))
    total *= math.exp(top - most)
    total += math.exp(a - most) + math.exp(b - most)
    total += math.exp(c - most) + math.exp(d - most)
    return most, total


@device
def _row_pair(logits, row, V, whole, done):
    """The pair of those logits of a row that are this thread's to read.

    done: this many columns were read before, as vectors.
    """
    me, step, Vp = cuda.threadIdx.x, cuda.blockDim.x, logits.shape[1]
    top, total = _LOWEST, np.float32(0)
    for i in range(done + 4 * me, whole, 4 * step):
        a, b, c, d = load4(logits, row * Vp + i)
        top, total = _with_four(top, total, a, b, c, d)
    for i in range(whole + me, V, step):
        top, total = _with_logit(top, total, logits[row, i])
    return top, total


# version 5
@kernel(launch_bounds=1024)
def _softmax_in_fours(probs, logits, V, whole):
    row, me, step = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
    tops = cuda.shared.array(32, np.float32)
    totals = cuda.shared.array(32, np.float32)
    top, total = _row_pair(logits, row, V, whole, 0)
    top, total = _block_merged(top, total, tops, totals)
    scale, Vp = np.float32(1) / total, logits.shape[1]
    for i in range(4 * me, whole, 4 * step):
        a, b, c, d = load4(logits, row * Vp + i)
        a, b = scale * math.exp(a - top), scale * math.exp(b - top)
        c, d = scale * math.exp(c - top), scale * math.exp(d - top)
        store4(probs, row * Vp + i, a, b, c, d)
    _put_probs(probs, logits, row, V, whole + me, step, top, scale)


def _softmax_vectors(probs, logits, V):
    whole = _whole(V, probs, logits)
    block = _threads(-(-V // 4))
    _softmax_in_fours[len(logits), block](probs, logits, V, whole)


# the softmax on a GPU
# a thread a row, a warp a row, a block a row, maximum and sum in one pass,
# vectors of four
SOFTMAX_FORWARD = (
    _softmax_thread_a_row,
    _softmax_warp_a_row,
    _softmax_block_a_row,
    _softmax_one_pass,
    _softmax_vectors,
)


@shapes("B T Vp!, B T Vp~, 1 to Vp", DEVICE)
def softmax_forward(probs, logits, V, version=5):
    """Probabilities of the first V logits in each row.

    probs, logits: device's float32 (B, T, Vp), logits above -1e38. Columns
    from V on are padding: their logits are not read and their probability
    is 0. Writes `probs`, which may be `logits` itself. version: 1 to 5, the
    place in SOFTMAX_FORWARD. Raises TypeError or ValueError for a wrong
    dtype, shape or version and for V outside [1, Vp].

    Derived in chapter 1.11.
    """
    run = numbered(SOFTMAX_FORWARD, version, "softmax_forward")
    run(*_device_rows("softmax_forward", probs, logits), V)


# the gradient by warps
@kernel
def _softmax_back_by_warps(dlogits, dprobs, probs):
    row, lane = cuda.grid(1) // 32, cuda.threadIdx.x % 32
    if row >= len(probs):
        return
    inside = np.float32(0)
    for i in range(lane, probs.shape[1], 32):
        inside += probs[row, i] * dprobs[row, i]
    inside = warp_sum(inside)
    for i in range(lane, probs.shape[1], 32):
        dlogits[row, i] += probs[row, i] * (dprobs[row, i] - inside)


def _softmax_back_warp_a_row(dlogits, dprobs, probs):
    grid = -(-len(probs) // 4)
    _softmax_back_by_warps[grid, 128](dlogits, dprobs, probs)


# the gradient by blocks
@kernel(launch_bounds=1024)
def _softmax_back_in_fours(dlogits, dprobs, probs, whole):
    row, me, step = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
    parts, Vp = cuda.shared.array(32, np.float32), probs.shape[1]
    inside = np.float32(0)
    for i in range(row * Vp + 4 * me, row * Vp + whole, 4 * step):
        a, b, c, d = load4(probs, i)
        e, f, g, h = load4(dprobs, i)
        inside += a * e + b * f + c * g + d * h
    for i in range(whole + me, Vp, step):
        inside += probs[row, i] * dprobs[row, i]
    inside = block_sum(inside, parts)
    for i in range(row * Vp + 4 * me, row * Vp + whole, 4 * step):
        a, b, c, d = load4(probs, i)
        e, f, g, h = load4(dprobs, i)
        a, b = a * (e - inside), b * (f - inside)
        c, d = c * (g - inside), d * (h - inside)
        e, f, g, h = load4(dlogits, i)
        store4(dlogits, i, e + a, f + b, g + c, h + d)
    for i in range(whole + me, Vp, step):
        dlogits[row, i] += probs[row, i] * (dprobs[row, i] - inside)


def _softmax_back_vectors(dlogits, dprobs, probs):
    arrays, Vp = (dlogits, dprobs, probs), probs.shape[1]
    block = _threads(-(-Vp // 4))
    _softmax_back_in_fours[len(probs), block](*arrays, _whole(Vp, *arrays))


# its gradient on a GPU
# a warp a row; a block a row, vectors of four
SOFTMAX_BACKWARD = (_softmax_back_warp_a_row, _softmax_back_vectors)


@shapes("B T Vp!, B T Vp, B T Vp", DEVICE)
def softmax_backward(dlogits, dprobs, probs, version=2):
    """Add the gradient by the logits to `dlogits`.

    dlogits, dprobs, probs: device's float32 (B, T, Vp). Padding has
    probability 0, so its columns receive 0. version: 1 or 2, the place in
    SOFTMAX_BACKWARD. Raises TypeError or ValueError for a wrong dtype,
    shape or version.

    Derived in chapter 1.11.
    """
    run = numbered(SOFTMAX_BACKWARD, version, "softmax_backward")
    run(*_device_rows("softmax_backward", dlogits, dprobs, probs))


# a thread a target
_TINY = np.finfo(np.float32).tiny


@kernel
def _surprise_by_threads(losses, probs, targets):
    row = cuda.grid(1)
    if row < len(losses):
        losses[row] = -math.log(max(probs[row, targets[row]], _TINY))


@kernel
def _surprise_back_by_threads(dprobs, dlosses, probs, targets):
    row = cuda.grid(1)
    if row < len(dlosses):
        k = targets[row]
        dprobs[row, k] -= dlosses[row] / max(probs[row, k], _TINY)


def _surprise_thread_a_row(losses, probs, targets):
    grid = -(-len(losses) // 128)
    _surprise_by_threads[grid, 128](losses, probs, targets)


def _surprise_back_thread_a_row(dprobs, dlosses, probs, targets):
    grid = -(-len(dlosses) // 128)
    _surprise_back_by_threads[grid, 128](dprobs, dlosses, probs, targets)


# the surprise on a GPU
# a thread a row, each
CROSSENTROPY_FORWARD = (_surprise_thread_a_row,)
CROSSENTROPY_BACKWARD = (_surprise_back_thread_a_row,)


@shapes("B T!, B T Vp, B T of Vp", DEVICE)
def crossentropy_forward(losses, probs, targets, version=1):
    """Surprise at each target, in nats: minus the log of its probability.

    losses: device's float32 (B, T), written. probs: (B, T, Vp). targets:
    device's int32 (B, T), each in [0, Vp): the caller checks that on the
    host. A probability below the smallest normal number counts as that
    number. version: 1. Raises TypeError or ValueError for a wrong dtype,
    shape or version.

    Derived in chapter 1.11.
    """
    name = "crossentropy_forward"
    run = numbered(CROSSENTROPY_FORWARD, version, name)
    run(*_device_rows(name, losses, probs, targets))


@shapes("B T Vp!, B T, B T Vp, B T of Vp", DEVICE)
def crossentropy_backward(dprobs, dlosses, probs, targets, version=1):
    """Add the gradient of the losses by the probabilities to `dprobs`.

    dprobs, probs: device's float32 (B, T, Vp); dlosses: (B, T); targets:
    device's int32 (B, T), each in [0, Vp). Only the targets' columns of
    `dprobs` change. version and what is raised: as `crossentropy_forward`.

    Derived in chapter 1.11.
    """
    name = "crossentropy_backward"
    run = numbered(CROSSENTROPY_BACKWARD, version, name)
    run(*_device_rows(name, dprobs, dlosses, probs, targets))


# loss and lse by warps
@kernel
def _loss_by_warps(losses, lse, logits, targets, V):
    row, lane = cuda.grid(1) // 32, cuda.threadIdx.x % 32
    if row >= len(logits):
        return
    top, total = _LOWEST, np.float32(0)
    for i in range(lane, V, 32):
        top, total = _with_logit(top, total, logits[row, i])
    top, total = _warp_merged(top, total)
    if lane == 0:
        lse[row] = top + math.log(total)
        losses[row] = top + math.log(total) - logits[row, targets[row]]


def _loss_warp_a_row(losses, lse, logits, targets, V):
    grid = -(-len(logits) // 4)
    _loss_by_warps[grid, 128](losses, lse, logits, targets, V)


# loss and lse by blocks
@kernel(launch_bounds=1024)
def _loss_in_fours(losses, lse, logits, targets, V, whole):
    row, me = cuda.blockIdx.x, cuda.threadIdx.x
    tops = cuda.shared.array(32, np.float32)
    totals = cuda.shared.array(32, np.float32)
    top, total = _row_pair(logits, row, V, whole, 0)
    top, total = _block_merged(top, total, tops, totals)
    if me == 0:
        lse[row] = top + math.log(total)
        losses[row] = top + math.log(total) - logits[row, targets[row]]


def _loss_vectors(losses, lse, logits, targets, V):
    arrays = losses, lse, logits, targets
    block = _threads(-(-V // 4))
    _loss_in_fours[len(logits), block](*arrays, V, _whole(V, logits))


# the fused forward pass
# a warp a row; a block a row, vectors of four
CROSSENTROPY_SOFTMAX_FORWARD = (_loss_warp_a_row, _loss_vectors)


@shapes("B T!, B T!, B T Vp, B T of V, 1 to Vp", DEVICE)
def crossentropy_softmax_forward(losses, lse, logits, targets, V, version=2):
    """Losses straight from the logits; no probability is stored.

    losses, lse: device's float32 (B, T), written; lse is the log of the sum
    of the exponentials of a row, all that the backward pass needs besides
    the logits. logits: (B, T, Vp), each read once, above -1e38; columns
    from V on are not read. targets: device's int32 (B, T), each in [0, V):
    the caller checks that on the host. version: 1 or 2, the place in
    CROSSENTROPY_SOFTMAX_FORWARD. Raises TypeError or ValueError for a wrong
    dtype, shape or version and for V outside [1, Vp].

    Derived in chapter 1.11.
    """
    name = "crossentropy_softmax_forward"
    run = numbered(CROSSENTROPY_SOFTMAX_FORWARD, version, name)
    run(*_device_rows(name, losses, lse, logits, targets), V)


# p - y
@device
def _slope(x, shift, scale, hit):
    """The gradient by one logit: (1.11.12)."""
    y = np.float32(1) if hit else np.float32(0)
    return scale * (math.exp(x - shift) - y)


@device
def _put_slopes(out, logits, row, V, first, step, shift, scale, k):
    """Write every step-th gradient of a row, and 0 in the padding."""
    for i in range(first, logits.shape[1], step):
        slope = np.float32(0)
        if i < V:
            slope = _slope(logits[row, i], shift, scale, i == k)
        out[row, i] = slope


# dlogits by warps
@kernel
def _slopes_by_warps(dlogits, dlosses, logits, lse, targets, V):
    row, lane = cuda.grid(1) // 32, cuda.threadIdx.x % 32
    if row < len(logits):
        k, shift, scale = targets[row], lse[row], dlosses[row]
        _put_slopes(dlogits, logits, row, V, lane, 32, shift, scale, k)


def _slopes_warp_a_row(dlogits, dlosses, logits, lse, targets, V):
    grid = -(-len(logits) // 4)
    arrays = dlogits, dlosses, logits, lse, targets
    _slopes_by_warps[grid, 128](*arrays, V)


# dlogits by blocks
@device
def _put_row(out, logits, row, V, whole, done, shift, scale, k):
    """Write a row's gradient by its block: vectors, the rest, padding.

    done: this many columns are written elsewhere, as vectors.
    """
    me, step, Vp = cuda.threadIdx.x, cuda.blockDim.x, logits.shape[1]
    for i in range(done + 4 * me, whole, 4 * step):
        a, b, c, d = load4(logits, row * Vp + i)
        a = _slope(a, shift, scale, i == k)
        b = _slope(b, shift, scale, i + 1 == k)
        c = _slope(c, shift, scale, i + 2 == k)
        d = _slope(d, shift, scale, i + 3 == k)
        store4(out, row * Vp + i, a, b, c, d)
    _put_slopes(out, logits, row, V, whole + me, step, shift, scale, k)


@kernel(launch_bounds=1024)
def _slopes_in_fours(dlogits, dlosses, logits, lse, targets, V, whole):
    row = cuda.blockIdx.x
    k, shift, scale = targets[row], lse[row], dlosses[row]
    _put_row(dlogits, logits, row, V, whole, 0, shift, scale, k)


def _slopes_vectors(dlogits, dlosses, logits, lse, targets, V):
    block = _threads(-(-V // 4))
    arrays = dlogits, dlosses, logits, lse, targets
    whole = _whole(V, dlogits, logits)
    _slopes_in_fours[len(logits), block](*arrays, V, whole)


# the fused backward pass
# a warp a row; a block a row, vectors of four
CROSSENTROPY_SOFTMAX_BACKWARD = (_slopes_warp_a_row, _slopes_vectors)


@shapes("B T Vp!, B T, B T Vp~, B T, B T of V, 1 to Vp", DEVICE)
def crossentropy_softmax_backward(
    dlogits, dlosses, logits, lse, targets, V, version=2
):
    """Write the gradient of the losses by the logits: p - y, scaled.

    dlogits: device's float32 (B, T, Vp), overwritten (not added to); it may
    be `logits` itself, which then is lost. dlosses, lse: (B, T), lse from
    the forward pass. targets: device's int32 (B, T), each in [0, V).
    Columns from V on receive 0. version: 1 or 2, the place in
    CROSSENTROPY_SOFTMAX_BACKWARD. Raises as the forward pass does.

    Derived in chapter 1.11.
    """
    name = "crossentropy_softmax_backward"
    run = numbered(CROSSENTROPY_SOFTMAX_BACKWARD, version, name)
    run(*_device_rows(name, dlogits, dlosses, logits, lse, targets), V)


# loss and gradient in one launch
@kernel(launch_bounds=1024)
def _classify_in_fours(losses, logits, dlosses, targets, V, whole):
    row, me = cuda.blockIdx.x, cuda.threadIdx.x
    tops = cuda.shared.array(32, np.float32)
    totals = cuda.shared.array(32, np.float32)
    k = targets[row]
    right = logits[row, k]  # before the barrier: it is overwritten below
    top, total = _row_pair(logits, row, V, whole, 0)
    top, total = _block_merged(top, total, tops, totals)
    shift = top + math.log(total)
    if me == 0:
        losses[row] = shift - right
    _put_row(logits, logits, row, V, whole, 0, shift, dlosses[row], k)


def _classify_two_reads(losses, logits, dlosses, targets, V):
    block = _threads(-(-V // 4))
    arrays = losses, logits, dlosses, targets
    _classify_in_fours[len(logits), block](*arrays, V, _whole(V, logits))


# a row in registers
_KEEPERS = 512  # threads of a block, constant so that addresses are too
_VECTORS = 12  # that each keeps
_KEPT = 4 * _VECTORS
_DONE = _KEPT * _KEEPERS  # columns that a block keeps: 24,576


@device
def _keep(held, logits, row, whole):
    """Read this thread's vectors of a row, and leave their exponentials.

    Returns the pair of what was read; held: _KEPT numbers of this thread.
    """
    start, top = row * logits.shape[1], _LOWEST
    for j in range(_VECTORS):
        i = 4 * (cuda.threadIdx.x + j * _KEEPERS)
        a, b, c, d = _LOWEST, _LOWEST, _LOWEST, _LOWEST
        if i < whole:
            a, b, c, d = load4(logits, start + i)
        held[4 * j], held[4 * j + 1] = a, b
        held[4 * j + 2], held[4 * j + 3] = c, d
        top = max(max(top, max(a, b)), max(c, d))
    total = np.float32(0)
    for j in range(_KEPT):
        held[j] = math.exp(held[j] - top)
        total += held[j]
    return top, total


# the gradient from registers
@device
def _put_kept(logits, row, whole, held, factor, scale, k):
    """Write the gradients of what `_keep` read."""
    start, zero = row * logits.shape[1], np.float32(0)
    for j in range(_VECTORS):
        i = 4 * (cuda.threadIdx.x + j * _KEEPERS)
        if i < whole:
            a = factor * held[4 * j] - (scale if i == k else zero)
            b = factor * held[4 * j + 1] - (scale if i + 1 == k else zero)
            c = factor * held[4 * j + 2] - (scale if i + 2 == k else zero)
            d = factor * held[4 * j + 3] - (scale if i + 3 == k else zero)
            store4(logits, start + i, a, b, c, d)


# most of a row read once
@kernel(launch_bounds=_KEEPERS)
def _classify_kept(losses, logits, dlosses, targets, V, whole):
    row, me = cuda.blockIdx.x, cuda.threadIdx.x
    tops = cuda.shared.array(32, np.float32)
    totals = cuda.shared.array(32, np.float32)
    held = cuda.local.array(_KEPT, np.float32)
    k, scale = targets[row], dlosses[row]
    right = logits[row, k]  # before the barrier: it is overwritten below
    mine, total = _keep(held, logits, row, whole)
    other, more = _row_pair(logits, row, V, whole, _DONE)
    top, total = _merged(mine, total, other, more)
    top, total = _block_merged(top, total, tops, totals)
    shift = top + math.log(total)
    if me == 0:
        losses[row] = shift - right
    factor = scale * math.exp(mine - shift)
    _put_kept(logits, row, whole, held, factor, scale, k)
    _put_row(logits, logits, row, V, whole, _DONE, shift, scale, k)


def _classify_one_read(losses, logits, dlosses, targets, V):
    arrays = losses, logits, dlosses, targets
    whole = _whole(V, logits)
    if whole < 4 * _KEEPERS:  # no vector for every thread
        _classify_two_reads(*arrays, V)
    else:
        _classify_kept[len(logits), _KEEPERS](*arrays, V, whole)


# the whole classifier
# each logit read twice; the first 24,576 of a row once
FUSED_CLASSIFIER = (_classify_two_reads, _classify_one_read)


@shapes("B T!, B T Vp!, B T, B T of V, 1 to Vp", DEVICE)
def fused_classifier(losses, logits, dlosses, targets, V, version=2):
    """Write the losses and put their gradient in the logits' place.

    In one launch what `crossentropy_softmax_forward` and then
    `crossentropy_softmax_backward` in place do in two. losses: device's
    float32 (B, T), written. logits: (B, T, Vp), above -1e38, overwritten by
    their gradient; columns from V on are not read and receive 0. dlosses:
    (B, T), known before the losses are. targets: device's int32 (B, T),
    each in [0, V): the caller checks that on the host. version: 1 or 2, the
    place in FUSED_CLASSIFIER; 2 is 1 where V is less than 2048, Vp no
    multiple of 4 or logits not aligned. Raises TypeError or ValueError for a
    wrong dtype, shape or version and for V outside [1, Vp].

    Derived in chapter 1.11.
    """
    run = numbered(FUSED_CLASSIFIER, version, "fused_classifier")
    arrays = losses, logits, dlosses, targets
    run(*_device_rows("fused_classifier", *arrays), V)
