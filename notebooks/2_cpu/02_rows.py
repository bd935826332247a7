# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       cpu.layernorm: "LayerNorm, compiled for the processor's cores."
#       cpu.math: "The exponential in vector instructions."
#       cpu.gelu: "GELU, compiled for the processor's cores."
#       cpu.residual: "The residual sum, compiled for the processor's cores."
# ---

# %% [markdown]
# # Rows: LayerNorm, GELU and the residual sum on a CPU
#
# > Three layers whose speed is that of memory: what NumPy sweeps over eight
# > times, a compiled loop reads once, and a formula is rewritten until it needs
# > no call into a library.
#
# *Reading time: 30 minutes. You need: [chapter 2.1](01_compile.ipynb), and the
# layers of chapters [1.6](../1_by_hand/06_layernorm.ipynb),
# [1.9](../1_by_hand/09_gelu.ipynb) and [1.10](../1_by_hand/10_residual.ipynb).*

# %% [markdown]
# ## Where we are
#
# At the end of this chapter you can
#
# - predict the time of a layer from the bytes that it moves;
# - write a layer as a loop that reads each row from memory once;
# - write an exponential that vectorises;
# - rewrite a formula so that it keeps its digits in float32, and so that a
#   compiler can turn it into vector instructions;
# - say why a sum over rows has a fixed number of parts.

# %% [markdown]
# ## Setup

# %% setup
from types import SimpleNamespace

import numba
import numpy as np

from llmnb.book.verify import compare, verdict
from llmnb.reference.gelu import CUBIC, ROOT
from llmnb.reference.gelu import gelu_backward as gelu_backward_numpy
from llmnb.reference.gelu import gelu_forward as gelu_forward_numpy
from llmnb.reference.layernorm import layernorm_backward as backward_numpy
from llmnb.reference.layernorm import layernorm_forward as forward_numpy
from llmnb.reference.residual import residual_backward as sum_backward_numpy
from llmnb.reference.residual import residual_forward as sum_forward_numpy
from llmnb.timing import fastest, machine

rng = np.random.default_rng(5)
reference = SimpleNamespace(forward=forward_numpy, backward=backward_numpy)

# %% [markdown]
# ## LayerNorm
#
# NumPy runs (1.6.1) to (1.6.3) as eight separate operations on whole arrays, the
# copy into `out` among them. Most of them write a whole temporary, which the
# next one reads again. For B·T = 1024 rows of 768 channels an array takes
# 3 MB, more than a core keeps in its nearest caches, so much of the work is
# moving data. A compiled loop does all the work on one row while the row,
# 3 KB, sits in the first-level cache.

# %% imports of the CPU module tags=["export"] module="cpu.layernorm"
import math

import numpy as np

from llmnb.backend import noted
from llmnb.cpu.jit import arguments, share, team
from llmnb.reference.layernorm import EPS
from llmnb.shapes import shapes

# %% [markdown]
# One row is one unit of work. Rows are independent, so the threads share them
# out; inside a row the loops are plain, and LLVM turns them into vector
# instructions. The variance is summed from $x_i - \mu$ in
# a second sweep over the row: the one-sweep formula
# $\overline{x^2} - \mu^2$ subtracts two large numbers and loses digits, and
# the second sweep costs little because the row is in cache.


# %% the forward kernel tags=["exporti"] module="cpu.layernorm"
@team
def _layernorm_forward(part, parts, address):
    out, mean, rstd, inp, weight, bias = arguments(address)
    (rows, C), number = inp.shape, inp.dtype.type
    zero, one, size, eps = number(0), number(1), number(C), number(EPS)
    mine = share(rows, part, parts)
    for n in range(mine.start, mine.stop):
        total = squares = zero
        for i in range(C):
            total += inp[n, i]
        mu = total / size
        for i in range(C):
            squares += (inp[n, i] - mu) * (inp[n, i] - mu)
        r = one / math.sqrt(squares / size + eps)
        for i in range(C):
            out[n, i] = (inp[n, i] - mu) * r * weight[i] + bias[i]
        mean[n] = mu
        rstd[n] = r


# %% [markdown]
# Every constant takes the array's own dtype, the zeros too. A bare `1e-5`
# is a float64, and numba makes float64 of a float32 divided by an integer
# as well; either would pull the whole row into float64, of which a vector
# register holds half as many, and with other rounding.
#
# We write `inp[n, i]` and take no view `x = inp[n]` of the row. A view
# would be shorter to read and longer to compile: numba makes an array of
# it, with code that counts its owners.
#
# The public function has the line of the reference above it, and views the
# (B, T, C) arrays as rows.


