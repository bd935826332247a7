# Written by `make export` from notebooks/1_by_hand/07_matmul.py: edit that file.

"""Matrices packed in panels, and their products tile by tile."""

__all__ = [
    "DEPTH",
    "HEIGHT",
    "SPARE",
    "WIDTH",
    "WORK",
    "check_bf16",
    "scratch",
    "work_shape",
]


# imports of the panels
import functools

import numba
import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from llmnb.cpu.jit import device, routine
from llmnb.cpu.tile import (
    COLS,
    LANES,
    ROWS,
    multiply_tile,
    pack_across,
    pack_along,
    pack_one,
    steps_per_line,
)


# pack what is left over
@device
def _pack_rest(panels, to, source, at, row, col, rows, depth, first, width):
    per = steps_per_line(panels)
    lines = (depth + per - 1) // per
    for r in range(0, rows, width):
        for k in range(first if r + width <= rows else 0, depth, per):
            for i in range(width):
                low = high = source.dtype.type(0)
                if r + i < rows:
                    low = source[at + (r + i) * row + k * col]
                    if per == 2 and k + 1 < depth:
                        high = source[at + (r + i) * row + (k + 1) * col]
                pack_one(
                    panels, to + r * lines + k // per * width + i, low, high
                )


# pack a block
def _packing(width):
    @device
    def pack(panels, to, source, at, row, col, rows, depth):
        per = steps_per_line(panels)
        lines = (depth + per - 1) // per
        whole, body = rows - rows % width, depth - depth % LANES
        if col == 1:
            for r in range(0, whole, width):
                for k in range(0, body, LANES):
                    p = to + r * lines + k // per * width
                    q = at + r * row + k
                    pack_across(panels, p, source, q, row, width)
        elif row == 1:
            for k in range(0, body, LANES):
                for r in range(0, whole, width):
                    p = to + r * lines + k // per * width
                    q = at + r + k * col
                    pack_along(panels, p, source, q, col, width)
        else:
            body = 0
        args = source, at, row, col, rows, depth
        _pack_rest(panels, to, *args, body, width)

    return pack


_pack_rows, _pack_cols = _packing(ROWS), _packing(COLS)


# a tile at the edge
@device
def _edge_tile(out, at, start, bias, panels, a, b, lines, spare, rows, cols):
    shift = (ROWS + 1) * COLS
    for j in range(cols):
        spare[shift + j] = bias[at[5] + j * at[6]]
        for i in range(rows):
            spare[i * COLS + j] = start[at[2] + i * at[3] + j * at[4]]
    place = 0, COLS, 0, COLS, 1, shift, 1
    multiply_tile(spare, place, spare, spare, panels, a, b, lines)
    for i in range(rows):
        for j in range(cols):
            out[at[0] + i * at[1] + j] = spare[i * COLS + j]


# all tiles of a block
@device
def _multiply_panels(out, at, start, bias, panels, a, b, sizes, spare):
    rows, cols, depth = sizes
    o, out_row, s, row, col, c, bias_col = at
    per = steps_per_line(panels)
    lines = (depth + per - 1) // per
    for j in range(0, cols, COLS):
        for i in range(0, rows, ROWS):
            place = (
                *(o + i * out_row + j, out_row),
                *(s + i * row + j * col, row, col),
                *(c + j * bias_col, bias_col),
            )
            p, q = a + i * lines, b + j * lines
            m, n = min(ROWS, rows - i), min(COLS, cols - j)
            if m == ROWS and n == COLS:
                multiply_tile(out, place, start, bias, panels, p, q, lines)
            else:
                tile = spare, m, n
                _edge_tile(out, place, start, bias, panels, p, q, lines, *tile)


# three routines
ALL = 1 << 60  # the length of an array that is only an address


def _rows_routine(panels, to, source, at, row, col, rows, depth):
    panels, source = carray(panels, ALL), carray(source, ALL)
    _pack_rows(panels, to, source, at, row, col, rows, depth)


def _cols_routine(panels, to, source, at, row, col, rows, depth):
    panels, source = carray(panels, ALL), carray(source, ALL)
    _pack_cols(panels, to, source, at, row, col, rows, depth)


