# Written by `make export` from notebooks/appendix/11_proofs.py: edit that file.

"""The fastest of some calls, and the name of the machine."""

__all__ = ["cores", "fastest", "machine"]


# imports of the stopwatch
import os
import platform
import timeit
from pathlib import Path


# a stopwatch
def fastest(function, *args, runs=15):
    """The shortest of several runs of function(*args), in seconds.

    Other programs on the machine can only make a run longer, so the
    shortest one says most about the function.

    Derived in chapter A.11.
    """
    return min(timeit.repeat(lambda: function(*args), number=1, repeat=runs))


# the machine's name
def machine():
    """One line that names this machine's processor, system and Python.

    Derived in chapter A.11.
    """
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    return f"{cpu}, {platform.system()}, Python {platform.python_version()}"


# the cores
def cores():
    """How many cores this process may use.

    Derived in chapter A.11.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
