# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       gpu.fragments: "Tensor cores: a product by a whole warp, and copies."
# ---

# %% [markdown]
# # Tensor cores: a warp multiplies matrices
#
# > One instruction multiplies two small matrices whose elements lie spread
# > over the registers of 32 lanes: which lane holds which element, how they
# > get there, and how the simulator does the same.
#
# *Reading time: 20 minutes. You need: products on a GPU
# ([chapter 3.6](06_matmul.ipynb)), how a warp exchanges numbers
# ([chapter 3.2](02_sectors.ipynb)) and bfloat16
# ([chapter 2.6](../2_cpu/06_bfloat16.ipynb)).*

# %% [markdown]
# ## Where we are
#
# In [chapter 3.6](06_matmul.ipynb) an FMA was an instruction of a lane. By
# NVIDIA's data sheets that makes 19.5 TFLOP/s on an A100 and 67 on an H100
# SXM. The same sheets say 312 and 989 TFLOP/s for *tensor cores* with factors
# in bfloat16, and sums in float32. A tensor core does not serve a lane. It
# takes two small matrices from a warp and hands back their product, so that
# one fetch of an instruction, and one read of each register, serves two
# thousand FMAs. At the end of this chapter you can
#
# - say which lane holds which element of the factors and of the sums;
# - bring a tile to the lanes in that order, with `ldmatrix`, and to shared
#   memory while the warp computes, with `cp.async`;
# - write a kernel with such instructions and run it on a machine that has none
#   of them, races looked for.
#
# The next chapters build on it the linear layer, attention, and training in
# bfloat16. No GPU has run their kernels, nor this chapter's. They run on the
# simulator, and tests compile theirs for the A100's and the H100's generations
# and look for the instructions in the machine code. A time that they give is a
# prediction: none is measured.

# %% [markdown]
# ## Setup

# %% setup
import matplotlib.pyplot as plt

from llmnb.book.owners import draw_owners
from llmnb.book.verify import verdict
from llmnb.gpu.simulator import RaceError, cuda, simulate, watch
from llmnb.reference.bfloat16 import from_bfloat16, to_bfloat16

# %% imports of the fragments tags=["export"]
import functools
import inspect

import numpy as np

from llmnb.gpu.simulator import FULL, exchange, load4, promise4, running
from llmnb.gpu.simulator import store4

# %% [markdown]
# ## How a function becomes an instruction
#
# Each function of the next sections is written twice. In Python it is what the
# simulator does. Where a kernel is compiled, its name stands for an
# instruction of PTX, or for two, which the line before it says. numba calls
# such a thing an *intrinsic*. It gets the instruction's text and a letter for
# each operand: `f` for a float32, `r` for 32 bits, and `s` or `g` for an array
# with an index, which become an address in shared or in global memory. The
# intrinsic is made by the function's `on_gpu`: the compiler of
# [chapter A.6](../appendix/06_launch.ipynb), where it meets a function that
# has one, takes what `on_gpu()` returns instead of the Python body.


# %% a function that is an instruction tags=["exporti"]
def instruction(text, results, operands, alone=False):
    """Let a function of kernels be PTX where they are compiled.

    text: the instruction. results, operands: a letter for each, in order.
    alone: whether a lane may do it without the others of its warp.
    """

    def decorate(function):
        names = list(inspect.signature(function).parameters)
        make = functools.partial(
            _intrinsic, names, text, results, operands, alone
        )
        function.on_gpu = functools.cache(make)
        return function

    return decorate


