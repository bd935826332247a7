# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       cuda.crossentropy: "Softmax and cross-entropy on a GPU, forward and backward."
#       bench.rungs_crossentropy: "Plainer versions of the classifier on a GPU, to be timed."
# ---

# %% [markdown]
# # Classifier: a row that many threads share
#
# > On a GPU a row of 50,257 logits has up to 1,024 readers. Each finds a
# > maximum and a sum, and pairs of these merge in any order.
#
# *Reading time: 25 minutes. You need: cross-entropy
# ([chapter 1.11](../1_by_hand/11_crossentropy.ipynb)), blocks, warps and races
# ([chapter 3.1](01_threads.ipynb)), and sectors
# ([chapter 3.2](02_sectors.ipynb)).*

# %% [markdown]
# ## Where we are
#
# Softmax and cross-entropy together are the **classifier**. On the CPU a row
# stayed in a core's cache between two sweeps, and the exponential decided the
# time. On a GPU it is the memory that decides. By NVIDIA's data sheet an H100
# computes 67 TFLOP/s in float32 and moves 3,350 GB/s, 20 operations a byte or
# 80 for a logit of four bytes. The forward pass needs for each logit a
# comparison, a difference, an exponential of about a dozen instructions
# ([chapter 3.5](05_elementwise.ipynb)) and a sum. So this chapter counts what is
# moved. At its end you can
#
# - give the work of a row to a thread, a warp or a block, and say what each
#   costs in sectors;
# - merge the maxima and sums that a thousand threads have found in one row;
# - find the barrier without which the merging is a race;
# - predict the time of the classifier for a GPU whose bandwidth you know.
#
# No GPU has run these kernels; they run on the simulator, and the tests
# compile them for two generations of GPU and look for the vectors of four.

# %% [markdown]
# ## Setup

# %% setup
import matplotlib.pyplot as plt

from llmnb import reference
from llmnb.book.diagram import PALETTE
from llmnb.book.moving import moving
from llmnb.book.owners import draw_owners, walk
from llmnb.book.verify import compare, verdict
from llmnb.gpu.launch import empty, simulated, to_device, to_host
from llmnb.gpu.simulator import RaceError, watch

# %% imports of the kernels tags=["export"]
import math

import numpy as np

from llmnb.gpu.launch import DEVICE, aligned, device, kernel
from llmnb.gpu.simulator import cuda, load4, store4
from llmnb.shapes import shapes

# %% the seed
rng = np.random.default_rng(9)

# %% [markdown]
# ## Who owns what
#
# The work of a row can be given to one thread, to a warp, or to a block.

