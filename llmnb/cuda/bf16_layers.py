# Written by `make export` from notebooks/3_gpu/16_bf16_training.py: edit that file.

"""The layers of rows in bfloat16 on a GPU."""

__all__ = [
    "crossentropy_softmax_backward_bf16", "crossentropy_softmax_forward_bf16",
    "encoder_forward_bf16", "fused_classifier_bf16", "gelu_backward_bf16",
    "gelu_forward_bf16", "layernorm_backward_bf16", "layernorm_forward_bf16",
    "layernorm_scratch_bf16", "round_bf16", "widen_bf16",
]


# imports of the layers
import math

import numpy as np

from llmnb.cuda.bf16_matmul import halves, pairs, write_pair
from llmnb.cuda.crossentropy import LOWEST, block_merged
from llmnb.cuda.gelu import ONE, gelu_back, gelu_of
from llmnb.cuda.layernorm import EPS32
from llmnb.cuda.matmul import CHUNK, ZERO, add_chunks
from llmnb.gpu.fragments import pack, unpack
from llmnb.gpu.launch import device, given_work, kernel
from llmnb.gpu.simulator import cuda
from llmnb.gpu.warp import warp_sum
from llmnb.shapes import shapes


# round the parameters
@kernel(launch_bounds=256)
def _round(half, wide):
    i = cuda.grid(1)
    if i < half.size:
        half[i] = pack(wide[2 * i], wide[2 * i + 1])


