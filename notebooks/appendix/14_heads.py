# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       cpu.headnorm: "Norms of heads, compiled for the processor's cores."
#       cpu.softcap: "Soft caps of logits, compiled for the processor's cores."
#       cuda.headnorm: "Norms of heads on a GPU, forward and backward."
#       cuda.softcap: "Soft caps of scores and logits on a GPU."
# ---

# %% [markdown]
# # Norms of heads and soft caps: their kernels
#
# > Two small layers of chapter 5.4, compiled for the processor's cores and for a
# > GPU.
#
# *Reading time: 24 minutes. You need:
# [chapter 5.4](../5_modern/04_attention.ipynb), chapters
# [2.2](../2_cpu/02_rows.ipynb) and [3.4](../3_gpu/04_layernorm.ipynb).*

# %% [markdown]
# ## Where we are
#
# [Chapter 5.4](../5_modern/04_attention.ipynb) derives the norms of queries and
# keys and the soft cap of the logits. Their kernels hold no new idea, and so they
# stand here. At the end of this chapter you can
#
# - say in which order the gradient of a weight is summed that all heads share;
# - say why a gradient may be written over the numbers that it is computed from.

# %% setup
from types import SimpleNamespace

import numba
import numpy as np

from llmnb import reference
from llmnb.book.verify import compare, verdict

rng = np.random.default_rng(14)


def heads_problem(B, T, NH, NKV, hs):
    p = SimpleNamespace(rstd=np.zeros((B, T, NH + NKV), "f4"))
    width = (NH + 2 * NKV) * hs
    p.inp, p.dout = rng.normal(size=(2, B, T, width)).astype("f4")
    p.qweight, p.kweight = rng.normal(size=(2, hs)).astype("f4")
    p.dqweight, p.dkweight = np.zeros((2, hs), "f4")
    p.out, p.dinp = np.zeros_like(p.inp), p.dout.copy()
    return p


def both_ways(layer, p):
    weights = p.qweight, p.kweight
    layer.headnorm_forward(p.out, p.rstd, p.inp, *weights, offset=1.0)
    grads = p.dinp, p.dqweight, p.dkweight
    layer.headnorm_backward(*grads, p.inp, *weights, p.rstd, offset=1.0)


# %% [markdown]
# ## Norms of heads on a CPU
#
# A row of queries, keys and values is a row of heads. The kernel goes over those
# that have a norm, with one weight for all queries and another for all keys, and
# copies the values. Threads share out the rows.

# %% imports of the CPU's norms tags=["export"] module="cpu.headnorm"
import math

import numpy as np

from llmnb.backend import noted
from llmnb.cpu.jit import arguments, share, team
from llmnb.cpu.layernorm import add_rows
from llmnb.reference.local import key_heads
from llmnb.shapes import shapes


# %% norms of heads, the kernels tags=["exporti"] module="cpu.headnorm"
@team
def _headnorm_forward(part, parts, address):
    out, rstd, inp, qweight, kweight, NKV, eps, offset = arguments(address)
    (rows, _, hs), number = inp.shape, inp.dtype.type
    one, shift, small = number(1), number(offset), number(eps)
    mine, normed = share(rows, part, parts), rstd.shape[1]
    for n in range(mine.start, mine.stop):
        for h in range(normed):
            x, y, squares = inp[n, h], out[n, h], number(0)
            for i in range(hs):
                squares += x[i] * x[i]
            r = one / math.sqrt(squares / number(hs) + small)
            weight = qweight if h < normed - NKV else kweight
            for i in range(hs):
                y[i] = x[i] * r * (weight[i] + shift)
            rstd[n, h] = r
        out[n, normed:] = inp[n, normed:]


