# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       cpu.crossentropy: "Softmax and cross-entropy, compiled for the processor's cores."
#       cpu.adamw: "AdamW and clipping, compiled for the processor's cores."
# ---

# %% [markdown]
# # Loss and AdamW: read once, write once
#
# > The two ends of a training step are one thing to a processor: long arrays,
# > little arithmetic. Each is read and written as rarely as it can be.
#
# *Reading time: 22 minutes. You need: cross-entropy
# ([chapter 1.11](../1_by_hand/11_crossentropy.ipynb)), AdamW
# ([chapter 1.12](../1_by_hand/12_adamw.ipynb)) and compiled kernels
# ([chapter 2.1](01_compile.ipynb)).*

# %% [markdown]
# ## Where we are
#
# The logits of a batch are the largest array of a step, and AdamW reads four
# arrays as large as the model. This chapter compiles both, and the norm of
# the gradients between them. At its end you can
#
# - count the bytes that a NumPy expression moves, and predict from them;
# - say what a polynomial can do for a loop that a library's `exp` cannot;
# - update parameters in the time that memory needs to move them;
# - take a long sum that no number of threads changes.

# %% [markdown]
# ## Setup

# %% setup
import numba

from llmnb import reference
from llmnb.book.verify import compare, verdict
from llmnb.reference.adamw import AdamW
from llmnb.timing import fastest, machine

# %% imports of cross-entropy tags=["export"]
import math

import numpy as np

from llmnb.backend import noted
from llmnb.cpu.jit import arguments, share, team
from llmnb.cpu.math import fast_exp, larger
from llmnb.shapes import COMPILED, shapes

# %% the seed
rng = np.random.default_rng(9)

# %% [markdown]
# ## What NumPy wastes
#
# NumPy's fused forward pass reads the logits for the maximum, reads them
# again to write `logits - top` to a temporary, reads that to write its
# exponential to another, and reads that for the sum: six passes over an array
# where one would do. For 64 rows of GPT-2 each of these arrays has 13 MB,
# more than a core's own caches hold. One row has 200 KB and stays in the
# second-level cache: a kernel that finishes a row before it takes the next
# one reads memory once.
#
# NumPy's AdamW is worse. Here are its operations, with the arrays that each
# one reads and writes:

# %% passes over memory
passes = {
    "params *= keep": 2,
    "grads - m, times new1, m +=": 3 + 2 + 3,
    "v *= beta2": 2,
    "new2 * grads, times grads, v +=": 2 + 3 + 3,
    "sqrt(v), / root, + eps": 2 + 2 + 2,
    "size * m, / spread, params -=": 2 + 3 + 3,
}
numpy_bytes, least = 4 * sum(passes.values()), 4 * (4 + 3)
print(f"AdamW: NumPy moves {numpy_bytes} bytes a parameter, the least {least}")
print(f"predicted for one thread: {numpy_bytes / least:.1f} times as fast")

# %% [markdown]
# The least is to read four arrays and to write three, because each parameter
# needs only its own numbers, and a loop can do all its arithmetic while they
# are in registers. That is the prediction: a kernel is faster by what it does
# not move, and by the cores that NumPy leaves idle, up to what memory can
# deliver.
#
# ## Cross-entropy
#
# The fused forward pass takes two sweeps over a row, one for $m$ and one
# for the sum of (1.11.11). The exponential decides how long that takes.
# NumPy's works on whole vectors of numbers. In a kernel, `math.exp` is a call
# to a library that takes one number at a time; `fast_exp` is a polynomial,
# which LLVM turns into vector instructions like any other arithmetic. So it does
# with `larger`, the maximum of chapter 2.2.
#
# Rows are independent, so the threads share them out, and each sum is taken
# by one thread in one order.
#
# The sum starts as a zero of the row's own dtype. `top * 0` would not do:
# numba, like NumPy's arrays, takes float32 times a 64-bit integer for
# float64, and the loop would convert every number.


# %% the forward kernel tags=["exporti"]
@team
def _softmax_forward(part, parts, address):
    logits, losses, lse, targets, V = arguments(address)
    zero, mine = logits.dtype.type(0), share(len(logits), part, parts)
    for n in range(mine.start, mine.stop):
        top, total = logits[n, 0], zero
        for i in range(V):
            top = larger(top, logits[n, i])
        for i in range(V):
            total += fast_exp(logits[n, i] - top)
        lse[n] = top + math.log(total)
        losses[n] = lse[n] - logits[n, targets[n]]


