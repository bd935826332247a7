"""AdamW, the global norm and clipping: kernels, threads, errors.

That the numbers are PyTorch's, tests/model/test_parity.py shows.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import assert_threads_change_no_bit

from llmnb.cpu import adamw as cpu
from llmnb.reference import adamw as reference
from llmnb.reference.adamw import AdamW

DTYPES = {np.float32: 1e-6, np.float64: 1e-13}
BOTH = (reference, cpu)
BACKENDS = pytest.mark.parametrize("backend", BOTH)
NUMBERS = (1e-2, 0.9, 0.95, 1e-8, 0.1)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    n=st.sampled_from([0, 1, 2, 7, 255, 257, 16383, 16385, 40001]),
    step=st.integers(1, 2000),
    decay=st.sampled_from([0.0, 0.1]),
    dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 99),
)
def test_kernels_equal_reference(n, step, decay, dtype, seed):
    rng = np.random.default_rng(seed)
    params, grads, m = rng.normal(size=(3, n)).astype(dtype)
    v = rng.uniform(0, 2, n).astype(dtype)
    settings = AdamW(1e-2, 0.8, 0.95, 1e-3, decay, step)
    both = []
    for backend in BOTH:
        state = [x.copy() for x in (params, grads, m, v)]
        backend.adamw_update(*state, settings)
        norm = backend.global_norm(grads)
        clipped = grads.copy()
        assert backend.clip_gradients(clipped, 1.0) == norm
        both.append([*state, np.array(norm), clipped])
    tol = DTYPES[dtype]
    for want, got in zip(*both, strict=True):
        np.testing.assert_allclose(got, want, rtol=4 * tol, atol=4 * tol)
    np.testing.assert_allclose(both[1][4], both[0][4], rtol=1e-12)


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 17, 5001, 9999])
def test_broken_gradients_stay_and_are_reported(backend, dtype, bad, where):
    grads = np.ones(10_000, dtype)
    grads[where] = bad
    before = grads.copy()
    norm = backend.clip_gradients(grads, 1.0)
    assert not math.isfinite(norm)
    assert math.isnan(norm) == math.isnan(bad)
    assert np.array_equal(grads, before, equal_nan=True)


@BACKENDS
@pytest.mark.parametrize("value, n", [(0.01, 2500), (1e30, 300)])
def test_short_gradients_stay_and_large_ones_do_not_overflow(
    backend, value, n
):
    grads = np.full(n, value, np.float32)
    before, norm = grads.copy(), backend.clip_gradients(grads, 1.0)
    assert norm == pytest.approx(value * math.sqrt(n), rel=1e-6)
    assert backend.global_norm(grads) == pytest.approx(min(norm, 1), rel=1e-6)
    assert np.array_equal(grads, before) == (norm < 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_element_gets_the_same_bits_wherever_it_stands(dtype):
    """In a vector, in the rest after the vectors, or alone."""
    start = np.random.default_rng(4).uniform(0.1, 2, (4, 200)).astype(dtype)
    whole = start.copy()
    cpu.adamw_update(*whole, AdamW(*NUMBERS, 3))
    for n in range(1, 70):
        part = start[:, :n].copy()
        cpu.adamw_update(*part, AdamW(*NUMBERS, 3))
        np.testing.assert_array_equal(part, whole[:, :n])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [3, 1000, 16385, 100_003])
def test_threads_change_no_bit(dtype, n):
    def work():
        p, g = np.random.default_rng(5).normal(size=(2, n)).astype(dtype)
        m, v = np.zeros((2, n), dtype)
        norms = []
        for step in range(1, 4):
            norms.append(cpu.clip_gradients(g, 1.0))
            cpu.adamw_update(p, g, m, v, AdamW(*NUMBERS, step))
            g += p
        return p, g, m, v, np.array(norms)

    assert_threads_change_no_bit(work)


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_of_numpy_change_no_bit(backend, dtype):
    start = np.random.default_rng(6).uniform(0.1, 2, (4, 500)).astype(dtype)
    plain, found = start.copy(), start.copy()
    backend.adamw_update(*plain, AdamW(*NUMBERS, 3))
    backend.adamw_update(*found, AdamW(*map(np.float64, NUMBERS), np.uint8(3)))
    assert np.array_equal(found, plain)
    for most in 1, 1.25:
        backend.clip_gradients(plain[0], most)
        backend.clip_gradients(found[0], np.float64(most))
        assert np.array_equal(found, plain)


@BACKENDS
@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, -0.1, "learning_rate must be at least 0, got -0.1"),
        (1, 1.0, r"beta1 must be in \[0, 1\), got 1.0"),
        (2, 1.5, r"beta2 must be in \[0, 1\), got 1.5"),
        (3, 0.0, "eps must be above 0, got 0.0"),
        (4, -1.0, "weight_decay must be at least 0, got -1.0"),
        (5, 0, "step must be at least 1, got 0"),
    ],
)
def test_bad_settings(backend, position, value, message):
    arrays = [np.ones(4) for _ in range(4)]
    numbers = [*NUMBERS, 1]
    backend.adamw_update(*arrays, AdamW(*numbers))
    before = arrays[0].copy()
    numbers[position] = value
    with pytest.raises(ValueError, match="adamw_update: " + message):
        backend.adamw_update(*arrays, AdamW(*numbers))
    assert np.array_equal(arrays[0], before)
