# Written by `make export` from notebooks/1_by_hand/07_matmul.py: edit that file.

"""The linear layer, compiled for the processor's cores."""

__all__ = [
    "matmul_backward",
    "matmul_forward",
]


# imports of the CPU module
import numba
import numpy as np

from llmnb.cpu.jit import arguments, device, team
from llmnb.cpu.panels import (
    DEPTH,
    HEIGHT,
    SPARE,
    WIDTH,
    WORK,
    check_bf16,
    multiply_panels,
    pack,
    scratch,
)
from llmnb.cpu.tile import COLS, ROWS
from llmnb.shapes import shapes


# a strip
@device
def _multiply_strip(out, start, bias, a, b, strip, steps, code, panels, spare):
    i0, i1, j0, j1, depth = strip
    out_row, row, col, bias_col, a_row, a_col, b_row, b_col = steps
    zeros, right = ROWS * COLS, HEIGHT * DEPTH
    spare[zeros : zeros + COLS] = 0
    start, bias = start if col else spare, bias if bias_col else spare
    for j in range(j0, j1, WIDTH):
        cols = min(WIDTH, j1 - j)
        for k in range(0, depth, DEPTH):
            n = min(DEPTH, depth - k)
            p = j * b_col + k * b_row
            pack(code[1], panels, right, b, p, b_col, b_row, cols, n)
            for i in range(i0, i1, HEIGHT):
                rows = min(HEIGHT, i1 - i)
                p = i * a_row + k * a_col
                pack(code[0], panels, 0, a, p, a_row, a_col, rows, n)
                o = i * out_row + j
                at = o, out_row, o, out_row, 1, zeros, 0
                first, shift = out, spare  # go on from the sums so far
                if k == 0:
                    s = i * row + j * col if col else zeros
                    c = j if bias_col else zeros
                    at = o, out_row, s, row, col, c, bias_col
                    first, shift = start, bias
                sizes = rows, cols, n
                multiply_panels(
                    *(code[2], out, at, first, shift),
                    *(panels, 0, right, sizes, spare),
                )


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
        strip = i, min(rows, i + down), j, min(cols, j + across), depth
        _multiply_strip(
            *(out, start, bias, a, b, strip, steps),
            *(code, panels[part], work[part, SPARE:]),
        )


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

    Derived in chapter 1.7.
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
    dinp,
    dweight,
    dbias,
    dout,
    inp,
    weight,
    add_dinp=True,
    add_dweight=True,
    work=None,
    bf16=False,
):
    """Add the linear layer's gradients to dinp, dweight and dbias.

    dinp, inp: (B, T, C). dout: (B, T, OC). dweight, weight: (OC, C).
    dbias: (OC,), or None for a layer without bias. All float32 or all
    float64 and C-contiguous. add_dinp, add_dweight: False overwrites dinp,
    or dweight and dbias, instead of adding. work, bf16: as in
    matmul_forward. Raises TypeError or ValueError before it computes
    anything.

    Derived in chapter 1.7.
    """
    check_bf16("matmul_backward", bf16, inp.dtype)
    rows, drows, dinp = (x.reshape(-1, x.shape[2]) for x in (inp, dout, dinp))
    start = dinp if add_dinp else None
    _product(dinp, drows, weight, start, None, work, bf16)
    start = dweight if add_dweight else None
    _product(dweight, drows.T, rows, start, None, work, bf16)
    if dbias is not None:
        _sum_columns(dbias, drows, add_dweight)
