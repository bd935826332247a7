# Written by `make export` from notebooks/04_gpu.py: edit that file.

"""Run a thousand threads at once.

A graphics processor runs one short function in thousands of threads; a
simulator of it in Python finds the races that hardware hides.
"""

__all__ = [
    "Seen",
    "cuda",
    "load4",
    "record",
    "simulate",
    "store4",
    "watch",
]


# imports of the simulator
import dis
import functools
import sys
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np


# where a thread stands
WARP = 32  # threads that a processor moves together
FULL = 0xFFFFFFFF  # a mask that names all of them


class _Three(NamedTuple):
    x: int = 1
    y: int = 1
    z: int = 1


def _three(size):
    return _Three(*(size if isinstance(size, tuple) else (size,)))


# what a thread runs in
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


# one thread
class _Lane:
    """A thread: its place, and what it waits for."""

    __slots__ = ("thread", "number", "block", "fiber", "waits", "value")
    __slots__ += ("values", "block_era", "warp_era", "counts")

    def __init__(self, block, number, thread, fiber):
        self.thread, self.number, self.block = thread, number, block
        self.fiber, self.waits, self.value = fiber, None, None
        self.values, self.block_era, self.warp_era = None, 0, 0
        self.counts = {} if block.seen else None


class _Block:
    """A block of threads, all about to run `body`, and their memory."""

    def __init__(self, index, shape, grid, seen, body):
        self.index, self.shape, self.grid = index, shape, grid
        self.seen, self.shared, self.log = seen, {}, {}
        fiber = _greenlet()
        self.lanes = [
            _Lane(self, n, thread, fiber(body))
            for n, thread in enumerate(_threads(shape))
        ]


@functools.cache
def _threads(shape):
    """The places of a block's threads: x runs fastest."""
    x, y, z = map(range, shape)
    return [_Three(i, j, k) for k in z for j in y for i in x]


# the lane that runs, and what watches it
_now = SimpleNamespace(lane=None, seen=None)


# run a block
def _run_block(block):
    """Run every lane to its next barrier, in turns, until all are done."""
    live = block.lanes
    while live:
        for lane in live:
            if lane.waits is None:
                _now.lane = lane
                lane.fiber.switch()
        live = [lane for lane in live if not lane.fiber.dead]
        _release(block, live)


# barriers
def _release(block, live):
    """Let lanes go on whose barrier is complete; raise when none is."""
    if not live:
        return
    size, free = len(block.lanes), False
    if all(lane.waits == "block" for lane in live) and len(live) == size:
        for lane in live:
            lane.waits, lane.block_era = None, lane.block_era + 1
        free = True
    for start in range(0, size, WARP):
        warp = block.lanes[start : start + WARP]
        if all(x.waits == "warp" for x in warp) and not warp[0].fiber.dead:
            values = [x.value for x in warp]
            for x in warp:
                x.waits, x.values, x.warp_era = None, values, x.warp_era + 1
            free = True
    if not free:
        raise BarrierError(_stuck(block, live))


class BarrierError(RuntimeError):
    """Some threads wait at a barrier that others never reach.

    Derived in chapter 4.
    """


def _stuck(block, live):
    """Say who waits where: the text of a BarrierError."""
    count = {"block": 0, "warp": 0}
    for lane in live:
        count[lane.waits] += 1
    return (
        f"block {tuple(block.index)} stands still: {count['block']} of "
        f"{len(block.lanes)} threads wait for the block, {count['warp']} "
        f"for their warp, {len(block.lanes) - len(live)} have ended"
    )


def _wait(what):
    lane = _now.lane
    lane.waits = what
    lane.fiber.parent.switch()


# exchange in a warp
def _exchange(mask, value):
    """Hand in a value; return those of all 32 lanes and one's own place."""
    lane = _now.lane
    if mask != FULL or len(lane.block.lanes) % WARP:
        raise ValueError(
            "the simulator knows the mask 0xFFFFFFFF alone, and blocks of "
            f"whole warps: got {mask:#x} and {len(lane.block.lanes)} threads"
        )
    if lane.block.seen is not None:
        lane.block.seen.exchanges += 1
    lane.value = value
    _wait("warp")
    return lane.values, lane.number % WARP


# memory of a block and of a thread
def _poisoned(shape, dtype):
    """An array of what memory holds before anyone writes: nothing good."""
    dtype = np.dtype(getattr(dtype, "name", dtype))
    poison = np.nan if dtype.kind == "f" else np.iinfo(dtype).min + 77
    return np.full(shape, poison, dtype)


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
        key = frame.f_code, _instruction(frame.f_code, frame.f_lasti)
        if key not in block.shared:
            memory = _placed(_poisoned(shape, dtype), alignment)
            if block.seen is not None:
                memory = _Watched(memory, "shared", block.seen, block.log)
            block.shared[key] = memory
        return block.shared[key]


class _Local:
    """cuda.local: memory of one thread, in registers where that is small."""

    def array(self, shape, dtype):
        return _poisoned(shape, dtype)


