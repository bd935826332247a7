"""The residual connection: kernels against NumPy, gradients, threads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import assert_threads_change_no_bit

from llmnb.book.verify import numerical_gradient
from llmnb.cpu import residual as cpu
from llmnb.reference import residual as reference

drawn = settings(max_examples=25, deadline=None, derandomize=True)
shapes = st.lists(st.integers(1, 13), min_size=1, max_size=4).map(tuple)
dtypes = st.sampled_from([np.float32, np.float64])


def three(shape, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return list(rng.normal(size=(3, *shape)).astype(dtype))


@drawn
@given(shapes, dtypes, st.integers(0, 99))
def test_cpu_equals_reference(shape, dtype, seed):
    a, b, d = three(shape, dtype, seed)
    results = []
    for backend in (cpu, reference):
        out, da, db = np.full_like(a, np.nan), a.copy(), b.copy()
        backend.residual_forward(out, a, b)
        backend.residual_backward(da, db, d)
        results.append((out, da, db))
    for got, want in zip(*results, strict=True):
        assert got.dtype == dtype
        assert np.array_equal(got, want)


@pytest.mark.parametrize("backend", [cpu, reference])
def test_gradients(backend):
    a, b, g = three((2, 3, 5), np.float64)
    out = np.empty_like(a)

    def loss():
        backend.residual_forward(out, a, b)
        return (g * out**2).sum()

    loss()
    da, db = np.zeros_like(a), np.zeros_like(b)
    backend.residual_backward(da, db, 2 * g * out)
    assert np.abs(da - numerical_gradient(loss, a)).max() < 1e-8
    assert np.abs(db - numerical_gradient(loss, b)).max() < 1e-8


@pytest.mark.parametrize("backend", [cpu, reference])
@pytest.mark.parametrize("n", [1, 7, 5000])
def test_in_place_and_one_array_twice(backend, n):
    a, b, _ = three((n,))
    want = a + b
    backend.residual_forward(a, a, b)
    assert np.array_equal(a, want)
    backend.residual_forward(b, a, a)
    assert np.array_equal(b, 2 * a)


def test_threads_change_no_bit():
    a, b, d = three((3, 37, 331))

    def work():
        out, da, db = np.empty_like(a), a.copy(), b.copy()
        cpu.residual_forward(out, a, b)
        cpu.residual_backward(da, db, d)
        return out, da, db

    assert_threads_change_no_bit(work)


def test_neighbours_in_one_block_do_not_overlap():
    parts = np.zeros((3, 12), np.float32)
    cpu.residual_backward(*parts)
