# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       reference.residual: "The residual sum in NumPy, forward and backward."
#       cpu.residual: "The residual sum, compiled for the processor's cores."
#       cuda.residual: "The residual sum on a GPU, alone and with LayerNorm."
# ---

# %% [markdown]
# # Add a layer's output to its input
#
# > The sum of a layer's output and its input keeps a road open along which
# > gradients reach the first layers unchanged.

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="residual")

# %% [markdown]
# *Figure 1.10.1. Each block ends its two halves with an addition: what the
# half computed is added to what the half was given. The arrows that pass by
# the layers carry the input there.*
#
# The addition is called a *residual connection*: the layers in between
# compute only the difference, the residue, between input and output. What
# runs through all the additions, from the encoder to the last LayerNorm, is
# the *residual stream*. This chapter builds `residual_forward` and
# `residual_backward`, the shortest layer of the book, and shows what it is
# for. At its end you can
#
# - derive its gradient, and say why a gradient is added and not written;
# - say what a chain of layers does to a gradient without the addition;
# - count what a kernel saves that adds and normalises in one go;
# - compute how the variance of the stream grows with depth;
# - say where the factor $1/\sqrt{2L}$ in GPT-2's first weights comes from.
#
# You need central differences from [chapter 1.4](04_gpt2.ipynb), LayerNorm
# from [chapter 1.6](06_layernorm.ipynb) and GELU from
# [chapter 1.9](09_gelu.ipynb); for the section on a GPU also
# [chapter 3.1](../3_gpu/01_threads.ipynb).

# %% [markdown]
# ## Setup

# %% setup
from types import SimpleNamespace

import matplotlib.pyplot as plt

from llmnb.book.diagram import PALETTE
from llmnb.timing import fastest, machine
from llmnb.book.verify import compare, numerical_gradient, verdict

# %% imports of the reference tags=["export"]
import numpy as np

from llmnb.shapes import shapes

# %% the seed
rng = np.random.default_rng(8)

# %% [markdown]
# ## By hand
#
# Two tokens with three channels: the stream holds $(1, 2, 3)$ and
# $(4, 5, 6)$, and a layer has computed $(10, 0, 0)$ and $(0, 0, -6)$ from
# them. The stream goes on with $(11, 2, 3)$ and $(4, 5, 0)$. A channel
# where the layer says 0 passes as it was.
#
# | tensor | shape | what it holds |
# |---|---|---|
# | `inp1` | (B, T, C) | the stream |
# | `inp2` | (B, T, C) | what the half block computed from it |
# | `out` | (B, T, C) | the stream after this half block |

# %% two tokens by hand
stream = np.array([[[1.0, 2, 3], [4, 5, 6]]])
layer = np.array([[[10.0, 0, 0], [0, 0, -6]]])
print((stream + layer).astype(int))

# %% [markdown]
# ## Forward
#
# Let $x$ be the stream and $f$ all the layers of a half block. Then
#
# $$ y = x + f(x) . \tag{1.10.1} $$
#
# The function below sees two arrays and does not know that the second was
# computed from the first.


# %% the forward pass tags=["export"]
@shapes("...!, ...~, ...~")
def residual_forward(out, inp1, inp2):
    """Add two arrays.

    out, inp1, inp2: float, all of one shape; out is overwritten, and may be
    inp1 or inp2.
    """
    np.add(inp1, inp2, out=out)


# %% the two tokens through the function
out = np.empty_like(stream)
residual_forward(out, stream, layer)
compare("by hand", out[0], [[11, 2, 3], [4, 5, 0]], tol=1e-12)

# %% [markdown]
# ## Backward, derived
#
# Element $i$ of the output is $y_i = a_i + b_i$, with $a$ for `inp1` and
# $b$ for `inp2`, so $\partial y_i / \partial a_j = \delta_{i,j}$, which is 1
# for $i = j$ and 0 otherwise, and the same for $b$. The chain rule gives
#
# $$ da_j = \sum_i dy_i\, \delta_{i,j} = dy_j , \qquad
#    db_j = dy_j . \tag{1.10.2} $$
#
# An addition hands its gradient to both terms unchanged. Nothing of the
# forward pass appears in (1.10.2), so nothing is saved.
#
# **Two readers, one gradient.** In (1.10.1) the stream is read twice: by the
# addition and by $f$. Let $J_{ij} = \partial f_i / \partial x_j$. Each
# element $x_j$ reaches the loss by both roads:
#
# $$ dx_j = dy_j + \sum_i dy_i\, J_{ij} . \tag{1.10.3} $$
#
# The first term comes from `residual_backward`, the second from the
# backward pass of the half block's first layer, and both go into the same
# array. This is why a backward function of this book adds.


# %% the backward pass tags=["export"]
@shapes("...!, ...!, ...")
def residual_backward(dinp1, dinp2, dout):
    """Add the gradient of the sum to the gradients of both its terms.

    dinp1, dinp2, dout: float, all of one shape, three distinct arrays;
    dinp1 and dinp2 are added to.
    """
    dinp1 += dout
    dinp2 += dout


# %% [markdown]
# ## Proof
#
# A check of the addition alone would prove little. We check (1.10.3): let $f$
# be GELU, so that the stream is read twice, and let
# $\mathcal L = \sum g \cdot y$ with a fixed random $g$. Float64, step
# $10^{-5}$, tolerance $10^{-8}$.

