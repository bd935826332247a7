"""LayerNorm: constant rows."""

import numpy as np
from layers import NAMED, draw, passed

from llmnb import cpu


def test_a_constant_row_is_finite():
    p = draw("layernorm", 1, 2, 16, dtype=np.float32)
    p["inp"][...] = 3
    p = passed(NAMED["layernorm"], cpu, p)
    np.testing.assert_allclose(p["out"][0, 0], p["bias"], atol=1e-5)
    assert np.isfinite(p["dinp"]).all()