# atomics
class _Atomic:
    """cuda.atomic: read, change and write with nobody in between."""

    def add(self, array, index, value):
        return self._change(array, index, lambda old: old + value)

    def max(self, array, index, value):
        return self._change(array, index, lambda old: max(old, value))

    def _change(self, array, index, function):
        if isinstance(array, _Watched):
            array.seen.atomics += 1
            place = array._place(index)
            array.note(place, array.itemsize, True, atomic=True)
            array = array.array
        old = array[index]
        array[index] = function(old)
        return old


# what kernels call cuda
class _Cuda:
    """What kernels know as `cuda`, answered for the lane that runs."""

    shared, local, atomic = _Shared(), _Local(), _Atomic()
    threadIdx = property(lambda self: _now.lane.thread)
    blockIdx = property(lambda self: _now.lane.block.index)
    blockDim = property(lambda self: _now.lane.block.shape)
    gridDim = property(lambda self: _now.lane.block.grid)
    laneid = property(lambda self: _now.lane.number % WARP)

    def grid(self, ndim):
        at, of, n = self.blockIdx, self.blockDim, self.threadIdx
        places = [a * b + c for a, b, c in zip(at, of, n, strict=True)]
        return places[0] if ndim == 1 else tuple(places[:ndim])

    def gridsize(self, ndim):
        pairs = zip(self.gridDim, self.blockDim, strict=True)
        sizes = [a * b for a, b in pairs]
        return sizes[0] if ndim == 1 else tuple(sizes[:ndim])

    def syncthreads(self):
        if _now.seen is not None:
            _now.seen.barriers += 1
        _wait("block")

    def syncwarp(self, mask=FULL):
        _exchange(mask, None)

    def shfl_sync(self, mask, value, source):
        values, _ = _exchange(mask, value)
        return values[source % WARP]

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


# the object
cuda = _Cuda()


# vectors of four
def load4(array, i):
    """Elements i to i + 3 of a flat view of `array`, in one access.

    array: float32, C-contiguous, any shape; its element i must begin at a
    multiple of 16 bytes: a shared array is made with `alignment=16`.
    Returns four numbers.

    Derived in chapter 4.
    """
    if isinstance(array, _Watched):
        array.note(array.vector(i), 16, False)
        array = array.array
    a, b, c, d = array.reshape(-1)[i : i + 4]
    return a, b, c, d


def store4(array, i, a, b, c, d):
    """Write elements i to i + 3 of a flat view of `array`, in one access.

    As `load4`, the other way.

    Derived in chapter 4.
    """
    if isinstance(array, _Watched):
        array.note(array.vector(i), 16, True)
        array = array.array
    array.reshape(-1)[i : i + 4] = a, b, c, d


