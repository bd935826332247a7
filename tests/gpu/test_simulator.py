"""The simulated GPU: barriers, warps, races, and what it counts."""

import contextlib
import time

import numpy as np
import pytest
from processes import output

from llmnb.gpu import simulator
from llmnb.gpu.launch import empty, kernel, simulated, to_host
from llmnb.gpu.simulator import BarrierError, RaceError, cuda, simulate, watch
from llmnb.gpu.warp import block_sum, warp_sum

ALL = 0xFFFFFFFF
load4, store4 = simulator.load4, simulator.store4


def ints(*shape):
    return np.zeros(shape, np.int64)


def floats(*shape):
    return np.zeros(shape, np.float32)


def placed(*shape):
    """Zeros that begin at a multiple of 256 bytes."""
    return simulated(floats(*shape))._array


def seen_of(body, grid, block, *args):
    with watch() as seen:
        simulate(body, grid, block, args)
    return seen


def ran(body, grid, block, out, *args):
    """What a launch leaves in its first array."""
    simulate(body, grid, block, (out, *args))
    return out


def fails(kind, says, body, grid, block, *args):
    """A launch under watch that raises an error; its notes."""
    with pytest.raises(kind, match=says) as error:
        seen_of(body, grid, block, *args)
    return getattr(error.value, "__notes__", [])


def test_every_thread_knows_its_place():
    def places(out):
        x, y, z = cuda.grid(3)
        out[z, y, x] += 1 + cuda.grid(1)
        assert (x, y) == cuda.grid(2)
        assert cuda.gridsize(1) == 6
        assert cuda.gridsize(3) == (6, 2, 4)
        at, of, n = cuda.blockIdx, cuda.blockDim, cuda.threadIdx
        assert (z, y) == (at.z * of.z + n.z, at.y * of.y + n.y)
        assert cuda.gridDim == (2, 1, 2)

    out = ran(places, (2, 1, 2), (3, 2, 2), ints(4, 2, 6))
    assert (out == 1 + np.arange(6)).all()


def test_lanes_are_numbered_x_first():
    def lanes(out):
        out[cuda.threadIdx.y, cuda.threadIdx.x] = cuda.laneid

    out = ran(lanes, 1, (16, 4), ints(4, 16))
    assert (out.ravel() == np.arange(64) % 32).all()


def test_a_barrier_lets_a_block_exchange():
    def rotate(out, inp):
        tile = cuda.shared.array(48, np.float32)
        i, n = cuda.threadIdx.x, cuda.blockDim.x
        base = cuda.blockIdx.x * n
        tile[i] = inp[base + i]
        cuda.syncthreads()
        out[base + i] = tile[(i + 1) % n]

    inp, out = np.arange(144, dtype=np.float32), floats(144)
    seen = seen_of(rotate, 3, 48, out, inp)
    want = np.roll(inp.reshape(3, 48), -1, axis=1).ravel()
    assert (out == want).all()
    assert seen.barriers == seen.threads == 144


@pytest.mark.parametrize("some", [1, 31, 32, 63])
def test_a_barrier_that_some_never_reach(some):
    def torn(out):
        if cuda.threadIdx.x < some:
            cuda.syncthreads()
        out[cuda.threadIdx.x] = 1

    text = f"{some} of 64 threads wait for the block.*{64 - some} have ended"
    notes = fails(BarrierError, text, torn, 2, 64, ints(64))
    assert notes == ["in torn, block (0, 0, 0)"]
    # and the simulator is as good as new
    test_a_barrier_lets_a_block_exchange()


def test_part_of_a_warp_at_a_shuffle():
    def torn(out):
        if cuda.threadIdx.x != 5:
            out[0] = warp_sum(out[0])

    fails(BarrierError, "31 for their warp", torn, 1, 32, floats(1))


