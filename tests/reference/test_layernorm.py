"""LayerNorm: both backends, gradients and threads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import assert_threads_change_no_bit

from llmnb import cpu, reference
from llmnb.book.verify import numerical_gradient

NAMES = ("out", "mean", "rstd", "dinp", "dweight", "dbias")


def problem(B, T, C, dtype, seed=0):
    """Arrays for one forward and backward pass; gradients not zero."""
    rng = np.random.default_rng(seed)
    shapes = dict.fromkeys(("inp", "dout", "out", "dinp"), (B, T, C))
    shapes |= dict.fromkeys(("weight", "bias", "dweight", "dbias"), (C,))
    shapes |= dict.fromkeys(("mean", "rstd"), (B, T))
    return {n: rng.normal(size=s).astype(dtype) for n, s in shapes.items()}


def run(layer, p):
    """The forward pass, then the backward pass, on a problem's arrays."""
    layer.layernorm_forward(
        *(p[n] for n in ("out", "mean", "rstd", "inp", "weight", "bias"))
    )
    layer.layernorm_backward(
        *(p[n] for n in ("dinp", "dweight", "dbias", "dout", "inp")),
        *(p[n] for n in ("weight", "mean", "rstd")),
    )
    return p


sizes = st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 331))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(sizes, st.sampled_from((np.float32, np.float64)))
def test_cpu_equals_reference(shape, dtype):
    got = run(cpu, problem(*shape, dtype))
    # judged by float64: in float32 a row of two near equal numbers has a
    # deviation that rounding alone decides
    want = run(reference, problem(*shape, np.float64, seed=0))
    tol = 1e-11 if dtype == np.float64 else 2e-3 if shape[2] < 4 else 2e-4
    for name in NAMES:
        scale = max(1.0, np.abs(want[name]).max())
        assert np.abs(got[name] - want[name]).max() / scale < tol, name


@pytest.mark.parametrize("rows", [15, 16, 17, 1023, 1024, 1025, 1200])
def test_every_row_is_counted_once(rows):
    """The sums over rows are taken in parts; no row is lost between them."""
    p = problem(1, rows, 3, np.float64)
    for name in ("dweight", "dbias"):
        p[name][...] = 0
    p["dout"][...] = 1
    run(cpu, p)
    np.testing.assert_array_equal(p["dbias"], rows)
    norm = (p["inp"] - p["mean"][..., None]) * p["rstd"][..., None]
    np.testing.assert_allclose(p["dweight"], norm.sum((0, 1)), atol=1e-9)


@pytest.mark.parametrize("layer", [reference, cpu])
@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 1, 2), (1, 4, 70)])
def test_gradients(layer, shape):
    p = problem(*shape, np.float64)
    g = p["dout"]

    def loss():
        names = ("out", "mean", "rstd", "inp", "weight", "bias")
        layer.layernorm_forward(*(p[n] for n in names))
        return (g * p["out"]).sum()

    for name in ("dinp", "dweight", "dbias"):
        p[name][...] = 0
    run(layer, p)
    for name in ("inp", "weight", "bias"):
        want = numerical_gradient(loss, p[name])
        np.testing.assert_allclose(p[f"d{name}"], want, atol=1e-7)


def test_a_constant_row_is_finite():
    p = problem(1, 2, 16, np.float32)
    p["inp"][...] = 3
    run(cpu, p)
    np.testing.assert_allclose(p["out"][0, 0], p["bias"], atol=1e-5)
    assert np.isfinite(p["dinp"]).all()


def test_threads_change_no_bit():
    def work():
        p = run(cpu, problem(3, 37, 331, np.float32))
        return [p[name] for name in NAMES]

    assert_threads_change_no_bit(work)
