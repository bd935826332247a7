# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       reference.gelu: "GELU in NumPy, forward and backward."
#       cpu.gelu: "GELU, compiled for the processor's cores."
#       cuda.gelu: "GELU on a GPU, forward and backward."
#       cuda.elementwise: "Kernels in which a thread owns one number, or four."
# ---

# %% [markdown]
# # Bend the line and differentiate the bend
#
# > GELU lets large numbers through and holds small ones back; written as a
# > sigmoid it costs one exponential an element, forward and backward.

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="gelu")

# %% [markdown]
# *Figure 1.9.1. GELU stands once in every block, between the linear layer that
# widens a vector to 4C channels and the one that narrows it to C again.*
#
# Two linear layers in a row are worth no more than one, because the product
# of two matrices is a matrix. Something between them has to bend. GELU, the
# Gaussian error linear unit, bends each number by itself. This chapter
# builds `gelu_forward` and `gelu_backward`. At its end you can
#
# - say what GELU computes, and where both constants of its tanh form come
#   from;
# - derive its gradient, and say why the input must be saved and the output
#   would not do;
# - rewrite a formula so that it keeps its digits in float32 and so that a
#   compiler can turn it into vector instructions;
# - say what a thread that takes four elements spares a GPU, and what it does
#   not.
#
# You need central differences from [chapter 1.4](04_gpt2.ipynb) and the fast
# exponential from [chapter 1.8](08_attention.ipynb); for the section on a GPU
# also [chapter 3.1](../3_gpu/01_threads.ipynb).

# %% [markdown]
# ## Setup

# %% setup
import math
from types import SimpleNamespace

import matplotlib.pyplot as plt

from llmnb.book.diagram import PALETTE
from llmnb.timing import fastest, machine
from llmnb.book.verify import compare, numerical_gradient, verdict

# %% imports tags=["export"]
import numpy as np

from llmnb.shapes import shapes

# %% the seed
rng = np.random.default_rng(7)

# %% [markdown]
# ## By hand
#
# Draw a number from the standard normal distribution, the bell curve of
# mean 0 and deviation 1. It lies below $x$ with a probability called
# $\Phi(x)$. GELU multiplies $x$ by it: the larger a number is against the
# usual ones, the more of it passes. From a table of $\Phi$:
#
# | $x$ | $-2$ | $-1$ | $0$ | $1$ | $2$ |
# |---|---|---|---|---|---|
# | $\Phi(x)$ | 0.0228 | 0.1587 | 0.5 | 0.8413 | 0.9772 |
# | $x\,\Phi(x)$ | −0.0455 | −0.1587 | 0 | 0.8413 | 1.9545 |
#
# The number 2 passes almost whole, 1 is held back a little, and of the
# negative numbers a small remainder is left. The probability comes from the
# error function, erf, which Python has in its library:


# %% GELU from the error function
def exact_gelu(x):
    erf = np.vectorize(math.erf)(x / math.sqrt(2))
    return 0.5 * x * (1 + erf)


five = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
print(np.round(exact_gelu(five), 4) + 0.0)

# %% [markdown]
# | tensor | shape | what it holds |
# |---|---|---|
# | `inp` | any; in GPT-2 (B, T, 4C) | what the first linear layer put out |
# | `out` | as `inp` | each number through GELU |
# | `dout`, `dinp` | as `inp` | the gradients of both |
#
# Every number is treated alike and alone, so the formulas below have no
# index.

# %% [markdown]
# ## Forward
#
# The exact form is what we did by hand,
#
# $$ x\,\Phi(x) = \frac x2 \Bigl(1 + \operatorname{erf}
#    \frac{x}{\sqrt2}\Bigr) . \tag{1.9.1} $$
#
# The error function takes long to compute. The paper that introduced GELU
# gives a cheaper function of the same S shape in its place, the hyperbolic
# tangent of a polynomial:
#
# $$ u = k\,(x + a x^3), \qquad
#    y = \frac x2 \,(1 + \tanh u) , \tag{1.9.2} $$
#
# with $k = \sqrt{2/\pi}$ and $a = 0.044715$. GPT-2's weights were trained
# with (1.9.2), so (1.9.2) is what GPT-2 *is*, and we keep it.
#
# Where do the constants come from? Near 0 both forms should agree. The
# series of the two S curves begin with
#
# $$ \begin{aligned}
#    \operatorname{erf}\frac{x}{\sqrt2}
#    &= \sqrt{\tfrac2\pi}\,\Bigl(x - \frac{x^3}{6} + \dots\Bigr), \\
#    \tanh u &= u - \frac{u^3}{3} + \dots
#    = k x + \Bigl(k a - \frac{k^3}{3}\Bigr) x^3 + \dots
#    \end{aligned} \tag{1.9.3} $$
#
# The terms in $x$ agree if $k = \sqrt{2/\pi}$. The terms in $x^3$ agree if
# $a = k^2/3 - 1/6$.

