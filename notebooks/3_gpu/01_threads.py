# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       book.owners: "Which thread owns which element, drawn and stepped through."
# ---

# %% [markdown]
# # Threads: run a thousand at once
#
# > A graphics processor runs one short function in thousands of threads; what
# > orders two of them is a barrier, and where nothing does, they race.
#
# *Reading time: 25 minutes. You need: the owner rule and the race of
# [chapter 2.1](../2_cpu/01_compile.ipynb).*

# %% [markdown]
# ## Where we are
#
# A core of a CPU is built to finish one thing soon. A graphics processor, a
# *GPU*, is built to have very many things under way. It runs one short
# function, a *kernel*, in thousands of *threads*, each of which does its
# small part of an array; while some wait for memory, others compute. The
# layers of GPT-2 suit it: a million output elements, each computed by the
# same few lines. In this part we write each layer once more, as kernels.
#
# Such a program is easy to get wrong. Two threads that add to one number
# may lose one of the two additions, on some days only. So we work with an
# instrument: a GPU simulated in Python, which runs the very functions that
# a real one will run, and which raises an error when a result would depend
# on who comes first. It also counts what a kernel asks of the memory.
# [Chapter A.5](../appendix/05_simulator.ipynb) builds it. Here we use it. At
# the end you can
#
# - say which element a thread owns, from its place among the threads;
# - name the memories of a GPU, and who sees each;
# - put a barrier where one is missing;
# - exchange numbers in a warp without any memory;
# - find two accesses that nothing orders, a race, and repair it.
#
# No GPU has run this book's code yet. Its kernels run on the simulator, and
# they are compiled for two generations of NVIDIA's GPUs, which needs none of
# them. So what this part says of their cost is counted, never timed. Figures
# of the hardware come from NVIDIA's data sheets and its
# [CUDA C++ Programming Guide](https://docs.nvidia.com/cuda/cuda-c-programming-guide/).

# %% [markdown]
# ## Setup

# %% setup
import matplotlib.pyplot as plt
import numpy as np

from llmnb.book.moving import moving
from llmnb.book.verify import compare, verdict
from llmnb.gpu.simulator import (
    BarrierError,
    RaceError,
    cuda,
    simulate,
    watch,
)

FULL = 0xFFFFFFFF  # a number with a bit for each of 32 threads
rng = np.random.default_rng(4)

# %% [markdown]
# ## By hand
#
# Eight threads shall add 1 to seven numbers. We make two groups of four,
# *blocks*, and give each thread two numbers: that of its block and its own
# within the block. Thread 2 of block 1 owns element $1 \cdot 4 + 2 = 6$.
# Thread 3 of block 1 would own element 7, which is not there, so it must do
# nothing. All run the same function and differ in these two numbers alone:


# %% eight threads by hand
def by_hand(block, thread, y, x):
    i = block * 4 + thread
    if i < 7:
        y[i] = x[i] + 1


x, y = np.arange(10, 17), np.zeros(7, int)
for block in range(2):
    for thread in range(4):
        by_hand(block, thread, y, x)
print(y)

# %% [markdown]
# This loop *is* a simulator of a GPU, if a poor one. It lets one thread
# finish before the next begins, and a GPU runs them at the same time. While
# each thread touches elements of its own, nobody can tell the difference.
# Now let each thread of a block put a number on a common board, and then
# read what the thread after it has put there:


# %% threads that exchange
def next_one(thread, board, out):
    board[thread] = 10 * thread
    out[thread] = board[(thread + 1) % 4]


board, out = np.full(4, -1), np.zeros(4, int)
for thread in range(4):
    next_one(thread, board, out)
print(out)

# %% [markdown]
# Three threads have read the board before the next one wrote to it.
# The function needs a *barrier* between its two lines: a place where each
# thread waits until all have come.
#
# ## Threads, blocks and the grid
#
# A *launch* of a kernel names two sizes: how many blocks there are, the
# *grid*, and how many threads each block has, at most 1024. Both may have
# up to three dimensions, x, y and z, for the convenience of those who work
# on matrices. In one dimension, thread $t$ of block $b$ with blocks of $D$
# threads has the place
#
# $$ i = b D + t \tag{3.1.1} $$
#
# in the grid. A picture shows who owns which element. We shall need it for
# every layer:

