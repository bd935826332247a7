# Written by `make export` from notebooks/3_gpu/10_adamw.py: edit that file.

"""AdamW, and the clipping of gradients, on a GPU."""

__all__ = [
    "adamw_apply", "adamw_scratch", "adamw_settings", "adamw_update",
    "clip_apply", "clip_gradients", "clip_scratch", "global_norm",
]


# imports of the kernels
import math

import numpy as np

from llmnb.cuda.elementwise import BLOCK, count_fours
from llmnb.gpu.launch import DEVICE, aligned, device, given_work, kernel
from llmnb.gpu.launch import to_host
from llmnb.gpu.simulator import cuda, load4, store4
from llmnb.gpu.warp import block_sum
from llmnb.shapes import shapes


# sizes
WARPS = 8  # in a block of 256 threads
SETTINGS = 8  # numbers: seven of AdamW, and one to fill two vectors
NORM_BLOCKS = 1024  # blocks at most that sum squares
ZERO, ONE = np.float32(0), np.float32(1)
TINY = np.float32(1e-6)  # (1.12.14)
LARGEST = np.finfo(np.float32).max


# the settings
def adamw_scratch():
    """The number of floats that `adamw_update` wants as `work`.

    Derived in chapter 3.10.
    """
    return SETTINGS


@shapes("-", DEVICE)
def adamw_settings(settings):
    """What AdamW's kernel wants to know of a step, as a float32 array.

    settings: an AdamW. Its factors are computed in float64 and rounded at the
    end. Copy them to the device for `adamw_apply`. Raises ValueError for
    settings out of range.

    Derived in chapter 3.10.
    """
    return np.array([*settings.factors("adamw_update"), 0], np.float32)


# AdamW of four elements
@device
def _adamw(p, g, m, v, factors):
    keep, new1, beta2, new2, root, eps, size, _ = factors
    m += new1 * (g - m)
    v = beta2 * v + new2 * g * g
    spread = math.sqrt(v) / root + eps
    return keep * p - size * m / spread, m, v


@kernel
def _adamw_by_fours(params, grads, m, v, settings, fours):
    i = cuda.grid(1)
    k = 3 * fours + i  # where no four is left for this thread
    if i >= fours and k >= params.size:
        return
    factors = load4(settings, 0) + load4(settings, 4)
    if i < fours:
        p0, p1, p2, p3 = load4(params, 4 * i)
        g0, g1, g2, g3 = load4(grads, 4 * i)
        m0, m1, m2, m3 = load4(m, 4 * i)
        v0, v1, v2, v3 = load4(v, 4 * i)
        p0, m0, v0 = _adamw(p0, g0, m0, v0, factors)
        p1, m1, v1 = _adamw(p1, g1, m1, v1, factors)
        p2, m2, v2 = _adamw(p2, g2, m2, v2, factors)
        p3, m3, v3 = _adamw(p3, g3, m3, v3, factors)
        store4(params, 4 * i, p0, p1, p2, p3)
        store4(m, 4 * i, m0, m1, m2, m3)
        store4(v, 4 * i, v0, v1, v2, v3)
    else:
        p0, m0, v0 = _adamw(params[k], grads[k], m[k], v[k], factors)
        params[k], m[k], v[k] = p0, m0, v0


