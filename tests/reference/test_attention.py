"""Attention, with a window and a soft cap too: values and memory."""

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import (
    NAMED,
    RULE,
    arguments,
    assert_near,
    copied,
    draw,
    passed,
    results,
)
from numba.core.runtime import _nrt_python, rtsys

from llmnb import cpu, reference
from llmnb.cpu.panels import work_shape

LAYER = NAMED["attention"]


def by_definition(inp, NH, NKV, hs, window=None, scale=None, softcap=None):
    """Output and log-sum-exp by plain loops over (1.8.1) to (1.8.4)."""
    B, T, _ = inp.shape
    x = inp.reshape(B, T, NH + 2 * NKV, hs)
    out, lse = np.zeros((B, T, NH, hs)), np.zeros((B, NH, T))
    for b, h, t in np.ndindex(B, NH, T):
        k = NH + h // (NH // NKV)
        past = x[b, max(0, t + 1 - (window or T)) : t + 1]
        scores = past[:, k] @ x[b, t, h] * (scale or hs**-0.5)
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        e = np.exp(scores)
        lse[b, h, t] = np.log(sum(e))
        out[b, t, h] = e / sum(e) @ past[:, k + NKV]
    return {"out": out.reshape(B, T, NH * hs), "lse": lse}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from(((1, 1), (1, 2), (2, 2), (3, 1))),
    st.fixed_dictionaries(RULE) | st.just({}),
    st.integers(1, 12),
)
def test_forward_by_definition(heads, rule, T):
    name = "local_attention" if rule else "attention"
    p, (group, NKV) = draw(name, 2, T, *heads, 5, **rule), heads
    want = by_definition(p["inp"], group * NKV, NKV, 5, **rule)
    for backend in (reference, cpu):
        layer = NAMED[name]
        got = passed(layer, backend, p, layer.ways[:1])
        assert_near({k: got[k] for k in want}, want, 1e-13)


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
    enabled = _nrt_python.memsys_stats_enabled()
    _nrt_python.memsys_enable_stats()
    try:
        before = rtsys.get_allocation_stats().alloc
        function(*args)
        return rtsys.get_allocation_stats().alloc - before
    finally:
        if not enabled:
            _nrt_python.memsys_disable_stats()


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
