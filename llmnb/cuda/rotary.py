# Written by `make export` from notebooks/5_modern/02_rotary.py: edit that file.

"""Rotary positions on a GPU, forward and backward."""

__all__ = ["rotary_backward", "rotary_forward"]


# imports of the GPU module
import numpy as np

from llmnb.gpu.launch import DEVICE, kernel
from llmnb.gpu.simulator import cuda
from llmnb.reference.rotary import check_turn
from llmnb.shapes import shapes


# a thread a pair
BLOCK = 256  # threads of a block


@kernel(launch_bounds=BLOCK)
def _turn(x, table, heads, first, sign):
    T, hs = x.shape[1], table.shape[1]
    half = hs // 2
    n, pair = cuda.grid(1) // (heads * half), cuda.grid(1) % (heads * half)
    b, t, i = n // T, n % T, pair % half
    if b < x.shape[0]:
        at = pair // half * hs + i
        cos, sin = table[first + t, i], sign * table[first + t, half + i]
        old, other = x[b, t, at], x[b, t, at + half]
        x[b, t, at] = old * cos - other * sin
        x[b, t, at + half] = old * sin + other * cos


def _turn_pairs(layer, x, table, heads, first, sign):
    check_turn(layer, x, table, heads, first)
    heads, first = int(heads), int(first)
    pairs = x.shape[0] * x.shape[1] * heads * table.shape[1] // 2
    how = heads, first, np.float32(sign)
    _turn[-(-pairs // BLOCK), BLOCK](x, table, *how)


# rotary on a GPU
@shapes("B T W!, R hs", DEVICE)
def rotary_forward(x, table, heads, first=0):
    """Turn the first heads of each row by their position's angles, in place.

    x: (B, T, n hs), n heads of which the first `heads` turn; channel i of a
    head and channel i + hs / 2 are a pair. table: (R, hs), of `rope_table`;
    first: the position of the first row. Both float32 on a device and
    C-contiguous. Raises TypeError or ValueError before it launches anything.

    Derived in chapter 5.2.
    """
    _turn_pairs("rotary_forward", x, table, heads, first, 1)


@shapes("B T W!, R hs", DEVICE)
def rotary_backward(dx, table, heads, first=0):
    """Turn the gradients back, in place; arguments: as rotary_forward.

    Derived in chapter 5.2.
    """
    _turn_pairs("rotary_backward", dx, table, heads, first, -1)
