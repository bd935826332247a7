# Written by `make export` from notebooks/appendix/06_launch.py: edit that file.

"""What of NVIDIA's software a machine has."""

__all__ = ["absent", "gpus", "numba_cuda"]


# imports of the toolkit
import ctypes
import functools
import importlib.util
import os
from contextlib import suppress

import numpy as np


# numba's CUDA
def numba_cuda():
    """The module numba.cuda, ready for NumPy 2.5, which dropped a name.

    Raises ImportError where numba-cuda is not installed.

    Derived in chapter A.6.
    """
    if not hasattr(np, "row_stack"):
        np.row_stack = np.vstack
    with suppress(ImportError):  # where numba-cuda is on the path only
        importlib.import_module("_numba_cuda_redirector")
    from numba import cuda

    return cuda


# is there a GPU, whoever can use it
@functools.cache
def gpus():
    """How many NVIDIA GPUs the driver offers; 0 where there is no driver.

    Derived in chapter A.6.
    """
    name = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return 0
    count = ctypes.c_int()
    refused = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return 0 if refused else count.value


# what is absent
_PARTS = {"nvvm": "libNVVM", "nvJitLink": "nvJitLink", "nvrtc": "nvrtc"}


@functools.cache
def absent():
    """Which part of what compiles kernels is not here; empty if all are.

    Derived in chapter A.6.
    """
    if importlib.util.find_spec("numba_cuda") is None:
        return (
            "numba-cuda is not installed: pip install 'llmnb[cuda]', or "
            "'llmnb[ptx]' where there is no GPU"
        )
    from cuda import pathfinder

    for name, said in _PARTS.items():
        try:
            pathfinder.load_nvidia_dynamic_lib(name)
        except Exception:  # not found, or of no use: each has its own class
            return (
                f"{said}, of NVIDIA's toolkit, is missing: "
                "pip install 'numba-cuda[cu13]'"
            )
    return ""
