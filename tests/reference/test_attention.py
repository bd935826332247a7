"""Attention: large scores, and memory.

That its numbers are those of others, tests/model shows: test_parity.py, and
test_families.py with windows, soft caps and shared keys.
"""

import numba
import numpy as np
import pytest
from layers import NAMED, arguments, assert_near, copied, draw, passed, results
from numba.core.runtime import _nrt_python, rtsys

from llmnb import cpu, reference
from llmnb.cpu.panels import work_shape

LAYER = NAMED["attention"]


def test_scores_that_grow_along_the_row_and_large_scores():
    p = draw("attention", 1, 200, 1, 2, 8, dtype=np.float32)
    p["inp"][..., :16] = 20
    p["inp"][..., 16:32] = np.linspace(-50, 50, 200)[:, None]
    want = results(LAYER, passed(LAYER, reference, copied(p, np.float64)))
    got = results(LAYER, passed(LAYER, cpu, p))
    assert all(np.isfinite(x).all() for x in got.values())
    # scores of thousands carry float32's rounding into the exponent
    assert_near(got, want, 2e-3)


@numba.njit
def one_allocation():
    return np.zeros(3)


@numba.njit
def no_allocation(a, b, c, d, e):
    return a.size + b.size + c.size + d.size + e.size


def count_allocations(function, *args):
    """How often a compiled function asks numba's runtime for memory."""
    function(*args)
    _nrt_python.memsys_enable_stats()
    before = rtsys.get_allocation_stats().alloc
    function(*args)
    return rtsys.get_allocation_stats().alloc - before


def test_kernels_allocate_nothing():
    p = draw("attention", 1, 130, 1, 2, 8, dtype=np.float32)
    p = passed(LAYER, cpu, p)
    forward, backward = ([*arguments(way, p).values()] for way in LAYER.ways)
    assert count_allocations(one_allocation) == 1
    # numba makes one handle for each array that Python hands it, and the
    # scratch memory is handed over twice
    work = np.empty(work_shape(), np.float32)
    handles = count_allocations(no_allocation, *backward[:5]) + 2
    full = *backward, work
    assert count_allocations(cpu.attention_backward, *full) == handles
    full = *forward, work
    assert count_allocations(cpu.attention_forward, *full) == handles - 2


def test_a_head_too_wide_for_the_scratch_memory():
    hs = 10_000
    inp, out = (np.zeros((1, 1, n * hs), np.float32) for n in (3, 1))
    lse = np.zeros((1, 1, 1), np.float32)
    with pytest.raises(ValueError, match="10000 channels is too wide"):
        cpu.attention_forward(out, lse, inp)
