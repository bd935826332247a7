"""Softmax and cross-entropy: kernels, gradients and threads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import assert_threads_change_no_bit

from llmnb.book.verify import numerical_gradient
from llmnb.cpu import crossentropy as cpu
from llmnb.reference import crossentropy as reference

DTYPES = {np.float32: 1e-5, np.float64: 1e-12}
BACKENDS = pytest.mark.parametrize("layer", [reference, cpu])


def problem(B, T, V, Vp, dtype, seed=0):
    """logits, targets, dlosses; what stands in the padding is never read."""
    rng = np.random.default_rng(seed)
    logits = (4 * rng.normal(size=(B, T, Vp)) + 20).astype(dtype)
    logits[..., V:] = 1e30
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    return logits, targets, rng.normal(size=(B, T)).astype(dtype)


def run(layer, logits, targets, dlosses, V):
    """losses, lse and dlogits of a backend."""
    losses, lse = np.zeros((2, *targets.shape), logits.dtype)
    out = np.zeros_like(logits)
    layer.crossentropy_softmax_forward(losses, lse, logits, targets, V)
    layer.crossentropy_softmax_backward(out, dlosses, logits, lse, targets, V)
    return losses, lse, out


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 9),
    V=st.sampled_from([1, 2, 3, 7, 31, 257, 331]),
    padding=st.sampled_from([0, 1, 53]),
    dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 99),
)
def test_kernels_equal_reference(B, T, V, padding, dtype, seed):
    given = problem(B, T, V, V + padding, dtype, seed)
    for got, want in zip(run(cpu, *given, V), run(reference, *given, V),
                         strict=True):  # fmt: skip
        error = abs(got - want).max() / max(1, abs(want).max())
        assert error < DTYPES[dtype]
        assert got.dtype == dtype
    assert not got[..., V:].any()
    np.testing.assert_allclose(got.sum(-1), np.zeros((B, T)), atol=1e-4)


@BACKENDS
def test_gradient(layer):
    logits, targets, dlosses = problem(2, 3, 5, 8, np.float64)
    logits -= 20
    logits[..., 5:] = 0
    losses, lse = np.zeros((2, 2, 3))

    def loss():
        layer.crossentropy_softmax_forward(losses, lse, logits, targets, 5)
        return (dlosses * losses).sum()

    want = numerical_gradient(loss, logits)
    got = run(layer, logits, targets, dlosses, 5)[2]
    np.testing.assert_allclose(got, want, atol=1e-8)


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place(layer, dtype):
    """The gradient written over the logits, or over a view of them."""
    logits, targets, dlosses = problem(2, 5, 331, 384, dtype)
    _, lse, want = run(layer, logits, targets, dlosses, 331)
    for view in (False, True):
        inside = logits.copy()
        out = inside[:] if view else inside
        layer.crossentropy_softmax_backward(
            out, dlosses, inside, lse, targets, 331
        )
        assert np.array_equal(inside, want)


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_logits(layer, dtype, sign):
    """One logit of 1e4 (or all others of -1e4): exact, finite, no warning."""
    logits = np.zeros((1, 2, 6), dtype)
    logits[0, :, 1] = 1e4
    if sign < 0:
        logits -= dtype(1e4)
    targets, ones = np.array([[1, 2]], np.int32), np.ones((1, 2), dtype)
    losses, _, dlogits = run(layer, logits, targets, ones, 5)
    assert losses.tolist() == [[0, 1e4]]
    assert dlogits.tolist() == [[[0] * 6, [0, 1, -1, 0, 0, 0]]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(dtype):
    given = problem(3, 37, 331, 384, dtype)
    assert_threads_change_no_bit(lambda: run(cpu, *given, 331))
