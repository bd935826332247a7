# Written by `make export` from notebooks/appendix/02_tile.py: edit that file.

"""The innermost tile of a matrix product, in LLVM's language."""

__all__ = []


# imports of the microkernel
from typing import NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from llmnb.cpu.bfloat16 import multiply_add_pairs, pair, steps_in
from llmnb.cpu.jit import inlined
from llmnb.cpu.tile import (
    COLS, I32, LANES, ROWS, constant, data, multiply_add, peek, plus, spread,
    store, sum_loop,
)


# where a product lies
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


# the vectors of a tile
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


# ask for a row of out
LINE = 64  # bytes that memory gives at once
APART = LINE // (4 * LANES)  # vectors of float32 in them


def _ask_row(builder, row, to, vectors):
    """Ask for a row of out, or for the tile's last; to: as in _tile_sums."""
    last = builder.gep(to[0], [builder.mul(to[1], to[1].type(ROWS - 1))])
    row = builder.select(builder.icmp_unsigned("<", row, last), row, last)
    places = range(0, vectors * LANES, APART * LANES)
    _prefetch(builder, [builder.gep(row, [I32(j)]) for j in places], True)


# a turn of the loop
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


# one tile
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


# a transpose in registers
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


# two ways to load a square
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


# pack a square
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


# one number at a time
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
