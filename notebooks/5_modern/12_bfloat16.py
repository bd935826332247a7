# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       cuda.bf16_modern: "The layers of a Llama in bfloat16 on a GPU."
# ---

# %% [markdown]
# # Llama in bfloat16: four layers more
#
# > RMSNorm, rotations, gates and token vectors, read and written in bfloat16,
# > computed in float32. Products, attention and classifier are there already.
#
# *Reading time: 10 minutes. You need: training in bfloat16 ([chapter
# 3.16](../3_gpu/16_bf16_training.ipynb)), RMSNorm ([chapter
# 5.1](01_rmsnorm.ipynb)), rotations ([chapter 5.2](02_rotary.ipynb)), gates
# ([chapter 5.3](03_gated.ipynb)) and what makes a Llama ([chapter
# 5.5](05_architectures.ipynb)).*

# %% [markdown]
# ## Where we are
#
# [Chapter 3.16](../3_gpu/16_bf16_training.ipynb) trains a GPT-2 on a GPU with
# activations in bfloat16 and parameters in float32. A Llama has the same
# products, and its attention is chapter 3.15's, with fewer heads of keys than
# of queries. Four layers differ. At the end of this chapter you can
#
# - turn pairs of channels where a word of memory holds one half of each of two pairs;
# - say how often a query is rounded on its way to a score;
# - train a Llama with `backend="cuda", precision="bf16"`.

# %% [markdown]
# ## Setup

# %% setup
import os

import matplotlib.pyplot as plt

from llmnb import GPT2, reference
from llmnb.book.diagram import PALETTE
from llmnb.book.verify import verdict
from llmnb.gpu.launch import empty, simulated, to_host
from llmnb.gpu.simulator import watch
from llmnb.model.architectures import LlamaConfig, Qwen3Config
from llmnb.reference.bfloat16 import from_bfloat16, to_bfloat16
from llmnb.reference.rotary import rope_table

# %% imports tags=["export"]
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

# %% [markdown]
# ## RMSNorm
#
# It is chapter 3.16's LayerNorm without the mean and the shift: a warp for each
# row, and a lane takes pairs. The sum of squares, the root and the factor are
# float32; the row is rounded once, when it is written. `unpack` makes two float32
# numbers of a word of 32 bits, and `pack` rounds two and makes a word of them
# ([chapter 3.13](../3_gpu/13_tensor_cores.ipynb)). Eight must divide the number of
# channels, as all layers in bfloat16 have it.


