# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       cuda.walks: "Attention on a GPU, backward: one walk by keys and one by queries."
# ---

# %% [markdown]
# # Attention backward on a GPU: two walks
#
# > The gradient of the keys sums over queries, that of the queries over keys.
# > Each wants an owner of its own, and gets a walk of its own.
#
# *Reading time: 16 minutes. You need: [chapter 3.9](09_attention.ipynb), whose
# pieces do the work again.*

# %% [markdown]
# ## Where we are
#
# $dq_t$ is a sum over keys; $dk_u$ and $dv_u$ are sums over queries, (1.8.5)
# and (1.8.10). On a CPU one thread had a whole head and could add to all three
# on one walk. A GPU has far more places to fill than there are heads. At the
# end of this chapter you can
#
# - say why a block that owns keys must not add to $dq$;
# - find the tiles that each of the two kernels owns, and what that costs.
#
# No GPU has run this chapter yet: what it shows comes from the simulator.

# %% [markdown]
# ## Setup

# %% setup
from types import SimpleNamespace

import numpy as np

from llmnb.book.verify import compare, verdict
from llmnb.gpu.launch import simulated, to_device, to_host
from llmnb.gpu.simulator import RaceError, watch
from llmnb.reference.attention import attention_backward as backward_numpy
from llmnb.reference.attention import attention_forward as forward_numpy

rng = np.random.default_rng(6)


# %% a problem of any size
def problem(B, T, NH, hs):
    p = SimpleNamespace()
    p.inp = rng.normal(size=(B, T, 3 * NH * hs)).astype(np.float32)
    p.dout = rng.normal(size=(B, T, NH * hs)).astype(np.float32)
    p.out, p.dinp = np.zeros_like(p.dout), np.zeros_like(p.inp)
    p.lse = np.zeros((B, NH, T), np.float32)
    forward_numpy(p.out, p.lse, p.inp)
    return p


# %% imports of the GPU's kernels tags=["export"] module="cuda.walks"
import functools
import math

import numpy as np

from llmnb.cuda.attention import (
    _side,
    _stride,
    _tile_add,
    _tile_copy,
    _tile_dots,
    _tile_write,
    check_heads,
)
from llmnb.gpu.launch import DEVICE, aligned, device, empty, kernel
from llmnb.gpu.simulator import cuda
from llmnb.gpu.warp import warp_sum
from llmnb.shapes import shapes

# %% [markdown]
# ## One number a row
#
# First $D_t$, (1.8.9), which both walks need. A warp takes a row of a head; its
# lanes read neighbours.


# %% the dot products of the rows tags=["exporti"] module="cuda.walks"
@kernel
def _attention_rows(D, dout, out, NH):
    """A warp a row of a head: (1.8.9). D: (B * NH, T)."""
    B, T, C = out.shape
    row, lane = cuda.grid(1) // 32, cuda.grid(1) % 32
    b, t, h = row // (T * NH), row // NH % T, row % NH
    hs = C // NH
    if b < B:
        total = np.float32(0)
        for i in range(h * hs + lane, h * hs + hs, 32):
            total += dout[b, t, i] * out[b, t, i]
        total = warp_sum(total)
        if lane == 0:
            D[b * NH + h, t] = total


# %% [markdown]
# ## Two walks
#
# The two kinds of sums want different owners, as in the two halves of
# figure 3.9.1. Could a block
# that owns keys add to $dq$ on its way? Here is that in small, a block for
# each key and a thread for each channel:


# %% a block for each key adds to dq
@kernel
def dq_by_key(dq, ds, k):
    u, i = cuda.blockIdx.x, cuda.threadIdx.x
    for t in range(u, dq.shape[0]):
        dq[t, i] += ds[t, u] * k[u, i]


small = [rng.normal(size=(3, n)).astype(np.float32) for n in (4, 3, 4)]
with watch():
    try:
        dq_by_key[3, 4](*map(simulated, small))
        caught = False
    except RaceError as error:
        print(error)
        caught = True
