"""The encoder, and token vectors alone: rows of dwte."""

import numpy as np
import pytest
from layers import draw

from llmnb import cpu, reference

BACKENDS = pytest.mark.parametrize("backend", [cpu, reference])


@BACKENDS
def test_repeats_add_up_and_absent_rows_stay_even_as_nan(backend):
    inp = np.array([[2, 0, 2], [2, 0, 2]], dtype=np.int32)
    dwte, dwpe = np.full((4, 33), 7.0), np.full((5, 33), 7.0)
    dwte[[1, 3]] = np.nan
    alone, ones = dwte.copy(), np.ones((2, 3, 33))
    backend.encoder_backward(dwte, dwpe, ones, inp)
    backend.embedding_backward(alone, ones, inp, 3.0)
    for got, scale in ((dwte, 1), (alone, 3)):
        assert (got[0] == 7 + 2 * scale).all()
        assert (got[2] == 7 + 4 * scale).all()
        assert np.isnan(got[[1, 3]]).all()
    assert (dwpe == np.array([[9], [9], [9], [7], [7]])).all()


def test_the_bits_are_those_of_a_plain_loop():
    """In the order of the text; every row of dwte is a long sum."""
    p = draw("encoder", 4, 50, 131, 3, dtype=np.float32)
    want = p["dwte"].copy()
    for b, t in np.ndindex(4, 50):
        want[p["inp"][b, t]] += p["dout"][b, t]
    cpu.encoder_backward(p["dwte"], p["dwpe"], p["dout"], p["inp"])
    assert np.array_equal(p["dwte"], want)
