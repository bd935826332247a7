# Written by `make export` from notebooks/1_by_hand/12_adamw.py: edit that file.

"""AdamW and clipping on a GPU."""

__all__ = [
    "ADAMW_UPDATE",
    "adamw_apply",
    "adamw_scratch",
    "adamw_settings",
    "adamw_update",
    "clip_apply",
    "clip_gradients",
    "clip_scratch",
    "global_norm",
    "norm_apply",
]


# imports of the GPU's kernels
import math
from functools import partial

import numpy as np

from llmnb.cuda.elementwise import by_element, by_four
from llmnb.gpu.launch import (
    DEVICE,
    aligned,
    device,
    empty,
    kernel,
    numbered,
    to_host,
)
from llmnb.gpu.simulator import cuda, load4, store4
from llmnb.gpu.warp import block_sum
from llmnb.reference.adamw import ADAMW_LIMITS
from llmnb.shapes import shapes


# sizes
BLOCK = 256  # threads
WARPS = 8  # of them in a block
SETTINGS = 8  # numbers: seven of AdamW, and one to fill two vectors
NORM_BLOCKS = 1024  # blocks at most that sum squares
ZERO, ONE = np.float32(0), np.float32(1)
TINY = np.float32(1e-6)  # (1.12.14)
LARGEST = float(np.finfo(np.float32).max)
EXPONENT = np.int32(0x7F800000)  # the bits of a float32's exponent


# the settings
def adamw_scratch():
    """The number of floats that `adamw_update` wants as `work`.

    Derived in chapter 1.12.
    """
    return SETTINGS


@shapes("-", DEVICE, **ADAMW_LIMITS)
def adamw_settings(
    learning_rate, beta1, beta2, eps, weight_decay, step
):  # fmt: skip
    """What AdamW's kernel wants to know of a step, as a float32 array.

    It is computed in float64 and rounded at the end. Copy it to the device
    for `adamw_apply`. Raises ValueError for settings out of range.

    Derived in chapter 1.12.
    """
    keep = 1 - learning_rate * weight_decay
    root = math.sqrt(1 - beta2**step)
    size = learning_rate / (1 - beta1**step)
    numbers = keep, 1 - beta1, beta2, 1 - beta2, root, eps, size, 0
    return np.array(numbers, np.float32)


# AdamW of one element
@device
def _adamw(p, g, m, v, settings):
    keep, rate1, beta2, rate2, root, eps, size = settings
    m += rate1 * (g - m)
    v = beta2 * v + rate2 * g * g
    spread = math.sqrt(v) / root + eps
    return keep * p - size * m / spread, m, v


@device
def _adamw_at(i, params, grads, m, v, settings):
    p, m1, v1 = _adamw(params[i], grads[i], m[i], v[i], settings)
    params[i], m[i], v[i] = p, m1, v1


# version 1
@kernel
def _adamw_elements(params, grads, m, v, settings):
    i = cuda.grid(1)
    if i < params.size:
        keep, rate1, beta2 = settings[0], settings[1], settings[2]
        rate2, root, eps = settings[3], settings[4], settings[5]
        numbers = keep, rate1, beta2, rate2, root, eps, settings[6]
        _adamw_at(i, params, grads, m, v, numbers)


# version 2
@kernel
def _adamw_fours(params, grads, m, v, settings):
    i, fours = cuda.grid(1), params.size // 4
    rest = 3 * fours + i
    if i >= fours and rest >= params.size:
        return
    keep, rate1, beta2, rate2 = load4(settings, 0)
    root, eps, size, _ = load4(settings, 4)
    numbers = keep, rate1, beta2, rate2, root, eps, size
    if i >= fours:
        _adamw_at(rest, params, grads, m, v, numbers)
        return
    p0, p1, p2, p3 = load4(params, 4 * i)
    g0, g1, g2, g3 = load4(grads, 4 * i)
    m0, m1, m2, m3 = load4(m, 4 * i)
    v0, v1, v2, v3 = load4(v, 4 * i)
    p0, m0, v0 = _adamw(p0, g0, m0, v0, numbers)
    p1, m1, v1 = _adamw(p1, g1, m1, v1, numbers)
    p2, m2, v2 = _adamw(p2, g2, m2, v2, numbers)
    p3, m3, v3 = _adamw(p3, g3, m3, v3, numbers)
    store4(params, 4 * i, p0, p1, p2, p3)
    store4(m, 4 * i, m0, m1, m2, m3)
    store4(v, 4 * i, v0, v1, v2, v3)