verdict("the race", caught, "is caught")

# %% [markdown]
# Other blocks add to the same numbers at the same time, and some of what
# they add is lost. Atomic additions would lose nothing, but their order, and
# with it the last bits, would change from run to run. So we walk twice: one
# kernel owns tiles of keys and walks down, for $dk$ and $dv$, and another
# owns tiles of queries and walks to the right, for $dq$. The price is that
# both take the products $S$ and $dE$ of (2.5.3): seven in all instead of
# five. It buys that every number has one owner, which sums in one order.
#
# The pieces of the forward pass do the work, now for blocks of 64 threads in
# 8 rows of 8, which take 32 queries and 32 keys ($G = 8$, $R = 4$). In the
# first kernel the *rows* of a tile are keys and its columns queries, so its
# scores are transposed: $E^\top$ and $dS^\top$ stand in shared memory ready
# for $dV \mathrel{+}= E^\top dO$ and $dK \mathrel{+}= dS^\top Q$. Four tiles
# of 32 rows and one of 32 x 40 weights take 39,936 bytes at $hs = 64$. The
# weights' tile serves twice: $E^\top$ first, and once the warp has read it,
# $dS^\top$. Its rows again belong to one warp each, whose barrier is enough.


# %% weights and gradients of a tile tags=["exporti"] module="cuda.walks"
@functools.cache
def _tile_gradients(R, BY_KEY):
    """gradients(s, ds, lse, D, head, first, start, scale): (1.8.4), (1.8.8).

    s, ds hold dot products of a tile; they become weights and gradients of
    scores. BY_KEY: whether its rows, from `first` on, are keys and its
    columns, from `start` on, queries; else the other way.
    """

    @device
    def gradients(s, ds, lse, D, head, first, start, scale):
        row, lane = cuda.threadIdx.x // 8, cuda.threadIdx.x % 8
        T = lse.shape[1]
        for r in range(R):
            for j in range(R):
                t, u = first + row + 8 * r, start + lane + 8 * j
                if BY_KEY:
                    t, u = u, t
                a = d = np.float32(0)
                if u <= t and t < T:
                    a = math.exp(s[R * r + j] * scale - lse[head, t])
                    d = a * (ds[R * r + j] - D[head, t]) * scale
                s[R * r + j], ds[R * r + j] = a, d

    return gradients


# %% hand numbers to the warp tags=["exporti"] module="cuda.walks"
@functools.cache
def _tile_share(R):
    """share(weights, s): a thread's R * R numbers to shared memory."""

    @device
    def share(weights, s):
        row, lane = cuda.threadIdx.x // 8, cuda.threadIdx.x % 8
        cuda.syncwarp()  # whoever still reads the last ones
        for r in range(R):
            for j in range(R):
                weights[row + 8 * r, lane + 8 * j] = s[R * r + j]
        cuda.syncwarp()

    return share


