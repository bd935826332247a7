# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       cuda.elementwise: "Kernels of layers that compute each number by itself."
#       cuda.gelu: "GELU on a GPU, forward and backward."
#       cuda.residual: "The residual sum on a GPU, forward and backward."
# ---

# %% [markdown]
# # Elementwise: one number a thread, or four
#
# > Layers that compute each number by itself need one kernel between them: it
# > moves four neighbours at once, and calls a function that says what to compute.
#
# *Reading time: 16 minutes. You need: [chapter 3.2](02_sectors.ipynb), GELU
# ([chapter 2.2](../2_cpu/02_rows.ipynb)) and the residual sum
# ([chapter 1.10](../1_by_hand/10_residual.ipynb)).*

# %% [markdown]
# ## Where we are
#
# No two elements of GELU have anything to do with each other, so all of them may
# be under way at once. It moves 8 bytes for about 20 operations; by NVIDIA's data
# sheets an A100 with 1,555 GB/s does 19.5 TFLOP/s in float32, and an H100 with
# 3,350 GB/s does 67: 12 and 20 operations for each byte, where GELU wants 2.5. So
# memory is the bound, for it and all the more for a sum. At the end of this
# chapter you can
#
# - say what a thread that takes four elements spares a GPU, and what not;
# - write a kernel once for all layers of this kind;
# - say why a GPU's own instruction for tanh will not do.
#
# These kernels have been simulated and compiled, and not run on a GPU.

# %% [markdown]
# ## Setup

# %% setup
import matplotlib.pyplot as plt
import numpy as np

from llmnb import reference
from llmnb.book.moving import moving
from llmnb.book.owners import draw_owners, walk
from llmnb.book.verify import compare, verdict
from llmnb.gpu.launch import empty, simulated, to_device, to_host
from llmnb.gpu.simulator import watch

rng = np.random.default_rng(8)

# %% [markdown]
# ## One element a thread
#
# The plainest kernel: thread $i$ reads element $i$ and writes element $i$. The 32
# threads of a warp read 32 neighbours, 128 bytes, four sectors of which every
# byte is used. That is as few sectors as there can be.
#
# What is left to save? Not bytes. But each access of a warp is an instruction, a
# *request*, and here a request moves 128 bytes. With `load4` and `store4` a
# thread moves four neighbours, and a request 512 bytes. That leaves a quarter of
# the requests, of the threads, and of the index arithmetic.
#
# A size that is no multiple of 4 leaves up to three elements at the end. They get
# a thread each, in the same launch: with $n$ elements and
# $f = \lfloor n / 4 \rfloor$ fours, thread $i \ge f$ takes element
# $4f + (i - f) = 3f + i$.
#
# An access of 16 bytes must begin at a multiple of 16 bytes; all memory that a
# GPU hands out does, but a view may begin anywhere. For such a view we set
# $f = 0$: then thread $i$ takes element $i$, as in the plainest kernel. And a grid
# without blocks, an error to CUDA, is one that our `kernel` does not launch: for
# an empty array nothing happens.
#
# ## The kernel, once
#
# GELU, its gradient and the residual sum differ in one line. So the kernel is
# made around a function of one number or of two. `add` is the same for every
# thread, so no warp is split by it; where it is 0, `out` is not read. And since
# each thread reads before it writes, `out` may be one of the inputs.

# %% imports of the factory tags=["export"]
from llmnb.gpu.launch import aligned, device, kernel
from llmnb.gpu.simulator import cuda, load4, store4

BLOCK = 256  # threads of a block


# %% one result, or four tags=["exporti"]
@device
def _write(out, i, add, value):
    if add:
        value += out[i]
    out[i] = value


@device
def _write_fours(out, i, add, a, b, c, d):
    if add:
        e, f, g, h = load4(out, i)
        a, b, c, d = e + a, f + b, g + c, h + d
    store4(out, i, a, b, c, d)


# %% kernels around a function tags=["exporti"]
def _of_one(function):
    @kernel
    def one_or_four(out, inp, add, fours):
        i = cuda.grid(1)
        if i < fours:
            a, b, c, d = load4(inp, 4 * i)
            a, b, c, d = function(a), function(b), function(c), function(d)
            _write_fours(out, 4 * i, add, a, b, c, d)
        elif 3 * fours + i < out.size:
            i += 3 * fours
            _write(out, i, add, function(inp[i]))

    return one_or_four


