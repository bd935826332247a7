"""GELU and the residual sum on a GPU: a thread a number, or four."""

import importlib

import numpy as np
import pytest
from gpu import PLACES, check_layer, check_machine_code

from llmnb.cuda import gelu, residual
from llmnb.gpu.launch import simulated, to_host
from llmnb.gpu.simulator import watch
from llmnb.reference import gelu as reference
from llmnb.reference import residual as plain

# the module: its name in llmnb.cuda is the function
elementwise = importlib.import_module("llmnb.cuda.elementwise")
SHAPES = [(1,), (3,), (4,), (5,), (33,), (2, 3, 5), (7, 100), (1027,)]


def draw(shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(scale=3, size=shape).astype(np.float32)


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
    x, y, z = (draw(shape, i) for i in range(3))
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
        out, dinp, inp = place(x), place(x), place(x)
        gelu.gelu_forward(out, inp)
        gelu.gelu_backward(dinp, place(np.ones_like(x)), inp, add=False)
        np.testing.assert_array_equal(to_host(out), np.maximum(x, 0))
        want = (x > 0) + 0.5 * (x == 0)
        np.testing.assert_array_equal(to_host(dinp), want)


def launched(n=2051):
    """What each layer is seen to do, by how many bytes an element it moves."""
    x, y, d = (simulated(draw(n, i)) for i in range(3))
    for nbytes, layer, arrays in (
        (8, gelu.gelu_forward, (y, x)),
        (16, gelu.gelu_backward, (y, d, x)),
        (12, gelu.gelu_backward, (y, d, x, False)),
        (12, residual.residual_forward, (y, x, d)),
        (24, residual.residual_backward, (x, y, d)),
    ):
        with watch() as seen:
            layer(*arrays)
        yield nbytes, seen


def test_machine_code():
    for _, seen in launched(33):
        for made in check_machine_code(seen).values():
            assert made.vector_loads and made.vector_stores
            assert made.registers <= 64
            assert "tanh" not in made.ptx and "call" not in made.ptx


def test_empty_arrays():
    """Nothing is launched, as on the CPU nothing is done."""
    for shape in ((0,), (2, 0), (0, 5)):
        x, y, z = (simulated(np.empty(shape, np.float32)) for _ in range(3))
        with watch() as seen:
            gelu.gelu_forward(y, x)
            gelu.gelu_backward(y, y, x)
            residual.residual_forward(x, y, z)
            residual.residual_backward(x, y, z)
        assert not seen.launches
