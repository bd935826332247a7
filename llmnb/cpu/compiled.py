# Written by `make export` from notebooks/appendix/04_kernels.py: edit that file.

"""Compiled kernels kept on disk, so that a second start is instant."""

__all__ = ["KernelCache", "cache_folder"]


# imports of what is kept
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


# what kernels are made from
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


# where compiled kernels are kept
@functools.cache
def cache_folder():
    """The folder for compiled kernels, named by a hash of their sources.

    numba looks only at the file of the kernel it loads, so a change in a
    function that the kernel calls would go unseen. A folder for each state
    of the sources cannot hold a stale kernel. It is this user's, and closed
    to others. `LLMNB_CACHE` moves it. None where no such folder can be had.

    Derived in chapter A.4.
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


# read and write a kernel
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


# options that change the code
CHANGING = (
    "OPT LOOP_VECTORIZE SLP_VECTORIZE USING_SVML ENABLE_AVX CPU_NAME "
    "CPU_FEATURES BOUNDSCHECK NRT_STATS DEBUG_NRT LLVM_REFPRUNE_PASS "
    "LLVM_REFPRUNE_FLAGS ENABLE_PROFILING DEBUGINFO_DEFAULT JIT_COVERAGE "
    "EXTEND_VARIABLE_LIFETIMES DEBUG_JIT DEBUG_ARRAY_OPT_RUNTIME"
)


# what numba asks for and hands over
class KernelCache(FunctionCache):
    """Keeps what numba compiles of one function, a file for each key.

    folder: what `cache_folder` gives. numba's own cache would choose the
    place, trust what it finds there, and stop when it cannot write.

    Derived in chapter A.4.
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
