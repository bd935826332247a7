# Written by `make export` from notebooks/1_by_hand/13_memory.py: edit that file.

"""Whether a model has room in this machine's memory."""

__all__ = [
    "LIMITS",
    "SMALLER",
    "check_room",
    "free_memory",
]


# imports of the room
import math
from contextlib import suppress
from pathlib import Path


# what the system has
LIMITS = {
    "memory.max": "memory.current",  # version 2 of control groups
    "memory.limit_in_bytes": "memory.usage_in_bytes",  # version 1
}


def free_memory(root="/"):
    """Bytes that this process can still take; None where nobody knows.

    root: where proc/ and sys/ are. Only Linux says it. Pages that the
    system can get back count as free, and so does swap.

    Derived in chapter 1.13.
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
    for most, used in LIMITS.items():
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

    Derived in chapter 1.13.
    """
    free = free_memory()
    if free is not None and nbytes > free:
        raise MemoryError(
            f"needs {nbytes / 1e9:,.1f} GB, this machine has "
            f"{free / 1e9:,.1f} GB free: {remedy}"
        )
