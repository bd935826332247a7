"""RMSNorm: offsets, rows of zeros, rows alone."""

import numpy as np
import pytest
from layers import NAMED, assert_near, draw, passed, results

from llmnb import cpu, reference

LAYER = NAMED["rmsnorm"]


@pytest.mark.parametrize("layer", [reference, cpu])
def test_an_offset_of_one_is_a_weight_that_is_one_more(layer):
    """As Gemma has it; in float64, where 1 + w is exact enough."""
    gemma, llama = (draw("rmsnorm", 2, 5, 24, offset=x) for x in (1.0, 0.0))
    llama["weight"] += 1
    both = [results(LAYER, passed(LAYER, layer, p)) for p in (gemma, llama)]
    assert_near(*both, 1e-13)


@pytest.mark.parametrize("layer", [reference, cpu])
def test_a_row_of_zeros_is_finite(layer):
    p = draw("rmsnorm", 1, 2, 16, dtype=np.float32)
    p["inp"][...] = 0
    p = passed(LAYER, layer, p)
    assert (p["out"] == 0).all() and np.isfinite(p["dinp"]).all()


@pytest.mark.parametrize("C", [5, 64, 331])
def test_a_row_gets_the_same_bits_alone(C):
    """As when a text is written token by token."""
    p = draw("rmsnorm", 2, 7, C, dtype=np.float32, offset=1.0)
    whole = passed(LAYER, cpu, p)
    for b, t in np.ndindex(2, 7):
        row = whole["inp"][b : b + 1, t : t + 1].copy()
        out, rstd = np.empty_like(row), np.empty((1, 1), np.float32)
        cpu.rmsnorm_forward(out, rstd, row, whole["weight"], 1e-5, 1.0)
        np.testing.assert_array_equal(out[0, 0], whole["out"][b, t])
