"""Token vectors without positions: values, gradients and order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnb import cpu, reference
from llmnb.book.verify import numerical_gradient

sizes = st.tuples(
    st.integers(1, 3), st.integers(1, 9), st.integers(1, 40), st.integers(1, 9)
)
scales = st.sampled_from((1.0, 24.0, 7.3))


def problem(B, T, C, V, dtype=np.float64):
    rng = np.random.default_rng(0)
    inp = rng.integers(0, V, (B, T)).astype(np.int32)
    wte, dwte = rng.normal(size=(2, V, C)).astype(dtype)
    return inp, wte, dwte, rng.normal(size=(B, T, C)).astype(dtype)


def results(layer, scale, inp, wte, dwte, dout):
    out, dwte = np.full_like(dout, np.nan), dwte.copy()
    layer.embedding_forward(out, inp, wte, scale)
    layer.embedding_backward(dwte, dout, inp, scale)
    return out, dwte


@settings(max_examples=25, deadline=None, derandomize=True)
@given(sizes, scales, st.sampled_from((np.float32, np.float64)))
def test_cpu_equals_reference(shape, scale, dtype):
    p = problem(*shape, dtype)
    out, dwte = results(cpu, scale, *p)
    want, added = results(reference, scale, *p)
    np.testing.assert_array_equal(out, want)
    tol = (1e-5 if dtype == np.float32 else 1e-13) * scale
    np.testing.assert_allclose(dwte, added, rtol=0, atol=5 * tol)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.tuples(*(st.integers(1, n) for n in (2, 4, 3, 5))), scales)
def test_gradients(shape, scale):
    inp, wte, dwte, dout = problem(*shape)
    out = np.empty_like(dout)

    def loss():
        reference.embedding_forward(out, inp, wte, scale)
        return (dout * out).sum()

    want = numerical_gradient(loss, wte)
    _, got = results(reference, scale, inp, wte, 0 * dwte, dout)
    np.testing.assert_allclose(got, want, atol=1e-7)


@pytest.mark.parametrize("layer", [reference, cpu])
def test_repeats_add_up_and_absent_rows_stay_even_as_nan(layer):
    inp = np.array([[2, 0, 2], [2, 0, 2]], np.int32)
    dwte = np.full((4, 5), 7.0)
    dwte[[1, 3]] = np.nan
    layer.embedding_backward(dwte, np.ones((2, 3, 5)), inp, 3.0)
    assert (dwte[0] == 7 + 2 * 3).all() and (dwte[2] == 7 + 4 * 3).all()
    assert np.isnan(dwte[[1, 3]]).all()


@pytest.mark.parametrize("layer", [reference, cpu])
def test_a_token_out_of_range_is_refused(layer):
    inp, wte, _, dout = problem(1, 2, 3, 4)
    inp[0, 1] = 4
    with pytest.raises(ValueError, match="embedding_forward: inp"):
        layer.embedding_forward(dout, inp, wte)