# %% the intrinsic tags=["exporti"]
def _intrinsic(names, text, results, operands, alone):
    from llvmlite import ir
    from numba.core import types as nb
    from numba.cuda.extending import intrinsic

    word, kinds = ir.IntType(32), {"f": nb.float32, "r": nb.int32}
    native = {"f": ir.FloatType(), "r": word, "s": word, "g": ir.IntType(64)}
    parts = [native[x] for x in results]
    whole = ir.LiteralStructType(parts) if parts else ir.VoidType()
    whole = parts[0] if len(parts) == 1 else whole
    back = [kinds[x] for x in results]
    back = back[0] if len(parts) == 1 else nb.Tuple(back) if parts else nb.void
    where = [f"=&{x}" for x in results]
    where += [{"s": "r", "g": "l"}.get(x, x) for x in operands]
    where += [] if alone else ["~{memory}"]

    def emit(typing, *given):
        wanted, given = [], iter(given)
        for x in operands:
            first = next(given)
            if x in kinds:
                wanted.append(kinds[x])
            else:
                next(given)
                wanted += [first, nb.intp]

        def generate(context, builder, signature, args):
            values = _operands(context, builder, signature, args, operands)
            kind = ir.FunctionType(whole, [native[x] for x in operands])
            asm = ir.InlineAsm(kind, text, ",".join(where), not alone)
            call = builder.call(asm, values)
            if not alone:
                call.attributes.add("convergent")  # not into a branch
            if len(parts) < 2:
                return call if parts else context.get_dummy_value()
            values = [
                builder.extract_value(call, k) for k in range(len(parts))
            ]
            return context.make_tuple(builder, back, values)

        return back(*wanted), generate

    named = [inspect.Parameter(n, 1) for n in ("typing", *names)]
    emit.__signature__ = inspect.Signature(named)  # numba wants to know
    return intrinsic(emit)


# %% addresses tags=["exporti"]
def _operands(context, builder, signature, args, operands):
    """The operands in LLVM: an array and an index become an address."""
    from llvmlite import ir

    values, n = [], 0
    for x in operands:
        if x not in "sg":
            values.append(args[n])
            n += 1
            continue
        array = context.make_array(signature.args[n])
        place = array(context, builder, args[n]).data
        place = builder.gep(place, [args[n + 1]])
        width, space = (32, 3) if x == "s" else (64, 1)
        there = ir.PointerType(ir.IntType(32), space)
        place = builder.addrspacecast(place, there)
        values.append(builder.ptrtoint(place, ir.IntType(width)))
        n += 2
    return values


# %% [markdown]
# ## Two halves in a register
#
# A register has 32 bits, a number in bfloat16 has 16. So registers, and the
# arrays that they are loaded from, hold *pairs*, the first number in the lower
# half: to a kernel, an array of bfloat16 is an array of int32 half as long.
# `pack` rounds two float32 numbers to a pair, to nearest, ties to even
# (2.6.1); `unpack` makes two float32 numbers of it, exactly.


# %% round two numbers tags=["exporti"]
def _half(x):
    """The 16 bits of the bfloat16 nearest to a float32, as an int."""
    bits = int(np.float32(x).view(np.uint32))
    if x != x:
        return 0x7FFF
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


# %% pack and unpack tags=["export"]
@instruction("cvt.rn.bf16x2.f32 $0, $2, $1;", "r", "ff", alone=True)
def pack(low, high):
    """Two float32 rounded to bfloat16, in an int32."""
    return np.uint32(_half(low) | _half(high) << 16).view(np.int32)


@instruction(
    "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "ff", "r", alone=True
)
def unpack(pair):
    """The two bfloat16 numbers of an int32, as float32."""
    bits = int(pair) & 0xFFFFFFFF
    low, high = bits << 16 & 0xFFFFFFFF, bits & 0xFFFF0000
    return np.uint32(low).view(np.float32), np.uint32(high).view(np.float32)


# %% a pair
pair = pack(np.float32(1.01), np.float32(-3.0))
print(f"{int(pair) & 0xFFFFFFFF:08x} holds", *map(float, unpack(pair)))

