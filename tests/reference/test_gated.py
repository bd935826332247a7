"""SwiGLU and GeGLU far from zero."""

import numpy as np
import pytest

from llmnb import cpu, reference


@pytest.mark.parametrize("layer", [reference, cpu])
@pytest.mark.parametrize("kind", ["swiglu", "geglu"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_far_out_a_gate_is_shut_or_wide_open(layer, kind, dtype):
    gates = np.array([-3e4, -2e3, -1e3, 1e3, 2e3, 3e4], dtype)
    values = np.full_like(gates, 0.5)
    inp, ones = np.concatenate([gates, values])[None, None], values + 0.5
    out, dinp = np.empty((1, 1, 6), dtype), np.empty_like(inp)
    with np.errstate(all="raise", under="ignore"):
        getattr(layer, f"{kind}_forward")(out, inp)
        getattr(layer, f"{kind}_backward")(dinp, ones[None, None], inp)
    open_ = gates > 0
    np.testing.assert_array_equal(out[0, 0], open_ * gates / 2)
    np.testing.assert_array_equal(dinp[0, 0, :6], open_ * values)
    np.testing.assert_array_equal(dinp[0, 0, 6:], open_ * gates)
