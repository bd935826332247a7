"""GELU and the residual sum on a GPU: a thread a number, or four."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
from gpu import PLACES, check_layer, check_machine_code, single

from llmnb.cuda import gelu, residual
from llmnb.gpu.launch import simulated, to_host
from llmnb.gpu.simulator import watch
from llmnb.reference import gelu as reference
from llmnb.reference import residual as plain

# the module: its name in llmnb.cuda is the function
elementwise = importlib.import_module("llmnb.cuda.elementwise")
SHAPES = [(1,), (3,), (4,), (5,), (33,), (2, 3, 5), (7, 100), (1027,)]


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
def test_layers_equal_the_reference(shape, each):
    x, y, z = (3 * single(*shape) for _ in range(3))
    none = np.full(shape, np.nan, np.float32)
    for layer, want, arrays, writes in (
        (gelu.gelu_forward, reference.gelu_forward, (none, x), 1),
        (gelu.gelu_backward, reference.gelu_backward, (x, y, z), 1),
        (gelu.gelu_backward, reference.gelu_backward, (none, y, z, False), 1),
        (residual.residual_forward, plain.residual_forward, (none, x, y), 1),
        (residual.residual_backward, plain.residual_backward, (x, y, z), 2),
    ):
        named = dict(zip("abcd", arrays, strict=False))
        seen = check_layer(layer, want, named, [*named][:writes])
        count = threads(x.size, each) * len(seen.launches)
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