# %% the cubic coefficient that the series gives
k = math.sqrt(2 / math.pi)
series = k**2 / 3 - 1 / 6
print(f"{series:.6f}")

# %% [markdown]
# The value in use, 0.044715, is 2 % smaller: it gives up a little agreement
# at 0 for a smaller error further out. We can check that it pays:


# %% the largest error over the line
def tanh_gelu(x, a):
    return 0.5 * x * (1 + np.tanh(k * (x + a * x**3)))


x = np.linspace(-8, 8, 16001)
errors = [np.abs(tanh_gelu(x, a) - exact_gelu(x)).max() for a in
          (series, 0.044715)]  # fmt: skip
print("largest error", [f"{e:.5f}" for e in errors])
verdict("0.044715", errors[1] < errors[0], "errs less than the series")

# %% [markdown]
# The function itself is (1.9.2):

# %% the constants tags=["exporti"]
ROOT = np.sqrt(2 / np.pi)
CUBIC = 0.044715


# %% GELU, forward tags=["export"]
@shapes("...!, ...~")
def gelu_forward(out, inp):
    """Write GELU of every element of inp to out, by the tanh form.

    out, inp: arrays of one shape, any, and one float dtype; out is
    overwritten.
    """
    u = ROOT * (inp + CUBIC * inp**3)
    out[...] = 0.5 * inp * (1 + np.tanh(u))


# %% the five numbers through the function
y = np.empty(5)
gelu_forward(y, five)
compare("tanh form", y, exact_gelu(five), tol=1e-3)

# %% [markdown]
# ## Backward, derived
#
# Write $t = \tanh u$. (1.9.2) has $x$ in two places, as a factor and inside
# $u$, so by the product rule
#
# $$ \frac{dy}{dx} = \frac12 (1 + t) + \frac x2\,
#    \frac{dt}{du}\,\frac{du}{dx} . \tag{1.9.4} $$
#
# For $dt/du$ take $\tanh u = \sinh u / \cosh u$. The derivative of sinh is
# cosh and the other way round, so by the quotient rule
#
# $$ \frac{dt}{du} = \frac{\cosh^2 u - \sinh^2 u}{\cosh^2 u}
#    = 1 - t^2 , \qquad
#    \frac{du}{dx} = k\,(1 + 3 a x^2) . \tag{1.9.5} $$
#
# Together, with the gradient $dy$ that the layer above hands us:
#
# $$ dx = dy \cdot \frac12 \Bigl( 1 + t
#    + x\,(1 - t^2)\,k\,(1 + 3 a x^2) \Bigr) . \tag{1.9.6} $$
#
# **What to save.** (1.9.6) is a function of $x$ alone. The input is the
# output of the linear layer below, and it must stay in memory until
# backward comes. That is not free: it is the widest activation inside a
# block. $t$ is computed anew. Could we save $y$ and let go of $x$, since the
# next layer needs $y$ anyway? Exercise 4 shows that $y$ does not
# determine $x$.


# %% GELU, backward tags=["export"]
@shapes("...!, ...~, ...")
def gelu_backward(dinp, dout, inp, add=True):
    """Add GELU's gradient to dinp, or overwrite dinp with it.

    dinp, dout, inp: arrays of one shape, any, and one float dtype; dinp is
    added to in place. With add=False it is overwritten and its old contents
    are not used, so it need not be zeroed.
    """
    t = np.tanh(ROOT * (inp + CUBIC * inp**3))
    du = ROOT * (1 + 3 * CUBIC * inp**2)
    grad = dout * 0.5 * (1 + t + inp * (1 - t**2) * du)
    dinp[...] = dinp + grad if add else grad


# %% [markdown]
# ## Proof
#
# As in the chapters before: $\mathcal L = \sum g \cdot y$, float64, step
# $h = 10^{-5}$, tolerance $10^{-8}$.

# %% a problem to differentiate
inp, g = rng.normal(scale=2, size=(2, 3, 5, 4))
out = np.empty_like(inp)


def loss():
    gelu_forward(out, inp)
    return (g * out).sum()


dinp = np.zeros_like(inp)
gelu_backward(dinp, g, inp)
numerical = numerical_gradient(loss, inp)
compare("dinp", dinp, numerical, tol=1e-8)

