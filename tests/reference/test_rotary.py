"""Rotary positions: what is refused, and scaled frequencies."""

import numpy as np
import pytest

from llmnb import cpu, cuda, reference
from llmnb.gpu.launch import simulated
from llmnb.reference.rotary import rope_frequencies


@pytest.mark.parametrize("layer", (reference, cpu, cuda))
@pytest.mark.parametrize(
    "width, hs, heads, first, what",
    (
        (12, 6, 3, 0, "n at least heads = 3"),
        (12, 6, 0, 0, "n at least heads = 0"),
        (12, 8, 1, 0, "hs = 8 even"),
        (9, 3, 1, 0, "hs = 3 even"),
        (12, 0, 1, 0, "hs = 0 even and above 0"),
        (12, 6, 1.5, 0, "heads must be an integer, got 1.5"),
        (12, 6, 1, 0.5, "first must be an integer, got 0.5"),
        (12, 6, 1, None, "first must be an integer, got None"),
        (12, 6, 1, 2, "positions 2 to 4, where the table has 4"),
        (12, 6, 1, -1, "positions -1 to 1"),
    ),
)
def test_what_does_not_fit(layer, width, hs, heads, first, what):
    x, table = np.zeros((1, 3, width), "f4"), np.zeros((4, hs), "f4")
    if layer is cuda:
        x, table = simulated(x), simulated(table)
    for name in ("rotary_forward", "rotary_backward"):
        with pytest.raises(ValueError, match=f"{name}: .*{what}"):
            getattr(layer, name)(x, table, heads, first)


@pytest.mark.parametrize("layer", (reference, cpu, cuda))
def test_places_of_other_integers(layer):
    """Sums of 8 bits end at 255; rows do not."""
    x = np.random.default_rng(5).normal(size=(1, 9, 12)).astype("f4")
    table = reference.rope_table(300, 6, 100.0).astype("f4")
    found = []
    for number in (int, np.uint8):
        y, rows = x.copy(), table
        if layer is cuda:
            y, rows = simulated(y), simulated(rows)
        layer.rotary_forward(y, rows, number(2), number(250))
        layer.rotary_backward(y, rows, number(1), number(249))
        found.append(np.array(y))
    assert not np.array_equal(found[0], x)
    assert np.array_equal(*found)


@pytest.mark.parametrize("layer", (reference, cpu, cuda))
@pytest.mark.parametrize("shape", ((0, 3, 12), (2, 0, 12)))
def test_no_tokens(layer, shape):
    x, table = np.zeros(shape, "f4"), np.zeros((4, 6), "f4")
    if layer is cuda:
        x, table = simulated(x), simulated(table)
    layer.rotary_forward(x, table, 2)
    layer.rotary_backward(x, table, 2)


def test_an_odd_head_has_no_table():
    with pytest.raises(ValueError, match="rope: hs must be even, got 5"):
        reference.rope_table(3, 5, 1e4)


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