def test_two_kinds_of_barrier_at_once():
    def torn():
        if cuda.threadIdx.x < 32:
            cuda.syncthreads()
        elif cuda.threadIdx.x < 40:
            cuda.syncwarp()

    text = "32 of 64 threads wait for the block, 8 for their warp, 24 have"
    fails(BarrierError, text, torn, 1, 64)


def test_a_whole_warp_may_leave_before_shuffles():
    def early(out):
        warp = cuda.threadIdx.x // 32
        if warp == 1:
            return
        out[cuda.threadIdx.x] = warp_sum(warp + 1)

    out = ran(early, 1, 96, ints(96))
    assert (out.reshape(3, 32)[:, 0] == (32, 0, 96)).all()


SHUFFLES = {
    "one": (lambda v: cuda.shfl_sync(ALL, v, 7), lambda i: 7 + 0 * i),
    "any": (lambda v: cuda.shfl_sync(ALL, v, 3 * v + 40), lambda i: 3 * i + 8),
    "xor": (lambda v: cuda.shfl_xor_sync(ALL, v, 5), lambda i: i ^ 5),
}


@pytest.mark.parametrize("name", SHUFFLES)
def test_shuffles(name):
    shuffle, source = SHUFFLES[name]

    def run(out):
        i = cuda.threadIdx.x
        out[i] = 100 * (i // 32) + shuffle(i % 32)

    out, want = ran(run, 1, 64, ints(64)), source(np.arange(32)) % 32
    assert (out == np.concatenate([want, 100 + want])).all()


def test_votes():
    """As numba has them: an int32, whose sign is the last lane's."""

    def vote(out):
        i = cuda.threadIdx.x
        bits = cuda.ballot_sync(ALL, i % 3 == 0)
        out[i] = bits, cuda.popc(bits), cuda.popc(bits & 1023)

    out = ran(vote, 1, 64, ints(64, 3)).reshape(2, 32, 3)
    yes = (np.arange(64) % 3 == 0).reshape(2, 32)
    bits = np.packbits(yes, axis=1, bitorder="little").view("<i4")
    assert (bits[:, 0] < 0).tolist() == [False, True]
    counts = yes.sum(1, keepdims=True), yes[:, :10].sum(1, keepdims=True)
    for k, want in enumerate((bits, *counts)):
        assert (out[..., k] == want).all()


def test_lanes_that_call_different_functions_do_not_meet():
    def torn(first, second):
        first() if cuda.threadIdx.x < 16 else second()

    def vote():
        cuda.ballot_sync(ALL, True)

    for text, first, second in (
        ("lanes of a warp call shfl_xor and ballot", shuffle, vote),
        ("syncwarp and shfl_xor", cuda.syncwarp, shuffle),
    ):
        fails(BarrierError, text, torn, 1, 32, first, second)
    simulate(torn, 1, 32, (vote, vote))


NO_BLOCKS = (-1, -32), 1025, (32, 33), (1, 1, 65), 0
NO_GRIDS = 0, (1, 65536), (1, 1, 65536)


@pytest.mark.parametrize(
    "grid, block", [(1, x) for x in NO_BLOCKS] + [(x, 1) for x in NO_GRIDS]
)
def test_sizes_that_a_gpu_refuses(grid, block):
    fails(ValueError, "a block has|a grid has", lambda: None, grid, block)


def test_shared_memory_has_an_end():
    def share(n):
        for _ in range(3):
            cuda.shared.array(n, np.float32)  # one place, one array

    simulate(share, 2, 2, (12288,))
    fails(MemoryError, "49152 bytes", share, 1, 1, 12289)


def test_functions_of_a_factory_share_nothing():
    def tile(n):
        def array():
            return cuda.shared.array(n, np.float32)

        return array

    def sizes(out, one, two):
        out[0], out[1] = one().shape[0], two().shape[0]

    out = ints(2)
    simulate(sizes, 1, 1, (out, tile(3), tile(5)))
    assert (out == (3, 5)).all()


def test_a_mask_or_a_block_that_the_simulator_does_not_know():
    def half(out):
        cuda.shfl_sync(0xFFFF, 1, 0)

    text = "mask 0xFFFFFFFF alone.*0xffff"
    fails(ValueError, text, half, 1, 32, floats(1))
    fails(ValueError, "whole warps.*40 threads", cuda.syncwarp, 1, 40)


def test_sums():
    def sums(out, inp):
        i, parts = cuda.threadIdx.x, cuda.shared.array(3, np.float32)
        out[0, i] = warp_sum(inp[i])
        out[1, i] = block_sum(inp[i], parts)
        out[2, i] = block_sum(out[0, i], parts)

    rng = np.random.default_rng(0)
    inp, out = rng.integers(-99, -9, 96).astype(np.float32), floats(3, 96)
    with watch():
        simulate(sums, 1, 96, (out, inp))
    rows = inp.reshape(3, 32)
    assert (out[0].reshape(3, 32) == rows.sum(axis=1, keepdims=True)).all()
    assert (out[1] == inp.sum()).all()
    assert (out[2] == 32 * inp.sum()).all()


def test_atomics():
    def count(out, two, old):
        i = cuda.grid(1)
        old[i] = cuda.atomic.add(out, i % 3, np.float32(1))
        cuda.atomic.add(two, (0, i % 2), i)

    out, two, old = floats(3), ints(1, 2), floats(64)
    seen = seen_of(count, 2, 32, out, two, old)
    assert (out == (22, 21, 21)).all()
    assert (two == (992, 1024)).all()
    assert sorted(old[::3]) == list(range(22))
    assert seen.atomics == 128


def test_memory_is_poisoned():
    def peek(out, whole):
        out[0] = cuda.shared.array(4, np.float32)[0]
        out[1] = cuda.local.array((2, 2), np.float32)[1, 1]
        whole[0] = cuda.shared.array(4, np.int32)[0]
        mine = cuda.local.array(1, np.float32)
        mine[0] = 5  # must not reach the next thread's

    out, whole = floats(2), ints(1)
    simulate(peek, 1, 1, (out, whole))
    simulate(peek, 1, 1, (out, whole))
    assert np.isnan(out).all()
    assert whole[0] > 1e9
    assert np.isnan(to_host(empty(3, like=simulated(out)))).all()
    assert (to_host(empty(3, np.int32, like=simulated(out))) > 1e9).all()


def test_shared_memory_is_one_blocks():
    def peek(out):
        memory = cuda.shared.array(1, np.float32)
        if cuda.threadIdx.x == 0:
            out[cuda.blockIdx.x] = memory[0]
            memory[0] = 1

    out = ran(peek, 3, 2, floats(3))
    assert np.isnan(out).all()


# what must not be touched


@pytest.mark.parametrize(("index", "kind", "says"), [
    (-1, IndexError, r"inp\[-1\] is no element of its shape \(8,\)"),
    (8, IndexError, r"inp\[8\] is no element of its shape \(8,\)"),
    (7.5, IndexError, "only integers"),
    ((0, 0), TypeError, "tuple"),
    (slice(0, 2), TypeError, "slice"),
])  # fmt: skip
def test_bounds(index, kind, says):
    def read(out, inp):
        out[0] = inp[index]

    def write(out, inp):
        inp[index] = 1

    for body in (read, write):
        fails(kind, says, body, 1, 1, floats(1), floats(8))


def test_bounds_name_the_array_and_the_thread():
    def past(inp, columns):
        if columns:
            return inp[cuda.threadIdx.y, cuda.grid(1)]
        return inp[0]  # a row, and no element

    shape = r"is no element of its shape \(2, 5\)"
    text, given = rf"inp\[0, 5\] {shape}", (past, 3, (2, 2), floats(2, 5))
    note = "in past, thread (1, 0, 0) of block (2, 0, 0)"
    assert fails(IndexError, text, *given, True) == [note]
    fails(IndexError, rf"inp\[0\] {shape}", *given, False)


def test_a_vector_must_be_aligned_and_inside():
    def move(out, inp, i):
        a, b, c, d = load4(inp, i)
        store4(out, 0, a, b, c, d)

    inp, out, badly = placed(4, 6), placed(4), "multiple of 16 bytes"
    inp.flat = np.arange(24)
    seen = seen_of(move, 1, 1, out, inp, 20)
    assert (out == (20, 21, 22, 23)).all()
    assert (seen.reads, seen.read_bytes) == (1, 16)
    assert (seen.writes, seen.written_bytes) == (1, 16)
    for i in (24, -4, 21, 23):
        fails(IndexError, "inp: elements", move, 1, 1, out, inp, i)
    for i in (1, 2, 18):
        fails(ValueError, badly, move, 1, 1, out, inp, i)
    off = out.base[4:].view(np.float32)[:4]
    fails(ValueError, "out: element 0 is not", move, 1, 1, off, inp, 0)
    fails(ValueError, "without gaps", load4, 1, 1, placed(8, 8)[:, :4], 0)

    def shared(alignment):
        tile = cuda.shared.array(8, np.float32, alignment=alignment)
        store4(tile, 4, 1, 2, 3, 4)

    seen_of(shared, 1, 1, 16)
    fails(ValueError, badly, shared, 1, 1, None)


# races


def races(body, grid, block, *args):
    """Whether watch sees a race; it must let it pass when asked to."""
    with watch(races=False):
        simulate(body, grid, block, args)
    try:
        with watch():
            simulate(body, grid, block, args)
    except RaceError:
        return True
    return False


@pytest.mark.parametrize("block", [2, 64])
@pytest.mark.parametrize("grid", [1, 3])
def test_writes_of_one_element(grid, block):
    def same(out):
        out[0] = 1

    def own(out):
        out[cuda.grid(1)] = 1

    def reads(out):
        out[cuda.grid(1) + 1] = out[0]

    assert races(same, grid, block, floats(999))
    assert not races(own, grid, block, floats(999))
    assert not races(reads, grid, block, floats(999))


def neighbours(order, far=1):
    """Each thread writes its place, and reads another's after `order`."""

    def body(out):
        tile = cuda.shared.array(64, np.float32)
        i = cuda.threadIdx.x
        tile[i] = i
        order()
        out[i] = tile[i ^ far]

    return body


def nothing():
    pass


def shuffle():
    cuda.shfl_xor_sync(ALL, 1, 1)


@pytest.mark.parametrize(
    "order, far, race",
    [
        (nothing, 1, True),
        (nothing, 32, True),
        (cuda.syncthreads, 1, False),
        (cuda.syncthreads, 32, False),
        (cuda.syncwarp, 1, False),
        (cuda.syncwarp, 32, True),
        # a shuffle exchanges registers; it orders nothing in memory
        (shuffle, 1, True),
    ],
)
def test_what_orders_a_read_after_a_write(order, far, race):
    assert races(neighbours(order, far), 1, 64, floats(64)) is race


def test_a_write_after_a_read():
    def turn(out, wait, atomic):
        i = cuda.threadIdx.x
        value = out[i ^ 63]
        if wait:
            cuda.syncthreads()
        if atomic:
            cuda.atomic.add(out, i, 1)
        else:
            out[i] = value

    for atomic in (False, True):
        assert races(turn, 1, 64, floats(64), False, atomic)
        assert not races(turn, 1, 64, floats(64), True, atomic)


def test_blocks_are_never_ordered():
    def later(out):
        if cuda.grid(1) == 0:
            out[0] = 1
        cuda.syncthreads()
        if cuda.grid(1) == 64:
            out[1] = out[0]

    assert races(later, 3, 32, floats(2))
    assert not races(later, 2, 32, floats(2))

    def read_first(out):
        if cuda.blockIdx.x < 2:
            out[1 + cuda.blockIdx.x] = out[0]
        else:
            out[0] = 1

    assert races(read_first, 3, 1, floats(3))


def test_atomics_race_with_all_but_atomics():
    def body(out, read, write):
        i = cuda.threadIdx.x
        cuda.atomic.add(out, 0, 1)
        if i == read:
            out[1] = out[0]
        if i == write:
            out[0] = 7

    assert not races(body, 2, 32, floats(2), -1, -1)
    assert races(body, 1, 32, floats(2), 31, -1)
    assert races(body, 1, 32, floats(2), 0, -1)
    assert races(body, 1, 32, floats(2), -1, 31)
    assert races(body, 1, 64, floats(2), -1, 0)
    assert not races(body, 1, 1, floats(2), 0, 0)


def test_arrays_that_share_memory_race():
    def copy(out, inp):
        out[cuda.threadIdx.x] = inp[cuda.threadIdx.x]

    memory = floats(9)
    assert races(copy, 1, 8, memory[1:], memory[:-1])
    assert not races(copy, 1, 8, memory[1:], memory[1:])


@pytest.mark.parametrize("small", [np.int8, np.int16, np.float64])
def test_views_with_elements_of_other_sizes_race(small):
    """Thread 0 writes a float; thread 1 reads some bytes of it, or not."""

    def body(out, same, i):
        if cuda.threadIdx.x == 0:
            out[1] = 1
        else:
            same[i]

    out = floats(4)
    same = out.view(small)
    for i in range(len(same)):
        n = same.itemsize
        overlap = i * n < 8 and (i + 1) * n > 4
        assert races(body, 1, 2, out, same, i) is overlap, i
        assert races(body, 1, 2, same, out, 0) is (n * 1 < 4), i


def test_a_vector_races_element_by_element():
    def body(out):
        i = cuda.threadIdx.x
        if i == 0:
            store4(out, 4, 1, 1, 1, 1)
        if i == 1:
            out[7] = 2
        if i == 2:
            out[8] = 2

    out = placed(12)
    text = "out, element 7: thread 1 of .* writes it.*by thread 0 of block"
    fails(RaceError, text, body, 1, 32, out)
    assert not races(body, 1, 1, out)


# counts


@pytest.mark.parametrize(
    "stride, first, sectors",
    [(0, 0, 1), (1, 0, 4), (2, 0, 8), (8, 0, 32), (32, 0, 32)]
    + [(1, 1, 5), (1, 7, 5), (1, 8, 4)],
)
def test_sectors(stride, first, sectors):
    def read(inp):
        inp[first + cuda.threadIdx.x * stride]

    seen = seen_of(read, 1, 32, placed(1024))
    assert (seen.requests, seen.sectors) == (1, sectors)
    assert (seen.reads, seen.read_bytes) == (32, 128)


def test_requests_of_loops_and_of_parts_of_warps():
    def loop(inp, n):
        for i in range(cuda.threadIdx.x, n, 32):
            inp[i]

    inp = placed(128)
    seen = seen_of(loop, 1, 32, inp, 100)
    assert (seen.requests, seen.sectors, seen.reads) == (4, 13, 100)
    # five threads of the second warp, and nobody of the third
    seen = seen_of(loop, 1, 96, inp, 37)
    assert seen.requests == 2 + 1  # the third warp asks for nothing


def test_requests_are_of_one_place_in_the_code():
    def two(inp):
        if cuda.threadIdx.x < 16:
            inp[cuda.threadIdx.x]
        else:
            inp[cuda.threadIdx.x]

    assert seen_of(two, 1, 32, placed(32)).requests == 2


@pytest.mark.parametrize(
    "stride, passes", [(0, 1), (1, 1), (2, 2), (4, 4), (32, 32), (33, 1)]
)
def test_banks(stride, passes):
    def write(out):
        tile = cuda.shared.array(33 * 32, np.float32)
        tile[cuda.threadIdx.x] = 1
        cuda.syncthreads()
        tile[(cuda.threadIdx.x * stride) % 1056]

    seen = seen_of(write, 1, 32, floats(1))
    assert (seen.shared_requests, seen.shared_passes) == (2, 1 + passes)
    assert seen.requests == 0


def test_launches_are_recorded():
    @kernel
    def fill(out, n, value):
        if cuda.grid(1) < n:
            out[cuda.grid(1)] = value

    out = simulated(floats(5))
    with watch() as seen:
        fill[2, 4](out, 5, np.float32(3))
        fill[1, 32](out, 5, np.float32(4))
    assert (to_host(out) == 4).all()
    kinds = (("float32", 1), ("int64", 0), ("float32", 0))
    assert seen.launches == [(fill, 2, 4, kinds), (fill, 1, 32, kinds)]
    assert seen.threads == 40


def test_watches_nest_and_end():
    def fill(out):
        out[cuda.grid(1)] = 1

    with watch() as outer:
        simulate(fill, 1, 8, (floats(8),))
        with watch() as inner:
            simulate(fill, 1, 4, (floats(8),))
        simulate(fill, 1, 2, (floats(8),))
    simulate(fill, 1, 1, (floats(8),))
    assert (outer.threads, inner.threads) == (10, 4)


def test_a_launch_within_a_kernel_is_refused():
    def outside(out):
        simulate(outside, 1, 4, (out,))

    fails(RuntimeError, "cannot launch a kernel", outside, 2, 2, ints(4))
    test_a_barrier_lets_a_block_exchange()


def test_an_error_names_thread_and_block():
    def seventy(out):
        cuda.syncthreads()
        if cuda.grid(1) == 70:
            raise ZeroDivisionError("70")

    note = "in seventy, thread (6, 0, 0) of block (2, 0, 0)"
    found = fails(ZeroDivisionError, "70", seventy, 3, 32, floats(1))
    assert found == [note]
    test_a_barrier_lets_a_block_exchange()


def fibers():
    """How many fibers there are that have not ended."""
    import gc

    from greenlet import greenlet

    gc.collect()
    return sum(
        issubclass(type(x), greenlet) and not x.dead  # not of a proxy
        for x in gc.get_objects()
    )


@pytest.mark.parametrize("fails", [False, True])
def test_fibers_end_with_their_launch(fails):
    def meet():
        if fails and cuda.threadIdx.x == 40:
            raise ZeroDivisionError
        cuda.syncthreads()

    def many():
        for _ in range(5):
            with contextlib.suppress(ZeroDivisionError):
                simulate(meet, 3, 64, ())

    many()
    before = fibers()
    many()
    assert fibers() <= before


def test_two_threads_of_python_at_the_same_time():
    """Each sees its own places, and the races of its own launches."""
    import threading

    both, results = threading.Barrier(2), {}

    def places(out):
        for _ in range(20):
            cuda.syncthreads()
            i = cuda.grid(1)
            time.sleep(0)  # let the other go on
            out[i] += cuda.blockDim.x

    def run(threads):
        out = ints(2 * threads)
        both.wait()
        with watch() as seen:
            for _ in range(4):
                simulate(places, 2, threads, (out,))
        results[threads] = out, seen

    pair = [threading.Thread(target=run, args=(n,)) for n in (32, 48)]
    for thread in pair:
        thread.start()
    for thread in pair:
        thread.join()
    for threads, (out, seen) in results.items():
        assert (out == 80 * threads).all()
        assert (seen.threads, seen.reads) == (8 * threads, 160 * threads)
    assert len(results) == 2


def test_other_threads_of_python_have_fibers_of_their_own():
    code = (
        "import threading; from llmnb.gpu.simulator import cuda, simulate\n"
        "def meet(out):\n    cuda.syncthreads(); out[cuda.grid(1)] = 1\n"
        "import numpy as np; out = np.zeros(64)\n"
        "def run(): simulate(meet, 2, 32, (out,))\n"
        "for _ in range(3):\n"
        "    t = threading.Thread(target=run); t.start(); t.join(); run()\n"
        "print(out.sum())"
    )
    assert output(code) == "64.0"
