# Written by `make export` from notebooks/appendix/03_panels.py: edit that file.

"""Matrices packed in panels, and their products tile by tile."""

__all__ = [
    "DEPTH", "HEIGHT", "LENGTH", "ROOM", "SECOND", "SPARE", "TALL", "WIDTH",
    "WORK", "check_bf16", "scratch", "work_shape",
]


# imports of the panels
import functools
from typing import NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from llmnb.cpu.jit import MOST, inlined, routine
from llmnb.cpu.microkernel import (
    INT, LINE, Place, moved, multiply_tile, pack_across, pack_along, pack_one,
    steps_per_line,
)
from llmnb.cpu.tile import COLS, LANES, ROWS, VECTORS, data


# a block
class Block(NamedTuple):
    """A part of a matrix: where it begins, its two steps, and its size.

    row: from row to row; col: along the sum, of `depth` numbers.
    """

    at: int
    row: int
    col: int
    rows: int
    depth: int


@inlined
def _number(source, block, i, k):
    """A number of a block, 0 beyond its end."""
    if i < block.rows and k < block.depth:
        return source[block.at + i * block.row + k * block.col]
    return source.dtype.type(0)


# pack what is left over
@inlined
def _pack_rest(panels, to, source, block, lines, rows, depth, width):
    """Pack what vectors have not: they did `depth` steps of some rows."""
    per = steps_per_line(panels)
    for r in range(0, block.rows, width):
        done = min(width, max(0, rows - r))
        end = min(width, (block.rows - r + LANES - 1) // LANES * LANES)
        for k in range(depth if done == end else 0, block.depth, per):
            place = to + r * lines + k // per * width
            for i in range(done if k < depth else 0, end):
                low = high = _number(source, block, r + i, k)
                if per == 2:
                    high = _number(source, block, r + i, k + 1)
                pack_one(panels, place + i, low, high)


# pack squares
def _squares(count, width):
    """Of `count` rows, into panels of `width`."""

    @inlined
    def pack(panels, to, source, block, lines, rows, depth):
        (at, row, col, _, _), per = block, steps_per_line(panels)
        if col == 1:
            for r in range(rows[0], rows[1], count):
                p, q = to + (r - r % width) * lines + r % width, at + r * row
                for k in range(0, depth, LANES):
                    x = p + k // per * width
                    pack_across(panels, x, source, q + k, row, count, width)
        else:
            for k in range(0, depth, LANES):
                p, q = to + k // per * width, at + k * col
                for r in range(rows[0], rows[1], count):
                    x = p + (r - r % width) * lines + r % width
                    pack_along(panels, x, source, q + r, col, count, width)

    return pack


# pack a block
def _packing(width):
    whole, piece = _squares(width, width), _squares(LANES, width)
    wide = width > LANES

    @inlined
    def pack(panels, to, source, block):
        per, straight = steps_per_line(panels), 1 in (block.row, block.col)
        lines = (block.depth + per - 1) // per
        depth = block.depth // LANES * LANES if straight else 0
        rows = full = block.rows // width * width
        whole(panels, to, source, block, lines, (0, full), depth)
        if wide:
            rows = block.rows // LANES * LANES
            piece(panels, to, source, block, lines, (full, rows), depth)
        _pack_rest(panels, to, source, block, lines, rows, depth, width)

    return pack


_pack_rows, _pack_cols = _packing(ROWS), _packing(COLS)


# what a product works on
class Flat(NamedTuple):
    """The flat arrays of a product; spare: room for a tile and two rows.

    The first row of the two is zero, the second is for the bias.
    """

    out: np.ndarray
    start: np.ndarray
    bias: np.ndarray
    panels: np.ndarray
    spare: np.ndarray


# a tile
def _tiles_of(vectors):
    @inlined
    def tile(x, at, a, b, lines, chain, ask):
        out, start, bias, panels, spare = x
        place, apart, step = ask[:3]
        for k in range(0, lines, chain):
            n, p, q = min(chain, lines - k), a + k * ROWS, b + k * COLS
            ahead = (place, step) + ask[3:]
            multiply_tile(
                out, at, start, bias, panels, p, q, n, vectors, ahead
            )
            o, line, zeros = at.out, at.out_row, ROWS * COLS
            at, start, bias = Place(o, line, o, line, 1, zeros, 0), out, spare
            place += apart

    return tile


_whole, _pair, _narrow = _tiles_of(VECTORS), _tiles_of(2), _tiles_of(1)


@inlined
def _tile(x, at, a, b, lines, chain, ask, cols):
    """A tile; lines: of its panels; chain: lines of one sum.

    Of its vectors of columns only those that `cols` reaches are computed.
    ask: as _asked gives it; what follows is as in multiply_tile.
    """
    if cols > COLS - LANES:
        _whole(x, at, a, b, lines, chain, ask)
    else:
        done = 2 * LANES if VECTORS > 2 and cols > LANES else 0
        if done:
            _pair(x, at, a, b, lines, chain, ask)
        for j in range(done, cols, LANES):
            _narrow(x, moved(at, 0, j), a, b + j, lines, chain, ask)


# a tile at the edge
@inlined
def _edge_tile(x, at, a, b, lines, chain, ask, rows, cols):
    """A tile of which only some rows and columns exist."""
    out, start, bias, panels, spare = x
    shift = (ROWS + 1) * COLS
    for j in range(cols):
        spare[shift + j] = bias[at.bias + j * at.bias_col]
        for i in range(rows):
            spare[i * COLS + j] = start[moved(at, i, j).start]
    place = Place(0, COLS, 0, COLS, 1, shift, 1)
    flat = Flat(spare, spare, spare, panels, spare)
    _tile(flat, place, a, b, lines, chain, ask, cols)
    for i in range(rows):
        for j in range(cols):
            out[moved(at, i, j).out] = spare[i * COLS + j]


# what a tile asks for
class Ahead(NamedTuple):
    """What is packed next: an address, and two steps in bytes.

    row: from column to column; col: along the sum.
    """

    at: int
    row: int
    col: int


@inlined
def _asked(ahead, left, lines, chain, per, size):
    """Where a tile's first chain asks, how much further the next; the step.

    left: tiles that follow in the block. per: steps of a line. size: bytes
    of a number.
    """
    if ahead.col == size:
        chains = (lines + chain - 1) // chain
        first = ahead.at + left * chains * ahead.row
        return first, ahead.row, chains * per * size
    first, step = left // per * LINE, per * ahead.col
    if ahead.row == size and first < COLS * size:
        first += ahead.at + left % per * ahead.col
        return first, chain * step, step
    return ahead.at, 0, 0


# all tiles of a block
@inlined
def all_tiles(x, at, a, b, sizes, ahead, asked):
    """Compute a block, tile by tile.

    x: a Flat; at: a Place; a, b: where the panels begin. asked: a function
    for what each tile asks for.
    """
    rows, cols, steps, chain = sizes
    per = steps_per_line(x.panels)
    lines, chain = (steps + per - 1) // per, chain // per
    for j in range(0, cols, COLS):
        for i in range(0, rows, ROWS):
            here, p, q = moved(at, i, j), a + i * lines, b + j * lines
            m, n = min(ROWS, rows - i), min(COLS, cols - j)
            left = (rows - i - 1) // ROWS
            ask = asked(ahead, left, lines, chain, per, x.out.itemsize)
            if m == ROWS and n % LANES == 0:
                _tile(x, here, p, q, lines, chain, ask, n)
            else:
                _edge_tile(x, here, p, q, lines, chain, ask, m, n)


# three routines
ALL = 1 << 60  # the length of an array that is only an address


def _rows_routine(panels, to, source, block):
    _pack_rows(carray(panels, ALL), to, carray(source, ALL), block)


def _cols_routine(panels, to, source, block):
    _pack_cols(carray(panels, ALL), to, carray(source, ALL), block)


def _tiles_routine(out, start, bias, panels, spare, at, pair, sizes, ahead):
    out, start, bias = carray(out, ALL), carray(start, ALL), carray(bias, ALL)
    x = Flat(out, start, bias, carray(panels, ALL), carray(spare, ALL))
    all_tiles(x, at, pair[0], pair[1], sizes, ahead, _asked)


# their addresses
class Routines(NamedTuple):
    """The addresses of what packs rows, packs columns, and multiplies."""

    pack_rows: int
    pack_cols: int
    multiply: int


BLOCK = types.NamedUniTuple(INT, 5, Block)
PLACE = types.NamedUniTuple(INT, 7, Place)
PAIR, SIZES = types.UniTuple(INT, 2), types.UniTuple(INT, 4)
NEXT = types.NamedUniTuple(INT, 3, Ahead)
_compiled = []  # an address is good as long as its routine is kept


@functools.cache
def _routines(panel, number):
    """The Routines for two dtypes of NumPy, as a plain tuple."""
    p, x = (types.CPointer(numba.from_dtype(d)) for d in (panel, number))
    pack = types.void(p, INT, x, BLOCK)
    multiply = types.void(x, x, x, p, x, PLACE, PAIR, SIZES, NEXT)
    packers = routine(_rows_routine, pack), routine(_cols_routine, pack)
    made = *packers, routine(_tiles_routine, multiply)
    _compiled.extend(made)
    return tuple(one.address for one in made)


# jump to a routine
def _jump(context, builder, signature, args):
    """Call the address args[0] with the other arguments."""
    values = []
    for kind, value in zip(signature.args[1:], args[1:], strict=True):
        if isinstance(kind, types.Array):
            value = data(context, builder, kind, value)
        values.append(value)
    kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
    function = builder.inttoptr(args[0], kind.as_pointer())
    builder.call(function, values)
    return context.get_dummy_value()


# the routines, called from kernels
@intrinsic
def pack(typing, code, panels, to, source, block):
    """Pack a Block of a matrix into panels; code: a packing routine.

    For kernels. The panels begin at panels[to]. For a routine that packs
    columns, columns are meant where Block says rows.
    """
    return types.void(INT, panels, INT, source, BLOCK), _jump


@intrinsic
def _multiply(
    typing, code, out, start, bias, panels, spare, at, pair, sizes, ahead
):
    kinds = out, start, bias, panels, spare
    return types.void(INT, *kinds, PLACE, PAIR, SIZES, ahead), _jump


@inlined
def multiply_panels(code, x, at, pair, sizes, ahead):
    """Write a block: out = start + bias + the product of packed panels.

    For kernels. code: the multiplying routine. x: a Flat. at: a Place.
    pair: where the panels of both factors begin. sizes: rows, columns,
    steps, and how many of those are one chain of additions. ahead: an Ahead;
    with steps of 0 at an address that may be read, when nothing is next.
    """
    out, start, bias, panels, spare = x
    _multiply(code, out, start, bias, panels, spare, at, pair, sizes, ahead)


# the blocks
DEPTH = 384  # steps of the sum in a chain
LENGTH = 2 * DEPTH  # steps of the sum in a block
HEIGHT = 264 // ROWS * ROWS  # rows in a block
WIDTH = 768 // COLS * COLS  # columns in a block, where rows make several
SECOND = HEIGHT * LENGTH  # where the panels of columns begin
SPARE = SECOND + WIDTH * LENGTH  # where the spare tile begins
ROOM = SPARE + (ROWS + 2) * COLS  # where there is room for part of a gradient
TALL = 4 * HEIGHT  # its rows


def work_shape():
    """The shape of the scratch memory that the products pack into.

    A row for each thread that numba may use, of 6.4 MB in float32. The
    second half is written by `matmul_learn` alone, and otherwise takes none.

    Derived in chapter A.3.
    """
    return MOST, ROOM + TALL * WIDTH


WORK = "{} {}!?".format(*work_shape())  # as `shapes` reads it


# a block of rows
@inlined
def _ahead(b, at, row, col):
    """The Ahead of columns that begin somewhere in a flat array."""
    size = b.itemsize
    return Ahead(np.int64(b.ctypes.data) + at * size, row * size, col * size)


@inlined
def multiply_rows(code, x, at, rows, b, columns, apart, fresh):
    """Multiply a packed block of rows with columns, panel by panel.

    x: a Flat; at: a Place. columns: a Block of b. fresh: pack them too.
    """
    for c in range(0, columns.rows, COLS):
        m, p = min(COLS, columns.rows - c), columns.at + c * columns.row
        to, ahead = SECOND + c * apart, _ahead(b, p, 0, 0)
        if fresh:
            block = Block(p, columns.row, columns.col, m, columns.depth)
            pack(code.pack_cols, x.panels, to, b, block)
        if fresh and m < columns.rows - c:
            ahead = _ahead(b, p + COLS * columns.row, columns.row, columns.col)
        here, sizes = moved(at, 0, c), (rows, m, columns.depth, DEPTH)
        multiply_panels(code.multiply, x, here, (0, to), sizes, ahead)


# the scratch memory
def check_bf16(name, bf16, dtype):
    """Raise TypeError where products in dtype cannot be rounded.

    Derived in chapter A.3.
    """
    if bf16 and dtype != np.float32:
        raise TypeError(f"{name}: bf16 wants float32 arrays, got {dtype}")


def scratch(work, bf16, dtype):
    """What kernels need: Routines as a plain tuple, panels and work.

    The routines are compiled when they are not in the cache. work is
    allocated if it is None. panels is the same memory, for bf16 as uint32.

    Derived in chapter A.3.
    """
    if work is None:
        work = np.empty(work_shape(), dtype)
    panels = work.view(np.uint32) if bf16 else work
    return _routines(panels.dtype, work.dtype), panels, work