# %% [markdown]
# The backward kernel (1.11.12) works in place and takes one array, not two;
# where the caller brings two, the logits are copied first. In place is the
# common case. Each row's few columns of padding are set to zero by the thread
# that has the row.


# %% the backward kernel tags=["exporti"]
@team
def _softmax_backward(part, parts, address):
    dlogits, dlosses, lse, targets, V = arguments(address)
    mine = share(len(dlogits), part, parts)
    for n in range(mine.start, mine.stop):
        scale, shift = dlosses[n], lse[n]
        for i in range(V):
            dlogits[n, i] = scale * fast_exp(dlogits[n, i] - shift)
        dlogits[n, targets[n]] -= scale
        dlogits[n, V:] = 0


# %% [markdown]
# A target of 50,300 would make the kernel read a padding column, and one of
# 60,000 the next row, without a word. So the functions around the kernels
# carry the line of their NumPy versions, which looks at the arguments first,
# and then view the arrays as rows.


# %% the functions around them tags=["export"]
def _rows(*arrays):
    """Arrays (B, T, Vp) or (B, T) with one row, or number, a token."""
    return [x.reshape(-1, *x.shape[2:]) for x in arrays]


@shapes("B T!, B T!, B T Vp, B T of V, 1 to Vp", COMPILED)
def crossentropy_softmax_forward(losses, lse, logits, targets, V):
    """Losses straight from the logits; no probability is stored.

    losses, lse: (B, T), written; lse is the log of the sum of the
    exponentials of a row, all that the backward pass needs besides the
    logits. logits: float32 or float64 (B, T, Vp), of which columns from V
    on are not read. targets: int32 (B, T), each below V. Raises TypeError
    or ValueError for a wrong dtype or shape, a target outside [0, V) and a
    V outside [1, Vp].
    """
    _softmax_forward(*_rows(logits, losses, lse, targets), V)


@shapes("B T Vp!, B T, B T Vp~, B T, B T of V, 1 to Vp", COMPILED)
def crossentropy_softmax_backward(dlogits, dlosses, logits, lse, targets, V):
    """Write the gradient of the losses by the logits: p - y, scaled.

    dlogits: (B, T, Vp), overwritten (not added to); it may be `logits`
    itself, which then is lost. dlosses, lse: (B, T), lse from the forward
    pass. logits: float32 or float64 (B, T, Vp). targets: int32 (B, T).
    Columns from V on receive 0. Raises as the forward pass does.
    """
    if dlogits is not logits:
        noted(np.copyto, dlogits, logits)
    _softmax_backward(*_rows(dlogits, dlosses, lse, targets), V)


# %% [markdown]
# The verdict, in float32 and on sizes that divide nothing:


# %% a batch of any size
def batch(B, T, V, Vp):
    logits = (3 * rng.normal(size=(B, T, Vp))).astype(np.float32)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    return logits, targets, np.full((B, T), 1 / (B * T), np.float32)


def forward_and_backward(forward, backward, logits, targets, dlosses, V):
    losses, lse = np.zeros((2, *targets.shape), np.float32)
    dlogits = np.full_like(logits, np.nan)
    forward(losses, lse, logits, targets, V)
    backward(dlogits, dlosses, logits, lse, targets, V)
    return losses, lse, dlogits


by_numpy = (
    reference.crossentropy_softmax_forward,
    reference.crossentropy_softmax_backward,
)
compiled = crossentropy_softmax_forward, crossentropy_softmax_backward
small = batch(3, 37, 331, 384)
got = forward_and_backward(*compiled, *small, 331)
want = forward_and_backward(*by_numpy, *small, 331)
for name, x, y in zip(("losses", "lse", "dlogits"), got, want, strict=True):
    compare(name, x, y)

# %% in place, and a bad target
logits, targets, dlosses = small
crossentropy_softmax_backward(logits, dlosses, logits, got[1], targets, 331)
verdict("in place", np.array_equal(logits, got[2]), "same bits")
targets[2, 5] = 331
try:
    forward_and_backward(*compiled, *small, 331)
    verdict("the target", False, "is refused")
except ValueError as error:
    print(error)

# %% [markdown]
# Now the time, for 64 positions of GPT-2's vocabulary. Between NumPy and
# the kernel stands one that differs in a single name, `math.exp`. It saves
# the temporaries, and yet it may lose to NumPy's vectors.


