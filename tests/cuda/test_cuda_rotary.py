"""Rotary positions on a GPU: right for any shape, what they move."""

import numpy as np
import pytest
from gpu import PLACES, between, check_layer, check_machine_code, there
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnb import cuda, reference
from llmnb.gpu.launch import simulated, to_host
from llmnb.gpu.simulator import watch

WAYS = "rotary_forward", "rotary_backward"
drawn = settings(max_examples=16, deadline=None, derandomize=True)
# B, T, half a head, heads that turn, heads that do not, the first position
shapes = st.tuples(
    st.integers(1, 2), st.integers(1, 9), st.integers(1, 20),
    st.integers(1, 4), st.integers(0, 2), st.integers(0, 3),
)  # fmt: skip


def draw(B, T, half, heads, still, first):
    rng, hs = np.random.default_rng(0), 2 * half
    x = rng.normal(size=(B, T, (heads + still) * hs)).astype(np.float32)
    table = reference.rope_table(first + T + 1, hs, 100.0).astype(np.float32)
    return {"x": x, "table": table, "heads": heads, "first": first}


def check(way, *shape):
    layers = getattr(cuda, way), getattr(reference, way)
    return check_layer(*layers, draw(*shape), ["x"], tol=5e-7)


@drawn
@given(st.sampled_from(WAYS), shapes)
def test_layers_equal_the_reference(way, shape):
    assert len(check(way, *shape).launches) == 1


@pytest.mark.parametrize("place", PLACES)
def test_back_is_where_it_began(place):
    for half in (3, 8):
        arrays = draw(2, 5, half, 3, 1, 0)
        given = there(arrays, place)
        cuda.rotary_forward(*given.values())
        turned = to_host(given["x"])
        cuda.rotary_backward(*given.values())
        back, width = to_host(given["x"]), 3 * 2 * half
        assert np.abs(turned - arrays["x"])[:, 1:, :width].max() > 0.1
        np.testing.assert_allclose(back, arrays["x"], rtol=0, atol=1e-6)
        for x in (turned, back):
            same = np.array_equal(x[..., width:], arrays["x"][..., width:])
            assert same, "the heads of values"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["x", "table"])
def test_an_array_may_begin_between_vectors(name, place):
    arrays = draw(1, 3, 8, 2, 1, 1)
    straight = there(arrays, place)
    cuda.rotary_forward(*straight.values())
    given = there(arrays, place, **{name: lambda x: between(x, place)})
    with watch():
        cuda.rotary_forward(*given.values())
    got, want = to_host(given["x"]), to_host(straight["x"])
    np.testing.assert_array_equal(got, want)


def test_what_it_moves():
    """x in and out, and a row of the table for each head that turns."""
    seen = check("rotary_forward", 1, 4, 32, 4, 2, 0)
    assert seen.sectors == 4 * 4 * (2 * 8 + 8)
    assert seen.barriers == seen.exchanges == 0


def test_machine_code():
    (made,) = check_machine_code(check(WAYS[1], 1, 2, 3, 2, 1, 0)).values()
    assert made.registers <= 64


def test_what_is_refused():
    x, table = (simulated(np.ones(s, "f4")) for s in ((1, 4, 12), (4, 6)))
    with watch() as seen:
        with pytest.raises(ValueError, match="at least heads = 3"):
            cuda.rotary_forward(x, table, 3)
        with pytest.raises(ValueError, match="positions 1 to 4, where the"):
            cuda.rotary_backward(x, table, 2, 1)
    assert not seen.launches


def test_nothing_is_launched_for_empty_arrays():
    table = simulated(np.ones((4, 6), "f4"))
    with watch() as seen:
        cuda.rotary_forward(simulated(np.ones((0, 3, 12), "f4")), table, 2)
    assert not seen.launches