@team
def _headnorm_backward(part, parts, address):
    dinp, dw, inp, qweight, kweight, rstd, offset = arguments(address)
    (rows, heads, hs), number = inp.shape, inp.dtype.type
    normed, shift = rstd.shape[1], number(offset)
    queries = 2 * normed - heads
    mine = share(len(dw), part, parts)
    for k in range(mine.start, mine.stop):
        some = share(rows, k, len(dw))
        dw[k] = 0
        for n in range(some.start, some.stop):
            for h in range(normed):
                which = 0 if h < queries else 1
                weight = qweight if h < queries else kweight
                x, dx, r, mean = inp[n, h], dinp[n, h], rstd[n, h], number(0)
                for i in range(hs):
                    mean += dx[i] * (weight[i] + shift) * x[i]
                mean *= r / number(hs)
                for i in range(hs):
                    hat, dhat = x[i] * r, dx[i] * (weight[i] + shift)
                    dw[k, which, i] += dx[i] * hat
                    dx[i] = r * (dhat - hat * mean)


# %% [markdown]
# All heads add to the same `hs` numbers of $dw$. The rows are cut into parts whose
# number follows from the rows and not from the threads; each part sums its own, in
# the order of rows and heads, and the sums of the parts are added last.


# %% norms of heads, compiled tags=["export"] module="cpu.headnorm"
@shapes(
    "B T QKV!, B T N!, B T QKV, hs, hs", eps="above 0", offset="at least 0"
)
def headnorm_forward(out, rstd, inp, qweight, kweight, eps=1e-6, offset=0.0):
    """RMSNorm over the channels of each head of queries and of keys.

    out, inp: (B, T, (NH + 2 NKV) * hs); values are copied. rstd: (B, T,
    NH + NKV), saved for the backward pass. qweight, kweight: (hs,), used
    for all heads. eps, offset: as for rmsnorm_forward. All float32 or all
    float64 and C-contiguous; out and rstd are overwritten. Raises TypeError
    or ValueError before it computes anything.
    """
    hs = qweight.size
    NKV = key_heads("headnorm_forward", inp, rstd, hs)
    y, x = (a.reshape(-1, a.shape[2] // hs, hs) for a in (out, inp))
    arrays = y, rstd.reshape(-1, rstd.shape[2]), x, qweight, kweight
    _headnorm_forward(*arrays, NKV, float(eps), float(offset))


@shapes("B T QKV!, hs!, hs!, B T QKV, hs, hs, B T N", offset="at least 0")
def headnorm_backward(
    dinp, dqweight, dkweight, inp, qweight, kweight, rstd, offset=0.0
):
    """Take the gradient of headnorm_forward's output to its input, in place.

    dinp: (B, T, (NH + 2 NKV) * hs) holds the gradient of the output and
    receives that of the input. dqweight, dkweight: (hs,), added to. inp,
    qweight, kweight, rstd, offset: as in the forward pass. All float32 or
    all float64 and C-contiguous. Raises TypeError or ValueError before it
    computes anything.
    """
    hs = qweight.size
    key_heads("headnorm_backward", inp, rstd, hs)
    dx, x = (a.reshape(-1, a.shape[2] // hs, hs) for a in (dinp, inp))
    sums = np.empty((min(64, -(-len(x) // 16)), 2, hs), inp.dtype)
    stats = rstd.reshape(-1, rstd.shape[2])
    _headnorm_backward(dx, sums, x, qweight, kweight, stats, float(offset))
    noted(add_rows, dqweight, sums[:, 0])
    noted(add_rows, dkweight, sums[:, 1])


# %% equal to NumPy's, whoever does it
from llmnb import cpu

p, threads = heads_problem(2, 37, 6, 2, 20), numba.get_num_threads()
names = "out", "dinp", "dqweight", "dkweight"
found = []
for layer, count in ((reference, 1), (cpu, 1), (cpu, threads)):
    numba.set_num_threads(count)
    p.dinp[...], p.dqweight[...], p.dkweight[...] = p.dout, 0, 0
    both_ways(layer, p)
    found.append([getattr(p, name).copy() for name in names])
for name, want, got in zip(names, *found[:2], strict=True):
    compare(name, got, want, tol=2e-5)
same = all(np.array_equal(x, y) for x, y in zip(*found[1:], strict=True))
verdict("threads", same, "change no bit")

# %% [markdown]
# ## Soft caps on a CPU
#
# The tangent is `fast_tanh` of [chapter 2.2](../2_cpu/02_rows.ipynb), made of the
# fast exponential. The gradient may be written over the logits: at each place the
# logit is read before its gradient is written, and that of the target, which is
# needed once more at the end of the row, is read before the row begins.

# %% imports of the CPU's caps tags=["export"] module="cpu.softcap"
from llmnb.cpu.jit import arguments, share, team
from llmnb.cpu.math import fast_exp, fast_tanh
from llmnb.shapes import COMPILED, shapes


# %% the kernels of the caps tags=["exporti"] module="cpu.softcap"
@team
def _softcap(part, parts, address):
    x, softcap = arguments(address)
    cap, mine = x.dtype.type(softcap), share(x.size, part, parts)
    for i in range(mine.start, mine.stop):
        x[i] = cap * fast_tanh(x[i] / cap)


@team
def _capped_backward(part, parts, address):
    dlogits, dlosses, logits, lse, targets, V, softcap = arguments(address)
    number, mine = logits.dtype.type, share(len(logits), part, parts)
    one, cap = number(1), number(softcap)
    for n in range(mine.start, mine.stop):
        scale, shift, k = dlosses[n], lse[n], targets[n]
        t = logits[n, k] / cap
        hit = scale * (one - t * t)
        for i in range(V):
            t = logits[n, i] / cap
            slope = scale * (one - t * t)
            dlogits[n, i] = slope * fast_exp(logits[n, i] - shift)
        dlogits[n, k] -= hit
        dlogits[n, V:] = 0


# %% soft caps, compiled tags=["export"] module="cpu.softcap"
@shapes("B T Vp!", softcap="above 0")
def softcap_forward(x, softcap):
    """Turn each logit x into c tanh(x / c), in place; softcap: c.

    x: (B, T, Vp), float32 or float64, C-contiguous. Raises TypeError or
    ValueError before it computes anything.
    """
    _softcap(x.reshape(-1), float(softcap))


@shapes(
    "B T Vp!, B T, B T Vp~, B T, B T of V, 1 to Vp", COMPILED,
    softcap="above 0",
)  # fmt: skip
def capped_crossentropy_backward(
    dlogits, dlosses, logits, lse, targets, V, softcap
):
    """Write the gradient of the losses by the logits before their cap.

    dlogits: (B, T, Vp), overwritten; it may be `logits` itself, which then
    is lost. logits: float32 or float64, after the cap. dlosses, lse: (B,
    T), lse from the forward pass. targets: int32 (B, T). Columns from V on
    receive 0. Raises TypeError or ValueError before it computes anything.
    """
    arrays = dlogits, dlosses, logits, lse, targets
    rows = [x.reshape(-1, *x.shape[2:]) for x in arrays]
    _capped_backward(*rows, V, float(softcap))


# %% the cap and its gradient against NumPy's
def capped(layer, place=np.array):
    """The capped logits, and the gradient, written over them."""
    rows = np.random.default_rng(1)
    x = place(9 * rows.normal(size=(2, 5, 50)).astype("f4"))
    lse, d = (place(rows.normal(size=(2, 5)).astype("f4")) for _ in "ab")
    targets = place(rows.integers(0, 47, (2, 5)).astype(np.int32))
    layer.softcap_forward(x, 4.0)
    kept = np.array(x)
    layer.capped_crossentropy_backward(x, d, x, lse, targets, 47, 4.0)
    return kept, np.array(x)


want = capped(reference)
for name, got, x in zip(
    ("capped", "gradient"), capped(cpu), want, strict=True
):
    compare(name, got, x, tol=1e-5)

# %% [markdown]
# ## Norms of heads on a GPU
#
# A warp takes a head of a position, so its sum of squares takes five exchanges.

# %% imports of the GPU's norms tags=["export"] module="cuda.headnorm"
import functools
import math

import numpy as np

from llmnb.gpu.launch import DEVICE, given_work, kernel
from llmnb.gpu.simulator import cuda
from llmnb.gpu.warp import warp_sum
from llmnb.reference.local import key_heads
from llmnb.shapes import shapes

ZERO, ONE = np.float32(0), np.float32(1)


# %% norms of heads, a warp a head tags=["exporti"] module="cuda.headnorm"
@kernel(launch_bounds=256)
def _headnorm_forward(out, rstd, inp, qweight, kweight, NKV, eps, offset):
    item, lane = cuda.grid(1) // 32, cuda.threadIdx.x % 32
    (rows, heads, hs), normed = inp.shape, rstd.shape[1]
    n, h = item // heads, item % heads
    if n >= rows:  # the whole warp leaves, so exchanges stay complete
        return
    r, squares = ONE, ZERO
    if h < normed:
        for i in range(lane, hs, 32):
            squares += inp[n, h, i] * inp[n, h, i]
        r = ONE / math.sqrt(warp_sum(squares) / np.float32(hs) + eps)
        if lane == 0:
            rstd[n, h] = r
    for i in range(lane, hs, 32):
        x = inp[n, h, i] * r
        if h < normed - NKV:
            x *= qweight[i] + offset
        elif h < normed:
            x *= kweight[i] + offset
        out[n, h, i] = x


# %% [markdown]
# Backward, the warps take turns at the heads of their kind, queries or keys, and a
# warp's lanes keep their channels' sums of $dw$ in registers to the end. How many channels
# a lane has is a constant of the kernel. Each warp then writes its sums to a row of a
# table of its own, and a second launch adds up the table, a warp a channel: no
# atomic operation, and one order.


# %% norms of heads, backward tags=["exporti"] module="cuda.headnorm"
PARTS, WARPS = 64, 8  # blocks for each kind of head; warps of a block


@functools.cache
def _headnorm_backward(slots):
    """The kernel in which a lane has at most `slots` channels of a head."""

    @kernel(launch_bounds=256)
    def headnorm_backward(dinp, table, inp, qweight, kweight, rstd, offset):
        hat = cuda.local.array(slots, np.float32)
        dhat = cuda.local.array(slots, np.float32)
        dw = cuda.local.array(slots, np.float32)
        (rows, heads, hs), normed = inp.shape, rstd.shape[1]
        NKV, kind = heads - normed, cuda.blockIdx.y
        first, mine = 0, normed - NKV  # kind 0: queries
        if kind == 1:
            first, mine = normed - NKV, NKV
        warp, lane = cuda.grid(1) // 32, cuda.threadIdx.x % 32
        for k in range(slots):
            dw[k] = ZERO
        for item in range(warp, rows * mine, cuda.gridDim.x * WARPS):
            n, h, mean = item // mine, first + item % mine, ZERO
            for k in range(slots):
                i = lane + 32 * k
                if i < hs:
                    weight = kweight[i] if kind == 1 else qweight[i]
                    hat[k] = inp[n, h, i] * rstd[n, h]
                    dhat[k] = dinp[n, h, i] * (weight + offset)
                    dw[k] += dinp[n, h, i] * hat[k]
                    mean += dhat[k] * hat[k]
            mean = warp_sum(mean) / np.float32(hs)
            for k in range(slots):
                i = lane + 32 * k
                if i < hs:
                    dinp[n, h, i] = rstd[n, h] * (dhat[k] - hat[k] * mean)
        for k in range(slots):
            if lane + 32 * k < hs:
                table[kind, warp, lane + 32 * k] = dw[k]

    return headnorm_backward


@kernel(launch_bounds=256)
def _add_table(dqweight, dkweight, table):
    """A warp a channel of one kind of head."""
    column, lane = cuda.grid(1) // 32, cuda.threadIdx.x % 32
    _, count, hs = table.shape
    kind, i, total = column // hs, column % hs, ZERO
    if kind < 2:
        for k in range(lane, count, 32):
            total += table[kind, k, i]
        total = warp_sum(total)
        if lane == 0 and kind == 0:
            dqweight[i] += total
        elif lane == 0:
            dkweight[i] += total


# %% norms of heads on a GPU tags=["export"] module="cuda.headnorm"
@shapes(
    "B T QKV!, B T N!, B T QKV, hs, hs", DEVICE, eps="above 0",
    offset="at least 0",
)  # fmt: skip
def headnorm_forward(out, rstd, inp, qweight, kweight, eps=1e-6, offset=0.0):
    """RMSNorm over the channels of each head of queries and of keys.

    out, inp: (B, T, (NH + 2 NKV) * hs); values are copied. rstd: (B, T,
    NH + NKV), saved for the backward pass. qweight, kweight: (hs,), used
    for all heads. eps, offset: as for rmsnorm_forward. All float32 on a
    device and C-contiguous; out and rstd are overwritten. Raises TypeError
    or ValueError before it launches anything.
    """
    hs = qweight.size
    NKV = key_heads("headnorm_forward", inp, rstd, hs)
    rows, normed = inp.shape[0] * inp.shape[1], rstd.shape[2]
    y, x = (a.reshape(rows, normed + NKV, hs) for a in (out, inp))
    arrays = y, rstd.reshape(rows, normed), x, qweight, kweight
    grid = -(-rows * (normed + NKV) // WARPS)
    numbers = np.float32(eps), np.float32(offset)
    _headnorm_forward[grid, 32 * WARPS](*arrays, NKV, *numbers)


def _parts(rows):
    """How many blocks share the heads of a kind."""
    return min(PARTS, -(-rows // WARPS))


def headnorm_scratch(rows, hs):
    """How many floats headnorm_backward wants to work in; rows: B * T."""
    return 2 * _parts(rows) * WARPS * hs


@shapes(
    "B T QKV!, hs!, hs!, B T QKV, hs, hs, B T N", DEVICE,
    offset="at least 0", work="W!?",
)  # fmt: skip
def headnorm_backward(
    dinp, dqweight, dkweight, inp, qweight, kweight, rstd, offset=0.0,
    work=None,
):  # fmt: skip
    """Take the gradient of headnorm_forward's output to its input, in place.

    dinp: (B, T, (NH + 2 NKV) * hs) holds the gradient of the output and
    receives that of the input. dqweight, dkweight: (hs,), added to. inp,
    qweight, kweight, rstd, offset: as in the forward pass. work: scratch of
    headnorm_scratch(B * T, hs) floats, or None to allocate it. All float32
    on a device and C-contiguous. Every sum has one order. Raises TypeError
    or ValueError before it launches anything.
    """
    layer, hs = "headnorm_backward", qweight.size
    NKV = key_heads(layer, inp, rstd, hs)
    rows, normed = inp.shape[0] * inp.shape[1], rstd.shape[2]
    floats = headnorm_scratch(rows, hs)
    work = given_work(layer, work, floats, inp)
    if rows:
        dx, x = (a.reshape(rows, normed + NKV, hs) for a in (dinp, inp))
        parts = _parts(rows)
        table = work[:floats].reshape(2, parts * WARPS, hs)
        arrays = dx, table, x, qweight, kweight, rstd.reshape(rows, normed)
        back = _headnorm_backward(-(-hs // 32))
        back[(parts, 2), 32 * WARPS](*arrays, np.float32(offset))
        grid = -(-2 * hs // WARPS)
        _add_table[grid, 32 * WARPS](dqweight, dkweight, table)


# %% the same on the simulator
from llmnb import cuda as on_gpu
from llmnb.gpu.launch import simulated, to_host
from llmnb.gpu.simulator import watch

for hs in (20, 40):
    p = heads_problem(1, 3, 4, 2, hs)
    there = SimpleNamespace(**{k: simulated(x) for k, x in vars(p).items()})
    with watch() as seen:
        both_ways(on_gpu, there)
    both_ways(reference, p)
    print(f"heads of {hs}:", *[k.__name__ for k, *_ in seen.launches])
    for name in names:
        got = to_host(getattr(there, name))
        compare(name, got, getattr(p, name), tol=1e-5)

# %% [markdown]
# ## Soft caps on a GPU
#
# Forward is a function of one number, so the kernels of
# [chapter 3.5](../3_gpu/05_elementwise.ipynb) do it. Backward a block takes a row.

# %% imports of the GPU's caps tags=["export"] module="cuda.softcap"
import functools
import math

import numpy as np

from llmnb.cuda.elementwise import elementwise
from llmnb.cuda.local import soft_tanh
from llmnb.gpu.launch import DEVICE, device, kernel
from llmnb.gpu.simulator import cuda
from llmnb.shapes import shapes

# %% the kernels of the caps on a GPU tags=["exporti"] module="cuda.softcap"
ZERO, ONE = np.float32(0), np.float32(1)


@functools.cache
def _capping(softcap):
    CAP = np.float32(softcap)

    @device
    def capped(x):
        return CAP * soft_tanh(x / CAP)

    return elementwise(capped, 1)


@kernel(launch_bounds=256)
def _capped_slopes(dlogits, dlosses, logits, lse, targets, V, cap):
    """A block a row."""
    row = cuda.blockIdx.x
    target, shift, scale = targets[row], lse[row], dlosses[row]
    for i in range(cuda.threadIdx.x, logits.shape[1], cuda.blockDim.x):
        slope = ZERO
        if i < V:
            x = logits[row, i]
            t, y = x / cap, ONE if i == target else ZERO
            slope = scale * (math.exp(x - shift) - y) * (ONE - t * t)
        dlogits[row, i] = slope


# %% soft caps on a GPU tags=["export"] module="cuda.softcap"
@shapes("B T Vp!", DEVICE, softcap="above 0")
def softcap_forward(x, softcap):
    """Turn each logit x into c tanh(x / c), in place; softcap: c.

    x: (B, T, Vp), float32 on a device and C-contiguous. A kernel is compiled
    for each c. Raises TypeError or ValueError before it launches anything.
    """
    flat = x.reshape(-1)
    _capping(float(softcap))(flat, flat)


@shapes(
    "B T Vp!, B T, B T Vp~, B T, B T of V, 1 to Vp", DEVICE,
    softcap="above 0",
)  # fmt: skip
def capped_crossentropy_backward(
    dlogits, dlosses, logits, lse, targets, V, softcap
):
    """Write the gradient of the losses by the logits before their cap.

    dlogits: (B, T, Vp), overwritten; it may be `logits` itself, which then
    is lost. logits: after the cap. dlosses, lse: (B, T), lse from the
    forward pass. targets: int32 (B, T), each in [0, V). Columns from V on
    receive 0. All on a device, float32 but for the targets. Raises
    TypeError or ValueError before it launches anything.
    """
    arrays, rows = (dlogits, dlosses, logits, lse, targets), lse.size
    flat = [x.reshape(rows, *tuple(x.shape)[2:]) for x in arrays]
    _capped_slopes[rows, 256](*flat, V, np.float32(softcap))


# %% the caps on the simulator
with watch():
    found = capped(on_gpu, simulated)
for name, got, x in zip(("capped", "gradient"), found, want, strict=True):
    compare(name, got, x, tol=1e-5)

# %% [markdown]
# `watch` would have stopped at an access outside an array, or at a race. These
# kernels have been simulated and compiled, and not run on a GPU.
#
# ## Take away
#
# - A weight that all heads share gets its gradient from all of them; parts that do
#   not depend on the threads keep one order of additions.
# - A gradient can take the place of what it is computed from, if each number is
#   read before it is overwritten.
#
# ## Exercises
#
# **1** (★). How many floats of scratch does the GPU's backward pass want for 4,096 rows
# and heads of 128 channels? For twice the rows?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# Two kinds of head, 64 blocks each, eight warps a block, 128 channels: 131,072. The
# same for twice the rows: there are no more than 64 blocks.
# :::

# %% exercise 1, checked tags=["hide-cell"]
from llmnb.cuda.headnorm import headnorm_scratch

found = [headnorm_scratch(rows, 128) for rows in (4096, 8192)]
verdict("exercise 1", found == [2 * 64 * 8 * 128] * 2, "is as derived")

# %% [markdown]
# **2** (★★). Suppose that the CPU's backward pass cut the rows into as many parts as
# there are threads. Show with 1,000 numbers what that does to a sum.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# Sums of 1, 2, 4 and 8 parts have different last bits: the numbers are added in
# another order.
# :::

# %% exercise 2, checked tags=["hide-cell"]
numbers = rng.normal(size=1000).astype("f4")
sums = set()
for parts in (1, 2, 4, 8):
    each = [np.cumsum(x)[-1] for x in np.array_split(numbers, parts)]
    sums.add(float(np.cumsum(each)[-1]))
verdict("exercise 2", len(sums) > 1, "the bits differ")

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("A.14")
