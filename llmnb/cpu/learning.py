# Written by `make export` from notebooks/5_modern/11_inbackward.py: edit that file.

"""A weight that learns while its gradient is made."""

__all__ = ["matmul_learn"]


# imports of the compiled version
import functools
from typing import NamedTuple

import numba
import numpy as np
from numba import carray, types

from llmnb.cpu.adamw import learn
from llmnb.cpu.jit import arguments, inlined, routine, team
from llmnb.cpu.matmul import as_flat
from llmnb.cpu.microkernel import Place, moved, steps_per_line
from llmnb.cpu.panels import (
    ALL, DEPTH, HEIGHT, INT, LENGTH, PAIR, PLACE, ROOM, SECOND, SIZES, SPARE,
    TALL, WIDTH, WORK, Block, Flat, Routines, all_tiles, check_bf16,
    multiply_panels, pack, scratch,
)
from llmnb.cpu.tile import COLS, ROWS
from llmnb.reference.learning import check_aside
from llmnb.shapes import shapes


# what tiles ask for
class Rows(NamedTuple):
    """Rows of three arrays that will be read, by address and in bytes.

    at: where the first row begins in the first array; row: from row to row;
    count: of rows; wide: how much of each; second, third: how much further
    on the other arrays begin.
    """

    at: int
    row: int
    count: int
    wide: int
    second: int
    third: int


@inlined
def _asked(ahead, left, lines, chain, per, size):
    """A row for each tile, as long as there are rows; else as in A.3.

    With fewer lines than a row has cache lines, a part of the row.
    """
    second, third = ahead.second, ahead.third
    if left >= ahead.count:
        return ahead.at, 0, 0, second, third
    step = (ahead.wide + lines - 1) // lines
    return ahead.at + left * ahead.row, chain * step, step, second, third


def _tiles_routine(out, start, bias, panels, spare, at, pair, sizes, ahead):
    out, start, bias = carray(out, ALL), carray(start, ALL), carray(bias, ALL)
    x = Flat(out, start, bias, carray(panels, ALL), carray(spare, ALL))
    all_tiles(x, at, pair[0], pair[1], sizes, ahead, _asked)


@functools.cache
def _routine(panel, number):
    """The routine for two dtypes of NumPy, which has an address."""
    p, x = (types.CPointer(numba.from_dtype(d)) for d in (panel, number))
    rows = types.NamedUniTuple(INT, 6, Rows)
    kinds = x, x, x, p, x, PLACE, PAIR, SIZES, rows
    return routine(_tiles_routine, types.void(*kinds))


# a block of the gradient
@inlined
def _multiply_block(code, x, at, rows, b, columns, fresh, ahead):
    """As multiply_rows of A.3, where tiles ask for Rows, ahead.

    code: Routines, with that of _tiles_routine to multiply. fresh: whether
    to pack the columns too, a Block of b.
    """
    per, down = steps_per_line(x.panels), (rows + ROWS - 1) // ROWS
    lines = (columns.depth + per - 1) // per
    for c in range(0, columns.rows, COLS):
        m, to = min(COLS, columns.rows - c), SECOND + c * lines
        if fresh:
            p = columns.at + c * columns.row
            block = Block(p, columns.row, columns.col, m, columns.depth)
            pack(code.pack_cols, x.panels, to, b, block)
        here, sizes = moved(at, 0, c), (rows, m, columns.depth, DEPTH)
        first, row, count, wide, second, third = ahead
        # the tiles of the panels that follow ask for the first rows
        later = (columns.rows - c - 1) // COLS * down
        left = max(0, count - later)
        ask = Rows(first + later * row, row, left, wide, second, third)
        multiply_panels(code.multiply, x, here, (0, to), sizes, ask)


# and its learning
@inlined
def _learn_block(weights, others, factors, grads, at, block):
    """AdamW on a block; its gradient begins at grads[at].

    others: squares, aside and few. block: top, bottom, left and right.
    """
    (params, m, v), (squares, aside, few) = weights, others
    top, bottom, left, right = block
    for i in range(top, bottom):
        row = grads[at : at + right - left]
        at += WIDTH
        total = row.dtype.type(0)
        if aside.size and aside[i] >= 0:
            few[aside[i], left:right] = row
        else:
            mine = slice(left, right)
            arrays = params[i, mine], row, m[i, mine], v[i, mine]
            total = learn(*arrays, factors)
        squares[i] = total if left == 0 else squares[i] + total


