# Written by `make export` from notebooks/appendix/05_simulator.py: edit that file.

"""A GPU in Python: blocks, warps and threads that find races."""

__all__ = [
    "BarrierError", "Film", "Frame", "RaceError", "Seen", "cuda", "load4",
    "promise4", "record", "simulate", "store4", "watch",
]


# imports of the simulator
import dis
import functools
import sys
import threading
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np


# where a thread stands
class _Three(NamedTuple):
    x: int = 1
    y: int = 1
    z: int = 1


def _three(size):
    return _Three(*size) if isinstance(size, tuple) else _Three(size)


def _check_sizes(grid, block):
    """Raise for a launch that a GPU would refuse."""
    if min(block) < 1 or block.x * block.y * block.z > 1024 or block.z > 64:
        raise ValueError(f"a block has 1 to 1024 threads, got {tuple(block)}")
    if min(grid) < 1 or max(grid.y, grid.z) > 65535:
        raise ValueError(
            "a grid has 1 block or more, and at most 65535 in y and z, "
            f"got {tuple(grid)}"
        )


@functools.cache
def _threads(shape):
    """The places of a block's threads: x runs fastest."""
    x, y, z = map(range, shape)
    return [_Three(i, j, k) for k in z for j in y for i in x]


# fibers
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


# threads, warps and blocks
WARP = 32  # threads that a processor moves together


class _Warp:
    def __init__(self):
        self.arrived, self.values, self.shown = [], [None] * WARP, None
        self.since, self.kind = 0, None


class _Lane:
    """A thread: its place, and the fiber that runs it."""

    __slots__ = (
        "thread", "number", "block", "warp", "fiber", "trace", "copies",
    )  # fmt: skip

    def __init__(self, thread, number, block, warp):
        self.thread, self.number, self.block = thread, number, block
        self.warp, self.fiber, self.trace = warp, None, {}
        self.copies = [[]]  # on their way, in groups: chapter 3.13


