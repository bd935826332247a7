# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     module: cuda.simulator
# ---

# %% [markdown]
# # Run a thousand threads at once
#
# > A graphics processor runs one short function in thousands of threads;
# > a simulator of it in Python finds the races that hardware hides.

# %% imports of the simulator tags=["export"]
import dis
import functools
import sys
import threading
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np


# %% where a thread stands tags=["exporti"]
class _Three(NamedTuple):
    x: int = 1
    y: int = 1
    z: int = 1


def _three(size):
    return _Three(*(size if isinstance(size, tuple) else (size,)))


@functools.cache
def _threads(shape):
    """The places of a block's threads: x runs fastest."""
    x, y, z = map(range, shape)
    return [_Three(i, j, k) for k in z for j in y for i in x]


# %% fibers tags=["exporti"]
@functools.cache
def _greenlet():
    try:
        from greenlet import greenlet
    except ImportError:
        raise ImportError(
            "the simulated GPU needs the package greenlet: "
            "pip install 'llmnb[simulator]'"
        ) from None
    return greenlet


class _Rest(threading.local):
    """Fibers that wait for work; a fiber belongs to one thread of Python."""

    def __init__(self):
        self.fibers = []


_rest = _Rest()


# %% threads, warps and blocks tags=["exporti"]
WARP = 32  # threads that a processor moves together


class _Warp:
    def __init__(self):
        self.arrived, self.values, self.shown = [], [None] * WARP, None
        self.since = 0


class _Lane:
    """A thread: its place, and the fiber that runs it."""

    __slots__ = ("thread", "number", "block", "warp", "fiber", "trace")

    def __init__(self, thread, number, block, warp):
        self.thread, self.number, self.block = thread, number, block
        self.warp, self.fiber, self.trace = warp, None, {}


