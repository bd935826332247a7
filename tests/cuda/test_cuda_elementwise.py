"""GELU and the residual sum on a GPU: a thread a number, or four."""

import importlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
from gpu import PLACES, check_machine_code, check_row, single

from llmnb.cuda import gelu, residual
from llmnb.gpu.launch import simulated, to_host
from llmnb.gpu.simulator import watch

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


def launched(*shape):
    """What all layers launch on arrays of a shape."""
    x, y, z = (simulated(single(*shape)) for _ in range(3))
    with watch() as seen:
        gelu.gelu_forward(y, x)
        gelu.gelu_backward(y, z, x)
        gelu.gelu_backward(y, z, x, False)
        residual.residual_forward(y, x, z)
        residual.residual_backward(x, y, z)
    return seen


def test_machine_code():
    for launch in launched(33).launches:  # of one name: one factory's
        seen = SimpleNamespace(launches=[launch])
        (made,) = check_machine_code(seen, registers=64).values()
        assert made.vector_loads and made.vector_stores


def test_empty_arrays():
    """Nothing is launched, as on the CPU nothing is done."""
    assert not any(launched(*x).launches for x in ((0,), (2, 0), (0, 5)))