# %% [markdown]
# The term that is easily lost is the second one of (1.9.4). Without it the
# gradient is still right for large positive and large negative numbers.
# Between them it is not:

# %% a gradient made wrong on purpose
t = np.tanh(ROOT * (inp + CUBIC * inp**3))
try:
    compare("dinp, half of it", g * 0.5 * (1 + t), numerical, tol=1e-8)
    caught = False
except AssertionError:
    caught = True
verdict("the mistake", caught, "is caught")

# %% [markdown]
# ## Fast on a CPU
#
# A product and a sum take a fraction of a nanosecond; a tanh is a call into
# the mathematical library, one number at a time, with branches inside. A
# compiler cannot turn such a call into vector instructions. So we look for
# a form of (1.9.2) without it.
#
# From $\tanh u = (e^u - e^{-u}) / (e^u + e^{-u})$ follows
#
# $$ \frac12 (1 + \tanh u) = \frac{e^u}{e^u + e^{-u}}
#    = \frac{1}{1 + e^{-2u}} = \sigma(2u) . \tag{1.9.7} $$
#
# $\sigma$ is the logistic sigmoid. With $v = 2u$ and
# $v' = 2k(1 + 3 a x^2)$, and since $d\sigma/dv = \sigma (1 - \sigma)$,
#
# $$ y = x\,\sigma(v) , \qquad
#    \frac{dy}{dx} = \sigma + x\,\sigma(1 - \sigma)\,v' . \tag{1.9.8} $$
#
# One exponential each, and [chapter 1.8](08_attention.ipynb) has one that
# vectorises.
#
# Two dangers are left. For $x = -20$ we have $v = -603$, and $e^{603}$
# exceeds float32. And for large $x$, $\sigma$ rounds to 1, so $1 - \sigma$
# has no digit left, while $x\,v'$, by which it is multiplied, grows with
# $x^3$. Both go away when the exponential sees a negative number only.
# Let
#
# $$ q = e^{-|v|}, \qquad 0 < q \le 1 . \tag{1.9.9} $$
#
# For $x > 0$, (1.9.7) is $\sigma = 1/(1 + q)$. For $x \le 0$ we have
# $q = e^{v}$, and multiplying (1.9.7) above and below by $e^v$ gives
# $\sigma = q/(1 + q)$. In both cases the two fractions are $\sigma$ and
# $1 - \sigma$ in some order, so
#
# $$ \sigma\,(1 - \sigma) = \frac{q}{(1 + q)^2} . \tag{1.9.10} $$
#
# No subtraction is left, and nothing can overflow. Compare the two forms of
# (1.9.10) in float32 with its value in float64:

# %% digits lost and kept
x32 = np.linspace(2, 6, 401, dtype=np.float32)
x64 = x32.astype(np.float64)


def slopes(x):
    q = np.exp(-2 * x.dtype.type(k) * (x + x.dtype.type(CUBIC) * x**3))
    s = 1 / (1 + q)
    return s * (1 - s), q / (1 + q) ** 2


exact = slopes(x64)[1]
subtracted, kept = (np.abs(f / exact - 1).max() for f in slopes(x32))
verdict("sigma(1 - sigma)", subtracted > 0.5, "loses every digit")
verdict("q / (1 + q)^2", kept < 1e-4, "keeps four or more")

# %% keep the NumPy versions
reference = SimpleNamespace(forward=gelu_forward, backward=gelu_backward)

# %% imports of the CPU module tags=["export"] module="cpu.gelu"
import math

import numpy as np

from llmnb.cpu.jit import arguments, device, share, team
from llmnb.cpu.math import fast_exp
from llmnb.shapes import shapes

# %% the constants of the kernels tags=["exporti"] module="cpu.gelu"
SLOPE = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715


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
# selects. Backward comes in two kernels. In the model, `dinp` holds nothing
# yet when GELU's gradient arrives, and to set it to zero first, only to add
# to it, would be one more trip through memory. What is more, the model wants
# the gradient in the place of the one that came in. So one kernel adds, and
# one multiplies in place. The slope is (1.9.8) in both.


# %% the slope tags=["exporti"] module="cpu.gelu"
@device
def _slope(x, slope, cubic, one):
    q = fast_exp(-abs(slope * x * (one + cubic * x * x)))
    r = one / (one + q)
    dv = slope * (one + (cubic + cubic + cubic) * x * x)
    return (one if x > 0 else q) * r + x * dv * q * r * r


