"""The residual connection: kernels against NumPy, gradients, bad input."""

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
def test_backward_adds(backend):
    a, b, d = three((2, 3, 5))
    da, db = a.copy(), b.copy()
    for _ in range(2):
        backend.residual_backward(da, db, d)
    assert np.array_equal(da, a + d + d)
    assert np.array_equal(db, b + d + d)


@pytest.mark.parametrize("backend", [cpu, reference])
def test_forward_in_place(backend):
    a, b, _ = three((4, 129))
    want = a + b
    backend.residual_forward(a, a, b)
    assert np.array_equal(a, want)


@pytest.mark.parametrize("backend", [cpu, reference])
@pytest.mark.parametrize("n", [1, 7, 5000])
def test_one_array_as_both_inputs(backend, n):
    x, _, _ = three((n,))
    out = np.empty_like(x)
    backend.residual_forward(out, x, x)
    assert np.array_equal(out, 2 * x)


def test_same_bits_for_any_number_of_threads():
    a, b, d = three((3, 37, 331))
    before, results = numba.get_num_threads(), []
    try:
        for n in (1, before):
            numba.set_num_threads(n)
            out, da, db = np.empty_like(a), a.copy(), b.copy()
            cpu.residual_forward(out, a, b)
            cpu.residual_backward(da, db, d)
            results.append(np.stack([out, da, db]))
    finally:
        numba.set_num_threads(before)
    assert np.array_equal(*results)


@pytest.mark.parametrize("i", [0, 1, 2])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a[:1], ValueError, "must have shape"),
        (lambda a: a.astype(np.float64), TypeError, "must be float"),
        (np.asfortranarray, ValueError, "must be C-contiguous"),
        (lambda a: a.tolist(), TypeError, "got list"),
    ],
)
def test_bad_input_is_refused(i, change, error, message):
    for function in (cpu.residual_forward, cpu.residual_backward):
        args = three((2, 3, 4))
        before = [a.copy() for a in args]
        bad = list(args)
        bad[i] = change(args[i])
        with pytest.raises(error, match=message) as info:
            function(*bad)
        assert str(info.value).startswith(f"{function.__name__}: ")
        assert all(map(np.array_equal, args, before))


@pytest.mark.parametrize(("i", "j"), [(0, 1), (0, 2), (1, 2)])
def test_backward_refuses_arrays_that_overlap(i, j):
    names = ("dinp1", "dinp2", "dout")
    message = f"{names[i]} and {names[j]} must not share memory"
    block = np.zeros(20, np.float32)
    args = [np.zeros(12, np.float32) for _ in range(3)]
    cpu.residual_backward(*args)
    args[i], args[j] = block[:12], block[8:]
    with pytest.raises(ValueError, match=message):
        cpu.residual_backward(*args)
    args[i] = args[j]
    with pytest.raises(ValueError, match=message):
        cpu.residual_backward(*args)
    # neighbours in one block of memory do not overlap
    parts = np.zeros((3, 12), np.float32)
    cpu.residual_backward(*parts)
