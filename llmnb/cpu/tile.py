# Written by `make export` from notebooks/appendix/02_tile.py: edit that file.

"""The shape of a tile of sums, and words for LLVM's vectors."""

__all__ = ["COLS", "LANES", "ROWS", "VECTORS", "cpu_features", "tile_shape"]


# imports of the tile
import os
import re

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features


# what the processor has
def cpu_features():
    """The features of the processor that numba compiles for, as a set.

    By LLVM's names, such as "avx2". NUMBA_CPU_FEATURES and NUMBA_ENABLE_AVX
    mask them, as they do for numba.

    Derived in chapter A.2.
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

    Derived in chapter A.2.
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


# the tile of this machine
ROWS, VECTORS, LANES = tile_shape()
COLS = VECTORS * LANES  # columns of a tile


# words for vectors
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


# spread, multiply and add
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


# add in order
def plus(builder, a, b):
    """a + b of vectors, whose sum with others is not taken apart."""
    return _called(builder, "arithmetic.fence", builder.fadd(a, b))


# the loop over the sum
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
