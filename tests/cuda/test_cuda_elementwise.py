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
        names = {launch[0].__name__ for launch in seen.launches}
        assert names == {f"{each}_each"}


def test_one_view_that_is_not_aligned_is_enough():
    x = draw(41)
    want = np.empty(40, np.float32)
    reference.gelu_forward(want, x[1:])
    for place in PLACES:
        a, b = place(x)[1:], place(x[1:])
        for out, inp in ((a, b), (place(x[1:]), place(x)[1:])):
            with watch() as seen:
                gelu.gelu_forward(out, inp)
            np.testing.assert_allclose(to_host(out), want, atol=2e-6)
            assert seen.launches[0][0].__name__ == "one_each"


def test_in_place(each):
    """out may be inp or inp2, and dinp may be dout."""
    x, d = draw(1027), draw(1027, 1)
    want, slope = np.empty_like(x), np.empty_like(x)
    reference.gelu_forward(want, x)
    reference.gelu_backward(slope, d, x, add=False)
    for place in PLACES:
        inp, grad, both = place(x), place(d), place(d)
        with watch():
            gelu.gelu_backward(grad, grad, inp, add=False)
            residual.residual_forward(both, inp, both)
            gelu.gelu_forward(inp, inp)
        np.testing.assert_allclose(to_host(inp), want, atol=2e-6)
        np.testing.assert_allclose(to_host(grad), slope, atol=2e-6)
        np.testing.assert_array_equal(to_host(both), x + d)


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


def test_gelu_over_a_grid():
    x = np.linspace(-12, 12, 4001, dtype=np.float32)
    wide, ones = x.astype(np.float64), np.ones_like(x)
    want, slope = np.empty_like(wide), np.zeros_like(wide)
    reference.gelu_forward(want, wide)
    reference.gelu_backward(slope, ones.astype(np.float64), wide)
    for place in PLACES:
        out, dinp, inp = place(x), place(x), place(x)
        gelu.gelu_forward(out, inp)
        gelu.gelu_backward(dinp, place(ones), inp, add=False)
        scale = np.maximum(1, np.abs(want))
        assert (np.abs(to_host(out) - want) / scale).max() < 1e-6
        assert np.abs(to_host(dinp) - slope).max() < 2e-6


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


def test_vectors_make_a_quarter_of_the_requests(monkeypatch):
    fours = [*launched()]
    monkeypatch.setattr(elementwise, "aligned", lambda *arrays: False)
    for (nbytes, four), (_, one) in zip(fours, launched(), strict=True):
        for seen in (one, four):
            assert seen.read_bytes + seen.written_bytes == nbytes * 2051
        assert one.sectors == four.sectors == nbytes // 4 * -(-2051 // 8)
        assert 3.8 < one.requests / four.requests <= 4


def test_machine_code(each):
    for _, seen in launched(33):
        for made in check_machine_code(seen).values():
            assert bool(made.vector_loads) == (each == "four")
            assert bool(made.vector_stores) == (each == "four")
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


@pytest.mark.parametrize(
    "spoil, error, message",
    [
        (lambda a: simulated(a[:, :-1]), ValueError, "must have shape"),
        (lambda a: simulated(a.astype("f8")), TypeError, "must be float32"),
        (lambda a: a, TypeError, "must be a device's array"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(spoil, error, message):
    x, y = simulated(draw((3, 4))), simulated(draw((3, 4), 1))
    bad = spoil(draw((3, 4)))
    for layer, arrays in (
        (gelu.gelu_forward, (x, bad)),
        (gelu.gelu_backward, (x, bad, y)),
        (residual.residual_forward, (x, y, bad)),
        (residual.residual_backward, (x, bad, y)),
    ):
        with pytest.raises(error, match=message):
            layer(*arrays)


def test_gradients_are_three_arrays():
    x, y = (simulated(draw(8, i)) for i in range(2))
    for args in ((x, x, y), (x, y, x), (x, y, y), (x[:4], y[:4], x[2:6])):
        with pytest.raises(ValueError, match="must not share memory"):
            residual.residual_backward(*args)
    residual.residual_backward(x[:4], x[4:], y[:4])
