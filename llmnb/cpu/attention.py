# Written by `make export` from notebooks/06_attention.py: edit that file.

"""Let each position look back and differentiate the look.

Causal self-attention: every position takes a weighted mean of the values at
and before it, with weights from a softmax of dot products.
"""

__all__ = [
    "attention_backward",
    "attention_forward",
]


# imports of the kernels
import math

import numba
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from llmnb.checks import check_array, check_float
from llmnb.cpu.jit import inner, kernel
from llmnb.cpu.math import fast_exp


# a place on the stack
KEYS = 64  # scores in a tile
ROWS = 32  # consecutive rows that a thread takes at a time


@intrinsic(prefer_literal=True)
def _reserve(typingctx, like, count):
    def codegen(context, builder, signature, args):
        kind = context.get_value_type(signature.args[0])
        number = signature.args[1].literal_value
        return cgutils.alloca_once(builder, kind, size=number)

    return types.CPointer(like)(like, count), codegen


# dot products with a group of rows
@inner
def _dots(tile, x, row, slot, y, first, other, n, scale):
    zero = tile.dtype.type(0)
    four = n // 4 * 4
    for j in range(0, four, 4):
        u = first + j
        s0 = s1 = s2 = s3 = zero
        for i in range(x.shape[2]):
            a = x[row, slot, i]
            s0 += a * y[u, other, i]
            s1 += a * y[u + 1, other, i]
            s2 += a * y[u + 2, other, i]
            s3 += a * y[u + 3, other, i]
        tile[j] = s0 * scale
        tile[j + 1] = s1 * scale
        tile[j + 2] = s2 * scale
        tile[j + 3] = s3 * scale
    for j in range(four, n):
        s0 = zero
        for i in range(x.shape[2]):
            s0 += x[row, slot, i] * y[first + j, other, i]
        tile[j] = s0 * scale


# weighted sums of a group of rows
@inner
def _add(x, row, slot, tile, y, first, other, n):
    four = n // 4 * 4
    for j in range(0, four, 4):
        u = first + j
        w0, w1, w2, w3 = tile[j], tile[j + 1], tile[j + 2], tile[j + 3]
        for i in range(x.shape[2]):
            x[row, slot, i] += (
                w0 * y[u, other, i]
                + w1 * y[u + 1, other, i]
                + w2 * y[u + 2, other, i]
                + w3 * y[u + 3, other, i]
            )
    for j in range(four, n):
        for i in range(x.shape[2]):
            x[row, slot, i] += tile[j] * y[first + j, other, i]


# scores to exponentials
@inner
def _exponentials(tile, n, top):
    for j in range(n):
        top = max(top, tile[j])
    total = tile.dtype.type(0)
    for j in range(n):
        tile[j] = fast_exp(tile[j] - top)
        total += tile[j]
    return top, total


@inner
def _scale_row(x, row, slot, factor):
    for i in range(x.shape[2]):
        x[row, slot, i] *= factor


# a block of rows, forward
@inner
def _forward_rows(out, lse, qkv, b, h, first):
    _, NH, T = lse.shape
    last = min(first + ROWS, T)
    zero, one = lse.dtype.type(0), lse.dtype.type(1)
    scale = lse.dtype.type(1 / math.sqrt(out.shape[2]))
    tile = carray(_reserve(zero, KEYS), KEYS)
    top = carray(_reserve(zero, ROWS), ROWS)
    total = carray(_reserve(zero, ROWS), ROWS)
    top[:], total[:] = lse.dtype.type(-1e30), zero
    out[b * T + first : b * T + last, h] = zero
    for u in range(0, last, KEYS):
        for t in range(max(first, u), last):
            r, row, n = t - first, b * T + t, min(KEYS, t + 1 - u)
            _dots(tile, qkv, row, h, qkv, b * T + u, NH + h, n, scale)
            new, part = _exponentials(tile, n, top[r])
            if new > top[r]:
                factor = fast_exp(top[r] - new)
                _scale_row(out, row, h, factor)
                top[r], total[r] = new, total[r] * factor
            total[r] += part
            _add(out, row, h, tile, qkv, b * T + u, 2 * NH + h, n)
    for t in range(first, last):
        lse[b, h, t] = top[t - first] + math.log(total[t - first])
        _scale_row(out, b * T + t, h, one / total[t - first])


# the forward kernel
@kernel
def _attention_forward(out, lse, qkv):
    B, NH, T = lse.shape
    blocks = (T + ROWS - 1) // ROWS
    pairs = (blocks + 1) // 2
    for unit in numba.prange(B * NH * pairs):
        b, h, low = unit // (NH * pairs), unit // pairs % NH, unit % pairs
        high = blocks - 1 - low
        _forward_rows(out, lse, qkv, b, h, low * ROWS)
        if high != low:
            _forward_rows(out, lse, qkv, b, h, high * ROWS)


# attention, forward
def attention_forward(out, lse, inp):
    """Causal self-attention of NH heads.

    inp: (B, T, 3C), queries, keys and values along the last axis. Writes
    out (B, T, C) and lse (B, NH, T), the log-sum-exp of each row of scaled,
    masked scores, which the backward pass needs. All float32 or all float64
    and C-contiguous. Raises TypeError or ValueError before it computes
    anything.

    Derived in chapter 6.
    """
    B, T, NH, hs = _check("attention_forward", out, lse, inp)
    heads = out.reshape(B * T, NH, hs)
    _attention_forward(heads, lse, inp.reshape(B * T, 3 * NH, hs))


