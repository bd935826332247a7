# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       cpu.compiled: "Compiled kernels kept on disk, so that a second start is instant."
#       cpu.jit: "Compile a function for the processor, alone or for a team of threads."
#       model.ahead: "A second process that compiles a training step from its end."
# ---

# %% [markdown]
# # Kernels: compile once, run on every thread
#
# > The decorators that compile every CPU layer: a cache that is never stale,
# > one parallel loop for all kernels, and threads that survive a fork.
#
# *Reading time: 30 minutes. You need: [chapter 2.1](../2_cpu/01_compile.ipynb)
# for numba, its options and the owner rule.*

# %% [markdown]
# ## Where we are
#
# [Chapter 2.1](../2_cpu/01_compile.ipynb) compiled a loop with `numba.njit`,
# and spread one over threads with `prange`. All layers of this book are
# compiled by three decorators and a function instead, which this chapter builds:
#
# | name | the function is | who calls it |
# |---|---|---|
# | `team` | run by all threads, each for its share | Python |
# | `inner` | run by one thread | Python, and other kernels |
# | `inlined` | made part of its caller | other kernels |
# | `routine` | compiled as a C function | machine code, by address |
#
# At its end you can
#
# - say why `cache=True` may run code that you have changed since, and how a
#   folder named by a hash cannot;
# - say why a cache of machine code must belong to you alone;
# - follow a call from Python through the one parallel loop to each thread;
# - say what a fork does to threads, and what a kernel does in its child;
# - let a second core compile, without a list of what there is to compile.

# %% [markdown]
# ## Setup

# %% setup
import math

import numpy as np

from llmnb.book.verify import verdict

# %% [markdown]
# ## The cache
#
# To compile takes time, for each function and each set of types, and a model
# has dozens of functions, so the machine code should be kept on disk for the
# next start of Python. `numba.njit(cache=True)` does that, next to the source
# file. But it compiles again only when *that file* changes. When a kernel
# calls a function of another file, and you edit that one, numba runs the old
# machine code without a word. To see it, we build a little package in which
# `triple.py` calls `scale.py`, run it, edit `scale.py`, and run it again. The
# editor is Python, and each run is a new process.

# %% a small package with a kernel and its callee
import os
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path


def write_package(folder, decorator, factor):
    cpu = folder / "llmnb" / "cpu"
    cpu.mkdir(parents=True, exist_ok=True)
    (folder / "llmnb" / "__init__.py").write_text("")
    (cpu / "__init__.py").write_text("")
    names = "files backend arena checks cpu/compiled cpu/jit"
    for name in [f"{x}.py" for x in names.split()]:
        text = files("llmnb").joinpath(name).read_text("utf-8")
        (folder / "llmnb" / name).write_text(text, "utf-8")
    top = "import numba\nfrom llmnb.cpu.jit import inner\n"
    call = "from llmnb.cpu.scale import scale\n"
    at = f"@{decorator}\ndef "
    body = f"scale(x):\n    return {factor} * x\n"
    (cpu / "scale.py").write_text(top + at + body)
    body = "triple(x):\n    return scale(x)\n"
    if not (cpu / "triple.py").exists():
        (cpu / "triple.py").write_text(top + call + at + body)


# %% run, edit the callee, run again
def run_edit_run(decorator):
    code = "from llmnb.cpu.triple import triple; print(triple(10))"
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        variables = {**os.environ, "LLMNB_CACHE": str(folder / "kernels")}
        for factor in (2, 3):
            write_package(folder, decorator, factor)
            run = subprocess.run(
                [sys.executable, "-B", "-c", code],
                cwd=folder,
                env=variables,
                capture_output=True,
                text=True,
                check=True,
            )
            results.append(int(run.stdout))
    return results


# %% numba's own cache tags=["nbval-ignore-output"]
print(run_edit_run("numba.njit(cache=True)"))