# %% the backward kernels tags=["exporti"] module="cpu.gelu"
@team
def _gelu_backward(part, parts, address):
    dinp, dout, inp = arguments(address)
    number, mine = inp.dtype.type, share(inp.size, part, parts)
    slope, cubic, one = number(SLOPE), number(CUBIC), number(1)
    dinp, dout, inp = dinp[mine], dout[mine], inp[mine]
    for i in range(inp.size):
        dinp[i] += dout[i] * _slope(inp[i], slope, cubic, one)


@team
def _gelu_backward_in_place(part, parts, address):
    grad, inp = arguments(address)
    number, mine = inp.dtype.type, share(inp.size, part, parts)
    slope, cubic, one = number(SLOPE), number(CUBIC), number(1)
    grad, inp = grad[mine], inp[mine]
    for i in range(inp.size):
        grad[i] *= _slope(inp[i], slope, cubic, one)


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
    dx, dy, x = dinp.reshape(-1), dout.reshape(-1), inp.reshape(-1)
    if add:
        _gelu_backward(dx, dy, x)
    else:
        if dinp is not dout:
            np.copyto(dinp, dout)
        _gelu_backward_in_place(dx, x)


# %% [markdown]
# The verdicts: on the problem of the proof, and in float32 on a dense grid
# against the float64 reference.

# %% the same results from the kernels
cpu = SimpleNamespace(forward=gelu_forward, backward=gelu_backward)
got = np.zeros_like(inp)
cpu.backward(got, g, inp)
compare("dinp", got, dinp, tol=1e-12)
got = np.full_like(inp, np.nan)
cpu.backward(got, g, inp, add=False)
compare("dinp, overwritten", got, dinp, tol=1e-12)
got = np.empty_like(inp)
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
import numba

most = numba.get_num_threads()
numba.set_num_threads(1)
alone = both(cpu, grid)
numba.set_num_threads(most)
same = np.array_equal(alone[0], y32) and np.array_equal(alone[1], d32)
verdict("threads", same, "change no bit")

# %% a shape that does not fit
try:
    cpu.forward(np.empty(3), np.empty(4))
except ValueError as error:
    print(error)

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
# ## On a GPU
#
# GELU moves 8 bytes for about 20 operations, on a GPU as on a CPU. By
# NVIDIA's data sheets an A100 with 1,555 GB/s does 19.5 TFLOP/s in float32,
# and an H100 with 3,350 GB/s does 67: 12 and 20 operations for each byte.
# GELU wants 2.5, so memory is the bound. What a GPU offers is thousands of
# threads: while some wait for their numbers, others compute. No two elements
# of GELU have anything to do with each other, so all of them may be under
# way at once.
#
# No GPU has run these kernels yet. The simulator has; and tests compile them
# for two generations of GPU, sm_80 (the A100's) and sm_90 (the H100's), and
# look at the machine code: no float64, no register spilled, and 16 bytes an
# access where we ask for them.

# %% keep the CPU's versions
cpu = SimpleNamespace(forward=gelu_forward, backward=gelu_backward)

# %% imports of the CUDA module tags=["export"] module="cuda.gelu"
import math
from functools import partial

import numpy as np

from llmnb.cuda.elementwise import by_element, by_four
from llmnb.gpu.launch import DEVICE, device, kernel, numbered
from llmnb.gpu.simulator import cuda, load4, store4
from llmnb.shapes import shapes

# %% the constants of the GPU's kernels tags=["exporti"] module="cuda.gelu"
SLOPE32 = np.float32(2 * math.sqrt(2 / math.pi))
CUBIC32 = np.float32(0.044715)
ONE, ZERO, THREE = np.float32(1), np.float32(0), np.float32(3)


# %% [markdown]
# ### An element and its slope
#
# All kernels below call the same two functions, (1.9.8) with (1.9.9) and
# (1.9.10). Every constant is a float32: after one bare `1.0` the rest of the
# line would be computed in float64.


# %% GELU of one number tags=["exporti"] module="cuda.gelu"
@device
def _gelu(x):
    q = math.exp(-abs(SLOPE32 * x * (ONE + CUBIC32 * x * x)))
    return x * (ONE if x > ZERO else q) / (ONE + q)


@device
def _gelu_slope(x):
    q = math.exp(-abs(SLOPE32 * x * (ONE + CUBIC32 * x * x)))
    r = ONE / (ONE + q)
    dv = SLOPE32 * (ONE + THREE * CUBIC32 * x * x)
    return (ONE if x > ZERO else q) * r + x * dv * q * r * r


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
# $\tanh u$ is close to $-1$, nothing but that error would be left of
# $1 + \tanh u$, and the small outputs of negative inputs would be noise.
#
# ### Version 1: a thread an element
#
# Thread $i$ reads element $i$ and writes element $i$. The 32 threads of a
# warp read 32 neighbours, 128 bytes, four sectors of which every byte is
# used. That is as few sectors as there can be.


