"""GELU: both backends, gradients, accuracy and threads."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import assert_threads_change_no_bit

from llmnb.book.verify import numerical_gradient
from llmnb.cpu import gelu as cpu
from llmnb.reference import gelu as reference

quick = settings(max_examples=25, deadline=None, derandomize=True)


def results(backend, x, dout):
    out, dinp = np.empty_like(x), np.zeros_like(x)
    backend.gelu_forward(out, x)
    backend.gelu_backward(dinp, dout, x)
    return out, dinp


@quick
@given(
    shape=st.lists(st.integers(1, 17), min_size=1, max_size=3),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_cpu_equals_reference(shape, scale, dtype):
    rng = np.random.default_rng(0)
    x = rng.normal(scale=scale, size=shape).astype(dtype)
    dout = rng.normal(size=shape).astype(dtype)
    exact = results(reference, x.astype(np.float64), dout.astype(np.float64))
    tolerance = 1e-6 if dtype == np.float32 else 1e-12
    for got, want in zip(results(cpu, x, dout), exact, strict=True):
        assert got.dtype == dtype and got.shape == tuple(shape)
        limit = tolerance * (1 + np.abs(want) + np.abs(dout))
        assert (np.abs(got - want) < limit).all()


@pytest.mark.parametrize("backend", [cpu, reference])
def test_gradient(backend):
    rng = np.random.default_rng(1)
    x, g = rng.normal(scale=2, size=(2, 3, 4, 5))
    x[0, 0, 0] = 0
    out = np.empty_like(x)

    def loss():
        backend.gelu_forward(out, x)
        return (g * out).sum()

    want = numerical_gradient(loss, x)
    np.testing.assert_allclose(results(backend, x, g)[1], want, atol=1e-8)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("backend", [cpu, reference])
def test_backward_adds_or_overwrites(backend, dtype):
    """add=False gives what adding to zeros gives, whatever was there."""
    x, dout = np.random.default_rng(3).normal(size=(2, 5, 1001)).astype(dtype)
    _, want = results(backend, x, dout)
    dinp = np.full_like(x, 8)
    backend.gelu_backward(dinp, dout, x)
    np.testing.assert_allclose(dinp, 8 + want, rtol=1e-6)
    for old in (7, np.nan, np.inf):
        dinp = np.full_like(x, old)
        backend.gelu_backward(dinp, dout, x, add=False)
        np.testing.assert_array_equal(dinp, want)


def test_accuracy_in_float32():
    """Against float64 over a dense grid, and far outside it."""
    x = np.linspace(-30, 30, 400_001, dtype=np.float32)
    ones = np.ones_like(x)
    got = results(cpu, x, ones)
    want = results(reference, *(a.astype(np.float64) for a in (x, ones)))
    scale = np.maximum(1, np.abs(want[0]))
    assert (np.abs(got[0] - want[0]) / scale).max() < 5e-7
    assert np.abs(got[1] - want[1]).max() < 1e-6
    far = np.array([-1e6, -1e3, -100, 100, 1e3, 1e6], np.float32)
    out, slope = results(cpu, far, np.ones_like(far))
    np.testing.assert_array_equal(out, np.maximum(far, 0))
    np.testing.assert_array_equal(slope, far > 0)


def test_small_outputs_keep_their_digits():
    """Left of -3, where 1 + tanh(u) would cancel."""
    x = np.linspace(-5, -3, 1001, dtype=np.float32)
    out, _ = results(cpu, x, x)
    wide = x.astype(np.float64)
    u = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    want = wide / (1 + np.exp(-2 * u))
    np.testing.assert_allclose(out, want, rtol=5e-6)


@pytest.mark.parametrize("n", [1, 7, 4096, 4097, 50_001])
def test_threads_change_no_bit(n):
    rng = np.random.default_rng(2)
    x, dout = rng.normal(scale=3, size=(2, n)).astype(np.float32)
    assert_threads_change_no_bit(lambda: results(cpu, x, dout))


def test_an_element_gets_the_same_bits_wherever_it_stands():
    """In a vector, in the rest after the vectors, or alone."""
    x, dout = np.random.default_rng(4).normal(size=(2, 200)).astype("f4")
    whole = results(cpu, x, dout)
    for n in range(1, 70):
        for part, want in zip(results(cpu, x[:n], dout[:n]), whole, strict=1):
            np.testing.assert_array_equal(part, want[:n])
