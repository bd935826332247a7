"""The encoder: kernels against NumPy, gradients, threads, bad input."""

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
def test_repeats_add_up_and_absent_rows_stay(backend):
    inp = np.array([[2, 0, 2], [2, 0, 2]], dtype=np.int32)
    dwte, dwpe = np.full((4, 33), 7.0), np.full((5, 33), 7.0)
    backend.encoder_backward(dwte, dwpe, np.ones((2, 3, 33)), inp)
    assert (dwte == np.array([[9], [7], [11], [7]])).all()
    assert (dwpe == np.array([[9], [9], [9], [7], [7]])).all()


def test_same_bits_for_any_number_of_threads():
    # few tokens and many rows: every row of dwte is a long sum
    inp, wte, wpe, dout = problem(4, 50, 131, 3, np.float32)
    before, results = numba.get_num_threads(), []
    try:
        for n in (1, min(2, before), before):
            numba.set_num_threads(n)
            grads = np.zeros_like(wte), np.zeros_like(wpe)
            cpu.encoder_backward(*grads, dout, inp)
            results.append(grads)
    finally:
        numba.set_num_threads(before)
    for grads in results[1:]:
        for got, want in zip(grads, results[0], strict=True):
            assert np.array_equal(got, want)
    # ... and these are the bits of the plain loop in the order of the text
    for token in range(3):
        total = np.zeros(131, np.float32)
        for b, t in np.argwhere(inp == token):
            total += dout[b, t]
        assert np.array_equal(total, results[0][0][token])


def test_backward_reads_only_the_rows_of_its_tokens():
    """Rows without a token may hold anything, even NaN, and keep it."""
    dwte = np.full((1000, 8), np.nan, np.float32)
    dwte[5] = 1
    inp = np.full((2, 3), 5, dtype=np.int32)
    dwpe = np.zeros((3, 8), np.float32)
    cpu.encoder_backward(dwte, dwpe, np.ones((2, 3, 8), np.float32), inp)
    assert (dwte[5] == 7).all()
    assert np.isnan(np.delete(dwte, 5, axis=0)).all()


def changed(i, change):
    """Arguments of both functions with one of them changed."""
    inp, wte, wpe, dout = problem(2, 3, 4, 5, np.float32)
    forward = [np.zeros_like(dout), inp, wte, wpe]
    backward = [np.zeros_like(wte), np.zeros_like(wpe), dout, inp]
    j = {0: 2, 1: 3, 2: 0, 3: 1}[i]
    forward[i] = change(forward[i])
    backward[j] = change(backward[j])
    return forward, backward


def token(value):
    def change(inp):
        inp = inp.copy()
        inp[1, 2] = value
        return inp

    return change


BAD_INPUT = [
    (1, token(5), r"inp must lie in \[0, 5\), got 5 at \(1, 2\)"),
    (1, token(-1), r"inp must lie in \[0, 5\), got -1 at \(1, 2\)"),
    (1, lambda a: a.astype(np.int64), "inp must be int32, got int64"),
    (1, lambda a: a[:, :2].copy(), r"inp must have shape \(2, 3\)"),
    (0, lambda a: a[0], r"out must have shape \(B, T, C\), got"),
    (0, np.asfortranarray, "out must be C-contiguous"),
    (0, lambda a: a.astype(np.float16), "out must be float32 or float64"),
    (0, lambda a: a.tolist(), "out must be a NumPy array, got list"),
    (2, lambda a: a.astype(np.float64), "wte must be float32, got float64"),
    (2, lambda a: a[:, :3].copy(), r"wte must have shape \(5, 4\)"),
    (2, lambda a: a.ravel(), "wte must have shape"),
    (2, np.asfortranarray, "wte must be C-contiguous"),
    (3, lambda a: a[:2], "T must be at most 2, .* got 3"),
    (3, lambda a: None, "wpe must be a NumPy array, got NoneType"),
]


@pytest.mark.parametrize(("i", "change", "message"), BAD_INPUT)
def test_bad_input_is_refused(i, change, message):
    types = ("float32", "int32", "NumPy array")
    error = TypeError if any(x in message for x in types) else ValueError
    forward, backward = changed(i, change)
    with pytest.raises(error, match=message) as info:
        cpu.encoder_forward(*forward)
    assert str(info.value).startswith("encoder_forward: ")
    with pytest.raises(error, match=message) as info:
        cpu.encoder_backward(*backward)
    assert str(info.value).startswith("encoder_backward: ")
