"""The fast exponential and tangent against wider numbers; a maximum."""

import numpy as np
import pytest

from llmnb.cpu.jit import inner
from llmnb.cpu.math import fast_exp, fast_tanh, larger


@inner
def fill(y, x):
    for i in range(x.size):
        y[i] = fast_exp(x[i])


def exponentials(x):
    y = np.empty_like(x)
    fill(y, x)
    return y


def test_float32_error_over_a_dense_grid():
    x = np.linspace(-87, 88, 3_000_001).astype(np.float32)
    y = exponentials(x)
    assert y.dtype == np.float32
    error = np.abs(y / np.exp(x.astype(np.float64)) - 1)
    assert error.max() < 1.5e-7


def test_float32_ends():
    low = np.array([-88.1, -100, -1e4, -1e30], np.float32)
    high = np.array([88.1, 100, 1e4, 1e30], np.float32)
    assert not exponentials(low).any()
    np.testing.assert_allclose(exponentials(high), np.exp(88.0), rtol=2e-7)
    between = np.linspace(-88, -87, 10_001).astype(np.float32)
    got, want = exponentials(between), np.exp(between.astype(np.float64))
    # below 2^-126 a float32 loses digits, and some machines flush it to 0
    assert np.abs(got - want).max() < 2.0**-126


def test_float64_is_that_of_the_library():
    x = np.linspace(-700, 700, 10_001)
    y = exponentials(x)
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, np.exp(x), rtol=1e-15)


@inner
def fill_tangents(y, x):
    for i in range(x.size):
        y[i] = fast_tanh(x[i])


@pytest.mark.parametrize("dtype, most", ((np.float32, 3e-7), (float, 1e-15)))
def test_tanh_keeps_its_digits_down_to_the_smallest_numbers(dtype, most):
    sizes = np.logspace(-7, 1.6, 400_001).astype(dtype)
    x = np.concatenate([sizes, -sizes])
    y = np.empty_like(x)
    fill_tangents(y, x)
    assert np.abs(y / np.tanh(x.astype(np.longdouble)) - 1).max() < most


@inner
def top(x):
    largest = x[0]
    for i in range(x.size):
        largest = larger(largest, x[i])
    return largest


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_larger_of_two_finds_the_largest_of_a_row(dtype):
    rng = np.random.default_rng(3)
    for size in (1, 2, 15, 16, 17, 63, 64, 97, 1000):
        x = (rng.normal(size=size) - 5).astype(dtype)
        for at in {0, size // 2, size - 1}:
            x[at] = x.max() + 1
            assert top(x) == x.max() == x[at]
