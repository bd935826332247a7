# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       cuda.bf16_model: "Training in bfloat16 on a GPU, with float32 masters."
#       cuda.bf16_layers: "The layers of rows in bfloat16 on a GPU."
# ---

# %% [markdown]
# # Training in bfloat16: where eight bits are enough, and where not
#
# > Activations and the factors of products in bfloat16; parameters, sums and
# > statistics in float32. Why the parameters must be, shown on numbers; and ten
# > steps beside float32's.
#
# *Reading time: 22 minutes. You need: bfloat16
# ([chapter 2.6](../2_cpu/06_bfloat16.ipynb)), the step on a GPU
# ([chapter 3.11](11_step.ipynb)), products and attention on tensor cores
# ([3.14](14_tensor_products.ipynb), [3.15](15_tensor_attention.ipynb)).*

# %% [markdown]
# ## Where we are
#
# On a CPU `precision="bf16"` rounded the factors of products and kept all else
# in float32. On a GPU it should pay to store in bfloat16 as well: half of the
# bytes should be half of the time of every layer that only reads and writes.
# At the end of this chapter you can
#
# - say which arrays of a training step may have eight bits, and why
#   parameters may not;
# - weigh float32 masters against rounding by chance;
# - train a GPT-2 with `backend="cuda", precision="bf16"`.

# %% [markdown]
# ## Setup

# %% setup
import os

import matplotlib.pyplot as plt

from llmnb import GPT2, GPT2Config
from llmnb.book.diagram import PALETTE
from llmnb.book.verify import verdict
from llmnb.reference.bfloat16 import from_bfloat16, to_bfloat16

# %% imports of the layers tags=["export"] module="cuda.bf16_layers"
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

# %% [markdown]
# ## Eight bits
#
# A bfloat16 number has eight significant bits. Between 1 and 2 there are 128 of
# them, $2^{-7}$ apart, and rounding is off by at most half of that: 0.4 %. An
# activation that is off by so little, and each one in its own direction, does
# little harm: a product adds up hundreds of them, in float32, and the errors
# go up and down. A parameter is another matter. A step of AdamW moves it by
# about the learning rate, say 0.0003. A weight of 0.1 has neighbours 0.0005
# apart; it may be moved or not. One of 1, such as LayerNorm's, has neighbours
# 0.0078 and 0.0039 away, and half of that is needed to leave it. It stays
# where it is, for ever:

# %% steps that are lost
STEPS, RATE = 2000, 3e-4


def train(update, start):
    """A parameter over STEPS updates of -RATE."""
    found = [np.float32(start)]
    for _ in range(STEPS):
        found.append(update(found[-1]))
    return np.array(found)


def nearest(x):
    """The nearest bfloat16, as float32."""
    return from_bfloat16(to_bfloat16(np.atleast_1d(np.float32(x))))[0]


lost = train(lambda x: nearest(x - np.float32(RATE)), 1)
single = train(lambda x: x - np.float32(RATE), 1)
verdict("bfloat16", lost[-1] == 1, "has not moved in 2,000 steps")
verdict("float32", abs(single[-1] - 0.4) < 1e-3, "has come to 0.4")

# %% [markdown]
# There are two remedies. One is a *master*: the parameter is float32, AdamW
# moves that, and products take a copy rounded to bfloat16. The other is
# *stochastic rounding*: the parameter is bfloat16, and a result between two
# neighbours becomes the upper one with a chance as large as the part of the
# way that it has come from the lower one. If it lies at a share $p$ between
# $a$ and $b$, the expected value is $(1 - p)\,a + p\,b$, which is where it
# lies: right on average. In bits it is short: add 16 random bits to the 32 of
# the float32 number, and cut the lower 16 off.

# %% round by chance
chance = np.random.default_rng(16)


def by_chance(x):
    bits = np.array([x], np.float32).view(np.uint32)
    bits += np.uint32(chance.integers(1 << 16))
    return from_bfloat16((bits >> 16).astype(np.uint16))[0]


runs = [train(lambda x: by_chance(x - np.float32(RATE)), 1) for _ in range(8)]
fig, ax = plt.subplots(figsize=(6, 2.8), dpi=100)
for run in runs:
    ax.plot(run, color=PALETTE["orange"], lw=0.7)