# %% [markdown]
# ## Who holds what
#
# The instruction `mma.sync.m16n8k16` computes D = A B + C. A has 16 rows and
# 16 columns, B 16 rows and 8 columns, C and D 16 rows and 8 columns; A and B
# are in bfloat16, C and D in float32. What a lane holds of a matrix is called
# a *fragment*. NVIDIA's manual of PTX numbers the lanes by two numbers: the
# *group*, lane // 4, and the place in it, lane % 4.
#
# | matrix | registers | row | column |
# |---|---|---|---|
# | A | pairs 0 to 3 | group; + 8 in 1 and 3 | 2 (lane % 4); + 8 in 2 and 3 |
# | B | pairs 0, 1 | 2 (lane % 4); + 8 in 1 | group |
# | C, D | numbers 0 to 3 | group; + 8 in 2, 3 | 2 (lane % 4); + 1 in 1, 3 |
#
# The table gives the first number of a pair. The second is its neighbour along
# k, the direction of the sum: in a row of A, in a column of B. The tables as
# arrays, a row for each lane:

# %% who holds what tags=["exporti"]
_LANE, _PAIR = np.arange(32)[:, None, None], np.arange(4)[None, :, None]
_GROUP, _NEAR = _LANE // 4, 2 * (_LANE % 4)
A_ROWS = _GROUP + 8 * (_PAIR % 2) + np.zeros((1, 1, 2), int)
A_COLS = _NEAR + 8 * (_PAIR // 2) + np.arange(2)
B_ROWS = _NEAR + 8 * _PAIR[:, :2] + np.arange(2)
B_COLS = _GROUP + np.zeros((1, 2, 2), int)
C_ROWS = (_GROUP + 8 * (_PAIR // 2))[..., 0]
C_COLS = (_NEAR + _PAIR % 2)[..., 0]

# %% draw who holds what tags=["hide-input"]
fig, axes = plt.subplots(1, 3, figsize=(7.4, 3.6), dpi=100)
for ax, name, rows, cols, size in (
    (axes[0], "A", A_ROWS[..., 0], A_COLS[..., 0] // 2, (16, 8)),
    (axes[1], "B", B_ROWS[..., 0] // 2, B_COLS[..., 0], (8, 8)),
    (axes[2], "C and D", C_ROWS[:, ::2], C_COLS[:, ::2] // 2, (16, 4)),
):
    who = np.zeros(size, int)
    who[rows, cols] = np.arange(32)[:, None]
    draw_owners(ax, who.tolist(), name, group=4)
    for text in ax.texts:
        text.set_fontsize(6)
axes[0].set(xlabel="k, in pairs", ylabel="rows of out")
axes[1].set(xlabel="columns of out", ylabel="k, in pairs")
axes[2].set(xlabel="columns of out, in pairs", ylabel="rows of out")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 3.13.1. Each box is a pair of neighbours, and bears the number of the
# lane that holds it; a group of four lanes has one colour. In A and B the two
# are neighbours along k and share a register, in C and D neighbours in a row.
# Two D's side by side lie as one A: a product can be a factor of the next one
# without leaving its lanes.*
#
# In the simulator, `mma` is a meeting of the warp, as a shuffle is. Each lane
# hands in its registers; the last to come puts the matrices together and
# multiplies them. The products of two bfloat16 numbers are exact in float32,
# for 8 bits by 8 bits make 16. How a tensor core rounds while it adds 16 of
# them to C the manual leaves open; we add in float64 and round once.


# %% the product of fragments tags=["exporti"]
def _multiply(given):
    """The fragments of D, a row for each lane, from those of A, B and C."""
    sums = np.array([x[:4] for x in given], np.float64)
    pairs = np.array([x[4:] for x in given], np.int32)
    halves = pairs.view(np.uint16).astype(np.uint32) << 16
    numbers = halves.view(np.float32).reshape(32, 6, 2).astype(np.float64)
    a, b = np.empty((16, 16)), np.empty((16, 8))
    a[A_ROWS, A_COLS], b[B_ROWS, B_COLS] = numbers[:, :4], numbers[:, 4:]
    return (sums + (a @ b)[C_ROWS, C_COLS]).astype(np.float32)


# %% a warp multiplies tags=["export"]
@instruction(
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
    "{$0,$1,$2,$3}, {$8,$9,$10,$11}, {$12,$13}, {$4,$5,$6,$7};",
    "ffff", "ffffrrrrrr",
)  # fmt: skip
def mma(c0, c1, c2, c3, a0, a1, a2, a3, b0, b1):
    """D = A B + C of a whole warp: each lane's four numbers of D.

    c0 to c3: float32, this lane's of C, (16, 8). a0 to a3, b0, b1: int32,
    its pairs of A, (16, 16), and of B, (16, 8). All 32 lanes must call it.
    """
    mine = c0, c1, c2, c3, a0, a1, a2, a3, b0, b1
    found, lane = exchange("mma", FULL, mine, combine=_multiply)
    return tuple(found[lane])


# %% [markdown]
# A kernel that loads the fragments one by one, and the product:


# %% a product by one warp
def by_hand(out, a, b):
    lane = int(running().number)
    pairs = [
        pack(a[r[0], c[0]], a[r[1], c[1]])
        for r, c in zip(A_ROWS[lane], A_COLS[lane], strict=True)
    ]
    pairs += [
        pack(b[r[0], c[0]], b[r[1], c[1]])
        for r, c in zip(B_ROWS[lane], B_COLS[lane], strict=True)
    ]
    zero = np.float32(0)
    d = mma(zero, zero, zero, zero, *pairs)
    for n in range(4):
        out[C_ROWS[lane, n], C_COLS[lane, n]] = d[n]


small = np.random.default_rng(13)
a, b = (
    from_bfloat16(to_bfloat16(small.normal(size=size).astype(np.float32)))
    for size in ((16, 16), (16, 8))
)
out = np.zeros((16, 8), np.float32)
simulate(by_hand, 1, 32, (out, a, b))
verdict("D = A B", np.allclose(out, a @ b, atol=1e-5), "by 32 lanes")

# %% [markdown]
# ## Load fragments: ldmatrix
#
# A lane's pairs lie far apart in memory, and are four bytes each. `ldmatrix`
# loads four matrices of 8 by 8 halves at once. Each lane gives the place of
# one row of 16 bytes: lanes 0 to 7 those of the first matrix, 8 to 15 those of
# the second, and so on. What it gets are four registers, one of each matrix:
# lane n has pair n % 4 of row n // 4. That is the layout of the table, for A
# has four such matrices and B two. Of A, rows 0 to 7 become a0 and rows 8 to
# 15 a1, both for the first eight k; the same rows for the other eight become
# a2 and a3. With `.trans`, each matrix is turned over on the way, so that a
# factor may lie in memory either way.


# %% rows to lanes tags=["exporti"]
def _deal(rows):
    """The four registers of each lane from the rows that all have named."""
    return np.array(rows, np.int32).reshape(4, 32).T


def _deal_turned(rows):
    halves = np.array(rows, np.int32).view(np.uint16).reshape(4, 8, 8)
    turned = np.ascontiguousarray(halves.transpose(0, 2, 1))
    return turned.view(np.int32).reshape(4, 32).T


# %% load matrices tags=["export"]
_LDMATRIX = "ldmatrix.sync.aligned.m8n8.x4{}.shared.b16 {{$0,$1,$2,$3}}, [$4];"


@instruction(_LDMATRIX.format(""), "rrrr", "s")
def ldmatrix(array, i):
    """Four matrices of 8 by 8 bfloat16, as a register of each.

    array: a shared array of int32, i: where this lane's row of 16 bytes
    begins in it, a multiple of 4. All 32 lanes must call it.
    """
    row = load4(array, i)
    found, lane = exchange("ldmatrix", FULL, row, combine=_deal)
    return tuple(found[lane])


@instruction(_LDMATRIX.format(".trans"), "rrrr", "s")
def ldmatrix_trans(array, i):
    """As `ldmatrix`, each matrix transposed."""
    row = load4(array, i)
    found, lane = exchange("ldmatrix.trans", FULL, row, combine=_deal_turned)
    return tuple(found[lane])


# %% [markdown]
# ## Copy while you compute: cp.async
#
# In version 4 of [chapter 3.6](06_matmul.ipynb) the next tile waited in
# registers for its turn. Since the A100 a lane can have 16 bytes copied from
# global to shared memory past its registers. The copy takes its time, and the
# lane goes on. It collects copies into a group with `commit`, and later waits
# until its groups have come. Then a barrier, for the other lanes' copies.
#
# This is easy to get wrong: read too early, and you read what was there
# before; copy too early, and others may still read it. So the simulator is as
# slow as it may be. A copy lands when its lane waits for it and not before:
# whoever forgets to wait reads what was there. At first that is *poison*, a
# number that nobody wrote: the simulator fills new memory with it
# ([chapter A.5](../appendix/05_simulator.ipynb)), and as bfloat16 it is NaN.
# And for the watch for races a copy is a write twice, when it is asked for and
# when it lands.


# %% copies on their way tags=["export"]
@instruction("cp.async.cg.shared.global [$0], [$1], 16, $2;", "", "sgr")
def cp_async(shared, i, source, j, size):
    """Begin to copy 16 bytes from global to shared memory.

    shared, source: arrays of int32; i, j: where in them, multiples of 4.
    size: 16, or 0 for zeros instead, when `source` is not read.
    """
    promise4(shared, i)
    running().copies[-1].append((shared, i, source, j, size))


@instruction("cp.async.commit_group;", "", "")
def cp_async_commit():
    """Make a group of this lane's copies since the last group."""
    running().copies.append([])


@instruction("cp.async.wait_group 0;", "", "")
def cp_async_wait():
    """Wait until all groups of this lane have arrived."""
    lane = running()
    groups, lane.copies = lane.copies[:-1], lane.copies[-1:]
    for group in groups:
        for shared, i, source, j, size in group:
            four = load4(source, j) if size else 4 * (np.int32(0),)
            store4(shared, i, *four)


# %% [markdown]
# Two kernels that forget something. A GPU reports neither; `greedy` may come
# out right there.


# %% two mistakes
def impatient(out, source):
    tile = cuda.shared.array(128, np.int32, alignment=16)
    t = cuda.threadIdx.x
    cp_async(tile, 4 * t, source, 4 * t, 16)
    cp_async_commit()
    cuda.syncthreads()  # but no wait
    out[t] = tile[4 * (31 - t)]


def greedy(out, source):
    tile = cuda.shared.array(128, np.int32, alignment=16)
    t = cuda.threadIdx.x
    for turn in range(2):
        cp_async(tile, 4 * t, source, 4 * t + 128 * turn, 16)
        cp_async_commit()
        cp_async_wait()
        cuda.syncthreads()
        out[t] = tile[4 * (31 - t)]  # and no barrier before the next copy


source = np.arange(256, dtype=np.int32)
hasty = np.zeros(32, np.int32)
simulate(impatient, 1, 32, (hasty, source))
as_floats = from_bfloat16(hasty.view(np.uint16))
verdict("impatient", np.isnan(as_floats).all(), "reads NaN alone")
try:
    with watch():
        simulate(greedy, 1, 32, (np.zeros(32, np.int32), source))
    verdict("greedy", False, "is caught")
except RaceError as error:
    print(str(error).replace(", and", ",\nand"))

# %% [markdown]
# Element 60 is the first of the four that thread 15 copies. In the second turn
# thread 15 asks for its copy to that place, and nothing says that thread 16
# has read there what came in the first.
#
# A kernel that does it right, with all of the chapter: copy A and B to shared
# memory, wait, load the fragments, multiply. B lies here as a matrix of 8 rows
# and 16 columns, so that its rows go along k; two matrices of `ldmatrix` are
# then both registers of B. Lanes 16 to 31 name the same rows again, and so two
# of the four results are dropped.


# %% copy, load, multiply
def one_product(out, a, b):
    tile = cuda.shared.array(192, np.int32, alignment=16)
    lane = cuda.laneid
    cp_async(tile, 4 * lane, a, 4 * lane, 16)
    if lane < 16:
        cp_async(tile, 128 + 4 * lane, b, 4 * lane, 16)
    cp_async_commit()
    cp_async_wait()
    cuda.syncwarp()
    row, chunk = lane % 16, lane // 16
    a0, a1, a2, a3 = ldmatrix(tile, 8 * row + 4 * chunk)
    row, chunk = lane % 8, lane // 8 % 2
    b0, b1, _, _ = ldmatrix(tile, 128 + 8 * row + 4 * chunk)
    zero = np.float32(0)
    d = mma(zero, zero, zero, zero, a0, a1, a2, a3, b0, b1)
    for n in range(4):
        out[C_ROWS[lane, n], C_COLS[lane, n]] = d[n]


got = np.zeros((16, 8), np.float32)
halves = [
    np.ascontiguousarray(to_bfloat16(x)).reshape(-1).view(np.int32)
    for x in (a, b.T.copy())
]
with watch() as seen:
    simulate(one_product, 1, 32, (got, *halves))
verdict("the same", np.array_equal(got, out), "bit for bit")

# %% [markdown]
# ## Take away
#
# - A tensor core takes its factors from the registers of a whole warp. Which
#   lane holds what is a table; two neighbours along k share a register.
# - `ldmatrix` loads four times 8 rows of 16 bytes and deals them to the lanes
#   in that order, as they are or transposed.
# - `cp.async` copies past the registers while the lane goes on. A lane must
#   wait before it reads, and a barrier must stand between the last reader and
#   the next copy.
# - The same function is Python in the simulator and an instruction or two of
#   PTX in a compiled kernel.

# %% [markdown]
# ## Design note
#
# The H100 has a larger instruction too, `wgmma`: four warps multiply 64 rows
# by up to 256 columns, one or both factors straight from shared memory, which
# a copying engine fills. We expect that its full rate needs them. They exist
# on that generation alone, though; a kernel for the A100 must be written
# besides. We take the older instructions, which both have, and expect to give
# away part of the H100's rate.
#
# numba has no function for any of this, so we write the assembler's text. A
# CUDA program in C++ would use the same instructions by the names of a
# library, or by the same text.

# %% [markdown]
# ## Exercises
#
# **1** (★). How many bytes of registers do A, B, C and D take in a warp, and
# how many FMAs does one `mma` do? Compare with an FMA by 32 lanes, three
# registers each, if C and D are the same registers.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# A has 4 registers a lane, B 2, C and D together 4: 10 registers of 128 bytes
# each for a warp, 1,280 bytes. It does $16 \cdot 16 \cdot 8 = 2048$ FMAs, 64
# a lane. An FMA by 32 lanes takes 384 bytes for 32. Each byte of registers
# serves 1.6 FMAs instead of a twelfth of one.
# :::

# %% exercise 1, bytes and FMAs tags=["hide-cell"]
nbytes, fmas = (4 + 2 + 4) * 32 * 4, 16 * 16 * 8

# %% exercise 1, checked
held = 2 * A_ROWS.size + 2 * B_ROWS.size + 4 * C_ROWS.size
verdict("bytes", nbytes == held, "all that the tables name")
verdict("FMAs", fmas == len(a) * b.size, "each row of A by all of B")

# %% [markdown]
# ## Further reading
#
# - NVIDIA,
#   [PTX ISA](https://docs.nvidia.com/cuda/parallel-thread-execution/):
#   the tables of fragments under "Warp-level matrix instructions", with
#   `mma`, `ldmatrix` and `cp.async`.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("3.13")
