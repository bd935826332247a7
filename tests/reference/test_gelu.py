"""GELU: accuracy where it is near zero, and far out."""

import math

import numpy as np

from llmnb.cpu.gelu import gelu_backward, gelu_forward


def test_far_out_it_is_zero_or_the_number_itself():
    far = np.array([-1e6, -1e3, -100, 100, 1e3, 1e6], np.float32)
    out, slope = np.empty_like(far), np.zeros_like(far)
    gelu_forward(out, far)
    gelu_backward(slope, np.ones_like(far), far)
    np.testing.assert_array_equal(out, np.maximum(far, 0))
    np.testing.assert_array_equal(slope, far > 0)


def test_small_outputs_keep_their_digits():
    """Left of -3, where 1 + tanh(u) would cancel."""
    x = np.linspace(-5, -3, 1001, dtype=np.float32)
    out, wide = np.empty_like(x), x.astype(np.float64)
    gelu_forward(out, x)
    u = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    want = wide / (1 + np.exp(-2 * u))
    np.testing.assert_allclose(out, want, rtol=5e-6)