# %% layernorm, forward tags=["export"] module="cpu.layernorm"
@shapes("B T C!, B T!, B T!, B T C, C, C")
def layernorm_forward(out, mean, rstd, inp, weight, bias):
    """Normalise each row of inp, then scale and shift each channel.

    out, inp: (B, T, C). mean, rstd: (B, T), the mean and the reciprocal
    deviation of each row, saved for the backward pass. weight, bias: (C,).
    All float32 or all float64 and C-contiguous; out, mean and rstd are
    overwritten. Raises TypeError or ValueError before it computes anything.
    """
    C = inp.shape[-1]
    y, x = (a.reshape(-1, C) for a in (out, inp))
    _layernorm_forward(y, mean.reshape(-1), rstd.reshape(-1), x, weight, bias)


# %% [markdown]
# The backward pass has two shapes of work. $dx$ is again one row at a time.
# $dw$ and $db$ sum over rows, and if each thread added into the same
# $dw_i$, additions would be lost, and their order, with it the last bits,
# would change from run to run. We could turn the work around and give each
# thread a block of channels to sum down all rows. But that reads both
# arrays a second time, and in short pieces, which memory serves slowly.
#
# Instead we cut the rows into parts. A part has its own row of sums, which
# stays in the first-level cache while $dx$, $dw$ and $db$ are computed from
# a row in passing; in the end the sums of all parts are added. How many
# parts there are follows from the number of rows, never from the number of
# threads: 16 rows in each, 64 parts at most. So every sum is taken in one
# fixed order, whatever the number of threads.


# %% the backward kernel tags=["exporti"] module="cpu.layernorm"
@team
def _layernorm_backward(part, parts, address):
    dinp, dw, db, dout, inp, weight, mean, rstd = arguments(address)
    (rows, C), number = inp.shape, inp.dtype.type
    mine, zero, size = share(len(dw), part, parts), number(0), number(C)
    for k in range(mine.start, mine.stop):
        some = share(rows, k, len(dw))
        dw[k], db[k] = 0, 0
        for n in range(some.start, some.stop):
            mu, r = mean[n], rstd[n]
            a = b = zero
            for i in range(C):
                dnorm = dout[n, i] * weight[i]
                a += dnorm
                b += dnorm * (inp[n, i] - mu) * r
            a /= size
            b /= size
            for i in range(C):
                norm = (inp[n, i] - mu) * r
                dinp[n, i] += r * (dout[n, i] * weight[i] - a - norm * b)
            for i in range(C):
                dw[k, i] += dout[n, i] * (inp[n, i] - mu) * r
                db[k, i] += dout[n, i]


# %% [markdown]
# The sums of the parts are the one thing that this layer allocates: up to
# $64 \cdot 2\,C$ numbers. Adding them to the gradients is a line of NumPy. It
# is `noted`, which calls it, and lets a model that does the same step again
# repeat it without asking anew what is to be done
# ([chapter A.13](../appendix/13_backend.ipynb)).


# %% add the sums tags=["exporti"] module="cpu.layernorm"
def add_rows(total, rows):
    """Add the sum of all rows to a vector, in place."""
    total += rows.sum(axis=0)


