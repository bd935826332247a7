# Written by `make export` from notebooks/5_modern/02_rotary.py: edit that file.

"""Rotary positions, compiled for the processor's cores."""

__all__ = ["rotary_backward", "rotary_forward"]


# imports of the CPU module
from llmnb.cpu.jit import arguments, share, team
from llmnb.reference.rotary import check_turn
from llmnb.shapes import shapes


# the kernel
@team
def _turn(part, parts, address):
    x, table, heads, first, T, back = arguments(address)
    rows, half = x.shape[0], table.shape[1] // 2
    mine = share(rows, part, parts)
    sign = x.dtype.type(-1 if back else 1)
    for n in range(mine.start, mine.stop):
        angles = table[first + n % T]
        for h in range(heads):
            a, b = x[n, h, :half], x[n, h, half:]
            for i in range(half):
                cos, sin = angles[i], sign * angles[half + i]
                old = a[i]
                a[i] = old * cos - b[i] * sin
                b[i] = old * sin + b[i] * cos


def _turn_rows(layer, x, table, heads, first, back):
    check_turn(layer, x, table, heads, first)
    (B, T, width), hs = x.shape, table.shape[1]
    rows = x.reshape(B * T, width // hs, hs)
    _turn(rows, table, int(heads), int(first), T, back)


# rotary, compiled
@shapes("B T W!, R hs")
def rotary_forward(x, table, heads, first=0):
    """Turn the first heads of each row by their position's angles, in place.

    x: (B, T, n hs), n heads of which the first `heads` turn; channel i of a
    head and channel i + hs / 2 are a pair. table: (R, hs), of `rope_table`;
    first: the position of the first row. Both float32 or both float64 and
    C-contiguous. Raises TypeError or ValueError before it turns any.

    Derived in chapter 5.2.
    """
    _turn_rows("rotary_forward", x, table, heads, first, False)


@shapes("B T W!, R hs")
def rotary_backward(dx, table, heads, first=0):
    """Turn the gradients back, in place; arguments: as rotary_forward.

    Derived in chapter 5.2.
    """
    _turn_rows("rotary_backward", dx, table, heads, first, True)
