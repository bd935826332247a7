# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       cuda.adamw: "AdamW, and the clipping of gradients, on a GPU."
#       bench.rungs_adamw: "A plainer AdamW on a GPU, to be timed."
# ---

# %% [markdown]
# # AdamW on a GPU: one thread each, one sum for all
#
# > On a GPU the update is the easiest of kernels and the norm of the gradients
# > the hardest to keep: a sum of 124 million squares, in one order.
#
# *Reading time: 26 minutes. You need: AdamW and clipping
# ([chapter 1.12](../1_by_hand/12_adamw.ipynb)), warps and blocks
# ([chapter 3.1](01_threads.ipynb)), sums over both
# ([chapter 3.2](02_sectors.ipynb)) and vectors of four
# ([chapter 3.5](05_elementwise.ipynb)).*

# %% [markdown]
# ## Where we are
#
# The update is bound by memory here as on the CPU: 28 bytes for some 14
# operations. Elements do not meet, so each may have a thread of its own. The
# norm is another matter, because all elements meet in one sum. And one thing
# is new: the numbers that change from step to step have to reach the GPU. At
# the end of this chapter you can
#
# - say how new settings reach launches that were recorded;
# - count what vectors of four save an update, and what they do not;
# - sum 124 million squares on a GPU in one order, and say why float32 is
#   enough for it;
# - ask on the device whether a number is finite, and say what the compiler
#   must not be promised then.
#
# No GPU has run these kernels. They run on the simulator; they are compiled
# for two generations of GPU, and what the compiler made of them is checked.

# %% [markdown]
# ## Setup

# %% setup
import matplotlib.pyplot as plt

from llmnb import reference
from llmnb.book.moving import moving
from llmnb.book.owners import draw_owners, walk
from llmnb.book.verify import compare, verdict
from llmnb.gpu.launch import simulated, to_device
from llmnb.gpu.simulator import RaceError, watch
from llmnb.reference.adamw import AdamW

# %% imports of the kernels tags=["export"]
import math

import numpy as np

from llmnb.cuda.elementwise import BLOCK, count_fours
from llmnb.gpu.launch import DEVICE, aligned, device, given_work, kernel
from llmnb.gpu.launch import to_host
from llmnb.gpu.simulator import cuda, load4, store4
from llmnb.gpu.warp import block_sum
from llmnb.shapes import shapes

# %% sizes tags=["exporti"]
WARPS = 8  # in a block of 256 threads
SETTINGS = 8  # numbers: seven of AdamW, and one to fill two vectors
NORM_BLOCKS = 1024  # blocks at most that sum squares
ZERO, ONE = np.float32(0), np.float32(1)
TINY = np.float32(1e-6)  # (1.12.14)
LARGEST = np.finfo(np.float32).max

# %% the seed
rng = np.random.default_rng(10)

# %% [markdown]
# ## The settings of a step
#
# A training step launches hundreds of kernels. [Chapter 3.11](11_step.ipynb)
# records them once, with all their arguments, and then launches them again as
# one, a *CUDA graph*. But an argument that is a number is recorded with its
# value: every later step would run with the learning rate of the step that
# was recorded.
#
# An argument that is an array is recorded as an address. So the settings
# travel in a small array: the host writes a step's numbers there, and then
# launches the graph, in which nothing has changed.
#
# The numbers are the seven factors of chapter 1.12, computed on the host in
# float64, because a float32 would lose digits on the way: $\beta_2 = 0.999$
# is so close to 1 that the difference $1 - \beta_2$ keeps 14 of its 24 bits.
# Rounding comes last.


# %% the settings tags=["export"]
def adamw_scratch():
    """The number of floats that `adamw_update` wants as `work`."""
    return SETTINGS


@shapes("-", DEVICE)
def adamw_settings(settings):
    """What AdamW's kernel wants to know of a step, as a float32 array.

    settings: an AdamW. Its factors are computed in float64 and rounded at the
    end. Copy them to the device for `adamw_apply`. Raises ValueError for
    settings out of range.
    """
    return np.array([*settings.factors("adamw_update"), 0], np.float32)


# %% rounded last, and rounded first
exact = 1 - 0.999
late = float(adamw_settings(AdamW(beta2=0.999))[3])
early = float(1 - np.float32(0.999))
verdict("rounded last", abs(late / exact - 1) < 6e-8, "errs below 6e-8")
verdict("rounded first", abs(early / exact - 1) > 1e-5, "errs above 1e-5")