# %% layernorm, backward tags=["export"] module="cpu.layernorm"
@shapes("B T C!, C!, C!, B T C, B T C, C, B T, B T")
def layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd):
    """Add LayerNorm's gradients to dinp, dweight and dbias.

    dinp, dout, inp: (B, T, C). dweight, dbias, weight: (C,). mean, rstd:
    (B, T), as the forward pass left them. All float32 or all float64 and
    C-contiguous; the first three are added to in place. Raises TypeError or
    ValueError before it computes anything.
    """
    C = inp.shape[-1]
    dx, dy, x = (a.reshape(-1, C) for a in (dinp, dout, inp))
    sums = np.empty((2, min(64, -(-len(x) // 16)), C), inp.dtype)
    stats = mean.reshape(-1), rstd.reshape(-1)
    _layernorm_backward(dx, *sums, dy, x, weight, *stats)
    noted(add_rows, dweight, sums[0])
    noted(add_rows, dbias, sums[1])


# %% [markdown]
# The verdict, in float32, on sizes that divide nothing:


# %% a problem of any size and dtype
def problem(B, T, C, dtype=np.float32):
    p = SimpleNamespace()
    p.inp, p.dout = rng.normal(size=(2, B, T, C)).astype(dtype)
    p.weight, p.bias = rng.normal(size=(2, C)).astype(dtype)
    p.out, p.dinp = np.ones((2, B, T, C), dtype)
    p.dweight, p.dbias = np.ones((2, C), dtype)
    p.mean, p.rstd = np.zeros((2, B, T), dtype)
    return p


def forward_and_backward(p, layer):
    layer.forward(p.out, p.mean, p.rstd, p.inp, p.weight, p.bias)
    layer.backward(
        p.dinp, p.dweight, p.dbias, p.dout, p.inp, p.weight, p.mean, p.rstd
    )


# %% float32, odd sizes
cpu = SimpleNamespace(forward=layernorm_forward, backward=layernorm_backward)
p = problem(3, 37, 331)
forward_and_backward(p, cpu)
got = {k: getattr(p, k).copy() for k in ("out", "dinp", "dweight", "dbias")}
for name in got:
    getattr(p, name)[...] = 1
forward_and_backward(p, reference)
for name in got:
    compare(name, got[name], getattr(p, name), tol=1e-5)

# %% [markdown]
# The sums have a fixed order, so one thread must find the same bits as all of
# them:

# %% one thread and all threads
for name in got:
    getattr(p, name)[...] = 1
threads = numba.get_num_threads()
numba.set_num_threads(1)
forward_and_backward(p, cpu)
numba.set_num_threads(threads)
same = all(np.array_equal(got[name], getattr(p, name)) for name in got)
verdict("one thread", same, "the same bits")

# %% [markdown]
# Now the time. Both versions do the same work on the same arrays, in turn;
# we take the fastest of several runs, because other programs can only slow
# a run down.

# %% NumPy against the kernels tags=["nbval-ignore-output"]
p = problem(4, 256, 768)
slow, fast = (
    fastest(forward_and_backward, p, reference),
    fastest(forward_and_backward, p, cpu),
)
print(f"{machine()}, {numba.get_num_threads()} threads")
print(f"NumPy  {slow * 1e3:7.2f} ms")
print(f"numba  {fast * 1e3:7.2f} ms, {slow / fast:.1f} times as fast")

# %% predicted traffic and intensity
elements = 4 * 256 * 768
flops = (8 + 6 + 11) * elements
moved = (2 + 4) * elements * 4
print(f"{flops / 1e6:.1f} MFLOP, {moved / 1e6:.1f} MB moved")
print(f"{flops / moved:.2f} FLOP a byte")

# %% [markdown]
# About one operation a byte: memory decides, not arithmetic. We divide by the
# speed of a copy again, to predict the time:

# %% predicted against measured time tags=["nbval-ignore-output"]
a, b = np.ones((2, 1 << 25), np.float32)
bandwidth = 2 * a.nbytes / fastest(np.copyto, a, b, runs=5)
print(f"copy: {bandwidth / 1e9:.1f} GB/s")
print(f"predicted {moved / bandwidth * 1e3:.2f} ms, measured {fast * 1e3:.2f}")

# %% [markdown]
# Where the measured time is below the prediction, the arrays of 3 MB have
# stayed in the last-level cache between one kernel and the next; the copy
# went to main memory. Where it is above, it holds the start of the threads,
# twice, and on a machine whose cores are busy with other programs the
# wait for the slowest.
#
# ## An exponential that vectorises
#
# `math.exp` in a compiled loop is a call of a library function, one number
# at a time. Eight numbers at a time need a formula made of operations that
# vector units have. Split the exponent at the powers of two:
#
# $$ \begin{aligned}
#    x &= n \log 2 + r , \\
#    n &= \lfloor x / \log 2 + \tfrac12 \rfloor , \\
#    e^x &= 2^n e^r , \qquad |r| \le \tfrac12 \log 2 .
#    \end{aligned} \tag{2.2.1} $$
#
# On this short interval the series
# $1 + r + r^2/2! + \dots + r^7/7!$ is off by about
# $|r|^8 / 8! < 6 \cdot 10^{-9}$, well below the $6 \cdot 10^{-8}$ to which
# float32 rounds. And $2^n$ costs nothing to compute: a float32 *is* a power
# of two times a fraction, with $n + 127$ stored in the bits from the 23rd
# upwards. The integer $(n + 127) \cdot 2^{23}$, read as a float32, is $2^n$.
#
# One trap is left. $n \log 2$ is rounded when we subtract it from $x$, and
# $r$ inherits an error that grows with $n$. So $\log 2$ is split in two: a
# high part of few bits, whose product with any $n$ in question is exact, and
# a small low part. This works only if the compiler keeps the order of
# operations. Our kernels allow it to reorder (`fastmath`), and then it
# merges the two parts again, which undoes the repair. So this one function
# is compiled with leave to contract a product and a sum into one
# instruction, and with no other; the test of its error below fails when it
# is not. numba's `overload`, which says what the compiler is to put in the
# place of a call, has the option, and it picks by the type of the argument:
# a float64 goes to `math.exp`, slower, and exact enough for proofs.

# %% imports of the fast exponential tags=["export"] module="cpu.math"
import math

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic, overload

from llmnb.cpu.jit import inner

# %% the constants tags=["exporti"] module="cpu.math"
LIMIT = np.float32(88)
LOG2_E = np.float32(math.log2(math.e))
LOG_2_HIGH = np.float32(0.693359375)  # 355 / 512: nine bits
LOG_2_LOW = np.float32(math.log(2) - 0.693359375)
HALF, ONE, BIAS = np.float32(0.5), np.float32(1), np.float32(127)
SHIFT = np.float32(2**23)
E2, E3, E4, E5, E6, E7 = (
    np.float32(1 / math.factorial(n)) for n in range(2, 8)
)


# %% e to the x in float32 tags=["exporti"] module="cpu.math"
def _exp_float32(x):
    x = min(max(x, -LIMIT), LIMIT)
    n = np.floor(x * LOG2_E + HALF)
    r = (x - n * LOG_2_HIGH) - n * LOG_2_LOW
    p = E3 + r * (E4 + r * (E5 + r * (E6 + r * E7)))
    p = ONE + r * (ONE + r * (E2 + r * p))
    return p * np.int32((n + BIAS) * SHIFT).view(np.float32)


def _by_type(float32, other):
    """For compiled code: one function for float32, another for the rest."""

    def stub(x):
        raise NotImplementedError("for compiled code")

    @overload(stub, jit_options={"fastmath": {"contract"}})
    def choose(x):
        return float32 if x == numba.float32 else other

    return stub


_exp = _by_type(_exp_float32, lambda x: math.exp(x))


# %% the fast exponential tags=["export"] module="cpu.math"
@inner
def fast_exp(x):
    """exp(x) for compiled kernels, in a form that LLVM vectorises.

    A float32 gives a float32 with a relative error below 1.5e-7 for x from
    -87 to 88. Below -88 it gives 0 and above 88 exp(88), so never an
    infinity. Any other number goes to math.exp in float64.
    """
    return _exp(x)


# %% [markdown]
# A tanh follows: with $q = e^{-2|x|}$, that of $|x|$ is $(1 - q) / (1 + q)$.
# [Chapter 5.4](../5_modern/04_attention.ipynb) keeps scores small by it.


# %% tanh from it tags=["export"] module="cpu.math"
T_NEAR = np.float32(0.3)
T3, T5, T7, T9 = map(np.float32, (-1 / 3, 2 / 15, -17 / 315, 62 / 2835))


def _tanh_float32(x):
    # near 0, where 1 - q would lose digits, the first terms of the series
    q, y = fast_exp(-abs(x + x)), x * x
    far = (ONE - q) / (ONE + q)
    near = x + x * y * (T3 + y * (T5 + y * (T7 + y * T9)))
    return near if abs(x) < T_NEAR else (far if x > 0 else -far)


_tanh = _by_type(_tanh_float32, lambda x: math.tanh(x))


@inner
def fast_tanh(x):
    """tanh(x) for compiled kernels, as fast_exp is exp(x).

    A float32 gives a float32 with a relative error below 3e-7; any other
    number goes to math.tanh.
    """
    return _tanh(x)


# %% [markdown]
# We measure the error of the exponential against float64 on two million
# numbers, the ends included.


# %% the error of the fast exponential
def fill(y, x):
    for i in range(x.size):
        y[i] = fast_exp(x[i])


fill = inner(fill)
grid = np.linspace(-87, 88, 2_000_001).astype(np.float32)
got, exact = np.empty_like(grid), np.exp(grid.astype(np.float64))
fill(got, grid)
error = np.abs(got / exact - 1).max()
verdict("fast_exp", error < 1.5e-7, "relative error < 1.5e-07")
ends = np.empty(3, np.float32)
fill(ends, np.array([-1000, 0, 1000], np.float32))
verdict("ends", ends[0] == 0 and ends[1] == 1, "exp(-1000) = 0, exp(0) = 1")
verdict("overflow", bool(np.isfinite(ends[2])), "none at 1000")


# %% against the library's tags=["nbval-ignore-output"]
def fill_by_library(y, x):
    for i in range(x.size):
        y[i] = math.exp(x[i])


fill_by_library = inner(fill_by_library)
fill_by_library(got, grid)
print(f"{machine()}, one thread")
for name, function in (("math.exp", fill_by_library), ("fast_exp", fill)):
    seconds = fastest(function, got[:4096], grid[:4096], runs=200)
    print(f"{name} {seconds / 4096 * 1e9:5.2f} ns a number")

# %% [markdown]
# ## The largest of a row
#
# A softmax begins with the largest number of its row, and Python's `max` in a
# loop is slow: numba makes of it a comparison and a choice, and LLVM takes
# these one number after the other. To take the maximum of 16 columns of numbers
# first and the largest of those 16 at the end, it must know that the order is
# of no matter, and a choice might tell 0 from -0. LLVM has a word of its own
# for the larger of two numbers, which may be reordered. An *intrinsic* puts it
# in the place of a call ([chapter A.2](../appendix/02_tile.ipynb) uses more of
# them). No rounding is involved, so no bit depends on the order.


# %% the larger of two tags=["exporti"] module="cpu.math"
@intrinsic
def larger(typing, x, y):
    """max(x, y) for compiled kernels, in a form that LLVM vectorises."""

    def codegen(context, builder, signature, args):
        number = args[0].type
        kind = ir.FunctionType(number, [number] * 2)
        names = "llvm.maxnum", [number], kind
        return builder.call(builder.module.declare_intrinsic(*names), args)

    return x(x, x), codegen


# %% both over a row of GPT-2's vocabulary tags=["nbval-ignore-output"]
def top_by(pick):
    @inner
    def top(x):
        largest = x[0]
        for i in range(x.size):
            largest = pick(largest, x[i])
        return largest

    return top


row = np.random.default_rng(6).normal(size=50257).astype(np.float32)
for pick in (max, larger):
    seconds = fastest(top_by(pick), row, runs=200)
    print(f"{pick.__name__:6} {seconds / row.size * 1e9:5.3f} ns a number")

# %% the same number
verdict("the largest", top_by(larger)(row) == row.max(), "is NumPy's")

# %% [markdown]
# ## GELU
#
# A product and a sum take a fraction of a nanosecond; a tanh is a call into
# the mathematical library, one number at a time, with branches inside. A
# compiler cannot turn such a call into vector instructions. So we look for
# a form of (1.9.2) without it.
#
# From $\tanh \xi = (e^\xi - e^{-\xi}) / (e^\xi + e^{-\xi})$ follows
#
# $$ \begin{aligned}
#    \frac12 (1 + \tanh \xi) &= \frac{e^\xi}{e^\xi + e^{-\xi}} \\
#      &= \frac{1}{1 + e^{-2\xi}} = \operatorname{sig}(2\xi) .
#    \end{aligned} \tag{2.2.2} $$
#
# sig is the logistic sigmoid, and its derivative is
# $\operatorname{sig} (1 - \operatorname{sig})$. By (1.9.2) the slope of $2\xi$
# is $2 \xi' = 2 \sqrt{2/\pi}\,(1 + 3 \gamma x^2)$. So with every sig at $2\xi$,
#
# $$ y = x \operatorname{sig} , \qquad
#    \frac{dy}{dx} = \operatorname{sig}
#    + x \operatorname{sig} (1 - \operatorname{sig})\, 2 \xi' . \tag{2.2.3} $$
#
# One exponential each, and `fast_exp` vectorises.
#
# Two dangers are left. For $x = -20$ we have $2\xi = -603$, and $e^{603}$
# exceeds float32. And for large $x$, sig rounds to 1, so $1 - \operatorname{sig}$
# has no digit left, while $2 x\,\xi'$, by which it is multiplied, grows with
# $x^3$. Both go away when the exponential sees no positive number. For $x > 0$
# it sees none in (2.2.2); for $x \le 0$ we multiply (2.2.2) above and below by
# $e^{2\xi}$:
#
# $$ \operatorname{sig}(2\xi) = \begin{cases}
#    \dfrac{1}{1 + e^{-2|\xi|}} & \text{for } x > 0 , \\
#    \dfrac{e^{-2|\xi|}}{1 + e^{-2|\xi|}} & \text{for } x \le 0 .
#    \end{cases} \tag{2.2.4} $$
#
# The two fractions sum to 1: where one is sig, the other is
# $1 - \operatorname{sig}$. So in both cases
#
# $$ \operatorname{sig} (1 - \operatorname{sig})
#    = \frac{e^{-2|\xi|}}{(1 + e^{-2|\xi|})^2} . \tag{2.2.5} $$
#
# The code calls $e^{-2|\xi|}$ `q`; it is above 0 and at most 1.
# No subtraction is left, and nothing can overflow. Compare the two forms of
# (2.2.5) in float32 with its value in float64:

# %% digits lost and kept
x32 = np.linspace(2, 6, 401, dtype=np.float32)
x64 = x32.astype(np.float64)


def slopes(x):
    q = np.exp(-2 * x.dtype.type(ROOT) * (x + x.dtype.type(CUBIC) * x**3))
    s = 1 / (1 + q)
    return s * (1 - s), q / (1 + q) ** 2


exact = slopes(x64)[1]
subtracted, kept = (np.abs(f / exact - 1).max() for f in slopes(x32))
verdict("sig(1 - sig)", subtracted > 0.5, "loses every digit")
verdict("q / (1 + q)^2", kept < 1e-4, "keeps four or more")

# %% GELU in NumPy
reference = SimpleNamespace(
    forward=gelu_forward_numpy, backward=gelu_backward_numpy
)

# %% imports of the CPU module tags=["export"] module="cpu.gelu"
import numpy as np

from llmnb.backend import noted
from llmnb.cpu.jit import arguments, inlined, share, team
from llmnb.cpu.math import fast_exp
from llmnb.reference.gelu import CUBIC, ROOT
from llmnb.shapes import shapes

# %% the slope of twice xi tags=["exporti"] module="cpu.gelu"
SLOPE = 2 * ROOT

# %% [markdown]
# The kernels take the array as one row of numbers, and each thread does its
# share of it. Every constant has the array's own dtype. In float64, `fast_exp` is
# the library's exponential, with all its digits.


# %% the forward kernel tags=["exporti"] module="cpu.gelu"
@team
def _gelu_forward(part, parts, address):
    out, inp = arguments(address)
    number, mine = inp.dtype.type, share(inp.size, part, parts)
    slope, cubic, one = number(SLOPE), number(CUBIC), number(1)
    out, inp = out[mine], inp[mine]
    for i in range(inp.size):
        x = inp[i]
        q = fast_exp(-abs(slope * x * (one + cubic * x * x)))
        out[i] = x * (one if x > 0 else q) / (one + q)


# %% [markdown]
# The choice `one if x > 0 else q` is no branch: LLVM computes both and
# selects. Backward has two loops. In the model, `dinp` holds nothing
# yet when GELU's gradient arrives, and to set it to zero first, only to add
# to it, would be one more trip through memory. What is more, the model wants
# the gradient in the place of the one that came in. So one loop adds, and
# one multiplies in place. The slope is (2.2.3) in both.


# %% the slope tags=["exporti"] module="cpu.gelu"
@inlined
def _slope(x, slope, cubic, one):
    q = fast_exp(-abs(slope * x * (one + cubic * x * x)))
    r = one / (one + q)
    dv = slope * (one + (cubic + cubic + cubic) * x * x)
    return (one if x > 0 else q) * r + x * dv * q * r * r


# %% the backward kernel tags=["exporti"] module="cpu.gelu"
@team
def _gelu_backward(part, parts, address):
    dinp, dout, inp, add = arguments(address)
    number, mine = inp.dtype.type, share(inp.size, part, parts)
    slope, cubic, one = number(SLOPE), number(CUBIC), number(1)
    dinp, dout, inp = dinp[mine], dout[mine], inp[mine]
    if add:
        for i in range(inp.size):
            dinp[i] += dout[i] * _slope(inp[i], slope, cubic, one)
    else:
        for i in range(inp.size):
            dinp[i] *= _slope(inp[i], slope, cubic, one)


# %% GELU, forward tags=["export"] module="cpu.gelu"
@shapes("...!, ...~")
def gelu_forward(out, inp):
    """Write GELU of every element of inp to out, by the tanh form.

    out, inp: arrays of one shape, any; both float32 or both float64 and
    C-contiguous; out is overwritten. Raises TypeError or ValueError before
    it computes anything.
    """
    _gelu_forward(out.reshape(-1), inp.reshape(-1))


# %% GELU, backward tags=["export"] module="cpu.gelu"
@shapes("...!, ...~, ...")
def gelu_backward(dinp, dout, inp, add=True):
    """Add GELU's gradient to dinp, or overwrite dinp with it.

    dinp, dout, inp: arrays of one shape, any; all float32 or all float64
    and C-contiguous; dinp is added to in place. With add=False it is
    overwritten, and it may be dout itself.
    Raises TypeError or ValueError before it computes anything.
    """
    if not add and dinp is not dout:
        noted(np.copyto, dinp, dout)
    flat = [x.reshape(-1) for x in (dinp, dout, inp)]
    _gelu_backward(*flat, bool(add))


# %% [markdown]
# The verdicts: in float64 on a small problem, and in float32 on a dense grid.

# %% the same results from the kernels
inp, g = rng.normal(scale=2, size=(2, 3, 5, 7))
out, dinp, got = np.zeros_like(inp), np.ones_like(inp), np.ones_like(inp)
reference.backward(dinp, g, inp)
cpu = SimpleNamespace(forward=gelu_forward, backward=gelu_backward)
cpu.backward(got, g, inp)
compare("dinp", got, dinp, tol=1e-12)
got[...] = np.nan
cpu.backward(got, g, inp, add=False)
compare("dinp, overwritten", got, dinp - 1, tol=1e-12)
got[...] = np.nan
cpu.forward(got, inp)
reference.forward(out, inp)
compare("out", got, out, tol=1e-12)


# %% both directions over a grid
def both(layer, x):
    y, dy = np.empty_like(x), np.zeros_like(x)
    layer.forward(y, x)
    layer.backward(dy, np.ones_like(x), x)
    return y, dy


grid = np.linspace(-40, 40, 1_600_001, dtype=np.float32)
y32, d32 = both(cpu, grid)
y64, d64 = both(reference, grid.astype(np.float64))

# %% the error in float32
scale = np.maximum(1, np.abs(y64))
verdict("out", (np.abs(y32 - y64) / scale).max() < 5e-7, "err < 5e-07")
verdict("dinp", np.abs(d32 - d64).max() < 1e-6, "err < 1e-06")
verdict("all of it", np.isfinite(y32).all(), "is finite")

# %% one thread and several, bit for bit
most = numba.get_num_threads()
numba.set_num_threads(1)
alone = both(cpu, grid)
numba.set_num_threads(most)
same = np.array_equal(alone[0], y32) and np.array_equal(alone[1], d32)
verdict("threads", same, "change no bit")

# %% [markdown]
# For the timing we add a step in between: the tanh form in a compiled loop,
# with the library's tanh.


# %% the tanh form, compiled
@team
def library_forward(part, parts, address):
    out, inp = arguments(address)
    number, mine = inp.dtype.type, share(inp.size, part, parts)
    root, cubic = number(ROOT), number(CUBIC)
    half, one = number(0.5), number(1)
    out, inp = out[mine], inp[mine]
    for i in range(inp.size):
        x = inp[i]
        t = math.tanh(root * (x + cubic * x * x * x))
        out[i] = half * x * (one + t)


# %% NumPy, a compiled tanh, the sigmoid tags=["nbval-ignore-output"]
x = rng.normal(size=(256, 3072)).astype(np.float32)
y, dx = np.empty_like(x), np.zeros_like(x)
flat = y.reshape(-1), x.reshape(-1)
library_forward(*flat)
compare("library tanh", flat[0], both(reference, flat[1])[0])
times = {
    "NumPy": fastest(reference.forward, y, x, runs=5),
    "tanh, compiled": fastest(library_forward, *flat),
    "sigmoid": fastest(cpu.forward, y, x),
    "NumPy, backward": fastest(reference.backward, dx, x, x, runs=5),
    "sigmoid, backward": fastest(cpu.backward, dx, x, x),
    "overwriting": fastest(lambda: cpu.backward(dx, x, x, add=False)),
}
print(f"{machine()}, {most} threads")
for name, seconds in times.items():
    print(f"{name:18} {seconds / x.size * 1e9:6.2f} ns an element")

# %% [markdown]
# ## The residual sum
#
# One addition an element leaves nothing to compute faster; what costs is
# moving the numbers. NumPy's forward is one sweep and already good. Its
# backward is two sweeps and reads `dout` twice; a compiled loop reads it
# once, and a team of threads brings in the other cores.

# %% the sum in NumPy
reference = SimpleNamespace(
    forward=sum_forward_numpy, backward=sum_backward_numpy
)

# %% imports of the CPU version tags=["export"] module="cpu.residual"
from llmnb.cpu.jit import arguments, share, team
from llmnb.shapes import shapes


# %% the kernels tags=["exporti"] module="cpu.residual"
@team
def _residual_forward(part, parts, address):
    out, inp1, inp2 = arguments(address)
    mine = share(out.size, part, parts)
    out, inp1, inp2 = out[mine], inp1[mine], inp2[mine]
    for i in range(out.size):
        out[i] = inp1[i] + inp2[i]


@team
def _residual_backward(part, parts, address):
    dinp1, dinp2, dout = arguments(address)
    mine = share(dout.size, part, parts)
    dinp1, dinp2, dout = dinp1[mine], dinp2[mine], dout[mine]
    for i in range(dout.size):
        dinp1[i] += dout[i]
        dinp2[i] += dout[i]


# %% [markdown]
# The kernels see flat arrays: `reshape(-1)` of a contiguous array is a view
# and copies nothing. That no two arrays of backward share memory is among
# what `shapes` checks: were `dout` the same array as `dinp1`, the first
# addition would double it before the second one reads it. The sum itself may
# take the place of a term, `~`: each number is read before it is written.


# %% residual, forward tags=["export"] module="cpu.residual"
@shapes("...!, ...~, ...~")
def residual_forward(out, inp1, inp2):
    """Add two arrays.

    out, inp1, inp2: float32 or float64, all of one shape; out is
    overwritten, and may be inp1 or inp2.

    Raises TypeError or ValueError where shapes or dtypes differ.
    """
    _residual_forward(out.reshape(-1), inp1.reshape(-1), inp2.reshape(-1))


# %% residual, backward tags=["export"] module="cpu.residual"
@shapes("...!, ...!, ...")
def residual_backward(dinp1, dinp2, dout):
    """Add the gradient of the sum to the gradients of both its terms.

    dinp1, dinp2, dout: float32 or float64, all of one shape, three distinct
    arrays; dinp1 and dinp2 are added to.

    Raises TypeError or ValueError where shapes or dtypes differ, ValueError
    where two of the arrays share memory.
    """
    _residual_backward(dinp1.reshape(-1), dinp2.reshape(-1), dout.reshape(-1))


# %% the same results from the kernels
cpu = SimpleNamespace(forward=residual_forward, backward=residual_backward)
a, b, d = rng.normal(size=(3, 3, 37, 51)).astype(np.float32)
got = np.empty_like(a), a.copy(), b.copy()
exact = np.empty_like(a), a.copy(), b.copy()
for layer, (s, da, db) in ((cpu, got), (reference, exact)):
    layer.forward(s, a, b)
    layer.backward(da, db, d)
for name, x1, x2 in zip(("out", "dinp1", "dinp2"), got, exact, strict=True):
    verdict(name, np.array_equal(x1, x2), "equal to NumPy's")

# %% what does not fit
for args in ((a, b[:2], d), (a, b.astype(np.float64), d), (a, d, d[:])):
    try:
        residual_backward(*args)
        verdict("bad input", False, "is refused")
    except (TypeError, ValueError) as error:
        print(error)

# %% NumPy against the kernels tags=["nbval-ignore-output"]
print(f"{machine()}, {most} threads")
big = rng.normal(size=(3, 4, 1024, 768)).astype(np.float32)
times = {}
for name in ("forward", "backward"):
    slow = fastest(getattr(reference, name), *big)
    times[name] = fast = fastest(getattr(cpu, name), *big)
    print(f"{name:<9} NumPy {slow * 1e3:6.2f} ms, numba {fast * 1e3:6.2f} ms")
    print(f"{'':<9} {slow / fast:.1f} times as fast")

# %% [markdown]
# ## Take away
#
# - These layers move bytes; count them, and you know about how long they take.
# - One row at a time in cache is what helps; what must be summed over rows is
#   summed in parts whose number does not depend on the threads.
# - $\frac12(1 + \tanh \xi) = \operatorname{sig}(2\xi)$ leaves one exponential, and an
#   exponential of negative numbers alone neither overflows nor loses digits.
#
# ## Design note
#
# We could have approximated tanh itself by a quotient of two polynomials.
# Near 0 that is as good, but for $x < -3$ the sum $1 + \tanh \xi$ takes the
# difference of two numbers close to 1: the relative error of a small output
# grows without limit. The sigmoid form keeps the output's digits on both
# sides, and it shares the exponential with softmax.
#
# ## Exercises
#
# **1** (★★). Leave $\log 2$ whole in (2.2.1). How large can the relative error of
# $e^x$ become near $x = 88$? Predict it from what is rounded, then measure.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# From 64 to 128 floats are $2^{-17}$ apart: $n \log 2$ is off by up to $2^{-18}$, four
# millionths, and so is $r$, whose error is the relative error of $e^r$.
# :::


# %% exercise 1, a solution tags=["hide-cell"]
def worst(high, low):
    """The largest relative error of e^x where only r is rounded."""
    x = np.linspace(70, 88, 100_001, dtype=np.float32)
    n = np.floor(x * LOG2_E + HALF)
    r = (x - n * high) - n * low
    return np.abs(r + n.astype(np.float64) * math.log(2) - x).max()


# %% exercise 1, checked
split = worst(LOG_2_HIGH, LOG_2_LOW)
whole = worst(np.float32(math.log(2)), np.float32(0))
verdict("log 2 in two", split < 1e-7, "r is off by < 1e-07")
verdict("log 2 whole", 3e-6 < whole < 5e-6, "by four millionths")

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("2.2")