# %% [markdown]
# The second number should be 30, and numba's own cache gives 20. Our repair is
# to keep compiled kernels in a folder that is named by a hash of all that they
# are made from: the sources of the two rooms that hold kernels, those of the
# reference, from which they take a number here and there, such as LayerNorm's
# epsilon, and the versions of Python, of numba and of llvmlite, which brings
# LLVM. Change one letter, and the folder has another name and starts empty.
# What is in it cannot be stale.
#
# But it can be somebody else's. What numba keeps is a pickle with machine
# code inside, and to load it is to run it: whoever may write in that folder
# may run what they like as you. So the folder must belong to you, and nobody
# else may enter. Where there is no such folder, because the home is missing,
# the disk is full, another user was there first, or the package runs from a zip
# archive, where no sources are to be hashed, the kernels are compiled at each
# start, and that is all. The environment variable `LLMNB_CACHE` can name another
# place.

# %% imports of what is kept tags=["export"]
import contextlib
import functools
import hashlib
import os
import pickle
import re
import sys
from pathlib import Path

import llvmlite
import numba
from numba.core.caching import FunctionCache
from numba.core.compiler import CompileResult
from numba.core.runtime import rtsys
from numba.core.serialize import dumps

from llmnb.files import replacing


# %% what kernels are made from tags=["exporti"]
def _origin():
    """A hash of the sources, and of the versions of what compiles them."""
    parts = [numba.__version__, llvmlite.__version__, sys.version]
    parts.append(os.environ.get("LLMNB_TILE", ""))  # see chapter A.2
    package = Path(__file__).parents[1]
    for room in ("cpu", "bench", "reference"):
        for path in sorted((package / room).iterdir()):  # not in an archive
            if path.suffix == ".py":
                parts += [path.name, path.read_text("utf-8")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _ours(status):
    """Is a file this user's? Windows keeps the homes of users apart."""
    return os.name == "nt" or status.st_uid == os.geteuid()


# %% where compiled kernels are kept tags=["export"]
@functools.cache
def cache_folder():
    """The folder for compiled kernels, named by a hash of their sources.

    numba looks only at the file of the kernel it loads, so a change in a
    function that the kernel calls would go unseen. A folder for each state
    of the sources cannot hold a stale kernel. It is this user's, and closed
    to others. `LLMNB_CACHE` moves it. None where no such folder can be had.
    """
    try:
        home = os.environ.get("LLMNB_CACHE") or Path.home() / ".cache/llmnb"
        folder = Path(home).absolute() / "kernels" / _origin()
        folder.mkdir(0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if _ours(status) and status.st_mode & 0o077:
            folder.chmod(0o700)
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return None
    return folder if _ours(status) else None


# %% [markdown]
# Files get damaged, too: a machine is switched off, a disk fills up, and half
# of a pickle is an exception at every start from then on. So each file begins
# with the SHA-256 of the rest and of its own name. What does not agree with
# it is not unpickled, and the kernel is compiled again, as if there were no
# file. So nobody needs to wait until the disk has it, which on a busy disk
# takes longer than to compile. A file that cannot be written is given up
# without a word.


# %% read and write a kernel tags=["exporti"]
def _seal(path, data):
    return hashlib.sha256(path.name.encode() + data).digest()


def _read(path):
    """What `_write` wrote, or None if it is not there, whole and ours."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        seal, data = file.read(32), file.read()
        if _ours(os.fstat(file.fileno())) and seal == _seal(path, data):
            return data
    return None


def _write(path, data):
    with contextlib.suppress(OSError), replacing(path, durable=False) as file:
        file.write(_seal(path, data) + data)


# %% [markdown]
# numba hands what it has compiled to an object that it calls the function's
# cache, and asks this first when it is to compile. Ours inherits one thing
# from numba's: the key, which tells apart functions, types of arguments and
# processors. A few variables of the environment also change the code, some of
# them to the last bit of a sum: `NUMBA_OPT=0` tells LLVM not to optimise, and
# `NUMBA_BOUNDSCHECK=1` puts a test before each index. numba forgets these, so
# a kernel compiled under one of them would be loaded for good. They go into
# the key as well.
#
# Before it asks, numba's own cache reads in all that numba knows of Python and
# NumPy, as if it were to compile. Machine code needs none of it, so ours does not:
# it only makes numba's counter of references ready, which machine code may call.
# What is compiled after all reads the rest in then.

# %% options that change the code tags=["exporti"]
CHANGING = (
    "OPT LOOP_VECTORIZE SLP_VECTORIZE USING_SVML ENABLE_AVX CPU_NAME "
    "CPU_FEATURES BOUNDSCHECK NRT_STATS DEBUG_NRT LLVM_REFPRUNE_PASS "
    "LLVM_REFPRUNE_FLAGS ENABLE_PROFILING DEBUGINFO_DEFAULT JIT_COVERAGE "
    "EXTEND_VARIABLE_LIFETIMES DEBUG_JIT DEBUG_ARRAY_OPT_RUNTIME"
)


# %% what numba asks for and hands over tags=["export"]
class KernelCache(FunctionCache):
    """Keeps what numba compiles of one function, a file for each key.

    folder: what `cache_folder` gives. numba's own cache would choose the
    place, trust what it finds there, and stop when it cannot write.
    """

    def __init__(self, function, folder):
        self._name, self._py_func = repr(function), function
        self._cache_path = folder
        self.enable()

    def _path(self, signature, codegen):
        names = CHANGING.split()
        options = [getattr(numba.config, name, None) for name in names]
        key = repr((self._index_key(signature, codegen), options))
        one = self._py_func
        name = f"{one.__module__}.{one.__qualname__}-"
        name = re.sub("[<>]", "", name)  # which Windows has in no name
        name += hashlib.sha256((name + key).encode()).hexdigest()[:16]
        return self._cache_path / f"{name}.kernel"

    def load_overload(self, sig, target_context):
        data = _read(self._path(sig, target_context.codegen()))
        if data is None:
            return None
        rtsys.initialize(target_context)
        return CompileResult._rebuild(target_context, *pickle.loads(data))

    def _save_overload(self, sig, data):
        if not data.library.has_dynamic_globals:  # addresses, of this process
            _write(self._path(sig, data.codegen), dumps(data._reduce()))


# %% [markdown]
# ## The decorators
#
# One more default needs changing. Between two kernels the threads have
# nothing to do. On Linux numba uses GNU's OpenMP, whose threads *spin*: they
# ask again and again whether there is work, for many milliseconds, and a
# spinning thread keeps its core from others. Alone on a machine that costs
# nothing. With a second program on the same cores the two get into each
# other's way, and a training step can take several times as long. A limit
# of 10,000 rounds lets the threads go to sleep early. A much lower one costs
# time on a quiet machine, where a thread that sleeps has to be woken for the
# next kernel. It has to be set before the first kernel runs, and a value
# that you have set yourself is kept.
#
# `fastmath=True` is a bundle of seven permissions, and we grant five of
# them by name: to regroup (`reassoc`), to fuse a product and a sum
# (`contract`), and to count on there being no NaN, no infinity and no
# difference between 0 and -0. The two that we withhold allow approximate
# functions and let LLVM put a rough reciprocal and a correction in the
# place of a division. It would do so in vector instructions only, and the
# few elements that are left over at the end of an array, which it computes
# one by one, would be rounded otherwise. With exact division each element
# gets the same bits wherever it falls, so the work may be cut between two
# elements at any place.
#
# Last, `no_cfunc_wrapper` leaves out of a kernel the entry for callers
# written in C, which shortens compilation a little. A function that only
# kernels call needs no entry at all, not even for Python; it is `inlined`. What
# is called by its address, as C's functions are, is made by `routine`.
#
# numba makes machine code of an `inlined` function all the same, and nobody
# runs it: its callers take the function in LLVM's language, into themselves.
# But a function may bring a compiler of its own, its `pipeline_class`. Ours is
# numba's but for the *library*, the object that takes what LLVM has optimised
# and has machine code made of it: ours makes none. So it has no place either
# for the *environment*, the Python objects that an entry for Python needs.

# %% imports of the decorators tags=["export"] module="cpu.jit"
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

# %% a compiled function and its cache tags=["exporti"] module="cpu.jit"
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


# %% a compiler of parts tags=["exporti"] module="cpu.jit"
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


# %% the decorators for one thread tags=["export"] module="cpu.jit"
def inner(function):
    """Compile a function for the thread that calls it, cached on disk.

    `fastmath` lets LLVM reorder sums into vectors and assumes that no NaN or
    infinity occurs; division stays exact. `error_model="numpy"` drops the
    test for division by zero, which would keep loops from being vectorised.
    A function defined in a notebook is compiled anew each time. Sets
    GOMP_SPINCOUNT, unless it is set, so that idle threads soon sleep.
    """
    options = {"forceinline": True, "no_cfunc_wrapper": True, **OPTIONS}
    options["nogil"] = True  # other threads of Python go on meanwhile
    return _kept(numba.njit(**options)(function), function)


def inlined(function):
    """Let kernels call a function, which becomes a part of each.

    Quicker to compile than `inner`, and not a compiled function for Python:
    a call from there runs it as it is written.
    """
    how = {"no_cfunc_wrapper": True, "pipeline_class": _PartCompiler}
    return register_jitable(forceinline=True, **how, **OPTIONS)(function)


def routine(function, signature, parallel=False):
    """Compile a function for C, with the options and the cache of `inner`.

    signature: of numba's types. Returns numba's CFunc, whose address is
    good as long as it is kept.
    """
    options = {"parallel": parallel, **OPTIONS}
    made = CFunc(function, normalize_signature(signature), {}, options)
    _kept(made, function).compile()
    return made


# %% [markdown]
# A folder of an old state of the sources stays behind; all of
# `~/.cache/llmnb/kernels` may be deleted at any time. A kernel defined in a
# notebook is never cached.

# %% the callee's edit is seen
results = run_edit_run("inner")
print(results)
verdict("the cache", results == [20, 30], "no stale kernel")

# %% [markdown]
# ## One parallel loop for all kernels
#
# A `prange` is dear to compile. numba makes a second function of the loop's
# body, wraps that for threads, and optimises all of it two or three times:
# several times what the same loop takes without `prange`. And it leaves
# copies of one function, optimised in different company. A process that has
# just compiled a kernel may run another copy than one that loads it from the
# cache, and round the last bit of a sum differently. A run that you stop and
# resume would not be the run that you did not stop. That is also why
# `forceinline` stands in `inner`: code that is part of its caller has no
# other copy.
#
# So the book has one `prange`, compiled once. Its body calls a function by
# its address, with three numbers: which part of the work to do, of how many,
# and where the arguments lie. A kernel is that function, compiled for one
# thread. We call it a *team*: every thread runs it, and takes its share.
#
#     Python        _begin                    the loop          each thread
#     f(x, y)  ->   puts x and y in memory -> for part in   ->  f(part, parts,
#                   at some address           prange(parts)       address)
#
# Three small pieces of LLVM do what Python's syntax cannot say: load a tuple
# from an address, store a tuple and give its address, and call an address. An
# *intrinsic* of numba is a function that writes such instructions while a
# kernel is compiled.


# %% arguments by address tags=["exporti"] module="cpu.jit"
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


# %% store a tuple, call an address tags=["exporti"] module="cpu.jit"
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


# %% [markdown]
# `_begin` is compiled for each list of types too, which is quick, since it only
# puts the arguments in their place. With one thread there is nothing to
# share, and it calls the kernel itself.


# %% the one parallel loop tags=["exporti"] module="cpu.jit"
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


# %% [markdown]
# ## Forks, and callers at the same time
#
# Two things can go wrong with threads, and the one loop is the place to see
# to both. A process that *forks* gets a child with a copy of its memory and
# none of its threads. Python's `multiprocessing` makes its workers so on many
# systems. A child that now asks for the threads waits for ever, or is ended by
# GNU's OpenMP; a pool of workers hangs. In such a child a kernel runs on one
# thread, and its results are the same.
#
# And two threads of Python that call kernels at once abort the process where
# numba uses its own *workqueue*, which serves one caller at a time. So they
# queue up at a lock. A fork waits there too: the child of a thread that forks
# in the middle of another one's kernel would inherit a lock that nobody
# opens.

# %% one caller at a time tags=["exporti"] module="cpu.jit"
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

# %% [markdown]
# ## A team
#
# The decorator compiles a routine for each list of types that it meets, and
# finds it again by the arrays' dtypes and dimensions. An array with gaps
# is another type for numba, and one that lies column by column a third, so
# that counts too. So would be one that may not
# be written, such as weights that the system has mapped from a file; the
# layers have seen to it that what they write may be, and we make no
# difference.
#
# numba reads `NUMBA_NUM_THREADS` when it is imported, which says how many threads
# it will start, and again whenever it compiles. The products of
# [chapter A.3](03_panels.ipynb) give each thread a row of scratch memory: if the
# variable changed in between, they would count the rows by one number, and be
# run by the other. So `MOST` is read once, for both, and no kernel has more parts.


# %% one routine for each list of types tags=["exporti"] module="cpu.jit"
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


# %% the decorator for teams tags=["export"] module="cpu.jit"
def team(function):
    """Compile a function that all threads run, each for its share.

    function: takes part, parts and address. It gets its arguments by
    `arguments(address)` and does part number `part` of `parts` of the work;
    `share` says which. What is returned here is called from Python with the
    arguments. Options and cache are those of `inner`.
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
    """
    return slice(part * size // parts, (part + 1) * size // parts)


# %% [markdown]
# Here is a team that takes square roots. Each thread cuts its share out of
# both arrays and walks through it from 0, which spares every index the
# question whether it is negative and counts from the end.


# %% a team of threads
@team
def roots(part, parts, address):
    out, inp = arguments(address)
    mine = share(inp.size, part, parts)
    y, x = out[mine], inp[mine]
    for i in range(y.size):
        y[i] = math.sqrt(x[i])


def with_threads(n, function, *args):
    before = numba.get_num_threads()
    numba.set_num_threads(min(n, before))
    function(*args)
    numba.set_num_threads(before)


squares = np.arange(1000.0) ** 2
one, many = np.empty((2, 1000))
with_threads(1, roots, one, squares)
with_threads(99, roots, many, squares)
verdict("one thread", np.array_equal(one, np.arange(1000.0)), "0 to 999")
verdict("all threads", np.array_equal(many, one), "the same bits")

# %% [markdown]
# What the chapter has cost is worth a look. The two versions of one loop,
# compiled from nothing:

# %% seconds to compile tags=["nbval-ignore-output"]
from llmnb.timing import fastest


def in_parallel(out, inp):
    for i in numba.prange(out.size):
        out[i] = math.sqrt(inp[i])


def on_one_thread(out, inp):
    for i in range(out.size):
        out[i] = math.sqrt(inp[i])


options = {"fastmath": True, "error_model": "numpy"}
shared = numba.njit(parallel=True, **options)(in_parallel)
alone = numba.njit(**options)(on_one_thread)
print(f"with prange  {fastest(shared, one, squares, runs=1):.2f} s")
print(f"one thread   {fastest(alone, one, squares, runs=1):.2f} s")

# %% [markdown]
# ## Two processes compile one step
#
# The first training step waits for some thirty kernels, one after the other:
# LLVM could compile several at once, but most of the time goes to numba's
# Python, which uses one core. So a helper, a process of its own, compiles into
# the same folder. Which kernels? A list would have to be kept up for each
# architecture and precision. Instead the helper takes a step with a model of
# one block, in which no kernel is compiled or run: each is only noted down.
# Then it compiles what it has noted *from the last one on*. The training
# process comes from the first one, as it needs them, and where the two meet all
# is done, however fast either of them is. Attention's two kernels, which take
# the longest, the helper does first: nobody waits for them then.

# %% imports of the helper tags=["export"] module="model.ahead"
import atexit
import contextlib
import gc
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numba
import numpy as np

from llmnb.cpu import attention, compiled, jit, panels
from llmnb.model.gpt2 import GPT2


# %% note what is wanted tags=["exporti"] module="model.ahead"
def _wanted(step):
    """What a function would compile, in order: functions that do it.

    Nothing is compiled meanwhile, nor run; for a process that never will.
    """
    found, nowhere = [], SimpleNamespace(address=0)
    kept = jit._routine_for, panels.routine, jit._begin, jit._loop

    def noted(function):
        def note(*args):
            found.append(partial(function, *args))
            return nowhere

        return note

    jit._routine_for = noted(jit._routine_for)
    panels.routine = noted(panels.routine)
    jit._begin = jit._loop = lambda *args: nowhere
    step()
    jit._routine_for, panels.routine, jit._begin, jit._loop = kept
    return found


# %% what the helper does tags=["export"] module="model.ahead"
def compile_step(record, precision):
    """Compile what a training step wants, and a clip, from the last on.

    record, precision: of a model, as `architecture_record` has it.
    """
    from llmnb.model.architectures import architecture_from  # Part 5

    gc.disable()
    cfg = replace(architecture_from(record), num_layers=1, vocab_size=2)
    model = GPT2(cfg, 2, 2, "cpu", precision, seed=None)

    def step():
        model.forward(*np.zeros((2, 2, 2), int))
        model.backward()
        model.update()

    found = _wanted(step)
    long = [x for x in found if x.args[0].__module__ == attention.__name__]
    found = long + found[::-1] + _wanted(partial(model.clip_gradients, 1.0))
    compiled._read = partial(_read_or_mark, compiled._read)
    compiled._write = partial(_write_and_unmark, compiled._write)
    for compile_one in found:
        compile_one()


def main():
    """Compile ahead, until who asked for it is gone.

    The one argument of the process is of `compile_step`, in JSON.
    """

    def outlive_nobody():
        sys.stdin.read()  # ends when the process at its other end does
        os._exit(0)

    threading.Thread(target=outlive_nobody, daemon=True).start()
    compile_step(*json.loads(sys.argv[1]))


# %% [markdown]
# While the helper is at a kernel there is a file beside the kernel's name, and
# who wants that kernel waits, as long as the helper lives. The two put this
# around the cache's reading and writing, each what it needs.


# %% what the helper is at tags=["exporti"] module="model.ahead"
def _mark(path):
    return path.with_suffix(".busy")


def _read_or_mark(read, path):
    """In the helper: who finds no kernel will make it."""
    data = read(path)
    with contextlib.suppress(OSError):
        if data is None:
            _mark(path).touch()
        else:  # one that was ended may have left its mark
            _mark(path).unlink(missing_ok=True)
    return data


def _write_and_unmark(write, path, data):
    write(path, data)
    with contextlib.suppress(OSError):
        _mark(path).unlink(missing_ok=True)


PATIENCE = 60  # seconds, for one kernel: far more than any takes


def _await_and_read(read, helper, path):
    """In the process that trains."""
    end = time.monotonic() + PATIENCE
    while _mark(path).exists() and not path.exists():
        if helper.poll() is not None or time.monotonic() > end:
            break
        time.sleep(0.005)
    return read(path)


# %% [markdown]
# By these files the helper says what it is at and what it has done, and that
# is all that the two say to each other. (Its input is open as long as the
# training process lives: when that ends, so does the helper.) If it fails, is
# ended, or stands still for a minute, the training process finds fewer kernels
# and compiles them itself.
# A helper is started once for each family and precision, which a file in the
# folder remembers, and never for a process that has one thread to compute
# with.
#
# While it compiles numba makes many objects and keeps most of them. Python's
# garbage collector looks through all objects again and again and finds little
# there. The helper, which is soon over, does without; the other process tells
# it with `freeze` to leave alone what is there already.


# %% start it tags=["export"] module="model.ahead"
HELPER = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); "
    "from llmnb.model.ahead import main; main()"
)


def compile_ahead(cfg, precision="fp32"):
    """Have a second process compile a training step's kernels, once.

    cfg, precision: of a GPT2 with the cpu backend. To be called before its
    first step; the process ends with this one at the latest.
    """
    from llmnb.model.architectures import architecture_record  # Part 5

    folder = compiled.cache_folder()
    if folder is None or numba.get_num_threads() < 2:
        return
    what = json.dumps([architecture_record(cfg), precision])
    here = str(Path(__file__).parents[2])  # where this process found llmnb
    with contextlib.suppress(OSError):  # of a file that is there, for one
        (folder / f"{cfg.family}-{precision}.helped").touch(exist_ok=False)
        helper = subprocess.Popen(
            [sys.executable, "-P", "-c", HELPER, here, what],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        atexit.register(_end, helper)
        compiled._read = partial(_await_and_read, compiled._read, helper)
        gc.freeze()


def _end(helper):
    helper.kill()
    helper.wait()


# %% [markdown]
# `llmnb train` starts a helper, and so does each process of ours that trains in
# `llmnb bench`. Here is a first step of a small model in a new process with an empty
# folder, alone and with a helper.

# %% the first step of a process
FIRST_STEP = """
import sys, time
start = time.perf_counter()
from llmnb.config import GPT2Config
from llmnb.model.ahead import compile_ahead
from llmnb.model.gpt2 import GPT2
import numpy as np
cfg = GPT2Config(64, 256, num_layers=4, num_heads=4, channels=128)
if sys.argv[1] == "with":
    compile_ahead(cfg)
model = GPT2(cfg, batch_size=12, seq_len=64)
text = np.random.RandomState(0).randint(0, 256, (2, 12, 64))
model.forward(*text)
model.backward()
model.update()
print(time.perf_counter() - start, model.forward(*text).hex())
"""


def first_step(how):
    """Seconds until a new process has trained once, and its next loss."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        variables = {**os.environ, "LLMNB_CACHE": folder}
        command = [sys.executable, "-B", "-c", FIRST_STEP, how]
        found = subprocess.check_output(command, env=variables, text=True)
    seconds, loss = found.split()
    return float(seconds), loss


# %% alone tags=["nbval-ignore-output"]
alone = first_step("without")
print(f"alone          {alone[0]:.1f} s")

# %% with a helper tags=["nbval-ignore-output"]
helped = first_step("with")
print(f"with a helper  {helped[0]:.1f} s")

# %% the same model
verdict("the loss", helped[1] == alone[1], "the same bits")

# %% [markdown]
# ## Take away
#
# - A kernel kept on disk must be found by everything it was made from: its
#   own source, its callees', the compiler's versions and options.
# - Machine code in a file is a program. Its folder belongs to one user, and
#   what is not whole is not loaded.
# - One parallel loop calls every kernel by its address. It is compiled once,
#   and each kernel has one copy, so its bits do not depend on who compiled it.
# - After a fork there are no threads; the same kernel then runs on one.
# - Two who do the same list from both ends need no plan of who does what.

# %% [markdown]
# ## Design note
#
# numba can keep a parallel kernel itself, and can build a package ahead of
# time. The first is stale where it matters, as you have seen; the second
# fixes the processor when the package is built, and this book wants the
# vector instructions of yours. C extensions would compile sooner and run as
# fast. Then half of the book would be in another language.
#
# For the same reason `pip install llmnb` brings no compiled kernels: whoever
# builds it knows neither your processor nor your versions of Python, numba and
# LLVM, by which the folder is named.

# %% [markdown]
# ## Exercises
#
# **1** (★). Four threads share 10 elements. Which does each get? By how many can
# two shares differ, whatever the numbers?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# 0 and 1; 2 to 4; 5 and 6; 7 to 9. A share ends where the next one begins, and
# each is $n / p$ long, rounded up or down: two differ by one at most.
# :::

# %% exercise 1, checked tags=["hide-cell"]
print([(x.start, x.stop) for x in (share(10, k, 4) for k in range(4))])
for size, parts in ((10, 4), (3, 8), (1000, 7)):
    shares = [range(size)[share(size, k, parts)] for k in range(parts)]
    every = [i for mine in shares for i in mine] == [*range(size)]
    even = max(map(len, shares)) - min(map(len, shares)) <= 1
    verdict(f"{size} by {parts}", every and even, "each once, and even")

# %% [markdown]
# **2** (★★). Each thread adds up its share of a float32 array into a place of its
# own, and Python adds the places. What is wrong with that in this book? Show it.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# Where the shares end depends on the number of threads, and so does the order
# of the additions, and the last bits of the sum. The book's kernels reduce each
# element in one order, on one thread. Here two threads, and one, by hand:
# $2^{24} + 1 + 1$ is $2^{24}$ from the left, and two more if $1 + 1$ comes first.
# :::


# %% exercise 2, a solution tags=["hide-cell"]
def summed(x, parts):
    """The sum of the sums of all shares, in float32."""
    places = np.zeros(parts, np.float32)
    for part in range(parts):
        for number in x[share(x.size, part, parts)]:
            places[part] += number
    total = np.float32(0)
    for place in places:
        total += place
    return total


# %% exercise 2, checked tags=["hide-cell"]
x = np.array([0, 2**24, 1, 1], np.float32)
verdict("one thread", summed(x, 1) == 2**24, "loses both ones")
verdict("two threads", summed(x, 2) == 2**24 + 2, "keep them")

# %% [markdown]
# ## Further reading
#
# - Lam, Pitrou and Seibert (2015),
#   [Numba: a LLVM-based Python JIT compiler](https://doi.org/10.1145/2833157.2833162):
#   how types are inferred and code is made.
# - [numba's documentation](https://numba.readthedocs.io/en/stable/), "Notes on
#   caching" and "The threading layers": what is promised, and what is not.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("A.4")
