"""Fragments of tensor cores, against the tables of NVIDIA's manual of PTX.

"Matrix fragments for mma.m16n8k16 with floating point type" gives for each
lane, and each of its elements in order, a row and a column; "ldmatrix" which
lane names which row and gets which elements. Both are stated here as the
manual does, and nothing is taken from llmnb's own tables.
"""

import numpy as np
import pytest

from llmnb.gpu import fragments
from llmnb.gpu.simulator import BarrierError, RaceError, cuda, simulate, watch
from llmnb.reference.bfloat16 import from_bfloat16, to_bfloat16

ZERO = np.float32(0)


def place_of_a(lane, i):
    """Row and column of element a<i>, i from 0 to 7."""
    group, place = lane >> 2, lane % 4
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    return row, place * 2 + (i & 1) + (0 if i < 4 else 8)


def place_of_b(lane, i):
    """Row and column of element b<i>, i from 0 to 3."""
    group, place = lane >> 2, lane % 4
    return place * 2 + (i & 1) + (0 if i < 2 else 8), group


def place_of_c(lane, i):
    """Row and column of element c<i>, i from 0 to 3."""
    group, place = lane >> 2, lane % 4
    return (group if i < 2 else group + 8), place * 2 + (i & 1)


def as_pairs(halves):
    return np.array(halves, np.uint16).view(np.int32)


def half(rng, *shape):
    return to_bfloat16(rng.normal(size=shape).astype(np.float32))


def test_a_product_of_fragments_laid_out_as_the_manual_says():
    rng = np.random.default_rng(0)
    a, b = half(rng, 16, 16), half(rng, 16, 8)
    c, d = rng.normal(size=(16, 8)).astype(np.float32), np.zeros((16, 8))

    def multiply():
        lane = cuda.laneid
        first = as_pairs([a[place_of_a(lane, i)] for i in range(8)])
        second = as_pairs([b[place_of_b(lane, i)] for i in range(4)])
        sums = [c[place_of_c(lane, i)] for i in range(4)]
        found = fragments.mma(*sums, *first, *second)
        for i in range(4):
            d[place_of_c(lane, i)] = found[i]

    simulate(multiply, 1, 32, ())
    wide = from_bfloat16(a).astype(float) @ from_bfloat16(b) + c
    np.testing.assert_allclose(d, wide, rtol=0, atol=1e-6)


def test_each_element_has_one_owner():
    for place, count, size in (
        (place_of_a, 8, 256), (place_of_b, 4, 128), (place_of_c, 4, 128)
    ):  # fmt: skip
        places = [place(lane, i) for lane in range(32) for i in range(count)]
        assert len(set(places)) == len(places) == size


@pytest.mark.parametrize("turned", (False, True))
def test_ldmatrix_deals_rows_as_the_manual_says(turned):
    """Matrix m from the rows that lanes 8 m to 8 m + 7 name."""
    rng = np.random.default_rng(1)
    halves = rng.integers(0, 1 << 16, (32, 8)).astype(np.uint16)
    order = rng.permutation(32)  # where the row of each lane lies
    got = np.zeros((32, 4), np.int32)

    def load(source, out):
        tile = cuda.shared.array(128, np.int32, alignment=16)
        lane = cuda.laneid
        for i in range(4):
            tile[4 * order[lane] + i] = source[lane, i]
        cuda.syncwarp()
        what = fragments.ldmatrix_trans if turned else fragments.ldmatrix
        row = what(tile, 4 * order[lane])
        for m in range(4):
            out[lane, m] = row[m]

    with watch():
        simulate(load, 1, 32, (halves.view(np.int32), got))
    for lane in range(32):
        for m in range(4):
            matrix = halves[8 * m : 8 * m + 8]
            matrix = matrix.T if turned else matrix
            row, place = lane // 4, lane % 4 * 2
            want = as_pairs(matrix[row, place : place + 2])[0]
            assert got[lane, m] == want


@pytest.mark.parametrize(
    "low", (1.0, -1.00390625, 1.01171875, 3.4e38, np.nan, 1e-41, -0.0)
)
def test_pack_rounds_as_numpy_does(low):
    """Ties to even, too large to infinity, NaN stays; the first is low."""
    low, high = np.float32(low), np.float32(-7.25)
    pair = fragments.pack(low, high)
    bits = np.array([pair], np.int32).view(np.uint16)
    want = from_bfloat16(to_bfloat16(np.array([low, high])))
    np.testing.assert_array_equal(from_bfloat16(bits), want)
    np.testing.assert_array_equal(fragments.unpack(pair), want)


def copy_kernel(wait, barrier):
    def copy(out, source):
        tile = cuda.shared.array(128, np.int32, alignment=16)
        t = cuda.threadIdx.x
        for turn in range(2):
            size = 16 if t < 31 else 0
            fragments.cp_async(tile, 4 * t, source, 4 * t + 128 * turn, size)
            fragments.cp_async_commit()
            if wait == "before":
                fragments.cp_async_wait()
            cuda.syncthreads()
            out[turn, t] = tile[4 * (31 - t)]
            if wait == "after":
                fragments.cp_async_wait()
            if barrier:
                cuda.syncthreads()

    return copy


def copied(wait, barrier=True):
    source = np.arange(256, dtype=np.int32)
    out = np.zeros((2, 32), np.int32)
    with watch():
        simulate(copy_kernel(wait, barrier), 1, 32, (out, source))
    return out


def test_a_copy_that_is_waited_for_arrives_with_zeros_where_none_is():
    out = copied("before")
    want = 4 * np.arange(31, -1, -1)
    np.testing.assert_array_equal(out[0, 1:], want[1:])
    np.testing.assert_array_equal(out[1, 1:], want[1:] + 128)
    assert (out[:, 0] == 0).all()


def test_a_copy_that_nobody_waits_for_does_not_arrive():
    out = copied(None)
    assert np.isnan(from_bfloat16(out.view(np.uint16))).all()


@pytest.mark.parametrize("wait", ("before", "after"))
def test_a_copy_races_with_who_reads_its_place(wait):
    """The next copy is asked for, or this one lands, while others read."""
    with pytest.raises(RaceError, match="nothing orders that"):
        copied(wait, barrier=False)


def test_lanes_that_call_different_instructions_never_meet():
    def torn(out):
        tile = cuda.shared.array(128, np.int32, alignment=16)
        tile[4 * cuda.laneid] = 0
        cuda.syncwarp()
        if cuda.laneid < 16:
            fragments.ldmatrix(tile, 4 * cuda.laneid)
        else:
            fragments.mma(*[ZERO] * 4, *[0] * 6)

    with pytest.raises(BarrierError):
        simulate(torn, 1, 32, (np.zeros(1),))
