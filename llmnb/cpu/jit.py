# Written by `make export` from notebooks/03_encoder.py: edit that file.

"""Turn tokens into vectors and send gradients back.

A token's vector is a row of one table plus a row of another; the backward pass
adds into the rows that were read.
"""

__all__ = [
    "cache_folder",
    "device",
    "inner",
    "kernel",
    "routine",
    "share",
    "team",
]


# imports of the decorator
import functools
import hashlib
import os
import sys
from pathlib import Path

import numba
from numba.extending import register_jitable


# where compiled kernels are kept
@functools.cache
def cache_folder():
    """The folder for compiled kernels, named by a hash of their sources.

    numba looks only at the file of the kernel it loads, so a change in a
    function that the kernel calls would go unseen. A folder for each state
    of the sources cannot hold a stale kernel. `LLMNB_CACHE` moves it. None
    where no folder can be written.

    Derived in chapter 3.
    """
    text = numba.__version__ + sys.version
    text += os.environ.get("LLMNB_TILE", "")  # see chapter 6
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text += path.name + path.read_text("utf-8")
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    home = os.environ.get("LLMNB_CACHE") or Path.home() / ".cache" / "llmnb"
    folder = Path(home).absolute() / "kernels" / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


# compile, with or without a cache
FASTMATH = {"reassoc", "contract", "nnan", "ninf", "nsz"}


def _compile(decorator, function, *args, **options):
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    options |= {"fastmath": FASTMATH, "error_model": "numpy"}
    ours = function.__module__.startswith("llmnb.")
    folder = cache_folder() if ours else None
    if folder is None:
        return decorator(*args, **options)(function)
    saved = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder)
    try:
        return decorator(*args, cache=True, **options)(function)
    finally:
        numba.config.CACHE_DIR = saved


# the decorator of all kernels
def kernel(function, parallel=True):
    """Compile a function with numba: parallel, fastmath, cached on disk.

    `fastmath` lets LLVM reorder sums into vectors and assumes that no NaN or
    infinity occurs; division stays exact. `error_model="numpy"` drops the
    test for division by zero, which would keep loops from being vectorised.
    A function defined in a notebook is compiled anew each time. Sets
    GOMP_SPINCOUNT, unless it is set, so that idle threads soon sleep.

    Derived in chapter 3.
    """
    options = {"parallel": parallel, "no_cfunc_wrapper": True}
    return _compile(numba.njit, function, **options)


# the decorators for one thread
def inner(function):
    """Compile a function for the thread that calls it; see `kernel`.

    For what kernels call in their loops, and for work too small to share.

    Derived in chapter 3.
    """
    options = {"forceinline": True, "no_cfunc_wrapper": True}
    return _compile(numba.njit, function, **options)


def device(function):
    """Let kernels call a function, which is compiled along with them.

    Quicker to compile than `inner`, and not a compiled function for Python:
    a call from there runs it as it is written.

    Derived in chapter 3.
    """
    options = {"fastmath": FASTMATH, "error_model": "numpy"}
    return register_jitable(forceinline=True, **options)(function)


def routine(function, signature, parallel=False):
    """Compile a function for C, with the same options.

    signature: of numba's types. Returns numba's CFunc, whose address is
    good as long as it is kept.

    Derived in chapter 3.
    """
    return _compile(numba.cfunc, function, signature, parallel=parallel)


# imports of the team
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


# arguments by address
@intrinsic
def arguments(typing, address):
    """The arguments of a team, as a tuple; address: what its thread got.

    For functions that `team` compiles.

    Derived in chapter 3.
    """
    kind = address.dtype

    def load(context, builder, signature, args):
        value = context.unpack_value(builder, kind, args[0])
        context.nrt.incref(builder, kind, value)  # the caller's, on loan
        return value

    return kind(address), load


# store a tuple, call an address
@intrinsic
def _stored(typing, args):
    def store(context, builder, signature, values):
        kind = context.get_data_type(args)
        place = cgutils.alloca_once(builder, kind)
        context.pack_value(builder, args, values[0], place)
        return builder.ptrtoint(place, ir.IntType(64))

    return types.int64(args), store


@intrinsic
def _call(typing, code, part, parts, address):
    n, number = types.int64, ir.IntType(64)

    def call(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [number] * 3)
        function = builder.inttoptr(args[0], kind.as_pointer())
        builder.call(function, args[1:])
        return context.get_dummy_value()

    return types.void(n, n, n, n), call


# the one parallel loop
def _every_part(code, parts, address):
    for part in numba.prange(parts):
        _call(code, part, parts, address)


@functools.cache
def _loop():
    n = types.int64
    return routine(_every_part, types.void(n, n, n), parallel=True)


@inner
def _begin(loop, code, parts, *args):
    if parts > 1:
        _call(loop, code, parts, _stored(args))
    else:
        _call(code, 0, 1, _stored(args))


# the decorator for teams
def _kind(x):
    if isinstance(x, np.ndarray):
        return x.dtype, x.ndim, x.flags.c_contiguous
    return type(x)


def _type(x):
    kind = numba.typeof(x)
    return kind.copy(readonly=False) if isinstance(x, np.ndarray) else kind


def team(function):
    """Compile a function that all threads run, each for its share.

    function: takes part, parts and address. It gets its arguments by
    `arguments(address)` and does part number `part` of `parts` of the work;
    `share` says which. What is returned here is called from Python with the
    arguments. Options and cache are those of `kernel`.

    Derived in chapter 3.
    """
    made, places = {}, {}

    @functools.wraps(function)
    def call(*args):
        kinds = tuple([_kind(x) for x in args])
        if kinds not in made:
            every = types.BaseTuple.from_types([_type(x) for x in args])
            address = types.CPointer(every)
            signature = types.void(types.int64, types.int64, address)
            made[kinds] = routine(function, signature)
            places[kinds] = _loop().address, made[kinds].address
        _begin(*places[kinds], numba.get_num_threads(), *args)

    call.routines = made
    return call


@device
def share(size, part, parts):
    """The slice of range(size) that is part number `part` of `parts`.

    For functions that `team` compiles.

    Derived in chapter 3.
    """
    return slice(part * size // parts, (part + 1) * size // parts)
