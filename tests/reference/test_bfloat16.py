"""Rounding to bfloat16: halves, and what is no number.

Chapter 2.6 looks at every number of 16 bits, and at a million of 32.
"""

import numpy as np
import pytest

from llmnb.reference.bfloat16 import from_bfloat16, to_bfloat16


def test_halves_go_to_the_even_neighbour():
    upper = np.arange(0x7F80, dtype=np.uint32)  # all that are finite
    halves = (upper << 16 | 0x8000).view(np.float32)
    np.testing.assert_array_equal(to_bfloat16(halves), upper + (upper & 1))


def test_nan_never_becomes_a_number():
    odd = np.array([0x7F800001, 0xFF80FFFF, 0x7FFFFFFF, 0xFFFFFFFF], "u4")
    back = from_bfloat16(to_bfloat16(odd.view(np.float32)))
    assert np.isnan(back).all()
    assert np.signbit(back).tolist() == [False, True, False, True]


@pytest.mark.parametrize("x", (np.ones(1), np.ones((1, 1), np.int32), 1.5))
def test_only_float32_is_rounded(x):
    with pytest.raises(TypeError, match="x must be float32, got"):
        to_bfloat16(x)
