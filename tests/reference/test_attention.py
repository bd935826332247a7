"""Attention: both backends, forward and backward."""

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core.runtime import _nrt_python, rtsys
from problems import (
    TOLERANCE,
    assert_threads_change_no_bit,
    problem,
    run,
)

from llmnb.book.verify import numerical_gradient
from llmnb.cpu import attention as cpu
from llmnb.cpu.panels import work_shape
from llmnb.reference import attention as reference

DRAWN = settings(max_examples=25, deadline=None, derandomize=True)


def assert_close(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        scale = max(1, np.abs(b).max(initial=0))
        assert np.abs(a - b).max(initial=0) / scale < tolerance


def grouped(B, T, heads, dtype=np.float64):
    """inp and dout of (NH, NKV, hs) heads."""
    NH, NKV, hs = heads
    rng = np.random.default_rng(1)
    inp = rng.normal(size=(B, T, (NH + 2 * NKV) * hs)).astype(dtype)
    return inp, rng.normal(size=(B, T, NH * hs)).astype(dtype)


def by_definition(inp, NH, NKV, hs):
    """Output and log-sum-exp by plain loops over (1.8.1) to (1.8.4)."""
    B, T, _ = inp.shape
    heads = inp.reshape(B, T, NH + 2 * NKV, hs)
    out, lse = np.zeros((B, T, NH, hs)), np.zeros((B, NH, T))
    for b, h, t in np.ndindex(B, NH, T):
        k = NH + h // (NH // NKV)
        q, past = heads[b, t, h], heads[b, : t + 1]
        e = np.exp(past[:, k] @ q / np.sqrt(hs))
        lse[b, h, t] = np.log(sum(e))
        out[b, t, h] = e / sum(e) @ past[:, k + NKV]
    return out.reshape(B, T, NH * hs), lse


GROUPS = pytest.mark.parametrize("heads", ((3, 3, 5), (4, 2, 5), (3, 1, 4)))


@GROUPS
@pytest.mark.parametrize("layer", (reference, cpu))
def test_forward_by_definition(layer, heads):
    inp, dout = grouped(2, 7, heads)
    out, lse, _ = run(layer, inp, dout, heads[0])
    assert_close((out, lse), by_definition(inp, *heads), 1e-13)


@GROUPS
def test_heads_that_share_keys(heads):
    """Over several blocks; the reference's gradient by differences."""
    inp, dout = grouped(2, 130, heads)
    want = run(reference, inp, dout, heads[0])
    assert_close(run(cpu, inp, dout, heads[0]), want, 1e-13)
    inp, dout = grouped(1, 4, heads)
    out, lse = np.empty_like(dout), np.empty((1, heads[0], 4))

    def loss():
        reference.attention_forward(out, lse, inp)
        return (dout * out).sum()

    want = 1 + numerical_gradient(loss, inp)
    assert_close(run(reference, inp, dout, heads[0])[2:], [want], 1e-8)


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
@DRAWN
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 150),
    NH=st.integers(1, 4),
    hs=st.integers(1, 40),
)
def test_cpu_against_reference(dtype, B, T, NH, hs):
    inp, dout = problem(B, T, NH, hs, dtype)
    want = run(reference, inp.astype(np.float64), dout.astype(np.float64), NH)
    assert_close(run(cpu, inp, dout, NH), want, TOLERANCE[dtype])


@pytest.mark.parametrize("shape", ((1, 97, 2, 5), (2, 200, 1, 140)))
def test_backward_overwrites(shape):
    """Also with scratch memory of one's own, and heads of many channels."""
    inp, dout = problem(*shape, np.float32)
    work = np.full(work_shape(), np.nan, np.float32)
    out, lse, added = run(cpu, inp, dout, shape[2], work=work)
    got = np.full_like(inp, np.nan)
    cpu.attention_backward(got, dout, inp, out, lse, add=False, work=work)
    assert_close([got], [added - 1], 2e-6)
    double = inp.astype(np.float64), dout.astype(np.float64)
    want = run(reference, *double, shape[2])[2] - 1
    assert_close([got], [want], 2e-6)


@pytest.mark.parametrize("T", (31, 32, 33, 63, 64, 65, 128, 129, 257))
def test_around_the_size_of_a_tile(T):
    inp, dout = problem(1, T, 1, 9, np.float64)
    want = run(reference, inp, dout, 1)
    assert_close(run(cpu, inp, dout, 1), want, 1e-13)


@pytest.mark.parametrize("layer", (reference, cpu))
@pytest.mark.parametrize("shape", ((1, 1, 1, 1), (2, 5, 3, 4), (1, 9, 2, 3)))
def test_gradient(layer, shape):
    B, T, NH, hs = shape
    inp, dout = problem(*shape, np.float64)
    out, lse = np.empty_like(dout), np.empty((B, NH, T))

    def loss():
        layer.attention_forward(out, lse, inp)
        return (dout * out).sum()

    want = 1 + numerical_gradient(loss, inp)
    assert_close(run(layer, inp, dout, NH)[2:], [want], 1e-8)


def test_scores_that_grow_along_the_row_and_large_scores():
    inp, dout = problem(1, 200, 2, 8, np.float32)
    inp[..., :16] = 20
    inp[..., 16:32] = np.linspace(-50, 50, 200)[:, None]
    want = run(reference, inp.astype(np.float64), dout.astype(np.float64), 2)
    got = run(cpu, inp, dout, 2)
    assert all(np.isfinite(a).all() for a in got)
    # scores of thousands carry float32's rounding into the exponent
    assert_close(got, want, 2e-3)


@pytest.mark.parametrize("shape", ((1, 37, 1, 17), (2, 130, 3, 16)))
def test_threads_change_no_bit(shape):
    inp, dout = problem(*shape, np.float32)
    assert_threads_change_no_bit(lambda: run(cpu, inp, dout, shape[2]))


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
    inp, dout = problem(1, 130, 2, 8, np.float32)
    out, lse, dinp = run(cpu, inp, dout, 2)
    assert count_allocations(one_allocation) == 1
    # numba makes one handle for each array that Python hands it, and the
    # scratch memory is handed over twice
    work = np.empty(work_shape(), np.float32)
    backward = dinp, dout, inp, out, lse
    handles = count_allocations(no_allocation, *backward) + 2
    full = [*backward, True, work]
    assert count_allocations(cpu.attention_backward, *full) == handles
    full = out, lse, inp, work
    assert count_allocations(cpu.attention_forward, *full) == handles - 2


def test_bf16_wants_float32():
    inp, dout = problem(2, 5, 3, 4, np.float64)
    out, lse, dinp = run(cpu, inp, dout, 3)
    wanted = "bf16 wants float32 arrays, got float64"
    with pytest.raises(TypeError, match=f"attention_forward: {wanted}"):
        cpu.attention_forward(out, lse, inp, bf16=True)
    with pytest.raises(TypeError, match=f"attention_backward: {wanted}"):
        cpu.attention_backward(dinp, dout, inp, out, lse, bf16=True)


def test_a_head_too_wide_for_the_scratch_memory():
    hs = 10_000
    inp, out = (np.zeros((1, 1, n * hs), np.float32) for n in (3, 1))
    lse = np.zeros((1, 1, 1), np.float32)
    with pytest.raises(ValueError, match="10000 channels is too wide"):
        cpu.attention_forward(out, lse, inp)
