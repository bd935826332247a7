# Written by `make export` from notebooks/3_gpu/13_tensor_cores.py: edit that file.

"""Tensor cores: a product by a whole warp, and copies."""

__all__ = [
    "cp_async", "cp_async_commit", "cp_async_wait", "ldmatrix",
    "ldmatrix_trans", "mma", "pack", "unpack",
]


# imports of the fragments
import functools
import inspect

import numpy as np

from llmnb.gpu.simulator import FULL, exchange, load4, promise4, running
from llmnb.gpu.simulator import store4


# a function that is an instruction
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


# the intrinsic
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


# addresses
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


# round two numbers
def _half(x):
    """The 16 bits of the bfloat16 nearest to a float32, as an int."""
    bits = int(np.float32(x).view(np.uint32))
    if x != x:
        return 0x7FFF
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


# pack and unpack
@instruction("cvt.rn.bf16x2.f32 $0, $2, $1;", "r", "ff", alone=True)
def pack(low, high):
    """Two float32 rounded to bfloat16, in an int32.

    Derived in chapter 3.13.
    """
    return np.uint32(_half(low) | _half(high) << 16).view(np.int32)


@instruction(
    "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "ff", "r", alone=True
)
def unpack(pair):
    """The two bfloat16 numbers of an int32, as float32.

    Derived in chapter 3.13.
    """
    bits = int(pair) & 0xFFFFFFFF
    low, high = bits << 16 & 0xFFFFFFFF, bits & 0xFFFF0000
    return np.uint32(low).view(np.float32), np.uint32(high).view(np.float32)


# who holds what
_LANE, _PAIR = np.arange(32)[:, None, None], np.arange(4)[None, :, None]
_GROUP, _NEAR = _LANE // 4, 2 * (_LANE % 4)
A_ROWS = _GROUP + 8 * (_PAIR % 2) + np.zeros((1, 1, 2), int)
A_COLS = _NEAR + 8 * (_PAIR // 2) + np.arange(2)
B_ROWS = _NEAR + 8 * _PAIR[:, :2] + np.arange(2)
B_COLS = _GROUP + np.zeros((1, 2, 2), int)
C_ROWS = (_GROUP + 8 * (_PAIR // 2))[..., 0]
C_COLS = (_NEAR + _PAIR % 2)[..., 0]


# the product of fragments
def _multiply(given):
    """The fragments of D, a row for each lane, from those of A, B and C."""
    sums = np.array([x[:4] for x in given], np.float64)
    pairs = np.array([x[4:] for x in given], np.int32)
    halves = pairs.view(np.uint16).astype(np.uint32) << 16
    numbers = halves.view(np.float32).reshape(32, 6, 2).astype(np.float64)
    a, b = np.empty((16, 16)), np.empty((16, 8))
    a[A_ROWS, A_COLS], b[B_ROWS, B_COLS] = numbers[:, :4], numbers[:, 4:]
    return (sums + (a @ b)[C_ROWS, C_COLS]).astype(np.float32)


# a warp multiplies
@instruction(
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
    "{$0,$1,$2,$3}, {$8,$9,$10,$11}, {$12,$13}, {$4,$5,$6,$7};",
    "ffff", "ffffrrrrrr",
)  # fmt: skip
def mma(c0, c1, c2, c3, a0, a1, a2, a3, b0, b1):
    """D = A B + C of a whole warp: each lane's four numbers of D.

    c0 to c3: float32, this lane's of C, (16, 8). a0 to a3, b0, b1: int32,
    its pairs of A, (16, 16), and of B, (16, 8). All 32 lanes must call it.

    Derived in chapter 3.13.
    """
    mine = c0, c1, c2, c3, a0, a1, a2, a3, b0, b1
    found, lane = exchange("mma", FULL, mine, combine=_multiply)
    return tuple(found[lane])


# rows to lanes
def _deal(rows):
    """The four registers of each lane from the rows that all have named."""
    return np.array(rows, np.int32).reshape(4, 32).T


def _deal_turned(rows):
    halves = np.array(rows, np.int32).view(np.uint16).reshape(4, 8, 8)
    turned = np.ascontiguousarray(halves.transpose(0, 2, 1))
    return turned.view(np.int32).reshape(4, 32).T


# load matrices
_LDMATRIX = "ldmatrix.sync.aligned.m8n8.x4{}.shared.b16 {{$0,$1,$2,$3}}, [$4];"


@instruction(_LDMATRIX.format(""), "rrrr", "s")
def ldmatrix(array, i):
    """Four matrices of 8 by 8 bfloat16, as a register of each.

    array: a shared array of int32, i: where this lane's row of 16 bytes
    begins in it, a multiple of 4. All 32 lanes must call it.

    Derived in chapter 3.13.
    """
    row = load4(array, i)
    found, lane = exchange("ldmatrix", FULL, row, combine=_deal)
    return tuple(found[lane])


@instruction(_LDMATRIX.format(".trans"), "rrrr", "s")
def ldmatrix_trans(array, i):
    """As `ldmatrix`, each matrix transposed.

    Derived in chapter 3.13.
    """
    row = load4(array, i)
    found, lane = exchange("ldmatrix.trans", FULL, row, combine=_deal_turned)
    return tuple(found[lane])


# copies on their way
@instruction("cp.async.cg.shared.global [$0], [$1], 16, $2;", "", "sgr")
def cp_async(shared, i, source, j, size):
    """Begin to copy 16 bytes from global to shared memory.

    shared, source: arrays of int32; i, j: where in them, multiples of 4.
    size: 16, or 0 for zeros instead, when `source` is not read.

    Derived in chapter 3.13.
    """
    promise4(shared, i)
    running().copies[-1].append((shared, i, source, j, size))


@instruction("cp.async.commit_group;", "", "")
def cp_async_commit():
    """Make a group of this lane's copies since the last group.

    Derived in chapter 3.13.
    """
    running().copies.append([])


@instruction("cp.async.wait_group 0;", "", "")
def cp_async_wait():
    """Wait until all groups of this lane have arrived.

    Derived in chapter 3.13.
    """
    lane = running()
    groups, lane.copies = lane.copies[:-1], lane.copies[-1:]
    for group in groups:
        for shared, i, source, j, size in group:
            four = load4(source, j) if size else 4 * (np.int32(0),)
            store4(shared, i, *four)
