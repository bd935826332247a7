# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       cuda.layernorm: "LayerNorm on a GPU, forward and backward."
#       bench.rungs_layernorm: "Plainer versions of LayerNorm on a GPU, kept to be timed."
# ---

# %% [markdown]
# # LayerNorm on a GPU: who shares a row
#
# > A warp shares a row, so that its lanes read neighbours; sums that cross warps
# > go through shared memory, and there a race waits.
#
# *Reading time: 30 minutes. You need: [chapter 1.6](../1_by_hand/06_layernorm.ipynb)
# and chapters [3.1](01_threads.ipynb) and [3.2](02_sectors.ipynb).*

# %% [markdown]
# ## Where we are
#
# The layer is bound by memory: about one operation a byte. New on a GPU is
# the question which thread touches which element, because memory serves
# a warp's 32 threads at once, in sectors of 32 bytes. The forward pass must read
# `inp` and write `out`, 8 bytes an element, for 8 operations; the backward pass
# must read `inp`, `dout` and `dinp` and write `dinp`, 16 bytes for 14 operations.
# Every sector beyond that is waste, and the simulator counts sectors. At the end
# of this chapter you can
#
# - give the rows of a layer to the threads of a GPU, and count what that moves;
# - show the race of two sums that share one piece of memory, and repair it;
# - sum over all rows in one fixed order, with no atomic operation.
#
# These kernels have been simulated and compiled, and not run on a GPU.

# %% [markdown]
# ## Setup

# %% setup
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np

from llmnb.book.diagram import PALETTE
from llmnb.book.moving import moving
from llmnb.book.owners import draw_owners, walk
from llmnb.book.verify import compare, verdict
from llmnb.gpu.launch import empty, simulated, to_device, to_host
from llmnb.gpu.simulator import RaceError, watch
from llmnb.gpu.warp import block_sum
from llmnb.reference.layernorm import layernorm_backward as backward_numpy
from llmnb.reference.layernorm import layernorm_forward as forward_numpy

rng = np.random.default_rng(5)
reference = SimpleNamespace(forward=forward_numpy, backward=backward_numpy)


# %% a problem of any size
def problem(B, T, C, dtype=np.float32):
    p = SimpleNamespace()
    p.inp, p.dout = rng.normal(size=(2, B, T, C)).astype(dtype)
    p.weight, p.bias = rng.normal(size=(2, C)).astype(dtype)
    p.out, p.dinp = np.zeros((2, B, T, C), dtype)
    p.dweight, p.dbias = np.zeros((2, C), dtype)
    p.mean, p.rstd = np.zeros((2, B, T), dtype)
    return p


# %% imports of the GPU module tags=["export"] module="cuda.layernorm"
import functools
import math

import numpy as np

from llmnb.gpu.launch import (
    DEVICE,
    aligned,
    device,
    given_work,
    kernel,
)
from llmnb.gpu.simulator import cuda, load4, store4
from llmnb.gpu.warp import warp_sum
from llmnb.shapes import shapes

# %% [markdown]
# Rows are independent, so rows are what threads can share out. Three ways to
# do so are in the figure; each becomes a version of the kernel.