ax.plot(lost, color=PALETTE["purple"], label="to nearest")
ax.plot(single, color=PALETTE["blue"], label="float32 master")
ax.plot([], color=PALETTE["orange"], label="by chance")
ax.set(xlabel="steps", ylabel="parameter")
ax.legend()
fig.tight_layout()
plt.show()
ends = np.array([run[-1] for run in runs])
verdict("by chance", abs(ends.mean() - 0.4) < 0.1, "near 0.4 on average")

# %% [markdown]
# *Figure 3.16.1. A parameter that begins at 1 and is moved by -0.0003 each step.
# Rounded to the nearest it never leaves; rounded by chance it wanders about
# the right line; the master follows it.*
#
# | | masters | by chance |
# |---|---|---|
# | bytes of a parameter | 4, and 2 of its copy | 2 |
# | error of a step | float32's | up to a whole $2^{-7}$, right on average |
# | what it needs | a rounding a step | random numbers, as many as parameters |
# | what a checkpoint holds | the parameters | half of their bits |
#
# We take masters. Four bytes more for each of 124 million parameters are half
# a gigabyte, of which a GPU has many; in return AdamW, clipping, checkpoints,
# and a run that goes on with another backend are what they were. llm.c offers
# both.
#
# The copies are made anew at the beginning of every forward pass. That reads
# and writes six bytes for each parameter, 0.75 GB for 124M: half a millisecond
# of an A100's 1,555 GB/s, in a step that we expect to take over 70. In return
# no copy can be out of date, whoever has written the parameters.
#
# ## What is stored in what
#
# | bfloat16 | float32 |
# |---|---|
# | the copies of the weights | parameters, their gradients, AdamW's averages |
# | activations and the stream | sums of products, scores, softmax |
# | gradients of activations | means, deviations, log-sum-exps, losses |
# | logits and their gradients | the gradients' norm |
#
# bfloat16 has float32's exponents, so hardly anything that float32 holds is
# too small or too large for it, and the loss needs no scaling, as it does with
# float16.
#
# ## Layers of rows
#
# Each of the remaining layers is its equation with `unpack` where a number is
# read and `pack` where one is written; in between all is float32. A lane has
# pairs. First the copies, a thread a pair:


# %% round the parameters tags=["export"] module="cuda.bf16_layers"
@kernel(launch_bounds=256)
def _round(half, wide):
    i = cuda.grid(1)
    if i < half.size:
        half[i] = pack(wide[2 * i], wide[2 * i + 1])


