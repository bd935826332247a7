# Written by `make export` from notebooks/05_matmul.py: edit that file.

"""Multiply by a weight matrix and differentiate it.

The linear layer is one matrix product forward and two backward; nearly all of
GPT-2's arithmetic happens in these three.
"""

__all__ = [
    "matmul_backward",
    "matmul_forward",
]


# imports of the CPU module
import numba

from llmnb.checks import check_array, check_float
from llmnb.cpu.jit import inner, kernel


# nine sums at once
@inner
def _nine_sums(out, a0, a1, a2, b0, b1, b2):
    s00 = s01 = s02 = s10 = s11 = s12 = s20 = s21 = s22 = out.dtype.type(0)
    for k in range(a0.size):
        s00 += a0[k] * b0[k]
        s01 += a0[k] * b1[k]
        s02 += a0[k] * b2[k]
        s10 += a1[k] * b0[k]
        s11 += a1[k] * b1[k]
        s12 += a1[k] * b2[k]
        s20 += a2[k] * b0[k]
        s21 += a2[k] * b1[k]
        s22 += a2[k] * b2[k]
    out[0, 0], out[0, 1], out[0, 2] = s00, s01, s02
    out[1, 0], out[1, 1], out[1, 2] = s10, s11, s12
    out[2, 0], out[2, 1], out[2, 2] = s20, s21, s22


# the edges
@inner
def _single_sums(out, a, b):
    for i in range(a.shape[0]):
        for j in range(b.shape[0]):
            total = out.dtype.type(0)
            for k in range(a.shape[1]):
                total += a[i, k] * b[j, k]
            out[i, j] = total


# one block of out
@inner
def _multiply_block(out, a, b):
    rows, cols = out.shape
    for i in range(0, rows, 3):
        for j in range(0, cols, 3):
            if i + 3 <= rows and j + 3 <= cols:
                _nine_sums(
                    out[i : i + 3, j : j + 3],
                    *(a[i], a[i + 1], a[i + 2]),
                    *(b[j], b[j + 1], b[j + 2]),
                )
            else:
                m, n = min(i + 3, rows), min(j + 3, cols)
                _single_sums(out[i:m, j:n], a[i:m], b[j:n])


# the blocks
BLOCK = 48  # rows and columns of out that one thread takes at a time
PANEL = 768  # columns that are added to in one sweep, see the backward pass


