"""RMSNorm: all backends, gradients and threads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import assert_threads_change_no_bit

from llmnb import cpu, reference
from llmnb.book.verify import numerical_gradient

NAMES = ("out", "rstd", "dinp", "dweight")
sizes = st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 331))
small = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 9))
offsets = st.sampled_from((0.0, 1.0))
drawn = settings(max_examples=25, deadline=None, derandomize=True)


def problem(B, T, C, dtype, seed=0):
    """Arrays for one forward and backward pass; gradients not zero."""
    rng = np.random.default_rng(seed)
    shapes = dict.fromkeys(("inp", "dout", "out", "dinp"), (B, T, C))
    shapes |= dict.fromkeys(("weight", "dweight"), (C,))
    shapes |= {"rstd": (B, T)}
    return {n: rng.normal(size=s).astype(dtype) for n, s in shapes.items()}


def run(layer, p, eps=1e-5, offset=0.0, add=True):
    """The forward pass, then the backward pass, on a problem's arrays."""
    arrays = [p[n] for n in ("out", "rstd", "inp", "weight")]
    layer.rmsnorm_forward(*arrays, eps, offset)
    names = ("dinp", "dweight", "dout", "inp", "weight", "rstd")
    layer.rmsnorm_backward(*(p[n] for n in names), offset, add)
    return p


@drawn
@given(
    sizes, st.sampled_from((np.float32, np.float64)), offsets, st.booleans()
)
def test_cpu_equals_reference(shape, dtype, offset, add):
    how = {"eps": 1e-3, "offset": offset, "add": add}
    got = run(cpu, problem(*shape, dtype), **how)
    want = run(reference, problem(*shape, np.float64), **how)
    tol = 1e-12 if dtype == np.float64 else 2e-5
    for name in NAMES:
        assert got[name].dtype == dtype
        scale = max(1.0, np.abs(want[name]).max())
        assert np.abs(got[name] - want[name]).max() / scale < tol, name


@drawn
@given(small, offsets, st.sampled_from((1e-6, 0.1)))
def test_gradients(shape, offset, eps):
    """The reference's, which the CPU's equal, by central differences."""
    p = problem(*shape, np.float64)
    p["inp"] += np.sign(p["inp"])  # no row near zero, where all is steep

    def loss():
        arrays = [p[n] for n in ("out", "rstd", "inp", "weight")]
        reference.rmsnorm_forward(*arrays, eps, offset)
        return (p["dout"] * p["out"]).sum()

    p["dinp"][...] = p["dweight"][...] = 0
    run(reference, p, eps, offset)
    for name in ("inp", "weight"):
        want = numerical_gradient(loss, p[name])
        np.testing.assert_allclose(p[f"d{name}"], want, atol=1e-8)


@pytest.mark.parametrize("layer", [reference, cpu])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_backward_adds_or_overwrites(layer, dtype):
    """add=False gives what adding to zeros gives, whatever was there."""
    zero = problem(2, 3, 17, dtype)
    zero["dinp"][...] = 0
    want = run(layer, zero)["dinp"]
    begun = problem(2, 3, 17, dtype)
    start = begun["dinp"].copy()
    added = run(layer, begun)["dinp"] - start
    np.testing.assert_allclose(added, want, atol=2e-6)
    for old in (7, np.nan, np.inf):
        p = problem(2, 3, 17, dtype)
        p["dinp"][...] = old
        got = run(layer, p, add=False)["dinp"]
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("layer", [reference, cpu])
def test_the_weights_gradient_is_added(layer):
    once, twice = (problem(2, 3, 8, np.float64) for _ in range(2))
    start = once["dweight"].copy()
    run(layer, once)
    run(layer, twice)
    run(layer, twice)
    added = once["dweight"] - start
    got = twice["dweight"] - start
    np.testing.assert_allclose(got, 2 * added, atol=1e-12)


@pytest.mark.parametrize("layer", [reference, cpu])
def test_an_offset_of_one_is_a_weight_that_is_one_more(layer):
    """As Gemma has it; in float64, where 1 + w is exact enough."""
    gemma, llama = (problem(2, 5, 24, np.float64) for _ in range(2))
    llama["weight"] += 1
    run(layer, gemma, offset=1.0)
    run(layer, llama)
    for name in NAMES:
        np.testing.assert_allclose(gemma[name], llama[name], atol=1e-13)


@pytest.mark.parametrize("rows", [15, 16, 17, 1023, 1024, 1025, 1200])
def test_every_row_is_counted_once(rows):
    """The sums over rows are taken in parts; no row is lost between them."""
    p = problem(1, rows, 3, np.float64)
    p["dweight"][...], p["dout"][...] = 0, 1
    run(cpu, p)
    want = (p["inp"] * p["rstd"][..., None]).sum((0, 1))
    np.testing.assert_allclose(p["dweight"], want, atol=1e-9)


@pytest.mark.parametrize("layer", [reference, cpu])
def test_a_row_of_zeros_is_finite(layer):
    p = problem(1, 2, 16, np.float32)
    p["inp"][...] = 0
    run(layer, p)
    assert (p["out"] == 0).all() and np.isfinite(p["dinp"]).all()


@pytest.mark.parametrize("C", [5, 64, 331])
def test_a_row_gets_the_same_bits_alone(C):
    """As when a text is written token by token."""
    whole = run(cpu, problem(2, 7, C, np.float32), offset=1.0)
    for b, t in np.ndindex(2, 7):
        row = whole["inp"][b : b + 1, t : t + 1].copy()
        out, rstd = np.empty_like(row), np.empty((1, 1), np.float32)
        cpu.rmsnorm_forward(out, rstd, row, whole["weight"], 1e-5, 1.0)
        np.testing.assert_array_equal(out[0, 0], whole["out"][b, t])


def test_threads_change_no_bit():
    def work():
        p = run(cpu, problem(3, 37, 331, np.float32), offset=1.0)
        return [p[name] for name in NAMES]

    assert_threads_change_no_bit(work)