# %% with the library's exponential
@team
def library_forward(part, parts, address):
    logits, losses, lse, targets, V = arguments(address)
    zero, mine = logits.dtype.type(0), share(len(logits), part, parts)
    for n in range(mine.start, mine.stop):
        top, total = logits[n, 0], zero
        for i in range(V):
            top = larger(top, logits[n, i])
        for i in range(V):
            total += math.exp(logits[n, i] - top)
        lse[n] = top + math.log(total)
        losses[n] = lse[n] - logits[n, targets[n]]


V = 50257
logits, targets, dlosses = batch(1, 64, V, 50304)
losses, lse, library = np.zeros((3, 1, 64), np.float32)
library_forward(logits[0], library[0], lse[0], targets[0], V)
arrays = losses, lse, logits, targets, V
crossentropy_softmax_forward(*arrays)
compare("both kernels", losses, library)

# %% three forward passes, timed tags=["nbval-ignore-output"]
slow = fastest(reference.crossentropy_softmax_forward, *arrays, runs=5)
rows = logits[0], losses[0], lse[0], targets[0], V
middle = fastest(library_forward, *rows)
fast = fastest(crossentropy_softmax_forward, *arrays)
print(f"{machine()}, {numba.get_num_threads()} threads")
print(f"NumPy               {slow * 1e3:7.2f} ms")
print(f"kernel, math.exp    {middle * 1e3:7.2f} ms, {slow / middle:.1f} x")
print(f"kernel, fast_exp    {fast * 1e3:7.2f} ms, {slow / fast:.1f} x")

# %% [markdown]
# How far is it from memory's limit? Forward reads the logits, backward in
# place reads and writes them: 12 bytes an element. The operations, counted in
# the kernels, are a comparison, a subtraction, about 25 for `fast_exp` and an
# addition in forward; as many in backward, with a product in place of the
# sum. That is some 55 operations for 12 bytes, several times LayerNorm's
# ratio, so arithmetic has its share in the time, beside what memory takes:

# %% predicted against measured tags=["nbval-ignore-output"]
a, b = np.ones((2, 1 << 25), np.float32)
bandwidth = 2 * a.nbytes / fastest(np.copyto, a, b, runs=5)


def in_place():
    crossentropy_softmax_forward(*arrays)
    crossentropy_softmax_backward(logits, dlosses, logits, lse, targets, V)


time = fastest(in_place)
print(f"copy: {bandwidth / 1e9:.1f} GB/s, on one thread")
print(f"memory alone {12 * logits.size / bandwidth * 1e3:.2f} ms", end=", ")
print(f"measured {time * 1e3:.2f} ms")

# %% [markdown]
# A time below memory's means that logits were still in a cache from one pass
# to the next, and that the copy ran on one thread.
#
# ## AdamW
#
# Parameters do not meet, so each thread takes a share of them, and the array
# may be cut anywhere. That the bits do not depend on the cut is owed to
# `team`: it asks for exact division ([chapter 2.1](01_compile.ipynb)), and
# exact square roots come with it, so that an element is rounded alike in a
# vector and in the rest that is left over at the end of a thread's share.

# %% imports of AdamW tags=["export"] module="cpu.adamw"
import math

import numpy as np

from llmnb.cpu.jit import arguments, inlined, share, team
from llmnb.shapes import shapes


# %% the kernel tags=["exporti"] module="cpu.adamw"
@inlined
def learn(params, grads, m, v, factors):
    """AdamW on some parameters; returns the sum of their grads' squares."""
    keep, new1, beta2, new2, root, eps, size = factors
    total = grads.dtype.type(0)
    for i in range(params.size):
        g = grads[i]
        total += g * g
        m[i] += new1 * (g - m[i])
        v[i] = beta2 * v[i] + new2 * g * g
        spread = math.sqrt(v[i]) / root + eps
        params[i] = keep * params[i] - size * m[i] / spread
    return total


@team
def _adamw_update(part, parts, address):
    params, grads, m, v, factors = arguments(address)
    mine = share(params.size, part, parts)
    learn(params[mine], grads[mine], m[mine], v[mine], factors)


# %% [markdown]
# The seven factors are computed once, in Python's float64, and passed in the
# array's dtype, so that no float64 enters the loop. PyTorch does the same. The
# sum of squares that `learn` returns is for
# [chapter 5.11](../5_modern/11_inbackward.ipynb); here nobody takes it, and the
# compiler leaves it out.