# %% imports of the picture tags=["export"]
from matplotlib.patches import Rectangle

from llmnb.book.diagram import PALETTE


# %% the owners of elements tags=["export"]
def draw_owners(ax, who, title="", group=None, rows="", cols=""):
    """Draw a matrix of which each element bears the number of its owner.

    ax: matplotlib's axes. who: a list of rows of ints, threads, warps or
    blocks; a negative number stands for nobody. group: how many owners have
    one colour, such as 32 for threads that are coloured by warp; None gives
    each its own. rows, cols: what the two directions are.
    """
    colours = [PALETTE[k] for k in ("blue", "orange", "green", "yellow")]
    for i, row in enumerate(who):
        for j, owner in enumerate(row):
            colour = colours[owner // (group or 1) % len(colours)]
            box = Rectangle((j, i), 1, 1, fc=colour, ec="white", alpha=0.45)
            if owner >= 0:
                ax.add_patch(box)
                ax.text(j + 0.5, i + 0.5, owner, ha="center", va="center")
    ax.set(xlim=(0, len(who[0])), ylim=(len(who), 0), title=title)
    ax.set(xticks=[], yticks=[], xlabel=cols, ylabel=rows, aspect="equal")


# %% [markdown]
# Here is the kernel as a GPU would run it. `simulate` takes the function, the
# two sizes and the arguments; the kernel asks `cuda` where it is, and
# `cuda.grid(1)` is (3.1.1). These are the names that numba gives to CUDA,
# NVIDIA's system for programs on its GPUs.


# %% our first kernel
def add_one(out, inp, n):
    i = cuda.grid(1)
    if i < n:
        out[i] = inp[i] + np.float32(1)


inp, out = np.arange(7, dtype=np.float32), np.zeros(7, np.float32)
simulate(add_one, 2, 4, (out, inp, 7))
compare("add one", out, inp + 1, tol=1e-7)

# %% [markdown]
# The simulator can take down every step: which thread touches which element,
# and at which line. `walk` runs a kernel twice for that, once with the threads
# of a block side by side, step by step, and once one thread after the other.
# Nobody can say which of the two a GPU will do.

# %% imports of the steps tags=["export"]
import inspect
import math
import textwrap

import numpy as np

from llmnb.gpu.simulator import Film, placed, simulate, watch


# %% the steps of a kernel tags=["exporti"]
def _filmed(kernel, blocks, threads, args, together):
    """A film of a launch on copies of its arguments."""
    film = Film(together)
    copies = [placed(a, 16) if isinstance(a, np.ndarray) else a for a in args]
    with watch(film=film):
        simulate(kernel, blocks, threads, copies)
    return film


def _held(values):
    """Numbers as JSON has them: None for what nobody has written."""
    return [None if math.isnan(x) else round(x, 4) for x in values]


def _rows(film):
    """The steps of a film, a list for each."""
    return [
        [s.moment, s.block, s.thread, s.kind, s.function, s.line, s.array,
         s.first, _held(s.values), s.rival]
        for s in film.steps
    ]  # fmt: skip


# %% a walk through a kernel tags=["export"]
def walk(name, kernel, blocks, threads, args, group=1):
    """The steps of a launch, in two orders, for a figure that moves.

    As `simulate` takes its arguments; the arrays in args stay as they are.
    group: how many threads of a block have one colour, in a grid of one.
    """
    kernel = getattr(kernel, "function", kernel)
    launch = kernel, blocks, threads, args
    films = {
        "together": _filmed(*launch, True),
        "alone": _filmed(*launch, False),
    }
    codes = films["alone"].codes.items()
    return {
        "name": name,
        "block": math.prod(threads) if isinstance(threads, tuple) else threads,
        "group": group,
        "main": kernel.__code__.co_name,
        "code": {x: textwrap.dedent(inspect.getsource(c)) for x, c in codes},
        "steps": {order: _rows(film) for order, film in films.items()},
        "arrays": {
            name: [*a.shape, _held(a.ravel().tolist())]
            for name, a in zip(
                inspect.signature(kernel).parameters, args, strict=True
            )
            if isinstance(a, np.ndarray)
        },
    }


# %% who owns which of seven elements
fig, ax = plt.subplots(figsize=(6, 1.3), dpi=100)
draw_owners(ax, [[0, 1, 2, 3, 4, 5, 6, -1]], group=4, cols="elements")
fig.tight_layout()
plt.show()
steps = walk("add_one", add_one, 2, 4, (np.zeros(7, "f4"), inp, 7))
moving("threads", "two blocks of four threads, step by step", walks=[steps])

# %% [markdown]
# *Figure 3.1.1. Two blocks of four threads and seven elements: each thread
# owns the element that has its place in the grid, in the colour of its block.
# Thread 7 owns nothing, and does nothing. No two threads touch one element, so
# the order does not matter.*
#
# The number 1 is written `np.float32(1)`: with a plain `1.0` numba would
# compute in float64, the trap of [chapter 2.1](../2_cpu/01_compile.ipynb). An
# A100 does 19.5 million million operations a second in float32 and 9.7 in
# float64, an H100 67 and 34. GPUs made for games do 32 or 64 times fewer in
# float64 than in float32.
#
# ## The machine


# %% draw a GPU
def box(ax, x, y, width, height, text, colour):
    ax.add_patch(
        Rectangle((x, y), width, height, fc="white", ec=PALETTE[colour])
    )
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center")


fig, ax = plt.subplots(figsize=(8, 3.4), dpi=100)
for k, name in enumerate(("multiprocessor 0", "multiprocessor 1", "...")):
    x = 3.4 * k
    box(ax, x, 1.5, 3.2, 3, "", "ink")
    ax.text(x + 1.6, 4.2, name, ha="center", va="center")
    for w in range(3):
        text = f"warp {w}" if w < 2 else "..."
        box(ax, x + 0.1 + w, 3.1, 0.95, 0.7, text, "blue")
    box(ax, x + 0.1, 2.35, 2.95, 0.6, "registers", "green")
    box(ax, x + 0.1, 1.65, 2.95, 0.6, "shared memory", "green")
box(ax, 0, 0.75, 10, 0.5, "cache", "grey")
box(ax, 0, 0, 10, 0.5, "global memory, on chips of its own", "orange")
ax.set(xlim=(-0.1, 10.1), ylim=(-0.1, 4.6))
ax.axis("off")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 3.1.2. A GPU has many multiprocessors. Each holds the blocks that it
# has taken up, as warps of 32 threads, with their registers and their shared
# memory. All reach one global memory, through a cache.*
#
# A GPU has many *multiprocessors* (108 in an A100, 132 in an H100); each takes
# up blocks as it has room for them and keeps a block until its last thread has
# ended. In what order blocks run, and which run at the same time, is nobody's
# to know. A program whose result depends on it is wrong.
#
# Within a block the threads are numbered with x running fastest, and each
# 32 that follow each other form a *warp*. A warp is what a multiprocessor
# moves: it takes the next instruction of one warp and carries it out for
# those of the 32 threads, its *lanes*, that have come to it. Where some lanes
# take a branch and others do not, the warp goes both ways, one after the
# other, with the lanes of the other side switched off. That makes it tempting
# to think that the lanes of a warp move in step. They did on GPUs before
# 2017. Since then each lane may be at an instruction of its own, and the
# multiprocessor may go on with some lanes of a warp before it returns to
# others. Lanes that must have come to the same place have to wait for each
# other, like all threads.
#
# ## Memories
#
# | memory | who sees it | size, on an H100 | kernels say |
# |---|---|---|---|
# | registers | one thread | 255 numbers a thread, 65,536 a multiprocessor | variables |
# | local | one thread | in registers if small and indexed by constants | `cuda.local.array` |
# | shared | one block | 48 KB a block, more on request | `cuda.shared.array` |
# | global | all | 80 GB | arguments of the kernel |

# %% draw who sees which memory tags=["hide-input"]
from llmnb.book.diagram import draw_rounded


def level(x, y, width, height, text, colour):
    style = {"fc": "white", "ec": PALETTE[colour], "lw": 1.5}
    draw_rounded(ax, (x, y), width, height, 0.12, **style)
    ax.text(x + 0.12, y + height - 0.12, text, va="top", color=PALETTE[colour])


def memory(y, text, colour, x):
    style = {"ha": "center", "va": "center", "color": "white"}
    draw_rounded(ax, (6.6, y), 3.2, 0.8, 0.12, fc=PALETTE[colour], ec="none")
    ax.text(8.2, y + 0.4, text, size=9, **style)
    ax.plot([x, 6.6], [y + 0.4, y + 0.4], color=PALETTE[colour], lw=1.5)


fig, ax = plt.subplots(figsize=(8, 3.8), dpi=100)
level(0, 0, 6, 5, "grid: all blocks of a launch", "orange")
for k in (2, 1, 0):
    level(0.3 + 0.2 * k, 0.3 + 0.15 * k, 5, 3.9, "", "green")
level(0.3, 0.3, 5, 3.9, "block: up to 1,024 threads", "green")
level(0.6, 0.5, 4.4, 2.9, "warp: 32 threads, each a lane", "ink")
for t in range(8):
    x = 0.8 + 0.5 * t
    level(x, 0.7, 0.4, 1.7, "", "blue")
    name = [0, 1, 2, 3, 4, 5, "...", 31][t]
    style = {"ha": "center", "va": "center", "color": PALETTE["blue"]}
    ax.text(x + 0.2, 1.55, name, **style)
memory(4.1, "global memory: all", "orange", 6)
memory(2.6, "shared memory: one block", "green", 5.3)
memory(1.1, "registers: one thread", "blue", 4.7)
ax.set(xlim=(-0.1, 9.9), ylim=(-0.1, 5.1))
ax.axis("off")
fig.subplots_adjust(0, 0, 1, 1)
plt.show()

# %% [markdown]
# *Figure 3.1.3. A launch is a grid of blocks, a block is some warps, a warp is
# 32 threads. The wider the circle that shares a memory, the farther away the
# memory lies, and the longer a thread waits for it.*
#
# A variable lives in a register. Global memory lies outside the chip, and a
# thread that reads it waits; a GPU hides that by running other warps, as
# long as there are others. How many warps a multiprocessor holds, against
# the 64 that it could, is the *occupancy*: 65,536 registers for 2048 threads
# are 32 for each, and a kernel that uses more runs with fewer warps at hand.
# *Shared* memory is the block's board. It lies on the chip and ends with
# the block. In the simulator, memory that nobody has written to holds NaN, so
# that a kernel that forgets to write is seen.
#
# ## Barriers
#
# `cuda.syncthreads()` waits until all threads of the block have come. With it
# the board works; the threads of a block turn its numbers round.


# %% a block turns its numbers round
def reverse(out, inp):
    board = cuda.shared.array(64, np.float32)
    i, t = cuda.grid(1), cuda.threadIdx.x
    board[t] = inp[i]
    cuda.syncthreads()
    out[i] = board[63 - t]


inp, out = rng.normal(size=(2, 128)).astype(np.float32)
simulate(reverse, 2, 64, (out, inp))
compare("reverse", out.reshape(2, 64), inp.reshape(2, 64)[:, ::-1], tol=1e-7)

# %% [markdown]
# All threads of the block must come to the barrier. Where some do not, CUDA
# promises nothing: the others may wait for ever, or go on. The simulator
# refuses, and says who waits where. A kernel in which eight threads go home
# early:


# %% a barrier that some never reach
def torn(out):
    if cuda.threadIdx.x >= 8:
        cuda.syncthreads()
    out[cuda.grid(1)] = 1


try:
    simulate(torn, 2, 64, (out,))
    verdict("torn", False, "is refused")
except BarrierError as error:
    print(error, *error.__notes__, sep="\n")

# %% [markdown]
# ## Warps talk among themselves
#
# The lanes of a warp can hand each other a register without any memory. In a
# *shuffle* each lane offers a value and receives that of the lane it names.
# `shfl_xor_sync` names the lane whose number differs from one's own in the
# given binary digits: 1 exchanges neighbours. The first argument says which
# lanes take part, and it is all of them throughout this book.


# %% neighbours exchange
def swap(out, inp):
    value = inp[cuda.threadIdx.x]
    out[cuda.threadIdx.x] = cuda.shfl_xor_sync(FULL, value, 1)


numbers, out = np.arange(32), np.zeros(32, int)
simulate(swap, 1, 32, (out, numbers))
print(out[:8])

# %% [markdown]
# A *vote* says for which lanes something holds: `ballot_sync` returns a
# number with a bit for each lane. It is an int32, negative where the last
# lane says yes; `& FULL` shows its 32 bits.


# %% a vote
def odd(out, inp):
    bits = cuda.ballot_sync(FULL, inp[cuda.threadIdx.x] % 2 == 1)
    if cuda.threadIdx.x == 0:
        out[0] = bits


votes = np.zeros(1, np.int64)
simulate(odd, 1, 32, (votes, np.arange(32)))
print(f"{votes[0] & FULL:032b}")

# %% [markdown]
# ## Races
#
# The simulator runs one thread at a time, in order. A kernel that lacks a
# barrier may give the right answer there, by luck of that order. We need a
# definition that does not depend on luck.
#
# Two accesses of one element form a *race* if two different threads make
# them, at least one writes, they are not both atomic, and **nothing orders
# them**. What orders accesses $p$ of thread $P$ and $q$ of thread $Q$ is
#
# - $P = Q$: a thread does one thing after the other;
# - a barrier of the block that both have joined, between $p$ and $q$;
# - a barrier of the warp (`syncwarp`) that both have joined, between them.
#
# Nothing orders the threads of two blocks of a launch. One launch is over
# before the next one begins. And a shuffle orders nothing in *memory*: it
# exchanges registers, and NVIDIA's guide promises no more. A kernel that
# writes a board, shuffles and reads the board has a race.
#
# `watch()` judges every access by this definition. The reversal passes, and
# without its barrier does not:


# %% a barrier that is missing
def hasty(out, inp):
    board = cuda.shared.array(64, np.float32)
    i, t = cuda.grid(1), cuda.threadIdx.x
    board[t] = inp[i]
    out[i] = board[63 - t]


inp, out = rng.normal(size=(2, 128)).astype(np.float32)
with watch() as seen:
    simulate(reverse, 2, 64, (out, inp))
print(seen.threads, "threads,", seen.barriers, "arrivals at a barrier")
try:
    with watch():
        simulate(hasty, 2, 64, (out, inp))
    verdict("hasty", False, "is caught")
except RaceError as error:
    print(str(error).replace(", and", ",\nand"))

# %% [markdown]
# Here is a race of another kind: 96 threads count themselves in one number.
# `+=` is three steps: read, add, write.


# %% a count that races
def count(out):
    out[0] += 1


def counted(kernel):
    out = np.zeros(1, int)
    simulate(kernel, 3, 32, (out,))
    return int(out[0])


print(counted(count))
try:
    with watch():
        counted(count)
    verdict("count", False, "is caught")
except RaceError as error:
    print(str(error).replace(", and", ",\nand"))

# %% [markdown]
# The first line is right, because the simulator runs one thread after the
# other, and each finds what the one before it has left. The lanes of a real
# warp would read before any of them writes. We can make the simulator do
# that, with a barrier of the warp between reading and writing:


# %% the same count in step
def count_in_step(out):
    old = out[0]
    cuda.syncwarp()
    out[0] = old + 1


print(counted(count_in_step))

# %% [markdown]
# Each warp has counted as one. The watch had said so when the sum was still
# right. There are two repairs. An *atomic* addition reads a number, adds to it
# and writes it back with nobody in between. It needs no barrier, and it
# promises no order:


# %% repaired with atomics
def count_atomically(out):
    cuda.atomic.add(out, 0, 1)


with watch() as seen:
    print(counted(count_atomically), "counted,", seen.atomics, "atomics")

# %% [markdown]
# Figure 3.1.4 has the four kernels once more, with a block of four threads that
# you can watch one step at a time, in either order.


# %% four threads and a board
def turn(out, inp):
    board = cuda.shared.array(4, np.float32)
    t = cuda.threadIdx.x
    board[t] = inp[t]
    cuda.syncthreads()
    out[t] = board[3 - t]


def turn_hastily(out, inp):
    board = cuda.shared.array(4, np.float32)
    t = cuda.threadIdx.x
    board[t] = inp[t]
    out[t] = board[3 - t]


# %% what the two orders give
arrays, one = (np.zeros(4, "f4"), np.arange(10, 14, dtype="f4")), np.zeros(1)
walks = [walk("with a barrier", turn, 1, 4, arrays),
         walk("without it", turn_hastily, 1, 4, arrays),
         walk("a count", count, 1, 4, (one,)),
         walk("an atomic count", count_atomically, 1, 4, (one,))]  # fmt: skip
for w in walks:
    out = next(iter(w["arrays"]))
    for order, steps in w["steps"].items():
        last = {s[7]: s[8][0] for s in steps if s[6] == out}
        races = sum(s[9] is not None for s in steps)
        print(f"{w['name']:15} {order:9}{races} steps race:", *last.values())

# %% who writes the board, and who reads it
fig, axes = plt.subplots(1, 2, figsize=(6, 1.6), dpi=100)
draw_owners(axes[0], [[0, 1, 2, 3]], "board, written by")
draw_owners(axes[1], [[3, 2, 1, 0]], "board, read by")
fig.tight_layout()
plt.show()
said = "four kernels, step by step, in two orders"
moving("threads", said, walks=walks, shared=["board"])

# %% [markdown]
# *Figure 3.1.4. Who writes each element of the board, and who reads it: never
# the same thread. With a barrier between writing and reading, both orders turn
# the numbers round. Without it a thread may read what is not yet written
# (None), and the result depends on the order; the watch marks the race in both
# orders, even where the result happens to be right. Four threads that add to
# one count race in the same way; atomic additions do not.*

# %% [markdown]
# For whole numbers the order does not matter. For a sum of float32 it changes
# the last bits, and this book has promised runs that repeat to the last bit.
# The other repair is the owner rule: one thread owns the number, and the
# others tell it what they have. Here the first lane of each warp counts the
# votes of its warp (`popc` counts the bits that are 1), in an element of its
# own; the few elements are added in a fixed order afterwards.


# %% repaired with owners
def count_by_owner(out):
    bits = cuda.ballot_sync(FULL, True)
    if cuda.laneid == 0:
        out[cuda.blockIdx.x] = cuda.popc(bits)


out = np.zeros(3, int)
with watch() as seen:
    simulate(count_by_owner, 3, 32, (out,))
print(out, out.sum(), "counted,", seen.atomics, "atomics")

# %% [markdown]
# Most kernels of this part are of this kind: an owner for each output, and no
# atomics.
#
# ## Take away
#
# - A launch runs one function in a grid of blocks of threads. A thread
#   finds its element from its place; 32 threads form a warp.
# - Registers are a thread's, shared memory is a block's, global memory is
#   everybody's and far away.
# - Only a barrier that both have joined orders two threads of a block.
#   Blocks are not ordered at all. Lanes of a warp do not move in step.
# - Two accesses that nothing orders, one of them a write, are a race, even
#   where the result is right.
#
# ## Design note
#
# We could have begun on a GPU that is rented by the hour. A race would then
# show on some days, and the cost of an access would be hidden in a time. On
# the simulator a race is an error with the names of both threads, and an
# access is a number that a test can hold fast. What it cannot tell is how
# long anything takes.

# %% [markdown]
# ## Exercises
#
# **1** (★). Write a kernel that doubles each element of a matrix with any
# number of rows and columns, with blocks of 8 by 4 threads. `cuda.grid(2)`
# gives x and y. Which of the two should be the column?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# x, because it runs fastest: threads that are neighbours in a warp then touch
# elements that are neighbours in memory, which is cheap
# ([chapter 3.2](02_sectors.ipynb)). Threads that fall outside the matrix do
# nothing.
# :::


# %% exercise 1, a solution tags=["hide-cell"]
def double(matrix):
    column, row = cuda.grid(2)
    if row < matrix.shape[0] and column < matrix.shape[1]:
        matrix[row, column] *= 2


# %% exercise 1, checked
matrix = np.arange(5 * 11).reshape(5, 11)
with watch():
    simulate(double, (2, 2), (8, 4), (matrix,))
want = 2 * np.arange(5 * 11).reshape(5, 11)
verdict("double", np.array_equal(matrix, want), "every element once")

# %% [markdown]
# **2** (★★). Turn the 32 numbers of one warp round without shared memory and
# without a barrier.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# Lane $k$ wants the value of lane $31 - k$, whose number differs from $k$ in
# all five binary digits: an exchange with 31.
# :::


# %% exercise 2, a solution tags=["hide-cell"]
def reverse_warp(out, inp):
    value = inp[cuda.threadIdx.x]
    out[cuda.threadIdx.x] = cuda.shfl_xor_sync(FULL, value, 31)


# %% exercise 2, checked
out = np.zeros(32, int)
with watch() as seen:
    simulate(reverse_warp, 1, 32, (out, numbers))
verdict("turned", np.array_equal(out, numbers[::-1]), "the last one first")
verdict("barriers", seen.barriers == 0, "none")

# %% [markdown]
# **3** (★★). In this kernel each thread of a warp hands its number to its
# neighbour by way of a board. Is it right? If not, what does it lack?
#
#     board[t] = inp[t]
#     value = cuda.shfl_xor_sync(FULL, inp[t], 1)
#     out[t] = board[t ^ 1] + value
#
# :::{admonition} Solution to exercise 3
# :class: dropdown
# It races: the shuffle makes the lanes wait for each other's registers, and
# says nothing about what they wrote to memory. `cuda.syncwarp()` before the
# last line repairs it. So does leaving out the board.
# :::


# %% exercise 3, a solution tags=["hide-cell"]
def hand_on(out, inp, wait):
    board, t = cuda.shared.array(32, np.float32), cuda.threadIdx.x
    board[t] = inp[t]
    value = cuda.shfl_xor_sync(FULL, inp[t], 1)
    if wait:
        cuda.syncwarp()
    out[t] = board[t ^ 1] + value


# %% exercise 3, checked
def races(wait):
    try:
        with watch():
            simulate(hand_on, 1, 32, (np.zeros(32), np.arange(32.0), wait))
    except RaceError:
        return True
    return False


verdict("a shuffle alone", races(False), "orders nothing in memory")
verdict("with syncwarp", not races(True), "is in order")

# %% [markdown]
# ## Further reading
#
# - The CUDA C++ Programming Guide, linked at the start: the chapters on the
#   programming model and on warp functions, for what is promised and what is
#   not.
# - Durant, Giroux, Harris and Stam (2017),
#   [Inside Volta](https://developer.nvidia.com/blog/inside-volta/): why lanes
#   no longer move in step.
# - Rush, [GPU Puzzles](https://github.com/srush/GPU-Puzzles): fourteen small
#   kernels to write, with pictures of what they read and write.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("3.1")
