"""SwiGLU and GeGLU: values and accuracy."""

import math

import numpy as np
import pytest

from llmnb import cpu, reference

KINDS = "swiglu", "geglu"


def results(layer, kind, inp, dout):
    """out and dinp, over NaN: both are overwritten."""
    out, dinp = np.full_like(dout, np.nan), np.full_like(inp, np.nan)
    getattr(layer, f"{kind}_forward")(out, inp)
    getattr(layer, f"{kind}_backward")(dinp, dout, inp)
    return out, dinp


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