# %% one step of AdamW tags=["export"] module="cpu.adamw"
@shapes("N!, N, N!, N!")
def adamw_update(params, grads, m, v, settings):
    """Take one step of AdamW, in the order in which torch.optim.AdamW does.

    params, grads, m, v: float32 or float64, flat, of one length; params, m
    and v change in place. m and v are the running means of the gradient and
    of its square, zero before the first step. settings: an AdamW; its decay
    applies to every element. Raises TypeError or ValueError for a wrong
    dtype or shape and for settings out of range.
    """
    factors = map(params.dtype.type, settings.factors("adamw_update"))
    _adamw_update(params, grads, m, v, tuple(factors))


# %% the same numbers, in both precisions
def three_steps(update, dtype):
    start = np.random.default_rng(1).normal(size=(2, 1003)).astype(dtype)
    params, grads = start
    m, v = np.zeros((2, 1003), dtype)
    for step in range(1, 4):
        update(params, grads * step, m, v, AdamW(0.01, step=step))
    return params


for dtype, tol in ((np.float32, 1e-6), (np.float64, 1e-14)):
    got, want = (
        three_steps(update, dtype)
        for update in (adamw_update, reference.adamw_update)
    )
    compare(dtype.__name__, got, want, tol=tol)

# %% NumPy against the kernel tags=["nbval-ignore-output"]
n = 1 << 24
params, grads, m, v = np.ones((4, n), np.float32)
arrays = params, grads, m, v, AdamW(1e-3, beta2=0.95, step=5)
slow = fastest(reference.adamw_update, *arrays, runs=3)
fast = fastest(adamw_update, *arrays)
print(f"{machine()}, {numba.get_num_threads()} threads")
print(f"NumPy   {slow * 1e3:7.1f} ms for {n / 1e6:.1f} M parameters")
print(f"kernel  {fast * 1e3:7.1f} ms, {slow / fast:.1f} times as fast")
print(f"memory  {28 * n / bandwidth * 1e3:7.1f} ms, at a copy's rate")

# %% [markdown]
# The copy runs on one thread, the kernel on all; where one core cannot use
# the whole bandwidth of the memory, the kernel beats the last line.
#
# ## The norm, in one order
#
# The norm (1.12.14) is one long sum, and a sum in another order is another
# sum. So the pieces must not depend on the threads: 256 of them, their bounds
# set by the length alone, each summed by one thread; then the 256 sums, in
# a fixed order. Kernels are compiled under the promise that no NaN occurs
# ([chapter 2.1](01_compile.ipynb)), and a gradient may break it; but products
# and sums hand a NaN on whatever was promised, and the verdict at the end
# sees to it that they do. The question itself, `math.isfinite`, is asked in
# Python.


# %% the kernels tags=["exporti"] module="cpu.adamw"
@team
def _sum_of_squares(part, parts, address):
    grads, sums, length = arguments(address)
    for k in range(part, sums.size, parts):
        piece = grads[k * length : (k + 1) * length]
        total = 0.0
        for i in range(piece.size):
            x = np.float64(piece[i])
            total += x * x
        sums[k] = total


@team
def _scale(part, parts, address):
    grads, factor = arguments(address)
    mine = grads[share(grads.size, part, parts)]
    for i in range(mine.size):
        mine[i] *= factor


# %% the norm and the clip tags=["export"] module="cpu.adamw"
PIECES = 256  # of an array, each summed by itself


@shapes("N")
def global_norm(grads):
    """The Euclidean norm of a flat array, summed in float64, as a float.

    The sum is taken over 256 pieces whose bounds depend on the length alone
    and then over the pieces, so that the number of threads does not change
    it. Raises TypeError or ValueError unless `grads` is flat and
    float32 or float64.
    """
    sums, found = np.zeros(PIECES), squares(grads, piece_length(grads.size))
    sums[: found.size] = found
    return math.sqrt(sums.sum())