# %% a problem to differentiate
from llmnb.reference.gelu import gelu_backward, gelu_forward

B, T, C = 2, 3, 5
x, g = rng.normal(size=(2, B, T, C))
f, y = np.empty((2, B, T, C))


def loss():
    gelu_forward(f, x)
    residual_forward(y, x, f)
    return (g * y).sum()


want = numerical_gradient(loss, x)


# %% both roads into one gradient
def gradient(backward):
    dx, df = np.zeros((2, B, T, C))
    backward(dx, df, g)
    gelu_backward(dx, df, x)
    return dx


compare("dx", gradient(residual_backward), want, tol=1e-8)

# %% [markdown]
# Suppose GELU's backward pass wrote its gradient where it should add it.
# The road along the stream is lost, and the check says so:


# %% a gradient made wrong on purpose
def stream_lost(dinp1, dinp2, dout):
    dinp2 += dout


try:
    compare("dx, lossy", gradient(stream_lost), want, tol=1e-8)
    caught = False
except AssertionError:
    caught = True
verdict("the mistake", caught, "is caught")

# %% [markdown]
# ## Fast on a CPU
#
# One addition an element leaves nothing to compute faster; what costs is
# moving the numbers. NumPy's forward is one sweep and already good. Its
# backward is two sweeps and reads `dout` twice; a compiled loop reads it
# once, and a team of threads brings in the other cores.

