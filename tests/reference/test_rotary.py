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