def piece_length(size):
    """Elements in each of the pieces of an array, but for the last ones."""
    return max(1, -(-size // PIECES))


def squares(grads, length):
    """The sums of squares of pieces of so many elements; in float64.

    grads: flat. Each sum is of one piece alone, whatever lies beside it.
    """
    sums = np.empty(-(-grads.size // length))
    _sum_of_squares(grads, sums, length)
    return sums


@shapes("N!, above 0")
def clip_gradients(grads, max_norm):
    """Scale a flat array down to norm `max_norm` if it is longer.

    Returns the norm before clipping and scales `grads` in place by
    max_norm / (norm + 1e-6) where that is below 1, as torch's
    clip_grad_norm_. When the norm is infinite or NaN, `grads` is left as it
    is: the caller sees the norm and decides. Raises ValueError unless
    max_norm is positive, and as `global_norm` does.
    """
    norm = global_norm(grads)
    shrink(grads, norm, max_norm)
    return norm


def shrink(grads, norm, max_norm):
    """Scale a flat array in place as `clip_gradients` does, for a norm."""
    scale = max_norm / (norm + 1e-6)
    if math.isfinite(norm) and scale < 1:
        _scale(grads, grads.dtype.type(scale))


# %% the norm, and a gradient that is not a number
grads = rng.normal(size=100_003).astype(np.float32)
compare("norm", global_norm(grads), reference.global_norm(grads), tol=1e-12)
grads[77] = np.nan
before = grads.copy()
verdict("NaN", math.isnan(clip_gradients(grads, 1.0)), "is reported")
same = np.array_equal(grads, before, equal_nan=True)
verdict("gradients", same, "are left alone")


# %% one thread and many
def five_steps(threads, n=100_003):
    stream = np.random.default_rng(1)
    p, g = stream.normal(size=(2, n)).astype(np.float32)
    m, v = np.zeros((2, n), np.float32)
    numba.set_num_threads(threads)
    for t in range(1, 6):
        clip_gradients(g, 1.0)
        adamw_update(p, g, m, v, AdamW(0.01, weight_decay=0.1, step=t))
        g += p
    return p


most = numba.get_num_threads()
same = np.array_equal(five_steps(1), five_steps(most))
verdict("threads", same, "do not change a bit")

# %% [markdown]
# ## Take away
#
# - A NumPy expression writes a temporary for each operation; a kernel keeps
#   it in a register. Count the passes, and you have predicted the ratio.
# - A row of logits stays in cache between two sweeps. What is left is the
#   exponential, and a polynomial vectorises where a call does not.
# - AdamW costs 28 bytes of traffic a parameter, and that is its time.
# - A sum whose pieces depend on its length alone has the same bits on any
#   number of threads.

# %% [markdown]
# ## Design note
#
# Clipping and updating could be one pass: measure the norm, then let the
# update multiply each gradient by the factor as it reads it. That saves 8
# bytes a parameter in the steps that clip. We keep two functions, because
# then `grads` holds what the update used, for whoever wants to look.
#
# Cross-entropy could read each row once, not twice: keep a running maximum
# and rescale the running sum when it changes. Here a row stays in cache
# between the two sweeps, and a sweep for the maximum costs little beside one
# for the exponentials. Exercise 1 builds the single sweep;
# [chapter 3.8](../3_gpu/08_classifier.ipynb) needs it.

# %% [markdown]
# ## Exercises
#
# **1** (★★). Write the forward kernel with a single sweep, which keeps the
# largest logit so far and the sum of exponentials to it. What has the
# processor to do once more when the maximum grows?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# Every term of the sum was taken with the old maximum $m$ and should have been
# taken with the new one, $m'$. One factor $e^{m - m'}$ for the whole sum
# repairs them all.
# :::


# %% exercise 1, the kernel tags=["hide-cell"]
@team
def one_sweep(part, parts, address):
    logits, lse, V = arguments(address)
    one, mine = logits.dtype.type(1), share(len(logits), part, parts)
    for n in range(mine.start, mine.stop):
        top, total = logits[n, 0], one
        for i in range(1, V):
            x = logits[n, i]
            if x > top:
                total, top = total * fast_exp(top - x) + one, x
            else:
                total += fast_exp(x - top)
        lse[n] = top + math.log(total)


# %% exercise 1, checked
logits, targets, dlosses = batch(1, 7, 331, 384)
losses, lse, once = np.zeros((3, 1, 7), np.float32)
crossentropy_softmax_forward(losses, lse, logits, targets, 331)
one_sweep(logits[0], once[0], 331)
compare("one sweep", once, lse)

# %% [markdown]
# **2** (★). How many bytes a parameter does a step move that measures the
# norm, clips, and updates? How many if the update multiplies by the factor
# itself, as the design note has it?
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# The norm reads 4 bytes, the clip reads and writes 8, the update moves 28: 40
# in all. With the factor inside the update 32 are left.
# :::

# %% exercise 2 tags=["hide-cell"]
answers = 40, 32

# %% exercise 2, checked
norm, clip = 4, 4 + 4
counted = norm + clip + least, norm + least
verdict("bytes", answers == counted, f"are {counted}")

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("2.3")