# the checks
def _check(name, out, lse, inp):
    check_float(f"{name}: inp", inp)
    if inp.ndim != 3 or inp.shape[2] % 3:
        raise ValueError(
            f"{name}: inp must have shape (B, T, 3C), got {inp.shape}"
        )
    B, T, C = inp.shape[0], inp.shape[1], inp.shape[2] // 3
    NH = lse.shape[1] if getattr(lse, "ndim", 0) == 3 else 0
    if NH == 0 or C % NH:
        raise ValueError(
            f"{name}: lse must have shape (B, NH, T) with an NH that "
            f"divides C = {C}, got {getattr(lse, 'shape', type(lse))}"
        )
    check_array(f"{name}: inp", inp, (B, T, 3 * C), inp.dtype)
    check_array(f"{name}: out", out, (B, T, C), inp.dtype)
    check_array(f"{name}: lse", lse, (B, NH, T), inp.dtype)
    return B, T, NH, C // NH


# a block of rows, backward
@inner
def _dot(x, y, row, slot):
    total = x.dtype.type(0)
    for i in range(x.shape[2]):
        total += x[row, slot, i] * y[row, slot, i]
    return total


@inner
def _backward_rows(dqkv, dout, qkv, out, lse, b, h, first):
    _, NH, T = lse.shape
    last = min(first + ROWS, T)
    zero, one = lse.dtype.type(0), lse.dtype.type(1)
    scale = lse.dtype.type(1 / math.sqrt(out.shape[2]))
    s = carray(_reserve(zero, KEYS), KEYS)
    ds = carray(_reserve(zero, KEYS), KEYS)
    for u in range(0, last, KEYS):
        for t in range(max(first, u), last):
            row, key, n = b * T + t, b * T + u, min(KEYS, t + 1 - u)
            _dots(s, qkv, row, h, qkv, key, NH + h, n, scale)
            _dots(ds, dout, row, h, qkv, key, 2 * NH + h, n, one)
            D, L = _dot(dout, out, row, h), lse[b, h, t]
            for j in range(n):
                ds[j] = fast_exp(s[j] - L) * (ds[j] - D) * scale
            _add(dqkv, row, h, ds, qkv, key, NH + h, n)


# a block of columns, backward
@inner
def _backward_columns(dqkv, dout, qkv, out, lse, b, h, first):
    _, NH, T = lse.shape
    last = min(first + ROWS, T)
    zero, one = lse.dtype.type(0), lse.dtype.type(1)
    scale = lse.dtype.type(1 / math.sqrt(out.shape[2]))
    a = carray(_reserve(zero, KEYS), KEYS)
    ds = carray(_reserve(zero, KEYS), KEYS)
    D = carray(_reserve(zero, KEYS), KEYS)
    for group in range(first, T, KEYS):
        end = min(group + KEYS, T)
        for t in range(group, end):
            D[t - group] = _dot(dout, out, b * T + t, h)
        for u in range(first, min(last, end)):
            t = max(group, u)
            row, key, n = b * T + t, b * T + u, end - t
            _dots(a, qkv, key, NH + h, qkv, row, h, n, scale)
            _dots(ds, qkv, key, 2 * NH + h, dout, row, h, n, one)
            for j in range(n):
                a[j] = fast_exp(a[j] - lse[b, h, t + j])
                ds[j] = a[j] * (ds[j] - D[t - group + j]) * scale
            _add(dqkv, key, NH + h, ds, qkv, row, h, n)
            _add(dqkv, key, 2 * NH + h, a, dout, row, h, n)


# the backward kernel
@kernel
def _attention_backward(dqkv, dout, qkv, out, lse):
    B, NH, T = lse.shape
    blocks = (T + ROWS - 1) // ROWS
    for unit in numba.prange(B * NH * blocks):
        b, h = unit // (NH * blocks), unit // blocks % NH
        first = unit % blocks * ROWS
        _backward_rows(dqkv, dout, qkv, out, lse, b, h, first)
        _backward_columns(dqkv, dout, qkv, out, lse, b, h, first)


# attention, backward
def attention_backward(dinp, dout, inp, out, lse):
    """Add attention's gradient to dinp.

    dinp, inp: (B, T, 3C). dout, out: (B, T, C). lse: (B, NH, T). out and
    lse are as the forward pass left them. All float32 or all float64 and
    C-contiguous; dinp is added to in place. Raises TypeError or ValueError
    before it computes anything.

    Derived in chapter 6.
    """
    B, T, NH, hs = _check("attention_backward", out, lse, inp)
    check_array("attention_backward: dinp", dinp, inp.shape, inp.dtype)
    check_array("attention_backward: dout", dout, out.shape, inp.dtype)
    qkv, dqkv = (x.reshape(B * T, 3 * NH, hs) for x in (inp, dinp))
    heads, dheads = (x.reshape(B * T, NH, hs) for x in (out, dout))
    _attention_backward(dqkv, dheads, qkv, heads, lse)