# an array under watch
class _Watched:
    """An array that reports each access to a Seen, and checks it first."""

    def __init__(self, array, name, seen, log):
        self.array, self.name, self.seen, self.log = array, name, seen, log
        self.shape, self.dtype, self.ndim = (
            array.shape,
            array.dtype,
            array.ndim,
        )
        self.size, self.itemsize = array.size, array.itemsize
        self.start = array.ctypes.data

    def __len__(self):
        return self.shape[0]

    def _place(self, index):
        """The address of an element; raise where there is none."""
        index = index if isinstance(index, tuple) else (index,)
        address = self.start
        for i, n, stride in zip(
            index, self.shape, self.array.strides, strict=True
        ):
            if not 0 <= i < n:
                raise IndexError(
                    f"{self.name}[{', '.join(map(str, index))}] lies outside "
                    f"its shape {self.shape}"
                )
            address += int(i) * stride
        return address

    def vector(self, i):
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

    def note(self, address, nbytes, write, atomic=False):
        offset = (address - self.start) // self.itemsize
        if not atomic:
            self.seen.count(self.name == "shared", address, nbytes, write)
        for i in range(nbytes // self.itemsize):
            where = address + i * self.itemsize
            clash = _clash(self.log, where, write, atomic)
            if clash:
                self.seen.race(self.name, offset + i, clash, write)

    def __getitem__(self, index):
        self.note(self._place(index), self.itemsize, False)
        return self.array[index]

    def __setitem__(self, index, value):
        self.note(self._place(index), self.itemsize, True)
        self.array[index] = value


# races
class _Access(NamedTuple):
    lane: _Lane
    block_era: int
    warp_era: int
    atomic: bool


def _ordered(before, lane):
    """Whether a barrier stands between an access and this lane's next."""
    other = before.lane
    if other is lane:
        return True
    if other.block is not lane.block:
        return False
    if before.block_era < lane.block_era:
        return True
    same_warp = other.number // WARP == lane.number // WARP
    return same_warp and before.warp_era < lane.warp_era


def _clash(log, address, write, atomic):
    """An earlier access that nothing orders before this one, or None.

    Two reads never clash, nor do two atomics. A lane is kept once.
    """
    lane = _now.lane
    written, reads = log.setdefault(address, (None, {}))
    now = _Access(lane, lane.block_era, lane.warp_era, atomic)
    found = None
    if written and not (atomic and written.atomic):
        found = None if _ordered(written, lane) else written
    if write:
        for read in reads.values():
            if not (_ordered(read, lane) or (atomic and read.atomic)):
                found = read
        log[address] = now, {}
    else:
        reads[lane] = now
    return found


class RaceError(RuntimeError):
    """Two threads touch one element, one writes, and nothing orders them.

    Derived in chapter 4.
    """


# where in the code
@functools.cache
def _instruction(code, place):
    """Where the instruction begins that a frame's f_lasti points into.

    Python moves f_lasti past an instruction's cache once it has specialised
    the instruction: the same access would count as two.
    """
    starts = (x.offset for x in dis.get_instructions(code))
    return max(start for start in starts if start <= place)


# what was seen
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
        self.barriers = self.exchanges = self.atomics = 0
        self.launches, self._races, self._groups = [], races, {}

    def count(self, shared, address, nbytes, write):
        """Count one access of the lane that runs, and its warp's request."""
        lane, frame = _now.lane, sys._getframe(3)
        key = frame.f_code, _instruction(frame.f_code, frame.f_lasti)
        n = lane.counts[key] = lane.counts.get(key, 0) + 1
        warp = lane.block, lane.number // WARP
        group = (shared, nbytes, write, key, n, warp)
        self._groups.setdefault(group, []).append(address)
        if shared:
            return
        if write:
            self.writes += 1
            self.written_bytes += nbytes
        else:
            self.reads += 1
            self.read_bytes += nbytes

    def race(self, name, element, before, write):
        """Raise a RaceError, unless races are only to be counted."""
        if not self._races:
            return
        one, two = before.lane, _now.lane
        raise RaceError(
            f"{name}, element {element}: thread {two.number} of block "
            f"{two.block.index[0]} {'writes' if write else 'reads'} it, and "
            f"nothing orders that after the access by thread {one.number} "
            f"of block {one.block.index[0]}"
        )

    @property
    def requests(self):
        return sum(not group[0] for group in self._groups)

    @property
    def sectors(self):
        return sum(
            len({a // 32 for a in places})
            for group, places in self._groups.items()
            if not group[0]
        )

    @property
    def shared_requests(self):
        return sum(group[0] for group in self._groups)

    @property
    def shared_passes(self):
        return sum(
            _passes(places, group[1])
            for group, places in self._groups.items()
            if group[0]
        )


# banks
def _passes(places, nbytes):
    """Passes that one request of a warp takes in shared memory.

    Its 32 banks give one word of four bytes each in a pass; a request for
    16 bytes a lane is served eight lanes at a time.
    """
    together = WARP * 4 // max(nbytes, 4)
    total = 0
    for start in range(0, len(places), together):
        words = {
            a // 4 + i
            for a in places[start : start + together]
            for i in range(max(nbytes // 4, 1))
        }
        banks = [w % WARP for w in words]
        total += max(banks.count(b) for b in set(banks))
    return total


# watch
@contextmanager
def watch(races=True):
    """Check and count what simulated kernels do; yields a Seen.

    Every element that a kernel touches must lie inside its array, and no
    two threads may touch one element, one of them writing, with no barrier
    between: IndexError, ValueError and RaceError tell. Some twenty times
    slower than without. races: False lets races pass.

    Derived in chapter 4.
    """
    before, _now.seen = _now.seen, Seen(races)
    try:
        yield _now.seen
    finally:
        _now.seen = before


# note a launch
def record(launch):
    """Add to the launches of the Seen that watches, if any does.

    Derived in chapter 4.
    """
    if _now.seen is not None:
        _now.seen.launches.append(launch)


# simulate a launch
def simulate(function, grid, block, args):
    """Run a kernel's function in every thread of a grid, one at a time.

    grid, block: blocks in the grid and threads in a block, an int or a
    tuple of up to three. args: NumPy arrays, which the kernel may write,
    and NumPy or Python numbers. Raises BarrierError, and whatever the
    function raises, with the thread that raised it.

    Derived in chapter 4.
    """
    grid, shape, seen, log = _three(grid), _three(block), _now.seen, {}
    if seen is not None:
        names = function.__code__.co_varnames
        args = [
            _Watched(a, name, seen, log) if isinstance(a, np.ndarray) else a
            for a, name in zip(args, names, strict=False)
        ]
    places, body = np.ndindex(grid[::-1]), functools.partial(function, *args)
    outside = _now.lane
    try:
        for z, y, x in places:
            block = _Block(_Three(x, y, z), shape, grid, seen, body)
            if seen is not None:
                seen.threads += len(block.lanes)
            _run_block(block)
    except Exception as error:
        lane = _now.lane
        error.add_note(
            f"in {function.__name__}, thread {tuple(lane.thread)} of block "
            f"{tuple(lane.block.index)}"
        )
        raise
    finally:
        _now.lane = outside