# AdamW on arrays
@shapes(f"N!, N, N!, N!, {SETTINGS}", DEVICE)
def adamw_apply(params, grads, m, v, settings):
    """Take one step of AdamW with settings that are on the device.

    params, grads, m, v: a device's arrays, float32, flat, of one length.
    settings: what `adamw_settings` computed, on the device, at a multiple of
    16 bytes. Allocates nothing and does not wait: a CUDA graph may record it,
    and new settings may be copied into the array before the graph is launched
    again. Raises TypeError or ValueError for arrays that do not fit.

    Derived in chapter 3.10.
    """
    if not aligned(settings):
        raise ValueError(
            "adamw_apply: settings must begin at a multiple of 16 bytes"
        )
    arrays = params, grads, m, v
    fours = count_fours(*arrays)
    grid = -(-(params.size - 3 * fours) // BLOCK)
    _adamw_by_fours[grid, BLOCK](*arrays, settings, fours)


@shapes("N!, N, N!, N!", DEVICE, work="W!?")
def adamw_update(params, grads, m, v, settings, work=None):
    """Take one step of AdamW, in the order in which torch.optim.AdamW does.

    params, grads, m, v: a device's arrays, float32, flat, of one length;
    params, m and v change in place. m and v are the running means of the
    gradient and of its square, zero before the first step. settings: an
    AdamW; its decay applies to every element. work: a device's array of
    `adamw_scratch()` floats at a multiple of 16 bytes, or None to have one
    made. The settings are copied to the device, on its default stream: a CUDA
    graph cannot record that, only `adamw_apply`. Raises TypeError or
    ValueError for arrays that do not fit and settings out of range, before it
    launches anything.

    Derived in chapter 3.10.
    """
    factors = adamw_settings(settings)
    work = given_work("adamw_update", work, SETTINGS, params)
    there = work[:SETTINGS]
    there.copy_to_device(factors)
    adamw_apply(params, grads, m, v, there)


# the sum of squares
@device
def _four(array, i, vectors):
    """Four numbers from element i on; vectors: whether in one request."""
    if vectors:
        return load4(array, i)
    return array[i], array[i + 1], array[i + 2], array[i + 3]


@kernel(fastmath=False)
def _squares(grads, work, vectors):
    parts = cuda.shared.array(WARPS, np.float32)
    i, fours = cuda.grid(1), grads.size // 4
    s0 = s1 = s2 = s3 = ZERO
    for k in range(i, fours, cuda.gridsize(1)):
        a, b, c, d = _four(grads, 4 * k, vectors)
        s0, s1, s2, s3 = s0 + a * a, s1 + b * b, s2 + c * c, s3 + d * d
    total = (s0 + s1) + (s2 + s3)
    if 4 * fours + i < grads.size:
        a = grads[4 * fours + i]
        total += a * a
    total = block_sum(total, parts)
    if cuda.threadIdx.x == 0:
        work[1 + cuda.blockIdx.x] = total


# the sum of the blocks' sums
@kernel(fastmath=False)
def _root_of_sum(work, blocks):
    parts = cuda.shared.array(WARPS, np.float32)
    total = ZERO
    for k in range(cuda.threadIdx.x, blocks, BLOCK):
        total += work[1 + k]
    total = block_sum(total, parts)
    if cuda.threadIdx.x == 0:
        work[0] = math.sqrt(total)


# by how much to scale
@device
def _clip_factor(norm, max_norm):
    """The factor of (1.12.14); 1 where the norm is infinite or NaN."""
    if not norm <= LARGEST:
        return ONE
    length = norm + TINY
    return max_norm / length if length > max_norm else ONE


# scale
@kernel(fastmath=False)
def _shrink(grads, work, max_norm, fours):
    factor = _clip_factor(work[0], max_norm)
    if factor == ONE:
        return
    i = cuda.grid(1)
    if i < fours:
        a, b, c, d = load4(grads, 4 * i)
        a, b, c, d = a * factor, b * factor, c * factor, d * factor
        store4(grads, 4 * i, a, b, c, d)
    elif 3 * fours + i < grads.size:
        grads[3 * fours + i] *= factor


def shrink(grads, max_norm, work):
    """Scale a flat array whose norm is in work[0]; nothing waits."""
    fours, most = count_fours(grads), min(max_norm, float(LARGEST))
    grid = -(-(grads.size - 3 * fours) // BLOCK)
    _shrink[grid, BLOCK](grads, work, np.float32(most), fours)


# the norm and the clip, for a graph
def clip_scratch():
    """The number of floats that the norm and the clip want as `work`.

    Derived in chapter 3.10.
    """
    return 1 + NORM_BLOCKS


def _with_norm(layer, work, grads):
    """A layer's work, in whose first place the norm will be; nothing waits."""
    work = given_work(layer, work, clip_scratch(), grads)
    blocks = min(NORM_BLOCKS, max(1, -(-grads.size // (4 * BLOCK))))
    _squares[blocks, BLOCK](grads, work, int(aligned(grads)))
    _root_of_sum[1, BLOCK](work, blocks)
    return work


@shapes("N!, above 0, W!", DEVICE)
def clip_apply(grads, max_norm, work):
    """Clip a flat array to norm `max_norm`; leave its old norm in work[0].

    As `clip_gradients`, but it allocates nothing and does not wait: a CUDA
    graph may record it, with this `max_norm`.

    Derived in chapter 3.10.
    """
    shrink(grads, max_norm, _with_norm("clip_apply", work, grads))


# the norm and the clip, with an answer
@shapes("N, W!?", DEVICE)
def global_norm(grads, work=None):
    """The Euclidean norm of a flat array, as a float.

    The squares are summed in float32, in an order that the length alone
    decides: a norm above 1.8e19 comes out infinite, and a gradient below
    2.6e-23 counts as 0. work: a device's array of
    `clip_scratch()` floats, or None to have one made. Waits for the result.
    Raises TypeError or ValueError for arrays that do not fit.

    Derived in chapter 3.10.
    """
    work = _with_norm("global_norm", work, grads)
    return float(to_host(work[:1])[0])


@shapes("N!, above 0, W!?", DEVICE)
def clip_gradients(grads, max_norm, work=None):
    """Scale a flat array down to norm `max_norm` if it is longer.

    Returns the norm before clipping and scales `grads` in place by
    max_norm / (norm + 1e-6) where that is below 1, as torch's
    clip_grad_norm_. When the norm is infinite or NaN, `grads` is left as it
    is: the caller sees the norm and decides. work, and the norms that come
    out infinite: as for `global_norm`. Waits for the norm. Raises ValueError
    unless max_norm is positive, and as `global_norm` does.

    Derived in chapter 3.10.
    """
    work = _with_norm("clip_gradients", work, grads)
    shrink(grads, max_norm, work)
    return float(to_host(work[:1])[0])