# %% who owns what
rows, columns = range(2), range(8)
panels = {
    "a thread a row": ([[i for j in columns] for i in rows], None),
    "a warp a row": ([[4 * i + j % 4 for j in columns] for i in rows], 4),
    "vectors of four": ([[4 * i + j // 4 for j in columns] for i in rows], 4),
}
fig, axes = plt.subplots(3, 1, figsize=(6, 4.8), dpi=100)
for ax, (title, (who, group)) in zip(axes, panels.items(), strict=True):
    draw_owners(ax, who, title, group, rows="rows")
axes[2].set_xlabel("columns; the number is the thread's")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 3.8.1. Two rows of 8 logits, for warps that are drawn with four
# threads instead of 32. At the top, threads that run together read a column,
# one element of each row; in the middle, they read neighbours; at the bottom,
# each takes four neighbours at a time (and here two have nothing to do).*
#
# Each version gets a verdict on six rows of 101 logits, padded to 128 with
# NaN, and is counted by the simulator.


# %% a batch, its verdict and its counts
logits = (3 * rng.normal(size=(2, 3, 128))).astype(np.float32)
logits[..., 101:] = np.nan
targets = rng.integers(0, 101, (2, 3)).astype(np.int32)
losses, lse = np.empty((2, 2, 3), np.float32)
reference.crossentropy_softmax_forward(losses, lse, logits, targets, 101)


def try_loss(run):
    got = empty((2, 3)), empty((2, 3))
    run(*got, to_device(logits), to_device(targets), 101)
    compare("losses", to_host(got[0]), losses)
    compare("lse", to_host(got[1]), lse)


def count_loss(name, run, rows, V, Vp):
    z = simulated(np.zeros((1, rows, Vp), np.float32))
    k = simulated(np.zeros((1, rows), np.int32))
    with watch() as seen:
        run(empty((1, rows), like=z), empty((1, rows), like=z), z, k, V)
    print(f"{name:9} {seen.read_bytes:7,} bytes read,", end=" ")
    print(f"{seen.requests:5,} requests, {seen.sectors:6,} sectors")


# %% [markdown]
# ## A thread a row
#
# The CPU's kernel with the loop over the rows taken off: a sweep for the
# maximum and a sweep for the sum. The model does not use this version; the
# ladder of [chapter A.7](../appendix/07_ladders.ipynb) times it beside the one
# that it does use.

# %% imports of a thread a row tags=["export"] module="bench.rungs_crossentropy"
import math

import numpy as np

from llmnb.gpu.launch import kernel
from llmnb.gpu.simulator import cuda


# %% a thread a row tags=["export"] module="bench.rungs_crossentropy"
@kernel
def _loss_by_threads(losses, lse, logits, targets, V):
    row = cuda.grid(1)
    if row >= len(logits):
        return
    top, total = logits[row, 0], np.float32(0)
    for i in range(1, V):
        top = max(top, logits[row, i])
    for i in range(V):
        total += math.exp(logits[row, i] - top)
    lse[row] = top + math.log(total)
    losses[row] = top + math.log(total) - logits[row, targets[row]]


def loss_by_threads(losses, lse, logits, targets, V):
    """The classifier's forward pass, a thread a row; nothing is checked."""
    Vp, small = logits.shape[-1], (losses, lse, targets)
    losses, lse, targets = [x.reshape(-1) for x in small]
    grid = -(-losses.size // 64)
    rows = losses, lse, logits.reshape(-1, Vp), targets
    _loss_by_threads[grid, 64](*rows, V)


# plainest first; the layer itself comes after them
CROSSENTROPY_SOFTMAX_FORWARD = (loss_by_threads,)

# %% a thread a row, tried
try_loss(loss_by_threads)

# %% [markdown]
# ## A pair for any set of logits
#
# The 32 threads of a warp read one column of 32 rows at once: 32 addresses
# that lie a row apart, each in a sector of its own of which 28 bytes are not
# asked for. Let the lanes of a warp share a row instead, lane 0 taking columns
# 0, 32, 64 and so on. One request then covers 128 bytes in a row, four
# sectors.
#
# But then each lane has the maximum and the sum of its own columns only. And
# two sweeps mean that the row is read twice: it has 201 KB and does not fit
# into the 48 KB of shared memory that a block may use here. The online
# softmax of [chapter 2.5](../2_cpu/05_attention.ipynb) helps with both. Keep a
# pair $(m, s)$ of the largest logit so far and of the sum
# $s = \sum e^{z_i - m}$ of those read. Two sets of logits with the pairs
# $(m_a, s_a)$ and $(m_b, s_b)$ have together the pair
#
# $$ \begin{aligned}
#    m &= \max(m_a, m_b) , \\
#    s &= s_a\, e^{m_a - m} + s_b\, e^{m_b - m} ,
#    \end{aligned} \tag{3.8.1} $$
#
# and one of the two exponentials is $e^0$. A single logit $z$ is a set too,
# with the pair $(z, 1)$. So one function serves the sweep and the merging.
# Whichever maximum is the larger, it needs the same exponential, so that the
# lanes of a warp do not have to part ways.
#
# A lane that has seen nothing brings (`LOWEST`, 0): whatever it is merged
# with stays as it is. On paper the lowest would be $-\infty$, but fastmath
# assumes that there is no infinity. The GPU computes $e^x$ as
# $2^{x \log_2 e}$, so the number is chosen such that this product is finite
# too.


# %% two pairs tags=["exporti"]
LOWEST = np.float32(-1e38)  # below every logit; times log2(e) still finite


@device
def _merged(top, total, other, more):
    """The pair of two sets of logits from the pair of each."""
    less = math.exp(-abs(other - top))
    if other > top:
        return other, total * less + more
    return top, total + more * less


# %% [markdown]
# Five exchanges merge 32 lanes; in each, a lane meets the one whose number
# differs in one bit. In figure 3.8.2, four lanes do it in Python, with the
# function of the kernel.


# %% the pair of a warp tags=["exporti"]
@device
def _warp_merged(top, total):
    """The pair of all logits that the lanes of a warp have seen."""
    for step in (16, 8, 4, 2, 1):
        other = cuda.shfl_xor_sync(0xFFFFFFFF, top, step)
        more = cuda.shfl_xor_sync(0xFFFFFFFF, total, step)
        top, total = _merged(top, total, other, more)
    return top, total


# %% pairs of four lanes
logits_of = [[0.5, 1.2], [2.0, -0.5], [-1.0, 1.0], [0.0, -2.0]]
pairs = []
for two in logits_of:
    pair = LOWEST, np.float32(0)
    for number in np.float32(two):
        pair = _merged(pair[0], pair[1], number, np.float32(1))
    pairs.append(pair)
stages = [pairs]
for bit in (2, 1):
    last = stages[-1]
    meet = [(last[i], last[i ^ bit]) for i in range(4)]
    stages.append([_merged(a[0], a[1], b[0], b[1]) for a, b in meet])
want = np.exp(np.float32(logits_of) - 2).sum()
compare("sum of eight", np.float32([x[1] for x in stages[-1]]), want.repeat(4))

# %% the merging of pairs, drawn
fig, ax = plt.subplots(figsize=(6, 3.2), dpi=100)
for row, stage in enumerate(stages):
    for lane, (top, total) in enumerate(stage):
        colour = PALETTE["orange" if top == 2 else "blue"]
        box = {"boxstyle": "round", "fc": "white", "ec": colour, "lw": 1.5}
        text = f"({top:.1f}, {total:.3f})"
        ax.text(lane, -row, text, ha="center", va="center", bbox=box)
        for source in (lane, lane ^ (0, 2, 1)[row]) if row else ():
            ends = {"xy": (lane, 0.2 - row), "xytext": (source, 0.8 - row)}
            arrow = {"arrowstyle": "->", "color": PALETTE["ink"], "lw": 0.8}
            ax.annotate("", **ends, arrowprops=arrow)
for lane, two in enumerate(logits_of):
    label = f"lane {lane}\nreads {two[0]}, {two[1]}"
    ax.text(lane, 0.35, label, ha="center", va="bottom")
ax.set(xlim=(-0.5, 3.5), ylim=(-2.3, 0.9))
ax.axis("off")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 3.8.2. Pairs (m, s) of four lanes that read two logits each. Every
# lane merges its pair with that of the lane two further, then with that of
# its neighbour. The largest logit, 2.0 (orange), has reached every lane,
# and all hold the same sum of eight exponentials.*
#
# Here is a warp a row, with one reading of each logit.


# %% a warp a row
@kernel
def by_warps(losses, lse, logits, targets, V):
    row, lane = cuda.grid(1) // 32, cuda.threadIdx.x % 32
    if row >= len(logits):
        return
    top, total = LOWEST, np.float32(0)
    for i in range(lane, V, 32):
        top, total = _merged(top, total, logits[row, i], np.float32(1))
    top, total = _warp_merged(top, total)
    if lane == 0:
        lse[row] = top + math.log(total)
        losses[row] = top + math.log(total) - logits[row, targets[row]]


def loss_by_warps(losses, lse, logits, targets, V):
    rows = [x.reshape(-1) for x in (losses, lse, targets)]
    grid, table = -(-rows[0].size // 4), logits.reshape(-1, logits.shape[-1])
    by_warps[grid, 128](rows[0], rows[1], table, rows[2], V)


try_loss(loss_by_warps)
count_loss("a thread", loss_by_threads, 32, 125, 128)
count_loss("a warp", loss_by_warps, 32, 125, 128)

# %% [markdown]
# Warps ask for half the bytes, because each logit is read once and not twice.
# The sectors are far fewer than half, because each is now used whole.
#
# ## A block a row
#
# GPT-2's rows have 50,257 logits. A lane of the warp takes 1,571 of them one
# after the other. And a batch of 4 x 64 positions makes 256 warps, where each
# of an H100's 132 multiprocessors has room for 64: two for each, too few to
# have enough bytes under way ([chapter 3.2](02_sectors.ipynb)). With 1,024
# threads a row a thread takes 50 logits, and the same batch has 8,192 warps.
#
# The price is that 32 warps have to agree. Their pairs pass through shared
# memory, and one barrier is enough: every warp merges the pairs of all for
# itself.


# %% the pair of a block tags=["exporti"]
@device
def block_merged(top, total, tops, totals):
    """The pair of all logits that the threads of a block have seen.

    tops, totals: shared memory, 32 elements each.
    """
    warp, lane = cuda.threadIdx.x // 32, cuda.threadIdx.x % 32
    top, total = _warp_merged(top, total)
    if lane == 0:
        tops[warp], totals[warp] = top, total
    cuda.syncthreads()
    top, total = LOWEST, np.float32(0)
    if lane < cuda.blockDim.x // 32:
        top, total = tops[lane], totals[lane]
    return _warp_merged(top, total)


# %% [markdown]
# And without that barrier? Two warps of a block, each a logit a lane:


# %% a block that does not wait
@kernel
def hurried(lse, logits):
    tops = cuda.shared.array(32, np.float32)
    totals = cuda.shared.array(32, np.float32)
    warp, lane = cuda.threadIdx.x // 32, cuda.threadIdx.x % 32
    top, total = _warp_merged(logits[cuda.threadIdx.x], np.float32(1))
    if lane == 0:
        tops[warp], totals[warp] = top, total
    top, total = LOWEST, np.float32(0)
    if lane < 2:
        top, total = tops[lane], totals[lane]
    top, total = _warp_merged(top, total)
    lse[cuda.threadIdx.x] = top + math.log(total)


zeros = simulated(np.zeros(64, np.float32))
try:
    with watch():
        hurried[1, 64](empty(64, like=zeros), zeros)
    caught = False
except RaceError as error:
    print(str(error).replace(": ", ":\n").replace(", and", ",\nand"))
    caught = True
verdict("the race", caught, "is caught")


# %% the same threads, who wait
@kernel
def patient(lse, logits):
    tops = cuda.shared.array(32, np.float32)
    totals = cuda.shared.array(32, np.float32)
    top, one = logits[cuda.threadIdx.x], np.float32(1)
    top, total = block_merged(top, one, tops, totals)
    lse[cuda.threadIdx.x] = top + math.log(total)


fig, axes = plt.subplots(1, 2, figsize=(6, 1.4), dpi=100)
draw_owners(axes[0], [[0, 32]], "tops, written by", 32)
draw_owners(axes[1], [[0, 1], [32, 33]], "tops, read by", 32)
fig.tight_layout()
plt.show()
args = np.zeros(64, np.float32), np.arange(64, dtype=np.float32) % 7
walks = [walk("without a barrier", hurried, 1, 64, args, 32),
         walk("with one", patient, 1, 64, args, 32)]  # fmt: skip
for x in walks:
    del x["steps"]["alone"]  # they go side by side
names = {"shared": ["tops", "totals"], "wrap": 8}
moving("threads", "two warps merge their pairs", walks=walks, **names)

# %% [markdown]
# *Figure 3.8.3. The first lane of each of two warps writes its warp's pair;
# then two lanes of each warp read both pairs. One of the two always comes
# from the other warp, and only a barrier says that it is there by then.*
#
# ## Vectors of four
#
# A lane may ask for 16 bytes at once, where its address is a multiple of
# 16. The bytes stay the same, and the requests become a quarter. The online
# sum changes too: four logits rescale it once together, with five
# exponentials of which none waits for another.
#
# A row begins at such an address when Vp is a multiple of 4, which the
# padding to 128 sees to. V is odd: 50,257 logits are 12,564 vectors and one
# more, which a loop over single elements takes. The host counts `whole`, the
# columns that go by vectors: none where Vp is no multiple of 4 or an array
# begins elsewhere. So no vector reaches into the padding, and no number that
# may be NaN enters the arithmetic.


# %% four logits at once tags=["exporti"]
def _whole(V, *arrays):
    """How many of the first V columns can be moved in vectors of four."""
    fits = arrays[0].shape[1] % 4 == 0 and aligned(*arrays)
    return V - V % 4 if fits else 0


def _threads(n):
    """Threads for n things: whole warps, and no more than a block has."""
    return min(1024, -(-n // 32) * 32)


@device
def _with_four(top, total, a, b, c, d):
    """The pair of some logits, and of four more: five exponentials."""
    most = max(max(top, max(a, b)), max(c, d))
    total *= math.exp(top - most)
    total += math.exp(a - most) + math.exp(b - most)
    total += math.exp(c - most) + math.exp(d - most)
    return most, total


# %% loss and lse by blocks tags=["exporti"]
@device
def _row_merged(logits, row, V, whole, tops, totals):
    """The pair of a row, which all threads of a block read together."""
    me, step, Vp = cuda.threadIdx.x, cuda.blockDim.x, logits.shape[1]
    top, total = LOWEST, np.float32(0)
    for i in range(4 * me, whole, 4 * step):
        a, b, c, d = load4(logits, row * Vp + i)
        top, total = _with_four(top, total, a, b, c, d)
    for i in range(whole + me, V, step):
        top, total = _merged(top, total, logits[row, i], np.float32(1))
    return block_merged(top, total, tops, totals)


@kernel(launch_bounds=1024)
def _loss_by_blocks(losses, lse, logits, targets, V, whole):
    row = cuda.blockIdx.x
    tops = cuda.shared.array(32, np.float32)
    totals = cuda.shared.array(32, np.float32)
    top, total = _row_merged(logits, row, V, whole, tops, totals)
    if cuda.threadIdx.x == 0:
        lse[row] = top + math.log(total)
        losses[row] = top + math.log(total) - logits[row, targets[row]]


# %% [markdown]
# The function around it looks at its arguments as the others do, with one
# exception. The targets lie in the GPU's memory; to look at them, the host
# would have to wait for all work before and to copy them back. So the caller
# checks their range on the host, before they are copied to the GPU.


# %% the forward pass tags=["export"]
def _rows(*arrays):
    """A device's arrays with one row, or number, a token."""
    if not all(x.size for x in arrays):
        raise ValueError("crossentropy: B, T and Vp must not be 0")
    return [x.reshape(-1, *tuple(x.shape)[2:]) for x in arrays]


@shapes("B T!, B T!, B T Vp, B T of V, 1 to Vp", DEVICE)
def crossentropy_softmax_forward(losses, lse, logits, targets, V):
    """Losses straight from the logits; no probability is stored.

    losses, lse: device's float32 (B, T), written; lse is the log of the sum
    of the exponentials of a row, all that the backward pass needs besides
    the logits. logits: (B, T, Vp), each read once, above -1e38; columns
    from V on are not read. targets: device's int32 (B, T), each in [0, V):
    the caller checks that on the host. Raises TypeError or ValueError for a
    wrong dtype or shape and for V outside [1, Vp].
    """
    losses, lse, logits, targets = _rows(losses, lse, logits, targets)
    grid, block, whole = len(logits), _threads(-(-V // 4)), _whole(V, logits)
    _loss_by_blocks[grid, block](losses, lse, logits, targets, V, whole)


# %% the forward pass, tried and counted
seen, more = np.float32([1, 2]), np.float32([0.5, 3, -1, 2])
sums = 2 * np.exp(1 - 3) + np.exp(more - 3).sum()
compare("four more", _with_four(*seen, *more), (3, sums))
try_loss(crossentropy_softmax_forward)
count_loss("a warp", loss_by_warps, 1, 1021, 1024)
count_loss("a block", crossentropy_softmax_forward, 1, 1021, 1024)

# %% [markdown]
# One row of 1,021 logits. Both ask for each of them, for the target and once
# more for the target's logit. The block asks about a third as often: each
# vector is one request for four, and the last logit, the target and its logit
# take one request each.
#
# ## Backward: p - y in place
#
# (1.11.12) needs its own logit alone and no other: nothing is summed and
# nobody waits. Every element is read once and written once, in place if you
# like, because the thread that writes it is the one that read it. The padding
# is not read, and its zeros are written.


# %% p - y of a row tags=["exporti"]
@device
def _slope(x, shift, scale, hit):
    """The gradient by one logit: (1.11.12)."""
    y = np.float32(1) if hit else np.float32(0)
    return scale * (math.exp(x - shift) - y)


@device
def _row_of_slopes(dlogits, logits, row, k, shift, scale, V, whole):
    """Write p - y of a row, scaled; all threads of a block together."""
    me, step, Vp = cuda.threadIdx.x, cuda.blockDim.x, logits.shape[1]
    for i in range(4 * me, whole, 4 * step):
        a, b, c, d = load4(logits, row * Vp + i)
        a = _slope(a, shift, scale, i == k)
        b = _slope(b, shift, scale, i + 1 == k)
        c = _slope(c, shift, scale, i + 2 == k)
        d = _slope(d, shift, scale, i + 3 == k)
        store4(dlogits, row * Vp + i, a, b, c, d)
    for i in range(whole + me, Vp, step):
        slope = np.float32(0)
        if i < V:
            slope = _slope(logits[row, i], shift, scale, i == k)
        dlogits[row, i] = slope


@kernel(launch_bounds=1024)
def _slopes_by_blocks(dlogits, dlosses, logits, lse, targets, V, whole):
    row = cuda.blockIdx.x
    k, shift, scale = targets[row], lse[row], dlosses[row]
    _row_of_slopes(dlogits, logits, row, k, shift, scale, V, whole)


# %% the backward pass tags=["export"]
@shapes("B T Vp!, B T, B T Vp~, B T, B T of V, 1 to Vp", DEVICE)
def crossentropy_softmax_backward(dlogits, dlosses, logits, lse, targets, V):
    """Write the gradient of the losses by the logits: p - y, scaled.

    dlogits: device's float32 (B, T, Vp), overwritten (not added to); it may
    be `logits` itself, which then is lost. dlosses, lse: (B, T), lse from
    the forward pass. targets: device's int32 (B, T), each in [0, V).
    Columns from V on receive 0. Raises as the forward pass does.
    """
    arrays = _rows(dlogits, dlosses, logits, lse, targets)
    whole, block = _whole(V, arrays[0], arrays[2]), _threads(-(-V // 4))
    _slopes_by_blocks[len(arrays[0]), block](*arrays, V, whole)


# %% backward against NumPy, and in place
dlosses = rng.normal(size=(2, 3)).astype(np.float32)
want = np.empty_like(logits)
arrays = dlosses, logits, lse, targets
reference.crossentropy_softmax_backward(want, *arrays, 101)
there = [to_device(x) for x in arrays]
for place, out in (("apart", empty((2, 3, 128))), ("in place", there[1])):
    crossentropy_softmax_backward(out, *there, 101)
    compare(place, to_host(out), want)

# %% [markdown]
# ## Both at once
#
# In a training step backward follows forward at once, and the logits of a
# batch pass by three times: read, read, written. One block that does both for
# its row asks for it again much earlier, when a cache may still hold it, and
# $z_k$ and lse never leave the block. It takes one more barrier: the place of
# $z_k$ is overwritten, perhaps by another thread than the one that reads it.


# %% loss and gradient in one launch tags=["export"]
@kernel(launch_bounds=1024)
def _both_by_blocks(losses, lse, logits, dlosses, targets, V, whole):
    row = cuda.blockIdx.x
    tops = cuda.shared.array(32, np.float32)
    totals = cuda.shared.array(32, np.float32)
    k, scale = targets[row], dlosses[row]
    top, total = _row_merged(logits, row, V, whole, tops, totals)
    shift = top + math.log(total)
    if cuda.threadIdx.x == 0:
        lse[row] = shift
        losses[row] = shift - logits[row, k]
    cuda.syncthreads()
    _row_of_slopes(logits, logits, row, k, shift, scale, V, whole)


@shapes("B T!, B T!, B T Vp!, B T, B T of V, 1 to Vp", DEVICE)
def fused_classifier(losses, lse, logits, dlosses, targets, V):
    """Losses, and their gradient in the place of the logits, in one launch.

    The same as crossentropy_softmax_forward(losses, lse, logits, targets, V)
    and crossentropy_softmax_backward(logits, dlosses, logits, lse, targets,
    V), to the bit, and raises what they raise.
    """
    arrays = _rows(losses, lse, logits, dlosses, targets)
    whole, block = _whole(V, arrays[2]), _threads(-(-V // 4))
    _both_by_blocks[len(arrays[2]), block](*arrays, V, whole)


# %% the same bits as in two launches
two, one = ([to_device(x) for x in (losses, lse, logits)] for _ in range(2))
numbers = to_device(dlosses), to_device(targets)
crossentropy_softmax_forward(*two, numbers[1], 101)
crossentropy_softmax_backward(
    two[2], numbers[0], two[2], two[1], numbers[1], 101
)
with watch():
    fused_classifier(*one, *numbers, 101)
for name, a, b in zip(("losses", "lse", "dlogits"), one, two, strict=True):
    verdict(name, np.array_equal(to_host(a), to_host(b)), "the same bits")

# %% [markdown]
# ## Count it
#
# Forward reads 4 bytes a logit, backward reads 4 and writes 4. Here are both
# on a row of GPT-2, 50,257 logits that are padded to 50,304, and what follows
# for a batch on a named GPU.

# %% a row of GPT-2, counted
V, Vp = 50257, 50304
z = simulated(np.zeros((1, 1, Vp), np.float32))
k, one = (
    simulated(np.zeros((1, 1), np.int32)),
    simulated(np.ones((1, 1), "f4")),
)
loss, lse_of_z = empty((1, 1), like=z), empty((1, 1), like=z)
with watch() as forward:
    crossentropy_softmax_forward(loss, lse_of_z, z, k, V)
with watch() as backward:
    crossentropy_softmax_backward(z, one, z, lse_of_z, k, V)
for name, seen in ("forward", forward), ("backward", backward):
    print(f"{name:8} {seen.sectors:6,} sectors of 32 bytes", end=", ")
    print(f"{32 * seen.sectors / (4 * Vp):.1f} times a row")
seconds = 3 * 4 * Vp * 4 * 1024 / 3350e9
print(f"B=4 T=1024 on an H100: at least {seconds * 1e3:.1f} ms for both")

# %% [markdown]
# Sectors count what moves when no cache helps. The three numbers of a row,
# its target, its lse and its factor, are asked for by every warp; a cache
# answers. The prediction leaves them out.

# %% [markdown]
# ## Take away
#
# - Threads that run together should read neighbours: a warp a row moves whole
#   sectors.
# - The pair of a maximum and a sum can be merged in any grouping, so that one
#   reading of a row is enough for its loss.
# - A block's warps meet in shared memory; the barrier between writing there
#   and reading is what makes it no race.
# - Backward needs nothing but its own logit and lse, and works in place.

# %% [markdown]
# ## Design note
#
# llm.c's trainer has the one kernel only. `llmnb` keeps the two functions as
# well. A model's forward pass leaves logits to its caller: to sample from them,
# to evaluate a loss that nobody differentiates, to look at them. One call for
# both would overwrite them, and would need `dlosses` before the first loss is
# known. With two calls `backward` decides that the logits may go; in
# `GPT2.step` nobody asks for them, and there the two become one
# ([chapter 3.11](11_step.ipynb)).

# %% [markdown]
# ## Exercises
#
# **1** (★★★). Write a kernel that finds the token with the largest logit of
# each row, a warp a row. Where two are equally large, the first counts. What
# do the lanes exchange, and what makes all of them agree?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# They exchange pairs of a logit and its token. Of two pairs the one with the
# larger logit wins, or, where these are equal, the one with the smaller
# token. Any two lanes that meet decide alike, and the winner does not depend
# on the order of the meetings.
# :::


# %% exercise 1, the kernel tags=["hide-cell"]
@kernel
def largest(tokens, logits, V):
    row, lane = cuda.blockIdx.x, cuda.threadIdx.x
    top, token = LOWEST, 0
    for i in range(lane, V, 32):
        if logits[row, i] > top:
            top, token = logits[row, i], i
    for step in (16, 8, 4, 2, 1):
        other = cuda.shfl_xor_sync(0xFFFFFFFF, top, step)
        theirs = cuda.shfl_xor_sync(0xFFFFFFFF, token, step)
        if other > top or (other == top and theirs < token):
            top, token = other, theirs
    if lane == 0:
        tokens[row] = token


# %% exercise 1, checked
z = rng.integers(0, 3, (9, 64)).astype(np.float32)
z[:, 61:] = 9  # padding
tokens = to_device(np.zeros(9, np.int32))
largest[9, 32](tokens, to_device(z), 61)
same = np.array_equal(to_host(tokens), z[:, :61].argmax(-1))
verdict("largest", same, "first of the largest")

# %% [markdown]
# ## Further reading
#
# - Milakov and Gimelshein (2018),
#   [Online Normalizer Calculation for Softmax](https://arxiv.org/abs/1805.02867):
#   the pair of (3.8.1), and what it saves on hardware.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("3.8")
