# Written by `make export` from notebooks/5_modern/12_bfloat16.py: edit that file.

"""The layers of a Llama in bfloat16 on a GPU."""

__all__ = [
    "embedding_forward_bf16", "geglu_backward_bf16", "geglu_forward_bf16",
    "rmsnorm_backward_bf16", "rmsnorm_forward_bf16", "rmsnorm_scratch_bf16",
    "rotary_backward_bf16", "rotary_forward_bf16", "swiglu_backward_bf16",
    "swiglu_forward_bf16",
]


# imports
import math

import numpy as np

from llmnb.cuda.bf16_matmul import check_eights, halves, pairs, write_pair
from llmnb.cuda.gated import ONE, ZERO, _gelu, _silu
from llmnb.cuda.matmul import CHUNK, add_chunks
from llmnb.gpu.fragments import pack, unpack
from llmnb.gpu.launch import given_work, kernel
from llmnb.gpu.simulator import cuda
from llmnb.gpu.warp import warp_sum
from llmnb.reference.rotary import check_turn
from llmnb.shapes import shapes


# RMSNorm, forward
@kernel(launch_bounds=256)
def _normalise(out, rstd, inp, weight, eps, offset):
    n, lane, HALF = cuda.grid(1) // 32, cuda.laneid, weight.size // 2
    if n >= rstd.size:
        return
    squares = ZERO
    for i in range(lane, HALF, 32):
        x, y = unpack(inp[n * HALF + i])
        squares += x * x + y * y
    mean = warp_sum(squares) / np.float32(weight.size)
    r = ONE / math.sqrt(mean + eps)
    for i in range(lane, HALF, 32):
        x, y = unpack(inp[n * HALF + i])
        x *= r * (weight[2 * i] + offset)
        y *= r * (weight[2 * i + 1] + offset)
        out[n * HALF + i] = pack(x, y)
    if lane == 0:
        rstd[n] = r


