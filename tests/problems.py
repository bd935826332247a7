"""Several threads; random batches and weights of a model; a distance."""

import numba
import numpy as np
import pytest

from llmnb.arena import put


def assert_threads_change_no_bit(work):
    """work(): some arrays; they must not depend on the number of threads."""
    before, results = numba.get_num_threads(), []
    if before < 2:
        pytest.skip("needs two threads")
    try:
        for threads in (1, 2, before):
            numba.set_num_threads(threads)
            results.append(work())
    finally:
        numba.set_num_threads(before)
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(got, want)


def batch(cfg, B, T, seed=0):
    """Random tokens and targets."""
    return np.random.default_rng(seed).integers(0, cfg.vocab_size, (2, B, T))


def wide(model, seed=0):
    """Give a model weights so large that no gradient is tiny."""
    flat = model.memory.flat("params")
    rng = np.random.default_rng(seed)
    put(flat, rng.normal(scale=0.5, size=flat.size))
    return model


def relative(got, want):
    """The norm of the difference over the norm."""
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / np.linalg.norm(want)