# check the scratch
def _check_work(name, work, size):
    """Raise ValueError unless `work` is at least that long."""
    if work.size < size:
        raise ValueError(
            f"{name}: work must have shape ({size},), got {work.shape}"
        )


# AdamW on arrays
# one element a thread; four neighbours a thread
ADAMW_UPDATE = (
    partial(by_element, _adamw_elements),
    partial(by_four, _adamw_fours, _adamw_elements),
)


@shapes(f"N!, N, N!, N!, {SETTINGS}", DEVICE)
def adamw_apply(params, grads, m, v, settings, version=2):
    """Take one step of AdamW with settings that are on the device.

    params, grads, m, v: a device's arrays, float32, flat, of one length.
    settings: what `adamw_settings` computed, on the device. Allocates
    nothing and does not wait: a CUDA graph may record it, and new settings
    may be copied into the array before the graph is launched again.
    version: which kernel, from 1 on. Raises TypeError or ValueError for
    arrays that do not fit.

    Derived in chapter 1.12.
    """
    run = numbered(ADAMW_UPDATE, version, "adamw_update")
    run((params, grads, m, v, settings))


# AdamW
@shapes("N!, N, N!, N!", DEVICE, work="W!?", **ADAMW_LIMITS)
def adamw_update(
    params, grads, m, v,
    learning_rate, beta1, beta2, eps, weight_decay, step,
    work=None, version=2,
):  # fmt: skip
    """Take one step of AdamW, in the order in which torch.optim.AdamW does.

    params, grads, m, v: a device's arrays, float32, flat, of one length;
    params, m and v change in place. m and v are the running means of the
    gradient and of its square, zero before the first step. step counts from
    1. weight_decay applies to every element. work: a device's array of
    `adamw_scratch()` floats, or None to have one made. version: which
    kernel, from 1 on. The settings are copied to the device, on its default
    stream: a CUDA graph cannot record that, only `adamw_apply`. Raises
    TypeError or ValueError for arrays that do not fit and settings out of
    range, before it launches anything.

    Derived in chapter 1.12.
    """
    numbers = adamw_settings(
        learning_rate, beta1, beta2, eps, weight_decay, step
    )
    if work is None:
        work = empty(SETTINGS, like=params)
    _check_work("adamw_update", work, SETTINGS)
    settings = work[:SETTINGS]
    settings.copy_to_device(numbers)
    adamw_apply(params, grads, m, v, settings, version)


# the sum of squares
@kernel(fastmath=False)
def _squares(grads, work, vectors):
    parts = cuda.shared.array(WARPS, np.float32)
    i, fours = cuda.grid(1), grads.size // 4
    s0 = s1 = s2 = s3 = ZERO
    for k in range(i, fours, cuda.gridsize(1)):
        if vectors:
            a, b, c, d = load4(grads, 4 * k)
        else:
            a, b = grads[4 * k], grads[4 * k + 1]
            c, d = grads[4 * k + 2], grads[4 * k + 3]
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
def _clip_factor(norm, bits, max_norm):
    """The factor of (1.12.14); 1 where the bits are NaN's or infinity's."""
    if bits & EXPONENT == EXPONENT:
        return ONE
    length = norm + TINY
    return max_norm / length if length > max_norm else ONE