# %% version 1 tags=["exporti"] module="cuda.gelu"
@kernel
def _forward_elements(out, inp):
    i = cuda.grid(1)
    if i < inp.size:
        out[i] = _gelu(inp[i])


@kernel
def _backward_elements(dinp, dout, inp, add):
    i = cuda.grid(1)
    if i < inp.size:
        grad = dout[i] * _gelu_slope(inp[i])
        if add:
            grad += dinp[i]
        dinp[i] = grad


# %% [markdown]
# `add` is the same for every thread, so no warp is split by it. Where it is
# 0, `dinp` is not read: the counts below show it. And since each thread
# reads its `dout` before it writes its `dinp`, both may be one array.
#
# ### Version 2: four elements at once
#
# What is left to save? Not bytes. But each access of a warp is an
# instruction, a *request*, and in version 1 a request moves 128 bytes. With
# `load4` and `store4` a thread moves four neighbours, and a request 512
# bytes. That leaves a quarter of the requests, of the threads, and of the
# index arithmetic.
#
# A size that is no multiple of 4 leaves up to three elements at the end.
# They get a thread each, in the same launch: with $n$ elements and
# $f = \lfloor n / 4 \rfloor$ fours, thread $i \ge f$ takes element
# $4f + (i - f) = 3f + i$.


# %% version 2, forward tags=["exporti"] module="cuda.gelu"
@kernel
def _forward_fours(out, inp):
    i, fours = cuda.grid(1), inp.size // 4
    if i < fours:
        a, b, c, d = load4(inp, 4 * i)
        store4(out, 4 * i, _gelu(a), _gelu(b), _gelu(c), _gelu(d))
    elif 3 * fours + i < inp.size:
        out[3 * fours + i] = _gelu(inp[3 * fours + i])


# %% version 2, backward tags=["exporti"] module="cuda.gelu"
@kernel
def _backward_fours(dinp, dout, inp, add):
    i, fours = cuda.grid(1), inp.size // 4
    if i < fours:
        a, b, c, d = load4(inp, 4 * i)
        e, f, g, h = load4(dout, 4 * i)
        e, f = e * _gelu_slope(a), f * _gelu_slope(b)
        g, h = g * _gelu_slope(c), h * _gelu_slope(d)
        if add:
            a, b, c, d = load4(dinp, 4 * i)
            e, f, g, h = a + e, b + f, c + g, d + h
        store4(dinp, 4 * i, e, f, g, h)
    elif 3 * fours + i < inp.size:
        i += 3 * fours
        grad = dout[i] * _gelu_slope(inp[i])
        if add:
            grad += dinp[i]
        dinp[i] = grad


# %% who owns what
from llmnb.book.owners import draw_owners

