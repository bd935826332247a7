# Written by `make export` from notebooks/appendix/04_kernels.py: edit that file.

"""Compile a function for the processor, alone or for a team of threads."""

__all__ = ["inlined", "inner", "routine", "share", "team"]


# imports of the decorators
import contextlib
import functools
import os
import threading

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.ccallback import CFunc
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.sigutils import normalize_signature
from numba.extending import intrinsic, register_jitable

from llmnb.backend import noted
from llmnb.cpu.compiled import KernelCache, cache_folder


# a compiled function and its cache
FASTMATH = {"reassoc", "contract", "nnan", "ninf", "nsz"}
OPTIONS = {"fastmath": FASTMATH, "error_model": "numpy"}


def _kept(compiled, function):
    """Give a compiled function of this package a cache."""
    if numba.config.DISABLE_JIT:
        raise ImportError(
            "NUMBA_DISABLE_JIT is set, and the cpu backend's kernels only "
            "run compiled: unset it, or use the backend 'reference'"
        )
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    ours = function.__module__.startswith("llmnb.")
    if ours and (folder := cache_folder()):
        compiled._cache = KernelCache(function, folder)
    return compiled


# a compiler of parts
class _Part(JITCodeLibrary):
    """What LLVM made of a function that is only ever a part of others."""

    codegen = property(lambda self: self)  # whom numba gives environments

    def set_env(self, name, environment):
        pass

    def _finalize_final_module(self):
        self._finalized = True


class _PartCompiler(CompilerBase):
    def define_pipelines(self):
        state, name = self.state, self.state.func_id.func_qualname
        state.library = _Part(state.targetctx.codegen(), name)
        return [DefaultPassBuilder.define_nopython_pipeline(state)]


# the decorators for one thread
def inner(function):
    """Compile a function for the thread that calls it, cached on disk.

    `fastmath` lets LLVM reorder sums into vectors and assumes that no NaN or
    infinity occurs; division stays exact. `error_model="numpy"` drops the
    test for division by zero, which would keep loops from being vectorised.
    A function defined in a notebook is compiled anew each time. Sets
    GOMP_SPINCOUNT, unless it is set, so that idle threads soon sleep.

    Derived in chapter A.4.
    """
    options = {"forceinline": True, "no_cfunc_wrapper": True, **OPTIONS}
    options["nogil"] = True  # other threads of Python go on meanwhile
    return _kept(numba.njit(**options)(function), function)


def inlined(function):
    """Let kernels call a function, which becomes a part of each.

    Quicker to compile than `inner`, and not a compiled function for Python:
    a call from there runs it as it is written.

    Derived in chapter A.4.
    """
    how = {"no_cfunc_wrapper": True, "pipeline_class": _PartCompiler}
    return register_jitable(forceinline=True, **how, **OPTIONS)(function)


def routine(function, signature, parallel=False):
    """Compile a function for C, with the options and the cache of `inner`.

    signature: of numba's types. Returns numba's CFunc, whose address is
    good as long as it is kept.

    Derived in chapter A.4.
    """
    options = {"parallel": parallel, **OPTIONS}
    made = CFunc(function, normalize_signature(signature), {}, options)
    _kept(made, function).compile()
    return made


# arguments by address
@intrinsic
def arguments(typing, address):
    """The arguments of a team, as a tuple; address: what its thread got.

    For functions that `team` compiles.
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
    return routine(_every_part, "void(i8, i8, i8)", parallel=True)


@inner
def _begin(loop, code, parts, *args):
    address = _stored(args)
    if parts > 1:
        _call(loop, code, parts, address)
    else:
        _call(code, 0, 1, address)


# one caller at a time
_orphaned = []  # filled in a child whose parent had started threads


def _door():
    """The lock for those who call the threads."""
    lock = threading.RLock()

    def forked():
        lock.release()
        with contextlib.suppress(ValueError):  # if none were started
            _orphaned.append(numba.threading_layer())

    if hasattr(os, "register_at_fork"):  # Windows does not fork
        os.register_at_fork(
            before=lock.acquire,
            after_in_parent=lock.release,
            after_in_child=forked,
        )
    return lock


_one_caller = _door()


# one routine for each list of types
def _kind(x):
    if isinstance(x, np.ndarray):
        gaps = not x.flags.c_contiguous and numba.typeof(x).layout
        return x.dtype, x.ndim, gaps
    return type(x)


def _type(x):
    kind = numba.typeof(x)
    return kind.copy(readonly=False) if isinstance(x, np.ndarray) else kind


def _routine_for(function, args):
    """The routine for such arguments; `_begin` is compiled for them too."""
    _begin.compile((*[types.int64] * 3, numba.typeof(args)))
    every = types.BaseTuple.from_types([_type(x) for x in args])
    address = types.CPointer(every)
    return routine(function, types.void(types.int64, types.int64, address))


MOST = numba.config.NUMBA_NUM_THREADS  # parts of a kernel, rows of scratch


def _launch(address, *args):
    """Run a routine on as many threads as there are now, up to MOST."""
    parts = 1 if _orphaned else min(MOST, numba.get_num_threads())
    with _one_caller:
        _begin(_loop().address, address, parts, *args)


# the decorator for teams
def team(function):
    """Compile a function that all threads run, each for its share.

    function: takes part, parts and address. It gets its arguments by
    `arguments(address)` and does part number `part` of `parts` of the work;
    `share` says which. What is returned here is called from Python with the
    arguments. Options and cache are those of `inner`.

    Derived in chapter A.4.
    """
    made = {}

    @functools.wraps(function)
    def call(*args):
        kinds = tuple([_kind(x) for x in args])
        with _one_caller:
            if kinds not in made:
                made[kinds] = _routine_for(function, args)
        noted(_launch, made[kinds].address, *args)

    call.routines = made
    return call


@inlined
def share(size, part, parts):
    """The slice of range(size) that is part number `part` of `parts`.

    For functions that `team` compiles.

    Derived in chapter A.4.
    """
    return slice(part * size // parts, (part + 1) * size // parts)
