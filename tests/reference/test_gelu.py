"""GELU: both backends, gradients, accuracy, threads, bad input."""

import math

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
def test_values(backend):
    """The tanh form at a few points, computed here with math.tanh."""
    x = np.array([-3.0, -1.0, 0.0, 0.5, 2.0])
    out, _ = results(backend, x, x)
    for value, y in zip(x, out, strict=True):
        u = math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)
        assert y == pytest.approx(0.5 * value * (1 + math.tanh(u)), abs=1e-15)


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


@pytest.mark.parametrize("backend", [cpu, reference])
def test_backward_adds(backend):
    x, dinp = np.array([[1.0, -0.5]]), np.array([[10.0, 20.0]])
    backend.gelu_backward(dinp, np.ones_like(x), x)
    _, alone = results(backend, x, np.ones_like(x))
    np.testing.assert_allclose(dinp, alone + [[10, 20]], atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("backend", [cpu, reference])
def test_backward_overwrites(backend, dtype):
    """add=False gives what adding to zeros gives, whatever was there."""
    x, dout = np.random.default_rng(3).normal(size=(2, 5, 1001)).astype(dtype)
    _, want = results(backend, x, dout)
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


@pytest.mark.skipif(
    numba.config.NUMBA_NUM_THREADS < 2, reason="needs two threads"
)
@pytest.mark.parametrize("n", [1, 7, 4096, 4097, 50_001])
def test_threads_change_no_bit(n):
    rng = np.random.default_rng(2)
    x, dout = rng.normal(scale=3, size=(2, n)).astype(np.float32)
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        alone = results(cpu, x, dout)
        numba.set_num_threads(2)
        together = results(cpu, x, dout)
    finally:
        numba.set_num_threads(before)
    for one, two in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, two)


def test_an_element_gets_the_same_bits_wherever_it_stands():
    """In a vector, in the rest after the vectors, or alone."""
    x, dout = np.random.default_rng(4).normal(size=(2, 200)).astype("f4")
    whole = results(cpu, x, dout)
    for n in range(1, 70):
        for part, want in zip(results(cpu, x[:n], dout[:n]), whole, strict=1):
            np.testing.assert_array_equal(part, want[:n])


BAD = [
    (lambda a: a[:, :-1], ValueError, r"must have shape \(3, 4\), got"),
    (lambda a: np.repeat(a, 2, 1)[:, ::2], ValueError, "must be C-contiguous"),
    (lambda a: a.astype(np.float64), TypeError, "must be float32"),
    (lambda a: a.tolist(), TypeError, "must be a NumPy array"),
]


@pytest.mark.parametrize("spoil, error, message", BAD)
def test_outputs_that_do_not_fit_are_refused(spoil, error, message):
    x = np.ones((3, 4), np.float32)
    with pytest.raises(error, match=f"gelu_forward: out {message}"):
        cpu.gelu_forward(spoil(x), x)
    with pytest.raises(error, match=f"gelu_backward: dinp {message}"):
        cpu.gelu_backward(spoil(x), x, x)
    with pytest.raises(error, match=f"gelu_backward: dout {message}"):
        cpu.gelu_backward(x.copy(), spoil(x), x)


@pytest.mark.parametrize(
    "spoil, error, message",
    [
        (lambda a: a.astype(np.float16), TypeError, "float32 or float64"),
        (lambda a: a.T, ValueError, "must be C-contiguous"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(spoil, error, message):
    x = spoil(np.ones((3, 4), np.float32))
    with pytest.raises(error, match=f"gelu_forward: inp.*{message}"):
        cpu.gelu_forward(np.empty_like(x), x)
