# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       gpu.warp: "Sums over a warp and over a block."
# ---

# %% [markdown]
# # Sectors: what memory costs
#
# > Memory moves in sectors of 32 bytes and banks of four; neighbours in a warp
# > should want neighbours in memory, and a sum takes five steps.
#
# *Reading time: 20 minutes. You need: warps, barriers and shared memory from
# [chapter 3.1](01_threads.ipynb).*

# %% [markdown]
# ## Where we are
#
# Two kernels that read the same numbers and compute the same sums can differ
# several times in their cost, by which thread reads which number. This
# chapter says what a GPU's memory charges for, and counts it on the
# simulator. Then it adds up the numbers of a warp and of a block, which most
# layers need. At its end you can
#
# - count the sectors that a request of a warp moves;
# - find a bank conflict in shared memory, and pad it away;
# - say what four numbers in one access save, and what they need;
# - say how many bytes a GPU must have under way to be busy;
# - add the numbers of a block with two barriers, in a fixed order.

# %% [markdown]
# ## Setup

# %% setup
import matplotlib.pyplot as plt

from llmnb.book.diagram import PALETTE
from llmnb.book.verify import compare, verdict
from llmnb.gpu.launch import empty, kernel, simulated, to_host
from llmnb.gpu.simulator import load4, placed, simulate, store4, watch

# %% imports of the warp tags=["export"]
import numpy as np

from llmnb.gpu.launch import device
from llmnb.gpu.simulator import cuda

# %% the seed
rng = np.random.default_rng(4)

# %% [markdown]
# ## Sectors
#
# When the lanes of a warp reach a line that reads `x[i]`, the multiprocessor
# makes *one* request of their 32 addresses. Global memory answers in
# *sectors*: pieces of 32 bytes that begin at multiples of 32. If the 32
# lanes want 32 numbers that lie next to each other, that is 128 bytes or
# four sectors, and every byte that moves is wanted: the access is
# *coalesced*. If they want one number each from 32 different rows of a
# matrix, 32 sectors move, 1024 bytes, for the same 128. Which of them a
# cache holds already we do not count.
#
# A warp reads 32 numbers that lie $s$ apart. Predict the sectors for $s$ = 0,
# 1, 2, 4, 8, 16 and 32, and count:


# %% sectors of a strided read
def strided(out, inp, s):
    out[cuda.threadIdx.x] = inp[cuda.threadIdx.x * s]


# simulated memory begins at a multiple of 256 bytes, as a GPU's does
def at_256(size):
    return placed(np.zeros(size, np.float32), 256)


def sectors(s):
    with watch() as seen:
        simulate(strided, 1, 32, (at_256(32), at_256(32 * 32), s))
    return seen.sectors - 4  # without the four that it writes


print({s: sectors(s) for s in (0, 1, 2, 4, 8, 16, 32)})

# %% [markdown]
# From stride 8 on, each lane has a sector to itself and uses an eighth of
# it. All strides at once: what part of the bytes that move does a warp want?

# %% bytes wanted of bytes moved
strides = list(range(1, 33))
used = [128 / (32 * sectors(s)) for s in strides]
fig, ax = plt.subplots(figsize=(7, 2.8), dpi=100)
ax.bar(strides, [100 * u for u in used], color=PALETTE["blue"])
ax.set(xlabel="stride between two lanes, in numbers of four bytes")
ax.set(ylabel="bytes used, %", xlim=(0, 33), ylim=(0, 105))
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 3.2.1. Of the bytes that move, a warp that reads neighbours uses all.
# With each step of the stride it uses less, and from stride 8 on an eighth:
# a column of a matrix costs eight times its bytes, however long the rows.*
#
# So layers give neighbours in a row to neighbours in a warp, wherever they
# can.
#
# ## Banks
#
# Shared memory has a different rule. It consists of 32 *banks*, and word
# $w$ (of four bytes) lies in bank $w \bmod 32$. In one pass each bank gives
# one word, to as many lanes as want that word. A request takes as many
# passes as there are different words wanted from its busiest bank:
#
# $$ \text{passes} = \max_{k} \bigl| \{ w \text{ wanted} :
#    w \bmod 32 = k \} \bigr| . \tag{3.2.1} $$

