"""RMSNorm on a GPU: long rows, what it moves."""

import numpy as np
import pytest
from gpu import check_row

from llmnb import cuda
from llmnb.gpu.launch import simulated
from llmnb.gpu.simulator import watch


def check(*shape, add=True):
    return check_row("rmsnorm", *shape, eps=1e-3, offset=1.0, add=add)


@pytest.mark.parametrize("C", [255, 256, 257, 1030])
def test_rows_longer_than_a_block(C):
    check(1, 2, C)


def test_what_forward_moves():
    """An array of 256 channels is 32 sectors, asked for in 8 requests."""
    rows = 8
    seen, _ = check(1, rows, 256)
    assert seen.sectors == rows * (4 * 32 + 1)
    assert seen.requests == rows * (4 * 8 + 1)
    assert seen.barriers == 0
    assert seen.exchanges == 32 * rows * 5


def test_what_backward_moves():
    rows, parts = 8, 2
    _, seen = check(1, rows, 256)
    # inp, dout and weight in both sweeps; dinp and the block's sums are read
    # and written; each of 8 warps reads rstd
    row = 6 * 32 + 2 * 32 + 2 * 32 + 8
    table = parts * 2 * 32 + 64  # zeros, and the sum; dweight
    assert seen.sectors == rows * row + table
    assert seen.atomics == 0 and len(seen.launches) == 2
    _, over = check(1, rows, 256, add=False)
    assert over.sectors == seen.sectors - rows * 32  # dinp is not read


@pytest.mark.parametrize("shape", ((0, 3), (2, 0)))
def test_nothing_is_launched_for_no_rows(shape):
    x, stats, w = (np.zeros(s, "f4") for s in ((*shape, 8), shape, 8))
    out, dinp, inp, dout = (simulated(x) for _ in range(4))
    weight, dweight, rstd = simulated(w), simulated(w), simulated(stats)
    with watch() as seen:
        cuda.rmsnorm_forward(out, rstd, inp, weight)
        cuda.rmsnorm_backward(dinp, dweight, dout, inp, weight, rstd)
    assert not seen.launches
