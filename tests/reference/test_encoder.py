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


def token(value):
    def change(inp):
        inp = inp.copy()
        inp[1, 2] = value
        return inp

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("inp", token(5), r"inp must lie in \[0, 5\), got 5 at \(1, 2\)"),
        ("inp", token(-1), r"inp must lie in \[0, 5\), got -1 at \(1, 2\)"),
        ("inp", lambda a: a.astype(np.int64), "inp must be int32, got int64"),
        ("out", np.asfortranarray, "out must be C-contiguous"),
        ("wte", lambda a: a.astype("f8"), "wte must be float32, got float64"),
        ("wte", lambda a: a[:, :3].copy(), r"wte must have shape \(5, 4\)"),
        ("wpe", lambda a: a[:2], "T must be at most 2, .* got 3"),
    ],
)
def test_bad_input_is_refused(name, change, message):
    inp, wte, wpe, out = problem(2, 3, 4, 5, np.float32)
    forward = {"out": out, "inp": inp, "wte": wte, "wpe": wpe}
    backward = {"dwte": wte, "dwpe": wpe, "dout": out, "inp": inp}
    for layer, arrays in (
        (cpu.encoder_forward, forward),
        (cpu.encoder_backward, backward),
    ):
        key = next(k for k in arrays if k.endswith(name))
        arrays[key] = change(arrays[key])
        with pytest.raises((TypeError, ValueError), match=message) as info:
            layer(*arrays.values())
        assert str(info.value).startswith(f"{layer.__name__}: ")
