"""GELU on the GPU: every version, its counts, its machine code, bad input."""

import math
import re

import numpy as np
import pytest
from gpu import PLACES, check_layer, check_machine_code, compiled

from llmnb.cuda import gelu as cuda
from llmnb.gpu.launch import kernel, simulated, to_host
from llmnb.gpu.ptx import no_compiler
from llmnb.gpu.simulator import cuda as threads
from llmnb.gpu.simulator import watch
from llmnb.reference import gelu as reference

SHAPES = [(1,), (3,), (4,), (5,), (33,), (2, 3, 5), (7, 100), (1027,)]
VERSIONS = [1, 2]


def draw(shape, scale=3.0, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(scale=scale, size=shape).astype(np.float32)


def both(shape, version, place):
    x, dout = place(draw(shape)), place(draw(shape, seed=1))
    out, dinp = place(draw(shape)), place(draw(shape))
    cuda.gelu_forward(out, x, version=version)
    cuda.gelu_backward(dinp, dout, x, version=version)
    return to_host(out), to_host(dinp)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape, version):
    arrays = {"out": np.full(shape, np.nan, np.float32), "inp": draw(shape)}
    check_layer(
        cuda.gelu_forward,
        reference.gelu_forward,
        arrays,
        ["out"],
        version=version,
    )


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("add", [True, False])
def test_backward(shape, version, add):
    """With add=False, dinp may hold NaN: it is not read."""
    old = draw(shape, seed=2) if add else np.full(shape, np.nan, np.float32)
    arrays = {"dinp": old, "dout": draw(shape, seed=1), "inp": draw(shape)}
    arrays["add"] = add
    check_layer(
        cuda.gelu_backward,
        reference.gelu_backward,
        arrays,
        ["dinp"],
        version=version,
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_in_place(version):
    """out may be inp, and dinp may be dout."""
    x, dout = draw(1027), draw(1027, seed=1)
    want, slope = np.empty_like(x), np.empty_like(x)
    reference.gelu_forward(want, x)
    reference.gelu_backward(slope, dout, x, add=False)
    for place in PLACES:
        inp, grad = place(x), place(dout)
        with watch():
            cuda.gelu_backward(grad, grad, inp, add=False, version=version)
            cuda.gelu_forward(inp, inp, version=version)
        np.testing.assert_allclose(to_host(inp), want, atol=2e-6)
        np.testing.assert_allclose(to_host(grad), slope, atol=2e-6)


def test_an_element_gets_the_same_bits_wherever_it_stands():
    """In a vector, in the rest after the vectors, or alone."""
    for one, two in zip(
        both(203, 1, simulated), both(203, 2, simulated), strict=True
    ):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("version", VERSIONS)
def test_far_out(version):
    """Nothing overflows, and the slope is 0 or 1."""
    x = np.array([-1e6, -1e3, -100, 0, 100, 1e3, 1e6], np.float32)
    for place in PLACES:
        out, dinp, inp = place(x), place(x), place(x)
        ones = place(np.ones_like(x))
        cuda.gelu_forward(out, inp, version=version)
        cuda.gelu_backward(dinp, ones, inp, add=False, version=version)
        np.testing.assert_array_equal(to_host(out), np.maximum(x, 0))
        want = (x > 0) + 0.5 * (x == 0)
        np.testing.assert_array_equal(to_host(dinp), want)


def test_accuracy_over_a_grid():
    x = np.linspace(-12, 12, 4001, dtype=np.float32)
    wide = x.astype(np.float64)
    ones = np.ones_like(x)
    want, slope = np.empty_like(wide), np.zeros_like(wide)
    reference.gelu_forward(want, wide)
    reference.gelu_backward(slope, np.ones_like(wide), wide)
    for place in PLACES:
        out, dinp, inp = place(x), place(x), place(x)
        cuda.gelu_forward(out, inp)
        cuda.gelu_backward(dinp, place(ones), inp, add=False)
        scale = np.maximum(1, np.abs(want))
        assert (np.abs(to_host(out) - want) / scale).max() < 1e-6
        assert np.abs(to_host(dinp) - slope).max() < 2e-6


def seen_by(run, *args):
    with watch() as seen:
        run(*args)
    return seen


def test_counts_of_the_text():
    """A quarter of the requests and threads, the same sectors and bytes."""
    n = 2048 + 3
    x, y, d = (simulated(draw(n)) for _ in range(3))
    runs = {
        8: lambda v: cuda.gelu_forward(y, x, version=v),
        16: lambda v: cuda.gelu_backward(y, d, x, version=v),
        12: lambda v: cuda.gelu_backward(y, d, x, add=False, version=v),
    }
    for nbytes, run in runs.items():
        one, two = (seen_by(run, v) for v in VERSIONS)
        for seen in (one, two):
            assert seen.read_bytes + seen.written_bytes == nbytes * n
            assert len(seen.launches) == 1
        assert one.sectors == two.sectors == nbytes // 4 * -(-n // 8)
        assert 3.8 < one.requests / two.requests <= 4
        assert one.threads == 256 * 9 and two.threads == 256 * 3


def test_machine_code():
    def run(version):
        x, y, d = (simulated(draw(33)) for _ in range(3))
        cuda.gelu_forward(y, x, version=version)
        cuda.gelu_backward(y, d, x, version=version)

    one = check_machine_code(seen_by(run, 1))
    two = check_machine_code(seen_by(run, 2))
    for made in one.values():
        assert made.vector_loads == made.vector_stores == 0
        assert made.ptx.count("ex2.approx") == 1
        assert "tanh" not in made.ptx and "call" not in made.ptx
    forward = one["_forward_elements"].ptx
    assert forward.count("bra") == 1, "a branch besides the guard"
    # what the chapter counts as about 20 operations
    work = re.findall(r"\b(?:mul|add|fma|abs|neg|div|cvt|setp|selp|ex2)\.\S*"
                      r"f32\b", forward)  # fmt: skip
    assert 18 <= len(work) <= 24
    assert two["_forward_fours"].vector_loads == 1
    assert two["_forward_fours"].vector_stores == 1
    assert two["_backward_fours"].vector_loads == 3
    # one for both cases, or one for each
    assert two["_backward_fours"].vector_stores in (1, 2)
    assert all(made.registers <= 64 for made in two.values())


def test_tanh_would_become_a_rough_instruction():
    """What the chapter says of math.tanh under fastmath."""
    if no_compiler():
        pytest.skip(no_compiler())

    @kernel
    def tanh(out, inp):
        i = threads.grid(1)
        if i < inp.size:
            out[i] = math.tanh(inp[i])

    kinds = (("float32", 1), ("float32", 1))
    assert "tanh.approx.f32" in compiled(tanh, kinds, (9, 0)).ptx


def test_a_view_that_is_not_aligned_goes_to_version_1():
    x = draw(40)
    for place in PLACES:
        inp, out = place(x)[1:], place(x)[1:]
        with watch() as seen:
            cuda.gelu_forward(out, inp)
            cuda.gelu_backward(out, out, inp, add=False)
        if place is simulated:
            names = [launch[0].__name__ for launch in seen.launches]
            assert names == ["_forward_elements", "_backward_elements"]


def test_empty_arrays():
    """Nothing is launched, as on the CPU nothing is done."""
    for shape in ((0,), (2, 0), (0, 5)):
        x, y = (simulated(np.empty(shape, np.float32)) for _ in range(2))
        with watch() as seen:
            for version in VERSIONS:
                cuda.gelu_forward(y, x, version=version)
                cuda.gelu_backward(y, y, x, version=version)
        assert not seen.launches


BAD = [
    (lambda a: a[:, :-1], ValueError, r"must have shape \(3, 4\), got"),
    (lambda a: a.astype(np.float64), TypeError, "must be float32"),
]


@pytest.mark.parametrize("spoil, error, message", BAD)
def test_arrays_that_do_not_fit_are_refused(spoil, error, message):
    good = draw((3, 4))
    x, bad = simulated(good), simulated(spoil(good))
    with pytest.raises(error, match=f"out {message}"):
        cuda.gelu_forward(bad, x)
    with pytest.raises(error, match=f"dinp {message}"):
        cuda.gelu_backward(bad, x, x)
    with pytest.raises(error, match=f"dout {message}"):
        cuda.gelu_backward(x, bad, x)


def test_bad_arguments():
    x, y, z = (simulated(draw(4)) for _ in range(3))
    with pytest.raises(TypeError, match="must be a device's array"):
        cuda.gelu_forward(x, draw(4))
    for version in (0, 3, -1):
        with pytest.raises(ValueError, match="version must be in 1 to 2"):
            cuda.gelu_forward(x, x, version=version)
        with pytest.raises(ValueError, match="version must be in 1 to 2"):
            cuda.gelu_backward(x, y, z, version=version)