# %% RMSNorm, forward tags=["export"]
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
    """
    arrays = pairs(out), rstd.reshape(-1), pairs(inp), weight
    numbers = np.float32(eps), np.float32(offset)
    _normalise[-(-rstd.size // 8), 256](*arrays, *numbers)


# %% [markdown]
# Backward, the rows get their gradient from a warp each. The gradient of the
# weight is a sum over rows, in chunks of 64, each chunk in a row of its own
# of scratch memory, as for a bias. So it has one order.


# %% RMSNorm, backward tags=["export"]
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
    """How many floats rmsnorm_backward_bf16 wants to work in."""
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
    """
    rows, C = rstd.size, weight.size
    wanted = rmsnorm_scratch_bf16(rows, C)
    work = given_work("rmsnorm_backward_bf16", work, wanted, rstd)
    flat, dy, x = rstd.reshape(-1), pairs(dout), pairs(inp)
    how, chunks = (np.float32(offset), int(add)), -(-rows // CHUNK)
    _back_rows[-(-rows // 8), 256](pairs(dinp), dy, x, weight, flat, *how)
    _back_columns[(-(-C // 256), chunks), 128](work, dy, x, flat, C)
    add_chunks[-(-C // 128), 128](dweight, work, chunks, 1)


# %% [markdown]
# ## Rotations
#
# Channel $i$ of a head turns with channel $i + hs/2$. A word of 32 bits holds
# two neighbours, $i$ and $i + 1$, and the word half a head further on holds
# their two partners. A thread takes both words and turns two pairs, each by
# its own angle.
#
# The products have rounded queries and keys once, and here they are rounded
# again, in place. Turning inside the product's end would save the second
# rounding and a pass over memory; it would also make the product know of
# heads and positions.


# %% rotary tags=["export"]
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
    """
    _turn_pairs("rotary_forward_bf16", x, table, heads, first, 1)


@shapes("B T W!, R hs", halves("table"))
def rotary_backward_bf16(dx, table, heads, first=0):
    """Turn the gradients back, in place; arguments: as rotary_forward_bf16."""
    _turn_pairs("rotary_backward_bf16", dx, table, heads, first, -1)


# %% [markdown]
# ## Gates
#
# The gate's bend and its slope are [chapter 5.3](03_gated.ipynb)'s functions
# of one number, in float32. A thread takes a word of gates and the word of values H
# channels further on. Forward it writes one word, both values times their bent
# gates. Backward it reads the gradient of that word, and writes one of gates and
# one of values, by (5.3.6). As in chapter 5.3 the kernels are made around a bend, so
# SwiGLU and GeGLU are each two functions that launch them, with the arguments known
# from there.


# %% kernels around a bend tags=["export", "fold-input"]
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
    """
    _gate(_swiglu, out, inp)


@shapes("B T 2H!, B T H, B T 2H", halves())
def swiglu_backward_bf16(dinp, dout, inp):
    """SwiGLU's gradient in bfloat16, uint16; as swiglu_backward.

    8 divides H. Raises TypeError or ValueError before it launches anything.
    """
    _gate(_swiglu_back, dinp, dout, inp)


@shapes("B T H!, B T 2H", halves())
def geglu_forward_bf16(out, inp):
    """GeGLU in bfloat16, uint16; as geglu_forward, where 8 divides H.

    Raises TypeError or ValueError before it launches anything.
    """
    _gate(_geglu, out, inp)


@shapes("B T 2H!, B T H, B T 2H", halves())
def geglu_backward_bf16(dinp, dout, inp):
    """GeGLU's gradient in bfloat16, uint16; as geglu_backward.

    8 divides H. Raises TypeError or ValueError before it launches anything.
    """
    _gate(_geglu_back, dinp, dout, inp)


# %% [markdown]
# ## Token vectors
#
# They are read from the float32 masters, scaled where a Gemma wants it, and
# rounded once. Backward there is nothing new: the stream's gradient is widened to
# float32, and the function of chapter 5.5 adds its rows to the masters' gradient.


# %% token vectors tags=["export"]
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
    """
    places, table = inp.reshape(-1), wte.reshape(-1)
    how = np.float32(scale), out.shape[2]
    _embed[-(-out.size // 512), 256](pairs(out), places, table, *how)


# %% [markdown]
# The verdict, against the reference in float64 on the same rounded numbers. A
# result is off by its own rounding, $2^{-8}$ of each element at most, and by
# float32's errors before it, for which there is a little room:

# %% against the reference
draw = np.random.default_rng(12)
B, T, H, hs = 1, 5, 24, 16


def half(*shape):
    return to_bfloat16(draw.normal(size=shape).astype(np.float32))


def wide(x):
    return from_bfloat16(x).astype(np.float64)


def check(name, got, want):
    error = np.abs(wide(to_host(got)) - want)
    near = (error <= 2**-8 * np.abs(want) + 1e-6).all()
    verdict(name, near, "within 2**-8 of float64")


x, gates = half(B, T, 2 * hs), half(B, T, 2 * H)
weight = draw.normal(size=2 * hs).astype(np.float32)
want, rstd = np.empty((B, T, 2 * hs)), np.empty((B, T))
reference.rmsnorm_forward(want, rstd, wide(x), weight.astype(float), 0.1, 1.0)
out, there = empty(x.shape, np.uint16), (simulated(x), simulated(weight))
with watch():
    rmsnorm_forward_bf16(out, empty((B, T)), *there, 0.1, 1.0)
check("RMSNorm", out, want)

table, want, there = rope_table(T, hs, 10000), wide(x), simulated(x)
reference.rotary_forward(want, table, 1)
with watch():
    rotary_forward_bf16(there, simulated(table.astype(np.float32)), 1)
check("rotary", there, want)

want, out = np.empty((B, T, H)), empty((B, T, H), np.uint16)
for name, layer in (
    ("SwiGLU", swiglu_forward_bf16),
    ("GeGLU", geglu_forward_bf16),
):
    getattr(reference, f"{name.lower()}_forward")(want, wide(gates))
    with watch():
        layer(out, simulated(gates))
    check(name, out, want)

ids = draw.integers(0, 9, (B, T), dtype=np.int32)
wte, out = draw.normal(size=(9, H)).astype(np.float32), empty((B, T, H), "u2")
with watch():
    embedding_forward_bf16(out, simulated(ids), simulated(wte), 3.0)
check("token vectors", out, 3.0 * wte[ids].astype(float))

# %% [markdown]
# ## A Llama in the backend
#
# The backend of chapter 3.16 takes a Llama, a Mistral without a window, and a
# Gemma of the first kind: whatever is made of these layers, with heads of 16,
# 32 or 64 channels. A norm of queries and keys, a window, a norm after each
# half and soft caps have no layer in bfloat16, and a model with one of those
# is refused by name. So are the heads of 128 and 256 channels that the larger
# Llamas and Gemmas have (chapter 3.15).

# %% what is refused
os.environ["LLMNB_CUDA"] = "simulator"
sizes = {"max_seq_len": 16, "vocab_size": 61, "num_layers": 1}
sizes |= {"num_heads": 2, "channels": 32, "num_kv_heads": 1, "hidden": 64}
try:
    GPT2(Qwen3Config(**sizes), 1, 8, "cuda", "bf16")
    verdict("Qwen 3", False, "is refused")
except ValueError as error:
    print(error)

# %% [markdown]
# Ten steps, as in chapter 3.16: on the simulator in bfloat16, and on the host
# in float32, from the same weights and on the same batch.


# %% ten steps beside float32
def ten_losses(count, backend, precision="fp32", rounded=False):
    """On count tokens; rounded: from weights that bfloat16 can hold."""
    tokens = np.random.default_rng(3).integers(0, 61, (2, 1, count))
    how = {"backend": backend, "precision": precision, "seed": 7}
    model = GPT2(LlamaConfig(**sizes), 1, count, **how)
    for x in model.params.values() if rounded else ():
        x[...] = from_bfloat16(to_bfloat16(x))
    steps = [
        model.step(*tokens, 1.0, learning_rate=1e-2, step=s)[0]
        for s in range(1, 11)
    ]
    return np.array(steps)


narrow = ten_losses(16, "cuda", "bf16")
whole = ten_losses(16, "cpu")
fig, ax = plt.subplots(figsize=(5, 2.6), dpi=100)
ax.plot(range(1, 11), whole, "o-", color=PALETTE["blue"], label="float32")
ax.plot(range(1, 11), narrow, "x--", color=PALETTE["orange"], label="bfloat16")
ax.set(xlabel="step", ylabel="loss, nats a token")
ax.legend()
fig.tight_layout()
plt.show()
verdict("ten steps", abs(narrow - whole).max() < 2e-2, "within 0.02")
verdict("it learns", narrow[-1] < narrow[0] - 1, "by more than 1")

# %% [markdown]
# *Figure 5.12.1. The loss of ten steps of a Llama of one block, two heads of
# queries and one of keys and values. The curves part by less than 0.02.*
#
# With five tokens in place of 16 the two part by more. But so do two float32
# models there, of which one begins with its weights rounded to bfloat16: a rate of
# 0.01 is large for so few tokens.

# %% ten steps on five tokens
whole = ten_losses(5, "cpu")
others = {
    "bfloat16": ten_losses(5, "cuda", "bf16"),
    "float32, rounded": ten_losses(5, "cpu", rounded=True),
}
for name, losses in others.items():
    apart = np.abs(losses - whole).max()
    verdict(name, 0.02 < apart < 0.1, "parts by some hundredths")

# %% [markdown]
# No GPU has run these kernels. They have been simulated, with every access
# checked, and compiled.

# %% [markdown]
# ## Take away
#
# - A layer in bfloat16 is the layer in float32 between an `unpack` and a
#   `pack`; what differs is only who holds which pair.
# - Queries and keys are rounded twice, as products and once turned.
# - A model is refused for the layer that is missing, not for its name.

# %% [markdown]
# ## Design note
#
# Each of these layers is a pass over memory of its own. A norm could be part of
# the product that follows, a gate part of the product before it. With the
# kernels apart, each can be held against its equation.

# %% [markdown]
# ## Exercises
#
# **1** (★). How many bytes does SwiGLU move for a row of H channels, forward,
# in bfloat16 and in float32?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# It reads 2 H numbers and writes H: 6 H bytes in bfloat16, 12 H in float32.
# :::

# %% exercise 1, checked tags=["hide-cell"]
from llmnb.cuda.gated import swiglu_forward

for name, run, x, each in (
    ("1: bfloat16", swiglu_forward_bf16, gates, 6),
    ("1: float32", swiglu_forward, wide(gates).astype(np.float32), 12),
):
    y, x = empty((B, T, H), x.dtype), simulated(x)
    with watch() as seen:
        run(y, x)
    moved = (seen.read_bytes + seen.written_bytes) / (B * T * H)
    verdict(name, moved == each, f"{each} H bytes")

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("5.12")
