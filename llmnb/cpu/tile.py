# Written by `make export` from notebooks/1_by_hand/07_matmul.py: edit that file.

"""The innermost tile of a matrix product, in LLVM's vector instructions."""

__all__ = [
    "COLS",
    "LANES",
    "ROWS",
    "VECTORS",
    "cpu_features",
    "has_bf16",
    "tile_shape",
]


# imports of the tile
import os
import re

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


# what the processor has
def cpu_features():
    """The features of the processor that numba compiles for, as a set.

    By LLVM's names, such as "avx2". NUMBA_CPU_FEATURES masks them, as it
    does for numba.

    Derived in chapter 1.7.
    """
    chosen = numba.config.CPU_FEATURES
    if chosen is not None:
        return {f[1:] for f in chosen.split(",") if f.startswith("+")}
    return {name for name, has in llvm.get_host_cpu_features().items() if has}


def tile_shape():
    """Rows, vectors in a row, and numbers in a vector of the inner loop.

    From the processor's features, or from LLMNB_TILE, as in "6x2x8". Raises
    ValueError when that is not three such numbers.

    Derived in chapter 1.7.
    """
    chosen = os.environ.get("LLMNB_TILE")
    if chosen and not re.fullmatch(r"[1-9]\d?x[1-9]x(4|8|16)", chosen):
        raise ValueError(
            f"LLMNB_TILE must be rows x vectors x 4, 8 or 16 numbers, as in "
            f"6x2x8, got {chosen!r}"
        )
    if chosen:
        return tuple(map(int, chosen.split("x")))
    shapes = {"avx512f": (12, 2, 16), "avx2": (6, 2, 8), "neon": (6, 4, 4)}
    found = [shapes[f] for f in shapes if f in cpu_features()]
    return found[0] if found else (4, 2, 4)


# the tile of this machine
ROWS, VECTORS, LANES = tile_shape()
COLS = VECTORS * LANES  # columns of a tile


# words for vectors
I32 = ir.IntType(32)


def _constant(number, values):
    return ir.Constant(ir.VectorType(number, len(values)), list(values))


def _data(context, builder, kind, array):
    """The address of an array's first number."""
    make = cgutils.create_struct_proxy(kind)
    return make(context, builder, value=array).data


def _load(builder, pointer, count):
    kind = ir.VectorType(pointer.type.pointee, count)
    return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=4)


def _store(builder, vector, pointer):
    pointer = builder.bitcast(pointer, vector.type.as_pointer())
    builder.store(vector, pointer, align=4)


def _spread(builder, number):
    vector = _constant(number.type, [ir.Undefined] * LANES)
    vector = builder.insert_element(vector, number, I32(0))
    return builder.shuffle_vector(vector, vector, _constant(I32, [0] * LANES))


# multiply and add
def _multiply_add(builder, a, b, c):
    double = isinstance(a.type.element, ir.DoubleType)
    name = f"llvm.fmuladd.v{a.type.count}f{64 if double else 32}"
    kind = ir.FunctionType(a.type, [a.type] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, [a, b, c])


