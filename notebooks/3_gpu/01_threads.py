# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       gpu.simulator: 'A GPU in Python: blocks, warps and threads that find races.'
#       gpu.launch: "One way to launch a kernel, on a GPU or in the simulator."
#       gpu.ptx: "What the compiler makes of a kernel, without a GPU."
#       gpu.warp: "Sums and maxima over a warp and over a block."
#       book.owners: "Draw which thread owns which element."
#       cuda.encoder: "The encoder on a GPU, forward and backward."
# ---

# %% [markdown]
# # Run a thousand threads at once
#
# > A graphics processor runs one short function in thousands of threads;
# > a simulator of it in Python finds the races that hardware hides.

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.book.diagram import PALETTE, gpt2_diagram

gpt2_diagram(lit="encoder")

# %% [markdown]
# *Figure 3.1.1. We stay with the encoder, the smallest layer there is, and
# learn on it how all the others will run on a graphics processor.*
#
# A core of a CPU is built to finish one thing soon. A graphics processor, a
# *GPU*, is built to have very many things under way. It runs one short
# function, a *kernel*, in thousands of *threads*, each of which does its
# small part of an array; while some wait for memory, others compute. The
# layers of GPT-2 suit it: a million output elements, each computed by the
# same few lines.
#
# Such a program is easy to get wrong. Two threads that add to one number
# may lose one of the two additions, on some days only. So we first build an
# instrument: a GPU simulated in Python, which runs the very functions that
# a real one will run, and which raises an error when a result would depend
# on who comes first. It also counts what a kernel asks of the memory. With
# it we write the encoder. At the end you can
#
# - say which element a thread owns, from its place among the threads;
# - name the memories of a GPU and count what is asked of them;
# - find two accesses that nothing orders, a *race*, and put a barrier where
#   one is missing;
# - say how a Python function is simulated, and read the machine code that
#   it becomes;
# - write the encoder's backward pass in threads, without a race and with a
#   sum in a fixed order.
#
# You need the encoder and numba from [chapter 1.5](../1_by_hand/05_encoder.ipynb).
#
# No GPU has run this book's code yet. Its kernels run on the simulator, and
# they are compiled for two generations of NVIDIA's GPUs, which needs none of
# them. So what we say of their cost is counted, never timed. Figures of the
# hardware come from NVIDIA's data sheets and its
# [CUDA C++ Programming Guide](https://docs.nvidia.com/cuda/cuda-c-programming-guide/).

# %% [markdown]
# ## Setup

# %% setup
import re
from types import SimpleNamespace

import matplotlib.pyplot as plt

from llmnb.reference import encoder as reference
from llmnb.book.verify import compare, verdict

# %% imports of the simulator tags=["export"]
import dis
import functools
import sys
import threading
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

# %% the seed
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
# thread waits until all have come. So a simulator must be able to stop a
# thread in the middle of a function, run another, and come back.
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
# in the grid. A GPU has many *multiprocessors* (108 in an A100, 132 in an
# H100); each takes up blocks as it has room for them and keeps a block until
# its last thread has ended. In what order blocks run, and which run at the
# same time, is nobody's to know. A program whose result depends on it is
# wrong.


# %% where a thread stands tags=["exporti"]
class _Three(NamedTuple):
    x: int = 1
    y: int = 1
    z: int = 1


def _three(size):
    return _Three(*(size if isinstance(size, tuple) else (size,)))


def _check_sizes(grid, block):
    """Raise for a launch that a GPU would refuse."""
    if not 0 < block.x * block.y * block.z <= 1024 or block.z > 64:
        raise ValueError(f"a block has 1 to 1024 threads, got {tuple(block)}")
    if min(grid) < 1 or max(grid.y, grid.z) > 65535:
        raise ValueError(
            "a grid has 1 block or more, and at most 65535 in y and z, "
            f"got {tuple(grid)}"
        )


@functools.cache
def _threads(shape):
    """The places of a block's threads: x runs fastest."""
    x, y, z = map(range, shape)
    return [_Three(i, j, k) for k in z for j in y for i in x]


# %% the threads of a block
print(_three(5))
print([tuple(t) for t in _threads(_Three(3, 2))])

# %% [markdown]
# Within a block the threads are numbered with x running fastest, and each
# 32 that follow each other form a *warp*. A warp is what a multiprocessor
# moves: it takes the next instruction of one warp and carries it out for
# all 32 threads, its *lanes*. Where some lanes take a branch and others do
# not, the warp goes both ways, one after the other, with the lanes of the
# other side switched off.
#
# ## A fiber for each thread
#
# To stop a function in the middle, Python offers three things. A
# *generator* stops at `yield`, but only there, and numba would not compile
# such a kernel for a GPU. A *thread* of the operating system stops anywhere,
# and a block of 256 would need 256 of them, which the system wakes and
# stops. A *fiber* is a stack of its own, with a call, `switch`, that leaves
# this stack and goes on with another, in any depth of calls and without the
# system. The package greenlet provides it. Two fibers and the main program
# take turns:

# %% two fibers
from greenlet import greenlet

said = []


def speak(name):
    for word in ("one", "two"):
        said.append(f"{name} {word}")
        fibers[name].parent.switch()  # back to whoever is above


fibers = {name: greenlet(speak) for name in "ab"}
for name in "abab":
    fibers[name].switch(name)
print(said)

# %% [markdown]
# A barrier is a switch, then: a thread that comes to it leaves its stack,
# and goes on when somebody switches back. That is the whole idea of the
# simulator. The rest is bookkeeping.


# %% fibers tags=["exporti"]
@functools.cache
def _greenlet():
    try:
        from greenlet import greenlet
    except ImportError:
        raise ImportError(
            "the simulated GPU needs the package greenlet: "
            "pip install 'llmnb[simulator]'"
        ) from None
    return greenlet


# %% [markdown]
# A thread, its warp and its block know what barriers need to know: who has
# arrived. The block has a *clock*, which ticks whenever a barrier opens;
# races will be judged by it.

# %% threads, warps and blocks tags=["exporti"]
WARP = 32  # threads that a processor moves together


class _Warp:
    def __init__(self):
        self.arrived, self.values, self.shown = [], [None] * WARP, None
        self.since, self.kind = 0, None


class _Lane:
    """A thread: its place, and the fiber that runs it."""

    __slots__ = ("thread", "number", "block", "warp", "fiber", "trace")

    def __init__(self, thread, number, block, warp):
        self.thread, self.number, self.block = thread, number, block
        self.warp, self.fiber, self.trace = warp, None, {}


