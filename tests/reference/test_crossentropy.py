"""Softmax and cross-entropy: extreme logits."""

import numpy as np
import pytest

from llmnb.cpu import crossentropy as cpu
from llmnb.reference import crossentropy as reference


@pytest.mark.parametrize("layer", [reference, cpu])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_logits(layer, dtype, sign):
    """One logit of 1e4 (or all others of -1e4): exact, finite, no warning."""
    logits = np.zeros((1, 2, 6), dtype)
    logits[0, :, 1] = 1e4
    if sign < 0:
        logits -= dtype(1e4)
    targets, ones = np.array([[1, 2]], np.int32), np.ones((1, 2), dtype)
    (losses, lse), dlogits = np.zeros((2, 1, 2), dtype), np.zeros_like(logits)
    layer.crossentropy_softmax_forward(losses, lse, logits, targets, 5)
    arrays = dlogits, ones, logits, lse, targets
    layer.crossentropy_softmax_backward(*arrays, 5)
    assert losses.tolist() == [[0, 1e4]]
    assert dlogits.tolist() == [[[0] * 6, [0, 1, -1, 0, 0, 0]]]