# %% where a column lies
colours = [PALETTE[k] for k in ("blue", "orange", "green", "yellow")]
fig, axes = plt.subplots(1, 2, figsize=(8, 2.6), dpi=100)
for ax, width in zip(axes, (8, 9), strict=True):
    for word in range(5 * width):
        row, column = divmod(word, width)
        x, y = word % 8, word // 8
        wanted = column == 0
        fill = PALETTE["orange"] if wanted else PALETTE["pale"]
        ax.add_patch(plt.Rectangle((x, y), 1, 1, fc=fill, ec="white"))
        ink = "white" if wanted else PALETTE["ink"]
        ax.text(x + 0.5, y + 0.5, row, ha="center", va="center", color=ink)
    ax.set(xlim=(0, 8), ylim=(6, 0), xlabel="bank", yticks=[])
    ax.set(xticks=np.arange(8) + 0.5, xticklabels=range(8))
    ax.set(title=f"rows of {width} numbers")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 3.2.2. A board with five rows, in a memory with eight banks for the
# sake of the picture; each word bears the number of its row, and the first
# column is coloured. With rows of eight it lies in one bank and takes five
# passes. With rows of nine, one number of each unused, it lies in five banks,
# and one pass is enough.*
#
# Here the lanes of a warp write and read a column of a real board, with rows
# of 32 numbers and then of 33:


# %% passes of a column
def column(out, width):
    board = cuda.shared.array(32 * 33, np.float32)
    board[cuda.threadIdx.x * width] = 1
    cuda.syncthreads()
    out[cuda.threadIdx.x] = board[cuda.threadIdx.x * width]


for width in (32, 33):
    with watch() as seen:
        simulate(column, 1, 32, (at_256(32), width))
    print(width, seen.shared_requests, "requests,", seen.shared_passes)

# %% [markdown]
# With rows of 32 each request takes 32 passes. One unused number at the end
# of each row moves the next row to the next bank, and the conflict is gone.
#
# ## Four numbers at once
#
# A lane may also ask for 16 bytes in one instruction, four numbers that lie
# together at a multiple of 16. The sectors are the same, since the bytes
# are, but the warp makes a quarter of the requests. `load4` and `store4` do
# that.


# %% one number a lane, or four
def copy1(out, inp):
    i = cuda.grid(1)
    out[i] = inp[i]


def copy4(out, inp):
    i = cuda.grid(1) * 4
    a, b, c, d = load4(inp, i)
    store4(out, i, a, b, c, d)


for body, blocks in ((copy1, 8), (copy4, 2)):
    with watch() as seen:
        simulate(body, blocks, 128, (at_256(1024), at_256(1024)))
    print(
        f"{body.__name__}  {seen.requests:>3} requests {seen.sectors} sectors"
    )

# %% [markdown]
# They need arrays that begin at a multiple of 16 bytes, and rows whose length
# is a multiple of four. All of GPT-2's are; the layers keep a plain version
# for other sizes.
#
# **Why fewer requests help.** A thread that reads waits, for something like
# half a microsecond, and a GPU hides that by having other reads under way. How
# many? What moves in a second, times the seconds that a read takes, is what
# must be under way at any moment. An H100 moves 3350 GB/s:

# %% bytes under way
bytes_under_way = 3350e9 * 0.5e-6
each = bytes_under_way / 132
print(f"{each / 1e3:.1f} KB for each of 132 multiprocessors")
for wide in (4, 16):
    print(f"{2048 * wide / 1e3:.1f} KB if 2048 threads read {wide} bytes each")

# %% [markdown]
# A multiprocessor has room for 2048 threads. If each waits for one number,
# too little is under way, even at full occupancy; with four numbers in each
# access, half of the threads are enough.
#
# ## Sums of a warp
#
# With shuffles a warp adds its 32 numbers in five steps. In the first, a
# lane exchanges with the one 16 places away, then 8, 4, 2 and 1; the binary
# digits of the two lanes' numbers differ in one place, and `xor` finds the
# partner. After the first step a lane holds a sum of two numbers, then of
# four, and after the fifth all lanes hold the sum of all.

