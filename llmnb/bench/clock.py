# Written by `make export` from notebooks/3_gpu/12_measured.py: edit that file.

"""Time on a GPU, by its own events."""

__all__ = ["Clock", "gpu_facts", "limits", "no_times"]


# imports of the GPU's clock
import subprocess
import time
from contextlib import suppress
from statistics import median

import numpy as np

from llmnb.gpu.launch import empty, kernel, missing, to_device
from llmnb.gpu.simulator import cuda, load4, store4
from llmnb.gpu.toolkit import numba_cuda


# three kernels that measure
_CHAINS, _UNROLLED = 16, 8  # of multiply-adds: independent, and in a row
_SWEEPS = 10  # after which the host waits for the GPU


@kernel(launch_bounds=256)
def _sweep(out, inp):
    me, step = cuda.grid(1), cuda.gridsize(1)
    total = np.float32(0)
    for i in range(4 * me, inp.size, 4 * step):
        a, b, c, d = load4(inp, i)
        total += (a + b) + (c + d)
    out[me] = total


@kernel(launch_bounds=256)
def _copy(out, inp):
    me, step = cuda.grid(1), cuda.gridsize(1)
    for i in range(4 * me, inp.size, 4 * step):
        a, b, c, d = load4(inp, i)
        store4(out, i, a, b, c, d)


@kernel(launch_bounds=256)
def _multiply_add(out, turns):
    me = cuda.grid(1)
    x, chains = out[me], cuda.local.array(_CHAINS, np.float32)
    for k in range(_CHAINS):
        chains[k] = x + np.float32(k)
    for _ in range(turns):
        for _ in range(_UNROLLED):
            for k in range(_CHAINS):
                chains[k] = chains[k] * x + x
    for k in range(1, _CHAINS):
        chains[0] += chains[k]
    out[me] = chains[0]


# a clock on the GPU
class Clock:
    """Times what a GPU does, with a cold L2 and the host out of the way.

    Needs a GPU; it takes four times the memory of the L2 cache.

    Derived in chapter 3.12.
    """

    def __init__(self):
        real = numba_cuda()
        gpu = real.get_current_device()
        self._grid = 8 * gpu.MULTIPROCESSOR_COUNT
        floats = max(gpu.L2_CACHE_SIZE, 1 << 20)  # four times its bytes
        block = np.zeros(floats, np.float32)
        self._block, self._wait = to_device(block), real.synchronize
        self._sums = empty(256 * self._grid, like=self._block)
        self._marks = real.event(), real.event()
        self._sweep()  # compiles
        self._behind = max(min(self._lag() for _ in range(5)), 1e-6)

    def _sweep(self):
        _sweep[self._grid, 256](self._sums, self._block)

    def _lag(self):
        """Seconds by which a sweep puts the GPU behind the host."""
        self._wait()
        for _ in range(_SWEEPS):
            self._sweep()
        start = time.perf_counter()
        self._wait()
        return (time.perf_counter() - start) / _SWEEPS

    def _between(self, run):
        start, end = self._marks
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3  # from milliseconds

    def timer(self, run):
        """A function: seconds that the GPU takes for what run() launches."""
        run()  # compiles
        self._wait()
        start = time.perf_counter()
        run()
        launching = time.perf_counter() - start
        self._wait()

        def seconds():
            for _ in range(1 + int(2 * launching / self._behind)):
                self._sweep()
            return self._between(run)

        return seconds


# the limits of a GPU
def limits(clock):
    """What a GPU reaches in the two kernels that do nothing else.

    Returns a dict: fma_peak, FLOP/s in float32 on registers alone, and
    copy_bytes, bytes read and written a second in a copy of 256 MB.

    Derived in chapter 3.12.
    """
    real = numba_cuda()
    grid = 8 * real.get_current_device().MULTIPROCESSOR_COUNT
    chains = to_device(np.full(256 * grid, 0.5, np.float32))
    here, turns = to_device(np.zeros(1 << 26, np.float32)), 4096
    there = empty(here.shape, like=here)
    work = {
        "fma_peak": 2 * _CHAINS * _UNROLLED * turns * chains.size,
        "copy_bytes": 2 * here.nbytes,
    }
    runs = {
        "fma_peak": lambda: _multiply_add[grid, 256](chains, turns),
        "copy_bytes": lambda: _copy[grid, 256](there, here),
    }
    for name, run in runs.items():
        seconds = clock.timer(run)
        work[name] /= median(seconds() for _ in range(20))
    return work


# which GPU
def no_times():
    """Why nothing can be timed on a GPU here; empty where it can.

    Derived in chapter 3.12.
    """
    return f"no GPU: {missing()}" if missing() else ""


def gpu_facts():
    """The GPU's name, generation, processors, caches, clocks: a dict.

    Needs a GPU. nvidia_smi is what that program says of driver, clocks and
    power at this moment, or None where it is silent.

    Derived in chapter 3.12.
    """
    real = numba_cuda()
    gpu, said = real.get_current_device(), None
    fields = "driver_version,clocks.sm,clocks.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
    with suppress(OSError, subprocess.SubprocessError):
        said = subprocess.check_output(command, text=True, timeout=20).strip()
    return {
        "name": gpu.name.decode() if isinstance(gpu.name, bytes) else gpu.name,
        "generation": list(gpu.compute_capability),
        "processors": gpu.MULTIPROCESSOR_COUNT,
        "l2_bytes": gpu.L2_CACHE_SIZE,
        "memory_bytes": real.current_context().get_memory_info()[1],
        "nvidia_smi": said,
    }