# %% walk over queries tags=["exporti"] module="cuda.walks"
@functools.cache
def _keys_kernel(hs, FOURS):
    R, STRIDE = _side(hs), _stride(hs)
    ROWS, WIDTH = 8 * R, 8 * R + 8
    SUMS, PAIRS = R * (STRIDE // 8), R * R
    copy, write = _tile_copy(hs, FOURS), _tile_write(hs, 8, R, FOURS)
    dots, add = _tile_dots(hs, 8, R), _tile_add(hs, 8, R)
    gradients, share = _tile_gradients(R, True), _tile_share(R)

    @kernel(launch_bounds=64)
    def attention_backward_keys(dinp, dout, inp, lse, D, NH, scale, more):
        T, C = lse.shape[1], NH * hs
        tiles = (T + ROWS - 1) // ROWS
        head = cuda.blockIdx.x // tiles
        first = cuda.blockIdx.x % tiles * ROWS
        y = head // NH * T * C + head % NH * hs
        x = head // NH * T * 3 * C + head % NH * hs
        k = cuda.shared.array((ROWS, STRIDE), np.float32, alignment=16)
        v = cuda.shared.array((ROWS, STRIDE), np.float32, alignment=16)
        q = cuda.shared.array((ROWS, STRIDE), np.float32, alignment=16)
        do = cuda.shared.array((ROWS, STRIDE), np.float32, alignment=16)
        weights = cuda.shared.array((ROWS, WIDTH), np.float32, alignment=16)
        dk = cuda.local.array(SUMS, np.float32)
        dv = cuda.local.array(SUMS, np.float32)
        s = cuda.local.array(PAIRS, np.float32)
        ds = cuda.local.array(PAIRS, np.float32)
        for n in range(SUMS):
            dk[n] = dv[n] = np.float32(0)
        copy(k, inp, x + C, 3 * C, first, T)
        copy(v, inp, x + 2 * C, 3 * C, first, T)
        for start in range(first, T, ROWS):
            cuda.syncthreads()
            copy(q, inp, x, 3 * C, start, T)
            copy(do, dout, y, C, start, T)
            cuda.syncthreads()
            dots(s, k, q)
            dots(ds, v, do)
            gradients(s, ds, lse, D, head, first, start, scale)
            share(weights, s)
            add(dv, weights, do)
            share(weights, ds)
            add(dk, weights, q)
        write(dinp, dk, x + C, 3 * C, first, T, more)
        write(dinp, dv, x + 2 * C, 3 * C, first, T, more)

    return attention_backward_keys


# %% [markdown]
# The second kernel keeps half as many sums. `launch_bounds=(64, 5)` asks the
# compiler to leave room for five of its blocks on a multiprocessor: 65,536
# registers for 320 threads are 204 each.


# %% walk over keys tags=["exporti"] module="cuda.walks"
@functools.cache
def _queries_kernel(hs, FOURS):
    R, STRIDE = _side(hs), _stride(hs)
    ROWS, WIDTH = 8 * R, 8 * R + 8
    SUMS, PAIRS = R * (STRIDE // 8), R * R
    copy, write = _tile_copy(hs, FOURS), _tile_write(hs, 8, R, FOURS)
    dots, add = _tile_dots(hs, 8, R), _tile_add(hs, 8, R)
    gradients, share = _tile_gradients(R, False), _tile_share(R)

    @kernel(launch_bounds=(64, 5))
    def attention_backward_queries(dinp, dout, inp, lse, D, NH, scale, more):
        T, C = lse.shape[1], NH * hs
        tiles = (T + ROWS - 1) // ROWS
        head = cuda.blockIdx.x // tiles
        first = (tiles - 1 - cuda.blockIdx.x % tiles) * ROWS
        y = head // NH * T * C + head % NH * hs
        x = head // NH * T * 3 * C + head % NH * hs
        q = cuda.shared.array((ROWS, STRIDE), np.float32, alignment=16)
        do = cuda.shared.array((ROWS, STRIDE), np.float32, alignment=16)
        k = cuda.shared.array((ROWS, STRIDE), np.float32, alignment=16)
        v = cuda.shared.array((ROWS, STRIDE), np.float32, alignment=16)
        weights = cuda.shared.array((ROWS, WIDTH), np.float32, alignment=16)
        dq = cuda.local.array(SUMS, np.float32)
        s = cuda.local.array(PAIRS, np.float32)
        ds = cuda.local.array(PAIRS, np.float32)
        for n in range(SUMS):
            dq[n] = np.float32(0)
        copy(q, inp, x, 3 * C, first, T)
        copy(do, dout, y, C, first, T)
        for start in range(0, min(first + ROWS, T), ROWS):
            cuda.syncthreads()
            copy(k, inp, x + C, 3 * C, start, T)
            copy(v, inp, x + 2 * C, 3 * C, start, T)
            cuda.syncthreads()
            dots(s, q, k)
            dots(ds, do, v)
            gradients(s, ds, lse, D, head, first, start, scale)
            share(weights, ds)
            add(dq, weights, k)
        write(dinp, dq, x, 3 * C, first, T, more)

    return attention_backward_queries


# %% [markdown]
# Where a model calls it, the $D_t$ lie in scratch memory of its own, one float
# a row.


# %% attention, backward tags=["export"] module="cuda.walks"
def attention_scratch(B, T, NH):
    """How many floats of `work` attention_backward wants."""
    return B * NH * T


@shapes("B T 3C!, B T C, B T 3C, B T C, B NH|C T", DEVICE, work="W!?")
def attention_backward(dinp, dout, inp, out, lse, add=True, work=None):
    """Add attention's gradient to dinp.

    dinp, inp: (B, T, 3C). dout, out: (B, T, C). lse: (B, NH, T). out and
    lse are as the forward pass left them. All float32 on a device; heads of
    at most 128 channels. add: False overwrites dinp instead of adding.
    work: scratch of attention_scratch() floats, or None to allocate it.
    Every element is summed in one order. Raises TypeError or ValueError
    before it launches anything.
    """
    name = "attention_backward"
    check_heads(name, lse, out.shape[2])
    B, NH, T = lse.shape
    hs, count = out.shape[2] // NH, attention_scratch(B, T, NH)
    work = empty(count, like=inp) if work is None else work
    if work.size < count:
        raise ValueError(
            f"{name}: work must hold {count} floats, got {work.size}"
        )
    scale, more = np.float32(1 / math.sqrt(hs)), int(add)
    D, lse = work[:count].reshape(B * NH, T), lse.reshape(B * NH, T)
    _attention_rows[-(-lse.size // 4), 128](D, dout, out, NH)
    grid, arrays = B * NH * -(-T // (8 * _side(hs))), (dinp, dout, inp)
    fours = hs % 4 == 0 and aligned(*arrays)
    args = *(x.reshape(-1) for x in arrays), lse, D, NH, scale, more
    _keys_kernel(hs, fours)[grid, 64](*args)
    _queries_kernel(hs, fours)[grid, 64](*args)


# %% [markdown]
# The verdicts, at sizes that divide no tile.


# %% backward against NumPy
def on_gpu(p, place=to_device):
    """dinp of a problem."""
    there = [place(x) for x in (p.dinp, p.dout, p.inp, p.out, p.lse)]
    attention_backward(*there)
    return to_host(there[0])


for hs in (5, 12):
    p = problem(1, 37, 2, hs)
    got = on_gpu(p)
    backward_numpy(p.dinp, p.dout, p.inp, p.out, p.lse)
    compare(f"{hs} channels", got, p.dinp, tol=1e-5)

# %% the same bits on every run
p = problem(1, 32, 1, 16)
same = np.array_equal(on_gpu(p), on_gpu(p))
verdict("another run", same, "gives the same bits")

# %% backward, counted
with watch() as seen:
    on_gpu(p, simulated)
print(f"{seen.sectors:,} sectors of global memory,", end=" ")
print(f"{seen.shared_passes:,} passes of shared memory")
floats = attention_scratch(16, 1024, 12)
print(f"{4 * floats:,} bytes of scratch for 16 sequences of 1024")

# %% [markdown]
# Kernels that keep the weights and the gradients of the scores in memory
# would need two squares of scratch, 1.6 GB for that batch.

# %% [markdown]
# ## Take away
#
# - A sum over queries and a sum over keys want different owners; a block that
#   adds to another's numbers races, or sums in an order that changes.
# - Two walks cost seven products instead of five, and give every number one
#   owner.

# % [markdown]
# ## What llmnb gained

# % what llmnb gained
from llmnb.book.index import gained

gained("3.30")