class _Block:
    """A block of threads, all about to run `body`, and their memory."""

    def __init__(self, index, shape, grid, body):
        self.index, self.shape, self.grid = index, shape, grid
        self.body, self.shared = body, {}
        threads = _threads(shape)
        self.warps = [_Warp() for _ in range(-(-len(threads) // WARP))]
        self.lanes = [
            _Lane(thread, n, self, self.warps[n // WARP])
            for n, thread in enumerate(threads)
        ]
        self.todo, self.ended = iter(self.lanes), 0
        self.arrived, self.ready, self.round = [], [], 0
        self.clock = self.since = self.bytes = 0


# the thread that runs
class _Now(threading.local):
    """What runs: each thread of Python may simulate a GPU of its own."""

    def __init__(self):
        self.lane, self.seen = None, None


_now = _Now()


def running():
    """The lane that runs."""
    return _now.lane


def _enter(lane):
    _now.lane, cuda.threadIdx = lane, lane.thread


# a fiber's life
def _serve(block, lane):
    """Run this lane, then others that nobody has begun."""
    fiber = _greenlet().getcurrent()
    while lane is not None:
        lane.fiber = fiber
        _enter(lane)
        block.body()
        lane.fiber, block.ended = None, block.ended + 1
        lane = next(block.todo, None)


# run a block
def _run_block(block):
    """Run every lane to its next barrier, in turns, until all are done."""
    cuda.blockIdx, cuda.blockDim = block.index, block.shape
    cuda.gridDim = block.grid
    try:
        for lane in block.todo:
            _greenlet()(_serve).switch(block, lane)
        while block.ended < len(block.lanes):
            ready, block.ready = block.ready, []
            block.round += 1
            if not ready:
                raise BarrierError(_stuck(block))
            for lane in ready:
                _enter(lane)
                lane.fiber.switch()
    finally:
        for lane in block.lanes:  # those that an error left standing
            if lane.fiber is not None and not lane.fiber.dead:
                lane.fiber.throw()


# simulate a launch
def simulate(function, grid, block, args):
    """Run a kernel's function in every thread of a grid, one at a time.

    grid, block: blocks in the grid and threads in a block, an int or a
    tuple of up to three. args: NumPy arrays, which the kernel may write,
    and NumPy or Python numbers. Raises ValueError for sizes that a GPU
    refuses, BarrierError, RuntimeError for a launch within a kernel, and
    whatever the function raises, with the thread that raised it.

    Derived in chapter A.5.
    """
    _greenlet()  # or say at once that it is missing
    grid, shape, seen = _three(grid), _three(block), _now.seen
    _check_sizes(grid, shape)
    if seen is not None:
        args = _watched(function, args, seen)
    body = functools.partial(function, *args)
    if _now.lane is not None:
        raise RuntimeError("a kernel cannot launch a kernel")
    try:
        for z, y, x in np.ndindex(grid[::-1]):
            block = _Block(_Three(x, y, z), shape, grid, body)
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
        _now.lane = None


# poison
@functools.cache
def _poison(shape, dtype):
    """What memory holds before anyone writes to it: nothing good."""
    dtype = np.dtype(getattr(dtype, "name", dtype))
    bad = np.nan if dtype.kind == "f" else np.iinfo(dtype).max - 77
    return np.full(shape, bad, dtype)


def placed(array, align, offset=0):
    """A copy that begins `offset` bytes after a multiple of `align`."""
    block = np.empty(array.nbytes + align + offset, np.uint8)
    skip = -block.ctypes.data % align + offset
    there = block[skip : skip + array.nbytes].view(array.dtype)
    there = there.reshape(array.shape)
    there[...] = array
    return there


# a place in the code
@functools.cache
def _instruction(code, last):
    """Where the instruction begins that a frame's f_lasti points into.

    Python moves f_lasti past an instruction's cache once it has specialised
    the instruction: the same access would count as two.
    """
    begins = (x.offset for x in dis.get_instructions(code))
    return id(code), max(x for x in begins if x <= last)


# shared and local memory
SHARED = 48 * 1024  # bytes that a block may have without asking for more


class _Shared:
    """cuda.shared: one array for each place in the code that asks.

    Vectors of four need `alignment=16`.
    """

    def array(self, shape, dtype, alignment=None):
        block, frame = _now.lane.block, sys._getframe(1)
        place = _instruction(frame.f_code, frame.f_lasti)
        key = place, shape, dtype  # a factory's functions share their code
        if key not in block.shared:
            memory = _poison(shape, dtype)
            memory = placed(memory, 128, 0 if alignment else memory.itemsize)
            block.bytes += memory.nbytes
            if block.bytes > SHARED:
                raise MemoryError(f"a block has {SHARED} bytes to share")
            if _now.seen is not None:
                log = _Log(memory.itemsize) if _now.seen.races else None
                count = len(block.shared) + 1
                name = f"shared {count}" if count > 1 else "shared"
                memory = _Watched(memory, name, log, shared=True)
            block.shared[key] = memory
        return block.shared[key]


class _Local:
    """cuda.local: memory of one thread, in registers where that is small."""

    def array(self, shape, dtype):
        return _poison(shape, dtype).copy()


# barriers
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


# a barrier that is never complete
class BarrierError(RuntimeError):
    """Some threads wait at a barrier that others never reach.

    Derived in chapter A.5.
    """


# who waits where
def _stuck(block):
    """Say who waits where: the text of a BarrierError."""
    warps = sum(len(warp.arrived) for warp in block.warps)
    return (
        f"block {tuple(block.index)} stands still: {len(block.arrived)} of "
        f"{len(block.lanes)} threads wait for the block, {warps} for their "
        f"warp, {block.ended} have ended"
    )


# exchange in a warp
FULL = 0xFFFFFFFF  # a mask that names all lanes


def exchange(kind, mask, value, orders=False, combine=None):
    """The 32 lanes' values, or what combine makes of them; one's own place."""
    lane = _now.lane
    if mask != FULL or len(lane.block.lanes) % WARP:
        raise ValueError(
            "the simulator knows the mask 0xFFFFFFFF alone, and blocks of "
            f"whole warps: got {mask:#x} and {len(lane.block.lanes)} threads"
        )
    if _now.seen is not None:
        _now.seen.exchanges += 1
        _filmed(WAIT, sys._getframe(2))
    warp, place = lane.warp, lane.number % WARP
    if warp.arrived and warp.kind != kind:
        raise BarrierError(f"lanes of a warp call {warp.kind} and {kind}")
    warp.kind, warp.values[place] = kind, value
    if len(warp.arrived) == WARP - 1:  # the last one: all values are there
        shown, warp.values = warp.values, [None] * WARP
        warp.shown = combine(shown) if combine else shown
    _wait(warp, WARP, orders)
    return warp.shown, place


# atomics
class _Atomic:
    """cuda.atomic: read, change and write with nobody in between."""

    def add(self, array, index, value):
        if isinstance(array, _Watched):
            _now.seen.atomics += 1
            _note(array, array.place(index), array.itemsize, ATOMIC)
            array = array.array
        old = array[index]
        array[index] = old + value
        return old


# what kernels ask
class _Cuda(threading.local):
    """What kernels know as `cuda`, answered for the lane that runs."""

    shared, local, atomic = _Shared(), _Local(), _Atomic()
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

    def syncthreads(self):
        if _now.seen is not None:
            _now.seen.barriers += 1
            _filmed(WAIT, sys._getframe(1))
        block = _now.lane.block
        _wait(block, len(block.lanes))

    def syncwarp(self, mask=FULL):
        exchange("syncwarp", mask, None, orders=True)

    def shfl_sync(self, mask, value, source):
        return exchange("shfl", mask, value)[0][source % WARP]

    def shfl_xor_sync(self, mask, value, bits):
        values, lane = exchange("shfl_xor", mask, value)
        return values[lane ^ bits]

    def ballot_sync(self, mask, predicate):
        values, _ = exchange("ballot", mask, bool(predicate))
        bits = sum(1 << i for i, v in enumerate(values) if v)
        return bits - (values[-1] << WARP)  # an int32: lane 31 is its sign

    def popc(self, bits):
        return (int(bits) & FULL).bit_count()


# the object
cuda = _Cuda()


# in what order
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


# what was touched
READ, WRITE, ATOMIC, WAIT = range(4)  # kinds of access, and a barrier


class _Log:
    """By kind and address: the accesses that stand for all so far.

    step: bytes of the smallest element of the arrays that share this log.
    """

    def __init__(self, step):
        self.kept, self.step = ({}, {}, {}), step


def _keep(kept, now):
    """The newest access and one other, the one that most could clash with."""
    lane = now[0]
    alive = [before for before in kept if not _ordered(before, lane)]
    far = [before for before in alive if before[0].warp is not lane.warp]
    return now, *(far[-1:] or alive[:1])


# who clashes with whom
_RIVALS = (WRITE, ATOMIC), (READ, WRITE, ATOMIC), (READ, WRITE)


def _clash(log, address, access, now):
    """An earlier access that nothing orders before this one, or None."""
    for kind in _RIVALS[access]:
        for before in log.kept[kind].get(address, ()):
            if not _ordered(before, now[0]):
                return before
    kept = log.kept[access]
    if access == WRITE:  # after which the others do not matter
        for others in log.kept:
            others.pop(address, None)
        kept[address] = (now,)
    else:
        kept[address] = _keep(kept.get(address, ()), now)
    return None


# who meets whom
def _clashing(name, element, before, access):
    """Say who meets whom: the text of a RaceError."""
    one, two = before[0], _now.lane
    return (
        f"{name}, element {element}: thread {two.number} of block "
        f"{tuple(two.block.index)} {('reads', 'writes', 'adds to')[access]} "
        f"it, and nothing orders that after the access by thread "
        f"{one.number} of block {tuple(one.block.index)}"
    )


# the error of a race
class RaceError(RuntimeError):
    """Two threads touch one element, one writes, and nothing orders them.

    Derived in chapter A.5.
    """


# a film
class Frame(NamedTuple):
    """What one thread does at one moment, and who races with it.

    kind: READ, WRITE, ATOMIC or WAIT. function, line: where in the code,
    counted from the function's first line. array, first: its name and the
    element where the access begins; values: what is there afterwards, and
    in the elements next to it that the access spans. rival: (block, thread)
    of an access that nothing orders before this one, or None.

    Derived in chapter A.5.
    """

    moment: int
    block: int
    thread: int
    kind: int
    function: str
    line: int
    array: str = ""
    first: int = 0
    values: tuple = ()
    rival: tuple = None


class Film:
    """The `steps` of simulated kernels, for `watch(film=...)`.

    codes: the code of each function that made a step, by name. together:
    the threads of a block go on access by access, side by side, in one
    moment; otherwise each step is a moment of its own.

    Derived in chapter A.5.
    """

    def __init__(self, together=False):
        self.together, self.steps, self.codes = together, [], {}
        self._now, self._touched = None, None

    def take(self, kind, frame, array=None, address=0, nbytes=0):
        """Note a step of the thread that runs."""
        self.develop()
        lane, code = _now.lane, frame.f_code
        self.codes.setdefault(code.co_name, code)
        before, self._now = self._now, (lane.block, lane.block.round)
        moment = self.steps[-1].moment if self.steps else -1
        moment += not (self.together and before == self._now)
        block, line = _number(lane.block), frame.f_lineno
        line -= code.co_firstlineno
        step = Frame(moment, block, lane.number, kind, code.co_name, line)
        if array is not None:
            first = (address - array.start) // array.itemsize
            self._touched = array.array, first, nbytes // array.itemsize
            step = step._replace(array=array.name, first=first)
        self.steps.append(step)

    def develop(self):
        """Complete the last step: what do its elements hold now?"""
        if self._touched is not None:
            array, first, count = self._touched
            held = array.reshape(-1)[first : first + count].tolist()
            self._touched = None
            self.steps[-1] = self.steps[-1]._replace(values=tuple(held))

    def mark(self, lane):
        """Say of the last step with whose access it races."""
        rival = _number(lane.block), lane.number
        self.steps[-1] = self.steps[-1]._replace(rival=rival)


# a step of a film
def _number(block):
    """A block's place in its grid, x running fastest."""
    at, of = block.index, block.grid
    return at.x + of.x * (at.y + of.y * at.z)


def _step_aside(lane):
    """Let the other threads of the block come to their next access."""
    lane.block.ready.append(lane)
    lane.fiber.parent.switch()


def _filmed(kind, frame):
    """Take a step that touches no array, if somebody films."""
    film = _now.seen.film
    if film is not None:
        if film.together:
            _step_aside(_now.lane)
        film.take(kind, frame)


# an array under watch
class _Watched:
    """An array that checks each access and notes it; it has no slices.

    log: what was touched, by address, or None where races may pass.
    """

    def __init__(self, array, name, log, shared=False):
        self.array, self.name, self.log = array, name, log
        self.shape, self.ndim, self.size = array.shape, array.ndim, array.size
        self.dtype, self.start = array.dtype, array.ctypes.data
        self.itemsize, self.strides = array.itemsize, array.strides
        self.shared, self.flat = shared, array.flags.c_contiguous

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        _note(self, self.place(index), self.itemsize, READ)
        return self.array[index]

    def __setitem__(self, index, value):
        _note(self, self.place(index), self.itemsize, WRITE)
        self.array[index] = value

    def place(self, index):
        """The address of an element; raise where there is none."""
        if self.ndim == 1 and 0 <= index < self.size:
            return self.start + int(index) * self.strides[0]
        index = index if type(index) is tuple else (index,)
        inside = len(index) == self.ndim and all(
            0 <= i < n for i, n in zip(index, self.shape, strict=True)
        )
        if not inside:
            raise IndexError(
                f"{self.name}[{', '.join(map(str, index))}] is no element of "
                f"its shape {self.shape}"
            )
        pairs = zip(index, self.strides, strict=True)
        return self.start + sum(int(i) * stride for i, stride in pairs)

    def place4(self, i):
        """The address of four elements from i on."""
        if not 0 <= i <= self.size - 4:
            raise IndexError(
                f"{self.name}: elements {i} to {i + 3} of {self.size}"
            )
        address = self.start + int(i) * self.itemsize
        if address % 16 or not self.flat:
            raise ValueError(
                f"{self.name}: element {i} is not at a multiple of 16 bytes "
                "of an array without gaps"
            )
        return address


# note an access
def _note(array, address, nbytes, access):
    """Note an access of the lane that runs, and look for a race."""
    lane, film = _now.lane, _now.seen.film
    if film is not None and film.together:
        _step_aside(lane)
    if access != ATOMIC:
        frame, kind = sys._getframe(2), (nbytes, access, array.shared)
        key = kind, id(frame.f_code), frame.f_lasti
        site = _now.seen.sites.get(key)
        if site is None:
            site = _now.seen.add_site(key, frame.f_code)
        lane.trace.setdefault(site, []).append(address)
    if film is not None:
        film.take(access, sys._getframe(2), array, address, nbytes)
    _look(array, address, nbytes, access)


def _look(array, address, nbytes, access):
    """Look for a race with an access of the lane that runs."""
    if array.log is None:
        return
    lane, film = _now.lane, _now.seen.film
    now, step = (lane, lane.block.clock), array.log.step
    for at in range(address - address % step, address + nbytes, step):
        before = _clash(array.log, at, access, now)
        if before is not None and film is not None:
            film.mark(before[0])
        elif before is not None:
            element = (max(at, address) - array.start) // array.itemsize
            raise RaceError(_clashing(array.name, element, before, access))


# arguments under watch
def _watched(function, args, seen):
    """The arguments of a kernel, the arrays of them under watch."""
    names = function.__code__.co_varnames
    sizes = [a.itemsize for a in args if isinstance(a, np.ndarray)]
    log = _Log(min(sizes, default=1))
    return [
        _Watched(a, name, log if seen.races else None)
        if isinstance(a, np.ndarray)
        else a
        for a, name in zip(args, names, strict=False)
    ]


# requests of whole warps
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


# banks
def _passes(table, nbytes):
    """Passes that requests of warps take in shared memory.

    Its 32 banks give one word of four bytes each in a pass; a request for
    16 bytes a lane counts as four of eight lanes, 32 words each.
    """
    wide = max(nbytes // 4, 1)
    words = table.reshape(-1, WARP // wide, 1) // 4
    words = np.where(words < 0, -1, words + np.arange(wide))
    words, first = _distinct(words.reshape(-1, WARP))
    row = np.arange(len(words))[:, None]
    bank = (row * WARP + words % WARP)[first]
    counts = np.bincount(bank, minlength=len(words) * WARP)
    return int(counts.reshape(-1, WARP).max(axis=1).sum())


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
    arguments' types) of each launch, those on a real GPU too.

    Derived in chapter A.5.
    """

    def __init__(self, races=True, film=None):
        self.races, self.film, self.launches = races, film, []
        self.threads = self.reads = self.writes = 0
        self.read_bytes = self.written_bytes = 0
        self.requests = self.sectors = 0
        self.shared_requests = self.shared_passes = 0
        self.barriers = self.exchanges = self.atomics = 0
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
        traces = [lane.trace for lane in block.lanes]
        for site in dict.fromkeys(site for trace in traces for site in trace):
            nbytes, access, shared = site[0]
            table = _requests([trace.get(site, ()) for trace in traces])
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
        for trace in traces:
            trace.clear()  # the lanes live on in the log


# watch
@contextmanager
def watch(races=True, film=None):
    """Check and count what simulated kernels do; yields a Seen.

    Every element that a kernel touches must lie inside its array, and no
    two threads may touch one element, one of them writing, with nothing
    that orders them: IndexError, ValueError and RaceError tell. Several
    times slower than without. races: False lets races pass. film: a Film
    that takes every step, and marks a race instead of raising an error.

    Derived in chapter A.5.
    """
    before, _now.seen = _now.seen, Seen(races, film)
    try:
        yield _now.seen
    finally:
        _now.seen = before
        if film is not None:
            film.develop()


# note a launch
def record(launch):
    """Add to the launches of the Seen that watches, if any does.

    Derived in chapter A.5.
    """
    if _now.seen is not None:
        _now.seen.launches.append(launch)


# vectors of four
def load4(array, i):
    """Elements i to i + 3 of a flat view of `array`, in one access.

    array: float32, C-contiguous, any shape; its element i must begin at a
    multiple of 16 bytes: a shared array is made with `alignment=16`.
    Returns four numbers.

    Derived in chapter A.5.
    """
    if isinstance(array, _Watched):
        _note(array, array.place4(i), 16, READ)
        array = array.array
    flat = array if array.ndim == 1 else array.reshape(-1)
    return flat[i], flat[i + 1], flat[i + 2], flat[i + 3]


def store4(array, i, a, b, c, d):
    """Write elements i to i + 3 of a flat view of `array`, in one access.

    As `load4`, the other way.

    Derived in chapter A.5.
    """
    if isinstance(array, _Watched):
        _note(array, array.place4(i), 16, WRITE)
        array = array.array
    flat = array if array.ndim == 1 else array.reshape(-1)
    flat[i : i + 4] = a, b, c, d


def promise4(array, i):
    """Look for races as if elements i to i + 3 were written now.

    Derived in chapter A.5.
    """
    if isinstance(array, _Watched):
        _look(array, array.place4(i), 16, WRITE)
