# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       cpu.panels: "Matrices packed in panels, and their products tile by tile."
# ---

# %% [markdown]
# # Panels: a matrix in the order in which it is read
#
# > Blocks of any matrix, packed for one inner loop; compiled once, and called
# > by address from every product of the model.
#
# *Reading time: 16 minutes. You need: why products pack
# ([chapter 2.4](../2_cpu/04_matmul.ipynb)) and the tile of
# [chapter A.2](02_tile.ipynb).*

# %% [markdown]
# ## Where we are
#
# A panel holds a few rows of one factor, or a few columns of the other, step by
# step along the sum. The tile multiplies two of them. Between a matrix and its
# tiles three things are left to do: pack a block of it, go through all tiles of
# a block, and do both in code that is compiled once. At the end of this
# chapter you can
#
# - pack a block of a matrix, or of its transpose, with the same code;
# - say what happens to the tiles that stick out, and why a number does not
#   depend on where in the batch it stands;
# - call a compiled function by its address, and say what that saves;
# - place three sizes of block in three caches.

# %% [markdown]
# ## Setup

# %% setup
from llmnb.book.verify import compare, verdict
from llmnb.cpu.jit import inner

# %% imports of the panels tags=["exporti"]
import functools
from typing import NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from llmnb.cpu.jit import MOST, inlined, routine
from llmnb.cpu.microkernel import (
    INT,
    LINE,
    Place,
    moved,
    multiply_tile,
    pack_across,
    pack_along,
    pack_one,
    steps_per_line,
)
from llmnb.cpu.tile import COLS, LANES, ROWS, VECTORS, data

# %% random numbers
rng = np.random.default_rng(5)

# %% [markdown]
# ## Pack a block
#
# A block begins somewhere in a flat array. From one of its rows to the next it
# is `row` numbers further, and along the sum `col` numbers. A transposed matrix
# is the same memory with the two exchanged. Whole squares go by vectors;
# whatever is left over goes one number at a time, with zeros where a vector
# reaches beyond the matrix, because zeros add nothing to a sum.


# %% a block tags=["exporti"]
class Block(NamedTuple):
    """A part of a matrix: where it begins, its two steps, and its size.

    row: from row to row; col: along the sum, of `depth` numbers.
    """

    at: int
    row: int
    col: int
    rows: int
    depth: int


@inlined
def _number(source, block, i, k):
    """A number of a block, 0 beyond its end."""
    if i < block.rows and k < block.depth:
        return source[block.at + i * block.row + k * block.col]
    return source.dtype.type(0)