def round_bf16(half, wide):
    """Round a flat device's array of float32 to bfloat16 (uint16).

    Derived in chapter 3.16.
    """
    there = pairs(half)
    _round[-(-there.size // 256), 256](there, wide)


@kernel(launch_bounds=256)
def _widen(wide, half):
    i = cuda.grid(1)
    if i < half.size:
        wide[2 * i], wide[2 * i + 1] = unpack(half[i])


def widen_bf16(wide, half):
    """The float32 numbers of a device's array in bfloat16, flat.

    Derived in chapter 3.16.
    """
    there = pairs(half)
    _widen[-(-there.size // 256), 256](wide, there)


# the encoder
@kernel(launch_bounds=256)
def _encode(out, inp, wte, wpe, T, C):
    i = 2 * cuda.grid(1)
    if i < inp.size * C:
        n, c = i // C, i % C
        at, place = inp[n] * C + c, n % T * C + c
        x, y = wte[at] + wpe[place], wte[at + 1] + wpe[place + 1]
        out[i // 2] = pack(x, y)


@shapes("B T C!, B T of Vp, Vp C, T+ C", halves("wte", "wpe"))
def encoder_forward_bf16(out, inp, wte, wpe):
    """out = wte[inp] + wpe, rounded: (1.5.1).

    out: (B, T, C) in bfloat16, uint16. inp: int32 (B, T). wte, wpe: float32.
    Raises TypeError or ValueError before it launches anything.

    Derived in chapter 3.16.
    """
    _, T, C = out.shape
    tables = wte.reshape(-1), wpe.reshape(-1)
    grid = -(-out.size // 512)
    _encode[grid, 256](pairs(out), inp.reshape(-1), *tables, T, C)


# LayerNorm, forward
@kernel(launch_bounds=256)
def _normalise(out, mean, rstd, inp, weight, bias):
    n, lane, HALF = cuda.grid(1) // 32, cuda.laneid, weight.size // 2
    if n >= mean.size:
        return
    total = ZERO
    for i in range(lane, HALF, 32):
        x, y = unpack(inp[n * HALF + i])
        total += x + y
    mu = warp_sum(total) / np.float32(weight.size)
    total = ZERO
    for i in range(lane, HALF, 32):
        x, y = unpack(inp[n * HALF + i])
        total += (x - mu) * (x - mu) + (y - mu) * (y - mu)
    r = ONE / math.sqrt(warp_sum(total) / np.float32(weight.size) + EPS32)
    for i in range(lane, HALF, 32):
        x, y = unpack(inp[n * HALF + i])
        x = (x - mu) * r * weight[2 * i] + bias[2 * i]
        y = (y - mu) * r * weight[2 * i + 1] + bias[2 * i + 1]
        out[n * HALF + i] = pack(x, y)
    if lane == 0:
        mean[n], rstd[n] = mu, r


@shapes(
    "B T C!, B T!, B T!, B T C, C, C",
    halves("mean", "rstd", "weight", "bias"),
)
def layernorm_forward_bf16(out, mean, rstd, inp, weight, bias):
    """LayerNorm of rows in bfloat16: (1.6.3).

    out, inp: (B, T, C) in bfloat16, uint16. mean, rstd: (B, T), weight,
    bias: (C,), float32. Raises TypeError or ValueError before it launches
    anything.

    Derived in chapter 3.16.
    """
    stats, grid = (mean.reshape(-1), rstd.reshape(-1)), -(-mean.size // 8)
    _normalise[grid, 256](pairs(out), *stats, pairs(inp), weight, bias)


# LayerNorm, backward
@kernel(launch_bounds=256)
def _back_rows(dinp, dout, inp, weight, mean, rstd):
    n, lane = cuda.grid(1) // 32, cuda.laneid
    HALF, size = weight.size // 2, np.float32(weight.size)
    if n >= mean.size:
        return
    mu, r, a, b = mean[n], rstd[n], ZERO, ZERO
    for i in range(lane, HALF, 32):
        x, y = unpack(inp[n * HALF + i])
        u, v = unpack(dout[n * HALF + i])
        u, v = u * weight[2 * i], v * weight[2 * i + 1]
        a += u + v
        b += u * ((x - mu) * r) + v * ((y - mu) * r)
    a, b = warp_sum(a) / size, warp_sum(b) / size
    for i in range(lane, HALF, 32):
        x, y = unpack(inp[n * HALF + i])
        u, v = unpack(dout[n * HALF + i])
        u = r * (u * weight[2 * i] - a - (x - mu) * r * b)
        v = r * (v * weight[2 * i + 1] - a - (y - mu) * r * b)
        write_pair(dinp, dinp, n * HALF + i, u, v, True)


@kernel(launch_bounds=128)
def _back_columns(dw, db, dout, inp, mean, rstd):
    """Two channels a thread, CHUNK rows of them."""
    c, chunk, rows = 2 * cuda.grid(1), cuda.blockIdx.y, mean.size
    C = 2 * inp.size // rows
    w0 = w1 = b0 = b1 = ZERO
    if c < C:
        for n in range(chunk * CHUNK, min(rows, (chunk + 1) * CHUNK)):
            x, y = unpack(inp[(n * C + c) // 2])
            u, v = unpack(dout[(n * C + c) // 2])
            w0 += u * ((x - mean[n]) * rstd[n])
            w1 += v * ((y - mean[n]) * rstd[n])
            b0, b1 = b0 + u, b1 + v
        at = chunk * C + c
        dw[at], dw[at + 1], db[at], db[at + 1] = w0, w1, b0, b1


def layernorm_scratch_bf16(rows, C):
    """How many floats layernorm_backward_bf16 wants to work in.

    Derived in chapter 3.16.
    """
    return 2 * -(-rows // CHUNK) * C


@shapes(
    "B T C!, C!, C!, B T C, B T C, C, B T, B T, W!?",
    halves("dweight", "dbias", "weight", "mean", "rstd", "work"),
)
def layernorm_backward_bf16(
    dinp, dweight, dbias, dout, inp, weight, mean, rstd, *, work=None
):
    """Add LayerNorm's gradients to dinp, dweight and dbias: (1.6.10).

    dinp, dout, inp: (B, T, C) in bfloat16, uint16. dweight, dbias, weight:
    (C,), mean, rstd: (B, T), float32. work: layernorm_scratch_bf16(B * T, C)
    floats, or None to allocate them. Raises TypeError or ValueError before
    it launches anything.

    Derived in chapter 3.16.
    """
    rows, C = mean.size, weight.size
    wanted = layernorm_scratch_bf16(rows, C)
    work = given_work("layernorm_backward_bf16", work, wanted, mean)
    stats = mean.reshape(-1), rstd.reshape(-1)
    dy, x, chunks = pairs(dout), pairs(inp), -(-rows // CHUNK)
    _back_rows[-(-rows // 8), 256](pairs(dinp), dy, x, weight, *stats)
    dw, db = work[: wanted // 2], work[wanted // 2 : wanted]
    _back_columns[(-(-C // 256), chunks), 128](dw, db, dy, x, *stats)
    add_chunks[-(-C // 128), 128](dweight, dw, chunks, 1)
    add_chunks[-(-C // 128), 128](dbias, db, chunks, 1)


# GELU
@kernel(launch_bounds=256)
def _bend(out, inp):
    i = cuda.grid(1)
    if i < out.size:
        x, y = unpack(inp[i])
        out[i] = pack(gelu_of(x), gelu_of(y))


@kernel(launch_bounds=256)
def _bend_back(dinp, dout, inp, add):
    i = cuda.grid(1)
    if i < dinp.size:
        x, y = unpack(inp[i])
        u, v = unpack(dout[i])
        write_pair(dinp, dinp, i, gelu_back(u, x), gelu_back(v, y), add)


@shapes("...!, ...~", halves())
def gelu_forward_bf16(out, inp):
    """GELU of every element, in bfloat16 (uint16): (1.9.2).

    out may be inp; their last axis is a multiple of 8. Raises TypeError or
    ValueError before it launches anything.

    Derived in chapter 3.16.
    """
    _bend[-(-out.size // 512), 256](pairs(out), pairs(inp))


@shapes("...!, ...~, ...", halves())
def gelu_backward_bf16(dinp, dout, inp, add=True):
    """Add GELU's gradient to dinp, or overwrite dinp, in bfloat16.

    As gelu_forward_bf16; with add=False dinp may be dout itself.

    Derived in chapter 3.16.
    """
    grid = -(-inp.size // 512)
    _bend_back[grid, 256](pairs(dinp), pairs(dout), pairs(inp), int(add))


# the classifier, forward
@device
def _seen(pair, i, V):
    """Both logits of a pair; the lowest in place of padding."""
    x, y = unpack(pair)
    return x, y if 2 * i + 1 < V else LOWEST


@device
def _lse_of_row(logits, n, HALF, V, tops, totals):
    """A row's log of the sum of exponentials, by all threads of a block."""
    top, total = LOWEST, ZERO
    for i in range(cuda.threadIdx.x, (V + 1) // 2, 256):
        x, y = _seen(logits[n * HALF + i], i, V)
        most = max(top, max(x, y))
        total *= math.exp(top - most)
        total += math.exp(x - most) + math.exp(y - most)
        top = most
    top, total = block_merged(top, total, tops, totals)
    return top + math.log(total)


@device
def _logit(logits, n, HALF, k):
    x, y = unpack(logits[n * HALF + k // 2])
    return x if k % 2 == 0 else y


@kernel(launch_bounds=256)
def _losses_of_rows(losses, lse, logits, targets, V):
    tops = cuda.shared.array(8, np.float32)
    totals = cuda.shared.array(8, np.float32)
    n, HALF = cuda.blockIdx.x, logits.size // losses.size
    shift = _lse_of_row(logits, n, HALF, V, tops, totals)
    if cuda.threadIdx.x == 0:
        lse[n] = shift
        losses[n] = shift - _logit(logits, n, HALF, targets[n])


@shapes("B T!, B T!, B T Vp, B T of V, 1 to Vp", halves("losses", "lse"))
def crossentropy_softmax_forward_bf16(losses, lse, logits, targets, V):
    """Losses straight from logits in bfloat16: (1.11.11).

    losses, lse: float32 (B, T). logits: (B, T, Vp), uint16, of which columns
    from V on are not read. targets: int32 (B, T). Raises TypeError or
    ValueError before it launches anything.

    Derived in chapter 3.16.
    """
    flat = losses.reshape(-1), lse.reshape(-1), pairs(logits)
    _losses_of_rows[losses.size, 256](*flat, targets.reshape(-1), V)


# the classifier, backward
@device
def _slopes_of_row(dlogits, logits, n, HALF, k, shift, scale, V):
    """Write p - y of a row, scaled; all threads of a block together."""
    for i in range(cuda.threadIdx.x, HALF, 256):
        x, y = _seen(logits[n * HALF + i], i, V)
        u = v = ZERO
        if 2 * i < V:
            u, v = math.exp(x - shift), math.exp(y - shift)
        if k == 2 * i:
            u -= ONE
        if k == 2 * i + 1:
            v -= ONE
        dlogits[n * HALF + i] = pack(u * scale, v * scale)


@kernel(launch_bounds=256)
def _slopes_of_rows(dlogits, dlosses, logits, lse, targets, V):
    n, HALF = cuda.blockIdx.x, logits.size // lse.size
    row = n, HALF, targets[n], lse[n], dlosses[n], V
    _slopes_of_row(dlogits, logits, *row)


@shapes(
    "B T Vp!, B T, B T Vp~, B T, B T of V, 1 to Vp",
    halves("dlosses", "lse"),
)
def crossentropy_softmax_backward_bf16(
    dlogits, dlosses, logits, lse, targets, V
):
    """The gradient of the losses by the logits, in bfloat16: (1.11.12).

    dlogits: (B, T, Vp), uint16, overwritten, may be logits itself; columns
    from V on receive 0. dlosses, lse: float32 (B, T). Raises TypeError or
    ValueError before it launches anything.

    Derived in chapter 3.16.
    """
    flat = pairs(dlogits), dlosses.reshape(-1), pairs(logits)
    rest = lse.reshape(-1), targets.reshape(-1), V
    _slopes_of_rows[lse.size, 256](*flat, *rest)


# loss and gradient in one launch
@kernel(launch_bounds=256)
def _both_of_rows(losses, lse, logits, dlosses, targets, V):
    tops = cuda.shared.array(8, np.float32)
    totals = cuda.shared.array(8, np.float32)
    n, HALF = cuda.blockIdx.x, logits.size // losses.size
    k, scale = targets[n], dlosses[n]
    shift = _lse_of_row(logits, n, HALF, V, tops, totals)
    if cuda.threadIdx.x == 0:
        lse[n], losses[n] = shift, shift - _logit(logits, n, HALF, k)
    cuda.syncthreads()  # the target's logit has been read
    _slopes_of_row(logits, logits, n, HALF, k, shift, scale, V)


@shapes(
    "B T!, B T!, B T Vp!, B T, B T of V, 1 to Vp",
    halves("losses", "lse", "dlosses"),
)
def fused_classifier_bf16(losses, lse, logits, dlosses, targets, V):
    """Losses, and their gradient in the place of the logits, in one launch.

    The same as crossentropy_softmax_forward_bf16(losses, lse, logits,
    targets, V) and crossentropy_softmax_backward_bf16(logits, dlosses,
    logits, lse, targets, V), to the bit, and raises what they raise.

    Derived in chapter 3.16.
    """
    flat = losses.reshape(-1), lse.reshape(-1), pairs(logits)
    rest = dlosses.reshape(-1), targets.reshape(-1), V
    _both_of_rows[losses.size, 256](*flat, *rest)