@shapes(
    "B T C!, B T!, B T C, C", halves("rstd", "weight"),
    eps="above 0", offset="at least 0",
)  # fmt: skip
def rmsnorm_forward_bf16(out, rstd, inp, weight, eps=1e-5, offset=0.0):
    """RMSNorm of rows in bfloat16; as rmsnorm_forward.

    out, inp: (B, T, C) in bfloat16, uint16. rstd: (B, T), weight: (C,),
    float32. Raises TypeError or ValueError before it launches anything.

    Derived in chapter 5.12.
    """
    arrays = pairs(out), rstd.reshape(-1), pairs(inp), weight
    numbers = np.float32(eps), np.float32(offset)
    _normalise[-(-rstd.size // 8), 256](*arrays, *numbers)


# RMSNorm, backward
@kernel(launch_bounds=256)
def _back_rows(dinp, dout, inp, weight, rstd, offset, add):
    n, lane, HALF = cuda.grid(1) // 32, cuda.laneid, weight.size // 2
    if n >= rstd.size:
        return
    r, mean = rstd[n], ZERO
    for i in range(lane, HALF, 32):
        x, y = unpack(inp[n * HALF + i])
        u, v = unpack(dout[n * HALF + i])
        mean += u * (weight[2 * i] + offset) * (x * r)
        mean += v * (weight[2 * i + 1] + offset) * (y * r)
    mean = warp_sum(mean) / np.float32(weight.size)
    for i in range(lane, HALF, 32):
        x, y = unpack(inp[n * HALF + i])
        u, v = unpack(dout[n * HALF + i])
        u = r * (u * (weight[2 * i] + offset) - x * r * mean)
        v = r * (v * (weight[2 * i + 1] + offset) - y * r * mean)
        write_pair(dinp, dinp, n * HALF + i, u, v, add)


@kernel(launch_bounds=128)
def _back_columns(dw, dout, inp, rstd, C):
    """Two channels a thread, CHUNK rows of them."""
    c, chunk, rows = 2 * cuda.grid(1), cuda.blockIdx.y, rstd.size
    a = b = ZERO
    if c < C:
        for n in range(chunk * CHUNK, min(rows, (chunk + 1) * CHUNK)):
            x, y = unpack(inp[(n * C + c) // 2])
            u, v = unpack(dout[(n * C + c) // 2])
            a, b = a + u * (x * rstd[n]), b + v * (y * rstd[n])
        dw[chunk * C + c], dw[chunk * C + c + 1] = a, b


def rmsnorm_scratch_bf16(rows, C):
    """How many floats rmsnorm_backward_bf16 wants to work in.

    Derived in chapter 5.12.
    """
    return -(-rows // CHUNK) * C


@shapes(
    "B T C!, C!, B T C, B T C, C, B T",
    halves("dweight", "weight", "rstd", "work"),
    offset="at least 0",
    work="W!?",
)
def rmsnorm_backward_bf16(
    dinp, dweight, dout, inp, weight, rstd, offset=0.0, add=True, work=None
):
    """Add RMSNorm's gradients to dinp and dweight; as rmsnorm_backward.

    dinp, dout, inp: (B, T, C) in bfloat16, uint16. dweight, weight: (C,),
    rstd: (B, T), float32. work: rmsnorm_scratch_bf16(B * T, C) floats, or
    None to allocate them. Raises TypeError or ValueError before it launches
    anything.

    Derived in chapter 5.12.
    """
    rows, C = rstd.size, weight.size
    wanted = rmsnorm_scratch_bf16(rows, C)
    work = given_work("rmsnorm_backward_bf16", work, wanted, rstd)
    flat, dy, x = rstd.reshape(-1), pairs(dout), pairs(inp)
    how, chunks = (np.float32(offset), int(add)), -(-rows // CHUNK)
    _back_rows[-(-rows // 8), 256](pairs(dinp), dy, x, weight, flat, *how)
    _back_columns[(-(-C // 256), chunks), 128](work, dy, x, flat, C)
    add_chunks[-(-C // 128), 128](dweight, work, chunks, 1)


# rotary
@kernel(launch_bounds=256)
def _turn(x, table, heads, first, sign, T, W):
    i, PART = cuda.grid(1), table.shape[1] // 4  # words of half a head
    n, k = i // (heads * PART), i % (heads * PART)
    if n < x.size // W:
        near = n * W + k // PART * 2 * PART + k % PART
        t, c, s = first + n % T, 2 * (k % PART), 2 * (k % PART) + 2 * PART
        (a, b), (p, q) = unpack(x[near]), unpack(x[near + PART])
        cos, cos1 = table[t, c], table[t, c + 1]
        sin, sin1 = sign * table[t, s], sign * table[t, s + 1]
        x[near] = pack(a * cos - p * sin, b * cos1 - q * sin1)
        x[near + PART] = pack(a * sin + p * cos, b * sin1 + q * cos1)


def _turn_pairs(layer, x, table, heads, first, sign):
    check_turn(layer, x, table, heads, first)
    (_, T, W), hs = x.shape, table.shape[1]
    check_eights(layer, hs)
    turning = x.size // W * heads * hs // 4
    how = int(heads), int(first), np.float32(sign), T, W // 2
    _turn[-(-turning // 256), 256](pairs(x), table, *how)


@shapes("B T W!, R hs", halves("table"))
def rotary_forward_bf16(x, table, heads, first=0):
    """Turn the first heads of each row, in place; as rotary_forward.

    x: (B, T, n hs) in bfloat16, uint16, where 8 divides hs. table: (R, hs),
    float32. Raises TypeError or ValueError before it launches anything.

    Derived in chapter 5.12.
    """
    _turn_pairs("rotary_forward_bf16", x, table, heads, first, 1)


@shapes("B T W!, R hs", halves("table"))
def rotary_backward_bf16(dx, table, heads, first=0):
    """Turn the gradients back, in place; arguments: as rotary_forward_bf16.

    Derived in chapter 5.12.
    """
    _turn_pairs("rotary_backward_bf16", dx, table, heads, first, -1)


# kernels around a bend
def _gate_kernels(bend):
    @kernel(launch_bounds=256)
    def gate(out, inp, HALF):
        i = cuda.grid(1)
        if i < out.size:
            at = i // HALF * 2 * HALF + i % HALF
            (a, b), (c, d) = unpack(inp[at]), unpack(inp[at + HALF])
            (a, _), (b, _) = bend(a), bend(b)
            out[i] = pack(a * c, b * d)

    @kernel(launch_bounds=256)
    def gate_back(dinp, dout, inp, HALF):
        i = cuda.grid(1)
        if i < dout.size:
            at = i // HALF * 2 * HALF + i % HALF
            (a, b), (c, d) = unpack(inp[at]), unpack(inp[at + HALF])
            u, v = unpack(dout[i])
            (a, slope), (b, slope1) = bend(a), bend(b)
            dinp[at] = pack(u * c * slope, v * d * slope1)
            dinp[at + HALF] = pack(u * a, v * b)

    return gate, gate_back


_swiglu, _swiglu_back = _gate_kernels(_silu)
_geglu, _geglu_back = _gate_kernels(_gelu)


def _gate(run, *arrays):
    """Launch on rows; the last array, inp, has 2 H channels."""
    inp = arrays[-1]
    HALF = inp.shape[-1] // 4
    run[-(-inp.size // 1024), 256](*map(pairs, arrays), HALF)


@shapes("B T H!, B T 2H", halves())
def swiglu_forward_bf16(out, inp):
    """SwiGLU in bfloat16, uint16; as swiglu_forward, where 8 divides H.

    Raises TypeError or ValueError before it launches anything.

    Derived in chapter 5.12.
    """
    _gate(_swiglu, out, inp)


@shapes("B T 2H!, B T H, B T 2H", halves())
def swiglu_backward_bf16(dinp, dout, inp):
    """SwiGLU's gradient in bfloat16, uint16; as swiglu_backward.

    8 divides H. Raises TypeError or ValueError before it launches anything.

    Derived in chapter 5.12.
    """
    _gate(_swiglu_back, dinp, dout, inp)


@shapes("B T H!, B T 2H", halves())
def geglu_forward_bf16(out, inp):
    """GeGLU in bfloat16, uint16; as geglu_forward, where 8 divides H.

    Raises TypeError or ValueError before it launches anything.

    Derived in chapter 5.12.
    """
    _gate(_geglu, out, inp)


@shapes("B T 2H!, B T H, B T 2H", halves())
def geglu_backward_bf16(dinp, dout, inp):
    """GeGLU's gradient in bfloat16, uint16; as geglu_backward.

    8 divides H. Raises TypeError or ValueError before it launches anything.

    Derived in chapter 5.12.
    """
    _gate(_geglu_back, dinp, dout, inp)


# token vectors
@kernel(launch_bounds=256)
def _embed(out, inp, wte, scale, C):
    i = 2 * cuda.grid(1)
    if i < inp.size * C:
        at = inp[i // C] * C + i % C
        out[i // 2] = pack(wte[at] * scale, wte[at + 1] * scale)


@shapes("B T C!, B T of Vp, Vp C", halves("wte"), scale="above 0")
def embedding_forward_bf16(out, inp, wte, scale=1.0):
    """Write the vector of each token, times scale; as embedding_forward.

    out: (B, T, C) in bfloat16, uint16. inp: int32 (B, T). wte: float32.
    Raises TypeError or ValueError before it launches anything.

    Derived in chapter 5.12.
    """
    places, table = inp.reshape(-1), wte.reshape(-1)
    how = np.float32(scale), out.shape[2]
    _embed[-(-out.size // 512), 256](pairs(out), places, table, *how)
