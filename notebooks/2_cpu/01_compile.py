# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       cpu.encoder: "The encoder, compiled for the processor's cores."
# ---

# %% [markdown]
# # Compile: from a Python loop to machine code
#
# > numba compiles a loop for the types it meets; two promises let it use
# > vectors, and one rule lets threads share it without changing a bit.
#
# *Reading time: 30 minutes. You need: the encoder of
# [chapter 1.5](../1_by_hand/05_encoder.ipynb).*

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.book.diagram import PALETTE, gpt2_diagram

gpt2_diagram(lit="encoder")

# %% [markdown]
# *Figure 2.1.1. We take the smallest layer once more, and learn on it how all
# the others will be compiled.*
#
# Part 1 wrote each layer in NumPy, as close to its equations as it goes. This
# part writes it again, for speed. A chapter of it asks what the NumPy version
# wastes, predicts what a change should gain, changes it, and measures. The
# function keeps its name and its arguments, and must give what the one in
# NumPy gives: that one is its specification, and each chapter ends with a
# verdict that they agree. At the end of this one you can
#
# - say what numba does with a function, and what its options promise;
# - name two things that keep a loop out of the vector instructions;
# - tell when two threads race, and why a test may not see it;
# - write a parallel sum whose result does not depend on the threads;
# - predict the time of a layer from the bytes that it moves.

# %% [markdown]
# ## Setup

# %% setup
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numba
import numpy as np

from llmnb.book.verify import compare, verdict
from llmnb.reference import encoder as reference
from llmnb.timing import fastest, machine

rng = np.random.default_rng(3)

# %% [markdown]
# ## What NumPy wastes
#
# The encoder's forward pass is one line, `out[...] = wte[inp] + wpe[:T]`, and
# NumPy carries it out in three sweeps. `wte[inp]` copies the rows into a
# temporary of the size of the output, the addition reads it again and makes a
# second one, and that is copied into `out`. Backward, `np.add.at` takes its
# rows one element at a time through general code that serves every type and
# shape. And NumPy uses one core for both.
#
# A loop that does the work in one sweep needs neither temporaries nor
# generality, but a loop in Python is slow: every `+` looks up the types of its
# operands, finds the function to call and allocates the result. numba is a
# package that compiles such a loop to machine code. Here is one to experiment
# with, the sum of $x/(1 + x^2)$.


# %% a loop
def total(x):
    one, s = x.dtype.type(1), x.dtype.type(0)
    for i in range(len(x)):
        s += x[i] / (one + x[i] * x[i])
    return s


# %% [markdown]
# ## What numba does
#
# `numba.njit(total)` returns an object that looks like the function. At its
# first call it takes the types of the arguments, works out from them the
# type of every variable, translates the function to the intermediate
# language of LLVM, the compiler behind clang, and LLVM makes machine code
# for the CPU it runs on. That takes part of a second. Later calls with the
# same types jump straight to the machine code; a call with new types
# compiles again.

# %% one version for each set of argument types
x = rng.normal(size=1 << 16).astype(np.float32)
compiled = numba.njit(total)
compiled(x)
compiled(x.astype(np.float64))
print([str(s.return_type) for s in compiled.nopython_signatures])

# %% [markdown]
# The types are fixed when the code is compiled, so they deserve a look. We
# wrote `x.dtype.type(1)` where Python would let us write `1`. In numba an
# integer plus a float32 is a float64, and one careless literal pulls the
# whole loop into float64, of which a register holds half as many:


# %% one literal changes the type
@numba.njit
def careless(x):
    s = x.dtype.type(0)
    for i in range(len(x)):
        s += x[i] / (1 + x[i] * x[i])
    return s


careless(x)
print([str(s.return_type) for s in careless.nopython_signatures])