# scale
@kernel(fastmath=False)
def _shrink_fours(grads, work, bits, max_norm):
    factor = _clip_factor(work[0], bits[0], max_norm)
    if factor == ONE:
        return
    i, fours = cuda.grid(1), grads.size // 4
    if i < fours:
        a, b, c, d = load4(grads, 4 * i)
        store4(grads, 4 * i, a * factor, b * factor, c * factor, d * factor)
    elif 3 * fours + i < grads.size:
        grads[3 * fours + i] *= factor


@kernel(fastmath=False)
def _shrink_elements(grads, work, bits, max_norm):
    i, factor = cuda.grid(1), _clip_factor(work[0], bits[0], max_norm)
    if factor < ONE and i < grads.size:
        grads[i] *= factor


# the norm, for a graph
def clip_scratch():
    """The number of floats that the norm and the clip want as `work`.

    Derived in chapter 1.12.
    """
    return 1 + NORM_BLOCKS


@shapes("W!, N", DEVICE)
def norm_apply(work, grads):
    """Leave the Euclidean norm of a flat array in work[0].

    work: a device's array of `clip_scratch()` floats; grads: flat, float32.
    The squares are summed in float32: a norm above 1.8e19 comes out
    infinite, and a gradient below 2.6e-23 counts as 0. Allocates nothing
    and does not wait: a CUDA graph may record it. Raises TypeError or
    ValueError for arrays that do not fit.

    Derived in chapter 1.12.
    """
    _check_work("global_norm", work, clip_scratch())
    blocks = (grads.size + 4 * BLOCK - 1) // (4 * BLOCK)
    blocks = min(NORM_BLOCKS, max(1, blocks))
    _squares[blocks, BLOCK](grads, work, int(aligned(grads)))
    _root_of_sum[1, BLOCK](work, blocks)


# the clip, for a graph
@shapes("N!, above 0, W!", DEVICE)
def clip_apply(grads, max_norm, work):
    """Clip a flat array to norm `max_norm`; leave its old norm in work[0].

    As `clip_gradients`, but it allocates nothing and does not wait: a CUDA
    graph may record it, with this `max_norm`. The old norm is that of
    `norm_apply`.

    Derived in chapter 1.12.
    """
    norm_apply(work, grads)
    arrays = grads, work, work[:1].view(np.int32)
    most = np.float32(min(max_norm, LARGEST))
    by_four(_shrink_fours, _shrink_elements, arrays, most)


# the norm of all gradients
@shapes("N, W!?", DEVICE)
def global_norm(grads, work=None):
    """The Euclidean norm of a flat array, as a float.

    The squares are summed in float32, in an order that the length alone
    decides: a norm above 1.8e19 comes out infinite, and a gradient below
    2.6e-23 counts as 0. work: a device's array of
    `clip_scratch()` floats, or None to have one made. Waits for the result.
    Raises TypeError or ValueError for arrays that do not fit.

    Derived in chapter 1.12.
    """
    if work is None:
        work = empty(clip_scratch(), like=grads)
    norm_apply(work, grads)
    return float(to_host(work[:1])[0])


# clip the gradients
@shapes("N!, above 0, W!?", DEVICE)
def clip_gradients(grads, max_norm, work=None):
    """Scale a flat array down to norm `max_norm` if it is longer.

    Returns the norm before clipping and scales `grads` in place by
    max_norm / (norm + 1e-6) where that is below 1, as torch's
    clip_grad_norm_. When the norm is infinite or NaN, `grads` is left as it
    is: the caller sees the norm and decides. It is infinite already above
    1.8e19, where the sum of squares exceeds float32. work: a device's array of
    `clip_scratch()` floats, or None to have one made. Waits for the norm.
    Raises ValueError unless max_norm is positive, and as `global_norm` does.

    Derived in chapter 1.12.
    """
    if work is None:
        work = empty(clip_scratch(), like=grads)
    clip_apply(grads, max_norm, work)
    return float(to_host(work[:1])[0])