# the loop over the sum
def _sum_loop(builder, a, b, depth, zero, multiply_add):
    """The sums of a tile over two panels, as vectors, row by row."""
    before = builder.block
    loop = builder.append_basic_block("step")
    after = builder.append_basic_block("done")
    builder.branch(loop)
    builder.position_at_end(loop)
    entry = [depth.type(0), a, b] + [zero] * (ROWS * VECTORS)
    phis = [builder.phi(value.type) for value in entry]
    k, a, b, *sums = phis
    columns = [
        _load(builder, builder.gep(b, [I32(v * LANES)]), LANES)
        for v in range(VECTORS)
    ]
    new = []
    for i in range(ROWS):
        x = _spread(builder, builder.load(builder.gep(a, [I32(i)])))
        for y in columns:
            new.append(multiply_add(builder, x, y, sums[len(new)]))
    steps = [builder.add(k, k.type(1))]
    steps += [builder.gep(a, [I32(ROWS)]), builder.gep(b, [I32(COLS)])]
    for phi, first, then in zip(phis, entry, steps + new, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(then, loop)
    again = builder.icmp_signed("<", steps[0], depth)
    builder.cbranch(again, loop, after)
    builder.position_at_end(after)
    return new


# the vectors of a tile
def _places(builder, base, at, row, col):
    """The addresses of a tile's vectors, row by row."""
    for i in range(ROWS):
        for j in range(0, COLS, LANES):
            down = builder.mul(row, row.type(i))
            across = builder.mul(col, col.type(j))
            step = builder.add(at, builder.add(down, across))
            yield builder.gep(base, [step])


def _prefetch(builder, pointers):
    """Ask for the cache lines that will be written, ahead of time."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
    name = "llvm.prefetch.p0"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    for pointer in pointers:
        address = builder.bitcast(pointer, byte)
        builder.call(function, [address, I32(1), I32(3), I32(1)])


# one tile
I64 = types.int64


@intrinsic
def multiply_tile(typing, out, at, start, bias, panels, a, b, depth):
    """Write one tile: out = start + bias + the product of two panels.

    For kernels. out, start, bias and panels are flat arrays. at: seven
    integers, where the tile begins in out and out's step from row to row;
    where it begins in start and start's steps from row to row and from
    column to column; where it begins in bias and the step from column to
    column. a, b: where the panels begin; depth: their lines, at least 1.
    """
    signature = types.void(out, at, start, bias, panels, I64, I64, I64)

    def codegen(context, builder, signature, args):
        kinds = signature.args
        out, start, bias, panels = (
            _data(context, builder, kinds[i], args[i]) for i in (0, 2, 3, 4)
        )
        at = cgutils.unpack_tuple(builder, args[1])
        a, b = (builder.gep(panels, [x]) for x in args[5:7])
        one = at[0].type(1)
        places = list(_places(builder, out, at[0], at[1], one))
        _prefetch(builder, places[::VECTORS])
        zero = _constant(out.type.pointee, [0.0] * LANES)
        pairs = kinds[4].dtype == types.uint32
        fma = _multiply_add_pairs if pairs else _multiply_add
        sums = _sum_loop(builder, a, b, args[7], zero, fma)
        shift = list(_places(builder, bias, at[5], one.type(0), at[6]))
        starts = _places(builder, start, at[2], at[3], at[4])
        for x, p, q, r in zip(sums, places, starts, shift, strict=True):
            x = builder.fadd(x, _load(builder, r, LANES))
            _store(builder, builder.fadd(x, _load(builder, q, LANES)), p)
        return context.get_dummy_value()

    return signature, codegen


# a transpose in registers
def _transposed(builder, rows):
    rows, distance = list(rows), LANES // 2
    while distance:
        first, second = [], []
        for j in range(LANES):
            far = bool(j & distance)
            first.append(j - distance + LANES if far else j)
            second.append(j + LANES if far else j + distance)
        for i in range(LANES):
            if not i & distance:
                x, y = rows[i], rows[i + distance]
                shuffle = _constant(I32, first)
                rows[i] = builder.shuffle_vector(x, y, shuffle)
                shuffle = _constant(I32, second)
                rows[i + distance] = builder.shuffle_vector(x, y, shuffle)
        distance //= 2
    return rows


# two ways to load a square
def _pieces(width):
    """Split a width into vectors: pairs (first, count)."""
    first = 0
    while first < width:
        count = LANES
        while count > width - first:
            count //= 2
        yield first, count
        first += count


def _load_along(builder, pointer, width):
    return [
        [(j, _load(builder, pointer(k, j), n)) for j, n in _pieces(width)]
        for k in range(LANES)
    ]


def _load_across(builder, pointer, width):
    lines = [[] for _ in range(LANES)]
    for left in range(0, width, LANES):
        count = min(LANES, width - left)
        rows = [
            _load(builder, pointer(left + i, 0), LANES) for i in range(count)
        ]
        rows += rows[:1] * (LANES - count)  # their columns are not stored
        for line, x in zip(lines, _transposed(builder, rows), strict=True):
            for j, n in _pieces(count):
                part = _constant(I32, range(j, j + n))
                piece = builder.shuffle_vector(x, x, part)
                line.append((left + j, piece))
    return lines


# pack a square
def _packer(load):
    @intrinsic(prefer_literal=True)
    def pack(typing, panels, to, source, at, step, width):
        signature = types.void(panels, I64, source, I64, I64, width)

        def codegen(context, builder, signature, args):
            panels, source = (
                _data(context, builder, signature.args[i], args[i])
                for i in (0, 2)
            )
            _, to, _, at, step, _ = args

            def pointer(i, j):
                down = builder.add(at, builder.mul(step, step.type(i)))
                return builder.gep(source, [builder.add(down, at.type(j))])

            width = signature.args[5].literal_value
            lines = load(builder, pointer, width)
            per = _per_line(signature.args[0])
            for n in range(0, LANES, per):
                for parts in zip(*lines[n : n + per], strict=True):
                    first = n // per * width + parts[0][0]
                    place = builder.add(to, to.type(first))
                    vectors = [vector for _, vector in parts]
                    x = vectors[0] if per == 1 else _pair(builder, *vectors)
                    _store(builder, x, builder.gep(panels, [place]))
            return context.get_dummy_value()

        return signature, codegen

    return pack


pack_along, pack_across = _packer(_load_along), _packer(_load_across)


# pairs of bfloat16
HALVES = "avx512bf16" in cpu_features() and LANES == 16  # has vdpbf16ps


def _per_line(kind):
    """Steps of the sum in one line of a panel."""
    return 2 if kind.dtype == types.uint32 else 1


def _pair(builder, low, high):
    """Round two vectors to bfloat16, side by side in uint32."""
    count = low.type.count

    def every(bits):
        return _constant(I32, [bits] * count)

    def rounded(x):
        bits = builder.bitcast(x, ir.VectorType(I32, count))
        odd = builder.and_(builder.lshr(bits, every(16)), every(1))
        return builder.add(bits, builder.add(odd, every(0x7FFF)))

    low = builder.lshr(rounded(low), every(16))
    return builder.or_(low, builder.and_(rounded(high), every(0xFFFF0000)))


# multiply and add pairs
def _multiply_add_pairs(builder, a, b, c):
    if HALVES:
        llvm.initialize_native_asmparser()  # reads the instruction's name
        kind = ir.FunctionType(c.type, [a.type, b.type, c.type])
        text, where = "vdpbf16ps $2, $1, $0", "=v,v,v,0"
        return builder.call(ir.InlineAsm(kind, text, where), [b, a, c])
    a, b = (_split(builder, x, c.type) for x in (a, b))
    for x, y in zip(a, b, strict=True):
        c = _multiply_add(builder, x, y, c)
    return c


def _split(builder, pairs, kind):
    """The two halves of a vector of pairs, as float32."""
    shift = ir.Constant(pairs.type, [16] * LANES)
    mask = ir.Constant(pairs.type, [0xFFFF0000] * LANES)
    halves = builder.shl(pairs, shift), builder.and_(pairs, mask)
    return [builder.bitcast(x, kind) for x in halves]


# is it worth it here
def has_bf16():
    """Whether this processor multiplies bfloat16 faster than float32.

    LLMNB_BF16=emulate says yes anyway, for tests on other processors.

    Derived in chapter 1.7.
    """
    return HALVES or os.environ.get("LLMNB_BF16") == "emulate"


# one number at a time
@intrinsic
def pack_one(typing, panels, to, low, high):
    """Write one number of a panel; high is the second of a pair, if any.

    For kernels.
    """
    signature = types.void(panels, I64, low, high)

    def codegen(context, builder, signature, args):
        panels = _data(context, builder, signature.args[0], args[0])
        empty = _constant(args[2].type, [ir.Undefined])
        vectors = [builder.insert_element(empty, x, I32(0)) for x in args[2:]]
        pairs = _per_line(signature.args[0]) == 2
        x = _pair(builder, *vectors) if pairs else vectors[0]
        _store(builder, x, builder.gep(panels, [args[1]]))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def steps_per_line(typing, panels):
    """2 for panels of pairs, else 1: a constant of the compiled kernel.

    For kernels.
    """
    count = ir.IntType(64)(_per_line(panels))
    return I64(panels), lambda context, builder, signature, args: count
