# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       bench.clock: "Time on a GPU, by its own events."
# ---

# %% [markdown]
# # Measured: time on a GPU
#
# > Three traps in timing a GPU, a clock that steps round them, and what has been
# > measured so far.
#
# *Reading time: 12 minutes. You need: [chapter 3.11](11_step.ipynb).*

# %% [markdown]
# ## Where we are
#
# The simulator counts, and the counts predict. Only a clock can say whether
# the prediction holds. At the end of this chapter you can
#
# - time a kernel on a GPU with events, a busy queue and a cold cache;
# - measure the two limits of a GPU, bytes and operations a second;
# - find what has been measured, and what has not, on the
#   [results page](../../book/results.md).

# %% [markdown]
# ## Setup

# %% setup
import numpy as np

# %% [markdown]
# ## Three traps
#
# A GPU adds three traps to those of
# [chapter A.8](../appendix/08_racing.ipynb), and `llmnb bench --backend cuda` has
# to step around each of them.
#
# **A launch returns before the work is done.** The clock of the host reads
# how long it took to hand the work over. To time a whole step it must wait,
# so the contestants synchronise before they read the clock. To time one
# kernel, that wait would be longer than the kernel. A GPU keeps clocks of
# its own: an **event** is a mark in the stream of work, and the GPU notes
# the time as it passes. Two events, one before the kernel and one after it,
# differ by what the kernel took.
#
# **The host may be late.** If the GPU reaches the first event before the
# host has launched the kernel, the difference counts the GPU's waiting, too. So
# we give it something to do first, longer than the host needs to launch.
#
# **Memory remembers.** The second launch on the same arrays finds them in
# the L2 cache, 50 MB on an H100, and seems to beat the memory. In a training
# step other layers have been there in between. The work that keeps the GPU
# busy therefore reads a block larger than the L2, and what is timed begins
# with a **cold L2**.
#
# That work is a kernel that reads a block of memory and keeps one sum a thread;
# a second copies, and a third does
# nothing but multiply and add, in as many chains as the additions need to
# overlap. The last two measure the machine's limits: bytes a second and
# operations a second.

# %% imports of the GPU's clock tags=["export"] module="bench.clock"
import subprocess
import time
from contextlib import suppress
from statistics import median

import numpy as np

from llmnb.gpu.launch import empty, kernel, missing, to_device
from llmnb.gpu.simulator import cuda, load4, store4
from llmnb.gpu.toolkit import numba_cuda

# %% three kernels that measure tags=["exporti"] module="bench.clock"
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


# %% [markdown]
# The three are kernels as all others, so the simulator proves that they do
# what they say; only then is it worth anything to time them.

# %% the three on the simulated GPU
from llmnb.bench.clock import _copy, _multiply_add, _sweep
from llmnb.gpu.launch import empty, simulated, to_host
from llmnb.gpu.simulator import watch
from llmnb.book.verify import compare, verdict

rng = np.random.default_rng(20)
block = simulated(rng.normal(size=640).astype(np.float32))
there, sums = empty(640, like=block), empty(64, like=block)
x = rng.uniform(0.1, 0.9, 64).astype(np.float32)
chain = simulated(x)
with watch() as seen:
    _copy[2, 32](there, block)
    _sweep[2, 32](sums, block)
    _multiply_add[2, 32](chain, 3)
want = x[:, None].astype(np.float64) + np.arange(16)
for _ in range(3 * 8):
    want = want * x[:, None] + x[:, None]
compare("copy", to_host(there), to_host(block), tol=1e-12)
total = to_host(block).sum(dtype=np.float64)
compare("sweep", to_host(sums).sum(dtype=np.float64), total, tol=1e-4)
errors = to_host(chain) / want.sum(1)
compare("multiply-add", errors, np.ones(64), tol=1e-5)
least = (3 * 640 + 3 * 64) * 4 // 32
print(f"{seen.sectors} sectors moved; the least are {least}")

# %% [markdown]
# `Clock` puts the events around what it is given. It asks how long the host
# takes to launch that, and by how much a sweep puts the GPU behind the host:
# less than a sweep takes, since a sweep must be launched as well. Then it sweeps
# as often as covers twice the launching. A GPU changes its clock rate as it
# warms up, and so kernels that are compared take turns too, as programs do, and
# the median is taken over the rounds.
#
# No GPU has run these lines yet. What could be tried without one has been:
# the kernels in the simulator, and the order of events and launches on a
# clock that is made up.


