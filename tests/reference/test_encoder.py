"""The encoder: kernels against NumPy, gradients and threads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import assert_threads_change_no_bit

from llmnb.book.verify import numerical_gradient
from llmnb.cpu import encoder as cpu
from llmnb.reference import encoder as reference

drawn = settings(max_examples=25, deadline=None, derandomize=True)
sizes = st.tuples(*(st.integers(1, n) for n in (3, 9, 99, 40)))


def problem(B, T, C, Vp, dtype, seed=0):
    rng = np.random.default_rng(seed)
    inp = rng.integers(0, Vp, (B, T), dtype=np.int32)
    wte = rng.normal(size=(Vp, C)).astype(dtype)
    wpe = rng.normal(size=(T + 2, C)).astype(dtype)
    dout = rng.normal(size=(B, T, C)).astype(dtype)
    return inp, wte, wpe, dout


def close(got, want):
    scale = max(1, np.abs(want).max(initial=0))
    tol = 1e-5 if got.dtype == np.float32 else 1e-12
    return np.abs(got - want).max(initial=0) / scale < tol


@drawn
@given(sizes, st.sampled_from([np.float32, np.float64]), st.integers(0, 99))
def test_cpu_equals_reference(shape, dtype, seed):
    inp, wte, wpe, dout = problem(*shape, dtype, seed)
    outs = [], []
    for backend, results in zip((cpu, reference), outs, strict=True):
        out = np.full_like(dout, np.nan)
        # gradients start from something: backward adds
        dwte, dwpe = wte.copy(), wpe.copy()
        backend.encoder_forward(out, inp, wte, wpe)
        backend.encoder_backward(dwte, dwpe, dout, inp)
        results += [out, dwte, dwpe]
    for got, want in zip(*outs, strict=True):
        assert got.dtype == dtype
        assert close(got, want)


@pytest.mark.parametrize("backend", [cpu, reference])
def test_gradients(backend):
    inp, wte, wpe, g = problem(2, 4, 5, 3, np.float64)
    assert len(np.unique(inp)) < inp.size  # tokens repeat
    out = np.empty_like(g)

    def loss():
        backend.encoder_forward(out, inp, wte, wpe)
        return (g * out).sum()

    dwte, dwpe = np.zeros_like(wte), np.zeros_like(wpe)
    backend.encoder_backward(dwte, dwpe, g, inp)
    assert np.abs(dwte - numerical_gradient(loss, wte)).max() < 1e-8
    assert np.abs(dwpe - numerical_gradient(loss, wpe)).max() < 1e-8


@pytest.mark.parametrize("backend", [cpu, reference])
def test_repeats_add_up_and_absent_rows_stay_even_as_nan(backend):
    inp = np.array([[2, 0, 2], [2, 0, 2]], dtype=np.int32)
    dwte, dwpe = np.full((4, 33), 7.0), np.full((5, 33), 7.0)
    dwte[[1, 3]] = np.nan
    backend.encoder_backward(dwte, dwpe, np.ones((2, 3, 33)), inp)
    assert (dwte[0] == 9).all() and (dwte[2] == 11).all()
    assert np.isnan(dwte[[1, 3]]).all()
    assert (dwpe == np.array([[9], [9], [9], [7], [7]])).all()


def test_threads_change_no_bit():
    # few tokens and many rows: every row of dwte is a long sum
    inp, wte, wpe, dout = problem(4, 50, 131, 3, np.float32)
    dwte, dwpe = np.empty_like(wte), np.empty_like(wpe)

    def work():
        dwte[...] = dwpe[...] = 0
        cpu.encoder_backward(dwte, dwpe, dout, inp)
        return dwte.copy(), dwpe.copy()

    assert_threads_change_no_bit(work)
    # ... and these are the bits of the plain loop in the order of the text
    for token in range(3):
        total = np.zeros(131, np.float32)
        for b, t in np.argwhere(inp == token):
            total += dout[b, t]
        assert np.array_equal(total, dwte[token])
