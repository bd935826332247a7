# Written by `make export` from notebooks/appendix/09_checks.py: edit that file.

"""Checks of arrays, tokens and room, whose errors name what is wrong."""

__all__ = [
    "FLOATS", "GROUP_FILES", "INTS", "SMALLER", "check_array", "check_fit",
    "check_room", "check_tokens", "free_memory",
]


# imports of the checks
import numpy as np


# check an array
FLOATS = np.dtype(np.float32), np.dtype(np.float64)
INTS = np.dtype(np.int32), np.dtype(np.int64)


def check_fit(name, array, shape, kinds):
    """Raise unless `array` has this shape and this dtype.

    name: what the message calls it, such as "layernorm_forward: out".
    shape: None for any. kinds: a dtype, or a tuple of several that will do.

    Derived in chapter A.9.
    """
    kinds = kinds if isinstance(kinds, tuple) else (np.dtype(kinds),)
    if not hasattr(array, "dtype") or array.dtype not in kinds:
        kind = getattr(array, "dtype", type(array).__name__)
        want = " or ".join(map(str, kinds))
        raise TypeError(f"{name} must be {want}, got {kind}")
    if shape is not None and array.shape != shape:
        want = str(tuple(shape)).replace("'", "")
        raise ValueError(f"{name} must have shape {want}, got {array.shape}")


def check_array(name, array, shape=None, kinds=FLOATS, written=False):
    """Raise unless a layer can work on `array`, and write it if `written`.

    It must be a NumPy array itself, not of a subclass but np.memmap, with
    this shape and dtype, C-contiguous and aligned. name, shape, kinds: as
    for check_fit. Raises TypeError (not an array, wrong dtype) or
    ValueError (all else).

    Derived in chapter A.9.
    """
    if type(array) not in (np.ndarray, np.memmap):
        kind = type(array).__name__
        kind += ", a subclass of it" * isinstance(array, np.ndarray)
        raise TypeError(f"{name} must be a NumPy array, got {kind}")
    check_fit(name, array, shape, kinds)
    flags = array.flags
    if not flags.c_contiguous:
        raise ValueError(f"{name} must be C-contiguous")
    if not flags.aligned:
        size = array.itemsize
        raise ValueError(f"{name} must begin at a multiple of {size} bytes")
    if written and not flags.writeable:
        raise ValueError(f"{name} must be writeable, got a read-only array")


# check tokens
def check_tokens(name, tokens, vocab_size):
    """Raise unless `tokens` are integers in [0, vocab_size).

    Raises TypeError (not integers) or ValueError, which names the first
    token that is out of range and where it stands.

    Derived in chapter A.9.
    """
    if not np.issubdtype(getattr(tokens, "dtype", object), np.integer):
        kind = getattr(tokens, "dtype", type(tokens).__name__)
        raise TypeError(f"{name} must hold integers, got {kind}")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        bad = (tokens < 0) | (tokens >= vocab_size)
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{name} must lie in [0, {vocab_size}), "
            f"got {tokens[where]} at {where}"
        )


# imports of the room
import math
from contextlib import suppress
from pathlib import Path


# what the system has
GROUP_FILES = {
    "memory.max": "memory.current",  # version 2 of control groups
    "memory.limit_in_bytes": "memory.usage_in_bytes",  # version 1
}


def free_memory(root="/"):
    """Bytes that this process can still take; None where nobody knows.

    root: where proc/ and sys/ are. Only Linux says it. Pages that the
    system can get back count as free, and so does swap.

    Derived in chapter A.9.
    """
    root = Path(root)
    try:
        system = _numbers(root / "proc/meminfo")
        free, swap = (system[x] << 10 for x in ("MemAvailable", "SwapFree"))
    except (OSError, KeyError):
        return None
    with suppress(OSError):
        cache = _numbers(root / "proc/spl/kstat/zfs/arcstats", 2)
        free += max(0, cache.get("size", 0) - cache.get("c_min", 0))
    return min([free + swap, *(_room(x, swap) for x in _groups(root))])


def _numbers(path, column=1):
    """The numbers in a column of a table, by what stands in the first."""
    rows = [row.split() for row in path.read_text().splitlines()]
    rows = [row for row in rows if row[column:] and row[column].isdigit()]
    return {row[0].rstrip(":"): int(row[column]) for row in rows}


# what a control group gives
def _groups(root):
    """The folders of the control groups around this process."""
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            kinds, path = line.split(":", 2)[1:]
            if kinds and "memory" not in kinds.split(","):
                continue
            mount, place = root / "sys/fs/cgroup" / kinds, Path(path[1:])
            yield from (mount / x for x in (place, *place.parents))


def _room(folder, swap):
    """What is left of a group's limit; infinite where there is none."""
    for most, used in GROUP_FILES.items():
        with suppress(OSError, ValueError):  # no such file, or "max"
            left = _difference(folder, most, used)
            stat = _numbers(folder / "memory.stat")
            for kind in ("active_file", "inactive_file"):
                left += stat.get(f"total_{kind}", stat.get(kind, 0))
            with suppress(OSError, ValueError):
                own = _difference(
                    folder, "memory.swap.max", "memory.swap.current"
                )
                swap = min(swap, own)
            return left + swap
    return math.inf


def _difference(folder, a, b):
    return int((folder / a).read_text()) - int((folder / b).read_text())


# look before taking
SMALLER = "a smaller batch_size, seq_len or model takes less"


def check_room(nbytes, remedy=SMALLER):
    """Raise MemoryError when this machine has less than nbytes to give.

    remedy: what the message proposes.

    Derived in chapter A.9.
    """
    free = free_memory()
    if free is not None and nbytes > free:
        raise MemoryError(
            f"needs {nbytes / 1e9:,.1f} GB, this machine has "
            f"{free / 1e9:,.1f} GB free: {remedy}"
        )