# %% who owns what, forward
lanes = np.arange(12)
fig, axes = plt.subplots(3, 1, figsize=(6, 4.2), dpi=100)
for ax, title, owner in (
    (axes[0], "1: a thread a row", 0 * lanes),
    (axes[1], "2: a warp a row", lanes % 4),
    (axes[2], "3: a warp a row, four channels a lane", lanes // 4),
):
    step = 1 if title.startswith("1") else 4
    who = [[step * n + k for k in owner] for n in range(2)]
    draw_owners(ax, who, title, step, rows="rows")
axes[2].set_xlabel("channels")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 3.4.1. The threads that own the elements of two rows, with warps of
# 4 threads drawn in place of 32; a colour is a warp, but in the first
# panel a thread. At any moment each thread reads the leftmost element that
# it has not read yet: in the first panel these lie a row apart, in the
# others side by side.*
#
# ## Version 1: a thread a row
#
# The shortest way from the CPU to a GPU: the loop over rows goes, and
# thread $n$ does what its body did for row $n$.

# %% constants of the GPU module tags=["exporti"] module="cuda.layernorm"
EPS32 = np.float32(1e-5)  # a Python float would be float64
LANES = 32  # threads of a warp


def blocks(n, size):
    return -(-n // size)


# %% imports of the rungs tags=["export"] module="bench.rungs_layernorm"
import math

import numpy as np

from llmnb.cuda.layernorm import EPS32, blocks
from llmnb.gpu.launch import DEVICE, kernel
from llmnb.gpu.simulator import cuda
from llmnb.shapes import shapes


# %% a thread a row, the kernel tags=["exporti"] module="bench.rungs_layernorm"
@kernel(launch_bounds=128)
def _forward_thread(out, mean, rstd, inp, weight, bias):
    n = cuda.grid(1)
    rows, C = inp.shape
    if n >= rows:
        return
    size, total, squares = np.float32(C), np.float32(0), np.float32(0)
    for i in range(C):
        total += inp[n, i]
    mu = total / size
    for i in range(C):
        away = inp[n, i] - mu
        squares += away * away
    r = np.float32(1) / math.sqrt(squares / size + EPS32)
    for i in range(C):
        out[n, i] = (inp[n, i] - mu) * r * weight[i] + bias[i]
    mean[n] = mu
    rstd[n] = r


# %% a thread a row, the launch tags=["exporti"] module="bench.rungs_layernorm"
def _thread_a_row(out, mean, rstd, inp, weight, bias):
    grid = blocks(len(inp), 128)
    _forward_thread[grid, 128](out, mean, rstd, inp, weight, bias)


# %% [markdown]
# We test each version as soon as it stands: the reference fills the arrays of
# `problem`, and a version fills copies on the device.


# %% what a version is called
def title(version):
    return version.__name__.strip("_").replace("_", " ")


# %% arrays on the device, as rows
def on_device(p, place=to_device):
    return {k: place(v) for k, v in vars(p).items()}


def rows_of(d):
    """The forward arguments, (B, T, C) as rows and (B, T) flat."""
    C = d["inp"].shape[-1]
    three = [d[k].reshape(-1, C) for k in ("out", "inp")]
    flat = d["mean"].reshape(-1), d["rstd"].reshape(-1)
    return three[0], *flat, three[1], d["weight"], d["bias"]


# %% the verdict on a forward version
def forward_verdict(version, *shape):
    p = problem(*shape)
    d = on_device(p)
    version(*rows_of(d))
    reference.forward(p.out, p.mean, p.rstd, p.inp, p.weight, p.bias)
    print(f"{title(version)}, {shape[-1]} channels")
    for k in ("out", "mean", "rstd"):
        compare(k, to_host(d[k]), getattr(p, k), tol=1e-5)


forward_verdict(_thread_a_row, 3, 11, 37)

# %% [markdown]
# What does it move? A function that runs a version on the simulator, whether
# or not there is a GPU, and prints what `watch` counted for 32 rows of 256
# channels. The least number of sectors is 2,048: $32 \cdot 256$ numbers
# of `inp` and as many of `out`, eight to a sector.

# %% what a version moves
line = "{:<13}{:>9}{:>8}{:>10}{:>8}{:>9}{:>9}".format
q = problem(2, 16, 256)


def count(arguments, *versions):
    heads = "requests", "sectors", "exchanges", "atomics", "barriers"
    print(line("", *heads, "launches"))
    for version in versions:
        with watch() as seen:
            version(*arguments(on_device(q, simulated)))
        moved = seen.requests, seen.sectors, seen.exchanges
        told = seen.atomics, seen.barriers, len(seen.launches)
        print(line(title(version), *moved, *told))


count(rows_of, _thread_a_row)

# %% [markdown]
# Sixteen times the least. (Exchanges are the calls of warp operations, of
# which there are none yet.) Each request of a warp asks for one element in
# each of 32 rows, which lie in 32 sectors, and uses 4 of the 32 bytes of
# each. A cache may keep the rest until it is wanted, in the next seven
# steps. But it would have to keep a sector for every thread, and a
# multiprocessor may hold 64 warps: that is 64 KB. And with B·T = 1024 rows,
# only 1024 threads have work.
#
# ## Version 2: a warp a row
#
# Let the 32 lanes of a warp share a row: lane $l$ takes the channels
# $l, l + 32, l + 64, \dots$ A request then asks for 32 neighbours, 128
# bytes in 4 sectors, and uses them all. There are as many requests as
# before, with 4 sectors each in place of 32, and 32 times as many threads.
# The price: a sum over the row is now spread over the lanes, and `warp_sum`
# gathers it in five exchanges, without memory and without a barrier. Two
# sums a row make ten exchanges a lane.


# %% a warp a row, the kernel tags=["exporti"] module="cuda.layernorm"
@kernel(launch_bounds=256)
def _forward_warp(out, mean, rstd, inp, weight, bias):
    n, lane = cuda.grid(1) // 32, cuda.threadIdx.x % 32
    rows, C = inp.shape
    if n >= rows:  # the whole warp leaves, so exchanges stay complete
        return
    size, total, squares = np.float32(C), np.float32(0), np.float32(0)
    for i in range(lane, C, 32):
        total += inp[n, i]
    mu = warp_sum(total) / size
    for i in range(lane, C, 32):
        away = inp[n, i] - mu
        squares += away * away
    r = np.float32(1) / math.sqrt(warp_sum(squares) / size + EPS32)
    for i in range(lane, C, 32):
        out[n, i] = (inp[n, i] - mu) * r * weight[i] + bias[i]
    if lane == 0:
        mean[n] = mu
        rstd[n] = r


# %% a warp a row, the launch tags=["exporti"] module="cuda.layernorm"
def _warp_a_row(out, mean, rstd, inp, weight, bias):
    grid = blocks(len(inp), 256 // LANES)
    _forward_warp[grid, 256](out, mean, rstd, inp, weight, bias)


# %% version 2, verdict and counts
forward_verdict(_warp_a_row, 3, 11, 37)
count(rows_of, _thread_a_row, _warp_a_row)

# %% [markdown]
# The sectors fall to less than a fifth. Six accesses for each element are
# left, where two would do: `inp` three times, `weight`, `bias` and `out`.
# In version 1, a lane's `weight[i]` was that of all other lanes too, one
# sector for the warp; here each warp reads the whole of `weight` and
# `bias`. They are the same 2 C numbers for every row, so a cache has them;
# the requests remain.
#
# ## Version 3: four channels a request, and a row kept
#
# With `load4` four requests become one, for as many sectors
# ([chapter 3.2](02_sectors.ipynb)). Its rows begin at multiples of 16 bytes, so
# $C$ must be a multiple of 4 and the arrays must begin at one; otherwise the
# host function falls back to version 2.


# %% sums and outputs in fours tags=["exporti"] module="cuda.layernorm"
@device
def _deviations(mu, a, b, c, d):
    """The squared distances of four numbers from mu, added."""
    a, b, c, d = a - mu, b - mu, c - mu, d - mu
    return (a * a + b * b) + (c * c + d * d)


@device
def _write_four(out, at, weight, bias, i, mu, r, four):
    """Normalise four channels from i on and store them at `at`."""
    a, b, c, d = four
    w0, w1, w2, w3 = load4(weight, i)
    b0, b1, b2, b3 = load4(bias, i)
    a, b = (a - mu) * r * w0 + b0, (b - mu) * r * w1 + b1
    c, d = (c - mu) * r * w2 + b2, (d - mu) * r * w3 + b3
    store4(out, at, a, b, c, d)


# %% [markdown]
# And the row is read three times. The first time it comes from memory, and
# after that from a cache, if other rows have not pushed it out. What is put into
# shared memory stays there. A warp copies its row while it adds it up, and reads
# the copy for the variance and for the output, so that `inp` is read once. A
# lane reads back only what it wrote itself: nothing has to be ordered between
# threads, and there is no barrier.
#
# How much shared memory? numba wants the size as a constant, and a block of
# 4 warps that holds 4 rows of $C$ numbers takes $16\,C$ bytes. An array of
# constant size may have 48 KB on any of NVIDIA's GPUs, hence rows of at most
# 3,072 channels. But the more a block takes, the fewer blocks find room on a
# multiprocessor. So we make a kernel for each multiple of 256 channels:
# GPT-2's 768 channels take 12 KB a block, and the 1,600 of its largest model
# are rounded up to 1,792 and take 28 KB. Longer rows fall back to version 2.

# %% kept rows, the kernel tags=["exporti"] module="cuda.layernorm"
KEPT_ROWS = 4  # rows, and warps, of a block
MOST_KEPT = 3072  # channels: four such rows fill 48 KB


@functools.cache
def _forward_kept(room):
    """The kernel for rows of at most `room` channels."""
    floats = KEPT_ROWS * room

    @kernel(launch_bounds=128)
    def forward_kept(out, mean, rstd, inp, weight, bias):
        kept = cuda.shared.array(floats, np.float32, alignment=16)
        n, lane = cuda.grid(1) // 32, cuda.threadIdx.x % 32
        rows, C = inp.shape
        if n >= rows:
            return
        at = cuda.threadIdx.x // 32 * room  # this warp's row in `kept`
        size, total, squares = np.float32(C), np.float32(0), np.float32(0)
        for i in range(4 * lane, C, 128):
            a, b, c, d = load4(inp, n * C + i)
            store4(kept, at + i, a, b, c, d)
            total += (a + b) + (c + d)
        mu = warp_sum(total) / size
        for i in range(4 * lane, C, 128):
            a, b, c, d = load4(kept, at + i)
            squares += _deviations(mu, a, b, c, d)
        r = np.float32(1) / math.sqrt(warp_sum(squares) / size + EPS32)
        for i in range(4 * lane, C, 128):
            four = load4(kept, at + i)
            _write_four(out, n * C + i, weight, bias, i, mu, r, four)
        if lane == 0:
            mean[n] = mu
            rstd[n] = r

    return forward_kept


# %% kept rows, the launch tags=["exporti"] module="cuda.layernorm"
def _kept_a_row(out, mean, rstd, inp, weight, bias):
    rows, C = inp.shape
    fours = C % 4 == 0 and aligned(out, inp, weight, bias)
    if not fours or C > MOST_KEPT:
        _warp_a_row(out, mean, rstd, inp, weight, bias)
        return
    grid, block = blocks(rows, KEPT_ROWS), KEPT_ROWS * LANES
    forward = _forward_kept(blocks(C, 256) * 256)
    forward[grid, block](out, mean, rstd, inp, weight, bias)


# %% version 3, verdict and counts
forward_verdict(_kept_a_row, 3, 11, 36)
forward_verdict(_kept_a_row, 1, 5, 37)
count(rows_of, _warp_a_row, _kept_a_row)

# %% [markdown]
# One request in five is left, and two sectors in three: `inp` comes once and
# `out` goes once, 2,048 sectors. Nearly all of the rest is `weight` and `bias`,
# read for each row: the same few kilobytes every time, which a cache can hold.
#
# The public function checks the arrays, then runs the last version.


# %% layernorm, forward tags=["export"] module="cuda.layernorm"
@shapes("B T C!, B T!, B T!, B T C, C, C", DEVICE)
def layernorm_forward(out, mean, rstd, inp, weight, bias):
    """Normalise each row of inp, then scale and shift each channel.

    out, inp: (B, T, C). mean, rstd: (B, T), the mean and the reciprocal
    deviation of each row, saved for the backward pass. weight, bias: (C,).
    All float32 on a device and C-contiguous; out, mean and rstd are
    overwritten. Fastest where C % 4 == 0, C <= 3072 and the arrays begin
    at multiples of 16 bytes. Raises TypeError or ValueError before it
    computes anything.
    """
    rows, C = mean.size, len(weight)
    flat = mean.reshape(rows), rstd.reshape(rows)
    rows_in, rows_out = inp.reshape(rows, C), out.reshape(rows, C)
    _kept_a_row(rows_out, *flat, rows_in, weight, bias)


# %% [markdown]
# ## A block a row, and a race
#
# Why stop at a warp? With few rows a whole block might share one: more
# threads, each with less to do. Then warps must add up among themselves, in
# shared memory: each warp's first lane writes its sum into a table, a
# barrier, and every thread reads the table. It looks complete.


# %% a block's sum in a hurry
@device
def hasty_sum(value, parts):
    value = warp_sum(value)
    if cuda.threadIdx.x % 32 == 0:
        parts[cuda.threadIdx.x // 32] = value
    cuda.syncthreads()
    total = np.float32(0)
    for i in range(cuda.blockDim.x // 32):
        total += parts[i]
    return total


# %% rows normalised by blocks
def block_a_row(add):
    @kernel
    def normalised(out, inp):
        parts = cuda.shared.array(32, np.float32)
        n, C, zero = cuda.blockIdx.x, inp.shape[1], np.float32(0)
        total, squares, size = zero, zero, np.float32(C)
        for i in range(cuda.threadIdx.x, C, cuda.blockDim.x):
            total += inp[n, i]
        mu = add(total, parts) / size
        for i in range(cuda.threadIdx.x, C, cuda.blockDim.x):
            away = inp[n, i] - mu
            squares += away * away
        r = np.float32(1) / math.sqrt(add(squares, parts) / size + EPS32)
        for i in range(cuda.threadIdx.x, C, cuda.blockDim.x):
            out[n, i] = (inp[n, i] - mu) * r

    return normalised


# %% [markdown]
# The kernel asks for two sums, so the table is used twice. The result is
# right:

# %% right, this time
p = problem(1, 3, 150)
ones, nil = np.ones(150, np.float32), np.zeros(150, np.float32)
reference.forward(p.out, p.mean, p.rstd, p.inp, ones, nil)
x = simulated(p.inp[0])
y = empty((3, 150), like=x)
block_a_row(hasty_sum)[3, 64](y, x)
compare("hasty_sum", to_host(y), p.out[0], tol=1e-5)

# %% [markdown]
# The simulator let the warps take turns. Nothing obliges a GPU to. The first
# warp may read the table, compute its squares and write its second sum into
# `parts[0]`, all before the second warp has read the first sum from there.
# `watch` asks whether a barrier stands between the two accesses:

# %% the race, seen
try:
    with watch():
        block_a_row(hasty_sum)[3, 64](y, x)
    caught = False
except RaceError as error:
    caught = True
    print(str(error).replace(", and", ",\nand"))
verdict("the race", caught, "is caught")

# %% [markdown]
# The repair is `block_sum` of [chapter 3.2](02_sectors.ipynb): by its second
# barrier, all have read before any may go on to write.

# %% the race, repaired
with watch() as seen:
    block_a_row(block_sum)[3, 64](y, x)
compare("block_sum", to_host(y), p.out[0], tol=1e-5)
print(seen.barriers // seen.threads, "barriers for each thread, a row")

# %% two warps at one table
fig, ax = plt.subplots(figsize=(7.6, 1.2), dpi=100)
first = ["writes its sum", "waits", "reads both", "writes the next"]
for y, row in enumerate((first, first[:2] + ["", "reads both"])):
    for x, does in enumerate([f"warp {y}", *row]):
        shade = {"fc": PALETTE["orange" if x == 4 else "blue"], "ec": "none"}
        style = {"color": "white", "bbox": shade} if x and does else {}
        ax.text(x, -y, does, ha="center", **style)
ax.set(xlim=(-0.4, 4.5), ylim=(-1.4, 0.5))
ax.axis("off")
plt.show()
args = np.zeros((1, 64), np.float32), np.arange(64, dtype="f4")[None]
sums = {"one barrier": hasty_sum, "two barriers": block_sum}
walks = [walk(x, block_a_row(f), 1, 64, args, 32) for x, f in sums.items()]
for x in walks:
    del x["steps"]["alone"]  # they go side by side
moving("threads", "two warps, a row", walks=walks, shared=["parts"], wrap=8)

# %% [markdown]
# *Figure 3.4.2. Two warps share a row and the table `parts`. After the only
# barrier of `hasty_sum` nothing holds the first warp back: it may write its
# next sum (orange) while the second has yet to read the last one. With the
# second barrier both have read before either writes.*

# %% [markdown]
# ## Backward, version 1: sums in a fixed order
#
# Backward has the two shapes of work that it had on the CPU. $dx$ goes row
# by row, so a warp takes a row again: one sweep for the two means of
# (1.6.10), a second one to write. $dw$ and $db$ sum over rows, across all
# warps. Atomic additions ([chapter 3.3](03_encoder.ipynb)) would do, and would
# leave other last bits in every run; so each part of the rows gets sums of its
# own.


# %% the sums of a row tags=["exporti"] module="cuda.layernorm"
@device
def _two_means(n, lane, dout, inp, weight, mu, r):
    """The two means of (1.6.10) for row n, in every lane of a warp."""
    C = inp.shape[1]
    a, b, size = np.float32(0), np.float32(0), np.float32(C)
    for i in range(lane, C, 32):
        dnorm = dout[n, i] * weight[i]
        a += dnorm
        b += dnorm * ((inp[n, i] - mu) * r)
    return warp_sum(a) / size, warp_sum(b) / size


# %% room for sums on their way tags=["export"] module="cuda.layernorm"
def _parts(rows):
    """Into how many parts the rows are cut for dweight and dbias."""
    return min(512, blocks(rows, 4))


def layernorm_scratch(rows, C):
    """How many floats layernorm_backward wants to work in.

    rows: B * T, cut into at most 512 parts; there are two sums for each
    part and channel.
    """
    return _parts(rows) * 2 * C


# %% the verdict on a backward version
def backward_arguments(d):
    """Rows and flat arrays, as a version wants them, and a table."""
    rows, C = d["mean"].size, d["weight"].size
    x = {k: d[k].reshape(rows, C) for k in ("dinp", "dout", "inp")}
    stats = d["mean"].reshape(rows), d["rstd"].reshape(rows)
    sums = x["dinp"], d["dweight"], d["dbias"]
    table = empty(layernorm_scratch(rows, C), like=d["inp"])
    return *sums, x["dout"], x["inp"], d["weight"], stats, table


def backward_verdict(version, *shape):
    p = problem(*shape)
    p.dinp, p.dweight, p.dbias = (x + 1 for x in (p.dinp, p.dweight, p.dbias))
    reference.forward(p.out, p.mean, p.rstd, p.inp, p.weight, p.bias)
    d = on_device(p)
    version(*backward_arguments(d))
    names = "dinp", "dweight", "dbias"
    rest = p.dout, p.inp, p.weight, p.mean, p.rstd
    reference.backward(*(getattr(p, k) for k in names), *rest)
    print(f"{title(version)}, {shape[-1]} channels")
    for k in names:
        compare(k, to_host(d[k]), getattr(p, k), tol=1e-5)


# %% [markdown]
# As on the CPU, cut the rows into parts, give each part its own
# row in a table of sums, and add the table in the end, always in the same
# order. There is a part for every 4 rows, up to 512 parts; as on the CPU,
# the number follows from the number of rows alone. Part $p$ of $P$ has the
# rows $p, p + P, p + 2P, \dots$ The table has a row of $2\,C$ numbers for
# each part, $dw$ and then $db$. It takes three launches, because no barrier
# reaches beyond a block; the next kernel starts when the last has ended, and
# that is the barrier.
#
# 1. `_backward_rows` writes $dx$, a warp a row, as before.
# 2. `_backward_parts` sums down the rows. A block has 4 warps, 32 channels
#    and one part: each lane its channel, each warp every fourth row of the
#    part. The 4 sums of a channel meet in shared memory.
# 3. `_add_table` sums down the table in the same manner, with up to 16
#    warps a block, and adds the outcome to $dw$ and $db$.


# %% dx alone tags=["exporti"] module="cuda.layernorm"
@kernel(launch_bounds=256)
def _backward_rows(dinp, dout, inp, weight, mean, rstd):
    n, lane = cuda.grid(1) // 32, cuda.threadIdx.x % 32
    rows, C = inp.shape
    if n >= rows:
        return
    mu, r = mean[n], rstd[n]
    a, b = _two_means(n, lane, dout, inp, weight, mu, r)
    for i in range(lane, C, 32):
        norm = (inp[n, i] - mu) * r
        dinp[n, i] += r * (dout[n, i] * weight[i] - a - norm * b)


# %% the sums of a part tags=["exporti"] module="cuda.layernorm"
@kernel(launch_bounds=128)
def _backward_parts(table, dout, inp, mean, rstd):
    tile = cuda.shared.array((2, 4, 32), np.float32)
    warp, lane = cuda.threadIdx.x // 32, cuda.threadIdx.x % 32
    rows, C = inp.shape
    i = cuda.blockIdx.x * 32 + lane
    part, parts = cuda.blockIdx.y, cuda.gridDim.y
    dw, db = np.float32(0), np.float32(0)
    if i < C:
        for n in range(part + warp * parts, rows, 4 * parts):
            dy = dout[n, i]
            dw += dy * ((inp[n, i] - mean[n]) * rstd[n])
            db += dy
    tile[0, warp, lane], tile[1, warp, lane] = dw, db
    cuda.syncthreads()
    if warp < 2 and i < C:  # warp 0 adds up dw, warp 1 db
        total = np.float32(0)
        for k in range(4):
            total += tile[warp, k, lane]
        table[(2 * part + warp) * C + i] = total


# %% the sums of the table tags=["exporti"] module="cuda.layernorm"
@kernel(launch_bounds=512)
def _add_table(dweight, dbias, table, parts, width):
    tile = cuda.shared.array((16, 32), np.float32)
    warp, lane = cuda.threadIdx.x // 32, cuda.threadIdx.x % 32
    warps = cuda.blockDim.x // 32
    C, j = dweight.shape[0], cuda.blockIdx.x * 32 + lane
    total = np.float32(0)
    if j < width:
        for k in range(warp, parts, warps):
            total += table[k * width + j]
    tile[warp, lane] = total
    cuda.syncthreads()
    if warp == 0 and j < width:
        total = np.float32(0)
        for k in range(warps):
            total += tile[k, lane]
        if j < C:
            dweight[j] += total
        else:
            dbias[j - C] += total


def add_parts(dweight, dbias, table, parts, width):
    """Add the rows of a table to dweight and, from column C on, to dbias."""
    grid, block = blocks(width, LANES), LANES * min(16, parts)
    _add_table[grid, block](dweight, dbias, table, parts, width)


# %% sums of parts, the launches tags=["exporti"] module="cuda.layernorm"
def _sums_of_parts(dinp, dweight, dbias, dout, inp, weight, stats, table):
    """stats: mean and rstd."""
    rows, C = inp.shape
    parts = _parts(rows)
    grid = blocks(rows, 256 // LANES)
    _backward_rows[grid, 256](dinp, dout, inp, weight, *stats)
    grid = blocks(C, LANES), parts
    _backward_parts[grid, 128](table, dout, inp, *stats)
    add_parts(dweight, dbias, table, parts, 2 * C)


# %% version 1, verdict and counts
backward_verdict(_sums_of_parts, 3, 11, 37)
count(backward_arguments, _sums_of_parts)

# %% [markdown]
# A fixed order, and three launches. The two kernels that take rows read
# `inp` and `dout` three times between them, twice for $dx$ and once for the
# sums.
#
# ## Backward, version 2: every row once
#
# What would it take to read a row once? Someone must hold `inp` and `dout`
# of the whole row while the sums $a$ and $b$ are found, then use them for
# $dx$, and in passing for $dw$ and $db$, and still know $dw$ and $db$ when
# the next row comes. A warp could, in registers: with $C = 1600$, each lane
# would have 50 channels and four numbers for each, 200 registers of the
# 255 that a thread may have. That is too tight. With a block for a row, each
# thread has *four* channels, one vector: `inp`, `dout`, `dinp`, `weight`,
# $dw$ and $db$ of it are 24 registers, however long the row. Then there are
# addresses and whatever else the compiler keeps at hand. A multiprocessor
# has 65,536 registers. We let a block have up to 512 threads, which leaves
# 128 for each and serves rows of up to 2,048 channels.
#
# A thread keeps to its four channels while its block goes down the rows of its
# part, so it sums $dw$ and $db$ in registers and writes to the table once.
#
# The sums $a$ and $b$ now cross warps, by way of a table in shared memory,
# for every row anew. That is the race of figure 3.4.2, and asks for a second
# barrier. There are *two* tables here instead, used in turn. The barrier of
# row $n$ stands between writing table 0 and reading it. Who writes table 0
# next, for row $n + 2$, has passed the barrier of row $n + 1$, and to that
# one every thread comes only after it has read table 0. So the one barrier a
# row orders both.


# %% sums of two over a block tags=["exporti"] module="cuda.layernorm"
@device
def _block_sums(a, b, tables, turn):
    """a and b summed over the block, in every thread.

    tables: shared, (2, 2, 32). turn: 0 and 1 from call to call, so that one
    barrier is enough.
    """
    a, b = warp_sum(a), warp_sum(b)
    if cuda.threadIdx.x % 32 == 0:
        tables[turn, 0, cuda.threadIdx.x // 32] = a
        tables[turn, 1, cuda.threadIdx.x // 32] = b
    cuda.syncthreads()
    a, b, lane = np.float32(0), np.float32(0), cuda.threadIdx.x % 32
    if lane < cuda.blockDim.x // 32:
        a, b = tables[turn, 0, lane], tables[turn, 1, lane]
    return warp_sum(a), warp_sum(b)


# %% four channels of a row tags=["exporti"] module="cuda.layernorm"
@device
def _load_row(x, dy, dx, inp, dout, dinp, at):
    """Three vectors of a row, all asked for before any is needed."""
    x[0], x[1], x[2], x[3] = load4(inp, at)
    dy[0], dy[1], dy[2], dy[3] = load4(dout, at)
    dx[0], dx[1], dx[2], dx[3] = load4(dinp, at)


@device
def _add_four(dw, db, x, dy, w, mu, r):
    """Normalise x, add to dw and db; return this thread's part of a and b."""
    a, b = np.float32(0), np.float32(0)
    for k in range(4):
        x[k] = (x[k] - mu) * r
        dw[k] += dy[k] * x[k]
        db[k] += dy[k]
        a += dy[k] * w[k]
        b += dy[k] * w[k] * x[k]
    return a, b


# %% a block a row, the kernel tags=["exporti"] module="cuda.layernorm"
@kernel(launch_bounds=512)
def _backward_block(dinp, table, dout, inp, weight, mean, rstd):
    tables = cuda.shared.array((2, 2, 32), np.float32)
    x = cuda.local.array(4, np.float32)  # of a row: inp, then normalised
    dy = cuda.local.array(4, np.float32)
    dx = cuda.local.array(4, np.float32)
    w = cuda.local.array(4, np.float32)
    dw = cuda.local.array(4, np.float32)
    db = cuda.local.array(4, np.float32)
    (rows, C), turn = inp.shape, 0
    i, part, size = 4 * cuda.threadIdx.x, cuda.blockIdx.x, np.float32(C)
    mine = i < C  # the last warp may hold threads with no channels
    for k in range(4):
        w[k] = dw[k] = db[k] = np.float32(0)
    if mine:
        w[0], w[1], w[2], w[3] = load4(weight, i)
    for n in range(part, rows, cuda.gridDim.x):
        a, b, r = np.float32(0), np.float32(0), rstd[n]
        if mine:
            _load_row(x, dy, dx, inp, dout, dinp, n * C + i)
            a, b = _add_four(dw, db, x, dy, w, mean[n], r)
        a, b = _block_sums(a, b, tables, turn)
        turn = 1 - turn
        if mine:
            a, b = a / size, b / size
            for k in range(4):
                dx[k] += r * (dy[k] * w[k] - a - x[k] * b)
            store4(dinp, n * C + i, dx[0], dx[1], dx[2], dx[3])
    if mine:
        at = 2 * part * C + i
        store4(table, at, dw[0], dw[1], dw[2], dw[3])
        store4(table, at + C, db[0], db[1], db[2], db[3])


# %% a block a row, the launches tags=["exporti"] module="cuda.layernorm"
MOST_THREADS = 512  # of a block; each has four channels


def _rows_once(dinp, dweight, dbias, dout, inp, weight, stats, table):
    rows, C = inp.shape
    fours = C % 4 == 0 and aligned(dinp, dout, inp, weight, table)
    if not fours or C > 4 * MOST_THREADS:
        _sums_of_parts(dinp, dweight, dbias, dout, inp, weight, stats, table)
        return
    parts, block = _parts(rows), blocks(C, 4 * LANES) * LANES
    _backward_block[parts, block](dinp, table, dout, inp, weight, *stats)
    add_parts(dweight, dbias, table, parts, 2 * C)


# %% version 2, verdict and counts
backward_verdict(_rows_once, 3, 11, 36)
backward_verdict(_rows_once, 1, 5, 37)
count(backward_arguments, _sums_of_parts, _rows_once)

# %% [markdown]
# `watch` raised no RaceError over the two tables in shared memory. `inp`,
# `dout` and `dinp` come once and `dinp` goes once, the least there is;
# `weight` is read once for each part instead of twice a row. The price is in
# exchanges, twenty a lane for each row in place of ten, by two warps here,
# and in one barrier a row. The table comes on top, written and read once.
# With 4,096 rows it is a quarter of the size of `inp`, with 16,384 rows a
# sixteenth. Where $C$ is not a multiple of 4 or above 2,048, or where an
# array does not begin at a multiple of 16 bytes, version 1 runs.


# %% layernorm, backward tags=["export"] module="cuda.layernorm"
@shapes("B T C!, C!, C!, B T C, B T C, C, B T, B T, W!?", DEVICE)
def layernorm_backward(
    dinp, dweight, dbias, dout, inp, weight, mean, rstd, *, work=None
):
    """Add LayerNorm's gradients to dinp, dweight and dbias.

    dinp, dout, inp: (B, T, C). dweight, dbias, weight: (C,). mean, rstd:
    (B, T), as the forward pass left them. work: at least
    layernorm_scratch(B * T, C) floats in one dimension, whose contents are
    lost; allocated if None. All float32 on a device and C-contiguous; the
    first three are added to in place. Fastest where C % 4 == 0, C <= 2048
    and the arrays begin at multiples of 16 bytes. Raises TypeError or
    ValueError before it computes anything.
    """
    name = "layernorm_backward"
    rows, C = mean.size, len(weight)
    work = given_work(name, work, layernorm_scratch(rows, C), inp)
    dx, dy, x = (a.reshape(rows, C) for a in (dinp, dout, inp))
    stats = mean.reshape(rows), rstd.reshape(rows)
    _rows_once(dx, dweight, dbias, dy, x, weight, stats, work)


# %% [markdown]
# The model hands in `work` from its arena, so that training allocates nothing.
# Version 1 of the forward pass stays, for the ladder of
# [chapter A.7](../appendix/07_ladders.ipynb) to time:


# %% the rungs tags=["export"] module="bench.rungs_layernorm"
@shapes("B T C!, B T!, B T!, B T C, C, C", DEVICE)
def forward_by_threads(out, mean, rstd, inp, weight, bias):
    """layernorm_forward with a thread for each row."""
    rows, C = mean.size, len(weight)
    flat = mean.reshape(rows), rstd.reshape(rows)
    rows_in, rows_out = inp.reshape(rows, C), out.reshape(rows, C)
    _thread_a_row(rows_out, *flat, rows_in, weight, bias)


LAYERNORM_FORWARD = (forward_by_threads,)

# %% [markdown]
# ## Take away
#
# - A warp shares a row: its lanes read neighbours, and every byte of a sector is
#   used.
# - Memory that threads share and use again needs an order between the last read
#   and the next write: a second barrier, or a second piece of memory.
# - A sum over all rows is taken in parts and then over the parts, in one order.
#
# ## Exercises
#
# **1** (★★). A multiprocessor of an H100 has 65,536 registers, room for 64
# warps, and 228 KB of shared memory, 1 KB of which goes to the system with each
# block. A thread of version 3 is dealt 48 registers, in eights. How many rows are
# under way at once for 768 channels, and for 1,600? What sets the limit?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# The registers allow 10 blocks, 40 rows; for 768 channels the shared memory
# would allow 17 blocks. For 1,600 it allows only 7, 28 rows.
# :::


# %% exercise 1, a solution tags=["hide-cell"]
def rows_under_way(C):
    shared = KEPT_ROWS * 4 * blocks(C, 256) * 256 + 1024
    most = 65536 // (KEPT_ROWS * LANES * 48), 64 // KEPT_ROWS
    return KEPT_ROWS * min(*most, 228 * 1024 // shared)


# %% exercise 1, checked
found = rows_under_way(768), rows_under_way(1600)
verdict("rows", found == (40, 28), "40 and 28")

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("3.4")