# %% [markdown]
# So every kernel of this book takes its constants in the type of its arrays.
#
# ## Two promises that let LLVM use vectors
#
# A core of today's CPUs has *vector registers*, which hold 4, 8 or 16 numbers
# of type float32 side by side, and instructions that add, multiply or divide
# all of them at once. On x86 processors they are called AVX2 (8 numbers) and
# AVX-512 (16), on ARM ones NEON (4). LLVM uses them in a loop if it may. In
# ours two things forbid it.
#
# **The order of the sum.** Floating-point addition rounds, so $(a + b) + c$
# and $a + (b + c)$ may differ in the last bit. LLVM respects the order you
# wrote, one number after the other. `fastmath=True` permits it to regroup:
# say, eight partial sums side by side, added up at the end. It also promises
# that no NaN and no infinity occurs.
#
# **The division.** Python raises an error when you divide by zero, and
# numba keeps that behaviour with a test before each division. A loop that
# may stop in the middle cannot run eight elements at a time.
# `error_model="numpy"` drops the test, and 1/0 becomes infinity as it does
# in NumPy.
#
# Predict: each promise alone leaves the other obstacle in place and gains
# little. Both together should gain about what a vector holds.

# %% four versions of one loop
options = {
    "plain numba": {},
    "fastmath": {"fastmath": True},
    "error_model": {"error_model": "numpy"},
    "both": {"fastmath": True, "error_model": "numpy"},
}
versions = {name: numba.njit(total, **o) for name, o in options.items()}
exact = total(x.astype(np.float64))
for name, version in versions.items():
    compare(name, version(x), exact, tol=1e-4)

# %% nanoseconds an element tags=["nbval-ignore-output"]
print(machine())
seconds = {"Python": fastest(total, x[:4096], runs=3) * len(x) / 4096}
seconds["NumPy"] = fastest(lambda x: (x / (1 + x * x)).sum(), x)
seconds |= {name: fastest(f, x) for name, f in versions.items()}
for name, s in seconds.items():
    print(f"{name:<12} {s / len(x) * 1e9:8.2f} ns an element")

# %% [markdown]
# The last line is the loop with both obstacles gone. All four sums agree with
# the float64 sum to four digits and more, and a regrouped one is in general the
# closer, because eight short sums round less than one long one.
#
# The promise about NaN is serious. A compiler that may assume there is none
# answers the question `isnan` without looking:

# %% what fastmath believes tags=["nbval-ignore-output"]
import math


def is_nan(value):
    return math.isnan(value)


print("plain:   ", numba.njit(is_nan)(math.nan))
print("fastmath:", numba.njit(is_nan, fastmath=True)(math.nan))

# %% [markdown]
# So no kernel of this book asks for NaN, or uses infinity as a mark.
# [Attention](05_attention.ipynb), for one, must hide from each token those
# that come later: it skips them, where other programs set their scores to
# $-\infty$.
#
# `fastmath=True` is a bundle of seven permissions. The book's kernels take
# five of them, and leave out the two that would let a division be approximate:
# LLVM would use that in vectors and not for the last few elements of an array,
# so that the result of an element would depend on where it stands
# ([chapter A.4](../appendix/04_kernels.ipynb)).

# %% [markdown]
# ## Threads, and how they race
#
# A CPU has several cores, and `parallel=True` lets one loop use all of
# them. Where you write `numba.prange` for `range`, numba cuts the range
# into as many pieces as there are threads, gives each thread one, and waits
# until all are done. `NUMBA_NUM_THREADS` in the environment sets how many
# threads there are at most, `numba.set_num_threads` how many of them the
# next loops use.
#
# numba does not check that the pieces are independent. When two threads
# add to the same element, each reads the old value, adds, and writes back.
# If they do so at the same time, one addition is lost.

# %% one addition is lost
steps = [
    ("read 5", 5),
    ("read 5", 5),
    ("5 + 1", 5),
    ("5 + 2", 5),
    ("write 6", 6),
    ("write 7", 7),
]
fig, ax = plt.subplots(figsize=(8, 2.2), dpi=100)
for time, (what, value) in enumerate(steps):
    colour = PALETTE["orange" if time % 2 else "blue"]
    box = {"boxstyle": "round", "fc": PALETTE["pale"], "ec": colour}
    ax.text(time, 1 - time % 2, what, ha="center", va="center", bbox=box)
    ax.text(time, -1, value, ha="center", va="center")
ax.set(xlim=(-0.6, 5.6), ylim=(-1.5, 1.6), xlabel="time", xticks=[])
ax.set_yticks([1, 0, -1], ["thread 0", "thread 1", "in memory"])
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 2.1.2. Thread 0 adds 1 to an element that holds 5, thread 1 adds 2.
# Both read before either writes, and the element ends at 7: the addition of
# thread 0 is lost. Had thread 1 read after that was written, it would be 8.*
#
# Two accesses of one element that nothing orders, of which at least one
# writes, are a *race*. The plain parallel version of (1.5.4) has one. In the
# next cell a million rows of ones all belong to token 0, so each element of
# its row must end at a million:


# %% a race tags=["nbval-ignore-output"]
@numba.njit(parallel=True, fastmath=True, error_model="numpy")
def racy(dwte, dout, inp):
    for row in numba.prange(len(inp)):
        for c in range(dout.shape[1]):
            dwte[inp[row], c] += dout[row, c]


rows = 1_000_000
same, ones = np.zeros(rows, np.int32), np.ones((rows, 32), np.float32)
for _ in range(8):
    sums = np.zeros((1, 32), np.float32)
    racy(sums, ones, same)
    print(f"{int(rows - sums.min()):,} of {rows:,} lost")

# %% [markdown]
# The number changes from run to run, and it is 0 when the threads happen
# not to meet: a race can hide through a hundred tests. *Atomic* additions,
# which the processor does not interrupt, would save every one, and still
# leave the *order* of the additions to chance, and with it the last bits of
# each sum. We want more: the same bits from every run and from any number of
# threads, so that a training run can be repeated and resumed exactly.
#
# The rule for every kernel in this book follows. *A parallel loop runs over
# outputs, never over the terms of a sum: each element of an output belongs
# to one thread, which adds its terms in one fixed order.* We call it the
# *owner rule*. Here one row of `x` is one output:

# %% one output, one thread
inner_total = versions["both"]


@numba.njit(parallel=True, fastmath=True, error_model="numpy")
def row_totals(out, x):
    for n in numba.prange(len(x)):
        out[n] = inner_total(x[n])


def with_threads(n, function, *args):
    before = numba.get_num_threads()
    numba.set_num_threads(min(n, before))
    function(*args)
    numba.set_num_threads(before)


one, many = np.empty((2, 64), np.float32)
with_threads(1, row_totals, one, x.reshape(64, -1))
with_threads(99, row_totals, many, x.reshape(64, -1))
verdict("row totals", np.array_equal(one, many), "same bits, any threads")

# %% [markdown]
# ## The book's decorators
#
# A call of `numba.njit` has served us so far. Three things about it are
# unpleasant in a package: it compiles at each start of Python, or keeps
# machine code that may be stale; a `prange` takes long to compile; and after a
# fork there are no threads to run it. [Chapter A.4](../appendix/04_kernels.ipynb)
# mends all three and may be read at any time, or never. What the layers use of
# it is this:
#
# | in `llmnb.cpu.jit` | what it makes of a function |
# |---|---|
# | `inner` | compiled for one thread, with the options of this chapter; kept on disk |
# | `team` | run by all threads: the function gets `part`, `parts` and `address` |
# | `arguments(address)` | a team's arguments |
# | `share(size, part, parts)` | the slice of `range(size)` that this thread owns |
# | `inlined` | a function that becomes part of the kernels that call it |
#
# So the row sums, as a layer would have them:

# %% row sums by a team
from llmnb.cpu.jit import arguments, share, team


@team
def team_totals(part, parts, address):
    out, x = arguments(address)
    mine = share(len(out), part, parts)
    for n in range(mine.start, mine.stop):
        out[n] = inner_total(x[n])


with_threads(99, team_totals, many, x.reshape(64, -1))
verdict("a team", np.array_equal(one, many), "the same bits")

# %% [markdown]
# ## The encoder's kernels
#
# How would threads share the encoder's backward pass? The rule asks for an
# owner of each element of `dwte`. Rows are bad property: a common token would
# keep one thread busy while the others wait, and to find the places of its
# tokens each thread would search the whole batch. Channels are good
# property. A thread takes a slice of 64 channels and walks through the
# whole batch with it; all slices are equal work, and every element adds up
# its terms in the order of the text. The position table has the same
# owners, and each row of `dout` is read once for both.

# %% slices of channels
SLICE = 64  # channels that one thread owns at a time: 256 bytes of a row


