"""Rotary positions on a GPU: what they move, what is refused."""

import numpy as np
import pytest
from gpu import check_row

from llmnb import cuda
from llmnb.gpu.launch import simulated
from llmnb.gpu.simulator import watch


def test_what_it_moves():
    """x in and out, and a row of the table for each head that turns."""
    seen, _ = check_row("rotary", 1, 4, 32, 4, 2, 0, tol=5e-7)
    assert seen.sectors == 4 * 4 * (2 * 8 + 8)
    assert seen.barriers == seen.exchanges == 0
    assert len(seen.launches) == 1


def test_what_is_refused():
    x, table = (simulated(np.ones(s, "f4")) for s in ((1, 4, 12), (4, 6)))
    with watch() as seen:
        with pytest.raises(ValueError, match="at least heads = 3"):
            cuda.rotary_forward(x, table, 3)
        with pytest.raises(ValueError, match="positions 1 to 4, where the"):
            cuda.rotary_backward(x, table, 2, 1)
    assert not seen.launches
