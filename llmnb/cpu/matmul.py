# Written by `make export` from notebooks/2_cpu/04_matmul.py: edit that file.

"""The linear layer, compiled for the processor's cores."""

__all__ = [
    "matmul_backward",
    "matmul_forward",
]


# imports of the CPU module
from typing import NamedTuple

import numba
import numpy as np

from llmnb.cpu.jit import arguments, device, team
from llmnb.cpu.microkernel import Place
from llmnb.cpu.panels import (
    DEPTH,
    HEIGHT,
    SPARE,
    WIDTH,
    WORK,
    Routines,
    Sizes,
    check_bf16,
    multiply_panels,
    pack,
    scratch,
)
from llmnb.cpu.tile import COLS, ROWS
from llmnb.shapes import shapes


# how the matrices lie
class Steps(NamedTuple):
    """From row to row and from column to column, in numbers of flat arrays.

    start_col and bias are 0 where there is nothing to start from, no bias.
    """

    out: int
    start_row: int
    start_col: int
    bias: int
    a_row: int
    a_col: int
    b_row: int
    b_col: int


# where a block begins
@device
def _place(i, j, first, steps):
    """The Place of the block at (i, j); first: of the blocks of its sum."""
    out, zeros = i * steps.out + j, ROWS * COLS
    if not first:
        return Place(out, steps.out, out, steps.out, 1, zeros, 0)
    start = i * steps.start_row + j * steps.start_col
    return Place(
        out,
        steps.out,
        start if steps.start_col else zeros,
        steps.start_row,
        steps.start_col,
        j if steps.bias else zeros,
        steps.bias,
    )


# a strip
@device
def _multiply_strip(x, strip, how, panels, spare):
    """x: out, start, bias, a and b; strip: top, bottom, left and right."""
    out, start, bias, a, b = x
    top, bottom, left, right = strip
    steps, depth, code = how
    second = HEIGHT * DEPTH  # where the panels of b begin
    spare[ROWS * COLS : (ROWS + 1) * COLS] = 0
    start = start if steps.start_col else spare
    bias = bias if steps.bias else spare
    for j in range(left, right, WIDTH):
        cols = min(WIDTH, right - j)
        for k in range(0, depth, DEPTH):
            n, row, col = min(DEPTH, depth - k), steps.b_col, steps.b_row
            p = j * row + k * col
            pack(code.pack_cols, panels, second, b, p, row, col, cols, n)
            first, shift = (start, bias) if k == 0 else (out, spare)
            for i in range(top, bottom, HEIGHT):
                rows = min(HEIGHT, bottom - i)
                row, col = steps.a_row, steps.a_col
                p = i * row + k * col
                pack(code.pack_rows, panels, 0, a, p, row, col, rows, n)
                at, sizes = _place(i, j, k == 0, steps), Sizes(rows, cols, n)
                multiply_panels(
                    code.multiply, out, at, first, shift,
                    panels, 0, second, sizes, spare,
                )  # fmt: skip


# the kernel of all three products
@team
def _multiply(part, parts, address):
    out, start, bias, a, b, sizes, steps, code, panels, work = arguments(
        address
    )
    rows, cols, depth = sizes
    down, across = rows, cols
    if rows > cols:
        down = -(-rows // (parts * ROWS)) * ROWS
    else:
        across = -(-cols // (parts * COLS)) * COLS
    i = part * down if down < rows else 0
    j = part * across if across < cols else 0
    if part == 0 or i + j > 0:
        strip = i, min(rows, i + down), j, min(cols, j + across)
        x, spare = (out, start, bias, a, b), work[part, SPARE:]
        how = Steps(*steps), depth, Routines(*code)
        _multiply_strip(x, strip, how, panels[part], spare)


# any product
def _flat(x):
    """A matrix, or the transpose of one, as a flat view and two steps."""
    row, col = (step // x.itemsize for step in x.strides)
    return (x if x.flags.c_contiguous else x.T).reshape(-1), row, col


def _product(out, a, b, start=None, bias=None, work=None, bf16=False):
    """out = start + bias + a @ b for matrices; the first two may be None."""
    made = scratch(work, bf16, out.dtype)
    sizes = *out.shape, a.shape[1]
    (a, *a_steps), (b, *b_steps), (out, out_row, _) = map(_flat, (a, b, out))
    start, *start_steps = (out, 0, 0) if start is None else _flat(start)
    steps = out_row, *start_steps, int(bias is not None), *a_steps, *b_steps
    bias = out if bias is None else bias
    _multiply(out, start, bias, a, b, sizes, steps, *made)


# add up the columns
STRIP = 512


@team
def _sum_columns(part, parts, address):
    dbias, dout, add = arguments(address)
    rows, OC = dout.shape
    for t in range(part, -(-OC // STRIP), parts):
        total = dbias[t * STRIP : (t + 1) * STRIP]
        if not add:
            total[:] = 0
        for n in range(rows):
            row = dout[n, t * STRIP : (t + 1) * STRIP]
            for j in range(total.size):
                total[j] += row[j]


# the linear layer, forward
@shapes("B T OC!, B T C, OC C, OC?, B T OC?~", work=WORK)
def matmul_forward(
    out, inp, weight, bias, residual=None, work=None, bf16=False
):
    """out = inp @ weight.T + bias + residual, in one pass.

    out, residual: (B, T, OC). inp: (B, T, C). weight: (OC, C). bias: (OC,).
    bias and residual may be None. All float32 or all float64 and
    C-contiguous; out is overwritten, and may be residual itself. work:
    scratch of work_shape() and the same dtype, or None to allocate it.
    bf16: round inp and weight to bfloat16, for float32 only. Raises
    TypeError or ValueError before it computes anything.

    Derived in chapter 2.4.
    """
    check_bf16("matmul_forward", bf16, inp.dtype)
    OC, C = weight.shape
    if residual is not None:
        residual = residual.reshape(-1, OC)
    rows, out = inp.reshape(-1, C), out.reshape(-1, OC)
    _product(out, rows, weight.T, residual, bias, work, bf16)


# the linear layer, backward
@shapes("B T C!, OC C!, OC!?, B T OC, B T C, OC C", work=WORK)
def matmul_backward(
    dinp, dweight, dbias, dout, inp, weight,
    add_dinp=True, add_dweight=True, work=None, bf16=False,
):  # fmt: skip
    """Add the linear layer's gradients to dinp, dweight and dbias.

    dinp, inp: (B, T, C). dout: (B, T, OC). dweight, weight: (OC, C).
    dbias: (OC,), or None for a layer without bias. All float32 or all
    float64 and C-contiguous. add_dinp, add_dweight: False overwrites dinp,
    or dweight and dbias, instead of adding. work, bf16: as in
    matmul_forward. Raises TypeError or ValueError before it computes
    anything.

    Derived in chapter 2.4.
    """
    check_bf16("matmul_backward", bf16, inp.dtype)
    rows, drows, dinp = (x.reshape(-1, x.shape[2]) for x in (inp, dout, dinp))
    start = dinp if add_dinp else None
    _product(dinp, drows, weight, start, None, work, bf16)
    start = dweight if add_dweight else None
    _product(dweight, drows.T, rows, start, None, work, bf16)
    if dbias is not None:
        _sum_columns(dbias, drows, add_dweight)