# %% pack what is left over tags=["exporti"]
@inlined
def _pack_rest(panels, to, source, block, lines, rows, depth, width):
    """Pack what vectors have not: they did `depth` steps of some rows."""
    per = steps_per_line(panels)
    for r in range(0, block.rows, width):
        done = min(width, max(0, rows - r))
        end = min(width, (block.rows - r + LANES - 1) // LANES * LANES)
        for k in range(depth if done == end else 0, block.depth, per):
            place = to + r * lines + k // per * width
            for i in range(done if k < depth else 0, end):
                low = high = _number(source, block, r + i, k)
                if per == 2:
                    high = _number(source, block, r + i, k + 1)
                pack_one(panels, place + i, low, high)


# %% [markdown]
# Where rows lie side by side (`row` is 1) the loop goes along them through all
# panels first. Memory comes in *pages* of 4 KB, and the processor keeps a
# short list of where the last ones are; neighbours share a page, so fewer must be
# looked up.


# %% pack squares tags=["exporti"]
def _squares(count, width):
    """Of `count` rows, into panels of `width`."""

    @inlined
    def pack(panels, to, source, block, lines, rows, depth):
        (at, row, col, _, _), per = block, steps_per_line(panels)
        if col == 1:
            for r in range(rows[0], rows[1], count):
                p, q = to + (r - r % width) * lines + r % width, at + r * row
                for k in range(0, depth, LANES):
                    x = p + k // per * width
                    pack_across(panels, x, source, q + k, row, count, width)
        else:
            for k in range(0, depth, LANES):
                p, q = to + k // per * width, at + k * col
                for r in range(rows[0], rows[1], count):
                    x = p + (r - r % width) * lines + r % width
                    pack_along(panels, x, source, q + r, col, count, width)

    return pack


# %% [markdown]
# Full panels are packed first. Of one that is not full, as many rows as fill vectors
# are packed in squares too. With panels of 48, a head of 32 channels fills none, and
# one of 64 fills one and leaves 16. One number at a time, packing them would take long.


# %% pack a block tags=["exporti"]
def _packing(width):
    whole, piece = _squares(width, width), _squares(LANES, width)
    wide = width > LANES

    @inlined
    def pack(panels, to, source, block):
        per, straight = steps_per_line(panels), 1 in (block.row, block.col)
        lines = (block.depth + per - 1) // per
        depth = block.depth // LANES * LANES if straight else 0
        rows = full = block.rows // width * width
        whole(panels, to, source, block, lines, (0, full), depth)
        if wide:
            rows = block.rows // LANES * LANES
            piece(panels, to, source, block, lines, (full, rows), depth)
        _pack_rest(panels, to, source, block, lines, rows, depth, width)

    return pack


_pack_rows, _pack_cols = _packing(ROWS), _packing(COLS)


# %% a matrix, its transpose, and every other row, packed
@inner
def pack_flat(panels, source, row, col, rows, depth):
    _pack_rows(panels, 0, source, Block(0, row, col, rows, depth))


def packed(x):
    """Panels of x, rows filled up with zeros, by NumPy."""
    full = np.zeros((-(-len(x) // ROWS) * ROWS, x.shape[1]))
    full[: len(x)] = x
    return full.reshape(-1, ROWS, x.shape[1]).transpose(0, 2, 1).ravel()


x = rng.normal(size=(2 * ROWS + 1, 3 * LANES + 2))
for name, view in (("rows", x), ("columns", x.T), ("every other", x[::2])):
    want = packed(view)
    panels = np.full_like(want, np.nan)
    row, col = (step // x.itemsize for step in view.strides)
    pack_flat(panels, x.reshape(-1), row, col, *view.shape)
    verdict(name, np.array_equal(panels, want), "packed")

# %% [markdown]
# ## All tiles of a block
#
# A long sum is cut into chains of multiplications, of `chain` steps each. The
# first chain of a tile adds start and bias; the others go on from `out`, which
# was written one chain ago and is still in a near cache.
#
# A tile that lacks rows, or whose last vector reaches beyond the matrix, is computed
# in a spare tile, and only the part that exists is copied to `out`. So nothing is ever
# written outside of it. The spare tile has a row for the bias, which is added first
# there too: a
# number does not depend on where its row lies in the batch, down to its last
# bit.
#
# A panel of columns may end early. Then only the vectors that are there are
# computed: two of them in a tile that is two vectors wide, a single one in a tile of
# one, which is slow, for it has too few sums to hide the wait for its loads.


# %% what a product works on tags=["exporti"]
class Flat(NamedTuple):
    """The flat arrays of a product; spare: room for a tile and two rows.

    The first row of the two is zero, the second is for the bias.
    """

    out: np.ndarray
    start: np.ndarray
    bias: np.ndarray
    panels: np.ndarray
    spare: np.ndarray


# %% a tile tags=["exporti"]
def _tiles_of(vectors):
    @inlined
    def tile(x, at, a, b, lines, chain, ask):
        out, start, bias, panels, spare = x
        place, apart, step = ask[:3]
        for k in range(0, lines, chain):
            n, p, q = min(chain, lines - k), a + k * ROWS, b + k * COLS
            ahead = (place, step) + ask[3:]
            multiply_tile(
                out, at, start, bias, panels, p, q, n, vectors, ahead
            )
            o, line, zeros = at.out, at.out_row, ROWS * COLS
            at, start, bias = Place(o, line, o, line, 1, zeros, 0), out, spare
            place += apart

    return tile


_whole, _pair, _narrow = _tiles_of(VECTORS), _tiles_of(2), _tiles_of(1)


@inlined
def _tile(x, at, a, b, lines, chain, ask, cols):
    """A tile; lines: of its panels; chain: lines of one sum.

    Of its vectors of columns only those that `cols` reaches are computed.
    ask: as _asked gives it; what follows is as in multiply_tile.
    """
    if cols > COLS - LANES:
        _whole(x, at, a, b, lines, chain, ask)
    else:
        done = 2 * LANES if VECTORS > 2 and cols > LANES else 0
        if done:
            _pair(x, at, a, b, lines, chain, ask)
        for j in range(done, cols, LANES):
            _narrow(x, moved(at, 0, j), a, b + j, lines, chain, ask)


# %% a tile at the edge tags=["exporti"]
@inlined
def _edge_tile(x, at, a, b, lines, chain, ask, rows, cols):
    """A tile of which only some rows and columns exist."""
    out, start, bias, panels, spare = x
    shift = (ROWS + 1) * COLS
    for j in range(cols):
        spare[shift + j] = bias[at.bias + j * at.bias_col]
        for i in range(rows):
            spare[i * COLS + j] = start[moved(at, i, j).start]
    place = Place(0, COLS, 0, COLS, 1, shift, 1)
    flat = Flat(spare, spare, spare, panels, spare)
    _tile(flat, place, a, b, lines, chain, ask, cols)
    for i in range(rows):
        for j in range(cols):
            out[moved(at, i, j).out] = spare[i * COLS + j]


# %% [markdown]
# What is packed next lies far away, in memory, and a tile takes its time with
# what is near: so each of its turns asks for a line of the columns that come
# next (chapter A.2). Where a column is a piece of memory along the sum, each chain of
# each tile asks for one column, the last tile for the first ones; those that the first
# tiles ask for may lie beyond the next panel, which does no harm. Where columns lie
# side by side, the last tiles ask for them line by line, and the others for one
# address again and again: what comes too early is gone when it is needed.


# %% what a tile asks for tags=["exporti"]
class Ahead(NamedTuple):
    """What is packed next: an address, and two steps in bytes.

    row: from column to column; col: along the sum.
    """

    at: int
    row: int
    col: int


@inlined
def _asked(ahead, left, lines, chain, per, size):
    """Where a tile's first chain asks, how much further the next; the step.

    left: tiles that follow in the block. per: steps of a line. size: bytes
    of a number.
    """
    if ahead.col == size:
        chains = (lines + chain - 1) // chain
        first = ahead.at + left * chains * ahead.row
        return first, ahead.row, chains * per * size
    first, step = left // per * LINE, per * ahead.col
    if ahead.row == size and first < COLS * size:
        first += ahead.at + left % per * ahead.col
        return first, chain * step, step
    return ahead.at, 0, 0


# %% all tiles of a block tags=["exporti"]
@inlined
def all_tiles(x, at, a, b, sizes, ahead, asked):
    """Compute a block, tile by tile.

    x: a Flat; at: a Place; a, b: where the panels begin. asked: a function
    for what each tile asks for.
    """
    rows, cols, steps, chain = sizes
    per = steps_per_line(x.panels)
    lines, chain = (steps + per - 1) // per, chain // per
    for j in range(0, cols, COLS):
        for i in range(0, rows, ROWS):
            here, p, q = moved(at, i, j), a + i * lines, b + j * lines
            m, n = min(ROWS, rows - i), min(COLS, cols - j)
            left = (rows - i - 1) // ROWS
            ask = asked(ahead, left, lines, chain, per, x.out.itemsize)
            if m == ROWS and n % LANES == 0:
                _tile(x, here, p, q, lines, chain, ask, n)
            else:
                _edge_tile(x, here, p, q, lines, chain, ask, m, n)


# %% [markdown]
# What a tile asks for is an argument, for
# [chapter 5.11](../5_modern/11_inbackward.ipynb) wants something else to come near.
#
# ## Compile once
#
# A kernel that calls a compiled function takes a copy of its code and
# optimises it again. With packing and tiles in every product and, in
# [chapter 2.5](../2_cpu/05_attention.ipynb), many times in attention, the first
# step of a training run would wait half a minute for the compiler. So these
# three functions are compiled once for each type of number, into routines with
# an address, as a C compiler would. Kernels get the addresses as arguments and
# jump there.


# %% three routines tags=["exporti"]
ALL = 1 << 60  # the length of an array that is only an address


def _rows_routine(panels, to, source, block):
    _pack_rows(carray(panels, ALL), to, carray(source, ALL), block)


def _cols_routine(panels, to, source, block):
    _pack_cols(carray(panels, ALL), to, carray(source, ALL), block)


def _tiles_routine(out, start, bias, panels, spare, at, pair, sizes, ahead):
    out, start, bias = carray(out, ALL), carray(start, ALL), carray(bias, ALL)
    x = Flat(out, start, bias, carray(panels, ALL), carray(spare, ALL))
    all_tiles(x, at, pair[0], pair[1], sizes, ahead, _asked)


# %% their addresses tags=["exporti"]
class Routines(NamedTuple):
    """The addresses of what packs rows, packs columns, and multiplies."""

    pack_rows: int
    pack_cols: int
    multiply: int


BLOCK = types.NamedUniTuple(INT, 5, Block)
PLACE = types.NamedUniTuple(INT, 7, Place)
PAIR, SIZES = types.UniTuple(INT, 2), types.UniTuple(INT, 4)
NEXT = types.NamedUniTuple(INT, 3, Ahead)
_compiled = []  # an address is good as long as its routine is kept


@functools.cache
def _routines(panel, number):
    """The Routines for two dtypes of NumPy, as a plain tuple."""
    p, x = (types.CPointer(numba.from_dtype(d)) for d in (panel, number))
    pack = types.void(p, INT, x, BLOCK)
    multiply = types.void(x, x, x, p, x, PLACE, PAIR, SIZES, NEXT)
    packers = routine(_rows_routine, pack), routine(_cols_routine, pack)
    made = *packers, routine(_tiles_routine, multiply)
    _compiled.extend(made)
    return tuple(one.address for one in made)


# %% [markdown]
# Two intrinsics write the jump. An array goes by its address, anything else
# as it is.


# %% jump to a routine tags=["exporti"]
def _jump(context, builder, signature, args):
    """Call the address args[0] with the other arguments."""
    values = []
    for kind, value in zip(signature.args[1:], args[1:], strict=True):
        if isinstance(kind, types.Array):
            value = data(context, builder, kind, value)
        values.append(value)
    kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
    function = builder.inttoptr(args[0], kind.as_pointer())
    builder.call(function, values)
    return context.get_dummy_value()


# %% the routines, called from kernels tags=["exporti"]
@intrinsic
def pack(typing, code, panels, to, source, block):
    """Pack a Block of a matrix into panels; code: a packing routine.

    For kernels. The panels begin at panels[to]. For a routine that packs
    columns, columns are meant where Block says rows.
    """
    return types.void(INT, panels, INT, source, BLOCK), _jump


@intrinsic
def _multiply(
    typing, code, out, start, bias, panels, spare, at, pair, sizes, ahead
):
    kinds = out, start, bias, panels, spare
    return types.void(INT, *kinds, PLACE, PAIR, SIZES, ahead), _jump


@inlined
def multiply_panels(code, x, at, pair, sizes, ahead):
    """Write a block: out = start + bias + the product of packed panels.

    For kernels. code: the multiplying routine. x: a Flat. at: a Place.
    pair: where the panels of both factors begin. sizes: rows, columns,
    steps, and how many of those are one chain of additions. ahead: an Ahead;
    with steps of 0 at an address that may be read, when nothing is next.
    """
    out, start, bias, panels, spare = x
    _multiply(code, out, start, bias, panels, spare, at, pair, sizes, ahead)


# %% [markdown]
# ## Three sizes of block, three caches
#
# The panels must stay in a cache while they are used. The first level, nearest
# to a core, has some 32 or 48 KB; the second half a megabyte or more; the third,
# shared by the cores, some tens of megabytes. Figure 2.4.3 shows how the blocks
# fit.
#
# A chain is 384 steps of the sum: a panel of columns takes 24 KB for them in
# float32 and 16 columns, and mostly stays in the first level while the panels
# of rows pass by. (With AVX-512 it has 48 columns and 72 KB, and comes from the
# second level.) Panels hold two chains, 768 steps, so that a tile of `out` is
# fetched once for both. Those of the rows take at most 264 rows, 811 KB, and
# stay in the second level, or near it, while all columns pass by: 256 tokens
# are one block. At most 768 columns are packed at a time for several blocks of
# rows; they wait in the third level.

# %% the blocks tags=["export"]
DEPTH = 384  # steps of the sum in a chain
LENGTH = 2 * DEPTH  # steps of the sum in a block
HEIGHT = 264 // ROWS * ROWS  # rows in a block
WIDTH = 768 // COLS * COLS  # columns in a block, where rows make several
SECOND = HEIGHT * LENGTH  # where the panels of columns begin
SPARE = SECOND + WIDTH * LENGTH  # where the spare tile begins
ROOM = SPARE + (ROWS + 2) * COLS  # where there is room for part of a gradient
TALL = 4 * HEIGHT  # its rows


def work_shape():
    """The shape of the scratch memory that the products pack into.

    A row for each thread that numba may use, of 6.4 MB in float32. The
    second half is written by `matmul_learn` alone, and otherwise takes none.
    """
    return MOST, ROOM + TALL * WIDTH


WORK = "{} {}!?".format(*work_shape())  # as `shapes` reads it


# %% [markdown]
# A block of rows, once packed, is multiplied with one panel of columns after
# the other. A panel is packed just before it is needed, and while it is
# multiplied, its tiles ask for what the next one will be packed from: memory
# works while the processor computes. Where there are more rows than fit in a
# block, the first block packs the panels and leaves them for the others, each
# `apart` from the one before. Otherwise all of them take the same place, which
# so stays in the second-level cache.


# %% a block of rows tags=["exporti"]
@inlined
def _ahead(b, at, row, col):
    """The Ahead of columns that begin somewhere in a flat array."""
    size = b.itemsize
    return Ahead(np.int64(b.ctypes.data) + at * size, row * size, col * size)


@inlined
def multiply_rows(code, x, at, rows, b, columns, apart, fresh):
    """Multiply a packed block of rows with columns, panel by panel.

    x: a Flat; at: a Place. columns: a Block of b. fresh: pack them too.
    """
    for c in range(0, columns.rows, COLS):
        m, p = min(COLS, columns.rows - c), columns.at + c * columns.row
        to, ahead = SECOND + c * apart, _ahead(b, p, 0, 0)
        if fresh:
            block = Block(p, columns.row, columns.col, m, columns.depth)
            pack(code.pack_cols, x.panels, to, b, block)
        if fresh and m < columns.rows - c:
            ahead = _ahead(b, p + COLS * columns.row, columns.row, columns.col)
        here, sizes = moved(at, 0, c), (rows, m, columns.depth, DEPTH)
        multiply_panels(code.multiply, x, here, (0, to), sizes, ahead)


# %% the scratch memory tags=["export"]
def check_bf16(name, bf16, dtype):
    """Raise TypeError where products in dtype cannot be rounded."""
    if bf16 and dtype != np.float32:
        raise TypeError(f"{name}: bf16 wants float32 arrays, got {dtype}")


def scratch(work, bf16, dtype):
    """What kernels need: Routines as a plain tuple, panels and work.

    The routines are compiled when they are not in the cache. work is
    allocated if it is None. panels is the same memory, for bf16 as uint32.
    """
    if work is None:
        work = np.empty(work_shape(), dtype)
    panels = work.view(np.uint32) if bf16 else work
    return _routines(panels.dtype, work.dtype), panels, work


# %% [markdown]
# A block of a product, one that ends inside a tile, from a kernel that only
# has addresses. `out` is a corner of a larger array whose rest stays as it is:


# %% a block of a product
@inner
def one_block(out, a, b, code, panels, spare):
    code = Routines(*code)
    rows, cols, steps = out.shape[0] - 1, out.shape[1] - 1, a.shape[1]
    spare[ROWS * COLS : (ROWS + 1) * COLS] = 0
    flat_a, flat_b, flat = a.reshape(-1), b.reshape(-1), out.reshape(-1)
    left = Block(0, steps, 1, rows, steps)
    pack(code.pack_rows, panels, 0, flat_a, left)
    pack(
        code.pack_cols, panels, SECOND, flat_b, Block(0, steps, 1, cols, steps)
    )
    zeros = ROWS * COLS
    at = Place(0, cols + 1, zeros, 0, 0, zeros, 0)
    x = Flat(flat, spare, spare, panels, spare)
    sizes = rows, cols, steps, 16  # four chains
    nothing = Ahead(np.int64(panels.ctypes.data), 0, 0)
    multiply_panels(code.multiply, x, at, (0, SECOND), sizes, nothing)


a, b = rng.normal(size=(31, 50)), rng.normal(size=(70, 50))
code, panels, work = scratch(None, False, a.dtype)
out = np.full((32, 71), 7.0)
one_block(out, a, b, code, panels[0], work[0, SPARE:])
compare("a block", out[:-1, :-1], a @ b.T, tol=1e-12)
verdict("the rest", (out[-1] == 7).all() and (out[:, -1] == 7).all(), "stays")

# %% [markdown]
# ## Take away
#
# - An offset and two steps describe a block of any matrix and of its
#   transpose; packing hides the difference from everything after it.
# - A tile that sticks out is computed elsewhere, in the same order.
# - What many kernels call is compiled once, and called by address.

# %% [markdown]
# ## Design note
#
# Panels cost 3.2 MB for each thread and a copy of both factors. Where a factor
# is used again and again, as the weights are when a model writes text, it can
# be packed once and kept: [chapter 4.19](../4_practice/19_cache.ipynb) does.
# In training the weights change with every step, and a weight that is packed
# once is multiplied with every token of the batch.

# %% [markdown]
# ## Exercises
#
# **1** (★★). A panel of columns must stay in a first-level cache of 32 KB with
# room for the line of rows that passes by. For 8 by 48 tiles (AVX-512), how
# long may it be? What does the package's choice of 384 steps ask of the cache?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# 48 columns of float32 are 192 bytes a step, and a line of 8 rows has 32: 170
# steps fit. 384 steps are 72 KB, more than the first level of the processors
# that have AVX-512, which then take the panel from the second: three vectors a
# step, in the time of 24 FMAs, come from there as fast as they are needed. With
# 170 steps a tile would end its sums, and begin them anew, more than twice as
# often.
# :::

# %% exercise 1 tags=["hide-cell"]
steps, asked = 170, 72 << 10

# %% exercise 1, checked
step, line = 4 * 48, 4 * 8  # bytes
over = line + step * np.array([steps, steps + 1]) > 32 << 10
verdict("the longest", over.tolist() == [False, True], f"has {steps} steps")
verdict("384 steps", asked == 384 * step, f"ask for {asked >> 10} KB")

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("A.3")
