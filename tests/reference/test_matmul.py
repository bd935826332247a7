"""The linear layer: rows keep their bits, on any number of threads."""

import numpy as np
import pytest
from processes import python

from llmnb import reference
from llmnb.cpu import matmul as cpu


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rows, C, OC", [(16, 32, 32), (31, 800, 70)])
def test_a_row_has_its_bits_wherever_it_lies(rows, C, OC, dtype):
    """In a whole tile or in one at the edge, with all that is added."""
    rng = np.random.default_rng(rows)
    drawn = [(1, rows, C), (OC, C), (OC,), (1, rows, OC)]
    x, weight, bias, residual = (
        rng.normal(size=shape).astype(dtype) for shape in drawn
    )
    out = np.empty_like(residual)
    cpu.matmul_forward(out, x, weight, bias, residual)
    for i in range(rows):
        alone = np.empty((1, rows - i, OC), dtype)
        rest = [np.ascontiguousarray(y[:, i:]) for y in (x, residual)]
        cpu.matmul_forward(alone, rest[0], weight, bias, rest[1])
        assert np.array_equal(alone, out[:, i:])


def test_a_weight_of_one_column_is_added_to():
    """A vector seen as a column has a step of 0 to the column after it."""
    rng = np.random.default_rng(1)
    x, dout = rng.normal(size=(1, 7, 1)), rng.normal(size=(1, 7, 5))
    dinp, weight = np.zeros_like(x), np.ones((5, 1))
    dweight, dbias = np.ones(5)[:, None], np.ones(5)
    assert dweight.strides[1] == 0
    cpu.matmul_backward(dinp, dweight, dbias, dout, x, weight)
    np.testing.assert_allclose(dweight, 1 + dout[0].T @ x[0], rtol=1e-12)


EIGHT_THREADS = """
import numba
import numpy as np
from llmnb.cpu.matmul import matmul_forward
from llmnb.cpu.tile import COLS, ROWS

rng = np.random.default_rng(1)
for rows, cols in ((1, 2), (ROWS, 3), (3 * ROWS, 4), (9 * ROWS, 1)):
    x, weight = rng.normal(size=(1, rows, 40)), rng.normal(size=(99, 40))
    weight = np.tile(weight, (5, 1))[: cols * COLS]
    want, got = np.zeros((2, 1, rows, cols * COLS))
    for threads in range(1, 9):
        numba.set_num_threads(threads)
        matmul_forward(got, x, weight, None)
        want = got.copy() if threads == 1 else want
        assert np.array_equal(got, want), (rows, cols, threads)
        got[:] = 0
"""


def test_more_threads_than_strips():
    """They have nothing to do, and say nothing."""
    done = python(EIGHT_THREADS, NUMBA_NUM_THREADS="8")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("backend", [reference, cpu])
def test_no_tokens_have_a_gradient_of_zero(backend):
    none, other, weight = (
        np.empty((1, 0, 7)),
        np.empty((1, 0, 5)),
        np.eye(5, 7),
    )
    dweight, dbias = np.full((5, 7), 9.0), np.full(5, 9.0)
    grads = none.copy(), dweight, dbias
    backend.matmul_backward(*grads, other, none, weight)
    assert (dweight == 9).all() and (dbias == 9).all()
    backend.matmul_backward(*grads, other, none, weight, add_dweight=False)
    assert not dweight.any() and not dbias.any()