fig, axes = plt.subplots(2, 1, figsize=(8, 1.9), dpi=100)
draw_owners(axes[0], [list(range(19))], "version 1")
fours = [i // 4 for i in range(16)] + [4, 5, 6]
draw_owners(axes[1], [fours], "version 2")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.9.2. The threads that own 19 elements. In version 1 each owns one;
# in version 2 each owns four neighbours, which move in one access of 16
# bytes, and the three that are left over get a thread each.*
#
# On the host's side an array of any shape is taken as one row, and the grid
# has enough blocks for every thread that is wanted. An access of 16 bytes
# must begin at a multiple of 16 bytes; all memory that a GPU hands out does,
# but a view may begin anywhere. Such a view goes to version 1. And a grid
# without blocks is an error to CUDA, so for an empty array nothing is
# launched. Chapters 1.10 and 1.12 launch their kernels in the same two ways.

# %% imports of the launches tags=["export"] module="cuda.elementwise"
from llmnb.gpu.launch import aligned

# %% threads of a block tags=["exporti"] module="cuda.elementwise"
BLOCK = 256


def _launch(kernel, threads, arrays, numbers):
    if threads:
        blocks = (threads + BLOCK - 1) // BLOCK
        kernel[blocks, BLOCK](*arrays, *numbers)


# %% launches tags=["export"] module="cuda.elementwise"
def by_element(elements, arrays, *numbers):
    """Launch a kernel with a thread for each element of a flat array.

    elements: the kernel. arrays: its arguments that are arrays, the first
    one decides; numbers: the other arguments. An empty array launches
    nothing.
    """
    _launch(elements, arrays[0].size, arrays, numbers)


def by_four(fours, elements, arrays, *numbers):
    """Launch a kernel with a thread for each four elements of a flat array.

    fours: the kernel; its last threads, up to three, own the elements that
    are left over. elements: what is launched by element where an array does
    not begin at a multiple of 16 bytes. Otherwise as `by_element`.
    """
    if aligned(*arrays):
        threads = arrays[0].size // 4 + arrays[0].size % 4
        _launch(fours, threads, arrays, numbers)
    else:
        by_element(elements, arrays, *numbers)


# %% GELU, forward tags=["export"] module="cuda.gelu"
# one element a thread; four neighbours a thread
GELU_FORWARD = (
    partial(by_element, _forward_elements),
    partial(by_four, _forward_fours, _forward_elements),
)


@shapes("...!, ...~", DEVICE)
def gelu_forward(out, inp, version=2):
    """Write GELU of every element of inp to out, by the tanh form.

    out, inp: a device's arrays of one shape, any, float32; out is
    overwritten, and may be inp. version: which kernel, from 1 on. Raises
    TypeError or ValueError before it launches anything.
    """
    run = numbered(GELU_FORWARD, version, "gelu_forward")
    run((out.reshape(-1), inp.reshape(-1)))


# %% GELU, backward tags=["export"] module="cuda.gelu"
# one element a thread; four neighbours a thread
GELU_BACKWARD = (
    partial(by_element, _backward_elements),
    partial(by_four, _backward_fours, _backward_elements),
)


@shapes("...!, ...~, ...", DEVICE)
def gelu_backward(dinp, dout, inp, add=True, version=2):
    """Add GELU's gradient to dinp, or overwrite dinp with it.

    dinp, dout, inp: a device's arrays of one shape, any, float32; dinp is
    added to in place. With add=False it is overwritten, and it may be dout
    itself. version: which kernel, from 1 on. Raises TypeError or ValueError
    before it launches anything.
    """
    run = numbered(GELU_BACKWARD, version, "gelu_backward")
    run([x.reshape(-1) for x in (dinp, dout, inp)], int(add))


# %% [markdown]
# The verdicts, on a shape that leaves three elements over. They run on a
# GPU where there is one, and else on the simulator:

# %% the same results on the device
from llmnb.gpu.launch import empty, simulated, to_device, to_host

odd, g = rng.normal(scale=2, size=(2, 3, 7, 23)).astype(np.float32)
want, slope = np.empty_like(odd), np.zeros_like(odd)
reference.forward(want, odd)
reference.backward(slope, g, odd)
for version in (1, 2):
    there = to_device(odd)
    out, dinp = empty(odd.shape, like=there), to_device(g)
    gelu_forward(out, there, version=version)
    gelu_backward(dinp, dinp, there, add=False, version=version)
    compare(f"version {version}, out", to_host(out), want, tol=2e-6)
    compare(f"version {version}, dinp", to_host(dinp), slope, tol=2e-6)

# %% [markdown]
# And what the simulator counts, for 1027 elements:

# %% requests and sectors
from llmnb.gpu.simulator import watch

odd = rng.normal(size=1027).astype(np.float32)
there, out, dout = simulated(odd), simulated(odd), simulated(odd)
runs = {"forward": lambda n: gelu_forward(out, there, version=n)}
for name, add in (("backward", True), ("overwriting", False)):
    runs[name] = lambda n, add=add: gelu_backward(
        out, dout, there, add=add, version=n
    )
print(f"{'':13}threads  requests  sectors  bytes an element")
for name, run in runs.items():
    for version in (1, 2):
        with watch() as seen:
            run(version)
        moved = (seen.read_bytes + seen.written_bytes) // odd.size
        print(
            f"{name:11} {version} {seen.threads:7} {seen.requests:9} "
            f"{seen.sectors:8} {moved:17}"
        )

# %% [markdown]
# Version 2 has about a quarter of the requests. (Of threads it wants a
# quarter as well, 259, and gets two whole blocks.) The sectors are the
# same, because every sector was used in full from the start. What that
# buys, only a GPU can say: `llmnb bench --backend cuda --kernels` measures
# it where there is one, and the results page shows it once it is measured.

# %% [markdown]
# ## Count it
#
# Per element the forward pass takes about 20 operations, most of them in the
# exponential, and moves 8 bytes: it reads `inp` and writes `out`. The
# backward pass takes about 30 and moves 16: it reads `inp`, `dout` and
# `dinp`, and writes `dinp`. (In place it moves 12, and needs no pass that
# sets `dinp` to zero.) The two linear layers around GELU take
# $2 \cdot 2 C$ operations for each of the 4C numbers, over 3000 at C = 768.
# So GELU is no cost in arithmetic, as long as it runs in vector
# instructions as they do.

# %% what it adds to the feed-forward half
C, hidden = 768, 4 * 768
linear = 2 * 2 * C * hidden
print(f"{20 * hidden / linear:.1%} of the operations of its two neighbours")

# %% predicted against measured tags=["nbval-ignore-output"]
a, b = np.ones((2, 1 << 25), np.float32)
bandwidth = 2 * a.nbytes / fastest(np.copyto, a, b, runs=5)
for name, moved in (("sigmoid", 8), ("sigmoid, backward", 16)):
    predicted = moved / bandwidth * 1e9
    measured = times[name] / x.size * 1e9
    print(f"{name:18} memory alone {predicted:.2f} ns, took {measured:.2f}")

# %% [markdown]
# Where it took less than memory alone, the arrays of 3 MB have stayed in
# the last-level cache; the copy went to main memory.
#
# The bytes also count as memory: `inp` is saved for the backward pass, 4C
# numbers a token in each of 12 layers. `out` is not: the product that reads
# it needs it again on the way back, and computing it once more costs less
# than keeping it ([chapter 1.13](13_memory.ipynb)).

# %% saved for the backward pass
print(f"{12 * hidden * 4 / 1e3:.1f} kB a token")

# %% [markdown]
# ## See it

# %% GELU, its slope, and the error of the tanh form
x = np.linspace(-4, 4, 801)
y, slope = both(reference, x)
fig, axes = plt.subplots(1, 2, figsize=(8, 3.4), dpi=100)
ax = axes[0]
ax.plot(x, np.maximum(x, 0), "--", color=PALETTE["grey"], label="max(x, 0)")
ax.plot(x, y, color=PALETTE["blue"], label="GELU")
ax.plot(x, slope, color=PALETTE["orange"], label="its derivative")
ax.set(xlabel="x", ylim=(-0.4, 3))
ax.legend(frameon=False, loc="upper left")
ax = axes[1]
ax.axhline(0, color=PALETTE["grey"], lw=0.8)
ax.plot(x, (y - exact_gelu(x)) * 1e3, color=PALETTE["purple"])
ax.set(xlabel="x", title="tanh form minus exact, times 1000")
for ax in axes:
    ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.9.3. Left: GELU follows max(x, 0) at both ends and dips below 0
# between; its derivative overshoots 1 and is negative left of the dip.
# Right: the tanh form stays within half a thousandth of the exact one.*
#
# A unit that max(x, 0) has switched off gets no gradient at all. With GELU a
# moderately negative number still gets one and may come back. Far out to the
# left, the derivative dies away here too.

# %% [markdown]
# ## Take away
#
# - GELU is $x$ times the probability that a normal number lies below $x$;
#   GPT-2 uses a tanh form of it that is off by less than 0.0005.
# - Its gradient needs the input and nothing else.
# - $\frac12(1 + \tanh u) = \sigma(2u)$ leaves one exponential, and an
#   exponential of negative numbers alone neither overflows nor loses
#   digits.
# - A call into a library, once for each number, costs more than all the
#   arithmetic around it.
# - On a GPU it moves the same bytes. A thread that moves four neighbours at
#   once makes a quarter of the requests.

# %% [markdown]
# ## Design note
#
# We could have approximated tanh itself by a quotient of two polynomials.
# Near 0 that is as good, but for $x < -3$ the sum $1 + \tanh u$ takes the
# difference of two numbers close to 1: the relative error of a small output
# grows without limit. The sigmoid form keeps the output's digits on both
# sides, and it shares the exponential with softmax.
#
# We could also have put GELU into the loop of the linear layer that precedes
# it, while its output is in cache. That saves one read of (B, T, 4C) and
# ties two layers together. Two functions that can be read and proved
# alone are worth more to us here.

# %% [markdown]
# ## Exercises
#
# **1** (★). GELU has one lowest point. Find it to six digits with the
# derivative and bisection.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# The derivative is negative at $-2$ and positive at $-0.5$. Halve the
# interval until it is short enough: $x = -0.752461$, $y = -0.170041$.
# :::


# %% exercise 1, bisection tags=["hide-cell"]
def lowest_point():
    low, high = -2.0, -0.5
    while high - low > 1e-12:
        middle = (low + high) / 2
        slope = both(reference, np.array([middle]))[1][0]
        low, high = (middle, high) if slope < 0 else (low, middle)
    return low


# %% exercise 1, checked
x0 = lowest_point()
y0 = tanh_gelu(x0, CUBIC)
print(f"x = {x0:.6f}, y = {y0:.6f}")
verdict("lowest", y0 <= tanh_gelu(np.linspace(-8, 8, 9999), CUBIC).min(),
        "below a grid of points")  # fmt: skip

# %% [markdown]
# **2** (★★). Derive the gradient of the exact form (1.9.1) and check it. The
# derivative of $\Phi$ is the bell curve
# $\varphi(x) = e^{-x^2/2} / \sqrt{2\pi}$.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# The product rule gives $\Phi(x) + x\,\varphi(x)$: the shape of (1.9.8) with
# $\Phi$ in the place of $\sigma$.
# :::


# %% exercise 2, the gradient tags=["hide-cell"]
def exact_slope(x):
    Phi = 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return Phi + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


# %% exercise 2, checked
want = numerical_gradient(lambda: exact_gelu(inp).sum(), inp)
compare("exact slope", exact_slope(inp), want, tol=1e-8)

# %% [markdown]
# **3** (★★). A cheaper form drops the cube: $x\,\sigma(1.702\,x)$. How far
# is it from the exact form at most, and how many times further than the tanh
# form?
#
# :::{admonition} Solution to exercise 3
# :class: dropdown
# About 0.02, over forty times as far as the tanh form. It saves three
# multiplications beside an exponential that costs many more.
# :::


# %% exercise 3, the distance tags=["hide-cell"]
def distances():
    x = np.linspace(-8, 8, 16001)
    quick = x / (1 + np.exp(-1.702 * x))
    forms = quick, tanh_gelu(x, CUBIC)
    return [np.abs(form - exact_gelu(x)).max() for form in forms]


# %% exercise 3, checked
quick, tanh = distances()
print(f"{quick:.3f}, {quick / tanh:.0f} times as far")
verdict("without the cube", quick > 40 * tanh, "over 40 times as far")

# %% [markdown]
# **4** (★★★). Show that `inp` cannot be replaced by `out` as what is saved:
# find two inputs with the same GELU and different derivatives.
#
# :::{admonition} Solution to exercise 4
# :class: dropdown
# Left of its lowest point GELU falls, right of it GELU rises. Every value
# between the lowest one and 0 is taken twice, once with a negative and once
# with a positive derivative. Take $-0.1$ and bisect on each side. (One more
# bit for each number, telling the side, would do.)
# :::


# %% exercise 4, two inputs tags=["hide-cell"]
def preimages(y):
    found = []
    for outer in (-8.0, 0.0):
        inside = x0
        while abs(outer - inside) > 1e-12:
            middle = (outer + inside) / 2
            if tanh_gelu(middle, CUBIC) > y:
                outer = middle
            else:
                inside = middle
        found.append(inside)
    return np.array(found)


# %% exercise 4, checked
values, ends = both(reference, preimages(-0.1))
compare("both outputs", values, [-0.1, -0.1], tol=1e-10)
verdict("derivatives", ends[0] < 0 < ends[1], "have two signs")

# %% [markdown]
# **5** (★★). A kernel lets thread $i$ take elements $4i$ to $4i + 3$, as
# version 2 does, but with four plain accesses each way. For 1024 elements,
# how many requests and how many sectors does the simulator count, against
# version 1?
#
# :::{admonition} Solution to exercise 5
# :class: dropdown
# As many requests: a quarter of the warps, each of which asks four times
# as often. Four times as many sectors: the lanes of a warp are 16 bytes
# apart, so one request spreads over 512 bytes and touches 16 sectors where
# it uses 128 bytes. The next three requests touch the same 16 again. A
# cache may save them; version 2 does not depend on that.
# :::


# %% exercise 5, the kernel tags=["hide-cell"]
@kernel
def four_by_one(out, inp):
    first = 4 * cuda.grid(1)
    if first < inp.size:
        for i in range(first, first + 4):
            out[i] = _gelu(inp[i])


# %% exercise 5, checked
x = simulated(np.ones(1024, np.float32))
with watch() as one:
    gelu_forward(x, x, version=1)
with watch() as scattered:
    four_by_one[1, 256](x, x)
verdict("requests", scattered.requests == one.requests, "are as many")
verdict("sectors", scattered.sectors == 4 * one.sectors, "are four times")

# %% [markdown]
# ## Further reading
#
# - Hendrycks and Gimpel (2016),
#   [Gaussian Error Linear Units](https://arxiv.org/abs/1606.08415): section
#   2 for the idea and both approximations.
# - Shazeer (2020),
#   [GLU Variants Improve Transformer](https://arxiv.org/abs/2002.05202):
#   what later models put in GELU's place.
# - Goldberg (1991),
#   [What every computer scientist should know about floating-point arithmetic](https://doi.org/10.1145/103162.103163):
#   the part on cancellation, which (1.9.10) avoids.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.9")