# %% a clock on the GPU tags=["export"] module="bench.clock"
class Clock:
    """Times what a GPU does, with a cold L2 and the host out of the way.

    Needs a GPU; it takes four times the memory of the L2 cache.
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


# %% the limits of a GPU tags=["export"] module="bench.clock"
def limits(clock):
    """What a GPU reaches in the two kernels that do nothing else.

    Returns a dict: fma_peak, FLOP/s in float32 on registers alone, and
    copy_bytes, bytes read and written a second in a copy of 256 MB.
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


# %% which GPU tags=["export"] module="bench.clock"
def no_times():
    """Why nothing can be timed on a GPU here; empty where it can."""
    return f"no GPU: {missing()}" if missing() else ""


def gpu_facts():
    """The GPU's name, generation, processors, caches, clocks: a dict.

    Needs a GPU. nvidia_smi is what that program says of driver, clocks and
    power at this moment, or None where it is silent.
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


# %% [markdown]
# ## What has been measured
#
# Nothing yet: no GPU has run the kernels of this book. They have been compiled
# for two generations of GPUs, run in the simulator, and counted there; every
# version of every layer, with these counts, stands in
# [chapter A.7](../appendix/07_ladders.ipynb). The tests run what they compile
# into, too, but on a CPU, an instruction at a time. On a machine with a GPU
# `make gpu` checks every gradient of a model in bfloat16, float32 and TF32
# against float64, and measures the products and attention on tensor cores of
# chapters 3.14 and 3.15, the step, PyTorch's, and every version of every layer
# of chapters 3.3 to 3.10 ([chapter A.17](../appendix/17_gpu.ipynb)). The
# [results page](../../book/results.md) is drawn from what it writes, and says
# unmeasured where there is nothing.

# %% [markdown]
# ## Take away
#
# - A GPU's time is read from events in its own queue, after something that
#   keeps it busy and fills its cache with other memory.
# - What measures is a kernel too, and is proved before it is timed.

# %% [markdown]
# ## Exercises
#
# **1** (★★). The second trap, on a clock that is made up. At time 0 the host
# puts an event into the queue, then kernels one after the other, then another
# event. It needs some time to launch a kernel and none for an event, and the
# GPU is busy with other work up to a later time. Write
# `between(count, kernel, launch, busy)`, the difference of the two events. For
# ten kernels of 2 µs and launches of 5 µs, how long must the GPU be busy for
# the events to differ by what the kernels take?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# The GPU passes the first event when it is no longer busy. It begins a kernel
# when the one before it has ended and the host has launched it. Never busy, it
# makes them 52 µs, where the kernels take 20. No kernel may have to wait for
# the host: the last is launched at 50 µs, and the nine before it take 18, so
# the GPU must be busy for 32. `Clock` does not count that closely; it makes the
# GPU busy for twice as long as the host launches.
# :::


# %% exercise 1, a solution tags=["hide-cell"]
def between(count, kernel, launch, busy):
    now = busy
    for i in range(1, count + 1):
        now = max(now, i * launch) + kernel
    return now - busy


# %% exercise 1, checked
found = [between(10, 2, 5, busy) for busy in (0, 31, 32, 100)]
verdict("ten kernels", found == [52, 21, 20, 20], "52, 21, 20 and 20 µs")
long = between(10, 8, 5, 0), between(10, 8, 5, 5)
verdict("longer ones", long == (85, 80), "the first alone is waited for")

# %% [markdown]
# **2** (★★). `_copy` and `_sweep` use every byte that they move. Write a sweep
# that reads one number of every sector, the first. It moves as many sectors;
# which part of the bytes a second that `limits` found would it seem to reach,
# if you divide the bytes that it asks for by its time?
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# An eighth at most, since a sector of 32 bytes moves for each 4 bytes that are
# asked for. So bytes a second say how good a kernel is only if they are those
# that must move, and not those that do.
# :::


# %% exercise 2, a solution tags=["hide-cell"]
@kernel
def sparse_sweep(out, inp):
    me, step = cuda.grid(1), cuda.gridsize(1)
    total = np.float32(0)
    for i in range(8 * me, inp.size, 8 * step):
        total += inp[i]
    out[me] = total


# %% exercise 2, checked
with watch() as whole:
    _sweep[2, 32](sums, block)
with watch() as sparse:
    sparse_sweep[2, 32](sums, block)
total = to_host(block)[::8].sum(dtype=np.float64)
compare("sum", to_host(sums).sum(dtype=np.float64), total, tol=1e-4)
verdict("sectors", sparse.sectors == whole.sectors, "as many")
verdict("bytes", 8 * sparse.read_bytes == whole.read_bytes, "an eighth")

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("3.12")
