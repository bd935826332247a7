# Written by `make export` from notebooks/3_gpu/10_adamw.py: edit that file.

"""A plainer AdamW on a GPU, to be timed."""

__all__ = ["ADAMW_APPLY", "adamw_by_elements"]


# imports of a thread an element
import math

from llmnb.gpu.launch import kernel
from llmnb.gpu.simulator import cuda


# a thread an element
@kernel
def _adamw_by_elements(params, grads, m, v, settings):
    i = cuda.grid(1)
    if i < params.size:
        keep, new1, beta2 = settings[0], settings[1], settings[2]
        new2, root, eps = settings[3], settings[4], settings[5]
        g, mean = grads[i], m[i]
        mean += new1 * (g - mean)
        square = beta2 * v[i] + new2 * g * g
        spread = math.sqrt(square) / root + eps
        params[i] = keep * params[i] - settings[6] * mean / spread
        m[i], v[i] = mean, square


def adamw_by_elements(params, grads, m, v, settings):
    """A step of AdamW, a thread an element; nothing is checked.

    Derived in chapter 3.10.
    """
    grid = -(-params.size // 256)
    _adamw_by_elements[grid, 256](params, grads, m, v, settings)


# plainest first; the layer itself comes after them
ADAMW_APPLY = (adamw_by_elements,)