# %% [markdown]
# ## A thread an element
#
# A thread reads four numbers, computes, and writes three. It reads the
# seven settings as well; all threads of a warp read the same ones, so each
# of these requests is for one sector, which a cache holds. This version is
# for the ladder of [chapter A.7](../appendix/07_ladders.ipynb); the model uses
# the next.

# %% imports of a thread an element tags=["export"] module="bench.rungs_adamw"
import math

from llmnb.gpu.launch import kernel
from llmnb.gpu.simulator import cuda


# %% a thread an element tags=["export"] module="bench.rungs_adamw"
@kernel
def _adamw_by_elements(params, grads, m, v, settings):
    i = cuda.grid(1)
    if i < params.size:
        keep, new1, beta2 = settings[0], settings[1], settings[2]
        new2, root, eps = settings[3], settings[4], settings[5]
        g, mean = grads[i], m[i]
        mean += new1 * (g - mean)
        square = beta2 * v[i] + new2 * g * g
        spread = math.sqrt(square) / root + eps
        params[i] = keep * params[i] - settings[6] * mean / spread
        m[i], v[i] = mean, square


def adamw_by_elements(params, grads, m, v, settings):
    """A step of AdamW, a thread an element; nothing is checked."""
    grid = -(-params.size // 256)
    _adamw_by_elements[grid, 256](params, grads, m, v, settings)


# plainest first; the layer itself comes after them
ADAMW_APPLY = (adamw_by_elements,)

# %% [markdown]
# ## Four elements at once
#
# The bytes cannot be fewer, the requests can. Each thread takes four
# neighbours, and the settings come in two vectors as well, which is why there
# is an eighth, and why they must begin at a multiple of 16 bytes: anywhere
# else a GPU stops with an error, and no array of the program can be read any
# more. Up to three elements at the end get a thread each, and so do all
# elements of a view that begins at no such multiple: `count_fours` of
# [chapter 3.5](05_elementwise.ipynb) says 0 of it.


# %% AdamW of four elements tags=["exporti"]
@device
def _adamw(p, g, m, v, factors):
    keep, new1, beta2, new2, root, eps, size, _ = factors
    m += new1 * (g - m)
    v = beta2 * v + new2 * g * g
    spread = math.sqrt(v) / root + eps
    return keep * p - size * m / spread, m, v


@kernel
def _adamw_by_fours(params, grads, m, v, settings, fours):
    i = cuda.grid(1)
    k = 3 * fours + i  # where no four is left for this thread
    if i >= fours and k >= params.size:
        return
    factors = load4(settings, 0) + load4(settings, 4)
    if i < fours:
        p0, p1, p2, p3 = load4(params, 4 * i)
        g0, g1, g2, g3 = load4(grads, 4 * i)
        m0, m1, m2, m3 = load4(m, 4 * i)
        v0, v1, v2, v3 = load4(v, 4 * i)
        p0, m0, v0 = _adamw(p0, g0, m0, v0, factors)
        p1, m1, v1 = _adamw(p1, g1, m1, v1, factors)
        p2, m2, v2 = _adamw(p2, g2, m2, v2, factors)
        p3, m3, v3 = _adamw(p3, g3, m3, v3, factors)
        store4(params, 4 * i, p0, p1, p2, p3)
        store4(m, 4 * i, m0, m1, m2, m3)
        store4(v, 4 * i, v0, v1, v2, v3)
    else:
        p0, m0, v0 = _adamw(params[k], grads[k], m[k], v[k], factors)
        params[k], m[k], v[k] = p0, m0, v0


# %% [markdown]
# Now the functions. `adamw_apply` launches and does nothing else, so a
# graph may record it; `adamw_update` has the arguments that all backends
# have, and brings the settings to the device first.


# %% AdamW on arrays tags=["export"]
@shapes(f"N!, N, N!, N!, {SETTINGS}", DEVICE)
def adamw_apply(params, grads, m, v, settings):
    """Take one step of AdamW with settings that are on the device.

    params, grads, m, v: a device's arrays, float32, flat, of one length.
    settings: what `adamw_settings` computed, on the device, at a multiple of
    16 bytes. Allocates nothing and does not wait: a CUDA graph may record it,
    and new settings may be copied into the array before the graph is launched
    again. Raises TypeError or ValueError for arrays that do not fit.
    """
    if not aligned(settings):
        raise ValueError(
            "adamw_apply: settings must begin at a multiple of 16 bytes"
        )
    arrays = params, grads, m, v
    fours = count_fours(*arrays)
    grid = -(-(params.size - 3 * fours) // BLOCK)
    _adamw_by_fours[grid, BLOCK](*arrays, settings, fours)


@shapes("N!, N, N!, N!", DEVICE, work="W!?")
def adamw_update(params, grads, m, v, settings, work=None):
    """Take one step of AdamW, in the order in which torch.optim.AdamW does.

    params, grads, m, v: a device's arrays, float32, flat, of one length;
    params, m and v change in place. m and v are the running means of the
    gradient and of its square, zero before the first step. settings: an
    AdamW; its decay applies to every element. work: a device's array of
    `adamw_scratch()` floats at a multiple of 16 bytes, or None to have one
    made. The settings are copied to the device, on its default stream: a CUDA
    graph cannot record that, only `adamw_apply`. Raises TypeError or
    ValueError for arrays that do not fit and settings out of range, before it
    launches anything.
    """
    factors = adamw_settings(settings)
    work = given_work("adamw_update", work, SETTINGS, params)
    there = work[:SETTINGS]
    there.copy_to_device(factors)
    adamw_apply(params, grads, m, v, there)


# %% three steps against NumPy
def three_steps(update):
    start = np.random.default_rng(1)
    params, grads = start.normal(size=(2, 1003)).astype(np.float32)
    there = params, grads, *np.zeros((2, 1003), np.float32)
    for step in range(1, 4):
        update(there, AdamW(0.01, step=step))
    return params


def on_device(arrays, settings):
    there = [to_device(x) for x in arrays]
    adamw_update(*there, settings)
    for x, array in zip(arrays, there, strict=True):
        x[...] = to_host(array)


def by_elements(arrays, settings):
    there = [simulated(x) for x in (*arrays, adamw_settings(settings))]
    adamw_by_elements(*there)
    for x, array in zip(arrays, there[:4], strict=True):
        x[...] = to_host(array)


want = three_steps(lambda arrays, s: reference.adamw_update(*arrays, s))
compare("an element", three_steps(by_elements), want, tol=2e-6)
compare("four", three_steps(on_device), want, tol=2e-6)

# %% what the simulator counts
four = [simulated(np.ones(1027, np.float32)) for _ in range(4)]
settings = simulated(adamw_settings(AdamW()))
for name, run in ("element", adamw_by_elements), ("four", adamw_apply):
    with watch() as seen:
        run(*four, settings)
    print(f"{name:8} {seen.requests:4} requests, {seen.sectors} sectors")
try:
    adamw_apply(*four, simulated(np.zeros(9, np.float32))[1:])
    verdict("settings", False, "are refused elsewhere")
except ValueError as error:
    print(error)

# %% [markdown]
# Four arrays are read and three of them written, $7 \cdot 129 = 903$ sectors
# in both versions. The rest of the sectors are the settings, the same few bytes
# over and over, which come from a cache. Vectors do not change what is moved,
# they change how often it is asked for: about a quarter of the warps, with
# fewer requests each.
#
# For 124 million parameters an update moves $28 \cdot 124 \cdot 10^6$ bytes,
# 3.5 GB. At the 3,350 GB/s of an H100's data sheet that takes at least
# 1.0 ms.
#
# ## The norm: one sum, one order
#
# All elements meet in one number. If every block adds its part to that number
# when it is done, two blocks may read the same old value, and one part is
# lost:


# %% a sum of all blocks, in a hurry
@kernel
def hurried(total, squares):
    parts = cuda.shared.array(WARPS, np.float32)
    mine = block_sum(squares[cuda.grid(1)], parts)
    if cuda.threadIdx.x == 0:
        total[0] += mine


ones, total = simulated(np.ones(64, np.float32)), simulated(np.zeros(1, "f4"))
try:
    with watch():
        hurried[2, 32](total, ones)
    caught = False
except RaceError as error:
    print(str(error).replace(": ", ":\n").replace(", and", ",\nand"))
    caught = True
verdict("the race", caught, "is caught")

# %% two blocks, one sum
fig, ax = plt.subplots(figsize=(8, 1), dpi=100)
draw_owners(ax, np.arange(64).reshape(2, 32), group=32, rows="blocks")
fig.tight_layout()
plt.show()
args = np.zeros(1, np.float32), np.ones(64, np.float32)
steps = walk("in a hurry", hurried, 2, 32, args)
del steps["steps"]["alone"]  # threads go side by side
names = {"shared": ["parts"], "wrap": 16}
moving("threads", "two blocks add to one number", walks=[steps], **names)

# %% [markdown]
# *Figure 3.10.1. 64 squares, the threads that read them, and their blocks, a
# colour each. Thread 0 of each block adds its block's sum to `total`. What it
# adds to may be out of date before it is written: no barrier reaches across
# blocks.*
#
# An atomic addition would lose nothing. But whoever comes first is added
# first, the order differs from run to run, and so do the last bits of the
# norm, of the clipped gradients, and of the model (exercise 1). We want the
# same bits each time. So each part of the sum has its owner and its place in
# the order:
#
# 1. Thread $t$ of $T$ sums the squares of fours $t$, $t + T$, $t + 2T$ and
#    so on, one sum for each of the four places, then adds these four. In a
#    view without vectors it reads the same numbers one by one.
# 2. The block adds its threads' sums by `block_sum` and writes one number.
# 3. A second kernel of one block adds these numbers in the same way and
#    writes the root.
#
# A second kernel and not a barrier, because a plain launch has none across
# blocks: only its end orders all of them before what comes next. The number of
# blocks depends on the length alone, up to 1024, and not on the GPU.

# %% who sums what
place = np.arange(32) // 4
tail = np.where(np.arange(32) < 20, place, -1)
tail[20:23] = 0, 1, 2
fig, ax = plt.subplots(figsize=(8, 1.7), dpi=100)
draw_owners(ax, [place, place, tail], group=4, cols="32 elements a row")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 3.10.2. 87 gradients, summed by two blocks (two colours) of four
# threads; the number is the thread. In each sweep, a row of the figure, a
# thread takes four neighbours; the three elements that make no four go to the
# first three threads. Which thread adds what, and in which order, depends on
# nothing but the length.*
#
# The CPU sums in float64. With this order float32 will do. What counts for
# rounding is not how many numbers there are but the longest chain of
# additions that one number passes through. With $n$ squares and
# $T = 262{,}144$ threads, those of 1024 blocks, that chain has $n / 4T$
# links in a thread and 2 for its four places. In a block it has 5 for the
# butterfly of a warp and 8 for the warps. The second kernel adds 4, for 1024
# sums on 256 threads, and $5 + 8$ again. For 124 million that is about 150
# in place of 124 million, and the relative error is below
# $150 \cdot 2^{-24}$, or $9 \cdot 10^{-6}$, at worst; the root halves it.


# %% the sum of squares tags=["exporti"]
@device
def _four(array, i, vectors):
    """Four numbers from element i on; vectors: whether in one request."""
    if vectors:
        return load4(array, i)
    return array[i], array[i + 1], array[i + 2], array[i + 3]


@kernel(fastmath=False)
def _squares(grads, work, vectors):
    parts = cuda.shared.array(WARPS, np.float32)
    i, fours = cuda.grid(1), grads.size // 4
    s0 = s1 = s2 = s3 = ZERO
    for k in range(i, fours, cuda.gridsize(1)):
        a, b, c, d = _four(grads, 4 * k, vectors)
        s0, s1, s2, s3 = s0 + a * a, s1 + b * b, s2 + c * c, s3 + d * d
    total = (s0 + s1) + (s2 + s3)
    if 4 * fours + i < grads.size:
        a = grads[4 * fours + i]
        total += a * a
    total = block_sum(total, parts)
    if cuda.threadIdx.x == 0:
        work[1 + cuda.blockIdx.x] = total


# %% the sum of the blocks' sums tags=["exporti"]
@kernel(fastmath=False)
def _root_of_sum(work, blocks):
    parts = cuda.shared.array(WARPS, np.float32)
    total = ZERO
    for k in range(cuda.threadIdx.x, blocks, BLOCK):
        total += work[1 + k]
    total = block_sum(total, parts)
    if cuda.threadIdx.x == 0:
        work[0] = math.sqrt(total)


# %% [markdown]
# The norm stays on the device, in `work[0]`, and the kernel that scales
# reads it there. To bring it to the host first would make the CPU wait for
# all that is under way, and a graph could not record it.
#
# So the question whether the norm is finite must be asked on the device
# now. `norm <= LARGEST` asks it, since infinity and NaN both fail, and where it
# fails the gradients are left as they are. But `fastmath` would promise the
# compiler that there are no such numbers, and it might then drop the question.
# So all kernels of the norm and the clip are compiled without it.


# %% by how much to scale tags=["exporti"]
@device
def _clip_factor(norm, max_norm):
    """The factor of (1.12.14); 1 where the norm is infinite or NaN."""
    if not norm <= LARGEST:
        return ONE
    length = norm + TINY
    return max_norm / length if length > max_norm else ONE


# %% scale tags=["exporti"]
@kernel(fastmath=False)
def _shrink(grads, work, max_norm, fours):
    factor = _clip_factor(work[0], max_norm)
    if factor == ONE:
        return
    i = cuda.grid(1)
    if i < fours:
        a, b, c, d = load4(grads, 4 * i)
        a, b, c, d = a * factor, b * factor, c * factor, d * factor
        store4(grads, 4 * i, a, b, c, d)
    elif 3 * fours + i < grads.size:
        grads[3 * fours + i] *= factor


def shrink(grads, max_norm, work):
    """Scale a flat array whose norm is in work[0]; nothing waits."""
    fours, most = count_fours(grads), min(max_norm, float(LARGEST))
    grid = -(-(grads.size - 3 * fours) // BLOCK)
    _shrink[grid, BLOCK](grads, work, np.float32(most), fours)


# %% the norm and the clip, for a graph tags=["export"]
def clip_scratch():
    """The number of floats that the norm and the clip want as `work`."""
    return 1 + NORM_BLOCKS


def _with_norm(layer, work, grads):
    """A layer's work, in whose first place the norm will be; nothing waits."""
    work = given_work(layer, work, clip_scratch(), grads)
    blocks = min(NORM_BLOCKS, max(1, -(-grads.size // (4 * BLOCK))))
    _squares[blocks, BLOCK](grads, work, int(aligned(grads)))
    _root_of_sum[1, BLOCK](work, blocks)
    return work


@shapes("N!, above 0, W!", DEVICE)
def clip_apply(grads, max_norm, work):
    """Clip a flat array to norm `max_norm`; leave its old norm in work[0].

    As `clip_gradients`, but it allocates nothing and does not wait: a CUDA
    graph may record it, with this `max_norm`.
    """
    shrink(grads, max_norm, _with_norm("clip_apply", work, grads))


# %% the norm and the clip, with an answer tags=["export"]
@shapes("N, W!?", DEVICE)
def global_norm(grads, work=None):
    """The Euclidean norm of a flat array, as a float.

    The squares are summed in float32, in an order that the length alone
    decides: a norm above 1.8e19 comes out infinite, and a gradient below
    2.6e-23 counts as 0. work: a device's array of
    `clip_scratch()` floats, or None to have one made. Waits for the result.
    Raises TypeError or ValueError for arrays that do not fit.
    """
    work = _with_norm("global_norm", work, grads)
    return float(to_host(work[:1])[0])


@shapes("N!, above 0, W!?", DEVICE)
def clip_gradients(grads, max_norm, work=None):
    """Scale a flat array down to norm `max_norm` if it is longer.

    Returns the norm before clipping and scales `grads` in place by
    max_norm / (norm + 1e-6) where that is below 1, as torch's
    clip_grad_norm_. When the norm is infinite or NaN, `grads` is left as it
    is: the caller sees the norm and decides. work, and the norms that come
    out infinite: as for `global_norm`. Waits for the norm. Raises ValueError
    unless max_norm is positive, and as `global_norm` does.
    """
    work = _with_norm("clip_gradients", work, grads)
    shrink(grads, max_norm, work)
    return float(to_host(work[:1])[0])


# %% a long, a short and a broken gradient, on the device
g = rng.normal(size=5003).astype(np.float32)
there = to_device(g)
norm = clip_gradients(there, 1.0)
close = abs(norm / reference.global_norm(g) - 1) < 1e-6
verdict("the norm", close, "to 1e-06 of float64's")
g *= np.float32(1 / (norm + 1e-6))
compare("clipped", to_host(there), g, tol=1e-7)
clip_gradients(there, 2.0)
compare("short", to_host(there), g, tol=1e-7)
for bad in (np.nan, np.inf):
    g[77] = bad
    there = to_device(g)
    norm = clip_gradients(there, 1.0)
    same = np.array_equal(to_host(there), g, equal_nan=True)
    verdict(f"{bad}", same and not math.isfinite(norm), "left alone")


# %% [markdown]
# float32 has one price: from a norm of $1.8 \cdot 10^{19}$ on, the sum of
# squares is infinite, where float64 could still hold it. Such a gradient is
# as broken as an infinite one, and is treated as one.
#
# To see what the order is worth, we follow it in NumPy, for more numbers
# than the simulator could sum. The butterfly of `warp_sum` adds
# lane $l$ and lane $l \oplus s$ for $s = 16, 8, 4, 2, 1$; after it every
# lane has the same sum.


# %% the kernels' order in NumPy
def in_block(x):
    """block_sum of each row of 256, in float32."""
    x = x.reshape(-1, 8, 32)
    for s in (16, 8, 4, 2, 1):
        x = x + x[..., np.arange(32) ^ s]
    total = x[:, 0, 0].copy()
    for warp in range(1, 8):
        total += x[:, warp, 0]
    return total


def norm_in_order(g):
    blocks = min(1024, -(-g.size // 1024))
    T = 256 * blocks
    padded = np.zeros(-(-g.size // (4 * T)) * 4 * T, np.float32)
    padded[: g.size // 4 * 4] = g[: g.size // 4 * 4] ** 2
    sums = np.zeros((T, 4), np.float32)
    for sweep in padded.reshape(-1, T, 4):
        sums += sweep
    total = (sums[:, 0] + sums[:, 1]) + (sums[:, 2] + sums[:, 3])
    total[: g.size % 4] += g[g.size // 4 * 4 :] ** 2
    parts = np.zeros((4, 256), np.float32)
    parts.reshape(-1)[:blocks] = in_block(total)
    sums = ((parts[0] + parts[1]) + parts[2]) + parts[3]
    return np.sqrt(in_block(sums)[0])


# %% the same order, another order
g = rng.normal(size=5003).astype(np.float32)
same = global_norm(simulated(g)) == norm_in_order(g)
verdict("NumPy", same, "has the simulator's bits")
g = rng.normal(size=1 << 24) * 10.0 ** rng.uniform(-4, 0, 1 << 24)
g = g.astype(np.float32)
exact = reference.global_norm(g)
ours = abs(norm_in_order(g) / exact - 1)
straight = abs(np.sqrt(np.cumsum(g * g)[-1]) / exact - 1)
verdict("16 million", ours < 1e-7, "err < 1e-07 in the kernels' order")
verdict("one by one", straight > 1e-6, "err > 1e-06")

# %% [markdown]
# A GPU contracts a product and a sum into one instruction with one
# rounding, so its last bits are not those of the simulator. From run to
# run they are the same.

# %% [markdown]
# ## Take away
#
# - Settings that change from step to step lie in an array, so that a recorded
#   launch finds the new ones.
# - Vectors of four save requests and no bytes; the update costs 28 bytes a
#   parameter whoever does it.
# - A sum with a fixed order gives the same bits in each run, and short chains
#   of additions make float32 enough for it.
# - A promise to the compiler that all numbers are finite is a promise not to
#   ask: a kernel that asks is compiled without it.

# %% [markdown]
# ## Exercises
#
# **1** (★). If the blocks added their sums to one number by atomic
# additions, the order would change from run to run. Take a thousand sums,
# put them in a hundred orders, and add each up in float32. How many results
# are there, and how far apart?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# About twenty, within a few millionths of each other. Each is as good as
# the next; but two runs would no longer give the same model.
# :::


# %% exercise 1, a hundred orders tags=["hide-cell"]
def results(sums, orders=100):
    # cumsum adds one after the other, as atomics do
    found = [np.cumsum(rng.permutation(sums))[-1] for _ in range(orders)]
    return np.array(found)


# %% exercise 1, checked
found = results(rng.chisquare(10, 1000).astype(np.float32))
verdict("the order", 10 < len(set(found)) < 30, "makes 10 to 30 sums")
close = found.max() / found.min() - 1 < 1e-5
verdict("all orders", close, "agree to 1e-5")

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("3.10")