class _Block:
    """A block of threads, all about to run `body`, and their memory."""

    def __init__(self, index, shape, grid, seen, body):
        self.index, self.shape, self.grid = index, shape, grid
        self.seen, self.body, self.shared = seen, body, {}
        threads = _threads(shape)
        self.warps = [_Warp() for _ in range(-(-len(threads) // WARP))]
        self.lanes = [
            _Lane(thread, n, self, self.warps[n // WARP])
            for n, thread in enumerate(threads)
        ]
        self.todo, self.ended = iter(self.lanes), 0
        self.arrived, self.ready = [], []
        self.clock = self.since = self.bytes = 0


# %% [markdown]
# One thread runs at a time. `_now` says which, and an object `cuda`, of
# which more soon, tells the kernel where it stands. `seen` will hold what
# we count and check; until somebody asks for that it is None. To make a
# fiber takes longer than to run a short kernel in it, so those that have
# nothing to do rest in a list, to be used again.


# %% the thread that runs tags=["exporti"]
class _Now(threading.local):
    """What runs: each thread of Python may simulate a GPU of its own."""

    def __init__(self):
        self.lane, self.seen, self.resting = None, None, []


_now = _Now()


def _enter(lane):
    _now.lane, cuda.threadIdx = lane, lane.thread


def _enter_block(block):
    cuda.blockIdx, cuda.blockDim = block.index, block.shape
    cuda.gridDim = block.grid


# %% [markdown]
# A fiber takes a thread of a block and runs the kernel, called `body` here.
# When that ends without having waited, the same fiber takes the next thread:
# a kernel without barriers needs one fiber in all. When it waits, the fiber
# is left standing, and another fiber goes on with the next thread.


# %% a fiber's life tags=["exporti"]
def _serve(block, lane):
    """Run this lane, then others that nobody has begun; then rest."""
    me = _greenlet().getcurrent()
    while True:
        while lane is not None:
            lane.fiber = me
            _enter(lane)
            block.body()
            lane.fiber, block.ended = None, block.ended + 1
            lane = next(block.todo, None)
        _now.resting.append(me)
        block = None  # nothing of it may be kept while we rest
        block, lane = me.parent.switch()


def _fiber():
    """A fiber to switch to, with (block, lane)."""
    greenlet = _greenlet()
    if not _now.resting:
        return greenlet(_serve)
    fiber = _now.resting.pop()
    fiber.parent = greenlet.getcurrent()
    return fiber


# %% [markdown]
# So a block runs in rounds. In the first, each thread runs to its first
# barrier. In each later round those run on whose barrier has opened, in
# the order of their numbers. If none can, and some have not ended, the
# block stands still. A fiber that stands somewhere refers to itself, and
# Python never frees it; so after an error we end those that are left.


# %% run a block tags=["exporti"]
def _run_block(block):
    """Run every lane to its next barrier, in turns, until all are done."""
    _enter_block(block)
    try:
        for lane in block.todo:
            _fiber().switch(block, lane)
        while block.ended < len(block.lanes):
            ready, block.ready = block.ready, []
            if not ready:
                raise BarrierError(_stuck(block))
            for lane in ready:
                _enter(lane)
                lane.fiber.switch()
    finally:
        for lane in block.lanes:  # those that an error left standing
            if lane.fiber is not None and not lane.fiber.dead:
                lane.fiber.throw()


# %% [markdown]
# A launch runs the blocks one after the other. What an error says is
# worth much when there are thousands of threads, so we add to it which one
# raised it.


# %% simulate a launch tags=["export"]
def simulate(function, grid, block, args):
    """Run a kernel's function in every thread of a grid, one at a time.

    grid, block: blocks in the grid and threads in a block, an int or a
    tuple of up to three. args: NumPy arrays, which the kernel may write,
    and NumPy or Python numbers. Raises ValueError for sizes that a GPU
    refuses, BarrierError, and whatever the function raises, with the thread
    that raised it.
    """
    _greenlet()  # or say at once that it is missing
    grid, shape, seen = _three(grid), _three(block), _now.seen
    _check_sizes(grid, shape)
    if seen is not None:
        args = _watched(function, args, seen)
    body = functools.partial(function, *args)
    outside = _now.lane
    try:
        for z, y, x in np.ndindex(grid[::-1]):
            block = _Block(_Three(x, y, z), shape, grid, seen, body)
            _run_block(block)
            if seen is not None:
                seen.add_block(block)
    except Exception as error:
        at = f"block {tuple(block.index)}"
        if not isinstance(error, BarrierError):
            at = f"thread {tuple(_now.lane.thread)} of {at}"
        error.add_note(f"in {function.__name__}, {at}")
        raise
    finally:
        _now.lane = outside
        if outside is not None:  # a launch within a thread
            _enter_block(outside.block)
            _enter(outside)


# %% [markdown]
# A kernel asks `cuda` where it is. These are the names that numba gives to
# CUDA, NVIDIA's system for programs on its GPUs; `cuda.grid(1)` is (3.1.1).


# %% where am I tags=["exporti"]
class _Places(threading.local):
    """What a kernel asks `cuda` about the thread that runs it."""

    # threadIdx, blockIdx, blockDim, gridDim are set when a thread goes on
    laneid = property(lambda self: _now.lane.number % WARP)

    def grid(self, ndim):
        at, of, n = self.blockIdx, self.blockDim, self.threadIdx
        x = at.x * of.x + n.x
        if ndim == 1:
            return x
        return (x, at.y * of.y + n.y, at.z * of.z + n.z)[:ndim]

    def gridsize(self, ndim):
        pairs = zip(self.gridDim, self.blockDim, strict=True)
        sizes = tuple(a * b for a, b in pairs)
        return sizes[0] if ndim == 1 else sizes[:ndim]


# %% our first kernel
cuda = _Places()


def add_one(out, inp, n):
    i = cuda.grid(1)
    if i < n:
        out[i] = inp[i] + np.float32(1)


inp, out = np.arange(7, dtype=np.float32), np.zeros(7, np.float32)
simulate(add_one, 2, 4, (out, inp, 7))
compare("add one", out, inp + 1, tol=1e-7)

# %% [markdown]
# The number 1 is written `np.float32(1)`: with a plain `1.0` numba would
# compute in float64, the trap of chapter 1.5. An A100 does 9.7 instead of 19.5
# million million such operations a second, an H100 34 instead of 67, and
# GPUs made for games far fewer.
#
# ## Memories
#
# | memory | who sees it | size, on an H100 | kernels say |
# |---|---|---|---|
# | registers | one thread | 255 numbers a thread, 65,536 a multiprocessor | variables |
# | local | one thread | in registers if small and indexed by constants | `cuda.local.array` |
# | shared | one block | 48 KB a block | `cuda.shared.array` |
# | global | all | 80 GB | arguments of the kernel |
#
# A variable lives in a register. Global memory lies outside the chip, and a
# thread that reads it waits; a GPU hides that by running other warps, as
# long as there are others. How many warps a multiprocessor holds, against
# the 64 that it could, is the *occupancy*: 65,536 registers for 2048 threads
# are 32 for each, and a kernel that uses more runs with fewer warps at hand.
# *Shared* memory is the block's board. It lies on the chip and ends with
# the block.
#
# Memory that nobody has written to holds what was left there. Were it zero
# here, a test would not see that a kernel forgot to write. Ours holds NaN,
# or a number that no sum survives. And an array of float32 in shared memory
# begins at some multiple of 4 bytes, and of no more if the kernel does not
# ask for more. That will matter, and so the simulator places such an array
# badly on purpose.


# %% poison tags=["exporti"]
@functools.cache
def _poison(shape, dtype):
    """What memory holds before anyone writes to it: nothing good."""
    dtype = np.dtype(getattr(dtype, "name", dtype))
    bad = np.nan if dtype.kind == "f" else np.iinfo(dtype).min + 77
    return np.full(shape, bad, dtype)


def _placed(array, alignment):
    """A copy at a multiple of `alignment` bytes, at most 128.

    None: at a multiple of the elements' size and of nothing more.
    """
    block = np.empty(array.nbytes + 256, np.uint8)
    skip = -block.ctypes.data % 128 + (0 if alignment else array.itemsize)
    there = block[skip : skip + array.nbytes].view(array.dtype)
    there = there.reshape(array.shape)
    there[...] = array
    return there


# %% [markdown]
# `cuda.shared.array(...)` must give all threads of a block the same
# array. We know them to be the same by the place in the code that asks: the
# instruction at which the calling frame stands.


# %% a place in the code tags=["exporti"]
@functools.cache
def _instruction(code, last):
    """Where the instruction begins that a frame's f_lasti points into.

    Python moves f_lasti past an instruction's cache once it has specialised
    the instruction: the same access would count as two.
    """
    begins = (x.offset for x in dis.get_instructions(code))
    return id(code), max(x for x in begins if x <= last)


# %% shared and local memory tags=["exporti"]
SHARED = 48 * 1024  # bytes that a block may have without asking for more


class _Shared:
    """cuda.shared: one array for each place in the code that asks.

    Vectors of four need `alignment=16`.
    """

    def array(self, shape, dtype, alignment=None):
        block, frame = _now.lane.block, sys._getframe(1)
        place = _instruction(frame.f_code, frame.f_lasti)
        key = place, shape, dtype  # a factory's functions share their code
        if key not in block.shared:
            memory = _placed(_poison(shape, dtype), alignment)
            block.bytes += memory.nbytes
            if block.bytes > SHARED:
                raise MemoryError(f"a block has {SHARED} bytes to share")
            if block.seen is not None:
                log = _Log(memory.itemsize) if block.seen.races else None
                memory = _Watched(memory, "shared", log, shared=True)
            block.shared[key] = memory
        return block.shared[key]


class _Local:
    """cuda.local: memory of one thread, in registers where that is small."""

    def array(self, shape, dtype):
        return _poison(shape, dtype).copy()


# %% [markdown]
# ## Barriers
#
# A thread that comes to a barrier joins those that have arrived. The last
# one opens it: all are ready for the next round, and the clock ticks.


# %% barriers tags=["exporti"]
def _wait(group, size, orders=True):
    """Wait till `size` lanes have come; group: the block, or a warp of it.

    orders: whether what they wrote before is seen by all of them after.
    """
    lane = _now.lane
    block = lane.block
    group.arrived.append(lane)
    if len(group.arrived) == size:
        block.ready += group.arrived
        group.arrived.clear()
        block.clock += 1
        if orders:
            group.since = block.clock
    lane.fiber.parent.switch()


# %% [markdown]
# What if some threads never come? On a GPU the block waits for ever, unless
# they have ended: NVIDIA's newer GPUs count those as arrived. Here, no
# thread is ready, and we can say who waits where. That is stricter, and a
# kernel that passes is right on older ones too.


# %% a barrier that is never complete tags=["export"]
class BarrierError(RuntimeError):
    """Some threads wait at a barrier that others never reach."""


# %% who waits where tags=["exporti"]
def _stuck(block):
    """Say who waits where: the text of a BarrierError."""
    warps = sum(len(warp.arrived) for warp in block.warps)
    return (
        f"block {tuple(block.index)} stands still: {len(block.arrived)} of "
        f"{len(block.lanes)} threads wait for the block, {warps} for their "
        f"warp, {block.ended} have ended"
    )


# %% [markdown]
# A different kind of help is an *atomic* addition: it reads a number, adds
# to it and writes it back with nobody in between. It needs no barrier, and
# it promises no order. (`_Watched` is an array that checks its accesses; it
# comes with the races.)


# %% atomics tags=["exporti"]
class _Atomic:
    """cuda.atomic: read, change and write with nobody in between."""

    def add(self, array, index, value):
        if isinstance(array, _Watched):
            _now.seen.atomics += 1
            array.note(array.place(index), array.itemsize, ATOMIC)
            array = array.array
        old = array[index]
        array[index] = old + value
        return old


# %% wait for the block tags=["exporti"]
class _Barriers(_Places):
    shared, local, atomic = _Shared(), _Local(), _Atomic()

    def syncthreads(self):
        if _now.seen is not None:
            _now.seen.barriers += 1
        block = _now.lane.block
        _wait(block, len(block.lanes))


# %% [markdown]
# `cuda.syncthreads()` waits for the block. With it the board works; the
# threads of a block turn its numbers round.


# %% a block turns its numbers round
cuda = _Barriers()


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
# A kernel in which eight threads go home early is refused:


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
# For us that is a barrier for 32, at which everybody leaves a value. All must
# call the same function: lanes that call different ones never meet.

# %% exchange in a warp tags=["exporti"]
FULL = 0xFFFFFFFF  # a mask that names all lanes


def _exchange(kind, mask, value, orders=False):
    """Hand in a value; return those of all 32 lanes and one's own place."""
    lane = _now.lane
    if mask != FULL or len(lane.block.lanes) % WARP:
        raise ValueError(
            "the simulator knows the mask 0xFFFFFFFF alone, and blocks of "
            f"whole warps: got {mask:#x} and {len(lane.block.lanes)} threads"
        )
    if _now.seen is not None:
        _now.seen.exchanges += 1
    warp, place = lane.warp, lane.number % WARP
    if warp.arrived and warp.kind != kind:
        raise BarrierError(f"lanes of a warp call {warp.kind} and {kind}")
    warp.kind, warp.values[place] = kind, value
    if len(warp.arrived) == WARP - 1:  # the last one: all values are there
        warp.shown, warp.values = warp.values, [None] * WARP
    _wait(warp, WARP, orders)
    return warp.shown, place


# %% exchange with the warp tags=["exporti"]
class _Cuda(_Barriers):
    """What kernels know as `cuda`, answered for the lane that runs."""

    def syncwarp(self, mask=FULL):
        _exchange("syncwarp", mask, None, orders=True)

    def shfl_sync(self, mask, value, source):
        return _exchange("shfl", mask, value)[0][source % WARP]

    def shfl_xor_sync(self, mask, value, bits):
        values, lane = _exchange("shfl_xor", mask, value)
        return values[lane ^ bits]

    def shfl_down_sync(self, mask, value, delta):
        values, lane = _exchange("shfl_down", mask, value)
        return values[lane + delta] if lane + delta < WARP else value

    def shfl_up_sync(self, mask, value, delta):
        values, lane = _exchange("shfl_up", mask, value)
        return values[lane - delta] if lane >= delta else value

    def ballot_sync(self, mask, predicate):
        values, _ = _exchange("ballot", mask, bool(predicate))
        return sum(1 << i for i, v in enumerate(values) if v)


# %% the object tags=["export"]
cuda = _Cuda()

# %% [markdown]
# With shuffles a warp adds its 32 numbers in five steps. In the first, a
# lane exchanges with the one 16 places away, then 8, 4, 2 and 1; the binary
# digits of the two lanes' numbers differ in one place, and `xor` finds the
# partner. After the first step a lane holds a sum of two numbers, then of
# four, and after the fifth all lanes hold the sum of all.


# %% a sum in five steps
def butterfly(out, inp):
    value = inp[cuda.threadIdx.x]
    for step in (16, 8, 4, 2, 1):
        value += cuda.shfl_xor_sync(FULL, value, step)
    out[cuda.threadIdx.x] = value


inp, out = np.arange(32.0), np.zeros(32)
simulate(butterfly, 1, 32, (out, inp))
print(set(out.tolist()), inp.sum())

# %% [markdown]
# A *vote* says for which lanes something holds: `ballot_sync` returns a
# number with a bit for each lane.


# %% a vote
def odd(out, inp):
    bits = cuda.ballot_sync(FULL, inp[cuda.threadIdx.x] % 2 == 1)
    if cuda.threadIdx.x == 0:
        out[0] = bits


votes = np.zeros(1, np.int64)
simulate(odd, 1, 32, (votes, np.arange(32)))
print(f"{votes[0]:032b}")

# %% [markdown]
# ## Races
#
# Our simulator runs one thread at a time, in order. A kernel that lacks a
# barrier may give the right answer here, by luck of that order. We need a
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
# With each access we keep the thread and the time on the block's clock. An
# access is over, as seen from another thread, if a barrier that both had
# to join has opened since:


# %% in what order tags=["exporti"]
def _ordered(before, lane):
    """Whether an access of another lane is over when this one goes on."""
    other, time = before
    if other is lane:
        return True
    if other.block is not lane.block:
        return False
    if time < lane.block.since:
        return True
    return other.warp is lane.warp and time < lane.warp.since


# %% [markdown]
# Not all accesses must be kept. Of the writes, the last one stands for all:
# if that is ordered before us, so are those before it, or the race was
# reported then. Of the reads since, two are enough: the newest one, and one
# that is not ordered before it, in another warp or block if possible. A
# later write that is ordered after both of them is ordered after all. The
# same holds for the atomics.
#
# Two arrays may be views of the same bytes, of elements of different sizes.
# So accesses are kept by address, in steps of the smallest element.


# %% what was touched tags=["exporti"]
READ, WRITE, ATOMIC = range(3)  # kinds of access


class _Log:
    """By kind and address: the accesses that stand for all so far.

    step: bytes of the smallest element of the arrays that share this log.
    """

    def __init__(self, step):
        self.kept, self.step = ({}, {}, {}), step


def _keep(kept, now):
    """The newest access and one other, the one that most could clash with."""
    lane = now[0]
    for before in reversed(kept):
        if before[0].warp is not lane.warp and not _ordered(before, lane):
            return now, before
    for before in kept:
        if not _ordered(before, lane):
            return now, before
    return (now,)


# %% [markdown]
# Now each kind of access has its rivals. A read clashes with writes and
# atomics, an atomic with writes and reads, and a write with everything.

# %% who clashes with whom tags=["exporti"]
_RIVALS = (WRITE, ATOMIC), (READ, WRITE, ATOMIC), (READ, WRITE)


def _clash(log, address, access, now):
    """An earlier access that nothing orders before this one, or None."""
    for kind in _RIVALS[access]:
        for before in log.kept[kind].get(address, ()):
            if not _ordered(before, now[0]):
                return before
    kept = log.kept[access]
    if access == WRITE:  # after which the others do not matter
        for others in log.kept:
            others.pop(address, None)
        kept[address] = (now,)
    else:
        kept[address] = _keep(kept.get(address, ()), now)
    return None


# %% two threads write, by hand
block, log = SimpleNamespace(clock=0, since=0), _Log(4)
a, b = (_Lane(None, n, block, _Warp()) for n in range(2))
for lane in (a, b):
    before = _clash(log, 0, WRITE, (lane, block.clock))
    print("fine" if before is None else f"clashes with {before[0].number}")
block.clock = block.since = 1  # a barrier of the block opens
print(_clash(log, 0, WRITE, (b, block.clock)))


# %% who meets whom tags=["exporti"]
def _clashing(name, element, before, access):
    """Say who meets whom: the text of a RaceError."""
    one, two = before[0], _now.lane
    return (
        f"{name}, element {element}: thread {two.number} of block "
        f"{tuple(two.block.index)} {('reads', 'writes', 'adds to')[access]} "
        f"it, and nothing orders that after the access by thread "
        f"{one.number} of block {tuple(one.block.index)}"
    )


# %% the error of a race tags=["export"]
class RaceError(RuntimeError):
    """Two threads touch one element, one writes, and nothing orders them."""


# %% [markdown]
# Who calls these functions? Under *watch*, a kernel does not get its arrays
# but stand-ins that look like arrays. Each access passes through
# `__getitem__` or `__setitem__`, and there we first check that the element
# exists: a GPU's memory has something at every address, someone else's. An
# index of -1 would mean the last element, in numba as in Python. No kernel
# of ours intends that, so it is refused too.


# %% an array that knows its bounds tags=["exporti"]
class _Bounded:
    """An array that raises where it has no element; it has no slices.

    log: what was touched, by address, or None where races may pass.
    """

    def __init__(self, array, name, log, shared=False):
        self.array, self.name, self.log = array, name, log
        self.shape, self.ndim, self.size = array.shape, array.ndim, array.size
        self.dtype, self.start = array.dtype, array.ctypes.data
        self.itemsize, self.strides = array.itemsize, array.strides
        self.shared, self.flat = shared, array.flags.c_contiguous

    def __len__(self):
        return self.shape[0]

    def place(self, index):
        """The address of an element; raise where there is none."""
        if self.ndim == 1 and 0 <= index < self.size:
            return self.start + int(index) * self.strides[0]
        index = index if type(index) is tuple else (index,)
        inside = len(index) == self.ndim and all(
            0 <= i < n for i, n in zip(index, self.shape, strict=True)
        )
        if not inside:
            raise IndexError(
                f"{self.name}[{', '.join(map(str, index))}] is no element of "
                f"its shape {self.shape}"
            )
        pairs = zip(index, self.strides, strict=True)
        return self.start + sum(int(i) * stride for i, stride in pairs)

    def place4(self, i):
        """The address of four elements from i on."""
        if not 0 <= i <= self.size - 4:
            raise IndexError(
                f"{self.name}: elements {i} to {i + 3} of {self.size}"
            )
        address = self.start + int(i) * self.itemsize
        if address % 16 or not self.flat:
            raise ValueError(
                f"{self.name}: element {i} is not at a multiple of 16 bytes "
                "of an array without gaps"
            )
        return address


# %% [markdown]
# The stand-in then notes the access in its lane, at which instruction of
# the code it was and which address, and looks for a race.


# %% an array under watch tags=["exporti"]
class _Watched(_Bounded):
    """An array that notes each access for its lane."""

    def __getitem__(self, index):
        self.note(self.place(index), self.itemsize, READ)
        return self.array[index]

    def __setitem__(self, index, value):
        self.note(self.place(index), self.itemsize, WRITE)
        self.array[index] = value

    def note(self, address, nbytes, access):
        """Note an access of the lane that runs, and look for a race."""
        lane = _now.lane
        if access != ATOMIC:
            frame, kind = sys._getframe(2), (nbytes, access, self.shared)
            key = kind, id(frame.f_code), frame.f_lasti
            site = _now.seen.sites.get(key)
            if site is None:
                site = _now.seen.add_site(key, frame.f_code)
            lane.trace.setdefault(site, []).append(address)
        if self.log is None:
            return
        now, step = (lane, lane.block.clock), self.log.step
        for at in range(address - address % step, address + nbytes, step):
            before = _clash(self.log, at, access, now)
            if before is not None:
                element = (max(at, address) - self.start) // self.itemsize
                raise RaceError(_clashing(self.name, element, before, access))


# %% arguments under watch tags=["exporti"]
def _watched(function, args, seen):
    """The arguments of a kernel, the arrays of them under watch."""
    names = function.__code__.co_varnames
    sizes = [a.itemsize for a in args if isinstance(a, np.ndarray)]
    log = _Log(min(sizes, default=1))
    return [
        _Watched(a, name, log if seen.races else None)
        if isinstance(a, np.ndarray)
        else a
        for a, name in zip(args, names, strict=False)
    ]


# %% [markdown]
# ## What memory costs: sectors and banks
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
# We reconstruct the requests from the notes of the lanes: the $n$th time
# that a lane came to an instruction belongs with the $n$th time of the
# other lanes of its warp.


# %% requests of whole warps tags=["exporti"]
def _requests(traces):
    """A row for each request of a warp: 32 addresses, -1 where none.

    traces: for each lane of a block the addresses that it touched, at one
    place in the code. The nth of each lane of a warp make one request.
    """
    longest = max(map(len, traces))
    traces = [[*x] + [-1] * (longest - len(x)) for x in traces]
    traces += [[-1] * longest] * (-len(traces) % WARP)
    table = np.array(traces, np.int64).reshape(-1, WARP, longest)
    table = table.transpose(0, 2, 1).reshape(-1, WARP)
    return table[(table >= 0).any(axis=1)]


def _distinct(table):
    """The rows sorted, and where a number stands for the first time."""
    table = np.sort(table, axis=1)
    first = table >= 0
    first[:, 1:] &= table[:, 1:] != table[:, :-1]
    return table, first


# %% [markdown]
# Shared memory has a different rule. It consists of 32 *banks*, and word
# $w$ (of four bytes) lies in bank $w \bmod 32$. In one pass each bank gives
# one word, to as many lanes as want that word. A request takes as many
# passes as there are different words wanted from its busiest bank:
#
# $$ \text{passes} = \max_{b} \bigl| \{ w \text{ wanted} :
#    w \bmod 32 = b \} \bigr| . \tag{3.1.2} $$


# %% banks tags=["exporti"]
def _passes(table, nbytes):
    """Passes that requests of warps take in shared memory.

    Its 32 banks give one word of four bytes each in a pass; a request for
    16 bytes a lane counts as four of eight lanes, 32 words each.
    """
    wide = max(nbytes // 4, 1)
    words = table.reshape(-1, WARP // wide, 1) // 4
    words = np.where(words < 0, -1, words + np.arange(wide))
    words, first = _distinct(words.reshape(-1, WARP))
    row = np.arange(len(words))[:, None]
    bank = (row * WARP + words % WARP)[first]
    counts = np.bincount(bank, minlength=len(words) * WARP)
    return int(counts.reshape(-1, WARP).max(axis=1).sum())


# %% lanes that want one word, neighbours, every second word, a column
for stride in (0, 1, 2, 32):
    print(stride, _passes(4 * stride * np.arange(32)[None], 4))

# %% [markdown]
# A `Seen` holds the counts, and `watch` makes one.


# %% what was seen tags=["export"]
class Seen:
    """What `watch` counted while simulated kernels ran.

    threads: how many ran. reads, writes: accesses to global memory by
    single threads; read_bytes, written_bytes: their bytes. requests: such
    accesses by whole warps; sectors: the pieces of 32 bytes that these
    touched, each moved whole. shared_requests, shared_passes: accesses of
    whole warps to shared memory, and the passes they took: more than one
    where lanes want different words of one bank. barriers, exchanges,
    atomics: calls by single threads. launches: (kernel, grid, block,
    arguments' types) of each launch, those on a real GPU too.
    """

    def __init__(self, races=True):
        self.threads = self.reads = self.writes = 0
        self.read_bytes = self.written_bytes = 0
        self.requests = self.sectors = 0
        self.shared_requests = self.shared_passes = 0
        self.barriers = self.exchanges = self.atomics = 0
        self.launches, self.races = [], races
        self.sites, self._codes = {}, []

    def add_site(self, key, code):
        """Name the place in the code of an access that is seen first."""
        kind, _, last = key
        self._codes.append(code)  # which keeps its id from being used again
        self.sites[key] = kind, _instruction(code, last)
        return self.sites[key]

    def add_block(self, block):
        """Count what the lanes of a block have noted, warp by warp."""
        self.threads += len(block.lanes)
        traces = [lane.trace for lane in block.lanes]
        for site in dict.fromkeys(site for trace in traces for site in trace):
            nbytes, access, shared = site[0]
            table = _requests([trace.get(site, ()) for trace in traces])
            if shared:
                self.shared_requests += len(table)
                self.shared_passes += _passes(table, nbytes)
                continue
            self.requests += len(table)
            self.sectors += int(_distinct(table // 32)[1].sum())
            accesses = int((table >= 0).sum())
            if access == READ:
                self.reads += accesses
                self.read_bytes += accesses * nbytes
            else:
                self.writes += accesses
                self.written_bytes += accesses * nbytes
        for trace in traces:
            trace.clear()  # the lanes live on in the log


# %% watch tags=["export"]
@contextmanager
def watch(races=True):
    """Check and count what simulated kernels do; yields a Seen.

    Every element that a kernel touches must lie inside its array, and no
    two threads may touch one element, one of them writing, with nothing
    that orders them: IndexError, ValueError and RaceError tell. Several
    times slower than without. races: False lets races pass.
    """
    before, _now.seen = _now.seen, Seen(races)
    try:
        yield _now.seen
    finally:
        _now.seen = before


# %% note a launch tags=["export"]
def record(launch):
    """Add to the launches of the Seen that watches, if any does."""
    if _now.seen is not None:
        _now.seen.launches.append(launch)


# %% [markdown]
# Everything is there. The reversal with its barrier passes under watch, and
# without it does not:


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
    print(error)

# %% [markdown]
# Now the price of a stride. A warp reads 32 numbers that lie $s$ apart:


# %% sectors of a strided read
def strided(out, inp, s):
    out[cuda.threadIdx.x] = inp[cuda.threadIdx.x * s]


# simulated memory begins at a multiple of 256 bytes, as a GPU's does
def at_256(size):
    memory = np.zeros(size + 64, np.float32)
    skip = -memory.ctypes.data % 256 // 4
    return memory[skip : skip + size]


def sectors(s):
    with watch() as seen:
        simulate(strided, 1, 32, (at_256(32), at_256(32 * 32), s))
    return seen.sectors - 4  # without the four that it writes


print({s: sectors(s) for s in (0, 1, 2, 4, 8, 16, 32)})

# %% [markdown]
# From stride 8 on, each lane has a sector to itself and uses an eighth of
# it. And the banks: the lanes of a warp read a column of a board, first
# with rows of 32 numbers, then of 33.


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
# With rows of 32 a column lies in one bank, and each request takes 32
# passes. One unused number at the end of each row moves the next row to the
# next bank, and the conflict is gone.
#
# ### Four numbers at once
#
# A lane may also ask for 16 bytes in one instruction, four numbers that lie
# together at a multiple of 16. The sectors are the same, since the bytes
# are, but the warp makes a quarter of the requests. numba does not do this
# by itself, so we have `load4` and `store4`.


# %% vectors of four tags=["export"]
def load4(array, i):
    """Elements i to i + 3 of a flat view of `array`, in one access.

    array: float32, C-contiguous, any shape; its element i must begin at a
    multiple of 16 bytes: a shared array is made with `alignment=16`.
    Returns four numbers.
    """
    if isinstance(array, _Watched):
        array.note(array.place4(i), 16, READ)
        array = array.array
    flat = array if array.ndim == 1 else array.reshape(-1)
    return flat[i], flat[i + 1], flat[i + 2], flat[i + 3]


def store4(array, i, a, b, c, d):
    """Write elements i to i + 3 of a flat view of `array`, in one access.

    As `load4`, the other way.
    """
    if isinstance(array, _Watched):
        array.note(array.place4(i), 16, WRITE)
        array = array.array
    flat = array if array.ndim == 1 else array.reshape(-1)
    flat[i : i + 4] = a, b, c, d


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
# ### Why a simulator of our own
#
# numba has a simulator of CUDA too. It takes effect when an environment
# variable is set before numba is imported, and then numba's compiler for
# GPUs is gone for that process; we simulate a kernel and compile it in one
# test. It has no shuffles, votes or `syncwarp` (numba-cuda 0.30), does not
# look for races and counts nothing.
#
# Ours has limits as well. It judges the accesses of one run, and is no proof
# for all inputs. It watches single elements of global and shared arrays, not
# slices, nor a thread's local arrays. It knows whole warps alone, no fences,
# and nothing of time.

# %% [markdown]
# ## One kernel, two machines
#
# A kernel should be written once. Where there is a GPU, it is compiled and
# runs there; where there is none, it is simulated. The next module decides.
# It imports the simulator from the package, which was made from the cells
# above, and from here on we use the package's names.

# %% imports of the launch tags=["export"] module="gpu.launch"
import functools
import importlib.util
import os
import types
from contextlib import contextmanager

import numpy as np

from llmnb.checks import FLOATS, INTS, check_fit
from llmnb.gpu.simulator import cuda, load4, record, simulate, store4
from llmnb.shapes import Memory

# %% the rest of the simulator, from the package
from llmnb.gpu.simulator import RaceError, watch


# %% is there a GPU tags=["export"] module="gpu.launch"
@functools.cache
def missing():
    """Why kernels run on the simulator; empty where they run on a GPU.

    LLMNB_CUDA=simulator chooses the simulator even where there is a GPU.
    """
    if os.environ.get("LLMNB_CUDA") == "simulator":
        return "LLMNB_CUDA asks for the simulator"
    if importlib.util.find_spec("numba_cuda") is None:
        return "numba-cuda is not installed: pip install 'llmnb[cuda]'"
    from numba import cuda as real

    if not real.is_available():
        return "numba-cuda finds no NVIDIA GPU with a driver"
    return ""


# %% what runs here tags=["nbval-ignore-output"]
print(missing() or "a GPU")

# %% [markdown]
# A GPU, the *device*, has a memory of its own, and arrays must be copied
# there from Python's, the *host*. numba's arrays on a device know their
# shape and can be copied back, cut and reshaped; they cannot compute. A
# simulated device should offer no more, or else a program would run on the
# simulator and fail on the GPU. So a `DeviceArray` hides a NumPy array.

# %% arrays on the device tags=["export"] module="gpu.launch"
ALIGN = 256  # bytes: every allocation on a GPU begins at a multiple


class DeviceArray:
    """A simulated GPU's array: only kernels and copies reach its elements.

    It answers to what llmnb uses of numba's device arrays, and to no more,
    so that code written for it runs on a GPU. array: C-contiguous.
    """

    def __init__(self, array):
        self._array, self.shape, self.ndim = array, array.shape, array.ndim
        self.dtype, self.size = array.dtype, array.size
        self.nbytes = array.nbytes

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        part = self._array[index]
        return DeviceArray(part) if isinstance(part, np.ndarray) else part

    def __array__(self, dtype=None, copy=None):
        return np.array(self._array, dtype)

    def is_c_contiguous(self):
        """Whether the elements lie one after the other."""
        return self._array.flags.c_contiguous

    def view(self, dtype):
        """The same bytes as elements of another type."""
        return DeviceArray(self._array.view(dtype))

    def reshape(self, *shape):
        """The same elements in another shape."""
        return DeviceArray(self._array.reshape(*shape))

    def copy_to_host(self, ary=None, stream=0):
        """A NumPy array of the elements; ary, if given, receives them."""
        if ary is None:
            return self._array.copy()
        ary[...] = self._array
        return ary

    def copy_to_device(self, ary, stream=0):
        """Overwrite the elements with those of `ary`."""
        self._array[...] = np.asarray(ary)


# %% to the device and back tags=["export"] module="gpu.launch"
def simulated(array):
    """A copy of a NumPy array on the simulated GPU, wherever this runs."""
    array = np.ascontiguousarray(array)
    block = np.empty(array.nbytes + ALIGN, np.uint8)
    skip = -block.ctypes.data % ALIGN
    there = block[skip : skip + array.nbytes].view(array.dtype)
    there = there.reshape(array.shape)
    there[...] = array
    return DeviceArray(there)


def to_device(array):
    """A copy of a NumPy array on the GPU, or else on the simulated one."""
    if missing():
        return simulated(array)
    from numba import cuda as real

    return real.to_device(np.ascontiguousarray(array))


def to_host(array):
    """A copy of a device's array as a NumPy array.

    Waits for the kernels that were launched before.
    """
    return array.copy_to_host()


# %% new memory tags=["export"] module="gpu.launch"
def empty(shape, dtype=np.float32, like=None):
    """An array on the device that nobody has written to yet.

    like: a device's array; the new one is where that is. On the simulator
    it is full of NaN, or of a senseless integer.
    """
    if isinstance(like, DeviceArray) or (like is None and missing()):
        dtype = np.dtype(dtype)
        poison = np.nan if dtype.kind == "f" else np.iinfo(dtype).max - 77
        return simulated(np.full(shape, poison, dtype))
    from numba import cuda as real

    return real.device_array(shape, dtype)


# %% there and back
there = to_device(np.arange(6.0).reshape(2, 3))
print(there.shape, there.nbytes, to_host(there[1]))

# %% [markdown]
# A kernel checks nothing: on a GPU, an element beyond the end of an array
# is somebody else's. So each layer looks at its arguments before it launches,
# by chapter 1.13's decorator with what is below in the place of NumPy's checks.


# %% check an array tags=["export"] module="gpu.launch"
def check_device(name, array, shape=None, kinds=np.float32, written=False):
    """Raise unless `array` is a device's, of this shape and dtype.

    name, shape, kinds: as for llmnb.checks.check_array; every device's array
    may be written. Raises TypeError (not on a device, wrong dtype) or
    ValueError (wrong shape, not C-contiguous, not aligned).
    """
    if not hasattr(array, "copy_to_host"):
        kind = type(array).__name__
        raise TypeError(f"{name} must be a device's array, got {kind}")
    check_fit(name, array, shape, kinds)
    if not array.is_c_contiguous():
        raise ValueError(f"{name} must be C-contiguous")
    size = array.dtype.itemsize
    if address(array) % size:
        raise ValueError(f"{name} must begin at a multiple of {size} bytes")


# %% a message
try:
    check_device("encoder_forward: out", there, (2, 3))
except TypeError as error:
    print(error)

# %% [markdown]
# Two more questions that layers ask: does an array begin where a vector of
# four can begin, and which of the versions of a layer does the caller want?


# %% where an array lies tags=["export"] module="gpu.launch"
def address(array):
    """Where the first element of a device's array lies in its memory."""
    if isinstance(array, DeviceArray):
        return array._array.ctypes.data
    return array.__cuda_array_interface__["data"][0]


def overlap(a, b):
    """Whether two arrays on devices share memory; both contiguous."""
    i, j = address(a), address(b)
    return i < j + b.nbytes and j < i + a.nbytes


# %% how layers look at them tags=["export"] module="gpu.launch"
def device_kind(x):
    """All of a device's array that decides whether it fits."""
    if not hasattr(x, "copy_to_host"):
        return type(x)
    return x.dtype, x.shape, x.is_c_contiguous(), address(x) % ALIGN


DEVICE = Memory(
    check_device, device_kind, overlap, FLOATS[:1], INTS[:1], bounded=False
)


def aligned(*arrays):
    """Whether `load4` and `store4` can begin where these arrays begin."""
    return all(address(array) % 16 == 0 for array in arrays)


# %% choose a version tags=["export"] module="gpu.launch"
def numbered(versions, version, name):
    """The version of a layer that bears this number, counted from 1.

    versions: a tuple of functions; name: what a message calls the layer.
    Raises ValueError where there is no such version.
    """
    if version not in range(1, len(versions) + 1):
        raise ValueError(
            f"{name}: version must be in 1 to {len(versions)}, got {version}"
        )
    return versions[version - 1]


# %% [markdown]
# ### The same function, compiled
#
# A kernel finds `cuda`, `load4` and `store4` among the globals of its
# module: the simulator's. numba looks up global names in a dictionary that
# the function carries. So we make a second function of the same code with
# another dictionary, in which the three are numba's own.
#
# Vectors of four numba does not have. Its *intrinsics* let us write them in
# LLVM's language, as chapter 1.5 did for its team of threads: point to the
# element, call it a pointer to four floats, and load, with the promise that
# the address is a multiple of 16.


# %% where four numbers begin tags=["exporti"] module="gpu.launch"
def _vector_place(context, builder, signature, args):
    """A pointer to four floats from an element on, and their type."""
    from llvmlite import ir

    data = context.make_array(signature.args[0])
    first = builder.gep(data(context, builder, args[0]).data, [args[1]])
    four = ir.VectorType(ir.FloatType(), 4)
    return builder.bitcast(first, four.as_pointer()), four


# %% load four on a GPU tags=["exporti"] module="gpu.launch"
def _real_load4():
    from llvmlite import ir
    from numba.core import types as nb
    from numba.cuda.extending import intrinsic

    @intrinsic
    def load(typing, array, i):
        def generate(context, builder, signature, args):
            pointer, _ = _vector_place(context, builder, signature, args)
            vector = builder.load(pointer, align=16)
            number = ir.IntType(32)
            parts = [
                builder.extract_element(vector, number(k)) for k in range(4)
            ]
            kind = signature.return_type
            return context.make_tuple(builder, kind, parts)

        return nb.UniTuple(nb.float32, 4)(array, nb.intp), generate

    return load


# %% store four on a GPU tags=["exporti"] module="gpu.launch"
def _real_store4():
    from llvmlite import ir
    from numba.core import types as nb
    from numba.cuda.extending import intrinsic

    @intrinsic
    def store(typing, array, i, a, b, c, d):
        def generate(context, builder, signature, args):
            pointer, four = _vector_place(context, builder, signature, args)
            vector, number = four(ir.Undefined), ir.IntType(32)
            for k in range(4):
                part, at = args[2 + k], number(k)
                vector = builder.insert_element(vector, part, at)
            builder.store(vector, pointer, align=16)
            return context.get_dummy_value()

        f = nb.float32
        return nb.void(array, nb.intp, f, f, f, f), generate

    return store


# %% what stands for a name on a GPU tags=["exporti"] module="gpu.launch"
@functools.cache
def _real_names():
    """numba's own objects for the simulator's, by id."""
    from numba import cuda as real

    return {
        id(cuda): real,
        id(load4): _real_load4(),
        id(store4): _real_store4(),
    }


# %% [markdown]
# A function that a kernel calls is treated alike, and so are the values that
# a kernel has closed over: a function that makes kernels, of different tile
# sizes say, compiles a size in as a constant.


# %% the same function for numba tags=["exporti"] module="gpu.launch"
def _real_function(function):
    """A copy of a function in which names mean what they do on a GPU."""
    names, codes = set(), [function.__code__]
    for code in codes:
        names.update(code.co_names)
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    known = function.__globals__
    swapped = {n: _real(known[n]) for n in names & set(known)}
    cells = [x.cell_contents for x in function.__closure__ or ()]
    return types.FunctionType(
        function.__code__,
        known | swapped,
        function.__name__,
        function.__defaults__,
        tuple(types.CellType(_real(x)) for x in cells) or None,
    )


@functools.cache
def _real_device(function):
    from numba.cuda.extending import register_jitable

    return register_jitable(_real_function(function))


def _real(value):
    if getattr(value, "on_device", False):
        return _real_device(value)
    return _real_names().get(id(value), value)


# %% [markdown]
# A `Kernel` is launched as numba's are, `kernel[grid, block](arguments)`.
# Where the arrays are decides which machine runs it. A launch on a GPU
# returns at once, while the GPU works; a *stream* is the queue in which it
# is put, and its launches run one after the other. A Python float is
# refused, because numba would pass it as a float64.

# %% the stream tags=["exporti"] module="gpu.launch"
_current = types.SimpleNamespace(stream=0)


def _kinds(args):
    """(dtype, ndim) of each argument of a launch; ndim 0 is a number."""
    kinds = []
    for x in args:
        whole = "int64" if isinstance(x, int) else None
        kinds.append((whole or x.dtype.name, getattr(x, "ndim", 0)))
    return tuple(kinds)


# %% a launch tags=["export"] module="gpu.launch"
class Kernel:
    """A function that every thread of a grid runs.

    `kernel[grid, block](arguments)` launches it: on a device's arrays it runs
    there, in the current stream; on those of the simulated GPU it is
    simulated. A call returns nothing. Raises TypeError for a Python float,
    which would be computed with in float64.
    """

    def __init__(self, function, **options):
        self.function, self.options, self._made = function, options, None
        functools.update_wrapper(self, function)

    def __getitem__(self, size):
        grid, block = size
        return functools.partial(self._launch, grid, block)

    def _launch(self, grid, block, *args):
        for x in args:
            if isinstance(x, float) and not isinstance(x, np.floating):
                raise TypeError(
                    f"{self.__name__}: pass np.float32(...), not a float"
                )
        record((self, grid, block, _kinds(args)))
        if any(isinstance(x, DeviceArray) for x in args):
            plain = [
                x._array if isinstance(x, DeviceArray) else x for x in args
            ]
            simulate(self.function, grid, block, plain)
        else:
            self.compiled()[grid, block, _current.stream](*args)

    def compiled(self):
        """numba's kernel, compiled when first launched; needs numba-cuda."""
        if self._made is None:
            from numba import cuda as real
            from numba.cuda.core import config

            # a small grid is no mistake here, and no reason for a warning
            config.CUDA_LOW_OCCUPANCY_WARNINGS = 0
            self._made = real.jit(
                _real_function(self.function), **self.options
            )
        return self._made


# %% decorators tags=["export"] module="gpu.launch"
def kernel(function=None, **options):
    """Make a Kernel of a function.

    options: numba's `launch_bounds`, the largest number of threads a block
    will have; `fastmath`, on unless False: a product and a sum become one
    instruction, exp and division are approximate.
    """
    options = {"fastmath": True} | options
    if function is None:
        return functools.partial(kernel, **options)
    return Kernel(function, **options)


def device(function):
    """Let kernels call a function; it is compiled along with them."""
    function.on_device = True
    return function


# %% streams tags=["export"] module="gpu.launch"
@contextmanager
def stream(handle):
    """Launch on this stream of numba's what is launched inside."""
    before, _current.stream = _current.stream, handle
    try:
        yield handle
    finally:
        _current.stream = before


# %% the stream's address tags=["export"] module="gpu.launch"
def stream_address():
    """The current stream as libraries take it; 0 is the default one."""
    return int(getattr(_current.stream, "handle", 0))


# %% a kernel, launched
add_one_kernel = kernel(add_one)
inp = to_device(np.arange(300, dtype=np.float32))
out = empty(300)
add_one_kernel[3, 128](out, inp, 300)
compare("add one", to_host(out), np.arange(300) + 1, tol=1e-7)
try:
    add_one_kernel[3, 128](out, inp, 300.0)
except TypeError as error:
    print(error)

# %% [markdown]
# Cells that print counts use `simulated(array)` in place of `to_device`.
# So they print the same where there is a GPU.
#
# ## What the compiler makes of it
#
# numba translates a kernel to *PTX*, an assembly language for a GPU that
# does not exist, and NVIDIA's assembler turns that into the machine code
# of one that does. Neither needs a GPU. From the PTX and the words of the
# assembler we learn how many registers a thread takes, whether some of them
# had to be *spilled* to memory, whether anything computes in float64, and
# whether our vectors are vectors.

# %% imports of the compiler tags=["export"] module="gpu.ptx"
import importlib.util
import re
import types
from contextlib import contextmanager
from typing import NamedTuple


# %% what a compiled kernel is like tags=["export"] module="gpu.ptx"
class Compiled(NamedTuple):
    """A kernel compiled for a GPU that need not be there.

    ptx: the text for any GPU of that generation or a later one. registers:
    a thread's; spilled: bytes of them kept in memory for want of room;
    stack: bytes of a thread's arrays that are in memory; shared: bytes of a
    block's memory, with what the system takes. float64, vector_loads,
    vector_stores: how many instructions compute in double precision, or
    move 16 bytes at once from global or shared memory.
    """

    ptx: str
    registers: int
    spilled: int
    stack: int
    shared: int
    float64: int
    vector_loads: int
    vector_stores: int


# %% is there a compiler tags=["export"] module="gpu.ptx"
def no_compiler():
    """Why kernels cannot be compiled here; empty where they can."""
    if importlib.util.find_spec("numba_cuda") is None:
        return "numba-cuda is not installed: pip install 'llmnb[ptx]'"
    return ""


# %% compile tags=["export"] module="gpu.ptx"
def compile_kernel(kernel, kinds, cc=(9, 0)):
    """Compile a Kernel to PTX and on to machine code, with no GPU.

    kinds: (dtype name, number of dimensions) of each argument, as
    `Seen.launches` holds them; a number has none. cc: the generation, (8, 0)
    for an A100, (9, 0) for an H100. Returns a Compiled. Raises
    ModuleNotFoundError without numba-cuda, numba's errors for what it
    cannot compile, and RuntimeError for what the assembler refuses.
    """
    from numba import cuda as real
    from numba.core import types as nb

    signature = nb.void(
        *[
            nb.Array(getattr(nb, name), ndim, "C")
            if ndim
            else getattr(nb, name)
            for name, ndim in kinds
        ]
    )
    function = kernel.compiled().py_func
    with _pretend(cc):
        ptx, _ = real.compile_ptx(function, signature, cc=cc, **kernel.options)
    log = _assemble(ptx, cc)
    wide = r"(?:ld|st)\.(?:global|shared)\S*\.v4"
    kinds = re.findall(wide, ptx)
    return Compiled(
        ptx,
        _number(r"Used (\d+) registers", log),
        _number(r"(\d+) bytes spill stores", log),
        _number(r"(\d+) bytes stack frame", log),
        _number(r"(\d+) bytes smem", log),
        len(re.findall(r"\.f64\b", ptx)),
        sum(x.startswith("ld") for x in kinds),
        sum(x.startswith("st") for x in kinds),
    )


# %% no GPU to ask tags=["exporti"] module="gpu.ptx"
@contextmanager
def _pretend(cc):
    """Answer numba, which asks the GPU of what generation it is."""
    from numba.cuda import dispatcher

    asked = dispatcher.get_current_device
    answer = types.SimpleNamespace(compute_capability=cc)
    dispatcher.get_current_device = lambda: answer
    try:
        yield
    finally:
        dispatcher.get_current_device = asked


# %% assemble tags=["exporti"] module="gpu.ptx"
def _number(pattern, log):
    """The largest number that a pattern finds; 0 where it finds none."""
    return max(map(int, re.findall(pattern, log)), default=0)


def _assemble(ptx, cc):
    """Assemble PTX to a cubin; return what the assembler says of it."""
    from cuda.bindings import nvjitlink

    arch = f"-arch=sm_{cc[0]}{cc[1]}"
    handle = nvjitlink.create(3, [arch, "-O3", "-verbose"])
    try:
        text = ptx.encode()
        kind = nvjitlink.InputType.PTX
        nvjitlink.add_data(handle, kind, text, len(text), "kernel.ptx")
        nvjitlink.complete(handle)
        log = bytearray(nvjitlink.get_info_log_size(handle))
        nvjitlink.get_info_log(handle, log)
    except Exception as error:
        log = bytearray(nvjitlink.get_error_log_size(handle))
        nvjitlink.get_error_log(handle, log)
        raise RuntimeError(log.decode(errors="replace").strip()) from error
    finally:
        nvjitlink.destroy(handle)
    return log.decode(errors="replace")


# %% [markdown]
# Here is `add_one` for an H100. (Where numba-cuda is not to be had, as on
# macOS, the cell says so, and the text below has the lines.)

# %% the PTX of a small kernel tags=["nbval-ignore-output"]
kinds = ("float32", 1), ("float32", 1), ("int64", 0)
if no_compiler():
    print(no_compiler())
else:
    made = compile_kernel(add_one_kernel, kinds)
    body = made.ptx[made.ptx.index("\n{") :]
    print(re.sub(r"_Z\w+_param", "param", body))
    print(made.registers, "registers,", made.spilled, "bytes spilled")

# %% [markdown]
# Line by line, as numba-cuda 0.30 wrote it for us:
#
# | PTX | what it does |
# |---|---|
# | `.reg .f32 %f<3>` | names for float32 values, as many as it likes |
# | `ld.param.u64 %rd6, [param_14]` | the arguments: an array is seven numbers, its address and size among them; the last one is `n` |
# | `mov.u32 %r1, %tid.x` | `threadIdx.x`; `%ntid.x` and `%ctaid.x` are `blockDim.x` and `blockIdx.x` |
# | `mul.wide.s32 %rd8, %r2, %r3` | $bD$ of (3.1.1), in 64 bits |
# | `add.s64 %rd1, %rd8, %rd7` | plus $t$: the place $i$ |
# | `setp.ge.s64 %p1, %rd1, %rd6` | is $i \ge n$? |
# | `@%p1 bra $L__BB0_2` | those lanes go to the end |
# | `shr.s64`, `and.b64`, `add.s64` | add the array's length to a negative $i$, as Python does |
# | `shl.b64 %rd13, %rd12, 2` | times four bytes |
# | `ld.global.f32 %f1, [%rd14]` | read `inp[i]` |
# | `add.ftz.f32 %f2, %f1, 0f3F800000` | add 1, whose bits are 3F800000 |
# | `st.global.f32 [%rd19], %f2` | write `out[i]` |
#
# One load, one addition, one store, and the rest finds the place: that is
# the price of a thread for each element, and one reason to give a thread
# four of them. And Python's rule for negative indices costs three
# instructions for each access. `load4` has no such rule.

# %% vectors are vectors tags=["nbval-ignore-output"]
kinds = ("float32", 1), ("float32", 1)
for body in (copy1, copy4):
    if no_compiler():
        print(no_compiler())
        break
    made = compile_kernel(kernel(body), kinds)
    print(f"{body.__name__} {made.vector_loads} load, ", end="")
    print(f"{made.vector_stores} store of 16 bytes")

# %% [markdown]
# ## Sums of a warp and of a block
#
# Many layers need the sum of a row, so we keep the butterfly as a function
# that kernels call, and its sister for the maximum.

# %% imports of the warp tags=["export"] module="gpu.warp"
import numpy as np

from llmnb.gpu.launch import device
from llmnb.gpu.simulator import cuda


# %% sums in a warp tags=["export"] module="gpu.warp"
@device
def warp_sum(value):
    """The sum of `value` over the 32 lanes of a warp, in every lane.

    Every lane of the warp must call it. The order of the additions is
    fixed.
    """
    for step in (16, 8, 4, 2, 1):
        value += cuda.shfl_xor_sync(0xFFFFFFFF, value, step)
    return value


@device
def warp_max(value):
    """The largest `value` of the 32 lanes of a warp, in every lane."""
    for step in (16, 8, 4, 2, 1):
        value = max(value, cuda.shfl_xor_sync(0xFFFFFFFF, value, step))
    return value


# %% [markdown]
# A block adds in two storeys. Each warp adds its own numbers, and its first
# lane puts the sum on a board; after a barrier, every thread adds up the
# few numbers on the board, in the same order, so all get the same bits. The
# second barrier lets the caller use the board again at once: nobody is
# still reading it.


# %% sums in a block tags=["export"] module="gpu.warp"
@device
def block_sum(value, parts):
    """The sum of `value` over the threads of a block, in every thread.

    Every thread must call it. parts: shared memory, one element for each
    warp of the block (at most 32); it is free again when the call returns.
    Blocks are whole warps, in one dimension.
    """
    value = warp_sum(value)
    warp, lane = cuda.threadIdx.x // 32, cuda.threadIdx.x % 32
    if lane == 0:
        parts[warp] = value
    cuda.syncthreads()
    total = np.float32(0)
    for i in range(cuda.blockDim.x // 32):
        total += parts[i]
    cuda.syncthreads()
    return total


@device
def block_max(value, parts):
    """The largest `value` of a block's threads; otherwise as `block_sum`."""
    value = warp_max(value)
    warp, lane = cuda.threadIdx.x // 32, cuda.threadIdx.x % 32
    if lane == 0:
        parts[warp] = value
    cuda.syncthreads()
    top = parts[0]
    for i in range(1, cuda.blockDim.x // 32):
        top = max(top, parts[i])
    cuda.syncthreads()
    return top


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
# ## The encoder on a GPU
#
# The forward pass reads a row of `wte` and a row of `wpe` for each place and
# writes their sum. It has one addition for twelve bytes: memory decides.
# There is nothing to share and nothing to wait for. We must only see to it
# that neighbours in memory belong to neighbours in a warp. A picture shows
# who owns which element.

# %% the foundation, from the package
from llmnb.cuda import RaceError, empty, simulated, to_device, to_host, watch

# %% draw who owns what tags=["export"] module="book.owners"
from matplotlib.patches import Rectangle

from llmnb.book.diagram import PALETTE


# %% the owners of elements tags=["export"] module="book.owners"
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


# %% owners in the forward pass
fig, axes = plt.subplots(1, 2, figsize=(8, 2.4), dpi=100)
who = np.arange(32).reshape(4, 8)
names = {"rows": "place", "cols": "channel"}
draw_owners(axes[0], who.tolist(), "one element", 8, **names)
draw_owners(axes[1], (who // 4).tolist(), "four channels", 2, **names)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 3.1.2. The owners of an output with four places and eight channels,
# a colour for each place. Left: a thread for each element. Right: a thread
# for four channels, a quarter of the threads. In both, neighbours in a row belong to neighbours
# in a warp, or to one thread, so no byte of a sector is left unused.*
#
# ### Version 1: a thread an element
#
# Thread $i$ owns element $i$ of the output, seen as one long array: place
# $n = \lfloor i / C \rfloor$ and channel $c = i \bmod C$. The lanes of a
# warp read 32 neighbours of a row of each table. The token `inp[n]` is the
# same for (nearly) all of them, and one sector serves the warp.

# %% imports of the encoder tags=["export"] module="cuda.encoder"
import numpy as np

from llmnb.gpu.launch import DEVICE, aligned, device, kernel, numbered
from llmnb.gpu.simulator import cuda, load4, store4
from llmnb.shapes import shapes

# %% block size tags=["exporti"] module="cuda.encoder"
THREADS = 128  # in a block


def _blocks(n):
    return -(-n // THREADS)


# %% forward, a thread an element tags=["exporti"] module="cuda.encoder"
@kernel
def _forward_by_one(out, inp, wte, wpe, T):
    i = cuda.grid(1)
    rows, C = out.shape
    if i < rows * C:
        n, c = i // C, i % C
        out[n, c] = wte[inp[n], c] + wpe[n % T, c]


def _thread_an_element(out, inp, wte, wpe, T):
    grid = _blocks(out.size)
    _forward_by_one[grid, THREADS](out, inp, wte, wpe, T)


# %% [markdown]
# ### Version 2: a thread four channels
#
# Version 1 moves hardly more bytes than it must, but each warp makes four
# requests for 128 bytes of output: for the token, for both rows and for the
# result. With four channels a thread it makes four for 512 bytes, and finds
# its place once in place of four times. A row must begin at a multiple of
# 16 bytes, so $C$ must be a multiple of 4. GPT-2's are; other sizes run as
# version 1.


# %% forward, a thread four channels tags=["exporti"] module="cuda.encoder"
@kernel
def _forward_by_four(out, inp, wte, wpe, T):
    i = cuda.grid(1) * 4
    rows, C = out.shape
    if i < rows * C:
        n, c = i // C, i % C
        x, y, z, w = load4(wte, int(inp[n]) * C + c)
        p, q, r, s = load4(wpe, n % T * C + c)
        store4(out, i, x + p, y + q, z + r, w + s)


def _thread_four_channels(out, inp, wte, wpe, T):
    if out.shape[1] % 4 or not aligned(out, wte, wpe):
        _thread_an_element(out, inp, wte, wpe, T)
        return
    grid = _blocks(out.size // 4)
    _forward_by_four[grid, THREADS](out, inp, wte, wpe, T)


# %% [markdown]
# Shapes and types are checked. The *values* of the tokens are on the device,
# and to look at them would mean to wait for it; whoever sends the tokens
# there must have checked them.

# %% the encoder, forward tags=["export"] module="cuda.encoder"
ENCODER_FORWARD = (_thread_an_element, _thread_four_channels)


@shapes("B T C!, B T of Vp, Vp C, T+ C", DEVICE)
def encoder_forward(out, inp, wte, wpe, version=2):
    """Sum the vector of each token and the vector of its position.

    out   (B, T, C)      float32, overwritten
    inp   (B, T)         int32, each in [0, Vp): the caller sees to that
    wte   (Vp, C)        float32, the table of tokens
    wpe   (max_T, C)     float32, the table of positions; T <= max_T

    All on a device. version: 1 has a thread for each element, 2 for four
    channels; that needs C % 4 == 0 and arrays that begin at multiples of 16
    bytes, and runs as 1 for others. Raises TypeError or ValueError where an
    array does not fit.
    """
    run = numbered(ENCODER_FORWARD, version, "encoder_forward")
    B, T, C = out.shape
    run(out.reshape(B * T, C), inp.reshape(B * T), wte, wpe, T)


# %% a problem, and where it runs
def problem(B, T, C, Vp, place):
    inp = rng.integers(0, Vp, (B, T), dtype=np.int32)
    wte, wpe = rng.normal(size=(2, max(Vp, T), C)).astype(np.float32)
    dout = rng.normal(size=(B, T, C)).astype(np.float32)
    arrays = inp, wte[:Vp], wpe[:T], dout
    return arrays, [place(a) for a in arrays]


for C in (5, 8):
    (inp, wte, wpe, want), there = problem(3, 7, C, 11, to_device)
    reference.encoder_forward(want, inp, wte, wpe)
    for version in (1, 2):
        out = empty(want.shape)
        encoder_forward(out, *there[:3], version=version)
        compare(f"C = {C}, version {version}", to_host(out), want, tol=1e-6)


# %% what version 2 moves less of
def count(layer, *arrays, **options):
    with watch() as seen:
        layer(*(simulated(a) for a in arrays), **options)
    print(
        f"{seen.requests:>6} requests {seen.sectors:>6} sectors"
        f"{seen.reads:>7} reads {seen.atomics:>5} atomics"
    )
    return seen


(inp, wte, wpe, dout), _ = problem(2, 8, 128, 11, simulated)
for version in (1, 2):
    count(encoder_forward, dout, inp, wte, wpe, version=version)

# %% [markdown]
# A quarter of the requests. Three times 2048 elements of four bytes are 768
# sectors, which nobody can save; the rest is tokens, which version 1 reads
# for each warp of 32 elements and version 2 for each of 128.
#
# ## The encoder's backward pass
#
# Backward adds each row of `dout` to the row of `dwte` that its token names.
# The forward pass turned round gives each element of `dout` a thread, which
# adds it where it belongs. Repeated tokens are the trap, as in chapter 1.5:


# %% version 0: a thread an element, wrong
@kernel
def scatter(dwte, dout, inp):
    i = cuda.grid(1)
    rows, C = dout.shape
    if i < rows * C:
        n, c = i // C, i % C
        dwte[inp[n], c] += dout[n, c]


def scattered(body):
    dwte = simulated(np.zeros((4, 8), np.float32))
    tokens = simulated(np.array([2, 0, 2, 2], np.int32))
    rows = simulated(np.ones((4, 8), np.float32))
    body[1, 32](dwte, rows, tokens)
    return to_host(dwte)[:, 0].astype(int)


print(scattered(scatter))
try:
    with watch():
        scattered(scatter)
    verdict("version 0", False, "is caught")
except RaceError as error:
    print(error)

# %% [markdown]
# The first line is right, token 2 stands in three places, because the
# simulator runs one thread after the other, and each finds the sum that the
# one before it has left. The `+=` is three steps: read, add, write. A real
# warp takes each step with all its lanes. We can make the simulator keep
# step as well, with a barrier of the warp between reading and writing:


# %% version 0 in step
@kernel
def scatter_in_step(dwte, dout, inp):
    i = cuda.grid(1)
    n, c = i // dout.shape[1], i % dout.shape[1]
    old = dwte[inp[n], c]
    cuda.syncwarp()
    dwte[inp[n], c] = old + dout[n, c]


print(scattered(scatter_in_step))

# %% [markdown]
# All three have read 0, and token 2 counts once. The watch had said so when
# the sum was still right.
#
# ### Version 1: atomics
#
# An atomic addition cannot be torn apart, and watch has nothing to say.


# %% backward, atomics tags=["exporti"] module="cuda.encoder"
@kernel
def _backward_atomic(dwte, dwpe, dout, inp, T):
    i = cuda.grid(1)
    rows, C = dout.shape
    if i < rows * C:
        n, c = i // C, i % C
        dy = dout[n, c]
        cuda.atomic.add(dwte, (inp[n], c), dy)
        cuda.atomic.add(dwpe, (n % T, c), dy)


def _atomics(dwte, dwpe, dout, inp, T):
    grid = _blocks(dout.size)
    _backward_atomic[grid, THREADS](dwte, dwpe, dout, inp, T)


# %% [markdown]
# But in which order does the memory add? In that in which the requests
# arrive, and the order of a sum of float32 changes its last bits (chapter
# 1.5). The simulator adds in the order of the threads and cannot show it; on a
# GPU two runs of one training would part after the first step. This book
# has promised runs that repeat to the last bit, so version 1 is a rung to
# stand on and not our choice.
#
# ### Version 2: a block a place
#
# Who may own a row of `dwte`, so that nobody else adds to it? Let each
# *place* of the text have a block of threads, one thread for each channel. A
# block looks whether its token stands at an earlier place. If so, it ends:
# an earlier block will do the work. If not, it is the first, and it walks
# through the rest of the text, adds up the rows of its token in the order of
# the text, and writes the sum.

# %% owners in the backward pass
text = "cacbca"
who = [[text.index(token)] * 4 for token in text]
fig, ax = plt.subplots(figsize=(4.4, 3.2), dpi=100)
draw_owners(ax, who, rows="place", cols="channel")
ax.set_yticks(np.arange(len(text)) + 0.5, list(text))
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 3.1.3. The rows of `dout` for the text "cacbca", each with the
# number of the block that adds it. Blocks 0, 1 and 3 stand at the first
# place of their letter and do the work; blocks 2, 4 and 5 have found
# theirs before them and ended.*


# %% the first place of a token tags=["exporti"] module="cuda.encoder"
@kernel
def _tokens_by_one(dwte, dout, inp):
    n, c = cuda.blockIdx.x, cuda.blockIdx.y * THREADS + cuda.threadIdx.x
    rows, C = dout.shape
    token = inp[n]
    for m in range(n):
        if inp[m] == token:
            return  # the block of place m, or an earlier one, does it all
    if c < C:
        total = dwte[token, c]
        for m in range(n, rows):
            if inp[m] == token:
                total += dout[m, c]
        dwte[token, c] = total


# %% [markdown]
# A row of `dwpe` has an owner without any search: position $t$ occurs once
# in each of the B texts. A thread for each element adds them up.


# %% the rows of a position tags=["exporti"] module="cuda.encoder"
@kernel
def _positions_by_one(dwpe, dout, T):
    i = cuda.grid(1)
    rows, C = dout.shape
    if i < T * C:
        t, c = i // C, i % C
        total = dwpe[t, c]
        for n in range(t, rows, T):
            total += dout[n, c]
        dwpe[t, c] = total


def _block_a_place(dwte, dwpe, dout, inp, T):
    rows, C = dout.shape
    _tokens_by_one[(rows, _blocks(C)), THREADS](dwte, dout, inp)
    _positions_by_one[_blocks(T * C), THREADS](dwpe, dout, T)


# %% [markdown]
# ### Version 3: votes and vectors
#
# Version 2 adds few numbers and reads many tokens: each warp of each block
# asks for one token at a time, and all its lanes for the same. A warp can
# read 32 tokens in one request, each lane one, and vote. The bits of the
# vote say where the token stands.


# %% a vote on 32 places tags=["exporti"] module="cuda.encoder"
@device
def _where(inp, first, begin, end, token):
    """A bit for each lane's place, first + lane: whether token stands there.

    Places outside begin to end do not count. For whole warps.
    """
    i = first + cuda.laneid
    here = i >= begin and i < end and inp[i] == token
    return cuda.ballot_sync(0xFFFFFFFF, here)


# %% [markdown]
# The rows are read as vectors of four. The lanes beyond the last channel
# must come along to the votes, and touch no row.


# %% four channels a thread tags=["exporti"] module="cuda.encoder"
@kernel
def _tokens_by_four(dwte, dout, inp):
    n, i = cuda.blockIdx.x, cuda.blockIdx.y * THREADS + cuda.threadIdx.x
    rows, C = dout.shape
    if (i - cuda.laneid) * 4 >= C:
        return  # nothing is left for this warp
    token, c, mine = int(inp[n]), i * 4, i * 4 < C
    for first in range(0, n, 32):
        if _where(inp, first, 0, n, token) != 0:
            return
    x = y = z = w = np.float32(0)
    if mine:
        x, y, z, w = load4(dwte, token * C + c)
    for first in range(n // 32 * 32, rows, 32):
        bits = _where(inp, first, n, rows, token)
        if mine and bits != 0:
            for k in range(32):
                if (bits >> k) & 1:
                    p, q, r, s = load4(dout, (first + k) * C + c)
                    x, y, z, w = x + p, y + q, z + r, w + s
    if mine:
        store4(dwte, token * C + c, x, y, z, w)


# %% four channels of a position tags=["exporti"] module="cuda.encoder"
@kernel
def _positions_by_four(dwpe, dout, T):
    i = cuda.grid(1) * 4
    rows, C = dout.shape
    if i < T * C:
        x, y, z, w = load4(dwpe, i)
        for n in range(0, rows, T):
            p, q, r, s = load4(dout, n * C + i)
            x, y, z, w = x + p, y + q, z + r, w + s
        store4(dwpe, i, x, y, z, w)


def _warp_votes(dwte, dwpe, dout, inp, T):
    rows, C = dout.shape
    if C % 4 or not aligned(dwte, dwpe, dout):
        _block_a_place(dwte, dwpe, dout, inp, T)
        return
    _tokens_by_four[(rows, _blocks(C // 4)), THREADS](dwte, dout, inp)
    _positions_by_four[_blocks(T * C // 4), THREADS](dwpe, dout, T)


# %% the encoder, backward tags=["export"] module="cuda.encoder"
ENCODER_BACKWARD = (_atomics, _block_a_place, _warp_votes)


@shapes("Vp C!, T+ C!, B T C, B T of Vp", DEVICE)
def encoder_backward(dwte, dwpe, dout, inp, version=3):
    """Add dout's rows to the rows of the tables that they came from.

    dwte  (Vp, C)        float32, added to; rows of absent tokens stay
    dwpe  (max_T, C)     float32, added to; rows from T on stay
    dout  (B, T, C)      float32
    inp   (B, T)         int32, as in the forward pass

    All on a device. version: 1 adds with atomics, in an order that changes
    from run to run; 2 has a block for each place, of which the first of each
    token adds all rows in the order of the text; 3 is 2 with four channels a
    thread and votes of a warp over 32 places, and runs as 2 where C % 4 or
    an array that begins elsewhere than at 16 bytes forbids it. Raises as
    `encoder_forward` does.
    """
    run = numbered(ENCODER_BACKWARD, version, "encoder_backward")
    B, T, C = dout.shape
    run(dwte, dwpe, dout.reshape(B * T, C), inp.reshape(B * T), T)


# %% three versions against NumPy
for C in (5, 8):
    (inp, wte, wpe, dout), there = problem(3, 13, C, 4, to_device)
    want = np.zeros_like(wte), np.zeros_like(wpe)
    reference.encoder_backward(*want, dout, inp)
    for version in (1, 2, 3):
        dwte, dwpe = (to_device(np.zeros_like(a)) for a in want)
        encoder_backward(dwte, dwpe, there[3], there[0], version=version)
        name = f"C = {C}, version {version}"
        compare(f"{name}, dwte", to_host(dwte), want[0], tol=1e-5)
        compare(f"{name}, dwpe", to_host(dwpe), want[1], tol=1e-5)

# %% [markdown]
# The order of the text is also that of the CPU's one thread. Then even the
# bits must agree, at least where the additions are simulated:

# %% the same bits as on the CPU
from llmnb.cpu import encoder as cpu_encoder

(inp, wte, wpe, dout), there = problem(3, 13, 8, 4, simulated)
encoder_backward(*there[1:], there[0])
cpu_encoder.encoder_backward(wte, wpe, dout, inp)
for name, got, want in (("dwte", there[1], wte), ("dwpe", there[2], wpe)):
    same = np.array_equal(to_host(got), want)
    verdict(f"{name}, CPU", same, "the same bits")

# %% what the three ask of the memory
(inp, wte, wpe, dout), _ = problem(1, 64, 128, 30, simulated)
for version in (1, 2, 3):
    count(encoder_backward, wte, wpe, dout, inp, version=version)

# %% [markdown]
# The table shows the price of order. Version 1 moves the fewest sectors, and
# has 16,384 atomics besides, two for each element, which the memory carries
# out by itself and which our requests do not count. Version 2 reads every
# token again and again. Version 3 asks for them 32 at a time and for rows
# in vectors: a twentieth of the requests of version 2, and fewer than
# version 1 makes before its atomics.
#
# No GPU has run this yet; where one is, `llmnb bench --backend cuda
# --kernels` measures it, and the results page shows the times once they are
# measured.
#
# ## Count it
#
# How many tokens does the search read at GPT-2's size? A block at place $n$
# reads at most $n$ tokens before it knows, and the first of a token reads
# on to the end. At worst, when no token repeats, each of the $BT$ blocks
# reads all $BT$, with every one of its warps. Each warp of version 3 owns
# 128 channels.

# %% the search at GPT-2's size
B, T, C = 4, 1024, 768
places, warps = B * T, C // 128
rows = 3 * places * C * 4
tokens = places * places * warps * 4
print(f"dout, and dwte there and back  {rows / 1e6:6.0f} MB")
print(f"tokens, at worst               {tokens / 1e6:6.0f} MB")
print(f"requests for tokens, at worst  {places**2 * warps // 32 / 1e6:6.1f} M")
print(f"the same, one token at a time  {places**2 * C // 32 / 1e6:6.1f} M")

# %% [markdown]
# The tokens of a batch are 16 KB, small enough for a cache, so few of those
# bytes should come from global memory. But they are asked for, and the
# number grows with the square of the batch. For much larger batches, sort.

# %% [markdown]
# ## See it
#
# The strides of the section on sectors, all of them: what part of the
# bytes that move does a warp want?

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
# *Figure 3.1.4. Of the bytes that move, a warp that reads neighbours uses all.
# With each step of the stride it uses less, and from stride 8 on an eighth:
# a column of a matrix costs eight times its bytes, however long the rows.*

# %% [markdown]
# ## Take away
#
# - A launch runs one function in a grid of blocks of threads. A thread
#   finds its element from its place; 32 threads form a warp, which makes
#   one request of the memory at a time.
# - Neighbours in a warp should read neighbours in memory: whole sectors of
#   32 bytes move. In shared memory they should read different banks.
# - Only a barrier that both have joined orders two threads of a block.
#   Blocks are not ordered at all. Two accesses that nothing orders, one of
#   them a write, are a race, even where the result is right.
# - A fiber for each thread makes a simulator that stops at barriers, and an
#   array that answers `__getitem__` itself makes one that sees races.
# - A sum whose every element has one owner needs no atomics, and has the
#   same bits every time.

# %% [markdown]
# ## Design note
#
# llm.c sorts the tokens on the CPU into buckets, one for each token and
# some of the channels, and gives each bucket a block. That reads each token
# once, and puts the CPU between the passes of the GPU. We search on the GPU,
# which costs more reading and needs no host: the launches of a training step
# can be recorded once as a whole, a *CUDA graph*, and be started with one
# call.
#
# Races could also be found by running a kernel many times in random
# orders and comparing the results. That finds only those that show, in the
# orders it tried.

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
# Below, no sector between the first and the last is left out, and the last
# is number $\lfloor 4 \cdot 31 s / 32 \rfloor$.
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
# **3** (★★★). Give each *token of the vocabulary* a block, not each place of
# the text. Write the kernel for `dwte` and check it under watch.
# What happens to the search, and for which sizes is it the better choice?
#
# :::{admonition} Solution to exercise 3
# :class: dropdown
# There is no first place to look for: the owner is there from the start. But
# all 50,257 blocks walk through all of the text, while most tokens do not
# occur in it. It is better where the vocabulary is small against the text,
# bytes for example: 256 blocks in place of $BT$.
# :::


# %% exercise 3, a solution tags=["hide-cell"]
@kernel
def block_a_token(dwte, dout, inp):
    token, c = cuda.blockIdx.x, cuda.threadIdx.x
    rows, C = dout.shape
    if c < C:
        total = dwte[token, c]
        for n in range(rows):
            if inp[n] == token:
                total += dout[n, c]
        dwte[token, c] = total


# %% exercise 3, checked
(inp, wte, wpe, dout), there = problem(2, 9, 8, 5, simulated)
with watch():
    flat = there[3].reshape(18, 8), there[0].reshape(18)
    block_a_token[5, 32](there[1], *flat)
reference.encoder_backward(wte, wpe, dout, inp)
compare("block a token", to_host(there[1]), wte, tol=1e-5)

# %% [markdown]
# ## Further reading
#
# - The CUDA C++ Programming Guide, linked at the start: the chapters on the
#   programming model and on warp functions, for what is promised and what is
#   not.
# - [PTX ISA](https://docs.nvidia.com/cuda/parallel-thread-execution/), NVIDIA:
#   the meaning of every line of the table above.
# - Lamport (1978),
#   [Time, Clocks, and the Ordering of Events in a Distributed System](https://doi.org/10.1145/359545.359563):
#   where "nothing orders them" was first made precise.
# - Flanagan and Freund (2009),
#   [FastTrack: Efficient and Precise Dynamic Race Detection](https://doi.org/10.1145/1542476.1542490):
#   why the last access can stand for all.
# - [numba-cuda](https://nvidia.github.io/numba-cuda/): the functions that
#   `cuda` offers to kernels.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("3.1")
