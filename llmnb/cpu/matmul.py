# Written by `make export` from notebooks/2_cpu/04_matmul.py: edit that file.

"""The linear layer, compiled for the processor's cores."""

__all__ = ["matmul_backward", "matmul_forward"]


# imports of the CPU module
from llmnb.cpu.jit import arguments, inlined, team
from llmnb.cpu.microkernel import Place, moved, steps_per_line
from llmnb.cpu.panels import (
    HEIGHT, LENGTH, SPARE, WIDTH, WORK, Block, Flat, Routines, check_bf16,
    multiply_rows, pack, scratch,
)
from llmnb.cpu.tile import COLS, ROWS
from llmnb.shapes import shapes


# a strip
@inlined
def _multiply_strip(x, strip, where, steps, depth, code, panels, spare):
    """x: out, start, bias, a and b; strip: top, bottom, left and right.

    steps: from row to row and from column to column, of a and then of b.
    """
    out, start, bias, a, b = x
    top, bottom, left, right = strip
    a_row, a_col, b_row, b_col = steps
    zeros, per = ROWS * COLS, steps_per_line(panels)
    spare[zeros : zeros + COLS] = 0
    first = start if where.col else spare
    shift = bias if where.bias_col else spare
    several = bottom - top > HEIGHT
    width = WIDTH if several else right - left
    for k in range(0, depth, LENGTH):
        n = min(LENGTH, depth - k)
        apart = (n + per - 1) // per if several else 0
        if k > 0:
            first, shift = out, spare
        flat = Flat(out, first, shift, panels, spare)
        for j in range(left, right, width):
            p, cols = j * b_col + k * b_row, min(width, right - j)
            columns = Block(p, b_col, b_row, cols, n)
            for i in range(top, bottom, HEIGHT):
                rows, p = min(HEIGHT, bottom - i), i * a_row + k * a_col
                block = Block(p, a_row, a_col, rows, n)
                pack(code.pack_rows, panels, 0, a, block)
                at = moved(where, i, j)
                if k > 0:
                    o, line = at.out, at.out_row
                    at = Place(o, line, o, line, 1, zeros, 0)
                multiply_rows(
                    code, flat, at, rows, b, columns, apart, i == top
                )


# the kernel of all three products
@team
def _multiply(part, parts, address):
    given = arguments(address)
    x, (sizes, where, steps, code, panels, work) = given[:5], given[5:]
    rows, cols, depth = sizes
    down = -(-rows // (parts * ROWS)) * ROWS
    across = -(-cols // (parts * COLS)) * COLS
    if (down * cols, cols) < (rows * across, rows):
        i, j, across = part * down, 0, cols
    else:
        i, j, down = 0, part * across, rows
    if i < rows and j < cols:  # else there are more threads than strips
        strip = i, min(rows, i + down), j, min(cols, j + across)
        _multiply_strip(
            x, strip, Place(*where), steps, depth, Routines(*code),
            panels[part], work[part, SPARE:],
        )  # fmt: skip


# any product
def as_flat(x):
    """A matrix, or the transpose of one, as a flat view and two steps."""
    row, col = (step // x.itemsize for step in x.strides)
    return (x if x.flags.c_contiguous else x.T).reshape(-1), row, col


def _product(out, a, b, start=None, bias=None, work=None, bf16=False):
    """out = start + bias + a @ b for matrices; the first two may be None."""
    if start is None and not a.shape[1]:  # no tokens, which no step has
        out[...] = 0
    made = scratch(work, bf16, out.dtype)
    sizes, zeros = (*out.shape, a.shape[1]), ROWS * COLS
    (a, *a_steps), (b, *b_steps) = map(as_flat, (a, b))
    out, line = out.reshape(-1), sizes[1]
    starts = (zeros, 0, 0) if start is None else (0, line, 1)
    shifts = (zeros, 0) if bias is None else (0, 1)
    start = out if start is None else start.reshape(-1)
    bias = out if bias is None else bias
    where, steps = (0, line, *starts, *shifts), (*a_steps, *b_steps)
    _multiply(out, start, bias, a, b, sizes, where, steps, *made)


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
    rows, out = inp.reshape(-1, C), out.reshape(-1, OC)
    _product(out, rows, weight.T, residual, bias, work, bf16)


# the linear layer, backward
@shapes("B T C!, OC C!?, OC!?, B T OC, B T C, OC C", work=WORK)
def matmul_backward(
    dinp, dweight, dbias, dout, inp, weight,
    add_dinp=True, add_dweight=True, work=None, bf16=False,
):  # fmt: skip
    """Add the linear layer's gradients to dinp, dweight and dbias.

    dinp, inp: (B, T, C). dout: (B, T, OC). dweight, weight: (OC, C); the
    first may be None for a weight that does not learn. dbias: (OC,), or
    None for a layer without bias. All float32 or all float64 and
    C-contiguous. add_dinp, add_dweight: False overwrites dinp, or dweight
    and dbias, instead of adding. work, bf16: as in matmul_forward. Raises
    TypeError or ValueError before it computes anything.

    Derived in chapter 2.4.
    """
    check_bf16("matmul_backward", bf16, inp.dtype)
    rows, drows, dinp = (x.reshape(-1, x.shape[2]) for x in (inp, dout, dinp))
    start = dinp if add_dinp else None
    _product(dinp, drows, weight, start, None, work, bf16)
    if dweight is not None:
        start = dweight if add_dweight else None
        _product(dweight, drows.T, rows, start, None, work, bf16)
    if dbias is not None:
        _sum_columns(dbias, drows, add_dweight)
