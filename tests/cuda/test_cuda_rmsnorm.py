"""RMSNorm on a GPU: long rows, what it moves."""

import numpy as np
import pytest
from gpu import check_row

from llmnb.cuda import rmsnorm
from llmnb.cuda.rmsnorm import rmsnorm_backward, rmsnorm_scratch
from llmnb.gpu.launch import simulated, to_host


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


@pytest.mark.parametrize("rows", [3, 4, 5, 31, 32, 33, 50])
@pytest.mark.parametrize("C", [3, 4])
def test_every_row_is_counted_once(monkeypatch, rows, C):
    """The rows are cut into parts, here up to 8; none is lost."""
    monkeypatch.setattr(rmsnorm, "_parts", lambda n: min(8, -(-n // 4)))
    ones = np.ones((1, rows, C), np.float32)
    dinp, dout, inp = (simulated(ones) for _ in range(3))
    dweight, weight = (simulated(ones[0, 0]) for _ in range(2))
    rstd = simulated(ones[..., 0])
    rmsnorm_backward(dinp, dweight, dout, inp, weight, rstd)
    np.testing.assert_array_equal(to_host(dweight), 1 + rows)


def test_scratch():
    for shape, parts in (((1, 5), 1), ((9, 5), 3), ((1 << 20, 768), 512)):
        assert rmsnorm_scratch(*shape) == parts * shape[1]