@inlined
def _rows_of(weights, block):
    """The Rows of a block of the parameters and their averages."""
    (params, m, v), (top, bottom, left, right) = weights, block
    size, at = params.itemsize, np.int64(params.ctypes.data)
    row, first = size * params.shape[1], at + size * left
    further = np.int64(m.ctypes.data) - at, np.int64(v.ctypes.data) - at
    wide = size * (right - left)
    return Rows(first + top * row, row, bottom - top, wide, *further)


# a strip of rows
# rows that are made, and learn, at a time
SHORT = max(ROWS, HEIGHT // 3 // ROWS * ROWS)


@inlined
def _learn_strip(weights, others, factors, x, strip, steps, code, memory):
    """Make the gradient of a strip block by block, and learn from it.

    x: dout and inp, flat, and the length of their sums; steps: as in
    chapter 2.4. strip: as a block. memory: of one thread, panels, spare and
    room for a gradient.
    """
    (a, b, depth), (panels, spare, grads) = x, memory
    a_row, a_col, b_row, b_col = steps
    top, bottom, left, right = strip
    zeros = ROWS * COLS
    spare[zeros : zeros + COLS] = 0
    for k in range(0, depth, LENGTH):
        n, start = min(LENGTH, depth - k), grads if k > 0 else spare
        flat = Flat(grads, start, spare, panels, spare)
        p = left * b_col + k * b_row
        columns = Block(p, b_col, b_row, right - left, n)
        for i in range(top, bottom, SHORT):
            rows, p = min(SHORT, bottom - i), i * a_row + k * a_col
            block, ahead = (i, i + rows, left, right), (i, i, left, right)
            pack(code.pack_rows, panels, 0, a, Block(p, a_row, a_col, rows, n))
            o = (i - top) * WIDTH if depth > LENGTH else 0
            at = Place(o, WIDTH, zeros, 0, 0, zeros, 0)
            if k > 0:
                at = Place(o, WIDTH, o, WIDTH, 1, zeros, 0)
            if k + n == depth:
                ahead = block
            ask = _rows_of(weights, ahead)
            _multiply_block(code, flat, at, rows, b, columns, i == top, ask)
            if k + n == depth:
                _learn_block(weights, others, factors, grads, o, block)


# the kernel
@team
def _learn(part, parts, address):
    given = arguments(address)
    weights, others, factors, x = given[:3], given[3:6], given[6], given[7:10]
    rows, steps, code, panels, work = given[10:]
    cols = weights[0].shape[1]
    f = factors
    seven = f[0], f[1], f[2], f[3], f[4], f[5], f[6]
    memory = panels[part], work[part, SPARE:], work[part, ROOM:]
    down = -(-rows // (parts * ROWS)) * ROWS
    end = min(rows, (part + 1) * down)
    tall = TALL if x[2] > LENGTH else down
    for left in range(0, cols, WIDTH):
        right = min(left + WIDTH, cols)
        for top in range(part * down, end, tall):
            strip = top, min(top + tall, end), left, right
            _learn_strip(
                weights, others, seven, x, strip, steps, Routines(*code),
                memory,
            )  # fmt: skip


# a weight that learns, compiled
@shapes("OC C!, OC C!, OC C!, OC!, B T OC, B T C, 7", work=WORK)
def matmul_learn(
    weight, m, v, squares, dout, inp, factors, aside=None, few=None,
    work=None, bf16=False,
):  # fmt: skip
    """Take AdamW's step with a linear layer's gradient, dout.T @ inp.

    weight, m, v: (OC, C), change in place; m and v are AdamW's averages.
    dout: (B, T, OC). inp: (B, T, C). squares: (OC,), overwritten with the sum
    of the squares of each row of the gradient. factors: (7,), the Factors of
    the step. All float32 or all float64 and C-contiguous. aside: (OC,) of
    int32, or None: row i, if aside[i] is not -1, does not learn; its gradient
    goes to few[aside[i]], a row of (R, C), and its sum of squares is 0. work,
    bf16: as in matmul_forward. Raises TypeError or ValueError before it
    computes anything.

    Derived in chapter 5.11.
    """
    check_aside(weight, aside, few)
    check_bf16("matmul_learn", bf16, inp.dtype)
    (*packers, _), panels, work = scratch(work, bf16, inp.dtype)
    (OC, C), tokens = weight.shape, inp.shape[0] * inp.shape[1]
    if aside is None:
        aside, few = np.empty(0, np.int32), weight[:0]
    a, *a_steps = as_flat(dout.reshape(tokens, OC).T)
    b, *b_steps = as_flat(inp.reshape(tokens, C))
    code = *packers, _routine(panels.dtype, work.dtype).address
    others = squares, aside, few
    how = OC, (*a_steps, *b_steps), code, panels, work
    _learn(weight, m, v, *others, factors, a, b, tokens, *how)