# %% the butterfly
fig, ax = plt.subplots(figsize=(7, 2.4), dpi=100)
for row, step in enumerate((4, 2, 1)):
    for lane in range(8):
        for other in (lane, lane ^ step):
            colour = PALETTE["grey" if other == lane else "blue"]
            ax.plot((other, lane), (-row, -row - 1), color=colour, lw=1)
for row, text in enumerate(("1 number", "sum of 2", "of 4", "of 8")):
    ax.scatter(range(8), [-row] * 8, s=40, color=PALETTE["ink"], zorder=3)
    ax.text(7.4, -row, text, va="center")
ax.set(xticks=range(8), yticks=[], xlabel="lane", xlim=(-0.5, 9))
ax.spines[:].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 3.2.3. The exchange for eight lanes, which takes three steps; grey
# lines keep a lane's own number, blue ones bring its partner's. Every lane
# adds the same pairs, so all end with the same bits.*
#
# We keep it as a function that kernels call. Such a function is marked
# `device`: where a kernel is compiled for a GPU, it is compiled along with it.


# %% sums in a warp tags=["export"]
@device
def warp_sum(value, lanes=32):
    """The sum of `value` over the 32 lanes of a warp, in every lane.

    lanes: 16, 8, 4 or 2 for a sum over as many neighbours instead.
    Every lane of the warp must call it. The order of the additions is
    fixed.
    """
    for step in (16, 8, 4, 2, 1):
        if step < lanes:
            value += cuda.shfl_xor_sync(0xFFFFFFFF, value, step)
    return value


# %% [markdown]
# ## Sums of a block
#
# A block adds in two storeys. Each warp adds its own numbers, and its first
# lane puts the sum on a board; after a barrier, every thread adds up the
# few numbers on the board, in the same order, so all get the same bits. The
# second barrier lets the caller use the board again at once: nobody is
# still reading it.


