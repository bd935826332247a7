# Written by `make export` from notebooks/appendix/14_heads.py: edit that file.

"""Soft caps of scores and logits on a GPU."""

__all__ = ["capped_crossentropy_backward", "softcap_forward"]


# imports of the GPU's caps
import functools
import math

import numpy as np

from llmnb.cuda.elementwise import elementwise
from llmnb.cuda.local import soft_tanh
from llmnb.gpu.launch import DEVICE, device, kernel
from llmnb.gpu.simulator import cuda
from llmnb.shapes import shapes


# the kernels of the caps on a GPU
ZERO, ONE = np.float32(0), np.float32(1)


@functools.cache
def _capping(softcap):
    CAP = np.float32(softcap)

    @device
    def capped(x):
        return CAP * soft_tanh(x / CAP)

    return elementwise(capped, 1)


@kernel(launch_bounds=256)
def _capped_slopes(dlogits, dlosses, logits, lse, targets, V, cap):
    """A block a row."""
    row = cuda.blockIdx.x
    target, shift, scale = targets[row], lse[row], dlosses[row]
    for i in range(cuda.threadIdx.x, logits.shape[1], cuda.blockDim.x):
        slope = ZERO
        if i < V:
            x = logits[row, i]
            t, y = x / cap, ONE if i == target else ZERO
            slope = scale * (math.exp(x - shift) - y) * (ONE - t * t)
        dlogits[row, i] = slope


# soft caps on a GPU
@shapes("B T Vp!", DEVICE, softcap="above 0")
def softcap_forward(x, softcap):
    """Turn each logit x into c tanh(x / c), in place; softcap: c.

    x: (B, T, Vp), float32 on a device and C-contiguous. A kernel is compiled
    for each c. Raises TypeError or ValueError before it launches anything.

    Derived in chapter A.14.
    """
    flat = x.reshape(-1)
    _capping(float(softcap))(flat, flat)


@shapes(
    "B T Vp!, B T, B T Vp~, B T, B T of V, 1 to Vp", DEVICE,
    softcap="above 0",
)  # fmt: skip
def capped_crossentropy_backward(
    dlogits, dlosses, logits, lse, targets, V, softcap
):
    """Write the gradient of the losses by the logits before their cap.

    dlogits: (B, T, Vp), overwritten; it may be `logits` itself, which then
    is lost. logits: after the cap. dlosses, lse: (B, T), lse from the
    forward pass. targets: int32 (B, T), each in [0, V). Columns from V on
    receive 0. All on a device, float32 but for the targets. Raises
    TypeError or ValueError before it launches anything.

    Derived in chapter A.14.
    """
    arrays, rows = (dlogits, dlosses, logits, lse, targets), lse.size
    flat = [x.reshape(rows, *tuple(x.shape)[2:]) for x in arrays]
    _capped_slopes[rows, 256](*flat, V, np.float32(softcap))
