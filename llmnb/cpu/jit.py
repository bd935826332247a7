# Written by `make export` from notebooks/03_encoder.py: edit that file.

"""Turn tokens into vectors and send gradients back.

A token's vector is a row of one table plus a row of another; the backward pass
adds into the rows that were read.
"""

__all__ = [
    "cache_folder",
    "inner",
    "kernel",
    "routine",
]


# imports of the decorator
import functools
import hashlib
import os
import sys
from pathlib import Path

import numba


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
    text += os.environ.get("LLMNB_TILE", "")  # see chapter 5
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


# the decorator for one thread
def inner(function):
    """Compile a function for the thread that calls it; see `kernel`.

    For what kernels call in their loops, and for work too small to share.

    Derived in chapter 3.
    """
    return kernel(function, parallel=False)


def routine(function, signature):
    """Compile a function for C, with the same options.

    signature: of numba's types. Returns numba's CFunc, whose address is
    good as long as it is kept.

    Derived in chapter 3.
    """
    return _compile(numba.cfunc, function, signature)
