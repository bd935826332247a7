# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       cpu.tile: "The shape of a tile of sums, and words for LLVM's vectors."
#       cpu.microkernel: "The innermost tile of a matrix product, in LLVM's language."
#       bench.peak: "The multiply-add rate that this processor can reach."
# ---

# %% [markdown]
# # A tile in LLVM: sums that stay in registers
#
# > The innermost loop of every product in llmnb, written in the language that
# > numba compiles to, so that its sums never leave the registers.
#
# *Reading time: 22 minutes. You need: the ladder of
# [chapter 2.4](../2_cpu/04_matmul.ipynb), which ends at this loop, and
# compiled kernels ([chapter 2.1](../2_cpu/01_compile.ipynb)).*

# %% [markdown]
# ## Where we are
#
# On its fourth rung, the ladder of chapter 2.4 has everything in the right
# order: panels, and an inner loop over 6 rows by 16 columns. But LLVM keeps
# the 96 sums in memory, because it does not see that twelve registers would
# hold them. This is the one place of the book where we do not leave the
# choice to it. At the end of this chapter you can
#
# - choose a tile for a processor from the number of its registers;
# - write an *intrinsic*, a function that emits LLVM's instructions;
# - say what a phi is, and why a sum that is one lives in a register;
# - transpose a square of numbers without touching memory.

# %% [markdown]
# ## Setup

# %% setup
import numpy as np

from llmnb.book.verify import compare, verdict
from llmnb.cpu.jit import inner

rng = np.random.default_rng(5)

# %% [markdown]
# ## The shape of a tile
#
# Processors differ in how many vector registers they have, and in how many
# numbers each of them holds:
#
# | name | found in | registers | float32 in each | our tile |
# |---|---|---|---|---|
# | AVX2 | Intel and AMD since about 2013 | 16 | 8 | 6 rows by 2 vectors |
# | AVX-512 | many servers, AMD since Zen 4 | 32 | 16 | 8 by 3 |
# | NEON | ARM, Apple's among them | 32 | 4 | 6 by 4 |
# | none of these | | | 4 | 4 by 2 |
#
# Take AVX2. 6 rows by 2 vectors make 12 sums; two more registers hold the
# vectors of `b` for this step, and one passes the numbers of `a` through, each
# spread over all eight places. That is 15 of 16. With 32 registers, 12 by 2 and
# 8 by 3 both make 24 sums; the second loads 11 numbers and vectors a step, not
# 14, and 256 tokens are whole tiles of 8 rows. The last line of the table is
# for processors that we do not know: a small tile, which still is right.
# `LLMNB_TILE` overrides the choice, so that every shape can be tried, and
# tested, on any machine.
#
# LLVM knows the features of the processor it runs on, but not everywhere: on
# Apple's processors its list may be empty. Every 64-bit ARM processor has NEON,
# so there we do not ask. Under an emulator of such a processor, products had the
# same bits as on x86, number for number: every sum is taken in one order, one
# FMA a step, whatever the shape of the tile.

# %% imports of the tile tags=["exporti"]
import os
import re

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features


# %% what the processor has tags=["export"]
def cpu_features():
    """The features of the processor that numba compiles for, as a set.

    By LLVM's names, such as "avx2". NUMBA_CPU_FEATURES and NUMBA_ENABLE_AVX
    mask them, as they do for numba.
    """
    masked = numba.config.CPU_FEATURES
    chosen = get_host_cpu_features() if masked is None else masked
    found = {x[1:] for x in chosen.split(",") if x.startswith("+")}
    arm = llvm.get_process_triple().startswith(("aarch64", "arm64"))
    return found | ({"neon"} if arm and masked is None else set())


def tile_shape():
    """Rows, vectors in a row, and numbers in a vector of the inner loop.

    From the processor's features, or from LLMNB_TILE, as in "6x2x8". Raises
    ValueError when that is not three such numbers.
    """
    chosen = os.environ.get("LLMNB_TILE")
    if chosen and not re.fullmatch(r"[1-9]\d?x[1-9]x(4|8|16)", chosen):
        raise ValueError(
            f"LLMNB_TILE must be rows x vectors x 4, 8 or 16 numbers, as in "
            f"6x2x8, got {chosen!r}"
        )
    if chosen:
        return tuple(map(int, chosen.split("x")))
    shapes = {"avx512f": (8, 3, 16), "avx2": (6, 2, 8), "neon": (6, 4, 4)}
    found = [shapes[f] for f in shapes if f in cpu_features()]
    return found[0] if found else (4, 2, 4)


