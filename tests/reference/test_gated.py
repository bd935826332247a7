"""SwiGLU and GeGLU: all backends, gradients, accuracy and threads."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import assert_threads_change_no_bit

from llmnb import cpu, reference
from llmnb.book.verify import numerical_gradient

KINDS = "swiglu", "geglu"
kinds = st.sampled_from(KINDS)
sizes = st.tuples(st.integers(1, 4), st.integers(1, 19), st.integers(1, 150))
small = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 5))
drawn = settings(max_examples=25, deadline=None, derandomize=True)


def problem(B, T, H, dtype=np.float64, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    inp = rng.normal(scale=scale, size=(B, T, 2 * H)).astype(dtype)
    return inp, rng.normal(size=(B, T, H)).astype(dtype)


def results(layer, kind, inp, dout):
    """out and dinp, over NaN: both are overwritten."""
    out, dinp = np.full_like(dout, np.nan), np.full_like(inp, np.nan)
    getattr(layer, f"{kind}_forward")(out, inp)
    getattr(layer, f"{kind}_backward")(dinp, dout, inp)
    return out, dinp


@drawn
@given(
    sizes,
    kinds,
    st.sampled_from((0.1, 1.0, 10.0)),
    st.sampled_from((np.float32, np.float64)),
)
def test_cpu_equals_reference(shape, kind, scale, dtype):
    inp, dout = problem(*shape, dtype, scale)
    exact = results(reference, kind, *(x.astype("f8") for x in (inp, dout)))
    tolerance = 1e-6 if dtype == np.float32 else 1e-13
    wide = 1 + np.abs(inp).max() * (1 + np.abs(dout).max())
    for got, want in zip(results(cpu, kind, inp, dout), exact, strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        limit = tolerance * (np.abs(want) + wide)
        assert (np.abs(got - want) < limit).all()


@drawn
@given(small, kinds, st.sampled_from((0.3, 3.0)))
def test_gradients(shape, kind, scale):
    """The reference's, which the CPU's equal, by central differences."""
    inp, dout = problem(*shape, scale=scale)
    out = np.empty_like(dout)

    def loss():
        getattr(reference, f"{kind}_forward")(out, inp)
        return (dout * out).sum()

    want = numerical_gradient(loss, inp)
    _, dinp = results(reference, kind, inp, dout)
    np.testing.assert_allclose(dinp, want, atol=2e-8)


@pytest.mark.parametrize("layer", [reference, cpu])
def test_values(layer):
    """At a few points, from math: a gate, then the value it multiplies."""
    for gate in (-3.0, -1.0, 0.0, 0.5, 2.0):
        inp, dout = np.array([[[gate, 1.7]]]), np.ones((1, 1, 1))
        silu = gate / (1 + math.exp(-gate))
        xi = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        gelu = 0.5 * gate * (1 + math.tanh(xi))
        for kind, bent in (("swiglu", silu), ("geglu", gelu)):
            out, dinp = results(layer, kind, inp, dout)
            assert out[0, 0, 0] == pytest.approx(1.7 * bent, abs=1e-15)
            assert dinp[0, 0, 1] == pytest.approx(bent, abs=1e-15)


@pytest.mark.parametrize("layer", [reference, cpu])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_far_out_a_gate_is_shut_or_wide_open(layer, kind, dtype):
    gates = np.array([-3e4, -2e3, -1e3, 1e3, 2e3, 3e4], dtype)
    values = np.full_like(gates, 0.5)
    inp, ones = np.concatenate([gates, values])[None, None], values + 0.5
    with np.errstate(all="raise", under="ignore"):
        out, dinp = results(layer, kind, inp, ones[None, None])
    open_ = gates > 0
    np.testing.assert_array_equal(out[0, 0], open_ * gates / 2)
    np.testing.assert_array_equal(dinp[0, 0, :6], open_ * values)
    np.testing.assert_array_equal(dinp[0, 0, 6:], open_ * gates)


@pytest.mark.parametrize("kind", KINDS)
def test_accuracy_in_float32(kind):
    gates = np.linspace(-30, 30, 100_001, dtype=np.float32)
    inp = np.concatenate([gates, np.ones_like(gates)])[None, None]
    ones = np.ones_like(gates)[None, None]
    got = results(cpu, kind, inp, ones)
    want = results(reference, kind, *(x.astype("f8") for x in (inp, ones)))
    for x, y in zip(got, want, strict=True):
        assert (np.abs(x - y) / np.maximum(1, np.abs(y))).max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 7), (2, 37, 331)])
def test_threads_change_no_bit(kind, shape):
    inp, dout = problem(*shape, np.float32, scale=3)
    assert_threads_change_no_bit(lambda: results(cpu, kind, inp, dout))


@pytest.mark.parametrize("kind", KINDS)
def test_an_element_gets_the_same_bits_wherever_it_stands(kind):
    """In a vector, in the rest after the vectors, or alone."""
    inp, dout = problem(1, 1, 100, np.float32)
    halves = np.split(inp, 2, axis=-1)
    whole, _ = results(cpu, kind, inp, dout)
    for n in range(1, 70):
        first = np.concatenate([x[..., :n] for x in halves], axis=-1)
        out, _ = results(cpu, kind, first, dout[..., :n].copy())
        np.testing.assert_array_equal(out, whole[..., :n])


@pytest.mark.parametrize("layer", [reference, cpu])
def test_halves_that_do_not_fit_are_refused(layer):
    out, inp = np.empty((1, 2, 3)), np.empty((1, 2, 5))
    with pytest.raises(ValueError, match="swiglu_forward: inp must have sh"):
        layer.swiglu_forward(out, inp)
