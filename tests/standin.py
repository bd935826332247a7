"""A driver that stands in for NVIDIA's: what is asked of it, counted.

It is compiled from gpu/standin_libcuda.c, where there is a C compiler, and a
program of its own runs with it in the driver's place. The program finds two
functions: counts(*names), and refused(), the first thing that was refused.
"""

import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from processes import python

from llmnb.gpu.toolkit import absent

SOURCE = Path(__file__).parent / "gpu" / "standin_libcuda.c"
COUNTS = """
import ctypes
import numpy as np

driver = ctypes.CDLL("libcuda.so.1")
driver.standin.restype = ctypes.c_long
driver.standin_refused.restype = ctypes.c_char_p


def counts(*names):
    return [driver.standin(x.encode()) for x in names]


def refused():
    return driver.standin_refused().decode()

"""


def no_standin():
    """Why there is none here; empty where it can be compiled."""
    if not sys.platform.startswith("linux"):
        return "the stand-in driver is for Linux"
    if not shutil.which("cc"):
        return "there is no C compiler, cc, for the stand-in driver"
    return absent()


def compiled(folder):
    """Compile it into a folder; the environment that puts it in place."""
    library = folder / "libcuda.so.1"
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", library, SOURCE]
    subprocess.run(command, check=True)
    paths = {"LD_LIBRARY_PATH": str(folder)}
    return paths | {"LLMNB_CUDA": "", "LLMNB_MATMUL": "llmnb"}


def runner(environment):
    """A function that runs a program on it; gives what that prints."""

    def run(code, *args, **others):
        done = python(COUNTS + code, *args, **environment | others)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    run.plain = partial(python, **environment)
    return run