# %% the tile of this machine tags=["export"]
ROWS, VECTORS, LANES = tile_shape()
COLS = VECTORS * LANES  # columns of a tile

# %% [markdown]
# ## LLVM's language, in a few words
#
# numba lets a function write LLVM's own language. An *intrinsic* is a Python
# function that runs once, while a kernel is being compiled, and emits the
# instructions that stand for the call. It gets a `builder`, which appends an
# instruction and returns the name of its result. LLVM has vectors of any
# length among its types and turns them into what the processor has.
#
# We need six words: a constant vector, the address of an array's numbers, load
# a vector, store one, spread one number over a vector, multiply and add. The
# type of the numbers comes from the array, so that float64 works too, in
# vectors of as many numbers.

# %% words for vectors tags=["exporti"]
I32 = ir.IntType(32)


def constant(number, values):
    """A vector of known numbers of a type."""
    return ir.Constant(ir.VectorType(number, len(values)), list(values))


def data(context, builder, kind, array):
    """The address of an array's first number."""
    make = cgutils.create_struct_proxy(kind)
    return make(context, builder, value=array).data


def peek(builder, pointer, count):
    """The vector of `count` numbers that begins at an address."""
    kind = ir.VectorType(pointer.type.pointee, count)
    return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=4)


def store(builder, vector, pointer):
    """Write a vector to an address."""
    pointer = builder.bitcast(pointer, vector.type.as_pointer())
    builder.store(vector, pointer, align=4)


# %% spread, multiply and add tags=["exporti"]
def spread(builder, number):
    """A vector of LANES times one number."""
    vector = constant(number.type, [ir.Undefined] * LANES)
    vector = builder.insert_element(vector, number, I32(0))
    return builder.shuffle_vector(vector, vector, constant(I32, [0] * LANES))


def _called(builder, name, *args):
    """What a function of LLVM's gives for vectors of one kind."""
    kind = args[0].type
    double = isinstance(kind.element, ir.DoubleType)
    name = f"llvm.{name}.v{kind.count}f{64 if double else 32}"
    kind = ir.FunctionType(kind, [kind] * len(args))
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, args)


def multiply_add(builder, a, b, c):
    """a b + c of vectors, in one instruction where there is one."""
    return _called(builder, "fmuladd", a, b, c)


# %% [markdown]
# A kernel may be compiled with leave to add in any order, and LLVM takes it
# where it saves a cycle: here and not there. A result must not depend on that.
# What `plus` adds is fenced: it is one number to whatever is added to it.


# %% add in order tags=["exporti"]
def plus(builder, a, b):
    """a + b of vectors, whose sum with others is not taken apart."""
    return _called(builder, "arithmetic.fence", builder.fadd(a, b))


# %% [markdown]
# ## The loop over the sum
#
# In LLVM's language a name gets its value once. A variable that changes from
# one turn of a loop to the next is a *phi*: it has one value on entry, and
# another when the loop comes back. Our sums are phis, one for each vector of
# the tile. A phi has no address, so it cannot lie in memory unless the
# registers run out, and the shape of the tile sees to it that they do not.
#
# The loop is written once and used by three: this tile, the tile without
# packing of [chapter 4.19](../4_practice/19_cache.ipynb), and the
# measurement of the peak at the end of this chapter. They differ in what a turn does.
# `turn` gets the pointers and the sums as they are in this turn, and gives
# back the new sums.


