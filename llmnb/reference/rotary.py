# Written by `make export` from notebooks/5_modern/02_rotary.py: edit that file.

"""Rotary positions in NumPy: tables, forward and backward."""

__all__ = [
    "rope_frequencies", "rope_table", "rotary_backward", "rotary_forward",
]


# imports
import math

import numpy as np

from llmnb.shapes import shapes


# the angles
def rope_frequencies(hs, theta, scaling=None):
    """The angle a position that each pair of channels turns by: float64.

    hs: the channels of a head, an even number. theta: the base. scaling:
    None; ("linear", factor), which divides all; or ("llama3", factor, low,
    high, length), which divides the slow ones and leaves the fast. Returns
    (hs / 2,). Raises ValueError for an odd hs, or another scaling.

    Derived in chapter 5.2.
    """
    if hs % 2:
        raise ValueError(f"rope: hs must be even, got {hs}")
    found = theta ** (-np.arange(0, hs, 2) / hs)
    if scaling is None:
        return found
    kind, factor, *rest = scaling
    if kind == "linear":
        return found / factor
    if kind != "llama3":
        raise ValueError(f"rope: scaling {kind!r} is none of linear, llama3")
    low, high, length = rest
    wave = 2 * math.pi / found
    t = np.clip((length / wave - low) / (high - low), 0, 1)
    return (1 - t) * found / factor + t * found


def rope_table(length, hs, theta, scaling=None):
    """Cosines and sines of all positions: (length, hs), float64.

    The first half of a row are the cosines of the pairs' angles, the second
    their sines. theta, scaling: as for `rope_frequencies`.

    Derived in chapter 5.2.
    """
    frequencies = rope_frequencies(hs, theta, scaling)
    angles = np.arange(length)[:, None] * frequencies
    return np.hstack([np.cos(angles), np.sin(angles)])


# how many heads turn
def check_turn(layer, x, table, heads, first):
    """Raise ValueError unless so many heads of x can turn by the table."""
    (_, T, width), hs = x.shape, table.shape[1]
    for name, n in (("heads", heads), ("first", first)):
        if not isinstance(n, (int, np.integer)):
            raise ValueError(f"{layer}: {name} must be an integer, got {n!r}")
    if not hs or hs % 2 or width % hs or not 1 <= heads <= width // hs:
        raise ValueError(
            f"{layer}: x must have shape (B, T, n hs), hs = {hs} even and "
            f"above 0, n at least heads = {heads}, got {x.shape}"
        )
    if not 0 <= first <= len(table) - T:
        raise ValueError(
            f"{layer}: positions {first} to {first + T - 1}, where the table "
            f"has {len(table)}"
        )


def _pairs(layer, x, table, heads, first):
    """Views of both halves of the heads that turn; cosines and sines."""
    check_turn(layer, x, table, heads, first)
    (B, T, width), hs = x.shape, table.shape[1]
    turning = x.reshape(B, T, width // hs, hs)[:, :, :heads]
    rows = table[int(first) :][:T, None]
    half = hs // 2
    return turning[..., :half], turning[..., half:], *np.split(rows, 2, -1)


# forward
@shapes("B T W!, R hs")
def rotary_forward(x, table, heads, first=0):
    """Turn the first heads of each row by their position's angles, in place.

    x: (B, T, n hs), n heads of which the first `heads` turn; channel i of a
    head and channel i + hs / 2 are a pair. table: (R, hs), of `rope_table`;
    first: the position of the first row. All of one float dtype.

    Derived in chapter 5.2.
    """
    a, b, cos, sin = _pairs("rotary_forward", x, table, heads, first)
    old = a.copy()
    a[...] = old * cos - b * sin
    b[...] = old * sin + b * cos


# backward
@shapes("B T W!, R hs")
def rotary_backward(dx, table, heads, first=0):
    """Turn the gradients back, in place; arguments: as rotary_forward.

    Derived in chapter 5.2.
    """
    a, b, cos, sin = _pairs("rotary_backward", dx, table, heads, first)
    old = a.copy()
    a[...] = old * cos + b * sin
    b[...] = b * cos - old * sin
