"""GELU: accuracy."""

import math

import numpy as np

from llmnb.cpu import gelu as cpu
from llmnb.reference import gelu as reference


def results(backend, x, dout):
    out, dinp = np.empty_like(x), np.zeros_like(x)
    backend.gelu_forward(out, x)
    backend.gelu_backward(dinp, dout, x)
    return out, dinp


def test_accuracy_in_float32():
    """Against float64 over a dense grid, and far outside it."""
    x = np.linspace(-30, 30, 400_001, dtype=np.float32)
    ones = np.ones_like(x)
    got = results(cpu, x, ones)
    want = results(reference, *(a.astype(np.float64) for a in (x, ones)))
    scale = np.maximum(1, np.abs(want[0]))
    assert (np.abs(got[0] - want[0]) / scale).max() < 5e-7
    assert np.abs(got[1] - want[1]).max() < 1e-6
    far = np.array([-1e6, -1e3, -100, 100, 1e3, 1e6], np.float32)
    out, slope = results(cpu, far, np.ones_like(far))
    np.testing.assert_array_equal(out, np.maximum(far, 0))
    np.testing.assert_array_equal(slope, far > 0)


def test_small_outputs_keep_their_digits():
    """Left of -3, where 1 + tanh(u) would cancel."""
    x = np.linspace(-5, -3, 1001, dtype=np.float32)
    out, _ = results(cpu, x, x)
    wide = x.astype(np.float64)
    u = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    want = wide / (1 + np.exp(-2 * u))
    np.testing.assert_allclose(out, want, rtol=5e-6)