def round_bf16(half, wide):
    """Round a flat device's array of float32 to bfloat16 (uint16)."""
    there = pairs(half)
    _round[-(-there.size // 256), 256](there, wide)


@kernel(launch_bounds=256)
def _widen(wide, half):
    i = cuda.grid(1)
    if i < half.size:
        wide[2 * i], wide[2 * i + 1] = unpack(half[i])


def widen_bf16(wide, half):
    """The float32 numbers of a device's array in bfloat16, flat."""
    there = pairs(half)
    _widen[-(-there.size // 256), 256](wide, there)


# %% [markdown]
# The encoder adds two rows of float32 and rounds once.


# %% the encoder tags=["export"] module="cuda.bf16_layers"
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
    """
    _, T, C = out.shape
    tables = wte.reshape(-1), wpe.reshape(-1)
    grid = -(-out.size // 512)
    _encode[grid, 256](pairs(out), inp.reshape(-1), *tables, T, C)


# %% [markdown]
# LayerNorm has a warp for each row. The gradients of its scale and shift are
# sums over rows, by chunks of 64 as those of a bias.


# %% LayerNorm, forward tags=["export"] module="cuda.bf16_layers"
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
    """
    stats, grid = (mean.reshape(-1), rstd.reshape(-1)), -(-mean.size // 8)
    _normalise[grid, 256](pairs(out), *stats, pairs(inp), weight, bias)


# %% LayerNorm, backward tags=["export"] module="cuda.bf16_layers"
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
    """How many floats layernorm_backward_bf16 wants to work in."""
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


# %% GELU tags=["export"] module="cuda.bf16_layers"
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
    """
    _bend[-(-out.size // 512), 256](pairs(out), pairs(inp))


@shapes("...!, ...~, ...", halves())
def gelu_backward_bf16(dinp, dout, inp, add=True):
    """Add GELU's gradient to dinp, or overwrite dinp, in bfloat16.

    As gelu_forward_bf16; with add=False dinp may be dout itself.
    """
    grid = -(-inp.size // 512)
    _bend_back[grid, 256](pairs(dinp), pairs(dout), pairs(inp), int(add))


# %% [markdown]
# The classifier has a block for each row of logits. It reads the row once, for
# the pair of (3.8.1), its maximum and sum; lanes, warps and the block merge
# their pairs as in [chapter 3.8](08_classifier.ipynb). The columns from V on
# are padding; where V is odd, one pair is half padding.


# %% the classifier, forward tags=["export"] module="cuda.bf16_layers"
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
    """
    flat = losses.reshape(-1), lse.reshape(-1), pairs(logits)
    _losses_of_rows[losses.size, 256](*flat, targets.reshape(-1), V)


# %% the classifier, backward tags=["export"] module="cuda.bf16_layers"
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
    """
    flat = pairs(dlogits), dlosses.reshape(-1), pairs(logits)
    rest = lse.reshape(-1), targets.reshape(-1), V
    _slopes_of_rows[lse.size, 256](*flat, *rest)


# %% [markdown]
# Within a step nobody wants the logits between the two, and one launch does
# both: the row comes from memory once, and is still in a cache when the block
# reads it again to write the gradient in its place.


# %% loss and gradient in one launch tags=["export"] module="cuda.bf16_layers"
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
    """
    flat = losses.reshape(-1), lse.reshape(-1), pairs(logits)
    rest = dlosses.reshape(-1), targets.reshape(-1), V
    _both_of_rows[losses.size, 256](*flat, *rest)


# %% [markdown]
# Each beside the reference's, in float64 on the same rounded numbers. A result may be
# off by its rounding, $2^{-8}$ of it at most, and by a little of float32's.

# %% layers of rows against float64 tags=["fold-input"]
from llmnb import reference
from llmnb.gpu.launch import simulated, to_host
from llmnb.gpu.simulator import watch


def wide(x):
    return (from_bfloat16(x) if x.dtype == "u2" else x).astype(float)


def beside(name, writes, *arrays, V=()):
    """Run a layer and its reference, which write the first arrays."""
    exact = [x if x.dtype == np.int32 else wide(x) for x in arrays]
    there = [simulated(x) for x in arrays]
    getattr(reference, name)(*exact, *V)
    layer, *_, way = name.split("_")
    with watch():
        globals()[f"{name}_bf16"](*there, *V)
    for got, want in zip(there[:writes], exact, strict=False):
        error = np.abs(wide(to_host(got)) - want)
        near = (error <= 2**-8 * np.abs(want) + 1e-5).all()
        verdict(layer, near, f"{way}: within 2**-8")
    return [x.astype(np.float32) for x in exact[:writes]]


draw = np.random.default_rng(316)
x, dy, start = to_bfloat16(draw.normal(size=(3, 1, 9, 24)).astype("f4"))
rows, tables = draw.normal(size=(4, 24)), draw.normal(size=(2, 11, 24))
w, b, dw, db, wte, wpe = (a.astype("f4") for a in (*rows, *tables))
ids, numbers = draw.integers(0, 11, (1, 9), np.int32), np.ones((2, 1, 9), "f4")
_, *stats = beside("layernorm_forward", 3, start, *numbers, x, w, b)
beside("layernorm_backward", 3, start, dw, db, dy, x, w, *stats)
beside("gelu_forward", 1, start, x)
beside("gelu_backward", 1, start, dy, x)
beside("encoder_forward", 1, start, ids, wte, wpe)
forward, backward = (f"crossentropy_softmax_{x}ward" for x in ("for", "back"))
_, lse = beside(forward, 2, *numbers, x, ids, V=(11,))
_ = beside(backward, 1, start, numbers[0] / 3, x, lse, ids, V=(11,))

# %% [markdown]
# ## The backend
#
# The model stays as it is. A backend decides what its memory is, and hands
# over its layers ([chapter A.13](../appendix/13_backend.ipynb)); so bfloat16
# is a backend, made of that of [chapter 3.11](11_step.ipynb). In its memory
# the activations are halves but for the statistics, and there is a group of
# copies beside the parameters. A layer finds the copy at the weight's own
# offset from the beginning, and in the same way attention finds the place for
# what rounding leaves of its output. That goes for the linear layers and the
# classifier; the encoder reads the masters themselves, as LayerNorms and
# biases are read. The encoder's backward pass is that of float32: the buffer
# `stream` is for the gradient that it wants, widened from bfloat16. A Llama's
# layers in bfloat16 come in [chapter 5.12](../5_modern/12_bfloat16.ipynb), and
# the backend takes them too; what no chapter has is `MISSING`. The instructions
# of [chapter 3.13](13_tensor_cores.ipynb) begin with the A100, of NVIDIA's
# generation 8.0: a T4, 7.5, has none of them, and is told so.

# %% imports of the backend tags=["export"]
from functools import partial

import numpy as np

from llmnb.arena import Arena
from llmnb.cuda import bf16_attention, bf16_layers, bf16_matmul, model
from llmnb.cuda.bf16_layers import round_bf16, widen_bf16
from llmnb.gpu.launch import address, missing
from llmnb.gpu.toolkit import numba_cuda
from llmnb.reference.bfloat16 import from_bfloat16

# %% the memory tags=["exporti"]
# activations that stay float32, by how their names end
STATISTICS = "mean", "rstd", "lse", "losses"
# groups that are halves otherwise
HALVES = "acts", "dacts", "logits", "block"


def _half_layout(layout):
    """A model's groups, activations in bfloat16, with copies of weights."""
    (kind, weights), acts = layout["params"], layout["acts"][1]
    stats = {n: x for n, x in acts.items() if n.endswith(STATISTICS)}
    stream = {"stream": layout["dacts"][1]["dstream"]}
    found = {"copies": (np.uint16, weights), "stats": (kind, stats | stream)}
    found["rests"] = np.uint16, {"atty": acts["atty"]}
    for group, (kind, named, *over) in layout.items():
        if group in HALVES:
            kind = np.uint16
            named = {n: x for n, x in named.items() if n not in stats}
        found[group] = kind, named, *over
    return found


class _HalfArena(Arena):
    """The statistics answer among the activations that they belong to."""

    def __getitem__(self, group):
        found = super().__getitem__(group)
        if group == "acts":
            return found | super().__getitem__("stats")
        return found


# %% attention's layers tags=["exporti"]
def _twin(array, whole, twins):
    """What lies among the twins where the array lies in the whole."""
    start = (address(array) - address(whole)) // array.dtype.itemsize
    return twins[start : start + array.size].reshape(*array.shape)


def _half_attention(ops, memory):
    """Give attention the place for what rounding leaves of its output."""
    forward, backward = ops.attention_forward, ops.attention_backward
    outputs, rests = memory["acts"]["atty"], memory.flat("rests")

    def attention(out, lse, inp):
        forward(out, lse, inp, _twin(out, outputs, rests))

    def attention_back(dinp, dout, inp, out, lse, add=True):
        rest = _twin(out, outputs, rests)
        backward(dinp, dout, inp, out, lse, add, rest=rest)

    ops.attention_forward, ops.attention_backward = attention, attention_back


# %% the layers tags=["exporti"]
def _half_layers(ops, memory):
    """Put the layers in bfloat16 into ops, under the names of the others."""
    for name, layer in [*vars(ops).items()]:
        if name.endswith("_bf16"):
            setattr(ops, name.removesuffix("_bf16"), layer)
    masters, copies = memory.flat("params"), memory.flat("copies")
    stream = memory["stats"]["stream"]
    encode_back, embed_back = ops.encoder_backward, ops.embedding_backward
    forward, backward = ops.matmul_forward, ops.matmul_backward

    def copy(weight):
        return _twin(weight, masters, copies)

    def first(layer, *arrays):
        round_bf16(copies, masters)
        layer(*arrays)

    def widened(dout):
        widen_bf16(stream.reshape(-1), dout)
        return stream

    def last(dwte, dwpe, dout, inp):
        encode_back(dwte, dwpe, widened(dout), inp)

    def last_of_llama(dwte, dout, inp, scale):
        embed_back(dwte, widened(dout), inp, scale)

    def product(out, inp, weight, bias, residual=None):
        forward(out, inp, copy(weight), bias, residual)

    def product_back(dinp, dweight, dbias, dout, inp, weight, *rest, **more):
        given = dinp, dweight, dbias, dout, inp
        backward(*given, copy(weight), *rest, **more)

    ops.encoder_forward = partial(first, ops.encoder_forward)
    ops.embedding_forward = partial(first, ops.embedding_forward)
    ops.encoder_backward, ops.embedding_backward = last, last_of_llama
    ops.matmul_forward, ops.matmul_backward = product, product_back
    _half_attention(ops, memory)


# %% the backend tags=["export"]
# what a model may ask for that has no layer in bfloat16
MISSING = (
    "qk_norm", "post_norms", "window", "attention_scale",
    "attention_softcap", "final_softcap",
)  # fmt: skip


def _check_generation():
    """Raise ValueError for a GPU whose tensor cores take no bfloat16."""
    if missing():
        return
    found = numba_cuda().get_current_device().compute_capability
    if tuple(found) < (8, 0):
        raise ValueError(
            "GPT2: precision 'bf16' needs a GPU of generation 8.0 or later, "
            f"and this is {'.'.join(map(str, found))}; take 'fp32'"
        )


class HalfBackend(model.Backend):
    """A GPU that trains in bfloat16: float32 parameters, halves elsewhere.

    For GPT-2's layers and those of chapter 5.12. Raises ValueError for a
    GPU before generation 8.0, for a model that has other layers, for
    channels that are no multiple of 8 and heads that tensor cores do not
    take.
    """

    def groups(self, cfg, batch_size, seq_len):
        """Scratch memory for the layers, and a place for AdamW's settings."""
        _check_generation()
        for name in MISSING:
            if getattr(cfg, name, None):
                raise ValueError(
                    f"GPT2: precision 'bf16' on a GPU has no layer for {name} "
                    f"= {getattr(cfg, name)!r}, which this {cfg.family!r} "
                    "has; take 'fp32' or 'tf32'"
                )
        bf16_matmul.check_eights("GPT2: channels", cfg.channels)
        hidden = getattr(cfg, "hidden", 4 * cfg.channels)
        bf16_matmul.check_eights("GPT2: hidden", hidden)
        if cfg.head_size not in bf16_attention.WIDTHS:
            raise ValueError(
                "GPT2: precision 'bf16' on a GPU takes heads of "
                f"{bf16_attention.WIDTHS} channels, got {cfg.head_size}"
            )
        B, T, C = batch_size, seq_len, cfg.channels
        heads = cfg.num_heads, cfg.num_kv_heads, cfg.head_size
        found = super().groups(cfg, B, T)
        floats = (
            found["work"][1]["floats"][0],
            bf16_layers.layernorm_scratch_bf16(B * T, C),
            bf16_attention.attention_scratch_bf16(B, T, *heads),
        )
        return found | {"work": (np.float32, {"floats": (max(floats),)})}

    def allocate(self, layout, needed):
        """An Arena on the GPU, and the layers that work in it."""
        memory = _HalfArena(_half_layout(layout), model.zeros)
        self._work = memory["work"]["floats"]
        self.ops = model.model_layers(self.ops, self._work)
        _half_layers(self.ops, memory)
        self._classifier = model.Classifier(self.ops)
        return memory

    def floats(self, array):
        """The host's float32 copy of an array in bfloat16."""
        return from_bfloat16(np.asarray(array))


# %% which backend for a precision tags=["export"]
PRECISE = {"bf16": HalfBackend}  # where it is not `Backend`

# %% [markdown]
# Its layers are our own, down to the products, so no library is asked for.
#
# ## Ten steps
#
# A GPT-2 of one block learns ten steps on the simulator, and the same model in
# float32 on the host, from the same weights and on the same batch:

# %% ten steps beside float32
tiny = GPT2Config(
    max_seq_len=16, vocab_size=61, num_layers=1, num_heads=2, channels=32
)
tokens = np.random.default_rng(3).integers(0, 61, (2, 1, 16))


def ten_losses(**how):
    model = GPT2(tiny, 1, 16, seed=7, **how)
    return [
        model.step(*tokens, 1.0, learning_rate=1e-2, step=s)[0]
        for s in range(1, 11)
    ]


os.environ["LLMNB_CUDA"] = "simulator"
half = np.array(ten_losses(backend="cuda", precision="bf16"))
whole = np.array(ten_losses(backend="cpu"))
fig, ax = plt.subplots(figsize=(5, 2.6), dpi=100)
ax.plot(range(1, 11), whole, "o-", color=PALETTE["blue"], label="float32")
ax.plot(range(1, 11), half, "x--", color=PALETTE["orange"], label="bfloat16")
ax.set(xlabel="step", ylabel="loss")
ax.legend()
fig.tight_layout()
plt.show()
verdict("ten steps", abs(half - whole).max() < 2e-2, "within 0.02 of float32")
verdict("it learns", half[-1] < half[0] - 1, "by more than 1")

# %% [markdown]
# *Figure 3.16.2. The loss of ten steps. The two lie on each other.*
#
# ## Prediction
#
# A step of GPT-2 124M at B = 16 and T = 1,024 is 13.2 TFLOP by (1.4.2). At
# 60 % of an A100's 312 TFLOP/s in bfloat16 its products and attention would
# take 70 ms, where 60 % of float32's 19.5 TFLOP/s take 1,120. Not measured, as
# said in [chapter 3.13](13_tensor_cores.ipynb).
#
# What can be counted without a GPU: all of such a model lies in one block of
# 7.5 GB, to which a test holds it, where float32's, with our own products, has
# 11.5. The activations halve; parameters, gradients and averages stay 16 bytes
# for each parameter, and the copies add 2. A step is one graph still, without
# an allocation; the same test counts that on a driver that stands in for
# NVIDIA's.
#
# ## Take away
#
# - Eight significant bits do for activations, whose errors go up and down. A
#   parameter that moves by less than half of the distance to its neighbour
#   does not move at all.
# - A float32 master follows each step; rounding by chance is right on average
#   and costs two bytes instead of six.
# - Sums, statistics, losses and the norm are float32. A loss needs no scaling,
#   for bfloat16 has float32's exponents.

# %% [markdown]
# ## Design note
#
# The stream, to which every half block adds, is bfloat16 here, as in llm.c. In
# PyTorch's mixed precision it is float32, for four bytes a number; a deep
# model should be the better for it. The gradients of the weights stay float32:
# that is where micro-batches are added up.
#
# cuBLASLt's products with GELU or its gradient at their end save a few passes
# over memory. [Chapter 3.7](07_cublas.ipynb) has them in float32, untried; in
# bfloat16 the bias and its gradient would be rounded there as well.

# %% [markdown]
# ## Exercises
#
# **1** (★★). Around which value of a parameter does a step of 0.0003 begin to
# be lost, if it is rounded to the nearest bfloat16?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# Below 0.125 neighbours are at most $2^{-11}$ apart, 0.00049, and a step
# downwards of more than half of that leaves. From 0.125 on they are $2^{-10}$
# apart. The first number that stays is just above 0.125, and 0.125 itself
# leaves, for its lower neighbour is nearer.
# :::

# %% exercise 1, where it begins tags=["hide-cell"]
begins = 0.125

# %% exercise 1, checked
every = from_bfloat16(np.arange(0x3D00, 0x3F80, dtype=np.uint16))  # to 1
moved = [nearest(x - np.float32(RATE)) != x for x in every]
verdict("up to it", all(np.array(moved)[every <= begins]), "all leave")
verdict("above it", not any(np.array(moved)[every > begins]), "all stay")

# %% [markdown]
# ## Further reading
#
# - Micikevicius et al. (2018),
#   [Mixed Precision Training](https://arxiv.org/abs/1710.03740): masters, and
#   the scaling of losses that float16 needs.
# - Gupta et al. (2015),
#   [Deep Learning with Limited Numerical Precision](https://arxiv.org/abs/1502.02551):
#   rounding by chance.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("3.16")
