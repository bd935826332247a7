"""Rounding to bfloat16 and back."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnb.reference.bfloat16 import from_bfloat16, to_bfloat16


def test_all_bfloat16_numbers_come_back():
    every = np.arange(1 << 16, dtype=np.uint16)
    numbers = from_bfloat16(every)
    back = to_bfloat16(numbers)
    number = ~np.isnan(numbers)
    np.testing.assert_array_equal(back[number], every[number])
    assert np.isnan(from_bfloat16(back[~number])).all()


@settings(max_examples=300)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_rounding_goes_to_the_nearest_and_ties_to_even(x):
    got = int(to_bfloat16(np.array([x], np.float32))[0])
    value = float(from_bfloat16(np.array([got], np.uint16))[0])
    if np.isinf(value):  # half a step above the largest, or more
        assert abs(x) >= (2 - 2**-8) * 2.0**127
        return
    for step in (-1, 1):
        other = from_bfloat16(np.array([got + step & 0xFFFF], np.uint16))[0]
        if np.isfinite(other):
            near, far = abs(value - x), abs(float(other) - x)
            assert near < far or (near == far and got % 2 == 0)


def test_nan_never_becomes_a_number():
    odd = np.array([0x7F800001, 0xFF80FFFF, 0x7FFFFFFF, 0xFFFFFFFF], "u4")
    back = from_bfloat16(to_bfloat16(odd.view(np.float32)))
    assert np.isnan(back).all()
    assert np.signbit(back).tolist() == [False, True, False, True]