# the forward kernel
@kernel
def _matmul_forward(out, inp, weight, bias):
    rows, OC = out.shape
    down, across = -(-rows // BLOCK), -(-OC // BLOCK)
    for t in numba.prange(across * down):
        j, i = t // down * BLOCK, t % down * BLOCK
        block = out[i : i + BLOCK, j : j + BLOCK]
        _multiply_block(block, inp[i : i + BLOCK], weight[j : j + BLOCK])
        if bias is not None:
            for r in range(block.shape[0]):
                for c in range(block.shape[1]):
                    block[r, c] += bias[j + c]


# the linear layer, forward
def matmul_forward(out, inp, weight, bias):
    """Map each row of inp to a row of out: out = inp @ weight.T + bias.

    out: (B, T, OC). inp: (B, T, C). weight: (OC, C). bias: (OC,) or None.
    All float32 or all float64 and C-contiguous; out is overwritten. Raises
    TypeError or ValueError before it computes anything.

    Derived in chapter 5.
    """
    _check("matmul_forward", inp, weight, out=out)
    OC, C = weight.shape
    if bias is not None:
        check_array("matmul_forward: bias", bias, (OC,), inp.dtype)
    _matmul_forward(out.reshape(-1, OC), inp.reshape(-1, C), weight, bias)


# the checks
def _check(name, inp, weight, **outs):
    check_float(f"{name}: inp", inp)
    check_float(f"{name}: weight", weight)
    if inp.ndim != 3:
        raise ValueError(
            f"{name}: inp must have shape (B, T, C), got {inp.shape}"
        )
    if weight.ndim != 2:
        raise ValueError(
            f"{name}: weight must have shape (OC, C), got {weight.shape}"
        )
    B, T, C = inp.shape
    OC = weight.shape[0]
    check_array(f"{name}: inp", inp, (B, T, C), inp.dtype)
    check_array(f"{name}: weight", weight, (OC, C), inp.dtype)
    for label, array in outs.items():
        check_array(f"{name}: {label}", array, (B, T, OC), inp.dtype)


# three rows, four terms
@inner
def _add_terms(out, a, b, i, k, cols):
    x, y, z = out[i, cols], out[i + 1, cols], out[i + 2, cols]
    b0, b1, b2, b3 = b[k, cols], b[k + 1, cols], b[k + 2, cols], b[k + 3, cols]
    p, q, r = i, i + 1, i + 2
    p0, p1, p2, p3 = a[p, k], a[p, k + 1], a[p, k + 2], a[p, k + 3]
    q0, q1, q2, q3 = a[q, k], a[q, k + 1], a[q, k + 2], a[q, k + 3]
    r0, r1, r2, r3 = a[r, k], a[r, k + 1], a[r, k + 2], a[r, k + 3]
    for j in range(x.size):
        s, t, u = x[j], y[j], z[j]
        s += p0 * b0[j]
        t += q0 * b0[j]
        u += r0 * b0[j]
        s += p1 * b1[j]
        t += q1 * b1[j]
        u += r1 * b1[j]
        s += p2 * b2[j]
        t += q2 * b2[j]
        u += r2 * b2[j]
        s += p3 * b3[j]
        t += q3 * b3[j]
        u += r3 * b3[j]
        x[j], y[j], z[j] = s, t, u


# add a product
@inner
def _add_panel(out, a, b, first, last, cols):
    terms = a.shape[1]
    threes, fours = last - (last - first) % 3, terms - terms % 4
    for k in range(0, fours, 4):
        for i in range(first, threes, 3):
            _add_terms(out, a, b, i, k, cols)
    for i in range(first, last):
        x = out[i, cols]
        for k in range(fours if i < threes else 0, terms):
            factor, y = a[i, k], b[k, cols]
            for j in range(x.size):
                x[j] += factor * y[j]


@kernel
def _add_product(out, a, b):
    rows, width = out.shape
    for t in numba.prange(-(-rows // BLOCK)):
        first, last = t * BLOCK, min(rows, (t + 1) * BLOCK)
        for j in range(0, width, PANEL):
            cols = slice(j, min(width, j + PANEL))
            _add_panel(out, a, b, first, last, cols)


# add the columns up
@kernel
def _add_columns(dbias, dout):
    rows, OC = dout.shape
    for t in numba.prange(-(-OC // BLOCK)):
        total = dbias[t * BLOCK : (t + 1) * BLOCK]
        for n in range(rows):
            row = dout[n, t * BLOCK : (t + 1) * BLOCK]
            for j in range(total.size):
                total[j] += row[j]


# the linear layer, backward
def matmul_backward(dinp, dweight, dbias, dout, inp, weight):
    """Add the linear layer's gradients to dinp, dweight and dbias.

    dinp, inp: (B, T, C). dout: (B, T, OC). dweight, weight: (OC, C).
    dbias: (OC,), or None for a layer without bias. All float32 or all
    float64 and C-contiguous; the first three are added to in place. Raises
    TypeError or ValueError before it computes anything.

    Derived in chapter 5.
    """
    name = "matmul_backward"
    _check(name, inp, weight, dout=dout)
    OC, C = weight.shape
    check_array(f"{name}: dinp", dinp, inp.shape, inp.dtype)
    check_array(f"{name}: dweight", dweight, (OC, C), inp.dtype)
    if dbias is not None:
        check_array(f"{name}: dbias", dbias, (OC,), inp.dtype)
    drows = dout.reshape(-1, OC)
    _add_product(dinp.reshape(-1, C), drows, weight)
    _add_product(dweight, drows.T, inp.reshape(-1, C))
    if dbias is not None:
        _add_columns(dbias, drows)
