# Written by `make export` from notebooks/3_gpu/08_classifier.py: edit that file.

"""Plainer versions of the classifier on a GPU, to be timed."""

__all__ = ["CROSSENTROPY_SOFTMAX_FORWARD", "loss_by_threads"]


# imports of a thread a row
import math

import numpy as np

from llmnb.gpu.launch import kernel
from llmnb.gpu.simulator import cuda


# a thread a row
@kernel
def _loss_by_threads(losses, lse, logits, targets, V):
    row = cuda.grid(1)
    if row >= len(logits):
        return
    top, total = logits[row, 0], np.float32(0)
    for i in range(1, V):
        top = max(top, logits[row, i])
    for i in range(V):
        total += math.exp(logits[row, i] - top)
    lse[row] = top + math.log(total)
    losses[row] = top + math.log(total) - logits[row, targets[row]]


def loss_by_threads(losses, lse, logits, targets, V):
    """The classifier's forward pass, a thread a row; nothing is checked.

    Derived in chapter 3.8.
    """
    Vp, small = logits.shape[-1], (losses, lse, targets)
    losses, lse, targets = [x.reshape(-1) for x in small]
    grid = -(-losses.size // 64)
    rows = losses, lse, logits.reshape(-1, Vp), targets
    _loss_by_threads[grid, 64](*rows, V)


# plainest first; the layer itself comes after them
CROSSENTROPY_SOFTMAX_FORWARD = (loss_by_threads,)