def _multiply_routine(
    out,
    o,
    out_row,
    s,
    row,
    col,
    c,
    bias_col,
    start,
    bias,
    panels,
    a,
    b,
    rows,
    cols,
    depth,
    spare,
):
    at, sizes = (o, out_row, s, row, col, c, bias_col), (rows, cols, depth)
    out, start, bias, panels, spare = (
        carray(out, ALL),
        carray(start, ALL),
        carray(bias, ALL),
        carray(panels, ALL),
        carray(spare, ALL),
    )
    _multiply_panels(out, at, start, bias, panels, a, b, sizes, spare)


# their addresses
_compiled = []  # an address is good as long as its routine is kept


@functools.cache
def _addresses(panel, number):
    """The addresses of the three routines for two dtypes of NumPy."""
    kinds = (types.CPointer(numba.from_dtype(d)) for d in (panel, number))
    p, x, n = *kinds, types.int64
    pack = types.void(p, n, x, *[n] * 5)
    multiply = types.void(x, *[n] * 7, x, x, p, *[n] * 5, x)
    made = (
        routine(_rows_routine, pack),
        routine(_cols_routine, pack),
        routine(_multiply_routine, multiply),
    )
    _compiled.extend(made)
    return tuple(one.address for one in made)


# jump to a routine
def _jump(context, builder, signature, args):
    """Call the address args[0] with the other arguments, arrays by address,
    tuples number by number."""
    values = []
    for kind, value in zip(signature.args[1:], args[1:], strict=True):
        if isinstance(kind, types.Array):
            make = cgutils.create_struct_proxy(kind)
            values.append(make(context, builder, value=value).data)
        elif isinstance(kind, types.BaseTuple):
            values += cgutils.unpack_tuple(builder, value)
        else:
            values.append(value)
    kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
    function = builder.inttoptr(args[0], kind.as_pointer())
    builder.call(function, values)
    return context.get_dummy_value()


# the routines, called from kernels
@intrinsic
def pack(typing, code, panels, to, source, at, row, col, rows, depth):
    """Pack a block of a matrix into panels; code: a packing routine.

    For kernels. The block begins at source[at] and has `rows` rows of
    `depth` numbers, row and col apart; for a routine that packs columns,
    columns are meant where it says rows. The panels begin at panels[to].
    """
    n = types.int64
    return types.void(n, panels, n, source, n, n, n, n, n), _jump


@intrinsic
def multiply_panels(
    typing, code, out, at, start, bias, panels, a, b, sizes, spare
):
    """Write a block: out = start + bias + the product of packed panels.

    For kernels. code: the multiplying routine. Arguments as for
    multiply_tile; sizes: rows, columns and steps of the block. spare: room
    for a tile, a row of zeros, and one for the bias.
    """
    n, seven, three = (
        types.int64,
        *(types.UniTuple(types.int64, k) for k in (7, 3)),
    )
    return types.void(
        n, out, seven, start, bias, panels, n, n, three, spare
    ), _jump


# the blocks
DEPTH = 384  # steps of the sum in a block
HEIGHT = 144 // ROWS * ROWS  # rows in a block
WIDTH = 768 // COLS * COLS  # columns in a block
SPARE = (HEIGHT + WIDTH) * DEPTH  # where the spare tile begins


def work_shape():
    """The shape of the scratch memory that the products pack into.

    A row for each thread that numba may use, of 1.4 MB in float32.

    Derived in chapter 1.7.
    """
    return numba.config.NUMBA_NUM_THREADS, SPARE + (ROWS + 2) * COLS


WORK = "{} {}!?".format(*work_shape())  # as `shapes` reads it


# the scratch memory
def check_bf16(name, bf16, dtype):
    """Raise TypeError where products in dtype cannot be rounded.

    Derived in chapter 1.7.
    """
    if bf16 and dtype != np.float32:
        raise TypeError(f"{name}: bf16 wants float32 arrays, got {dtype}")


def scratch(work, bf16, dtype):
    """What kernels need: three addresses, panels and work.

    The addresses are those of the routines that pack rows, pack columns
    and multiply; they are compiled when they are not in the cache. work is
    allocated if it is None. panels is the same memory, for bf16 as uint32.

    Derived in chapter 1.7.
    """
    if work is None:
        work = np.empty(work_shape(), dtype)
    panels = work.view(np.uint32) if bf16 else work
    return _addresses(panels.dtype, work.dtype), panels, work