class _Block:
    """A block of threads, all about to run `body`, and their memory."""

    def __init__(self, index, shape, grid, seen, body):
        self.index, self.shape, self.grid = index, shape, grid
        self.seen, self.body, self.shared = seen, body, {}
        threads = _threads(shape)
        self.warps = [_Warp() for _ in range(-(-len(threads) // WARP))]
        self.lanes = [
            _Lane(thread, n, self, self.warps[n // WARP])
            for n, thread in enumerate(threads)
        ]
        self.todo, self.ended = iter(self.lanes), 0
        self.arrived, self.ready = [], []
        self.clock = self.since = 0


# %% the thread that runs tags=["exporti"]
# the lane that runs, and what watches it
_now = SimpleNamespace(lane=None, seen=None)


def _enter(lane):
    _now.lane, cuda.threadIdx = lane, lane.thread


def _enter_block(block):
    cuda.blockIdx, cuda.blockDim = block.index, block.shape
    cuda.gridDim = block.grid


# %% a fiber's life tags=["exporti"]
def _serve(block, lane):
    """Run this lane, then others that nobody has begun; then rest."""
    me = _greenlet().getcurrent()
    while True:
        while lane is not None:
            lane.fiber = me
            _enter(lane)
            block.body()
            block.ended += 1
            lane = next(block.todo, None)
        _rest.fibers.append(me)
        block = None  # nothing of it may be kept while we rest
        block, lane = me.parent.switch()


def _fiber():
    """A fiber to switch to, with (block, lane)."""
    greenlet = _greenlet()
    if not _rest.fibers:
        return greenlet(_serve)
    fiber = _rest.fibers.pop()
    fiber.parent = greenlet.getcurrent()
    return fiber


# %% run a block tags=["exporti"]
def _run_block(block):
    """Run every lane to its next barrier, in turns, until all are done."""
    _enter_block(block)
    for lane in block.todo:
        _fiber().switch(block, lane)
    while block.ended < len(block.lanes):
        ready, block.ready = block.ready, []
        if not ready:
            raise BarrierError(_stuck(block))
        for lane in ready:
            _enter(lane)
            lane.fiber.switch()


# %% barriers tags=["exporti"]
def _wait(group, size, orders=True):
    """Wait till `size` lanes have come; group: the block, or a warp of it.

    orders: whether what they wrote before is seen by all of them after.
    """
    lane = _now.lane
    block = lane.block
    group.arrived.append(lane)
    if len(group.arrived) == size:
        block.ready += group.arrived
        group.arrived.clear()
        block.clock += 1
        if orders:
            group.since = block.clock
    lane.fiber.parent.switch()


# %% a barrier that is never complete tags=["export"]
class BarrierError(RuntimeError):
    """Some threads wait at a barrier that others never reach.

    Derived in chapter 4.
    """


# %% who waits where tags=["exporti"]
def _stuck(block):
    """Say who waits where: the text of a BarrierError."""
    warps = sum(len(warp.arrived) for warp in block.warps)
    return (
        f"block {tuple(block.index)} stands still: {len(block.arrived)} of "
        f"{len(block.lanes)} threads wait for the block, {warps} for their "
        f"warp, {block.ended} have ended"
    )


# %% exchange in a warp tags=["exporti"]
FULL = 0xFFFFFFFF  # a mask that names all lanes


def _exchange(mask, value, orders=False):
    """Hand in a value; return those of all 32 lanes and one's own place."""
    lane = _now.lane
    if mask != FULL or len(lane.block.lanes) % WARP:
        raise ValueError(
            "the simulator knows the mask 0xFFFFFFFF alone, and blocks of "
            f"whole warps: got {mask:#x} and {len(lane.block.lanes)} threads"
        )
    if _now.seen is not None:
        _now.seen.exchanges += 1
    warp, place = lane.warp, lane.number % WARP
    warp.values[place] = value
    if len(warp.arrived) == WARP - 1:  # the last one: all values are there
        warp.shown, warp.values = warp.values, [None] * WARP
    _wait(warp, WARP, orders)
    return warp.shown, place


# %% memory of a block and of a thread tags=["exporti"]
@functools.cache
def _poison(shape, dtype):
    """What memory holds before anyone writes to it: nothing good."""
    dtype = np.dtype(getattr(dtype, "name", dtype))
    bad = np.nan if dtype.kind == "f" else np.iinfo(dtype).min + 77
    return np.full(shape, bad, dtype)


@functools.cache
def _instruction(code, last):
    """Where the instruction begins that a frame's f_lasti points into.

    Python moves f_lasti past an instruction's cache once it has specialised
    the instruction: the same access would count as two.
    """
    begins = (x.offset for x in dis.get_instructions(code))
    return id(code), max(x for x in begins if x <= last)


def _placed(array, alignment):
    """A copy at a multiple of `alignment` bytes, at most 128.

    None: at a multiple of the elements' size and of nothing more, which is
    all that numba promises of shared memory.
    """
    block = np.empty(array.nbytes + 256, np.uint8)
    skip = -block.ctypes.data % 128 + (0 if alignment else array.itemsize)
    there = block[skip : skip + array.nbytes].view(array.dtype)
    there = there.reshape(array.shape)
    there[...] = array
    return there


class _Shared:
    """cuda.shared: one array for each place in the code that asks.

    Vectors of four need `alignment=16`.
    """

    def array(self, shape, dtype, alignment=None):
        block, frame = _now.lane.block, sys._getframe(1)
        key = _instruction(frame.f_code, frame.f_lasti)
        if key not in block.shared:
            memory = _placed(_poison(shape, dtype), alignment)
            if block.seen is not None:
                log = _Log() if block.seen.races else None
                memory = _Watched(memory, "shared", log, shared=True)
            block.shared[key] = memory
        return block.shared[key]


class _Local:
    """cuda.local: memory of one thread, in registers where that is small."""

    def array(self, shape, dtype):
        return _poison(shape, dtype).copy()


# %% atomics tags=["exporti"]
class _Atomic:
    """cuda.atomic: read, change and write with nobody in between."""

    def add(self, array, index, value):
        return self._change(array, index, lambda old: old + value)

    def max(self, array, index, value):
        return self._change(array, index, lambda old: max(old, value))

    def _change(self, array, index, function):
        if isinstance(array, _Watched):
            _now.seen.atomics += 1
            array.note(array.place(index), array.itemsize, ATOMIC)
            array = array.array
        old = array[index]
        array[index] = function(old)
        return old


# %% where am I tags=["exporti"]
class _Places:
    """What a kernel asks `cuda` about the thread that runs it."""

    # threadIdx, blockIdx, blockDim, gridDim are set when a thread goes on
    laneid = property(lambda self: _now.lane.number % WARP)

    def grid(self, ndim):
        at, of, n = self.blockIdx, self.blockDim, self.threadIdx
        x = at.x * of.x + n.x
        if ndim == 1:
            return x
        return (x, at.y * of.y + n.y, at.z * of.z + n.z)[:ndim]

    def gridsize(self, ndim):
        pairs = zip(self.gridDim, self.blockDim, strict=True)
        sizes = tuple(a * b for a, b in pairs)
        return sizes[0] if ndim == 1 else sizes[:ndim]


# %% wait for the block tags=["exporti"]
class _Barriers(_Places):
    shared, local, atomic = _Shared(), _Local(), _Atomic()

    def syncthreads(self):
        if _now.seen is not None:
            _now.seen.barriers += 1
        block = _now.lane.block
        _wait(block, len(block.lanes))


# %% exchange with the warp tags=["exporti"]
class _Cuda(_Barriers):
    """What kernels know as `cuda`, answered for the lane that runs."""

    def syncwarp(self, mask=FULL):
        _exchange(mask, None, orders=True)

    def shfl_sync(self, mask, value, source):
        return _exchange(mask, value)[0][source % WARP]

    def shfl_xor_sync(self, mask, value, bits):
        values, lane = _exchange(mask, value)
        return values[lane ^ bits]

    def shfl_down_sync(self, mask, value, delta):
        values, lane = _exchange(mask, value)
        return values[lane + delta] if lane + delta < WARP else value

    def shfl_up_sync(self, mask, value, delta):
        values, lane = _exchange(mask, value)
        return values[lane - delta] if lane >= delta else value

    def ballot_sync(self, mask, predicate):
        values, _ = _exchange(mask, bool(predicate))
        return sum(1 << i for i, v in enumerate(values) if v)

    def any_sync(self, mask, predicate):
        return any(_exchange(mask, bool(predicate))[0])

    def all_sync(self, mask, predicate):
        return all(_exchange(mask, bool(predicate))[0])

    def fma(self, a, b, c):
        return type(a)(np.float64(a) * np.float64(b) + np.float64(c))


# %% the object tags=["export"]
cuda = _Cuda()


# %% vectors of four tags=["export"]
def load4(array, i):
    """Elements i to i + 3 of a flat view of `array`, in one access.

    array: float32, C-contiguous, any shape; its element i must begin at a
    multiple of 16 bytes: a shared array is made with `alignment=16`.
    Returns four numbers.

    Derived in chapter 4.
    """
    if isinstance(array, _Watched):
        array.note(array.place4(i), 16, READ)
        array = array.array
    flat = array if array.ndim == 1 else array.reshape(-1)
    return flat[i], flat[i + 1], flat[i + 2], flat[i + 3]


def store4(array, i, a, b, c, d):
    """Write elements i to i + 3 of a flat view of `array`, in one access.

    As `load4`, the other way.

    Derived in chapter 4.
    """
    if isinstance(array, _Watched):
        array.note(array.place4(i), 16, WRITE)
        array = array.array
    flat = array if array.ndim == 1 else array.reshape(-1)
    flat[i : i + 4] = a, b, c, d


# %% kinds of access tags=["exporti"]
READ, WRITE, ATOMIC = range(3)


# %% an array under watch tags=["exporti"]
class _Watched:
    """An array that checks each access and notes it for its lane.

    log: what was touched, by address, or None where races may pass.
    """

    def __init__(self, array, name, log, shared=False):
        self.array, self.name, self.log = array, name, log
        self.shape, self.ndim, self.size = array.shape, array.ndim, array.size
        self.dtype, self.start = array.dtype, array.ctypes.data
        self.itemsize, self.strides = array.itemsize, array.strides
        self.shared = shared

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        self.note(self.place(index), self.itemsize, READ)
        return self.array[index]

    def __setitem__(self, index, value):
        self.note(self.place(index), self.itemsize, WRITE)
        self.array[index] = value

    def place(self, index):
        """The address of an element; raise where there is none."""
        if self.ndim == 1 and 0 <= index < self.size:
            return self.start + int(index) * self.strides[0]
        index = index if type(index) is tuple else (index,)
        address = self.start
        for i, n, stride in zip(index, self.shape, self.strides, strict=True):
            if not 0 <= i < n:
                raise IndexError(
                    f"{self.name}[{', '.join(map(str, index))}] lies outside "
                    f"its shape {self.shape}"
                )
            address += int(i) * stride
        return address

    def place4(self, i):
        """The address of four elements from i on."""
        if not 0 <= i <= self.size - 4:
            raise IndexError(
                f"{self.name}: elements {i} to {i + 3} of {self.size}"
            )
        address = self.start + int(i) * self.itemsize
        if address % 16:
            raise ValueError(
                f"{self.name}: element {i} is not at a multiple of 16 bytes"
            )
        return address

    def note(self, address, nbytes, access):
        """Note an access of the lane that runs, and look for a race."""
        lane = _now.lane
        if access != ATOMIC:
            frame, kind = sys._getframe(2), (nbytes, access, self.shared)
            key = kind, id(frame.f_code), frame.f_lasti
            site = _now.seen.sites.get(key)
            if site is None:
                site = _now.seen.add_site(key, frame.f_code)
            lane.trace.setdefault(site, []).append(address)
        if self.log is None:
            return
        now, size = (lane, lane.block.clock), self.itemsize
        for word in range(address, address + nbytes, size):
            before = _CLASHES[access](self.log, word, now)
            if before is not None:
                element = (word - self.start) // size
                raise RaceError(_clashing(self.name, element, before, access))


# %% in what order tags=["exporti"]
def _ordered(before, lane):
    """Whether an access of another lane is over when this one goes on."""
    other, time = before
    if other is lane:
        return True
    if other.block is not lane.block:
        return False
    if time < lane.block.since:
        return True
    return other.warp is lane.warp and time < lane.warp.since


# %% what was touched tags=["exporti"]
class _Log:
    """By address: the last write, and the reads and atomics since.

    Of these, two are kept that stand for all.
    """

    def __init__(self):
        self.write, self.reads, self.atomics = {}, {}, {}


def _keep(kept, now):
    """The newest access and one other, the one that most could clash with."""
    lane = now[0]
    for before in reversed(kept):
        if before[0].warp is not lane.warp and not _ordered(before, lane):
            return now, before
    for before in kept:
        if not _ordered(before, lane):
            return now, before
    return (now,)


# %% races tags=["exporti"]
def _read(log, address, now):
    """An earlier access that nothing orders before this read, or None."""
    before = log.write.get(address)
    if before is not None and not _ordered(before, now[0]):
        return before
    for before in log.atomics.get(address, ()) if log.atomics else ():
        if not _ordered(before, now[0]):
            return before
    log.reads[address] = _keep(log.reads.get(address, ()), now)
    return None


def _write(log, address, now):
    """The same before this write, after which the others do not matter."""
    before = log.write.get(address)
    if before is not None and not _ordered(before, now[0]):
        return before
    for before in log.reads.pop(address, ()):
        if not _ordered(before, now[0]):
            return before
    for before in log.atomics.pop(address, ()):
        if not _ordered(before, now[0]):
            return before
    log.write[address] = now
    return None


def _atomic(log, address, now):
    """The same before this atomic."""
    before = log.write.get(address)
    if before is not None and not _ordered(before, now[0]):
        return before
    for before in log.reads.get(address, ()):
        if not _ordered(before, now[0]):
            return before
    log.atomics[address] = _keep(log.atomics.get(address, ()), now)
    return None


_CLASHES = _read, _write, _atomic  # in the order of READ, WRITE, ATOMIC


# %% who meets whom tags=["exporti"]
def _clashing(name, element, before, access):
    """Say who meets whom: the text of a RaceError."""
    one, two = before[0], _now.lane
    return (
        f"{name}, element {element}: thread {two.number} of block "
        f"{tuple(two.block.index)} {('reads', 'writes', 'adds to')[access]} "
        f"it, and nothing orders that after the access by thread "
        f"{one.number} of block {tuple(one.block.index)}"
    )


# %% the error of a race tags=["export"]
class RaceError(RuntimeError):
    """Two threads touch one element, one writes, and nothing orders them.

    Derived in chapter 4.
    """


# %% what was seen tags=["export"]
class Seen:
    """What `watch` counted while simulated kernels ran.

    threads: how many ran. reads, writes: accesses to global memory by
    single threads; read_bytes, written_bytes: their bytes. requests: such
    accesses by whole warps; sectors: the pieces of 32 bytes that these
    touched, each moved whole. shared_requests, shared_passes: accesses of
    whole warps to shared memory, and the passes they took: more than one
    where lanes want different words of one bank. barriers, exchanges,
    atomics: calls by single threads. launches: (kernel, grid, block,
    arguments' types) of each launch.

    Derived in chapter 4.
    """

    def __init__(self, races=True):
        self.threads = self.reads = self.writes = 0
        self.read_bytes = self.written_bytes = 0
        self.requests = self.sectors = 0
        self.shared_requests = self.shared_passes = 0
        self.barriers = self.exchanges = self.atomics = 0
        self.launches, self.races = [], races
        self.sites, self._codes = {}, []

    def add_site(self, key, code):
        """Name the place in the code of an access that is seen first."""
        kind, _, last = key
        self._codes.append(code)  # which keeps its id from being used again
        self.sites[key] = kind, _instruction(code, last)
        return self.sites[key]

    def add_block(self, block):
        """Count what the lanes of a block have noted, warp by warp."""
        self.threads += len(block.lanes)
        sites = {site: None for lane in block.lanes for site in lane.trace}
        for site in sites:
            nbytes, access, shared = site[0]
            table = _requests([x.trace.get(site, ()) for x in block.lanes])
            if shared:
                self.shared_requests += len(table)
                self.shared_passes += _passes(table, nbytes)
                continue
            self.requests += len(table)
            self.sectors += int(_distinct(table // 32)[1].sum())
            accesses = int((table >= 0).sum())
            if access == READ:
                self.reads += accesses
                self.read_bytes += accesses * nbytes
            else:
                self.writes += accesses
                self.written_bytes += accesses * nbytes


# %% requests of whole warps tags=["exporti"]
def _requests(traces):
    """A row for each request of a warp: 32 addresses, -1 where none.

    traces: for each lane of a block the addresses that it touched, at one
    place in the code. The nth of each lane of a warp make one request.
    """
    longest = max(map(len, traces))
    traces = [[*x] + [-1] * (longest - len(x)) for x in traces]
    traces += [[-1] * longest] * (-len(traces) % WARP)
    table = np.array(traces, np.int64).reshape(-1, WARP, longest)
    table = table.transpose(0, 2, 1).reshape(-1, WARP)
    return table[(table >= 0).any(axis=1)]


def _distinct(table):
    """The rows sorted, and where a number stands for the first time."""
    table = np.sort(table, axis=1)
    first = table >= 0
    first[:, 1:] &= table[:, 1:] != table[:, :-1]
    return table, first


# %% banks tags=["exporti"]
def _passes(table, nbytes):
    """Passes that requests of warps take in shared memory.

    Its 32 banks give one word of four bytes each in a pass; a request for
    16 bytes a lane is served eight lanes at a time.
    """
    wide = max(nbytes // 4, 1)
    words = table.reshape(-1, WARP // wide, 1) // 4
    words = np.where(words < 0, -1, words + np.arange(wide))
    words, first = _distinct(words.reshape(-1, WARP))
    row = np.arange(len(words))[:, None]
    bank = (row * WARP + words % WARP)[first]
    counts = np.bincount(bank, minlength=len(words) * WARP)
    return int(counts.reshape(-1, WARP).max(axis=1).sum())


# %% watch tags=["export"]
@contextmanager
def watch(races=True):
    """Check and count what simulated kernels do; yields a Seen.

    Every element that a kernel touches must lie inside its array, and no
    two threads may touch one element, one of them writing, with nothing
    that orders them: IndexError, ValueError and RaceError tell. Several
    times slower than without. races: False lets races pass.

    Derived in chapter 4.
    """
    before, _now.seen = _now.seen, Seen(races)
    try:
        yield _now.seen
    finally:
        _now.seen = before


# %% note a launch tags=["export"]
def record(launch):
    """Add to the launches of the Seen that watches, if any does.

    Derived in chapter 4.
    """
    if _now.seen is not None:
        _now.seen.launches.append(launch)


# %% arguments under watch tags=["exporti"]
def _watched(function, args, seen):
    """The arguments of a kernel, the arrays of them under watch."""
    names, log = function.__code__.co_varnames, _Log()
    return [
        _Watched(a, name, log if seen.races else None)
        if isinstance(a, np.ndarray)
        else a
        for a, name in zip(args, names, strict=False)
    ]


# %% simulate a launch tags=["export"]
def simulate(function, grid, block, args):
    """Run a kernel's function in every thread of a grid, one at a time.

    grid, block: blocks in the grid and threads in a block, an int or a
    tuple of up to three. args: NumPy arrays, which the kernel may write,
    and NumPy or Python numbers. Raises BarrierError, and whatever the
    function raises, with the thread that raised it.

    Derived in chapter 4.
    """
    _greenlet()  # or say at once that it is missing
    grid, shape, seen = _three(grid), _three(block), _now.seen
    if seen is not None:
        args = _watched(function, args, seen)
    body = functools.partial(function, *args)
    outside = _now.lane
    try:
        for z, y, x in np.ndindex(grid[::-1]):
            block = _Block(_Three(x, y, z), shape, grid, seen, body)
            _run_block(block)
            if seen is not None:
                seen.add_block(block)
    except Exception as error:
        at = f"block {tuple(block.index)}"
        if not isinstance(error, BarrierError):
            at = f"thread {tuple(_now.lane.thread)} of {at}"
        error.add_note(f"in {function.__name__}, {at}")
        raise
    finally:
        _now.lane = outside
        if outside is not None:  # a launch within a thread
            _enter_block(outside.block)
            _enter(outside)


# %% imports of the launch tags=["export"] module="cuda.launch"
import functools
import importlib.util
import os
import types
from contextlib import contextmanager

import numpy as np

from llmnb.cuda.simulator import cuda, load4, record, simulate, store4


# %% is there a GPU tags=["export"] module="cuda.launch"
@functools.cache
def missing():
    """Why kernels run on the simulator; empty where they run on a GPU.

    LLMNB_CUDA=simulator chooses the simulator even where there is a GPU.

    Derived in chapter 4.
    """
    if os.environ.get("LLMNB_CUDA") == "simulator":
        return "LLMNB_CUDA asks for the simulator"
    if importlib.util.find_spec("numba_cuda") is None:
        return "numba-cuda is not installed: pip install 'llmnb[cuda]'"
    from numba import cuda as real

    if not real.is_available():
        return "numba-cuda finds no NVIDIA GPU with a driver"
    return ""


# %% arrays on the device tags=["export"] module="cuda.launch"
ALIGN = 256  # bytes: every allocation on a GPU begins at a multiple


class DeviceArray:
    """A simulated GPU's array: only kernels and copies reach its elements.

    It answers to what llmnb uses of numba's device arrays, and to no more,
    so that code written for it runs on a GPU. array: C-contiguous.

    Derived in chapter 4.
    """

    def __init__(self, array):
        self._array = array
        self.shape, self.dtype, self.ndim = (
            array.shape,
            array.dtype,
            array.ndim,
        )
        self.size, self.nbytes = array.size, array.nbytes

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        part = self._array[index]
        return DeviceArray(part) if isinstance(part, np.ndarray) else part

    def __array__(self, dtype=None, copy=None):
        return np.array(self._array, dtype)

    def is_c_contiguous(self):
        """Whether the elements lie one after the other."""
        return self._array.flags.c_contiguous

    def view(self, dtype):
        """The same bytes as elements of another type."""
        return DeviceArray(self._array.view(dtype))

    def reshape(self, *shape):
        """The same elements in another shape."""
        return DeviceArray(self._array.reshape(*shape))

    def copy_to_host(self, ary=None, stream=0):
        """A NumPy array of the elements; ary, if given, receives them."""
        if ary is None:
            return self._array.copy()
        ary[...] = self._array
        return ary

    def copy_to_device(self, ary, stream=0):
        """Overwrite the elements with those of `ary`."""
        self._array[...] = np.asarray(ary)


# %% to the device and back tags=["export"] module="cuda.launch"
def simulated(array):
    """A copy of a NumPy array on the simulated GPU, wherever this runs.

    Derived in chapter 4.
    """
    array = np.ascontiguousarray(array)
    block = np.empty(array.nbytes + ALIGN, np.uint8)
    skip = -block.ctypes.data % ALIGN
    there = block[skip : skip + array.nbytes].view(array.dtype)
    there = there.reshape(array.shape)
    there[...] = array
    return DeviceArray(there)


def to_device(array):
    """A copy of a NumPy array on the GPU, or else on the simulated one.

    Derived in chapter 4.
    """
    if missing():
        return simulated(array)
    from numba import cuda as real

    return real.to_device(np.ascontiguousarray(array))


def to_host(array):
    """A copy of a device's array as a NumPy array.

    Waits for the kernels that were launched before.

    Derived in chapter 4.
    """
    return array.copy_to_host()


# %% new memory tags=["export"] module="cuda.launch"
def empty(shape, dtype=np.float32, like=None):
    """An array on the device that nobody has written to yet.

    like: a device's array; the new one is where that is. On the simulator
    it is full of NaN, or of a senseless integer.

    Derived in chapter 4.
    """
    if isinstance(like, DeviceArray) or (like is None and missing()):
        dtype = np.dtype(dtype)
        poison = np.nan if dtype.kind == "f" else np.iinfo(dtype).max - 77
        return simulated(np.full(shape, poison, dtype))
    from numba import cuda as real

    return real.device_array(shape, dtype)


# %% check an array tags=["export"] module="cuda.launch"
def check_device(name, array, shape, dtype=np.float32):
    """Raise unless `array` is a device's, of this shape and dtype.

    name: what the message calls it, such as "gelu_forward: out". Raises
    TypeError (not on a device, wrong dtype) or ValueError (wrong shape, not
    C-contiguous).

    Derived in chapter 4.
    """
    if not hasattr(array, "copy_to_host"):
        kind = type(array).__name__
        raise TypeError(f"{name} must be a device's array, got {kind}")
    if array.dtype != dtype:
        want = np.dtype(dtype)
        raise TypeError(f"{name} must be {want}, got {array.dtype}")
    if tuple(array.shape) != tuple(shape):
        raise ValueError(
            f"{name} must have shape {tuple(shape)}, got {array.shape}"
        )
    if not array.is_c_contiguous():
        raise ValueError(f"{name} must be C-contiguous")


# %% where an array lies tags=["export"] module="cuda.launch"
def address(array):
    """Where the first element of a device's array lies in its memory.

    Derived in chapter 4.
    """
    if isinstance(array, DeviceArray):
        return array._array.ctypes.data
    return array.__cuda_array_interface__["data"][0]


def aligned(*arrays):
    """Whether `load4` and `store4` can begin where these arrays begin.

    Derived in chapter 4.
    """
    return all(address(array) % 16 == 0 for array in arrays)


# %% choose a version tags=["export"] module="cuda.launch"
def numbered(versions, version, name):
    """The version of a layer that bears this number, counted from 1.

    versions: a tuple of functions; name: what a message calls the layer.
    Raises ValueError where there is no such version.

    Derived in chapter 4.
    """
    if version not in range(1, len(versions) + 1):
        raise ValueError(
            f"{name}: version must be in 1 to {len(versions)}, got {version}"
        )
    return versions[version - 1]


# %% what stands for a name on a GPU tags=["exporti"] module="cuda.launch"
@functools.cache
def _real_names():
    """numba's own objects for the simulator's, by id."""
    from llvmlite import ir
    from numba import cuda as real
    from numba.core import types as nb
    from numba.cuda.extending import intrinsic

    def place(context, builder, signature, args):
        data = context.make_array(signature.args[0])
        first = builder.gep(data(context, builder, args[0]).data, [args[1]])
        four = ir.VectorType(ir.FloatType(), 4)
        return builder.bitcast(first, four.as_pointer()), four

    @intrinsic
    def load(typing, array, i):
        def generate(context, builder, signature, args):
            pointer, _ = place(context, builder, signature, args)
            vector = builder.load(pointer, align=16)
            number = ir.IntType(32)
            parts = [
                builder.extract_element(vector, number(k)) for k in range(4)
            ]
            kind = signature.return_type
            return context.make_tuple(builder, kind, parts)

        return nb.UniTuple(nb.float32, 4)(array, nb.intp), generate

    @intrinsic
    def store(typing, array, i, a, b, c, d):
        def generate(context, builder, signature, args):
            pointer, four = place(context, builder, signature, args)
            vector, number = four(ir.Undefined), ir.IntType(32)
            for k in range(4):
                part, at = args[2 + k], number(k)
                vector = builder.insert_element(vector, part, at)
            builder.store(vector, pointer, align=16)
            return context.get_dummy_value()

        f = nb.float32
        return nb.void(array, nb.intp, f, f, f, f), generate

    return {id(cuda): real, id(load4): load, id(store4): store}


# %% the same function for numba tags=["exporti"] module="cuda.launch"
def _real_function(function):
    """A copy of a function in which names mean what they do on a GPU."""
    names, codes = set(), [function.__code__]
    for code in codes:
        names.update(code.co_names)
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    known = function.__globals__
    swapped = {n: _real(known[n]) for n in names & set(known)}
    cells = [x.cell_contents for x in function.__closure__ or ()]
    return types.FunctionType(
        function.__code__,
        known | swapped,
        function.__name__,
        function.__defaults__,
        tuple(types.CellType(_real(x)) for x in cells) or None,
    )


@functools.cache
def _real_device(function):
    from numba.cuda.extending import register_jitable

    return register_jitable(_real_function(function))


def _real(value):
    if getattr(value, "on_device", False):
        return _real_device(value)
    return _real_names().get(id(value), value)


# %% the stream tags=["exporti"] module="cuda.launch"
_current = types.SimpleNamespace(stream=0)


def _kinds(args):
    """(dtype, ndim) of each argument of a launch; ndim 0 is a number."""
    kinds = []
    for x in args:
        whole = "int64" if isinstance(x, int) else None
        kinds.append((whole or x.dtype.name, getattr(x, "ndim", 0)))
    return tuple(kinds)


# %% a launch tags=["export"] module="cuda.launch"
class Kernel:
    """A function that every thread of a grid runs: kernel[grid, block](...).

    On a device's arrays it runs there, in the current stream; on those of
    the simulated GPU it is simulated. A call returns nothing. Raises
    TypeError for a number that is no int and no NumPy number: a Python float
    would be computed with in float64.

    Derived in chapter 4.
    """

    def __init__(self, function, **options):
        self.function, self.options, self._made = function, options, None
        functools.update_wrapper(self, function)

    def __getitem__(self, size):
        grid, block = size
        return functools.partial(self._launch, grid, block)

    def _launch(self, grid, block, *args):
        for x in args:
            if isinstance(x, float) and not isinstance(x, np.floating):
                raise TypeError(
                    f"{self.__name__}: pass np.float32(...), not a float"
                )
        if any(isinstance(x, DeviceArray) for x in args):
            record((self, grid, block, _kinds(args)))
            plain = [
                x._array if isinstance(x, DeviceArray) else x for x in args
            ]
            simulate(self.function, grid, block, plain)
        else:
            self.compiled()[grid, block, _current.stream](*args)

    def compiled(self):
        """numba's kernel, compiled when first launched; needs numba-cuda."""
        if self._made is None:
            from numba import cuda as real

            self._made = real.jit(
                _real_function(self.function), **self.options
            )
        return self._made


# %% decorators tags=["export"] module="cuda.launch"
def kernel(function=None, **options):
    """Make a Kernel of a function, to be launched as kernel[grid, block](...).

    options: numba's `launch_bounds`, the largest number of threads a block
    will have; `fastmath`, on unless False: a product and a sum become one
    instruction, exp and division are approximate.

    Derived in chapter 4.
    """
    options = {"fastmath": True} | options
    if function is None:
        return functools.partial(kernel, **options)
    return Kernel(function, **options)


def device(function):
    """Let kernels call a function; it is compiled along with them.

    Derived in chapter 4.
    """
    function.on_device = True
    return function


# %% streams tags=["export"] module="cuda.launch"
@contextmanager
def stream(handle):
    """Launch on this stream of numba's what is launched inside.

    Derived in chapter 4.
    """
    before, _current.stream = _current.stream, handle
    try:
        yield handle
    finally:
        _current.stream = before


# %% the stream's address tags=["export"] module="cuda.launch"
def stream_address():
    """The current stream as libraries take it; 0 is the default one.

    Derived in chapter 4.
    """
    return int(getattr(_current.stream, "handle", 0))


# %% imports of the compiler tags=["export"] module="cuda.ptx"
import importlib.util
import re
import types
from contextlib import contextmanager
from typing import NamedTuple


# %% what a compiled kernel is like tags=["export"] module="cuda.ptx"
class Compiled(NamedTuple):
    """A kernel compiled for a GPU that need not be there.

    ptx: the text for any GPU of that generation or a later one. registers:
    a thread's; spilled: bytes of them kept in memory for want of room;
    stack: bytes of a thread's arrays that are in memory; shared: bytes of a
    block's memory, with what the system takes. float64, vector_loads,
    vector_stores: how many instructions compute in double precision, or
    move 16 bytes at once from global or shared memory.

    Derived in chapter 4.
    """

    ptx: str
    registers: int
    spilled: int
    stack: int
    shared: int
    float64: int
    vector_loads: int
    vector_stores: int


# %% compile tags=["export"] module="cuda.ptx"
def no_compiler():
    """Why kernels cannot be compiled here; empty where they can.

    Derived in chapter 4.
    """
    if importlib.util.find_spec("numba_cuda") is None:
        return "numba-cuda is not installed: pip install 'llmnb[ptx]'"
    return ""


def compile_kernel(kernel, kinds, cc=(9, 0)):
    """Compile a Kernel to PTX and on to machine code, with no GPU.

    kinds: (dtype name, number of dimensions) of each argument, as
    `Seen.launches` holds them; a number has none. cc: the generation, (8, 0)
    for an A100, (9, 0) for an H100. Returns a Compiled. Raises
    ModuleNotFoundError without numba-cuda, numba's errors for what it
    cannot compile, and RuntimeError for what the assembler refuses.

    Derived in chapter 4.
    """
    from numba import cuda as real
    from numba.core import types as nb

    signature = nb.void(
        *[
            nb.Array(getattr(nb, name), ndim, "C")
            if ndim
            else getattr(nb, name)
            for name, ndim in kinds
        ]
    )
    function = kernel.compiled().py_func
    with _pretend(cc):
        ptx, _ = real.compile_ptx(function, signature, cc=cc, **kernel.options)
    log = _assemble(ptx, cc)
    wide = r"(?:ld|st)\.(?:global|shared)\S*\.v4"
    kinds = re.findall(wide, ptx)
    return Compiled(
        ptx,
        _number(r"Used (\d+) registers", log),
        _number(r"(\d+) bytes spill stores", log),
        _number(r"(\d+) bytes stack frame", log),
        _number(r"(\d+) bytes smem", log),
        len(re.findall(r"\.f64\b", ptx)),
        sum(x.startswith("ld") for x in kinds),
        sum(x.startswith("st") for x in kinds),
    )


@contextmanager
def _pretend(cc):
    """Answer numba, which asks the GPU of what generation it is."""
    from numba.cuda import dispatcher

    asked = dispatcher.get_current_device
    answer = types.SimpleNamespace(compute_capability=cc)
    dispatcher.get_current_device = lambda: answer
    try:
        yield
    finally:
        dispatcher.get_current_device = asked


def _number(pattern, log):
    """The largest number that a pattern finds; 0 where it finds none."""
    return max(map(int, re.findall(pattern, log)), default=0)


def _assemble(ptx, cc):
    """Assemble PTX to a cubin; return what the assembler says of it."""
    from cuda.bindings import nvjitlink

    arch = f"-arch=sm_{cc[0]}{cc[1]}"
    handle = nvjitlink.create(3, [arch, "-O3", "-verbose"])
    try:
        text = ptx.encode()
        kind = nvjitlink.InputType.PTX
        nvjitlink.add_data(handle, kind, text, len(text), "kernel.ptx")
        nvjitlink.complete(handle)
        log = bytearray(nvjitlink.get_info_log_size(handle))
        nvjitlink.get_info_log(handle, log)
    except Exception as error:
        log = bytearray(nvjitlink.get_error_log_size(handle))
        nvjitlink.get_error_log(handle, log)
        raise RuntimeError(log.decode(errors="replace").strip()) from error
    finally:
        nvjitlink.destroy(handle)
    return log.decode(errors="replace")


# %% imports of the warp tags=["export"] module="cuda.warp"
import numpy as np

from llmnb.cuda.launch import device
from llmnb.cuda.simulator import cuda


# %% sums in a warp tags=["export"] module="cuda.warp"
@device
def warp_sum(value):
    """The sum of `value` over the 32 lanes of a warp, in every lane.

    Every lane of the warp must call it. The order of the additions is
    fixed.

    Derived in chapter 4.
    """
    for step in (16, 8, 4, 2, 1):
        value += cuda.shfl_xor_sync(0xFFFFFFFF, value, step)
    return value


@device
def warp_max(value):
    """The largest `value` of the 32 lanes of a warp, in every lane.

    Derived in chapter 4.
    """
    for step in (16, 8, 4, 2, 1):
        value = max(value, cuda.shfl_xor_sync(0xFFFFFFFF, value, step))
    return value


# %% sums in a block tags=["export"] module="cuda.warp"
@device
def block_sum(value, parts):
    """The sum of `value` over the threads of a block, in every thread.

    Every thread must call it. parts: shared memory, one element for each
    warp of the block (at most 32); it is free again when the call returns.
    Blocks are whole warps, in one dimension.

    Derived in chapter 4.
    """
    value = warp_sum(value)
    warp, lane = cuda.threadIdx.x // 32, cuda.threadIdx.x % 32
    if lane == 0:
        parts[warp] = value
    cuda.syncthreads()
    total = np.float32(0)
    for i in range(cuda.blockDim.x // 32):
        total += parts[i]
    cuda.syncthreads()
    return total


@device
def block_max(value, parts):
    """The largest `value` of a block's threads; otherwise as `block_sum`.

    Derived in chapter 4.
    """
    value = warp_max(value)
    warp, lane = cuda.threadIdx.x // 32, cuda.threadIdx.x % 32
    if lane == 0:
        parts[warp] = value
    cuda.syncthreads()
    top = parts[0]
    for i in range(1, cuda.blockDim.x // 32):
        top = max(top, parts[i])
    cuda.syncthreads()
    return top


# %% draw who owns what tags=["export"] module="owners"
from matplotlib.patches import Rectangle

from llmnb.diagram import PALETTE


# %% the owners of elements tags=["export"] module="owners"
def draw_owners(ax, who, title="", group=None, rows="", cols=""):
    """Draw a matrix of which each element bears the number of its owner.

    ax: matplotlib's axes. who: a list of rows of ints, threads, warps or
    blocks; a negative number stands for nobody. group: how many owners have
    one colour, such as 32 for threads that are coloured by warp; None gives
    each its own. rows, cols: what the two directions are.

    Derived in chapter 4.
    """
    colours = [PALETTE[k] for k in ("blue", "orange", "green", "yellow")]
    for i, row in enumerate(who):
        for j, owner in enumerate(row):
            colour = colours[owner // (group or 1) % len(colours)]
            box = Rectangle((j, i), 1, 1, fc=colour, ec="white", alpha=0.45)
            if owner >= 0:
                ax.add_patch(box)
                ax.text(j + 0.5, i + 0.5, owner, ha="center", va="center")
    ax.set(xlim=(0, len(who[0])), ylim=(len(who), 0), title=title)
    ax.set(xticks=[], yticks=[], xlabel=cols, ylabel=rows, aspect="equal")


# %% imports of the encoder tags=["export"] module="cuda.encoder"
import numpy as np

from llmnb.cuda.launch import (
    aligned,
    check_device,
    device,
    kernel,
    numbered,
)
from llmnb.cuda.simulator import cuda, load4, store4

# %% block size tags=["exporti"] module="cuda.encoder"
THREADS = 128  # in a block


def _blocks(n):
    return -(-n // THREADS)


# %% forward, a thread an element tags=["exporti"] module="cuda.encoder"
@kernel
def _forward_by_one(out, inp, wte, wpe, T):
    i = cuda.grid(1)
    rows, C = out.shape
    if i < rows * C:
        n, c = i // C, i % C
        out[n, c] = wte[inp[n], c] + wpe[n % T, c]


def _thread_an_element(out, inp, wte, wpe, T):
    grid = _blocks(out.size)
    _forward_by_one[grid, THREADS](out, inp, wte, wpe, T)


# %% forward, a thread four channels tags=["exporti"] module="cuda.encoder"
@kernel
def _forward_by_four(out, inp, wte, wpe, T):
    i = cuda.grid(1) * 4
    rows, C = out.shape
    if i < rows * C:
        n, c = i // C, i % C
        x, y, z, w = load4(wte, int(inp[n]) * C + c)
        p, q, r, s = load4(wpe, n % T * C + c)
        store4(out, i, x + p, y + q, z + r, w + s)


def _thread_four_channels(out, inp, wte, wpe, T):
    if out.shape[1] % 4 or not aligned(out, wte, wpe):
        _thread_an_element(out, inp, wte, wpe, T)
        return
    grid = _blocks(out.size // 4)
    _forward_by_four[grid, THREADS](out, inp, wte, wpe, T)


# %% check the arrays tags=["exporti"] module="cuda.encoder"
def _check_encoder(name, d, out, inp, wte, wpe):
    for what, array in (("out", out), ("wte", wte), ("wpe", wpe)):
        ndim = 3 if what == "out" else 2
        shape = getattr(array, "shape", ())
        check_device(f"{name}: {d}{what}", array, shape)
        if len(shape) != ndim:
            raise ValueError(
                f"{name}: {d}{what} must have {ndim} dimensions, got "
                f"{len(shape)}"
            )
    B, T, C = out.shape
    check_device(f"{name}: inp", inp, (B, T), np.int32)
    check_device(f"{name}: {d}wte", wte, (len(wte), C))
    check_device(f"{name}: {d}wpe", wpe, (len(wpe), C))
    if len(wpe) < T:
        raise ValueError(
            f"{name}: T must be at most {len(wpe)}, the number of rows "
            f"of {d}wpe, got {T}"
        )


# %% the encoder, forward tags=["export"] module="cuda.encoder"
ENCODER_FORWARD = (_thread_an_element, _thread_four_channels)


def encoder_forward(out, inp, wte, wpe, version=2):
    """Sum the vector of each token and the vector of its position.

    out   (B, T, C)      float32, overwritten
    inp   (B, T)         int32, each in [0, Vp): the caller sees to that
    wte   (Vp, C)        float32, the table of tokens
    wpe   (max_T, C)     float32, the table of positions; T <= max_T

    All on a device. version: 1 has a thread for each element, 2 for four
    channels; that needs C % 4 == 0 and arrays that begin at multiples of 16
    bytes, and runs as 1 for others. Raises TypeError or ValueError where an
    array does not fit.

    Derived in chapter 4.
    """
    run = numbered(ENCODER_FORWARD, version, "encoder_forward")
    _check_encoder("encoder_forward", "", out, inp, wte, wpe)
    B, T, C = out.shape
    run(out.reshape(B * T, C), inp.reshape(B * T), wte, wpe, T)


# %% backward, atomics tags=["exporti"] module="cuda.encoder"
@kernel
def _backward_atomic(dwte, dwpe, dout, inp, T):
    i = cuda.grid(1)
    rows, C = dout.shape
    if i < rows * C:
        n, c = i // C, i % C
        dy = dout[n, c]
        cuda.atomic.add(dwte, (inp[n], c), dy)
        cuda.atomic.add(dwpe, (n % T, c), dy)


def _atomics(dwte, dwpe, dout, inp, T):
    grid = _blocks(dout.size)
    _backward_atomic[grid, THREADS](dwte, dwpe, dout, inp, T)


# %% backward, the first place of a token tags=["exporti"] module="cuda.encoder"
@kernel
def _tokens_by_one(dwte, dout, inp):
    n, c = cuda.blockIdx.x, cuda.blockIdx.y * THREADS + cuda.threadIdx.x
    rows, C = dout.shape
    token = inp[n]
    for m in range(n):
        if inp[m] == token:
            return  # the block of place m, or an earlier one, does it all
    if c < C:
        total = dwte[token, c]
        for m in range(n, rows):
            if inp[m] == token:
                total += dout[m, c]
        dwte[token, c] = total


@kernel
def _positions_by_one(dwpe, dout, T):
    i = cuda.grid(1)
    rows, C = dout.shape
    if i < T * C:
        t, c = i // C, i % C
        total = dwpe[t, c]
        for n in range(t, rows, T):
            total += dout[n, c]
        dwpe[t, c] = total


def _block_a_place(dwte, dwpe, dout, inp, T):
    rows, C = dout.shape
    _tokens_by_one[(rows, _blocks(C)), THREADS](dwte, dout, inp)
    _positions_by_one[_blocks(T * C), THREADS](dwpe, dout, T)


# %% backward, four channels a thread tags=["exporti"] module="cuda.encoder"
@device
def _where(inp, first, begin, end, token):
    """A bit for each lane's place, first + lane: whether token stands there.

    Places outside begin to end do not count. For whole warps.
    """
    i = first + cuda.laneid
    here = i >= begin and i < end and inp[i] == token
    return cuda.ballot_sync(0xFFFFFFFF, here)


@kernel
def _tokens_by_four(dwte, dout, inp):
    n, i = cuda.blockIdx.x, cuda.blockIdx.y * THREADS + cuda.threadIdx.x
    rows, C = dout.shape
    if (i - cuda.laneid) * 4 >= C:
        return  # nothing is left for this warp
    token, c, mine = int(inp[n]), i * 4, i * 4 < C
    for first in range(0, n, 32):
        if _where(inp, first, 0, n, token) != 0:
            return
    x = y = z = w = np.float32(0)
    if mine:
        x, y, z, w = load4(dwte, token * C + c)
    for first in range(n // 32 * 32, rows, 32):
        bits = _where(inp, first, n, rows, token)
        if mine and bits != 0:
            for k in range(32):
                if (bits >> k) & 1:
                    p, q, r, s = load4(dout, (first + k) * C + c)
                    x, y, z, w = x + p, y + q, z + r, w + s
    if mine:
        store4(dwte, token * C + c, x, y, z, w)


@kernel
def _positions_by_four(dwpe, dout, T):
    i = cuda.grid(1) * 4
    rows, C = dout.shape
    if i < T * C:
        x, y, z, w = load4(dwpe, i)
        for n in range(0, rows, T):
            p, q, r, s = load4(dout, n * C + i)
            x, y, z, w = x + p, y + q, z + r, w + s
        store4(dwpe, i, x, y, z, w)


def _warp_votes(dwte, dwpe, dout, inp, T):
    rows, C = dout.shape
    if C % 4 or not aligned(dwte, dwpe, dout):
        _block_a_place(dwte, dwpe, dout, inp, T)
        return
    _tokens_by_four[(rows, _blocks(C // 4)), THREADS](dwte, dout, inp)
    _positions_by_four[_blocks(T * C // 4), THREADS](dwpe, dout, T)


# %% the encoder, backward tags=["export"] module="cuda.encoder"
ENCODER_BACKWARD = (_atomics, _block_a_place, _warp_votes)


def encoder_backward(dwte, dwpe, dout, inp, version=3):
    """Add dout's rows to the rows of the tables that they came from.

    dwte  (Vp, C)        float32, added to; rows of absent tokens stay
    dwpe  (max_T, C)     float32, added to; rows from T on stay
    dout  (B, T, C)      float32
    inp   (B, T)         int32, as in the forward pass

    All on a device. version: 1 adds with atomics, in an order that changes
    from run to run; 2 has a block for each place, of which the first of each
    token adds all rows in the order of the text; 3 is 2 with four channels a
    thread and votes of a warp over 32 places, and runs as 2 where C % 4 or
    an array that begins elsewhere than at 16 bytes forbids it. Raises as
    `encoder_forward` does.

    Derived in chapter 4.
    """
    run = numbered(ENCODER_BACKWARD, version, "encoder_backward")
    _check_encoder("encoder_backward", "d", dout, inp, dwte, dwpe)
    B, T, C = dout.shape
    run(dwte, dwpe, dout.reshape(B * T, C), inp.reshape(B * T), T)
