"""GELU and the residual sum on a GPU: a thread a number, or four."""

import importlib
import math

import numpy as np
import pytest
from gpu import PLACES, check_row

from llmnb.cuda import gelu
from llmnb.gpu.launch import to_host

# the module: its name in llmnb.cuda is the function
elementwise = importlib.import_module("llmnb.cuda.elementwise")
SHAPES = [(1, 1, x) for x in (1, 3, 4, 5, 33, 1027)] + [(2, 3, 5), (7, 10, 10)]


@pytest.fixture(params=["one", "four"])
def each(request, monkeypatch):
    """How many numbers a thread owns: one where arrays are not aligned."""
    if request.param == "one":
        monkeypatch.setattr(elementwise, "aligned", lambda *arrays: False)
    return request.param


def threads(n, each):
    """How many threads n numbers take, in whole blocks of 256."""
    return -(-(n if each == "one" else n // 4 + n % 4) // 256) * 256


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("name", "how"),
    [("gelu", {"add": True}), ("gelu", {"add": False}), ("residual", {})],
)
def test_layers_equal_the_reference(shape, name, how, each):
    for seen in check_row(name, *shape, tol=2e-6, spread=3.0, **how):
        count = threads(math.prod(shape), each) * len(seen.launches)
        assert seen.threads == count


def test_gelu_far_out(each):
    """Nothing overflows, and the slope is 0 or 1."""
    x = np.array([-1e6, -1e3, -100, 0, 100, 1e3, 1e6], np.float32)
    for place in PLACES:
        out, dinp, inp, ones = map(place, (x, x, x, np.ones_like(x)))
        gelu.gelu_forward(out, inp)
        gelu.gelu_backward(dinp, ones, inp, add=False)
        np.testing.assert_array_equal(to_host(out), np.maximum(x, 0))
        want = (x > 0) + 0.5 * (x == 0)
        np.testing.assert_array_equal(to_host(dinp), want)
