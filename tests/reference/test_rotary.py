"""Rotary positions: what a turn keeps, what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from layers import problems

from llmnb import cpu, reference
from llmnb.reference.rotary import rope_frequencies, rope_table

BOTH = pytest.mark.parametrize("layer", (reference, cpu))


@BOTH
@settings(max_examples=25, deadline=None, derandomize=True)
@given(p=problems("rotary", np.float64))
def test_backward_turns_back(layer, p):
    x, how = p["x"].copy(), (p["table"], p["heads"], p["first"])
    layer.rotary_forward(x, *how)
    assert np.linalg.norm(x) == pytest.approx(np.linalg.norm(p["x"]))
    layer.rotary_backward(x, *how)
    np.testing.assert_allclose(x, p["x"], rtol=0, atol=1e-14)


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
