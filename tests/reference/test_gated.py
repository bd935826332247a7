"""SwiGLU and GeGLU far from zero, on every backend."""

import numpy as np
import pytest
from gpu import PLACES

from llmnb import cpu, cuda, reference

# a backend, a type of numbers, and where its arrays lie
KINDS = [
    (backend, dtype, np.copy)
    for backend in (reference, cpu)
    for dtype in (np.float32, np.float64)
]
KINDS += [(cuda, np.float32, place) for place in PLACES]


@pytest.mark.parametrize(("backend", "dtype", "place"), KINDS)
@pytest.mark.parametrize("kind", ["swiglu", "geglu"])
def test_far_out_a_gate_is_shut_or_wide_open(kind, backend, dtype, place):
    gates = np.array([-3e4, -2e3, -1e3, 200, 1e3, 3e4], dtype)
    values = np.full_like(gates, 0.5)
    inp, ones = np.concatenate([gates, values])[None, None], values + 0.5
    given, ones = place(inp), place(ones[None, None])
    out, dinp = place(np.empty((1, 1, 6), dtype)), place(np.empty_like(inp))
    with np.errstate(all="raise", under="ignore"):
        getattr(backend, f"{kind}_forward")(out, given)
        getattr(backend, f"{kind}_backward")(dinp, ones, given)
    out, dinp = (np.asarray(x)[0, 0] for x in (out, dinp))
    open_ = gates > 0
    np.testing.assert_array_equal(out, open_ * gates / 2)
    np.testing.assert_array_equal(dinp[:6], open_ * values)
    np.testing.assert_array_equal(dinp[6:], open_ * gates)