@numba.njit(parallel=True, fastmath=True, error_model="numpy")
def sliced_backward(dwte, dwpe, dout, inp):
    B, T, C = dout.shape
    for s in numba.prange((C + SLICE - 1) // SLICE):
        first, last = s * SLICE, min((s + 1) * SLICE, C)
        for b in range(B):
            for t in range(T):
                token = inp[b, t]
                for c in range(first, last):
                    dwte[token, c] += dout[b, t, c]
                    dwpe[t, c] += dout[b, t, c]


# %% [markdown]
# It keeps the rule, and it is not what we export. The encoder is one
# addition for every few bytes, so its time is that of moving rows through
# memory, and memory is fastest when whole rows are read from end to end.
# The slices take every row in a dozen short pieces, at a dozen different
# times. Nor is there much to share: the layer runs once in a step, beside
# twelve blocks of matrix products. One thread that goes through the text
# row by row is hard to beat. So both kernels of the encoder run on one
# thread, as `inner` compiles them. We measure later whether that was wise.
#
# The texts of the batch follow each other in memory: B·T rows, of which row
# $n$ stands at position $n \bmod T$ of its text.

# %% imports of the CPU version tags=["export"]
from llmnb.backend import noted
from llmnb.cpu.jit import inner
from llmnb.shapes import COMPILED, shapes


# %% the kernels tags=["exporti"]
@inner
def _encoder_forward(out, inp, wte, wpe, T):
    rows, C = out.shape
    for n in range(rows):
        y, token, position = out[n], wte[inp[n]], wpe[n % T]
        for c in range(C):
            y[c] = token[c] + position[c]


@inner
def _encoder_backward(dwte, dwpe, dout, inp, T):
    rows, C = dout.shape
    for n in range(rows):
        dtoken, dposition, dy = dwte[inp[n]], dwpe[n % T], dout[n]
        for c in range(C):
            dtoken[c] += dy[c]
            dposition[c] += dy[c]


# %% [markdown]
# Each element adds up its terms in the order of the text, as in the slices.
# Rows of absent tokens are never touched, so the time does not depend on the
# size of the vocabulary.
#
# **Checks.** A compiled kernel does not check its indices: token 60000
# would read, or worse, write, memory that belongs to something else. So the
# public functions of this part look first, by the same line as the reference,
# and the encoder takes int32 alone: for each other type of integer numba
# would compile again.
#
# `noted` calls the kernel with the arguments that follow, no more; that it may
# also write the call down will be of use to the whole model
# ([chapter A.13](../appendix/13_backend.ipynb)).


# %% encoder, forward tags=["export"]
@shapes("B T C!, B T of Vp, Vp C, T+ C", COMPILED)
def encoder_forward(out, inp, wte, wpe):
    """Sum the vector of each token and the vector of its position.

    out   (B, T, C)      float32 or float64, overwritten
    inp   (B, T)         int32, each in [0, Vp)
    wte   (Vp, C)        as out, the table of tokens
    wpe   (T_max, C)     as out, the table of positions; T <= T_max

    Raises TypeError or ValueError where an array does not fit, a token is
    out of range or T exceeds T_max.
    """
    rows = out.reshape(inp.size, out.shape[2])
    noted(_encoder_forward, rows, inp.reshape(-1), wte, wpe, inp.shape[1])


# %% encoder, backward tags=["export"]
@shapes("Vp C!, T+ C!, B T C, B T of Vp", COMPILED)
def encoder_backward(dwte, dwpe, dout, inp):
    """Add dout's rows to the rows of the tables that they came from.

    dwte  (Vp, C)        as dout, added to; rows of absent tokens stay
    dwpe  (T_max, C)     as dout, added to; rows from T on stay
    dout  (B, T, C)      float32 or float64
    inp   (B, T)         int32, as in the forward pass

    Raises as `encoder_forward` does. One thread adds all rows in the order
    of the text.
    """
    rows, flat = dout.reshape(inp.size, dout.shape[2]), inp.reshape(-1)
    noted(_encoder_backward, dwte, dwpe, rows, flat, inp.shape[1])


# %% [markdown]
# ## The verdict
#
# Against the NumPy version in float32, with odd sizes and tokens that repeat,
# and the slices against the one thread:


# %% a problem of any size
def problem(B, T, C, Vp, dtype=np.float32):
    p = SimpleNamespace(inp=rng.integers(0, Vp, (B, T), dtype=np.int32))
    p.wte = rng.normal(size=(Vp, C)).astype(dtype)
    p.wpe = rng.normal(size=(1024, C)).astype(dtype)
    p.dwte, p.dwpe = np.zeros_like(p.wte), np.zeros_like(p.wpe)
    p.out, p.dout = rng.normal(size=(2, B, T, C)).astype(dtype)
    return p


numpy = SimpleNamespace(
    forward=reference.encoder_forward, backward=reference.encoder_backward
)
cpu = SimpleNamespace(forward=encoder_forward, backward=encoder_backward)


def run(p, layer):
    layer.forward(p.out, p.inp, p.wte, p.wpe)
    layer.backward(p.dwte, p.dwpe, p.dout, p.inp)


sliced = SimpleNamespace(forward=encoder_forward, backward=sliced_backward)

# %% float32, odd sizes: against NumPy, and the slices against one thread
p = problem(3, 37, 51, 331)
results = {}
for name, n, layer in (
    ("numpy", 1, numpy),
    ("cpu", 1, cpu),
    ("sliced", 99, sliced),
):
    for array in (p.out, p.dwte, p.dwpe):
        array[...] = 0
    with_threads(n, run, p, layer)
    results[name] = [a.copy() for a in (p.out, p.dwte, p.dwpe)]
for i, name in enumerate(("out", "dwte", "dwpe")):
    compare(name, results["cpu"][i], results["numpy"][i])
for i, name in ((1, "dwte"), (2, "dwpe")):
    same = np.array_equal(results["cpu"][i], results["sliced"][i])
    verdict(f"{name}, sliced", same, "the same bits")

# %% [markdown]
# Rows that no token points to are left alone, here the odd ones, and what
# does not fit is refused:

# %% absent tokens are left alone
p.inp //= 2
p.inp *= 2
p.dwte[...] = 7
encoder_backward(p.dwte, p.dwpe, p.dout, p.inp)
verdict("odd rows", (p.dwte[1::2] == 7).all(), "not touched")
verdict("even rows", (p.dwte[::2] != 7).any(), "added to")

# %% what does not fit
long = np.zeros((1, 1025), np.int32)
for out, inp in (
    (p.out, p.inp + 300),
    (p.out, p.inp.astype(np.int64)),
    (p.out[:, ::-1], p.inp),
    (np.zeros((1, 1025, 51), np.float32), long),
):
    try:
        encoder_forward(out, inp, p.wte, p.wpe)
        verdict("bad input", False, "is refused")
    except (TypeError, ValueError) as error:
        print(error)

# %% [markdown]
# ## Predict, then measure
#
# Forward takes one addition for each of the B·T·C elements, backward two.
# In bytes: forward reads a row of `wte` and a row of `wpe` for each token
# and writes a row of `out`. The position rows are the same for each text and
# stay in a *cache*, a small memory beside the core that holds what was used
# last. Backward reads `dout`, and reads and writes a row of `dwte`.

# %% FLOPs and bytes
B, T, C, Vp = 4, 256, 768, 50304
elements = B * T * C
traffic = {"forward": 2 * 4 * elements, "backward": 3 * 4 * elements}
flops = {"forward": elements, "backward": 2 * elements}
for name in traffic:
    ratio = flops[name] / traffic[name]
    print(f"{name:<9} {traffic[name]:>10,} bytes, {ratio:.2f} FLOP a byte")
print(f"wte       {4 * Vp * C:>10,} bytes")

# %% [markdown]
# An eighth of an operation a byte forward, a sixth backward. A core does
# several operations in the time in which one byte comes from memory, so memory
# decides: the *arithmetic intensity*, operations for each byte moved, says
# which of the two to look at, and [chapter 2.4](04_matmul.ipynb) draws it.
# To predict the time, we measure how fast this machine copies an array that
# fits in no cache.

# %% NumPy against the kernels tags=["nbval-ignore-output"]
p = problem(4, 256, 768, 50304)
calls = {
    "forward": (p.out, p.inp, p.wte, p.wpe),
    "backward": (p.dwte, p.dwpe, p.dout, p.inp),
}
print(f"{machine()}, {numba.get_num_threads()} threads")
times = {}
for name, args in calls.items():
    slow = fastest(getattr(numpy, name), *args, runs=5)
    times[name] = fast = fastest(getattr(cpu, name), *args)
    print(f"{name:<9} NumPy {slow * 1e3:7.2f} ms, numba {fast * 1e3:6.2f} ms")
    print(f"{'':<9} {slow / fast:.1f} times as fast")
shared = fastest(sliced_backward, *calls["backward"])
print(f"backward in slices, all threads: {shared * 1e3:.2f} ms")

# %% predicted against measured time tags=["nbval-ignore-output"]
a, b = np.ones((2, 1 << 25), np.float32)
bandwidth = 2 * a.nbytes / fastest(np.copyto, a, b, runs=5)
print(f"copy: {bandwidth / 1e9:.1f} GB/s")
for name, moved in traffic.items():
    ms = moved / bandwidth * 1e3
    print(f"{name:<9} {ms:.2f} ms predicted, {times[name] * 1e3:.2f} measured")
print(f"zero dwte {fastest(p.dwte.fill, 0, runs=5) * 1e3:.2f} ms")

# %% [markdown]
# The first cell's last line answers whether one thread was wise. On a machine
# with many cores and fast memory the slices may win, by a time that no
# training step notices.
#
# A time below the prediction means that the rows were still in a cache from
# the run before. One above it has to do with the order: the copy runs
# straight through memory, the encoder jumps to another row of the table for
# each token. The last line shows where the cost of an embedding lies. The
# table is much larger than the rows that a batch reads, and to set its
# gradient to zero takes longer than to compute it. The same holds for the
# optimiser, which visits every parameter.

# %% [markdown]
# ## Take away
#
# - numba compiles a loop for the types it meets; fastmath and NumPy's error
#   model together let it use vector instructions.
# - Two threads that touch one element, one of them writing, race, even where
#   the result is right today.
# - A parallel loop over outputs, each summed by one thread in a fixed order,
#   gives the same bits for any number of threads.
# - The encoder moves bytes and hardly computes, so one thread that reads whole
#   rows is hard to beat.

# %% [markdown]
# ## Design note
#
# For the backward pass we could have sorted the tokens and let one thread
# sum each group of equal ones, as a GPU program may prefer, with thousands
# of threads to feed. It needs room for the sorted order and balance between
# rare and common tokens. On a CPU one thread in the order of the text is
# the shortest program, and its only rivals for the memory are the other
# threads that it does not start.

# %% [markdown]
# ## Exercises
#
# **1** (★★★). Write a race-free kernel with other owners: each turn of the
# `prange` owns a range of *tokens*, walks through all of `inp` and adds the
# rows of its own. Is it bit-identical to ours? What does it cost with eight
# owners, and on which texts is it slow?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# It is bit-identical: each element of `dwte` adds the same terms in the
# order of the text. Every owner reads all of `inp`, which is little, since
# a token is one number and its row C numbers. It is slow when most tokens
# of a text belong to one owner; a text of one letter runs on one thread.
# :::


# %% exercise 1, a solution tags=["hide-cell"]
@numba.njit(parallel=True, fastmath=True, error_model="numpy")
def by_token(dwte, dout, inp, owners):
    B, T, C = dout.shape
    for owner in numba.prange(owners):
        first = owner * len(dwte) // owners
        last = (owner + 1) * len(dwte) // owners
        for b in range(B):
            for t in range(T):
                if first <= inp[b, t] < last:
                    for c in range(C):
                        dwte[inp[b, t], c] += dout[b, t, c]


# %% exercise 1, checked
p = problem(3, 37, 51, 331)
encoder_backward(p.dwte, p.dwpe, p.dout, p.inp)
got = np.zeros_like(p.dwte)
by_token(got, p.dout, p.inp, 8)
verdict("by token", np.array_equal(got, p.dwte), "the same bits")

# %% [markdown]
# ## Further reading
#
# - Lam, Pitrou and Seibert (2015),
#   [Numba: a LLVM-based Python JIT compiler](https://doi.org/10.1145/2833157.2833162):
#   how types are inferred and code is made.
# - Goldberg (1991),
#   [What Every Computer Scientist Should Know About Floating-Point Arithmetic](https://doi.org/10.1145/103162.103163):
#   why the order of a sum changes its last bits.
# - [Performance Tips](https://numba.readthedocs.io/en/stable/user/performance-tips.html)
#   in numba's documentation: fastmath, parallel loops, and how to see whether
#   a loop became vectors.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("2.1")
