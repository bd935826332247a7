"""Rotary positions: all backends, gradients, and what a turn keeps."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import assert_threads_change_no_bit

from llmnb import cpu, reference
from llmnb.book.verify import numerical_gradient
from llmnb.reference.rotary import rope_frequencies, rope_table

drawn = settings(max_examples=25, deadline=None, derandomize=True)
BOTH = pytest.mark.parametrize("layer", (reference, cpu))


@st.composite
def problems(draw, most=70):
    """x, a table, how many heads turn, and the first row's position."""
    B, T = draw(st.integers(1, 3)), draw(st.integers(1, most))
    heads, more = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    hs, first = 2 * draw(st.integers(1, 20)), draw(st.integers(0, 9))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, T, (heads + more) * hs))
    return x, rope_table(first + T, hs, 10000.0), heads, first


@drawn
@given(problems(), st.sampled_from((np.float32, np.float64)))
def test_cpu_equals_reference(p, dtype):
    x, table, heads, first = p
    x, table = x.astype(dtype), table.astype(dtype)
    tol = 1e-14 if dtype == np.float64 else 1e-6
    for name in ("rotary_forward", "rotary_backward"):
        got, want = x.copy(), x.astype(np.float64)
        getattr(cpu, name)(got, table, heads, first)
        getattr(reference, name)(want, table.astype(np.float64), heads, first)
        assert np.abs(got - want).max() < tol * max(1, np.abs(x).max())
        still = slice(heads * table.shape[1], None)
        assert np.array_equal(got[..., still], x[..., still])


@BOTH
@drawn
@given(p=problems())
def test_backward_turns_back(layer, p):
    x, table, heads, first = p
    turned = x.copy()
    layer.rotary_forward(turned, table, heads, first)
    assert np.linalg.norm(turned) == pytest.approx(np.linalg.norm(x))
    layer.rotary_backward(turned, table, heads, first)
    np.testing.assert_allclose(turned, x, rtol=0, atol=1e-14)


@BOTH
def test_a_product_depends_on_the_distance_alone(layer):
    rng, hs = np.random.default_rng(0), 8
    q, k = rng.normal(size=(2, hs))
    table = rope_table(40, hs, 10000.0)
    rows = np.repeat(np.concatenate([q, k])[None, None], 40, axis=1)
    layer.rotary_forward(rows, table, 2)
    found = rows[0, :, :hs] @ rows[0, :, hs:].T
    for distance in range(-39, 40):
        near = np.diagonal(found, distance)
        np.testing.assert_allclose(near, near[0], rtol=0, atol=1e-12)


@BOTH
def test_gradient(layer):
    rng = np.random.default_rng(0)
    x, dout = rng.normal(size=(2, 1, 3, 12))
    table = rope_table(5, 4, 100.0)

    def loss():
        out = x.copy()
        layer.rotary_forward(out, table, 2, 1)
        return (dout * out).sum()

    dx = dout.copy()
    layer.rotary_backward(dx, table, 2, 1)
    np.testing.assert_allclose(dx, numerical_gradient(loss, x), atol=1e-9)


@BOTH
def test_a_text_may_be_turned_in_parts(layer):
    rng, table = np.random.default_rng(0), rope_table(9, 6, 1e4)
    x = rng.normal(size=(1, 9, 18))
    whole, parts = x.copy(), x.copy()
    layer.rotary_forward(whole, table, 2)
    for first, end in ((0, 4), (4, 5), (5, 9)):
        part = np.ascontiguousarray(parts[:, first:end])
        layer.rotary_forward(part, table, 2, first)
        parts[:, first:end] = part
    assert np.array_equal(whole, parts)


def test_threads_change_no_bit():
    x = np.random.default_rng(0).normal(size=(1, 37, 24))
    table = rope_table(37, 4, 1e4)

    def turned():
        out = x.copy()
        cpu.rotary_forward(out, table, 4)
        return [out]

    assert_threads_change_no_bit(turned)


@BOTH
@pytest.mark.parametrize(
    "width, hs, heads, first, what",
    (
        (12, 6, 3, 0, "n at least heads = 3"),
        (12, 6, 0, 0, "n at least heads = 0"),
        (12, 8, 1, 0, "hs = 8 even"),
        (9, 3, 1, 0, "hs = 3 even"),
        (12, 6, 1, 2, "positions 2 to 4, where the table has 4"),
        (12, 6, 1, -1, "positions -1 to 1"),
    ),
)
def test_what_does_not_fit(layer, width, hs, heads, first, what):
    x, table = np.zeros((1, 3, width)), np.zeros((4, hs))
    for name in ("rotary_forward", "rotary_backward"):
        with pytest.raises(ValueError, match=f"{name}: .*{what}"):
            getattr(layer, name)(x, table, heads, first)


def test_scaled_frequencies():
    plain = rope_frequencies(64, 5e5)
    assert np.array_equal(
        rope_frequencies(64, 5e5, ("linear", 8.0)), plain / 8
    )
    scaled = rope_frequencies(64, 5e5, ("llama3", 8.0, 1.0, 4.0, 8192))
    wave = 2 * np.pi / plain
    assert np.array_equal(scaled[wave < 2048], plain[wave < 2048])
    assert np.array_equal(scaled[wave > 8192], plain[wave > 8192] / 8)
    between = (wave >= 2048) & (wave <= 8192)
    assert between.any()
    assert (scaled[between] <= plain[between]).all()
    assert (scaled[between] >= plain[between] / 8).all()
    with pytest.raises(ValueError, match="'yarn' is none of linear, llama3"):
        rope_frequencies(64, 1e4, ("yarn", 2.0))