# %% keep the NumPy versions
reference = SimpleNamespace(
    forward=residual_forward, backward=residual_backward
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
compare("dx", gradient(residual_backward), want, tol=1e-8)
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
from numba import get_num_threads

print(f"{machine()}, {get_num_threads()} threads")
big = rng.normal(size=(3, 4, 1024, 768)).astype(np.float32)
times = {}
for name in ("forward", "backward"):
    slow = fastest(getattr(reference, name), *big)
    times[name] = fast = fastest(getattr(cpu, name), *big)
    print(f"{name:<9} NumPy {slow * 1e3:6.2f} ms, numba {fast * 1e3:6.2f} ms")
    print(f"{'':<9} {slow / fast:.1f} times as fast")

# %% [markdown]
# ## On a GPU
#
# One addition for 12 bytes: what bounds this layer on a CPU bounds it on a
# GPU. Every element may have a thread of its own, and nothing but traffic
# is left to think about. So this section has two parts. The first adds, with
# as few requests as it can. The second asks what traffic the addition
# could share with the layer that comes next.
#
# No GPU has run these kernels yet. They run on the simulator; they are
# compiled for two generations, sm_80 and sm_90, and tests look at what the
# compiler made of them.

# %% imports of the GPU's kernels tags=["export"] module="cuda.residual"
import math
from functools import cache, partial

import numpy as np

from llmnb.cuda.elementwise import by_element, by_four
from llmnb.gpu.launch import DEVICE, aligned, device, kernel, numbered
from llmnb.cuda.layernorm import layernorm_forward as normalise
from llmnb.gpu.simulator import cuda, load4, store4
from llmnb.gpu.warp import warp_sum
from llmnb.shapes import shapes

# %% sizes tags=["exporti"] module="cuda.residual"
ROWS = 4  # a block's, one for each warp, where a warp owns a row
WIDEST = 2048  # channels that a warp can keep in registers
EPS = np.float32(1e-5)
ZERO, ONE = np.float32(0), np.float32(1)


# %% [markdown]
# ### Version 1: a thread an element
#
# The whole layer, forward and backward. Backward reads `dout` once for both
# sums.


# %% version 1 tags=["exporti"] module="cuda.residual"
@kernel
def _add_elements(out, inp1, inp2):
    i = cuda.grid(1)
    if i < out.size:
        out[i] = inp1[i] + inp2[i]


@kernel
def _add_back_elements(dinp1, dinp2, dout):
    i = cuda.grid(1)
    if i < dout.size:
        d = dout[i]
        dinp1[i] += d
        dinp2[i] += d


# %% [markdown]
# ### Version 2: four elements at once
#
# As in [chapter 1.9](09_gelu.ipynb), whose `by_element` and `by_four` launch
# these kernels too: with accesses of 16 bytes a warp moves 512 bytes a
# request where it moved 128. Up to three elements at the end get a thread
# each, and a view that begins at no multiple of 16 bytes goes to version 1.


# %% version 2 tags=["exporti"] module="cuda.residual"
@kernel
def _add_fours(out, inp1, inp2):
    i, fours = cuda.grid(1), out.size // 4
    if i < fours:
        a, b, c, d = load4(inp1, 4 * i)
        e, f, g, h = load4(inp2, 4 * i)
        store4(out, 4 * i, a + e, b + f, c + g, d + h)
    elif 3 * fours + i < out.size:
        i += 3 * fours
        out[i] = inp1[i] + inp2[i]


@kernel
def _add_back_fours(dinp1, dinp2, dout):
    i, fours = cuda.grid(1), dout.size // 4
    if i < fours:
        a, b, c, d = load4(dout, 4 * i)
        e, f, g, h = load4(dinp1, 4 * i)
        store4(dinp1, 4 * i, a + e, b + f, c + g, d + h)
        e, f, g, h = load4(dinp2, 4 * i)
        store4(dinp2, 4 * i, a + e, b + f, c + g, d + h)
    elif 3 * fours + i < dout.size:
        i += 3 * fours
        d = dout[i]
        dinp1[i] += d
        dinp2[i] += d


# %% residual, forward tags=["export"] module="cuda.residual"
# one element a thread; four neighbours a thread
RESIDUAL_FORWARD = (
    partial(by_element, _add_elements),
    partial(by_four, _add_fours, _add_elements),
)


@shapes("...!, ...~, ...~", DEVICE)
def residual_forward(out, inp1, inp2, version=2):
    """Add two arrays.

    out, inp1, inp2: a device's arrays, float32, all of one shape; out is
    overwritten, and may be inp1 or inp2. version: which kernel, from 1 on.
    Raises TypeError or ValueError before it launches anything.
    """
    run = numbered(RESIDUAL_FORWARD, version, "residual_forward")
    run([x.reshape(-1) for x in (out, inp1, inp2)])


# %% residual, backward tags=["export"] module="cuda.residual"
# one element a thread; four neighbours a thread
RESIDUAL_BACKWARD = (
    partial(by_element, _add_back_elements),
    partial(by_four, _add_back_fours, _add_back_elements),
)


@shapes("...!, ...!, ...", DEVICE)
def residual_backward(dinp1, dinp2, dout, version=2):
    """Add the gradient of the sum to the gradients of both its terms.

    dinp1, dinp2, dout: a device's arrays, float32, all of one shape, three
    distinct ones; dinp1 and dinp2 are added to. version: which kernel, from
    1 on. Raises TypeError or ValueError before it launches anything.
    """
    run = numbered(RESIDUAL_BACKWARD, version, "residual_backward")
    run([x.reshape(-1) for x in (dinp1, dinp2, dout)])


# %% the same results on the device
from llmnb.gpu.launch import empty, simulated, to_device, to_host

for version in (1, 2):
    there = [to_device(x) for x in (a, b, d)]
    total = empty(a.shape, like=there[0])
    residual_forward(total, *there[:2], version=version)
    residual_backward(*there, version=version)
    equal = np.array_equal([to_host(x) for x in (total, *there[:2])], exact)
    verdict(f"version {version}", equal, "all three equal to NumPy's")

# %% [markdown]
# One rounding for one addition: the results are NumPy's, bit for bit. What
# the simulator counts, for 1027 elements:

# %% requests and sectors
from llmnb.gpu.simulator import watch


def counted(name, version, run, *arrays):
    with watch() as seen:
        run(*arrays, version=version)
    moved = (seen.read_bytes + seen.written_bytes) / arrays[0].size
    print(
        f"{name:9} version {version}: {len(seen.launches)} launches, "
        f"{seen.requests:3} requests, {seen.sectors:4} sectors, "
        f"{moved:4.1f} bytes an element"
    )


three = [simulated(np.ones(1027, np.float32)) for _ in range(3)]
for version in (1, 2):
    counted("forward", version, residual_forward, *three)
for version in (1, 2):
    counted("backward", version, residual_backward, *three)

# %% [markdown]
# The same sectors, with about a quarter of the requests.
#
# ### The addition and what follows it
#
# The sum goes to memory, and the next layer, LayerNorm
# ([chapter 1.6](06_layernorm.ipynb)), reads it back at once. A *fused* kernel
# does both: whoever has computed a sum still has it in a register. Sum and
# normalised sum are both written, because the stream needs the one and the
# next product the other. Count the bytes of main memory for an element:
#
# | | reads | writes | |
# |---|---|---|---|
# | addition | `inp1`, `inp2` | the sum | 12 |
# | LayerNorm | the sum | `out` | 8 |
# | both in one | `inp1`, `inp2` | the sum, `out` | 16 |
#
# The two numbers of a row, its mean and its deviation, hardly count, and
# `weight` and `bias`, which every row reads, come from a cache.
#
# **Version 1** has two launches: the addition above, and chapter 1.6's
# LayerNorm, the version that reads a row once. Its vectors want aligned
# arrays; a view that is not gets the version without vectors.


# %% fused, version 1 tags=["exporti"] module="cuda.residual"
def _unfused(residual, out, mean, rstd, inp1, inp2, weight, bias):
    residual_forward(residual, inp1, inp2)
    version = 4 if aligned(residual, out, weight, bias) else 2
    rows = [x.reshape(1, *x.shape) for x in (out, mean, rstd, residual)]
    normalise(*rows, weight, bias, version=version)


# %% [markdown]
# **Version 2** is one kernel, in which each warp owns a row. Lane $l$ takes
# channels $l$, $l + 32$, $l + 64$ and so on, and keeps its sums in an array
# of its own. Where every index into such an array is known to the compiler,
# the array is no memory at all: its elements are registers. So the loops
# need a number of turns that is fixed when the kernel is compiled, and
# there is one kernel for each number. A function makes it, and `turns` is a
# constant to the compiler. Lanes without a channel in the last turn take no
# part in it.


# %% fused, version 2 tags=["exporti"] module="cuda.residual"
@cache
def _fused_elements(turns):
    @kernel
    def fused_elements(residual, out, mean, rstd, inp1, inp2, weight, bias):
        row, lane = cuda.grid(1) // 32, cuda.threadIdx.x % 32
        rows, C = out.shape
        if row >= rows:
            return
        mine, size = cuda.local.array(turns, np.float32), np.float32(C)
        total = ZERO
        for k in range(turns):
            c = lane + 32 * k
            if c < C:
                x = inp1[row, c] + inp2[row, c]
                residual[row, c] = mine[k] = x
                total += x
        mu = warp_sum(total) / size
        total = ZERO
        for k in range(turns):
            if lane + 32 * k < C:
                x = mine[k] - mu
                total += x * x
        r = ONE / math.sqrt(warp_sum(total) / size + EPS)
        if lane == 0:
            mean[row], rstd[row] = mu, r
        for k in range(turns):
            c = lane + 32 * k
            if c < C:
                out[row, c] = (mine[k] - mu) * r * weight[c] + bias[c]

    return fused_elements


# %% [markdown]
# **Version 3** moves four channels at once. Lane $l$ takes channels $4l$ to
# $4l + 3$, then the four that begin at $4l + 128$, and so on. It needs rows
# that begin at a multiple of 16 bytes, hence a number of channels that is
# divisible by 4; other rows go to version 2. A row of more than 2048
# channels is too long for registers and goes to version 1.


# %% four channels of a row tags=["exporti"] module="cuda.residual"
@device
def _add_four(mine, k, residual, inp1, inp2, i):
    """Add, store and keep four channels from i on; return their sum."""
    a, b, c, d = load4(inp1, i)
    e, f, g, h = load4(inp2, i)
    a, b, c, d = a + e, b + f, c + g, d + h
    store4(residual, i, a, b, c, d)
    mine[k], mine[k + 1], mine[k + 2], mine[k + 3] = a, b, c, d
    return (a + b) + (c + d)


@device
def _normalise_four(mine, k, mu, r, out, i, weight, bias, channel):
    """Normalise the four channels that were kept, and store them."""
    a, b = (mine[k] - mu) * r, (mine[k + 1] - mu) * r
    c, d = (mine[k + 2] - mu) * r, (mine[k + 3] - mu) * r
    e, f, g, h = load4(weight, channel)
    a, b, c, d = a * e, b * f, c * g, d * h
    e, f, g, h = load4(bias, channel)
    store4(out, i, a + e, b + f, c + g, d + h)


# %% fused, version 3 tags=["exporti"] module="cuda.residual"
@cache
def _fused_fours(turns):
    width = 4 * turns

    @kernel
    def fused_fours(residual, out, mean, rstd, inp1, inp2, weight, bias):
        row, lane = cuda.grid(1) // 32, cuda.threadIdx.x % 32
        rows, C = out.shape
        if row >= rows:
            return
        mine, size = cuda.local.array(width, np.float32), np.float32(C)
        total, i = ZERO, row * C
        for k in range(turns):
            c = 4 * (lane + 32 * k)
            if c < C:
                total += _add_four(mine, 4 * k, residual, inp1, inp2, i + c)
        mu = warp_sum(total) / size
        total = ZERO
        for k in range(width):
            if 4 * (lane + 32 * (k // 4)) < C:
                x = mine[k] - mu
                total += x * x
        r = ONE / math.sqrt(warp_sum(total) / size + EPS)
        if lane == 0:
            mean[row], rstd[row] = mu, r
        for k in range(turns):
            c, at = 4 * (lane + 32 * k), 4 * k
            if c < C:
                _normalise_four(mine, at, mu, r, out, i + c, weight, bias, c)

    return fused_fours


# %% who owns what
from llmnb.book.owners import draw_owners

fig, axes = plt.subplots(2, 1, figsize=(9, 1.7), dpi=100)
lanes = np.arange(36)
draw_owners(axes[0], [lanes % 32], "version 2")
draw_owners(axes[1], [lanes // 4], "version 3")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.10.2. The lanes of a warp that own the 36 channels of a row. By
# ones (version 2), all 32 lanes work in the first turn and 4 in the second.
# By fours (version 3), one turn is enough, and 9 lanes work. The 768
# channels of GPT-2 keep all lanes busy for 24 turns by ones, and for 6 by
# fours.*


# %% launches of the fused kernels tags=["exporti"] module="cuda.residual"
def _by_rows(make, per_turn, *arrays):
    rows, C = arrays[1].shape
    turns, blocks = (C + per_turn - 1) // per_turn, (rows + ROWS - 1) // ROWS
    make(turns)[blocks, 32 * ROWS](*arrays)


def _fused_by_element(*arrays):
    if arrays[1].shape[1] > WIDEST:
        return _unfused(*arrays)
    return _by_rows(_fused_elements, 32, *arrays)


def _fused_by_four(*arrays):
    residual, out, _, _, *others = arrays
    C = out.shape[1]
    if C % 4 or C > WIDEST or not aligned(residual, out, *others):
        return _fused_by_element(*arrays)
    return _by_rows(_fused_fours, 128, *arrays)


# %% residual and LayerNorm tags=["export"] module="cuda.residual"
# two launches; a warp a row, the sum in registers; the same with vectors
FUSED_RESIDUAL_FORWARD = (_unfused, _fused_by_element, _fused_by_four)


@shapes("... C!, ... C!, ...!, ...!, ... C~, ... C~, C, C", DEVICE)
def fused_residual_forward(
    residual, out, mean, rstd, inp1, inp2, weight, bias, version=3
):  # fmt: skip
    """Add two arrays, and normalise each row of the sum.

    As `residual_forward(residual, inp1, inp2)` and then `layernorm_forward(
    out, mean, rstd, residual, weight, bias)`. residual, out, inp1, inp2: a
    device's arrays of one shape (..., C), float32; residual may be inp1 or
    inp2. mean, rstd: (...). weight, bias: (C,). residual, out, mean and rstd
    are overwritten. C must be at least 1; without rows nothing is launched.
    version: which kernel, from 1 on. Raises TypeError or ValueError before
    it launches anything.
    """
    label = "fused_residual_forward"
    run = numbered(FUSED_RESIDUAL_FORWARD, version, label)
    C = len(weight)
    if not C:
        raise ValueError(f"{label}: inp1 must have channels, got {inp1.shape}")
    whole, stats = (residual, out, inp1, inp2), (mean, rstd)
    sums, outs, a, b = (x.reshape(-1, C) for x in whole)
    stats = (x.reshape(-1) for x in stats)
    if inp1.size:
        run(sums, outs, *stats, a, b, weight, bias)


# %% the same results from one kernel
from llmnb.reference.layernorm import layernorm_backward, layernorm_forward

draw = np.random.default_rng(9).normal
p, q = draw(size=(2, 3, 2, 100)).astype(np.float32)
w, c = draw(size=(2, 100)).astype(np.float32)
want = np.empty_like(p), np.empty_like(p), *np.empty((2, 3, 2), "f4")
reference.forward(want[0], p, q)
layernorm_forward(*want[1:], want[0], w, c)
for version in (1, 2, 3):
    there = [to_device(x) for x in (p, q, w, c)]
    got = [empty(x.shape, like=there[0]) for x in want]
    fused_residual_forward(*got, *there, version=version)
    off = [
        np.abs(to_host(x) - y).max() for x, y in zip(got, want, strict=True)
    ]
    verdict(f"version {version}", max(off) < 3e-6, "all four within 3e-06")

# %% what the simulator counts
shapes = [(6, 256)] * 2 + [(6,)] * 2 + [(6, 256)] * 2 + [(256,)] * 2
arrays = [simulated(np.ones(x, np.float32)) for x in shapes]
for version in (1, 2, 3):
    counted("fused", version, fused_residual_forward, *arrays)

# %% [markdown]
# The simulator knows no cache: it counts the 8 bytes of `weight` and `bias`
# for every element. Without these, 28 become the 20 of the table, and 24
# the 16. So fusion moves a fifth less, and it saves a launch. Version 2
# makes more requests than version 1, whose kernels have vectors; version 3
# has them too. The compiler counts registers: at 768 channels both fused
# kernels keep 24 sums a lane, and version 3 needs about half as many
# registers as version 2, which finds a place for each channel and not for
# every fourth. That leaves room for more warps.
#
# **Where it would be used.** The model calls neither this function nor the
# plain ones: as on the CPU, the product that comes before folds the addition
# into its own last step (`residual=` in [chapter 1.7](07_matmul.ipynb)),
# where the other term is in registers already. Compare all three layers,
# from the product's result on: the product writes 4 bytes, the fused kernel
# moves 16, together 20 bytes an element. The product that adds reads the
# stream and writes the sum, 8, and LayerNorm moves 8, together 16. The fused
# kernel is for a product that comes from a library and cannot add a second
# array as it ends, or for a stream that gets its second term from elsewhere.
#
# How long any of these takes on a GPU is measured by `llmnb bench --backend
# cuda --kernels`, where there is one; the results page shows it once it is
# measured.

# %% [markdown]
# ## Count it
#
# With 4-byte numbers forward moves 12 bytes an element, two reads and one
# write, for one addition. Backward moves 20, three reads and two writes,
# for two.

# %% predicted traffic and intensity
elements = 4 * 1024 * 768
traffic = {"forward": 12 * elements, "backward": 20 * elements}
for name, additions in (("forward", 1), ("backward", 2)):
    intensity = additions * elements / traffic[name]
    print(f"{name:<9} {traffic[name]:>10,} bytes, {intensity:.2f} FLOP a byte")

# %% predicted against measured time tags=["nbval-ignore-output"]
p, q = np.ones((2, 1 << 25), np.float32)
bandwidth = 2 * p.nbytes / fastest(np.copyto, p, q, runs=5)
print(f"copy: {bandwidth / 1e9:.1f} GB/s")
for name, moved in traffic.items():
    ms = moved / bandwidth * 1e3
    print(f"{name:<9} {ms:.2f} ms predicted, {times[name] * 1e3:.2f} measured")

# %% [markdown]
# A time below the prediction means that part of the arrays was still in
# the last-level cache, or that the copy, which runs on one core, did not use
# all that the memory can deliver. Nothing is saved for the backward pass.
#
# ## See it: a gradient on its way down
#
# What is the addition for? Take the chain of $2L$ half blocks. Without the
# addition, $x_{l+1} = f_l(x_l)$, the gradient at the bottom is the gradient
# at the top times a product of Jacobians; with it, each factor gets the
# identity matrix $I$. With the gradients as row vectors,
#
# $$ dx_0 = dx_{2L}\, J_{2L-1} \cdots J_1 J_0
#    \quad\text{against}\quad
#    dx_0 = dx_{2L}\, (I + J_{2L-1}) \cdots (I + J_1)(I + J_0) . \tag{1.10.4} $$
#
# With one channel the Jacobians are plain slopes. Let each be 0.3, up or
# down. A product of 24 such slopes has size $0.3^{24}$, about
# $3 \cdot 10^{-13}$: the first layers would learn nothing. The factors
# $1 \pm 0.3$ scatter about 1, and their product stays within reach of 1.
# Multiply the second product out and you find $I$ alone among its terms:
# one road on which the gradient passes no layer at all.
#
# Now with real layers. Our $f$ is the second half of a GPT-2 block,
# LayerNorm, a matrix up to 4C channels, GELU, a matrix down to C, with
# GPT-2's first weights. Those are normal with deviation 0.02 at C = 768; we
# take fewer channels and raise the deviation, so that sums have the same
# size as there. We can leave out LayerNorm, the addition, or both. Besides
# the size of a gradient we watch its *alignment* with the one at the top,
# the cosine of the angle between the two: 1 for the same direction, near 0
# for directions that have nothing to do with each other.

# %% one half block
from llmnb.reference.layernorm import layernorm_backward, layernorm_forward

C, N, L = 96, 16, 12
DEVIATION = 0.02 * np.sqrt(768 / C)
one, nil = np.ones(C), np.zeros(C)


def half_block(x, seed, scale, norm):
    draw = np.random.default_rng(seed).normal
    h = SimpleNamespace(inp=x, out=x)
    if norm:
        h.out, h.stats = np.empty_like(x), np.empty((2, *x.shape[:2]))
        layernorm_forward(h.out, *h.stats, x, one, nil)
    h.up = draw(0, DEVIATION, (4 * C, C))
    h.down = draw(0, DEVIATION * scale, (C, 4 * C))
    h.wide = h.out @ h.up.T
    h.bent = np.empty_like(h.wide)
    gelu_forward(h.bent, h.wide)
    h.out = h.bent @ h.down.T
    return h


# %% its gradient
def half_block_backward(h, dout, norm):
    dwide = np.zeros_like(h.wide)
    gelu_backward(dwide, dout @ h.down, h.wide)
    dnormed = dwide @ h.up
    if not norm:
        return dnormed
    dinp = np.zeros_like(h.inp)
    unused = np.zeros((2, C))
    layernorm_backward(dinp, *unused, dnormed, h.inp, one, *h.stats)
    return dinp


# %% down the whole chain
start, top = rng.normal(size=(2, 1, N, C))


def chain(halves, residual, norm, scale=1.0):
    x, variances, blocks = start, [start.var()], []
    for seed in range(halves):
        blocks.append(half_block(x, seed, scale, norm))
        x = blocks[-1].out + (x if residual else 0)
        variances.append(x.var())
    d, grads = top, [top]
    for h in reversed(blocks):
        through = half_block_backward(h, d, norm)
        d = through + (d if residual else 0)
        grads.append(d)
    return np.array(variances), grads[::-1]


size = np.linalg.norm


def alignment(d):
    return (d * top).sum() / size(d) / size(top)


chains = {
    "neither": chain(2 * L, residual=False, norm=False),
    "LayerNorm": chain(2 * L, residual=False, norm=True),
    "addition": chain(2 * L, residual=True, norm=False),
    "both": chain(2 * L, residual=True, norm=True),
}

# %% the size and the direction of the gradient
fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.6), dpi=100)
colours = [PALETTE[c] for c in ("blue", "purple", "green", "orange")]
for (name, (_, grads)), colour, style in zip(
    chains.items(), colours, ("-", "--", ":", "-"), strict=True
):
    line = {"color": colour, "ls": style, "label": name, "lw": 2}
    left.semilogy([size(d) / size(top) for d in grads], **line)
    right.plot([alignment(d) for d in grads], **line)
left.set(title="size of the gradient", xlabel="half block")
right.set(title="alignment with the top", xlabel="half block")
right.set(ylim=(-0.15, 1.05))
left.legend(frameon=False)
for ax in (left, right):
    ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.10.3. The gradient enters at the right, above half block 24, and
# travels left. With neither LayerNorm nor the addition it shrinks to a
# third at each half block and ends below a millionth of a millionth of its
# size. LayerNorm alone keeps the size, and the direction is lost after one
# half block. The addition alone keeps the size within a factor of ten, and
# the direction fades. With both, the size lasts, and nearly half of the
# alignment is left at the bottom.*
#
# The left panel shows what (1.10.4) promised. The right one shows why size is
# not enough: LayerNorm multiplies a vanishing signal up again, and what
# comes out is large and scrambled. The addition keeps a share of the loss's
# own gradient in every layer. With the addition alone, each half block adds
# in proportion to the stream, which grows like compound interest; LayerNorm
# in front of the half block makes that a straight line, as we see next.

# %% the same in numbers that could fail
ends = {name: grads[0] for name, (_, grads) in chains.items()}
ratio = {name: size(d) / size(top) for name, d in ends.items()}
verdict("neither", ratio["neither"] < 1e-12, "is below 1e-12 of the top")
for name in ("LayerNorm", "addition", "both"):
    verdict(name, 0.1 < ratio[name] < 10, "within 10 times the top")
cosine = {name: alignment(d) for name, d in ends.items()}
verdict("both", cosine["both"] > 0.3, "aligned more than 0.3")
for name in ("neither", "LayerNorm"):
    verdict(name, abs(cosine[name]) < 0.1, "aligned less than 0.1")

# %% [markdown]
# ## See it: the stream grows
#
# The addition has a price. Each half block adds something to the stream.
# LayerNorm stands first in $f$, so the size of what is added does not depend
# on the size of the stream: every half block adds about the same variance
# $s$; and before training, with random weights, what it adds is unrelated to
# what is there, so variances sum:
#
# $$ \operatorname{Var}(x_{l+1}) \approx \operatorname{Var}(x_l) + s ,
#    \qquad \operatorname{Var}(x_{2L}) \approx \operatorname{Var}(x_0)
#    + 2L\, s . \tag{1.10.5} $$
#
# A late half block adds its $s$ to a stream of variance near $2Ls$ and
# hardly changes it, the less the deeper the model. GPT-2's remedy is to
# multiply the first weights of the last matrix of each half block by
# $1/\sqrt{2L}$. The outputs shrink by that factor, their variances by its
# square, and
#
# $$ \operatorname{Var}(x_{2L}) \approx \operatorname{Var}(x_0)
#    + 2L\, \frac{s}{2L} = \operatorname{Var}(x_0) + s , \tag{1.10.6} $$
#
# for any depth. We measure it for 12 and for 48 blocks:

# %% the variance along the stream
streams = {}
for depth in (12, 48):
    for scale in (1.0, 1 / np.sqrt(2 * depth)):
        variances, grads = chain(2 * depth, True, True, scale)
        streams[depth, scale < 1] = variances, grads[0]
s = half_block(start, 0, 1.0, True).out.var()

# %% draw it
fig, ax = plt.subplots(figsize=(7, 3.8), dpi=100)
for (depth, scaled), (variances, _) in streams.items():
    colour = PALETTE["blue" if scaled else "orange"]
    name = f"L = {depth}, " + ("scaled" if scaled else "not scaled")
    style = {"ls": "--" if depth == 12 else "-", "lw": 2}
    x = np.linspace(0, 1, len(variances))
    ax.plot(x, variances, color=colour, label=name, **style)
    rate = s / (2 * depth) if scaled else s
    line = variances[0] + rate * 2 * depth * x
    ax.plot(x, line, color=PALETTE["grey"], lw=1, zorder=0)
ax.set(xlabel="depth, as a share of the chain", ylabel="variance")
ax.set(title="variance of the residual stream", ylim=(0, None))
ax.legend(frameon=False)
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.10.4. Without scaling, the variance of the stream climbs on a
# straight line with the number of half blocks, four times as far for 48
# blocks as for 12. With the factor $1/\sqrt{2L}$ both depths end at the
# same variance, a little above where they began. Thin grey lines: (1.10.5)
# and (1.10.6), with $s$ measured on the first half block.*
#
# The gradient gains as well: by (1.10.3) its growth obeys the same
# arithmetic, with the Jacobian in place of the output.

# %% growth against prediction
for (depth, scaled), (variances, bottom) in streams.items():
    name = f"L={depth}" + (", scaled" if scaled else "")
    growth = variances[-1] - variances[0]
    predicted = s if scaled else 2 * depth * s
    close = abs(growth / predicted - 1) < 0.25
    verdict(name, close, "as predicted, to 25 %")
    if scaled:
        verdict(name, alignment(bottom) > 0.9, "gradient aligned > 0.9")

# %% [markdown]
# [Chapter 1.14](14_weights.ipynb) draws the first weights with this factor.

# %% [markdown]
# ## Take away
#
# - A residual connection adds a layer's output to its input; its gradient
#   goes to both unchanged.
# - The stream is read twice, so its gradient is a sum: backward adds.
# - An addition is all traffic. Fused with what comes before or after it, it
#   spares a trip through memory.
# - Along a chain the addition puts $I + J$ in place of $J$. The gradient
#   reaches the first layer with its size and much of its direction.
# - The stream's variance grows with depth; $1/\sqrt{2L}$ in the first
#   weights makes the growth the same for every depth.

# %% [markdown]
# ## Design note
#
# The model of [chapter 1.15](15_model.ipynb) calls neither function. Forward,
# the product that makes a layer's output adds the stream on the way to
# memory (`residual=` in [chapter 1.7](07_matmul.ipynb)), and a pass over three
# arrays is saved. Backward, (1.10.2) says that the gradient of the stream is the
# gradient of the sum. So the model keeps one array for both and lets each
# layer add its share to it: nothing is left to compute. The functions stay
# because they are the equations, and everything faster is tested against
# them.
#
# That one array must not be had by accident. The rule is that backward adds,
# and an exception to it should stand in the call, as `add=False` does for
# GELU. An array that is passed twice says nothing, so `residual_backward`
# refuses such a call.

# %% [markdown]
# ## Exercises
#
# **1** (★). A layer adds the stream to itself, $y = x + x$. What is $dx$?
# Predict what the two lines of the NumPy version leave in `dx` when both their
# outputs are `dx`, and what a version would leave that writes where ours
# adds. (`backward.__wrapped__` is the function without its decorator, which
# would refuse.)
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# $y = 2x$, so $dx = 2\,dy$. NumPy carries out one line after the other and
# adds `dout` twice, which is right. A version that writes would leave
# `dout`, half of the truth.
# :::


# %% exercise 1, a solution tags=["hide-cell"]
def prediction(dout):
    return 2 * dout


# %% exercise 1, checked
dx = np.zeros_like(d)
reference.backward.__wrapped__(dx, dx, d)
verdict("x + x", np.array_equal(dx, prediction(d)), "as predicted")

# %% [markdown]
# **2** (★★). Let the slopes $a_l$ of a one-channel chain be independent,
# with mean 0 and variance $\sigma^2$. What is the mean of the squared
# gradient $\prod_l (1 + a_l)^2$ over $2L$ half blocks? And with every slope
# scaled by $1/\sqrt{2L}$? Give the limit for large $L$.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# The mean of a product of independent factors is the product of their
# means, and the mean of $(1 + a)^2$ is $1 + \sigma^2$. So it is
# $(1 + \sigma^2)^{2L}$, which grows without limit, and scaled
# $(1 + \sigma^2 / 2L)^{2L}$, which approaches $e^{\sigma^2}$.
# :::


# %% exercise 2, a solution tags=["hide-cell"]
def mean_square(variance, halves):
    return (1 + variance) ** halves


# %% exercise 2, checked
slopes = rng.choice([-0.3, 0.3], (200_000, 24)) / np.sqrt(24)
measured = ((1 + slopes) ** 2).prod(axis=1).mean()
compare("drawn", measured, mean_square(0.09 / 24, 24), tol=0.01)
compare("limit", mean_square(0.09 / 1e6, 1e6), np.exp(0.09), tol=1e-6)

# %% [markdown]
# **3** (★★). GPT-2 places LayerNorm inside the half block. The first
# transformer placed it after the addition, $x_{l+1} =
# \operatorname{LN}(x_l + f(x_l))$, with no LayerNorm in $f$. Let the
# gradient run down 24 such half blocks without scaling. Does it keep its
# direction as well as with GPT-2's placement?
#
# :::{admonition} Solution to exercise 3
# :class: dropdown
# No. Every LayerNorm stands in the stream itself, divides the gradient by
# the deviation there and takes two components away, so no road is left on
# which the gradient passes unchanged. Its alignment with the top ends
# below that of figure 1.10.3.
# :::


# %% exercise 3, a solution tags=["hide-cell"]
def norm_after(halves):
    x, saved = start, []
    for seed in range(halves):
        h = half_block(x, seed, 1.0, norm=False)
        total, x = x + h.out, np.empty_like(x)
        stats = np.empty((2, 1, N))
        layernorm_forward(x, *stats, total, one, nil)
        saved.append((h, total, stats))
    d = top
    for h, total, stats in reversed(saved):
        dtotal = np.zeros_like(d)
        layernorm_backward(dtotal, *np.zeros((2, C)), d, total, one, *stats)
        d = dtotal + half_block_backward(h, dtotal, norm=False)
    return d


# %% exercise 3, checked
after, before = norm_after(2 * L), ends["both"]
less = alignment(after) < alignment(before) - 0.1
verdict("LN after", less, "aligned less")

# %% [markdown]
# **4** (★★). A stream gets two terms at once, $y = x + f(x) + h(x)$. Write a
# kernel that adds three arrays, a thread an element. How many bytes does it
# move for an element, and how many do two calls of `residual_forward`?
#
# :::{admonition} Solution to exercise 4
# :class: dropdown
# Three reads and a write, 16 bytes, against two times 12. The first sum
# stays in a register.
# :::


# %% exercise 4, the kernel tags=["hide-cell"]
@kernel
def add_three(out, x, f, h):
    i = cuda.grid(1)
    if i < out.size:
        out[i] = x[i] + f[i] + h[i]


# %% exercise 4, checked
arrays = [simulated(np.full(500, k, np.float32)) for k in (0, 1, 2, 4)]
with watch() as together:
    add_three[2, 256](*arrays)
verdict("the sum", (to_host(arrays[0]) == 7).all(), "is right")
with watch() as apart:
    residual_forward(arrays[0], arrays[1], arrays[2])
    residual_forward(arrays[0], arrays[0], arrays[3])
for name, seen, want in (("one", together, 16), ("two", apart, 24)):
    moved = seen.read_bytes + seen.written_bytes
    verdict(f"{name}", moved == want * 500, f"{want} bytes an element")

# %% [markdown]
# ## Further reading
#
# - He, Zhang, Ren and Sun (2015),
#   [Deep Residual Learning for Image Recognition](https://arxiv.org/abs/1512.03385):
#   figure 1, where a deeper network without the addition trains worse.
# - He, Zhang, Ren and Sun (2016),
#   [Identity Mappings in Deep Residual Networks](https://arxiv.org/abs/1603.05027):
#   section 2 derives the road of (1.10.4) that passes no layer, and argues for
#   a stream that nothing interrupts.
# - Balduzzi et al. (2017),
#   [The Shattered Gradients Problem](https://arxiv.org/abs/1702.08591):
#   why size alone does not make a gradient useful.
# - Radford et al. (2019),
#   [Language Models are Unsupervised Multitask Learners](https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf):
#   section 2.3 names the scaling of the residual layers' first weights.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.10")