# %% sums in a block tags=["export"]
@device
def block_sum(value, parts):
    """The sum of `value` over the threads of a block, in every thread.

    Every thread must call it. parts: shared memory, one element for each
    warp of the block (at most 32); it is free again when the call returns.
    Blocks are whole warps, in one dimension.
    """
    value = warp_sum(value)
    if cuda.threadIdx.x % 32 == 0:
        parts[cuda.threadIdx.x // 32] = value
    cuda.syncthreads()
    total = np.float32(0)
    for i in range(cuda.blockDim.x // 32):
        total += parts[i]
    cuda.syncthreads()
    return total


# %% [markdown]
# A kernel that uses it is launched as numba's are: `@kernel` makes an object
# of a function, and `row_sums[grid, block](arguments)` runs it, in the
# simulator or on a GPU, where the arrays are. `simulated` puts an array on the
# simulated GPU and `to_host` brings it back
# ([chapter A.6](../appendix/06_launch.ipynb)). Each block adds a row. Its 128
# threads take every 128th number, so that neighbours in a warp read
# neighbours in memory:


# %% the sum of each row
@kernel
def row_sums(out, inp):
    parts = cuda.shared.array(4, np.float32)
    row, columns = cuda.blockIdx.x, inp.shape[1]
    total = np.float32(0)
    for c in range(cuda.threadIdx.x, columns, 128):
        total += inp[row, c]
    total = block_sum(total, parts)
    if cuda.threadIdx.x == 0:
        out[row] = total


x = rng.normal(size=(3, 300)).astype(np.float32)
out = simulated(np.zeros(3, np.float32))
with watch() as seen:
    row_sums[3, 128](out, simulated(x))
compare("row sums", to_host(out), x.sum(axis=1), tol=1e-4)
print(
    seen.barriers // seen.threads, "barriers,", seen.exchanges // 384, "swaps"
)

# %% [markdown]
# Five exchanges add a warp, and two barriers a block, however long the row. A kernel that
# takes two sums by way of the same board needs the second barrier, and `watch` would
# say so if it were missing. Here are two, and those of four neighbouring lanes:


# %% sums one after the other
@kernel
def three_sums(out, inp):
    parts, t = cuda.shared.array(4, np.float32), cuda.threadIdx.x
    out[0, t] = block_sum(inp[t], parts)
    out[1, t] = block_sum(inp[t] * inp[t], parts)
    out[2, t] = warp_sum(inp[t], 4)


x = rng.normal(size=128).astype(np.float32)
out = simulated(np.zeros((3, 128), np.float32))
with watch():
    three_sums[1, 128](out, simulated(x))
fours = x.reshape(32, 4).sum(axis=1).repeat(4)
want = np.full(128, x.sum()), np.full(128, (x * x).sum()), fours
compare("three sums", to_host(out), want, tol=1e-5)

# %% [markdown]
#
# ## Take away
#
# - Neighbours in a warp should read neighbours in memory: whole sectors of
#   32 bytes move.
# - Lanes that want different words of one bank of shared memory wait for each
#   other; an unused number at the end of each row moves the next one on.
# - Four numbers in one access make a quarter of the requests, and keep more
#   bytes under way with fewer threads.
# - A warp adds 32 numbers in five exchanges, a block in two storeys, both in
#   a fixed order.
#
# ## Design note
#
# The last storey of `block_sum` could be a butterfly too, by the first warp,
# with a broadcast after it. Every thread adding a few numbers itself takes
# one barrier less, and the numbers come from one word each, which a bank gives
# to all lanes in one pass.

# %% [markdown]
# ## Exercises
#
# **1** (★). A warp reads 32 numbers of four bytes, $s$ apart, the first
# at a multiple of 32 bytes. Write down the number of sectors for any
# $s \ge 0$.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# Lane $k$ reads byte $4 s k$. For $s \ge 8$ no two lanes share a sector.
# For smaller strides, no sector between the first, number 0, and the last is
# left out, and the last is number $\lfloor 4 \cdot 31 s / 32 \rfloor$.
# :::


# %% exercise 1, a solution tags=["hide-cell"]
def sectors_of_stride(s):
    return 32 if s >= 8 else 4 * 31 * s // 32 + 1


# %% exercise 1, checked
same = all(sectors_of_stride(s) == sectors(s) for s in range(33))
verdict("sectors", same, "counted as predicted")

# %% [markdown]
# **2** (★★). Transpose a matrix of 32 by 32 with a block of 32 by 32
# threads, so that reading and writing both touch 4 sectors a request, and
# no request to shared memory takes more than one pass. Which barrier do you
# need?
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# Read rows, put them on a board with rows of 33, and after a barrier of the
# block read its columns and write rows: a warp's column was written by 32
# different warps.
# :::


# %% exercise 2, a solution tags=["hide-cell"]
@kernel
def transpose(out, inp):
    board = cuda.shared.array((32, 33), np.float32)
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    board[y, x] = inp[y, x]
    cuda.syncthreads()
    out[y, x] = board[x, y]


# %% exercise 2, checked
x = rng.normal(size=(32, 32)).astype(np.float32)
out = empty(x.shape, like=simulated(x))
with watch() as seen:
    transpose[1, (32, 32)](out, simulated(x))
compare("transposed", to_host(out), x.T, tol=1e-7)
verdict("sectors", seen.sectors == 4 * seen.requests, "4 a request")
verdict("banks", seen.shared_passes == seen.shared_requests, "no conflict")

# %% [markdown]
# ## Further reading
#
# - NVIDIA's
#   [CUDA C++ Best Practices Guide](https://docs.nvidia.com/cuda/cuda-c-best-practices-guide/):
#   "Coalesced access to global memory" and "Shared memory and memory banks".
# - Harris (2007),
#   [Optimizing Parallel Reduction in CUDA](https://developer.download.nvidia.com/assets/cuda/files/reduction.pdf):
#   a sum in seven versions, and what each of them bought.
# - Volkov (2010),
#   [Better Performance at Lower Occupancy](https://www.nvidia.com/content/GTC-2010/pdfs/2238_GTC2010.pdf):
#   why more bytes under way count, and not more threads.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("3.2")