# %% the loop over the sum tags=["exporti"]
def sum_loop(builder, depth, pointers, steps, sums, turn):
    """Emit a loop of `depth` turns, at least one; returns the last sums.

    Each of `pointers` moves by its step from turn to turn. turn(pointers,
    sums) emits what a turn computes and returns its sums.
    """
    before = builder.block
    loop = builder.append_basic_block("step")
    after = builder.append_basic_block("done")
    builder.branch(loop)
    builder.position_at_end(loop)
    entry = [depth.type(0), *pointers, *sums]
    k, *rest = phis = [builder.phi(value.type) for value in entry]
    here, sums = rest[: len(pointers)], rest[len(pointers) :]
    new = turn(here, sums)
    k = builder.add(k, k.type(1))
    moved = [builder.gep(p, [s]) for p, s in zip(here, steps, strict=True)]
    then = [k, *moved, *new]
    for phi, first, value in zip(phis, entry, then, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<", k, depth), loop, after)
    builder.position_at_end(after)
    return new


# %% [markdown]
# ## One tile
#
# When the sums are done, two things may still be wanted: a bias, one number
# a column, and something to start from, such as the residual or the
# gradient of earlier batches. Both are added on the way from the registers
# to `out`. That is the *epilogue*, and it saves a pass over memory for
# each. Positions in arrays are given as an offset and steps: a row further
# on is `row` numbers away, a column `col` numbers. A step of 0 repeats the
# same number, so the same code adds a row of zeros where nothing is wanted.

# %% imports of the microkernel tags=["exporti"] module="cpu.microkernel"
from typing import NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from llmnb.cpu.bfloat16 import multiply_add_pairs, pair, steps_in
from llmnb.cpu.jit import inlined
from llmnb.cpu.tile import (
    COLS,
    I32,
    LANES,
    ROWS,
    constant,
    data,
    multiply_add,
    peek,
    plus,
    spread,
    store,
    sum_loop,
)


# %% where a product lies tags=["exporti"] module="cpu.microkernel"
class Place(NamedTuple):
    """Where out, start and bias begin in flat arrays, and their steps.

    out_row, row: from row to row, of out and of start; col, bias_col: from
    column to column, of start and of bias.
    """

    out: int
    out_row: int
    start: int
    row: int
    col: int
    bias: int
    bias_col: int


@inlined
def moved(at, i, j):
    """The Place of what lies i rows and j columns further on."""
    out = at.out + i * at.out_row + j
    start = at.start + i * at.row + j * at.col
    bias = at.bias + j * at.bias_col
    return Place(out, at.out_row, start, at.row, at.col, bias, at.bias_col)


# %% [markdown]
# The addresses of a tile's vectors follow, row by row. A *prefetch* asks for
# a line of memory before it is needed.


# %% the vectors of a tile tags=["exporti"] module="cpu.microkernel"
def _addresses(builder, base, at, row, col, vectors):
    """The addresses of a tile's vectors, row by row."""
    for i in range(ROWS):
        for j in range(0, vectors * LANES, LANES):
            down = builder.mul(row, row.type(i))
            across = builder.mul(col, col.type(j))
            step = builder.add(at, builder.add(down, across))
            yield builder.gep(base, [step])


def _prefetch(builder, pointers, write):
    """Ask for cache lines that will be read, or written, ahead of time."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
    name = "llvm.prefetch.p0"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    for pointer in pointers:
        address = builder.bitcast(pointer, byte)
        builder.call(function, [address, I32(int(write)), I32(3), I32(1)])


# %% [markdown]
# While the sums are being taken, the lines of `out` that they will go to should
# come nearer. A core can wait for some lines at once, ten or twenty, and main
# memory takes hundreds of cycles for each; meanwhile it gets no panels from the
# second cache either. So a tile asks for one row in each turn, until it has
# asked for all. `dweight` gains most by this: with 256 tokens its sums are
# short.


# %% ask for a row of out tags=["exporti"] module="cpu.microkernel"
LINE = 64  # bytes that memory gives at once
APART = LINE // (4 * LANES)  # vectors of float32 in them


def _ask_row(builder, row, to, vectors):
    """Ask for a row of out, or for the tile's last; to: as in _tile_sums."""
    last = builder.gep(to[0], [builder.mul(to[1], to[1].type(ROWS - 1))])
    row = builder.select(builder.icmp_unsigned("<", row, last), row, last)
    places = range(0, vectors * LANES, APART * LANES)
    _prefetch(builder, [builder.gep(row, [I32(j)]) for j in places], True)


# %% [markdown]
# A turn loads the vectors of a line of `b`, then goes down the numbers of a
# line of `a`, spreads each, and multiplies it with all of them: 6 by 2 FMAs
# for 8 loads. It also asks for one line of memory that nobody needs yet: while
# a product multiplies, the numbers that it packs next come nearer. (Or for several
# lines, each at a distance from the first, where what comes next reads several
# arrays.)


# %% a turn of the loop tags=["exporti"] module="cpu.microkernel"
def _tile_sums(builder, panels, depth, to, ahead, pairs, vectors):
    """The sums of a tile over two panels, as vectors, row by row.

    panels: where they begin. to: the tile's address in out, and the step to
    the next row. ahead: an address to ask for, its step, and how far from
    it others are.
    """
    fma = multiply_add_pairs if pairs else multiply_add

    def turn(pointers, sums):
        a, b, ahead, row = pointers
        others = (builder.gep(ahead, [x]) for x in further)
        _prefetch(builder, [ahead, *others], write=False)
        _ask_row(builder, row, to, vectors)
        places = [builder.gep(b, [I32(v * LANES)]) for v in range(vectors)]
        columns = [peek(builder, p, LANES) for p in places]
        new = []
        for i in range(ROWS):
            x = spread(builder, builder.load(builder.gep(a, [I32(i)])))
            for y in columns:
                new.append(fma(builder, x, y, sums[len(new)]))
        return new

    number = ir.FloatType() if pairs else panels[0].type.pointee
    zeros = [constant(number, [0.0] * LANES)] * (ROWS * vectors)
    (place, step, *further), (row, line) = ahead, to
    pointers, steps = [*panels, place, row], [I32(ROWS), I32(COLS), step, line]
    return sum_loop(builder, depth, pointers, steps, zeros, turn)


# %% [markdown]
# `pairs` is for numbers of half the bits, two to a place, whose instruction
# [chapter 2.6](../2_cpu/06_bfloat16.ipynb) gives. The intrinsic finds the
# addresses, has the sums taken, adds, and stores.

# %% one tile tags=["exporti"] module="cpu.microkernel"
INT = types.int64


@intrinsic(prefer_literal=True)
def multiply_tile(
    typing, out, at, start, bias, panels, a, b, depth, vectors, ahead
):
    """Write one tile: out = start + bias + the product of two panels.

    For kernels. out, start, bias and panels are flat arrays; at: a Place.
    a, b: where the panels begin; depth: their lines, at least 1. vectors: a
    constant, how many of each line of b are taken. ahead: the address of
    memory that will be read soon, its step from line to line, in bytes, and
    how far on there is more of it, if there is.
    """
    kinds = out, at, start, bias, panels, INT, INT, INT, vectors, ahead
    signature = types.void(*kinds)

    def codegen(context, builder, signature, args):
        kinds = signature.args
        out, start, bias, panels = (
            data(context, builder, kinds[i], args[i]) for i in (0, 2, 3, 4)
        )
        at = Place(*cgutils.unpack_tuple(builder, args[1]))
        a, b = (builder.gep(panels, [x]) for x in args[5:7])
        one, none = at.out.type(1), at.out.type(0)
        vectors = kinds[8].literal_value

        def addresses(base, at, row, col):
            return list(_addresses(builder, base, at, row, col, vectors))

        outs = addresses(out, at.out, at.out_row, one)
        to = outs[0], at.out_row
        place, *steps = cgutils.unpack_tuple(builder, args[9])
        ahead = builder.inttoptr(place, ir.IntType(8).as_pointer()), *steps
        pairs = kinds[4].dtype == types.uint32
        sums = _tile_sums(builder, (a, b), args[7], to, ahead, pairs, vectors)
        shifts = addresses(bias, at.bias, none, at.bias_col)[:vectors]
        shifts = [peek(builder, r, LANES) for r in shifts] * ROWS
        starts = addresses(start, at.start, at.row, at.col)
        for x, p, q, shift in zip(sums, outs, starts, shifts, strict=True):
            x = plus(builder, x, shift)
            store(builder, plus(builder, x, peek(builder, q, LANES)), p)
        return context.get_dummy_value()

    return signature, codegen


# %% [markdown]
# Two panels of a hundred lines, packed by NumPy, and the tile they make. It
# begins at a bias for each column and at the number 1 everywhere: the step 0
# from row to row and from column to column repeats it.


# %% one tile, computed
@inner
def one_tile(out, start, bias, panels, depth):
    at = Place(0, COLS, 0, 0, 0, 0, 1)
    b, nothing = depth * ROWS, (panels.ctypes.data, 0)
    multiply_tile(out, at, start, bias, panels, 0, b, depth, VECTORS, nothing)


depth = 100
a, b = rng.normal(size=(ROWS, depth)), rng.normal(size=(depth, COLS))
bias, start = rng.normal(size=COLS), np.ones(COLS)
out, panels = np.empty((ROWS, COLS)), np.concatenate([a.T.ravel(), b.ravel()])
one_tile(out.reshape(-1), start, bias, panels, depth)
compare("a tile", out, a @ b + bias + 1, tol=1e-12)

# %% [markdown]
# That it is right says little about where its sums are. For that the tests
# compile this loop for processors of AVX2 and of AVX-512 and read the machine
# code: every sum is a register, nothing is stored in the loop, and a turn
# loads each number once.
#
# ## A square, packed by vectors
#
# A thin layer uses each packed number only a few times, so packing must be
# quick. Where the columns of a panel run along memory, a vector can be copied
# as it is. Where the sum runs along memory, a square of 8 by 8 numbers is read
# as 8 vectors, transposed in registers, and written as 8 others. The transpose
# takes three rounds: swap blocks of 4 between vectors that are 4 apart, then
# of 2, then of 1. With four vectors of four it takes two:

# %% [markdown]
#     0 1 2 3          0 1 8 9          0 4 8 12
#     4 5 6 7    by    4 5 12 13   by   1 5 9 13
#     8 9 10 11  two:  2 3 10 11  one:  2 6 10 14
#     12 13 14 15      6 7 14 15        3 7 11 15


# %% a transpose in registers tags=["exporti"] module="cpu.microkernel"
def _transposed(builder, rows):
    """The columns of squares, as many as stand side by side in vectors."""
    rows, distance = list(rows), len(rows) // 2
    while distance:
        far = LANES - distance  # to the same place in the other vector
        first = [j + far if j & distance else j for j in range(LANES)]
        second = [j + distance for j in first]
        low, high = constant(I32, first), constant(I32, second)
        for i in range(len(rows)):
            if not i & distance:
                x, y = rows[i], rows[i + distance]
                rows[i] = builder.shuffle_vector(x, y, low)
                rows[i + distance] = builder.shuffle_vector(x, y, high)
        distance //= 2
    return rows


# %% the rounds of the transpose, with NumPy
square = np.arange(16).reshape(4, 4)
for distance in (2, 1):
    for i in (i for i in range(4) if not i & distance):
        x, y = square[i].copy(), square[i + distance].copy()
        far = np.arange(4) & distance > 0
        square[i] = np.where(far, np.roll(y, distance), x)
        square[i + distance] = np.where(far, y, np.roll(x, -distance))
    print(square.tolist())

# %% [markdown]
# Six rows are no whole number of vectors; they are stored in pieces of 4
# and 2. Both ways of loading give the same: for each of `LANES` steps of the
# sum the pieces of a line of the panel, with their places in it.


# %% two ways to load a square tags=["exporti"] module="cpu.microkernel"
def _pieces(width):
    """Split a width into vectors: pairs (first, count)."""
    first = 0
    while first < width:
        count = min(LANES, 1 << (width - first).bit_length() - 1)
        yield first, count
        first += count


def _load_along(builder, pointer, width):
    return [
        [(j, peek(builder, pointer(k, j), n)) for j, n in _pieces(width)]
        for k in range(LANES)
    ]


def _load_across(builder, pointer, width):
    lines = [[] for _ in range(LANES)]
    for left in range(0, width, LANES):
        count = min(LANES, width - left)
        some = range(left, left + count)
        rows = [peek(builder, pointer(i, 0), LANES) for i in some]
        side = 1 << (count - 1).bit_length()  # of a square
        rows += rows[:1] * (side - count)  # their columns are not stored
        ahead = (pointer(i, 2 * LANES) for i in some)
        _prefetch(builder, ahead, write=False)  # of the square after next
        columns = _transposed(builder, rows)
        for k, line in enumerate(lines):
            square, x = k - k % side, columns[k % side]
            for j, n in _pieces(count):
                part = constant(I32, range(square + j, square + j + n))
                piece = builder.shuffle_vector(x, x, part)
                line.append((left + j, piece))
    return lines


# %% pack a square tags=["exporti"] module="cpu.microkernel"
def _packer(load_square):
    @intrinsic(prefer_literal=True)
    def pack(typing, panels, to, source, at, step, width, line):
        signature = types.void(panels, INT, source, INT, INT, width, line)

        def codegen(context, builder, signature, args):
            panels, source = (
                data(context, builder, signature.args[i], args[i])
                for i in (0, 2)
            )
            _, to, _, at, step, *_ = args

            def pointer(i, j):
                down = builder.add(at, builder.mul(step, step.type(i)))
                return builder.gep(source, [builder.add(down, at.type(j))])

            width, line = (x.literal_value for x in signature.args[5:])
            lines = load_square(builder, pointer, width)
            per = steps_in(signature.args[0])
            for n in range(0, LANES, per):
                for parts in zip(*lines[n : n + per], strict=True):
                    first = n // per * line + parts[0][0]
                    place = builder.add(to, to.type(first))
                    vectors = [vector for _, vector in parts]
                    x = vectors[0] if per == 1 else pair(builder, *vectors)
                    store(builder, x, builder.gep(panels, [place]))
            return context.get_dummy_value()

        return signature, codegen

    return pack


pack_along, pack_across = _packer(_load_along), _packer(_load_across)

# %% [markdown]
# What does not fill a square is packed one number at a time. Kernels ask with
# `steps_per_line` how many steps of the sum a line of the panel has, one, or
# two for the pairs of chapter 2.6.


# %% one number at a time tags=["exporti"] module="cpu.microkernel"
@intrinsic
def pack_one(typing, panels, to, low, high):
    """Write one number of a panel; high is the second of a pair, if any.

    For kernels.
    """
    signature = types.void(panels, INT, low, high)

    def codegen(context, builder, signature, args):
        panels = data(context, builder, signature.args[0], args[0])
        empty = constant(args[2].type, [ir.Undefined])
        vectors = [builder.insert_element(empty, x, I32(0)) for x in args[2:]]
        pairs = steps_in(signature.args[0]) == 2
        x = pair(builder, *vectors) if pairs else vectors[0]
        store(builder, x, builder.gep(panels, [args[1]]))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def steps_per_line(typing, panels):
    """2 for panels of pairs, else 1: a constant of the compiled kernel.

    For kernels.
    """
    count = ir.IntType(64)(steps_in(panels))
    return INT(panels), lambda context, builder, signature, args: count


# %% [markdown]
# A square along memory and a square across it, into the same panel:


# %% a square packed both ways
@inner
def pack_both(panels, source, step):
    pack_across(panels, 0, source, 0, step, ROWS, ROWS)
    pack_along(panels, ROWS * LANES, source, 0, step, ROWS, ROWS)


side = max(ROWS, LANES) + 3
source, panels = rng.normal(size=(side, side)), np.empty((2, LANES, ROWS))
pack_both(panels.reshape(-1), source.reshape(-1), side)
same = np.array_equal(panels[0], source[:ROWS, :LANES].T)
verdict("across", same, "is transposed")
same = np.array_equal(panels[1], source[:LANES, :ROWS])
verdict("along", same, "is copied")

# %% [markdown]
# ## The same loop without a pointer
#
# How fast could a product be at best? As fast as FMAs on registers alone. The
# loop can measure that too: twelve chains of FMAs, so that no one waits for
# another, and nothing to load. Chapter 2.4 holds its products against it.

# %% imports of the peak tags=["exporti"] module="bench.peak"
import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from llmnb.cpu.jit import arguments, team
from llmnb.cpu.tile import I32, LANES, multiply_add, spread, sum_loop
from llmnb.timing import fastest

# %% chains of FMAs tags=["exporti"] module="bench.peak"
CHAINS, TURNS = 12, 200_000


@intrinsic
def _run_chains(typing, x):
    """The end of CHAINS chains of TURNS vectors of FMAs, from x on."""

    def codegen(context, builder, signature, args):
        x, turns = spread(builder, args[0]), ir.IntType(64)(TURNS)

        def turn(_, chains):
            return [multiply_add(builder, y, x, x) for y in chains]

        ends = sum_loop(builder, turns, [], [], [x] * CHAINS, turn)
        total = ends[0]
        for end in ends[1:]:
            total = builder.fadd(total, end)
        return builder.extract_element(total, I32(0))

    return x(x), codegen


# %% the peak of this machine tags=["export"] module="bench.peak"
@team
def _all_threads(part, parts, address):
    (x,) = arguments(address)
    x[part] = _run_chains(x[part])


def fma_peak():
    """FLOP/s of float32 that numba's threads reach on registers alone.

    A measurement of about a tenth of a second, after compiling.
    """
    x = np.full(numba.get_num_threads(), 0.5, np.float32)
    seconds = fastest(_all_threads, x, runs=200)
    return 2 * LANES * CHAINS * TURNS * x.size / seconds


# %% [markdown]
# ## Take away
#
# - The tile is chosen so that its sums, a line of `b` and one number of `a`
#   fill the registers and no more.
# - A sum that is a phi has no address, and stays in a register.
# - Bias and start are added on the way out, for no pass over memory.
# - A square is transposed in registers in as many rounds as its side has
#   doublings.

# %% [markdown]
# ## Design note
#
# We could have read the matrices where they lie, with one inner loop for
# sums along rows and another for sums down them: no scratch memory, no
# intrinsics, and numba in its plainest form. Such a pair of loops reaches
# the ladder's third rung, and each new use, attention's five products among
# them, wants its own. The other way to a fast loop is assembly, which most
# libraries take: one kernel for each kind of processor. LLVM's vectors are one
# text for all of them, and it chooses the instructions and the registers.

# %% [markdown]
# ## Exercises
#
# **1** (★). A tile of R by S sums does R·S FMAs for R + S loads. It needs
# R·S registers for the sums, R for one factor, and one through which the
# other factor passes. Which tile with R ≤ S gets the most FMAs out of a
# load with 16 registers? With 32?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# 3 by 4 with 16 registers: 12 + 3 + 1 = 16, and 12/7 FMAs a load. With 32
# registers it is 5 by 5: 25 + 5 + 1 = 31, and 2.5 FMAs a load. Ours, 2
# vectors by 6 rows, makes 12/8. Once the loads are no longer what one waits
# for, more FMAs a load buy nothing.
# :::


# %% exercise 1, all tiles tags=["hide-cell"]
def best_tile(registers):
    tiles = [(r, s) for s in range(1, 32) for r in range(1, s + 1)]
    fits = [(r, s) for r, s in tiles if r * s + r + 1 <= registers]
    return max(fits, key=lambda tile: tile[0] * tile[1] / sum(tile))


# %% exercise 1, checked
verdict("16 registers", best_tile(16) == (3, 4), "3 by 4")
verdict("32 registers", best_tile(32) == (5, 5), "5 by 5")

# %% [markdown]
# **2** (★★). How many vectors does the transpose of a square of 16 by 16 in
# registers shuffle, and how many loads and stores would it take one number at
# a time?
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# Four rounds of 16 shuffles, 64, between 16 loads and 16 stores. One number at
# a time takes 256 of each.
# :::


# %% exercise 2 tags=["hide-cell"]
answers = 64, 256


# %% exercise 2, checked
class Counting:
    shuffled = 0

    def shuffle_vector(self, x, y, order):
        self.shuffled += 1


builder = Counting()
_transposed(builder, [None] * 16)
counted = builder.shuffled, 16 * 16
verdict("16 by 16", answers == counted, f"is {counted}")

# %% [markdown]
# ## Further reading
#
# - Van Zee and van de Geijn (2015),
#   [BLIS](https://doi.org/10.1145/2764454): why one small kernel is all that
#   has to be written anew for a new processor.
# - The LLVM project,
#   [Language Reference](https://llvm.org/docs/LangRef.html): the sections on
#   `phi`, `shufflevector` and `llvm.fmuladd`.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("A.2")