def _of_two(function):
    @kernel
    def one_or_four(out, x, y, add, fours):
        i = cuda.grid(1)
        if i < fours:
            a, b, c, d = load4(x, 4 * i)
            e, f, g, h = load4(y, 4 * i)
            a, b = function(a, e), function(b, f)
            c, d = function(c, g), function(d, h)
            _write_fours(out, 4 * i, add, a, b, c, d)
        elif 3 * fours + i < out.size:
            i += 3 * fours
            _write(out, i, add, function(x[i], y[i]))

    return one_or_four


# %% who owns what, and the steps
@device
def plus(x, y):
    return x + y


fig, axes = plt.subplots(2, 1, figsize=(8, 1.9), dpi=100)
draw_owners(axes[0], [list(range(19))], "one element a thread")
fours = [i // 4 for i in range(16)] + [4, 5, 6]
draw_owners(axes[1], [fours], "four elements a thread")
fig.tight_layout()
plt.show()
x = np.arange(19, dtype=np.float32)
args = np.zeros_like(x), x, 100 + 0 * x, 0
walks = [
    walk("one a thread", _of_two(plus), 1, 19, (*args, 0)),
    walk("four a thread", _of_two(plus), 1, 7, (*args, 4)),
]
moving("threads", "a sum of 19 elements, step by step", walks=walks, wrap=10)

# %% [markdown]
# *Figure 3.5.1. The threads that own the 19 elements of a sum of two arrays. Each owns
# one, or four neighbours, which move in one access of 16 bytes; the three that are
# left over get a thread each. A thread makes two loads and a store either way, but
# 7 threads do it, not 19.*


# %% the factory tags=["export"]
def count_fours(*arrays):
    """How many vectors of four move flat arrays of one size.

    0 where one of them begins at no multiple of 16 bytes.
    """
    return arrays[0].size // 4 if aligned(*arrays) else 0


def elementwise(function, reads):
    """A function that computes `function` for all elements of device arrays.

    function: of `reads` float32 numbers, 1 or 2, marked with `device`.
    Returns run(out, *arrays, add=0): out and arrays are flat and of one
    size, out is overwritten, or added to where add is 1. Its kernel is
    run.kernel(out, *arrays, add, fours).
    """
    made = (_of_one if reads == 1 else _of_two)(function)

    def run(out, *arrays, add=0):
        fours = count_fours(out, *arrays)
        grid = -(-(out.size - 3 * fours) // BLOCK)
        made[grid, BLOCK](out, *arrays, add, fours)

    run.kernel = made
    return run


# %% [markdown]
# ## GELU
#
# The two functions are (2.2.3), with sig by (2.2.4) and its slope by (2.2.5).
# Every constant is a float32: after one bare `1.0` the rest of the line would be
# computed in float64.

# %% imports of GELU tags=["export"] module="cuda.gelu"
import math

import numpy as np

from llmnb.cuda.elementwise import elementwise
from llmnb.gpu.launch import DEVICE, device
from llmnb.shapes import shapes

# %% the constants of the GPU's kernels tags=["exporti"] module="cuda.gelu"
SLOPE32 = np.float32(2 * math.sqrt(2 / math.pi))
CUBIC32 = np.float32(0.044715)
ONE, ZERO, THREE = np.float32(1), np.float32(0), np.float32(3)


# %% GELU of one number tags=["exporti"] module="cuda.gelu"
@device
def gelu_of(x):
    q = math.exp(-abs(SLOPE32 * x * (ONE + CUBIC32 * x * x)))
    return x * (ONE if x > ZERO else q) / (ONE + q)


@device
def gelu_back(dout, x):
    q = math.exp(-abs(SLOPE32 * x * (ONE + CUBIC32 * x * x)))
    r = ONE / (ONE + q)
    dv = SLOPE32 * (ONE + THREE * CUBIC32 * x * x)
    return dout * ((ONE if x > ZERO else q) * r + x * dv * q * r * r)


# %% [markdown]
# On the CPU the exponential needed a polynomial of our own. Here
# `math.exp` will do. A GPU has an instruction for $2^x$, `ex2.approx`. The
# compiler multiplies by $\log_2 e$ and moves the integer part of the product
# straight into the exponent of the result: about a dozen instructions, and
# no branch. The `if` in the line after becomes a selection, as it does on
# the CPU.
#
# A GPU also has an instruction for tanh, and with `fastmath`, which
# `kernel` turns on, `math.tanh` becomes this one instruction. Then why not
# keep (1.9.2)? Because it is rough. NVIDIA's manual of PTX states a relative
# error of up to $2^{-11}$, where a rounding of float32 makes $2^{-24}$. Where
# $\tanh \xi$ is close to $-1$, nothing but that error would be left of
# $1 + \tanh \xi$, and the small outputs of negative inputs would be noise.


# %% the layer tags=["export"] module="cuda.gelu"
_forward = elementwise(gelu_of, reads=1)
_backward = elementwise(gelu_back, reads=2)


@shapes("...!, ...~", DEVICE)
def gelu_forward(out, inp):
    """Write GELU of every element of inp to out, by the tanh form.

    out, inp: a device's arrays of one shape, any, float32; out is
    overwritten, and may be inp. Raises TypeError or ValueError before it
    launches anything.
    """
    _forward(out.reshape(-1), inp.reshape(-1))


@shapes("...!, ...~, ...", DEVICE)
def gelu_backward(dinp, dout, inp, add=True):
    """Add GELU's gradient to dinp, or overwrite dinp with it.

    dinp, dout, inp: a device's arrays of one shape, any, float32; dinp is
    added to in place. With add=False it is overwritten, and it may be dout
    itself. Raises TypeError or ValueError before it launches anything.
    """
    flat = [x.reshape(-1) for x in (dinp, dout, inp)]
    _backward(*flat, add=int(add))


# %% [markdown]
# The verdicts, on a shape that leaves three elements over. They run on a GPU
# where there is one, and else on the simulator:

# %% the same results on the device
odd, g = rng.normal(scale=2, size=(2, 3, 7, 23)).astype(np.float32)
want, slope = np.empty_like(odd), np.zeros_like(odd)
reference.gelu_forward(want, odd)
reference.gelu_backward(slope, g, odd)
there = to_device(odd)
out, dinp = empty(odd.shape, like=there), to_device(g)
gelu_forward(out, there)
gelu_backward(dinp, dinp, there, add=False)
gelu_backward(dinp, to_device(g), there)  # and once more, added
compare("out", to_host(out), want, tol=2e-6)
compare("dinp", to_host(dinp), 2 * slope, tol=2e-6)

# %% [markdown]
# ## The residual sum
#
# Forward it is a sum of two numbers, and so it is backward: each gradient gets
# `dout` added, where it lies.

# %% the sum tags=["export"] module="cuda.residual"
from llmnb.cuda.elementwise import elementwise
from llmnb.gpu.launch import DEVICE, device
from llmnb.shapes import shapes


@device
def _sum(a, b):
    return a + b


_add = elementwise(_sum, reads=2)


@shapes("...!, ...~, ...~", DEVICE)
def residual_forward(out, inp1, inp2):
    """Add two arrays.

    out, inp1, inp2: a device's arrays, float32, all of one shape; out is
    overwritten, and may be inp1 or inp2. Raises TypeError or ValueError
    before it launches anything.
    """
    _add(out.reshape(-1), inp1.reshape(-1), inp2.reshape(-1))


@shapes("...!, ...!, ...", DEVICE)
def residual_backward(dinp1, dinp2, dout):
    """Add the gradient of the sum to the gradients of both its terms.

    dinp1, dinp2, dout: a device's arrays, float32, all of one shape, three
    distinct ones; dinp1 and dinp2 are added to. Raises TypeError or
    ValueError before it launches anything.
    """
    for dinp in (dinp1.reshape(-1), dinp2.reshape(-1)):
        _add(dinp, dinp, dout.reshape(-1))


# %% equal to NumPy's, bit for bit
a, b, d = rng.normal(size=(3, 3, 37, 51)).astype(np.float32)
exact = np.empty_like(a), a.copy(), b.copy()
reference.residual_forward(exact[0], a, b)
reference.residual_backward(*exact[1:], d)
there = [to_device(x) for x in (a, b, d)]
total = empty(a.shape, like=there[0])
residual_forward(total, *there[:2])
residual_backward(*there)
equal = np.array_equal([to_host(x) for x in (total, *there[:2])], exact)
verdict("the sum", equal, "all three equal to NumPy's")

# %% [markdown]
# GPT-2 calls neither: the product that comes before folds the addition into its
# own last step (`residual=` in [chapter 3.6](06_matmul.ipynb)), where the other
# term is in registers already. Gemma 2 calls the first, since it has a norm
# between the product and the sum ([chapter 5.5](../5_modern/05_architectures.ipynb)).
#
# ## What the simulator counts
#
# For 1,027 elements, with a thread each, and moved by fours:

# %% requests and sectors
inp, out, dout = (simulated(np.ones(1027, np.float32)) for _ in range(3))
runs = {
    "forward": (_forward, (out, inp, 0)),
    "backward": (_backward, (out, dout, inp, 1)),
    "overwriting": (_backward, (out, dout, inp, 0)),
}
print(f"{'':13}threads  requests  sectors  bytes an element")
for name, (layer, arguments) in runs.items():
    for each, fours in ((1, 0), (4, 256)):
        with watch() as seen:
            layer.kernel[5, 256](*arguments, fours)
        moved = (seen.read_bytes + seen.written_bytes) // inp.size
        print(
            f"{name:11} {each} {seen.threads:7} {seen.requests:9} "
            f"{seen.sectors:8} {moved:17}"
        )

# %% [markdown]
# Four at once makes about a quarter of the requests. The sectors are the same,
# because every sector was used in full from the start. What that buys, only a GPU
# can say.
#
# ## A race
#
# Why may `out` be an input, and not a view of an input that begins elsewhere?
# Because then one thread writes what another has yet to read. `watch` sees it,
# whatever the order in which the simulator happens to run the threads:

# %% written by one thread, read by another
from llmnb.gpu.simulator import RaceError

shifted = simulated(np.ones(65, np.float32))
try:
    with watch():
        _forward.kernel[1, 64](shifted[:64], shifted[1:], 0, 0)
    caught = False
except RaceError:
    caught = True
verdict("a shifted view", caught, "is a race")
try:
    gelu_forward(shifted[:64], shifted[1:])
    verdict("a shifted view", False, "is refused")
except ValueError as error:
    print(error)
gelu_forward(shifted[1:], shifted[1:])  # by itself it goes, one at a time
gelu_forward(shifted[:0], shifted[:0])  # and nothing is launched for nothing

# %% [markdown]
# The repair is not to ask for it: `shapes` refuses arrays that share memory and
# do not begin at the same place.
#
# ## Take away
#
# - A layer that computes each number by itself moves the same bytes however its
#   kernel is written; four neighbours a thread make a quarter of the requests.
# - One kernel, made around a function, serves all such layers.
# - Each thread reads before it writes, so a layer may work in place.
#
# ## Exercises
#
# **1** (★★). A kernel lets thread $i$ take elements $4i$ to $4i + 3$, but with
# four plain accesses each way. For 1024 elements, how many requests and how
# many sectors does the simulator count, against one element a thread?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# As many requests: a quarter of the warps, each of which asks four times
# as often. Four times as many sectors: the lanes of a warp are 16 bytes
# apart, so one request spreads over 512 bytes and touches 16 sectors where
# it uses 128 bytes. The next three requests touch the same 16 again. A
# cache may save them; `load4` does not depend on that.
# :::


# %% exercise 1, the kernel tags=["hide-cell"]
@kernel
def four_by_one(out, inp):
    first = 4 * cuda.grid(1)
    if first < inp.size:
        for i in range(first, first + 4):
            out[i] = gelu_of(inp[i])


# %% exercise 1, checked
x = simulated(np.ones(1024, np.float32))
with watch() as one:
    _forward.kernel[4, 256](x, x, 0, 0)
with watch() as scattered:
    four_by_one[1, 256](x, x)
verdict("requests", scattered.requests == one.requests, "are as many")
verdict("sectors", scattered.sectors == 4 * one.sectors, "are four times")

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("3.5")
